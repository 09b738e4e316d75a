"""The doctor on this machine as it is and with things broken on purpose, and what it reads against
texts made by hand.
"""

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import doctor
import ops

ROOT = Path(doctor.__file__).resolve().parent


def run(folder, *flags, code=0, environ=None, **others):
    """({check: (status, what it says and the indented lines under it)}, the last line) of a run of
    doctor.py in `folder`.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / "doctor.py"), *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
        **others,
    )
    assert done.returncode == code and "Traceback" not in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
    found, name = {}, None
    for line in done.stdout.splitlines():
        if line.startswith(" " * 18):
            status, text = found[name]
            found[name] = status, text + "\n" + line.strip()
        elif line[12:16].strip() in ("ok", "warn", "FAIL"):
            name = line[:12].strip()
            found[name] = line[12:16].strip(), line[18:]
    return found, (done.stdout.splitlines() or done.stderr.splitlines())[-1]


def sitecustomize(folder, code):
    """The environment in which every Python process runs `code` first."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder / "site")}


def test_all_is_well_here_whatever_the_environment_says_to_train(tmp_path):
    found, verdict = run(
        tmp_path,
        "--device",
        "cpu",
        "--disk_mb",
        "20",
        "--json",
        "found.json",
        environ={"RESUME": "auto", "BATCH_SIZE": "1000", "WORLD_SIZE": "4"},
    )
    assert (
        list(found)
        == list(doctor.CHECKS)
        == [
            "python",
            "packages",
            "torch",
            "cpu",
            "memory",
            "limits",
            "extension",
            "driver",
            "cuda",
            "nvml",
            "sandbox",
            "codecs",
            "disk",
            "shm",
            "semaphores",
            "ranks",
            "training",
        ]
    )
    assert not [
        name for name, (status, _) in found.items() if status == "FAIL"
    ] and verdict.startswith("ok: training would run here, on the CPU")
    assert (
        torch.__version__ in found["torch"][1]
        and "vp9" in found["codecs"][1].partition("encoded, read by data.read_clip and right")[0]
    )
    assert "MB written" in found["disk"][1] and "both checkpoints" in found["training"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    saved = json.loads((tmp_path / "found.json").read_text())
    assert (
        saved["code"] == 0
        and [check["name"] for check in saved["checks"]] == list(found)
        and saved["config"]["disk_mb"] == 20
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_it_names_the_link_that_is_broken(tmp_path):
    found, verdict = run(tmp_path, "--only", "driver,cuda", "--device", "cuda", code=1)
    link = "is a CPU build" if torch.version.cuda is None else ""
    assert (
        found["cuda"][0] == "FAIL"
        and link in found["cuda"][1]
        and "\n" in found["cuda"][1]
        and verdict.startswith("FAIL: training would not run here: cuda")
    )
    found, _ = run(tmp_path, "--only", "cuda")
    assert found["cuda"][0] == "warn" and "training would run on the CPU" in found["cuda"][1]


def test_without_the_extension_and_semaphores_it_warns(tmp_path):
    refuse = (
        "import _multiprocessing\ndef refused(*arguments, **others): raise OSError(38, 'refused"
        " here')\n_multiprocessing.SemLock = type('SemLock', (), {'SEM_VALUE_MAX': 1, '__new__':"
        " refused})\n"
    )
    found, verdict = run(
        tmp_path,
        "--only",
        "extension,semaphores,training",
        "--device",
        "cpu",
        environ={"SALT_OPS": "reference", **sitecustomize(tmp_path, refuse)},
    )
    assert found["extension"][0] == "warn" and "reference" in found["extension"][1]
    assert (
        found["semaphores"][0] == "warn"
        and "refused here" in found["semaphores"][1]
        and "TORCHINDUCTOR_COMPILE_THREADS=1" in found["semaphores"][1]
    )
    assert found["training"][0] == "ok" and "2 warnings: extension, semaphores" in verdict


def test_a_wrong_kernel_is_found(tmp_path):
    wrong = (
        "import sys\nclass Loader:\n    def find_spec(self, name, path=None, target=None):\n       "
        " if name == 'salt_ops': raise ImportError('broken on purpose')\nsys.meta_path.insert(0,"
        " Loader())\n"
    )
    found, _ = run(
        tmp_path, "--only", "extension", "--device", "cpu", environ=sitecustomize(tmp_path, wrong)
    )
    assert (
        found["extension"][0] == "warn"
        and "broken on purpose" in found["extension"][1]
        and "python setup.py build_ext" in found["extension"][1]
    )
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import torch.nn.functional as F\nbefore = F.mse_loss\nF.mse_loss = lambda *a, **b:"
        " before(*a, **b) * 1.01\n"
    )
    if "salt_ops" in sys.modules:  # the reference, made wrong, is what the kernel is compared with
        found, _ = run(
            tmp_path,
            "--only",
            "extension",
            "--device",
            "cpu",
            environ={"PYTHONPATH": str(tmp_path / "site")},
            code=1,
        )
        assert (
            found["extension"][0] == "FAIL"
            and "not what its plain reference gives" in found["extension"][1]
        )


def test_without_av_it_fails(tmp_path):
    found, verdict = run(
        tmp_path,
        "--only",
        "packages,codecs,training",
        "--device",
        "cpu",
        code=1,
        environ=sitecustomize(tmp_path, "import sys\nsys.modules['av'] = None\n"),
    )
    assert {name: status for name, (status, _) in found.items()} == dict.fromkeys(
        ("packages", "codecs", "training"), "FAIL"
    )
    assert (
        "av 1" in found["packages"][1]
        and "cannot be imported" in found["packages"][1]
        and verdict.startswith("FAIL")
    )


@pytest.mark.parametrize("folder, reason", [("absent", "No such file"), ("/proc", "")])
def test_a_folder_that_cannot_be_written(tmp_path, folder, reason):
    found, verdict = run(
        tmp_path, "--only", "disk,training", "--device", "cpu", "--out", folder, code=1
    )
    assert (
        found["disk"][0] == "FAIL"
        and folder in found["disk"][1]
        and reason in found["disk"][1]
        and verdict == "FAIL: training would not run here: disk, training"
    )
    assert (
        found["training"][0] == "FAIL"
        and folder in found["training"][1]
        and found["training"][1].endswith("; see disk")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_folder_without_the_right_to_write(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)

    # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root itself then needs rights; others have none to drop
    def powerless():
        return ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)

    found, _ = run(
        tmp_path,
        "--only",
        "disk,training",
        "--device",
        "cpu",
        "--out",
        "closed",
        code=1,
        preexec_fn=powerless,
    )
    assert (
        all(
            found[name][0] == "FAIL" and "ermission denied" in found[name][1]
            for name in ("disk", "training")
        )
        and "see disk" in found["training"][1]
        and not list((tmp_path / "closed").iterdir())
    )


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path):
    import resource

    found, _ = run(
        tmp_path,
        "--only",
        "limits,disk",
        "--device",
        "cpu",
        "--disk_mb",
        "20",
        code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7)),
    )
    assert found["limits"][0] == "warn" and "file size 0.01 GB" in found["limits"][1]
    assert (
        found["disk"][0] == "FAIL"
        and "File too large" in found["disk"][1]
        and not list(tmp_path.iterdir())
    )


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_no_new_privileges_are_seen(tmp_path):
    # PR_SET_NO_NEW_PRIVS
    found, _ = run(
        tmp_path,
        "--only",
        "sandbox",
        "--device",
        "cpu",
        preexec_fn=lambda: ctypes.CDLL(None).prctl(38, 1, 0, 0, 0),
    )
    assert (
        "NoNewPrivs 1" in found["sandbox"][1] and "nvidia-modprobe -u -c 0" in found["sandbox"][1]
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "disc"], "did you mean disk?"),
        (["--device", "gpu"], "takes auto, cpu, cuda"),
        (["--disk_mb", "0"], "at least 1"),
        (
            ["--only", "python", "--json", "absent/found.json"],
            "--json absent/found.json cannot be written",
        ),
        (["--json", "."], "--json . cannot be written"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, flags, words):
    _, line = run(tmp_path, *flags, code=1)
    assert line.startswith("doctor.py: error: ") and words in line and not list(tmp_path.iterdir())


def test_results_that_cannot_be_written_leave_the_older_ones(tmp_path):
    import resource

    (tmp_path / "found.json").write_text("older")

    def no_file_grows():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    done = subprocess.run(
        [sys.executable, str(ROOT / "doctor.py"), "--only", "python", "--json", "found.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=no_file_grows,
    )
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "doctor.py: error: --json found.json could not be written (File too large)"
    ]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


def test_a_reader_that_leaves_ends_it_quietly(tmp_path):
    doctor_process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "doctor.py"),
            "--only",
            "python,limits,python",
            "--device",
            "cpu",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    doctor_process.stdout.close()
    assert doctor_process.wait() != 0 and doctor_process.stderr.read() == ""


# ---- children that hang or die, and checks that go wrong


def test_a_child_that_hangs_or_dies_is_a_reason(monkeypatch):
    for code in (
        "import time; time.sleep(600)",
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
    ):
        with pytest.raises(doctor.Trouble, match="no answer in 0.5 s"):
            doctor.run_limited([sys.executable, "-c", code], 0.5)
    monkeypatch.setattr(doctor, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(doctor.Trouble, match="died of SIGSEGV"):
        doctor.in_child(doctor.torch_works)
    monkeypatch.setattr(doctor, "CHILD", "raise SystemExit('nothing here')")
    with pytest.raises(doctor.Trouble, match="nothing here"):
        doctor.in_child(doctor.torch_works)


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="makes libraries that stand in for the driver's",
)
def test_the_drivers_libraries_are_asked_and_may_hang(tmp_path, monkeypatch):
    def library(name, code):
        (tmp_path / "code.c").write_text(code)
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / "code.c"], check=True
        )

    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    words = (
        'int cuGetErrorName(int e, const char** s) { *s = "CUDA_ERROR_OPERATING_SYSTEM"; return 0;'
        ' } int cuGetErrorString(int e, const char** s) { *s = "OS call failed"; return 0; }'
    )
    library("libcuda.so.1", f"{words} int cuInit(unsigned f) {{ return 304; }}")
    assert doctor.in_child(doctor.cuda_init) == {
        "code": 304,
        "name": "CUDA_ERROR_OPERATING_SYSTEM",
        "text": "OS call failed",
        "count": 0,
    }
    library(
        "libcuda.so.1",
        f"{words} int cuInit(unsigned f) {{ return 0; }} int cuDeviceGetCount(int* n) {{ *n = 3;"
        " return 0; }",
    )
    assert doctor.in_child(doctor.cuda_init)["count"] == 3
    library("libcuda.so.1", "#include <unistd.h>\nint cuInit(unsigned f) { for (;;) pause(); }")
    with pytest.raises(doctor.Trouble, match="no answer in 1 s"):
        doctor.in_child(doctor.cuda_init, seconds=1)
    library(
        "libnvidia-ml.so.1",
        "int nvmlInit_v2(void) { return 18; } const char* nvmlErrorString(int e) { return"
        ' "Driver/library version mismatch"; }',
    )
    assert doctor.in_child(doctor.nvml_init) == {
        "code": 18,
        "text": "Driver/library version mismatch",
        "count": 0,
    }


def test_every_check_has_its_section():
    titles = [
        line.removeprefix("## ")
        for line in (ROOT / "docs" / "TROUBLESHOOTING.md").read_text().splitlines()
        if line.startswith("## ")
    ]
    named = [
        name
        for title in titles
        for name in title.partition(":")[0].split(", ")
        if name in doctor.CHECKS
    ]
    assert named == list(doctor.CHECKS)  # in its order


def test_a_check_that_goes_wrong_is_a_failure_with_its_reason(monkeypatch):
    def crash():
        return {}["absent"]

    monkeypatch.setitem(doctor.CHECKS, "disk", crash)
    entry = doctor.diagnose("disk")
    assert entry["status"] == "FAIL" and "KeyError: 'absent'" in entry["found"]


# ---- the chain from torch down to the GPU

WORKING = {
    "pci": 1,
    "module": True,
    "driver": "580.65.06",
    "majors": {"nvidia": 195, "nvidia-uvm": 511},
    "wsl": False,
    "visible": None,
    "torch": "2.13.0",
    "cuda": "13.0",
    "nodes": {
        "/dev/nvidiactl": [None, 195],
        "/dev/nvidia-uvm": [None, 511],
        "/dev/nvidia0": [None, 195],
    },
    "init": {"code": 0, "name": "CUDA_SUCCESS", "text": "no error", "count": 1},
    "count": 0,
    "said": "libcudnn is missing",
}


def node(path, code, major=195):
    return {"nodes": {**WORKING["nodes"], path: [code, major]}}


def init(code, name):
    return {"init": {"code": code, "name": name, "text": "", "count": 0}}


@pytest.mark.parametrize(
    "broken, link, advice",
    [
        (
            {"cuda": None, "torch": "2.13.0+cpu"},
            "2.13.0+cpu is a CPU build; 1 on the PCI bus",
            "CUDA build",
        ),
        (
            {"pci": 0, "driver": None, "module": False},
            "no NVIDIA GPU on the PCI bus",
            "lspci -d 10de:",
        ),
        (
            {"driver": None, "module": False},
            "kernel module nvidia is not loaded",
            "modprobe nvidia",
        ),
        (
            {"driver": "570.133.20"},
            "570.133.20 is too old for CUDA 13.0, which needs 580",
            "update the driver",
        ),
        ({"driver": "520.61.05", "cuda": "12.8"}, "which needs 525", "update the driver"),
        (
            node("/dev/nvidiactl", errno.ENOENT, None),
            "/dev/nvidiactl is missing",
            "nvidia-modprobe -u -c 0",
        ),
        (node("/dev/nvidia-uvm", errno.ENOENT, None), "/dev/nvidia-uvm is missing", "--gpus all"),
        (
            node("/dev/nvidia-uvm", None, 507),
            "has major number 507, the driver has 511",
            "rm /dev/nvidia-uvm",
        ),
        (
            node("/dev/nvidia0", errno.EPERM),
            "/dev/nvidia0 cannot be opened (EPERM",
            "control group",
        ),
        (node("/dev/nvidia0", errno.EACCES), "/dev/nvidia0 cannot be opened (EACCES", "usermod"),
        (node("/dev/nvidia0", errno.ENXIO), "/dev/nvidia0 cannot be opened (ENXIO", "dmesg"),
        ({"nodes": "no answer in 60 s"}, "no answer in 60 s", "reboot"),
        ({"visible": ""}, "CUDA_VISIBLE_DEVICES is ''", "unset"),
        (
            {"init": "OSError: libcuda.so.1: cannot open shared object file"},
            "cannot open shared object file",
            "Container Toolkit",
        ),
        ({"init": "died of SIGSEGV (it said nothing)"}, "SIGSEGV", "dmesg"),
        (
            init(304, "CUDA_ERROR_OPERATING_SYSTEM"),
            "304 CUDA_ERROR_OPERATING_SYSTEM",
            "memfd_create",
        ),
        (init(802, "CUDA_ERROR_SYSTEM_NOT_READY"), "802", "fabricmanager"),
        (init(803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"), "803", "reboot"),
        (
            {"visible": "7", **init(100, "CUDA_ERROR_NO_DEVICE")},
            "CUDA_VISIBLE_DEVICES is '7'",
            "no GPU",
        ),
        (init(12345, "?"), "12345", "cuda.h"),
        ({"init": {**WORKING["init"], "count": 0}}, "counts no GPU", "MIG"),
        ({}, "torch cannot use them: libcudnn is missing", "reinstall"),
        # a sandbox that hides /sys and /proc/modules
        (
            {"driver": None, "module": None, "pci": None, **init(999, "CUDA_ERROR_UNKNOWN")},
            "999",
            "nvidia-uvm",
        ),
        ({"driver": "520.61.05", "cuda": "11.8", "said": "x"}, "torch cannot use them: x", ""),
        (
            {
                "wsl": True,
                "pci": 0,
                "driver": None,
                "module": False,
                "nodes": {"/dev/nvidiactl": [errno.ENOENT, None]},
                **init(100, "CUDA_ERROR_NO_DEVICE"),
            },
            "cuInit gives 100",
            "",
        ),
    ],
)
def test_the_first_broken_link_is_named(broken, link, advice):
    found = doctor.broken_link({**WORKING, **broken})
    assert link in found[0] and advice in found[1]


# ---- texts


def test_driver_versions():
    assert (
        doctor.driver_version(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.146.02  Sun Dec  3 14:42:23 UTC"
            " 2023\nGCC version:  gcc version 11.4.0\n"
        )
        == "535.146.02"
    )
    assert (
        doctor.driver_version(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build "
            " (dvs-builder@U22)  Sun Jul 27\n"
        )
        == "580.65.06"
    )
    assert doctor.driver_version(None) is None and doctor.driver_version("gibberish") is None


def test_architectures_of_torch():
    names = doctor.dotted(["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])
    assert names == "7.5;8.0;9.0a;12.0;12.0+PTX"
    assert [
        ops.covers(names, capability)
        for capability in ((7, 0), (7, 5), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
    ] == [False, True, True, True, False, True, True]


def test_major_numbers_are_those_of_character_devices():
    assert doctor.character_majors(
        "Character devices:\n  1 mem\n195 nvidia-frontend\n511 nvidia-uvm\n\nBlock devices:\n  7"
        " loop\n254 virtblk\n"
    ) == {"mem": 1, "nvidia-frontend": 195, "nvidia-uvm": 511}


@pytest.mark.parametrize(
    "version, wanted, fits",
    [
        ("2.13.0+cu130", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("2.13", "==2.13.0", True),
        ("18.1.0", ">=18,<19", True),
        ("19.0", ">=18,<19", False),
        ("2.0.2", ">=2.1,<3", False),
        ("10.2", ">=9.9", True),
        ("0.8.1", ">=0.8,<0.9", True),
        ("2.13.0rc1", "<2.13", False),
    ],
)
def test_versions_against_pins(version, wanted, fits):
    ((_, pins),) = doctor.requirements(f"# a comment\n-r other.txt\nname{wanted}  # why\n")
    assert doctor.satisfies(version, pins) == fits


def test_the_projects_requirements_are_read():
    names = [name for name, _ in doctor.requirements((ROOT / "requirements.txt").read_text())]
    assert set(doctor.NEEDED_TO_TRAIN) <= set(names) and len(names) == sum(
        1
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith(("#", "-"))
    )


STATUS = "Name:\tpython\nCapEff:\t{}\nNoNewPrivs:\t{}\nSeccomp:\t{}\nSeccomp_filters:\t{}\n"


@pytest.mark.parametrize(
    "values, words, absent",
    [
        (
            ("000001ffffffffff", 0, 0, 0),
            [
                "NoNewPrivs 0",
                "Seccomp 0 (none)",
                "SYS_MODULE, SYS_ADMIN, MKNOD",
                "no system call is filtered",
            ],
            ["seccomp=unconfined"],
        ),
        (
            ("00000000a80425fb", 0, 2, 1),
            ["Seccomp 2 (filter), 1 filters", "capabilities MKNOD", "seccomp=unconfined", "304"],
            ["SYS_ADMIN", "NoNewPrivs 1"],
        ),
        (
            ("0000000000000000", 1, 2, 3),
            [
                "NoNewPrivs 1",
                "3 filters",
                "nvidia-modprobe -u -c 0",
                "stops neither CUDA nor NVML",
                "none of",
            ],
            ["unless this process"],
        ),
        (
            ("0000000008000000", 1, 0, 0),
            ["unless this process may do so itself"],
            ["seccomp=unconfined"],
        ),
        (("0000000000000000", 0, 1, 0), ["Seccomp 1 (strict)"], []),
    ],
)
def test_what_a_sandbox_means(values, words, absent):
    found, meaning = doctor.sandbox(STATUS.format(*values))
    text = "\n".join([found, *meaning])
    assert all(word in text for word in words) and not any(word in text for word in absent)
    assert len(meaning) == 2


def test_an_old_kernel_says_nothing_of_privileges():
    found, meaning = doctor.sandbox("Name:\tpython\nCapEff:\t0\n")
    assert "NoNewPrivs unknown, Seccomp unknown" in found and meaning == []


def test_limits_of_control_groups(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("8000000000\n")
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert (
        doctor.cpu_quota("0::/a/b\n", tmp_path) == 2.5
        and doctor.memory_limit("0::/a/b\n", tmp_path) == 8_000_000_000
    )
    assert (
        doctor.cpu_quota("0::/\n", tmp_path) is None
        and doctor.memory_limit("0::/elsewhere\n", tmp_path) is None
    )
    for controller, name, value in (
        ("cpu", "cpu.cfs_quota_us", -1),
        ("cpu/x", "cpu.cfs_quota_us", 150000),
        ("cpu/x", "cpu.cfs_period_us", 100000),
        ("memory/x", "memory.limit_in_bytes", 9223372036854771712),
        ("memory", "memory.limit_in_bytes", 4_000_000_000),
    ):
        (tmp_path / "old" / controller).mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / controller / name).write_text(f"{value}\n")
    old = "9:name=systemd:/\n4:memory:/x\n1:cpu,cpuacct:/x\n0::/\n"
    assert (
        doctor.cpu_quota(old, tmp_path / "old") == 1.5
        and doctor.memory_limit(old, tmp_path / "old") == 4_000_000_000
    )
