"""Base of all games and wrappers: keys and specs, random streams, time limit, rendering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from typing_extensions import Required, TypedDict

from torchrl_marl.envs.games.streams import random_streams

__all__ = ["BatchOptions", "TeamEnv", "check_positive", "spec_of"]


class BatchOptions(TypedDict, total=False):
    """Options of every environment.

    ``num_envs`` is the number of environments stepped together, ``B``. ``seed`` seeds the random streams; ``None``, the
    default, draws a seed from Torch's global generator. ``device``, by default the CPU, holds the tensors.
    """

    num_envs: Required[int]
    seed: int | None
    device: torch.device | str


class TeamEnv(EnvBase, ABC):
    """A batch of identical environments whose agents form the group ``"agents"``.

    The keys are those of ``make_env``'s environments: observations, actions, masks, rewards and ``episode_reward`` of
    the group, and done flags, ``step_count`` and the state at the root. The environment itself tracks the time limit
    and the sums of rewards, so no transform is needed.

    The environment owns its randomness: every copy draws from a separate random stream, independent of the rest of the
    process. The same seed gives the same episodes, whether a copy is simulated in a batch or alone. ``state_dict``
    holds the streams: an environment restored from it plays the same episodes from its next ``reset``. (The
    ``state_dict`` of a ``TransformedEnv`` does not include the streams: use that of its ``base_env``.)

    ``limit_flag`` is the flag that reports the time limit, ``"truncated"`` or ``"terminated"``. ``fixed_length`` is set
    if the number of steps is part of the task, so that the limit is a termination. ``streams``, ``[B]``, are the random
    streams from which the next ``reset`` starts. A subclass sets ``observation_spec`` and calls ``_set_seed``.

    Args:
        agents: names of the ``N`` agents.
        action_spec: action spec of one environment, ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        num_envs: number of environments stepped together, ``B``.
        max_steps: time limit of an episode.
        device: device of the tensors.

    Raises:
        ValueError: if ``num_envs`` or ``max_steps`` is below 1.
    """

    limit_flag: str = "truncated"
    fixed_length: bool = False
    streams: Tensor

    def __init__(
        self,
        agents: Sequence[str],
        action_spec: TensorSpec,
        *,
        num_envs: int,
        max_steps: int,
        device: torch.device | str,
    ) -> None:
        check_positive(num_envs=num_envs, max_steps=max_steps)
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.max_steps = max_steps
        self.group_map = {"agents": list(agents)}
        self.action_spec = self._of_agents("action", action_spec.expand(torch.Size([num_envs, *action_spec.shape])))
        self.reward_spec = self._of_agents("reward", Unbounded(torch.Size([num_envs, len(agents), 1])))
        flag = Categorical(2, shape=torch.Size([num_envs, 1]), dtype=torch.bool)
        flags = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=self.batch_size).to(self.device)

    def _of_agents(self, name: str, spec: TensorSpec) -> Composite:
        group = Composite({name: spec}, shape=spec.shape[:2])
        return Composite(agents=group, shape=self.batch_size).to(self.device)

    def _set_seed(self, seed: int | None) -> None:
        self.seed_copies(int(torch.randint(2**63 - 1, ())) if seed is None else seed)

    def seed_copies(self, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Give every copy the random stream that it would have in a batch split over ``world_size`` environments.

        Args:
            seed: seed of the whole batch.
            rank: index of this environment's part of the batch, from 0.
            world_size: number of parts.
        """
        copies = self.batch_size.numel()
        self.set_extra_state(random_streams(seed, world_size * copies)[rank * copies : (rank + 1) * copies])

    def get_extra_state(self) -> Tensor:
        """Return the random streams, ``[B]``, which are part of ``state_dict``."""
        return self.streams

    def set_extra_state(self, state: Tensor) -> None:
        """Set the random streams, ``[B]``, from which the next ``reset`` starts.

        Raises:
            ValueError: if the number of streams differs from the number of copies.
        """
        if state.shape != self.batch_size:
            raise ValueError(f"streams must be of shape {list(self.batch_size)}, got {list(state.shape)}")
        self.streams = state

    def render(self, env_index: int = 0) -> Tensor:
        """Render one of the environments.

        Args:
            env_index: index of the environment.

        Returns:
            Image, ``uint8`` of shape ``[height, width, 3]``.

        Raises:
            ImportError: if a package for rendering is not installed.
            ValueError: if the index is out of range, or the environment cannot be rendered here.
        """
        if not 0 <= env_index < self.batch_size[0]:
            raise ValueError(f"env_index must be in 0..{self.batch_size[0] - 1}, got {env_index}")
        return torch.from_numpy(np.ascontiguousarray(self._draw(env_index)))

    @abstractmethod
    def _draw(self, env_index: int) -> np.ndarray:
        """Return the image of one environment."""


def check_positive(**values: int) -> None:
    """Reject numbers below 1.

    Raises:
        ValueError: with the name of the number.

    Example:
        >>> check_positive(num_envs=0)
        Traceback (most recent call last):
        ...
        ValueError: num_envs must be at least 1, got 0
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def spec_of(data: TensorDictBase) -> Composite:
    """Return the specs of data from shapes and types; booleans are flags."""
    specs = {key: spec_of(value) if isinstance(value, TensorDictBase) else _leaf(value) for key, value in data.items()}
    return Composite(specs, shape=data.batch_size, device=data.device)


def _leaf(value: Tensor) -> TensorSpec:
    if value.dtype == torch.bool:
        return Categorical(2, shape=value.shape, dtype=torch.bool, device=value.device)
    return Unbounded(value.shape, dtype=value.dtype, device=value.device)
