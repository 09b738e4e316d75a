"""Flipped bits, files that run code, and ids and links that lead elsewhere: a right result, or one
clear line.
"""

import contextlib
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch

from salt import cache, cache_format, encoders, ops, teachers, upkeep
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from salt.run_folder import furthest
from salt.shards import npy_header
from salt.splits import load_split
from salt.torch_files import step_and_run
from salt.video import read_clip
from salt.views import View
from tests.faults.harness import count, flip, one_line, record, run, same
from tests.stages import SMALL, run_folder


def clean(error):
    assert "\n" not in str(error) and len(str(error)) > 20
    return True


def test_flipped_bits_in_checkpoints(world, tmp_path):
    """Refused in one line, or the content is the same all the same (zip has bytes that mean
    nothing).
    """
    random = np.random.default_rng(0)
    refused = 0
    harmless = 0
    for name in ("last.pth", "best.pth"):
        content, path = (run_folder(world, "student") / name).read_bytes(), tmp_path / name
        path.write_bytes(content)
        expected = load_checkpoint(path)
        for i in range(count(10, 40)):
            damaged, at = flip(content, random) if i % 2 else flip_ends(content, random)
            path.write_bytes(damaged)
            try:
                assert same(load_checkpoint(path), expected), at
                harmless += 1
            except InputError as error:
                refused += clean(error)
    assert refused > harmless
    record(
        "a flipped bit in best.pth or last.pth, half of them in the first and last 4 kB",
        refused + harmless,
        f"{refused} refused in one line, {harmless} read with the same content",
    )


def flip_ends(content, random):
    """One bit of the first or last 4 kB, where the zip's own tables and the pickle are."""
    ends = np.r_[0:4096, len(content) - 4096 : len(content)]
    place, bit = int(random.choice(ends)), int(random.integers(8))
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :], (
        place,
        bit,
    )


def test_flipped_bits_in_caches(world, tmp_path):
    """Small files: found when the cache is opened or its statistics are read.

    Shards: found by --verify, always.
    """
    random = np.random.default_rng(1)
    copy = tmp_path / "copy"
    harmless = 0
    shutil.copytree(world / "latents", copy)
    contents = {path.name: path.read_bytes() for path in sorted(copy.iterdir())}
    opened = cache.open_cache(copy)
    before = {
        "metadata": opened.metadata,
        "ids": list(map(opened.ids.fields, range(len(opened)))),
        "stats": opened.stats,
    }
    tried = {"shards": [0, 0], "metadata.json, ids.txt, stats.npz, failures.jsonl": [0, 0]}
    for i in range(count(24, 120)):
        name = list(contents)[i % len(contents)]
        damaged, at = flip(contents[name], random)
        if name.endswith(".npy") and random.random() < 0.3:  # the header, too
            damaged, at = flip(contents[name][:128], random)
            damaged += contents[name][128:]
        (copy / name).write_bytes(damaged)
        row, quick = tried["shards" if name.endswith(".npy") else list(tried)[1]], False
        row[0] += 1
        try:
            found = cache.open_cache(copy)
            now = {
                "metadata": found.metadata,
                "ids": list(map(found.ids.fields, range(len(found)))),
                "stats": found.stats,
            }
            assert now["metadata"] == before["metadata"] and now["ids"] == before["ids"], (name, at)
            assert all(
                np.array_equal(value, before["stats"][key]) for key, value in now["stats"].items()
            ), (name, at)
        except InputError as error:
            quick = clean(error)
        row[1] += quick
        try:
            if not upkeep.verify(copy)[0]:  # a blank for another
                assert name == "metadata.json" and json.loads(damaged) == json.loads(
                    contents[name]
                ), (name, at)
                harmless += 1
        except InputError as error:
            assert clean(error)
        (copy / name).write_bytes(contents[name])
    assert upkeep.verify(copy) == ([], [])
    for kind, (total, quick) in tried.items():
        record(
            f"a flipped bit in a cache's {kind}",
            total,
            f"{total - (0 if kind == 'shards' else harmless)} found by --verify, {quick} already on"
            " opening; the others leave ids, statistics and metadata as they were",
        )


def test_every_bit_of_a_shards_header(tmp_path):
    shape = (17, 18, 1536)
    dtype = np.dtype(np.uint8)
    path = tmp_path / "x.npy"
    header, passed = npy_header(shape, dtype), []
    for place, bit in np.ndindex(len(header), 8):
        path.write_bytes(header[:place] + bytes([header[place] ^ (1 << bit)]) + header[place + 1 :])
        try:
            cache_format.check_header(path, shape, dtype, len(header) + 17 * 18 * 1536)
            passed.append(place)
        except InputError as error:
            assert clean(error)
    # |u1 and <u1 are the same, and so are a comma and a form feed before a closing bracket
    assert len(passed) < 10


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(world, tmp_path):
    """The newest last.pth is damaged: the run goes on from previous.pth; with both damaged it
    stops, since starting afresh would hide the loss.
    """
    flags = [
        "--cache",
        world / "latents",
        *SMALL,
        *"--max_steps 12 --save_every 4 --run_name r --resume".split(),
    ]
    assert run(tmp_path, "train", *flags, "auto")[0] == 0
    folder = next(tmp_path.glob("checkpoints/r_*"))
    whole = (folder / "last.pth").read_bytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(
        "\n".join([lines[0], lines[1].replace('"r2":', '"r2"\x1a'), *lines[2:]]) + "\n"
    )
    shutil.copy(folder / "last.pth", folder / "previous.pth")
    os.utime(folder / "previous.pth", (1, 1))
    (folder / "last.pth").write_bytes(flip(whole, np.random.default_rng(2))[0])
    code, text = run(tmp_path, "train", *flags, os.path.join("checkpoints", folder.name))
    assert (
        code == 0
        and "passed over: " in text
        and f"resumed {os.path.join('checkpoints', folder.name, 'previous.pth')} at step 12" in text
    )
    assert (folder / "metrics.jsonl").read_text().splitlines() == [lines[0], *lines[2:]]
    code, text = run(tmp_path, "train", *flags, "auto")
    assert (
        code == 0
        and "that run has finished: nothing is left to do" in text
        and len(list(tmp_path.glob("checkpoints/r_*"))) == 1
    )
    assert (folder / "last.pth").read_bytes() == whole and len(
        list(folder.glob("left_behind_by_*.pth"))
    ) == 1
    for name in ("last.pth", "previous.pth"):
        (folder / name).write_bytes(whole[: len(whole) // 2])
    code, text = run(tmp_path, "train", *flags, "auto")
    assert code == 1 and "none of the 2 checkpoints is whole" in one_line(text)


# ------------------------------------------------------------------------------------ code in files


class Harm:
    """Unpickled, it makes the file `marker`: what must never happen."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def as_zip(path, harm):
    torch.save({"salt_vla": 1, "student": harm}, path)


def as_old_pickle(path, harm):
    torch.save({"model": {"w": harm}}, path, _use_new_zipfile_serialization=False)


def as_bare_pickle(path, harm):
    path.write_bytes(pickle.dumps(harm))


def as_zip_with_another_pickle(path, harm):
    """A sound checkpoint whose data.pkl was exchanged, checksums included."""
    torch.save({"salt_vla": 1, "w": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            new.writestr(
                name, pickle.dumps(harm, protocol=2) if name.endswith("data.pkl") else content
            )


@pytest.mark.parametrize(
    "make", [as_zip, as_old_pickle, as_bare_pickle, as_zip_with_another_pickle]
)
def test_code_in_a_checkpoint_does_not_run(tmp_path, make):
    marker = tmp_path / "harm"
    path = tmp_path / "x.pth"
    places = 0
    make(path, Harm(marker))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "videomae"}))
    shutil.copy(path, tmp_path / "folder" / "pytorch_model.bin")
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "last.pth")
    for load in (
        lambda: load_checkpoint(path),
        lambda: encoders.load_salt(path),
        lambda: encoders.load_encoder(path),
        lambda: teachers.load_teacher(path),
        lambda: teachers.load_teacher(tmp_path / "folder"),
        lambda: furthest([tmp_path / "run"], print),
    ):
        with pytest.raises(InputError) as caught:
            load()
        assert clean(caught.value) and not marker.exists()
        places += 1
    assert (
        step_and_run(tmp_path / "run" / "last.pth") == (float("inf"), None) and not marker.exists()
    )
    with contextlib.suppress(Exception):  # the harm is real: with code allowed it is done
        torch.load(path, weights_only=False)
    assert marker.exists()
    record(
        f"code in a checkpoint ({make.__name__[3:].replace('_', ' ')})",
        places,
        "refused in one line by every loader, and never run",
    )


@pytest.mark.parametrize("name", ["stats.npz", "latents-00000.npy"])
def test_code_in_a_cache_does_not_run(world, tmp_path, name):
    copy, marker = tmp_path / "copy", tmp_path / "harm"
    shutil.copytree(world / "latents", copy)
    array = np.array([Harm(marker)], dtype=object)
    (
        np.savez(copy / name, mean=array, variance=array, count=array)
        if name == "stats.npz"
        else np.save(copy / name, array)
    )
    with pytest.raises(InputError) as caught:
        assert cache.open_cache(copy).stats and cache.open_cache(copy).latents(0)
    assert clean(caught.value) and not marker.exists()
    record(f"code in a cache's {name}", 1, "refused in one line, and never run")


def test_code_given_to_each_stage_does_not_run(world, tmp_path):
    as_zip(tmp_path / "x.pth", Harm(tmp_path / "harm"))
    cases = [
        ("train", ["--cache", world / "latents", *SMALL, "--resume", "x.pth"]),
        ("train", ["--data", world / "data", "--teacher", "x.pth"]),
        ("eval_distill", ["--checkpoint", "x.pth", "--cache", world / "latents"]),
        ("probe_time_arrow", ["--checkpoint", "x.pth", "--data", world / "data"]),
        ("cache_latents", ["--data", world / "data", "--teacher", "x.pth", "--out", "c"]),
    ]
    for script, flags in cases[: count(2, 5)]:
        code, text = run(tmp_path, script, *flags)
        assert code == 1 and "could run code" in one_line(text) and not (tmp_path / "harm").exists()
    record(
        "code in a checkpoint given to train, eval_distill, probe_time_arrow, cache_latents",
        len(cases),
        "one line, exit code 1, never run",
    )


# ------------------------------------------------------------------------------------ ids and links

BAD_IDS = [
    "../7",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "x\x00y",
    "x\ny",
    "\ud800",
    "videos/../../7",
    3.5,
    None,
    True,
    ["1"],
    {"id": 1},
]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_an_id_cannot_lead_out_of_the_folder(tmp_path, bad):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "1.webm").touch()
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1"}, {"id": bad}]))
    with pytest.raises(InputError, match="row 1") as caught:
        load_split(tmp_path, "train")
    assert clean(caught.value)
    if bad == BAD_IDS[-1]:
        record(
            "ids that leave the folder or are no names",
            len(BAD_IDS),
            "one line that names list and row",
        )


def test_links_and_special_files_in_the_video_folder(world, tmp_path):
    """A link to a video is that video; links in circles, into nothing, to devices, pipes and
    folders are videos that cannot be decoded.
    """
    folder = tmp_path / "videos"
    folder.mkdir()
    good = next((world / "data" / "videos").glob("1.webm"))
    (folder / "0.webm").symlink_to(good)
    (folder / "1.webm").symlink_to(folder / "2.webm")
    (folder / "2.webm").symlink_to(folder / "1.webm")
    (folder / "3.webm").symlink_to(tmp_path / "nowhere.webm")
    (folder / "4.webm").symlink_to("/dev/zero")
    os.mkfifo(folder / "5.webm")
    (folder / "6.webm").mkdir()
    (tmp_path / "train.json").write_text(json.dumps([{"id": str(i)} for i in range(7)]))
    code, text = run(
        tmp_path,
        "cache_latents",
        "--data",
        tmp_path,
        *"--teacher none --frames 4 --resolution 48 --out c".split(),
    )
    assert code == 0, text
    opened = cache.open_cache(tmp_path / "c")
    assert list(opened.ids) == ["0"]
    np.testing.assert_array_equal(
        opened.patches(0), ops.patchify(read_clip(str(good), View(4, 48, 48), "0"))
    )
    reasons = {
        failure["id"]: failure["reason"]
        for failure in map(json.loads, (tmp_path / "c" / "failures.jsonl").read_text().splitlines())
    }
    assert sorted(reasons) == [str(i) for i in range(1, 7)] and all(
        "\n" not in reason for reason in reasons.values()
    )
    assert all("no regular file" in reasons[i] for i in "456")
    record(
        "links in circles, into nothing, to devices, a pipe, a folder in place of a video",
        6,
        "left out, with the reason",
    )
