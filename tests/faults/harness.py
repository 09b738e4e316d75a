"""What the fault tests share: how many faults are tried, a child with a watchdog, and the record that docs/RELIABILITY.md is made from.

    make faults        the full counts, with the table at the end
    make test          a few of each
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.stages import ROOT, SMALL

FULL = os.environ.get("SALT_FAULTS") == "full"
RECORD = Path(os.environ.get("SALT_FAULTS_RECORD", ROOT / "out" / "faults.jsonl"))
LIMIT = 300  # seconds after which a child counts as hanging
TINY = [*SMALL, "--matrix_rate", "1"]


def count(short, full):
    return full if FULL else short


def record(fault, tried, outcome):
    """Note what was tried and how it ended, in a full run."""
    if FULL:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with open(RECORD, "a") as file:
            file.write(json.dumps({"fault": fault, "tried": tried, "outcome": outcome}) + "\n")


def command(script, *flags):
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]


def run(folder, script, *flags, prefix=(), **how):
    """(exit code, what it printed) of a stage; a child that does not end is killed, and the test fails."""
    return watched([*prefix, *command(script, *flags)], folder, **how)


def watched(words, folder, **how):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    done = subprocess.run(list(map(str, words)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=LIMIT, env=env, **how)
    return done.returncode, done.stdout


def one_line(text):
    """The error line that `text` must hold, once, without a traceback."""
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def kill_later(words, folder, seconds):
    """Start a command and SIGKILL it after so many seconds. True where it was killed, False where it had ended well before."""
    process = subprocess.Popen(list(map(str, words)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LIMIT)
        return process.returncode == -signal.SIGKILL
    assert process.returncode == 0, text
    return False


def killed_at_random(words, folder, kills, random, longest):
    """Run a command again and again, killed at a random moment within `longest` seconds each time, `kills` times or until it ends; then to its end.

    Returns how often it was killed.
    """
    killed = 0
    while killed < kills:
        if not kill_later(words, folder, random.uniform(0, longest)):
            return killed
        killed += 1
    code, text = watched(words, folder)
    assert code == 0, text
    return killed


def seconds_of(words, folder):
    start = time.monotonic()
    code, text = watched(words, folder)
    assert code == 0, text
    return time.monotonic() - start


def flip(content, random):
    """`content` with one bit flipped, and where."""
    place, bit = int(random.integers(len(content))), int(random.integers(8))
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1:], (place, bit)


def same(x, y):
    """Whether two checkpoints' contents are equal bit for bit."""
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
    if isinstance(x, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(map(same, x, y))
    if hasattr(x, "numpy"):
        return x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x.numpy().view(np.uint8) if x.dim() else x.numpy(), y.numpy().view(np.uint8) if y.dim() else y.numpy())
    return x == y or x != x and y != y


if __name__ == "__main__":
    print("| what is broken | tried | how it ended |\n|---|---|---|")
    for row in map(json.loads, RECORD.read_text().splitlines()):
        print(f"| {row['fault']} | {row['tried']} | {row['outcome']} |")
