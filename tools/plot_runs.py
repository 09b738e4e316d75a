"""Compare runs: minimum loss, the last 2,000 steps, held-out R2, throughput and the settings that
differ, as a table, JSON and a picture.

    python tools/plot_runs.py checkpoints/RUN run_logs/OTHER_RUN.log   folders or logs; each finds
                                                                       the other by the run's name
    python tools/plot_runs.py wide narrow --out a.png --json a.json    newest run of each --run_name
    python tools/plot_runs.py old.log --out none                       any text with lines like
                                                                       `step 69080 loss 9.71`

Losses and R2 come from a run's metrics.jsonl, and where that has none from its log; settings,
status and the exact minimum from its log.
"""

import contextlib
import io
import math
import os
import re
import sys
from json import dumps, loads
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config
from salt.alive import alive, status_of
from salt.errors import InputError
from salt.files import prepare_file, write_whole
from salt.runs import STAMP, entries_of, find, lines_of, said

# ----------------------------------------------------------------------------------------- settings
# logs, run folders, metrics.jsonl files or run names; words without a flag are these
runs: list[str] = []
out: str | None = "runs.png"  # picture (png, pdf or svg); none for none
json: str | None = None  # file for the results, .json
checkpoints = "checkpoints"  # folder where a run is looked up by its name
run_logs = "run_logs"  # folder where its log is
# -------------------------------------------------------------------------------------------------
config.apply(globals(), positional="runs")

import numpy as np  # after the settings, so that --help and a mistyped flag answer at once
from matplotlib.figure import Figure
from scipy import ndimage, stats

LAST = 2000  # steps at a run's end that its mean is taken over
BATCHES = 20  # of which an interval is made
SMOOTH = 0.02  # of a run's lines: the running mean in the picture
WIDTH = 100  # columns of the table
ABREAST = 4  # runs side by side in it
# settings that say where a run is, not what it is
INCIDENTAL = {"run_name", "resume", "checkpoints", "run_logs"}
# what R2 depends on beside the student
MEASURED_BY = ["target", "target_norm", "masks", "eval_seed", "held-out clips", "latents of"]
MEASURED_BY += ["training clips", "stats_clips", "val_clips"]

if not runs:
    raise InputError("give one or more runs: logs, folders of checkpoints/, or names; see --help")
prepare_file(out, "--out", (".png", ".pdf", ".svg"))
prepare_file(json, "--json", (".json",))  # which keeps a slip from replacing a metrics.jsonl

# ---- what the files hold, as rows of metrics.jsonl
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf)(?!\w|\.\w)"
STEP = r"(?i)(?<![a-z])step\s*[:=,#]?\s*(\d[\d,]{0,17}+)(?!\.?\d)"
STEP_AND_LOSS = STEP + r".{0,200}?(?<![a-z])loss\s*[:=,]?\s*" + NUMBER
# in logs of other code
NOT_TRAINING = (
    r"(?i)(?<![a-z])(val(id(ation)?)?|eval(uation)?|dev|test|best|held.?out)[^a-z0-9]*(step|loss)"
)
BESIDE_LOSS = {"clips_per_s": r"(\d+\.?\d*) clips/s", "skipped": r"skipped (\d+)"}
HELD_OUT = {  # and what stands before it in a log line
    "val_r2": "^step \\d+ [a-z-]+",
    "val_r2_background": "own context:",
    "val_r2_lookup": "look-up:",
    "val_r2_over_best": "the best of these:",
    "val_r2_ema": "of the weights:",
}


def rows_of_log(log):
    """The rows that a log of train.py or of other code tells of."""
    rows, ours = [], False
    for line in lines_of(log):
        ours = ours or line.startswith("settings {")
        evaluated = re.match(r"step (\d+) (held-out|training) R2 ", line)
        if evaluated:
            told = {n: re.search(f"{words} R2 {NUMBER}", line) for n, words in HELD_OUT.items()}
            row = {name: float(match[1]) for name, match in told.items() if match}
            rows.append(row | {"step": int(evaluated[1]), "val_videos": evaluated[2]})
        # our messages may speak of a step and a loss, too
        if "loss" not in line.lower() or ours and not re.match(r"step \d+/\d+ ", line):
            continue
        told = re.search(STEP_AND_LOSS, re.sub(NOT_TRAINING, "", line))
        if told:
            beside = {name: re.search(pattern, line) for name, pattern in BESIDE_LOSS.items()}
            row = {name: float(match[1]) for name, match in beside.items() if match}
            rows.append(row | {"step": int(told[1].replace(",", "")), "loss": float(told[2])})
    return rows


def rows_of(folder, log):
    """(rows, the file they are of): metrics.jsonl where it tells losses, else the log that does;
    ([], "") where neither does. Of a damaged line of a .jsonl the row is empty.
    """
    for path in (os.path.join(folder, "metrics.jsonl") if folder else None, log):
        if path and os.path.isfile(path):
            rows = entries_of(path) if path.endswith(".jsonl") else rows_of_log(path)
            if any("loss" in row for row in rows):
                return rows, path
    return [], ""


def columns_of(rows, needed):
    """{name: float64 [n]} of the rows that have `needed`, nan where one has no finite number.

    Steps only rise: one that falls back starts the run again from there, and what was logged beyond
    is left out.
    """
    columns = {}
    for name in ("step", "loss", *BESIDE_LOSS, "data_wait", *HELD_OUT, "val_clips"):
        values = [row.get(name) for row in rows if needed in row]
        values = [v if isinstance(v, (int, float)) and math.isfinite(v) else np.nan for v in values]
        columns[name] = np.array(values, float)
    least_from_here = np.fmin.accumulate(columns["step"][::-1])[::-1]
    kept = columns["step"] < np.append(least_from_here[1:], np.inf)  # never where it is nan
    return {name: values[kept] for name, values in columns.items()}


def finite(values):
    return values[np.isfinite(values)]


# ---- what they come to
def counts_of(steps, skipped):
    """(float [n], the steps that each line stands for, less the skipped; notes on holes).

    steps float [n], rising; skipped float [n], of the run so far, nan for none.
    """
    start = max(0, steps[0] - max(np.diff(steps), default=steps[0]))
    counts = np.diff(steps, prepend=start)
    # the widest of three spaces to either side: lines also come at the ends of epochs, and a run
    # may be resumed with another --log_every
    around = ndimage.maximum_filter(counts[1:], footprint=[1, 1, 1, 0, 1, 1, 1], mode="constant")
    holes = np.flatnonzero((around > 0) & (counts[1:] > 3 * around))
    counts[holes + 1] = around[holes]
    skipped = np.nan_to_num(skipped)
    counts -= np.diff(skipped, prepend=skipped[0] if start else 0)
    notes = [f"no line between step {steps[i]:.0f} and {steps[i + 1]:.0f}" for i in holes]
    return np.maximum(counts, 0), notes


def end_of(steps, losses, counts):
    """{"last_loss", "last_ci95", "last_steps"}: the mean loss of a run's last 2,000 steps, its
    interval, the steps that it covers; {} where no loss among them is finite.

    steps, losses float [n]; counts [n], the steps that each line stands for, which weigh it; of a
    line that reaches out of the window the part inside counts. The interval is Student's t of 20
    batch means (Law and Kelton, Simulation Modeling and Analysis, ch. 9), for successive losses are
    correlated; of fewer where lines are few, None below five. A loss that still falls widens it;
    one correlated over more than a batch, 100 steps, makes it too narrow.
    """
    weights = np.clip(steps - (steps[-1] - LAST), 0, counts) * np.isfinite(losses)
    losses = losses[weights > 0]
    weights = weights[weights > 0]
    if not len(losses):
        return {}
    total = weights.sum()
    mean = float((weights * losses).sum() / total)
    batches = min(BATCHES, len(losses) // 2)
    batch = (batches * (np.cumsum(weights) - weights / 2) / total).astype(int)  # [lines]
    sums = np.bincount(batch, weights * (losses - mean))  # [batches]
    batches = len(np.unique(batch))
    interval = None
    if batches >= 5:
        error = math.sqrt((sums**2).sum() * batches / (batches - 1)) / total
        half = float(stats.t.ppf(0.975, batches - 1)) * error
        interval = [mean - half, mean + half]
    return {"last_loss": mean, "last_ci95": interval, "last_steps": int(total)}


def figures_of(training, held_out, counts):
    """{name: number, text or [low, high]}, named as in metrics.jsonl; the unknown is absent."""
    steps, losses = training["step"], training["loss"]
    figures: dict = {"step": int(steps[-1])}
    if len(finite(losses)):
        figures["minimum_loss"] = float(np.nanmin(losses))
        figures["minimum_step"] = int(steps[np.nanargmin(losses)])
        figures["minimum_over"] = f"lines of {np.median(counts):.0f}"
    figures |= end_of(steps, losses, counts)
    for name in ("val_r2", "val_r2_over_best", "val_r2_ema"):
        r2 = held_out[name]
        if len(finite(r2)):
            figures[f"{name}_best"] = float(np.nanmax(r2))
            figures[f"{name}_best_step"] = int(held_out["step"][np.nanargmax(r2)])
            figures[f"{name}_last"] = float(finite(r2)[-1])
    for name in ("val_r2_background", "val_r2_lookup", "val_clips", "clips_per_s", "data_wait"):
        values = finite(np.append(training[name], held_out[name]))
        if len(values):
            figures[name] = float(np.median(values))
    return figures


def summarise(folder, log, note):
    """(what the JSON holds, columns of training, of evaluations) of a run; None without a step."""
    rows, source = rows_of(folder, log)
    training, held_out = columns_of(rows, "loss"), columns_of(rows, "val_r2")
    if not len(training["step"]):
        return None
    counts, notes = counts_of(training["step"], training["skipped"])
    figures = figures_of(training, held_out, counts)
    settings = None
    with contextlib.suppress(TypeError, ValueError):  # no log, no such line, or other code's
        settings = loads(said(log, "settings ") or "")
        settings |= loads(said(log, "in force ") or "")
    if settings is None:
        notes.append("no log of train.py: settings, status and exact minimum are not known")
    else:
        figures["status"] = status_of(log) or ("running" if alive(log, folder) else "killed")
        figures["skipped"] = int(np.nan_to_num(training["skipped"])[-1])
        minimum = re.fullmatch(r"(\S+) at step (\d+) of (\d+)", said(log, "minimum loss ") or "")
        if minimum and int(minimum[3]) == figures["step"]:
            figures |= {"minimum_loss": float(minimum[1]), "minimum_step": int(minimum[2])}
            figures["minimum_over"] = "every step"
        elif minimum and int(minimum[3]) > figures["step"]:
            notes.append(f"its lines end before step {minimum[3]}: the file was cut or replaced")
        told = {beginning: said(log, beginning) for beginning in ("resumed ", "error: ")}
        notes += [beginning + rest for beginning, rest in told.items() if rest]
    if any(row.get("val_videos") == "training" for row in rows):
        notes.append("its R2 is of training videos")
    left_out = sum(not row or "loss" in row for row in rows) - len(finite(training["loss"]))
    if left_out:
        notes.append(f"lines left out, damaged, not finite or logged again later: {left_out}")
    run = {"run": os.path.relpath(folder or log), "source": os.path.relpath(source)}
    run |= {"notes": [note] * bool(note) + notes, "figures": figures, "settings": settings}
    return run, training, held_out


summaries = {}
for word in runs:
    files = find(word, checkpoints, run_logs, lambda folder, log: bool(rows_of(folder, log)[0]))
    summary = summarise(*files)
    if summary:
        summaries[summary[0]["run"]] = summary  # one given twice is there once
    else:
        print(f"{word} holds no logged step and is left out")
if not summaries:
    raise InputError("no step to compare; a log has lines such as `step 120 loss 9.71`")
results = [result for result, *_ in summaries.values()]
known = {result["run"]: result["settings"] for result in results if result["settings"]}
differences = {}
for name in dict.fromkeys(name for settings in known.values() for name in settings):
    values = {run: settings[name] for run, settings in known.items() if name in settings}
    same = len(values) == len(known) and len(set(map(dumps, values.values()))) == 1
    if not same and name not in INCIDENTAL:
        differences[name] = values


# ---- a table, a column a run
def shown(value):
    """A figure or a setting as a cell of the table; - for none."""
    text = "-" if value is None else str(value)
    if isinstance(value, list):
        text = ",".join(map(shown, value))
    if isinstance(value, float):
        text = f"{value:.5g}"
    return text if len(text) <= width else f"{text[: width // 2 - 1]}..{text[1 - width // 2 :]}"


names = [os.path.basename(result["run"]) for result in results]
bare = [re.sub(f"{STAMP}$", "", name) for name in names]
labels = next(each for each in (bare, names, list(summaries)) if len(set(each)) == len(each))
figures = dict.fromkeys(name for result in results for name in result["figures"])
first = max(map(len, [*figures, *differences, "settings that differ"]))
width = (WIDTH - first) // min(ABREAST, len(results)) - 2  # of a cell
table = {"": list(map(shown, labels))}
table |= {name: [shown(result["figures"].get(name)) for result in results] for name in figures}
table["settings that differ" if differences else "no settings differ"] = [""] * len(results)
for name, values in differences.items():
    table[name] = [shown(values.get(result["run"])) for result in results]
for start in range(0, len(results), ABREAST):
    for name, cells in table.items():
        block = [f"  {cell:{width}}" for cell in cells[start : start + ABREAST]]
        print(f"{name:{first}}{''.join(block)}".rstrip())
    print()
for label, result in zip(labels, results):
    print(f"{label}: {'; '.join([result['source'], *result['notes']])}")
apart = []
for name in MEASURED_BY:
    measured = [run for run in results if "val_r2_best" in run["figures"]]
    values = [(run["settings"] or {}).get(name, run["figures"].get(name)) for run in measured]
    apart += [name] if len({dumps(value) for value in values if value is not None}) > 1 else []
if apart:
    print(
        "held-out R2 of these runs is of other clips, masks or targets, or measured from another"
        f" mean ({', '.join(apart)}): eval_distill.py compares checkpoints in one"
    )

# ---- files
if json:
    write_whole(json, dumps({"runs": results, "differences": differences}, indent=1).encode())
    print(f"results in {json}")
if out:
    figure = Figure(figsize=(14, 5), layout="constrained")
    loss_axis, r2_axis = figure.subplots(1, 2, sharex=True)
    for i, (result, training, held_out) in enumerate(summaries.values()):
        style = {"color": f"C{i}", "ls": ("-", "--", "-.")[i // 10 % 3]}
        steps = training["step"][np.isfinite(training["loss"])]
        losses = finite(training["loss"])
        smooth = ndimage.uniform_filter1d(losses, max(5, int(SMOOTH * len(losses))))
        # below every mean
        loss_axis.plot(steps, losses, color=f"C{i}", lw=0.8, alpha=0.25, zorder=1.5)
        loss_axis.plot(steps, smooth, **style, lw=1.6, label=labels[i])
        r2_axis.plot(held_out["step"], held_out["val_r2"], **style, marker="o", ms=4)
        names = ("val_r2_background", "val_r2_lookup")
        guesses = [result["figures"].get(name, np.nan) for name in names]
        r2_axis.axhline(np.fmax(*guesses), color=f"C{i}", ls=":")
    loss_axis.set(title="training loss (pale: as logged; bold: running mean)", xlabel="step")
    r2_axis.set(title="held-out R² (dotted: the better of own context and look-up)", xlabel="step")
    low, high = loss_axis.dataLim.intervaly
    if 0 < 4 * low < high < math.inf:
        loss_axis.set_yscale("log", subs=[2, 3, 5])
        loss_axis.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    # at the start it can be far below 0; all of it is shown, what matters at full size
    if r2_axis.dataLim.ymin < -1:
        r2_axis.set_yscale("symlog", linthresh=1, linscale=3)
        r2_axis.set_yticks([-10, -3, -1, -0.5, 0, 0.25, 0.5, 0.75, 1])
        r2_axis.yaxis.set(major_formatter="{x:g}")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(out).suffix[1:], dpi=120)
    write_whole(out, picture.getvalue())
    print(f"picture in {out}")
