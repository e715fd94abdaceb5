"""Value normalisation as in MAPPO: the critic predicts normalised values."""

from __future__ import annotations

from torch import Tensor, nn
from torchrl.modules import ValueNorm

__all__ = ["Denormalize"]


class Denormalize(nn.Module):
    """Last layer of a critic whose network predicts normalised values: ``value = mean + scale * prediction``.

    The critic returns values in units of the return, as value estimators require, while the losses of this library
    measure its error in units of ``scale``: the network regresses ``(target - mean) / scale``. Call
    ``loss.update_value_norm(batch)`` once per batch to update the statistics.

    TorchRL's ``MAPPOLoss(value_norm=...)`` alone only rescales the loss; with a critic that ends in this layer, it also
    implements the paper's normalisation.

    Reference: Yu et al., 2022, https://arxiv.org/abs/2103.01955, section 5.1 (value normalization).

    Args:
        value_norm: running statistics, such as :class:`torchrl.modules.PopArtValueNorm` (its default decay is MAPPO's).

    Example:
        >>> import torch
        >>> from torchrl.modules import RunningValueNorm
        >>> value_norm = RunningValueNorm(shape=1)
        >>> value_norm.update(torch.tensor([[1.0], [5.0]]))  # mean 3, standard deviation 2
        >>> Denormalize(value_norm)(torch.tensor([0.0, 1.0]).unsqueeze(-1)).flatten()
        tensor([3., 5.])

    Raises:
        ValueError: if the decay of the statistics, ``beta``, is not in [0, 1).
    """

    def __init__(self, value_norm: ValueNorm) -> None:
        super().__init__()
        beta = getattr(value_norm, "beta", 0.0)  # PopArt's decay, which TorchRL does not check
        if not 0 <= beta < 1:
            raise ValueError(f"A value norm's beta must be in [0, 1); got {beta}.")
        self.value_norm = value_norm

    def forward(self, prediction: Tensor) -> Tensor:
        """Convert normalised predictions ``[..., 1]`` to values of the same shape."""
        return self.value_norm.denormalize(prediction)
