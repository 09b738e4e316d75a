"""Registers and spills of each kernel, for `make cuda-check`: reads what `nvcc -Xptxas -v` printed;
any spill is an error.

    NVCC_APPEND_FLAGS="-Xptxas -v" python setup.py build_ext 2>&1 | tee build.log;  python
    ptxas_report.py build.log
"""

import re
import subprocess
import sys
from collections import defaultdict

text = open(sys.argv[1]).read()
found = re.findall(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill"
    r" stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    text,
    re.DOTALL,
)
if not found:
    sys.exit(f"{sys.argv[1]} holds no output of ptxas -v: were the .cu files compiled?")
mangled = sorted({name for name, *_ in found})
plain = subprocess.run(
    ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
).stdout.splitlines()
names = dict(
    zip(
        mangled,
        (
            re.sub(r"salt::|\(anonymous namespace\)::|^void |\([^()]*\)$", "", name)
            for name in plain
        ),
    )
)
kernels = defaultdict(dict)  # kernel -> architecture -> (registers, bytes spilled)
for name, architecture, _, stores, loads, registers in found:
    kernels[names[name]][architecture] = int(registers), int(stores) + int(loads)
architectures = sorted(
    {a for by in kernels.values() for a in by}, key=lambda a: int(a[3:].rstrip("af"))
)
print(f"{'registers a thread':60}", *(f"{a:>7}" for a in architectures))
for kernel, by in sorted(kernels.items()):
    print(f"{kernel:60}", *(f"{by[a][0]:7d}" if a in by else "      -" for a in architectures))
spills = [
    f"{kernel} spills {by[a][1]} bytes on {a}"
    for kernel, by in kernels.items()
    for a in by
    if by[a][1]
]
print(
    f"{len(kernels)} kernels, {len(architectures)} architectures, spills:"
    f" {'; '.join(spills) or 'none'}"
)
sys.exit(bool(spills))
