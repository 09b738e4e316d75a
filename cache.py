"""The latent cache: plain .npy shards, a list of ids, per-position statistics, and the metadata that makes them trustworthy.

    CACHE/metadata.json      format version, teacher, view and its hash, shapes, the shard table with sizes and SHA-256
    CACHE/ids.txt            `video id<TAB>view number` a record
    CACHE/stats.npz          per-position mean and variance of the latents, float32 [N, D], and the count
    CACHE/latents-00000.npy  float16 [n, N, D]
    CACHE/patches-00000.npy  uint8 [n, N, P]   (--clips on)
    CACHE/failures.jsonl     videos left out, with the reason

While a cache is being made its partial/ folder holds the plan and what each finished shard adds; metadata.json comes last,
so a cache with metadata is whole. Nothing in a cache depends on when or in how many runs it was made.
"""
import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from config import InputError
from views import IMAGENET_MEAN, IMAGENET_STD, View

FORMAT_VERSION = 1
SHARD_ROWS = 512
FLOAT16_MAX = 65504.0


# --------------------------------------------------------------------------------------------------------------- reading

class Ids:
    """The video ids of a cache, read lazily from ids.txt: ten million of them take 80 MB of line offsets, not a list of str."""

    def __init__(self, path):
        try:
            self.text = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        self.ends = np.flatnonzero(self.text == ord("\n"))

    def __len__(self):
        return len(self.ends)

    def fields(self, row):
        """(video id, view number) of a record."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a list of {len(self)} ids")
        row %= len(self)
        start = self.ends[row - 1] + 1 if row else 0
        name, _, view = self.text[start:self.ends[row]].tobytes().decode().partition("\t")
        return name, int(view)

    def __getitem__(self, row):
        return self.fields(row)[0]

    def __iter__(self):
        return (self[row] for row in range(len(self)))


class Cache:
    """An open cache: len(), .ids, .metadata, .view, .stats, .latents(row), .patches(row), .verify(). Threads may share it."""

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
                                  (self.first_rows[-1] == m["count"], "the shard table does not add up to the count")):
                if not fits:
                    raise InputError(f"{self.folder / 'metadata.json'} is damaged: {problem}; make the cache again")
            self.clips = self
            if m["clips_from"]:
                self.clips = Cache(self.folder / m["clips_from"])
                if self.clips.view != self.view or len(self.clips) != len(self) or self.clips.metadata["ids_sha256"] != m["ids_sha256"]:
                    raise InputError(f"{self.clips.folder}, whose clips {self.folder} uses, is not the cache it was made from")
            self.has_latents = self.latent_shape is not None
            self.has_patches = self.clips is not self or (len(m["shards"]) > 0 and "patches" in m["shards"][0])
            for name, shape, dtype, entry in self.files():
                check_npy(self.folder / name, shape, dtype, entry["bytes"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.folder / 'metadata.json'} is damaged ({error!r}); make the cache again") from None
        self.ids = Ids(self.folder / "ids.txt")
        if len(self.ids) != m["count"]:
            raise InputError(f"{self.folder / 'ids.txt'} has {len(self.ids)} lines, metadata.json says {m['count']}; make the cache again")

    def files(self):
        """(name, shape, dtype, entry of the shard table) of every shard file."""
        for number, shard in enumerate(self.metadata["shards"]):
            for kind, shape, dtype in (("latents", self.latent_shape, np.float16), ("patches", self.patch_shape, np.uint8)):
                if kind in shard:
                    yield shard_name(kind, number), (shard["rows"], *shape), np.dtype(dtype), shard[kind]

    def __len__(self):
        return self.metadata["count"]

    @property
    def stats(self):
        """{'mean': float32 [N, D], 'variance': float32 [N, D], 'count': int} of the latents."""
        try:
            with np.load(self.folder / "stats.npz") as file:
                return {"mean": file["mean"], "variance": file["variance"], "count": int(file["count"])}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.folder / 'stats.npz'} cannot be read ({error}); make the cache again") from None

    @property
    def identity(self):
        """What a checkpoint remembers of the cache it was trained from."""
        return {"view_hash": self.metadata["view_hash"], "teacher": self.teacher_identity, "ids_sha256": self.metadata["ids_sha256"]}

    @property
    def teacher_identity(self):
        """What makes two teachers the same: weights and pixel normalisation; None without latents."""
        return self.teacher and {name: self.teacher[name] for name in ("sha256", "mean", "std")}

    def read(self, kind, row, shape, dtype):
        if not 0 <= row < len(self):
            raise IndexError(f"record {row} of {self.folder}, which has {len(self)}")
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        path, bytes_a_record = self.folder / shard_name(kind, number), int(np.prod(shape)) * dtype.itemsize
        start = self.metadata["shards"][number][kind]["bytes"] - bytes_a_record * int(self.first_rows[number + 1] - row)
        out = np.empty(shape, dtype)
        try:
            with open(path, "rb", buffering=0) as file:  # pread, not a map: a failing disk is an error here, not SIGBUS
                got = os.preadv(file.fileno(), [out.reshape(-1).view(np.uint8)], start)
        except OSError as error:
            raise InputError(f"{path}, row {row - self.first_rows[number]}: {error.strerror}; check the disk, then the cache with "
                             f"`python cache_latents.py --verify {self.folder}`") from None
        if got != bytes_a_record:
            raise InputError(f"{path}, row {row - self.first_rows[number]}: {got} of {bytes_a_record} bytes could be read; the file is truncated")
        return out

    def latents(self, row):
        """float16 [N, D]: the teacher's output for record `row`."""
        if not self.has_latents:
            raise InputError(f"the cache {self.folder} holds no latents (it was made with --teacher none)")
        return self.read("latents", row, self.latent_shape, np.dtype(np.float16))

    def patches(self, row):
        """uint8 [N, P]: the clip of record `row`, patchified."""
        if not self.has_patches:
            raise InputError(f"the cache {self.folder} holds no clips (it was made with --clips off)")
        return self.clips.read("patches", row, self.clips.patch_shape, np.dtype(np.uint8))

    def verify(self, progress=lambda files: files):
        """Read every byte and compare checksums: a list of problems, one line each; empty where the cache is sound."""
        problems = []
        if sha256(self.folder / "ids.txt") != self.metadata["ids_sha256"]:
            problems.append("ids.txt does not have the checksum in metadata.json")
        if self.has_latents and sha256(self.folder / "stats.npz") != self.metadata["stats_sha256"]:
            problems.append("stats.npz does not have the checksum in metadata.json")
        for name, _, _, entry in progress(list(self.files())):
            if sha256(self.folder / name) != entry["sha256"]:
                problems.append(f"{name} does not have the checksum in metadata.json")
        return problems + (self.clips.verify(progress) if self.clips is not self else [])


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
        raise InputError(f"{folder} has cache format {version}, this code reads {FORMAT_VERSION}; "
                         f"{'update the code' if version > FORMAT_VERSION else 'make the cache again'}")
    return metadata


def check_npy(path, shape, dtype, size):
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not the expected .npy version")
            header = np.lib.format.read_array_header_1_0(file)
            found = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make the cache again") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} has a broken header ({error}); make the cache again") from None
    if header != (shape, False, dtype) or found != size:
        raise InputError(f"{path} holds {header[2]} {list(header[0])} in {found} bytes, metadata.json says {dtype} {list(shape)} in "
                         f"{size}; make the cache again")


def sha256(path):
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def shard_name(kind, number):
    return f"{kind}-{number:05d}.npy"


def shard_names(number):
    return [shard_name(kind, number) for kind in ("latents", "patches")]


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

    def __init__(self, folder, plan):
        self.folder, self.partial = Path(folder), Path(folder) / "partial"
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

    def finish(self):
        """Join what the shards left in partial/ into ids.txt, stats.npz, failures.jsonl and, last, metadata.json."""
        done = [json.loads((self.partial / f"shard-{k:05d}.json").read_text()) for k in range(self.shard_count)]
        ids = "".join(f"{name}\t{view}\n" for shard in done for name, view in shard["ids"]).encode()
        failures = [failure for shard in done for failure in shard["failures"]]
        count = sum(len(shard["ids"]) for shard in done)
        if count == 0:
            for path in [self.partial, *(self.folder / name for number in range(self.shard_count) for name in shard_names(number))]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            raise InputError(f"no video of the list could be decoded; the first: {failures[0]['reason'] if failures else 'none'}")
        write_whole(self.folder / "ids.txt", ids)
        write_whole(self.folder / "failures.jsonl", "".join(json.dumps(failure) + "\n" for failure in failures).encode())
        metadata = {**self.plan, "count": count, "failures": len(failures), "ids_sha256": hashlib.sha256(ids).hexdigest(),
                    "shards": [{"rows": len(shard["ids"]), **shard["files"]} for shard in done]}
        if self.plan["latent_shape"]:
            stats = join_statistics(self.partial / f"stats-{k:05d}.npz" for k in range(self.shard_count))
            content = io.BytesIO()
            np.savez(content, **stats)
            write_whole(self.folder / "stats.npz", content.getvalue())
            metadata["stats_sha256"] = sha256(self.folder / "stats.npz")
        write_whole(self.folder / "metadata.json", json.dumps(metadata, indent=1).encode())
        shutil.rmtree(self.partial)
        self.finished = True
        return metadata


def brief(value, other):
    """A plan's value for a message: of two dicts only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: entry for name, entry in value.items() if other.get(name) != entry}
    return str(value)[:100]


class ShardWriter:
    """One shard: add or fail each of its rows in list order, then leave the `with` block; an exception leaves nothing behind."""

    def __init__(self, writer, number):
        self.writer, self.number, self.ids, self.failures = writer, number, [], []
        plan, self.files = writer.plan, {}
        if plan["latent_shape"]:
            self.sum, self.squares = np.zeros(plan["latent_shape"]), np.zeros(plan["latent_shape"])
        for kind, wanted, dtype in (("latents", plan["latent_shape"], np.float16), ("patches", plan["clips"] and plan["patch_shape"], np.uint8)):
            if wanted:
                self.files[kind] = RowFile(writer.folder / shard_name(kind, number), wanted, dtype)

    def add(self, video_id, view, latents=None, patches=None):
        """latents float [N, D] (stored as float16), patches uint8 [N, P]. Raises InputError on latents beyond float16."""
        if "latents" in self.files:
            largest = float(np.abs(latents).max())
            if not largest <= FLOAT16_MAX:
                raise InputError(f"the teacher's latents of the video {video_id!r} reach {largest}, beyond float16 "
                                 f"({FLOAT16_MAX:.0f}); check the teacher's weights")
            stored = latents.astype(np.float16)
            self.files["latents"].add(stored)
            wide = stored.astype(np.float64)
            self.sum += wide
            self.squares += wide * wide
        if "patches" in self.files:
            self.files["patches"].add(patches)
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
            for file in self.files.values():
                file.discard()  # what finish() renamed is out of its reach

    def finish(self):
        partial = self.writer.partial
        if "latents" in self.files:
            count = len(self.ids)
            mean = self.sum / max(1, count)
            content = io.BytesIO()
            np.savez(content, mean=mean.astype(np.float32), m2=np.maximum(0, self.squares - count * mean * mean).astype(np.float32), count=count)
            write_whole(partial / f"stats-{self.number:05d}.npz", content.getvalue())
        files = {name: file.finish() for name, file in self.files.items()}
        entry = {"ids": self.ids, "failures": self.failures, "files": files}
        write_whole(partial / f"shard-{self.number:05d}.json", json.dumps(entry).encode())  # last: the shard counts from here on


def join_statistics(paths):
    """Mean and variance of all shards, by Chan, Golub and LeVeque's update (1979), in shard order and float64."""
    count, mean, m2 = 0, 0.0, 0.0
    for path in paths:
        with np.load(path) as part:
            n, part_mean, part_m2 = int(part["count"]), part["mean"].astype(np.float64), part["m2"].astype(np.float64)
        if n:
            delta, total = part_mean - mean, count + n
            mean, m2, count = mean + delta * (n / total), m2 + part_m2 + delta * delta * (count * n / total), total
    return {"mean": np.float32(mean), "variance": np.float32(m2 / count), "count": np.int64(count)}
