"""Lists of videos: which there are, and which split they belong to."""

import functools
import hashlib
import itertools
import json
import math
import os
import re

from salt import ROOT, lerobot
from salt.errors import InputError
from salt.folders import (
    NO_VIDEO,
    VIDEO_FOLDERS,
    VIDEO_SUFFIXES,
    log_unused,
    refuse_lerobot,
    search,
    split_folders,
    splits_in,
    unused_line,
)
from salt.lists import Row, is_stretch, read_csv, read_list

SPLITS = ("train", "validation", "test")


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


def load_split(folder, split, splits_dir=None, log=lambda line: None, cut=lerobot.WHOLE):
    """The rows of one split, in list order, each with .id .path .label .start .end.

    folder      SSv2: a list (train.json, something-something-v2-train.json, labels/train.json;
                or train.csv, see read_csv) beside the videos, which lie in the folder itself,
                videos/ or 20bn-something-something-v2/.
                Without a list: a folder of videos, see search; its subfolder named by the split,
                or else a tenth of the ids, drawn by their hash, as 'validation' and the rest as
                'train'. A CSV file itself is split in the same way, and so are the episodes of a
                LeRobot data set, which `cut`, a lerobot.Cut, makes into rows.
    split       'train', 'validation' or 'test'; 'train+validation', as a merged cache has it, is
                one after the other
    log         called with a line on the file that was used, and one on what was not used and why
    Raises InputError, naming file and row, on a missing or malformed list, an id that is no plain
    name, or no video at all.
    """
    if "+" in split:
        parts = [load_split(folder, part, splits_dir, log, cut) for part in split.split("+")]
        rows = list(itertools.chain(*parts))
        if len({row.id for row in rows}) < len(rows):
            raise InputError(f"the splits {split} of {folder} share ids")
        return rows
    folder = os.path.expanduser(folder)
    of_robots = is_lerobot(folder, splits_dir)
    if os.path.isfile(folder):
        rows = rows_of_file(folder, split, splits_dir, log)
    elif not os.path.isdir(folder):
        raise InputError(
            f"there is no data folder {folder}; --data names the folder that holds the videos and"
            " their lists"
        )
    elif of_robots:
        rows = rows_of_lerobot(folder, split, log, cut)
    else:
        rows = rows_of_folder(folder, split, splits_dir, log)
    if cut != lerobot.WHOLE and not of_robots:
        raise InputError(
            f"{folder} is read by its lists, or is no LeRobot data set: leave --cameras and"
            " --window_seconds out"
        )
    refuse_nothing(rows, folder, split)
    if not of_robots:
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


def first_list(folder):
    """A list file of whatever split in a folder itself, or None."""
    paths = (os.path.join(folder, name) for split in SPLITS for name in list_names(split))
    return next(filter(os.path.isfile, paths), None)


def is_lerobot(folder, splits_dir=None):
    """Whether --data is read as a LeRobot data set: it is one, and nobody has put lists beside."""
    folder = os.path.expanduser(folder)
    return lerobot.is_one(folder) and not (splits_dir or first_list(folder))


def rows_of_lerobot(folder, split, log, cut):
    """Those of the episodes of a LeRobot data set that fall into a split."""
    every = lerobot.rows_of(folder, cut, log)
    keys = {row.id: lerobot.key_of(episode) for row, episode, *_ in every}
    found = [row for row, *_ in every]
    kept = hashed_split(found, split, lambda row: keys[row.id])
    episodes = len({keys[row.id] for row in kept})
    if not kept:
        raise InputError(
            f"none of the {len(set(keys.values()))} episodes of {folder} falls into the split"
            f" {split!r}: a tenth is held out by a hash of the number, and these are too few"
        )
    log(
        f"{split}: {len(kept)} rows, of {episodes} episodes of the LeRobot data set {folder}, split"
        f" by a hash of the episode; {len(found) - len(kept)} rows are the other split's"
    )
    return kept


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


def hashed_split(rows, split, key=lambda row: row.id):
    if split not in ("train", "validation"):
        raise InputError(f"data without lists has the splits train and validation, not {split!r}")

    def held_out(row):
        return hashlib.sha256(key(row).encode()).digest()[0] < 26

    return [row for row in rows if held_out(row) == (split == "validation")]


LIST_SUFFIXES = (".csv", ".json", ".jsonl", ".txt", ".tsv", ".lst", ".pkl")


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
