"""Exact divergences between the policies of agents, differentiable twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical, kl_divergence
from torchrl.modules import TanhNormal

__all__ = ["categorical_kl", "divergence", "gaussian_kl", "pairwise_kl", "policy_kl"]


def policy_kl(old: Distribution, new: Distribution) -> Tensor:
    """Exact divergence ``KL(old || new)`` of two policies of the same family, differentiable twice.

    Supported are categorical policies (masked ones over their legal actions), Gaussian policies, and Gaussian policies
    squashed by the same ``tanh``, which leaves the divergence unchanged.

    Args:
        old: policy under which the expectation is taken.
        new: policy over the same actions.

    Returns:
        Divergence in nats, with the batch shape of the distributions, such as ``[B, N]``.

    Raises:
        NotImplementedError: if the pair has no closed form.

    Example:
        >>> old, new = Categorical(torch.tensor([0.5, 0.5])), Categorical(torch.tensor([0.25, 0.75]))
        >>> policy_kl(old, new)  # 0.5 ln 2 + 0.5 ln (2 / 3)
        tensor(0.1438)
    """
    if isinstance(old, (Categorical, OneHotCategorical)) and isinstance(new, (Categorical, OneHotCategorical)):
        return categorical_kl(old.logits, new.logits)
    if isinstance(old, TanhNormal) and isinstance(new, TanhNormal):
        return gaussian_kl(old.loc, old.scale, new.loc, new.scale)
    return kl_divergence(old, new)


def categorical_kl(old_log_probs: Tensor, new_log_probs: Tensor) -> Tensor:
    """Divergence of categorical distributions, ``sum_a pi_old(a) (ln pi_old(a) - ln pi_new(a))``.

    Actions of probability zero under the old policy contribute zero to value and gradient, even if no action is legal.
    HARL and its predecessors use the unweighted sum of ``r - 1 - ln r`` over actions instead. That sum is not a
    divergence: its second derivative is not the Fisher matrix.

    Args:
        old_log_probs: ``[..., A]``, normalised, ``-inf`` for illegal actions.
        new_log_probs: same shape, the same actions legal.

    Returns:
        ``[...]``

    Example:
        >>> categorical_kl(torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log())
        tensor(0.1438)
    """
    possible = old_log_probs > -torch.inf  # also False for NaN, the log-probabilities of an agent with no legal action
    old, new = (torch.where(possible, log_probs, 0.0) for log_probs in (old_log_probs, new_log_probs))
    return torch.where(possible, old.exp() * (old - new), 0.0).sum(-1)


def gaussian_kl(old_loc: Tensor, old_scale: Tensor, new_loc: Tensor, new_scale: Tensor) -> Tensor:
    """Divergence of diagonal Gaussians in closed form, which compiles, unlike PyTorch's ``kl_divergence`` dispatch.

    Args:
        old_loc: mean of the old policy, ``[..., A]``.
        old_scale: standard deviation of the old policy, same shape.
        new_loc: mean of the new policy, same shape.
        new_scale: standard deviation of the new policy, same shape.

    Returns:
        ``[...]``

    Example:
        >>> one = torch.ones(2)
        >>> gaussian_kl(0 * one, one, one, one)  # half the squared distance
        tensor(1.)
    """
    ratio = old_scale / new_scale
    return (((old_loc - new_loc) / new_scale).square() / 2 + (ratio.square() - 1) / 2 - ratio.log()).sum(-1)


def divergence(p: Distribution, q: Distribution, *, constant: Literal["first", "second"]) -> Tensor:
    """Exact ``KL(p || q)`` of each agent's policy, ``[*batch, N]``, with gradient to only one of the two.

    Actions of probability zero, such as illegal actions, contribute zero to value and gradient. Squashing both policies
    by the same ``tanh`` does not change their divergence, so squashed Gaussians are compared before squashing.

    Args:
        p: categorical (masked or not) or squashed Gaussian.
        q: distribution of the same family over the same actions.
        constant: which of the two receives no gradient.

    Raises:
        ValueError: if a distribution is of another family, or the two families differ.

    Example:
        >>> p, q = Categorical(torch.tensor([0.5, 0.5, 0.0])), Categorical(torch.tensor([0.25, 0.75, 0.0]))
        >>> divergence(p, q, constant="second")  # (ln 2 + ln 2/3) / 2
        tensor(0.1438)
    """
    p_parameters, q_parameters = _parameters(p, constant == "first"), _parameters(q, constant == "second")
    if len(p_parameters) != len(q_parameters):
        raise ValueError(
            "Guider and learner must share an action space, but one has discrete and one continuous actions."
        )
    if isinstance(p, Categorical):
        return categorical_kl(*p_parameters, *q_parameters)
    return gaussian_kl(*p_parameters, *q_parameters)


def _parameters(distribution: Distribution, frozen: bool) -> tuple[Tensor, ...]:
    """Log-probabilities of all actions, or location and scale before squashing; without gradient if frozen."""
    if isinstance(distribution, Categorical):
        parameters: tuple[Tensor, ...] = (distribution.logits,)
    elif isinstance(distribution, TanhNormal):
        parameters = (distribution.loc, distribution.scale)
    else:
        raise ValueError(
            f"Divergences are defined for categoricals and squashed Gaussians, not for {type(distribution).__name__}."
        )
    return tuple(x.detach() for x in parameters) if frozen else parameters


def pairwise_kl(
    own: Distribution,
    others: Sequence[Distribution],
    mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Divergence of each learner's policy from each source's policy, on the source's data.

        K[i, j] = mean over rows where j is alive of KL(pi_j(.|o_j) || pi_i(.|o_j))

    Args:
        own: every agent's policy on its own observations, batch shape ``[*B, N]``.
        others: for each agent i, its policy on the observations of all agents, batch shape ``[*B, N]``.
        mask: live agents (bool), ``[*B, N]``.
        reduction: ``"mean"``, or ``"max"`` as in Eq. (9): the maximum over the batch, which is set by one sample and
            grows with the number of rows.

    Returns:
        ``[N, N]``, learners in rows and sources in columns; infinite for a source without a live row, which offers
        nothing to learn from.

    Raises:
        ValueError: if ``reduction`` is neither ``"mean"`` nor ``"max"``.

    Example:
        >>> first, second = (torch.tensor(p) for p in ([0.5, 0.5], [0.25, 0.75]))
        >>> policies = [torch.distributions.Categorical(p.expand(4, 2, 2)) for p in (first, second)]
        >>> pairwise_kl(torch.distributions.Categorical(torch.stack([first, second]).expand(4, 2, 2)), policies)
        tensor([[0.0000, 0.1308],
                [0.1438, 0.0000]])
    """
    if reduction not in ("mean", "max"):
        raise ValueError(f"reduction must be mean or max; got {reduction!r}.")
    divergences = torch.stack([policy_kl(own, other) for other in others]).flatten(1, -2)  # [learners, rows, sources]
    live = torch.ones_like(divergences[0], dtype=torch.bool) if mask is None else mask.flatten(0, -2)
    divergences = torch.where(live, divergences, 0.0)
    reduced = divergences.sum(1) / live.sum(0) if reduction == "mean" else divergences.amax(1)
    return torch.where(live.any(0), reduced, torch.inf)
