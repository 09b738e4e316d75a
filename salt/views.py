"""Views: how a clip is cut out of a video. What the teacher saw is what the student sees."""

import dataclasses
import hashlib
import json
import math

import numpy as np

from salt.errors import InputError, nearest
from salt.masks import STREAMS, Random

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class View:
    """How a clip is cut out of a video. Everything that decides a pixel stands here, in the cache
    and in every checkpoint.

    frames         frames a clip
    size           pixels of the square clip's side
    short_side     pixels of the frame's short side before the crop
    sampling       'uniform': frame floor((i + 0.5) * n / frames) of the n decoded frames in
                   `window`; 'stride': every stride-th frame about the middle
    crop           'center', or 'squash': the whole frame made square
    interpolation  'bilinear', 'bicubic' or 'area', as swscale does them
    window         the part of the video that frames are taken from, as fractions of its frames
    view           0: as above. > 0: crop and time jittered, by Philox from (seed, video id, view)
    """

    frames: int = 16
    size: int = 224
    short_side: int = 224
    sampling: str = "uniform"
    stride: int = 4
    crop: str = "center"
    interpolation: str = "bilinear"
    window: tuple = (0, 1)
    view: int = 0
    seed: int = 0

    # two fractions of the room that a crop has, down and to the right; None: the middle
    place = None

    def __post_init__(self):
        object.__setattr__(self, "window", tuple(float(x) for x in self.window))
        choices = {
            "sampling": ("uniform", "stride"),
            "crop": ("center", "squash"),
            "interpolation": ("bilinear", "bicubic", "area"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"a view's {name} is {' or '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name, least in (
            ("frames", 1),
            ("size", 1),
            ("short_side", 1),
            ("stride", 1),
            ("view", 0),
            ("seed", 0),
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise InputError(
                    f"a view's {name} is a whole number of at least {least}, not"
                    f" {getattr(self, name)!r}"
                )
        if self.crop == "center" and self.short_side < self.size:
            raise InputError(
                f"a view's short_side ({self.short_side}) must be at least its size ({self.size})"
            )
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1:
            raise InputError(
                f"a view's window is two rising fractions in [0, 1], not {self.window}"
            )

    def to_dict(self):
        return {**dataclasses.asdict(self), "window": list(self.window)}

    @classmethod
    def from_dict(cls, fields):
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise InputError(f"a view has no field {name!r}{nearest(name, names)}")
        return cls(**fields)

    def cut_as(self, other):
        """These frames and pixels, cut out of a video as `other` cuts its own."""
        short_side = round(other.short_side * self.size / other.size)
        return dataclasses.replace(
            self,
            short_side=short_side,
            sampling=other.sampling,
            stride=other.stride,
            crop=other.crop,
            interpolation=other.interpolation,
        )

    def hash(self):
        """16 hex digits of SHA-256 over the fields."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other):
        """'size is 224 here and 96 there', naming each field in which two views differ; '' where
        they agree.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        return ", ".join(
            f"{name} is {mine[name]} here and {theirs[name]} there"
            for name in mine
            if mine[name] != theirs[name]
        )

    def part(self, n):
        """(first, how many) of a video's n frames that a clip is taken from."""
        first = min(int(self.window[0] * n), n - 1)
        return first, max(1, min(math.ceil(self.window[1] * n), n) - first)


@dataclasses.dataclass(frozen=True)
class SegmentView(View):
    """A clip of one of the equal `segments` of a video, and of the square at `along` of its longer
    side, as V-JEPA 2 cuts them for its test (src/datasets/video_dataset.py): where a segment is
    shorter than frames * stride, segments of that many frames overlap.
    """

    segments: int = 1
    segment: int = 0
    along: float | None = None  # 0: left, or top; 1: right, or bottom; None: as a View does

    @property
    def place(self):
        return None if self.along is None else (self.along, self.along)

    def part(self, n):
        count = max(1, n // self.segments)
        if self.sampling == "stride":
            count = min(n, max(count, self.frames * self.stride))
        steps = max(1, self.segments - 1)
        return (n - count) * self.segment // steps, count


class MirroredView(View):
    """Takes the frames that the same view takes of the video played backwards, in the video's own
    order: whatever the rounding of frame numbers is, played backwards they are spaced as the others
    are played forwards."""


def sample_id(video_id, view=0):
    """The 63-bit number that masks and jitter are drawn from: the first 63 bits of SHA-256 of
    "video id,view number".
    """
    return int.from_bytes(hashlib.sha256(f"{video_id},{view}".encode()).digest()[:8], "big") >> 1


def random_half(video_id, seed):
    """A window of half a video whose place is drawn by Philox from (seed, video id)."""
    start = Random(seed, 0, sample_id(video_id), STREAMS["half"]).uniform() / 2
    return (start, start + 0.5)


def frame_numbers(n, view, random=None):
    """Which of a video's n frames a clip takes: int [view.frames], not falling; short videos repeat
    frames.
    """
    first, count = view.part(n)
    i = np.arange(view.frames)
    if view.sampling == "uniform":
        offset = np.array([random.uniform() for _ in i]) if random else 0.5
        picked = np.floor((i + offset) * count / view.frames).astype(int)
    else:
        slack = max(0, count - 1 - (view.frames - 1) * view.stride)
        start = (
            random.below(slack + 1)
            if random
            else (count - 1 - (view.frames - 1) * view.stride) // 2
        )
        picked = start + i * view.stride
    picked = np.clip(picked, 0, count - 1)
    return first + (count - 1 - picked[::-1] if isinstance(view, MirroredView) else picked)


def grid_of(view, patch, tubelet=2):
    """(time, height, width) in tokens.

    Raises InputError where the clip does not divide into patches.
    """
    if view.size % patch or view.frames % tubelet:
        raise InputError(
            f"clips of {view.frames} frames of {view.size}x{view.size} do not divide into patches"
            f" of {patch} and tubelets of {tubelet}"
        )
    return (view.frames // tubelet, view.size // patch, view.size // patch)
