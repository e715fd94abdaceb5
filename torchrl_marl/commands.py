"""Commands on existing runs and environments: evaluate, export, check, and the zoo's list."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from torchrl_marl.envs import check_env, make_custom, render_episode
from torchrl_marl.evaluation import evaluate, stratified_bootstrap_interval
from torchrl_marl.export import export_policy
from torchrl_marl.extras import find_callable
from torchrl_marl.run.checkpoints import best_checkpoint, load_policy, read_metadata
from torchrl_marl.run.checks import check_device
from torchrl_marl.shelf import zoo_policies
from torchrl_marl.trust import foreign_code, reason

__all__ = ["evaluate_run", "follow", "print_zoo"]


def evaluate_run(
    run: Path,
    *,
    episodes: int,
    video: Path | None,
    seed: int | None,
    device: str,
    sampled: bool = False,
    factory: str | None = None,
    build: Callable[..., Any] | None = None,
) -> None:
    """Evaluate a run's best policy; print the mean return, and optionally record a video of one episode.

    The environment is built from the run's configuration, without code from outside this library: ``factory`` names the
    builder of a custom environment, and ``build`` builds a custom actor.

    Raises:
        ValueError: if an argument is out of its range, the checkpoint does not match, or code needs to be named.
    """
    if episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {episodes}")
    checkpoint = best_checkpoint(run)
    recorded = read_metadata(checkpoint)
    env_config = _environment(checkpoint, recorded["config"], factory)
    policy = load_policy(checkpoint, build=build, device=device)
    make_env = partial(instantiate, env_config, device=device)
    max_steps = env_config["max_steps"]
    if seed is None:
        seed = 4_000_012 + recorded["config"]["seed"]  # initial states unused in training and its evaluations
    if video is not None:
        print(render_episode(make_env(num_envs=1, seed=seed), policy, video, max_steps=max_steps))
    env = make_env(num_envs=episodes, seed=seed)
    torch.manual_seed(seed)
    played = evaluate(env, policy, seed=seed, max_steps=max_steps, sampled=sampled)
    low, high = stratified_bootstrap_interval(played.returns, np.mean)
    print(
        f"{recorded['config']['method']} on {env_config['scenario']} after {recorded['frames']:,} frames: mean return "
        f"{played.returns.mean():.3f}, 95 % interval {low:.3f} to {high:.3f} over {episodes} episodes of this policy, "
        f"{'sampled' if sampled else 'most likely'} actions, "
        f"mean length {played.lengths.float().mean():.1f}"
    )
    for name, values in ((played.groups if len(played.groups) > 1 else {}) | played.info).items():
        low, high = stratified_bootstrap_interval(values, np.mean)
        print(f"  {name}: {values.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}")


def _environment(checkpoint: Path, config: dict[str, Any], factory: str | None) -> dict[str, Any]:
    """Return the environment configuration of a run, with the factory named on the command line."""
    env = config["env"] if isinstance(config.get("env"), dict) else {}
    if factory is not None and "factory" not in env:
        raise ValueError(f"{checkpoint} was trained in an environment that takes no --factory.")
    env = env if factory is None else {**env, "factory": factory}
    try:
        foreign = foreign_code({"env": env})
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}.") from error
    if factory is not None:
        foreign.pop("env.factory", None)
    if foreign:
        named = ", ".join(f"{key}={value}" for key, value in foreign.items())
        again = (
            f"say --factory {env['factory']}" if [*foreign] == ["env.factory"] else "build its environment in Python"
        )
        raise ValueError(f"{checkpoint} names code that is not this library's, {named}: if you trust it, {again}.")
    numbers = (config.get("seed"), env.get("max_steps"))
    if {type(number) for number in numbers} != {int} or not {"_target_", "scenario"} <= set(env):
        raise ValueError(f"{checkpoint} does not say what it was trained in.")
    return env


def print_zoo() -> None:
    """Print the trained policies that come with the package: name, frames, mean return with its interval, command."""
    for name, path in zoo_policies().items():
        recorded = read_metadata(path)
        made = recorded["zoo"]
        low, high = made["interval"]
        print(
            f"zoo:{name:24}{recorded['frames']:>9,} frames, return {made['return']:.2f} [{low:.2f}, {high:.2f}] over "
            f"{made['episodes']:,} episodes\n    {made['command']}  # commit {made['git_commit'][:12]}"
        )


def _builder(name: str | None) -> Callable[..., Any] | None:
    return None if name is None else find_callable(name, "actor")


def follow(args: Namespace) -> None:
    """Execute a command on existing runs or environments.

    Raises:
        SystemExit: with one line that names the command and the reason.
    """
    logging.getLogger("torchrl").setLevel(logging.ERROR)  # warns of policies trained with any other build of Torch
    try:
        _follow(args)
    except (ImportError, InstantiationException, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"torchrl_marl {args.command}: {reason(error)}") from error


def _follow(args: Namespace) -> None:
    if args.command == "zoo":
        print_zoo()
    elif args.command == "evaluate":
        check_device(args.device)
        options = {"video": args.video, "seed": args.seed, "device": args.device, "sampled": args.sampled}
        evaluate_run(args.run, episodes=args.episodes, factory=args.factory, build=_builder(args.actor), **options)
    elif args.command == "check":
        group_by = None if args.group_by is None else OmegaConf.create(f"groups: {args.group_by}").groups
        check_env(make_custom(args.factory, num_envs=2, group_by=group_by))
    else:
        options = {"path": args.output, "group": args.group, "agent": args.agent}
        export_policy(args.run, format=args.format, build=_builder(args.actor), **options)
