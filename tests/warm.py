"""Stages as processes that need not import torch again: a server that has the libraries in memory
forks itself for each. Nothing of the project is imported before the fork.

A test of what a stage does before it imports, or of how a process starts and dies, starts a real
one (tests/stages.py: start).
"""

import atexit
import faulthandler
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback

LIBRARIES = "numpy torch torch.distributed torch.utils.checkpoint av einops tqdm scipy.stats"
LIBRARIES += " safetensors.torch sklearn.linear_model sklearn.model_selection sklearn.decomposition"

LIMIT = 300  # seconds


class Server:
    """run(words, folder, environ) -> (exit code, what it printed), as subprocess.run would."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-u", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self.process.stdin.close)

    def run(self, words, folder, environ):
        out = os.path.join(folder, f".said-by-a-stage-{os.getpid()}")
        job = {"words": [*map(str, words)], "folder": str(folder), "environ": environ, "out": out}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        with open(out, encoding="utf-8", errors="replace") as file:
            said = file.read()
        os.remove(out)
        return code, said


def serve():
    """Run the jobs that come by stdin, one after another, and answer with their exit codes."""
    for name in LIBRARIES.split():
        __import__(name)
    answers = os.dup(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(stage(**job))
        _, status = os.waitpid(child, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def stage(words, folder, environ, out):
    """In the child: a script as __main__, and its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.dup2(1, 2)
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # what hangs ends, and says where
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    sys.path[1:1] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    return code


if __name__ == "__main__":
    serve()
