"""Preparing the repair of a cache: which of its shards are to be made again, and what they held."""

import json

import numpy as np

from salt import shards
from salt.cache_format import Ids, fingerprint, read_metadata, row_formats, shard_name, sources_of
from salt.errors import InputError
from salt.files import sha256, write_whole
from salt.upkeep import CHANGED, OTHER_CLIPS, checksums, read_failures, remedy, verify


def reopen(writer, ids, readable=lambda row: False):
    """Prepare a repair: find what is broken in the writer's cache, and have the writer miss just
    that.

    ids       [(video id, view number)] of every row of the list
    readable  whether a row that the cache left out could be had now; its shard is then made again
    Returns the problems, a line each. Nothing is taken away here: while the repair is under way,
    and where it cannot be done, the cache is what it was, but for the shards that were replaced.
    Call writer.lock() first.
    """
    if not writer.finished:
        return reopen_begun(writer)
    folder, partial = writer.folder, writer.partial
    metadata = read_metadata(folder)
    problems, bad = repairable(writer, metadata)
    failures = failures_of(folder, metadata, ids)
    back = [row for row in failures if row // shards.SHARD_ROWS not in bad and readable(row)]
    problems += [
        f"the video {ids[row][0]!r}, which was left out, can be decoded now" for row in back
    ]
    bad = sorted({*bad, *(row // shards.SHARD_ROWS for row in back)})
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
        rows = shards.shard_rows(number, len(ids))
        held = [kept[row] for row in rows if row in kept]
        known = None if marks is None else marks[done : done + len(held)]
        cut_from = sources[done : done + len(held)]
        done += len(held)
        if number in bad:
            write_held(writer, number, held, known or [None] * len(held))
            continue
        entry = {
            "ids": held,
            "failures": [failures[row] for row in rows if row in failures],
            "files": {kind: shard[kind] for kind in row_formats(metadata)},
            "fingerprints": known,
            "sources": cut_from,
        }
        entry |= {"lost": shard["lost"]} if "lost" in shard else {}
        write_whole(writer.part("shard", number), json.dumps(entry).encode())
    # last: from here on a repair is under way
    write_whole(partial / "before.json", json.dumps(metadata).encode())
    return problems


def reopen_begun(writer):
    """The same of a cache that is begun, or under repair: the shards that count as done are looked
    at.
    """
    done = {
        number: json.loads(writer.part("shard", number).read_text())
        for number in sorted(set(range(writer.shard_count)) - set(writer.missing()))
    }
    jobs = [
        (number, writer.folder / shard_name(kind, number), entry["sha256"])
        for number, shard in done.items()
        for kind, entry in shard["files"].items()
    ]
    found = [(number, problem) for number, problem in checksums(jobs, writer.progress) if problem]
    for number in {number for number, _ in found}:
        write_held(writer, number, done[number]["ids"], done[number]["fingerprints"])
        writer.part("shard", number).unlink()
    return [problem for _, problem in found]


def write_held(writer, number, ids, marks):
    """Note what a shard must hold again: ids [(video id, view)] and their fingerprints."""
    entries = [[*entry, mark] for entry, mark in zip(ids, marks)]
    write_whole(writer.part("held", number), json.dumps(entries).encode())


def repairable(writer, metadata):
    """upkeep.verify of a finished cache. Raises InputError on what no repair can mend."""
    folder, clips_from = writer.folder, metadata["clips_from"]
    if "merged_from" in metadata:
        raise InputError(
            f"{folder} was merged from {', '.join(metadata['merged_from'])}; {remedy(folder, ())}"
        )
    problems, bad = verify(folder, writer.progress)
    if any(problem.startswith((CHANGED, OTHER_CLIPS)) for problem in problems):
        raise InputError(f"{folder}: {problems[0]}; {remedy(folder, problems)}")
    if clips_from and any(problem.startswith(f"{clips_from}: ") for problem in problems):
        raise InputError(
            f"{folder} uses the clips of {clips_from}, which are broken; repair those first"
        )
    return problems, bad


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
