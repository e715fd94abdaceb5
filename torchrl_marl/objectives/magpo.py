"""MAGPO: a centralised guider, kept close to the decentralised learners that imitate it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import Unpack

from torchrl_marl.distributed import average
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.ctds import CTDSLoss, CTDSOptions
from torchrl_marl.objectives.divergences import divergence
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.ratio import ScoredBatch
from torchrl_marl.objectives.surrogates import double_clip_gain

__all__ = ["MAGPOLoss", "RatioRule", "follow_imitation_gap"]


class RatioRule(Protocol):
    """Rule for the bound on the guider-learner ratio, given the current bound and the measured imitation gap."""

    def __call__(self, guider_learner_ratio: Tensor, imitation_gap: Tensor) -> Tensor:
        """Return the next bound; both arguments and the result are 0-dim tensors without gradient."""
        ...


def follow_imitation_gap(
    guider_learner_ratio: Tensor,
    imitation_gap: Tensor,
    *,
    target: float = 0.01,
    rate: float = 0.01,
    low: float = 1.05,
    high: float = 3.0,
) -> Tensor:
    """Narrow the guider's bound while the imitation gap exceeds its target; widen the bound while it is smaller.

        ln delta <- clip(ln delta (target / gap)^rate, ln low, ln high)

    The bound confines ``ln(mu / pi)`` to ``[-ln delta, ln delta]``, and a divergence grows with the square of that
    width. A non-finite gap leaves the bound unchanged.

    MAGPO's authors tune delta for each task and recommend small values against wide imitation gaps. They leave
    adapting delta to the observed gap as future work (section 6); this rule is ours.

    Args:
        guider_learner_ratio: current delta, 0-dim.
        imitation_gap: mean divergence of learner and guider, 0-dim, in nats.
        target: target imitation gap.
        rate: adaptation speed: the width changes by this power of the relative error.
        low: smallest delta, above 1.
        high: largest delta.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> follow_imitation_gap(torch.tensor(4.0), torch.tensor(0.08), target=0.02, rate=0.5, high=9.0)  # half of ln 4
        tensor(2.)
    """
    if not (target > 0 and rate >= 0 and 1 < low <= high):
        raise ValueError(f"Needs target > 0, rate >= 0, 1 < low <= high; got {target}, {rate}, {low}, {high}.")
    width = guider_learner_ratio.log() * (target / imitation_gap.clamp(min=1e-8)) ** rate
    following = width.exp().clamp(low, high)
    return torch.where(imitation_gap.isfinite(), following, guider_learner_ratio)


class MAGPOLoss(CTDSLoss):
    """Multi-agent guided policy optimisation: PPO of a centralised guider that stays close to its learners.

        loss_objective         = -mean(min(r A, clip(clip(mu / pi, 1 / delta, delta) pi / mu_old, 1 - e, 1 + e) A))
        loss_guider_kl         =  mean(m KL(mu || pi)),   m = 1 where mu / pi of the action leaves [1 / delta, delta]
        loss_learner_kl        =  mean(KL(mu || pi)),   or KL(pi || mu)
        loss_learner_objective = -rl_coeff mean(gain(log pi - log mu_old, A))

    The guider's ``loss_entropy`` and ``loss_critic`` are those of every ratio loss. The guider ``mu`` collects the
    data. The learner ``pi`` acts on each agent's own observation and is the policy executed after training. The first
    two losses treat ``pi`` as a constant, the last two ``mu``. Divergences are exact and per agent; the guider's
    distribution of an agent's action is conditioned on the actions decoded before. Sum all losses and back-propagate
    the sum: guider and learner are then updated simultaneously, each against the other's old parameters, as in the
    authors' code. In the paper the learner imitates the updated guider: ``guider_first=True``.

    The guider may be any actor; those of :func:`~torchrl_marl.modules.make_mat` and
    :func:`~torchrl_marl.modules.make_sable` are autoregressive. The learner may be any actor of the same group and
    action space, with or without memory: the loss only needs both distributions on the same data.

    This loss follows the authors' code rather than the paper in three points: the learner's divergence is
    ``KL(mu || pi)`` (Eq. 10 has the reverse), guider and learner are updated simultaneously, and the guider is not
    reset to the learner. With ``guider_learner_ratio=inf`` and ``rl_coeff=0`` the loss is :class:`CTDSLoss`.

    Beyond the paper, ``adapt_ratio`` adapts ``delta`` to the measured imitation gap, the divergence that the learner
    minimises, once in every ``forward`` in training mode, with or without gradients. Its state is the buffer
    ``guider_learner_ratio``, which a checkpoint saves and restores and which ``forward`` also returns.

    Reference: Li et al., Multi-Agent Guided Policy Optimization, 2025, https://arxiv.org/abs/2507.18059, Eqs. (8) to
    (11); code at https://github.com/liyheng/MAGPO.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`, whose actor is the guider.
    ``forward`` also returns the scalars of :class:`CTDSLoss` and ``double_clip_fraction`` (mean of ``m``).

    Args:
        guider_network: centralised policy, which collects the data.
        critic_network: the guider's critic.
        learner_network: decentralised policy.
        guider_learner_ratio: delta, the factor by which guider and learner probabilities of an action may differ;
            above 1. The paper searches 1.1 to 3 for each task. A buffer, so it can be scheduled by assignment.
        adapt_ratio: rule that adapts delta to the imitation gap, such as :func:`follow_imitation_gap`; ``None`` keeps
            delta fixed.
        **options: :class:`~torchrl_marl.objectives.ctds.CTDSOptions`; ``rl_coeff`` is 1 by default (the paper searches
            0 to 8). ``gain`` is passed to :func:`~torchrl_marl.objectives.surrogates.double_clip_gain`. The authors'
            critic corresponds to ``clip_value=clip_epsilon``, ``loss_critic_type="l2"`` and ``critic_coeff=0.25`` (a
            coefficient of 0.5 times half the square).

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> from torchrl_marl.modules import GroupSpec, make_actor, make_mat
        >>> shape = GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5)
        >>> guider, critic = make_mat(shape)
        >>> loss = MAGPOLoss(guider, critic, make_actor(shape), guider_learner_ratio=1.3, rl_coeff=2.0)
        >>> sum(value for key, value in loss(data).items() if key.startswith("loss_")).backward()  # doctest: +SKIP
    """

    _schedulable_buffers = CTDSLoss._schedulable_buffers | {"guider_learner_ratio"}

    guider_learner_ratio: Tensor

    def __init__(
        self,
        guider_network: Actor,
        critic_network: Critic,
        learner_network: Actor,
        *,
        guider_learner_ratio: float = 1.5,
        adapt_ratio: RatioRule | None = None,
        **options: Unpack[CTDSOptions],
    ) -> None:
        if not guider_learner_ratio > 1:
            raise ValueError(f"guider_learner_ratio must be above 1, got {guider_learner_ratio}.")
        options.setdefault("rl_coeff", 1.0)
        super().__init__(guider_network, critic_network, learner_network, **options)
        self.adapt_ratio = adapt_ratio
        self.moves_buffers = adapt_ratio is not None
        self._register(guider_learner_ratio=float(guider_learner_ratio))

    def check_loop(
        self, frames_per_batch: int, num_envs: int, minibatch_size: int, chunk_length: int | None = None
    ) -> None:
        """Reject settings that :meth:`phases` cannot use and options that ``adapt_ratio`` rejects."""
        super().check_loop(frames_per_batch, num_envs, minibatch_size, chunk_length)
        if self.adapt_ratio is not None:
            self.adapt_ratio(self.guider_learner_ratio, self.guider_learner_ratio.log())

    def _computed_keys(self) -> list[str]:
        adapted = [] if self.adapt_ratio is None else ["guider_learner_ratio"]
        return [*super()._computed_keys(), "loss_guider_kl", "double_clip_fraction", *adapted]

    def guide(
        self, batch: ScoredBatch, learner: Distribution, log_ratio: Tensor, imitation: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the guider's ``loss_objective``, its divergence loss outside the bound, and diagnostics."""
        adapted = {}
        if self.adapt_ratio is not None:
            self._move_ratio(average(masked_mean(imitation, batch.mask)))
            adapted = {"guider_learner_ratio": self.guider_learner_ratio.clone()}
        gap = batch.log_ratio - log_ratio  # log mu - log pi: log mu_old cancels
        delta, bounds = self.guider_learner_ratio, {"low": self.ratio_low, "high": self.ratio_high}
        gain = double_clip_gain(
            batch.log_ratio, gap, batch.advantage, guider_learner_ratio=delta, gain=self.gain, **bounds
        )
        outside = (gap.detach().abs() > delta.log()).to(gap.dtype)
        return self._reduce(-gain, batch.mask), {
            "loss_guider_kl": self._reduce(outside * divergence(batch.policy, learner, constant="second"), batch.mask),
            "double_clip_fraction": masked_mean(outside, batch.mask),
            **adapted,
        }

    @torch.no_grad()
    def _move_ratio(self, imitation_gap: Tensor) -> None:
        if self.training and self.adapt_ratio is not None:
            self.guider_learner_ratio.copy_(self.adapt_ratio(self.guider_learner_ratio, imitation_gap))
