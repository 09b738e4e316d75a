"""Does a frozen student know whether a clip runs forwards or backwards?

    python probe_time_arrow.py --checkpoint checkpoints/RUN/best.pth --data DIR \\
        --train_videos 2000 --val_videos 1000 --out X.json

A linear probe on features of each clip and of its video played backwards, beside the same probe on
untrained encoders of the same shape and on raw pixels. Clips are cut from a random half of each
video: where every video starts from the same pose, whole videos give the answer away. Memory holds
features only, one batch of clips at a time.
"""

import dataclasses
import functools
import json
import math
import os
import resource
import warnings
from typing import Literal

from salt import config, runs
from salt.errors import InputError
from salt.files import prepare_file, sha256, write_whole

# ----------------------------------------------------------------------------------------- settings
# best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
checkpoint: str | None = None
# a run's name, folder, log or checkpoint: wait until it has ended, then probe its best.pth
after: str | None = None
data: str | None = None  # data folder: videos and their lists
ema: bool = False  # probe the moving average of the weights (train.py --ema)
train_split = "train"  # list that the probe is fitted on
val_split = "validation"  # list that it is tested on
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
train_videos: int = 2000  # at most so many, drawn by the seed
val_videos: int = 1000  # at most so many
whole_videos: bool = False  # clips from whole videos instead of a random half of each
untrained_seeds: int = 3  # untrained encoders to compare with; 0: none
pixels: bool = True  # whether to probe raw pixels, averaged down to 7x7 a frame
# inverse L2 strengths of the logistic regression to choose from
strengths: list[float] = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
folds: int = 5  # of the cross-validation that chooses, by video
batch_size: int = 16  # videos a batch
seed: int = 0  # which videos, and which half of each
threads = max(1, (os.cpu_count() or 1))  # decoding threads
dtype: Literal["bf16", "fp32"] = "bf16"  # the encoder's compute
device = "auto"  # auto, cpu, cuda or cuda:1
checkpoints = "checkpoints"  # folder where a run is looked up by its name
run_logs = "run_logs"  # folder of its logs
poll_seconds = 30.0  # how often --after looks
out: str | None = None  # JSON file for the results
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    least={
        "train_videos": 1,
        "val_videos": 1,
        "untrained_seeds": 0,
        "folds": 2,
        "batch_size": 1,
        "seed": 0,
        "threads": 1,
        "poll_seconds": 0.1,
    },
)
config.check_paths(data=data)
checkpoint_path = (
    runs.checkpoint_of(checkpoint, checkpoints=checkpoints, run_logs=run_logs)
    if checkpoint
    else None
)

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
import torch
from einops import rearrange, reduce
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import model
from benchmarks import budget
from salt import extension, heldout, ops, ranks
from salt.cache_format import fingerprint
from salt.checkpoint import load_checkpoint
from salt.errors import VideoError
from salt.loader import prefetch
from salt.masks import permute
from salt.odd_videos import odd_videos
from salt.ops import patchify
from salt.score import interval, show_interval
from salt.splits import load_split, overlap
from salt.video import read_row
from salt.views import MirroredView, View, random_half

if os.environ.get("WORLD_SIZE", "1") != "1":
    raise InputError("probe_time_arrow.py runs in one process; start it without torchrun")
if not data or not (checkpoint or after):
    raise InputError("give --data and either --checkpoint or --after; see --help")
if checkpoint and after:
    raise InputError("--after probes the best checkpoint of its run; leave --checkpoint out")
prepare_file(out)
videos = {split: load_split(data, split, splits_dir, print) for split in (train_split, val_split)}
both = {row.id for row in videos[train_split]} & {row.id for row in videos[val_split]}
if both:
    raise InputError(
        f"{len(both)} videos, {min(both)} among them, are in both --train_split {train_split} and"
        f" --val_split {val_split}; a probe is tested on videos it was not fitted on"
    )


path = (
    os.path.join(runs.wait_for_end(after, checkpoints, run_logs, poll_seconds), "best.pth")
    if after
    else checkpoint_path
)
device = ranks.pick_device(device)
ops.return_freed_memory()
odd_videos.watch(math.inf, tqdm.write)
print(extension.describe(device), flush=True)
faster = budget.slow_bf16(device, dtype)
if faster:
    print(faster)
saved = load_checkpoint(path, ema)
print(
    f"probing {path}, step {saved['step']}{', the moving average of its weights' * ema}", flush=True
)
view, shape = View.from_dict(saved["view"]), model.EncoderConfig(**saved["encoder_config"])
student = model.student_of(saved, path)
seen = saved.get("trained_on") or {"ids": None, "clips": None}  # of the encoder
if seen["ids"] is None:
    print(
        f"whether the encoder was trained on videos of the split {val_split!r} is unknown: the"
        " checkpoint is of an older version"
    )
elif seen["clips"] is None:
    print(
        f"whether the encoder was trained on copies of videos of the split {val_split!r}, under"
        " other ids, is unknown: its training decoded them and kept no fingerprints"
    )
del saved

# ---- which videos, and the encoders side by side, so that each video is decoded once
encoders = {"student": student}
for number in range(untrained_seeds):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + number)
        encoders[f"untrained {number}"] = model.Encoder(shape)
encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
for encoder in encoders.values():
    model.cast_matrices(encoder, dtype)


marks, held_marks = {}, {}  # SHA-256 of a training or held-out video's file -> its Rows
known_to_encoder = []  # held-out Rows that the encoder was trained on


def pair_of(row, split):
    """[the row's clip, that of the video played backwards], or the VideoError that it gives: also
    where a held-out video's file is that of a training video. The second is not the first reversed:
    a rule that rounds frame numbers down spaces them unevenly, which would tell.
    """
    try:
        part = view if whole_videos else dataclasses.replace(view, window=random_half(row.id, seed))
        as_trained = [view] * (split != train_split)
        forwards, mirrored, *plain = read_row(
            row, [part, MirroredView(**part.to_dict()), *as_trained]
        )
        mark = sha256(row.path)
        if split == train_split:
            marks.setdefault(mark, []).append(row)
        elif same := next((other for other in marks.get(mark, ()) if overlap(row, other)), None):
            return VideoError(
                f"{row.id!r} is the training video {same.id!r} under another name, or shares frames"
                " with it"
            )
        else:
            held_marks.setdefault(mark, []).append(row)
            numbers = (
                heldout.hash_ids([f"{row.id}\t\n".encode()]),
                np.array(
                    [
                        fingerprint(
                            np.ascontiguousarray(patchify(plain[0], shape.patch, shape.tubelet))
                        )
                    ]
                ),
            )
            if any(
                heldout.among(number, known).any()
                for number, known in zip(numbers, (seen["ids"], seen["clips"]))
            ):
                known_to_encoder.append(row)
        return [forwards, mirrored[::-1]]
    except VideoError as error:
        return error


@torch.no_grad()
def features_of(clips):
    """clips uint8 [B, T, H, W, 3] -> {probe: float32 [B, ...]}: tokens averaged over space, time
    kept; pixels averaged to 7x7.
    """
    t, h, w = shape.grid
    found = {}
    patches = torch.from_numpy(
        np.ascontiguousarray(patchify(clips, shape.patch, shape.tubelet))
    ).to(device)
    for name, encoder in encoders.items():
        tokens = encoder.encode(patches)  # [B, N, D]
        found[name] = reduce(tokens.float(), "b (t n) d -> b (t d)", "mean", t=t).cpu().numpy()
    if pixels:
        edges = [round(i * view.size / 7) for i in range(8)]
        rows = np.add.reduceat(clips, edges[:-1], axis=2, dtype=np.float32)
        cells = np.add.reduceat(rows, edges[:-1], axis=3)  # [B, T, 7, 7, 3]
        area = np.outer(np.diff(edges), np.diff(edges))[..., None] * 255
        found["pixels"] = rearrange(cells / area, "b t y x c -> b (t y x c)").astype(np.float32)
    return found


def collect(split, count):
    """(features {probe: [2 V, F]}, failures) of up to `count` videos: row 2 v is video v forwards,
    row 2 v + 1 backwards.
    """
    rows = videos[split]
    rows = [rows[i] for i in permute(np.arange(min(count, len(rows))), len(rows), seed, 0)]
    parts = []
    failures = []
    clips = []
    for i, pair in enumerate(
        tqdm(
            prefetch(functools.partial(pair_of, split=split), rows, threads, 2 * batch_size),
            total=len(rows),
            desc=split,
            unit="video",
            dynamic_ncols=True,
        )
    ):
        if isinstance(pair, VideoError):
            failures.append(str(pair))
        else:
            clips += pair
        if clips and (len(clips) == 2 * batch_size or i == len(rows) - 1):
            parts.append(features_of(np.stack(clips)))
            clips = []
    if not parts:
        raise InputError(
            f"no video of the split {split!r} could be decoded; the first:"
            f" {failures[0] if failures else 'none'}"
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, failures


train_features, train_failures = collect(train_split, train_videos)
val_features, val_failures = collect(val_split, val_videos)
for failure in train_failures + val_failures:
    print(f"skipped: {failure}")
train_count, val_count = (
    len(features["student"]) // 2 for features in (train_features, val_features)
)
if train_count < folds:
    raise InputError(
        f"{train_count} training videos do not make {folds} folds; give more --train_videos or"
        " fewer --folds"
    )


def probe(name):
    """Fit on the training videos, strength by cross-validation with a video's two directions in one
    fold; per-video accuracy on the held-out ones.
    """
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    search = GridSearchCV(pipeline, {"logisticregression__C": strengths}, cv=GroupKFold(folds))
    # two thread pools, torch's and BLAS's, spin against each other: 13 times slower
    with warnings.catch_warnings(), threadpool_limits(1):
        # the weakest strengths need not converge to lose
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(
            train_features[name],
            np.tile([1, 0], train_count),
            groups=np.repeat(np.arange(train_count), 2),
        )
    right = search.predict(val_features[name]) == np.tile([1, 0], val_count)
    return right.reshape(val_count, 2).mean(1), float(search.best_params_["logisticregression__C"])


def summary(correct, **other):
    """correct float [V]: the share of a video's answers that were right."""
    return {"accuracy": float(correct.mean()), "ci95": interval(np.mean, correct), **other}


fitted = {
    name: probe(name)
    for name in tqdm(train_features, desc="fitting", unit="probe", dynamic_ncols=True)
}
result = summary(fitted["student"][0], C=fitted["student"][1])
controls = [correct for name, (correct, _) in fitted.items() if name.startswith("untrained")]
if controls:
    result["untrained"] = summary(
        np.mean(controls, axis=0), seeds=[float(correct.mean()) for correct in controls]
    )
if pixels:
    result["pixels"] = summary(fitted["pixels"][0], C=fitted["pixels"][1])
result |= {
    "train_videos": train_count,
    "val_videos": val_count,
    "failures": train_failures + val_failures,
    "val_videos_of_the_encoders_training": None if seen["ids"] is None else len(known_to_encoder),
    "window": "whole videos" if whole_videos else f"a random half of each video, seed {seed}",
    "config": settings | {"checkpoint": path},
}

copies = sum(
    any(overlap(row, other) for other in rows[:i])
    for rows in held_marks.values()
    for i, row in enumerate(rows)
)
if known_to_encoder:
    print(
        f"{len(known_to_encoder)} of the held-out videos are of those that the encoder was trained"
        " on: held out from the probe's fit, not from the encoder's"
    )
if copies:
    print(
        f"{copies} held-out videos are copies of others, under other names: the intervals count"
        " them as videos of their own, and are too narrow"
    )
print(f"time arrow, {train_count} training and {val_count} held-out videos, {result['window']}")
print(f"{'features':22} {'accuracy':>9} {'95 % by video':>18}")
for name, row in (
    ("student", result),
    ("untrained, mean of " + str(len(controls)), result.get("untrained")),
    ("pixels 7x7", result.get("pixels")),
):
    if row:
        print(f"{name:22} {row['accuracy']:9.3f} {show_interval(row['ci95'], '7.3f'):>18}")
if controls:
    difference = fitted["student"][0] - np.mean(controls, axis=0)
    ends = result["difference_ci95"] = interval(np.mean, difference)
    verdict = "does not differ from"
    if ends is None:
        verdict = "cannot, by one video or answers all alike, be compared with"
    elif ends[0] > 0:
        verdict = "beats"
    elif ends[1] < 0:
        verdict = "is worse than"
    print(
        f"student minus untrained {difference.mean():+.3f} {show_interval(ends, '+.3f')}: "
        f"the student {verdict} an untrained encoder of its shape"
    )
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
gpu = (
    f", GPU {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB" if device.type == "cuda" else ""
)
print(f"peak memory {peak:.2f} GB{gpu}")
if out:
    write_whole(out, json.dumps(result, indent=1).encode())
