"""The doctor on this machine as it is, with things broken on purpose, and on systems made up."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import doctor

ROOT = Path(doctor.__file__).resolve().parent.parent
SCRIPT = str(ROOT / "tools" / "doctor.py")


def run(folder, *flags, code=0, environ=None, **others):
    """({check: (status, what it says)}, the last line) of a run of doctor.py in `folder`."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
        **others,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        name, status = line[:11].strip(), line[11:15].strip()
        if status in ("ok", "warn", "FAIL") and name in doctor.CHECKS:
            found[name] = status, line[17:]
    return found, (done.stdout.splitlines() or done.stderr.splitlines())[-1]


def sitecustomize(folder, code):
    """The environment in which every Python process runs `code` first."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder / "site")}


def test_all_is_well_here_whatever_the_environment_says_to_train(tmp_path):
    environ = {"RESUME": "auto", "BATCH_SIZE": "1000", "WORLD_SIZE": "4"}
    flags = ("--device", "cpu", "--disk_mb", "20", "--json", "found.json")
    found, verdict = run(tmp_path, *flags, environ=environ)
    names = "packages extension driver cuda nvml sandbox codecs disk shm training"
    assert list(found) == list(doctor.CHECKS) == names.split()
    assert "FAIL" not in [status for status, _ in found.values()]
    assert verdict == "ok: nothing found that would stop training"
    assert "libvpx-vp9 right" in found["codecs"][1]
    assert "clips/s" in found["disk"][1]
    assert "two steps" in found["training"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["code"] == 0
    assert [check["name"] for check in saved["checks"]] == list(found)
    assert set(saved["checks"][0]) == {"name", "status", "found", "advice"}
    assert saved["config"]["disk_mb"] == 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_gpu_that_cannot_be_used_fails_only_where_it_was_asked_for(tmp_path):
    found, verdict = run(tmp_path, "--only", "cuda", "--device", "cuda", code=1)
    assert found["cuda"][0] == "FAIL"
    assert found["cuda"][1].endswith("-> docs/TROUBLESHOOTING.md, cuda")
    assert verdict == "FAIL: training would not run here: cuda"
    found, _ = run(tmp_path, "--only", "cuda")
    assert found["cuda"][0] == "warn"


def test_without_the_extension_and_semaphores_it_warns(tmp_path):
    code = (
        "import _multiprocessing\n"
        "def refused(*arguments, **others): raise OSError(38, 'refused here')\n"
        "_multiprocessing.SemLock = type('S', (), {'SEM_VALUE_MAX': 1, '__new__': refused})\n"
    )
    environ = {"SALT_OPS": "reference", **sitecustomize(tmp_path, code)}
    flags = ("--only", "extension,shm,training", "--device", "cpu")
    found, _ = run(tmp_path, *flags, environ=environ)
    assert found["extension"][0] == "warn" and "SALT_OPS=reference" in found["extension"][1]
    assert found["shm"][0] == "warn" and "refused here" in found["shm"][1]
    assert found["training"][0] == "ok"


def test_a_wrong_kernel_is_found(tmp_path):
    code = (
        "from salt import ops\n"
        "right = ops.weighted_mse\n"
        "def wrong(*arguments):\n"
        "    weighted, loss = right(*arguments)\n"
        "    return weighted * 1.01, loss\n"
        "ops.weighted_mse = wrong\n"
    )
    environ = sitecustomize(tmp_path, code)
    environ["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    flags = ("--only", "extension", "--device", "cpu")
    found, _ = run(tmp_path, *flags, environ=environ, code=1)
    assert found["extension"][0] == "FAIL"
    assert "the loss kernel on cpu is not what plain torch gives" in found["extension"][1]


def test_without_av_it_fails(tmp_path):
    environ = sitecustomize(tmp_path, "import sys\nsys.modules['av'] = None\n")
    flags = ("--only", "packages,codecs,training", "--device", "cpu")
    found, _ = run(tmp_path, *flags, environ=environ, code=1)
    assert [found[name][0] for name in found] == ["warn", "FAIL", "FAIL"]
    assert "av cannot be imported" in found["packages"][1]


def test_another_version_than_the_one_named_is_a_warning(monkeypatch):
    versions = {"numpy": "1.9", "torch": "2.13.0+cu130", "av": "18.0"}
    monkeypatch.setattr(
        doctor, "read", lambda path: "# why\ntorch==2.13.0\nnumpy>=2.1,<3\nav>=18\n"
    )
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.get)
    status, found = doctor.check_packages()
    assert status == "warn"
    assert found.endswith(", numpy 1.9, not <3,>=2.1")


@pytest.mark.parametrize("folder", ["absent", "/proc"])
def test_a_folder_that_cannot_be_written(tmp_path, folder):
    flags = ("--only", "disk,training", "--device", "cpu", "--out", folder)
    found, verdict = run(tmp_path, *flags, code=1)
    assert folder in found["disk"][1] and folder in found["training"][1]
    assert verdict == "FAIL: training would not run here: disk, training"


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))

    flags = ("--only", "disk", "--disk_mb", "20")
    found, _ = run(tmp_path, *flags, code=1, preexec_fn=limit)
    assert found["disk"][0] == "FAIL" and "File too large" in found["disk"][1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "disc"], "did you mean disk?"),
        (["--device", "gpu"], "takes auto, cpu, cuda"),
        (["--disk_mb", "0"], "at least 1"),
        (["--json", "."], "is a folder"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, flags, words):
    _, line = run(tmp_path, *flags, code=1)
    assert line.startswith("doctor.py: error: ") and words in line
    assert not list(tmp_path.iterdir())


# ---- children that hang or die


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import time; time.sleep(600)", "no answer in 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("raise SystemExit('nothing here')", "died: SystemExit: nothing here"),
    ],
)
def test_a_check_that_hangs_or_dies_is_a_line(tmp_path, code, reason):
    guarded = f"import os\nif '{doctor.CHILD}' in os.environ:\n    {code}\n"
    flags = ("--only", "sandbox,nvml", "--device", "cpu", "--patience", "1")
    found, _ = run(tmp_path, *flags, environ=sitecustomize(tmp_path, guarded), code=1)
    assert [status for status, _ in found.values()] == ["FAIL", "FAIL"]
    assert reason in found["sandbox"][1]


def test_an_interrupted_training_leaves_nothing(tmp_path):
    flags = ("--only", "training", "--device", "cpu", "--patience", "5")
    code = "import os, sys, time\nif sys.argv[0].endswith('train.py'): time.sleep(600)\n"
    (tmp_path / "out").mkdir()
    environ = sitecustomize(tmp_path, code)
    found, _ = run(tmp_path, *flags, "--out", "out", environ=environ, code=1)
    assert "no answer in 5 s" in found["training"][1]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="makes libraries that stand in for the driver's",
)
@pytest.mark.parametrize(
    "name, source, check, reason",
    [
        ("libcuda.so.1", "int cuInit(unsigned f) { return 304; }", "cuda", "cuInit gives 304"),
        (
            "libcuda.so.1",
            "#include <unistd.h>\nint cuInit(unsigned f) { for (;;) pause(); }",
            "cuda",
            "no answer in 5 s",
        ),
        (
            "libcuda.so.1",
            "#include <stdlib.h>\nint cuInit(unsigned f) { abort(); }",
            "cuda",
            "died of SIGABRT",
        ),
        ("libnvidia-ml.so.1", "int nvmlInit_v2(void) { return 18; }", "nvml", "gives 18"),
    ],
)
def test_the_drivers_libraries_are_asked(tmp_path, name, source, check, reason):
    (tmp_path / "code.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / "code.c"]
    subprocess.run(command, check=True)
    flags = ("--only", check, "--device", "cuda", "--patience", "5")
    failed = check == "cuda"  # training can do without NVML
    found, _ = run(tmp_path, *flags, code=failed, environ={"LD_LIBRARY_PATH": str(tmp_path)})
    assert found[check][0] == ("FAIL" if failed else "warn")
    assert reason in found[check][1]


# ---- systems made up


def exists_only(monkeypatch, *paths):
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path in paths)


@pytest.mark.parametrize(
    "privileges, seccomp, there, status, words",
    [
        (0, 0, [], "ok", "NoNewPrivs 0, Seccomp 0"),
        (1, 0, [], "warn", "/dev/nvidia-uvm is missing"),
        (1, 0, ["/dev/nvidia-uvm"], "ok", "NoNewPrivs 1"),
        (0, 2, [], "ok", "a filter of system calls"),
    ],
)
def test_what_a_sandbox_means(monkeypatch, privileges, seccomp, there, status, words):
    text = f"Name:\tpython\nNoNewPrivs:\t{privileges}\nSeccomp:\t{seccomp}\nSeccomp_filters:\t3\n"
    monkeypatch.setattr(doctor, "device", "cuda")
    monkeypatch.setattr(doctor, "read", lambda path: text)
    exists_only(monkeypatch, *there)
    result = doctor.check_sandbox()
    assert result[0] == status and words in result[1]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_no_new_privileges_are_seen(tmp_path):
    def give_up_privileges():
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS

    found, _ = run(tmp_path, "--only", "sandbox", preexec_fn=give_up_privileges)
    assert "NoNewPrivs 1" in found["sandbox"][1]


def test_device_files_are_opened(monkeypatch):
    def refuse(path, flags):
        if path == "/dev/nvidia-uvm":
            raise PermissionError(1, "Operation not permitted")
        return os.dup(0)

    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.146.02  Sun Dec  3"
    monkeypatch.setattr(doctor, "device", "cuda")
    monkeypatch.setattr(doctor, "read", lambda path: f"{version}\nGCC version: 11.4\n")
    monkeypatch.setattr(doctor.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    exists_only(monkeypatch)
    monkeypatch.setattr(doctor.os, "open", lambda path, flags: os.dup(0))
    assert doctor.check_driver() == ("ok", f"the device files of 2 GPUs can be opened; {version}")
    monkeypatch.setattr(doctor.os, "open", refuse)
    refused = f"/dev/nvidia-uvm: Operation not permitted; {version}"
    assert doctor.check_driver() == ("warn", refused)


@pytest.mark.parametrize(
    "device, there, wanted",
    [
        ("auto", [], False),
        ("auto", ["/dev/nvidiactl"], True),
        ("auto", ["/dev/dxg"], True),
        ("cpu", ["/dev/nvidiactl"], False),
        ("cuda:1", [], True),
    ],
)
def test_when_a_gpu_is_wanted(monkeypatch, device, there, wanted):
    monkeypatch.setattr(doctor, "device", device)
    exists_only(monkeypatch, *there)
    assert doctor.gpu_wanted() == wanted


def test_every_check_has_its_section():
    text = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    names = [name for title in titles for name in title.partition(":")[0].split(", ")]
    assert [name for name in names if name in doctor.CHECKS] == list(doctor.CHECKS)  # in its order
