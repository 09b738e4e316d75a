"""Speed of the data path:  python benchmarks/bench.py data [--videos DIR] [--folder
DIR_ON_THE_DISK_TO_MEASURE] [--json]

Decoding, on one thread: a clip under the default view, from the file to patches in a batch, against
decoding alone (every frame of the file with bare PyAV), against the same with swscale in place of
csrc/frames.cpp, and against decord and torchcodec where they are installed, each with its own
resize to the same size. Then batches on 1, 2, ... threads.

Cached: what a training step asks for, the context rows of the patches and the target rows of the
latents of both mask families, out of a cache of random bytes of the default shape. Warm: the second
pass and later ones, against memcpy of as many bytes, in one run a clip, between memory as large as
the cache and the same buffers; and against numpy's fancy indexing into memory maps. Cold: the page
cache is asked to forget the files before each pass; against reading them from end to end in large
blocks, cold too, the better of through the page cache and around it (O_DIRECT).
"""

import gc
import glob
import itertools
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import bench
from salt import config
from salt.errors import InputError

# folder of videos to decode; none: made here, 427x240, 47 frames at 12 fps, VP9, textured and noisy
videos: str | None = None
made = 12  # videos made
# where the cache is written, and removed again; its disk is the one measured
folder = "out/bench"
# clips of the cache, 4.8 MB each; the working set should be over 1 GB
records = 512
# clips a shard in the warm comparison: many open files, as a larger cache has
shard_rows = 8
batch_size = 24  # clips a batch
threads = 1  # reading threads of the comparison with memcpy
most_threads = max(1, (os.cpu_count() or 1))  # of the table of clips a second
rounds = 6  # measurements of each competitor, of which the first is a warm-up
decode_rounds = 5  # likewise, of decoding
cold_rounds = 11  # likewise, of the disk, whose speed varies most
json: bool = False  # write OUT/data-PROCESSOR-DATE.json
out = "benchmarks"  # folder for it

_settings = config.apply(
    globals(),
    least={
        "made": 1,
        "records": 1,
        "shard_rows": 1,
        "batch_size": 1,
        "threads": 1,
        "most_threads": 1,
        "rounds": 3,
        "decode_rounds": 3,
        "cold_rounds": 3,
    },
)
if records < batch_size:
    raise InputError(f"--records {records} do not make a batch of {batch_size}")

import av  # after the settings, so that --help is quick
import numpy as np
import torch
import torch.nn.functional as F

from salt import cache, ops, scaling, views
from salt.clips import Records, Videos
from salt.folders import VIDEO_SUFFIXES, find_videos
from salt.lists import Row
from salt.loader import CONTEXT, TARGET, Loader
from salt.masks import in_order, sample_masks, shuffled
from salt.video import read_clip
from salt.views import View, frame_numbers

VIEW = View()
PATCH = 16
TUBELET = 2
N = 1568
P = 1536
D = 768
torch.set_num_threads(1)
results = {}


def made_video(path, number):
    """A camera moves over a texture; noise costs the codec what hand-held video costs it."""
    random = np.random.default_rng(number)
    texture = np.kron(random.integers(0, 256, (60, 100, 3)), np.ones((8, 8, 1)))  # [480, 800, 3]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libvpx-vp9", rate=12, options={"deadline": "realtime", "cpu-used": "8"}
        )
        stream.width = 427
        stream.height = 240
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 600_000
        for i in range(47):
            x, y = int(60 + 50 * np.sin(i / 9 + number)), int(60 + 40 * np.cos(i / 7 + number))
            noisy = texture[y : y + 240, x : x + 427] + random.normal(0, 6, (240, 427, 1))
            frame = av.VideoFrame.from_ndarray(
                np.clip(noisy, 0, 255).astype(np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = i, Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ----------------------------------------------------------------------------------------- decoding


def bare(path):
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


place = np.empty((N, P), np.uint8)


def ours(path):
    ops.patchify_into(read_clip(path, VIEW), place, PATCH, TUBELET)


def through_swscale(path):
    """As `ours`, where csrc/frames.cpp does not do swscale's work."""
    patience, scaling.PATIENCE = scaling.PATIENCE, sys.maxsize
    ours(path)
    scaling.PATIENCE = patience


def middle(frames):
    """uint8 [T, H, W, 3] -> patches of the middle 224x224."""
    y, x = (frames.shape[1] - 224) // 2, (frames.shape[2] - 224) // 2
    return np.ascontiguousarray(ops.patchify(frames[:, y : y + 224, x : x + 224]))


def with_decord(path):
    # its size first, to resize the short side to 224
    reader = decord.VideoReader(path, num_threads=1)
    height, width = reader[0].shape[:2]
    reader = decord.VideoReader(
        path,
        num_threads=1,
        width=round(width * 224 / min(height, width)),
        height=round(height * 224 / min(height, width)),
    )
    return middle(reader.get_batch(frame_numbers(len(reader), VIEW)).asnumpy())


def with_torchcodec(path):
    decoder = torchcodec.decoders.VideoDecoder(path, num_ffmpeg_threads=1)
    # [T, 3, H, W]
    frames = decoder.get_frames_at(
        frame_numbers(decoder.metadata.num_frames, VIEW).tolist()
    ).data.float()
    scale = 224 / min(frames.shape[2:])
    resized = F.interpolate(
        frames, [round(side * scale) for side in frames.shape[2:]], mode="bilinear", antialias=True
    )
    return middle(resized.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


rivals = {"bare decode": bare, "ours": ours, "by swscale": through_swscale}
try:
    import decord

    rivals["decord"] = with_decord
except ImportError:
    print("decord is not installed; pip install decord to have it measured too")
try:
    import torchcodec

    rivals["torchcodec"] = with_torchcodec
except (ImportError, RuntimeError, OSError):  # it looks for FFmpeg's libraries when imported
    print(
        "torchcodec is not installed, or finds no FFmpeg; pip install torchcodec, with FFmpeg's"
        " shared libraries, to have it measured too"
    )


def bench_decoding(paths):
    def mean_ms(call):
        return lambda turn: statistics.fmean(
            1e3 * bench.seconds(lambda path=path: call(path)) for path in paths
        )

    times = bench.take_turns({name: mean_ms(call) for name, call in rivals.items()}, decode_rounds)
    with av.open(paths[0]) as container:
        stream = container.streams.video[0]
        kind = f"{stream.codec_context.name} {stream.width}x{stream.height}"
    print(
        f"decoding {len(paths)} videos ({kind},"
        f" {statistics.fmean(map(os.path.getsize, paths)) / 1e3:.0f} kB a video), one thread, ms a"
        " clip"
    )
    for name, (low, median, high) in times.items():
        print(
            f"  {name:12} {median:7.2f} [{low:.2f}, {high:.2f}] "
            f" {median / times['bare decode'][1]:.2f}x bare decode",
            flush=True,
        )
    results["decode"] = {
        "videos": len(paths),
        "kind": kind,
        "ms_per_clip": times,
        "x_bare": {name: values[1] / times["bare decode"][1] for name, values in times.items()},
    }

    rows = [
        Row(f"{i}", paths[i % len(paths)], None) for i in range(max(len(paths), 4 * batch_size))
    ]
    source = Videos(rows, VIEW, PATCH, TUBELET)

    def clips_per_second(count):
        def measure(turn):
            taken = bench.seconds(
                lambda: sum(
                    len(batch.ids)
                    for batch in Loader(
                        source,
                        in_order(range(len(rows)), batch_size),
                        ["short", "long"],
                        threads=count,
                    )
                )
            )
            return len(rows) / taken

        return measure

    counts = sorted({1, 2, most_threads} | {2**i for i in range(10) if 2**i <= most_threads})
    speed = bench.take_turns(
        {count: clips_per_second(count) for count in counts if count <= most_threads}, decode_rounds
    )
    for count, (_, median, _) in speed.items():
        print(
            f"  batches of {batch_size}, {count} threads: {median:7.1f} clips/s,"
            f" {median / speed[1][1]:.2f}x one thread",
            flush=True,
        )
    results["decode_threads"] = speed
    return {count: values[1] for count, values in speed.items()}


# ------------------------------------------------------------------------------------------- cached


def training(opened, steps, count):
    """Batches as train.py asks for them."""
    return Loader(
        Records(opened),
        shuffled(len(opened), batch_size, 0, steps),
        ["short", "long"],
        0,
        patches=CONTEXT,
        latents=TARGET,
        threads=count,
    )


def needed(batch):
    """(rows of patches, rows of latents) that a batch's masks ask for, each once: [B] both."""

    def union(part):
        wanted = torch.zeros(len(batch.ids), N, dtype=torch.bool)
        for drawn in batch.masks:
            wanted.scatter_(1, getattr(drawn, part), True)
        return wanted.sum(1)

    return union("context"), union("target")


def resident():
    """Bytes of this process's own memory: without the files it has mapped."""
    return sum(
        int(line.split()[1]) << 10
        for line in open("/proc/self/status")
        if line.startswith(("RssAnon", "RssShmem"))
    )


class Running:
    """An endless stream of training batches. Each measurement first takes those that lie ready."""

    def __init__(self, opened, count):
        self.stream = training(opened, itertools.count(), count)
        self.steps = len(opened) // batch_size

    def epoch_seconds(self, turn):
        for _ in range(4):
            next(self.stream)
        taken = bench.seconds(lambda: [next(self.stream) and None for _ in range(self.steps)])
        # the batches that are prepared ahead now are not to run into the next competitor's time
        time.sleep(0.1)
        return taken


def bench_warm(opened):
    steps = len(opened) // batch_size
    rows = [needed(batch) for batch in training(opened, range(steps), 1)]  # the first pass
    patch_rows, latent_rows = (torch.cat([pair[i] for pair in rows]).tolist() for i in (0, 1))
    stored = opened.formats["latents"][1].itemsize * D
    total = sum(patch_rows) * P + sum(latent_rows) * stored
    memory = np.ones((len(opened), N * (P + stored)), np.uint8)  # as large as the cache
    buffers = np.ones((batch_size, N * (P + stored)), np.uint8)
    order = np.concatenate(
        [records for _, records in shuffled(len(opened), batch_size, 0, range(steps))]
    )

    def memcpy(turn):
        def run():
            for i, record in enumerate(order):
                size = patch_rows[i] * P + latent_rows[i] * stored
                np.copyto(buffers[i % batch_size, :size], memory[record, :size])

        return bench.seconds(run)

    maps = {
        kind: [
            np.load(path, mmap_mode="r")
            for path in sorted(glob.glob(str(opened.folder / f"{kind}-*.npy")))
        ]
        for kind in ("patches", "latents")
    }
    firsts = opened.first_rows

    def numpy_maps(turn):
        """The plain way: memory maps, fancy indexing, np.stack."""

        def run():
            for _, records in shuffled(len(opened), batch_size, 0, range(steps)):
                ids = torch.tensor([views.sample_id(opened.ids[int(record)]) for record in records])
                masks = [sample_masks(ids, 0, 0, family) for family in ("short", "long")]
                for kind, part in (("patches", "context"), ("latents", "target")):
                    shards = np.searchsorted(firsts, records, side="right") - 1
                    for drawn in masks:
                        np.stack(
                            [
                                maps[kind][shard][record - firsts[shard]][index]
                                for shard, record, index in zip(
                                    shards, records, getattr(drawn, part).numpy()
                                )
                            ]
                        )

        return bench.seconds(run)

    before = resident()
    measures = {"ours": Running(opened, threads).epoch_seconds, "memcpy": memcpy}
    if stored == 2 * D:
        measures["numpy maps"] = numpy_maps
    times = bench.take_turns(measures, rounds)
    grown = resident() - before
    rate = {name: total / values[1] / 1e9 for name, values in times.items()}
    clips = steps * batch_size
    name = opened.metadata["dtype"]
    print(
        f"cached, {name} latents, warm: {len(opened)} records,"
        f" {sum(file.stat().st_size for file in opened.folder.iterdir()) / 1e9:.2f} GB;"
        f" {total / clips / 1e6:.2f} MB a clip needed, {threads} thread(s)"
    )
    print(
        f"  ours   {rate['ours']:6.2f} GB/s = {rate['ours'] / rate['memcpy']:.0%} of memcpy's"
        f" {rate['memcpy']:.2f}; {clips / times['ours'][1]:.0f} clips/s"
        + (
            f"; numpy maps {times['numpy maps'][1] / times['ours'][1]:.1f}x slower"
            if "numpy maps" in times
            else ""
        )
        + f"; memory grew by {grown / 1e6:.0f} MB",
        flush=True,
    )
    streams = {count: Running(opened, count) for count in range(1, most_threads + 1)}
    speed = bench.take_turns(
        {
            count: lambda turn, stream=stream: clips / stream.epoch_seconds(turn)
            for count, stream in streams.items()
        },
        rounds,
    )
    for count, (low, median, high) in speed.items():
        print(f"  {count} threads: {median:7.0f} clips/s [{low:.0f}, {high:.0f}]", flush=True)
    results[f"warm_{name}"] = {
        "records": len(opened),
        "bytes_needed_per_clip": total / clips,
        "seconds": times,
        "GB_per_s": rate,
        "share_of_memcpy": rate["ours"] / rate["memcpy"],
        "clips_per_s": {count: values for count, values in speed.items()},
        "memory_grown_bytes": grown,
    }
    return {count: values[1] for count, values in speed.items()}


def forget(paths):
    gc.collect()  # a page that is mapped is not forgotten
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_cold(where):
    paths = sorted(str(path) for path in Path(where).glob("*.npy"))
    total = sum(os.path.getsize(path) for path in paths)
    block = mmap.mmap(-1, 16 << 20)  # page-aligned, as O_DIRECT wants it

    def through(flags, advise):
        def measure(turn):
            forget(paths)

            def run():
                for path in paths:
                    file = os.open(path, os.O_RDONLY | flags)
                    if advise:
                        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while os.readv(file, [block]) == len(block):
                        pass
                    os.close(file)

            return total / bench.seconds(run) / 1e9

        return measure

    def ours(turn):
        forget(paths)
        opened = cache.open_cache(where)
        steps = len(opened) // batch_size
        return (
            steps
            * batch_size
            * N
            * (P + opened.formats["latents"][1].itemsize * D)
            / bench.seconds(
                lambda: sum(
                    1 for _ in training(opened, range(turn * steps, (turn + 1) * steps), threads)
                )
            )
            / 1e9
        )

    measures = {"ours": ours, "sequential": through(0, True)}
    try:
        through(os.O_DIRECT, False)(0)
        measures["sequential, direct"] = through(os.O_DIRECT, False)
    except (AttributeError, OSError):  # this file system has no direct reads
        pass
    rate = bench.take_turns(measures, cold_rounds)
    best = max(values[1] for name, values in rate.items() if name != "ours")
    print(
        "cached, cold (whole records): "
        + "; ".join(
            f"{name} {median:.2f} GB/s [{low:.2f}, {high:.2f}]"
            for name, (low, median, high) in rate.items()
        )
        + f"; ours = {rate['ours'][1] / best:.0%} of the better",
        flush=True,
    )
    results["cold"] = {"GB_per_s": rate, "share_of_sequential": rate["ours"][1] / best}


found = bench.machine()
print(
    "to reach: decoding <= 1.15x bare decode, two threads >= 1.8x one; cached and warm >= 70 % of"
    " memcpy, and >= 20x decoding in clips/s on the same cores; cold >= 85 % of the disk's"
    " sequential bandwidth",
    flush=True,
)
Path(folder).mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory(dir=folder, prefix="data-") as temporary:
    if videos:
        paths = sorted(path for path in find_videos(videos).values())
        if not paths:
            raise InputError(f"--videos {videos} holds no video ({' '.join(VIDEO_SUFFIXES)})")
    else:
        paths = [f"{temporary}/{number}.webm" for number in range(made)]
        for number, path in enumerate(paths):
            made_video(path, number)
    decoded = bench_decoding(paths)
    if shutil.disk_usage(temporary).free < records * N * (P + 2 * D):
        raise InputError(
            f"{folder} has no room for a cache of {records} records of 4.8 MB; give another"
            " --folder or fewer --records"
        )
    where = Path(temporary) / "cache"
    bench.random_cache(where, records)
    bench_cold(where)
    shutil.rmtree(where)
    for dtype in ("float16", "int8"):
        bench.random_cache(where, records, dtype, shard_rows)
        # so that the first pass reads them from the disk, and the second is a second epoch
        forget(map(str, where.glob("*.npy")))
        cached = bench_warm(cache.open_cache(where))
        shutil.rmtree(where)
        over = results[f"cached_over_decoded_{dtype}"] = {
            count: cached[count] / decoded[count] for count in cached if count in decoded
        }
        print(
            "  over decoding: "
            + ", ".join(f"{ratio:.0f}x with {count} thread(s)" for count, ratio in over.items()),
            flush=True,
        )
if json:
    bench.write("data", out, found, _settings, results)
