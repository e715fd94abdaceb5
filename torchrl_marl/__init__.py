"""Policy-optimisation methods for cooperative multi-agent RL as TorchRL losses over TensorDicts.

An equation is a function, a method is a loss, a training loop is a recipe.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_marl.export import export_policy
    from torchrl_marl.run.checkpoints import load_policy

__version__ = "0.1.0"

__all__ = ["export_policy", "load_policy"]


def __getattr__(name: str) -> Any:
    """Import on use, so that a worker that only plays games does not import what trains."""
    if name == "load_policy":
        from torchrl_marl.run.checkpoints import load_policy

        return load_policy
    if name == "export_policy":
        from torchrl_marl.export import export_policy

        return export_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
