"""Pairs of videos for a surprise test: one scene of the demo's world, simulated once as it is and
once with an event half-way, in the open or behind a panel in the foreground.
"""

import copy
import dataclasses
import math

import numpy as np

from demo.world import (
    COLOURS,
    FLOOR,
    FPS,
    PANEL_BOTTOM,
    TOUCHING,
    Event,
    Moment,
    Scene,
    distance,
    draw_scene,
    simulate,
)


@dataclasses.dataclass
class Twins:
    """Two videos of one scene, the same up to an event half-way."""

    scene: Scene
    event: Event  # its frame is that of the videos
    panel: tuple | None  # as of draw_panel; what it hides, it hides in both
    reveal: int  # the first frame that may differ to the eye
    possible: list[Moment]
    impossible: list[Moment]


def draw_twins(random, kind, occluded):
    """Twins of 3-5 s for an event of EVENTS.

    Occluded: it happens wholly behind a panel, behind which the body went before and from where, if
    nothing goes wrong, it comes out again; what differs stays hidden for two frames at least.
    """
    through_wall = kind == "pass" and random.random() < 0.5
    while True:
        length = int(random.integers(3 * FPS, 5 * FPS + 1))
        half_way = round(length * random.uniform(0.42, 0.58))
        scene = draw_scene(random)
        if through_wall and not scene.wall:
            continue
        moments = simulate(scene)
        starts = np.arange(6, len(moments) - length)
        for start in random.permutation(starts).tolist():
            event = draw_event(random, kind, through_wall, moments, start + half_way)
            if event is None:
                continue
            panel = panel_over(random, event, moments) if occluded else None
            possible = moments[start : start + length]
            if occluded and not goes_behind(event, panel, possible, half_way):
                continue
            if kind == "jump":
                event.place = draw_place(random, event, moments, panel)
            impossible = simulate(scene, event=event)[start : start + length]
            reveal = first_difference(panel, possible, impossible)
            clear = first_difference(panel, possible, impossible, least=10)
            late = clear - half_way > (length - 6 - half_way if occluded else 3)
            if late or (occluded and reveal < half_way + 2):
                continue
            event.frame = half_way
            return Twins(scene, event, panel, reveal, possible, impossible)


def draw_event(random, kind, through_wall, moments, frame):
    """An Event for some body in view, or None where the frame has none of this kind."""
    before = moments[frame - 1].bodies
    if kind == "pass":
        solids = [*before, moments[frame].wall]
        fresh = [
            (i, j)
            for i, j, closing in moments[frame].hits
            if closing > 60
            and (j == len(before) if through_wall else j < len(before))
            and in_view(before[i])
            and distance(before[i], solids[j]) > TOUCHING
        ]
        return Event(kind, frame, *fresh[random.integers(len(fresh))]) if fresh else None
    event = Event(kind, frame, int(random.integers(len(before))))
    body = before[event.body]
    if kind == "stop" and (body.edges[3] > FLOOR - 25 or math.hypot(body.vx, body.vy) < 80):
        return None
    if kind == "colour":
        free = [colour for colour in COLOURS if colour not in [body.colour for body in before]]
        event.colour = free[random.integers(len(free))] if free else None
    return event if in_view(body) and (event.colour or kind != "colour") else None


def in_view(body):
    """Whether every camera sees its centre."""
    return 45 < body.x < 275 and body.y > 35


def panel_over(random, event, moments):
    """A panel before what an event happens to; lower than a wall that is to be seen above it."""
    moment = moments[event.frame]
    actors = [moment.bodies[event.body]]
    top = -80.0
    if event.other is not None and event.other < len(moment.bodies):
        actors.append(moment.bodies[event.other])
    elif event.other is not None:
        top = moment.wall.edges[1] + random.uniform(15, 30)
    left = min(body.edges[0] for body in actors) - random.uniform(8, 22)
    right = max(body.edges[2] for body in actors) + random.uniform(8, 22)
    return left, top, right, PANEL_BOTTOM


def hides(panel, body, margin=3.0):
    """Whether a body lies wholly behind a panel, or is not there.

    margin  units, more than a pixel: the drawn edges of both are rounded
    """
    if panel is None or not body.present:
        return not body.present
    left, top, right, bottom = body.edges
    within_x = panel[0] + margin < left and right < panel[2] - margin
    return within_x and panel[1] + margin < top and bottom < panel[3] - margin


def is_clear_of(panel, body):
    """Whether a body is in view and not behind a panel, not even in part."""
    left, _, right, bottom = body.edges
    beside = right < panel[0] or left > panel[2]
    return in_view(body) and (beside or bottom < panel[1])


def goes_behind(event, panel, possible, half_way):
    """Whether what an event is to happen to is seen before, is hidden then and is seen after."""
    actors = [event.body]
    if event.other is not None and event.other < len(possible[0].bodies):
        actors.append(event.other)
    for actor in actors:
        path = [moment.bodies[actor] for moment in possible]
        if not all(hides(panel, path[i]) for i in (half_way - 1, half_way, half_way + 1)):
            return False
        for part in (path[:half_way], path[half_way:]):
            if sum(is_clear_of(panel, body) for body in part) < 3:
                return False
    return True


def draw_place(random, event, moments, panel):
    """Where a body jumps to: far off, into free air in view, behind the panel where there is one.

    Where twenty tries find no such place, it is where the body is, and shows no difference.
    """
    moment = moments[event.frame]
    body = copy.copy(moment.bodies[event.body])
    x, y = body.x, body.y
    others = [*moment.bodies[: event.body], *moment.bodies[event.body + 1 :]]
    others += [other for other in (moment.hand, moment.wall) if other]
    for _ in range(20):
        body.x, body.y = random.uniform(45, 275), random.uniform(40, FLOOR - 30)
        if panel:
            body.x = random.uniform(panel[0], panel[2])
        far = math.hypot(body.x - x, body.y - y) > (35 if panel else 60)
        free = all(distance(body, other) > 4 for other in others)
        if far and free and (panel is None or hides(panel, body)):
            return body.x, body.y
    return x, y


def first_difference(panel, possible, impossible, least=0.0):
    """The first frame in which something that differs, by more than `least` units where it is a
    place, is not wholly behind the panel; the number of frames where there is none.
    """
    for frame, (one, other) in enumerate(zip(possible, impossible)):
        if one.flicker != other.flicker:
            return frame
        for a, b in zip(one.bodies, other.bodies):
            same = (a.present, a.colour, a.half_x) == (b.present, b.colour, b.half_x)
            if same and max(abs(a.x - b.x), abs(a.y - b.y)) <= least:
                continue
            if not (hides(panel, a) and hides(panel, b)):
                return frame
    return len(possible)
