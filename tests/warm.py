"""Stages as processes that need not import torch again: a server that has the libraries in memory
forks itself for each. Nothing of the project is imported before the fork.

What depends on how Python starts (PYTHONPATH, OMP_NUM_THREADS, limits of a process) has a real
process; so has every test in `make faults` (tests/stages.py: start).
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

# torch._dynamo, which an optimiser imports, takes three seconds
LIBRARIES = """numpy torch torch._dynamo torch.distributed torch.utils.checkpoint av einops tqdm
scipy.stats safetensors.torch sklearn.linear_model sklearn.model_selection sklearn.decomposition"""

LIMIT = 300  # seconds


class Server:
    """Starts scripts as children of its own, and says how they ended."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-u", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self.process.stdin.close)

    def ask(self, **question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, words, folder, environ, out):
        """The pid of `words`, a script and its flags; out: the file, or pipe, of what it prints."""
        words = [*map(str, words)]
        return self.ask(words=words, folder=str(folder), environ=environ, out=str(out))

    def wait(self, pid):
        """The exit code of a child that has ended, or will."""
        return self.ask(pid=pid)

    def run(self, words, folder, environ):
        """(exit code, what it printed), as subprocess.run would."""
        out = os.path.join(folder, f".said-by-a-stage-{os.getpid()}")
        code = self.wait(self.start(words, folder, environ, out))
        with open(out, encoding="utf-8", errors="replace") as file:
            said = file.read()
        os.remove(out)
        return code, said


class Process:
    """What subprocess.Popen gives of `count` processes of a Server with one pipe: the `pid` of the
    first, `stdout`, wait(), communicate(), send_signal(), `returncode`.
    """

    def __init__(self, server, words, folder, environs):
        self.server = server
        self.returncode = None
        reading, writing = os.pipe()
        out = f"/proc/{os.getpid()}/fd/{writing}"  # which the server opens before it answers
        self.pids = [server.start(words, folder, environ, out) for environ in environs]
        os.close(writing)
        self.stdout = open(reading, encoding="utf-8", errors="replace")
        self.pid = self.pids[0]

    def send_signal(self, number):
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self):
        if self.returncode is None:
            codes = [self.server.wait(pid) for pid in self.pids]
            self.returncode = next(filter(None, codes), 0)
        return self.returncode

    def communicate(self):
        said = self.stdout.read()
        self.wait()
        return said, None


def serve():
    """Answer questions: start a script, or wait for the end of one."""
    for name in LIBRARIES.split():
        __import__(name)
    answers = os.dup(1)
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            _, status = os.waitpid(question["pid"], 0)
            os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))
            continue
        out = os.open(question.pop("out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        child = os.fork()
        if child == 0:
            os._exit(stage(out=out, **question))
        os.close(out)
        os.write(answers, b"%d\n" % child)


def stage(words, folder, environ, out):
    """In the child: a script as __main__, printing to the descriptor `out`; its exit code."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(1, 2)
    os.close(out)
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
