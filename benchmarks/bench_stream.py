"""A policy's wait for features of a new frame: the past kept (salt/stream.py) against the whole
window encoded anew, which is what there is without it.

    python benchmarks/bench.py stream [--sizes large] [--dtype bf16] [--device cuda] [--json]

Both take turns on one stream, once the window is full; a turn is one hop of frames that are already
of the clip's size. Beside their ratio stands that of the operations, which it cannot pass.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import bench
from salt import config

sizes = ["small", "base", "large"]  # or tiny, huge, giant
hop = 2  # frames a turn
batch = 1  # cameras
dtype: Literal["bf16", "fp32"] = "bf16"
device = "cpu"  # cpu or cuda
rounds = 8  # turns, of which the first is a warm-up
json: bool = False  # write OUT/stream-PROCESSOR-DATE.json
out = "benchmarks"  # folder for it

settings = config.apply(globals(), least={"rounds": 3, "hop": 2, "batch": 1})

import numpy as np  # after the settings, so that --help is quick

import model
from salt.stream import StreamingEncoder

found = bench.machine(device)
random = np.random.default_rng(0)


def turn(stream, frames):
    def measure(number):
        def hop_of_frames():
            for frame in frames:
                answer = stream.push(frame)
            return answer.float().cpu()  # waits for a GPU

        return 1e3 * bench.seconds(hop_of_frames)

    return measure


def operations(c, tokens, keys):
    """Of `tokens` through all blocks, each looking at `keys`: multiplications and additions."""
    matrices = 4 * c.dim**2 + 2 * c.dim * c.mlp_dim
    return 2 * tokens * (c.depth * (matrices + 2 * keys * c.dim) + c.patch_dim * c.dim)


results = {}
for size in sizes:
    encoder = model.Encoder(model.config_of_size(size, positions="rope")).eval().to(device)
    model.cast_matrices(encoder, dtype)
    c = encoder.config
    frames = random.integers(0, 256, (hop, batch, c.size, c.size, 3), np.uint8)
    streams = {
        "past kept": StreamingEncoder(encoder, hop=hop),
        "window anew": StreamingEncoder(encoder, hop=hop, causal=False),
    }
    for stream in streams.values():
        for _ in range(c.frames // hop):
            for frame in frames:
                stream.push(frame)
    turns = {name: turn(stream, frames) for name, stream in streams.items()}
    taken = bench.take_turns(turns, rounds)
    new = c.grid[1] * c.grid[2] * (hop // c.tubelet)
    kept, anew = operations(c, new, c.tokens), operations(c, c.tokens, c.tokens)
    ratio = taken["window anew"][1] / taken["past kept"][1]
    for name, (low, middle, high) in taken.items():
        print(f"{size:6} {name:12} {middle:8.1f} ms a hop of {hop} frames  [{low:.1f}, {high:.1f}]")
    gflop = kept / 1e9
    print(f"       ratio {ratio:.2f}; of operations {anew / kept:.2f} ({gflop:.1f} GFLOP a camera)")
    results[size] = {"ms": taken, "ratio": ratio, "operations": {"past kept": kept, "anew": anew}}
if json:
    bench.write("stream", out, found, settings, results)
