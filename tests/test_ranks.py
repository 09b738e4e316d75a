"""Several processes under torchrun, gloo on the CPU: the same run as one process, stopped and
killed ones included.
"""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from salt import ranks
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from salt.masks import shuffled
from tests.stages import ROOT, SMALL, run, run_folder, start, start_ranks
from tests.test_health import poisoned

# 12 steps of 4 clips
FLAGS = [*SMALL, *"--epochs 3 --save_every 3 --eval_every 5 --val_batches 3".split()]


def launch(count, folder, *flags, script="train", restarts=0, path=""):
    """torchrun with `count` ranks: the process, with its output in a pipe."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        count,
        "--max_restarts",
        restarts,
        ROOT / f"{script}.py",
        *flags,
    ]
    return start(command, folder, PYTHONPATH=path)


def over_ranks(count, folder, *flags, script="train"):
    """What `count` ranks print that end well."""
    return finish(start_ranks(count, [ROOT / f"{script}.py", *flags], folder))


def finish(process, code=0):
    text = process.communicate()[0]
    assert process.returncode == code, text
    return text


def last(folder, name="r"):
    """The newest last.pth of a run."""
    return load_checkpoint(
        max(Path(folder).glob(f"checkpoints/{name}_*/last.pth"), key=os.path.getmtime)
    )


def metrics(folder, name="r"):
    return [
        json.loads(line)
        for line in (
            (
                max(Path(folder).glob(f"checkpoints/{name}_*"), key=os.path.getmtime)
                / "metrics.jsonl"
            )
            .read_text()
            .splitlines()
        )
    ]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The run by one process, and its flags."""
    folder = tmp_path_factory.mktemp("alone")
    flags = ["--cache", world / "latents", "--val_cache", world / "held_out", *FLAGS]
    flags += ["--context_loss", "0.5"]
    run(folder, "train", *flags, "--run_name", "r")
    return folder, flags


def agrees(folder, other, rtol):
    mine, theirs = last(folder), last(other)
    assert len(theirs["losses"]) == 12
    torch.testing.assert_close(mine["losses"], theirs["losses"], rtol=rtol, atol=0)
    for name, value in theirs["student"].items():  # after 12 steps of at most 2e-4
        torch.testing.assert_close(mine["student"][name], value, rtol=0, atol=2e-5)
    for number, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(
                mine["optimizer"]["state"][number][name],
                value,
                rtol=1e-2,
                atol=1e-4 * value.abs().max().item(),
            )
    rows, expected = metrics(folder), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, like in zip(rows, expected):
        for name in (
            "loss",
            "r2",
            "r2_context",
            "lr",
            "weight_decay",
            "grad_norm",
            "update_ratio",
            "feature_std",
            "effective_rank",
            "val_r2",
            "val_mse",
        ):
            assert (name in row) == (name in like) and row.get(name, 0) == pytest.approx(
                like.get(name, 0), rel=1e-3, abs=1e-4
            ), (name, row, like)


@pytest.mark.parametrize(
    "count, more",
    [
        (2, ["--accumulate", "2"]),
        (4, ["--ema", "0.9"]),
        (2, ["--fsdp", "--accumulate", "2", "--recompute"]),
    ],
)
def test_more_ranks_are_the_same_run(alone, tmp_path, count, more):
    folder, flags = alone
    said = over_ranks(count, tmp_path, *flags, "--run_name", "r", *more)
    agrees(tmp_path, folder, 1e-5)
    assert (
        f"{count} ranks; {'FSDP2' if '--fsdp' in more else 'DDP'}" in said
        and said.count("status: finished") == 1
    )
    assert {path.name for path in next(tmp_path.glob("checkpoints/r_*")).iterdir()} == {
        "best.pth",
        "last.pth",
        "metrics.jsonl",
        "starts.jsonl",
    }


def test_bfloat16_over_ranks_and_shards(alone, tmp_path):
    folder, flags = alone
    flags = [*flags, "--predictor_attention", "context"]
    run(tmp_path, "train", *flags, "--dtype", "bf16", "--run_name", "one")
    over_ranks(2, tmp_path, *flags, "--dtype", "bf16", "--run_name", "ddp")
    over_ranks(2, tmp_path, *flags, "--dtype", "bf16", "--run_name", "fsdp", "--fsdp")
    for name in ("ddp", "fsdp"):
        torch.testing.assert_close(
            last(tmp_path, name)["losses"], last(tmp_path, "one")["losses"], rtol=2e-3, atol=0
        )


FULL = pytest.mark.skipif(os.environ.get("SALT_FAULTS") != "full", reason="in make faults")


@pytest.mark.parametrize("more", [[], pytest.param(["--fsdp"], marks=FULL)])
def test_a_killed_rank_leads_to_a_clean_restart(alone, tmp_path, more):
    """Rank 1 dies after a line of step 6: torchrun starts both again, they go on from last.pth, and
    the result is the one of two ranks undisturbed.
    """
    _, flags = alone
    over_ranks(2, tmp_path, *flags, "--run_name", "whole", *more)
    process = launch(2, tmp_path, *flags, "--run_name", "r", "--resume", "auto", *more, restarts=2)
    killed = False
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("step 6/") and not killed:
            mine = int(re.search(r"start r_\d+_\d+_pid(\d+)", text)[1])  # rank 0
            parent = Path(f"/proc/{mine}/stat").read_text().rpartition(")")[2].split()[1]
            other = [
                int(pid)
                for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
                if int(pid) != mine
            ]
            os.kill(other[0], signal.SIGKILL)
            killed = True
    assert process.wait() == 0 and killed, text
    assert "started again for the 1. time" in text and "resumed" in text
    whole, resumed = last(tmp_path, "whole"), last(tmp_path)
    assert torch.equal(whole["losses"], resumed["losses"]) and all(
        torch.equal(value, resumed["student"][name]) for name, value in whole["student"].items()
    )
    assert whole["history"] == resumed["history"]


def test_a_run_goes_on_under_another_number_of_ranks(alone, tmp_path):
    """Torchrun is told to stop: all ranks stop at one step and save.

    One process goes on, then sharded over two.
    """
    folder, flags = alone
    process = launch(2, tmp_path, *flags, "--run_name", "r")
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    text = process.communicate()[0]
    assert process.returncode != 0 and "status: stopped" in text
    stopped = last(tmp_path)["step"]
    assert 4 <= stopped < 12
    process = start(
        [sys.executable, ROOT / "train.py", *flags, "--run_name", "r", "--resume", "auto"], tmp_path
    )
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 8/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert f"at step {stopped}" in said and "the last bits may differ" in said
    over_ranks(2, tmp_path, *flags, "--run_name", "r", "--resume", "auto", "--fsdp")
    agrees(tmp_path, folder, 1e-4)


def test_evaluation_over_ranks_is_the_same(world, tmp_path):
    flags = [
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        "--cache",
        world / "held_out",
        *"--batch_size 3 --dtype fp32".split(),
    ]
    run(tmp_path, "eval_distill", *flags, "--out", "one.json")
    finish(launch(2, tmp_path, *flags, "--out", "two.json", script="eval_distill"))
    one, two = (
        json.loads((tmp_path / f"{name}.json").read_text())["results"][0] for name in ("one", "two")
    )
    assert (
        one["clips"] == two["clips"] == 8
        and one["r2"] == pytest.approx(two["r2"], rel=1e-5)
        and one["r2_ci95"] == pytest.approx(two["r2_ci95"], rel=1e-4)
    )


def test_clips_that_other_ranks_lose_are_said(alone, world, tmp_path):
    """In training and in evaluation: rank 0 alone writes the log."""
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    shutil.copytree(world / "data", tmp_path / "data")
    for split in ("train", "validation"):
        run(
            tmp_path,
            "cache_latents",
            "--data",
            "data",
            "--split",
            split,
            "--teacher",
            teacher,
            "--clips",
            "off",
            "--out",
            split,
            "--dtype",
            "fp32",
        )
    for number in (*range(1, 6), *range(19, 25)):
        path = tmp_path / "data" / "videos" / f"{number}.webm"
        path.write_bytes(bytes(path.stat().st_size))
    flags = [*SMALL, *"--cache train --val_cache validation --data data --max_steps 4".split()]
    text = over_ranks(2, tmp_path, *flags, "--run_name", "r")
    folder = next(tmp_path.glob("checkpoints/r_*"))
    lost = [json.loads(line) for line in (folder / "failures-rank1.jsonl").read_text().splitlines()]
    assert {entry["part"] for entry in lost} == {"held-out", "training"}
    assert all(
        f"rank 1: skipped, {number} so far: {entry['reason']}" in text
        for number, entry in enumerate(lost, 1)
    )
    assert re.search(r"step 0 held-out R2 \S+ mse \S+ over 2 of 8 clips", text) and re.search(
        r"\d+ clips could not be had", text
    )


def test_skipped_steps_and_a_diagnosis_over_ranks(alone, world, tmp_path):
    """A record that is not finite: both ranks skip the steps that hold it.

    All of them: both stop, and the diagnosis names clips of both.
    """
    _, flags = alone
    names = poisoned(world, tmp_path, [3])
    over_ranks(2, tmp_path, *flags, "--cache", "poisoned", "--run_name", "r", "--tensorboard")
    lost = last(tmp_path)["losses"].isnan().sum()
    assert 1 <= lost <= 3 and last(tmp_path)["optimizer"]["state"][0]["step"] == 12 - lost
    shutil.rmtree(tmp_path / "poisoned")
    names = poisoned(world, tmp_path, range(17))
    text = finish(
        launch(
            2, tmp_path, *flags, *"--cache poisoned --run_name all --skip_limit 3 --fsdp".split()
        ),
        1,
    )
    # torchrun's own
    assert (
        "rank 0: error: the loss or its gradient was not finite in 3 steps in a row" in text
        and text.count("Traceback (most recent call last)") == 1
    )
    found = json.loads(next(tmp_path.glob("checkpoints/all_*/diagnosis.json")).read_text())
    assert len(found["targets"]) == 4 and set(found["targets"]) <= set(names)


def test_what_happens_to_one_rank_alone_is_said(world, tmp_path):
    """Rank 1 runs out of memory while it is set up."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1':\n    import torch\n    def full(self,"
        " *a, **k): raise torch.OutOfMemoryError('CUDA out of memory')\n    torch.nn.Module.to ="
        " full\n"
    )
    process = launch(2, tmp_path, "--cache", world / "latents", *FLAGS, path=str(tmp_path))
    text = finish(process, 1)
    assert (
        "train.py, rank 1: error: the GPU is out of memory; in training give --accumulate 2" in text
    ), text


SLOW_TO_SPEAK = """
import builtins, os, time
said = print
def late(*words, **how):
    if os.environ.get("LOCAL_RANK") == "0" and ": error: " in str(words):
        time.sleep(3)
    said(*words, **how)
builtins.print = late
"""


def test_wrong_inputs_under_torchrun_are_said_once(alone, world, tmp_path):
    """However late rank 0 comes to speak: torchrun ends it when another rank has ended."""
    _, flags = alone
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(SLOW_TO_SPEAK)
    message = "2 ranks do not divide --batch_size 5"
    text = finish(launch(2, tmp_path, *flags, "--batch_size", "5", path=tmp_path / "late"), 1)
    errors = [x for x in text.splitlines() if "train.py, rank" in x and ": error: " in x]
    assert len(errors) == 1 and message in errors[0] and "rank 0" in errors[0], text
    # what torchrun --max_restarts 1 tells a rank
    told = {name: "0" for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    said = run(tmp_path, "train", *flags, code=1, TORCHELASTIC_MAX_RESTARTS="1", **told)
    assert "give --resume auto" in said
    assert "--fsdp splits the model over ranks" in run(tmp_path, "train", *flags, "--fsdp", code=1)
    assert "(RANK,LOCAL_RANK,LOCAL_WORLD_SIZE,MASTER_PORT,MASTER_ADDR)" in run(
        tmp_path, "train", *flags, code=1, WORLD_SIZE="2"
    )


def test_ranks_take_their_parts_of_the_same_batches():
    for world in (1, 2, 3, 4):
        parts = [list(shuffled(50, 12, 3, range(2, 7), rank, world)) for rank in range(world)]
        for step, whole in enumerate(shuffled(50, 12, 3, range(2, 7))):
            assert all(part[step][0] == whole[0] for part in parts)
            assert np.array_equal(np.concatenate([part[step][1] for part in parts]), whole[1])


def test_a_rank_cannot_choose_its_gpu(monkeypatch):
    monkeypatch.setattr(ranks, "world", 2)
    for name, value in {
        "MASTER_ADDR": "localhost",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="each rank takes the GPU of its number"):
        ranks.start("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for number in "01":
        monkeypatch.setenv("LOCAL_RANK", number)
        with pytest.raises(InputError, match="2 ranks were started on a machine with 1 GPUs"):
            ranks.start("cuda")


@pytest.mark.parametrize(
    "environ, wrong",
    [
        ({"RANK": "1"}, None),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"RANK": "x"}, "RANK"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
    ],
)
def test_an_environment_in_part_is_refused(monkeypatch, environ, wrong):
    for name in (*ranks.NUMBERS, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.read_environment() == (0, 1)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"is missing or wrong.*{wrong or ''}"):
        ranks.read_environment()


def test_alone_nothing_is_asked_of_others():
    assert (
        ranks.agree(True, False) == (True, False)
        and ranks.gather(3) == [3]
        and ranks.from_rank_0(lambda: 5) == 5
        and ranks.start("cpu") == "cpu"
    )
    assert ranks.whole({"a": [torch.ones(2)], "b": 1})["a"][0].tolist() == [1, 1]
