"""Speed of the ops:  python benchmarks/bench.py ops [--device cuda] [--json]

Each op of the extension against eager PyTorch, torch.compile and what memory allows, in one
process, taking turns: medians over the rounds, with the quartiles. Bytes of an op: each input row
it needs once, each output once. Copy bandwidth: clone() of a tensor as large as the op's main
operand, bytes read plus bytes written, in the same rounds. On a GPU four input sets take turns, so
that all but the smallest cases come from memory and not from L2.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import bench
from salt import config
from salt.errors import InputError

device: Literal["cpu", "cuda"] = "cpu"  # where the ops run
threads = 0  # CPU threads; 0: torch's default
rounds = 9  # measurements of each competitor, of which the first is a warm-up
batches = [24, 64]  # clips
widths = [768, 1024, 1280]  # D, of latents and features
dtypes = ["fp32", "bf16"]  # of predictions and features; latents are float16, as cached
# widths at which torch.compile takes part, 0 for none; compiling takes longer than measuring
compiled = [768, 1024, 1280]
mask_batch = 24  # clips of one call in the measurement of masks
json: bool = False  # write OUT/PART-PROCESSOR-DATE.json
out = "benchmarks"  # folder for it
seed = 0  # of masks

_settings = config.apply(globals(), least={"threads": 0, "rounds": 3, "mask_batch": 1})
if min(batches) < 1 or min(widths) < 3:
    raise InputError(
        f"--batches are at least 1 and --widths at least 3, not {batches} and {widths}"
    )
if set(dtypes) - {"fp32", "bf16"}:
    raise InputError(f"--dtypes takes fp32 and bf16, not {', '.join(dtypes)}")

if not os.access("/dev/shm", os.W_OK):
    # its worker processes want semaphores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np  # after the settings, so that --help is quick
import torch
import torch.nn.functional as F

from salt import extension, ops
from salt.masks import FAMILIES, mask_counts, sample_masks

if device == "cuda" and not torch.cuda.is_available():
    raise InputError(
        "--device cuda: torch sees no GPU; run python -c 'import torch; torch.cuda.init()' for the"
        " reason, or use --device cpu"
    )
if not ops.has_kernel(torch.empty(0, device=device)):
    raise InputError(
        f"there is nothing of our own to measure on {device}: {extension.describe(device)}"
    )
if threads:
    torch.set_num_threads(threads)
# one compilation a shape is what a training run would have
torch._dynamo.config.cache_size_limit = 10_000
GRID, N = (8, 14, 14), 1568
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = 4 if device == "cuda" else 1  # input sets that take turns


def milliseconds(call, turn):
    """One call's time; on a GPU by events, with all launches queued while it sleeps, so that the
    host's part is not in it.
    """
    if device == "cpu":
        return 1e3 * bench.seconds(lambda: call(turn))
    before = torch.cuda.Event(enable_timing=True)
    after = torch.cuda.Event(enable_timing=True)
    repeats = 2 * SETS
    torch.cuda._sleep(20_000_000)  # cycles, about ten milliseconds
    before.record()
    for i in range(repeats):
        call(turn + i)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / repeats


def take_turns(calls):
    """{name: call(turn)} -> {name: [lower quartile, median, upper quartile]} in milliseconds."""
    return bench.take_turns(
        {name: functools.partial(milliseconds, call) for name, call in calls.items()}, rounds
    )


def report(op, what, shape, dtype, calls, count, copy_bytes):
    """Measure one case, print its line and return it for the JSON file. `count`: the op's bytes."""
    times = take_turns(calls)
    median = {name: quartiles[1] for name, quartiles in times.items()}
    bandwidth, copy = count / median["ours"] / 1e6, copy_bytes / median["copy"] / 1e6
    ratios = {
        name: median[name] / median["ours"] for name in ("eager", "compile") if name in median
    }
    low, _, high = times["ours"]
    print(
        f"{op:15} {what:8} {str(list(shape)):18} {dtype:5} {median['ours']:9.3f} ms [{low:.3f},"
        f" {high:.3f}]  "
        + "  ".join(f"{name} {ratio:5.2f}x" for name, ratio in ratios.items())
        + f"   {bandwidth:7.1f} GB/s of {copy:7.1f} copy = {bandwidth / copy:4.0%}",
        flush=True,
    )
    return {
        "op": op,
        "pass": what,
        "shape": list(shape),
        "dtype": dtype,
        "bytes": count,
        "ms": times,
        "speedup": ratios,
        "GB_per_s": bandwidth,
        "copy_GB_per_s": copy,
        "share_of_copy": bandwidth / copy,
    }


def forward_and_backward(forward, leaf):
    """(loss, gradient) by autograd, as the layers before would get it."""
    result = forward()
    return result, torch.autograd.grad(result, leaf, ones(tuple(result.shape), result.dtype))


@functools.lru_cache(2)
def ones(shape, dtype):
    return torch.ones(shape, dtype=dtype, device=device)


def cases():
    """(B, K context, K target, family, D, dtype name) of every case; masks as in training."""
    return [
        (b, *mask_counts(family, GRID), family, d, name)
        for b in batches
        for family in ("short", "long")
        for d in widths
        for name in dtypes
    ]


def eager_gather(x, index):
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def eager_loss(prediction, target, index):
    return F.mse_loss(prediction.float(), eager_gather(target, index).float())


def eager_patches(patches, index, mean, std, dtype):
    return ((eager_gather(patches, index).float() / 255 - mean) / std).to(dtype)


def masks_of(b, family):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**63, b)).to(device)
    return sample_masks(ids, 0, seed, family, GRID)


def bench_gather():
    for b, k, _, family, d, name in cases():
        dtype, index = DTYPES[name], masks_of(b, family).context
        inputs = [
            torch.randn(b, N, d, device=device).to(dtype).requires_grad_() for _ in range(SETS)
        ]
        # as large as the result; backward makes all N rows
        copies = [x[:, :k].detach().contiguous() for x in inputs]
        rivals = {"ours": ops.masked_gather, "eager": eager_gather}
        if d in compiled:
            rivals["compile"] = torch.compile(eager_gather, dynamic=False, fullgraph=True)
        copy = {"copy": lambda turn: copies[turn % SETS].clone()}
        row = d * dtype.itemsize
        with torch.no_grad():
            calls = {n: lambda turn, f=f: f(inputs[turn % SETS], index) for n, f in rivals.items()}
            yield report(
                "masked_gather",
                "forward",
                (b, k, d),
                name,
                calls | copy,
                2 * b * k * row,
                2 * b * k * row,
            )
        calls = {
            n: lambda turn, f=f: forward_and_backward(
                lambda: f(inputs[turn % SETS], index), inputs[turn % SETS]
            )
            for n, f in rivals.items()
        }
        copy = {"copy": lambda turn: inputs[turn % SETS].detach().clone()}
        yield report(
            "masked_gather",
            "fwd+bwd",
            (b, k, d),
            name,
            calls | copy,
            b * (3 * k + N) * row,
            2 * b * N * row,
        )


def bench_loss():
    for b, _, k, family, d, name in cases():
        dtype, index = DTYPES[name], masks_of(b, family).target
        predictions = [
            torch.randn(b, k, d, device=device).to(dtype).requires_grad_() for _ in range(SETS)
        ]
        targets = [torch.randn(b, N, d, device=device).half() for _ in range(SETS)]
        rivals = {"ours": ops.masked_mse, "eager": eager_loss}
        if d in compiled:
            rivals["compile"] = torch.compile(eager_loss, dynamic=False, fullgraph=True)
        copy = {"copy": lambda turn: predictions[turn % SETS].detach().clone()}
        size = b * k * d
        with torch.no_grad():
            calls = {
                n: lambda turn, f=f: f(predictions[turn % SETS], targets[turn % SETS], index)
                for n, f in rivals.items()
            }
            yield report(
                "masked_mse",
                "forward",
                (b, k, d),
                name,
                calls | copy,
                size * (dtype.itemsize + 2),
                2 * size * dtype.itemsize,
            )
        calls = {
            n: lambda turn, f=f: forward_and_backward(
                lambda: f(predictions[turn % SETS], targets[turn % SETS], index),
                predictions[turn % SETS],
            )
            for n, f in rivals.items()
        }
        yield report(
            "masked_mse",
            "fwd+bwd",
            (b, k, d),
            name,
            calls | copy,
            size * (2 * dtype.itemsize + 2),
            2 * size * dtype.itemsize,
        )


def bench_patches():
    d = 1536
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    a_channel = [
        torch.tensor(values, device=device).repeat_interleave(d // 3) for values in (mean, std)
    ]
    for b in batches:
        for family in ("short", "long"):
            index = masks_of(b, family).context
            k = index.shape[1]
            inputs = [
                torch.randint(0, 256, (b, N, d), dtype=torch.uint8, device=device)
                for _ in range(SETS)
            ]
            for name in dtypes:
                dtype = DTYPES[name]
                copies = [torch.randn(b, k, d, device=device).to(dtype) for _ in range(SETS)]
                plain = {"eager": eager_patches} | (
                    {"compile": torch.compile(eager_patches, dynamic=False, fullgraph=True)}
                    if any(compiled)
                    else {}
                )
                calls = {
                    "ours": lambda turn: ops.patch_normalise(
                        inputs[turn % SETS], mean, std, index, dtype
                    )
                }
                calls |= {
                    n: lambda turn, f=f: f(inputs[turn % SETS], index, *a_channel, dtype)
                    for n, f in plain.items()
                }
                yield report(
                    "patch_normalise",
                    "forward",
                    (b, k, d),
                    name,
                    calls | {"copy": lambda turn: copies[turn % SETS].clone()},
                    b * k * d * (1 + dtype.itemsize),
                    2 * b * k * d * dtype.itemsize,
                )


def textbook_masks(b, family, generator):
    """The collator as papers describe it: a block size a batch, blocks a clip at random places,
    torch.randint, nonzero, cut to the shortest.
    """
    blocks, area = FAMILIES[family].blocks[0], FAMILIES[family].area
    t, h, w = GRID
    ratio = 0.75 + 0.75 * torch.rand(1, generator=generator).item()
    height, width = (
        max(1, min(side, round((h * w * area * r) ** 0.5)))
        for side, r in ((h, ratio), (w, 1 / ratio))
    )
    contexts, targets = [], []
    for _ in range(b):
        while True:
            keep = torch.ones(GRID, dtype=torch.int32)
            for _ in range(blocks):
                y = torch.randint(0, h - height + 1, (1,), generator=generator)
                x = torch.randint(0, w - width + 1, (1,), generator=generator)
                block = torch.ones(GRID, dtype=torch.int32)
                block[:, y : y + height, x : x + width] = 0
                keep *= block
            keep = keep.flatten()
            context = torch.nonzero(keep).squeeze(1)
            if len(context):
                break
        contexts.append(context)
        targets.append(torch.nonzero(keep == 0).squeeze(1))
    shortest = [min(map(len, lists)) for lists in (contexts, targets)]
    return tuple(
        torch.stack([row[:length] for row in lists])
        for lists, length in zip((contexts, targets), shortest)
    )


def bench_masks():
    """Microseconds a clip and family, of calls in a row: on one CPU thread, or on the GPU."""
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(seed)
    calls_in_a_row = 50 if device == "cpu" else 5
    torch.set_num_threads(1)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**63, mask_batch)).to(device)
    for family in FAMILIES:

        def drawn(turn):
            for i in range(calls_in_a_row):
                sample_masks(ids, turn + i, seed, family, GRID)

        calls = {"ours": drawn}
        if FAMILIES[family].area and device == "cpu":
            calls["textbook"] = lambda turn: textbook_masks(mask_batch, family, generator)
        clips = {"ours": mask_batch * calls_in_a_row, "textbook": mask_batch}
        times = {
            name: [1e3 * value / clips[name] for value in quartiles]
            for name, quartiles in take_turns(calls).items()
        }
        low, median, high = times["ours"]
        against = (
            f"   textbook collator {times['textbook'][1]:.0f} us ="
            f" {times['textbook'][1] / median:.0f}x"
            if "textbook" in times
            else ""
        )
        print(
            f"sample_masks    {family:6} {mask_batch} clips a call   {median:.2f} us a clip"
            f" [{low:.2f}, {high:.2f}]{against}",
            flush=True,
        )
        yield {"op": "sample_masks", "family": family, "clips": mask_batch, "us_per_clip": times}
    torch.set_num_threads(before)


machine = bench.machine(device)
print(
    "to reach: masks <= 1.5 us a clip, on a CPU; masked_mse forward + backward on CPU >= 4x eager"
    " and >= 70 % of copy, on a GPU >= 3x, >= 1.2x torch.compile and >= 85 %. A forward alone"
    " writes nothing, so that its share of copy may pass 100 %. eager: torch.gather, as public"
    " code has it.",
    flush=True,
)
results = []
for measure in (bench_masks, bench_gather, bench_patches, bench_loss):
    results += measure()
if json:
    bench.write("ops", out, machine, _settings, results)
