"""The extension `salt_ops`: whether it is in use, what it was built for, and what torch must know
of its ops: shapes and gradients.
"""

import os
import sys

import torch

from salt import ROOT, source_digest
from salt.errors import InputError

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
    sys.path.append(ROOT)  # where build_ext puts it, wherever Python runs
    try:
        import salt_ops
    finally:
        sys.path.pop()

    if salt_ops.build_info().get("sources") != (
        source_digest() or salt_ops.build_info().get("sources")
    ):
        raise ImportError("salt_ops was built from other sources than csrc/")
    # {"devices": ["cpu", "cuda"], "architectures": "8.0;...;12.0+PTX", "simd": "avx512" | "avx2" |
    # "baseline", "bf16", "amx": bool, "sources": SHA-256}
    EXTENSION = salt_ops.build_info()
    MISSING = None
except ImportError as error:
    salt_ops = None
    EXTENSION = {
        "devices": [],
        "architectures": "",
        "simd": "none",
        "bf16": False,
        "amx": False,
        "sources": None,
    }
    MISSING = str(error)


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


def describe(device="cpu"):
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
    matrices = ", AMX" if EXTENSION["amx"] else ", bfloat16" if EXTENSION["bf16"] else ""
    return f"salt_ops: built for {built}; SIMD {EXTENSION['simd']}{matrices}{advice}"


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
    def _(sample_ids, epoch, seed, grid, counts, *how):
        return tuple(sample_ids.new_empty(sample_ids.shape[0], counts[i]) for i in (0, 2))

    @torch.library.register_fake("salt_ops::attention")
    def _(qkv, lengths):
        b, n, _, h, d = qkv.shape
        return qkv.new_empty(b, n, h, d), qkv.new_empty(b, h, n, dtype=torch.float32)

    @torch.library.register_fake("salt_ops::attention_backward")
    def _(gradient, qkv, out, lse, lengths):
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    @torch.library.register_fake("salt_ops::cross_attention")
    def _(q, kv, asked, given):
        b, n, h, _ = q.shape
        return q.new_empty(q.shape), q.new_empty(b, h, n, dtype=torch.float32)

    @torch.library.register_fake("salt_ops::cross_attention_backward")
    def _(gradient, q, kv, out, lse, asked, given):
        return q.new_empty(q.shape), kv.new_empty(kv.shape)

    @torch.library.register_fake("salt_ops::transpose_and_sum")
    def _(x):
        return x.new_empty(x.shape[1], x.shape[0]), x.new_empty(x.shape[1], dtype=torch.float32)

    for name in ("gelu", "gelu_backward"):
        torch.library.register_fake(
            f"salt_ops::{name}",
            lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        )

    def save_first(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @torch.autograd.function.once_differentiable
    def gelu_backward(ctx, gradient):
        return torch.ops.salt_ops.gelu_backward(gradient, *ctx.saved_tensors)

    torch.library.register_autograd("salt_ops::gelu", gelu_backward, setup_context=save_first)

    def save_attention(ctx, inputs, output):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]  # qkv, or q and kv
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.lengths = inputs[len(tensors) :]

    def attention_gradient(backward):
        @torch.autograd.function.once_differentiable
        def gradient_of(ctx, gradient, _lse):
            if gradient is None:
                return (None,) * len(ctx.needs_input_grad)
            found = backward(gradient, *ctx.saved_tensors, *ctx.lengths)
            found = (found,) if isinstance(found, torch.Tensor) else found
            return *found, *[None] * len(ctx.lengths)

        return gradient_of

    for name in ("attention", "cross_attention"):
        torch.library.register_autograd(
            f"salt_ops::{name}",
            attention_gradient(getattr(torch.ops.salt_ops, f"{name}_backward")),
            setup_context=save_attention,
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
        elif scale.device.type != "cpu":  # its value costs a wait, so it is read there, in one pass
            gradient = torch.ops.salt_ops.scaled(gradient, scale)
        elif scale.item() != 1:
            # not 0-dim, which torch would round to bfloat16
            gradient = torch.mul(gradient, scale.reshape(1, 1, 1), out=torch.empty_like(gradient))
        return (gradient,) + (None,) * 8

    torch.library.register_autograd(
        "salt_ops::masked_mse", scale_gradient, setup_context=save_gradient
    )
