"""What a training step must do, part by part: operations and bytes, from the token counts. `python
bench.py budget` prints it, docs/STEP.md discusses it, train.py takes its model FLOPs from here.

Operations are those of the model's matrix products and attention, two a multiply-add; a backward
pass has twice the forward pass's. What is computed again (attention's scores in its backward pass,
whole blocks with --recompute) is not counted: MFU is a share of useful work. Bytes are those of
activations, weights and optimiser state that must go through memory when each kernel reads its
inputs once and writes its outputs once: bfloat16 operands, float32 residual stream, norm fused with
the addition before it.
"""

import time
from typing import NamedTuple

import torch

from salt.masks import kept_targets, mask_counts
from salt.ranks import world

# Bytes a parameter: bf16 copy made (4 + 2), its gradient to float32 (2 + 4), norm (4), AdamW reads
# and writes weight, gradient and both moments (32).
OPTIMISER_BYTES = {"cast": 6, "gradients to float32": 6, "norm": 4, "AdamW": 32}


class Part(NamedTuple):
    name: str
    forward: float  # operations a clip
    activations: float  # bytes a clip, forward
    weights: float  # bytes a step, forward


def transformer(name, spans, dim, depth, mlp_dim):
    """Blocks over spans of tokens that attend to themselves."""
    tokens, matrices = depth * sum(spans), 4 * dim**2 + 2 * dim * mlp_dim
    # qkv 8 D, projection 4 D, fc1 2 D + 2 M, fc2 2 M + 2 D
    return [
        Part(
            f"{name}: matrices",
            2 * tokens * matrices,
            tokens * (16 * dim + 4 * mlp_dim),
            depth * 2 * matrices,
        ),
        Part(f"{name}: attention", depth * 4 * dim * sum(n**2 for n in spans), tokens * 8 * dim, 0),
        # norm 6 D, sum and norm 12 D, GELU 4 M, sum 10 D
        Part(f"{name}: norms, sums, GELU", 0, tokens * (28 * dim + 4 * mlp_dim), 0),
    ]


def of_predictor(counts, dim, depth, attends):
    """Its blocks; where targets attend to the context alone, they alone go through all of them."""
    if attends == "all":
        return transformer("predictor", [c + t for c, t in counts], dim, depth, 4 * dim)
    context, target = (depth * sum(each) for each in zip(*counts))
    matrices, attention, rest = transformer("predictor", [0], dim, depth, 4 * dim)
    # of targets query, projection and MLP, 10 D^2; of the context keys and values, 2 D^2
    products = 2 * (target * 10 + context * 2) * dim**2
    looked_at = depth * 4 * dim * sum(c * t for c, t in counts)
    return [
        matrices._replace(forward=products, activations=(target * 28 + context * 6) * dim),
        attention._replace(forward=looked_at, activations=(target * 4 + context * 4) * dim),
        rest._replace(activations=target * 44 * dim + context * 6 * dim),
    ]


def linear(name, tokens, dim_in, dim_out):
    return Part(
        name, 2 * tokens * dim_in * dim_out, 2 * tokens * (dim_in + dim_out), 2 * dim_in * dim_out
    )


def forward_parts(encoder, predictor, counts):
    """The parts of a forward pass.

    encoder    model.EncoderConfig
    predictor  {"dim", "depth", "dim_out"}, among others: what model.Predictor takes
    counts     (context, target) tokens of each mask family
    """
    context = sum(c for c, _ in counts)
    target = sum(t for _, t in counts)
    dim = predictor["dim"]
    seen = predictor.get("seen", False)  # whether there is a loss at the context, too
    return [
        linear("patch embedding", context, encoder.patch_dim, encoder.dim),
        *transformer(
            "encoder", [c for c, _ in counts], encoder.dim, encoder.depth, encoder.mlp_dim
        ),
        linear("into the predictor", context, encoder.dim, dim),
        *of_predictor(counts, dim, predictor["depth"], predictor.get("attends", "all")),
        linear("predictions", target, dim, predictor["dim_out"]),
        *[linear("of what is seen", context, encoder.dim, predictor["dim_out"])] * seen,
        # prediction 2, target 2, gradient 2
        Part("loss and its gradient", 0, (target + context * seen) * predictor["dim_out"] * 6, 0),
    ]


def step_flops(encoder, predictor, counts):
    """Model FLOPs of a training step, a clip: forward, and twice that for the backward pass."""
    return 3 * sum(part.forward for part in forward_parts(encoder, predictor, counts))


def product_rate(device, dtype, side, least, seconds):
    """Operations a second of products of two matrices of `side`: the fastest of at least `least`,
    and of as many as `seconds` hold.
    """
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    times, begin = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        wait()
        start = time.perf_counter()
        torch.matmul(a, b)
        wait()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def matrix_rate(device, dtype="bf16", seconds=0.2):
    """Operations a second of large matrix products on `device`, the best of repeated runs over
    about `seconds`: what MFU is a share of.

    A GPU that draws its full power for minutes clocks lower than this.
    """
    if device.type == "cuda":
        return product_rate(device, dtype, 8192, 4, seconds)
    # beside another job single products are slowed down tenfold; the best of many is not
    rate = product_rate(device, dtype, 512, 8, seconds)
    # a CPU that emulates bfloat16 would take minutes
    return product_rate(device, dtype, 2048, 4, 2 * seconds) if 2 * 2048**3 / rate < 1 else rate


def slow_bf16(device, dtype):
    """A line where this CPU multiplies matrices slower in bfloat16 than in float32; else None."""
    if (
        device.type == "cpu"
        and dtype == "bf16"
        and product_rate(device, "fp32", 512, 4, 0.05) > product_rate(device, "bf16", 512, 4, 0.05)
    ):
        return (
            "this processor multiplies matrices faster in float32 than in bfloat16: --dtype fp32 is"
            " the faster choice"
        )
    return None


def fewer_threads(device, dtype, rate):
    """A line where one thread of this CPU multiplies matrices about as fast as all of them, which
    do so at `rate`; else None.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    torch.set_num_threads(1)
    alone = matrix_rate(device, dtype)
    torch.set_num_threads(threads)
    if rate > 1.15 * alone:
        return None
    return (
        f"{threads} compute threads multiply matrices {rate / alone:.1f} times as fast as one:"
        " other jobs keep the cores busy; --compute_threads 1 may be the faster choice (the last"
        " bits depend on it)"
    )


def of_training(s, work, place, log):
    """The share of all ranks' matrix rate that a clip a second is, with a line on it.

    s, work  train.py's settings and its task.Task
    """
    counts = [mask_counts(family, work.encoder.grid) for family in s.masks]
    counts = [(context, kept_targets(target, s.targets)) for context, target in counts]
    flops = step_flops(work.encoder, work.predictor, counts)
    rate = 1e12 * s.matrix_rate if s.matrix_rate else matrix_rate(place, s.dtype)
    advice = []
    if not s.matrix_rate:
        advice.append(slow_bf16(place, s.dtype))
        advice.append(fewer_threads(place, s.dtype, rate) if place.type == "cpu" else None)
    for line in filter(None, advice):
        log(line)
    log(
        f"a step has {flops * s.batch_size / 1e9:.0f} GFLOP ({flops / 1e9:.1f} a clip); MFU is the"
        f" share of {rate * world / 1e12:.2f} TFLOP/s of {s.dtype} matrix products"
    )
    return flops / rate / world
