"""Violation of expectation: does a video that breaks a law of motion surprise the student's own
predictor more than its twin that does not? Nothing is fitted.

    python demo/make_videos.py --out DIR --twins 70
    python probe_surprise.py --checkpoint checkpoints/RUN/best.pth --teacher DIR_OR_CKPT \\
        --data DIR/twins --out X.json

Surprise is the mean squared error, in the checkpoint's space of targets, of the predictions at a
clip's masked positions: under the checkpoint's mask families, several draws of each, and under
`future`, where the first half of the clip is seen and the rest is asked for. No student was trained
on `future`, and it may not carry over to it; it is asked with the mask token of each family in
turn, and the errors are averaged. Both twins get the same masks.

A clip is cut as in training, but for its window: the widest about the frame of the event or, behind
a panel, about the first that may differ to the eye, so that half of the frames are before it; short
of half a video on one side, it runs in slow motion. A pair is left out where no such clip reaches
back to before the event, for then it does not show what went behind the panel.

What is gone cannot be mispredicted: where a body vanishes the error of any predictor falls. So the
lines that say whether the student beats a control, on the same pairs, weigh more than 0.5.

The table's share is of the pairs of which the impossible twin surprises more, ties as half ones, so
that chance is 0.5; its 95 % interval is over pairs; the per cent beside it are by how much more, of
the mean of both. Colour changes and flicker break no law: they stand apart, as controls.
"""

import json
import math
import os
from pathlib import Path
from typing import Literal

from salt import config, given_paths, runs
from salt.errors import InputError, VideoError
from salt.files import prepare_file, write_whole

# ----------------------------------------------------------------------------------------- settings
# one or more: best.pth or last.pth of train.py; or a run's name, folder or log: its best.pth
checkpoint: list[str] = []
data: str | None = None  # folder of twins.json and its videos
teacher: str | None = None  # that the checkpoints were trained on; not where they predict pixels
ema: bool = False  # probe the moving average of the weights (train.py --ema)
space: Literal["own", "none", "layer_norm", "standardise"] = "own"  # to compare checkpoints in
masks: list[str] = []  # mask families, and mask tokens for `future` [the checkpoints']
draws: int = 4  # masks of each family that a clip is asked under
untrained_seeds: int = 3  # untrained networks to compare with; 0: none
pair: str | None = None  # id of the pair in the plot [the first that breaks a law]
batch_size: int = 16  # clips a batch, two a pair
seed: int = 0  # of the masks
threads = max(1, (os.cpu_count() or 1))  # decoding threads
dtype: Literal["bf16", "fp32"] = "bf16"  # the networks' compute
device = "auto"  # auto, cpu, cuda or cuda:1
out: str | None = None  # JSON file for the results; a plot of the same name beside it
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    least={"draws": 1, "untrained_seeds": 0, "batch_size": 2, "seed": 0, "threads": 1},
)
given_paths.check(data=data, teacher=teacher)
paths = [runs.checkpoint_of(word) for word in checkpoint]

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
import torch
from tqdm import tqdm

import model
from benchmarks import budget
from salt import encoders, heldout, ops, probed, ranks, surprise, teachers, verdict
from salt.comparison import Table
from salt.loader import Batch, prefetch
from salt.odd_videos import odd_videos
from salt.score import show_interval

if not data or not checkpoint:
    raise InputError("give --checkpoint and --data; see --help")
prepare_file(out, endings=(".json",))
pairs = surprise.load_pairs(data)
if pair is not None and pair not in [each.id for each in pairs]:
    raise InputError(f"--pair {pair}: {data} has no pair of this id")
place = ranks.pick_device(device)
ops.keep_freed_memory(one_place=True)
odd_videos.watch(math.inf, tqdm.write)
slow = budget.slow_bf16(place, dtype)
if slow:
    print(slow)

# ---- checkpoints of one view, teacher, space and set of masks, and what makes their targets
loaded = {path: encoders.load_salt(path, place, ema) for path in paths}
table = Table(loaded, space, masks)
first, _, saved = loaded[paths[0]]
shape = first.student.config
encoder = None
if table.predicts_latents and not teacher:
    raise InputError(f"{paths[0]} predicts a teacher's latents: give --teacher, which makes them")
if table.predicts_latents:
    encoder = teachers.known_teacher(teacher, table.teacher, paths[0], place)
elif teacher:
    raise InputError(f"{paths[0]} predicts pixels, which need no teacher; leave --teacher out")

# ---- predictors: the students', untrained ones of the first one's shape, and none at all
networks = {}
students = []
for path, (salt, _, content) in loaded.items():
    name = "student" if len(paths) == 1 else probed.short_name(path, paths)
    students.append(name)
    networks[name] = surprise.network(salt, table.space, table.own_space(path))
    model.cast_matrices(salt, dtype)
    print(f"probing {path}, step {content['step']}{', its moving average' * ema}: {name}")
    files = [getattr(each, side) for each in pairs for side in surprise.SIDES]
    ids = heldout.hash_ids(f"{Path(file).stem}\t\n".encode() for file in files)
    seen = heldout.among(ids, (content.get("trained_on") or {}).get("ids"))
    if seen.any():
        print(f"{name} was trained on {seen.sum()} videos of these names: no test of surprise")
for number in range(untrained_seeds):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + number)
        salt = model.build_salt(shape, saved["predictor_config"]).to(place).eval()
    model.cast_matrices(salt, dtype)
    networks[f"untrained {number}"] = surprise.network(salt, table.space)
predictors = networks | {
    "mean of context": surprise.mean_of_context(table.space),
    "mean of position": surprise.mean_of_position(table.space),
    "frame difference": surprise.frame_difference(shape.grid, shape.tubelet),
}


# ---- the surprise of each pair
def read(each):
    """A pair's (clips, window), or the VideoError that it gives."""
    try:
        return surprise.read_pair(each, data, table.view)
    except VideoError as error:
        return error


def measure(waiting):
    """surprise.measure of [(Pair, its clips)]."""
    clips = torch.from_numpy(np.concatenate([clips for _, clips in waiting])).to(place)
    patches = ops.patchify(clips, shape.patch, shape.tubelet).contiguous()
    latents = teachers.teacher_latents(encoder, patches) if encoder else None
    names = [each.id for each, _ in waiting]
    passes = surprise.draw_passes(names, table.families, draws, seed, shape.grid, place)
    batch = Batch(torch.zeros(len(clips)), patches, latents, [])
    return surprise.measure(predictors, batch, passes, shape.grid[0])


parts = []
waiting = []
kept = []  # [(Pair, its window, whether its clips are the same up to the event)]
failures = []
jobs = prefetch(read, pairs, threads, batch_size)
for each, got in zip(pairs, tqdm(jobs, total=len(pairs), unit="pair", dynamic_ncols=True)):
    if isinstance(got, VideoError):
        failures.append(str(got))
        tqdm.write(f"left out: {got}")
        continue
    clips, window = got
    half = len(clips[0]) // 2
    kept.append((each, window, np.array_equal(clips[0, :half], clips[1, :half])))
    waiting.append((each, clips))
    if len(waiting) >= batch_size // 2:
        parts.append(measure(waiting))
        waiting = []
if waiting:
    parts.append(measure(waiting))
pairs = [each for each, _, _ in kept]
groups = surprise.groups_of(pairs)
if surprise.LAWS not in groups:
    raise InputError(f"no pair of {data} that breaks a law could be had: {failures[:1]}")
found = surprise.join(parts)
shares = surprise.shares(found, groups)
kinds = [*table.families, surprise.FUTURE]


def over_time(number):
    """{student: {kind: {side: [error a time slice, None where nothing was asked for]}}} of the
    clips of a pair.
    """
    curves = {}
    for name in students:
        curves[name] = {}
        for kind in kinds:
            sums, counts = found[name][kind][:, number]  # [2, S] each
            with np.errstate(invalid="ignore"):
                errors = [[None if e != e else float(e) for e in row] for row in sums / counts]
            curves[name][kind] = dict(zip(surprise.SIDES, errors))
    return curves


def draw_pair(curves, path):
    """Surprise over the time slices of one pair: a row a student, a panel a kind of mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    how = {"figsize": (4 * len(kinds), 3.2 * len(students)), "squeeze": False}
    figure, panels = pyplot.subplots(len(students), len(kinds), **how)
    for row, (name, of_kinds) in zip(panels, curves.items()):
        for panel, (kind, of_sides) in zip(row, of_kinds.items()):
            for side, errors in of_sides.items():
                panel.plot(np.array(errors, float), marker="o", label=side)
            panel.axvline(len(errors) / 2 - 0.5, color="grey", linewidth=0.5)  # the event
            panel.set(title=f"{name}, {kind}", xlabel="time slice", ylabel="error")
    panels[0, 0].legend()
    where = " behind a panel" * shown.occluded
    figure.suptitle(f"pair {shown.id}: {shown.event}{where}; the grey line is where they part")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cell(share):
    ends = show_interval(share.interval(), ".2f")
    return f"{share.value:.2f} {ends:>12} {100 * share.excess:+.1f} %"


# ---- the table, its picture and its figures
widths = np.array([window[1] - window[0] for _, window, _ in kept])
alike = sum(same for _, _, same in kept)
print(
    f"surprise of {len(pairs)} pairs, {len(failures)} left out; space: {table.name_of_space};"
    f" windows {widths.min():.2f} to {widths.max():.2f} of a video, median {np.median(widths):.2f};"
    f" {alike} pairs are the same up to the event"
)
print(f"{'share':32}" + "".join(f"{name:>28}" for name in shares))
for kind in kinds:
    for group, chosen in groups.items():
        row = [cell(shares[name][kind][group]) for name in shares]
        print(f"{kind + ', ' + group:27}{chosen.sum():5}" + "".join(f"{x:>28}" for x in row))
for student in students:
    for other in shares:
        for kind in kinds if other != student else ():
            both = [shares[name][kind][surprise.LAWS] for name in (student, other)]
            print(f"{kind}: {verdict.verdict(student, both[0], other, both[1])}")
print(probed.peak_memory(place))
if out:
    broken = [each for each in pairs if not each.control]
    shown = next((each for each in pairs if each.id == pair), broken[0])
    curves = over_time(pairs.index(shown))
    content = {"shares": {}, "pairs": [], "failures": failures, "config": settings}
    content["shown"] = {"id": shown.id, "event": shown.event, "over_time": curves}
    for name, of_kinds in shares.items():
        content["shares"][name] = {
            kind: surprise.to_dict(of_groups, {s: shares[s][kind] for s in students if s != name})
            for kind, of_groups in of_kinds.items()
        }
    for number, (each, window, same) in enumerate(kept):
        figures = {
            name: {kind: surprise.surprise_of(sums)[number].tolist() for kind, sums in row.items()}
            for name, row in found.items()
        }
        row = {"id": each.id, "event": each.event, "occluded": each.occluded, "window": window}
        content["pairs"].append(row | {"same_before": same, "surprise": figures})
    write_whole(out, json.dumps(content, indent=1).encode())
    draw_pair(curves, out.removesuffix(".json") + ".png")
