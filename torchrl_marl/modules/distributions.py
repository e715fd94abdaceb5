"""Distributions of actions: discrete ones drawn from one uniform number, and Gaussians squashed into bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Categorical, Normal
from torchrl.modules import MaskedCategorical, TanhNormal

__all__ = ["CensoredTanhNormal", "InversionCategorical", "InversionMaskedCategorical", "draw_by_inversion"]


def draw_by_inversion(probs: Tensor) -> Tensor:
    """Draw an index for each row of probabilities, by inversion of the distribution function.

    ``torch.multinomial`` takes an exponential number for each entry of a row, this one uniform number for the row. It
    counts in multiples of ``2**-31``, whose sums are exact in any order, as a GPU takes them: what has probability 0 is
    never drawn.

    Args:
        probs: ``[..., K]``; rows that sum to 1, or NaN where nothing is legal, which gives any one index.

    Returns:
        ``[...]``, ``int64`` in ``0..K - 1``, with the default random generator of the device.

    Example:
        >>> draw_by_inversion(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([1, 2])
    """
    cumulative = (probs.float() * 2**31).long().cumsum(-1)
    total = cumulative[..., -1:]
    below_total = torch.randint_like(total, 2**31) * total >> 31
    return (cumulative[..., :-1] <= below_total).sum(-1)  # without the last one, which no draw exceeds: at most K - 1


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


class CensoredTanhNormal(TanhNormal):
    """TorchRL's Gaussian squashed into bounds, which scores an action alone, in the same way whoever asks.

    TorchRL scores its own samples before squashing, and all other actions by inverting ``tanh``. In float32 the inverse
    loses all digits near the bounds (all samples from 7.25 on give one action), so that a loss would give an unchanged
    policy ratios other than 1. Here collection and loss score the action that is executed. An action within
    ``10 finfo.resolution`` of a bound, in units of half the range (1e-5 in float32, 6.1 before squashing), stands for
    all actions between the two and has their probability

        log P(x >= c) = log Phi((mu - c) / sigma),   c = atanh(1 - 10 resolution),   likewise at the lower bound

    in place of a density, so that ratios have a mean of 1 and the score has a mean of 0 under the policy, however far
    it saturates. All other actions have TorchRL's density. The last dimension is that of an action's entries.

    Reference: Fujita and Maeda, Clipped Action Policy Gradient, 2018, https://arxiv.org/abs/1802.07564, Eq. (6): the
    same treatment of actions that are clipped to their bounds.

    Example:
        >>> policy = CensoredTanhNormal(torch.tensor([8.0]), torch.tensor([1.0]))
        >>> action, log_prob = policy.rsample_and_log_prob()
        >>> torch.equal(policy.log_prob(action), log_prob)
        True
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Score actions ``[..., A]``: the log-density of entries inside, the log-probability of entries at a bound."""
        transform, normal = self.transforms[0], cast("Normal", self.root_dist)
        preimage = cast("Tensor", transform.inv(value))
        density = normal.log_prob(preimage) - transform.log_abs_det_jacobian(preimage, value)
        edge = math.atanh(1 - 10 * torch.finfo(value.dtype).resolution)
        at_bound = preimage.abs() >= edge
        distance = torch.where(at_bound, (preimage.sign() * normal.loc - edge) / normal.scale, 0.0)
        return torch.where(at_bound, _log_normal_cdf(distance), density).sum(-1)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Sample, and score the action as :meth:`log_prob` does."""
        action = self.rsample(torch.Size(sample_shape))
        return action, self.log_prob(action)

    def sample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Sample without gradient, and score the action as :meth:`log_prob` does."""
        action = cast("Tensor", self.sample(torch.Size(sample_shape)))
        return action, self.log_prob(action)

    def entropy(self) -> Tensor:
        """Estimate the differential entropy from one reparameterised sample, scored before squashing."""
        _, log_prob = super().rsample_and_log_prob()
        return -log_prob


def _log_normal_cdf(values: Tensor) -> Tensor:
    """``log Phi``, as ``torch.special.log_ndtr``, for which vmap has no rule."""
    below, above = values.clamp(max=0.0), values.clamp(min=0.0)
    tail = (torch.special.erfcx(-below / math.sqrt(2)) / 2).log() - below.square() / 2
    return torch.where(values < 0, tail, (-torch.special.erfc(above / math.sqrt(2)) / 2).log1p())
