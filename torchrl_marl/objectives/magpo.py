"""MAGPO and CTDS: a centralised guider collects the data and learns; decentralised learners imitate it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol, cast, get_args

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import Unpack

from torchrl_marl.distributed import average
from torchrl_marl.keys import sibling
from torchrl_marl.objectives.divergences import divergence
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.phases import Phase
from torchrl_marl.objectives.ratio import OUT_KEYS, RatioLoss, RatioOptions, clip_bounds
from torchrl_marl.objectives.surrogates import Gain, clip_gain, double_clip_gain

__all__ = [
    "GUIDER_LOSSES",
    "LEARNER_LOSSES",
    "CTDSLoss",
    "LearnerKL",
    "MAGPOLoss",
    "RatioRule",
    "follow_imitation_gap",
]

LearnerKL = Literal["forward", "reverse"]
GUIDER_LOSSES = ("loss_objective", "loss_entropy", "loss_critic", "loss_guider_kl")
LEARNER_LOSSES = ("loss_learner_kl", "loss_learner_objective")


class RatioRule(Protocol):
    """How far the guider may be from the learner, given how far it was allowed to and how far it is."""

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
    """Narrow the guider's bound while the learner is further away than it should be; widen it while it is closer.

        ln delta <- clip(ln delta (target / gap)^rate, ln low, ln high)

    The bound confines ``ln(mu / pi)`` to ``[-ln delta, ln delta]``, and a divergence grows with the square of that
    width. A gap that is not finite changes nothing.

    MAGPO's authors tune delta for each task, name small values as the remedy for wide imitation gaps, and adapting it
    to the observed gap as an open direction (section 6); the rule is ours.

    Args:
        guider_learner_ratio: delta so far, 0-dim.
        imitation_gap: mean divergence of learner and guider, 0-dim, in nats.
        target: the gap to aim at.
        rate: how fast; the width changes by this power of the relative error.
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


class CTDSLoss(RatioLoss):
    """Centralised teacher with decentralised students: the guider never sees the learner, which only imitates it.

        loss_learner_kl = mean(KL(mu || pi)),   or KL(pi || mu)

    and ``loss_objective``, ``loss_entropy`` and ``loss_critic`` of the guider ``mu`` as for every ratio loss: with the
    clip, PPO. It is :class:`MAGPOLoss` without the double clip, the guider's divergence and the learner's objective.

    Reference: on-policy CTDS as MAGPO's paper has it, https://arxiv.org/abs/2507.18059, section 5, after Zhao et al.,
    CTDS: Centralized Teacher with Decentralized Student for Multi-Agent Reinforcement Learning, 2022,
    https://arxiv.org/abs/2203.08412.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`, whose actor is the guider.

    Args:
        guider_network: centralised policy, which collects the data.
        critic_network: the guider's critic.
        learner_network: decentralised policy.
        learner_kl: which divergence the learner minimises, ``"forward"``, ``KL(mu || pi)``, or ``"reverse"``.
        clip_epsilon: half-width of the guider's clip, or a pair ``(low, high)``.
        gain: another trust region of the guider, with the same bounds.
        guider_first: let learners follow the guider of after its update, in a phase of their own, as the paper writes,
            at twice the cost.
        shuffle_agents: let the guider decode agents in another order in each epoch, as the authors do.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.

    Raises:
        ValueError: if an option is out of its range.
    """

    learner_network: ProbabilisticTensorDictSequential
    learner_network_params: TensorDictParams | None
    target_learner_network_params: TensorDictParams | None

    def __init__(
        self,
        guider_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        learner_network: ProbabilisticTensorDictSequential,
        *,
        learner_kl: LearnerKL = "forward",
        clip_epsilon: float | Sequence[float] = 0.2,
        gain: Gain = clip_gain,
        guider_first: bool = False,
        shuffle_agents: bool = False,
        **options: Unpack[RatioOptions],
    ) -> None:
        low, high = clip_bounds(clip_epsilon)
        super().__init__(
            guider_network,
            critic_network,
            gain=gain,
            low=low,
            high=high,
            **options,
        )
        self._hold("learner_network", learner_network)
        self.learner_kl: LearnerKL = _checked(learner_kl)
        self.guider_first, self.shuffle_agents = guider_first, shuffle_agents
        self._trained = GUIDER_LOSSES + LEARNER_LOSSES

    def phases(self, batch: TensorDictBase, *, chunk_length: int | None = None) -> Iterator[Phase]:
        """Yield one phase for guider and learner, or the guider's and then the learner's."""
        phase = self._phase(batch, chunk_length)
        if self.shuffle_agents:
            phase = replace(phase, before_epoch=partial(self._shuffle, phase.rows))
        try:
            for trained in (GUIDER_LOSSES, LEARNER_LOSSES) if self.guider_first else (self._trained,):
                self._trained = trained
                yield phase
        finally:
            self._trained = GUIDER_LOSSES + LEARNER_LOSSES

    @property
    def trains_in_parts(self) -> bool:
        """Whether guider and learner have a phase each."""
        return self.guider_first

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are scaled down to one norm together: the guider's, and the learner's."""
        learner = set(self.learner_network.parameters())
        return {
            "grad_norm": [parameter for parameter in self.parameters() if parameter not in learner],
            "learner_grad_norm": [parameter for parameter in self.parameters() if parameter in learner],
        }

    def _shuffle(self, rows: TensorDictBase) -> None:
        stored = rows.get(self.tensor_keys.sample_log_prob)
        order = torch.randperm(stored.shape[-1], device=stored.device)
        rows.set(sibling(self.tensor_keys.action, "order"), order.expand(stored.shape))

    @property
    def learns_sequences(self) -> bool:
        """Always, for guider and learner."""
        return True

    def _output(self, entries: dict[str, Tensor]) -> TensorDict:
        constant = set(GUIDER_LOSSES + LEARNER_LOSSES) - set(self._trained)
        return super()._output({key: value.detach() if key in constant else value for key, value in entries.items()})

    def _computed_keys(self) -> list[str]:
        return [*OUT_KEYS, "loss_learner_kl"]

    def _own_keys(self) -> list[NestedKey]:
        return list(self.learner_network.in_keys)

    def objective(
        self,
        tensordict: TensorDictBase,
        distribution: Distribution,
        log_ratio: Tensor,
        advantage: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective`` and the learner's loss."""
        _, imitation = self._follow(distribution, tensordict)
        gain = self.gain(log_ratio, advantage, low=self.ratio_low, high=self.ratio_high)
        return self._reduce(-gain, mask), {"loss_learner_kl": self._reduce(imitation, mask)}

    def _follow(self, guider: Distribution, tensordict: TensorDictBase) -> tuple[Distribution, Tensor]:
        """The learner's policy and what it minimises, its divergence from the guider, a constant, ``[B, N]``."""
        with self._parameters_of("learner_network"):
            learner = self.learner_network.get_dist(tensordict.copy())
        if self.learner_kl == "forward":
            return learner, divergence(guider, learner, constant="first")
        return learner, divergence(learner, guider, constant="second")


class MAGPOLoss(CTDSLoss):
    """Multi-agent guided policy optimisation: PPO of a centralised guider that stays where learners can follow.

        loss_objective         = -mean(min(r A, clip(clip(mu / pi, 1 / delta, delta) pi / mu_old, 1 - e, 1 + e) A))
        loss_guider_kl         =  mean(m KL(mu || pi)),   m = 1 where mu / pi of the action leaves [1 / delta, delta]
        loss_learner_kl        =  mean(KL(mu || pi)),   or KL(pi || mu)
        loss_learner_objective = -rl_coeff mean(gain(log pi - log mu_old, A))

    and ``loss_entropy`` and ``loss_critic`` as for every ratio loss, those of the guider. ``mu`` is the guider, which
    has collected the data; ``pi`` is the learner, whose actions depend on its agents' own observations and which alone
    is executed in the end. In the first two losses ``pi`` is a constant, in the last two ``mu`` is. Divergences are
    exact and those of each agent's action given, for the guider, the actions before it. All losses are meant to be
    summed and back-propagated at once: guider and learner move together, each from the other's old parameters, as in
    the authors' code. In the paper the learner follows the guider that has been updated: ``guider_first=True``.

    The guider may be any actor; those of :func:`~torchrl_marl.modules.make_mat` and
    :func:`~torchrl_marl.modules.make_sable` are autoregressive. The learner may be any actor of the same group and the
    same action space, with or without memory: the loss only asks both for their distributions on the same data.

    Where this follows the authors' code and not the paper: the learner's divergence is ``KL(mu || pi)`` (Eq. 10 has the
    other one), both are updated at once, and the guider is not set back to the learner. With
    ``guider_learner_ratio=inf`` and ``rl_coeff=0`` this is :class:`CTDSLoss`.

    Beyond the paper, ``adapt_ratio`` moves ``delta`` with the measured imitation gap ``KL(mu || pi)`` (or the other
    one, as the learner has it), once by every ``forward`` in training mode, with or without gradients. The buffer
    ``guider_learner_ratio`` is its state, which a checkpoint saves and restores; ``forward`` returns it, too.

    Reference: Li et al., Multi-Agent Guided Policy Optimization, 2025, https://arxiv.org/abs/2507.18059, Eqs. (8) to
    (11); code at https://github.com/liyheng/MAGPO.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`, whose actor is the guider.
    ``forward`` returns these scalars, too: ``double_clip_fraction`` (mean of ``m``), ``learner_min_ratio`` and
    ``learner_max_ratio`` (of ``pi / mu_old``).

    Args:
        guider_network: centralised policy, which collects the data.
        critic_network: the guider's critic.
        learner_network: decentralised policy.
        guider_learner_ratio: delta, how many times likelier than the learner the guider may make an action, or less
            likely; above 1. The paper searches 1.1 to 3 for each task. A buffer: assign to it to schedule it.
        rl_coeff: lambda, weight of the learner's own objective; the paper searches 0 to 8. A buffer.
        learner_kl: which divergence the learner minimises, ``"forward"``, ``KL(mu || pi)``, or ``"reverse"``.
        clip_epsilon: half-width of the clip, or a pair ``(low, high)``, for guider and learner.
        gain: another trust region of the guider, with the same bounds, see
            :func:`~torchrl_marl.objectives.surrogates.double_clip_gain`.
        learner_gain: another trust region of the learner's own objective, with the same bounds.
        guider_first, shuffle_agents: see :class:`CTDSLoss`.
        adapt_ratio: how delta follows the imitation gap, such as :func:`follow_imitation_gap`; ``None``: it stays.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`. The authors' critic has
            ``clip_value=clip_epsilon``, ``loss_critic_type="l2"`` and, with a coefficient of a half before half the
            square, ``critic_coeff=0.25``.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> from torchrl_marl.modules import GroupSpec, make_actor, make_mat
        >>> shape = GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5)
        >>> guider, critic = make_mat(shape)
        >>> loss = MAGPOLoss(guider, critic, make_actor(shape), guider_learner_ratio=1.3, rl_coeff=2.0)
        >>> sum(value for key, value in loss(data).items() if key.startswith("loss_")).backward()  # doctest: +SKIP
    """

    _schedulable_buffers = RatioLoss._schedulable_buffers | {"guider_learner_ratio", "rl_coeff"}

    guider_learner_ratio: Tensor
    rl_coeff: Tensor

    def __init__(
        self,
        guider_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        learner_network: ProbabilisticTensorDictSequential,
        *,
        guider_learner_ratio: float = 1.5,
        rl_coeff: float = 1.0,
        learner_kl: LearnerKL = "forward",
        clip_epsilon: float | Sequence[float] = 0.2,
        gain: Gain = clip_gain,
        learner_gain: Gain = clip_gain,
        adapt_ratio: RatioRule | None = None,
        guider_first: bool = False,
        shuffle_agents: bool = False,
        **options: Unpack[RatioOptions],
    ) -> None:
        super().__init__(
            guider_network,
            critic_network,
            learner_network,
            learner_kl=learner_kl,
            clip_epsilon=clip_epsilon,
            gain=gain,
            guider_first=guider_first,
            shuffle_agents=shuffle_agents,
            **options,
        )
        if not guider_learner_ratio > 1:
            raise ValueError(f"guider_learner_ratio must be above 1, got {guider_learner_ratio}.")
        if not rl_coeff >= 0:
            raise ValueError(f"rl_coeff must be at least 0, got {rl_coeff}.")
        self.learner_gain = learner_gain
        self.adapt_ratio = adapt_ratio
        self.moves_buffers = adapt_ratio is not None
        device = self.ratio_low.device
        self.register_coeff_buffer("guider_learner_ratio", float(guider_learner_ratio), device=device)
        self.register_coeff_buffer("rl_coeff", float(rl_coeff), device=device)
        if adapt_ratio is not None:
            adapt_ratio(self.guider_learner_ratio, self.guider_learner_ratio.log())  # which refuses its own options

    def _computed_keys(self) -> list[str]:
        losses = ["loss_guider_kl", "loss_learner_kl", "loss_learner_objective"]
        diagnostics = ["double_clip_fraction", "learner_min_ratio", "learner_max_ratio"]
        return [*OUT_KEYS, *losses, *diagnostics, *([] if self.adapt_ratio is None else ["guider_learner_ratio"])]

    def objective(
        self,
        tensordict: TensorDictBase,
        distribution: Distribution,
        log_ratio: Tensor,
        advantage: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective``, the other losses of guider and learner, and diagnostics."""
        (learner, imitation), adapted = self._follow(distribution, tensordict), {}
        if self.adapt_ratio is not None:
            self._move_ratio(average(masked_mean(imitation.detach(), mask)))
            adapted = {"guider_learner_ratio": self.guider_learner_ratio.clone()}
        learner_log_ratio = self._learner_log_ratio(learner, tensordict, mask)
        gap = log_ratio - learner_log_ratio.detach()  # log mu - log pi: the old guider cancels
        bounds = {"low": self.ratio_low, "high": self.ratio_high}
        gain = double_clip_gain(
            log_ratio, gap, advantage, guider_learner_ratio=self.guider_learner_ratio, gain=self.gain, **bounds
        )
        outside = (gap.detach().abs() > self.guider_learner_ratio.log()).to(gap.dtype)
        learner_gain = self.learner_gain(learner_log_ratio, advantage, **bounds)
        ratio = learner_log_ratio.detach().exp()
        return self._reduce(-gain, mask), {
            "loss_guider_kl": self._reduce(outside * divergence(distribution, learner, constant="second"), mask),
            "loss_learner_kl": self._reduce(imitation, mask),
            "loss_learner_objective": -self.rl_coeff * self._reduce(learner_gain, mask),
            "double_clip_fraction": masked_mean(outside, mask),
            "learner_min_ratio": (ratio if mask is None else ratio.where(mask, torch.inf)).min(),
            "learner_max_ratio": (ratio if mask is None else ratio.where(mask, 0.0)).max(),
            **adapted,
        }

    @torch.no_grad()
    def _move_ratio(self, imitation_gap: Tensor) -> None:
        if self.training and self.adapt_ratio is not None:
            self.guider_learner_ratio.copy_(self.adapt_ratio(self.guider_learner_ratio, imitation_gap))

    def _learner_log_ratio(self, learner: Distribution, tensordict: TensorDictBase, mask: Tensor | None) -> Tensor:
        """Log-ratio of the learner to the guider that collected the data, zero for dead agents."""
        stored = tensordict.get(self.tensor_keys.sample_log_prob)
        log_prob = learner.log_prob(tensordict.get(self.tensor_keys.action))
        if log_prob.shape != stored.shape:
            raise ValueError(
                f"The learner gives log-probabilities of shape {tuple(log_prob.shape)}, but the guider's have shape "
                f"{tuple(stored.shape)}: both must be of the same agents."
            )
        log_ratio = log_prob - stored
        return log_ratio if mask is None else torch.where(mask, log_ratio, 0.0)


def _checked(learner_kl: str) -> LearnerKL:
    if learner_kl not in get_args(LearnerKL):
        raise ValueError(f"learner_kl must be one of {', '.join(get_args(LearnerKL))}; got {learner_kl!r}.")
    return cast("LearnerKL", learner_kl)
