"""Policy-optimisation methods for cooperative multi-agent RL as TorchRL losses over TensorDicts.

An equation is a function, a method is a loss, a training loop is a recipe.
"""

__version__ = "0.1.0"
