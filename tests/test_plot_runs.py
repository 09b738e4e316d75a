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

from config import InputError

SCRIPT = Path(__file__).resolve().parent.parent / "plot_runs.py"
SETTINGS = {
    "lr": 2e-4,
    "masks": ["short", "long"],
    "run_name": "wide",
    "resume": None,
    "checkpoints": "checkpoints",
    "run_logs": "run_logs",
    "warmup": None,
}


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
    (the JSON's content, the script's globals).
    """

    def plot(*argv):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            sys,
            "argv",
            ["plot_runs.py", *map(str, argv)]
            + [
                word
                for flag, value in (("--json", "runs.json"), ("--out", "none"))
                if flag not in argv
                for word in (flag, value)
            ],
        )
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        scope = runpy.run_path(str(SCRIPT), run_name="__main__")
        return (
            json.loads(
                (tmp_path / "runs.json").read_text(),
                parse_constant=lambda token: pytest.fail(f"{token} is no JSON"),
            ),
            scope,
        )

    return plot


def losses_of(count, seed=0):
    """float [count]: a falling loss with correlated noise, of every step."""
    noise = np.random.default_rng(seed).normal(size=count)
    for i in range(1, count):
        noise[i] += 0.5 * noise[i - 1]
    return 2 + 8 * np.exp(-np.arange(count) / 300) + 0.05 * noise


def write_run(
    folder,
    name,
    losses,
    settings=SETTINGS,
    every=20,
    epoch=333,
    start=0,
    resumed_from=None,
    end="finished",
    held_out=500,
    log=True,
    metrics=True,
):
    """The files of a run as train.py leaves them.

    losses float [M], nan for a skipped step; start: the step it was resumed at, whose metrics it
    begins with.
    """
    lines, rows, previous = (
        [f"run {name}: train.py", f"settings {json.dumps(settings)}", "salt_ops: built for cpu"],
        [],
        0,
    )
    lines += [f"resumed {resumed_from} at step {start}"] if resumed_from else []
    for step in range(1, len(losses) + 1):
        if step % every == 0 or step % epoch == 0 or step == len(losses):
            part, skipped = losses[previous:step], int(np.isnan(losses[:step]).sum())
            loss = float(np.nanmean(part)) if np.isfinite(part).any() else math.nan
            rate, wait = (5.0 if not previous else 100 + step % 7), 0.01
            rows.append(
                {
                    "step": step,
                    "epoch": step / epoch,
                    "loss": loss,
                    "r2": 0.5,
                    "skipped": skipped,
                    "clips_per_s": rate,
                    "data_wait": wait,
                }
            )
            if step > start:
                lines.append(
                    f"step {step}/{len(losses)} epoch {step / epoch:.2f} loss {loss:.5f} R2 0.5000"
                    f" lr 2.00e-04 wd 0.040 grad 0.3 clipped 0% {rate:.2f} clips/s MFU 15% waiting"
                    f" {wait:.0%}{f' skipped {skipped}' if skipped else ''} left 0:01:30"
                )
            previous = step
        if held_out and step % held_out == 0:
            r2 = 0.6 - abs(step - 1500) / 1e4
            rows.append({"step": step, "val_r2": r2, "val_mse": 0.3, "val_r2_background": 0.41})
            if step > start:
                lines.append(
                    f"step {step} held-out R2 {r2:.4f} mse 0.30000 (mean of the clip's own context:"
                    " R2 0.4100)"
                )
    if end:
        least = int(np.nanargmin(losses))
        lines += [
            f"minimum loss {losses[least]:.6f} at step {least + 1} of {len(losses)}",
            f"epoch 1: average loss {losses[:epoch].mean():.6f} over {epoch} steps",
            f"average loss of the last 2000 steps: {np.nanmean(losses[-2000:]):.6f}",
            f"status: {end}",
            "Process exiting.",
        ]
    if log:
        (folder / "run_logs").mkdir(exist_ok=True)
        (folder / "run_logs" / f"{name}.log").write_text("\n".join(lines) + "\n")
    if metrics:
        (folder / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return rows


RUN = "wide_20260102_030405_pid9999999"


def test_a_runs_numbers(tmp_path, plot):
    losses = losses_of(4000)
    rows = write_run(tmp_path, RUN, losses)
    content, _ = plot(RUN)
    (run,) = content["runs"]
    assert (run["run"], run["status"], run["step"], run["total_steps"], content["differences"]) == (
        RUN,
        "finished",
        4000,
        4000,
        {},
    )
    assert run["minimum"] == {
        "loss": round(losses.min(), 6),
        "step": losses.argmin() + 1,
        "over": "every step",
    }
    # lines end at step 2000, and at 1998 too
    assert run["last"]["mean"] == pytest.approx(losses[2000:].mean(), rel=1e-12)
    assert (
        run["last"]["steps"] == 2000
        and run["last"]["ci95"][0] < run["last"]["mean"] < run["last"]["ci95"][1]
    )
    assert run["held_out"] == {
        "best": 0.6,
        "best_step": 1500,
        "last": 0.35,
        "last_step": 4000,
        "background": 0.41,
    }
    # without the first, the warm-up
    rates = [row["clips_per_s"] for row in rows if "loss" in row][1:]
    assert run["throughput"] == {
        "clips_per_s": np.median(rates),
        "quartiles": list(np.percentile(rates, [25, 75])),
        "data_wait": 0.01,
    }


def test_a_hole_in_the_lines_is_said_and_stands_for_nothing(tmp_path, plot):
    losses = np.concatenate([np.full(1000, 9.0), np.full(1000, 1.0)])
    write_run(tmp_path, RUN, losses)
    path = tmp_path / "checkpoints" / RUN / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows if not 200 < row["step"] <= 1500)
    )
    run = plot(RUN)[0]["runs"][0]
    assert any(note.startswith("it has no line between step 200 and 15") for note in run["notes"])
    assert run["last"]["steps"] < 800  # those that lines speak of


@pytest.mark.parametrize(
    "spacings", [[1] * 1000 + [50] * 20, [20, 13, 7, 20, 6, 14, 1, 18, 2, 17, 3] * 10]
)
def test_lines_of_another_spacing_are_no_hole(tmp_path, plot, spacings):
    """--log_every raised on resume; ends of epochs between lines."""
    steps = np.cumsum(spacings)
    lines = [f"step {step} loss {9 - 4 * step / steps[-1]:.6f}" for step in steps]
    (tmp_path / "x.log").write_text("\n".join(lines) + "\n")
    run = plot("x.log")[0]["runs"][0]
    assert not any("has no line" in note for note in run["notes"]) and run["last"]["steps"] == min(
        2000, steps[-1]
    )


def test_r2_of_other_clips_or_targets_is_said_not_to_compare(tmp_path, plot, capsys):
    for number, more in enumerate(({"target_norm": "none"}, {"target_norm": "layer_norm"})):
        write_run(
            tmp_path,
            f"r{number}_20260102_030405_pid{number}",
            losses_of(1000),
            settings={**SETTINGS, **more},
        )
    plot("r0", "r1")
    assert (
        "held-out R2 of these runs is of other clips, masks or targets, or measured from another"
        " mean (target_norm)" in capsys.readouterr().out
    )
    plot("r0", "r0")
    assert "held-out R2 of these" not in capsys.readouterr().out


def test_metrics_that_were_cut_are_said(tmp_path, plot):
    write_run(tmp_path, RUN, losses_of(4000))
    path = tmp_path / "checkpoints" / RUN / "metrics.jsonl"
    assert plot(RUN)[0]["runs"][0]["notes"] == []
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    run = plot(RUN)[0]["runs"][0]
    assert (
        run["notes"]
        == [f"its lines end at step {run['step']} of 4000: the file was cut or replaced"]
        and run["step"] < 4000
    )


def test_interval_is_that_of_twenty_batch_means(tmp_path, plot):
    losses = losses_of(3000)
    write_run(tmp_path, RUN, losses, epoch=10**9)
    means = losses[1000:].reshape(20, 100).mean(1)
    run = plot(RUN)[0]["runs"][0]
    assert run["last"]["ci95"] == pytest.approx(
        stats.t.interval(0.95, 19, means.mean(), stats.sem(means)), rel=1e-9
    )


def test_interval_covers_the_mean_of_correlated_losses(tmp_path, plot):
    write_run(tmp_path, RUN, losses_of(40))
    end_of = plot(RUN)[1]["end_of"]
    rng, steps, covered, naive = np.random.default_rng(1), np.arange(20, 4001, 20), 0, 0
    for _ in range(400):
        series = rng.normal(size=300)
        for i in range(1, 300):
            series[i] += 0.5 * series[i - 1]
        series = series[100:]  # stationary, of mean 0
        low, high = end_of(steps, series, np.full(200, 20))["ci95"]
        covered += low < 0 < high
        naive += abs(series[100:].mean()) < stats.t.ppf(0.975, 99) * stats.sem(series[100:])
    assert 0.86 * 400 < covered < 0.97 * 400 and naive < 0.78 * 400


@pytest.mark.parametrize(
    "given", ["folder", "log", "metrics", "name", "run_name", "folder elsewhere", "log elsewhere"]
)
def test_every_way_to_name_a_run(tmp_path, plot, given):
    losses = losses_of(1000)
    home = tmp_path / "far" if "elsewhere" in given else tmp_path
    home.mkdir(exist_ok=True)
    write_run(home, RUN, losses)
    write_run(home, "wide_20260101_235959_pid9999998", losses + 1)  # older
    write_run(home, "wide_too_20260109_235959_pid9999998", losses + 1)  # of another name
    word = {
        "folder": home / "checkpoints" / RUN,
        "log": home / "run_logs" / f"{RUN}.log",
        "metrics": home / "checkpoints" / RUN / "metrics.jsonl",
        "name": RUN,
        "run_name": "wide",
    }[given.split()[0]]
    run = plot(word)[0]["runs"][0]
    assert (
        run["run"] == RUN
        and run["minimum"]["loss"] == round(losses.min(), 6)
        and run["source"].endswith("metrics.jsonl")
        and run["settings"] == SETTINGS
    )
    assert run["notes"] == (
        ["of 2 runs named wide that with the latest date"] if given == "run_name" else []
    )


def test_log_alone_and_metrics_alone(tmp_path, plot):
    losses = losses_of(3000)
    write_run(tmp_path, "a_20260102_030405_pid1", losses, log=False)
    write_run(tmp_path, "b_20260102_030405_pid1", losses, metrics=False)
    bare, log = plot("a", "b")[0]["runs"]
    # the least line is one of 20 steps, or shorter at an epoch's end
    means = [losses[start : start + 20].mean() for start in range(0, 3000, 20)]
    assert (
        bare["minimum"]["loss"] <= min(means)
        and bare["minimum"]["over"].startswith("means of")
        and bare["status"] is bare["settings"] is None
    )
    assert "no log of it" in bare["notes"][0]
    assert log["minimum"]["over"] == "every step" and log["status"] == "finished"
    assert log["last"]["mean"] == pytest.approx(bare["last"]["mean"], abs=1e-5) and log["last"][
        "mean"
    ] == pytest.approx(losses[1000:].mean(), abs=1e-5)
    assert log["throughput"] == bare["throughput"]
    assert log["held_out"] == pytest.approx(bare["held_out"], abs=1e-4)


def test_a_killed_run_with_a_torn_last_line(tmp_path, plot):
    losses = losses_of(1000)
    write_run(tmp_path, RUN, losses, end=None)
    path = tmp_path / "checkpoints" / RUN / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 1010, "epoch": 3.0, "lo')
    log = tmp_path / "run_logs" / f"{RUN}.log"
    log.write_text(log.read_text() + "step 1010/2000 epo")
    run = plot(RUN)[0]["runs"][0]
    means = [
        (losses[a:b].mean(), b) for a, b in zip([0, *range(20, 1000, 20)], range(20, 1001, 20))
    ]
    assert (run["status"], run["step"], run["notes"]) == (
        "killed",
        1000,
        ["1 torn or damaged line left out"],
    )
    assert run["minimum"]["over"] == "means of 20" and run["minimum"]["loss"] <= min(means)[0]
    assert run["last"]["steps"] == 1000 and run["last"]["mean"] == pytest.approx(
        losses.mean(), rel=1e-12
    )


def test_skipped_steps_carry_no_weight(tmp_path, plot):
    losses = losses_of(3000)
    losses[1500:1507] = math.nan
    losses[2000:2040] = math.nan  # two whole lines, NaN tokens in metrics.jsonl
    write_run(tmp_path, "a_20260102_030405_pid1", losses)
    write_run(tmp_path, "b_20260102_030405_pid1", losses, metrics=False)
    path = tmp_path / "checkpoints" / "a_20260102_030405_pid1" / "metrics.jsonl"
    assert path.read_text().count("NaN") == 2
    for rows in (path.read_text(), path.read_text().replace("NaN", "null")):
        path.write_text(rows)
        content, _ = plot("a", "b")
        for run in content["runs"]:
            assert (
                run["skipped"] == 47
                and run["last"]["steps"] == 2000 - 47
                and "2 logged losses not finite, left out" in run["notes"]
            )
            assert run["last"]["mean"] == pytest.approx(
                np.nanmean(losses[1000:]), abs=1e-5 if run["metrics"] is None else 1e-12
            )


def test_a_resumed_run(tmp_path, plot):
    losses = losses_of(3000)
    write_run(tmp_path, RUN, losses[:1500], end=None)
    name = "wide_20260103_030405_pid9999997"
    write_run(tmp_path, name, losses, start=1500, resumed_from=f"checkpoints/{RUN}/last.pth")
    content, _ = plot(f"run_logs/{name}.log", RUN)
    run, killed = content["runs"]
    assert (
        run["resumed"] == {"from": f"checkpoints/{RUN}/last.pth", "step": 1500}
        and killed["resumed"] is None
        and killed["status"] == "killed"
    )
    assert run["last"]["mean"] == pytest.approx(losses[1000:].mean(), rel=1e-12)
    (tmp_path / "checkpoints" / name / "metrics.jsonl").unlink()
    # now of the log, whose first line stands for the steps since it was resumed
    run = plot(f"run_logs/{name}.log")[0]["runs"][0]
    assert run["last"]["steps"] == 1500 and run["last"]["mean"] == pytest.approx(
        losses[1500:].mean(), abs=1e-5
    )


OLD = """loading 168903 videos, 4 steps of warm-up
step 20 loss 12.5
[epoch 1] step: 40, loss: 11.35, lr 3e-4
Step 60/100 loss=9.71
INFO global_step=80,train_loss=nan, grad 3
step 80 val_loss 3.0
step 80 validation loss 2.0
average loss of the last 40 steps: 0.5, at step 100 of 100
step 1,00 loss 0.1
step 100 | time 3.2 s | loss 1.0e+01 | 31.9 clips/s
step 120 loss 9.x
step 120 loss 10.5abc
step 1,120 - loss: 9.8.
step 11"""


def test_an_old_log(tmp_path, plot):
    (tmp_path / "old.log").write_text(OLD)
    content, scope = plot("old.log", "--out", "old.png")
    (run,) = content["runs"]
    x, y = scope["axes"]["loss"].lines[0].get_data()
    assert (
        list(x) == [20, 40, 60, 80, 100, 1120]
        and list(y[:3]) == [12.5, 11.35, 9.71]
        and math.isnan(y[3])
        and list(y[4:]) == [10.0, 9.8]
    )
    assert (
        run["minimum"] == {"loss": 9.71, "step": 60, "over": "one in 20"}
        and run["status"] is None
        and run["settings"] is None
    )
    assert run["last"]["ci95"] is None and run["throughput"]["clips_per_s"] == 31.9
    assert run["notes"] == [
        "a log without a line of settings",
        "it has no line between step 100 and 1120",
        "1 logged loss not finite, left out",
    ]


def test_every_line_of_an_old_log_weighs_alike(tmp_path, plot):
    losses = losses_of(200)
    (tmp_path / "old.txt").write_text(
        "".join(f"step {10 * i + 69_000} loss {loss:.6f}\n" for i, loss in enumerate(losses))
    )
    run = plot("old.txt")[0]["runs"][0]
    assert (
        run["last"]["mean"] == pytest.approx(losses.mean(), abs=1e-6)
        and run["last"]["steps"] == 2000
    )


def test_steps_that_fall_back(tmp_path, plot):
    (tmp_path / "again.log").write_text(
        "".join(
            f"step {step} loss {loss}\n"
            for step, loss in [(10, 5), (20, 4), (30, 1), (20, 3), (30, 2), (40, 1.5)]
        )
    )
    (tmp_path / "epochs.log").write_text(
        "".join(
            f"[epoch {epoch}] step: {step}, loss: {loss}\n"
            for epoch, step, loss in [(1, 10, 5), (1, 20, 4), (2, 10, 3), (2, 20, 2), (3, 10, 1)]
        )
    )
    content, scope = plot("again.log", "epochs.log", "--out", "x.svg")
    lines = scope["axes"]["loss"].lines
    assert [list(map(float, data)) for data in lines[0].get_data()] == [
        [10, 20, 30, 40],
        [5, 3, 2, 1.5],
    ]
    assert list(lines[3].get_xdata()) == [10, 20, 30, 40, 50]
    again, epochs = content["runs"]
    assert again["notes"][1:] == ["2 lines logged again later are left out"] and epochs["notes"][
        1:
    ] == ["steps start again with each epoch and are counted on"]
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_differences_are_those_of_settings_only(tmp_path, plot):
    write_run(
        tmp_path,
        "a_20260102_030405_pid1",
        losses_of(100),
        SETTINGS | {"run_name": "a", "lr": 1e-3, "deep": {"x": 1}},
    )
    write_run(
        tmp_path,
        "b_20260102_030405_pid1",
        losses_of(100),
        SETTINGS | {"run_name": "b", "resume": "auto", "warmup": 5, "new": None, "deep": {"x": 1}},
    )
    (tmp_path / "old.log").write_text(OLD)
    a, b = "a_20260102_030405_pid1", "b_20260102_030405_pid1"
    content, _ = plot("a", "old.log", "b")
    assert content["differences"] == {
        "lr": {a: 1e-3, b: 2e-4},
        "warmup": {a: None, b: 5},
        "new": {b: None},
    }


def test_a_run_given_twice_is_there_once_and_equal_names_stay_apart(tmp_path, plot):
    write_run(tmp_path, RUN, losses_of(100))
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.log").write_text(OLD)
    runs = plot("wide", f"run_logs/{RUN}.log", f"checkpoints/{RUN}/", "x/train.log", "y/train.log")[
        0
    ]["runs"]
    assert [run["run"] for run in runs] == [RUN, "x/train.log", "y/train.log"]


def test_no_finite_loss_and_few_lines(tmp_path, plot):
    (tmp_path / "nan.log").write_text("step 1 loss nan\nstep 2 loss inf\n")
    (tmp_path / "one.log").write_text("step 7 loss 3\n")
    content, _ = plot("nan.log", "one.log", "--out", "few.pdf")
    lost, one = content["runs"]
    assert lost["minimum"] is lost["last"] is None and one["last"] == {
        "mean": 3.0,
        "ci95": None,
        "steps": 7,
        "lines": 1,
    }
    assert (tmp_path / "few.pdf").read_bytes().startswith(b"%PDF")


def test_from_the_shell(tmp_path):
    import matplotlib.image

    long = "a_very_long_name_of_a_run_with_everything_in_it"
    for i in range(6):
        write_run(
            tmp_path,
            f"{long}_lr{i}_20260102_03040{i}_pid1",
            losses_of(3000, i) + i,
            SETTINGS | {"lr": i / 1000, "cache": f"/some/long/folder/of/caches/number_{i}"},
        )
    done = shell(tmp_path, *sorted((tmp_path / "checkpoints").iterdir()), "--json=sub/runs.json")
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.split("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 100 and table[0].split() == [f"lr{i}" for i in range(6)]
    lines = {line[:25].strip(): line.split() for line in table}
    assert lines["status"] == ["status"] + ["finished"] * 6 and list(
        map(float, lines["lr"][1:])
    ) == [i / 1000 for i in range(6)]
    assert [float(value) for value in lines["minimum loss"][2:]] == pytest.approx(
        [losses_of(3000, i).min() + i for i in range(6)], rel=1e-4
    )
    assert (
        lines["cache"][1:] == [f"number_{i}" for i in range(6)]
        and "resume" not in lines
        and "warmup" not in lines
    )
    assert len(json.loads((tmp_path / "sub" / "runs.json").read_text())["runs"]) == 6
    picture = matplotlib.image.imread(tmp_path / "runs.png")[..., :3]  # [H, W, 3]
    for colour in ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b"):
        drawn = (
            np.abs(picture - np.frombuffer(bytes.fromhex(colour), np.uint8) / 255).max(-1) < 0.02
        )
        assert drawn.sum() > 500 and np.ptp(drawn.nonzero()[1]) > 0.3 * picture.shape[1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


def test_the_curves_in_the_picture(tmp_path, plot):
    losses = losses_of(4000)
    rows = [row for row in write_run(tmp_path, "a_20260102_030405_pid1", losses, epoch=10**9)]
    write_run(
        tmp_path,
        "b_20260102_030405_pid1",
        losses[:2000] + 1,
        every=10,
        epoch=10**9,
        start=500,
        resumed_from="a/last.pth",
    )
    axes = plot("a", "b", "--out", "ab.png")[1]["axes"]
    raw, smooth, least = (line.get_data() for line in axes["loss"].lines[:3])
    logged = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row])
    assert np.array_equal(np.transpose(raw), logged) and least[0][0] == losses.argmin() + 1
    for i in (50, 120, 199):  # at least five lines: two to either side
        near = np.abs(logged[:, 0] - logged[i, 0]) <= 40
        assert smooth[1][i] == pytest.approx(logged[near, 1].mean(), rel=1e-9)
    assert smooth[1][0] == logged[0, 1]
    at, r2 = axes["R2"].lines[0].get_data()
    assert list(at) == list(range(500, 4001, 500)) and list(r2) == [
        row["val_r2"] for row in rows if "val_r2" in row
    ]
    assert {
        line.get_ydata()[0]
        for line in axes["R2"].lines
        if line.get_linestyle() == ":" and line.get_xdata()[0] == 0
    } >= {0.41}
    assert axes["loss"].get_yscale() == "log" and 500 in [
        line.get_xdata()[0] for line in axes["rate"].lines
    ]


def test_names_are_shortened_as_far_as_they_differ(tmp_path, plot):
    (tmp_path / "one.log").write_text("step 7 loss 3\n")
    shortened = plot("one.log")[1]["shortened"]
    stamp = "_20260102_030405_pid1"
    for names, short in (
        (["wide" + stamp], ["wide"]),
        (["wide" + stamp, "deep" + stamp], ["wide", "deep"]),
        (["s_lr1" + stamp, "s_lr2" + stamp, "old"], ["s_lr1", "s_lr2", "old"]),
        (["s" + stamp, "s_20260102_040405_pid2"], ["030405", "040405"]),
        (["s" + stamp, "s_20260103_030405_pid1"], ["20260102", "20260103"]),
        (["s" + stamp, "s_20260102_030405_pid2"], ["pid1", "pid2"]),
        (["s", "s" + stamp], ["s", "s_20260102"]),
        (["a/x.log", "b/x.log"], ["a/x.log", "b/x.log"]),
    ):
        assert shortened(names) == short


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give one or more runs"),
        (["widee"], "no log, folder or run widee; did you mean wide"),
        (["run_logs/wide_20260102_030405_pid999999.log"], "did you mean run_logs/" + RUN),
        (["zzz"], "runs are looked up in checkpoints and run_logs"),
        (["empty.log"], "holds no logged step"),
        (["notes.txt"], "notes.txt holds no logged step"),
        (["checkpoints"], "is a folder of runs; give checkpoints/"),
        (["nothing"], "the folder nothing holds no run"),
        (["binary.pth"], "is not text"),
        (["checkpoints/begun"], "holds no logged step"),
        (["wide", "zzz"], "no log, folder or run zzz"),
        (["pipe"], "neither a file nor a folder"),
        (["wide", "--out", "x.jpeg2"], "ends in .png, .pdf or .svg"),
        (["wide", "--out", "nothing"], "--out nothing is a folder"),
        (["wide", "--seed", "3"], "unknown flag --seed"),
        (["wide", "--json", f"checkpoints/{RUN}/metrics.jsonl"], "one of the files to read"),
        (["wide", "--run_log", "x"], "did you mean --run_logs"),
        (["wide", "--out", "notes.txt/x.png"], "cannot be made"),
        (["json.jsonl"], "holds no logged step"),
    ],
)
def test_wrong_inputs(tmp_path, plot, argv, message):
    write_run(tmp_path, RUN, losses_of(100))
    (tmp_path / "empty.log").write_text("")
    (tmp_path / "notes.txt").write_text("a step forward is no loss\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "checkpoints" / "begun").mkdir()
    (tmp_path / "checkpoints" / "begun" / "metrics.jsonl").write_text(
        '{"step": 0, "val_r2": 0.1}\n[]\n3\n{"step": 1e400, "loss": 1}\n'
    )
    (tmp_path / "binary.pth").write_bytes(b"PK\3\4\0\0step 3 loss 5\n")
    (tmp_path / "json.jsonl").write_text('{"a": 1}\nnull\n')
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        plot(*argv)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_wrong_input_is_one_line_and_help_names_the_words(tmp_path):
    (tmp_path / "old.log").write_text(OLD)
    wrong = shell(tmp_path, "old.log", "odl.log")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (
        1,
        "",
        "plot_runs.py: error: there is no log, folder or run odl.log; did you mean old.log?\n",
    )
    assert not (tmp_path / "runs.png").exists()
    shown = shell(tmp_path, "--help")
    assert (
        shown.returncode == 0
        and "python plot_runs.py RUNS [...] [--name value ...]" in shown.stdout
        and "runs.png" in shown.stdout
    )


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "mine.log"
    path.write_text(OLD)
    path.chmod(0)
    if os.geteuid() == 0:  # root reads everything: a file that fails to read is another kind
        done = shell(tmp_path, "/proc/self/mem", "--out", "none")
    else:
        done = shell(tmp_path, path, "--out", "none")
    assert (
        done.returncode == 1
        and "cannot be read" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_settings_are_those_that_were_in_force(tmp_path, plot):
    for name in ("a", "b"):
        write_run(
            tmp_path,
            f"{name}_20260102_030405_pid1",
            losses_of(100),
            SETTINGS | {"frames": 16 if name == "a" else None, "run_name": name},
        )
        path = tmp_path / "run_logs" / f"{name}_20260102_030405_pid1.log"
        lines = path.read_text().splitlines()
        path.write_text(
            "\n".join([*lines[:3], 'in force {"frames": 4, "warmup": 10}', *lines[3:]]) + "\n"
        )
    content = plot("a", "b")[0]
    assert content["differences"] == {} and content["runs"][0]["settings"]["frames"] == 4


def test_all_of_a_curve_and_its_background_are_in_the_picture(tmp_path, plot):
    rows = write_run(tmp_path, RUN, losses_of(2000))
    for lowest in (-9.0, -0.6, 0.3):
        held_out = [
            {"step": step, "val_r2": value, "val_mse": 1.0, "val_r2_background": lowest + 0.1}
            for step, value in ((500, lowest), (1000, 0.2), (1500, 0.5))
        ]
        text = "".join(
            json.dumps(row) + "\n" for row in [row for row in rows if "loss" in row] + held_out
        )
        (tmp_path / "checkpoints" / RUN / "metrics.jsonl").write_text(text)
        low, high = plot(RUN, "--out", "p.png")[1]["axes"]["R2"].get_ylim()
        assert low < lowest and high > 0.5


def test_a_start_that_was_refused_does_not_hide_the_run(tmp_path, plot):
    """Its log names the folder; the run's latest start is the one that its folder lists."""
    write_run(tmp_path, RUN, losses_of(300))
    (tmp_path / "checkpoints" / RUN / "starts.jsonl").write_text(
        json.dumps({"log": f"../../run_logs/{RUN}.log"}) + "\n"
    )
    later = tmp_path / "run_logs" / "wide_20260105_030405_pid1.log"
    later.write_text(
        f"start x\nsettings {{}}\nfolder checkpoints/{RUN}\nerror: no\nstatus: failed\nProcess"
        " exiting.\n"
    )
    run = plot("wide")[0]["runs"][0]
    assert run["status"] == "finished" and run["run"] == RUN


def test_a_row_may_hold_a_training_loss_and_a_held_out_figure(tmp_path, plot):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "step": step,
                    "loss": 10 - step / 100,
                    **({"val_r2": 0.5} if step % 100 == 0 else {}),
                }
            )
            + "\n"
            for step in range(10, 501, 10)
        )
    )
    run = plot("metrics.jsonl")[0]["runs"][0]
    assert run["minimum"]["step"] == 500 and run["minimum"]["loss"] == 5.0


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
    (tmp_path / "x.log").write_text("\n".join(rows))
    run = plot("x.log")[0]["runs"][0]
    assert (
        run["minimum"]["step"] == 2000
        and run["minimum"]["loss"] == 3.0
        and run["last"]["mean"] == pytest.approx(3.95)
    )
