"""The settings at the top of a script, from the file, the environment and the command line.

A stage script opens with its settings, one assignment a line with a trailing comment, and then
calls `apply(globals())`:

    epochs = 10              # passes over the training set
    cache: str | None = None # folder made by cache_latents.py

`--epochs 10`, `--epochs=10` and `EPOCHS=10` in the environment all set `epochs`; command line over
environment over file. A value is checked against the annotation (`str | None`, `Literal["a", "b"]`,
`list[str]`) or else the default's type.
"""

import argparse
import ast
import difflib
import hashlib
import io
import math
import os
import re
import signal
import sys
import time
import tokenize
import types
import typing

# names of the settings that apply() found on the command line or in the environment
given = set()
from_environment = []  # a line for each value that it took from there, for a run's log
# under torchrun: whether ranks have begun to do different things; until then one a machine speaks
# for all
started = False


def local_ranks():
    """How many ranks of torchrun share this machine; 1 where it does not say so in a way that
    ranks.py accepts.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(told) if told.isdecimal() and int(told) else 1


class InputError(ValueError):
    """Bad input from outside.

    The message says what, where and what to do; a script ends with that one line and exit code 1.
    """


def source_digest():
    """SHA-256 of the files in csrc/, by which an extension that was built from others is known;
    None where they are not there.
    """
    digest, folder = (
        hashlib.sha256(),
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"),
    )
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(f"{name}\n".encode() + file.read())
    return digest.hexdigest() if os.path.isdir(folder) else None


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
            kind, error = (
                InputError,
                InputError(
                    "another rank is gone, or cannot be reached"
                    f" ({' '.join(str(error).split())[:200]}); its own line says why. In training"
                    " torchrun --max_restarts N with --resume auto starts all of them again from"
                    " last.pth"
                ),
            )
    if issubclass(kind, KeyboardInterrupt):
        print(f"{script}: interrupted", file=sys.stderr)
    # torch.OutOfMemoryError, without importing torch for --help
    elif kind.__name__ == "OutOfMemoryError":
        print(
            f"{script}: error: the GPU is out of memory; in training give --accumulate 2 (or more)"
            " and then --recompute, elsewhere a lower --batch_size",
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


NOT_THERE = {  # what to say of a path that a flag names and that is not there
    "data": (
        "there is no data folder {}; --data names the folder that holds the videos and their lists"
    ),
    "cache": "{} is no cache: there is no such folder; make one with cache_latents.py --out {}",
    "teacher": (
        "there is no teacher at {}; --teacher names a VideoMAE folder (config.json,"
        " model.safetensors), a VideoMAE .pth or a checkpoint of train.py"
    ),
    "hub": (
        "there is no teacher at {}; if that is a model of the Hugging Face hub: `hf download {}"
        " --local-dir {local}`, then --teacher {local}"
    ),
}


def check_paths(**flags):
    """Raises InputError where a path that is given is not there: at once, and not after torch was
    imported, which takes ten seconds.

    flags: {name of a setting: its value, a path, a list of paths or None}. Names that end in _cache
    are caches.
    """
    for name, value in flags.items():
        for path in [value] if isinstance(value, str) else value or ():
            if not path or os.path.exists(os.path.expanduser(path)):
                continue
            kind = "cache" if name not in NOT_THERE else name
            if (
                kind == "teacher"
                and re.fullmatch(r"[\w.-]+/[\w.-]+", path)
                and not os.path.isdir(os.path.dirname(path))
            ):
                kind = "hub"
            above = os.path.dirname(os.path.abspath(path))
            beside = nearest(
                os.path.basename(path), os.listdir(above) if os.path.isdir(above) else ()
            )
            raise InputError(
                NOT_THERE[kind].format(path, path, local=os.path.basename(path)) + beside
            )


def unknown_in_environment(names, environ):
    """Lines on upper-case names in the environment that are one letter away from a setting's and no
    setting themselves.
    """

    def one_letter(word, other):
        longer, shorter = sorted((word, other), key=len, reverse=True)
        places = range(len(longer))
        if len(longer) == len(shorter):
            return sum(a != b for a, b in zip(longer, shorter)) == 1
        return len(longer) == len(shorter) + 1 and any(
            longer[:i] + longer[i + 1 :] == shorter for i in places
        )

    settings = [name.upper() for name in names if len(name) > 3]
    for word in sorted(environ):
        if word.isupper() and word not in (*settings, "PATH"):
            near = [name for name in settings if one_letter(word, name)]
            if near:
                yield f"{word} is set in the environment and is no setting; did you mean {near[0]}?"


HEADING = "# --"  # a comment above a setting that begins so is no part of its text


def read_settings(path):
    """{name: (annotation as source or None, comment)} of a script's settings, in file order, up to
    the line that calls config.apply.

    The comment stands beside the setting, or where it does not fit on the lines above it.
    """
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines = source.splitlines()
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")

    def comment_of(node):
        """Beside the setting, else on the lines above it."""
        if node.end_lineno in comments:
            return comments[node.end_lineno]
        first = node.lineno
        while lines[first - 2].startswith("# ") and not lines[first - 2].startswith(HEADING):
            first -= 1
        return " ".join(comments[line] for line in range(first, node.lineno))

    found = {}
    for node in ast.parse(source).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "config.apply":
            return found
        target = getattr(node, "target", None)
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else None
            found[target.id] = annotation, comment_of(node)
    raise RuntimeError(f"{path} never calls config.apply(globals())")


def parse(text, kind, name):
    """`text` as a value of `kind`: int, float, str, bool, Literal, list[...] / tuple[...], or any
    of these `| None`.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in options:
            return None
        return parse(text, next(option for option in options if option is not type(None)), name)
    if origin is typing.Literal:
        if text not in options:
            raise InputError(
                f"{name} is {text!r}; it takes"
                f" {', '.join(map(str, options))}{nearest(text, map(str, options))}"
            )
        return text
    if origin in (list, tuple):
        values = origin(
            parse(part.strip(), options[0], name) for part in text.split(",") if part.strip()
        )
        if not values or (origin is tuple and len(options) != len(values)):
            count = f"{len(options)} values" if origin is tuple else "at least one value"
            raise InputError(f"{name} is {text!r}; it takes {count}, separated by commas")
        return values
    if kind is bool:
        if text.lower() not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            raise InputError(f"{name} is {text!r}; it takes true or false")
        return text.lower() in ("true", "1", "yes", "on")
    try:
        value = kind(text)
        if kind is int and abs(value) >= 2**63:
            raise InputError(f"{name} is {text}; it takes a whole number below 2^63")
        if kind is float and not math.isfinite(value):
            raise InputError(f"{name} is {text}; it takes a finite number")
        return value
    except InputError:
        raise
    except ValueError:
        raise InputError(
            f"{name} is {text!r}; it takes {'a whole number' if kind is int else 'a number'}"
        ) from None


def fits(value, kind):
    """Whether a value that stands in the file is of `kind`."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is list:
        return isinstance(value, list) and all(fits(part, options[0]) for part in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(options)
            and all(map(fits, value, options))
        )
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def kind_of(default, annotation):
    """The type a setting is checked against: its annotation, or what its default is."""
    if annotation is not None:
        return annotation
    if isinstance(default, (list, tuple)):
        return (
            tuple[tuple(type(value) for value in default)]
            if isinstance(default, tuple)
            else list[type(default[0]) if default else str]
        )
    return type(default)


def describe(kind):
    """`kind` as --help names it."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, options))
    if typing.get_origin(kind) in (list, tuple):
        return f"{describe(options[0])},..."
    if options:
        return "|".join("none" if option is type(None) else describe(option) for option in options)
    return "true|false" if kind is bool else kind.__name__


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def apply(scope, argv=None, environ=None, least=None, positional=None):
    """Override the settings in `scope` (a script's globals()) from the environment and the command
    line, in place.

    least: {name: smallest value allowed}; positional: the list setting that words without a flag go
    to. Returns {name: value} of all settings. Each value taken from the environment is printed.
    Raises InputError on an unknown flag (naming the nearest), a missing value, one of the wrong
    type or one too small. Installs the one-line error report.
    """
    sys.excepthook = report_in_one_line
    path = scope["__file__"]
    environ = os.environ if environ is None else environ
    found = read_settings(path)
    comments = {name: comment for name, (_, comment) in found.items()}
    kinds = {
        name: kind_of(scope[name], annotation and eval(annotation, scope))
        for name, (annotation, _) in found.items()
    }

    for name, kind in kinds.items():
        if kind is type(None) or not fits(scope[name], kind):
            takes = "a value" if kind is type(None) else describe(kind)
            raise InputError(
                f"{os.path.basename(path)} has {name} = {scope[name]!r}; it takes {takes}"
            )
        if kind is float:
            scope[name] = float(scope[name])  # an edited 0 is the 0.0 of a flag

    doc = (scope.get("__doc__") or "").strip()
    parser = Parser(
        prog=f"python {os.path.basename(path)}",
        description=doc,
        allow_abbrev=False,
        usage=f"%(prog)s {f'{positional.upper()} [...] ' if positional else ''}[--name value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "A flag may also be given as its upper-case name in the environment; the command line"
            " wins. Lists are comma-separated."
        ),
    )
    for name, kind in kinds.items():
        default = scope[name]
        shown = (
            ",".join(map(str, default))
            if isinstance(default, (list, tuple))
            else "none"
            if default is None
            else default
        )
        text = f"{comments[name]} [{shown}]".replace("%", "%%").strip()
        many = typing.get_origin(kind) in (list, tuple)
        parser.add_argument(
            f"--{name}",
            metavar=describe(kind),
            help=text,
            default=argparse.SUPPRESS,
            nargs="?" if kind is bool else "+" if many else None,
            const="true" if kind is bool else None,
        )
        if kind is bool:
            parser.add_argument(
                f"--no_{name}",
                dest=name,
                action="store_const",
                const="false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )

    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, equals, value = word.partition("=")
        words.append(
            flag.replace("-", "_").replace("__", "--", 1) + equals + value
            if flag.startswith("--")
            else word
        )
    flags, unknown = parser.parse_known_args(words)
    if positional:
        loose, unknown = (
            [word for word in unknown if not word.startswith("-")],
            [word for word in unknown if word.startswith("-")],
        )
        if loose:
            setattr(flags, positional, loose + getattr(flags, positional, []))
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):
            raise InputError(
                f"unexpected argument {flag!r}: settings are given as --name value; see --help"
            )
        raise InputError(
            f"unknown flag {flag}{nearest(flag, [f'--{name}' for name in kinds]) or '; see --help'}"
        )

    for name, kind in kinds.items():
        if hasattr(flags, name):
            value = getattr(flags, name)
            given.add(name)
            scope[name] = parse(
                ",".join(value) if isinstance(value, list) else value, kind, f"--{name}"
            )
        elif environ.get(name.upper()):
            given.add(name)
            scope[name] = parse(environ[name.upper()], kind, f"{name.upper()} in the environment")
            from_environment.append(
                f"{name} = {scope[name]!r} (from {name.upper()} in the environment)"
            )
            print(from_environment[-1], flush=True)
    for line in unknown_in_environment(kinds, environ):
        print(line, flush=True)
    for name, value in (least or {}).items():
        if scope[name] is not None and not scope[name] >= value:
            raise InputError(f"{name} is {scope[name]}; it must be at least {value}")
    return {name: scope[name] for name in kinds}
