"""LeRobot data sets (v3, and v2.1) as --data: a row is an episode seen by a camera, or a window of
it; states and actions for the probes. `lerobot` itself is not needed; pyarrow is.

    meta/info.json               version, frames a second, features, and where files lie
    meta/episodes/*/*.parquet    v3: an episode a row, with file and seconds of each camera's video
    meta/episodes.jsonl          v2.1, which has a file an episode and camera
    data/                        parquet files of a row a frame: state, action, timestamp
"""

import concurrent.futures
import functools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salt.errors import InputError
from salt.lists import Row
from salt.torch_files import from_file

STATES = ("observation.state", "action")  # features that the probes read
HALF_A_MILLISECOND = 5e-4  # by which times of frames and of windows are compared


class Cut(NamedTuple):
    """Which rows a data set is made into."""

    cameras: tuple = ()  # names, or their last parts; (): all
    window_seconds: float | None = None  # an episode that is longer is cut into equal windows


WHOLE = Cut()


def asked(s):
    """The Cut of a script's settings."""
    seconds = s.get("window_seconds")
    if seconds is not None and not seconds > 0:
        raise InputError(f"--window_seconds is {seconds:g}; a window is longer than nothing")
    return Cut(tuple(s.get("cameras", ())), seconds)


class Episode(NamedTuple):
    index: int
    length: int  # frames
    tasks: list
    videos: dict  # {camera: (path, from, to)}, seconds in the file; None, None: all of it


def is_one(folder):
    return os.path.isfile(os.path.join(folder, "meta", "info.json"))


def read_table(path, columns=None):
    """A parquet file as a pyarrow table; columns: those of them that it has."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{path} is of a LeRobot data set, which pyarrow reads: pip install pyarrow"
        ) from None
    import pyarrow

    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        return file.read(columns=[name for name in columns or names if name in names])
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def read_lines(path):
    """The objects of a .jsonl file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


@functools.cache
def information(folder):
    """meta/info.json. Raises InputError where it is of another version, or has no video."""
    path = os.path.join(folder, "meta", "info.json")
    try:
        info = json.loads(Path(path).read_text(encoding="utf-8"))
        version = str(info["codebase_version"])
        info["cameras"] = [name for name, x in info["features"].items() if is_camera(x)]
        float(info["fps"])
        str(info["video_path"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is malformed: {error!r}") from None
    if not version.startswith(("v3.", "v2.1")):
        raise InputError(
            f"{path} is of version {version}; v3 and v2.1 are read, to which lerobot converts older"
            " ones"
        )
    if not info["cameras"]:
        raise InputError(f"{path} has no feature of dtype video: its frames are single images")
    return info


def is_camera(feature):
    """Whether a feature is a video of colours: depth comes as one, too."""
    said = {**feature, **(feature.get("info") or {})}
    depth = said.get("video.is_depth_map") or said.get("is_depth_map")
    return feature["dtype"] == "video" and not depth


@functools.cache
def episodes(folder):
    """The Episodes of a data set, in order."""
    return from_file(os.path.join(folder, "meta"), read_episodes, folder)


def read_episodes(folder):
    info = information(folder)
    cameras = info["cameras"]
    tasks_of = functools.cache(lambda: tasks_of_episodes(folder, info))
    if str(info["codebase_version"]).startswith("v2"):
        return [of_version_2(folder, info, each, tasks_of) for each in episode_lines(folder)]
    files = sorted(Path(folder, "meta", "episodes").glob("*/*.parquet"))
    if not files:
        raise InputError(f"{folder}/meta/episodes has no parquet files")
    places = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns = ["episode_index", "length", "tasks"]
    columns += [f"videos/{camera}/{place}" for camera in cameras for place in places]
    found = []
    for file in files:
        for row in read_table(file, columns).to_pylist():
            videos = {}
            for camera in cameras:
                at = [row.get(f"videos/{camera}/{place}") for place in places]
                if None in at:
                    raise InputError(
                        f"{file}: episode {row.get('episode_index')} does not say where the video"
                        f" of {camera} is"
                    )
                chunk, number, start, end = at
                names = {"video_key": camera, "chunk_index": chunk, "file_index": number}
                videos[camera] = (
                    os.path.join(folder, info["video_path"].format(**names)),
                    start,
                    end,
                )
            tasks = row.get("tasks") or tasks_of().get(row["episode_index"], ())
            found.append(Episode(row["episode_index"], row["length"], list(tasks), videos))
    return found


def tasks_of_episodes(folder, info):
    """{episode: [its first task]} by meta/tasks and the frames, for sets whose episodes do not say
    it themselves.
    """
    if str(info["codebase_version"]).startswith("v2"):
        path = os.path.join(folder, "meta", "tasks.jsonl")
        rows = read_lines(path) if os.path.isfile(path) else []
    else:
        path = os.path.join(folder, "meta", "tasks.parquet")
        rows = read_table(path).to_pylist() if os.path.isfile(path) else []
    # of pandas, with the tasks as its index
    names = {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in rows}
    found = {}
    for file in sorted(Path(folder, "data").glob("*/*.parquet")) if names else ():
        table = read_table(file, ["episode_index", "task_index"]).to_pydict()
        for episode, task in zip(table["episode_index"], table.get("task_index", ()), strict=False):
            found.setdefault(episode, [names[task]] if names.get(task) else [])
    return found


def episode_lines(folder):
    return read_lines(os.path.join(folder, "meta", "episodes.jsonl"))


def of_version_2(folder, info, line, tasks_of):
    """The Episode of a line of meta/episodes.jsonl."""
    index = line["episode_index"]
    names = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
    videos = {}
    for camera in info["cameras"]:
        path = info["video_path"].format(video_key=camera, **names)
        videos[camera] = os.path.join(folder, path), None, None
    tasks = line.get("tasks") or tasks_of().get(index, ())
    return Episode(index, line["length"], list(tasks), videos)


def chosen_cameras(folder, cut):
    """Names of the cameras that a Cut asks for."""
    have = information(folder)["cameras"]
    chosen = []
    for wanted in cut.cameras:
        fits = [name for name in have if name == wanted or name.rpartition(".")[2] == wanted]
        if len(fits) != 1:
            raise InputError(
                f"--cameras {wanted}: {folder} has {', '.join(have)}; give one's whole name, or the"
                " part behind its last point"
            )
        chosen += fits
    return list(dict.fromkeys(chosen)) or have


@functools.cache
def rows_of(folder, cut, log):
    """Rows of a data set, an episode and camera, or a window of it, each: (Row, Episode, seconds
    of the episode that it begins and ends at).

    Left out, and named to `log`, are those whose times miss their video.
    """
    fps = float(information(folder)["fps"])
    cameras = chosen_cameras(folder, cut)
    if cut.window_seconds and cut.window_seconds * fps < 1:
        raise InputError(
            f"--window_seconds {cut.window_seconds:g} is less than a frame of {folder}"
        )
    every = episodes(folder)
    paths = sorted({each.videos[camera][0] for each in every for camera in cameras})
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        lasts = dict(zip(paths, pool.map(seconds_of, paths), strict=True))
    found = []
    for each in every:
        for camera in cameras:
            path, start, end = each.videos[camera]
            why = misfit(each, start, end, lasts[path], fps)
            if why:
                log(f"{path}: episode {each.index} is left out: {why}")
                continue
            name = f"{Path(folder).resolve().name}.{key_of(each)}.{camera.replace('/', '_')}"
            found += windows(each, name, path, start or 0.0, start is not None, fps, cut)
    return found


def key_of(episode):
    """What decides its split: cameras and windows of an episode stay together."""
    return f"episode_{episode.index:06d}"


def windows(episode, name, path, start, shared, fps, cut):
    """Equal parts of an episode, none longer than the Cut's; shared: its file holds others, too."""
    seconds = episode.length / fps
    count = 1
    if cut.window_seconds:
        count = max(1, math.ceil(seconds / cut.window_seconds - 1e-6))
    label = episode.tasks[0] if episode.tasks else None
    for number in range(count):
        first, last = seconds * number / count, seconds * (number + 1) / count
        own = f"{name}.{number + 1}of{count}" if count > 1 else name
        at = (round(start + first, 6), round(start + last, 6))
        row = Row(own, path, label, *(at if shared or count > 1 else (None, None)))
        yield row, episode, first, last


def seconds_of(path):
    """How long a video is, as its header says; None where there is none that says it."""
    import av

    try:
        opened: Any = av.open(path, "r", metadata_errors="ignore")
        with opened as container:
            stream = container.streams.video[0]
            if stream.duration is not None:
                return float(stream.duration * stream.time_base)
            return container.duration / 1e6 if container.duration else None
    except (av.FFmpegError, LookupError):
        return None


def misfit(episode, start, end, last, fps):
    """Why an episode's stretch is none of its video, or ''."""
    if last is None:
        return "its video is not there, or cannot be opened"
    seconds = episode.length / fps
    start, end = (0.0, last) if start is None else (start, end)  # v2.1 has a file an episode
    if not 0 <= start < end:
        return f"it runs from {start:g} s to {end:g} s"
    if end > last + 1.5 / fps:
        return f"it ends at {end:g} s of a video of {last:g} s"
    if abs(end - start - seconds) > 1.5 / fps:
        return f"it has {episode.length} frames, and {(end - start) * fps:.1f} frames of time"
    return ""


def states_of(folder, cut, log):
    """({id of a row: float32 [frames, S] of its states and actions}, names of the S numbers).

    Raises InputError where the data set has none of STATES.
    """
    info = information(folder)
    features = [name for name in STATES if name in info["features"]]
    if not features:
        raise InputError(f"{folder} has no {' and no '.join(STATES)} to probe")
    names = [f"{kind} {name}" for kind in features for name in names_of(info["features"][kind])]
    by_episode = {}
    columns = ["episode_index", "timestamp", *features]
    for file in sorted(Path(folder, "data").glob("*/*.parquet")):
        table = read_table(file, columns)
        of, times = (np.asarray(table[name]) for name in columns[:2])
        values = np.concatenate(
            [np.stack(table[name].to_pylist()).reshape(len(of), -1) for name in features], axis=1
        )
        for index in np.unique(of):
            part = times[of == index], values[of == index].astype(np.float32)
            by_episode.setdefault(int(index), []).append(part)
    for index, parts in by_episode.items():  # which may lie in several files, in any order
        times, values = (np.concatenate(x) for x in zip(*parts))
        order = np.argsort(times, kind="stable")
        by_episode[index] = times[order], values[order]
    found = {}
    for row, episode, first, last in rows_of(folder, cut, log):
        if episode.index in by_episode:
            times, values = by_episode[episode.index]
            low, high = first - HALF_A_MILLISECOND, last - HALF_A_MILLISECOND
            found[row.id] = values[(times >= low) & (times < high)]
    return found, names


def names_of(feature):
    """Names of a feature's numbers: as it says, {"motors": [...]} too, or else counted."""
    names, count = feature.get("names"), math.prod(feature["shape"])
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    return names if isinstance(names, list) and len(names) == count else list(range(count))
