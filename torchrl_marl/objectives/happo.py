"""HAPPO and HATRPO: agents update sequentially, each accounting for the updates of earlier agents."""

from __future__ import annotations

from torchrl_marl.objectives.natural_gradient import NaturalGradientLoss
from torchrl_marl.objectives.sequential import SequentialLoss

__all__ = ["HAPPOLoss", "HATRPOLoss"]


class HAPPOLoss(SequentialLoss):
    """Heterogeneous-agent PPO: MAPPO's clipped gain for one agent at a time, times the compound ratio of the others.

    With one agent, HAPPO is PPO. Another trust region takes one argument: ``gain=barrier_gain`` gives a sequential
    MARS, for example.

    Reference: Kuba et al., Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning, ICLR 2022,
    https://arxiv.org/abs/2109.11251, HAPPO. One critic is updated last, as in HARL, Zhong et al., JMLR 2024. Two
    differences to HARL: the value estimator bootstraps a truncated episode from its last state, and the compound ratio
    is relative to the log-probabilities stored at collection.

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


class HATRPOLoss(NaturalGradientLoss):
    """Heterogeneous-agent TRPO: one natural-gradient step for each agent, within an exact KL trust region.

    An agent's turn is one call of :meth:`step` on the whole batch.

    Reference: Kuba et al., ICLR 2022, https://arxiv.org/abs/2109.11251, HATRPO. Defaults are HARL's. For categorical
    policies, the authors' code and HARL replace the KL by an unweighted sum of ``r - 1 - ln r`` over all actions, which
    tightens the bound by about the number of actions; here the KL is exact, and over live agents only.

    The loop: :class:`~torchrl_marl.objectives.natural_gradient.NaturalGradientLoss`; keys, shapes, outputs and errors:
    :class:`~torchrl_marl.objectives.sequential.SequentialLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent.
        critic_network: sees the joint observations or the state.
        **options: :class:`~torchrl_marl.objectives.natural_gradient.NaturalGradientOptions`.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """
