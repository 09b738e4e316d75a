"""What does a policy lose by features that look back alone (salt/stream.py), of an encoder that was
trained to look at all of a clip?

    python studies/causal.py A/last.pth B/last.pth ... --data DIR --out causal.json

Hypotheses, fixed before the first run: the newest tubelet's features are 10 - 40 % of their norm
from those that a whole clip gives it; what a linear head reads from them of where bodies are is
within .03 of R2, since its own frames hold it.

DIR: videos of demo/make_videos.py. A stream is twice as many frames as a clip has over a whole
video, so that the window has moved on at its end; a whole clip is its second half. The head, ridge
regression on the newest tubelet's tokens averaged to 3x3 cells, says the states of bodies at the
last frame; it is fitted on 300 videos and tested on 300. Mean over checkpoints, each of another
seed, with the 95 % interval of Student's t over them. (In a first run streams were a clip long,
with the same result: +.005 +- .015.)
"""

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config
from salt.errors import InputError

checkpoint: list[str] = []  # of train.py, each of another seed
data: str | None = None  # folder of videos with states.json
videos: int = 300  # to fit on, and to test on
out: str | None = None  # JSON file
settings = config.apply(globals(), positional="checkpoint", least={"videos": 10})
if not checkpoint or not data:
    raise InputError("give checkpoints and --data; see --help")

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from salt import encoders
from salt.containers import frame_count
from salt.splits import load_split
from salt.stream import StreamingEncoder, leak
from salt.video import read_clip
from salt.views import frame_numbers

known = json.loads((Path(data) / "states.json").read_text())
names = json.loads((Path(data) / "state_names.json").read_text())
places = [i for i, name in enumerate(names) if name.rpartition(" ")[2] in ("x", "y")]


def cells(tokens, grid):
    """A tubelet's tokens [h * w, D] averaged to 3x3 cells, in one vector."""
    laid_out = tokens.mT.unflatten(-1, grid[1:])
    return torch.nn.functional.adaptive_avg_pool2d(laid_out, 3).flatten()


def features(encoder, rows):
    """{kind: [videos, 9 D]}, states [videos, S], {kind: distance from the whole clip's}."""
    kinds = {
        "whole clip": None,
        "past kept": StreamingEncoder(encoder),
        "past kept, window of 2 frames": StreamingEncoder(encoder, window=encoder.config.tubelet),
    }
    found, states, far = {kind: [] for kind in kinds}, [], {kind: [] for kind in kinds}
    for row in tqdm(rows, unit="video", dynamic_ncols=True):
        longer = dataclasses.replace(encoder.view, frames=2 * encoder.config.frames)
        frames = read_clip(row.path, longer)
        clip = frames[encoder.config.frames :]
        last = frame_numbers(frame_count(row.path), longer)[-1]
        states.append([math.nan if x is None else x for x in known[row.id][last]])
        whole = encoder.encode(clip, pool="time")[-1]
        for kind, stream in kinds.items():
            made = whole
            if stream:
                stream.reset()
                made = [stream.push(frame) for frame in frames][-1]
            found[kind].append(cells(made, encoder.config.grid).numpy())
            far[kind].append(float((made - whole).norm() / whole.norm()))
    made = {kind: np.stack(each) for kind, each in found.items()}
    return made, np.array(states, float), {kind: statistics.mean(x) for kind, x in far.items()}


def r2_of_places(train, held_out):
    """Mean R2 over the places of bodies, each of the videos that have it."""
    (x, y), (x_test, y_test) = train, held_out
    found = []
    for i in places:
        a, b = ~np.isnan(y[:, i]), ~np.isnan(y_test[:, i])
        head = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13)))
        head.fit(x[a], y[a, i])
        error = np.mean((head.predict(x_test[b]) - y_test[b, i]) ** 2)
        found.append(1 - error / np.mean((y[a, i].mean() - y_test[b, i]) ** 2))
    return float(np.mean(found))


def with_interval(values):
    """(mean, half of the 95 % interval)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan
    spread = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread


rows = {split: load_split(data, split)[:videos] for split in ("train", "validation")}
runs = []
for path in checkpoint:
    encoder = encoders.load_encoder(path)
    train, states, _ = features(encoder, rows["train"])
    held_out, answers, far = features(encoder, rows["validation"])
    r2 = {k: r2_of_places((train[k], states), (held_out[k], answers)) for k in train}
    leaks = [leak(encoder, read_clip(row.path, encoder.view)) for row in rows["validation"][:50]]
    runs.append({"R2": r2, "distance": far, "leak": np.mean(leaks, axis=0).tolist()})
print("| newest tubelet's features by | from the whole clip's | places, R2 | difference |")
print("|---|---|---|---|")
for kind in runs[0]["R2"]:
    distance, _ = with_interval([run["distance"][kind] for run in runs])
    r2, _ = with_interval([run["R2"][kind] for run in runs])
    less, half = with_interval([run["R2"][kind] - run["R2"]["whole clip"] for run in runs])
    print(f"| {kind} | {distance:.0%} | {r2:.3f} | {less:+.3f} ± {half:.3f} |")
shares = [statistics.mean(run["leak"][i] for run in runs) for i in range(len(runs[0]["leak"]))]
print("changed by later frames, tubelet by tubelet:", ", ".join(f"{x:.0%}" for x in shares))
if out:
    content = {"checkpoints": len(checkpoint), "videos": videos, "runs": runs}
    Path(out).write_text(json.dumps(content, indent=1) + "\n")
