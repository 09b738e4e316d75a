"""Studies: their rows can be run by the train.py there is, and tables say what they should."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from salt.masks import sample_masks
from salt.score import Space
from studies import compute, report, stall, world

ROOT = Path(__file__).resolve().parent.parent
STUDIES = [path.stem for path in (ROOT / "studies").glob("*.py") if "\nROWS = " in path.read_text()]
IDS = torch.tensor([7, 8])  # of clips
SOURCE = (ROOT / "train.py").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_rows_are_of_this_train(name):
    study = importlib.import_module(f"studies.{name}")
    settings = set(re.findall(r"^(\w+)(?:: .*?)? = ", SOURCE, re.MULTILINE))
    for row_name, row in study.ROWS.items():
        assert {**study.REFERENCE, **row.flags}.keys() <= settings, row_name
        assert row.says and row.against in study.ROWS and row.latents in world.LATENTS
        assert set(map(world.latents_of, row.needs)) <= world.LATENTS.keys()
        for file, patches in row.patches.items():
            source = whole = (ROOT / file).read_text()
            for old, new in patches:
                assert source.count(old) == 1, (row_name, old)
                source = source.replace(old, new)
            compile(source, f"{file} of {row_name}", "exec")
            assert source != whole


def test_differences_are_of_the_same_seeds(tmp_path):
    def run(value):
        measures = {"R2": {"value": value}, report.RANKED: {"value": value}}
        return {
            "measures": measures,
            "log": {"step": [1, 5], "loss": [2, 1]},
            "curve": [[0, 0], [5, value]],
        }

    runs = {
        "reference": {"1": run(0.1), "2": run(0.2), "3": run(0.3), "4": run(9.0)},
        "worse": {"1": run(0.0), "2": run(0.11), "3": run(0.19)},
        "once": {"2": run(0.5), "0": run(7.0), "1": {"failed": "diverged"}},
        "masked": {"1": run(0.0), "2": run(0.11), "3": run(0.19)},
        "never": {},
    }
    mean, half = report.difference(runs, "worse", "reference", "R2") or (0.0, 0.0)
    each = np.array([-0.1, -0.09, -0.11])
    assert mean == pytest.approx(each.mean())
    assert half == pytest.approx(4.302653 * each.std(ddof=1) / math.sqrt(3), rel=1e-5)
    mean, half = report.difference(runs, "once", "reference", "R2") or (0.0, 0.0)
    assert mean == pytest.approx(0.3) and math.isnan(half)
    assert report.difference(runs, "never", "reference", "R2") is None
    rows = {name: world.Row("as said") for name in runs}
    rows["masked"] = world.Row("of other masks", {"masks": "short"})
    study = types.SimpleNamespace(
        ROWS=rows,
        PANELS=[report.curves, report.losses],
        REFERENCE={"masks": "ratio", "target_norm": ""},
    )
    assert report.ranked(study, runs) == ["reference", "worse", "masked", "once"]
    study.LOSSES = study.CURVES = ["worse", "never"]
    content = {"runs": runs, "speed": {"once": {"seconds": 7.5}}}
    _, _, reference, worse, masked, once = report.lines(study, content)
    assert "(-0.100 ± 0.025)*" in worse and "(+0.300)" in once and "*" not in reference + once
    assert "| 1, 1 diverged |" in once and once.endswith("| 7.5 |")
    # R2 of other masks stands alone, states do not
    assert "| 3 | 0.100 | - | 0.100 (-0.100 ± 0.025)* |" in masked
    report.show(study, content, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    study.PANELS = [report.against_seconds]
    report.show(study, content, tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "study.png").read_bytes()


FAKE = """
import json, pathlib, sys
from studies import world
class World(world.World):
    def cache(self, name, split): return pathlib.Path("cache")
    def measured(self, checkpoint, row, folder): return {"states, 300 labels": {"value": 0.5}}
world.World = World
sys.argv = ["run.py", *sys.argv[1:]]
import runpy, subprocess
class Popen(subprocess.Popen):  # train.py, for which a short script stands in
    def __init__(self, words, **how):
        if words[0] == "git":
            super().__init__(words, **how)
            return
        flags = dict(word[2:].split("=", 1) for word in words[2:])
        print("training", flags["lr"], flags["seed"], flush=True)
        code = '''
import json, os, sys
folder, lr = sys.argv[1] + "/run_1", float(sys.argv[2])
os.makedirs(folder)
if lr > 0.007:
    open(folder + "/diagnosis.json", "w").write("{}")
    sys.exit("train.py: error: the loss was not finite\\\\nProcess exiting.")
open(folder + "/last.pth", "w")
line = {"step": 1, "loss": 1.0, "r2": 0.0, "grad_norm": 1.0, "val_r2": 0.1, "clips_per_s": 40.0}
open(folder + "/metrics.jsonl", "w").write(json.dumps(line))
'''
        super().__init__([sys.executable, "-c", code, flags["checkpoints"], flags["lr"]], **how)
subprocess.Popen = Popen
runpy.run_path(ROOT + "/studies/run.py", run_name="__main__")
"""


def test_what_is_there_is_skipped_and_what_changed_is_run_again(tmp_path):
    (tmp_path / "fake.py").write_text(f"ROOT = {str(ROOT)!r}" + FAKE)
    words = "--rows reference,batch_16_lr_x4 --seeds 1,2 --out out --results .".split()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    def study(*more, name="stall"):
        done = subprocess.run(
            [sys.executable, "fake.py", name, *words, *more],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.count("training"), done.stdout

    assert study("--jobs", "2")[0] == 4
    found = json.loads((tmp_path / "stall.json").read_text())["runs"]
    assert found["reference"]["1"]["measures"] and found["reference"]["1"]["log"]
    assert found["batch_16_lr_x4"]["2"]["failed"] == "diverged"
    count, said = study()
    assert count == 0 and "| batch_16_lr_x4 | reference | 0, 2 diverged |" in said
    assert study("--seeds", "3")[0] == 2 and study("--again", "--seeds", "3")[0] == 2
    # what another study has of the same row
    assert study("--rows", "reference,l1", name="compute")[0] == 2
    # the steps of a row, alone: 8,000 clips at 40 a second
    study("--rows", "reference", "--speed")
    speed = json.loads((tmp_path / "stall.json").read_text())["speed"]
    assert speed["reference"]["seconds"] == 200.0
    assert "| 200.0 |" in study()[1]
    content = json.loads((tmp_path / "stall.json").read_text())
    content["runs"]["reference"]["1"]["of"] = "another row by this name"
    content["speed"]["reference"]["of"] = "another row by this name"
    (tmp_path / "stall.json").write_text(json.dumps(content))
    (tmp_path / "compute.json").unlink()
    count, said = study()
    assert count == 1 and "200.0" not in said


def test_caches_of_every_latents_are_asked_for_as_they_can_be_made(tmp_path):
    calls = []

    def call(folder, script, **flags):
        calls.append((script, flags))
        if script == "train.py":
            (flags["checkpoints"] / "run_1").mkdir(parents=True)
            (flags["checkpoints"] / "run_1" / "last.pth").touch()
        else:
            flags["out"].mkdir(parents=True)
            (flags["out"] / "metadata.json").touch()
        if script == "demo/make_videos.py":
            rows = [{"id": str(i)} for i in range(flags["train"])]
            (flags["out"] / "train.json").write_text(json.dumps(rows))

    made = world.World(tmp_path, call, seed=3)
    for name in world.LATENTS:
        for split in world.SPLITS:
            made.cache(name, split)
    seen = {flags["out"]: flags for script, flags in calls if script == "cache_latents.py"}
    for flags in seen.values():
        assert ("clips_from" in flags) != ("data" in flags) == ("split" in flags)
    assert {flags["seed"] for script, flags in calls if script == "train.py"} == {3}
    assert made.needed("teacher of pixels_500").name == "last.pth"
    # no held-out video of the world is among the training videos of another one
    (more,) = tmp_path.glob("world/net_new_videos_train_*")
    kept = json.loads((seen[more]["data"] / "train.json").read_text())
    ids = {int(row["id"]) for row in kept}
    assert len(ids) == 4000 and not ids & set(world.HELD_OUT)
    held_out = {flags["out"].name for flags in seen.values() if flags.get("split") == "validation"}
    assert not any(name.startswith("net_new") for name in held_out)


def test_what_a_row_would_cost_a_vit_l():
    of = compute.cost_of_vit_l
    assert of(compute.ROWS["reference"]) == 1 and of(compute.ROWS["distillation"]) is None
    assert of(compute.ROWS["batch_2_lr_x1"]) == 1  # as many clips
    # the predictor's blocks are linear in the tokens but for attention
    half, quarter = (of(compute.ROWS[f"targets_1_{n}"]) for n in (2, 4))
    assert 0.5 < quarter < half < 0.9
    assert of(compute.ROWS["predictor_192"]) > 1.5 > 1 > of(compute.ROWS["predictor_1"])


def patched(file, patches):
    """A module of the root with patches in place."""
    source = (ROOT / f"{file}.py").read_text()
    for old, new in patches:
        source = source.replace(old, new)
    module = types.ModuleType(file)
    exec(compile(source, f"{file}.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def network():
    """(of a module: Salt with a loss at the context, patches, masks) of a tiny shape."""

    def make(module):
        torch.manual_seed(0)
        encoder = module.config_of_size("tiny", depth=4, frames=4, size=64)
        shape = {"dim_in": encoder.dim, "dim_out": 5, "tokens": encoder.tokens, "seen": True}
        shape |= {"families": ["ratio"], "dim": 48, "depth": 2, "heads": 3}
        masks = sample_masks(IDS, 0, 0, "ratio", encoder.grid)._replace(family="ratio")
        patches = torch.randint(0, 256, (2, encoder.tokens, encoder.patch_dim)).byte()
        return module.build_salt(encoder, shape), patches, [masks]

    return make


def test_distillation_asks_for_nothing_hidden(network):
    salt, clips, masks = network(module := patched("model", compute.NOTHING_HIDDEN_IS_ASKED))
    assert list(salt(clips, masks)) == [module.SEEN]
    with torch.no_grad():
        assert set(salt(clips, masks)) == {"ratio", module.SEEN}
    space = Space("latents", "layer_norm", None, None, torch.zeros(salt.student.config.tokens, 5))
    latents = torch.randn(2, salt.student.config.tokens, 5)
    batch = types.SimpleNamespace(patches=clips, latents=latents, masks=masks)
    loss, sums = module.salt_loss(salt, batch, space, context=1.0)
    loss.backward()
    assert sums[0] == sums[1] == 0 and sums[3] > 0
    assert all(p.grad is None for p in salt.predictor.blocks.parameters())
    assert all(p.grad is not None for p in salt.student.blocks.parameters())


@pytest.mark.parametrize("patches", [compute.AT_BLOCK_2, compute.AT_BLOCKS_2_AND_4])
def test_the_head_at_block_2(network, patches):
    """Its loss has no gradient in the blocks after the second where it hangs there alone."""
    salt, clips, masks = network(module := patched("model", patches))
    salt(clips, masks)[module.SEEN].sum().backward()
    of_blocks = [block.fc1.weight.grad is not None for block in salt.student.blocks]
    assert of_blocks == [True, True] + [patches is not compute.AT_BLOCK_2] * 2


def test_masks_cut_at_the_end():
    _, code = stall.CUT_AT_THE_END
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("salt.masks.draw_one_mask", None)
        monkeypatch.setattr("salt.masks.has_kernel", None)
        exec(code + "salt = None\n", {})
        cut = sample_masks(IDS, 0, 0, "short")
    whole = sample_masks(IDS, 0, 0, "short")
    for mine, theirs in zip(cut[:2], whole[:2], strict=True):
        assert mine.shape == theirs.shape and mine.float().mean() < theirs.float().mean()


def test_wrong_words_end_in_one_line():
    for words, message in (
        (["stal"], "did you mean stall?"),
        ([], "which study?"),
        (["stall", "--rows", "referense"], "no row 'referense'"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "studies" / "run.py", *words], capture_output=True, text=True
        )
        assert done.returncode == 1 and message in done.stderr
        assert len(done.stderr.splitlines()) == 1
