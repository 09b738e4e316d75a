"""Bad input, and how an error becomes one line."""

import difflib
import os
import signal
import sys
import time

# under torchrun: whether ranks have begun to do different things; until then one a machine speaks
# for all
started = False


class InputError(ValueError):
    """Bad input from outside.

    The message says what, where and what to do; a script ends with that one line and exit code 1.
    """


def nearest(word, words):
    """`; did you mean X?`, or nothing where no word is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def report_in_one_line(kind, error, traceback):
    """sys.excepthook: bad input, a full disk or an unreadable file is one line; anything else is a
    bug and keeps its traceback.
    """
    script = os.path.basename(sys.argv[0])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if (
            issubclass(kind, InputError)
            and not started
            and os.environ.get("LOCAL_RANK", "0") != "0"
        ):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # the machine's first rank meets the same and says so, and torchrun ends this one then;
            # only where it does not, this one speaks
            time.sleep(20)
        script = f"{script}, rank {os.environ.get('RANK')}"
        if issubclass(kind, RuntimeError) and any(
            word in str(error) for word in ("gloo", "NCCL", "Connection", "connection")
        ):
            kind = InputError
            error = InputError(
                "another rank is gone, or cannot be reached"
                f" ({' '.join(str(error).split())[:200]}); its own line says why. In training"
                " torchrun --max_restarts N with --resume auto starts all of them again from"
                " last.pth"
            )
    if issubclass(kind, KeyboardInterrupt):
        print(f"{script}: interrupted", file=sys.stderr)
    # torch.OutOfMemoryError, without importing torch for --help
    elif kind.__name__ == "OutOfMemoryError":
        print(
            f"{script}: error: the GPU is out of memory; in training give --accumulate 2 (or more)"
            " and then --recompute, or --cuda_graph off; elsewhere a lower --batch_size",
            file=sys.stderr,
        )
    elif (
        kind.__module__.startswith(("torch._dynamo", "torch._inductor"))
        and "SALT_TRACEBACK" not in os.environ
    ):
        print(
            f"{script}: error: torch.compile failed ({' '.join(str(error).split())[:300]});"
            " --compile off does without",
            file=sys.stderr,
        )
    elif kind is RuntimeError and "DefaultCPUAllocator" in str(error):
        print(
            f"{script}: error: main memory is full; in training give --accumulate 2 (or more) and"
            " then --recompute, elsewhere a lower --batch_size, and fewer --threads",
            file=sys.stderr,
        )
    elif issubclass(kind, (InputError, OSError)) and "SALT_TRACEBACK" not in os.environ:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


class VideoError(InputError):
    """A video that gives no clip; the message says which and why."""
