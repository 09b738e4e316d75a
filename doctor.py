"""Would training run on this machine? Tries what a run needs, a line a check, with what a failure
means and what to do.

    python doctor.py                       everything; exit code 0 only where training would run
    python doctor.py --device cuda         a GPU that cannot be used is then a failure
    python doctor.py --only driver,cuda    these checks alone

ok is as it should be; with warn training runs, slower or without something; with FAIL it does not.
docs/TROUBLESHOOTING.md has a section for each check. What may hang or crash (CUDA, codecs, a disk)
is tried in a child process with a time limit.
"""

import contextlib
import ctypes
import errno
import functools
import glob
import importlib
import importlib.metadata
import operator
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from json import dumps, loads

if sys.version_info < (3, 11):
    sys.exit(
        f"doctor.py: FAIL: this is Python {platform.python_version()}, SALT-VLA needs 3.11 or"
        " newer; give make PYTHON=python3.11"
    )

import config

# ----------------------------------------------------------------------------------------- settings
# what training is to run on: auto, cpu, cuda or cuda:1; with cuda a GPU that cannot be used is a
# failure
device = "auto"
out = "."  # folder on the disk to try: where cache and checkpoints are to lie
disk_mb = 256  # megabytes written there, and taken away again
only: list[str] | None = None  # checks to run [all]
patience = 180.0  # seconds that one check may take before it counts as hung
json: str | None = None  # JSON file for the results
# -------------------------------------------------------------------------------------------------
# a child and the tests import it
settings = config.apply(
    globals(), None if __name__ == "__main__" else [], least={"disk_mb": 1, "patience": 1}
)
on_gpu = "cuda:0" if device in ("auto", "cuda") else device

HERE = os.path.dirname(os.path.abspath(__file__))
GB = 1e9

# What the default run needs; docs/SCALE.md has the arithmetic.
# bytes of a cached clip, float16 latents and pixels, as they are read from a disk
COLD_CLIP = 2 * 2.408e6
GPU_CLIPS = 240  # clips/s that one GPU is to train on (goal)
CPU_CLIPS = 2  # clips/s of a CPU, generously
# best.pth, last.pth and the one being written beside it: ViT-L, rounded up
CHECKPOINTS = 15 * GB
# the process on a GPU machine: torch, three batches of 24 clips, shards' page tables
HOST_MEMORY = 4 * GB

# Oldest driver on which programs of a CUDA major version run, and from 11 on any minor one: NVIDIA,
# "CUDA Compatibility", minor version compatibility, table 1.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
DOCS = "docs/TROUBLESHOOTING.md"


class Trouble(Exception):
    """Why something does not work, in one line; with the status and the advice of the check that it
    ends.
    """

    def __init__(self, why, status="FAIL", advice=f"{DOCS} has a section for this check"):
        super().__init__(why)
        self.status, self.advice = status, advice


def run_limited(command, seconds, **others):
    """(stdout, stderr, exit code) of a process.

    Raises Trouble where it has not ended in time; does not wait for what cannot be killed.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        **others,
    )
    try:
        return (*process.communicate(timeout=seconds), process.returncode)
    except subprocess.TimeoutExpired:
        stuck = read(f"/proc/{process.pid}/stat", "").rpartition(")")[2].split()[:1] == ["D"]
        raise Trouble(
            f"no answer in {seconds:g} s"
            + (
                ": stuck inside the kernel (state D), as with a wedged driver or a dead network"
                " disk; see dmesg, and reboot"
                if stuck
                else ""
            )
        ) from None
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):  # the first lets it tidy up
            if process.poll() is None:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(2)


def last_line(text, otherwise="it said nothing"):
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "error: " in line), lines[-1] if lines else otherwise
    )[:400]


CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import doctor; doctor.answer(*sys.argv[2:])"


def in_child(function, *arguments, seconds=None, found="{}", **verdict):
    """What `function`, one of this file's, returns in a process of its own.

    Raises Trouble, with this verdict, where that raised, died or hung.
    """
    try:
        said, complaint, code = run_limited(
            [sys.executable, "-c", CHILD, HERE, function.__name__, dumps(arguments)],
            seconds or patience,
        )
        if code < 0:
            raise Trouble(f"died of {signal.Signals(-code).name} ({last_line(complaint)})")
        if "\n@answer " not in said:
            raise Trouble(last_line(complaint, f"exit code {code}"))
        value, trouble = loads(said.rpartition("\n@answer ")[2])
        if trouble:
            raise Trouble(trouble)
        return value
    except Trouble as trouble:
        raise Trouble(found.format(trouble), **verdict) from None


def answer(name, arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = globals()[name](*loads(arguments)), None
    except Exception as error:
        found = (
            None,
            ("" if isinstance(error, Trouble) else f"{type(error).__name__}: ")
            + " ".join(str(error).split())[:400],
        )
    print("\n@answer " + dumps(found), flush=True)
    os._exit(0)  # a driver that hangs on the way out has nothing to add


def read(path, otherwise=None):
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return otherwise


def requirements(text):
    """[(package, [(operator, version), ...]), ...] of a requirements.txt."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [
        (re.match(r"[\w.-]+", line)[0], re.findall(r"(==|>=|<=|!=|<|>)\s*([\w.+]+)", line))
        for line in lines
        if line and line[0] != "-"
    ]


def satisfies(version, wanted):
    """Whether a version fits [(operator, version), ...]; a local part such as +cu130 does not
    count.
    """

    def release(text):
        return [
            int(part)
            for part in re.sub(r"(\.0+)+$", "", re.match(r"\d+(\.\d+)*", text)[0]).split(".")
        ]

    compare = {
        "==": operator.eq,
        "!=": operator.ne,
        ">=": operator.ge,
        "<=": operator.le,
        ">": operator.gt,
        "<": operator.lt,
    }
    return all(compare[sign](release(version), release(other)) for sign, other in wanted)


def fields(text):
    """{name: value} of `name: value` lines, as in /proc/self/status and /proc/meminfo."""
    return {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in text.splitlines())
        if colon
    }


def driver_version(text):
    """'580.65.06' out of /proc/driver/nvidia/version, proprietary or open; None where it is not
    there.
    """
    found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)\s", text or "")
    return found and found[1]


def character_majors(text):
    """{name: major number} of the character devices in /proc/devices."""
    return {
        name: int(major)
        for major, name in re.findall(
            r"^\s*(\d+) (\S+)$", text.partition("Block devices:")[0], re.MULTILINE
        )
    }


def cgroup_values(groups, controller, files, old_files, root):
    """[words in a limit's files, ...] of this process's control group and those above it, version 2
    or 1; groups: the text of /proc/self/cgroup.
    """
    found = []
    for _, names, path in (
        line.split(":", 2) for line in groups.splitlines() if line.count(":") >= 2
    ):
        if not names or controller in names.split(","):
            base, wanted = (f"{root}/{controller}", old_files) if names else (root, files)
            for folder in (pathlib.PurePath(path), *pathlib.PurePath(path).parents):
                found.append(
                    " ".join(read(f"{base}{folder}/{file}", "") for file in wanted).split()
                )
    return [words for words in found if words]


def cpu_quota(groups, root="/sys/fs/cgroup"):
    """CPUs' worth of time that the control groups allow, or None."""
    found = cgroup_values(
        groups, "cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"], root
    )
    return min(
        (
            int(quota) / int(*period or [100_000])
            for quota, *period in found
            if quota not in ("max", "-1")
        ),
        default=None,
    )


def memory_limit(groups, root="/sys/fs/cgroup"):
    """Bytes of memory that the control groups allow, or None."""
    limits = [
        int(text)
        for (text,) in cgroup_values(
            groups, "memory", ["memory.max"], ["memory.limit_in_bytes"], root
        )
        if text != "max"
    ]
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def check_python():
    return (
        "ok",
        (
            f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.release()}"
            f" on {platform.machine()}"
        ),
    )


NEEDED_TO_TRAIN = ("torch", "numpy", "av", "einops", "safetensors", "tqdm")


def try_imports(names):
    found = {}
    for name in names:
        try:
            importlib.import_module("sklearn" if name == "scikit-learn" else name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def check_packages():
    wanted, problems, fatal = (
        requirements(read(os.path.join(HERE, "requirements.txt"), "")),
        [],
        False,
    )
    broken = in_child(try_imports, [name for name, _ in wanted])
    for name, pins in wanted:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if name in broken:
            cannot = f"{version} cannot be imported ({broken[name]})"
            problems.append(f"{name} {'is not installed' if version is None else cannot}")
            fatal |= name in NEEDED_TO_TRAIN
        elif version and not satisfies(version, pins):
            problems.append(f"{name} {version}, not {','.join(map(''.join, pins))}")
    if not problems:
        return "ok", f"the {len(wanted)} of requirements.txt, at the versions it names"
    return (
        "FAIL" if fatal else "warn",
        "; ".join(problems),
        (
            "pip install -r requirements.txt in the environment of this python; another torch for"
            " another CUDA version is fine (README.md, Which torch)"
        ),
    )


def dotted(built):
    """torch.cuda.get_arch_list(), ['sm_90', 'sm_100a', 'compute_120'], as ops.covers takes it:
    '9.0;10.0a;12.0+PTX'.
    """
    names = filter(None, (re.fullmatch(r"(sm|compute)_(\d+)(\d[af]?)", name) for name in built))
    return ";".join(
        f"{name[2]}.{name[3]}{'+PTX' if name[1] == 'compute' else ''}" for name in names
    )


def torch_works(where="cpu"):
    """torch's facts, and a GPU's, once gradients of a matrix product there, in float32 and
    bfloat16, are those of numpy in float64.
    """
    import numpy as np
    import torch

    facts = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "name": "this processor",
    }
    if where != "cpu":
        import ops

        gpu = torch.device(where)
        torch.cuda.set_device(gpu)
        capability, built = torch.cuda.get_device_capability(gpu), torch.cuda.get_arch_list()
        facts |= {
            "name": torch.cuda.get_device_name(gpu),
            "capability": "{}.{}".format(*capability),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
        if built and not ops.covers(dotted(built), capability):
            raise Trouble(
                f"torch {facts['version']} has no code for {facts['name']}, compute capability"
                f" {facts['capability']}; it has {' '.join(built)}"
            )
        facts["free"], facts["total"] = torch.cuda.mem_get_info(gpu)
    torch.manual_seed(0)
    a, b = torch.randn(256, 128), torch.randn(128, 64)
    x, y = a.double().numpy(), b.double().numpy()
    expected = 2 * x @ y @ y.T
    for kind, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 0.1)):
        leaf = a.to(where, copy=True).requires_grad_()
        (leaf.to(kind) @ b.to(where, kind)).float().square().sum().backward()
        wrong = np.abs(leaf.grad.cpu().numpy() - expected).max() / np.abs(expected).max()
        if not wrong < tolerance:
            raise Trouble(
                f"torch {facts['version']}: the gradient of a {kind} matrix product on"
                f" {facts['name']} is off by {wrong:.1e}"
            )
    return facts


@functools.cache
def torch_facts():
    return in_child(torch_works)


def check_torch():
    facts = torch_facts()
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "a CPU build"
    return (
        "ok",
        (
            f"{facts['version']}, {build}; products and their gradients are right, in float32 and"
            f" bfloat16; {facts['threads']} threads"
        ),
    )


def check_cpu():
    everywhere, quota = os.cpu_count(), cpu_quota(read("/proc/self/cgroup", ""))
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else everywhere
    has = fields(read("/proc/cpuinfo", "")).get("flags", "").split()
    simd = [
        title
        for flag, title in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_bf16", "AMX"))
        if flag in has
    ]
    found = f"{allowed} of {everywhere} cores, {', '.join(simd) or 'no AVX2'}" + (
        f"; the control group allows the time of {quota:g}" if quota else ""
    )
    usable = max(1, min(allowed, int(quota or allowed)))
    if usable < everywhere and not all(
        os.environ.get(name, "").isdigit() and int(os.environ[name]) <= usable
        for name in ("OMP_NUM_THREADS", "THREADS")
    ):
        return (
            "warn",
            found,
            (
                f"a thread for each of {everywhere} cores is slower than few:"
                f" OMP_NUM_THREADS={usable} THREADS={usable} in the environment ({DOCS}, cpu)"
            ),
        )
    return "ok", found


def check_memory():
    memory = {
        name: int(value.split()[0]) * 1024
        for name, value in fields(read("/proc/meminfo", "")).items()
        if value.endswith("kB")
    }
    if not memory:
        return (
            "warn",
            "this system has no /proc/meminfo",
            "how much memory there is could not be found out",
        )
    limit = memory_limit(read("/proc/self/cgroup", ""))
    found = f"{memory['MemAvailable'] / GB:.1f} of {memory['MemTotal'] / GB:.1f} GB free" + (
        f"; the control group allows {limit / GB:.1f}" if limit else ""
    )
    if min(memory["MemAvailable"], limit or memory["MemAvailable"]) >= HOST_MEMORY:
        return "ok", found
    return (
        "warn",
        found,
        (
            f"below the {HOST_MEMORY / GB:.0f} GB that a run on a GPU wants of the host (ViT-L on a"
            " CPU: 8 GB), the kernel may kill it: lower --batch_size and --threads, or a smaller"
            f" --size ({DOCS}, memory)"
        ),
    )


def check_limits():
    limits = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        for name in ("NOFILE", "FSIZE", "AS", "MEMLOCK")
    }
    size = {
        name: "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / GB:.3g} GB"
        for name, (soft, _) in limits.items()
    }
    soft, hard = limits["NOFILE"]
    cases = (
        (
            0 <= hard < 1024,
            (
                "few open files: a cache keeps a quarter as many shards open and opens the others"
                " again and again; `ulimit -Hn 65536` as an administrator"
            ),
        ),
        (
            size["FSIZE"] != "unlimited" and limits["FSIZE"][0] < CHECKPOINTS / 3,
            (
                "a file may not grow to a checkpoint of ViT-L (about 4.1 GB) or a shard (1.2 GB):"
                " `ulimit -f unlimited`"
            ),
        ),
        (
            size["AS"] != "unlimited",
            (
                "CUDA reserves far more address space than it uses, and shards are mapped: both may"
                " fail with out of memory; `ulimit -v unlimited`"
            ),
        ),
    )
    advice = [text for wrong, text in cases if wrong]
    return (
        "warn" if advice else "ok",
        (
            f"open files {soft} (at most"
            f" {'unlimited' if hard == resource.RLIM_INFINITY else hard}), file size"
            f" {size['FSIZE']}, address space {size['AS']}, locked memory {size['MEMLOCK']}"
        ),
        *advice,
    )


def extension_works(devices):
    import torch

    import ops

    for where in devices:
        torch.manual_seed(0)
        prediction, target = (
            torch.randn(2, 24, 64, device=where),
            torch.randn(2, 40, 64, device=where),
        )
        index = torch.stack([torch.randperm(40)[:24].sort().values for _ in range(2)]).to(where)
        leaf = prediction.clone().requires_grad_()
        expected, _ = ops.masked_mse_reference(leaf, target, index)
        (wanted,) = torch.autograd.grad(expected, leaf)
        loss, gradient = ops.masked_mse_with_grad(prediction, target, index)
        if not (
            torch.allclose(loss, expected, rtol=1e-5)
            and torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-7)
        ):
            raise Trouble(
                f"the loss kernel on {where} is not what its plain reference gives:"
                f" {loss.item():.7g} and {expected.item():.7g}"
            )
    return {"missing": ops.MISSING, "line": ops.extension_line(devices[-1]), **ops.EXTENSION}


def nvcc_trouble(cuda):
    """Why the CUDA kernels cannot be built here for torch's CUDA version, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # cuda/ is after cuda-12.8/
    nvcc = (
        f"{home}/bin/nvcc"
        if home
        else shutil.which("nvcc") or max(glob.glob("/usr/local/cuda*/bin/nvcc"), default="")
    )
    if not os.path.exists(nvcc):
        return (
            f"no nvcc{f' in CUDA_HOME={home}' if home else ''}: python setup.py build_ext leaves"
            " the CUDA kernels out"
        )
    release = None
    with contextlib.suppress(Trouble, OSError):
        release = re.search(
            r"release (\d+)\.\d+", run_limited([nvcc, "--version"], min(patience, 60))[0]
        )
    if not release or release[1] != cuda.split(".")[0]:
        return (
            f"{nvcc} is of {f'CUDA {release[0][8:]}' if release else 'unknown release'}, torch is"
            f" built for {cuda}: set CUDA_HOME to a toolkit of that major version"
        )


def check_extension():
    places = ["cpu"] + ([on_gpu] if gpus() else [])
    facts = in_child(
        extension_works,
        places,
        advice=(
            "build it again: rm -rf build salt_ops*.so; python setup.py build_ext. Until then"
            " SALT_OPS=reference runs without it"
        ),
    )
    line, missing, cuda, advice = (
        facts["line"].removeprefix("salt_ops: "),
        facts["missing"] or "",
        torch_facts()["cuda"],
        [],
    )
    if missing:
        line = f"not in use ({missing})"
        advice.append(
            "the plain PyTorch reference runs: same results, slower"
            + ("" if "SALT_OPS" in missing else "; python setup.py build_ext")
        )
    elif "; on the GPU" in line or "; not for this GPU" in line:
        advice.append(
            "the loss and the gathering of rows run slower on the GPU; results are the same"
        )
    elif "amx_bf16" in read("/proc/cpuinfo", "") and not facts["amx"]:
        advice.append(
            "this processor has AMX; Linux before 5.16, a seccomp filter on arch_prctl or SALT_SIMD"
            " withholds it: bfloat16 on the CPU is slower"
        )
    trouble = (
        nvcc_trouble(cuda)
        if cuda and "cuda" not in facts["devices"] and "SALT_OPS" not in missing
        else None
    )
    if advice or trouble:
        return "warn", line, *advice, *filter(None, [trouble])
    return "ok", f"{line}; its loss and gradient are the reference's on {' and '.join(places)}"


def probe_nodes():
    """{device file: [error number or None, major]} of the NVIDIA device files here, and of those
    that every GPU program opens.
    """
    found = {}
    for path in [
        "/dev/nvidiactl",
        "/dev/nvidia-uvm",
        *(sorted(path for path in glob.glob("/dev/nvidia[0-9]*")) or ["/dev/nvidia0"]),
    ]:
        try:
            major = os.major(os.stat(path).st_rdev)
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            found[path] = [None, major]
        except OSError as error:
            found[path] = [
                error.errno,
                major if error.errno != errno.ENOENT and os.path.exists(path) else None,
            ]
    return found


def cuda_init():
    """What the driver's own library says: cuInit's error number, name and text, and how many GPUs
    it counts.
    """
    library, count, name, text = (
        ctypes.CDLL("libcuda.so.1"),
        ctypes.c_int(0),
        ctypes.c_char_p(),
        ctypes.c_char_p(),
    )
    code = library.cuInit(0)
    library.cuGetErrorName(code, ctypes.byref(name))
    library.cuGetErrorString(code, ctypes.byref(text))
    if code == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    return {
        "code": code,
        "name": (name.value or b"").decode(),
        "text": (text.value or b"").decode(),
        "count": count.value,
    }


def nvml_init():
    library, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint(0)
    library.nvmlErrorString.restype = ctypes.c_char_p
    code = library.nvmlInit_v2()
    if code == 0:
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return {"code": code, "text": library.nvmlErrorString(code).decode(), "count": count.value}


def torch_sees():
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = (
                torch.cuda.device_count()
                if torch.cuda.is_available() and torch.zeros(1, device="cuda").item() == 0
                else 0
            )
        except Exception as error:  # counted, but not usable
            return {"count": 0, "said": " ".join(str(error).split())[:300]}
    return {"count": count, "said": " ".join(str(said[-1].message).split())[:300] if said else ""}


@functools.cache
def system_facts():
    """What the kernel and the driver's libraries show of the GPUs, without torch."""
    vendors = [
        read(path, "").strip() == "0x10de"
        and read(os.path.join(os.path.dirname(path), "class"), "").startswith("0x03")
        for path in glob.glob("/sys/bus/pci/devices/*/vendor")
    ]
    modules, version = read("/proc/modules"), driver_version(read("/proc/driver/nvidia/version"))
    if version is None and shutil.which("nvidia-smi"):
        with contextlib.suppress(Trouble, OSError):
            said, _, code = run_limited(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                min(patience, 30),
            )
            version = said.split()[0] if code == 0 and re.match(r"\d+\.\d+", said) else None
    facts = {
        "pci": sum(vendors) if vendors else None,
        "module": None if modules is None else bool(re.search(r"^nvidia ", modules, re.MULTILINE)),
        "driver": version,
        "majors": character_majors(read("/proc/devices", "")),
        "wsl": os.path.exists("/dev/dxg"),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    for name, function in (("nodes", probe_nodes), ("init", cuda_init)):
        try:
            facts[name] = in_child(function, seconds=min(patience, 60))
        except Trouble as trouble:
            facts[name] = str(trouble)
    return facts


@functools.cache
def cuda_facts():
    facts = system_facts() | {
        "torch": torch_facts()["version"],
        "cuda": torch_facts()["cuda"],
        "count": 0,
        "said": "",
    }
    if facts["cuda"]:
        try:
            facts |= in_child(torch_sees)
        except Trouble as trouble:
            facts["said"] = str(trouble)
    return facts


def gpus():
    """How many GPUs torch can use, 0 where training is not to use any."""
    with contextlib.suppress(Trouble):
        return 0 if device == "cpu" else cuda_facts()["count"]
    return 0


CREATE_NODES = "as an administrator, on the host: nvidia-modprobe -u -c 0"
WEDGED = "the driver is wedged or crashed: dmesg | grep -e NVRM -e Xid; reboot"
CUINIT = {
    34: "a stub library: take .../stubs out of LD_LIBRARY_PATH",
    46: "another process holds the GPU: nvidia-smi -q",
    100: (
        "no GPU for this process: CUDA_VISIBLE_DEVICES, a container without --gpus all, or a"
        " lost GPU"
    ),
    101: "CUDA_VISIBLE_DEVICES names a GPU that is not there",
    304: "a sandbox refused a system call, often memfd_create: see the line sandbox",
    802: "systemctl status nvidia-fabricmanager",
    803: "the driver was updated under a running kernel: reboot; a container: start it anew",
    804: "take cuda-compat out of LD_LIBRARY_PATH",
}


def broken_link(facts):
    """(what is broken, what to do) at the first link of the chain from torch down to the GPU that
    does not hold; facts: see cuda_facts.
    """
    driver, nodes, init, visible = (facts[name] for name in ("driver", "nodes", "init", "visible"))
    if not facts["cuda"]:
        return (
            (
                f"torch {facts['torch']} is a CPU"
                f" build{'; {} on the PCI bus'.format(facts['pci']) if facts['pci'] else ''}"
            ),
            (
                "install the CUDA build of the torch in requirements.txt that the selector on"
                " pytorch.org names"
            ),
        )
    if driver is None and not facts["wsl"]:
        if facts["pci"] == 0:
            return (
                "there is no NVIDIA GPU on the PCI bus",
                "lspci -d 10de:; in a virtual machine it has to be passed through",
            )
        if facts["module"] is False:
            return (
                "the kernel module nvidia is not loaded",
                "modprobe nvidia; dmesg says why it does not load",
            )
    oldest = OLDEST_DRIVER.get(int(facts["cuda"].split(".")[0]), 0)
    if driver and int(driver.split(".")[0]) < oldest:
        return (
            f"driver {driver} is too old for CUDA {facts['cuda']}, which needs {oldest} or newer",
            (
                "update the driver, or install the build of the same torch for an older CUDA"
                " (README.md, Which torch)"
            ),
        )
    if isinstance(nodes, str) and not facts["wsl"]:
        return f"opening the NVIDIA device files: {nodes}", WEDGED
    for path, (error, major) in () if facts["wsl"] else nodes.items():
        expected = facts["majors"].get("nvidia-uvm") if path.endswith("uvm") else 195
        if error == errno.ENOENT:
            return (
                f"the device file {path} is missing",
                f"{CREATE_NODES}; in a container: docker run --gpus all",
            )
        if expected and major not in (None, expected):
            return (
                f"the device file {path} has major number {major}, the driver has {expected}",
                f"it is left over from before: rm {path}, then {CREATE_NODES}",
            )
        if error:
            do = {
                errno.EPERM: (
                    "a container's device control group or a sandbox does not list it: docker run"
                    " --gpus all; where it worked before, start the container anew"
                ),
                errno.EACCES: "join its group (usermod -aG), or set NVreg_DeviceFileMode=0666",
            }
            return (
                (
                    f"{path} cannot be opened ({errno.errorcode.get(error, error)}:"
                    f" {os.strerror(error)})"
                ),
                do.get(error, "no driver or a dead GPU behind it: dmesg | grep -e NVRM -e Xid"),
            )
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return (
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU",
            "unset CUDA_VISIBLE_DEVICES; under slurm ask for a GPU (--gres=gpu:1)",
        )
    if isinstance(init, str):
        absent = (
            "install the driver's user-space part; in a container the NVIDIA Container Toolkit"
            " brings it"
        )
        return f"cuInit: {init}", absent if init.startswith("OSError: libcuda") else WEDGED
    seen = f"; CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
    if init["code"]:
        return (
            f"cuInit gives {init['code']} {init['name']} ({init['text']}){seen}",
            CUINIT.get(
                init["code"],
                "nvidia-uvm missing or stale (modprobe -r nvidia_uvm; modprobe nvidia_uvm), or a"
                " sandbox; cuda.h has the number",
            )
            + "; table cuInit's codes",
        )
    if init["count"] == 0:
        return (
            f"cuInit works and counts no GPU{seen}",
            "nvidia-smi -L: MIG without an instance looks like this",
        )
    return (
        (
            f"the driver counts {init['count']} GPUs and torch cannot use them:"
            f" {facts['said'] or 'it says nothing'}"
        ),
        "see the message; reinstall torch where it names a library",
    )


def check_driver():
    facts = system_facts()
    nodes = facts["nodes"] if isinstance(facts["nodes"], dict) else {}
    usable = [path.removeprefix("/dev/") for path, (error, _) in nodes.items() if error is None]
    count = {None: "GPUs on the PCI bus unknown (no /sys)", 0: "no NVIDIA GPU on the PCI bus"}.get(
        facts["pci"], f"NVIDIA GPUs on the PCI bus: {facts['pci']}"
    )
    found = (
        f"{count}; driver {facts['driver'] or 'none'}; module nvidia"
        f" {({None: 'not to be seen', False: 'not loaded', True: 'loaded'})[facts['module']]};"
        f" device files {', '.join(usable) or 'none that open'}"
        + ("; WSL: the driver is Windows's" if facts["wsl"] else "")
    )
    if facts["pci"] and (facts["driver"] is None or len(usable) < len(nodes)) and device != "cpu":
        return (
            "warn",
            found,
            (
                "a GPU is there and cannot be reached; the line cuda says at which link, with what"
                " to do"
            ),
        )
    return "ok", found


def check_cuda():
    if device == "cpu":
        return "ok", "not asked for (--device cpu)"
    facts = cuda_facts()
    if not facts["count"]:
        link, advice = broken_link(facts)
        asked = device.startswith("cuda")
        return (
            "FAIL" if asked else "warn",
            link if asked else f"training would run on the CPU: {link}",
            f"{advice} ({DOCS}, driver, cuda)",
        )
    if device.startswith("cuda:") and int(device[5:]) >= facts["count"]:
        return (
            "FAIL",
            f"--device {device}: torch sees {facts['count']} GPUs",
            "numbers start at 0, and CUDA_VISIBLE_DEVICES renumbers",
        )
    gpu = in_child(
        torch_works,
        on_gpu,
        advice=(
            "a torch with code for the GPU (README.md, Which torch); wrong results or a crash:"
            " dmesg | grep Xid, and another GPU"
        ),
    )
    advice = (
        []
        if gpu["bf16"]
        else [
            "this GPU has no bfloat16 (Ampere and newer do): it is emulated, slowly; --dtype fp32"
            " may be faster"
        ]
    )
    if gpu["free"] < 0.8 * gpu["total"]:
        advice.append(
            "other processes hold its memory: nvidia-smi names them; else --accumulate, then"
            " --recompute"
        )
    return (
        "warn" if advice else "ok",
        f"{gpu['name']}, {gpu['free'] / GB:.1f} of {gpu['total'] / GB:.1f} GB free, compute"
        f" capability {gpu['capability']}, CUDA {facts['cuda']} on driver {facts['driver']};"
        " products and gradients are right"
        + (f"; {facts['count']} GPUs" if facts["count"] > 1 else ""),
        *advice,
    )


def check_nvml():
    try:
        facts = in_child(nvml_init, seconds=min(patience, 60))
        works, found = (
            facts["code"] == 0,
            f"nvmlInit_v2 gives {facts['code']} ({facts['text']}), {facts['count']} GPUs",
        )
    except Trouble as trouble:
        works, found = False, str(trouble)
    if works or not gpus():
        return "ok", found + ("" if works else "; nothing here needs it without a GPU")
    return (
        "warn",
        found,
        (
            "one GPU trains without it, NCCL between GPUs does not; 18: reboot; Unknown Error in a"
            f" container that worked before: start it anew ({DOCS}, nvml)"
        ),
    )


def sandbox(status):
    """(what was found, [what it means for CUDA and NVML, ...]) of the text of /proc/self/status."""
    values = fields(status)
    privileges, mode, filters, held = (
        values.get("NoNewPrivs"),
        values.get("Seccomp"),
        values.get("Seccomp_filters", "0"),
        int(values.get("CapEff", "0"), 16),
    )
    capabilities = [
        name
        for bit, name in ((16, "SYS_MODULE"), (21, "SYS_ADMIN"), (27, "MKNOD"))
        if held >> bit & 1
    ]
    title = {"0": " (none)", "1": " (strict)", "2": " (filter)"}.get(mode, "")
    found = (
        f"NoNewPrivs {privileges or 'unknown'}, Seccomp"
        f" {mode or 'unknown'}{title}{f', {filters} filters' if filters != '0' else ''},"
        f" capabilities {', '.join(capabilities) or 'none of SYS_MODULE, SYS_ADMIN, MKNOD'}"
    )
    itself = ", unless this process may do so itself" if "MKNOD" in capabilities else ""
    meaning = {
        "NoNewPrivs 0": (
            "CUDA and NVML can have nvidia-modprobe load nvidia-uvm and make missing device files"
        ),
        "NoNewPrivs 1": (
            f"nvidia-modprobe cannot load nvidia-uvm or make device files{itself}: {CREATE_NODES};"
            " with them there it stops neither CUDA nor NVML"
        ),
        "Seccomp 0": "no system call is filtered, for CUDA or NVML",
        "Seccomp 1": "only read, write and exit are left: neither CUDA nor NVML could run",
        "Seccomp 2": (
            "may stop CUDA (cuInit 304) where NVML works; Docker's default filter stops neither."
            f" To find out: --security-opt seccomp=unconfined ({DOCS}, sandbox)"
        ),
    }
    return found, [
        f"{key}: {meaning[key]}"
        for key in (f"NoNewPrivs {privileges}", f"Seccomp {mode}")
        if key in meaning
    ]


def check_sandbox():
    text = read("/proc/self/status")
    if text is None:
        return (
            "warn",
            "there is no /proc/self/status",
            "whether system calls are filtered cannot be seen; judge by the lines cuda and nvml",
        )
    found, meaning = sandbox(text)
    bound = ("NoNewPrivs 1" in found or "Seccomp 2" in found) and device != "cpu"
    # a GPU, or the wish for one
    there = bound and (
        system_facts()["pci"] or system_facts()["driver"] or device.startswith("cuda")
    )
    return "warn" if there and not gpus() else "ok", found, *meaning


CODECS = {
    "vp9": (("libvpx-vp9", "vp9"), ("libvpx-vp9",)),
    "h264": (("h264",), ("libx264", "libopenh264")),
    "hevc": (("hevc",), ("libx265",)),
    # decoders, encoders; FFmpeg's own av1 decoder wants a GPU
    "av1": (("libdav1d", "libaom-av1"), ("libsvtav1", "libaom-av1")),
    "mpeg4": (("mpeg4",), ("mpeg4",)),
}


def write_frames(target, encoder, frames, container=None):
    import av

    with av.open(target, "w", format=container) as video:
        stream = video.add_stream(encoder, rate=12)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode(None))


def codecs_work():
    """{codec: 'decoded', 'present' (no encoder here to try it with) or what is wrong}, through
    data.read_clip, and PyAV's version.
    """
    import io

    import av
    import numpy as np

    import data
    from views import View

    av.logging.set_level(av.logging.PANIC)
    os.environ.setdefault("SVT_LOG", "0")
    found = {}
    levels = np.arange(16) * 12 + 30  # a grey frame's level says which frame it is
    for codec, (decoders, encoders) in CODECS.items():
        found[codec] = (
            "present" if any(name in av.codecs_available for name in decoders) else "no decoder"
        )
        for encoder in encoders if found[codec] == "present" else ():
            try:
                video = io.BytesIO()
                write_frames(
                    video,
                    encoder,
                    [np.full((64, 64, 3), level, np.uint8) for level in levels],
                    "matroska",
                )
            # this build has no such encoder, or it needs hardware
            except (av.FFmpegError, ValueError):
                continue
            video.seek(0)
            clip = data.read_clip(video, View(frames=16, size=32, short_side=32), "doctor")
            wrong = np.abs(clip.reshape(16, -1).mean(1) - levels).max()
            found[codec] = (
                "decoded" if wrong < 5 else f"decoded wrongly: grey levels are off by {wrong:.0f}"
            )
            break
    return {"version": av.__version__, "codecs": found}


def check_codecs():
    install = "pip install 'av>=18,<19' brings FFmpeg with all of them"
    facts, groups = (
        in_child(
            codecs_work,
            advice=(
                f"{install}. Without decoding only a cache with clips (--clips on) can be trained"
                " from"
            ),
        ),
        {},
    )
    for codec, state in facts["codecs"].items():
        groups.setdefault(state, []).append(codec)
    titles = {
        "decoded": "encoded, read by data.read_clip and right",
        "present": "present (no encoder to try it with)",
    }
    found = f"av {facts['version']}: " + "; ".join(
        f"{', '.join(codecs)} {titles.get(state, state)}" for state, codecs in groups.items()
    )
    if set(groups) <= set(titles):
        return "ok", found
    fatal = "decoded" not in groups or any("wrongly" in state for state in groups)
    return (
        "FAIL" if fatal else "warn",
        found,
        (
            f"videos of these codecs are left out and counted in failures.jsonl; {install}"
            " (Something-Something v2 is vp9)"
        ),
    )


def try_disk(folder, megabytes):
    """Write, sync, read back, rename and lock in a folder.

    Nothing is left: the large file has no name. Returns rates in bytes/s and what did not work.
    """
    import fcntl
    import random

    space = os.statvfs(folder)
    free, block, rest = space.f_bavail * space.f_frsize, random.randbytes((1 << 20) - 8), []
    blocks = [
        number.to_bytes(8, "little")
        for number in range(max(1, min(megabytes * 10**6, free // 4) >> 20))
    ]
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        if any(file.write(number + block) < 1 << 20 for number in blocks):
            raise Trouble(
                "only a part of a write went through: the disk is full, or a quota or RLIMIT_FSIZE"
                " is reached (File too large)"
            )
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        if any(file.read(1 << 20) != number + block for number in blocks):
            raise Trouble(f"what was written to {folder} did not come back the same")
        took = time.perf_counter() - start
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as inside:
        one, two = pathlib.Path(inside, "one"), pathlib.Path(inside, "two")
        one.write_text("one"), two.write_text("two")
        os.replace(one, two)
        if one.exists() or two.read_text() != "one":
            rest.append("renaming over a file does not replace it")
        with open(two) as first, open(two) as second:
            try:
                fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    rest.append("locks do not exclude each other (flock)")
            except OSError as error:
                rest.append(f"files cannot be locked (flock: {error.strerror})")
    size = len(blocks) << 20
    return {"free": free, "size": size, "write": size / wrote, "read": size / took, "rest": rest}


def check_disk():
    folder = os.path.abspath(os.path.expanduser(out))
    facts = in_child(
        try_disk,
        folder,
        disk_mb,
        found=folder.replace("{", "{{").replace("}", "}}") + ": {}",
        advice=(
            "checkpoints and caches could not be written there: give --out another folder, make"
            " room, or mend its rights (a disk that went read-only: dmesg)"
        ),
    )
    rate, wanted = facts["read"] / COLD_CLIP, GPU_CLIPS if gpus() else CPU_CLIPS
    advice = []
    if facts["free"] < CHECKPOINTS:
        advice.append(
            f"below the {CHECKPOINTS / GB:.0f} GB that the checkpoints of a ViT-L run may take;"
            " Something-Something v2 cached takes 407 GB, 814 with clips, 204 as --latents i8"
        )
    if rate < wanted:
        advice.append(
            f"slower than the {wanted} clips/s of {'a GPU' if gpus() else 'a CPU'}: a cache that"
            f" fits into memory, --latents i8, a local NVMe disk, or train from videos ({DOCS},"
            " disk)"
        )
    if facts["rest"]:
        advice.append(
            f"{'; '.join(facts['rest'])}: two cache_latents.py at once could spoil one cache there"
            " (network file systems: mount with locks)"
        )
    return (
        "warn" if advice else "ok",
        (
            f"{folder}: {facts['free'] / GB:.1f} GB free; {facts['size'] / 1e6:.0f} MB written and"
            f" synced at {facts['write'] / 1e6:.0f} MB/s, read back at {facts['read'] / 1e6:.0f} ="
            f" {rate:.0f} clips/s out of a cold cache of {COLD_CLIP / 1e6:.2f} MB a clip"
        ),
        *advice,
    )


def check_shm():
    several, unused = gpus() > 1, "batches are made without it, by threads of one process"
    try:
        tempfile.TemporaryFile(dir="/dev/shm", buffering=0).write(b"x")
        space = os.statvfs("/dev/shm")
        small, found = (
            space.f_blocks * space.f_frsize < 1 << 30,
            (
                f"/dev/shm has {space.f_bavail * space.f_frsize / GB:.2f} of"
                f" {space.f_blocks * space.f_frsize / GB:.2f} GB free; {unused}"
            ),
        )
    except OSError as error:
        small, found = True, f"/dev/shm cannot be used ({error.strerror}); {unused}"
    if several and small:
        return (
            "warn",
            found,
            (
                "NCCL between GPUs of one machine uses it: docker run --shm-size=1g (or"
                f" --ipc=host), else NCCL_SHM_DISABLE=1, slower ({DOCS}, shm)"
            ),
        )
    return "ok", found


def make_semaphore():
    import multiprocessing

    multiprocessing.Semaphore()


def check_semaphores():
    in_child(
        make_semaphore,
        seconds=min(patience, 60),
        found="refused ({})",
        status="warn",
        advice=(
            "training needs none, torch.compile's worker processes on a GPU do:"
            " TORCHINDUCTOR_COMPILE_THREADS=1, or --compile off; is /dev/shm there and writable?"
            f" ({DOCS}, shm)"
        ),
    )
    return "ok", "can be made"


def group_of_one():
    """A gloo group on the loopback, with a sum over it, and NCCL's version."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=20))
    dist.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    ones = torch.ones(4)
    dist.all_reduce(ones)
    if ones.tolist() != [1] * 4:
        raise Trouble("a sum over one rank is not what it should be")
    return (
        ".".join(map(str, torch.cuda.nccl.version()))
        if dist.is_nccl_available() and torch.version.cuda
        else None
    )


def check_ranks():
    nccl = in_child(
        group_of_one,
        seconds=min(patience, 90),
        found="no gloo group on the loopback ({})",
        status="warn",
        advice=(
            "one process trains without; torchrun does not work here: a sandbox without sockets,"
            f" or no interface lo (ip link set lo up) ({DOCS}, ranks)"
        ),
    )
    if not nccl and gpus() > 1:
        return (
            "warn",
            "gloo works on the loopback; NCCL is not in this torch",
            "several GPUs train together over NCCL, which the Linux CUDA builds of torch bring",
        )
    return "ok", f"gloo works on the loopback; NCCL {nccl or 'is not in this torch'}"


def make_videos(folder):
    import numpy as np

    random = np.random.default_rng(0)
    for name in ("train/0", "train/1", "train/2", "train/3", "validation/4"):
        os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
        # FFmpeg's own encoder, so every build has it
        write_frames(
            f"{folder}/{name}.avi",
            "mpeg4",
            list(random.integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)),
        )


def check_training():
    flags = (
        "--target pixels --masks ratio --data videos --frames 4 --resolution 48 --size tiny"
        " --depth 1 --predictor_depth 1 --predictor_dim 32 --predictor_heads 2 --batch_size 2"
        f" --max_steps 2 --log_every 1 --threads 2 --device {device} --checkpoints checkpoints"
        " --run_logs run_logs --run_name doctor"
    ).split()
    script = os.path.join(HERE, "train.py")
    # one process, its own settings
    ours = {
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "TORCHELASTIC_RESTART_COUNT",
        *map(str.upper, config.read_settings(script)),
    }
    try:
        inside = tempfile.TemporaryDirectory(
            dir=os.path.expanduser(out), prefix=".doctor-", ignore_cleanup_errors=True
        )
    except OSError as error:
        return "FAIL", f"not tried: nothing can be written to {out} ({error.strerror}); see disk"
    with inside as folder:
        in_child(make_videos, os.path.join(os.path.abspath(folder), "videos"))
        start = time.perf_counter()
        try:
            said, complaint, code = run_limited(
                [sys.executable, script, *flags],
                patience,
                cwd=folder,
                env={name: value for name, value in os.environ.items() if name not in ours},
            )
        except Trouble as trouble:
            return (
                "FAIL",
                f"two steps of a small model: {trouble}",
                (
                    "on a GPU the first step compiles: a slow processor may want --patience 600."
                    " Else something hangs: py-spy dump --pid P, dmesg"
                ),
            )
        took = time.perf_counter() - start
        written = sorted(
            os.path.basename(path)
            for path in glob.glob(os.path.join(folder, "checkpoints", "*", "*.pth"))
        )
    if code:
        reason = f"died of {signal.Signals(-code).name}: " if code < 0 else f"exit code {code}: "
        return (
            "FAIL",
            reason + last_line(complaint or said),
            (
                "the checks above may have said why; SALT_TRACEBACK=1 python doctor.py --only"
                " training shows where in the code"
            ),
        )
    if not {"best.pth", "last.pth"} <= set(written):
        return (
            "FAIL",
            f"train.py ended well and left {', '.join(written) or 'no checkpoint'}",
            "this is a bug of train.py",
        )
    where = re.search(r"^torch \S+ on (.+)$", said, re.MULTILINE)
    return (
        "ok",
        (
            f"two steps of a small model on video{f', {where[1]}' if where else ''}, both"
            f" checkpoints: {took:.0f} s"
        ),
    )


# in the order of this file
CHECKS = {
    name.removeprefix("check_"): function
    for name, function in globals().items()
    if name.startswith("check_")
}


def diagnose(name):
    """{"name", "status", "found", "advice"} of one check, whatever happens in it."""
    try:
        status, found, *advice = CHECKS[name]()
    except Trouble as trouble:
        status, found, advice = trouble.status, str(trouble), [trouble.advice]
    except Exception as error:
        status, found, advice = (
            "FAIL",
            f"the check itself went wrong: {type(error).__name__}: {' '.join(str(error).split())}",
            [],
        )
    return {"name": name, "status": status, "found": found, "advice": list(advice)}


if __name__ == "__main__":
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise config.InputError(f"--device is {device!r}; it takes auto, cpu, cuda or cuda:1")
    for name in only or ():
        if name not in CHECKS:
            raise config.InputError(
                f"--only {name!r} is none of the checks:"
                f" {', '.join(CHECKS)}{config.nearest(name, CHECKS)}"
            )
    if json and (
        os.path.isdir(json) or not os.access(os.path.dirname(os.path.abspath(json)), os.W_OK)
    ):
        raise config.InputError(
            f"--json {json} cannot be written; name a file in a folder that is there and writable"
        )
    # into `head`: end where it does, without a traceback and not with exit code 0
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    results = []
    for name in only or CHECKS:
        results.append(diagnose(name))
        print(f"{name:10}  {results[-1]['status']:4}  {results[-1]['found']}", flush=True)
        for line in results[-1]["advice"]:
            print(f"{'':18}{line}", flush=True)
    failed, warned = (
        [result["name"] for result in results if result["status"] == status]
        for status in ("FAIL", "warn")
    )
    warnings = (
        f" ({len(warned)} warning{'s' * (len(warned) > 1)}: {', '.join(warned)})" if warned else ""
    )
    partly = only and "training" not in only
    verdict = (
        f"training would not run here: {', '.join(failed)}"
        if failed
        else (
            "nothing found that would stop training; not all was tried"
            if partly
            else f"training would run here, on the {'GPU' if gpus() else 'CPU'}"
        )
    ) + warnings
    print(f"\n{'FAIL' if failed else 'ok'}: {verdict}")
    if json:
        try:
            with open(f"{json}.part", "w") as file:
                file.write(
                    dumps(
                        {
                            "verdict": verdict,
                            "code": int(bool(failed)),
                            "checks": results,
                            "config": settings,
                        },
                        indent=1,
                    )
                    + "\n"
                )
            os.replace(f"{json}.part", json)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(f"{json}.part")
            raise config.InputError(
                f"--json {json} could not be written ({error.strerror})"
            ) from None
    sys.exit(bool(failed))
