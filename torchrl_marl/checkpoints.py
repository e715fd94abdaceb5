"""Former import path of ``load_policy``."""

from torchrl_marl.run.checkpoints import load_policy

__all__ = ["load_policy"]
