"""CoPPO: MAPPO in which each agent also sees how far the other agents' policies have moved."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.ratio import ClipLoss, ClipOptions, ScoredBatch, clip_bounds

__all__ = ["CoPPOLoss"]


class CoPPOLoss(ClipLoss):
    """Coordinated PPO: the clipped gain of each agent's ratio times the clipped joint ratio of the other agents.

        loss_objective = -mean(gain(log(g_i r_i), A_i; low, high)),   g_i = clip(prod_{j != i} r_j, 1 - e, 1 + e)

    The narrow inner interval lets an agent adapt its step to the updates of the others at a bounded variance. Dead
    agents have a ratio of 1. With ``inner_clip_epsilon=0`` the loss is :class:`MAPPOLoss`, bit for bit.

    Reference: Wu et al., Coordinated Proximal Policy Optimization, NeurIPS 2021, https://arxiv.org/abs/2111.04051.
    The paper searches the inner width for each task; the default is ours.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        inner_clip_epsilon: half-width ``e`` of the interval of the others' joint ratio, in [0, 1).
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        inner_clip_epsilon: float = 0.1,
        **options: Unpack[ClipOptions],
    ) -> None:
        low, high = clip_bounds(inner_clip_epsilon) if inner_clip_epsilon else (1.0, 1.0)
        super().__init__(actor_network, critic_network, **options)
        self._inner_bounds = math.log(low), math.log(high)

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective``."""
        others = batch.log_ratio.sum(-1, keepdim=True) - batch.log_ratio
        log_ratio = batch.log_ratio + others.clamp(*self._inner_bounds)
        return self._reduce(-self._gain_of(log_ratio, batch.advantage), batch.mask), {}
