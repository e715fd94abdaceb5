"""VMAS tasks as TorchRL environments. VMAS is optional (GPLv3) and imported only when a task is built."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, TransformedEnv, VmasEnv

from torchrl_marl.envs.base import check_positive
from torchrl_marl.extras import import_vmas
from torchrl_marl.signatures import nearest

if TYPE_CHECKING:
    from vmas.simulator.scenario import BaseScenario

__all__ = ["make_env"]


def make_env(
    scenario: str | BaseScenario,
    *,
    num_envs: int,
    max_steps: int = 100,
    time_limit: Literal["truncate", "terminate"] = "truncate",
    continuous_actions: bool = True,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    scenario_kwargs: Mapping[str, Any] | None = None,
) -> EnvBase:
    """Build a batch of VMAS environments.

    Each group of agents has its observations, actions and rewards under its name, such as ``("agents", "reward")``;
    ``(group, "episode_reward")`` sums the rewards of the running episode. Done flags are at the root. Actions are
    clamped to their range, so a plain Gaussian policy can act.

    All VMAS environments of a process draw from one random stream, which ``seed`` restarts. Build and step any other
    environment, for example for evaluation, under ``preserve_random_state``; otherwise it changes this environment's
    episodes.

    Args:
        scenario: name of a VMAS scenario, such as "balance" or "simple_tag"; or your own scenario.
        num_envs: number of environments stepped together.
        max_steps: time limit of an episode.
        time_limit: how the limit is reported. "truncate" sets ``truncated``, so that advantage estimation bootstraps
            from the value of the last state. "terminate" sets ``terminated``, as ``VmasEnv(max_steps=...)`` does: the
            value beyond the limit counts as zero. BenchMARL's results are measured with "terminate".
            The scenario's own end, such as a fall in "balance", is ``terminated`` in both cases.
        continuous_actions: False for discrete actions.
        seed: restarts VMAS's random stream; None continues the stream.
        device: device of the simulation.
        scenario_kwargs: options of the scenario, such as ``{"n_agents": 4}``.

    Returns:
        A ``TransformedEnv`` over ``VmasEnv`` with batch size ``[num_envs]``.

    Raises:
        ImportError: if VMAS is not installed.
        ValueError: if an argument is out of its range, or the scenario or one of its options is unknown.

    Example:
        >>> env = make_env("balance", num_envs=2, max_steps=5, seed=0)
        >>> rollout = env.rollout(5)
        >>> rollout["next", "truncated"][:, -1].all(), rollout["next", "terminated"].any()
        (tensor(True), tensor(False))
    """
    if time_limit not in ("truncate", "terminate"):
        raise ValueError(f"time_limit must be 'truncate' or 'terminate', got {time_limit!r}")
    check_positive(num_envs=num_envs, max_steps=max_steps)
    scenario_kwargs = dict(scenario_kwargs or {})
    if isinstance(scenario, str):
        _check_scenario(import_vmas(), scenario, scenario_kwargs)
    truncate = time_limit == "truncate"
    with _options_named(scenario, scenario_kwargs):
        env = VmasEnv(
            scenario,
            num_envs=num_envs,
            max_steps=None if truncate else max_steps,
            continuous_actions=continuous_actions,
            seed=seed,
            device=device,
            clamp_actions=True,
            scenario_kwargs=scenario_kwargs,
        )
    # RewardSum without keys sums the rewards of all groups.
    return TransformedEnv(env, Compose([StepCounter(max_steps=max_steps), RewardSum()]) if truncate else RewardSum())


@contextlib.contextmanager
def _options_named(scenario: object, scenario_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Reject options that VMAS fails on: VMAS does not check options, and spawns endlessly in a full world."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="It is taking many iterations to spawn")
        try:
            yield
        except Exception as error:
            if not scenario_kwargs:
                raise
            if isinstance(error, UserWarning):
                error = ValueError("there is no room for all entities; use fewer, or a larger world")
            options = ", ".join(f"{name}={value}" for name, value in scenario_kwargs.items())
            raise ValueError(
                f"VMAS cannot build the scenario {scenario!r} with scenario_kwargs {options}: "
                f"{str(error) or type(error).__name__}"
            ) from error


def _check_scenario(vmas: ModuleType, scenario: str, scenario_kwargs: Mapping[str, Any]) -> None:
    """Reject unknown names: VMAS only asserts on an unknown scenario and warns about an unknown option."""
    scenarios: list[str] = [*vmas.scenarios, *vmas.mpe_scenarios, *vmas.debug_scenarios]
    if scenario not in scenarios:
        similar = " or ".join(map(repr, nearest(scenario, scenarios)))
        hint = f"did you mean {similar}? " if similar else ""
        raise ValueError(f"VMAS has no scenario {scenario!r}; {hint}torchrl.envs.VmasEnv.available_envs lists them all")
    root = Path(str(vmas.__file__)).parent / "scenarios"
    source = next(root.rglob(f"{scenario}.py")).read_text()
    options = sorted(set(re.findall(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)["']""", source)))
    unknown = sorted(set(scenario_kwargs) - set(options))
    if unknown:
        raise ValueError(
            f"scenario {scenario!r} has no option {', '.join(unknown)}; it has {', '.join(options) or 'none'}"
        )
    for name, value in scenario_kwargs.items():
        lowest = int(name == "n_agents")
        if name.startswith(("n_", "num_")) and (
            not isinstance(value, int) or isinstance(value, bool) or value < lowest
        ):
            raise ValueError(f"scenario_kwargs.{name} must be an integer of at least {lowest}, got {value}")
