"""Where scripts of before import ``load_policy`` from."""

from torchrl_marl.run.checkpoints import load_policy

__all__ = ["load_policy"]
