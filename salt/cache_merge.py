"""Joining caches of one view and teacher into a new one."""

import io
import os
import shutil
from pathlib import Path

import numpy as np

from salt.cache import open_cache
from salt.cache_format import agree_on, shard_name
from salt.cache_writer import Writer, brief, list_digest
from salt.errors import InputError
from salt.files import sha256, write_whole
from salt.stored import join_statistics
from salt.upkeep import read_failures, whole_list

MUST_AGREE = (
    "view",
    "patch",
    "tubelet",
    "teacher",
    "dtype",
    "latent_shape",
    "patch_shape",
    "clips",
    "views",
)
KEPT = (*MUST_AGREE, "format_version", "view_hash", "batch_size", "clips_from")


def merge(folders, out, progress=lambda files: files):
    """Join caches of one view, one teacher and different videos into the new cache `out`; their
    shards are linked, or copied to another disk.

    Returns the metadata. Raises InputError, naming the field, where two of them do not fit
    together, and on an id that is in two.
    """
    caches, out = [open_cache(folder) for folder in folders], Path(out)
    refuse_misfits(caches)
    seen = ids_of(caches)
    failures = []
    rows = 0
    for cache in caches:
        failures += [
            {**failure, "row": row + rows}
            for row, failure in sorted(read_failures(cache.folder).items())
        ]
        rows += cache.metadata["list_count"]
    if (out / "metadata.json").is_file():
        raise InputError(f"{out} is a cache already; delete it to merge again")
    writer = Writer(out, plan_of(caches, seen, failures, rows))
    writer.lock()
    jobs = []
    shards = [(cache, k) for cache in caches for k in range(len(cache.metadata["shards"]))]
    for number, (cache, k) in enumerate(shards):
        for kind in cache.formats:
            names = (shard_name(kind, k), shard_name(kind, number))
            jobs.append(
                (cache.folder / names[0], out / names[1], cache.metadata["shards"][k][kind])
            )
    to_copy = sum(
        entry["bytes"] for source, _, entry in jobs if source.stat().st_dev != out.stat().st_dev
    )
    if to_copy > shutil.disk_usage(out).free:
        raise InputError(
            f"{out} is on another disk, so {to_copy / 1e9:.1f} GB must be copied, and it has"
            f" {shutil.disk_usage(out).free / 1e9:.1f} GB free"
        )
    for source, path, entry in progress(jobs):
        place(source.resolve(), path, entry["sha256"])
    marks, sources = (
        np.concatenate([getattr(cache, name) for cache in caches])
        for name in ("fingerprints", "sources")
    )
    return writer.complete(
        "".join(f"{name}\t{view}\n" for name, view in seen).encode(),
        marks,
        sources,
        failures,
        [cache.metadata["shards"][k] for cache, k in shards],
        lambda shards: write_joined_stats(caches, out),
    )


def refuse_misfits(caches):
    """Raises InputError where two caches differ in what all records of one must have in common."""
    # older versions noted less of a teacher
    fullest = max(caches, key=lambda cache: len(cache.teacher or {}))
    for cache in caches:
        if cache.metadata["clips_from"]:
            raise InputError(
                f"{cache.folder} uses the clips of another cache; merge the caches that hold the"
                " clips, and cache the latents with --clips_from again"
            )
        for name in MUST_AGREE:
            mine, theirs = fullest.metadata[name], cache.metadata[name]
            if name == "teacher" and mine and theirs:  # whatever its file was called
                mine, theirs = (
                    {field: value for field, value in teacher.items() if field != "name"}
                    for teacher in (mine, theirs)
                )
            if not agree_on(mine, theirs):
                raise InputError(
                    f"{fullest.folder} and {cache.folder} have another {name}:"
                    f" {brief(mine, theirs)} and {brief(theirs, mine)}; caches of one view and"
                    " teacher can be merged"
                )


def ids_of(caches):
    """{(video id, view): its cache's folder} of all records, in order.

    Raises InputError on one that is in two caches.
    """
    seen = {}
    for cache in caches:
        for entry in map(cache.ids.fields, range(len(cache))):
            if entry in seen:
                raise InputError(
                    f"the video {entry[0]!r} (view {entry[1]}) is in {seen[entry]} and in"
                    f" {cache.folder}; caches of different videos can be merged"
                )
            seen[entry] = cache.folder
    return seen


def plan_of(caches, ids, failures, rows):
    """The plan of the cache that they become."""
    plan = {name: value for name, value in caches[0].metadata.items() if name in KEPT}
    if plan["teacher"]:  # no more than is known of all
        plan["teacher"] = {
            field: value
            for field, value in plan["teacher"].items()
            if all(field in cache.teacher for cache in caches)
        }
    splits = (part for cache in caches for part in cache.metadata["split"].split("+"))
    by_row = {failure["row"]: failure for failure in failures}
    return plan | {
        "split": "+".join(dict.fromkeys(splits)),
        "list_count": rows,
        "list_sha256": list_digest(whole_list(ids, by_row, rows)),
        "merged_from": [cache.folder.name for cache in caches],
    }


def write_joined_stats(caches, out):
    """stats.npz of all latents, from that of each cache."""
    parts = []
    for stats in (cache.stats for cache in caches if cache.has_latents):
        variance = stats["variance"].astype(np.float64)
        parts.append((stats["count"], stats["mean"].astype(np.float64), variance * stats["count"]))
    content = io.BytesIO()
    np.savez(content, **join_statistics(parts))
    write_whole(out / "stats.npz", content.getvalue())


def place(source, path, digest):
    """Link `source` at `path`; or copy it, flushed and with its checksum compared, where that
    cannot be.
    """
    part = Path(f"{path}.part")
    # of a merge that was killed; a link renamed onto another of the same file would stay
    for left in (part, path):
        left.unlink(missing_ok=True)
    try:
        os.link(source, path)
        return
    except OSError:  # another disk, or one without links
        pass
    try:
        shutil.copyfile(source, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        if sha256(part) != digest:
            raise InputError(f"{source} does not have its checksum; repair that cache first")
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; make room, and merge again"
        ) from None
    finally:
        part.unlink(missing_ok=True)
