"""Compare runs: minimum loss, the last 2,000 steps, held-out R2, throughput and the settings that
differ, as a table, JSON and a picture.

    python plot_runs.py checkpoints/RUN run_logs/OTHER_RUN.log         folders or logs; each finds
                                                                       the other by the run's name
    python plot_runs.py wide narrow --out runs.png --json runs.json    newest run of each --run_name
    python plot_runs.py old.log --out none                             any text with lines like
                                                                       `step 69080 loss 9.71`

A run's numbers come from its metrics.jsonl, and where that is not found from its log; settings,
status and the exact minimum from its log.
"""

import contextlib
import io
import math
import os
import re
from json import dumps, loads
from pathlib import Path

import config

# ----------------------------------------------------------------------------------------- settings
# logs, run folders, metrics.jsonl files or run names; words without a flag are these
runs: list[str] = []
out: str | None = "runs.png"  # picture (png, pdf or svg); none for none
json: str | None = None  # JSON file for the results
checkpoints = "checkpoints"  # folder where a run is looked up by its name
run_logs = "run_logs"  # folder where its log is
# -------------------------------------------------------------------------------------------------
config.apply(globals(), positional="runs")

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
from scipy import stats

from cache import prepare_folder, write_whole
from config import InputError
from runs import alive, lines_of
from runs import find as find_run

LAST = 2000  # steps at a run's end that its mean is taken over
BATCHES = 20  # of which an interval is made
SMOOTH = 0.02  # of a run: the running mean in the picture
WIDTH = 100  # columns of the table
ABREAST = 6  # runs side by side in it
# what R2 depends on beside the student
MEASURED_BY = (
    "target",
    "target_norm",
    "masks",
    "eval_seed",
    "held-out clips",
    "latents of",
    "training clips",
    "stats_clips",
    "the count of clips",
)
# settings that say where a run is, not what it is
INCIDENTAL = {"run_name", "resume", "checkpoints", "run_logs"}

if os.environ.get("WORLD_SIZE", "1") != "1":
    raise InputError("plot_runs.py runs in one process; start it without torchrun")
if not runs:
    raise InputError(
        "give one or more runs: logs, folders of checkpoints/, or run names; see --help"
    )
for flag, path in (("--out", out), ("--json", json)):
    if path and os.path.isdir(path):
        raise InputError(f"{flag} {path} is a folder; name a file")
    if path:
        prepare_folder(os.path.dirname(os.path.abspath(path)), flag)
if out and Path(out).suffix not in (".png", ".pdf", ".svg"):
    raise InputError(f"--out {out} is no picture; name a file that ends in .png, .pdf or .svg")


# ---- which files a word means
def find(word):
    """(name, log, metrics.jsonl, note) of the run that `word` means; one of the two files may be
    None. Raises InputError where there is none.
    """
    path = Path(os.path.abspath(word))
    # of other code, or a copy
    if path.is_file() and path.suffix == ".jsonl" and path.name != "metrics.jsonl":
        return path.stem, None, path, None
    folder, log, note = find_run(
        word, checkpoints, run_logs, lambda folder, log: has_steps(log, metrics_of(folder))
    )
    if not log and not metrics_of(folder):
        raise InputError(
            f"{word} is not text, and beside it lie no metrics.jsonl and no log; give a log, a"
            " metrics.jsonl or a run's folder"
        )
    name = (
        os.path.basename(os.path.abspath(folder))
        if folder
        else (
            path.name.removesuffix(".log")
            if path.is_file()
            else os.path.basename(log).removesuffix(".log")
        )
    )
    return name, log and Path(log), metrics_of(folder), note


def metrics_of(folder):
    return (
        Path(folder, "metrics.jsonl")
        if folder and os.path.isfile(os.path.join(folder, "metrics.jsonl"))
        else None
    )


# ---- what the files hold
def number(value):
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def ascending(rows):
    """Rows of a file, with steps that only rise, and what had to be done for it.

    A step that falls back starts the run again from there, and what was logged beyond is replaced;
    where it falls back as a new epoch begins, the steps are an epoch's own and are counted on.
    """
    kept, offset, replaced = [], 0, 0
    for row in rows:
        if kept and row["step"] + offset <= kept[-1]["step"]:
            if number(row.get("epoch")) > number(kept[-1].get("epoch")):
                offset = kept[-1]["step"]
            else:
                while kept and row["step"] + offset <= kept[-1]["step"]:
                    kept.pop()
                    replaced += 1
        kept.append(row | {"step": row["step"] + offset})
    notes = [f"{replaced} lines logged again later are left out"] if replaced else []
    return kept, notes + (
        ["steps start again with each epoch and are counted on"] if offset else []
    )


def read_metrics(path):
    """(rows of training steps, rows of held-out evaluations, notes) of a metrics.jsonl.

    The last line of a killed run may be torn.
    """
    training, held_out, damaged = [], [], 0
    for line in lines_of(path):
        try:
            row = loads(line)
            row["step"] = int(row["step"])
            if not 0 <= row["step"] < 2**53:
                raise ValueError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += bool(line.strip())
            continue
        if "val_r2" in row:
            held_out.append(row)
        if "loss" in row:
            training.append(row)
    return (
        training,
        held_out,
        [f"{damaged} torn or damaged line{'s' * (damaged > 1)} left out"] if damaged else [],
    )


VALUE = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf(?:inity)?)(?!\w|\.\w)"
LOSS_LINE = re.compile(
    r"(?<![a-z])step\s*[:=,#]?\s*(\d{1,3}(?:,\d{3}){1,4}(?!\d)|\d{1,15})(?!,?\d)(?:\s*/\s*(\d+))?"
    r".{0,200}?(?<![a-z])(?<!val.)(?<!test.)(?<!validation.)(?<!held.out.)loss\s*[:=,]?\s*" + VALUE,
    re.IGNORECASE,
)
HELD_OUT_LINE = re.compile(
    r"step (\d+) (?:held-out|training) R2 "
    + VALUE
    + r".*?(?:own context: R2 "
    + VALUE
    + r")?(?:; moving average of the weights: R2 "
    + VALUE
    + r")?\)"
)
# right before "step" or "loss", in a log of others
VALIDATION = re.compile(
    r"(?<![a-z])(val|valid|validation|eval|evaluation|dev|test|best|held[-_ ]?out)[^a-z0-9]*$",
    re.IGNORECASE,
)
EPOCH, RATE = (
    re.compile(r"epoch\s*[:=,#]?\s*(\d+\.?\d*)", re.IGNORECASE),
    re.compile(r"(\d+\.?\d*) clips/s"),
)
WAIT, SKIPPED = re.compile(r"waiting (\d+)%"), re.compile(r"skipped (\d+)")


def read_log(path, metrics=None):
    """{'training', 'held_out', and of a log of train.py 'settings', 'minimum', 'status', 'resumed',
    'error'} of a log.
    """
    found = {
        "training": [],
        "held_out": [],
        "settings": None,
        "minimum": None,
        "status": None,
        "resumed": None,
        "error": None,
        "total": None,
    }
    last = ""
    for line in lines_of(path):
        ours = found["settings"] is not None
        last = line.strip() or last
        if line.startswith("settings {") and not ours:
            try:
                found["settings"] = loads(line.removeprefix("settings "))
            except ValueError:
                found["settings"] = {}  # torn
        elif ours and line.startswith("in force {"):
            with contextlib.suppress(ValueError):
                found["settings"] |= loads(line.removeprefix("in force "))
        # ours: no message about a loss
        elif (
            "loss" in line.lower()
            and (match := LOSS_LINE.search(line))
            and (not ours or match.start() == 0 and match[2])
        ):
            if not ours and (
                VALIDATION.search(line[: match.start()])
                or VALIDATION.search(
                    line[match.start() : match.start(3)].lower().rpartition("loss")[0]
                )
            ):
                continue
            row = {"step": int(match[1].replace(",", "")), "loss": float(match[3])}
            for name, pattern, unit in (
                ("epoch", EPOCH, 1),
                ("clips_per_s", RATE, 1),
                ("data_wait", WAIT, 100),
                ("skipped", SKIPPED, 1),
            ):
                if value := pattern.search(line):
                    row[name] = float(value[1]) / unit
            found["training"].append(row)
            found["total"] = int(match[2]) if match[2] else found["total"]
        elif not ours:
            continue
        elif match := HELD_OUT_LINE.match(line):
            found["on_training"] = " training R2 " in line
            names = ("val_r2", "val_r2_background", "val_r2_ema")
            found["held_out"].append(
                {"step": int(match[1])}
                | {name: float(value) for name, value in zip(names, match.groups()[1:]) if value}
            )
        elif match := re.match(r"minimum loss (\S+) at step (\d+) of (\d+)", line):
            found["minimum"], found["steps"] = (
                {
                    "loss": float(match[1]),
                    "step": int(match[2]),
                    "over": "every step",
                },
                int(match[3]),
            )
        elif match := re.match(r"resumed (.+) at step (\d+)", line):
            found["resumed"] = {"from": match[1], "step": int(match[2])}
        elif match := re.match(r"\d+ clips, view .*; (\d+) steps of ", line):
            found["total"] = int(match[1])
        elif line.startswith(("status: ", "error: ")):
            found[line[: line.index(":")]] = line.partition(": ")[2].strip()
    if found["settings"] is not None and last != "Process exiting.":
        found["status"] = (
            "running" if alive(str(path), metrics and os.path.dirname(metrics)) else "killed"
        )
    return found


def has_steps(log, metrics):
    return bool(metrics and read_metrics(metrics)[0] or log and read_log(log)["training"])


class Empty(InputError):
    """A run without a logged step."""


# ---- what it comes to
def end_of(steps, losses, counts):
    """{'mean', 'ci95', 'steps', 'lines'} of the loss over a run's last 2,000 steps; None where no
    loss among them is finite.

    steps int [n], rising; losses float [n]; counts int [n], the steps that each line stands for,
    which weigh it; a line that reaches out of the window counts with the part inside, one that is
    not finite not at all. 'steps' is what the mean covers. ci95: from 20 non-overlapping batch
    means with Student's t (Law and Kelton, Simulation Modeling and Analysis, ch. 9; Flegal and
    Jones, Annals of Statistics 38, 2010), for successive losses are correlated; fewer batches of
    two lines where there are few, None below five. A loss that still falls widens it; one
    correlated over more than a batch, 100 steps, makes it too narrow.
    """
    weights = np.clip(steps - (steps[-1] - LAST), 0, counts) * np.isfinite(losses)
    kept = weights > 0
    weights, losses = weights[kept].astype(float), losses[kept]
    if not len(losses):
        return None
    total, batches = weights.sum(), min(BATCHES, len(losses) // 2)
    mean = float((weights * losses).sum() / total)
    interval = None
    if batches >= 5:
        # [lines]: which batch, by steps
        batch = (batches * (np.cumsum(weights) - weights / 2) / total).astype(int)
        # [batches]
        sizes, sums = (
            np.bincount(batch, values) for values in (weights, weights * (losses - mean))
        )
        batches = int((sizes > 0).sum())
        if batches >= 5:
            half = (
                stats.t.ppf(0.975, batches - 1)
                * math.sqrt((sums**2).sum() * batches / (batches - 1))
                / total
            )
            interval = [mean - half, mean + half]
    return {"mean": mean, "ci95": interval, "steps": int(total), "lines": len(losses)}


def running_mean(steps, values, counts, window):
    """float [n]: mean of values [n] over `window` steps about each, weighted by counts [n];
    narrower at the start, where a loss falls steeply.
    """
    weights = counts * np.isfinite(values)
    total, weight = (
        np.concatenate([[0], np.cumsum(part)])
        for part in (np.where(weights, values, 0) * weights, weights)
    )
    half = np.minimum(window / 2, steps - steps[0])
    low, high = np.searchsorted(steps, steps - half), np.searchsorted(steps, steps + half, "right")
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (weight[high] - weight[low])


def summarise(name, log, metrics, note):
    """({...} as it stands in the JSON, {...} of arrays to draw) of one run.

    Raises InputError where no step was logged.
    """
    logged = read_log(log, metrics) if log else {}
    training, held_out, damage = read_metrics(metrics) if metrics else ([], [], [])
    source = metrics if training else log
    if not training:
        training, held_out = logged.get("training", []), logged.get("held_out", [])
    if not training:
        raise Empty(
            f"{os.path.relpath(log or metrics)} holds no logged step; a log has lines like `step"
            " 120 loss 9.71`, a metrics.jsonl has `step` and `loss`"
        )
    notes, resumed, settings = [note] if note else [], logged.get("resumed"), logged.get("settings")
    (training, again), (held_out, _) = ascending(training), ascending(held_out)
    steps = np.array([row["step"] for row in training])
    columns = {
        key: np.array([number(row.get(key)) for row in training])
        for key in ("loss", "clips_per_s", "data_wait", "skipped")
    }
    losses = np.where(np.isfinite(columns["loss"]), columns["loss"], np.nan)
    gap = max(np.diff(steps), default=steps[0])
    start = resumed["step"] if resumed and resumed["step"] < steps[0] else max(0, steps[0] - gap)
    counts = np.maximum(1, np.diff(steps, prepend=start))  # the steps that a line stands for,
    skipped = np.maximum.accumulate(np.nan_to_num(columns["skipped"]))  # of the run so far
    # less those skipped
    counts = np.maximum(
        counts - np.diff(skipped, prepend=skipped[0] if resumed and not metrics else 0).astype(int),
        0,
    )

    # else of another stretch than the metrics
    minimum = logged.get("minimum") if logged.get("steps") == steps[-1] else None
    if not minimum and np.isfinite(losses).any():
        at, k = np.nanargmin(losses), int(np.median(counts))
        # what a foreign log's line is, nobody knows
        over = (
            "every step"
            if k == 1
            else f"means of {k}"
            if metrics or settings is not None
            else f"one in {k}"
        )
        minimum = {"loss": losses[at], "step": int(steps[at]), "over": over}
    measured = {}
    for key, label in (("val_r2", ""), ("val_r2_ema", "ema_")):
        pairs = [
            (number(row.get(key)), row["step"])
            for row in held_out
            if math.isfinite(number(row.get(key)))
        ]
        if pairs:
            best = max(pairs, key=lambda pair: pair[0])
            measured |= {
                f"{label}best": best[0],
                f"{label}best_step": best[1],
                f"{label}last": pairs[-1][0],
                f"{label}last_step": pairs[-1][1],
            }
    if measured:
        if clips := held_out[-1].get("val_clips"):
            measured["clips"] = clips
        measured["background"] = next(
            (
                number(row["val_r2_background"])
                for row in reversed(held_out)
                if "val_r2_background" in row
            ),
            None,
        )
    warm = slice(1 if len(steps) > 2 else 0, None)
    rates, waits = (
        values[warm][np.isfinite(values[warm])]
        for values in (columns["clips_per_s"], columns["data_wait"])
    )
    throughput = (
        {
            "clips_per_s": np.median(rates),
            "quartiles": list(np.quantile(rates, (0.25, 0.75))),
            "data_wait": np.median(waits) if len(waits) else None,
        }
        if len(rates)
        else None
    )

    if not log:
        notes.append(
            f"no log of it in {run_logs}: its settings, status and exact minimum are not known"
        )
    elif not settings:
        notes.append("a log without a line of settings")
    notes += [f"resumed {resumed['from']} at step {resumed['step']}"] if resumed else []
    notes += damage + again
    spaces = np.diff(steps)
    for at in range(len(spaces)):
        around = max([*spaces[max(0, at - 3) : at], *spaces[at + 1 : at + 4]], default=spaces[at])
        if spaces[at] > 3 * around:
            notes.append(f"it has no line between step {steps[at]} and {steps[at + 1]}")
            counts[at + 1] = min(counts[at + 1], around)
    if logged.get("on_training") or any(row.get("val_videos") == "training" for row in held_out):
        notes.append("its R2 is of training videos")
    if lost := int(np.isnan(losses).sum()):
        notes.append(f"{lost} logged loss{'es' * (lost > 1)} not finite, left out")
    if logged.get("status") == "finished" and steps[-1] < (logged.get("total") or 0):
        notes.append(
            f"its lines end at step {steps[-1]} of {logged['total']}: the file was cut or replaced"
        )
    if logged.get("status") == "failed" and logged.get("error"):
        notes.append(f"failed: {logged['error']}")
    result = {
        "run": name,
        "log": log and os.path.relpath(log),
        "metrics": metrics and os.path.relpath(metrics),
        "source": os.path.relpath(source),
        "status": logged.get("status"),
        "step": int(steps[-1]),
        "total_steps": logged.get("total"),
        "minimum": minimum,
        "last": end_of(steps, losses, counts),
        "held_out": measured or None,
        "throughput": throughput,
        "skipped": int(skipped[-1]) if np.isfinite(columns["skipped"]).any() else None,
        "resumed": resumed,
        "error": logged.get("error"),
        "notes": notes,
        "settings": settings,
    }
    return result, {
        "steps": steps,
        "losses": losses,
        "counts": counts,
        "rates": columns["clips_per_s"],
        "held_out": [
            (row["step"], number(row["val_r2"]), number(row.get("val_r2_background")))
            for row in held_out
        ],
    }


found = {}
for word in runs:
    run = find(word)
    # a run given twice is there once
    found.setdefault(tuple(path and path.resolve() for path in run[1:3]), (word, *run))
taken = [run[1] for run in found.values()]
found = [
    (name if taken.count(name) == 1 else word, *files) for word, name, *files in found.values()
]
for flag, path in (("--out", out), ("--json", json)):
    if path and os.path.abspath(path) in [
        os.path.abspath(file) for run in found for file in run[1:3] if file
    ]:
        raise InputError(f"{flag} {path} is one of the files to read; name another")
summaries, left_out = [], []
for run in found:
    try:
        summaries.append(summarise(*run))
    except Empty as error:
        left_out.append(error)
if not summaries:
    raise left_out[0]
results, curves = zip(*summaries)
known = [result for result in results if result["settings"]]
names = dict.fromkeys(
    name for result in known for name in result["settings"] if name not in INCIDENTAL
)
differences = {
    name: {
        result["run"]: result["settings"][name] for result in known if name in result["settings"]
    }
    for name in names
    if len({dumps(result["settings"].get(name, "?")) for result in known}) > 1
}


# ---- a table, a column a run
def without_ends(parts):
    """Lists of words [n] without those that all n begin or end with; of each at least one word
    stays.
    """
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return parts


def shortened(names):
    """Run names without date, time and pid, or one or two of them, where they differ all the same,
    and without the words they begin and end with in common.
    """
    for stamp in (r"_\d{8}_\d{6}_pid\d+$", r"_\d{6}_pid\d+$", r"_pid\d+$"):
        bare = [re.sub(stamp, "", name) for name in names]
        if len(set(bare)) == len(names):
            names = bare
            break
    return ["_".join(part) for part in without_ends([name.split("_") for name in names])]


def cut(text, width):
    return (
        text
        if len(text) <= width
        else text[: (width - 2) // 2] + ".." + text[len(text) - (width - 1) // 2 :]
    )


def shown(value):
    """A setting as its flag takes it."""
    if isinstance(value, list):
        return ",".join(map(shown, value))
    return (
        "none"
        if value is None
        else (
            str(value).lower()
            if isinstance(value, bool)
            else f"{value:.6g}"
            if isinstance(value, float)
            else str(value)
        )
    )


def cells(pattern, place):
    """One row of the table: of each result the entry at `place`, `minimum.loss` say, put into
    `pattern`; `-` where there is none.
    """
    row = []
    for value in results:
        for key in place.split("."):
            value = value.get(key) if value else None
        row.append(
            "-" if value is None else pattern(value) if callable(pattern) else pattern.format(value)
        )
    return row


labels = shortened([result["run"] for result in results])
table = [
    (label, cells(pattern, place))
    for label, pattern, place in (
        ("status", "{}", "status"),
        ("last step", "{}", "step"),
        ("  of", "{}", "total_steps"),
        ("minimum loss", "{:.5g}", "minimum.loss"),
        ("  at step", "{}", "minimum.step"),
        ("  over", "{}", "minimum.over"),
        (f"loss, last {LAST:,} steps", "{:.5g}", "last.mean"),
        ("  95 %, +-", lambda ends: f"{(ends[1] - ends[0]) / 2:.2g}", "last.ci95"),
        ("  steps in it", "{}", "last.steps"),
        ("held-out R2, best", "{:.4f}", "held_out.best"),
        ("  at step", "{}", "held_out.best_step"),
        ("  last", "{:.4f}", "held_out.last"),
        ("  at step", "{}", "held_out.last_step"),
        ("  moving average, best", "{:.4f}", "held_out.ema_best"),
        ("  moving average, last", "{:.4f}", "held_out.ema_last"),
        ("  of the background", "{:.4f}", "held_out.background"),
        ("  over clips", "{}", "held_out.clips"),
        ("clips/s, median", "{:.4g}", "throughput.clips_per_s"),
        ("  quartiles", lambda ends: f"{ends[0]:.4g}-{ends[1]:.4g}", "throughput.quartiles"),
        ("waiting for data", "{:.1%}", "throughput.data_wait"),
        ("skipped steps", "{}", "skipped"),
    )
]
table = [(label, row) for label, row in table if set(row) != {"-"}]
settings_table = []
for name, row in differences.items():
    # of paths, the part that differs
    paths = dict(zip(row, without_ends([shown(value).split("/") for value in row.values()])))
    settings_table.append(
        (name, ["/".join(paths[r["run"]]) if r["run"] in row else "-" for r in results])
    )
first = max(len(label) for label, _ in table + settings_table)
for start in range(0, len(results), ABREAST):
    block = slice(start, start + ABREAST)
    widest = max(
        len(cell)
        for row in (labels, *(row for _, row in table + settings_table))
        for cell in row[block]
    )
    width = min(widest, (WIDTH - first) // len(results[block]) - 2)
    print(" " * first + "".join(f"  {cut(label, width):>{width}}" for label in labels[block]))
    for label, row in table:
        print(f"{label:{first}}" + "".join(f"  {cut(cell, width):>{width}}" for cell in row[block]))
    if settings_table:
        print("settings that differ")
    for label, row in settings_table:
        print(f"{label:{first}}" + "".join(f"  {cut(cell, width):>{width}}" for cell in row[block]))
    print()
for label, result in zip(labels, results):
    print(f"{label}: {'; '.join([result['source'], *result['notes']])}")
for error in left_out:
    print(f"left out: {error}")
if len(known) > 1 and not differences:
    print("the runs have the same settings")
measured = [
    {**(result["settings"] or {}), "the count of clips": result["held_out"].get("clips")}
    for result in results
    if result["held_out"]
]
apart = [
    name
    for name in MEASURED_BY
    if len({dumps(run[name]) for run in measured if run.get(name) is not None}) > 1
]
if apart:
    print(
        "held-out R2 of these runs is of other clips, masks or targets, or measured from another"
        f" mean ({', '.join(apart)}): eval_distill.py compares checkpoints in one"
    )


# ---- files
def valid(value):
    """`value` in types that JSON has; null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): valid(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [valid(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


if json:
    write_whole(
        json,
        dumps(
            valid({"runs": results, "differences": differences}), indent=1, allow_nan=False
        ).encode(),
    )
    print(f"results in {json}")
if out:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ["loss"]
        + ["R2"] * any(curve["held_out"] for curve in curves)
        + ["rate"] * any(np.isfinite(curve["rates"]).any() for curve in curves)
    )
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1 + 5.5 * len(panels), 5),
        layout="constrained",
        sharex=True,
        squeeze=False,
        width_ratios=[1.5, 1, 1][: len(panels)],
    )
    axes = dict(zip(panels, axes[0]))
    backgrounds = {}
    for i, (label, result, curve) in enumerate(zip(labels, results, curves)):
        # in steps
        window = max(
            SMOOTH * (curve["steps"][-1] - curve["steps"][0]), 4 * np.median(curve["counts"])
        )
        style = {"color": f"C{i % 10}", "ls": ("-", "--", "-.")[i // 10 % 3]}
        for panel, values in (("loss", curve["losses"]), ("rate", curve["rates"])):
            if panel in axes and np.isfinite(values).any():
                # below every mean
                axes[panel].plot(
                    curve["steps"], values, color=style["color"], lw=0.8, alpha=0.25, zorder=1.5
                )
                axes[panel].plot(
                    curve["steps"],
                    running_mean(curve["steps"], values, curve["counts"], window),
                    **style,
                    lw=1.6,
                    label=label if panel == "loss" else None,
                    marker="." if len(values) == 1 else None,
                )
        if result["minimum"]:
            axes["loss"].plot(
                result["minimum"]["step"],
                result["minimum"]["loss"],
                "v",
                color=style["color"],
                ms=6,
                mec="white",
                mew=0.6,
                zorder=3,
            )
        if curve["held_out"]:
            at, r2, background = np.array(curve["held_out"]).T
            axes["R2"].plot(at, r2, **style, marker="o", ms=4)
            if np.isfinite(background).any():
                backgrounds.setdefault(
                    round(background[np.isfinite(background)][-1], 4), []
                ).append(style["color"])
        if result["resumed"]:
            for panel in axes.values():
                panel.axvline(result["resumed"]["step"], color=style["color"], lw=0.8, ls=":")
    values = np.concatenate([curve["losses"][np.isfinite(curve["losses"])] for curve in curves])
    spread = len(values) and values.min() > 0 and values.max() > 4 * values.min()
    axes["loss"].set(
        title="training loss  (pale: as logged; bold: running mean; v: minimum)",
        xlabel="step",
        yscale="log" if spread else "linear",
    )
    if spread:
        axes["loss"].yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes["loss"].yaxis.set_major_formatter("{x:g}")
        axes["loss"].yaxis.set_minor_formatter("")
    if "R2" in axes:
        for background, colours in backgrounds.items():
            axes["R2"].axhline(
                background,
                color=colours[0] if len(colours) == 1 and len(results) > 1 else "0.4",
                ls=":",
                lw=1.2,
            )
        measured = [
            r2 for curve in curves for _, r2, _ in curve["held_out"] if math.isfinite(r2)
        ] + list(backgrounds)
        low, high = min(measured, default=0), max(measured, default=1)
        axes["R2"].set(title="held-out R²  (dotted: the clip's own background)", xlabel="step")
        # at the start it can be far below 0; all of it is shown, what matters at full size
        if low < -1:
            axes["R2"].set_yscale("symlog", linthresh=1, linscale=3)
            axes["R2"].set_yticks(
                [-1000, -100, -10, -3, -1, -0.5, 0, 0.25, 0.5, 0.75, 1], minor=False
            )
            axes["R2"].yaxis.set_major_formatter("{x:g}")
        room = 0.05 * (max(high, 0) - max(low, -1)) + 0.01
        axes["R2"].set_ylim(1.15 * low if low < -1 else low - room, high + room)
    if "rate" in axes:
        axes["rate"].set(title="clips/s", xlabel="step", ylim=(0, None))
    for panel in axes.values():
        panel.grid(alpha=0.25)
        panel.margins(x=0.02)
    if len(values):
        figure.legend(loc="outside upper center", ncols=min(4, len(results)), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(out).suffix[1:], dpi=120)
    write_whole(out, picture.getvalue())
    print(f"picture in {out}")
