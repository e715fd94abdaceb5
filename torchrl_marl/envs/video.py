"""Videos of evaluation episodes as GIF or MP4, on machines with and without OpenGL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import get_env_transforms_from_module

from torchrl_marl.envs.check import innermost
from torchrl_marl.envs.games.pictures import Canvas, shrunk
from torchrl_marl.envs.random_state import preserve_random_state
from torchrl_marl.envs.vmas_picture import WorldCamera
from torchrl_marl.extras import import_extra
from torchrl_marl.files import replacing

__all__ = ["render_episode"]

_LARGEST = 480  # longer side of an environment's own image, in pixels
_CAPTION = 24  # height of the line of text above the picture
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
    """Record one episode of the policy with deterministic actions, and write a GIF or an MP4.

    The library's games, wrapped games that support rendering, and any environment with a ``render(env_index)`` provide
    their own frames. VMAS renders off screen; without OpenGL, the same entities are drawn with Pillow. No display is
    needed. The random state of the process is preserved, but the environment is reset and stepped: use a separate one.

    Args:
        env: a VMAS environment, such as one from ``make_env``, or an environment with a method ``render(env_index)``
            that returns uint8 ``[height, width, 3]``, such as ``CoordSumEnv`` or a wrapper of another package.
        policy: module that writes the actions, such as the actor of a loss.
        path: file to write; ends in ".gif" or ".mp4". Missing folders are created.
        max_steps: maximum number of steps; the video also stops at the end of the episode.
        env_index: index of the parallel environment to record.
        fps: frames per second; ``None`` for 20 in VMAS, which simulates 10 steps per second, and 6 in other games.

    Returns:
        The path of the file.

    Raises:
        ImportError: if Pillow is not installed or, for an MP4, imageio with ffmpeg.
        ValueError: if the environment cannot be rendered or an argument is out of its range.

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
    camera = (WorldCamera if hasattr(base, "world") else _Camera)(base, env_index)
    fps = camera.fps if fps is None else fps
    if max_steps < 1 or fps < 1:
        raise ValueError(f"max_steps and fps must be at least 1, got {max_steps} and {fps}")
    write = {".gif": _write_gif, ".mp4": _write_mp4}.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"path must end in .gif or .mp4, got {path}")
    import_extra("PIL.Image", "vmas")
    if write is _write_mp4:
        import_extra("imageio_ffmpeg", "video")
    if isinstance(policy, nn.Module) and "is_init" not in env.full_observation_spec.keys():
        env = TransformedEnv(env, get_env_transforms_from_module(policy), auto_unwrap=False)  # adds the policy's memory
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = _film(env, camera, policy, max_steps, env_index)
    with replacing(path) as film:
        write(frames, film, fps)
    return path


def _film(
    env: EnvBase, camera: _Camera | WorldCamera, policy: Callable, max_steps: int, env_index: int
) -> list[np.ndarray]:
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
    return [_with_caption(*frame) for frame in zip(camera.pictures(), captions, strict=True)]


class _Camera:
    """Takes frames from an environment's own ``render``."""

    fps = 6

    def __init__(self, env: Any, env_index: int) -> None:
        self._env, self._env_index = env, env_index
        self._pictures: list[np.ndarray] = []

    def shoot(self) -> None:
        picture = self._env.render(self._env_index)
        if isinstance(picture, list):  # SerialEnv renders every copy
            picture = picture[self._env_index]
        self._pictures.append(shrunk(picture.cpu().numpy(), _LARGEST))

    def pictures(self) -> list[np.ndarray]:
        return self._pictures


def _caption(step: int, returns: dict[Any, float]) -> str:
    if len(returns) == 1:
        return f"step {step}   return {next(iter(returns.values())):.2f}"
    return "   ".join([f"step {step}", *(f"{key[0]} {value:.2f}" for key, value in returns.items())])


def _with_caption(picture: np.ndarray, caption: str) -> np.ndarray:
    width = picture.shape[1]
    line = Canvas(width, _CAPTION)
    line.text((8, _CAPTION / 2), caption, 13, anchor="lm")
    line.path([(0, _CAPTION - 0.5), (width, _CAPTION - 0.5)], (220, 220, 220), 1)
    return np.concatenate([line.pixels(), picture])


def _write_gif(frames: list[np.ndarray], path: Path, fps: int) -> None:
    from PIL import Image

    # One palette for all frames avoids flicker and keeps frames small; MAXCOVERAGE keeps colours of small objects.
    sample = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]]))
    palette = sample.quantize(128, Image.Quantize.MAXCOVERAGE)
    first, *rest = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [1000 // fps] * len(rest) + [int(1000 * _LAST)]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _write_mp4(frames: list[np.ndarray], path: Path, fps: int) -> None:
    import imageio.v3

    height, width = (side - side % 2 for side in frames[0].shape[:2])  # H.264 halves the resolution of colours
    cropped = np.stack([*frames, *[frames[-1]] * int(_LAST * fps)])[:, :height, :width]
    imageio.v3.imwrite(path, cropped, plugin="FFMPEG", fps=fps, macro_block_size=2)
