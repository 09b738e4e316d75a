"""SIGKILL at random moments, of training and of caching; what comes out in the end is what an
undisturbed run gives, to the bit.
"""

import json
from collections import Counter

import numpy as np
import pytest

from salt import cache
from salt.checkpoint import load_checkpoint
from tests.faults.harness import command, count, killed_at_random, record, same, seconds_of
from tests.stages import SMALL

TIMES = {"clips_per_s", "data_wait", "mfu", "memory_gb"}  # of metrics.jsonl: the clock's


def in_words(moments):
    return ", ".join(f"{number} {moment}" for moment, number in moments.most_common())


def newest(folder, name):
    return max(folder.glob(f"checkpoints/{name}_*/last.pth"), key=lambda path: path.stat().st_mtime)


def logged(folder):
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


WAYS = {
    "plain": [],
    "accumulated": ["--accumulate", "2", "--dtype", "bf16", "--ema", "0.9"],
    "videos": ["--recompute"],
}


@pytest.mark.parametrize("way", WAYS)
def test_training_killed_and_resumed(world, tmp_path, way):
    """Steps are saved all the time, so that kills fall into saving, too; epochs are of 4 steps,
    lines of 3.
    """
    total = count(1, {"plain": 20, "accumulated": 20, "videos": 10}[way])
    if way == "videos" and total == 1:
        pytest.skip("in the full form")
    source = (
        ["--cache", world / "latents", "--val_cache", world / "held_out"]
        if way != "videos"
        else ["--target", "pixels", "--data", world / "data", "--frames", "4", "--resolution", "48"]
    )
    flags = [
        *source,
        *SMALL,
        *"--log_every 3 --save_every 2 --eval_every 9 --val_batches 1".split(),
        *WAYS[way],
    ]
    random = np.random.default_rng(len(way))
    moments = Counter()
    runs = 0
    steps = ["--max_steps", count(40, 300)]
    longest = seconds_of(command("train", *flags, *steps, "--run_name", "whole"), tmp_path)
    whole = newest(tmp_path, "whole")
    expected = load_checkpoint(whole)

    def phase(text):
        if list(tmp_path.glob("checkpoints/*/*.part")):
            return "while saving"
        return "in a step" if "\nstep " in text else "before its first line"

    while moments.total() < total:
        name, runs = f"r{runs}", runs + 1
        words = command("train", *flags, *steps, "--run_name", name, "--resume", "auto")
        moments += killed_at_random(
            words, tmp_path, total - moments.total(), random, 0.3 * longest, 0.9 * longest, phase
        )
        found = load_checkpoint(newest(tmp_path, name))
        for part in (
            "student",
            "predictor",
            "optimizer",
            "losses",
            "history",
            "pending",
            "best",
            "step",
            "space",
            "stats",
            "ema",
            "rng",
        ):
            assert same(expected.get(part), found.get(part)), part
        assert logged(newest(tmp_path, name).parent) == logged(whole.parent)
        mine, theirs = (
            load_checkpoint(folder.parent / "best.pth")
            for folder in (newest(tmp_path, name), whole)
        )
        assert mine["step"] == theirs["step"] and same(mine["student"], theirs["student"])
        folder = newest(tmp_path, name).parent
        assert {path.name for path in folder.iterdir()} <= {
            "best.pth",
            "last.pth",
            "metrics.jsonl",
            "starts.jsonl",
            "failures.jsonl",
        } and len(list(tmp_path.glob(f"checkpoints/{name}_*"))) == 1
    said = " ".join(WAYS[way]) if way != "videos" else "--target pixels from videos, --recompute"
    record(
        f"SIGKILL at a random moment in training ({said or 'plain'}), then --resume auto",
        moments.total(),
        f"{in_words(moments)}; {runs} runs to their end, weights, moments, losses, logged lines and"
        " best.pth the same to the bit",
    )


@pytest.mark.parametrize("dtype, repair", [("f16", False), ("i8", False), ("i8", True)])
def test_caching_killed_and_run_again(world, tmp_path, dtype, repair):
    """Shards of 512 rows: 30 to 240 views of 19 listed videos."""
    total, views = count(1, 25), count(30, 120)
    if (dtype == "i8" or repair) and total == 1:
        pytest.skip("in the full form")
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    flags = [
        "--data",
        world / "data",
        "--teacher",
        teacher,
        "--views",
        views,
        "--latents",
        dtype,
        "--clips",
        "on",
    ]
    longest = seconds_of(command("cache_latents", *flags, "--out", "whole"), tmp_path)
    random = np.random.default_rng(len(dtype))
    moments = Counter()
    caches = 0

    def phase(text):
        return (
            "while writing a shard"
            if list(tmp_path.glob("c*/*.part"))
            else (
                "between shards"
                if list(tmp_path.glob(f"c{caches}/partial/shard-*"))
                else "before the first shard"
            )
        )

    while moments.total() < total:
        words = command("cache_latents", *flags, "--out", f"c{caches}", *["--repair"] * repair)
        moments += killed_at_random(
            words, tmp_path, total - moments.total(), random, 0.3 * longest, longest, phase
        )
        for path in (tmp_path / "whole").iterdir():
            assert (tmp_path / f"c{caches}" / path.name).read_bytes() == path.read_bytes(), (
                path.name
            )
        assert {path.name for path in (tmp_path / f"c{caches}").iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }
        assert len(cache.open_cache(tmp_path / f"c{caches}")) == 17 * views
        caches += 1
    record(
        f"SIGKILL at a random moment in caching (--latents {dtype}{' --repair' * repair}), then the"
        " same command",
        moments.total(),
        f"{in_words(moments)}; {caches} caches, every file the same to the bit",
    )
