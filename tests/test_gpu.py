"""The CUDA kernels against the CPU's in float64, on data made here.

Needs no more than torch, numpy and pytest: `make gpu-check`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from salt import clips, ops, optimiser
from salt import masks as salt_masks
from salt.errors import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not ops.has_kernel(torch.empty(0, device="cuda")),
        reason="needs a GPU and an extension built for it",
    ),
]


def rows(b, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(b)])
        if b
        else torch.zeros(0, k, dtype=torch.int64)
    )


def off_by(elements, x):
    """x on the GPU, contiguous, its storage beginning `elements` elements later."""
    room = torch.empty(x.numel() + elements, dtype=x.dtype, device="cuda")
    return room[elements:].view(x.shape).copy_(x)


def distance(found, expected):
    """||found - expected|| / ||expected||; nan where either has one."""
    found, expected = found.double().cpu(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("family", salt_masks.FAMILIES)
@pytest.mark.parametrize(
    "grid, counts, draws",
    [
        ((8, 14, 14), None, 100_000),
        ((4, 6, 6), None, 2000),
        ((1, 3, 5), (2, 3), 500),
        ((2, 4, 4), (1, 1), 300),
        # the last in global memory
        ((3, 7, 10), (150, 20), 500),
        ((4, 6, 6), (100, 44), 300),
        ((16, 32, 32), None, 300),
    ],
)
def test_masks_are_the_cpus_bit_for_bit(family, grid, counts, draws):
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 2**63, draws))
    expected, found = (
        salt_masks.sample_masks(x, 2**32 - 1, 2**63 - 1, family, grid, counts)
        for x in (ids, ids.cuda())
    )
    assert (
        found.context.is_cuda
        and torch.equal(found.context.cpu(), expected.context)
        and torch.equal(found.target.cpu(), expected.target)
    )


SHAPES = [
    (2, 9, 5, 24),
    (3, 70, 33, 37),
    (1, 1, 1, 1),
    (2, 200, 130, 768),
    (2, 65, 64, 1280),
    (2, 6, 0, 8),
    (0, 6, 4, 8),
    (2, 6, 4, 0),
    (2, 300, 299, 3),
]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shift", [0, 1])
def test_gather_and_scatter(dtype, shift):
    for b, n, k, d in SHAPES:
        x, index = (torch.randn(b, n, d) * 50).abs().to(dtype), rows(b, n, k)
        found = ops.masked_gather(off_by(shift, x), index.cuda())
        assert torch.equal(found.cpu(), ops.masked_gather_reference(x, index))
        back = torch.ops.salt_ops.masked_scatter(off_by(shift, found.cpu()), index.cuda(), n)
        assert torch.equal(back.cpu(), torch.ops.salt_ops.masked_scatter(found.cpu(), index, n))
    strided = torch.randn(4, 12, 9).transpose(1, 2)
    assert torch.equal(
        ops.masked_gather(strided.cuda(), rows(4, 9, 5).cuda()).cpu(),
        ops.masked_gather_reference(strided, rows(4, 9, 5)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_patches_are_the_cpus_bit_for_bit(dtype, shift):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for b, n, k, d in [
        (2, 9, 5, 24),
        (3, 70, 33, 39),
        (2, 1568, 352, 1536),
        (1, 4, 4, 1176),
        (0, 6, 4, 6),
        (2, 6, 0, 6),
    ]:
        patches, index = torch.randint(0, 256, (b, n, d), dtype=torch.uint8), rows(b, n, k)
        for at in (index, None):
            found = ops.patch_normalise(
                off_by(shift, patches), mean, std, None if at is None else at.cuda(), dtype
            )
            assert torch.equal(found.cpu(), ops.patch_normalise(patches, mean, std, at, dtype))


@pytest.mark.parametrize("prediction_dtype", ops.PREDICTIONS, ids=str)
@pytest.mark.parametrize("target_dtype", ops.TARGETS, ids=str)
@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("normalise", ops.NORMALISATIONS)
def test_loss_and_gradient(prediction_dtype, target_dtype, kind, normalise):
    torch.manual_seed(0)
    for shift in (0, 1):
        for b, n, k, d in SHAPES:
            for index in (rows(b, n, k), None):
                prediction = torch.randn(b, n if index is None else k, d).to(prediction_dtype)
                target = (torch.randn(b, n, d).abs() * 60).clamp(0, 255).to(target_dtype)
                target = target if target_dtype == torch.uint8 else target / 60
                if target_dtype == torch.float64 and prediction_dtype != torch.float64:
                    target = target.float().double()  # what a float32 comparison sees
                mean, rstd = torch.randn(n, d), torch.rand(n, d) + 0.5
                leaf = off_by(shift, prediction).requires_grad_()
                loss, tokens = ops.masked_mse(
                    leaf,
                    off_by(shift, target),
                    None if index is None else index.cuda(),
                    kind,
                    normalise,
                    mean.cuda(),
                    rstd.cuda(),
                    True,
                )
                (gradient,) = torch.autograd.grad(loss * 3, leaf)
                truth = prediction.double().requires_grad_()
                expected, expected_tokens = ops.masked_mse(
                    truth, target, index, kind, normalise, mean.double(), rstd.double(), True
                )
                (expected_gradient,) = torch.autograd.grad(expected * 3, truth)
                assert (
                    loss.dtype
                    == tokens.dtype
                    == (torch.float64 if prediction_dtype == torch.float64 else torch.float32)
                    and gradient.dtype == prediction_dtype
                )
                if prediction.numel() == 0:
                    assert loss.isnan() and expected.isnan() and gradient.shape == prediction.shape
                    continue
                close = (
                    1e-6
                    if prediction_dtype != torch.float64 or target_dtype == torch.uint8
                    else 1e-11
                )
                assert (
                    distance(loss, expected.detach()) <= close
                    and distance(tokens, expected_tokens) <= 10 * close
                )
                # an l1 slope jumps at 0, where a normalised target's rounding decides
                if kind != "l1" or normalise == "none":
                    assert distance(gradient, expected_gradient) <= (
                        2**-7 if prediction_dtype == torch.bfloat16 else 10 * close
                    )


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("normalise", ops.NORMALISATIONS)
def test_gradients_in_float64(kind, normalise):
    torch.manual_seed(1)
    prediction = torch.randn(2, 4, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    target, index = torch.randn(2, 7, 6, dtype=torch.float64, device="cuda"), rows(2, 7, 4).cuda()
    mean = torch.randn(7, 6, dtype=torch.float64, device="cuda")
    rstd = torch.rand(7, 6, dtype=torch.float64, device="cuda") + 0.5
    assert torch.autograd.gradcheck(
        lambda p: ops.masked_mse(p, target, index, kind, normalise, mean, rstd), prediction
    )
    x = torch.randn(2, 7, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.masked_gather(x, index), x)


def step(prediction, latents, patches, ids):
    masks = salt_masks.sample_masks(ids, 3, 1, "short")
    loss = ops.masked_mse(prediction, latents, masks.target, "mse", "layer_norm")
    (gradient,) = torch.autograd.grad(loss / 2, prediction)
    return (
        loss.detach(),
        gradient,
        ops.patch_normalise(patches, (0.5,) * 3, (0.25,) * 3, masks.context, torch.bfloat16),
    )


def inputs(b=8, d=768):
    torch.manual_seed(2)
    return (
        torch.randn(b, 784, d, device="cuda").bfloat16().requires_grad_(),
        torch.randn(b, 1568, d, device="cuda").half(),
        torch.randint(0, 256, (b, 1568, 1536), dtype=torch.uint8, device="cuda"),
        torch.arange(b, device="cuda"),
    )


def test_every_run_gives_the_same_bits():
    given = inputs()
    first = step(*given)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, step(*given), strict=True))


def test_nothing_waits_for_the_gpu():
    given = inputs()
    step(*given)  # builds the table of block sizes
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_is_used():
    given, side = inputs(), torch.cuda.Stream()
    expected = step(*given)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = step(*given)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_ops_are_captured_in_a_cuda_graph():
    prediction, latents, patches, ids = inputs()

    def run():
        index = salt_masks.sample_masks(ids, 3, 1, "short").target
        leaf = prediction.detach().requires_grad_()
        weighted, loss = ops.weighted_mse(leaf, latents, index)
        gradient = torch.autograd.grad(weighted, leaf)[0]
        return (loss, gradient), ops.patch_normalise(patches, (0.5,) * 3, (0.25,) * 3)

    (loss, gradient), normal = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (graph_loss, graph_gradient), graph_normal = run()
    graph.replay()
    assert (
        torch.equal(loss, graph_loss)
        and torch.equal(gradient, graph_gradient)
        and torch.equal(normal, graph_normal)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 7, 5), (4, 100, 768), (1, 1, 1)])
def test_the_saved_gradient_is_not_changed_by_backward(dtype, shape):
    prediction = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    loss = ops.masked_mse(prediction, torch.randn(shape, device="cuda"))
    third = torch.tensor(1 / 3, dtype=loss.dtype, device="cuda")  # no bfloat16
    (first,) = torch.autograd.grad(loss * third, prediction, retain_graph=True)
    (second,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(first, (second.to(loss.dtype) * third).to(dtype))


def test_opcheck():
    x, index = torch.randn(2, 6, 4, device="cuda", requires_grad=True), rows(2, 6, 3).cuda()
    spec = salt_masks.mask_spec("short", (4, 6, 6), None, "cuda:0")
    checks = [
        (torch.ops.salt_ops.masked_gather, (x, index), {}),
        (torch.ops.salt_ops.masked_scatter, (x[:, :3].detach().requires_grad_(), index, 6), {}),
        (
            torch.ops.salt_ops.sample_masks,
            (torch.arange(3, device="cuda"), 0, 0, *spec.values()),
            {},
        ),
        (
            torch.ops.salt_ops.patch_normalise,
            (
                torch.zeros(2, 6, 6, dtype=torch.uint8, device="cuda"),
                index,
                [1.0, 2.0],
                [0.0, 1.0],
                torch.bfloat16,
            ),
            {},
        ),
        (
            torch.ops.salt_ops.masked_mse,
            (
                x[:, :3].detach().requires_grad_(),
                x.detach(),
                index,
                "l1",
                "layer_norm",
                None,
                None,
                1.0,
                True,
            ),
            {},
        ),
    ]
    for op, arguments, named in checks:
        assert set(torch.library.opcheck(op.default, arguments, named).values()) == {"SUCCESS"}


def test_a_compiled_step_is_one_graph():
    given = inputs(2)

    def step(prediction, latents, ids):
        return (
            ops.masked_mse(
                prediction * 2, latents, salt_masks.sample_masks(ids, 3, 1, "short").target
            )
            / 2
        )

    plain = step(given[0], given[1], given[3])
    loss = torch.compile(step, fullgraph=True)(given[0], given[1], given[3])
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(
        torch.autograd.grad(loss, given[0])[0], torch.autograd.grad(plain, given[0])[0]
    )


def test_tensors_on_two_devices_are_an_error():
    x, index = torch.randn(2, 6, 4, device="cuda"), rows(2, 6, 3)
    for bad in (
        lambda: ops.masked_gather(x, index),
        lambda: ops.masked_mse(x, x.cpu()),
        lambda: ops.masked_gather(x.cpu(), index.cuda()),
    ):
        with pytest.raises(InputError):
            bad()


def test_a_wrong_index_is_a_device_assert():
    """In processes of their own, since an assert ends the GPU's context."""
    calls = [
        "ops.masked_gather(x, i)",
        "torch.ops.salt_ops.masked_scatter(x[:, :3], i, 6)",
        "ops.masked_mse(x[:, :3], x, i)",
        "ops.patch_normalise(x.byte(), (0,), (1,), i)",
        "masks.sample_masks(-torch.ones(1, dtype=torch.int64, device='cuda'), 0, 0, 'short')",
    ]
    runs = {}
    for call in calls:
        for bad in (6, -1):
            code = (
                "import torch\nfrom salt import masks, ops\n"
                "x = torch.randn(2, 6, 4, device='cuda')\n"
                f"i = torch.tensor([[0, 1, {bad}], [0, 1, 2]], device='cuda')\n"
                f"try:\n    {call}\n    torch.cuda.synchronize()\n"
                "except RuntimeError as error:\n"
                "    print('device-side assert' in str(error), flush=True)"
            )
            runs[call, bad] = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=os.path.dirname(os.path.dirname(ops.__file__)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
    for case, run in runs.items():
        out, error = run.communicate(timeout=300)
        assert out.strip() == "True", (case, out, error)


@pytest.mark.parametrize("slow", ["copies", "caller"])
def test_batches_on_the_gpu_are_those_on_the_cpu(tmp_path, monkeypatch, slow):
    """Pinned memory, the copies' stream and the reuse of both: one of the two streams lags behind
    the other.
    """
    pytest.importorskip("einops")
    from salt import cache, cache_format, cache_writer, loader, views
    from salt import masks as salt_masks

    view, rng = views.View(frames=4, size=64, short_side=64), np.random.default_rng(0)
    latents = rng.normal(size=(64, 32, 256)).astype(np.float16)
    patches = rng.integers(0, 256, (64, 32, 1536), dtype=np.uint8)
    teacher = {"name": "t", "sha256": "ab", "dim": 256, "compute": "fp32"}
    teacher |= {"mean": [0.5] * 3, "std": [0.2] * 3}
    plan = cache_format.plan_of(view, "", 64, teacher)
    writer = cache_writer.Writer(tmp_path / "c", plan)
    with writer.shard(0) as shard:
        for row in range(64):
            shard.add(f"v{row}", 0, patches[row], {"latents": latents[row]})
    writer.finish()
    opened = cache.open_cache(tmp_path / "c")
    steps = list(salt_masks.shuffled(64, 16, 0, range(24)))
    how = {
        "families": ["short", "long"],
        "seed": 3,
        "patches": loader.CONTEXT,
        "latents": loader.TARGET,
    }
    original, kept = cache.Cache.read_rows, []

    def read_rows(self, *arguments, **others):  # the last thing before a batch goes over
        original(self, *arguments, **others)
        if slow == "copies":
            with torch.cuda.stream(loader.copy_stream(torch.device("cuda"))):
                torch.cuda._sleep(20_000_000)

    monkeypatch.setattr(cache.Cache, "read_rows", read_rows)
    for (_, records), batch in zip(
        steps, loader.Loader(clips.Records(opened), steps, **how, device="cuda"), strict=True
    ):
        assert batch.patches.is_cuda and batch.latents.is_cuda and batch.ids.is_cuda
        if slow == "caller":
            torch.cuda._sleep(20_000_000)
        found = [
            (
                batch.patches.gather(1, drawn.context[..., None].expand(-1, -1, 1536)),
                batch.latents.gather(1, drawn.target[..., None].expand(-1, -1, 256)),
                drawn,
            )
            for drawn in batch.masks
        ]
        kept.append((records, found))
    for records, found in kept:
        for rows, targets, drawn in found:
            for place, record in enumerate(records):
                assert np.array_equal(
                    rows[place].cpu(), patches[record][drawn.context[place].cpu()]
                ) and np.array_equal(
                    targets[place].cpu(), latents[record][drawn.target[place].cpu()]
                )


# ----------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(
    "lengths, heads, d", [((352, 112), 16, 64), ((1136, 1200), 8, 64), ((33,), 2, 80)]
)
def test_attention_is_flash_attention(lengths, heads, d):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    qkv = torch.randn(2, sum(lengths), 3, heads, d).bfloat16()
    gradient = torch.randn(2, sum(lengths), heads, d).bfloat16()
    here = qkv.cuda().requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot run
        only_flash = ops.attention(here, lengths)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        found = ops.attention(here, lengths)
        (back,) = torch.autograd.grad(found, here, gradient.cuda())
    names = {event.key for event in seen.key_averages()}
    # torch may prefer cuDNN's
    assert any("flash_attention" in name or "cudnn_attention" in name for name in names), names
    exact = qkv.double().requires_grad_()
    expected = ops.attention_reference(exact, lengths)
    (expected_back,) = torch.autograd.grad(expected, exact, gradient.double())
    assert (
        distance(found, expected) < 5e-3
        and distance(only_flash, expected) < 5e-3
        and distance(back, expected_back) < 8e-3
    )


def small_salt(positions="table", attends="all"):
    import model

    torch.manual_seed(0)
    shape = model.EncoderConfig(
        dim=128, depth=3, heads=2, mlp_dim=256, frames=8, size=96, positions=positions
    )
    return model.build_salt(
        shape,
        {
            "dim_in": 128,
            "dim_out": 32,
            "tokens": 144,
            "families": ["short", "long"],
            "dim": 128,
            "depth": 3,
            "heads": 2,
            "positions": positions,
            "grid": (4, 6, 6),
            "attends": attends,
        },
    )


def loop(salt, steps, dtype, before=lambda step: None, wrapped=lambda passes: passes, parts=1):
    """train.py's loop: the losses, still on the device, and with several parts the features'."""
    import model
    from salt import loader, score

    def passes(batch):
        model.cast_matrices(salt, dtype)
        found = []
        for part in batch.split(parts):
            loss, errors = model.salt_loss(salt, part, space, weight=1 / parts)
            loss.backward()
            found.append((errors, salt.features))
        return found

    device = next(salt.parameters()).device
    optimizer = torch.optim.AdamW(
        optimiser.parameter_groups(salt, 0.04), lr=1e-3, betas=(0.9, 0.95), fused=True
    )
    space = score.Space("latents", "none", None, None, torch.zeros(144, 32, device=device))
    losses, seen = [], []
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (4, 144, 1536), dtype=torch.uint8, generator=generator).to(
        device
    )
    latents = torch.randn(4, 144, 32, generator=generator).half().to(device)
    batches = []
    for step in range(steps):
        ids = torch.arange(4).to(device) + 9 * step
        masks = [salt_masks.sample_masks(ids, 0, 0, each, (4, 6, 6)) for each in ("short", "long")]
        given = patches.roll(step, 1), latents.roll(step, 1)  # others in each step
        batches.append(loader.Batch(ids, *given, masks))
    passes = wrapped(passes)
    for step in range(steps):
        before(step)
        found = passes(batches[step])
        optimiser.update(optimizer, list(salt.parameters()), 0.02)
        losses.append(sum(errors[0] for errors, _ in found) / parts)
        seen.append(sum(features.double().square().mean() for _, features in found))
    return losses if parts == 1 else losses + seen


def test_a_step_never_waits_for_the_gpu():
    pytest.importorskip("einops")
    try:
        loop(
            small_salt().cuda(),
            4,
            "bf16",
            lambda step: torch.cuda.set_sync_debug_mode(
                "error" if step == 2 else torch.cuda.get_sync_debug_mode()
            ),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_a_log_line_looks_at_never_waits_for_the_gpu():
    pytest.importorskip("einops")
    from salt import health

    salt = small_salt().cuda()
    optimizer = torch.optim.AdamW(optimiser.parameter_groups(salt, 0.04), lr=1e-3, fused=True)
    for parameter in salt.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimiser.update(optimizer, list(salt.parameters()), 0.02, torch.ones((), device="cuda"))
    features = torch.randn(4, 40, 128, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        moments = health.moments(features) + health.moments(features)
        squares = health.update_ratio(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = health.collapse(2 * health.moments(features.cpu()))
    assert health.collapse(moments) == pytest.approx(expected, rel=1e-5)
    here = small_salt()
    here.load_state_dict(salt.state_dict())
    copied = torch.optim.AdamW(optimiser.parameter_groups(here, 0.04), lr=1e-3, fused=True)
    copied.load_state_dict(optimizer.state_dict())
    copied.found_inf = optimizer.found_inf.cpu()
    assert squares.tolist() == pytest.approx(health.update_ratio(copied).tolist(), rel=1e-4)


def alone(code, **environment):
    """A program in a process of its own, given the project's folder."""
    return subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).resolve().parent.parent)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


DETERMINISTIC = """import os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
sys.path.insert(0, sys.argv[1])
import torch
from tests.test_gpu import loop, small_salt
torch.use_deterministic_algorithms(True)
runs = []
for _ in range(3):
    salt = small_salt().cuda()
    losses = torch.stack(loop(salt, 12, "bf16"))
    runs.append([losses, *salt.state_dict().values()])
assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other))
print("the same bits")
"""


def test_deterministic_steps_give_the_same_bits():
    pytest.importorskip("einops")
    done = alone(DETERMINISTIC)
    assert done.returncode == 0 and "the same bits" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("attends", ["all", "context"])
@pytest.mark.parametrize("positions", ["table", "table3d", "rope"])
def test_steps_on_the_gpu_are_the_cpus(positions, attends):
    pytest.importorskip("einops")
    expected = torch.stack(loop(small_salt(positions, attends), 6, "fp32"))
    for dtype, limit in (("fp32", 1e-3), ("bf16", 1e-2)):
        found = torch.stack(loop(small_salt(positions, attends).cuda(), 6, dtype))
        torch.testing.assert_close(found.cpu(), expected, rtol=limit, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_on_the_gpu_is_the_cpus(dtype):
    pytest.importorskip("einops")
    pytest.importorskip("av")
    from salt.stream import StreamingEncoder

    frames = np.random.default_rng(0).integers(0, 256, (12, 96, 96, 3), np.uint8)
    encoders = [small_salt("rope").student.eval() for _ in range(2)]
    encoders[1].to(dtype).cuda()
    streams = [StreamingEncoder(encoder) for encoder in encoders]
    answers = []
    for frame in frames:
        expected, found = (stream.push(frame) for stream in streams)
        limit = 1e-3 if dtype == torch.float32 else 3e-2
        answers.append(found)
        assert (found is None) == (expected is None)
        assert found is None or distance(found.float(), expected) < limit
    assert sum(found is not None for found in answers) == 6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("positions, attends", [("table", "all"), ("rope", "context")])
def test_steps_in_a_cuda_graph_are_those_without(positions, attends, compiled):
    """Of other clips each step, with an evaluation between, which casts the matrices anew."""
    pytest.importorskip("einops")
    import model
    from salt.graph import WARM_UP, Graph

    def build():
        salt = small_salt(positions, attends).cuda()
        for block in (*salt.student.blocks, *salt.predictor.blocks) if compiled else ():
            block.compile(dynamic=False)
        return salt

    def evaluated(step):
        if step in (2, 6):
            model.cast_matrices(salt, "bf16")
            with torch.no_grad():
                salt.student(torch.randn(3, 144, 1536, device="cuda"))
            model.cast_matrices(salt, "fp32")

    expected = loop(build(), WARM_UP + 6, "bf16", parts=2)
    salt, graphs = build(), []

    def in_a_graph(passes):
        graphs.append(Graph(passes, salt, print))
        return graphs[0]

    found = loop(salt, WARM_UP + 6, "bf16", evaluated, in_a_graph, parts=2)
    assert graphs[0].graph is not None
    for each, of_it in zip(found, expected, strict=True):
        torch.testing.assert_close(each, of_it, rtol=2e-3, atol=0)
    assert len(set(map(float, found))) == 2 * (WARM_UP + 6)


UNRECORDED = """import sys
sys.path.insert(0, sys.argv[1])
from tests.test_gpu import loop, small_salt
from salt.graph import Graph
def waiting(passes):
    def wait(batch):
        found = passes(batch)
        found[0][0].sum().item()
        return found
    return Graph(wait, salt, print)
salt = small_salt().cuda()
try:
    loop(salt, 6, "fp32", wrapped=waiting)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_step_that_waits_is_not_recorded():
    pytest.importorskip("einops")
    done = alone(UNRECORDED)
    assert "InputError the step cannot be recorded" in done.stdout, done.stderr[-2000:]


REFERENCE = """import sys
sys.path.insert(0, sys.argv[1])
from tests.test_gpu import loop, small_salt
from salt.graph import Graph
graphs = []
def recorded(passes):
    graphs.append(Graph(passes, salt, print))
    return graphs[0]
salt = small_salt().cuda()
losses = loop(salt, 6, "bf16", wrapped=recorded)
assert graphs[0].graph is not None and len(set(map(float, losses))) == 6
print("recorded")
"""


def test_the_plain_reference_is_recorded_too():
    pytest.importorskip("einops")
    done = alone(REFERENCE, SALT_OPS="reference")
    assert "recorded" in done.stdout, done.stderr[-2000:]


def test_compiled_blocks_on_the_gpu_are_compiled_once_and_agree():
    pytest.importorskip("einops")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    expected = torch.stack(loop(small_salt().cuda(), 6, "bf16"))
    salt = small_salt().cuda()
    compiled = []
    for block in (*salt.student.blocks, *salt.predictor.blocks):
        block.compile(dynamic=False)
    found = torch.stack(
        loop(salt, 6, "bf16", lambda step: compiled.append(counters["stats"]["unique_graphs"]))
    )
    assert compiled[1] > 0 and compiled[1:] == compiled[1:2] * 5
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
