"""What an encoder saves in labels: states of bodies, read from its frozen features by heads that
are fitted on few labelled videos.

    python probe_states.py --checkpoint checkpoints/RUN/best.pth --data DIR --out X.json

DIR/states.json holds {video id: [a row of numbers a frame]}, null where one is missing; names of
the numbers may stand beside it, a list in state_names.json. Each clip ends a second before its
video does at the latest; a head says each value at the clip's last frame, and how much it changes
over the next second. R2 is 0 for the training videos' mean; shown is its mean over values, and
X.json has each one's.
"""

import dataclasses
import functools
import json
import math
import os
from typing import Literal

from salt import config, given_paths, runs
from salt.errors import InputError, VideoError
from salt.files import prepare_file, write_whole

# ----------------------------------------------------------------------------------------- settings
# one or more: best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
checkpoint: list[str] = []
data: str | None = None  # data folder: videos, their lists and states.json
states: str | None = None  # the file of states, where it is not there
fps: float | None = None  # frames a second of the videos [each file's own]
ema: bool = False  # probe the moving average of the weights (train.py --ema)
teacher: str | None = None  # probe it beside the student
train_split = "train"  # list that heads are fitted on
val_split = "validation"  # list that they are tested on
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
cameras: list[str] = []  # of a LeRobot data set: names, or their last parts [all]
window_seconds: float | None = None  # of a LeRobot data set: longer episodes become several rows
train_videos: int = 2000  # at most so many, drawn by the seed
val_videos: int = 1000  # at most so many
labels: list[int] = [10, 30, 100, 300, 0]  # labelled training videos; 0: all
draws: int = 5  # of as many labelled videos, the mean of which is shown
heads: list[Literal["mean", "grid", "attentive"]] = ["grid", "attentive"]  # see salt/probing.py
epochs: int = 20  # of attentive heads; at least 200 steps
clips_a_video: int = 2  # windows of half a video, drawn by the seed
ahead: float = 1.0  # seconds over which a value changes
untrained_seeds: int = 3  # untrained encoders to compare with; 0: none
pixels: bool = True  # whether to probe pixels and frame differences, averaged down to 7x7
features: str | None = None  # folder for tokens, removed at the end [the system's temporary one]
batch_size: int = 16  # clips a batch
seed: int = 0  # which videos, windows and draws
threads = max(1, (os.cpu_count() or 1))  # decoding threads
dtype: Literal["bf16", "fp32"] = "bf16"  # the encoder's compute
device = "auto"  # auto, cpu, cuda or cuda:1
out: str | None = None  # JSON file for the results; a plot of the same name beside it
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    least=dict.fromkeys(
        "train_videos val_videos draws epochs clips_a_video batch_size threads".split(), 1
    )
    | dict.fromkeys("untrained_seeds seed ahead".split(), 0),
)
given_paths.check(data=data, teacher=teacher)
paths = [runs.checkpoint_of(word) for word in checkpoint]

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
from tqdm import tqdm

from salt import lerobot, ops, probed, probing, ranks, splits, verdict
from salt.containers import frame_count, frame_rate
from salt.features import Features
from salt.masks import STREAMS, Random
from salt.odd_videos import odd_videos
from salt.views import frame_numbers, sample_id

if not data or not checkpoint:
    raise InputError("give --checkpoint and --data; see --help")
prepare_file(out, endings=(".json",))
place = ranks.pick_device(device)
ops.keep_freed_memory(one_place=True)
odd_videos.watch(math.inf, tqdm.write)

# ---- the states, and which window of a video ends how early
asked = probed.Asked(settings, print)
folder = data if os.path.isdir(data) else os.path.dirname(data)  # of a list


def read_states(path):
    """({video id: float32 [frames, S]}, names of the S numbers) of states.json, or of a LeRobot
    data set.
    """
    if not states and splits.is_lerobot(data, splits_dir):
        return lerobot.states_of(folder, lerobot.asked(settings), print)
    try:
        with open(path, encoding="utf-8") as file:
            known = {name: np.array(rows, np.float32) for name, rows in json.load(file).items()}
        widths = {rows.shape[1:] for rows in known.values()}
        if len(widths) != 1 or widths == {()}:
            raise ValueError("its rows are not all of as many numbers")
        names_path = os.path.join(os.path.dirname(path), "state_names.json")
        names = [str(number) for number in range(*widths.pop())]
        if os.path.exists(names_path):
            with open(names_path, encoding="utf-8") as file:
                names = json.load(file)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as states: {error}; it holds {{video id: [a row of numbers a"
            " frame]}"
        ) from None
    return known, names


known, names = read_states(states or os.path.join(folder, "states.json"))
encoders = probed.Encoders(settings, paths, place, print)


left_out = []


@functools.cache
def frames_of(row):
    """(frames of a video, how many of them `ahead` seconds are); (0, 0) where it has no states, and
    `left_out` says why.
    """
    try:
        if row.id not in known or row.path is None:
            raise VideoError(f"{row.id!r} has no {'states' if row.path else 'video'}")
        count = frame_count(row.path, row.start, row.end)
        if count != len(known[row.id]):
            raise VideoError(f"{row.path} has {count} frames, and states of {len(known[row.id])}")
        after = max(1, round(ahead * (fps or frame_rate(row.path))))
        if count - after < max(4, count // 4):
            raise VideoError(f"{row.path} ends too early: {count} frames, {after} of them ahead")
        return count, after
    except VideoError as error:
        left_out.append(str(error))
        return 0, 0


def usable(row):
    """Whether a window and what follows it fit into a video, and its states are there."""
    return frames_of(row) != (0, 0)


def windows_of(row):
    """[View] of a video's windows: half of it, or what `ahead` leaves, where the seed draws."""
    count, after = frames_of(row)
    random = Random(seed, 0, sample_id(row.id), STREAMS["half"])
    length = min(count // 2, count - after)
    starts = [random.below(count - after - length + 1) for _ in range(clips_a_video)]
    return [
        dataclasses.replace(
            encoders.view, window=((first + 0.25) / count, (first + length) / count)
        )
        for first in starts
    ]


def values_of(row):
    """float32 [clips, 2 K]: each value at a clip's last frame, and its change."""
    count, after = frames_of(row)
    lasts = [int(frame_numbers(count, view)[-1]) for view in windows_of(row)]
    now = known[row.id][lasts]
    return np.concatenate([now, known[row.id][[last + after for last in lasts]] - now], axis=1)


def labelled(made):
    """probing.Labelled of [(Row, numbers of its clips)]."""
    numbers = np.concatenate([part for _, part in made])
    videos = np.concatenate([np.full(len(part), i) for i, (_, part) in enumerate(made)])
    return probing.Labelled(numbers, np.concatenate([values_of(row) for row, _ in made]), videos)


def draw_by_labels(table, sizes, path):
    """R2 by the number of labelled videos, a panel a head and a line a source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(heads), figsize=(5 * len(heads), 4), squeeze=False)
    for panel, head in zip(panels[0], heads):
        for name, row in table.rows.items():
            columns = [f"{head}, {size}" for size in sizes]
            if columns[0] not in row:
                continue
            values = np.array([row[column].value for column in columns])
            ends = [
                row[column].interval() or (value,) * 2 for column, value in zip(columns, values)
            ]
            low, high = np.array(ends).T
            panel.errorbar(
                sizes, values, (values - low, high - values), label=name, capsize=3, marker="o"
            )
        panel.set(title=head, xscale="log", xlabel="labelled videos", ylabel="R2 of the states")
        panel.axhline(0, color="grey", linewidth=0.5)
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- tokens of all clips, once
train_rows = asked.drawn(train_split, train_videos, usable)
val_rows = asked.drawn(val_split, val_videos, usable)
if left_out:
    print(f"left out: {len(left_out)} videos, the first of them: {left_out[0]}")
if not train_rows or not val_rows:
    raise InputError(
        f"no video of the split {val_split if train_rows else train_split!r} has states in"
        f" {states or folder}: {left_out[0]}"
    )
count = (len(train_rows) + len(val_rows)) * clips_a_video
how = probing.Fitting(epochs=epochs, seed=seed)
scores = {}
with Features(features, encoders.sources, count) as kept:
    train = labelled(asked.fill(kept, encoders, train_split, train_rows, windows_of))
    held_out = labelled(asked.fill(kept, encoders, val_split, val_rows, windows_of))
    whole = len(np.unique(train.videos))
    sizes = sorted({min(size or whole, whole) for size in labels})
    jobs = [
        (size, source, head)
        for size in sizes
        for source in encoders.sources
        for head in heads
        if head in source.heads
    ]
    constant = np.ma.masked_invalid(train.y).mean(0).filled(np.nan)
    for size, source, head in tqdm(jobs, desc="fitting", unit="head", dynamic_ncols=True):
        found = []
        for draw in range(draws if size < whole else 1):
            videos = np.random.default_rng([seed, draw]).permutation(whole)[:size]
            some = train.of(np.isin(train.videos, videos))
            said = probing.probe(kept, source.name, head, some, held_out.numbers, how, place)
            found.append(verdict.Score(said, held_out.y, held_out.videos, constant))
        scores.setdefault(source.name, {})[f"{head}, {size}"] = verdict.mean_score(found)
asked.say_what_is_odd()

# ---- the table, its picture and its figures
table = probed.Table(scores, encoders.students, "R2")
print(
    f"states, {clips_a_video} clips of each of up to {whole} labelled and"
    f" {len(np.unique(held_out.videos))} held-out videos; columns: head, labelled videos"
)
for line in table.lines():
    print(line)
print(probed.peak_memory(place))
if out:
    values = names + [f"change of {name}" for name in names]
    content = {"table": table.to_dict(), "labels": sizes, "train_videos": whole}
    content["R2_of_each_value"] = {
        name: {
            column: {value: round(r2, 4) for value, r2 in zip(values, score.each) if r2 == r2}
            for column, score in row.items()
        }
        for name, row in table.rows.items()
    }
    content |= {"val_videos": len(np.unique(held_out.videos)), "failures": asked.failures}
    content |= {
        "val_videos_of_the_encoders_training": encoders.count_known(asked.known),
        "config": settings,
    }
    write_whole(out, json.dumps(content, indent=1).encode())
    draw_by_labels(table, sizes, out.removesuffix(".json") + ".png")
