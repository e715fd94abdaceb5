"""OAPPO and OATRPO: agents that also learn from the experience of those whose policies are close to theirs."""

from __future__ import annotations

from typing import Any, Literal, get_args

from typing_extensions import Unpack

from torchrl_marl.modules.agent_networks import count_agents
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
    """Off-agent PPO: HAPPO in which agents learn from each other's experience as well.

    With ``own_weight=1`` it is HAPPO, bit for bit. ``turns`` decides anew for each batch how much of whose experience
    an agent uses; ``loss.reuse.matrix`` shows it (:class:`~torchrl_marl.collectors.ReuseMappingSampler`). It decides
    once, on policies as they collected the batch: a pair that drifts apart while agents update is not looked at again,
    for by then each of its rows leaves the clip, or the step OATRPO's trust region, by itself.

    Reference: Chen et al., Off-Agent Trust Region Policy Optimization, IJCAI 2024, Eqs. (8), (9), Algorithm 1. Where
    the paper leaves a choice: an agent judges a source's observations and legal actions with its own network, and takes
    the source's advantage; probabilities of mappings are weights of objectives; the compound ratio leaves the source's
    own slot out, which the ratio already counts; the clip's minimum is taken after multiplying by the advantage, as in
    PPO; the entropy is that on own observations. All agents have one observation space and one action space.

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
        kl_reduction: ``"mean"`` over rows, or ``"max"`` as Eq. (9) has it.
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
        super().__init__(actor_network, critic_network, **_with_sampler(actor_network, reuse, options))


class OATRPOLoss(NaturalGradientLoss):
    """Off-agent TRPO: HATRPO in which agents learn from each other's experience as well.

    With ``own_weight=1`` it is HATRPO, bit for bit. The trust region is one of the learner around itself, on what it
    learns from: ``sum_j M[i, j] mean(KL(pi_i_old(.|o_j) || pi_i(.|o_j))) < max_kl``. (Around the source, as Eq. (7) has
    it, it could be violated before any step.)

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
        kl_reduction: ``"mean"`` over rows, or ``"max"`` as Eq. (9) has it.
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
        super().__init__(actor_network, critic_network, **_with_sampler(actor_network, reuse, options))


def _with_sampler(actor: Actor, reuse: str, options: Any) -> Any:
    """Options of the sequential loss: a sampler in place of what it is made of."""
    if reuse not in get_args(Reuse):
        raise ValueError(f"reuse must be weighted or sampled; got {reuse!r}.")
    sampler = ReuseMappingSampler(count_agents(actor), **take_options(options, ReuseOptions))
    return {**options, "reuse": sampler, "sampled": reuse == "sampled"}
