"""What the demo's run came to: a table, out/demo/results.json and out/demo/report.png. demo/run.py
calls it last.

    python demo/report.py --out out/demo      draws again from what the run left

What is to be shown was fixed before the settings were: that the student beats untrained encoders of
its shape at the states of bodies, read by attentive heads from 30 and from 300 labelled videos, and
at surprise. Ends with exit code 1 where held-out R2 did not rise, or, but for --short, not above 0;
where the student beats nobody, it says so.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config
from salt.errors import InputError
from salt.files import write_whole

# ----------------------------------------------------------------------------------------- settings
out = "out/demo"  # folder of a run of demo/run.py
record: int | None = None  # held-out clip to draw [that whose latents change most over time]
# -------------------------------------------------------------------------------------------------
config.apply(globals(), least={"record": 0})

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA

from salt import encoders, ops
from salt.cache import open_cache
from salt.clips import Records
from salt.loader import Loader
from salt.masks import in_order
from salt.score import show_interval
from salt.verdict import sentence

folder = Path(out) / "work"
if not (folder / "run.json").is_file():
    raise InputError(f"{folder} holds no finished run of demo/run.py; run that first")


# ---- results
def read_json(name):
    return json.loads((folder / name).read_text())


def run_of(name):
    return next((folder / "checkpoints").glob(f"{name}_*"))


run = read_json("run.json")
logs = {}  # a row a line of a run's log
for name in ("teacher", "student") if run["teacher"] == "own" else ("student",):
    logs[name] = [json.loads(line) for line in open(run_of(name) / "metrics.jsonl")]
held_out = {name: [row for row in rows if "val_r2" in row] for name, rows in logs.items()}
evaluation = read_json("eval.json")["results"][0]
states, surprise, arrow = map(read_json, ("states.json", "surprise.json", "time_arrow.json"))


def untrained_of(rows):
    return next((name for name in rows if name.startswith("untrained, ")), "untrained 0")


def compared(rows, column, unit, controls):
    """{source: {unit, 'ci95', 'student minus this'}} of a probe's table; the first head of a
    control that has not this one.
    """
    found = {}
    for name in ("student", untrained_of(rows), *controls):
        row = rows.get(name, {})
        cell = row.get(column) or row.get(column.replace("attentive", "grid"))
        if cell:
            found[name.split(",")[0].removesuffix(" 0")] = {
                key: cell.get(key) for key in (unit, "ci95", "student minus this")
            }
    return found


probes = {
    f"states, R2, {size} labelled videos": compared(
        states["table"], f"attentive, {size}", "R2", ("teacher", "pixels 7x7")
    )
    for size in states["labels"]
}
for kind in surprise["shares"]["student"]:
    rows = {name: of_groups[kind] for name, of_groups in surprise["shares"].items()}
    probes[f"surprise, share of pairs, {kind} masks"] = compared(
        rows, "all", "share", ("mean of context", "frame difference")
    )
for head in arrow["table"]["student"]:
    probes[f"time arrow, accuracy, {head} head"] = compared(
        arrow["table"], head, "accuracy", ("teacher", "pixels 7x7")
    )
results = {
    "r2": [row["val_r2"] for row in held_out["student"]],
    "r2_background": evaluation["r2_background"],
    "r2_lookup": evaluation["r2_lookup"],
    "r2_over_best": evaluation["r2_over_best"],
    "r2_ci95": evaluation["r2_ci95"],
    "probes": probes,
    "evaluation": evaluation,
    "run": run,
}
if run["teacher"] == "own":
    results["teacher_r2"] = [row["val_r2"] for row in held_out["teacher"]]

# ---- one picture: curves above, a clip and its latents over time below
salt, space, saved = encoders.load_salt(run_of("student") / "last.pth")
cache = open_cache(folder / "latents_validation")
if record is not None and record >= len(cache):
    raise InputError(f"--record is {record}, and there are {len(cache)} held-out clips")
c = salt.student.config
slices = c.grid[0]


def changing(row):
    """How much a clip's latents change from slice to slice."""
    latents = cache.latents(row).astype(np.float32).reshape(slices, -1)
    return float(np.diff(latents, axis=0).var())


record = max(range(len(cache)), key=changing) if record is None else record
settings = saved["settings"]
batch = next(
    Loader(Records(cache), in_order([record], 1), settings["masks"], settings["eval_seed"])
)
with torch.no_grad():
    predictions = salt(batch.patches, batch.masks)

heights = [6.5, 1.4 * (2 + len(batch.masks))]
figure = plt.figure(figsize=(15, sum(heights)), layout="constrained")
parts: Any = figure.subfigures(2, 1, height_ratios=heights)
top, bottom = parts
(loss_axes, r2_axes), (state_axes, surprise_axes) = top.subplots(2, 2)
for name, log in logs.items():
    logged = [row for row in log if "loss" in row]
    steps = [row["step"] for row in logged]
    loss_axes.plot(steps, [row["loss"] for row in logged], label=name)
    steps = [row["step"] for row in held_out[name]]
    r2_axes.plot(steps, [row["val_r2"] for row in held_out[name]], "o-", label=name)
loss_axes.set(title="training loss (MSE)", xlabel="step", ylim=(0, None))
background, lookup = evaluation["r2_background"], evaluation["r2_lookup"]
r2_axes.axhline(background, color="0.4", ls=":", label="mean of the clip's own context")
r2_axes.axhline(lookup, color="0.4", ls="--", label="look-up among the training clips")
r2_axes.set(title="held-out R²  (0: per-position mean)", xlabel="step")
lowest = min(0.0, background, lookup, *results["r2"][1:])
r2_axes.set_ylim(lowest - 0.1, min(1, max(background, lookup, *results["r2"]) + 0.2))
sizes = states["labels"]
for name, row in states["table"].items():
    cells = [row.get(f"attentive, {size}") or row.get(f"grid, {size}") for size in sizes]
    if name.startswith("untrained ") or not all(cells):
        continue  # one seed
    middle = np.array([cell["R2"] for cell in cells])
    ends = np.array([cell["ci95"] or (cell["R2"],) * 2 for cell in cells]).T
    state_axes.errorbar(sizes, middle, abs(ends - middle), marker="o", capsize=3, label=name)
state_axes.axhline(0, color="0.6", lw=0.5)
state_axes.set(title="states of bodies: R², 95 % by video", xlabel="labelled videos", xscale="log")
shown = surprise["shown"]
for color, (kind, sides) in zip(("C0", "C1", "C2"), shown["over_time"]["student"].items()):
    for style, (side, errors) in zip(("--", "-"), sides.items()):
        surprise_axes.plot(np.array(errors, float), color + style, label=f"{kind}, {side}")
title = f"surprise over time: one body does this: {shown['event']}"
surprise_axes.set(title=title, xlabel="time slice; the event is half-way")
surprise_axes.set_ylim(0, 1.2 * surprise_axes.get_ylim()[1])
for axis in (loss_axes, r2_axes, state_axes, surprise_axes):
    axis.legend(fontsize=8)

clip = ops.unpatchify(cache.patches(record), c.grid, cache.patch, cache.tubelet)
axes = bottom.subplots(2 + len(batch.masks), slices, squeeze=False)
bottom.suptitle(
    "a held-out clip over time; the teacher's latents, three principal components of what differs"
    " from the per-position mean; below, predicted where the student did not look",
    fontsize=10,
)
truth = space.all_targets(batch.patches, batch.latents)[0]  # [N, D]
beyond = (truth - space.zero).numpy()  # what the per-position mean does not say
pca = PCA(3).fit(beyond)
low, high = np.percentile(pca.transform(beyond), (2, 98), axis=0)


def colour(values):
    return np.clip((pca.transform(values) - low) / (high - low), 0, 1)


rows = {"clip": None, "teacher": colour(beyond)}
for drawn in batch.masks:
    rows[drawn.family] = np.ones((len(truth), 3))
    target = drawn.target[0].numpy()
    predicted = predictions[drawn.family][0].float() - space.zero[target]
    rows[drawn.family][target] = colour(predicted.numpy())
for line, (name, colours) in zip(axes, rows.items()):
    line[0].set_ylabel(name)
    for number, axis in enumerate(line):
        axis.set(xticks=[], yticks=[])
        if colours is None:
            axis.imshow(clip[number * cache.tubelet + cache.tubelet - 1])
        else:
            axis.imshow(colours.reshape(*c.grid, 3)[number])
figure.savefig(Path(out) / "report.png", dpi=80)
write_whole(Path(out) / "results.json", json.dumps(results, indent=1).encode())


# ---- the table, and what it allows one to say
def show(name, value, ends):
    print(f"{name:52} {value:8.3f}   {show_interval(ends)}")


print(f"\n=== results after {run['seconds']['all']:.0f} s, seed {run['seed']}")
show("held-out R2 of the student", evaluation["r2"], evaluation["r2_ci95"])
for family, row in evaluation["families"].items():
    print(f"{'  ' + family + ' masks':52} {row['r2']:8.3f}")
print(f"{'  at each evaluation':52}   {' '.join(f'{value:.3f}' for value in results['r2'])}")
print(f"{'  mean of the clip own context':52} {background:8.3f}")
print(f"{'  look-up among training clips':52} {lookup:8.3f}")
show("  from the best of these", evaluation["r2_over_best"], evaluation["r2_over_best_ci95"])
if run["teacher"] == "own":
    print(f"{'held-out R2 of the teacher (pixels)':52} {results['teacher_r2'][-1]:8.3f}")
for title, found in probes.items():
    for name, cell in found.items():
        value = next(iter(cell.values()))
        show(f"{title}: {name}" if name == "student" else f"  {name}", value, cell["ci95"])
for title, found in probes.items():
    if title.startswith(("states", "surprise")):
        difference = found["untrained"]["student minus this"]
        names = f"{title}: the student", "the untrained encoder"
        print(sentence(*names, difference["value"], difference["ci95"]))
print(f"written: {Path(out) / 'results.json'}, {Path(out) / 'report.png'}")
first, *_, last = results["r2"]
if not last > first or not (last > 0 or run["short"]):
    sys.exit(
        f"demo: the student did not learn: held-out R2 went from {first:.3f} to {last:.3f}; it must"
        " end above its start, and, but for --short, above 0"
    )
