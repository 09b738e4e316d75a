"""LeRobot data sets, written here as `lerobot` writes them: rows, windows, splits, what is left
out, states for a probe; and one that `lerobot` itself wrote, where it is installed.
"""

import json
import sys

import numpy as np
import pytest

from salt import cache, lerobot
from salt.errors import InputError
from salt.lerobot import Cut
from salt.splits import load_split
from salt.video import read_row
from salt.views import View
from tests.stages import SMALL, VIEW, error_of, run
from tests.test_data import numbers_in, write_video

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

FPS = 10
LENGTHS = [7, 5, 9, 6, 8, 4]  # of episodes; three a file in v3
FIRST = 16  # number of the first one, which with the fourth one is held out by its hash
CAMERAS = ["observation.images.top", "observation.images.left_wrist", "observation.images.right"]
CODECS = {
    "av1": ("libsvtav1", {"preset": "8", "crf": "10", "svtav1-params": "keyint=2"}),
    "h264": ("libx264", {"crf": "5", "g": "2"}),
}


def frame(number, size=(64, 64)):
    return np.full((*size, 3), 4 * (number % 61) + 10, np.uint8)  # as test_data.numbers_in reads it


def numbers_of(camera, episodes, lengths=LENGTHS):
    """What the frames of a file show: 20 times the camera, and their place in the file."""
    first = 20 * CAMERAS.index(camera)
    return [first + i for i in range(sum(lengths[k] for k in episodes))]


def make_set(folder, version="v3.0", codec="h264", lengths=LENGTHS):
    """A data set of three cameras; in v3 two video files and two data files a chunk."""
    name, options = CODECS[codec]
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 1000, "features": {}}
    info["features"] = {camera: {"dtype": "video", "shape": [64, 64, 3]} for camera in CAMERAS}
    info["features"]["observation.state"] = {"shape": [2], "names": ["episode", "frame"]}
    info["features"]["action"] = {"shape": [1], "names": {"motors": ["gripper"]}}
    for feature in ("observation.state", "action"):
        info["features"][feature]["dtype"] = "float32"
    three = version.startswith("v3")
    groups = [range(3), range(3, 6)] if three else [[k] for k in range(6)]
    info["video_path"] = (
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if three
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    )
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    rows = []
    for number, group in enumerate(groups):
        where = {
            "chunk_index": 0,
            "file_index": number,
            "episode_chunk": 0,
            "episode_index": FIRST + group[0],
        }
        for camera in CAMERAS:
            path = folder / info["video_path"].format(video_key=camera, **where)
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = [frame(i) for i in numbers_of(camera, group, lengths)]
            write_video(path, frames, name, FPS, options=options)
        begin, table = (
            0.0,
            {"episode_index": [], "timestamp": [], "observation.state": [], "action": []},
        )
        for k in group:
            end = begin + lengths[k] / FPS
            row = {"episode_index": FIRST + k, "length": lengths[k], "tasks": [f"task {k % 2}"]}
            for camera in CAMERAS if three else ():
                at = zip(
                    ("chunk_index", "file_index", "from_timestamp", "to_timestamp"),
                    (0, number, begin, end),
                )
                row |= {f"videos/{camera}/{name}": value for name, value in at}
            rows.append(row)
            begin = end
            for i in range(lengths[k]):
                table["episode_index"].append(FIRST + k)
                table["timestamp"].append(np.float32(i / FPS))
                table["observation.state"].append([float(k), float(i)])
                table["action"].append([-float(i)])
        data = (
            folder
            / "data"
            / "chunk-000"
            / (f"file-{number:03d}.parquet" if three else f"episode_{FIRST + number:06d}.parquet")
        )
        data.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(table), data)
    if three:
        place = folder / "meta" / "episodes" / "chunk-000"
        place.mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(rows), place / "file-000.parquet")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "meta" / "episodes.jsonl").write_text(lines)
    return str(folder)


def of_all(folder, cut=lerobot.WHOLE, log=lambda line: None):
    """{id: Row} of both splits."""
    return {row.id: row for row, *_ in lerobot.rows_of(folder, cut, log)}


@pytest.mark.parametrize("version, codec", [("v3.0", "h264"), ("v3.0", "av1"), ("v2.1", "h264")])
def test_a_row_is_an_episode_and_camera(tmp_path, version, codec):
    folder = make_set(tmp_path / "set", version, codec)
    rows = of_all(folder)
    assert len(rows) == 6 * 3
    assert rows["set.episode_000019.observation.images.top"].label == "task 1"
    for camera in CAMERAS:
        for k, length in enumerate(LENGTHS):
            (clip,) = read_row(
                rows[f"set.episode_{FIRST + k:06d}.{camera}"], [View(length, 32, 32)]
            )
            before = sum(LENGTHS[3 * (k // 3) : k]) if version == "v3.0" else 0
            first = 20 * CAMERAS.index(camera) + before
            assert numbers_in(clip) == list(range(first, first + length)), (camera, k)


def test_windows_of_an_episode(tmp_path):
    folder = make_set(tmp_path / "set")
    rows = of_all(folder, Cut(("top",), 0.45))  # episodes last .4 to .9 s
    names = {name.split(".", 2)[2] for name in rows}
    assert {"observation.images.top", "observation.images.top.2of2"} <= names
    shown = {}
    for row in rows.values():
        (clip,) = read_row(row, [View(40, 32, 32)])  # all its frames, some of them again
        shown.setdefault(int(row.id[12:18]) - FIRST, []).append(sorted(set(numbers_in(clip))))
    for k, length in enumerate(LENGTHS):
        before = sum(LENGTHS[3 * (k // 3) : k])
        together = sorted(sum(shown[k], []))
        assert together == list(range(before, before + length))  # each frame in one window
        assert len(shown[k]) == -(-length // 4.5)


def test_cameras_and_windows_of_an_episode_are_of_one_split(tmp_path):
    lengths = [4] * 6
    folder = make_set(tmp_path / "set", lengths=lengths)
    train, held_out = (
        {row.id[4:18] for row in load_split(folder, split, cut=Cut((), 0.2))}
        for split in ("train", "validation")
    )
    assert held_out == {"episode_000016", "episode_000019"} and len(train) == 4


def test_cameras_by_their_names(tmp_path):
    folder = make_set(tmp_path / "set")
    for name in ("left_wrist", "observation.images.left_wrist"):
        rows = of_all(folder, Cut((name,)))
        assert len(rows) == 6 and all("left_wrist" in row.path for row in rows.values())
    with pytest.raises(InputError, match="--cameras left: .* has observation.images.top, "):
        of_all(folder, Cut(("left",)))
    with pytest.raises(InputError, match="leave --cameras and --window_seconds out"):
        (tmp_path / "videos").mkdir()
        write_video(tmp_path / "videos" / "a.mp4", [frame(0)] * 4, "libx264")
        load_split(str(tmp_path / "videos"), "train", cut=Cut(("left",)))


def test_what_misses_its_video_is_left_out_and_named(tmp_path):
    folder = make_set(tmp_path / "set")
    path = tmp_path / "set" / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    rows = parquet.read_table(path).to_pylist()
    rows[2][f"videos/{CAMERAS[0]}/to_timestamp"] += 2.0
    rows[1]["length"] = 50
    parquet.write_table(pa.Table.from_pylist(rows), path)
    (tmp_path / "set" / "videos" / CAMERAS[2] / "chunk-000" / "file-001.mp4").unlink()
    said = []
    found = lerobot.rows_of(folder, lerobot.WHOLE, said.append)
    assert len(found) == 18 - 1 - 3 - 3
    assert len(said) == 7 and all("is left out" in line for line in said)
    for part in (
        "top/chunk-000/file-000.mp4: episode 18 is left out: it ends at 4.1 s of a video of 2.1 s",
        "file-000.mp4: episode 17 is left out: it has 50 frames, and 5.0 frames of time",
        "right/chunk-000/file-001.mp4: episode 20 is left out: its video is not there",
    ):
        assert any(part in line for line in said), part


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_states_and_actions(tmp_path, version):
    folder = make_set(tmp_path / "set", version)
    cut = Cut(("top",), 0.45)
    states, names = lerobot.states_of(folder, cut, print)
    assert names == ["observation.state episode", "observation.state frame", "action gripper"]
    assert states.keys() == of_all(folder, cut).keys()
    whole, _ = lerobot.states_of(folder, Cut(("top",)), print)
    for k, length in enumerate(LENGTHS):
        expected = np.array([[k, i, -i] for i in range(length)], np.float32)
        assert np.array_equal(whole[f"set.episode_{FIRST + k:06d}.{CAMERAS[0]}"], expected)
        parts = [states[name] for name in sorted(states) if int(name[12:18]) == FIRST + k]
        assert np.array_equal(np.concatenate(parts), expected)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    for name, change, message in (
        ("old", {"codebase_version": "v2.0"}, "v3 and v2.1 are read"),
        (
            "images",
            {"features": {"x": {"dtype": "image", "shape": [3]}}},
            "no feature of dtype video",
        ),
        ("odd", {"fps": "fast"}, "is malformed"),
    ):
        folder = make_set(tmp_path / name)
        path = tmp_path / name / "meta" / "info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=message):
            load_split(folder, "train")
    folder = make_set(tmp_path / "damaged")
    (tmp_path / "damaged" / "meta" / "episodes" / "chunk-000" / "file-000.parquet").write_bytes(
        b"x"
    )
    with pytest.raises(InputError, match="file-000.parquet cannot be read"):
        load_split(folder, "train")
    folder = make_set(tmp_path / "whole")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        load_split(folder, "train")


def test_the_stages_on_one(tmp_path):
    """Cached, trained on with and without clips in the cache, and probed for its states."""
    lengths = [12] * 6
    make_set(tmp_path / "set", lengths=lengths)
    flags = ["--data", "set", "--cameras", "top", "--window_seconds", "0.6"]
    clips = ["--teacher", "none", *VIEW]
    run(tmp_path, "cache_latents", *flags, *clips, "--out", "clips")
    made = cache.open_cache(tmp_path / "clips")
    assert len(made) == len(load_split(str(tmp_path / "set"), "train", cut=Cut(("top",), 0.6)))
    assert made.ids.fields(0)[0].endswith("observation.images.top.1of2")
    run(tmp_path, "cache_latents", "--verify", "clips", *flags)
    small = ["--target", "pixels", "--max_steps", 1, *SMALL]
    run(tmp_path, "train", "--cache", "clips", *small)
    run(tmp_path, "train", *flags, "--frames", 4, "--resolution", 48, *small, "--run_name", "live")
    (path,) = tmp_path.glob("checkpoints/live_*/last.pth")
    told = error_of(tmp_path, "train", "--data", "set", "--cameras", "front", *small)
    assert "--cameras front" in told
    probe = ["--labels", "4", "--draws", 1, "--heads", "grid", "--untrained_seeds", 0]
    probe += ["--no_pixels", "--ahead", "0.1", "--dtype", "fp32", "--out", "states.json"]
    run(tmp_path, "probe_states", "--checkpoint", path, *flags, *probe)
    found = json.loads((tmp_path / "states.json").read_text())
    assert "action gripper" in found["R2_of_each_value"]["student"]["grid, 4"]


def test_one_that_lerobot_wrote(tmp_path):
    datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    features = {
        "observation.images.top": {
            "dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["c", "d"]},
    }  # fmt: skip
    made = datasets.LeRobotDataset.create(
        "me/it", fps=FPS, features=features, root=tmp_path / "set", use_videos=True
    )
    for k, length in enumerate(LENGTHS):
        for i in range(length):
            made.add_frame(
                {
                    "observation.images.top": frame(sum(LENGTHS[:k]) + i),
                    "observation.state": np.array([k, i], np.float32),
                    "action": np.array([-i, 1], np.float32),
                    "task": f"task {k % 2}",
                }
            )
        made.save_episode()
    made.finalize()
    folder = str(tmp_path / "set")
    rows = of_all(folder)
    assert len(rows) == 6
    states, names = lerobot.states_of(folder, lerobot.WHOLE, print)
    for k, length in enumerate(LENGTHS):
        row = rows[f"set.episode_{k:06d}.observation.images.top"]
        assert row.label == f"task {k % 2}"
        (clip,) = read_row(row, [View(length, 32, 32)])
        first = sum(LENGTHS[:k])
        assert numbers_in(clip) == list(range(first, first + length))
        assert states[row.id].tolist() == [[k, i, -i, 1] for i in range(length)]


def test_a_file_that_holds_more_than_its_episode(tmp_path):
    """v2.1 has a file an episode: foreign frames are no part of it."""
    folder = make_set(tmp_path / "set", "v2.1")
    path = tmp_path / "set" / "videos" / "chunk-000" / CAMERAS[0] / f"episode_{FIRST:06d}.mp4"
    write_video(path, [frame(i) for i in range(20)], "libx264", FPS)
    said = []
    assert len(lerobot.rows_of(folder, lerobot.WHOLE, said.append)) == 17
    assert f"episode {FIRST} is left out: it has 7 frames, and 20.0 frames of time" in said[0]


def test_depth_is_no_camera_and_a_camera_counts_once(tmp_path):
    folder = make_set(tmp_path / "set")
    path = tmp_path / "set" / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"][CAMERAS[2]]["info"] = {"video.is_depth_map": True}
    path.write_text(json.dumps(info))
    assert len(of_all(folder)) == 12
    twice = lerobot.rows_of(folder, Cut(("top", CAMERAS[0])), print)
    assert len(twice) == 6


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_frames_of_states_in_any_order_and_file(tmp_path, version):
    folder = make_set(tmp_path / "set", version)
    before, _ = lerobot.states_of(folder, lerobot.WHOLE, print)
    data = tmp_path / "set" / "data" / "chunk-000"
    for path in list(data.iterdir()):
        rows = parquet.read_table(path).to_pylist()[::-1]
        for number, some in enumerate((rows[::2], rows[1::2])):
            parquet.write_table(pa.Table.from_pylist(some), data / f"{number}-{path.name}")
        path.unlink()
    after, _ = lerobot.states_of(folder, lerobot.WHOLE, print)
    assert all(np.array_equal(after[name], rows) for name, rows in before.items())


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_tasks_that_only_the_frames_know(tmp_path, version):
    folder = make_set(tmp_path / "set", version)
    meta, data = tmp_path / "set" / "meta", tmp_path / "set" / "data" / "chunk-000"
    for path in data.iterdir():
        table = parquet.read_table(path)
        number = [(episode - FIRST) % 2 for episode in table["episode_index"].to_pylist()]
        parquet.write_table(table.append_column("task_index", [number]), path)
    tasks = [{"task_index": 0, "task": "lift"}, {"task_index": 1, "task": "push"}]
    if version == "v3.0":
        (path,) = meta.glob("episodes/*/*.parquet")
        parquet.write_table(parquet.read_table(path).drop_columns(["tasks"]), path)
        parquet.write_table(pa.Table.from_pylist(tasks), meta / "tasks.parquet")
    else:
        lines = [json.loads(line) for line in (meta / "episodes.jsonl").read_text().splitlines()]
        for line in lines:
            del line["tasks"]
        (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (meta / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    labels = {int(row.id[12:18]) - FIRST: row.label for row in of_all(folder).values()}
    assert labels == {0: "lift", 1: "push", 2: "lift", 3: "push", 4: "lift", 5: "push"}


def test_two_sets_share_no_id(tmp_path):
    one, other = (of_all(make_set(tmp_path / name)) for name in ("one", "other"))
    assert not one.keys() & other.keys()


def test_lists_beside_a_set_bring_their_own_states(tmp_path):
    make_set(tmp_path / "set")
    path = f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"
    rows = [(0, 0.7), (0.7, 1.2), (1.2, 2.1)]
    for split, some in (("train", rows[:2]), ("validation", rows[2:])):
        lines = [f"{path},{a},{b},{split}{i}" for i, (a, b) in enumerate(some)]
        text = "path,start,end,id\n" + "\n".join(lines) + "\n"
        (tmp_path / "set" / f"{split}.csv").write_text(text)
    states = {"train0": [[i] for i in range(7)], "train1": [[i] for i in range(5)]}
    states["validation0"] = [[i] for i in range(9)]
    (tmp_path / "set" / "states.json").write_text(json.dumps(states))
    small = ["--target", "pixels", "--frames", 4, "--resolution", 48, "--max_steps", 1, *SMALL]
    run(tmp_path, "train", "--data", "set", *small, "--batch_size", 2)
    (path,) = tmp_path.glob("checkpoints/*/last.pth")
    probe = ["--labels", "0", "--draws", 1, "--heads", "grid", "--untrained_seeds", 0]
    probe += ["--no_pixels", "--ahead", "0.1", "--dtype", "fp32", "--out", "states_of.json"]
    run(tmp_path, "probe_states", "--checkpoint", path, "--data", "set", *probe)
    found = json.loads((tmp_path / "states_of.json").read_text())
    assert list(found["R2_of_each_value"]["student"].values())[0].keys() == {"0"}


@pytest.mark.parametrize(
    "cut, message",
    [
        (Cut((), 0.05), "is less than a frame"),
        ({"window_seconds": 0.0}, "longer than nothing"),
        ({"window_seconds": -1.0}, "longer than nothing"),
    ],
)
def test_windows_that_are_none(tmp_path, cut, message):
    folder = make_set(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        load_split(folder, "train", cut=cut if isinstance(cut, Cut) else lerobot.asked(cut))
