"""A training run: its command line, update, checkpoints and folder."""

from torchrl_marl.run.checkpoints import load_policy
from torchrl_marl.run.config import recipe
from torchrl_marl.run.run import Run
from torchrl_marl.run.update import make_update

__all__ = ["Run", "load_policy", "make_update", "recipe"]
