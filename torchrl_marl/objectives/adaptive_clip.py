"""Base of methods whose clip interval follows the KL divergence."""

from __future__ import annotations

from abc import abstractmethod

import torch
from tensordict import NestedKey
from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.distributed import average
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.ratio import ClipLoss, ClipOptions, ScoredBatch
from torchrl_marl.objectives.surrogates import kl_interval_unchecked

__all__ = ["AdaptiveClipLoss", "AdaptiveClipOptions"]


class AdaptiveClipOptions(ClipOptions, total=False):
    """Options of losses whose clip follows the divergence; defaults are those of :class:`AdaptiveClipLoss`."""

    ema_rate: float
    kl_bias: float
    kl_floor: float
    kl_target_init: float
    kl_target_max: float


class AdaptiveClipLoss(ClipLoss):
    """Abstract ratio loss that can clip with the interval between the two roots of ``x - 1 - ln x = d``.

    The KL target ``d`` follows the measured divergence. Every ``forward`` in training mode updates ``d`` once, with or
    without gradients:

        d <- min((1 - ema_rate) d + ema_rate (max(KL(old || new), kl_floor) + kl_bias), kl_target_max)

    ``d`` is the buffer ``kl_target``, which a checkpoint saves and restores. The divergence is exact: ``forward`` reads
    the parameters of the old policy's distribution (``loc`` and ``scale``, or ``logits``) from the batch, where
    collectors store them. A non-finite divergence leaves the target unchanged. If no interval depends on the
    divergence, it is not measured.

    Reference: MARPO, https://arxiv.org/abs/2512.22832, Eqs. (9) to (12).

    Args:
        actor_network: as for every ratio loss.
        critic_network: as for every ratio loss.
        ema_rate: weight of the new divergence in the KL target, in [0, 1]; 0 keeps the target and interval fixed.
        kl_bias: added to the divergence. It sets the interval width in practice: for small divergences, ``d`` tends
            to ``kl_floor + kl_bias``. Like ``kl_target``, it is a buffer that can be assigned to for annealing.
        kl_floor: lower bound applied to the measured divergence.
        kl_target_init: initial KL target.
        kl_target_max: largest KL target.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`.

    Raises:
        ValueError: if an option is out of its range.
    """

    _schedulable_buffers = ClipLoss._schedulable_buffers | {"kl_target", "kl_bias"}

    abstract = True
    moves_buffers = True
    kl_target: Tensor
    kl_bias: Tensor

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        ema_rate: float = 0.08,
        kl_bias: float = 0.08,
        kl_floor: float = 0.008,
        kl_target_init: float = 0.01,
        kl_target_max: float = 0.3,
        **options: Unpack[ClipOptions],
    ) -> None:
        super().__init__(actor_network, critic_network, **options)
        if not 0 <= ema_rate <= 1:
            raise ValueError(f"ema_rate, the weight of the new divergence, must be in [0, 1], got {ema_rate}.")
        if not (kl_bias >= 0 and kl_floor >= 0 and kl_bias + kl_floor > 0):
            raise ValueError(f"kl_bias and kl_floor must be at least 0 and not both 0; got {kl_bias}, {kl_floor}.")
        if not 0 < kl_target_init <= kl_target_max:
            raise ValueError(f"kl_target_init must be in (0, kl_target_max = {kl_target_max}], got {kl_target_init}.")
        self.ema_rate, self.kl_floor, self.kl_target_max = ema_rate, kl_floor, kl_target_max
        for name, value in (("kl_target", kl_target_init), ("kl_bias", kl_bias)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64, device=self._device))

    @property
    @abstractmethod
    def uses_kl(self) -> bool:
        """Whether the interval of any active term follows the divergence."""

    def _computed_keys(self) -> list[str]:
        kl = ["kl", "kl_target", "kl_interval_low", "kl_interval_high"]
        return [*super()._computed_keys(), *(kl if self.uses_kl else [])]

    def _own_keys(self) -> list[NestedKey]:
        """The old distribution's parameters."""
        return list(self.actor_network[-1].in_keys) if self.uses_kl else []

    def follow_kl(self, batch: ScoredBatch) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Update the target; return the current clip interval and diagnostics."""
        kl = self._move_target(batch)
        low, high = kl_interval_unchecked(self.kl_target)
        diagnostics = {"kl": kl, "kl_target": self.kl_target.clone(), "kl_interval_low": low, "kl_interval_high": high}
        return (low, high), diagnostics

    @torch.no_grad()
    def _move_target(self, batch: ScoredBatch) -> Tensor:
        """Measure the divergence from the old policy over live agents; in training mode, move the target towards it."""
        old = self._old_policy(batch.data)
        kl = average(masked_mean(policy_kl(old, batch.policy), batch.mask).to(self.kl_target.dtype))
        if self.training:
            goal = torch.where(kl.isfinite(), kl.clamp(min=self.kl_floor) + self.kl_bias, self.kl_target)
            self.kl_target.lerp_(goal, self.ema_rate).clamp_(0, self.kl_target_max)
        return kl
