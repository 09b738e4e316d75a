"""The whole of SALT on a small physics-video data set made on the spot: videos, teacher, cache, student, evaluation, probe.

    python demo/run.py              about ten minutes on two CPU cores
    python demo/run.py --short      about two minutes: the same stages, fewer videos and steps

Every stage is the script a real run uses, with small sizes. Ends in a table, out/demo/results.json and out/demo/report.png.
"""
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: E402

# ------------------------------------------------------------------------------------------------------------- settings
out = "out/demo"               # folder of everything the demo makes; its videos are kept between runs
short = False                  # fewer videos and steps, for a quick check
train_videos: int | None = None  # training videos [400, short 96]
val_videos: int | None = None    # held-out videos [100, short 32]
steps: int | None = None       # training steps of the teacher and of the student [500, short 80]
batch_size: int | None = None  # clips a step [16]
seed = 0                       # of videos, weights, masks and order
# -----------------------------------------------------------------------------------------------------------------------
config.apply(globals())
train_videos, val_videos = train_videos or (96 if short else 400), val_videos or (32 if short else 100)
steps, batch_size = steps or (80 if short else 500), batch_size or 16

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
from cache import open_cache, write_whole  # noqa: E402

root, began = Path(__file__).resolve().parent.parent, time.time()
taken = {}
folder, marker = Path(out) / "work", Path(out) / "work" / "made_by_the_demo"
if folder.exists() and not marker.exists():
    raise config.InputError(f"{folder} is there and was not made by the demo; choose another --out")
shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
folder.mkdir(parents=True)
marker.touch()
for name in ("results.json", "report.png"):
    (Path(out) / name).unlink(missing_ok=True)


def stage(title, script, **flags):
    """Run one script as a user would, and stop where it fails."""
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flags.items()]
    print(f"\n=== {title}\n$ python {script} {' '.join(words)}", flush=True)
    start = time.time()
    code = subprocess.run([sys.executable, str(root / script), *words]).returncode
    if code:
        sys.exit(f"demo: {script} failed with exit code {code} at: {title}")
    taken[title] = round(time.time() - start, 1)


def run_of(name):
    return next((folder / "checkpoints").glob(f"{name}_*"))


small = {"size": "tiny", "depth": 6, "predictor_dim": 128, "predictor_depth": 4, "predictor_heads": 4, "batch_size": batch_size, "max_steps": steps, "lr": 2e-3,
         "weight_decay_end": 0.05, "grad_clip": 1.0, "eval_every": max(1, steps // 5), "seed": seed, "checkpoints": folder / "checkpoints", "run_logs": folder / "run_logs"}
generator = hashlib.sha256((root / "demo" / "make_videos.py").read_bytes()).hexdigest()[:8]
videos = Path(out) / f"videos_{train_videos}_{val_videos}_{seed}_{generator}"  # kept between runs, while their generator is the same
stage("videos", "demo/make_videos.py", out=videos, train=train_videos, validation=val_videos, seed=seed)
stage("clips of the training videos", "cache_latents.py", data=videos, split="train", teacher="none", resolution=96, out=folder / "clips")
stage("clips of the held-out videos", "cache_latents.py", data=videos, split="validation", teacher="none", resolution=96, out=folder / "clips_val")
stage("stage 1: the teacher, from pixels", "train.py", target="pixels", masks="ratio", cache=folder / "clips", val_cache=folder / "clips_val", run_name="teacher", **small)
teacher = run_of("teacher") / "best.pth"
stage("the teacher's latents", "cache_latents.py", teacher=teacher, clips_from=folder / "clips", out=folder / "latents")
stage("its held-out latents", "cache_latents.py", teacher=teacher, clips_from=folder / "clips_val", out=folder / "latents_val")
stage("stage 2: the student, from latents", "train.py", cache=folder / "latents", val_cache=folder / "latents_val", run_name="student", **small)
student = run_of("student") / "best.pth"
stage("evaluation", "eval_distill.py", checkpoint=student.with_name("last.pth"), cache=folder / "latents_val", out=folder / "eval.json")
probing = {"data": videos, "train_videos": train_videos, "val_videos": val_videos, "seed": seed}
stage("time-arrow probe of the student", "probe_time_arrow.py", checkpoint=student, out=folder / "probe_student.json", untrained_seeds=1 if short else 3, **probing)
stage("time-arrow probe of the teacher", "probe_time_arrow.py", checkpoint=teacher, out=folder / "probe_teacher.json", untrained_seeds=0, pixels=False, **probing)

# ---- results
read_json = lambda path: json.loads(Path(path).read_text())
read_metrics = lambda run: [json.loads(line) for line in open(run / "metrics.jsonl")]
logs = {name: read_metrics(run_of(name)) for name in ("teacher", "student")}
held_out = {name: [row for row in rows if "val_r2" in row] for name, rows in logs.items()}
evaluation, probed = read_json(folder / "eval.json")["results"][0], read_json(folder / "probe_student.json")
pick = lambda row: {"accuracy": row["accuracy"], "ci95": row["ci95"]}
probe = {"student": pick(probed), "teacher": pick(read_json(folder / "probe_teacher.json")), "untrained": pick(probed["untrained"]), "pixels": pick(probed["pixels"])}
results = {"r2": [row["val_r2"] for row in held_out["student"]], "r2_background": evaluation["r2_background"], "r2_ci95": evaluation["r2_ci95"], "probe": probe,
           "teacher_r2": [row["val_r2"] for row in held_out["teacher"]], "evaluation": evaluation, "difference_ci95": probed["difference_ci95"],
           "seconds": {**taken, "all": round(time.time() - began, 1)}, "short": short}
write_whole(Path(out) / "results.json", json.dumps(results, indent=1).encode())

# ---- one picture
salt, space, saved = model.load_salt(student)
cache = open_cache(folder / "latents_val")
grid, names = salt.student.config.grid, saved["settings"]["masks"]
record = 0
batch = data.Batch(torch.tensor([data.sample_id(cache.ids[record])]), torch.from_numpy(cache.patches(record))[None], torch.from_numpy(cache.latents(record))[None])
masks = {family: model.sample_masks(batch.ids, 0, saved["settings"]["eval_seed"], family, grid) for family in names}
with torch.no_grad():
    predictions = salt(batch.patches, masks)

figure = plt.figure(figsize=(15, 12), layout="constrained")
rows = figure.subfigures(3, 1, height_ratios=[1, 0.9, 0.9])
loss_axes, r2_axes, probe_axes = rows[0].subplots(1, 3)
for name, log in logs.items():
    loss_axes.plot([row["step"] for row in log if "loss" in row], [row["loss"] for row in log if "loss" in row], label=f"{name} ({'pixels' if name == 'teacher' else 'latents'})")
    r2_axes.plot([row["step"] for row in held_out[name]], [row["val_r2"] for row in held_out[name]], "o-", label=name)
loss_axes.set(title="training loss (MSE)", xlabel="step", ylim=(0, None))
loss_axes.legend()
r2_axes.axhline(evaluation["r2_background"], color="C1", ls=":", label="mean of the clip's own context")
r2_axes.set(title="held-out R²  (0: per-position mean, 1: perfect)", xlabel="step", ylim=(-0.3, 1))
r2_axes.legend(loc="lower right")
heights = [row["accuracy"] for row in probe.values()]
probe_axes.bar(list(probe), heights, color=["C1", "C0", "0.6", "0.8"])
probe_axes.errorbar(range(len(probe)), heights, [[h - row["ci95"][0] for h, row in zip(heights, probe.values())], [row["ci95"][1] - h for h, row in zip(heights, probe.values())]], fmt="none", color="k", capsize=4)
probe_axes.axhline(0.5, color="k", ls=":")
probe_axes.set(title="time-arrow probe: accuracy, 95 % by video", ylim=(0.3, 1))

clip = data.unpatchify(cache.patches(record), grid, cache.patch, cache.tubelet)
shown = list(range(0, cache.view.frames, cache.tubelet * max(1, grid[0] // 4)))[:4]
axes = rows[1].subplots(1 + len(masks), len(shown), squeeze=False)
rows[1].suptitle("masks of a held-out clip: bright is context, blue is target, grey is neither")
enlarge = lambda values: np.repeat(np.repeat(values, cache.patch, 0), cache.patch, 1)
for column, frame in enumerate(shown):
    axes[0, column].imshow(clip[frame])
    axes[0, column].set_title(f"frame {frame}", fontsize=8)
    for row, (family, drawn) in enumerate(masks.items(), 1):
        state = np.zeros(int(np.prod(grid)))
        state[drawn.context[0].numpy()], state[drawn.target[0].numpy()] = 1, 2
        state = enlarge(state.reshape(grid)[frame // cache.tubelet])[..., None]
        grey = clip[frame].mean(-1, keepdims=True) * 0.25
        axes[row, column].imshow(np.where(state == 1, clip[frame], np.where(state == 2, grey + (20, 40, 140), grey + 60)).astype(np.uint8))
        axes[row, column].set_ylabel(family)

axes2 = rows[2].subplots(1 + len(masks), len(shown), squeeze=False)
rows[2].suptitle("latents as colours (three principal components of this clip, per-position mean removed): true, then predicted at the targets")
truth = space.all_targets(batch.patches, batch.latents)[0] - space.zero
pca = PCA(3).fit(truth.numpy())
low, high = np.percentile(pca.transform(truth.numpy()), (2, 98), axis=0)
colour = lambda values: np.clip((pca.transform(values.numpy()) - low) / (high - low), 0, 1)
for column, frame in enumerate(shown):
    axes2[0, column].imshow(colour(truth).reshape(*grid, 3)[frame // cache.tubelet])
    for row, (family, drawn) in enumerate(masks.items(), 1):
        image = np.ones((truth.shape[0], 3))
        image[drawn.target[0].numpy()] = colour(predictions[family][0].float() - space.zero[drawn.target[0]])
        axes2[row, column].imshow(image.reshape(*grid, 3)[frame // cache.tubelet])
        axes2[row, column].set_ylabel(family)
axes[0, 0].set_ylabel("clip"), axes2[0, 0].set_ylabel("true")
for axis in [*axes.flat, *axes2.flat]:
    axis.set(xticks=[], yticks=[])
figure.savefig(Path(out) / "report.png", dpi=80)

# ---- the table
line = lambda name, row: f"{name:34} {row['accuracy']:8.3f}   [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]"
print(f"\n=== results after {results['seconds']['all']:.0f} s")
print(f"{'held-out R2 of the student':34} {evaluation['r2']:8.3f}   [{evaluation['r2_ci95'][0]:.3f}, {evaluation['r2_ci95'][1]:.3f}]")
for family, row in evaluation["families"].items():
    print(f"{'  ' + family + ' masks':34} {row['r2']:8.3f}")
print(f"{'  at each evaluation':34}   {' '.join(f'{value:.3f}' for value in results['r2'])}")
print(f"{'  mean of the clip own context':34} {evaluation['r2_background']:8.3f}")
print(f"{'held-out R2 of the teacher (pixels)':34} {results['teacher_r2'][-1]:8.3f}")
for name, row in probe.items():
    print(line(f"time arrow, {name}", row))
low, high = probed["difference_ci95"]
if low > 0:
    print(f"The student beats the untrained encoder at the time arrow by [{low:+.3f}, {high:+.3f}].")
else:
    print(f"The student does not beat the untrained encoder at the time arrow: difference [{low:+.3f}, {high:+.3f}].")
    beyond = probe["teacher"]["ci95"][0] > probe["untrained"]["accuracy"]
    print("Its teacher does, so the direction of time is in the targets: this student has not taken it over in "
          f"{steps} steps." if beyond else "Nor does its teacher, beyond its interval: latents that do not tell the direction of time cannot teach it. A teacher trained "
          f"for {steps} steps on {train_videos} videos is a weak one; and {val_videos} held-out videos resolve no difference smaller than these intervals.")
print(f"written: {Path(out) / 'results.json'}, {Path(out) / 'report.png'}")
if not results["r2"][-1] > 0 or not results["r2"][-1] > results["r2"][0]:
    sys.exit(f"demo: the student did not learn: held-out R2 went from {results['r2'][0]:.3f} to {results['r2'][-1]:.3f}; it must "
             f"end above 0 and above its start")
if not short and not results["r2"][-1] > 0.3:
    sys.exit(f"demo: held-out R2 ended at {results['r2'][-1]:.3f}; this demo reaches above 0.3")
