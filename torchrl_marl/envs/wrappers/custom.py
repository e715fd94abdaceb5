"""Custom environments of several libraries, built by a factory that the user names."""

from __future__ import annotations

import inspect
import re
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
from torchrl_marl.signatures import nearest, signature

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
    """Build a batch of custom environments.

    The factory is any callable, such as a class, that returns one of the following:

    * a PettingZoo environment (parallel API);
    * a Gymnasium environment of several agents, with ``Tuple`` spaces, or with ``Dict`` spaces keyed by agent name;
    * a VMAS scenario object;
    * a TorchRL environment with a ``group_map`` and the entries of :mod:`torchrl_marl.keys`, either single or batched.

    The factory is called once for each copy, or once in total if it returns a batch (VMAS and TorchRL). It receives
    those of the settings below and of ``render_mode="rgb_array"`` that its signature accepts; ``seed`` is increased by
    the index of the copy. Settings that the factory does not accept are applied here: environments are copied, seeded
    and truncated after ``max_steps``. Videos need an environment with ``render()`` (PettingZoo, Gymnasium) or
    ``render(env_index)`` (TorchRL).

    PettingZoo and Gymnasium agents that leave before the episode ends stay in the batch as masked rows: ``("agents",
    "mask")`` is false, observations and rewards are zero, every action is legal, and actions are ignored. Policies
    learn from live rows only, critics from all rows. Images (three-dimensional ``uint8``) keep their shape; other
    observations are flattened.

    Runs resume bit for bit if a game draws its random numbers from the seed passed to ``reset``. Random state held by a
    TorchRL environment is not part of checkpoints.

    Args:
        factory: the callable, or ``"module:callable"``; modules in the current folder take precedence.
        num_envs: number of environments.
        scenario: name of the task, passed to factories that accept it unless it equals ``factory``.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards (PettingZoo and Gymnasium only).
        group_by: grouping of PettingZoo and Gymnasium agents; each group is trained with separate networks.
            ``"name"`` groups by name without the trailing number, as TorchRL does (``red_0`` and ``red_1`` become
            ``"red"``); ``"spaces"`` groups agents with equal spaces; a mapping lists agent names by group;
            ``"padding"`` makes a single group. Unequal spaces within a group are padded, see
            ``envs/wrappers/spaces.py``. ``None`` makes a single group and requires equal spaces.
        state: whether to keep PettingZoo's ``state()``, which ``critic.observes=state`` reads.
        seed: random seed; ``None`` draws a seed from Torch's global generator.
        device: device of the tensors.
        factory_kwargs: further arguments of the factory, or of ``make_world`` of a VMAS scenario class.

    Returns:
        The environments, with batch size ``[num_envs]``; :func:`~torchrl_marl.envs.check_env` describes them.

    Raises:
        ValueError: if the factory does not exist, does not accept ``factory_kwargs`` or returns an unsupported object,
            or the environment lacks entries that training reads.

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
    settings |= {} if scenario in (None, factory) else {"scenario": scenario}  # recipes set scenario=factory by default
    vmas = sys.modules[_VMAS_SCENARIO].BaseScenario if _VMAS_SCENARIO in sys.modules else ()
    chosen, world = dict(factory_kwargs or {}), {}
    if chosen and isinstance(build, type) and issubclass(build, vmas):
        world = {key: chosen.pop(key) for key in chosen.keys() - signature(build).parameters.keys()}
        _check_world_options(build, world)

    def make(copy: int = 0) -> Any:
        return build(**_arguments(build, name, {**settings, "seed": seed + copy}, chosen))

    made = make()
    if isinstance(made, EnvBase):
        return _batch(made, make, name, **options)
    if isinstance(made, vmas):
        return make_env(made, **options, scenario_kwargs=world)
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
    """Return the user's arguments, and the settings that the factory accepts."""
    parameters = signature(build).parameters
    takes = [key for key, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    anything = any(value.kind == value.VAR_KEYWORD for value in parameters.values())
    unknown = [key for key in chosen if key not in takes]
    if unknown and not anything:
        raise ValueError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(takes) or 'nothing'}")
    arguments = {**{key: value for key, value in settings.items() if key in takes}, **chosen}
    missing = [key for key in takes if parameters[key].default is parameters[key].empty and key not in arguments]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}: set env.factory_kwargs.{missing[0]}=..., or a default")
    return arguments


def _check_world_options(scenario: type, options: Mapping[str, Any]) -> None:
    """Refuse options of ``make_world`` that no line of the scenario or its bases names: VMAS swallows them."""
    try:
        sources = [inspect.getsource(base) for base in scenario.__mro__[:-1]]
    except (OSError, TypeError):  # defined in an interactive session
        return
    named = set(re.findall(r"""["'](\w+)["']""", "\n".join(sources))) | {*signature(scenario.make_world).parameters}
    if unknown := sorted(set(options) - named):
        hint = ", ".join(nearest(unknown[0], named)) or "nothing like it"
        raise ValueError(f"{scenario.__name__} takes no {', '.join(unknown)} in make_world; it names {hint}")


def _batch(
    made: EnvBase, make: Callable[..., EnvBase], name: str, *, num_envs: int, max_steps: int, seed: int, device: Device
) -> EnvBase:
    """Copy a TorchRL environment unless it is batched, and add missing transforms: time limit and episode returns."""
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
