"""What answers allow one to say: accuracy or R2 with intervals by video, and which differences are
more than chance.
"""

import numpy as np

from salt.score import interval, show_interval


class Score:
    """Per-video figures of answers, whose .value is an accuracy or the mean R2 of K values.

    said, y   classes int [m], or values float [m, K]; y is nan where a value is missing
    videos    int [m]
    constant  float [K]: what R2 starts from, and what is said where `said` is nan
    .each     float [K]: R2 of each value, nan of one that does not vary
    """

    def __init__(self, said, y, videos, constant=None):
        _, unit = np.unique(videos, return_inverse=True)
        self.is_class = np.issubdtype(y.dtype, np.integer)
        if self.is_class:
            right = np.bincount(unit, said == y) / np.bincount(unit)
            self.columns = (right,)
        else:
            said = np.where(np.isnan(said), constant, said)
            squared, spread = np.nan_to_num((y - said) ** 2), np.nan_to_num((y - constant) ** 2)
            keep = spread.sum(0) > 0  # of [m, K]
            scale = spread[:, keep].sum(0)
            self.each = np.full(len(keep), np.nan)
            self.each[keep] = 1 - squared[:, keep].sum(0) / scale
            # of the mean R2: every value counts alike
            self.columns = tuple(
                np.bincount(unit, (part[:, keep] / scale).mean(1)) for part in (squared, spread)
            )
        self.value = float(self.of(*self.columns, axis=0))

    def of(self, *columns, axis=0):
        if self.is_class:
            return columns[0].mean(axis)
        return 1 - columns[0].sum(axis) / columns[1].sum(axis)

    def interval(self):
        return interval(self.of, *self.columns)

    def minus(self, other):
        """(difference to another's, its interval by video), of answers on the same clips."""
        count = len(self.columns)

        def difference(*columns, axis=0):
            return self.of(*columns[:count], axis=axis) - self.of(*columns[count:], axis=axis)

        columns = (*self.columns, *other.columns)
        return float(difference(*columns)), interval(difference, *columns)


def mean_score(scores):
    """The Score whose figures are the means of several, of answers on the same clips."""
    made = object.__new__(Score)
    made.is_class = scores[0].is_class
    made.columns = tuple(np.mean(columns, axis=0) for columns in zip(*(s.columns for s in scores)))
    if not made.is_class:
        made.each = np.mean([s.each for s in scores], axis=0)
    made.value = float(made.of(*made.columns))
    return made


def verdict(name, score, other_name, other):
    """What the difference of two Scores allows one to say, see `sentence`."""
    return sentence(name, other_name, *score.minus(other))


def sentence(name, other_name, value, ends):
    """What a difference and its interval allow one to say."""
    what = "does not differ from"
    if ends is None:
        what = "cannot, by one video or answers all alike, be compared with"
    elif ends[0] > 0:
        what = "beats"
    elif ends[1] < 0:
        what = "is worse than"
    return f"{name} {what} {other_name}: {value:+.3f} {show_interval(ends, '+.3f')}"
