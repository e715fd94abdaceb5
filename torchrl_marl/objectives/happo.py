"""HAPPO and HATRPO: agents update one after the other, each aware of what the others have just changed."""

from __future__ import annotations

from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.natural_gradient import NaturalGradientLoss, NaturalGradientOptions
from torchrl_marl.objectives.ratio import ClipOptions
from torchrl_marl.objectives.sequential import SequentialLoss

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
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.

    Example:
        >>> for turn in loss.turns(batch):  # doctest: +SKIP
        ...     for minibatch in minibatches(batch, 1000):
        ...         losses = loss(minibatch)
    """

    def __init__(self, actor_network: Actor, critic_network: Critic, **options: Unpack[ClipOptions]) -> None:
        super().__init__(actor_network, critic_network, reuse=None, sampled=False, **options)


class HATRPOLoss(NaturalGradientLoss):
    """Heterogeneous-agent TRPO: one natural-gradient step for each agent, within a trust region of the exact KL.

    An agent's turn is one call of :meth:`step` on the whole batch.

    Reference: Kuba et al., ICLR 2022, https://arxiv.org/abs/2109.11251, HATRPO. The authors' code, and
    HARL's, sums an unweighted ``r - 1 - ln r`` over all actions in place of the KL of categorical policies, which
    tightens the bound by about the number of actions; here it is exact, and over live agents only. Defaults are HARL's.

    The loop: :class:`~torchrl_marl.objectives.natural_gradient.NaturalGradientLoss`; keys, shapes, outputs and errors:
    :class:`~torchrl_marl.objectives.sequential.SequentialLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent.
        critic_network: sees the joint observations or the state.
        **options: :class:`~torchrl_marl.objectives.natural_gradient.NaturalGradientOptions`.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    def __init__(self, actor_network: Actor, critic_network: Critic, **options: Unpack[NaturalGradientOptions]) -> None:
        super().__init__(actor_network, critic_network, reuse=None, sampled=False, **options)
