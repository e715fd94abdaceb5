"""Gymnasium and PettingZoo environments, stepped one by one: Level-Based Foraging, RWARE, MPE and others."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions, check_positive, spec_of
from torchrl_marl.envs.games.streams import draw_below
from torchrl_marl.envs.wrappers.base import WrapperEnv, check_options
from torchrl_marl.envs.wrappers.spaces import AgentSpaces, Part, group_agents, part_of
from torchrl_marl.extras import import_extra
from torchrl_marl.signatures import hands_on_to, nearest

__all__ = [
    "SerialGame",
    "SerialGymEnv",
    "as_serial_game",
    "make_lbforaging",
    "make_mamujoco",
    "make_pettingzoo",
    "make_rware",
]


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
        blank: the entries that ``reset`` returns, filled with zeros.
        groups: groups of agents by name; empty if all agents form the group ``"agents"``.
    """

    agents: list[str]
    action_spec: TensorSpec
    groups: Mapping[str, Part] = MappingProxyType({})
    blank: dict[str, np.ndarray]

    @abstractmethod
    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Start the episode of a seed.

        Returns:
            ``observation [N, O]``, or images, and, if the game has them, ``image [N, H, W, C]`` beside the observation,
            ``action_mask [N, A]``, ``mask [N]``, ``state [S]`` and the episode's current metrics by name, ``[1]``.
        """

    @abstractmethod
    def step(self, action: np.ndarray) -> Turn:
        """Step with the actions of all agents, ``[N]`` or ``[N, A]``."""

    @abstractmethod
    def draw(self) -> np.ndarray:
        """Return an image, ``uint8`` of shape ``[height, width, 3]``, or raise an error that explains why not."""


class SerialGymEnv(WrapperEnv):
    """Environments stepped one after the other in this process.

    One TensorDict for the batch is cheaper than TorchRL's ``SerialEnv``, which keeps one for each environment.

    Args:
        make: function that builds the environment with a given index.
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
        self._games, self._parts = games, first.groups
        if self._parts:
            self._regroup()
        self._seen = [game.blank for game in games]
        returns, steps = torch.zeros(len(games), len(first.agents), 1), torch.zeros(len(games), 1, dtype=torch.int32)
        self._sums = {"episode_reward": returns, "step_count": steps}
        self.observation_spec = spec_of(self._data(self._shown()))

    def _regroup(self) -> None:
        (everyone,), batch = self.group_map.values(), self.batch_size
        self.group_map = {name: [everyone[index] for index in part.members] for name, part in self._parts.items()}
        actions, rewards = Composite(shape=batch), Composite(shape=batch)
        for name, part in self._parts.items():
            size, spec = torch.Size([*batch, len(part.members)]), part.action_spec
            actions[name] = Composite(action=spec.expand(torch.Size([*batch, *spec.shape])), shape=size)
            rewards[name] = Composite(reward=Unbounded(torch.Size([*size, 1])), shape=size)
        self.action_spec, self.reward_spec = actions.to(self.device), rewards.to(self.device)

    def _action(self, tensordict: TensorDictBase) -> Tensor:
        if not self._parts:
            return super()._action(tensordict)
        joint = torch.zeros(*self.batch_size, *self._bounds.shape, dtype=self._bounds.dtype, device=self.device)
        for name, part in self._parts.items():
            own = self.full_action_spec[name, "action"].project(tensordict[name, "action"])
            joint[(slice(None), part.members, *[slice(size) for size in own.shape[2:]])] = own
        return joint

    def _data(self, shown: Mapping[str, Tensor]) -> TensorDict:
        data = super()._data(shown)
        everyone: Any = data.pop("agents") if self._parts else None
        for name, part in self._parts.items():
            own: Any = everyone[:, part.members]
            if "observation" in own.keys():  # padded to the longest of the group, not of all agents
                own["observation"] = own["observation"][(..., *[slice(size) for size in part.shape])]
            if (legal := own.pop("action_mask", None)) is not None and part.masked:
                own["action_mask"] = legal[..., : part.action_spec.space.n]
            data[name] = own
        return data

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
    """A Gymnasium or PettingZoo environment, which returns the agents' values as a list or as a dictionary.

    Args:
        env: the environment.
        spaces: observation spaces and action spaces by agent.
        named: whether ``step`` takes the actions as a dictionary by agent.
        state_size: length of ``state()``; ``None`` without a state.
        mortal: whether agents may leave before the episode ends.
        group_by: see :func:`~torchrl_marl.envs.wrappers.spaces.group_agents`.
    """

    def __init__(
        self,
        env: Any,
        *spaces: Mapping[Any, Any],
        named: bool,
        state_size: int | None = None,
        mortal: bool = False,
        group_by: str | Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        observation, action = spaces
        if set(observation) != set(action) or not action:
            raise ValueError(f"agents that observe ({list(observation)}) must be those that act ({list(action)})")
        self.env = env
        self._named, self._mortal = named, mortal
        self._agents = list(action)
        self._live = set(self._agents)
        self.agents = [str(agent) for agent in self._agents]
        self._spaces = [AgentSpaces(observation[agent], action[agent]) for agent in self._agents]
        groups = group_agents(self.agents, self._spaces, group_by)
        parts = {name: part_of(self._spaces, own, pad=group_by is not None) for name, own in groups.items()}
        self._scaled = {index: part.scaled for part in parts.values() for index in part.members}
        joint = parts.get("agents") if len(parts) == 1 else None
        if joint is None:
            self.groups = parts
            joint = part_of(self._spaces, list(range(len(self.agents))), pad=True)
        self.action_spec = joint.action_spec
        kind = np.float32 if len(joint.shape) == 1 else np.uint8
        self.blank = {"observation": np.zeros((len(self.agents), *joint.shape), kind)}
        if joint.image is not None:
            self.blank["image"] = np.zeros((len(self.agents), *joint.image), np.uint8)
        if joint.masked:
            choices = np.arange(joint.action_spec.space.n)
            self.blank["action_mask"] = choices < np.array([[own.num_actions] for own in self._spaces])
        if mortal:
            self.blank["mask"] = np.zeros(len(self.agents), bool)
        if state_size is not None:
            self.blank["state"] = np.zeros(state_size, np.float32)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        observation = self._of_each(self.env.reset(seed=seed)[0])
        self._live = set(observation)
        return self._seen(observation)

    def step(self, action: np.ndarray) -> Turn:
        choices = zip(self._agents, self._spaces, action.tolist() if action.ndim == 1 else action, strict=True)
        acting = self._live if self._named else self._agents
        moves = {
            agent: own.move(choice, scaled=self._scaled[index])
            for index, (agent, own, choice) in enumerate(choices)
            if agent in acting
        }
        observation, reward, terminated, truncated, _ = self.env.step(moves if self._named else tuple(moves.values()))
        ended, cut = self._flags(terminated), self._flags(truncated)
        observation, reward = self._of_each(observation), self._of_each(reward)
        before, self._live = self._live, {agent for agent in observation if not (ended.get(agent) or cut.get(agent))}
        if self._live and not (self._mortal or self._live == before):
            raise ValueError(
                f"agents left before the episode ended ({', '.join(map(str, before - self._live))}): only make_custom "
                "(env=custom) wraps environments whose agents do not all leave together"
            )
        survived = any(cut.get(agent) and not ended.get(agent) for agent in before)
        over = not self._live
        earned = [reward.get(agent, 0.0) for agent in self._agents]
        return Turn(self._seen(observation), earned, over and not survived, over and survived)

    def draw(self) -> np.ndarray:
        mode = {"mode": "rgb_array"} if "mode" in inspect.signature(self.env.render).parameters else {}
        return self.env.render(**mode)

    def _of_each(self, values: Any) -> dict[Any, Any]:
        """Return values by agent from a dictionary, a list, or a single value for all agents."""
        if isinstance(values, Mapping):
            return {agent: values[agent] for agent in self._agents if agent in values}
        values = list(values) if hasattr(values, "__len__") else [values] * len(self._agents)
        return dict(zip(self._agents, values, strict=True))

    def _flags(self, values: Any) -> dict[Any, bool]:
        everyone = isinstance(values, Mapping) and values.get("__all__")  # as in RLlib
        return dict.fromkeys(self._agents, True) if everyone else self._of_each(values)

    def _seen(self, observation: Mapping[Any, Any]) -> dict[str, np.ndarray]:
        """Return the observed entries; agents that have left observe zeros, with every action legal."""
        seen = {key: value.copy() for key, value in self.blank.items()}
        for index, (agent, own) in enumerate(zip(self._agents, self._spaces, strict=True)):
            if agent not in self._live and (self._live or agent not in observation):
                continue
            view = observation[agent]
            if own.masked:
                seen["action_mask"][index, : own.num_actions] = own.legal(view["action_mask"])
                view = view["observation"]
            if own.image is not None:
                seen["image"][index] = view[own.image]
            row = seen["observation"][index].reshape(-1)
            view = own.flat(view)
            row[: len(view)] = view
        if self._mortal:
            seen["mask"][:] = [agent in self._live for agent in self._agents]
        if "state" in seen:
            with nullcontext() if self._live else suppress(Exception):  # after the episode there may be no state
                self._state = self.env.state().astype(np.float32).ravel()
            seen["state"] = self._state
        return seen


class _ForagingGame(SerialGame):
    """Level-Based Foraging with the mask of legal actions and the share of eaten food."""

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


def as_serial_game(
    env: Any, *, state: bool = True, mortal: bool = False, group_by: str | Mapping[str, Sequence[str]] | None = None
) -> SerialGame:
    """Wrap an environment of PettingZoo's parallel API, or a Gymnasium environment of several agents.

    A Gymnasium environment has ``Tuple`` spaces, or ``Dict`` spaces keyed by agent; its rewards and flags may be common
    to all agents.

    Args:
        env: the environment.
        state: whether to keep the ``state()`` of PettingZoo environments that have one.
        mortal: whether agents may leave before the episode ends; ``mask`` then marks the live agents.
        group_by: see :func:`~torchrl_marl.envs.wrappers.spaces.group_agents`.

    Raises:
        ValueError: if the environment is of neither kind, if spaces differ although ``group_by`` is ``None``, or if the
            library's networks do not support a space.
    """
    how: dict[str, Any] = {"mortal": mortal, "group_by": group_by}
    name = type(env).__name__
    if hasattr(env, "agent_iter"):
        raise ValueError(
            f"{name} lets agents move in turns: wrap it in pettingzoo.utils.aec_to_parallel, if they may move at once"
        )
    if hasattr(env, "possible_agents"):
        agents = list(env.possible_agents)
        shape = getattr(getattr(env, "state_space", None), "shape", None) if state else None
        observation = {agent: env.observation_space(agent) for agent in agents}
        action = {agent: env.action_space(agent) for agent in agents}
        size = None if shape is None else int(np.prod(shape))
        return _GymGame(env, observation, action, named=True, state_size=size, **how)
    both: list[Any] = [getattr(env, kind, None) for kind in ("observation_space", "action_space")]
    spaces: list[Any] = [getattr(space, "spaces", None) for space in both]
    if all(isinstance(space, Mapping) for space in spaces):
        return _GymGame(env, *spaces, named=True, **how)
    if all(isinstance(space, Sequence) for space in spaces):
        by_agent = ({f"agent_{i}": one for i, one in enumerate(space)} for space in spaces)
        return _GymGame(env, *by_agent, named=False, **how)
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

    The episode terminates when all food is eaten; the time limit is a truncation. Illegal actions have no effect;
    ``("agents", "action_mask")`` marks the legal ones. ``("info", "food")`` is the share of eaten food.

    Args:
        scenario: a name that the package ``lbforaging`` registers, ``Foraging[-2s]-SxS-Np-Ff[-coop]-v3``.
        max_steps: time limit of an episode.
        shared_reward: whether every agent gets the sum of all agents' rewards, at most 1 in an episode.
        scenario_kwargs: arguments of ``ForagingEnv`` that differ from the scenario's, such as ``{"max_num_food": 5}``.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if ``lbforaging`` is not installed.
        ValueError: if an argument is out of its range, or the scenario or an option is unknown.
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
    """Build the multi-robot warehouse (RWARE): robots bring requested shelves to the goal and back.

    In this original, robots block each other. Jumanji's RobotWarehouse is a different task under the same names: its
    episodes end when two robots collide.

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
        ValueError: if an argument is out of its range, or the scenario or an option is unknown.
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
    """Build a PettingZoo environment whose agents have equal spaces, such as MPE's simple_spread.

    Agents act simultaneously (PettingZoo's parallel API). Actions out of range are clipped. The environment's state, if
    any, is at the root.

    Args:
        scenario: a module of ``package`` with a ``parallel_env``.
        package: package of the scenario.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        scenario_kwargs: arguments of ``parallel_env``, such as ``{"N": 5, "continuous_actions": True}``.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if an argument is out of its range, an option is unknown, or the agents' spaces differ.
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


@hands_on_to(WrapperEnv.__init__)
def make_mamujoco(
    scenario: str = "HalfCheetah-6x1",
    *,
    max_steps: int = 1000,
    scenario_kwargs: Mapping[str, Any] | None = None,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build multi-agent MuJoCo (MaMuJoCo) from Gymnasium-Robotics: each agent controls some joints of one body.

    Every agent gets the body's reward. Observations are padded with zeros to those of the agent that sees most. If
    agents have different numbers of joints, actions are padded, too, and scaled from -1 to 1 to the body's limits.

    Args:
        scenario: body and partition, such as ``HalfCheetah-2x3`` (two agents with three joints each), ``Ant-4x2``,
            ``Walker2d-2x3``, ``Humanoid-9|8``.
        max_steps: time limit of an episode, reported as truncation; Gymnasium's own is 1,000.
        scenario_kwargs: further arguments of ``MultiAgentMujocoEnv``, such as ``{"agent_obsk": 0}``, or of the body's
            environment in Gymnasium.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if ``gymnasium-robotics`` is not installed.
        ValueError: if an argument is out of its range, or there is no such body, partition or option.
    """
    build = import_extra("gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi", "mamujoco").parallel_env
    body, _, partition = scenario.partition("-")

    def make(_: int) -> SerialGame:
        try:
            env = build(body, partition, render_mode="rgb_array", **(scenario_kwargs or {}))
        except Exception as error:  # the package raises Exception itself for an unknown partition
            raise ValueError(
                f"MaMuJoCo has no scenario {scenario!r}: {error!r}; a scenario is a body and its partition among "
                "agents, such as HalfCheetah-6x1, HalfCheetah-2x3, Ant-4x2 or Walker2d-2x3"
            ) from error
        return as_serial_game(env, group_by="padding")

    return SerialGymEnv(make, max_steps=max_steps, shared_reward=False, **batch)


def _registered(package: str, scenario: str) -> dict[str, Any]:
    """Return the arguments that a package registered with Gymnasium for a scenario."""
    registry = import_extra("gymnasium", "gym").registry
    names = [name for name, spec in registry.items() if str(spec.entry_point).startswith(f"{package}.")]
    if scenario not in names:
        similar = " or ".join(map(repr, nearest(scenario, names)))
        hint = f"; did you mean {similar}?" if similar else ""
        raise ValueError(f"{package} has no scenario {scenario!r}{hint}")
    return registry[scenario].kwargs
