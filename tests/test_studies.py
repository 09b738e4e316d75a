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

from studies import report, world

ROOT = Path(__file__).resolve().parent.parent
STUDIES = [path.stem for path in (ROOT / "studies").glob("*.py") if "\nROWS = " in path.read_text()]
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
        return {"measures": measures, "seconds": 1.0, "curve": [[0, 0.0], [5, value]]}

    runs = {
        "reference": {"1": run(0.1), "2": run(0.2), "3": run(0.3), "4": run(9.0)},
        "worse": {"1": run(0.0), "2": run(0.11), "3": run(0.19)},
        "once": {"2": run(0.5), "0": run(7.0), "1": {"failed": "not finite"}},
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
    study = types.SimpleNamespace(ROWS=rows, LAST_PANEL=report.worst_curves)
    assert report.ranked(study, runs) == ["reference", "worse", "once"]
    _, _, reference, worse, once = report.lines(study, runs)
    assert "(-0.100 ± 0.025)*" in worse and "(+0.300)" in once and "*" not in reference + once
    assert "| 1, 1 diverged |" in once
    report.show(study, runs, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    study.LAST_PANEL = report.against_seconds
    report.show(study, runs, tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "study.png").read_bytes()


FAKE = """
import json, pathlib, sys
from salt.errors import InputError
from studies import world
def cache(name, split, out, call): return pathlib.Path("cache")
def measured(checkpoint, row, *more): return {"states, 300 labels": {"value": 0.5}}
world.cache, world.measured = cache, measured
sys.argv = ["run.py", *sys.argv[1:]]
import runpy, subprocess
class Popen(subprocess.Popen):  # train.py, for which a short script stands in
    def __init__(self, words, **how):
        if words[0] == "git":
            super().__init__(words, **how)
            return
        flags = dict(word[2:].split("=", 1) for word in words[2:])
        print("training", flags["lr"], flags["seed"], flush=True)
        print("a step has 9 GFLOP (0.5 a clip)", file=how["stdout"], flush=True)
        code = '''
import json, os, sys
folder, lr = sys.argv[1], float(sys.argv[2])
if lr > 0.007:
    sys.exit("train.py: error: the loss was not finite in 10 steps in a row")
os.makedirs(folder + "/run_1"); open(folder + "/run_1/last.pth", "w")
line = {"step": 1, "loss": 1.0, "r2": 0.0, "grad_norm": 1.0, "val_r2": 0.1}
open(folder + "/run_1/metrics.jsonl", "w").write(json.dumps(line))
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
    assert "not finite" in found["batch_16_lr_x4"]["2"]["failed"]
    count, said = study()
    assert count == 0 and "| batch_16_lr_x4 | reference | 0, 2 diverged |" in said
    assert study("--seeds", "3")[0] == 2 and study("--again", "--seeds", "3")[0] == 2
    # what another study has of the same row
    assert study("--rows", "reference,l1", name="compute")[0] == 2
    content = json.loads((tmp_path / "stall.json").read_text())
    content["runs"]["reference"]["1"]["of"] = "another row by this name"
    (tmp_path / "stall.json").write_text(json.dumps(content))
    (tmp_path / "compute.json").unlink()
    assert study()[0] == 1


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
