"""Base of cooperative games written in Torch as pure functions on states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import TensorSpec

from torchrl_marl.envs.base import check_positive

__all__ = ["Rules", "State", "TimeLimit"]

TimeLimit = Literal["truncate", "terminate"]
State = Mapping[str, Tensor]  # the entries of a state's TensorDict


@dataclass(eq=False, repr=False, kw_only=True)
class Rules(nn.Module, ABC):
    """A cooperative game as pure functions on a state, for any batch ``[*B]`` of environments at once.

    A collector only needs ``reset``, ``describe``, ``step`` and ``restart``, eager or within ``torch.compile``;
    :class:`~torchrl_marl.envs.TensorEnv` wraps them as a TorchRL environment. The four functions depend only on their
    arguments and constants, do not synchronise with the device, and have no Python loop over environments or agents.

    A state is a TensorDict that holds at least ``random`` (the environment's stream), ``step`` and ``episode_reward``,
    all ``[*B]``. Each environment draws from its own stream only: its episodes do not depend on the batch, and a stored
    state resumes it exactly.

    A game defines ``action_spec``, ``init_state``, ``transition``, ``observe`` and ``draw``; its settings are dataclass
    fields. Lookup tables are buffers, so ``to`` moves them. ``fixed_length`` is set if the number of steps is part of
    the game, so that the limit is a termination.

    Args:
        num_agents: number of agents, ``N``.
        max_steps: time limit of an episode.
        time_limit: how the limit is reported. "truncate" sets ``truncated``, and advantage estimation bootstraps from
            the last state; "terminate" sets ``terminated``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from torchrl_marl.envs import MazeEnv
        >>> from torchrl_marl.envs.games.streams import random_streams
        >>> rules = MazeEnv("black_red", num_envs=1).rules
        >>> state = rules.reset(random_streams(0, 1000))
        >>> data = rules.describe(state)  # what the agents see
        >>> state, next_data = rules.step(state, torch.ones(1000, 2, dtype=torch.int64))  # and reward and done flags
        >>> state = rules.restart(state, next_data["done"].squeeze(-1))
        >>> state["step"].unique()
        tensor([1])
    """

    num_agents: int
    max_steps: int
    time_limit: TimeLimit
    fixed_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__init__()
        check_positive(num_agents=self.num_agents, max_steps=self.max_steps)
        if self.time_limit not in ("truncate", "terminate"):
            raise ValueError(f"time_limit must be 'truncate' or 'terminate', got {self.time_limit!r}")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...  # a table

    def _register_tables(self, **tables: Tensor) -> None:
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @property
    @abstractmethod
    def action_spec(self) -> TensorSpec:
        """Action spec of one environment, ``[N]`` for discrete or ``[N, A]`` for continuous actions."""

    @abstractmethod
    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Return the game's entries of an initial state, and ``random`` if numbers were drawn."""

    @abstractmethod
    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the changed entries, and the team's reward and whether the game is over, both ``[*B]``."""

    @abstractmethod
    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the agents' entries, ``[*B, N, ...]`` each, and root entries such as ``state``."""

    def outcome(self, state: State) -> dict[str, Tensor]:
        """Return further outcomes of an episode, the entries of ``"info"`` by name, ``[*B]`` each.

        An episode's outcomes are the values at its last step. The default is no outcome.
        """
        return {}

    @abstractmethod
    def draw(self, state: State) -> np.ndarray:
        """Return an image of one environment's state, ``uint8`` of shape ``[height, width, 3]``."""

    def reset(self, random: Tensor) -> TensorDict:
        """Return the states of new episodes, drawn from the streams ``random``, ``[*B]``."""
        zeros = torch.zeros_like(random)
        state = {"random": random, "step": zeros, "episode_reward": zeros.float(), **self.init_state(random)}
        return TensorDict(state, batch_size=random.shape)

    def restart(self, state: TensorDict, where: Tensor) -> TensorDict:
        """Return the states, with new episodes where the mask ``where``, ``[*B]``, is set."""
        return self.reset(state["random"]).where(where, state)

    def step(self, state: TensorDict, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """Play one step.

        Args:
            state: state returned by ``reset``, ``restart`` or ``step``.
            action: actions of all agents, ``[*B, N]`` or ``[*B, N, A]``.

        Returns:
            The next state, and its entries from ``describe`` with ``("agents", "reward")``, ``done``, ``terminated``
            and ``truncated``.
        """
        entries = _entries(state)
        changes, reward, terminated = self.transition(entries, action)
        step = entries["step"] + 1
        at_limit = step >= self.max_steps
        if self.time_limit == "terminate":
            terminated = terminated | at_limit
        truncated = at_limit & ~terminated
        changes |= {"step": step, "episode_reward": entries["episode_reward"] + reward}
        state = TensorDict({**entries, **changes}, batch_size=state.batch_size)
        data = self.describe(state)
        data["agents", "reward"] = self._per_agent(reward)
        for name, flag in (("done", terminated | truncated), ("terminated", terminated), ("truncated", truncated)):
            data[name] = flag.unsqueeze(-1)
        return state, data

    def describe(self, state: TensorDict) -> TensorDict:
        """Return the entries of a state: observations, ``episode_reward``, ``step_count`` and current ``"info"``."""
        batch, entries = state.batch_size, _entries(state)
        agents, root = self.observe(entries)
        agents["episode_reward"] = self._per_agent(entries["episode_reward"])
        content: dict[str, Any] = {"agents": TensorDict(agents, batch_size=[*batch, self.num_agents])}
        if outcome := self.outcome(entries):
            info = {name: value.unsqueeze(-1).float() for name, value in outcome.items()}
            content["info"] = TensorDict(info, batch_size=batch)
        return TensorDict({**content, **root, "step_count": entries["step"].unsqueeze(-1).clone()}, batch_size=batch)

    def _per_agent(self, value: Tensor) -> Tensor:
        # Every agent gets a copy, as transforms may write in place.
        return value[..., None, None].expand(*value.shape, self.num_agents, 1).clone()


def _entries(state: TensorDict) -> dict[str, Tensor]:
    return dict(state.items())  # pyright: ignore[reportReturnType]
