"""Violation of expectation: pairs of videos that are the same up to an event half-way, which in one
of the two breaks a law; and how wrong a predictor is of the masked parts of each.
"""

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat

from salt import ops
from salt.containers import frame_count
from salt.errors import InputError, VideoError
from salt.masks import Masks, sample_masks
from salt.verdict import Score
from salt.video import read_clip
from salt.views import sample_id

# Context: the first half of the time slices; target: the rest. Evaluation's alone: nothing is
# trained on it, so it stands in no masks.FAMILIES.
FUTURE = "future"
SIDES = ("possible", "impossible")
ROUNDING = 1e-6  # surprises that differ by less, as a share, are a tie
LAWS = "all"  # name of the group of pairs in which a law is broken


# ---- pairs
@dataclasses.dataclass(frozen=True)
class Pair:
    """A row of twins.json, as demo/make_videos.py describes it."""

    id: str
    possible: str
    impossible: str
    event: str
    event_frame: int
    reveal_frame: int
    occluded: bool
    control: bool

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind: Any = field.type
            if type(value) is not kind:
                raise ValueError(f"{field.name} is {value!r}, not {kind.__name__}")
        for path in (self.possible, self.impossible):
            if os.path.isabs(path) or os.path.normpath(path).startswith(".."):
                raise ValueError(f"{path} leaves the folder")

    @property
    def middle(self):
        """The frame that its clips are centred on: the first that may differ to the eye."""
        return self.reveal_frame if self.occluded else self.event_frame


def load_pairs(folder):
    """[Pair] of the twins.json in a folder. Raises InputError where it is no good."""
    path = os.path.join(folder, "twins.json")
    names = [field.name for field in dataclasses.fields(Pair)]
    try:
        with open(path, encoding="utf-8") as file:
            pairs = [Pair(**{name: row[name] for name in names}) for row in json.load(file)]
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no twins.json; `python demo/make_videos.py --out DIR --twins 70` makes"
            " a folder of twins, DIR/twins"
        ) from None
    except KeyError as error:
        raise InputError(f"{path}: a row has no field {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as pairs of videos: {error}") from None
    ids = {pair.id for pair in pairs}
    if not pairs or len(ids) < len(pairs):
        raise InputError(f"{path} has {len(pairs)} pairs of {len(ids)} ids; each needs its own")
    return pairs


def window_about(pair, n):
    """The window, fractions of n frames, that is the widest with pair.middle at its centre: half of
    a clip's frames are before it, with either sampling.

    Raises VideoError where there is none, or where it starts only after the event: what went behind
    the panel was then never seen, and what comes out is no surprise.
    """
    half = min(pair.middle, n - pair.middle)
    if half < 1:
        raise VideoError(f"pair {pair.id!r}: frame {pair.middle} has none of {n} on either side")
    first, last = pair.middle - half, pair.middle + half
    if first >= pair.event_frame:
        raise VideoError(
            f"pair {pair.id!r}: a clip about frame {pair.middle} of {n} starts only at"
            f" {first}, when the event, at {pair.event_frame}, is over"
        )
    return ((first + 0.25) / n, (last - 0.25) / n)


def read_pair(pair, folder, view):
    """(uint8 [2, T, H, W, 3], window): clips of the possible and the impossible video, cut by
    `view` out of the same window, without jitter. Raises VideoError.
    """
    paths = [os.path.join(folder, getattr(pair, side)) for side in SIDES]
    for path in paths:
        if not os.path.isfile(path):
            raise VideoError(f"{path} is not there, or is no regular file")
    counts = [frame_count(path) for path in paths]
    if counts[0] != counts[1]:
        raise VideoError(f"pair {pair.id!r}: {counts[0]} frames against {counts[1]}")
    window = window_about(pair, counts[0])
    view = dataclasses.replace(view, window=window, view=0)
    return np.stack([read_clip(path, view, pair.id) for path in paths]), window


# ---- masks
def future_masks(count, grid, family, device="cpu"):
    """Masks of `count` clips whose context is the first half of the time slices of a `grid`
    (time, height, width), rounded down, and whose target is the rest.

    family  of a predictor, whose mask token is to stand for what is asked
    Raises InputError where there is one slice alone.
    """
    if grid[0] < 2:
        raise InputError(f"a clip of {grid[0]} slice of time has no future; it takes two")
    tokens = torch.arange(math.prod(grid), device=device).expand(count, -1)
    context = grid[0] // 2 * grid[1] * grid[2]
    return Masks(tokens[:, :context].contiguous(), tokens[:, context:].contiguous(), family)


def draw_passes(pair_ids, families, draws, seed, grid, device="cpu"):
    """[([Masks], [kind])]: what goes through a predictor together, the twins of a pair next to each
    other and under the same masks.

    `draws` masks of each family, and `future` once with the mask token of each.
    """
    ids = torch.tensor([sample_id(name) for name in pair_ids for _ in SIDES])
    passes = []
    for draw in range(draws):
        masks = [sample_masks(ids.to(device), draw, seed, family, grid) for family in families]
        passes.append((masks, families))
    ahead = [future_masks(len(ids), grid, family, device) for family in families]
    return [*passes, (ahead, [FUTURE] * len(families))]


# ---- predictors: (loader.Batch) -> [errors float [B, Kt] of each of its masks' targets]
def network(salt, space, own=None):
    """A Salt, or another function of (patches, masks), whose errors are measured in score.Space
    `space`; own: the one that it predicts in, where that is another.
    """

    def errors(batch):
        predictions = salt(batch.patches, batch.masks)
        guesses = [predictions[drawn.family] for drawn in batch.masks]
        if own:
            pairs = zip(guesses, batch.masks)
            guesses = [own.convert(guess, drawn.target, space) for guess, drawn in pairs]
        return errors_of(guesses, batch, space)

    return errors


def mean_of_context(space):
    """Says of each target the mean of the clip's own context targets."""

    def errors(batch):
        y, how = space.raw_targets(batch.patches, batch.latents)
        guesses = []
        for drawn in batch.masks:
            context = ops.masked_gather(y, drawn.context)  # [B, Kc, D]
            context = ops.normalise_target(context, index=drawn.context, **how)
            mean = context.mean(1, keepdim=True)
            guesses.append(mean.expand(-1, drawn.target.shape[1], -1))
        return errors_of(guesses, batch, space)

    return errors


def mean_of_position(space):
    """Says of each target the mean of its position over the training set."""

    def errors(batch):
        return errors_of([space.zero[drawn.target] for drawn in batch.masks], batch, space)

    return errors


def errors_of(guesses, batch, space):
    y, how = space.raw_targets(batch.patches, batch.latents)
    return [
        ops.masked_mse(guess, y, drawn.target, per_token=True, **how)[1]
        for guess, drawn in zip(guesses, batch.masks)
    ]


def frame_difference(grid, tubelet):
    """Says of each frame the one before; pixels from 0 to 1. It looks at the targets alone."""

    def errors(batch):
        pixels = rearrange(
            batch.patches.float() / 255,
            "b (t s) (c dt p) -> b (t dt) s (c p)",
            t=grid[0],
            c=3,
            dt=tubelet,
        )
        steps = torch.zeros(pixels.shape[:3], device=pixels.device)  # 0 of the first frame
        steps[:, 1:] = (pixels[:, 1:] - pixels[:, :-1]).square().mean(-1)
        tokens = rearrange(steps, "b (t dt) s -> b (t s) dt", dt=tubelet).mean(-1)  # [B, N]
        return [tokens.gather(1, drawn.target) for drawn in batch.masks]

    return errors


# ---- surprise
@torch.no_grad()
def measure(predictors, batch, passes, slices):
    """{predictor: {kind: float64 [2, B, S]}}: of each clip's time slices, the errors of the target
    tokens, summed over the passes; and how many those were.

    Raises InputError where a predictor's errors are no numbers.
    """
    found = {name: {} for name in predictors}
    for masks, kinds in passes:
        batch = batch._replace(masks=masks)
        each = len(batch.patches[0]) // slices  # tokens a slice
        for name, errors_at in predictors.items():
            for drawn, kind, errors in zip(masks, kinds, errors_at(batch)):
                if not errors.isfinite().all():
                    raise InputError(
                        f"the errors of {name} are not finite: its weights, or the teacher's, are"
                        " damaged"
                    )
                both = torch.stack([errors.double(), torch.ones_like(errors).double()])  # [2, B, K]
                sums = both.new_zeros(2, len(errors), slices)
                sums.scatter_add_(2, repeat(drawn.target // each, "b k -> two b k", two=2), both)
                found[name][kind] = found[name].get(kind, 0) + sums.cpu().numpy()
    return found


def join(parts):
    """{predictor: {kind: float64 [2, pairs, 2, S]}} of what `measure` gave of many batches."""
    return {
        name: {
            kind: rearrange(
                np.concatenate([part[name][kind] for part in parts], axis=1),
                "what (pair side) s -> what pair side s",
                side=2,
            )
            for kind in kinds
        }
        for name, kinds in parts[0].items()
    }


class Share(Score):
    """In how many of some pairs the impossible video surprises more, and by how much.

    wins     float [P]: 1 where it does, 0 where the other does, 0.5 where they tie
    excess   float [P]: by how much more, as a share of the mean of both
    """

    def __init__(self, wins, excess):
        self.is_class = True
        self.columns = (wins,)
        self.value = float(wins.mean())
        self.excess = float(excess.mean())


def wins_of(surprise):
    """(wins, excess), float64 [P] each as Share takes them, of surprises [P, 2]."""
    possible, impossible = np.moveaxis(np.asarray(surprise, np.float64), -1, 0)
    mean = (possible + impossible) / 2
    excess = np.divide(impossible - possible, mean, out=np.zeros_like(mean), where=mean > 0)
    wins = np.where(np.abs(excess) <= ROUNDING, 0.5, excess > 0)
    return wins, excess


def groups_of(pairs):
    """{name: bool [P]}: which of [Pair] are of each group; those of LAWS break one."""
    lawful = np.array([pair.control for pair in pairs], bool)
    hidden = np.array([pair.occluded for pair in pairs], bool)
    groups = {LAWS: ~lawful, "in the open": ~lawful & ~hidden, "behind a panel": ~lawful & hidden}
    for pair in sorted(pairs, key=lambda pair: pair.control):
        name = f"control: {pair.event}" if pair.control else pair.event
        same = [(each.event, each.control) == (pair.event, pair.control) for each in pairs]
        groups.setdefault(name, np.array(same))
    return {name: chosen for name, chosen in groups.items() if chosen.any()}


def shares(found, groups):
    """{predictor: {kind: {group: Share}}} of what `join` gave; untrained networks of several seeds,
    'untrained 0' and so on, as their mean, by pair.
    """
    untrained = [name for name in found if name.startswith("untrained ")]
    sources = {name: [name] for name in found if name not in untrained}
    if untrained:
        sources[f"untrained, mean of {len(untrained)}"] = untrained
    made = {}
    for source, names in sources.items():
        made[source] = {}
        for kind in found[names[0]]:
            each = [wins_of(surprise_of(found[name][kind])) for name in names]
            wins, excess = np.mean(each, axis=0)
            made[source][kind] = {
                group: Share(wins[chosen], excess[chosen]) for group, chosen in groups.items()
            }
    return made


def surprise_of(sums):
    """Mean error [P, 2] of the targets of clips, of sums [2, P, 2, S] as `join` gives them."""
    return sums[0].sum(-1) / sums[1].sum(-1)


def to_dict(of_groups, students):
    """{group: figures} of {group: Share}, for a JSON file.

    students: {name: {group: Share}} whose differences to these stand in it
    """
    made = {}
    for group, share in of_groups.items():
        made[group] = {"share": share.value, "ci95": share.interval(), "excess": share.excess}
        made[group]["pairs"] = len(share.columns[0])
        for student, its in students.items():
            value, ends = its[group].minus(share)
            made[group][f"{student} minus this"] = {"value": value, "ci95": ends}
    return made
