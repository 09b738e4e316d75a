"""Would training run on this machine? Tries what a run needs, a line a check.

    python tools/doctor.py                       everything; exit code 0 where training would run
    python tools/doctor.py --device cuda         a GPU that cannot be used is then a failure
    python tools/doctor.py --only driver,cuda    these checks alone

ok is as it should be; with warn training runs, slower or without something; with FAIL it does not.
The line then ends with the section of docs/TROUBLESHOOTING.md to read. Each check has a process of
its own and a time limit, so that one which hangs or crashes (CUDA, codecs, a disk) is a line too.
"""

import contextlib
import ctypes
import glob
import importlib.metadata
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from json import dumps, loads
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"doctor.py: FAIL: SALT-VLA needs Python 3.11 or newer, this is {sys.version}")

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project
sys.path.insert(0, HERE)
from salt import config
from salt.errors import InputError, nearest
from salt.files import prepare_file, write_whole

# ----------------------------------------------------------------------------------------- settings
device = "auto"  # auto, cpu, cuda or cuda:1; with cuda a GPU that cannot be used is a failure
out = "."  # folder on the disk to try: where cache and checkpoints are to lie
disk_mb = 256  # megabytes written there, and taken away again
only: list[str] | None = None  # checks to run [all]
patience = 180.0  # seconds that one check may take before it counts as hung
json: str | None = None  # JSON file for the results
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(), None if __name__ == "__main__" else [], least={"disk_mb": 1, "patience": 1}
)
GB = 1e9
COLD_CLIP = 2 * 2.408e6  # bytes of a cached clip, latents and pixels, on a disk: docs/SCALE.md
CHECKPOINTS = 15 * GB  # best.pth, last.pth and the one being written, of a ViT-L, rounded up


def read(path):
    """The text of a file, empty where a sandbox or another system does not show it."""
    file = Path(path)
    return file.read_text(errors="replace") if file.exists() else ""


def gpu_wanted():
    """Whether training is to use a GPU, as far as can be told without waking it."""
    driver = "/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"  # the last is WSL's
    return device.startswith("cuda") or (device == "auto" and any(map(os.path.exists, driver)))


def write_video(target, encoder, frames):
    """Encodes RGB frames, each uint8 [64, 64, 3], as Matroska, into a file or a buffer."""
    import av

    with av.open(target, "w", format="matroska") as video:
        stream = video.add_stream(encoder, 12, width=64, height=64, pix_fmt="yuv420p")
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode(None))


# The checks, in the order they are made. Each returns its status and what it found; what it raises
# is a failure.


def check_packages():
    """What requirements.txt names can be imported and has the versions it names."""
    from packaging.requirements import Requirement  # comes with matplotlib

    problems = []  # a warning: the checks below tell what training does without
    for line in read(f"{HERE}/requirements.txt").splitlines():
        if line and not line.startswith("#"):
            package = Requirement(line)
            try:
                importlib.import_module(package.name.replace("scikit-learn", "sklearn"))
                version = importlib.metadata.version(package.name)
                if not package.specifier.contains(version, prereleases=True):
                    problems.append(f"{package.name} {version}, not {package.specifier}")
            except Exception as error:  # a broken wheel raises anything
                problems.append(f"{package.name} cannot be imported ({error})")
    found = "; ".join(problems) or "at the versions that requirements.txt names"
    return "warn" if problems else "ok", f"Python {sys.version.split()[0]}, {found}"


def check_extension():
    """The C++ and CUDA kernels are in use, and the loss kernel gives what plain torch gives."""
    import torch

    from salt import extension, ops

    places = ["cpu"]
    if device != "cpu" and torch.cuda.is_available():
        places.append("cuda" if device == "auto" else device)
    line = extension.describe(places[-1]).removeprefix("salt_ops: ")
    for where in places:
        prediction = torch.randn(2, 20, 64, device=where, requires_grad=True)  # [B, Kt, D]
        target = torch.randn(2, 40, 64, device=where)  # [B, N, D]
        index = torch.arange(0, 40, 2, device=where).repeat(2, 1)  # [B, Kt], every other target
        weighted_loss, loss = ops.weighted_mse(prediction, target, index)
        weighted_loss.backward()
        error = prediction.detach() - target[:, ::2]
        right = torch.allclose(loss, error.square().mean(), rtol=1e-4)
        if not right or not torch.allclose(prediction.grad, 2 * error / error.numel(), rtol=1e-4):
            return "FAIL", f"the loss kernel on {where} is not what plain torch gives"
    return "warn" if "plain PyTorch reference" in line else "ok", f"{line}; the loss is right"


def check_driver():
    """The driver's version, and the files that every CUDA program opens: can they be?"""
    if not gpu_wanted() or os.path.exists("/dev/dxg"):
        return "ok", "no NVIDIA device files are needed"
    gpus = sorted(glob.glob("/dev/nvidia[0-9]*")) or ["/dev/nvidia0"]
    problems = []
    for path in ("/dev/nvidiactl", "/dev/nvidia-uvm", *gpus):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    version = read("/proc/driver/nvidia/version").partition("\n")[0] or "driver not to be seen"
    found = "; ".join(problems) or f"the device files of {len(gpus)} GPUs can be opened"
    return "warn" if problems else "ok", f"{found}; {version}"


def check_cuda():
    """cuInit of the driver's own library, then torch's way to the GPU."""
    if device == "cpu":
        return "ok", "not asked for (--device cpu)"
    without = "warn" if device == "auto" else "FAIL"  # auto then takes the CPU
    try:
        code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError as error:
        return without, f"no GPU: the driver's library is not here ({error})"
    if code:
        return without, f"no GPU: cuInit gives {code}"
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # a CPU build; a driver that is too old
        return without, f"no GPU for torch {torch.__version__}: {error}"
    torch.cuda.set_device("cuda:0" if device in ("auto", "cuda") else device)
    free, total = torch.cuda.mem_get_info()
    found = f"{torch.cuda.get_device_name()}, {free / GB:.1f} of {total / GB:.1f} GB free"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "ok" if native else "warn", f"{found}; bfloat16 {'native' if native else 'emulated'}"


def check_nvml():
    """nvidia-smi's library, which NCCL between GPUs needs and one GPU does not."""
    try:
        code = ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2()
    except OSError as error:
        return "warn" if gpu_wanted() else "ok", f"not here ({error})"
    return "warn" if code and gpu_wanted() else "ok", f"nvmlInit_v2 gives {code}"


def check_sandbox():
    """What this process may do: with NoNewPrivs it cannot have the driver's files made."""
    status = dict(re.findall(r"^(NoNewPrivs|Seccomp):\s*(\d)", read("/proc/self/status"), re.M))
    found = ", ".join(f"{name} {value}" for name, value in status.items()) or "not to be seen"
    bound = status.get("NoNewPrivs") == "1" and not os.path.exists("/dev/nvidia-uvm")
    if bound and gpu_wanted():
        return "warn", f"{found}: /dev/nvidia-uvm is missing, nvidia-modprobe cannot make it here"
    if status.get("Seccomp") == "2":
        found += " (a filter of system calls: it may stop CUDA where NVML works)"
    return "ok", found


def check_codecs():
    """Grey frames, encoded here, come back through video.read_clip at the level they had."""
    import av
    import numpy as np

    from salt import video
    from salt.views import View

    av.logging.set_level(av.logging.PANIC)
    levels = np.arange(16) * 12 + 30  # a frame's level says which frame it is
    frames = [np.full((64, 64, 3), level, np.uint8) for level in levels]
    states = {}
    for codec in ("mpeg4", "libvpx-vp9", "libx264", "libx265", "libsvtav1"):
        file = io.BytesIO()
        try:
            write_video(file, codec, frames)
            file.seek(0)
            clip = video.read_clip(file, View(frames=16, size=32, short_side=32), "doctor")
            off = np.abs(clip.reshape(16, -1).mean(1) - levels).max()
            states[codec] = "right" if off < 5 else f"wrong by {off:.0f} grey levels"
        except (av.FFmpegError, ValueError) as error:  # no such encoder; read_clip's VideoError
            states[codec] = str(error)
    found = "; ".join(f"{codec} {state}" for codec, state in states.items())
    if "right" not in states.values() or "wrong" in found:
        return "FAIL", found
    return "ok" if set(states.values()) == {"right"} else "warn", found


def check_disk():
    """Room, and the rates at which a file is written, synced and read back the same."""
    folder = os.path.abspath(os.path.expanduser(out))
    free = shutil.disk_usage(folder).free
    block = os.urandom(10**6)  # no file system can compress it
    count = max(1, min(disk_mb, free // 4 // len(block)))
    with tempfile.TemporaryFile(dir=folder) as file:  # it has no name that could be left
        start = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = count / (time.perf_counter() - start)  # MB/s
        if sys.platform == "linux":  # read from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        if any(file.read(len(block)) != block for _ in range(count)):
            return "FAIL", f"what was written to {folder} did not come back the same"
        back = count / (time.perf_counter() - start)  # MB/s
    clips = back * 1e6 / COLD_CLIP  # a second
    wanted = 240 if gpu_wanted() else 2  # clips/s that one GPU is to train on; a CPU, generously
    found = (
        f"{folder}: {free / GB:.1f} GB free (a run of ViT-L keeps {CHECKPOINTS / GB:.0f}), written"
        f" at {written:.0f} MB/s, read at {back:.0f}: {clips:.0f} clips/s of {wanted} wanted"
    )
    return "warn" if free < CHECKPOINTS or clips < wanted else "ok", found


def check_shm():
    """Semaphores, for torch.compile's workers, and room in /dev/shm, for NCCL between GPUs."""
    try:
        multiprocessing.Semaphore()
        size = shutil.disk_usage("/dev/shm").total
    except (ImportError, OSError) as error:
        return "warn", f"no semaphores or no shared memory ({error})"
    found = f"/dev/shm holds {size / GB:.2f} GB; semaphores can be made"
    return "warn" if size < GB and len(glob.glob("/dev/nvidia[0-9]*")) > 1 else "ok", found


def check_training():
    """Two steps of train.py with a small model, on videos made here."""
    import numpy as np

    flags = (
        "--target pixels --masks ratio --data videos --frames 4 --resolution 48 --size tiny"
        " --depth 1 --predictor_depth 1 --predictor_dim 32 --predictor_heads 2 --batch_size 2"
        f" --max_steps 5 --log_every 1 --threads 2 --device {device}"
    )
    script = f"{HERE}/train.py"
    # what the environment says to the user's own runs is not meant for this one
    theirs = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    theirs |= {name.upper() for name in config.read_settings(script)}
    environ = {name: value for name, value in os.environ.items() if name not in theirs}
    random = np.random.default_rng(0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=os.path.expanduser(out), prefix=".doctor-") as folder:
        for name in ("train/0", "train/1", "train/2", "train/3", "validation/4"):
            path = f"{folder}/videos/{name}.mkv"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            frames = random.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
            write_video(path, "mpeg4", list(frames))  # FFmpeg's own: every build has it
        command = [sys.executable, script, *flags.split()]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return "FAIL", f"exit code {done.returncode}: {last}"
    return "ok", f"two steps of a small model on video: {time.perf_counter() - start:.0f} s"


CHECKS = {name[6:]: check for name, check in [*globals().items()] if name.startswith("check_")}
CHILD = "SALT_DOCTOR_CHECK"  # in the environment of a process that makes one check: its name


def answer(name):
    """Makes a check; the last line printed, [status, found], is for the doctor that waits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stopped, it takes its files away
    try:
        result = CHECKS[name]()
    except Exception as error:
        result = "FAIL", f"{type(error).__name__}: {error}"
    print("\n" + dumps(result), flush=True)
    os._exit(0)  # a driver that hangs on the way out has nothing to add


def ask(name):
    """(status, found) of a check, made by a process with the same flags; never hangs or raises."""
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), *sys.argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {CHILD: name},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return "FAIL", f"no answer in {patience:g} s"
    finally:
        if process.poll() is None:  # what cannot be killed is not waited for
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(2)
                os.killpg(process.pid, signal.SIGKILL)
    last = said.strip().rpartition("\n")[2]
    if process.returncode == 0:
        return loads(last)
    died = f" of {signal.Signals(-process.returncode).name}" if process.returncode < 0 else ""
    return "FAIL", f"died{died}: {last}"


if __name__ == "__main__":
    if CHILD in os.environ:
        answer(os.environ[CHILD])
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device is {device!r}; it takes auto, cpu, cuda or cuda:1")
    for name in only or ():
        if name not in CHECKS:
            raise InputError(f"--only {name!r} is not in {[*CHECKS]}{nearest(name, CHECKS)}")
    if json:
        prepare_file(json, "--json")  # says now, not after the checks, that it cannot be written
    results = []
    for name in only or CHECKS:
        status, found = ask(name)
        found = " ".join(found.split())[:400]  # one line, whatever an error says
        advice = [] if status == "ok" else [f"docs/TROUBLESHOOTING.md, {name}"]
        results.append({"name": name, "status": status, "found": found, "advice": advice})
        print(f"{name:9}  {status:4}  {' -> '.join([found, *advice])}", flush=True)
    failed = [result["name"] for result in results if result["status"] == "FAIL"]
    verdict = "nothing found that would stop training"
    if failed:
        verdict = f"training would not run here: {', '.join(failed)}"
    print(f"\n{'FAIL' if failed else 'ok'}: {verdict}")
    if json:
        code = int(bool(failed))
        report = {"verdict": verdict, "code": code, "checks": results, "config": settings}
        write_whole(json, dumps(report, indent=1).encode())
    sys.exit(bool(failed))
