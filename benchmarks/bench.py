"""Speed, side by side:  python benchmarks/bench.py PART [--name value ...] [--json]

PART is one of these:

    ops     each op of the extension against eager PyTorch, torch.compile and what memory allows;
            --device cuda for a GPU
    data    decoding against bare PyAV, decord and torchcodec; batches from a cache against memcpy,
            warm, and against the disk, cold
    scale   opening and shuffling caches of 168,913 and 10,000,000 records, simulated
    step    the training step against the textbook's: time, peak memory, MFU, phases; --device cuda
            for a GPU
    stream  features of a new frame, with the past kept and with the window encoded anew; --device
            cuda for a GPU
    budget  operations and bytes of a step, part by part, and the time they must take at a given
            matrix rate and bandwidth

Competitors take turns in one process; figures are medians over the rounds, with the quartiles.
`python benchmarks/bench.py PART --help` lists a part's settings. The parts are
benchmarks/bench_PART.py; this file is what they share.
"""

import datetime
import os
import platform
import re
import runpy
import statistics
import subprocess
import sys
import time
from json import dumps
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from salt.errors import InputError, nearest, report_in_one_line

PARTS = ("ops", "data", "scale", "step", "stream", "budget")


def take_turns(measures, rounds):
    """{name: measure(turn) -> a number} -> {name: [lower quartile, median, upper quartile]}, the
    first round not counted.
    """
    values = {name: [] for name in measures}
    for turn in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure(turn))
    return {
        name: statistics.quantiles(kept[1:], n=4, method="inclusive")
        for name, kept in values.items()
    }


def seconds(call):
    """How long one call takes; what it makes is freed outside."""
    start = time.perf_counter()
    result = call()
    taken = time.perf_counter() - start
    del result
    return taken


def random_cache(where, records, dtype="float16", shard_rows=512):
    """A finished cache of random records of the default shape at `where`, with clips."""
    import numpy as np
    import torch

    from salt import cache_writer, shards
    from salt.cache_format import plan_of
    from salt.stored import to_stored
    from salt.views import View

    view = View()
    random = np.random.default_rng(0)
    tokens = 1568
    dim = 768
    before, shards.SHARD_ROWS = shards.SHARD_ROWS, shard_rows
    try:
        teacher = {"name": "random", "sha256": "", "dim": dim, "compute": "fp32"}
        teacher |= {"mean": [0.5] * 3, "std": [0.5] * 3}
        writer = cache_writer.Writer(where, plan_of(view, "", records, teacher, dtype=dtype))
        latents = torch.from_numpy(random.standard_normal((tokens, dim), dtype=np.float32))
        for number in writer.missing():
            with writer.shard(number) as shard:
                for row in range(number * shard_rows, min((number + 1) * shard_rows, records)):
                    clip = random.integers(0, 256, (tokens, 1536), dtype=np.uint8)
                    stored = to_stored(latents.roll(row, 0)[None], dtype)
                    shard.add(
                        f"v{row}", 0, clip, {kind: array[0] for kind, array in stored.items()}
                    )
        writer.finish()
    finally:
        shards.SHARD_ROWS = before


# what makes figures of processors of one name differ, the most first: flag, and what it says
FEATURES = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def processor(device="cpu"):
    """What figures are of: 'NVIDIA H200', 'AMD EPYC, family 26, AVX-512 bfloat16'."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        said = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", first, re.MULTILINE))
        name = re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b|@.*", "", said["model name"])
        flags = said["flags"].split()
        best = [words for flag, words in FEATURES.items() if flag in flags][:1]
        return ", ".join([" ".join(name.split()), f"family {said['cpu family']}", *best])
    except (OSError, KeyError):  # another system, another architecture
        return platform.processor() or platform.machine()


def commit():
    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            " with changes"
            if git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/*.json")
            else ""
        )
    except OSError:
        return "unknown"


def machine(device="cpu"):
    """Print and return what the figures were measured on."""
    import torch

    from salt import ops

    found = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": processor(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": ops.EXTENSION,
    }
    print("  ".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    return found


def write(part, folder, found, settings, results):
    """FOLDER/PART-PROCESSOR-DATE.json: each processor keeps its own."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = "-".join(re.findall("[a-z0-9]+", found["device"].lower().replace("family", "")))
    path = Path(folder) / f"{part}-{name}-{found['date']}.json"
    path.write_text(
        dumps(
            {
                "command": " ".join(["python benchmarks/bench.py", part, *sys.argv[1:]]),
                **found,
                "settings": settings,
                "results": results,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"written to {path}")


if __name__ == "__main__":
    sys.excepthook = report_in_one_line
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if words and words[0] in ("-h", "--help") else 2)
    if words[0] not in PARTS:
        raise InputError(
            f"bench.py measures {', '.join(PARTS)}, not {words[0]!r}{nearest(words[0], PARTS)}"
        )
    path = ROOT / "benchmarks" / f"bench_{words[0]}.py"
    sys.argv = [str(path), *words[1:]]
    runpy.run_path(str(path), run_name="__main__")
