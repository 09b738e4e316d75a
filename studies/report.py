"""What a study came to: a table of its rows, and its picture."""

import io
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from salt.files import write_whole
from studies import world

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


def to_compare(study, runs, row, against, measure):
    """`difference`, or None where the two have another R2."""
    if measure == "R2" and not world.comparable(study, row, against):
        return None
    return difference(runs, row, against, measure)


def ranked(study, runs):
    """Names of rows that have runs, the reference first, then from the worst on."""

    def place(name):
        found = difference(runs, name, study.ROWS[name].against, RANKED)
        return (name != "reference", math.inf if found is None else found[0])

    return sorted((name for name in study.ROWS if runs.get(name)), key=place)


def cell(study, runs, name, measure):
    own = list(values_of(runs, name, measure).values())
    if not own:
        return "-"
    against = study.ROWS[name].against
    found = to_compare(study, runs, name, against, measure) if name != "reference" else None
    if not found:
        return f"{np.mean(own):.3f}"
    mean, half = found
    width = "" if math.isnan(half) else f" ± {half:.3f}"
    # of surprise the pairs, the same ones for all seeds, are the larger part of the uncertainty
    star = "*" * (abs(mean) > half and not measure.startswith("surprise"))
    return f"{np.mean(own):.3f} ({mean:+.3f}{width}){star}"


def lines(study, content):
    """The table in Markdown: means of the reference, differences of the others."""
    runs = content["runs"]
    shown = getattr(study, "SHOWN", SHOWN)
    cost = getattr(study, "cost_of_vit_l", None)
    more = "| seconds | ViT-L operations |" if cost else "| seconds |"
    yield "| row | against | seeds | " + " | ".join(shown) + " " + more
    yield "|---|---|" + "---|" * (len(shown) + more.count("|") - 1)
    for name in ranked(study, runs):
        row = study.ROWS[name]
        failed = sum("failed" in entry for entry in runs[name].values())
        count = f"{len(trained(runs, name))}" + f", {failed} diverged" * (failed > 0)
        cells = " | ".join(cell(study, runs, name, measure) for measure in shown)
        seconds = content["speed"].get(name, {}).get("seconds", "-")
        against = row.against if name != "reference" else ""
        share = cost and cost(row)
        more = f" {share:.2f} |" if share else " - |" if cost else ""
        yield f"| {name} | {against} | {count} | {cells} | {seconds} |{more}"
        for beside in ["untrained"] * (row.controls or row.whole) + ["teacher"] * row.whole:
            cells = " | ".join(cell(study, runs, name, f"{beside}: {x}") for x in shown)
            yield f"| its {beside} | | | {cells} | |" + " |" * bool(cost)


def curves(study, content, names, axis):
    """A panel: held-out R2 in training of the reference and of the study's CURVES."""
    for name in ["reference", *study.CURVES]:
        for entry in list(trained(content["runs"], name).values())[:1]:
            steps, figures = zip(*entry["curve"])
            style = {"color": "black"} if name == "reference" else {}
            axis.plot(np.array(steps) / max(1, steps[-1]), figures, label=name, **style)
    axis.set_title("held-out R2 in training", fontsize=9)
    axis.set_xlabel("share of the steps")
    axis.set_ylim(-0.3, None)
    axis.legend(fontsize=8)


def losses(study, content, names, axis):
    """A panel: training losses of the study's LOSSES, in the same space, from a tenth on."""
    for name in study.LOSSES:
        for entry in list(trained(content["runs"], name).values())[:1]:
            steps, figures = (np.array(entry["log"][key]) for key in ("step", "loss"))
            later = steps > steps[-1] / 10
            axis.plot(steps[later] / steps[-1], figures[later], label=name)
    axis.set_title("training loss", fontsize=9)
    axis.set_xlabel("share of the steps")
    axis.legend(fontsize=8)


def against_seconds(study, content, names, axis):
    """A panel: R2, where it is the reference's, against seconds of training."""
    for name in ["reference", *names]:
        values = list(values_of(content["runs"], name, "R2").values())
        if name in content["speed"] and world.comparable(study, name, "reference"):
            place = content["speed"][name]["seconds"], np.mean(values)
            axis.plot(*place, "o", color="black" if name == "reference" else "C0", markersize=4)
            axis.annotate(name, place, xytext=(4, 2), textcoords="offset points", fontsize=6)
    axis.set_title("R2", fontsize=9)
    axis.set_xlabel("seconds of steps, one thread")


def show(study, content, path):
    """Print the table and draw it."""
    runs = content["runs"]
    for line in lines(study, content):
        print(line)
    names = [name for name in ranked(study, runs) if name != "reference" and trained(runs, name)]
    if not names or not trained(runs, "reference"):
        return
    count = len(study.PANELS)
    size = 10 + 5 * count, 1.5 + 0.2 * len(names)
    figure, axes = plt.subplots(1, 3 + count, figsize=size, width_ratios=(1, 1, 1, *[1.5] * count))
    labels = []
    for name in reversed(names):
        against = study.ROWS[name].against
        labels.append(name if against == "reference" else f"{name} (minus {against})")
    for axis, measure in zip(axes, (RANKED, "R2", "surprise, future masks")):
        for y, name in enumerate(reversed(names)):
            found = to_compare(study, runs, name, study.ROWS[name].against, measure)
            if found:
                half = 0 if math.isnan(found[1]) else found[1]
                axis.errorbar(found[0], y, xerr=half, fmt="o", color="C0", markersize=4)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(f"{measure},\nminus the reference", fontsize=9)
        axis.set_yticks(range(len(names)), labels if axis is axes[0] else [], fontsize=7)
        axis.set_ylim(-1, len(names))
    for panel, axis in zip(study.PANELS, axes[3:], strict=True):
        panel(study, content, names, axis)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    write_whole(str(path), drawn.getvalue())
