"""Environments that nobody here wrote, each in a few lines of one's own, as ``env.factory`` wants them.

    pip install "pettingzoo[sisl,butterfly]" gymnasium-robotics mujoco magent2
    torchrl-marl check pettingzoo.sisl.pursuit_v5:parallel_env  # as it is, without a line
    torchrl-marl train env=custom env.factory=examples.third_party:multiwalker env.max_steps=500
    torchrl-marl train env=custom env.factory=examples.third_party:knights env.max_steps=900 env.state=false
    torchrl-marl train env=custom env.factory=examples.third_party:mujoco env.group_by=padding
    torchrl-marl run groups_vmas env=custom env.factory=examples.third_party:battle env.group_by=name env.state=false
    torchrl-marl train env=custom env.factory=examples.third_party:pistonball env.state=false actor=cnn critic=cnn

A factory gets those of ``max_steps``, ``seed``, ``render_mode`` and ``scenario`` that it has arguments for, and what
``env.factory_kwargs`` adds. docs/custom_environments.md says what becomes of agents that die, teams and unequal spaces.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["battle", "knights", "mujoco", "multiwalker", "pistonball"]


def multiwalker(max_steps: int, render_mode: str | None = None) -> Any:
    """Three bipedal walkers carry a package (PettingZoo, SISL)."""
    game = importlib.import_module("pettingzoo.sisl.multiwalker_v9")
    return game.parallel_env(max_cycles=max_steps, shared_reward=True, render_mode=render_mode)


def knights(max_steps: int, render_mode: str | None = None) -> Any:
    """Two knights and two archers hold off zombies until they fall (PettingZoo, Butterfly)."""
    games = importlib.import_module("pettingzoo.butterfly.all_modules").butterfly_environments
    name = next(name for name in games if "knights_archers_zombies" in name)  # whose version has grown
    return games[name].parallel_env(max_cycles=max_steps, render_mode=render_mode)


def mujoco(scenario: str = "HalfCheetah", parts: str = "6x1", render_mode: str | None = None) -> Any:
    """A robot each of whose joints is an agent, which see unequal parts of it (gymnasium-robotics, MaMuJoCo)."""
    game = importlib.import_module("gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi")
    return game.parallel_env(scenario, parts, render_mode=render_mode)


def battle(max_steps: int, map_size: int = 16) -> Any:
    """Two armies, red and blue (MAgent2)."""
    return importlib.import_module("magent2.environments.battle_v4").parallel_env(map_size, max_cycles=max_steps)


def pistonball(max_steps: int, n_pistons: int = 4) -> Any:
    """Pistons that see images move a ball (PettingZoo, Butterfly)."""
    game = importlib.import_module("pettingzoo.butterfly.pistonball_v6")
    return game.parallel_env(n_pistons=n_pistons, max_cycles=max_steps)
