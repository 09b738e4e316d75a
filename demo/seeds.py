"""The demo with several seeds, of videos, weights, masks and order, side by side; none is picked.

    python demo/seeds.py --out out/demo-seeds           three times as long as demo/run.py

Its settings were chosen on videos of seed 0, which stands in none of it. Seeds that are done are
kept, so it can be stopped at any time. Ends in a table and OUT/seeds.json.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config
from salt.files import write_whole

# ----------------------------------------------------------------------------------------- settings
out = "out/demo-seeds"  # folder for a demo a seed
seeds: list[int] = [1, 2, 3]  # of demo/run.py
short: bool = False  # demo/run.py --short
# -------------------------------------------------------------------------------------------------
config.apply(globals())

root = Path(__file__).resolve().parent
found = {}
for seed in seeds:
    path = Path(out) / str(seed) / "results.json"
    if not path.is_file():
        words = ["--seed", str(seed), "--out", str(path.parent), *["--short"] * short]
        code = subprocess.run([sys.executable, root / "run.py", *words]).returncode
        if not path.is_file():
            sys.exit(f"demo: seed {seed} failed with exit code {code}")
    found[seed] = json.loads(path.read_text())


def line(name, values):
    print(f"{name:64}" + "".join(f"{value:>10}" for value in values))


print()
line("seed", seeds)
for name in ("r2", "r2_background", "r2_lookup", "r2_over_best"):
    line(f"held-out {name}", [f"{row['evaluation'][name]:.3f}" for row in found.values()])
content = {}
for probe, sources in found[seeds[0]]["probes"].items():
    for source in sources:
        cells = [found[seed]["probes"][probe][source] for seed in seeds]
        values = [next(iter(cell.values())) for cell in cells]
        line(f"{probe}: {source}", [f"{value:.3f}" for value in values])
        content.setdefault(probe, {})[source] = values
    differences = [
        found[seed]["probes"][probe]["untrained"]["student minus this"] for seed in seeds
    ]
    marks = []
    for difference in differences:
        low, high = difference["ci95"] or (-1, 1)
        marks.append(f"{difference['value']:+.3f}" + ("*" if low > 0 or high < 0 else " "))
    line("  student minus untrained (*: its 95 % interval leaves out 0)", marks)
write_whole(Path(out) / "seeds.json", json.dumps(content, indent=1).encode())
print(f"written: {Path(out) / 'seeds.json'}")
