"""Caches of any size, simulated.

    python benchmarks/bench.py scale [--records 168913,10000000] [--json]

An index as cache_latents.py makes it, metadata.json, ids.txt and every shard, but with shards that
are sparse files: their headers and sizes are right, and they take no disk. A process of its own
opens it, makes the sampler and opens the shards of the first batch; time and the growth of its
memory are counted from after the imports. Then the whole order of one epoch is made, in pieces of
one batch's size times 1024.

Before that a table: what data sets take of disk, cores and GPUs, by arithmetic from the rates in
the settings. docs/SCALE.md discusses it.
"""

import json as json_format
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import bench
from salt import config
from salt.errors import InputError
from salt.files import sha256

records = [168_913, 10_000_000]  # cache sizes
folder = "out/bench"  # where the index is written, and removed again
rounds = 4  # measurements, of which the first is a warm-up
clips = [168_913, 2_000_000, 100_000_000]  # data sets of the table
epochs = 10  # passes of training in it
decode_ms = 63.0  # a clip from video, one core (bench.py data)
matrix_rate = 790.0  # dense bf16 TFLOP/s of one GPU; an H200 multiplying large matrices
# share of it that teacher and student reach: a goal, not a measurement
utilisation = 0.5
# MB a clip that both mask families look at, of latents in float16 and clips (bench.py data)
needed_mb = 2.60
json: bool = False  # write OUT/scale-cpu-DATE.json
out = "benchmarks"  # folder for it
inside: str | None = None  # (the process that is measured: the cache to open)

_settings = config.apply(globals(), least={"rounds": 3})

import numpy as np  # after the settings, so that --help is quick
import torch  # noqa: F401  its import is not what is measured

from salt import cache, cache_format
from salt.clips import Records
from salt.masks import mask_counts, permute, shuffled
from salt.shards import SHARD_ROWS, npy_header
from salt.views import View

if inside:

    def memory(which="VmHWM"):
        return next(
            int(line.split()[1]) << 10
            for line in open("/proc/self/status")
            if line.startswith(which)
        )

    before, start = memory("VmRSS"), time.perf_counter()
    opened = cache.open_cache(inside)
    source = Records(opened)
    opening = time.perf_counter() - start
    sampler = shuffled(len(source), 24, 0, range(10**9))
    _, first = next(sampler)
    names = [source.name(int(record)) for record in first]
    places = [opened.places(kind, first)[0] for kind in ("latents", "patches")]
    ready = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(0, len(source), 24 << 10):
        permute(np.arange(i, min(i + (24 << 10), len(source))), len(source), 0, 1)
    print(
        json_format.dumps(
            {
                "open_s": opening,
                "open_and_sampler_s": ready,
                "peak_growth_bytes": memory() - before,
                "own_growth_bytes": memory("RssAnon"),
                "epoch_order_s": time.perf_counter() - start,
                "first": names[0][0],
                "files_open": sum(map(len, places)),
            }
        )
    )
    sys.exit(0)

VIEW = View()
N = 1568
P = 1536
D = 768


def make_index(where, count):
    """A finished cache whose shards are holes."""
    where.mkdir()
    shards = []
    formats = {"latents": ((N, D), np.dtype(np.float16)), "patches": ((N, P), np.dtype(np.uint8))}
    for number in range(-(-count // SHARD_ROWS)):
        rows, entry = min(SHARD_ROWS, count - number * SHARD_ROWS), {}
        for kind, (shape, dtype) in formats.items():
            header = npy_header((rows, *shape), dtype)
            with open(where / cache_format.shard_name(kind, number), "wb") as file:
                file.write(header)
                file.truncate(len(header) + rows * cache.record_bytes(shape, dtype))
            entry[kind] = {
                "bytes": len(header) + rows * cache.record_bytes(shape, dtype),
                "sha256": "0" * 64,
            }
        shards.append({"rows": rows, **entry})
    np.savez(
        where / "stats.npz",
        mean=np.zeros((N, D), np.float32),
        variance=np.ones((N, D), np.float32),
        count=count,
    )
    np.save(
        where / "fingerprints.npy",
        np.random.default_rng(count).integers(-(2**63), 2**63 - 1, count),
    )
    (where / "ids.txt").write_text("".join(f"{i}\t0\n" for i in range(count)))
    teacher = {"name": "t", "sha256": "", "dim": D, "compute": "fp32"}
    teacher |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    metadata = {
        "format_version": cache_format.FORMAT_VERSION,
        **cache_format.plan_of(VIEW, "", count, teacher),
        "count": count,
        "failures": 0,
        "ids_sha256": sha256(where / "ids.txt"),
        "failures_sha256": "",
        "stats_sha256": sha256(where / "stats.npz"),
        "fingerprints_sha256": sha256(where / "fingerprints.npy"),
        "shards": shards,
    }
    metadata["checksum"] = cache_format.metadata_digest(metadata)
    (where / "metadata.json").write_text(json_format.dumps(metadata, indent=1))


def forward_flops(tokens, dim, blocks):
    """Of a ViT: 12 D^2 multiply-adds a token and block in its matrices (MLP 4x), 2 N D in
    attention.
    """
    return 2 * blocks * tokens * (12 * dim**2 + 2 * tokens * dim)


def print_table():
    """Bytes, core-hours and GPU-hours; ViT-B teacher, ViT-L student with a predictor of 12 blocks
    and width 512, masks short and long.
    """
    latents, patches = N * D * 2, N * P
    teacher = forward_flops(N, D, 12) + 2 * N * P * D
    step = 3 * sum(
        forward_flops(context, 1024, 24)
        + 2 * context * (P + 512) * 1024
        + forward_flops(context + target, 512, 12)
        + 2 * target * 512 * D
        for context, target in (mask_counts(family, (8, 14, 14)) for family in ("short", "long"))
    )
    speed = {
        name: utilisation * matrix_rate * 1e12 / flops
        for name, flops in (("teacher", teacher), ("student", step))
    }
    print(
        f"a clip: latents {latents / 1e6:.2f} MB float16, {(latents / 2 + 4 * (D + N)) / 1e6:.2f}"
        f" int8; pixels {patches / 1e6:.2f} MB; both, whole {(latents + patches) / 1e6:.2f}, looked"
        f" at {needed_mb:.2f}; teacher {teacher / 1e9:.0f} GFLOP, a training step {step / 1e9:.0f}"
    )
    print(
        f"one GPU at {utilisation:.0%} of {matrix_rate:.0f} TFLOP/s: teacher {speed['teacher']:.0f}"
        f" clips/s, training {speed['student']:.0f} clips/s, which reads"
        f" {speed['student'] * needed_mb / 1e3:.2f} GB/s from memory,"
        f" {speed['student'] * (latents + patches) / 1e9:.2f} GB/s from a disk; decoding for it"
        f" takes {speed['student'] * decode_ms / 1e3:.0f} cores, for the teacher"
        f" {speed['teacher'] * decode_ms / 1e3:.0f}"
    )
    print(
        f"{'clips':>12} {'latents TB f16':>15} {'i8':>7} {'pixels TB':>10} {'decoding core-h':>16}"
        f" {'teacher GPU-h':>14} {f'training GPU-h, {epochs} epochs':>27}"
    )
    for count in clips:
        print(
            f"{count:>12,} {count * latents / 1e12:15.2f}"
            f" {count * (latents / 2 + 4 * (D + N)) / 1e12:7.2f} {count * patches / 1e12:10.2f}"
            f" {count * decode_ms / 3.6e6:16.0f} {count / speed['teacher'] / 3600:14.1f}"
            f" {epochs * count / speed['student'] / 3600:27.1f}"
        )


print_table()
found, results = bench.machine(), []
print(
    "to reach: 168,913 records opened and a sampler made in < 1 s; 10,000,000 in < 5 s and < 1 GB"
    " more memory; their order < 1 s",
    flush=True,
)
Path(folder).mkdir(parents=True, exist_ok=True)
for count in records:
    with tempfile.TemporaryDirectory(dir=folder, prefix="scale-") as temporary:
        where = Path(temporary) / "cache"
        try:
            make_index(where, count)
        except OSError as error:  # holes take no blocks, but names and large sizes may be refused
            raise InputError(
                f"an index of {count} records cannot be made in {folder} ({error.strerror}); give"
                " another --folder"
            ) from None
        command = [sys.executable, str(Path(bench.__file__)), "scale", "--inside", str(where)]

        def measure(_):
            return json_format.loads(
                subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                ).stdout.splitlines()[-1]
            )

        runs = [measure(turn) for turn in range(rounds)][1:]
        middle = {
            name: sorted(run[name] for run in runs)[len(runs) // 2]
            for name in ("open_s", "open_and_sampler_s", "peak_growth_bytes", "epoch_order_s")
        }
        size = sum(file.stat().st_blocks * 512 for file in where.iterdir())
        metadata = (where / "metadata.json").stat().st_size
        print(
            f"{count:>10,} records, {-(-count // SHARD_ROWS):,} shards of each kind"
            f" ({size / 1e6:.0f} MB of disk here, metadata.json {metadata / 1e6:.1f} MB): opened in"
            f" {middle['open_s']:.2f} s, with sampler and first batch"
            f" {middle['open_and_sampler_s']:.2f} s; memory grew by at most"
            f" {middle['peak_growth_bytes'] / 1e6:.0f} MB; order of an epoch"
            f" {middle['epoch_order_s']:.2f} s",
            flush=True,
        )
        results.append({"records": count, **middle, "runs": runs})
if json:
    bench.write("scale", out, found, _settings, results)
