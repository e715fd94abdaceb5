"""Action distributions: categoricals sampled by inversion, and Gaussians squashed into bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Categorical, Normal
from torchrl.modules import MaskedCategorical, TanhNormal

__all__ = ["CensoredTanhNormal", "InversionCategorical", "InversionMaskedCategorical", "draw_by_inversion"]


_FEW_ENTRIES = 4


def draw_by_inversion(probs: Tensor) -> Tensor:
    """Draw an index for each row of probabilities, by inversion of the distribution function.

    ``torch.multinomial`` draws an exponential number for each entry of a row, this function one uniform number per row.
    Probabilities are rounded to multiples of ``2**-31``, whose sums are exact in any order of summation, including a
    GPU's: an entry of probability 0 is never drawn.

    Args:
        probs: ``[..., K]``; rows that sum to 1, or NaN rows where no action is legal, which give an arbitrary index.

    Returns:
        ``[...]``, ``int64`` in ``0..K - 1``, drawn with the default random generator of the device.

    Example:
        >>> draw_by_inversion(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([1, 2])
    """
    cumulative = (probs.float() * 2**31).long().cumsum(-1)
    total = cumulative[..., -1:]
    below_total = torch.randint_like(total, 2**31) * total >> 31
    return (cumulative[..., :-1] <= below_total).sum(-1)  # no draw exceeds the last entry: at most K - 1


class InversionCategorical(Categorical):
    """Categorical distribution sampled by :func:`draw_by_inversion`.

    Example:
        >>> InversionCategorical(probs=torch.tensor([0.0, 1.0])).sample((3,))
        tensor([1, 1, 1])
    """

    @property
    def deterministic_sample(self) -> Tensor:
        """The most probable index, which TorchRL uses without exploration."""
        return self.mode

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw indices, ``[*sample_shape, *batch_shape]``."""
        with torch.no_grad():
            return draw_by_inversion(self.probs.expand(*sample_shape, *self.probs.shape))


class InversionMaskedCategorical(MaskedCategorical, InversionCategorical):
    """TorchRL's masked categorical sampled by :func:`draw_by_inversion`: illegal entries have probability 0.

    Example:
        >>> logits, mask = torch.zeros(3), torch.tensor([False, True, False])
        >>> InversionMaskedCategorical(logits=logits, mask=mask).sample()
        tensor(1)
    """


class CensoredTanhNormal(TanhNormal):
    """TorchRL's squashed Gaussian with a log-probability that depends on the executed action only.

    TorchRL computes log-probabilities of new samples before squashing, and of all other actions by inverting ``tanh``.
    In float32 the inverse loses all precision near the bounds (all samples above 7.25 give the same action), so a loss
    would see ratios other than 1 for an unchanged policy. Here, collection and loss both use the executed action. An
    action within ``10 finfo.resolution`` of a bound, in units of half the range (1e-5 in float32, 6.1 before
    squashing), represents all actions between this threshold and the bound. Its log-probability is

        log P(x >= c) = log Phi((mu - c) / sigma),   c = atanh(1 - 10 resolution),   likewise at the lower bound

    instead of a density. Under the policy, ratios therefore have a mean of 1 and the score function a mean of 0, at any
    degree of saturation. All other actions have TorchRL's density. The last dimension holds an action's entries.

    Reference: Fujita and Maeda, Clipped Action Policy Gradient, 2018, https://arxiv.org/abs/1802.07564, Eq. (6), which
    treats actions clipped to their bounds in the same way.

    Example:
        >>> policy = CensoredTanhNormal(torch.tensor([8.0]), torch.tensor([1.0]))
        >>> action, log_prob = policy.rsample_and_log_prob()
        >>> torch.equal(policy.log_prob(action), log_prob)
        True
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of actions ``[..., A]``: a log-density inside the bounds, a log-mass at a bound."""
        entries = self._entries()
        if entries is None:
            return self._score(value).sum(-1)
        return cast("Tensor", sum(entry._score(own) for entry, own in zip(entries, value.unbind(-1), strict=True)))

    def _score(self, value: Tensor) -> Tensor:
        transform, normal = self.transforms[0], cast("Normal", self.root_dist)
        preimage = cast("Tensor", transform.inv(value))
        density = normal.log_prob(preimage) - transform.log_abs_det_jacobian(preimage, value)
        edge = math.atanh(1 - 10 * torch.finfo(value.dtype).resolution)
        at_bound = preimage.abs() >= edge
        distance = torch.where(at_bound, (preimage.sign() * normal.loc - edge) / normal.scale, 0.0)
        return torch.where(at_bound, _log_normal_cdf(distance), density)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Sample actions and return them with their :meth:`log_prob`."""
        action = self.rsample(torch.Size(sample_shape))
        return action, self.log_prob(action)

    def sample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Sample actions without gradient and return them with their :meth:`log_prob`."""
        action = cast("Tensor", self.sample(torch.Size(sample_shape)))
        return action, self.log_prob(action)

    def entropy(self) -> Tensor:
        """Estimate the differential entropy from one reparameterised sample, evaluated before squashing."""
        entries = self._entries()
        if entries is None:
            _, log_prob = super().rsample_and_log_prob()
            return -log_prob
        preimages = self.root_dist.rsample().unbind(-1)
        return -cast("Tensor", sum(entry._density(own) for entry, own in zip(entries, preimages, strict=True)))

    def _density(self, preimage: Tensor) -> Tensor:
        transform = self.transforms[0]
        jacobian = transform.log_abs_det_jacobian(preimage, transform(preimage))
        return cast("Normal", self.root_dist).log_prob(preimage) - jacobian

    def _entries(self) -> list[CensoredTanhNormal] | None:
        """The distributions of few entries by themselves where Torch compiles, which is a matter of speed alone.

        Inductor's loops are vectors along the last dimension. Two entries would fill an eighth of one, rows fill it.
        """
        if not torch.compiler.is_compiling() or self.loc.ndim < 2 or self.loc.shape[-1] > _FEW_ENTRIES:
            return None
        parts = (values.expand_as(self.loc).unbind(-1) for values in (self.loc, self.scale, self.low, self.high))
        return [
            type(self)(loc, scale, low=low, high=high, event_dims=0)
            for loc, scale, low, high in zip(*parts, strict=True)
        ]


def _log_normal_cdf(values: Tensor) -> Tensor:
    """``log Phi``; vmap does not support ``torch.special.log_ndtr``."""
    below, above = values.clamp(max=0.0), values.clamp(min=0.0)
    tail = (torch.special.erfcx(-below / math.sqrt(2)) / 2).log() - below.square() / 2
    return torch.where(values < 0, tail, (-torch.special.erfc(above / math.sqrt(2)) / 2).log1p())
