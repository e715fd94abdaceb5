"""Interfaces of networks that losses and training loops rely on."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast, runtime_checkable

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import nn
from torchrl.envs import TensorDictPrimer

__all__ = ["Actor", "Bootstrapping", "Critic", "Exportable", "Priming", "Remembering", "named_parts"]

Actor = ProbabilisticTensorDictSequential
"""A policy; ``get_dist`` returns the distribution of each agent's action."""
Critic = TensorDictModuleBase
"""A critic, which writes the value of each agent or of the team."""


@runtime_checkable
class Bootstrapping(Protocol):
    """A critic that writes the values of a whole sequence and of its next observations in one pass."""

    def bootstrap(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value`` and ``("next", ..., "state_value")`` into sequences ``[B, T]``."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """An actor whose memory is too large to store at every step, so it trains on whole sequences from their start."""

    @property
    def memory_keys(self) -> list[NestedKey]:
        """Entries of the memory; empty without a memory."""
        ...


@runtime_checkable
class Priming(Protocol):
    """A part of a network whose state the environment carries from step to step, as for TorchRL's modules."""

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that adds the state to an environment, zero at the start of episodes."""
        ...


@runtime_checkable
class Exportable(Protocol):
    """A part of a network that is replaced in an exported program, for the group or for one agent."""

    def for_export(self, agent: int | None) -> nn.Module:
        """Return the replacement for all agents or for one; called on a copy, so it may modify the part itself."""
        ...


Part = TypeVar("Part")


def named_parts(network: nn.Module, protocol: type[Part]) -> list[tuple[str, Part]]:
    """Return the modules of a network whose class implements a protocol.

    Instances are not checked, as a :class:`~tensordict.nn.TensorDictModule` forwards attributes of its wrapped module.
    """
    parts = [(name, module) for name, module in network.named_modules() if issubclass(type(module), protocol)]
    return cast("list[tuple[str, Part]]", parts)
