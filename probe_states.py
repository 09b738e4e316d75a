"""What an encoder saves in labels: states of bodies, read from its frozen features by heads that
are fitted on few labelled videos.

    python probe_states.py --checkpoint checkpoints/RUN/best.pth --data DIR --out X.json

DIR/states.json holds {video id: [a row of numbers a frame]}. Each clip ends a second before its
video does at the latest; a head says each value at the clip's last frame, and how much it changes
over the next second. R2 is 0 for the training videos' mean, and its mean over values is shown.
"""

import dataclasses
import functools
import json
import math
import os
from typing import Literal

from salt import config, runs
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
train_videos: int = 2000  # at most so many, drawn by the seed
val_videos: int = 1000  # at most so many
labels: list[int] = [10, 30, 100, 300, 0]  # labelled training videos; 0: all
draws: int = 5  # of as many labelled videos, the mean of which is shown
heads: list[Literal["mean", "grid", "attentive"]] = ["grid", "attentive"]
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
config.check_paths(data=data, teacher=teacher)
paths = [runs.checkpoint_of(word) for word in checkpoint]

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
from tqdm import tqdm

from salt import ops, probed, probing, ranks
from salt.containers import frame_rate
from salt.masks import STREAMS, Random
from salt.odd_videos import odd_videos
from salt.views import frame_numbers, sample_id

if not data or not checkpoint:
    raise InputError("give --checkpoint and --data; see --help")
prepare_file(out, endings=(".json",))
place = ranks.pick_device(device)
ops.return_freed_memory()
odd_videos.watch(math.inf, tqdm.write)

# ---- the states, and which window of a video ends how early
states_path = states or os.path.join(data, "states.json")
try:
    with open(states_path, encoding="utf-8") as file:
        known = {name: np.array(rows, np.float32) for name, rows in json.load(file).items()}
except (OSError, ValueError, AttributeError) as error:
    raise InputError(
        f"{states_path} cannot be read as states: {error}; it holds {{video id: [a row of numbers a"
        " frame]}"
    ) from None
lacking = sum(np.isnan(rows).any() for rows in known.values())
if lacking:
    raise InputError(
        f"{states_path} has values that are missing (null) in {lacking} of {len(known)} videos, and"
        " heads are fitted on whole rows; give --states a file of the columns that are always there"
    )
asked = probed.Asked(settings, print)
encoders = probed.Encoders(settings, paths, place, print)


@functools.cache
def frames_of(row):
    """(frames that states.json has of a video, how many of them `ahead` seconds are)."""
    return len(known[row.id]), max(1, round(ahead * (fps or frame_rate(row.path))))


def usable(row):
    """Whether a window and what follows it fit into a video, and its states are there."""
    if row.path is None or row.id not in known or row.start is not None or row.end is not None:
        return False
    try:
        count, after = frames_of(row)
    except VideoError:
        return False
    return count - after >= max(4, count // 4)


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
for split in (train_split, val_split):
    left_out = len(asked.rows[split]) - sum(map(usable, asked.rows[split]))
    if left_out:
        print(
            f"{split}: {left_out} videos are broken, too short, or have no states in {states_path}"
        )
count = (len(train_rows) + len(val_rows)) * clips_a_video
how = probing.Fitting(epochs=epochs, seed=seed)
scores = {}
with probing.Features(features, encoders.sources, count) as kept:
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
    constant = train.y.mean(0)
    for size, source, head in tqdm(jobs, desc="fitting", unit="head", dynamic_ncols=True):
        found = []
        for draw in range(draws if size < whole else 1):
            videos = np.random.default_rng([seed, draw]).permutation(whole)[:size]
            some = train.of(np.isin(train.videos, videos))
            said = probing.probe(kept, source.name, head, some, held_out.numbers, how, place)
            found.append(probing.Score(said, held_out.y, held_out.videos, constant))
        scores.setdefault(source.name, {})[f"{head}, {size}"] = probing.mean_score(found)
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
    content = {"table": table.to_dict(), "labels": sizes, "train_videos": whole}
    content |= {"val_videos": len(np.unique(held_out.videos)), "failures": asked.failures}
    content |= {
        "val_videos_of_the_encoders_training": encoders.count_known(asked.known),
        "config": settings,
    }
    write_whole(out, json.dumps(content, indent=1).encode())
    draw_by_labels(table, sizes, out.removesuffix(".json") + ".png")
