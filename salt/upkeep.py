"""Keeping caches sound: checking every byte, preparing a repair, joining caches.

cache_latents.py --verify, --repair and --merge.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from salt import lerobot
from salt.cache import open_cache
from salt.cache_format import Ids, check_header, read_metadata, row_formats, same_clips, shard_name
from salt.cache_writer import list_digest
from salt.clips import Records
from salt.errors import InputError
from salt.files import sha256
from salt.loader import prefetch
from salt.shards import SHARD_ROWS
from salt.splits import load_split


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

    rows: of the list, lists.Row; progress wraps the records. Returns problems, a line each.
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


def report(folder, s, bar):
    """Print what is wrong with a cache, and what to do. Returns the exit code: 1 where anything is.

    s    cache_latents.py's settings; its data, where there is some, are compared with the clips
    bar  (items, unit) -> items, with progress
    """
    problems, bad = verify(folder, bar)
    todo = problems and remedy(folder, problems)
    if s.data and not problems:
        split = open_cache(folder).metadata["split"]
        rows = load_split(s.data, split, s.splits_dir, print, lerobot.asked(s))
        problems = verify_clips(folder, rows, s.threads, lambda records: bar(records, "clip"))
        todo = f"put back the videos that it was made from, or delete {folder} and make it again"
    for problem in problems:
        print(f"{folder}: {problem}")
    if bad:
        shards = ", ".join(map(str, bad))
        print(f"{folder}: to rebuild: shards {shards} ({SHARD_ROWS} rows of the list each)")
    found = "every checksum, count and id fits"
    print(f"{folder}: {f'problems: {len(problems)}; {todo}' if problems else found}")
    return 1 if problems else 0
