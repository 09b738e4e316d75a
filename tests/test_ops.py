"""Gather and loss: the extension and the reference against plain PyTorch, values and gradients."""
import pytest
import torch
import torch.nn.functional as F

import ops
from config import InputError

needs_extension = pytest.mark.skipif(not ops.EXTENSION["devices"], reason="the extension is not built")


def rows(b, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(b)])


@needs_extension
def test_the_extension_is_what_runs():
    assert ops.EXTENSION["devices"] and ops.MISSING is None
    x = torch.randn(2, 5, 3, requires_grad=True)
    assert "masked_gather" in ops.masked_gather(x, rows(2, 5, 2)).grad_fn.name()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 1, 1), (3, 64, 768, 40), (2, 6, 4, 0), (0, 6, 4, 0)])
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
    for call in (ops.masked_gather, ops.masked_gather_reference, lambda x, i: ops.masked_mse(torch.zeros(2, 3, 4), x, i)):
        with pytest.raises(IndexError):
            call(x, index)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(InputError, match="masked_gather takes"):
        ops.masked_gather(torch.randn(2, 6, 4), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="masked_mse takes"):
        ops.masked_mse(torch.randn(2, 3, 4), torch.randn(2, 4, 4))
    with pytest.raises(InputError, match="unknown loss"):
        ops.masked_mse(torch.randn(2, 3, 4), torch.randn(2, 3, 4), kind="rmse")


@pytest.mark.parametrize("prediction_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("width", [768, 37])
def test_mse_matches_plain_pytorch(prediction_dtype, target_dtype, indexed, width):
    torch.manual_seed(0)
    prediction = torch.randn(3, 20, width).to(prediction_dtype).requires_grad_()
    target = torch.randn(3, 31 if indexed else 20, width).to(target_dtype)
    index = rows(3, 31, 20) if indexed else None
    loss, tokens = ops.masked_mse(prediction, target, index, per_token=True)
    (loss * 3).backward()

    truth = prediction.detach().double().requires_grad_()
    picked = target.double() if index is None else torch.stack([target[b, index[b]] for b in range(3)]).double()
    expected = F.mse_loss(truth, picked)
    (expected * 3).backward()
    assert loss.dtype == (torch.float64 if prediction_dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if prediction_dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(tokens.double(), (truth.detach() - picked).square().mean(-1), rtol=10 * tolerance, atol=0)
    assert not tokens.requires_grad
    coarse = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[prediction_dtype]
    torch.testing.assert_close(prediction.grad.double(), truth.grad, rtol=coarse, atol=1e-9)


@needs_extension
def test_half_precision_is_read_exactly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    for dtype in (torch.float16, torch.bfloat16):
        values = finite.to(dtype)[None, :, None]
        _, tokens = ops.masked_mse(torch.zeros(values.shape, dtype=torch.float64), values, per_token=True)
        assert torch.equal(tokens, values.double()[..., 0] ** 2)
    _, tokens = ops.masked_mse(torch.zeros(1, 2, 1), torch.tensor([[[float("inf")], [float("nan")]]]).half(), per_token=True)
    assert tokens[0, 0].isinf() and tokens[0, 1].isnan()


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("normalise", ops.NORMALISATIONS)
def test_gradients_in_float64(kind, normalise):
    torch.manual_seed(1)
    prediction = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    target, index = torch.randn(2, 7, 5, dtype=torch.float64), rows(2, 7, 4)
    mean, rstd = torch.randn(7, 5, dtype=torch.float64), torch.rand(7, 5, dtype=torch.float64) + 0.5
    loss = lambda p: ops.masked_mse(p, target, index, kind, normalise, mean, rstd)
    assert torch.autograd.gradcheck(loss, prediction)


def test_standardise_uses_the_statistics_of_each_position():
    target, index = torch.randn(1, 5, 3), torch.tensor([[4, 1]])
    mean, rstd = torch.randn(5, 3), torch.rand(5, 3)
    expected = torch.stack([(target[0, n] - mean[n]) * rstd[n] for n in (4, 1)])[None]
    assert ops.masked_mse(expected, target, index, normalise="standardise", mean=mean, rstd=rstd) < 1e-12


@needs_extension
def test_the_saved_gradient_is_not_changed_by_backward():
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    loss = ops.masked_mse(prediction, torch.randn(2, 3, 4))
    first, = torch.autograd.grad(loss * 5, prediction, retain_graph=True)
    second, = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(first, 5 * second)


@needs_extension
def test_the_loss_does_not_depend_on_the_thread_count():
    prediction, target, index = torch.randn(4, 100, 96), torch.randn(4, 200, 96).half(), rows(4, 200, 100)
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


@needs_extension
def test_opcheck():
    x, index = torch.randn(2, 6, 4, requires_grad=True), rows(2, 6, 3)
    torch.library.opcheck(torch.ops.salt_ops.masked_gather, (x, index))
    torch.library.opcheck(torch.ops.salt_ops.masked_scatter, (torch.randn(2, 3, 4, requires_grad=True), index, 6))
    results = torch.library.opcheck(torch.ops.salt_ops.sample_masks.default, (torch.arange(3),), {"epoch": 0, "seed": 0, **ops.mask_spec("short", (4, 6, 6), None)})
    assert set(results.values()) == {"SUCCESS"}
