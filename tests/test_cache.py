"""The cache's format, resuming, and what happens to broken ones."""

import hashlib
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch

from salt import cache, cache_format, cache_merge, cache_repair, ops, shards, upkeep
from salt.cache import open_cache
from salt.cache_writer import Writer, list_digest
from salt.errors import InputError
from salt.files import sha256
from salt.rows import RowError
from salt.stored import from_stored, to_stored
from salt.views import View

VIEW = View(frames=4, size=32, short_side=32)
PLAN = {
    "split": "train",
    "list_count": 1100,
    "teacher": {
        "name": "t",
        "sha256": "ab",
        "dim": 6,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "compute": "fp32",
    },
    "view": VIEW.to_dict(),
    "view_hash": VIEW.hash(),
    "patch": 16,
    "tubelet": 2,
    "dtype": "float16",
    "batch_size": 8,
    "latent_shape": [8, 6],
    "patch_shape": [8, 1536],
    "clips": True,
    "clips_from": None,
    "views": 1,
}
FAILING = {3, 511, 512, 1099}


LIST = [(f"v{row}", 0) for row in range(1100)]
PLAN["list_sha256"] = list_digest(LIST)


def latents_of(row):
    return np.random.default_rng(row).normal(row % 7, 2, (8, 6)).astype(np.float32)


def patches_of(row):
    return np.random.default_rng(row + 10**6).integers(0, 256, (8, 1536), dtype=np.uint8)


def half(latents):
    return {"latents": latents.astype(np.float16)}


def fill(writer, shards=None):
    for number in writer.missing()[:shards]:
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, writer.plan["list_count"])):
                if row in FAILING:
                    shard.fail(row, f"v{row}", 0, "broken")
                else:
                    stored = to_stored(
                        torch.from_numpy(latents_of(row))[None], writer.plan["dtype"]
                    )
                    stored = {kind: array[0] for kind, array in stored.items()}
                    shard.add(f"v{row}", 0, patches_of(row), stored)


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
    assert (
        list(opened.ids) == [f"v{row}" for row in rows]
        and opened.ids.fields(5) == ("v6", 0)
        and opened.ids[-1] == "v1098"
    )
    for record in (0, 3, 509, 510, 1021, 1095):
        assert np.array_equal(opened.latents(record), latents_of(rows[record]).astype(np.float16))
        assert np.array_equal(opened.patches(record), patches_of(rows[record]))
        assert (
            opened.latents(record).dtype == np.float16 and opened.patches(record).dtype == np.uint8
        )
    with pytest.raises(IndexError):
        opened.latents(len(rows))
    assert (
        opened.view == VIEW
        and opened.mean == [0.5, 0.5, 0.5]
        and upkeep.verify(opened.folder) == ([], [])
    )


def test_plain_numpy_reads_it(made):
    assert np.load(made / "latents-00000.npy", mmap_mode="r").shape == (510, 8, 6)
    assert np.load(made / "patches-00002.npy").shape == (75, 8, 1536)
    assert (made / "ids.txt").read_text().splitlines()[0] == "v0\t0"
    assert json.loads((made / "failures.jsonl").read_text().splitlines()[1]) == {
        "row": 511,
        "id": "v511",
        "view": 0,
        "reason": "broken",
    }
    assert not (made / "partial").exists()


def test_statistics_are_those_of_the_stored_latents(made):
    everything = np.concatenate([np.load(made / f"latents-{k:05d}.npy") for k in range(3)]).astype(
        np.float64
    )
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
    # ranks join a plan; they do not race to write it again
    before = (folder / "partial" / "plan.json").stat().st_mtime_ns
    assert (
        Writer(folder, PLAN).missing() == [1, 2]
        and (folder / "partial" / "plan.json").stat().st_mtime_ns == before
    )
    with pytest.raises(KeyboardInterrupt), writer.shard(2) as shard:
        shard.add("v1024", 0, patches_of(1024), half(latents_of(1024)))
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


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"view": {**VIEW.to_dict(), "size": 64}},
            "another view: {'size': 32} there, {'size': 64} asked",
        ),
        ({"teacher": {**PLAN["teacher"], "sha256": "cd"}}, "another teacher: {'sha256': 'ab'}"),
        ({"list_sha256": "1"}, "another list_sha256"),
        ({"clips": False}, "another clips"),
    ],
)
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


def test_latents_beyond_float16_are_an_error():
    for value in (70000.0, np.inf, np.nan):
        for dtype in ("float16", "int8"):
            with pytest.raises(
                InputError, match="latents of the video 'b' reach .*, beyond float16"
            ):
                to_stored(
                    torch.stack([torch.zeros(8, 6), torch.full((8, 6), value)]), dtype, ["a", "b"]
                )


def test_a_cache_of_nothing_is_an_error(tmp_path):
    writer = Writer(tmp_path / "c", {**PLAN, "list_count": 1})
    with writer.shard(0) as shard:
        shard.fail(0, "v0", 0, "it is empty")
    with pytest.raises(
        InputError, match="no video of the list could be decoded; the first: it is empty"
    ):
        writer.finish()
    assert not any((tmp_path / "c").iterdir())  # so that the next try starts afresh


def test_clips_from_another_cache(made, tmp_path):
    writer = Writer(
        tmp_path / "lat",
        {
            **PLAN,
            "list_count": 1096,
            "clips": False,
            "clips_from": str(made),
            "latent_shape": [8, 3],
        },
    )
    source = open_cache(made)
    for number in writer.missing():
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 1096)):
                shard.add(source.ids[row], 0, source.patches(row), half(np.zeros((8, 3))))
    writer.finish()
    both = open_cache(tmp_path / "lat")
    assert (
        both.has_patches
        and np.array_equal(both.patches(700), source.patches(700))
        and both.latents(0).shape == (8, 3)
    )


def damage(folder, name, change):
    if name == "metadata":
        metadata = json.loads((folder / "metadata.json").read_text())
        change(metadata)
        metadata["checksum"] = cache_format.metadata_digest(metadata)
        (folder / "metadata.json").write_text(json.dumps(metadata))
    else:
        content = bytearray((folder / name).read_bytes())
        (folder / name).write_bytes(change(content))


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "metadata",
            lambda m: m.update(format_version=9),
            (
                "a newer version of this code: it has cache format 9, this code reads 3; update the"
                " code"
            ),
        ),
        (
            "metadata",
            lambda m: m.update(format_version=1),
            "an older version of this code: .* make the cache again",
        ),
        ("metadata", lambda m: m.update(format_version="x"), "older"),
        ("metadata", lambda m: m.pop("view"), "damaged"),
        ("metadata", lambda m: m["shards"][1]["latents"].pop("bytes"), "damaged"),
        ("metadata", lambda m: m.update(shards=3), "damaged"),
        ("metadata", lambda m: m["view"].update(seed=64), "view does not fit its hash"),
        (
            "metadata",
            lambda m: m["view"].update(size=64),
            "metadata.json is damaged .a view's short_side",
        ),
        ("metadata", lambda m: m.update(count=3), "does not add up"),
        ("metadata.json", lambda b: b[:40], "cannot be used"),
        (
            "metadata.json",
            lambda b: b.replace(b'"stride": 4', b'"stride": 5'),
            "metadata.json does not have its checksum",
        ),
        ("metadata.json", lambda b: b.replace(b'"count"', b'"c\xffunt"'), "cannot be used"),
        ("ids.txt", lambda b: b[:-8], "ids.txt has 1095 lines"),
        ("ids.txt", lambda b: b.replace(b"v3", b"v!", 1), "ids.txt does not have its checksum"),
        ("latents-00001.npy", lambda b: b[:-100], "metadata.json says"),
        ("patches-00000.npy", lambda b: b"\x00" * len(b), "broken header"),
        ("latents-00002.npy", lambda b: b.replace(b"<f2", b"<i2", 1), "metadata.json says float16"),
    ],
)
def test_broken_caches_are_refused_in_one_line(copy, name, change, message):
    damage(copy, name, change)
    with pytest.raises(InputError, match=message) as caught:
        open_cache(copy)
    assert "\n" not in str(caught.value)


def test_a_broken_header_beyond_those_looked_at_first_is_found_when_the_shard_is_read(
    copy, monkeypatch
):
    monkeypatch.setattr(cache.Cache, "HEADERS", 2)
    damage(copy, "latents-00002.npy", lambda b: b.replace(b"<f2", b"<i2", 1))
    opened = open_cache(copy)
    assert len(opened.latents(0)) == 8
    with pytest.raises(InputError, match="latents-00002.npy holds int16"):
        opened.latents(1090)


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


@pytest.mark.parametrize(
    "name, bad",
    [
        ("latents-00001.npy", [1]),
        ("patches-00000.npy", [0]),
        ("stats.npz", []),
        ("ids.txt", []),
        ("failures.jsonl", []),
        ("fingerprints.npy", []),
        ("sources.npy", []),
    ],
)
def test_verify_finds_a_flipped_bit_and_repair_puts_it_right(made, copy, name, bad):
    damage(copy, name, lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    problems, found = upkeep.verify(copy)
    assert problems == [f"{name} does not have its checksum"] and found == bad
    writer = Writer(copy, PLAN)
    writer.lock()
    assert cache_repair.reopen(writer, LIST) == problems and writer.missing() == bad
    if name not in ("ids.txt", "stats.npz"):
        assert len(open_cache(copy)) == 1096  # until it is repaired the cache is what it was
    writer = Writer(copy, PLAN)  # the repair dies, and is taken up again
    assert writer.missing() == bad
    fill(writer)
    writer.finish()
    for path in made.iterdir():
        # its reasons are lost
        if name != "failures.jsonl" or path.name not in ("failures.jsonl", "metadata.json"):
            assert path.read_bytes() == (copy / path.name).read_bytes(), path.name
    assert upkeep.verify(copy) == ([], []) and cache_repair.reopen(Writer(copy, PLAN), LIST) == []


def test_verify_compares_ids_with_the_list(copy):
    """Two ids exchanged, and the checksum made to fit: only the list's own digest tells."""
    lines = (copy / "ids.txt").read_text().splitlines(keepends=True)
    (copy / "ids.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))
    damage(copy, "metadata", lambda m: m.update(ids_sha256=sha256(copy / "ids.txt")))
    assert "do not make up the list" in upkeep.verify(copy)[0][0]


def test_a_repair_on_other_hardware_makes_statistics_that_fit(made, copy):
    damage(
        copy,
        "latents-00001.npy",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    )
    writer = Writer(copy, PLAN)
    writer.lock()
    cache_repair.reopen(writer, LIST)
    with writer.shard(1) as shard:
        for row in range(512, 1024):
            if row in FAILING:
                shard.fail(row, f"v{row}", 0, "broken")
            else:
                shard.add(f"v{row}", 0, patches_of(row), half(latents_of(row) + 1))
    writer.finish()
    everything = np.concatenate([np.load(copy / f"latents-{k:05d}.npy") for k in range(3)]).astype(
        np.float64
    )
    np.testing.assert_allclose(
        open_cache(copy).stats["mean"], everything.mean(0), rtol=1e-5, atol=1e-6
    )
    assert upkeep.verify(copy) == ([], [])


def test_what_a_broken_shard_held_must_be_there_again(made, copy):
    """Videos that are gone: the repair stops, and takes nothing away."""
    damage(
        copy,
        "latents-00001.npy",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    )
    broken = (copy / "latents-00001.npy").read_bytes()
    writer = Writer(copy, PLAN)
    writer.lock()
    cache_repair.reopen(writer, LIST)
    for _ in range(2):
        with (
            pytest.raises(
                InputError,
                match="shard 1 of .* held the video 'v513', which cannot be decoded now .gone.",
            ),
            Writer(copy, PLAN).shard(1) as shard,
        ):
            shard.fail(512, "v512", 0, "broken, as before")
            shard.fail(513, "v513", 0, "gone")
    assert (
        len(open_cache(copy)) == 1096
        and (copy / "latents-00001.npy").read_bytes() == broken
        and not list(copy.glob("*.part"))
    )
    writer = Writer(copy, PLAN)
    fill(writer)
    writer.finish()
    assert all(path.read_bytes() == (copy / path.name).read_bytes() for path in made.iterdir())


def test_what_was_held_is_kept_through_interrupted_repairs_and_in_unfinished_caches(
    made, copy, tmp_path
):
    def flip(content):
        return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]

    damage(copy, "latents-00000.npy", flip)
    writer = Writer(copy, PLAN)
    writer.lock()
    cache_repair.reopen(writer, LIST)
    damage(copy, "latents-00001.npy", flip)  # while the repair is under way
    assert cache_repair.reopen(writer, LIST) == [
        "latents-00001.npy does not have its checksum"
    ] and writer.missing() == [0, 1]
    unfinished = Writer(tmp_path / "c", PLAN)
    fill(unfinished, shards=2)
    damage(tmp_path / "c", "latents-00001.npy", flip)
    cache_repair.reopen(unfinished, LIST)
    for each in (writer, unfinished):
        with pytest.raises(InputError, match="held the video 'v600'"), each.shard(1) as shard:
            shard.fail(600, "v600", 0, "gone")


@pytest.mark.parametrize(
    "name", ["failures.jsonl", "ids.txt", "stats.npz", "fingerprints.npy", "sources.npy"]
)
def test_a_file_that_is_gone_is_made_again(made, copy, name):
    (copy / name).unlink()
    writer = Writer(copy, PLAN)
    writer.lock()
    assert (
        cache_repair.reopen(writer, LIST) == [f"{name} cannot be read: No such file or directory"]
        and writer.missing() == []
    )
    writer.finish()
    assert upkeep.verify(copy) == ([], []) and (
        name == "failures.jsonl" or (copy / name).read_bytes() == (made / name).read_bytes()
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(rows=509) or m["shards"][1].update(rows=512),
        lambda m: m["shards"][1]["latents"].update(bytes=7),
        lambda m: m["view"].update(seed=3),
    ],
)
def test_verify_finds_metadata_that_does_not_fit_its_files(copy, change):
    damage(copy, "metadata", change)
    problems, bad = upkeep.verify(copy)
    assert (
        len(problems) == 1
        and "metadata.json does not fit its files" in problems[0]
        and bad == []
        and "--repair" not in upkeep.remedy(copy, problems)
    )
    with pytest.raises(InputError, match="does not fit its files"):
        cache_repair.reopen(
            Writer(
                copy, {**PLAN, "view": json.loads((copy / "metadata.json").read_text())["view"]}
            ),
            LIST,
        )


def test_broken_statistics_are_one_line(made, copy, tmp_path):
    content = bytearray((copy / "stats.npz").read_bytes())
    content[300] ^= 1
    (copy / "stats.npz").write_bytes(content)
    with pytest.raises(InputError, match="stats.npz does not have its checksum"):
        open_cache(copy)
    damage(copy, "metadata", lambda m: m.update(stats_sha256=sha256(copy / "stats.npz")))
    with pytest.raises(InputError, match="stats.npz cannot be read"):
        open_cache(copy)
    with pytest.raises(InputError, match="stats.npz cannot be read"):
        cache_merge.merge([copy, made], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_another_caches_statistics_are_noticed_on_opening(made, copy, tmp_path):
    other = Writer(tmp_path / "other", {**PLAN, "list_count": 40})
    fill(other)
    other.finish()
    shutil.copy(tmp_path / "other" / "stats.npz", copy / "stats.npz")
    with pytest.raises(InputError, match="stats.npz does not have its checksum"):
        open_cache(copy)


def test_fingerprints_are_those_of_the_clips(made):
    opened = open_cache(made)
    rows = [row for row in range(1100) if row not in FAILING]
    for record in (0, 600, 1095):
        digest = hashlib.sha256(patches_of(rows[record]).tobytes()).digest()
        assert opened.fingerprints[record] == np.frombuffer(digest[:8], "<i8")[0]
    assert len(set(opened.fingerprints.tolist())) == len(opened)


def test_a_repair_with_other_pixels_is_refused(copy):
    damage(
        copy,
        "latents-00001.npy",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    )
    writer = Writer(copy, PLAN)
    writer.lock()
    cache_repair.reopen(writer, LIST)
    shard = writer.shard(1)
    with pytest.raises(InputError, match="shard 1 of .* held other pixels of the video 'v513'"):
        shard.add("v513", 0, patches_of(1), half(latents_of(513)))
    shard.discard()
    assert len(open_cache(copy)) == 1096


def latents_over(clips, folder, change=0):
    """A cache of zero latents over the clips of another, whose patches are taken as they are, or
    changed.
    """
    source = open_cache(clips)
    ids = [source.ids.fields(row) for row in range(len(source))]
    plan = {
        **PLAN,
        "list_count": len(ids),
        "list_sha256": list_digest(ids),
        "clips": False,
        "clips_from": os.path.relpath(clips, folder),
        "latent_shape": [8, 3],
    }
    writer = Writer(folder, plan)
    for number in writer.missing():
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, len(ids))):
                shard.add(*ids[row], source.patches(row) + np.uint8(change), half(np.zeros((8, 3))))
    writer.finish()
    return folder


def test_latents_of_other_clips_of_the_same_ids_are_noticed(made, tmp_path):
    assert open_cache(latents_over(made, tmp_path / "good")).has_patches and upkeep.verify(
        tmp_path / "good"
    ) == ([], [])
    latents_over(made, tmp_path / "bad", change=1)
    with pytest.raises(InputError, match="whose clips .* uses, is not the cache it was made from"):
        open_cache(tmp_path / "bad")
    problems, bad = upkeep.verify(tmp_path / "bad")
    assert len(problems) == 1 and "not made from the clips" in problems[0] and bad == []
    assert "put back the cache that was there" in upkeep.remedy(tmp_path / "bad", problems)


def test_caches_that_take_clips_from_themselves_or_in_circles_are_one_line(made, tmp_path):
    latents_over(made, tmp_path / "a")
    damage(tmp_path / "a", "metadata", lambda m: m.update(clips_from="."))
    with pytest.raises(InputError, match="takes its clips from itself"):
        open_cache(tmp_path / "a")
    latents_over(made, tmp_path / "b")
    damage(tmp_path / "a", "metadata", lambda m: m.update(clips_from="../b"))
    damage(tmp_path / "b", "metadata", lambda m: m.update(clips_from="../a"))
    with pytest.raises(InputError, match="takes its clips from itself"):
        open_cache(tmp_path / "a")


@pytest.mark.parametrize("teacher", [{}, None, {"sha256": "ab"}, [], "x"])
def test_a_forged_teacher_is_one_line(copy, teacher):
    damage(copy, "metadata", lambda m: m.update(teacher=teacher))
    with pytest.raises(InputError, match="metadata.json is damaged"):
        open_cache(copy)


def with_outliers(kind, random):
    """Latents [1, 196, 96] with per-channel sizes, and one token or channel that is far larger than
    the rest; which tokens are not.
    """
    latents = random.normal(0, 1, (1, 196, 96)) * np.exp(random.normal(0, 0.7, 96))
    others = np.arange(196) != 70
    if kind == "token":
        latents[:, 70] *= 100
    elif kind == "entries":
        latents[:, 70, [5, 60]] += 300
    elif kind == "channel":
        latents[:, :, 5] *= 100
    return latents.astype(np.float32), others


@pytest.mark.parametrize("kind", ["plain", "token", "entries", "channel"])
def test_int8_survives_outliers(kind):
    latents, others = with_outliers(kind, np.random.default_rng(0))
    stored = to_stored(torch.from_numpy(latents), "int8")
    error = (from_stored(stored).astype(np.float64) - latents)[:, others]
    assert (error**2).sum() < 2e-4 * (latents[:, others].astype(np.float64) ** 2).sum()
    assert (stored["latents"][:, others] == 0).mean() < 0.05


def test_what_int8_lost_is_in_the_metadata(tmp_path):
    writer = Writer(tmp_path / "c", {**PLAN, "dtype": "int8"})
    exact, read = [], []
    for number in writer.missing():
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 1100)):
                stored = {
                    kind: array[0]
                    for kind, array in to_stored(
                        torch.from_numpy(latents_of(row))[None], "int8"
                    ).items()
                }
                exact.append(latents_of(row).astype(np.float64))
                read.append(from_stored(stored).astype(np.float64))
                shard.add(
                    f"v{row}",
                    0,
                    patches_of(row),
                    stored,
                    float(((read[-1] - exact[-1]) ** 2).sum()),
                )
    share = writer.finish()["lost_variance"]
    exact, read = np.stack(exact), np.stack(read)
    assert share == pytest.approx(
        ((read - exact) ** 2).sum() / ((exact - exact.mean(0)) ** 2).sum(), rel=1e-3
    )


def test_a_repair_takes_up_videos_that_are_back(made, tmp_path):
    writer = Writer(tmp_path / "c", PLAN)
    for number in writer.missing():
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 1100)):
                if row in FAILING or row == 600:
                    shard.fail(row, f"v{row}", 0, "broken")
                else:
                    shard.add(f"v{row}", 0, patches_of(row), half(latents_of(row)))
    writer.finish()
    writer = Writer(tmp_path / "c", PLAN)
    writer.lock()
    assert cache_repair.reopen(writer, LIST, lambda row: row == 600) == [
        "the video 'v600', which was left out, can be decoded now"
    ] and writer.missing() == [1]
    fill(writer)
    writer.finish()
    for path in made.iterdir():
        assert (
            path.name == "metadata.json"
            or path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()
        ), path.name


def test_a_repair_of_an_unfinished_cache_looks_at_what_is_done(made, tmp_path):
    writer = Writer(tmp_path / "c", PLAN)
    fill(writer, shards=2)
    damage(
        tmp_path / "c",
        "patches-00000.npy",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    )
    assert cache_repair.reopen(writer, LIST) == [
        "patches-00000.npy does not have its checksum"
    ] and writer.missing() == [0, 2]
    fill(writer)
    (tmp_path / "c" / "latents-00001.npy").unlink()
    with pytest.raises(
        InputError,
        match=(
            "latents-00001.npy is gone or cut short since it was made; run the same command with"
            " --repair"
        ),
    ):
        writer.finish()
    cache_repair.reopen(writer, LIST)
    fill(writer)
    writer.finish()
    assert all(
        path.read_bytes() == (tmp_path / "c" / path.name).read_bytes() for path in made.iterdir()
    )


def test_one_process_at_a_time(tmp_path):
    first, second = Writer(tmp_path / "c", PLAN), Writer(tmp_path / "c", PLAN)
    first.lock()
    with pytest.raises(InputError, match="another process is writing"):
        second.lock()
    first.locked.close()
    second.lock()


def killed_at(number, work):
    """Run work() in a process that ends at once, as if killed, before or after its number-th change
    to the disk; whether it came that far.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    seen = itertools.count(1)

    def deadly(call):
        def wrapped(*arguments, **others):
            if next(seen) == number:
                os._exit(9)
            result = call(*arguments, **others)
            if next(seen) == number:
                os._exit(9)
            return result

        return wrapped

    try:
        for name in ("replace", "fsync", "unlink", "mkdir", "rmdir", "link"):
            setattr(os, name, deadly(getattr(os, name)))
        work()
    finally:
        os._exit(0)


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_killed_at_any_change_to_the_disk(tmp_path, monkeypatch):
    """Making, repairing and merging: whatever was done when the process died, the same call goes on
    to the same bits, and leaves nothing beside them. Every fifth change; all in `make faults`.
    """
    every = 1 if os.environ.get("SALT_FAULTS") == "full" else 5
    monkeypatch.setattr(shards, "SHARD_ROWS", 8)
    ids = LIST[:20]
    plan = {**PLAN, "list_count": 20, "list_sha256": list_digest(ids)}

    def make(folder, repair=False):
        writer = Writer(folder, plan)
        if repair or writer.partial.is_dir():
            writer.lock()
        if repair:
            cache_repair.reopen(writer, ids)
        writer.tidy()
        if not writer.finished:
            for number in writer.missing():
                with writer.shard(number) as shard:
                    for row in range(8 * number, min(8 * number + 8, 20)):
                        if row == 3:
                            shard.fail(row, "v3", 0, "broken")
                        else:
                            shard.add(f"v{row}", 0, patches_of(row), half(latents_of(row)))
            writer.finish()

    make(tmp_path / "whole")
    expected = everything_in(tmp_path / "whole")
    points = 0
    for first, name in enumerate((None, "latents-00001.npy", "ids.txt"), 1):
        for number in itertools.count(first, every):
            folder = tmp_path / f"{name}-{number}"
            if name:
                shutil.copytree(tmp_path / "whole", folder)
                damage(
                    folder,
                    name,
                    lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
                )
            killed = killed_at(number, lambda: make(folder, repair=bool(name)))
            make(folder, repair=bool(name))
            assert everything_in(folder) == expected and not (folder / "partial").exists(), (
                name,
                number,
            )
            points += killed
            if not killed:
                break
    other = [(f"w{row}", 0) for row in range(8)]
    writer = Writer(
        tmp_path / "other", {**plan, "list_count": 8, "list_sha256": list_digest(other)}
    )
    with writer.shard(0) as shard:
        for row in range(8):
            shard.add(f"w{row}", 0, patches_of(row), half(latents_of(row)))
    writer.finish()
    both = [tmp_path / "whole", tmp_path / "other"]
    cache_merge.merge(both, tmp_path / "merged")
    expected = everything_in(tmp_path / "merged")
    for number in itertools.count(1, every):
        folder = tmp_path / f"merged-{number}"
        killed = killed_at(number, lambda: cache_merge.merge(both, folder))
        if not (folder / "metadata.json").is_file():
            cache_merge.merge(both, folder)
        assert everything_in(folder) == expected, number
        points += killed
        if not killed:
            break
    assert points > 150 / every


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_merge_that_copies_is_checked(made, tmp_path, monkeypatch, same_disk):
    if not same_disk:

        def refuse(*arguments):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    other = shutil.copytree(made, tmp_path / "b")
    (other / "ids.txt").write_text((other / "ids.txt").read_text().replace("v", "w"))
    failures = (other / "failures.jsonl").read_text().replace('"id": "v', '"id": "w')
    (other / "failures.jsonl").write_text(failures)
    damage(
        other,
        "metadata",
        lambda m: m.update(
            ids_sha256=sha256(other / "ids.txt"),
            failures_sha256=sha256(other / "failures.jsonl"),
        ),
    )
    cache_merge.merge([made, other], tmp_path / "all")
    assert upkeep.verify(tmp_path / "all") == ([], []) and not list(
        (tmp_path / "all").glob("*.part")
    )
    assert (
        (tmp_path / "all" / "latents-00000.npy").stat().st_ino
        == (made / "latents-00000.npy").stat().st_ino
    ) == same_disk
    if not same_disk:
        damage(
            other,
            "patches-00001.npy",
            lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        )
        with pytest.raises(
            InputError,
            match="patches-00001.npy does not have its checksum; repair that cache first",
        ):
            cache_merge.merge([made, other], tmp_path / "again")
        assert not list((tmp_path / "again").glob("*.part"))


def test_int8_latents_come_back_within_half_a_step(tmp_path, made, monkeypatch):
    writer = Writer(tmp_path / "c", {**PLAN, "dtype": "int8"})
    fill(writer)
    writer.finish()
    opened, rows = open_cache(tmp_path / "c"), [row for row in range(1100) if row not in FAILING]
    for record in (0, 511, 1095):
        exact = latents_of(rows[record])
        size = np.sqrt(np.square(exact).mean(1, keepdims=True))  # of a token
        step = size * np.abs(exact / size).max(0) / 127
        got = opened.latents(record)
        assert (
            got.dtype == np.float16
            and (np.abs(got - exact) <= 0.5 * step + 2e-3 * np.abs(exact) + 1e-6).all()
            and not np.array_equal(got, exact.astype(np.float16))
        )
        number = int(np.searchsorted(opened.first_rows, record, side="right")) - 1
        row = record - opened.first_rows[number]
        stored = {
            kind: np.load(tmp_path / "c" / f"{kind}-{number:05d}.npy")[row]
            for kind in ("latents", "scales", "tokens")
        }
        assert np.array_equal(got, from_stored(stored))
    asked = []
    monkeypatch.setattr("salt.cache.advise", lambda files, starts, count: asked.append(count))
    opened.advise([3, 4])
    assert asked == [8 * 6, 8 * 1536, 6 * 4, 8 * 4]  # the scales too
    assert upkeep.verify(opened.folder) == ([], [])
    stats, exact = opened.stats, open_cache(made).stats
    np.testing.assert_allclose(stats["mean"], exact["mean"], atol=2e-3)
    assert (tmp_path / "c" / "latents-00000.npy").stat().st_size < 0.51 * (
        made / "latents-00000.npy"
    ).stat().st_size


def test_merging(made, tmp_path):
    other = Writer(
        tmp_path / "b",
        {
            **PLAN,
            "split": "extra",
            "list_count": 600,
            "list_sha256": list_digest([(f"w{row}", 0) for row in range(600)]),
        },
    )
    for number in other.missing():
        with other.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 600)):
                if row == 7:
                    shard.fail(row, "w7", 0, "broken")
                else:
                    shard.add(f"w{row}", 0, patches_of(row), half(latents_of(row + 5000)))
    other.finish()
    metadata = cache_merge.merge([made, tmp_path / "b"], tmp_path / "all")
    assert (
        metadata["count"] == 1096 + 599
        and metadata["split"] == "train+extra"
        and metadata["merged_from"] == ["c", "b"]
    )
    merged = open_cache(tmp_path / "all")
    assert upkeep.verify(merged.folder) == ([], []) and not (tmp_path / "all" / "partial").exists()
    assert (
        merged.ids[1096] == "w0"
        and np.array_equal(merged.latents(1096 + 7), latents_of(5008).astype(np.float16))
        and np.array_equal(merged.patches(0), patches_of(0))
    )
    everything = np.concatenate(
        [np.load(tmp_path / "all" / f"latents-{k:05d}.npy") for k in range(5)]
    ).astype(np.float64)
    np.testing.assert_allclose(merged.stats["mean"], everything.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged.stats["variance"], everything.var(0), rtol=1e-4)
    with pytest.raises(InputError, match="'v0' .view 0. is in .* caches of different videos"):
        cache_merge.merge([made, made], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    with pytest.raises(
        InputError, match="was merged from c, b; repair c and b, delete .*all, and merge them again"
    ):
        cache_repair.reopen(Writer(tmp_path / "all", {name: metadata[name] for name in PLAN}), LIST)
    with pytest.raises(InputError, match="is a cache already"):
        cache_merge.merge([made, tmp_path / "b"], tmp_path / "all")
    third = shutil.copytree(tmp_path / "b", tmp_path / "third")
    damage(third, "metadata", lambda m: m["teacher"].update(sha256="ff"))
    with pytest.raises(InputError, match="another teacher: {'sha256': 'ab'} and {'sha256': 'ff'}"):
        cache_merge.merge([made, third], tmp_path / "never")


SHAPES = ({"heads": 4}, {"heads": 8}, None)  # of a teacher; older versions did not note it


def of_shape(folder, name, shape):
    ids = [(f"{name}{row}", 0) for row in range(3)]
    teacher = {**PLAN["teacher"], **({"config": shape} if shape else {})}
    writer = Writer(
        folder / name,
        {**PLAN, "teacher": teacher, "list_count": 3, "list_sha256": list_digest(ids)},
    )
    with writer.shard(0) as shard:
        for row, entry in enumerate(ids):
            shard.add(*entry, patches_of(row), half(latents_of(row)))
    writer.finish()
    return folder / name


def test_what_is_not_known_of_a_teacher_stays_so(tmp_path):
    """A cache of an older version brings no two shapes together, and is none the wiser after a
    merge or a repair.
    """
    four, eight, old = (of_shape(tmp_path, name, shape) for name, shape in zip("abc", SHAPES))
    for folders in ([old, four, eight], [eight, old, four]):
        with pytest.raises(InputError, match="another teacher: .*heads"):
            cache_merge.merge(folders, tmp_path / "never")
    for number, folders in enumerate(([four, old], [old, four])):
        assert "config" not in cache_merge.merge(folders, tmp_path / f"both{number}")["teacher"]
    assert cache_merge.merge([four], tmp_path / "one")["teacher"]["config"] == {"heads": 4}
    plan = {name: json.loads((old / "metadata.json").read_text())[name] for name in PLAN}
    writer = Writer(
        old, {**plan, "teacher": {**plan["teacher"], "name": "moved", "config": {"heads": 8}}}
    )
    assert writer.finished and writer.plan["teacher"] == plan["teacher"]


def test_an_id_list_cut_short_while_open_is_an_error(copy):
    opened = open_cache(copy)
    with open(copy / "ids.txt", "r+b") as file:
        file.truncate(20)
    assert opened.ids[0] == "v0"
    with pytest.raises(InputError, match="ids.txt, line 900: it is cut short"):
        opened.ids.fields(900)


@pytest.mark.parametrize("reference", [False, True])
def test_only_the_rows_asked_for_are_read(made, reference, monkeypatch):
    if reference:
        monkeypatch.setattr(ops, "EXTENSION", {**ops.EXTENSION, "devices": []})
    opened, records = open_cache(made), [1000, 3, 700, 3]
    wanted = torch.from_numpy(np.random.default_rng(0).random((4, 8)) < 0.5)
    out = torch.full((4, 8, 6), 9.0, dtype=torch.float16)
    opened.read_rows("latents", records, out, wanted, threads=3)
    whole = torch.from_numpy(np.stack([opened.latents(record) for record in records]))
    assert torch.equal(out[wanted], whole[wanted]) and (out[~wanted] == 9).all()
    opened.advise(records)
    with pytest.raises(IndexError):
        opened.read_rows("latents", [1096], out[:1])


def test_an_io_error_names_shard_and_row(made, monkeypatch):
    """A failing disk: stands for the errno that the extension reports from pread."""

    def fails(*arguments):
        raise RowError(1, 3, 5)

    opened = open_cache(made)
    monkeypatch.setattr("salt.cache.read_rows", fails)
    with pytest.raises(
        InputError, match="latents-00001.npy, row 90: Input/output error; check the disk"
    ):
        opened.read_rows("latents", [0, 600], torch.empty(2, 8, 6, dtype=torch.float16))


@pytest.mark.parametrize("kind", ["patches", "latents"])
def test_a_shard_of_another_cache_in_its_place_is_noticed(made, copy, tmp_path, kind):
    other = Writer(tmp_path / "other", PLAN)
    for number in other.missing():
        with other.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 1100)):
                if row in FAILING:
                    shard.fail(row, f"v{row}", 0, "broken")
                else:
                    shard.add(f"v{row}", 0, patches_of(row + 5000), half(latents_of(row + 5000)))
    other.finish()
    shutil.copy(tmp_path / "other" / f"{kind}-00001.npy", copy)
    read = getattr(open_cache(copy), kind)
    read(0)
    with pytest.raises(
        InputError, match=f"{kind}-00001.npy: its first record does not have its fingerprint"
    ):
        read(700)


def test_clips_that_are_damaged_are_not_taken_over(copy):
    damage(copy, "patches-00000.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    opened = open_cache(copy)
    last = int(opened.first_rows[1]) - 1
    assert np.array_equal(opened.checked_patches(last - 1), opened.patches(last - 1))
    with pytest.raises(
        InputError, match=f"the clip of record {last}, 'v510', does not have its fingerprint"
    ):
        opened.checked_patches(last)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    ],
)
def test_broken_fingerprints_beside_a_broken_shard_are_mended(made, copy, harm):
    damage(copy, "fingerprints.npy", lambda content: content + b"x")
    harm(copy / "patches-00001.npy")
    writer = Writer(copy, PLAN)
    writer.lock()
    cache_repair.reopen(writer, LIST)
    assert writer.missing() == [1]
    fill(writer)
    writer.finish()
    for path in made.iterdir():
        assert path.read_bytes() == (copy / path.name).read_bytes(), path.name


def test_what_records_were_cut_from_is_known_while_a_cache_is_made_and_afterwards(tmp_path):
    """Of the shards that are there; of all when it is whole, after a repair, and merged; not of
    failures.
    """
    plan = {**PLAN, "list_count": 600, "list_sha256": list_digest(LIST[:600])}
    writer = Writer(tmp_path / "c", plan)
    fails = {3, 520}

    def make(number):
        with writer.shard(number) as shard:
            for row in range(512 * number, min(512 * number + 512, 600)):
                if row in fails:
                    shard.fail(row, *LIST[row], "broken")
                else:
                    shard.add(*LIST[row], patches_of(row), half(latents_of(row)), source=row + 7)

    def expected(rows):
        return [(row, row + 7) for row in rows if row not in fails]

    assert writer.made() == []
    make(1)
    assert writer.made() == expected(range(512, 600))
    make(0)
    writer.finish()
    assert writer.made() == expected(range(600)) and open_cache(
        tmp_path / "c"
    ).sources.tolist() == [mark for _, mark in expected(range(600))]
    damage(tmp_path / "c", "patches-00001.npy", lambda content: content[:-1] + b"x")
    writer = Writer(tmp_path / "c", plan)
    writer.lock()
    cache_repair.reopen(writer, LIST[:600])
    assert writer.missing() == [1] and writer.made() == expected(range(512))
    make(1)
    writer.finish()
    assert writer.made() == expected(range(600))
