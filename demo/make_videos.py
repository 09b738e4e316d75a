"""A small physics-video data set with the truth in it, in Something-Something v2 layout, made on
the spot with numpy and PyAV.

    python demo/make_videos.py --out DIR --train 400 --validation 100
    python demo/make_videos.py --out DIR --held_out_look 100 --twins 70

Balls and boxes of demo/world.py, 192x144 VP9 webm at 12 fps, 2-5 s. Wall, floor, light, camera,
noise and colours are drawn anew for each. Video i of a seed is always the same; those already there
are kept.

    train.json  validation.json  labels.json  videos/ID.webm
    test.json         with --held_out_look: videos whose textures, hues and kind of light no other
                      video has; for a probe, --val_split test
    states.json       id -> a row a frame of the numbers that state_names.json names: x, y (pixels
                      from the centre of the top left one) and velocity (pixels a second) of the
                      body of each colour; how many bodies there are; whether any two of bodies,
                      hand and wall touch. Of a body that is not there they are null, which
                      np.array(rows, float) makes nan: rows to leave out for that column
    twins/            with --twins, a data folder of its own (--split validation): pairs of videos
                      that are the same, to the decoded pixel, up to an event half-way
    twins/twins.json  id; possible and impossible, the files; event, of world.EVENTS, and the body's
                      name; event_frame, event_seconds; occluded, whether it happens behind a panel;
                      reveal_frame, the first that may differ to the eye; control, whether it breaks
                      no law of motion and should surprise little
"""

import colorsys
import dataclasses
import hashlib
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo import world
from demo.twins import draw_twins
from salt import config
from salt.errors import InputError
from salt.files import write_whole

# ----------------------------------------------------------------------------------------- settings
out = "out/demo/videos"  # folder for the lists, states.json and videos/
train = 400  # training videos
validation = 100  # held-out videos
held_out_look = 0  # videos of the split test, whose looks never occur in the others
twins = 0  # pairs of videos that differ in one event half-way
seed = 0  # of everything
threads = max(1, (os.cpu_count() or 1))  # videos made at a time, each by a process
# -------------------------------------------------------------------------------------------------
config.apply(
    globals(),
    least={"train": 1, "validation": 1, "held_out_look": 0, "twins": 0, "threads": 1, "seed": 0},
)

WIDTH = 192
HEIGHT = 144
MARGIN = 3  # pixels that the camera may sway
GRAIN = 64  # by so many pixels more than a frame is the noise larger that each frame is cut from
XS = np.arange(-MARGIN, WIDTH + MARGIN, dtype=np.float32)
YS = np.arange(-MARGIN, HEIGHT + MARGIN, dtype=np.float32)[:, None]
HUES = {"red": 0.0, "green": 0.36, "blue": 0.61, "yellow": 0.14}  # of world.COLOURS
STATE_NAMES = [f"{colour} {value}" for colour in world.COLOURS for value in ("x", "y", "vx", "vy")]
STATE_NAMES += ["bodies", "contact"]
STREAMS = {"videos": 0, "held_out_look": 1, "twins": 2}  # of random numbers, beside the seed
folder = Path(out)


@dataclasses.dataclass(frozen=True)
class Looks:
    """What looks are drawn from."""

    patterns: tuple  # of wallpaper and floor boards
    hues: tuple  # ends of those of wall, floor and panel, of 1 for the whole circle
    spot: bool  # the light: one bright spot, or a slope
    off: tuple  # ends of how far a body's hue is from that of its colour's name


LOOKS = Looks(("stripes", "checks"), (0.02, 0.55), False, (0.0, 0.012))
HELD_OUT_LOOKS = Looks(("rings", "zigzag"), (0.62, 0.93), True, (0.022, 0.035))


# ---- camera and states
@dataclasses.dataclass
class Camera:
    zoom: float  # pixels a unit
    shift: tuple[float, float]  # pixels
    sway: list[tuple[int, int]]  # pixels, of each frame; smooth in time

    def place(self, x, y, frame=None):
        """Pixels of a place in the room; without a frame, before the camera sways."""
        at_x = (x - world.ROOM[0] / 2) * self.zoom + WIDTH / 2 - 0.5 + self.shift[0]
        at_y = (y - world.ROOM[1] / 2) * self.zoom + HEIGHT / 2 - 0.5 + self.shift[1]
        if frame is None:
            return at_x, at_y
        return at_x + self.sway[frame][0], at_y + self.sway[frame][1]


def draw_camera(random, frames):
    zoom = random.uniform(0.85, 1.15) * WIDTH / world.ROOM[0]
    shift = random.uniform(-12, 12), random.uniform(-12, 12)
    size = random.uniform(0, MARGIN) if random.random() < 0.5 else 0.0
    turns = random.uniform(0.2, 1.0, 2) * np.arange(frames)[:, None] / world.FPS  # [F, 2]
    sway = size * np.sin(2 * np.pi * (turns + random.random(2)))
    return Camera(zoom, shift, [(round(x), round(y)) for x, y in sway.tolist()])


def state_rows(moments, camera):
    """A row of STATE_NAMES a frame."""
    rows = []
    for frame, moment in enumerate(moments):
        here = {body.colour: body for body in moment.bodies if body.present}
        row = []
        for colour in world.COLOURS:
            body = here.get(colour)
            if body is None:
                row += [None] * 4
                continue
            row += [round(value, 2) for value in camera.place(body.x, body.y, frame)]
            row += [round(value * camera.zoom, 1) for value in (body.vx, body.vy)]
        rows.append([*row, len(here), int(moment.contact)])
    return rows


# ---- looks
@dataclasses.dataclass
class Look:
    """How one video looks; float32, colours from 0 to 255. Channels lie in planes, for a sum over
    rows of pixels is many times faster than one over threes.
    """

    ground: np.ndarray  # wall and floor in their light, [3, HEIGHT + 2 MARGIN, WIDTH + 2 MARGIN]
    light: np.ndarray  # factor on what is drawn before them, [HEIGHT, WIDTH]
    grain: np.ndarray  # noise, [3, HEIGHT + GRAIN, WIDTH + GRAIN]
    grain_at: list  # where each frame takes it from, [F][2]
    colours: dict  # name -> [3, 1, 1]
    stripes: float  # on each body
    panel: tuple | None  # its left, top, right, bottom in pixels, and its pixels
    flicker: float  # the light's factor while it flickers


def hsv(random, hues, saturation, value):
    """A colour float32 [3, 1, 1] out of three ranges."""
    drawn = [random.uniform(*ends) for ends in (hues, saturation, value)]
    return 255 * np.array(colorsys.hsv_to_rgb(*drawn), np.float32).reshape(3, 1, 1)


def draw_texture(random, looks, value):
    """A pattern [3, HEIGHT + 2 MARGIN, WIDTH + 2 MARGIN] of two colours; value: ends of theirs."""
    kind = random.choice(looks.patterns)
    turn, period = random.uniform(0, np.pi), random.uniform(30, 80)
    along = np.cos(turn) * XS + np.sin(turn) * YS
    across = np.cos(turn) * YS - np.sin(turn) * XS
    if kind == "rings":
        along = np.hypot(XS - random.uniform(0, WIDTH), YS - random.uniform(0, HEIGHT))
    if kind == "zigzag":
        along = along + 0.5 * np.abs((across % period) - period / 2)
    wave = np.sin(2 * np.pi * along / period)
    if kind == "checks":
        wave = wave * np.sin(2 * np.pi * across / period)
    one, other = (hsv(random, looks.hues, (0.1, 0.4), value) for _ in range(2))
    other = one + random.uniform(0.2, 0.6) * (other - one)
    return one + (other - one) * np.clip(0.5 + 1.5 * wave, 0, 1)


def draw_blotches(random):
    """A low-frequency texture [HEIGHT + 2 MARGIN, WIDTH + 2 MARGIN], bilinear between cells."""
    cells, amount = int(random.integers(4, 14)), random.uniform(3, 12)
    grid = random.normal(0, amount, (cells, cells))
    y, x = (np.linspace(0, cells - 1.001, count) for count in (YS.size, XS.size))
    rows, columns = y.astype(int), x.astype(int)
    down, right = (y - rows)[:, None], (x - columns)
    lines = grid[rows] * (1 - down) + grid[rows + 1] * down
    return lines[:, columns] * (1 - right) + lines[:, columns + 1] * right


def draw_light(random, spot):
    """A factor [HEIGHT + 2 MARGIN, WIDTH + 2 MARGIN]."""
    x, y = XS / WIDTH - 0.5, YS / HEIGHT - 0.5
    if spot:
        far = (x - random.uniform(-0.4, 0.4)) ** 2 + (y - random.uniform(-0.4, 0.4)) ** 2
        return 0.7 + 0.5 * np.exp(-far / random.uniform(0.08, 0.25))
    slope = random.uniform(-0.3, 0.3) * x + random.uniform(-0.3, 0.3) * y
    return (1 + slope) * random.uniform(0.8, 1.15)


def draw_look(random, looks, camera, panel):
    """A Look out of `looks`; panel: in units, as world.draw_panel has it."""
    paper, boards = (draw_texture(random, looks, (0.4, 0.85)) for _ in range(2))
    left, top = camera.place(0.0, world.FLOOR)
    right = camera.place(world.ROOM[0], 0.0)[0]
    ground = np.where(YS > top, boards, paper) + draw_blotches(random)
    ground[:, :, (XS < left) | (XS > right)] *= 0.6  # beyond the room's side walls
    light = draw_light(random, looks.spot)
    colours = {}
    for name, hue in HUES.items():
        off = world.draw_side(random) * random.uniform(*looks.off)
        colours[name] = hsv(random, (hue + off, hue + off), (0.7, 0.9), (0.7, 0.9))
    colours["hand"] = np.array([215, 170, 140], np.float32).reshape(3, 1, 1)
    colours["wall"] = hsv(random, looks.hues, (0.0, 0.15), (0.25, 0.4))
    grain = random.standard_normal((3, HEIGHT + GRAIN, WIDTH + GRAIN), np.float32)
    return Look(
        ground=(ground * light).astype(np.float32),
        light=light[MARGIN:-MARGIN, MARGIN:-MARGIN].astype(np.float32),
        grain=grain * np.float32(random.uniform(1, 5)),
        grain_at=random.integers(0, GRAIN, (len(camera.sway), 2)).tolist(),
        colours=colours,
        stripes=random.uniform(2, 5),
        panel=draw_panel_texture(random, looks, camera, panel),
        flicker=1 + 0.3 * world.draw_side(random),
    )


def draw_panel_texture(random, looks, camera, panel):
    texture = draw_texture(random, looks, (0.3, 0.7))
    if panel is None:
        return None
    corners = (*camera.place(*panel[:2]), *camera.place(*panel[2:]))
    x0, y0, x1, y1 = (round(corner) for corner in corners)
    return x0, y0, x1, y1, texture.astype(np.float32)


# ---- frames
def paint_body(image, look, camera, body, frame):
    """Draw one into image [3, HEIGHT, WIDTH], in place, with smooth edges."""
    at_x, at_y = camera.place(body.x, body.y, frame)
    left, top, right, bottom = (side * camera.zoom for side in body.edges)
    wide, high = (right - left) / 2, (bottom - top) / 2
    x0, x1 = max(0, int(at_x - wide - 1)), min(WIDTH, int(at_x + wide + 2))
    y0, y1 = max(0, int(at_y - high - 1)), min(HEIGHT, int(at_y + high + 2))
    if x0 >= x1 or y0 >= y1:
        return
    x = XS[MARGIN + x0 : MARGIN + x1] - at_x
    y = YS[MARGIN + y0 : MARGIN + y1] - at_y
    radius = body.radius * camera.zoom
    beside = np.maximum(np.abs(x) - (wide - radius), 0)
    above = np.maximum(np.abs(y) - (high - radius), 0)
    cover = radius + 0.5 - np.sqrt(beside**2 + above**2)
    cover = np.minimum(np.maximum(cover, 0), 1)
    turns = 1.6 * look.stripes / wide
    stripe = np.sin(x * (turns * math.cos(body.angle)) + y * (turns * math.sin(body.angle)))
    shade = 0.15 * np.sign(stripe) + (1 - 0.25 / high * y)
    patch = image[:, y0:y1, x0:x1]
    lit = shade * look.light[y0:y1, x0:x1] * look.colours[body.colour]
    patch += cover * (lit - patch)


def paint_panel(image, look, sway):
    """The panel before all else."""
    left, top, right, bottom, texture = look.panel
    x0, x1 = (min(max(0, x + sway[0]), WIDTH) for x in (left, right))
    y0, y1 = (min(max(0, y + sway[1]), HEIGHT) for y in (top, bottom))
    x, y = (MARGIN - each for each in sway)  # of the frame's corner in the texture
    pixels = texture[:, y + y0 : y + y1, x + x0 : x + x1]
    image[:, y0:y1, x0:x1] = pixels * look.light[y0:y1, x0:x1]


def paint_frames(moments, camera, look):
    """Frames uint8 [HEIGHT, WIDTH, 3], one after the other."""
    for frame, moment in enumerate(moments):
        x, y = (MARGIN - sway for sway in camera.sway[frame])
        image = look.ground[:, y : y + HEIGHT, x : x + WIDTH].copy()
        for body in (moment.wall, *moment.bodies, moment.hand):
            if world.there(body):
                paint_body(image, look, camera, body, frame)
        if look.panel:
            paint_panel(image, look, camera.sway[frame])
        if moment.flicker:
            image *= look.flicker
        y, x = look.grain_at[frame]
        image += look.grain[:, y : y + HEIGHT, x : x + WIDTH]
        pixels = np.clip(image, 0, 255, out=image).astype(np.uint8)
        yield np.stack([*pixels], axis=-1)


ENCODER = {
    "cpu-used": "8",
    "deadline": "realtime",
    "crf": "32",
    "b": "0",
    "lag-in-frames": "0",  # a packet depends on no later frame: twins are the same up to the event
}


def write_video(path, frames):
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=world.FPS, options=ENCODER)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(part, path)


# ---- videos, twins and their rows
def row_of(name, scene):
    """The row of a scene's video in a list, as Something-Something v2 has it."""
    things = [body.name for body in scene.bodies]
    others = {
        0: ["the floor"],
        3: things[1:2],
        4: ["a wall"],
        5: ["the floor"],
    }
    template = world.TEMPLATES[scene.template]
    row = {
        "id": name,
        "template": template,
        "placeholders": things[:1] + others.get(scene.template, []),
        "label": template.lower(),
    }
    for thing in row["placeholders"]:
        row["label"] = row["label"].replace("[something]", thing, 1)
    return row


def make_video(job):
    """Write video (stream, number, id) where it is not there; returns its row, and its states as
    JSON."""
    stream, number, name = job
    seeds = np.random.SeedSequence((seed, STREAMS[stream], number)).spawn(3)
    scenes, cameras, looks = (np.random.default_rng(each) for each in seeds)
    scene, moments = world.draw_video(scenes)
    camera = draw_camera(cameras, len(moments))
    path = folder / "videos" / f"{name}.webm"
    if not path.is_file():
        family = HELD_OUT_LOOKS if stream == "held_out_look" else LOOKS
        look = draw_look(looks, family, camera, world.draw_panel(scenes))
        write_video(path, paint_frames(moments, camera, look))
    return row_of(name, scene), json.dumps(state_rows(moments, camera))


def make_twins(number):
    """Write pair `number` where it is not there; returns its row of twins.json, and a list of what
    make_video gives."""
    kinds = len(world.EVENTS)
    kind = world.EVENTS[number % kinds]
    # every other pair of a kind; a flicker is everywhere
    occluded = (number % kinds + number // kinds) % 2 == 1 and kind != "flicker"
    seeds = np.random.SeedSequence((seed, STREAMS["twins"], number)).spawn(3)
    scenes, cameras, looks = (np.random.default_rng(each) for each in seeds)
    pair = draw_twins(scenes, kind, occluded)
    camera = draw_camera(cameras, len(pair.possible))
    look = draw_look(looks, LOOKS, camera, pair.panel)
    row = {
        "id": str(number),
        "possible": f"videos/{number}_possible.webm",
        "impossible": f"videos/{number}_impossible.webm",
        "event": kind,
        "body": None if kind == "flicker" else pair.scene.bodies[pair.event.body].name,
        "event_frame": pair.event.frame,
        "event_seconds": round(pair.event.frame / world.FPS, 3),
        "reveal_frame": pair.reveal,
        "occluded": occluded,
        "control": kind in world.CONTROLS,
    }
    made = []
    for moments, side in ((pair.possible, "possible"), (pair.impossible, "impossible")):
        path = folder / "twins" / row[side]
        if not path.is_file():
            write_video(path, paint_frames(moments, camera, look))
        states = json.dumps(state_rows(moments, camera))
        made.append((row_of(path.stem, pair.scene), states))
    return row, made


def run_all(function, jobs, what):
    """[function(job) of each], in order, by `threads` processes."""
    progress = {"total": len(jobs), "desc": what, "unit": "", "dynamic_ncols": True}
    if threads == 1:
        return list(tqdm(map(function, jobs), **progress))
    with ProcessPoolExecutor(threads) as pool:
        return list(tqdm(pool.map(function, jobs), **progress))


# ---- files
def write_json(path, content):
    write_whole(path, json.dumps(content, indent=1).encode())


def write_lists(place, splits):
    """The lists of a data folder, its labels and its states.

    splits: {name of a split: what make_video gave of its videos}
    """
    for name, made in splits.items():
        write_json(place / f"{name}.json", [row for row, _ in made])
    labels = [template.replace("[", "").replace("]", "") for template in world.TEMPLATES]
    write_json(place / "labels.json", {label: str(i) for i, label in enumerate(labels)})
    write_json(place / "state_names.json", STATE_NAMES)
    lines = [f'"{row["id"]}": {states}' for made in splits.values() for row, states in made]
    write_whole(place / "states.json", ("{" + ",\n".join(lines) + "}\n").encode())


def check_folder():
    """Raises InputError where videos of another seed or another generator would be kept: states
    come from the simulation, and would be wrong of these."""
    here = Path(__file__).parent
    code = b"".join(
        (here / name).read_bytes() for name in ("world.py", "twins.py", "make_videos.py")
    )
    made_by = {"seed": seed, "generator": hashlib.sha256(code).hexdigest()[:16]}
    path, videos = folder / "made_by.json", folder / "videos"
    known = json.loads(path.read_text()) if path.is_file() else None
    if known != made_by and videos.is_dir() and any(videos.iterdir()):
        raise InputError(
            f"{folder} holds videos of another seed, or of another version of demo/: {path} says"
            f" {known}, not {made_by}; choose another --out, or remove them"
        )
    videos.mkdir(parents=True, exist_ok=True)
    write_json(path, made_by)


def main():
    check_folder()
    jobs = [("videos", number, str(number)) for number in range(train + validation)]
    jobs += [("held_out_look", number, f"look{number}") for number in range(held_out_look)]
    made = run_all(make_video, jobs, "videos")
    splits = {"train": made[:train], "validation": made[train : train + validation]}
    if held_out_look:
        splits["test"] = made[train + validation :]
    else:
        (folder / "test.json").unlink(missing_ok=True)  # of an earlier call, without states now
    write_lists(folder, splits)
    if twins:
        (folder / "twins" / "videos").mkdir(parents=True, exist_ok=True)
        pairs = run_all(make_twins, range(twins), "twins")
        write_json(folder / "twins" / "twins.json", [row for row, _ in pairs])
        write_lists(folder / "twins", {"validation": [one for _, pair in pairs for one in pair]})
    size = sum(file.stat().st_size for file in folder.glob("**/*.webm")) / 1e6
    print(
        f"{folder}: {train} training and {validation} held-out videos, {held_out_look} of held-out"
        f" looks, {twins} pairs of twins, {size:.0f} MB"
    )


if __name__ == "__main__":  # not in the processes that it starts, which may import it
    main()
