"""A full disk, a folder that cannot be written to, no /dev/shm, no semaphores, and the probe's
memory.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from salt.checkpoint import load_checkpoint
from tests.faults.harness import FULL, command, count, one_line, record, run, same, watched
from tests.stages import REFUSE, SMALL, run_folder

NAMESPACE = ["unshare", "--mount", "--propagation", "private"]
CAN_MOUNT = (
    bool(shutil.which("unshare"))
    and subprocess.run(
        [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode
    == 0
)
mounting = pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace of its own (root)")
TMPFS = """set -eu
mkdir -p disk; mount -t tmpfs -o size={size} none disk; export {environ}
code=0; {command} > said 2>&1 || code=$?
ls -A disk/* > left; mount -o remount,size=200m disk
{again} > again 2>&1
cp -r disk/. kept; echo $code
"""


def on_a_small_disk(folder, size, words, again):
    """Run a command with `disk/` a tmpfs of `size`, then `again` with room: (exit code, what it
    printed, what was left, what the second one printed).
    """

    def quote(words):
        return " ".join(f"'{word}'" for word in map(str, words))

    script = TMPFS.format(
        size=size, command=quote(words), again=quote(again), environ="OMP_NUM_THREADS=1"
    )
    code, text = watched([*NAMESPACE, "sh", "-c", script], folder)
    assert code == 0, (
        text
        + (folder / "said").read_text()
        + ((folder / "again").read_text() if (folder / "again").exists() else "")
    )
    return int(text.split()[-1]), *(
        (folder / name).read_text() for name in ("said", "left", "again")
    )


@mounting
def test_a_disk_that_fills_up_in_training(world, tmp_path):
    """At random sizes: from none for the first checkpoint to almost enough.

    After that there is room, and the run goes on to the undisturbed result.
    """
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *SMALL,
        *"--max_steps 8 --save_every 2 --eval_every 4".split(),
    ]
    code, text = run(tmp_path, "train", *flags, "--run_name", "whole")
    assert code == 0, text
    whole = next(tmp_path.glob("checkpoints/whole_*/last.pth"))
    expected, size = load_checkpoint(whole), whole.stat().st_size / 1024
    sizes = [1.4, 0.3, 2.3, 2.8][: count(1, 4)]
    for share in sizes:
        folder = tmp_path / str(share)
        folder.mkdir()
        words = command(
            "train",
            *flags,
            *"--run_name r --checkpoints disk/checkpoints --run_logs disk/run_logs".split(),
        )
        code, said, left, _ = on_a_small_disk(
            folder, f"{int(share * size)}k", words, [*words, "--resume", "auto"]
        )
        line = one_line(said)
        assert (
            code == 1
            and ("could not be written" in line or "cannot be written" in line)
            and "resume auto" in line
        ), line
        assert ".part" not in left
        last = max(folder.glob("kept/checkpoints/r_*/last.pth"), key=os.path.getmtime)
        found = load_checkpoint(last)
        assert all(
            same(expected[part], found[part])
            for part in ("student", "predictor", "optimizer", "losses", "history")
        )
    record(
        "a disk (tmpfs) that is full while a checkpoint is saved, then --resume auto with room",
        len(sizes),
        "one line, nothing half-written, the result the same to the bit",
    )


@mounting
def test_a_disk_that_fills_up_in_caching(world, tmp_path):
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    sizes = [3000, 200, 7000][: count(1, 3)]
    flags = ["--data", world / "data", "--teacher", teacher, "--views", "30", "--clips", "on"]
    code, text = run(tmp_path, "cache_latents", *flags, "--out", "whole")
    assert code == 0, text
    full = tmp_path / "site"  # what a disk says it has is not always there: quotas, other writers
    full.mkdir()
    (full / "sitecustomize.py").write_text(
        "import shutil, collections\nshutil.disk_usage = lambda path:"
        " collections.namedtuple('usage', 'total used free')(2**40, 0, 2**40)\n"
    )
    for size in sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        words = ["env", f"PYTHONPATH={full}", *command("cache_latents", *flags, "--out", "disk/c")]
        code, said, left, _ = on_a_small_disk(folder, f"{size}k", words, words)
        assert (
            code == 1
            and "No space left on device" in one_line(said)
            and ".part" not in left
            and "metadata.json" not in left
        )
        for path in (tmp_path / "whole").iterdir():
            assert (folder / "kept" / "c" / path.name).read_bytes() == path.read_bytes(), path.name
    record(
        "a disk (tmpfs) that is full while a cache is made, then the same command with room",
        len(sizes),
        "one line, nothing half-written, every file the same to the bit",
    )


@pytest.mark.parametrize("script", ["train", "cache_latents"])
def test_a_limit_on_file_sizes(world, tmp_path, script):
    """RLIMIT_FSIZE, as quotas do it: EFBIG in the middle of a write."""

    def limit():
        return (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            __import__("resource").setrlimit(
                __import__("resource").RLIMIT_FSIZE, (150_000, 150_000)
            ),
        )

    flags = (
        ["--cache", world / "latents", *SMALL, "--max_steps", "2"]
        if script == "train"
        else [
            "--data",
            world / "data",
            *"--teacher none --frames 4 --resolution 48 --out c".split(),
        ]
    )
    code, text = run(tmp_path, script, *flags, before=limit)
    assert code == 1 and (
        "File too large" in one_line(text) or "could not be written" in one_line(text)
    ), text
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("metadata.json"))
    record(f"RLIMIT_FSIZE in the middle of a write ({script})", 1, "one line, nothing half-written")


READ_ONLY = {
    "train": lambda world: ["--cache", world / "latents", *SMALL, "--max_steps", "2"],
    "cache_latents": lambda world: [
        "--data",
        world / "data",
        *"--teacher none --frames 4 --resolution 48 --out c".split(),
    ],
    "eval_distill": lambda world: [
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        "--cache",
        world / "held_out",
        "--out",
        "x.json",
    ],
    "probe_time_arrow": lambda world: [
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        "--data",
        world / "data",
        "--out",
        "x.json",
    ],
    "plot_runs": lambda world: [run_folder(world, "student")],
}


@pytest.mark.parametrize("script", READ_ONLY)
def test_a_folder_that_cannot_be_written_to(world, tmp_path, script):
    """Found before the work begins.

    Root gives up its right to write everywhere first (CAP_DAC_OVERRIDE).
    """
    tmp_path.chmod(0o555)

    def powerless():
        return ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP

    try:
        code, text = run(tmp_path, script, *READ_ONLY[script](world), before=powerless)
    finally:
        tmp_path.chmod(0o755)
    line = one_line(text)
    assert (
        code == 1
        and re.search("cannot be (written|made)|Permission denied", line)
        and not list(tmp_path.iterdir())
    ), line
    record("a folder that cannot be written to", 1, f"{script}: one line, before the work begins")


@mounting
def test_every_stage_without_dev_shm(world, tmp_path):
    """In a mount namespace of its own /dev/shm can be neither read nor written."""
    hide = [*NAMESPACE, "sh", "-c", 'mount -t tmpfs -o mode=000,ro none /dev/shm && exec "$@"', "-"]
    best = run_folder(world, "student") / "best.pth"
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    stages = {
        "train": ["--cache", world / "latents", *SMALL, "--max_steps", "2"],
        "cache_latents": ["--data", world / "data", "--teacher", teacher, "--out", "c"],
        "eval_distill": ["--checkpoint", best, "--cache", world / "held_out"],
        "probe_time_arrow": [
            "--checkpoint",
            best,
            "--data",
            world / "data",
            *"--folds 2 --untrained_seeds 1 --heads mean".split(),
        ],
    }
    for script in list(stages)[: count(1, 4)]:
        code, text = run(tmp_path, script, *stages[script], prefix=hide)
        assert code == 0, text
    record("no /dev/shm", len(stages), "every stage runs")
    if FULL:
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            *command("train", *stages["train"])[1:],
        ]
        code, text = watched([*hide, *words], tmp_path)
        assert code == 0, text
        record("no /dev/shm, two ranks under torchrun", 1, "runs")


@pytest.mark.skipif(not FULL, reason="in the full form")
def test_training_without_semaphores(world, tmp_path):
    """Every stage is tried so in test_stages.py; here the run is also the same to the bit."""
    flags = ["--cache", str(world / "latents"), *SMALL, "--max_steps", "4"]
    assert run(tmp_path, "train", *flags, "--run_name", "with")[0] == 0
    code, text = watched(
        [sys.executable, "-c", REFUSE, *command("train", *flags, "--run_name", "without")[1:]],
        tmp_path,
    )
    assert code == 0, text
    one, other = (
        load_checkpoint(next(tmp_path.glob(f"checkpoints/{name}_*/last.pth")))
        for name in ("with", "without")
    )
    assert same(one["student"], other["student"])
    record(
        "no semaphores, no shared memory (both refused)",
        1,
        "training to the same bits; tests/test_stages.py has every stage",
    )


def test_the_probes_memory_does_not_grow_with_its_videos(world, tmp_path):
    """Clips of 2.4 MB, two a video: were they kept, 2,000 videos would take 9.6 GB."""
    few, many = count(10, 100), count(50, 2000)
    for split, number in (("train", many), ("validation", 20)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(number):
            video = (world / "data" / "videos" / f"{i % 7}.webm").read_bytes()
            # an element of Matroska that says nothing: each file is another one
            void = b"\xec\x88" + f"{split[:3]}{i:05d}".encode()
            (tmp_path / "data" / split / f"{split}{i}.webm").write_bytes(video + void)
    code, text = run(
        tmp_path,
        "train",
        "--target",
        "pixels",
        "--data",
        tmp_path / "data",
        *SMALL,
        *"--batch_size 2 --max_steps 1 --stats_clips 2".split(),
    )
    assert code == 0, text
    best, peaks = next(tmp_path.glob("checkpoints/*/best.pth")), {}
    for number in (few, many):
        code, text = run(
            tmp_path,
            "probe_time_arrow",
            "--checkpoint",
            best,
            "--data",
            "data",
            "--train_videos",
            number,
            *"--val_videos 20 --untrained_seeds 0 --no_pixels --folds 2 --strengths 0.01".split(),
            *"--heads mean --batch_size 4 --dtype fp32".split(),
            limit=3600,
        )
        assert code == 0, text
        peaks[number] = float(re.search(r"peak memory ([\d.]+) GB", text)[1])
    features = (many - few) * 2 * 8 * 192 * 4 / 1e9  # float32, of both directions
    # half of what the clips would take; the features are there a few times, for cross-validation
    assert peaks[many] - peaks[few] < max(0.5 * (many - few) * 4.8e-3, 0.1), peaks
    record(
        f"peak memory of the probe at {many} videos against {few}",
        2,
        f"{peaks[many]:.2f} against {peaks[few]:.2f} GB; the features themselves are"
        f" {1000 * features:.0f} MB",
    )
