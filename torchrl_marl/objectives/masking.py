"""Masks of live agents and of padding, for means, deviations and standardised values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from torch import Tensor

__all__ = ["Gather", "masked_mean", "per_agent", "standardize", "where_live"]

Gather = Callable[[Tensor], Tensor]
"""Concatenates the shards of a batch that several processes hold, along the first dimension."""


def alone(values: Tensor) -> Tensor:
    """Return the values unchanged: the gather function of a single process."""
    return values


def standardize(
    values: Tensor, mask: Tensor | None = None, *, exclude_dims: Sequence[int] = (), gather: Gather = alone
) -> Tensor:
    """Shift and scale unmasked values to mean 0 and standard deviation 1.

    MAPPO's authors standardise the advantages of a whole batch once, over all steps and live agents.

    Args:
        values: values such as advantages ``[B, N, 1]``.
        mask: rows to include (bool), of the shape of ``values`` or without its last dimension; other rows become 0.
        exclude_dims: dimensions along which every index has separate statistics.
        gather: concatenates the shards of a batch that several processes hold, such as
            :func:`torchrl_marl.distributed.gather`.

    Returns:
        Standardised values, same shape. Constant values give zeros.

    Example:
        >>> standardize(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([True, True, False])).flatten()
        tensor([-0.7071,  0.7071,  0.0000])
    """
    mean, deviation = mean_and_deviation(gather(values), None if mask is None else gather(mask), exclude_dims)
    standardized = (values - mean) / deviation
    return where_live(standardized, None if mask is None else _fit_mask(mask, values))


def where_live(values: Tensor, mask: Tensor | None) -> Tensor:
    """Unmasked values, elsewhere 0, also in the gradient; ``mask`` has the same shape, ``None`` includes all values."""
    return values if mask is None else torch.where(mask, values, 0.0)


def extremes(ratio: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest unmasked value of positive ratios; infinity and 0 if all are masked."""
    if mask is None:
        return ratio.min(), ratio.max()
    return ratio.where(mask, torch.inf).min(), ratio.where(mask, 0.0).max()


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of unmasked values, 0 if all are masked; ``mask`` has the same shape, ``None`` includes all values."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def per_agent(advantage: Tensor, shape: torch.Size, key: NestedKey) -> Tensor:
    """Convert ``[*batch, agents, 1]``, or a team's ``[*batch, 1]``, to ``[*batch, agents]``; reject other shapes."""
    if advantage.shape == (*shape, 1):
        return advantage.squeeze(-1)
    if advantage.shape == (*shape[:-1], 1):
        return advantage.expand(shape)
    raise ValueError(
        f"{key!r} has shape {tuple(advantage.shape)}, but the log-probabilities have shape {tuple(shape)}: expected "
        f"{(*shape, 1)} for each agent or {(*shape[:-1], 1)} for the team."
    )


def expand_mask(mask: Tensor, shape: torch.Size, batch: torch.Size, key: NestedKey) -> Tensor:
    """Expand a mask per agent or per step to ``shape``, which is that of agents or of the team."""
    if mask.shape == (*shape, 1):
        return mask.squeeze(-1)
    if mask.shape == shape:
        return mask
    if mask.shape[: len(batch)] == batch and mask.ndim <= len(batch) + 2:
        if mask.ndim > len(batch) and len(shape) == len(batch):  # a team's value counts where any agent is alive
            return mask.flatten(len(batch)).any(-1)
        if mask.shape[len(batch) :].numel() == 1:
            return mask.reshape((*batch, 1)).expand(shape)
    raise ValueError(
        f"The mask {key!r} has shape {tuple(mask.shape)}, which does not fit rows of shape {tuple(shape)}."
    )


def mean_and_deviation(values: Tensor, mask: Tensor | None, exclude_dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (at least 1e-6) of unmasked values, with ``keepdim``; see :func:`standardize`."""
    dims = sorted(set(range(values.ndim)) - {dim % values.ndim for dim in exclude_dims})
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else _fit_mask(mask, values)
    count = mask.sum(dims, keepdim=True)
    mean = torch.where(mask, values, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)
    squares = torch.where(mask, values - mean, 0.0).square().sum(dims, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-6)


def _fit_mask(mask: Tensor, values: Tensor) -> Tensor:
    return (mask.unsqueeze(-1) if mask.ndim == values.ndim - 1 else mask).expand_as(values)


def variance(values: Tensor, mask: Tensor | None) -> Tensor:
    """Population variance of unmasked values ``[*B, 1]``; ``mask`` is ``[*B]``."""
    values = values.squeeze(-1)
    return masked_mean((values - masked_mean(values, mask)).square(), mask)
