"""The one door to csrc/: every op beside its plain reference.

Where the extension `salt_ops` is built (`python setup.py build_ext`) and the tensors are on a
device it was built for, it does the work; elsewhere the reference does, with the same results.
SALT_OPS=reference in the environment forces the reference.
"""

import ctypes
import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from salt.errors import InputError
from salt.extension import EXTENSION, runs_on, salt_ops


def has_kernel(x):
    where = x.device
    return where.type in EXTENSION["devices"] and (where.type != "cuda" or runs_on(where.index))


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

    def a_channel(values):  # by kernels, not by a copy, for which the host would wait for a GPU
        return torch.cat([x.new_full((x.shape[2] // len(values),), value) for value in values])

    return (x * a_channel(scale) + a_channel(shift)).to(dtype)


# --------------------------------------------------------------------------------------------- loss

# Losses: (predictions, targets), float32 [B, K, D] (float64 stays) -> the error of each element,
# likewise, or of each token, [B, K, 1]. What is not in KINDS runs as it stands here.
ERRORS = {
    "mse": functools.partial(F.mse_loss, reduction="none"),
    "l1": functools.partial(F.l1_loss, reduction="none"),
    "smooth_l1": functools.partial(F.smooth_l1_loss, reduction="none"),
}
KINDS = ("mse", "l1", "smooth_l1")  # those that the kernels know
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
    if kind not in ERRORS:
        raise InputError(f"unknown loss {kind!r}; there are {', '.join(ERRORS)}")
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
    kind        'mse', 'l1', 'smooth_l1' (beta 1), or another of ERRORS
    normalise   see normalise_target
    Returns the mean over all B * K * D elements as a float32 scalar (float64 for float64
    predictions); with per_token also the mean over D of each token, [B, K], without gradient. The
    target gets no gradient, and there is no second derivative. Sums are in float32 at least, in an
    order that does not depend on the thread count. Raises InputError on shapes and dtypes that do
    not fit, IndexError on an index outside [0, N) (a device assert on a GPU).
    """
    loss, _, tokens = mean_error(prediction, target, index, kind, normalise, mean, rstd, 1.0)
    return (loss, tokens) if per_token else loss


def weighted_mse(
    prediction, target, index=None, kind="mse", normalise="none", mean=None, rstd=None, weight=1.0
):
    """masked_mse for training: (weight * loss, to call backward() on; the loss, without gradient).

    The kernel makes the gradient in the forward pass, with the weight in it, so that the backward
    pass costs nothing where what comes in is 1, as it is in `(a + b).backward()`.
    """
    return mean_error(prediction, target, index, kind, normalise, mean, rstd, weight)[:2]


def mean_error(prediction, target, index, kind, normalise, mean, rstd, weight):
    """(weight * loss, to call backward() on; the loss, and [B, K] its tokens', no gradient)."""
    check_loss(prediction, target, index, kind, normalise, mean, rstd)
    target, mean, rstd = (x if x is None else x.detach() for x in (target, mean, rstd))
    if not has_kernel(prediction) or kind not in KINDS:
        loss, tokens = masked_mse_reference(prediction, target, index, kind, normalise, mean, rstd)
        return loss * weight, loss.detach(), tokens.detach()
    wanted = torch.is_grad_enabled() and prediction.requires_grad  # which a kernel cannot see
    loss, tokens, _ = torch.ops.salt_ops.masked_mse(
        prediction, target, index, kind, normalise, mean, rstd, weight, wanted
    )
    # its gradient has the weight in it; only its value is still to be weighted
    weighted = loss if weight == 1 else loss + loss.detach() * (weight - 1)
    return weighted, loss.detach(), tokens.detach()


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
    error = ERRORS[kind](p, y.to(p.dtype))
    tokens = error.mean(-1)  # [B, K]
    return tokens.mean(), tokens


# --------------------------------------------------------------------------- attention and products


def keep_freed_memory(one_place=False):
    """Have this process keep the memory it frees, so that a step on the CPU finds the pages of the
    step before. Linux with glibc; elsewhere nothing.

    By default large blocks go back to the system, and a step of ViT-L waits for 2 million fresh
    pages: a fifth of its time on a virtual machine, half of a probe's.

    one_place  call it before threads start, where many of these free what others ask for: by
               default glibc keeps a place for each
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX of malloc.h. What is asked for ahead
        # is touched bit by bit, 1.5 kB a step, so a large M_TOP_PAD looks like a leak until all of
        # it was touched: with 256 MB over 28,000 steps and on, with 4 MB it stood still.
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 24)):
            mallopt(option, value)
        if one_place:
            mallopt(-8, 1)


def is_bf16_here(x):
    """Whether x is bfloat16 on a CPU that multiplies it: what csrc/bfloat16.cpp is for."""
    return EXTENSION["bf16"] and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def on_tiles(x):
    """Whether the kernels for a processor's matrix tiles (AMX, bfloat16) take x."""
    return EXTENSION["amx"] and is_bf16_here(x)


def has_attention(qkv):
    """Whether a kernel takes them: heads of up to 128."""
    return is_bf16_here(qkv) and qkv.shape[4] <= 128


def attention(qkv, lengths):
    """Softmax attention inside each of a clip's spans: what several masks of one clip need that
    share a pass.

    qkv      [B, N, 3, H, d], queries, keys and values of a token side by side
    lengths  tokens of each span, N in sum
    Returns [B, N, H, d]. bfloat16 on a CPU with AMX or AVX512_BF16 runs on the extension, d <= 128;
    all else on PyTorch's scaled_dot_product_attention, a call a span: on a GPU in bfloat16 that is
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
    if has_attention(qkv):
        return torch.ops.salt_ops.attention(qkv, lengths)[0]
    return attention_reference(qkv, lengths)


def attention_reference(qkv, lengths):
    found = []
    for span in qkv.split(list(lengths), dim=1):
        q, k, v = (x.transpose(1, 2) for x in span.unbind(2))  # [B, H, n, d]
        found.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def cross_attention(q, kv, lengths):
    """Softmax attention of each span's queries to keys and values of its own.

    q [B, N, H, d], kv [B, S, 2, H, d]; lengths: (queries, keys) of each span, N and S in sum
    Returns [B, N, H, d], by the kernels that `attention` takes, or a call a span.
    """
    asked, given = ([pair[k] for pair in lengths] for k in (0, -1))
    if (
        kv.dim() != 5
        or q.dtype != kv.dtype
        or any(len(pair) != 2 for pair in lengths)
        or not lengths
        or q.shape != (kv.shape[0], sum(asked), *kv.shape[3:])
        or kv.shape[1:3] != (sum(given), 2)
        or min(*asked, *given) < 1
    ):
        raise InputError(
            "cross_attention takes q [B, N, H, d], kv [B, S, 2, H, d] of its dtype and the lengths"
            f" of their spans, N and S in sum; not {q.dtype} {list(q.shape)}, {kv.dtype}"
            f" {list(kv.shape)} and {list(lengths)}"
        )
    if has_attention(kv):
        return torch.ops.salt_ops.cross_attention(q, kv, asked, given)[0]
    return cross_attention_reference(q, kv, asked, given)


def cross_attention_reference(q, kv, asked, given):
    k, v = kv.unbind(2)
    parts = zip(*(x.transpose(1, 2).split(n, 2) for x, n in ((q, asked), (k, given), (v, given))))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2).transpose(1, 2)


def linear(x, weight, bias=None):
    """x [..., K] times weight [D, K] transposed, plus bias [D], which may have another dtype: [...,
    D] in x's dtype.

    bfloat16 on a CPU with AMX: the gradient of the weight multiplies a matrix that the extension
    has transposed, which oneDNN is twice as fast at.
    """
    if on_tiles(x) and x.dtype == weight.dtype:
        return TiledLinear.apply(x, weight, bias)
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def gelu(x):
    """x Phi(x) with the normal distribution Phi, in x's dtype: GELU, not its tanh approximation.

    bfloat16 on a CPU that multiplies it runs on the extension, closer to the exact value than
    PyTorch's, whose 1 + erf(x) has no digits left below -5.
    """
    return torch.ops.salt_ops.gelu(x) if is_bf16_here(x) else F.gelu(x)


def gelu_linear(x, weight, bias=None):
    """linear(gelu(x), weight, bias).

    On a CPU with AMX the backward pass makes gelu(x) again instead of keeping it: a quarter of a
    block's memory.
    """
    if on_tiles(x) and x.dtype == weight.dtype:
        return TiledLinear.apply(x, weight, bias, True)
    return linear(gelu(x), weight, bias)


class TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, of_gelu=False):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype, ctx.of_gelu = None if bias is None else bias.dtype, of_gelu
        return F.linear(
            gelu(x) if of_gelu else x, weight, None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        to_x = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        if ctx.of_gelu:
            to_x = None if to_x is None else torch.ops.salt_ops.gelu_backward(to_x, x)
            x = gelu(x)
        to_weight = sums = None
        if any(ctx.needs_input_grad[1:]):
            across, sums = torch.ops.salt_ops.transpose_and_sum(rows)
            to_weight = across @ x.reshape(-1, weight.shape[1]) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, sums.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None, None


# ------------------------------------------------------------------------------------ the data path


def patchify_into(clip, out, patch=16, tubelet=2):
    """ops.patchify of one clip, uint8 array [T, H, W, 3], written to the uint8 array `out` [N, P]:
    a place in a batch.

    Fastest for a clip whose channels lie in planes, as video.read_clip gives it.
    """
    if EXTENSION["devices"]:
        salt_ops.patchify(
            torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2))),
            patch,
            tubelet,
            torch.from_numpy(out),
        )
    else:
        t = clip.shape[0] // tubelet
        h = clip.shape[1] // patch
        w = clip.shape[2] // patch
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


def patchify(clip, patch=16, tubelet=2):
    """Clip [..., T, H, W, 3] -> patches [..., N, 3 * tubelet * patch * patch]: token n = (t * h +
    y) * w + x, vector (channel, dt, dy, dx).

    That is how a Conv3d patch embedding flattens its kernel. Works on numpy arrays and tensors of
    any dtype.
    """
    return rearrange(
        clip,
        "... (t dt) (y dy) (x dx) c -> ... (t y x) (c dt dy dx)",
        dt=tubelet,
        dy=patch,
        dx=patch,
    )


def unpatchify(patches, grid=(8, 14, 14), patch=16, tubelet=2):
    """The inverse of patchify: patches [..., N, P] -> clip [..., T, H, W, 3]."""
    t, y, x = grid
    return rearrange(
        patches,
        "... (t y x) (c dt dy dx) -> ... (t dt) (y dy) (x dx) c",
        t=t,
        y=y,
        x=x,
        dt=tubelet,
        dy=patch,
        dx=patch,
    )
