"""The training step against the textbook's.

    python benchmarks/bench.py step [--device cuda --batch_sizes 24] [--json]

The textbook step: a Conv3d embeds every patch and the context is gathered after; encoder and
predictor run once a mask family; targets are gathered and compared by mse_loss; clip_grad_norm_ and
AdamW go tensor by tensor; autocast to bfloat16, scaled_dot_product_attention, no compilation. Ours
is the loop of train.py. Both start from the same weights and see the same clips and masks; their
losses must agree. They take turns in one process, and so do our variants: torch.compile over the
blocks (with and without a CUDA graph), recomputation, families one after another, and clips from a
cache while the loader runs. Peak memory is that of a process of its own. MFU is the share of the
matrix rate measured in this run (budget.py counts the operations).
"""

import collections
import json as json_format
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import bench
from salt import config
from salt.errors import InputError
from salt.positions import position_table

sizes = ["base", "large"]  # students
batch_sizes = [2]  # clips a step
device: Literal["cpu", "cuda"] = "cpu"  # cpu or cuda
dtype: Literal["bf16", "fp32"] = "bf16"  # compute of both; attention is always measured in bf16
depth: int | None = None  # student blocks, where not those of its size
resolution = 224  # pixels of a clip's side; at another one there is no variant loader
positions: Literal["table", "table3d", "rope"] = "table"  # of ours; the textbook's are a table
predictor_depth = 12  # predictor blocks
predictor_dim = 512  # predictor width
predictor_heads = 8  # heads of its attention
rounds = 6  # turns of each, the first of which is a warm-up
# who takes turns; with compiled on a GPU a CUDA graph and --deterministic, too, alone
variants: list[Literal["textbook", "ours", "compiled", "recompute", "apart", "loader"]] = [
    "textbook",
    "ours",
    "compiled",
    "recompute",
    "apart",
    "loader",
]
# also the ways to give two families one pass of attention, forward and backward
attention: bool = True
# time of each phase of our step, and of the operators that take longest
profile: bool = True
memory: bool = True  # peak memory, a process each
# steps (200, say) of a small model by the textbook in float32 and under autocast and by ours, drawn
# to docs/step-losses.png; nothing else is measured
curves = 0
clips = 48  # of the cache that the loader reads
folder = "out/bench"  # for that cache, removed again
json: bool = False  # write OUT/step-PROCESSOR-DATE.json
out = "benchmarks"  # folder for it
# (internal: the process whose memory is measured, SIZE,VARIANT,BATCH_SIZE)
inside: str | None = None

settings = config.apply(
    globals(),
    least={"rounds": 3, "clips": 1, "depth": 1, "resolution": 32}
    | {"predictor_depth": 1, "predictor_dim": 8, "predictor_heads": 1},
)
if resolution != 224 and "loader" in variants and not inside:
    raise InputError(f"--resolution {resolution}: leave loader out of --variants")

if not (inside and ",textbook," in inside):
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py
import torch  # after the settings, so that --help is quick
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model
from benchmarks import budget
from salt import cache, ops, optimiser
from salt.clips import Records
from salt.graph import WARM_UP, Graph
from salt.loader import CONTEXT, TARGET, Batch, Loader
from salt.masks import mask_counts, sample_masks, shuffled
from salt.score import Space
from salt.views import View, grid_of

FAMILIES = ("short", "long")
GRID = grid_of(View(16, resolution, resolution), 16, 2)
N = math.prod(GRID)
D = 768
COUNTS = [mask_counts(family, GRID) for family in FAMILIES]
PREDICTOR = {"dim": predictor_dim, "depth": predictor_depth, "heads": predictor_heads}
if positions != "table" and "textbook" in variants and not inside:
    raise InputError(f"--positions {positions} is ours alone: leave textbook out of --variants")
on_gpu = device == "cuda"
if on_gpu and not torch.cuda.is_available():
    raise InputError("--device cuda: torch sees no GPU here")
torch.set_float32_matmul_precision("high")
if not on_gpu and not (inside and ",textbook," in inside):
    ops.keep_freed_memory()  # taking turns, the textbook has it, too: it is the process's
wait = torch.cuda.synchronize if on_gpu else lambda: None

AHEAD = 2  # batches that the loader keeps ready


# ---- the textbook


class TextbookAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class TextbookBlock(nn.Module):
    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), TextbookAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextbookEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patch_embed = nn.Conv3d(
            3, c.dim, (c.tubelet, c.patch, c.patch), (c.tubelet, c.patch, c.patch)
        )
        self.register_buffer("position", position_table(c.tokens, c.dim))
        self.blocks = nn.ModuleList(
            TextbookBlock(c.dim, c.heads, c.mlp_dim) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)

    def forward(self, video, index):
        x = self.patch_embed(video).flatten(2).transpose(1, 2) + self.position
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextbookPredictor(nn.Module):
    def __init__(self, dim_in):
        super().__init__()
        dim = PREDICTOR["dim"]
        self.embed = nn.Linear(dim_in, dim)
        self.mask_tokens = nn.Parameter(torch.zeros(len(FAMILIES), dim))
        self.register_buffer("position", position_table(N, dim))
        self.blocks = nn.ModuleList(
            TextbookBlock(dim, PREDICTOR["heads"], 4 * dim) for _ in range(PREDICTOR["depth"])
        )
        self.norm, self.proj = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, D)

    def forward(self, context, masks, family):
        x = self.embed(context) + self.position[masks.context]
        x = torch.cat([x, self.mask_tokens[family] + self.position[masks.target]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x)[:, masks.context.shape[1] :])


class Textbook:
    """A step as most code bases have it, from a Salt's weights."""

    def __init__(self, salt, encoder_config):
        self.config = encoder_config
        self.encoder = TextbookEncoder(encoder_config).to(device)
        self.predictor = TextbookPredictor(encoder_config.dim).to(device)
        for theirs, ours in ((self.encoder, salt.student), (self.predictor, salt.predictor)):
            state = {}
            for name, value in ours.state_dict().items():
                name = name.replace("fc1", "mlp.0").replace("fc2", "mlp.2")
                state[name] = (
                    value.view(theirs.state_dict()[name].shape)
                    if name == "patch_embed.weight"
                    else value
                )
                if name.endswith("q_bias"):
                    state[name.replace("q_bias", "qkv.bias")] = torch.cat(
                        [
                            value,
                            torch.zeros_like(value),
                            ours.state_dict()[name.replace("q_bias", "v_bias")],
                        ]
                    )
            theirs.load_state_dict(
                {name: state.get(name, value) for name, value in theirs.state_dict().items()}
            )
        self.parameters = [*self.encoder.parameters(), *self.predictor.parameters()]

        def decayed(p):
            return p.dim() >= 2 and p is not self.predictor.mask_tokens

        groups = [
            {"params": [p for p in self.parameters if decayed(p)], "weight_decay": 0.04},
            {"params": [p for p in self.parameters if not decayed(p)], "weight_decay": 0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1e-4, betas=(0.9, 0.95), foreach=False, fused=False
        )
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1, 1)
            for x in (encoder_config.mean, encoder_config.std)
        )

    def step(self, batch, half=True):
        t, h, w = GRID
        # the clip as a decoder gives it: not counted
        video = (
            batch.patches.view(-1, t, h, w, 3, 2, 16, 16)
            .permute(0, 4, 1, 5, 2, 6, 3, 7)
            .reshape(-1, 3, 2 * t, 16 * h, 16 * w)
        )
        wait()
        start, total = time.perf_counter(), 0
        video = (video.float() / 255 - self.mean) / self.std
        with torch.autocast(device, torch.bfloat16, enabled=half and dtype == "bf16"):
            for number, masks in enumerate(batch.masks):
                prediction = self.predictor(self.encoder(video, masks.context), masks, number)
                target = batch.latents.gather(1, masks.target[..., None].expand(-1, -1, D)).float()
                total = total + F.mse_loss(prediction.float(), target) / len(FAMILIES)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.02, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - start, total.detach(), {}


# ---- ours: the loop of train.py


class Ours:
    def __init__(self, salt, graph=False):
        self.salt, self.parameters = salt, list(salt.parameters())
        self.graph = Graph(self.passes, salt, print) if graph else None
        self.optimizer = torch.optim.AdamW(
            optimiser.parameter_groups(salt, 0.04), lr=1e-4, betas=(0.9, 0.95), fused=True
        )
        self.space = Space("latents", "none", None, None, torch.zeros(N, D, device=device))

    def forward_backward(self, batch, weight, mark):
        def net(patches, masks):
            predictions = self.salt(patches, masks)
            mark("forward")
            return predictions

        weighted, errors = model.salt_loss(net, batch, self.space, weight=weight)
        mark("loss")
        weighted.backward()
        mark("backward")
        return errors[0]

    def passes(self, batch):
        """As train.py's."""
        model.cast_matrices(self.salt, dtype)
        weighted, errors = model.salt_loss(self.salt, batch, self.space)
        weighted.backward()
        return [(errors, self.salt.features)]

    def step(self, batch, apart=False, phases=None):
        if self.graph:
            wait()
            start = time.perf_counter()
            ((errors, _),) = self.graph(batch)
            optimiser.update(self.optimizer, self.parameters, 0.02)
            wait()
            return time.perf_counter() - start, errors[0], None

        def mark(name):
            if phases is not None:
                wait()
                phases[name] = phases.get(name, 0) + time.perf_counter() - self.last
                self.last = time.perf_counter()

        if phases is None:
            wait()
        start = self.last = time.perf_counter()
        model.cast_matrices(self.salt, dtype)
        mark("cast")
        if apart:
            error = sum(
                self.forward_backward(batch._replace(masks=[drawn]), 1 / len(FAMILIES), mark)
                for drawn in batch.masks
            ) / len(FAMILIES)
        else:
            error = self.forward_backward(batch, 1, mark)
        optimiser.update(self.optimizer, self.parameters, 0.02)
        mark("norm and AdamW")
        wait()
        return time.perf_counter() - start, error, phases


def some_batch(batch_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**62, (batch_size,), generator=generator).to(device)
    patches = torch.randint(
        0, 256, (batch_size, N, 1536), dtype=torch.uint8, generator=generator
    ).to(device)
    latents = torch.randn(batch_size, N, D, generator=generator).half().to(device)
    return Batch(
        ids, patches, latents, [sample_masks(ids, 0, 0, family, GRID) for family in FAMILIES]
    )


def set_up(size):
    torch.manual_seed(0)
    shape = {"positions": positions, "size": resolution} | ({"depth": depth} if depth else {})
    encoder_config = model.config_of_size(size, **shape)
    return encoder_config, model.build_salt(
        encoder_config,
        {
            "dim_in": encoder_config.dim,
            "dim_out": D,
            "tokens": N,
            "families": FAMILIES,
            "positions": positions,
            "grid": encoder_config.grid,
            **PREDICTOR,
        },
    ).to(device)


def compiled(salt):
    for block in (*salt.student.blocks, *salt.predictor.blocks):
        block.compile(dynamic=False)
    return salt


# one variant alone: its peak memory, and its time in a CUDA graph, which keeps its memory
if inside:
    size = inside.split(",")[0]
    variant = inside.split(",")[1]
    batch_size = int(inside.split(",")[2])
    encoder_config, salt = set_up(size)
    if variant == "textbook":
        step = Textbook(salt, encoder_config)
        del salt
    else:
        salt.student.recompute = salt.predictor.recompute = variant == "recompute"
        if variant == "deterministic":  # train.py --deterministic
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        step = Ours(
            compiled(salt) if variant in ("compiled", "graph", "deterministic") else salt,
            graph=variant == "graph",
        )
    batch, times = some_batch(batch_size), []
    for _ in range(rounds):
        times.append(step.step(batch)[0])
    if variant == "graph" and step.graph.graph is None:
        sys.exit("memory is short for a graph")
    print(
        json_format.dumps(
            {
                "bytes": (
                    torch.cuda.max_memory_allocated()
                    if on_gpu
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                ),
                "seconds": statistics.median(times[rounds // 2 :]),  # a graph is there by then
            }
        )
    )
    sys.exit(0)


def alone(size, variant, batch_size):
    command = [
        sys.executable,
        bench.__file__,
        "step",
        "--inside",
        f"{size},{variant},{batch_size}",
        "--device",
        device,
        "--dtype",
        dtype,
        "--predictor_depth",
        str(predictor_depth),
        "--predictor_dim",
        str(predictor_dim),
        "--predictor_heads",
        str(predictor_heads),
        "--resolution",
        str(resolution),
        *(["--depth", str(depth)] if depth else []),
        "--positions",
        positions,
        "--rounds",
        str(2 * (WARM_UP + 2)) if on_gpu else "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return (
        json_format.loads(done.stdout.splitlines()[-1])
        if done.returncode == 0
        else {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    )


# ---- attention alone: what gives two families one pass


# Each takes a shape and gives a function of qkv: masks and offsets are made once.
def masked_attention(qkv, lengths):
    span = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(qkv.device)
    mask = span[:, None] == span[None]
    return lambda qkv: F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in qkv.unbind(2)), attn_mask=mask
    ).transpose(1, 2)


def flex(qkv, lengths):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    span = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(qkv.device)
    mask = create_block_mask(
        lambda b, h, i, j: span[i] == span[j], None, None, len(span), len(span), device=qkv.device
    )
    call = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), dynamic=False)
    return lambda qkv: call(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)


def varlen(qkv, lengths):
    from torch.nn.attention.varlen import varlen_attn

    # a clip's spans follow each other
    ends = torch.tensor([0, *(lengths * len(qkv))]).cumsum(0).int().to(qkv.device)
    return lambda qkv: varlen_attn(
        *qkv.flatten(0, 1).unbind(1), ends, ends, max(lengths), max(lengths)
    ).view(qkv.shape[0], qkv.shape[1], *qkv.shape[3:])


def bench_attention(batch_size, shapes):
    def plain(call):
        return lambda qkv, lengths: lambda qkv: call(qkv, lengths)

    ways = {
        "ours": plain(ops.attention),
        "a call a span": plain(ops.attention_reference),
        "boolean mask": masked_attention,
        "flex": flex,
    } | ({"varlen": varlen} if on_gpu else {})
    for name, (lengths, heads, width) in shapes.items():
        qkv = (
            torch.randn(batch_size, sum(lengths), 3, heads, width, device=device)
            .bfloat16()
            .requires_grad_()
        )
        gradient = torch.randn(batch_size, sum(lengths), heads, width, device=device).bfloat16()
        expected, usable = None, {}
        for way, call in ways.items():
            try:
                call = call(qkv, lengths)
                found = call(qkv)
                (back,) = torch.autograd.grad(found, qkv, gradient)
                expected = expected or (found.detach(), back)
                assert all(
                    (a - b).norm() / b.norm() < 2e-2 for a, b in zip((found, back), expected)
                ), f"{way} gives another result"
                usable[way] = call
            except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
                print(
                    f"  attention, {name}: {way} does not run here"
                    f" ({' '.join(str(error).split())[:120]})"
                )

        def both(call):
            wait()
            taken = bench.seconds(lambda: (torch.autograd.grad(call(qkv), qkv, gradient), wait()))
            return 1e3 * taken

        times = bench.take_turns(
            {way: lambda _, call=call: both(call) for way, call in usable.items()}, max(rounds, 8)
        )
        operations = 3 * 4 * batch_size * heads * width * sum(n**2 for n in lengths)
        print(
            f"  attention, {name} {lengths}, {heads} heads, forward and backward: "
            + ", ".join(f"{way} {t[1]:.2f} ms" for way, t in times.items())
            + f"; ours {operations / times['ours'][1] / 1e9:.2f} TFLOP/s",
            flush=True,
        )
        yield {"where": name, "lengths": lengths, "batch_size": batch_size, "ms": times}


# ---- the step


def bench_step(size, batch_size, rate, stream):
    encoder_config, salt = set_up(size)
    flops = batch_size * budget.step_flops(encoder_config, {**PREDICTOR, "dim_out": D}, COUNTS)
    textbook = Textbook(salt, encoder_config) if "textbook" in variants else None
    ours = Ours(compiled(salt))
    looped = Ours(salt, graph=True) if on_gpu and "loader" in variants else ours  # as train.py
    batch, eager = some_batch(batch_size), lambda: torch.compiler.set_stance("force_eager")
    losses = []
    for seed in range(3) if textbook else ():
        same = some_batch(batch_size, seed)
        with eager():
            losses.append((textbook.step(same)[1].item(), ours.step(same)[1].item()))
    assert all(math.isclose(a, b, rel_tol=5e-3) for a, b in losses), f"losses differ: {losses}"

    def measure(variant):
        # what train.py does there
        with (
            torch.compiler.set_stance("default")
            if variant == "compiled" or on_gpu and variant in ("loader", "recompute", "apart")
            else eager()
        ):
            salt.student.recompute = salt.predictor.recompute = variant == "recompute"
            if variant == "textbook":
                return textbook.step(batch)[0]
            if variant == "loader":  # the wait for a batch counts, too
                wait()
                start = time.perf_counter()
                looped.step(next(stream))
                return time.perf_counter() - start
            return ours.step(batch, apart=variant == "apart")[0]

    times = bench.take_turns(
        {
            variant: lambda _, variant=variant: measure(variant)
            for variant in variants
            if variant != "loader"
        },
        rounds,
    )
    # in a row: while others take their turns it would fill the batches that it keeps ahead
    if "loader" in variants:
        before = max(AHEAD, WARM_UP) + 1
        kept = [measure("loader") for _ in range(before + rounds)]
        times["loader"] = statistics.quantiles(kept[before:], n=4, method="inclusive")
        looped.graph = None  # and with it the memory of its activations
    result = {
        "size": size,
        "batch_size": batch_size,
        "flops": flops,
        "losses": losses,
        "seconds": times,
    }
    for variant, (low, middle, high) in times.items():
        against = (
            f", {times['textbook'][1] / middle:.2f}x the textbook's speed"
            if textbook and variant != "textbook"
            else ""
        )
        print(
            f"  {variant:9} {1e3 * middle:9.1f} ms [{1e3 * low:.1f}, {1e3 * high:.1f}] "
            f" {batch_size / middle:7.2f} clips/s  {flops / middle / 1e12:7.2f} TFLOP/s  MFU"
            f" {flops / middle / rate:4.0%}{against}",
            flush=True,
        )
    if textbook:
        print("  losses, textbook and ours: " + ", ".join(f"{a:.5f} {b:.5f}" for a, b in losses))
    if profile:
        salt.student.recompute = salt.predictor.recompute = False
        with torch.compiler.set_stance("default") if on_gpu and "compiled" in variants else eager():
            runs = [ours.step(batch, phases={})[2] for _ in range(4)][1:]
            result["operators"] = largest_operators(lambda: ours.step(batch))
        result["phases"] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        whole = sum(result["phases"].values())
        print(
            "  phases: "
            + ", ".join(
                f"{name} {1e3 * t:.1f} ms ({t / whole:.0%})" for name, t in result["phases"].items()
            ),
            flush=True,
        )
        print(
            "  operators: "
            + ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in result["operators"].items()),
            flush=True,
        )
    return result


class Clock(TorchDispatchMode):
    """How long each operator takes, here or in a backward pass. torch.profiler would have each step
    find memory that is fresh to it, by which GELU takes four times as long on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.seconds = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.perf_counter() - start
        return result


def largest_operators(step, steps=3, count=12):
    """{name: seconds a step, on the device, in it alone} of those that take longest."""
    with torch.profiler.profile() if on_gpu else Clock() as seen:
        for _ in range(steps):
            step()
    seconds = (
        {each.key: each.self_device_time_total / 1e6 for each in seen.key_averages()}
        if on_gpu
        else seen.seconds
    )
    return {name: s / steps for name, s in collections.Counter(seconds).most_common(count)}


# ---- losses of a small model, side by side


def draw_curves():
    """The textbook in float32 and under autocast, and ours: how far bfloat16 alone takes a run from
    float32, and how far ours is.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    PREDICTOR.update(dim=96, depth=2, heads=3)
    torch.manual_seed(0)
    shape = model.config_of_size("tiny", depth=3)
    salt = model.build_salt(
        shape, {"dim_in": shape.dim, "dim_out": D, "tokens": N, "families": FAMILIES, **PREDICTOR}
    ).to(device)
    runs = {
        "plain float32 (textbook)": Textbook(salt, shape),
        "textbook under autocast": Textbook(salt, shape),
        "ours, bfloat16": Ours(salt),
    }
    random = torch.Generator().manual_seed(0)
    projection = torch.randn(96, D) / 8
    places = position_table(N, 96)
    losses = []
    for step in tqdm(range(curves), unit="step", dynamic_ncols=True):
        ids = torch.randint(0, 2**62, (2,), generator=random)
        # clouds that move
        coarse = 0.6 * torch.rand(2, 3, 1, 1, 1, generator=random) + 0.4 * F.interpolate(
            torch.rand(2, 3, 4, 7, 7, generator=random), size=(16, 224, 224), mode="trilinear"
        )
        patches = torch.from_numpy(
            ops.patchify((255 * coarse).byte().permute(0, 2, 3, 4, 1).numpy(), 16, 2)
        )
        # linear in the patch's own pixels and place
        latents = (patches.float().view(2, N, 96, 16).mean(-1) / 64 - 2 + places) @ projection
        batch = Batch(
            ids.to(device),
            patches.to(device),
            latents.half().to(device),
            [sample_masks(ids.to(device), 0, 0, family) for family in FAMILIES],
        )
        for run in runs.values():
            for group in run.optimizer.param_groups:
                group["lr"] = 3e-4 * min(1, (step + 1) / 20)
        losses.append(
            [
                (
                    run.step(batch, half=False)[1].item()
                    if name.startswith("plain")
                    else run.step(batch)[1].item()
                )
                for name, run in runs.items()
            ]
        )
    losses = torch.tensor(losses).T
    apart = 100 * (losses / losses[0] - 1)
    print(
        f"{curves} steps: loss {losses[0, 0]:.4f} to {losses[0, -1]:.4f} in float32; from it "
        + ", ".join(
            f"{name} {apart[i].mean():+.3f} % on average, {apart[i].abs().mean():.3f} % without"
            f" sign, {apart[i].abs().max():.2f} % at most"
            for i, name in enumerate(runs)
            if i
        )
    )
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=[2, 1], constrained_layout=True
    )
    for i, (name, width) in enumerate(zip(runs, (3, 1.8, 0.9))):
        above.plot(losses[i], color=f"C{i}", lw=width, label=name)
        if i:
            below.plot(apart[i], color=f"C{i}", lw=1)
    above.set_ylabel("loss")
    above.set_yscale("log")
    above.legend()
    below.set_ylabel("from float32, %")
    below.set_xlabel("step")
    figure.savefig(bench.ROOT / "docs" / "step-losses.png", dpi=110)
    print("drawn to docs/step-losses.png")


if curves:
    from tqdm import tqdm

    draw_curves()
    sys.exit(0)
print(
    "to reach: 1.5x the textbook on a CPU, with less memory; on one H200 50 % MFU and 240 clips/s"
    " of ViT-L with the loader running",
    flush=True,
)
found, results = bench.machine(device), {"attention": [], "steps": [], "memory": []}
rate = results["matrix_rate"] = budget.matrix_rate(torch.device(device), dtype, 1.0)
print(f"{dtype} matrix rate {rate / 1e12:.2f} TFLOP/s", flush=True)
for batch_size in batch_sizes:
    if attention:
        results["attention"] += bench_attention(
            batch_size,
            {
                "student (large)": (tuple(c for c, _ in COUNTS), 16, 64),
                "predictor": (
                    tuple(c + t for c, t in COUNTS),
                    predictor_heads,
                    predictor_dim // predictor_heads,
                ),
            },
        )
    for size in sizes:
        print(f"ViT {size}, {batch_size} clips a step", flush=True)
        if memory:
            for variant in [
                v for v in ("textbook", "ours", "compiled", "recompute") if v in variants
            ] + (["graph", "deterministic"] if on_gpu and "compiled" in variants else []):
                peak = alone(size, variant, batch_size)
                results["memory"].append(
                    {"size": size, "batch_size": batch_size, "variant": variant, **peak}
                )
                print(
                    f"  {variant:13} "
                    + (
                        f"fails: {peak['failed']}"
                        if "failed" in peak
                        else (
                            f"peak memory {peak['bytes'] / 1e9:.2f} GB, alone"
                            f" {1e3 * peak['seconds']:.1f} ms a step"
                        )
                    ),
                    flush=True,
                )
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="step-") as temporary:
            stream = None
            if "loader" in variants:
                bench.random_cache(Path(temporary) / "cache", max(clips, batch_size))
                records = Records(cache.open_cache(Path(temporary) / "cache"))
                stream = Loader(
                    records,
                    shuffled(len(records), batch_size, 0, range(10**6)),
                    FAMILIES,
                    0,
                    patches=CONTEXT,
                    latents=TARGET,
                    ahead=AHEAD,
                    device=device,
                )
            try:
                results["steps"].append(bench_step(size, batch_size, rate, stream))
            except torch.OutOfMemoryError:
                print(f"  out of memory at {batch_size} clips")
            finally:
                if stream:
                    stream.close()
if json:
    bench.write("step", out, found, settings, results)
