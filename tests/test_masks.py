"""The four properties of the masks, and the extension against the reference."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from salt import ops
from salt.errors import InputError
from salt.masks import (
    ASPECT_RATIOS,
    FAMILIES,
    Family,
    mask_counts,
    mask_spec,
    philox,
    sample_masks,
    sample_masks_reference,
)

DRAWS = 20_000
needs_extension = pytest.mark.skipif(
    not ops.EXTENSION["devices"], reason="the extension is not built"
)


@pytest.fixture(scope="module")
def drawn():
    """family -> 20,000 masks on the default grid."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 2**63, DRAWS))
    return {family: sample_masks(ids, 3, 7, family) for family in FAMILIES}


# the known answers that Random123 ships for philox4x32-10
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    numbers = philox(
        key[0] | key[1] << 32,
        counter[1],
        counter[2] | counter[3] << 32,
        counter[0] >> 28,
        counter[0] & 0xFFFFFFF,
        1,
    )
    assert " ".join(f"{x:08x}" for x in numbers.tolist()) == expected


@needs_extension
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "grid, counts, draws",
    [
        ((8, 14, 14), None, 1500),
        ((4, 6, 6), None, 1000),
        ((1, 3, 5), (2, 3), 500),
        ((8, 16, 16), None, 200),
        # as many tokens as fit the way by bytes, and more
        ((16, 16, 16), None, 60),
        ((16, 16, 17), None, 60),
        ((3, 7, 10), (150, 20), 500),
        ((2, 4, 4), (1, 1), 300),
        ((4, 6, 6), (100, 44), 300),
    ],
)
def test_extension_and_reference_agree_exactly(family, grid, counts, draws):
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 2**63, draws))
    fast = sample_masks(ids, 2**32 - 1, 2**63 - 1, family, grid, counts)
    plain = sample_masks_reference(ids, 2**32 - 1, 2**63 - 1, mask_spec(family, grid, counts))
    assert torch.equal(fast.context, plain.context) and torch.equal(fast.target, plain.target)


@needs_extension
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid, share, kept", [((8, 14, 14), 0.25, None), ((4, 7, 7), 0.01, 8)])
def test_a_share_of_the_targets(family, grid, share, kept):
    """It is part of them, of the same counts whatever is drawn, as likely in each slice; and the
    context does not know of it.
    """
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 2**63, 400))
    whole = sample_masks(ids, 3, 7, family, grid)
    part = sample_masks(ids, 3, 7, family, grid, share=share)
    spec = mask_spec(family, grid, None, share=share)
    plain = sample_masks_reference(ids, 3, 7, spec)
    assert torch.equal(part.context, plain.context) and torch.equal(part.target, plain.target)
    kept = kept or int(whole.target.shape[1] * share) // 8 * 8
    assert part.target.shape[1] == kept == spec["counts"][2]
    assert torch.equal(part.context, whole.context)
    assert (part.target.diff(dim=1) > 0).all()
    in_whole = torch.zeros(len(ids), math.prod(grid), dtype=torch.bool)
    in_whole.scatter_(1, whole.target, True)
    assert in_whole.gather(1, part.target).all()
    time = part.target // (grid[1] * grid[2])
    of_whole = (whole.target // (grid[1] * grid[2])).double().mean()
    assert abs(time.double().mean() - of_whole) < 5 * time.double().std() / time.numel() ** 0.5


@pytest.mark.parametrize(
    "family, counts", [("short", (352, 784)), ("long", (112, 1088)), ("ratio", (392, 1176))]
)
def test_1_counts_are_exact(drawn, family, counts):
    masks = drawn[family]
    assert masks.context.shape == (DRAWS, counts[0]) and masks.target.shape == (DRAWS, counts[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_4_indices_are_sorted_unique_and_disjoint(drawn, family):
    masks = drawn[family][:2]
    for index in masks:
        assert (index.diff(dim=1) > 0).all() and index.min() >= 0 and index.max() < 1568
    hits = torch.zeros(DRAWS, 1568, dtype=torch.int8)
    for index in masks:
        hits.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int8))
    assert hits.max() == 1


@pytest.mark.parametrize("family", ["short", "long"])
def test_2_each_time_slice_is_as_likely_and_space_is_mirror_symmetric(drawn, family):
    """Each figure against its mean over slices or over a position and its mirror images, in
    standard errors over clips.
    """
    for index in drawn[family][:2]:
        # [draws, 8] tokens a slice
        slices = torch.stack([(index // 196 == t).sum(1) for t in range(8)], dim=1).double()
        z = (slices.mean(0) - index.shape[1] / 8) / (slices.std(0) / math.sqrt(DRAWS))
        assert z.abs().max() < 5
        places = torch.zeros(DRAWS, 14, 14).view(DRAWS, 196)
        places.scatter_add_(1, index % 196, torch.ones(index.shape))
        places = places.view(DRAWS, 14, 14)
        for axis in (1, 2):
            difference = places - places.flip(axis)
            error = difference.std(0) / math.sqrt(DRAWS)
            assert (difference.mean(0).abs() <= 5 * error + 1e-9).all()


def test_2_surplus_tokens_are_dropped_uniformly():
    """On a grid whose union is all of it but one corner at most, dropping alone decides: every
    token is as likely.
    """
    ids = torch.arange(DRAWS)
    # blocks cover everything: 3 tokens move, 3 of 5 drop
    masks = sample_masks(ids, 0, 0, "short", (8, 1, 1), (3, 2))
    for index, share in zip(masks, (3 / 8, 2 / 8)):
        counts = torch.bincount(index.flatten(), minlength=8)
        assert ((counts / DRAWS - share).abs() < 5 * math.sqrt(share * (1 - share) / DRAWS)).all()


def test_3_masks_depend_on_seed_epoch_id_and_family_alone(drawn):
    ids = torch.tensor([5, 17, 2**62, 5])
    masks = sample_masks(ids, 1, 2, "short")
    assert torch.equal(masks.target[0], masks.target[3])
    assert torch.equal(sample_masks(ids[1:2], 1, 2, "short").target[0], masks.target[1])
    for other in (
        sample_masks(ids, 2, 2, "short"),
        sample_masks(ids, 1, 3, "short"),
        sample_masks(ids + 1, 1, 2, "short"),
    ):
        assert not torch.equal(other.target, masks.target)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = sample_masks(torch.arange(100), 1, 2, "long")
        torch.set_num_threads(1)
        assert torch.equal(many.context, sample_masks(torch.arange(100), 1, 2, "long").context)
    finally:
        torch.set_num_threads(threads)


def test_3_the_format_is_frozen():
    """A changed draw makes runs incomparable: this fails if anybody changes the order in which
    numbers are drawn.
    """
    masks = sample_masks(torch.tensor([123456789]), 1, 42, "short", (2, 4, 4))
    assert masks.context.tolist() == FROZEN[0] and masks.target.tolist() == FROZEN[1]


FROZEN = (
    [[1, 9, 12, 13, 15, 17, 24, 28]],
    [[0, 2, 4, 6, 7, 10, 11, 14, 16, 18, 20, 22, 23, 26, 27, 30]],
)


@pytest.mark.parametrize("family, area, blocks", [("short", 0.15, 8), ("long", 0.70, 2)])
def test_block_sizes_follow_the_textbook(family, area, blocks):
    spec = mask_spec(family, (8, 14, 14), None)
    tokens = int(196 * area)
    for (h, w), step in zip(spec["sizes"].tolist(), range(ASPECT_RATIOS)):
        ratio = 0.75 + 0.75 * (step + 0.5) / ASPECT_RATIOS
        assert (h, w) == (
            min(14, round(math.sqrt(tokens * ratio))),
            min(14, round(math.sqrt(tokens / ratio))),
        )
    assert spec["blocks"] == (blocks, blocks)


def test_context_is_the_complement_of_whole_blocks():
    """Before anything is dropped a target covers columns of time: a place is target in all slices
    or in none.
    """
    for family in ("short", "long"):
        masks = sample_masks(torch.arange(500), 0, 0, family)
        for context, target in zip(masks.context, masks.target):
            assert not set((context % 196).tolist()) & set((target % 196).tolist())


def test_counts_on_other_grids():
    assert mask_counts("short", (8, 14, 14)) == (352, 784)
    assert mask_counts("short", (4, 6, 6)) == (32, 72)
    assert mask_counts("long", (4, 6, 6)) == (8, 96)
    assert mask_counts("ratio", (4, 6, 6)) == (32, 104)  # 36 and 108, rounded down
    assert mask_counts("short", (8, 16, 16)) == (456, 1024)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.arange(2), 0, 0, "shrot"), "unknown mask family"),
        ((torch.arange(2), -1, 0, "short"), "epoch"),
        ((torch.tensor([-1]), 0, 0, "short"), "sample_ids"),
        ((torch.arange(2).int(), 0, 0, "short"), "sample_ids"),
        ((torch.arange(2), 0, 0, "short", (2, 2, 2), (5, 5)), "do not fit"),
        ((torch.arange(2), 0, 0, "short", (2, 2)), "grid"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_masks(*arguments)


def test_everything_runs_without_the_extension():
    code = (
        "import torch\nfrom salt import extension, masks, ops\n"
        "m = masks.sample_masks(torch.arange(2), 0, 0, 'long')\n"
        "x = torch.randn(2, 1568, 4, requires_grad=True)\n"
        "gathered = ops.masked_gather(x, m.target)\n"
        "ops.masked_mse(gathered, torch.zeros(2, 1568, 4), m.target).backward()\n"
        "print(extension.describe(), m.target.sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(ops.__file__)),
        env={**os.environ, "SALT_OPS": "reference"},
    )
    assert run.returncode == 0, run.stderr
    assert "plain PyTorch reference" in run.stdout
    assert run.stdout.split()[-1] == str(
        sample_masks(torch.arange(2), 0, 0, "long").target.sum().item()
    )


def test_a_family_of_ones_own(monkeypatch):
    """Drawn in Python where it has a `draw`, by the kernel else; its numbers are nobody else's."""

    def draw(random, grid):
        in_union = np.zeros(grid, bool)
        in_union[grid[0] // 2 :] = True  # the future
        in_union[0, random.below(grid[1])] = True
        return in_union

    monkeypatch.setitem(FAMILIES, "future", Family(5, (352, 784), draw=draw))
    monkeypatch.setitem(FAMILIES, "half", Family(6, (704, 704), (1, 1), 0.5))
    ids = torch.arange(20)
    future = sample_masks(ids, 3, 7, "future")
    assert future.context.shape == (20, 352) and future.target.shape == (20, 784)
    assert (future.context < 784).all()
    assert ((future.target >= 784) | (future.target < 196)).all()
    assert future.target.diff().min() > 0 and len(future.target.unique(dim=0)) == 20
    again = sample_masks(ids[7:8], 3, 7, "future")
    assert torch.equal(again.target[0], future.target[7])

    half = sample_masks(ids, 3, 7, "half")
    plain = sample_masks_reference(ids, 3, 7, mask_spec("half", (8, 14, 14), None))
    assert half.target.shape == (20, 704) and torch.equal(half.target, plain.target)

    monkeypatch.setitem(FAMILIES, "future", Family(5, (352, 784), draw=lambda *_: np.zeros(3)))
    with pytest.raises(InputError, match="draw gives bool"):
        sample_masks(ids, 3, 7, "future")
