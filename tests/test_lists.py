"""Which videos there are: folders without lists, CSV lists, and what else --data may be."""

import json
import os
import shutil

import av.format
import pytest

from salt.errors import InputError
from salt.folders import VIDEO_SUFFIXES, search
from salt.splits import load_split


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def load_both(folder):
    """(rows of train and validation together by id, log lines)."""
    said = []
    rows = [
        row
        for split in ("train", "validation")
        for row in load_split(str(folder), split, log=said.append)
    ]
    return {row.id: row for row in rows}, said


def test_all_subfolders_are_searched(tmp_path):
    names = [
        f"{task}/{day}/{number}"
        for task in ("pick", "place")
        for day in ("mon", "tue")
        for number in range(10)
    ]
    make(tmp_path, *(f"{name}.mp4" for name in names), "top.MOV", ".hidden/a.mp4", "pick/._b.mp4")
    rows, _ = load_both(tmp_path)
    assert sorted(rows) == sorted([*names, "top"])
    assert rows["pick/mon/3"].path == str(tmp_path / "pick" / "mon" / "3.mp4")


def test_subfolders_of_splits_are_searched_too(tmp_path):
    make(tmp_path, "train/pick/a.mp4", "train/b.m4v", "validation/pick/c.mov", "extra/d.mp4")
    said = []
    rows = {
        split: load_split(str(tmp_path), split, log=said.append)
        for split in ("train", "validation")
    }
    assert [row.id for row in rows["train"]] == ["train/b", "train/pick/a"] and [
        row.id for row in rows["validation"]
    ] == ["validation/pick/c"]
    assert "1 file not used: 1 outside train/, validation/ (extra/d)" in said
    with pytest.raises(InputError, match="has train/ and validation/, but no subfolder test/"):
        load_split(str(tmp_path), "test")


def test_what_is_not_used_is_said(tmp_path):
    make(
        tmp_path,
        *(f"{number}.mp4" for number in range(40)),
        "3.webm",
        "5.avi",
        "note.txt",
        "in/pose.jpg",
        "in/pose2.jpg",
    )
    rows, said = load_both(tmp_path)
    assert len(rows) == 40 and rows["3"].path.endswith("3.mp4")
    (line,) = {line for line in said if "not used" in line}
    assert line.startswith("5 files not used: ")
    assert "2 of equal ids (3.webm: 3.mp4 has that id, 5.mp4: 5.avi has that id)" in line
    assert "3 with suffixes that are no video (.txt, .jpg)" in line


def test_links_lead_into_no_circle_and_to_no_second_id(tmp_path):
    make(tmp_path, *(f"set/{number}.mp4" for number in range(30)))
    os.symlink("..", tmp_path / "set" / "up")
    os.symlink("set", tmp_path / "zet")
    make(tmp_path.parent / f"{tmp_path.name}-elsewhere", "far.mp4")
    os.symlink(tmp_path.parent / f"{tmp_path.name}-elsewhere", tmp_path / "linked")
    rows, said = load_both(tmp_path)
    assert sorted(rows) == sorted([*(f"set/{number}" for number in range(30)), "linked/far"])
    assert "2 files not used: 2 folder that another name leads to (set/up, zet)" in said


def test_a_folder_of_no_videos_says_what_was_looked_at(tmp_path):
    make(tmp_path, "train/a.txt", "validation/b.mp4")
    with pytest.raises(
        InputError,
        match=r"found no video in .*train and its subfolders; looked for \.mp4 .*1 file not used: ",
    ):
        load_split(str(tmp_path), "train")


def test_suffixes_are_those_of_formats_that_ffmpeg_reads():
    known = set()
    for name in av.format.formats_available:
        try:
            known |= av.format.ContainerFormat(name).extensions
        except ValueError:  # devices
            continue
    assert {suffix[1:] for suffix in VIDEO_SUFFIXES} <= known
    assert not {".jpg", ".png", ".webp", ".mp3", ".wav", ".srt", ".json", ".csv", ".txt"} & set(
        VIDEO_SUFFIXES
    )


def test_lists_find_every_suffix_and_say_which_of_two_is_used(tmp_path):
    make(tmp_path, "1.mov", "videos/2.m4v", "videos/2.webm")
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1"}, {"id": "2"}]))
    said = []
    rows = load_split(str(tmp_path), "train", log=said.append)
    assert rows[0].path.endswith("1.mov") and rows[1].path.endswith("2.m4v")
    assert any("1 of equal ids" in line and "2.webm: " in line for line in said)


# ------------------------------------------------------------------------------------ CSV lists


def rows_of(folder, text):
    (folder / "train.csv").write_text(text)
    said = []
    rows = load_split(str(folder), "train", log=said.append)
    return [tuple(row) for row in rows], said


@pytest.mark.parametrize(
    "text",
    [
        "in/a b.mp4,grasp\nc.mov,\n",
        "path,label\nin/a b.mp4,grasp\nc.mov\n",
        " in/a b.mp4 , grasp \n\n c.mov\n",
        "label;path\ngrasp;in/a b.mp4\n;c.mov\n",
        "in/a b.mp4\tgrasp\nc.mov\n",
        "in/a b.mp4 grasp\nc.mov\n",
        '\ufeffFilename,Label\r\n"in/a b.mp4", "grasp"\r\nc.mov,""\r\n',
        "./in/a b.mp4,grasp\nin/../c.mov\n",
    ],
)
def test_ways_to_write_a_list(tmp_path, text):
    make(tmp_path, "in/a b.mp4", "c.mov")
    rows, _ = rows_of(tmp_path, text)
    assert rows == [
        ("in/a b", str(tmp_path / "in" / "a b.mp4"), "grasp", None, None),
        ("c", str(tmp_path / "c.mov"), None, None, None),
    ]


def test_lists_of_v_jepa(tmp_path):
    """Absolute paths, a space, a number; inside the folder they get the ids of relative ones."""
    make(tmp_path, "in/a.mp4", "b.mp4")
    rows, _ = rows_of(tmp_path, f"{tmp_path}/in/a.mp4 3\n{tmp_path}/b.mp4 0\n")
    assert [row[:3] for row in rows] == [
        ("in/a", f"{tmp_path}/in/a.mp4", "3"),
        ("b", f"{tmp_path}/b.mp4", "0"),
    ]


def test_stretches_in_a_list(tmp_path):
    make(tmp_path, "in/a.mp4")
    rows, said = rows_of(
        tmp_path,
        "end, start, path, fps, label, id\n1.5,0,in/a.mp4,30\n"
        " 8.566666666666666 ,1.5, in/a.mp4,30, grasp\n"
        ",8.566666666666666,in/a.mp4\n3,,in/a.mp4,30,,my/name\n",
    )
    path = str(tmp_path / "in" / "a.mp4")
    assert rows == [
        ("in/a@0-1.5", path, None, 0.0, 1.5),
        ("in/a@1.5-8.567", path, "grasp", 1.5, 8.566666666666666),
        ("in/a@8.567-end", path, None, 8.566666666666666, None),
        ("my/name", path, None, None, 3.0),
    ]
    assert any("columns not used: fps" in line for line in said)


def test_bad_rows_are_left_out_and_named(tmp_path):
    make(tmp_path, "a.mp4")
    text = "path,start,end\na.mp4,3,2\na.mp4,1,2\n../b.mp4\nno,1,2\na.mp4,x,2\na.mp4,-1,2\n"
    text += "a.mp4,nan\n,1,2\na.mp4,1,2,3,4\n"
    rows, said = rows_of(tmp_path, text)
    assert [row[0] for row in rows] == ["a@1-2"]
    (line,) = [line for line in said if "rows not used" in line]
    assert (
        "8 rows not used: line 2: start 3.0 is not before end 2.0; line 4: '../b.mp4' leaves"
        in line
    )
    assert "line 5: 'no' is no path of a video; ..." in line
    for text, message in (
        ("a.txt\nb.jpg\n", "line 1: 'a.txt' is no path of a video; line 2"),
        ("path,label\n", "is empty"),
        ("a.mp4,1,2\n", "3 fields for the columns path,label"),
        ("\n \n", "is empty"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            rows_of(tmp_path, text)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="holds the id 'a@1-2' twice"):
        rows_of(tmp_path, "path,start,end\na.mp4,1,2\na.mp4,1.0,2\n")


# ------------------------------------------------------------------------ what else --data may be


@pytest.mark.parametrize(
    "inside",
    [
        "videos",
        "videos/cam",
        "videos/cam/chunk-000",
        "meta/info.json",
        "videos/cam/chunk-000/file-000.mp4",
        "..",
    ],
)
def test_a_lerobot_data_set_is_called_one(tmp_path, inside):
    folder = tmp_path / "all" / "set"
    make(folder, "meta/info.json", "videos/cam/chunk-000/file-000.mp4")
    with pytest.raises(
        InputError, match=r"is of a LeRobot data set .* give --data \S*all/set, which is read"
    ) as caught:
        load_split(str(folder / inside) if inside != ".." else str(folder.parent), "train")
    assert "\n" not in str(caught.value)


def test_a_list_beside_a_lerobot_data_set_is_used(tmp_path):
    make(tmp_path, "meta/info.json", "videos/cam/chunk-000/file-000.mp4")
    (tmp_path / "train.csv").write_text("path,start,end\nvideos/cam/chunk-000/file-000.mp4,0,2\n")
    for given in (tmp_path, tmp_path / "train.csv"):
        assert load_split(str(given), "train")[0].start == 0


def test_files_that_are_no_list_are_called_what_they_are(tmp_path):
    make(tmp_path, "a.mov")
    (tmp_path / "labels.json").write_text('{"a": "b"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "pages.csv").write_bytes(b"\xff\xfe\x00\x01")
    for name, message in (
        ("a.mov", "is a video; --data names the folder it lies in"),
        ("labels.json", "is JSON, but no list of videos"),
        ("broken.json", "is not readable as JSON"),
        ("pages.csv", "is not a readable CSV list"),
    ):
        with pytest.raises(InputError, match=message):
            load_split(str(tmp_path / name), "train")


def test_one_file_under_two_names_is_one_video(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    os.link(tmp_path / "b.mp4", tmp_path / "twin.mp4")
    found, unused = search(str(tmp_path))
    assert set(found) == {"a", "b"}
    assert unused == {
        "under two names": ["link: the file is that of a", "twin: the file is that of b"]
    }


@pytest.mark.parametrize(
    "train, validation", [("Train", "Validation"), ("training", "val"), ("TRAIN", "valid")]
)
def test_folders_of_splits_have_many_names(tmp_path, train, validation):
    make(tmp_path, f"{train}/a.mp4", f"{validation}/b.mp4")
    rows = [load_split(str(tmp_path), split) for split in ("train", "validation")]
    assert [[row.id for row in part] for part in rows] == [[f"{train}/a"], [f"{validation}/b"]]
    (tmp_path / "validation").mkdir(exist_ok=True)
    if validation not in ("validation", "Validation"):
        with pytest.raises(InputError, match="which is the split 'validation'"):
            load_split(str(tmp_path), "train")


def test_a_test_folder_alone_is_not_trained_on(tmp_path):
    make(tmp_path, *(f"{i}.mp4" for i in range(40)), "test/t.mp4")
    said = []
    rows = [load_split(str(tmp_path), split, log=said.append) for split in ("train", "validation")]
    assert not any("test" in row.id for part in rows for row in part)
    assert "1 file not used: 1 in test/ (test/t)" in said


def test_an_opened_quote_does_not_swallow_lines(tmp_path):
    make(tmp_path, *(f"{i}.mp4" for i in range(6)))
    path = tmp_path / "train.csv"
    path.write_text('path,label\n0.mp4,"pick\n1.mp4,b\n2.mp4,"\n3.mp4,d\n')
    said = []
    rows = load_split(str(tmp_path), "train", log=said.append)
    assert [row.id for row in rows] == ["3"]
    assert any("an opened quote takes in the lines after it" in line for line in said)
    path.write_text('path,label\n0.mp4,"pick\n1.mp4,b\n')
    with pytest.raises(InputError, match="is not a readable CSV list"):
        load_split(str(tmp_path), "train")
    path.write_text("path,video\n0.mp4,1.mp4\n")
    with pytest.raises(InputError, match="names a column twice"):
        load_split(str(tmp_path), "train")


def test_stretches_that_share_frames_are_not_held_out(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "train.csv").write_text("path,start,end\na.mp4,0,2\nb.mp4,1,\n")
    held_out = tmp_path / "validation.csv"
    held_out.write_text("path,start,end\na.mp4,2,3\nb.mp4,0,1\n")
    assert len(load_split(str(tmp_path), "validation")) == 2
    for row in ("a.mp4,1.5,3", "a.mp4,,", "b.mp4,5,6"):
        held_out.write_text(f"path,start,end\n{row}\n")
        with pytest.raises(
            InputError, match="in the split 'validation' as .* and in the split 'train' as"
        ):
            load_split(str(tmp_path), "validation")


@pytest.mark.parametrize("alias", ["link.mp4", "twin.mp4", "way/a.mp4", "copy.mp4"])
def test_shared_frames_are_seen_under_every_name_of_a_file(tmp_path, alias):
    make(tmp_path, "v/a.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "v" / "a.mp4")
    os.link(tmp_path / "v" / "a.mp4", tmp_path / "twin.mp4")
    (tmp_path / "way").symlink_to("v")
    shutil.copy(tmp_path / "v" / "a.mp4", tmp_path / "copy.mp4")
    (tmp_path / "train.csv").write_text("path,start,end\nv/a.mp4,0,3\n")
    (tmp_path / "validation.csv").write_text(f"path,start,end\n{alias},0.5,3.5\n")
    with pytest.raises(InputError, match="in the split 'train' as 'v/a@0-3', from 0.5 s on"):
        load_split(str(tmp_path), "validation")
    (tmp_path / "validation.csv").write_text(f"path,start,end\n{alias},3,3.5\n")
    assert len(load_split(str(tmp_path), "validation")) == 1


def test_shared_frames_are_seen_between_lists_of_both_kinds(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "train.json").write_text('[{"id": "a"}]')
    (tmp_path / "validation.csv").write_text("path,start,end\na.mp4,1,2\n")
    with pytest.raises(InputError, match="in the split 'train' as 'a', from 1 s on"):
        load_split(str(tmp_path), "validation")
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.csv").write_text("path,start,end\na.mp4,1,2\n")
    (tmp_path / "validation.json").write_text('[{"id": "b"}, {"id": "a"}]')
    (tmp_path / "validation.csv").unlink()
    with pytest.raises(InputError, match="in the split 'train' as 'a@1-2', from 1 s on"):
        load_split(str(tmp_path), "validation")


def test_what_a_list_by_itself_cannot_tell_is_said(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "some.csv").write_text("path,start,end\na.mp4,1,2\n")
    said = []
    load_split(str(tmp_path / "some.csv"), "train", log=said.append)
    assert any("share frames with those of another list is not looked at" in line for line in said)
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}.csv").write_text("path,start,end\na.mp4,1,2\n")
        said.clear()
        (tmp_path / "some.csv").unlink(missing_ok=True)
        load_split(str(tmp_path), split, str(tmp_path / split), said.append)
        assert any(
            "share frames with those of another list is not looked at" in line for line in said
        )


def test_keys_that_a_json_list_does_not_have(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "train.json").write_text(
        '[{"id": "a", "fps": 3, "template": "x", "start_time": 1}]'
    )
    said = []
    load_split(str(tmp_path), "train", log=said.append)
    assert any("keys not used: fps, start_time" in line for line in said)
    (tmp_path / "train.json").write_text('[{"id": "a"}, {"id": "a", "start": 0, "end": 1}]')
    with pytest.raises(InputError, match="row 1 is a stretch of a video; a JSON list has none"):
        load_split(str(tmp_path), "train")


def test_a_first_line_of_names_names_the_videos(tmp_path):
    make(tmp_path, "a.mp4")
    for name in ("file", "File_Name", "video_path"):
        rows, _ = rows_of(tmp_path, f"{name},start\na.mp4,2\n")
        assert [(row[0], row[3]) for row in rows] == [("a@2-end", 2.0)]
    with pytest.raises(
        InputError, match="names the columns clip,start in its first line, but none"
    ):
        rows_of(tmp_path, "clip,start\na.mp4,2\n")


@pytest.mark.parametrize(
    "train, other",
    [
        ("videos/train", "videos/val"),
        ("train_256", "val_256"),
        ("train_videos", "test_videos"),
        ("training_set", "valset"),
        ("videos/train", "videos/dev"),
        ("videos/train", "videos/held_out"),
        ("Train videos", "Test videos"),
        ("raw/train set", "raw/val set"),
    ],
)
def test_splits_that_lie_elsewhere_are_not_mixed(tmp_path, train, other):
    make(tmp_path, *(f"{part}/{i}.mp4" for part in (train, other) for i in range(20)))
    with pytest.raises(InputError, match="holds folders called .*, and no list"):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize(
    "train, other",
    [
        ("train_list.csv", "val_list.csv"),
        ("k400_train.csv", "k400_val.csv"),
        ("trainlist01.txt", "testlist01.txt"),
        ("training.csv", "val.csv"),
        ("train.jsonl", "dev.jsonl"),
        ("ucf/trainlist01.txt", "ucf/testlist01.txt"),
        ("annotations/kinetics_train_list.TXT", "annotations/kinetics_val_list.TXT"),
    ],
)
def test_lists_by_other_names_are_not_passed_over(tmp_path, train, other):
    make(tmp_path, *(f"{i}.mp4" for i in range(40)))
    assert len(load_both(tmp_path)[0]) == 40
    # of a video each
    make(
        tmp_path,
        *(f"{name}{suffix}" for name in ("train_toy", "test_tube") for suffix in (".mp4", ".json")),
    )
    assert len(load_both(tmp_path)[0]) == 42
    make(tmp_path, train, other)
    with pytest.raises(
        InputError, match="which are not read under these names .*; lists are train.json"
    ):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize("column", ["split", "set"])
def test_a_column_of_splits_is_not_passed_over(tmp_path, column):
    make(tmp_path, "a.mp4", "b.mp4")
    rows, _ = rows_of(tmp_path, f"path,{column}\na.mp4,train\nb.mp4,train\n")
    assert len(rows) == 2
    with pytest.raises(InputError, match=f"has a column {column} of train, val, which is not read"):
        rows_of(tmp_path, f"path,{column}\na.mp4,train\nb.mp4,val\n")


def test_rows_of_one_video_under_several_ids_are_said(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    rows, said = rows_of(tmp_path, "path,id,start\na.mp4,0,\na.mp4,1,\nb.mp4,2,\na.mp4,3,2\n")
    assert len(rows) == 4 and any(
        "1 rows name a video (or stretch of one) that another row names, too" in line
        for line in said
    )


def test_a_list_called_after_a_split_is_that_split(tmp_path):
    make(tmp_path, *(f"{i}.mp4" for i in range(40)))
    (tmp_path / "val.csv").write_text("".join(f"{i}.mp4\n" for i in range(40)))
    assert len(load_split(str(tmp_path / "val.csv"), "validation")) == 40
    with pytest.raises(
        InputError,
        match="is, by its name, the list of the split 'validation', and 'train' is asked for",
    ):
        load_split(str(tmp_path / "val.csv"), "train")


def test_lists_beside_the_code_are_for_their_own_videos(tmp_path, monkeypatch):
    beside, folder = tmp_path / "code" / "ssv2", tmp_path / "own"
    monkeypatch.setattr("salt.splits.BESIDE_CODE", str(beside))
    make(folder, *(f"{i}.mp4" for i in range(30)))
    make(beside)
    beside.mkdir(parents=True)
    (beside / "train.json").write_text(json.dumps([{"id": str(i)} for i in range(20, 90)]))
    with pytest.raises(
        InputError, match="lists 70 videos, of which .*own holds 10: say --splits_dir"
    ):
        load_split(str(folder), "train")
    assert len(load_split(str(folder), "train", str(beside))) == 70
    (beside / "train.json").write_text(json.dumps([{"id": str(i)} for i in range(35)]))
    assert len(load_split(str(folder), "train")) == 35
    make(folder, "train/x.mp4", "validation/y.mp4")
    assert [row.id for row in load_split(str(folder), "train")] == ["train/x"]


def test_shared_frames_are_looked_for_in_all_splits(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    for split, rows in (
        ("train", "a.mp4,0,3.5"),
        ("validation", "a.mp4,2,4\nb.mp4,2,4"),
        ("test", "a.mp4,3,4\nb.mp4,2.2,4.2"),
    ):
        (tmp_path / f"{split}.csv").write_text(f"path,start,end\n{rows}\n")
    for split, other in (("train", "validation"), ("validation", "train"), ("test", "train")):
        with pytest.raises(
            InputError, match=f"in the split '{split}' as .* and in the split '{other}' as"
        ):
            load_split(str(tmp_path), split)
    (tmp_path / "train.csv").write_text("path,start,end\na.mp4,0,2\n")
    with pytest.raises(
        InputError, match="in the split 'test' as .* and in the split 'validation' as"
    ):
        load_split(str(tmp_path), "test")
    shutil.copy(tmp_path / "validation.csv", tmp_path / "test.csv")
    # one list for both
    assert (
        len(load_split(str(tmp_path), "validation")) == len(load_split(str(tmp_path), "test")) == 2
    )


def test_lists_elsewhere_are_the_lists(tmp_path):
    """--splits_dir is obeyed or refused, whatever else there is."""
    folder, mine = tmp_path / "data", tmp_path / "mine"
    make(folder, *(f"{i}.mp4" for i in range(40)))
    (folder / "train.json").write_text(json.dumps([{"id": str(i)} for i in range(30)]))
    make(mine, "my_train.csv")
    with pytest.raises(
        InputError, match="no list for the split 'train': looked for train.json.* in --splits_dir"
    ):
        load_split(str(folder), "train", str(mine))
    (mine / "train.json").write_text(json.dumps([{"id": str(i)} for i in range(5)]))
    assert len(load_split(str(folder), "train", str(mine))) == 5
    with pytest.raises(InputError, match="no list for the split 'validation'"):
        load_split(str(folder), "validation", str(mine))
    (folder / "all.csv").write_text("0.mp4\n")
    with pytest.raises(InputError, match="is a list itself; leave --splits_dir out"):
        load_split(str(folder / "all.csv"), "train", str(mine))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("a.mp4,train\nb.mp4,val\n", "has a column label of train, val"),
        ("a.mp4 Train\nb.mp4 Test\n", "has a column label of test, train"),
        (
            "path,start_time,end_time\na.mp4,0,1\n",
            "has a column start_time, which is not read: call it start or end, in seconds",
        ),
        ("path,t_end\na.mp4,1\n", "has a column t_end"),
    ],
)
def test_columns_that_mean_a_split_or_a_stretch_are_not_passed_over(tmp_path, text, problem):
    make(tmp_path, "a.mp4", "b.mp4")
    with pytest.raises(InputError, match=problem):
        rows_of(tmp_path, text)


def test_videos_called_after_splits_are_not_mixed(tmp_path):
    make(tmp_path, *(f"{split}_{i}.mp4" for split in ("train", "val") for i in range(20)))
    with pytest.raises(
        InputError, match="are called after splits, as 'train_0', and there is no list"
    ):
        load_split(str(tmp_path), "train")
    make(tmp_path, "other.mp4")
    assert len(load_both(tmp_path)[0]) == 41


def test_links_into_a_folder_beside_the_splits_are_the_splits(tmp_path):
    make(tmp_path, *(f"all/{i}.mp4" for i in range(6)))
    for split, numbers in (("train", range(4)), ("validation", range(3, 6))):
        (tmp_path / split).mkdir()
        for i in numbers:
            (tmp_path / split / f"{i}.mp4").symlink_to(tmp_path / "all" / f"{i}.mp4")
    assert [row.id for row in load_split(str(tmp_path), "train")] == [
        f"train/{i}" for i in range(4)
    ]
    # 3 is in train/
    assert [row.id for row in load_split(str(tmp_path), "validation")] == [
        "validation/4",
        "validation/5",
    ]


def test_class_folders_may_have_such_words(tmp_path):
    make(
        tmp_path, *(f"{name}/{i}.mp4" for name in ("training dog", "crash test") for i in range(20))
    )
    assert len(load_both(tmp_path)[0]) == 40


def test_rounding_is_no_shared_frame(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "train.csv").write_text(f"path,start,end\na.mp4,{12 * 0.1},{12 * 0.1 + 0.1}\n")
    (tmp_path / "validation.csv").write_text(f"path,start,end\na.mp4,{13 * 0.1},{14 * 0.1}\n")
    assert 12 * 0.1 + 0.1 > 13 * 0.1
    assert len(load_split(str(tmp_path), "validation")) == 1
