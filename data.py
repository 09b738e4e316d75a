"""Videos: which there are, how a clip is cut out of one, patches, and batches for training.

av is imported only where a video is decoded, so that training from a cache with clips runs without
it.
"""

import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

import ops
from cache import fingerprint, source_mark
from config import InputError
from views import View, frame_numbers, grid_of, random_half, sample_id  # noqa: F401  public here

SPLITS = ("train", "validation", "test")
# What FFmpeg's demuxers read as video, less what is mostly sound, pictures or games. A file's
# content decides how it is read; its suffix only whether it is taken for a video.
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .webm .mkv .avi .mpg .mpeg .ts .mts .m2ts .m2t .vob .wmv .asf .flv .f4v .ogv "
    ".3gp .3g2 .mj2 .mxf .nut .dv .rm .ivf .y4m .gif .m1v .m2v .h264 .264 .hevc .h265 .265 "
    ".mjpeg .mjpg".split()
)
VIDEO_FOLDERS = ("", "videos", "20bn-something-something-v2")
MAX_PIXELS = 64 * 2**20  # a frame larger than this is taken for a broken header
# of packets, kept between counting and decoding; a larger video is read twice
HELD_BYTES = 64 * 2**20


class VideoError(InputError):
    """A video that gives no clip; the message says which and why."""


# -------------------------------------------------------------------------------------------- lists


class Row(NamedTuple):
    id: str
    path: str | None  # None where the list names a video that the folder lacks
    label: str | None  # SSv2: the template without brackets; None in unlabelled lists
    start: float | None = None  # seconds from the file's first frame on: the row is this
    end: float | None = None  # stretch of it; None: from the beginning, to the end


def list_names(split):
    return [
        *(
            f"{place}{name}{split}.json"
            for place in ("", "labels/")
            for name in ("", "something-something-v2-")
        ),
        f"{split}.csv",
    ]


# where SSv2's own lists may lie
BESIDE_CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ssv2")


def find_list(folder, split, splits_dir=None):
    """The list file of `split`: in splits_dir, where that is given; else in the data folder or,
    where that has neither lists nor subfolders of splits, in BESIDE_CODE; or None.
    """

    def first_of(place, split):
        paths = [os.path.join(place, name) for name in list_names(split)] if place else ()
        return next(filter(os.path.isfile, paths), None)

    if splits_dir:
        return first_of(splits_dir, split)
    found = first_of(folder, split)
    if found or any(first_of(folder, other) for other in SPLITS) or split_folders(folder):
        return found
    return first_of(BESIDE_CODE, split)


def load_split(folder, split, splits_dir=None, log=lambda line: None):
    """The rows of one split, in list order, each with .id .path .label .start .end.

    folder      SSv2: a list (train.json, something-something-v2-train.json, labels/train.json;
                or train.csv, see read_csv) beside the videos, which lie in the folder itself,
                videos/ or 20bn-something-something-v2/.
                Without a list: a folder of videos, see search; its subfolder named by the split,
                or else a tenth of the ids, drawn by their hash, as 'validation' and the rest as
                'train'. A CSV file itself is split in the same way.
    split       'train', 'validation' or 'test'; 'train+validation', as a merged cache has it, is
                one after the other
    log         called with a line on the file that was used, and one on what was not used and why
    Raises InputError, naming file and row, on a missing or malformed list, an id that is no plain
    name, or no video at all.
    """
    if "+" in split:
        rows = [
            row for part in split.split("+") for row in load_split(folder, part, splits_dir, log)
        ]
        if len({row.id for row in rows}) < len(rows):
            raise InputError(f"the splits {split} of {folder} share ids")
        return rows
    folder = os.path.expanduser(folder)
    if os.path.isfile(folder):
        check_list_file(folder)
        if splits_dir:
            raise InputError(
                f"--data {folder} is a list itself; leave --splits_dir out, or give the folder of"
                " the videos as --data"
            )
        rows, own = read_csv(folder, log=log), split_of_name(folder)
        if own and own != split:
            raise InputError(
                f"--data {folder} is, by its name, the list of the split {own!r}, and {split!r} is"
                " asked for; give the folder, with a list a split, or another name"
            )
        count = len(rows)
        rows = rows if own else hashed_split(rows, split)
        left = (
            ""
            if own
            else f", split by a hash of the id; {count - len(rows)} rows are the other split's"
        )
        log(f"{split}: {len(rows)} rows of {folder}{left}")
    elif not os.path.isdir(folder):
        raise InputError(
            f"there is no data folder {folder}; --data names the folder that holds the videos and"
            " their lists"
        )
    elif path := find_list(folder, split, splits_dir):
        rows = read_list(path, folder, log)
        here = sum(row.path is not None for row in rows)
        if path.startswith(BESIDE_CODE + os.sep) and not splits_dir and here < len(rows) / 2:
            raise InputError(
                f"{path}, beside the code, lists {len(rows)} videos, of which {folder} holds"
                f" {here}: say --splits_dir {BESIDE_CODE} if it is meant, else move it away"
            )
        log(f"{split}: {len(rows)} rows of {path}")
    elif splits_dir or any(find_list(folder, other) for other in SPLITS):
        places = (
            f"--splits_dir {splits_dir}" if splits_dir else f"{folder} and ssv2/ beside the code"
        )
        names = ", ".join(list_names(split))
        raise InputError(f"no list for the split {split!r}: looked for {names} in {places}")
    else:
        rows = rows_without_list(folder, split, log)
    if not rows:
        raise InputError(
            f"no video of {folder} falls into the split {split!r}: without lists a tenth is held"
            " out by a hash of the name, and these are too few; make subfolders train/ and"
            " validation/, or train.csv and validation.csv"
        )
    if not any(row.path for row in rows):
        raise InputError(
            f"none of the {len(rows)} videos of the split {split!r} is in {folder}; looked in it,"
            f" {' and '.join(f'{name}/' for name in VIDEO_FOLDERS[1:])} for"
            f" {' '.join(VIDEO_SUFFIXES)}"
        )
    refuse_shared_frames(folder, split, splits_dir, rows, log)
    seen = set()
    for row in rows:
        if row.id in seen:
            raise InputError(
                f"the split {split!r} of {folder} holds the id {row.id!r} twice; "
                "ids must be unique (a CSV may have a column `id`)"
            )
        seen.add(row.id)
    places = [row[1:2] + row[3:] for row in rows if row.path]  # path, start, end
    if again := len(places) - len(set(places)):
        log(
            f"{split}: {again} rows name a video (or stretch of one) that another row names, too: "
            "each counts as a video of its own, also in intervals"
        )
    return rows


def split_of_name(path):
    """The split that a list is called after, val.csv or my_train.csv; None of a name that has a
    word for none, or for two.
    """
    words = splits_in([os.path.splitext(os.path.basename(path))[0]])
    return next(iter(words)) if len(words) == 1 else None


def read_list(path, folder, log=lambda line: None):
    if path.endswith(".csv"):
        return read_csv(path, folder, log)
    return read_json(path, find_videos(folder, log), log)


def is_stretch(row):
    return row.start is not None or row.end is not None


def refuse_shared_frames(folder, split, splits_dir, rows, log):
    """Raises InputError where frames of a split are in another split's list, whatever names lead to
    their file. What one list cannot tell is logged."""
    others = []  # (split, its rows)
    if os.path.isfile(folder):
        if not split_of_name(folder):
            other = "train" if split == "validation" else "validation"
            others.append((other, hashed_split(read_csv(folder), other)))
    else:
        for other in SPLITS:
            path = find_list(folder, other, splits_dir) if other != split else None
            # Where neither has stretches, equal frames are equal clips, which fingerprints tell.
            if path and (path.endswith(".csv") or any(map(is_stretch, rows))):
                others.append((other, read_list(path, folder)))
    counterpart = "validation" if split == "train" else "train"
    alone = os.path.isfile(folder) or counterpart not in (other for other, _ in others)
    if alone and any(map(is_stretch, rows)):
        log(
            f"whether stretches of {folder} share frames with those of another list is not "
            "looked at; put train.csv and validation.csv into one folder, and it is"
        )
    # A look at every file, which takes a minute over a network, only where there are stretches.
    stretched = any(map(is_stretch, itertools.chain(rows, *(found for _, found in others))))
    key = functools.cache(content_of) if stretched else str
    stretches = {}
    for other, found in others:
        for row in found:
            if row.path:
                stretches.setdefault(key(row.path), []).append((other, row))
    for row in rows:
        for other, twin in stretches.get(key(row.path), ()) if stretches and row.path else ():
            if "train" not in (split, other) and row[1:] == twin[1:]:
                continue  # a test list may be the validation list
            if overlap(row, twin):
                raise InputError(
                    f"{row.path} is in the split {split!r} as {row.id!r} and in the split {other!r}"
                    f" as {twin.id!r}, from {max(row.start or 0, twin.start or 0):g} s on in both:"
                    " held-out frames are none that were trained on"
                )


def overlap(one, other):
    """Whether two Rows of one file have frames in common: a millisecond, to which lists round, is
    none.
    """
    ends = [row.end for row in (one, other) if row.end is not None]
    return max(one.start or 0, other.start or 0) + 1e-3 < min(ends, default=math.inf)


def content_of(path):
    """What tells a file from any but its copies: its size, and a hash of sixteen places in it; its
    path where it cannot be read.
    """
    if not os.path.isfile(path):
        return path
    try:
        with open(path, "rb") as file:
            digest, size = hashlib.sha256(), file.seek(0, os.SEEK_END)
            for place in range(16):
                file.seek(max(0, size - (1 << 16)) * place // 15)
                digest.update(file.read(1 << 16))
    except OSError:
        return path
    return size, digest.digest()


def file_of(path):
    """What a file is, whatever its names are: (device, inode)."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_list_file(path):
    """Raises InputError, saying what it is, where a file given as --data is no CSV list."""
    if path.lower().endswith(VIDEO_SUFFIXES):
        refuse_lerobot(path)
        raise InputError(
            f"--data {path} is a video; --data names the folder it lies in, or a CSV list of paths"
        )
    if path.lower().endswith(".json"):
        refuse_lerobot(path)
        try:
            with open(path, encoding="utf-8") as file:
                is_list = isinstance(json.load(file), list)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--data {path} is not readable as JSON: {error}") from None
        what = "a list; --data names" if is_list else "JSON, but no list of videos; --data names"
        raise InputError(
            f"--data {path} is {what} the folder of the videos, "
            "and --splits_dir that of their lists"
        )


def refuse_lerobot(path):
    """Raises InputError where a LeRobot data set holds this path, up to four folders above."""
    for _ in range(5):
        info = os.path.join(path, "meta", "info.json")
        if os.path.isfile(info):
            raise InputError(
                f"{path} is a LeRobot data set ({info}), whose video files may hold many episodes "
                "each; give --data a CSV with the columns path,start,end, an episode a row "
                "(docs/TROUBLESHOOTING.md makes it)"
            )
        path = os.path.dirname(os.path.abspath(path))


def rows_without_list(folder, split, log):
    """The rows of a split of a folder of videos: its subfolder, or a part by a hash of the id."""
    refuse_lerobot(folder)
    found, unused = search(folder)
    parts = split_folders(folder)
    in_parts = split in parts or "train" in parts or "validation" in parts
    if in_parts and split not in parts:
        raise InputError(
            f"{folder} has {' and '.join(f'{name}/' for name in parts.values())}, "
            f"but no subfolder {split}/ and no list; "
            f"put the videos of the split {split!r} there"
        )
    if in_parts:
        outside = [name for name in found if name.partition("/")[0] not in parts.values()]
        if outside:
            unused[f"outside {', '.join(f'{name}/' for name in parts.values())}"] = outside
        found = {name: path for name, path in found.items() if name.startswith(f"{parts[split]}/")}
    elif parts:  # test/ alone
        outside = [name for name in found if name.startswith(f"{parts['test']}/")]
        unused[f"in {parts['test']}/"] = outside
        found = {name: path for name, path in found.items() if name not in set(outside)}
    if not in_parts:
        refuse_hidden_splits(folder, found, unused)
    place = os.path.join(folder, parts[split]) if in_parts else folder
    log(
        f"{split}: {len(found)} videos of {place} and its subfolders (no list)"
        f"{'' if in_parts else ', to be split by a hash of the id'}"
    )
    log_unused(unused, log)
    if not found:
        raise InputError(
            f"found no video in {place} and its subfolders; looked for {' '.join(VIDEO_SUFFIXES)}"
            f"{unused_line(unused, '; ')}"
        )
    rows = [Row(name, path, None) for name, path in sorted(found.items())]
    return rows if in_parts else hashed_split(rows, split)


SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "val", "valid"), "validation")
SPLIT_WORDS = SPLIT_NAMES | dict.fromkeys(("dev", "eval", "heldout"), "validation")
LIST_SUFFIXES = (".csv", ".json", ".jsonl", ".txt", ".tsv", ".lst", ".pkl")
SPLIT_WORD = re.compile(rf"({'|'.join(SPLIT_WORDS)})(?:set|list)?\d*")


def splits_in(names):
    """{split: the first of `names` that has a word for it}: of videos/train, val_256,
    k400_train.csv, testlist01.txt.
    """
    found = {}
    for name in sorted(names):
        name = re.sub(r" (videos?|clips?|set|data|split)\b", "", name, flags=re.IGNORECASE)
        for word in re.split(r"[-_./]", re.sub("held[-_. ]out", "heldout", name.lower())):
            if match := SPLIT_WORD.fullmatch(word):
                found.setdefault(SPLIT_WORDS[match[1]], name)
    return found


def refuse_hidden_splits(folder, found, unused):
    """Raises InputError where a split by a hash would mix what looks like splits of its own:
    folders as videos/train and videos/val, or lists by other names than those that are looked
    for."""
    folders = splits_in({os.path.dirname(name) for name in found})
    stems = {os.path.basename(name) for name in found}
    files = (os.path.splitext(name) for name in unused.get(NO_VIDEO, ()))
    lists = splits_in(
        stem + suffix
        for stem, suffix in files
        if suffix.lower() in LIST_SUFFIXES and os.path.basename(stem) not in stems
    )
    firsts = [splits_in([re.split("[-_.]", stem)[0]]) for stem in stems]  # train_00.mp4, val_00.mp4
    if all(firsts) and len({next(iter(first)) for first in firsts}) > 1:
        raise InputError(
            f"the videos of {folder} are called after splits, as {min(stems)!r}, and there is no"
            " list: write train.csv and validation.csv, or put them into subfolders train/ and"
            " validation/"
        )
    if len(folders) > 1:
        raise InputError(
            f"{folder} holds folders called {' and '.join(sorted(folders.values()))}, and no list:"
            " splits are the subfolders train/, validation/ (or val/) and test/ of --data itself;"
            " name the folder that they are in, or rename them, or write train.csv and"
            " validation.csv"
        )
    if len(lists) > 1:
        raise InputError(
            f"{folder} holds {' and '.join(sorted(lists.values()))}, which are not read under these"
            " names (move them away, if they are no lists); lists are"
            f" {', '.join(list_names('train')[:2])} or train.csv, and likewise for validation and"
            " test"
        )


def split_folders(folder):
    """{split: name of its subfolder} of those that a folder of videos has."""
    parts = {}
    for name in sorted(os.listdir(folder)):
        split = SPLIT_NAMES.get(name.lower())
        if split and os.path.isdir(os.path.join(folder, name)):
            if split in parts:
                raise InputError(
                    f"{folder} has {parts[split]}/ and {name}/: which is the split {split!r}?"
                )
            parts[split] = name
    return parts


NO_VIDEO = "with suffixes that are no video"


def search(folder):
    """The videos in a folder and all its subfolders: ({id: path}, {why not used: names}).

    An id is the path from the folder on, without suffix. What is hidden is passed over. Links are
    followed, and each folder and file is taken once, however many ways lead to it, so that a video
    does not come under two ids. Raises InputError where a LeRobot data set is among them.
    """
    found, unused, visited = {}, {}, set()

    def leave_out(why, name):
        unused.setdefault(why, []).append(name)

    def unreadable(error):
        leave_out("that cannot be read", os.path.relpath(error.filename, folder))

    for place, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if file_of(place) in visited:
            leave_out("folder that another name leads to", os.path.relpath(place, folder))
            subfolders.clear()
            continue
        visited.add(file_of(place))
        if os.path.isfile(os.path.join(place, "meta", "info.json")):
            refuse_lerobot(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.relpath(os.path.join(place, name), folder)
            stem, suffix = os.path.splitext(path)
            if suffix.lower() not in VIDEO_SUFFIXES:
                leave_out(NO_VIDEO, path)
            elif not is_clean(stem):
                leave_out("with control characters or broken UTF-8 in their names", ascii(path))
            elif stem in found:
                leave_out("of equal ids", f"{path}: {os.path.basename(found[stem])} has that id")
            else:
                found[stem] = os.path.join(place, name)
    # what is in them is taken under the name that it has there
    parts = split_folders(folder).values()
    for stem, other in same_files(
        dict(sorted(found.items(), key=lambda entry: entry[0].partition("/")[0] not in parts))
    ):
        leave_out("under two names", f"{stem}: the file is that of {other}")
        del found[stem]
    return found, unused


def same_files(found):
    """(name, the name before it) of {name: path} where two paths lead to one file."""
    taken = {}
    for name, path in list(found.items()):
        if os.path.isfile(path):
            first = taken.setdefault(file_of(path), name)
            if first != name:
                yield name, first


def unused_line(unused, before=""):
    """'3 files not used: 1 of equal ids (b.mp4: b.avi has that id), ...'; '' where none are."""
    if not unused:
        return ""
    reasons = []
    for why, names in unused.items():
        if why == NO_VIDEO:
            names = [os.path.splitext(name)[1] or os.path.basename(name) for name in names]
        examples = list(dict.fromkeys(names))
        shown = ", ".join(examples[:3]) + (", ..." if len(examples) > 3 else "")
        reasons.append(f"{len(names)} {why} ({shown})")
    count = sum(map(len, unused.values()))
    return f"{before}{count} {'file' if count == 1 else 'files'} not used: {', '.join(reasons)}"


def log_unused(unused, log):
    if unused:
        log(unused_line(unused))


def find_videos(folder, log=lambda line: None):
    """{id: path} of the videos that a list of plain ids can name: those in VIDEO_FOLDERS."""
    found, equal = {}, []
    for place in [os.path.join(folder, name) for name in VIDEO_FOLDERS]:
        for entry in (
            sorted(os.scandir(place), key=lambda entry: entry.name) if os.path.isdir(place) else ()
        ):
            stem, suffix = os.path.splitext(entry.name)
            if (
                suffix.lower() in VIDEO_SUFFIXES
                and found.setdefault(stem, entry.path) != entry.path
            ):
                equal.append(f"{entry.path}: {found[stem]} has that id")
    log_unused({"of equal ids": equal} if equal else {}, log)
    return found


def hashed_split(rows, split):
    if split not in ("train", "validation"):
        raise InputError(f"data without lists has the splits train and validation, not {split!r}")

    def held_out(row):
        return hashlib.sha256(row.id.encode()).digest()[0] < 26

    return [row for row in rows if held_out(row) == (split == "validation")]


def is_clean(name):
    """Whether a name has no control characters and no broken UTF-8: it fits into a line."""
    return not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name)


def check_id(name, where):
    if not name or name in (".", "..") or re.search(r"[/\\]", name) or not is_clean(name):
        raise InputError(
            f"{where}: the id {name!r} is no plain file name; an id has no slashes, control"
            " characters or broken UTF-8, with which it could leave the video folder"
        )
    return name


def read_json(path, videos, log=lambda line: None):
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not a readable JSON list: {error}") from None
    if not isinstance(entries, list):
        raise InputError(
            f"{path} holds {'an object' if isinstance(entries, dict) else type(entries).__name__},"
            " as a label table "
            f'does; a split list is a JSON list of objects with an "id"'
        )
    rows, keys = [], set()
    for number, entry in enumerate(entries):
        where = f"{path}, row {number}"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("id"), (str, int))
            or isinstance(entry["id"], bool)
        ):
            raise InputError(f'{where}: {json.dumps(entry)[:80]} is not an object with an "id"')
        if "start" in entry or "end" in entry:
            raise InputError(
                f"{where} is a stretch of a video; a JSON list has none: use a CSV with the columns"
                " path,start,end,label"
            )
        keys |= entry.keys()
        name = check_id(str(entry["id"]), where)
        label = entry.get("template", entry.get("label"))
        if label is not None and not isinstance(label, str):
            raise InputError(f"{where}: the label {label!r} is not a string")
        rows.append(Row(name, videos.get(name), label and label.replace("[", "").replace("]", "")))
    if not rows:
        raise InputError(f"{path} is empty; a split list has a row a video")
    if ignored := sorted(keys - {"id", "template", "label", "placeholders"}):
        log(f"{path}: keys not used: {', '.join(ignored)}; those that are: id, template, label")
    return rows


PATH_COLUMNS = ("path", "video", "filename", "file", "file_name", "filepath", "video_path")


def read_csv(path, folder=None, log=lambda line: None):
    """Rows of a CSV list. Relative paths start from the data folder and may not leave it.

    A first line may name the columns, in any order: path (or one of PATH_COLUMNS), label, start and
    end in seconds, id. Without it a row is a path and an optional label. The separator is a comma,
    semicolon or tab, whichever comes first outside quotes; where there is none, a space may stand
    between path and label, as in V-JEPA's lists. The id is the path without suffix, with the
    stretch after it ("pick/a@1.5-3") where the row is one. The data folder is the list's own by
    default. Rows that are not good are left out and logged; raises InputError where none is good.
    """
    folder = folder or os.path.dirname(path) or "."
    lines = csv_lines(path)
    columns, named = ["path", "label"], False
    if lines:
        first = ["path" if name.lower() in PATH_COLUMNS else name.lower() for name in lines[0][1]]
        named = "path" in first and not any(name.endswith(VIDEO_SUFFIXES) for name in first)
        if not named and {"start", "end", "label", "id"} & set(first):
            raise InputError(
                f"{path} names the columns {','.join(first)} in its first line, but none that "
                f"holds the videos; call it path ({', '.join(PATH_COLUMNS[1:])} do, too)"
            )
    if named:
        columns, lines = first, lines[1:]
    if not lines:
        raise InputError(f"{path} is empty; a row is a path and an optional label")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} names a column twice: {','.join(columns)}")
    ignored = [name for name in columns if name not in ("path", "label", "start", "end", "id")]
    if ignored:
        log(
            f"{path}: columns not used: {', '.join(ignored)}; "
            "those that are: path, label, start, end, id"
        )
    for column in [*ignored, *({"label"} & set(columns))]:
        if re.match(r"(start|end|begin|stop)(_|$)|.*_(start|end)$", column):
            raise InputError(
                f"{path} has a column {column}, which is not read: call it start or end, in"
                " seconds, or leave it out"
            )
        place = columns.index(column)
        parts = {fields[place].lower() for _, fields in lines if len(fields) > place}
        named_so = column in ("split", "subset", "partition") or parts <= set(SPLIT_WORDS)
        if named_so and len(parts) > 1:
            raise InputError(
                f"{path} has a column {column} of {', '.join(sorted(parts)[:3])}, which is not"
                " read: write train.csv and validation.csv"
            )
    rows, bad = [], []
    for number, fields in lines:
        try:
            rows.append(csv_row(columns, fields, folder))
        except InputError as error:
            bad.append(f"line {number}: {error}")
    told = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    if not rows:
        raise InputError(
            f"{path} has no row of a video in {folder}: {told}. "
            "A row is a path and an optional label, or what a "
            "first line like path,label,start,end,id names"
        )
    if bad:
        log(f"{path}: {len(bad)} rows not used: {told}")
    return rows


def csv_lines(path):
    """[(line number, fields)] of a CSV file, without spaces around fields and empty lines."""
    try:
        with open(
            path, newline="", encoding="utf-8-sig"
        ) as file:  # spreadsheets write a byte-order mark
            text = file.read()
        separator = re.search(r"[,;\t]", re.sub(r'"[^"]*"', "", text))
        reader = csv.reader(
            io.StringIO(text),
            delimiter=separator[0] if separator else ",",
            skipinitialspace=True,
            strict=True,
        )
        lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{path} is not a readable CSV list: {error}") from None
    kept = []
    for number, fields in lines:
        if not separator and fields and not fields[0].lower().endswith(VIDEO_SUFFIXES):
            fields = fields[0].rsplit(None, 1)  # a path, which may hold spaces, and a label
        while fields and not fields[-1]:
            fields.pop()
        if fields:
            kept.append((number, fields))
    return kept


def csv_row(columns, fields, folder):
    """The Row of one line of a CSV list. Raises InputError, saying why, where it is not good."""
    if len(fields) > len(columns):
        raise InputError(f"{len(fields)} fields for the columns {','.join(columns)}")
    if any("\n" in field for field in fields):
        raise InputError("an opened quote takes in the lines after it")
    row = dict(zip(columns, fields, strict=False))
    given = row.get("path", "")
    video = os.path.normpath(given)
    if os.path.isabs(video) and os.path.commonpath(
        [video, os.path.abspath(folder)]
    ) == os.path.abspath(folder):
        video = os.path.relpath(video, os.path.abspath(folder))
    if not video.lower().endswith(VIDEO_SUFFIXES):
        raise InputError(f"{given!r} is no path of a video")
    if video.startswith("../"):
        raise InputError(f"{given!r} leaves {folder}")
    start, end = (seconds(row, name) for name in ("start", "end"))
    if (start or 0) >= (math.inf if end is None else end):
        raise InputError(f"start {start or 0} is not before end {end}")
    name = os.path.splitext(video)[0]
    if start is not None or end is not None:
        name += f"@{mark(start or 0)}-{'end' if end is None else mark(end)}"
    name = row.get("id") or name
    if not is_clean(name) or not is_clean(video):
        raise InputError(f"{name!r} has control characters or broken UTF-8")
    full = os.path.join(folder, video)
    return Row(name, full if os.path.isfile(full) else None, row.get("label") or None, start, end)


def seconds(row, name):
    """A field of a CSV row as seconds, None where it is empty.

    Raises InputError where it is no number of at least 0.
    """
    text = row.get(name)
    try:
        number = float(text) if text else None
    except ValueError:
        number = math.nan
    if number is not None and not 0 <= number < math.inf:
        raise InputError(f"the {name} {text!r} is no number of seconds")
    return number


def mark(time):
    """Seconds to the millisecond, as short as can be: 1.5, 3."""
    return np.format_float_positional(round(time, 3), trim="-")


# ----------------------------------------------------------------------------------------- decoding


class OddVideos:
    """Says what is odd about videos that can be decoded, by `log`.

    A clip that spans more seconds than `longest_seconds`, and a file of several video tracks: once
    a run. Videos that end long before what they, or the list, say, that have holes, or frames that
    cannot be decoded: the first three by name; `broken` holds all of them.
    """

    def __init__(self):
        self.longest_seconds, self.log, self.lock = math.inf, None, threading.Lock()
        self.broken, self.tracks = set(), False  # tracks: whether that is said

    def watch(self, longest_seconds, log):
        self.longest_seconds, self.log = longest_seconds, log

    def note_span(self, path, seconds):
        with self.lock:
            if self.log and seconds > self.longest_seconds:
                self.log(
                    f"warning: a clip spans {seconds:.4g} seconds of {path}, more than "
                    "longest_seconds = "
                    f"{self.longest_seconds:g}, and shows little of how things move; "
                    "cut long videos into stretches "
                    "(a CSV with the columns path,start,end), or --sampling stride. Said once a run"
                )
                self.longest_seconds = math.inf

    def note_tracks(self, path, count):
        with self.lock:
            if self.log and not self.tracks:
                self.log(
                    f"warning: {path} has {count} video tracks, and one is used. Said once a run"
                )
                self.tracks = True

    def note_broken(self, path, what):
        with self.lock:
            known = path in self.broken
            self.broken.add(path)
            if self.log and not known and len(self.broken) <= 3:
                self.log(
                    f"warning: {path} {what}: was it cut short, or damaged? Its clip is of what is"
                    f" there{'; more are not named' * (len(self.broken) == 3)}"
                )


odd_videos = OddVideos()


def read_row(row, views):
    """The clips that several views cut out of the video, or stretch of one, that a Row names."""
    if row.path is None:
        raise VideoError(f"the video of the id {row.id!r} is not in the data folder")
    return read_clips(row.path, views, row.id, row.start, row.end)


def read_clip(path, view=View(), video_id=None, start=None, end=None):
    """The clip that `view` cuts out of the video at `path`: uint8 [T, H, W, 3], RGB, T =
    view.frames, H = W = view.size.

    Its channels lie in planes (it is a transposed [T, 3, H, W]), as swscale makes them fastest and
    patches want them. video_id (the file's stem by default) decides the jitter of views > 0. Raises
    VideoError, naming the file.
    """
    return read_clips(path, [view], video_id, start, end)[0]


def read_clips(path, views, video_id=None, start=None, end=None):
    """The clips that several views cut out of one video, from one decode; a list of what read_clip
    gives.

    start, end  seconds from the video's first frame on: the views see the frames with
                start <= time < end, compared to half a millisecond, and no others

    A video's frames are counted by the packets that carry them, and again by decoding where a
    packet gives none. Decoding starts at the key frame before the stretch and stops after the last
    frame that a view keeps; a kept frame is cropped, then resized and converted in one swscale
    pass, with the colour matrix, range and shape of pixels that the file states, and turned or
    mirrored until it is upright.
    """
    import av

    name = os.path.splitext(os.path.basename(path))[0] if video_id is None else video_id
    clips = [None] * len(views)
    if isinstance(path, (str, os.PathLike)) and os.path.exists(path) and not os.path.isfile(path):
        # a pipe, a device or a folder would be read for ever, or not at all
        raise VideoError(f"{path} is no regular file")
    try:
        stretch = Stretch(path)
        if start is not None or end is not None:
            stretch = find_stretch(path, start or 0, end)
        with open_video(stretch) as (stream, packets):
            n, held, size, times = 0, [], 0, []
            for packet in packets:  # headers of webm files state no count, others lie
                n += shows(packet) and stretch.holds(packet.pts)
                size += packet.size
                if packet.pts is not None:
                    times.append((packet.pts, packet.duration or 0))
                if size <= HELD_BYTES:
                    held.append(packet)
                else:
                    held.clear()
            if n == 0:
                stop = "its end" if end is None else f"{end} s"
                part = "" if stretch.first is None else f" from {start or 0} s to {stop}"
                raise VideoError(f"{path} holds no frame{part}")
            look_at_packets(stretch, stream, times)
            if size <= HELD_BYTES:
                n = cut(held, stream, views, clips, name, n, stretch)
        for _ in range(3):
            if all(clip is not None for clip in clips) or n == 0:
                break
            with open_video(stretch) as (stream, packets):
                n = cut(packets, stream, views, clips, name, n, stretch)
        if any(clip is None for clip in clips):
            raise VideoError(
                f"{path}: no frame could be decoded"
                if n == 0
                else f"{path} decodes to another number of frames each time"
            )
        return clips
    except av.error.FFmpegError as error:
        check_disk(path)
        raise VideoError(f"{path} cannot be decoded: {error.strerror or error}") from None


def look_at_packets(stretch, stream, packets):
    """Note a video that ends a tenth before what its container or the list says, and half a second;
    or that shows no frame for as long as that, and ten times as long as it shows most.

    packets: (time, duration) in ticks of those that state a time
    """
    first = stretch.first if stretch.first is not None else stream.start_time or 0
    begin = max(first, stretch.low)
    shown = sorted(
        entry
        for entry in packets
        if entry[0] < stretch.high and (stretch.first is None or entry[0] >= begin)
    )
    if not shown or not stream.time_base:
        return
    times, lasts = np.array(shown, np.int64).T
    gaps = np.diff(times, prepend=times[0] if stretch.first is None else begin)  # before each frame
    usual = np.median(gaps) if len(gaps) > 2 else 0
    ends = times + np.maximum(lasts, usual)
    tick, length = float(stream.time_base), ends.max() - times[0]
    holes = gaps - np.concatenate([[0], lasts[:-1]])  # less what a frame is said to be shown
    # A file that states how many frames it has (mp4, AVI) states their times with them: pauses, no
    # holes.
    if not stream.frames and holes.max() * tick > max(0.1 * length * tick + 0.5, 10 * usual * tick):
        after = (times[holes.argmax()] - gaps[holes.argmax()] - first) * tick
        odd_videos.note_broken(
            stretch.path, f"has no frame for {holes.max() * tick:.3g} s after {after:.3g} s"
        )
    container, tag, lasts_by_sound = stream.container, stream.metadata.get("DURATION", ""), False
    if stretch.high < math.inf:
        due = stretch.high
    elif container.format.name == "avi" and stream.frames:
        # a tick each, dropped ones too; its duration is a guess where the index is gone
        due = stream.frames
    elif stream.duration:
        due = first + stream.duration
    elif tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", tag):  # of matroska: counted from 0
        due = (3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])) / tick
    elif container.duration:
        lasts_by_sound = len(container.streams) > 1  # maybe: it is read again where that matters
        due = container.duration / 1e6 / tick
    else:
        return
    has, stated = ((time - begin) * tick for time in (ends.max(), due))
    if has < 0.9 * stated - 0.5 and not (
        lasts_by_sound and reaches(container, begin * tick + 0.9 * stated - 0.5)
    ):
        odd_videos.note_broken(stretch.path, f"ends after {has:.4g} s of {stated:.4g} s")


def reaches(container, time):
    """Whether a packet of any of its streams is at `time` seconds or later."""
    container.seek(0)
    return any(
        packet.pts is not None and packet.pts * packet.time_base >= time
        for packet in container.demux()
    )


class Stretch(NamedTuple):
    """Frames of a video: all of them, or those whose presentation time is in [low, high).

    Times are in ticks of the video's stream.
    """

    path: str
    first: int | None = (
        None  # presentation time of the video's first frame; None: the whole video, timed or not
    )
    low: float = -math.inf
    high: float = math.inf

    def holds(self, pts):
        """Whether a frame shown at `pts` is among them. Raises VideoError where it has no time."""
        if self.first is None:
            return True
        if pts is None:
            raise no_times(self.path)
        return self.low <= pts < self.high


def no_times(path):
    return VideoError(
        f"{path} states no times for its frames, so no stretch can be cut out; "
        "put it into another container"
    )


STRETCH_TOLERANCE = Fraction(1, 2000)  # seconds: webm and lists round times to milliseconds


def find_stretch(path, start, end):
    """The Stretch of a video from `start` to `end` seconds after its first frame.

    Raises VideoError where there is no frame, or one that states no time.
    """
    with open_video(Stretch(path)) as (stream, packets):
        first = next((frames[0] for frames in map(frames_of, packets) if frames), None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded")
        if first.pts is None:
            raise no_times(path)
        ticks = [
            (
                math.inf
                if time is None
                else first.pts + math.ceil((Fraction(time) - STRETCH_TOLERANCE) / stream.time_base)
            )
            for time in (start, end)
        ]
        return Stretch(path, first.pts, *ticks)


@contextlib.contextmanager
def open_video(stretch):
    """(stream, packets) of a video: all, or those from the last key frame before a stretch on."""
    import av

    with av.open(stretch.path, metadata_errors="ignore") as container:
        stream = video_stream(container, stretch.path)
        if stretch.first is None or stretch.low <= stretch.first:
            packets = container.demux(stream)
        else:
            packets = packets_from_key(container, stream, stretch)
        if packets is not None:
            yield stream, packets_until(packets, stream, stretch)
            return
    with av.open(
        stretch.path, metadata_errors="ignore"
    ) as container:  # no seeking, or not to there: from the beginning
        stream = video_stream(container, stretch.path)
        yield stream, packets_until(container.demux(stream), stream, stretch)


def packets_from_key(container, stream, stretch):
    """Packets from a key frame on that is shown when the stretch begins, or before.

    Containers seek by decoding time, or to any packet near by, so what comes after a seek is
    decoded and looked at, and the next try goes further back: a packet that is called a key frame
    may be one from which a decoder recovers by and by. None where no such frame is found, or the
    container states other times after a seek (MPEG program streams).
    """
    import av

    if container.format.name == "mpeg":
        return None
    back = 0
    while stretch.low - back > stretch.first:
        try:
            key, packets = key_after_seek(container, stream, stretch.low - back)
            if key is not None and key.pts is not None and key.pts <= stretch.low:
                frames = next(filter(None, map(frames_of, itertools.chain([key], packets))), None)
                if frames and frames[0].key_frame and frames[0].pts == key.pts:
                    key, packets = key_after_seek(container, stream, stretch.low - back)
                    return itertools.chain([key], packets)
        except av.error.FFmpegError:
            return None
        back = 2 * back or math.ceil(1 / stream.time_base)
    return None


def key_after_seek(container, stream, time):
    """(the first packet called a key frame after a seek to `time`, or None; those after it)."""
    container.seek(time, stream=stream)
    packets = container.demux(stream)
    return next((packet for packet in packets if packet.is_keyframe), None), packets


def packets_until(packets, stream, stretch):
    """Packets up to the first that is decoded after the stretch, and one that flushes."""
    import av

    for packet in packets:
        if packet.size and packet.dts is not None and packet.dts >= stretch.high:
            flush = av.Packet()
            flush.stream = stream
            yield flush
            return
        yield packet


def frames_of(packet):
    """The frames that a packet completes; None where it is refused: players pass over it, too."""
    import av

    try:
        return packet.decode()
    except av.error.InvalidDataError:
        return None


def clip_of_frames(frames, view=View(), video_id=""):
    """The clip that `view` cuts out of frames in memory, as read_clip out of a lossless RGB video.

    frames uint8 [n, H, W, 3], RGB, a whole video or an episode so far -> uint8 [T, size, size, 3].
    video_id decides the jitter of views > 0. Raises InputError on anything else.
    """
    import av

    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise InputError(
            f"{frames.dtype} {list(frames.shape)} was given; clip_of_frames takes "
            "frames uint8 [n, H, W, 3], at least one"
        )
    random = None
    if view.view > 0:
        random = ops.Random(view.seed, 0, sample_id(video_id, view.view), ops.STREAMS["view"])
    numbers = frame_numbers(len(frames), view, random).tolist()
    place = (random.uniform(), random.uniform()) if random else None
    scaler = Scaler("the video in memory")
    clip = np.empty((view.frames, 3, view.size, view.size), np.uint8)
    for i, number in enumerate(numbers):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), format="rgb24")
        for channel, plane in enumerate(scaler.convert(frame, view, place)):
            clip[i, channel] = plane
    return clip.transpose(0, 2, 3, 1)


def video_stream(container, path):
    import av

    # Pictures beside the video, or beside sound alone, come as video streams too.
    cover = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(f"{path} holds no video stream")
    if len(streams) > 1:
        odd_videos.note_tracks(path, len(streams))
    best = container.streams.best("video")  # what is marked as the default comes before a still
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path} is in a codec that this build of FFmpeg does not know")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise VideoError(
            f"{path} states frames of {stream.codec_context.width}x{stream.codec_context.height},"
            f" more than {MAX_PIXELS} pixels"
        )
    stream.codec_context.thread_count = 1  # parallelism is over videos
    return stream


def shows(packet):
    """Whether a packet carries a frame that is shown; the last one of a stream is empty and flushes
    the decoder.
    """
    return packet.size > 0 and not packet.is_discard


def check_disk(path):
    """After a video failed: read it plainly. A file that is not there is the video's fault; a
    failing disk or a folder that is gone is not, and ends the run as OSError."""
    os.stat(os.path.dirname(path) or ".")
    try:
        with open(path, "rb") as file:
            while file.read(1 << 22):
                pass
    except OSError as error:
        if error.errno not in (
            errno.ENOENT,
            errno.EISDIR,
            errno.EACCES,
            errno.EPERM,
            errno.ELOOP,
            errno.ENOTDIR,
        ):
            raise
        raise VideoError(f"{path} cannot be read: {error.strerror}") from None


def cut(packets, stream, views, clips, name, n, stretch):
    """Cut those of `views` that have no clip yet out of a stretch that is said to have n frames.

    The clips go into `clips`; returns how many frames it turned out to have.

    A view is done when its last frame has come and every packet so far has given its frame: then n
    is right as far as that view looks, and what comes after does not matter. Else it is done at the
    end, where n was right, or left without a clip. No view's clip depends on the others.
    """
    # takers: frame number -> [(view, place in its clip)]
    asked, made, takers = [i for i, clip in enumerate(clips) if clip is None], {}, {}
    places, last, times = {}, {}, {}  # times: view -> of the frames of its clip, in ticks
    for i in asked:
        random = (
            ops.Random(views[i].seed, 0, sample_id(name, views[i].view), ops.STREAMS["view"])
            if views[i].view > 0
            else None
        )
        numbers = frame_numbers(n, views[i], random).tolist()
        places[i], last[i] = (random.uniform(), random.uniform()) if random else None, numbers[-1]
        made[i] = np.empty((views[i].frames, 3, views[i].size, views[i].size), np.uint8)
        times[i] = []
        for place, number in enumerate(numbers):
            takers.setdefault(number, []).append((i, place))
    fed, decoded, delay, refused, corrupt = 0, 0, None, 0, 0
    number, over = 0, False  # of the frame in the stretch; whether the stretch has ended
    shown = -math.inf  # when the frame before is
    scaler = Scaler(stretch.path, stream.sample_aspect_ratio)

    def finish(i):
        clips[i] = made[i].transpose(0, 2, 3, 1)
        if refused + corrupt > max(2, 0.1 * fed):
            what = f"cannot be decoded, or not wholly, in {refused + corrupt} of {fed} packets"
            odd_videos.note_broken(stretch.path, what)
        if None not in times[i]:
            odd_videos.note_span(
                stretch.path, float((times[i][-1] - times[i][0]) * stream.time_base)
            )

    for packet in packets:
        fed += shows(packet)
        frames = frames_of(packet)
        if frames is None:
            refused += 1
            continue
        for frame in frames:
            decoded += 1
            corrupt += frame.is_corrupt
            if stretch.first is not None and frame.pts is not None:
                if frame.pts <= shown:
                    raise VideoError(
                        f"{stretch.path} states times for its frames that do not rise, so no "
                        "stretch can be cut out; put it into another container"
                    )
                shown = frame.pts
            if not stretch.holds(frame.pts):
                over = over or frame.pts >= stretch.high
                continue
            converted = {}
            for i, place in takers.get(number, ()):
                if i not in converted:
                    converted[i] = scaler.convert(frame, views[i], places[i])
                for channel, plane in enumerate(converted[i]):
                    made[i][place, channel] = plane
                times[i].append(frame.pts)
            number += 1
        if over:
            break
        if decoded and delay is None:
            # packets that the codec holds back to reorder frames
            delay = fed - decoded if stream.codec_context.has_b_frames else 0
        if decoded and not refused and fed - decoded <= delay:
            for i in [i for i in asked if number > last[i]]:
                finish(i)
                asked.remove(i)
            if not asked:
                return n
    for i in asked if number == n else ():
        finish(i)
    return number


def orientation(frame):
    """(transposed, mirrored, upside_down): what shows a frame upright, in that order.

    The nearest of the eight turns and flips to its display matrix [a b u; c d v; x y w], which
    moves the point (x, y) to (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


class Scaler:
    """Frames of one video as upright RGB.

    One swscale context, and one crop filter a shape, serve all of them.
    """

    def __init__(self, path, pixel_aspect=None):
        import av

        self.path, self.reformatter, self.graphs = path, av.video.reformatter.VideoReformatter(), {}
        self.pixel_aspect = float(pixel_aspect or 1)  # width over height of a pixel as it is stored
        # Without full chroma swscale takes, for widths that are multiples of 8 alone, a short cut
        # that is two levels too dark; to planes (gbrp)
        # the exact way is two and a half times as fast as to interleaved rgb24, with the same
        # values.
        self.exact = (
            av.video.reformatter.Interpolation.FULL_CHR_H_INT
            | av.video.reformatter.Interpolation.ACCURATE_RND
        )

    def convert(self, frame, view, place):
        """Planes uint8 [3, size, size] of red, green and blue, cropped at `place` (two fractions of
        the room there is), or in the middle.
        """
        transposed, mirrored, upside_down = orientation(frame)
        if max(frame.height * frame.width, view.size**2) > MAX_PIXELS:
            raise VideoError(
                f"{self.path} has frames of {frame.width}x{frame.height}, more than {MAX_PIXELS}"
                " pixels"
            )
        if view.crop == "center":
            # The square that becomes size x size where the short side becomes short_side, in
            # pixels as they are shown: as high as those of the stored frame, and square.
            side = min(frame.height, frame.width * self.pixel_aspect) * view.size / view.short_side
            height, width = max(1, round(side)), max(1, round(side / self.pixel_aspect))
            rooms = [frame.height - height, frame.width - width]
            # The axes of the stored frame that are shown from top to bottom and from left to right.
            down, right = (1, 0) if transposed else (0, 1)
            at = [0, 0]
            flips = (upside_down, mirrored)
            for axis, fraction, flipped in zip((down, right), place or (0, 0), flips, strict=True):
                room = rooms[axis]
                at[axis] = int(fraction * (room + 1)) if place else room // 2
                if flipped:
                    at[axis] = room - at[axis]
            frame = self.crop(frame, height, width, *at)
        how = type(self.exact)[view.interpolation.upper()] | self.exact
        made = self.reformatter.reformat(
            frame,
            view.size,
            view.size,
            "gbrp",
            interpolation=how,
            dst_color_range="JPEG",
            threads=1,
        )
        planes = [
            np.frombuffer(made.planes[i], np.uint8).reshape(-1, made.planes[i].line_size)[
                : view.size, : view.size
            ]
            for i in (2, 0, 1)
        ]
        if transposed:
            planes = [plane.T for plane in planes]
        return [plane[:: -1 if upside_down else 1, :: -1 if mirrored else 1] for plane in planes]

    def crop(self, frame, height, width, y, x):
        """A part of a frame from (y, x) on, moved to where its chroma samples begin; no copy."""
        if (frame.height, frame.width) == (height, width):
            return frame
        import av

        x -= x % (16 // frame.format.chroma_width(16))
        y -= y % (16 // frame.format.chroma_height(16))
        key = frame.width, frame.height, frame.format.name, height, width, y, x
        if key not in self.graphs:
            graph = av.filter.Graph()
            graph.threads = 1
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 1000),
            )
            crop = graph.add("crop", f"{width}:{height}:{x}:{y}:exact=1")
            sink = graph.add("buffersink")
            source.link_to(crop)
            crop.link_to(sink)
            graph.configure()
            self.graphs[key] = graph
        self.graphs[key].push(frame)
        return self.graphs[key].pull()


# ------------------------------------------------------------------------------------------ patches


def patchify(clip, patch=16, tubelet=2):
    """Clip [..., T, H, W, 3] -> patches [..., N, 3 * tubelet * patch * patch]: token n = (t * h +
    y) * w + x, vector (channel, dt, dy, dx).

    That is how a Conv3d patch embedding flattens its kernel. Works on numpy arrays and tensors of
    any dtype.
    """
    return rearrange(
        clip,
        "... (t dt) (y dy) (x dx) c -> ... (t y x) (c dt dy dx)",
        dt=tubelet,
        dy=patch,
        dx=patch,
    )


def unpatchify(patches, grid=(8, 14, 14), patch=16, tubelet=2):
    """The inverse of patchify: patches [..., N, P] -> clip [..., T, H, W, 3]."""
    t, y, x = grid
    return rearrange(
        patches,
        "... (t y x) (c dt dy dx) -> ... (t dt) (y dy) (x dx) c",
        t=t,
        y=y,
        x=x,
        dt=tubelet,
        dy=patch,
        dx=patch,
    )


# ------------------------------------------------------------------------------------------ batches


def prefetch(work, jobs, threads, ahead):
    """work(job) of each job, in order, computed on `threads` threads at most `ahead` jobs early.

    Threads only: no shared memory.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(work, job))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Videos:
    """Clips cut from the videos of a list under one view."""

    cache, latent_shape = None, None

    def __init__(self, rows, view, patch, tubelet=2):
        self.rows, self.view, self.patch, self.tubelet, self.decodes = (
            rows,
            view,
            patch,
            tubelet,
            True,
        )
        self.grid = grid_of(view, patch, tubelet)
        self.patch_shape = math.prod(self.grid), 3 * tubelet * patch * patch

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        """(video id, view number) of clip i."""
        return self.rows[i].id, self.view.view

    def decode(self, i, out):
        """Write clip i's patches to the uint8 array `out` [N, P]. Raises VideoError."""
        (clip,) = read_row(self.rows[i], [self.view])
        ops.patchify_into(clip, out, self.patch, self.tubelet)


class Records:
    """Clips and latents of a cache; where it holds no clips they are decoded, from the paths of
    `rows`.
    """

    CHECKED, CHECK_EVERY = 256, 16

    def __init__(self, cache, rows=None, changed_too=False):
        """changed_too: take rows whose file or stretch is another now, to look at their pixels."""
        self.cache, self.view, self.patch, self.tubelet, self.decodes = (
            cache,
            cache.view,
            cache.patch,
            cache.tubelet,
            not cache.has_patches,
        )
        self.rows = {row.id: row for row in rows or ()}
        if self.decodes and not self.rows:
            raise InputError(
                f"the cache {cache.folder} holds no clips (--clips off), so the videos are needed:"
                " give --data"
            )
        self.grid, self.patch_shape, self.latent_shape = (
            grid_of(cache.view, cache.patch, cache.tubelet),
            tuple(cache.patch_shape),
            cache.latent_shape,
        )
        self.decoded = itertools.count()
        if self.decodes and not changed_too:
            self.refuse_changed()

    def refuse_changed(self):
        """Raises InputError where a video has another size, or a row another stretch, than the
        cache was made from.
        """
        marks = {name: source_mark(row) for name, row in self.rows.items()}
        for i, mark in enumerate(self.cache.sources.tolist()):
            if mark and marks.get(name := self.name(i)[0], 0) not in (0, mark):
                raise InputError(
                    f"the video {name!r} has another size now, or its start and end were changed,"
                    f" since the cache {self.cache.folder} was made from it: it was replaced or"
                    f" encoded again. `python cache_latents.py --verify {self.cache.folder} --data"
                    " ...` names all such videos; put them back, or make the cache again"
                )

    def __len__(self):
        return len(self.cache)

    def name(self, i):
        return self.cache.ids.fields(i)

    def decode(self, i, out, check=False):
        """Write clip i's patches to the uint8 array `out` [N, P]; the first CHECKED, and one in
        CHECK_EVERY from there on, are compared with what the cache was made from. Raises
        VideoError, and InputError on other pixels."""
        name, number = self.name(i)
        row = self.rows.get(name)
        if row is None or row.path is None:
            raise VideoError(
                f"the video of the id {name!r}, record {i} of {self.cache.folder}, is not in the"
                " data folder"
            )
        (clip,) = read_row(row, [dataclasses.replace(self.view, view=number)])
        ops.patchify_into(clip, out, self.patch, self.tubelet)
        count = next(self.decoded)
        if (check or count < self.CHECKED or count % self.CHECK_EVERY == 0) and fingerprint(
            out
        ) != self.cache.fingerprints[i]:
            raise InputError(
                f"{row.path} is not the video {name!r} that the cache {self.cache.folder} was made"
                " from: its pixels differ, so it was replaced or encoded again since (or another"
                f" FFmpeg decodes it). `python cache_latents.py --verify {self.cache.folder} --data"
                " ...` names all such videos; put them back, or make the cache again"
            )


class Batch(NamedTuple):
    ids: torch.Tensor  # int64 [B], sample ids
    patches: torch.Tensor | None  # uint8 [B, N, P]
    latents: torch.Tensor | None  # float16 [B, N, D]
    masks: dict  # {family: Masks} of these clips
    records: np.ndarray | None = None  # int64 [B], which of the source's records these are


def shuffled(n, batch_size, seed, steps, rank=0, world=1):
    """(epoch, records int64 [batch_size / world]) of each step in `steps`: every epoch a new order
    of the n records, the last partial batch dropped.

    A function of (n, batch_size, seed, step), of which a rank takes its part; no list of records is
    kept.
    """
    for step in steps:
        epoch, place = divmod(step, n // batch_size)
        yield (
            epoch,
            ops.permute(
                np.arange(place * batch_size, (place + 1) * batch_size)[
                    rank * batch_size // world : (rank + 1) * batch_size // world
                ],
                n,
                seed,
                epoch,
            ),
        )


def in_order(records, batch_size):
    """(0, records [<= batch_size]) one after another: a sampler for evaluation."""
    for start in range(0, len(records), batch_size):
        yield 0, np.asarray(records[start : start + batch_size])


def keyed_sample(n, count, seed):
    """Which `count` of n records an evaluation takes: int64 [min(count, n)], rising.

    Drawn without replacement, by a permutation that (n, seed) decide. The first ones of a list will
    not do: lists are often sorted by class.
    """
    count = min(count, n)
    return np.sort(ops.permute(np.arange(count), n, seed, 0)) if count else np.zeros(0, np.int64)


def check_batch(n, batch_size):
    """Raises InputError where n clips do not make one batch."""
    if n < batch_size:
        raise InputError(
            f"there are {n} clips, fewer than a batch of {batch_size}; lower --batch_size"
        )


class Slots:
    """Memory of one batch, used again and again: pinned where it goes on to a GPU, else numpy's,
    which asks for large pages.
    """

    def __init__(self, source, batch_size, with_latents, pin):
        def make(shape, dtype, numpys):
            return (
                torch.empty(batch_size, *shape, dtype=dtype, pin_memory=True)
                if pin
                else torch.from_numpy(np.empty((batch_size, *shape), numpys))
            )

        self.patches = make(source.patch_shape, torch.uint8, np.uint8)
        self.latents = (
            make(source.latent_shape, torch.float16, np.float16) if with_latents else None
        )
        self.copied = None  # a CUDA event: the copy to the GPU that still reads these


@functools.lru_cache
def copy_stream(device):
    """The stream on which batches go over to a GPU: one for all, since the memory allocator keeps a
    pool for each.
    """
    return torch.cuda.Stream(device)


def batches(
    source,
    sampler,
    families=(),
    seed=0,
    patches=None,
    latents=None,
    threads=4,
    ahead=2,
    device="cpu",
    failed=None,
    substitutes=False,
):
    """Batches of clips with their masks, prepared by threads while the caller works on the one
    before. No processes: no shared memory.

    source       Videos or Records
    sampler      yields (epoch, records) a batch: shuffled() or in_order()
    families     mask families to draw, by `seed`, the batch's epoch and each clip's id
    patches, latents  which rows the caller will look at: parts of a mask, ("context",), ("target",)
                      or both; () none at all; None every row.
                 Other rows hold what an earlier batch left there. A row that several families ask
                 for is read once
    threads      decoding and reading threads
    ahead        batches prepared early; memory for one more is kept
    device       where the batches go; to a GPU on a stream beside the caller's, whole, since PCIe
                 has the room: 116 MB for 24 clips
    failed       called with (record, VideoError) in the order of the batches; by default the error
                 is raised
    substitutes  True (training): the place of a video that cannot be decoded goes to the next
                 readable of records i + 1, i + 2, ..., which depends on i alone. False
                 (evaluation): it is left out of its batch
    A batch's tensors are the caller's until it asks for the next. Its content depends on seed,
    epoch and records alone. Raises InputError where 16 videos in a row fail, and, naming shard and
    row, where a cache cannot be read.
    """
    device, cache = torch.device(device), source.cache
    side = copy_stream(device) if device.type == "cuda" else None
    n = source.patch_shape[0]
    stored = {"patches": not source.decodes, "latents": source.latent_shape is not None}
    # from the cache
    reads = [
        kind
        for kind, rows in (("patches", patches), ("latents", latents))
        if stored[kind] and rows != ()
    ]

    def decode(slots, place, i):
        """Fill a place with clip i, or in training with the next readable one: (the record or None,
        the first error or None).
        """
        if slots.copied:
            slots.copied.synchronize()
        first = None
        for step in range(16 if substitutes else 1):
            record = (i + step) % len(source) if substitutes else i
            try:
                source.decode(record, slots.patches[place].numpy())
                return record, first
            except VideoError as error:
                first = first or error
        return None, first

    def plan(epoch, records):
        """(sample ids, masks, {kind: rows to read}) of a batch."""
        ids = torch.tensor([sample_id(*source.name(int(record))) for record in records])
        masks, wanted = (
            {
                family: ops.sample_masks(ids, epoch, seed, family, source.grid)
                for family in families
            },
            {},
        )
        for kind, parts in (("patches", patches), ("latents", latents)):
            wanted[kind] = (
                None if parts is None or not masks else torch.zeros(len(ids), n, dtype=torch.bool)
            )
            for drawn in masks.values() if parts else ():
                for part in parts:
                    wanted[kind].scatter_(1, getattr(drawn, part), True)
        return ids, masks, wanted

    def look_ahead(epoch, records):
        cache.advise(records, reads)
        return plan(epoch, records)

    def assemble(slots, epoch, records, decoding, planned):
        """(Batch or None, [(record, error)]) of one batch."""
        kept, errors = records, []
        if slots.copied:
            slots.copied.synchronize()
        if decoding:
            results = [future.result() for future in decoding]
            errors = [(i, error) for i, (_, error) in zip(records, results) if error]
            kept = [record for record, _ in results if record is not None]
            if len(kept) < len(records):
                if substitutes:
                    first = next(error for record, error in results if record is None)
                    raise InputError(f"16 videos in a row could not be decoded; the first: {first}")
                for place, good in enumerate(
                    [place for place, (record, _) in enumerate(results) if record is not None]
                ):
                    if place != good:
                        slots.patches[place] = slots.patches[good]
        if not len(kept):
            return None, errors
        ids, masks, wanted = planned.result() if planned and not errors else plan(epoch, kept)
        for kind in reads:
            cache.read_rows(kind, kept, getattr(slots, kind)[: len(ids)], wanted[kind], threads)
        clips, made = (
            None if x is None else x[: len(ids)]
            for x in (None if patches == () else slots.patches, slots.latents)
        )
        if not side:
            return Batch(ids, clips, made, masks, np.asarray(kept, np.int64)), errors
        with torch.cuda.stream(side):

            def to(x):
                return None if x is None else x.to(device, non_blocking=True)

            # first: from pageable memory these wait for the stream
            few = to(ids), {family: ops.Masks(*map(to, drawn)) for family, drawn in masks.items()}
            batch = Batch(few[0], to(clips), to(made), few[1], np.asarray(kept, np.int64))
            slots.copied = side.record_event()
        return batch, errors

    def hand_over(slots, future):
        batch, errors = future.result()
        for record, error in errors:
            if failed is None:
                raise error
            failed(int(record), error)
        if batch and side:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(slots.copied)
            for x in (
                batch.ids,
                batch.patches,
                batch.latents,
                *(x for drawn in batch.masks.values() for x in drawn),
            ):
                if x is not None:
                    x.record_stream(stream)
        return batch

    with (
        ThreadPoolExecutor(threads) as decoders,
        ThreadPoolExecutor(1) as assembler,
        ThreadPoolExecutor(1) as planner,
    ):
        free, pending = deque(), deque()
        try:
            made = 0
            for epoch, records in sampler:
                if made <= ahead:
                    free.append(Slots(source, len(records), "latents" in reads, side is not None))
                    made += 1
                while not free:
                    slots, future = pending.popleft()
                    if batch := hand_over(slots, future):
                        yield batch
                    free.append(slots)
                slots = free.popleft()
                records = np.asarray(records)
                planned = planner.submit(look_ahead, epoch, records) if reads else None
                to_decode = enumerate(records.tolist()) if source.decodes and patches != () else ()
                decoding = [
                    decoders.submit(decode, slots, place, record) for place, record in to_decode
                ]
                pending.append(
                    (slots, assembler.submit(assemble, slots, epoch, records, decoding, planned))
                )
            while pending:
                if batch := hand_over(*pending.popleft()):
                    yield batch
        finally:
            for pool in (assembler, decoders, planner):
                pool.shutdown(wait=False, cancel_futures=True)
