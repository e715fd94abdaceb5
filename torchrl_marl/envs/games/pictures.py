"""Antialiased drawings with Pillow, which is imported only when needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["AGENT_COLORS", "FAINT", "INK", "Canvas", "Color", "Point", "Scene", "shrunk"]

Color = str | tuple[int, ...]
Point = tuple[float, float]

_SUPERSAMPLING = 3

INK, FAINT = "#2e3440", "#8a93a3"
# Paul Tol's colour-blind safe "bright" palette without yellow and grey, then two darker tones.
AGENT_COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#e0862c", "#332288", "#7a5230")


class Canvas:
    """An image in pixels, drawn three times as large and scaled down for antialiasing.

    Args:
        width: width of the image.
        height: height of the image.
        background: background colour.
    """

    def __init__(self, width: int, height: int, background: str = "white") -> None:
        from PIL import Image, ImageDraw

        self._size = (width, height)
        self._image = Image.new("RGB", (_SUPERSAMPLING * width, _SUPERSAMPLING * height), background)
        self._pen = ImageDraw.Draw(self._image)

    def rectangle(
        self,
        corner: Point,
        size: Point,
        fill: str | None,
        *,
        edge: str | None = None,
        radius: float = 0,
        width: float = 1.5,
    ) -> None:
        """Draw a rectangle from its upper left corner."""
        (x, y), (w, h) = self._scaled(corner), self._scaled(size)
        self._pen.rounded_rectangle(
            [x, y, x + w - 1, y + h - 1], _SUPERSAMPLING * radius, fill, edge, round(_SUPERSAMPLING * width)
        )

    def disc(self, center: Point, radius: float, fill: Color, *, edge: Color | None = None, width: float = 1.5) -> None:
        """Draw a disc."""
        self._pen.circle(self._scaled(center), _SUPERSAMPLING * radius, fill, edge, round(_SUPERSAMPLING * width))

    def polygon(self, points: list[Point], fill: Color, *, edge: Color | None = None, width: float = 1.5) -> None:
        """Draw a polygon."""
        self._pen.polygon([self._scaled(point) for point in points], fill, edge, round(_SUPERSAMPLING * width))

    def path(self, points: list[Point], color: Color, width: float) -> None:
        """Draw a line through points, with round ends and corners."""
        scaled = [self._scaled(point) for point in points]
        self._pen.line(scaled, color, round(_SUPERSAMPLING * width), joint="curve")
        for end in (scaled[0], scaled[-1]):
            self._pen.circle(end, _SUPERSAMPLING * width / 2, color)

    def text(self, position: Point, content: str, size: int, color: Color = INK, anchor: str = "mm") -> None:
        """Write text; ``anchor`` as in Pillow, by default the middle of the text."""
        from PIL import ImageFont

        font = ImageFont.load_default(_SUPERSAMPLING * size)
        self._pen.text(self._scaled(position), content, fill=color, font=font, anchor=anchor)

    def pixels(self) -> np.ndarray:
        """Return the image, ``uint8`` of shape ``[height, width, 3]``."""
        from PIL import Image

        return np.array(self._image.resize(self._size, Image.Resampling.LANCZOS))

    @staticmethod
    def _scaled(point: Point) -> Point:
        return _SUPERSAMPLING * point[0], _SUPERSAMPLING * point[1]


class Scene(Canvas):
    """A canvas that shows a part of a world.

    Args:
        width: width of the image.
        height: height of the image.
        projection: pixels per unit of length, ``[2, D]``, to the right and down.
        origin: position of the world's origin in the image.
        background: background colour.
    """

    def __init__(
        self, width: int, height: int, projection: list[list[float]], origin: Point, background: str = "white"
    ) -> None:
        super().__init__(width, height, background)
        self.projection, self.origin = projection, origin

    def points(self, places: Tensor) -> list[Point]:
        """Project positions, ``[P, D]``."""
        projection, origin = (torch.tensor(value, dtype=places.dtype) for value in (self.projection, self.origin))
        return [(x, y) for x, y in (places @ projection.T + origin).tolist()]


def shrunk(picture: np.ndarray, longer_side: int) -> np.ndarray:
    """Return an image scaled down to at most ``longer_side`` pixels."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
    return np.asarray(image)
