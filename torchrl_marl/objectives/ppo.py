"""MAPPO, IPPO and MASPO: the clipped and the quadratic ratio objective for each agent."""

from __future__ import annotations

from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.ratio import ClipLoss, ClipOptions
from torchrl_marl.objectives.surrogates import quadratic_gain

__all__ = ["IPPOLoss", "MAPPOLoss", "MASPOLoss"]


class MAPPOLoss(ClipLoss):
    """Multi-agent PPO: the clipped gain for each agent, with a centralised critic.

    The loss equals :class:`torchrl.objectives.multiagent.MAPPOLoss` on the same batch, in value and gradient. In
    addition, it excludes dead agents from the policy's means and the advantage normalisation, and regresses normalised
    values if the critic ends in a :class:`~torchrl_marl.modules.Denormalize` layer.

    Reference: Yu et al., The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games, 2022,
    https://arxiv.org/abs/2103.01955; Eq. (2) of the MARS paper. Defaults are TorchRL's. A pair of widths gives the MARS
    paper's asymmetric MAPPO.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        clip_epsilon: half-width of the clip, or a pair ``(low, high)`` for the interval ``[1 - low, 1 + high]``.
        gain: another trust region in place of the clip, with the same bounds.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.

    Example:
        >>> loss = MAPPOLoss(actor, critic, clip_epsilon=(0.2, 0.28))  # doctest: +SKIP
        >>> sum(value for key, value in loss(data).items() if key.startswith("loss_")).backward()  # doctest: +SKIP
    """


class IPPOLoss(MAPPOLoss):
    """Independent PPO: the clipped gain for each agent, with a critic that sees only that agent's observation.

    IPPO differs from :class:`MAPPOLoss` only in the critic, built with ``make_critic(env, observes="observation")``.

    Reference: de Witt et al., Is Independent Learning All You Need in the StarCraft Multi-Agent Challenge?, 2020,
    https://arxiv.org/abs/2011.09533.

    Keys, shapes, arguments, outputs and errors: :class:`MAPPOLoss`.
    """


class MASPOLoss(ClipLoss):
    """Multi-agent simple policy optimisation: MAPPO with a quadratic penalty on the ratio in place of the clip.

    The gain of each sample is largest at the target ratio ``1 + epsilon`` (good actions) or ``1 - epsilon`` (bad ones),
    and the gradient never vanishes beyond it.

    Reference: Selmonaj et al., 2025, after Xie et al., Simple Policy Optimization, 2025; Eq. (3) of the MARS paper. A
    pair of widths gives the MARS paper's asymmetric MASPO.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        clip_epsilon: distance of the target ratios from 1, or a pair ``(low, high)``: targets ``1 - low, 1 + high``.
        gain: another trust region in place of the quadratic penalty, with the same bounds.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.
    """

    def __init__(self, actor_network: Actor, critic_network: Critic, **options: Unpack[ClipOptions]) -> None:
        options.setdefault("gain", quadratic_gain)
        super().__init__(actor_network, critic_network, **options)
