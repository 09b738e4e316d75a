"""Display matrices and shapes of pixels, against FFmpeg's own filters."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from salt.video import read_clip, read_clips
from salt.views import View
from tests.test_data import write_video

# (a, b, c, d) of the matrix of a track: the point (x, y) is shown at (a x + c y, b x + d y);
# and FFmpeg's filters that do as it says
MATRICES = {
    "as it is": ((1, 0, 0, 1), []),
    "mirrored": ((-1, 0, 0, 1), ["hflip"]),
    "upside down": ((1, 0, 0, -1), ["vflip"]),
    "turned by 180": ((-1, 0, 0, -1), ["hflip", "vflip"]),
    "clockwise": ((0, 1, -1, 0), ["transpose=clock"]),
    "counter-clockwise": ((0, -1, 1, 0), ["transpose=cclock"]),
    "transposed": ((0, 1, 1, 0), ["transpose=cclock_flip"]),
    "transposed the other way": ((0, -1, -1, 0), ["transpose=clock_flip"]),
}


def picture(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [
            x * 255 / (width - 1),
            y * 255 / (height - 1),
            128 + 90 * np.sin(x * 12 / width) * np.cos(y * 12 / height),
        ],
        -1,
    ).astype(np.uint8)


def set_matrix(path, a, b, c, d):
    """Writes the display matrix into the track header of an mp4 (ISO 14496-12), as phones do."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of fields
    content[at : at + 36] = struct.pack(
        ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)


def through_filters(path, filters):
    """The first frame of a video as RGB after a chain of FFmpeg's filters: uint8 [H, W, 3]."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(template=stream),
            *(graph.add(*text.split("=", 1)) for text in filters),
            graph.add("format", "gbrp"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        graph.push(frame)
        return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize(
    "view",
    [
        View(frames=1, size=48, short_side=64),
        View(frames=1, size=48, short_side=48, crop="squash"),
        View(frames=1, size=32, short_side=32, interpolation="area"),
    ],
)
@pytest.mark.parametrize("name", MATRICES)
def test_all_eight_turns_and_flips_are_ffmpegs(tmp_path, name, view):
    matrix, filters = MATRICES[name]
    path = tmp_path / "v.mp4"
    write_video(path, [picture(96, 160)] * 2, "mpeg4", options={"qscale": "1"}, bit_rate=20_000_000)
    set_matrix(path, *matrix)
    if view.crop == "center":
        filters = [
            *filters,
            f"crop={96 * view.size // view.short_side}:{96 * view.size // view.short_side}",
        ]
    expected = through_filters(
        path, [*filters, f"scale={view.size}:{view.size}:flags={view.interpolation}"]
    )
    clip = read_clip(str(path), view)[0]
    assert np.abs(clip.astype(int) - expected).mean() < 1.5
    others = [
        through_filters(path, [*MATRICES[other][1], f"scale={view.size}:{view.size}"])
        for other in MATRICES
        if other != name
    ]
    assert min(np.abs(clip.astype(int) - other).mean() for other in others) > 10


@pytest.mark.parametrize("name", MATRICES)
def test_jittered_views_cut_the_same_place_however_a_video_is_stored(tmp_path, name):
    """The same picture stored as it is, and stored so that its display matrix makes it that."""
    upright, (a, b, c, d) = picture(96, 160), MATRICES[name][0]
    stored = {  # the inverse of what the matrix does
        "clockwise": lambda: np.rot90(upright),
        "counter-clockwise": lambda: np.rot90(upright, -1),
        "transposed": lambda: upright.transpose(1, 0, 2),
        "transposed the other way": lambda: np.rot90(upright, 2).transpose(1, 0, 2),
    }
    frame = stored[name]() if name in stored else upright[::d, ::a]
    clips = []
    for file, content, matrix in (
        ("u", upright, (1, 0, 0, 1)),
        ("t", np.ascontiguousarray(frame), (a, b, c, d)),
    ):
        path = tmp_path / f"{file}.mp4"
        write_video(path, [content] * 2, "mpeg4", options={"qscale": "1"}, bit_rate=20_000_000)
        set_matrix(path, *matrix)
        views = [View(frames=2, size=48, short_side=64, view=number) for number in (1, 2, 3)]
        clips.append(np.stack(read_clips(str(path), views, "some id")).astype(int))
    assert np.abs(clips[0] - clips[1]).mean() < 4
    assert np.abs(clips[0][0] - clips[0][1]).mean() > 8  # they are different places


@pytest.mark.parametrize("turn", ["as it is", "clockwise", "mirrored"])
@pytest.mark.parametrize("sar", ["4:3", "8:9", "2:1", "1:3", "16:11"])
@pytest.mark.parametrize("size", [(288, 480), (360, 270)])
def test_pixels_that_are_not_square_are_cropped_as_they_are_shown(tmp_path, size, sar, turn):
    matrix, filters = MATRICES[turn]
    path = tmp_path / "v.mp4"
    wide, high = map(int, sar.split(":"))
    write_video(
        path,
        [picture(*size)] * 2,
        "mpeg4",
        options={"qscale": "1"},
        bit_rate=20_000_000,
        sample_aspect_ratio=Fraction(wide, high),
    )
    set_matrix(path, *matrix)
    for view in (View(frames=1, size=40, short_side=40), View(frames=1, size=40, short_side=56)):
        side = min(size[0], size[1] * wide / high) * view.size / view.short_side
        square = f"crop={round(side)}:{round(side)}"
        shown = [f"setsar={wide}/{high}", "format=gbrp", "scale=iw*sar:ih", *filters]
        expected = through_filters(
            path, [*shown, square, f"scale={view.size}:{view.size}:flags=bilinear"]
        )
        clip = read_clip(str(path), view)[0]
        assert (
            np.abs(clip.astype(int) - expected).mean() < 2.5
        )  # a pixel of the stored frame is worth up to 3
        if sar == "2:1":  # and it is not what ignoring the shape of pixels gives
            ignored = through_filters(
                path, [*filters, f"crop={min(size)}:{min(size)}", f"scale={view.size}:{view.size}"]
            )
            assert np.abs(clip.astype(int) - ignored).mean() > 8


def test_the_shape_of_pixels_may_stand_in_the_container(tmp_path):
    """Matroska states the size that a frame is shown at, as webm does."""
    path = write_video(
        tmp_path / "v.mkv",
        [picture(90, 60)] * 2,
        "mpeg4",
        options={"qscale": "1"},
        bit_rate=9_000_000,
        sample_aspect_ratio=3,
    )
    with av.open(path) as container:
        assert container.streams.video[0].sample_aspect_ratio == 3
    clip = read_clip(path, View(frames=1, size=30, short_side=30))[
        0
    ]  # shown as 180 x 90: columns 15 to 45 of 60
    assert (
        abs(clip[:, 0, 0].mean() - 15.5 * 255 / 59) < 8
        and abs(clip[:, -1, 0].mean() - 44.5 * 255 / 59) < 12
    )
    assert clip[0, :, 1].mean() < 8 and clip[-1, :, 1].mean() > 247  # all rows
