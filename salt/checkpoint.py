"""A run on disk: saving, finding its furthest checkpoint, locking its folder, going on in it."""

import atexit
import contextlib
import fcntl
import functools
import glob
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from salt import ops, ranks
from salt.cache import agree_on
from salt.errors import InputError
from salt.ranks import rank
from salt.runs import (
    exclusively,
    files_in,
    is_run,
    lines_of,
    named,
    run_copied_to,
    this_process,
    to_resume,
)
from salt.torch_files import load_pickle
from salt.views import View

CHECKPOINT_VERSION = 1
CHECKPOINT_PARTS = (
    "student",
    "predictor",
    "encoder_config",
    "predictor_config",
    "space",
    "settings",
    "view",
    "identity",
    "teacher",
    "step",
)


def save_checkpoint(path, content, previous=None):
    """torch.save beside `path`, flush to the disk, rename; what was there becomes `previous`, where
    one is named.

    Raises InputError where the disk is full; the old file then stands.
    """
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            torch.save({"salt_vla": CHECKPOINT_VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.isfile(path):
            os.replace(path, previous)
        os.replace(part, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, survives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if "CUDA" in str(error):  # of a kernel before, seen only now
            raise
        full = (
            isinstance(error, RuntimeError)
            and shutil.disk_usage(os.path.dirname(path) or ".").free < 1 << 20
        )
        Path(part).unlink(missing_ok=True)
        raise InputError(
            f"the checkpoint {path} could not be written"
            f" ({'No space left on device' if full else str(error).splitlines()[0]}); see to its"
            " disk and continue with --resume auto"
        ) from None


def load_checkpoint(path, ema=False):
    """The content of best.pth or last.pth; with ema its moving average stands in place of student
    and predictor. Raises InputError on anything else.
    """
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; name its best.pth or last.pth")
    if not Path(path).is_file():
        raise InputError(f"there is no checkpoint {path}")
    saved = load_pickle(path)
    if saved.get("salt_vla") != CHECKPOINT_VERSION:
        found = saved.get("salt_vla")
        raise InputError(
            f"{path} is not a checkpoint of train.py"
            if found is None
            else f"{path} has checkpoint format {found}, this code reads {CHECKPOINT_VERSION}"
        )
    missing = [name for name in CHECKPOINT_PARTS if name not in saved]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; it is no whole checkpoint of train.py"
        )
    if ema and "ema" not in saved:
        raise InputError(
            f"{path} holds no moving average of the weights: it was trained without --ema"
        )
    return saved | saved["ema"] if ema else saved


@contextlib.contextmanager
def folder_locked(folder):
    """Keep others from looking for a run in `folder` while this process finds or makes its own
    there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def lock(folder, wait=0):
    """The open starts.jsonl of a run, locked.

    Raises InputError where after `wait` seconds another process still has it.
    """
    file = open(os.path.join(folder, "starts.jsonl"), "a+", errors="replace")
    until = time.monotonic() + max(wait, 1)  # one who asks whether it is held has it for a moment
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise InputError(
                    f"--resume: the run {os.path.basename(folder)} is still going; end it first, or"
                    " choose another --run_name"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


def furthest(folders, log):
    """(path, content) of the whole last.pth or previous.pth in `folders` with the most steps, of
    these the latest; (None, None) where there is none at all.

    One that is damaged is logged, and the next taken. Raises InputError where all of them are.
    """
    from salt import torch_files

    paths = [
        path
        for folder in folders
        for name in ("previous.pth", "last.pth")
        if os.path.isfile(path := os.path.join(folder, name))
    ]
    # unreadable ones first: they are named
    known = {
        path: (torch_files.step_and_run(path)[0], os.path.getmtime(path), path.endswith("last.pth"))
        for path in paths
    }
    for path in sorted(paths, key=known.__getitem__, reverse=True):
        try:
            return path, load_checkpoint(path)
        except InputError as error:
            log(f"passed over: {error}")
    if paths:
        raise InputError(
            f"none of the {len(paths)} checkpoints is whole ({', '.join(paths)}); move them away to"
            " start afresh, or give another --run_name"
        )
    return None, None


def copy_whole(source, path):
    """Copy a file and flush it to the disk.

    Raises InputError, with nothing left of it, where that cannot be.
    """
    try:
        shutil.copyfile(source, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise InputError(
            f"{path} cannot be written: {error.strerror}; make room, and run the same command again"
        ) from None


def died_young(folder):
    """Whether a run's folder holds nothing of worth: its process died before it had a checkpoint or
    a step.
    """
    metrics = os.path.join(folder, "metrics.jsonl")
    kept = [
        name
        for name in os.listdir(folder)
        if name not in ("starts.jsonl", "metrics.jsonl") and not name.endswith(".part")
    ]
    return not kept and not (
        os.path.isfile(metrics) and any('"loss"' in line for line in lines_of(metrics))
    )


class RunFolder:
    """A run's .folder, locked by this process, and where it goes on from: .path and .content of a
    checkpoint, or None.

    checkpoints, run_logs  folders of all runs and logs
    name         --run_name
    start        NAME_DATE_TIME_pidN of this start
    resume       None, 'auto' or what `find` takes
    log          called with a line
    wait         seconds to wait for a process that still holds the run
    Raises InputError where the run is still going, or there is no checkpoint to go on from.
    """

    def __init__(self, checkpoints, run_logs, name, start, resume, log, wait=0):
        self.path: Any = None
        self.content: Any = None
        self.folder: Any = None
        self.file: Any = None  # starts.jsonl, locked
        self.is_new = False
        atexit.register(self.leave)
        # of two first starts with --resume auto, the second finds the first's folder
        with folder_locked(checkpoints):
            if resume == "auto":
                self.go_on_by_name(checkpoints, name, log, wait)
            elif resume:
                self.go_on_from(resume, checkpoints, run_logs, log, wait)
            if not self.folder:
                _, self.folder = exclusively(os.mkdir, os.path.join(checkpoints, start))
                self.file, self.is_new = lock(self.folder), True
        # half-written when it was killed
        for left in glob.glob(os.path.join(glob.escape(self.folder), "*.part")):
            os.remove(left)

    def go_on_by_name(self, checkpoints, name, log, wait):
        folders = [
            os.path.join(checkpoints, each)
            for each in named(files_in(checkpoints), name)
            if is_run(os.path.join(checkpoints, each))
        ]
        folders = [folder for folder in folders if not self.is_copy(folder, log)]
        locks = {folder: lock(folder, wait) for folder in folders}
        self.path, self.content = furthest(folders, log)
        if self.path:
            self.folder = os.path.dirname(self.path)
        else:
            self.folder = next((folder for folder in reversed(folders) if died_young(folder)), None)
            self.is_new = self.folder is not None
        self.file = locks.get(self.folder)
        for file in locks.values():
            if file is not self.file:
                file.close()
        log(
            f"resuming from {self.path}"
            if self.path
            else f"--resume auto: {checkpoints} has no last.pth of {name}, starting afresh"
        )

    def is_copy(self, folder, log):
        """Whether a folder holds checkpoints of a run that has another one."""
        run = run_copied_to(folder)
        if run:
            log(f"{folder} is a copy of {run}: left alone")
        return run is not None

    def go_on_from(self, resume, checkpoints, run_logs, log, wait):

        if os.path.isfile(resume) and resume.endswith((".pth", ".pt")):
            self.path = resume
        else:
            self.path, self.content = furthest([to_resume(resume, checkpoints, run_logs)], log)
        self.content = self.content or load_checkpoint(self.path)
        self.take(os.path.dirname(os.path.abspath(self.path)), log)
        if self.folder:
            self.folder = os.path.relpath(self.folder)
            self.file = lock(self.folder, wait)

    def take(self, folder, log):
        """Go on in a checkpoint's own folder; a copy of it in another one is left alone, and what
        comes of it has a folder of its own.
        """
        run, folder = self.content.get("run", os.path.basename(folder)), os.path.realpath(folder)
        if run == os.path.basename(folder):
            self.folder = folder
        else:
            log(
                f"{self.path} is a copy of a checkpoint of {run}: what comes of it has a folder of"
                f" its own, and {folder} is left alone"
            )

    @property
    def goes_on_in_place(self):
        return self.path is not None and os.path.realpath(
            os.path.dirname(self.path) or "."
        ) == os.path.realpath(self.folder)

    def take_content(self):
        """The content of the checkpoint, once: its memory is wanted."""
        content, self.content = self.content, None
        return content

    def begin(self, log, step):
        """List this start: the path of its log, the step it begins at and its process. What it goes
        on from becomes last.pth; what is damaged, of a later step, on the branch that is left,
        stays beside it under another name."""
        last, previous, best = (
            os.path.join(self.folder, f"{name}.pth") for name in ("last", "previous", "best")
        )
        left = os.path.join(
            self.folder, f"left_behind_by_{os.path.basename(log).removesuffix('.log')}"
        )
        if self.goes_on_in_place and not (
            os.path.isfile(last) and os.path.samefile(self.path, last)
        ):
            from salt import torch_files

            source = self.path
            if not (os.path.isfile(previous) and os.path.samefile(source, previous)):
                source = f"{last}.part"
                copy_whole(self.path, source)  # before anything is moved: the disk may be full
                if os.path.isfile(metrics := os.path.join(self.folder, "metrics.jsonl")):
                    copy_whole(metrics, f"{left}_metrics.jsonl")
                if os.path.isfile(previous):
                    os.replace(previous, f"{left}_previous.pth")
                if os.path.isfile(best) and torch_files.step_and_run(best)[0] > step:
                    os.replace(best, f"{left}_best.pth")
            if os.path.isfile(last):
                try:
                    os.link(last, f"{left}.pth")  # and last.pth is there all the time
                except OSError:
                    os.replace(last, f"{left}.pth")
            os.replace(source, last)
        entry = {
            "log": os.path.relpath(log, self.folder),
            "step": step,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            **this_process(),
        }
        self.file.seek(0)
        torn = not ("\n" + self.file.read()).endswith("\n")  # by a full disk
        self.file.write("\n" * torn + json.dumps(entry) + "\n")
        self.file.flush()

    def leave(self):
        """A start that failed before its first checkpoint leaves no folder of its own behind."""
        if (
            self.is_new
            and self.file
            and os.path.isdir(self.folder)
            and not any(name.endswith(".pth") for name in os.listdir(self.folder))
        ):
            for name in ("starts.jsonl", "metrics.jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, name))
            with contextlib.suppress(OSError):  # there is something else in it
                os.rmdir(self.folder)


class Run:
    """A run as all its ranks have it: .folder, .name, and .saved, the content of the checkpoint at
    .origin that it goes on from, or None.

    s, log      train.py's settings, journal.Log
    worst       -inf where best.pth is the highest figure, inf where it is the lowest
    may_change  names of those settings that need not be what they were on --resume
    Raises InputError where there is nothing to go on from, or it was another run than is asked for.
    """

    def __init__(self, s, log, may_change, worst):
        self.s = s
        self.log = log
        self.may_change = may_change
        self.best = worst
        self.mine: Any = None  # rank 0's RunFolder
        self.saved: Any = None
        self.failures = set()
        self.folder, self.origin, self.in_place = ranks.first(self.open)
        self.name = os.path.basename(self.folder)
        if self.origin:
            self.saved = self.mine.take_content() if self.mine else load_checkpoint(self.origin)
        kept = self.saved or {}
        self.step = kept.get("step", 0)
        self.history = kept.get("history", [])  # held-out evaluations
        self.losses = kept["losses"].tolist() if "losses" in kept else []  # of all steps that
        self.pending = list(kept.get("pending", ()))  # lines have told, and of those since
        log(f"folder {self.folder}")
        if self.in_place and not named([self.name], s.run_name):
            log(
                f"this start goes on with the run {self.name}, by whose name it is found;"
                f" --run_name {s.run_name} names its log alone"
            )

    def open(self):
        """Rank 0's part: (folder, checkpoint to go on from or None, whether that is in it)."""
        s = self.s
        # a rank that was cut off may take a while to be seen as dead
        wait = 120 if ranks.restarts else 0
        self.mine = RunFolder(
            s.checkpoints, s.run_logs, s.run_name, self.log.start, s.resume, self.log, wait
        )
        return self.mine.folder, self.mine.path, self.mine.goes_on_in_place

    def path(self, name):
        return os.path.join(self.folder, name)

    def check(self, view, identity):
        """Raises InputError where the checkpoint is of other clips, another teacher or settings."""
        saved, origin = self.saved, self.origin
        if not saved:
            return
        if self.s.ema and "ema" not in saved:
            raise InputError(
                f"--resume {origin} was trained without --ema; leave it out, or start a new run"
            )
        needed = ("optimizer", "rng", "losses", "history", "best", "stats")
        missing = [name for name in needed if name not in saved]
        if missing:
            raise InputError(f"--resume {origin} holds no {', '.join(missing)}; give a last.pth")
        difference = view.difference(View.from_dict(saved["view"]))
        if difference:
            raise InputError(f"--resume {origin} was trained under another view: {difference}")
        for name, what in OTHER_RUN.items():
            if not agree_on(saved["identity"][name], identity[name]):
                raise InputError(
                    f"--resume {origin} was trained with {what}; give the same, or start a new run"
                )
        for name, value in self.s.items():
            before = saved["settings"].get(name)
            if name in self.may_change or name not in saved["settings"]:
                continue
            if json.dumps(before) != json.dumps(value):
                raise InputError(
                    f"--resume {origin} was trained with --{name} {before}, not {value}; give the"
                    " same, or start a new run, with another --run_name if --resume is auto"
                )

    def restore(self, optimizer, place):
        """The optimiser's state and the random numbers, as they were."""
        saved, state = self.saved, self.saved["optimizer"]
        try:
            optimizer.load_state_dict(ranks.split_like(optimizer, state) if self.s.fsdp else state)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"--resume {self.origin} holds the optimiser state of another model ({error})"
            ) from None
        torch.set_rng_state(saved["rng"]["cpu"])
        if place.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], place)
        self.log(f"resumed {self.origin} at step {self.step}")
        here = self.last_bits(place)
        if not agree_on(saved.get("where"), here):
            self.log(
                f"it ran under {saved['where']} before, now under {here}: the same clips, masks and"
                " schedules, but the last bits may differ"
            )

    def last_bits(self, place):
        """What the last bits of a run depend on, beside its settings."""
        s = self.s
        return {
            "ranks": ranks.world,
            "threads": torch.get_num_threads(),
            "device": place.type,
            "torch": str(torch.__version__),
            "accumulate": s.accumulate,
            "fsdp": s.fsdp,
            "compile": s.compile,
            "deterministic": s.deterministic,
            "kernels": {name: ops.EXTENSION[name] for name in ("devices", "simd", "amx")},
        }

    def circumstances(self, meter, place):
        """What a checkpoint keeps to go on from, beside weights and moments."""
        cuda = torch.cuda.get_rng_state(place) if place.type == "cuda" else None
        return {
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "pending": meter.untold(),
            "where": self.last_bits(place),
        }

    def leave_if_finished(self, total_steps):
        """A script that asks for --resume auto again and again leaves nothing behind."""
        done = self.saved and self.s.resume == "auto" and self.saved["step"] == total_steps
        if not (done and os.path.isfile(self.path("best.pth"))):
            return
        if os.path.basename(self.origin) == "last.pth":
            self.remove_previous()  # of a kill at its very end
        self.log("that run has finished: nothing is left to do")
        self.log.status = "finished"
        ranks.leave()

    def begin(self, first_evaluation):
        """List this start in the folder, and let go of the checkpoint."""
        ranks.first(lambda: self.mine.begin(self.log.path, self.step))
        if self.saved:
            worst, self.best = self.best, self.saved["best"]
            self.best = ranks.first(lambda: self.best_so_far(worst, first_evaluation))
            self.saved = None  # its memory is wanted

    def best_so_far(self, worst, first_evaluation):
        """The figure of best.pth; or what it is at the start, where that file is damaged, or of a
        branch that was left.
        """
        path = self.path("best.pth")
        if self.step < first_evaluation and not os.path.isfile(path):
            return self.best
        try:
            found = load_checkpoint(path)
        except InputError as error:
            self.log(f"left behind: {error}; the next evaluation makes a new best.pth")
            return worst
        its = found.get("best", self.best)
        # of a later step than what is gone on from, or of another branch: it is the file that must
        # be beaten
        if its != self.best:
            self.log(
                f"best.pth is of step {found['step']}, its figure is {its:.6g}: the next better"
                " evaluation takes its place"
            )
        return its

    def keep_best(self, figure, better, state):
        """Save best.pth where `better` (max or min) prefers figure to all before."""
        if figure != self.best and better(figure, self.best) == figure:
            self.best = figure
            self.save("best.pth", state())

    def save(self, name, content):
        """content: of a checkpoint; with FSDP2 its tensors are gathered first, on every rank."""
        content = ranks.whole(content) if self.s.fsdp else content
        previous = self.path("previous.pth") if name == "last.pth" else None
        ranks.first(lambda: save_checkpoint(self.path(name), content, previous))

    def failed(self, part, record, error):
        """Note a clip that could not be had, once; part: "training" or "held-out"."""
        if (part, record) in self.failures:
            return
        self.failures.add((part, record))
        self.log.from_any(f"skipped, {len(self.failures)} so far: {error}")
        name = f"failures-rank{rank}.jsonl" if rank else "failures.jsonl"
        with open(self.path(name), "a") as file:
            entry = {"part": part, "record": record, "reason": str(error)}
            file.write(json.dumps(entry) + "\n")

    def end(self, best, last):
        """best.pth and last.pth exist whenever a run has ended; lost clips are counted.

        best(), last(): the content of each, at the last step.
        """
        for name, state in (("best.pth", best), ("last.pth", last)):
            if not ranks.first(functools.partial(os.path.isfile, self.path(name))):
                self.log(f"there is no {name}: the last step's weights take that name")
                self.save(name, state())
        self.remove_previous()
        ranks.gather(None)  # every rank has written its failures
        files = glob.glob(os.path.join(glob.escape(self.folder), "failures*.jsonl"))
        lines = {line.partition(', "reason"')[0] for path in files for line in lines_of(path)}
        if lines:
            self.log(
                f"{len(lines)} clips could not be had and were left out or replaced by their"
                f" neighbours: {self.folder}/failures*.jsonl"
            )

    def remove_previous(self):
        if rank == 0 and os.path.isfile(self.path("previous.pth")):
            os.remove(self.path("previous.pth"))


OTHER_RUN = {  # part of the identity: what was another
    "train": "other training clips (--cache, --data), of other ids, pixels or latents",
    "teacher": "another teacher",
    "held_out": "another --val_cache",
}
