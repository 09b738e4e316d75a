"""Runs on disk. A run has one folder for life, checkpoints/NAME_DATE_TIME_pidN of its first start,
and each of its starts a log of its own:

    checkpoints/RUN/last.pth, previous.pth, best.pth, metrics.jsonl
    checkpoints/RUN/left_behind_by_START.pth   a last.pth that START could not or was told not to go
                                               on from
    checkpoints/RUN/starts.jsonl      its starts, one a line: log, step, process; locked as long as
                                      one of them lives
    run_logs/START.log

Nothing outside a run's own folder is ever deleted. torch is imported only where a checkpoint is
read.
"""

import atexit
import contextlib
import fcntl
import glob
import itertools
import json
import os
import re
import shutil
import socket
import time

from config import InputError, nearest

# after a run's name; the last number where two starts had the same time and pid
STAMP = r"_\d{8}_\d{6}_pid\d+(?:_\d+)?"
LAST_LINE = "Process exiting."


# ------------------------------------------------------------------------------------------- naming


def stamped(name):
    """NAME_DATE_TIME_pidN of this process; the time is UTC, so that names sort alike under any time
    zone.
    """
    return f"{name}_{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}_pid{os.getpid()}"


def exclusively(make, path, suffix=""):
    """(what make() gives, the path it was made at) for the first of path, path_2, path_3, ...

    that is not there yet: containers share pids.
    """
    for number in itertools.count(1):
        tried = f"{path}{suffix}" if number == 1 else f"{path}_{number}{suffix}"
        with contextlib.suppress(FileExistsError):
            return make(tried), tried


def named(names, name):
    """Those of `names` that are runs or starts of `name`, the latest last."""
    pattern = re.compile(re.escape(name) + STAMP)
    return sorted(
        (each for each in names if pattern.fullmatch(each)), key=lambda each: each[len(name) :]
    )


def files_in(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


# ------------------------------------------------------------------------------------------ finding


def is_run(folder):
    return any(
        os.path.isfile(os.path.join(folder, name))
        for name in ("starts.jsonl", "metrics.jsonl", "last.pth", "best.pth")
    )


def lines_of(path):
    """The lines of a text file. Raises InputError where it cannot be read, or is no text."""
    try:
        with open(path, "rb") as file:
            # a power cut leaves zeros at the end of these
            if b"\0" in file.read(8192) and not str(path).endswith((".log", ".jsonl")):
                raise InputError(
                    f"{path} is not text; give a log, a metrics.jsonl or a run's folder"
                )
        # a progress bar's carriage returns end lines too
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def folder_of_log(log, checkpoints):
    """The folder of the run that a log belongs to, as the log says; None where it came to none."""
    said = [
        line.rstrip("\n").removeprefix("folder ")
        for line in lines_of(log)
        if line.startswith("folder ")
    ]
    beside = os.path.dirname(os.path.dirname(os.path.abspath(log)))
    names = [
        *said[-1:],
        *(
            os.path.join(checkpoints, os.path.basename(path))
            for path in (*said[-1:], log.removesuffix(".log"))
        ),
    ]
    return next(
        (path for name in names for path in (name, os.path.join(beside, name)) if is_run(path)),
        None,
    )


def listed_logs(folder, run_logs):
    """{log: name of the folder it says it is of, or None} of a run's starts that are still there,
    the latest last.
    """
    logs = []
    with (
        contextlib.suppress(FileNotFoundError),
        open(os.path.join(folder, "starts.jsonl"), errors="replace") as lines,
    ):
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn last line
                logs.append(os.path.join(folder, json.loads(line)["log"]))
    name = os.path.basename(os.path.abspath(folder))
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(folder))), "run_logs")
    logs = logs or [f"{name}.log"]  # of a run that an older version made
    places = [
        [log, *(os.path.join(place, os.path.basename(log)) for place in (run_logs, beside))]
        for log in logs
    ]
    found = [path for paths in places if (path := next(filter(os.path.isfile, paths), None))]
    said = [
        next((line.rstrip("\n") for line in lines_of(path) if line.startswith("folder ")), None)
        for path in found
    ]
    return {path: line and os.path.basename(line) for path, line in zip(found, said)}


def first_step(folder):
    """The step at which a run's first start began: 0, or where it went on from another run's
    checkpoint.
    """
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError),
        open(os.path.join(folder, "starts.jsonl"), errors="replace") as lines,
    ):
        return int(json.loads(next(lines, ""))["step"])
    return 0


def logs_of_folder(folder, run_logs):
    """The logs of a run's starts, the latest last; those that say that they are of another folder,
    whose copy this is, left out.
    """
    own = os.path.basename(os.path.realpath(folder))
    return [
        os.path.relpath(path)
        for path, said in listed_logs(folder, run_logs).items()
        if said in (None, own)
    ]


def run_copied_to(folder, run_logs=None):
    """The name of the run that a folder is a copy of, as the logs say, or without logs its
    checkpoints; None where it is that run's own.
    """
    own = os.path.basename(os.path.realpath(folder))
    said = list(listed_logs(folder, run_logs).values()) if run_logs else []
    if not any(said):
        import weights

        paths = [os.path.join(folder, name) for name in ("last.pth", "previous.pth", "best.pth")]
        said = [
            next(
                (
                    run
                    for path in paths
                    if os.path.isfile(path) and (run := weights.step_and_run(path)[1])
                ),
                None,
            )
        ]
    return None if own in said else next((run for run in said if run), None)


def find(word, checkpoints="checkpoints", run_logs="run_logs", accept=lambda folder, log: True):
    """(the run's folder or None, its latest log or None, a note or None) that `word` means: a name,
    a folder, a log, a .pth or a metrics.jsonl.

    A run_name means the latest start of exactly that name that `accept` takes. Raises InputError
    where there is no such run.
    """
    path = os.path.abspath(os.path.expanduser(word))
    if os.path.isfile(path) and path.endswith((".pth", ".jsonl")):
        return with_log(os.path.dirname(path), run_logs)
    if os.path.isfile(path):
        folder = folder_of_log(path, checkpoints)
        latest = with_log(folder, run_logs)[1] if folder else None
        return (
            folder,
            latest or word,
            (
                f"its latest log is {latest}"
                if latest and not os.path.samefile(latest, path)
                else None
            ),
        )
    if os.path.isdir(path) and is_run(path):
        return with_log(os.path.expanduser(word), run_logs)
    folders = [name for name in files_in(checkpoints) if is_run(os.path.join(checkpoints, name))]
    logs = [name.removesuffix(".log") for name in files_in(run_logs) if name.endswith(".log")]
    starts = [word] if word in (*folders, *logs) else named({*folders, *logs}, word)
    candidates, others = [], []
    for name in reversed(starts):
        log = os.path.join(run_logs, f"{name}.log")
        folder = (
            os.path.join(checkpoints, name) if name in folders else folder_of_log(log, checkpoints)
        )
        if folder and word not in starts and not named([os.path.basename(folder)], word):
            # under another --run_name, that start went on with a run that is called otherwise
            others.append(os.path.basename(folder))
            continue
        # a start that was refused leaves a log, too
        candidates.append(with_log(folder, run_logs)[:2] if folder else (None, log))
    candidates = list(dict.fromkeys(candidates))  # several starts of one run
    if word not in starts and len(candidates) > 1:
        originals = [
            (folder, log)
            for folder, log in candidates
            if not folder or not run_copied_to(folder, run_logs)
        ]
        candidates = originals or candidates
    for i, (folder, log) in enumerate(candidates):
        if accept(folder, log):
            passed = [each or log for each, log in candidates[:i]]
            note = (
                f"of {len(candidates)} runs named {word} that with the latest date"
                if len(candidates) > 1
                else None
            )
            return (
                folder,
                log,
                (
                    f"not {' or '.join(passed)}, which {'has' if i == 1 else 'have'} none yet"
                    if passed
                    else note
                ),
            )
    if candidates:
        return *candidates[0], None
    if others:
        raise InputError(
            f"{word} was the --run_name of a start that went on with the run {others[0]}; give that"
            " name"
        )
    if os.path.isdir(path):
        runs = [
            name
            for name in files_in(path)
            if name.endswith(".log") or is_run(os.path.join(path, name))
        ]
        raise InputError(
            f"{word} is a folder of runs; give {os.path.join(word, '*')}, or some of them"
            if runs
            else f"the folder {word} holds no run; give a run's folder, its log or its name"
        )
    if os.path.exists(path):
        raise InputError(
            f"{word} is neither a file nor a folder; give a log, a run's folder or its name"
        )
    known = [
        *(os.path.join(os.path.dirname(word), name) for name in files_in(os.path.dirname(path))),
        *folders,
        *logs,
    ]
    known += sorted({re.sub(STAMP + "$", "", name) for name in (*folders, *logs)})
    raise InputError(
        "there is no log, folder or run"
        f" {word}{nearest(word, known) or f'; runs are looked up in {checkpoints} and {run_logs}'}"
    )


def with_log(folder, run_logs):
    logs = logs_of_folder(folder, run_logs)
    return folder, logs[-1] if logs else None, None


def checkpoint_of(word, name="best.pth", checkpoints="checkpoints", run_logs="run_logs"):
    """The path of a checkpoint: `word` itself where it is a file of weights, else `name` in the
    folder of the run that it means.
    """
    if os.path.isfile(word) and not word.endswith((".log", ".jsonl")):
        return word
    if word.endswith((".pth", ".pt")) and not os.path.exists(word):
        beside = [
            os.path.join(os.path.dirname(word), each)
            for each in files_in(os.path.dirname(word) or ".")
        ]
        raise InputError(f"there is no checkpoint {word}{nearest(word, beside)}")
    folder, _, note = find(
        word,
        checkpoints,
        run_logs,
        lambda folder, log: folder and os.path.isfile(os.path.join(folder, name)),
    )
    path = os.path.join(folder, name) if folder else None
    if not path or not os.path.isfile(path):
        raise InputError(f"the run {word} has no {name}{f' in {folder}' if folder else ''} yet")
    if note:
        print(f"{word}: {folder}, {note}", flush=True)
    return path


# ------------------------------------------------------------------------------------- alive or not


def this_process():
    """What tells this process from any other that ever has its pid: {'host', 'boot', 'pid',
    'ticks'}.
    """
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "pid": os.getpid(),
        "ticks": ticks(os.getpid()),
    }


def boot():
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def ticks(pid):
    """Clock ticks from the machine's start to the process's; None for one that is gone, a zombie or
    unknown.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])


def held(folder):
    """Whether a process has the run in `folder` locked: whatever its host is called and its pids
    are, on this machine, and on others where the file system tells."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "starts.jsonl")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def alive(log, folder=None):
    """Whether the process that writes a log, of the run in `folder`, is at work; of one on another
    machine it is taken for granted.
    """
    if folder and held(folder):
        return True
    said = next(
        (line.removeprefix("process ") for line in lines_of(log) if line.startswith("process {")),
        None,
    )
    with contextlib.suppress(ValueError, KeyError, TypeError):
        process, here = json.loads(said), this_process()
        if process["boot"] != here["boot"]:
            return process["host"] != here["host"]  # else the machine was started anew
        if folder and os.path.isfile(os.path.join(folder, "starts.jsonl")):
            return False  # its lock is free
        return (
            process["host"] != here["host"]
            or process["ticks"] is not None
            and ticks(process["pid"]) == process["ticks"]
        )
    pid = re.search(r"_pid(\d+)(?:_\d+)?\.log$", log)  # of an older version, or torn
    with (
        contextlib.suppress(OSError),
        open(f"/proc/{pid[1] if pid else None}/cmdline", "rb") as file,
    ):
        return b"train.py" in file.read()
    return False


def status_of(log):
    """'finished', 'stopped' or 'failed' as a log's end says; None where it has no last line."""
    lines = [line.rstrip("\n") for line in lines_of(log)]
    if not lines or lines[-1] != LAST_LINE:
        return None
    return next(
        (line.removeprefix("status: ") for line in reversed(lines) if line.startswith("status: ")),
        "unknown",
    )


def wait_for_end(word, checkpoints, run_logs, seconds):
    """Wait until the run that `word` means has ended, looking every `seconds`; returns its folder.

    Raises InputError where it did not finish.
    """
    print(f"waiting for {word} to end", flush=True)
    folder = None
    while True:
        # one at work, whatever the names say; of starts without a folder, one that was refused is
        # not the run
        if folder is None:
            folder, log, note = find(
                word, checkpoints, run_logs, lambda folder, log: folder and held(folder)
            )
            if not (folder and held(folder)):
                folder, log, note = find(
                    word,
                    checkpoints,
                    run_logs,
                    lambda folder, log: folder or status_of(log) is None,
                )
            if folder:
                print(f"that is {folder}{f', {note}' if note else ''}", flush=True)
        # asked before the log is read: a run that ends in between has written its last line
        running = held(folder) if folder else alive(log)
        if running:
            time.sleep(seconds)
            continue
        if folder:
            log = with_log(folder, run_logs)[1]
            if log is None:
                raise InputError(
                    f"--after {word}: {folder} has no log of its own in {run_logs}, so whether the"
                    " run has ended is unknown; give its --checkpoint"
                )
            running = alive(log, folder)
        status = status_of(log)
        if status == "finished" and folder:
            return folder
        if status:
            raise InputError(f"the run {word} ended as {status!r}, so it is not probed; see {log}")
        if not running:
            raise InputError(
                f"the run {word} is gone and its log {log} has no last line: it was killed;"
                " continue it with train.py --resume auto"
            )
        time.sleep(seconds)


# ------------------------------------------------------------------------------ making and resuming


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
    import weights

    paths = [
        path
        for folder in folders
        for name in ("previous.pth", "last.pth")
        if os.path.isfile(path := os.path.join(folder, name))
    ]
    # unreadable ones first: they are named
    known = {
        path: (weights.step_and_run(path)[0], os.path.getmtime(path), path.endswith("last.pth"))
        for path in paths
    }
    for path in sorted(paths, key=known.__getitem__, reverse=True):
        try:
            return path, weights.load_checkpoint(path)
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


def has_last(folder):
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("last.pth", "previous.pth"))


def to_resume(resume, checkpoints, run_logs):
    """The checkpoint, or the run's folder, that --resume means.

    Raises InputError where there is nothing to go on from.
    """
    if os.path.isfile(resume) and resume.endswith((".pth", ".pt")):
        return resume
    if resume.endswith((".pth", ".pt")):
        return checkpoint_of(resume)  # which says what is beside it
    folder = find(resume, checkpoints, run_logs, lambda folder, log: folder and has_last(folder))[0]
    if not folder or not has_last(folder):
        raise InputError(f"the run {resume} has no last.pth{f' in {folder}' if folder else ''} yet")
    return folder


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


class Run:
    """This process's run: its .folder, locked, and where it goes on from: .path and .content of a
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
        self.path = self.content = self.folder = self.file = None
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
        import weights

        if os.path.isfile(resume) and resume.endswith((".pth", ".pt")):
            self.path = resume
        else:
            self.path, self.content = furthest([to_resume(resume, checkpoints, run_logs)], log)
        self.content = self.content or weights.load_checkpoint(self.path)
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
            import weights

            source = self.path
            if not (os.path.isfile(previous) and os.path.samefile(source, previous)):
                source = f"{last}.part"
                copy_whole(self.path, source)  # before anything is moved: the disk may be full
                if os.path.isfile(metrics := os.path.join(self.folder, "metrics.jsonl")):
                    copy_whole(metrics, f"{left}_metrics.jsonl")
                if os.path.isfile(previous):
                    os.replace(previous, f"{left}_previous.pth")
                if os.path.isfile(best) and weights.step_and_run(best)[0] > step:
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
