"""Policy-optimisation methods for cooperative multi-agent RL as TorchRL losses over TensorDicts.

An equation is a function, a method is a loss, a training loop is a recipe.
"""

from torchrl_marl.export import export_policy
from torchrl_marl.run.checkpoints import load_policy

__version__ = "0.1.0"

__all__ = ["export_policy", "load_policy"]
