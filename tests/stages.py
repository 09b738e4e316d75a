"""What the tests of whole stages share: running a script as a user does, and a small world of
videos, caches and checkpoints.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

import model
from tests.test_data import write_video
from tests.warm import Process, Server

ROOT = Path(model.__file__).resolve().parent
VIEW = "--frames 4 --resolution 48".split()
SMALL = """--size tiny --depth 1 --predictor_dim 32 --predictor_depth 1 --predictor_heads 2
--batch_size 4 --log_every 2 --dtype fp32 --matrix_rate 1""".split()


def path_of(script):
    """The file of a stage or a tool."""
    return next(p for p in (ROOT / f"{script}.py", ROOT / "tools" / f"{script}.py") if p.is_file())


def run(folder, script, *flags, code=0, **environ):
    """Run a stage in `folder`; on a wrong exit code show what it printed."""
    words = [str(path_of(script)), *map(str, flags)]
    environ = {**os.environ, **environ}
    if environ.get("OMP_NUM_THREADS", "1") == "1":
        found, said = warm_server().run(words, folder, environ)
    else:  # which counts when torch is loaded
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([sys.executable, *words], cwd=folder, env=environ, **how)
        found, said = done.returncode, done.stdout
    assert found == code, f"{script} {flags} ended with {found}:\n{said}"
    return said


@functools.cache
def warm_server():
    return Server()


def start(words, folder, limit=300, before=None, **environ):
    """A process whose output comes by a pipe; it and its children are killed after `limit` seconds,
    so that what hangs fails. before() runs in it first.
    """
    words, environ = [*map(str, words)], {"OMP_NUM_THREADS": "1", **environ}
    is_script = words[0] == sys.executable and words[1].endswith(".py")
    if is_script and not before and can_be_warm(environ):
        process = Process(warm_server(), words[1:], folder, [{**os.environ, **environ}])
    else:
        process = subprocess.Popen(
            words,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=before,
            env={**os.environ, **environ},
        )
    return watched(process, [process.pid], limit)


def can_be_warm(environ):
    """Whether nothing in it counts when Python starts or torch is loaded."""
    full = os.environ.get("SALT_FAULTS") == "full"
    return not full and environ["OMP_NUM_THREADS"] == "1" and "PYTHONPATH" not in environ


def watched(process, pids, limit):
    def end():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    watchdog = threading.Timer(limit, end)
    watchdog.daemon = True
    watchdog.start()
    return process


def start_ranks(count, words, folder, limit=300):
    """`count` ranks of a script, as torchrun starts them, that share a pipe; without torchrun's
    looking after them.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    environs = [
        {**os.environ, **{name: str(value) for name, value in own.items()}}
        for own in ({**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count))
    ]
    process = Process(warm_server(), words, folder, environs)
    return watched(process, process.pids, limit)


def probe(script, fast, world, data, folder, *flags):
    """(what a probe of the world's student prints, its JSON); fast: flags of all calls."""
    best = run_folder(world, "student") / "best.pth"
    words = ["--checkpoint", best, "--data", data, "--out", "x.json", *fast, *flags]
    said = run(folder, script, *words)
    return said, json.loads((folder / "x.json").read_text())


def stopped_at(beginning, words, folder, number=signal.SIGTERM, **environ):
    """Start a process and, at the first line with that beginning, signal it; returns what it
    printed, when it has ended.
    """
    process, said = start(words, folder, **environ), ""
    for line in process.stdout:
        said += line
        if line.startswith(beginning):
            process.send_signal(number)
            break
    said += process.stdout.read()
    process.wait()
    return said


def error_of(folder, script, *flags, **environ):
    """The one line that a failing stage ends in."""
    text = run(folder, script, *flags, code=1, **environ)
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def moving_square(random, frames):
    """A bright square that crosses a textured frame, ever slower: 32 x 48 pixels."""
    background = random.integers(0, 90, (32, 48, 3), dtype=np.uint8)
    y, x = int(random.integers(4, 20)), 4.0
    video = []
    for i in range(frames):
        frame = background.copy()
        frame[y : y + 8, int(x) : int(x) + 8] = 230
        x += 30 * 0.2 * 0.83**i
        video.append(frame)
    return video


def make_world(folder):
    """A data folder in SSv2 layout, with one broken video and one listed but absent; caches, a
    teacher and a trained student.
    """
    random = np.random.default_rng(0)
    (folder / "data" / "videos").mkdir(parents=True)
    for i in range(26):
        write_video(
            folder / "data" / "videos" / f"{i}.webm",
            moving_square(random, int(random.integers(12, 24))),
        )
    (folder / "data" / "videos" / "7.webm").write_bytes(b"not a video")

    def row(i):
        return {
            "id": str(i),
            "label": "moving a square",
            "template": "Moving [something]",
            "placeholders": ["a square"],
        }

    (folder / "data" / "train.json").write_text(json.dumps([row(i) for i in [*range(18), 99]]))
    (folder / "data" / "validation.json").write_text(json.dumps([row(i) for i in range(18, 26)]))
    (folder / "data" / "test.json").write_text(json.dumps([{"id": "20"}]))
    run(folder, "cache_latents", "--data", "data", "--teacher", "none", *VIEW, "--out", "clips")
    run(
        folder,
        "train",
        *"""--target pixels --masks ratio --cache clips --max_steps 6 --run_name teacher""".split(),
        *SMALL,
    )
    teacher = next(folder.glob("checkpoints/teacher_*/best.pth"))
    run(folder, "cache_latents", "--data", "data", "--teacher", teacher, "--out", "latents")
    run(
        folder,
        "cache_latents",
        *"--data data --split validation".split(),
        "--teacher",
        teacher,
        "--out",
        "held_out",
    )
    run(
        folder,
        "train",
        *"--cache latents --val_cache held_out --epochs 4 --run_name student".split(),
        *SMALL,
    )
    return folder


def run_folder(world, name):
    return next(world.glob(f"checkpoints/{name}_*"))


REFUSE = """import _multiprocessing, runpy, sys
def refused(*arguments, **others):
    raise OSError(38, "semaphores and shared memory are refused here")
_multiprocessing.SemLock = type("SemLock", (), {"SEM_VALUE_MAX": 1, "__new__": refused})
import _posixshmem; _posixshmem.shm_open = refused
sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
