"""A run as all its ranks have it: what it goes on from, what it saves, how it ends."""

import functools
import glob
import json
import os
from typing import Any

import torch

from salt import ops, ranks
from salt.cache_format import agree_on
from salt.checkpoint import load_checkpoint, save_checkpoint
from salt.errors import InputError
from salt.ranks import rank
from salt.run_folder import RunFolder
from salt.runs import lines_of, named
from salt.views import View


class Run:
    """A run as all its ranks have it: .folder, .name, and .saved, the content of the checkpoint at
    .origin that it goes on from, or None.

    s, log      train.py's settings, journal.Log
    worst       -inf where best.pth is the highest figure, inf where it is the lowest
    may_change  names of those settings that need not be what they were on --resume
    Raises InputError where there is nothing to go on from, or it was another run than is asked for.
    """

    def __init__(self, s, log, may_change, worst):
        self.s = s
        self.log = log
        self.may_change = may_change
        self.best = worst
        self.mine: Any = None  # rank 0's RunFolder
        self.saved: Any = None
        self.failures = set()
        self.folder, self.origin, self.in_place = ranks.from_rank_0(self.open)
        self.name = os.path.basename(self.folder)
        if self.origin:
            self.saved = self.mine.take_content() if self.mine else load_checkpoint(self.origin)
        kept = self.saved or {}
        self.step = kept.get("step", 0)
        self.history = kept.get("history", [])  # held-out evaluations
        self.losses = kept["losses"].tolist() if "losses" in kept else []  # of all steps that
        self.pending = list(kept.get("pending", ()))  # lines have told, and of those since
        log(f"folder {self.folder}")
        if self.in_place and not named([self.name], s.run_name):
            log(
                f"this start goes on with the run {self.name}, by whose name it is found;"
                f" --run_name {s.run_name} names its log alone"
            )

    def open(self):
        """Rank 0's part: (folder, checkpoint to go on from or None, whether that is in it)."""
        s = self.s
        # a rank that was cut off may take a while to be seen as dead
        wait = 120 if ranks.restarts else 0
        self.mine = RunFolder(
            s.checkpoints, s.run_logs, s.run_name, self.log.start, s.resume, self.log, wait
        )
        return self.mine.folder, self.mine.path, self.mine.goes_on_in_place

    def path(self, name):
        return os.path.join(self.folder, name)

    def check(self, view, identity):
        """Raises InputError where the checkpoint is of other clips, another teacher or settings."""
        saved, origin = self.saved, self.origin
        if not saved:
            return
        if self.s.ema and "ema" not in saved:
            raise InputError(
                f"--resume {origin} was trained without --ema; leave it out, or start a new run"
            )
        needed = ("optimizer", "rng", "losses", "history", "best", "stats")
        missing = [name for name in needed if name not in saved]
        if missing:
            raise InputError(f"--resume {origin} holds no {', '.join(missing)}; give a last.pth")
        difference = view.difference(View.from_dict(saved["view"]))
        if difference:
            raise InputError(f"--resume {origin} was trained under another view: {difference}")
        for name, what in OTHER_RUN.items():
            if not agree_on(saved["identity"][name], identity[name]):
                raise InputError(
                    f"--resume {origin} was trained with {what}; give the same, or start a new run"
                )
        for name, value in self.s.items():
            before = saved["settings"].get(name, BEFORE.get(name, value))
            if name in self.may_change:
                continue
            if json.dumps(before) != json.dumps(value):
                raise InputError(
                    f"--resume {origin} was trained with --{name} {before}, not {value}; give the"
                    " same, or start a new run, with another --run_name if --resume is auto"
                )

    def restore(self, optimizer, place):
        """The optimiser's state and the random numbers, as they were."""
        saved, state = self.saved, self.saved["optimizer"]
        try:
            optimizer.load_state_dict(ranks.split_like(optimizer, state) if self.s.fsdp else state)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"--resume {self.origin} holds the optimiser state of another model ({error})"
            ) from None
        torch.set_rng_state(saved["rng"]["cpu"])
        if place.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], place)
        self.log(f"resumed {self.origin} at step {self.step}")
        here = self.last_bits(place)
        if not agree_on(saved.get("where"), here):
            self.log(
                f"it ran under {saved['where']} before, now under {here}: the same clips, masks and"
                " schedules, but the last bits may differ"
            )

    def last_bits(self, place):
        """What the last bits of a run depend on, beside its settings."""
        s = self.s
        return {
            "ranks": ranks.world,
            "threads": torch.get_num_threads(),
            "device": place.type,
            "torch": str(torch.__version__),
            "accumulate": s.accumulate,
            "fsdp": s.fsdp,
            "compile": s.compile,
            "cuda_graph": s.cuda_graph,
            "deterministic": s.deterministic,
            "kernels": {name: ops.EXTENSION[name] for name in ("devices", "simd", "bf16", "amx")},
        }

    def circumstances(self, meter, place):
        """What a checkpoint keeps to go on from, beside weights and moments."""
        cuda = torch.cuda.get_rng_state(place) if place.type == "cuda" else None
        return {
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "pending": meter.untold(),
            "where": self.last_bits(place),
        }

    def leave_if_finished(self, total_steps):
        """A script that asks for --resume auto again and again leaves nothing behind."""
        done = self.saved and self.s.resume == "auto" and self.saved["step"] == total_steps
        if not (done and os.path.isfile(self.path("best.pth"))):
            return
        if os.path.basename(self.origin) == "last.pth":
            self.remove_previous()  # of a kill at its very end
        self.log("that run has finished: nothing is left to do")
        self.log.status = "finished"
        ranks.leave()

    def begin(self, first_evaluation):
        """List this start in the folder, and let go of the checkpoint."""
        ranks.from_rank_0(lambda: self.mine.begin(self.log.path, self.step))
        if self.saved:
            worst, self.best = self.best, self.saved["best"]
            self.best = ranks.from_rank_0(lambda: self.best_so_far(worst, first_evaluation))
            self.saved = None  # its memory is wanted

    def best_so_far(self, worst, first_evaluation):
        """The figure of best.pth; or what it is at the start, where that file is damaged, or of a
        branch that was left.
        """
        path = self.path("best.pth")
        if self.step < first_evaluation and not os.path.isfile(path):
            return self.best
        try:
            found = load_checkpoint(path)
        except InputError as error:
            self.log(f"left behind: {error}; the next evaluation makes a new best.pth")
            return worst
        its = found.get("best", self.best)
        # of a later step than what is gone on from, or of another branch: it is the file that must
        # be beaten
        if its != self.best:
            self.log(
                f"best.pth is of step {found['step']}, its figure is {its:.6g}: the next better"
                " evaluation takes its place"
            )
        return its

    def keep_best(self, figure, better, state):
        """Save best.pth where `better` (max or min) prefers figure to all before."""
        if figure != self.best and better(figure, self.best) == figure:
            self.best = figure
            self.save("best.pth", state())

    def save(self, name, content):
        """content: of a checkpoint; with FSDP2 its tensors are gathered first, on every rank."""
        content = ranks.whole(content) if self.s.fsdp else content
        previous = self.path("previous.pth") if name == "last.pth" else None
        ranks.from_rank_0(lambda: save_checkpoint(self.path(name), content, previous))

    def failed(self, part, record, error):
        """Note a clip that could not be had, once; part: "training" or "held-out"."""
        if (part, record) in self.failures:
            return
        self.failures.add((part, record))
        self.log.from_any(f"skipped, {len(self.failures)} so far: {error}")
        name = f"failures-rank{rank}.jsonl" if rank else "failures.jsonl"
        with open(self.path(name), "a") as file:
            entry = {"part": part, "record": record, "reason": str(error)}
            file.write(json.dumps(entry) + "\n")

    def end(self, best, last):
        """best.pth and last.pth exist whenever a run has ended; lost clips are counted.

        best(), last(): the content of each, at the last step.
        """
        for name, state in (("best.pth", best), ("last.pth", last)):
            if not ranks.from_rank_0(functools.partial(os.path.isfile, self.path(name))):
                self.log(f"there is no {name}: the last step's weights take that name")
                self.save(name, state())
        self.remove_previous()
        ranks.gather(None)  # every rank has written its failures
        files = glob.glob(os.path.join(glob.escape(self.folder), "failures*.jsonl"))
        lines = {line.partition(', "reason"')[0] for path in files for line in lines_of(path)}
        if lines:
            self.log(
                f"{len(lines)} clips could not be had and were left out or replaced by their"
                f" neighbours: {self.folder}/failures*.jsonl"
            )

    def remove_previous(self):
        if rank == 0 and os.path.isfile(self.path("previous.pth")):
            os.remove(self.path("previous.pth"))


# what runs had from before there was a choice
BEFORE = {
    "context_loss": 0.0,
    "positions": "table",
    "targets": 1.0,
    "init_from": None,
    "predictor_attention": "all",
}
OTHER_RUN = {  # part of the identity: what was another
    "train": "other training clips (--cache, --data), of other ids, pixels or latents",
    "teacher": "another teacher",
    "held_out": "another --val_cache",
}
