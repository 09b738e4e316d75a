"""Train a video encoder by SALT: predict a frozen teacher's cached latents at masked positions of a
clip.

    python train.py --data DIR --cache CACHE --val_cache CACHE --epochs 10 --lr 2e-4
    python train.py --target pixels --masks ratio --data DIR    stage 1: an encoder for a teacher
    torchrun --nproc_per_node 8 train.py ... --resume auto      several GPUs: the same batch, order
                                                                and schedules

Checkpoints go to checkpoints/<run>/, the log to run_logs/. Ctrl-C saves and leaves; --resume auto
goes on in the same folder.
"""

import copy
import functools
import itertools
import math
import os
from typing import Literal

from salt import config, given_paths, recipes, runs

# ----------------------------------------------------------------------------------------- settings
recipe: str | None = None  # a set of settings out of salt/recipes.py; what is given besides wins
split = "train"  # list to train on where there is no cache
target: Literal["latents", "pixels"] = "latents"  # what is predicted; pixels is stage 1
patch: int | None = None  # pixels of a patch's side [the teacher's, else 16; giant: 14]
size = "large"  # student: tiny, small, base, large, huge or giant
depth: int | None = None  # student blocks, where not those of its size
predictor_depth: int = 12  # predictor blocks
predictor_dim: int = 512  # predictor width
predictor_heads: int = 8  # predictor attention heads
predictor_attention: Literal["all", "context"] = "all"  # what targets look at in it
init_from: str | None = None  # first weights of the student: see salt/initial.py [random]
# places of tokens: by a table of their numbers, one of t, y and x, or rotary; of both networks
positions: Literal["table", "table3d", "rope"] = "table"
# mask families, all predicted in each step
masks: list[Literal["short", "long", "ratio"]] = ["short", "long"]
targets: float = 1.0  # share of a family's target tokens that is predicted, drawn at random
loss: Literal["mse", "l1", "smooth_l1"] = "mse"  # error of a prediction (pixels: mse)
# weight of the same loss on the visible tokens, by a linear head on the student [1; pixels: 0]
context_loss: float | None = None
# of latents; standardise is by position and channel
target_norm: Literal["none", "layer_norm", "standardise"] = "none"
vicreg_variance: float = 0.0  # weight of VICReg's variance penalty on the predictions; 0 is off
vicreg_covariance: float = 0.0  # weight of its covariance penalty
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
# decay of a moving average of all weights, 0.999 say, kept beside them; 0 is off
ema: float = 0.0
dtype: Literal["bf16", "fp32"] = "bf16"  # compute; weights and optimiser are always fp32
seed: int = 0  # of weights, masks and order
eval_seed: int = 1  # of the masks in held-out evaluation
eval_every: int | None = None  # steps between held-out evaluations [once an epoch]
val_batches: int = 20  # batches an evaluation
stats_clips: int = 256  # training clips that give R2's mean by position where the cache has none
# training clips that look-up, a dumb predictor to measure R2 from, chooses among; 0 is off
lookup_clips: int = 2000
# -- may change on --resume
# auto (the furthest whole checkpoint of this run_name; afresh where there is none), or a run's
# name, folder, log or last.pth
resume: str | None = None
run_name = "salt"  # first part of <run>
cache: str | None = None  # latent cache of the training split, made by cache_latents.py
val_cache: str | None = None  # of held-out videos, same view and teacher: R2 is measured on it
data: str | None = None  # data folder; needed where the cache holds no clips
splits_dir: str | None = None  # folder of the lists, where it is not the data folder
cameras: list[str] = []  # of a LeRobot data set: names, or their last parts [all]
window_seconds: float | None = None  # of a LeRobot data set: longer episodes become several rows
# without cached latents: run this teacher, what cache_latents.py --teacher takes, on the fly
teacher: str | None = None
frames: int | None = None  # of a clip, where no cache decides [the teacher's, else 16]
resolution: int | None = None  # pixels of the clip's side, likewise [the teacher's, else 224]
# measure on training videos, too, where --val_cache holds some: it is called training R2, then
training_videos: bool = False
longest_seconds: float = 60.0  # a clip that spans more of a video is warned of, once
log_every: int = 20  # steps between log lines
save_every: int = 500  # steps between last.pth
save_minutes: float = 15.0  # minutes after which it is saved at the latest; 0: by steps alone
# steps in a row whose loss or gradient is not finite, after which the run stops with a diagnosis;
# fewer are skipped
skip_limit: int = 10
accumulate: int = 1  # N: a batch goes through in N parts, with 1/N of the activations in memory
recompute: bool = False  # keep only the blocks' inputs: less memory, up to a third more time
# under torchrun: split weights, gradients and moments over ranks (FSDP2); implies --recompute
fsdp: bool = False
compile: Literal["auto", "on", "off"] = "auto"  # torch.compile over the blocks; auto: on a GPU
cuda_graph: Literal["auto", "on", "off"] = "auto"  # launch a step's passes as one: on one GPU
# reading and decoding threads [all cores, shared by a machine's ranks]
threads = max(1, (os.cpu_count() or 1) // config.local_ranks())
# threads of the arithmetic on a CPU [torch's: all cores]; part of what the last bits depend on
compute_threads: int | None = None
device = "auto"  # auto, cpu, cuda or cuda:1
deterministic: bool = False  # on a GPU: the same bits every run, slower
# TFLOP/s of matrix products that MFU is a share of [measured at the start]
matrix_rate: float | None = None
wandb: str | None = None  # project of Weights & Biases to log to as well (pip install wandb)
tensorboard: bool = False  # log to checkpoints/<run>/tensorboard, too (pip install tensorboard)
checkpoints = "checkpoints"  # folder of checkpoints
run_logs = "run_logs"  # folder of logs
# -------------------------------------------------------------------------------------------------
settings = config.apply(
    globals(),
    recipes=recipes.RECIPES,
    left_open=recipes.LEFT_OPEN,
    least=dict.fromkeys(
        """frames resolution patch depth predictor_depth predictor_dim predictor_heads batch_size
        epochs max_steps accumulate eval_every val_batches stats_clips save_every log_every
        skip_limit threads compute_threads""".split(),
        1,
    )
    | dict.fromkeys(
        """seed eval_seed lookup_clips warmup grad_clip lr lr_end eps weight_decay weight_decay_end
        vicreg_variance vicreg_covariance context_loss ema save_minutes longest_seconds""".split(),
        0,
    )
    | {"matrix_rate": 1e-6},
)
given_paths.check(cache=cache, val_cache=val_cache, data=data, teacher=teacher)
if resume not in (None, "auto", ""):
    runs.to_resume(resume, checkpoints, run_logs)

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for large pages on a CPU
import torch  # after the settings, so that --help and a mistyped flag answer at once

import model
from benchmarks import budget
from salt import errors, health, heldout, journal, optimiser, ranks, schedule, score, task
from salt.graph import launched_as_one
from salt.initial import initialise
from salt.loader import Loader, rows_to_read
from salt.lookup import lookup_of_training
from salt.masks import in_order, keyed_sample, shuffled
from salt.meter import Meter
from salt.ranks import rank, world
from salt.refusals import refuse
from salt.run import Run

# ---- log and device
refuse(settings)
log = journal.Log(run_logs, run_name)  # its last line is always `Process exiting.`
stop = schedule.Stop(log)
place = ranks.pick_device(ranks.start(device))
ranks.compute_on(place, compute_threads, deterministic)
journal.introduce(log, settings, place)

# ---- what is worked on: clips come under the view of the cache, and under no other
work = task.open_training(settings, place, log)
clips, view = work.clips, work.clips.view
epoch_length = len(clips) // batch_size
total_steps = max_steps or epochs * epoch_length
run = Run(settings, log, config.may_change, worst=-math.inf if work.held_out else math.inf)
run.check(view, work.identity)

# ---- model and optimiser
torch.manual_seed(seed)  # here, so that nothing before it shows in the initial weights
salt = model.build_salt(work.encoder, work.predictor)
log(model.describe(salt, size, target))
if init_from and not run.saved:
    log(initialise(salt.student, init_from))
averaged = copy.deepcopy(salt).requires_grad_(False) if ema else None
networks = [salt, averaged] if ema else [salt]
if run.saved:
    model.load_both(salt, run.saved, run.origin)
    if ema:
        model.load_both(averaged, run.saved["ema"], run.origin)
for network in networks:
    if fsdp:
        ranks.shard(network, place)  # before it goes to the GPU, since the whole need not fit there
    network.to(place)
parameters = list(salt.parameters())
groups = optimiser.parameter_groups(salt, weight_decay)
optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
# with FSDP2 the casts of all matrices would be kept for the backward pass, on each rank
salt.student.recompute = salt.predictor.recompute = recompute or fsdp
model.compile_blocks(salt, compile, place, log)
net = ranks.data_parallel(salt, place) if world > 1 and not fsdp else salt  # what a step calls
warmup_steps = schedule.warmup_steps(settings, total_steps)
journal.say_what_is_in_force(log, settings, work, warmup_steps, epoch_length)
clip_share = budget.of_training(settings, work, place, log)  # of the matrix rate, a clip a second
if run.saved:
    run.restore(optimizer, place)
    run.leave_if_finished(total_steps)

# ---- batches, with what of them a step looks at
clips_a_pass = batch_size // world // accumulate
wanted = rows_to_read(target, work.teacher, context=settings.context_loss > 0) | {"share": targets}
rows_held_out = rows_to_read(target, context=True)
reading = {"threads": threads, "device": place}


def training_batches(steps):
    """The batch of each step in `steps`, counted from 0; this rank's part of it."""
    order = shuffled(len(clips), batch_size, seed, steps, rank, world)
    failed = functools.partial(run.failed, "training")
    return Loader(clips, order, masks, seed, **wanted, **reading, failed=failed, substitutes=True)


def whole_batches(records):
    """Every row of some training clips; those that cannot be decoded are left out."""
    loader = Loader(clips, in_order(records, clips_a_pass), **reading, failed=lambda *error: None)
    count = -(-len(records) // clips_a_pass)
    return map(work.with_latents, journal.bar(loader, "statistics", count))


# ---- the space of the targets, and the per-position mean that R2 is measured from
if run.saved:
    space, stats = score.Space(**run.saved["space"]), run.saved["stats"]
else:
    space, stats = ranks.from_rank_0(lambda: score.target_space(settings, work, whole_batches, log))
space = space.to(place)
lookup = lookup_of_training(settings, work, space, run.saved, log)  # None where there is none


@torch.compiler.set_stance("force_eager")  # a last, smaller batch would be compiled for itself
@torch.no_grad()
def evaluate(step):
    """R2 on the held-out clips, logged and kept in history."""
    meter.flush()
    kept = work.measured[keyed_sample(len(work.measured), val_batches * batch_size, eval_seed)]
    turn, turns = (0, 1) if fsdp else (rank, world)  # with FSDP2 all ranks run each batch together
    mine = itertools.islice(in_order(kept, clips_a_pass), turn, None, turns)
    failed = functools.partial(run.failed, "held-out")
    how = {**rows_held_out, **reading, "failed": failed}
    loader = Loader(work.held_out, mine, masks, eval_seed, **how)
    for network in networks:
        model.cast_matrices(network, dtype)
    parts = []
    batches = journal.bar(loader, f"{work.measured_on} R2", -(-len(kept) // (clips_a_pass * turns)))
    for batch in batches:
        found = [score.clip_errors(network, space, batch, lookup=lookup) for network in networks]
        parts.append([heldout.checked(each, batch, work.held_out) for each in found])
    for network in networks:
        model.cast_matrices(network, "fp32")
    entry = score.evaluation(step, parts if fsdp else ranks.in_turn(parts), work.measured_on)
    entry = ranks.from_rank_0(lambda: entry)  # what is best, all must see alike
    log(score.evaluation_line(entry, len(kept)))
    metrics.write(entry)
    history.append(entry)
    meter.start_clock()
    return entry["val_r2"]


def state(step):
    """What best.pth keeps. Waits for every step, and writes the line that is open."""
    content = {
        **model.weights_of(salt),
        "encoder_config": model.plain(work.encoder),
        "predictor_config": work.predictor,
        "settings": dict(settings),
        "step": step,
        "epoch": step / epoch_length,
        "losses": meter.losses_so_far(),
        "history": history,
        "best": run.best,
        "view": view.to_dict(),
        "stats": stats,
        "lookup": lookup and lookup.chosen,
        "space": model.plain(space.to("cpu")),
        "identity": work.identity,
        "teacher": work.identity["teacher"],
        "trained_on": work.trained_on,
        "run": run.name,
    }
    return content | ({"ema": model.weights_of(averaged)} if ema else {})


def resumable_state(step):
    """What last.pth keeps beside it, to go on from."""
    return state(step) | {"optimizer": optimizer.state_dict()} | run.circumstances(meter, place)


def loss_of(network, batch, weight=1.0):
    penalties = vicreg_variance, vicreg_covariance
    return model.salt_loss(network, batch, space, loss, weight, *penalties, settings.context_loss)


def passes(batch):
    """Forward and backward passes over its parts: of each the sums of its loss, and features."""
    model.cast_matrices(salt, dtype)  # bf16 copies, whose gradients go to the float32 weights
    found = []
    for number, part in enumerate(batch.split(accumulate), 1):
        ranks.sync_gradients(net, number == accumulate)  # DDP averages with the last part
        weighted_loss, sums = loss_of(net, part, 1 / accumulate)
        weighted_loss.backward()
        found.append((sums, salt.features))
    return found


@torch.compiler.set_stance("force_eager")
def diagnose(step):
    """Where the numbers of a step that are not finite come from: it is done again, clip by clip."""
    batch = work.with_latents(next(training_batches([step - 1])))
    model.cast_matrices(salt, dtype)
    return health.diagnose(salt, space, clips, batch, functools.partial(loss_of, salt))


# ---- the run
step, history = run.step, run.history  # history: held-out evaluations
due = schedule.Due(stop, total_steps, epoch_length, settings, evaluates=bool(work.held_out))
# lists this start in the folder; run.saved is gone from here on
run.begin(first_evaluation=min(due.eval_every if work.held_out else epoch_length, total_steps))
metrics = journal.open_metrics(run, settings)
meter = Meter(run, log, metrics, due, settings, optimizer, clip_share=clip_share, diagnose=diagnose)
log.at_end = meter.at_end
if work.held_out and not history:
    evaluate(step)
if not run.in_place:
    run.save("last.pth", resumable_state(step))  # what resumes a run; its disk has room, as is seen
errors.started = True  # a signal is waited for and saves; each rank says its own errors
batches = training_batches(range(step, total_steps))
run_passes = launched_as_one(passes, salt, settings, place, log)
meter.start_clock()
while step < total_steps and not due.stopping:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step, total_steps, lr, lr_end, warmup_steps)
        decay = schedule.cosine(weight_decay, weight_decay_end, step / total_steps)
        group["weight_decay"] = decay * group["decays"]  # matrices alone
    batch = work.with_latents(meter.waiting_for(batches))  # on the device; this rank's part
    step += 1
    meter.take(step, run_passes(batch))  # sums over parts and ranks
    norm = optimiser.update(optimizer, parameters, grad_clip, meter.loss)  # not finite: skipped
    if ema:
        optimiser.move_average(averaged, salt, ema)  # after a skipped step, too
    # a GPU's line comes a step or more later, or with an evaluation or save; stops at skip_limit
    meter.end_step(norm)
    if due.to_evaluate(step):
        figure = evaluate(step)
        run.keep_best(figure, max, functools.partial(state, step))
    elif due.epoch_end(step) and not work.held_out:
        run.keep_best(meter.average(epoch_length), min, functools.partial(state, step))
    if due.to_save(step):  # by steps, minutes or a signal (due.stopping), as all ranks agree
        run.save("last.pth", resumable_state(step))

# ---- the end
batches.close()
meter.close()
run.end(lambda: state(step), lambda: resumable_state(step))  # where one is not there yet
metrics.close()
log.status = "stopped" if due.stopping and step < total_steps else "finished"
log(f"checkpoints in {run.folder}")
ranks.leave(stop.exit_code if log.status == "stopped" else 0)
