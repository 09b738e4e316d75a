"""Does a frozen student know whether a clip runs forwards or backwards?

    python probe_time_arrow.py --checkpoint checkpoints/RUN/best.pth --data DIR \\
        --train_videos 2000 --val_videos 1000 --out X.json

Heads on features of each clip and of its video played backwards, beside the same on untrained
encoders of the same shape and on raw pixels. Clips are cut from a random half of each video: where
every video starts from the same pose, whole videos give the answer away. Tokens lie on the disk.
"""

import dataclasses
import json
import math
import os
from typing import Literal

from salt import alive, config, given_paths, runs
from salt.errors import InputError
from salt.files import prepare_file, write_whole

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
cameras: list[str] = []  # of a LeRobot data set: names, or their last parts [all]
window_seconds: float | None = None  # of a LeRobot data set: longer episodes become several rows
train_videos: int = 2000  # at most so many, drawn by the seed
val_videos: int = 1000  # at most so many
whole_videos: bool = False  # clips from whole videos instead of a random half of each
# the head that the figure is of: a linear one on means over space, or over 3x3 cells, time kept; or
# attentive pooling
head: Literal["mean", "grid", "attentive"] = "mean"
heads: list[Literal["mean", "grid", "attentive"]] = ["mean", "grid", "attentive"]  # in the table
teacher: str | None = None  # probe it beside the student
untrained_seeds: int = 3  # untrained encoders to compare with; 0: none
pixels: bool = True  # whether to probe pixels and frame differences, averaged down to 7x7
# inverse L2 strengths of the linear heads to choose from
strengths: list[float] = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
folds: int = 5  # of the cross-validation that chooses, by video
epochs: int = 20  # of attentive heads; at least 200 steps
features: str | None = None  # folder for tokens, removed at the end [the system's temporary one]
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
    least=dict.fromkeys("train_videos val_videos epochs batch_size threads".split(), 1)
    | {"untrained_seeds": 0, "folds": 2, "seed": 0, "poll_seconds": 0.1},
)
given_paths.check(data=data, teacher=teacher)
checkpoint_path = (
    runs.checkpoint_of(checkpoint, checkpoints=checkpoints, run_logs=run_logs)
    if checkpoint
    else None
)

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
from tqdm import tqdm

from benchmarks import budget
from salt import extension, ops, probed, probing, ranks, verdict
from salt.features import Features
from salt.odd_videos import odd_videos
from salt.views import MirroredView, random_half

if os.environ.get("WORLD_SIZE", "1") != "1":
    raise InputError("probe_time_arrow.py runs in one process; start it without torchrun")
if not data or not (checkpoint or after):
    raise InputError("give --data and either --checkpoint or --after; see --help")
if checkpoint and after:
    raise InputError("--after probes the best checkpoint of its run; leave --checkpoint out")
prepare_file(out)
asked = probed.Asked(settings, print)
path = checkpoint_path
if after:
    path = os.path.join(alive.wait_for_end(after, checkpoints, run_logs, poll_seconds), "best.pth")
place = ranks.pick_device(device)
ops.keep_freed_memory(one_place=True)
odd_videos.watch(math.inf, tqdm.write)
print(extension.describe(place), flush=True)
slow = budget.slow_bf16(place, dtype)
if slow:
    print(slow)
encoders = probed.Encoders(settings, [path], place, print)
view = encoders.view


def both_ways(row):
    """The views of a video's clip, and of that of the video played backwards, to be reversed."""
    part = view if whole_videos else dataclasses.replace(view, window=random_half(row.id, seed))
    return [part, MirroredView(**part.to_dict())]


def reversed_second(clips):
    """Not the first reversed: a rule that rounds frame numbers down spaces them unevenly, which
    would tell.
    """
    return [clips[0], clips[1][::-1]]


def labelled(made):
    """probing.Labelled of [(Row, numbers of its two clips)]."""
    numbers = np.concatenate([part for _, part in made])
    return probing.Labelled(numbers, np.tile([1, 0], len(made)), np.repeat(range(len(made)), 2))


# ---- tokens of all clips, once; then head by head
rows = {
    split: asked.drawn(split, count)
    for split, count in ((train_split, train_videos), (val_split, val_videos))
}
how = probing.Fitting(tuple(strengths), folds, epochs, seed=seed)
with Features(features, encoders.sources, 2 * sum(map(len, rows.values()))) as kept:
    train, held_out = (
        labelled(asked.fill(kept, encoders, split, rows[split], both_ways, reversed_second))
        for split in (train_split, val_split)
    )
    train_count, val_count = len(train.y) // 2, len(held_out.y) // 2
    if train_count < folds:
        raise InputError(
            f"{train_count} training videos do not make {folds} folds; give more --train_videos or"
            " fewer --folds"
        )
    scores = {}
    asked_for = list(dict.fromkeys([head, *heads]))
    jobs = [(source, each) for source in encoders.sources for each in asked_for]
    jobs = [(source, each) for source, each in jobs if each in source.heads]
    for source, each in tqdm(jobs, desc="fitting", unit="head", dynamic_ncols=True):
        said = probing.probe(kept, source.name, each, train, held_out.numbers, how, place)
        score = verdict.Score(said, held_out.y, held_out.videos)
        scores.setdefault(source.name, {})[each] = score

# ---- the table, and the figure of --head beside its controls
asked.say_what_is_odd()
window = "whole videos" if whole_videos else f"a random half of each video, seed {seed}"
print(f"time arrow, {train_count} training and {val_count} held-out videos, {window}")
table = probed.Table(scores, encoders.students, "accuracy")
for line in table.lines():
    print(line)
result = table.figure(head) | {
    "head": head,
    "table": table.to_dict(),
    "train_videos": train_count,
    "val_videos": val_count,
    "failures": asked.failures,
    "val_videos_of_the_encoders_training": encoders.count_known(asked.known),
    "window": window,
    "config": settings | {"checkpoint": path},
}
print(probed.peak_memory(place))
if out:
    write_whole(out, json.dumps(result, indent=1).encode())
