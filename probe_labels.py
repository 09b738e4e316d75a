"""Which action does a video show? Read from frozen features by heads that are fitted on the labels
of a data set's lists.

    python probe_labels.py --checkpoint checkpoints/RUN/best.pth --data DIR --out X.json
    python probe_labels.py --checkpoint RUN --data SSV2 --protocol vjepa2 --train_videos 0 \\
        --val_videos 0 --features DISK

`--protocol light` is for small sets: one clip a video, linear heads on 3x3 cells and an attentive
pooler, of whose twenty rates and decays a fifth of the training videos chooses one.

`--protocol vjepa2` is V-JEPA 2's for SSv2 (facebookresearch/vjepa2, configs/eval/vitl/ssv2.yaml and
evals/video_classification_frozen): a pooler of depth 4 with 16 heads, twenty of them at 5 rates x 4
decays in one pass, 20 epochs of batches of 256; 2 segments of a video, whose tokens are read as one
sequence; probabilities averaged over 3 squares along the longer side; and the best of the twenty on
the held-out videos is the figure. DIFFERENCES says in what it is not theirs. Tokens lie on the
disk: all of SSv2 takes 1.6 TB for each ViT-L with 1,568 tokens a clip, by arithmetic.
"""

import json
import math
import os
from typing import Literal

from salt import config, given_paths, runs
from salt.errors import InputError
from salt.files import prepare_file, write_whole

# ----------------------------------------------------------------------------------------- settings
# one or more: best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
checkpoint: list[str] = []
data: str | None = None  # data folder: videos and their lists, with labels
protocol: Literal["light", "vjepa2"] = "light"  # what the settings in [;] are where not given
heads: list[Literal["mean", "grid", "attentive"]] | None = None  # [grid,attentive; attentive]
depth: int | None = None  # of the attentive head, its cross-attention included [1; 4]
attention_heads: int = 16  # of an attentive head of depth > 1
segments: int | None = None  # of a video, whose tokens are read as one sequence [1; 2]
views: int | None = None  # squares along the longer side of a held-out video, averaged [1; 3]
epochs: int = 20  # of attentive heads; light: at least 200 steps
fit_batch_size: int | None = None  # videos a step of attentive heads [16; 256]
# permute the labels of the training videos: a control, which is at chance, of few classes only in
# the mean over seeds
shuffle_labels: bool = False
ema: bool = False  # probe the moving average of the weights (train.py --ema)
teacher: str | None = None  # probe it beside the student
train_split = "train"  # list that heads are fitted on
val_split = "validation"  # list that they are tested on
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
cameras: list[str] = []  # of a LeRobot data set: names, or their last parts [all]
window_seconds: float | None = None  # of a LeRobot data set: longer episodes become several rows
train_videos: int = 2000  # at most so many, drawn by the seed; 0: all
val_videos: int = 1000  # at most so many; 0: all
untrained_seeds: int = 3  # untrained encoders to compare with; 0: none
pixels: bool = True  # whether to probe pixels and frame differences, averaged down to 7x7
features: str | None = None  # folder for tokens, removed at the end [the system's temporary one]
batch_size: int = 16  # clips a batch of an encoder
seed: int = 0  # which videos, and heads' beginnings
threads = max(1, (os.cpu_count() or 1))  # decoding threads
dtype: Literal["bf16", "fp32"] = "bf16"  # the encoder's compute
device = "auto"  # auto, cpu, cuda or cuda:1
out: str | None = None  # JSON file for the results
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    least=dict.fromkeys(
        "depth attention_heads segments views epochs fit_batch_size batch_size threads".split(), 1
    )
    | dict.fromkeys("train_videos val_videos untrained_seeds seed".split(), 0),
)
given_paths.check(data=data, teacher=teacher)
paths = [runs.checkpoint_of(word) for word in checkpoint]

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
from tqdm import tqdm

from salt import ops, probed, probing, ranks, verdict
from salt.features import Features
from salt.odd_videos import odd_videos
from salt.views import SegmentView

PROTOCOLS = {
    "light": {"heads": ["grid", "attentive"], "depth": 1, "segments": 1, "views": 1}
    | {"fit_batch_size": 16, "least_steps": 200, "choose": True},
    "vjepa2": {"heads": ["attentive"], "depth": 4, "segments": 2, "views": 3}
    | {"fit_batch_size": 256, "least_steps": 1, "choose": False},
}
DIFFERENCES = [
    "training clips are cut once, the middle square of the middle of each segment; there they are"
    " cut anew each epoch, squares of 8 to 100 % of the frame anywhere, with RandAugment and random"
    " erasing",
    "a clip lies in the middle of a segment; there anywhere in it, in the test too",
    "frames are chosen and scaled as the checkpoint's view says; there 16 frames of 256 pixels,"
    " every fourth, and of a shorter video from its beginning, the last one repeated",
    "features are kept in float16, and poolers compute in bfloat16 on a GPU and in float32"
    " elsewhere; there in float16, with scaled losses",
]
if not data or not checkpoint:
    raise InputError("give --checkpoint and --data; see --help")
prepare_file(out, endings=(".json",))
place = ranks.pick_device(device)
ops.keep_freed_memory(one_place=True)
odd_videos.watch(math.inf, tqdm.write)
used = config.Settings(PROTOCOLS[protocol])
used.update((name, settings[name]) for name in used if settings.get(name) is not None)
how = probing.Fitting(
    epochs=epochs,
    batch_size=used.fit_batch_size,
    least_steps=used.least_steps,
    seed=seed,
    depth=used.depth,
    heads=attention_heads,
    choose=used.choose,
)

# ---- the videos and their classes
asked = probed.Asked(settings, print)
classes = sorted({row.label for row in asked.rows[train_split] if row.label is not None})
if len(classes) < 2:
    what = f"one label, {classes[0]!r}" if classes else "no labels"
    raise InputError(
        f"the list of the split {train_split!r} of {data} has {what}; a list that says what its"
        " videos show has a label (SSv2: a template) in each row, and at least two"
    )
number_of = {label: number for number, label in enumerate(classes)}
for split in (train_split, val_split):
    left_out = sum(row.label not in number_of for row in asked.rows[split])
    if left_out:
        print(f"{split}: {left_out} videos left out, whose label is none of the training list's")
drawn = {
    split: asked.drawn(split, most or None, lambda row: row.path and row.label in number_of)
    for split, most in ((train_split, train_videos), (val_split, val_videos))
}
if not drawn[val_split]:
    raise InputError(
        f"no video of the split {val_split!r} has a label of the training list, {classes[0]!r} for"
        " one; are the lists of one data set?"
    )
encoders = probed.Encoders(settings, paths, place, print)
if used.views > 1 and encoders.view.crop == "squash":
    raise InputError(
        f"the checkpoint sees whole frames made square, of which there are no {used.views} squares;"
        " give --views 1"
    )
if used.depth > 1 and "attentive" in used.heads:
    for source in encoders.sources:
        if "attentive" in source.heads and source.dim % attention_heads:
            raise InputError(
                f"tokens of the {source.name} have {source.dim} numbers, which do not divide into"
                f" {attention_heads} heads; give another --attention_heads"
            )


def cuts(count):
    """[SegmentView] of a video: all segments of each of `count` squares; of one, the middle one."""
    view = encoders.view
    fields = view.to_dict() | {"segments": used.segments}
    if used.views > 1:
        fields["short_side"] = view.size  # squares as high, or wide, as the frame
    return [
        SegmentView(**fields, segment=segment, along=square / (count - 1) if count > 1 else None)
        for square in range(count)
        for segment in range(used.segments)
    ]


def labelled(made, count):
    """probing.Labelled of [(Row, numbers of its clips)]: `count` items a video, of all segments."""
    numbers = np.concatenate([part.reshape(count, -1) for _, part in made])
    y = np.repeat([number_of[row.label] for row, _ in made], count)
    return probing.Labelled(numbers, y, np.repeat(np.arange(len(made)), count))


def answered(said, y):
    """(verdict.Score of the best, its number) of said: probabilities float [m, K] of one head or
    [C, m, K] of several, a row a square; averaged over the squares of a video.
    """
    mean = said.reshape(-1, len(y), used.views, said.shape[-1]).mean(2)  # [C, videos, K]
    right = (mean.argmax(-1) == y).mean(1)
    best = int(right.argmax())
    return verdict.Score(mean[best].argmax(-1), y, np.arange(len(y))), best


# ---- tokens of all clips, once; then head by head
count = len(drawn[train_split]) + len(drawn[val_split]) * used.views
scores, chosen = {}, {}
with Features(features, encoders.sources, count * used.segments) as kept:
    made = asked.fill(kept, encoders, train_split, drawn[train_split], lambda row: cuts(1))
    train = labelled(made, 1)
    if np.sort(np.bincount(train.y, minlength=2))[-2] < 2:
        raise InputError(
            f"of the {len(made)} training videos no two labels have two each; give more"
            " --train_videos"
        )
    if shuffle_labels:
        train = train._replace(y=np.random.default_rng([seed, 1]).permutation(train.y))
    made = asked.fill(kept, encoders, val_split, drawn[val_split], lambda row: cuts(used.views))
    held_out = labelled(made, used.views)
    y = held_out.y[:: used.views]
    jobs = [
        (source, head)
        for source in encoders.sources
        for head in [head for head in used.heads if head in source.heads] or source.heads[:1]
    ]
    for source, head in tqdm(jobs, desc="fitting", unit="head", dynamic_ncols=True):
        said = probing.answers(kept, source.name, head, train, held_out.numbers, how, place)
        score, best = answered(said, y)
        scores.setdefault(source.name, {})[head] = score
        if said.ndim == 3:
            rate, decay = divmod(best, len(probing.DECAYS))
            chosen[source.name] = {"lr": probing.RATES[rate], "wd": probing.DECAYS[decay]}
asked.say_what_is_odd()
commonest = float((y == np.bincount(train.y).argmax()).mean())

# ---- the table and its figures
table = probed.Table(scores, encoders.students, "accuracy")
shuffled = ", whose labels are SHUFFLED: a control" * shuffle_labels
print(
    f"labels, protocol {protocol}: {len(np.unique(train.y))} of {len(classes)} classes in"
    f" {len(train.y)} training videos{shuffled}; {len(y)} held-out videos, {used.segments} segments"
    f" x {used.views} squares of each; always the commonest class: {commonest:.3f}"
)
if protocol == "vjepa2":
    for line in DIFFERENCES:
        print(f"not as V-JEPA 2: {line}")
for name, grid in chosen.items():
    print(
        f"{name}: best of {len(probing.RATES) * len(probing.DECAYS)} heads is lr {grid['lr']:g} wd"
        f" {grid['wd']:g}, chosen by the held-out videos as V-JEPA 2 does, so too high for new ones"
    )
for line in table.lines():
    print(line)
for student in encoders.students:  # beside those that have other heads
    for other, row in table.rows.items():
        if not row.keys() & scores[student].keys():
            head, theirs = next(reversed(scores[student])), next(iter(row))
            names = f"{student} ({head})", f"{other} ({theirs})"
            print(verdict.verdict(names[0], scores[student][head], names[1], row[theirs]))
print(probed.peak_memory(place))
if out:
    content = {"table": table.to_dict(), "protocol": protocol, "used": used, "chosen": chosen}
    content |= {"classes": classes, "commonest": commonest, "shuffled": shuffle_labels}
    content |= {"train_videos": len(train.y), "val_videos": len(y), "failures": asked.failures}
    content |= {"differences": DIFFERENCES if protocol == "vjepa2" else []}
    content |= {
        "val_videos_of_the_encoders_training": encoders.count_known(asked.known),
        "config": settings,
    }
    write_whole(out, json.dumps(content, indent=1).encode())
