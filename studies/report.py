"""What a study came to: a table of its rows, and its picture."""

import io
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from salt.files import write_whole

RANKED = "states, 300 labels"
SHOWN = ("R2", "states, 30 labels", RANKED, "positions, 300 labels", "surprise, future masks")
CHOSEN_BY = "0"  # the seed that settings were chosen by, of which nothing is shown


def trained(runs, row):
    """{seed: entry} of a row's runs that came to an end."""
    entries = runs.get(row, {}).items()
    return {seed: x for seed, x in entries if seed != CHOSEN_BY and "measures" in x}


def values_of(runs, row, measure):
    """{seed: value} of a row's runs that have the measure."""
    measures = {seed: entry["measures"] for seed, entry in trained(runs, row).items()}
    return {seed: x[measure]["value"] for seed, x in measures.items() if measure in x}


def difference(runs, row, against, measure):
    """(mean, half the width of its 95 % interval) of a row minus another over the seeds that both
    have, by Student's t; nan half where there are fewer than two; None where there is none.
    """
    mine, theirs = values_of(runs, row, measure), values_of(runs, against, measure)
    both = np.array([mine[seed] - theirs[seed] for seed in mine if seed in theirs])
    if not len(both):
        return None
    if len(both) == 1:
        return float(both[0]), math.nan
    half = stats.t.ppf(0.975, len(both) - 1) * both.std(ddof=1) / math.sqrt(len(both))
    return float(both.mean()), float(half)


def ranked(study, runs):
    """Names of rows that have runs, the reference first, then from the worst on."""

    def place(name):
        found = difference(runs, name, study.ROWS[name].against, RANKED)
        return (name != "reference", -math.inf if found is None else found[0])

    return sorted((name for name in study.ROWS if runs.get(name)), key=place)


def cell(runs, name, against, measure):
    own = list(values_of(runs, name, measure).values())
    if not own:
        return "-"
    found = difference(runs, name, against, measure) if against else None
    if not found:
        return f"{np.mean(own):.3f}"
    mean, half = found
    width = "" if math.isnan(half) else f" ± {half:.3f}"
    return f"{np.mean(own):.3f} ({mean:+.3f}{width})" + "*" * (abs(mean) > half)


def lines(study, runs):
    """The table in Markdown: means of the reference, differences of the others."""
    yield "| row | against | seeds | " + " | ".join(SHOWN) + " | seconds |"
    yield "|---|---|" + "---|" * (len(SHOWN) + 2)
    for name in ranked(study, runs):
        against = study.ROWS[name].against if name != "reference" else ""
        entries = trained(runs, name)
        failed = sum("failed" in entry for entry in runs[name].values())
        count = f"{len(entries)}" + f", {failed} diverged" * (failed > 0)
        cells = " | ".join(cell(runs, name, against, measure) for measure in SHOWN)
        seconds = np.mean([x["seconds"] for x in entries.values()]) if entries else math.nan
        yield f"| {name} | {against} | {count} | {cells} | {seconds:.0f} |"
        if study.ROWS[name].controls:
            cells = " | ".join(cell(runs, name, "", f"untrained: {x}") for x in SHOWN)
            yield f"| untrained, mean of 3 | | {len(entries)} | {cells} | |"


def worst_curves(runs, names, axis):
    """A panel: held-out R2 in training of the four worst rows."""
    for name in ["reference", *names[:4]]:
        entry = next(iter(trained(runs, name).values()))
        steps, figures = zip(*entry["curve"])
        style = {"color": "black"} if name == "reference" else {}
        axis.plot(np.array(steps) / max(1, steps[-1]), figures, label=name, **style)
    axis.set_title("held-out R2 in training, of the run's own masks and space", fontsize=9)
    axis.set_xlabel("share of the steps")
    axis.set_ylim(-0.3, None)
    axis.legend(fontsize=8)


def against_seconds(runs, names, axis):
    """A panel: what is ranked, against seconds of training."""
    for name in ["reference", *names]:
        seconds = np.mean([entry["seconds"] for entry in trained(runs, name).values()])
        place = seconds, np.mean(list(values_of(runs, name, RANKED).values()))
        axis.plot(*place, "o", color="black" if name == "reference" else "C0", markersize=4)
        axis.annotate(name, place, xytext=(4, 2), textcoords="offset points", fontsize=6)
    axis.set_title(RANKED, fontsize=9)
    axis.set_xlabel("seconds of training, one thread")


def show(study, runs, path):
    """Print the table and draw it."""
    for line in lines(study, runs):
        print(line)
    names = [name for name in ranked(study, runs) if name != "reference" and trained(runs, name)]
    if not names or not trained(runs, "reference"):
        return
    figure, axes = plt.subplots(
        1, 4, figsize=(15, 1.5 + 0.28 * len(names)), width_ratios=(1, 1, 1, 1.5)
    )
    labels = []
    for name in reversed(names):
        against = study.ROWS[name].against
        labels.append(name if against == "reference" else f"{name}\n(minus {against})")
    for axis, measure in zip(axes, (RANKED, "R2", "surprise, future masks")):
        for y, name in enumerate(reversed(names)):
            found = difference(runs, name, study.ROWS[name].against, measure)
            if found:
                half = 0 if math.isnan(found[1]) else found[1]
                axis.errorbar(found[0], y, xerr=half, fmt="o", color="C0", markersize=4)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(f"{measure},\nminus the reference", fontsize=9)
        axis.set_yticks(range(len(names)), labels if axis is axes[0] else [], fontsize=8)
    study.LAST_PANEL(runs, names, axes[3])
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    write_whole(str(path), drawn.getvalue())
