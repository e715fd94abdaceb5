"""Minibatches hold every row once."""

import pytest
import torch
from tensordict import TensorDict

from torchrl_marl.collectors import minibatches


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
