"""Oddities of real files: hidden frames, edit lists, cover art. Against what PyAV decodes."""

import re
import struct

import av
import numpy as np
import pytest

from salt import views
from salt.errors import VideoError
from salt.odd_videos import odd_videos
from salt.video import read_clip, read_clips
from salt.views import View
from tests.test_data import numbered_frames, numbers_in, write_video

VIEWS = [
    View(frames=8, size=32, short_side=32),
    View(frames=30, size=32, short_side=32),
    View(frames=4, size=32, short_side=32, window=(0, 0.5)),
    View(frames=4, size=32, short_side=32, window=(0.5, 1)),
]


def brightness(rgb):
    return int(np.rint((rgb.mean() - 10) / 4))


def decoded(path):
    """The numbers of the frames that PyAV decodes, as numbered_frames wrote them."""
    with av.open(str(path)) as container:
        return [
            brightness(frame.to_ndarray(format="rgb24"))
            for frame in container.decode(container.streams.video[0])
        ]


def expect_frames(path, numbers):
    """Every view takes its frames of `numbers`, by the formula."""
    for view, clip in zip(VIEWS, read_clips(str(path), VIEWS), strict=True):
        assert numbers_in(clip) == [numbers[i] for i in views.frame_numbers(len(numbers), view)]


def rewrite_packets(source, sink, change):
    """Copies a video packet by packet; change(number, bytes) gives the bytes of each."""
    with av.open(source) as reader, av.open(str(sink), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(reader.streams.video[0])):
            if packet.size:
                copy = av.Packet(change(number, bytes(packet)))
                copy.pts = packet.pts
                copy.dts = packet.dts
                copy.time_base = packet.time_base
                copy.is_keyframe = packet.is_keyframe
                copy.stream = stream
                writer.mux(copy)


@pytest.mark.parametrize("hidden", [[5], [1, 2, 17], [28]])
def test_frames_that_are_not_shown_are_not_counted(tmp_path, hidden):
    """VP8 hides some frames that it decodes (alt-ref): bit 4 of a packet (RFC 6386, 9.1)."""
    path = write_video(tmp_path / "v.webm", numbered_frames(30), "libvpx", bit_rate=8_000_000)

    def hide(number, content):
        return bytes([content[0] & ~16]) + content[1:] if number in hidden else content

    rewrite_packets(path, tmp_path / "h.webm", hide)
    shown = [i for i in range(30) if i not in hidden]
    assert decoded(tmp_path / "h.webm") == shown
    expect_frames(tmp_path / "h.webm", shown)


@pytest.mark.parametrize("first, count", [(13, 20), (10, 30), (3, 8)])
def test_edit_lists_are_kept_to(tmp_path, first, count):
    """An mp4 whose edit list shows a part of it, from any frame on (ISO 14496-12, 8.6.6)."""
    path = tmp_path / "v.mp4"
    write_video(
        path, numbered_frames(40), "libx264", 25, options={"g": "10", "bf": "2"}, bit_rate=8_000_000
    )
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    duration, begin, rate = struct.unpack(">IiI", content[at : at + 12])
    content[at : at + 12] = struct.pack(
        ">IiI", duration * count // 40, begin + first * 512, rate
    )  # 12800 ticks a second
    path.write_bytes(content)
    numbers = decoded(path)
    assert numbers == list(range(first, first + count))
    expect_frames(path, numbers)
    stretch = read_clip(str(path), View(frames=3, size=32, short_side=32), None, 0.08, 0.2)
    assert numbers_in(stretch) == numbers[2:5]


def with_cover(path, cover_first):
    """A video of 30 frames and a white picture as cover, in an mp4."""
    with av.open(str(path), "w") as container:
        cover = None
        for kind in ("cover", "video") if cover_first else ("video", "cover"):
            stream = container.add_stream("mjpeg" if kind == "cover" else "mpeg4", rate=25)
            stream.width = 64
            stream.height = 48
            stream.pix_fmt = "yuvj420p" if kind == "cover" else "yuv420p"
            stream.options = {"qscale": "2"}
            stream.codec_context.bit_rate = 8_000_000
            if kind == "cover":
                stream.disposition = av.stream.Disposition.attached_pic
                cover = stream
            else:
                video = stream
        white = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 255, np.uint8), format="rgb24")
        for packet in [*cover.encode(white), *cover.encode(None)]:
            container.mux(packet)
        for i, frame in enumerate(numbered_frames(30)):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


@pytest.mark.parametrize("cover_first", [True, False])
def test_cover_art_is_not_the_video(tmp_path, cover_first):
    path = tmp_path / "v.mp4"
    with_cover(path, cover_first)
    with av.open(str(path)) as container:
        assert (
            sum(
                bool(stream.disposition & av.stream.Disposition.attached_pic)
                for stream in container.streams.video
            )
            == 1
        )
    expect_frames(path, list(range(30)))


def test_the_default_track_is_the_video(tmp_path):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        still, video = (container.add_stream("ffv1", rate=10) for _ in range(2))
        for stream in (still, video):
            stream.width = 64
            stream.height = 48
            stream.pix_fmt = "bgr0"
        still.disposition = av.stream.Disposition(0)
        video.disposition = av.stream.Disposition.default
        for stream, frames in ((still, numbered_frames(1)), (video, numbered_frames(30))):
            for i, frame in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    expect_frames(path, list(range(30)))


@pytest.mark.parametrize(
    "suffix, codec", [("mp4", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
@pytest.mark.parametrize("share, noted", [(0.5, True), (1.0, False)])
def test_a_video_that_was_cut_short_is_named(tmp_path, said, suffix, codec, share, noted):
    """By the duration of an mp4 or webm, or the count of frames of an AVI."""
    path = tmp_path / f"v.{suffix}"
    frames = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for _ in range(2):
        read_clip(str(path), VIEWS[0])
    assert len(said) == len(odd_videos.broken) == noted
    if noted:
        assert f"{path} ends after " in said[0] and " of 4 s" in said[0]


@pytest.mark.parametrize(
    "suffix, sound, codec",
    [("webm", "libopus", "libvpx"), ("mkv", "aac", "libvpx"), ("flv", "aac", "libx264")],
)
def test_a_video_with_sound_that_was_cut_short_is_named(tmp_path, said, suffix, sound, codec):
    """The container's duration may be that of its sound; the track's own says it."""
    path = tmp_path / f"v.{suffix}"
    frames = np.random.default_rng(0).integers(0, 255, (80, 48, 64, 3), np.uint8)
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream(codec, rate=10), container.add_stream(sound, rate=48000)
        video.width = 64
        video.height = 48
        video.pix_fmt = "yuv420p"
        for i, frame in enumerate(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = 48000, 4800 * i
            container.mux(audio.encode(samples))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    read_clip(str(path), VIEWS[0])
    assert said == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read_clip(str(path), VIEWS[0])
    assert len(said) == 1 and re.search(r" of 8(\.\d+)? s: was it cut short, or damaged\?", said[0])


@pytest.mark.parametrize(
    "name, times, codec",
    [
        ("dropped.avi", [3 * i for i in range(36)], "mpeg4"),
        ("late.avi", range(50, 110), "mpeg4"),
        ("late.mkv", range(50, 110), "libx264"),
        ("slow.webm", [10 * i for i in range(3)], "libvpx"),
        ("held.gif", [0, 1, 2, 3, 40, 41, 42], "gif"),
        ("held.mp4", [*range(20), *range(60, 80)], "libx264"),
    ],
)
def test_whole_videos_are_not_called_damaged(tmp_path, said, name, times, codec):
    """Frames left out, a late beginning, a pause that is stated."""
    frames = np.random.default_rng(0).integers(0, 255, (110, 48, 64, 3), np.uint8)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for time in times:
            frame = av.VideoFrame.from_ndarray(frames[time], format="rgb24").reformat(
                format=stream.pix_fmt
            )
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_clip(str(tmp_path / name), VIEWS[0]).shape[0] and said == []


def test_a_second_video_track_is_said(tmp_path, said):
    frames = numbered_frames(30)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for stream in streams:
            stream.width = 64
            stream.height = 48
            stream.pix_fmt = "yuv420p"
        for frame in frames:
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    for _ in range(2):
        read_clip(str(tmp_path / "v.mp4"), VIEWS[0])
    assert len(said) == 1 and "v.mp4 has 2 video tracks, and one is used" in said[0]


@pytest.mark.parametrize(
    "where, begin, end", [((0.5, 1), None, None), ((0.25, 0.75), None, None), ((0.25, 0.75), 1, 4)]
)
@pytest.mark.parametrize(
    "suffix, options",
    [("mp4", {}), ("mp4", {"movflags": "faststart"}), ("mkv", {}), ("ts", {}), ("flv", {})],
)
def test_a_video_with_a_hole_is_named(tmp_path, said, suffix, options, where, begin, end):
    """As a download leaves it that makes room first: of the right size, a part of it zeros."""
    path = tmp_path / f"v.{suffix}"
    frames = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "12"})
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    read_clip(str(path), VIEWS[0], start=begin, end=end)
    assert said == []
    content, size = bytearray(path.read_bytes()), path.stat().st_size
    low, high = (int(share * size) for share in where)
    content[low:high] = bytes(high - low)
    path.write_bytes(content)
    try:
        read_clip(str(path), VIEWS[0], start=begin, end=end)
    except VideoError:  # its index is gone
        return
    assert len(said) == 1 and "was it cut short, or damaged?" in said[0]
