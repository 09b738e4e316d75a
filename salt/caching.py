"""What cache_latents.py works on: teacher, view and rows opened together, or refused; and what a
cache of them takes.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import numpy as np
import torch
from einops import rearrange

from salt import config, lerobot, ops, teachers
from salt.cache import open_cache
from salt.cache_format import plan_of, source_mark
from salt.cache_writer import list_digest
from salt.errors import InputError, VideoError
from salt.shards import SHARD_ROWS, shard_rows
from salt.splits import load_split
from salt.video import read_row
from salt.views import View, grid_of

OF_CLIPS = (
    "data frames resolution student_resolution patch sampling stride crop interpolation limit"
).split()


def refuse(s):
    """What settings alone tell. s: cache_latents.py's settings."""
    if s.out is None or s.teacher == "" or (s.data is None and s.clips_from is None):
        raise InputError(
            "give --out, --teacher (or --teacher none) and --data (or --clips_from); see --help"
        )
    if s.clips == "off" and s.teacher.lower() == "none":
        raise InputError("--teacher none keeps nothing but clips; leave --clips off out")
    if s.latents == "i8" and s.teacher.lower() == "none":
        raise InputError("--teacher none keeps no latents; leave --latents out")
    named = {"teacher_layers", "teacher_frames", "teacher_norm"} & config.given
    if s.teacher.lower() == "none" and (named or s.student_resolution):
        names = ", ".join(f"--{name}" for name in sorted(named)) or "--student_resolution"
        raise InputError(f"--teacher none has no latents for {names}; leave it out")
    shared = {"split", "views"} & config.given | {name for name in OF_CLIPS if s[name] is not None}
    if s.clips_from and (shared or s.clips == "on"):
        names = ", ".join(f"--{name}" for name in sorted(shared)) or "--clips on"
        raise InputError(
            f"--clips_from takes clips, ids and view from {s.clips_from}; leave {names} out"
        )


class Work:
    """The rows to cache, .ids [(video id, view number)], and how each becomes clip and latents.

    s       cache_latents.py's settings
    device  of the teacher
    log     called with a line
    .encoder is the teacher or None, .shape its EncoderConfig; .source the Cache that clips are
    taken from, or None; .view cuts the clips that students see, .shown those that the teacher does.
    Raises InputError on what does not go together.
    """

    def __init__(self, s, device, log):
        self.s = s
        self.log = log
        self.source = open_cache(s.clips_from) if s.clips_from else None
        self.encoder: Any = None
        if s.teacher.lower() != "none":
            shape = s.frames, s.resolution
            if self.source:
                shape = self.source.view.frames, self.source.view.size
            layers = tuple(s.teacher_layers)
            asked = teachers.Asked(*shape, layers, s.teacher_frames, s.teacher_norm)
            self.encoder = teachers.load_teacher(s.teacher, device, s.dtype, asked)
        self.shape = self.encoder.config if self.encoder else None
        if self.source:
            self.view = self.shown = self.source.view
            self.patch, self.tubelet = self.source.patch, self.source.tubelet
        else:
            self.shown = self.view = self.view_asked_for()
            self.patch = s.patch or (self.shape.patch if self.shape else 16)
            self.tubelet = self.shape.tubelet if self.shape else 2
        # then they have a view and a grid of their own
        self.resampled = bool(s.student_resolution)
        if self.resampled:
            size = s.student_resolution
            self.view = View(self.shown.frames, size, size).cut_as(self.shown)
        if self.shape:
            self.refuse_other_clips()
            line = self.encoder.other_view(self.shown)
            if line:
                log(line)
            for line in teachers.notes(self.encoder, s.teacher):
                log(line)
        self.tokens = math.prod(grid_of(self.view, self.patch, self.tubelet))
        self.patch_dim = 3 * self.tubelet * self.patch * self.patch
        self.views = self.source.metadata["views"] if self.source else s.views
        self.videos = []
        if not self.source:
            rows = load_split(s.data, s.split, s.splits_dir, log, lerobot.asked(s))
            self.videos = rows[: s.limit]
            # a video's views lie side by side, and are cut from one decode
            self.ids = [(video.id, n) for video in self.videos for n in range(s.views)]
        elif self.source.has_patches:
            self.ids = [self.source.ids.fields(row) for row in range(len(self.source))]
        else:
            raise InputError(
                f"the cache {s.clips_from} holds no clips (--clips off) to take; give --data"
                " instead"
            )

    def view_asked_for(self):
        s, shape = self.s, self.shape
        size = s.resolution or (shape.size if shape else 224)
        view = View(s.frames or (shape.frames if shape else 16), size, size)
        if self.encoder:  # a checkpoint of train.py says how its clips were cut
            view = view.cut_as(self.encoder.view)
        names = ("sampling", "stride", "crop", "interpolation")
        return dataclasses.replace(view, **{name: s[name] for name in names if s[name] is not None})

    def refuse_other_clips(self):
        view, shape = self.shown, self.shape
        patch = shape.patch if self.resampled else self.patch
        for name, takes, has in (
            ("frames", shape.frames, view.frames),
            ("resolution", shape.size, view.size),
            ("patch", shape.patch, patch),
            ("tubelet", shape.tubelet, self.tubelet),
        ):
            if takes != has:
                raise InputError(
                    f"the teacher {self.s.teacher} takes {name} {takes}, but the clips have {has};"
                    f" change {'--clips_from' if self.source else f'--{name}'}"
                )

    # ---- clips

    def rows_of(self, number):
        """Rows of the list that a shard is made of."""
        return shard_rows(number, len(self.ids))

    def clips_of(self, together):
        """[(patches uint8 [N, P], what the teacher is shown) or VideoError] of rows of one video:
        it is shown the patches, or a clip uint8 [T, H, W, 3] where it has a view of its own.
        """
        if self.source:
            made = [self.source.checked_patches(row) for row in together]
            return [(patches, patches) for patches in made]
        video = self.videos[together[0] // self.views]
        numbers = [self.ids[row][1] for row in together]
        views = [self.view, self.shown] if self.resampled else [self.view]
        cuts = [dataclasses.replace(view, view=number) for view in views for number in numbers]
        try:
            clips = read_row(video, cuts)
        except VideoError as error:
            return [error] * len(together)
        patches = [np.empty((self.tokens, self.patch_dim), np.uint8) for _ in numbers]
        for clip, made in zip(clips, patches):
            ops.patchify_into(clip, made, self.patch, self.tubelet)
        return list(zip(patches, clips[len(numbers) :] or patches))

    def can_be_decoded(self, row):
        return not isinstance(self.clips_of([row])[0], VideoError)

    def source_of(self, row):
        """cache_format.source_mark of what a row is cut from."""
        return 0 if self.source else source_mark(self.videos[row // self.views])

    def check_sources(self, made):
        """Raises InputError where a video was replaced, or its stretch changed, since its record
        was made. Files that are gone now tell nothing.

        made: [(row, source_mark)]
        """
        if self.source:
            return
        now = [source_mark(video) for video in self.videos]
        changed = [row for row, mark in made if mark and now[row // self.views] not in (0, mark)]
        if changed:
            raise InputError(
                f"{self.s.out} holds {len(changed)} records of videos whose file has another size"
                f" now, or whose start and end were changed, {self.ids[changed[0]][0]!r} among"
                " them: bring back what they were made from, or delete the cache and make it again"
            )

    def latents_of(self, shown):
        """The teacher's latents [b, N, D] of clips on its device, on the student's grid."""
        made = teachers.teacher_latents(self.encoder, shown)
        grid = grid_of(self.view, self.patch, self.tubelet)
        return by_area(made, self.shape.grid, grid) if self.resampled else made

    # ---- the disk

    @functools.cached_property
    def latent_bytes(self):
        """Of a record."""
        if not self.shape:
            return 0
        if self.s.latents == "i8":
            return self.tokens * self.shape.dim + 4 * (self.shape.dim + self.tokens)
        return 2 * self.tokens * self.shape.dim

    @property
    def clip_bytes(self):
        return self.tokens * self.patch_dim

    def keeps_clips(self, begun, free):
        """Whether clips are kept: --clips, or as the plan of a cache that was begun says, or where
        they fit into `free` bytes.
        """
        if self.source or not self.shape or self.s.clips != "auto":
            return not self.source and (not self.shape or self.s.clips == "on")
        if begun:
            return begun["clips"]
        return len(self.ids) * (self.latent_bytes + self.clip_bytes) < 0.95 * free

    def check_disk_space(self, rows, keep_clips, free):
        """Raises InputError where so many rows need more than `free` bytes."""
        # of each shard, until the cache is whole
        statistics = -(-rows // SHARD_ROWS) * 8 * self.tokens * self.shape.dim if self.shape else 0
        needed = rows * (self.latent_bytes + keep_clips * self.clip_bytes) + statistics
        self.log(
            f"disk: {needed / 1e9:.2f} GB needed ({rows * self.latent_bytes / 1e9:.2f} latents,"
            f" {rows * keep_clips * self.clip_bytes / 1e9:.2f} clips, {statistics / 1e9:.2f} while"
            f" it is being made), {free / 1e9:.1f} GB free"
        )
        if needed > free:
            raise InputError(
                f"{self.s.out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB"
                " free; free some, or try --latents i8, --clips off or --limit"
            )

    def plan(self, keep_clips):
        """What the metadata says beforehand, for a cache_writer.Writer."""
        s, shape, clips_from = self.s, self.shape, None
        if self.source:
            ends = (os.path.realpath(str(path)) for path in (s.clips_from, s.out))
            clips_from = os.path.relpath(*ends)
        teacher = self.encoder and {
            "name": self.encoder.name,
            "dim": shape.dim,
            **self.encoder.identity,
        }
        if self.resampled:
            teacher["shown"] = self.shown.to_dict()
        return plan_of(
            self.view,
            list_digest(self.ids),
            len(self.ids),
            teacher,
            self.patch,
            self.tubelet,
            split=self.source.metadata["split"] if self.source else s.split,
            views=self.views,
            dtype={"f16": "float16", "i8": "int8"}[s.latents],
            batch_size=s.batch_size,
            clips=bool(keep_clips),
            clips_from=clips_from,
        )


def by_area(latents, grid, other):
    """Latents [B, N, D] of a grid (t, h, w) on another (t, h', w'): a token is the mean of those
    that its place covers, by the area that each has of it.
    """
    down, across = (overlaps(n, m).to(latents) for n, m in zip(grid[1:], other[1:]))
    laid_out = rearrange(latents, "b (t h w) d -> b t h w d", t=grid[0], h=grid[1])
    made = torch.einsum("btywd,xw->btyxd", laid_out, across)
    return rearrange(torch.einsum("btywd,hy->bthwd", made, down), "b t h w d -> b (t h w) d")


def overlaps(n, m):
    """float64 [m, n]: the share that each of n equal parts of a line has in each of m."""
    cuts = torch.arange(m + 1, dtype=torch.float64) / m
    parts = torch.arange(n + 1, dtype=torch.float64) / n
    ends = torch.minimum(cuts[1:, None], parts[None, 1:])
    return m * (ends - torch.maximum(cuts[:-1, None], parts[None, :-1])).clamp(min=0)
