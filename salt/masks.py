"""Random numbers by counter (Philox), the mask families, and the order of an epoch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from salt import ops
from salt.errors import InputError
from salt.extension import constant
from salt.ops import has_kernel

# Streams of one (seed, epoch, sample id), 0 to 15: a use of random numbers each, so that no two
# uses share any. A mask family's stands in FAMILIES.
STREAMS = {"order": 13, "view": 14, "half": 15}


def philox(seed, epoch, sample_id, stream, first_block, blocks):
    """Philox-4x32-10 (Salmon et al., SC 2011): uint64 [blocks * 4] holding the 32-bit numbers from
    block `first_block` on.
    """
    low = np.uint64(0xFFFFFFFF)
    c0 = np.arange(first_block, first_block + blocks, dtype=np.uint64) | np.uint64(stream << 28)
    c1, c2, c3 = (
        np.full(blocks, word, np.uint64)
        for word in (epoch, sample_id & 0xFFFFFFFF, sample_id >> 32)
    )
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = (p1 >> np.uint64(32)) ^ c1 ^ k0
        c1 = p1 & low
        c2 = (p0 >> np.uint64(32)) ^ c3 ^ k1
        c3 = p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)


class Random:
    """The numbers of one Philox stream, in order."""

    def __init__(self, seed, epoch, sample_id, stream):
        self.where = (int(seed), int(epoch), int(sample_id), stream)
        self.buffer = []
        self.used = 0
        self.block = 0

    def next(self):
        """The next 32-bit number."""
        if self.used == len(self.buffer):
            self.buffer, self.used = philox(*self.where, self.block, 64).tolist(), 0
            self.block += 64
        self.used += 1
        return self.buffer[self.used - 1]

    def below(self, n):
        """A whole number in [0, n)."""
        return (self.next() * n) >> 32

    def uniform(self):
        """A number in [0, 1) with 32 random bits."""
        return self.next() / 2**32


# -------------------------------------------------------------------------------------------- masks


class Masks(NamedTuple):
    """Token numbers of a batch, int64, rows sorted; a clip's context and target are disjoint."""

    context: torch.Tensor  # [B, Kc]
    target: torch.Tensor  # [B, Kt]
    family: str = ""


class Family(NamedTuple):
    """One way of drawing masks: targets are in a union of blocks, or in what `draw` gives, and the
    context is in the rest; dropping tokens at random brings both to their counts.
    """

    stream: int  # of random numbers, one that nothing else has; with another, other masks
    counts: tuple  # context and target tokens of the 8x14x14 grid
    blocks: tuple = (1, 1)  # fewest and most blocks in the union
    area: float | None = None  # a block's share of the frame; such blocks span all of time
    redraws: int = 64  # of a union that leaves too few tokens, before some are moved at random
    # (Random, grid) -> bool [T, H, W], True where a target may be: in place of blocks, in Python
    draw: Callable | None = None


FAMILIES = {
    "short": Family(0, (352, 784), (8, 8), 0.15),
    "long": Family(1, (112, 1088), (2, 2), 0.70),
    # blocks of 15-70 % height and width, 10-50 % of time; topped up to 75 %
    "ratio": Family(2, (392, 1176), (4, 8), redraws=0),
}
_streams = [*STREAMS.values(), *(family.stream for family in FAMILIES.values())]
if len(set(_streams)) < len(_streams) or not set(_streams) <= set(range(16)):
    raise InputError(
        f"each of masks.FAMILIES needs a stream of its own from 0 to 15, not {_streams}"
    )
ASPECT_RATIOS = 1024  # steps of the table that stands for "uniform in [0.75, 1.5]"


def mask_counts(family, grid):
    """(context, target) tokens of `family` on `grid`: its share of the 8x14x14 grid, rounded down
    to multiples of 8, at least 8.
    """
    n = math.prod(grid)
    return tuple(max(8, count * n // 1568 // 8 * 8) for count in FAMILIES[family].counts)


_size_tables = {}


@constant  # a compiled caller holds the table; it does not trace into numpy
def size_table(area, h, w, device):
    """Block sizes (h, w) of `area` of the frame, one for each of ASPECT_RATIOS aspect ratios: int32
    [S, 2] on `device`.

    As V-JEPA rounds: h = round(sqrt(area * ratio)), w = round(sqrt(area / ratio)).
    """
    if (area, h, w, device) not in _size_tables:
        tokens = int(h * w * area)
        ratio = 0.75 + 0.75 * (np.arange(ASPECT_RATIOS) + 0.5) / ASPECT_RATIOS
        sizes = np.stack(
            [np.rint(np.sqrt(tokens * ratio)), np.rint(np.sqrt(tokens / ratio))], axis=1
        )
        _size_tables[area, h, w, device] = torch.from_numpy(
            np.clip(sizes, 1, (h, w)).astype(np.int32)
        ).to(device)
    return _size_tables[area, h, w, device]


def kept_targets(count, share):
    """How many of `count` target tokens are predicted where a share of them is: rounded down to a
    multiple of 8, at least 8 where there are as many.
    """
    return count if share == 1 else min(count, max(8, int(count * share) // 8 * 8))


def mask_spec(family, grid, counts, device="cpu", share=1.0):
    """What a draw on `device` needs, as the kernel takes it: whole numbers only, so that every
    compiler and device agrees. A family with a `draw` has that, too, which no kernel takes.

    Raises InputError on an unknown family, a grid that is not three positive numbers or counts that
    do not fit it.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown mask family {family!r}; there are {', '.join(FAMILIES)}")
    if len(grid) != 3 or min(grid) < 1:
        raise InputError(f"a mask grid is (time, height, width), each at least 1, not {grid}")
    stream, _, blocks, area, redraws, draw = FAMILIES[family]
    counts = mask_counts(family, grid) if counts is None else tuple(counts)
    if len(counts) != 2 or min(counts) < 1 or sum(counts) > math.prod(grid):
        raise InputError(
            f"{family} masks of {counts} (context, target) tokens do not fit the {math.prod(grid)}"
            f" tokens of grid {grid}"
        )
    if not 0 < share <= 1:
        raise InputError(f"the share of the targets that is predicted is above 0 to 1, not {share}")
    low, high = (1, 1, 1), (1, 1, 1)
    if area is None:
        sides = ((0.10, 0.50), (0.15, 0.70), (0.15, 0.70))
        low = tuple(max(1, round(s[0] * g)) for s, g in zip(sides, grid))
        high = tuple(max(1, round(s[1] * g)) for s, g in zip(sides, grid))
        sizes = torch.zeros((0, 2), dtype=torch.int32, device=device)
    else:
        sizes = size_table(area, grid[1], grid[2], device)
    return {
        "grid": grid,
        "counts": (*counts, kept_targets(counts[1], share)),
        "blocks": blocks,
        "redraws": redraws,
        "sizes": sizes,
        "low": low,
        "high": high,
        "stream": stream,
    } | ({"draw": draw} if draw else {})


def sample_masks(sample_ids, epoch, seed, family, grid=(8, 14, 14), counts=None, share=1.0):
    """Draw one mask of `family` for each clip: a pure function of (seed, epoch, sample id, family).

    sample_ids  int64 [B], >= 0 (views.sample_id); the masks are made on its device
    epoch       0 <= epoch < 2^32
    seed        0 <= seed < 2^63
    family      'short' or 'long' (V-JEPA's: Bardes et al. 2024, arXiv 2404.08471), 'ratio' (75 % in
                space-time blocks), or another of FAMILIES
    grid        (time, height, width) in tokens
    counts      (context, target) tokens a clip; by default the family's share of the grid
    share       of the target tokens that are predicted, drawn at random: (0, 1]
    Returns Masks(context int64 [B, Kc], target int64 [B, Kt]). Raises InputError on arguments out
    of range, ValueError on a negative id (a device assert on a GPU).
    """
    if not (0 <= epoch < 2**32 and 0 <= seed < 2**63):
        raise InputError(
            f"masks need 0 <= epoch < 2^32 and 0 <= seed < 2^63, not epoch {epoch} and seed {seed}"
        )
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        raise InputError(
            f"sample_ids must be int64 [B], not {sample_ids.dtype} {list(sample_ids.shape)}"
        )
    # where the device has no kernel the host draws
    ids = sample_ids if has_kernel(sample_ids) else sample_ids.cpu()
    spec = mask_spec(
        family,
        tuple(map(int, grid)),
        None if counts is None else tuple(map(int, counts)),
        str(ids.device),
        share,
    )
    if has_kernel(ids) and "draw" not in spec:
        context, target = torch.ops.salt_ops.sample_masks(ids, epoch, seed, **spec)
    else:
        context, target, _ = sample_masks_reference(ids, epoch, seed, spec)
    return Masks(context.to(sample_ids.device), target.to(sample_ids.device), family)


def sample_masks_reference(sample_ids, epoch, seed, spec):
    """csrc/masks.h, number for number, in Python; `spec` from mask_spec."""
    if (sample_ids < 0).any():
        raise InputError("sample_ids must be at least 0")
    drawn = [draw_one_mask(epoch, seed, sample_id, **spec) for sample_id in sample_ids.tolist()]
    shape = [(len(drawn), spec["counts"][i]) for i in (0, 2)]
    return Masks(
        *(
            torch.from_numpy(np.array([pair[i] for pair in drawn], np.int64).reshape(shape[i]))
            for i in (0, 1)
        )
    )


def draw_one_mask(
    epoch, seed, sample_id, grid, counts, blocks, redraws, sizes, low, high, stream, draw=None
):
    random = Random(seed, epoch, sample_id, stream)
    n, spans_time = math.prod(grid), len(sizes) > 0
    size = (grid[0], *sizes[random.below(len(sizes))].tolist()) if spans_time else None
    for _ in range(redraws + 1):
        union = draw(random, grid) if draw else union_of(random, grid, blocks, size, low, high)
        if union.shape != tuple(grid) or union.dtype != bool:
            raise InputError(
                f"a mask family's draw gives bool {list(grid)}, not {union.dtype}"
                f" {list(union.shape)}"
            )
        in_union = int(union.sum())
        if in_union >= counts[1] and n - in_union >= counts[0]:
            break
    state = union.reshape(-1).astype(np.uint8)  # 0 complement, 1 union, 2 dropped

    def move(source, to, count):
        pool = np.flatnonzero(state == source).tolist()
        for i in range(count):  # partial Fisher-Yates shuffle
            j = i + random.below(len(pool) - i)
            state[pool[j]] = to
            pool[j] = pool[i]

    move(1, 0, counts[0] - (n - in_union))  # a count below 1 moves nothing
    move(0, 1, counts[1] - in_union)
    move(0, 2, int((state == 0).sum()) - counts[0])
    move(1, 2, int((state == 1).sum()) - counts[2])
    return np.flatnonzero(state == 0), np.flatnonzero(state == 1)


def union_of(random, grid, blocks, size, low, high):
    """bool [T, H, W]: some blocks of `size`, which span time; or, where that is None, of sizes of
    their own.
    """
    union, spans_time = np.zeros(grid, bool), size is not None
    for _ in range(blocks[0] + random.below(blocks[1] - blocks[0] + 1)):
        if not spans_time:
            size = tuple(least + random.below(most - least + 1) for least, most in zip(low, high))
        corner = tuple(
            0 if spans_time and axis == 0 else random.below(grid[axis] - size[axis] + 1)
            for axis in range(3)
        )
        union[tuple(slice(c, c + s) for c, s in zip(corner, size))] = True
    return union


PERMUTE_ROUNDS = 8
# so many and fewer are ordered by sorting random numbers, which reaches every order alike
SORTED_ORDER = 256


def permute(index, n, seed, epoch):
    """The images of `index` under a permutation of [0, n) that (n, seed, epoch) decide: an order in
    which no list is kept.

    index int64 array [K] in [0, n), n <= 2^62 -> int64 array [K]. A Feistel network of alternating
    halves over the next power of two (Luby and Rackoff 1988), keyed by Philox and walked until it
    falls below n (Black and Rogaway 2002).
    """
    index = np.ascontiguousarray(index, np.int64)
    if index.size and not (0 <= index.min() and index.max() < n):
        raise IndexError(f"index runs from {index.min()} to {index.max()}; it must be in [0, {n})")
    if n <= SORTED_ORDER:  # the network's halves have too few bits to reach every order
        words = philox(seed, epoch, n, STREAMS["order"], 0, -(-n // 2)).reshape(-1, 2)[:n]
        return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")[index]
    keys = philox(seed, epoch, n, STREAMS["order"], 0, PERMUTE_ROUNDS // 4)
    if ops.EXTENSION["devices"]:
        return ops.salt_ops.permute(torch.from_numpy(index), n, keys.tolist()).numpy()
    return permute_reference(index, n, keys)


def permute_reference(index, n, keys):
    def scramble(x):  # MurmurHash3's finaliser, of 32-bit numbers
        x = (x ^ x >> np.uint64(16)) * np.uint64(0x85EBCA6B) & np.uint64(0xFFFFFFFF)
        x = (x ^ x >> np.uint64(13)) * np.uint64(0xC2B2AE35) & np.uint64(0xFFFFFFFF)
        return x ^ x >> np.uint64(16)

    bits = max(2, (n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    x, walking = index.astype(np.uint64), np.arange(len(index))
    while len(walking):
        high, low = x[walking] >> low_bits, x[walking] & low_mask
        for even, odd in zip(keys[::2], keys[1::2]):
            high ^= scramble(low ^ even) & high_mask
            low ^= scramble(high ^ odd) & low_mask
        x[walking] = high << low_bits | low
        walking = walking[x[walking] >= n]
    return x.astype(np.int64)


def shuffled(n, batch_size, seed, steps, rank=0, world=1):
    """(epoch, records int64 [batch_size / world]) of each step in `steps`: every epoch a new order
    of the n records, the last partial batch dropped.

    A function of (n, batch_size, seed, step), of which a rank takes its part; no list of records is
    kept.
    """
    for step in steps:
        epoch, place = divmod(step, n // batch_size)
        yield (
            epoch,
            permute(
                np.arange(place * batch_size, (place + 1) * batch_size)[
                    rank * batch_size // world : (rank + 1) * batch_size // world
                ],
                n,
                seed,
                epoch,
            ),
        )


def in_order(records, batch_size):
    """(0, records [<= batch_size]) one after another: a sampler for evaluation."""
    for start in range(0, len(records), batch_size):
        yield 0, np.asarray(records[start : start + batch_size])


def keyed_sample(n, count, seed):
    """Which `count` of n records an evaluation takes: int64 [min(count, n)], rising.

    Drawn without replacement, by a permutation that (n, seed) decide. The first ones of a list will
    not do: lists are often sorted by class.
    """
    count = min(count, n)
    return np.sort(permute(np.arange(count), n, seed, 0)) if count else np.zeros(0, np.int64)


def check_batch(n, batch_size):
    """Raises InputError where n clips do not make one batch."""
    if n < batch_size:
        raise InputError(
            f"there are {n} clips, fewer than a batch of {batch_size}; lower --batch_size"
        )
