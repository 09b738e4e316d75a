"""Runs a study: runs of train.py in turn, each of them one change away from a reference, and all
measured alike.

    python studies/run.py stall --seeds 1,2,3 --jobs 2      what is on disk is skipped
    python studies/run.py stall --rows reference,lr_x4 --again
    python studies/run.py stall --jobs 0                    table and picture of what there is

A study is studies/NAME.py: its hypotheses, its reference, its rows; studies/world.py makes the
clips and latents that they name. Results go to studies/NAME.json as they come, the picture to
studies/NAME.png; what runs leave stays under --out. Ctrl-C loses the runs that are under way.
Needs requirements-demo.txt.
"""

import concurrent.futures
import importlib
import json
import os
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
# -------------------------------------------------------------------------------------------------
settings = config.apply(globals(), least={"jobs": 0})
name = ASKED
if name not in NAMES:
    raise InputError(f"which study? {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
study = importlib.import_module(f"studies.{name}")
unknown = [row for row in rows if row not in study.ROWS]
if unknown:
    raise InputError(f"no row {unknown[0]!r} in studies/{name}.py{nearest(unknown[0], study.ROWS)}")

from tqdm import tqdm

from studies import world

results_file = ROOT / "studies" / f"{name}.json"
results = json.loads(results_file.read_text()) if results_file.is_file() else {"runs": {}}
lock = threading.Lock()  # of results and their file
running = set()  # processes


class Failed(Exception):
    """A script that ended with another code than 0."""


def call(folder, script, **flags):
    """Run a script of the project; what it prints goes to FOLDER/said.txt."""
    words = [f"--{key}={text(value)}" for key, value in flags.items()]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "said.txt", "a") as said:
        print(f"$ python {script} {' '.join(words)}", file=said, flush=True)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *words], stdout=said, stderr=said, env=environ
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code:
        last = (folder / "said.txt").read_text().splitlines()[-1]
        raise Failed(f"{script} ended with {code}: {last}; see {folder}/said.txt")


def text(value):
    if isinstance(value, (list, tuple)):
        return ",".join(map(text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def patched(folder, patches):
    """A copy of train.py with [(old, new)] in place, or train.py."""
    if not patches:
        return ROOT / "train.py"
    source = (ROOT / "train.py").read_text()
    for old, new in patches:
        if source.count(old) != 1:
            raise InputError(
                f"train.py holds {source.count(old)} times what a patch looks for: {old}"
            )
        source = source.replace(old, new)
    (folder / "train.py").write_text(source)
    return (folder / "train.py").resolve()


def run(row_name, seed):
    """Train and measure: what goes into the JSON file."""
    row = study.ROWS[row_name]
    flags = {**study.REFERENCE, **row.flags}
    folder = Path(out) / name / f"{row_name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    caches = {split: world.made(row.latents, split, out, call) for split in world.SPLITS}
    needed = {each: world.made(each, "train", out, call) for each in row.needs}
    patches = [(old, new.format(**needed)) for old, new in row.patches]
    began = time.time()
    call(
        folder,
        patched(folder, patches),
        cache=caches["train"],
        val_cache=caches["validation"],
        seed=seed,
        run_name="run",
        checkpoints=folder / "checkpoints",
        run_logs=folder / "run_logs",
        **flags,
    )
    seconds = time.time() - began
    checkpoint = next(folder.glob("checkpoints/run_*/last.pth"))
    lines = [json.loads(line) for line in open(checkpoint.parent / "metrics.jsonl")]
    found = {
        "seconds": round(seconds, 1),
        "curve": [[line["step"], round(line["val_r2"], 4)] for line in lines if "val_r2" in line],
        "log": [
            [line["step"], *(round(line[key], 4) for key in ("loss", "r2", "grad_norm"))]
            for line in lines
            if "loss" in line
        ],
        "commit": commit(),
    } | world.measured(checkpoint, caches, flags, study.REFERENCE, folder, out, call, row.controls)
    if not keep:
        shutil.rmtree(folder)
    return found


def commit():
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def save():
    results["reference"] = study.REFERENCE
    results["rows"] = {
        key: {"flags": row.flags, "latents": row.latents, "says": row.says}
        for key, row in study.ROWS.items()
    }
    write_whole(str(results_file), (json.dumps(results, indent=1) + "\n").encode())


def one(job):
    row_name, seed = job
    try:
        found = run(row_name, seed)
    except Failed as error:
        return f"{row_name}, seed {seed}: {error}"
    with lock:
        results["runs"].setdefault(row_name, {})[str(seed)] = found
        save()
    return None


wanted = [
    (row, seed)
    for seed in seeds  # every row once, then every row a second time
    for row in rows or study.ROWS
    if again or str(seed) not in results["runs"].get(row, {})
]
failed = []
if wanted and jobs:
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    signal.signal(signal.SIGTERM, lambda *which: signal.raise_signal(signal.SIGINT))
    try:
        futures = [pool.submit(one, job) for job in wanted]
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, total=len(wanted), desc=name, unit="run", dynamic_ncols=True):
            failed += [future.result()] if future.result() else []
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        sys.exit(130)
from studies import report

report.show(study, results, ROOT / "studies" / f"{name}.png")
if failed:
    raise InputError(f"{len(failed)} runs failed; the first: {failed[0]}")
