"""What losses and loops know of a network: its kind, and what it may be able to do besides computing."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast, runtime_checkable

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import nn
from torchrl.envs import TensorDictPrimer

__all__ = ["Actor", "Bootstrapping", "Critic", "Exportable", "Priming", "Remembering", "named_parts"]

Actor = ProbabilisticTensorDictSequential
"""A policy: its ``get_dist`` gives the distribution of each agent's action."""
Critic = TensorDictModuleBase
"""Writes the value of each agent, or of the team."""


@runtime_checkable
class Bootstrapping(Protocol):
    """A critic that writes the values of a whole sequence and of what is observed next in one pass."""

    def bootstrap(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value`` and ``("next", ..., "state_value")`` into sequences ``[B, T]``."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """An actor with a memory too large to store at every step: it is trained on whole sequences from their first."""

    @property
    def memory_keys(self) -> list[NestedKey]:
        """Entries of the memory; empty if there is none."""
        ...


@runtime_checkable
class Priming(Protocol):
    """A part of a network with a state that an environment carries from step to step, as TorchRL's have."""

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that adds the state to an environment, zero where episodes start."""
        ...


@runtime_checkable
class Exportable(Protocol):
    """A part of a network that is another one in an exported program, or in the program of one agent."""

    def for_export(self, agent: int | None) -> nn.Module:
        """Return what takes its place, for all agents or for one; the part itself, of a copy, may be changed."""
        ...


Part = TypeVar("Part")


def named_parts(network: nn.Module, protocol: type[Part]) -> list[tuple[str, Part]]:
    """Return the modules of a network whose class has what a protocol asks for.

    Their class, for an instance of :class:`~tensordict.nn.TensorDictModule` has all attributes of what it wraps.
    """
    parts = [(name, module) for name, module in network.named_modules() if issubclass(type(module), protocol)]
    return cast("list[tuple[str, Part]]", parts)
