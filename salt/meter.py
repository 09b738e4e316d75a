"""What a training step yields: losses and norms, read a step late so that no GPU waits; health,
rates, the log line; and the steps that are skipped.
"""

import functools
import itertools
import json
import math
import os
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from salt import health, ranks
from salt.errors import InputError
from salt.files import write_whole
from salt.journal import average, summary
from salt.ranks import rank, world


class Line(NamedTuple):
    """A log line that is still to be written."""

    step: int
    values: list  # [loss, squared, spread, ..., gradient norm] of each step since the line before
    seconds: float  # that one of them took on average,
    waited: float  # and the share of it that was spent waiting for batches
    lr: float
    weight_decay: float
    moments: torch.Tensor  # health.moments of the last step's features
    update: torch.Tensor  # health.update_ratio of its update
    collapse: Any = None  # the Future of health.collapse of these moments, on rank 0


class Meter:
    """Watches the steps of a run, and writes its lines.

    run           run.Run, whose steps so far it goes on from
    log, metrics  journal.Log and journal.Metrics
    due           schedule.Due: when a line is due
    optimizer     whose rate, decay and moments are read
    s             train.py's settings
    clip_share    the share of the matrix rate that one clip a second is
    diagnose      (step) -> what health.diagnose finds when the step is done again
    """

    def __init__(self, run, log, metrics, due, s, optimizer, clip_share, diagnose):
        self.run = run
        self.log = log
        self.metrics = metrics
        self.due = due
        self.s = s
        self.optimizer = optimizer
        self.clip_share = clip_share
        self.diagnose = diagnose
        self.device = optimizer.param_groups[0]["params"][0].device
        self.on_gpu = self.device.type == "cuda"
        self.losses = run.losses  # of every step that a line has told; nan where it was skipped
        self.pending = run.pending  # [loss, squared, spread, ..., gradient norm] of each step since
        self.queued = deque()  # (values, mark) of steps that a GPU may still be doing
        self.line = None  # the last one, if it is not written yet
        self.step = self.first_step = run.step
        self.skipped = sum(map(math.isnan, self.losses))
        self.bad = 0  # steps in a row, up to here, that were not finite
        for loss in (*self.losses, *(values.sum().item() for values in self.pending)):
            self.bad = 0 if math.isfinite(loss) else self.bad + 1
        self.moments = []  # health.moments of each part of a step whose line is due
        self.sums: Any = 0  # what model.salt_loss gives, of the step under way
        scale = [s.accumulate * world, 1, 1, *[1, 1] * (s.context_loss > 0)]
        self.scale = torch.tensor(scale, device=self.device)
        # singular values take 0.1 s of a line's step, beside which the GPU must not wait
        self.analyst = ThreadPoolExecutor(1)
        self.start_clock()

    def start_clock(self):
        """Time and steps of the next line count from here: evaluations do not, saves do."""
        self.clock = time.perf_counter()
        self.waited = 0.0
        self.timed_step = self.step

    # ---- in a step

    def waiting_for(self, loader):
        """The loader's next batch; how long it took is the line's share of waiting."""
        start = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - start
        return batch

    def take(self, step, found):
        """A step's passes: of each part of this rank's batch [loss, squared, spread, ...], as
        model.salt_loss gives them, and what the student gave, which is looked at where the step's
        line is due.
        """
        self.step = step
        self.sums = sum(sums.float() for sums, _ in found) / self.scale
        if world > 1:
            dist.all_reduce(self.sums)
        if self.due.to_log(step):
            self.moments = [health.moments(features) for _, features in found]

    @property
    def loss(self):
        """Of the whole batch, still on the device; not finite where any of its sums is not."""
        return self.sums[0] + 0 * self.sums.sum()

    def end_step(self, norm):
        """norm: of the gradient, float32 scalar on the device."""
        self.pending.append(self.to_host(torch.cat([self.sums, norm[None]])))
        due = self.due.to_log(self.step)
        line = self.line_of_step() if due else None
        mark = None
        if self.on_gpu:
            mark = torch.cuda.Event(blocking=True)
            torch.cuda.current_stream(self.device).record_event(mark)
        self.queued.append((self.pending[-1], mark))
        if line and rank == 0:
            line = line._replace(collapse=self.analyst.submit(collapse_of, mark, line.moments))
        self.say_when_the_next_line_comes()
        self.settle(keep=1 if self.on_gpu else 0)  # one step is queued while one runs
        if self.line and (due or rank or self.line.collapse.done()):
            self.write_line()
        if line:
            self.line, self.pending = line, []
        if not self.queued:
            self.write_line()

    def line_of_step(self):
        """The Line of the steps up to this one, with what it needs of the device under way."""
        moments = sum(self.moments)
        update = health.update_ratio(self.optimizer)
        now = time.perf_counter()
        self.moments.clear()
        if world > 1:
            dist.all_reduce(moments)
        if self.s.fsdp:
            dist.all_reduce(update)
        group = self.optimizer.param_groups[0]
        seconds, waited = now - self.clock, self.waited
        line = Line(
            self.step,
            self.pending,
            seconds / (self.step - self.timed_step),
            waited / seconds,
            group["lr"],
            group["weight_decay"],
            self.to_host(moments),
            self.to_host(update),
        )
        self.start_clock()
        self.clock = now
        return line

    def to_host(self, x):
        """x on the host: on a GPU it is there once the step's mark has passed."""
        if not self.on_gpu:
            return x
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)

    def say_when_the_next_line_comes(self):
        seconds = time.perf_counter() - self.clock
        if self.step == self.first_step + 1 and not self.due.to_log(self.step) and seconds > 1:
            line = self.due.next_line(self.step)
            left = timedelta(seconds=int((line - self.step) * seconds))
            self.log(
                f"the first step took {seconds:.1f} s; the next line is due after step {line}, in"
                f" about {left}"
            )

    # ---- after it

    def settle(self, keep=0):
        """Wait for all steps under way but `keep`, and see whether they were finite."""
        while len(self.queued) > keep:
            values, mark = self.queued.popleft()
            if mark:
                mark.synchronize()
            self.bad = 0 if values.isfinite().all() else self.bad + 1
            step = self.step - len(self.queued)
            if self.bad:
                self.log(
                    f"step {step} is skipped: loss {values[0]:.4g}, gradient norm {values[-1]:.4g}"
                )
            if self.bad >= self.s.skip_limit:
                self.stop_with_diagnosis(step, *values[[0, -1]].tolist())

    def flush(self):
        """Wait for every step, and write the line that is open."""
        self.settle()
        self.write_line()

    def losses_so_far(self):
        """float64 [steps that lines have told]: for a checkpoint; nan where a step was skipped."""
        self.flush()
        return torch.tensor(self.losses, dtype=torch.float64)

    def untold(self):
        """float32 [steps since the last line, 4, or 6 with --context_loss]: see .pending."""
        self.flush()
        return torch.stack(self.pending) if self.pending else torch.zeros(0, 4)

    def average(self, count):
        """Mean loss of the last `count` steps, of those that were not skipped."""
        self.flush()
        return average(self.losses[-min(count, len(self.losses)) :])

    def close(self):
        self.analyst.shutdown()

    def write_line(self):
        """Log the steps of self.line, where there is one."""
        if not self.line:
            return
        line, self.line = self.line, None
        values = torch.stack(line.values).double()
        finite = values.isfinite().all(1)
        values[~finite] = math.nan
        self.losses.extend(values[:, 0].tolist())
        self.skipped += int((~finite).sum())
        if rank:
            return
        entry = self.entry(line, values[finite])
        self.metrics.write(entry)
        left = timedelta(seconds=int((self.due.total_steps - line.step) * line.seconds))
        seen = f" R2c {entry['r2_context']:.4f}" if "r2_context" in entry else ""
        self.log(
            f"step {line.step}/{self.due.total_steps} epoch {entry['epoch']:.2f} loss"
            f" {entry['loss']:.5f} R2 {entry['r2']:.4f}{seen} lr {line.lr:.2e} wd"
            f" {line.weight_decay:.3f} grad {entry['grad_norm']:.3g} clipped"
            f" {entry['clipped']:.0%} update {entry['update_ratio']:.1e} std"
            f" {entry['feature_std']:.3f} erank {entry['effective_rank']:.1f}"
            f" {entry['clips_per_s']:.2f} clips/s MFU {entry['mfu']:.0%} waiting"
            f" {entry['data_wait']:.0%} {entry['memory_gb']:.2f} GB"
            f"{' skipped ' + str(self.skipped) if self.skipped else ''} left {left}"
        )

    def entry(self, line, taken):
        """The Line as an entry of metrics.jsonl. taken: float64 [steps, 4 or 6], not skipped."""
        deviation, effective_rank = line.collapse.result()
        clips_per_s = 1 / line.seconds * self.s.batch_size
        clipped = (taken[:, -1] > self.s.grad_clip).double().mean().item()
        of_context = {}
        if self.s.context_loss:
            of_context["r2_context"] = 1 - (taken[:, 3].sum() / taken[:, 4].sum()).item()
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "step": line.step,
            "epoch": line.step / self.due.epoch_length,
            "loss": taken[:, 0].mean().item(),
            "r2": 1 - (taken[:, 1].sum() / taken[:, 2].sum()).item(),
            **of_context,
            "lr": line.lr,
            "weight_decay": line.weight_decay,
            "grad_norm": taken[:, -1].mean().item(),
            "clipped": clipped if self.s.grad_clip else 0.0,
            "skipped": self.skipped,
            "update_ratio": (line.update[0] / line.update[1]).sqrt().item(),
            "feature_std": deviation,
            "effective_rank": effective_rank,
            "clips_per_s": clips_per_s,
            "data_wait": line.waited,
            "mfu": clips_per_s * self.clip_share,
            "memory_gb": (torch.cuda.max_memory_allocated(self.device) if self.on_gpu else memory)
            / 1e9,
        }

    def stop_with_diagnosis(self, step, loss, norm):
        """After skip_limit steps in a row that were not finite: say what is wrong, and end."""
        found = self.diagnose(step)
        found = {
            name: list(
                dict.fromkeys(itertools.chain(*(part[name] for part in ranks.gather(found))))
            )
            for name in found
        }
        path = os.path.join(self.run.folder, "diagnosis.json")
        content = json.dumps({"step": step, **found}, indent=1).encode()
        ranks.from_rank_0(functools.partial(write_whole, path, content))
        if rank:
            os._exit(1)
        raise InputError(
            f"the loss or its gradient was not finite in {self.s.skip_limit} steps in a row, the"
            f" last of them step {step} (loss {loss:.4g}, gradient norm {norm:.4g}):"
            f" {health.in_words(found, loss)}. More is in {path}; in these steps the weights were"
            " left alone"
        )

    def at_end(self):
        """Lines of a log's end: what it still has to say of the steps, and a summary of all."""
        try:
            if self.line and self.on_gpu:
                torch.cuda.synchronize(self.device)
            self.write_line()
        # the GPU, the disk or a tracker may be what ended the run
        except Exception as error:
            self.log(f"the last line is lost: {' '.join(str(error).split())[:200]}")
        known = self.pending[: len(self.pending) - len(self.queued)]
        losses = [v[0].item() if v.isfinite().all() else math.nan for v in known]
        return summary([*self.losses, *losses], self.due.epoch_length, self.run.history)


def collapse_of(mark, moments):
    """health.collapse of features that a GPU may still be making."""
    if mark:
        mark.synchronize()
    return health.collapse(moments)
