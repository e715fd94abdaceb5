"""MAPPO whose trust region is a KL penalty with a coefficient that follows a target."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.distributed import average
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.ratio import ClipLoss, ClipOptions, ScoredBatch
from torchrl_marl.objectives.surrogates import ratio_gain
from torchrl_marl.signatures import check_at_least_0

__all__ = ["MAPPOKLLoss"]


class MAPPOKLLoss(ClipLoss):
    """PPO's adaptive KL penalty for each agent: MAPPO with a penalty on the divergence in place of the clip.

        objective = mean(gain(log r, A)) - kl_coeff mean(KL(old || new))

    The divergence is exact. :meth:`prepare` doubles ``kl_coeff`` where the last divergence that ``forward`` measured in
    training mode was above ``1.5 kl_target`` and halves it where it was below ``kl_target / 1.5``. With ``kl_coeff=0``
    and ``gain=clip_gain`` this is :class:`MAPPOLoss`, bit for bit.

    Reference: Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347, section
    4 (Eq. 8).

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`; ``forward`` returns ``kl`` and
    ``kl_coeff``, too.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        kl_coeff: first coefficient; a buffer.
        kl_target: divergence in nats that the coefficient aims at.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`; ``clip_epsilon`` is that of another ``gain``.

    Raises:
        ValueError: if an option is out of its range.
    """

    _schedulable_buffers = ClipLoss._schedulable_buffers | {"kl_coeff"}
    moves_buffers = True
    kl_coeff: Tensor
    last_kl: Tensor

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        kl_coeff: float = 1.0,
        kl_target: float = 0.01,
        **options: Unpack[ClipOptions],
    ) -> None:
        options.setdefault("gain", ratio_gain)
        check_at_least_0(kl_coeff=kl_coeff, kl_target=kl_target)
        super().__init__(actor_network, critic_network, **options)
        self.kl_target = kl_target
        self._register(kl_coeff=kl_coeff)
        self.register_buffer("last_kl", torch.tensor(torch.nan, device=self._device))

    def _computed_keys(self) -> list[str]:
        return [*super()._computed_keys(), "kl", "kl_coeff"]

    def _own_keys(self) -> list[NestedKey]:
        return list(self.actor_network[-1].in_keys)

    def _complete(self, batch: TensorDictBase) -> None:
        above, below = self.last_kl > 1.5 * self.kl_target, self.last_kl < self.kl_target / 1.5  # both no before any
        self.kl_coeff.mul_(torch.where(above, 2.0, torch.where(below, 0.5, 1.0)))

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective`` with the penalty, and the divergence."""
        kl = policy_kl(self._old_policy(batch.data), batch.policy)
        measured = average(masked_mean(kl.detach(), batch.mask))
        if self.training:
            self.last_kl.copy_(measured)
        gain = self._gain_of(batch.log_ratio, batch.advantage)
        return self._reduce(self.kl_coeff * kl - gain, batch.mask), {"kl": measured, "kl_coeff": self.kl_coeff.clone()}
