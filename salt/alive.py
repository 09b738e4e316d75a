"""Whether a run's process is at work, and how it ended."""

import contextlib
import fcntl
import json
import os
import re
import socket
import time

from salt.errors import InputError
from salt.runs import LAST_LINE, find, lines_of, said, with_log


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
    with contextlib.suppress(ValueError, KeyError, TypeError):
        process, here = json.loads(said(log, "process ") or ""), this_process()
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
