"""Making a latent cache: shard by shard, whole or not at all. salt/cache.py says what is in one."""

import fcntl
import hashlib
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np

from salt import shards
from salt.cache_format import (
    FORMAT_VERSION,
    agree_on,
    metadata_digest,
    read_metadata,
    row_formats,
    shard_name,
    shard_names,
    sources_of,
)
from salt.errors import InputError
from salt.files import sha256, write_whole
from salt.stored import Moments, from_stored, join_statistics, load_moments


def list_digest(ids):
    """SHA-256 over (video id, view number) of every row of a list."""
    digest = hashlib.sha256()
    for name, view in ids:
        digest.update(f"{name}\t{view}\n".encode())
    return digest.hexdigest()


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
        self.folder = Path(folder)
        self.partial = Path(folder) / "partial"
        self.progress = progress
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
        return -(-self.plan["list_count"] // shards.SHARD_ROWS)

    def rows(self, number):
        """Rows of the list that a shard is made of."""
        return shards.shard_rows(number, self.plan["list_count"])

    def part(self, kind, number):
        """Where partial/ keeps what a shard adds ('shard'), its moments ('stats'), or what it must
        hold again ('held').
        """
        return self.partial / f"{kind}-{number:05d}.{'npz' if kind == 'stats' else 'json'}"

    def missing(self):
        """Numbers of the shards still to make."""
        numbers = () if self.finished else range(self.shard_count)
        return [number for number in numbers if not self.part("shard", number).is_file()]

    def made(self):
        """[(row of the list, source_mark)] of the records that are made already; none of a finished
        cache that is damaged.
        """
        if self.finished:
            try:
                sources = sources_of(self.folder, read_metadata(self.folder))
                lost = {
                    json.loads(line)["row"]
                    for line in (self.folder / "failures.jsonl").read_text().splitlines()
                }
            except (InputError, OSError, ValueError, KeyError, TypeError):
                return []
            return list(
                zip((row for row in range(self.plan["list_count"]) if row not in lost), sources)
            )
        found = []
        for number in set(range(self.shard_count)) - set(self.missing()):
            shard = json.loads(self.part("shard", number).read_text())
            lost = {failure["row"] for failure in shard["failures"]}
            kept = (row for row in self.rows(number) if row not in lost)
            found += zip(kept, shard.get("sources", ()))
        return found

    def shard(self, number):
        return shards.ShardWriter(self, number)

    def finish(self):
        """Join what the shards left in partial/ into ids.txt, stats.npz, failures.jsonl and, last,
        metadata.json.

        Raises InputError where no video could be decoded, or a shard's file is gone or cut short.
        """
        done = [json.loads(self.part("shard", k).read_text()) for k in range(self.shard_count)]
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
            number for number in range(len(shards)) if not self.part("stats", number).is_file()
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
            moments.save(self.part("stats", number))
        content = io.BytesIO()
        np.savez(
            content,
            **join_statistics(
                load_moments(self.part("stats", number)) for number in range(self.shard_count)
            ),
        )
        write_whole(path, content.getvalue())


def brief(value, other):
    """A plan's value for a message: of two dicts only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: entry for name, entry in value.items() if other.get(name) != entry}
    return str(value)[:100]
