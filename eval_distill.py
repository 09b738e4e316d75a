"""How well checkpoints predict the teacher's latents at masked positions of videos they never saw.

    python eval_distill.py --checkpoint A/best.pth B/best.pth --cache CACHE_OF_THE_VALIDATION_SPLIT
    python eval_distill.py --checkpoint A/best.pth --data DIR --split validation \\
        --teacher DIR_OR_CKPT --out X.json
    torchrun --nproc_per_node 4 eval_distill.py ...     each rank takes every 4th batch; the figures
                                                        are the same

Every checkpoint gets the same clips and masks, and a table has one space of targets: the
checkpoints' own, or else --space. R2 is 0 for the per-position mean of the training set, which is
one for the table, and 1 for perfect; its interval is over videos.
"""

import functools
import itertools
import json
import math
import os
from typing import Literal

from salt import config, errors, given_paths, runs
from salt.errors import InputError
from salt.files import prepare_file, write_whole

# ----------------------------------------------------------------------------------------- settings
# one or more: best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
checkpoint: list[str] = []
cache: str | None = None  # latent cache of the held-out split
data: str | None = None  # data folder; with --teacher, or where the cache holds no clips
split = "validation"  # list of held-out videos in it
# measure on videos that a checkpoint was trained on, too; the figures are then called training R2
training_videos: bool = False
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
cameras: list[str] = []  # of a LeRobot data set: names, or their last parts [all]
window_seconds: float | None = None  # of a LeRobot data set: longer episodes become several rows
# cache that they were trained on, in which look-up looks [where the checkpoint says it was]
train_cache: str | None = None
teacher: str | None = None  # without a cache: the teacher that the checkpoints were trained on
space: Literal["own", "none", "layer_norm", "standardise"] = "own"  # to compare targets in
masks: list[str] = []  # mask families to measure [the checkpoints', which must agree]
ema: bool = False  # measure the moving average of the weights (train.py --ema)
max_batches: int = 200  # at most so many batches, of clips from all over the list
batch_size: int = 24  # clips a batch
eval_seed: int = 2  # of masks and choice of clips; train.py chose best.pth with others
# reading and decoding threads [all cores, shared by a machine's ranks]
threads = max(1, (os.cpu_count() or 1) // config.local_ranks())
dtype: Literal["bf16", "fp32"] = "bf16"  # compute
device = "auto"  # auto, cpu, cuda or cuda:1
out: str | None = None  # JSON file for the results
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(), least={"max_batches": 1, "batch_size": 1, "threads": 1, "eval_seed": 0}
)
given_paths.check(cache=cache, data=data, train_cache=train_cache, teacher=teacher)
paths = [runs.checkpoint_of(word) for word in checkpoint]

import numpy as np  # after the settings: --help and a mistyped flag answer at once
from tqdm import tqdm

import model
from benchmarks import budget
from salt import encoders, extension, heldout, ranks, score, task, teachers
from salt.cache_format import fingerprint
from salt.comparison import Table
from salt.loader import Loader, rows_to_read
from salt.lookup import lookup_of_table
from salt.masks import in_order, keyed_sample
from salt.odd_videos import odd_videos
from salt.ranks import rank, world

if not checkpoint or not (cache or data):
    raise InputError("give --checkpoint and either --cache or --data with --teacher; see --help")
unused = sorted(config.given & {"teacher", "split"})
if cache and unused:
    raise InputError(
        "--cache brings its own latents and videos; leave"
        f" {', '.join(f'--{name}' for name in unused)} out"
    )
place = ranks.pick_device(ranks.start(device))
log = functools.partial(print, flush=True) if rank == 0 else lambda line: None
log(extension.describe(place))
slow = budget.slow_bf16(place, dtype)
if slow:
    log(slow)
prepare_file(out)
odd_videos.watch(math.inf, tqdm.write)

# ---- one view, teacher, space and set of masks for all: other errors do not stand side by side
loaded = {path: encoders.load_salt(path, place, ema) for path in paths}
table = Table(loaded, space, masks)
for line in table.lines:
    log(line)
clips, encoder = task.open_held_out(settings, table, place, log)

# ---- videos that no checkpoint was trained on
seen_by = {path: saved.get("trained_on") for path, (_, _, saved) in loaded.items()}
allowed, measured_on = np.arange(len(clips)), "held-out"
for path, seen in seen_by.items():
    where = f"--cache {cache}" if cache else f"--data {data} --split {split}"
    records, kind, line = heldout.records_to_measure(clips, seen, where, training_videos)
    allowed = np.intersect1d(allowed, records)
    measured_on = kind if kind == "training" else measured_on
    if line:
        log(f"{path}: {line}")
lookup = lookup_of_table(settings, table, measured_on, log)

# ---- each batch once, through every checkpoint
failures = []
for salt, _, _ in loaded.values():
    model.cast_matrices(salt, dtype)
kept = allowed[keyed_sample(len(allowed), max_batches * batch_size, eval_seed)]
mine = itertools.islice(in_order(kept, batch_size), rank, None, world)
target = "latents" if table.predicts_latents else "pixels"
looked_at = rows_to_read(target, encoder, context=True)
how = {"threads": threads, "device": place, "failed": lambda i, error: failures.append(str(error))}
loader = Loader(clips, mine, table.families, eval_seed, **looked_at, **how)
errors.started = True  # each rank says its own from here on
measured = []  # a batch: {path: score.clip_errors}, videos, fingerprints, which are known
count = -(-len(kept) // (batch_size * world))
for batch in tqdm(loader, total=count, unit="batch", dynamic_ncols=True, disable=rank > 0):
    if encoder:
        batch = batch._replace(latents=teachers.teacher_latents(encoder, batch.patches))
    videos = [clips.name(record)[0] for record in batch.records.tolist()]
    if cache:
        marks, twins = clips.cache.fingerprints[batch.records], np.zeros(len(videos), bool)
    else:  # decoded here: a training clip under another id is known by its pixels alone
        marks = np.array([fingerprint(clip) for clip in batch.patches.cpu().numpy()])
        known = [heldout.among(marks, (seen or {}).get("clips")) for seen in seen_by.values()]
        twins = np.any(known, axis=0) & (measured_on == "held-out")
    found = {}
    for path, (salt, _, _) in loaded.items():
        its_errors = score.clip_errors(salt, table.space, batch, table.own_space(path), lookup)
        found[path] = heldout.checked(its_errors, batch, clips)
    measured.append((found, videos, marks.tolist(), twins.tolist()))

# ---- results: those of all ranks, in the order of the batches
measured = ranks.in_turn(measured)
failures = [failure for lost in ranks.gather(failures) for failure in lost]
if rank > 0:
    ranks.leave()
videos, marks, twins = (np.array(sum((part[i] for part in measured), [])) for i in (1, 2, 3))
for failure in failures:
    log(f"skipped: {failure}")
if len(twins) and twins.all():
    raise InputError("every clip is a training clip under another id; give held-out videos")
if twins.any():
    names = ", ".join(map(repr, videos[twins][:3].tolist()))
    log(f"{twins.sum()} clips are training clips under other ids ({names}): left out")
    videos, marks = videos[~twins], marks[~twins]
numbers = np.unique(videos, return_inverse=True)[1]
copies = heldout.copies(numbers, marks, lambda i: str(videos[i]))
if copies:
    log(copies)
results = []
for path, (_, _, saved) in loaded.items():
    by_family = {
        name: {kind: values[~twins] for kind, values in row.items()}
        for name, row in score.join_errors([found[path] for found, *_ in measured]).items()
    }
    families = list(by_family.values())
    over_all = score.figures(families)
    results.append(
        {
            "checkpoint": path,
            "ema": ema,
            "step": saved["step"],
            "space": table.name_of_space,
            "measured_on": measured_on,
            "clips": len(videos),
            "videos": len(set(videos.tolist())),
            **over_all,
            "r2_ci95": score.r2_interval(families, videos),
            "r2_over_best_ci95": score.r2_interval(families, videos, over_all["best_dumb"]),
            "families": {name: score.figures([row]) for name, row in by_family.items()},
        }
    )
width = max(map(len, paths))
log(
    f"{measured_on} R2{' of the moving average of the weights' * ema}; space:"
    f" {table.name_of_space}; masks: {', '.join(table.families)}; 95 % over"
    f" {len(set(videos.tolist()))} videos"
)
log(
    f"{'checkpoint':{width}}  {'masks':6} {'clips':>6} {'mse':>9} {'R2':>7} {'95 %':>16}"
    f" {'background R2':>14} {'look-up R2':>10} {'R2 from best':>12} {'95 %':>16}"
)


def shown(row):
    """Of the dumb predictors, and R2 from the best of them."""
    looked_up = "-" if row["r2_lookup"] is None else f"{row['r2_lookup']:.4f}"
    return f"{row['r2_background']:14.4f} {looked_up:>10} {row['r2_over_best']:12.4f}"


for result in results:
    ends, beyond = (
        score.show_interval(result[name], "6.4f") for name in ("r2_ci95", "r2_over_best_ci95")
    )
    log(
        f"{result['checkpoint']:{width}}  {'all':6} {result['clips']:6d} {result['mse']:9.5f} "
        f"{result['r2']:7.4f} {ends:>16} {shown(result)} {beyond:>16}"
    )
    for name, row in result["families"].items():
        log(
            f"{'':{width}}  {name:6} {'':6} {row['mse']:9.5f} {row['r2']:7.4f} {'':16} {shown(row)}"
        )
log(f"R2 from best: measured from the best dumb predictor, {score.DUMB[results[0]['best_dumb']]}")
if out:
    content = {"results": results, "failures": failures, "config": settings}
    write_whole(out, json.dumps(content, indent=1).encode())
ranks.leave()
