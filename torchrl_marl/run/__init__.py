"""A training run: its command line, collector, update, checkpoints and folder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_marl.run.checkpoints import load_policy
    from torchrl_marl.run.collect import make_collector
    from torchrl_marl.run.config import recipe
    from torchrl_marl.run.run import Run
    from torchrl_marl.run.update import make_update

__all__ = ["Run", "load_policy", "make_collector", "make_update", "recipe"]

_MODULES = dict(zip(__all__, ("run", "checkpoints", "collect", "update", "config"), strict=True))


def __getattr__(name: str) -> Any:
    """Import on use, so that :mod:`torchrl_marl.run.names` is there before Torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
