"""Latents are never trained against the pixels of other videos: whole stages, with videos
exchanged, encoded again or cached again under the same ids.
"""

import json
import shutil

import numpy as np
import pytest

from salt.cache import open_cache
from salt.cache_format import metadata_digest
from salt.checkpoint import load_checkpoint
from salt.clips import Records
from salt.errors import InputError
from salt.splits import load_split
from salt.views import View
from tests.stages import SMALL, VIEW, error_of, moving_square, run, run_folder
from tests.test_data import write_video

IDS = range(6)


@pytest.fixture(scope="module")
def thin(world, tmp_path_factory):
    """A data folder of six videos, and a cache of their latents without clips."""
    home = tmp_path_factory.mktemp("thin")
    (home / "data" / "videos").mkdir(parents=True)
    for i in IDS:
        shutil.copy(world / "data" / "videos" / f"{i}.webm", home / "data" / "videos")
    (home / "data" / "train.json").write_text(json.dumps([{"id": str(i)} for i in IDS]))
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    shutil.copy(teacher, home / "teacher.pth")
    run(home, "cache_latents", *"--data data --teacher teacher.pth --clips off --out thin".split())
    metadata = json.loads((home / "thin" / "metadata.json").read_text())
    del metadata["sources_sha256"]  # sizes of files would give most of it away: here pixels must
    (home / "thin" / "metadata.json").write_text(
        json.dumps({**metadata, "checksum": metadata_digest(metadata)})
    )
    run(home, "cache_latents", "--data", "data", "--teacher", "none", *VIEW, "--out", "clips")
    run(home, "cache_latents", "--clips_from", "clips", "--teacher", "teacher.pth", "--out", "over")
    return home


@pytest.fixture
def other(thin, tmp_path):
    """The same ids, and other videos."""
    random = np.random.default_rng(9)
    (tmp_path / "other" / "videos").mkdir(parents=True)
    shutil.copy(thin / "data" / "train.json", tmp_path / "other")
    for i in IDS:
        write_video(tmp_path / "other" / "videos" / f"{i}.webm", moving_square(random, 14))
    return tmp_path / "other"


TRAIN = [*SMALL, "--max_steps", "2"]


def test_other_videos_of_the_same_ids_are_noticed(thin, other):
    run(thin, "train", "--cache", "thin", "--data", "data", *TRAIN, "--run_name", "good")
    line = error_of(thin, "train", "--cache", "thin", "--data", other, *TRAIN)
    assert (
        "is not the video" in line
        and "put them back, or make the cache again" in line
        and str(other) in line
    )
    assert "every checksum, count and id fits" in run(
        thin, "cache_latents", "--verify", "thin", "--data", "data"
    )
    said = run(thin, "cache_latents", "--verify", "thin", "--data", other, code=1)
    assert "problems: 6;" in said and all(
        f"videos/{i}.webm is not the video '{i}'" in said for i in IDS
    )
    folder = run_folder(thin, "good")
    said = error_of(
        thin,
        "eval_distill",
        "--checkpoint",
        folder / "best.pth",
        "--cache",
        "thin",
        "--data",
        other,
        "--training_videos",
    )
    assert "is not the video" in said


def test_a_video_that_was_encoded_again_is_named(thin, tmp_path):
    shutil.copytree(thin / "data", tmp_path / "data")
    random = np.random.default_rng(0)
    again = [
        np.clip(frame.astype(int) + random.integers(-1, 2, frame.shape), 0, 255).astype(np.uint8)
        for frame in moving_square(random, 20)
    ]
    write_video(tmp_path / "data" / "videos" / "3.webm", again)
    said = run(thin, "cache_latents", "--verify", "thin", "--data", tmp_path / "data", code=1)
    assert "problems: 1;" in said and "3.webm is not the video '3'" in said
    assert "3.webm is not the video '3'" in error_of(
        thin, "train", "--cache", "thin", "--data", tmp_path / "data", *TRAIN, "--batch_size", "6"
    )


def test_clips_that_were_cached_again_from_other_videos_are_noticed(thin, other, tmp_path):
    home = shutil.copytree(thin, tmp_path / "home")
    run(home, "train", "--cache", "over", *TRAIN)
    shutil.rmtree(home / "clips")
    run(home, "cache_latents", "--data", other, "--teacher", "none", *VIEW, "--out", "clips")
    assert "is not the cache it was made from" in error_of(home, "train", "--cache", "over", *TRAIN)
    said = run(home, "cache_latents", "--verify", "over", code=1)
    assert (
        "were not made from the clips that are now in" in said
        and "delete over and make it again" in said
    )


def test_resuming_with_other_latents_or_pixels_of_the_same_ids_is_refused(thin, other, tmp_path):
    flags = [
        *SMALL,
        "--run_name",
        "r",
        "--checkpoints",
        tmp_path / "c",
        "--run_logs",
        tmp_path / "l",
    ]
    run(thin, "train", "--cache", "over", *flags, "--max_steps", "2")
    run(
        thin,
        "cache_latents",
        "--data",
        other,
        *"--teacher teacher.pth --clips on".split(),
        "--out",
        tmp_path / "others",
    )
    line = error_of(
        thin,
        "train",
        "--cache",
        tmp_path / "others",
        *flags,
        *"--max_steps 2 --resume auto".split(),
    )
    assert (
        "trained with other training clips (--cache, --data), of other ids, pixels or latents"
        in line
    )
    # with its own clips, and the same bits
    run(
        thin,
        "cache_latents",
        *"--data data --teacher teacher.pth --clips on".split(),
        "--out",
        tmp_path / "same",
    )
    assert "nothing is left to do" in run(
        thin, "train", "--cache", tmp_path / "same", *flags, "--max_steps", "2", "--resume", "auto"
    )


def test_another_compute_is_another_teacher(thin, world, tmp_path):
    run(
        thin,
        "cache_latents",
        *"--clips_from clips --teacher teacher.pth".split(),
        "--out",
        tmp_path / "fp32",
        "--dtype",
        "fp32",
    )
    assert "another teacher" in error_of(
        thin,
        "train",
        "--cache",
        "over",
        "--val_cache",
        tmp_path / "fp32",
        *TRAIN,
        "--training_videos",
    )
    run(thin, "train", "--cache", "over", *TRAIN, "--run_name", "exact")
    folder = run_folder(thin, "exact")
    assert "another teacher" in error_of(
        thin,
        "eval_distill",
        "--checkpoint",
        folder / "best.pth",
        "--cache",
        tmp_path / "fp32",
        "--training_videos",
    )
    assert "every checksum" in run(thin, "cache_latents", "--verify", tmp_path / "fp32")


def test_training_videos_are_not_called_held_out(world, tmp_path):
    run(
        tmp_path,
        "cache_latents",
        "--data",
        world / "data",
        "--limit",
        "5",
        "--teacher",
        next(world.glob("checkpoints/teacher_*/best.pth")),
        "--out",
        "try",
    )
    line = error_of(tmp_path, "train", "--cache", world / "latents", "--val_cache", "try", *TRAIN)
    assert (
        "--val_cache try holds 5 of 5 clips of videos that were trained on" in line
        and "--training_videos" in line
    )
    said = run(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        "--val_cache",
        "try",
        *TRAIN,
        "--training_videos",
        "--run_name",
        "t",
    )
    assert "step 2 training R2" in said and "held-out R2" not in said
    rows = [
        json.loads(line)
        for line in (run_folder(tmp_path, "t") / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(row["val_videos"] == "training" for row in rows if "val_r2" in row)
    assert "its R2 is of training videos" in run(tmp_path, "plot_runs", "t", "--out", "none")
    best = run_folder(world, "student") / "best.pth"
    for flags in (
        ["--cache", world / "latents"],
        [
            "--data",
            world / "data",
            "--split",
            "train",
            "--teacher",
            next(world.glob("checkpoints/teacher_*/best.pth")),
        ],
    ):
        assert "of videos that were trained on" in error_of(
            tmp_path, "eval_distill", "--checkpoint", best, *flags
        )
    said = run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        best,
        "--cache",
        world / "latents",
        "--training_videos",
        "--out",
        "e.json",
    )
    assert (
        "\ntraining R2; space" in said
        and json.loads((tmp_path / "e.json").read_text())["results"][0]["measured_on"] == "training"
    )
    run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        best,
        "--cache",
        world / "held_out",
        "--out",
        "e.json",
    )
    assert json.loads((tmp_path / "e.json").read_text())["results"][0]["measured_on"] == "held-out"


def test_copies_of_training_videos_are_left_out(world, tmp_path):
    """Three of five held-out videos are training videos under other names; decoded on the fly, and
    cached.
    """
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    best = run_folder(world, "student") / "best.pth"
    (tmp_path / "data" / "videos").mkdir(parents=True)
    for name, i in (("a", 0), ("b", 1), ("c", 2), ("d", 20), ("e", 21)):
        shutil.copy(
            world / "data" / "videos" / f"{i}.webm", tmp_path / "data" / "videos" / f"{name}.webm"
        )
    (tmp_path / "data" / "validation.json").write_text(
        json.dumps([{"id": name} for name in "abcde"])
    )
    said = run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        best,
        "--data",
        "data",
        "--teacher",
        teacher,
        *"--out fly.json --dtype fp32".split(),
    )
    assert "3 clips are training clips under other ids ('a', 'b', 'c'): left out" in said
    run(
        tmp_path,
        "cache_latents",
        *"--data data --split validation".split(),
        "--teacher",
        teacher,
        "--out",
        "cached",
    )
    said = run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        best,
        *"--cache cached --out cached.json --dtype fp32".split(),
    )
    assert "3 clips are training clips under other ids ('a', 'b', 'c'): left out" in said
    results = [
        json.loads((tmp_path / name).read_text())["results"][0]
        for name in ("fly.json", "cached.json")
    ]
    assert [result["clips"] for result in results] == [2, 2] and results[0]["r2"] == pytest.approx(
        results[1]["r2"], abs=2e-3
    )
    said = run(tmp_path, "train", "--cache", world / "latents", "--val_cache", "cached", *TRAIN)
    assert "3 clips are training clips under other ids" in said and "step 2 held-out R2" in said


def test_a_teacher_on_the_fly_decides_the_clips(world, tmp_path):
    """4 frames of 48 pixels, without a flag, as cache_latents.py does."""
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    said = run(
        tmp_path,
        "train",
        "--data",
        world / "data",
        "--teacher",
        teacher,
        *TRAIN,
        "--stats_clips",
        "4",
    )
    assert "grid (2, 3, 3)" in said and '"frames": 4, "resolution": 48, "patch": 16' in said
    assert "takes 4 frames of 48 pixels" in error_of(
        tmp_path, "train", "--data", world / "data", "--teacher", teacher, *TRAIN, "--frames", "8"
    )


def test_training_that_decodes_looks_at_every_stretch_and_size(world, tmp_path):
    """Beside the pixels of the first clips and of some: what changed is known before the first
    step.
    """
    for i in range(6):
        shutil.copy(world / "data" / "videos" / f"{i}.webm", tmp_path / f"{i}.webm")

    def rows(end):
        return "path,start,end,id\n" + "".join(
            f"{i}.webm,0,{end if i == 4 else 0.5},ep{i}\n" for i in range(6)
        )

    (tmp_path / "train.csv").write_text(rows(0.5))
    run(
        tmp_path,
        "cache_latents",
        "--data",
        ".",
        "--teacher",
        next(world.glob("checkpoints/teacher_*/best.pth")),
        *"--clips off --out c".split(),
    )
    (tmp_path / "train.csv").write_text(rows(0.6))
    with pytest.raises(
        InputError, match="the video 'ep4' has another size now, or its start and end were changed"
    ):
        Records(open_cache(tmp_path / "c"), load_split(str(tmp_path), "train"))


def test_a_teacher_brings_the_cut_of_its_clips(world, tmp_path):
    """Forgotten flags: the second stage is cut as the first was; another cut is one that was asked
    for, and said.
    """
    cut = ["--crop", "squash", "--sampling", "stride", "--stride", "2"]
    run(
        tmp_path,
        "cache_latents",
        "--data",
        world / "data",
        *"--teacher none --frames 4 --resolution 48".split(),
        *cut,
        "--out",
        "clips",
    )
    run(
        tmp_path,
        "train",
        *"--target pixels --masks ratio --cache clips".split(),
        *TRAIN,
        "--run_name",
        "t",
    )
    teacher = next(tmp_path.glob("checkpoints/t_*/best.pth"))
    said = run(
        tmp_path,
        "cache_latents",
        "--data",
        world / "data",
        "--teacher",
        teacher,
        "--out",
        "latents",
    )
    assert (
        open_cache(tmp_path / "latents").view == open_cache(tmp_path / "clips").view
        and "were cut otherwise" not in said
    )
    said = run(
        tmp_path,
        "cache_latents",
        "--data",
        world / "data",
        "--teacher",
        teacher,
        *"--crop center --limit 2 --out other".split(),
    )
    assert (
        "warning: the teacher's own clips were cut otherwise (crop is squash here and center there)"
        in said
    )
    run(
        tmp_path,
        "train",
        "--data",
        world / "data",
        "--teacher",
        teacher,
        *TRAIN,
        *"--stats_clips 4 --run_name fly".split(),
    )
    saved = load_checkpoint(next(tmp_path.glob("checkpoints/fly_*/best.pth")))
    assert View.from_dict(saved["view"]) == open_cache(tmp_path / "clips").view
    said = run(
        tmp_path,
        "cache_latents",
        "--clips_from",
        world / "clips",
        "--teacher",
        teacher,
        "--out",
        "third",
    )
    assert (
        "were cut otherwise (sampling is stride here and uniform there, stride is 2 here and 4"
        " there, crop" in said
    )


def test_the_probe_knows_a_training_video_under_another_name(world, tmp_path):
    """t0 as a whole and its copy h0; where lists have stretches, they are refused before."""
    for i in range(4):
        shutil.copy(world / "data" / "videos" / f"{i}.webm", tmp_path / f"t{i}.mp4")
        shutil.copy(world / "data" / "videos" / f"{i + 20}.webm", tmp_path / f"h{i}.mp4")
    shutil.copy(tmp_path / "t0.mp4", tmp_path / "h0.mp4")
    (tmp_path / "train.csv").write_text("path,start,end\nt0.mp4\nt1.mp4\nt2.mp4\nt3.mp4,0,0.5\n")
    (tmp_path / "validation.csv").write_text(
        "path,start,end\nh0.mp4,0,10\nh1.mp4\nh2.mp4\nt3.mp4,0.5,\n"
    )
    best = run_folder(world, "student") / "best.pth"
    flags = [
        "--checkpoint",
        best,
        *"--data . --folds 2 --untrained_seeds 0 --no_pixels --whole_videos --heads mean".split(),
    ]
    assert "and in the split 'validation' as 'h0@0-10'" in error_of(
        tmp_path, "probe_time_arrow", *flags
    )
    for name in ("train", "validation"):
        rows = [{"id": f"{name[0].replace('v', 'h')}{i}"} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        (tmp_path / f"{name}.csv").unlink()
    said = run(tmp_path, "probe_time_arrow", *flags)
    assert (
        "4 training and 3 held-out videos" in said
        and "'h0' is the training video 't0' under another name" in said
    )
    assert f"probing {best}, step " in said


def test_a_cache_is_not_gone_on_with_from_other_stretches_or_files(world, tmp_path):
    """Under the ids it had: a list whose times were corrected, a file that was put in another's
    place. A file that is gone tells nothing.
    """
    for i in range(4):
        shutil.copy(world / "data" / "videos" / f"{i}.webm", tmp_path / f"{i}.webm")

    def rows(end):
        return "path,start,end,id\n" + "".join(f"{i}.webm,0,{end},ep{i}\n" for i in range(4))

    (tmp_path / "train.csv").write_text(rows(0.5))
    flags = ["--data", ".", "--teacher", "none", *VIEW, "--out", "c"]
    run(tmp_path, "cache_latents", *flags)
    assert "already whole" in run(tmp_path, "cache_latents", *flags)
    (tmp_path / "train.csv").write_text(rows(0.6))
    line = error_of(tmp_path, "cache_latents", *flags)
    assert (
        "c holds 4 records of videos whose file has another size now, or whose start and end were"
        " changed, 'ep0' among them" in line
    )
    assert "holds 4 records" in error_of(tmp_path, "cache_latents", *flags, "--repair")
    said = run(tmp_path, "cache_latents", "--verify", "c", "--data", ".", code=1)
    assert (
        "put back the videos that it was made from, or delete c" in said and "--repair" not in said
    )
    (tmp_path / "train.csv").write_text(rows(0.5))
    shutil.copy(world / "data" / "videos" / "9.webm", tmp_path / "2.webm")
    assert "c holds 1 records" in error_of(
        tmp_path, "cache_latents", *flags
    ) and "'ep2' among them" in error_of(tmp_path, "cache_latents", *flags)
    (tmp_path / "2.webm").unlink()
    assert "already whole" in run(tmp_path, "cache_latents", *flags)
