"""The latent cache: plain .npy shards, a list of ids, per-position statistics, and the metadata
that makes them trustworthy.

    CACHE/metadata.json      format version, teacher, view and its hash, shapes, the shard table
                             with sizes and SHA-256
    CACHE/ids.txt            `video id<TAB>view number` a record
    CACHE/fingerprints.npy   int64 [count]: 8 bytes of SHA-256 over each record's clip, by which
                             its pixels are known again
    CACHE/sources.npy        int64 [count]: likewise of what it was cut from, start, end and the
                             size of the file; 0: not known
    CACHE/stats.npz          per-position mean and variance of the latents, float32 [N, D], and the
                             count
    CACHE/latents-00000.npy  float16 [n, N, D]; or int8, with
    CACHE/scales-00000.npy   float32 [n, 1, D], and
    CACHE/tokens-00000.npy   float32 [n, N, 1]: a latent is its entry times the scale of its channel
                             times that of its token, rounded to float16
    CACHE/patches-00000.npy  uint8 [n, N, P]   (--clips on)
    CACHE/failures.jsonl     videos left out, with the reason

While a cache is being made its partial/ folder holds the plan and what each finished shard adds;
metadata.json comes last, so a cache with metadata is whole. Nothing in a cache depends on when or
in how many runs it was made.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import resource
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from salt.cache_format import (
    IDENTITY,
    Ids,
    check_header,
    check_size,
    content_digest,
    fingerprint,
    read_metadata,
    record_bytes,
    row_formats,
    same_clips,
    shard_name,
)
from salt.errors import InputError
from salt.rows import File, RowError, advise, read_rows
from salt.views import IMAGENET_MEAN, IMAGENET_STD, View

# ------------------------------------------------------------------------------------------ reading


class Cache:
    """An open cache: len(), .ids, .metadata, .view, .stats, .latents(row), .patches(row),
    .read_rows(). Threads may share it.

    Opening checks the checksums of metadata and ids, names and sizes of all files, and the headers
    of the first HEADERS; a shard is opened when it is first read, and its payload is checked by
    upkeep.verify alone.
    """

    HEADERS = 1024

    def __init__(self, folder, above=()):
        """above: the caches, outermost first, that take their clips from this one."""
        self.folder = Path(folder)
        if os.path.realpath(folder) in above:
            raise InputError(
                f"{above[0]} takes its clips from itself; its metadata.json is damaged, make the"
                " cache again"
            )
        self.metadata = read_metadata(self.folder)
        try:
            self.read_shapes()
            self.clips = self.open_clips((*above, os.path.realpath(folder)))
            first_shard = next(iter(self.metadata["shards"]), ())
            self.has_patches = self.clips is not self or "patches" in first_shard
            sizes = self.check_files()
        except (KeyError, TypeError, AttributeError) as error:
            raise self.damaged(repr(error)) from None
        self.ids = Ids(self.folder / "ids.txt")
        if len(self.ids) != self.metadata["count"]:
            raise InputError(
                f"{self.folder / 'ids.txt'} has {len(self.ids)} lines, metadata.json says"
                f" {self.metadata['count']}; make the cache again, or mend it with --repair"
            )
        if self.ids.digest.hexdigest() != self.metadata["ids_sha256"]:
            raise InputError(
                f"{self.folder / 'ids.txt'} does not have its checksum; make the cache again, or"
                " mend it with --repair"
            )
        self.stats = self.read_stats() if self.has_latents else None
        largest = max((entry["bytes"] for _, _, _, entry in self.files()), default=1)
        self.open_shard = functools.lru_cache(open_at_once(len(sizes), largest))(self.open_shard)

    def damaged(self, why):
        return InputError(
            f"{self.folder / 'metadata.json'} is damaged ({why}); make the cache again"
        )

    def read_shapes(self):
        """What metadata says of a record: its view, shapes and dtypes."""
        m = self.metadata
        try:
            self.view = View.from_dict(m["view"])
        except InputError as error:
            raise self.damaged(error) from None
        self.patch, self.tubelet = m["patch"], m["tubelet"]
        self.teacher = m["teacher"]
        self.latent_shape = m["latent_shape"]
        self.patch_shape = m["patch_shape"]
        self.has_latents = self.latent_shape is not None
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        if self.teacher is not None:
            self.mean, self.std = self.teacher_identity["mean"], self.teacher_identity["std"]
        self.first_rows = np.cumsum([0] + [shard["rows"] for shard in m["shards"]])
        if self.view.hash() != m["view_hash"]:
            raise self.damaged("the view does not fit its hash")
        if m["dtype"] not in ("float16", "int8"):
            raise self.damaged(f"latents of dtype {m['dtype']}")
        if (self.teacher is None) == self.has_latents:
            raise self.damaged("latents without a teacher, or the reverse")
        if self.first_rows[-1] != m["count"]:
            raise self.damaged("the shard table does not add up to the count")
        self.formats = row_formats(m)  # {kind: (shape of a record, dtype)}

    def open_clips(self, above):
        """The Cache whose clips are this one's: itself, or another (--clips_from)."""
        if not self.metadata["clips_from"]:
            return self
        clips = Cache(self.folder / self.metadata["clips_from"], above)
        if clips.view != self.view or not same_clips(self.metadata, clips.metadata):
            raise InputError(
                f"{clips.folder}, whose clips {self.folder} uses, is not the cache it was made"
                " from: it holds other videos' clips now; put that one back, or make"
                f" {self.folder} again"
            )
        return clips

    def check_files(self):
        """{name: bytes} of the .npy files that are there: sizes of all that the metadata names are
        compared, and the first HEADERS' headers.
        """
        with os.scandir(self.folder) as entries:
            sizes = {
                entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".npy")
            }
        for name, _, _, entry in self.files():
            check_size(self.folder / name, entry["bytes"], sizes.get(name))
        for name, shape, dtype, entry in itertools.islice(self.files(), self.HEADERS):
            check_header(self.folder / name, shape, dtype, entry["bytes"])
        return sizes

    def files(self):
        """(name, shape, dtype, entry of the shard table) of every shard file."""
        for number, shard in enumerate(self.metadata["shards"]):
            for kind, (shape, dtype) in self.formats.items():
                if kind in shard:
                    yield shard_name(kind, number), (shard["rows"], *shape), dtype, shard[kind]

    def __len__(self):
        return self.metadata["count"]

    def read_stats(self):
        """{'mean': float32 [N, D], 'variance': float32 [N, D], 'count': int} of the latents."""
        try:
            content = io.BytesIO(self.read_checked("stats.npz", "stats_sha256"))
            stated = sum(member.file_size for member in zipfile.ZipFile(content).infolist())
            if stated > 8 * math.prod(self.latent_shape) + 4096:
                raise ValueError(f"it states {stated} bytes of statistics")
            with np.load(content) as file:
                return {
                    "mean": file["mean"],
                    "variance": file["variance"],
                    "count": int(file["count"]),
                }
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.folder / 'stats.npz'} cannot be read ({error}); make the cache again, or"
                " mend it with --repair"
            ) from None

    @functools.cached_property
    def fingerprints(self):
        """int64 [count]: `fingerprint` of each record's clip."""
        return self.read_numbers("fingerprints")

    @functools.cached_property
    def sources(self):
        """int64 [count]: `source_mark` of what each record was cut from; 0 where not known."""
        return (
            self.read_numbers("sources")
            if "sources_sha256" in self.metadata
            else np.zeros(len(self), np.int64)
        )

    def read_numbers(self, name):
        content = self.read_checked(f"{name}.npy", f"{name}_sha256")
        numbers = np.load(io.BytesIO(content), allow_pickle=False)
        if numbers.shape != (len(self),) or numbers.dtype != np.int64:
            raise InputError(
                f"{self.folder / name}.npy is damaged: it holds {numbers.dtype}"
                f" {list(numbers.shape)}; make the cache again"
            )
        return numbers

    def read_checked(self, name, checksum):
        """The bytes of one of the cache's files, which must have the checksum that the metadata
        gives it.
        """
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.folder / name} cannot be read ({error.strerror}); make the cache again, or"
                " mend it with --repair"
            ) from None
        if hashlib.sha256(content).hexdigest() != self.metadata[checksum]:
            raise InputError(
                f"{self.folder / name} does not have its checksum: it is damaged, or another"
                " cache's; make the cache again, or mend it with --repair"
            )
        return content

    @property
    def identity(self):
        """What a checkpoint remembers of the cache it was trained from: latents and clips to the
        byte, whatever the folder is called.
        """
        m = self.metadata
        return {
            "view_hash": m["view_hash"],
            "teacher": self.teacher_identity,
            "ids_sha256": m["ids_sha256"],
            "latents": m["dtype"],
            "latents_sha256": content_digest(
                [
                    shard[kind]["sha256"]
                    for shard in m["shards"]
                    for kind in self.formats
                    if kind != "patches"
                ]
            ),
            "clips_sha256": m["fingerprints_sha256"],
        }

    @property
    def teacher_identity(self):
        """What makes two teachers the same: weights, shape, compute, normalisation of pixels, and
        how it was asked; None without latents.
        """
        return self.teacher and {
            name: self.teacher[name] for name in IDENTITY if name in self.teacher
        }

    def open_shard(self, kind, number):
        """(ops.File, the byte where its first record begins)."""
        path, shard = self.folder / shard_name(kind, number), self.metadata["shards"][number]
        shape, dtype = self.formats[kind]
        check_header(path, (shard["rows"], *shape), dtype, shard[kind]["bytes"])
        start = shard[kind]["bytes"] - shard["rows"] * record_bytes(shape, dtype)
        if "first" in shard[kind]:
            self.check_first(path, shard[kind]["first"], start, record_bytes(shape, dtype))
        return File(str(path)), start

    def check_first(self, path, expected, start, size):
        """A shard of another cache, put in this one's place, has its size and header; not its first
        record.
        """
        try:
            with open(path, "rb") as file:
                file.seek(start)
                record = file.read(size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        if fingerprint(record) != expected:
            raise InputError(
                f"{path}: its first record does not have its fingerprint: the file is damaged or"
                " another cache's; mend it with the command that made it and --repair"
            )

    def places(self, kind, records):
        """(ops.File a record, the byte where each begins, where each is: (shard, row))."""
        records = np.asarray(records, np.int64)
        if len(records) and not (0 <= records.min() and records.max() < len(self)):
            raise IndexError(
                f"records {records.min()} to {records.max()} of {self.folder}, which has"
                f" {len(self)}"
            )
        numbers = np.searchsorted(self.first_rows, records, side="right") - 1
        rows = records - self.first_rows[numbers]
        opened = [self.open_shard(kind, int(number)) for number in numbers]
        size = record_bytes(*self.formats[kind])
        starts = [start + int(row) * size for (_, start), row in zip(opened, rows)]
        return [file for file, _ in opened], starts, list(zip(numbers.tolist(), rows.tolist()))

    def advise(self, records, kinds=("latents", "patches")):
        """Have whole records read into the page cache, without waiting for them."""
        for kind in (*kinds, *(("scales", "tokens") if "latents" in kinds else ())):
            owner = self.clips if kind == "patches" else self
            if kind in owner.formats:
                files, starts, _ = owner.places(kind, records)
                advise(files, starts, record_bytes(*owner.formats[kind]))

    def read_rows(self, kind, records, out, wanted=None, threads=1):
        """Copy rows of records, 'latents' or 'patches', into a batch.

        out      contiguous tensor on the CPU, float16 [R, N, D] of latents, uint8 [R, N, P] of
                 patches
        wanted   bool [R, N]: the rows to copy, the others keep what they held; or None for all
        Raises InputError, with shard and row, where the disk or the file fails.
        """
        if kind == "patches" and self.clips is not self:
            return self.clips.read_rows(kind, records, out, wanted, threads)
        if kind not in self.formats:
            why = (
                "clips (it was made with --clips off)"
                if kind == "patches"
                else "latents (it was made with --teacher none)"
            )
            raise InputError(f"the cache {self.folder} holds no {why}")
        shape, dtype = self.formats[kind]
        scale = tokens = None
        if dtype == np.int8:
            scale = torch.empty(len(records), 1, shape[1])
            self.read_rows("scales", records, scale, threads=threads)
            scale = scale[:, 0]
            tokens = torch.empty(len(records), shape[0], 1)
            self.read_rows("tokens", records, tokens, threads=threads)
            tokens = tokens[:, :, 0]
        files, starts, at = self.places(kind, records)
        try:
            read_rows(
                files, starts, out, record_bytes(shape[-1:], dtype), wanted, scale, threads, tokens
            )
        except RowError as error:
            number, row = at[error.record]
            raise InputError(
                f"{self.folder / shard_name(kind, number)}, row {row}: {error.reason}; check the"
                f" disk, then the cache with `python cache_latents.py --verify {self.folder}`"
            ) from None

    def latents(self, row):
        """float16 [N, D]: the teacher's output for record `row`."""
        out = torch.empty(1, *(self.latent_shape or (0, 0)), dtype=torch.float16)
        self.read_rows("latents", [row], out)
        return out[0].numpy()

    def checked_patches(self, row):
        """The same as patches(row), which must have their fingerprint.

        Raises InputError where they do not.
        """
        patches = self.patches(row)
        if fingerprint(patches) != self.fingerprints[row]:
            raise InputError(
                f"{self.clips.folder}: the clip of record {row}, {self.ids[row]!r}, does not have"
                " its fingerprint: the file is damaged or another cache's; mend it with the"
                " command that made it and --repair"
            )
        return patches

    def patches(self, row):
        """uint8 [N, P]: the clip of record `row`, patchified."""
        out = torch.empty(1, *self.patch_shape, dtype=torch.uint8)
        self.read_rows("patches", [row], out)
        return out[0].numpy()


def open_cache(folder):
    """Open a cache for reading: checks metadata, names, sizes and headers, not the payload.

    Raises InputError on anything amiss.
    """
    return Cache(folder)


def open_at_once(files, largest):
    """How many of a cache's files to keep open: all, as far as a quarter of the process's limit on
    files allows, which is raised as far as it may be, and their page tables (1/512 of what was read
    through a map) stay below 1 % of the memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(16, min(files, soft // 4, memory // 100 // max(4096, largest // 512)))
