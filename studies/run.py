"""Runs a study: runs of train.py in turn, each of them one change away from a reference, and all
measured alike.

    python studies/run.py stall --seeds 1,2,3 --jobs 2      what is on disk is skipped
    python studies/run.py stall --rows reference,batch_16_lr_x4 --again
    python studies/run.py stall --speed                     how fast a step of each row is, alone
    python studies/run.py stall --jobs 0                    table and picture of what there is

A study is studies/NAME.py: its hypotheses, its reference, its rows; studies/world.py makes the
clips and latents that they name. Results go to studies/NAME.json as they come, the picture to
studies/NAME.png. A result counts for the flags, patches and latents that it was made with: where a
row is another by now it is run again, and what another study has of the same row is taken over.
Edit nothing while it runs: each run reads the sources anew. Ctrl-C loses the runs that are under
way. Needs requirements-demo.txt; a run takes three to six minutes on one core.
"""

import concurrent.futures
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from salt import config
from salt.errors import InputError, nearest, report_in_one_line
from salt.files import write_whole

sys.excepthook = report_in_one_line
NAMES = sorted(
    path.stem for path in (ROOT / "studies").glob("*.py") if "\nROWS = " in path.read_text()
)
ASKED = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
# ----------------------------------------------------------------------------------------- settings
seeds: list[int] = [1, 2, 3]  # of weights, masks and order; settings were chosen by seed 0
rows: list[str] = []  # some rows alone [all]
again: bool = False  # run them although results are there
jobs: int = 1  # runs at a time, of one thread each; 0: none, table and picture alone
speed: bool = False  # measure seconds of steps instead, one row after the other; nothing else runs
keep: bool = False  # keep checkpoints and logs of the runs
out = "out/studies"  # folder of the world and of the runs
results = "studies"  # folder of NAME.json and NAME.png
# -------------------------------------------------------------------------------------------------
settings = config.apply(globals(), least={"jobs": 0})
name = ASKED
if name not in NAMES:
    raise InputError(f"which study? {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
study = importlib.import_module(f"studies.{name}")
for row in rows:
    if row not in study.ROWS:
        raise InputError(f"no row {row!r} in studies/{name}.py{nearest(row, study.ROWS)}")

from tqdm import tqdm

from studies import report, world

results_file = Path(results) / f"{name}.json"
MEASURES = 1  # rises where what is measured, or how, is another
# of train.py's log, in each run's "log"
LOGGED = "step loss r2 grad_norm r2_context update_ratio feature_std effective_rank clipped".split()
content = {
    "reference": study.REFERENCE,
    "says": {key: row.says for key, row in study.ROWS.items()},
    "speed": {},
    "runs": {},
}
lock = threading.Lock()  # of content and its file, of running and stopping
running, stopping = set(), threading.Event()


class Failed(Exception):
    """A script that ended with another code than 0."""


def call(folder, script, **flags):
    """Run a script of the project, or the one of this name in FOLDER/scripts; what it prints goes
    to FOLDER/said.txt.
    """
    own = folder.resolve() / "scripts" / script
    path = own if own.exists() else ROOT / script
    words = [f"--{key}={text(value)}" for key, value in flags.items()]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "said.txt", "a") as said:
        print(f"$ python {script} {' '.join(words)}", file=said, flush=True)
        with lock:
            if stopping.is_set():
                raise Failed("stopped")
            process = subprocess.Popen(
                [sys.executable, str(path), *words],
                cwd=ROOT,
                stdout=said,
                stderr=said,
                env=environ,
            )
            running.add(process)
        code = process.wait()
        with lock:
            running.discard(process)
    if code:
        lines = (folder / "said.txt").read_text().splitlines()
        told = [line for line in lines if "error: " in line] or lines
        raise Failed(f"{script} ended with {code}: {told[-1]}")


def text(value):
    if isinstance(value, (list, tuple)):
        return ",".join(map(text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def patched(row, needed=""):
    """{file: its source with the row's patches in place}."""
    sources = {}
    for file, patches in row.patches.items():
        source = (ROOT / file).read_text()
        for old, new in patches:
            if source.count(old) != 1:
                raise InputError(
                    f"{file} has {source.count(old)} times what a patch replaces: {old}"
                )
            source = source.replace(old, new)
        sources[file] = source.replace("NEEDED", needed)
    return sources


def digest(row):
    """What a result is the result of."""
    flags = {**study.REFERENCE, **row.flags}
    names = [row.latents, *map(world.latents_of, row.needs)]
    measures = [MEASURES, row.controls, row.whole]
    what = [flags, row.patches, measures, *map(world.recipe, names)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def train(folder, row, made, **more):
    """Run train.py for a row; returns the lines of its metrics.jsonl, or None where it diverged."""
    needed = [str(made.needed(each)) for each in row.needs]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if row.patches:  # copies of the root's scripts, of which one or more are other ones
        (folder / "scripts").mkdir()
        sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
        for file, source in (sources | patched(row, *needed)).items():
            (folder / "scripts" / file).write_text(source)
    folders = {"checkpoints": folder / "checkpoints", "run_logs": folder / "run_logs"}
    flags = {**study.REFERENCE, **row.flags, **more}
    cache = made.cache(row.latents, "train")
    try:
        call(folder, "train.py", cache=cache, seed=made.seed, run_name="run", **folders, **flags)
    except Failed:
        if list(folder.glob("checkpoints/run_*/diagnosis.json")):
            return None
        raise
    (path,) = folder.glob("checkpoints/run_*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(row_name, seed):
    """Train and measure: what goes into the JSON file."""
    row = study.ROWS[row_name]
    folder = Path(out).resolve() / name / f"{row_name}-{seed}"
    made = world.World(out, call, seed)
    entry = {"of": digest(row), "flags": row.flags, "commit": COMMIT}
    lines = train(folder, row, made, val_cache=made.cache(row.latents, "validation"))
    if lines is None:
        return entry | {"failed": "diverged"}
    log = [x for x in lines if "loss" in x]
    log = log[:: len(log) // 25 or 1]
    entry["curve"] = [[x["step"], rounded(x["val_r2"])] for x in lines if "val_r2" in x]
    entry["log"] = {figure: [rounded(x.get(figure)) for x in log] for figure in LOGGED}
    (checkpoint,) = folder.glob("checkpoints/run_*/last.pth")
    entry["measures"] = made.measured(checkpoint, row, folder)
    if not keep:
        shutil.rmtree(folder)
    return entry


def seconds(row_name):
    """Seconds that the steps of a row take, without evaluations, by a short run of them."""
    row = study.ROWS[row_name]
    made = world.World(out, call, 0)
    folder = Path(out).resolve() / name / f"{row_name}-speed"
    flags = {**study.REFERENCE, **row.flags}
    short = {"max_steps": 60, "log_every": 5, "eval_every": 60, "lookup_clips": 0}
    lines = train(folder, row, made, **short)
    shutil.rmtree(folder)
    rates = sorted(x["clips_per_s"] for x in lines or () if "clips_per_s" in x)
    if not rates:
        raise Failed("it diverged before there was a speed")
    clips = flags["max_steps"] * flags["batch_size"]
    return round(clips / rates[len(rates) // 2], 1)


def rounded(figure):
    return figure and round(figure, 4)


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip()


COMMIT = git("rev-parse", "--short", "HEAD") + " with changes" * bool(git("diff", "HEAD", "--stat"))


def as_lines():
    """The content as JSON, a run a line."""
    rows = []
    for row, entries in filter(lambda item: item[1], content["runs"].items()):
        entries = [f"  {json.dumps(seed)}: {json.dumps(entry)}" for seed, entry in entries.items()]
        rows.append(f" {json.dumps(row)}: {{\n" + ",\n".join(entries) + "\n }")
    rest = {key: value for key, value in content.items() if key != "runs"}
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    return head + ',\n "runs": {\n' + ",\n".join(rows) + "\n }\n}\n"


def save():
    write_whole(str(results_file), as_lines().encode())


def one(job):
    """Why a run gave no result, or None."""
    row_name, seed = job
    try:
        entry = run(row_name, seed)
    except Failed as error:
        return f"{row_name}, seed {seed}: {error}"
    with lock:
        content["runs"][row_name][str(seed)] = entry
        save()
    return None


def stop():
    with lock:
        stopping.set()
        for process in running:
            process.terminate()


def only_one(folders):
    """One process at a time, as long as it is there."""
    for each in folders:
        Path(each).mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(os.open(each, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another study is at work in {each}; wait, or give others") from None


def take_known():
    """Results on the disk: this study's, else those of other studies of the same row."""
    known = {}
    for other in sorted(NAMES, key=lambda other: other == name):  # its own last
        path = Path(results) / f"{other}.json"
        if path.is_file():
            theirs = json.loads(path.read_text())
            for entries in theirs["runs"].values():
                known.update({(entry["of"], seed): entry for seed, entry in entries.items()})
            if other == name:
                content["speed"] = theirs["speed"]
    for row in study.ROWS:
        patched(study.ROWS[row])  # fits, before hours are spent
        of = digest(study.ROWS[row])
        content["runs"][row] = {seed: entry for (its, seed), entry in known.items() if its == of}
        if content["speed"].get(row, {}).get("of") != of:
            content["speed"].pop(row, None)


if jobs or speed:
    only_one([out, results])
take_known()
wanted = [
    (row, seed)
    for seed in seeds  # every row once, then every row a second time
    for row in rows or study.ROWS
    if again or str(seed) not in content["runs"][row]
]
failures = []
signal.signal(signal.SIGTERM, lambda *which: signal.raise_signal(signal.SIGINT))
if speed:
    for row in tqdm(rows or study.ROWS, desc="speed", unit="row", dynamic_ncols=True):
        try:
            measured = seconds(row)
        except Failed as error:
            raise InputError(f"{row}: {error}") from None
        content["speed"][row] = {"of": digest(study.ROWS[row]), "seconds": measured}
        save()
elif wanted and jobs:
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(one, job) for job in wanted]
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(wanted), desc=name, unit="run", dynamic_ncols=True):
                failures += filter(None, [future.result()])
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            if isinstance(error, KeyboardInterrupt):
                sys.exit(130)
            raise
report.show(study, content, results_file.with_suffix(".png"))
if failures:
    raise InputError(f"{len(failures)} runs gave no result; the first: {failures[0]}")
