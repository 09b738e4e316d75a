"""The demo's world: balls and boxes in a room, seen from its side, and events that break its laws.

A room is ROOM units wide and high, x to the right and y downwards; a video shows it larger or
smaller. Bodies fall, bounce with loss, slide to rest, collide and are pushed by a hand, or stopped
by a wall. Energy is lost and comes back by the hand only, so time has a direction.

Plain Python numbers: a step moves four bodies, for which an array is slower.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np

ROOM = (320.0, 240.0)  # units
FLOOR = 205.0  # its y
FPS = 12
SUBSTEPS = 6  # of the simulation a frame
SECONDS = 8  # of a simulation, out of which a video is cut
GRAVITY = 500.0  # units / s^2
REACH = 240.0  # how far the hand comes into the room
HAND_SPEED = 230.0  # units / s
PANEL_BOTTOM = FLOOR + 14
TOUCHING = 0.5  # surfaces nearer than this are in contact
COLOURS = ("red", "green", "blue", "yellow")  # at most one body of each
TEMPLATES = (
    "Dropping [something] onto [something]",
    "Pushing [something] from left to right",
    "Pushing [something] from right to left",
    "[Something] colliding with [something]",
    "Throwing [something] against [something]",
    "Letting [something] slide along [something]",
)
EVENTS = ("vanish", "jump", "shape", "pass", "stop", "colour", "flicker")
CONTROLS = ("colour", "flicker")  # break no law of motion, and should surprise little


@dataclasses.dataclass(slots=True)
class Body:
    """A box with round edges, never turned; without half extents it is a ball. Units and seconds;
    the angle, in radians, turns a ball's stripes. What nothing moves has no inverse_mass."""

    x: float
    y: float
    half_x: float
    half_y: float
    radius: float
    inverse_mass: float = 0.0
    bounce: float = 0.5  # what a bounce leaves of the speed
    friction: float = 0.0
    colour: str = ""
    vx: float = 0.0
    vy: float = 0.0
    angle: float = 0.0
    present: bool = True

    @property
    def ball(self):
        return self.half_x == 0

    @property
    def name(self):
        return f"{self.colour} {'ball' if self.ball else 'box'}"

    @property
    def edges(self):
        """left, top, right, bottom"""
        wide, high = self.half_x + self.radius, self.half_y + self.radius
        return self.x - wide, self.y - high, self.x + wide, self.y + high


@dataclasses.dataclass
class Scene:
    """Where a simulation begins."""

    template: int  # number in TEMPLATES
    bodies: list[Body]  # the one that the label speaks of first
    wall: Body | None  # stands in the room; then there is no hand
    side: int  # the way the hand moves: 1 to the right, -1 to the left
    pushes: list[float]  # when it starts to, in seconds


@dataclasses.dataclass
class Moment:
    """A frame of a simulation."""

    bodies: list[Body]  # in the scene's order, absent ones too
    hand: Body | None
    wall: Body | None
    contact: bool  # whether any two of these touched since the frame before
    hits: list[tuple]  # (body, other, closing speed); other: len(bodies) is the wall, + 1 the hand
    flicker: bool = False  # whether the light is another


@dataclasses.dataclass
class Event:
    """What goes wrong from `frame` on."""

    kind: str  # one of EVENTS
    frame: int
    body: int
    other: int | None = None  # that it passes through: as in Moment.hits
    place: tuple[float, float] | None = None  # that it jumps to
    colour: str | None = None  # that it takes on


# ---- scenes
def draw_scene(random):
    template = int(random.integers(len(TEMPLATES)))
    count = int(random.integers(2, 5))
    colours = random.permutation(COLOURS)[:count].tolist()
    places = np.linspace(40, ROOM[0] - 40, count) + random.uniform(-15, 15, count)
    bodies = [
        draw_body(random, template, x, colour)
        for x, colour in zip(random.permutation(places).tolist(), colours)
    ]
    first = bodies[0]
    if template == 5 and first.ball:
        change_shape(first)
    if template in (3, 5):
        first.vx, first.vy = draw_side(random) * random.uniform(200, 380), 0.0
    wall = draw_wall(random, bodies) if template > 2 and random.random() < 0.5 else None
    side = {1: 1, 2: -1}.get(template, draw_side(random))
    pushes = [] if wall else np.sort(random.uniform(0.3, SECONDS, 4)).tolist()
    return Scene(template, bodies, wall, side, pushes)


def draw_side(random):
    return 1 if random.random() < 0.5 else -1


def draw_body(random, template, x, colour):
    ball = random.random() < 0.5
    size = random.uniform(14, 27)
    half_x, half_y, radius = 0.0, 0.0, size
    if not ball:
        half_x, half_y = size * random.uniform(0.7, 1.2) - 4, size * random.uniform(0.6, 1.0) - 4
        radius = 4.0
    y = FLOOR - half_y - radius
    if random.random() < (0.8 if template in (0, 4) else 0.3):
        y = random.uniform(20, 120)
    return Body(
        x=x,
        y=y,
        half_x=half_x,
        half_y=half_y,
        radius=radius,
        inverse_mass=1 / size**2,
        bounce=random.uniform(0.45, 0.85),
        friction=random.uniform(0.02, 0.08) if ball else random.uniform(0.2, 0.5),
        colour=colour,
        vx=random.uniform(-220, 220),
        vy=random.uniform(-200, 60),
    )


def draw_wall(random, bodies):
    """A wall on the floor, where no body is; or None where there is no room for one."""
    height = random.uniform(80, 150)
    wall = Body(
        random.uniform(90, 230), FLOOR - height / 2, 4.0, height / 2 - 2, 2.0, colour="wall"
    )
    return None if any(distance(wall, body) < 4 for body in bodies) else wall


def hand_at(scene, now):
    """The hand at a time in seconds: it comes in, and goes back faster."""
    since = now - max((push for push in scene.pushes if push <= now), default=-9.0)
    rest = -40.0 if scene.side > 0 else ROOM[0] + 40.0
    if since < REACH / HAND_SPEED:
        travel, speed = since * HAND_SPEED, scene.side * HAND_SPEED
    else:
        travel, speed = max(0.0, REACH - (since - REACH / HAND_SPEED) * 1.5 * HAND_SPEED), 0.0
    return rest + scene.side * travel, speed


def change_shape(body):
    """A ball becomes a flat box, a box a ball, on the same ground."""
    bottom = body.edges[3]
    if body.ball:
        body.half_x, body.half_y, body.radius = 1.2 * body.radius - 4, 0.6 * body.radius - 4, 4.0
        body.friction = 0.3
    else:
        body.radius += (body.half_x + body.half_y) / 2
        body.half_x, body.half_y = 0.0, 0.0
        body.friction = 0.05
    body.y += bottom - body.edges[3]


# ---- physics
def simulate(scene, count=SECONDS * FPS, event=None):
    """The first `count` Moments of a scene; with an Event, those before its frame are the same."""
    bodies = [copy.copy(body) for body in scene.bodies]
    hand = Body(hand_at(scene, 0.0)[0], FLOOR - 26.0, 7.0, 14.0, 5.0, bounce=0.1, colour="hand")
    solids = [*bodies, scene.wall, hand if scene.pushes else None]
    passed = None
    moments = []
    for frame in range(count):
        if event and frame == event.frame:
            apply_event(event, bodies)
            passed = (event.body, event.other)
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(len(solids)), 2)
            if i < len(bodies) and (i, j) != passed and there(solids[i]) and there(solids[j])
        ]
        contact, hits = False, []
        for substep in range(SUBSTEPS):
            now = (frame + substep / SUBSTEPS) / FPS
            hand.x, hand.vx = hand_at(scene, now) if scene.pushes else (hand.x, 0.0)
            for body in bodies:
                move(body)
            for i, j in pairs:
                closing = collide(solids[i], solids[j])
                contact = contact or closing is not None
                if closing:
                    hits.append((i, j, closing))
        moments.append(
            Moment(
                [copy.copy(body) for body in bodies],
                copy.copy(hand) if scene.pushes else None,
                scene.wall,
                contact,
                hits,
                event is not None and event.kind == "flicker" and 0 <= frame - event.frame < 3,
            )
        )
    return moments


def apply_event(event, bodies):
    body = bodies[event.body]
    if event.kind == "vanish":
        body.present = False
    elif event.kind == "jump":
        body.x, body.y = event.place
    elif event.kind == "shape":
        change_shape(body)
    elif event.kind == "stop":
        body.vx = body.vy = body.inverse_mass = 0.0
    elif event.kind == "colour":
        body.colour = event.colour


def there(body):
    return body is not None and body.present


def move(body, dt=1 / FPS / SUBSTEPS):
    """A step of one body in the room, alone."""
    if body.inverse_mass == 0:
        return
    body.vy += GRAVITY * dt
    body.x += body.vx * dt
    body.y += body.vy * dt
    left, _, right, bottom = body.edges
    if bottom > FLOOR:
        body.y -= bottom - FLOOR
        body.vy = -body.bounce * body.vy if body.vy > 40 else 0.0
        slow = min(body.friction * GRAVITY * dt, abs(body.vx))
        body.vx -= math.copysign(slow, body.vx)
    if left < 0:
        body.x -= left
        body.vx = body.bounce * abs(body.vx)
    elif right > ROOM[0]:
        body.x -= right - ROOM[0]
        body.vx = -body.bounce * abs(body.vx)
    if body.ball:
        body.angle += body.vx / body.radius * dt


def outside(a, b):
    """The vector between the cores of two bodies, (0, 0) where these overlap."""
    wide, high = a.half_x + b.half_x, a.half_y + b.half_y
    x, y = b.x - a.x, b.y - a.y
    return x - min(max(x, -wide), wide), y - min(max(y, -high), high)


def distance(a, b):
    """Units between the surfaces of two bodies, negative where they overlap."""
    return math.sqrt(sum(way**2 for way in outside(a, b))) - a.radius - b.radius


def collide(a, b):
    """Push two bodies apart, and let them bounce off each other; returns at what speed they came
    together, 0.0 where they only touch, None where they do not.
    """
    near = a.radius + b.radius + TOUCHING
    if abs(b.x - a.x) > a.half_x + b.half_x + near or abs(b.y - a.y) > a.half_y + b.half_y + near:
        return None
    x, y = outside(a, b)
    apart = math.sqrt(x * x + y * y)
    if apart > near:
        return None
    deep = a.radius + b.radius - apart
    if deep < 0 or a.inverse_mass + b.inverse_mass == 0:
        return 0.0
    if apart > 1e-6:
        x, y = x / apart, y / apart
    else:
        x, y, deep = shorter_way(a, b)
    share = a.inverse_mass / (a.inverse_mass + b.inverse_mass)
    a.x -= x * deep * share
    a.y -= y * deep * share
    b.x += x * deep * (1 - share)
    b.y += y * deep * (1 - share)
    closing = (a.vx - b.vx) * x + (a.vy - b.vy) * y
    if closing <= 0:
        return 0.0
    impulse = (1 + min(a.bounce, b.bounce)) * closing
    a.vx -= impulse * x * share
    a.vy -= impulse * y * share
    b.vx += impulse * x * (1 - share)
    b.vy += impulse * y * (1 - share)
    return closing


def shorter_way(a, b):
    """Of two bodies whose cores overlap: the direction out along the shorter way, and how far."""
    x, y = b.x - a.x, b.y - a.y
    inside_x = a.half_x + b.half_x - abs(x)
    inside_y = a.half_y + b.half_y - abs(y)
    if inside_y < inside_x:
        return 0.0, 1.0 if y >= 0 else -1.0, inside_y + a.radius + b.radius
    return 1.0 if x >= 0 else -1.0, 0.0, inside_x + a.radius + b.radius


def is_moving(moment):
    return any(max(abs(body.vx), abs(body.vy)) > 30 for body in moment.bodies)


# ---- videos
def draw_video(random):
    """A Scene and the Moments of a video of 2-5 s: something moves in its first and its last, and
    neither is a simulation's, so that no fixed start or end gives time's direction away.
    """
    length = int(random.integers(2 * FPS, 5 * FPS + 1))
    while True:  # a simulation that comes to rest too soon is drawn again
        scene = draw_scene(random)
        moments = simulate(scene)
        moving = np.array([is_moving(moment) for moment in moments])
        starts = 6 + np.flatnonzero(moving[6 : len(moving) - length] & moving[6 + length - 1 : -1])
        if len(starts):
            start = int(random.choice(starts))
            return scene, moments[start : start + length]


def draw_panel(random):
    """What stands in front of the room in some videos: left, top, right, bottom; or None."""
    if random.random() > 0.3:
        return None
    left = random.uniform(20, 220)
    top = -80.0 if random.random() < 0.5 else random.uniform(40, 150)
    return left, top, left + random.uniform(50, 90), PANEL_BOTTOM
