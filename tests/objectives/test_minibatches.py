"""Chunks hold steps in a row, and minibatches every row once."""

import pytest
import torch
from tensordict import TensorDict

from torchrl_marl.collectors import minibatches, split_into_chunks


def code_of(*batch):
    """A batch ``[*B, T]`` whose entries tell their sequence and step, ``100 e + t``."""
    sequence = torch.arange(torch.Size(batch[:-1]).numel()).reshape(*batch[:-1], 1)
    return TensorDict({"code": 100 * sequence + torch.arange(batch[-1])}, batch_size=batch)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("batch", [(4, 6), (2, 2, 6)], ids=str)
def test_a_chunk_holds_consecutive_steps_of_one_sequence_in_the_order_of_the_batch(batch, length):
    chunks = split_into_chunks(code_of(*batch), length)["code"].tolist()
    assert chunks == [
        [100 * e + t for t in range(start, start + length)] for e in range(4) for start in range(0, 6, length)
    ]


@pytest.mark.parametrize("length", [-1, 0, 4, 7, 12])
def test_chunks_that_do_not_fill_a_sequence_raise(length):
    with pytest.raises(ValueError, match=f"chunk_length must divide the 6 steps .* got {length}"):
        split_into_chunks(code_of(4, 6), length)


def test_every_row_comes_once_in_an_order_that_changes():
    rows = TensorDict({"row": torch.arange(10)}, batch_size=10)
    orders = set()
    for _ in range(3):
        sizes, order = zip(*((len(part), part["row"].tolist()) for part in minibatches(rows, 4)), strict=True)
        assert sizes == (4, 4, 2)
        flat = [row for part in order for row in part]
        assert sorted(flat) == list(range(10))
        orders.add(tuple(flat))
    assert len(orders) == 3


@pytest.mark.parametrize("size", [10, 11])
def test_rows_that_fit_into_one_are_not_copied(size):
    rows = TensorDict({"row": torch.arange(10)}, batch_size=10)
    (whole,) = minibatches(rows, size)
    assert torch.equal(whole["row"], rows["row"])
    assert whole["row"].data_ptr() == rows["row"].data_ptr()


def test_a_minibatch_without_rows_raises():
    with pytest.raises(ValueError, match="at least one row, got size=0"):
        next(minibatches(TensorDict(batch_size=3), 0))


def test_a_minibatch_of_chunks_counts_steps_and_takes_whole_chunks():
    chunks = TensorDict({"step": torch.arange(30).reshape(6, 5)}, batch_size=(6, 5))
    assert [part.shape for part in minibatches(chunks, 12)] == [(3, 5), (3, 5)]
    assert [len(part) for part in minibatches(chunks, 3)] == [1] * 6
