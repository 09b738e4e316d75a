"""Look-up, the third dumb predictor: its neighbours and errors against scikit-learn, what its R2
says of data with few scenes, and where runs and evaluations keep and find it.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from salt import cache, lookup, score
from salt.cache_writer import Writer, list_digest
from salt.checkpoint import load_checkpoint, save_checkpoint
from salt.errors import InputError
from salt.loader import Batch
from salt.masks import sample_masks
from salt.ops import normalise_target
from salt.score import Space
from salt.views import View
from tests.stages import ROOT, SMALL, error_of, run, run_folder, start_ranks
from tests.test_cache import PLAN

VIEW = View(frames=4, size=96, short_side=96)
GRID, N, D = (2, 6, 6), 72, 6


def make_cache(folder, latents):
    """A cache of latents float [n, 72, 6], whose clips are noise."""
    ids = [(f"v{row}", 0) for row in range(len(latents))]
    plan = {
        **PLAN,
        "view": VIEW.to_dict(),
        "view_hash": VIEW.hash(),
        "list_count": len(ids),
        "list_sha256": list_digest(ids),
        "latent_shape": [N, D],
        "patch_shape": [N, 1536],
    }
    random = np.random.default_rng(0)
    writer = Writer(folder, plan)
    with writer.shard(0) as shard:
        for entry, its in zip(ids, latents):
            clip = random.integers(0, 256, (N, 1536), dtype=np.uint8)
            shard.add(*entry, clip, {"latents": its.astype(np.float16)})
    writer.finish()
    return cache.open_cache(folder)


def space_of(latents, normalise):
    """A Space with the statistics of training latents float [n, N, D]."""
    x = torch.from_numpy(latents.astype(np.float16).astype(np.float32))
    mean, rstd = x.mean(0), 1 / (x.var(0, correction=0) + 1e-6).sqrt()
    if normalise == "standardise":
        return Space("latents", normalise, mean, rstd, torch.zeros(N, D))
    zero = normalise_target(x, normalise).mean(0)
    return Space("latents", normalise, None, None, zero)


def batch_of(latents, families, first=0):
    """Held-out clips, whose rows outside all masks are nan: nothing may look at them."""
    ids = torch.arange(first, first + len(latents)) + 1000
    masks = [sample_masks(ids, 0, 1, family, GRID) for family in families]
    y = torch.full(latents.shape, torch.nan, dtype=torch.float16)
    for drawn in masks:
        for index in (drawn.context, drawn.target):
            rows = index[..., None].expand(-1, -1, D)
            y.scatter_(1, rows, torch.from_numpy(latents).half().gather(1, rows))
    records = np.arange(first, first + len(latents))
    return Batch(ids, torch.zeros(len(ids), N, 1, dtype=torch.uint8), y, masks, records)


def look_in(opened, space, count=2000, said=lambda line: None):
    chosen = lookup.choose(opened, space, count, 1, 1, said)
    return lookup.Lookup(opened, space, chosen, 1)


# --------------------------------------------------------------------------- against another's code


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "standardise"])
def test_neighbours_and_errors_are_those_of_scikit_learn(tmp_path, normalise):
    random = np.random.default_rng(0)
    places = random.normal(0, 3, (N, D))
    train = places + random.normal(0, 1, (60, 1, D)) + random.normal(0, 1, (60, N, D))
    held = places + random.normal(0, 1, (7, 1, D)) + random.normal(0, 1, (7, N, D))
    opened, space = make_cache(tmp_path / "c", train), space_of(train, normalise)
    lines = []
    found = look_in(opened, space, 40, lines.append)
    records = found.chosen["records"].numpy()
    assert len(set(records.tolist())) == 40 and "40 of 60 training clips pooled in" in lines[0]

    def in_space(x):
        x = torch.from_numpy(x.astype(np.float16)).float()
        return normalise_target(x, normalise, None, space.mean, space.rstd).double().numpy()

    theirs, zero = in_space(train), space.zero.double().numpy()
    batch = batch_of(held, ["short", "long"])
    errors = found.errors(batch, space)
    for drawn in batch.masks:
        for b, y in enumerate(in_space(held)):
            context, target = drawn.context[b].numpy(), drawn.target[b].numpy()
            # the difference from the mean, over time at each place that is in the context
            count = np.bincount(context % 36, minlength=36)
            query = [
                (y - zero)[context[context % 36 == at]].mean(0) for at in np.flatnonzero(count)
            ]
            keys = (theirs - zero)[records].reshape(40, 2, 36, D).mean(1)[:, count > 0]
            weights = np.sqrt(count[count > 0])[:, None]
            tree = NearestNeighbors(n_neighbors=5).fit((keys * weights).reshape(40, -1))
            near = tree.kneighbors((query * weights).reshape(1, -1), return_distance=False)
            near = records[near[0]]
            expected = np.square(theirs[near].mean(0)[target] - y[target]).sum()
            assert errors[drawn.family][b] == pytest.approx(expected, rel=1e-4)


def test_a_projection_keeps_distances():
    random = torch.Generator().manual_seed(7)
    a, b = torch.randn(2, 50, 14 * 768, generator=random).mul(torch.rand(14 * 768).exp())
    exact = (a - b).square().sum(1)
    kept = [lookup.projected(x.reshape(50, 14, 768)).flatten(1) for x in (a, b)]
    ratio = (kept[0] - kept[1]).square().sum(1) / exact
    assert (ratio - 1).abs().mean() < 0.08 and abs(ratio.mean() - 1) < 0.05
    assert lookup.projected(a[:, :32]) is not None and torch.equal(
        lookup.projected(a[:, :32]), a[:, :32]
    )


def test_it_is_measured_once_a_clip_and_depends_on_nothing_else(tmp_path, monkeypatch):
    random = np.random.default_rng(1)
    train, held = random.normal(0, 1, (30, N, D)), random.normal(0, 1, (9, N, D))
    opened, space = make_cache(tmp_path / "c", train), space_of(train, "none")
    found = look_in(opened, space)
    together = found.errors(batch_of(held, ["short", "long"]), space)
    monkeypatch.setattr(opened, "read_rows", None)  # nothing is read again
    again = found.errors(batch_of(held[4:], ["short", "long"], first=4), space)
    monkeypatch.undo()
    alone = look_in(opened, space).errors(batch_of(held[4:], ["short", "long"], first=4), space)
    for family, values in together.items():
        assert np.array_equal(again[family], values[4:])
        assert np.array_equal(alone[family], values[4:])


def test_fewer_clips_than_neighbours(tmp_path):
    train = np.random.default_rng(2).normal(0, 1, (3, N, D))
    space = space_of(train, "none")
    found = look_in(make_cache(tmp_path / "c", train), space)
    batch = batch_of(train[:2], ["short"])
    target = batch.masks[0].target[0].numpy()
    mean = train.astype(np.float16).astype(np.float64).mean(0)
    expected = np.square(mean - train[0].astype(np.float16))[target].sum()
    assert found.errors(batch, space)["short"][0] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------- what its R2 says


class Says:
    """A student that predicts these float [B, N, D] at the targets."""

    training = False

    def __init__(self, latents):
        self.latents = torch.from_numpy(latents).float()

    def __call__(self, patches, masks):
        return {
            drawn.family: self.latents.gather(1, drawn.target[..., None].expand(-1, -1, D))
            for drawn in masks
        }

    def eval(self):
        pass

    def train(self, mode):
        pass


def scenes(random, count, clips, held_out):
    """(latents of training clips, of held-out ones, scene of each), where a clip is its scene, a
    map over positions, and a little that is its own.
    """
    maps = random.normal(0, 2, (N, D)) + random.normal(0, 1, (count, N, D))

    def draw(scene):
        return maps[scene] + random.normal(0, 0.15, (len(scene), N, D))

    train, held = np.repeat(np.arange(count), clips), np.repeat(np.arange(count), held_out)
    return draw(train), draw(held), train, held


@pytest.mark.parametrize("clips", [5, 20])
def test_knowing_the_scene_is_no_merit(tmp_path, clips):
    """Of 12 scenes: look-up finds them all, by either family's context. A student that answers with
    the mean of the scene's training clips has an R2 near 1, and from look-up at most what the mean
    of more than 5 clips is better by, 1/6; with 5 clips a scene that is nothing. One that knows
    half of what is a clip's own is above it.
    """
    random = np.random.default_rng(3)
    train, held, scene, scene_held = scenes(random, 12, clips, 4)
    opened, space = make_cache(tmp_path / "c", train), space_of(train, "none")
    found = look_in(opened, space)
    batch = batch_of(held, ["short", "long"])
    for drawn in batch.masks:
        rows = batch.latents.float().gather(1, drawn.context[..., None].expand(-1, -1, D))
        near = found.nearest(rows - space.zero[drawn.context], drawn.context)
        assert (scene[near] == scene_held[:, None]).all(), drawn.family

    known = np.stack([train[scene == name].mean(0) for name in range(12)])[scene_held]
    other = np.stack([train[scene == name][0] for name in range(12)])[scene_held]
    figures = {}
    for name, says in (("scene", known), ("copy", other), ("more", (known + held) / 2)):
        errors = score.clip_errors(Says(says), space, batch, lookup=found)
        figures[name] = score.figures([errors["short"]])
    assert all(row["best_dumb"] == "lookup" and row["r2_lookup"] > 0.95 for row in figures.values())
    assert figures["scene"]["r2"] > 0.95 and figures["copy"]["r2"] > 0.9
    assert figures["scene"]["r2_over_best"] < (1e-3 if clips == 5 else 1 / 6)
    assert figures["copy"]["r2_over_best"] < -0.3
    assert figures["more"]["r2_over_best"] > 0.7


def test_the_best_of_three_is_measured_from():
    def row(squared, spread, background, **lookup):
        sums = {"squared": squared, "spread": spread, "background": background, **lookup}
        return {name: np.array([value, value]) for name, value in sums.items()} | {
            "elements": np.array([10.0, 10.0])
        }

    found = score.figures([row(3.0, 10.0, 6.0, lookup=4.0), row(1.0, 10.0, 6.0, lookup=5.0)])
    assert (found["r2"], found["r2_background"]) == (0.8, 0.4)
    assert (found["best_dumb"], found["r2_lookup"]) == ("lookup", 0.55)
    assert found["r2_over_best"] == pytest.approx(1 - 4 / 9)
    found = score.figures([row(3.0, 10.0, 6.0, lookup=8.0)])
    assert (found["best_dumb"], found["r2_over_best"]) == ("background", 0.5)
    found = score.figures([row(3.0, 10.0, 16.0)])
    assert found["r2_lookup"] is None and found["best_dumb"] == "spread"
    assert found["r2_over_best"] == found["r2"]
    names = np.array(["a", "b"])
    ends = score.r2_interval([row(3.0, 10.0, 6.0)], names, "background")
    assert ends is None  # both are alike
    random = np.random.default_rng(0)
    rows = [{n: random.uniform(1, 2, 300) for n in ("squared", "spread", "lookup")}]
    low, high = score.r2_interval(rows, np.arange(300), "lookup")
    assert low < score.r2(rows, over="lookup") < high


# ---------------------------------------------------------------------------- in runs and elsewhere


def last_evaluation(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "val_r2" in row][-1]


def evaluate(folder, *flags, **how):
    flags = ["--dtype", "fp32", "--out", folder / "e.json", *flags]
    said = run(how.pop("where", folder), "eval_distill", *flags)
    return json.loads((folder / "e.json").read_text())["results"][0], said


def test_a_run_says_it_and_an_evaluation_finds_the_same(world, tmp_path):
    student = run_folder(world, "student")
    row = last_evaluation(student)
    assert {"val_r2_lookup", "val_r2_over_best", "val_best_dumb"} < set(row)
    saved = load_checkpoint(student / "last.pth")
    assert saved["lookup"]["pooled"].shape == (17, 9, 32)
    log = next(world.glob("run_logs/student_*.log")).read_text()
    line = re.findall(r"step \d+ held-out R2 .*", log)[-1]
    assert f"look-up: R2 {row['val_r2_lookup']:.4f}" in line
    assert f"from the best of these: R2 {row['val_r2_over_best']:.4f}" in line
    assert re.search(rf"held-out R2 {row['val_r2']:.4f} at step \d+, at most .*; from ", log)
    flags = ["--checkpoint", student / "last.pth", "--cache", world / "held_out"]
    # where it was trained, by the path in the checkpoint
    found, said = evaluate(tmp_path, *flags, "--eval_seed", 1, where=world)
    assert found["r2_lookup"] == pytest.approx(row["val_r2_lookup"], abs=1e-9)
    assert found["r2_over_best"] == pytest.approx(row["val_r2_over_best"], abs=1e-5)
    assert found["best_dumb"] == row["val_best_dumb"] and len(found["r2_over_best_ci95"]) == 2
    assert f"{found['r2_lookup']:.4f}" in said and "R2 from best: measured from" in said
    # from elsewhere it is not there, until it is named
    missing, said = evaluate(tmp_path, *flags)
    assert missing["r2_lookup"] is None and missing["r2"] is not None
    assert "look-up is not measured: latents is no cache" in said and "--train_cache" in said
    shutil.copytree(world / "latents", tmp_path / "moved")
    named, said = evaluate(tmp_path, *flags, "--eval_seed", 1, "--train_cache", "moved")
    assert named["r2_lookup"] == found["r2_lookup"] and "pooled in" not in said
    line = error_of(tmp_path, "eval_distill", *flags, "--train_cache", world / "held_out")
    assert "is not the cache that" in line and "was trained on" in line


def test_a_checkpoint_without_one_gets_the_same(world, tmp_path):
    """Of an older version, or trained without held-out clips: pooled again, with the same clips."""
    student = run_folder(world, "student") / "last.pth"
    saved = load_checkpoint(student)
    del saved["lookup"]
    save_checkpoint(tmp_path / "old.pth", saved)
    flags = ["--cache", world / "held_out", "--train_cache", world / "latents"]
    kept, _ = evaluate(tmp_path, "--checkpoint", student, *flags)
    made, said = evaluate(tmp_path, "--checkpoint", tmp_path / "old.pth", *flags)
    assert "17 of 17 training clips pooled" in said and made["r2_lookup"] == kept["r2_lookup"]
    # in another space the clips are found in the run's own, and their error is of the other
    scaled, _ = evaluate(tmp_path, "--checkpoint", student, *flags, "--space", "standardise")
    assert np.isfinite(scaled["r2_lookup"]) and scaled["r2_lookup"] != kept["r2_lookup"]


def test_where_it_cannot_be_measured_a_line_says_so(world, tmp_path):
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    more = ["--val_cache", world / "held_out", "--max_steps", "1", *SMALL]
    live = ["--cache", world / "clips", "--teacher", teacher]
    said = run(tmp_path, "train", *live, *more, "--run_name", "live")
    assert "look-up is not measured: it reads the latents of training clips, and no" in said
    row = last_evaluation(run_folder(tmp_path, "live"))
    assert "val_r2_lookup" not in row and row["val_best_dumb"] in ("spread", "background")
    off = ["--cache", world / "latents", "--lookup_clips", "0", "--run_name", "off"]
    assert "look-up" not in run(tmp_path, "train", *off, *more)
    checkpoint = run_folder(tmp_path, "off") / "last.pth"
    _, said = evaluate(tmp_path, "--checkpoint", checkpoint, "--cache", world / "held_out")
    assert "was trained with --lookup_clips 0" in said
    own = ["--cache", world / "latents", "--val_cache", world / "latents", "--training_videos"]
    said = run(tmp_path, "train", *own, "--max_steps", "1", *SMALL, "--run_name", "own")
    assert "look-up is not measured: these clips are training clips themselves" in said


def test_pixels_are_looked_up_too(world, tmp_path):
    flags = ["--target", "pixels", "--cache", world / "clips", "--val_cache", world / "held_out"]
    run(tmp_path, "train", *flags, "--max_steps", "1", *SMALL, "--run_name", "pixels")
    assert np.isfinite(last_evaluation(run_folder(tmp_path, "pixels"))["val_r2_lookup"])


def test_ranks_say_what_one_process_says(world, tmp_path):
    flags = ["--cache", world / "latents", "--val_cache", world / "held_out", *SMALL]
    flags = [ROOT / "train.py", *flags, "--max_steps", "2", "--run_name"]
    rows = []
    for count in (1, 2):
        process = start_ranks(count, [*flags, f"ranks{count}"], tmp_path)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        rows.append(last_evaluation(run_folder(tmp_path, f"ranks{count}")))
    assert rows[0]["val_r2_lookup"] == pytest.approx(rows[1]["val_r2_lookup"], abs=1e-6)
    assert rows[0]["val_best_dumb"] == rows[1]["val_best_dumb"]


def test_the_choice_is_drawn_from_the_whole_list(tmp_path):
    train = np.random.default_rng(4).normal(0, 1, (90, N, D))
    opened, space = make_cache(tmp_path / "c", train), space_of(train, "none")
    first, again, other = (
        lookup.choose(opened, space, 20, seed, 1, lambda line: None) for seed in (1, 1, 2)
    )
    assert torch.equal(first["records"], again["records"])
    assert torch.equal(first["pooled"], again["pooled"])
    assert not torch.equal(first["records"], other["records"])
    assert first["records"].max() > 60 and first["records"].min() < 30


def test_another_cache_under_the_name_is_refused(world):
    saved = load_checkpoint(run_folder(world, "student") / "last.pth")
    with pytest.raises(InputError, match="is not the cache that x.pth was trained on"):
        lookup.training_cache(str(world / "clips"), "x.pth", saved, "latents")
