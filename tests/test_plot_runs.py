"""plot_runs.py: its statistics against numpy over every step, logs of every kind, wrong inputs, and
what is in the picture.
"""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from salt.errors import InputError

SCRIPT = Path(__file__).resolve().parent.parent / "tools/plot_runs.py"
SETTINGS = {
    "lr": 2e-4,
    "masks": ["short", "long"],
    "run_name": "wide",
    "resume": None,
    "checkpoints": "checkpoints",
    "run_logs": "run_logs",
    "warmup": None,
}
RUN = "wide_20260102_030405_pid9999999"
A, B = "a_20260102_030405_pid1", "b_20260102_030405_pid1"
OF_A, OF_B = f"checkpoints/{A}", f"checkpoints/{B}"


def shell(folder, *argv):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLCONFIGDIR": str(folder)},
    )


@pytest.fixture
def plot(tmp_path, monkeypatch):
    """plot_runs.py in this process, in an empty folder: a function of its arguments that returns
    (the runs in the JSON, the script's globals).
    """

    def no_json(token):
        pytest.fail(f"{token} is no JSON")

    def plot(*argv):
        argv = [*map(str, argv)]
        argv += [] if "--json" in argv else ["--json", "runs.json"]
        argv += [] if "--out" in argv else ["--out", "none"]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tools/plot_runs.py", *argv])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        scope = runpy.run_path(str(SCRIPT), run_name="__main__")
        content = json.loads((tmp_path / "runs.json").read_text(), parse_constant=no_json)
        assert content["differences"] == scope["differences"]
        return content["runs"], scope

    return plot


def correlated(count, seed=0):
    """float [count]: noise of mean 0 in which each value follows half of the one before it."""
    noise = np.random.default_rng(seed).normal(size=count)
    for i in range(1, count):
        noise[i] += 0.5 * noise[i - 1]
    return noise


def losses_of(count, seed=0):
    """float [count]: a falling loss with correlated noise, of every step."""
    return 2 + 8 * np.exp(-np.arange(count) / 300) + 0.05 * correlated(count, seed)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_log(path, steps, losses):
    """A log of other code."""
    path.write_text("".join(f"step {step} loss {loss:.6f}\n" for step, loss in zip(steps, losses)))


def write_run(
    folder, name, losses, settings=SETTINGS, every=20, epoch=333, start=0, end="finished"
):
    """The files of a run as train.py leaves them; returns (its log, its metrics.jsonl, the rows).

    losses float [M], nan for a skipped step; start: the step it was resumed at, whose metrics it
    begins with; end: its status, None where it was killed.
    """
    lines = [f"run {name}: train.py", f"settings {json.dumps(settings)}", "salt_ops: built for cpu"]
    lines += [f"resumed a/last.pth at step {start}"] if start else []
    rows, previous = [], 0
    for step in range(1, len(losses) + 1):
        line = None
        if step % every == 0 or step % epoch == 0 or step == len(losses):
            part, skipped = losses[previous:step], int(np.isnan(losses[:step]).sum())
            loss = float(np.nanmean(part)) if np.isfinite(part).any() else math.nan
            rate = 100 + step % 7
            row = {"step": step, "epoch": step / epoch, "loss": loss, "r2": 0.5}
            rows.append(row | {"skipped": skipped, "clips_per_s": rate, "data_wait": 0.01})
            line = f"step {step}/{len(losses)} epoch {step / epoch:.2f} loss {loss:.5f} R2 0.5000"
            line += f" lr 2.00e-04 wd 0.040 grad 0.3 clipped 0% {rate:.2f} clips/s MFU 15% waiting"
            line += f" 1%{f' skipped {skipped}' if skipped else ''} left 0:01:30"
            lines += [line] if step > start else []
            previous = step
        if step % 500 == 0:
            r2 = 0.6 - abs(step - 1500) / 1e4
            rows.append({"step": step, "val_r2": r2, "val_mse": 0.3, "val_r2_background": 0.41})
            line = f"step {step} held-out R2 {r2:.4f} mse 0.30000 (mean of the clip's own context:"
            lines += [f"{line} R2 0.4100)"] if step > start else []
    if end:
        least = int(np.nanargmin(losses))
        lines += [
            f"minimum loss {losses[least]:.6f} at step {least + 1} of {len(losses)}",
            f"epoch 1: average loss {losses[:epoch].mean():.6f} over {epoch} steps",
            f"average loss of the last 2000 steps: {np.nanmean(losses[-2000:]):.6f}",
            f"status: {end}",
            "Process exiting.",
        ]
    log = folder / "run_logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("\n".join(lines) + "\n")
    metrics = folder / "checkpoints" / name / "metrics.jsonl"
    write_rows(metrics, rows)
    return log, metrics, rows


def test_a_runs_figures(tmp_path, plot):
    losses = losses_of(4000)
    _, _, rows = write_run(tmp_path, RUN, losses)
    (run,), scope = plot(RUN)
    figures = run["figures"]
    low, high = figures.pop("last_ci95")
    assert low < figures["last_loss"] < high
    # lines end at step 2000, and at 1998 too
    assert figures.pop("last_loss") == pytest.approx(losses[2000:].mean(), rel=1e-12)
    assert figures == {
        "step": 4000,
        "minimum_loss": round(losses.min(), 6),
        "minimum_step": losses.argmin() + 1,
        "minimum_over": "every step",
        "last_steps": 2000,
        "val_r2_best": 0.6,
        "val_r2_best_step": 1500,
        "val_r2_last": 0.35,
        "val_r2_background": 0.41,
        "clips_per_s": np.median([row["clips_per_s"] for row in rows if "loss" in row]),
        "data_wait": 0.01,
        "status": "finished",
        "skipped": 0,
    }
    assert (run["run"], run["notes"], scope["differences"]) == (f"checkpoints/{RUN}", [], {})


def test_interval_is_that_of_twenty_batch_means(tmp_path, plot):
    losses = losses_of(3000)
    write_run(tmp_path, RUN, losses, epoch=10**9)
    means = losses[1000:].reshape(20, 100).mean(1)
    assert plot(RUN)[0][0]["figures"]["last_ci95"] == pytest.approx(
        stats.t.interval(0.95, 19, means.mean(), stats.sem(means)), rel=1e-9
    )


def test_interval_covers_the_mean_of_correlated_losses(tmp_path, plot):
    write_run(tmp_path, RUN, losses_of(40))
    end_of = plot(RUN)[1]["end_of"]
    steps, covered, naive = np.arange(20, 4001, 20), 0, 0
    for seed in range(400):
        series = correlated(300, seed)[100:]  # stationary, of mean 0
        low, high = end_of(steps, series, np.full(200, 20))["last_ci95"]
        covered += low < 0 < high
        naive += abs(series[100:].mean()) < stats.t.ppf(0.975, 99) * stats.sem(series[100:])
    assert 0.86 * 400 < covered < 0.97 * 400
    assert naive < 0.78 * 400


def test_skipped_steps_carry_no_weight(tmp_path, plot):
    losses = losses_of(3000)
    losses[1500:1507] = math.nan
    losses[2000:2040] = math.nan  # two whole lines, NaN tokens in metrics.jsonl
    _, metrics, _ = write_run(tmp_path, A, losses)
    write_run(tmp_path, B, losses)[1].unlink()
    text = metrics.read_text()
    assert text.count("NaN") == 2
    for rows in (text, text.replace("NaN", "null")):
        metrics.write_text(rows)
        for run, tolerance in zip(plot("a", "b")[0], (1e-12, 1e-5)):
            figures = run["figures"]
            assert figures["skipped"] == 47
            assert figures["last_steps"] == 2000 - 47
            assert figures["last_loss"] == pytest.approx(np.nanmean(losses[1000:]), abs=tolerance)
            assert run["notes"] == ["lines left out, damaged, not finite or logged again later: 2"]


def test_a_hole_in_the_lines_is_said_and_stands_for_nothing(tmp_path, plot):
    losses = np.concatenate([np.full(1000, 9.0), np.full(1000, 1.0)])
    _, metrics, rows = write_run(tmp_path, RUN, losses)
    write_rows(metrics, [row for row in rows if not 200 < row["step"] <= 1500])
    (run,), _ = plot(RUN)
    assert run["notes"][0].startswith("no line between step 200 and 15")
    assert run["figures"]["last_steps"] < 800  # those that lines speak of


@pytest.mark.parametrize(
    "spacings", [[1] * 1000 + [50] * 20, [20, 13, 7, 20, 6, 14, 1, 18, 2, 17, 3] * 10]
)
def test_lines_of_another_spacing_are_no_hole(tmp_path, plot, spacings):
    """--log_every raised on resume; ends of epochs between lines."""
    steps = np.cumsum(spacings)
    write_log(tmp_path / "x.log", steps, 9 - 4 * steps / steps[-1])
    (run,), _ = plot("x.log")
    assert not any("no line between" in note for note in run["notes"])
    assert run["figures"]["last_steps"] == min(2000, steps[-1])


def test_r2_of_other_clips_or_targets_is_said_not_to_compare(tmp_path, plot, capsys):
    for name, norm in ((A, "none"), (B, "layer_norm")):
        write_run(tmp_path, name, losses_of(1000), settings={**SETTINGS, "target_norm": norm})
    plot("a", "b")
    line = "held-out R2 of these runs is of other clips, masks or targets, or measured from another"
    assert f"{line} mean (target_norm)" in capsys.readouterr().out
    plot("a", "a")
    assert line not in capsys.readouterr().out


def test_metrics_that_were_cut_are_said(tmp_path, plot):
    _, metrics, rows = write_run(tmp_path, RUN, losses_of(4000))
    write_rows(metrics, rows[:20])
    (run,), _ = plot(RUN)
    assert run["figures"]["step"] < 4000
    assert run["notes"] == ["its lines end before step 4000: the file was cut or replaced"]


@pytest.mark.parametrize(
    "given",
    ["folder", "log", "metrics", "name", "run_name", "folder elsewhere", "log elsewhere"],
)
def test_every_way_to_name_a_run(tmp_path, plot, given):
    losses = losses_of(1000)
    home = tmp_path / "far" if "elsewhere" in given else tmp_path
    home.mkdir(exist_ok=True)
    log, metrics, _ = write_run(home, RUN, losses)
    write_run(home, "wide_20260101_235959_pid9999998", losses + 1)  # older
    write_run(home, "wide_too_20260109_235959_pid9999998", losses + 1)  # of another name
    words = {"folder": metrics.parent, "log": log, "metrics": metrics, "name": RUN}
    (run,), _ = plot(words.get(given.split()[0], "wide"))
    assert run["run"] == os.path.relpath(metrics.parent, tmp_path)
    assert run["source"] == os.path.relpath(metrics, tmp_path)
    assert run["figures"]["minimum_loss"] == round(losses.min(), 6)
    assert run["settings"] == SETTINGS
    note = "of 2 runs named wide that with the latest date"
    assert run["notes"] == [note] * (given == "run_name")


def test_log_alone_and_metrics_alone(tmp_path, plot):
    losses = losses_of(3000)
    write_run(tmp_path, A, losses)[0].unlink()
    write_run(tmp_path, B, losses)[1].unlink()
    (bare, log), _ = plot("a", "b")
    assert bare["settings"] is None and "no log of train.py" in bare["notes"][0]
    assert log["settings"] == SETTINGS and log["source"] == f"run_logs/{B}.log"
    metrics, told = bare["figures"], log["figures"]
    # the least line is one of 20 steps, or shorter at an epoch's end
    assert metrics["minimum_loss"] <= losses.reshape(-1, 20).mean(1).min()
    assert metrics["minimum_over"] == "lines of 20" and told["minimum_over"] == "every step"
    assert told["last_loss"] == pytest.approx(losses[1000:].mean(), abs=1e-5)
    alike = [name for name in metrics if name != "data_wait" and "minimum" not in name]
    assert {"last_ci95", "val_r2_best", "val_r2_background", "clips_per_s"} < set(alike)
    for name in alike:
        assert told[name] == pytest.approx(metrics[name], abs=1e-4)


def test_a_killed_run_with_a_torn_last_line(tmp_path, plot):
    losses = losses_of(1000)
    log, metrics, _ = write_run(tmp_path, RUN, losses, end=None, epoch=10**9)
    metrics.write_text(metrics.read_text() + '{"step": 1010, "epoch": 3.0, "lo')
    log.write_text(log.read_text() + "step 1010/2000 epo")
    (run,), _ = plot(RUN)
    figures = run["figures"]
    assert run["notes"] == ["lines left out, damaged, not finite or logged again later: 1"]
    assert (figures["status"], figures["step"], figures["last_steps"]) == ("killed", 1000, 1000)
    assert figures["minimum_over"] == "lines of 20"
    assert figures["minimum_loss"] == pytest.approx(losses.reshape(-1, 20).mean(1).min())
    assert figures["last_loss"] == pytest.approx(losses.mean(), rel=1e-12)


def test_a_resumed_run(tmp_path, plot):
    losses = losses_of(3000)
    log, metrics, _ = write_run(tmp_path, RUN, losses, start=1500)
    (run,), _ = plot(log)
    assert run["notes"] == ["resumed a/last.pth at step 1500"]
    assert run["figures"]["last_loss"] == pytest.approx(losses[1000:].mean(), rel=1e-12)
    metrics.unlink()
    (run,), _ = plot(log)  # now of the log, which begins there
    assert run["figures"]["last_steps"] == 1500
    assert run["figures"]["last_loss"] == pytest.approx(losses[1500:].mean(), abs=1e-5)


def test_a_failed_run_says_why(tmp_path, plot):
    log, _, _ = write_run(tmp_path, RUN, losses_of(100), end="failed")
    log.write_text(log.read_text().replace("status:", "error: the disk is full\nstatus:"))
    (run,), _ = plot(RUN)
    assert run["figures"]["status"] == "failed"
    assert run["notes"] == ["error: the disk is full"]


OLD = """loading 168903 videos, 4 steps of warm-up
step 20 loss 12.5
[epoch 1] step: 40, loss: 11.35, lr 3e-4
Step 60/100 loss=9.71
INFO global_step=80,train_loss=nan, grad 3
step 80 val_loss 3.0
step 80 validation loss 2.0
average loss of the last 40 steps: 0.5, at step 100 of 100
step 100 | time 3.2 s | loss 1.0e+01 | 31.9 clips/s
step 120 loss 9.x
step 120 loss 10.5abc
step 1,120 - loss: 9.8.
step 11"""


def test_an_old_log(tmp_path, plot):
    (tmp_path / "old.log").write_text(OLD)
    (run,), scope = plot("old.log", "--out", "old.png")
    x, y = scope["loss_axis"].lines[0].get_data()
    assert list(x) == [20, 40, 60, 100, 1120]
    assert list(y) == [12.5, 11.35, 9.71, 10.0, 9.8]
    figures = run["figures"]
    assert "status" not in figures and run["settings"] is None
    assert (figures["minimum_loss"], figures["minimum_step"]) == (9.71, 60)
    assert figures["last_ci95"] is None and figures["clips_per_s"] == 31.9
    assert run["notes"] == [
        "no line between step 100 and 1120",
        "no log of train.py: settings, status and exact minimum are not known",
        "lines left out, damaged, not finite or logged again later: 1",
    ]


def test_every_line_of_an_old_log_weighs_alike(tmp_path, plot):
    losses = losses_of(200)
    write_log(tmp_path / "old.txt", range(69_000, 71_000, 10), losses)
    figures = plot("old.txt")[0][0]["figures"]
    assert figures["last_loss"] == pytest.approx(losses.mean(), abs=1e-6)
    assert figures["last_steps"] == 2000


def test_steps_that_fall_back(tmp_path, plot):
    write_log(tmp_path / "again.log", [10, 20, 30, 20, 30, 40], [5, 4, 1, 3, 2, 1.5])
    (run,), scope = plot("again.log", "--out", "x.svg")
    x, y = scope["loss_axis"].lines[0].get_data()
    assert list(x) == [10, 20, 30, 40] and list(y) == [5, 3, 2, 1.5]
    assert run["notes"][1:] == ["lines left out, damaged, not finite or logged again later: 2"]
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_differences_are_those_of_settings_only(tmp_path, plot):
    a = SETTINGS | {"run_name": "a", "lr": 1e-3, "deep": {"x": 1}}
    b = SETTINGS | {"run_name": "b", "resume": "auto", "warmup": 5, "new": None, "deep": {"x": 1}}
    write_run(tmp_path, A, losses_of(100), a)
    write_run(tmp_path, B, losses_of(100), b)
    (tmp_path / "old.log").write_text(OLD)
    assert plot("a", "old.log", "b")[1]["differences"] == {
        "lr": {OF_A: 1e-3, OF_B: 2e-4},
        "warmup": {OF_A: None, OF_B: 5},
        "new": {OF_B: None},
    }


def test_settings_are_those_that_were_in_force(tmp_path, plot):
    for name, frames, clips in ((A, 16, "5dbe542ee66b"), (B, None, "00e9a96e88a0")):
        log, _, _ = write_run(tmp_path, name, losses_of(100), SETTINGS | {"frames": frames})
        in_force = {"frames": 4, "warmup": 10, "training clips": clips}
        log.write_text(
            log.read_text().replace("salt_ops:", f"in force {json.dumps(in_force)}\nsalt_ops:")
        )
    (run, _), scope = plot("a", "b")
    assert run["settings"]["frames"] == 4
    assert scope["differences"] == {"training clips": {OF_A: "5dbe542ee66b", OF_B: "00e9a96e88a0"}}


def test_a_run_given_twice_is_there_once_and_equal_names_stay_apart(tmp_path, plot, capsys):
    write_run(tmp_path, RUN, losses_of(100))
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.log").write_text(OLD)
    (tmp_path / "empty.log").touch()
    words = ["wide", f"run_logs/{RUN}.log", f"checkpoints/{RUN}/", "x/train.log", "y/train.log"]
    runs, scope = plot(*words, "empty.log")
    assert [run["run"] for run in runs] == [f"checkpoints/{RUN}", "x/train.log", "y/train.log"]
    assert scope["labels"] == [run["run"] for run in runs]
    assert "empty.log holds no logged step and is left out" in capsys.readouterr().out


def test_labels_are_as_short_as_they_can_be(tmp_path, plot):
    later = A.replace("_03", "_04")
    for name in (A, later, B):
        write_run(tmp_path, name, losses_of(100))
    assert plot("a", "b")[1]["labels"] == ["a", "b"]
    assert plot(A, later)[1]["labels"] == [A, later]


def test_no_finite_loss_and_few_lines(tmp_path, plot):
    (tmp_path / "nan.log").write_text("step 1 loss nan\nstep 2 loss inf\n")
    (tmp_path / "one.log").write_text("step 7 loss 3\n")
    (lost, one), _ = plot("nan.log", "one.log", "--out", "few.pdf")
    assert lost["figures"] == {"step": 2}
    assert one["figures"]["last_loss"] == 3.0 and one["figures"]["last_steps"] == 7
    assert one["figures"]["last_ci95"] is None
    assert (tmp_path / "few.pdf").read_bytes().startswith(b"%PDF")


def test_from_the_shell(tmp_path):
    import matplotlib.image

    long = "a_very_long_name_of_a_run_with_everything_in_it"
    for i in range(4):
        settings = SETTINGS | {"lr": i / 1000, "cache": f"/some/long/folder/of/caches/number_{i}"}
        name = f"{long}_lr{i}_20260102_03040{i}_pid1"
        write_run(tmp_path, name, losses_of(3000, i) + i, settings)
    done = shell(tmp_path, *sorted((tmp_path / "checkpoints").iterdir()), "--json=sub/runs.json")
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.split("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 100
    labels, *rows = [line.split() for line in table]
    cells = {row[0]: row[1:] for row in rows}
    assert [label[-3:] for label in labels] == [f"lr{i}" for i in range(4)]
    assert cells["status"] == ["finished"] * 4
    assert list(map(float, cells["lr"])) == [i / 1000 for i in range(4)]
    assert [cell[-3:] for cell in cells["cache"]] == [f"r_{i}" for i in range(4)]
    assert list(map(float, cells["minimum_loss"])) == pytest.approx(
        [losses_of(3000, i).min() + i for i in range(4)], rel=1e-4
    )
    assert "resume" not in cells and "warmup" not in cells
    assert len(json.loads((tmp_path / "sub" / "runs.json").read_text())["runs"]) == 4
    picture = matplotlib.image.imread(tmp_path / "runs.png")[..., :3]  # [H, W, 3]
    for colour in ("1f77b4", "ff7f0e", "2ca02c", "d62728"):
        distance = np.abs(picture - np.frombuffer(bytes.fromhex(colour), np.uint8) / 255).max(-1)
        drawn = distance < 0.02
        assert drawn.sum() > 500 and np.ptp(drawn.nonzero()[1]) > 0.3 * picture.shape[1]
    assert not list(tmp_path.glob("*.part"))


def test_the_curves_in_the_picture(tmp_path, plot):
    _, _, rows = write_run(tmp_path, RUN, losses_of(4000), epoch=10**9)
    _, scope = plot(RUN, "--out", "a.png")
    raw, smooth = (line.get_xydata() for line in scope["loss_axis"].lines)
    logged = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row])
    assert np.array_equal(raw, logged)
    for i in (50, 120, 197):  # at least five lines: two to either side
        assert smooth[i, 1] == pytest.approx(logged[i - 2 : i + 3, 1].mean(), rel=1e-9)
    r2, background = scope["r2_axis"].lines
    evaluated = [(row["step"], row["val_r2"]) for row in rows if "val_r2" in row]
    assert np.array_equal(r2.get_xydata(), evaluated)
    assert list(background.get_ydata()) == [0.41, 0.41]
    assert scope["loss_axis"].get_yscale() == "log"


def test_all_of_a_curve_and_its_background_are_in_the_picture(tmp_path, plot):
    _, metrics, rows = write_run(tmp_path, RUN, losses_of(2000))
    training = [row for row in rows if "loss" in row]
    for lowest in (-9.0, -0.6, 0.3):
        evaluations = [
            {"step": step, "val_r2": value, "val_mse": 1.0, "val_r2_background": lowest - 0.1}
            for step, value in ((500, lowest), (1000, 0.2), (1500, 0.5))
        ]
        write_rows(metrics, training + evaluations)
        low, high = plot(RUN, "--out", "p.png")[1]["r2_axis"].get_ylim()
        assert low < lowest - 0.1 and high > 0.5


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give one or more runs"),
        (["widee"], "no log, folder or run widee; did you mean wide"),
        (["run_logs/wide_20260102_030405_pid999999.log"], "did you mean run_logs/" + RUN),
        (["zzz"], "runs are looked up in checkpoints and run_logs"),
        (["empty.log"], "no step to compare"),
        (["notes.txt"], "no step to compare"),
        (["checkpoints"], "is a folder of runs; give checkpoints/"),
        (["nothing"], "the folder nothing holds no run"),
        (["binary.pth"], "no step to compare"),
        (["binary"], "is not text"),
        (["checkpoints/begun"], "no step to compare"),
        (["wide", "zzz"], "no log, folder or run zzz"),
        (["pipe"], "neither a file nor a folder"),
        (["wide", "--out", "x.jpeg2"], "ends in .png or .pdf or .svg"),
        (["wide", "--out", "nothing"], "--out nothing is a folder"),
        (["wide", "--seed", "3"], "unknown flag --seed"),
        (["wide", "--json", f"checkpoints/{RUN}/metrics.jsonl"], "ends in .json"),
        (["wide", "--run_log", "x"], "did you mean --run_logs"),
        (["wide", "--out", "notes.txt/x.png"], "cannot be made"),
        (["json.jsonl"], "no step to compare"),
    ],
)
def test_wrong_inputs(tmp_path, plot, argv, message):
    write_run(tmp_path, RUN, losses_of(100))
    (tmp_path / "empty.log").touch()
    (tmp_path / "notes.txt").write_text("a step forward is no loss\n")
    (tmp_path / "nothing").mkdir()
    begun = tmp_path / "checkpoints" / "begun" / "metrics.jsonl"
    begun.parent.mkdir()
    begun.write_text('{"step": 0, "val_r2": 0.1}\n[]\n3\n{"step": 1e400, "loss": 1}\n')
    for name in ("binary.pth", "binary"):
        (tmp_path / name).write_bytes(b"PK\3\4\0\0step 3 loss 5\n")
    (tmp_path / "json.jsonl").write_text('{"a": 1}\nnull\n')
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        plot(*argv)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_wrong_input_is_one_line_and_help_names_the_words(tmp_path):
    (tmp_path / "old.log").write_text(OLD)
    wrong = shell(tmp_path, "old.log", "odl.log")
    line = "plot_runs.py: error: there is no log, folder or run odl.log; did you mean old.log?\n"
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (1, "", line)
    assert not (tmp_path / "runs.png").exists()
    shown = shell(tmp_path, "--help")
    assert shown.returncode == 0
    assert "python plot_runs.py RUNS [...] [--name value ...]" in shown.stdout
    assert "runs.png" in shown.stdout


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "mine.log"
    path.write_text(OLD)
    path.chmod(0)
    # root reads everything: a file that fails to read is another kind
    done = shell(tmp_path, path if os.geteuid() else "/proc/self/mem", "--out", "none")
    assert done.returncode == 1
    assert "cannot be read" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_start_that_was_refused_does_not_hide_the_run(tmp_path, plot):
    """Its log names the folder; the run's latest start is the one that its folder lists."""
    log, metrics, _ = write_run(tmp_path, RUN, losses_of(300))
    write_rows(metrics.with_name("starts.jsonl"), [{"log": f"../../run_logs/{RUN}.log"}])
    log.with_name("wide_20260105_030405_pid1.log").write_text(
        f"start x\nsettings {{}}\nfolder checkpoints/{RUN}\nerror: no\nstatus: failed\nProcess"
        " exiting.\n"
    )
    (run,), _ = plot("wide")
    assert (run["run"], run["figures"]["status"]) == (f"checkpoints/{RUN}", "finished")


@pytest.mark.parametrize("name", ["metrics.jsonl", "copy.jsonl"])
def test_a_row_may_hold_a_training_loss_and_a_held_out_figure(tmp_path, plot, name):
    steps = range(10, 501, 10)
    rows = [{"step": step, "loss": 10 - step / 100} for step in steps]
    write_rows(
        tmp_path / name, [row | {"val_r2": 0.5} if row["step"] == 500 else row for row in rows]
    )
    figures = plot(name)[0][0]["figures"]
    assert (figures["minimum_step"], figures["minimum_loss"]) == (500, 5.0)
    assert figures["val_r2_last"] == 0.5


@pytest.mark.parametrize(
    "line",
    [
        "[val] step {} loss 9.0",
        "Validation: step {}, loss 9.0",
        "step {} valid_loss 9.0",
        "eval step {}: loss 9.0",
        "step {} val: loss 9.0",
        "step {} dev loss 9.0",
        "step {} best loss 9.0",
        "step {} eval_loss 9.0",
    ],
)
def test_a_validation_line_of_other_code_is_no_training_loss(tmp_path, plot, line):
    rows = []
    for step in range(100, 2001, 100):
        rows.append(f"test.py:33 step {step} loss {5 - step / 1000}")
        rows += [line.format(step)] * (step % 500 == 0)
    rows.append("step 2100 val_loss 9.0, train_loss 2.9")
    (tmp_path / "x.log").write_text("\n".join(rows))
    figures = plot("x.log")[0][0]["figures"]
    assert (figures["minimum_step"], figures["minimum_loss"]) == (2100, 2.9)
    assert figures["last_loss"] == pytest.approx(3.85)
