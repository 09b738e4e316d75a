"""Keeping caches sound: checking every byte, preparing a repair, joining caches.

cache_latents.py --verify, --repair and --merge.
"""

import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from salt import cache_writer
from salt.cache import (
    Ids,
    agree_on,
    check_header,
    fingerprint,
    open_cache,
    read_metadata,
    row_formats,
    same_clips,
    shard_name,
    sources_of,
)
from salt.cache_writer import Writer, brief, join_statistics, list_digest
from salt.errors import InputError
from salt.files import sha256, write_whole
from salt.loader import Records, prefetch


def read_failures(folder):
    """{row of the list: failure} of the rows that a cache leaves out."""
    try:
        return {
            failure["row"]: failure
            for failure in map(
                json.loads, (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
            )
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"failures.jsonl cannot be read ({error})") from None


def whole_list(ids, failures, count):
    """The rows of the list that a cache was made from, one after another: its ids, and those left
    out in their rows.
    """
    kept = iter(ids)
    for row in range(count):
        yield (failures[row]["id"], failures[row]["view"]) if row in failures else next(kept)


CHANGED = "metadata.json does not fit its files"
OTHER_CLIPS = "these latents were not made from the clips that are now in"


def checksums(jobs, progress):
    """[(key, problem or None)] of jobs [(key, path, SHA-256 it must have)], on as many threads as
    there are cores.
    """

    def check(job):
        key, path, expected = job
        try:
            return key, (
                None if sha256(path) == expected else f"{path.name} does not have its checksum"
            )
        except OSError as error:
            return key, f"{path.name} cannot be read: {error.strerror}"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(check, jobs)
        return [next(results) for _ in progress(jobs)]


def verify(folder, progress=lambda files: files):
    """Read every byte of the cache in `folder` and compare checksums, counts and ids.

    Returns (problems, a line each; numbers of the shards to rebuild). Raises InputError where
    metadata.json itself cannot be used.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    try:
        jobs = [
            ("ids", folder / "ids.txt", metadata["ids_sha256"]),
            ("failures", folder / "failures.jsonl", metadata["failures_sha256"]),
        ]
        if metadata["latent_shape"]:
            jobs.append(("stats", folder / "stats.npz", metadata["stats_sha256"]))
        jobs += [
            (name, folder / f"{name}.npy", metadata[f"{name}_sha256"])
            for name in ("fingerprints", "sources")
            if name == "fingerprints" or f"{name}_sha256" in metadata
        ]
        jobs += [
            (number, folder / shard_name(kind, number), shard[kind]["sha256"])
            for number, shard in enumerate(metadata["shards"])
            for kind in row_formats(metadata)
        ]
        found = [(key, problem) for key, problem in checksums(jobs, progress) if problem]
        problems, broken = [problem for _, problem in found], {key for key, _ in found}
        if not broken & {"ids", "failures"}:
            ids = Ids(folder / "ids.txt")
            failures = read_failures(folder)
            rows = sum(shard["rows"] for shard in metadata["shards"])
            if not len(ids) == metadata["count"] == metadata["list_count"] - len(failures) == rows:
                problems.append(
                    f"ids.txt has {len(ids)} records and failures.jsonl {len(failures)} of"
                    f" {metadata['list_count']} rows; the shard table says {rows} and the count"
                    f" {metadata['count']}"
                )
            elif (
                list_digest(
                    whole_list(map(ids.fields, range(len(ids))), failures, metadata["list_count"])
                )
                != metadata["list_sha256"]
            ):
                problems.append(
                    "ids.txt and failures.jsonl do not make up the list that the cache was made"
                    " from"
                )
        if metadata["clips_from"] and not same_clips(
            metadata, read_metadata(folder / metadata["clips_from"])
        ):
            problems.append(f"{OTHER_CLIPS} {metadata['clips_from']}")
        if not problems:  # every file is what it was; does metadata.json describe them?
            try:
                opened = open_cache(folder)
                for name, shape, dtype, entry in opened.files():
                    check_header(folder / name, shape, dtype, entry["bytes"])
            except InputError as error:
                problems.append(f"{CHANGED}: {error}")
        if metadata["clips_from"]:
            problems += [
                f"{metadata['clips_from']}: {problem}"
                for problem in verify(folder / metadata["clips_from"], progress)[0]
            ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'metadata.json'} is damaged ({error!r}); make the cache again"
        ) from None
    return problems, sorted(broken - {"ids", "failures", "stats", "fingerprints", "sources"})


def verify_clips(folder, rows, threads, progress=lambda records: records):
    """Decode the videos of a cache again, and compare their pixels with its fingerprints.

    rows: of the list, splits.Row; progress wraps the records. Returns problems, a line each.
    """
    source = Records(open_cache(folder), rows, changed_too=True)

    def problem_of(record):
        patches = np.empty(source.patch_shape, np.uint8)
        try:
            source.decode(record, patches, check=True)
        except InputError as error:
            return str(error)
        return None

    records = progress(range(len(source)))
    return [problem for problem in prefetch(problem_of, records, threads, 2 * threads) if problem]


def remedy(folder, problems):
    """What to do about the problems of a cache."""
    metadata = read_metadata(Path(folder))
    if any(problem.startswith(OTHER_CLIPS) for problem in problems):
        return f"put back the cache that was there, or delete {folder} and make it again"
    if any(problem.startswith(CHANGED) for problem in problems):
        return "put back the metadata.json that was made with the files, or make the cache again"
    if "merged_from" in metadata:
        return (
            f"repair {' and '.join(metadata['merged_from'])}, delete {folder}, and merge them again"
        )
    if metadata["clips_from"]:
        return (
            "run the command that made it with --repair; first that of"
            f" {Path(folder) / metadata['clips_from']}, if the problems are there"
        )
    return "run the command that made it with --repair"


def reopen(writer, ids, readable=lambda row: False):
    """Prepare a repair: find what is broken in the writer's cache, and have the writer miss just
    that.

    ids       [(video id, view number)] of every row of the list
    readable  whether a row that the cache left out could be had now; its shard is then made again
    Returns the problems, a line each. Nothing is taken away here: while the repair is under way,
    and where it cannot be done, the cache is what it was, but for the shards that were replaced.
    Call writer.lock() first.
    """
    folder, partial = writer.folder, writer.partial
    if not writer.finished:  # begun, or under repair: the shards that count as done are looked at
        done = {
            number: json.loads((partial / f"shard-{number:05d}.json").read_text())
            for number in sorted(set(range(writer.shard_count)) - set(writer.missing()))
        }
        jobs = [
            (number, folder / shard_name(kind, number), entry["sha256"])
            for number, shard in done.items()
            for kind, entry in shard["files"].items()
        ]
        found = [
            (number, problem) for number, problem in checksums(jobs, writer.progress) if problem
        ]
        for number in {number for number, _ in found}:
            held = [
                [*entry, mark]
                for entry, mark in zip(done[number]["ids"], done[number]["fingerprints"])
            ]
            write_whole(partial / f"held-{number:05d}.json", json.dumps(held).encode())
            (partial / f"shard-{number:05d}.json").unlink()
        return [problem for _, problem in found]
    metadata = read_metadata(folder)
    if "merged_from" in metadata:
        raise InputError(
            f"{folder} was merged from {', '.join(metadata['merged_from'])}; {remedy(folder, ())}"
        )
    problems, bad = verify(folder, writer.progress)
    if any(problem.startswith((CHANGED, OTHER_CLIPS)) for problem in problems):
        raise InputError(f"{folder}: {problems[0]}; {remedy(folder, problems)}")
    if metadata["clips_from"] and any(
        problem.startswith(f"{metadata['clips_from']}: ") for problem in problems
    ):
        raise InputError(
            f"{folder} uses the clips of {metadata['clips_from']}, which are broken; repair those"
            " first"
        )
    failures = failures_of(folder, metadata, ids)
    back = [row for row in failures if row // cache_writer.SHARD_ROWS not in bad and readable(row)]
    problems += [
        f"the video {ids[row][0]!r}, which was left out, can be decoded now" for row in back
    ]
    bad = sorted({*bad, *(row // cache_writer.SHARD_ROWS for row in back)})
    if not problems:
        return []
    marks = marks_of(folder, metadata, bad)
    if marks is None:  # nothing tells any more which clips its latents are of
        bad = list(range(len(metadata["shards"])))
    kept = {row: entry for row, entry in enumerate(ids) if row not in failures}
    if len(kept) != metadata["count"]:
        raise InputError(
            f"{folder}: ids.txt and failures.jsonl are both broken, so what its shards hold is"
            " unknown; make the cache again"
        )
    for path in partial.iterdir():
        if path.name != "lock":
            path.unlink()
    write_whole(partial / "plan.json", json.dumps(writer.plan, indent=1).encode())
    sources, done = sources_of(folder, metadata), 0
    for number, shard in enumerate(metadata["shards"]):
        rows = range(
            number * cache_writer.SHARD_ROWS, min((number + 1) * cache_writer.SHARD_ROWS, len(ids))
        )
        held = [kept[row] for row in rows if row in kept]
        known = None if marks is None else marks[done : done + len(held)]
        cut_from = sources[done : done + len(held)]
        done += len(held)
        if number in bad:
            entries = [[*entry, mark] for entry, mark in zip(held, known or [None] * len(held))]
            write_whole(partial / f"held-{number:05d}.json", json.dumps(entries).encode())
        else:
            entry = {
                "ids": held,
                "failures": [failures[row] for row in rows if row in failures],
                "files": {kind: shard[kind] for kind in row_formats(metadata)},
            }
            entry |= {
                "fingerprints": known,
                "sources": cut_from,
                **({"lost": shard["lost"]} if "lost" in shard else {}),
            }
            write_whole(partial / f"shard-{number:05d}.json", json.dumps(entry).encode())
    # last: from here on a repair is under way
    write_whole(partial / "before.json", json.dumps(metadata).encode())
    return problems


def marks_of(folder, metadata, bad):
    """The fingerprints of a cache's records, a list; out of its clips where fingerprints.npy is
    broken, None for those in `bad` shards; None where neither is to be had."""
    path = folder / "fingerprints.npy"
    if path.is_file() and sha256(path) == metadata["fingerprints_sha256"]:
        return np.load(path).tolist()
    if not metadata["clips"]:
        return None
    marks = []
    for number, shard in enumerate(metadata["shards"]):
        clips = (
            [] if number in bad else np.load(folder / shard_name("patches", number), mmap_mode="r")
        )
        marks += [fingerprint(np.ascontiguousarray(clip)) for clip in clips] or [None] * shard[
            "rows"
        ]
    return marks


def failures_of(folder, metadata, ids):
    """{row: failure} of a cache, from whichever of failures.jsonl and ids.txt is sound; empty where
    neither is.
    """

    def sound(name):
        try:
            return sha256(folder / name) == metadata[f"{name.partition('.')[0]}_sha256"]
        except OSError:
            return False

    if sound("failures.jsonl"):
        return read_failures(folder)
    if sound("ids.txt"):
        records = Ids(folder / "ids.txt")
        kept = set(map(records.fields, range(len(records))))
        lost = {row: entry for row, entry in enumerate(ids) if entry not in kept}
        return {
            row: {"row": row, "id": name, "view": view, "reason": "(lost with failures.jsonl)"}
            for row, (name, view) in lost.items()
        }
    return {}


def merge(folders, out, progress=lambda files: files):
    """Join caches of one view, one teacher and different videos into the new cache `out`; their
    shards are linked, or copied to another disk.

    Returns the metadata. Raises InputError, naming the field, where two of them do not fit
    together, and on an id that is in two.
    """
    caches, out = [open_cache(folder) for folder in folders], Path(out)
    first, stats = caches[0].metadata, [cache.stats for cache in caches if cache.has_latents]
    # older versions noted less of a teacher
    fullest = max(caches, key=lambda cache: len(cache.teacher or {}))
    for cache in caches:
        if cache.metadata["clips_from"]:
            raise InputError(
                f"{cache.folder} uses the clips of another cache; merge the caches that hold the"
                " clips, and cache the latents with --clips_from again"
            )
        for name in (
            "view",
            "patch",
            "tubelet",
            "teacher",
            "dtype",
            "latent_shape",
            "patch_shape",
            "clips",
            "views",
        ):
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
    seen = {}
    for cache in caches:
        for entry in map(cache.ids.fields, range(len(cache))):
            if entry in seen:
                raise InputError(
                    f"the video {entry[0]!r} (view {entry[1]}) is in {seen[entry]} and in"
                    f" {cache.folder}; caches of different videos can be merged"
                )
            seen[entry] = cache.folder
    failures, rows = [], 0
    for cache in caches:
        failures += [
            {**failure, "row": row + rows}
            for row, failure in sorted(read_failures(cache.folder).items())
        ]
        rows += cache.metadata["list_count"]
    ids = "".join(f"{name}\t{view}\n" for name, view in seen).encode()
    kept = (
        "format_version",
        "teacher",
        "view",
        "view_hash",
        "views",
        "patch",
        "tubelet",
        "dtype",
        "batch_size",
        "latent_shape",
        "patch_shape",
        "clips",
        "clips_from",
    )
    plan = {name: first[name] for name in kept}
    if first["teacher"]:  # no more than is known of all
        plan["teacher"] = {
            field: value
            for field, value in first["teacher"].items()
            if all(field in cache.teacher for cache in caches)
        }
    plan |= {
        "split": "+".join(
            dict.fromkeys(part for cache in caches for part in cache.metadata["split"].split("+"))
        ),
        "list_count": rows,
        "list_sha256": list_digest(
            whole_list(seen, {failure["row"]: failure for failure in failures}, rows)
        ),
        "merged_from": [cache.folder.name for cache in caches],
    }
    if (out / "metadata.json").is_file():
        raise InputError(f"{out} is a cache already; delete it to merge again")
    writer = Writer(out, plan)
    writer.lock()
    jobs = [
        (cache.folder / shard_name(kind, number), kind, shard[kind])
        for cache in caches
        for number, shard in enumerate(cache.metadata["shards"])
        for kind in cache.formats
    ]
    to_copy = sum(
        entry["bytes"] for source, _, entry in jobs if source.stat().st_dev != out.stat().st_dev
    )
    if to_copy > shutil.disk_usage(out).free:
        raise InputError(
            f"{out} is on another disk, so {to_copy / 1e9:.1f} GB must be copied, and it has"
            f" {shutil.disk_usage(out).free / 1e9:.1f} GB free"
        )
    # numbers: of the next shard
    shards = [shard for cache in caches for shard in cache.metadata["shards"]]
    numbers = dict.fromkeys(caches[0].formats, 0)
    for source, kind, entry in progress(jobs):
        place(source.resolve(), out / shard_name(kind, numbers[kind]), entry["sha256"])
        numbers[kind] += 1

    def write_stats(shards):
        content = io.BytesIO()
        wide = (
            (
                part["count"],
                part["mean"].astype(np.float64),
                part["variance"].astype(np.float64),
            )
            for part in stats
        )
        np.savez(
            content,
            **join_statistics((count, mean, variance * count) for count, mean, variance in wide),
        )
        write_whole(out / "stats.npz", content.getvalue())

    marks, sources = (
        np.concatenate([getattr(cache, name) for cache in caches])
        for name in ("fingerprints", "sources")
    )
    return writer.complete(ids, marks, sources, failures, shards, write_stats)


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
