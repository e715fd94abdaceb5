"""Discrete distributions that draw an action from one uniform number, faster than ``torch.multinomial``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical
from torchrl.modules import MaskedCategorical

__all__ = ["InversionCategorical", "InversionMaskedCategorical", "draw_by_inversion"]


def draw_by_inversion(probs: Tensor) -> Tensor:
    """Draw an index for each row of probabilities, by inversion of the distribution function.

    ``torch.multinomial`` takes an exponential number for each entry of a row, this one uniform number for the row. It
    counts in multiples of ``2**-31``, whose sums are exact in any order, as a GPU takes them: what has probability 0 is
    never drawn.

    Args:
        probs: ``[..., K]``; rows that sum to 1.

    Returns:
        ``[...]``, ``int64`` in ``0..K - 1``, with the default random generator of the device.

    Example:
        >>> draw_by_inversion(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([1, 2])
    """
    cumulative = (probs.float() * 2**31).long().cumsum(-1)
    total = cumulative[..., -1:]
    below_total = torch.randint_like(total, 2**31) * total >> 31
    return (cumulative <= below_total).sum(-1)


class InversionCategorical(Categorical):
    """Categorical distribution that :func:`draw_by_inversion` samples.

    Example:
        >>> InversionCategorical(probs=torch.tensor([0.0, 1.0])).sample((3,))
        tensor([1, 1, 1])
    """

    @property
    def deterministic_sample(self) -> Tensor:
        """The most probable index, which TorchRL takes without exploration."""
        return self.mode

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw indices, ``[*sample_shape, *batch_shape]``."""
        with torch.no_grad():
            return draw_by_inversion(self.probs.expand(*sample_shape, *self.probs.shape))


class InversionMaskedCategorical(MaskedCategorical, InversionCategorical):
    """TorchRL's masked distribution that :func:`draw_by_inversion` samples: illegal entries have probability 0.

    Example:
        >>> logits, mask = torch.zeros(3), torch.tensor([False, True, False])
        >>> InversionMaskedCategorical(logits=logits, mask=mask).sample()
        tensor(1)
    """
