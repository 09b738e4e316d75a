"""Lists of videos: which there are, and which split they belong to."""

import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np

from salt import ROOT
from salt.errors import InputError

SPLITS = ("train", "validation", "test")
# What FFmpeg's demuxers read as video, less what is mostly sound, pictures or games. A file's
# content decides how it is read; its suffix only whether it is taken for a video.
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .webm .mkv .avi .mpg .mpeg .ts .mts .m2ts .m2t .vob .wmv .asf .flv .f4v .ogv "
    ".3gp .3g2 .mj2 .mxf .nut .dv .rm .ivf .y4m .gif .m1v .m2v .h264 .264 .hevc .h265 .265 "
    ".mjpeg .mjpg".split()
)
VIDEO_FOLDERS = ("", "videos", "20bn-something-something-v2")


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
BESIDE_CODE = os.path.join(ROOT, "ssv2")


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
        parts = [load_split(folder, part, splits_dir, log) for part in split.split("+")]
        rows = list(itertools.chain(*parts))
        if len({row.id for row in rows}) < len(rows):
            raise InputError(f"the splits {split} of {folder} share ids")
        return rows
    folder = os.path.expanduser(folder)
    if os.path.isfile(folder):
        rows = rows_of_file(folder, split, splits_dir, log)
    elif not os.path.isdir(folder):
        raise InputError(
            f"there is no data folder {folder}; --data names the folder that holds the videos and"
            " their lists"
        )
    else:
        rows = rows_of_folder(folder, split, splits_dir, log)
    refuse_nothing(rows, folder, split)
    refuse_shared_frames(folder, split, splits_dir, rows, log)
    ids = set()
    for row in rows:
        if row.id in ids:
            raise InputError(
                f"the split {split!r} of {folder} holds the id {row.id!r} twice; "
                "ids must be unique (a CSV may have a column `id`)"
            )
        ids.add(row.id)
    places = [row[1:2] + row[3:] for row in rows if row.path]  # path, start, end
    again = len(places) - len(set(places))
    if again:
        log(
            f"{split}: {again} rows name a video (or stretch of one) that another row names, too: "
            "each counts as a video of its own, also in intervals"
        )
    return rows


def rows_of_file(path, split, splits_dir, log):
    """Those of a split of a list that is given as --data itself."""
    check_list_file(path)
    if splits_dir:
        raise InputError(
            f"--data {path} is a list itself; leave --splits_dir out, or give the folder of"
            " the videos as --data"
        )
    rows, own = read_csv(path, log=log), split_of_name(path)
    if own and own != split:
        raise InputError(
            f"--data {path} is, by its name, the list of the split {own!r}, and {split!r} is"
            " asked for; give the folder, with a list a split, or another name"
        )
    if own:
        log(f"{split}: {len(rows)} rows of {path}")
        return rows
    kept = hashed_split(rows, split)
    log(
        f"{split}: {len(kept)} rows of {path}, split by a hash of the id;"
        f" {len(rows) - len(kept)} rows are the other split's"
    )
    return kept


def rows_of_folder(folder, split, splits_dir, log):
    """Those of a split's list, or where there are no lists of what the folder holds."""
    path = find_list(folder, split, splits_dir)
    if path:
        rows = read_list(path, folder, log)
        here = sum(row.path is not None for row in rows)
        if path.startswith(BESIDE_CODE + os.sep) and not splits_dir and here < len(rows) / 2:
            raise InputError(
                f"{path}, beside the code, lists {len(rows)} videos, of which {folder} holds"
                f" {here}: say --splits_dir {BESIDE_CODE} if it is meant, else move it away"
            )
        log(f"{split}: {len(rows)} rows of {path}")
        return rows
    if splits_dir or any(find_list(folder, other) for other in SPLITS):
        places = f"{folder} and ssv2/ beside the code"
        if splits_dir:
            places = f"--splits_dir {splits_dir}"
        names = ", ".join(list_names(split))
        raise InputError(f"no list for the split {split!r}: looked for {names} in {places}")
    return rows_without_list(folder, split, log)


def refuse_nothing(rows, folder, split):
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
    others = lists_beside(folder, split, splits_dir, rows)
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


def lists_beside(folder, split, splits_dir, rows):
    """[(split, its rows)] of the other lists that may share frames with the `rows` of this one."""
    if os.path.isfile(folder):
        if split_of_name(folder):
            return []
        other = "train" if split == "validation" else "validation"
        return [(other, hashed_split(read_csv(folder), other))]
    found = []
    for other in SPLITS:
        path = find_list(folder, other, splits_dir) if other != split else None
        # Where neither has stretches, equal frames are equal clips, which fingerprints tell.
        if path and (path.endswith(".csv") or any(map(is_stretch, rows))):
            found.append((other, read_list(path, folder)))
    return found


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
            match = SPLIT_WORD.fullmatch(word)
            if match:
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
    found = {}
    unused = {}
    visited = set()

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
    ignored = sorted(keys - {"id", "template", "label", "placeholders"})
    if ignored:
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
    columns, lines = csv_columns(path, csv_lines(path))
    if not lines:
        raise InputError(f"{path} is empty; a row is a path and an optional label")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} names a column twice: {','.join(columns)}")
    refuse_hidden_columns(path, columns, lines, log)
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


def csv_columns(path, lines):
    """(names of the columns, the lines without one that names them)."""
    if not lines:
        return ["path", "label"], lines
    first = ["path" if name.lower() in PATH_COLUMNS else name.lower() for name in lines[0][1]]
    if "path" in first and not any(name.endswith(VIDEO_SUFFIXES) for name in first):
        return first, lines[1:]
    if {"start", "end", "label", "id"} & set(first):
        raise InputError(
            f"{path} names the columns {','.join(first)} in its first line, but none that "
            f"holds the videos; call it path ({', '.join(PATH_COLUMNS[1:])} do, too)"
        )
    return ["path", "label"], lines


def refuse_hidden_columns(path, columns, lines, log):
    """Raises InputError where a column that is not read looks like times or splits."""
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
