"""What is in a latent cache: its metadata and files, what says of which content they are, and the
checks of each. `Cache` in salt/cache.py reads it, `Writer` in salt/cache_writer.py makes it.
"""

import hashlib
import json
import math
import os
import tokenize
from pathlib import Path

import numpy as np

from salt.errors import InputError
from salt.files import sha256
from salt.views import grid_of

# 1 and 2 cut other pixels under the same view, and 2 did not keep what tells them apart
FORMAT_VERSION = 3

KINDS = ("latents", "scales", "tokens", "patches")


# what of a cache's teacher tells it from others: `shown` are the fields of the View that it saw,
# where students see another
IDENTITY = "sha256 mean std compute config layers of_frames norm shown".split()


def plan_of(
    view,
    ids_sha256,
    count,
    teacher=None,
    patch=16,
    tubelet=2,
    split="train",
    views=1,
    dtype="float16",
    batch_size=8,
    clips=True,
    clips_from=None,
):
    """What the metadata of a cache says beforehand, for a cache_writer.Writer.

    view        views.View of the clips
    ids_sha256  cache_writer.list_digest of the list's `count` rows
    teacher     {'name', 'sha256', 'dim', 'mean', 'std', 'compute', ...} or None: no latents
    views       clips a video
    dtype       'float16' or 'int8', of the latents
    batch_size  clips that the teacher sees at a time
    clips       whether clips are kept; clips_from: or in which cache they are
    """
    tokens = math.prod(grid_of(view, patch, tubelet))
    return {
        "split": split,
        "list_count": count,
        "list_sha256": ids_sha256,
        "teacher": teacher,
        "view": view.to_dict(),
        "view_hash": view.hash(),
        "views": views,
        "patch": patch,
        "tubelet": tubelet,
        "dtype": dtype,
        "batch_size": batch_size,
        "latent_shape": [tokens, teacher["dim"]] if teacher else None,
        "patch_shape": [tokens, 3 * tubelet * patch * patch],
        "clips": clips,
        "clips_from": clips_from,
    }


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


# how every teacher was asked before there was a choice
ASKED = {"layers": [-1], "of_frames": "mean", "norm": False, "shown": None}


def agree_on(saved, now):
    """Whether two identities say the same, as far as both say it: one that an older version wrote
    lacks what was added since, but for ASKED, which is known of it. Of different kinds are two that
    have nothing in common."""
    if is_teacher(saved) and is_teacher(now):
        saved, now = ({**ASKED, **each} for each in (saved, now))
    if isinstance(saved, dict) and isinstance(now, dict) and saved.keys() & now.keys():
        return all(agree_on(saved[name], now[name]) for name in saved.keys() & now.keys())
    return saved == now


def is_teacher(identity):
    """Whether this identity is a teacher's."""
    return isinstance(identity, dict) and {"sha256", "mean", "std"} <= identity.keys()


def metadata_digest(metadata):
    """The same of metadata but for its own checksum."""
    return content_digest({name: value for name, value in metadata.items() if name != "checksum"})


def fingerprint(record):
    """The first 8 bytes of SHA-256 over a record, contiguous, as a signed number.

    A clip's is over its patches, uint8 [N, P]: the same pixels, the same number.
    """
    return int.from_bytes(hashlib.sha256(record).digest()[:8], "little", signed=True)


def source_mark(row):
    """A number, never 0, of what a lists.Row is cut from: its stretch and its file's size; 0 where
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


def check_size(path, size, found):
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


def shard_name(kind, number):
    return f"{kind}-{number:05d}.npy"


def shard_names(number):
    return [shard_name(kind, number) for kind in KINDS]


class Ids:
    """The video ids of a cache, read lazily from ids.txt: ten million of them take 80 MB of line
    offsets, not a list of str.
    """

    def __init__(self, path):
        self.path = path
        self.digest = hashlib.sha256()
        parts = []
        at = 0
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
