"""What the runs of studies share: videos of the demo's generator, latents of teachers, and how a
trained network is measured. All of it is made by the project's own scripts.
"""

import functools
import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation")
SEED = 0  # of the videos; the runs' own seeds are of weights, masks and order
VIDEOS = {"train": 1000, "validation": 300, "twins": 70, "seed": SEED}
MORE_VIDEOS = {"train": 4300, "validation": 1, "seed": SEED}  # of which 300 are left out
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
HELD_OUT = range(VIDEOS["train"], VIDEOS["train"] + VIDEOS["validation"])  # ids
making = threading.Lock()
TRAINING = {  # flags of train.py that all runs of studies start from
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
STAGE_1 = {**TRAINING, "target": "pixels"}  # a teacher of the videos' own pixels


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
    "net_new_videos": Latents(OF_NET, MORE_VIDEOS, training_alone=True),
    "net_two_blocks": Latents({**OF_NET, "teacher": "studies/teacher_two_blocks.py:tiny"}),
    "clips": Latents({**CLIPS, **VIEW}),
    "center": Latents({**CLIPS, "crop": "center"}),
    "pixels_50": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 50}),
    "pixels_150": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 150}),
    "pixels_500": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 500}),
    "pixels_2000": Latents({"dtype": "fp32"}, stage_1={**STAGE_1, "max_steps": 2000}),
}


OF_ONE_NET = "net", "net_views4", "net_views16", "net_new_videos"


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


class World:
    """What is made once and kept in OUT/world, and how a run's network is measured.

    out   folder
    call  call(folder, script, **flags) runs a script of the project
    seed  of the run, and of the teacher where it has one of its own
    """

    def __init__(self, out, call, seed):
        self.out = Path(out).resolve()
        self.call = call
        self.seed = seed

    def place(self, name, what):
        """OUT/world/NAME_DIGITS: of another recipe, another folder."""
        digits = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        return self.out / "world" / f"{name}_{digits}"

    def made(self, folder, last, make):
        """The folder, made where its `last` file is not there; one at a time."""
        if not (folder / last).exists():
            with making:
                if not (folder / last).exists():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    make()
        return folder

    def videos(self, flags=VIDEOS):
        """The folder of videos made by these flags. Other ones than VIDEOS have none of its
        held-out videos among their training videos.
        """
        folder = self.place("videos", flags)

        def make():
            self.call(folder.parent, "demo/make_videos.py", out=folder, **flags)
            if flags != VIDEOS:
                rows = json.loads((folder / "train.json").read_text())
                kept = [row for row in rows if int(row["id"]) not in HELD_OUT]
                (folder / "train.json").write_text(json.dumps(kept))
            (folder / "done").touch()

        return self.made(folder, "done", make)

    def teacher(self, name):
        """What cache_latents.py --teacher takes, of LATENTS[name]."""
        stage_1 = LATENTS[name].stage_1
        if not stage_1:
            return LATENTS[name].flags["teacher"]
        clips, flags = self.cache("clips", "train"), {**stage_1, "seed": self.seed}
        folder = self.place("teacher", [flags, recipe("clips")])

        def make():
            shutil.rmtree(folder, ignore_errors=True)
            folders = {"checkpoints": folder / "checkpoints", "run_logs": folder / "run_logs"}
            self.call(folder.parent, "train.py", cache=clips, run_name="run", **folders, **flags)
            (folder / "done").touch()

        self.made(folder, "done", make)
        return next(folder.glob("checkpoints/run_*/last.pth"))

    def cache(self, name, split):
        """The path of a cache of LATENTS[name]."""
        if split != "train" and LATENTS[name].training_alone:
            name = "net"
        flags, what = LATENTS[name].flags, recipe(name)
        if LATENTS[name].stage_1:
            clips = self.cache("clips", split)
            flags = {**flags, "teacher": self.teacher(name), "clips_from": clips}
            what = [what, recipe("clips"), self.seed]
        else:
            flags = {**flags, "data": self.videos(LATENTS[name].videos), "split": split}
        place = self.place(f"{name}_{split}", what)
        make = functools.partial(self.call, place.parent, "cache_latents.py", out=place, **flags)
        return self.made(place, "metadata.json", make)

    def needed(self, what):
        """The path of something in a Row's `needs`."""
        name = latents_of(what)
        return self.cache(name, "train") if name == what else self.teacher(name)

    def measured(self, checkpoint, row, folder):
        """{measure: {"value", "ci95"}} of a trained network, intervals over held-out videos or
        pairs: R2 on the held-out clips of the row's latents, and from the best dumb predictor; R2
        of the states of bodies by a linear head on 3x3 cells, from 30 and 300 labelled videos:
        their mean, that of where bodies are, of how fast they are, of how far they will go in a
        second; the share of pairs of which the impossible twin surprises more, under the run's own
        masks (of two families the first) and under `future`. With the row's controls the same of
        untrained networks; where it is a whole one, of its teacher, too, and accuracy at which
        action a video shows and at its direction of time.
        """
        measures = {}
        given, controls = self.teacher(row.latents), row.controls or row.whole
        how = {"checkpoint": checkpoint, "dtype": "fp32"}

        def probe(script, **flags):
            path = folder / f"{script}.json"
            seeds = {"seed": SEED, "untrained_seeds": 3 * controls}
            self.call(folder, f"{script}.py", out=path, threads=1, **how, **seeds, **flags)
            return json.loads(path.read_text())

        def take(table, column, measure, figure):
            """Of the student, and of what is to be measured beside it and stands in the table."""
            for source, prefix in SOURCES.items():
                if source == "student" or source in table and controls:
                    cell = table[source][column]
                    value = {"value": cell[figure], "ci95": cell["ci95"]}
                    measures.setdefault(prefix + measure, value)

        held_out, path = self.cache(row.latents, "validation"), folder / "eval.json"
        self.call(folder, "eval_distill.py", cache=held_out, out=path, **how)
        (own,) = json.loads(path.read_text())["results"]
        measures["R2"] = {"value": own["r2"], "ci95": own["r2_ci95"]}
        measures["R2 over the best dumb predictor"] = {"value": own["r2_over_best"]}
        beside = {"teacher": given} if row.whole else {}
        few = {"data": self.videos(), "train_videos": 300, "pixels": controls, **beside}
        states = probe(
            "probe_states", labels=[30, 300], draws=3, clips_a_video=1, heads="grid", **few
        )
        for labels in (30, 300):
            take(states["table"], f"grid, {labels}", f"states, {labels} labels", "R2")
            for source, prefix in SOURCES.items():
                if f"{prefix}states, {labels} labels" in measures:
                    values = states["R2_of_each_value"][source][f"grid, {labels}"]
                    for kind, names in KINDS.items():
                        mean = sum(values[value] for value in names) / len(names)
                        measures[f"{prefix}{kind}, {labels} labels"] = {"value": round(mean, 4)}
        surprise = probe("probe_surprise", data=self.videos() / "twins", teacher=given)["shares"]
        for kind in surprise["student"]:
            shares = {source: {"all": masks[kind]["all"]} for source, masks in surprise.items()}
            whose = "future" if kind == "future" else "own"
            take(shares, "all", f"surprise, {whose} masks", "share")
        if row.whole:
            take(probe("probe_labels", heads="grid", **few)["table"], "grid", "actions", "accuracy")
            few["train_videos"] = 1000
            table = probe("probe_time_arrow", heads="mean", **few)["table"]
            take(table, "mean", "direction of time", "accuracy")
        return measures


def recipe(name):
    """What a cache is made by."""
    return LATENTS[name]._asdict()


def latents_of(what):
    """The name in LATENTS of something in a Row's `needs`."""
    return what.removeprefix("teacher of ")


def comparable(study, name, other):
    """Whether R2 of two rows can stand side by side: latents, their space, its zero and what is
    hidden are the same, and both predictors are trained. Predictions of raw latents, layer-normed,
    are no predictions of layer-normed ones. Caches of one teacher count as the same latents: their
    zeros are means of 256 clips each.
    """
    rows = study.ROWS[name], study.ROWS[other]
    spaces = []
    for row in rows:
        flags = {**study.REFERENCE, **row.flags}
        latents = "net" if row.latents in OF_ONE_NET else row.latents
        spaces.append((flags["target_norm"], flags["masks"], latents))
    return spaces[0] == spaces[1] and all(row.predicts for row in rows)
