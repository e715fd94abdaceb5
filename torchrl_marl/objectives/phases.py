"""In which order a loss learns from a batch: phases, each with the minibatches that it trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tensordict import NestedKey, TensorDictBase

from torchrl_marl.objectives.minibatches import minibatches, sequence_minibatches, sequences_in

__all__ = ["Phase"]


@dataclass(frozen=True)
class Phase:
    """A part of the learning from one batch, in which a loss trains some of its parameters; ``loss.phases`` makes them.

    Args:
        rows: what minibatches are taken from: rows ``[R]`` or chunks of steps ``[R, T]``.
        whole: one update takes all rows, as those of natural gradients do.
        sequences: rows are whole sequences ``[B, T]``, of which a minibatch holds some.
        states: of these entries only the first of each sequence counts.
        before_epoch: called before each pass through the rows, which it may change.
    """

    rows: TensorDictBase
    whole: bool = False
    sequences: bool = False
    states: Sequence[NestedKey] = ()
    before_epoch: Callable[[], None] | None = None

    def minibatches(self, size: int, *, epochs: int) -> Iterator[TensorDictBase]:
        """Yield minibatches of ``size`` steps in random order, all rows once an epoch; a ``whole`` phase yields one.

        Raises:
            ValueError: if a minibatch would have no row, or no sequence.
        """
        for _ in range(1 if self.whole else epochs):
            if self.before_epoch is not None:
                self.before_epoch()
            if self.whole:
                yield self.rows
            elif self.sequences:
                number = sequences_in(size, self.rows.shape[-1])
                yield from sequence_minibatches(self.rows, number, states=self.states)
            else:
                yield from minibatches(self.rows, size)
