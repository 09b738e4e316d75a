"""Rows out of files, on threads of their own past the interpreter lock."""

import os

import numpy as np
import torch

from salt import ops


class FileReference:
    """A file to read rows from, by plain preadv."""

    def __init__(self, path):
        self.file = open(path, "rb", buffering=0)


def File(path):
    """A file to read rows from. Raises OSError."""
    return ops.salt_ops.File(path) if ops.EXTENSION["devices"] else FileReference(path)


def advise(files, starts, count):
    """Ask for `count` bytes from `starts[i]` on of each files[i] to be read into the page cache,
    without waiting.
    """
    if ops.EXTENSION["devices"]:
        ops.salt_ops.advise(files, starts, count)
    elif hasattr(os, "posix_fadvise"):
        for file, start in zip(files, starts):
            os.posix_fadvise(file.file.fileno(), start, count, os.POSIX_FADV_WILLNEED)


class RowError(Exception):
    """A row that could not be read: .record its place in the call, .row, .reason."""

    def __init__(self, record, row, number):
        self.record = record
        self.row = row
        self.reason = os.strerror(number) if number else "the file is truncated"
        super().__init__(f"record {record}, row {row}: {self.reason}")


def read_rows(files, starts, out, row_bytes, wanted=None, scale=None, threads=1, tokens=None):
    """Copy rows of records out of files into a batch, on `threads` threads outside the GIL.

    files, starts  a File and the byte where its record begins, for each of R records
    out            contiguous tensor [R, N, D]: row n of record r goes to out[r, n]
    row_bytes      bytes of a stored row, as many as one of `out`
    wanted         bool tensor [R, N]: the rows to copy (the others keep what they held), or None
                   for all
    scale          float32 tensor [R, D]: the stored rows are int8, and out, float16, gets
                   entry * scale
    tokens         float32 tensor [R, N]: with a scale, a factor for each row beside it
    Raises RowError, of the first record that could not be read.
    """
    if ops.EXTENSION["devices"]:
        record, row, number = ops.salt_ops.read_rows(
            files,
            starts,
            row_bytes,
            None if wanted is None else wanted.view(torch.uint8),
            out,
            scale,
            tokens,
            threads,
        )
        if record >= 0:
            raise RowError(record, row, number)
    else:
        read_rows_reference(files, starts, out, row_bytes, wanted, scale, tokens)


def read_rows_reference(files, starts, out, row_bytes, wanted=None, scale=None, tokens=None):
    places = (
        out.view(torch.uint8).numpy()
        if scale is None
        else np.empty((*out.shape[:2], row_bytes), np.uint8)
    )
    for r, (file, start) in enumerate(zip(files, starts)):
        rows = np.arange(out.shape[1]) if wanted is None else np.flatnonzero(wanted[r].numpy())
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else ():
            try:
                got = os.preadv(
                    file.file.fileno(),
                    [places[r, run[0] : run[-1] + 1]],
                    start + int(run[0]) * row_bytes,
                )
            except OSError as error:
                raise RowError(r, int(run[0]), error.errno) from None
            if got != len(run) * row_bytes:
                raise RowError(r, int(run[0]), 0)
        if scale is not None:
            values = torch.from_numpy(places[r, rows].view(np.int8)).float() * scale[r]
            out[r, rows] = (values if tokens is None else values * tokens[r, rows, None]).half()
