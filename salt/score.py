"""How well predictions fit: the space of the targets, R2, and bootstrap intervals over videos."""

import dataclasses
import warnings

import numpy as np
import torch

from salt import ops
from salt.errors import InputError


@dataclasses.dataclass
class Space:
    """The space in which targets are compared: what normalise_target needs, and the per-position
    mean that R2 is measured from.

    target     'latents', or 'pixels': each patch to mean 0 and variance 1 (He et al. 2021, arXiv
               2111.06377)
    normalise  'none', 'layer_norm' or 'standardise'
    mean, rstd of the raw latents, float32 [N, D] (standardise); zero: the mean predictor [N, D] in
    the space itself
    """

    target: str
    normalise: str
    mean: torch.Tensor | None
    rstd: torch.Tensor | None
    zero: torch.Tensor

    def to(self, device):
        return Space(
            self.target,
            self.normalise,
            *(x if x is None else x.to(device) for x in (self.mean, self.rstd, self.zero)),
        )

    def raw_targets(self, patches, latents):
        """(y [B, N, D], how): the targets as they are stored, and the arguments by which
        ops.masked_mse takes them into this space.
        """
        if self.target == "pixels":
            return patches, {"normalise": "layer_norm"}
        return latents, {"normalise": self.normalise, "mean": self.mean, "rstd": self.rstd}

    def all_targets(self, patches, latents):
        """Targets of whole clips in this space, float32 [B, N, D]."""
        y, how = self.raw_targets(patches, latents)
        return ops.normalise_target(y, **how)

    def as_space(self, normalise, variance=None):
        """The Space of the same latents normalised otherwise, with its `zero`.

        variance: per position, of the raw latents of the training set, float32 [N, D]
        Returns None where this space does not decide the other.
        """
        if normalise == self.normalise:
            return self
        if (self.normalise, normalise) == ("standardise", "none"):
            return Space(self.target, "none", None, None, self.mean)
        if (self.normalise, normalise) == ("none", "standardise") and variance is not None:
            rstd = 1 / (variance.to(self.zero) + 1e-6).sqrt()
            return Space(self.target, normalise, self.zero, rstd, torch.zeros_like(self.zero))
        return None  # means of layer-normed latents do not follow from those of raw ones

    def agrees_with(self, other):
        """Whether two spaces give a latent the same values; each may have its own `zero`."""
        if self.normalise != other.normalise:
            return False
        if self.normalise != "standardise":
            return True
        return torch.equal(self.mean, other.mean) and torch.equal(self.rstd, other.rstd)

    def convert(self, prediction, index, to):
        """Predictions made in this space, none or standardise, as the space `to` has them.

        prediction [B, K, D] at positions index int64 [B, K] -> float32 [B, K, D]
        """
        raw = prediction.float()
        if self.normalise == "standardise":
            raw = raw / self.rstd[index] + self.mean[index]
        return ops.normalise_target(raw, to.normalise, index, to.mean, to.rstd)


def squared_errors(guess, y, index, how):
    """float64 [B]: squared errors of a guess [B, K, D] at targets index int64 [B, K] of clips,
    summed over each. y, how: Space.raw_targets of these.
    """
    _, errors = ops.masked_mse(guess, y, index, per_token=True, **how)  # [B, K], means over D
    return (errors.double().sum(1) * y.shape[2]).cpu().numpy()


@torch.no_grad()
def clip_errors(salt, space, batch, own=None, lookup=None):
    """Held-out errors of a loader.Batch in `space`.

    own      the space that salt predicts in, where that is another; none or standardise
    lookup   a lookup.Lookup, where there is one
    Returns {family: {'squared', 'spread', 'background', 'lookup', 'elements'}}, float64 [B] each:
    the squared error, summed over a clip's target elements, of the predictions, of the per-position
    mean, of the mean of the clip's own context targets and of look-up; how many elements those
    were.
    """
    training = salt.training
    salt.eval()
    predictions = salt(batch.patches, batch.masks)
    salt.train(training)
    y, how = space.raw_targets(batch.patches, batch.latents)
    looked_up = lookup.errors(batch, space) if lookup else {}
    found = {}
    for drawn in batch.masks:
        prediction, index = predictions[drawn.family], drawn.target
        if own:
            prediction = own.convert(prediction, index, space)
        context = ops.masked_gather(y, drawn.context)  # [B, Kc, D]
        context = ops.normalise_target(context, index=drawn.context, **how)
        background = context.mean(1, keepdim=True).expand(-1, index.shape[1], -1)
        guesses = {"squared": prediction, "spread": space.zero[index], "background": background}
        found[drawn.family] = {"elements": np.full(len(y), index.shape[1] * y.shape[2], np.float64)}
        for name, guess in guesses.items():
            found[drawn.family][name] = squared_errors(guess, y, index, how)
        if lookup:
            found[drawn.family]["lookup"] = looked_up[drawn.family]
    return found


def join_errors(parts):
    """The errors of many batches as those of one."""
    if not parts:
        raise InputError("there is no held-out clip to evaluate on")
    return {
        family: {name: np.concatenate([part[family][name] for part in parts]) for name in rows}
        for family, rows in parts[0].items()
    }


def mse(rows):
    """Mean squared error, averaged over families as the loss is."""
    return float(np.mean([row["squared"].sum() / row["elements"].sum() for row in rows]))


def r2(rows, name="squared", over="spread"):
    """R2 of errors of some families: 1 - sum of `name` / sum of `over`, by default those of the
    per-position mean.
    """
    return float(1 - sum(row[name].sum() for row in rows) / sum(row[over].sum() for row in rows))


DUMB = {  # name of its errors: a predictor that learns nothing
    "spread": "the per-position mean",
    "background": "the mean of the clip's own context",
    "lookup": "look-up among training clips",
}


def best_dumb(rows):
    """Which of DUMB, as far as they were measured, errs least over some families."""
    rows = list(rows)
    sums = {name: sum(row[name].sum() for row in rows) for name in DUMB if name in rows[0]}
    return min(sums, key=lambda name: sums[name])


def figures(rows):
    """{'mse', 'r2', 'r2_background', 'r2_lookup', 'best_dumb', 'r2_over_best'} of errors of some
    families: R2 of predictions, context's mean and look-up (None: not measured); the best of DUMB,
    and R2 of the predictions measured from it.
    """
    best = best_dumb(rows)
    return {
        "mse": mse(rows),
        "r2": r2(rows),
        "r2_background": r2(rows, "background"),
        "r2_lookup": r2(rows, "lookup") if "lookup" in rows[0] else None,
        "best_dumb": best,
        "r2_over_best": r2(rows, over=best),
    }


def r2_interval(rows, videos, over="spread"):
    """95 % interval of r2(rows, over=over) over videos: clips of one, which are alike, are drawn
    together.

    videos: the video id of each clip, [B]. Returns what `interval` does.
    """
    _, unit = np.unique(videos, return_inverse=True)
    squared = np.bincount(unit, sum(row["squared"] for row in rows))  # [V]
    spread = np.bincount(unit, sum(row[over] for row in rows))

    def ratio(squared, spread, axis):
        return 1 - squared.sum(axis) / spread.sum(axis)

    return interval(ratio, squared, spread)


def interval(statistic, *columns):
    """95 % bootstrap interval [low, high] of statistic(*columns, axis=...), over units.

    columns: float64 [V] each, an entry a unit; a unit is a video, never a clip. BCa (Efron 1987),
    not percentiles, which cover less where a few videos are much worse (tests/test_score.py). It
    takes V^2 additions: 7 s and 0.1 GB at 25,000 videos on one core.
    Returns None where there is none: of one unit, or of units that are all alike.
    """
    from scipy import stats

    count = len(columns[0])
    if count < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of units that are alike: no interval
        found = stats.bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=2000,
            method="BCa",
            rng=0,
            batch=max(1, 2**22 // count),
        )
    ends = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return ends if np.isfinite(ends).all() else None


def show_interval(ends, form=".3f"):
    """'[0.123, 0.456]', or '-' where there is none."""
    return "-" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def target_space(s, work, whole_batches, log):
    """(the Space of a run's targets, {'mean', 'variance': float32 [N, D], 'count'} of raw ones).

    s, work        train.py's settings and its task.Task, whose cached latents have statistics
    whole_batches  (records) -> a loader.Batch of all rows of these, one after another: where there
                   are no statistics, some training clips from all over the list give them
    """
    stats = work.stats and {name: torch.as_tensor(value) for name, value in work.stats.items()}
    measured = stats
    if not stats or s.target_norm == "layer_norm":
        measured = measure(s, len(work.clips), whole_batches, log)
    zero = measured["mean"]
    mean = None
    rstd = None
    if s.target_norm == "standardise":
        mean, rstd = zero, 1 / (measured["variance"] + 1e-6).sqrt()
        zero = torch.zeros_like(mean)
    return Space(s.target, s.target_norm, mean, rstd, zero), stats or measured


def measure(s, n, whole_batches, log):
    """Per-position mean and variance of targets over stats_clips of n clips, before standardising.

    Raises InputError where none of them can be decoded.
    """
    count = min(s.stats_clips, n)
    log(f"R2's per-position mean: from {count} training clips")
    normalise = "none" if s.target_norm == "standardise" else s.target_norm
    space = Space(s.target, normalise, None, None, torch.zeros(()))
    seen, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in whole_batches([i * n // count for i in range(count)]):
        y = space.all_targets(batch.patches, batch.latents).double()
        seen += len(y)
        total = total + y.sum(0).cpu()
        squares = squares + y.square().sum(0).cpu()
    if not seen:
        raise InputError(
            f"none of {count} training videos could be decoded; check --data with `python"
            " cache_latents.py --teacher none`, which lists the reasons"
        )
    if seen < count:
        log(f"R2's per-position mean: {count - seen} of these could not be decoded")
    mean = total / seen
    variance = (squares / seen - mean.square()).clamp(min=0)
    return {"mean": mean.float(), "variance": variance.float(), "count": torch.tensor(seen)}


def evaluation(step, parts, measured_on):
    """What metrics.jsonl and a checkpoint's history keep of a held-out evaluation.

    parts: of each batch, clip_errors of the network and, with --ema, of its moving average
    """
    of_training = measured_on != "held-out"
    entry = {"step": step} | ({"val_videos": measured_on} if of_training else {})
    for i, suffix in enumerate(("", "_ema")[: len(parts[0]) if parts else 1]):
        rows = list(join_errors([part[i] for part in parts]).values())
        found = figures(rows)
        entry[f"val_r2{suffix}"] = found["r2"]
        entry[f"val_mse{suffix}"] = found["mse"]
        entry[f"val_r2_over_best{suffix}"] = found["r2_over_best"]
    entry["val_r2_background"] = found["r2_background"]
    if found["r2_lookup"] is not None:
        entry["val_r2_lookup"] = found["r2_lookup"]
    entry["val_best_dumb"] = found["best_dumb"]
    entry["val_clips"] = len(rows[0]["squared"])
    return entry


def evaluation_line(entry, asked):
    """The log's line on an evaluation; asked: how many clips it was to have."""
    of_all = f" over {entry['val_clips']} of {asked} clips" * (entry["val_clips"] < asked)
    averaged = ""
    if "val_r2_ema" in entry:
        averaged = f"; moving average of the weights: R2 {entry['val_r2_ema']:.4f}"
    looked_up = ""
    if "val_r2_lookup" in entry:
        looked_up = f"; look-up: R2 {entry['val_r2_lookup']:.4f}"
    return (
        f"step {entry['step']} {entry.get('val_videos', 'held-out')} R2 {entry['val_r2']:.4f} mse"
        f" {entry['val_mse']:.5f}{of_all} (mean of the clip's own context: R2"
        f" {entry['val_r2_background']:.4f}{looked_up}; from the best of these: R2"
        f" {entry['val_r2_over_best']:.4f}{averaged})"
    )
