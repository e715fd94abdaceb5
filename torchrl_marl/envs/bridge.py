"""What bridges to environments of other packages have in common: keys, seeds, time limit, shared rewards."""

from __future__ import annotations

import importlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, TransformedEnv

from torchrl_marl.envs.random_streams import draw_below, random_streams

__all__ = ["BridgeEnv", "Layout", "check_options", "import_extra", "with_time_limit"]


class Layout(NamedTuple):
    """What one environment reads and writes."""

    agents: list[str]
    """Names of the ``N`` agents."""
    observation_size: int
    """Length of one agent's observation."""
    action_spec: TensorSpec
    """``[N]`` for discrete or ``[N, A]`` for continuous actions."""
    state_size: int | None = None
    """Length of the global state; ``None`` if there is none."""
    masked: bool = False
    """Whether the environment says which discrete actions are legal."""


class BridgeEnv(EnvBase):
    """A batch of another package's environments, which differ in how they are reset and stepped.

    The keys are those of the library's own: observations, actions, masks and rewards of the group ``"agents"``, done
    flags and the state at the root. Each copy has a random stream of its own, from which it takes one seed for every
    episode: the same seed gives the same episodes, a copy plays as it would alone, and ``state_dict`` holds what the
    next ``reset`` begins with.

    Args:
        layout: what one environment reads and writes.
        num_envs: number of environments stepped together, ``B``.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Raises:
        ValueError: if ``num_envs`` is below 1.
    """

    def __init__(
        self, layout: Layout, *, num_envs: int, shared_reward: bool, seed: int | None, device: torch.device | str
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.layout = layout
        self.shared_reward = shared_reward
        self.group_map = {"agents": layout.agents}
        self._set_seed(seed)
        agents = len(layout.agents)
        observed: dict[str, TensorSpec] = {
            "observation": Unbounded(torch.Size([num_envs, agents, layout.observation_size]))
        }
        if layout.masked:
            choices = layout.action_spec.space.n
            observed["action_mask"] = Categorical(2, torch.Size([num_envs, agents, choices]), dtype=torch.bool)
        self.observation_spec = self._of_agents(observed)
        if layout.state_size is not None:
            self.observation_spec["state"] = Unbounded(torch.Size([num_envs, layout.state_size]), device=self.device)
        action_spec = layout.action_spec.expand(torch.Size([num_envs, *layout.action_spec.shape]))
        self.action_spec = self._of_agents({"action": action_spec})
        self.reward_spec = self._of_agents({"reward": Unbounded(torch.Size([num_envs, agents, 1]))})
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
        streams, seeds = draw_below(self._streams, 2**31 - 1)
        self._streams = torch.where(which, streams, self._streams)
        return self._data(self._begin(which, seeds))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["agents", "action"]
        spec = self.full_action_spec["agents", "action"]
        if isinstance(spec, Bounded):
            action = action.clamp(spec.space.low, spec.space.high)  # so that a plain Gaussian policy can act
        data = self._advance(action)
        reward = data.pop("reward").unsqueeze(-1)
        terminated, truncated = data.pop("terminated").unsqueeze(-1), data.pop("truncated").unsqueeze(-1)
        result = self._data(data)
        if self.shared_reward:
            reward = reward.sum(-2, keepdim=True).expand_as(reward)
        result["agents", "reward"] = reward
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return result.update(flags)

    def _data(self, observed: dict[str, Tensor]) -> TensorDict:
        state = {"state": observed.pop("state")} if "state" in observed else {}
        group = TensorDict(observed, batch_size=[*self.batch_size, len(self.layout.agents)], device=self.device)
        return TensorDict({"agents": group, **state}, batch_size=self.batch_size, device=self.device)

    @abstractmethod
    def _begin(self, which: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """Begin new episodes where ``which``, ``[B]``, with the seeds ``[B]``.

        Returns:
            ``observation [B, N, O]``, ``action_mask [B, N, A]`` and ``state [B, S]`` (where the layout has them) of all
            environments, of those that go on as they were.
        """

    @abstractmethod
    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        """Play the actions ``[B, N]`` or ``[B, N, A]``; no environment is reset here.

        Returns:
            What ``_begin`` returns, ``reward [B, N]``, ``terminated [B]`` and ``truncated [B]``.
        """


def with_time_limit(env: BridgeEnv, max_steps: int) -> TransformedEnv:
    """Truncate episodes after ``max_steps`` steps and sum up ``("agents", "episode_reward")``.

    Raises:
        ValueError: if ``max_steps`` is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    return TransformedEnv(env, Compose([StepCounter(max_steps=max_steps), RewardSum()]))


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
