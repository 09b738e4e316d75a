"""The cache's format, resuming, and what happens to broken ones."""
import json
import shutil

import numpy as np
import pytest

from cache import Writer, open_cache
from config import InputError
from views import View

VIEW = View(frames=4, size=32, short_side=32)
PLAN = {"split": "train", "list_count": 1100, "list_sha256": "0", "teacher": {"name": "t", "sha256": "ab", "dim": 6, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "compute": "fp32"},
        "view": VIEW.to_dict(), "view_hash": VIEW.hash(), "patch": 16, "tubelet": 2, "dtype": "float16", "batch_size": 8, "latent_shape": [8, 6], "patch_shape": [8, 1536],
        "clips": True, "clips_from": None}
FAILING = {3, 511, 512, 1099}


def latents_of(row):
    return np.random.default_rng(row).normal(row % 7, 2, (8, 6)).astype(np.float32)


def patches_of(row):
    return np.random.default_rng(row + 10**6).integers(0, 256, (8, 1536), dtype=np.uint8)


def fill(writer, shards=None):
    for number in writer.missing()[:shards]:
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, writer.plan["list_count"])):
                if row in FAILING:
                    shard.fail(row, f"v{row}", 0, "broken")
                else:
                    shard.add(f"v{row}", 0, latents_of(row), patches_of(row))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    writer = Writer(folder, PLAN)
    fill(writer)
    writer.finish()
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def test_records_come_back(made):
    opened, rows = open_cache(made), [row for row in range(1100) if row not in FAILING]
    assert len(opened) == len(rows) == len(opened.ids) and opened.metadata["failures"] == 4
    assert list(opened.ids) == [f"v{row}" for row in rows] and opened.ids.fields(5) == ("v6", 0) and opened.ids[-1] == "v1098"
    for record in (0, 3, 509, 510, 1021, 1095):
        assert np.array_equal(opened.latents(record), latents_of(rows[record]).astype(np.float16))
        assert np.array_equal(opened.patches(record), patches_of(rows[record]))
        assert opened.latents(record).dtype == np.float16 and opened.patches(record).dtype == np.uint8
    with pytest.raises(IndexError):
        opened.latents(len(rows))
    assert opened.view == VIEW and opened.mean == [0.5, 0.5, 0.5] and opened.verify() == []


def test_plain_numpy_reads_it(made):
    assert np.load(made / "latents-00000.npy", mmap_mode="r").shape == (510, 8, 6)
    assert np.load(made / "patches-00002.npy").shape == (75, 8, 1536)
    assert (made / "ids.txt").read_text().splitlines()[0] == "v0\t0"
    assert json.loads((made / "failures.jsonl").read_text().splitlines()[1]) == {"row": 511, "id": "v511", "view": 0, "reason": "broken"}
    assert not (made / "partial").exists()


def test_statistics_are_those_of_the_stored_latents(made):
    everything = np.concatenate([np.load(made / f"latents-{k:05d}.npy") for k in range(3)]).astype(np.float64)
    stats = open_cache(made).stats
    assert stats["count"] == len(everything) and stats["mean"].dtype == np.float32
    np.testing.assert_allclose(stats["mean"], everything.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["variance"], everything.var(0), rtol=1e-5)


def test_a_cache_that_died_resumes_to_the_same_bits(made, tmp_path):
    folder = tmp_path / "c"
    fill(Writer(folder, PLAN), shards=1)
    with pytest.raises(InputError, match="unfinished"):
        open_cache(folder)
    writer = Writer(folder, PLAN)
    assert writer.missing() == [1, 2]
    before = (folder / "partial" / "plan.json").stat().st_mtime_ns  # ranks join a plan; they do not race to write it again
    assert Writer(folder, PLAN).missing() == [1, 2] and (folder / "partial" / "plan.json").stat().st_mtime_ns == before
    with pytest.raises(KeyboardInterrupt), writer.shard(2) as shard:
        shard.add("v1024", 0, latents_of(1024), patches_of(1024))
        raise KeyboardInterrupt
    assert not list(folder.glob("*.part"))
    (folder / "latents-00001.npy.part").write_bytes(b"left by a kill")
    writer = Writer(folder, PLAN)
    fill(writer)
    writer.finish()
    for path in made.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert {path.name for path in made.iterdir()} == {path.name for path in folder.iterdir()}
    assert Writer(folder, PLAN).finished


@pytest.mark.parametrize("change, message", [
    ({"view": {**VIEW.to_dict(), "size": 64}}, "another view: {'size': 32} there, {'size': 64} asked"), ({"teacher": {**PLAN["teacher"], "sha256": "cd"}}, "another teacher: {'sha256': 'ab'}"),
    ({"list_sha256": "1"}, "another list_sha256"), ({"clips": False}, "another clips")])
def test_a_cache_is_not_continued_under_another_plan(made, tmp_path, change, message):
    fill(Writer(tmp_path / "c", PLAN), shards=1)
    for folder in (made, tmp_path / "c"):
        with pytest.raises(InputError, match=message):
            Writer(folder, {**PLAN, **change})


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no cache"):
        Writer(tmp_path, PLAN)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_latents_beyond_float16_are_an_error(tmp_path):
    writer = Writer(tmp_path / "c", PLAN)
    for value in (70000.0, np.inf, np.nan):
        with pytest.raises(InputError, match="latents of the video 'v0' reach"), writer.shard(0) as shard:
            shard.add("v0", 0, np.full((8, 6), value, np.float32), patches_of(0))
    assert not list((tmp_path / "c").glob("*.npy*"))


def test_a_cache_of_nothing_is_an_error(tmp_path):
    writer = Writer(tmp_path / "c", {**PLAN, "list_count": 1})
    with writer.shard(0) as shard:
        shard.fail(0, "v0", 0, "it is empty")
    with pytest.raises(InputError, match="no video of the list could be decoded; the first: it is empty"):
        writer.finish()
    assert not any((tmp_path / "c").iterdir())  # so that the next try starts afresh


def test_clips_from_another_cache(made, tmp_path):
    writer = Writer(tmp_path / "lat", {**PLAN, "list_count": 1096, "clips": False, "clips_from": str(made), "latent_shape": [8, 3]})
    source = open_cache(made)
    for number in writer.missing():
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 1096)):
                shard.add(source.ids[row], 0, np.zeros((8, 3), np.float32))
    writer.finish()
    both = open_cache(tmp_path / "lat")
    assert both.has_patches and np.array_equal(both.patches(700), source.patches(700)) and both.latents(0).shape == (8, 3)


def damage(folder, name, change):
    metadata = json.loads((folder / "metadata.json").read_text())
    if name == "metadata":
        change(metadata)
        (folder / "metadata.json").write_text(json.dumps(metadata))
    else:
        content = bytearray((folder / name).read_bytes())
        (folder / name).write_bytes(change(content))


@pytest.mark.parametrize("name, change, message", [
    ("metadata", lambda m: m.update(format_version=9), "cache format 9, this code reads 1; update the code"), ("metadata", lambda m: m.pop("view"), "damaged"), ("metadata", lambda m: m["shards"][1]["latents"].pop("bytes"), "damaged"),
    ("metadata", lambda m: m["view"].update(seed=64), "view does not fit its hash"), ("metadata", lambda m: m["view"].update(size=64), "metadata.json is damaged .a view's short_side"), ("metadata", lambda m: m.update(count=3), "does not add up"),
    ("metadata.json", lambda b: b[:40], "cannot be read"), ("ids.txt", lambda b: b[:-8], "ids.txt has 1095 lines"), ("latents-00001.npy", lambda b: b[:-100], "metadata.json says"),
    ("patches-00000.npy", lambda b: b"\x00" * 200, "broken header"), ("latents-00002.npy", lambda b: b.replace(b"<f2", b"<i2", 1), "metadata.json says float16")])
def test_broken_caches_are_refused_in_one_line(copy, name, change, message):
    damage(copy, name, change)
    with pytest.raises(InputError, match=message) as caught:
        open_cache(copy)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(copy, tmp_path):
    (copy / "latents-00001.npy").unlink()
    with pytest.raises(InputError, match="latents-00001.npy is missing"):
        open_cache(copy)
    with pytest.raises(InputError, match="is no cache"):
        open_cache(tmp_path / "nothing")


def test_a_file_truncated_while_open_is_an_error_with_shard_and_row(copy):
    opened = open_cache(copy)
    with open(copy / "latents-00000.npy", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match=r"latents-00000.npy, row 400: .* truncated"):
        opened.latents(400)


@pytest.mark.parametrize("name", ["latents-00001.npy", "patches-00000.npy", "stats.npz", "ids.txt"])
def test_verify_finds_a_flipped_bit(copy, name):
    damage(copy, name, lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert open_cache(copy).verify() == [f"{name} does not have the checksum in metadata.json"]
