"""Films of evaluation episodes as GIF or MP4, on machines with and without OpenGL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase, TransformedEnv, VmasWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import get_env_transforms_from_module

from torchrl_marl.envs.check import innermost
from torchrl_marl.envs.games.pictures import Canvas, Point
from torchrl_marl.envs.random_state import preserve_random_state
from torchrl_marl.extras import import_extra
from torchrl_marl.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["render_episode"]

_SIZE = 360  # longer side of the scene in pixels
_LARGEST = 480  # that of a picture that an environment draws of itself
_CAPTION = 24  # height of the line of text above the scene
_LAST = 1.5  # seconds that the last frame stays


def render_episode(
    env: EnvBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    path: str | Path,
    *,
    max_steps: int,
    env_index: int = 0,
    fps: int | None = None,
) -> Path:
    """Film one episode, played with the policy's deterministic actions, and write it as a GIF or an MP4.

    The library's own games draw themselves, those of other packages are drawn by these, if they can, and so is any
    environment with a ``render(env_index)``. VMAS draws the frames off screen; where OpenGL is missing we draw the same
    entities with Pillow. No display is needed. The random state of the process is left as it was, but the environment
    is reset and stepped: film on one of its own.

    Args:
        env: a VMAS environment, such as one from ``make_env``, or one that draws itself, such as ``CoordSumEnv`` or a
            wrapper of another package: with a method ``render(env_index)`` that returns uint8 ``[height, width, 3]``.
        policy: writes the actions, such as the actor of a loss.
        path: file to write; ends in ".gif" or ".mp4". Missing folders are made.
        max_steps: the film stops here, or earlier when the episode ends.
        env_index: which of the parallel environments to film.
        fps: frames per second; ``None`` for 20 in VMAS, which simulates 10 steps per second, and 6 in other games.

    Returns:
        The path of the file.

    Raises:
        ImportError: if Pillow is not installed, or for an MP4 imageio with ffmpeg.
        ValueError: if the environment cannot be drawn or an argument is out of its range.

    Example:
        >>> import tempfile
        >>> from torchrl_marl.envs import make_env
        >>> env = make_env("balance", num_envs=2, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     render_episode(env, env.rand_action, Path(folder) / "random.gif", max_steps=3).name
        'random.gif'
    """
    path = Path(path)
    base = innermost(env)
    if not hasattr(base, "render"):
        raise ValueError(
            f"only VMAS environments and those with a method render(env_index) can be filmed, got {type(base).__name__}"
        )
    if not 0 <= env_index < env.batch_size[0]:
        raise ValueError(f"env_index must be in 0..{env.batch_size[0] - 1}, got {env_index}")
    fps = (20 if isinstance(base, VmasWrapper) else 6) if fps is None else fps
    if max_steps < 1 or fps < 1:
        raise ValueError(f"max_steps and fps must be at least 1, got {max_steps} and {fps}")
    write = {".gif": _write_gif, ".mp4": _write_mp4}.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"path must end in .gif or .mp4, got {path}")
    import_extra("PIL.Image", "vmas")
    if write is _write_mp4:
        import_extra("imageio_ffmpeg", "video")
    if isinstance(policy, nn.Module) and "is_init" not in env.full_observation_spec.keys():
        env = TransformedEnv(env, get_env_transforms_from_module(policy), auto_unwrap=False)  # for its memory
    path.parent.mkdir(parents=True, exist_ok=True)
    camera = _VmasCamera(base, env_index) if isinstance(base, VmasWrapper) else _Camera(base, env_index)
    frames = _film(env, camera, policy, max_steps, env_index)
    with replacing(path) as film:
        write(frames, film, fps)
    return path


def _film(env: EnvBase, camera: _Camera | _VmasCamera, policy: Callable, max_steps: int, env_index: int) -> list[Image]:
    """Play the episode and return its frames with captions."""
    captions = []
    returns = dict.fromkeys(env.reward_keys, 0.0)
    with torch.no_grad(), preserve_random_state(), set_exploration_type(ExplorationType.DETERMINISTIC):
        data = env.reset()
        for step in range(max_steps + 1):
            camera.shoot()
            captions.append(_caption(step, returns))
            if step == max_steps or data["done"][env_index].any():
                break
            data = env.step(policy(data))
            for key in returns:
                returns[key] += data["next", key][env_index].mean().item()
            data = env.step_mdp(data)
    return [_with_caption(image, caption) for image, caption in zip(camera.images(), captions, strict=True)]


class _Camera:
    """Takes the pictures that an environment draws of itself."""

    def __init__(self, env: Any, env_index: int) -> None:
        self._env, self._env_index = env, env_index
        self._images: list[Image] = []

    def shoot(self) -> None:
        picture = self._env.render(self._env_index)
        if isinstance(picture, list):  # SerialEnv asks every copy
            picture = picture[self._env_index]
        self._images.append(_image(picture.cpu().numpy(), _LARGEST))

    def images(self) -> list[Image]:
        return self._images


class _VmasCamera:
    """Takes VMAS's pictures, or draws the entities where VMAS cannot."""

    def __init__(self, simulator: VmasWrapper, env_index: int) -> None:
        self._simulator, self._env_index = simulator, env_index
        self._scenes: list[list[_Body]] = []
        self._photographs: list[Image] | None = []

    def shoot(self) -> None:
        self._scenes.append(_scene(self._simulator, self._env_index))
        if self._photographs is not None:
            try:  # any other mode than rgb_array spoils pyglet for the process where there is no display
                picture = self._simulator.render(mode="rgb_array", env_index=self._env_index)
                self._photographs.append(_image(picture.copy(), _SIZE))
            except Exception:
                # Without OpenGL, EGL or a display pyglet fails at the first frame, each in its own way.
                self._photographs = None

    def images(self) -> list[Image]:
        return _draw(self._scenes, _bounds(self._scenes)) if self._photographs is None else self._photographs


def _image(pixels: np.ndarray, longer_side: int) -> Image:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
    return image


@dataclass(frozen=True)
class _Body:
    """An entity at one moment, in world coordinates."""

    points: list[Point]
    radius: float  # 0 unless a disc
    color: tuple[int, ...]
    layer: int  # -1 the ground; 0 marks on it, such as goals; 1 obstacles and things to push; 2 agents
    framed: bool = True  # False for walls and floors, which may leave the frame
    nose: Point | None = None


def _scene(simulator: VmasWrapper, env_index: int) -> list[_Body]:
    """What is to be seen at the moment, in drawing order."""
    world = simulator.world
    bodies = [_body(entity, env_index) for entity in world.entities if entity.is_rendering[env_index]]
    if world.x_semidim is not None and world.y_semidim is not None and simulator.scenario.visualize_semidims:
        x, y = float(world.x_semidim), float(world.y_semidim)
        bodies.append(_Body([(-x, -y), (-x, y), (x, y), (x, -y)], 0.0, (225, 225, 225), layer=-1))
    return sorted(bodies, key=lambda body: body.layer)


def _body(entity: Any, env_index: int) -> _Body:
    from vmas.simulator.core import Agent

    x, y = entity.state.pos[env_index].tolist()
    angle = entity.state.rot[env_index].item()
    cos, sin = math.cos(angle), math.sin(angle)
    points, radius = _outline(entity.shape)
    points = [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in points]
    color = torch.as_tensor(entity.color)
    color = (255 * (color[env_index] if color.ndim > 1 else color)[:3].clamp(0, 1)).int().tolist()
    if isinstance(entity, Agent):
        return _Body(points, radius, tuple(color), layer=2, nose=_nose(entity, env_index, angle))
    reach = entity.shape.circumscribed_radius()
    layer = int(entity.collide or entity.movable)
    return _Body(points, radius, tuple(color), layer, framed=entity.movable or reach < 1)


def _nose(agent: Any, env_index: int, angle: float) -> Point:
    """From the agent's centre, where it faces or, if its dynamics know no facing, where it moves."""
    from vmas.simulator.dynamics.holonomic import Holonomic

    radius = agent.shape.circumscribed_radius()
    if type(agent.dynamics) is not Holonomic:
        return 1.7 * radius * math.cos(angle), 1.7 * radius * math.sin(angle)
    x, y = agent.state.vel[env_index].tolist()
    speed = math.hypot(x, y)
    length = radius * (1 + min(1, 2 * speed)) if speed > 0.02 else 0.0
    return length * x / (speed or 1), length * y / (speed or 1)


def _outline(shape: Any) -> tuple[list[Point], float]:
    """The corners of a box, the ends of a line or the centre of a disc, about the entity's position; and the radius."""
    from vmas.simulator.core import Box, Line

    if isinstance(shape, Box):
        length, width = shape.length / 2, shape.width / 2
        return [(-length, -width), (-length, width), (length, width), (length, -width)], 0.0
    if isinstance(shape, Line):
        return [(-shape.length / 2, 0.0), (shape.length / 2, 0.0)], 0.0
    return [(0.0, 0.0)], shape.circumscribed_radius()


def _bounds(scenes: list[list[_Body]]) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of the camera, which stays still and which no framed body ever leaves."""
    framed = [(point, body.radius) for scene in scenes for body in scene if body.framed for point in body.points]
    left, right = min(x - radius for (x, _), radius in framed), max(x + radius for (x, _), radius in framed)
    bottom, top = min(y - radius for (_, y), radius in framed), max(y + radius for (_, y), radius in framed)
    # A margin, and no strip so narrow that the caption would not fit.
    half = 0.53 * max(right - left, top - bottom)
    half_x, half_y = max(0.53 * (right - left), 0.7 * half), max(0.53 * (top - bottom), 0.4 * half)
    x, y = (left + right) / 2, (bottom + top) / 2
    return x - half_x, y - half_y, x + half_x, y + half_y


def _draw(scenes: list[list[_Body]], bounds: tuple[float, float, float, float]) -> list[Image]:
    left, bottom, right, top = bounds
    scale = _SIZE / max(right - left, top - bottom)
    images = []
    for scene in scenes:
        canvas = Canvas(round(scale * (right - left)), round(scale * (top - bottom)))
        for body in scene:
            _draw_body(canvas, body, [(scale * (x - left), scale * (top - y)) for x, y in body.points], scale)
        images.append(canvas.image())
    return images


def _draw_body(canvas: Canvas, body: _Body, points: list[Point], scale: float) -> None:
    fill, edge = body.color, tuple(int(0.6 * channel) for channel in body.color)
    if body.layer < 1:
        fill, edge = tuple(255 - (255 - channel) // 4 for channel in body.color), body.color
    if body.nose is not None:
        x, y = (sum(coordinates) / len(points) for coordinates in zip(*points, strict=True))
        canvas.path([(x, y), (x + scale * body.nose[0], y - scale * body.nose[1])], edge, 2)
    if len(points) == 1:
        canvas.disc(points[0], scale * body.radius, fill, edge=edge, width=2)
    elif len(points) == 2:
        canvas.path(points, edge, 4)
    else:
        canvas.polygon(points, fill, edge=edge, width=2)


def _caption(step: int, returns: dict[Any, float]) -> str:
    if len(returns) == 1:
        return f"step {step}   return {next(iter(returns.values())):.2f}"
    return "   ".join([f"step {step}", *(f"{key[0]} {value:.2f}" for key, value in returns.items())])


def _with_caption(image: Image, caption: str) -> Image:
    from PIL import Image

    line = Canvas(image.width, _CAPTION)
    line.text((8, _CAPTION / 2), caption, 13, anchor="lm")
    line.path([(0, _CAPTION - 0.5), (image.width, _CAPTION - 0.5)], (220, 220, 220), 1)
    framed = Image.new("RGB", (image.width, image.height + _CAPTION))
    framed.paste(line.image())
    framed.paste(image, (0, _CAPTION))
    return framed


def _write_gif(frames: list[Image], path: Path, fps: int) -> None:
    from PIL import Image

    # One palette for all frames keeps colours from flickering and frames small.
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    sample = Image.new("RGB", (frames[0].width, frames[0].height * len(chosen)))
    for row, frame in enumerate(chosen):
        sample.paste(frame, (0, row * frame.height))
    # By coverage, so that small things keep their colours.
    palette = sample.quantize(128, Image.Quantize.MAXCOVERAGE)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [1000 // fps] * len(rest) + [int(1000 * _LAST)]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _write_mp4(frames: list[Image], path: Path, fps: int) -> None:
    import imageio.v3

    width, height = (side - side % 2 for side in frames[0].size)  # H.264 halves the resolution of colours
    cropped = [np.asarray(frame.crop((0, 0, width, height))) for frame in frames]
    still = [cropped[-1]] * int(_LAST * fps)
    imageio.v3.imwrite(path, np.stack(cropped + still), plugin="FFMPEG", fps=fps, macro_block_size=2)
