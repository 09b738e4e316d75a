"""Study 3: does the held-out R2 that training shows predict of what use an encoder is? Over all
runs of studies 1 and 2; nothing is trained.

    python studies/use.py                studies/use.json and use.png, from stall.json, compute.json

Hypotheses, fixed when 12 runs of seed 1 were there: within one teacher's latents and one space the
rank correlation (Spearman's) of R2 and the states of bodies from 300 labelled videos is positive,
but below the .95 - .98 that the paper has (arXiv 2509.24317); across spaces and teachers it is
nothing; with surprise it is nothing. A correlation's 95 % interval is by bootstrap over rows, all
seeds of a row together, since these are no independent runs.
"""

import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from salt import config
from salt.errors import InputError
from salt.files import write_whole

# ----------------------------------------------------------------------------------------- settings
results = "studies"  # folder of stall.json and compute.json, and of use.json
draws: int = 2000  # of rows, for an interval
# -------------------------------------------------------------------------------------------------
config.apply(globals(), least={"draws": 100})

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import rankdata

from studies import compute, report, stall, world

PROBES = (
    "states, 30 labels",
    "states, 300 labels",
    "positions, 30 labels",
    "positions, 300 labels",
    "surprise, own masks",
    "surprise, future masks",
)
files = {
    rows: Path(results) / f"{rows.__name__.rpartition('.')[2]}.json" for rows in (stall, compute)
}
found = {rows: json.loads(path.read_text()) for rows, path in files.items() if path.is_file()}
if not found:
    raise InputError(f"{results} has no results of studies 1 and 2; studies/run.py makes them")
# {(digest, seed): (R2, whether the reference's latents and space, weight at the context, measures)}
runs = {}
for rows, content in found.items():
    for row in rows.ROWS:
        for seed, entry in report.trained(content["runs"], row).items():
            values = {key: x["value"] for key, x in entry["measures"].items()}
            context = {**rows.REFERENCE, **entry["flags"]}["context_loss"]
            one_space = world.comparable(rows, row, "reference")
            if rows.ROWS[row].predicts:
                runs[entry["of"], seed] = values["R2"], one_space, context > 0, values
GROUPS = {
    "one teacher, one space": [key for key, (_, one_space, _, _) in runs.items() if one_space],
    "and a loss at visible tokens": [key for key, x in runs.items() if x[1] and x[2]],
    "all teachers and spaces": list(runs),
}


def correlation(keys, probe):
    """(Spearman's coefficient of R2 and a probe over runs, its 95 % interval)."""
    rows = sorted({of for of, _ in keys})
    pairs = {
        row: [(runs[key][0], runs[key][3][probe]) for key in keys if key[0] == row] for row in rows
    }
    random = np.random.default_rng(0)

    def of(chosen):
        ranks = rankdata([pair for row in chosen for pair in pairs[row]], axis=0)
        return np.corrcoef(ranks.T)[0, 1]

    with np.errstate(invalid="ignore"):  # one row alone, drawn again and again
        drawn = [of(random.choice(rows, len(rows))) for _ in range(draws)]
    found = [of(rows), *np.nanpercentile(drawn, [2.5, 97.5])]
    return [round(float(figure), 3) for figure in found]


table = {}
print("| runs | rows, runs | " + " | ".join(PROBES) + " |")
print("|---|---|" + "---|" * len(PROBES))
for group, keys in GROUPS.items():
    rows = len({of for of, _ in keys})
    if rows < 5:
        continue
    table[group] = {probe: correlation(keys, probe) for probe in PROBES}
    cells = [f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]" for rho, low, high in table[group].values()]
    print(f"| {group} | {rows}, {len(keys)} | " + " | ".join(cells) + " |")
    table[group] |= {"rows": rows, "runs": len(keys)}
figure, axes = plt.subplots(1, 3, figsize=(13, 4))
for axis, probe in zip(axes, ("states, 300 labels", "positions, 30 labels", PROBES[-1])):
    for label, wanted in (("with a loss at visible tokens", True), ("without", False)):
        points = [(x[0], x[3][probe]) for x in runs.values() if x[1] and x[2] == wanted]
        if points:
            axis.plot(*zip(*points), "o", markersize=4, label=label)
    axis.set_xlabel("held-out R2, one teacher, one space")
    axis.set_ylabel(probe)
axes[0].legend(fontsize=8)
figure.tight_layout()
drawn = io.BytesIO()
figure.savefig(drawn, format="png", dpi=110)
write_whole(str(Path(results) / "use.png"), drawn.getvalue())
write_whole(str(Path(results) / "use.json"), (json.dumps(table, indent=1) + "\n").encode())
