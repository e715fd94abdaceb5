"""Environments, and the tools to build, check, film and reproduce them."""

from torchrl_marl.envs.check import check_env
from torchrl_marl.envs.random_state import RandomState, preserve_random_state
from torchrl_marl.envs.vmas import make_env

