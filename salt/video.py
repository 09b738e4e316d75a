"""Decoding: a view of a video file, or of frames in memory, as a clip.

av is imported only where a video is decoded, so that training from a cache with clips
runs without it.
"""

import contextlib
import dataclasses
import errno
import itertools
import math
import os
import re
import threading
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from salt.errors import InputError
from salt.masks import STREAMS, Random
from salt.views import View, frame_numbers, sample_id

MAX_PIXELS = 64 * 2**20  # a frame larger than this is taken for a broken header
# of packets, kept between counting and decoding; a larger video is read twice
HELD_BYTES = 64 * 2**20


class VideoError(InputError):
    """A video that gives no clip; the message says which and why."""


class OddVideos:
    """Says what is odd about videos that can be decoded, by `log`.

    A clip that spans more seconds than `longest_seconds`, and a file of several video tracks: once
    a run. Videos that end long before what they, or the list, say, that have holes, or frames that
    cannot be decoded: the first three by name; `broken` holds all of them.
    """

    def __init__(self):
        self.longest_seconds = math.inf
        self.log = None
        self.lock = threading.Lock()
        self.broken, self.tracks = set(), False  # tracks: whether that is said

    def watch(self, longest_seconds, log):
        self.longest_seconds, self.log = longest_seconds, log

    def note_span(self, path, seconds):
        with self.lock:
            if self.log and seconds > self.longest_seconds:
                self.log(
                    f"warning: a clip spans {seconds:.4g} seconds of {path}, more than "
                    "longest_seconds = "
                    f"{self.longest_seconds:g}, and shows little of how things move; "
                    "cut long videos into stretches "
                    "(a CSV with the columns path,start,end), or --sampling stride. Said once a run"
                )
                self.longest_seconds = math.inf

    def note_tracks(self, path, count):
        with self.lock:
            if self.log and not self.tracks:
                self.log(
                    f"warning: {path} has {count} video tracks, and one is used. Said once a run"
                )
                self.tracks = True

    def note_broken(self, path, what):
        with self.lock:
            known = path in self.broken
            self.broken.add(path)
            if self.log and not known and len(self.broken) <= 3:
                self.log(
                    f"warning: {path} {what}: was it cut short, or damaged? Its clip is of what is"
                    f" there{'; more are not named' * (len(self.broken) == 3)}"
                )


odd_videos = OddVideos()


def read_row(row, views):
    """The clips that several views cut out of the video, or stretch of one, that a Row names."""
    if row.path is None:
        raise VideoError(f"the video of the id {row.id!r} is not in the data folder")
    return read_clips(row.path, views, row.id, row.start, row.end)


def read_clip(path, view=View(), video_id=None, start=None, end=None):
    """The clip that `view` cuts out of the video at `path`: uint8 [T, H, W, 3], RGB, T =
    view.frames, H = W = view.size.

    Its channels lie in planes (it is a transposed [T, 3, H, W]), as swscale makes them fastest and
    patches want them. video_id (the file's stem by default) decides the jitter of views > 0. Raises
    VideoError, naming the file.
    """
    return read_clips(path, [view], video_id, start, end)[0]


def read_clips(path, views, video_id=None, start=None, end=None):
    """The clips that several views cut out of one video, from one decode; a list of what read_clip
    gives.

    start, end  seconds from the video's first frame on: the views see the frames with
                start <= time < end, compared to half a millisecond, and no others

    A video's frames are counted by the packets that carry them, and again by decoding where a
    packet gives none. Decoding starts at the key frame before the stretch and stops after the last
    frame that a view keeps; a kept frame is cropped, then resized and converted in one swscale
    pass, with the colour matrix, range and shape of pixels that the file states, and turned or
    mirrored until it is upright.
    """
    import av

    name = os.path.splitext(os.path.basename(path))[0] if video_id is None else video_id
    clips = [None] * len(views)
    if isinstance(path, (str, os.PathLike)) and os.path.exists(path) and not os.path.isfile(path):
        # a pipe, a device or a folder would be read for ever, or not at all
        raise VideoError(f"{path} is no regular file")
    try:
        stretch = Stretch(path)
        if start is not None or end is not None:
            stretch = find_stretch(path, start or 0, end)
        with open_video(stretch) as (stream, packets):
            n = 0
            held = []
            size = 0
            times = []
            for packet in packets:  # headers of webm files state no count, others lie
                n += shows(packet) and stretch.holds(packet.pts)
                size += packet.size
                if packet.pts is not None:
                    times.append((packet.pts, packet.duration or 0))
                if size <= HELD_BYTES:
                    held.append(packet)
                else:
                    held.clear()
            if n == 0:
                stop = "its end" if end is None else f"{end} s"
                part = "" if stretch.first is None else f" from {start or 0} s to {stop}"
                raise VideoError(f"{path} holds no frame{part}")
            look_at_packets(stretch, stream, times)
            if size <= HELD_BYTES:
                n = cut(held, stream, views, clips, name, n, stretch)
        for _ in range(3):
            if all(clip is not None for clip in clips) or n == 0:
                break
            with open_video(stretch) as (stream, packets):
                n = cut(packets, stream, views, clips, name, n, stretch)
        if any(clip is None for clip in clips):
            raise VideoError(
                f"{path}: no frame could be decoded"
                if n == 0
                else f"{path} decodes to another number of frames each time"
            )
        return clips
    except av.FFmpegError as error:
        check_disk(path)
        raise VideoError(f"{path} cannot be decoded: {error.strerror or error}") from None


def look_at_packets(stretch, stream, packets):
    """Note a video that ends a tenth before what its container or the list says, and half a second;
    or that shows no frame for as long as that, and ten times as long as it shows most.

    packets: (time, duration) in ticks of those that state a time
    """
    first = stretch.first if stretch.first is not None else stream.start_time or 0
    begin = max(first, stretch.low)
    shown = sorted(
        entry
        for entry in packets
        if entry[0] < stretch.high and (stretch.first is None or entry[0] >= begin)
    )
    if not shown or not stream.time_base:
        return
    times, lasts = np.array(shown, np.int64).T
    gaps = np.diff(times, prepend=times[0] if stretch.first is None else begin)  # before each frame
    usual = np.median(gaps) if len(gaps) > 2 else 0
    ends = times + np.maximum(lasts, usual)
    tick, length = float(stream.time_base), ends.max() - times[0]
    holes = gaps - np.concatenate([[0], lasts[:-1]])  # less what a frame is said to be shown
    # A file that states how many frames it has (mp4, AVI) states their times with them: pauses, no
    # holes.
    if not stream.frames and holes.max() * tick > max(0.1 * length * tick + 0.5, 10 * usual * tick):
        after = (times[holes.argmax()] - gaps[holes.argmax()] - first) * tick
        odd_videos.note_broken(
            stretch.path, f"has no frame for {holes.max() * tick:.3g} s after {after:.3g} s"
        )
    container = stream.container
    tag = stream.metadata.get("DURATION", "")
    lasts_by_sound = False
    if stretch.high < math.inf:
        due = stretch.high
    elif container.format.name == "avi" and stream.frames:
        # a tick each, dropped ones too; its duration is a guess where the index is gone
        due = stream.frames
    elif stream.duration:
        due = first + stream.duration
    elif tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", tag):  # of matroska: counted from 0
        due = (3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])) / tick
    elif container.duration:
        lasts_by_sound = len(container.streams) > 1  # maybe: it is read again where that matters
        due = container.duration / 1e6 / tick
    else:
        return
    has, stated = ((time - begin) * tick for time in (ends.max(), due))
    if has < 0.9 * stated - 0.5 and not (
        lasts_by_sound and reaches(container, begin * tick + 0.9 * stated - 0.5)
    ):
        odd_videos.note_broken(stretch.path, f"ends after {has:.4g} s of {stated:.4g} s")


def reaches(container, time):
    """Whether a packet of any of its streams is at `time` seconds or later."""
    container.seek(0)
    return any(
        packet.pts is not None and packet.pts * packet.time_base >= time
        for packet in container.demux()
    )


class Stretch(NamedTuple):
    """Frames of a video: all of them, or those whose presentation time is in [low, high).

    Times are in ticks of the video's stream.
    """

    path: str
    first: int | None = (
        None  # presentation time of the video's first frame; None: the whole video, timed or not
    )
    low: float = -math.inf
    high: float = math.inf

    def holds(self, pts):
        """Whether a frame shown at `pts` is among them. Raises VideoError where it has no time."""
        if self.first is None:
            return True
        if pts is None:
            raise no_times(self.path)
        return self.low <= pts < self.high


def no_times(path):
    return VideoError(
        f"{path} states no times for its frames, so no stretch can be cut out; "
        "put it into another container"
    )


STRETCH_TOLERANCE = Fraction(1, 2000)  # seconds: webm and lists round times to milliseconds


def find_stretch(path, start, end):
    """The Stretch of a video from `start` to `end` seconds after its first frame.

    Raises VideoError where there is no frame, or one that states no time.
    """
    with open_video(Stretch(path)) as (stream, packets):
        first = next((frames[0] for frames in map(frames_of, packets) if frames), None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded")
        if first.pts is None:
            raise no_times(path)
        ticks = [
            (
                math.inf
                if time is None
                else first.pts + math.ceil((Fraction(time) - STRETCH_TOLERANCE) / stream.time_base)
            )
            for time in (start, end)
        ]
        return Stretch(path, first.pts, *ticks)


@contextlib.contextmanager
def open_video(stretch):
    """(stream, packets) of a video: all, or those from the last key frame before a stretch on."""
    import av

    opened: Any = av.open(stretch.path, "r", metadata_errors="ignore")
    with opened as container:
        stream = video_stream(container, stretch.path)
        if stretch.first is None or stretch.low <= stretch.first:
            packets = container.demux(stream)
        else:
            packets = packets_from_key(container, stream, stretch)
        if packets is not None:
            yield stream, packets_until(packets, stream, stretch)
            return
    # no seeking, or not to there: from the beginning
    opened = av.open(stretch.path, "r", metadata_errors="ignore")
    with opened as container:
        stream = video_stream(container, stretch.path)
        yield stream, packets_until(container.demux(stream), stream, stretch)


def packets_from_key(container, stream, stretch):
    """Packets from a key frame on that is shown when the stretch begins, or before.

    Containers seek by decoding time, or to any packet near by, so what comes after a seek is
    decoded and looked at, and the next try goes further back: a packet that is called a key frame
    may be one from which a decoder recovers by and by. None where no such frame is found, or the
    container states other times after a seek (MPEG program streams).
    """
    import av

    if container.format.name == "mpeg":
        return None
    back = 0
    while stretch.low - back > stretch.first:
        try:
            key, packets = key_after_seek(container, stream, stretch.low - back)
            if key is not None and key.pts is not None and key.pts <= stretch.low:
                frames = next(filter(None, map(frames_of, itertools.chain([key], packets))), None)
                if frames and frames[0].key_frame and frames[0].pts == key.pts:
                    key, packets = key_after_seek(container, stream, stretch.low - back)
                    return itertools.chain([key], packets)
        except av.FFmpegError:
            return None
        back = 2 * back or math.ceil(1 / stream.time_base)
    return None


def key_after_seek(container, stream, time):
    """(the first packet called a key frame after a seek to `time`, or None; those after it)."""
    container.seek(time, stream=stream)
    packets = container.demux(stream)
    return next((packet for packet in packets if packet.is_keyframe), None), packets


def packets_until(packets, stream, stretch):
    """Packets up to the first that is decoded after the stretch, and one that flushes."""
    import av

    for packet in packets:
        if packet.size and packet.dts is not None and packet.dts >= stretch.high:
            flush = av.Packet()
            flush.stream = stream
            yield flush
            return
        yield packet


def frames_of(packet):
    """The frames that a packet completes; None where it is refused: players pass over it, too."""
    from av.error import InvalidDataError

    try:
        return packet.decode()
    except InvalidDataError:
        return None


def clip_of_frames(frames, view=View(), video_id=""):
    """The clip that `view` cuts out of frames in memory, as read_clip out of a lossless RGB video.

    frames uint8 [n, H, W, 3], RGB, a whole video or an episode so far -> uint8 [T, size, size, 3].
    video_id decides the jitter of views > 0. Raises InputError on anything else.
    """
    import av

    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise InputError(
            f"{frames.dtype} {list(frames.shape)} was given; clip_of_frames takes "
            "frames uint8 [n, H, W, 3], at least one"
        )
    random = None
    if view.view > 0:
        random = Random(view.seed, 0, sample_id(video_id, view.view), STREAMS["view"])
    numbers = frame_numbers(len(frames), view, random).tolist()
    place = (random.uniform(), random.uniform()) if random else None
    scaler = Scaler("the video in memory")
    clip = np.empty((view.frames, 3, view.size, view.size), np.uint8)
    for i, number in enumerate(numbers):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), format="rgb24")
        for channel, plane in enumerate(scaler.convert(frame, view, place)):
            clip[i, channel] = plane
    return clip.transpose(0, 2, 3, 1)


def video_stream(container, path):
    from av.stream import Disposition

    # Pictures beside the video, or beside sound alone, come as video streams too.
    cover = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(f"{path} holds no video stream")
    if len(streams) > 1:
        odd_videos.note_tracks(path, len(streams))
    best = container.streams.best("video")  # what is marked as the default comes before a still
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path} is in a codec that this build of FFmpeg does not know")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise VideoError(
            f"{path} states frames of {stream.codec_context.width}x{stream.codec_context.height},"
            f" more than {MAX_PIXELS} pixels"
        )
    stream.codec_context.thread_count = 1  # parallelism is over videos
    return stream


def shows(packet):
    """Whether a packet carries a frame that is shown; the last one of a stream is empty and flushes
    the decoder.
    """
    return packet.size > 0 and not packet.is_discard


def check_disk(path):
    """After a video failed: read it plainly. A file that is not there is the video's fault; a
    failing disk or a folder that is gone is not, and ends the run as OSError."""
    os.stat(os.path.dirname(path) or ".")
    try:
        with open(path, "rb") as file:
            while file.read(1 << 22):
                pass
    except OSError as error:
        if error.errno not in (
            errno.ENOENT,
            errno.EISDIR,
            errno.EACCES,
            errno.EPERM,
            errno.ELOOP,
            errno.ENOTDIR,
        ):
            raise
        raise VideoError(f"{path} cannot be read: {error.strerror}") from None


class Cut:
    """The clip that a view cuts out of a stretch of n frames, in the making."""

    def __init__(self, view, name, n):
        random = None
        if view.view > 0:
            random = Random(view.seed, 0, sample_id(name, view.view), STREAMS["view"])
        numbers = frame_numbers(n, view, random).tolist()
        self.view, self.last = view, numbers[-1]
        self.jitter = (random.uniform(), random.uniform()) if random else None
        self.places = {}  # frame number -> its places in the clip
        for place, number in enumerate(numbers):
            self.places.setdefault(number, []).append(place)
        self.frames = np.empty((view.frames, 3, view.size, view.size), np.uint8)
        self.times = []  # of its frames, in ticks

    def take(self, frame, number, scaler):
        """frame: that of this number in the stretch."""
        places = self.places.get(number)
        if not places:
            return
        planes = scaler.convert(frame, self.view, self.jitter)
        for place in places:
            for channel, plane in enumerate(planes):
                self.frames[place, channel] = plane
            self.times.append(frame.pts)


@dataclasses.dataclass
class Counts:
    """Of packets and frames of a video."""

    fed: int = 0  # packets that carry a frame
    refused: int = 0  # packets that the decoder does not take
    decoded: int = 0  # frames
    corrupt: int = 0  # of these, by the decoder's word


def frames_in(packets, stretch, counts):
    """(frames in the stretch, whether it has ended) of each packet, counted in `counts`."""
    shown, over = -math.inf, False  # when the frame before is shown
    for packet in packets:
        counts.fed += shows(packet)
        frames = frames_of(packet)
        if frames is None:
            counts.refused += 1
            continue
        inside = []
        for frame in frames:
            counts.decoded += 1
            counts.corrupt += frame.is_corrupt
            if stretch.first is not None and frame.pts is not None:
                if frame.pts <= shown:
                    raise VideoError(
                        f"{stretch.path} states times for its frames that do not rise, so no "
                        "stretch can be cut out; put it into another container"
                    )
                shown = frame.pts
            if stretch.holds(frame.pts):
                inside.append(frame)
            else:
                over = over or frame.pts >= stretch.high
        yield inside, over


def cut(packets, stream, views, clips, name, n, stretch):
    """Cut those of `views` that have no clip yet out of a stretch that is said to have n frames.

    The clips go into `clips`; returns how many frames it turned out to have.

    A view is done when its last frame has come and every packet so far has given its frame: then n
    is right as far as that view looks, and what comes after does not matter. Else it is done at the
    end, where n was right, or left without a clip. No view's clip depends on the others.
    """
    cuts = {i: Cut(views[i], name, n) for i, clip in enumerate(clips) if clip is None}
    counts, number, delay = Counts(), 0, None  # number: of the next frame in the stretch
    scaler = Scaler(stretch.path, stream.sample_aspect_ratio)
    for frames, over in frames_in(packets, stretch, counts):
        for frame in frames:
            for each in cuts.values():
                each.take(frame, number, scaler)
            number += 1
        if over:
            break
        if counts.decoded and delay is None:
            # packets that the codec holds back to reorder frames
            delay = counts.fed - counts.decoded if stream.codec_context.has_b_frames else 0
        if counts.decoded and not counts.refused and counts.fed - counts.decoded <= delay:
            for i in [i for i in cuts if number > cuts[i].last]:
                clips[i] = finished(cuts.pop(i), counts, stretch, stream)
            if not cuts:
                return n
    for i in cuts if number == n else ():
        clips[i] = finished(cuts[i], counts, stretch, stream)
    return number


def finished(made, counts, stretch, stream):
    """The clip of a Cut that has all its frames; what is odd about them is noted."""
    lost = counts.refused + counts.corrupt
    if lost > max(2, 0.1 * counts.fed):
        what = f"cannot be decoded, or not wholly, in {lost} of {counts.fed} packets"
        odd_videos.note_broken(stretch.path, what)
    if None not in made.times:
        span = (made.times[-1] - made.times[0]) * stream.time_base
        odd_videos.note_span(stretch.path, float(span))
    return made.frames.transpose(0, 2, 3, 1)


def orientation(frame):
    """(transposed, mirrored, upside_down): what shows a frame upright, in that order.

    The nearest of the eight turns and flips to its display matrix [a b u; c d v; x y w], which
    moves the point (x, y) to (a x + c y, b x + d y).
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


class Scaler:
    """Frames of one video as upright RGB.

    One swscale context, and one crop filter a shape, serve all of them.
    """

    def __init__(self, path, pixel_aspect=None):
        from av.video.reformatter import Interpolation, VideoReformatter

        self.path = path
        self.reformatter = VideoReformatter()
        self.graphs = {}
        self.pixel_aspect = float(pixel_aspect or 1)  # width over height of a pixel as it is stored
        # Without full chroma swscale takes, for widths that are multiples of 8 alone, a short cut
        # that is two levels too dark; to planes (gbrp)
        # the exact way is two and a half times as fast as to interleaved rgb24, with the same
        # values.
        self.exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

    def convert(self, frame, view, place):
        """Planes uint8 [3, size, size] of red, green and blue, cropped at `place` (two fractions of
        the room there is), or in the middle.
        """
        transposed, mirrored, upside_down = orientation(frame)
        if max(frame.height * frame.width, view.size**2) > MAX_PIXELS:
            raise VideoError(
                f"{self.path} has frames of {frame.width}x{frame.height}, more than {MAX_PIXELS}"
                " pixels"
            )
        if view.crop == "center":
            # The square that becomes size x size where the short side becomes short_side, in
            # pixels as they are shown: as high as those of the stored frame, and square.
            side = min(frame.height, frame.width * self.pixel_aspect) * view.size / view.short_side
            height, width = max(1, round(side)), max(1, round(side / self.pixel_aspect))
            rooms = [frame.height - height, frame.width - width]
            # The axes of the stored frame that are shown from top to bottom and from left to right.
            down, right = (1, 0) if transposed else (0, 1)
            at = [0, 0]
            flips = (upside_down, mirrored)
            for axis, fraction, flipped in zip((down, right), place or (0, 0), flips, strict=True):
                room = rooms[axis]
                at[axis] = int(fraction * (room + 1)) if place else room // 2
                if flipped:
                    at[axis] = room - at[axis]
            frame = self.crop(frame, height, width, *at)
        how = type(self.exact)[view.interpolation.upper()] | self.exact
        made = self.reformatter.reformat(
            frame,
            view.size,
            view.size,
            "gbrp",
            interpolation=how,
            dst_color_range="JPEG",
            threads=1,
        )
        planes = []
        for i in (2, 0, 1):
            plane: Any = made.planes[i]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            planes.append(rows[: view.size, : view.size])
        if transposed:
            planes = [plane.T for plane in planes]
        return [plane[:: -1 if upside_down else 1, :: -1 if mirrored else 1] for plane in planes]

    def crop(self, frame, height, width, y, x):
        """A part of a frame from (y, x) on, moved to where its chroma samples begin; no copy."""
        if (frame.height, frame.width) == (height, width):
            return frame
        from av.filter import Graph

        x -= x % (16 // frame.format.chroma_width(16))
        y -= y % (16 // frame.format.chroma_height(16))
        key = frame.width, frame.height, frame.format.name, height, width, y, x
        if key not in self.graphs:
            graph = Graph()
            graph.threads = 1
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 1000),
            )
            crop = graph.add("crop", f"{width}:{height}:{x}:{y}:exact=1")
            sink = graph.add("buffersink")
            source.link_to(crop)
            crop.link_to(sink)
            graph.configure()
            self.graphs[key] = graph
        self.graphs[key].push(frame)
        return self.graphs[key].pull()
