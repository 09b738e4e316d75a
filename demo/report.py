"""What the demo's run came to: a table, out/demo/results.json and out/demo/report.png. demo/run.py
calls it last.

    python demo/report.py --out out/demo      draws again from what the run left

Ends with exit code 1 where the student did not learn.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config
from salt.errors import InputError
from salt.files import write_whole

# ----------------------------------------------------------------------------------------- settings
out = "out/demo"  # folder of a run of demo/run.py
record = 0  # held-out clip to draw
# -------------------------------------------------------------------------------------------------
config.apply(globals(), least={"record": 0})

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA

import model
from salt import ops
from salt.cache import open_cache
from salt.loader import Loader, Records
from salt.masks import in_order
from salt.score import show_interval

folder = Path(out) / "work"
if not (folder / "run.json").is_file():
    raise InputError(f"{folder} holds no finished run of demo/run.py; run that first")


# ---- results
def read_json(path):
    return json.loads(Path(path).read_text())


run = read_json(folder / "run.json")


def run_of(name):
    return next((folder / "checkpoints").glob(f"{name}_*"))


def read_metrics(run):
    return [json.loads(line) for line in open(run / "metrics.jsonl")]


logs = {name: read_metrics(run_of(name)) for name in ("teacher", "student")}
held_out = {name: [row for row in rows if "val_r2" in row] for name, rows in logs.items()}
evaluation = read_json(folder / "eval.json")["results"][0]
probed = read_json(folder / "probe_student.json")


def pick(row):
    return {"accuracy": row["accuracy"], "ci95": row["ci95"]}


probe = {
    "student": pick(probed),
    "teacher": pick(read_json(folder / "probe_teacher.json")),
    "untrained": pick(probed["untrained"]),
    "pixels": pick(probed["pixels"]),
}
results = {
    "r2": [row["val_r2"] for row in held_out["student"]],
    "r2_background": evaluation["r2_background"],
    "r2_lookup": evaluation["r2_lookup"],
    "r2_over_best": evaluation["r2_over_best"],
    "r2_ci95": evaluation["r2_ci95"],
    "probe": probe,
    "difference_ci95": probed["difference_ci95"],
    "teacher_r2": [row["val_r2"] for row in held_out["teacher"]],
    "evaluation": evaluation,
    "seconds": run["seconds"],
    "short": run["short"],
}
write_whole(Path(out) / "results.json", json.dumps(results, indent=1).encode())

# ---- one picture
salt, space, saved = model.load_salt(run_of("student") / "last.pth")
cache = open_cache(folder / "latents_val")
if record >= len(cache):
    raise InputError(f"--record is {record}, and there are {len(cache)} held-out clips")
grid, names = salt.student.config.grid, saved["settings"]["masks"]
batch = next(Loader(Records(cache), in_order([record], 1), names, saved["settings"]["eval_seed"]))
masks = batch.masks
with torch.no_grad():
    predictions = salt(batch.patches, masks)

figure = plt.figure(figsize=(15, 9.5), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.15])
left, right = bottom.subfigures(1, 2)
loss_axes, r2_axes, probe_axes = top.subplots(1, 3)
for name, log in logs.items():
    logged = [row for row in log if "loss" in row]
    loss_axes.plot(
        [row["step"] for row in logged],
        [row["loss"] for row in logged],
        label=f"{name} ({'pixels' if name == 'teacher' else 'latents'})",
    )
    r2_axes.plot(
        [row["step"] for row in held_out[name]],
        [row["val_r2"] for row in held_out[name]],
        "o-",
        label=name,
    )
loss_axes.set(title="training loss (MSE)", xlabel="step", ylim=(0, None))
loss_axes.legend()
r2_axes.axhline(
    evaluation["r2_background"], color="C1", ls=":", label="mean of the clip's own context"
)
r2_axes.axhline(
    evaluation["r2_lookup"], color="C1", ls="--", label="look-up among the training clips"
)
r2_axes.set(title="held-out R²  (0: per-position mean, 1: perfect)", xlabel="step", ylim=(-0.3, 1))
r2_axes.legend(loc="lower right")
heights = np.array([row["accuracy"] for row in probe.values()])  # [4]
ends = np.array([row["ci95"] or [row["accuracy"]] * 2 for row in probe.values()]).T  # [2, 4]
probe_axes.bar(list(probe), heights, color=["C1", "C0", "0.6", "0.8"])
probe_axes.errorbar(
    range(len(probe)), heights, np.abs(ends - heights), fmt="none", color="k", capsize=4
)
probe_axes.axhline(0.5, color="k", ls=":")
probe_axes.set(title="time-arrow probe: accuracy, 95 % by video", ylim=(0.3, 1))

clip = ops.unpatchify(cache.patches(record), grid, cache.patch, cache.tubelet)
shown = list(range(0, cache.view.frames, cache.tubelet * max(1, grid[0] // 4)))[:4]
axes = left.subplots(1 + len(masks), len(shown), squeeze=False)
left.suptitle(
    "a held-out clip and its masks: bright is context, blue is target, grey is neither", fontsize=10
)


def enlarge(values):
    return np.repeat(np.repeat(values, cache.patch, 0), cache.patch, 1)


for column, frame in enumerate(shown):
    axes[0, column].imshow(clip[frame])
    axes[0, column].set_title(f"frame {frame}", fontsize=8)
    for row, drawn in enumerate(masks, 1):
        state = np.zeros(int(np.prod(grid)))
        state[drawn.context[0].numpy()], state[drawn.target[0].numpy()] = 1, 2
        state = enlarge(state.reshape(grid)[frame // cache.tubelet])[..., None]
        grey = clip[frame].mean(-1, keepdims=True) * 0.25
        axes[row, column].imshow(
            np.where(
                state == 1, clip[frame], np.where(state == 2, grey + (20, 40, 140), grey + 60)
            ).astype(np.uint8)
        )
        axes[row, 0].set_ylabel(drawn.family)

axes2 = right.subplots(1 + len(masks), len(shown), squeeze=False)
right.suptitle(
    "its latents, three principal components as colours: the teacher's, and predicted at the"
    " targets",
    fontsize=10,
)
truth = space.all_targets(batch.patches, batch.latents)[0] - space.zero
some = np.concatenate([cache.latents(row) for row in range(min(50, len(cache)))]).astype(np.float32)
# per-position mean removed, here as below
some -= np.tile(space.zero.numpy(), (len(some) // len(truth), 1))
pca = PCA(3).fit(some)
low, high = np.percentile(pca.transform(some), (2, 98), axis=0)


def colour(values):
    return np.clip((pca.transform(values.numpy()) - low) / (high - low), 0, 1)


for column, frame in enumerate(shown):
    axes2[0, column].imshow(colour(truth).reshape(*grid, 3)[frame // cache.tubelet])
    for row, drawn in enumerate(masks, 1):
        image = np.ones((truth.shape[0], 3))
        image[drawn.target[0].numpy()] = colour(
            predictions[drawn.family][0].float() - space.zero[drawn.target[0]]
        )
        axes2[row, column].imshow(image.reshape(*grid, 3)[frame // cache.tubelet])
        axes2[row, 0].set_ylabel(drawn.family)
axes[0, 0].set_ylabel("clip"), axes2[0, 0].set_ylabel("teacher")
for axis in [*axes.flat, *axes2.flat]:
    axis.set(xticks=[], yticks=[])
figure.savefig(Path(out) / "report.png", dpi=80)


# ---- the table
def line(name, row):
    return f"{name:34} {row['accuracy']:8.3f}   {show_interval(row['ci95'])}"


print(f"\n=== results after {results['seconds']['all']:.0f} s")
r2_ends = show_interval(evaluation["r2_ci95"])
print(f"{'held-out R2 of the student':34} {evaluation['r2']:8.3f}   {r2_ends}")
for family, row in evaluation["families"].items():
    print(f"{'  ' + family + ' masks':34} {row['r2']:8.3f}")
print(f"{'  at each evaluation':34}   {' '.join(f'{value:.3f}' for value in results['r2'])}")
print(f"{'  mean of the clip own context':34} {evaluation['r2_background']:8.3f}")
print(f"{'  look-up among training clips':34} {evaluation['r2_lookup']:8.3f}")
beyond = show_interval(evaluation["r2_over_best_ci95"])
print(f"{'  from the best of these':34} {evaluation['r2_over_best']:8.3f}   {beyond}")
print(f"{'held-out R2 of the teacher (pixels)':34} {results['teacher_r2'][-1]:8.3f}")
for name, row in probe.items():
    print(line(f"time arrow, {name}", row))
difference = probed["difference_ci95"]
shown_ends = show_interval(difference, "+.3f")
if difference and difference[0] > 0:
    print(f"The student beats the untrained encoder at the time arrow by {shown_ends}.")
else:
    print(
        "The student does not beat the untrained encoder at the time arrow: "
        f"difference {shown_ends}."
    )
    if probe["teacher"]["ci95"] and probe["teacher"]["ci95"][0] > probe["untrained"]["accuracy"]:
        print(
            "Its teacher does, so the direction of time is in the targets: this student has not"
            f" taken it over in {run['steps']} steps."
        )
    else:
        print(
            "Nor does its teacher, beyond its interval: latents that do not tell the direction of"
            f" time cannot teach it. A teacher trained for {run['steps']} steps on"
            f" {run['train_videos']} videos is a weak one, and {run['val_videos']} held-out videos"
            " resolve no difference smaller than these intervals."
        )
print(f"written: {Path(out) / 'results.json'}, {Path(out) / 'report.png'}")
if not results["r2"][-1] > 0 or not results["r2"][-1] > results["r2"][0]:
    sys.exit(
        f"demo: the student did not learn: held-out R2 went from {results['r2'][0]:.3f} to"
        f" {results['r2'][-1]:.3f}; it must end above 0 and above its start"
    )
if not run["short"] and not results["r2"][-1] > 0.3:
    sys.exit(f"demo: held-out R2 ended at {results['r2'][-1]:.3f}; this demo reaches above 0.3")
