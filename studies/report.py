"""What a study came to: a table of its rows, and its picture."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

SHOWN = ("R2", "states, 30 labels", "states, 300 labels", "surprise, ratio masks")


def values_of(runs, row, measure):
    """{seed: value} of a row's runs that have the measure."""
    return {
        seed: run["measures"][measure]["value"]
        for seed, run in runs.get(row, {}).items()
        if measure in run["measures"]
    }


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
    """Names of rows that have runs, the reference first, then from the worst R2 on."""

    def place(name):
        found = difference(runs, name, study.ROWS[name].against, SHOWN[0])
        return (name != "reference", math.inf if found is None else found[0])

    return sorted((name for name in study.ROWS if runs.get(name)), key=place)


def lines(study, runs):
    """The table in Markdown: means of the reference, differences of the others."""
    yield "| row | against | seeds | " + " | ".join(SHOWN) + " | seconds |"
    yield "|---|---|" + "---|" * (len(SHOWN) + 2)
    for name in ranked(study, runs):
        against = study.ROWS[name].against if name != "reference" else ""
        cells = []
        for measure in SHOWN:
            own = list(values_of(runs, name, measure).values())
            if not own:
                cells.append("-")
                continue
            cell = f"{np.mean(own):.3f}"
            found = difference(runs, name, against, measure) if against else None
            if found:
                mean, half = found
                sure = "*" if abs(mean) > half else ""
                cell += (
                    f" ({mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}") + f"){sure}"
                )
            cells.append(cell)
        seconds = np.mean([run["seconds"] for run in runs[name].values()])
        count = len(runs[name])
        yield f"| {name} | {against} | {count} | {' | '.join(cells)} | {seconds:.0f} |"


def show(study, results, path):
    """Print the table and draw it, with the held-out curves of the four worst rows."""
    runs = results["runs"]
    for line in lines(study, runs):
        print(line)
    names = [name for name in ranked(study, runs) if name != "reference"]
    if not names or "reference" not in runs:
        return
    figure, axes = plt.subplots(
        1, 4, figsize=(15, 1.5 + 0.28 * len(names)), width_ratios=(1, 1, 1, 1.5)
    )
    for axis, measure in zip(axes, (SHOWN[0], *SHOWN[2:])):
        for y, name in enumerate(reversed(names)):
            found = difference(runs, name, study.ROWS[name].against, measure)
            if found:
                half = 0 if math.isnan(found[1]) else found[1]
                axis.errorbar(found[0], y, xerr=half, fmt="o", color="C0", markersize=4)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(f"{measure},\nminus the reference", fontsize=9)
        axis.set_yticks(range(len(names)), reversed(names) if axis is axes[0] else [], fontsize=8)
    for name in ["reference", *names[:4]]:
        curves = np.array([run["curve"] for run in runs[name].values()])
        style = {"color": "black"} if name == "reference" else {}
        axes[3].plot(curves[0, :, 0], curves[:, :, 1].mean(0), label=name, **style)
    axes[3].set_title(
        "held-out R2 in training (in the run's own space),\nmean of seeds", fontsize=9
    )
    axes[3].set_xlabel("steps")
    axes[3].set_ylim(-0.2, None)
    axes[3].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
