"""A run's folder, locked by the process that trains in it, and which checkpoint it goes on from."""

import atexit
import contextlib
import fcntl
import glob
import json
import os
import shutil
import time
from typing import Any

from salt.alive import this_process
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from salt.runs import (
    exclusively,
    files_in,
    is_run,
    lines_of,
    named,
    run_copied_to,
    to_resume,
)
from salt.torch_files import step_and_run


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
    paths = [
        path
        for folder in folders
        for name in ("previous.pth", "last.pth")
        if os.path.isfile(path := os.path.join(folder, name))
    ]
    # unreadable ones first: they are named
    known = {
        path: (step_and_run(path)[0], os.path.getmtime(path), path.endswith("last.pth"))
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
            source = self.path
            if not (os.path.isfile(previous) and os.path.samefile(source, previous)):
                source = f"{last}.part"
                copy_whole(self.path, source)  # before anything is moved: the disk may be full
                if os.path.isfile(metrics := os.path.join(self.folder, "metrics.jsonl")):
                    copy_whole(metrics, f"{left}_metrics.jsonl")
                if os.path.isfile(previous):
                    os.replace(previous, f"{left}_previous.pth")
                if os.path.isfile(best) and step_and_run(best)[0] > step:
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
