"""Normalisation of observations by running statistics that belong to the networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from torchrl_marl.keys import sibling

__all__ = ["ObservationNorm"]


class ObservationNorm(nn.Module):
    """First layer of a network: ``(x - mean) / deviation`` of each feature, clamped.

    Mean and variance are those of all live agents' observations so far. They are buffers of the network, so that
    evaluation, checkpoints, ``load_policy``, ``export_policy`` and workers have the same ones, and what is stored in a
    batch stays as it was seen. Before the first update they change nothing.

    Call ``update(batch)`` after learning from a batch, as a run does: the policy that is trained is then the one that
    has collected, and the ratio of their probabilities begins at 1.

    Reference: statistics are joined as in Chan et al., 1979, equations 2.1.

    Args:
        key: of the entry that the network reads.
        size: number of features, ``O``.
        clamp: the largest normalised value.

    Example:
        >>> from tensordict import TensorDict
        >>> norm = ObservationNorm("state", 1)
        >>> norm.update(TensorDict({"state": torch.tensor([[1.0], [5.0]])}, 2))  # mean 3, deviation 2
        >>> norm(torch.tensor([[7.0], [3.0]])).flatten()
        tensor([2., 0.])
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, key: NestedKey, size: int, *, clamp: float = 10.0) -> None:
        super().__init__()
        self.key, self.clamp = key, clamp
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, observation: Tensor) -> Tensor:
        """Normalise ``[..., O]``."""
        return ((observation - self.mean) / (self.variance + 1e-8).sqrt()).clamp(-self.clamp, self.clamp)

    @torch.no_grad()
    def update(self, batch: TensorDictBase, *, gather: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Fold the observations of a batch into the statistics.

        Args:
            batch: of any shape; rows of agents that have left (``(group, "mask")``) do not count.
            gather: joins what several processes hold of one batch, as :func:`torchrl_marl.distributed.gather` does.
        """
        values = gather(batch.get(self.key))
        live = None if isinstance(self.key, str) else batch.get(sibling(self.key, "mask"), None)
        values = values.flatten(0, -2) if live is None else values[gather(live)]
        if not len(values):
            return
        total = self.count + len(values)
        share = len(values) / total
        apart = values.mean(0) - self.mean
        spread = (
            values.var(0, correction=0) * share + self.variance * (1 - share) + apart.square() * share * (1 - share)
        )
        self.variance.copy_(spread)
        self.mean.add_(apart * share)
        self.count.copy_(total)
