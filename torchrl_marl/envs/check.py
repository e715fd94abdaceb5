"""A checker that explains an environment to its user and points at what silently spoils multi-agent training."""

from __future__ import annotations

import contextlib
import logging
import math
import textwrap
from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, TensorSpec
from torchrl.envs import EnvBase, StepCounter, TransformedEnv, VmasWrapper
from torchrl.envs.utils import check_env_specs

from torchrl_marl.envs.random_state import preserve_random_state

Key = tuple[str, ...]


def check_env(env: EnvBase, *, num_steps: int = 128) -> list[str]:
    """Prints what an environment offers and warns about what commonly goes wrong with it.

    Runs TorchRL's `check_env_specs` and a rollout of random actions, then looks for: groups of one agent, action
    masks that nobody reads, time limits reported as terminations, rewards that differ within a group, episodes
    without end, values that are not finite, observations of different sizes, and done flags per agent.

    The random state of the process and the environment's own `torch.Generator`s are put back afterwards. The
    environment has to be reset before it is used further.

    Args:
        env: a TorchRL environment with a `group_map`.
        num_steps: length of the random rollout.

    Returns:
        The warnings, which are also printed. Empty for an environment without findings.

    Raises:
        AssertionError: if `check_env_specs` finds data that do not match the specs.
        ValueError: if the environment has no `group_map`.

    Example:
        >>> from torchrl_marl.envs import make_env
        >>> warnings = check_env(make_env("wheel", num_envs=2, max_steps=20), num_steps=40)  # doctest: +ELLIPSIS
        VmasEnv (wheel), 2 environments in parallel, cpu
        ...
        No warnings.
    """
    groups = _group_map(env)
    print(_describe(env, groups))
    with _undisturbed(env):
        check_env_specs(env)
        rollout = env.rollout(num_steps, break_when_any_done=False)
    lengths, terminated = _episodes(env, rollout)
    print(f"\n{num_steps} steps of random actions: {len(lengths)} episodes ended, {int(terminated.sum())} of them by termination.")
    findings = (_lone_agents, _masks, _time_limit_findings, _rewards, _not_finite, _observation_sizes, _done_flags)
    warnings = [warning for find in findings for warning in find(env, rollout)]
    print(f"\n{len(warnings) or 'No'} warning{'s' * (len(warnings) != 1)}{':' if warnings else '.'}")
    for number, warning in enumerate(warnings, 1):
        print(textwrap.fill(warning, 100, initial_indent=f"{number:3}. ", subsequent_indent="     "))
    return warnings


def _group_map(env: EnvBase) -> dict[str, list[str]]:
    try:
        return env.group_map  # pyright: ignore[reportReturnType]
    except AttributeError:
        raise ValueError(
            f"{type(env).__name__} has no group_map. Set env.group_map = {{'agents': ['agent_0', ...]}} in the "
            "constructor and keep each group's observation, action and reward under its name, with the agents as the "
            "dimension after the batch dimensions"
        ) from None


@contextlib.contextmanager
def _undisturbed(env: EnvBase) -> Iterator[None]:
    """Restores all random states and keeps TorchRL's log lines out of the printed text."""
    unwrapped = env
    while isinstance(unwrapped, TransformedEnv):
        unwrapped = unwrapped.base_env
    generators = [value for value in vars(unwrapped).values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    logger = logging.getLogger("torchrl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with preserve_random_state(), torch.no_grad():
            yield
    finally:
        logger.setLevel(level)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _path(key: str | Key) -> Key:
    return (key,) if isinstance(key, str) else key


def _specs(env: EnvBase) -> dict[Key, TensorSpec]:
    """Every action, observation and reward of the environment by key."""
    keyed = (
        (env.full_action_spec, env.action_keys),
        (env.full_observation_spec, env.full_observation_spec.keys(True, True)),
        (env.full_reward_spec, env.reward_keys),
    )
    return {_path(key): composite[key] for composite, keys in keyed for key in keys}


def _group_actions(env: EnvBase, group: str) -> list[TensorSpec]:
    return [env.full_action_spec[key] for key in env.action_keys if _path(key)[0] == group]


def _simulator(env: EnvBase) -> VmasWrapper | None:
    return next((module for module in env.modules() if isinstance(module, VmasWrapper)), None)


def _time_limit(env: EnvBase) -> tuple[int, str] | None:
    """The limit in steps and the flag that reports it, where the environment says so."""
    counters = [module for module in env.modules() if isinstance(module, StepCounter) and module.max_steps]
    if counters:
        return min(counter.max_steps for counter in counters), "truncated"
    simulator = _simulator(env)
    return (simulator.max_steps, "terminated") if simulator is not None and simulator.max_steps else None


def _episode_flag(env: EnvBase, rollout: TensorDictBase, name: str) -> Tensor:
    """The flag `name` of the episode, [rows, time]: at the root, else where all agents have it."""
    keys = [name] if name in env.done_keys else [key for key in env.done_keys if key[-1] == name]
    flags = [rollout["next", key].flatten(rollout.ndim).all(-1) for key in keys]
    return torch.stack(flags).all(0).reshape(-1, rollout.shape[-1])


def _episodes(env: EnvBase, rollout: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Length of each episode that ended in the rollout, and whether it was by termination."""
    row, time = _episode_flag(env, rollout, "done").nonzero(as_tuple=True)
    previous = torch.where(row == row.roll(1), time.roll(1), -1)
    previous[:1] = -1
    return time - previous, _episode_flag(env, rollout, "terminated")[row, time]


def _describe(env: EnvBase, groups: dict[str, list[str]]) -> str:
    simulator = _simulator(env)
    name = f"VmasEnv ({simulator.scenario_name})" if simulator is not None else type(env).__name__
    count = f"{math.prod(env.batch_size)} environments in parallel" if env.batch_size else "one environment"
    limit = _time_limit(env)
    specs = _specs(env)
    root = [f"{'/'.join(key)} {_layout(env, spec)}" for key, spec in specs.items() if key[0] not in groups]
    lines = [
        f"{name}, {count}, {env.device or 'no device set'}",
        f"time limit    {f'{limit[0]} steps, reported as {limit[1]}' if limit else 'not declared'}",
        f"done flags    {', '.join('/'.join(_path(key)) for key in env.done_keys)}",
        f"at the root   {', '.join(root) or 'nothing'}",
        f"state         {'in the key state' if ('state',) in specs else 'none: central critics join observations'}",
    ]
    for group, agents in groups.items():
        names = ", ".join(agents if len(agents) <= 6 else [*agents[:2], "...", agents[-1]])
        lines.append(f'\ngroup "{group}", {len(agents)} agent{"s" * (len(agents) > 1)}: {names}')
        own = {"/".join(key[1:]): spec for key, spec in specs.items() if key[0] == group}
        kinds = [_action_kind(spec) for spec in _group_actions(env, group)]
        for row, (key, spec) in enumerate(own.items()):
            kind = kinds[row] if row < len(kinds) else ""
            lines.append(f"  {key:{max(map(len, own))}}  {_layout(env, spec):18}  {kind}".rstrip())
    return "\n".join(lines)


def _layout(env: EnvBase, spec: TensorSpec) -> str:
    sizes = ("?" if size < 0 else str(size) for size in spec.shape[len(env.batch_size) :])
    return f"{str(spec.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


def _num_choices(spec: TensorSpec) -> int | None:
    single = isinstance(spec, (Categorical, OneHot)) and not isinstance(spec, MultiCategorical)
    return spec.space.n if single else None


def _action_kind(spec: TensorSpec) -> str:
    if choices := _num_choices(spec):
        return f"discrete, {choices} actions"
    if isinstance(spec, Bounded):
        low, high = spec.space.low.unique(), spec.space.high.unique()
        same = len(low) == len(high) == 1
        return f"continuous in [{low.item():g}, {high.item():g}]" if same else "continuous, several bounds"
    return type(spec).__name__


def _lone_agents(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for group, agents in _group_map(env).items():
        if len(agents) == 1:
            yield (
                f"group '{group}' has a single agent ({agents[0]}): MAPPO on it is independent PPO. To share the critic "
                "and the parameters with other agents, put them in one group, for example "
                "group_map={'agents': [all names]} of VmasEnv or PettingZooWrapper."
            )


def _masks(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for key in map(_path, env.full_observation_spec.keys(True, True)):
        groups = [key[0]] if key[0] in _group_map(env) else list(_group_map(env))
        choices = {_num_choices(spec) for name in groups for spec in _group_actions(env, name)} - {None}
        size = env.full_observation_spec[key].shape[-1]
        boolean = env.full_observation_spec[key].dtype == torch.bool
        if "mask" not in key[-1].lower() and not (boolean and size in choices):
            continue
        if len(key) != 2 or key[0] not in groups or key[1] not in ("action_mask", "mask"):
            yield (
                f"{key} looks like an action mask, but nothing reads it under this name. Rename it to "
                f"('{groups[0]}', 'action_mask'), for example with RenameTransform."
            )
        elif key[1] == "action_mask" and size not in choices:
            yield f"{key} has {size} entries, but the group's actions are {choices or 'continuous'}: it is not read."
        elif key[1] == "action_mask" and (mask := rollout[key].flatten(0, rollout.ndim - 1)).eq(mask[:1]).all():
            allowed = "all actions allowed" if mask.all() else "the same actions forbidden"
            yield f"{key} never changes in {len(mask)} steps ({allowed}). Check that the environment updates it."


def _time_limit_findings(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    advice = (
        "Advantages then count the value beyond the limit as zero. Report the limit as `truncated`: "
        "make_env(time_limit='truncate'), or no limit in the environment and a StepCounter(max_steps=...) around it."
    )
    limit = _time_limit(env)
    lengths, terminated = _episodes(env, rollout)
    if limit is None and not len(lengths):
        yield (
            f"no episode ended in {rollout.shape[-1]} steps and no time limit is declared: an endless task is never "
            "reset. Add StepCounter(max_steps=...)."
        )
    elif limit is not None and limit[1] == "terminated":
        yield f"the time limit of {limit[0]} steps is reported as `terminated`. {advice}"
    elif len(lengths) > 1 and terminated.all() and len(lengths.unique()) == 1:
        yield f"all {len(lengths)} episodes terminated after exactly {lengths[0]} steps. Is that a time limit? {advice}"


def _rewards(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for key in map(_path, env.reward_keys):
        if key[0] in _group_map(env):
            reward = rollout["next", key].flatten(0, rollout.ndim - 1)
            differs = (~torch.isclose(reward, reward[:, :1], equal_nan=True)).flatten(1).any(1)
            if differs.any():
                yield (
                    f"{key} differs between the agents in {int(differs.sum())} of {len(differs)} steps. Right for agents "
                    "with their own goals; in a cooperative task let them share the reward, else each maximises its own."
                )


def _not_finite(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    found: dict[Key, None] = {}

    def look(key: str | Key, value: Tensor) -> None:
        # Also entries that are stacked lazily, one per agent, come through here.
        if not value.isfinite().all():
            found[tuple(part for part in _path(key) if part != "next")] = None

    rollout.named_apply(look, nested_keys=True, filter_empty=True)
    for key in found:
        yield f"{key} holds values that are not finite (nan or inf): training on them breaks the networks."


def _observation_sizes(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    for key, spec in _specs(env).items():
        if -1 in spec.shape:
            yield (
                f"{key} differs in size between the agents of the group, which one network cannot take. Group agents "
                "of one type together (group_map), or pad the entries to one size."
            )


def _done_flags(env: EnvBase, rollout: TensorDictBase) -> Iterator[str]:
    own = [key for key in map(_path, env.done_keys) if len(key) > 1 and key[-1] == "done"]
    if "done" not in env.done_keys:
        yield f"done flags exist only per group ({own}), not at the root: name them in loss.set_keys(done=, terminated=)."
        return
    root = rollout["next", "done"].flatten(rollout.ndim)
    for key in own:
        early = (rollout["next", key].flatten(rollout.ndim) & ~root).any(-1)
        if early.any():
            yield (
                f"{key} is set before the episode is done in {int(early.sum())} of {early.numel()} steps: agents drop out. "
                "Their later data count in the loss unless it is given a mask of the active agents."
            )
