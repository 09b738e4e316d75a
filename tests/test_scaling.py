"""csrc/frames.cpp against swscale: the same bits, or swscale itself."""

import itertools
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest

from salt import scaling, video
from salt.extension import EXTENSION, salt_ops
from salt.frames import Scaler
from salt.views import View
from tests.test_data import numbered_frames, write_video

pytestmark = pytest.mark.skipif(
    EXTENSION["simd"] not in ("avx2", "avx512"), reason="csrc/frames.cpp wants AVX2"
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Weights are measured for the first video of a shape, by this test alone."""
    monkeypatch.setattr(scaling, "PATIENCE", 1)
    scaling.known.clear()
    yield
    scaling.known.clear()


def frame_of_noise(size, pixels="yuv420p", full=False, bt709=False, seed=0):
    frame = av.VideoFrame(*size, pixels)
    frame.color_range = 2 if full else 1
    frame.colorspace = 1 if bt709 else 6
    random = np.random.default_rng(seed)
    for plane in frame.planes:
        plane.update(random.bytes(plane.buffer_size))
    return frame


def converted(frame, view, place=None):
    """(what becomes of a frame, whether csrc/frames.cpp made it)."""
    scaler = Scaler("a frame")
    out = np.zeros((3, view.size, view.size), np.uint8)
    scaler.convert(frame, view, place, out)
    (work,) = scaler.scalings.values()
    return out, work is not None


def by_swscale(monkeypatch, call):
    with monkeypatch.context() as without:
        without.setitem(EXTENSION, "simd", "none")
        return call()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "area"])
@pytest.mark.parametrize("pixels", scaling.FORMATS)
def test_the_bits_of_swscale(monkeypatch, pixels, interpolation):
    """Both matrices and ranges, cropped and whole, larger and smaller, sides odd and even."""
    shapes = [
        ((320, 240), View(crop="squash", interpolation=interpolation)),
        ((427, 240), View(size=112, short_side=128, interpolation=interpolation)),
        ((99, 77), View(crop="squash", size=112, short_side=112, interpolation=interpolation)),
        ((1280, 720), View(size=64, short_side=64, interpolation=interpolation)),
        ((51, 131), View(size=50, short_side=50, interpolation=interpolation)),
    ]
    for (size, view), full, bt709 in itertools.product(shapes, (False, True), (False, True)):
        for place in (None, (0.9, 0.3)):
            frame = frame_of_noise(size, pixels, full, bt709, seed=1)
            made, by_kernel = converted(frame, view, place)
            expected, _ = by_swscale(
                monkeypatch, lambda frame=frame, view=view, p=place: converted(frame, view, p)
            )
            assert by_kernel and np.array_equal(made, expected), (size, full, bt709, place)
            assert made.std() > 5


@pytest.mark.parametrize(
    "view", [View(size=96, short_side=96), View(size=48, short_side=64, view=3)]
)
def test_where_chroma_samples_lie(tmp_path, monkeypatch, view):
    """Three places in files of one shape, of which PyAV tells nothing: three sets of weights."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (10, 24, 32, 3), dtype=np.uint8)
    frames = list(coarse.repeat(5, 1).repeat(5, 2))
    clips = []
    for place in (0, 1, 2):
        path = write_video(
            tmp_path / f"{place}.mp4",
            frames,
            "libx264",
            options={"x264-params": f"chromaloc={place}", "qp": "1"},
        )
        expected = by_swscale(monkeypatch, lambda path=path: video.read_clip(path, view, "id"))
        for _ in range(2):
            assert np.array_equal(video.read_clip(path, view, "id"), expected)
        clips.append(expected)
    assert not np.array_equal(clips[0], clips[1]) and not np.array_equal(clips[0], clips[2])
    (known,) = scaling.known.values()
    assert len(known.scalings) == 3 and all(known.scalings.values()) and known.videos == 6


def test_chroma_samples_move_in_the_middle_of_a_video(tmp_path, monkeypatch):
    """Two streams one after the other, of which PyAV tells no difference."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (10, 24, 32, 3), dtype=np.uint8).repeat(5, 1).repeat(5, 2)
    joined = tmp_path / "joined.h264"
    for place in (0, 2):
        options = {"x264-params": f"chromaloc={place}:bframes=0", "qp": "1"}
        path = write_video(tmp_path / f"{place}.h264", list(frames), "libx264", options=options)
        with open(joined, "ab") as file, open(path, "rb") as part:
            file.write(part.read())
    for view in (View(size=48, short_side=64), View(frames=4, size=96, short_side=96)):
        expected = by_swscale(monkeypatch, lambda view=view: video.read_clip(joined, view))
        assert np.array_equal(video.read_clip(joined, view), expected)
    assert [len(known.scalings) for known in scaling.known.values()] == [2, 2]
    assert [known.videos for known in scaling.known.values()] == [1, 1]


def test_rows_from_the_bottom_up(monkeypatch):
    """Rows that go backwards, as those of the copy by which weights are measured do not."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=96, height=80, format="yuv420p", time_base=Fraction(1, 25))
    flip, sink = graph.add("vflip"), graph.add("buffersink")
    source.link_to(flip)
    flip.link_to(sink)
    graph.configure()
    frame = frame_of_noise((96, 80))
    graph.push(frame)
    flipped = graph.pull()
    assert flipped.planes[0].line_size < 0
    view = View(size=64, short_side=64, crop="squash")
    expected, _ = by_swscale(monkeypatch, lambda: converted(flipped, view))
    made, _ = converted(flipped, view)
    assert np.array_equal(made, expected) and made.std() > 5


def test_what_is_not_the_same_does_not_count(monkeypatch):
    view = View(size=64, short_side=64)
    frame = frame_of_noise((80, 72))
    right, _ = by_swscale(monkeypatch, lambda: converted(frame, view))
    axis_of = scaling.axis_of
    for wrong in (lambda table: axis_of(np.roll(table, 1, 0)), lambda table: axis_of(2 * table)):
        scaling.known.clear()
        with monkeypatch.context() as patched:
            patched.setattr(scaling, "axis_of", wrong)
            made, by_kernel = converted(frame, view)
            assert not by_kernel and np.array_equal(made, right)
            patched.setattr(scaling, "measure", None)  # not a second time
            assert not converted(frame, view)[1]


@pytest.mark.parametrize("shape, size", [((216, 130), 1), ((300, 80), 16)])
def test_too_few_pixels_to_tell(shape, size):
    """A single pixel may be the same by chance; so may what is made very much smaller."""
    view = View(size=size, short_side=size, crop="squash")
    assert not converted(frame_of_noise(shape), view)[1]


@pytest.mark.parametrize(
    "size, pixels",
    [((80, 72), "yuv420p10le"), ((80, 72), "nv12"), ((80, 72), "gbrp"), ((24, 20), "yuv420p")],
)
def test_what_is_left_to_swscale(size, pixels):
    made, by_kernel = converted(frame_of_noise(size, pixels), View(size=32, short_side=32))
    assert not by_kernel and made.std() > 10


@pytest.mark.parametrize("flags", ["", "+ildct+ilme"])
def test_interlaced_frames(tmp_path, monkeypatch, flags):
    """swscale may see two fields in them."""
    random = np.random.default_rng(0)
    frames = list(random.integers(0, 256, (6, 96, 128, 3), dtype=np.uint8))
    options = {"flags": flags, "top": "1", "qscale": "2"} if flags else {"qscale": "2"}
    path = write_video(tmp_path / "v.mpg", frames, "mpeg2video", 25, options=options)
    with av.open(path) as container:
        assert next(container.decode(video=0)).interlaced_frame == bool(flags)
    view = View(frames=4, size=64, short_side=64)
    expected = by_swscale(monkeypatch, lambda: video.read_clip(path, view))
    for _ in range(3):
        assert np.array_equal(video.read_clip(path, view), expected)


def test_weights_are_measured_where_a_shape_is_common(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "PATIENCE", 3)
    path = write_video(tmp_path / "v.webm", numbered_frames(12))
    clips = []
    for videos in (1, 2, 3, 4):
        clips.append(video.read_clip(path, View(frames=4, size=32, short_side=32)))
        (known,) = scaling.known.values()
        assert known.videos == videos and len(known.scalings) == (videos >= 3)
    assert all(np.array_equal(clip, clips[0]) for clip in clips)


def test_planes_too_small_are_refused():
    frame = frame_of_noise((80, 72))
    key = scaling.key_of(frame, (72, 80), 64, Scaler("a frame").exact)
    work = scaling.measure(frame, key)
    planes, out = scaling.planes_of(frame), np.zeros((3, 64, 64), np.uint8)
    work.convert(planes, out)
    y, stride = planes[0][0], planes[0][2]
    for bad in ((y, -1, stride), (y, 1, y.buffer_size), (y, stride, stride + 1), (y, 0, -stride)):
        with pytest.raises(RuntimeError, match="72 rows of 80 are needed"):
            work.convert([bad, *planes[1:]], out)
    for bad in (out[:, :, 1:], out[:, ::-1]):
        with pytest.raises(RuntimeError, match="in one piece"):
            work.convert(planes, bad)
    axis = scaling.axis_of(np.eye(64, 72, dtype=np.int64))
    for bad in (
        (60, *axis[1:]),
        (axis[0], axis[1][:9], axis[2]),
        (axis[0], axis[1] - 1, axis[2]),
    ):
        with pytest.raises(RuntimeError, match="must"):
            salt_ops.Scaling(64, [axis, bad], [axis, axis], [0] * 6)
    with pytest.raises(ValueError, match="too short"):
        tiny = scaling.axis_of(np.ones((64, 5), np.int64))
        salt_ops.Scaling(64, [axis, tiny], [axis, axis], [0] * 6)
