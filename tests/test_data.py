"""Lists, views and decoding, against arithmetic done by hand and against frames whose content says
which they are.
"""

import gc
import json
import shutil
import struct
import threading
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from salt import errors, ops, video
from salt.cache import Cache, open_cache
from salt.cache_format import plan_of
from salt.cache_writer import Writer
from salt.clips import Records
from salt.errors import InputError
from salt.loader import CONTEXT, NONE, TARGET, Loader
from salt.masks import STREAMS, Random, check_batch, in_order, sample_masks, shuffled
from salt.splits import load_split
from salt.views import (
    MirroredView,
    SegmentView,
    View,
    frame_numbers,
    grid_of,
    random_half,
    sample_id,
)


def write_video(
    path,
    frames,
    codec="libvpx-vp9",
    rate=12,
    pix_fmt="yuv420p",
    times=None,
    options=None,
    **context,
):
    """Encode uint8 RGB frames, or ready VideoFrames, at `times` (frame numbers by default)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        first = frames[0]
        stream.height, stream.width = (
            (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        )
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        stream.codec_context.time_base = Fraction(1, rate)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for i, frame in enumerate(frames):
            frame = (
                frame
                if isinstance(frame, av.VideoFrame)
                else av.VideoFrame.from_ndarray(frame, format="rgb24")
            )
            frame.pts, frame.time_base = (i if times is None else times[i]), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def numbered_frames(count, size=(48, 64)):
    """Grey frames, frame i of brightness 4 i + 10: what came out says which frame it was."""
    return [np.full((*size, 3), 4 * i + 10, np.uint8) for i in range(count)]


def numbers_in(clip):
    return np.rint((clip.reshape(len(clip), -1).mean(1) - 10) / 4).astype(int).tolist()


SMALL = View(frames=8, size=32, short_side=32)


@pytest.mark.parametrize(
    "codec, suffix", [("libvpx-vp9", "webm"), ("libx264", "mp4"), ("mpeg4", "avi"), ("ffv1", "mkv")]
)
@pytest.mark.parametrize("count", [40, 13, 3, 1])
def test_uniform_takes_the_frames_of_the_formula(tmp_path, codec, suffix, count):
    path = write_video(tmp_path / f"v.{suffix}", numbered_frames(count), codec, bit_rate=8_000_000)
    clip = video.read_clip(path, SMALL)
    assert clip.shape == (8, 32, 32, 3) and clip.dtype == np.uint8
    assert numbers_in(clip) == [int((i + 0.5) * count / 8) for i in range(8)]


def test_a_variable_frame_rate_counts_frames_not_seconds(tmp_path):
    times = np.cumsum([1, 1, 5, 1, 9, 1, 1, 30, 1, 2] * 2).tolist()
    path = write_video(tmp_path / "v.webm", numbered_frames(20), times=times)
    assert numbers_in(video.read_clip(path, SMALL)) == [int((i + 0.5) * 20 / 8) for i in range(8)]


def test_webm_states_no_frame_count(tmp_path):
    path = write_video(tmp_path / "v.webm", numbered_frames(10))
    with av.open(path) as container:
        assert container.streams.video[0].frames == 0
    assert numbers_in(video.read_clip(path, View(frames=10, size=32, short_side=32))) == list(
        range(10)
    )


def test_stride_and_window(tmp_path):
    path = write_video(tmp_path / "v.mkv", numbered_frames(41), "ffv1", pix_fmt="yuv444p")
    assert numbers_in(
        video.read_clip(path, View(frames=8, size=32, short_side=32, sampling="stride", stride=4))
    ) == list(range(6, 38, 4))
    assert numbers_in(
        video.read_clip(path, View(frames=8, size=32, short_side=32, sampling="stride", stride=9))
    ) == [0, 0, 6, 15, 24, 33, 40, 40]
    half = video.read_clip(path, View(frames=8, size=32, short_side=32, window=(0.5, 1)))
    assert numbers_in(half) == [20 + int((i + 0.5) * 21 / 8) for i in range(8)]


def test_jittered_views_repeat_and_differ(tmp_path):
    rng = np.random.default_rng(0)
    path = write_video(
        tmp_path / "v.mkv",
        [rng.integers(0, 256, (48, 96, 3), dtype=np.uint8) for _ in range(30)],
        "ffv1",
        pix_fmt="bgr0",
    )
    views = [View(frames=8, size=32, short_side=40, view=v) for v in (0, 1, 1, 2)]
    clips = [video.read_clip(path, view, "some id") for view in views]
    assert np.array_equal(clips[1], clips[2])
    assert not np.array_equal(clips[0], clips[1]) and not np.array_equal(clips[1], clips[3])
    assert not np.array_equal(clips[1], video.read_clip(path, views[1], "another id"))
    for seed in range(50):  # jittered frames stay in their segments
        random = Random(seed, 0, 1, STREAMS["view"])
        picked = frame_numbers(30, views[1], random)
        assert all(int(i * 30 / 8) <= p <= (i + 1) * 30 / 8 for i, p in enumerate(picked))


def test_segments_and_squares_of_a_test(tmp_path):
    """Frames by the rule of V-JEPA 2's dataset, squares by their place in the longer side."""

    def taken(n, **how):
        views = [SegmentView(4, 32, 32, segments=2, segment=i, **how) for i in range(2)]
        return [frame_numbers(n, view).tolist() for view in views]

    assert taken(40) == [[2, 7, 12, 17], [22, 27, 32, 37]]
    stride = {"sampling": "stride", "stride": 4}
    assert taken(40, **stride) == [[3, 7, 11, 15], [23, 27, 31, 35]]
    # halves of 10 are shorter than 16 frames, which overlap
    assert taken(20, **stride) == [[1, 5, 9, 13], [5, 9, 13, 17]]
    first, second = taken(12, **stride)
    assert first == second
    assert taken(1) == [[0] * 4] * 2
    rng = np.random.default_rng(0)
    for height, width in ((32, 80), (80, 32)):
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for along, start in ((0.0, 0), (None, 24), (1.0, 48)):
            view = SegmentView(1, 32, 32, along=along)
            rows = slice(start, start + 32)
            expected = frame[:, rows] if width > height else frame[rows]
            assert np.array_equal(video.clip_of_frames(frame[None], view)[0], expected)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_is_honoured(tmp_path, turn):
    """Patches the display matrix of an mp4 track header, as phones write it (ISO 14496-12: x' = a x
    + c y, y' = b x + d y).
    """
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:32, :32, 0] = 255  # red in the top left
    path = tmp_path / "v.mp4"
    write_video(path, [frame] * 4, "mpeg4", options={"qscale": "2"})
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of fields
    # clockwise
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    content[at : at + 36] = struct.pack(
        ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
    clip = video.read_clip(str(path), View(frames=2, size=64, short_side=64))
    expected = np.rot90(frame, -turn // 90)
    assert np.abs(clip[0].astype(int) - expected).mean() < 12
    assert np.abs(clip[0].astype(int) - np.rot90(frame, -turn // 90 + 1)).mean() > 30


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_video_is_cropped_where_the_upright_one_is(tmp_path, turn):
    """The same picture stored upright and stored turned with a display matrix: a jittered,
    off-centre view cuts the same place out of both.
    """
    y, x = np.mgrid[0:96, 0:160]
    upright = np.stack([x * 255 / 159, y * 255 / 95, (x + y) % 64 * 4], -1).astype(np.uint8)
    clips = []
    for name, frame, matrix in (
        ("u", upright, (1, 0, 0, 1)),
        (
            "t",
            np.ascontiguousarray(np.rot90(upright, turn // 90)),
            {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn],
        ),
    ):
        path = tmp_path / f"{name}.mp4"
        write_video(path, [frame] * 4, "mpeg4", options={"qscale": "1"}, bit_rate=20_000_000)
        content = bytearray(path.read_bytes())
        at = content.index(b"tkhd") + 4 + 40
        a, b, c, d = matrix
        content[at : at + 36] = struct.pack(
            ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
        )
        path.write_bytes(content)
        clips.append(
            video.read_clip(
                str(path), View(frames=2, size=48, short_side=64, view=3), "some id"
            ).astype(int)
        )
    assert np.abs(clips[0][..., :2] - clips[1][..., :2]).mean() < 4
    # it is not the middle
    assert abs(clips[0][..., 0].mean() - 127) > 8 and abs(clips[0][..., 1].mean() - 127) > 8


YUV = {  # (matrix, range, bits) -> the luma weights of red and blue, and how codes map to [0, 1]
    "601": (0.299, 0.114),
    "709": (0.2126, 0.0722),
}


@pytest.mark.parametrize("matrix", ["601", "709"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("size", [(32, 32), (80, 48)])  # whole, and through the crop
def test_colour_matrix_range_and_depth(tmp_path, matrix, full, bits, size):
    """Constant YUV codes against the equations of BT.601 / BT.709."""
    codes = np.array([(120, 90, 170), (60, 160, 110), (200, 128, 128), (180, 100, 140)]) * 2 ** (
        bits - 8
    )
    frames = []
    for y, u, v in codes:
        frame = av.VideoFrame(*size, "yuv444p" if bits == 8 else "yuv444p10le")
        for plane, value in zip(frame.planes, (y, u, v)):
            plane.update(
                np.full(
                    plane.buffer_size // (1 if bits == 8 else 2),
                    value,
                    np.uint8 if bits == 8 else "<u2",
                ).tobytes()
            )
        frame.colorspace = 1 if matrix == "709" else 6
        frame.color_range = 2 if full else 1
        frames.append(frame)
    path = write_video(
        tmp_path / "v.mkv",
        frames,
        "ffv1",
        pix_fmt=frames[0].format.name,
        color_range=2 if full else 1,
        colorspace=1 if matrix == "709" else 6,
    )
    clip = video.read_clip(path, View(frames=4, size=32, short_side=32))
    kr, kb = YUV[matrix]
    unit = codes / 2 ** (bits - 8)
    luma = unit[:, 0] / 255 if full else (unit[:, 0] - 16) / 219
    blue, red = ((unit[:, i] - 128) / (255 if full else 224) for i in (1, 2))
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    expected = np.clip(np.stack([r, g, b], 1) * 255, 0, 255)
    assert np.abs(clip[:, 16, 16] - expected).max() <= 2.5, (clip[:, 16, 16], expected)


def test_resize_and_crop_match_an_independent_resize(tmp_path):
    y, x = np.mgrid[0:120, 0:200]
    frame = np.stack(
        [x * 255 / 199, y * 255 / 119, 128 + 100 * np.sin(x / 20) * np.cos(y / 17)], -1
    ).astype(np.uint8)
    path = write_video(tmp_path / "v.mkv", [frame] * 2, "ffv1", pix_fmt="bgr0")
    clip = video.read_clip(path, View(frames=2, size=48, short_side=60))
    image = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    resized = (
        F.interpolate(image, (60, 100), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    )
    assert np.abs(clip[0] - resized[6:54, 26:74]).mean() < 1.5
    squashed = video.read_clip(path, View(frames=2, size=48, short_side=48, crop="squash"))
    expected = (
        F.interpolate(image, (48, 48), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    )
    assert np.abs(squashed[0] - expected).mean() < 1.5


def test_broken_videos_are_one_clear_error(tmp_path, monkeypatch):
    good = write_video(tmp_path / "good.webm", numbered_frames(24))
    content = open(good, "rb").read()
    (tmp_path / "empty.webm").write_bytes(b"")
    (tmp_path / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "head.webm").write_bytes(content[:200])
    with av.open(str(tmp_path / "sound.webm"), "w") as container:
        stream = container.add_stream("libopus", rate=48000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 960), np.int16), format="s16", layout="mono"
        )
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    for name in ("empty", "noise", "head", "sound", "missing"):
        with pytest.raises(errors.VideoError, match=f"{name}.webm"):
            video.read_clip(str(tmp_path / f"{name}.webm"), SMALL)
    # frames this large for real would not fit a test
    monkeypatch.setattr("salt.containers.MAX_PIXELS", 1000)
    with pytest.raises(errors.VideoError, match="64x48, more than 1000 pixels"):
        video.read_clip(good, SMALL)


def test_a_truncated_video_gives_the_frames_it_has(tmp_path):
    rng = np.random.default_rng(0)
    noisy = [
        np.clip(frame + rng.integers(-8, 8, frame.shape), 0, 255).astype(np.uint8)
        for frame in numbered_frames(40)
    ]
    content = open(write_video(tmp_path / "v.webm", noisy), "rb").read()
    cut = tmp_path / "cut.webm"
    cut.write_bytes(content[: len(content) // 2])
    numbers = numbers_in(video.read_clip(str(cut), SMALL))
    assert numbers == sorted(numbers) and 10 < numbers[-1] < 30


def test_several_clips_come_from_one_decode(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    frames = [
        np.clip(frame + rng.integers(0, 60, frame.shape), 0, 255).astype(np.uint8)
        for frame in numbered_frames(30, (48, 96))
    ]
    path = write_video(tmp_path / "v.mkv", frames, "ffv1", pix_fmt="bgr0")
    views = [View(frames=4, size=32, short_side=40, view=number, seed=5) for number in range(3)] + [
        View(frames=8, size=16, short_side=16, window=(0, 0.3))
    ]
    one_by_one = [video.read_clip(path, view) for view in views]
    opened = []
    original = av.open
    monkeypatch.setattr(
        av,
        "open",
        lambda *arguments, **how: opened.append(arguments) or original(*arguments, **how),
    )
    together = video.read_clips(path, views)
    assert len(opened) == 1 and all(
        np.array_equal(a, b) for a, b in zip(together, one_by_one, strict=True)
    )
    assert not np.array_equal(together[1], together[2])


@pytest.mark.parametrize("held", [2**26, 0])
@pytest.mark.parametrize(
    "codec, suffix", [("libvpx-vp9", "webm"), ("libx264", "mp4"), ("ffv1", "mkv")]
)
def test_decoding_stops_after_the_last_kept_frame(tmp_path, monkeypatch, codec, suffix, held):
    path = write_video(tmp_path / f"v.{suffix}", numbered_frames(40), codec, bit_rate=8_000_000)
    monkeypatch.setattr(
        "salt.video.HELD_BYTES", held
    )  # 0: as a video too large to hold its packets
    decoded, original = [], video.cut

    def counting(packets, *others):
        def passing():
            for packet in packets:
                decoded.append(packet.size)
                yield packet

        return original(passing(), *others)

    monkeypatch.setattr("salt.video.cut", counting)
    assert numbers_in(
        video.read_clip(path, View(frames=8, size=32, short_side=32, window=(0, 0.5)))
    ) == [int((i + 0.5) * 20 / 8) for i in range(8)]
    assert 19 <= len(decoded) <= 19 + 1 + 4  # frame 18 is the last; some codecs hold a few back


@pytest.mark.parametrize("broken", [[0], [9], [23], [0, 5, 22]])
def test_a_packet_that_gives_no_frame_is_not_counted(tmp_path, broken):
    """A packet that the decoder refuses: the clip is cut out of the frames that there are."""
    path = write_video(
        tmp_path / "v.mkv",
        numbered_frames(24),
        "mjpeg",
        options={"qscale": "2"},
        pix_fmt="yuvj420p",
    )
    with av.open(path) as source, av.open(str(tmp_path / "w.mkv"), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size:
                if i in broken:
                    empty = av.Packet(b"\x00" * 5)
                    empty.pts = packet.pts
                    empty.dts = packet.dts
                    empty.time_base = packet.time_base
                    packet = empty
                packet.stream = stream
                sink.mux(packet)
    there = [i for i in range(24) if i not in broken]

    def took(view, have):
        return [have[i] for i in frame_numbers(len(have), view).tolist()]

    whole = list(range(24))
    # what comes after the last frame that is kept does not matter
    expected = took(SMALL, whole if broken == [23] else there)
    assert numbers_in(video.read_clip(str(tmp_path / "w.mkv"), SMALL)) == expected
    # Cut beside others, each view's clip is what it is alone.
    views = [
        SMALL,
        View(frames=4, size=32, short_side=32, window=(0, 0.4)),
        View(frames=24, size=32, short_side=32),
        View(frames=8, size=32, short_side=32, view=2),
    ]
    alone = [video.read_clip(str(tmp_path / "w.mkv"), view) for view in views]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0]):
        assert all(
            np.array_equal(clip, alone[i])
            for clip, i in zip(
                video.read_clips(str(tmp_path / "w.mkv"), [views[i] for i in order]),
                order,
                strict=True,
            )
        )
    assert numbers_in(alone[2]) == took(views[2], there)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p10le", "bgr0", "gray"])
@pytest.mark.parametrize("size", [(33, 47), (64, 40), (17, 90)])
def test_the_crop_is_the_middle_square(tmp_path, pix_fmt, size):
    """Odd sizes and every chroma layout: brightness rises along one axis, so that a clip's range
    says where it was cut.
    """
    height, width = size
    ramp = np.broadcast_to(
        (
            np.linspace(20, 235, max(size))[:, None]
            if height > width
            else np.linspace(20, 235, max(size))[None]
        ),
        size,
    )
    path = write_video(
        tmp_path / "v.mkv",
        [np.repeat(ramp[..., None], 3, 2).astype(np.uint8)] * 2,
        "ffv1",
        pix_fmt=pix_fmt,
    )
    clip = video.read_clip(path, View(frames=2, size=16, short_side=16)).astype(float)
    side = min(size)
    first = (max(size) - side) / 2
    # centres of the first and last pixel
    edges = np.interp(
        [first + side / 32 - 0.5, first + side - side / 32 - 0.5],
        np.arange(max(size)),
        np.linspace(20, 235, max(size)),
    )
    along = clip[0].mean(2).mean(1 if height > width else 0)
    # the chroma grid, and the edge's own filter
    assert np.abs(along[[0, -1]] - edges).max() < 215 / max(size) * 1.6 + 2


def test_grey_levels_do_not_depend_on_the_width(tmp_path):
    """swscale has a faster conversion for widths that are multiples of 8, which is two levels too
    dark.
    """
    path = write_video(
        tmp_path / "v.mkv", [np.full((48, 64, 3), 180, np.uint8)] * 2, "ffv1", pix_fmt="yuv420p"
    )
    for size in (31, 32, 40, 45):
        assert (
            abs(video.read_clip(path, View(frames=2, size=size, short_side=size)).mean() - 180) < 1
        )


# ------------------------------------------------------------------------------------------ patches


def test_patches_are_ordered_as_a_conv3d_flattens():
    clip = np.random.default_rng(0).integers(0, 256, (4, 64, 48, 3), dtype=np.uint8)
    patches = ops.patchify(clip)
    assert patches.shape == (2 * 4 * 3, 3 * 2 * 16 * 16)
    conv = torch.nn.Conv3d(3, 5, (2, 16, 16), (2, 16, 16))
    expected = (
        conv(torch.from_numpy(clip).float().permute(3, 0, 1, 2)[None]).flatten(2).transpose(1, 2)[0]
    )
    got = F.linear(torch.from_numpy(patches).float(), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)
    assert np.array_equal(ops.unpatchify(patches, (2, 4, 3)), clip)
    batch = torch.from_numpy(np.stack([clip, clip]))
    assert torch.equal(ops.unpatchify(ops.patchify(batch), (2, 4, 3)), batch)


def test_default_view_gives_1568_tokens():
    assert grid_of(View(), 16) == (8, 14, 14)
    assert ops.patchify(np.zeros((16, 224, 224, 3), np.uint8)).shape == (1568, 1536)
    with pytest.raises(InputError, match="do not divide"):
        grid_of(View(), 15)


def test_views_hash_and_compare():
    assert View() == View.from_dict(json.loads(json.dumps(View().to_dict())))
    assert View().hash() != View(size=112, short_side=112).hash()
    assert "size is 224 here and 96 there" in View().difference(View(size=96))
    for fields, message in (
        ({"sampling": "random"}, "sampling"),
        ({"frames": 0}, "frames"),
        ({"window": (0.5, 0.5)}, "window"),
        ({"size": 300}, "short_side"),
    ):
        with pytest.raises(InputError, match=message):
            View(**fields)
    with pytest.raises(InputError, match="no field 'sise'; did you mean size"):
        View.from_dict({"sise": 3})


def test_random_halves_are_halves_anywhere():
    windows = [random_half(str(i), 0) for i in range(500)]
    assert all(abs(end - start - 0.5) < 1e-12 and 0 <= start <= 0.5 for start, end in windows)
    assert 0.2 < np.mean([start for start, _ in windows]) < 0.3 and windows[3] == random_half(
        "3", 0
    )


# -------------------------------------------------------------------------------------------- lists


def make_folder(tmp_path, names, sub=""):
    (tmp_path / sub).mkdir(exist_ok=True, parents=True)
    for name in names:
        (tmp_path / sub / name).write_bytes(b"x")


@pytest.mark.parametrize(
    "list_name", ["train.json", "something-something-v2-train.json", "labels/train.json"]
)
@pytest.mark.parametrize("sub", ["", "videos", "20bn-something-something-v2"])
def test_ssv2_layouts(tmp_path, list_name, sub):
    make_folder(tmp_path, ["1.webm", "2.mp4", "9.txt"], sub)
    (tmp_path / "labels").mkdir()
    (tmp_path / list_name).write_text(
        json.dumps(
            [
                {"id": "1", "label": "pushing a cup", "template": "Pushing [something]"},
                {"id": 2},
                {"id": "3"},
            ]
        )
    )
    said = []
    rows = load_split(str(tmp_path), "train", log=said.append)
    assert [row.id for row in rows] == ["1", "2", "3"] and rows[0].label == "Pushing something"
    assert (
        rows[0].path.endswith("1.webm") and rows[1].path.endswith("2.mp4") and rows[2].path is None
    )
    assert list_name in said[0]


def test_lists_are_looked_for_in_splits_dir(tmp_path):
    make_folder(tmp_path / "videos", ["1.webm"])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "validation.json").write_text('[{"id": "1"}]')
    rows = load_split(str(tmp_path / "videos"), "validation", str(tmp_path / "lists"))
    assert rows[0].path and rows[0].label is None


def test_a_folder_without_lists_splits_by_hash(tmp_path):
    make_folder(tmp_path, [f"clip{i}.mp4" for i in range(300)])
    train, held_out = (load_split(str(tmp_path), split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 300 and 15 < len(held_out) < 50
    assert not {row.id for row in train} & {row.id for row in held_out}
    make_folder(tmp_path, ["a\tb.webm"], "odd")
    with pytest.raises(InputError, match="found no video in .*1 with control characters"):
        load_split(str(tmp_path / "odd"), "train")
    make_folder(tmp_path, ["a.webm"], "validation")
    assert [row.id for row in load_split(str(tmp_path), "validation")] == ["validation/a"]


def test_csv_lists(tmp_path):
    make_folder(tmp_path, ["a.mp4", "b.webm"], "in")
    (tmp_path / "train.csv").write_text("\ufeffpath,label\nin/a.mp4,grasp\nin/b.webm\n")
    rows = load_split(str(tmp_path), "train")
    assert [(row.id, row.label) for row in rows] == [("in/a", "grasp"), ("in/b", None)] and rows[
        1
    ].path
    both = [load_split(str(tmp_path / "train.csv"), split) for split in ("train",)]
    assert {row.id for row in both[0]} <= {"in/a", "in/b"}


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"moving [something]": "0"}', "label table"),
        ('[{"label": "x"}]', "row 0"),
        ('[{"id": "1"}, {"id": "../../etc/passwd"}]', "row 1: the id"),
        ('[{"id": "a/b"}]', "plain file name"),
        ("[{", "not a readable JSON"),
        ("[" * 200000, "not a readable JSON"),
        ("[]", "is empty"),
        ('[{"id": "1"}, {"id": 1}]', "twice"),
        ('[{"id": "7"}]', "none of the 1 videos"),
        ('[{"id": true}]', "row 0"),
        ('[{"id": "1", "label": 3}]', "label 3"),
    ],
)
def test_malformed_lists_are_one_clear_error(tmp_path, content, message):
    make_folder(tmp_path, ["1.webm"])
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_split(str(tmp_path), "train")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_lists_and_folders(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        load_split(str(tmp_path / "nowhere"), "train")
    make_folder(tmp_path, ["1.webm"])
    (tmp_path / "train.json").write_text('[{"id": "1"}]')
    with pytest.raises(InputError, match="no list for the split 'test'"):
        load_split(str(tmp_path), "test")
    with pytest.raises(InputError, match="is a list; --data names the folder"):
        load_split(str(tmp_path / "train.json"), "train")
    make_folder(tmp_path / "few", ["a.mp4"])
    with pytest.raises(InputError, match="too few"):
        [load_split(str(tmp_path / "few"), split) for split in ("train", "validation")]
    (tmp_path / "bad.csv").write_text("../outside.mp4\n")
    with pytest.raises(InputError, match="line 1: .*leaves"):
        load_split(str(tmp_path / "bad.csv"), "train")


# ------------------------------------------------------------------------------------------ batches


class Fake:
    """A source whose clip i is filled with i."""

    cache = None
    latent_shape = None
    patch_shape = (2, 3)
    grid = (1, 1, 2)
    decodes = True

    def __init__(self, n, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def name(self, i):
        return str(i), 0

    def decode(self, i, out):
        if i in self.bad:
            raise errors.VideoError(f"video {i} is broken")
        out[:] = i


def contents(source, order, batch_size, **how):
    """The clip numbers of each batch."""
    got = []
    for batch in Loader(source, in_order(order, batch_size), **how):
        assert (
            batch.ids.tolist() == [sample_id(str(int(i))) for i in batch.patches[:, 0, 0]]
            and (batch.patches == batch.patches[:, :1, :1]).all()
        )
        got.append(batch.patches[:, 0, 0].tolist())
    return got


@pytest.mark.parametrize("threads, ahead", [(1, 1), (4, 2), (2, 5)])
def test_batches_keep_their_order_and_places(threads, ahead):
    order = [int(i) for _, records in shuffled(22, 4, 3, range(5)) for i in records]
    assert contents(Fake(22), order, 4, threads=threads, ahead=ahead) == [
        order[i : i + 4] for i in range(0, 20, 4)
    ]
    assert contents(Fake(7), range(7), 4, threads=threads) == [[0, 1, 2, 3], [4, 5, 6]]


def test_shuffled_takes_each_record_once_an_epoch_and_starts_anywhere():
    epochs = {}
    # 7 steps an epoch, one record left over
    for epoch, records in shuffled(50, 7, 3, range(21)):
        epochs.setdefault(epoch, []).append(records)
    for steps in epochs.values():
        assert len(steps) == 7 and len(set(np.concatenate(steps).tolist())) == 49
    assert list(epochs) == [0, 1, 2] and not np.array_equal(epochs[0][0], epochs[1][0])
    ((epoch, records),) = shuffled(50, 7, 3, [16])
    assert epoch == 2 and np.array_equal(records, epochs[2][2])
    assert not np.array_equal(next(shuffled(50, 7, 4, [0]))[1], epochs[0][0])


def test_a_broken_video_costs_only_its_own_place():
    """In training the next readable sample stands in, whatever batch it is; in evaluation the batch
    is smaller.
    """
    heard = []

    def listen(i, error):
        return heard.append((i, str(error)))

    assert contents(Fake(8, {1, 5, 6}), range(8), 4, failed=listen, substitutes=True) == [
        [0, 2, 2, 3],
        [4, 7, 7, 7],
    ]
    assert heard == [(i, f"video {i} is broken") for i in (1, 5, 6)]
    assert contents(Fake(8, {7}), [7, 2], 1, failed=listen, substitutes=True) == [[0], [2]]
    assert contents(Fake(7, {1, 4, 5, 6}), range(7), 4, failed=listen) == [[0, 2, 3]]
    with pytest.raises(
        InputError, match="16 videos in a row could not be decoded; the first: video 3"
    ):
        contents(Fake(30, range(3, 30)), [1, 3], 2, failed=listen, substitutes=True)
    with pytest.raises(errors.VideoError, match="video 1"):
        contents(Fake(4, {1}), range(4), 2)
    with pytest.raises(InputError, match="fewer than a batch"):
        check_batch(3, 4)


def test_preparing_is_bounded_and_ends_with_the_caller():
    """No more than `ahead` batches are prepared early, and a caller that stops leaves no thread
    behind.
    """
    begun = []

    class Counting(Fake):
        def decode(self, i, out):
            begun.append(i)
            super().decode(i, out)

    before = threading.active_count()
    stream = Loader(Counting(100), in_order(range(100), 2), threads=2, ahead=3)
    for step in range(5):
        next(stream)
        assert len(begun) <= 2 * (step + 1 + 3)
    stream.close()
    assert threading.active_count() == before and len(begun) <= 16


def test_a_loader_that_nobody_closed_is_collected_without_waiting(monkeypatch):
    """It may be collected in the start of a thread, where waiting for threads waits for ever."""
    before = threading.active_count()
    stream = Loader(Fake(4), in_order(range(4), 2), threads=2, ahead=2)
    next(stream)
    pools, kept = stream.pools, weakref.ref(stream)
    for pool in pools:  # all that was asked for is done
        pool.submit(int).result()
    waited = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", lambda thread, timeout=None: waited.append(thread))
        del stream
        gc.collect()
    assert kept() is None and waited == []
    for pool in pools:
        pool.shutdown()
    assert threading.active_count() == before


RANDOM_TEACHER = {
    "name": "t",
    "sha256": "ab",
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
    "compute": "fp32",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of 40 clips on the 2x4x4 grid, and all that is in it."""
    view, rng = View(frames=4, size=64, short_side=64), np.random.default_rng(0)
    latents = rng.normal(size=(40, 32, 6)).astype(np.float16)
    patches = rng.integers(0, 256, (40, 32, 1536), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("cache") / "c"
    writer = Writer(folder, plan_of(view, "", 40, {**RANDOM_TEACHER, "dim": 6}))
    with writer.shard(0) as shard:
        for row in range(40):
            shard.add(f"v{row}", 0, patches[row], {"latents": latents[row]})
    writer.finish()
    return open_cache(folder), latents, patches


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_of_a_cache_hold_the_rows_that_the_masks_ask_for(
    made, threads, reference, monkeypatch
):
    opened, latents, patches = made
    if reference:
        monkeypatch.setattr(ops, "EXTENSION", {**ops.EXTENSION, "devices": []})
        opened = open_cache(opened.folder)
    steps = list(shuffled(40, 5, 7, range(6, 11)))  # across the end of an epoch
    stream = Loader(
        Records(opened),
        steps,
        ["short", "long"],
        7,
        patches=CONTEXT,
        latents=TARGET,
        threads=threads,
        share=0.5,
    )
    for (epoch, records), batch in zip(steps, stream, strict=True):
        ids = torch.tensor([sample_id(f"v{record}") for record in records])
        assert torch.equal(batch.ids, ids)
        assert [drawn.family for drawn in batch.masks] == ["short", "long"]
        for drawn in batch.masks:
            expected = sample_masks(ids, epoch, 7, drawn.family, (2, 4, 4), share=0.5)
            assert torch.equal(drawn.context, expected.context) and torch.equal(
                drawn.target, expected.target
            )
            for place, record in enumerate(records):
                assert np.array_equal(
                    batch.patches[place, drawn.context[place]],
                    patches[record][drawn.context[place]],
                )
                assert np.array_equal(
                    batch.latents[place, drawn.target[place]], latents[record][drawn.target[place]]
                )


def test_other_rows_are_not_read(made, monkeypatch):
    opened, latents, patches = made
    asked = []
    original = Cache.read_rows

    def listening(self, kind, records, out, wanted=None, threads=1):
        out.view(torch.uint8).fill_(77)
        original(self, kind, records, out, wanted, threads)
        asked.append((kind, None if wanted is None else int(wanted.sum())))

    monkeypatch.setattr(Cache, "read_rows", listening)
    sampler = list(in_order(range(4), 4))
    batch = next(Loader(Records(opened), sampler, ["short", "long"], patches=CONTEXT, latents=NONE))
    context = torch.zeros(4, 32, dtype=torch.bool)
    for drawn in batch.masks:
        context.scatter_(1, drawn.context, True)
    # rows that both families want, once
    assert batch.latents is None and asked == [("patches", int(context.sum()))]
    assert (batch.patches[~context] == 77).all() and np.array_equal(
        batch.patches[context], torch.from_numpy(patches[:4])[context]
    )
    whole = next(Loader(Records(opened), sampler, ["short"]))
    assert (
        np.array_equal(whole.patches, patches[:4])
        and np.array_equal(whole.latents, latents[:4])
        and asked[1:] == [("patches", None), ("latents", None)]
    )


def test_whole_records_are_asked_for_ahead(made, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "salt.cache.advise", lambda files, starts, count: asked.append((len(files), count))
    )
    stream = Loader(
        Records(made[0]),
        in_order(range(40), 4),
        ["short"],
        patches=CONTEXT,
        latents=TARGET,
        ahead=2,
    )
    next(stream)
    stream.close()
    # patches and latents of the first batches, no further than `ahead`
    assert asked[:2] == [(4, 32 * 1536), (4, 32 * 6 * 2)] and 4 <= len(asked) <= 8


def test_a_record_that_cannot_be_read_ends_the_run_with_shard_and_row(made, tmp_path):
    folder = shutil.copytree(made[0].folder, tmp_path / "c")
    opened = open_cache(folder)
    stream = Loader(
        Records(opened),
        in_order(range(40), 4),
        ["short"],
        patches=CONTEXT,
        latents=TARGET,
    )
    next(stream)
    with open(folder / "patches-00000.npy", "r+b") as file:
        file.truncate(128 + 30 * 32 * 1536)
    with pytest.raises(InputError, match=r"patches-00000.npy, row 3\d: the file is truncated"):
        list(stream)


def test_a_failing_disk_is_not_the_videos_fault(tmp_path, monkeypatch):
    path = tmp_path / "v.webm"
    path.write_bytes(b"noise")
    with pytest.raises(errors.VideoError):
        video.read_clip(str(path), SMALL)

    def failing(*arguments, **others):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        video.read_clip(str(path), SMALL)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "how, count",
    [
        ({"sampling": "stride", "frames": 16}, 22),
        ({"sampling": "stride", "frames": 4}, 24),
        ({"frames": 12}, 16),
        ({"frames": 16}, 32),
        ({"frames": 8, "window": (0.2, 0.7)}, 30),
    ],
)
def test_a_video_played_backwards_is_cut_as_its_mirror_image(tmp_path, how, count):
    """By which the probe's two directions differ in direction alone.

    Reversing a clip is not enough: frame numbers are rounded down.
    """
    view = View(size=32, short_side=32, **how)
    mirrored = MirroredView(**view.to_dict())
    frames = numbered_frames(count)
    forwards, backwards = (
        write_video(tmp_path / f"{name}.mkv", part, "ffv1", 10, "bgr0")
        for name, part in (("f", frames), ("b", frames[::-1]))
    )
    clip, mirror = video.read_clips(forwards, [view, mirrored])
    if "window" not in how:
        assert np.array_equal(
            mirror[::-1], video.read_clip(backwards, view)
        ) and not np.array_equal(mirror, clip)
    steps, mirrored_steps = np.diff(numbers_in(clip)), np.diff(numbers_in(mirror))
    assert np.array_equal(mirrored_steps, steps[::-1]) and min(numbers_in(mirror)) >= int(
        view.window[0] * count
    )
