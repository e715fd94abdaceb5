"""A training run: its command line, collector, update, checkpoints and folder."""

from torchrl_marl.run.checkpoints import load_policy
from torchrl_marl.run.collect import make_collector
from torchrl_marl.run.config import recipe
from torchrl_marl.run.run import Run
from torchrl_marl.run.update import make_update

__all__ = ["Run", "load_policy", "make_collector", "make_update", "recipe"]
