"""Frozen features: tokens of clips, made once and kept on disk, so that memory is bounded whatever
the number of clips. A Source is whatever gives tokens: an encoder, an untrained one of its shape, a
teacher, raw pixels.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from salt.errors import InputError
from salt.ops import patchify

HEADS = ("mean", "grid", "attentive")
CELLS = 7  # a side, of raw pixels and frame differences


class Source(NamedTuple):
    """What gives tokens of clips."""

    name: str
    grid: tuple  # (t, h, w) of its tokens, n = (t * h + y) * w + x
    dim: int
    tokens: Callable  # (clips uint8 [B, T, H, W, 3]) -> float [B, N, dim]
    heads: tuple = HEADS


def encoder_source(name, encoder):
    """A Source of an Encoder, or a teacher, which computes as it is set up to."""
    c = encoder.config

    @torch.no_grad()
    def tokens(clips):
        return encoder.encode(torch.from_numpy(patchify(clips, c.patch, c.tubelet)))

    return Source(name, tuple(c.grid), c.dim, tokens)


def pixel_cells(clips):
    """uint8 [B, T, H, W, 3] -> float32 [B, T, CELLS, CELLS, 3]: means of cells, in [0, 1]."""
    edges = [[round(i * size / CELLS) for i in range(CELLS + 1)] for size in clips.shape[2:4]]
    rows = np.add.reduceat(clips, edges[0][:-1], axis=2, dtype=np.float32)
    cells = np.add.reduceat(rows, edges[1][:-1], axis=3)
    area = np.outer(np.diff(edges[0]), np.diff(edges[1]))[..., None] * 255
    return cells / area.astype(np.float32)


def pixel_sources(frames):
    """Sources that know no more than where which colour is, and where it changes."""

    def pixels(clips):
        return rearrange(pixel_cells(clips), "b t y x c -> b (t y x) c")

    def differences(clips):
        return rearrange(np.diff(pixel_cells(clips), axis=1), "b t y x c -> b (t y x) c")

    linear = ("grid",)
    return [
        Source("pixels 7x7", (frames, CELLS, CELLS), 3, pixels, linear),
        Source("frame differences 7x7", (frames - 1, CELLS, CELLS), 3, differences, linear),
    ]


class Features:
    """float16 tokens of clips on disk, a file a source, as long as this context lasts.

    folder   where; None: the system's folder for temporary files
    sources  [Source]
    count    clips at most
    Raises InputError where the disk has no room for them.
    """

    def __init__(self, folder, sources, count):
        self.sources = {source.name: source for source in sources}
        self.shapes = {s.name: (math.prod(s.grid), s.dim) for s in sources}
        self.count = 0  # clips that are there
        if folder:
            os.makedirs(folder, exist_ok=True)
        needed = count * sum(2 * math.prod(shape) for shape in self.shapes.values())
        free = shutil.disk_usage(folder or tempfile.gettempdir()).free
        if needed > 0.95 * free:
            raise InputError(
                f"the features of {count} clips take {needed / 1e9:.1f} GB, and"
                f" {folder or tempfile.gettempdir()} has {free / 1e9:.1f} GB free; give --features"
                " a folder with room, or fewer videos"
            )
        self.place = tempfile.TemporaryDirectory(prefix="salt-features-", dir=folder)
        self.files = {
            name: open(os.path.join(self.place.name, f"{i}.f16"), "w+b", buffering=0)
            for i, name in enumerate(self.sources)
        }

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            file.close()
        self.place.cleanup()

    def add(self, clips):
        """Append clips uint8 [B, T, H, W, 3]; returns the numbers they have here."""
        clips = np.ascontiguousarray(clips)
        for name, source in self.sources.items():
            tokens = torch.as_tensor(source.tokens(clips)).to("cpu", torch.float32).numpy()
            if not np.isfinite(tokens).all():
                raise InputError(f"features of {name} are not finite; is its checkpoint damaged?")
            limit = np.finfo(np.float16).max
            stored = np.clip(tokens, -limit, limit).astype(np.float16)
            self.files[name].seek(0, os.SEEK_END)
            self.files[name].write(memoryview(stored).cast("B"))
        numbers = np.arange(self.count, self.count + len(clips))
        self.count += len(clips)
        return numbers

    def read(self, name, numbers):
        """float32 [B, N, D]: the tokens of these clips; of clips that are read as one, numbers int
        [B, S], [B, S * N, D], one after another.
        """
        tokens, dim = self.shapes[name]
        numbers = np.asarray(numbers)
        out = np.empty((numbers.size, tokens, dim), np.float16)
        size = 2 * tokens * dim
        for row, number in zip(out, numbers.flat):
            os.preadv(self.files[name].fileno(), [memoryview(row).cast("B")], int(number) * size)
        return torch.from_numpy(out.reshape(len(numbers), -1, dim)).float()

    def pooled(self, name, head, numbers, batch_size=64):
        """float32 [B, F]: what a linear head sees of these clips, see `pool`."""
        t, h, w = self.sources[name].grid
        grid = t * (numbers.shape[1] if numbers.ndim == 2 else 1), h, w
        found = None
        for i in range(0, len(numbers), batch_size):
            part = pool(self.read(name, numbers[i : i + batch_size]), grid, head)
            if found is None:  # one array from the start: of a ViT-L 2,000 clips take 0.6 GB
                found = np.empty((len(numbers), part.shape[1]), np.float32)
            found[i : i + len(part)] = part.numpy()
        return found


def pool(tokens, grid, head):
    """tokens float32 [B, N, D] on `grid` (t, h, w) -> [B, t * cells * D]: means over space, time
    kept, of one cell ('mean') or of 3x3 ('grid'; of pixels all of their 7x7).
    """
    t, h, w = grid
    x = rearrange(tokens, "b (t h w) d -> (b t) d h w", t=t, h=h, w=w)
    side = 1 if head == "mean" else CELLS if (h, w) == (CELLS, CELLS) and x.shape[1] == 3 else 3
    return rearrange(F.adaptive_avg_pool2d(x, side), "(b t) d y x -> b (t y x d)", t=t)
