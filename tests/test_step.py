"""The training step: attention and products on the matrix tiles against float64, one pass over all
families against separate ones, the parts of train.py's loop against plain PyTorch."""

import copy
import functools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import model
from benchmarks import budget
from salt import ops, optimiser
from salt.errors import InputError
from salt.loader import Batch
from salt.masks import mask_counts, sample_masks
from salt.meter import Meter
from salt.positions import KINDS
from salt.score import Space, clip_errors

ROOT = Path(ops.__file__).resolve().parent.parent
needs_bf16 = pytest.mark.skipif(
    not ops.EXTENSION["bf16"], reason="needs the extension, and AMX or AVX512_BF16"
)
GRID, FAMILIES = (4, 6, 6), ("short", "long")


def make_salt(depth=2, families=FAMILIES, seed=0, seen=False, positions="table", attends="all"):
    torch.manual_seed(seed)
    encoder_config = model.EncoderConfig(
        dim=64, depth=depth, heads=2, mlp_dim=128, frames=8, size=96, positions=positions
    )
    salt = model.build_salt(
        encoder_config,
        {
            "dim_in": 64,
            "dim_out": 24,
            "tokens": 144,
            "families": list(families),
            "dim": 48,
            "depth": depth,
            "heads": 3,
            "seen": seen,
            "positions": positions,
            "grid": encoder_config.grid,
            "attends": attends,
        },
    )
    with torch.no_grad():  # zeros would hide mistakes
        for parameter in salt.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return salt


def some_batch(b=3, seed=0, families=FAMILIES):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(b) + 100 * seed
    return Batch(
        ids,
        torch.randint(0, 256, (b, 144, 1536), dtype=torch.uint8, generator=generator),
        torch.randn(b, 144, 24, generator=generator).half(),
        [sample_masks(ids, 0, 0, family, GRID) for family in families],
    )


SPACE = Space("latents", "none", None, None, torch.zeros(144, 24))


def distance(found, expected):
    """||found - expected|| / ||expected||"""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def attention_in_float64(qkv, lengths):
    found = []
    for span in qkv.double().split(list(lengths), 1):
        q, k, v = span.permute(2, 0, 3, 1, 4)
        found.append(
            (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v).transpose(
                1, 2
            )
        )
    return torch.cat(found, 1)


# ---------------------------------------------------------------------------------------- attention

SHAPES = [
    (1, (32,), 2, 64),
    (2, (40, 7), 3, 64),
    (1, (1, 33, 100), 2, 48),
    (2, (130, 300), 1, 88),
    (3, (16,), 1, 1),
    (1, (257, 129), 2, 128),
    (1, (31, 32, 33), 2, 80),
    (0, (5,), 2, 64),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("b, lengths, heads, d", SHAPES)
def test_attention_and_its_gradient(b, lengths, heads, d, dtype):
    torch.manual_seed(0)
    qkv = (torch.randn(b, sum(lengths), 3, heads, d) * 1.5).to(dtype).requires_grad_()
    gradient = torch.randn(b, sum(lengths), heads, d).to(dtype)
    found = ops.attention(qkv, lengths)
    (back,) = torch.autograd.grad(found, qkv, gradient)
    assert found.shape == gradient.shape and found.dtype == back.dtype == dtype
    if not b:
        return
    exact = qkv.detach().double().requires_grad_()
    expected = attention_in_float64(exact, lengths)
    (expected_back,) = torch.autograd.grad(expected, exact, gradient.double())
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-5  # bfloat16 itself rounds by up to 4e-3
    assert distance(found, expected) < limit and distance(back, expected_back) < limit
    plain = ops.attention_reference(qkv, lengths)
    (plain_back,) = torch.autograd.grad(plain, qkv, gradient)
    # no worse than PyTorch's own
    assert distance(found, expected) < 1.1 * distance(plain, expected) + 1e-6
    assert distance(back, expected_back) < 1.2 * distance(plain_back, expected_back) + 1e-6


@needs_bf16
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 128),
    st.integers(0, 100),
)
def test_attention_of_any_shape(lengths, heads, d, seed):
    torch.manual_seed(seed)
    qkv = torch.randn(2, sum(lengths), 3, heads, d).bfloat16().requires_grad_()
    gradient = torch.randn(2, sum(lengths), heads, d).bfloat16()
    found = ops.attention(qkv, lengths)
    (back,) = torch.autograd.grad(found, qkv, gradient)
    exact = qkv.detach().double().requires_grad_()
    expected = attention_in_float64(exact, lengths)
    (expected_back,) = torch.autograd.grad(expected, exact, gradient.double())
    # of so few numbers that their roundings do not average out
    assert distance(found, expected) < 5e-3 and distance(back, expected_back) < 1.6e-2


@needs_bf16
def test_attention_runs_on_its_kernel_in_bfloat16_and_on_flash_attention_otherwise():
    def kernels(qkv):
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
            torch.autograd.grad(ops.attention(qkv, (20, 12)).float().sum(), qkv)
        return {event.key for event in seen.key_averages()}

    half, full = (
        torch.randn(2, 32, 3, 2, 64, dtype=dtype, requires_grad=True)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert {"salt_ops::attention", "salt_ops::attention_backward"} <= kernels(half)
    assert {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    } <= kernels(full)
    wide = torch.randn(1, 8, 3, 1, 160, dtype=torch.bfloat16)
    torch.testing.assert_close(ops.attention(wide, (8,)), ops.attention_reference(wide, (8,)))


CROSS = [
    (2, ((40, 7), (9, 33)), 3, 64),
    (1, ((1, 300), (300, 1)), 2, 32),
    (2, ((192, 88),), 1, 48),
    (1, ((130, 129), (5, 64), (31, 32)), 2, 128),
    (3, ((16, 4),), 1, 1),
    (0, ((5, 6),), 2, 64),
]


def of_cross(b, lengths, heads, d, dtype, scale=1.5):
    torch.manual_seed(0)
    n, s = (sum(each) for each in zip(*lengths))
    q, kv = torch.randn(b, n, heads, d), torch.randn(b, s, 2, heads, d)
    inputs = [(x * scale).to(dtype).requires_grad_() for x in (q, kv)]
    return inputs, torch.randn(b, n, heads, d).to(dtype)


def in_float64(inputs, lengths):
    """The definition, span by span and head by head."""
    q, kv = inputs
    found, x, y = [], 0, 0
    for m, n in lengths:
        of_q = q[:, x : x + m].transpose(1, 2)
        k, v = kv[:, y : y + n].permute(2, 0, 3, 1, 4)
        weight = torch.softmax(of_q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        found.append((weight @ v).transpose(1, 2))
        x, y = x + m, y + n
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("b, lengths, heads, d", CROSS)
def test_cross_attention_and_its_gradients(b, lengths, heads, d, dtype):
    inputs, gradient = of_cross(b, lengths, heads, d, dtype)
    found = ops.cross_attention(*inputs, lengths)
    back = torch.autograd.grad(found, inputs, gradient)
    assert found.shape == gradient.shape and found.dtype == dtype
    assert [x.shape for x in back] == [x.shape for x in inputs]
    if not b:
        return
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = in_float64(exact, lengths)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-5
    assert distance(found, expected) < limit
    plain = ops.cross_attention_reference(*inputs, *zip(*lengths))
    plain_back = torch.autograd.grad(plain, inputs, gradient)
    for got, want, theirs in zip(back, wanted, plain_back, strict=True):
        assert distance(got, want) < max(limit, 1.2 * distance(theirs, want))


@needs_bf16
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 128),
)
def test_cross_attention_of_any_shape(lengths, heads, d):
    inputs, gradient = of_cross(2, lengths, heads, d, torch.bfloat16, 1.0)
    found = ops.cross_attention(*inputs, lengths)
    back = torch.autograd.grad(found, inputs, gradient)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = in_float64(exact, lengths)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    assert distance(found, expected) < 5e-3
    # where a span has one key the gradient of queries and of this key is 0 but for rounding
    together, exactly = (torch.cat([x.double().flatten() for x in y]) for y in (back, wanted))
    assert distance(together, exactly) < 1.6e-2


@needs_bf16
def test_cross_attention_of_the_same_tokens_is_attention():
    torch.manual_seed(0)
    qkv = torch.randn(2, 70, 3, 2, 48).bfloat16()
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]  # neither of them in one piece
    found = ops.cross_attention(q, kv, ((50, 50), (20, 20)))
    assert torch.equal(found, ops.attention(qkv, (50, 20)))


@needs_bf16
def test_targets_look_at_the_context_by_the_kernel():
    salt, batch = make_salt(attends="context"), some_batch()
    model.cast_matrices(salt, "bf16")
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
        model.salt_loss(salt, batch, SPACE)[0].backward()
    kernels = {"salt_ops::cross_attention", "salt_ops::cross_attention_backward"}
    assert kernels <= {event.key for event in seen.key_averages()}


def test_cross_attention_refuses_what_does_not_fit():
    q, kv = torch.zeros(1, 8, 2, 4), torch.zeros(1, 6, 2, 2, 4)
    for wrong in (
        (q, kv, ((8, 5),)),
        (q, kv, ((7, 6),)),
        (q, kv, ((8, 6), (0, 0))),
        (q[:, :, :1], kv, ((8, 6),)),
        (q, kv[:, :, :1], ((8, 6),)),
        (q, kv[0], ((8, 6),)),
        (q, kv, ()),
        (q, kv, ((8,),)),
        (q, kv.bfloat16(), ((8, 6),)),
    ):
        with pytest.raises(InputError, match="cross_attention takes"):
            ops.cross_attention(*wrong)


@needs_bf16
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3, 1e5, 1e8])
def test_attention_where_one_key_takes_all(scale):
    torch.manual_seed(1)
    qkv = (torch.randn(1, 70, 3, 2, 64) * scale).bfloat16().requires_grad_()
    found = ops.attention(qkv, (50, 20))
    expected = attention_in_float64(qkv.detach(), (50, 20))
    (back,) = torch.autograd.grad(found, qkv, torch.randn(found.shape).bfloat16())
    assert distance(found, expected) < 5e-3 and back.isfinite().all()


@needs_bf16
def test_a_nan_reaches_the_tokens_that_see_it_and_no_other():
    qkv = torch.randn(1, 40, 3, 1, 64).bfloat16()
    qkv[0, 3, 1] = math.nan  # a key of the first span
    qkv.requires_grad_()
    found = ops.attention(qkv, (30, 10))
    (back,) = torch.autograd.grad(found, qkv, torch.ones_like(found))
    assert (
        found[:, :30].isnan().all()
        and found[:, 30:].isfinite().all()
        and back[:, :30].isnan().any()
        and back[:, 30:].isfinite().all()
    )


@needs_bf16
def test_the_thread_count_does_not_show():
    code = """if True:
        import hashlib, sys, torch
        from salt import ops
        torch.manual_seed(0); torch.set_num_threads(int(sys.argv[1]))
        qkv = torch.randn(2, 90, 3, 3, 64).bfloat16(); g = torch.randn(2, 90, 3, 64).bfloat16()
        out, lse = torch.ops.salt_ops.attention(qkv, (50, 40))
        back = torch.ops.salt_ops.attention_backward(g, qkv, out, lse, (50, 40))
        across, sums = torch.ops.salt_ops.transpose_and_sum(g.reshape(180, 192))
        q, kv = torch.randn(2, 80, 3, 64).bfloat16(), torch.randn(2, 40, 2, 3, 64).bfloat16()
        spans = (70, 10), (9, 31)
        seen = torch.ops.salt_ops.cross_attention(q, kv, *spans)
        seen += torch.ops.salt_ops.cross_attention_backward(q, q, kv, *seen, *spans)
        wide = torch.randn(100_003).bfloat16()
        bent = torch.ops.salt_ops.gelu(wide)
        made = (out, lse, back, across, sums, *seen, bent)
        made += (torch.ops.salt_ops.gelu_backward(bent, wide),)
        made = [x.contiguous().view(torch.uint8).numpy() for x in made]
        print(hashlib.sha256(b"".join(x.tobytes() for x in made)).hexdigest())"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code, threads],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(runs) == 1


def test_attention_refuses_lengths_that_do_not_fit():
    for shape, lengths in (
        ((1, 8, 3, 1, 4), (4, 3)),
        ((1, 8, 3, 1, 4), (8, 0)),
        ((1, 8, 3, 1, 4), ()),
        ((1, 8, 2, 1, 4), (8,)),
        ((8, 3, 1, 4), (8,)),
    ):
        with pytest.raises(InputError, match="attention takes"):
            ops.attention(torch.zeros(shape), lengths)


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


@needs_bf16
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda op: op.attention(torch.zeros(1, 8, 3, 1, 4), (8,)), "must be bfloat16"),
        (lambda op: op.attention(torch.zeros(1, 8, 3, 1, 4).bfloat16(), (7,)), "add up to 7"),
        (lambda op: op.attention(torch.zeros(1, 8, 3, 1, 4).bfloat16(), (9, -1)), "a span has 9"),
        (lambda op: op.attention(torch.zeros(1, 8, 3, 1, 200).bfloat16(), (8,)), "1 <= d <= 128"),
        (
            lambda op: op.attention_backward(
                torch.zeros(1, 8, 1, 5).bfloat16(),
                torch.zeros(1, 8, 3, 1, 4).bfloat16(),
                torch.zeros(1, 8, 1, 4).bfloat16(),
                torch.zeros(1, 1, 8),
                (8,),
            ),
            "must be",
        ),
        (
            lambda op: op.attention_backward(
                torch.zeros(1, 8, 1, 4).bfloat16(),
                torch.zeros(1, 8, 3, 1, 4).bfloat16(),
                torch.zeros(1, 8, 1, 4).bfloat16(),
                torch.zeros(1, 8),
                (8,),
            ),
            "lse must be",
        ),
        (lambda op: op.cross_attention(half(1, 8, 1, 4), half(1, 6, 2, 2, 4), (8,), (6,)), "q has"),
        (lambda op: op.cross_attention(half(1, 8, 1, 4), half(1, 6, 2, 1, 4), (8,), (5,)), "to 5"),
        (lambda op: op.transpose_and_sum(torch.zeros(3, 4)), "must be bfloat16"),
        (lambda op: op.transpose_and_sum(torch.zeros(3).bfloat16()), r"must be \[R, C\]"),
        (lambda op: op.gelu(torch.zeros(3)), "must be bfloat16"),
        (lambda op: op.gelu_backward(torch.zeros(3), torch.zeros(3).bfloat16()), "gradient is"),
        (
            lambda op: op.gelu_backward(torch.zeros(4).bfloat16(), torch.zeros(3).bfloat16()),
            "gradient has shape",
        ),
    ],
)
def test_the_kernels_check_what_they_get(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.salt_ops)


@needs_bf16
def test_opcheck():
    qkv = torch.randn(2, 9, 3, 2, 8).bfloat16()
    out, lse = torch.ops.salt_ops.attention(qkv, (5, 4))
    q, kv = torch.randn(2, 7, 2, 8).bfloat16(), torch.randn(2, 6, 2, 2, 8).bfloat16()
    seen, sums = torch.ops.salt_ops.cross_attention(q, kv, (3, 4), (5, 1))
    checks = [
        (torch.ops.salt_ops.attention, (qkv.requires_grad_(), (5, 4))),
        (torch.ops.salt_ops.attention_backward, (out, qkv.detach(), out, lse, (5, 4))),
        (
            torch.ops.salt_ops.cross_attention,
            (q.clone().requires_grad_(), kv.clone().requires_grad_(), (3, 4), (5, 1)),
        ),
        (torch.ops.salt_ops.cross_attention_backward, (seen, q, kv, seen, sums, (3, 4), (5, 1))),
        (torch.ops.salt_ops.transpose_and_sum, (torch.randn(5, 7).bfloat16(),)),
        (torch.ops.salt_ops.gelu, (torch.randn(5, 7).bfloat16().requires_grad_(),)),
        (torch.ops.salt_ops.gelu_backward, (torch.randn(5, 7).bfloat16(),) * 2),
    ]
    for op, arguments in checks:
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


# --------------------------------------------------------------------------------------------- GELU


def every_bfloat16():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()]


def off(found, expected):
    """The largest and the mean distance, relative to what is expected; where that is a normal
    number of bfloat16.
    """
    normal = expected.abs() > 2.0**-126
    relative = ((found.double() - expected) / expected)[normal].abs()
    return relative.max().item(), relative.mean().item()


@needs_bf16
def test_gelu_of_every_number():
    x = every_bfloat16()
    exact = x.double()[x.abs() < 13]  # beyond, phi(x) is below bfloat16's normal numbers
    phi = torch.special.erfc(-exact / math.sqrt(2)) / 2
    slope = phi + exact * torch.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    few = x[x.abs() < 13]
    most, mean = off(ops.gelu(few), exact * phi)
    assert most < 2**-8 and mean < 2**-10  # half of the last bit is 2^-9
    assert mean < off(F.gelu(few), exact * phi)[1]
    leaf = few.clone().requires_grad_()
    upstream = torch.full_like(few, -0.5)
    (found,) = torch.autograd.grad(ops.gelu(leaf), leaf, upstream)
    near_zero = (exact + 0.7518).abs() < 0.05  # where the slope is 0
    assert off(found[~near_zero], -slope[~near_zero] / 2)[0] < 2**-6
    assert (found.double() + slope / 2)[near_zero].abs().max() < 2**-12
    assert torch.equal(ops.gelu(x[x >= 13]), x[x >= 13])
    assert (ops.gelu(x[x <= -13]).abs() < 2.0**-120).all()


@needs_bf16
@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (33,), (3, 70, 40)])
def test_gelu_of_any_shape(shape):
    torch.manual_seed(0)
    x, upstream = torch.randn(2, *shape).bfloat16()
    if len(shape) > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)  # strides of its own
    x.requires_grad_()
    found = ops.gelu(x)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    assert found.shape == gradient.shape == x.shape
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-7, atol=1e-4)


@needs_bf16
def test_gelu_of_what_is_no_number():
    x = torch.tensor([math.nan, math.inf, -0.0]).bfloat16().requires_grad_()
    found = ops.gelu(x)
    (gradient,) = torch.autograd.grad(found, x, torch.ones_like(found))
    assert found.tolist()[0] != found.tolist()[0] and found.tolist()[1:] == [math.inf, 0]
    assert gradient[0].isnan() and gradient[2] == 0.5


# ------------------------------------------------------------------------------------------- linear


@needs_bf16
@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (5, 3), (32, 32), (33, 65), (100, 31), (928, 96), (0, 4), (4, 0)]
)
def test_transposition_and_sums(rows, columns):
    x = torch.randn(rows, columns).bfloat16()
    across, sums = torch.ops.salt_ops.transpose_and_sum(x)
    assert torch.equal(across, x.T)
    torch.testing.assert_close(sums, x.float().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_and_its_gradients(dtype, bias, gelu):
    torch.manual_seed(0)
    x = torch.randn(2, 70, 40).to(dtype).requires_grad_()
    weight = torch.randn(24, 40).to(dtype).requires_grad_()
    extra = torch.randn(24, requires_grad=True) if bias else None
    upstream = torch.randn(24, 2, 70).to(dtype).permute(1, 2, 0)  # not contiguous
    found = (ops.gelu_linear if gelu else ops.linear)(x, weight, extra)
    inputs = [x, weight] + [extra] * bias
    gradients = torch.autograd.grad(found, inputs, upstream)
    exact = [y.detach().double().requires_grad_() for y in inputs]
    expected = F.linear(F.gelu(exact[0]) if gelu else exact[0], *exact[1:])
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert distance(found, expected) < limit and found.dtype == dtype
    for got, want, like in zip(
        gradients, torch.autograd.grad(expected, exact, upstream.double()), inputs, strict=True
    ):
        assert got.dtype == like.dtype and distance(got, want) < limit


# --------------------------------------------------------------------------------- one pass for all


@pytest.mark.parametrize("positions", KINDS)
def test_one_pass_gives_what_a_pass_a_family_gives(positions):
    salt, batch = make_salt(positions=positions), some_batch()
    together = salt(batch.patches, batch.masks)
    for drawn in batch.masks:
        alone = salt(batch.patches, [drawn])[drawn.family]
        torch.testing.assert_close(together[drawn.family], alone, rtol=1e-4, atol=1e-5)
    swapped = salt(batch.patches, batch.masks[::-1])
    torch.testing.assert_close(swapped["short"], together["short"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", KINDS)
def test_masks_of_one_clip_do_not_see_each_other(positions):
    salt, batch = make_salt(positions=positions), some_batch(1)
    patches, masks = batch.patches, batch.masks
    seen, other = (drawn.context[0].tolist() for drawn in masks)
    only_short = [n for n in seen if n not in other]
    changed = patches.clone()
    changed[0, only_short] = 255 - changed[0, only_short]
    before, after = salt(patches, masks), salt(changed, masks)
    assert torch.equal(before["long"], after["long"]) and not torch.equal(
        before["short"], after["short"]
    )


def test_nothing_is_computed_for_tokens_that_no_mask_asks_for():
    salt, batch = make_salt(), some_batch()
    rows = {}
    for name in (
        "student.patch_embed",
        "student.blocks.0.fc1",
        "predictor.embed",
        "predictor.blocks.1.fc2",
        "predictor.proj",
    ):
        salt.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: rows.update(
                {name: rows.get(name, 0) + given[0].shape[:-1].numel()}
            )
        )
    salt(batch.patches, batch.masks)
    context, target = (
        sum(getattr(drawn, part).shape[1] for drawn in batch.masks) * 3
        for part in ("context", "target")
    )
    assert rows == {
        "student.patch_embed": context,
        "student.blocks.0.fc1": context,
        "predictor.embed": context,
        "predictor.blocks.1.fc2": context + target,
        "predictor.proj": target,
    }


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("attends", ["all", "context"])
def test_the_budget_counts_what_torch_counts(seen, attends):
    salt, batch = make_salt(seen=seen, attends=attends), some_batch(2)
    predictor = {"dim": 48, "depth": 2, "dim_out": 24, "seen": seen, "attends": attends}
    # as plain products, which it knows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = model.salt_loss(salt, batch, SPACE, context=1.0)
        forward = counter.get_total_flops()
        loss.backward()
    counts = [mask_counts(drawn.family, GRID) for drawn in batch.masks]
    parts = budget.forward_parts(salt.student.config, predictor, counts)
    assert forward == 2 * sum(part.forward for part in parts)
    step = 2 * budget.step_flops(salt.student.config, predictor, counts)
    # pixels need no gradient, which torch does not compute and the usual count of three passes
    # includes
    pixels = 2 * 2 * parts[0].forward / 2
    assert counter.get_total_flops() == step - pixels


# -------------------------------------------------------------------------------- numbers of a step


def run_steps(salt, steps, dtype="fp32", families=FAMILIES, accumulate=1):
    """train.py's loop, over batches of 4: the losses."""
    optimizer = torch.optim.AdamW(
        optimiser.parameter_groups(salt, 0.04), lr=1e-3, betas=(0.9, 0.95), fused=True
    )
    losses = []
    for seed in range(steps):
        model.cast_matrices(salt, dtype)
        total = 0
        for part in some_batch(4, seed, families).split(accumulate):
            loss, errors = model.salt_loss(salt, part, SPACE, weight=1 / accumulate)
            loss.backward()
            total += errors[0].item() / accumulate
        optimiser.update(optimizer, list(salt.parameters()), 0.02)
        losses.append(total)
    return losses


def plain_steps(salt, steps):
    """The same in plain PyTorch, float32: modules called a family at a time, gather, mse_loss,
    clip_grad_norm_, AdamW tensor by tensor.
    """
    student = salt.student
    predictor = salt.predictor
    config = salt.student.config

    def attention(module, x):
        bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
        q, k, v = (
            (x @ module.qkv.weight.T + bias)
            .unflatten(-1, (3, module.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        return F.linear(
            (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v)
            .transpose(1, 2)
            .flatten(2),
            module.proj.weight,
            module.proj.bias,
        )

    def blocks(modules, x):
        for block in modules:
            x = x + attention(block.attn, block.norm1(x))
            x = x + F.linear(
                F.gelu(F.linear(block.norm2(x), block.fc1.weight, block.fc1.bias)),
                block.fc2.weight,
                block.fc2.bias,
            )
        return x

    optimizer = torch.optim.AdamW(
        optimiser.parameter_groups(salt, 0.04), lr=1e-3, betas=(0.9, 0.95), foreach=False
    )
    losses = []
    for seed in range(steps):
        _, patches, latents, masks, _ = some_batch(4, seed)
        pixels = (
            patches.float().unflatten(-1, (3, -1)) / 255 - torch.tensor(config.mean)[:, None]
        ) / torch.tensor(config.std)[:, None]
        total = 0
        for number, drawn in enumerate(masks):

            def at(x, index):
                return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

            x = (
                F.linear(pixels.flatten(-2), student.patch_embed.weight, student.patch_embed.bias)
                + student.position.table
            )
            x = student.norm(blocks(student.blocks, at(x, drawn.context)))
            x = torch.cat(
                [
                    F.linear(x, predictor.embed.weight, predictor.embed.bias)
                    + predictor.position.table[drawn.context],
                    predictor.mask_tokens[number] + predictor.position.table[drawn.target],
                ],
                1,
            )
            prediction = F.linear(
                predictor.norm(blocks(predictor.blocks, x)),
                predictor.proj.weight,
                predictor.proj.bias,
            )[:, drawn.context.shape[1] :]
            total = total + F.mse_loss(prediction, at(latents, drawn.target).float()) / 2
        total.backward()
        torch.nn.utils.clip_grad_norm_(salt.parameters(), 0.02, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def test_losses_follow_plain_fp32_pytorch():
    plain = plain_steps(make_salt(), 8)
    assert plain[-1] < plain[0] - 0.05  # it learns something, so that the optimiser counts
    assert run_steps(make_salt(), 8) == pytest.approx(plain, rel=2e-5)
    assert run_steps(make_salt(), 8, "bf16") == pytest.approx(plain, rel=3e-3)


def test_a_batch_in_parts_and_blocks_run_again_change_nothing():
    whole = run_steps(make_salt(), 4)
    assert run_steps(make_salt(), 4, accumulate=2) == pytest.approx(whole, rel=1e-5)
    salt = make_salt()
    salt.student.recompute = salt.predictor.recompute = True
    assert run_steps(salt, 4) == whole
    salt.load_state_dict(make_salt().state_dict())
    assert run_steps(salt, 4, "bf16") == run_steps(make_salt(), 4, "bf16")


def test_recomputation_keeps_less():
    def kept(recompute):
        salt, sizes = make_salt(4), []
        salt.student.recompute = salt.predictor.recompute = recompute
        batch = some_batch()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (
                sizes.append(x.numel() * x.element_size() * (not x.is_leaf or not x.requires_grad))
                or x
            ),
            lambda x: x,
        ):
            salt(batch.patches, batch.masks)
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def test_gradients_of_the_working_copies_are_autocasts():
    """bfloat16 copies made once a step give the gradients that autocast gives, in float32, as close
    to the exact ones.
    """

    def gradients(salt, forward):
        loss, _ = model.salt_loss(functools.partial(forward, salt), some_batch(), SPACE)
        loss.backward()
        return {name: parameter.grad for name, parameter in salt.named_parameters()}

    def working(salt, patches, masks):
        model.cast_matrices(salt, "bf16")
        return salt(patches, masks)

    def autocast(salt, patches, masks):
        with torch.autocast("cpu", torch.bfloat16):
            return salt(patches, masks)

    exact, found, theirs = (
        gradients(make_salt(), forward)
        for forward in (lambda salt, *x: salt(*x), working, autocast)
    )

    def flat(x):
        return torch.cat([value.flatten() for value in x.values()])

    assert all(value.dtype == torch.float32 for value in found.values())
    assert distance(flat(found), flat(exact)) < 1.2 * distance(flat(theirs), flat(exact)) < 0.02


def test_working_copies_leave_no_trace():
    salt, batch = make_salt(), some_batch()
    patches, masks = batch.patches, batch.masks
    before, names = salt(patches, masks)["long"], set(salt.state_dict())
    model.cast_matrices(salt, "bf16")
    half = salt(patches, masks)["long"]
    assert half.dtype == torch.bfloat16 and set(salt.state_dict()) == names
    model.cast_matrices(salt, "fp32")
    assert torch.equal(salt(patches, masks)["long"], before)
    model.cast_matrices(salt, "bf16")
    twin = copy.deepcopy(salt)  # none of these goes on with the old copies
    assert torch.equal(twin(patches, masks)["long"], before)
    salt.load_state_dict(make_salt(seed=1).state_dict())
    assert (
        torch.equal(salt(patches, masks)["long"], make_salt(seed=1)(patches, masks)["long"])
        and salt(patches, masks)["long"].dtype == torch.float32
    )
    model.cast_matrices(salt, "bf16")
    assert salt.float()(patches, masks)["long"].dtype == torch.float32


def test_a_step_is_skipped_where_any_of_its_sums_is_not_finite():
    """L1 of an infinite target has a finite gradient: its loss must tell."""

    def loss_of(*sums):
        return Meter.loss.fget(types.SimpleNamespace(sums=torch.tensor(sums)))

    assert loss_of(0.7, 3.0, 4.0, 5.0, 6.0) == torch.tensor(0.7)
    assert not loss_of(0.7, 3.0, 4.0, torch.inf, 6.0).isfinite()


@pytest.mark.parametrize("clip", [0.02, 0])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(clip):
    parameter = torch.nn.Parameter(torch.randn(50))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for bad in (False, True, False):
        parameter.grad = torch.full((50,), math.inf if bad else 0.5)
        before = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        assert (
            optimiser.update(optimizer, [parameter], clip).isfinite() != bad
            and parameter.grad is None
        )
        assert torch.equal(parameter, before[0]) == bad
        if bad:
            assert all(
                torch.equal(value, before[1][0][name])
                for name, value in optimizer.state_dict()["state"][0].items()
            )


def test_a_moving_average_moves_and_keeps_no_graph():
    salt, average = make_salt(), make_salt(seed=1).requires_grad_(False)
    before = [parameter.clone() for parameter in average.parameters()]
    optimiser.move_average(average, salt, 0.9)
    for old, new, now in zip(before, salt.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new.detach())
        assert now.is_leaf and not now.requires_grad


@pytest.mark.parametrize("clip", [0.02, 100.0, 0])
def test_an_update_is_clip_grad_norm_and_adamw(clip):
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(x.clone()) for x in (torch.ones(30), torch.ones(4, 5))]
        for _ in range(2)
    )
    fused = torch.optim.AdamW(ours, lr=0.1, fused=True)
    plain = torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        norm = optimiser.update(fused, ours, clip)
        torch.testing.assert_close(
            norm, torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf, foreach=False)
        )
        plain.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_blocks_are_compiled_once_and_agree():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    expected = run_steps(make_salt(3), 4, "bf16")
    salt = make_salt(3)
    for block in (*salt.student.blocks, *salt.predictor.blocks):
        block.compile(dynamic=False, backend="aot_eager")  # with C++: test_stages' --compile on
    found = run_steps(salt, 1, "bf16")
    compiled = counters["frames"]["ok"], counters["stats"]["unique_graphs"]
    assert compiled == (2, 2)  # one for the student's blocks, one for the predictor's
    # a held-out evaluation, with a smaller batch at its end
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        clip_errors(salt, SPACE, some_batch(1))
    salt.load_state_dict(make_salt(3).state_dict())
    found = run_steps(salt, 4, "bf16")
    assert (counters["frames"]["ok"], counters["stats"]["unique_graphs"]) == compiled
    assert found == pytest.approx(expected, rel=2e-3)


# ----------------------------------------------------------------------------------------- bench.py


def test_bench_compares_and_counts(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/bench.py",
            "step",
            *"""--sizes tiny --batch_sizes 1 --rounds 3 --variants textbook,ours,loader
--depth 1 --predictor_depth 1 --predictor_dim 64 --no_memory --no_attention
--clips 4 --dtype fp32""".split(),
            "--folder",
            str(tmp_path),
            "--json",
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(next(tmp_path.glob("step-*.json")).read_text())["results"]["steps"]
    assert (
        set(step["seconds"]) == {"textbook", "ours", "loader"}
        and len(step["losses"]) == 3
        and "x the textbook's speed" in done.stdout
    )
    assert step["flops"] == budget.step_flops(
        model.config_of_size("tiny", depth=1),
        {"dim": 64, "depth": 1, "dim_out": 768},
        [(352, 784), (112, 1088)],
    )
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "budget", "--sizes", "tiny", "--batch_size", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    counts = [(352, 784), (112, 1088)]
    default = {"dim": 512, "depth": 12, "dim_out": 768}
    flops = budget.step_flops(model.config_of_size("tiny"), default, counts)
    assert done.returncode == 0 and f"{flops / 1e9:.0f}" in done.stdout


def test_a_line_says_where_more_threads_do_not_help(monkeypatch):
    before = torch.get_num_threads()
    asked = []

    def rate(device, dtype):
        asked.append(torch.get_num_threads())
        return 1e12

    monkeypatch.setattr(budget, "matrix_rate", rate)
    torch.set_num_threads(2)
    try:
        assert (
            "2 compute threads multiply matrices 1.0 times as fast as one"
            in budget.fewer_threads(torch.device("cpu"), "bf16", 1.02e12)
        )
        assert (
            budget.fewer_threads(torch.device("cpu"), "bf16", 1.9e12) is None
            and asked == [1, 1]
            and torch.get_num_threads() == 2
        )
        torch.set_num_threads(1)
        assert budget.fewer_threads(torch.device("cpu"), "bf16", 1e12) is None
    finally:
        torch.set_num_threads(before)
