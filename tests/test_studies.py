"""Studies: their rows can be run by the train.py there is, and tables say what they should."""

import importlib
import math
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
        assert row.says and row.against in study.ROWS and row.latents in world.CACHES
        assert set(row.needs) <= world.CACHES.keys()
        source = SOURCE
        for old, new in row.patches:
            assert source.count(old) == 1, (row_name, old)
            source = source.replace(old, new.format(**{each: "folder" for each in row.needs}))
        compile(source, row_name, "exec")
        assert (source != SOURCE) == bool(row.patches)


def test_differences_are_of_the_same_seeds():
    def run(value):
        return {"measures": {"R2": {"value": value}}, "seconds": 1.0, "curve": [[0, 0.0]]}

    runs = {
        "reference": {"1": run(0.1), "2": run(0.2), "3": run(0.3), "4": run(9.0)},
        "worse": {"1": run(0.0), "2": run(0.11), "3": run(0.19)},
        "once": {"2": run(0.5)},
        "never": {},
    }
    mean, half = report.difference(runs, "worse", "reference", "R2") or (0.0, 0.0)
    each = np.array([-0.1, -0.09, -0.11])
    assert mean == pytest.approx(each.mean())
    assert half == pytest.approx(4.302653 * each.std(ddof=1) / math.sqrt(3), rel=1e-5)
    mean, half = report.difference(runs, "once", "reference", "R2") or (0.0, 0.0)
    assert mean == pytest.approx(0.3) and math.isnan(half)
    assert report.difference(runs, "never", "reference", "R2") is None
    study = types.SimpleNamespace(ROWS={name: world.Row("as said") for name in runs})
    assert report.ranked(study, runs) == ["reference", "worse", "once"]
    _, _, reference, worse, once = report.lines(study, runs)
    assert "(-0.100 ± 0.025)*" in worse and "(+0.300)" in once and "*" not in reference + once


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
