"""Base of all wrappers of environments from other packages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, TensorSpec

from torchrl_marl.envs.base import TeamEnv
from torchrl_marl.signatures import signature

__all__ = ["WrapperEnv", "actions_like", "check_options"]

_ROOT = {"state", "step_count", "done", "terminated", "truncated"}
_GROUP = {"observation", "image", "action_mask", "mask", "reward", "episode_reward"}


class WrapperEnv(TeamEnv):
    """A batch of environments from another package.

    If agents can drop out of an episode, ``("agents", "mask")`` marks live agents: policies do not learn from the other
    rows. Further outcomes of an episode, such as whether it is won, are ``[B, 1]`` under ``"info"``; the value at the
    last step counts. A subclass resets and steps the copies, and sets ``observation_spec``.

    Args:
        agents: names of the ``N`` agents.
        action_spec: action spec of one environment, ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        num_envs: number of environments stepped together, ``B``.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: seed of the streams; ``None`` draws a seed from Torch's global generator.
        device: device of the tensors.

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
        self.shared_reward, self._bounds = shared_reward, action_spec
        self._set_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        where = torch.ones(self.batch_size, dtype=torch.bool) if asked is None else asked.squeeze(-1).cpu()
        self.streams, shown = self._reset_copies(where, self.streams.cpu())
        return self._data(shown)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self._data(self._step_copies(self._action(tensordict)))

    def _action(self, tensordict: TensorDictBase) -> Tensor:
        """Return the actions, clamped to their range so that a plain Gaussian policy can act."""
        action = tensordict["agents", "action"]
        if not isinstance(self._bounds, Bounded):
            return action
        return action.clamp(self._bounds.space.low.to(action.device), self._bounds.space.high.to(action.device))

    def _outcome(
        self, before: Mapping[str, Any], seen: Mapping[str, Any], reward: Any, terminated: Any, truncated: Any = False
    ) -> dict[str, Any]:
        """Accumulate rewards and count steps, for tensors or JAX arrays.

        Args:
            before: ``episode_reward`` and ``step_count`` before the step.
            seen: entries of ``observation_spec`` after the step.
            reward: reward of each agent, ``[B, N, 1]``.
            terminated: ``[B, 1]``
            truncated: whether the game reached its own time limit, ``[B, 1]``.

        Returns:
            The entries after the step by name, including those of ``seen``.
        """
        if self.shared_reward:
            everyone = np.zeros(reward.shape[-2], dtype=int)
            reward = reward.sum(-2)[:, None][:, everyone]
        steps = before["step_count"] + 1
        truncated = (truncated | (steps >= self.max_steps)) & ~terminated
        sums = {"episode_reward": before["episode_reward"] + reward, "step_count": steps}
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return {**seen, **sums, "reward": reward, **flags}

    def _data(self, shown: Mapping[str, Tensor]) -> TensorDict:
        root: dict[str, Any] = {name: value for name, value in shown.items() if name in _ROOT}
        group = {name: value for name, value in shown.items() if name in _GROUP}
        shape = [*self.batch_size, sum(map(len, self.group_map.values()))]
        root["agents"] = TensorDict(group, batch_size=shape, device=self.device)
        if metrics := {name: value for name, value in shown.items() if name not in _ROOT | _GROUP}:
            root["info"] = TensorDict(metrics, batch_size=self.batch_size, device=self.device)
        return TensorDict(root, batch_size=self.batch_size, device=self.device)

    @abstractmethod
    def _reset_copies(self, where: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Start new episodes where the mask ``where``, ``[B]``, is set, from the streams ``[B]``, both on the CPU.

        Returns:
            The streams after the reset, and the entries of ``observation_spec`` of all environments by name, without
            the group. Environments that are not reset keep their last observation.
        """

    @abstractmethod
    def _step_copies(self, action: Tensor) -> dict[str, Tensor]:
        """Step all environments with the actions ``[B, N]`` or ``[B, N, A]``, without automatic resets.

        Returns:
            The entries of the observation, reward and done specs by name, without the group.
        """

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Draw random actions, only legal ones if ``tensordict`` has a mask: some packages crash on illegal actions."""
        keys = [] if tensordict is None else [(group, "action_mask") for group in self.group_map]
        masks = {key: tensordict[key] for key in keys if key in tensordict.keys(True)}
        if tensordict is None or len(masks) < len(keys):
            tensordict = super().rand_action(tensordict)
        for (group, _), legal in masks.items():
            action = torch.multinomial(legal.flatten(0, 1).float(), 1).reshape(legal.shape[:-1])
            tensordict[group, "action"] = action
        return tensordict

    def _draw(self, env_index: int) -> np.ndarray:
        try:
            return self._picture(env_index)
        except Exception as error:  # packages raise various exceptions without OpenGL or a display
            reason = str(error) or "it does not implement render()"
            raise ValueError(f"the environment cannot be drawn here: {reason}") from error

    @abstractmethod
    def _picture(self, env_index: int) -> np.ndarray:
        """Return the image of one environment, rendered by its package."""


def check_options(options: Mapping[str, Any], scenario: str, *builds: Callable[..., Any]) -> None:
    """Reject options that no constructor accepts.

    Raises:
        ValueError: with the names of the unknown and of the known options.
    """
    parameters = [one for build in builds for one in signature(build).parameters.values()]
    known = [one.name for one in parameters if one.name != "self" and one.kind != one.VAR_KEYWORD]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"scenario {scenario!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")


def actions_like(space: Any, num_agents: int) -> TensorSpec:
    """Return the action spec of all agents from one agent's discrete or bounded continuous space."""
    if hasattr(space, "n"):
        return Categorical(int(space.n), shape=torch.Size([num_agents]))
    shape = torch.Size([num_agents, *space.shape])
    low, high = (torch.tensor(np.broadcast_to(bound, shape), dtype=torch.float32) for bound in (space.low, space.high))
    return Bounded(low, high, shape, dtype=torch.float32)
