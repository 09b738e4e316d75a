"""What a training step must do, and how long that takes at a given matrix rate and bandwidth:
python benchmarks/bench.py budget [--sizes large --batch_size 24]

By arithmetic alone (budget.py). The columns `forward` are a forward pass; those a step add the
backward pass, which has twice the operations and twice the bytes. For two CPU cores with AMX:
--batch_size 2 --matrix_rate 2.2 --bandwidth 0.05. A part takes the longer of its operations over
the rate and its bytes over the bandwidth; docs/STEP.md discusses the result.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config

sizes = ["base", "large"]  # students
batch_size = 24  # clips a step
matrix_rate = 790.0  # dense bf16 TFLOP/s; an H200 multiplying large matrices
bandwidth = 4.0  # TB/s of memory; an H200 copying
predictor_dim = 512  # predictor width
predictor_depth = 12  # its blocks
masks = ["short", "long"]  # families of a step

config.apply(globals(), least={"batch_size": 1, "matrix_rate": 1e-6, "bandwidth": 1e-6})

import model
from benchmarks import budget
from salt.masks import mask_counts

for size in sizes:
    encoder = model.config_of_size(size)
    predictor_config = {"dim": predictor_dim, "depth": predictor_depth, "dim_out": 768}
    counts = [mask_counts(family, encoder.grid) for family in masks]
    student = model.Encoder(encoder)
    predictor = model.Predictor(
        encoder.dim, 768, encoder.tokens, masks, predictor_dim, predictor_depth, 8
    )
    weights = sum(
        parameter.numel() for network in (student, predictor) for parameter in network.parameters()
    )
    print(
        f"ViT {size}, {weights / 1e6:.0f} M weights with the predictor, {batch_size} clips a step,"
        f" {matrix_rate:g} TFLOP/s, {bandwidth:g} TB/s; a clip's tokens: "
        + ", ".join(f"{family} {seen} + {asked}" for family, (seen, asked) in zip(masks, counts))
    )
    print(
        "| part | forward, GFLOP a clip | forward, MB a clip | GFLOP a step | GB a step |"
        " operations, ms | bytes, ms | binds |\n|---|---|---|---|---|---|---|---|"
    )
    total = {"operations": 0.0, "bytes": 0.0, "both": 0.0}
    rows = [
        (
            part.name,
            part.forward,
            part.activations,
            3 * batch_size * part.forward,
            3 * (batch_size * part.activations + part.weights),
        )
        for part in budget.forward_parts(encoder, predictor_config, counts)
    ]
    rows[-1] = (*rows[-1][:4], rows[-1][4] / 3)  # the loss comes with its gradient
    rows += [
        (f"optimiser: {name}", 0, 0, 0, each * weights)
        for name, each in budget.OPTIMISER_BYTES.items()
    ]
    for name, forward, activations, operations, moved in rows:
        by_rate, by_memory = operations / matrix_rate / 1e9, moved / bandwidth / 1e9
        total = {
            "operations": total["operations"] + by_rate,
            "bytes": total["bytes"] + by_memory,
            "both": total["both"] + max(by_rate, by_memory),
        }
        print(
            f"| {name} | {forward / 1e9:.1f} | {activations / 1e6:.1f} | {operations / 1e9:.0f} |"
            f" {moved / 1e9:.2f} | {by_rate:.2f} | {by_memory:.2f} |"
            f" {'operations' if by_rate > by_memory else 'bytes'} |"
        )
    flops = batch_size * budget.step_flops(encoder, predictor_config, counts)
    print(
        f"| **step** | {flops / 3e9 / batch_size:.1f} | {sum(row[2] for row in rows) / 1e6:.1f} |"
        f" {flops / 1e9:.0f} | {sum(row[4] for row in rows) / 1e9:.2f} | {total['operations']:.2f}"
        f" | {total['bytes']:.2f} | |"
    )
    print(
        f"no step is shorter than {total['operations']:.1f} ms"
        f" ({1e3 * batch_size / total['operations']:.3g} clips/s, MFU 100 %); kernel after kernel"
        f" at these rates {total['both']:.1f} ms ({1e3 * batch_size / total['both']:.3g} clips/s,"
        f" MFU {total['operations'] / total['both']:.0%})\n"
    )
