"""A small physics-video data set in Something-Something v2 layout, made on the spot with numpy and
PyAV.

    python demo/make_videos.py --out DIR --train 400 --validation 100

Balls and boxes fall, bounce with loss, slide to rest, collide and are pushed, seen by a fixed
camera: 320x240 VP9 webm at 12 fps, 2-5 s. Energy is lost and never comes back by itself, so time
has a direction; but a video is cut out of a longer simulation so that something moves in its first
and its last frame, and no fixed start or end gives that direction away. Video i of a seed is always
the same; those already there are kept.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from salt import config

# ----------------------------------------------------------------------------------------- settings
out = "out/demo/videos"  # folder for train.json, validation.json, labels.json and videos/
train = 400  # training videos
validation = 100  # held-out videos
seed = 0  # of everything
threads = max(1, (os.cpu_count() or 1))  # videos made at a time
# -------------------------------------------------------------------------------------------------
config.apply(globals(), least={"train": 1, "validation": 1, "threads": 1, "seed": 0})

WIDTH = 320
HEIGHT = 240
FPS = 12
SUBSTEPS = 10
GRAVITY = 500.0  # pixels / s^2
FLOOR = 205.0  # y of the floor, pixels from the top
COLOURS = {
    "red": (205, 50, 45),
    "green": (60, 160, 70),
    "blue": (50, 90, 200),
    "yellow": (225, 195, 50),
    "orange": (230, 130, 40),
    "purple": (130, 60, 160),
    "white": (225, 225, 220),
    "black": (45, 45, 50),
}
TEMPLATES = [
    "Dropping [something] onto [something]",
    "Pushing [something] from left to right",
    "Pushing [something] from right to left",
    "[Something] colliding with [something]",
    "Throwing [something] against [something]",
    "Letting [something] slide along [something]",
]


def make_bodies(random, template):
    """Bodies are rounded boxes: half extents (0, 0) and a radius make a ball.

    Returns a dict of arrays, a row a body.
    """
    count = int(random.integers(2, 5))
    ball = random.random(count) < 0.5
    if template == 5:
        ball[0] = False
    size = random.uniform(13, 27, count)
    half = np.where(
        ball[:, None],
        0.0,
        np.stack(
            [size * random.uniform(0.7, 1.2, count), size * random.uniform(0.6, 1.0, count)], 1
        )
        - 4,
    )
    radius = np.where(ball, size, 4.0)
    x = np.linspace(40, WIDTH - 40, count) + random.uniform(-15, 15, count)
    x = x[random.permutation(count)]
    high = template in (0, 4)
    y = np.where(
        random.random(count) < (0.8 if high else 0.3),
        random.uniform(20, 120, count),
        FLOOR - half[:, 1] - radius,
    )
    velocity = np.stack([random.uniform(-220, 220, count), random.uniform(-200, 60, count)], 1)
    if template in (3, 5):
        velocity[0] = (random.choice([-1, 1]) * random.uniform(200, 380), 0)
    return {
        "ball": ball,
        "half": half,
        "radius": radius,
        "position": np.stack([x, y], 1),
        "velocity": velocity,
        "mass": size**2,
        "angle": np.zeros(count),
        "bounce": random.uniform(0.45, 0.85, count),
        "friction": np.where(
            ball, random.uniform(0.02, 0.08, count), random.uniform(0.2, 0.5, count)
        ),
        "colour": [str(name) for name in random.choice(list(COLOURS), count, replace=False)],
    }


def simulate(random, template, seconds=12.0):
    """Positions [F, bodies + 1, 2], angles [F, bodies] and whether anything moves [F]; the last
    body is the pusher.
    """
    b = make_bodies(random, template)
    count, dt = len(b["ball"]), 1 / FPS / SUBSTEPS
    p = b["position"].copy()
    v = b["velocity"].copy()
    half = b["half"]
    radius = b["radius"]
    mass = b["mass"]
    side = {1: 1, 2: -1}.get(template, int(random.choice([-1, 1])))  # the way the pusher moves
    pushes = np.sort(random.uniform(0.3, seconds, 6 if template in (1, 2) else 5))
    pusher_half = np.array([7.0, 14.0])
    pusher_radius = 5.0
    rest = -40.0 if side > 0 else WIDTH + 40.0
    frames = []
    angles = []
    moving = []
    angle = b["angle"].copy()
    for step in range(int(seconds * FPS) * SUBSTEPS):
        now = step * dt
        since = now - pushes[pushes <= now][-1] if (pushes <= now).any() else 9.0
        reach, speed = WIDTH * 0.75, 230.0
        travel = (
            min(since * speed, reach)
            if since < reach / speed
            else max(0.0, reach - (since - reach / speed) * 1.5 * speed)
        )
        pusher = np.array([rest + side * travel, FLOOR - 26.0])
        pusher_v = np.array([side * speed if since < reach / speed else 0.0, 0.0])
        v[:, 1] += GRAVITY * dt
        p += v * dt
        for i in range(count):
            below = p[i, 1] + half[i, 1] + radius[i] - FLOOR
            if below > 0:
                p[i, 1] -= below
                v[i, 1] = -b["bounce"][i] * v[i, 1] if v[i, 1] > 40 else 0.0
                slow = b["friction"][i] * GRAVITY * dt
                v[i, 0] -= np.sign(v[i, 0]) * min(slow, abs(v[i, 0]))
            for wall, inward in ((0.0, 1), (float(WIDTH), -1)):
                deep = half[i, 0] + radius[i] - inward * (p[i, 0] - wall)
                if deep > 0:
                    p[i, 0] += inward * deep
                    v[i, 0] = inward * b["bounce"][i] * abs(v[i, 0])
            for j in range(i + 1, count + 1):
                last = j == count
                q, w = (pusher, pusher_v) if last else (p[j], v[j])
                reach_xy = half[i] + (pusher_half if last else half[j])
                reach_r = radius[i] + (pusher_radius if last else radius[j])
                apart = q - p[i]
                outside = apart - np.clip(apart, -reach_xy, reach_xy)
                distance = np.hypot(*outside)
                if distance >= reach_r:
                    continue
                if distance > 1e-6:
                    normal, deep = outside / distance, reach_r - distance
                else:  # the cores overlap: out along the shorter way
                    inside = reach_xy - np.abs(apart)
                    axis = int(inside[1] < inside[0])
                    normal = np.eye(2)[axis] * (1.0 if apart[axis] >= 0 else -1.0)
                    deep = inside[axis] + reach_r
                share = 1.0 if last else mass[j] / (mass[i] + mass[j])
                p[i] -= normal * deep * share
                if not last:
                    p[j] += normal * deep * (1 - share)
                closing = (v[i] - w) @ normal
                if closing > 0:
                    impulse = (
                        (1 + (0.1 if last else min(b["bounce"][i], b["bounce"][j])))
                        * closing
                        * normal
                    )
                    v[i] -= impulse * share
                    if not last:
                        v[j] += impulse * (1 - share)
        angle += np.where(b["ball"], v[:, 0] / np.maximum(radius, 1), 0.0) * dt
        if step % SUBSTEPS == 0:
            frames.append(np.concatenate([p, pusher[None]]))
            angles.append(angle.copy())
            moving.append(np.abs(v).max() > 30)
    return (
        b,
        np.array(frames),
        np.array(angles),
        np.array(moving),
        {"half": pusher_half, "radius": pusher_radius},
    )


def smooth_noise(random, cells, amount):
    """A low-frequency texture [HEIGHT, WIDTH] by bilinear interpolation of cells x cells random
    numbers.
    """
    grid = random.normal(0, amount, (cells, cells))
    y, x = np.linspace(0, cells - 1.001, HEIGHT), np.linspace(0, cells - 1.001, WIDTH)
    yi, xi = y.astype(int), x.astype(int)
    fy, fx = (y - yi)[:, None], (x - xi)[None]
    top = grid[yi][:, xi] * (1 - fx) + grid[yi][:, xi + 1] * fx
    low = grid[yi + 1][:, xi] * (1 - fx) + grid[yi + 1][:, xi + 1] * fx
    return top * (1 - fy) + low * fy


def pattern(random, xx, yy):
    """Stripes or checks of a random period, direction and tint [HEIGHT, WIDTH, 3]: the wallpaper or
    the floor boards of one video.
    """
    turn, period = random.uniform(0, np.pi), random.uniform(60, 160)
    along, across = np.cos(turn) * xx + np.sin(turn) * yy, np.cos(turn) * yy - np.sin(turn) * xx
    wave = np.sin(2 * np.pi * along / period)
    if random.random() < 0.5:
        wave = wave * np.sin(2 * np.pi * across / period)
    return np.clip(3 * wave, -1, 1)[..., None] * random.uniform(-30, 30, 3)


def render(random, bodies, positions, angles, pusher):
    """Frames uint8 [F, HEIGHT, WIDTH, 3] under one camera, one light and one noise level."""
    yy, xx = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    zoom, shift = random.uniform(0.85, 1.15), random.uniform(-22, 22, 2)

    def to_view(point):
        return (point - (WIDTH / 2, HEIGHT / 2)) * zoom + (WIDTH / 2, HEIGHT / 2) + shift

    floor = to_view(np.array([0.0, FLOOR]))[1]
    wall_colour, floor_colour = random.uniform(90, 210, 3), random.uniform(60, 180, 3)
    paper, boards = (pattern(random, xx, yy) for _ in range(2))
    ground = np.where(yy[..., None] > floor, floor_colour + boards, wall_colour + paper)
    ground = (
        ground + smooth_noise(random, int(random.integers(4, 14)), random.uniform(4, 16))[..., None]
    )
    light = (
        1
        + random.uniform(-0.25, 0.25) * (xx / WIDTH - 0.5)
        + random.uniform(-0.25, 0.25) * (yy / HEIGHT - 0.5)
    )
    light = (light * random.uniform(0.8, 1.15))[..., None].astype(np.float32)
    ground = (ground * light).astype(np.float32)
    grain = random.normal(0, random.uniform(1, 5), (HEIGHT + 64, WIDTH + 64, 3)).astype(np.float32)
    stripes = random.uniform(2, 5, len(bodies["ball"]) + 1)
    colours = [
        np.array(COLOURS[name], np.float32) * random.uniform(0.85, 1.1) for name in bodies["colour"]
    ] + [np.array([215, 170, 140], np.float32)]
    frames = np.empty((len(positions), HEIGHT, WIDTH, 3), np.uint8)
    for f in range(len(positions)):
        image = ground.copy()
        for i, colour in enumerate(colours):
            last = i == len(colours) - 1
            half, radius = (
                (pusher["half"], pusher["radius"])
                if last
                else (bodies["half"][i], bodies["radius"][i])
            )
            half = half * zoom
            radius = radius * zoom
            (cx, cy) = to_view(positions[f, i])
            reach = half + radius + 2
            x0, x1 = np.clip((cx - reach[0], cx + reach[0] + 1), 0, WIDTH).astype(int)
            y0, y1 = np.clip((cy - reach[1], cy + reach[1] + 1), 0, HEIGHT).astype(int)
            if x0 >= x1 or y0 >= y1:
                continue
            dx, dy = xx[y0:y1, x0:x1] - cx, yy[y0:y1, x0:x1] - cy
            edge = (
                np.hypot(np.maximum(np.abs(dx) - half[0], 0), np.maximum(np.abs(dy) - half[1], 0))
                - radius
            )
            cover = np.clip(0.5 - edge, 0, 1)[..., None]
            turn = 0.0 if last else angles[f, i]
            stripe = np.sin(
                (dx * np.cos(turn) + dy * np.sin(turn))
                * stripes[i]
                / max(radius + half[0], 1)
                * 1.6
            )
            shade = (1 + 0.18 * np.sign(stripe) - 0.25 * dy / max(radius + half[1], 1))[..., None]
            image[y0:y1, x0:x1] = (
                image[y0:y1, x0:x1] * (1 - cover) + colour * shade * light[y0:y1, x0:x1] * cover
            )
        gy, gx = random.integers(0, 64, 2)
        frames[f] = np.clip(image + grain[gy : gy + HEIGHT, gx : gx + WIDTH], 0, 255)
    return frames


def make_video(seed, number, path):
    """Write one video and return its row of the list."""
    random = np.random.default_rng((seed, number))
    template = int(random.integers(len(TEMPLATES)))
    length = int(random.integers(2 * FPS, 5 * FPS + 1))
    starts = []
    while len(starts) == 0:  # a simulation that comes to rest too soon is drawn again
        bodies, positions, angles, moving, pusher = simulate(random, template)
        starts = (
            np.flatnonzero(moving[6 : len(moving) - length] & moving[5 + length : len(moving) - 1])
            + 6
        )
    start = int(random.choice(starts))
    things = [
        f"{colour} {'ball' if ball else 'box'}"
        for colour, ball in zip(bodies["colour"], bodies["ball"])
    ]
    row = {"id": str(number), "template": TEMPLATES[template]}
    second = {0: ["the floor"], 3: things[1:2], 4: ["a wall"], 5: ["the floor"]}
    row["placeholders"] = things[:1] + second.get(template, [])
    row["label"] = row["template"].lower()
    for thing in row["placeholders"]:
        row["label"] = row["label"].replace("[something]", thing, 1)
    if not path.is_file():
        frames = render(
            random,
            bodies,
            positions[start : start + length],
            angles[start : start + length],
            pusher,
        )
        part = path.with_suffix(".part")
        with av.open(str(part), "w", format="webm") as container:
            stream = container.add_stream(
                "libvpx-vp9",
                rate=FPS,
                options={"cpu-used": "8", "deadline": "realtime", "crf": "32", "b": "0"},
            )
            stream.width = WIDTH
            stream.height = HEIGHT
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(part, path)
    return row


folder = Path(out)
(folder / "videos").mkdir(parents=True, exist_ok=True)
with ThreadPoolExecutor(threads) as pool:
    jobs = pool.map(
        lambda number: make_video(seed, number, folder / "videos" / f"{number}.webm"),
        range(train + validation),
    )
    rows = list(
        tqdm(jobs, total=train + validation, desc="videos", unit="video", dynamic_ncols=True)
    )
for name, part in (("train", rows[:train]), ("validation", rows[train:])):
    (folder / f"{name}.json").write_text(json.dumps(part, indent=1))
labels = {
    template.replace("[", "").replace("]", ""): str(i) for i, template in enumerate(TEMPLATES)
}
(folder / "labels.json").write_text(json.dumps(labels, indent=1))
print(
    f"{folder}: {train} training and {validation} held-out videos, "
    f"{sum(file.stat().st_size for file in (folder / 'videos').iterdir()) / 1e6:.0f} MB"
)
