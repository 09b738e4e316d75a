"""The settings at the top of a script, from the file, the environment and the command line.

A stage script opens with its settings, one assignment a line with a trailing comment, and then
calls `apply(globals())`:

    epochs = 10              # passes over the training set
    cache: str | None = None # folder made by cache_latents.py

`--epochs 10`, `--epochs=10` and `EPOCHS=10` in the environment all set `epochs`; command line over
environment over recipe (recipes.py) over file. A value is checked against the annotation
(`str | None`, `Literal["a", "b"]`, `list[str]`) or else the default's type.
"""

import argparse
import ast
import io
import math
import os
import re
import sys
import tokenize
import types
import typing

from salt.errors import InputError, nearest, report_in_one_line

# names of the settings that apply() found on the command line or in the environment
given = set()
may_change = set()  # names of those below the heading MAY_CHANGE
from_environment = []  # a line for each value that it took from there, for a run's log


def local_ranks():
    """How many ranks of torchrun share this machine; 1 where it does not say so in a way that
    ranks.py accepts.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(told) if told.isdecimal() and int(told) else 1


def refuse_others(why, allowed):
    """Raises InputError where other settings than the `allowed` are given."""
    others = sorted(given - allowed)
    if others:
        raise InputError(f"{why}; leave {', '.join(f'--{name}' for name in others)} out")


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


MAY_CHANGE = "# -- may change on --resume"
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


def names_below(path, heading):
    """Names of a script's settings below a line that says `heading`."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    before, found, below = source.partition(f"\n{heading}\n")
    return set(re.findall(r"^(\w+)\b.* = ", below, re.MULTILINE)) if found else set()


class Settings(dict):
    """{name: value} of a script's settings, each an attribute too."""

    __getattr__ = dict.__getitem__


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
        if text.lower() not in TRUE + FALSE:
            raise InputError(f"{name} is {text!r}; it takes true or false")
        return text.lower() in TRUE
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} is {text!r}; it takes {what}") from None
    if kind is int and abs(value) >= 2**63:
        raise InputError(f"{name} is {text}; it takes a whole number below 2^63")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{name} is {text}; it takes a finite number")
    return value


TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


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


def apply(
    scope, argv=None, environ=None, least=None, positional=None, recipes=None, left_open=None
):
    """Override the settings in `scope` (a script's globals()) from the environment and the command
    line, in place.

    least: {name: smallest value allowed}; positional: the list setting that words without a flag go
    to; recipes: {name: {setting: value, or a function of the settings that gives one}}, of which
    the setting `recipe` names one: what is given nowhere else; left_open: {setting: function of
    the settings}, for what is None in the end. Returns the Settings. Each value taken from the
    environment is printed. Raises InputError on an unknown flag (naming the
    nearest), a missing value, one of the wrong type or one too small. Installs the one-line error
    report.
    """
    sys.excepthook = report_in_one_line
    path = scope["__file__"]
    environ = os.environ if environ is None else environ
    found = read_settings(path)
    may_change.update(names_below(path, MAY_CHANGE) & set(found))
    kinds = {
        name: kind_of(scope[name], annotation and eval(annotation, scope))
        for name, (annotation, _) in found.items()
    }
    check_file(scope, kinds)
    comments = {name: comment for name, (_, comment) in found.items()}
    words = sys.argv[1:] if argv is None else argv
    flags = read_flags(make_parser(scope, kinds, comments, positional), words, kinds, positional)
    given.clear()
    for name, kind in kinds.items():
        variable = name.upper()
        if name in flags:
            scope[name] = parse(flags[name], kind, f"--{name}")
        elif environ.get(variable):
            scope[name] = parse(environ[variable], kind, f"{variable} in the environment")
            line = f"{name} = {scope[name]!r} (from {variable} in the environment)"
            from_environment.append(line)
            print(line, flush=True)
        else:
            continue
        given.add(name)
    for name, value in of_recipe(scope, recipes).items():
        value = value(scope) if callable(value) else value
        if name not in kinds or not fits(value, kinds[name]):
            raise InputError(f"--recipe {scope['recipe']}: there is no setting {name} = {value!r}")
        if name not in given:
            scope[name] = value
    for name, value in (left_open or {}).items():
        scope[name] = value(scope) if scope[name] is None else scope[name]
    for line in unknown_in_environment(kinds, environ):
        print(line, flush=True)
    for name, value in (least or {}).items():
        if scope[name] is not None and not scope[name] >= value:
            raise InputError(f"{name} is {scope[name]}; it must be at least {value}")
    return Settings({name: scope[name] for name in kinds})


def of_recipe(scope, recipes):
    """The values of the recipe that the settings name."""
    name = scope["recipe"] if recipes else None
    if name is None:
        return {}
    if name not in recipes:
        near = nearest(name, recipes)
        raise InputError(f"--recipe {name!r} is none of {', '.join(recipes)}{near}")
    return recipes[name]


def check_file(scope, kinds):
    """Raises InputError where a value that stands in the file is of another kind."""
    for name, kind in kinds.items():
        if kind is type(None) or not fits(scope[name], kind):
            takes = "a value" if kind is type(None) else describe(kind)
            path = os.path.basename(scope["__file__"])
            raise InputError(f"{path} has {name} = {scope[name]!r}; it takes {takes}")
        if kind is float:
            scope[name] = float(scope[name])  # an edited 0 is the 0.0 of a flag


def make_parser(scope, kinds, comments, positional):
    """The Parser of a flag a setting."""
    words = f"{positional.upper()} [...] " if positional else ""
    parser = Parser(
        prog=f"python {os.path.basename(scope['__file__'])}",
        description=(scope.get("__doc__") or "").strip(),
        allow_abbrev=False,
        usage=f"%(prog)s {words}[--name value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "A flag may also be given as its upper-case name in the environment; the command line"
            " wins. Lists are comma-separated."
        ),
    )
    for name, kind in kinds.items():
        default = "none" if scope[name] is None else scope[name]
        if isinstance(default, (list, tuple)):
            default = ",".join(map(str, default))
        how = {"help": f"{comments[name]} [{default}]".replace("%", "%%").strip()}
        if kind is bool:
            how |= {"nargs": "?", "const": "true"}
        elif typing.get_origin(kind) in (list, tuple):
            how["nargs"] = "+"
        hidden = argparse.SUPPRESS
        parser.add_argument(f"--{name}", metavar=describe(kind), default=hidden, **how)
        if kind is bool:
            how = {"dest": name, "action": "store_const", "const": "false"}
            parser.add_argument(f"--no_{name}", default=hidden, help=hidden, **how)
    return parser


def read_flags(parser, argv, kinds, positional):
    """{name: text} of the flags in argv, of which each may have hyphens for underscores."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            word = flag.replace("-", "_").replace("__", "--", 1) + equals + value
        words.append(word)
    found, unknown = parser.parse_known_args(words)
    found = vars(found)
    if positional:
        loose = [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
        if loose:
            found[positional] = loose + found.get(positional, [])
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):
            raise InputError(
                f"unexpected argument {flag!r}: settings are given as --name value; see --help"
            )
        near = nearest(flag, [f"--{name}" for name in kinds])
        raise InputError(f"unknown flag {flag}{near or '; see --help'}")
    return {
        name: ",".join(value) if isinstance(value, list) else value for name, value in found.items()
    }
