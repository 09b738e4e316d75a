"""Videos: which there are, how a clip is cut out of one, patches, and batches for training.

av is imported only where a video is decoded, so that training from a cache with clips runs without it.
"""
import csv
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
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
HELD_BYTES = 64 * 2**20  # of packets, kept between counting and decoding; a larger video is read twice


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
    split       'train', 'validation' or 'test'; 'train+validation', as a merged cache has it, is one after the other
    log         called with one line that says which file was used
    Raises InputError, naming file and row, on a missing or malformed list, an id that is no plain name, or no video at all.
    """
    if "+" in split:
        rows = [row for part in split.split("+") for row in load_split(folder, part, splits_dir, log)]
        if len({row.id for row in rows}) < len(rows):
            raise InputError(f"the splits {split} of {folder} share ids")
        return rows
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

def read_clip(path, view=View(), video_id=None):
    """The clip that `view` cuts out of the video at `path`: uint8 [T, H, W, 3], RGB, T = view.frames, H = W = view.size.

    Its channels lie in planes (it is a transposed [T, 3, H, W]), as swscale makes them fastest and patches want them. video_id (the file's stem by default) decides the jitter of views > 0. Raises VideoError, naming the file.
    """
    return read_clips(path, [view], video_id)[0]


def read_clips(path, views, video_id=None):
    """The clips that several views cut out of one video, from one decode; a list of what read_clip gives.

    A video's frames are counted by the packets that carry them, and again by decoding where a packet gives none. Decoding stops after the last
    frame that a view keeps; a kept frame is cropped, then resized and converted in one swscale pass, with the colour matrix and range that the
    file states, and turned upright.
    """
    import av
    name = os.path.splitext(os.path.basename(path))[0] if video_id is None else video_id
    clips = [None] * len(views)
    if isinstance(path, (str, os.PathLike)) and os.path.exists(path) and not os.path.isfile(path):
        raise VideoError(f"{path} is no regular file")  # a pipe, a device or a folder would be read for ever, or not at all
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            n, held, size = 0, [], 0
            for packet in container.demux(stream):  # headers of webm files state no count, others lie
                n += shows(packet)
                size += packet.size
                if size <= HELD_BYTES:
                    held.append(packet)
                else:
                    held.clear()
            if n == 0:
                raise VideoError(f"{path} holds no frame")
            if size <= HELD_BYTES:
                n = cut(held, stream, views, clips, name, n, path)
        for _ in range(3):
            if all(clip is not None for clip in clips) or n == 0:
                break
            with av.open(path, metadata_errors="ignore") as container:
                stream = video_stream(container, path)
                n = cut(container.demux(stream), stream, views, clips, name, n, path)
        if any(clip is None for clip in clips):
            raise VideoError(f"{path}: no frame could be decoded" if n == 0 else f"{path} decodes to another number of frames each time")
        return clips
    except av.error.FFmpegError as error:
        check_disk(path)
        raise VideoError(f"{path} cannot be decoded: {error.strerror or error}") from None


def clip_of_frames(frames, view=View(), video_id=""):
    """The clip that `view` cuts out of frames in memory, as read_clip out of a lossless RGB video.

    frames uint8 [n, H, W, 3], RGB, a whole video or an episode so far -> uint8 [T, size, size, 3].
    video_id decides the jitter of views > 0. Raises InputError on anything else.
    """
    import av
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise InputError(f"{frames.dtype} {list(frames.shape)} was given; clip_of_frames takes "
                         "frames uint8 [n, H, W, 3], at least one")
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
    if not container.streams.video:
        raise VideoError(f"{path} holds no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(f"{path} is in a codec that this build of FFmpeg does not know")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise VideoError(f"{path} states frames of {stream.codec_context.width}x{stream.codec_context.height}, more than {MAX_PIXELS} pixels")
    stream.codec_context.thread_count = 1  # parallelism is over videos
    return stream


def shows(packet):
    """Whether a packet carries a frame that is shown; the last one of a stream is empty and flushes the decoder."""
    return packet.size > 0 and not packet.is_discard


def check_disk(path):
    """After a video failed: read it plainly. A file that is not there is the video's fault; a failing disk or a folder that is gone is not, and
    ends the run as OSError."""
    os.stat(os.path.dirname(path) or ".")
    try:
        with open(path, "rb") as file:
            while file.read(1 << 22):
                pass
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR):
            raise
        raise VideoError(f"{path} cannot be read: {error.strerror}") from None


def cut(packets, stream, views, clips, name, n, path):
    """Cut those of `views` that have no clip yet out of a video that is said to have n frames, into `clips`; returns how many it turned out to have.

    A view is done when its last frame has come and every packet so far has given its frame: then n is right as far as that view looks, and what
    comes after does not matter. Else it is done at the end, where n was right, or left without a clip. No view's clip depends on the others.
    """
    import av
    asked, made, takers = [i for i, clip in enumerate(clips) if clip is None], {}, {}  # takers: frame number -> [(view, place in its clip)]
    places, last = {}, {}
    for i in asked:
        random = ops.Random(views[i].seed, 0, sample_id(name, views[i].view), ops.STREAMS["view"]) if views[i].view > 0 else None
        numbers = frame_numbers(n, views[i], random).tolist()
        places[i], last[i] = (random.uniform(), random.uniform()) if random else None, numbers[-1]
        made[i] = np.empty((views[i].frames, 3, views[i].size, views[i].size), np.uint8)
        for place, number in enumerate(numbers):
            takers.setdefault(number, []).append((i, place))
    fed, decoded, delay, broken, scaler = 0, 0, None, False, Scaler(path)
    for packet in packets:
        fed += shows(packet)
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            broken = True  # passed over, as players do
            continue
        for frame in frames:
            converted = {}
            for i, place in takers.get(decoded, ()):
                if i not in converted:
                    converted[i] = scaler.convert(frame, views[i], places[i])
                for channel, plane in enumerate(converted[i]):
                    made[i][place, channel] = plane
            decoded += 1
        if decoded and delay is None:
            delay = fed - decoded if stream.codec_context.has_b_frames else 0  # packets that the codec holds back to reorder frames
        if decoded and not broken and fed - decoded <= delay:
            for i in [i for i in asked if decoded > last[i]]:
                clips[i] = made[i].transpose(0, 2, 3, 1)
                asked.remove(i)
            if not asked:
                return n
    for i in asked if decoded == n else ():
        clips[i] = made[i].transpose(0, 2, 3, 1)
    return decoded


class Scaler:
    """Frames of one video as upright RGB. One swscale context, and one crop filter a shape, serve all of them."""

    def __init__(self, path):
        import av
        self.path, self.reformatter, self.graphs = path, av.video.reformatter.VideoReformatter(), {}
        # Without full chroma swscale takes, for widths that are multiples of 8 alone, a short cut that is two levels too dark; to planes (gbrp)
        # the exact way is two and a half times as fast as to interleaved rgb24, with the same values.
        self.exact = av.video.reformatter.Interpolation.FULL_CHR_H_INT | av.video.reformatter.Interpolation.ACCURATE_RND

    def convert(self, frame, view, place):
        """Planes uint8 [3, size, size] of red, green and blue, cropped at `place` (two fractions of the room there is), or in the middle."""
        turned = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if turned % 2 else (frame.height, frame.width)
        if max(height * width, view.size ** 2) > MAX_PIXELS:
            raise VideoError(f"{self.path} has frames of {frame.width}x{frame.height}, more than {MAX_PIXELS} pixels")
        if view.crop == "center":  # the square that becomes size x size where the short side becomes short_side
            side = max(1, round(min(height, width) * view.size / view.short_side))
            y, x = (int(p * (room - side + 1)) if place else (room - side) // 2 for p, room in zip(place or (0, 0), (height, width)))
            y, x = ((y, x), (x, height - y - side), (height - y - side, width - x - side), (width - x - side, y))[turned]  # as the frame is stored
            frame = self.crop(frame, side, y, x)
        how = type(self.exact)[view.interpolation.upper()] | self.exact
        made = self.reformatter.reformat(frame, view.size, view.size, "gbrp", interpolation=how, dst_color_range="JPEG", threads=1)
        planes = [np.frombuffer(made.planes[i], np.uint8).reshape(-1, made.planes[i].line_size)[:view.size, :view.size] for i in (2, 0, 1)]
        return [np.rot90(plane, turned) for plane in planes] if turned else planes  # VideoFrame.rotation and rot90 both count counter-clockwise

    def crop(self, frame, side, y, x):
        """The square of a frame from (y, x) on, moved up and left to where its chroma samples begin; no pixel is copied."""
        if frame.width == frame.height == side:
            return frame
        import av
        x -= x % (16 // frame.format.chroma_width(16))
        y -= y % (16 // frame.format.chroma_height(16))
        key = frame.width, frame.height, frame.format.name, side, y, x
        if key not in self.graphs:
            graph = av.filter.Graph()
            graph.threads = 1
            source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000))
            crop, sink = graph.add("crop", f"{side}:{side}:{x}:{y}:exact=1"), graph.add("buffersink")
            source.link_to(crop)
            crop.link_to(sink)
            graph.configure()
            self.graphs[key] = graph
        self.graphs[key].push(frame)
        return self.graphs[key].pull()


# --------------------------------------------------------------------------------------------------------------- patches

def patchify(clip, patch=16, tubelet=2):
    """Clip [..., T, H, W, 3] -> patches [..., N, 3 * tubelet * patch * patch]: token n = (t * h + y) * w + x, vector (channel, dt, dy, dx).

    That is how a Conv3d patch embedding flattens its kernel. Works on numpy arrays and tensors of any dtype.
    """
    return rearrange(clip, "... (t dt) (y dy) (x dx) c -> ... (t y x) (c dt dy dx)", dt=tubelet, dy=patch, dx=patch)


def unpatchify(patches, grid=(8, 14, 14), patch=16, tubelet=2):
    """The inverse of patchify: patches [..., N, P] -> clip [..., T, H, W, 3]."""
    t, y, x = grid
    return rearrange(patches, "... (t y x) (c dt dy dx) -> ... (t dt) (y dy) (x dx) c", t=t, y=y, x=x, dt=tubelet, dy=patch, dx=patch)


# --------------------------------------------------------------------------------------------------------------- batches

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


class Videos:
    """Clips cut from the videos of a list under one view."""
    cache, latent_shape = None, None

    def __init__(self, rows, view, patch, tubelet=2):
        self.rows, self.view, self.patch, self.tubelet, self.decodes = rows, view, patch, tubelet, True
        self.grid = grid_of(view, patch, tubelet)
        self.patch_shape = math.prod(self.grid), 3 * tubelet * patch * patch

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        """(video id, view number) of clip i."""
        return self.rows[i].id, self.view.view

    def decode(self, i, out):
        """Write clip i's patches to the uint8 array `out` [N, P]. Raises VideoError."""
        row = self.rows[i]
        if row.path is None:
            raise VideoError(f"the video of the id {row.id!r} is not in the data folder")
        ops.patchify_into(read_clip(row.path, self.view, row.id), out, self.patch, self.tubelet)


class Records:
    """Clips and latents of a cache; where it holds no clips they are decoded, from the paths of `rows`."""

    def __init__(self, cache, rows=None):
        self.cache, self.view, self.patch, self.tubelet, self.decodes = cache, cache.view, cache.patch, cache.tubelet, not cache.has_patches
        self.paths = {row.id: row.path for row in rows or ()}
        if self.decodes and not self.paths:
            raise InputError(f"the cache {cache.folder} holds no clips (--clips off), so the videos are needed: give --data")
        self.grid, self.patch_shape, self.latent_shape = grid_of(cache.view, cache.patch, cache.tubelet), tuple(cache.patch_shape), cache.latent_shape

    def __len__(self):
        return len(self.cache)

    def name(self, i):
        return self.cache.ids.fields(i)

    def decode(self, i, out):
        name, number = self.name(i)
        if self.paths.get(name) is None:
            raise VideoError(f"the video of the id {name!r}, record {i} of {self.cache.folder}, is not in the data folder")
        ops.patchify_into(read_clip(self.paths[name], dataclasses.replace(self.view, view=number), name), out, self.patch, self.tubelet)


class Batch(NamedTuple):
    ids: torch.Tensor      # int64 [B], sample ids
    patches: torch.Tensor | None  # uint8 [B, N, P]
    latents: torch.Tensor | None  # float16 [B, N, D]
    masks: dict            # {family: Masks} of these clips
    records: np.ndarray | None = None  # int64 [B], which of the source's records these are


def shuffled(n, batch_size, seed, steps, rank=0, world=1):
    """(epoch, records int64 [batch_size / world]) of each step in `steps`: every epoch a new order of the n records, the last partial batch dropped.

    A function of (n, batch_size, seed, step), of which a rank takes its part; no list of records is kept.
    """
    for step in steps:
        epoch, place = divmod(step, n // batch_size)
        yield epoch, ops.permute(np.arange(place * batch_size, (place + 1) * batch_size)[rank * batch_size // world:(rank + 1) * batch_size // world], n, seed, epoch)


def in_order(records, batch_size):
    """(0, records [<= batch_size]) one after another: a sampler for evaluation."""
    for start in range(0, len(records), batch_size):
        yield 0, np.asarray(records[start:start + batch_size])


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
        raise InputError(f"there are {n} clips, fewer than a batch of {batch_size}; lower --batch_size")


class Slots:
    """Memory of one batch, used again and again: pinned where it goes on to a GPU, else numpy's, which asks for large pages."""

    def __init__(self, source, batch_size, with_latents, pin):
        def make(shape, dtype, numpys):
            return torch.empty(batch_size, *shape, dtype=dtype, pin_memory=True) if pin else torch.from_numpy(np.empty((batch_size, *shape), numpys))

        self.patches = make(source.patch_shape, torch.uint8, np.uint8)
        self.latents = make(source.latent_shape, torch.float16, np.float16) if with_latents else None
        self.copied = None  # a CUDA event: the copy to the GPU that still reads these


@functools.lru_cache
def copy_stream(device):
    """The stream on which batches go over to a GPU: one for all, since the memory allocator keeps a pool for each."""
    return torch.cuda.Stream(device)


def batches(source, sampler, families=(), seed=0, patches=None, latents=None, threads=4, ahead=2, device="cpu", failed=None, substitutes=False):
    """Batches of clips with their masks, prepared by threads while the caller works on the one before. No processes: no shared memory.

    source       Videos or Records
    sampler      yields (epoch, records) a batch: shuffled() or in_order()
    families     mask families to draw, by `seed`, the batch's epoch and each clip's id
    patches, latents  which rows the caller will look at: parts of a mask, ("context",), ("target",) or both; () none at all; None every row.
                 Other rows hold what an earlier batch left there. A row that several families ask for is read once
    threads      decoding and reading threads
    ahead        batches prepared early; memory for one more is kept
    device       where the batches go; to a GPU on a stream beside the caller's, whole, since PCIe has the room: 116 MB for 24 clips
    failed       called with (record, VideoError) in the order of the batches; by default the error is raised
    substitutes  True (training): the place of a video that cannot be decoded goes to the next readable of records i + 1, i + 2, ..., which
                 depends on i alone. False (evaluation): it is left out of its batch
    A batch's tensors are the caller's until it asks for the next. Its content depends on seed, epoch and records alone. Raises InputError where 16
    videos in a row fail, and, naming shard and row, where a cache cannot be read.
    """
    device, cache = torch.device(device), source.cache
    side = copy_stream(device) if device.type == "cuda" else None
    n = source.patch_shape[0]
    stored = {"patches": not source.decodes, "latents": source.latent_shape is not None}
    reads = [kind for kind, rows in (("patches", patches), ("latents", latents)) if stored[kind] and rows != ()]  # from the cache

    def decode(slots, place, i):
        """Fill a place with clip i, or in training with the next readable one: (the record or None, the first error or None)."""
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
        masks, wanted = {family: ops.sample_masks(ids, epoch, seed, family, source.grid) for family in families}, {}
        for kind, parts in (("patches", patches), ("latents", latents)):
            wanted[kind] = None if parts is None or not masks else torch.zeros(len(ids), n, dtype=torch.bool)
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
                for place, good in enumerate([place for place, (record, _) in enumerate(results) if record is not None]):
                    if place != good:
                        slots.patches[place] = slots.patches[good]
        if not len(kept):
            return None, errors
        ids, masks, wanted = planned.result() if planned and not errors else plan(epoch, kept)
        for kind in reads:
            cache.read_rows(kind, kept, getattr(slots, kind)[:len(ids)], wanted[kind], threads)
        clips, made = (None if x is None else x[:len(ids)] for x in (None if patches == () else slots.patches, slots.latents))
        if not side:
            return Batch(ids, clips, made, masks, np.asarray(kept, np.int64)), errors
        with torch.cuda.stream(side):
            to = lambda x: None if x is None else x.to(device, non_blocking=True)
            few = to(ids), {family: ops.Masks(*map(to, drawn)) for family, drawn in masks.items()}  # first: from pageable memory these wait for the stream
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
            for x in (batch.ids, batch.patches, batch.latents, *(x for drawn in batch.masks.values() for x in drawn)):
                if x is not None:
                    x.record_stream(stream)
        return batch

    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(1) as assembler, ThreadPoolExecutor(1) as planner:
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
                decoding = [decoders.submit(decode, slots, place, record) for place, record in to_decode]
                pending.append((slots, assembler.submit(assemble, slots, epoch, records, decoding, planned)))
            while pending:
                if batch := hand_over(*pending.popleft()):
                    yield batch
        finally:
            for pool in (assembler, decoders, planner):
                pool.shutdown(wait=False, cancel_futures=True)
