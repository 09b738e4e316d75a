"""The house: which file may import which, and how long each may be."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lines of 100 columns. One rises in a commit that says why.
BUDGETS = {
    "cache_latents": 320,
    "eval_distill": 215,
    "export": 200,
    "model": 480,
    "probe_labels": 260,
    "probe_states": 265,
    "probe_surprise": 260,
    "probe_time_arrow": 170,
    "train": 350,
    "salt": 60,
    "salt.advice": 40,
    "salt.alive": 150,
    "salt.cache": 400,
    "salt.cache_format": 290,
    "salt.cache_merge": 190,
    "salt.cache_repair": 170,
    "salt.cache_writer": 290,
    "salt.caching": 285,
    "salt.card": 180,
    "salt.checkpoint": 90,
    "salt.clips": 120,
    "salt.comparison": 140,
    "salt.config": 355,
    "salt.containers": 235,
    "salt.encoders": 120,
    "salt.errors": 90,
    "salt.extension": 260,
    "salt.features": 160,
    "salt.files": 70,
    "salt.folders": 180,
    "salt.frames": 150,
    "salt.given_paths": 90,
    "salt.graph": 100,
    "salt.health": 165,
    "salt.hub": 35,
    "salt.heldout": 170,
    "salt.initial": 190,
    "salt.journal": 310,
    "salt.lerobot": 330,
    "salt.linear": 65,
    "salt.lists": 240,
    "salt.loader": 340,
    "salt.lookup": 220,
    "salt.masks": 375,
    "salt.meter": 330,
    "salt.odd_videos": 130,
    "salt.ops": 494,
    "salt.optimiser": 70,
    "salt.positions": 160,
    "salt.plain_folder": 40,
    "salt.pretrained": 205,
    "salt.probed": 315,
    "salt.probing": 410,
    "salt.ranks": 290,
    "salt.recipes": 60,
    "salt.refusals": 100,
    "salt.rows": 100,
    "salt.run": 250,
    "salt.run_folder": 290,
    "salt.runs": 340,
    "salt.scaling": 200,
    "salt.schedule": 110,
    "salt.score": 320,
    "salt.shapes": 100,
    "salt.shards": 200,
    "salt.splits": 400,
    "salt.stored": 110,
    "salt.stream": 165,
    "salt.surprise": 340,
    "salt.task": 285,
    "salt.teachers": 220,
    "salt.torch_files": 140,
    "salt.transformers_teacher": 195,
    "salt.upkeep": 200,
    "salt.user_teacher": 220,
    "salt.verdict": 90,
    "salt.video": 250,
    "salt.videomae": 250,
    "salt.views": 200,
    "salt.vjepa2": 255,
    "tools.doctor": 360,
    "tools.plot_runs": 330,
    "benchmarks.budget": 190,
}
# Imports run one way: a file imports from the rows above its own, or from its own row.
ROWS = [
    "salt.errors salt",
    "salt.config salt.files salt.extension salt.recipes salt.given_paths salt.advice",
    "salt.ops salt.optimiser",
    "salt.masks salt.rows",
    "salt.views salt.torch_files salt.positions",
    "salt.pretrained salt.plain_folder salt.card salt.hub salt.folders salt.odd_videos"
    " salt.cache_format salt.stored salt.shapes salt.linear",
    "salt.lists salt.lerobot salt.containers",
    "salt.splits salt.scaling salt.frames salt.video salt.cache",
    "salt.runs salt.ranks salt.score salt.heldout salt.clips salt.shards",
    "salt.alive salt.loader salt.lookup salt.cache_writer salt.checkpoint salt.videomae"
    " salt.vjepa2 salt.health",
    "salt.upkeep salt.run_folder salt.schedule salt.journal",
    "salt.cache_repair salt.cache_merge salt.run salt.refusals",
    "model salt.comparison benchmarks.budget",
    "salt.encoders",
    "salt.user_teacher salt.transformers_teacher",
    "salt.teachers",
    "salt.initial salt.task salt.caching salt.meter salt.graph salt.features salt.probing"
    " salt.verdict",
    "salt.probed salt.surprise salt.stream",
    "train cache_latents eval_distill export"
    " probe_time_arrow probe_states probe_labels probe_surprise tools.doctor tools.plot_runs",
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row.split()}
FILES = sorted(
    path
    for place in ("*.py", "salt/*.py", "tools/*.py", "benchmarks/budget.py")
    for path in ROOT.glob(place)
    if path.name != "setup.py"
)


def module(path):
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def imported(path):
    """Names of the project's modules that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        yield from (name for name in names if name in ROW_OF)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_run_one_way(path):
    name = module(path)
    later = [other for other in imported(path) if ROW_OF[other] > ROW_OF[name]]
    assert not later, f"{name} imports {', '.join(later)}"
    if ROW_OF[name] == len(ROWS) - 1:  # a script imports no other script
        assert not [other for other in imported(path) if ROW_OF[other] == ROW_OF[name]]


def test_no_two_files_import_each_other():
    graph = {module(path): set(imported(path)) - {module(path)} for path in FILES}
    while graph:
        done = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert done, f"these import each other: {', '.join(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in done}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_keeps_its_budget(path):
    lines = len(path.read_text().splitlines())
    assert lines <= BUDGETS[module(path)], f"{module(path)} has {lines} lines"


def test_the_page():
    """Mean and longest line, tokens a line, and names stored in the loop of the training script."""
    source = (ROOT / "train.py").read_text()
    lines = [line for line in source.splitlines() if line.strip()]
    code = [line for line in lines if not line.lstrip().startswith("#")]
    assert max(map(len, lines)) <= 100 and sum(map(len, code)) / len(code) <= 55
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    assert sum(token.type in kinds for token in tokens) / len(code) <= 9
    loop = next(node for node in ast.parse(source).body if isinstance(node, ast.While))
    names = [node for node in ast.walk(loop) if isinstance(node, ast.Name)]
    assert len({node.id for node in names if isinstance(node.ctx, ast.Store)}) <= 18
