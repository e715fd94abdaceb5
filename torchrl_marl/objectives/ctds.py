"""CTDS: a centralised guider collects the data and learns; decentralised learners imitate it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import Unpack

from torchrl_marl.keys import sibling
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.divergences import divergence
from torchrl_marl.objectives.masking import extremes, where_live
from torchrl_marl.objectives.minibatches import Phase
from torchrl_marl.objectives.ratio import OUT_KEYS, ClipLoss, ClipOptions, ScoredBatch
from torchrl_marl.objectives.surrogates import Gain, clip_gain
from torchrl_marl.signatures import check_choice

__all__ = ["GUIDER_LOSSES", "LEARNER_LOSSES", "CTDSLoss", "CTDSOptions", "LearnerKL"]

LearnerKL = Literal["forward", "reverse"]
GUIDER_LOSSES = ("loss_objective", "loss_entropy", "loss_critic", "loss_guider_kl")
LEARNER_LOSSES = ("loss_learner_kl", "loss_learner_objective")


class CTDSOptions(ClipOptions, total=False):
    """Options of losses with a guider; meanings and defaults are those of :class:`CTDSLoss`."""

    learner_kl: LearnerKL
    rl_coeff: float
    learner_gain: Gain
    guider_first: bool
    shuffle_agents: bool


class CTDSLoss(ClipLoss):
    """Centralised teacher with decentralised students: the learner imitates a guider that ignores the learner.

        loss_learner_kl        =  mean(KL(mu || pi)),   or KL(pi || mu)
        loss_learner_objective = -rl_coeff mean(gain(log pi - log mu_old, A))

    The losses ``loss_objective``, ``loss_entropy`` and ``loss_critic`` of the guider ``mu`` are those of every ratio
    loss; with the clip, the guider is trained by PPO. The learner's losses treat ``mu`` as a constant. CTDS is
    :class:`MAGPOLoss` without the double clip and the guider's divergence. With ``rl_coeff`` above 0 the learner also
    follows the advantages: "CTDS with RL" (1, 2 and 4 in Fig. 5b of the MAGPO paper).

    Reference: on-policy CTDS as described in the MAGPO paper, https://arxiv.org/abs/2507.18059, section 5, after Zhao
    et al., CTDS: Centralized Teacher with Decentralized Student for Multi-Agent Reinforcement Learning, 2022,
    https://arxiv.org/abs/2203.08412.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`, whose actor is the guider.
    ``forward`` also returns the scalars ``learner_min_ratio`` and ``learner_max_ratio`` (of ``pi / mu_old``).

    Args:
        guider_network: centralised policy, which collects the data.
        critic_network: the guider's critic.
        learner_network: decentralised policy.
        learner_kl: divergence that the learner minimises: ``"forward"``, ``KL(mu || pi)``, or ``"reverse"``,
            ``KL(pi || mu)``.
        rl_coeff: lambda, weight of the learner's own objective; a buffer, so it can be scheduled by assignment.
        learner_gain: trust region of the learner's own objective, with the guider's bounds.
        guider_first: train the learner in a separate phase after the guider's update, as in the paper, at twice the
            cost.
        shuffle_agents: shuffle the guider's decoding order of agents in every epoch, as in the authors' code.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`, for the guider.

    Raises:
        ValueError: if an option is out of its range.
    """

    learner_network: Actor
    learner_network_params: TensorDictParams | None
    target_learner_network_params: TensorDictParams | None
    rl_coeff: Tensor
    _schedulable_buffers = ClipLoss._schedulable_buffers | {"rl_coeff"}
    clipped_apart = "learner"

    def __init__(
        self,
        guider_network: Actor,
        critic_network: Critic,
        learner_network: Actor,
        *,
        learner_kl: LearnerKL = "forward",
        rl_coeff: float = 0.0,
        learner_gain: Gain = clip_gain,
        guider_first: bool = False,
        shuffle_agents: bool = False,
        **options: Unpack[ClipOptions],
    ) -> None:
        check_choice("learner_kl", learner_kl, get_args(LearnerKL))
        if not rl_coeff >= 0:
            raise ValueError(f"rl_coeff must be at least 0, got {rl_coeff}.")
        super().__init__(guider_network, critic_network, **options)
        self._hold("learner_network", learner_network)
        self._register(rl_coeff=float(rl_coeff))
        self.learner_kl, self.learner_gain = learner_kl, learner_gain
        self.trains_in_parts, self.shuffle_agents = guider_first, shuffle_agents
        self._trained = GUIDER_LOSSES + LEARNER_LOSSES

    def phases(self, batch: TensorDictBase, *, chunk_length: int | None = None) -> Iterator[Phase]:
        """Yield one phase for guider and learner; with ``guider_first``, a guider phase and then a learner phase."""
        phase = self._phase(batch, chunk_length)
        if self.shuffle_agents:
            phase = replace(phase, before_epoch=partial(self._shuffle, phase.rows))
        try:
            for trained in (GUIDER_LOSSES, LEARNER_LOSSES) if self.trains_in_parts else (self._trained,):
                self._trained = trained
                yield phase
        finally:
            self._trained = GUIDER_LOSSES + LEARNER_LOSSES

    def _shuffle(self, rows: TensorDictBase) -> None:
        stored = rows.get(self.tensor_keys.sample_log_prob)
        order = torch.randperm(stored.shape[-1], device=stored.device)
        rows.set(sibling(self.tensor_keys.action, "order"), order.expand(stored.shape))

    @property
    def learns_sequences(self) -> bool:
        """Always true: guider and learner train on sequences."""
        return True

    def _output(self, entries: dict[str, Tensor]) -> TensorDict:
        constant = set(GUIDER_LOSSES + LEARNER_LOSSES) - set(self._trained)
        return super()._output({key: value.detach() if key in constant else value for key, value in entries.items()})

    def _computed_keys(self) -> list[str]:
        return [*OUT_KEYS, *LEARNER_LOSSES, "learner_min_ratio", "learner_max_ratio"]

    def _own_keys(self) -> list[NestedKey]:
        return list(self.learner_network.in_keys)

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective``, the learner's losses, method-specific guider losses and diagnostics."""
        with self._parameters_of("learner_network"):
            learner = self.learner_network.get_dist(batch.data.copy())
        if self.learner_kl == "forward":
            imitation = divergence(batch.policy, learner, constant="first")
        else:
            imitation = divergence(learner, batch.policy, constant="second")
        log_ratio = self._learner_log_ratio(learner, batch)
        loss_objective, others = self.guide(batch, learner, log_ratio.detach(), imitation.detach())
        smallest, largest = extremes(log_ratio.detach().exp(), batch.mask)
        gain = self.learner_gain(log_ratio, batch.advantage, low=self.ratio_low, high=self.ratio_high)
        return loss_objective, {
            **others,
            "loss_learner_kl": self._reduce(imitation, batch.mask),
            "loss_learner_objective": -self.rl_coeff * self._reduce(gain, batch.mask),
            "learner_min_ratio": smallest,
            "learner_max_ratio": largest,
        }

    def guide(
        self, batch: ScoredBatch, learner: Distribution, log_ratio: Tensor, imitation: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the guider's ``loss_objective`` and its other losses, which treat the learner as a constant.

        Subclasses override this hook.

        Args:
            batch: as for :meth:`objective`.
            learner: the learner's policy.
            log_ratio: log-ratio of the learner to the guider that collected the data, ``[B, N]``, without gradient.
            imitation: divergence that the learner minimises, ``[B, N]``, without gradient.
        """
        return super().objective(batch)

    def _learner_log_ratio(self, learner: Distribution, batch: ScoredBatch) -> Tensor:
        """Log-ratio of the learner to the guider that collected the data, zero for dead agents."""
        stored = batch.data.get(self.tensor_keys.sample_log_prob)
        log_prob = learner.log_prob(batch.data.get(self.tensor_keys.action))
        if log_prob.shape != stored.shape:
            raise ValueError(
                f"The learner's log-probabilities have shape {tuple(log_prob.shape)}, but the guider's have shape "
                f"{tuple(stored.shape)}: both networks must act for the same agents."
            )
        return where_live(log_prob - stored, batch.mask)
