"""Training videos are told from held-out ones, by id and by content."""

import numpy as np
import pytest
import torch

from salt import cache, heldout
from salt.cache_writer import Writer, list_digest
from salt.clips import Records, Videos
from salt.errors import InputError
from salt.lists import Row
from tests.test_cache import PLAN, VIEW, half, patches_of


def make(folder, rows, prefix="v", pixels=patches_of):
    """A cache of a few rows: ids are the prefix and the row, views two a video."""
    ids = [(f"{prefix}{row // 2}", row % 2) for row in rows]
    plan = {**PLAN, "list_count": len(ids), "list_sha256": list_digest(ids), "views": 2}
    writer = Writer(folder, plan)
    with writer.shard(0) as shard:
        for row, entry in zip(rows, ids):
            shard.add(*entry, pixels(row), half(np.full((8, 6), row)))
    writer.finish()
    return Records(cache.open_cache(folder))


def test_hashes_depend_on_the_id_alone_and_not_on_how_it_is_read():
    random = np.random.default_rng(0)
    names = [f"clip {i}/ö{random.integers(10**6)}" for i in range(5000)] + ["", "a", "\x01", "aa"]
    content = "".join(f"{name}\t{i % 3}\n" for i, name in enumerate(names)).encode()
    whole = heldout.hash_ids([content])
    cut = [content[i : i + 997] for i in range(0, len(content), 997)]
    assert np.array_equal(whole, heldout.hash_ids(cut)) and len(np.unique(whole)) == len(names)
    assert np.array_equal(
        whole[:3], heldout.hash_ids([b"".join(f"{name}\t\n".encode() for name in names[:3])])
    )
    assert len(heldout.hash_ids([])) == 0


def test_hashes_of_a_million_names_do_not_collide():
    """Numbers with a common beginning, as data sets have them; 64 bits make two alike once in 4e7
    such sets.
    """
    content = "".join(f"{i}\t0\n" for i in range(10**6)).encode()
    pieces = (content[i : i + heldout.PIECE] for i in range(0, len(content), heldout.PIECE))
    numbers = heldout.hash_ids(pieces)
    assert len(np.unique(numbers)) == 10**6
    assert abs(np.unpackbits(numbers.view(np.uint8)).mean() - 0.5) < 1e-3


def test_training_ids_are_refused_or_called_so(tmp_path):
    seen = heldout.trained_on(make(tmp_path / "train", range(40)))
    assert len(seen["ids"]) == 20 and len(seen["clips"]) == 40
    other = make(tmp_path / "other", range(100, 120))
    records, kind, line = heldout.records_to_measure(other, seen, "--val_cache x", False)
    assert np.array_equal(records, np.arange(20)) and (kind, line) == ("held-out", None)
    some = make(tmp_path / "some", range(38, 60), pixels=lambda row: patches_of(row + 10**5))
    with pytest.raises(
        InputError,
        match="--val_cache x holds 2 of 22 clips of videos that were trained on, 'v19' among them",
    ):
        heldout.records_to_measure(some, seen, "--val_cache x", False)
    records, kind, line = heldout.records_to_measure(some, seen, "--val_cache x", True)
    assert len(records) == 22 and kind == "training" and "training R2" in line


def test_the_same_pixels_under_another_id_are_left_out(tmp_path):
    seen = heldout.trained_on(make(tmp_path / "train", range(40)))
    mixed = make(tmp_path / "mixed", range(30, 50), prefix="copy")
    records, kind, line = heldout.records_to_measure(mixed, seen, "mixed", False)
    assert (
        np.array_equal(records, np.arange(10, 20))
        and kind == "held-out"
        and "10 clips are training clips under other ids ('copy15'" in line
    )
    # of the pairs of views that `copies` holds one is known
    one_view = heldout.trained_on(make(tmp_path / "first", [0, 2, 4]))
    copies = make(tmp_path / "copies", range(12), prefix="copy")
    assert np.array_equal(
        heldout.records_to_measure(copies, one_view, "copies", False)[0], np.arange(6, 12)
    )
    with pytest.raises(InputError, match="every clip is a training clip under another id"):
        heldout.records_to_measure(
            make(tmp_path / "all", range(10, 20), prefix="copy"), seen, "all", False
        )


def test_lists_of_videos_are_known_by_their_ids(tmp_path):
    rows = [Row(f"v{i}", None, None) for i in range(8)]
    seen = heldout.trained_on(Videos(rows, VIEW, 16))
    assert seen["clips"] is None and seen["ids"].dtype == torch.int64
    _, kind, line = heldout.records_to_measure(
        make(tmp_path / "c", range(100, 110)), seen, "c", False
    )
    assert kind == "held-out" and "copies under other ids cannot be told" in line
    with pytest.raises(InputError, match="holds 10 of 10 clips"):
        heldout.records_to_measure(make(tmp_path / "d", range(0, 10)), seen, "d", False)
    assert (
        "unknown"
        in heldout.records_to_measure(make(tmp_path / "e", range(0, 10)), None, "e", False)[2]
    )


def test_copies_among_held_out_clips_are_said(tmp_path):
    """A video's own views may look alike; two videos may not."""

    def said(name, **how):
        source = make(tmp_path / name, range(40), **how)
        return heldout.copies(*heldout.numbers_of(source), lambda i: source.name(i)[0])

    assert said("all") is None and said("views", pixels=lambda row: patches_of(row // 2)) is None
    line = said("copies", pixels=lambda row: patches_of(row % 30))
    assert line.startswith("10 clips have the pixels of another video's ('v15' those of 'v0')")
