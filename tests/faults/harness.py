"""What the fault tests share: how many faults are tried, a child with a watchdog, and the record
that docs/RELIABILITY.md is made from.

    make faults        the full counts, with the table at the end
    make test          a few of each
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tests.stages import ROOT, path_of, start

FULL = os.environ.get("SALT_FAULTS") == "full"
RECORD = Path(os.environ.get("SALT_FAULTS_RECORD", ROOT / "out" / "faults.jsonl"))
LIMIT = 300  # seconds after which a child counts as hanging


def count(short, full):
    return full if FULL else short


def record(fault, tried, outcome):
    """Note what was tried and how it ended, in a full run."""
    if FULL:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with open(RECORD, "a") as file:
            file.write(json.dumps({"fault": fault, "tried": tried, "outcome": outcome}) + "\n")


def command(script, *flags):
    return [sys.executable, str(path_of(script)), *map(str, flags)]


def run(folder, script, *flags, prefix=(), **how):
    """(exit code, what it printed) of a stage; a child that does not end is killed, and the test
    fails.
    """
    return watched([*prefix, *command(script, *flags)], folder, **how)


def watched(words, folder, before=None, limit=LIMIT, **environ):
    process = start(words, folder, limit, before, **environ)
    text = process.communicate()[0]
    assert process.returncode != -signal.SIGKILL, f"{words} did not end in {limit} s:\n{text}"
    return process.returncode, text


def one_line(text):
    """The error line that `text` must hold, once, without a traceback."""
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def killed_at_random(words, folder, kills, random, shortest, longest, phase):
    """Run a command again and again, killed at a random moment between `shortest` and `longest`
    seconds each time, `kills` times or until it ends; then to its end.

    Returns a Counter of the moments: what phase(what it had printed) says after each kill.
    """
    moments = Counter()
    while moments.total() < kills:
        process = start(words, folder, random.uniform(shortest, longest))
        text = process.communicate()[0]
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, text
            return moments
        moments[phase(text)] += 1
    code, text = watched(words, folder)
    assert code == 0, text
    return moments


def seconds_of(words, folder):
    start = time.monotonic()
    code, text = watched(words, folder)
    assert code == 0, text
    return time.monotonic() - start


def flip(content, random):
    """`content` with one bit flipped, and where."""
    place, bit = int(random.integers(len(content))), int(random.integers(8))
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :], (
        place,
        bit,
    )


def same(x, y):
    """Whether two checkpoints' contents are equal bit for bit."""
    if isinstance(x, dict):
        return (
            isinstance(y, dict)
            and x.keys() == y.keys()
            and all(same(x[name], y[name]) for name in x)
        )
    if isinstance(x, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(map(same, x, y))
    if hasattr(x, "numpy"):
        return (
            x.dtype == y.dtype
            and x.shape == y.shape
            and np.array_equal(
                x.numpy().view(np.uint8) if x.dim() else x.numpy(),
                y.numpy().view(np.uint8) if y.dim() else y.numpy(),
            )
        )
    return x == y or x != x and y != y


if __name__ == "__main__":
    print("| what is broken | tried | how it ended |\n|---|---|---|")
    for row in map(json.loads, RECORD.read_text().splitlines()):
        print(f"| {row['fault']} | {row['tried']} | {row['outcome']} |")
