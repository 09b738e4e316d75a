"""Frames as they are stored -> upright RGB of the size asked for."""

from fractions import Fraction
from typing import Any

import numpy as np

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
                at[axis] = min(room, int(fraction * (room + 1))) if place else room // 2
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
