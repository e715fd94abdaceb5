"""Training data of a loss: rows, chunks of steps or whole sequences of a batch, their minibatches, and phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase

__all__ = ["Phase", "minibatches", "sequence_minibatches", "sequences_in", "split_into_chunks"]


def split_into_chunks(batch: TensorDictBase, chunk_length: int | None) -> TensorDictBase:
    """Split a batch ``[*B, T]`` into chunks ``[chunks, chunk_length]`` of consecutive steps, or into single rows.

    Episodes may end within a chunk. A recurrent network starts each chunk from the state stored in its first row;
    gradients are truncated there.

    Args:
        batch: batch with time as the last dimension.
        chunk_length: steps per chunk, a divisor of ``T``; ``None`` gives rows ``[B * T]``.

    Returns:
        The same data, in the order of the batch.

    Raises:
        ValueError: if ``chunk_length`` does not divide ``T``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"step": torch.arange(12).reshape(2, 6)}, batch_size=(2, 6))
        >>> split_into_chunks(batch, 3)["step"]
        tensor([[ 0,  1,  2],
                [ 3,  4,  5],
                [ 6,  7,  8],
                [ 9, 10, 11]])
    """
    if chunk_length is None:
        return batch.reshape(-1)
    check_chunks(batch.shape[-1], chunk_length)
    return batch.reshape(-1, chunk_length)


def check_chunks(steps: int, chunk_length: int | None) -> None:
    """Reject a chunk length that does not divide the steps of a batch.

    Args:
        steps: steps per environment.
        chunk_length: steps per chunk; ``None``, for rows, is always valid.

    Raises:
        ValueError: unless ``chunk_length`` divides ``steps``.
    """
    if chunk_length is not None and (chunk_length < 1 or steps % chunk_length):
        raise ValueError(f"chunk_length must divide the {steps} steps that each environment takes, got {chunk_length}.")


def minibatches(rows: TensorDictBase, size: int) -> Iterator[TensorDictBase]:
    """Yield minibatches that together hold each row ``[B]``, or chunk of steps ``[B, T]``, once, in random order.

    All rows are gathered at once; a minibatch is a view. If one minibatch holds all rows, they are neither shuffled nor
    copied: a copy costs as much as a forward pass of small networks.

    Args:
        rows: rows or chunks, as returned by :func:`split_into_chunks`.
        size: steps per minibatch, rounded up to whole chunks; the last minibatch may have fewer.

    Raises:
        ValueError: if a minibatch would have no rows.

    Example:
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({"row": torch.arange(5)}, batch_size=5)
        >>> [len(minibatch) for minibatch in minibatches(rows, 2)]
        [2, 2, 1]
        >>> next(minibatches(rows, 5))["row"].data_ptr() == rows["row"].data_ptr()
        True
    """
    if size < 1:
        raise ValueError(f"A minibatch must have at least one row, got size={size}.")
    num_rows = -(-size // rows.shape[1:].numel())
    if num_rows >= len(rows):
        yield rows
    else:
        order = torch.randperm(len(rows), device=rows.device)
        shuffled = rows.apply(lambda values: values.index_select(0, order))  # a quarter of the time of rows[order]
        yield from shuffled.split(num_rows)  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def sequences_in(minibatch_size: int, num_steps: int) -> int:
    """Return the number of whole sequences of ``num_steps`` steps in a minibatch of ``minibatch_size`` steps.

    Raises:
        ValueError: if the minibatch is shorter than a sequence.

    Example:
        >>> sequences_in(250, 100)
        2
    """
    if minibatch_size < num_steps:
        raise ValueError(f"minibatch_size must be at least the {num_steps} steps of a sequence; got {minibatch_size}.")
    return minibatch_size // num_steps


def sequence_minibatches(
    batch: TensorDictBase, num_sequences: int, *, states: Sequence[NestedKey] = ()
) -> Iterator[TensorDictBase]:
    """Yield each sequence of a batch ``[B, T]`` once, in random order, ``num_sequences`` at a time.

    Args:
        batch: batch of a :class:`~torchrl_marl.collectors.SequenceCollector`.
        num_sequences: sequences per minibatch; the last minibatch may have fewer.
        states: entries needed only at the first step of each sequence; they are not copied for every step.

    Raises:
        ValueError: if a minibatch would have no sequence.

    Example:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"step": torch.arange(12).reshape(4, 3)}, batch_size=(4, 3))
        >>> sorted(row for minibatch in sequence_minibatches(batch, 2) for row in minibatch["step"].tolist())
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    """
    if num_sequences < 1:
        raise ValueError(
            f"A minibatch must have at least one sequence of {batch.shape[1]} steps; got {num_sequences} sequences."
        )
    start, rest = batch.select(*states)[:, 0], batch.exclude(*states)
    for rows in torch.randperm(len(batch), device=batch.device).split(num_sequences):
        yield rest[rows].update(start[rows].unsqueeze(1).expand(len(rows), batch.shape[1]))


@dataclass(frozen=True)
class Phase:
    """A stage of training on one batch, in which a loss trains some of its parameters; yielded by ``loss.phases``.

    Args:
        rows: data that minibatches are drawn from: rows ``[R]`` or chunks of steps ``[R, T]``.
        whole: whether one update uses all rows, as natural-gradient steps do.
        sequences: whether rows are whole sequences ``[B, T]``.
        states: entries needed only at the first step of each sequence.
        before_epoch: called before each pass through the rows; it may modify them.
    """

    rows: TensorDictBase
    whole: bool = False
    sequences: bool = False
    states: Sequence[NestedKey] = ()
    before_epoch: Callable[[], None] | None = None

    def minibatches(self, size: int, *, epochs: int) -> Iterator[TensorDictBase]:
        """Yield minibatches of ``size`` steps in random order, each row once per epoch; a ``whole`` phase yields one.

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
