"""Does this tree compute what an earlier commit computed, to the bit? For moving code about; it goes when that is done.

    python tools/goldens.py BASE        a commit; its own tree is made under out/goldens, its results are kept there
    python tools/goldens.py BASE fp32   only the parts with such a name

Runs the same commands in both trees on the same videos, on this machine, and compares weights, moments, losses, logged
lines, caches, masks, evaluations and the text of every --help. Figures of speed, memory and time are left out.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np

HERE = Path(__file__).resolve().parent.parent
OUT = HERE / "out" / "goldens"
SMALL = (
    "--size tiny --depth 2 --predictor_dim 64 --predictor_depth 2 --predictor_heads 2 --batch_size"
    " 4 --log_every 2 --threads 1"
)
TRAIN = f"train.py {SMALL} --cache f16 --val_cache held --max_steps 16 --eval_every 8"
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2 --master_port 29871"
STAGES = ["train", "cache_latents", "eval_distill", "probe_time_arrow"]
TOOLS = {"doctor": "tools", "plot_runs": "tools", "bench": "benchmarks", "run": "demo"}
MASKS = """
import hashlib, torch, model
for grid in ((8, 14, 14), (2, 3, 3), (4, 16, 16)):
    for family in sorted(model.FAMILIES):
        drawn = model.sample_masks(torch.arange(64) * 7919, 3, 5, family, grid)
        print(grid, family, hashlib.sha256(b"".join(x.numpy().tobytes() for x in drawn[:2])).hexdigest()[:16])
"""
WEIGHTS = """
import hashlib, sys, numpy, torch
def walk(name, x):
    if isinstance(x, dict):
        for key, value in x.items(): walk(f"{name}.{key}", value)
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x): walk(f"{name}.{i}", value)
    elif isinstance(x, torch.Tensor):
        print(name, tuple(x.shape), x.dtype, hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else str(x).encode()).hexdigest()[:16])
    else: print(name, repr(x))
walk("", torch.load(sys.argv[1], weights_only=True))
"""
VOLATILE = [
    (r"\d{8}_\d{6}_pid\d+", "RUN"),
    (r"^process .*", "process"),
    (r"[\d.e+-]+ clips/s MFU .*? GB", "SPEED"),
    (r"left [\d:]+( days?, [\d:]+)?", "left"),
    (r"[\d.]+ TFLOP/s", "TFLOP/s"),
    (
        r"took [\d.]+ s; the next line is due after step (\d+), in about [\d:]+",
        r"due after step \1",
    ),
    (r"^start .*", "start"),
    (r"[\d.]+ s\b", "S"),
    (r"'(simd|amx)': [^,}]+", r"\1"),
    (r"salt_ops: .*", "salt_ops"),
    (r"in [\d:]+(\.\d+)?", "in TIME"),
    (r"[\d.]+ ?(clips|videos)/s", "RATE"),
    (r"\d+ % of .*", ""),
    (r"[\d.]+ GB free", "GB free"),
    (r"for video \d+%", "for video"),
]


def sorted_settings(line):
    """Settings may stand in another order."""
    if not line.startswith("settings {"):
        return line
    return f"settings {json.dumps(json.loads(line[9:]), sort_keys=True)}"


def stable(text):
    text = "\n".join(map(sorted_settings, text.splitlines()))
    lines = [line for line in text.splitlines() if not re.search(r"it/s|GFLOP|%\|", line)]
    for pattern, instead in VOLATILE:
        lines = [re.sub(pattern, instead, line) for line in lines]
    return "\n".join(lines)


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def make_videos(folder):
    """32 small videos in SSv2 layout: a square that moves over noise."""
    random = np.random.default_rng(0)
    (folder / "videos").mkdir(parents=True)
    for i in range(32):
        with av.open(str(folder / "videos" / f"{i}.webm"), "w") as container:
            stream = container.add_stream("libvpx-vp9", rate=12, options={"threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
            background = random.integers(0, 90, (64, 80, 3), dtype=np.uint8)
            for t in range(int(random.integers(14, 30))):
                frame = background.copy()
                frame[20 + i % 20 : 36 + i % 20, t * 2 : t * 2 + 12] = 220
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())
    row = lambda i: {
        "id": str(i),
        "label": "moves",
        "template": "Moving [something]",
        "placeholders": ["a square"],
    }
    (folder / "train.json").write_text(json.dumps([row(i) for i in range(24)]))
    (folder / "validation.json").write_text(json.dumps([row(i) for i in range(24, 32)]))


def sorted_json(path):
    return json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True)


class Tree:
    """A tree of the code, and a folder in which its commands run."""

    def __init__(self, root, work):
        self.root, self.work, self.results = root, work, {}
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        shutil.copytree(OUT / "data", work / "data")

    def run(self, words, code=0, until=None):
        """Run `python words`; the script's name is looked up in this tree. until: signal it at the first line that begins so."""
        words = [str(self.root / word) if word.endswith(".py") else word for word in words.split()]
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=self.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(self.root),
                "COLUMNS": "100",
            },
        )
        said = ""
        for line in process.stdout:
            said += line
            if until and line.startswith(until):
                process.send_signal(signal.SIGTERM)
                until = None
        if process.wait() != code:
            sys.exit(f"{self.root}: {words} ended with {process.returncode}:\n{said}")
        return stable(said.replace(str(self.root), "ROOT"))

    def weights(self, file):
        lines = subprocess.run(
            [sys.executable, "-c", WEIGHTS, str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return "\n".join(
            line
            for line in stable(lines).splitlines()
            if not re.search(
                r"\.(run|checkpoints|run_logs|simd|amx|torch|threads)\b|^\.where", line
            )
        )

    def train(self, name, flags, script=TRAIN, python="", resumed=False):
        words = f"{python} {script} {flags} --run_name {name}"
        said = self.run(words, *((143, "step 4/") if resumed else ()))
        if resumed:
            said += self.run(words + " --resume auto")
        (folder,) = (self.work / "checkpoints").glob(f"{name}_*")
        metrics = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        speed = ("clips_per_s", "data_wait", "mfu", "memory_gb")
        found = {
            "metrics": "\n".join(
                json.dumps({key: value for key, value in entry.items() if key not in speed})
                for entry in metrics
            )
        }
        found |= {file: self.weights(folder / file) for file in ("last.pth", "best.pth")}
        if not resumed and not python:  # at which step a signal arrives is not fixed
            found["log"] = said
        found["files"] = "\n".join(
            sorted(stable(str(path.relative_to(folder))) for path in folder.rglob("*"))
        )
        return found

    def cache(self, folder, flags):
        said = self.run(f"cache_latents.py {flags} --out {folder}")
        return {"log": said} | {
            path.name: digest(path.read_bytes()) for path in sorted((self.work / folder).iterdir())
        }


def helps(tree):
    found = {}
    for name in [*STAGES, *TOOLS]:
        path = next(
            path
            for path in (Path(f"{name}.py"), Path(TOOLS.get(name, "")) / f"{name}.py")
            if (tree.root / path).is_file()
        )
        found[name] = re.sub(
            rf"(tools|benchmarks)/{name}.py",
            f"{name}.py",
            " ".join(tree.run(f"{path} --help").split()),
        )
    return found


EXPORT = """
import sys, model
model.export_transformers(model.load_encoder(sys.argv[1]), sys.argv[2])
"""


def export(tree):
    (checkpoint,) = tree.work.glob("checkpoints/stage1_*/best.pth")
    subprocess.run(
        [sys.executable, "-c", EXPORT, str(checkpoint), str(tree.work / "teacher")],
        cwd=tree.root,
        check=True,
    )
    return {
        path.name: digest(path.read_bytes()) for path in sorted((tree.work / "teacher").iterdir())
    }


VIEW = "--frames 4 --resolution 48"
PARTS = {
    "help": helps,
    "masks": lambda tree: {
        "masks": (
            subprocess.run(
                [sys.executable, "-c", MASKS],
                cwd=tree.root,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    },
    "clips": lambda tree: tree.cache("clips", f"--data data --teacher none {VIEW}"),
    "clips_held": lambda tree: tree.cache(
        "clips_held", f"--data data --split validation --teacher none {VIEW}"
    ),
    "stage1": lambda tree: tree.train(
        "stage1",
        f"--target pixels --masks ratio --cache clips --val_cache clips_held --max_steps 8 --dtype"
        f" fp32",
        f"train.py {SMALL}",
    ),
    "videos": lambda tree: tree.train(
        "videos",
        f"--target pixels --data data {VIEW} --max_steps 8 --dtype fp32",
        f"train.py {SMALL}",
    ),
    "export": export,
    "f16": lambda tree: tree.cache("f16", f"--data data --teacher teacher"),
    "held": lambda tree: tree.cache("held", f"--data data --split validation --teacher teacher"),
    "i8": lambda tree: tree.cache("i8", f"--data data --teacher teacher --latents i8"),
    "views": lambda tree: tree.cache(
        "views", f"--data data --teacher teacher --views 2 --clips off"
    ),
    "clips_from": lambda tree: tree.cache("clips_from", f"--teacher teacher --clips_from clips"),
    "verify": lambda tree: {"log": tree.run("cache_latents.py --verify i8 --data data")},
    "fp32": lambda tree: tree.train("fp32", "--dtype fp32"),
    "bf16": lambda tree: tree.train("bf16", "--dtype bf16"),
    "ema": lambda tree: tree.train("ema", "--dtype fp32 --ema 0.9 --accumulate 2"),
    "losses": lambda tree: tree.train(
        "losses",
        "--dtype fp32 --loss smooth_l1 --target_norm standardise --masks short,ratio --recompute",
    ),
    "vicreg": lambda tree: tree.train(
        "vicreg",
        "--dtype fp32 --loss l1 --target_norm layer_norm --vicreg_variance 0.1 --vicreg_covariance"
        " 0.01",
    ),
    "i8_views": lambda tree: tree.train(
        "i8_views", "--dtype fp32 --cache views --data data --max_steps 8"
    ),
    "fly": lambda tree: tree.train(
        "fly",
        f"--data data --teacher teacher --max_steps 6 --dtype fp32",
        f"train.py {SMALL}",
    ),
    "resumed": lambda tree: tree.train("resumed", "--dtype fp32", resumed=True),
    "ranks": lambda tree: tree.train("ranks", "--dtype fp32", python=TORCHRUN),
    "fsdp": lambda tree: tree.train("fsdp", "--dtype fp32 --fsdp", python=TORCHRUN),
    "eval": lambda tree: {
        "log": tree.run("eval_distill.py --checkpoint fp32 ema --cache held --out eval.json"),
        "json": sorted_json(tree.work / "eval.json"),
    },
    "probe": lambda tree: {
        "log": tree.run(
            "probe_time_arrow.py --checkpoint fp32 --data data --train_videos 16 --val_videos 8"
            " --dtype fp32 --out probe.json"
        ),
        "json": sorted_json(tree.work / "probe.json"),
    },
}


def outcome(root, work, only):
    tree = Tree(root, work)
    for name, part in PARTS.items():
        if not only or name in only:
            tree.results[name] = {key: stable(text) for key, text in part(tree).items()}
            print(f"{root.name}: {name}", flush=True)
    return tree.results


def main(base, *only):
    OUT.mkdir(parents=True, exist_ok=True)
    base = subprocess.run(
        ["git", "rev-parse", "--short", base],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not (OUT / "data").is_dir():
        make_videos(OUT / "data")
    kept, tree = OUT / f"{base}.json", OUT / base
    if not kept.is_file():
        if not tree.is_dir():
            subprocess.run(["git", "clone", "-q", str(HERE), str(tree)], check=True)
            subprocess.run(["git", "checkout", "-q", base], cwd=tree, check=True)
            subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext"],
                cwd=tree,
                check=True,
                capture_output=True,
            )
        kept.write_text(json.dumps(outcome(tree, OUT / "work", ())))
    before, after, differ = (
        json.loads(kept.read_text()),
        outcome(HERE, OUT / "work", only),
        0,
    )
    for name in ("eval", "probe"):  # the order of entries is no result
        if name in before:
            before[name]["json"] = json.dumps(
                json.loads(before[name]["json"]), indent=1, sort_keys=True
            )
    for name, parts in after.items():
        for key in sorted({*parts, *before[name]}):
            mine, theirs = (
                sorted(filter(str.strip, stable(part.get(key, "")).splitlines()))
                for part in (parts, before[name])
            )
            if name != "help" and mine != theirs:
                differ += 1
                mine, theirs = (
                    parts.get(key, "").splitlines(),
                    before[name].get(key, "").splitlines(),
                )
                print(f"\n{name} {key} differs:")
                print(
                    "\n".join(
                        [f"- {line[:400]}" for line in theirs if line not in mine][:12]
                        + [f"+ {line[:400]}" for line in mine if line not in theirs][:12]
                    )
                )
    print(f"{sum(map(len, after.values()))} goldens of {len(after)} parts, {differ} differ")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
