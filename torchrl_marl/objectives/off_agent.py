"""OAPPO and OATRPO: agents also learn from the experience of agents with similar policies."""

from __future__ import annotations

from typing import Any, Literal, get_args

from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.natural_gradient import NaturalGradientLoss, NaturalGradientOptions
from torchrl_marl.objectives.ratio import ClipOptions
from torchrl_marl.objectives.reuse import ReuseMappingSampler, ReuseOptions
from torchrl_marl.objectives.sequential import SequentialLoss
from torchrl_marl.signatures import take_options

__all__ = ["OAPPOLoss", "OATRPOLoss"]

Reuse = Literal["weighted", "sampled"]


class OAPPOOptions(ClipOptions, ReuseOptions, total=False):
    """Options of :class:`OAPPOLoss`; defaults are those of their owners."""


class OATRPOOptions(NaturalGradientOptions, ReuseOptions, total=False):
    """Options of :class:`OATRPOLoss`; defaults are those of their owners."""


class OAPPOLoss(SequentialLoss):
    """Off-agent PPO: HAPPO in which agents also learn from each other's experience.

    With ``own_weight=1`` the loss is bit-identical to HAPPO. For each batch, ``turns`` computes the weight of every
    source's experience for every agent; ``loss.reuse.matrix`` holds the weights
    (:class:`~torchrl_marl.collectors.ReuseMappingSampler`). The weights depend on the policies that collected the batch
    and are not updated between turns: the rows of a pair that drifts apart leave the clip, and in OATRPO the step
    leaves the trust region.

    Reference: Chen et al., Off-Agent Trust Region Policy Optimization, IJCAI 2024, Eqs. (8), (9), Algorithm 1. Choices
    that the paper leaves open: an agent's network is evaluated on the source's observations and legal actions, with the
    source's advantage; probabilities of mappings are weights of objectives; the compound ratio excludes the source,
    whose actions the ratio already covers; the clip's minimum is taken after multiplying by the advantage, as in PPO;
    the entropy is computed on the agent's own observations. All agents share one observation space and one action
    space.

    The loop, keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.sequential.SequentialLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent, which does not see an agent id.
        critic_network: sees the joint observations or the state.
        own_weight: share of an agent's own experience (the paper's lambda), in (0, 1].
        kl_threshold: how far another agent's policy may be for its experience to be used (sigma), in nats.
        reuse_matrix: a fixed mapping in place of the one that follows the policies: ``"NR"``, ``"AR"``, ``"UR"``,
            ``"RR"`` or a matrix ``[N, N]`` (:func:`~torchrl_marl.objectives.reuse.fixed_reuse_matrix`).
        reuse: ``"weighted"``, all sources in every minibatch, for the expectation over mappings; or ``"sampled"``, one
            source drawn for each learner and row, at the cost of HAPPO.
        kl_reduction: ``"mean"`` over rows, or ``"max"`` as in Eq. (9).
        gate: :func:`~torchrl_marl.objectives.reuse.gated_reuse_matrix`, Eq. (9), or
            :func:`~torchrl_marl.objectives.reuse.fading_reuse_matrix`, whose lambda adapts to each pair of agents.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        reuse: Reuse = "weighted",
        **options: Unpack[OAPPOOptions],
    ) -> None:
        reuse_options = take_options(options, ReuseOptions)
        super().__init__(actor_network, critic_network, **options)
        _share_experience(self, reuse, reuse_options)


class OATRPOLoss(NaturalGradientLoss):
    """Off-agent TRPO: HATRPO in which agents also learn from each other's experience.

    With ``own_weight=1`` the loss is bit-identical to HATRPO. The trust region is centred on the learner's old policy,
    on the data it learns from: ``sum_j M[i, j] mean(KL(pi_i_old(.|o_j) || pi_i(.|o_j))) < max_kl``. (A trust region
    around the source's policy, as in Eq. (7), could be violated before any step.)

    An agent's turn is one call of :meth:`step` on the whole batch.

    Reference: Chen et al., Off-Agent Trust Region Policy Optimization, IJCAI 2024, Eqs. (7), (9), Algorithm 1; choices
    as for :class:`OAPPOLoss`.

    The loop: :class:`~torchrl_marl.objectives.natural_gradient.NaturalGradientLoss`; keys, shapes, outputs and errors:
    :class:`~torchrl_marl.objectives.sequential.SequentialLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent, which does not see an agent id.
        critic_network: sees the joint observations or the state.
        own_weight: share of an agent's own experience (the paper's lambda), in (0, 1].
        kl_threshold: how far another agent's policy may be for its experience to be used (sigma), in nats.
        reuse_matrix: a fixed mapping in place of the one that follows the policies: ``"NR"``, ``"AR"``, ``"UR"``,
            ``"RR"`` or a matrix ``[N, N]`` (:func:`~torchrl_marl.objectives.reuse.fixed_reuse_matrix`).
        reuse: ``"weighted"``, all sources in every minibatch, for the expectation over mappings; or ``"sampled"``, one
            source drawn for each learner and row, at the cost of HAPPO.
        kl_reduction: ``"mean"`` over rows, or ``"max"`` as in Eq. (9).
        gate: :func:`~torchrl_marl.objectives.reuse.gated_reuse_matrix`, Eq. (9), or
            :func:`~torchrl_marl.objectives.reuse.fading_reuse_matrix`, whose lambda adapts to each pair of agents.
        **options: :class:`~torchrl_marl.objectives.natural_gradient.NaturalGradientOptions`.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        reuse: Reuse = "weighted",
        **options: Unpack[OATRPOOptions],
    ) -> None:
        reuse_options = take_options(options, ReuseOptions)
        super().__init__(actor_network, critic_network, **options)
        _share_experience(self, reuse, reuse_options)


def _share_experience(loss: SequentialLoss, reuse: str, options: dict[str, Any]) -> None:
    if reuse not in get_args(Reuse):
        raise ValueError(f"reuse must be weighted or sampled; got {reuse!r}.")
    loss.reuse = ReuseMappingSampler(loss.num_agents, **options).to(loss.ratio_low.device)
    loss.sampled = reuse == "sampled"
