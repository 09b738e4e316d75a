"""The scripts as a user runs them: every stage on encoded video, resuming, wrong inputs."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from benchmarks import budget
from salt import cache, encoders, loader, teachers
from salt.advice import causes
from salt.checkpoint import load_checkpoint, save_checkpoint
from salt.clips import Records
from salt.config import Settings
from salt.errors import InputError
from salt.masks import mask_counts, shuffled
from salt.ops import patchify
from salt.schedule import cosine, rate
from salt.video import read_clip
from tests.stages import (
    REFUSE,
    ROOT,
    SMALL,
    VIEW,
    error_of,
    everything_in,
    run,
    run_folder,
    start,
    start_ranks,
)


def test_the_cache_leaves_out_what_cannot_be_decoded(world):
    opened = cache.open_cache(world / "latents")
    assert (
        len(opened) == 17
        and opened.metadata["latent_shape"] == [18, 192]
        and opened.metadata["failures"] == 2
    )
    failures = [
        json.loads(line) for line in (world / "latents" / "failures.jsonl").read_text().splitlines()
    ]
    assert (
        [failure["id"] for failure in failures] == ["7", "99"]
        and "cannot be decoded" in failures[0]["reason"]
        and "not in the data folder" in failures[1]["reason"]
    )
    assert "7" not in list(opened.ids)


def test_cached_latents_are_the_teachers(world):
    opened = cache.open_cache(world / "latents")
    teacher = teachers.load_teacher(
        next(world.glob("checkpoints/teacher_*/best.pth")), dtype="bf16"
    )
    for row in (0, 16):
        clip = read_clip(str(world / "data" / "videos" / f"{opened.ids[row]}.webm"), opened.view)
        expected = teachers.teacher_latents(teacher, torch.from_numpy(clip)[None])[0]
        np.testing.assert_allclose(
            opened.latents(row).astype(np.float32), expected.numpy(), atol=2e-3
        )
        assert np.array_equal(opened.patches(row), patchify(clip))


def test_caching_again_changes_nothing_and_an_interrupted_cache_is_the_same(world):
    assert "already whole" in run(
        world, "cache_latents", "--data", "data", "--teacher", "none", *VIEW, "--out", "clips"
    )
    run(
        world,
        "cache_latents",
        *"--data data --teacher none".split(),
        *VIEW,
        *"--out again --threads 1".split(),
    )
    for path in (world / "clips").iterdir():
        assert path.read_bytes() == (world / "again" / path.name).read_bytes(), path.name
    assert "every checksum, count and id fits" in run(world, "cache_latents", "--verify", "again")
    content = bytearray((world / "again" / "patches-00000.npy").read_bytes())
    content[-1] ^= 1
    (world / "again" / "patches-00000.npy").write_bytes(content)
    assert "patches-00000.npy does not have its checksum" in run(
        world, "cache_latents", "--verify", "again", code=1
    )


def test_ranks_make_the_same_cache(world):
    words = [ROOT / "cache_latents.py", "--data", "data", "--teacher", "none", *VIEW]
    process = start_ranks(3, [*words, "--out", "ranks"], world)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert all(
        path.read_bytes() == (world / "ranks" / path.name).read_bytes()
        for path in (world / "clips").iterdir()
    )


@pytest.fixture(scope="module")
def large(world):
    """1,140 records in three shards: 60 views of each video, latents as int8."""
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    flags = ["--data", "data", "--teacher", teacher, *"--views 60 --latents i8 --clips on".split()]
    run(world, "cache_latents", *flags, "--out", "large")
    return flags


def test_many_views_are_cut_as_one_by_one_and_int8_latents_are_close(world, large):
    opened = cache.open_cache(world / "large")
    teacher = teachers.load_teacher(
        next(world.glob("checkpoints/teacher_*/best.pth")), dtype="bf16"
    )
    assert (
        len(opened) == 17 * 60
        and opened.metadata["list_count"] == 19 * 60
        and len(opened.metadata["shards"]) == 3
    )
    assert opened.ids.fields(0) == ("0", 0) and opened.ids.fields(61) == ("1", 1)
    for record in (0, 7, 511, 1000):
        name, number = opened.ids.fields(record)
        clip = read_clip(
            str(world / "data" / "videos" / f"{name}.webm"),
            dataclasses.replace(opened.view, view=number),
            name,
        )
        assert np.array_equal(opened.patches(record), patchify(clip))
        exact = teachers.teacher_latents(teacher, torch.from_numpy(clip)[None])[0].numpy()
        size = np.sqrt(np.square(exact).mean(1, keepdims=True))  # of a token
        step = size * np.abs(exact / size).max(0) / 127
        assert (
            np.abs(opened.latents(record) - exact) <= 0.6 * step + 4e-3 * np.abs(exact) + 1e-6
        ).all()
    run(world, "train", "--cache", "large", "--val_cache", "held_out", "--max_steps", "4", *SMALL)


def test_a_killed_cache_goes_on_to_the_same_bits(world, large, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cache_latents.py"), *map(str, large), "--out", str(out)],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not list(out.glob("partial/shard-*.json")):
        with pytest.raises(subprocess.TimeoutExpired):  # it is not to end by itself
            process.wait(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "metadata.json").exists()
    said = run(world, "cache_latents", *large, "--out", out)
    assert re.search(r"in 3 shards, [12] to make", said)
    assert everything_in(world / "large") == everything_in(out) and not (out / "partial").exists()


def test_verify_names_the_broken_shard_and_repair_makes_it_again(world, large, tmp_path):
    out = shutil.copytree(world / "large", tmp_path / "large")
    content = bytearray((out / "latents-00001.npy").read_bytes())
    content[5000] ^= 4
    (out / "latents-00001.npy").write_bytes(content)
    (out / "patches-00002.npy").unlink()
    said = run(world, "cache_latents", "--verify", out, code=1)
    assert (
        "latents-00001.npy does not have its checksum" in said
        and "patches-00002.npy cannot be read" in said
        and "to rebuild: shards 1, 2" in said
    )
    assert "patches-00002.npy is missing" in error_of(
        world, "train", "--cache", out, "--max_steps", "1", *SMALL
    )
    said = run(world, "cache_latents", *large, "--out", out, "--repair")
    assert "2 to make" in said
    assert everything_in(world / "large") == everything_in(out)
    assert "nothing to repair" in run(world, "cache_latents", *large, "--out", out, "--repair")
    assert "was begun with another dtype" in error_of(
        world, "cache_latents", *large, "--latents", "f16", "--out", out, "--repair"
    )


def test_merged_caches_train(world, large, tmp_path):
    said = run(world, "cache_latents", "--merge", "latents", "held_out", "--out", tmp_path / "all")
    assert "25 records of 2 caches, 2 failures" in said
    assert "every checksum, count and id fits" in run(
        world, "cache_latents", "--verify", tmp_path / "all"
    )
    run(world, "train", "--cache", tmp_path / "all", "--max_steps", "2", *SMALL)
    assert "another dtype: float16 and int8" in error_of(
        world, "cache_latents", "--merge", "latents", "large", "--out", tmp_path / "never"
    )
    assert "takes two caches or more" in error_of(
        world, "cache_latents", "--merge", "latents", "--out", tmp_path / "never"
    )


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_it_starts(world, tmp_path):
    text = error_of(
        world,
        "cache_latents",
        *"--data data --teacher none --frames 16".split(),
        "--resolution",
        2**18,
        "--out",
        tmp_path / "huge",
    )
    assert "GB free; free some, or try" in text and not (tmp_path / "huge").exists()


def test_a_run_leaves_its_checkpoints_and_log(world):
    folder = run_folder(world, "student")
    assert {path.name for path in folder.iterdir()} == {
        "best.pth",
        "last.pth",
        "metrics.jsonl",
        "starts.jsonl",
    }
    assert re.fullmatch(r"student_\d{8}_\d{6}_pid\d+", folder.name)
    lines = (world / "run_logs" / f"{folder.name}.log").read_text().splitlines()
    assert lines[-1] == "Process exiting." and lines[-2] == "status: finished"
    summary = lines[-8:-2]
    assert (
        any(line.startswith("minimum loss") for line in summary)
        and sum(line.startswith("epoch ") for line in summary) == 4
        and "average loss of the last 16 steps" in summary[-1]
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["val_r2"] for row in metrics if "val_r2" in row]
    assert len(held_out) == 5 and held_out[-1] > held_out[0] and all(np.isfinite(held_out))
    best, last = (load_checkpoint(folder / name) for name in ("best.pth", "last.pth"))
    assert (
        "optimizer" in last
        and "optimizer" not in best
        and last["step"] == 16
        and not any("teacher" in name for name in best["student"])
    )
    assert (
        torch.equal(
            best["stats"]["mean"],
            torch.from_numpy(cache.open_cache(world / "latents").stats["mean"]),
        )
        and best["view"] == cache.open_cache(world / "latents").view.to_dict()
    )
    assert all(value.dtype == torch.float32 for value in last["student"].values())


CLOCKED = {"clips_per_s", "data_wait", "mfu", "memory_gb"}  # of metrics.jsonl


def finished_losses(folder):
    return load_checkpoint(folder / "last.pth")["losses"]


LOSS = "--loss smooth_l1 --target_norm layer_norm --vicreg_variance 0.1 --vicreg_covariance 0.01"


@pytest.mark.parametrize(
    "threads, more",
    [
        ("2", "--grad_clip 0.02"),
        ("1", LOSS),
        ("1", "--ema 0.9 --accumulate 2 --dtype bf16 --context_loss 0.5"),
    ],
)
def test_resuming_is_exact(world, threads, more, tmp_path):
    """16 steps at a stretch, against the same run ended by SIGTERM about its first held-out
    evaluation, between two saves, and continued.
    """
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *"--epochs 4 --run_name r --save_every 5 --eval_every 6".split(),
        *SMALL,
        "--compute_threads",
        threads,
        *more.split(),
    ]
    run(tmp_path, "train", *flags, "--checkpoints", "whole")
    process = start([sys.executable, ROOT / "train.py", *flags], tmp_path)
    for line in process.stdout:
        if line.startswith("step 6/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert (
        process.wait() == 128 + signal.SIGTERM
        and "status: stopped" in rest
        and rest.splitlines()[-1] == "Process exiting."
    )
    stopped = next(tmp_path.glob("checkpoints/r_*"))
    assert {"best.pth", "last.pth"} <= {
        path.name for path in stopped.iterdir()
    } and 6 <= load_checkpoint(stopped / "last.pth")["step"] < 16
    # every step that ran is in it: `minimum loss .. at step a of b`
    assert f"of {load_checkpoint(stopped / 'last.pth')['step']}\n" in rest
    said = run(tmp_path, "train", *flags, "--resume", "auto")
    assert f"resuming from {Path('checkpoints') / stopped.name}" in said
    whole = load_checkpoint(next(tmp_path.glob("whole/r_*")) / "last.pth")
    # one run, one folder, and in it the logs of its starts
    assert list(tmp_path.glob("checkpoints/*")) == [stopped]
    starts = [json.loads(line) for line in (stopped / "starts.jsonl").read_text().splitlines()]
    logs = [(stopped / start["log"]).resolve() for start in starts]
    assert (
        sorted(logs)
        == sorted(
            path.resolve()
            for path in (tmp_path / "run_logs").glob("r_*")
            if path.stem in {log.stem for log in logs}
        )
        and len(logs) == 2
    )
    assert (
        starts[0]["step"] == 0
        and 6 <= starts[1]["step"] < 16
        and not (stopped / "previous.pth").exists()
    )
    lines = [
        [
            {name: value for name, value in json.loads(line).items() if name not in CLOCKED}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (stopped, next(tmp_path.glob("whole/r_*")))
    ]
    assert lines[0] == lines[1]
    resumed = load_checkpoint(stopped / "last.pth")
    assert torch.equal(whole["losses"], resumed["losses"]) and len(whole["losses"]) == 16
    for part, other in [(whole[name], resumed[name]) for name in ("student", "predictor")] + [
        (whole["ema"][name], resumed["ema"][name]) for name in whole.get("ema", ())
    ]:
        assert all(torch.equal(value, other[name]) for name, value in part.items())
    assert ("ema" in whole) == ("--ema" in more)
    for number, state in whole["optimizer"]["state"].items():
        assert all(
            torch.equal(value, resumed["optimizer"]["state"][number][name])
            for name, value in state.items()
        )
    assert whole["history"] == resumed["history"]


def test_ways_to_run_a_step_leave_its_losses_alone(world, tmp_path):
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *"--max_steps 6 --eval_every 3".split(),
        *SMALL,
    ]
    losses = {}
    for name, more in {
        "plain": ["--matrix_rate", "0.5"],
        "accumulate": ["--accumulate", "2"],
        "recompute": ["--recompute"],
        "bf16": ["--dtype", "bf16"],
        "compile": ["--dtype", "bf16", "--compile", "on"],
    }.items():
        run(tmp_path, "train", *flags, "--run_name", name, *more)
        losses[name] = finished_losses(next(tmp_path.glob(f"checkpoints/{name}_*")))
    assert torch.equal(losses["plain"], losses["recompute"])
    torch.testing.assert_close(losses["compile"], losses["bf16"], rtol=2e-3, atol=0)
    for name, limit in {"accumulate": 1e-5, "bf16": 1e-2}.items():
        torch.testing.assert_close(losses[name], losses["plain"], rtol=limit, atol=0)
    rows = [
        json.loads(line)
        for line in (
            (next(tmp_path.glob("checkpoints/plain_*")) / "metrics.jsonl").read_text().splitlines()
        )
    ]
    shape = load_checkpoint(next(tmp_path.glob("checkpoints/plain_*/best.pth")))
    counts = [mask_counts(family, (2, 3, 3)) for family in ("short", "long")]
    flops = budget.step_flops(
        model.EncoderConfig(**shape["encoder_config"]), shape["predictor_config"], counts
    )
    logged = [row for row in rows if "mfu" in row]
    assert logged and all(
        row["mfu"] == pytest.approx(row["clips_per_s"] * flops / 0.5e12) for row in logged
    )


def test_the_context_loss_reads_the_latents_of_the_context(world, tmp_path):
    """What the first line says of it, against all latents of the same batch."""
    flags = ["--cache", world / "latents", *SMALL, *"--lr 0 --lr_end 0 --log_every 1".split()]
    said = run(tmp_path, "train", *flags, *"--max_steps 1 --context_loss 0.5".split())
    (folder,) = tmp_path.glob("checkpoints/*")
    entry = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert f"R2 {entry['r2']:.4f} R2c {entry['r2_context']:.4f} lr" in said
    salt, space, saved = encoders.load_salt(folder / "last.pth")
    clips = Records(cache.open_cache(world / "latents"))
    order = shuffled(len(clips), saved["settings"]["batch_size"], 0, range(1))
    batch = next(loader.Loader(clips, order, ["short", "long"], 0))
    _, sums = model.salt_loss(salt, batch, space, context=0.5)
    assert entry["r2_context"] == pytest.approx(1 - (sums[3] / sums[4]).item(), rel=1e-4)
    assert "seen.weight" in saved["predictor"] and not any("seen" in x for x in saved["student"])
    run(tmp_path, "eval_distill", "--checkpoint", folder, "--cache", world / "held_out")


def test_a_run_is_warned_of_what_made_others_stall(world, tmp_path):
    flags = ["--cache", world / "latents", *SMALL]
    said = run(tmp_path, "train", *flags, *"--max_steps 1 --context_loss 0".split())
    assert "warning: --context_loss 0: " in said and "warning: 1 steps: " in said
    rates = {"lr": 2e-4, "lr_end": 1e-5, "weight_decay": 0.04, "weight_decay_end": 0.4}
    latents, pixels = (
        rates | {"target": word, "context_loss": 0} for word in ("latents", "pixels")
    )
    assert len(list(causes(Settings(latents), 250))) == 1
    assert not list(causes(Settings(pixels), 1))
    latents["context_loss"] = 0.1
    assert not list(causes(Settings(latents), 250))
    # by the schedules themselves, step by step
    whole = Settings(latents | {"weight_decay_end": 1.2})
    steps = 70000
    taken = sum(
        rate(step, steps, whole.lr, whole.lr_end, 0) * cosine(0.04, 1.2, step / steps)
        for step in range(steps)
    )
    (line,) = causes(whole, steps)
    assert f"takes {taken:.1f} e-folds" in line
    assert not list(causes(Settings(latents), steps))


def test_older_runs_have_what_was_there_before_the_choice(world, tmp_path):
    flags = ["--cache", world / "latents", "--val_cache", world / "held_out", *SMALL]
    flags += ["--epochs", "1"]
    run(tmp_path, "train", *flags, "--context_loss", "0")
    saved = load_checkpoint(next(tmp_path.glob("checkpoints/*/last.pth")))
    for name in ("context_loss", "positions", "targets"):
        del saved["settings"][name]
    for part in ("seen", "positions", "grid"):
        del saved["predictor_config"][part]
    del saved["encoder_config"]["positions"]
    save_checkpoint(tmp_path / "last.pth", saved)
    assert encoders.load_salt(tmp_path / "last.pth")[0].predictor.seen is None
    flags += ["--resume", tmp_path / "last.pth"]  # at the end: nothing to do
    assert "trained with --context_loss 0.0, not 1.0" in error_of(tmp_path, "train", *flags)
    flags += ["--context_loss", "0"]
    assert "resumed" in run(tmp_path, "train", *flags)
    for name, before, now in (
        ("context_loss", "0.0", "1.0"),
        ("positions", "table", "rope"),
        ("targets", "1.0", "0.5"),
    ):
        said = error_of(tmp_path, "train", *flags, f"--{name}", now)
        assert f"was trained with --{name} {before}, not {now}" in said


@pytest.mark.parametrize("kind", ["table3d", "rope"])
def test_a_run_with_other_positions(kind, world, tmp_path):
    flags = ["--cache", world / "latents", "--val_cache", world / "held_out", *SMALL]
    how = ["--recipe", "light"] if kind == "rope" else ["--positions", kind]
    run(tmp_path, "train", *flags, "--max_steps", "2", *how)
    (folder,) = tmp_path.glob("checkpoints/*")
    encoder = encoders.load_encoder(folder / "last.pth")
    assert encoder.config.positions == kind
    attends = load_checkpoint(folder / "last.pth")["predictor_config"]["attends"]
    assert attends == ("context" if kind == "rope" else "all")
    run(tmp_path, "eval_distill", "--checkpoint", folder, "--cache", world / "held_out")
    again = ["--max_steps", "2", "--resume", folder / "last.pth"]
    said = error_of(tmp_path, "train", *flags, *again)
    recipe = "--recipe light, not None" if kind == "rope" else f"--positions {kind}, not table"
    assert f"was trained with {recipe}" in said
    if kind == "rope":
        encoders.export_transformers(encoder, tmp_path / "exported")
        assert encoders.load_encoder(tmp_path / "exported").config == encoder.config
    else:
        with pytest.raises(InputError, match="so it is neither"):
            encoders.export_transformers(encoder, tmp_path / "exported")


def test_fewer_targets(world, tmp_path):
    flags = ["--target", "pixels", "--data", world / "data", *SMALL, "--max_steps", "1"]
    flags += ["--resolution", "96", "--stats_clips", "4"]
    for share in ("1", "0.5"):
        run(tmp_path, "train", *flags, "--targets", share, "--run_name", f"r{share[-1]}")
    whole, part = (load_checkpoint(run_folder(tmp_path, f"r{x}") / "last.pth") for x in "15")
    assert part["losses"].isfinite() and not torch.equal(whole["losses"], part["losses"])
    said = error_of(tmp_path, "train", *flags, "--targets", "0")
    assert "--targets is 0.0; a share is above 0" in said


def test_the_moving_average_is_one_and_can_be_used(world, tmp_path):
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *SMALL,
        "--ema",
        "0.75",
    ]
    states = []
    # lr and weight decay are constant, so that a longer run begins as a shorter one
    for steps in (1, 2, 3):
        run(
            tmp_path,
            "train",
            *flags,
            "--max_steps",
            steps,
            "--run_name",
            f"e{steps}",
            *"--warmup 0 --lr_end 2e-4 --weight_decay_end 0.04".split(),
        )
        states.append(load_checkpoint(next(tmp_path.glob(f"checkpoints/e{steps}_*/last.pth"))))
    torch.manual_seed(0)
    average = model.build_salt(
        model.EncoderConfig(**states[0]["encoder_config"]), states[0]["predictor_config"]
    ).student.state_dict()
    for state in states:
        average = {
            name: 0.75 * value + 0.25 * state["student"][name] for name, value in average.items()
        }
        for name, value in average.items():
            torch.testing.assert_close(state["ema"]["student"][name], value, rtol=1e-5, atol=1e-7)
    last = next(tmp_path.glob("checkpoints/e3_*/last.pth"))
    loaded = encoders.load_encoder(last, ema=True).state_dict()
    assert all(
        torch.equal(loaded[name], value) for name, value in states[-1]["ema"]["student"].items()
    )
    run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        last,
        "--cache",
        world / "held_out",
        *"--out e.json --ema --eval_seed 1 --dtype fp32".split(),
    )
    assert json.loads((tmp_path / "e.json").read_text())["results"][0]["r2"] == pytest.approx(
        states[-1]["history"][-1]["val_r2_ema"], abs=1e-4
    )
    run(
        tmp_path,
        "probe_time_arrow",
        "--checkpoint",
        last,
        "--data",
        world / "data",
        *"--ema --folds 2 --untrained_seeds 0 --no_pixels --heads mean".split(),
    )
    assert "without --ema" in error_of(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        "--cache",
        world / "held_out",
        "--ema",
    )


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGINT), (signal.SIGHUP,)])
def test_signals_save_and_leave(world, tmp_path, signals):
    """Two at once as one does, and a terminal that closes."""
    process = start(
        [
            sys.executable,
            ROOT / "train.py",
            "--cache",
            world / "latents",
            "--epochs",
            "20000",
            *SMALL,
        ],
        tmp_path,
    )
    for line in process.stdout:
        if line.startswith("step 8/"):
            for number in signals:
                process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() in [128 + number for number in signals] and "status: stopped" in rest
    assert {path.name for path in next(tmp_path.glob("checkpoints/*")).iterdir()} == {
        "best.pth",
        "last.pth",
        "metrics.jsonl",
        "starts.jsonl",
    }


def test_a_resumed_run_must_be_the_same_run(world):
    last = run_folder(world, "student") / "last.pth"
    flags = [*"--cache latents --val_cache held_out --epochs 4".split(), *SMALL, "--resume", last]
    assert "--lr 0.0002, not 0.001" in error_of(world, "train", *flags, "--lr", "1e-3")
    assert "other training clips" in error_of(
        world, "train", "--target", "pixels", "--cache", "clips", *SMALL, "--resume", last
    )
    assert "another --val_cache" in error_of(
        world, "train", "--cache", "latents", "--epochs", "4", *SMALL, "--resume", last
    )
    assert "--resume is empty" in error_of(world, "train", *flags[:-1], "")
    assert "holds no optimizer" in error_of(
        world, "train", *flags[:-1], run_folder(world, "student") / "best.pth"
    )


@pytest.mark.parametrize(
    "flags", [["--target_norm", "standardise", "--loss", "l1"], ["--target_norm", "layer_norm"]]
)
def test_other_losses_train_and_evaluate(world, flags, tmp_path):
    run(tmp_path, "train", "--cache", world / "latents", "--max_steps", "3", *SMALL, *flags)
    run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        next(tmp_path.glob("checkpoints/*/best.pth")),
        "--cache",
        world / "held_out",
        "--out",
        "e.json",
    )
    assert np.isfinite(json.loads((tmp_path / "e.json").read_text())["results"][0]["r2"])


def test_training_from_videos_and_a_teacher_on_the_fly_is_training_from_a_cache(world, tmp_path):
    """The same videos, decoded and encoded in the loop: losses as with cached latents, up to
    float16 and another R2 mean.
    """
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    good = [
        row
        for row in json.loads((world / "data" / "train.json").read_text())
        if row["id"] not in ("7", "99")
    ]
    (tmp_path / "train.json").write_text(json.dumps(good))
    (tmp_path / "videos").symlink_to(world / "data" / "videos")
    run(
        tmp_path,
        "train",
        "--data",
        ".",
        "--teacher",
        teacher,
        *"--max_steps 4 --run_name fly".split(),
        *VIEW,
        *SMALL,
    )
    run(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        *"--max_steps 4 --run_name cached".split(),
        *SMALL,
    )
    run(
        tmp_path,
        "cache_latents",
        "--data",
        ".",
        "--teacher",
        teacher,
        *"--clips off --out thin".split(),
    )
    run(tmp_path, "train", *"--cache thin --data . --max_steps 4 --run_name thin".split(), *SMALL)
    fly, cached, thin = (
        finished_losses(next(tmp_path.glob(f"checkpoints/{name}_*")))
        for name in ("fly", "cached", "thin")
    )
    torch.testing.assert_close(fly, cached, rtol=1e-3, atol=0)
    assert torch.equal(thin, cached)
    assert not (tmp_path / "thin" / "patches-00000.npy").exists()


def test_a_broken_video_in_decoded_training_is_skipped_and_listed(world, tmp_path):
    said = run(
        tmp_path,
        "train",
        "--data",
        world / "data",
        *"--target pixels --max_steps 8".split(),
        *VIEW,
        *SMALL,
    )
    assert "skipped, 1 so far" in said and "1 of the 19 listed videos are not in" in said
    listed = [
        json.loads(line)["reason"]
        for line in next(tmp_path.glob("checkpoints/*/failures.jsonl")).read_text().splitlines()
    ]
    assert len(listed) == 1 and "7.webm" in listed[0]


def test_failures_of_training_and_held_out_videos_are_told_apart(world, tmp_path):
    """Record 0 of both lists is broken after the caches were made without clips."""
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    (tmp_path / "videos").mkdir()
    for path in (world / "data" / "videos").iterdir():
        if path.name != "7.webm":
            (tmp_path / "videos" / path.name).write_bytes(path.read_bytes())
    for name, ids in (("train", [i for i in range(18) if i != 7]), ("validation", range(18, 26))):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": str(i)} for i in ids]))
    for split in ("train", "validation"):
        said = run(
            tmp_path,
            "cache_latents",
            "--data",
            ".",
            "--split",
            split,
            "--teacher",
            teacher,
            "--clips",
            "off",
            "--out",
            split,
        )
        assert "clips: left out" in said
        broken = tmp_path / "videos" / ("0.webm" if split == "train" else "18.webm")
        # of another size it would be refused before the first step
        broken.write_bytes(b"junk".ljust(broken.stat().st_size, b"\0"))
    run(
        tmp_path,
        "train",
        *"--cache train --val_cache validation --data . --epochs 3".split(),
        *SMALL,
    )
    listed = [
        json.loads(line)
        for line in next(tmp_path.glob("checkpoints/*/failures.jsonl")).read_text().splitlines()
    ]
    assert sorted((entry["part"], entry["record"]) for entry in listed) == [
        ("held-out", 0),
        ("training", 0),
    ]


def test_eval_compares_checkpoints_on_the_same_clips(world):
    folder = run_folder(world, "student")
    said = run(
        world,
        "eval_distill",
        "--checkpoint",
        folder / "best.pth",
        folder / "last.pth",
        *"--cache held_out --out deep/eval.json".split(),
        *"--dtype fp32 --batch_size 3 --eval_seed 1".split(),
    )
    results = json.loads((world / "deep" / "eval.json").read_text())["results"]
    assert [
        set(result) >= {"checkpoint", "mse", "r2", "r2_ci95", "families", "clips", "r2_background"}
        for result in results
    ] == [True, True]
    assert all(
        result["clips"] == 8
        and set(result["families"]) == {"short", "long"}
        and result["r2_ci95"][0] <= result["r2"] <= result["r2_ci95"][1]
        for result in results
    )
    trained = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert results[1]["r2"] == pytest.approx(
        [row["val_r2"] for row in trained if "val_r2" in row][-1], abs=1e-4
    )
    assert "short" in said and "95 %" in said
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    run(
        world,
        "eval_distill",
        "--checkpoint",
        folder / "best.pth",
        "--data",
        "data",
        "--teacher",
        teacher,
        *"--out fly.json --dtype fp32 --eval_seed 1".split(),
    )
    assert json.loads((world / "fly.json").read_text())["results"][0]["r2"] == pytest.approx(
        results[0]["r2"], abs=1e-3
    )
    limited = run(
        world,
        "eval_distill",
        "--checkpoint",
        folder / "best.pth",
        *"--cache held_out --batch_size 2 --max_batches 2 --out few.json".split(),
    )
    assert json.loads((world / "few.json").read_text())["results"][0]["clips"] == 4 and limited


def test_probe_writes_the_figures_and_their_controls(world):
    said = run(
        world,
        "probe_time_arrow",
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        *"--data data --out probe.json --folds 3 --untrained_seeds 2".split(),
    )
    result = json.loads((world / "probe.json").read_text())
    assert (
        result["train_videos"] == 16 + 1
        and result["val_videos"] == 8
        and len(result["failures"]) == 2
    )
    for row in (result, result["untrained"], result["pixels"]):
        assert 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1
    assert (
        len(result["untrained"]["seeds"]) == 2
        and "peak memory" in said
        and re.search(r"mean: student .* untrained, mean of 2: [+-]", said)
    )
    again = run(
        world,
        "probe_time_arrow",
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        *"--data data --out probe2.json --folds 3 --untrained_seeds 2 --heads mean".split(),
    )
    assert (
        json.loads((world / "probe2.json").read_text())["untrained"] == result["untrained"]
        and again
    )


def test_probe_says_what_its_held_out_videos_are(world, tmp_path):
    """Those that the encoder was trained on, and copies, which make intervals too narrow."""
    (tmp_path / "videos").mkdir()
    best = run_folder(world, "student") / "best.pth"
    older = load_checkpoint(best)
    del older["trained_on"]
    save_checkpoint(str(tmp_path / "older.pth"), older)
    for name, number in [*((str(i), i) for i in (0, 1, 2, 3, 20, 21, 22)), ("copy", 20)]:
        shutil.copy(
            world / "data" / "videos" / f"{number}.webm", tmp_path / "videos" / f"{name}.webm"
        )
    for split, ids in (("train", (20, 21, 22)), ("validation", (0, 1, 2, 3))):
        (tmp_path / f"{split}.json").write_text(json.dumps([{"id": str(i)} for i in ids]))
    flags = [
        "--checkpoint",
        run_folder(world, "student") / "best.pth",
        *"--data . --out p.json --folds 2 --untrained_seeds 0 --no_pixels --heads mean".split(),
    ]
    said = run(tmp_path, "probe_time_arrow", *flags)
    assert (
        "4 of the held-out videos are of those that the encoder was trained on" in said
        and "copies" not in said
    )
    assert json.loads((tmp_path / "p.json").read_text())["val_videos_of_the_encoders_training"] == 4
    for i in range(4):
        shutil.move(tmp_path / "videos" / f"{i}.webm", tmp_path / "videos" / f"other{i}.webm")
    (tmp_path / "validation.json").write_text(json.dumps([{"id": f"other{i}"} for i in range(3)]))
    # by their pixels
    assert "3 of the held-out videos are of those that the encoder was trained on" in run(
        tmp_path, "probe_time_arrow", *flags
    )
    said = run(tmp_path, "probe_time_arrow", "--checkpoint", "older.pth", *flags[2:])
    assert (
        "is unknown: the checkpoint is of an older version" in said
        and json.loads((tmp_path / "p.json").read_text())["val_videos_of_the_encoders_training"]
        is None
    )
    for split, ids in (
        ("train", ("other0", "other1", "other2")),
        ("validation", (20, 21, 22, "copy")),
    ):
        (tmp_path / f"{split}.json").write_text(json.dumps([{"id": str(i)} for i in ids]))
    said = run(tmp_path, "probe_time_arrow", *flags)
    assert (
        "that the encoder was trained on" not in said
        and "1 held-out videos are copies of others" in said
    )
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    said = run(tmp_path, "eval_distill", *flags[:4], "--teacher", teacher)
    assert "1 clips have the pixels of another video's" in said


def test_probe_after_a_run(world):
    name = run_folder(world, "student").name
    said = run(
        world,
        "probe_time_arrow",
        "--after",
        f"run_logs/{name}.log",
        *"--data data --folds 2 --untrained_seeds 0 --no_pixels --heads mean".split(),
    )
    assert f"waiting for run_logs/{name}.log" in said and "time arrow" in said
    (world / "run_logs" / "x_20260101_000000_pid999999.log").write_text("step 20\n")
    assert "is gone and its log" in error_of(
        world,
        "probe_time_arrow",
        *"--after run_logs/x_20260101_000000_pid999999.log --data data".split(),
    )
    (world / "run_logs" / "y_20260101_000000_pid999999.log").write_text(
        "status: stopped\nProcess exiting.\n"
    )
    assert "ended as 'stopped'" in error_of(
        world,
        "probe_time_arrow",
        *"--after run_logs/y_20260101_000000_pid999999.log --data data".split(),
    )


def test_wrong_inputs_end_in_one_line(world, tmp_path):
    best = run_folder(world, "student") / "best.pth"
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train.json").write_text('{"Moving something": "0"}')
    cases = [
        ("train", ["--epoch", "3"], "did you mean --epochs"),
        ("train", [], "give --cache"),
        ("train", ["--lr", "inf"], "a finite number"),
        ("train", ["--matrix_rate=-1"], "at least"),
        (
            "train",
            ["--cache", "latents", "--max_steps", "3", "--warmup", "4", *SMALL],
            "longer than the run",
        ),
        (
            "cache_latents",
            ["--data", "data", "--teacher", "MCG-NJU/videomae-base", "--out", "o"],
            "hf download MCG-NJU/videomae-base --local-dir videomae-base",
        ),
        ("train", ["--batch_size", "0"], "at least 1"),
        ("train", ["--lr=-1"], "at least 0"),
        ("train", ["--seed", "9" * 20], "below 2^63"),
        ("train", ["--cache", "latents", "--betas", "0.9,1.5", *SMALL], "below 1"),
        (
            "train",
            ["--cache", "latents", *SMALL, "--accumulate", "3"],
            "does not divide --batch_size 4",
        ),
        ("train", ["--cache", "latents", *SMALL, "--ema", "1"], "below 1"),
        (
            "train",
            ["--cache", "latents", *SMALL, "--accumulate", "2", "--vicreg_variance", "1"],
            "statistics of a whole batch",
        ),
        (
            "train",
            ["--cache", "latents", "--val_cache", "latents", *SMALL],
            "17 of 17 clips of videos that were trained on",
        ),
        ("train", ["--cache", "latents", "--resume", "checkpoints", *SMALL], "is a folder"),
        ("train", ["--cache", "latents", "--split", "validation"], "have split train"),
        (
            "cache_latents",
            ["--clips_from", "clips", "--teacher", teacher, "--resolution", "48", "--out", "o"],
            "leave --resolution out",
        ),
        (
            "cache_latents",
            ["--data", "data", "--teacher", "none", "--clips", "off", "--out", "o"],
            "leave --clips off out",
        ),
        (
            "probe_time_arrow",
            ["--checkpoint", best, "--data", "data", "--val_split", "train"],
            "are in both",
        ),
        (
            "probe_time_arrow",
            ["--checkpoint", best, "--data", "data", "--out", "data"],
            "is a folder",
        ),
        (
            "eval_distill",
            ["--checkpoint", best, "--cache", "held_out", "--device", "mps"],
            "it takes auto",
        ),
        ("train", ["--cache", "latents", "--teacher", teacher], "leave --teacher out"),
        (
            "probe_time_arrow",
            ["--checkpoint", best, "--data", "data", "--out", "/proc/x/y.json"],
            "/proc/x",
        ),
        ("train", ["--cache", "nowhere"], "is no cache"),
        ("train", ["--cache", "latents", "--batch_size", "18"], "fewer than a batch"),
        ("train", ["--cache", "latents", "--resolution", "64"], "have resolution 48"),
        ("train", ["--data", "data", "--split", "test", "--target", "pixels"], "test split"),
        ("train", ["--cache", "clips"], "no cached latents"),
        (
            ("train", ["--cache", "latents", "--device", "cuda"], "sees 0 GPUs")
            if not torch.cuda.is_available()
            else ("train", ["--cache", "x"], "is no cache")
        ),
        ("train", ["--cache", "latents", "--val_cache", "clips", *SMALL], "another teacher"),
        (
            "cache_latents",
            ["--data", "nowhere", "--teacher", "none", "--out", "o"],
            "no data folder",
        ),
        ("cache_latents", ["--data", tmp_path, "--teacher", "none", "--out", "o"], "label table"),
        ("cache_latents", ["--data", "data", "--teacher", "nobody", "--out", "o"], "no teacher"),
        (
            "cache_latents",
            ["--data", "data", "--teacher", teacher, "--resolution", "64", "--out", "o"],
            "takes resolution 48",
        ),
        ("eval_distill", ["--checkpoint", best, "--cache", "clips"], "another teacher"),
        ("eval_distill", ["--checkpoint", "none.pth", "--cache", "latents"], "no checkpoint"),
        ("eval_distill", ["--checkpoint", best, "--data", "data"], "give --teacher"),
        ("probe_time_arrow", ["--checkpoint", best], "give --data"),
        (
            "probe_time_arrow",
            ["--checkpoint", world / "data" / "train.json", "--data", "data"],
            "train.json",
        ),
    ]
    for script, flags, message in cases:
        line = error_of(world, script, *flags)
        assert message in line, (flags, line)
    assert not (world / "o").exists()


def test_a_failed_run_says_so_in_its_log(world, tmp_path):
    error_of(
        tmp_path, "train", "--cache", world / "latents", "--run_name", "f", "--batch_size", "18"
    )
    lines = next((tmp_path / "run_logs").glob("f_*.log")).read_text().splitlines()
    assert (
        lines[-2:] == ["status: failed", "Process exiting."]
        and not list((tmp_path / "checkpoints").iterdir())
        and any(line.startswith("error: there are 17 clips, fewer than a batch") for line in lines)
    )


def test_the_environment_is_used_and_logged(world, tmp_path):
    run(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        "--max_steps",
        "1",
        *SMALL,
        RUN_NAME="from_env",
        LR="1e-3",
    )
    log = next((tmp_path / "run_logs").glob("from_env_*.log")).read_text()
    assert "lr = 0.001 (from LR in the environment)" in log


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stands(tmp_path):
    """The file size limit stands in for a full disk."""
    code = """if True:
        import resource, signal, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        from salt import checkpoint, errors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint.save_checkpoint("x.pth", {"w": torch.zeros(10)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
        try:
            checkpoint.save_checkpoint("x.pth", {"w": torch.zeros(1000000)})
        except errors.InputError as error:
            print(error)
        assert checkpoint.load_pickle("x.pth")["w"].shape == (10,)"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout and os.listdir(tmp_path) == ["x.pth"]


def test_a_full_disk_while_caching_is_one_line_and_nothing_half_written(world, tmp_path):
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000));sys.argv = sys.argv[1:];"
        " sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0],"
        " run_name='__main__')"
    )
    flags = ["--data", str(world / "data"), "--teacher", "none", *VIEW, "--out", "c"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "cache_latents.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1 and "Traceback" not in done.stderr and "File too large" in done.stderr
    ), done.stderr
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"partial"}
    run(tmp_path, "cache_latents", *flags)
    assert (tmp_path / "c" / "patches-00000.npy").read_bytes() == (
        world / "clips" / "patches-00000.npy"
    ).read_bytes()


def test_a_closed_terminal_does_not_end_a_run(world, tmp_path):
    """As after `python train.py | true`: nobody reads what it prints."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--cache",
            str(world / "latents"),
            "--max_steps",
            "3",
            *SMALL,
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    process.stdout.close()
    process.wait()
    lines = next((tmp_path / "run_logs").glob("*.log")).read_text().splitlines()
    assert lines[-2:] == ["status: finished", "Process exiting."] and list(
        tmp_path.glob("checkpoints/*/last.pth")
    )


def test_training_from_a_cache_with_clips_needs_no_av(world, tmp_path):
    code = (
        "import runpy, sys; sys.modules['av'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0,"
        " sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [
        "--cache",
        str(world / "latents"),
        "--val_cache",
        str(world / "held_out"),
        "--max_steps",
        "2",
        *SMALL,
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "train.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "status: finished" in done.stdout, done.stderr


def test_every_stage_runs_where_semaphores_and_shared_memory_are_refused(world, tmp_path):
    (tmp_path / "refuse.py").write_text(REFUSE)
    best = run_folder(world, "student") / "best.pth"
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    for script, flags in (
        ("cache_latents", ["--data", world / "data", "--teacher", teacher, "--out", "c"]),
        (
            "train",
            ["--data", world / "data", "--teacher", teacher, "--max_steps", "2", *VIEW, *SMALL],
        ),
        ("eval_distill", ["--checkpoint", best, "--data", world / "data", "--teacher", teacher]),
        (
            "probe_time_arrow",
            [
                "--checkpoint",
                best,
                "--data",
                world / "data",
                *"--folds 2 --untrained_seeds 1 --heads mean".split(),
            ],
        ),
    ):
        words = [sys.executable, tmp_path / "refuse.py", ROOT / f"{script}.py", *flags]
        process = start(words, tmp_path)
        said = process.communicate()[0]
        assert process.returncode == 0, said
