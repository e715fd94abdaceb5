"""Environments, and the tools to build, check, film and reproduce them."""

from torchrl_marl.envs.check import check_env
from torchrl_marl.envs.games.aerocombat import AeroCombatEnv, make_aerocombat
from torchrl_marl.envs.games.coordsum import CoordSumEnv, make_coordsum
from torchrl_marl.envs.games.maze import MazeEnv, make_maze
from torchrl_marl.envs.games.paxmen import PaxMenEnv, make_paxmen
from torchrl_marl.envs.games.rules import Rules
from torchrl_marl.envs.games.tensor_env import TensorEnv
from torchrl_marl.envs.random_state import RandomState, preserve_random_state, reseed
from torchrl_marl.envs.video import render_episode
from torchrl_marl.envs.vmas import make_env
from torchrl_marl.envs.wrappers.custom import make_custom
from torchrl_marl.envs.wrappers.football import make_football
from torchrl_marl.envs.wrappers.gymnasium import make_lbforaging, make_mamujoco, make_pettingzoo, make_rware
from torchrl_marl.envs.wrappers.jaxmarl import make_jaxmarl
from torchrl_marl.envs.wrappers.jumanji import make_jumanji
from torchrl_marl.envs.wrappers.smacv2 import make_smacv2

__all__ = [
    "AeroCombatEnv",
    "CoordSumEnv",
    "MazeEnv",
    "PaxMenEnv",
    "RandomState",
    "Rules",
    "TensorEnv",
    "check_env",
    "make_aerocombat",
    "make_coordsum",
    "make_custom",
    "make_env",
    "make_football",
    "make_jaxmarl",
    "make_jumanji",
    "make_lbforaging",
    "make_mamujoco",
    "make_maze",
    "make_paxmen",
    "make_pettingzoo",
    "make_rware",
    "make_smacv2",
    "preserve_random_state",
    "render_episode",
    "reseed",
]
