"""Frames as they are stored -> upright RGB of the size asked for."""

from fractions import Fraction
from typing import Any

import numpy as np

from salt import scaling
from salt.containers import MAX_PIXELS
from salt.errors import VideoError


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

    One swscale context, and one crop filter a shape, serve all of them; or csrc/frames.cpp does,
    where salt/scaling.py has seen it make the same of them.
    """

    def __init__(self, path, pixel_aspect=None):
        from av.video.reformatter import Interpolation, VideoReformatter

        self.path = path
        self.reformatter = VideoReformatter()
        self.graphs = {}
        self.scalings, self.asked = {}, set()  # since the last key frame; ever
        self.pixel_aspect = float(pixel_aspect or 1)  # width over height of a pixel as it is stored
        # Without full chroma swscale takes, for widths that are multiples of 8 alone, a short cut
        # that is two levels too dark; to planes (gbrp)
        # the exact way is two and a half times as fast as to interleaved rgb24, with the same
        # values.
        self.exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

    def convert(self, frame, view, place, out):
        """Write a frame to the planes `out`, uint8 [3, size, size], in one piece, of red, green and
        blue, cropped at `place` (two fractions of the room there is), or in the middle.
        """
        transposed, mirrored, upside_down = orientation(frame)
        if max(frame.height * frame.width, view.size**2) > MAX_PIXELS:
            raise VideoError(
                f"{self.path} has frames of {frame.width}x{frame.height}, more than {MAX_PIXELS}"
                " pixels"
            )
        height, width, at = frame.height, frame.width, [0, 0]
        if view.crop == "center":
            # The square that becomes size x size where the short side becomes short_side, in
            # pixels as they are shown: as high as those of the stored frame, and square.
            side = min(frame.height, frame.width * self.pixel_aspect) * view.size / view.short_side
            height, width = max(1, round(side)), max(1, round(side / self.pixel_aspect))
            rooms = [frame.height - height, frame.width - width]
            # The axes of the stored frame that are shown from top to bottom and from left to right.
            down, right = (1, 0) if transposed else (0, 1)
            flips = (upside_down, mirrored)
            for axis, fraction, flipped in zip((down, right), place or (0, 0), flips, strict=True):
                room = rooms[axis]
                at[axis] = min(room, int(fraction * (room + 1))) if place else room // 2
                if flipped:
                    at[axis] = room - at[axis]
            # to where chroma samples begin
            at[0] -= at[0] % (16 // frame.format.chroma_height(16))
            at[1] -= at[1] % (16 // frame.format.chroma_width(16))
        how = type(self.exact)[view.interpolation.upper()] | self.exact
        part = height, width, *at
        upright = out
        if transposed or mirrored or upside_down:
            out = np.empty_like(out)
        work = self.scaling(frame, part, view.size, how)
        if work and all(plane.line_size > 0 for plane in frame.planes):  # not from the bottom up
            work.convert(scaling.planes_of(frame, *at), out)
        else:
            frame = self.crop(frame, *part)
            green, blue, red = scaling.by_swscale(
                frame, view.size, how, reformatter=self.reformatter
            )
            out[0], out[1], out[2] = red, green, blue
        if out is not upright:
            planes = out.transpose(0, 2, 1) if transposed else out
            upright[:] = planes[:, :: -1 if upside_down else 1, :: -1 if mirrored else 1]

    def scaling(self, frame, part, size, how):
        """What does swscale's work on a part of the frame, or None."""
        key = scaling.key_of(frame, part, size, how)
        if key not in self.scalings:

            def copy(height, width):
                made = self.crop(frame, height, width, 0, 0, again=True)
                made.make_writable()
                return made

            self.scalings[key] = scaling.find(key, copy, key not in self.asked)
            self.asked.add(key)
        return self.scalings[key]

    def crop(self, frame, height, width, y, x, again=False):
        """A part of a frame from (y, x) on, no copy; the frame itself where that is all of it, but
        for `again`, which makes another one of it.
        """
        if (frame.height, frame.width) == (height, width) and not again:
            return frame
        from av.filter import Graph

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
