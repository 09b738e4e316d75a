"""A shard of a latent cache on its way to the disk: some rows of its list, whole or not at all."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np

from salt.cache_format import fingerprint, row_formats, shard_name
from salt.errors import InputError
from salt.files import sha256, write_whole
from salt.stored import Moments, from_stored

SHARD_ROWS = 512


def shard_rows(number, count):
    """Rows of a list of `count` that a shard is made of."""
    return range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, count))


def npy_header(shape, dtype):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
    )
    return header.getvalue()


class RowFile:
    """An .npy file written row by row under a temporary name; the number of rows goes into its
    header at the end.
    """

    def __init__(self, path, row_shape, dtype):
        self.path = path
        self.part = Path(f"{path}.part")
        self.row_shape = tuple(row_shape)
        self.dtype = np.dtype(dtype)
        self.rows, self.first = 0, {}
        with self.naming():
            self.file = open(self.part, "wb")
            self.header_bytes = self.file.write(
                npy_header((SHARD_ROWS, *self.row_shape), self.dtype)
            )

    @contextlib.contextmanager
    def naming(self):
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; make room, or see to the disk,"
                " and run the same command again: it goes on at this shard"
            ) from None

    def add(self, row):
        if row.shape != self.row_shape or row.dtype != self.dtype:
            raise ValueError(
                f"a row of {self.path.name} is {self.dtype} {self.row_shape}, not {row.dtype}"
                f" {row.shape}"
            )
        row = np.ascontiguousarray(row)
        if not self.rows:
            self.first = {"first": fingerprint(row)}
        with self.naming():
            self.file.write(row.data)
        self.rows += 1

    def finish(self):
        """Flush, checksum, rename; returns {'bytes', 'sha256', and 'first', the fingerprint of the
        first record, where there is one}.
        """
        header = npy_header((self.rows, *self.row_shape), self.dtype)
        assert len(header) == self.header_bytes, (
            "numpy pads .npy headers to a fixed length for any number of rows up to a shard's"
        )
        with self.naming():
            self.file.seek(0)
            self.file.write(header)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            entry = {"bytes": self.part.stat().st_size, "sha256": sha256(self.part), **self.first}
            os.replace(self.part, self.path)
        return entry

    def discard(self):
        # on a full disk closing fails too, having nothing left to lose
        with contextlib.suppress(OSError):
            self.file.close()
        self.part.unlink(missing_ok=True)


class ShardWriter:
    """One shard: add or fail each of its rows in list order, then finish() or discard(); as a
    context, an exception leaves nothing behind.
    """

    def __init__(self, writer, number):
        self.writer = writer
        self.number = number
        self.ids = []
        self.marks = []
        self.sources = []
        self.failures = []
        self.lost = 0.0
        self.formats, self.files = row_formats(writer.plan), {}
        self.moments = Moments(writer.plan["latent_shape"]) if "latents" in self.formats else None
        # of a repair: what this shard must hold again
        held = writer.part("held", number)
        self.held = (
            {(name, view): mark for name, view, mark in json.loads(held.read_text())}
            if held.is_file()
            else {}
        )
        try:
            for kind, (shape, dtype) in self.formats.items():
                self.files[kind] = RowFile(writer.folder / shard_name(kind, number), shape, dtype)
        except InputError:
            self.discard()
            raise

    def add(self, video_id, view, patches, stored=None, lost=0.0, source=0):
        """patches uint8 [N, P]; stored: one clip's of to_stored; lost: its squared error, summed;
        source: source_mark.

        Raises InputError where a repair brings another clip than the shard held.
        """
        mark = fingerprint(patches)
        if self.held.get((video_id, view)) not in (None, mark):
            raise InputError(
                f"shard {self.number} of {self.writer.folder} held other pixels of the video"
                f" {video_id!r}: it was replaced or encoded again since; bring back the one that"
                " the cache was made from, or make the cache again"
            )
        if self.moments:
            self.moments.add(from_stored(stored))
        for kind, row in {**(stored or {}), "patches": patches}.items():
            if kind in self.files:
                self.files[kind].add(row)
        self.ids.append((video_id, view))
        self.marks.append(mark)
        self.sources.append(source)
        self.lost += lost

    def fail(self, row, video_id, view, reason):
        """Leave a row out.

        Raises InputError where the shard held it before a repair: what is broken stays until it can
        be replaced.
        """
        if (video_id, view) in self.held:
            raise InputError(
                f"shard {self.number} of {self.writer.folder} held the video {video_id!r}, which"
                f" cannot be decoded now ({reason}); bring it back, and run the same command again"
            )
        self.failures.append({"row": row, "id": video_id, "view": view, "reason": reason})

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()

    def discard(self):
        """Remove what is not finished; what finish() renamed is out of its reach."""
        for file in self.files.values():
            file.discard()

    def finish(self):
        try:
            if self.moments:
                self.moments.save(self.writer.part("stats", self.number))
            files = {name: file.finish() for name, file in self.files.items()}
        finally:
            self.discard()
        entry = {
            "ids": self.ids,
            "fingerprints": self.marks,
            "sources": self.sources,
            "failures": self.failures,
            "files": files,
        }
        if "scales" in self.formats:
            entry["lost"] = self.lost
        # last: the shard counts from here on
        write_whole(self.writer.part("shard", self.number), json.dumps(entry).encode())
