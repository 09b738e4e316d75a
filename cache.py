"""The latent cache: plain .npy shards, a list of ids, per-position statistics, and the metadata that makes them trustworthy.

    CACHE/metadata.json      format version, teacher, view and its hash, shapes, the shard table with sizes and SHA-256
    CACHE/ids.txt            `video id<TAB>view number` a record
    CACHE/stats.npz          per-position mean and variance of the latents, float32 [N, D], and the count
    CACHE/latents-00000.npy  float16 [n, N, D]; or int8, with
    CACHE/scales-00000.npy   float32 [n, D]: a latent is its entry times the scale of its clip and channel, rounded to float16
    CACHE/patches-00000.npy  uint8 [n, N, P]   (--clips on)
    CACHE/failures.jsonl     videos left out, with the reason

While a cache is being made its partial/ folder holds the plan and what each finished shard adds; metadata.json comes last,
so a cache with metadata is whole. Nothing in a cache depends on when or in how many runs it was made.
"""
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import torch

import ops
from config import InputError
from views import IMAGENET_MEAN, IMAGENET_STD, View

FORMAT_VERSION = 2  # 1 resized the whole frame and then cropped it, so the same view gave other pixels
SHARD_ROWS = 512
FLOAT16_MAX = 65504.0
KINDS = ("latents", "scales", "patches")


# --------------------------------------------------------------------------------------------------------------- reading

class Ids:
    """The video ids of a cache, read lazily from ids.txt: ten million of them take 80 MB of line offsets, not a list of str."""

    def __init__(self, path):
        self.path, parts, at = path, [], 0
        try:
            self.file = open(path, "rb", buffering=0)  # read, not mapped: a failing disk is an error here, not SIGBUS
            while chunk := self.file.read(1 << 24):
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
            raise InputError(f"{self.path}, line {row}: {getattr(error, 'strerror', None) or 'it is cut short or damaged'}; check the disk, then the cache with "
                             f"`python cache_latents.py --verify {Path(self.path).parent}`") from None

    def __getitem__(self, row):
        return self.fields(row)[0]

    def __iter__(self):
        return (self[row] for row in range(len(self)))


class Cache:
    """An open cache: len(), .ids, .metadata, .view, .stats, .latents(row), .patches(row), .read_rows(), .verify(). Threads may share it.

    Opening checks metadata, names and sizes of all files, and the headers of the first HEADERS; a shard is opened when it is first read.
    """
    HEADERS = 1024

    def __init__(self, folder):
        self.folder = Path(folder)
        self.metadata = read_metadata(self.folder)
        m = self.metadata
        try:
            try:
                self.view = View.from_dict(m["view"])
            except InputError as error:
                raise InputError(f"{self.folder / 'metadata.json'} is damaged ({error}); make the cache again") from None
            self.patch, self.tubelet = m["patch"], m["tubelet"]
            self.teacher, self.latent_shape, self.patch_shape = m["teacher"], m["latent_shape"], m["patch_shape"]
            self.mean, self.std = (self.teacher["mean"], self.teacher["std"]) if self.teacher else (IMAGENET_MEAN, IMAGENET_STD)
            self.first_rows = np.cumsum([0] + [shard["rows"] for shard in m["shards"]])
            for fits, problem in ((self.view.hash() == m["view_hash"], "the view does not fit its hash"),
                                  (m["dtype"] in ("float16", "int8"), f"latents of dtype {m['dtype']}"),
                                  (self.first_rows[-1] == m["count"], "the shard table does not add up to the count")):
                if not fits:
                    raise InputError(f"{self.folder / 'metadata.json'} is damaged: {problem}; make the cache again")
            self.formats = row_formats(m)  # {kind: (shape of a record, dtype)}
            self.clips = self
            if m["clips_from"]:
                self.clips = Cache(self.folder / m["clips_from"])
                if self.clips.view != self.view or len(self.clips) != len(self) or self.clips.metadata["ids_sha256"] != m["ids_sha256"]:
                    raise InputError(f"{self.clips.folder}, whose clips {self.folder} uses, is not the cache it was made from")
            self.has_latents = self.latent_shape is not None
            self.has_patches = self.clips is not self or (len(m["shards"]) > 0 and "patches" in m["shards"][0])
            with os.scandir(self.folder) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".npy")}
            for name, shape, dtype, entry in self.files():
                check_size(self.folder / name, shape, dtype, entry["bytes"], sizes.get(name))
            for name, shape, dtype, entry in itertools.islice(self.files(), self.HEADERS):
                check_header(self.folder / name, shape, dtype, entry["bytes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.folder / 'metadata.json'} is damaged ({error!r}); make the cache again") from None
        self.ids = Ids(self.folder / "ids.txt")
        if len(self.ids) != m["count"]:
            raise InputError(f"{self.folder / 'ids.txt'} has {len(self.ids)} lines, metadata.json says {m['count']}; make the cache again, or mend it with --repair")
        # An open shard costs a file of this process's limit, and 2.4 MB of page tables once all of it was read.
        self.open_shard = functools.lru_cache(min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))(self.open_shard)

    def files(self):
        """(name, shape, dtype, entry of the shard table) of every shard file."""
        for number, shard in enumerate(self.metadata["shards"]):
            for kind, (shape, dtype) in self.formats.items():
                if kind in shard:
                    yield shard_name(kind, number), (shard["rows"], *shape), dtype, shard[kind]

    def __len__(self):
        return self.metadata["count"]

    @property
    def stats(self):
        """{'mean': float32 [N, D], 'variance': float32 [N, D], 'count': int} of the latents."""
        try:
            with np.load(self.folder / "stats.npz") as file:
                return {"mean": file["mean"], "variance": file["variance"], "count": int(file["count"])}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.folder / 'stats.npz'} cannot be read ({error}); make the cache again, or mend it with --repair") from None

    @property
    def identity(self):
        """What a checkpoint remembers of the cache it was trained from."""
        return {"view_hash": self.metadata["view_hash"], "teacher": self.teacher_identity, "ids_sha256": self.metadata["ids_sha256"],
                "latents": self.metadata["dtype"]}

    @property
    def teacher_identity(self):
        """What makes two teachers the same: weights and pixel normalisation; None without latents."""
        return self.teacher and {name: self.teacher[name] for name in ("sha256", "mean", "std")}

    def open_shard(self, kind, number):
        """(ops.File, the byte where its first record begins)."""
        path, shard = self.folder / shard_name(kind, number), self.metadata["shards"][number]
        shape, dtype = self.formats[kind]
        check_header(path, (shard["rows"], *shape), dtype, shard[kind]["bytes"])
        return ops.File(str(path)), shard[kind]["bytes"] - shard["rows"] * record_bytes(shape, dtype)

    def places(self, kind, records):
        """(ops.File a record, the byte where each begins, where each is: (shard, row))."""
        records = np.asarray(records, np.int64)
        if len(records) and not (0 <= records.min() and records.max() < len(self)):
            raise IndexError(f"records {records.min()} to {records.max()} of {self.folder}, which has {len(self)}")
        numbers = np.searchsorted(self.first_rows, records, side="right") - 1
        rows = records - self.first_rows[numbers]
        opened, size = [self.open_shard(kind, int(number)) for number in numbers], record_bytes(*self.formats[kind])
        return [file for file, _ in opened], [start + int(row) * size for (_, start), row in zip(opened, rows)], list(zip(numbers.tolist(), rows.tolist()))

    def advise(self, records, kinds=("latents", "patches")):
        """Have whole records read into the page cache, without waiting for them."""
        for kind in (*kinds, *(("scales",) if "latents" in kinds else ())):
            owner = self.clips if kind == "patches" else self
            if kind in owner.formats:
                files, starts, _ = owner.places(kind, records)
                ops.advise(files, starts, record_bytes(*owner.formats[kind]))

    def read_rows(self, kind, records, out, wanted=None, threads=1):
        """Copy rows of records, 'latents' or 'patches', into a batch.

        out      contiguous tensor on the CPU, float16 [R, N, D] of latents, uint8 [R, N, P] of patches
        wanted   bool [R, N]: the rows to copy, the others keep what they held; or None for all
        Raises InputError, with shard and row, where the disk or the file fails.
        """
        if kind == "patches" and self.clips is not self:
            return self.clips.read_rows(kind, records, out, wanted, threads)
        if kind not in self.formats:
            raise InputError(f"the cache {self.folder} holds no {'clips (it was made with --clips off)' if kind == 'patches' else 'latents (it was made with --teacher none)'}")
        shape, dtype = self.formats[kind]
        scale = None
        if dtype == np.int8:
            scale = torch.empty(len(records), 1, shape[1])
            self.read_rows("scales", records, scale, threads=threads)
            scale = scale[:, 0]
        files, starts, at = self.places(kind, records)
        try:
            ops.read_rows(files, starts, out, record_bytes(shape[-1:], dtype), wanted, scale, threads)
        except ops.RowError as error:
            number, row = at[error.record]
            raise InputError(f"{self.folder / shard_name(kind, number)}, row {row}: {error.reason}; check the disk, then the cache with "
                             f"`python cache_latents.py --verify {self.folder}`") from None

    def latents(self, row):
        """float16 [N, D]: the teacher's output for record `row`."""
        out = torch.empty(1, *(self.latent_shape or (0, 0)), dtype=torch.float16)
        self.read_rows("latents", [row], out)
        return out[0].numpy()

    def patches(self, row):
        """uint8 [N, P]: the clip of record `row`, patchified."""
        out = torch.empty(1, *self.patch_shape, dtype=torch.uint8)
        self.read_rows("patches", [row], out)
        return out[0].numpy()

    def verify(self, progress=lambda files: files):
        """Read every byte and compare checksums, counts and ids.

        Returns (problems, a line each; numbers of the shards to rebuild); both empty where the cache is sound.
        """
        return verify(self.folder, progress)


def open_cache(folder):
    """Open a cache for reading: checks metadata, names, sizes and headers, not the payload. Raises InputError on anything amiss."""
    return Cache(folder)


def read_metadata(folder):
    path = folder / "metadata.json"
    if not path.is_file():
        unfinished = (folder / "partial").is_dir()
        raise InputError(f"{folder} is an unfinished cache; run the same cache_latents.py command again to finish it" if unfinished
                         else f"{folder} is no cache: it has no metadata.json; make one with cache_latents.py --out {folder}")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); if another program wrote this cache, make it again: the view of its "
                         f"clips is unknown") from None
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise InputError(f"{folder} was made by {'a newer' if newer else 'an older'} version of this code: it has cache format {version}, this code "
                         f"reads {FORMAT_VERSION}; {'update the code' if newer else 'make the cache again'}")
    return metadata


def row_formats(metadata):
    """{kind: (shape of a record, dtype)} of the files that a cache with this metadata or plan holds."""
    formats = {}
    if metadata["latent_shape"]:
        formats["latents"] = tuple(metadata["latent_shape"]), np.dtype(metadata["dtype"])
        if metadata["dtype"] == "int8":
            formats["scales"] = (1, metadata["latent_shape"][1]), np.dtype(np.float32)
    if metadata["clips"]:
        formats["patches"] = tuple(metadata["patch_shape"]), np.dtype(np.uint8)
    return formats


def record_bytes(shape, dtype):
    return math.prod(shape) * dtype.itemsize


def check_size(path, shape, dtype, size, found):
    if found is None:
        raise InputError(f"{path} is missing; make the cache again, or mend it with --repair")
    if found != size:
        raise InputError(f"{path} has {found} bytes, metadata.json says {size}; make the cache again, or mend it with --repair")


def check_header(path, shape, dtype, size):
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not the expected .npy version")
            header = np.lib.format.read_array_header_1_0(file)
            if file.tell() + math.prod(shape) * dtype.itemsize != size:
                raise ValueError("the header has another length")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make the cache again, or mend it with --repair") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} has a broken header ({error}); make the cache again, or mend it with --repair") from None
    if header != (shape, False, dtype):
        raise InputError(f"{path} holds {header[2]} {list(header[0])}, metadata.json says {dtype} {list(shape)}; make the cache again, or mend it with --repair")


def sha256(path):
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
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


def read_failures(folder):
    """{row of the list: failure} of the rows that a cache leaves out."""
    try:
        return {failure["row"]: failure for failure in map(json.loads, (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"failures.jsonl cannot be read ({error})") from None


def whole_list(ids, failures, count):
    """The rows of the list that a cache was made from, one after another: its ids, and those left out in their rows."""
    kept = iter(ids)
    for row in range(count):
        yield (failures[row]["id"], failures[row]["view"]) if row in failures else next(kept)


def verify(folder, progress=lambda files: files):
    """Read every byte of the cache in `folder` and compare checksums, counts and ids.

    Returns (problems, a line each; numbers of the shards to rebuild). Raises InputError where metadata.json itself cannot be used.
    """
    folder, problems, bad = Path(folder), [], set()
    metadata = read_metadata(folder)

    def sound(name, entry):
        try:
            fits = sha256(folder / name) == entry
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
            return False
        if not fits:
            problems.append(f"{name} does not have the checksum in metadata.json")
        return fits

    try:
        lists = [sound("ids.txt", metadata["ids_sha256"]), sound("failures.jsonl", metadata["failures_sha256"])]
        if metadata["latent_shape"]:
            sound("stats.npz", metadata["stats_sha256"])
        if all(lists):
            ids, failures = Ids(folder / "ids.txt"), read_failures(folder)
            if not len(ids) == metadata["count"] == metadata["list_count"] - len(failures) == sum(shard["rows"] for shard in metadata["shards"]):
                problems.append(f"ids.txt has {len(ids)} records and failures.jsonl {len(failures)} of {metadata['list_count']} rows; the shard table says "
                                f"{sum(shard['rows'] for shard in metadata['shards'])} and the count {metadata['count']}")
            elif list_digest(whole_list(map(ids.fields, range(len(ids))), failures, metadata["list_count"])) != metadata["list_sha256"]:
                problems.append("ids.txt and failures.jsonl do not make up the list that the cache was made from")
        files = [(number, kind) for number, shard in enumerate(metadata["shards"]) for kind in row_formats(metadata)]
        for number, kind in progress(files):
            if not sound(shard_name(kind, number), metadata["shards"][number][kind]["sha256"]):
                bad.add(number)
        if metadata["clips_from"]:
            problems += [f"{metadata['clips_from']}: {problem}" for problem in verify(folder / metadata["clips_from"], progress)[0]]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'metadata.json'} is damaged ({error!r}); make the cache again") from None
    return problems, sorted(bad)


# --------------------------------------------------------------------------------------------------------------- writing

def write_whole(path, content):
    """Write bytes beside `path`, flush them to the disk, and rename: the file is there whole or not at all."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def prepare_folder(folder, flag):
    """Make a folder for results, before the work that ends in it. Raises InputError where that cannot be, or it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made ({error.strerror}); choose another {flag}") from None
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
    np.lib.format.write_array_header_1_0(header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return header.getvalue()


class RowFile:
    """An .npy file written row by row under a temporary name; the number of rows goes into its header at the end."""

    def __init__(self, path, row_shape, dtype):
        self.path, self.part, self.row_shape, self.dtype, self.rows = path, Path(f"{path}.part"), tuple(row_shape), np.dtype(dtype), 0
        self.file = open(self.part, "wb")
        self.header_bytes = self.file.write(npy_header((SHARD_ROWS, *self.row_shape), self.dtype))

    def add(self, row):
        if row.shape != self.row_shape or row.dtype != self.dtype:
            raise ValueError(f"a row of {self.path.name} is {self.dtype} {self.row_shape}, not {row.dtype} {row.shape}")
        self.file.write(np.ascontiguousarray(row).data)
        self.rows += 1

    def finish(self):
        """Flush, checksum, rename; returns {'bytes', 'sha256'}."""
        header = npy_header((self.rows, *self.row_shape), self.dtype)
        assert len(header) == self.header_bytes, "numpy pads .npy headers to a fixed length for any number of rows up to a shard's"
        self.file.seek(0)
        self.file.write(header)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        entry = {"bytes": self.part.stat().st_size, "sha256": sha256(self.part)}
        os.replace(self.part, self.path)
        return entry

    def discard(self):
        with contextlib.suppress(OSError):  # on a full disk closing fails too, having nothing left to lose
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

    plan: the metadata that is known beforehand (teacher, view, shapes, dtype, split, list_count, ...). A folder begun under
    another plan is refused, naming the field; so are folders that hold anything else.
    """

    def __init__(self, folder, plan, progress=lambda items: items):
        self.folder, self.partial, self.progress = Path(folder), Path(folder) / "partial", progress
        self.plan = json.loads(json.dumps({"format_version": FORMAT_VERSION, **plan}))
        begun, finished = begun_plan(self.folder), (self.folder / "metadata.json").is_file()
        if begun:
            for name, value in self.plan.items():
                if begun.get(name) != value:
                    raise InputError(f"{self.folder} was begun with another {name}: {brief(begun.get(name), value)} there, "
                                     f"{brief(value, begun.get(name))} asked for; choose another --out")
        elif self.folder.is_dir() and any(entry.name not in ("partial", "plan.json.part") for entry in self.folder.rglob("*")):
            raise InputError(f"{self.folder} is not empty and holds no cache; choose another --out")
        self.finished = finished
        if not begun:
            self.partial.mkdir(parents=True, exist_ok=True)
            write_whole(self.partial / "plan.json", json.dumps(self.plan, indent=1).encode())

    @property
    def shard_count(self):
        return -(-self.plan["list_count"] // SHARD_ROWS)

    def missing(self):
        """Numbers of the shards still to make."""
        return [] if self.finished else [k for k in range(self.shard_count) if not (self.partial / f"shard-{k:05d}.json").is_file()]

    def shard(self, number):
        return ShardWriter(self, number)

    def reopen(self, ids):
        """Turn a finished cache with broken parts back into one that lacks them, to be finished as if it had died.

        ids: [(video id, view number)] of every row of the list. Returns verify's problems, of which nothing is left to be done where there are none.
        """
        if self.finished:
            metadata = read_metadata(self.folder)
            if "merged_from" in metadata:
                raise InputError(f"{self.folder} was merged from {', '.join(metadata['merged_from'])}; repair those, and merge them again")
            problems, bad = verify(self.folder, self.progress)
            if not problems:
                return []
            if metadata["clips_from"] and any(problem.startswith(f"{metadata['clips_from']}: ") for problem in problems):
                raise InputError(f"{self.folder} uses the clips of {metadata['clips_from']}, which are broken; repair those first")
            failures = self.failures_of(metadata, ids)
            kept = {row: entry for row, entry in enumerate(ids) if row not in failures}
            if len(kept) != metadata["count"]:
                raise InputError(f"{self.folder}: ids.txt and failures.jsonl are both broken, so what its shards hold is unknown; make the cache again")
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            write_whole(self.partial / "plan.json", json.dumps(self.plan, indent=1).encode())
            for number, shard in enumerate(metadata["shards"]):
                rows = range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, len(ids)))
                if number not in bad:
                    entry = {"ids": [kept[row] for row in rows if row in kept], "failures": [failures[row] for row in rows if row in failures],
                             "files": {kind: shard[kind] for kind in row_formats(metadata)}}
                    write_whole(self.partial / f"shard-{number:05d}.json", json.dumps(entry).encode())
            write_whole(self.partial / "before.json", json.dumps(metadata).encode())
            (self.folder / "metadata.json").unlink()  # last: from here on the cache is one that was begun
            self.finished = False
            return problems
        return [f"shard {number} is missing" for number in self.missing()]

    def failures_of(self, metadata, ids):
        """The failures of a finished cache, from whichever of failures.jsonl and ids.txt is sound."""
        try:
            if sha256(self.folder / "failures.jsonl") == metadata["failures_sha256"]:
                return read_failures(self.folder)
            if sha256(self.folder / "ids.txt") == metadata["ids_sha256"]:
                records = Ids(self.folder / "ids.txt")
                kept = set(map(records.fields, range(len(records))))
                return {row: {"row": row, "id": name, "view": view, "reason": "(lost with failures.jsonl)"} for row, (name, view) in enumerate(ids) if (name, view) not in kept}
        except OSError:
            pass
        return {}

    def finish(self):
        """Join what the shards left in partial/ into ids.txt, stats.npz, failures.jsonl and, last, metadata.json."""
        done = [json.loads((self.partial / f"shard-{k:05d}.json").read_text()) for k in range(self.shard_count)]
        ids = "".join(f"{name}\t{view}\n" for shard in done for name, view in shard["ids"]).encode()
        failures = [failure for shard in done for failure in shard["failures"]]
        if not ids:
            for path in [self.partial, *(self.folder / name for number in range(self.shard_count) for name in shard_names(number))]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            raise InputError(f"no video of the list could be decoded; the first: {failures[0]['reason'] if failures else 'none'}")
        shards = [{"rows": len(shard["ids"]), **shard["files"]} for shard in done]
        return self.complete(ids, failures, shards, self.write_stats)

    def complete(self, ids, failures, shards, write_stats):
        """Write what goes beside the shards; metadata.json comes last. ids: bytes of ids.txt; write_stats(shards) makes stats.npz."""
        lost = "".join(json.dumps(failure) + "\n" for failure in failures).encode()
        write_whole(self.folder / "ids.txt", ids)
        write_whole(self.folder / "failures.jsonl", lost)
        metadata = {**self.plan, "count": sum(shard["rows"] for shard in shards), "failures": len(failures), "ids_sha256": hashlib.sha256(ids).hexdigest(),
                    "failures_sha256": hashlib.sha256(lost).hexdigest(), "shards": shards}
        if self.plan["latent_shape"]:
            write_stats(shards)
            metadata["stats_sha256"] = sha256(self.folder / "stats.npz")
        write_whole(self.folder / "metadata.json", json.dumps(metadata, indent=1).encode())
        shutil.rmtree(self.partial)
        self.finished = True
        return metadata

    def write_stats(self, shards):
        """stats.npz, from what each shard left. After a repair that gave the same bits it stays as it is."""
        path, before = self.folder / "stats.npz", self.partial / "before.json"
        if before.is_file() and path.is_file():
            before = json.loads(before.read_text())
            if before["shards"] == shards and sha256(path) == before["stats_sha256"]:
                return
        left_alone = [number for number in range(len(shards)) if not (self.partial / f"stats-{number:05d}.npz").is_file()]  # by a repair
        for number in self.progress(left_alone) if left_alone else ():
            moments, shape, dtype = Moments(self.plan["latent_shape"]), *row_formats(self.plan)["latents"]
            scales = np.load(self.folder / shard_name("scales", number)) if dtype == np.int8 else [None] * shards[number]["rows"]
            with open(self.folder / shard_name("latents", number), "rb") as file:
                np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
                for scale in scales:
                    moments.add(from_stored(np.fromfile(file, dtype, math.prod(shape)).reshape(shape), scale))
            moments.save(self.partial / f"stats-{number:05d}.npz")
        content = io.BytesIO()
        np.savez(content, **join_statistics(load_moments(self.partial / f"stats-{k:05d}.npz") for k in range(self.shard_count)))
        write_whole(path, content.getvalue())


def brief(value, other):
    """A plan's value for a message: of two dicts only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: entry for name, entry in value.items() if other.get(name) != entry}
    return str(value)[:100]


def to_stored(latents, dtype, names=None):
    """Latents float [B, N, D], on any device, of the videos `names`, as a cache of `dtype` keeps them.

    Returns (float16 [B, N, D], None), or (int8 [B, N, D], scales float32 [B, 1, D]: a clip's and channel's largest magnitude / 127); numpy.
    Raises InputError on a latent beyond float16, which is never stored as infinity.
    """
    latents = latents.float()
    largest = latents.abs().amax(1, keepdim=True)  # [B, 1, D]
    if not (top := largest.max().item()) <= FLOAT16_MAX:
        worst = [name for name, value in zip(names or (), largest.amax((1, 2)).tolist()) if not value <= FLOAT16_MAX]
        raise InputError(f"the teacher's latents{f' of the video {worst[0]!r}' if worst else ''} reach {top}, beyond float16 ({FLOAT16_MAX:.0f}); check the teacher's weights, or its compute (--dtype)")
    if dtype == "float16":
        return latents.half().cpu().numpy(), None
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (latents / scale).round().clamp(-127, 127).to(torch.int8).cpu().numpy(), scale.cpu().numpy()


def from_stored(stored, scale):
    """float16 [N, D]: a record's latents as a reader gets them, from what is stored [N, D] and its scale [1, D] or None."""
    return stored if scale is None else (torch.from_numpy(stored).float() * torch.from_numpy(scale)).half().numpy()


class Moments:
    """Count, mean and summed squared deviations of latents, float64, clip after clip."""

    def __init__(self, shape):
        self.count, self.sum, self.squares = 0, np.zeros(shape), np.zeros(shape)

    def add(self, latents):
        ops.add_moments(latents[None], self.sum, self.squares)
        self.count += 1

    def save(self, path):
        content, mean = io.BytesIO(), self.sum / max(1, self.count)
        np.savez(content, mean=mean.astype(np.float32), m2=np.maximum(0, self.squares - self.count * mean * mean).astype(np.float32), count=self.count)
        write_whole(path, content.getvalue())


class ShardWriter:
    """One shard: add or fail each of its rows in list order, then finish() or discard(); as a context, an exception leaves nothing behind."""

    def __init__(self, writer, number):
        self.writer, self.number, self.ids, self.failures = writer, number, [], []
        self.formats, self.files = row_formats(writer.plan), {}
        self.moments = Moments(writer.plan["latent_shape"]) if "latents" in self.formats else None
        for kind, (shape, dtype) in self.formats.items():
            self.files[kind] = RowFile(writer.folder / shard_name(kind, number), shape, dtype)

    def add(self, video_id, view, stored=None, scale=None, patches=None):
        """stored and scale: one clip's of to_stored; patches uint8 [N, P]."""
        if self.moments:
            self.moments.add(from_stored(stored, scale))
        for kind, row in (("latents", stored), ("scales", scale), ("patches", patches)):
            if kind in self.files:
                self.files[kind].add(row)
        self.ids.append((video_id, view))

    def fail(self, row, video_id, view, reason):
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
        if self.moments:
            self.moments.save(partial / f"stats-{self.number:05d}.npz")
        files = {name: file.finish() for name, file in self.files.items()}
        entry = {"ids": self.ids, "failures": self.failures, "files": files}
        write_whole(partial / f"shard-{self.number:05d}.json", json.dumps(entry).encode())  # last: the shard counts from here on


def load_moments(path):
    with np.load(path) as part:
        return int(part["count"]), part["mean"].astype(np.float64), part["m2"].astype(np.float64)


def join_statistics(parts):
    """Mean and variance of all parts (count, mean, m2), by Chan, Golub and LeVeque's update (1979), in order and float64."""
    count, mean, m2 = 0, 0.0, 0.0
    for n, part_mean, part_m2 in parts:
        if n:
            delta, total = part_mean - mean, count + n
            mean, m2, count = mean + delta * (n / total), m2 + part_m2 + delta * delta * (count * n / total), total
    return {"mean": np.float32(mean), "variance": np.float32(m2 / count), "count": np.int64(count)}


def merge(folders, out):
    """Join caches of one view, one teacher and different videos into the new cache `out`; their shards are linked, or copied to another disk.

    Returns the metadata. Raises InputError, naming the field, where two of them do not fit together, and on an id that is in two.
    """
    caches, out = [open_cache(folder) for folder in folders], Path(out)
    first = caches[0].metadata
    for cache in caches:
        if cache.metadata["clips_from"]:
            raise InputError(f"{cache.folder} uses the clips of another cache; merge the caches that hold the clips, and cache the latents with --clips_from again")
        for name in ("view", "patch", "tubelet", "teacher", "dtype", "latent_shape", "patch_shape", "clips"):
            mine, theirs = first[name], cache.metadata[name]
            if name == "teacher" and mine and theirs:  # whatever its file was called
                mine, theirs = ({field: value for field, value in teacher.items() if field != "name"} for teacher in (mine, theirs))
            if mine != theirs:
                raise InputError(f"{caches[0].folder} and {cache.folder} have another {name}: {brief(mine, theirs)} and {brief(theirs, mine)}; caches of one view and "
                                 f"teacher can be merged")
    seen = {}
    for cache in caches:
        for entry in map(cache.ids.fields, range(len(cache))):
            if entry in seen:
                raise InputError(f"the video {entry[0]!r} (view {entry[1]}) is in {seen[entry]} and in {cache.folder}; caches of different videos can be merged")
            seen[entry] = cache.folder
    failures, rows = [], 0
    for cache in caches:
        failures += [{**failure, "row": row + rows} for row, failure in sorted(read_failures(cache.folder).items())]
        rows += cache.metadata["list_count"]
    ids = "".join(f"{name}\t{view}\n" for name, view in seen).encode()
    plan = {name: first[name] for name in ("format_version", "teacher", "view", "view_hash", "views", "patch", "tubelet", "dtype", "batch_size", "latent_shape", "patch_shape",
                                           "clips", "clips_from")}
    plan |= {"split": "+".join(dict.fromkeys(cache.metadata["split"] for cache in caches)), "list_count": rows,
             "list_sha256": list_digest(whole_list(seen, {failure["row"]: failure for failure in failures}, rows)),
             "merged_from": [cache.folder.name for cache in caches]}
    writer = Writer(out, plan)
    if writer.finished:
        return read_metadata(out)
    shards = []
    for cache in caches:
        for number, shard in enumerate(cache.metadata["shards"]):
            for kind in cache.formats:
                part = out / f"{shard_name(kind, len(shards))}.part"
                part.unlink(missing_ok=True)
                source = (cache.folder / shard_name(kind, number)).resolve()
                try:
                    os.link(source, part)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, part)
                os.replace(part, out / shard_name(kind, len(shards)))
            shards.append(shard)

    def write_stats(shards):
        parts, content = [cache.stats for cache in caches], io.BytesIO()
        np.savez(content, **join_statistics((part["count"], part["mean"].astype(np.float64), part["variance"].astype(np.float64) * part["count"]) for part in parts))
        write_whole(out / "stats.npz", content.getvalue())

    return writer.complete(ids, failures, shards, write_stats)
