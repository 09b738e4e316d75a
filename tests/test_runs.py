"""Runs on disk: one folder a run, a log a start; names match exactly, the furthest step wins,
nothing outside a run's folder is touched.
"""

import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch

from salt import alive, cache_format, journal, ranks, runs
from salt.checkpoint import CHECKPOINT_PARTS, load_checkpoint, save_checkpoint
from salt.errors import InputError
from salt.run_folder import RunFolder, lock
from salt.torch_files import step_and_run
from tests.stages import ROOT, SMALL, error_of, run, run_folder, start, stopped_at
from tests.test_config import apply

STAMP = "_20260102_030405_pid7"
PARTS = dict.fromkeys(CHECKPOINT_PARTS, 0)


def checkpoint(folder, name, step, run=None, mtime=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        str(folder / name),
        {**PARTS, "step": step, "run": run or folder.name, "w": torch.arange(step)},
    )
    if mtime:
        os.utime(folder / name, (mtime, mtime))


def opened(home, resume, name="salt", start="salt_20260909_090909_pid9"):
    (home / "checkpoints").mkdir(exist_ok=True)
    return RunFolder(
        str(home / "checkpoints"), str(home / "run_logs"), name, start, resume, lambda line: None
    )


def content_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize("name", ["salt", "a[b]*?", "x.y+z", "salt_20260102_030405_pid7", "ö"])
def test_names_match_exactly(name):
    others = [
        f"{name}{STAMP}.bak",
        f"{name}_before_lr_change",
        f"{name}_too{STAMP}",
        f"my{name}{STAMP}",
        name,
        f"{name}_old_copy_of_it",
    ]
    mine = [
        f"{name}_20260102_030405_pid7",
        f"{name}_20260102_030405_pid7_2",
        f"{name}_20260103_000000_pid1",
    ]
    assert runs.named([*others, *mine], name) == mine


def test_two_starts_of_one_second_and_pid_have_a_log_and_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "stamped", lambda name: f"{name}{STAMP}")
    monkeypatch.setattr(journal.atexit, "register", lambda function: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logs = [journal.Log(str(tmp_path), "salt") for _ in range(3)]
    logs[0]("the first one's")
    assert [log.start for log in logs] == [f"salt{STAMP}", f"salt{STAMP}_2", f"salt{STAMP}_3"]
    assert (tmp_path / f"salt{STAMP}.log").read_text() == "the first one's\n"
    folders = [opened(tmp_path, None, start=f"salt{STAMP}").folder for _ in range(3)]
    assert [os.path.basename(folder) for folder in folders] == [
        f"salt{STAMP}",
        f"salt{STAMP}_2",
        f"salt{STAMP}_3",
    ]


# ----------------------------------------------------------------------------------------- resuming


def test_the_furthest_step_wins_and_not_the_newest_file(tmp_path):
    checkpoint(tmp_path / "checkpoints" / f"salt{STAMP}", "last.pth", 30, mtime=1000)
    checkpoint(tmp_path / "checkpoints" / f"salt{STAMP}", "previous.pth", 20, mtime=9000)
    checkpoint(tmp_path / "checkpoints" / "salt_20260202_030405_pid7", "last.pth", 10, mtime=5000)
    found = opened(tmp_path, "auto")
    assert (
        found.content["step"] == 30
        and found.path.endswith(os.path.join(f"salt{STAMP}", "last.pth"))
        and found.folder == os.path.dirname(found.path)
    )


def test_of_equal_steps_the_latest_wins_and_damaged_ones_are_passed_over(tmp_path):
    first = tmp_path / "checkpoints" / f"salt{STAMP}"
    second = tmp_path / "checkpoints" / "salt_20260202_030405_pid7"
    checkpoint(first, "last.pth", 30, mtime=9000)
    checkpoint(second, "last.pth", 30, mtime=1000)
    found = opened(tmp_path, "auto")
    assert found.folder.endswith(first.name)
    found.file.close()
    (first / "last.pth").write_bytes(b"junk")
    assert opened(tmp_path, "auto").folder.endswith(second.name)


@pytest.mark.parametrize("copy", [f"salt{STAMP}.bak", "salt_before_lr_change", f"old_salt{STAMP}"])
def test_auto_leaves_copies_alone(tmp_path, copy):
    checkpoint(tmp_path / "checkpoints" / f"salt{STAMP}", "last.pth", 3)
    checkpoint(tmp_path / "checkpoints" / copy, "last.pth", 50, run=f"salt{STAMP}")
    before = content_of(tmp_path / "checkpoints" / copy)
    assert opened(tmp_path, "auto").content["step"] == 3
    assert content_of(tmp_path / "checkpoints" / copy) == before


def test_a_copy_that_is_named_gives_a_run_of_its_own_and_stays_as_it_is(tmp_path):
    checkpoint(tmp_path / "kept", "last.pth", 50, run=f"salt{STAMP}")
    before = content_of(tmp_path / "kept")
    for word in ("kept/last.pth", "kept"):
        found = opened(tmp_path, str(tmp_path / word))
        assert found.content["step"] == 50 and os.path.dirname(found.folder) == str(
            tmp_path / "checkpoints"
        )
        assert content_of(tmp_path / "kept") == before


def test_what_a_run_goes_on_from_becomes_its_last_checkpoint(tmp_path):
    """previous.pth is asked for, though last.pth is whole and further: from then on the run is
    where it was told to go back to, and nothing is lost.
    """
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    checkpoint(folder, "last.pth", 30)
    checkpoint(folder, "previous.pth", 20)
    further, back = (folder / "last.pth").read_bytes(), (folder / "previous.pth").read_bytes()
    found = opened(tmp_path, str(folder / "previous.pth"))
    found.begin(str(tmp_path / "run_logs" / "salt_9.log"), 20)
    assert (folder / "last.pth").read_bytes() == back and (
        folder / "left_behind_by_salt_9.pth"
    ).read_bytes() == further
    found.file.close()
    assert opened(tmp_path, "auto").content["step"] == 20


def test_a_branch_that_is_left_is_left_with_all_its_checkpoints(tmp_path):
    """A step back to a kept checkpoint: neither previous.pth nor a best.pth of later steps may lead
    back.
    """
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    for name, step in (("last.pth", 60), ("previous.pth", 40), ("best.pth", 55), ("kept.pth", 20)):
        checkpoint(folder, name, step)
    found = opened(tmp_path, str(folder / "kept.pth"))
    found.begin(str(tmp_path / "run_logs" / "salt_9.log"), 20)
    found.file.close()
    assert {path.name: step_and_run(path)[0] for path in folder.glob("*.pth")} == {
        "last.pth": 20,
        "kept.pth": 20,
        "left_behind_by_salt_9.pth": 60,
        "left_behind_by_salt_9_previous.pth": 40,
        "left_behind_by_salt_9_best.pth": 55,
    }
    assert opened(tmp_path, "auto").content["step"] == 20


def test_a_step_back_makes_a_best_of_its_own(world, tmp_path):
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *SMALL,
        *"--max_steps 8 --eval_every 2 --save_every 2 --run_name r".split(),
    ]
    stopped_at("step 2/", [sys.executable, ROOT / "train.py", *flags], tmp_path)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    shutil.copy(folder / "last.pth", folder / "kept.pth")
    run(tmp_path, "train", *flags, "--resume", "auto")
    figures = load_checkpoint(folder / "best.pth")
    said = run(tmp_path, "train", *flags, "--resume", folder / "kept.pth")
    assert "left behind: " in said and "best.pth; the next evaluation makes a new best.pth" in said
    again = load_checkpoint(folder / "best.pth")
    assert (again["step"], again["best"]) == (figures["step"], figures["best"]) and len(
        list(folder.glob("left_behind_by_*_best.pth"))
    ) == 1


def run_metrics(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_copy_under_a_name_of_its_kind_does_not_stand_for_the_run(tmp_path):
    original, copy = (tmp_path / "checkpoints" / f"salt{STAMP}{end}" for end in ("", "_2"))
    checkpoint(original, "last.pth", 30, mtime=1000)
    checkpoint(copy, "last.pth", 30, run=original.name, mtime=9000)
    found = opened(tmp_path, "auto")
    assert found.folder.endswith(original.name) and found.goes_on_in_place


def test_a_link_to_a_run_is_the_run(tmp_path):
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    checkpoint(folder, "last.pth", 30)
    (tmp_path / "latest").symlink_to(folder)
    found = opened(tmp_path, str(tmp_path / "latest"))
    assert os.path.samefile(found.folder, folder) and found.goes_on_in_place


def test_a_failed_start_takes_nothing_from_a_run_without_checkpoints(tmp_path):
    """Somebody moved the .pth files away; metrics and starts are of worth."""
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    folder.mkdir(parents=True)
    (folder / "starts.jsonl").write_text("{}\n")
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    before = content_of(folder)
    found = opened(tmp_path, "auto")
    assert not os.path.samefile(found.folder, folder)
    found.leave()
    assert content_of(folder) == before and not os.path.exists(found.folder)


def test_damage_to_the_list_of_starts_does_not_stop_a_run(tmp_path):
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    checkpoint(folder, "last.pth", 3)
    (folder / "starts.jsonl").write_bytes(b'{"log": "x.log"}\n\xff\xfe{"x')
    found = opened(tmp_path, "auto")
    found.begin(str(tmp_path / "run_logs" / "salt_9.log"), 3)
    assert (
        json.loads(
            (folder / "starts.jsonl").read_bytes().decode(errors="replace").splitlines()[-1]
        )["step"]
        == 3
    )


def test_a_run_is_gone_on_with_by_its_own_name(world, tmp_path):
    flags = ["--cache", world / "latents", *SMALL, "--max_steps", "4", "--run_name", "r"]
    run(tmp_path, "train", *flags)
    said = run(tmp_path, "train", *flags, "--resume", "r")
    assert "at step 4" in said and len(os.listdir(tmp_path / "checkpoints")) == 1


def test_a_copy_that_is_gone_on_with_is_a_run_of_its_own_from_its_first_moment(world, tmp_path):
    """Its last.pth says so, and is there before its first step: killed there, it goes on from
    there.
    """
    flags = [
        "--cache",
        world / "latents",
        *SMALL,
        *"--save_every 4 --run_name r --epochs 500".split(),
    ]
    stopped_at("step 6/", [sys.executable, ROOT / "train.py", *flags], tmp_path)
    (first,) = (tmp_path / "checkpoints").iterdir()
    first.rename(tmp_path / "kept")
    stopped_at(
        "step ",
        [sys.executable, ROOT / "train.py", *flags, "--resume", "kept/last.pth"],
        tmp_path,
        signal.SIGKILL,
    )
    (second,) = (tmp_path / "checkpoints").iterdir()
    saved = load_checkpoint(second / "last.pth")
    assert saved["run"] == second.name != first.name and saved["step"] >= 6
    found = RunFolder(
        str(tmp_path / "checkpoints"),
        str(tmp_path / "run_logs"),
        "r",
        "r_x",
        "auto",
        lambda line: None,
    )
    assert found.folder == str(second) and found.content["step"] == saved["step"]


def test_identities_of_different_kinds_do_not_agree():
    agree = cache_format.agree_on
    assert agree({"a": 1, "b": 2}, {"a": 1, "c": 3}) and not agree({"a": 1}, {"a": 2})
    assert (
        not agree({"list": "x"}, {"ids_sha256": "y"})
        and not agree({"t": {"x": 1}}, {"t": {"y": 1}})
        and agree(None, None)
        and agree({}, {})
    )


def test_resuming_with_other_files_of_the_same_list_is_refused(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    flags = [
        *"--target pixels --data data --frames 4 --resolution 48".split(),
        *SMALL,
        *"--max_steps 4 --stats_clips 4 --run_name r".split(),
    ]
    run(tmp_path, "train", *flags)
    shutil.copy(tmp_path / "data" / "videos" / "20.webm", tmp_path / "data" / "videos" / "0.webm")
    assert "trained with other training clips" in error_of(
        tmp_path, "train", *flags, "--resume", "auto"
    )
    run(
        tmp_path,
        "cache_latents",
        *"--data data --teacher none --frames 4 --resolution 48 --out clips".split(),
    )
    cached = ["--target", "pixels", "--cache", "clips", *flags[8:]]
    assert "trained with other training clips" in error_of(
        tmp_path, "train", *cached, "--resume", "auto"
    )


def test_a_run_that_is_going_is_not_gone_on_with(tmp_path):
    first = opened(tmp_path, "auto")  # it has a folder and no checkpoint yet
    with pytest.raises(InputError, match="is still going"):
        opened(tmp_path, "auto")
    assert len(os.listdir(tmp_path / "checkpoints")) == 1
    first.file.close()
    again = opened(tmp_path, "auto")
    # it died before its first checkpoint
    assert again.folder == first.folder and again.path is None


def test_a_start_that_came_to_nothing_leaves_no_folder(tmp_path):
    found = opened(tmp_path, None)
    assert os.path.isdir(found.folder)
    found.leave()
    assert not os.path.exists(found.folder)
    checkpoint(tmp_path / "checkpoints" / f"salt{STAMP}", "last.pth", 3)
    found = opened(tmp_path, "auto")
    found.leave()
    assert os.path.isfile(os.path.join(found.folder, "last.pth"))


def test_a_failed_start_of_training_leaves_its_log_alone(world, tmp_path):
    line = error_of(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        *SMALL,
        *"--predictor_heads 5 --resume auto".split(),
    )
    assert "must be a multiple of its heads" in line
    assert (
        os.listdir(tmp_path / "checkpoints") == [] and len(os.listdir(tmp_path / "run_logs")) == 1
    )


def test_a_run_of_an_odd_name_is_resumed_in_place_beside_its_copies(world, tmp_path):
    flags = [
        "--cache",
        world / "latents",
        *SMALL,
        *"--max_steps 6 --save_every 2 --run_name a[b]*".split(),
    ]
    run(tmp_path, "train", *flags)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    for copy in (f"{folder.name}.bak", "a[b]*_before_lr_change"):
        shutil.copytree(folder, tmp_path / "checkpoints" / copy)
    (folder / "last.pth").unlink()
    shutil.copy(world / "latents" / "ids.txt", tmp_path / "checkpoints" / "notes.txt")
    before = {
        copy: content_of(tmp_path / "checkpoints" / copy)
        for copy in (f"{folder.name}.bak", "a[b]*_before_lr_change")
    }
    said = run(tmp_path, "train", *flags, "--resume", "auto")
    assert (
        "starting afresh" in said and "passed over" not in said and (folder / "best.pth").is_file()
    )
    assert (
        before == {copy: content_of(tmp_path / "checkpoints" / copy) for copy in before}
        and len(os.listdir(tmp_path / "checkpoints")) == 5
    )
    # what is there of a run without a last.pth is not written over
    assert len(run_metrics(folder)) == 3


def test_another_kernel_set_is_announced(world, tmp_path):
    flags = ["--cache", world / "latents", *SMALL, "--save_every", "2", "--run_name", "k"]
    stopped_at("step 4/", [sys.executable, ROOT / "train.py", *flags, "--epochs", "500"], tmp_path)
    quick = [sys.executable, ROOT / "train.py", *flags, "--epochs", "500", "--resume", "auto"]
    said = stopped_at("step ", quick, tmp_path, SALT_OPS="reference")
    assert (
        re.search(r"it ran under .*'simd': 'avx.*now under .*'simd': 'none'", said)
        or "salt_ops is not in use" in said
        and "it ran under" in said
    )


# ------------------------------------------------------------------------------------------ finding


def test_every_way_to_name_a_checkpoint(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    folder = run_folder(world, "student")
    best = os.path.join("checkpoints", folder.name, "best.pth")
    for word in (
        best,
        f"checkpoints/{folder.name}",
        f"run_logs/{folder.name}.log",
        folder.name,
        "student",
        f"checkpoints/{folder.name}/metrics.jsonl",
    ):
        assert os.path.samefile(runs.checkpoint_of(word), best), word
    assert os.path.samefile(runs.checkpoint_of("student", "last.pth"), folder / "last.pth")
    for word, message in (
        ("studnt", "did you mean student"),
        ("checkpoints", "is a folder of runs"),
        ("checkpoints/x.pth", "there is no checkpoint"),
        ("data", "holds no run"),
    ):
        with pytest.raises(InputError, match=message):
            runs.checkpoint_of(word)
    said = run(
        world,
        "eval_distill",
        "--checkpoint",
        "student",
        str(folder / "last.pth"),
        "--cache",
        "held_out",
    )
    assert f"{best} " in said and "last.pth " in said


def run_with_log(home, name, step, told=None, best=True):
    """A run of one start, or a copy of the run `told`, on disk."""
    folder = home / "checkpoints" / name
    checkpoint(folder, "last.pth", step, run=told)
    if best:
        checkpoint(folder, "best.pth", step, run=told)
    (home / "run_logs").mkdir(exist_ok=True)
    (folder / "starts.jsonl").write_text(
        json.dumps({"log": f"../../run_logs/{told or name}.log"}) + "\n"
    )
    if not told:
        (home / "run_logs" / f"{name}.log").write_text(
            f"start {name}\nfolder checkpoints/{name}\nstatus: finished\nProcess exiting.\n"
        )
    return folder


@pytest.mark.parametrize("logs", [True, False])
def test_a_name_does_not_lead_to_a_copy(tmp_path, monkeypatch, logs):
    monkeypatch.chdir(tmp_path)
    run_with_log(tmp_path, f"salt{STAMP}", 200)
    copy = run_with_log(tmp_path, f"salt{STAMP}_2", 20, told=f"salt{STAMP}")
    if not logs:
        shutil.rmtree("run_logs")
    assert runs.checkpoint_of("salt") == f"checkpoints/salt{STAMP}/best.pth"
    # which is what was asked for
    assert os.path.samefile(runs.checkpoint_of(copy.name), copy / "best.pth")
    if logs:
        assert (
            alive.wait_for_end("salt", "checkpoints", "run_logs", 0.01)
            == f"checkpoints/salt{STAMP}"
        )


def test_a_younger_run_without_the_checkpoint_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_with_log(tmp_path, f"salt{STAMP}", 200)
    run_with_log(tmp_path, "salt_20260203_030405_pid8", 5, best=False)
    assert runs.checkpoint_of("salt") == f"checkpoints/salt{STAMP}/best.pth"
    assert (
        capsys.readouterr().out
        == f"salt: checkpoints/salt{STAMP}, not checkpoints/salt_20260203_030405_pid8, which has"
        " none yet\n"
    )


def test_after_waits_for_the_run_at_work_whatever_its_name_says(tmp_path, monkeypatch, capsys):
    """Its stamp is older: a clock stepped back."""
    monkeypatch.chdir(tmp_path)
    run_with_log(tmp_path, "salt_20260203_030405_pid8", 200)
    run_with_log(tmp_path, f"salt{STAMP}", 5)
    at_work = lock(f"checkpoints/salt{STAMP}")
    monkeypatch.setattr(time, "sleep", lambda seconds: at_work.close())
    assert alive.wait_for_end("salt", "checkpoints", "run_logs", 0.01) == f"checkpoints/salt{STAMP}"
    assert (
        f"that is checkpoints/salt{STAMP}, not checkpoints/salt_20260203_030405_pid8"
        in capsys.readouterr().out
    )


def test_stamps_are_utc(monkeypatch):
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 0, 2, 0)))
    assert runs.stamped("salt") == f"salt_20260102_030405_pid{os.getpid()}"


def test_one_who_asks_for_a_moment_does_not_refuse_a_start(tmp_path, monkeypatch):
    import fcntl

    asked = open(tmp_path / "starts.jsonl", "w")
    fcntl.flock(asked, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: asked.close())
    assert not lock(str(tmp_path)).closed


def test_the_logs_of_a_moved_run_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere" / f"salt{STAMP}"
    folder.mkdir(parents=True)
    (tmp_path / "run_logs").mkdir()
    names = [f"salt{STAMP}.log", "salt_20260103_030405_pid8.log"]
    (folder / "starts.jsonl").write_text(
        "".join(json.dumps({"log": f"../../run_logs/{name}"}) + "\n" for name in names)
        + '{"log": "to'
    )
    for name in names:
        (tmp_path / "run_logs" / name).write_text(f"start {name}\nfolder checkpoints/salt{STAMP}\n")
    shutil.move(folder, tmp_path / "here" / folder.name)
    assert [
        os.path.basename(path)
        for path in runs.logs_of_folder(str(tmp_path / "here" / folder.name), "run_logs")
    ] == names
    (tmp_path / "checkpoints").mkdir()
    shutil.move(tmp_path / "here" / folder.name, tmp_path / "checkpoints")
    assert (
        os.path.basename(
            runs.folder_of_log("run_logs/salt_20260103_030405_pid8.log", "checkpoints")
        )
        == f"salt{STAMP}"
    )


# ------------------------------------------------------------------------------------- alive or not


def log_of(folder, process, *more):
    path = folder / f"salt{STAMP}.log"
    path.write_text(
        "\n".join(
            [f"start salt{STAMP}", f"process {json.dumps(process)}" if process else "x", *more]
        )
        + "\n"
    )
    return str(path)


def test_a_reused_pid_is_another_process(tmp_path):
    mine = alive.this_process()
    assert alive.alive(log_of(tmp_path, mine))
    assert not alive.alive(log_of(tmp_path, {**mine, "ticks": mine["ticks"] - 1}))
    assert not alive.alive(log_of(tmp_path, {**mine, "boot": "another"}))
    assert not alive.alive(log_of(tmp_path, {**mine, "pid": 2**22 + 1}))
    # nothing is known of it
    assert alive.alive(log_of(tmp_path, {**mine, "host": "another", "ticks": 1}))
    assert not alive.alive(log_of(tmp_path, None))


def test_after_does_not_wait_for_a_reused_pid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = alive.this_process()
    path = log_of(tmp_path, {**mine, "ticks": mine["ticks"] - 1}, "step 20/40 loss 1.0")
    with pytest.raises(InputError, match="is gone and its log .* has no last line"):
        alive.wait_for_end(path, "checkpoints", "run_logs", 0.01)


def test_a_lock_tells_more_than_a_pid(tmp_path):
    """Another pid namespace or host name on the same machine: as long as the lock is held the run
    lives, and no longer.
    """
    found = opened(tmp_path, None)
    assert alive.held(found.folder)
    other = {**alive.this_process(), "host": "pod-2", "pid": 1, "ticks": 7}
    log = log_of(tmp_path, other)
    assert alive.alive(log, found.folder)
    found.file.close()
    assert not alive.alive(log, found.folder) and alive.alive(log)


def test_the_log_of_another_folder_is_not_a_copys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    checkpoint(folder, "best.pth", 3)
    (tmp_path / "run_logs").mkdir()
    (tmp_path / "run_logs" / f"salt{STAMP}.log").write_text(
        f"start x\nfolder checkpoints/salt{STAMP}\nstatus: finished\nProcess exiting.\n"
    )
    (folder / "starts.jsonl").write_text(
        json.dumps({"log": f"../../run_logs/salt{STAMP}.log"}) + "\n"
    )
    shutil.copytree(folder, tmp_path / "checkpoints" / "copy")
    assert (
        len(runs.logs_of_folder(str(folder), "run_logs")) == 1
        and runs.logs_of_folder("checkpoints/copy", "run_logs") == []
    )
    with pytest.raises(InputError, match="has no log of its own"):
        alive.wait_for_end("checkpoints/copy", "checkpoints", "run_logs", 0.01)
    assert alive.wait_for_end(str(folder), "checkpoints", "run_logs", 0.01) == str(folder)


def test_after_takes_a_runs_name_and_its_latest_start(world, monkeypatch):
    monkeypatch.chdir(world)
    folder = run_folder(world, "student")
    for word in ("student", folder.name, str(folder), str(folder / "best.pth")):
        assert os.path.samefile(alive.wait_for_end(word, "checkpoints", "run_logs", 0.01), folder)


# ------------------------------------------------------------------------------ silence and signals


def test_rank_without_world_size_is_one_line(world, tmp_path):
    for environ in (
        {"RANK": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "many"},
    ):
        line = error_of(
            tmp_path, "train", "--cache", world / "latents", *SMALL, "--max_steps", "2", **environ
        )
        assert "one is missing or wrong" in line and ranks.world == 1


def test_a_wrong_path_is_found_before_torch_is_imported(world, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    cases = {
        "train": ["--cache", world / "latent"],
        "cache_latents": ["--data", world / "dat", "--teacher", "none", "--out", "o"],
        "eval_distill": ["--checkpoint", "nobody", "--cache", world / "held_out"],
        "probe_time_arrow": ["--checkpoint", world / "nobody.pth", "--data", world / "data"],
    }
    for script, flags in cases.items():
        assert "imported" not in error_of(tmp_path, script, *flags, PYTHONPATH=str(tmp_path))
    assert "did you mean latents" in error_of(
        tmp_path, "train", *cases["train"], PYTHONPATH=str(tmp_path)
    )


def test_a_name_one_letter_from_a_setting_is_pointed_out(tmp_path, capsys):
    apply(tmp_path, EPOCH="1", PATH="/bin", SHUFLE="1", OTHER="1", CACHES="x", epoch="1")
    said = capsys.readouterr().out.splitlines()
    near = {"CACHES": "CACHE", "EPOCH": "EPOCHS", "SHUFLE": "SHUFFLE"}
    assert said[-3:] == [
        f"{word} is set in the environment and is no setting; did you mean {name}?"
        for word, name in near.items()
    ]


def test_a_signal_before_training_begins_leaves_at_once(world, tmp_path):
    process = start(
        [
            sys.executable,
            ROOT / "train.py",
            "--cache",
            world / "latents",
            *SMALL,
            "--max_steps",
            "10000000",
        ],
        tmp_path,
    )
    for line in process.stdout:
        if line.startswith("folder "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM and "status: stopped" in rest
    began = "saving after the step" in rest
    assert (
        began
        or "training has not begun: leaving at once" in rest
        and os.listdir(tmp_path / "checkpoints") == []
    )


def test_a_summary_of_many_short_epochs_is_short():
    lines = list(journal.summary([1.0] * 100000, 1))
    assert (
        len(lines) < 60
        and lines[1] == "epochs: 100000; the last 40:"
        and lines[-2].startswith("epoch 100000: average loss 1.0")
    )


# ----------------------------------------------------------------- stepping back, and failing at it


def test_a_step_back_without_room_leaves_everything_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    for name, step in (("last.pth", 60), ("previous.pth", 40), ("best.pth", 55), ("kept.pth", 20)):
        checkpoint(folder, name, step)
    before = content_of(folder)

    def full(source, path):
        open(path, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    found = opened(tmp_path, str(folder / "kept.pth"))
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(
        InputError, match="last.pth.part cannot be written: No space left on device; make room"
    ):
        found.begin(str(tmp_path / "run_logs" / "salt_9.log"), 20)
    found.file.close()
    (folder / "starts.jsonl").unlink()
    assert content_of(folder) == before and opened(tmp_path, "auto").content["step"] == 60


@pytest.mark.parametrize("calls", range(5))
def test_a_step_back_that_is_killed_at_any_moment_loses_nothing(tmp_path, monkeypatch, calls):
    """Killed before its nth change of the folder: --resume auto goes on from where the run was, or
    from where it was told to go.
    """
    folder = tmp_path / "checkpoints" / f"salt{STAMP}"
    for name, step in (("last.pth", 60), ("previous.pth", 40), ("best.pth", 55), ("kept.pth", 20)):
        checkpoint(folder, name, step)
    found, left = opened(tmp_path, str(folder / "kept.pth")), [calls]

    def killed(change):
        def changed(*arguments):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return change(*arguments)

        return changed

    for module, name in ((os, "replace"), (os, "link"), (shutil, "copyfile")):
        monkeypatch.setattr(module, name, killed(getattr(module, name)))
    with pytest.raises(KeyboardInterrupt):
        found.begin(str(tmp_path / "run_logs" / "salt_9.log"), 20)
    monkeypatch.undo()
    found.file.close()
    assert opened(tmp_path, "auto").content["step"] == 60


def test_a_tracker_that_is_missing_changes_nothing(world, tmp_path):
    flags = [
        "--cache",
        world / "latents",
        *SMALL,
        *"--max_steps 4 --save_every 2 --run_name r".split(),
    ]
    run(tmp_path, "train", *flags)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    shutil.copy(folder / "last.pth", folder / "kept.pth")
    before = content_of(folder)
    (tmp_path / "wandb.py").write_text("raise ImportError")
    assert "pip install wandb" in error_of(
        tmp_path,
        "train",
        *flags,
        "--resume",
        folder / "kept.pth",
        "--wandb",
        "p",
        PYTHONPATH=str(tmp_path),
    )
    assert content_of(folder) == before


def test_only_previous_is_gone_on_with_by_every_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_with_log(tmp_path, f"salt{STAMP}", 5)
    (folder / "last.pth").rename(folder / "previous.pth")
    for word in ("salt", str(folder), "auto"):
        found = opened(tmp_path, word)
        assert found.content["step"] == 5 and found.path.endswith("previous.pth")
        found.file.close()
    assert runs.to_resume("salt", "checkpoints", "run_logs") == f"checkpoints/salt{STAMP}"
    (folder / "previous.pth").unlink()
    with pytest.raises(InputError, match="has no last.pth"):
        runs.to_resume("salt", "checkpoints", "run_logs")


def test_the_best_is_the_one_in_the_file(world, tmp_path):
    """A last.pth of before it was put back: the threshold is the file's own figure, which a worse
    one does not replace.
    """
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *SMALL,
        *"--eval_every 1 --save_every 2 --max_steps 12 --run_name r".split(),
    ]
    stopped_at("step 2/", [sys.executable, ROOT / "train.py", *flags], tmp_path)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    shutil.copy(folder / "last.pth", tmp_path / "backup.pth")
    run(tmp_path, "train", *flags, "--resume", "auto")
    best = load_checkpoint(folder / "best.pth")
    # better than all that comes
    save_checkpoint(str(folder / "best.pth"), {**best, "best": 0.9, "step": 11})
    shutil.copy(tmp_path / "backup.pth", folder / "last.pth")
    said = run(tmp_path, "train", *flags, "--resume", "auto")
    assert (
        "best.pth is of step 11, its figure is 0.9: the next better evaluation takes its place"
        in said
    )
    assert (
        load_checkpoint(folder / "best.pth")["best"] == 0.9
        and load_checkpoint(folder / "last.pth")["best"] == 0.9
    )


def test_evaluations_that_metrics_lost_are_written_again(world, tmp_path):
    flags = [
        "--cache",
        world / "latents",
        "--val_cache",
        world / "held_out",
        *SMALL,
        *"--run_name r --eval_every 2 --epochs 4".split(),
    ]
    stopped_at("step 8/", [sys.executable, ROOT / "train.py", *flags], tmp_path)
    path = next(tmp_path.glob("checkpoints/r_*")) / "metrics.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in before if "loss" in row and row["step"] > 4)
    )
    said = run(tmp_path, "train", *flags, "--resume", "auto")
    assert (
        f"was cut or replaced: {sum('val_r2' in row for row in before)} evaluations are written"
        " again from the checkpoint" in said
    )
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row for row in after if row in before] == [
        row for row in before if "val_r2" in row or row["step"] > 4
    ]
    assert [row["step"] for row in after if "val_r2" in row] == list(range(0, 17, 2))


def test_a_start_under_another_name_does_not_make_the_run_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_with_log(tmp_path, f"salt{STAMP}", 5)
    folder = run_with_log(tmp_path, f"big{STAMP}", 9)
    later = "salt_20270101_000000_pid1"
    (tmp_path / "run_logs" / f"{later}.log").write_text(
        f"start {later}\nfolder checkpoints/{folder.name}\nstatus: finished\nProcess exiting.\n"
    )
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps({"log": f"../../run_logs/{later}.log"}) + "\n")
    assert runs.find("salt")[0] == f"checkpoints/salt{STAMP}" and runs.find("salt")[2] is None
    assert runs.find("big")[0] == f"checkpoints/big{STAMP}"
    assert runs.find(later)[0] == f"checkpoints/big{STAMP}"  # the start itself is that run's
    shutil.rmtree(f"checkpoints/salt{STAMP}")
    os.remove(f"run_logs/salt{STAMP}.log")
    with pytest.raises(
        InputError,
        match=(
            f"salt was the --run_name of a start that went on with the run big{STAMP}; give that"
            " name"
        ),
    ):
        runs.find("salt")
