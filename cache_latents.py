"""Run the teacher over the videos once, and keep its latents.

    python cache_latents.py --data DIR --split train --teacher DIR_OR_CKPT --out CACHE
    torchrun --nproc_per_node 4 cache_latents.py ...        each rank makes every 4th shard

Interrupt it when you like: the same command continues at the next shard, and the result is the same to the bit.
"""
import json
import hashlib
import os
import shutil
import sys
from datetime import timedelta
from typing import Literal

import config

# ------------------------------------------------------------------------------------------------------------- settings
data: str | None = None        # data folder (or CSV file): videos and their lists
split = "train"                # which list: train, validation or test
splits_dir: str | None = None  # where to look for the list if the data folder has none
teacher = ""                   # VideoMAE folder or .pth, a checkpoint of train.py, or none: clips alone, for stage 1
out: str | None = None         # the cache to make, or to continue
clips: Literal["auto", "on", "off"] = "auto"  # keep the clips too, so that training decodes no video; auto: where the disk has room
clips_from: str | None = None  # another cache: use its clips and ids instead of --data
limit: int | None = None       # only the first so many rows of the list
frames: int | None = None      # frames a clip (default: the teacher's, else 16)
resolution: int | None = None  # pixels of the clip's side (default: the teacher's, else 224)
patch: int | None = None       # pixels of a patch's side (default: the teacher's, else 16)
sampling: Literal["uniform", "stride"] = "uniform"  # frames spread over the whole video, or every stride-th about the middle
stride = 4                     # for --sampling stride
crop: Literal["center", "squash"] = "center"  # the middle square, or the whole frame made square
interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear"  # how frames are resized
batch_size = 8                 # clips a teacher batch; fixed row ranges of the list, so part of the cache's identity
threads = max(1, (os.cpu_count() or 1))  # decoding threads
dtype: Literal["fp32", "bf16"] = "fp32"  # the teacher's compute
device = "auto"                # auto, cpu, cuda or cuda:1
verify: str | None = None      # check every byte of this cache against its checksums instead, and exit
# -----------------------------------------------------------------------------------------------------------------------
config.apply(globals(), least={"batch_size": 1, "threads": 1, "limit": 1, "frames": 1, "resolution": 1, "patch": 1, "stride": 1})

import torch  # noqa: E402  after the settings, so that --help and a mistyped flag answer at once
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

import cache  # noqa: E402
import model  # noqa: E402
import ops  # noqa: E402
from config import InputError  # noqa: E402
from data import VideoError, cache_reader, collate, load_split, prefetch, video_reader  # noqa: E402
from views import View, grid_of  # noqa: E402

if verify:
    problems = cache.open_cache(verify).verify(lambda files: tqdm(files, unit="file", dynamic_ncols=True))
    for problem in problems:
        print(f"{verify}: {problem}")
    print(f"{verify}: {f'{len(problems)} problems; make it again' if problems else 'every checksum fits'}")
    sys.exit(1 if problems else 0)

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    if "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE is {world} in the environment, but nothing else of torchrun's: start it with torchrun, or unset WORLD_SIZE")
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for the slowest one's last shard
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "auto" and torch.cuda.is_available() else device
log = print if rank == 0 else lambda *line, **how: None
if out is None or teacher == "" or (data is None and clips_from is None):
    raise InputError("give --out, --teacher (or --teacher none) and --data (or --clips_from); see --help")
device = model.pick_device(device)
log(ops.extension_line(device), flush=True)

if clips == "off" and teacher.lower() == "none":
    raise InputError("--teacher none keeps nothing but clips; leave --clips off out")
shared = {"data", "split", "frames", "resolution", "patch", "sampling", "stride", "crop", "interpolation", "limit"} & config.given
if clips_from and (shared or clips == "on"):
    names = ", ".join(f"--{name}" for name in sorted(shared)) or "--clips on"
    raise InputError(f"--clips_from takes clips, ids and view from {clips_from}; leave {names} out")

# ---- the teacher, the view, the rows
encoder = None if teacher.lower() == "none" else model.load_teacher(teacher, device)
source = cache.open_cache(clips_from) if clips_from else None
shape = encoder.config if encoder else None
if source:
    view, patch, tubelet = source.view, source.patch, source.tubelet
else:
    size = resolution or (shape.size if shape else 224)
    view = View(frames or (shape.frames if shape else 16), size, size, sampling, stride, crop, interpolation)
    patch, tubelet = patch or (shape.patch if shape else 16), shape.tubelet if shape else 2
if shape:
    takes, have = {"frames": shape.frames, "resolution": shape.size, "patch": shape.patch}, {"frames": view.frames, "resolution": view.size, "patch": patch}
    for name in takes:
        if takes[name] != have[name]:
            raise InputError(f"the teacher {teacher} takes {name} {takes[name]}, but the clips have {have[name]}; change "
                             f"{'--clips_from' if source else f'--{name}'}")
tokens, patch_dim = int(torch.tensor(grid_of(view, patch, tubelet)).prod()), 3 * tubelet * patch * patch

if source:
    ids, read = [source.ids.fields(row) for row in range(len(source))], cache_reader(source)
    if not source.has_patches:
        raise InputError(f"the cache {clips_from} holds no clips (--clips off) to take; give --data instead")
else:
    rows = load_split(data, split, splits_dir, log)[:limit]
    ids, read = [(row.id, 0) for row in rows], video_reader(rows, view, patch, tubelet)

# ---- disk: what is needed, what is there
begun = cache.begun_plan(out)
latent_bytes, clip_bytes = len(ids) * tokens * (shape.dim if shape else 0) * 2, len(ids) * tokens * patch_dim
at = os.path.abspath(out)
while not os.path.exists(at):
    at = os.path.dirname(at)
free = shutil.disk_usage(at).free
if source or not shape:
    keep_clips = not source
elif clips == "auto":
    keep_clips = begun["clips"] if begun else latent_bytes + clip_bytes < 0.95 * free
else:
    keep_clips = clips == "on"
log(f"clips: {f'those of {clips_from}' if source else 'kept' if keep_clips else 'left out, training will decode the videos'}")
if not begun:
    needed = latent_bytes + keep_clips * clip_bytes
    log(f"disk: {needed / 1e9:.2f} GB needed ({latent_bytes / 1e9:.2f} latents, {keep_clips * clip_bytes / 1e9:.2f} clips), {free / 1e9:.1f} GB free")
    if needed > free:
        raise InputError(f"{out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; free some, or try --clips off or --limit")

plan = {
    "split": source.metadata["split"] if source else split, "list_count": len(ids),
    "list_sha256": hashlib.sha256("".join(f"{name}\t{number}\n" for name, number in ids).encode()).hexdigest(),
    "teacher": encoder and {"name": encoder.name, "sha256": encoder.sha256, "dim": shape.dim, "mean": shape.mean, "std": shape.std, "compute": dtype},
    "view": view.to_dict(), "view_hash": view.hash(), "patch": patch, "tubelet": tubelet, "dtype": "float16", "batch_size": batch_size,
    "latent_shape": [tokens, shape.dim] if shape else None, "patch_shape": [tokens, patch_dim], "clips": bool(keep_clips),
    "clips_from": os.path.relpath(os.path.realpath(clips_from), os.path.realpath(out)) if source else None}

# ---- make the missing shards
if rank == 0:
    writer = cache.Writer(out, plan)
if world > 1:
    dist.barrier()
if rank > 0:
    writer = cache.Writer(out, plan)
if writer.finished:
    log(f"{out} is already whole: {len(cache.open_cache(out))} records")
    sys.exit(0)
missing = writer.missing()
log(f"teacher {teacher} on {device}; {len(ids)} rows in {writer.shard_count} shards, {len(missing)} to make; view {view.hash()}", flush=True)


def attempt(row):
    try:
        return read(row)
    except VideoError as error:
        return error


autocast = model.autocast_on(device, dtype)
to_make = sum(min(cache.SHARD_ROWS, len(ids) - number * cache.SHARD_ROWS) for number in missing)
bar = tqdm(total=len(ids), initial=len(ids) - to_make, unit="clip", dynamic_ncols=True, disable=rank > 0)
for number in [k for k in missing if k % world == rank]:
    first, last = number * cache.SHARD_ROWS, min((number + 1) * cache.SHARD_ROWS, len(ids))
    with writer.shard(number) as shard:
        samples = prefetch(attempt, range(first, last), threads, 2 * batch_size)
        for start in range(first, last, batch_size):  # a teacher batch: these rows and no others, wherever a run began
            batch = {row: next(samples) for row in range(start, min(start + batch_size, last))}
            good = [sample for sample in batch.values() if not isinstance(sample, VideoError)]
            latents = None
            if encoder and good:
                with torch.no_grad(), autocast():
                    latents = encoder.encode(collate(good).patches.to(device)).float().cpu().numpy()  # [b, N, D]
            done = 0
            for row, sample in batch.items():
                if isinstance(sample, VideoError):
                    shard.fail(row, *ids[row], str(sample))
                    continue
                shard.add(*ids[row], latents[done] if encoder else None, sample.patches)
                done += 1
            bar.update(len(batch) * (1 if world == 1 else world))
bar.close()
if world > 1:
    dist.barrier()
if rank == 0:
    metadata = writer.finish()
    size = sum(file.stat().st_size for file in writer.folder.iterdir()) / 1e9
    log(f"{out}: {metadata['count']} records of {len(ids)} rows, {size:.2f} GB, latent_shape {json.dumps(metadata['latent_shape'])}"
        + (f"; {metadata['failures']} videos failed, see {writer.folder / 'failures.jsonl'}" if metadata["failures"] else ""))
