"""The base of all wrappers of other packages' environments."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_marl.envs.base import TeamEnv

__all__ = ["WrapperEnv", "check_options"]

_ROOT = {"state", "step_count", "done", "terminated", "truncated"}


class WrapperEnv(TeamEnv):
    """A batch of another package's environments.

    Where agents can drop out of an episode, ``("agents", "mask")`` marks those that are alive: policies do not learn
    from the other rows. A subclass resets and steps the copies, and sets ``observation_spec``.

    Args:
        agents: names of the ``N`` agents.
        action_spec: of one environment, ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        num_envs: number of environments stepped together, ``B``.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Raises:
        ValueError: if ``num_envs`` or ``max_steps`` is below 1.
    """

    def __init__(
        self,
        agents: Sequence[str],
        action_spec: TensorSpec,
        *,
        num_envs: int,
        max_steps: int,
        shared_reward: bool,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(agents, action_spec, num_envs=num_envs, max_steps=max_steps, device=device)
        self.shared_reward = shared_reward
        self._set_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        where = torch.ones(self.batch_size, dtype=torch.bool) if asked is None else asked.squeeze(-1).cpu()
        self.streams, shown = self._reset_copies(where, self.streams.cpu())
        return self._data(shown)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self._data(self._step_copies(tensordict["agents", "action"]))

    def _data(self, shown: Mapping[str, Tensor]) -> TensorDict:
        group = {name: value for name, value in shown.items() if name not in _ROOT}
        root: dict[str, Any] = {name: value for name, value in shown.items() if name in _ROOT}
        num_agents = len(self.group_map["agents"])
        root["agents"] = TensorDict(group, batch_size=[*self.batch_size, num_agents], device=self.device)
        return TensorDict(root, batch_size=self.batch_size, device=self.device)

    @abstractmethod
    def _reset_copies(self, where: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Begin new episodes where the mask ``where``, ``[B]``, is set, from the streams ``[B]``, both on the CPU.

        Returns:
            The streams after the reset, and the entries of ``observation_spec`` of all environments by name, without
            their group. Environments that are not reset keep their last observation.
        """

    @abstractmethod
    def _step_copies(self, action: Tensor) -> dict[str, Tensor]:
        """Step all environments with the actions ``[B, N]`` or ``[B, N, A]``, without resetting any.

        Returns:
            The entries of the specs of observations, reward and done flags by name, without their group.
        """

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Draw random actions, only legal ones if ``tensordict`` has a mask: some packages crash on illegal ones."""
        legal = None if tensordict is None else tensordict.get(("agents", "action_mask"), None)
        if tensordict is None or legal is None:
            return super().rand_action(tensordict)
        action = torch.multinomial(legal.flatten(0, 1).float(), 1).reshape(legal.shape[:-1])
        return tensordict.set(("agents", "action"), action)

    def _draw(self, env_index: int) -> np.ndarray:
        try:
            return self._picture(env_index)
        except Exception as error:  # without OpenGL or a display every package fails in its own way
            raise ValueError(f"the environment cannot be drawn here: {error}") from error

    @abstractmethod
    def _picture(self, env_index: int) -> np.ndarray:
        """Return the picture of one environment, drawn by its package."""


def check_options(build: Callable[..., Any], options: Mapping[str, Any], scenario: str) -> None:
    """Reject options that a constructor does not have.

    Raises:
        ValueError: with the name of the option and those that there are.
    """
    known = [name for name in inspect.signature(build).parameters if name not in ("self", "kwargs")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"scenario {scenario!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
