"""Train a video encoder by SALT: predict a frozen teacher's cached latents at masked positions of a
clip.

    python train.py --data DIR --cache CACHE --val_cache CACHE --epochs 10 --lr 2e-4
    python train.py --target pixels --masks ratio --data DIR    stage 1: an encoder for a teacher
    torchrun --nproc_per_node 8 train.py ... --resume auto      several GPUs: the same batch, order
                                                                and schedules

Checkpoints go to checkpoints/<run>/, the log to run_logs/. Ctrl-C saves and leaves; --resume auto
goes on in the same folder.
"""

import contextlib
import copy
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Literal

import config
import runs

# ----------------------------------------------------------------------------------------- settings
# -- data
cache: str | None = None  # latent cache of the training split, made by cache_latents.py
# cache of held-out videos under the same view and teacher: R2 is measured on it
val_cache: str | None = None
data: str | None = None  # data folder; needed where the cache holds no clips
# measure on training videos, too, where --val_cache holds some; the figures are then called
# training R2
training_videos: bool = False
split = "train"  # list to train on where there is no cache
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
# without cached latents: run this teacher (VideoMAE folder or .pth, or our checkpoint) on the fly
teacher: str | None = None
target: Literal["latents", "pixels"] = "latents"  # what is predicted; pixels is stage 1
# frames a clip of a run without a cache; with one, the cache decides [the teacher's, else 16]
frames: int | None = None
resolution: int | None = None  # pixels of the clip's side, likewise [the teacher's, else 224]
# pixels of a patch's side, likewise [the teacher's, else 16; giant: 14]
patch: int | None = None
# -- model
size = "large"  # student: tiny, small, base, large, huge or giant
depth: int | None = None  # student blocks, where not those of its size
predictor_depth: int = 12  # predictor blocks
predictor_dim: int = 512  # predictor width
predictor_heads: int = 8  # predictor attention heads
# mask families, all predicted in each step
masks: list[Literal["short", "long", "ratio"]] = ["short", "long"]
loss: Literal["mse", "l1", "smooth_l1"] = "mse"  # error of a prediction (pixels: mse)
# of latents; standardise is by position and channel
target_norm: Literal["none", "layer_norm", "standardise"] = "none"
vicreg_variance: float = 0.0  # weight of VICReg's variance penalty on the predictions; 0 is off
vicreg_covariance: float = 0.0  # weight of its covariance penalty
# -- optimisation
batch_size: int = 24  # clips a step
epochs: int = 10  # passes over the training clips
max_steps: int | None = None  # steps instead of epochs; sets the length of the schedules too
lr: float = 2e-4  # peak learning rate
lr_end: float = 1e-5  # at the end of the cosine
warmup: int | None = None  # steps of linear warm-up [min(2000, 10 % of the steps)]
betas = (0.9, 0.95)  # AdamW
eps: float = 1e-8  # AdamW
weight_decay: float = 0.04  # at the start, on matrices only
weight_decay_end: float = 0.4  # at the end of its cosine
grad_clip: float = 0.02  # global norm; the log says in how many steps it bites. 0 is off
# N: a batch goes through in N parts; activations take 1/N of their memory, batch and schedules stay
accumulate: int = 1
# keep only the blocks' inputs for the backward pass: fewer activations in memory, up to a third
# more time
recompute: bool = False
# under torchrun: split weights, gradients and moments over the ranks (FSDP2), for students that do
# not fit one GPU; implies --recompute
fsdp: bool = False
# torch.compile over the blocks; auto: on a GPU alone (on a CPU it gains 0 - 5 %)
compile: Literal["auto", "on", "off"] = "auto"
# decay of a moving average of all weights, 0.999 say, kept beside them; 0 is off
ema: float = 0.0
# -- the run
run_name = "salt"  # first part of <run>
seed: int = 0  # of weights, masks and order
eval_seed: int = 1  # of the masks in held-out evaluation
eval_every: int | None = None  # steps between held-out evaluations [once an epoch]
val_batches: int = 20  # batches an evaluation
longest_seconds: float = 60.0  # a clip that spans more of a video is warned of, once
# training clips that give R2's per-position mean where the cache has none
stats_clips: int = 256
save_every: int = 500  # steps between last.pth
save_minutes: float = 15.0  # minutes after which it is saved at the latest; 0: by steps alone
log_every: int = 20  # steps between log lines
# steps in a row whose loss or gradient is not finite, after which the run stops with a diagnosis;
# fewer are skipped
skip_limit: int = 10
# auto (the furthest whole checkpoint of this run_name; afresh where there is none), or a run's
# name, folder, log or last.pth
resume: str | None = None
wandb: str | None = None  # project of Weights & Biases to log to as well (pip install wandb)
# log to checkpoints/<run>/tensorboard as well (pip install tensorboard)
tensorboard: bool = False
checkpoints = "checkpoints"  # folder of checkpoints
run_logs = "run_logs"  # folder of logs
# reading and decoding threads [all cores, shared by a machine's ranks]
threads = max(1, (os.cpu_count() or 1) // config.local_ranks())
# threads of the arithmetic on a CPU [torch's: all cores]; part of what the last bits depend on
compute_threads: int | None = None
dtype: Literal["bf16", "fp32"] = "bf16"  # compute; weights and optimiser are always fp32
# TFLOP/s of matrix products that MFU is a share of [measured at the start]
matrix_rate: float | None = None
device = "auto"  # auto, cpu, cuda or cuda:1
deterministic: bool = False  # on a GPU: the same bits every run, slower
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    least=dict.fromkeys(
        (
            "seed",
            "eval_seed",
            "warmup",
            "grad_clip",
            "lr",
            "lr_end",
            "eps",
            "weight_decay",
            "weight_decay_end",
            "vicreg_variance",
            "vicreg_covariance",
            "ema",
            "save_minutes",
            "longest_seconds",
        ),
        0,
    )
    | {"matrix_rate": 1e-6}
    | dict.fromkeys(
        (
            "frames",
            "resolution",
            "patch",
            "depth",
            "predictor_depth",
            "predictor_dim",
            "predictor_heads",
            "batch_size",
            "epochs",
            "max_steps",
            "accumulate",
            "eval_every",
            "val_batches",
            "stats_clips",
            "save_every",
            "log_every",
            "skip_limit",
            "threads",
            "compute_threads",
        ),
        1,
    ),
)
config.check_paths(cache=cache, val_cache=val_cache, data=data, teacher=teacher)
if resume not in (None, "auto", ""):
    runs.to_resume(resume, checkpoints, run_logs)

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for large pages on a CPU
import torch  # after the settings, so that --help and a mistyped flag answer at once
from tqdm import tqdm

import budget
import health
import heldout
import model
import ops
import ranks
from cache import agree_on, content_digest, open_cache, prepare_folder, write_whole
from config import InputError
from data import (
    Records,
    Videos,
    batches,
    check_batch,
    in_order,
    keyed_sample,
    load_split,
    odd_videos,
    shuffled,
)
from journal import Log, Metrics, average, summary, trackers
from ranks import rank, world
from views import IMAGENET_MEAN, IMAGENET_STD, View
from weights import load_checkpoint, save_checkpoint

# ---- the log; its last line is always `Process exiting.`
if run_name != os.path.basename(run_name) or not run_name or not run_name.isprintable():
    raise InputError(
        f"--run_name {run_name!a} must be a plain name, without slashes and control characters"
    )
if run_name != run_name.strip() or "," in run_name:
    raise InputError(
        f"--run_name {run_name!r} must have no comma and no spaces around it: lists of runs are"
        " separated by commas"
    )
if len(set(masks)) < len(masks):
    raise InputError(f"--masks {','.join(masks)} names a family twice")
if rank == 0:
    trackers(wandb, tensorboard)
if resume == "":
    raise InputError("--resume is empty; give auto, a last.pth, or leave it out to start afresh")
if world > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and resume != "auto":
    raise InputError(
        "torchrun --max_restarts starts this command again when a rank dies: give --resume auto, so"
        " that it goes on where it was"
    )
if rank == 0:
    prepare_folder(run_logs, "--run_logs")
    prepare_folder(checkpoints, "--checkpoints")
log = Log(run_logs, run_name)
# losses: of every step of the run, resumed ones included; nan where it was skipped
losses, epoch_length = [], 1
# pending: [loss, squared, spread, gradient norm] of each step since the last line; queued: of those
# that a GPU has still to do
pending, queued = [], deque()
unlogged = None  # on a GPU: the line of the step before


def at_end():
    if unlogged:
        try:
            if on_gpu:
                torch.cuda.synchronize(device)
            report(*unlogged)
        except Exception as error:  # the GPU, the disk or a tracker may be what ended the run
            log(f"the last line is lost: {' '.join(str(error).split())[:200]}")
    return summary(
        [
            *losses,
            *(
                values[0].item() if values.isfinite().all() else math.nan
                for values in pending[: len(pending) - len(queued)]
            ),
        ],
        epoch_length,
    )


log.at_end = at_end
# a signal lets the step under way finish; another one, two seconds later or more, does not wait
received = []


def on_signal(number, frame):
    if not config.started:
        os.write(2, b"training has not begun: leaving at once\n")
        log.status = "stopped"
        sys.exit(128 + number)
    if received and time.monotonic() > received[1] + 2:
        log.status = "stopped"
        sys.exit(128 + number)
    if not received:
        received[:] = number, time.monotonic()
        os.write(
            2,
            f"saving after step {step + 1} or its evaluation, then leaving; once more to leave at"
            " once\n".encode(),
        )


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
        signal.signal(number, on_signal)
log(f"start {log.start}: {' '.join(sys.argv)}")
log(f"process {json.dumps(runs.this_process())}")
log(f"settings {json.dumps(settings)}")
for line in config.from_environment:
    log(line)
device, restarts = (
    model.pick_device(ranks.start(device)),
    int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
)
if world > 1:
    log(
        f"{world} ranks{f', started again for the {restarts}. time' if restarts else ''};"
        f" {'FSDP2' if fsdp else 'DDP'}: each takes {batch_size // world} of the {batch_size} clips"
    )
log(ops.extension_line(device))
if compute_threads:
    torch.set_num_threads(compute_threads)
where = (
    torch.cuda.get_device_name(device)
    if device.type == "cuda"
    else f"cpu, {torch.get_num_threads()} threads"
)
log(f"torch {torch.__version__} on {where}, {dtype}")
# of the student; a teacher computes as its identity says (model.teacher_latents)
torch.set_float32_matmul_precision("high")
if deterministic:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # a pass over all memory, for what nobody reads
    torch.utils.deterministic.fill_uninitialized_memory = False

# ---- data: the clips come under the view of the cache, and under no other
odd_videos.watch(longest_seconds, log.from_any)
if "test" in split.split("+"):
    raise InputError(
        "--split test: the test split has no labels and is not for training; use train"
    )
source, on_the_fly = open_cache(cache) if cache else None, None
if source and "test" in source.metadata["split"].split("+"):
    raise InputError(
        f"{cache} was made from the test split, which is not for training; use one of the train"
        " split"
    )
if source:
    view, patch_size, tubelet = source.view, source.patch, source.tubelet
    asked = {
        "frames": frames,
        "resolution": resolution,
        "patch": patch,
        "split": split if "split" in config.given else None,
    }
    for name, theirs in (
        ("frames", view.frames),
        ("resolution", view.size),
        ("patch", patch_size),
        ("split", source.metadata["split"]),
    ):
        if asked[name] not in (None, theirs):
            raise InputError(
                f"--{name} is {settings[name]}, but the clips of {cache} have {name} {theirs};"
                " leave the flag out, or make another cache"
            )
    clips = Records(
        source,
        (
            load_split(data, source.metadata["split"], splits_dir, log)
            if data and not source.has_patches
            else None
        ),
    )
else:
    if not data:
        raise InputError(
            "give --cache (made by cache_latents.py), or --data with --teacher or with --target"
            " pixels; see --help"
        )
    if teacher and target == "latents":
        on_the_fly = model.load_teacher(teacher, device, model.TEACHER_DTYPE)
    shape = on_the_fly.config if on_the_fly else model.config_of_size(size)
    pixels, patch_size, tubelet = resolution or shape.size, patch or shape.patch, shape.tubelet
    view = View(frames or shape.frames, pixels, pixels)
    view = view.cut_as(on_the_fly.view) if on_the_fly else view
    rows = load_split(data, split, splits_dir, log)
    absent = sum(row.path is None for row in rows)
    if absent:
        log(f"{absent} of the {len(rows)} listed videos are not in {data} and are left out")
    rows = [row for row in rows if row.path]
    clips = Videos(rows, view, patch_size, tubelet)
n = len(clips)
mean, std, latent_dim, teacher_identity = IMAGENET_MEAN, IMAGENET_STD, None, None
if source and source.has_latents:
    if teacher and target == "latents":
        raise InputError(
            f"{cache} holds the latents of its teacher; leave --teacher out, or give a cache"
            " without latents"
        )
    mean, std, latent_dim, teacher_identity = (
        source.mean,
        source.std,
        source.latent_shape[1],
        source.teacher_identity,
    )
elif target == "latents":
    if not teacher:
        raise InputError(
            "there are no cached latents to predict: give a --cache that has them, or --teacher, or"
            " train on pixels with --target pixels"
        )
    on_the_fly = on_the_fly or model.load_teacher(teacher, device, model.TEACHER_DTYPE)
    shape = on_the_fly.config
    if (shape.frames, shape.size, shape.patch, shape.tubelet) != (
        view.frames,
        view.size,
        patch_size,
        tubelet,
    ):
        raise InputError(
            f"the teacher {teacher} takes {shape.frames} frames of {shape.size} pixels in patches"
            f" of {shape.patch} and {shape.tubelet} frames, the clips have {view.frames},"
            f" {view.size}, {patch_size} and {tubelet}; set --frames, --resolution and --patch"
        )
    if line := on_the_fly.other_view(view):
        log(line)
    log(f"teacher {teacher}: {on_the_fly.takes(view)}")
    mean, std, latent_dim, teacher_identity = shape.mean, shape.std, shape.dim, on_the_fly.identity
held_out = open_cache(val_cache) if val_cache else None
if held_out:
    difference = view.difference(held_out.view)
    if difference or (held_out.patch, held_out.tubelet) != (patch_size, tubelet):
        difference = difference or (
            f"patch and tubelet are {patch_size} and {tubelet} here, {held_out.patch} and"
            f" {held_out.tubelet} there"
        )
        raise InputError(
            f"--val_cache {val_cache} has another view than the training clips: {difference}"
        )
    if target == "latents" and not (
        held_out.has_latents and agree_on(teacher_identity, held_out.teacher_identity)
    ):
        raise InputError(
            f"--val_cache {val_cache} holds latents of another teacher than the training cache"
            " (weights, shape, compute or normalisation), or none"
        )
    held_out_clips = Records(
        held_out,
        (
            load_split(data, held_out.metadata["split"], splits_dir, log)
            if data and not held_out.has_patches
            else None
        ),
    )
if target == "pixels" and teacher:
    raise InputError("--target pixels needs no teacher; leave --teacher out")
if lr_end > lr:
    raise InputError(
        f"--lr_end {lr_end} is above --lr {lr}: the rate would rise to it over the run; lower it"
    )
if not all(0 <= beta < 1 for beta in betas):
    raise InputError(f"--betas are {betas}; each must be at least 0 and below 1")
if target == "pixels" and (loss != "mse" or target_norm != "none"):
    raise InputError(
        "--target pixels is trained with the MSE on per-patch standardised pixels; leave --loss and"
        " --target_norm alone"
    )
check_batch(n, batch_size)
seen_videos = ranks.first(lambda: heldout.trained_on(clips))
measured, measured_on = None, "held-out"
if held_out:
    measured, measured_on, lines = heldout.records_to_measure(
        held_out_clips, seen_videos, f"--val_cache {val_cache}", training_videos
    )
    for line in lines:
        log(line)
    if line := heldout.copies(
        *heldout.numbers_of(held_out_clips), lambda i: held_out_clips.name(i)[0]
    ):
        log(line)
if batch_size % (world * accumulate):
    parts = " times ".join(
        [f"{world} ranks"] * (world > 1) + [f"--accumulate {accumulate}"] * (accumulate > 1)
    )
    raise InputError(
        f"{parts} {'do' if world > 1 else 'does'} not divide --batch_size {batch_size}; the parts"
        f" of a batch have one size, so it must be a multiple of {world * accumulate}"
    )
share = batch_size // world  # clips of a rank,
part = share // accumulate  # and of one pass
if (accumulate > 1 or world > 1) and (vicreg_variance or vicreg_covariance):
    raise InputError(
        "VICReg's penalties are statistics of a whole batch, which --accumulate and several ranks"
        " take apart; leave one of the two out"
    )
if fsdp and world == 1:
    raise InputError("--fsdp splits the model over ranks; start with torchrun --nproc_per_node N")
if ema >= 1:
    raise InputError(f"--ema is {ema}; a decay is at least 0 (off) and below 1")


def list_digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


files = (
    None
    if source
    else list_digest(
        f"{row.id}\t{row.start}\t{row.end}\t{os.path.getsize(row.path)}" for row in rows
    )
)
identity = {
    "train": (
        source.identity if source else {"list": list_digest(row.id for row in rows), "files": files}
    ),
    # what a resumed run must have in common with this one
    "teacher": teacher_identity,
    "held_out": held_out.identity if held_out else None,
}

# ---- resume, under the same settings or not at all
step, history = 0, []  # history: held-out evaluations
# held-out R2, or without a val_cache an epoch's average loss
best = -math.inf if held_out else math.inf
here = {
    "ranks": world,
    "threads": torch.get_num_threads(),
    "device": device.type,
    "torch": str(torch.__version__),
    "accumulate": accumulate,
    "fsdp": fsdp,
    "compile": compile,
    # what the last bits depend on
    "deterministic": deterministic,
    "kernels": {name: ops.EXTENSION[name] for name in ("devices", "simd", "amx")},
}
changeable = {
    "resume",
    "data",
    "cache",
    "val_cache",
    "splits_dir",
    "teacher",
    "run_name",
    "checkpoints",
    "run_logs",
    "threads",
    "device",
    "log_every",
    "save_every",
    "save_minutes",
    "skip_limit",
    "wandb",
    "tensorboard",
    "recompute",
    "accumulate",
    "fsdp",
    "compile",
    "matrix_rate",
    "deterministic",
    "compute_threads",
    "frames",
    "resolution",
    "training_videos",
    "longest_seconds",
}


def open_run():
    """This process's Run: its folder, locked.

    Other ranks get its folder's and its checkpoint's path.
    """
    # a rank that was cut off may take a while to be seen as dead
    opened.append(
        runs.Run(
            checkpoints, run_logs, run_name, log.start, resume, log, wait=120 if restarts else 0
        )
    )
    return opened[0].folder, opened[0].path, opened[0].goes_on_in_place


opened = []
directory, origin, in_place = ranks.first(open_run)
run, saved = os.path.basename(directory), None
if origin:
    saved = opened[0].take_content() if opened else load_checkpoint(origin)
log(f"folder {directory}")
if in_place and not runs.named([run], run_name):
    log(
        f"this start goes on with the run {run}, by whose name it is found; --run_name {run_name}"
        " names its log alone"
    )
if saved:
    if ema and "ema" not in saved:
        raise InputError(
            f"--resume {origin} was trained without --ema; leave it out, or start a new run"
        )
    if missing := [
        name
        for name in ("optimizer", "rng", "losses", "history", "best", "stats")
        if name not in saved
    ]:
        raise InputError(f"--resume {origin} holds no {', '.join(missing)}; give a last.pth")
    if difference := view.difference(View.from_dict(saved["view"])):
        raise InputError(f"--resume {origin} was trained under another view: {difference}")
    for name, what in (
        ("train", "other training clips (--cache, --data), of other ids, pixels or latents"),
        ("teacher", "another teacher"),
        ("held_out", "another --val_cache"),
    ):
        if not agree_on(saved["identity"][name], identity[name]):
            raise InputError(
                f"--resume {origin} was trained with {what}; give the same, or start a new run"
            )
    for name, value in settings.items():
        if (
            name not in changeable
            and name in saved["settings"]
            and json.dumps(saved["settings"].get(name)) != json.dumps(value)
        ):
            raise InputError(
                f"--resume {origin} was trained with --{name} {saved['settings'].get(name)}, not"
                f" {value}; give the same, or start a new run, with another --run_name if --resume"
                " is auto"
            )

# ---- model and optimiser
shape = {} if depth is None else {"depth": depth}
encoder_config = model.config_of_size(
    size,
    frames=view.frames,
    size=view.size,
    patch=patch_size,
    tubelet=tubelet,
    mean=mean,
    std=std,
    **shape,
)
predictor_config = {
    "dim_in": encoder_config.dim,
    "dim_out": encoder_config.patch_dim if target == "pixels" else latent_dim,
    "tokens": encoder_config.tokens,
    "families": masks,
    "dim": predictor_dim,
    "depth": predictor_depth,
    "heads": predictor_heads,
}
grid = encoder_config.grid
torch.manual_seed(seed)  # here, so that nothing before it shows in the initial weights
salt = model.build_salt(encoder_config, predictor_config)


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


log(
    f"student {size} {encoder_config.dim}/{encoder_config.depth}/{encoder_config.heads},"
    f" {millions(salt.student):.1f} M parameters; predictor {millions(salt.predictor):.1f} M;"
    f" target {target} [{predictor_config['dim_out']}]"
)
if saved:
    model.load_weights(salt.student, saved["student"], origin)
    model.load_weights(salt.predictor, saved["predictor"], origin)
averaged = copy.deepcopy(salt).requires_grad_(False) if ema else None
if saved and averaged:
    model.load_weights(averaged.student, saved["ema"]["student"], origin)
    model.load_weights(averaged.predictor, saved["ema"]["predictor"], origin)
networks = [salt, averaged] if averaged else [salt]
for network in networks:
    if fsdp:
        # before it goes to the GPU, since the whole need not fit there
        model.shard(network, device)
    network.to(device)
parameters = list(salt.parameters())
optimizer = torch.optim.AdamW(
    model.parameter_groups(salt, weight_decay), lr=lr, betas=betas, eps=eps, fused=True
)
# else the casts of all matrices would be kept for the backward pass, on each rank
salt.student.recompute = salt.predictor.recompute = recompute or fsdp
on_gpu = device.type == "cuda"
can_compile = importlib.util.find_spec("triton") and any(
    map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))
)
if compile == "auto" and on_gpu and not can_compile:
    log("the blocks are not compiled: torch.compile needs Triton and a C compiler")
if compile == "on" or compile == "auto" and on_gpu and can_compile:
    for block in (*salt.student.blocks, *salt.predictor.blocks):
        block.compile(dynamic=False)
    log("torch.compile over the blocks: the first step takes longer")
distributed = salt  # what a step calls
if world > 1 and not fsdp:
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; older ones lack the new name
        warnings.simplefilter("ignore", FutureWarning)
        distributed = torch.nn.parallel.DistributedDataParallel(
            salt,
            device_ids=[device] if on_gpu else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
if not on_gpu:
    ops.keep_freed_memory()
epoch_length = n // batch_size
total_steps = max_steps or epochs * epoch_length
warmup = min(2000, total_steps // 10) if warmup is None else warmup
if warmup > total_steps:
    raise InputError(
        f"--warmup {warmup} is longer than the run, {total_steps} steps: the learning rate would"
        " never reach --lr; lower it"
    )
eval_every = eval_every or epoch_length
log(
    f"{n} clips, view {view.hash()}, grid {grid}; {total_steps} steps of {batch_size},"
    f" {epoch_length} an epoch"
)
clip_flops = budget.step_flops(
    encoder_config, predictor_config, [ops.mask_counts(family, grid) for family in masks]
)
full_rate = 1e12 * matrix_rate if matrix_rate else budget.matrix_rate(device, dtype)
if not matrix_rate and (faster := budget.slow_bf16(device, dtype)):
    log(faster)
in_force = {
    "frames": view.frames,
    "resolution": view.size,
    "patch": patch_size,
    "warmup": warmup,
    "eval_every": eval_every,
}
# Of what the paths hold, so that runs can be told apart that were made from other content under one
# path.
for name, key in (
    ("training clips", "train"),
    ("held-out clips", "held_out"),
    ("latents of", "teacher"),
):
    # all that counts where pixels are predicted
    of_clips = ("view_hash", "ids_sha256", "clips_sha256", "list", "files")
    parts = {
        part: value
        for part, value in (identity[key] or {}).items()
        if target == "latents" or part in of_clips
    }
    in_force |= {name: content_digest(parts)[:12]} if parts else {}
log(f"in force {json.dumps(in_force)}")
if not on_gpu and not matrix_rate and (faster := budget.fewer_threads(device, dtype, full_rate)):
    log(faster)
log(
    f"a step has {clip_flops * batch_size / 1e9:.0f} GFLOP ({clip_flops / 1e9:.1f} a clip); MFU is"
    f" the share of {full_rate * world / 1e12:.2f} TFLOP/s of {dtype} matrix products"
)
if saved:
    try:
        optimizer.load_state_dict(
            ranks.split_like(optimizer, saved["optimizer"]) if fsdp else saved["optimizer"]
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"--resume {origin} holds the optimiser state of another model ({error})"
        ) from None
    torch.set_rng_state(saved["rng"]["cpu"])
    if on_gpu and saved["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(saved["rng"]["cuda"], device)
    step, losses, history, best, pending = (
        saved["step"],
        saved["losses"].tolist(),
        saved["history"],
        saved["best"],
        list(saved.get("pending", ())),
    )
    log(f"resumed {origin} at step {step}")
    if not agree_on(saved.get("where"), here):
        log(
            f"it ran under {saved['where']} before, now under {here}: the same clips, masks and"
            " schedules, but the last bits may differ"
        )


# a script that asks again and again leaves nothing behind
if (
    saved
    and resume == "auto"
    and step == total_steps
    and os.path.isfile(os.path.join(directory, "best.pth"))
):
    if (
        rank == 0
        and os.path.basename(origin) == "last.pth"
        and os.path.isfile(left := os.path.join(directory, "previous.pth"))
    ):
        os.remove(left)  # of a kill at its very end
    log("that run has finished: nothing is left to do")
    log.status = "finished"
    ranks.leave()


def with_latents(batch):
    """With the latents of the teacher that runs on the fly, as cache_latents.py makes them."""
    return (
        batch._replace(latents=model.teacher_latents(on_the_fly, batch.patches))
        if on_the_fly
        else batch
    )


# ---- the space of the targets, and the per-position mean that R2 is measured from
def target_space():
    stats = (
        {name: torch.as_tensor(value) for name, value in source.stats.items()}
        if source and source.has_latents and target == "latents"
        else None
    )

    def rstd():
        return 1 / (stats["variance"] + 1e-6).sqrt()

    space = model.Space(target, target_norm, None, None, torch.zeros(()))
    if stats and target_norm == "standardise":
        return (
            model.Space(
                target, target_norm, stats["mean"], rstd(), torch.zeros_like(stats["mean"])
            ),
            stats,
        )
    if stats and target_norm == "none":
        space.zero = stats["mean"]
        return space, stats
    picked = [i * n // min(stats_clips, n) for i in range(min(stats_clips, n))]
    log(f"R2's per-position mean: from {len(picked)} training clips")
    raw = model.Space(
        target, "none" if target_norm == "standardise" else target_norm, None, None, space.zero
    )
    count = total = squares = 0
    sample = batches(
        clips, in_order(picked, part), threads=threads, device=device, failed=lambda i, error: None
    )
    for batch in tqdm(
        sample,
        desc="statistics",
        total=-(-len(picked) // part),
        unit="batch",
        dynamic_ncols=True,
        leave=False,
    ):
        batch = with_latents(batch)
        y = raw.all_targets(batch.patches, batch.latents).double()
        count, total, squares = (
            count + len(y),
            total + y.sum(0).cpu(),
            squares + y.square().sum(0).cpu(),
        )
    if not count:
        raise InputError(
            f"none of {len(picked)} training videos could be decoded; check --data with `python"
            " cache_latents.py --teacher none`, which lists the reasons"
        )
    if count < len(picked):
        log(f"R2's per-position mean: {len(picked) - count} of these could not be decoded")
    mean = total / count
    found = {
        "mean": mean.float(),
        "variance": (squares / count - mean.square()).clamp(min=0).float(),
        "count": torch.tensor(count),
    }
    if target_norm == "standardise":
        stats = found
        return (
            model.Space(
                target, target_norm, stats["mean"], rstd(), torch.zeros_like(stats["mean"])
            ),
            stats,
        )
    space.zero = found["mean"]
    return space, stats or found


space, stats = (
    (model.Space(**saved["space"]), saved["stats"]) if saved else ranks.first(target_space)
)
space = space.to(device)


def save(name):
    def state(network):
        return {
            "student": network.student.state_dict(),
            "predictor": network.predictor.state_dict(),
        }

    content = {
        **state(salt),
        "encoder_config": model.plain(encoder_config),
        "predictor_config": predictor_config,
        "settings": settings,
        "step": step,
        "epoch": step / epoch_length,
        "losses": torch.tensor(losses, dtype=torch.float64),
        "history": history,
        "best": best,
        "view": view.to_dict(),
        "stats": stats,
        "space": model.plain(space.to("cpu")),
        "identity": identity,
        "teacher": teacher_identity,
        "trained_on": seen_videos,
        "run": run,
    }
    if averaged:
        content["ema"] = state(averaged)
    if name == "last.pth":
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if on_gpu else None,
        }
        content |= {
            "optimizer": optimizer.state_dict(),
            "rng": rng,
            "pending": torch.stack(pending) if pending else torch.zeros(0, 4),
            "where": here,
        }
    content = ranks.whole(content) if fsdp else content
    ranks.first(
        lambda: save_checkpoint(
            os.path.join(directory, name), content, previous if name == "last.pth" else None
        )
    )


# ---- the run's folder
previous = os.path.join(directory, "previous.pth")


def best_so_far():
    """The figure of best.pth; or what it is at the start, where that file is damaged, or of a
    branch that was left.
    """
    path = os.path.join(directory, "best.pth")
    if step < min(eval_every if held_out else epoch_length, total_steps) and not os.path.isfile(
        path
    ):
        return best
    try:
        found = load_checkpoint(path)
    except InputError as error:
        log(f"left behind: {error}; the next evaluation makes a new best.pth")
        return -math.inf if held_out else math.inf
    its = found.get("best", best)
    # of a later step than what is gone on from, or of another branch: it is the file that must be
    # beaten
    if its != best:
        log(
            f"best.pth is of step {found['step']}, its figure is {its:.6g}: the next better"
            " evaluation takes its place"
        )
    return its


ranks.first(lambda: opened[0].begin(log.path, step))
if saved:
    best = ranks.first(best_so_far)
    saved = None  # its memory is wanted
metrics = Metrics(directory, step if origin else -1, history)
if metrics.damaged:
    log(f"{metrics.path}: {metrics.damaged} torn or damaged lines are left out")
if in_place and (
    metrics.restored or metrics.last_step < step - len(pending) > runs.first_step(directory)
):
    log(
        f"{metrics.path} was cut or replaced: {metrics.restored} evaluations are written again from"
        f" the checkpoint; lines of steps up to step {step - len(pending)} are lost"
    )
ranks.first(lambda: metrics.follow(run, settings, directory, wandb, tensorboard))
failures = set()


def failed(part, i, error):
    if (part, i) not in failures:
        failures.add((part, i))
        log.from_any(f"skipped, {len(failures)} so far: {error}")
        with open(
            os.path.join(directory, f"failures{f'-rank{rank}' if rank else ''}.jsonl"), "a"
        ) as file:
            file.write(json.dumps({"part": part, "record": i, "reason": str(error)}) + "\n")


# Which rows the step looks at; a teacher on the fly needs every patch. Evaluation also looks at the
# targets of the context.
seen = ("context", "target")
rows_of_step = {
    "patches": seen if target == "pixels" else None if on_the_fly else ("context",),
    "latents": ("target",) if target == "latents" else (),
}
rows_held_out = {
    "patches": seen if target == "pixels" else ("context",),
    "latents": seen if target == "latents" else (),
}


@torch.compiler.set_stance("force_eager")  # a last, smaller batch would be compiled for itself
def held_out_r2():
    kept = measured[keyed_sample(len(measured), val_batches * batch_size, eval_seed)]
    # FSDP2: the ranks run each batch together
    mine = itertools.islice(in_order(kept, part), *((0, None) if fsdp else (rank, None, world)))
    stream = batches(
        held_out_clips,
        mine,
        masks,
        eval_seed,
        **rows_held_out,
        threads=threads,
        device=device,
        failed=functools.partial(failed, "held-out"),
    )
    with torch.no_grad():
        for network in networks:
            model.cast_matrices(network, dtype)
    bar = tqdm(
        stream,
        f"{measured_on} R2",
        -(-len(kept) // (part * (1 if fsdp else world))),
        unit="batch",
        dynamic_ncols=True,
        leave=False,
        delay=2,
        disable=rank > 0,
    )
    parts = [
        [
            heldout.checked(model.clip_errors(network, space, batch, masks), batch, held_out_clips)
            for network in networks
        ]
        for batch in bar
    ]
    if not fsdp:  # back in their order
        parts = [
            part for turn in itertools.zip_longest(*ranks.gather(parts)) for part in turn if part
        ]
    entry = {"step": step, **({} if measured_on == "held-out" else {"val_videos": measured_on})}
    for i, (suffix, network) in enumerate(zip(("", "_ema"), networks)):
        model.cast_matrices(network, "fp32")
        rows = model.join_errors([part[i] for part in parts])
        entry |= {
            f"val_r2{suffix}": float(model.r2(rows.values())),
            f"val_mse{suffix}": model.mse(rows.values()),
        }
    entry["val_r2_background"] = float(model.r2(rows.values(), "background"))
    # with FSDP2 each rank has worked it out: what is best, all must see alike
    entry = ranks.first(lambda: entry)
    entry["val_clips"] = clip_count = len(next(iter(rows.values()))["squared"])
    of_all = f" over {clip_count} of {len(kept)} clips" * (clip_count < len(kept))
    averaged_r2 = (
        f"; moving average of the weights: R2 {entry['val_r2_ema']:.4f}" if averaged else ""
    )
    log(
        f"step {step} {measured_on} R2 {entry['val_r2']:.4f} mse {entry['val_mse']:.5f}{of_all}"
        f" (mean of the clip's own context: R2 {entry['val_r2_background']:.4f}{averaged_r2})"
    )
    metrics.write(entry)
    history.append(entry)


def report(values, watched, step, seconds, steps, waited, rate, decay):
    """Log the steps since the last line.

    values: [loss, squared, spread, gradient norm] of each; watched: the last one's features, as a
    future of health.collapse, and its update.
    """
    global skipped
    values = torch.stack(values).double()
    finite = values.isfinite().all(1)
    values[~finite] = math.nan
    losses.extend(values[:, 0].tolist())
    skipped += int((~finite).sum())
    if rank:
        return
    taken = values[finite]
    speed, (deviation, effective_rank) = steps / seconds, watched[0].result()
    entry = {
        "step": step,
        "epoch": step / epoch_length,
        "loss": taken[:, 0].mean().item(),
        "r2": 1 - (taken[:, 1].sum() / taken[:, 2].sum()).item(),
        "lr": rate,
        "weight_decay": decay,
        "grad_norm": taken[:, 3].mean().item(),
        "clipped": (taken[:, 3] > grad_clip).double().mean().item() if grad_clip else 0.0,
        "skipped": skipped,
        "update_ratio": (watched[1][0] / watched[1][1]).sqrt().item(),
        "feature_std": deviation,
        "effective_rank": effective_rank,
        "clips_per_s": speed * batch_size,
        "data_wait": waited / seconds,
        "mfu": speed * batch_size * clip_flops / full_rate / world,
        "memory_gb": (
            (
                torch.cuda.max_memory_allocated(device)
                if on_gpu
                else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            )
            / 1e9
        ),
    }
    metrics.write(entry)
    log(
        f"step {step}/{total_steps} epoch {entry['epoch']:.2f} loss {entry['loss']:.5f} R2"
        f" {entry['r2']:.4f} lr {rate:.2e} wd {decay:.3f} grad {entry['grad_norm']:.3g} clipped"
        f" {entry['clipped']:.0%} update {entry['update_ratio']:.1e} std {entry['feature_std']:.3f}"
        f" erank {entry['effective_rank']:.1f} {entry['clips_per_s']:.2f} clips/s MFU"
        f" {entry['mfu']:.0%} waiting {entry['data_wait']:.0%} {entry['memory_gb']:.2f}"
        f" GB{' skipped ' + str(entry['skipped']) if entry['skipped'] else ''} left"
        f" {timedelta(seconds=int((total_steps - step) / speed))}"
    )


@torch.compiler.set_stance("force_eager")
def stop_with_diagnosis(last, its_loss, its_norm):
    """After skip_limit steps in a row that were not finite: do the last of them again, clip by
    clip, and say what is wrong.
    """
    ((epoch, records),) = shuffled(n, batch_size, seed, [last], rank, world)
    stream = batches(
        clips,
        [(epoch, records)],
        masks,
        seed,
        **rows_of_step,
        threads=threads,
        device=device,
        failed=functools.partial(failed, "training"),
        substitutes=True,
    )
    model.cast_matrices(salt, dtype)
    found = health.diagnose(
        salt,
        space,
        [clips.name(int(record))[0] for record in records],
        with_latents(next(stream)),
        loss,
    )
    found = {
        name: list(dict.fromkeys(itertools.chain(*(part[name] for part in ranks.gather(found)))))
        for name in found
    }
    path = os.path.join(directory, "diagnosis.json")
    ranks.first(
        lambda: write_whole(path, json.dumps({"step": last + 1, **found}, indent=1).encode())
    )
    if rank:
        os._exit(1)
    raise InputError(
        f"the loss or its gradient was not finite in {skip_limit} steps in a row, the last of them"
        f" step {last + 1} (loss {its_loss:.4g}, gradient norm {its_norm:.4g}):"
        f" {health.in_words(found, its_loss)}. More is in {path}; the weights were left alone all"
        " that time"
    )


def cosine(start, end, share):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, share))))


if held_out and not history:
    held_out_r2()
if not in_place:
    # a run starts with what it takes to resume it, and its disk has been seen to have room
    save("last.pth")
config.started = True  # from here on every rank speaks for itself
clock, waited, timed_step, saved_at = time.perf_counter(), 0.0, step, time.monotonic()
first_step = step + 1
stream = batches(
    clips,
    shuffled(n, batch_size, seed, range(step, total_steps), rank, world),
    masks,
    seed,
    **rows_of_step,
    threads=threads,
    device=device,
    failed=functools.partial(failed, "training"),
    substitutes=True,
)
watching, features = False, []  # in a step that ends in a log line: what the student gives
salt.student.register_forward_hook(
    lambda module, inputs, output: features.append(health.moments(output)) if watching else None
)


# there once the step's mark has passed
def to_host(x):
    return (
        torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        if on_gpu
        else x
    )


# singular values take 0.1 s of a line's step, beside which the GPU must not wait
analyst = ThreadPoolExecutor(1)


def features_of_step(done, moments):
    return (done and done.synchronize(), health.collapse(moments))[1]


# bad: steps in a row that were not finite, up to here; skipped: of all those logged
stopping, bad, skipped = False, 0, sum(map(math.isnan, losses))
for loss_before in (*losses, *(values.sum().item() for values in pending)):
    bad = 0 if math.isfinite(loss_before) else bad + 1
while step < total_steps and not stopping:
    tick = time.perf_counter()
    batch = with_latents(next(stream))
    waited += time.perf_counter() - tick
    rate = (
        lr * (step + 1) / warmup
        if step < warmup
        else cosine(lr, lr_end, (step - warmup) / max(1, total_steps - warmup))
    )
    decay = cosine(weight_decay, weight_decay_end, step / total_steps)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay * group["decays"]
    model.cast_matrices(salt, dtype)
    step += 1
    ended, epoch_ended = step == total_steps, step % epoch_length == 0
    evaluating = held_out and (ended or step % eval_every == 0)
    # by the step alone: a resumed run writes the same lines
    watching = logging = step % log_every == 0 or epoch_ended or ended or bool(evaluating)
    sums = 0
    for start in range(0, share, part):
        few = slice(start, start + part)
        patches, latents = batch.patches[few], None if batch.latents is None else batch.latents[few]
        drawn = {
            family: ops.Masks(both.context[few], both.target[few])
            for family, both in batch.masks.items()
        }
        # DDP sums over the ranks with the last part
        with (
            distributed.no_sync()
            if world > 1 and not fsdp and start + part < share
            else contextlib.nullcontext()
        ):
            predictions = distributed(patches, drawn)
            error, squared, spread, gradients = model.salt_loss(
                predictions, patches, latents, drawn, space, loss, 1 / accumulate
            )
            # the loss brings its gradient; other terms join here
            roots, upstream = list(predictions.values()), list(gradients.values())
            if vicreg_variance or vicreg_covariance:
                penalties = [model.vicreg(prediction) for prediction in predictions.values()]
                roots.append(
                    sum(vicreg_variance * v + vicreg_covariance * c for v, c in penalties)
                    / len(penalties)
                )
                upstream.append(None)
            torch.autograd.backward(roots, upstream)
        sums = sums + torch.stack([error.float() / (accumulate * world), squared, spread])
        del predictions, gradients, roots, upstream  # or they would lie beside the next ones
    if world > 1:
        torch.distributed.all_reduce(sums)
    norm = model.update(optimizer, parameters, grad_clip, sums[0])
    if averaged:
        model.move_average(averaged, salt, ema)
    pending.append(to_host(torch.cat([sums, norm[None]])))
    if logging:
        watched = [sum(features), health.update_ratio(optimizer)]
        watching, now = False, time.perf_counter()
        features.clear()
        if world > 1:
            torch.distributed.all_reduce(watched[0])
        if fsdp:
            torch.distributed.all_reduce(watched[1])
        watched = [to_host(x) for x in watched]
    done = (
        torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))
        if on_gpu
        else None
    )
    queued.append((pending[-1], done))
    if logging and rank == 0:
        watched[0] = analyst.submit(features_of_step, done, watched[0])

    seconds = time.perf_counter() - clock
    if step == first_step and not logging and seconds > 1:
        due = next(
            s
            for s in range(step, total_steps + 1)
            if s % log_every == 0
            or s % epoch_length == 0
            or s % eval_every == 0
            or s == total_steps
        )
        log(
            f"the first step took {seconds:.1f} s; the next line is due after step {due}, in about"
            f" {timedelta(seconds=int((due - step) * seconds))}"
        )

    # Signals and the clock are looked at once a step: a signal from here on lets one more step run,
    # and that one saves.
    stopping, due = ranks.agree(
        bool(received),
        save_minutes > 0 and rank == 0 and time.monotonic() - saved_at > 60 * save_minutes,
    )
    saving = ended or stopping or due or step % save_every == 0
    # on a GPU one step is queued while one runs
    while len(queued) > 1 or queued and (not on_gpu or epoch_ended or evaluating or saving):
        values, done = queued.popleft()
        if done:
            done.synchronize()
        bad = 0 if values.isfinite().all() else bad + 1
        if bad:
            log(
                f"step {step - len(queued)} is skipped: loss {values[0]:.4g}, gradient norm"
                f" {values[3]:.4g}"
            )
        if bad >= skip_limit:
            stop_with_diagnosis(step - len(queued) - 1, *values[[0, 3]].tolist())
    if unlogged and (logging or saving or rank or unlogged[1][0].done()):
        line, unlogged = unlogged, None
        report(*line)
    if logging:
        unlogged = pending, watched, step, now - clock, step - timed_step, waited, rate, decay
        clock, waited, timed_step, pending = now, 0.0, step, []
    if unlogged and not queued:
        line, unlogged = unlogged, None
        report(*line)
    if evaluating:
        held_out_r2()
        if history[-1]["val_r2"] > best:
            best = history[-1]["val_r2"]
            save("best.pth")
        clock = time.perf_counter()
    if not held_out and (epoch_ended or ended):
        mean_loss = average(losses[-min(epoch_length, len(losses)) :])
        if mean_loss < best:
            best = mean_loss
            save("best.pth")
    if saving:
        save("last.pth")
        saved_at = time.monotonic()
stream.close()
analyst.shutdown()
for name in ("best.pth", "last.pth"):  # both exist whenever a run has ended
    path = os.path.join(directory, name)
    if not ranks.first(functools.partial(os.path.isfile, path)):
        log(f"there is no {name}: the last step's weights take that name")
        save(name)
if rank == 0 and os.path.isfile(previous):
    os.remove(previous)
metrics.close()
ranks.gather(None)  # every rank has written its own
lost = [
    line
    for path in glob.glob(os.path.join(glob.escape(directory), "failures*.jsonl"))
    for line in runs.lines_of(path)
]
if lost := len({line.partition(', "reason"')[0] for line in lost}):
    log(
        f"{lost} clips could not be had and were left out or replaced by their neighbours:"
        f" {directory}/failures*.jsonl"
    )
log.status = "stopped" if stopping and step < total_steps else "finished"
log(f"checkpoints in {directory}")
ranks.leave(128 + (received or [signal.SIGTERM])[0] if log.status == "stopped" else 0)
