"""Builds the extension `salt_ops`:  python setup.py build_ext; and, for `pip install -e .`, says
what can be imported from anywhere: salt and model. Without torch, as in pip's own environment for
building, nothing is compiled then: build_ext does it.

The CPU kernels always; the CUDA kernels too where this torch has CUDA and nvcc is found (CUDA_HOME,
or on PATH; SALT_CUDA=0 leaves them out). For the architectures in TORCH_CUDA_ARCH_LIST, else for
all below and the GPUs at hand, as far as this nvcc knows them, and PTX of the newest for GPUs to
come.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from salt import source_digest

IMPORTED = {"packages": ["salt"], "py_modules": ["model"]}
try:
    import torch
except ImportError:
    if "build_ext" in sys.argv:
        sys.exit("setup.py: the kernels are built with torch, which is not installed")
    setup(**IMPORTED)
    sys.exit()

# an environment's own ninja is found
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
# Ampere, its GeForce, Ada, Hopper, Blackwell, its GeForce
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def cuda_home():
    """The CUDA toolkit's folder, or None: CUDA_HOME, or what nvcc says of itself, since the nvcc on
    PATH may be a wrapper or a link.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return home if os.path.isfile(os.path.join(str(home), "bin", "nvcc")) else None
    installed = [
        *glob.glob("/usr/local/cuda/bin/nvcc"),
        *sorted(glob.glob("/usr/local/cuda-*/bin/nvcc"), reverse=True),
    ]
    nvcc = shutil.which("nvcc") or (installed[0] if installed else None)
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    return os.path.realpath(
        top[1].strip() if top else os.path.join(os.path.dirname(os.path.realpath(nvcc)), "..")
    )


home = cuda_home() if torch.version.cuda and os.environ.get("SALT_CUDA", "1") != "0" else None
if home:
    os.environ["CUDA_HOME"] = home  # torch looks here when it is imported
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension


def architecture_flags():
    """(nvcc flags, what they stand for); no flags where TORCH_CUDA_ARCH_LIST is set, which torch
    turns into its own.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return [], asked
    listed = subprocess.run(
        [os.path.join(str(home), "bin", "nvcc"), "--list-gpu-arch"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    here = {
        10 * major + minor
        for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    }
    known = [
        arch for arch in sorted({*ARCHITECTURES, *here}) if f"compute_{arch}" in listed.split()
    ]
    if not known:
        raise RuntimeError(f"{home}/bin/nvcc knows none of the architectures {ARCHITECTURES}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known] + [
        f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"
    ]
    return flags, ";".join(f"{arch / 10:.1f}" for arch in known) + "+PTX"


def write_digest():
    """The header by which the extension knows its sources, so that ops.py tells a stale build; one
    file is compiled again for it.
    """
    path, line = (
        os.path.join("build", "generated", "salt_sources.h"),
        f'#define SALT_SOURCES "{source_digest()}"\n',
    )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.isfile(path) or open(path).read() != line:
        with open(path, "w") as file:
            file.write(line)
    return os.path.abspath(os.path.dirname(path))


def build(cuda):
    # GCC's OpenMP calls resolve to the runtime that torch has loaded; linking another one would
    # give two thread pools.
    openmp = ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"] if sys.platform == "linux" else []
    host = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", *openmp]
    sources = sorted(glob.glob("csrc/*.cpp"))
    flags = {}
    if cuda:
        gencode, architectures = architecture_flags()
        host += ["-DSALT_CUDA", f'-DSALT_ARCHITECTURES="{architectures}"']
        sources += sorted(glob.glob("csrc/*.cu"))
        flags = {"nvcc": ["-O3", *gencode]}
    setup(
        **IMPORTED,
        ext_modules=[
            (CUDAExtension if cuda else CppExtension)(
                "salt_ops",
                sources,
                include_dirs=[write_digest()],
                extra_compile_args={"cxx": host, **flags},
            )
        ],
        # force: ninja alone decides what to compile again, by flags and headers too; inplace: the
        # extension lies beside the scripts.
        options={"build_ext": {"inplace": True, "force": True}},
        cmdclass={"build_ext": BuildExtension},
    )


if home:
    try:
        build(cuda=True)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        print(
            f"setup.py: the CUDA kernels did not build with {home} ({reason[:300]}); building for"
            " the CPU alone. The compiler's own message is above; SALT_CUDA=0 skips this.",
            file=sys.stderr,
        )
        build(cuda=False)
else:
    if torch.version.cuda and os.environ.get("SALT_CUDA", "1") != "0":
        asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        why = (
            f"CUDA_HOME={asked} holds no bin/nvcc"
            if asked
            else "no nvcc was found (CUDA_HOME, PATH)"
        )
        print(
            f"setup.py: this torch has CUDA, but {why}: building for the CPU alone",
            file=sys.stderr,
        )
    build(cuda=False)
