"""Would training run on this machine? Tries what a run needs, a line a check, with what a failure means and what to do.

    python doctor.py                       everything; exit code 0 only where training would run
    python doctor.py --device cuda         a GPU that cannot be used is then a failure
    python doctor.py --only driver,cuda    these checks alone

ok is as it should be; with warn training runs, slower or without something; with FAIL it does not. docs/TROUBLESHOOTING.md has a section for each
check. What may hang or crash (CUDA, codecs, a disk) is tried in a child process with a time limit.
"""
import contextlib
import ctypes
import errno
import functools
import glob
import importlib
import importlib.metadata
import itertools
import os
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
    sys.exit(f"doctor.py: FAIL: this is Python {platform.python_version()}, SALT-VLA needs 3.11 or newer; give make PYTHON=python3.11")

import config  # noqa: E402

# ------------------------------------------------------------------------------------------------------------- settings
device = "auto"                # what training is to run on: auto, cpu, cuda or cuda:1; with cuda a GPU that cannot be used is a failure
out = "."                      # folder on the disk to try: where cache and checkpoints are to lie
disk_mb = 256                  # megabytes written there, and taken away again
only: list[str] | None = None  # checks to run [all]
patience = 180.0               # seconds that one check may take before it counts as hung
json: str | None = None        # JSON file for the results
# -----------------------------------------------------------------------------------------------------------------------
settings = config.apply(globals(), None if __name__ == "__main__" else [], least={"disk_mb": 1, "patience": 1})  # a child and the tests import it

HERE = os.path.dirname(os.path.abspath(__file__))
GB = 1e9

# What the default run needs; docs/SCALE.md has the arithmetic.
COLD_CLIP = 2 * 2.408e6     # bytes of a cached clip, float16 latents and pixels, as they are read from a disk
GPU_CLIPS = 240             # clips/s that one GPU is to train on (goal)
CPU_CLIPS = 2               # clips/s of a CPU, generously
CHECKPOINTS = 15 * GB       # best.pth, last.pth and the one being written beside it: ViT-L, rounded up
HOST_MEMORY = 4 * GB        # the process on a GPU machine: torch, three batches of 24 clips, shards' page tables

# Oldest driver on which programs of a CUDA major version run, and from 11 on any minor one: NVIDIA, "CUDA Compatibility", minor version compatibility, table 1.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


class Trouble(Exception):
    """Why something does not work, in one line."""


# ---------------------------------------------------------------------------------------------------------------- children

def run_limited(command, seconds, **others):
    """(stdout, stderr, exit code) of a process. Raises Trouble where it has not ended in time; does not wait for what cannot be killed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                               start_new_session=True, **others)
    try:
        return (*process.communicate(timeout=seconds), process.returncode)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            if open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0] == "D":
                raise Trouble(f"no answer in {seconds:g} s: stuck inside the kernel (state D), as with a wedged driver or a dead network disk; "
                              "`dmesg` may say why, and often only a reboot helps") from None
        raise Trouble(f"no answer in {seconds:g} s") from None
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):  # the first lets it tidy up
            if process.poll() is None:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(2)


def last_line(text, otherwise="it said nothing"):
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else otherwise)[:400]


CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import doctor; doctor.answer(*sys.argv[2:])"


def in_child(function, *arguments, seconds=None):
    """What `function`, one of this file's, returns in a process of its own. Raises Trouble where that raised, died or hung."""
    said, complaint, code = run_limited([sys.executable, "-c", CHILD, HERE, function.__name__, dumps(arguments)], seconds or patience)
    found = said.rpartition("\n@answer ")[2] if "\n@answer " in said else None
    if code < 0:
        raise Trouble(f"died of {signal.Signals(-code).name} ({last_line(complaint)})")
    if found is None:
        raise Trouble(last_line(complaint, f"exit code {code}"))
    answered = loads(found)
    if "trouble" in answered:
        raise Trouble(answered["trouble"])
    return answered["value"]


def answer(name, arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = {"value": globals()[name](*loads(arguments))}
    except Trouble as error:
        found = {"trouble": str(error)}
    except Exception as error:
        found = {"trouble": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    print("\n@answer " + dumps(found), flush=True)
    os._exit(0)  # a driver that hangs on the way out has nothing to add


# ------------------------------------------------------------------------------------------------------- texts of the system

def read(path, otherwise=None):
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return otherwise


def requirements(text):
    """[(package, [(operator, version), ...]), ...] of a requirements.txt."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [(re.match(r"[\w.-]+", line)[0], re.findall(r"(==|>=|<=|!=|<|>)\s*([\w.+]+)", line)) for line in lines if line and line[0] != "-"]


def satisfies(version, wanted):
    """Whether a version fits [(operator, version), ...]; a local part such as +cu130 does not count."""
    def release(text):
        return [int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split(".")]

    for operator, other in wanted:
        pairs = list(itertools.zip_longest(release(version), release(other), fillvalue=0))
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        if not {"==": ours == theirs, "!=": ours != theirs, ">=": ours >= theirs, "<=": ours <= theirs, ">": ours > theirs, "<": ours < theirs}[operator]:
            return False
    return True


def fields(text):
    """{name: value} of `name: value` lines, as in /proc/self/status and /proc/meminfo."""
    return {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in text.splitlines()) if colon}


def driver_version(text):
    """'580.65.06' out of /proc/driver/nvidia/version, proprietary or open; None where it is not there."""
    found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)\s", text or "")
    return found and found[1]


def character_majors(text):
    """{name: major number} of the character devices in /proc/devices."""
    return {name: int(major) for major, name in re.findall(r"^\s*(\d+) (\S+)$", text.partition("Block devices:")[0], re.MULTILINE)}


def file_system(folder, mounts):
    """(type, mount point) of the file system that holds an absolute path, by the text of /proc/mounts."""
    points = [line.split()[:3] for line in mounts.splitlines() if len(line.split()) >= 3]
    inside = [(point, kind) for _, point, kind in points if f"{folder}/".startswith(point.rstrip("/") + "/")]
    return max(reversed(inside), key=lambda entry: len(entry[0]))[::-1] if inside else ("unknown", "")


def cgroup_values(groups, controller, file, old_file, root="/sys/fs/cgroup"):
    """Contents of one limit's file in this process's control group and those above it; groups: the text of /proc/self/cgroup."""
    found = []
    for _, names, path in (line.split(":", 2) for line in groups.splitlines() if line.count(":") >= 2):
        base, name = (root, file) if not names else (os.path.join(root, controller), old_file) if controller in names.split(",") else (None, None)
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1) if base else ():
            text = read(os.path.join(base, *parts[:depth], name))
            if text is not None:
                found.append((os.path.join(base, *parts[:depth]), text.strip()))
    return found


def cpu_quota(groups, root="/sys/fs/cgroup"):
    """CPUs' worth of time that the control groups allow, or None."""
    shares = []
    for folder, text in cgroup_values(groups, "cpu", "cpu.max", "cpu.cfs_quota_us", root):
        quota, period = text.split() if " " in text else (text, read(os.path.join(folder, "cpu.cfs_period_us"), "100000"))
        if quota not in ("max", "-1"):
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def memory_limit(groups, root="/sys/fs/cgroup"):
    """Bytes of memory that the control groups allow, or None."""
    limits = [int(text) for _, text in cgroup_values(groups, "memory", "memory.max", "memory.limit_in_bytes", root) if text != "max"]
    return min((limit for limit in limits if limit < 1 << 60), default=None)


# ------------------------------------------------------------------------------------------- what is installed: the checks
# A check returns (status, what was found, lines of advice ...).

def check_python():
    return "ok", f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.release()} on {platform.machine()}"


IMPORTED_AS = {"scikit-learn": "sklearn"}
NEEDED_TO_TRAIN = ("torch", "numpy", "av", "einops", "safetensors", "tqdm")


def try_imports(names):
    found = {}
    for name in names:
        try:
            importlib.import_module(IMPORTED_AS.get(name, name))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def check_packages():
    wanted, problems, worst, install = requirements(read(os.path.join(HERE, "requirements.txt"), "")), [], "ok", "pip install -r requirements.txt"
    broken = in_child(try_imports, [name for name, _ in wanted])
    for name, pins in wanted:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if name in broken:
            problems.append(f"{name} {'is not installed' if version is None else f'{version} cannot be imported ({broken[name]})'}")
            worst = "FAIL" if name in NEEDED_TO_TRAIN or worst == "FAIL" else "warn"
        elif version and not satisfies(version, pins):
            problems.append(f"{name} {version}, not {','.join(map(''.join, pins))}")
            worst = "FAIL" if worst == "FAIL" else "warn"
    if worst == "ok":
        return "ok", f"the {len(wanted)} of requirements.txt, at the versions it names"
    return worst, "; ".join(problems), f"{install} in the environment of this python; another torch for another CUDA version is fine (README.md, Which torch)"


def torch_works():
    import numpy as np
    import torch
    torch.manual_seed(0)
    a, b = torch.randn(64, 48, requires_grad=True), torch.randn(48, 32)
    for kind, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        a.grad = None
        (a.to(kind) @ b.to(kind)).float().square().sum().backward()
        x, y = a.detach().double().numpy(), b.double().numpy()
        expected = 2 * x @ y @ y.T
        if not np.abs(a.grad.numpy() - expected).max() < tolerance * np.abs(expected).max():
            raise Trouble(f"torch {torch.__version__} gets the gradient of a {kind} matrix product wrong on this processor")
    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


@functools.cache
def torch_facts():
    return in_child(torch_works)


def check_torch():
    facts = torch_facts()
    build = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "a CPU build"
    return "ok", f"{facts['version']}, {build}; products and their gradients are right, in float32 and bfloat16; {facts['threads']} threads"


def check_cpu():
    everywhere = os.cpu_count()
    allowed, quota = len(os.sched_getaffinity(0)) if sys.platform == "linux" else everywhere, cpu_quota(read("/proc/self/cgroup", ""))
    has = fields(read("/proc/cpuinfo", "")).get("flags", "").split()
    simd = [title for flag, title in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in has]
    found = f"{allowed} of {everywhere} cores, {', '.join(simd) or 'no AVX2'}" + (f"; the control group allows the time of {quota:g}" if quota else "")
    usable = max(1, min(allowed, int(quota or allowed)))
    if usable < everywhere and not all(os.environ.get(name, "").isdigit() and int(os.environ[name]) <= usable for name in ("OMP_NUM_THREADS", "THREADS")):
        return ("warn", found, f"scripts start a thread for each of the {everywhere} cores, and threads that wait for each other's turn are slower than few: "
                f"OMP_NUM_THREADS={usable} THREADS={usable} in the environment")
    return "ok", found


def check_memory():
    memory = {name: int(value.split()[0]) * 1024 for name, value in fields(read("/proc/meminfo", "")).items() if value.endswith("kB")}
    if not memory:
        return "warn", "this system has no /proc/meminfo", "how much memory there is could not be found out"
    limit = memory_limit(read("/proc/self/cgroup", ""))
    available = min(memory["MemAvailable"], limit or memory["MemAvailable"])
    found = f"{memory['MemAvailable'] / GB:.1f} of {memory['MemTotal'] / GB:.1f} GB free" + (f"; the control group allows {limit / GB:.1f}" if limit else "")
    if available < HOST_MEMORY:
        return ("warn", found, f"below the {HOST_MEMORY / GB:.0f} GB that a run on a GPU wants of the host (ViT-L on a CPU: 8 GB); beyond it the kernel kills the run "
                "(`Killed`, exit code 137). Lower --batch_size and --threads, or choose a smaller --size")
    return "ok", found


def check_limits():
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in ("NOFILE", "FSIZE", "AS", "MEMLOCK")}
    size = lambda limit: "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GB:.3g} GB"
    soft, hard = limits["NOFILE"]
    found = f"open files {soft} (at most {'unlimited' if hard == resource.RLIM_INFINITY else hard}), file size {size(limits['FSIZE'][0])}, address space {size(limits['AS'][0])}, locked memory {size(limits['MEMLOCK'][0])}"
    advice = []
    if 0 <= hard < 1024:
        advice.append("few open files: a cache keeps a quarter as many shards open (it raises the soft limit itself) and opens the others again and again; `ulimit -Hn 65536` as an administrator")
    if limits["FSIZE"][0] != resource.RLIM_INFINITY and limits["FSIZE"][0] < CHECKPOINTS / 3:
        advice.append("a file may not grow to the size of a checkpoint of ViT-L (about 4.1 GB) or a shard (1.2 GB): saving ends with `File too large`; `ulimit -f unlimited`")
    if limits["AS"][0] != resource.RLIM_INFINITY:
        advice.append("CUDA reserves far more address space than it uses, and shards are mapped: with a limit both may fail with out of memory; `ulimit -v unlimited`")
    return "warn" if advice else "ok", found, *advice


def extension_works(devices):
    import torch
    import ops
    for where in devices:
        torch.manual_seed(0)
        prediction, target = torch.randn(2, 24, 64, device=where), torch.randn(2, 40, 64, device=where)
        index = torch.stack([torch.randperm(40)[:24].sort().values for _ in range(2)]).to(where)
        leaf = prediction.clone().requires_grad_()
        expected, _ = ops.masked_mse_reference(leaf, target, index)
        wanted, = torch.autograd.grad(expected, leaf)
        loss, gradient = ops.masked_mse_with_grad(prediction, target, index)
        if not (torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-7)):
            raise Trouble(f"the loss kernel on {where} is not what its plain reference gives: {loss.item():.7g} and {expected.item():.7g}")
    return {"missing": ops.MISSING, "line": ops.extension_line(devices[-1]), **ops.EXTENSION}


def check_extension():
    places = ["cpu"] + ([torch_device()] if gpu_wanted() else [])
    try:
        facts = in_child(extension_works, places)
    except Trouble as trouble:
        return "FAIL", str(trouble), "build it again: rm -rf build salt_ops*.so; python setup.py build_ext. Until then SALT_OPS=reference runs without it"
    if facts["missing"]:
        return ("warn", f"not in use ({facts['missing']})", "everything runs on the plain PyTorch reference, with the same results, slower" +
                ("" if "SALT_OPS" in facts["missing"] else ": python setup.py build_ext"))
    line = facts["line"].removeprefix("salt_ops: ")
    if "; on the GPU" in line or "; not for this GPU" in line:
        return "warn", line, "the loss and the gathering of rows run slower on the GPU; results are the same"
    if "amx_bf16" in read("/proc/cpuinfo", "") and not facts["amx"]:
        return ("warn", line, "this processor has AMX, and the system does not hand it out (Linux before 5.16, or a seccomp filter on arch_prctl), or SALT_SIMD turns it off: "
                "bfloat16 on the CPU is slower")
    return "ok", f"{line}; its loss and gradient are the reference's on {' and '.join(places)}"


# --------------------------------------------------------------------------------------------------------- the GPU's chain

def probe_nodes():
    """{device file: [error number or None, major]} of the NVIDIA device files here, and of those that every GPU program opens."""
    found = {}
    for path in ["/dev/nvidiactl", "/dev/nvidia-uvm", *(sorted(path for path in glob.glob("/dev/nvidia[0-9]*")) or ["/dev/nvidia0"])]:
        try:
            major = os.major(os.stat(path).st_rdev)
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            found[path] = [None, major]
        except OSError as error:
            found[path] = [error.errno, major if error.errno != errno.ENOENT and os.path.exists(path) else None]
    return found


def cuda_init():
    """What the driver's own library says: cuInit's error number, name and text, and how many GPUs it counts."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"library": str(error)}
    code, count, text = library.cuInit(0), ctypes.c_int(0), ctypes.c_char_p()
    words = []
    for function in (library.cuGetErrorName, library.cuGetErrorString):
        words.append(text.value.decode() if function(code, ctypes.byref(text)) == 0 and text.value else "")
    if code == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    return {"library": None, "code": code, "name": words[0], "text": words[1], "count": count.value}


def nvml_init():
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return {"library": str(error)}
    library.nvmlErrorString.restype = ctypes.c_char_p
    code, count = library.nvmlInit_v2(), ctypes.c_uint(0)
    if code == 0:
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return {"library": None, "code": code, "text": library.nvmlErrorString(code).decode(), "count": count.value}


def torch_sees():
    import warnings
    import torch
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        try:
            available = available and torch.zeros(1, device="cuda").item() == 0
        except Exception as error:  # counted, but not usable
            return {"count": 0, "said": " ".join(str(error).split())[:300]}
    return {"count": torch.cuda.device_count() if available else 0, "said": " ".join(str(said[-1].message).split())[:300] if said else ""}


@functools.cache
def system_facts():
    """What the kernel and the driver's libraries show of the GPUs, without torch."""
    vendors = [read(path, "").strip() == "0x10de" and read(os.path.join(os.path.dirname(path), "class"), "").startswith("0x03")
               for path in glob.glob("/sys/bus/pci/devices/*/vendor")]
    modules, version = read("/proc/modules"), driver_version(read("/proc/driver/nvidia/version"))
    if version is None and shutil.which("nvidia-smi"):
        with contextlib.suppress(Trouble, OSError):
            said, _, code = run_limited(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], min(patience, 30))
            version = said.split()[0] if code == 0 and re.match(r"\d+\.\d+", said) else None
    facts = {"pci": sum(vendors) if vendors else None, "module": None if modules is None else bool(re.search(r"^nvidia ", modules, re.MULTILINE)), "driver": version,
             "majors": character_majors(read("/proc/devices", "")), "wsl": os.path.exists("/dev/dxg"), "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    for name, function in (("nodes", probe_nodes), ("init", cuda_init)):
        try:
            facts[name] = in_child(function, seconds=min(patience, 60))
        except Trouble as trouble:
            facts[name] = str(trouble)
    return facts


@functools.cache
def cuda_facts():
    facts = system_facts() | {"torch": torch_facts()["version"], "cuda": torch_facts()["cuda"], "count": 0, "said": ""}
    if facts["cuda"]:
        try:
            facts |= in_child(torch_sees)
        except Trouble as trouble:
            facts["said"] = str(trouble)
    return facts


def torch_device():
    return "cuda:0" if device in ("auto", "cuda") else device


def gpu_wanted():
    """Whether training is to use a GPU that torch can use."""
    with contextlib.suppress(Trouble):
        return device != "cpu" and cuda_facts()["count"] > 0
    return False


CREATE_NODES = "as an administrator, on the host: nvidia-modprobe -u -c 0 (or run nvidia-smi once; nvidia-persistenced keeps them)"

# cuInit's answers (cuda.h, CUresult). What is certain is in the error's own text; these say what tends to be behind it.
CUINIT = {
    3: "the driver's library did not initialise; with 999 and 304, usually device files, the nvidia-uvm module or a sandbox: see the lines driver and sandbox",
    34: "the libcuda.so.1 that was found is the CUDA toolkit's stub for linking: take .../stubs out of LD_LIBRARY_PATH",
    46: "the GPU is held by another process (compute mode exclusive) or MPS, or was lost: nvidia-smi -q | grep -A1 'Compute Mode'; dmesg | grep Xid",
    100: "the driver runs and shows this process no GPU: CUDA_VISIBLE_DEVICES, a container without --gpus or with device files left out, or a GPU that fell off the bus (dmesg | grep Xid)",
    101: "CUDA_VISIBLE_DEVICES names a GPU that is not there",
    304: "a system call was refused. Typically a sandbox: seccomp filters without memfd_create and Landlock rules without writing to /proc/self/task/*/comm have both done "
         "this while nvidia-smi worked; see the line sandbox",
    802: "on machines with NVSwitch nvidia-fabricmanager is not running, or not of the driver's version: systemctl status nvidia-fabricmanager; a confidential-computing GPU may not be ready",
    803: "libcuda.so.1 and the kernel module are of different driver versions: the driver was updated under a running kernel. Reboot, or unload and load the modules; in a container, start it anew",
    804: "a forward-compatibility libcuda (package cuda-compat) is in the path on a GPU that it does not support (GeForce): take it out of LD_LIBRARY_PATH",
    999: "unspecific. Most often nvidia-uvm is not loaded or stale (after suspend): modprobe -r nvidia_uvm; modprobe nvidia_uvm; then device files, then dmesg",
}


def broken_link(facts):
    """(what is broken, what to do) at the first link of the chain from torch down to the GPU that does not hold; facts: see cuda_facts."""
    major = facts["cuda"] and int(facts["cuda"].split(".")[0])
    if not facts["cuda"]:
        seen = f"; {facts['pci']} on the PCI bus" if facts["pci"] else ""
        return f"torch {facts['torch']} is a CPU build{seen}", "install a CUDA build of the torch in requirements.txt: the selector on pytorch.org names the command for your CUDA version"
    if not facts["wsl"]:
        if facts["pci"] == 0 and facts["driver"] is None:
            return "there is no NVIDIA GPU on the PCI bus", "in a virtual machine it has to be passed through; on the metal look at `lspci -d 10de:` and dmesg"
        if facts["driver"] is None and facts["module"] is False:
            return ("the kernel module nvidia is not loaded", "modprobe nvidia, and dmesg for why it did not load: not built for this kernel (dkms status), refused by Secure Boot, "
                    "nouveau in its place, no driver installed")
    if facts["driver"] and major in OLDEST_DRIVER and int(facts["driver"].split(".")[0]) < OLDEST_DRIVER[major]:
        return (f"driver {facts['driver']} is too old for CUDA {facts['cuda']}, which needs {OLDEST_DRIVER[major]} or newer",
                "update the driver, or install the build of the same torch for an older CUDA (README.md, Which torch); data-centre GPUs may also use the package cuda-compat")
    if not facts["wsl"] and isinstance(facts["nodes"], dict):
        for path, (error, node_major) in facts["nodes"].items():
            expected = facts["majors"].get("nvidia-uvm") if path.endswith("uvm") else 195
            container = "in a container: docker run --gpus all with the NVIDIA Container Toolkit"
            if error == errno.ENOENT:
                return f"the device file {path} is missing", f"{CREATE_NODES}; {container}"
            if expected and node_major is not None and node_major != expected:
                return f"the device file {path} has major number {node_major}, the driver has {expected}", f"it is left over from before: rm {path}, then {CREATE_NODES}"
            if error == errno.EPERM:
                return (f"opening {path} is not permitted (EPERM)", f"the container's device control group, or a sandbox, does not list it: {container}; where it worked until a "
                        "`systemctl daemon-reload`, start the container anew (docs/TROUBLESHOOTING.md)")
            if error == errno.EACCES:
                return f"no right to open {path} (EACCES)", f"ls -l {path}: join its group (usermod -aG video USER, log in again), or set NVreg_DeviceFileMode=0666"
            if error in (errno.ENXIO, errno.ENODEV, errno.EIO):
                return f"there is no driver or no working GPU behind {path} ({errno.errorcode[error]})", "dmesg | grep -e NVRM -e Xid; modprobe nvidia-uvm for /dev/nvidia-uvm; else reboot"
            if error:
                return f"{path} cannot be opened ({errno.errorcode.get(error, error)}: {os.strerror(error)})", "dmesg | grep -e NVRM -e Xid"
    elif not facts["wsl"]:
        return f"opening the NVIDIA device files: {facts['nodes']}", "the driver is wedged: dmesg | grep -e NVRM -e Xid; reboot"
    if facts["visible"] is not None and facts["visible"].strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES is {facts['visible']!r}, which hides every GPU", "unset CUDA_VISIBLE_DEVICES, or give it the GPUs' numbers; under slurm ask for a GPU (--gres=gpu:1)"
    if not isinstance(facts["init"], dict):
        return f"cuInit: {facts['init']}", "the driver is wedged or crashed: dmesg | grep -e NVRM -e Xid; reboot"
    if facts["init"]["library"]:
        return (f"the driver's library cannot be loaded ({facts['init']['library']})", "install the driver's user-space part, of the kernel module's version; in a container "
                "the NVIDIA Container Toolkit brings it (NVIDIA_DRIVER_CAPABILITIES=compute,utility)")
    if facts["init"]["code"]:
        code = facts["init"]["code"]
        visible = f"; CUDA_VISIBLE_DEVICES is {facts['visible']!r}" if facts["visible"] is not None else ""
        return f"cuInit gives {code} {facts['init']['name']} ({facts['init']['text']}){visible}", CUINIT.get(code, "cuda.h has the number; dmesg | grep -e NVRM -e Xid")
    if facts["init"]["count"] == 0:
        return "cuInit works and counts no GPU", f"CUDA_VISIBLE_DEVICES is {facts['visible']!r}; MIG without an instance (nvidia-smi -L) also looks like this"
    return f"the driver counts {facts['init']['count']} GPUs and torch cannot use them: {facts['said'] or 'it says nothing'}", "see the message; reinstall torch where it names a library"


def check_driver():
    facts = system_facts()
    nodes = facts["nodes"] if isinstance(facts["nodes"], dict) else {}
    usable = [path.removeprefix("/dev/") for path, (error, _) in nodes.items() if error is None]
    gpus = "GPUs on the PCI bus unknown (no /sys)" if facts["pci"] is None else f"{facts['pci'] or 'no'} NVIDIA GPU{'s' * (facts['pci'] > 1)} on the PCI bus"
    found = (f"{gpus}; driver {facts['driver'] or 'none'}; module nvidia {'loaded' if facts['module'] else 'not to be seen' if facts['module'] is None else 'not loaded'}; "
             f"device files {', '.join(usable) or 'none that open'}" + ("; WSL: the driver is Windows's" if facts["wsl"] else ""))
    if facts["pci"] and (facts["driver"] is None or len(usable) < len(nodes)) and device != "cpu":
        return "warn", found, "a GPU is there and cannot be reached; the line cuda says at which link, with what to do"
    return "ok", found


def dotted(built):
    """torch.cuda.get_arch_list(), ['sm_90', 'sm_100a', 'compute_120'], as ops.covers takes it: '9.0;10.0a;12.0+PTX'."""
    names = filter(None, (re.fullmatch(r"(sm|compute)_(\d+)(\d[af]?)", name) for name in built))
    return ";".join(f"{name[2]}.{name[3]}{'+PTX' if name[1] == 'compute' else ''}" for name in names)


def gpu_works(where):
    """Facts of the GPU that torch calls `where`, after a matrix product on it that is compared with the CPU's."""
    import torch
    import ops
    gpu = torch.device(where)
    torch.cuda.set_device(gpu)
    properties, capability = torch.cuda.get_device_properties(gpu), torch.cuda.get_device_capability(gpu)
    built = torch.cuda.get_arch_list()
    if built and not ops.covers(dotted(built), capability):
        raise Trouble(f"torch {torch.__version__} has no code for {properties.name}, compute capability {capability[0]}.{capability[1]}; it has {' '.join(built)}")
    free, total = torch.cuda.mem_get_info(gpu)
    a, b = torch.randn(512, 256), torch.randn(256, 128)
    x, y = a.to(gpu).requires_grad_(), b.to(gpu)
    (x @ y).square().sum().backward()
    difference = ((x.grad.cpu() - 2 * (a @ b) @ b.T).abs().max() / (2 * (a @ b) @ b.T).abs().max()).item()
    half = ((a.to(gpu).bfloat16() @ b.to(gpu).bfloat16()).float().cpu() - a @ b).abs().max().item() / (a @ b).abs().max().item()
    if not (difference < 5e-3 and half < 5e-2):
        raise Trouble(f"matrix products on {properties.name} differ from the CPU's by {difference:.1e} (float32) and {half:.1e} (bfloat16)")
    return {"name": properties.name, "capability": f"{capability[0]}.{capability[1]}", "free": free, "total": total,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False), "count": torch.cuda.device_count()}


def check_cuda():
    if device == "cpu":
        return "ok", "not asked for (--device cpu)"
    facts = cuda_facts()
    if not facts["count"]:
        link, advice = broken_link(facts)
        return ("FAIL", link, advice) if device.startswith("cuda") else ("warn", f"training would run on the CPU: {link}", advice)
    if device.startswith("cuda:") and int(device[5:]) >= facts["count"]:
        return "FAIL", f"--device {device}: torch sees {facts['count']} GPUs", "numbers start at 0, and CUDA_VISIBLE_DEVICES renumbers"
    try:
        gpu = in_child(gpu_works, torch_device())
    except Trouble as trouble:
        return "FAIL", str(trouble), "a build of torch that has code for the GPU (README.md, Which torch); wrong results or a crash: dmesg | grep Xid, and another GPU"
    found = (f"{gpu['name']}, {gpu['free'] / GB:.1f} of {gpu['total'] / GB:.1f} GB free, compute capability {gpu['capability']}, CUDA {facts['cuda']} on driver {facts['driver']}; "
             f"products and gradients are right" + (f"; {gpu['count']} GPUs" if gpu["count"] > 1 else ""))
    advice = []
    if not gpu["bf16"]:
        advice.append("this GPU has no bfloat16 (Ampere and newer do): it is emulated, slowly; --dtype fp32 may be faster")
    if gpu["free"] < 0.8 * gpu["total"]:
        advice.append("other processes hold its memory: nvidia-smi names them; else --accumulate, then --recompute")
    return "warn" if advice else "ok", found, *advice


def check_nvcc():
    if not torch_facts()["cuda"]:
        return "ok", "not needed: torch is a CPU build"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or next(iter([*glob.glob("/usr/local/cuda/bin/nvcc"), *sorted(glob.glob("/usr/local/cuda-*/bin/nvcc"), reverse=True)]), None)
    if not nvcc or not os.path.exists(nvcc):
        return "warn", f"no nvcc{f' in CUDA_HOME={home}' if home else ''}", "python setup.py build_ext leaves the CUDA kernels out; where they are built already (line extension) nothing is missing"
    release = re.search(r"release (\d+)\.(\d+)", run_limited([nvcc, "--version"], min(patience, 60))[0])
    if not release or release[1] != torch_facts()["cuda"].split(".")[0]:
        return ("warn", f"{nvcc} is {'of unknown release' if not release else f'CUDA {release[1]}.{release[2]}'}, torch is built for {torch_facts()['cuda']}",
                "the CUDA kernels do not build with another major version: install that toolkit, and set CUDA_HOME to it")
    return "ok", f"{nvcc}, CUDA {release[1]}.{release[2]}"


def check_nvml():
    try:
        facts = in_child(nvml_init, seconds=min(patience, 60))
    except Trouble as trouble:
        facts = {"library": None, "code": -1, "text": str(trouble), "count": 0}
    found = f"libnvidia-ml.so.1: {facts['library']}" if facts["library"] else f"nvmlInit_v2 gives {facts['code']} ({facts['text']}), {facts['count']} GPUs"
    if facts["library"] is None and facts["code"] == 0:
        return "ok", found
    if not gpu_wanted():
        return "ok", f"{found}; nothing here needs it without a GPU"
    return ("warn", found, "nvidia-smi does not work. One GPU trains without NVML; NCCL between GPUs needs it, and torch, out of memory, then says `NVML_SUCCESS == r INTERNAL ASSERT FAILED` "
            "in place of how much was asked for", "18 (driver/library version mismatch): the driver was updated under a running kernel, reboot. Unknown Error in a container that worked before: "
            "start it anew (docs/TROUBLESHOOTING.md)")


CAPABILITIES = {16: "SYS_MODULE", 21: "SYS_ADMIN", 27: "MKNOD"}


def sandbox(status):
    """(what was found, [what it means, ...]) of the text of /proc/self/status."""
    values = fields(status)
    privileges, mode = values.get("NoNewPrivs"), values.get("Seccomp")
    held = int(values.get("CapEff", "0"), 16)
    capabilities = [name for bit, name in CAPABILITIES.items() if held >> bit & 1]
    modes = {"0": "none", "1": "strict", "2": "filter"}
    found = (f"NoNewPrivs {privileges or 'unknown'}, Seccomp {mode or 'unknown'}{f' ({modes[mode]})' if mode in modes else ''}"
             f"{', ' + values['Seccomp_filters'] + ' filters' if values.get('Seccomp_filters', '0') != '0' else ''}, capabilities {', '.join(capabilities) or 'none of ' + ', '.join(CAPABILITIES.values())}")
    meaning = []
    if privileges == "0":
        meaning.append("NoNewPrivs 0: setuid programs get their privileges, so CUDA and NVML can have nvidia-modprobe, where it is installed, load nvidia-uvm and make missing device files")
    elif privileges == "1":
        meaning.append("NoNewPrivs 1: no program started from here gains privileges by setuid. CUDA and NVML run nvidia-modprobe for missing device files and for nvidia-uvm, and here that "
                       "fails" + (" unless this process may do so itself" if "MKNOD" in capabilities else "") + f". {CREATE_NODES}, before. Where they exist and open, this stops neither CUDA nor NVML")
    if mode == "0":
        meaning.append("Seccomp 0: no system call is filtered")
    elif mode == "1":
        meaning.append("Seccomp 1: only read, write and exit are left; neither CUDA nor Python could run, so this text is not of this process")
    elif mode == "2":
        meaning.append("Seccomp 2: a filter may refuse system calls; which ones cannot be read from here. Docker's default filter lets CUDA and NVML work. Others have let NVML and nvidia-smi work while "
                       "cuInit gave 304 (memfd_create refused); 999 and 100 also occur. So judge by the lines cuda and nvml, and to find out start once without (docker run --security-opt "
                       "seccomp=unconfined). io_uring, mbind and perf_event_open are often refused too; nothing here needs them")
    return found, meaning


def check_sandbox():
    text = read("/proc/self/status")
    if text is None:
        return "warn", "there is no /proc/self/status", "whether system calls are filtered cannot be seen; judge by the lines cuda and nvml"
    found, meaning = sandbox(text)
    values = fields(text)
    bound = (values.get("NoNewPrivs") == "1" or values.get("Seccomp") == "2") and device != "cpu"
    there = bound and (system_facts()["pci"] or system_facts()["driver"] or device.startswith("cuda"))  # a GPU, or the wish for one
    return "warn" if there and not gpu_wanted() else "ok", found, *meaning


# ---------------------------------------------------------------------------------------------------------- video and disk

CODECS = {"vp9": (("libvpx-vp9", "vp9"), ("libvpx-vp9",)), "h264": (("h264",), ("libx264", "libopenh264")), "hevc": (("hevc",), ("libx265",)),
          "av1": (("libdav1d", "libaom-av1"), ("libsvtav1", "libaom-av1")), "mpeg4": (("mpeg4",), ("mpeg4",))}  # decoders, encoders; FFmpeg's own av1 decoder wants a GPU


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
    """{codec: 'decoded', 'present' (no encoder here to try it with) or what is wrong}, through data.read_clip, and PyAV's version."""
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
        if not any(name in av.codecs_available for name in decoders):
            found[codec] = "no decoder"
            continue
        found[codec] = "present"
        for encoder in encoders:
            try:
                video = io.BytesIO()
                write_frames(video, encoder, [np.full((64, 64, 3), level, np.uint8) for level in levels], "matroska")
            except (av.FFmpegError, ValueError):  # this build has no such encoder, or it needs hardware
                continue
            video.seek(0)
            clip = data.read_clip(video, View(frames=16, size=32, short_side=32), "doctor")
            wrong = np.abs(clip.reshape(16, -1).mean(1) - levels).max()
            found[codec] = "decoded" if wrong < 5 else f"decoded wrongly: grey levels are off by {wrong:.0f}"
            break
    return {"version": av.__version__, "codecs": found}


def check_codecs():
    try:
        facts = in_child(codecs_work)
    except Trouble as trouble:
        return "FAIL", str(trouble), "pip install 'av>=18,<19' brings FFmpeg with it (a system's older av may hide it). Without decoding only a cache with clips (--clips on) can be trained from"
    groups = {}
    for codec, state in facts["codecs"].items():
        groups.setdefault(state, []).append(codec)
    good = [f"{', '.join(groups[state])} {text}" for state, text in (("decoded", "encoded, read by data.read_clip and right"), ("present", "present (no encoder to try it with)")) if state in groups]
    bad = [f"{', '.join(codecs)}: {state}" for state, codecs in groups.items() if state not in ("decoded", "present")]
    found = f"av {facts['version']}: {'; '.join(good + bad)}"
    if not bad:
        return "ok", found
    fatal = "decoded" not in groups or any("wrongly" in state for state in groups)
    return "FAIL" if fatal else "warn", found, "videos of these codecs are left out when caching and counted in failures.jsonl; pip install 'av>=18,<19' has all of them (Something-Something v2 is vp9)"


def try_disk(folder, megabytes):
    """Write, sync, read back, rename and lock in a folder. Nothing is left: the large file has no name. Returns rates in bytes/s and what did not work."""
    import fcntl
    import random
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    block, rest = random.randbytes(1 << 20), []
    blocks = max(1, min(megabytes * 10**6, free // 4) >> 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for number in range(blocks):
            if file.write(number.to_bytes(8, "little") + block[8:]) < len(block):
                raise Trouble("only a part of a write went through: the disk is full, or a quota or RLIMIT_FSIZE is reached (File too large)")
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        for number in range(blocks):
            if file.read(1 << 20) != number.to_bytes(8, "little") + block[8:]:
                raise Trouble(f"what was written to {folder} did not come back the same")
        took = time.perf_counter() - start
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as inside:
        one, two = os.path.join(inside, "one"), os.path.join(inside, "two")
        for path in (one, two):
            with open(path, "w") as file:
                file.write(path)
        os.replace(one, two)
        if os.path.exists(one) or open(two).read() != one:
            rest.append("renaming over a file does not replace it")
        with open(two) as first, open(two) as second:
            try:
                fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    rest.append("locks do not exclude each other (flock)")
                except BlockingIOError:
                    pass
            except OSError as error:
                rest.append(f"files cannot be locked (flock: {error.strerror})")
    return {"free": free, "size": blocks << 20, "write": (blocks << 20) / wrote, "read": (blocks << 20) / took, "rest": rest}


def check_disk():
    folder = os.path.abspath(os.path.expanduser(out))
    try:
        facts = in_child(try_disk, folder, disk_mb)
    except Trouble as trouble:
        return "FAIL", f"{folder}: {trouble}", "checkpoints and caches could not be written there: give --out another folder, make room, or mend its rights (a disk that went read-only: dmesg)"
    kind, _ = file_system(os.path.realpath(folder), read("/proc/mounts", ""))
    rate, wanted = facts["read"] / COLD_CLIP, GPU_CLIPS if gpu_wanted() else CPU_CLIPS
    found = (f"{folder} ({kind}): {facts['free'] / GB:.1f} GB free; {facts['size'] / 1e6:.0f} MB written and synced at {facts['write'] / 1e6:.0f} MB/s, read back at {facts['read'] / 1e6:.0f} "
             f"= {rate:.0f} clips/s out of a cold cache of {COLD_CLIP / 1e6:.2f} MB a clip")
    advice = []
    if facts["free"] < CHECKPOINTS:
        advice.append(f"below the {CHECKPOINTS / GB:.0f} GB that the checkpoints of a ViT-L run may take; Something-Something v2 cached takes 407 GB, 814 with clips, 204 as --latents i8")
    if rate < wanted:
        advice.append(f"slower than the {wanted} clips/s of {'a GPU' if gpu_wanted() else 'a CPU'}: the log's data wait would show it. A cache that fits into memory is read from disk only once; "
                      "else --latents i8, a local NVMe disk, or train from videos")
    if facts["rest"]:
        advice.append(f"{'; '.join(facts['rest'])}: two cache_latents.py at once could spoil one cache there (network file systems: mount with locks)")
    return "warn" if advice else "ok", found, *advice


# ----------------------------------------------------------------------------------------------- between processes

def check_shm():
    gpus = cuda_facts()["count"] if gpu_wanted() else 0
    needless = "nothing here uses it: batches are made by threads of one process"
    advice = ("NCCL between GPUs of one machine and DataLoader workers of other code do use it: docker run --shm-size=1g (or --ipc=host); where that cannot be had, NCCL_SHM_DISABLE=1, slower. "
              "One that is too small ends in a bus error")
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(b"x")
        space = os.statvfs("/dev/shm")
    except OSError as error:
        return "warn" if gpus > 1 else "ok", f"/dev/shm cannot be used ({error.strerror}); {needless}", *([advice] if gpus > 1 else [])
    size = space.f_blocks * space.f_frsize
    found = f"/dev/shm has {space.f_bavail * space.f_frsize / GB:.2f} of {size / GB:.2f} GB free; {needless}"
    return ("warn", found, advice) if gpus > 1 and size < 1 << 30 else ("ok", found)


def make_semaphore():
    import multiprocessing
    with multiprocessing.Semaphore():
        return True


def check_semaphores():
    try:
        in_child(make_semaphore, seconds=min(patience, 60))
    except Trouble as trouble:
        return ("warn", f"refused ({trouble})", "training needs none, and tqdm does without. torch.compile's worker processes do (it is on by default on a GPU): TORCHINDUCTOR_COMPILE_THREADS=1, "
                "or --compile off. They live in /dev/shm, so that must be there and writable")
    return "ok", "can be made"


def group_of_one():
    """A gloo group on the loopback, with a sum over it, and NCCL's version."""
    from datetime import timedelta
    import torch
    import torch.distributed as dist
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    ones = torch.ones(4)
    dist.all_reduce(ones)
    if ones.tolist() != [1] * 4:
        raise Trouble("a sum over one rank is not what it should be")
    nccl = dist.is_nccl_available() and torch.version.cuda and ".".join(map(str, torch.cuda.nccl.version()))
    return {"nccl": nccl or None}


def check_ranks():
    try:
        nccl = in_child(group_of_one, seconds=min(patience, 90))["nccl"]
    except Trouble as trouble:
        return ("warn", f"no gloo group on the loopback ({trouble})", "one process trains without; torchrun does not work here. A sandbox without sockets, or no interface lo (ip link set lo up); "
                "between machines GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface")
    found = f"gloo works on the loopback; NCCL {nccl or 'is not in this torch'}"
    if not nccl and gpu_wanted() and cuda_facts()["count"] > 1:
        return "warn", found, "several GPUs train together over NCCL, which the Linux CUDA builds of torch bring"
    return "ok", found


# ------------------------------------------------------------------------------------------------------------ the real thing

def make_videos(folder):
    import numpy as np
    random = np.random.default_rng(0)
    for name in ("train/0", "train/1", "train/2", "train/3", "validation/4"):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        frames = list(random.integers(0, 255, (8, 48, 64, 3), dtype=np.uint8))
        for encoder, suffix in (("libvpx-vp9", "webm"), ("libx264", "mp4"), ("mpeg4", "avi")):
            try:
                write_frames(f"{path}.{suffix}", encoder, frames)
                break
            except ValueError:  # no such encoder in this build: av.codec.UnknownCodecError
                pass
        else:
            raise Trouble("this build of FFmpeg encodes neither vp9 nor h264 nor mpeg4, so there is no video to try with")


def check_training():
    flags = ["--target", "pixels", "--masks", "ratio", "--data", "videos", "--frames", "4", "--resolution", "48", "--size", "tiny", "--depth", "1", "--predictor_depth", "1",
             "--predictor_dim", "32", "--predictor_heads", "2", "--batch_size", "2", "--max_steps", "2", "--log_every", "1", "--threads", "2", "--device", device,
             "--checkpoints", "checkpoints", "--run_logs", "run_logs", "--run_name", "doctor"]
    script = os.path.join(HERE, "train.py")
    ours = {name.upper() for name in config.read_settings(script)} | {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT"}  # this is one process, and these are its settings
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    with tempfile.TemporaryDirectory(dir=os.path.expanduser(out), prefix=".doctor-", ignore_cleanup_errors=True) as folder:
        in_child(make_videos, os.path.join(os.path.abspath(folder), "videos"))
        start = time.perf_counter()
        try:
            said, complaint, code = run_limited([sys.executable, script, *flags], patience, cwd=folder, env=environ)
        except Trouble as trouble:
            return "FAIL", f"two steps of a small model: {trouble}", "on a GPU the first step compiles: a slow processor may want --patience 600. Else something hangs: py-spy dump --pid P, dmesg"
        took = time.perf_counter() - start
        written = sorted(os.path.basename(path) for path in glob.glob(os.path.join(folder, "checkpoints", "*", "*.pth")))
    if code:
        reason = f"died of {signal.Signals(-code).name}: " if code < 0 else f"exit code {code}: "
        return "FAIL", reason + last_line(complaint or said), "the checks above may have said why; SALT_TRACEBACK=1 python doctor.py --only training shows where in the code"
    if not {"best.pth", "last.pth"} <= set(written):
        return "FAIL", f"train.py ended well and left {', '.join(written) or 'no checkpoint'}", "this is a bug of train.py"
    where = re.search(r"^torch \S+ on (.+)$", said, re.MULTILINE)
    return "ok", f"two steps of a small model on video{f', {where[1]}' if where else ''}, both checkpoints: {took:.0f} s"


CHECKS = {name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")}  # in the order of this file


def diagnose(name):
    """{"name", "status", "found", "advice"} of one check, whatever happens in it."""
    try:
        status, found, *advice = CHECKS[name]()
    except Trouble as trouble:
        status, found, advice = "FAIL", str(trouble), ["docs/TROUBLESHOOTING.md has a section for this check"]
    except Exception as error:
        status, found, advice = "FAIL", f"the check itself went wrong: {type(error).__name__}: {' '.join(str(error).split())}", ["what it looks at could not be found out here"]
    return {"name": name, "status": status, "found": found, "advice": list(advice)}


if __name__ == "__main__":
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise config.InputError(f"--device is {device!r}; it takes auto, cpu, cuda or cuda:1")
    for name in only or ():
        if name not in CHECKS:
            raise config.InputError(f"--only {name!r} is none of the checks: {', '.join(CHECKS)}{config.nearest(name, CHECKS)}")
    results = []
    for name in only or CHECKS:
        results.append(diagnose(name))
        print(f"{name:10}  {results[-1]['status']:4}  {results[-1]['found']}", flush=True)
        for line in results[-1]["advice"]:
            print(f"{'':18}{line}", flush=True)
    failed, warned = ([result["name"] for result in results if result["status"] == status] for status in ("FAIL", "warn"))
    warnings = f" ({len(warned)} warning{'s' * (len(warned) > 1)}: {', '.join(warned)})" if warned else ""
    if failed:
        verdict = f"training would not run here: {', '.join(failed)}{warnings}"
    elif only and "training" not in only:
        verdict = f"nothing found that would stop training; not all was tried{warnings}"
    else:
        verdict = f"training would run here{', on the GPU' if gpu_wanted() else ', on the CPU'}{warnings}"
    print(f"\n{'FAIL' if failed else 'ok'}: {verdict}")
    if json:
        with open(json, "w") as file:
            file.write(dumps({"verdict": verdict, "code": int(bool(failed)), "checks": results, "config": settings}, indent=1) + "\n")
    sys.exit(bool(failed))
