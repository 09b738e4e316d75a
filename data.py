"""Videos: which there are, how a clip is cut out of one, patches, and batches for training.

av is imported only where a video is decoded, so that training from a cache with clips runs without it.
"""
import csv
import dataclasses
import hashlib
import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

import ops
from config import InputError
from views import View, frame_numbers, grid_of, random_half, sample_id  # noqa: F401  data.View and the others are public names here

VIDEO_SUFFIXES = (".webm", ".mp4", ".mkv", ".avi")
VIDEO_FOLDERS = ("", "videos", "20bn-something-something-v2")
MAX_PIXELS = 64 * 2**20  # a frame larger than this is taken for a broken header


class VideoError(InputError):
    """A video that gives no clip; the message says which and why."""


# ----------------------------------------------------------------------------------------------------------------- lists

class Row(NamedTuple):
    id: str
    path: str | None   # None where the list names a video that the folder lacks
    label: str | None  # SSv2: the template without brackets; None in unlabelled lists


def list_names(split):
    return [*(f"{place}{name}{split}.json" for place in ("", "labels/") for name in ("", "something-something-v2-")), f"{split}.csv"]


def find_list(folder, split, splits_dir=None):
    """The list file of `split`: in the data folder, then in splits_dir, then in ssv2/ beside this file; or None."""
    for place in (folder, splits_dir, os.path.join(os.path.dirname(os.path.abspath(__file__)), "ssv2")):
        for name in list_names(split) if place else ():
            if os.path.isfile(os.path.join(place, name)):
                return os.path.join(place, name)
    return None


def load_split(folder, split, splits_dir=None, log=lambda line: None):
    """The rows of one split, in list order, each with .id .path .label.

    folder      SSv2: a list (train.json, something-something-v2-train.json, labels/train.json; or train.csv with a path and an
                optional label a row) beside the videos, which lie in the folder itself, videos/ or 20bn-something-something-v2/.
                Without a list: a folder of videos; its subfolder named by the split, or else a tenth of the ids, drawn by
                their hash, as 'validation' and the rest as 'train'. A CSV file itself is split in the same way.
    split       'train', 'validation' or 'test'
    log         called with one line that says which file was used
    Raises InputError, naming file and row, on a missing or malformed list, an id that is no plain name, or no video at all.
    """
    folder = os.path.expanduser(folder)
    if os.path.isfile(folder) and folder.lower().endswith(".json"):
        raise InputError(f"--data {folder} is a list; --data names the folder of the videos, and --splits_dir that of their lists")
    if os.path.isfile(folder):
        rows = hashed_split(read_csv(folder), split)
        log(f"{split}: {len(rows)} rows of {folder}, split by a hash of the id")
    elif not os.path.isdir(folder):
        raise InputError(f"there is no data folder {folder}; --data names the folder that holds the videos and their lists")
    elif path := find_list(folder, split, splits_dir):
        rows = read_csv(path, folder) if path.endswith(".csv") else read_json(path, find_videos(folder))
        log(f"{split}: {len(rows)} rows of {path}")
    elif any(find_list(folder, other, splits_dir) for other in ("train", "validation", "test")):
        raise InputError(f"no list for the split {split!r}: looked for {', '.join(list_names(split))} in {folder}, "
                         f"{splits_dir or 'no --splits_dir'} and ssv2/ beside the code")
    else:
        rows = [Row(check_id(name, folder), path, None) for name, path in sorted(find_videos(folder, split).items())]
        inside = os.path.isdir(os.path.join(folder, split))
        rows = rows if inside else hashed_split(rows, split)
        log(f"{split}: {len(rows)} videos of {folder}, {'its subfolder ' + split if inside else 'split by a hash of the id'} (no list)")
    if not rows:
        raise InputError(f"no video of {folder} falls into the split {split!r}: without lists a tenth is held out by a hash of the name, and these "
                         "are too few; make subfolders train/ and validation/, or train.csv and validation.csv")
    if not any(row.path for row in rows):
        raise InputError(f"none of the {len(rows)} videos of the split {split!r} is in {folder}; looked in it, "
                         f"{' and '.join(f'{name}/' for name in VIDEO_FOLDERS[1:])} for {' '.join(VIDEO_SUFFIXES)}")
    seen = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"the split {split!r} of {folder} holds the id {row.id!r} twice; ids must be unique")
        seen.add(row.id)
    return rows


def find_videos(folder, split=None):
    """{id: path} of the videos in a data folder; of its subfolder `split` alone where that exists."""
    places = [os.path.join(folder, name) for name in VIDEO_FOLDERS]
    if split and os.path.isdir(os.path.join(folder, split)):
        places = [os.path.join(folder, split)]
    found = {}
    for place in places:
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name) if os.path.isdir(place) else ():
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in VIDEO_SUFFIXES:
                found.setdefault(stem, entry.path)
    return found


def hashed_split(rows, split):
    if split not in ("train", "validation"):
        raise InputError(f"data without lists has the splits train and validation, not {split!r}")
    held_out = lambda row: hashlib.sha256(row.id.encode()).digest()[0] < 26
    return [row for row in rows if held_out(row) == (split == "validation")]


def check_id(name, where):
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f\ud800-\udfff]", name):
        raise InputError(f"{where}: the id {name!r} is no plain file name; an id has no slashes, control characters or broken "
                         f"UTF-8, with which it could leave the video folder")
    return name


def read_json(path, videos):
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not a readable JSON list: {error}") from None
    if not isinstance(entries, list):
        raise InputError(f"{path} holds {'an object' if isinstance(entries, dict) else type(entries).__name__}, as a label table "
                         f"does; a split list is a JSON list of objects with an \"id\"")
    rows = []
    for number, entry in enumerate(entries):
        where = f"{path}, row {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), (str, int)) or isinstance(entry["id"], bool):
            raise InputError(f"{where}: {json.dumps(entry)[:80]} is not an object with an \"id\"")
        name = check_id(str(entry["id"]), where)
        label = entry.get("template", entry.get("label"))
        if label is not None and not isinstance(label, str):
            raise InputError(f"{where}: the label {label!r} is not a string")
        rows.append(Row(name, videos.get(name), label and label.replace("[", "").replace("]", "")))
    if not rows:
        raise InputError(f"{path} is empty; a split list has a row a video")
    return rows


def read_csv(path, folder=None):
    """Rows of path and optional label; relative paths start from the data folder and may not leave it."""
    folder, rows = folder or os.path.dirname(path) or ".", []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
            lines = list(csv.reader(file))
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{path} is not a readable CSV list: {error}") from None
    for number, line in enumerate(lines):
        if not line or (number == 0 and line[0].lower() in ("path", "video", "filename")):
            continue
        video = os.path.normpath(line[0])
        if not video.lower().endswith(VIDEO_SUFFIXES) or video.startswith("..") or re.search(r"[\x00-\x1f]", video):
            raise InputError(f"{path}, row {number}: {line[0]!r} is no path of a video ({' '.join(VIDEO_SUFFIXES)}) inside "
                             f"{folder}; a row is a path and an optional label")
        full = os.path.join(folder, video)
        rows.append(Row(os.path.splitext(video)[0], full if os.path.isfile(full) else None, line[1] if len(line) > 1 else None))
    if not rows:
        raise InputError(f"{path} is empty; a row is a path and an optional label")
    return rows


# -------------------------------------------------------------------------------------------------------------- decoding

def count_frames(container, stream):
    """Frames of a video by its packets: headers of webm files state none, others lie. Exact but for packets that show nothing."""
    return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


def read_clip(path, view=View(), video_id=None):
    """The clip that `view` cuts out of the video at `path`: uint8 [T, H, W, 3], RGB, T = view.frames, H = W = view.size.

    The frames are resized and converted in one swscale pass each, with the colour matrix and range that the file states, and
    turned upright. video_id (the file's stem by default) decides the jitter of views > 0. Raises VideoError, naming the file.
    """
    import av
    try:
        with av.open(path, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise VideoError(f"{path} states frames of {stream.codec_context.width}x{stream.codec_context.height}, more than {MAX_PIXELS} pixels")
            n = count_frames(container, stream)
        if n == 0:
            raise VideoError(f"{path} holds no frame")
        random = None
        if view.view > 0:
            name = os.path.splitext(os.path.basename(path))[0] if video_id is None else video_id
            random = lambda: ops.Random(view.seed, 0, sample_id(name, view.view), ops.STREAMS["view"])
        for _ in range(2):
            draw = random() if random else None
            wanted = frame_numbers(n, view, draw)
            clip, decoded = decode_frames(path, wanted, view, draw)
            if decoded == n:
                return clip
            if decoded == 0:
                break
            n = decoded  # a packet gave no frame of its own, or a broken one: count what did come, and cut again
        raise VideoError(f"{path}: no frame could be decoded" if decoded == 0 else f"{path} decodes to another number of frames each time")
    except av.error.FFmpegError as error:
        check_disk(path)
        raise VideoError(f"{path} cannot be decoded: {error.strerror or error}") from None


def check_disk(path):
    """After a video failed: read it plainly. A file that is not there is the video's fault; a failing disk is not, and ends the run as OSError."""
    try:
        with open(path, "rb") as file:
            while file.read(1 << 22):
                pass
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise VideoError(f"{path} cannot be read: {error.strerror}") from None


def decode_frames(path, wanted, view, random):
    """Decode all of a video, keep the wanted frames: (uint8 [T, H, W, 3] or None, the number of frames decoded)."""
    import av
    where = {int(number): np.flatnonzero(wanted == number) for number in wanted}
    clip = np.empty((view.frames, view.size, view.size, 3), np.uint8)
    place = (random.uniform(), random.uniform()) if random else None
    decoded, scaler = 0, av.video.reformatter.VideoReformatter()
    with av.open(path, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # parallelism is over videos
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue  # a broken packet is passed over, as players do; the caller counts what came
            for frame in frames:
                if decoded in where:
                    clip[where[decoded]] = convert(frame, view, place, scaler, path)
                decoded += 1
    return (clip if decoded > int(wanted[-1]) else None), decoded


def convert(frame, view, place, scaler, path):
    """One decoded frame as upright RGB, resized and cropped (at `place`, two fractions, or in the middle): uint8 [size, size, 3]."""
    turned = round(frame.rotation / 90) % 4 * 90
    height, width = (frame.width, frame.height) if turned % 180 else (frame.height, frame.width)
    if view.crop == "squash":
        height = width = view.size
    else:
        scale = view.short_side / min(height, width)
        height, width = max(view.size, round(height * scale)), max(view.size, round(width * scale))
    if max(height * width, frame.height * frame.width) > MAX_PIXELS:
        raise VideoError(f"{path} has frames of {frame.width}x{frame.height}, resized to {width}x{height}: more than {MAX_PIXELS} pixels")
    size = (height, width) if turned % 180 else (width, height)
    rgb = scaler.reformat(frame, *size, "rgb24", interpolation=view.interpolation.upper(), dst_color_range="JPEG", threads=1).to_ndarray()
    if turned:
        rgb = np.rot90(rgb, turned // 90)  # VideoFrame.rotation and rot90 both count counter-clockwise
    slack = height - view.size, width - view.size
    y, x = (int(p * (room + 1)) for p, room in zip(place, slack)) if place else (room // 2 for room in slack)
    return rgb[y:y + view.size, x:x + view.size]


# --------------------------------------------------------------------------------------------------------------- patches

def patchify(clip, patch=16, tubelet=2):
    """Clip [..., T, H, W, 3] -> patches [..., N, 3 * tubelet * patch * patch]: token n = (t * h + y) * w + x, vector (channel, dt, dy, dx).

    That is how a Conv3d patch embedding flattens its kernel. Works on numpy arrays and tensors of any dtype.
    """
    return rearrange(clip, "... (t dt) (y dy) (x dx) c -> ... (t y x) (c dt dy dx)", dt=tubelet, dy=patch, dx=patch)


def unpatchify(patches, grid=(8, 14, 14), patch=16, tubelet=2):
    """The inverse: patches [..., N, P] -> clip [..., T, H, W, 3]."""
    t, y, x = grid
    return rearrange(patches, "... (t y x) (c dt dy dx) -> ... (t dt) (y dy) (x dx) c", t=t, y=y, x=x, dt=tubelet, dy=patch, dx=patch)


# --------------------------------------------------------------------------------------------------------------- batches

class Sample(NamedTuple):
    id: int               # data.sample_id
    patches: np.ndarray   # uint8 [N, P]
    latents: np.ndarray | None  # float16 [N, D]


class Batch(NamedTuple):
    ids: torch.Tensor      # int64 [B]
    patches: torch.Tensor  # uint8 [B, N, P]
    latents: torch.Tensor | None  # float16 [B, N, D]

    def to(self, device):
        return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in self))


def prefetch(work, jobs, threads, ahead):
    """work(job) of each job, in order, computed on `threads` threads at most `ahead` jobs early. Threads only: no shared memory."""
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


def shuffled(n, seed, epoch):
    """The order of n samples in one epoch: a function of (n, seed, epoch)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)).tolist()


def batches(read, order, batch_size, threads=4, ahead=2, failed=None, substitutes=0):
    """Batches of `batch_size` from the samples read(i), i in `order` (any iterable, read no further ahead than needed).

    read         sample number -> Sample, called from threads; it may raise VideoError
    ahead        batches prepared early
    failed       called with (sample number, VideoError); by default the error is raised
    substitutes  0 (evaluation): a sample that fails is left out of its batch, and the last batch may be smaller.
                 n (training): its place goes to the next readable of the n samples, i + 1, i + 2, ..., which depends on i alone; the
                 last partial batch is dropped
    Raises InputError where 16 samples in a row fail.
    """
    def attempt(i):
        first = None
        for step in range(16 if substitutes else 1):
            try:
                return i, first, read((i + step) % substitutes if substitutes else i)
            except VideoError as error:
                first = first or error
        return i, first, None

    samples, seen = [], 0
    for i, error, sample in prefetch(attempt, order, threads, ahead * batch_size):
        if error and failed is None:
            raise error
        if error:
            failed(i, error)
        if sample:
            samples.append(sample)
        elif substitutes:
            raise InputError(f"16 videos in a row could not be decoded; the first: {error}")
        seen += 1
        if seen % batch_size == 0 and samples:
            yield collate(samples)
            samples = []
    if samples and not substitutes:
        yield collate(samples)


def collate(samples):
    """Samples as one Batch."""
    stack = lambda arrays: torch.from_numpy(np.stack(arrays))
    return Batch(torch.tensor([sample.id for sample in samples]), stack([sample.patches for sample in samples]),
                 None if samples[0].latents is None else stack([sample.latents for sample in samples]))


def video_reader(rows, view, patch, tubelet=2):
    """read(i) for batches: decodes row i's video under `view`; its latents are left to a teacher."""
    def read(i):
        row = rows[i]
        if row.path is None:
            raise VideoError(f"the video of the id {row.id!r} is not in the data folder")
        clip = read_clip(row.path, view, row.id)
        return Sample(sample_id(row.id, view.view), patchify(clip, patch, tubelet), None)
    return read


def check_batch(n, batch_size):
    """Raises InputError where n clips do not make one batch."""
    if n < batch_size:
        raise InputError(f"there are {n} clips, fewer than a batch of {batch_size}; lower --batch_size")


def cache_reader(cache, rows=None):
    """read(i) for batches: record i of a cache; its clip is decoded where the cache holds none, from the paths of `rows`."""
    paths = {row.id: row.path for row in rows or ()}
    if not cache.has_patches and not paths:
        raise InputError(f"the cache {cache.folder} holds no clips (--clips off), so the videos are needed: give --data")

    def read(i):
        name, number = cache.ids.fields(i)
        view = dataclasses.replace(cache.view, view=number)
        if cache.has_patches:
            patches = cache.patches(i)
        elif paths.get(name) is None:
            raise VideoError(f"the video of the id {name!r}, record {i} of {cache.folder}, is not in the data folder")
        else:
            patches = patchify(read_clip(paths[name], view, name), cache.patch, cache.tubelet)
        return Sample(sample_id(name, view.view), patches, cache.latents(i) if cache.has_latents else None)
    return read
