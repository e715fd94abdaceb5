"""Environments of Gymnasium and PettingZoo, stepped one by one: Level-Based Foraging, RWARE, MPE and others."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions, check_positive, spec_of
from torchrl_marl.envs.games.streams import draw_below
from torchrl_marl.envs.wrappers.base import WrapperEnv, actions_like, check_options
from torchrl_marl.extras import import_extra
from torchrl_marl.signatures import hands_on_to

__all__ = ["SerialGame", "SerialGymEnv", "as_serial_game", "make_lbforaging", "make_pettingzoo", "make_rware"]


class Turn(NamedTuple):
    """The result of a step."""

    seen: dict[str, np.ndarray]
    reward: Sequence[float]
    terminated: bool
    truncated: bool


class SerialGame(ABC):
    """One environment in which all agents act at the same time.

    Attributes:
        agents: names of the ``N`` agents.
        action_spec: ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        blank: what ``reset`` returns, filled with zeros.
    """

    agents: list[str]
    action_spec: TensorSpec
    blank: dict[str, np.ndarray]

    @abstractmethod
    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Start the episode that a seed gives.

        Returns:
            ``observation [N, O]`` and, where the game has them, ``action_mask [N, A]``, ``mask [N]``, ``state [S]`` and
            the episode's metrics so far by name, ``[1]``.
        """

    @abstractmethod
    def step(self, action: np.ndarray) -> Turn:
        """Step with the actions of all agents, ``[N]`` or ``[N, A]``."""

    @abstractmethod
    def draw(self) -> np.ndarray:
        """Return a picture, ``uint8`` of shape ``[height, width, 3]``, or raise an error that says why not."""


class SerialGymEnv(WrapperEnv):
    """Environments stepped one after the other in this process.

    One TensorDict for the batch is cheaper than TorchRL's ``SerialEnv``, which keeps one for each environment.

    Args:
        make: builds an environment, given its index.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        batch: ``num_envs``, ``seed`` and ``device``, see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Raises:
        ValueError: if ``num_envs`` or ``max_steps`` is below 1.
    """

    def __init__(
        self, make: Callable[[int], SerialGame], *, max_steps: int, shared_reward: bool, **batch: Unpack[BatchOptions]
    ) -> None:
        check_positive(num_envs=batch["num_envs"])
        games = [make(index) for index in range(batch["num_envs"])]
        first = games[0]
        super().__init__(first.agents, first.action_spec, max_steps=max_steps, shared_reward=shared_reward, **batch)
        self._games = games
        self._seen = [game.blank for game in games]
        returns, steps = torch.zeros(len(games), len(first.agents), 1), torch.zeros(len(games), 1, dtype=torch.int32)
        self._sums = {"episode_reward": returns, "step_count": steps}
        self.observation_spec = spec_of(self._data(self._shown()))

    def _reset_copies(self, where: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        drawn, seeds = draw_below(streams, 2**31 - 1)
        for index in where.nonzero().flatten().tolist():
            self._seen[index] = self._games[index].reset(int(seeds[index]))
        self._sums = {
            name: value.masked_fill(where.view(-1, *[1] * (value.ndim - 1)), 0) for name, value in self._sums.items()
        }
        return torch.where(where, drawn, streams), self._shown()

    def _step_copies(self, action: Tensor) -> dict[str, Tensor]:
        turns = [game.step(own) for game, own in zip(self._games, action.cpu().numpy(), strict=True)]
        self._seen = [turn.seen for turn in turns]
        reward = torch.tensor([list(turn.reward) for turn in turns], dtype=torch.float32).unsqueeze(-1)
        ends = torch.tensor([[turn.terminated, turn.truncated] for turn in turns]).split(1, -1)
        outcome = self._outcome(self._sums, self._shown(), reward, *ends)
        self._sums = {name: outcome[name] for name in self._sums}
        return outcome

    def _shown(self) -> dict[str, Tensor]:
        seen = {key: torch.from_numpy(np.stack([seen[key] for seen in self._seen])) for key in self._seen[0]}
        return {**seen, **self._sums}

    def _picture(self, env_index: int) -> np.ndarray:
        picture = self._games[env_index].draw()
        if getattr(picture, "dtype", None) != np.uint8 or getattr(picture, "shape", ())[2:] != (3,):
            found = type(picture).__name__ if picture is None else f"{picture.dtype} {picture.shape}"
            raise ValueError(f"render() must return uint8 [height, width, 3] (render_mode='rgb_array'); got {found}")
        return picture


class _GymGame(SerialGame):
    """An environment of Gymnasium or PettingZoo, which gives the agents' values as a list or as a dictionary.

    Args:
        env: the environment.
        spaces: observation spaces and action spaces by agent.
        named: whether ``step`` takes the actions as a dictionary by agent.
        state_size: length of its ``state()``; ``None`` if it has none.
    """

    def __init__(self, env: Any, *spaces: Mapping[Any, Any], named: bool, state_size: int | None = None) -> None:
        self.env = env
        self._named, self._has_state = named, state_size is not None
        self._agents = list(spaces[1])
        self.agents = [str(agent) for agent in self._agents]
        size, self.action_spec, masked = _equal_spaces(*spaces)
        self.blank = {"observation": np.zeros((len(self.agents), size), np.float32)}
        if masked:
            self.blank["action_mask"] = np.zeros((len(self.agents), self.action_spec.space.n), bool)
        if state_size is not None:
            self.blank["state"] = np.zeros(state_size, np.float32)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        return self._seen(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> Turn:
        moves = action.tolist() if action.ndim == 1 else list(action)
        moves = dict(zip(self._agents, moves, strict=True)) if self._named else moves
        observation, reward, terminated, truncated, _ = self.env.step(moves)
        ended, cut = self._flags(terminated), self._flags(truncated)
        over = [one or other for one, other in zip(ended, cut, strict=True)]
        if any(over) and not all(over):
            raise ValueError(
                f"agents left before the episode ended ({dict(zip(self._agents, over, strict=True))}): "
                "only environments whose agents all leave together can be wrapped"
            )
        return Turn(self._seen(observation), self._of_each(reward), any(ended), any(cut) and not any(ended))

    def draw(self) -> np.ndarray:
        mode = {"mode": "rgb_array"} if "mode" in inspect.signature(self.env.render).parameters else {}
        return self.env.render(**mode)

    def _of_each(self, values: Any) -> list[Any]:
        """Return the values of a dictionary or a list in the agents' order; a single value holds for all agents."""
        if isinstance(values, Mapping):
            return [values[agent] for agent in self._agents]
        return list(values) if hasattr(values, "__len__") else [values] * len(self._agents)

    def _flags(self, values: Any) -> list[bool]:
        if isinstance(values, Mapping) and "__all__" in values:  # as in RLlib
            return [bool(values["__all__"])] * len(self._agents)
        return [bool(value) for value in self._of_each(values)]

    def _seen(self, observation: Any) -> dict[str, np.ndarray]:
        own = self._of_each(observation)
        seen: dict[str, np.ndarray] = {}
        if isinstance(own[0], Mapping):
            seen["action_mask"] = np.stack([view["action_mask"] for view in own]).astype(bool)
            own = [view["observation"] for view in own]
        seen["observation"] = np.stack([np.ravel(view) for view in own]).astype(np.float32)
        return {**seen, "state": self.env.state().astype(np.float32).ravel()} if self._has_state else seen


class _ForagingGame(SerialGame):
    """Level-Based Foraging, which also tells the legal actions and the share of the food that is eaten."""

    def __init__(self, env: Any) -> None:
        self.env, self._game = env, as_serial_game(env)
        self.agents, self.action_spec = self._game.agents, self._game.action_spec
        legal = np.zeros((len(self.agents), self.action_spec.space.n), bool)
        self.blank = {**self._game.blank, "action_mask": legal, "food": np.zeros(1, np.float32)}

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        seen, self._food = self._game.reset(seed), np.count_nonzero(self.env.field)
        return {**seen, **self._known()}

    def step(self, action: np.ndarray) -> Turn:
        turn = self._game.step(action)
        return turn._replace(seen={**turn.seen, **self._known()})

    def draw(self) -> np.ndarray:
        return self._game.draw()

    def _known(self) -> dict[str, np.ndarray]:
        mask = np.zeros_like(self.blank["action_mask"])
        for own, legal in zip(mask, zip(*self.env.get_valid_actions(), strict=True), strict=True):
            own[[int(action.value) for action in set(legal)]] = True
        eaten = 1 - np.count_nonzero(self.env.field) / self._food
        return {"action_mask": mask, "food": np.array([eaten], np.float32)}


def as_serial_game(env: Any) -> SerialGame:
    """Wrap an environment of PettingZoo's parallel API, or a Gymnasium environment of several agents.

    The latter has ``Tuple`` spaces, or ``Dict`` spaces by agent; rewards and flags may be common to all agents.

    Raises:
        ValueError: if it is neither, if agents differ, or if the library's networks cannot take a space.
    """
    name = type(env).__name__
    if hasattr(env, "agent_iter"):
        raise ValueError(
            f"{name} lets agents move in turns: wrap it in pettingzoo.utils.aec_to_parallel, if they may move at once"
        )
    if hasattr(env, "possible_agents"):
        agents = list(env.possible_agents)
        shape = getattr(getattr(env, "state_space", None), "shape", None)
        observation = {agent: env.observation_space(agent) for agent in agents}
        action = {agent: env.action_space(agent) for agent in agents}
        return _GymGame(env, observation, action, named=True, state_size=None if shape is None else int(np.prod(shape)))
    both: list[Any] = [getattr(env, kind, None) for kind in ("observation_space", "action_space")]
    spaces: list[Any] = [getattr(space, "spaces", None) for space in both]
    if all(isinstance(space, Mapping) for space in spaces):
        return _GymGame(env, *spaces, named=True)
    if all(isinstance(space, Sequence) for space in spaces):
        return _GymGame(env, *({f"agent_{i}": one for i, one in enumerate(space)} for space in spaces), named=False)
    raise ValueError(
        f"{name} does not say what each agent observes and does: it needs possible_agents, observation_space(agent) "
        "and action_space(agent), as in PettingZoo, or observation_space and action_space that are both a Tuple with "
        f"a space for each agent, or both a Dict by agents' names; it has {both[0]} and {both[1]}"
    )


@hands_on_to(WrapperEnv.__init__)
def make_lbforaging(
    scenario: str = "Foraging-8x8-2p-2f-v3",
    *,
    max_steps: int = 50,
    shared_reward: bool = True,
    scenario_kwargs: Mapping[str, Any] | None = None,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build Level-Based Foraging: agents of different levels load food together.

    Eating everything is a termination, the time limit a truncation. Actions that are not legal do nothing;
    ``("agents", "action_mask")`` tells which are. ``("info", "food")`` is the share of the food that is eaten.

    Args:
        scenario: a name that the package ``lbforaging`` registers, ``Foraging[-2s]-SxS-Np-Ff[-coop]-v3``.
        max_steps: time limit of an episode.
        shared_reward: whether every agent gets the sum of all agents' rewards, which is at most 1 in an episode.
        scenario_kwargs: arguments of ``ForagingEnv`` that differ from the scenario's, such as ``{"max_num_food": 5}``.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if ``lbforaging`` is not installed.
        ValueError: if an argument is out of its range, or there is no such scenario or option.
    """
    build = import_extra("lbforaging.foraging", "gym").ForagingEnv
    options = {**_registered("lbforaging", scenario), **(scenario_kwargs or {}), "max_episode_steps": float("inf")}
    check_options(options, scenario, build)
    return SerialGymEnv(
        lambda _: _ForagingGame(build(**options)), max_steps=max_steps, shared_reward=shared_reward, **batch
    )


@hands_on_to(WrapperEnv.__init__)
def make_rware(
    scenario: str = "rware-tiny-2ag-v2",
    *,
    max_steps: int = 500,
    shared_reward: bool = True,
    scenario_kwargs: Mapping[str, Any] | None = None,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build the multi-robot warehouse: robots bring requested shelves to the goal and back.

    The original, whose robots stop each other. Jumanji's RobotWarehouse ends an episode when two of them collide, and
    is another task under the same names.

    Args:
        scenario: a name that the package ``rware`` registers, ``rware-SIZE-Nag[-easy|-hard]-v2``.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        scenario_kwargs: arguments of ``Warehouse`` that differ from the scenario's; ``{"shelf_rows": 4,
            "shelf_columns": 5}`` is the size called xlarge.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if ``rware`` is not installed.
        ValueError: if an argument is out of its range, or there is no such scenario or option.
    """
    build = import_extra("rware.warehouse", "gym").Warehouse
    options = {**_registered("rware", scenario), **(scenario_kwargs or {}), "max_steps": None}
    check_options(options, scenario, build)
    make = lambda _: as_serial_game(build(**options))  # noqa: E731
    return SerialGymEnv(make, max_steps=max_steps, shared_reward=shared_reward, **batch)


@hands_on_to(WrapperEnv.__init__)
def make_pettingzoo(
    scenario: str = "simple_spread_v3",
    *,
    package: str = "mpe2",
    max_steps: int = 25,
    shared_reward: bool = False,
    scenario_kwargs: Mapping[str, Any] | None = None,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build a PettingZoo environment whose agents are all alike, such as MPE's simple_spread.

    Agents act at the same time (PettingZoo's parallel API). Actions out of range are clipped to it. The root holds the
    environment's own state where it has one.

    Args:
        scenario: a module of ``package`` with a ``parallel_env``.
        package: where it is from.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        scenario_kwargs: arguments of ``parallel_env``, such as ``{"N": 5, "continuous_actions": True}``.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

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
    check_options(options, scenario, module.raw_env)
    options["render_mode"] = "rgb_array"
    make = lambda _: as_serial_game(module.parallel_env(**options))  # noqa: E731
    return SerialGymEnv(make, max_steps=max_steps, shared_reward=shared_reward, **batch)


def _registered(package: str, scenario: str) -> dict[str, Any]:
    """Return the arguments that a package registered with Gymnasium for a scenario."""
    registry = import_extra("gymnasium", "gym").registry
    names = [name for name, spec in registry.items() if str(spec.entry_point).startswith(f"{package}.")]
    if scenario not in names:
        closest = difflib.get_close_matches(scenario, names, n=3)
        hint = f"; did you mean {' or '.join(map(repr, closest))}?" if closest else ""
        raise ValueError(f"{package} has no scenario {scenario!r}{hint}")
    return registry[scenario].kwargs


def _equal_spaces(observation: Mapping[Any, Any], action: Mapping[Any, Any]) -> tuple[int, TensorSpec, bool]:
    """Return the length of an observation, the spec of all agents' actions, and whether observations hold masks.

    Raises:
        ValueError: if agents differ, or if the library's networks cannot take a space.
    """
    if set(observation) != set(action) or not action:
        raise ValueError(f"agents that observe ({list(observation)}) must be those that act ({list(action)})")
    seen, played = [_seen_by_one(observation[agent]) for agent in action], list(action.values())
    if any(other != seen[0] for other in seen) or any(other != played[0] for other in played):
        raise ValueError(f"agents must have equal spaces, got observations {observation} and actions {action}")
    (size, masked), space, num_agents = seen[0], played[0], len(played)
    discrete = type(space).__name__ == "Discrete" and getattr(space, "start", 0) == 0
    vector = type(space).__name__ == "Box" and len(space.shape) == 1 and np.isfinite([space.low, space.high]).all()
    if not (discrete or vector):
        raise ValueError(f"an agent's actions must be Discrete from 0, or a bounded Box of one dimension; got {space}")
    return size, actions_like(space, num_agents), masked


def _seen_by_one(space: Any) -> tuple[int, bool]:
    """Return the length of an agent's observation, and whether it comes with a mask."""
    parts = getattr(space, "spaces", None)
    masked = isinstance(parts, Mapping) and set(parts) == {"observation", "action_mask"}
    vector = parts["observation"] if masked else space  # pyright: ignore[reportOptionalSubscript]
    if type(vector).__name__ not in ("Box", "MultiBinary"):
        raise ValueError(
            f"an agent's observations must be a Box, or a Dict of observation and action_mask; got {space}: flatten "
            "them (gymnasium.spaces.flatten)"
        )
    return int(np.prod(vector.shape)), masked
