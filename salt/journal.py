"""What a run writes down as it goes: its log, metrics.jsonl, and what follows these (Weights &
Biases, TensorBoard). Ranks other than 0 write nothing.
"""

import atexit
import contextlib
import faulthandler
import json
import math
import os
import re
import sys
from typing import Any

import torch
from tqdm import tqdm

from salt import advice, alive, config, extension, ranks, runs
from salt.errors import InputError, report_in_one_line
from salt.files import write_whole
from salt.ranks import rank, world
from salt.score import DUMB


class Log:
    """run_logs/NAME_DATE_TIME_pidN.log of this start, and the terminal. Its last line is always
    `Process exiting.`, before it the status, and before that what at_end() says. Two starts never
    share one: a number is added."""

    def __init__(self, folder, name):
        self.path = os.path.join(folder, runs.stamped(name))
        if rank:
            self.file = open(os.devnull, "w")
        else:
            made = runs.exclusively(lambda path: open(path, "x", buffering=1), self.path, ".log")
            self.file, self.path = made
        self.start = os.path.basename(self.path).removesuffix(".log")
        self.status = "failed"
        self.at_end: Any = lambda: ()
        self.whole = True
        # a crash in C++ or SIGBUS still says where
        faulthandler.enable(self.file if rank == 0 else sys.stderr)
        sys.excepthook = self.on_error
        atexit.register(self.close)

    def __call__(self, line):
        try:
            self.file.write(line + "\n")
        # a full disk; the run goes on as long as its checkpoints have room
        except OSError as error:
            if self.whole:
                self.whole = False
                self(
                    f"the log {self.path} cannot be written ({error.strerror}): what follows may"
                    " stand here alone"
                )
        try:
            if rank == 0:
                tqdm.write(line)
                sys.stdout.flush()
        except OSError:  # the terminal or pipe is gone; the run and its log go on
            sys.stdout = open(os.devnull, "w")

    def from_any(self, line):
        """A line of one rank alone: of others than 0, which write no log, on the terminal."""
        if rank:
            print(f"rank {rank}: {line}", file=sys.stderr, flush=True)
        self(line)

    def on_error(self, kind, error, traceback):
        with contextlib.suppress(OSError):
            self.file.write(f"error: {' '.join(str(error).split()) or kind.__name__}\n")
        report_in_one_line(kind, error, traceback)

    def close(self):
        for line in (*self.at_end(), f"status: {self.status}", runs.LAST_LINE):
            self(line)


def introduce(log, s, place):
    """What a log begins with: the command, process and settings of a start, and what it runs on.

    s: train.py's settings; place: its torch.device
    """
    log(f"start {log.start}: {' '.join(sys.argv)}")
    log(f"process {json.dumps(alive.this_process())}")
    log(f"settings {json.dumps(s)}")
    for line in config.from_environment:
        log(line)
    if world > 1:
        again = f", started again for the {ranks.restarts}. time" if ranks.restarts else ""
        log(
            f"{world} ranks{again}; {'FSDP2' if s.fsdp else 'DDP'}: each takes"
            f" {s.batch_size // world} of the {s.batch_size} clips"
        )
    log(extension.describe(place))
    where = f"cpu, {torch.get_num_threads()} threads"
    if place.type == "cuda":
        where = torch.cuda.get_device_name(place)
    log(f"torch {torch.__version__} on {where}, {s.dtype}")


def say_what_is_in_force(log, s, work, warmup_steps, epoch_length):
    """How much there is to do. The line `in force`: what settings that were left open came to, and
    hashes of the content of paths, so that runs can be told apart that were made from other content
    under one path. Then what makes runs stall, and this one does.
    """
    view, total_steps = work.clips.view, s.max_steps or s.epochs * epoch_length
    log(
        f"{len(work.clips)} clips, view {view.hash()}, grid {work.encoder.grid}; {total_steps}"
        f" steps of {s.batch_size}, {epoch_length} an epoch"
    )
    in_force = {
        "frames": view.frames,
        "resolution": view.size,
        "patch": work.clips.patch,
        "warmup": warmup_steps,
        "eval_every": s.eval_every or epoch_length,
    }
    log(f"in force {json.dumps(in_force | work.hashes(pixels=s.target == 'pixels'))}")
    for cause in advice.causes(s, total_steps):
        log(f"warning: {cause} (docs/PLATEAU.md)")


def bar(batches, title, count):
    """A progress bar over batches, on rank 0, where they take longer than two seconds."""
    how = {"unit": "batch", "dynamic_ncols": True, "leave": False, "delay": 2}
    return tqdm(batches, title, count, disable=rank > 0, **how)


def average(losses):
    """Mean of those that are finite; nan where none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if finite else math.nan


EPOCH_LINES = 40  # of a summary; metrics.jsonl has every epoch


def summary(losses, epoch_length, history=()):
    """Lines on a run's losses, one a step, nan where the step was skipped; and on its held-out
    evaluations, entries of score.evaluation.
    """
    if history:
        end = history[-1]
        best = max(history, key=lambda entry: entry["val_r2"])
        beyond = ""
        if "val_best_dumb" in end:  # not in one of an older version
            beyond = f"; from {DUMB[end['val_best_dumb']]}: {end['val_r2_over_best']:.4f}"
        yield (
            f"{end.get('val_videos', 'held-out')} R2 {end['val_r2']:.4f} at step {end['step']},"
            f" at most {best['val_r2']:.4f} at step {best['step']}{beyond}"
        )
    finite, last = [i for i, loss in enumerate(losses) if math.isfinite(loss)], losses[-2000:]
    if finite:
        least = min(finite, key=losses.__getitem__)
        yield f"minimum loss {losses[least]:.6f} at step {least + 1} of {len(losses)}"
    epochs = range(0, len(losses), epoch_length)
    if len(epochs) > EPOCH_LINES:
        yield f"epochs: {len(epochs)}; the last {EPOCH_LINES}:"
    for start in epochs[-EPOCH_LINES:]:
        part = losses[start : start + epoch_length]
        yield (
            f"epoch {start // epoch_length + 1}: average loss {average(part):.6f} over {len(part)}"
            " steps"
        )
    if losses:
        yield f"average loss of the last {len(last)} steps: {average(last):.6f}"
    if len(finite) < len(losses):
        yield f"skipped steps, whose loss or gradient was not finite: {len(losses) - len(finite)}"


def trackers(wandb, tensorboard):
    """(the module of Weights & Biases, TensorBoard's SummaryWriter), None for what is not asked
    for. Raises InputError where it is not installed.
    """
    service = writer = None
    if wandb:
        try:
            import wandb as service
        except ImportError:
            raise InputError(
                "--wandb needs Weights & Biases: pip install wandb, or leave the flag out"
            ) from None
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter as writer
        except ImportError:
            raise InputError(
                "--tensorboard needs tensorboard: pip install tensorboard, or leave the flag out"
            ) from None
    return service, writer


def without_infinities(entry):
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }


def open_metrics(run, s):
    """The Metrics of a run.Run, which trackers follow; what its file lacks is said."""
    step = run.step if run.origin else -1
    metrics = Metrics(run.folder, step, run.history)
    if metrics.damaged:
        run.log(f"{metrics.path}: {metrics.damaged} torn or damaged lines are left out")
    told = run.step - len(run.pending)  # the step of the last line
    lacks = metrics.last_step < told and told > runs.first_step(run.folder)
    if run.in_place and (metrics.restored or lacks):
        run.log(
            f"{metrics.path} was cut or replaced: {metrics.restored} evaluations are written again"
            f" from the checkpoint; lines of steps up to step {told} are lost"
        )
    ranks.from_rank_0(lambda: metrics.follow(run.name, s, run.folder, s.wandb, s.tensorboard))
    return metrics


class Metrics:
    """metrics.jsonl of a run's folder, an entry a line; entries of earlier starts are kept up to
    the step that this one goes on from, or -1.

    history: the evaluations up to that step; those that the file lacks are written again.
    """

    def __init__(self, folder, step=-1, history=()):
        # followers: (function that takes an entry, function that ends it)
        self.path, self.followers = os.path.join(folder, "metrics.jsonl"), []
        # lines of earlier starts that could not be kept; evaluations that were not there; the last
        # line of a step
        self.damaged = self.restored = self.last_step = 0
        if rank == 0:
            kept = list(self.entries_to(step))
            there = {entry["step"] for entry in kept if "val_r2" in entry}
            lost = [without_infinities(entry) for entry in history if entry["step"] not in there]
            self.restored = len(lost)
            self.last_step = max((entry["step"] for entry in kept if "loss" in entry), default=0)
            if lost:
                kept = sorted(kept + lost, key=lambda entry: entry["step"])
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self.file = open(self.path if rank == 0 else os.devnull, "a", buffering=1)

    def entries_to(self, step):
        """Entries of earlier starts up to a step."""
        with contextlib.suppress(FileNotFoundError), open(self.path, errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    if entry["step"] <= step:
                        yield entry
                # a killed run may leave a torn last line, a disk a damaged one
                except (ValueError, KeyError, TypeError):
                    self.damaged += bool(line.strip())

    def follow(self, run, settings, folder, wandb=None, tensorboard=False):
        """Pass entries on to the Weights & Biases project `wandb` and to TensorBoard, those at hand
        first.
        """
        service, writer = trackers(wandb, tensorboard)
        if service:
            session = service.init(
                project=wandb,
                id=re.sub(r"[^\w.-]", "_", run),
                resume="allow",
                name=run,
                config=settings,
            )
            self.followers.append(
                (lambda entry: session.log(entry, step=entry["step"]), session.finish)
            )
        if writer:
            # what earlier starts wrote is written again below
            writer = writer(os.path.join(folder, "tensorboard"), purge_step=0)
            self.followers.append(
                (
                    lambda entry: [
                        writer.add_scalar(name, value, entry["step"])
                        for name, value in entry.items()
                        if not isinstance(value, str)
                    ],
                    writer.close,
                )
            )
        for line in open(self.path) if self.followers else ():
            self.tell(json.loads(line))

    def tell(self, entry):
        for follow, _ in self.followers:
            follow({name: value for name, value in entry.items() if value is not None})

    def close(self):
        for _, end in self.followers:
            end()
        self.followers.clear()

    def write(self, entry):
        """entry: {name: number}; one that is not finite becomes null, for JSON has none."""
        if rank:
            return
        entry = without_infinities(entry)
        try:
            self.file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}); free some disk space and"
                " continue with --resume auto"
            ) from None
        self.tell(entry)
