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

import contextlib
import json
import os
import re
import time

from salt.errors import InputError, nearest

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
    number, tried = 1, f"{path}{suffix}"
    while True:
        try:
            return make(tried), tried
        except FileExistsError:
            number += 1
            tried = f"{path}_{number}{suffix}"


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


def said(log, beginning):
    """What follows `beginning` on the first line of a log that begins so; None where none does."""
    words = (line.removeprefix(beginning) for line in lines_of(log) if line.startswith(beginning))
    return next((rest.rstrip("\n") for rest in words), None)


def entries_of(path):
    """The objects of a .jsonl file, one a line; {} for a line that is torn or damaged."""
    entries = []
    for line in filter(str.strip, lines_of(path)):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            entries.append({})
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def folder_of_log(log, checkpoints):
    """The folder of the run that a log belongs to, as the log says; None where it came to none."""
    folder = said(log, "folder ")
    beside = os.path.dirname(os.path.dirname(os.path.abspath(log)))
    names = [folder] if folder else []
    names += [
        os.path.join(checkpoints, os.path.basename(path))
        for path in (*names, log.removesuffix(".log"))
    ]
    return next(
        (path for name in names for path in (name, os.path.join(beside, name)) if is_run(path)),
        None,
    )


def listed_logs(folder, run_logs):
    """{log: name of the folder it says it is of, or None} of a run's starts that are still there,
    the latest last.
    """
    starts = os.path.join(folder, "starts.jsonl")
    entries = entries_of(starts) if os.path.exists(starts) else []
    names = [entry["log"] for entry in entries if isinstance(entry.get("log"), str)]
    logs = [os.path.join(folder, name) for name in names]
    name = os.path.basename(os.path.abspath(folder))
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(folder))), "run_logs")
    logs = logs or [f"{name}.log"]  # of a run that an older version made
    places = [
        [log, *(os.path.join(place, os.path.basename(log)) for place in (run_logs, beside))]
        for log in logs
    ]
    found = [path for paths in places if (path := next(filter(os.path.isfile, paths), None))]
    return {path: os.path.basename(said(path, "folder ") or "") or None for path in found}


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
        for path, name in listed_logs(folder, run_logs).items()
        if name in (None, own)
    ]


def run_copied_to(folder, run_logs=None):
    """The name of the run that a folder is a copy of, as the logs say, or without logs its
    checkpoints; None where it is that run's own.
    """
    own = os.path.basename(os.path.realpath(folder))
    names = list(listed_logs(folder, run_logs).values()) if run_logs else []
    if not any(names):
        from salt import torch_files

        paths = [os.path.join(folder, name) for name in ("last.pth", "previous.pth", "best.pth")]
        names = [
            next(
                (
                    run
                    for path in paths
                    if os.path.isfile(path) and (run := torch_files.step_and_run(path)[1])
                ),
                None,
            )
        ]
    return None if own in names else next((run for run in names if run), None)


def find(word, checkpoints="checkpoints", run_logs="run_logs", accept=lambda folder, log: True):
    """(the run's folder or None, its latest log or None, a note or None) that `word` means: a name,
    a folder, a log, a .pth or a metrics.jsonl.

    A run_name means the latest start of exactly that name that `accept` takes. Raises InputError
    where there is no such run.
    """
    path = os.path.abspath(os.path.expanduser(word))
    of_folder = path.endswith(".pth") or os.path.basename(path) in ("metrics.jsonl", "starts.jsonl")
    if os.path.isfile(path) and of_folder:
        return *with_log(os.path.dirname(path), run_logs), None
    if os.path.isfile(path):  # another .jsonl, too: a copy, or of other code
        folder = folder_of_log(path, checkpoints)
        latest = with_log(folder, run_logs)[1] if folder else None
        is_latest = not latest or os.path.samefile(latest, path)
        return folder, latest or word, None if is_latest else f"its latest log is {latest}"
    if os.path.isdir(path) and is_run(path):
        return *with_log(os.path.expanduser(word), run_logs), None
    folders = [name for name in files_in(checkpoints) if is_run(os.path.join(checkpoints, name))]
    logs = [name.removesuffix(".log") for name in files_in(run_logs) if name.endswith(".log")]
    candidates, others = of_name(word, folders, logs, checkpoints, run_logs)
    for i, (folder, log) in enumerate(candidates):
        if accept(folder, log):
            note = None
            if i:
                passed = " or ".join(each or log for each, log in candidates[:i])
                note = f"not {passed}, which {'has' if i == 1 else 'have'} none yet"
            elif len(candidates) > 1:
                note = f"of {len(candidates)} runs named {word} that with the latest date"
            return folder, log, note
    if candidates:
        return *candidates[0], None
    if others:
        raise InputError(
            f"{word} was the --run_name of a start that went on with the run {others[0]}; give that"
            " name"
        )
    refuse_no_run(word, path)
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


def of_name(word, folders, logs, checkpoints, run_logs):
    """([(folder or None, latest log)] of the runs that a name means, the latest first; names of the
    runs that starts of this --run_name went on with).

    folders, logs: names of all that there are.
    """
    starts = [word] if word in (*folders, *logs) else named({*folders, *logs}, word)
    candidates, others = [], []
    for name in reversed(starts):
        log = os.path.join(run_logs, f"{name}.log")
        folder = os.path.join(checkpoints, name)
        if name not in folders:
            folder = folder_of_log(log, checkpoints)
        if folder and word not in starts and not named([os.path.basename(folder)], word):
            # under another --run_name, that start went on with a run that is called otherwise
            others.append(os.path.basename(folder))
            continue
        # a start that was refused leaves a log, too
        candidates.append(with_log(folder, run_logs) if folder else (None, log))
    candidates = list(dict.fromkeys(candidates))  # several starts of one run
    if word not in starts and len(candidates) > 1:
        originals = [
            (folder, log)
            for folder, log in candidates
            if not folder or not run_copied_to(folder, run_logs)
        ]
        candidates = originals or candidates
    return candidates, others


def refuse_no_run(word, path):
    """Raises InputError where the path is there, but is neither a run's nor a log."""
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


def with_log(folder, run_logs):
    """(folder, the run's latest log or None)."""
    logs = logs_of_folder(folder, run_logs)
    return folder, logs[-1] if logs else None


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
