"""What is odd about videos that can be decoded all the same: said once, or by name."""

import math
import re
import statistics
import threading


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
    times, lasts = zip(*shown)
    before = [times[0] if stretch.first is None else begin, *times]
    gaps = [time - earlier for earlier, time in zip(before, times)]  # before each frame
    usual = statistics.median(gaps) if len(gaps) > 2 else 0
    end = max(time + max(last, usual) for time, last in shown)
    tick = float(stream.time_base)
    # less what a frame is said to be shown
    holes = [gap - last for gap, last in zip(gaps, (0, *lasts))]
    largest = max(holes)
    at = holes.index(largest)
    # A file that states how many frames it has (mp4, AVI) states their times with them: pauses, no
    # holes.
    limit = max(0.1 * (end - times[0]) * tick + 0.5, 10 * usual * tick)
    if not stream.frames and largest * tick > limit:
        after = (times[at] - gaps[at] - first) * tick
        odd_videos.note_broken(
            stretch.path, f"has no frame for {largest * tick:.3g} s after {after:.3g} s"
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
    has, stated = ((time - begin) * tick for time in (end, due))
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
