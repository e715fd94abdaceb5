"""What losses and loops know of a network: its kind, and what it may be able to do besides computing."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase

__all__ = ["Actor", "Bootstrapping", "Critic", "Remembering"]

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
