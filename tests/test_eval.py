"""eval_distill.py: which clips it takes, what may stand in one table, and in which space."""

import json

import numpy as np
import pytest
import torch

from salt import cache
from salt.checkpoint import load_checkpoint, save_checkpoint
from salt.clips import Records, Videos
from salt.lists import Row
from salt.loader import Loader
from salt.masks import keyed_sample
from tests.stages import SMALL, error_of, run


def test_a_sample_is_drawn_from_the_whole_list():
    """A list sorted by class: the first fiftieth holds one class, a keyed sample all fifty."""
    classes = np.repeat(np.arange(50), 400)
    picked = keyed_sample(20000, 400, 7)
    assert (
        picked.dtype == np.int64
        and len(set(picked.tolist())) == 400
        and (np.diff(picked) > 0).all()
    )
    counts = np.bincount(classes[picked], minlength=50)
    assert counts.min() > 0
    assert ((counts - 8) ** 2 / 8).sum() < 85.4  # chi-squared of 49 degrees of freedom at 0.1 %
    assert np.array_equal(picked, keyed_sample(20000, 400, 7))
    assert not np.array_equal(picked, keyed_sample(20000, 400, 8))
    assert np.array_equal(keyed_sample(5, 9, 0), np.arange(5)) and len(keyed_sample(0, 9, 0)) == 0


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Checkpoints of the same few steps, by target space and masks."""
    folder = tmp_path_factory.mktemp("trained")
    flags = {
        "none": [],
        "standardise": ["--target_norm", "standardise"],
        "layer_norm": ["--target_norm", "layer_norm"],
        "short": ["--masks", "short"],
        "ratio": ["--masks", "ratio"],
    }
    for name, more in flags.items():
        run(
            folder,
            "train",
            "--cache",
            world / "latents",
            "--max_steps",
            "3",
            "--run_name",
            name,
            *SMALL,
            *more,
        )
    return {name: next(folder.glob(f"checkpoints/{name}_*/best.pth")) for name in flags}


def evaluate(world, folder, checkpoints, *flags):
    flags = ["--cache", world / "held_out", "--dtype", "fp32", "--out", "e.json", *flags]
    said = run(folder, "eval_distill", "--checkpoint", *checkpoints, *flags)
    return json.loads((folder / "e.json").read_text())["results"], said


def test_a_table_has_one_space_of_targets(world, trained, tmp_path):
    raw = trained["none"]
    scaled = trained["standardise"]
    layered = trained["layer_norm"]
    held_out = ["--cache", world / "held_out"]
    line = error_of(tmp_path, "eval_distill", "--checkpoint", raw, scaled, *held_out)
    assert "--target_norm standardise" in line and "--space none" in line
    assert "--space layer_norm" in error_of(
        tmp_path, "eval_distill", "--checkpoint", raw, layered, *held_out
    )
    line = error_of(
        tmp_path, "eval_distill", "--checkpoint", raw, layered, *held_out, "--space", "none"
    )
    assert str(layered) in line and "layer-normed" in line
    assert "no checkpoint has" in error_of(
        tmp_path, "eval_distill", "--checkpoint", raw, scaled, *held_out, "--space", "layer_norm"
    )

    for space, together in (
        ("none", [raw, scaled]),
        ("standardise", [scaled, raw]),
        ("layer_norm", [raw, layered, scaled]),
    ):
        results, said = evaluate(world, tmp_path, together, "--space", space)
        assert [row["space"] for row in results] == [space] * len(
            together
        ) and f"space: {space};" in said
        assert all(np.isfinite(row["r2"]) for row in results)
        own = next(row for path, row in zip(together, results) if path == trained[space])
        alone, _ = evaluate(world, tmp_path, [trained[space]])
        assert own == alone[0]  # its own space and reference: nothing changes


def test_the_variance_of_a_raw_checkpoint_is_its_training_sets(world, trained, tmp_path):
    """With variances of 1 standardising only moves the mean: errors stay the raw ones."""
    saved = load_checkpoint(trained["none"])
    ones = torch.ones_like(saved["stats"]["variance"])
    save_checkpoint(tmp_path / "unit.pth", {**saved, "stats": {**saved["stats"], "variance": ones}})
    raw, _ = evaluate(world, tmp_path, [trained["none"]])
    unit, _ = evaluate(world, tmp_path, [tmp_path / "unit.pth"], "--space", "standardise")
    scaled, _ = evaluate(world, tmp_path, [trained["none"]], "--space", "standardise")
    assert unit[0]["mse"] == pytest.approx(raw[0]["mse"], rel=1e-4)
    assert unit[0]["r2"] == pytest.approx(raw[0]["r2"], rel=1e-4)
    assert scaled[0]["mse"] != pytest.approx(raw[0]["mse"], rel=0.05)


def test_one_reference_for_the_table(world, trained, tmp_path):
    """Two checkpoints whose own means differ: R2 is of the first's, and a line says so."""
    saved = load_checkpoint(trained["none"])
    moved = {**saved["space"], "zero": saved["space"]["zero"] + 1}
    save_checkpoint(tmp_path / "moved.pth", {**saved, "space": moved})
    results, said = evaluate(world, tmp_path, [trained["none"], tmp_path / "moved.pth"])
    assert (
        results[0]["r2"] == results[1]["r2"]
        and "had other training clips" in said
        and "moved.pth" in said
    )
    other, said = evaluate(world, tmp_path, [tmp_path / "moved.pth"])
    assert other[0]["r2"] > results[0]["r2"] and "had other training clips" not in said


def test_a_table_has_one_set_of_masks(world, trained, tmp_path):
    both = trained["none"]
    short = trained["short"]
    ratio = trained["ratio"]
    held_out = ["--cache", world / "held_out"]
    assert "--masks short" in error_of(
        tmp_path, "eval_distill", "--checkpoint", both, short, *held_out
    )
    assert "evaluate them apart" in error_of(
        tmp_path, "eval_distill", "--checkpoint", both, ratio, *held_out
    )
    line = error_of(
        tmp_path, "eval_distill", "--checkpoint", both, short, *held_out, "--masks", "long"
    )
    assert "does not predict long, only short" in line
    results, said = evaluate(world, tmp_path, [both, short], "--masks", "short")
    assert [set(row["families"]) for row in results] == [{"short"}] * 2 and "masks: short;" in said


def test_pixels_have_one_space(world, tmp_path):
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    flags = ["--checkpoint", teacher, "--cache", world / "held_out", "--space", "none"]
    assert "predicts pixels" in error_of(tmp_path, "eval_distill", *flags)
    results, said = evaluate(world, tmp_path, [teacher])
    assert results[0]["space"] == "pixels" and "space: pixels" in said


def test_views_of_a_video_are_one_unit_of_the_interval(world, trained, tmp_path):
    """Many views of eight videos are no more videos, and one video has no interval."""
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    flags = [
        "--data",
        world / "data",
        "--split",
        "validation",
        "--teacher",
        teacher,
        "--views",
        "9",
    ]
    run(tmp_path, "cache_latents", *flags, "--out", "many")
    flags = [
        "--checkpoint",
        trained["none"],
        *"--cache many --dtype fp32 --out e.json --eval_seed 0".split(),
    ]
    run(tmp_path, "eval_distill", *flags)
    row = json.loads((tmp_path / "e.json").read_text())["results"][0]
    assert (row["clips"], row["videos"]) == (72, 8)
    said = run(tmp_path, "eval_distill", *flags, "--max_batches", "1", "--batch_size", "1")
    few = json.loads((tmp_path / "e.json").read_text())["results"][0]
    assert (few["clips"], few["videos"], few["r2_ci95"]) == (1, 1, None) and "Warning" not in said
    cells = next(line for line in said.splitlines() if " all " in line).split()
    assert (cells[5], cells[-1]) == ("-", "-")


def test_batches_say_which_records_they_hold(world):
    source = Records(cache.open_cache(world / "held_out"))
    for records in (np.array([5, 1, 2]), np.array([7])):
        batch = next(Loader(source, [(0, records)], threads=1))
        assert batch.records.dtype == np.int64 and np.array_equal(batch.records, records)
    rows = [Row(name, str(world / "data" / "videos" / f"{name}.webm"), None) for name in "73"]
    videos = Videos(rows, source.view, source.patch, source.tubelet)
    lost = []
    batch = next(
        Loader(
            videos,
            [(0, np.array([0, 1]))],
            threads=1,
            failed=lambda record, error: lost.append(record),
        )
    )
    assert batch.records.tolist() == [1] and lost == [0]
    batch = next(
        Loader(
            videos,
            [(0, np.array([0]))],
            threads=1,
            failed=lambda record, error: None,
            substitutes=True,
        )
    )
    assert batch.records.tolist() == [1]
