"""Mutated and truncated videos and lists through the loader: each gives a clip of the right shape,
or one line; nothing hangs or crashes.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from salt.errors import InputError
from salt.splits import load_split
from tests.faults.harness import LIMIT, ROOT, count, record
from tests.test_data import write_video

CODECS = [
    ("libvpx-vp9", "webm"),
    ("libx264", "mp4"),
    ("mpeg4", "avi"),
    ("libvpx", "webm"),
    ("ffv1", "mkv"),
    ("libx265", "mp4"),
]


def mutated(content, random):
    """(what was done, the bytes after it)."""
    kind = ["bytes", "header", "cut", "zeros", "swap", "twice", "tail", "hole", "random", "empty"][
        int(random.choice(10, p=[0.25, 0.2, 0.2, 0.1, 0.06, 0.05, 0.05, 0.05, 0.03, 0.01]))
    ]
    b, n = bytearray(content), len(content)
    at, length = int(random.integers(n)), int(random.integers(1, max(2, n // 4)))
    if kind in ("bytes", "header"):
        for place in random.integers(
            0, n if kind == "bytes" else min(n, 600), int(random.integers(1, 40))
        ):
            b[place] = random.integers(256)
    elif kind == "cut":
        b = b[:at]
    elif kind == "zeros":
        b[at : at + length] = bytes(len(b[at : at + length]))
    elif kind == "swap":
        b = b[at:] + b[:at]
    elif kind == "twice":
        b = b + b
    elif kind == "tail":
        b += random.bytes(length)
    elif kind == "hole":
        del b[at : at + length]
    elif kind == "random":
        b[at:] = random.bytes(n - at)
    else:
        b = bytearray()
    return kind, bytes(b)


LOADER = """import json, resource, sys
sys.path.insert(0, sys.argv[1])
from salt import clips, loader, masks, splits, views
rows, view = splits.load_split(sys.argv[2], "train"), views.View(8, 64, 64)
failed, seen = [], 0
def skip(i, error): failed.append((rows[i].id, str(error)))
order = masks.in_order(range(len(rows)), 16)
source = clips.Videos(rows, view, 16)
for batch in loader.Loader(source, order, ("short",), threads=2, failed=skip):
    assert batch.patches.shape[1:] == (64, 1536) and len(batch.ids) == len(batch.patches)
    seen += len(batch.ids)
gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"seen": seen, "failed": failed, "gb": gb}))
"""


def test_mutated_videos_through_the_loader(tmp_path):
    """Every one is decoded or listed with its reason, by one loader in one process: none of them
    takes it down, or its memory up.
    """
    random, total = np.random.default_rng(0), count(60, 500)
    (tmp_path / "videos").mkdir()
    bases = []
    for codec, suffix in CODECS:
        frames = [
            random.integers(0, 255, (72, 96, 3), dtype=np.uint8) // 4 + 40 + 4 * i
            for i in range(14)
        ]
        bases.append(
            (suffix, open(write_video(tmp_path / f"base.{suffix}", frames, codec), "rb").read())
        )
    kinds = {}
    for i in range(total):
        suffix, content = bases[i % len(bases)]
        kind, content = mutated(content, random)
        kinds[kind] = kinds.get(kind, 0) + 1
        (tmp_path / "videos" / f"{i}.{suffix}").write_bytes(content)
    (tmp_path / "train.json").write_text(json.dumps([{"id": str(i)} for i in range(total)]))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(ROOT), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] + len(found["failed"]) == total and 0 < found["seen"] < total
    assert (
        all("\n" not in reason and str(name) in reason for name, reason in found["failed"])
        and found["gb"] < 2
    )
    record(
        "mutated videos"
        f" ({', '.join(f'{number} {kind}' for kind, number in sorted(kinds.items()))}; six codecs)",
        total,
        f"{found['seen']} decoded, {len(found['failed'])} left out with their reason; peak memory"
        f" {found['gb']:.2f} GB",
    )


def lists():
    rows = [
        {
            "id": str(i),
            "label": f"moving {i}",
            "template": "Moving [something] öé",
            "placeholders": ["x"],
        }
        for i in range(30)
    ]
    return {
        "train.json": json.dumps(rows, ensure_ascii=False).encode(),
        "train.csv": "\n".join(f"videos/{i}.webm,{i % 3}" for i in range(30)).encode(),
    }


@pytest.mark.parametrize("name", ["train.json", "train.csv"])
def test_mutated_lists_are_read_or_refused(tmp_path, name):
    (tmp_path / "videos").mkdir()
    for i in range(30):
        (tmp_path / "videos" / f"{i}.webm").touch()
    random = np.random.default_rng(len(name))
    read = 0
    refused = 0
    for _ in range(count(100, 250)):
        kind, content = mutated(lists()[name], random)
        if random.random() < 0.3:  # one character for another, so that it often stays a list
            content = bytearray(lists()[name])
            content[int(random.integers(len(content)))] = int(
                random.choice(list(b'"\\,:/.{}[]0x\xff\x00 '))
            )
            content = bytes(content)
        (tmp_path / name).write_bytes(content)
        try:
            rows = load_split(tmp_path, "train")
            assert (
                rows
                and len({row.id for row in rows}) == len(rows)
                and all(row.path is None or row.path.startswith(str(tmp_path)) for row in rows)
            )
            read += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
    assert read and refused
    record(f"mutated lists ({name})", read + refused, f"{read} read, {refused} refused in one line")
