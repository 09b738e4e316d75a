"""Runs a study: runs of train.py in turn, each of them one change away from a reference, and all
measured alike.

    python studies/run.py stall --seeds 1,2,3 --jobs 2      what is on disk is skipped
    python studies/run.py stall --rows reference,batch_16_lr_x4 --again
    python studies/run.py stall --jobs 0                    table and picture of what there is

A study is studies/NAME.py: its hypotheses, its reference, its rows; studies/world.py makes the
clips and latents that they name. Results go to studies/NAME.json as they come, the picture to
studies/NAME.png; a result counts for the flags, patches and latents that it was made with, and
where a row is another by now it is run again. Ctrl-C loses the runs that are under way. Needs
requirements-demo.txt; a run takes some six minutes on one core.
"""

import concurrent.futures
import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
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
# of train.py's log, in each run's "log"
LOGGED = "step loss r2 grad_norm r2_context update_ratio feature_std effective_rank clipped".split()
found = {
    "log": LOGGED,
    "reference": study.REFERENCE,
    "says": {key: row.says for key, row in study.ROWS.items()},
    "runs": {},
}
lock = threading.Lock()  # of found and its file, of running and stopping
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
                [sys.executable, str(path), *words], stdout=said, stderr=said, env=environ
            )
            running.add(process)
        code = process.wait()
        with lock:
            running.discard(process)
    if code:
        last = (folder / "said.txt").read_text().splitlines()[-1]
        raise Failed(f"{script} ended with {code}: {last}")


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
    what = [flags, row.patches, *map(world.recipe, names)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def run(row_name, seed):
    """Train and measure: what goes into the JSON file."""
    row = study.ROWS[row_name]
    flags = {**study.REFERENCE, **row.flags}
    folder = Path(out) / name / f"{row_name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    caches = {split: world.cache(row.latents, split, out, call) for split in world.SPLITS}
    needed = [str(world.needed(each, out, call)) for each in row.needs]
    if row.patches:  # copies of the root's scripts, of which one or more are other ones
        (folder / "scripts").mkdir()
        sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
        for file, source in (sources | patched(row, *needed)).items():
            (folder / "scripts" / file).write_text(source)
    began = time.time()
    entry = {"of": digest(row), "flags": row.flags, "commit": COMMIT}
    try:
        call(
            folder,
            "train.py",
            cache=caches["train"],
            val_cache=caches["validation"],
            seed=seed,
            run_name="run",
            checkpoints=folder / "checkpoints",
            run_logs=folder / "run_logs",
            **flags,
        )
    except Failed as error:  # a run that diverges is a result
        if "finite" not in str(error):
            raise
        return entry | {"failed": str(error)}
    entry["seconds"] = round(time.time() - began, 1)
    (cost,) = re.findall(r"GFLOP \((\S+) a clip\)", (folder / "said.txt").read_text())
    entry["gflop_a_clip"] = float(cost)
    checkpoint = next(folder.glob("checkpoints/run_*/last.pth"))
    lines = [json.loads(line) for line in open(checkpoint.parent / "metrics.jsonl")]
    entry["curve"] = [[x["step"], rounded(x["val_r2"])] for x in lines if "val_r2" in x]
    log = [x for x in lines if "loss" in x]
    entry["log"] = [[rounded(x.get(name)) for name in LOGGED] for x in log[:: len(log) // 25 or 1]]
    comparable = row.predicts and world.has_the_space_of(study.REFERENCE, flags, row.latents)
    entry["measures"] = world.measured(checkpoint, row, comparable, folder, out, call)
    if not keep:
        shutil.rmtree(folder)
    return entry


def rounded(figure):
    return figure and round(figure, 4)


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip()


COMMIT = git("rev-parse", "--short", "HEAD") + " with changes" * bool(git("diff", "HEAD", "--stat"))


def as_lines(content):
    """JSON, a run a line."""
    rows = []
    for row, entries in filter(lambda item: item[1], content["runs"].items()):
        entries = [f"  {json.dumps(seed)}: {json.dumps(entry)}" for seed, entry in entries.items()]
        rows.append(f" {json.dumps(row)}: {{\n" + ",\n".join(entries) + "\n }")
    rest = {key: value for key, value in content.items() if key != "runs"}
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    return head + ',\n "runs": {\n' + ",\n".join(rows) + "\n }\n}\n"


def one(job):
    """Why a run gave no result, or None."""
    row_name, seed = job
    try:
        entry = run(row_name, seed)
    except Failed as error:
        return f"{row_name}, seed {seed}: {error}"
    with lock:
        found["runs"][row_name][str(seed)] = entry
        write_whole(str(results_file), as_lines(found).encode())
    return None


def stop():
    with lock:
        stopping.set()
        for process in running:
            process.terminate()


known = {}  # results by what they are of, those of other studies, too
for path in Path(results).glob("*.json"):
    for entries in json.loads(path.read_text()).get("runs", {}).values():
        known.update({(entry["of"], seed): entry for seed, entry in entries.items()})
for row in study.ROWS:
    patched(study.ROWS[row])  # fits, before hours are spent
    of = digest(study.ROWS[row])
    found["runs"][row] = {seed: entry for (its, seed), entry in known.items() if its == of}
wanted = [
    (row, seed)
    for seed in seeds  # every row once, then every row a second time
    for row in rows or study.ROWS
    if again or str(seed) not in found["runs"][row]
]
failures = []
if wanted and jobs:
    for each in (out, results):
        Path(each).mkdir(parents=True, exist_ok=True)
        try:  # by one at a time, as long as this process is there
            fcntl.flock(os.open(each, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another study is at work in {each}; wait, or give others") from None
    signal.signal(signal.SIGTERM, lambda *which: signal.raise_signal(signal.SIGINT))
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
report.show(study, found["runs"], results_file.with_suffix(".png"))
if failures:
    raise InputError(f"{len(failures)} runs gave no result; the first: {failures[0]}")
