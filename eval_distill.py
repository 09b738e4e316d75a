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

import itertools
import json
import math
import os
from typing import Literal

import config
import runs

# ----------------------------------------------------------------------------------------- settings
# one or more: best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
checkpoint: list[str] = []
cache: str | None = None  # latent cache of the held-out split
data: str | None = None  # data folder; with --teacher, or where the cache holds no clips
split = "validation"  # list of held-out videos in it
# measure on videos that a checkpoint was trained on, too; the figures are then called training R2
training_videos: bool = False
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
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
config.check_paths(cache=cache, data=data, teacher=teacher)
paths = [runs.checkpoint_of(word) for word in checkpoint]

import numpy as np  # after the settings: --help and a mistyped flag answer at once
import torch
from tqdm import tqdm

import budget
import heldout
import model
import ops
import ranks
from cache import agree_on, fingerprint, open_cache, prepare_file, write_whole
from config import InputError
from data import (
    Records,
    Videos,
    batches,
    in_order,
    keyed_sample,
    load_split,
    odd_videos,
)
from ranks import rank, world
from views import View

if not checkpoint or not (cache or data):
    raise InputError("give --checkpoint and either --cache or --data with --teacher; see --help")
if cache and (unused := sorted(config.given & {"teacher", "split"})):
    raise InputError(
        "--cache brings its own latents and videos; leave"
        f" {', '.join(f'--{name}' for name in unused)} out"
    )
device = model.pick_device(ranks.start(device))
log = print if rank == 0 else lambda *line, **how: None
log(ops.extension_line(device), flush=True)
if faster := budget.slow_bf16(device, dtype):
    log(faster)
prepare_file(out)
odd_videos.watch(math.inf, tqdm.write)
loaded = {path: model.load_salt(path, device, ema) for path in paths}

# ---- one view and one teacher for all
first = next(iter(loaded.values()))[2]
view = View.from_dict(first["view"])
encoder_config = model.EncoderConfig(**first["encoder_config"])
for path, (_, own, saved) in loaded.items():
    if difference := view.difference(View.from_dict(saved["view"])):
        raise InputError(
            f"{path} was trained under another view than {paths[0]}: {difference}; evaluate them"
            " apart"
        )
    same_targets = own.target == first["space"]["target"] and (
        own.target == "pixels" or agree_on(saved["teacher"], first["teacher"])
    )
    if saved["encoder_config"]["patch"] != encoder_config.patch or not same_targets:
        raise InputError(
            f"{path} predicts other targets than {paths[0]} (another teacher or patch, or pixels);"
            " evaluate them apart"
        )
predicts_latents = first["space"]["target"] == "latents"

# ---- one space and one set of masks for the table: errors in other units do not stand side by side
trained_in = {path: own.normalise for path, (_, own, _) in loaded.items()}
if space != "own" and not predicts_latents:
    raise InputError(
        f"--space {space} is a space of latents, and {paths[0]} predicts pixels, "
        "which have one; leave it out"
    )
compared_in = trained_in[paths[0]] if space == "own" else space
for path, trained in trained_in.items():
    if trained == compared_in or not predicts_latents:
        continue
    if space == "own":
        common = "layer_norm" if "layer_norm" in trained_in.values() else "none"
        raise InputError(
            f"{path} was trained with --target_norm {trained}, {paths[0]} with "
            f"{compared_in}: their errors have different units; compare them in one "
            f"space, --space {common}, or evaluate them apart"
        )
    if trained == "layer_norm":
        raise InputError(
            f"{path} predicts layer-normed latents, without each token's mean and scale: "
            f"they cannot be brought to --space {space}; give --space layer_norm, or "
            "leave it out of this table"
        )

reference = measured_from = None  # the space with the one per-position mean that all R2 start from
others = []
for path, (_, own, saved) in loaded.items():
    variance = (saved.get("stats") or {}).get("variance")
    offered = own.as_space(compared_in, variance) if predicts_latents else own
    if offered and not reference:
        reference, measured_from = offered, path
    elif offered:
        if not (offered.agrees_with(reference) and torch.equal(offered.zero, reference.zero)):
            others.append(path)
if not reference:
    raise InputError(
        "no checkpoint has the per-position mean of its training set, which R2 starts "
        f"from, in --space {space}; add one trained with --target_norm {space}"
    )
if others:
    log(
        f"R2 of all is measured from the per-position mean in {measured_from}; {', '.join(others)} "
        "had other training clips"
    )

families = list(dict.fromkeys(masks)) or first["settings"]["masks"]
for path, (_, _, saved) in loaded.items():
    predicted = saved["settings"]["masks"]
    lacking = [family for family in masks if family not in predicted]
    if lacking:
        raise InputError(
            f"--masks {','.join(masks)}: {path} does not predict {', '.join(lacking)}"
            f", only {', '.join(predicted)}"
        )
    if not masks and set(predicted) != set(families):
        every = [other["settings"]["masks"] for _, _, other in loaded.values()]
        common = ",".join(family for family in families if all(family in one for one in every))
        advice = f"compare them on --masks {common}" if common else "evaluate them apart"
        raise InputError(
            f"{path} predicts the masks {', '.join(predicted)}, {paths[0]} "
            f"{', '.join(families)}; {advice}"
        )

encoder = None
if cache:
    source = open_cache(cache)
    if difference := view.difference(source.view):
        raise InputError(
            f"{cache} has another view than {paths[0]}: {difference}; make a cache of the held-out"
            " split under the view of the training cache"
        )
    if predicts_latents and not (
        source.has_latents and agree_on(first["teacher"], source.teacher_identity)
    ):
        raise InputError(
            f"{cache} holds latents of another teacher than {paths[0]} was trained on (weights,"
            " shape, compute or normalisation), or none"
        )
    rows = (
        load_split(data, source.metadata["split"], splits_dir, log)
        if data and not source.has_patches
        else None
    )
    clips = Records(source, rows)
else:
    rows = load_split(data, split, splits_dir, log)
    clips = Videos(rows, view, encoder_config.patch, encoder_config.tubelet)
    if predicts_latents:
        if not teacher:
            raise InputError("without --cache the targets come from the teacher: give --teacher")
        encoder = model.load_teacher(teacher, device, first["teacher"].get("compute", "fp32"))
        if not agree_on(first["teacher"], encoder.identity):
            raise InputError(
                f"{teacher} is not the teacher that {paths[0]} was trained on: SHA-256 of the"
                f" weights {encoder.sha256[:12]} there, {first['teacher']['sha256'][:12]} in the"
                " checkpoint (or another mean, std or shape)"
            )

# ---- videos that no checkpoint was trained on
allowed, measured_on = np.arange(len(clips)), "held-out"
for path, (_, _, saved) in loaded.items():
    where = f"--cache {cache}" if cache else f"--data {data} --split {split}"
    records, kind, lines = heldout.records_to_measure(
        clips, saved.get("trained_on"), where, training_videos
    )
    allowed = np.intersect1d(allowed, records)
    measured_on = kind if kind == "training" else measured_on
    for line in lines:
        log(f"{path}: {line}")

# ---- each batch once, through every checkpoint
failures = []
for salt, _, _ in loaded.values():
    model.cast_matrices(salt, dtype)
kept = allowed[keyed_sample(len(allowed), max_batches * batch_size, eval_seed)]
# the targets of the context, too: their mean is the background's guess
seen = ("context", "target")
errors = {path: [] for path in loaded}
# of each batch: its video ids, its fingerprints; which clips, decoded here, are training clips
# under other ids
videos, prints, twins = [], [], []
mine = itertools.islice(in_order(kept, batch_size), rank, None, world)
stream = batches(
    clips,
    mine,
    families,
    eval_seed,
    patches=None if encoder else ("context",) if predicts_latents else seen,
    latents=seen if predicts_latents else (),
    threads=threads,
    device=device,
    failed=lambda i, error: failures.append(str(error)),
)
config.started = True
for batch in tqdm(
    stream,
    total=-(-len(kept) // (batch_size * world)),
    unit="batch",
    dynamic_ncols=True,
    disable=rank > 0,
):
    if encoder:
        batch = batch._replace(latents=model.teacher_latents(encoder, batch.patches))
    videos.append([clips.name(record)[0] for record in batch.records.tolist()])
    known = np.zeros(len(batch.records), bool)
    marks = (
        clips.cache.fingerprints[batch.records]
        if cache
        else np.array([fingerprint(clip) for clip in batch.patches.cpu().numpy()])
    )
    prints.append(marks.tolist())
    if not cache and measured_on == "held-out":
        for _, _, saved in loaded.values():
            known |= heldout.among(marks, (saved.get("trained_on") or {}).get("clips"))
    twins.append(known.tolist())
    for path, (salt, own, _) in loaded.items():
        converted = own if predicts_latents and not own.agrees_with(reference) else None
        errors[path].append(
            heldout.checked(
                model.clip_errors(salt, reference, batch, families, converted), batch, clips
            )
        )

# ---- results: those of all ranks, in the order of the batches
gathered = ranks.gather((errors, videos, twins, prints, failures))
if rank > 0:
    ranks.leave()


def in_turn(parts):
    """The parts of all ranks, a list each, in the order of the batches."""
    return [part for turn in itertools.zip_longest(*parts) for part in turn if part]


errors = {path: in_turn([found[path] for found, *_ in gathered]) for path in loaded}
videos, twins, prints = (
    np.array([entry for part in in_turn([found[i] for found in gathered]) for entry in part])
    for i in (1, 2, 3)
)
failures = [failure for *_, lost in gathered for failure in lost]
for failure in failures:
    print(f"skipped: {failure}")
if len(twins) and twins.all():
    raise InputError("every clip is a training clip under another id; give held-out videos")
if twins.any():
    print(
        f"{twins.sum()} clips are training clips under other ids"
        f" ({', '.join(map(repr, videos[twins][:3].tolist()))}): left out"
    )
    videos, prints = videos[~twins], prints[~twins]
if line := heldout.copies(
    np.unique(videos, return_inverse=True)[1], prints, lambda i: str(videos[i])
):
    print(line)
video_count = len(set(videos.tolist()))
target_space = compared_in if predicts_latents else "pixels"
results = []
for path, parts in errors.items():
    by_family = {
        name: {kind: values[~twins] for kind, values in row.items()}
        for name, row in model.join_errors(parts).items()
    }
    rows = list(by_family.values())
    results.append(
        {
            "checkpoint": path,
            "ema": ema,
            "step": loaded[path][2]["step"],
            "space": target_space,
            "measured_on": measured_on,
            "clips": len(videos),
            "videos": video_count,
            "mse": model.mse(rows),
            "r2": float(model.r2(rows)),
            "r2_ci95": model.r2_interval(rows, videos),
            "r2_background": float(model.r2(rows, "background")),
            "families": {
                name: {
                    "mse": model.mse([row]),
                    "r2": float(model.r2([row])),
                    "r2_background": float(model.r2([row], "background")),
                }
                for name, row in by_family.items()
            },
        }
    )
width = max(map(len, paths))
print(
    f"{measured_on} R2{' of the moving average of the weights' * ema}; space: {target_space};"
    f" masks: {', '.join(families)}; 95 % over {video_count} videos"
)
print(
    f"{'checkpoint':{width}}  {'masks':6} {'clips':>6} {'mse':>9} {'R2':>7} {'95 %':>16}"
    f" {'background R2':>14}"
)
for result in results:
    ends = model.show_interval(result["r2_ci95"], "6.4f")
    print(
        f"{result['checkpoint']:{width}}  {'all':6} {result['clips']:6d} {result['mse']:9.5f} "
        f"{result['r2']:7.4f} {ends:>16} {result['r2_background']:14.4f}"
    )
    for name, row in result["families"].items():
        print(
            f"{'':{width}}  {name:6} {'':6} {row['mse']:9.5f} {row['r2']:7.4f} {'':16}"
            f" {row['r2_background']:14.4f}"
        )
if out:
    write_whole(
        out,
        json.dumps(
            {"results": results, "failures": failures, "config": settings}, indent=1
        ).encode(),
    )
ranks.leave()
