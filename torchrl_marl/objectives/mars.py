"""MARS: a multiplicatively symmetric barrier on the ratio of each agent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.ratio import RatioLoss, RatioOptions, surround_one
from torchrl_marl.objectives.surrogates import Gain, barrier_gain

__all__ = ["MARSLoss", "additive_target_ratios", "multiplicative_target_ratios"]


class MARSLoss(RatioLoss):
    """Multi-agent ratio symmetry: MAPPO with a multiplicatively symmetric barrier on the ratio in place of the clip.

    The gain of each sample is largest at its target ratio, has a non-zero gradient everywhere else, and falls without
    bound as the ratio goes to zero, so no finite advantage can drive the probability of an action to zero.

    Reference: Rethinking Ratio-Based Trust Regions for Policy Optimization in Multi-Agent Reinforcement Learning
    (MARS), Eqs. (7), (11), (12). The paper's search ranges are unknown; the default targets are ours. At equal
    width, a barrier changes a policy less per update than a clip; the recipes use (0.5, 2), see ``results/``.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        target_ratios: ``(low, high)`` with ``0 < low < 1 < high``: ratios of largest gain for bad and for good
            actions. The paper's other parameterisations are :func:`multiplicative_target_ratios` and
            :func:`additive_target_ratios`.
        gain: another trust region in place of the barrier, with the same bounds.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.

    Raises:
        ValueError: if the target ratios are on the wrong side of 1.
    """

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        target_ratios: Sequence[float] = (0.8, 1.25),
        gain: Gain = barrier_gain,
        **options: Unpack[RatioOptions],
    ) -> None:
        low, high = _checked(target_ratios)
        super().__init__(actor_network, critic_network, gain=gain, low=low, high=high, **options)


def multiplicative_target_ratios(ratio: float) -> tuple[float, float]:
    """Target ratios ``(1 / ratio, ratio)``: the same factor up and down (the MARS paper's first ablation).

    Example:
        >>> multiplicative_target_ratios(1.25)
        (0.8, 1.25)
    """
    return 1 / ratio, ratio


def additive_target_ratios(epsilon: float) -> tuple[float, float]:
    """Target ratios ``(1 - epsilon, 1 + epsilon)``: the same distance up and down (the MARS paper's second ablation).

    Example:
        >>> additive_target_ratios(0.25)
        (0.75, 1.25)
    """
    return 1 - epsilon, 1 + epsilon


def _checked(target_ratios: Sequence[float]) -> tuple[float, float]:
    pair = isinstance(target_ratios, Sequence) and len(target_ratios) == 2
    if not pair or not surround_one(*target_ratios) or target_ratios[1] == math.inf:
        raise ValueError(
            f"target_ratios must be a finite pair (low, high) with 0 < low < 1 < high, got {target_ratios}, in float32."
        )
    return target_ratios[0], target_ratios[1]
