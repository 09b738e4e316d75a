"""Video files opened: the stream that counts, and the packets of a stretch of it.

av is imported only where a video is opened.
"""

import contextlib
import errno
import itertools
import math
import os
from fractions import Fraction
from typing import Any, NamedTuple

from salt.errors import VideoError
from salt.odd_videos import odd_videos

MAX_PIXELS = 64 * 2**20  # a frame larger than this is taken for a broken header


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


def frame_rate(path):
    """Frames a second of a video, as its container says. Raises VideoError where it does not."""
    import av

    try:
        opened: Any = av.open(path, "r", metadata_errors="ignore")
        with opened as container:
            rate = video_stream(container, path).average_rate
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be opened: {error.strerror or error}") from None
    if not rate:
        raise VideoError(f"{path} does not say how many frames a second it has; give --fps")
    return float(rate)


def frame_count(path, start=None, end=None):
    """How many frames the packets of a video, or of a stretch of it in seconds, carry. Raises
    VideoError where it cannot be read.
    """
    import av

    try:
        stretch = Stretch(path) if start is end is None else find_stretch(path, start or 0, end)
        with open_video(stretch) as (_, packets):
            return sum(shows(packet) and stretch.holds(packet.pts) for packet in packets)
    except av.FFmpegError as error:
        check_disk(path)
        raise VideoError(f"{path} cannot be opened: {error.strerror or error}") from None


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
