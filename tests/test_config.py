"""Settings from file, environment and command line."""

import ast
import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from salt import config
from salt.errors import InputError
from salt.recipes import RECIPES
from tests.stages import path_of

TRAIN = path_of("train").read_text()

SCRIPT = '''"""A script."""
from typing import Literal
from salt import config
epochs = 10                     # passes over the data
lr = 2e-4                       # peak learning rate
weight_decay_end = 0.4          # at the end
name = "none at all"            # a name
cache: str | None = None        # a folder
steps: int | None = None        # steps
verbose = False                 # talk
shuffle = True                  # mix
kind: Literal["mse", "l1"] = "mse"  # loss
betas = (0.9, 0.95)             # AdamW
paths: list[str] = []           # files
recipe: str | None = None       # a set of the others
settings = config.apply(globals())
later = 3                       # not a setting
print(settings)
'''


def apply(tmp_path, *argv, positional=None, recipes=None, left_open=None, **environ):
    (tmp_path / "script.py").write_text(SCRIPT)
    scope = {"__file__": str(tmp_path / "script.py"), "config": config}
    exec(
        compile(
            SCRIPT.replace("config.apply(globals())", "None").replace("print(settings)", ""),
            "script.py",
            "exec",
        ),
        scope,
    )
    scope.pop("__annotations__", None)  # newer Pythons keep none in globals()
    hook = sys.excepthook
    try:
        least = {"epochs": 1, "steps": 1}
        settings = config.apply(scope, list(argv), environ, least, positional, recipes, left_open)
    finally:
        sys.excepthook = hook
    assert all(scope[name] == value for name, value in settings.items()) and "later" not in settings
    return settings


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--epochs", "3"], "epochs", 3),
        (["--epochs=3"], "epochs", 3),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--weight-decay-end=0.2"], "weight_decay_end", 0.2),
        (["--weight_decay_end", "0.2"], "weight_decay_end", 0.2),
        (["--verbose"], "verbose", True),
        (["--no_shuffle"], "shuffle", False),
        (["--no-shuffle"], "shuffle", False),
        (["--shuffle", "false"], "shuffle", False),
        (["--verbose=true"], "verbose", True),
        (["--cache", "a-b"], "cache", "a-b"),
        (["--cache=none"], "cache", None),
        (["--steps", "7"], "steps", 7),
        (["--steps", "none"], "steps", None),
        (["--name", "none"], "name", "none"),
        (["--kind", "l1"], "kind", "l1"),
        (["--betas", "0.8,0.9"], "betas", (0.8, 0.9)),
        (["--paths", "a", "b"], "paths", ["a", "b"]),
        (["--paths=a,b"], "paths", ["a", "b"]),
        (["--lr", "-1"], "lr", -1.0),
    ],
)
def test_flags(tmp_path, argv, name, value):
    settings = apply(tmp_path, *argv)
    assert settings[name] == value and type(settings[name]) is type(value)
    assert {key for key in settings if settings[key] != apply(tmp_path)[key]} <= {name}


def test_a_recipe_gives_what_is_given_nowhere_else(tmp_path):
    recipes = {"some": {"lr": lambda s: s["epochs"] / 100, "kind": "l1", "steps": 9}}
    told = apply(tmp_path, "--recipe", "some", "--epochs", "3", recipes=recipes, STEPS="4")
    assert (told["lr"], told["kind"], told["steps"]) == (0.03, "l1", 4)
    plain = apply(tmp_path, recipes=recipes)
    assert plain["kind"] == "mse"
    with pytest.raises(InputError, match="'sone' is none of some; did you mean some"):
        apply(tmp_path, "--recipe", "sone", recipes=recipes)
    for wrong in ({"epoch": 3}, {"epochs": "three"}):
        with pytest.raises(InputError, match="there is no setting epoch"):
            apply(tmp_path, "--recipe", "some", recipes={"some": wrong})
    left_open = {"cache": lambda s: f"of {s['epochs']}", "steps": lambda s: 5}
    told = apply(tmp_path, "--epochs", "3", "--steps", "2", left_open=left_open)
    assert (told["cache"], told["steps"]) == ("of 3", 2)


def test_the_recipes_are_of_train():
    """As train.py itself takes them, of both targets."""
    for recipe, target in itertools.product(RECIPES, ("latents", "pixels")):
        words = ["--recipe", recipe, "--target", target, "--batch_size", "48"]
        code = (
            f"import sys; sys.argv = ['train.py', *{words}]\n" + TRAIN.partition("given_paths.")[0]
        )
        scope = {"__file__": str(path_of("train"))}
        exec(compile(code, "train.py", "exec"), scope)
        for name, value in RECIPES[recipe].items():
            assert scope[name] == (value(scope) if callable(value) else value), name
        if recipe == "salt":
            assert scope["lr"] == pytest.approx(6.25e-4 * (48 / 3072) ** 0.5)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs"),
        (["--zzz"], "unknown flag --zzz; see --help"),
        (["--epochs", "3.5"], "--epochs is '3.5'; it takes a whole number"),
        (["--lr", "fast"], "takes a number"),
        (["--kind", "mes"], "it takes mse, l1; did you mean mse"),
        (["--verbose=maybe"], "true or false"),
        (["3"], "unexpected argument '3'"),
        (["--epochs"], "expected one argument"),
        (["--epochs", "none"], "whole number"),
        (["--paths="], "at least one value"),
        (["--betas", "0.9"], "takes 2 values"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, argv, message):
    with pytest.raises(InputError, match=message):
        apply(tmp_path, *argv)


@pytest.mark.parametrize(
    "argv, paths",
    [
        (["a", "b"], ["a", "b"]),
        (["a", "--epochs", "3", "b"], ["a", "b"]),
        (["--epochs=3", "a,b", "c"], ["a", "b", "c"]),
        (["a", "--paths", "b", "c", "--epochs", "3", "d"], ["a", "d", "b", "c"]),
        (["--paths", "a"], ["a"]),
        ([], []),
    ],
)
def test_words_without_a_flag_go_to_the_positional_setting(tmp_path, argv, paths):
    settings = apply(tmp_path, *argv, positional="paths", PATHS="")
    assert settings["paths"] == paths and settings["epochs"] == (
        3 if any("epochs" in word for word in argv) else 10
    )
    assert apply(tmp_path, *argv, positional="paths", PATHS="x,y")["paths"] == (paths or ["x", "y"])
    if argv and not argv[0].startswith("--"):
        with pytest.raises(InputError, match=f"unexpected argument '{argv[0]}'"):
            apply(tmp_path, *argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["a", "--epoch", "3"], "unknown flag --epoch; did you mean --epochs"),
        (["a", "-x"], "unexpected argument '-x'"),
        (["a", "--epochs"], "expected one argument"),
        ([","], "at least one value"),
    ],
)
def test_bad_flags_beside_words(tmp_path, argv, message):
    with pytest.raises(InputError, match=message):
        apply(tmp_path, *argv, positional="paths")


def test_command_line_over_environment_over_file(tmp_path, capsys):
    settings = apply(
        tmp_path,
        "--epochs",
        "5",
        EPOCHS="6",
        LR="1e-2",
        WEIGHT_DECAY_END="0.3",
        NAME="",
        VERBOSE="1",
    )
    assert (
        settings["epochs"],
        settings["lr"],
        settings["weight_decay_end"],
        settings["name"],
        settings["verbose"],
    ) == (5, 1e-2, 0.3, "none at all", True)
    printed = capsys.readouterr().out
    assert "lr = 0.01 (from LR in the environment)" in printed and "EPOCHS" not in printed
    with pytest.raises(InputError, match="LR in the environment is 'x'"):
        apply(tmp_path, LR="x")


def run(path, *argv):
    return subprocess.run(
        [sys.executable, path, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(config.__file__).parent.parent)},
    )


def test_a_script_from_the_shell(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    shown = run(tmp_path / "script.py", "--help")
    assert shown.returncode == 0
    for text in (
        "--epochs int",
        "passes over the data [10]",
        "--kind mse|l1",
        "loss [mse]",
        "--betas float,...",
        "AdamW [0.9,0.95]",
        "--cache str|none",
    ):
        assert text in shown.stdout
    wrong = run(tmp_path / "script.py", "--epoks", "3")
    assert (
        wrong.returncode == 1
        and wrong.stderr == "script.py: error: unknown flag --epoks; did you mean --epochs?\n"
    )
    assert "usage: python script.py [--name value ...]\n" in shown.stdout
    (tmp_path / "script.py").write_text(
        SCRIPT.replace("globals())", "globals(), positional='paths')")
    )
    assert (
        "usage: python script.py PATHS [...] [--name value ...]\n"
        in run(tmp_path / "script.py", "--help").stdout
    )
    assert "'paths': ['a', 'b']" in run(tmp_path / "script.py", "a", "--lr", "1", "b").stdout


@pytest.mark.parametrize(
    "stage",
    [
        "train",
        "cache_latents",
        "eval_distill",
        "probe_time_arrow",
        "probe_labels",
        "probe_states",
        "probe_surprise",
        "plot_runs",
        "demo/make_videos",
        "demo/run",
        "demo/report",
        "demo/seeds",
    ],
)
def test_help_of_every_stage_has_a_comment_a_setting(stage):
    path = path_of(stage)
    comments = {name: comment for name, (_, comment) in config.read_settings(path).items()}
    assert comments and all(comments.values()), [
        name for name, comment in comments.items() if not comment
    ]
    shown = run(path, "--help")
    assert shown.returncode == 0 and all(f"--{name} " in shown.stdout for name in comments)


def test_a_whole_number_edited_in_place_leaves_a_setting_what_it_is(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        "from salt import config\nrate: float = 1\nsettings = config.apply(globals(), argv=[],"
        " environ={'RATE': '0.5'})\n"
    )
    assert runpy.run_path(str(script))["settings"] == {"rate": 0.5}
    script.write_text(
        "from salt import config\nrate: float = 1\n"
        "settings = config.apply(globals(), argv=[], environ={})\n"
    )
    assert repr(runpy.run_path(str(script))["settings"]) == "{'rate': 1.0}"


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            'dtype: Literal["bf16", "fp32"] = "bfloat16"',
            "has dtype = 'bfloat16'; it takes bf16|fp32",
        ),
        ("rate = None", "has rate = None; it takes a value"),
        (
            'masks: list[Literal["short", "long"]] = "short"',
            "has masks = 'short'; it takes short|long,...",
        ),
        ('masks: list[Literal["short", "long"]] = ["shrt"]', "has masks = "),
        ("steps: int | None = 2.5", "has steps = 2.5; it takes int|none"),
        ('rate = float("inf")', "has rate = inf; it takes float"),
        ("rate: float = True", "has rate = True"),
    ],
)
def test_what_is_edited_in_place_is_checked(tmp_path, edit, message):
    script = tmp_path / "stage.py"
    script.write_text(
        f"from typing import Literal\nfrom salt import config\n{edit}\n"
        "config.apply(globals(), argv=[], environ={})\n"
    )
    with pytest.raises(InputError) as caught:
        runpy.run_path(str(script))
    assert f"stage.py {message}" in str(caught.value)


def test_what_is_true_or_false_says_so():
    """Else `training_videos = "no"`, edited in place, would be a word, and true."""
    root = Path(config.__file__).parent.parent
    places = ("*.py", "tools/*.py", "demo/*.py", "benchmarks/*.py")
    for path in itertools.chain(*map(root.glob, places)):
        if "\nsettings = config.apply(globals()" in path.read_text():
            for node in ast.parse(path.read_text().partition("\nsettings = config.apply(")[0]).body:
                value = getattr(node, "value", None)
                if isinstance(node, ast.Assign) and isinstance(value, ast.Constant):
                    assert not isinstance(value.value, bool), (path.name, ast.unparse(node))
