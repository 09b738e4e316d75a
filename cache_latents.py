"""Run the teacher over the videos once, and keep its latents.

    python cache_latents.py --data DIR --split train --teacher DIR_OR_CKPT --out CACHE
    torchrun --nproc_per_node 4 cache_latents.py ...        each rank makes every 4th shard

    python cache_latents.py --verify CACHE          check every byte; add --repair to the first
                                                    command to rebuild what is broken
    python cache_latents.py --merge A B --out C     join caches of one view and one teacher

Interrupt it when you like: the same command continues at the next shard, and the result is the same
to the bit.
"""

import itertools
import json
import os
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Literal

from salt import config, errors, given_paths
from salt.errors import InputError, VideoError

# ----------------------------------------------------------------------------------------- settings
data: str | None = None  # data folder (or CSV file): videos and their lists
split = "train"  # which list: train, validation or test
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
cameras: list[str] = []  # of a LeRobot data set: names, or their last parts [all]
window_seconds: float | None = None  # of a LeRobot data set: longer episodes become several rows
# a folder in transformers format or its name on the hub, a VideoMAE .pth, a V-JEPA 2 .pt, a
# checkpoint of train.py, file.py:function (salt/user_teacher.py), or none: clips alone, for stage 1
teacher = ""
# layers whose outputs are the latents, side by side: -1 the teacher's own, -9 that of the eighth
# block before the last, layer-normed
teacher_layers: list[int] = [-1]
# image models: a token is the mean of a tubelet's frames, or its last one's
teacher_frames: Literal["mean", "last"] = "mean"
# layer-norm what the teacher gives, for one without a final norm
teacher_norm: bool = False
out: str | None = None  # the cache to make, or to continue
# keep the clips too, so that training decodes no video; auto: where the disk has room
clips: Literal["auto", "on", "off"] = "auto"
clips_from: str | None = None  # another cache: use its clips and ids instead of --data
# how latents are kept; i8 takes half the disk, a scale a clip and channel
latents: Literal["f16", "i8"] = "f16"
limit: int | None = None  # only the first so many rows of the list
# clips a video: the plain one, then others with jittered crop and time
views: int = 1
frames: int | None = None  # frames a clip (default: the teacher's, else 16)
resolution: int | None = None  # pixels of the clip's side (default: the teacher's, else 224)
# clips of students, where not the teacher's: latents are averaged onto their grid by area
student_resolution: int | None = None
patch: int | None = None  # pixels of a patch's side, of students (default: the teacher's, else 16)
# frames spread over the whole video, or every stride-th about the middle (default: the teacher's,
# else uniform)
sampling: Literal["uniform", "stride"] | None = None
stride: int | None = None  # for --sampling stride (default: the teacher's, else 4)
# the middle square, or the whole frame made square (default: the teacher's, else center)
crop: Literal["center", "squash"] | None = None
# how frames are resized (default: the teacher's, else bilinear)
interpolation: Literal["bilinear", "bicubic", "area"] | None = None
longest_seconds = 60.0  # warn of a clip that spans more seconds: its frames lie far apart
# clips a teacher batch; fixed row ranges of the list, so part of the cache's identity
batch_size: int = 8
# decoding threads [all cores, shared by a machine's ranks]
threads = max(1, (os.cpu_count() or 1) // config.local_ranks())
# the teacher's compute, part of its identity; bf16 costs 1e-4 of the latents' variance
# (docs/DATA.md)
dtype: Literal["bf16", "fp32"] = "bf16"
device = "auto"  # auto, cpu, cuda or cuda:1
# instead: check every byte of this cache against its checksums; with --data, every video against
# its clips
verify: str | None = None
repair: bool = False  # check the cache at --out first, and rebuild what is broken in it
# instead: join these caches of one view and teacher into --out; files are linked where they can be
merge: list[str] = []
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    least=dict.fromkeys(
        "batch_size threads limit views frames resolution student_resolution patch stride".split(),
        1,
    ),
)
given_paths.check(
    data=data,
    cache=[path for path in (clips_from, verify, *merge) if path],
    teacher=None if teacher.lower() == "none" else teacher,
)

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
import torch
from tqdm import tqdm

from benchmarks import budget
from salt import cache_merge, cache_repair, caching, extension, ranks, upkeep
from salt.cache import open_cache
from salt.cache_format import shard_names
from salt.cache_writer import Writer, begun_plan
from salt.loader import prefetch
from salt.odd_videos import odd_videos
from salt.ranks import rank, world
from salt.shards import SHARD_ROWS
from salt.stored import from_stored, to_stored


def bar(items, unit="file"):
    return tqdm(items, unit=unit, dynamic_ncols=True)


# ---- instead of making one: check a cache, or join several
if verify:
    of_rows = {"data", "splits_dir", "cameras", "window_seconds"}
    config.refuse_others("--verify only looks", {"verify", "threads", *of_rows})
    sys.exit(upkeep.report(verify, settings, bar))
if merge:
    if out is None or len(merge) < 2:
        raise InputError("--merge takes two caches or more, and --out the one to make")
    config.refuse_others("--merge joins caches as they are", {"merge", "out"})
    metadata = cache_merge.merge(merge, out, bar)
    made_of = f"{metadata['count']} records of {len(merge)} caches"
    print(f"{out}: {made_of}, {metadata['failures']} failures")
    sys.exit(0)

# ---- what is worked on
caching.refuse(settings)
log = print if rank == 0 else lambda *line, **how: None
# ranks wait for the slowest one's last shard
place = ranks.pick_device(ranks.start(device, timedelta(days=7)))
log(extension.describe(place), flush=True)
odd_videos.watch(longest_seconds, tqdm.write)
work = caching.Work(settings, place, log)
encoder, ids = work.encoder, work.ids
slow = encoder and budget.slow_bf16(place, encoder.identity["compute"])
if slow:
    log(slow)


# ---- what is decided once, by rank 0: whether clips are kept, whether the disk has room, which
# shards are to be made
def decide():
    """(whether clips are kept, numbers of the shards to make or None where the cache is whole)."""
    begun, at = begun_plan(out), os.path.abspath(str(out))
    while not os.path.exists(at):
        at = os.path.dirname(at)
    free = shutil.disk_usage(at).free
    keep_clips = work.keeps_clips(begun, free)
    where = "kept" if keep_clips else "left out, training will decode the videos"
    log(f"clips: {f'those of {clips_from}' if work.source else where}")
    if not begun:
        work.check_disk_space(len(ids), keep_clips, free)
    writer = Writer(out, work.plan(keep_clips), bar)
    writers.append(writer)
    if repair or writer.partial.is_dir():
        writer.lock()
    if begun:
        work.check_sources(writer.made())
    if repair:
        problems = cache_repair.reopen(writer, ids, work.can_be_decoded)
        for problem in problems:
            log(f"{out}: {problem}")
        found = "every checksum, count and id fits; nothing to repair"
        log(f"{out}: {f'problems to repair: {len(problems)}' if problems else found}")
    writer.tidy()
    missing = None if writer.finished else writer.missing()
    if begun and missing:  # what is there is replaced, a shard a rank at a time
        there = [any((writer.folder / name).exists() for name in shard_names(k)) for k in missing]
        new = sum(len(work.rows_of(k)) for k, is_there in zip(missing, there) if not is_there)
        replaced = min(world, sum(there)) * min(SHARD_ROWS, len(ids))
        work.check_disk_space(new + replaced, keep_clips, free)
    return keep_clips, missing


writers = []  # rank 0's, whose lock lasts as long as it does
keep_clips, missing = ranks.from_rank_0(decide)
if missing is None:
    whole = open_cache(out)
    lost = whole.metadata["failures"]
    left = f"; {lost} were left out: --repair takes up those that can be decoded now"
    log(f"{out} is already whole: {len(whole)} records{left if lost else ''}")
    ranks.leave()

# ---- make the missing shards
writer = writers[0] if rank == 0 else Writer(out, work.plan(keep_clips))
errors.started = True  # each rank says its own from here on
if encoder:
    log(f"teacher {teacher}: {encoder.takes(work.view)}")
    if "config" not in writer.plan["teacher"]:
        log(
            f"{out} was begun by an older version, which did not note the shape of its teacher: it"
            " cannot be compared"
        )
log(
    f"teacher {teacher} on {place}; {len(ids)} rows in {writer.shard_count} shards, {len(missing)}"
    f" to make; view {work.view.hash()}",
    flush=True,
)
mine = missing[rank::world]


def groups():
    """Rows that are decoded together: the views of one video, as far as they lie in one shard."""
    for number in mine:
        for _, together in itertools.groupby(work.rows_of(number), lambda row: row // work.views):
            yield list(together)


def latents_of(clips, names):
    """(what a cache stores of a teacher batch; of each clip the squared error that int8 makes).

    clips: what the teacher is shown, as Work.clips_of has it; names: of their videos
    """
    made = work.latents_of(torch.from_numpy(np.stack(clips)).to(place))  # [b, N, D]
    stored = to_stored(made, writer.plan["dtype"], names)
    if latents == "f16":
        return stored, [0.0] * len(clips)
    error = torch.from_numpy(from_stored(stored)).to(place) - made
    return stored, error.double().square().sum((1, 2)).tolist()


def keep(shard, rows, clips, stored, lost):
    """Write one teacher batch, row by row."""
    done = 0
    for row, clip in zip(rows, clips):
        if isinstance(clip, VideoError):
            shard.fail(row, *ids[row], str(clip))
            continue
        its_latents = stored and {kind: array[done] for kind, array in stored.items()}
        shard.add(*ids[row], clip[0], its_latents, lost[done], work.source_of(row))
        done += 1


# Decoding, the teacher, writing, and flushing with its checksum each have threads of their own;
# this one sees to the teacher.
to_make = sum(len(work.rows_of(number)) for number in missing)
done_before = len(ids) - to_make if world == 1 else 0
progress = tqdm(
    total=sum(len(work.rows_of(number)) for number in mine) + done_before,
    initial=done_before,
    unit="clip",
    dynamic_ncols=True,
    disable=rank > 0,
    desc=f"rank 0 of {world}" if world > 1 else None,
)
ahead = max(threads, 2 * batch_size // work.views)
clips_in_order = itertools.chain.from_iterable(prefetch(work.clips_of, groups(), threads, ahead))
begin = time.perf_counter()
waited = 0.0
shard = None
finishing = None
with ThreadPoolExecutor(1) as keeper, ThreadPoolExecutor(1) as finisher:
    try:
        for number in mine:
            shard, writing = writer.shard(number), deque()
            # a teacher batch: these rows and no others, wherever a run began
            for start in work.rows_of(number)[::batch_size]:
                rows = range(start, min(start + batch_size, work.rows_of(number).stop))
                tick = time.perf_counter()
                batch = [next(clips_in_order) for _ in rows]
                waited += time.perf_counter() - tick
                good = [i for i, clip in enumerate(batch) if not isinstance(clip, VideoError)]
                stored, lost = None, [0.0] * len(good)
                if encoder and good:
                    names = [ids[rows[i]][0] for i in good]
                    stored, lost = latents_of([batch[i][1] for i in good], names)
                writing.append(keeper.submit(keep, shard, rows, batch, stored, lost))
                if len(writing) > 2:
                    writing.popleft().result()
                progress.update(len(rows))
                share = waited / (time.perf_counter() - begin)
                progress.set_postfix_str(f"waiting for video {share:.0%}", refresh=False)
            for job in writing:
                job.result()
            if finishing:
                finishing.result()
            finishing, shard = finisher.submit(shard.finish), None
        if finishing:
            finishing.result()
    finally:
        clips_in_order = None
        if shard:
            keeper.shutdown(cancel_futures=True)
            shard.discard()
progress.close()
taken = time.perf_counter() - begin
broken = set().union(*ranks.gather(odd_videos.broken))  # every shard is there

# ---- the end
if to_make:
    log(
        f"{to_make / (time.perf_counter() - begin):.1f} clips/s; rank 0 waited for video"
        f" {waited / taken:.0%} of its time"
    )
if rank == 0:
    metadata = writer.finish()
    size = sum(file.stat().st_size for file in writer.folder.iterdir()) / 1e9
    if "lost_variance" in metadata:
        log(
            f"{out}: int8 lost {metadata['lost_variance']:.1e} of the latents' variance about their"
            " per-position mean: a perfect prediction of what is kept has R2"
            f" {1 - metadata['lost_variance']:.6f} on the exact ones"
        )
    said = (
        f"{out}: {metadata['count']} records of {len(ids)} rows, {size:.2f} GB, latent_shape"
        f" {json.dumps(metadata['latent_shape'])}"
    )
    if metadata["failures"]:
        where = writer.folder / "failures.jsonl"
        said += f"; {metadata['failures']} records left out, see {where}"
    if broken:
        said += (
            f"; {len(broken)} videos end long before what they, or the list, say, have holes or are"
            " damaged"
        )
    log(said)
ranks.leave()
