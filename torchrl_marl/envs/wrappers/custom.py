"""A user's own environment, of whichever kind, from the name of the function that makes it."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchrl.envs import Compose, DoubleToFloat, EnvBase, RewardSum, SerialEnv, StepCounter, Transform, TransformedEnv

from torchrl_marl.envs.base import check_positive
from torchrl_marl.envs.check import kept_statistics, missing_entries
from torchrl_marl.envs.vmas import make_env
from torchrl_marl.envs.wrappers.gymnasium import SerialGame, SerialGymEnv, as_serial_game
from torchrl_marl.extras import find_callable

__all__ = ["make_custom"]

Device = torch.device | str
_VMAS_SCENARIO = "vmas.simulator.scenario"


def make_custom(
    factory: str | Callable[..., Any] | None,
    *,
    num_envs: int,
    scenario: str | None = None,
    max_steps: int = 100,
    shared_reward: bool = False,
    group_by: str | Mapping[str, Sequence[str]] | None = None,
    state: bool = True,
    seed: int | None = None,
    device: Device = "cpu",
    factory_kwargs: Mapping[str, Any] | None = None,
) -> EnvBase:
    """Build a batch of environments of one's own.

    The factory is any callable, such as a class, that returns

    * a PettingZoo environment (parallel API);
    * a Gymnasium environment of several agents, with ``Tuple`` spaces, or ``Dict`` spaces by agents' names;
    * a VMAS scenario object;
    * a TorchRL environment with a ``group_map`` and the entries of :mod:`torchrl_marl.keys`, one copy of it or a batch.

    It is called once for each copy, or once for all where it returns a batch (VMAS and TorchRL). Of the settings below,
    and of ``render_mode="rgb_array"``, it gets those that it has arguments for, ``seed`` plus the number of the copy.
    What it does not take is done here: copies are made, seeded and cut after ``max_steps``. An environment that draws
    itself (``render()`` of PettingZoo and Gymnasium, ``render(env_index)`` of TorchRL) is filmed.

    Agents of PettingZoo and Gymnasium that leave before the episode ends stay as rows: ``("agents", "mask")`` is false
    there, observations and rewards are zero, every action is legal and none is played. Policies learn from live rows
    alone, critics from all. Images (``uint8`` in three dimensions) keep their shape; other observations become vectors.

    Runs resume bit for bit if a game draws its random numbers from the seed of each ``reset``; a TorchRL environment's
    own are no part of checkpoints.

    Args:
        factory: the callable, or ``"module:callable"``, where the module is looked for in the current folder first.
        num_envs: number of environments.
        scenario: name of the task, for those factories that make several; that of the factory itself is none.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards (PettingZoo and Gymnasium only).
        group_by: how agents of PettingZoo and Gymnasium form groups, of which each learns with networks of its own,
            in a loop for groups: ``"name"`` without its number, as TorchRL's (``red_0`` and ``red_1`` are
            ``"red"``), ``"spaces"``, those whose spaces are equal, or a mapping of agents' names by group. In a group
            unequal spaces are padded: observations with zeros, discrete actions by the mask, continuous ones, then from
            -1 to 1, with some that have no effect. ``"padding"`` does so in one group of all; ``None`` is one group
            whose spaces must be equal.
        state: whether to keep PettingZoo's ``state()``, which ``critic.observes=state`` reads.
        seed: of the random numbers; ``None`` draws one.
        device: where the tensors are.
        factory_kwargs: further arguments of the factory.

    Returns:
        The environments, with batch size ``[num_envs]``; :func:`~torchrl_marl.envs.check_env` explains them.

    Raises:
        ValueError: if there is no such factory, it takes other arguments or returns something else, or its environment
            lacks what training reads.

    Example:
        >>> from torchrl_marl.envs import make_coordsum
        >>> def small(num_envs):
        ...     return make_coordsum("CoordSum-2x5", num_envs=num_envs)
        >>> make_custom(small, num_envs=4, max_steps=5).rollout(5)["next", "truncated"].sum()
        tensor(4)
    """
    check_positive(num_envs=num_envs, max_steps=max_steps)
    build = factory if callable(factory) else find_callable(factory, "factory")
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", type(factory).__name__)
    seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
    options: Any = {"num_envs": num_envs, "max_steps": max_steps, "seed": seed, "device": device}
    settings = {**options, "render_mode": "rgb_array"}
    settings |= {} if scenario in (None, factory) else {"scenario": scenario}  # the recipes name an unnamed task so

    def make(copy: int = 0) -> Any:
        return build(**_arguments(build, name, {**settings, "seed": seed + copy}, factory_kwargs or {}))

    made = make()
    if isinstance(made, EnvBase):
        return _batch(made, make, name, **options)
    if _VMAS_SCENARIO in sys.modules and isinstance(made, sys.modules[_VMAS_SCENARIO].BaseScenario):
        return make_env(made, **options)
    if not (hasattr(made, "reset") and hasattr(made, "step")):
        raise ValueError(
            f"{name} returned {type(made).__name__}; it must return an environment of TorchRL (EnvBase), PettingZoo "
            "(parallel API) or Gymnasium, with reset and step, or a VMAS scenario object"
        )

    def wrap(copy: int) -> SerialGame:
        return as_serial_game(make(copy) if copy else made, state=state, mortal=True, group_by=group_by)

    return SerialGymEnv(wrap, shared_reward=shared_reward, **options)


def _arguments(
    build: Callable[..., Any], name: str, settings: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the user's own arguments and those of our settings that the factory has arguments for."""
    parameters = inspect.signature(build).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = [key for key, value in parameters.items() if value.kind in by_name]
    anything = any(value.kind == value.VAR_KEYWORD for value in parameters.values())
    unknown = [key for key in chosen if key not in takes]
    if unknown and not anything:
        raise ValueError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'nothing'}")
    arguments = {**{key: value for key, value in settings.items() if key in takes}, **chosen}
    missing = [key for key in takes if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}: set env.factory_kwargs.{missing[0]}=..., or a default")
    return arguments


def _batch(
    made: EnvBase, make: Callable[..., EnvBase], name: str, *, num_envs: int, max_steps: int, seed: int, device: Device
) -> EnvBase:
    """Make copies of a TorchRL environment if it is a single one, and add the time limit and the episodes' returns."""
    if missing := missing_entries(made):
        raise ValueError(f"{name}: {' '.join(missing)}")
    if "done" not in made.done_keys:
        raise ValueError(
            f"{name}: 'done' must be [1] at the root, whether the episode ends; there are {made.done_keys}"
        )
    if list(made.batch_size) not in ([], [num_envs]):
        raise ValueError(
            f"{name} returned the batch size {list(made.batch_size)}, but {num_envs} environments are asked for: take "
            "num_envs as an argument and return as many, or return a single one (batch size []), which is copied"
        )
    for statistics in kept_statistics(made):
        warnings.warn(f"{name}: {statistics}", stacklevel=3)
    present = {type(module) for module in made.modules()}
    seen = made.full_observation_spec
    wide = [key for key in seen.keys(True, True) if seen[key].dtype == torch.float64]
    env = made
    if not made.batch_size:
        env = SerialEnv(num_envs, [lambda copy=copy: make(copy) for copy in range(num_envs)], device=device)
        env.group_map = made.group_map
    added: list[Transform] = [DoubleToFloat(in_keys=wide)] if wide else []
    added += [] if StepCounter in present else [StepCounter(max_steps=max_steps)]
    added += [] if RewardSum in present else [RewardSum()]
    env = TransformedEnv(env, Compose(added)) if added else env
    env.set_seed(seed)
    return env.to(device)
