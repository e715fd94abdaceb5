"""Images of an air combat from above and from the side, with cones, trails, shots and health."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchrl_marl.envs.games.pictures import AGENT_COLORS, FAINT, INK, Canvas, Point, Scene
from torchrl_marl.envs.games.rules import State
from torchrl_marl.envs.games.sensors import Cone, Sensors

__all__ = ["draw_combat"]

_WIDTH, _HEADER, _ABOVE, _SIDE, _MARGIN, _FLOOR = 480, 24, 300, 136, 34, 10  # pixels
_SMALLEST, _CEILING = 2500.0, 5000.0  # m, minimum width of the view from above, and height of the side view
_SHOWN = 1200.0  # m, drawn length of a field of view
_SIZE = 11.0  # pixels, half the length of an aircraft
_HALF = torch.tensor([[1.0, 0, 0], [0.1, 0.14, 0], [-0.5, 0.8, 0], [-0.45, 0.14, 0], [-0.95, 0.4, 0], [-0.8, 0, 0]])
_BODY = torch.cat([_HALF, _HALF[1:-1].flip(0) * torch.tensor([1.0, -1, 1])])  # forward, right, up
_FIN = torch.tensor([[-0.2, 0, 0], [-0.95, 0, 0.55], [-0.8, 0, 0]])
_SKY, _GROUND, _GRID, _DEAD = "#f4f8fc", "#d8cfbd", "#dfe3ea", "#b9bfc9"
_TEAMS = ("agents", "opponents")
_COLORS, _TRAILS = (AGENT_COLORS[0], "#c1384f"), ("#9dbbd6", "#dfa3ac")
_VIEWS, _WEAPONS = ("#eff5fb", "#fdf3f4"), ("#cbdff1", "#f6d5da")


def draw_combat(state: State, frames: Tensor, sensors: Sensors, *, seconds: float) -> np.ndarray:
    """Draw the aircraft from above and from the side.

    Args:
        state: state of one environment; positions are east, north and altitude in m.
        frames: unit vectors of every aircraft along the nose, to the right wing and up, ``[2N, 3, 3]``.
        sensors: fields of view and fire.
        seconds: time since the start.

    Returns:
        The image.
    """
    alive = state["health"] > 0
    scenes = above, side = _scenes(state["position"], alive)
    for scene in scenes:
        for cone, reach, shades in (sensors.view, _SHOWN, _VIEWS), (sensors.weapons, sensors.weapons.range, _WEAPONS):
            for index in alive.nonzero().flatten().tolist():
                corners = state["position"][index] + reach * _directions(cone) @ frames[index]
                scene.polygon(_hull(scene.points(corners)), shades[_team(state, index)])
    _draw_grid(above, side)
    for scene in scenes:
        _draw_aircraft(scene, state, frames)
    return np.concatenate([canvas.pixels() for canvas in (_header(alive, seconds), above, side)])


def _team(state: State, index: int) -> int:
    return int(2 * index >= len(state["health"]))


def _scenes(places: Tensor, alive: Tensor) -> tuple[Scene, Scene]:
    """The views from above and from the side, which show all live aircraft, or all aircraft if none is alive."""
    places = places[alive] if alive.any() else places
    low, high = places.amin(0), places.amax(0)
    (east, north, _), (deep, wide, _) = ((low + high) / 2).tolist(), (high - low).tolist()
    scale = 1 / max(wide / (_WIDTH - 2 * _MARGIN), deep / (_ABOVE - 2 * _MARGIN), _SMALLEST / _WIDTH)
    rise = (_SIDE - 2 * _FLOOR) / max(_CEILING, high[2].item())
    left = _WIDTH / 2 - scale * north
    above = Scene(_WIDTH, _ABOVE, [[0, scale, 0], [scale, 0, 0]], (left, _ABOVE / 2 - scale * east))
    return above, Scene(_WIDTH, _SIDE, [[0, scale, 0], [0, 0, -rise]], (left, _SIDE - _FLOOR), _SKY)


def _draw_grid(above: Scene, side: Scene) -> None:
    """Lines a kilometre apart, over the cones; the ground and the altitudes."""
    kilometres = torch.arange(-100.0, 101).unsqueeze(-1) * 1000
    for x, y in above.points(kilometres.expand(-1, 3)):
        if 0 <= x < _WIDTH:
            above.path([(x, 0), (x, _ABOVE)], _GRID, 0.7)
            side.path([(x, 0), (x, _SIDE)], _GRID, 0.7)
        if 0 <= y < _ABOVE:
            above.path([(0, y), (_WIDTH, y)], _GRID, 0.7)
    side.rectangle((0, _SIDE - _FLOOR), (_WIDTH, _FLOOR), _GROUND)
    above.path([(0, _ABOVE), (_WIDTH, _ABOVE)], FAINT, 1)
    above.text((8, 10), "from above, lines 1 km apart, north to the right", 10, FAINT, "lm")
    side.text((8, 10), "from the side", 10, FAINT, "lm")
    for altitude, (_, y) in enumerate(side.points(kilometres[101:].expand(-1, 3)), 1):
        if y > 16:
            side.path([(0, y), (_WIDTH, y)], _GRID, 0.7)
            side.text((_WIDTH - 6, y), f"{altitude} km", 9, FAINT, "rm")


def _draw_aircraft(scene: Scene, state: State, frames: Tensor) -> None:
    """Draw trails, shots, aircraft with a fin that shows the upper side, and health bars; dead aircraft below."""
    places, healths, targets = state["position"], state["health"].tolist(), state["target"].tolist()
    order = sorted(range(len(healths)), key=lambda index: healths[index] > 0)
    for index in order:
        if healths[index] > 0:
            trail = torch.cat([state["trail"][:, index], places[index, None]])
            scene.path(scene.points(trail), _TRAILS[_team(state, index)], 1.4)
    for index, target in enumerate(targets):
        if target >= 0:
            scene.path(scene.points(places[[index, target]]), _COLORS[_team(state, index)], 2)
    for index in order:
        alive = healths[index] > 0
        color = _COLORS[_team(state, index)] if alive else _DEAD
        ((x, y),) = scene.points(places[index, None])
        for model, fill in (_BODY, color), (_FIN, INK if alive else FAINT):  # in pixels, not to scale
            turned = (model @ frames[index]) @ torch.tensor(scene.projection).T.sign() * _SIZE
            scene.polygon([(x + right, y + down) for right, down in turned.tolist()], fill)
        if alive:
            scene.rectangle((x - 9, y + 12), (18, 3), "white", edge=color, width=0.5)
            scene.rectangle((x - 9, y + 12), (18 * healths[index], 3), color)


def _header(alive: Tensor, seconds: float) -> Canvas:
    """Number of live aircraft in each team, and the time."""
    header = Canvas(_WIDTH, _HEADER)
    for index, (team, own) in enumerate(zip(_TEAMS, alive.chunk(2), strict=True)):
        header.rectangle((index * _WIDTH / 2, 0), (_WIDTH / 2, _HEADER), _COLORS[index])
        header.text(((index + 0.5) * _WIDTH / 2, _HEADER / 2), f"{team}: {own.sum()} of {len(own)}", 13, "white")
    header.rectangle((_WIDTH / 2 - 28, 3), (56, _HEADER - 6), "white", radius=4)
    header.text((_WIDTH / 2, _HEADER / 2), f"{seconds:.1f} s", 12, INK)
    return header


def _directions(cone: Cone) -> Tensor:
    """The tip of a cone, and directions to the edge and the middle of its far end, ``[28, 3]``."""
    sides = torch.linspace(-cone.azimuth, cone.azimuth, 9)
    heights = torch.tensor([-cone.elevation, 0.0, cone.elevation])
    side, height = torch.cartesian_prod(sides, heights).unbind(-1)
    far = torch.stack([height.cos() * side.cos(), height.cos() * side.sin(), height.sin()], -1)
    return torch.cat([torch.zeros(1, 3), far])


def _hull(points: list[Point]) -> list[Point]:
    """The convex hull (Andrew's monotone chain)."""

    def chain(ordered: list[Point]) -> list[Point]:
        kept: list[Point] = []
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
