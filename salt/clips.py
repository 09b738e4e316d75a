"""Where a Loader's clips come from: the videos of a list, or the records of a cache."""

import dataclasses
import itertools
import math

from salt import ops
from salt.cache_format import fingerprint, source_mark
from salt.errors import InputError, VideoError
from salt.video import read_row
from salt.views import grid_of


class Videos:
    """Clips cut from the videos of a list under one view."""

    cache, latent_shape = None, None

    def __init__(self, rows, view, patch, tubelet=2):
        self.rows = rows
        self.view = view
        self.patch = patch
        self.tubelet = tubelet
        self.decodes = True
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
        self.cache = cache
        self.view = cache.view
        self.patch = cache.patch
        self.tubelet = cache.tubelet
        self.decodes = not cache.has_patches
        self.rows = {row.id: row for row in rows or ()}
        if self.decodes and not self.rows:
            raise InputError(
                f"the cache {cache.folder} holds no clips (--clips off), so the videos are needed:"
                " give --data"
            )
        self.grid = grid_of(cache.view, cache.patch, cache.tubelet)
        self.patch_shape = tuple(cache.patch_shape)
        self.latent_shape = cache.latent_shape
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
