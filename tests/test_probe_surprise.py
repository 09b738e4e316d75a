"""Surprise: pairs, windows and masks; known answers of predictors that know all and nothing; and
the script from end to end.
"""

import json

import numpy as np
import pytest
import torch

from salt import surprise
from salt.errors import InputError, VideoError
from salt.loader import Batch
from salt.masks import FAMILIES
from salt.ops import patchify
from salt.score import Space
from salt.surprise import FUTURE, LAWS, Pair
from salt.views import View, frame_numbers
from tests.stages import error_of, run
from tests.test_data import write_video

GRID = (4, 3, 3)
FILES = ("videos/a.webm", "videos/b.webm")


def pair_of(name="0", event="vanish", at=10, reveal=10, occluded=False, control=False):
    return Pair(name, *FILES, event, at, reveal, occluded, control)


# ---- windows
@pytest.mark.parametrize("sampling", ["uniform", "stride"])
def test_half_of_a_clips_frames_are_before_the_event(sampling):
    for frames in (2, 4, 16):
        for n in (2, 3, 7, 24, 35, 60):
            for at in range(1, n):
                window = surprise.window_about(pair_of(at=at), n)
                view = View(frames=frames, sampling=sampling, stride=2, window=window)
                numbers = frame_numbers(n, view)
                assert (numbers[: frames // 2] < at).all() and (numbers[frames // 2 :] >= at).all()
                if sampling == "uniform" and min(at, n - at) >= frames:  # as wide as it can be
                    assert numbers[-1] - numbers[0] >= 2 * min(at, n - at) * (1 - 1 / frames) - 1


def test_a_pair_with_no_such_window_is_left_out():
    with pytest.raises(VideoError, match="none of 10 on either side"):
        surprise.window_about(pair_of(at=10), 10)
    behind = pair_of(at=20, reveal=30, occluded=True)
    assert surprise.window_about(behind, 60) == (0.25 / 60, 59.75 / 60)
    with pytest.raises(VideoError, match="starts only at 22"):
        surprise.window_about(behind, 38)


# ---- masks
def test_the_future_is_the_second_half_of_each_clip():
    masks = surprise.future_masks(2, (5, 2, 3), "long")
    assert masks.family == "long"
    for context, target in zip(masks.context, masks.target):
        assert context.tolist() == list(range(12)) and target.tolist() == list(range(12, 30))
    assert FUTURE not in FAMILIES
    with pytest.raises(InputError, match="no future"):
        surprise.future_masks(2, (1, 2, 3), "long")


def test_twins_get_the_same_masks_and_other_pairs_and_draws_others():
    passes = surprise.draw_passes(["a", "b"], ["short", "long"], 3, 0, (4, 6, 6))
    assert [kinds for _, kinds in passes] == [["short", "long"]] * 3 + [[FUTURE] * 2]
    assert [drawn.family for drawn in passes[-1][0]] == ["short", "long"]
    for masks, _ in passes[:-1]:
        for drawn in masks:
            target = drawn.target
            assert torch.equal(target[0], target[1]) and torch.equal(target[2], target[3])
            assert not torch.equal(target[0], target[2])
    assert not torch.equal(passes[0][0][0].target, passes[1][0][0].target)


# ---- known answers
def batch_of(count):
    """A Batch of twins whose latents part half-way, and Space and targets."""
    torch.manual_seed(0)
    latents = torch.randn(2 * count, 36, 16)
    latents[1::2, :18] = latents[::2, :18]
    pixels = torch.randint(0, 256, (2 * count, 8, 6, 6, 3), dtype=torch.uint8)
    patches = patchify(pixels, 2, 2).contiguous()
    return Batch(torch.zeros(2 * count), patches, latents, [])


def measured(salt, batch, count, families=("short",)):
    space = Space("latents", "none", None, None, torch.zeros(36, 16))
    predictors = {
        "student": surprise.network(salt, space),
        "mean of context": surprise.mean_of_context(space),
        "mean of position": surprise.mean_of_position(space),
        "frame difference": surprise.frame_difference(GRID, 2),
    }
    names = [str(i) for i in range(count)]
    passes = surprise.draw_passes(names, list(families), 2, 0, GRID)
    return surprise.join([surprise.measure(predictors, batch, passes, GRID[0])]), passes


def answers(batch, noise):
    """A Salt that knows what the possible twin's latents are, up to noise, whatever it is shown."""

    def salt(patches, masks):
        truth = batch.latents[::2].repeat_interleave(2, 0) if noise < 1 else batch.latents * 0
        guess = truth + noise * torch.randn(truth.shape)
        return {
            drawn.family: guess.gather(1, drawn.target[..., None].expand(-1, -1, 16))
            for drawn in masks
        }

    return salt


def test_what_knows_the_possible_twin_wins_all_and_what_knows_nothing_half():
    count = 100
    batch = batch_of(count)
    pairs = [pair_of(str(i), occluded=i % 2 == 0) for i in range(count)]
    groups = surprise.groups_of(pairs)
    for noise, low, high in ((0.1, 1, 1), (1, 0.35, 0.65)):
        found, _ = measured(answers(batch, noise), batch, count)
        shares = surprise.shares(found, groups)
        for kind in ("short", FUTURE):
            share = shares["student"][kind][LAWS]
            assert low <= share.value <= high
            if noise < 1:
                assert share.excess > 1.5 and share.interval() is None  # all alike
                assert share.minus(shares["mean of position"][kind][LAWS])[1][0] > 0.2
            else:
                assert share.interval()[0] < 0.5 < share.interval()[1]
        for control in ("mean of context", "mean of position", "frame difference"):
            assert 0.3 < shares[control][FUTURE][LAWS].value < 0.7
        assert {len(shares["student"][FUTURE][g].columns[0]) for g in groups} == {50, 100}


def test_errors_by_slice_are_those_of_plain_arithmetic():
    """Of controls, under `future` and under drawn masks, clip by clip."""
    batch = batch_of(3)
    found, passes = measured(answers(batch, 0.1), batch, 3)
    pixels = batch.patches.float().reshape(6, 4, 9, 3, 2, 4) / 255  # time, place, colour, dt, pixel
    frames = pixels.permute(0, 1, 4, 2, 3, 5).reshape(6, 8, 9, 12)
    steps = torch.zeros(6, 8, 9)
    steps[:, 1:] = (frames[:, 1:] - frames[:, :-1]).square().mean(-1)
    steps = steps.reshape(6, 4, 2, 9).mean(2).reshape(6, 36)
    for kind in ("short", FUTURE):
        chosen = [masks[0] for masks, kinds in passes if kinds[0] == kind]
        for clip in range(6):
            errors = {"mean of context": [], "mean of position": [], "frame difference": []}
            for drawn in chosen:
                y, target = batch.latents[clip], drawn.target[clip]
                mean = y[drawn.context[clip]].mean(0)
                errors["mean of context"] += (y[target] - mean).square().mean(1).tolist()
                errors["mean of position"] += y[target].square().mean(1).tolist()
                errors["frame difference"] += steps[clip, target].tolist()
            for name, values in errors.items():
                sums = found[name][kind]
                got = surprise.surprise_of(sums)[clip // 2, clip % 2]
                np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)
                assert sums[1, clip // 2, clip % 2].sum() == len(values)
    counts = found["mean of position"][FUTURE][1]
    assert (counts[..., :2] == 0).all() and (counts[..., 2:] == 9).all()


def test_ties_count_half_and_controls_stand_apart():
    wins, excess = surprise.wins_of([[1, 3], [3, 1], [2, 2], [0, 0], [1, 1 + 1e-9]])
    assert wins.tolist() == [1, 0, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(excess[:4], [1, -1, 0, 0])
    pairs = [pair_of("0"), pair_of("1", "colour", control=True), pair_of("2", occluded=True)]
    groups = {name: list(chosen) for name, chosen in surprise.groups_of(pairs).items()}
    assert groups == {
        LAWS: [True, False, True],
        "in the open": [True, False, False],
        "behind a panel": [False, False, True],
        "vanish": [True, False, True],
        "control: colour": [False, True, False],
    }
    found = {f"untrained {i}": {FUTURE: np.ones((2, 1, 2, 1))} for i in range(2)}
    found["untrained 1"][FUTURE][0, 0, 1] = 3
    made = surprise.shares(found, {LAWS: np.array([True])})
    assert made["untrained, mean of 2"][FUTURE][LAWS].value == 0.75


def test_a_broken_network_is_refused():
    batch = batch_of(1)
    with pytest.raises(InputError, match="errors of student are not finite"):
        measured(answers(batch, float("nan")), batch, 1)


# ---- the script
def moving(random, frames, at=None):
    """A square that crosses a noisy frame, and from frame `at` on is gone."""
    ground = random.integers(0, 90, (48, 64, 3), dtype=np.uint8)
    video = np.stack([ground] * frames)
    for i, frame in enumerate(video[:at]):
        frame[20:30, 2 * i : 2 * i + 10] = 230
    return list(video)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    (folder / "videos").mkdir()
    rows = []
    for i in range(5):
        row = {"id": str(i), "event": "vanish", "event_frame": 10, "reveal_frame": 10 + i % 2}
        row |= {"occluded": i % 2 == 1, "control": False, "body": "a ball"}
        if i == 3:
            row |= {"event": "colour", "control": True}
        for side, at in (("possible", None), ("impossible", 10)):
            row[side] = f"videos/{i}_{side}.webm"
            write_video(folder / row[side], moving(np.random.default_rng(i), 22, at))
        rows.append(row)
    (folder / "videos" / "4_possible.webm").write_bytes(b"no video")
    (folder / "twins.json").write_text(json.dumps(rows))
    return folder


def test_the_script_of_pixels_and_of_latents(world, twins, tmp_path):
    """A checkpoint of each stage; what it prints, and the files beside --out."""
    few = ["--data", twins, "--draws", 2, "--untrained_seeds", 2, "--dtype", "fp32"]
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    student = next(world.glob("checkpoints/student_*/best.pth"))
    said = run(tmp_path, "probe_surprise", "--checkpoint", teacher, "--out", "a.json", *few)
    assert "surprise of 4 pairs, 1 left out; space: pixels" in said
    assert "untrained, mean of 2" in said and "future: student" in said and "ratio, all" in said
    content = json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.png").stat().st_size > 1000 and "4_possible" in content["failures"][0]
    assert [row["id"] for row in content["pairs"]] == ["0", "1", "2", "3"]
    assert [row["window"] for row in content["pairs"][:2]] == [
        [0.25 / 22, 19.75 / 22],
        [0.25 / 22, 21.75 / 22],
    ]
    of_student = content["shares"]["student"]["future"]
    wins = [np.subtract(*row["surprise"]["student"]["future"]) < 0 for row in content["pairs"][:3]]
    assert of_student["all"]["share"] == pytest.approx(np.mean(wins))
    assert of_student["all"]["pairs"] == 3 and of_student["control: colour"]["pairs"] == 1
    assert "student minus this" in content["shares"]["frame difference"]["ratio"]["all"]

    with_teacher = ["--checkpoint", student, "--teacher", teacher, *few]
    said = run(tmp_path, "probe_surprise", *with_teacher, "--out", "b.json", "--batch_size", 2)
    again = run(tmp_path, "probe_surprise", *with_teacher, "--out", "c.json", "--threads", 1)
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "bc")
    assert one["shares"].keys() == other["shares"].keys() and "short, all" in said + again
    for row, same in zip(one["pairs"], other["pairs"]):  # whatever the batch is
        for name, kinds in row["surprise"].items():
            for kind, values in kinds.items():
                np.testing.assert_allclose(values, same["surprise"][name][kind], rtol=1e-3)


def test_wrong_input_ends_in_one_line(world, twins, tmp_path):
    teacher = next(world.glob("checkpoints/teacher_*/best.pth"))
    student = next(world.glob("checkpoints/student_*/best.pth"))

    def refused(*flags):
        return error_of(tmp_path, "probe_surprise", *flags)

    of_student = ("--checkpoint", student)
    assert "give --checkpoint and --data" in refused(*of_student)
    assert "holds no twins.json" in refused(*of_student, "--data", world / "data")
    assert "give --teacher" in refused(*of_student, "--data", twins)
    other = refused(*of_student, "--data", twins, "--teacher", student)
    assert "is not the teacher" in other
    pixels = ("--checkpoint", teacher, "--data", twins)
    assert "leave --teacher out" in refused(*pixels, "--teacher", teacher)
    assert "no pair of this id" in refused(*pixels, "--pair", "9")
    rows = json.loads((twins / "twins.json").read_text())
    for change, says in (
        ({"possible": "../a.webm"}, "leaves the folder"),
        ({"event_frame": "10"}, "event_frame is '10', not int"),
        ({"id": "1"}, "each needs its own"),
        ({"event_frame": 30}, "no pair of"),
    ):
        (tmp_path / "twins.json").write_text(
            json.dumps([rows[0] | change, *rows[1:2][: "id" in change]])
        )
        assert says in refused("--checkpoint", teacher, "--data", tmp_path)
    del rows[0]["control"]
    (tmp_path / "twins.json").write_text(json.dumps(rows))
    assert "no field 'control'" in refused("--checkpoint", teacher, "--data", tmp_path)
