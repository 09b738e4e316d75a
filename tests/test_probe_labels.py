"""Labels read from frozen features: a known answer, none where labels are shuffled, and V-JEPA 2's
protocol on a small scale.
"""

import functools
import json

import numpy as np
import pytest

from tests import stages
from tests.stages import error_of, run_folder
from tests.test_data import write_video

FAST = "--untrained_seeds 1 --dtype fp32 --threads 2 --epochs 1".split()
probe = functools.partial(stages.probe, "probe_labels", FAST)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """72 videos of noise in which one of six cells is bright, and one of another label."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "videos").mkdir()
    random = np.random.default_rng(0)
    lists = {"train": [], "validation": []}
    for i in range(72):
        split = "train" if i < 48 else "validation"
        y, x = divmod(i % 6, 3)
        frames = random.integers(0, 90, (6, 48, 48, 3), dtype=np.uint8)
        frames[:, 24 * y : 24 * (y + 1), 16 * x : 16 * (x + 1)] += 120
        write_video(folder / "videos" / f"{i}.webm", list(frames))
        lists[split].append({"id": str(i), "template": f"bright in [cell {i % 6}]"})
    lists["validation"][0]["template"] = "of another list"
    for split, rows in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("shuffled", [False, True])
def test_which_cell_is_bright(world, data, tmp_path, shuffled):
    flags = ["--shuffle_labels"] if shuffled else []
    said, result = probe(world, data, tmp_path, "--heads", "grid", *flags)
    assert "validation: 1 videos left out, whose label is none of the training list's" in said
    assert "6 of 6 classes in 48 training videos" in said and ("SHUFFLED" in said) == shuffled
    assert result["val_videos"] == 23 and result["commonest"] <= 4 / 23
    assert {"student", "untrained 0", "pixels 7x7", "frame differences 7x7"} <= set(result["table"])
    for name in ("student", "pixels 7x7"):
        right = result["table"][name]["grid"]["accuracy"]
        assert right < 0.4 if shuffled else right > 0.95  # chance: 0.17
    assert "grid: student " in said and "pixels 7x7: " in said


def test_the_protocol_of_vjepa2(world, data, tmp_path):
    """Both segments as one sequence, three squares averaged, the best of twenty poolers named."""
    said, result = probe(
        world,
        data,
        tmp_path,
        *"--protocol vjepa2 --attention_heads 3 --untrained_seeds 0 --depth 2".split(),
        *"--train_videos 24 --val_videos 9".split(),
    )
    assert "2 segments x 3 squares" in said and said.count("not as V-JEPA 2: ") == 4
    assert "student: best of 20 heads is lr 0.0" in said
    assert "student (attentive) " in said and " pixels 7x7 (grid): " in said
    used = {name: result["used"][name] for name in ("depth", "segments", "views", "fit_batch_size")}
    assert used == {"depth": 2, "segments": 2, "views": 3, "fit_batch_size": 256}
    assert set(result["table"]["student"]) == {"attentive"} and set(result["chosen"]) == {"student"}
    assert result["table"]["pixels 7x7"]["grid"]["accuracy"] > 0.5


def test_wrong_inputs_end_in_one_line(world, data, tmp_path):
    best = run_folder(world, "student") / "best.pth"
    (tmp_path / "none.json").write_text("[]")
    for split in ("train", "validation"):
        rows = json.loads((data / f"{split}.json").read_text())
        (tmp_path / f"{split}.json").write_text(json.dumps([{"id": row["id"]} for row in rows]))
    flags = ["--checkpoint", best, "--data", data, *FAST]
    cases = [
        (["--data", data], "give --checkpoint and --data"),
        (
            [*flags, "--splits_dir", tmp_path],
            "has no labels; a list that says what its videos show",
        ),
        (["--checkpoint", best, "--data", world / "data"], "has one label, 'Moving something'"),
        ([*flags, "--depth", "4", "--attention_heads", "5"], "do not divide into 5 heads"),
        ([*flags, "--train_videos", "2"], "no two labels have two each"),
        ([*flags, "--views", "0"], "it must be at least 1"),
    ]
    for words, expected in cases:
        assert expected in error_of(tmp_path, "probe_labels", *words)
