"""Environments of Gymnasium and PettingZoo that play one at a time: Level-Based Foraging, RWARE, MPE and their kin."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrl.data import Bounded, Categorical, TensorSpec
from torchrl.envs import EnvBase

from torchrl_marl.envs.bridge import BridgeEnv, Layout, check_options, import_extra
from torchrl_marl.envs.random_streams import draw_below

__all__ = ["TeamGame", "TeamGamesEnv", "make_lbforaging", "make_pettingzoo", "make_rware"]


class Turn(NamedTuple):
    """What a game shows after a step."""

    seen: dict[str, np.ndarray]
    reward: Sequence[float]
    terminated: bool
    truncated: bool


class TeamGame(ABC):
    """One environment in which all agents move at once."""

    layout: Layout

    @abstractmethod
    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Begin the episode of a seed.

        Returns:
            ``observation [N, O]``, and ``action_mask [N, A]`` and ``state [S]`` where the layout has them.
        """

    @abstractmethod
    def step(self, action: np.ndarray) -> Turn:
        """Play the actions of all agents, ``[N]`` or ``[N, A]``."""

    @abstractmethod
    def draw(self) -> np.ndarray:
        """Return a picture, ``uint8`` of shape ``[height, width, 3]``, or raise whatever says why there is none."""


class TeamGamesEnv(BridgeEnv):
    """Games stepped one after the other in this process.

    One TensorDict for the batch costs less than a wrapped environment for each game (``SerialEnv``) would.

    Args:
        games: equal games, one for each environment of the batch.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Raises:
        ValueError: if there is no game.
    """

    def __init__(
        self,
        games: Sequence[TeamGame],
        *,
        max_steps: int,
        shared_reward: bool,
        seed: int | None,
        device: torch.device | str,
    ) -> None:
        if not games:
            raise ValueError("num_envs must be at least 1, got 0")
        super().__init__(
            games[0].layout,
            num_envs=len(games),
            max_steps=max_steps,
            shared_reward=shared_reward,
            seed=seed,
            device=device,
        )
        self._games = games
        self._seen: list[dict[str, np.ndarray]] = [{}] * len(games)
        self._steps = torch.zeros(len(games), 1, dtype=torch.int32)
        self._returns = torch.zeros(len(games), len(self.layout.agents), 1)

    def _begin(self, which: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        drawn, seeds = draw_below(streams, 2**31 - 1)
        for index in which.nonzero().flatten().tolist():
            self._seen[index] = self._games[index].reset(int(seeds[index]))
        self._steps = self._steps.masked_fill(which[:, None], 0)
        self._returns = self._returns.masked_fill(which[:, None, None], 0)
        return torch.where(which, drawn, streams), self._shown()

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        spec = self.layout.action_spec
        if isinstance(spec, Bounded):  # so that a plain Gaussian policy can act
            action = action.clamp(spec.space.low.to(action.device), spec.space.high.to(action.device))
        turns = [game.step(own) for game, own in zip(self._games, action.cpu().numpy(), strict=True)]
        self._seen = [turn.seen for turn in turns]
        reward = torch.tensor([list(turn.reward) for turn in turns], dtype=torch.float32).unsqueeze(-1)
        if self.shared_reward:
            reward = reward.sum(-2, keepdim=True).expand_as(reward)
        self._steps, self._returns = self._steps + 1, self._returns + reward
        terminated, truncated = torch.tensor([[turn.terminated, turn.truncated] for turn in turns]).split(1, -1)
        truncated = (truncated | (self._steps >= self.max_steps)) & ~terminated
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return {**self._shown(), "reward": reward, **flags}

    def _shown(self) -> dict[str, Tensor]:
        seen = {key: torch.from_numpy(np.stack([seen[key] for seen in self._seen])) for key in self._seen[0]}
        return {**seen, "episode_reward": self._returns, "step_count": self._steps}

    def _draw(self, env_index: int) -> np.ndarray:
        return self._games[env_index].draw()


class _GymnasiumGame(TeamGame):
    """A Gymnasium environment with a tuple of observations, one for each agent, and a list of rewards.

    The time limit is not the game's: it is built without one.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        observation, action = env.observation_space.spaces, env.action_space.spaces
        self._legal_actions = getattr(env, "get_valid_actions", None)  # Level-Based Foraging has it, RWARE has not
        agents = [f"agent_{index}" for index in range(len(action))]
        size, spec = _equal_spaces(dict(zip(agents, observation, strict=True)), dict(zip(agents, action, strict=True)))
        self.layout = Layout(agents, size, spec, masked=self._legal_actions is not None)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        return self._seen(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Turn:
        observation, reward, terminated, truncated, _ = self.env.step(action.tolist())
        return Turn(self._seen(observation), reward, bool(terminated), bool(truncated))

    def draw(self) -> np.ndarray:
        return self.env.render(mode="rgb_array")

    def _seen(self, observation: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        seen = {"observation": np.stack(observation).astype(np.float32)}
        if self._legal_actions is not None:
            seen["action_mask"] = np.zeros((len(observation), self.layout.action_spec.space.n), dtype=bool)
            for mask, legal in zip(seen["action_mask"], zip(*self._legal_actions(), strict=True), strict=True):
                mask[[int(action.value) for action in set(legal)]] = True
        return seen


class _ParallelGame(TeamGame):
    """A PettingZoo parallel environment whose agents leave it together."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self._agents = list(env.possible_agents)
        self._has_state = getattr(env, "state_space", None) is not None
        size, spec = _equal_spaces(
            {agent: env.observation_space(agent) for agent in self._agents},
            {agent: env.action_space(agent) for agent in self._agents},
        )
        state_size = int(np.prod(env.state_space.shape)) if self._has_state else None
        self.layout = Layout(self._agents, size, spec, state_size)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        return self._seen(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Turn:
        observation, reward, terminated, truncated, _ = self.env.step(dict(zip(self._agents, action, strict=True)))
        over = [terminated[agent] or truncated[agent] for agent in self._agents]
        if any(over) and not all(over):
            raise ValueError(
                f"agents left before the episode ended ({dict(zip(self._agents, over, strict=True))}): "
                "only environments whose agents all leave together can be bridged"
            )
        ended = any(terminated.values())
        rewards = [reward[agent] for agent in self._agents]
        return Turn(self._seen(observation), rewards, ended, any(truncated.values()) and not ended)

    def draw(self) -> np.ndarray:
        return self.env.render()

    def _seen(self, observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen = {"observation": np.stack([observation[agent] for agent in self._agents]).astype(np.float32)}
        return {**seen, "state": self.env.state().astype(np.float32).ravel()} if self._has_state else seen


def make_lbforaging(
    scenario: str = "Foraging-8x8-2p-2f-v3",
    *,
    num_envs: int,
    max_steps: int = 50,
    shared_reward: bool = True,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    scenario_kwargs: Mapping[str, Any] | None = None,
) -> EnvBase:
    """Build Level-Based Foraging: agents of different levels load food together.

    Eating everything is a termination, the time limit a truncation. Actions that are not legal do nothing;
    ``("agents", "action_mask")`` tells which are.

    Args:
        scenario: a name that the package ``lbforaging`` registers, ``Foraging[-2s]-SxS-Np-Ff[-coop]-v3``.
        num_envs: number of environments.
        max_steps: time limit of an episode.
        shared_reward: whether every agent gets the sum of all agents' rewards, which is at most 1 in an episode.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.
        scenario_kwargs: arguments of ``ForagingEnv`` that differ from the scenario's, such as ``{"max_num_food": 5}``.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if ``lbforaging`` is not installed.
        ValueError: if an argument is out of its range, or there is no such scenario or option.
    """
    build = import_extra("lbforaging.foraging", "gym").ForagingEnv
    options = {**_registered("lbforaging", scenario), **(scenario_kwargs or {}), "max_episode_steps": float("inf")}
    check_options(build, options, scenario)
    games = [_GymnasiumGame(build(**options)) for _ in range(num_envs)]
    return TeamGamesEnv(games, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device)


def make_rware(
    scenario: str = "rware-tiny-2ag-v2",
    *,
    num_envs: int,
    max_steps: int = 500,
    shared_reward: bool = True,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    scenario_kwargs: Mapping[str, Any] | None = None,
) -> EnvBase:
    """Build the multi-robot warehouse: robots bring requested shelves to the goal and back.

    The original, whose robots stop each other. Jumanji's RobotWarehouse ends an episode when two of them collide, and
    is another task under the same names.

    Args:
        scenario: a name that the package ``rware`` registers, ``rware-SIZE-Nag[-easy|-hard]-v2``.
        num_envs: number of environments.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.
        scenario_kwargs: arguments of ``Warehouse`` that differ from the scenario's; ``{"shelf_rows": 4,
            "shelf_columns": 5}`` is the size called xlarge.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if ``rware`` is not installed.
        ValueError: if an argument is out of its range, or there is no such scenario or option.
    """
    build = import_extra("rware.warehouse", "gym").Warehouse
    options = {**_registered("rware", scenario), **(scenario_kwargs or {}), "max_steps": None}
    check_options(build, options, scenario)
    games = [_GymnasiumGame(build(**options)) for _ in range(num_envs)]
    return TeamGamesEnv(games, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device)


def make_pettingzoo(
    scenario: str = "simple_spread_v3",
    *,
    num_envs: int,
    package: str = "mpe2",
    max_steps: int = 25,
    shared_reward: bool = False,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    scenario_kwargs: Mapping[str, Any] | None = None,
) -> EnvBase:
    """Build a PettingZoo environment whose agents are all alike, such as MPE's simple_spread.

    Agents act at the same time (PettingZoo's parallel API). Actions out of range are clipped to it. The root holds the
    environment's own state where it has one.

    Args:
        scenario: a module of ``package`` with a ``parallel_env``.
        num_envs: number of environments.
        package: where it is from.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.
        scenario_kwargs: arguments of ``parallel_env``, such as ``{"N": 5, "continuous_actions": True}``.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if an argument is out of its range, there is no such option, or the agents are not alike.
    """
    names = [module.name for module in pkgutil.iter_modules(import_extra(package, "mpe").__path__)]
    if scenario not in names:
        raise ValueError(f"{package} has no scenario {scenario!r}; it has {', '.join(names)}")
    module = importlib.import_module(f"{package}.{scenario}")
    options = {**(scenario_kwargs or {}), "max_cycles": max_steps}
    check_options(module.raw_env, options, scenario)
    options["render_mode"] = "rgb_array"
    games = [_ParallelGame(module.parallel_env(**options)) for _ in range(num_envs)]
    return TeamGamesEnv(games, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device)


def _registered(package: str, scenario: str) -> dict[str, Any]:
    """The arguments that a package registered with Gymnasium for a scenario."""
    registry = import_extra("gymnasium", "gym").registry
    names = [name for name, spec in registry.items() if str(spec.entry_point).startswith(f"{package}.")]
    if scenario not in names:
        closest = difflib.get_close_matches(scenario, names, n=3)
        hint = f"; did you mean {' or '.join(map(repr, closest))}?" if closest else ""
        raise ValueError(f"{package} has no scenario {scenario!r}{hint}")
    return registry[scenario].kwargs


def _equal_spaces(observation: Mapping[str, Any], action: Mapping[str, Any]) -> tuple[int, TensorSpec]:
    """The length of an observation and the specification of all agents' actions.

    Raises:
        ValueError: if agents differ or a space is not a vector or number.
    """
    first, *others = action
    if any(observation[agent].shape != observation[first].shape or action[agent] != action[first] for agent in others):
        raise ValueError(f"agents must have equal spaces, got observations {observation} and actions {action}")
    seen, played = observation[first], action[first]
    if len(seen.shape) != 1:
        raise ValueError(f"observations must be vectors, got the shape {seen.shape}")
    num_agents = len(action)
    if type(played).__name__ == "Discrete":
        return seen.shape[0], Categorical(int(played.n), shape=torch.Size([num_agents]))
    low, high = (torch.from_numpy(bound).expand(num_agents, -1) for bound in (played.low, played.high))
    return seen.shape[0], Bounded(low, high, torch.Size([num_agents, played.shape[0]]), dtype=torch.float32)
