"""Run the teacher over the videos once, and keep its latents.

    python cache_latents.py --data DIR --split train --teacher DIR_OR_CKPT --out CACHE
    torchrun --nproc_per_node 4 cache_latents.py ...        each rank makes every 4th shard

    python cache_latents.py --verify CACHE          check every byte; add --repair to the first
                                                    command to rebuild what is broken
    python cache_latents.py --merge A B --out C     join caches of one view and one teacher

Interrupt it when you like: the same command continues at the next shard, and the result is the same
to the bit.
"""

import dataclasses
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

from salt import config, errors
from salt.errors import InputError

# ----------------------------------------------------------------------------------------- settings
data: str | None = None  # data folder (or CSV file): videos and their lists
split = "train"  # which list: train, validation or test
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
# VideoMAE folder or .pth, a checkpoint of train.py, or none: clips alone, for stage 1
teacher = ""
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
patch: int | None = None  # pixels of a patch's side (default: the teacher's, else 16)
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
config.apply(
    globals(),
    least={
        "batch_size": 1,
        "threads": 1,
        "limit": 1,
        "views": 1,
        "frames": 1,
        "resolution": 1,
        "patch": 1,
        "stride": 1,
    },
)
config.check_paths(
    data=data,
    cache=[path for path in (clips_from, verify, *merge) if path],
    teacher=None if teacher.lower() == "none" else teacher,
)

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
import torch
from tqdm import tqdm

import model
from benchmarks import budget
from salt import cache, cache_writer, ops, ranks, upkeep
from salt.cache_writer import Writer, begun_plan, from_stored, list_digest, to_stored
from salt.loader import prefetch
from salt.ranks import rank, world
from salt.splits import load_split
from salt.video import VideoError, odd_videos, read_row
from salt.views import View, grid_of


def files_bar(files):
    return tqdm(files, unit="file", dynamic_ncols=True)


if verify:
    unused = sorted(config.given - {"verify", "data", "splits_dir", "threads"})
    if unused:
        raise InputError(
            f"--verify only looks; leave {', '.join(f'--{name}' for name in unused)} out"
        )
    problems, bad = upkeep.verify(verify, files_bar)
    remedy = problems and upkeep.remedy(verify, problems)
    if data and not problems:
        rows = load_split(data, cache.open_cache(verify).metadata["split"], splits_dir, print)

        def clips_bar(records):
            return tqdm(records, unit="clip", dynamic_ncols=True)

        problems = upkeep.verify_clips(verify, rows, threads, clips_bar)
        remedy = f"put back the videos that it was made from, or delete {verify} and make it again"
    for problem in problems:
        print(f"{verify}: {problem}")
    if bad:
        print(
            f"{verify}: to rebuild: shards {', '.join(map(str, bad))}"
            f" ({cache_writer.SHARD_ROWS} rows of the list each)"
        )
    found = (
        f"problems: {len(problems)}; {remedy}" if problems else "every checksum, count and id fits"
    )
    print(f"{verify}: {found}")
    sys.exit(1 if problems else 0)
if merge:
    if out is None or len(merge) < 2:
        raise InputError("--merge takes two caches or more, and --out the one to make")
    unused = sorted(config.given - {"merge", "out"})
    if unused:
        raise InputError(
            "--merge joins caches as they are; leave"
            f" {', '.join(f'--{name}' for name in unused)} out"
        )
    metadata = upkeep.merge(merge, out, files_bar)
    print(
        f"{out}: {metadata['count']} records of {len(merge)} caches, {metadata['failures']}"
        " failures"
    )
    sys.exit(0)

log = print if rank == 0 else lambda *line, **how: None
if out is None or teacher == "" or (data is None and clips_from is None):
    raise InputError(
        "give --out, --teacher (or --teacher none) and --data (or --clips_from); see --help"
    )
# ranks wait for the slowest one's last shard
device = ranks.pick_device(ranks.start(device, timedelta(days=7)))
log(ops.extension_line(device), flush=True)
odd_videos.watch(longest_seconds, tqdm.write)

if clips == "off" and teacher.lower() == "none":
    raise InputError("--teacher none keeps nothing but clips; leave --clips off out")
if latents == "i8" and teacher.lower() == "none":
    raise InputError("--teacher none keeps no latents; leave --latents out")
of_clips = (
    "data",
    "frames",
    "resolution",
    "patch",
    "sampling",
    "stride",
    "crop",
    "interpolation",
    "limit",
)
shared = {"split", "views"} & config.given | {
    name for name in of_clips if globals()[name] is not None
}
if clips_from and (shared or clips == "on"):
    names = ", ".join(f"--{name}" for name in sorted(shared)) or "--clips on"
    raise InputError(f"--clips_from takes clips, ids and view from {clips_from}; leave {names} out")

# ---- the teacher, the view, the rows
encoder = None if teacher.lower() == "none" else model.load_teacher(teacher, device, dtype)
if encoder and (faster := budget.slow_bf16(device, dtype)):
    log(faster)
source = cache.open_cache(clips_from) if clips_from else None
shape = encoder.config if encoder else None
if source:
    view = source.view
    patch = source.patch
    tubelet = source.tubelet
else:
    size = resolution or (shape.size if shape else 224)
    view = View(frames or (shape.frames if shape else 16), size, size)
    if encoder:  # a checkpoint of train.py says how its clips were cut
        view = view.cut_as(encoder.view)
    asked = {"sampling": sampling, "stride": stride, "crop": crop, "interpolation": interpolation}
    view = dataclasses.replace(
        view, **{name: value for name, value in asked.items() if value is not None}
    )
    patch, tubelet = patch or (shape.patch if shape else 16), shape.tubelet if shape else 2
if shape:
    takes = {
        "frames": shape.frames,
        "resolution": shape.size,
        "patch": shape.patch,
        "tubelet": shape.tubelet,
    }
    have = {"frames": view.frames, "resolution": view.size, "patch": patch, "tubelet": tubelet}
    for name in takes:
        if takes[name] != have[name]:
            raise InputError(
                f"the teacher {teacher} takes {name} {takes[name]}, but the clips have"
                f" {have[name]}; change {'--clips_from' if source else f'--{name}'}"
            )
    line = encoder.other_view(view)
    if line:
        log(line)
tokens = int(torch.tensor(grid_of(view, patch, tubelet)).prod())
patch_dim = 3 * tubelet * patch * patch

if source:
    ids, views = [source.ids.fields(row) for row in range(len(source))], source.metadata["views"]
    if not source.has_patches:
        raise InputError(
            f"the cache {clips_from} holds no clips (--clips off) to take; give --data instead"
        )
else:
    videos = load_split(data, split, splits_dir, log)[:limit]
    # a video's views lie side by side, and are cut from one decode
    ids = [(video.id, number) for video in videos for number in range(views)]

# ---- what is decided once, by rank 0: whether clips are kept, whether the disk has room, which
# shards are to be made
kept_bytes = {"f16": 2 * shape.dim, "i8": shape.dim}[latents] if encoder else 0
# a record
latent_bytes = tokens * kept_bytes + (
    4 * (shape.dim + tokens) if encoder and latents == "i8" else 0
)
clip_bytes = tokens * patch_dim


def rows_of(number):
    return range(
        number * cache_writer.SHARD_ROWS, min((number + 1) * cache_writer.SHARD_ROWS, len(ids))
    )


def clips_of(together):
    """[patches uint8 [N, P] or VideoError] of rows of one video."""
    if source:
        return [source.checked_patches(row) for row in together]
    video = videos[together[0] // views]
    try:
        cut = read_row(video, [dataclasses.replace(view, view=ids[row][1]) for row in together])
    except VideoError as error:
        return [error] * len(together)
    patches = [np.empty((tokens, patch_dim), np.uint8) for _ in cut]
    for clip, made in zip(cut, patches):
        ops.patchify_into(clip, made, patch, tubelet)
    return patches


def check_disk_space(rows, keep_clips, free):
    # of each shard, until the cache is whole
    statistics = -(-rows // cache_writer.SHARD_ROWS) * 8 * tokens * shape.dim if encoder else 0
    needed = rows * (latent_bytes + keep_clips * clip_bytes) + statistics
    log(
        f"disk: {needed / 1e9:.2f} GB needed ({rows * latent_bytes / 1e9:.2f} latents,"
        f" {rows * keep_clips * clip_bytes / 1e9:.2f} clips, {statistics / 1e9:.2f} while it is"
        f" being made), {free / 1e9:.1f} GB free"
    )
    if needed > free:
        raise InputError(
            f"{out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; free"
            " some, or try --latents i8, --clips off or --limit"
        )


def plan_with(keep_clips):
    return {
        "split": source.metadata["split"] if source else split,
        "list_count": len(ids),
        "list_sha256": list_digest(ids),
        "teacher": encoder and {"name": encoder.name, "dim": shape.dim, **encoder.identity},
        "view": view.to_dict(),
        "view_hash": view.hash(),
        "views": views,
        "patch": patch,
        "tubelet": tubelet,
        "dtype": {"f16": "float16", "i8": "int8"}[latents],
        "batch_size": batch_size,
        "latent_shape": [tokens, shape.dim] if shape else None,
        "patch_shape": [tokens, patch_dim],
        "clips": bool(keep_clips),
        "clips_from": (
            os.path.relpath(os.path.realpath(str(clips_from)), os.path.realpath(str(out)))
            if source
            else None
        ),
    }


def check_sources(made):
    """Raises InputError where a video was replaced, or its stretch changed, since its record was
    made. Files that are gone now tell nothing.
    """
    now = [cache.source_mark(video) for video in videos]
    changed = [row for row, mark in made if mark and now[row // views] not in (0, mark)]
    if changed:
        raise InputError(
            f"{out} holds {len(changed)} records of videos whose file has another size now, or"
            f" whose start and end were changed, {ids[changed[0]][0]!r} among them: bring back what"
            " they were made from, or delete the cache and make it again"
        )


def decide():
    """(whether clips are kept, numbers of the shards to make or None where the cache is whole)."""
    begun, at = begun_plan(out), os.path.abspath(str(out))
    while not os.path.exists(at):
        at = os.path.dirname(at)
    free = shutil.disk_usage(at).free
    if source or not shape:
        keep_clips = not source
    elif clips == "auto":
        keep_clips = (
            begun["clips"] if begun else len(ids) * (latent_bytes + clip_bytes) < 0.95 * free
        )
    else:
        keep_clips = clips == "on"
    if source:
        log(f"clips: those of {clips_from}")
    else:
        log(f"clips: {'kept' if keep_clips else 'left out, training will decode the videos'}")
    if not begun:
        check_disk_space(len(ids), keep_clips, free)
    writer = Writer(out, plan_with(keep_clips), files_bar)
    if repair or writer.partial.is_dir():
        writer.lock()
    if begun and not source:
        check_sources(writer.made())
    if repair:
        problems = upkeep.reopen(
            writer, ids, lambda row: not isinstance(clips_of([row])[0], VideoError)
        )
        for problem in problems:
            log(f"{out}: {problem}")
        log(
            f"{out}: problems to repair: {len(problems)}"
            if problems
            else f"{out}: every checksum, count and id fits; nothing to repair"
        )
    writer.tidy()
    missing = None if writer.finished else writer.missing()
    if begun and missing:  # what is there is replaced, a shard a rank at a time
        new = [
            number
            for number in missing
            if not any((writer.folder / name).exists() for name in cache.shard_names(number))
        ]
        replaced = min(world, len(missing) - len(new)) * min(cache_writer.SHARD_ROWS, len(ids))
        check_disk_space(sum(len(rows_of(number)) for number in new) + replaced, keep_clips, free)
    locks.append(writer)
    return keep_clips, missing


locks = []  # rank 0's Writer, whose lock lasts as long as it does
keep_clips, missing = ranks.first(decide)
if missing is None:
    whole = cache.open_cache(out)
    left = (
        f"; {whole.metadata['failures']} were left out: --repair takes up those that can be"
        " decoded now"
        if whole.metadata["failures"]
        else ""
    )
    log(f"{out} is already whole: {len(whole)} records{left}")
    ranks.leave()

# ---- make the missing shards
writer = locks[0] if rank == 0 else Writer(out, plan_with(keep_clips))
errors.started = True
to_make = sum(len(rows_of(number)) for number in missing)
if encoder:
    log(f"teacher {teacher}: {encoder.takes(view)}")
    if "config" not in writer.plan["teacher"]:
        log(
            f"{out} was begun by an older version, which did not note the shape of its teacher: it"
            " cannot be compared"
        )
log(
    f"teacher {teacher} on {device}; {len(ids)} rows in {writer.shard_count} shards, {len(missing)}"
    f" to make; view {view.hash()}",
    flush=True,
)
mine = missing[rank::world]


def groups():
    """Rows that are decoded together: the views of one video, as far as they lie in one shard."""
    for number in mine:
        for _, together in itertools.groupby(rows_of(number), lambda row: row // views):
            yield list(together)


def keep(shard, rows, clips, stored, lost):
    """Write one teacher batch, row by row."""
    done = 0
    for row, clip in zip(rows, clips):
        if isinstance(clip, VideoError):
            shard.fail(row, *ids[row], str(clip))
        else:
            shard.add(
                *ids[row],
                clip,
                stored and {kind: array[done] for kind, array in stored.items()},
                lost[done],
                0 if source else cache.source_mark(videos[row // views]),
            )
            done += 1


# Decoding, the teacher, writing, and flushing with its checksum each have threads of their own;
# this one sees to the teacher.
share = sum(len(rows_of(number)) for number in mine)
done_before = len(ids) - to_make if world == 1 else 0
bar = tqdm(
    total=share + done_before,
    initial=done_before,
    unit="clip",
    dynamic_ncols=True,
    disable=rank > 0,
    desc=f"rank 0 of {world}" if world > 1 else None,
)
stream = itertools.chain.from_iterable(
    prefetch(clips_of, groups(), threads, max(threads, 2 * batch_size // views))
)
begin = time.perf_counter()
waited = 0.0
shard = None
finishing = None
with ThreadPoolExecutor(1) as keeper, ThreadPoolExecutor(1) as finisher:
    try:
        for number in mine:
            shard, writing = writer.shard(number), deque()
            # a teacher batch: these rows and no others, wherever a run began
            for start in rows_of(number)[::batch_size]:
                rows = range(start, min(start + batch_size, rows_of(number).stop))
                tick = time.perf_counter()
                batch = [next(stream) for _ in rows]
                waited += time.perf_counter() - tick
                good = [clip for clip in batch if not isinstance(clip, VideoError)]
                stored, lost = None, [0.0] * len(good)
                if encoder and good:
                    # [b, N, D]
                    made = model.teacher_latents(
                        encoder, torch.from_numpy(np.stack(good)).to(device)
                    )
                    names = [
                        ids[row][0]
                        for row, clip in zip(rows, batch)
                        if not isinstance(clip, VideoError)
                    ]
                    stored = to_stored(made, writer.plan["dtype"], names)
                    if latents == "i8":
                        error = torch.from_numpy(from_stored(stored)).to(device) - made
                        lost = error.double().square().sum((1, 2)).tolist()
                writing.append(keeper.submit(keep, shard, rows, batch, stored, lost))
                if len(writing) > 2:
                    writing.popleft().result()
                bar.update(len(rows))
                bar.set_postfix_str(
                    f"waiting for video {waited / (time.perf_counter() - begin):.0%}", refresh=False
                )
            for job in writing:
                job.result()
            if finishing:
                finishing.result()
            finishing, shard = finisher.submit(shard.finish), None
        if finishing:
            finishing.result()
    finally:
        stream = None
        if shard:
            keeper.shutdown(cancel_futures=True)
            shard.discard()
bar.close()
taken = time.perf_counter() - begin
broken = set().union(*ranks.gather(odd_videos.broken))  # every shard is there
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
    log(
        f"{out}: {metadata['count']} records of {len(ids)} rows, {size:.2f} GB, latent_shape"
        f" {json.dumps(metadata['latent_shape'])}"
        + (
            f"; {metadata['failures']} records left out, see {writer.folder / 'failures.jsonl'}"
            if metadata["failures"]
            else ""
        )
        + (
            f"; {len(broken)} videos end long before what they, or the list, say, have holes or are"
            " damaged"
            if broken
            else ""
        )
    )
ranks.leave()
