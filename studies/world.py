"""What the runs of studies share: videos of the demo's generator, latents of teachers, and how a
trained network is measured. All of it is made by the project's own scripts.
"""

import functools
import hashlib
import json
import threading
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation")
SEED = 0  # of the videos; the runs' own seeds are of weights, masks and order
VIDEOS = {"train": 1000, "validation": 300, "twins": 70, "seed": SEED}
NET = "examples/teacher_efficientnet.py:tiny"  # ImageNet's, block 10: 112 channels, 7x7 a frame
VIEW = {"crop": "squash"}  # bodies at the sides are seen, too
OF_NET = {"teacher": NET, "clips": "on", **VIEW}
CLIPS = {"teacher": "none", "frames": 8, "resolution": 112}
COLOURS = "red", "green", "blue", "yellow"  # of bodies
KINDS = {  # of states, by the names that probe_states.py gives them
    "positions": [f"{colour} {value}" for colour in COLOURS for value in ("x", "y")],
    "velocities": [f"{colour} {value}" for colour in COLOURS for value in ("vx", "vy")],
    "displacements": [f"change of {colour} {value}" for colour in COLOURS for value in ("x", "y")],
}
SOURCES = {"student": "", "untrained, mean of 3": "untrained: ", "teacher": "teacher: "}
making = threading.Lock()
# stage 1 of the reference's student: a teacher of the videos' own pixels
STAGE_1 = {
    "target": "pixels",
    "size": "tiny",
    "depth": 4,
    "predictor_dim": 96,
    "predictor_depth": 2,
    "predictor_heads": 3,
    "masks": "ratio",
    "batch_size": 16,
    "lr": 2e-3,
    "weight_decay_end": 0.05,
    "grad_clip": 1.0,
    "dtype": "fp32",
    "save_every": 100000,
    "threads": 1,
}


class Latents(NamedTuple):
    """How a cache is made."""

    flags: dict  # of cache_latents.py
    videos: dict = VIDEOS  # flags of demo/make_videos.py
    stage_1: dict = {}  # of train.py, for a teacher of its own, made before
    training_alone: bool = False  # its runs are measured on "net"'s held-out clips


LATENTS = {
    "net": Latents(OF_NET),
    "net_views4": Latents({**OF_NET, "views": 4}, training_alone=True),
    "net_views16": Latents({**OF_NET, "views": 16}, training_alone=True),
    "net_new_videos": Latents(OF_NET, VIDEOS | {"train": 4000, "twins": 0}, training_alone=True),
    "net_two_blocks": Latents({**OF_NET, "teacher": "studies/teacher_two_blocks.py:tiny"}),
    "clips": Latents({**CLIPS, **VIEW}),
    "center": Latents({**CLIPS, "crop": "center"}),
    "pixels_50": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 50}),
    "pixels_150": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 150}),
    "pixels_500": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 500}),
    "pixels_2000": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 2000}),
}


class Row(NamedTuple):
    """A row of a study: one change away from its reference."""

    says: str  # what is expected of it, written before its first run
    flags: dict = {}  # of train.py
    latents: str = "net"  # what it is trained on
    patches: dict = {}  # {file: [(old, new)]} of the root's files: what the product must not offer
    needs: list = []  # what a patch reads as NEEDED: a training cache, `net`; `teacher of net`
    against: str = "reference"  # the row it is one change away from
    predicts: bool = True  # its predictor is trained: R2 can stand beside the reference's
    controls: bool = False  # also measure untrained networks of its shape
    whole: bool = False  # and its teacher, and by more probes: actions, direction of time


def recipe(name):
    """What a cache is made by."""
    return LATENTS[name]._asdict()


def folder_of(name, what, out):
    """OUT/world/NAME_DIGITS: of another recipe, another folder."""
    digits = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    return Path(out) / "world" / f"{name}_{digits}"


def made(folder, last, make):
    """The folder, made where its `last` file is not there; one at a time."""
    if not (folder / last).exists():
        with making:
            if not (folder / last).exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                make(folder)
    return folder


def videos(what, out, call):
    """The folder of videos made by these flags."""

    def make(folder):
        call(folder.parent, "demo/make_videos.py", out=folder, **what)
        (folder / "done").touch()

    return made(folder_of("videos", what, out), "done", make)


def teacher(name, out, call):
    """What cache_latents.py --teacher takes, of LATENTS[name]."""
    stage_1 = LATENTS[name].stage_1
    if not stage_1:
        return LATENTS[name].flags["teacher"]
    clips = cache("clips", "train", out, call)

    def make(folder):
        folders = {"checkpoints": folder / "checkpoints", "run_logs": folder / "run_logs"}
        call(folder.parent, "train.py", cache=clips, run_name="run", **folders, **stage_1)
        (folder / "done").touch()

    folder = made(folder_of("teacher", recipe(name), out), "done", make)
    return max(folder.glob("checkpoints/run_*/last.pth"))


def cache(name, split, out, call):
    """The path of a cache of LATENTS[name]."""
    if split != "train" and LATENTS[name].training_alone:
        name = "net"
    flags = {**LATENTS[name].flags, "split": split}
    if LATENTS[name].stage_1:
        flags["teacher"] = teacher(name, out, call)
        flags["clips_from"] = cache("clips", split, out, call)
    else:
        flags["data"] = videos(LATENTS[name].videos, out, call)
    place = folder_of(f"{name}_{split}", recipe(name), out)
    make = functools.partial(call, place.parent, "cache_latents.py", out=place, **flags)
    return made(place, "metadata.json", lambda folder: make())


def needed(what, out, call):
    """The path of something in a Row's `needs`."""
    name = latents_of(what)
    return cache(name, "train", out, call) if name == what else teacher(name, out, call)


def latents_of(what):
    return what.removeprefix("teacher of ")


def has_the_space_of(reference, flags, latents):
    """Whether R2 of a run can stand beside the reference's: latents, their space, its zero and what
    is hidden are the same. Predictions of raw latents, layer-normed, are no predictions of
    layer-normed ones.
    """
    same = all(flags[key] == reference[key] for key in ("target_norm", "masks"))
    return same and latents in ("net", "net_new_videos")


def measured(checkpoint, row, comparable, folder, out, call):
    """{measure: {"value", "ci95"}} of a trained network, intervals over held-out videos or pairs:
    R2 on the held-out clips of the row's latents, called own R2 where it is not comparable to the
    reference's, and R2 from the best dumb predictor; R2 of the states of bodies by a linear head
    on 3x3 cells, from 30 and 300 labelled videos: their mean, that of where bodies are, of how
    fast they are, of how far they will go in a second; the share of pairs of which the impossible
    twin surprises more, under the run's own masks (of two families the first) and under `future`.
    With the row's controls the same of untrained networks; where it is a whole one, of its teacher,
    too, and accuracy at which action a video shows and at its direction of time.
    """
    found = {}
    given, controls = teacher(row.latents, out, call), row.controls or row.whole
    how = {"dtype": "fp32", "threads": 1, "seed": SEED, "untrained_seeds": 3 * controls}

    def probe(script, **flags):
        path = folder / f"{script}.json"
        call(folder, f"{script}.py", checkpoint=checkpoint, out=path, **how, **flags)
        return json.loads(path.read_text())

    def take(table, column, measure, figure):
        """Of the student, and of what is to be measured beside it and stands in the table."""
        for source, prefix in SOURCES.items():
            if source == "student" or source in table and controls:
                cell = table[source][column]
                value = {"value": cell[figure], "ci95": cell["ci95"]}
                found.setdefault(prefix + measure, value)

    call(
        folder,
        "eval_distill.py",
        checkpoint=checkpoint,
        cache=cache(row.latents, "validation", out, call),
        dtype="fp32",
        out=folder / "eval.json",
    )
    (own,) = json.loads((folder / "eval.json").read_text())["results"]
    found["R2" if comparable else "own R2"] = {"value": own["r2"], "ci95": own["r2_ci95"]}
    found["R2 over the best dumb predictor"] = {"value": own["r2_over_best"]}
    data = videos(VIDEOS, out, call)
    beside = {"teacher": given} if row.whole else {}
    few = {"data": data, "train_videos": 300, "heads": "grid", "pixels": controls, **beside}
    states = probe("probe_states", labels=[30, 300], draws=3, clips_a_video=1, **few)
    for labels in (30, 300):
        take(states["table"], f"grid, {labels}", f"states, {labels} labels", "R2")
        values = states["R2_of_each_value"]
        for source, prefix in SOURCES.items():
            if f"{prefix}states, {labels} labels" in found:
                of_each = values[source][f"grid, {labels}"]
                for kind, names in KINDS.items():
                    mean = sum(of_each[value] for value in names) / len(names)
                    found[f"{prefix}{kind}, {labels} labels"] = {"value": round(mean, 4)}
    surprise = probe("probe_surprise", data=data / "twins", teacher=given)["shares"]
    for kind in surprise["student"]:
        shares = {source: {"all": of_masks[kind]["all"]} for source, of_masks in surprise.items()}
        take(shares, "all", f"surprise, {kind if kind == 'future' else 'own'} masks", "share")
    if row.whole:
        take(probe("probe_labels", **few)["table"], "grid", "actions", "accuracy")
        few |= {"train_videos": 1000, "heads": "mean"}
        take(probe("probe_time_arrow", **few)["table"], "mean", "direction of time", "accuracy")
    return found
