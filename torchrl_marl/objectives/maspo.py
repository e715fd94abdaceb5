"""MASPO: a quadratic penalty on the ratio of each agent."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from typing_extensions import Unpack

from torchrl_marl.objectives.ratio import RatioLoss, RatioOptions, clip_bounds
from torchrl_marl.objectives.surrogates import Gain, quadratic_gain

__all__ = ["MASPOLoss"]


class MASPOLoss(RatioLoss):
    """Multi-agent simple policy optimisation: MAPPO with a quadratic penalty on the ratio in place of the clip.

    The gain of each sample is largest at the target ratio ``1 + epsilon`` (good actions) or ``1 - epsilon`` (bad ones),
    and the gradient never vanishes beyond it.

    Reference: Selmonaj et al., 2025, after Xie et al., Simple Policy Optimization, 2025; Eq. (3) of the MARS paper. A
    pair of widths is the MARS paper's asymmetric MASPO.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        clip_epsilon: distance of the target ratios from 1, or a pair ``(low, high)``: targets ``1 - low, 1 + high``.
        gain: another trust region in place of the quadratic penalty, with the same bounds.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        clip_epsilon: float | Sequence[float] = 0.2,
        gain: Gain = quadratic_gain,
        **options: Unpack[RatioOptions],
    ) -> None:
        low, high = clip_bounds(clip_epsilon)
        super().__init__(
            actor_network,
            critic_network,
            gain=gain,
            low=low,
            high=high,
            **options,
        )
