"""What the runs of studies share: videos of the demo's generator, latents of teachers, and how a
trained network is measured. All of it is made by the project's own scripts.
"""

import hashlib
import json
import threading
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation")
SEED = 0  # of the videos; the runs' own seeds are of weights, masks and order
VIDEOS = {"train": 1000, "validation": 300, "twins": 70, "seed": SEED}
NET = "examples/teacher_efficientnet.py:tiny"  # ImageNet's, block 10: 112 channels, 7x7 a frame

# cache_latents.py's flags by the name of a cache; of training clips alone where it says so
CACHES = {
    "net": {"teacher": NET, "crop": "squash", "clips": "on"},
    "net_views4": {"teacher": NET, "crop": "squash", "clips": "on", "views": 4},
    "net_views16": {"teacher": NET, "crop": "squash", "clips": "on", "views": 16},
    "center": {"teacher": "none", "crop": "center", "frames": 8, "resolution": 112},
}
TRAINING_ALONE = {"net_views4", "net_views16"}  # held out on the plain view of "net"
making = threading.Lock()


class Row(NamedTuple):
    """A row of a study: one change away from its reference."""

    says: str  # what is expected of it, written before its first run
    flags: dict = {}  # of train.py
    latents: str = "net"  # the cache that it is trained on
    patches: list = []  # [(old, new)] of train.py's lines: what the product must not offer
    needs: list = []  # caches of training clips that a patch reads
    against: str = "reference"  # the row it is one change away from
    controls: bool = False  # also measure untrained networks of its shape


def recipe(name):
    """What a cache is made by."""
    return {"videos": VIDEOS, **CACHES[name]}


def named(name, what):
    """NAME_DIGITS: of another recipe, another folder."""
    return f"{name}_{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]}"


def videos(out, call):
    """The folder of the videos, made where it is not there."""
    folder = Path(out) / "world" / named("videos", VIDEOS)
    if not (folder / "done").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        call(folder.parent, "demo/make_videos.py", out=folder, **VIDEOS)
        (folder / "done").touch()
    return folder


def made(name, split, out, call):
    """The path of a cache, made where it is not there; one at a time."""
    with making:
        if split != "train" and name in TRAINING_ALONE:
            name = "net"
        data = videos(out, call)
        folder = data.parent / named(f"{name}_{split}", recipe(name))
        if not (folder / "metadata.json").exists():
            call(
                data.parent, "cache_latents.py", data=data, split=split, out=folder, **CACHES[name]
            )
        return folder


def has_the_space_of(reference, flags, latents):
    """Whether R2 of a run can stand beside the reference's: latents, their space, its zero and what
    is hidden are the same. Predictions of raw latents, layer-normed, are no predictions of
    layer-normed ones.
    """
    same = all(flags[key] == reference[key] for key in ("target_norm", "masks"))
    return same and latents == "net"


def measured(checkpoint, cache, folder, out, call, controls):
    """{measure: {"value", "ci95"}} of a trained network, intervals over held-out videos or pairs:
    R2, and R2 from the best dumb predictor, where there is a cache to measure it on; R2 of the
    states of bodies by a linear head on 3x3 cells, from 30 and 300 labelled videos; the share of
    pairs of which the impossible twin surprises more, under the run's own masks (of two families
    the first) and under `future`. With controls the same of untrained networks.
    """
    found = {}
    if cache:
        call(
            folder,
            "eval_distill.py",
            checkpoint=checkpoint,
            cache=cache,
            dtype="fp32",
            out=folder / "eval.json",
        )
        (own,) = json.loads((folder / "eval.json").read_text())["results"]
        found["R2"] = {"value": own["r2"], "ci95": own["r2_ci95"]}
        found["R2 over the best dumb predictor"] = {"value": own["r2_over_best"]}
    data = videos(out, call)
    how = {"checkpoint": checkpoint, "dtype": "fp32", "untrained_seeds": 3 * controls, "seed": SEED}
    call(
        folder,
        "probe_states.py",
        data=data,
        train_videos=300,
        labels=[30, 300],
        draws=3,
        heads="grid",
        clips_a_video=1,
        pixels=controls,
        threads=1,
        out=folder / "states.json",
        **how,
    )
    call(
        folder,
        "probe_surprise.py",
        data=data / "twins",
        teacher=NET,
        threads=1,
        out=folder / "surprise.json",
        **how,
    )
    states, surprise = (
        json.loads((folder / f"{part}.json").read_text()) for part in ("states", "surprise")
    )
    sources = (
        {"student": "", "untrained, mean of 3": "untrained: "} if controls else {"student": ""}
    )
    for source, prefix in sources.items():
        for column, cell in states["table"][source].items():
            measure = f"{prefix}states, {column.split(', ')[1]} labels"
            found[measure] = {"value": cell["R2"], "ci95": cell["ci95"]}
        for kind, of_groups in surprise["shares"][source].items():
            measure = f"{prefix}surprise, {kind if kind == 'future' else 'own'} masks"
            cell = of_groups["all"]
            found.setdefault(measure, {"value": cell["share"], "ci95": cell["ci95"]})
    return found
