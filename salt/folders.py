"""Folders of videos: what lies in one, and which of it could be a split."""

import os
import re

from salt.errors import InputError

# What FFmpeg's demuxers read as video, less what is mostly sound, pictures or games. A file's
# content decides how it is read; its suffix only whether it is taken for a video.
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .webm .mkv .avi .mpg .mpeg .ts .mts .m2ts .m2t .vob .wmv .asf .flv .f4v .ogv "
    ".3gp .3g2 .mj2 .mxf .nut .dv .rm .ivf .y4m .gif .m1v .m2v .h264 .264 .hevc .h265 .265 "
    ".mjpeg .mjpg".split()
)

VIDEO_FOLDERS = ("", "videos", "20bn-something-something-v2")


def file_of(path):
    """What a file is, whatever its names are: (device, inode)."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def refuse_lerobot(path):
    """Raises InputError where a LeRobot data set holds this path, up to four folders above."""
    for _ in range(5):
        info, path_of_set = os.path.join(path, "meta", "info.json"), path
        if os.path.isfile(info):
            raise InputError(
                f"{path} is of a LeRobot data set ({info}), whose video files may hold many "
                f"episodes each; give --data {path_of_set}, which is read by its episodes"
            )
        path = os.path.dirname(os.path.abspath(path))


SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}

SPLIT_NAMES |= dict.fromkeys(("validation", "val", "valid"), "validation")

SPLIT_WORDS = SPLIT_NAMES | dict.fromkeys(("dev", "eval", "heldout"), "validation")


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


def is_clean(name):
    """Whether a name has no control characters and no broken UTF-8: it fits into a line."""
    return not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name)
