"""Frames to RGB by csrc/frames.cpp: the bits that swscale makes, in less than half of its time.

How swscale weighs columns and rows depends on the sizes, the filter and on where the file says that
its chroma samples lie, which PyAV does not tell. So the weights are read off what swscale makes of
bright columns and rows, and count once frames of noise become what swscale makes of them. They
serve frames from a key frame on, where alone that changes, if a small frame of noise shows the
same place of chroma samples. Where that fails swscale does the work.
"""

import collections
import threading
from typing import Any, NamedTuple

import numpy as np
import torch

from salt.extension import EXTENSION, salt_ops

FORMATS = [f"yuv{j}{chroma}p" for j in ("", "j") for chroma in ("420", "422", "444")]
# Videos of a shape before its weights are measured: that takes as long as 100 frames, and as some
# 400 where they become ten times smaller.
PATIENCE = 8
DARK, BRIGHT = 64, 192  # of the columns and rows
SMALL = 32  # pixels, the side of the frame that tells where chroma samples lie
# Smaller by more than this, or to fewer pixels, a frame of noise could become the same by chance.
SMALLER, FEWEST = 16, 16
NOISES = 4  # frames of noise that a Scaling is compared by


class Key(NamedTuple):
    """What a Scaling is for, but for the place of chroma samples."""

    format: str
    color_range: int
    colours: tuple[int, ...]  # matrix, primaries, curve
    interlaced: bool
    height: int  # of the part of a frame
    width: int
    size: int
    how: Any  # swscale's flags


class Known:
    """What is known of a Key."""

    def __init__(self):
        self.videos = 0
        self.lock = threading.Lock()  # of one thread that measures
        self.scalings = {}  # by what swscale makes of a small frame; None: it has none


known = collections.defaultdict(Known)


def key_of(frame, part, size, how):
    """part: (height, width, ...) of what is taken of the frame."""
    colours = frame.colorspace, frame.color_primaries, frame.color_trc
    looks = frame.format.name, frame.color_range, colours, frame.interlaced_frame
    return Key(*looks, part[0], part[1], size, how)


def find(key, copy, first):
    """The Scaling that makes of a video's frames what swscale does, or None.

    copy   (height, width) -> a frame as large as that, the video's in all but its content
    first  whether the video is asked about for the first time
    """
    if EXTENSION["simd"] not in ("avx2", "avx512") or key.format not in FORMATS:
        return None
    here = known[key]
    here.videos += first
    largest, smallest = max(key.height, key.width), min(key.height, key.width)
    fits = smallest >= SMALL and key.size >= FEWEST and largest <= SMALLER * key.size
    if not fits or here.videos < PATIENCE:
        return None
    chroma = b"".join(made.tobytes() for made in of_noise(copy(SMALL, SMALL), SMALL, key.how))
    if chroma not in here.scalings and here.lock.acquire(blocking=False):
        try:
            here.scalings[chroma] = measure(copy(key.height, key.width), key)
        finally:
            here.lock.release()
    return here.scalings.get(chroma)


def by_swscale(frame, size, how, pixels="gbrp", color_range="JPEG", reformatter=None):
    """What swscale makes of a frame: planes [size, size] of uint8, or of uint16 where the format's
    name has 16 in it.
    """
    from av.video.reformatter import VideoReformatter

    made: Any = (reformatter or VideoReformatter()).reformat(
        frame,
        size,
        size,
        pixels,
        interpolation=how,
        dst_color_range=color_range,
        threads=1,
    )
    dtype = np.uint16 if "16" in pixels else np.uint8
    planes = [np.frombuffer(plane, dtype).reshape(plane.height, -1) for plane in made.planes]
    return [plane[:, :size] for plane in planes]


def planes_of(frame, y=0, x=0):
    """[(buffer, first byte, bytes from row to row)] of a frame's planes, from (y, x) on."""
    shapes = [(16, 16), *[(frame.format.chroma_height(16), frame.format.chroma_width(16))] * 2]
    return [
        (plane, y * height // 16 * plane.line_size + x * width // 16, plane.line_size)
        for plane, (height, width) in zip(frame.planes, shapes, strict=True)
    ]


def of_noise(frame, size, how, work=None, seed=0):
    """What swscale, or a Scaling, makes of a frame of noise: red, green and blue, [size, size]."""
    random = np.random.default_rng(seed)
    for plane in frame.planes:
        plane.update(random.bytes(plane.buffer_size))
    if work is None:
        green, blue, red = by_swscale(frame, size, how)
        return [red, green, blue]
    made = np.empty((3, size, size), np.uint8)
    work.convert(planes_of(frame), made)
    return list(made)


def measure(frame, key):
    """A Scaling by swscale's own weights, or None where csrc/frames.cpp has none of the kind."""
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    shapes = [(plane.height, plane.width) for plane in frame.planes]

    def seen(planes, pixels, color_range):
        """Of the middle row and column of what becomes of planes: 8 bits and a fraction."""
        for plane, values in zip(frame.planes, planes, strict=True):
            rows = np.zeros((plane.height, plane.line_size), np.uint8)
            rows[:, : plane.width] = values
            plane.update(rows.tobytes())
        made = by_swscale(frame, key.size, key.how, pixels, color_range, reformatter)
        middle = key.size // 2
        return [np.stack([plane[middle], plane[:, middle]]) / 256 for plane in made]

    def weights(axis, bits):
        """Tables of luma and chroma: across rows (axis 1) or down columns (0)."""
        tables = [np.zeros((key.size, shape[axis]), np.int64) for shape in shapes[:2]]
        # further than any output looks
        apart = 2 * int(np.ceil(2 * max(1, shapes[0][axis] / key.size))) + 4
        outputs = np.arange(key.size)
        for first in range(apart):
            lines = [np.full(shape[axis], DARK) for shape in shapes]
            for line in lines:
                line[first::apart] = BRIGHT
            planes = [line if axis else line[:, None] for line in lines]
            made = seen(planes, "yuv444p16le", "JPEG" if full else "MPEG")
            for table, values in zip(tables, made):
                count = table.shape[1]
                centre = (outputs + 0.5) * count / key.size - 0.5
                place = np.rint((centre - first) / apart).astype(int) * apart + first
                inside = (place >= 0) & (place < count)
                weight = (values[1 - axis] - DARK) / (BRIGHT - DARK) * 2**bits
                table[outputs[inside], place[inside]] = np.rint(weight)[inside]
        return [axis_of(table) for table in tables]

    def colour(y, u, v):
        green, blue, red = seen([y, u, v], "gbrp16le", "JPEG")
        return np.array([plane[0, 0] for plane in (red, green, blue)])

    full = key.color_range == 2 or "j" in key.format
    across, down = weights(1, 14), weights(0, 12)
    low, high = colour(40, 128, 128), colour(200, 128, 128)
    by_y = np.rint((high - low)[1] / 160 * 2**13)
    offset = np.rint(40 - low[1] / by_y * 2**13) * 2**9
    by_u = np.rint((colour(120, 168, 128) - colour(120, 88, 128)) / 80 * 2**13)
    by_v = np.rint((colour(120, 128, 168) - colour(120, 128, 88)) / 80 * 2**13)
    numbers = [offset, by_y, by_u[1], by_u[2], by_v[0], by_v[1]]
    try:
        work = salt_ops.Scaling(key.size, across, down, [int(number) for number in numbers])
    except ValueError:  # a plane of a few pixels
        return None
    for seed in range(NOISES):
        made, by_it = (of_noise(frame, key.size, key.how, each, seed) for each in (work, None))
        if not np.array_equal(made, by_it):
            return None
    return work


def axis_of(table):
    """(inputs, first of each output's, their weights) of a table [outputs, inputs] of weights."""
    inputs = table.shape[1]
    first = (table != 0).argmax(1)
    last = inputs - 1 - (table[:, ::-1] != 0).argmax(1)
    taps = (last - first).max() + 1
    first = np.minimum(first, inputs - taps)
    weight = np.take_along_axis(table, first[:, None] + np.arange(taps), 1)
    return (
        inputs,
        torch.from_numpy(first.astype(np.int32)),
        torch.from_numpy(weight.astype(np.int16)),
    )
