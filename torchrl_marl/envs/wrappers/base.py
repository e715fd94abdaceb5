"""What bridges to environments of other packages have in common: keys, seeds, time limit, shared rewards."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_marl.envs.games.streams import random_streams

__all__ = ["Layout", "WrapperEnv", "check_options", "import_extra"]


_ROOT = {"state", "step_count", "done", "terminated", "truncated"}


class Layout(NamedTuple):
    """What one environment reads and writes."""

    agents: list[str]
    """Names of the ``N`` agents."""
    observation_size: int
    """Length of one agent's observation, ``O``."""
    action_spec: TensorSpec
    """``[N]`` for discrete or ``[N, A]`` for continuous actions."""
    state_size: int | None = None
    """Length of the global state, ``S``; ``None`` if there is none."""
    masked: bool = False
    """Whether the environment says which discrete actions are legal."""
    mortal: bool = False
    """Whether agents can drop out of an episode that goes on."""


class WrapperEnv(EnvBase, ABC):
    """A batch of another package's environments, which differ in how they are reset and stepped.

    The keys are those of the library's own: observations, actions, masks and rewards of the group ``"agents"``, done
    flags, ``step_count`` and the state at the root. Where agents can drop out, ``("agents", "mask")`` tells who lives:
    policies do not learn from the rows of the others. The time limit and ``("agents", "episode_reward")`` are kept
    here, so that no transform is needed.

    Each copy has a random stream of its own, which every episode begins from: the same seed gives the same episodes, a
    copy plays as it would alone, and ``state_dict`` holds what the next ``reset`` begins with.

    Args:
        layout: what one environment reads and writes.
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
        layout: Layout,
        *,
        num_envs: int,
        max_steps: int,
        shared_reward: bool,
        seed: int | None,
        device: torch.device | str,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("max_steps", max_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.layout, self.max_steps, self.shared_reward = layout, max_steps, shared_reward
        self.group_map = {"agents": layout.agents}
        self._set_seed(seed)
        agents = torch.Size([num_envs, len(layout.agents)])
        observed: dict[str, TensorSpec] = {
            "observation": Unbounded(torch.Size([*agents, layout.observation_size])),
            "episode_reward": Unbounded(torch.Size([*agents, 1])),
        }
        if layout.masked:
            choices = layout.action_spec.space.n
            observed["action_mask"] = Categorical(2, torch.Size([*agents, choices]), dtype=torch.bool)
        if layout.mortal:
            observed["mask"] = Categorical(2, agents, dtype=torch.bool)
        self.observation_spec = self._of_agents(observed)
        count = Unbounded(torch.Size([num_envs, 1]), dtype=torch.int32, device=self.device)
        self.observation_spec["step_count"] = count
        if layout.state_size is not None:
            self.observation_spec["state"] = Unbounded(torch.Size([num_envs, layout.state_size]), device=self.device)
        action_spec = layout.action_spec.expand(torch.Size([num_envs, *layout.action_spec.shape]))
        self.action_spec = self._of_agents({"action": action_spec})
        self.reward_spec = self._of_agents({"reward": Unbounded(torch.Size([*agents, 1]))})
        flag = Categorical(2, shape=torch.Size([num_envs, 1]), dtype=torch.bool)
        flags = {"done": flag, "terminated": flag.clone(), "truncated": flag.clone()}
        self.done_spec = Composite(flags, shape=self.batch_size).to(self.device)

    def _of_agents(self, specs: Mapping[str, TensorSpec]) -> Composite:
        group = Composite(dict(specs), shape=(*self.batch_size, len(self.layout.agents)))
        return Composite(agents=group, shape=self.batch_size).to(self.device)

    def _set_seed(self, seed: int | None) -> None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self.set_extra_state(random_streams(seed, self.batch_size[0]))

    def get_extra_state(self) -> Tensor:
        """Return every environment's stream, ``[num_envs]``: the part of ``state_dict`` that is not a parameter."""
        return self._streams

    def set_extra_state(self, state: Tensor) -> None:
        """Continue every environment's stream from ``state``, ``[num_envs]``, at the next ``reset``.

        Raises:
            ValueError: if there is not one stream for each environment.
        """
        if state.shape != self.batch_size:
            raise ValueError(f"streams must be of shape {list(self.batch_size)}, got {list(state.shape)}")
        self._streams = state.cpu()

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        which = torch.ones(self.batch_size, dtype=torch.bool) if asked is None else asked.squeeze(-1).cpu()
        self._streams, shown = self._begin(which, self._streams)
        return self._data(shown)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self._data(self._advance(tensordict["agents", "action"]))

    def _data(self, shown: Mapping[str, Tensor]) -> TensorDict:
        group = {name: value for name, value in shown.items() if name not in _ROOT}
        root: dict[str, Any] = {name: value for name, value in shown.items() if name in _ROOT}
        root["agents"] = TensorDict(group, batch_size=[*self.batch_size, len(self.layout.agents)], device=self.device)
        return TensorDict(root, batch_size=self.batch_size, device=self.device)

    @abstractmethod
    def _begin(self, which: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Begin new episodes where ``which``, ``[B]``, from the streams ``[B]``, both on the CPU.

        Returns:
            The streams after it, and what is seen of all environments, of those that go on as it was: the entries of
            ``observation_spec`` without their groups.
        """

    @abstractmethod
    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        """Play the actions ``[B, N]`` or ``[B, N, A]``; no environment is reset here.

        Returns:
            The entries of the specs of observations, reward and done flags without their groups.
        """

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Draw random actions, legal ones where ``tensordict`` says which are: some packages die of others."""
        if tensordict is None or not self.layout.masked:
            return super().rand_action(tensordict)
        legal = tensordict["agents", "action_mask"]
        action = torch.multinomial(legal.flatten(0, 1).float(), 1).reshape(legal.shape[:-1])
        return tensordict.set(("agents", "action"), action)

    def render(self, env_index: int = 0) -> Tensor:
        """Draw one of the environments with its own package's means.

        Args:
            env_index: which one.

        Returns:
            Picture, ``uint8`` of shape ``[height, width, 3]``.

        Raises:
            ValueError: if there is no such environment, or its package cannot draw it here.
        """
        if not 0 <= env_index < self.batch_size[0]:
            raise ValueError(f"env_index must be in 0..{self.batch_size[0] - 1}, got {env_index}")
        try:
            return torch.from_numpy(np.ascontiguousarray(self._draw(env_index)))
        except Exception as error:  # each package fails in its own way where it finds no OpenGL or display
            raise ValueError(f"the environment cannot be drawn here: {error}") from error

    @abstractmethod
    def _draw(self, env_index: int) -> np.ndarray:
        """Return what ``render`` does."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its name.
        extra: the extra of this library that installs it.

    Raises:
        ImportError: if it is not installed, with the command that does.

    Example:
        >>> import_extra("no_such_game", "games")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ImportError: ... (No module named 'no_such_game'): pip install "torchrl_marl[games]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        command = f'pip install "torchrl_marl[{extra}]"'
        raise ImportError(f"more packages are needed ({error}): {command}") from error


def check_options(build: Callable[..., Any], options: Mapping[str, Any], scenario: str) -> None:
    """Reject options that a constructor does not have.

    Raises:
        ValueError: with the name of the option and those that there are.
    """
    known = [name for name in inspect.signature(build).parameters if name not in ("self", "kwargs")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"scenario {scenario!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
