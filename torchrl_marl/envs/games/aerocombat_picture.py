"""Pictures of AeroCombat: from above and from the side, with cones, trails, shots and health."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchrl_marl.envs.games.pictures import AGENT_COLORS, FAINT, INK, Canvas

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Plane", "draw_combat"]

Points = list[tuple[float, float]]

_WIDTH, _HEADER, _ABOVE, _SIDE, _MARGIN, _FLOOR = 480, 24, 300, 136, 34, 10  # pixels
_SMALLEST, _CEILING = 2500.0, 5000.0  # m, that at least are seen across the view from above, and up from the ground
_SHOWN = 1200.0  # m, where the drawing of a field of view ends
_SIZE = 11.0  # pixels, half the length of an aircraft
_HALF = torch.tensor([[1.0, 0, 0], [0.1, 0.14, 0], [-0.5, 0.8, 0], [-0.45, 0.14, 0], [-0.95, 0.4, 0], [-0.8, 0, 0]])
_BODY = torch.cat([_HALF, _HALF[1:-1].flip(0) * torch.tensor([1.0, -1, 1])])  # forward, right, up
_FIN = torch.tensor([[-0.2, 0, 0], [-0.95, 0, 0.55], [-0.8, 0, 0]])
_SKY, _GROUND, _GRID, _DEAD = "#f4f8fc", "#d8cfbd", "#dfe3ea", "#b9bfc9"


class _Team(NamedTuple):
    name: str
    color: str
    weapons: str
    view: str
    trail: str


_TEAMS = (
    _Team("agents", AGENT_COLORS[0], "#cbdff1", "#eff5fb", "#9dbbd6"),
    _Team("opponents", "#c1384f", "#f6d5da", "#fdf3f4", "#dfa3ac"),
)


class Plane(NamedTuple):
    """An aircraft to draw; places are east, north and altitude in m."""

    team: int
    """0 agents, 1 opponents"""
    position: Tensor
    """``[3]``"""
    frame: Tensor
    """unit vectors along the nose, to the right wing and up, ``[3, 3]``"""
    health: float
    target: int
    """the aircraft that it hits, -1 for none"""
    trail: Tensor
    """where it was, ``[K, 3]``"""


class _View:
    """A canvas and the projection onto it: a matrix ``[2, 3]`` in pixels per metre, and the place of the origin."""

    def __init__(self, height: int, background: str, matrix: list[list[float]], origin: tuple[float, float]) -> None:
        self.canvas = Canvas(_WIDTH, height, background)
        self._matrix, self._origin = torch.tensor(matrix), torch.tensor(origin)

    def points(self, places: Tensor) -> Points:
        """Project places, ``[P, 3]``."""
        return [(x, y) for x, y in (places @ self._matrix.T + self._origin).tolist()]

    def outline(self, plane: Plane, model: Tensor) -> Points:
        """Project a shape in an aircraft's own axes, which is drawn in pixels, not to scale."""
        (center,) = self.points(plane.position[None])
        turned = (model @ plane.frame) @ self._matrix.sign().T * _SIZE
        return [(center[0] + x, center[1] + y) for x, y in turned.tolist()]


def draw_combat(
    planes: list[Plane], *, view: tuple[float, float], weapons: tuple[float, float], reach: float, seconds: float
) -> Image:
    """Draw the aircraft from above and from the side.

    Args:
        planes: all of them.
        view: half-angles of what they see, to the sides and upwards, rad.
        weapons: the same of what they hit.
        reach: of the weapons, m.
        seconds: since the start.

    Returns:
        The picture.
    """
    from PIL import Image

    above, side, header = *_views(planes), Canvas(_WIDTH, _HEADER)
    for scene in (above, side):
        for plane in planes:
            if plane.health > 0:
                scene.canvas.polygon(_hull(scene.points(_cone(plane, *view, _SHOWN))), _TEAMS[plane.team].view)
        for plane in planes:
            if plane.health > 0:
                scene.canvas.polygon(_hull(scene.points(_cone(plane, *weapons, reach))), _TEAMS[plane.team].weapons)
    _draw_grid(above, side)
    for scene in (above, side):
        _draw_planes(scene, planes)
    for index, team in enumerate(_TEAMS):
        healths = [plane.health for plane in planes if plane.team == index]
        header.rectangle((index * _WIDTH / 2, 0), (_WIDTH / 2, _HEADER), team.color)
        living = f"{team.name}: {sum(health > 0 for health in healths)} of {len(healths)}"
        header.text(((index + 0.5) * _WIDTH / 2, _HEADER / 2), living, 13, "white")
    header.rectangle((_WIDTH / 2 - 28, 3), (56, _HEADER - 6), "white", radius=4)
    header.text((_WIDTH / 2, _HEADER / 2), f"{seconds:.1f} s", 12, INK)
    picture = Image.new("RGB", (_WIDTH, _HEADER + _ABOVE + _SIDE))
    for canvas, top in ((header, 0), (above.canvas, _HEADER), (side.canvas, _HEADER + _ABOVE)):
        picture.paste(canvas.image(), (0, top))
    return picture


def _views(planes: list[Plane]) -> tuple[_View, _View]:
    """The views from above and from the side, which keep everybody alive in the picture, or all if nobody is."""
    places = torch.stack([plane.position for plane in planes if plane.health > 0] or [p.position for p in planes])
    low, high = places.amin(0), places.amax(0)
    (east, north, _), (deep, wide, _) = ((low + high) / 2).tolist(), (high - low).tolist()
    scale = 1 / max(wide / (_WIDTH - 2 * _MARGIN), deep / (_ABOVE - 2 * _MARGIN), _SMALLEST / _WIDTH)
    rise = (_SIDE - 2 * _FLOOR) / max(_CEILING, high[2].item())
    left = _WIDTH / 2 - scale * north
    above = _View(_ABOVE, "white", [[0, scale, 0], [scale, 0, 0]], (left, _ABOVE / 2 - scale * east))
    side = _View(_SIDE, _SKY, [[0, scale, 0], [0, 0, -rise]], (left, _SIDE - _FLOOR))
    return above, side


def _draw_grid(above: _View, side: _View) -> None:
    """Lines a kilometre apart, over the cones; the ground and the altitudes."""
    for line in range(*_kilometres(above, 0, _WIDTH)):
        ((x, _),) = above.points(torch.tensor([[0.0, 1000.0 * line, 0.0]]))
        above.canvas.path([(x, 0), (x, _ABOVE)], _GRID, 0.7)
        side.canvas.path([(x, 0), (x, _SIDE)], _GRID, 0.7)
    for line in range(*_kilometres(above, 1, _ABOVE)):
        ((_, y),) = above.points(torch.tensor([[1000.0 * line, 0.0, 0.0]]))
        above.canvas.path([(0, y), (_WIDTH, y)], _GRID, 0.7)
    side.canvas.rectangle((0, _SIDE - _FLOOR), (_WIDTH, _FLOOR), _GROUND)
    above.canvas.path([(0, _ABOVE), (_WIDTH, _ABOVE)], FAINT, 1)
    above.canvas.text((8, 10), "from above, lines 1 km apart, north to the right", 10, FAINT, "lm")
    side.canvas.text((8, 10), "from the side", 10, FAINT, "lm")
    for altitude in range(1, 20):
        ((_, y),) = side.points(torch.tensor([[0.0, 0.0, 1000.0 * altitude]]))
        if y > 16:
            side.canvas.path([(0, y), (_WIDTH, y)], _GRID, 0.7)
            side.canvas.text((_WIDTH - 6, y), f"{altitude} km", 9, FAINT, "rm")


def _kilometres(view: _View, axis: int, length: int) -> tuple[int, int]:
    """The range of kilometres in a picture along an axis."""
    (start,), (one,) = view.points(torch.zeros(1, 3)), view.points(torch.full((1, 3), 1000.0))
    step = one[axis] - start[axis]
    return math.floor(-start[axis] / step), math.ceil((length - start[axis]) / step) + 1


def _draw_planes(view: _View, planes: list[Plane]) -> None:
    """Trails, shots, the aircraft with a fin to show which way is up, and health bars."""
    for plane in planes:
        if plane.health > 0:
            view.canvas.path(view.points(torch.cat([plane.trail, plane.position[None]])), _TEAMS[plane.team].trail, 1.4)
    for plane in planes:
        if plane.target >= 0:
            view.canvas.path(
                view.points(torch.stack([plane.position, planes[plane.target].position])), _TEAMS[plane.team].color, 2
            )
    for plane in sorted(planes, key=lambda plane: plane.health > 0):
        color = _TEAMS[plane.team].color if plane.health > 0 else _DEAD
        view.canvas.polygon(view.outline(plane, _BODY), color)
        view.canvas.polygon(view.outline(plane, _FIN), INK if plane.health > 0 else FAINT)
        if plane.health > 0:
            ((x, y),) = view.points(plane.position[None])
            view.canvas.rectangle((x - 9, y + 12), (18, 3), "white", edge=color, width=0.5)
            view.canvas.rectangle((x - 9, y + 12), (18 * plane.health, 3), color)


def _cone(plane: Plane, azimuth: float, elevation: float, reach: float) -> Tensor:
    """Corners of a cone: the aircraft, and points of the edge and the middle of the far end."""
    sides = torch.linspace(-azimuth, azimuth, 9)
    heights = torch.tensor([-elevation, 0.0, elevation])
    sides, heights = (grid.flatten() for grid in torch.meshgrid(sides, heights, indexing="ij"))
    far = torch.stack([heights.cos() * sides.cos(), heights.cos() * sides.sin(), heights.sin()], -1)
    return torch.cat([plane.position[None], plane.position + reach * far @ plane.frame])


def _hull(points: Points) -> Points:
    """The convex hull (Andrew's monotone chain)."""

    def chain(ordered: Points) -> Points:
        kept: Points = []
        for x, y in ordered:
            while len(kept) > 1:
                (x0, y0), (x1, y1) = kept[-2:]
                if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                    break
                kept.pop()
            kept.append((x, y))
        return kept[:-1]

    ordered = sorted(points)
    return chain(ordered) + chain(ordered[::-1])
