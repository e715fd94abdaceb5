"""A checker that describes an environment and warns about silent problems of multi-agent training."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, TensorSpec
from torchrl.envs import EnvBase, StepCounter, TransformedEnv, VecNorm, VecNormV2
from torchrl.envs.utils import check_env_specs

from torchrl_marl.envs.random_state import preserve_random_state

__all__ = ["check_env", "innermost", "kept_statistics", "missing_entries"]

Key = tuple[str, ...]


def check_env(env: EnvBase, *, num_steps: int = 128) -> list[str]:
    """Describe an environment and warn about common problems of multi-agent training.

    Runs TorchRL's ``check_env_specs`` and a rollout of random actions. Warnings cover groups of one agent, unread
    action masks, time limits reported as terminations, rewards that differ within a group, opponents in one group,
    endless episodes, non-finite values, observations of different sizes, large states, done flags per agent, and
    transforms that keep statistics. The description includes the share of steps after an agent has left.

    The random state of the process and of the environment (its ``torch.Generator``s and ``state_dict``) is restored
    afterwards. Reset the environment before further use.

    Args:
        env: a TorchRL environment with a ``group_map``; a single copy rather than a ``SerialEnv`` or ``ParallelEnv``.
        num_steps: length of the random rollout.

    Returns:
        The warnings, which are also printed. Empty for an environment without findings.

    Raises:
        AssertionError: if ``check_env_specs`` finds data that does not match the specs.
        ValueError: if the environment has no ``group_map``, or lacks entries that training reads, with their names.

    Example:
        >>> from torchrl_marl.envs import make_env
        >>> warnings = check_env(make_env("wheel", num_envs=2, max_steps=20), num_steps=40)  # doctest: +ELLIPSIS
        VmasEnv (wheel), 2 environments in parallel, cpu
        ...
        No warnings.
    """
    print(_describe(env))
    if missing := missing_entries(env):
        raise ValueError("\n".join(missing))
    with _undisturbed(env):
        check_env_specs(env)
        rollout = env.rollout(num_steps, break_when_any_done=False)
    lengths, terminated = _episodes(env, rollout)
    by_termination = int(terminated.sum())
    print(f"\n{num_steps} steps of random actions: {len(lengths)} episodes ended, {by_termination} by termination.")
    for group, absent in _absences(env, rollout).items():
        print(f"Agents of '{group}' leave before the episode ends, in {absent:.1%} of its steps: policies skip these.")
    findings = (_lone_agents, _masks, _time_limit_findings, _rewards, _teams, _not_finite, _sizes, _done_flags)
    findings += (_states, _statistics)
    warnings = [warning for find in findings for warning in find(env, rollout)]
    print(f"\n{len(warnings) or 'No'} warning{'' if len(warnings) == 1 else 's'}{':' if warnings else '.'}")
    for number, warning in enumerate(warnings, 1):
        print(textwrap.fill(warning, 100, initial_indent=f"{number:3}. ", subsequent_indent="     "))
    return warnings


def missing_entries(env: EnvBase) -> list[str]:
    """Return a sentence for every entry needed for training that is missing or has the wrong shape.

    Raises:
        ValueError: if the environment has no ``group_map``.
    """
    found, missing = _specs(env), []
    for group, agents in _group_map(env).items():
        wanted = {
            "observation": "size], one for each agent: declare it in observation_spec, return it in reset and step",
            "action": "size] if continuous, without the size if discrete: declare it in action_spec",
            "reward": "1], one for each agent: declare it in reward_spec, return it in step",
        }
        for name, form in wanted.items():
            spec = found.get((group, name))
            sizes = [] if spec is None else list(spec.shape[len(env.batch_size) :])
            fits = sizes[:1] == [len(agents)] and len(sizes) in {"action": (1, 2), "observation": (2, 4)}.get(
                name, (2,)
            )
            if not fits or (name == "reward" and sizes[1:] != [1]):
                keys = ", ".join(str(key if len(key) > 1 else "".join(key)) for key in found)
                there = f"the environment has {keys}" if spec is None else f"it is {sizes}"
                missing.append(f"({group!r}, {name!r}) must be [{len(agents)}, {form} ({there}).")
    return missing


def kept_statistics(env: EnvBase) -> list[str]:
    """Return a sentence if transforms of the environment keep statistics that nothing else knows of."""
    names = {type(module).__name__ for module in env.modules() if isinstance(module, (VecNorm, VecNormV2))}
    return [
        f"{name} keeps statistics of its own in every environment that is built, those of evaluation and films too, "
        "and no checkpoint has them. Let the networks keep them: actor.normalize_observations=true "
        "critic.normalize_observations=true. Rewards need none: advantages are standardised, and critics normalise "
        "values."
        for name in names
    ]


def _group_map(env: EnvBase) -> dict[str, list[str]]:
    try:
        return env.group_map  # pyright: ignore[reportReturnType]
    except AttributeError:
        raise ValueError(
            f"{type(env).__name__} has no group_map. Set self.group_map = {{'agents': ['agent_0', ...]}} and nest each "
            "group's observation, action and reward under the group's name, such as ('agents', 'observation')"
        ) from None


@contextlib.contextmanager
def _undisturbed(env: EnvBase) -> Iterator[None]:
    """Restore all random states on exit, and suppress TorchRL's log lines in the printed text."""
    env, logger = innermost(env), logging.getLogger("torchrl")
    own_state, level = copy.deepcopy(env.state_dict()), logger.level
    generators = [(own, own.get_state()) for own in vars(env).values() if isinstance(own, torch.Generator)]
    logger.setLevel(logging.WARNING)
    try:
        with preserve_random_state(), torch.no_grad():
            yield
    finally:
        logger.setLevel(level)
        for generator, state in generators:
            generator.set_state(state)
        env.load_state_dict(own_state)


def innermost(env: EnvBase) -> EnvBase:
    """Return an environment without its transforms."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def _path(key: Any) -> Key:
    return (key,) if isinstance(key, str) else key


def _specs(env: EnvBase) -> dict[Key, TensorSpec]:
    """Every action, observation and reward by key."""
    composites = (env.full_action_spec, env.full_observation_spec, env.full_reward_spec)
    return {_path(key): composite[key] for composite in composites for key in composite.keys(True, True)}


def _action_specs(env: EnvBase, group: str) -> list[TensorSpec]:
    return [env.full_action_spec[key] for key in map(_path, env.action_keys) if key[0] == group]


def _num_choices(spec: TensorSpec) -> int | None:
    space: Any = spec.space if isinstance(spec, (Categorical, OneHot)) else None
    return None if space is None or isinstance(spec, MultiCategorical) else space.n


def _time_limit(env: EnvBase) -> tuple[int, str] | None:
    """The time limit in steps and its flag, if a StepCounter or the environment declares a limit."""
    counters = [module.max_steps for module in env.modules() if isinstance(module, StepCounter)]
    if limits := [limit for limit in counters if limit is not None]:
        return min(limits), "truncated"
    base: Any = innermost(env)
    limit, can_truncate = getattr(base, "max_steps", None), "truncated" in base.done_keys
    return limit and (limit, getattr(base, "limit_flag", "truncated" if can_truncate else "terminated"))


def _frames(rollout: TensorDictBase, *key: str) -> Tensor:
    """An entry with environments and time flattened into one dimension."""
    value = rollout[key]
    assert isinstance(value, Tensor)
    return value.flatten(0, rollout.ndim - 1)


def _episode_flag(env: EnvBase, rollout: TensorDictBase, name: str) -> Tensor:
    """The flag of the whole episode, [rows, time]: the root's flag, or whether the flags of all agents are set."""
    keys = [(name,)] if name in env.done_keys else [key for key in map(_path, env.done_keys) if key[-1] == name]
    flags = [_frames(rollout, "next", *key).flatten(1).all(1) for key in keys]
    return torch.stack(flags).all(0).reshape(-1, rollout.shape[-1])


def _episodes(env: EnvBase, rollout: TensorDictBase) -> tuple[Tensor, Tensor]:
    """The length of each episode that ended in the rollout, and whether the end was a termination."""
    row, time = _episode_flag(env, rollout, "done").nonzero(as_tuple=True)
    previous = torch.where(row == row.roll(1), time.roll(1), -1)
    previous[:1] = -1
    return time - previous, _episode_flag(env, rollout, "terminated")[row, time]


def _describe(env: EnvBase) -> str:
    groups, specs, limit, base = _group_map(env), _specs(env), _time_limit(env), innermost(env)
    name, scenario = type(base).__name__, getattr(base, "scenario_name", None)
    if scenario is not None:
        name += f" ({scenario if isinstance(scenario, str) else type(scenario).__name__})"
    count = f"{math.prod(env.batch_size)} environments in parallel" if env.batch_size else "one environment"
    root = [f"{'/'.join(key)} {_layout(env, spec)}" for key, spec in specs.items() if key[0] not in groups]
    lines = [
        f"{name}, {count}, {env.device or 'no device set'}",
        f"time limit    {f'{limit[0]} steps, reported as {limit[1]}' if limit else 'not declared'}",
        f"done flags    {', '.join('/'.join(_path(key)) for key in env.done_keys)}",
        f"at the root   {', '.join(root) or 'nothing'}",
        f"state         {'yes' if ('state',) in specs else 'none, central critics join the observations'}",
    ]
    for group, agents in groups.items():
        names = ", ".join(agents if len(agents) <= 6 else [*agents[:2], "...", agents[-1]])
        lines.append(f'\ngroup "{group}", {len(agents)} agent{"s" * (len(agents) > 1)}: {names}')
        own = {"/".join(key[1:]): spec for key, spec in specs.items() if key[0] == group}
        kinds = [_action_kind(spec) for spec in _action_specs(env, group)] + [""] * len(own)
        for (key, spec), kind in zip(own.items(), kinds, strict=False):  # the actions come first in both
            lines.append(f"  {key:{max(map(len, own))}}  {_layout(env, spec):18}  {kind}".rstrip())
    return "\n".join(lines)


def _layout(env: EnvBase, spec: TensorSpec) -> str:
    sizes = ("?" if size < 0 else str(size) for size in spec.shape[len(env.batch_size) :])
    return f"{str(spec.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


def _action_kind(spec: TensorSpec) -> str:
    if choices := _num_choices(spec):
        return f"discrete, {choices} actions"
    if not isinstance(spec, Bounded):
        return type(spec).__name__
    space: Any = spec.space
    low, high = space.low.unique(), space.high.unique()
    same = len(low) == len(high) == 1
    return f"continuous in [{low.item():g}, {high.item():g}]" if same else "continuous, several bounds"


def _lone_agents(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for group, agents in _group_map(env).items():
        if len(agents) == 1:
            yield (
                f"group '{group}' has a single agent ({agents[0]}): MAPPO on it is independent PPO. To share the "
                "critic and parameters with other agents, group them, e.g. with group_map={'agents': [...]} of VmasEnv."
            )


def _masks(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for key in map(_path, env.full_observation_spec.keys(True, True)):
        spec = env.full_observation_spec[key]
        groups = [key[0]] if key[0] in _group_map(env) else list(_group_map(env))
        choices = {_num_choices(action) for group in groups for action in _action_specs(env, group)} - {None}
        if "mask" not in key[-1].lower() and not (spec.dtype == torch.bool and spec.shape[-1] in choices):
            continue
        if key not in {(group, name) for group in groups for name in ("action_mask", "mask")}:
            yield (
                f"{key} looks like an action mask, but no policy reads it under this name. Rename it to "
                f"('{groups[0]}', 'action_mask'), for example with RenameTransform."
            )
        elif key[1] == "action_mask" and spec.shape[-1] not in choices:
            kind = f"have {choices} choices" if choices else "are not discrete"
            yield f"{key} is not read: it has {spec.shape[-1]} entries, but the actions of the group {kind}."
        elif key[1] == "action_mask" and (mask := _frames(rollout, *key)).eq(mask[:1]).all():
            allowed = "all actions allowed" if mask.all() else "the same actions forbidden"
            yield f"{key} never changes in {len(mask)} steps ({allowed}). Check that the environment updates it."


def _time_limit_findings(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    advice = (
        "Advantages then count the value beyond the limit as zero. Report the limit as `truncated`: "
        "make_env(time_limit='truncate'), or no limit in the environment and a StepCounter(max_steps=...) around it."
    )
    limit = _time_limit(env)
    lengths, terminated = _episodes(env, rollout)
    if getattr(innermost(env), "fixed_length", False):
        return
    if limit is None and not len(lengths):
        yield (
            f"no episode ended in {rollout.shape[-1]} steps and no time limit is declared: an endless task never "
            "resets. Add StepCounter(max_steps=...)."
        )
    elif limit is not None and limit[1] == "terminated":
        yield f"the time limit of {limit[0]} steps is reported as `terminated`. {advice}"
    elif len(lengths) > 1 and terminated.all() and len(lengths.unique()) == 1:
        yield f"all {len(lengths)} episodes terminated after exactly {lengths[0]} steps. Is that a time limit? {advice}"


def _rewards(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for key in map(_path, env.reward_keys):
        if key[0] in _group_map(env):
            reward = _frames(rollout, "next", *key)
            differs = (~torch.isclose(reward, reward[:, :1], equal_nan=True)).flatten(1).any(1)
            if differs.any():
                yield (
                    f"{key} differs between the agents in {int(differs.sum())} of {len(differs)} steps. This is right "
                    "for agents with individual goals; in a cooperative task, share the reward among the agents."
                )


def _teams(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    advice = (
        "One group is one team, whose critic values all of them together. Make groups of opponents: group_by=name of "
        "make_custom (env.group_by=name), or the environment's group_map; a loop of groups trains each with its "
        "own networks."
    )
    for group, agents in _group_map(env).items():
        names = [re.sub(r"_?\d+$", "", agent) or agent for agent in agents]
        if 1 < len(set(names)) < len(agents):
            yield f"group '{group}' holds agents of several names, {', '.join(dict.fromkeys(names))}. {advice}"
        elif (group, "reward") in map(_path, env.reward_keys) and len(agents) > 1:
            reward = _frames(rollout, "next", group, "reward").squeeze(-1)
            varied = (reward - reward.mean(0)).T
            alike = varied @ varied.T / (varied.norm(dim=-1, keepdim=True) * varied.norm(dim=-1)).clamp(min=1e-9)
            if alike.min() < -0.5:
                one, other = divmod(int(alike.argmin()), len(agents))
                yield (
                    f"{agents[one]} and {agents[other]} of group '{group}' gain what the other loses (correlation of "
                    f"rewards {alike.min():.2f}). {advice}"
                )


def _absences(env: EnvBase, rollout: TensorDictBase) -> dict[str, float]:
    """The share of each group's steps in which an agent has left, where there are such steps."""
    keys = [(group, "mask") for group in _group_map(env) if (group, "mask") in _specs(env)]
    shares = {key[0]: (~_frames(rollout, *key)).float().mean().item() for key in keys}
    return {group: share for group, share in shares.items() if share}


def _states(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    copies = max(env.batch_size.numel(), 1)
    sizes = {key: spec.shape.numel() // copies for key, spec in _specs(env).items() if -1 not in spec.shape}
    state, seen = sizes.get(("state",), 0), sum(size for key, size in sizes.items() if key[-1] == "observation")
    if state > max(10 * seen, 10_000):
        yield (
            f"the state holds {state:,} numbers, which travel with every step, all observations {seen:,}. Leave it out "
            "if no critic reads it: state=False of make_custom (env.state=false)."
        )


def _statistics(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    yield from kept_statistics(env)


def _not_finite(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    found = {}

    def look(key: Any, value: Tensor) -> None:
        if not value.isfinite().all():
            found[tuple(part for part in _path(key) if part != "next")] = True

    # Unlike indexing by key, this also reaches observations of different sizes, agent by agent.
    rollout.named_apply(look, nested_keys=True, filter_empty=True)
    for key in found:
        yield f"{key} holds non-finite values (nan or inf): training on them breaks the networks."


def _sizes(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for key, spec in _specs(env).items():
        if -1 in spec.shape:
            yield (
                f"{key} differs in size between the agents of the group, which one network cannot take. Group agents "
                "of the same type (group_map), or pad the entries to the same size."
            )


def _done_flags(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    own = [key for key in map(_path, env.done_keys) if len(key) > 1 and key[-1] == "done"]
    if "done" not in env.done_keys:
        yield f"done flags exist only per group ({own}), not at the root: pass the loss set_keys(done=, terminated=)."
        return
    running = ~_frames(rollout, "next", "done")
    for key in own:
        early = (_frames(rollout, "next", *key).flatten(1) & running).any(1)
        if early.any():
            yield (
                f"{key} is set before the episode is done in {int(early.sum())} of {len(early)} steps: agents drop "
                f"out. The policy trains on their later data unless ('{key[0]}', 'mask') marks the live agents."
            )
