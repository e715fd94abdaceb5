"""HAPPO and HATRPO: agents update one after the other, each aware of what the others have just changed."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase

from torchrl_marl.objectives.ratio import clip_bounds
from torchrl_marl.objectives.sequential import NaturalGradientLoss, SequentialLoss
from torchrl_marl.objectives.surrogates import Gain, clip_gain, ratio_gain

__all__ = ["HAPPOLoss", "HATRPOLoss"]


class HAPPOLoss(SequentialLoss):
    """Heterogeneous-agent PPO: MAPPO's clipped gain, one agent at a time, times the compound ratio of the others.

    With one agent it is PPO. The trust region of another paper is one argument: ``gain=barrier_gain`` is a sequential
    MARS, say.

    Reference: Kuba et al., Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning, ICLR 2022,
    https://arxiv.org/abs/2109.11251, HAPPO. One critic, updated last, as in HARL, Zhong et al., JMLR 2024; unlike there
    a truncated episode bootstraps from its last state (that is the value estimator's doing), and the compound ratio is
    taken to the log-probabilities stored at collection.

    The loop, keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.sequential.SequentialLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent.
        critic_network: sees the joint observations or the state.
        clip_epsilon: half-width of the clip, or a pair ``(low, high)``: ratios count within ``[1 - low, 1 + high]``.
        gain: another trust region in place of the clip, with the same bounds.
        entropy_coeff, critic_coeff, loss_critic_type, normalize_advantage, normalize_advantage_exclude_dims,
            functional, reduction: as for every ratio loss, see there.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.

    Example:
        >>> for turn in loss.turns(batch):  # doctest: +SKIP
        ...     for minibatch in minibatches(batch, 1000):
        ...         losses = loss(minibatch)
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        clip_epsilon: float | Sequence[float] = 0.2,
        gain: Gain = clip_gain,
        entropy_coeff: float = 0.01,
        critic_coeff: float = 1.0,
        loss_critic_type: str = "smooth_l1",
        normalize_advantage: bool = True,
        normalize_advantage_exclude_dims: Sequence[int] = (-2,),
        functional: bool = True,
        reduction: str = "mean",
    ) -> None:
        low, high = clip_bounds(clip_epsilon)
        super().__init__(
            actor_network,
            critic_network,
            gain=gain,
            low=low,
            high=high,
            reuse=None,
            sampled=False,
            entropy_coeff=entropy_coeff,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            normalize_advantage=normalize_advantage,
            normalize_advantage_exclude_dims=normalize_advantage_exclude_dims,
            functional=functional,
            reduction=reduction,
        )


class HATRPOLoss(NaturalGradientLoss):
    """Heterogeneous-agent TRPO: one natural-gradient step for each agent, within a trust region of the exact KL.

    An agent's turn is one call of :meth:`step` on the whole batch.

    Reference: Kuba et al., ICLR 2022, https://arxiv.org/abs/2109.11251, HATRPO. The authors' code, and
    HARL's, sums an unweighted ``r - 1 - ln r`` over all actions in place of the KL of categorical policies, which
    tightens the bound by about the number of actions; here it is exact, and over live agents only. Defaults are HARL's.

    The loop: :class:`~torchrl_marl.objectives.sequential.NaturalGradientLoss`; keys, shapes, outputs and errors:
    :class:`~torchrl_marl.objectives.sequential.SequentialLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent.
        critic_network: sees the joint observations or the state.
        max_kl, damping, num_iterations, backtrack, accept_ratio, num_backtracks, gain, clip_epsilon, entropy_coeff: see
            :class:`~torchrl_marl.objectives.sequential.NaturalGradientLoss`.
        critic_coeff, loss_critic_type, normalize_advantage, normalize_advantage_exclude_dims, functional, reduction: as
            for every ratio loss, see there.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        max_kl: float = 0.01,
        damping: float = 0.1,
        num_iterations: int = 10,
        backtrack: float = 0.8,
        accept_ratio: float = 0.5,
        num_backtracks: int = 10,
        gain: Gain = ratio_gain,
        clip_epsilon: float | Sequence[float] = 0.2,
        entropy_coeff: float = 0.0,
        critic_coeff: float = 1.0,
        loss_critic_type: str = "smooth_l1",
        normalize_advantage: bool = True,
        normalize_advantage_exclude_dims: Sequence[int] = (-2,),
        functional: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            actor_network,
            critic_network,
            max_kl=max_kl,
            damping=damping,
            num_iterations=num_iterations,
            backtrack=backtrack,
            accept_ratio=accept_ratio,
            num_backtracks=num_backtracks,
            gain=gain,
            clip_epsilon=clip_epsilon,
            reuse=None,
            sampled=False,
            entropy_coeff=entropy_coeff,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            normalize_advantage=normalize_advantage,
            normalize_advantage_exclude_dims=normalize_advantage_exclude_dims,
            functional=functional,
            reduction=reduction,
        )
