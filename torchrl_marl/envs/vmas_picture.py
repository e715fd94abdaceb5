"""Images of VMAS's worlds: VMAS's own or, on machines without OpenGL, drawings of the same entities."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrl_marl.envs.games.pictures import Scene, shrunk

__all__ = ["WorldCamera"]

_SIZE = 360  # longer side in pixels
_SQUARE = torch.tensor([(-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0)], dtype=torch.double)


class WorldCamera:
    """Takes frames of one copy of an environment that has a ``world`` of VMAS's entities.

    The frames are VMAS's own or, if VMAS cannot render, drawn from the entities' shapes.

    Args:
        env: VMAS in TorchRL's wrapper.
        env_index: index of the copy.
    """

    fps = 20  # twice real time

    def __init__(self, env: Any, env_index: int) -> None:
        self._env, self._env_index = env, env_index
        self._pictures: list[np.ndarray] = []
        self._scenes: list[list[_Body]] = []
        self._has_opengl = True

    def shoot(self) -> None:
        """Take a frame of the current state."""
        self._scenes.append(_bodies(self._env, self._env_index))
        if self._has_opengl:
            try:  # without a display, any mode other than rgb_array breaks pyglet for the whole process
                picture = self._env.render(mode="rgb_array", env_index=self._env_index)
                self._pictures.append(shrunk(picture.copy(), _SIZE))
            except Exception:
                # Without OpenGL, EGL or a display, pyglet fails at the first frame with various exceptions.
                self._has_opengl = False

    def pictures(self) -> list[np.ndarray]:
        """Return all frames, ``uint8`` of shape ``[height, width, 3]``."""
        return self._pictures if self._has_opengl else _drawn(self._scenes)


class _Body(NamedTuple):
    """An entity at one step, in world coordinates."""

    points: Tensor  # [P, 2]: the corners of a box, the ends of a line or the centre of a disc
    radius: float  # 0 unless a disc
    color: list[int]
    layer: int  # -1 the ground; 0 marks on the ground, such as goals; 1 obstacles and movable objects; 2 agents
    framed: bool = True  # False for walls and floors, which may leave the frame
    nose: Tensor | None = None  # from the centre


def _bodies(env: Any, env_index: int) -> list[_Body]:
    """Visible entities of the current state, in drawing order."""
    world = env.world
    bodies = [_body(entity, env_index) for entity in world.entities if entity.is_rendering[env_index]]
    if world.x_semidim is not None and world.y_semidim is not None and env.scenario.visualize_semidims:
        floor = _SQUARE * torch.tensor([float(world.x_semidim), float(world.y_semidim)])
        bodies.append(_Body(floor, 0.0, [225, 225, 225], layer=-1))
    return sorted(bodies, key=lambda body: body.layer)


def _body(entity: Any, env_index: int) -> _Body:
    from vmas.simulator.core import Agent, Box, Line

    outlines = {Box: _SQUARE, Line: _SQUARE[1:3] * torch.tensor([1.0, 0.0])}
    outline = next((own for kind, own in outlines.items() if isinstance(entity.shape, kind)), _SQUARE[:1] * 0)
    size = torch.tensor([getattr(entity.shape, name, 0.0) for name in ("length", "width")]).double()
    angle = entity.state.rot[env_index].double().cpu()
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).reshape(2, 2)
    points = entity.state.pos[env_index].double().cpu() + outline * size / 2 @ turn
    color = torch.as_tensor(entity.color)
    color = (255 * (color[env_index] if color.ndim > 1 else color)[:3].clamp(0, 1)).int().tolist()
    reach = entity.shape.circumscribed_radius()
    radius = reach if len(points) == 1 else 0.0
    if isinstance(entity, Agent):
        return _Body(points, radius, color, layer=2, nose=_nose(entity, env_index, turn[0], reach))
    layer = int(entity.collide or entity.movable)
    return _Body(points, radius, color, layer, framed=entity.movable or reach < 1)


def _nose(agent: Any, env_index: int, facing: Tensor, reach: float) -> Tensor:
    """Vector from the agent's centre in its heading or, for dynamics without a heading, in its direction of motion."""
    from vmas.simulator.dynamics.holonomic import Holonomic

    if type(agent.dynamics) is not Holonomic:
        return 1.7 * reach * facing
    velocity = agent.state.vel[env_index].double().cpu()
    speed = velocity.norm().item()
    return reach * (1 + min(1, 2 * speed)) * velocity / speed if speed > 0.02 else 0 * velocity


def _drawn(scenes: list[list[_Body]]) -> list[np.ndarray]:
    """The frames of a static camera that keeps every framed body in view."""
    framed = [body for bodies in scenes for body in bodies if body.framed]
    low = torch.cat([body.points - body.radius for body in framed]).amin(0)
    high = torch.cat([body.points + body.radius for body in framed]).amax(0)
    # Add a margin, and a minimum width for the caption.
    half = 0.53 * (high - low)
    half = half.maximum(half.max() * torch.tensor([0.7, 0.4]))
    scale = (_SIZE / (2 * half.max())).item()
    width, height = (round(side) for side in (2 * scale * half).tolist())
    origin = (scale * (half - (low + high) / 2 * torch.tensor([1.0, -1.0]))).tolist()
    images = []
    for bodies in scenes:
        scene = Scene(width, height, [[scale, 0.0], [0.0, -scale]], (origin[0], origin[1]))
        for body in bodies:
            _draw_body(scene, body, scale)
        images.append(scene.pixels())
    return images


def _draw_body(scene: Scene, body: _Body, scale: float) -> None:
    fill, edge = tuple(body.color), tuple(int(0.6 * channel) for channel in body.color)
    if body.layer < 1:
        fill, edge = tuple(255 - (255 - channel) // 4 for channel in body.color), fill
    if body.nose is not None:
        center = body.points.mean(0)
        scene.path(scene.points(torch.stack([center, center + body.nose])), edge, 2)
    points = scene.points(body.points)
    if len(points) == 1:
        scene.disc(points[0], scale * body.radius, fill, edge=edge, width=2)
    elif len(points) == 2:
        scene.path(points, edge, 4)
    else:
        scene.polygon(points, fill, edge=edge, width=2)
