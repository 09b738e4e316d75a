"""Gather, patches and loss: the extension and the reference against plain PyTorch, values and
gradients.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from salt import extension, ops
from salt.errors import InputError
from salt.masks import mask_spec, sample_masks

needs_extension = pytest.mark.skipif(
    not ops.EXTENSION["devices"], reason="the extension is not built"
)


SPEC = mask_spec("short", (4, 6, 6), None)


def rows(b, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(b)])


@needs_extension
def test_the_extension_is_what_runs():
    assert ops.EXTENSION["devices"] and extension.MISSING is None
    x = torch.randn(2, 5, 3, requires_grad=True)
    assert "masked_gather" in ops.masked_gather(x, rows(2, 5, 2)).grad_fn.name()


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        ("8.0;9.0;12.0+PTX", (8, 0), True),
        ("8.0;9.0;12.0+PTX", (8, 6), True),
        ("8.0;9.0;12.0+PTX", (7, 5), False),
        ("8.0;9.0", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("8.6", (8, 0), False),
        ("8.0 9.0+PTX", (12, 1), True),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(architectures, capability, runs):
    assert extension.covers(architectures, capability) == runs


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]
)
@pytest.mark.parametrize(
    "shape", [(2, 7, 5, 3), (1, 1, 1, 1), (3, 64, 768, 40), (2, 6, 4, 0), (0, 6, 4, 0)]
)
def test_gather_copies_the_rows_asked_for(dtype, shape):
    b, n, d, k = shape
    x = (torch.randn(b, n, d) * 50).abs().to(dtype)
    index = rows(b, n, k) if b else torch.zeros(0, k, dtype=torch.int64)
    expected = torch.stack([x[i][index[i]] for i in range(b)]) if b else x[:, :0]
    assert torch.equal(ops.masked_gather(x, index), expected)
    assert torch.equal(ops.masked_gather_reference(x, index), expected)


def test_gather_takes_strided_input():
    x = torch.randn(4, 9, 12).transpose(1, 2)
    index = rows(4, 12, 10).repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(ops.masked_gather(x, index), ops.masked_gather_reference(x, index))


def test_gather_gradient_scatters_into_zeros():
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    index = rows(2, 6, 3)
    assert torch.autograd.gradcheck(ops.masked_gather, (x, index))
    ops.masked_gather(x, index).sum().backward()
    expected = torch.zeros(2, 6, 4, dtype=torch.float64)
    for b in range(2):
        expected[b, index[b]] = 1
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("bad", [-1, 6])
def test_an_index_out_of_range_is_an_error(bad):
    x, index = torch.randn(2, 6, 4), rows(2, 6, 3)
    index[1, 2] = bad
    for call in (
        ops.masked_gather,
        ops.masked_gather_reference,
        lambda x, i: ops.masked_mse(torch.zeros(2, 3, 4), x, i),
    ):
        with pytest.raises(IndexError):
            call(x, index)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(InputError, match="masked_gather takes"):
        ops.masked_gather(torch.randn(2, 6, 4), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="masked_mse takes"):
        ops.masked_mse(torch.randn(2, 3, 4), torch.randn(2, 4, 4))
    with pytest.raises(InputError, match="unknown loss"):
        ops.masked_mse(torch.randn(2, 3, 4), torch.randn(2, 3, 4), kind="rmse")


def textbook(prediction, target, index, kind="mse", normalise="none", mean=None, rstd=None):
    """(loss, per-token error) in float64, written out from the definitions; `target` uint8 is
    pixels.
    """
    y = (target.float() / 255 if target.dtype == torch.uint8 else target).double()
    position = torch.arange(target.shape[1]).expand(len(target), -1) if index is None else index
    y = (
        torch.stack([y[b, position[b]] for b in range(len(y))])
        if len(y)
        else y[:, : prediction.shape[1]]
    )
    if normalise == "layer_norm":
        y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if normalise == "standardise":
        y = (y - mean.double()[position]) * rstd.double()[position]
    d = prediction.double() - y
    error = (
        d**2
        if kind == "mse"
        else d.abs()
        if kind == "l1"
        else torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)
    )
    return error.mean(), error.mean(-1)


@pytest.mark.parametrize("prediction_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "target_dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("normalise", ops.NORMALISATIONS)
def test_loss_and_gradient_match_their_definition(
    prediction_dtype, target_dtype, indexed, kind, normalise
):
    torch.manual_seed(0)
    for width in (96, 37):
        prediction = torch.randn(3, 20, width).to(prediction_dtype).requires_grad_()
        target = (
            (torch.randn(3, 31 if indexed else 20, width) * 60).abs().clamp(0, 255).to(target_dtype)
        )
        target = target if target_dtype == torch.uint8 else target / 60
        index = rows(3, 31, 20) if indexed else None
        mean = torch.randn(target.shape[1], width)
        rstd = torch.rand(target.shape[1], width) + 0.5
        loss, tokens = ops.masked_mse(
            prediction, target, index, kind, normalise, mean, rstd, per_token=True
        )
        (loss * 3).backward()
        truth = prediction.detach().double().requires_grad_()
        expected, expected_tokens = textbook(truth, target, index, kind, normalise, mean, rstd)
        (expected * 3).backward()
        assert (
            loss.dtype
            == tokens.dtype
            == (torch.float64 if prediction_dtype == torch.float64 else torch.float32)
            and not tokens.requires_grad
        )
        close = 1e-9 if prediction_dtype == torch.float64 else 2e-6
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=close, atol=0)
        torch.testing.assert_close(
            tokens.double(), expected_tokens.detach(), rtol=10 * close, atol=1e-7
        )
        coarse = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2**-7}[prediction_dtype]
        torch.testing.assert_close(prediction.grad.double(), truth.grad, rtol=coarse, atol=1e-7)


@pytest.mark.parametrize("dtype", ops.PREDICTIONS)
def test_a_loss_of_ones_own(monkeypatch, dtype):
    """An entry of ERRORS is enough, whether the extension is there or not."""

    def huber(p, y):
        return F.huber_loss(p, y, reduction="none", delta=0.5)

    monkeypatch.setitem(ops.ERRORS, "huber", huber)
    monkeypatch.setitem(
        ops.ERRORS, "cosine", lambda p, y: 1 - F.cosine_similarity(p, y, -1)[..., None]
    )
    prediction, target = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 9, 24).half()
    index = rows(2, 9, 5)
    wanted = torch.stack([clip[row] for clip, row in zip(target, index)])
    for kind in ("huber", "cosine"):
        made, leaf = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
        weighted, loss = ops.weighted_mse(made, target, index, kind, weight=0.25)
        weighted.backward()
        wide = leaf if dtype == torch.float64 else leaf.float()
        expected = ops.ERRORS[kind](wide, wanted.to(wide.dtype)).mean()
        (expected * 0.25).backward()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(made.grad, leaf.grad)
        alone, tokens = ops.masked_mse(prediction, target, index, kind, per_token=True)
        assert tokens.shape == (2, 5) and torch.equal(alone, loss)


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("dtype", ops.PREDICTIONS)
def test_the_weighted_gradient_comes_with_the_loss(kind, dtype):
    prediction = torch.randn(2, 5, 24).to(dtype)
    target = torch.randn(2, 9, 24).half()
    index = rows(2, 9, 5)
    made = prediction.clone().requires_grad_()
    weighted, loss = ops.weighted_mse(made, target, index, kind, "layer_norm", weight=0.25)
    (weighted + weighted.detach()).backward()
    gradient = made.grad
    assert weighted.item() == pytest.approx(0.25 * loss.item()) and not loss.requires_grad
    leaf = prediction.clone().requires_grad_()
    expected = ops.masked_mse(leaf, target, index, kind, "layer_norm")
    (expected * 0.25).backward()
    assert torch.equal(loss, expected.detach()) and gradient.dtype == dtype
    torch.testing.assert_close(
        gradient, leaf.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


@needs_extension
def test_half_precision_is_read_exactly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    for dtype in (torch.float16, torch.bfloat16):
        values = finite.to(dtype)[None, :, None]
        _, tokens = ops.masked_mse(
            torch.zeros(values.shape, dtype=torch.float64), values, per_token=True
        )
        assert torch.equal(tokens, values.double()[..., 0] ** 2)
    _, tokens = ops.masked_mse(
        torch.zeros(1, 2, 1),
        torch.tensor([[[float("inf")], [float("nan")]]]).half(),
        per_token=True,
    )
    assert tokens[0, 0].isinf() and tokens[0, 1].isnan()


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("normalise", ops.NORMALISATIONS)
def test_gradients_in_float64(kind, normalise):
    torch.manual_seed(1)
    prediction = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    target, index = torch.randn(2, 7, 5, dtype=torch.float64), rows(2, 7, 4)
    mean, rstd = torch.randn(7, 5, dtype=torch.float64), torch.rand(7, 5, dtype=torch.float64) + 0.5

    def loss(p):
        return ops.masked_mse(p, target, index, kind, normalise, mean, rstd)

    assert torch.autograd.gradcheck(loss, prediction)


def test_standardise_uses_the_statistics_of_each_position():
    target, index = torch.randn(1, 5, 3), torch.tensor([[4, 1]])
    mean, rstd = torch.randn(5, 3), torch.rand(5, 3)
    expected = torch.stack([(target[0, n] - mean[n]) * rstd[n] for n in (4, 1)])[None]
    assert (
        ops.masked_mse(expected, target, index, normalise="standardise", mean=mean, rstd=rstd)
        < 1e-12
    )


@needs_extension
def test_the_saved_gradient_is_not_changed_by_backward():
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    loss = ops.masked_mse(prediction, torch.randn(2, 3, 4))
    (first,) = torch.autograd.grad(loss * 5, prediction, retain_graph=True)
    (second,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(first, 5 * second)


@needs_extension
@pytest.mark.parametrize("dtype", ops.PREDICTIONS)
def test_backward_costs_nothing_where_the_scale_is_one(dtype):
    class Large(TorchDispatchMode):
        """Notes the operators that make or read a tensor of more than one number."""

        seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if (
                any(isinstance(x, torch.Tensor) and x.numel() > 1 for x in (*args, out))
                and func is not torch.ops.aten.detach.default
            ):
                self.seen.append(str(func))
            return out

    prediction = torch.randn(2, 3, 4).to(dtype).requires_grad_()
    for scale, expected in ((1, False), (0.5, True)):
        loss = ops.masked_mse(prediction, torch.randn(2, 3, 4)) * scale
        with Large() as mode:
            mode.seen = []
            torch.autograd.grad(loss, prediction)
        assert (
            any("mul" in name or "copy" in name or "zeros" in name for name in mode.seen)
            == expected
        ), mode.seen


@needs_extension
def test_the_loss_does_not_depend_on_the_thread_count():
    prediction = torch.randn(4, 100, 96)
    target = torch.randn(4, 200, 96).half()
    index = rows(4, 200, 100)
    threads, losses = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            losses.append(ops.masked_mse(prediction, target, index).item())
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == losses[1] == losses[2]


def test_no_gradient_is_made_where_none_is_wanted():
    loss = ops.masked_mse(torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True))
    assert not loss.requires_grad


def test_patches_are_normalised_and_gathered():
    patches, index = torch.randint(0, 256, (3, 11, 3 * 14), dtype=torch.uint8), rows(3, 11, 6)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def a_channel(values):
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(14)

    expected = (patches.double() / 255 - a_channel(mean)) / a_channel(std)
    whole = ops.patch_normalise(patches, mean, std)
    some = ops.patch_normalise(patches, mean, std, index)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(some, torch.stack([whole[b, index[b]] for b in range(3)]))
    assert torch.equal(
        ops.patch_normalise(patches, mean, std, index, torch.bfloat16), some.bfloat16()
    )
    plain = ops.patch_normalise_reference(
        patches, [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)], index
    )
    assert torch.equal(some, plain)
    grey = ops.patch_normalise(patches, (0.5,), (0.25,))
    torch.testing.assert_close(
        grey.double(), (patches.double() / 255 - 0.5) / 0.25, rtol=1e-6, atol=1e-6
    )


def test_patches_that_do_not_fit_are_an_error():
    patches = torch.zeros(2, 5, 12, dtype=torch.uint8)
    with pytest.raises(InputError, match="not torch.float16"):
        ops.patch_normalise(patches, (0,), (1,), dtype=torch.float16)
    for bad in (
        lambda: ops.patch_normalise(patches.float(), (0,), (1,)),
        lambda: ops.patch_normalise(patches, (0,) * 3, (1,) * 2),
        lambda: ops.patch_normalise(patches, (), ()),
        lambda: ops.patch_normalise(patches, (0,), (0,)),
        lambda: ops.patch_normalise(patches, (0,) * 6, (1,) * 6),
        lambda: ops.patch_normalise(patches[..., :11], (0,) * 3, (1,) * 3),
        lambda: ops.patch_normalise(patches, (0,), (1,), rows(3, 5, 2)),
    ):
        with pytest.raises(InputError, match="patch_normalise takes"):
            bad()
    with pytest.raises(IndexError):
        ops.patch_normalise(patches, (0,), (1,), torch.tensor([[0], [5]]))


@needs_extension
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda op: op.masked_gather(torch.randn(2, 6, 4), torch.zeros(2, 3)), "must be int64"),
        (lambda op: op.masked_gather(torch.randn(2, 6), rows(2, 6, 3)), r"must be \[B, N, D\]"),
        (
            lambda op: op.masked_scatter(torch.randn(2, 4, 4), rows(2, 6, 3), 6),
            "3 columns and x 4 rows",
        ),
        (
            lambda op: op.masked_scatter(torch.randn(2, 3, 4), rows(2, 6, 3) + 6, 6),
            r"must be in \[0, 6\)",
        ),
        (
            lambda op: op.masked_mse(
                torch.randn(2, 3, 4).half(),
                torch.randn(2, 3, 4),
                None,
                "mse",
                "none",
                None,
                None,
                1.0,
                True,
            ),
            "prediction is Half",
        ),
        (
            lambda op: op.masked_mse(
                torch.randn(2, 3, 4),
                torch.randn(2, 3, 5),
                None,
                "mse",
                "none",
                None,
                None,
                1.0,
                True,
            ),
            "does not fit prediction",
        ),
        (
            lambda op: op.masked_mse(
                *[torch.randn(2, 3, 4)] * 2,
                None,
                "mse",
                "standardise",
                torch.zeros(3, 5),
                torch.zeros(3, 4),
                1.0,
                True,
            ),
            "mean has shape",
        ),
        (
            lambda op: op.masked_mse(
                *[torch.randn(2, 3, 4)] * 2, None, "rmse", "none", None, None, 1.0, True
            ),
            "unknown loss 'rmse'",
        ),
        (
            lambda op: op.patch_normalise(torch.zeros(2, 3, 4), None, [1.0], [0.0], torch.float32),
            "must be uint8",
        ),
        (
            lambda op: op.patch_normalise(
                torch.zeros(2, 3, 4).byte(), None, [1.0] * 3, [0.0] * 3, torch.float32
            ),
            "must divide",
        ),
        (lambda op: op.sample_masks(torch.arange(2), -1, 0, **SPEC), "epoch must be"),
        (
            lambda op: op.sample_masks(torch.arange(2), 0, 0, **SPEC | {"grid": (4, 6)}),
            "3 sides of the grid",
        ),
        (
            lambda op: op.sample_masks(
                torch.arange(2), 0, 0, **SPEC | {"grid": (2**20, 2**20, 2**30)}
            ),
            "fewer than 2",
        ),
        (
            lambda op: op.sample_masks(
                torch.arange(2),
                0,
                0,
                **SPEC | {"sizes": torch.full((2, 2), 7, dtype=torch.int32)},
            ),
            "does not fit the grid",
        ),
    ],
)
def test_an_op_called_wrongly_is_an_error_and_no_read_out_of_bounds(call, message):
    with pytest.raises((RuntimeError, IndexError), match=message):
        call(torch.ops.salt_ops)


def test_tensors_on_two_devices_are_an_error():
    x, elsewhere = torch.zeros(2, 6, 4), torch.zeros(2, 3, dtype=torch.int64, device="meta")
    for bad in (
        lambda: ops.masked_gather(x, elsewhere),
        lambda: ops.masked_mse(x, x.to("meta")),
        lambda: ops.patch_normalise(x.byte(), (0,), (1,), elsewhere),
    ):
        with pytest.raises(InputError, match="on one device, not on cpu and meta"):
            bad()


@needs_extension
def test_every_simd_level_gives_the_same_bits(tmp_path):
    code = """if True:
        import sys, torch
        from salt import masks, ops
        torch.manual_seed(0)
        p = torch.randn(2, 60, 83)
        y, i = torch.randn(2, 90, 83).half(), torch.stack([torch.randperm(90)[:60]] * 2)
        m, r, x = torch.randn(90, 83), torch.rand(90, 83), (y[..., :81] * 99).byte()
        out = []
        for dtype in (torch.float32, torch.bfloat16):
            q = p.to(dtype).requires_grad_()
            for kind in ops.KINDS:
                for normalise in ops.NORMALISATIONS:
                    weighted, loss = ops.weighted_mse(q, y, i, kind, normalise, m, r)
                    out += [loss, torch.autograd.grad(weighted, q)[0]]
            out += [ops.patch_normalise(x, (.1, .2, .3), (.4, .5, .6), i, dtype)]
        for family in masks.FAMILIES:
            out += masks.sample_masks(torch.arange(64), 1, 2, family)[:2]
        torch.save([ops.EXTENSION["simd"], out], sys.argv[1])"""
    levels = ["avx512", "avx2", "baseline"][
        ["avx512", "avx2", "baseline"].index(ops.EXTENSION["simd"]) :
    ]
    if len(levels) < 2:
        pytest.skip("this processor has the baseline alone")
    found = []
    for level in levels:
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out.pt")],
            env={**os.environ, "SALT_SIMD": level},
            check=True,
            cwd=os.path.dirname(os.path.dirname(ops.__file__)),
        )
        name, tensors = torch.load(tmp_path / "out.pt")
        assert name == level
        found.append(tensors)
    for tensors in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], tensors, strict=True))


# ------------------------------------------------------------------------ properties, by hypothesis


def strided(draw, b, n, d, dtype):
    """A tensor [b, n, d] of one of several layouts: whole, transposed, every other, broadcast, or
    an element off alignment.
    """

    def make(*shape):
        return (
            torch.randn(shape).to(dtype)
            if dtype.is_floating_point
            else torch.randint(0, 256, shape, dtype=dtype)
        )

    return draw(
        st.sampled_from(
            [
                lambda: make(b, n, d),
                lambda: make(b, d, n).transpose(1, 2),
                lambda: make(b, 2 * n, d)[:, ::2],
                lambda: make(b, n, 2 * d)[..., ::2],
                lambda: make(1, n, d).expand(b, n, d),
                lambda: make(b * n * d + 1)[1:].view(b, n, d),
                lambda: make(n, b, d).transpose(0, 1),
            ]
        )
    )()


@st.composite
def gathers(draw, dtypes):
    b = draw(st.integers(0, 4))
    n = draw(st.integers(1, 33))
    d = draw(st.integers(0, 70))
    k, dtype = draw(st.integers(0, n)), draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    index = (
        torch.stack([torch.randperm(n)[:k] for _ in range(b)])
        if b
        else torch.zeros(0, k, dtype=torch.int64)
    )
    return (
        strided(draw, b, n, d, dtype),
        draw(st.sampled_from([lambda i: i, lambda i: i.T.contiguous().T]))(index),
        draw,
    )


@given(gathers([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float64]))
def test_any_gather_and_its_transpose(case):
    x, index, _ = case
    b, n, d = x.shape
    expected = (
        torch.stack([x[i][index[i]] for i in range(b)]) if b else x.new_zeros(0, index.shape[1], d)
    )
    assert torch.equal(ops.masked_gather(x, index), expected)
    if x.is_floating_point():
        leaf = x.clone().requires_grad_()
        upstream = torch.randn(expected.shape).to(x.dtype)
        (gradient,) = torch.autograd.grad(ops.masked_gather(leaf, index), leaf, upstream)
        back = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for i in range(b):
            back[i, index[i]] = upstream[i]
        assert torch.equal(gradient, back)


@given(gathers([torch.uint8]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_patches(case, dtype):
    patches, index, draw = case
    channels = draw(st.sampled_from([c for c in (1, 2, 3, 4) if patches.shape[2] % c == 0]))
    mean, std = [0.1 * c for c in range(channels)], [0.2 + 0.1 * c for c in range(channels)]
    for at in (index, None):
        picked = patches if at is None else ops.masked_gather_reference(patches, at)

        def span(values):
            return torch.tensor(values, dtype=torch.float64).repeat_interleave(
                patches.shape[2] // channels
            )

        expected = (picked.double() / 255 - span(mean)) / span(std)
        made = ops.patch_normalise(patches, mean, std, at, dtype)
        assert made.dtype == dtype
        torch.testing.assert_close(
            made.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )


@given(
    gathers(list(ops.TARGETS)),
    st.sampled_from(ops.PREDICTIONS),
    st.sampled_from(ops.KINDS),
    st.sampled_from(ops.NORMALISATIONS),
    st.booleans(),
)
def test_any_loss(case, dtype, kind, normalise, indexed):
    target, index, draw = case
    index = index if indexed else None
    b, n, d = target.shape
    prediction = strided(draw, b, n if index is None else index.shape[1], d, dtype)
    mean, rstd = strided(draw, 1, n, d, torch.float32)[0], torch.rand(n, d) + 0.5
    leaf = prediction.detach().requires_grad_()
    assert leaf.stride() == prediction.stride() and leaf.data_ptr() == prediction.data_ptr()
    loss, tokens = ops.masked_mse(leaf, target, index, kind, normalise, mean, rstd, per_token=True)
    (gradient,) = torch.autograd.grad(loss, leaf)
    truth = prediction.detach().double().requires_grad_()
    expected, expected_tokens = textbook(truth, target, index, kind, normalise, mean, rstd)
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    torch.testing.assert_close(
        tokens.double(), expected_tokens, rtol=1e-4, atol=1e-5, equal_nan=True
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    # an l1 slope jumps at 0, where a normalised target's rounding decides
    if kind != "l1" or normalise == "none":
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-7, atol=1e-5)


# ------------------------------------------------------------------------------------ torch.compile


def loss_arguments(kind="mse", normalise="none", gradient=True):
    torch.manual_seed(0)
    return (
        torch.randn(2, 3, 4, requires_grad=gradient),
        torch.randn(2, 6, 4).half(),
        rows(2, 6, 3),
        kind,
        normalise,
        *((torch.randn(6, 4), torch.rand(6, 4)) if normalise == "standardise" else (None, None)),
    )


@needs_extension
def test_opcheck():
    x, index = torch.randn(2, 6, 4, requires_grad=True), rows(2, 6, 3)
    checks = [
        (torch.ops.salt_ops.masked_gather, (x, index), {}),
        (
            torch.ops.salt_ops.masked_scatter,
            (torch.randn(2, 3, 4, requires_grad=True), index, 6),
            {},
        ),
        (torch.ops.salt_ops.sample_masks, (torch.arange(3), 0, 0), SPEC),
        (
            torch.ops.salt_ops.patch_normalise,
            (
                torch.zeros(2, 6, 6, dtype=torch.uint8),
                index,
                [1.0, 2.0],
                [0.0, 1.0],
                torch.bfloat16,
            ),
            {},
        ),
        (torch.ops.salt_ops.masked_mse, (*loss_arguments(gradient=False), 1.0, False), {}),
    ]
    checks += [
        (torch.ops.salt_ops.masked_mse, (*loss_arguments(kind, normalise), 1.0, True), {})
        for kind in ops.KINDS
        for normalise in ops.NORMALISATIONS
    ]
    for op, arguments, named in checks:
        assert set(torch.library.opcheck(op.default, arguments, named).values()) == {"SUCCESS"}


@needs_extension
def test_a_compiled_step_is_one_graph_with_the_same_results():
    torch.manual_seed(0)
    patches = torch.randint(0, 256, (2, 144, 12), dtype=torch.uint8)
    latents = torch.randn(2, 144, 8).half()
    ids = torch.arange(2)
    weight = torch.randn(12, 8, requires_grad=True)

    def step(patches, latents, ids, weight):
        masks = sample_masks(ids, 3, 1, "short", (4, 6, 6), (24, 64))
        features = ops.patch_normalise(patches, (0.5,) * 3, (0.25,) * 3) @ weight
        prediction = ops.masked_gather(features, masks.target)
        return (
            ops.masked_mse(prediction, latents, masks.target, "smooth_l1", "layer_norm") / 2,
            ops.weighted_mse(prediction, latents, masks.target, weight=0.5)[0],
        )

    plain = step(patches, latents, ids, weight)
    made = torch.compile(step, fullgraph=True)(patches, latents, ids, weight)
    for expected, found in zip(plain, made, strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, weight, retain_graph=True),
            torch.autograd.grad(expected, weight, retain_graph=True),
        )


def test_what_a_compiled_caller_keeps_is_marked_without_the_compiler():
    assert vars(extension.constant(lambda: None)) == vars(
        torch.compiler.assume_constant_result(lambda: None)
    )
    code = "import sys; from salt import ops; print('torch._dynamo' in sys.modules)"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


def test_an_extension_of_other_sources_is_not_used(tmp_path):
    """A stand-in that says it was built from others; and the digest follows names and contents of
    csrc/.
    """
    (tmp_path / "salt_ops.py").write_text(
        "def build_info():\n    return {'devices': ['cpu'], 'sources': 'ab', 'simd': 'avx2', 'amx':"
        " True, 'architectures': ''}\n"
    )
    code = (
        "import sys\nsys.path[:0] = sys.argv[1:]\nfrom salt import extension\n"
        "print(extension.describe())"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), root], capture_output=True, text=True
    )
    assert done.returncode == 0 and "was built from other sources than csrc/" in done.stdout, (
        done.stderr
    )
    (tmp_path / "salt").mkdir()
    shutil.copy(os.path.join(root, "salt", "__init__.py"), tmp_path / "salt")
    (tmp_path / "csrc").mkdir()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import salt; print(salt.source_digest())"
    digests = []
    for name, content in (("a.cpp", "1"), ("a.cpp", "2"), ("b.cpp", "1")):
        (tmp_path / "csrc" / name).write_text(content)
        digests.append(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert len(set(digests)) == 3
