"""The interval of R2 and its coverage; predictions brought from one space of targets to another."""

import warnings

import numpy as np
import pytest
import torch

from salt.loader import Batch
from salt.masks import sample_masks
from salt.score import Space, clip_errors, interval, r2_interval, show_interval
from tests.test_model import make_salt


def few_bad_videos(random, videos, views):
    """Errors of clips, alike within a video, and their videos; a tenth is predicted badly."""
    spread = random.gamma(3, 1, videos)
    share = np.where(random.random(videos) < 0.1, 2.5, 0.3)
    spread, share, names = (np.repeat(x, views) for x in (spread, share, np.arange(videos)))
    clip = random.gamma(400, 1 / 400, videos * views)
    return {"squared": spread * share * clip, "spread": spread}, names


def percentiles(row, count, units):
    """The plain percentile interval, of `count` units drawn with replacement."""
    squared, spread = (np.bincount(units, row[name]) for name in ("squared", "spread"))
    drawn = np.random.default_rng(0).integers(0, count, (2000, count))
    return np.percentile(1 - squared[drawn].sum(1) / spread[drawn].sum(1), (2.5, 97.5))


def test_coverage_of_the_interval_of_r2():
    """200 evaluations of 60 videos, 6 clips each; drawing clips by themselves is far too sure."""
    random = np.random.default_rng(1)
    truth = 1 - (0.1 * 2.5 + 0.9 * 0.3)
    covered = {"videos, BCa": 0, "videos, percentiles": 0, "clips, percentiles": 0}
    widths = dict.fromkeys(covered, 0.0)
    for _ in range(200):
        row, videos = few_bad_videos(random, 60, 6)
        found = {
            "videos, BCa": r2_interval([row], videos),
            "videos, percentiles": percentiles(row, 60, videos),
            "clips, percentiles": percentiles(row, 360, np.arange(360)),
        }
        for name, (low, high) in found.items():
            covered[name] += low <= truth <= high
            widths[name] += high - low
    assert 0.93 <= covered["videos, BCa"] / 200 <= 0.98, covered
    assert covered["videos, percentiles"] < covered["videos, BCa"] - 4, covered
    assert covered["clips, percentiles"] / 200 < 0.6, covered
    assert widths["clips, percentiles"] < widths["videos, BCa"] / 2, widths


def test_clips_of_a_video_are_drawn_together():
    """Each video 16 times is the same evidence as once, whatever the names and the order."""
    random = np.random.default_rng(0)
    row, _ = few_bad_videos(random, 40, 1)
    names = np.array([f"v{number:02d}" for number in range(40)])
    once = r2_interval([row], names)
    order = random.permutation(640)
    many = {name: np.repeat(values, 16)[order] for name, values in row.items()}
    assert r2_interval([many], np.repeat(names, 16)[order]) == pytest.approx(once, rel=1e-9)
    alone = r2_interval([many], np.arange(640))
    assert alone[1] - alone[0] < 0.5 * (once[1] - once[0])


def test_the_interval_of_a_mean_is_near_the_normal_one():
    random = np.random.default_rng(0)
    values = random.normal(2, 3, 900)
    low, high = interval(np.mean, values)
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * 0.1, values.mean() + 1.96 * 0.1), abs=0.02
    )


@pytest.mark.parametrize(
    "columns", [([0.5],), ([1.0] * 9,), ([1.0] * 9, [1.0] * 9), ([0.0] * 9, [0.0] * 9)]
)
def test_what_has_no_interval_says_so_without_warnings(columns, capfd):
    def ratio(first, second, axis):
        return first.sum(axis) / second.sum(axis)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = interval(np.mean if len(columns) == 1 else ratio, *map(np.array, columns))
    assert found is None and show_interval(found) == "-"
    assert capfd.readouterr() == ("", "")
    assert show_interval([0.25, 1], "+.2f") == "[+0.25, +1.00]"


# ------------------------------------------------------------------------------- spaces of targets


def in_numpy(latents, normalise, mean, rstd):
    if normalise == "layer_norm":
        variance = latents.var(-1, keepdims=True)
        return (latents - latents.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    return (latents - mean) * rstd if normalise == "standardise" else latents


@pytest.mark.parametrize("own", ["none", "standardise"])
@pytest.mark.parametrize("to", ["none", "layer_norm", "standardise"])
def test_predictions_in_another_space(own, to):
    """The same weights, made in `own` and compared in `to`: errors and R2 as numpy has them."""
    salt = make_salt()
    random = torch.Generator().manual_seed(3)
    mean, zero = torch.randn(144, 20, generator=random), torch.randn(144, 20, generator=random)
    variance = torch.rand(144, 20, generator=random) + 0.5
    rstd = 1 / (variance + 1e-6).sqrt()
    spaces = {
        "none": Space("latents", "none", None, None, mean),
        "standardise": Space("latents", "standardise", mean, rstd, torch.zeros(144, 20)),
        "layer_norm": Space("latents", "layer_norm", None, None, zero),
    }
    target = spaces[own].as_space(to, variance) or spaces["layer_norm"]
    assert (
        target.normalise == to
        and torch.equal(target.zero, spaces[to].zero)
        and target.agrees_with(spaces[to])
    )
    patches = torch.randint(0, 256, (3, 144, 1536), dtype=torch.uint8, generator=random)
    latents = torch.randn(3, 144, 20, generator=random).half()
    masks = [sample_masks(torch.arange(3), 0, 0, "long", (4, 6, 6))]
    batch = Batch(torch.arange(3), patches, latents, masks)
    converted = None if own == to else spaces[own]
    row = clip_errors(salt, target, batch, converted)["long"]

    with torch.no_grad():
        made = salt(patches, masks)["long"].double().numpy()
    index = masks[0].target.numpy()
    at = {
        name: x.double().numpy()[index]
        for name, x in (("mean", mean), ("rstd", rstd), ("zero", target.zero))
    }
    raw = made / at["rstd"] + at["mean"] if own == "standardise" else made
    predictions = made if own == to else in_numpy(raw, to, at["mean"], at["rstd"])
    truth = np.take_along_axis(latents.double().numpy(), index[..., None], 1)
    truth = in_numpy(truth, to, at["mean"], at["rstd"])
    np.testing.assert_allclose(row["squared"], ((predictions - truth) ** 2).sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(row["spread"], ((at["zero"] - truth) ** 2).sum((1, 2)), rtol=1e-4)


def test_spaces_that_another_does_not_decide():
    zero = torch.zeros(4, 3)
    layer_norm, raw = (Space("latents", name, None, None, zero) for name in ("layer_norm", "none"))
    assert layer_norm.as_space("none") is None and raw.as_space("layer_norm") is None
    assert (
        raw.as_space("standardise") is None and layer_norm.as_space("standardise", zero + 1) is None
    )
    assert raw.as_space("none") is raw
    scaled = raw.as_space("standardise", zero + 1)
    assert not scaled.agrees_with(raw) and not scaled.agrees_with(
        raw.as_space("standardise", zero + 2)
    )
