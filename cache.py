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
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shutil
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import ops
from config import InputError
from views import IMAGENET_MEAN, IMAGENET_STD, View

# 1 and 2 cut other pixels under the same view, and 2 did not keep what tells them apart
FORMAT_VERSION = 3
SHARD_ROWS = 512
FLOAT16_MAX = 65504.0
KINDS = ("latents", "scales", "tokens", "patches")


# ------------------------------------------------------------------------------------------ reading


class Ids:
    """The video ids of a cache, read lazily from ids.txt: ten million of them take 80 MB of line
    offsets, not a list of str.
    """

    def __init__(self, path):
        self.path, self.digest, parts, at = path, hashlib.sha256(), [], 0
        try:
            # read, not mapped: a failing disk is an error here, not SIGBUS
            self.file = open(path, "rb", buffering=0)
            while chunk := self.file.read(1 << 24):
                self.digest.update(chunk)
                parts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at)
                at += len(chunk)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        self.ends = np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def __len__(self):
        return len(self.ends)

    def fields(self, row):
        """(video id, view number) of a record."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a list of {len(self)} ids")
        row %= len(self)
        start = int(self.ends[row - 1]) + 1 if row else 0
        try:
            line = os.pread(self.file.fileno(), int(self.ends[row]) - start, start)
            name, _, view = line.decode().partition("\t")
            return name, int(view)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path}, line {row}:"
                f" {getattr(error, 'strerror', None) or 'it is cut short or damaged'}; check the"
                " disk, then the cache with `python cache_latents.py --verify"
                f" {Path(self.path).parent}`"
            ) from None

    def __getitem__(self, row):
        return self.fields(row)[0]

    def __iter__(self):
        return (self[row] for row in range(len(self)))


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
        m = self.metadata
        try:
            try:
                self.view = View.from_dict(m["view"])
            except InputError as error:
                raise InputError(
                    f"{self.folder / 'metadata.json'} is damaged ({error}); make the cache again"
                ) from None
            self.patch, self.tubelet = m["patch"], m["tubelet"]
            self.teacher, self.latent_shape, self.patch_shape = (
                m["teacher"],
                m["latent_shape"],
                m["patch_shape"],
            )
            self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
            if self.teacher is not None:
                self.mean, self.std = self.teacher_identity["mean"], self.teacher_identity["std"]
            self.first_rows = np.cumsum([0] + [shard["rows"] for shard in m["shards"]])
            for fits, problem in (
                (self.view.hash() == m["view_hash"], "the view does not fit its hash"),
                (m["dtype"] in ("float16", "int8"), f"latents of dtype {m['dtype']}"),
                (
                    (self.teacher is None) == (self.latent_shape is None),
                    "latents without a teacher, or the reverse",
                ),
                (self.first_rows[-1] == m["count"], "the shard table does not add up to the count"),
            ):
                if not fits:
                    raise InputError(
                        f"{self.folder / 'metadata.json'} is damaged: {problem}; make the cache"
                        " again"
                    )
            self.formats = row_formats(m)  # {kind: (shape of a record, dtype)}
            self.clips = self
            if m["clips_from"]:
                self.clips = Cache(
                    self.folder / m["clips_from"], (*above, os.path.realpath(folder))
                )
                if self.clips.view != self.view or not same_clips(m, self.clips.metadata):
                    raise InputError(
                        f"{self.clips.folder}, whose clips {self.folder} uses, is not the cache it"
                        " was made from: it holds other videos' clips now; put that one back, or"
                        f" make {self.folder} again"
                    )
            self.has_latents = self.latent_shape is not None
            self.has_patches = self.clips is not self or (
                len(m["shards"]) > 0 and "patches" in m["shards"][0]
            )
            with os.scandir(self.folder) as entries:
                sizes = {
                    entry.name: entry.stat().st_size
                    for entry in entries
                    if entry.name.endswith(".npy")
                }
            for name, shape, dtype, entry in self.files():
                check_size(self.folder / name, shape, dtype, entry["bytes"], sizes.get(name))
            for name, shape, dtype, entry in itertools.islice(self.files(), self.HEADERS):
                check_header(self.folder / name, shape, dtype, entry["bytes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.folder / 'metadata.json'} is damaged ({error!r}); make the cache again"
            ) from None
        self.ids = Ids(self.folder / "ids.txt")
        if len(self.ids) != m["count"]:
            raise InputError(
                f"{self.folder / 'ids.txt'} has {len(self.ids)} lines, metadata.json says"
                f" {m['count']}; make the cache again, or mend it with --repair"
            )
        if self.ids.digest.hexdigest() != m["ids_sha256"]:
            raise InputError(
                f"{self.folder / 'ids.txt'} does not have its checksum; make the cache again, or"
                " mend it with --repair"
            )
        self.stats = self.read_stats() if self.has_latents else None
        largest = max((entry["bytes"] for _, _, _, entry in self.files()), default=1)
        self.open_shard = functools.lru_cache(open_at_once(len(sizes), largest))(self.open_shard)

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
        """What makes two teachers the same: weights, shape, compute and pixel normalisation; None
        without latents.
        """
        return self.teacher and {
            name: self.teacher[name]
            for name in ("sha256", "mean", "std", "compute", "config")
            if name in self.teacher
        }

    def open_shard(self, kind, number):
        """(ops.File, the byte where its first record begins)."""
        path, shard = self.folder / shard_name(kind, number), self.metadata["shards"][number]
        shape, dtype = self.formats[kind]
        check_header(path, (shard["rows"], *shape), dtype, shard[kind]["bytes"])
        start = shard[kind]["bytes"] - shard["rows"] * record_bytes(shape, dtype)
        if "first" in shard[kind]:
            self.check_first(path, shard[kind]["first"], start, record_bytes(shape, dtype))
        return ops.File(str(path)), start

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
        opened, size = (
            [self.open_shard(kind, int(number)) for number in numbers],
            record_bytes(*self.formats[kind]),
        )
        starts = [start + int(row) * size for (_, start), row in zip(opened, rows)]
        return [file for file, _ in opened], starts, list(zip(numbers.tolist(), rows.tolist()))

    def advise(self, records, kinds=("latents", "patches")):
        """Have whole records read into the page cache, without waiting for them."""
        for kind in (*kinds, *(("scales", "tokens") if "latents" in kinds else ())):
            owner = self.clips if kind == "patches" else self
            if kind in owner.formats:
                files, starts, _ = owner.places(kind, records)
                ops.advise(files, starts, record_bytes(*owner.formats[kind]))

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
            ops.read_rows(
                files, starts, out, record_bytes(shape[-1:], dtype), wanted, scale, threads, tokens
            )
        except ops.RowError as error:
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


def read_metadata(folder):
    path = folder / "metadata.json"
    if not path.is_file():
        unfinished = (folder / "partial").is_dir()
        raise InputError(
            f"{folder} is an unfinished cache; run the same cache_latents.py command again to"
            " finish it"
            if unfinished
            else (
                f"{folder} is no cache: it has no metadata.json; make one with cache_latents.py"
                f" --out {folder}"
            )
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be used ({error!r}); if another program wrote this cache, make it"
            " again: the view of its clips is unknown"
        ) from None
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise InputError(
            f"{folder} was made by {'a newer' if newer else 'an older'} version of this code: it"
            f" has cache format {version}, this code reads {FORMAT_VERSION};"
            f" {'update the code' if newer else 'make the cache again'}"
        )
    if metadata.get("checksum") != metadata_digest(metadata):
        raise InputError(
            f"{path} does not have its checksum: it was changed or damaged; put back the one that"
            " was made with the files, or make the cache again"
        )
    return metadata


def content_digest(value):
    """SHA-256 of a value of plain types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def agree_on(saved, now):
    """Whether two identities say the same, as far as both say it: one that an older version wrote
    lacks what was added since. Of different kinds are two that have nothing in common."""
    if isinstance(saved, dict) and isinstance(now, dict) and saved.keys() & now.keys():
        return all(agree_on(saved[name], now[name]) for name in saved.keys() & now.keys())
    return saved == now


def metadata_digest(metadata):
    """The same of metadata but for its own checksum."""
    return content_digest({name: value for name, value in metadata.items() if name != "checksum"})


def fingerprint(record):
    """The first 8 bytes of SHA-256 over a record, contiguous, as a signed number.

    A clip's is over its patches, uint8 [N, P]: the same pixels, the same number.
    """
    return int.from_bytes(hashlib.sha256(record).digest()[:8], "little", signed=True)


def source_mark(row):
    """A number, never 0, of what a data.Row is cut from: its stretch and its file's size; 0 where
    the file is not there.
    """
    try:
        return fingerprint(f"{row.start} {row.end} {os.path.getsize(row.path)}".encode()) or 1
    except (OSError, TypeError):
        return 0


def sources_of(folder, metadata):
    """Cache.sources, a list, of a cache that may be broken elsewhere; 0 of each record where the
    file itself is.
    """
    path = folder / "sources.npy"
    return (
        np.load(path).tolist()
        if path.is_file() and sha256(path) == metadata.get("sources_sha256")
        else [0] * metadata["count"]
    )


def same_clips(metadata, other):
    """Whether two caches hold the same clips of the same ids, record for record."""
    return all(metadata[name] == other[name] for name in ("ids_sha256", "fingerprints_sha256"))


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


def row_formats(metadata):
    """{kind: (shape of a record, dtype)} of the files that a cache with this metadata or plan
    holds.
    """
    formats = {}
    if metadata["latent_shape"]:
        formats["latents"] = tuple(metadata["latent_shape"]), np.dtype(metadata["dtype"])
        if metadata["dtype"] == "int8":
            formats["scales"] = (1, metadata["latent_shape"][1]), np.dtype(np.float32)
            formats["tokens"] = (metadata["latent_shape"][0], 1), np.dtype(np.float32)
    if metadata["clips"]:
        formats["patches"] = tuple(metadata["patch_shape"]), np.dtype(np.uint8)
    return formats


def record_bytes(shape, dtype):
    return math.prod(shape) * dtype.itemsize


def check_size(path, shape, dtype, size, found):
    if found is None:
        raise InputError(f"{path} is missing; make the cache again, or mend it with --repair")
    if found != size:
        raise InputError(
            f"{path} has {found} bytes, metadata.json says {size}; make the cache again, or mend it"
            " with --repair"
        )


def check_header(path, shape, dtype, size):
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not the expected .npy version")
            header = np.lib.format.read_array_header_1_0(file)
            if file.tell() + math.prod(shape) * dtype.itemsize != size:
                raise ValueError("the header has another length")
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; make the cache again, or mend it with --repair"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    # all that numpy's parser has been seen to raise
    except (ValueError, SyntaxError, TypeError, MemoryError, tokenize.TokenError) as error:
        raise InputError(
            f"{path} has a broken header ({' '.join(str(error).split())}); make the cache again, or"
            " mend it with --repair"
        ) from None
    if header != (shape, False, dtype):
        raise InputError(
            f"{path} holds {header[2]} {list(header[0])}, metadata.json says {dtype} {list(shape)};"
            " make the cache again, or mend it with --repair"
        )


def sha256(path):
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 16))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def shard_name(kind, number):
    return f"{kind}-{number:05d}.npy"


def shard_names(number):
    return [shard_name(kind, number) for kind in KINDS]


def list_digest(ids):
    """SHA-256 over (video id, view number) of every row of a list."""
    digest = hashlib.sha256()
    for name, view in ids:
        digest.update(f"{name}\t{view}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ writing


def write_whole(path, content):
    """Write bytes beside `path`, flush them to the disk, and rename: the file is there whole or not
    at all.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def prepare_folder(folder, flag):
    """Make a folder for results, before the work that ends in it.

    Raises InputError where that cannot be, or it cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another {flag}"
        ) from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {folder} cannot be written to; choose another {flag}")


def prepare_file(path):
    """The same for the file of --out, where one is asked for."""
    if path and os.path.isdir(path):
        raise InputError(f"--out {path} is a folder; name a JSON file")
    if path:
        prepare_folder(os.path.dirname(os.path.abspath(path)), "--out")


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
        self.path, self.part, self.row_shape, self.dtype = (
            path,
            Path(f"{path}.part"),
            tuple(row_shape),
            np.dtype(dtype),
        )
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


def begun_plan(folder):
    """The plan of a cache that was begun or finished in `folder`, or None."""
    folder = Path(folder)
    if (folder / "metadata.json").is_file():
        return read_metadata(folder)
    plan = folder / "partial" / "plan.json"
    try:
        return json.loads(plan.read_text()) if plan.is_file() else None
    except ValueError:
        raise InputError(f"{plan} is damaged; delete {folder} and make the cache again") from None


class Writer:
    """Makes a cache shard by shard, and continues one that was begun.

    plan: the metadata that is known beforehand (teacher, view, shapes, dtype, split, list_count,
    ...). A folder begun under another plan is refused, naming the field; so are folders that hold
    anything else.
    """

    def __init__(self, folder, plan, progress=lambda items: items):
        self.folder, self.partial, self.progress = Path(folder), Path(folder) / "partial", progress
        self.plan = json.loads(json.dumps({"format_version": FORMAT_VERSION, **plan}))
        begun = begun_plan(self.folder)
        if begun:
            if self.plan["teacher"] and begun.get("teacher"):  # whatever its file is called now
                self.plan["teacher"]["name"] = begun["teacher"]["name"]
            for name, value in self.plan.items():
                if not agree_on(begun.get(name), value):
                    grown = (
                        "; cache other videos apart, and --merge"
                        if name.startswith("list_")
                        else ""
                    )
                    raise InputError(
                        f"{self.folder} was begun with another {name}:"
                        f" {brief(begun.get(name), value)} there, {brief(value, begun.get(name))}"
                        f" asked for; choose another --out{grown}"
                    )
            self.plan["teacher"] = begun["teacher"]  # with no more than was known of it
        elif self.folder.is_dir() and any(
            entry.name not in ("partial", "plan.json.part") for entry in self.folder.rglob("*")
        ):
            raise InputError(f"{self.folder} is not empty and holds no cache; choose another --out")
        if not begun:
            self.partial.mkdir(parents=True, exist_ok=True)
            write_whole(self.partial / "plan.json", json.dumps(self.plan, indent=1).encode())

    @property
    def finished(self):
        """Whether the cache is whole, and no repair of it is under way."""
        return (self.folder / "metadata.json").is_file() and not (
            self.partial / "before.json"
        ).is_file()

    def tidy(self):
        """Remove what a process that was killed at its very end left of a finished cache's
        partial/.
        """
        if self.finished:
            shutil.rmtree(self.partial, ignore_errors=True)

    def lock(self):
        """Keep other processes from writing here as long as this one lives.

        Raises InputError where one does already.
        """
        self.partial.mkdir(exist_ok=True)
        self.locked = open(self.partial / "lock", "w")
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is writing {self.folder}; wait for it, or end it"
            ) from None
        except OSError:
            pass  # a file system without locks

    @property
    def shard_count(self):
        return -(-self.plan["list_count"] // SHARD_ROWS)

    def missing(self):
        """Numbers of the shards still to make."""
        return (
            []
            if self.finished
            else [
                k
                for k in range(self.shard_count)
                if not (self.partial / f"shard-{k:05d}.json").is_file()
            ]
        )

    def made(self):
        """[(row of the list, source_mark)] of the records that are made already; none of a finished
        cache that is damaged.
        """
        if self.finished:
            try:
                sources, lost = (
                    sources_of(self.folder, read_metadata(self.folder)),
                    {
                        json.loads(line)["row"]
                        for line in (self.folder / "failures.jsonl").read_text().splitlines()
                    },
                )
            except (InputError, OSError, ValueError, KeyError, TypeError):
                return []
            return list(
                zip((row for row in range(self.plan["list_count"]) if row not in lost), sources)
            )
        found = []
        for number in set(range(self.shard_count)) - set(self.missing()):
            shard = json.loads((self.partial / f"shard-{number:05d}.json").read_text())
            lost = {failure["row"] for failure in shard["failures"]}
            rows = range(
                number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, self.plan["list_count"])
            )
            found += zip((row for row in rows if row not in lost), shard.get("sources", ()))
        return found

    def shard(self, number):
        return ShardWriter(self, number)

    def finish(self):
        """Join what the shards left in partial/ into ids.txt, stats.npz, failures.jsonl and, last,
        metadata.json.

        Raises InputError where no video could be decoded, or a shard's file is gone or cut short.
        """
        done = [
            json.loads((self.partial / f"shard-{k:05d}.json").read_text())
            for k in range(self.shard_count)
        ]
        for number, shard in enumerate(done):
            for kind, entry in shard["files"].items():
                path = self.folder / shard_name(kind, number)
                if not path.is_file() or path.stat().st_size != entry["bytes"]:
                    raise InputError(
                        f"{path} is gone or cut short since it was made; run the same command with"
                        " --repair"
                    )
        ids = "".join(f"{name}\t{view}\n" for shard in done for name, view in shard["ids"]).encode()
        marks, sources = (
            np.concatenate(
                [np.array(shard.get(name) or [0] * len(shard["ids"]), np.int64) for shard in done]
            )
            for name in ("fingerprints", "sources")
        )
        failures = [failure for shard in done for failure in shard["failures"]]
        if not ids:
            for path in [
                self.partial,
                *(
                    self.folder / name
                    for number in range(self.shard_count)
                    for name in shard_names(number)
                ),
            ]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            raise InputError(
                "no video of the list could be decoded; the first:"
                f" {failures[0]['reason'] if failures else 'none'}"
            )
        shards = [
            {
                "rows": len(shard["ids"]),
                **({"lost": shard["lost"]} if "lost" in shard else {}),
                **shard["files"],
            }
            for shard in done
        ]
        return self.complete(ids, marks, sources, failures, shards, self.write_stats)

    def complete(self, ids, marks, sources, failures, shards, write_stats):
        """Write what goes beside the shards; metadata.json comes last.

        ids: bytes of ids.txt; marks, sources: int64 [count], fingerprints.npy and sources.npy;
        write_stats(shards) makes stats.npz.
        """
        lost = "".join(json.dumps(failure) + "\n" for failure in failures).encode()
        write_whole(self.folder / "ids.txt", ids)
        write_whole(self.folder / "failures.jsonl", lost)
        metadata = {
            **self.plan,
            "count": sum(shard["rows"] for shard in shards),
            "failures": len(failures),
            "ids_sha256": hashlib.sha256(ids).hexdigest(),
            "failures_sha256": hashlib.sha256(lost).hexdigest(),
            "shards": shards,
        }
        if self.plan["latent_shape"]:
            write_stats(shards)
            metadata["stats_sha256"] = sha256(self.folder / "stats.npz")
        # summed squared errors of what is stored: int8's
        if shards and all("lost" in shard for shard in shards):
            with np.load(self.folder / "stats.npz") as stats:
                variance = float(stats["variance"].sum(dtype=np.float64)) * metadata["count"]
            metadata["lost_variance"] = math.fsum(shard["lost"] for shard in shards) / max(
                variance, 1e-300
            )
        for name, numbers in (("fingerprints", marks), ("sources", sources)):
            content = io.BytesIO()
            np.save(content, numbers)
            write_whole(self.folder / f"{name}.npy", content.getvalue())
            metadata[f"{name}_sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
        metadata["checksum"] = metadata_digest(metadata)
        write_whole(self.folder / "metadata.json", json.dumps(metadata, indent=1).encode())
        (self.partial / "before.json").unlink(missing_ok=True)
        shutil.rmtree(self.partial)
        return metadata

    def write_stats(self, shards):
        """stats.npz, from what each shard left.

        After a repair that gave the same bits it stays as it is.
        """
        path, before = self.folder / "stats.npz", self.partial / "before.json"
        if before.is_file() and path.is_file():
            before = json.loads(before.read_text())
            if before["shards"] == shards and sha256(path) == before["stats_sha256"]:
                return
        # by a repair
        left_alone = [
            number
            for number in range(len(shards))
            if not (self.partial / f"stats-{number:05d}.npz").is_file()
        ]
        for number in self.progress(left_alone) if left_alone else ():
            moments = Moments(self.plan["latent_shape"])
            kinds = [kind for kind in row_formats(self.plan) if kind != "patches"]
            rows = {
                kind: np.load(self.folder / shard_name(kind, number), mmap_mode="r")
                for kind in kinds
            }
            for row in range(shards[number]["rows"]):
                moments.add(
                    from_stored({kind: np.array(array[row]) for kind, array in rows.items()})
                )
            moments.save(self.partial / f"stats-{number:05d}.npz")
        content = io.BytesIO()
        np.savez(
            content,
            **join_statistics(
                load_moments(self.partial / f"stats-{k:05d}.npz") for k in range(self.shard_count)
            ),
        )
        write_whole(path, content.getvalue())


def brief(value, other):
    """A plan's value for a message: of two dicts only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: entry for name, entry in value.items() if other.get(name) != entry}
    return str(value)[:100]


def to_stored(latents, dtype, names=None):
    """Latents float [B, N, D], on any device, of the videos `names`, as a cache of `dtype` keeps
    them.

    Returns numpy arrays by kind: latents float16 [B, N, D]; or latents int8 [B, N, D] with tokens
    float32 [B, N, 1], the root mean square of each token, and scales float32 [B, 1, D], the largest
    magnitude of a channel over its tokens' / 127, so that neither a token that is large in every
    channel nor a channel that is large in every token takes the others' digits (docs/DATA.md has
    figures).
    Raises InputError on a latent beyond float16, which is never stored as infinity.
    """
    latents = latents.float()
    largest = latents.abs().amax(1, keepdim=True)  # [B, 1, D]
    if not (top := largest.max().item()) <= FLOAT16_MAX:
        worst = [
            f" of the video {name!r}"
            for name, value in zip(names or (), largest.amax((1, 2)).tolist())
            if not value <= FLOAT16_MAX
        ]
        raise InputError(
            f"the teacher's latents{worst[0] if worst else ''} reach {top}, beyond float16"
            f" ({FLOAT16_MAX:.0f}); check the teacher's weights, or its compute (--dtype)"
        )
    if dtype == "float16":
        return {"latents": latents.half().cpu().numpy()}
    tokens = latents.square().mean(2, keepdim=True).sqrt()
    tokens = torch.where(tokens > 0, tokens, 1.0)
    scales = (latents / tokens).abs().amax(1, keepdim=True) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    entries = (latents / (scales * tokens)).round().clamp(-127, 127).to(torch.int8)
    return {
        "latents": entries.cpu().numpy(),
        "scales": scales.cpu().numpy(),
        "tokens": tokens.cpu().numpy(),
    }


def from_stored(stored):
    """float16 [..., N, D]: latents as a reader gets them, from what to_stored gives, of a batch or
    of one clip.
    """
    if "scales" not in stored:
        return stored["latents"]
    parts = {kind: torch.from_numpy(array).float() for kind, array in stored.items()}
    return (parts["latents"] * parts["scales"] * parts["tokens"]).half().numpy()


class Moments:
    """Count, mean and summed squared deviations of latents, float64, clip after clip."""

    def __init__(self, shape):
        self.count, self.sum, self.squares = 0, np.zeros(shape), np.zeros(shape)

    def add(self, latents):
        ops.add_moments(latents[None], self.sum, self.squares)
        self.count += 1

    def save(self, path):
        content, mean = io.BytesIO(), self.sum / max(1, self.count)
        np.savez(
            content,
            mean=mean.astype(np.float32),
            m2=np.maximum(0, self.squares - self.count * mean * mean).astype(np.float32),
            count=self.count,
        )
        write_whole(path, content.getvalue())


class ShardWriter:
    """One shard: add or fail each of its rows in list order, then finish() or discard(); as a
    context, an exception leaves nothing behind.
    """

    def __init__(self, writer, number):
        self.writer, self.number, self.ids, self.marks, self.sources, self.failures, self.lost = (
            writer,
            number,
            [],
            [],
            [],
            [],
            0.0,
        )
        self.formats, self.files = row_formats(writer.plan), {}
        self.moments = Moments(writer.plan["latent_shape"]) if "latents" in self.formats else None
        # of a repair: what this shard must hold again
        held = writer.partial / f"held-{number:05d}.json"
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
        partial = self.writer.partial
        try:
            if self.moments:
                self.moments.save(partial / f"stats-{self.number:05d}.npz")
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
        write_whole(partial / f"shard-{self.number:05d}.json", json.dumps(entry).encode())


def load_moments(path):
    with np.load(path) as part:
        return int(part["count"]), part["mean"].astype(np.float64), part["m2"].astype(np.float64)


def join_statistics(parts):
    """Mean and variance of all parts (count, mean, m2), by Chan, Golub and LeVeque's update (1979),
    in order and float64.
    """
    count, mean, m2 = 0, 0.0, 0.0
    for n, part_mean, part_m2 in parts:
        if n:
            delta, total = part_mean - mean, count + n
            mean, m2, count = (
                mean + delta * (n / total),
                m2 + part_m2 + delta * delta * (count * n / total),
                total,
            )
    return {"mean": np.float32(mean), "variance": np.float32(m2 / count), "count": np.int64(count)}
