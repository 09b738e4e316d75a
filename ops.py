"""The one door to csrc/: every op beside its plain reference, and the drawing of masks.

Where the extension `salt_ops` is built (`python setup.py build_ext`) and the tensors are on a
device it was built for, it does the work; elsewhere the reference does, with the same results.
SALT_OPS=reference in the environment forces the reference.
"""

import ctypes
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from config import InputError, source_digest

for _name, _allowed in (
    ("SALT_OPS", ("", "reference")),
    ("SALT_SIMD", ("", "avx512", "avx2", "baseline")),
):
    if os.environ.get(_name, "") not in _allowed:
        raise InputError(
            f"{_name} is {os.environ[_name]!r} in the environment; it takes"
            f" {', '.join(_allowed[1:])}, or is left out"
        )
try:
    if os.environ.get("SALT_OPS") == "reference":
        raise ImportError("SALT_OPS=reference is set")
    import salt_ops

    if salt_ops.build_info().get("sources") != (
        source_digest() or salt_ops.build_info().get("sources")
    ):
        raise ImportError("salt_ops was built from other sources than csrc/")
    # {"devices": ["cpu", "cuda"], "architectures": "8.0;...;12.0+PTX", "simd": "avx512" | "avx2" |
    # "baseline", "amx": bool, "sources": SHA-256}
    EXTENSION = salt_ops.build_info()
    MISSING = None
except ImportError as error:
    EXTENSION, MISSING = (
        {
            "devices": [],
            "architectures": "",
            "simd": "none",
            "amx": False,
            "sources": None,
        },
        str(error),
    )


def covers(architectures, capability):
    """Whether code built for `architectures` ("8.0;9.0;12.0+PTX") runs on a GPU of compute
    capability (major, minor).

    Machine code runs on its own major version from its minor on, PTX on everything newer.
    """
    for name in filter(None, architectures.replace(" ", ";").split(";")):
        if not name[0].isdigit():  # a name such as Hopper: whoever gave it knows
            return True
        built = tuple(int(part.rstrip("af")) for part in name.removesuffix("+PTX").split("."))
        if name.endswith("a"):  # for that GPU alone
            if built == capability:
                return True
        elif (
            built[0] == capability[0]
            and built[1] <= capability[1]
            or name.endswith("+PTX")
            and built <= capability
        ):
            return True
    return False


def constant(function):
    """torch.compiler.assume_constant_result: a compiled caller keeps what it returned.

    That one imports the whole compiler, half of the time that a stage takes to start.
    """
    function._dynamo_marked_constant = True
    return function


_runs_on = {}


@constant
def runs_on(gpu):
    """Whether the extension was built for the GPU of this number.

    Asked when a tensor is on one, so that a CPU run never wakes CUDA.
    """
    if gpu not in _runs_on:
        _runs_on[gpu] = covers(EXTENSION["architectures"], torch.cuda.get_device_capability(gpu))
    return _runs_on[gpu]


def has_kernel(x):
    where = x.device
    return where.type in EXTENSION["devices"] and (where.type != "cuda" or runs_on(where.index))


def extension_line(device="cpu"):
    """One line for a script's start: what the extension was built for, or that the reference runs
    in its place on `device`.
    """
    if MISSING:
        return (
            f"salt_ops is not in use ({MISSING}): running on the plain PyTorch reference; build it"
            " with `python setup.py build_ext`"
        )
    built = ", ".join(EXTENSION["devices"]) + (
        f" ({EXTENSION['architectures']})" if EXTENSION["architectures"] else ""
    )
    advice, device = "", torch.device(device)
    if device.type == "cuda" and "cuda" not in EXTENSION["devices"]:
        advice = (
            "; on the GPU the plain PyTorch reference runs: install the CUDA toolkit (nvcc) and run"
            " `python setup.py build_ext` again"
        )
    elif device.type == "cuda" and not runs_on(device.index or 0):
        advice = (
            "; not for this GPU, where the plain PyTorch reference runs: `python setup.py"
            " build_ext` here builds for it"
        )
    return (
        f"salt_ops: built for {built}; SIMD"
        f" {EXTENSION['simd']}{', AMX' if EXTENSION['amx'] else ''}{advice}"
    )


# ------------------------------------------------------------------------------------------- Philox

# Streams of one (seed, epoch, sample id): a use of random numbers each, so that no two uses share
# any.
STREAMS = {"short": 0, "long": 1, "ratio": 2, "order": 13, "view": 14, "half": 15}


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
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & low,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)


class Random:
    """The numbers of one Philox stream, in order."""

    def __init__(self, seed, epoch, sample_id, stream):
        self.where, self.buffer, self.used, self.block = (
            (int(seed), int(epoch), int(sample_id), stream),
            [],
            0,
            0,
        )

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


class Family(NamedTuple):
    blocks: tuple  # fewest and most blocks in the union
    area: float | None  # a block's share of the frame; such blocks span all of time
    counts: tuple  # context and target tokens of the 8x14x14 grid
    redraws: int


FAMILIES = {
    "short": Family((8, 8), 0.15, (352, 784), 64),
    "long": Family((2, 2), 0.70, (112, 1088), 64),
    # blocks of 15-70 % height and width, 10-50 % of time; topped up to 75 %
    "ratio": Family((4, 8), None, (392, 1176), 0),
}
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
        tokens, ratio = (
            int(h * w * area),
            0.75 + 0.75 * (np.arange(ASPECT_RATIOS) + 0.5) / ASPECT_RATIOS,
        )
        sizes = np.stack(
            [np.rint(np.sqrt(tokens * ratio)), np.rint(np.sqrt(tokens / ratio))], axis=1
        )
        _size_tables[area, h, w, device] = torch.from_numpy(
            np.clip(sizes, 1, (h, w)).astype(np.int32)
        ).to(device)
    return _size_tables[area, h, w, device]


def mask_spec(family, grid, counts, device="cpu"):
    """What a draw on `device` needs, as the kernel takes it: whole numbers only, so that every
    compiler and device agrees.

    Raises InputError on an unknown family, a grid that is not three positive numbers or counts that
    do not fit it.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown mask family {family!r}; there are {', '.join(FAMILIES)}")
    if len(grid) != 3 or min(grid) < 1:
        raise InputError(f"a mask grid is (time, height, width), each at least 1, not {grid}")
    blocks, area, _, redraws = FAMILIES[family]
    counts = mask_counts(family, grid) if counts is None else tuple(counts)
    if len(counts) != 2 or min(counts) < 1 or sum(counts) > math.prod(grid):
        raise InputError(
            f"{family} masks of {counts} (context, target) tokens do not fit the {math.prod(grid)}"
            f" tokens of grid {grid}"
        )
    low, high = (1, 1, 1), (1, 1, 1)
    if area is None:
        share = ((0.10, 0.50), (0.15, 0.70), (0.15, 0.70))
        low = tuple(max(1, round(s[0] * g)) for s, g in zip(share, grid))
        high = tuple(max(1, round(s[1] * g)) for s, g in zip(share, grid))
    sizes = (
        torch.zeros((0, 2), dtype=torch.int32, device=device)
        if area is None
        else size_table(area, *grid[1:], device)
    )
    return {
        "grid": grid,
        "counts": counts,
        "blocks": blocks,
        "redraws": redraws,
        "sizes": sizes,
        "low": low,
        "high": high,
        "stream": STREAMS[family],
    }


def sample_masks(sample_ids, epoch, seed, family, grid=(8, 14, 14), counts=None):
    """Draw one mask of `family` for each clip: a pure function of (seed, epoch, sample id, family).

    sample_ids  int64 [B], >= 0 (data.sample_id); the masks are made on its device
    epoch       0 <= epoch < 2^32
    seed        0 <= seed < 2^63
    family      'short' or 'long' (V-JEPA's: Bardes et al. 2024, arXiv 2404.08471) or 'ratio' (75 %
                in space-time blocks)
    grid        (time, height, width) in tokens
    counts      (context, target) tokens a clip; by default the family's share of the grid
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
    )
    if has_kernel(ids):
        context, target = torch.ops.salt_ops.sample_masks(
            ids, epoch, seed, mask_numbers(spec), spec["sizes"]
        )
    else:
        context, target = sample_masks_reference(ids, epoch, seed, spec)
    return Masks(context.to(sample_ids.device), target.to(sample_ids.device))


def mask_numbers(spec):
    """The numbers of a mask_spec in the order in which the kernel takes them."""
    return [
        *spec["grid"],
        *spec["counts"],
        *spec["blocks"],
        spec["redraws"],
        *spec["low"],
        *spec["high"],
        spec["stream"],
    ]


def sample_masks_reference(sample_ids, epoch, seed, spec):
    """csrc/masks.h, number for number, in Python; `spec` from mask_spec."""
    if (sample_ids < 0).any():
        raise InputError("sample_ids must be at least 0")
    drawn = [draw_one_mask(epoch, seed, sample_id, **spec) for sample_id in sample_ids.tolist()]
    shape = [(len(drawn), count) for count in spec["counts"]]
    return Masks(
        *(
            torch.from_numpy(np.array([pair[i] for pair in drawn], np.int64).reshape(shape[i]))
            for i in (0, 1)
        )
    )


def draw_one_mask(epoch, seed, sample_id, grid, counts, blocks, redraws, sizes, low, high, stream):
    random = Random(seed, epoch, sample_id, stream)
    n, spans_time = math.prod(grid), len(sizes) > 0
    size = (grid[0], *sizes[random.below(len(sizes))].tolist()) if spans_time else None
    for _ in range(redraws + 1):
        union = np.zeros(grid, bool)
        for _ in range(blocks[0] + random.below(blocks[1] - blocks[0] + 1)):
            if not spans_time:
                size = tuple(
                    least + random.below(most - least + 1) for least, most in zip(low, high)
                )
            corner = tuple(
                0 if spans_time and axis == 0 else random.below(grid[axis] - size[axis] + 1)
                for axis in range(3)
            )
            union[tuple(slice(c, c + s) for c, s in zip(corner, size))] = True
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
    move(1, 2, int((state == 1).sum()) - counts[1])
    return np.flatnonzero(state == 0), np.flatnonzero(state == 1)


# ------------------------------------------------------------------------------------------- gather


def check_devices(name, first, *others):
    for x in others:
        if x is not None and x.device != first.device:
            raise InputError(
                f"{name} takes tensors on one device, not on {first.device} and {x.device}"
            )


def check_rows(x, index, name):
    check_devices(name, x, index)
    if (
        x.dim() != 3
        or index.dim() != 2
        or index.shape[0] != x.shape[0]
        or index.dtype != torch.int64
    ):
        raise InputError(
            f"{name} takes [B, N, D] and int64 index [B, K], not {list(x.shape)} and {index.dtype}"
            f" {list(index.shape)}"
        )


def masked_gather(x, index):
    """Rows of each clip: out[b, k] = x[b, index[b, k]].

    x [B, N, D] of any dtype, index int64 [B, K] with unique rows a clip -> [B, K, D] in x's dtype.
    The gradient is a scatter into zeros. Raises IndexError on an index outside [0, N) (a device
    assert on a GPU) and InputError on other shapes.
    """
    check_rows(x, index, "masked_gather")
    if has_kernel(x):
        return torch.ops.salt_ops.masked_gather(x, index)
    return masked_gather_reference(x, index)


def masked_gather_reference(x, index):
    if (
        x.device.type == "cpu"
        and index.numel()
        and not (0 <= index.min() and index.max() < x.shape[1])
    ):
        raise IndexError(
            f"index runs from {int(index.min())} to {int(index.max())}; it must be in [0,"
            f" {x.shape[1]})"
        )
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


# ------------------------------------------------------------------------------------------ patches


def patch_normalise(patches, mean, std, index=None, dtype=torch.float32):
    """Patches as an encoder takes them, (x / 255 - mean) / std, of the rows asked for.

    patches    uint8 [B, N, D], a row being (channel, dt, dy, dx)
    mean, std  a number a channel, of pixels in [0, 1]; D is a multiple of their count (1 to 4)
    index      int64 [B, K], or None for all N rows
    dtype      float32 or bfloat16
    Returns [B, K, D] of dtype: x * (1 / (255 std)) + (-mean / std), product and sum each rounded in
    float32, the same bits everywhere.
    """
    if index is not None:
        check_rows(patches, index, "patch_normalise")
    channels = len(mean)
    if (
        patches.dtype != torch.uint8
        or patches.dim() != 3
        or not 1 <= channels <= 4
        or patches.shape[2] % channels
        or len(std) != channels
        or not min(std) > 0
    ):
        raise InputError(
            "patch_normalise takes uint8 patches [B, N, D], a mean and a std above 0 for each of 1"
            f" to 4 channels, which divide D; not {patches.dtype} {list(patches.shape)}, {mean} and"
            f" {std}"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"patch_normalise makes float32 or bfloat16, not {dtype}")
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]
    if has_kernel(patches):
        return torch.ops.salt_ops.patch_normalise(patches, index, scale, shift, dtype)
    return patch_normalise_reference(patches, scale, shift, index, dtype)


def patch_normalise_reference(patches, scale, shift, index=None, dtype=torch.float32):
    x = (patches if index is None else masked_gather_reference(patches, index)).float()

    def a_channel(values):
        return torch.tensor(values, dtype=torch.float32, device=x.device).repeat_interleave(
            x.shape[2] // len(values)
        )

    return (x * a_channel(scale) + a_channel(shift)).to(dtype)


# --------------------------------------------------------------------------------------------- loss

KINDS = ("mse", "l1", "smooth_l1")
NORMALISATIONS = ("none", "layer_norm", "standardise")
PREDICTIONS = (torch.float32, torch.bfloat16, torch.float64)
TARGETS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8)


def normalise_target(y, normalise="none", index=None, mean=None, rstd=None):
    """Targets [B, K, D] in the space the loss works in, float32 (float64 stays; uint8 is pixels,
    divided by 255 first).

    none         as they are
    layer_norm   each token to mean 0 and variance 1 over D, eps 1e-6, no affine
    standardise  (y - mean) * rstd with the per-position mean and 1 / standard deviation [N, D],
                 taken at index [B, K] or at all N
    """
    y = y.float() / 255 if y.dtype == torch.uint8 else y if y.dtype == torch.float64 else y.float()
    if normalise == "none":
        return y
    if normalise == "layer_norm":
        return F.layer_norm(y, y.shape[-1:], eps=1e-6)
    at = slice(None) if index is None else index
    return (y - mean[at]) * rstd[at]


def check_loss(prediction, target, index, kind, normalise, mean, rstd):
    if kind not in KINDS:
        raise InputError(f"unknown loss {kind!r}; there are {', '.join(KINDS)}")
    if normalise not in NORMALISATIONS:
        raise InputError(
            f"unknown target normalisation {normalise!r}; there are {', '.join(NORMALISATIONS)}"
        )
    fits = (
        prediction.dim() == target.dim() == 3
        and prediction.shape[0] == target.shape[0]
        and prediction.shape[2] == target.shape[2]
    )
    if not fits or (target.shape[1] if index is None else index.shape[-1]) != prediction.shape[1]:
        raise InputError(
            "masked_mse takes prediction [B, K, D] and target [B, N, D] with index [B, K], or [B,"
            f" K, D] without; not {list(prediction.shape)}, {list(target.shape)} and"
            f" {'no index' if index is None else list(index.shape)}"
        )
    check_devices(
        "masked_mse",
        prediction,
        target,
        index,
        *((mean, rstd) if normalise == "standardise" else ()),
    )
    if index is not None:
        check_rows(target, index, "masked_mse")
    if prediction.dtype not in PREDICTIONS or target.dtype not in TARGETS:
        raise InputError(
            "masked_mse takes predictions in float32, bfloat16 or float64 and targets in these,"
            f" float16 or uint8; not {prediction.dtype} and {target.dtype}"
        )
    if normalise == "standardise" and not (
        mean is not None and rstd is not None and mean.shape == rstd.shape == target.shape[1:]
    ):
        raise InputError(
            f"standardise needs the per-position mean and rstd, {list(target.shape[1:])} each; not "
            f"{' and '.join('none' if x is None else str(list(x.shape)) for x in (mean, rstd))}"
        )


def masked_mse(
    prediction,
    target,
    index=None,
    kind="mse",
    normalise="none",
    mean=None,
    rstd=None,
    per_token=False,
):
    """Mean error of predictions against the target rows they ask for.

    prediction  [B, K, D] float32, bfloat16 or float64
    target      [B, N, D] with index int64 [B, K], or [B, K, D] without; float16, bfloat16, float32,
                float64, or uint8 (pixels, v / 255)
    kind        'mse', 'l1' or 'smooth_l1' (beta 1); normalise: see normalise_target
    Returns the mean over all B * K * D elements as a float32 scalar (float64 for float64
    predictions); with per_token also the mean over D of each token, [B, K], without gradient. The
    target gets no gradient, and there is no second derivative. Sums are in float32 at least, in an
    order that does not depend on the thread count. Raises InputError on shapes and dtypes that do
    not fit, IndexError on an index outside [0, N) (a device assert on a GPU).
    """
    check_loss(prediction, target, index, kind, normalise, mean, rstd)
    target, mean, rstd = (x if x is None else x.detach() for x in (target, mean, rstd))
    if has_kernel(prediction):
        # a kernel cannot see it
        need_gradient = torch.is_grad_enabled() and prediction.requires_grad
        loss, tokens, _ = torch.ops.salt_ops.masked_mse(
            prediction, target, index, kind, normalise, mean, rstd, 1.0, need_gradient
        )
    else:
        loss, tokens = masked_mse_reference(prediction, target, index, kind, normalise, mean, rstd)
    return (loss, tokens.detach()) if per_token else loss


@torch.no_grad()
def masked_mse_with_grad(
    prediction, target, index=None, kind="mse", normalise="none", mean=None, rstd=None, weight=1.0
):
    """masked_mse and, in the same pass, weight * d loss / d prediction, for loops that call
    prediction.backward(gradient).

    Returns (loss, gradient [B, K, D] in the prediction's dtype); the loss is not weighted. Neither
    is part of a graph.
    """
    check_loss(prediction, target, index, kind, normalise, mean, rstd)
    if has_kernel(prediction):
        loss, _, gradient = torch.ops.salt_ops.masked_mse(
            prediction, target, index, kind, normalise, mean, rstd, weight, True
        )
        return loss, gradient
    with torch.enable_grad():
        leaf = prediction.detach().requires_grad_()
        loss, _ = masked_mse_reference(leaf, target.detach(), index, kind, normalise, mean, rstd)
        (gradient,) = torch.autograd.grad(loss * weight, leaf)
    return loss.detach(), gradient


def masked_mse_reference(
    prediction, target, index=None, kind="mse", normalise="none", mean=None, rstd=None
):
    y = normalise_target(
        target if index is None else masked_gather_reference(target, index),
        normalise,
        index,
        mean,
        rstd,
    )
    p = prediction if prediction.dtype == torch.float64 else prediction.float()
    error = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind](
        p, y.to(p.dtype), reduction="none"
    )
    tokens = error.mean(-1)  # [B, K]
    return tokens.mean(), tokens


# --------------------------------------------------------------------------- attention and products


def keep_freed_memory():
    """Have this process keep the memory it frees, so that a step on the CPU finds the pages of the
    step before. Linux with glibc; elsewhere nothing.

    By default large blocks go back to the system, and a step of ViT-L waits for 2 million fresh
    pages: a fifth of its time on a virtual machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h. What is asked for ahead is touched
        # bit by bit, 1.5 kB a step, so a large
        # M_TOP_PAD looks like a leak until all of it was touched: with 256 MB over 28,000 steps and
        # on, with 4 MB it stood still.
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 24)):
            mallopt(option, value)


def return_freed_memory():
    """Have large blocks go back to the system when they are freed: for a process in which many
    threads free clips beside what stays.

    By default glibc raises the size from which it does so to that of the largest block it saw
    freed, and its arenas, one a thread, fall apart. Linux with glibc; elsewhere nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD of malloc.h, which is fixed by setting it


def on_tiles(x):
    """Whether the kernels for a processor's matrix tiles (AMX, bfloat16) take x."""
    return EXTENSION["amx"] and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def attention(qkv, lengths):
    """Softmax attention inside each of a clip's spans: what several masks of one clip need that
    share a pass.

    qkv      [B, N, 3, H, d], queries, keys and values of a token side by side
    lengths  tokens of each span, N in sum
    Returns [B, N, H, d]. bfloat16 on a CPU with AMX runs on the extension, d <= 128; all else on
    PyTorch's scaled_dot_product_attention, a call a span: on a GPU in bfloat16 that is
    FlashAttention's kernel, or cuDNN's. Neither depends on the thread count.
    """
    if (
        qkv.dim() != 5
        or qkv.shape[2] != 3
        or not lengths
        or min(lengths) < 1
        or sum(lengths) != qkv.shape[1]
    ):
        raise InputError(
            "attention takes qkv [B, N, 3, H, d] and the lengths of its spans, N in sum; not"
            f" {list(qkv.shape)} and {list(lengths)}"
        )
    if on_tiles(qkv) and qkv.shape[4] <= 128:
        return torch.ops.salt_ops.attention(qkv, lengths)[0]
    return attention_reference(qkv, lengths)


def attention_reference(qkv, lengths):
    found = []
    for span in qkv.split(list(lengths), dim=1):
        q, k, v = (x.transpose(1, 2) for x in span.unbind(2))  # [B, H, n, d]
        found.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def linear(x, weight, bias=None):
    """x [..., K] times weight [D, K] transposed, plus bias [D], which may have another dtype: [...,
    D] in x's dtype.

    bfloat16 on a CPU with AMX: the gradient of the weight multiplies a matrix that the extension
    has transposed, which oneDNN is twice as fast at.
    """
    if on_tiles(x) and x.dtype == weight.dtype:
        return TiledLinear.apply(x, weight, bias)
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def gelu_linear(x, weight, bias=None):
    """linear(gelu(x), weight, bias).

    On a CPU with AMX the backward pass makes gelu(x) again instead of keeping it: a quarter of a
    block's memory.
    """
    if on_tiles(x) and x.dtype == weight.dtype:
        return TiledLinear.apply(x, weight, bias, True)
    return linear(F.gelu(x), weight, bias)


class TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gelu=False):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype, ctx.gelu = None if bias is None else bias.dtype, gelu
        return F.linear(
            F.gelu(x) if gelu else x, weight, None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        to_x = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        if ctx.gelu:
            to_x = None if to_x is None else torch.ops.aten.gelu_backward(to_x, x)
            x = F.gelu(x)
        to_weight = sums = None
        if any(ctx.needs_input_grad[1:]):
            across, sums = torch.ops.salt_ops.transpose_and_sum(rows)
            to_weight = across @ x.reshape(-1, weight.shape[1]) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, sums.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None, None


# ------------------------------------------------------------------------------------ the data path


def patchify_into(clip, out, patch=16, tubelet=2):
    """data.patchify of one clip, uint8 array [T, H, W, 3], written to the uint8 array `out` [N, P]:
    a place in a batch.

    Fastest for a clip whose channels lie in planes, as data.read_clip gives it.
    """
    if EXTENSION["devices"]:
        salt_ops.patchify(
            torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2))),
            patch,
            tubelet,
            torch.from_numpy(out),
        )
    else:
        t, h, w = clip.shape[0] // tubelet, clip.shape[1] // patch, clip.shape[2] // patch
        out.reshape(t, h, w, 3, tubelet, patch, patch)[:] = clip.reshape(
            t, tubelet, h, patch, w, patch, 3
        ).transpose(0, 2, 4, 6, 1, 3, 5)


def add_moments(rows, total, squares):
    """Add float16 rows [n, ...] to `total` and their squares to `squares`, float64 arrays [...] in
    place, row after row in float64.

    The same bits in however many calls the rows come.
    """
    if EXTENSION["devices"]:
        salt_ops.add_moments(*map(torch.from_numpy, (np.ascontiguousarray(rows), total, squares)))
    else:
        for row in rows:
            wide = row.astype(np.float64)
            total += wide
            squares += wide * wide


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
    if EXTENSION["devices"]:
        return salt_ops.permute(torch.from_numpy(index), n, keys.tolist()).numpy()
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


class FileReference:
    """A file to read rows from, by plain preadv."""

    def __init__(self, path):
        self.file = open(path, "rb", buffering=0)


File = salt_ops.File if EXTENSION["devices"] else FileReference  # File(path): raises OSError


def advise(files, starts, count):
    """Ask for `count` bytes from `starts[i]` on of each files[i] to be read into the page cache,
    without waiting.
    """
    if EXTENSION["devices"]:
        salt_ops.advise(files, starts, count)
    elif hasattr(os, "posix_fadvise"):
        for file, start in zip(files, starts):
            os.posix_fadvise(file.file.fileno(), start, count, os.POSIX_FADV_WILLNEED)


class RowError(Exception):
    """A row that could not be read: .record its place in the call, .row, .reason."""

    def __init__(self, record, row, number):
        self.record, self.row, self.reason = (
            record,
            row,
            os.strerror(number) if number else "the file is truncated",
        )
        super().__init__(f"record {record}, row {row}: {self.reason}")


def read_rows(files, starts, out, row_bytes, wanted=None, scale=None, threads=1, tokens=None):
    """Copy rows of records out of files into a batch, on `threads` threads outside the GIL.

    files, starts  a File and the byte where its record begins, for each of R records
    out            contiguous tensor [R, N, D]: row n of record r goes to out[r, n]
    row_bytes      bytes of a stored row, as many as one of `out`
    wanted         bool tensor [R, N]: the rows to copy (the others keep what they held), or None
                   for all
    scale          float32 tensor [R, D]: the stored rows are int8, and out, float16, gets
                   entry * scale
    tokens         float32 tensor [R, N]: with a scale, a factor for each row beside it
    Raises RowError, of the first record that could not be read.
    """
    if EXTENSION["devices"]:
        record, row, number = salt_ops.read_rows(
            files,
            starts,
            row_bytes,
            None if wanted is None else wanted.view(torch.uint8),
            out,
            scale,
            tokens,
            threads,
        )
        if record >= 0:
            raise RowError(record, row, number)
    else:
        read_rows_reference(files, starts, out, row_bytes, wanted, scale, tokens)


def read_rows_reference(files, starts, out, row_bytes, wanted=None, scale=None, tokens=None):
    places = (
        out.view(torch.uint8).numpy()
        if scale is None
        else np.empty((*out.shape[:2], row_bytes), np.uint8)
    )
    for r, (file, start) in enumerate(zip(files, starts)):
        rows = np.arange(out.shape[1]) if wanted is None else np.flatnonzero(wanted[r].numpy())
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else ():
            try:
                got = os.preadv(
                    file.file.fileno(),
                    [places[r, run[0] : run[-1] + 1]],
                    start + int(run[0]) * row_bytes,
                )
            except OSError as error:
                raise RowError(r, int(run[0]), error.errno) from None
            if got != len(run) * row_bytes:
                raise RowError(r, int(run[0]), 0)
        if scale is not None:
            values = torch.from_numpy(places[r, rows].view(np.int8)).float() * scale[r]
            out[r, rows] = (values if tokens is None else values * tokens[r, rows, None]).half()


# --------------------------------------------------------------- autograd and shapes of the kernels

if EXTENSION["devices"]:

    @torch.library.register_fake("salt_ops::masked_gather")
    def _(x, index):
        return x.new_empty(x.shape[0], index.shape[1], x.shape[2])

    @torch.library.register_fake("salt_ops::masked_scatter")
    def _(x, index, n):
        return x.new_empty(x.shape[0], n, x.shape[2])

    @torch.library.register_fake("salt_ops::patch_normalise")
    def _(patches, index, scale, shift, dtype):
        return patches.new_empty(
            patches.shape[0],
            (patches if index is None else index).shape[1],
            patches.shape[2],
            dtype=dtype,
        )

    @torch.library.register_fake("salt_ops::masked_mse")
    def _(prediction, target, index, kind, normalise, mean, rstd, weight, need_gradient):
        wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
        return (
            prediction.new_empty((), dtype=wide),
            prediction.new_empty(prediction.shape[:2], dtype=wide),
            prediction.new_empty(prediction.shape if need_gradient else (0,)),
        )

    @torch.library.register_fake("salt_ops::sample_masks")
    def _(sample_ids, epoch, seed, numbers, sizes):
        return tuple(sample_ids.new_empty(sample_ids.shape[0], count) for count in numbers[3:5])

    @torch.library.register_fake("salt_ops::attention")
    def _(qkv, lengths):
        b, n, _, h, d = qkv.shape
        return qkv.new_empty(b, n, h, d), qkv.new_empty(b, h, n, dtype=torch.float32)

    @torch.library.register_fake("salt_ops::attention_backward")
    def _(gradient, qkv, out, lse, lengths):
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    @torch.library.register_fake("salt_ops::transpose_and_sum")
    def _(x):
        return x.new_empty(x.shape[1], x.shape[0]), x.new_empty(x.shape[1], dtype=torch.float32)

    def save_attention(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output)
        ctx.lengths = inputs[1]

    @torch.autograd.function.once_differentiable
    def attention_backward(ctx, gradient, _lse):
        return (
            None
            if gradient is None
            else torch.ops.salt_ops.attention_backward(gradient, *ctx.saved_tensors, ctx.lengths)
        ), None

    torch.library.register_autograd(
        "salt_ops::attention", attention_backward, setup_context=save_attention
    )

    def save_index(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.rows = inputs[0].shape[1]

    def gather_backward(ctx, g):
        return torch.ops.salt_ops.masked_scatter(g, ctx.saved_tensors[0], ctx.rows), None

    def scatter_backward(ctx, g):
        return torch.ops.salt_ops.masked_gather(g, ctx.saved_tensors[0]), None, None

    torch.library.register_autograd(
        "salt_ops::masked_gather", gather_backward, setup_context=save_index
    )
    torch.library.register_autograd(
        "salt_ops::masked_scatter", scatter_backward, setup_context=save_index
    )

    def save_gradient(ctx, inputs, output):
        # or zeros as large as the predictions are made for the outputs that get no gradient
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(output[2])

    @torch.autograd.function.once_differentiable
    def scale_gradient(ctx, scale, _tokens, _gradient):
        if scale is None:
            return (None,) * 9
        (gradient,) = ctx.saved_tensors  # written by the forward pass, and never changed in place
        # a compiler's trace has no values; it fuses this with what comes next
        if type(scale) is not torch.Tensor:
            gradient = (gradient * scale.reshape(1, 1, 1)).to(gradient.dtype)
        # a GPU's value costs a wait, so it is read there, in one pass
        elif scale.device.type != "cpu" or scale.item() != 1:
            # not 0-dim, which torch would round to bfloat16
            gradient = torch.mul(gradient, scale.reshape(1, 1, 1), out=torch.empty_like(gradient))
        return (gradient,) + (None,) * 8

    torch.library.register_autograd(
        "salt_ops::masked_mse", scale_gradient, setup_context=save_gradient
    )
