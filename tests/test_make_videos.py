"""The demo's videos: what states.json and twins.json say of them, against what is decoded and
against arithmetic.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from demo import world
from salt.splits import load_split

SCRIPT = Path(world.__file__).with_name("make_videos.py")
HUES = {"red": 0.0, "green": 0.36, "blue": 0.61, "yellow": 0.14}


def make(folder, *flags, code=0):
    words = [sys.executable, str(SCRIPT), "--out", str(folder), *map(str, flags)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr


def read_json(path):
    return json.loads(path.read_text())


def decode(path, count=None):
    """uint8 [F, H, W, 3]; count: of its first frames only"""
    with av.open(str(path)) as container:
        frames = itertools.islice(container.decode(video=0), count)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    flags = "--train 5 --validation 1 --held_out_look 3 --twins 14 --threads 2"
    make(folder, *flags.split())
    return folder


@pytest.fixture(scope="module")
def pairs(made):
    """(row of twins.json, frames of the possible and of the impossible one) of each."""
    folder = made / "twins"
    rows = read_json(folder / "twins.json")
    return [
        (row, decode(folder / row["possible"]), decode(folder / row["impossible"])) for row in rows
    ]


def hsv_of(frame):
    """Hue, saturation and value [3, H, W] of a frame, 0 to 1."""
    return np.moveaxis(np.asarray(Image.fromarray(frame).convert("HSV")), -1, 0) / np.float32(255)


def nearest_colour(frame):
    """Numbers of world.COLOURS [H, W] by hue, -1 where a pixel is too pale for a body."""
    hue, saturation, _ = hsv_of(frame)
    off = np.abs(hue - np.array([HUES[colour] for colour in world.COLOURS])[:, None, None])
    off = np.minimum(off, 1 - off)
    return np.where((saturation > 0.55) & (off.min(0) < 0.07), off.argmin(0), -1)


# ---- files
def test_a_video_depends_on_its_number_alone_and_is_kept(made, tmp_path):
    """Another count, other processes, and a folder of which some files are there."""
    make(tmp_path, *"--train 2 --validation 1 --threads 1".split())
    videos = tmp_path / "videos"
    (videos / "1.webm").unlink()
    kept = (videos / "0.webm").stat().st_mtime_ns
    make(tmp_path, *"--train 2 --validation 3 --threads 2".split())
    assert (videos / "0.webm").stat().st_mtime_ns == kept
    states, others = read_json(made / "states.json"), read_json(tmp_path / "states.json")
    assert list(others) == [str(i) for i in range(5)]
    for name in others:
        assert others[name] == states[name]
        same = (videos / f"{name}.webm", made / "videos" / f"{name}.webm")
        assert same[0].read_bytes() == same[1].read_bytes()


def test_videos_of_another_seed_are_not_taken_for_these(made):
    assert "another seed" in make(made, "--seed", 1, code=1)


def test_every_list_is_a_split(made):
    assert [row.id for row in load_split(made, "train")] == list("01234")
    assert [row.id for row in load_split(made, "validation")] == ["5"]
    assert [row.id for row in load_split(made, "test")] == ["look0", "look1", "look2"]
    twins = load_split(made / "twins", "validation")
    assert len(twins) == 28
    labels = read_json(made / "labels.json")
    for row in read_json(made / "train.json"):
        assert row["template"].replace("[", "").replace("]", "") in labels
        assert "[" not in row["label"] and row["placeholders"][0] in row["label"]
    for place, names in ((made, [*"012345", "look0", "look1", "look2"]), (made / "twins", None)):
        states = read_json(place / "states.json")
        assert list(states) == (names or [row.id for row in twins])


# ---- states
def test_states_are_where_the_colours_are(made):
    """The centroid of a colour within two pixels of its x, y, in frames that show all of it."""
    states, names = read_json(made / "states.json"), read_json(made / "state_names.json")
    compared = 0
    for name, rows in states.items():
        rows = np.array(rows, float)  # [F, values]
        frames = decode(made / "videos" / f"{name}.webm")
        shown = np.stack([nearest_colour(frame) for frame in frames])
        assert len(rows) == len(shown) and rows.shape[1] == len(names)
        there = [names.index(f"{colour} x") for colour in world.COLOURS]
        assert (rows[:, names.index("bodies")] == np.isfinite(rows[:, there]).sum(1)).all()
        for number, colour in enumerate(world.COLOURS):
            x, y = (rows[:, names.index(f"{colour} {axis}")] for axis in "xy")
            inside = (x > 28) & (x < 192 - 28) & (y > 28) & (y < 144 - 28)
            area = (shown == number).sum((1, 2))
            for frame in np.flatnonzero(inside & (area > 0.95 * area.max()) & (area > 100)):
                ys, xs = np.nonzero(shown[frame] == number)
                off = np.hypot(np.median(xs) - x[frame], np.median(ys) - y[frame])
                assert off < 2, (name, colour, frame, off)
                compared += 1
    assert compared > 50


def test_velocities_are_those_of_the_places(made):
    """Of what flies freely: the mean of two frames' velocities is the way between them."""
    states, names = read_json(made / "states.json"), read_json(made / "state_names.json")
    off = []
    for rows in states.values():
        rows = np.array(rows, float)
        for colour in world.COLOURS:
            place, velocity = (
                rows[:, [names.index(f"{colour} {value}") for value in values]]
                for values in (("x", "y"), ("vx", "vy"))
            )
            way = np.diff(place, axis=0) * world.FPS
            off.append(np.abs(way - (velocity[1:] + velocity[:-1]) / 2).ravel())
    assert np.nanmedian(np.concatenate(off)) < 1  # pixels a second; bounces and sway have more


def ball(x, vx, y=100.0):
    return world.Body(x, y, 0.0, 0.0, 10.0, inverse_mass=0.01, bounce=0.8, vx=vx, colour="red")


def test_contact_is_when_the_balls_meet():
    """In free fall side by side, 62 units between their surfaces, 240 units a second nearer: they
    touch after 0.256 s, and frame 3 shows what came to be between 0.25 and 0.333 s.
    """
    scene = world.Scene(3, [ball(100, 120), ball(182, -120)], None, 1, [])
    contacts = [moment.contact for moment in world.simulate(scene, 7)]
    assert contacts == [frame == 3 for frame in range(7)]


def energy(moment):
    """Of all bodies, from the floor up."""
    return sum(
        (0.5 * (body.vx**2 + body.vy**2) + world.GRAVITY * (world.FLOOR - body.y))
        / body.inverse_mass
        for body in moment.bodies
    )


def test_energy_comes_from_the_hand_only():
    """So a scene without one loses energy, and time has a direction."""
    random = np.random.default_rng(0)
    scenes = [scene for scene in (world.draw_scene(random) for _ in range(40)) if scene.wall]
    assert len(scenes) > 3
    for scene in scenes:
        energies = [energy(moment) for moment in world.simulate(scene)]
        assert energies[-1] < energies[0]
        # what overlaps is put apart, at some height; a step of gravity is a step late
        rises = np.diff(energies) / energies[0]
        assert rises.max() < 0.05, rises.max()


# ---- twins
def test_there_are_twins_of_every_kind_in_the_open_and_hidden(pairs):
    kinds = {(row["event"], row["occluded"]) for row, _, _ in pairs}
    assert kinds == {*itertools.product(world.EVENTS, (False, True))} - {("flicker", True)}
    for row, _, _ in pairs:
        assert row["control"] == (row["event"] in ("colour", "flicker"))
        assert math.isclose(row["event_seconds"], row["event_frame"] / 12, abs_tol=1e-3)


def test_twins_are_the_same_up_to_what_can_be_seen_of_the_event(pairs):
    for row, possible, impossible in pairs:
        event, reveal, count = row["event_frame"], row["reveal_frame"], len(possible)
        assert count == len(impossible) and 0.4 * count < event < 0.6 * count
        assert (possible[:reveal] == impossible[:reveal]).all(), row
        differs = np.abs(possible.astype(int) - impossible).max((1, 2, 3)) > 40
        assert differs.any(), row
        if row["occluded"]:
            assert reveal >= event + 2
        else:
            assert event <= np.flatnonzero(differs)[0] <= event + 4, row


def test_states_of_twins_part_at_the_event(made, pairs):
    states = read_json(made / "twins" / "states.json")
    for row, *_ in pairs:
        one, other = (states[f"{row['id']}_{side}"] for side in ("possible", "impossible"))
        event = row["event_frame"]
        assert one[:event] == other[:event]
        assert (one[event:] == other[event:]) == (row["event"] == "flicker")
        if row["event"] == "vanish":
            assert other[event][-2] == one[event][-2] - 1  # bodies


# ---- looks
def test_hues_of_held_out_looks_are_in_no_other_video(made):
    """Of what is no body: the share of pixels with a hue between blue and red."""
    shares = {}
    for path in (made / "videos").iterdir():
        hue, saturation, _ = hsv_of(decode(path, 1)[0])
        ground = (saturation > 0.1) & (saturation < 0.5)
        shares[path.stem] = np.mean((hue > 0.6) & (hue < 0.95), where=ground)
    looks = [share for name, share in shares.items() if name.startswith("look")]
    others = [share for name, share in shares.items() if not name.startswith("look")]
    assert min(looks) > 0.8 and max(others) < 0.2, shares
