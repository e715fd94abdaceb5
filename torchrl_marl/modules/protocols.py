"""What a network may be able to do besides computing: losses and loops ask for it by these names."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tensordict import NestedKey, TensorDictBase

__all__ = ["Bootstrapping", "Remembering"]


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
