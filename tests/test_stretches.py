"""Stretches of a video, against decoding all of it and picking frames by their times."""

import av
import numpy as np
import pytest

from salt import views
from salt.containers import frames_of
from salt.errors import VideoError
from salt.odd_videos import OddVideos, odd_videos
from salt.video import read_clip, read_clips
from salt.views import View
from tests.test_data import numbered_frames, write_video

SMALL = View(frames=4, size=32, short_side=32)


def noisy_frames(count, seed=0):
    """Frames that hang on those before them: a picture that moves under noise."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (48, 64 + count, 3), dtype=np.uint8)
    return [
        picture[:, i : i + 64] // 2 + rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        for i in range(count)
    ]


def times_of(path):
    """Seconds from the first frame on of each frame that PyAV decodes."""
    with av.open(path) as container:
        times = [frame.time for frame in container.decode(container.streams.video[0])]
    return np.array(times) - times[0]


OPEN_GOP = {
    "g": "9",
    "bf": "3",
    "x264-params": "open-gop=1:scenecut=0:bframes=3:b-adapt=0:keyint=9",
}
INTRA_REFRESH = "intra-refresh=1:keyint=12:scenecut=0"
CONTAINERS = [
    ("libvpx-vp9", "webm", {"g": "10", "deadline": "realtime"}, "yuv420p"),
    ("libvpx", "webm", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "12"}, "yuv420p"),
    ("libx264", "mp4", {"g": "12", "bf": "2"}, "yuv420p"),
    ("libx264", "mp4", OPEN_GOP, "yuv420p"),
    ("libx264", "mkv", OPEN_GOP, "yuv420p"),
    ("libx264", "ts", {"g": "12", "bf": "2"}, "yuv420p"),
    ("libx264", "flv", {"g": "12", "bf": "2"}, "yuv420p"),
    ("mpeg2video", "mpg", {"g": "9", "bf": "2"}, "yuv420p"),
    ("mpeg1video", "mpg", {"g": "12", "bf": "2"}, "yuv420p"),
    ("libx264", "mp4", {"x264-params": f"{INTRA_REFRESH}:bframes=0"}, "yuv420p"),
    ("libx264", "mp4", {"x264-params": f"{INTRA_REFRESH}:bframes=3"}, "yuv420p"),
    ("mpeg2video", "ts", {"g": "9", "bf": "2"}, "yuv420p"),
    ("mpeg4", "avi", {"g": "12"}, "yuv420p"),
    ("mpeg4", "avi", {"g": "12", "bf": "2"}, "yuv420p"),
    ("mpeg4", "mov", {"g": "12", "bf": "2"}, "yuv420p"),
    ("ffv1", "mkv", {}, "bgr0"),
    ("mjpeg", "mov", {"qscale": "2"}, "yuvj420p"),
    ("gif", "gif", {}, "rgb8"),
]


@pytest.mark.parametrize("held", [2**26, 0])
@pytest.mark.parametrize("codec, suffix, options, pix_fmt", CONTAINERS)
def test_a_stretch_has_the_frames_and_pixels_of_the_whole(
    tmp_path, monkeypatch, codec, suffix, options, pix_fmt, held
):
    monkeypatch.setattr(
        "salt.video.HELD_BYTES", held
    )  # 0: as a video too large to hold its packets
    path = write_video(
        tmp_path / f"v.{suffix}",
        noisy_frames(60),
        codec,
        25,
        pix_fmt,
        options=options,
        bit_rate=2_000_000,
    )
    times = times_of(path)
    whole = read_clip(path, View(frames=len(times), size=32, short_side=32))
    for start, end in [
        (0, 0.6),
        (0.3, 0.5),
        (0.48, 1.23),
        (1.0, None),
        (None, 0.04),
        (2.36, 9),
        (0.71, 0.74),
        (1.48, 1.8),
        (2.0, None),
    ]:
        inside = np.flatnonzero((times >= (start or 0) - 5e-4) & (times < (end or 99) - 5e-4))
        assert len(inside)
        clip, jittered = read_clips(
            path, [SMALL, View(frames=4, size=32, short_side=32, view=2)], "id", start, end
        )
        expected = inside[views.frame_numbers(len(inside), SMALL)]
        assert np.array_equal(clip, whole[expected]), (start, end)
        assert np.array_equal(
            jittered,
            read_clip(path, View(frames=4, size=32, short_side=32, view=2), "id", start, end),
        )


def test_times_that_do_not_rise_are_refused(tmp_path):
    """An AVI states no times; those that are guessed for reordered frames are not theirs."""
    options = {"g": "10", "bf": "3"}
    path = write_video(
        tmp_path / "v.avi", noisy_frames(60), "libx264", 25, "yuv420p", options=options
    )
    assert read_clip(path, SMALL).shape == (4, 32, 32, 3)
    with pytest.raises(VideoError, match="times for its frames that do not rise"):
        read_clip(path, SMALL, "id", 0.28, 0.6)


def test_a_variable_frame_rate_is_cut_by_time(tmp_path):
    ticks = np.cumsum([0, 1, 1, 5, 1, 9, 1, 1, 30, 1, 2, 1, 1, 1]).tolist()
    path = write_video(tmp_path / "v.mkv", numbered_frames(14), "ffv1", 10, "bgr0", times=ticks)
    clip = read_clip(path, View(frames=3, size=32, short_side=32), start=0.7, end=1.9)
    assert np.rint((clip.mean((1, 2, 3)) - 10) / 4).tolist() == [
        3,
        5,
        6,
    ]  # frames 3 to 6 are shown at 0.7, 0.8, 1.7 and 1.8 s


def test_episodes_of_a_file_share_no_frame_and_lose_none(tmp_path):
    """Ends and starts as lists have them: float64, float32, or rounded to milliseconds."""
    path = write_video(
        tmp_path / "v.mp4",
        numbered_frames(60),
        "mpeg4",
        30,
        options={"qscale": "1", "g": "10"},
        bit_rate=9_000_000,
    )
    webm = write_video(
        tmp_path / "v.webm", numbered_frames(60), "libvpx-vp9", 30, bit_rate=9_000_000
    )
    for video in (path, webm):
        for rounded in (float, np.float32, lambda time: round(time, 3)):
            bounds = [0, 7, 19, 20, 43, 60]
            seen = []
            for first, last in zip(bounds, bounds[1:], strict=False):
                view = View(frames=last - first, size=32, short_side=32)
                clip = read_clip(
                    video, view, None, float(rounded(first / 30)), float(rounded(last / 30))
                )
                seen += np.rint((clip.mean((1, 2, 3)) - 10) / 4).astype(int).tolist()
            assert seen == list(range(60))


def test_what_lies_far_before_a_stretch_is_not_decoded(tmp_path, monkeypatch):
    path = write_video(
        tmp_path / "v.mp4", noisy_frames(100), "libx264", 25, options={"g": "10", "bf": "2"}
    )
    fed = []

    def counted(packet):
        fed.append(packet.pts)
        return frames_of(packet)

    for module in ("containers", "video"):
        monkeypatch.setattr(f"salt.{module}.frames_of", counted)
    read_clip(path, SMALL, None, 3.0, 3.4)
    assert (
        10 <= len(fed) <= 10 + 10 + 8
    )  # one group of pictures before it, and what the decoder holds back; and the first frame


def test_an_empty_stretch_is_one_clear_error(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered_frames(20), "mpeg4", 10)
    for start, end in ((2.0, 3.0), (0.51, 0.59), (50.0, None)):
        with pytest.raises(
            VideoError,
            match=rf"v.mp4 holds no frame from {start} s to {'its end' if end is None else end}",
        ):
            read_clip(path, SMALL, None, start, end)


def test_long_clips_are_warned_of_once(tmp_path):
    said, watch = [], OddVideos()
    watch.watch(60.0, said.append)
    watch.note_span("a.mp4", 60.0)
    watch.note_span("b.mp4", 61.0)
    watch.note_span("c.mp4", 99.0)
    assert len(said) == 1 and "spans 61 seconds of b.mp4, more than longest_seconds = 60" in said[0]


def test_the_span_of_a_clip_is_that_of_its_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mkv", numbered_frames(40), "ffv1", 10, "bgr0")
    noted = []
    monkeypatch.setattr(
        odd_videos, "note_span", lambda video, seconds: noted.append(round(seconds, 6))
    )
    read_clips(
        path,
        [
            View(frames=4, size=32, short_side=32),
            View(frames=4, size=32, short_side=32, sampling="stride"),
        ],
    )
    read_clip(path, View(frames=4, size=32, short_side=32), None, 1.0, 2.0)
    assert sorted(noted) == [0.7, 1.2, 3.0]


@pytest.mark.parametrize("end, noted", [(None, False), (4.0, False), (4.3, False), (2500.0, True)])
def test_an_end_in_other_units_is_noticed(tmp_path, said, end, noted):
    path = write_video(tmp_path / "v.mkv", numbered_frames(40), "ffv1", 10, "bgr0")
    read_clip(path, SMALL, None, 1.0, end)
    assert [f"{path} ends after 3 s of 2499 s" in line for line in said] == [True] * noted


def test_the_end_of_a_stretch_late_in_a_file_is_its_own(tmp_path, said):
    """Half of it is missing, which is little of the file."""
    path = write_video(tmp_path / "v.mkv", numbered_frames(60), "ffv1", 1, "bgr0")
    read_clip(path, SMALL, None, 50.0, 60.0)
    read_clip(path, SMALL, None, 55.0, 65.0)
    assert len(said) == 1 and f"{path} ends after 5 s of 10 s" in said[0]


def test_a_file_without_times_has_no_stretches(tmp_path):
    path = write_video(tmp_path / "v.h264", numbered_frames(20), "libx264", 10)
    assert read_clip(path, SMALL).shape == (4, 32, 32, 3)
    with pytest.raises(VideoError, match="v.h264 states no times for its frames"):
        read_clip(path, SMALL, None, 0.5, 0.9)
