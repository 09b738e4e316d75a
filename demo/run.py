"""The whole of SALT on a small physics-video data set made on the spot: videos, teacher, cache,
student, evaluation, probe.

    python demo/run.py              about six minutes on two CPU cores
    python demo/run.py --short      about two minutes: the same stages, fewer videos and steps

Every stage is the script a real run uses, with small sizes. Ends in a table, out/demo/results.json
and out/demo/report.png.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config
from salt.errors import InputError

# ----------------------------------------------------------------------------------------- settings
# folder of everything the demo makes; its videos are kept between runs
out = "out/demo"
short: bool = False  # fewer videos and steps, for a quick check
train_videos: int | None = None  # training videos [400, short 96]
val_videos: int | None = None  # held-out videos [100, short 32]
steps: int | None = None  # training steps of the teacher and of the student [500, short 80]
batch_size: int | None = None  # clips a step [16]
# compute [bf16; fp32 on a processor that multiplies matrices faster in it]
dtype: Literal["bf16", "fp32"] | None = None
seed = 0  # of videos, weights, masks and order
# -------------------------------------------------------------------------------------------------
config.apply(
    globals(), least={"train_videos": 1, "val_videos": 1, "steps": 1, "batch_size": 1, "seed": 0}
)
train_videos = train_videos or (96 if short else 400)
val_videos = val_videos or (32 if short else 100)
steps, batch_size = steps or (80 if short else 500), batch_size or 16
import torch

from benchmarks import budget

if not dtype:
    dtype = (
        "bf16"
        if torch.cuda.is_available() or not budget.slow_bf16(torch.device("cpu"), "bf16")
        else "fp32"
    )
root, began = Path(__file__).resolve().parent.parent, time.time()
taken = {}
folder, marker = Path(out) / "work", Path(out) / "work" / "made_by_the_demo"
if folder.exists() and not marker.exists():
    raise InputError(f"{folder} is there and was not made by the demo; choose another --out")
shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
folder.mkdir(parents=True)
marker.touch()
for name in ("results.json", "report.png"):
    (Path(out) / name).unlink(missing_ok=True)


def stage(title, script, **flags):
    """Run one script as a user would, and stop where it fails."""
    words = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in flags.items()
    ]
    print(f"\n=== {title}\n$ python {script} {' '.join(words)}", flush=True)
    start = time.time()
    code = subprocess.run([sys.executable, str(root / script), *words]).returncode
    if code:
        sys.exit(f"demo: {script} failed with exit code {code} at: {title}")
    taken[title] = round(time.time() - start, 1)


def run_of(name):
    return next((folder / "checkpoints").glob(f"{name}_*"))


small = {
    "size": "tiny",
    "depth": 6,
    "predictor_dim": 128,
    "predictor_depth": 4,
    "predictor_heads": 4,
    "batch_size": batch_size,
    "max_steps": steps,
    "dtype": dtype,
    "lr": 2e-3,
    "weight_decay_end": 0.05,
    "grad_clip": 1.0,
    "eval_every": max(1, steps // 5),
    "seed": seed,
    "checkpoints": folder / "checkpoints",
    "run_logs": folder / "run_logs",
}
sources = ("world.py", "twins.py", "make_videos.py")
generator = hashlib.sha256(b"".join((root / "demo" / name).read_bytes() for name in sources))
# kept between runs, while their generator is the same
videos = Path(out) / f"videos_{train_videos}_{val_videos}_{seed}_{generator.hexdigest()[:8]}"
stage(
    "videos",
    "demo/make_videos.py",
    out=videos,
    train=train_videos,
    validation=val_videos,
    seed=seed,
)
stage(
    "clips of the training videos",
    "cache_latents.py",
    data=videos,
    split="train",
    teacher="none",
    resolution=96,
    out=folder / "clips",
)
stage(
    "clips of the held-out videos",
    "cache_latents.py",
    data=videos,
    split="validation",
    teacher="none",
    resolution=96,
    out=folder / "clips_val",
)
stage(
    "stage 1: the teacher, from pixels",
    "train.py",
    target="pixels",
    masks="ratio",
    cache=folder / "clips",
    val_cache=folder / "clips_val",
    run_name="teacher",
    **small,
)
teacher = run_of("teacher") / "best.pth"
stage(
    "the teacher's latents",
    "cache_latents.py",
    teacher=teacher,
    dtype=dtype,
    clips_from=folder / "clips",
    out=folder / "latents",
)
stage(
    "its held-out latents",
    "cache_latents.py",
    teacher=teacher,
    dtype=dtype,
    clips_from=folder / "clips_val",
    out=folder / "latents_val",
)
stage(
    "stage 2: the student, from latents",
    "train.py",
    cache=folder / "latents",
    val_cache=folder / "latents_val",
    run_name="student",
    **small,
)
student = run_of("student") / "best.pth"
stage(
    "evaluation",
    "eval_distill.py",
    checkpoint=student.with_name("last.pth"),
    cache=folder / "latents_val",
    dtype=dtype,
    out=folder / "eval.json",
)
probing = {
    "data": videos,
    "dtype": dtype,
    "train_videos": train_videos,
    "val_videos": val_videos,
    "seed": seed,
}
stage(
    "time-arrow probe of the student",
    "probe_time_arrow.py",
    checkpoint=student,
    out=folder / "probe_student.json",
    untrained_seeds=1 if short else 3,
    **probing,
)
stage(
    "time-arrow probe of the teacher",
    "probe_time_arrow.py",
    checkpoint=teacher,
    out=folder / "probe_teacher.json",
    untrained_seeds=0,
    pixels=False,
    **probing,
)
taken["all"] = round(time.time() - began, 1)
ran = {
    "short": short,
    "dtype": dtype,
    "steps": steps,
    "train_videos": train_videos,
    "val_videos": val_videos,
    "seconds": taken,
}
(folder / "run.json").write_text(json.dumps(ran))
stage("report", "demo/report.py", out=out)
