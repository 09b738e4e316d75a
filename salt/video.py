"""Decoding: a view of a video file, or of frames in memory, as a clip.

av is imported only where a video is decoded, so that training from a cache with clips
runs without it.
"""

import dataclasses
import math
import os

import numpy as np

from salt.containers import Stretch, check_disk, find_stretch, frames_of, open_video, shows
from salt.errors import InputError, VideoError
from salt.frames import Scaler
from salt.masks import STREAMS, Random
from salt.odd_videos import look_at_packets, odd_videos
from salt.views import View, frame_numbers, sample_id

# of packets, kept between counting and decoding; a larger video is read twice
HELD_BYTES = 64 * 2**20


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
    place = (random.uniform(), random.uniform()) if random else view.place
    scaler = Scaler("the video in memory")
    clip = np.empty((view.frames, 3, view.size, view.size), np.uint8)
    for i, number in enumerate(numbers):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), format="rgb24")
        scaler.convert(frame, view, place, clip[i])
    return clip.transpose(0, 2, 3, 1)


class Cut:
    """The clip that a view cuts out of a stretch of n frames, in the making."""

    def __init__(self, view, name, n):
        random = None
        if view.view > 0:
            random = Random(view.seed, 0, sample_id(name, view.view), STREAMS["view"])
        numbers = frame_numbers(n, view, random).tolist()
        self.view, self.last = view, numbers[-1]
        self.place = (random.uniform(), random.uniform()) if random else view.place
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
        first = self.frames[places[0]]
        scaler.convert(frame, self.view, self.place, first)
        for place in places[1:]:
            self.frames[place] = first
        self.times += [frame.pts] * len(places)


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
            if frame.key_frame:
                scaler.scalings.clear()  # from here on chroma samples may lie elsewhere
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
