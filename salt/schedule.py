"""When a run logs, evaluates, saves and stops; and its learning rate and weight decay."""

import math
import os
import signal
import sys
import time

from salt import errors, ranks
from salt.errors import InputError
from salt.ranks import rank


class Stop:
    """SIGTERM, SIGINT and SIGHUP: the first lets the step under way finish, and has it saved;
    another one, two seconds later or more, does not wait.
    """

    def __init__(self, log):
        self.log, self.number, self.since = log, None, None  # number: of the signal that came
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if not errors.started:
            os.write(2, b"training has not begun: leaving at once\n")
        elif self.since is None:
            self.number, self.since = number, time.monotonic()
            said = "saving after the step under way or its evaluation, then leaving"
            os.write(2, f"{said}; once more to leave at once\n".encode())
            return
        elif time.monotonic() <= self.since + 2:
            return
        self.log.status = "stopped"
        sys.exit(128 + number)

    @property
    def exit_code(self):
        return 128 + (self.number or signal.SIGTERM)


class Due:
    """What is due after a step: by its number alone, but for saving, which all ranks agree on.

    stop          Stop
    total_steps, epoch_length  of the run
    s             train.py's settings
    evaluates     whether there are held-out clips
    """

    def __init__(self, stop, total_steps, epoch_length, s, evaluates):
        self.stop = stop
        self.total_steps = total_steps
        self.epoch_length = epoch_length
        self.log_every, self.eval_every = s.log_every, s.eval_every or epoch_length
        self.save_every, self.save_minutes = s.save_every, s.save_minutes
        self.evaluates, self.saved_at = evaluates, time.monotonic()
        self.stopping = False  # whether a signal has come to any of the ranks

    def epoch_end(self, step):
        return step == self.total_steps or step % self.epoch_length == 0

    def to_evaluate(self, step):
        return self.evaluates and (step == self.total_steps or step % self.eval_every == 0)

    def to_log(self, step):
        """By the step alone, so that a resumed run writes the same lines."""
        return step % self.log_every == 0 or self.epoch_end(step) or self.to_evaluate(step)

    def next_line(self, step):
        return next(s for s in range(step, self.total_steps + 1) if self.to_log(s))

    def to_save(self, step):
        """By steps, minutes and signals. Called once a step: a signal from here on lets one more
        step run, and that one saves.
        """
        minutes = (time.monotonic() - self.saved_at) / 60
        late = rank == 0 and 0 < self.save_minutes < minutes
        self.stopping, late = ranks.agree(self.stop.since is not None, late)
        due = self.stopping or late or step == self.total_steps or step % self.save_every == 0
        if due:
            self.saved_at = time.monotonic()
        return due


def cosine(start, end, share):
    """From `start` to `end` along half a cosine, as `share` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, share))))


def warmup_steps(s, total_steps):
    """Steps of the warm-up. Raises InputError where it is longer than the run."""
    steps = min(2000, total_steps // 10) if s.warmup is None else s.warmup
    if steps > total_steps:
        raise InputError(
            f"--warmup {steps} is longer than the run, {total_steps} steps: the learning rate would"
            " never reach --lr; lower it"
        )
    return steps


def rate(step, total_steps, peak, end, warmup):
    """Learning rate after `step` steps: a linear warm-up, then half a cosine from peak to end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, end, (step - warmup) / max(1, total_steps - warmup))
