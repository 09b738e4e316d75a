"""States read from frozen features: known answers, none where states are of other videos, missing
values.
"""

import functools
import json

import numpy as np
import pytest

from salt import probing, verdict
from tests import stages
from tests.stages import error_of, run_folder
from tests.test_data import write_video
from tests.test_teachers import TINY

FAST = "--untrained_seeds 1 --dtype fp32 --threads 2 --heads grid --ahead 0.5 --draws 2".split()
probe = functools.partial(stages.probe, "probe_states", FAST)
FRAMES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 videos of a bright square that moves sideways; what is null in every third of them."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "videos").mkdir()
    random = np.random.default_rng(0)
    lists, states = {"train": [], "validation": []}, {}
    for i in range(60):
        speed = random.uniform(-0.6, 0.6)
        places = 16 + random.uniform(-1, 1) + speed * (np.arange(FRAMES) - 12)
        frames = random.integers(0, 60, (FRAMES, 48, 48, 3), dtype=np.uint8)
        for frame, x in zip(frames, places):
            frame[8:40, round(x) : round(x) + 16] += 150
        write_video(folder / "videos" / f"{i}.webm", list(frames))
        sometimes = [None if i % 3 == 0 else x + 100 for x in places]
        states[i] = [[x, other, 7, None] for x, other in zip(places, sometimes)]
        lists["train" if i < 40 else "validation"].append({"id": str(i), "label": "moving"})
    states[1] = states[1][:-3]
    del states[41]
    for split, rows in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))
    (folder / "states.json").write_text(json.dumps(states))
    (folder / "state_names.json").write_text('["x", "sometimes", "constant", "never"]')
    return folder


def test_where_the_square_is_and_goes(world, data, tmp_path):
    (tmp_path / "t.py").write_text(TINY)
    said, result = probe(world, data, tmp_path, "--labels", "10", "0", "--teacher", "t.py:teacher")
    assert result["R2_of_each_value"]["teacher"]["grid, 39"]["x"] > 0.8
    assert result["labels"] == [10, 39] and result["val_videos"] == 19
    assert "left out: 2 videos, the first of them: " in said
    of_pixels = result["R2_of_each_value"]["pixels 7x7"]["grid, 39"]
    # what is the same in all videos, or missing in all, counts for nothing
    assert set(of_pixels) == {"x", "sometimes", "change of x", "change of sometimes"}
    assert min(of_pixels.values()) > 0.8
    table = result["table"]
    mean = np.mean(list(of_pixels.values()))
    assert table["pixels 7x7"]["grid, 39"]["R2"] == pytest.approx(mean, abs=1e-3)
    assert -0.2 < table["pixels 7x7"]["grid, 10"]["R2"] < mean
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_states_of_other_videos_are_not_found(world, data, tmp_path):
    states = json.loads((data / "states.json").read_text())
    states["1"] = states["0"]
    moved = dict(zip(states, list(states.values())[7:] + list(states.values())[:7]))
    (tmp_path / "states.json").write_text(json.dumps(moved))
    _, result = probe(world, data, tmp_path, "--labels", "0", "--states", "states.json")
    assert all(row["grid, 40"]["R2"] < 0.1 for row in result["table"].values())


def test_a_stretch_of_a_file_has_its_own_states(world, data, tmp_path):
    """Rows of one file, as LeRobot's episodes are: each the square's second half."""
    states = json.loads((data / "states.json").read_text())
    own = {}
    for split, numbers in (("train", range(2, 40)), ("validation", range(42, 60))):
        lines = [f"part {i},videos/{i}.webm,{10 / 12},2.0\n" for i in numbers]
        (tmp_path / f"{split}.csv").write_text("id,path,start,end\n" + "".join(lines))
        own |= {f"part {i}": states[str(i)][10:] for i in numbers}
    (tmp_path / "own.json").write_text(json.dumps(own))
    said, result = probe(
        world, data, tmp_path, "--splits_dir", tmp_path, "--labels", "0", "--states", "own.json"
    )
    assert "left out" not in said
    assert result["R2_of_each_value"]["pixels 7x7"]["grid, 38"]["0"] > 0.8


def test_values_that_are_missing_change_no_others():
    random = np.random.default_rng(0)
    x = random.standard_normal((60, 5)).astype(np.float32)
    y = x @ random.standard_normal((5, 3)).astype(np.float32)
    holes = y.copy()
    holes[::2, 1] = np.nan
    holes[:, 2] = np.nan
    groups = np.arange(60) // 2
    whole = probing.fit_linear(x, y, groups, x)
    found = probing.fit_linear(x, holes, groups, x)
    np.testing.assert_allclose(found[:, 0], probing.fit_linear(x, y[:, :1], groups, x)[:, 0])
    alone = probing.fit_linear(x, holes[:, 1:2], groups, x)
    np.testing.assert_allclose(found[:, 1:2], alone)
    np.testing.assert_allclose(found[:, 1], whole[:, 1], atol=0.1)
    assert np.isnan(found[:, 2]).all()
    score = verdict.Score(found, holes, groups, np.nanmean(y, axis=0))
    assert score.each[:2].min() > 0.99 and np.isnan(score.each[2]) and score.value > 0.99


def test_wrong_inputs_end_in_one_line(world, data, tmp_path):
    best = run_folder(world, "student") / "best.pth"
    flags = ["--checkpoint", best, "--data", data, *FAST]
    (tmp_path / "ragged.json").write_text('{"2": [[1, 2], [3]]}')
    (tmp_path / "widths.json").write_text('{"2": [[1, 2]], "3": [[1]]}')
    (tmp_path / "others.json").write_text('{"x": [[1, 2]]}')
    cases = [
        (["--data", data], "give --checkpoint and --data"),
        ([*flags, "--states", "ragged.json"], "ragged.json cannot be read as states"),
        ([*flags, "--states", "widths.json"], "its rows are not all of as many numbers"),
        ([*flags, "--states", "others.json"], "no video of the split 'train' has states in"),
        ([*flags, "--ahead", "60"], "ends too early: 24 frames, 720 of them ahead"),
        ([*flags, "--draws", "0"], "it must be at least 1"),
    ]
    for words, expected in cases:
        assert expected in error_of(tmp_path, "probe_states", *words)
