"""The papers' ideas together: trust region, reflection, reuse and the order of updates, each chosen by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.minibatches import Phase
from torchrl_marl.objectives.ratio import Bounds, ScoredBatch, clip_fraction, require
from torchrl_marl.objectives.reflection import ReflectiveLoss, ReflectiveOptions, under_next
from torchrl_marl.objectives.reuse import ReuseMappingSampler, ReuseOptions
from torchrl_marl.objectives.sequential import Learner, SequentialLoss, Turn, take_each
from torchrl_marl.objectives.surrogates import kl_interval_unchecked
from torchrl_marl.signatures import check_choice, take_options

__all__ = ["ComposedLoss"]

Interval = Literal["fixed", "kl"]
Order = Literal["turns", "together"]
_EXTREMES = {"min_ratio": torch.amin, "max_ratio": torch.amax}


class ComposedOptions(ReflectiveOptions, ReuseOptions, total=False):
    """Options of :class:`ComposedLoss`; defaults are those of their owners."""


class ComposedLoss(SequentialLoss, ReflectiveLoss):
    """Any trust region, with or without reflection, on own or others' experience, in turns or together.

        loss_objective of agent i = -sum_j M[i, j] (mean(F_j gain(log r_j, A_j))
                                                    + reflection_coeff mean(F_j F'_j reflective gain(r_j, r'_j, A'_j)))

    ``r_j`` is the ratio of agent i's network on agent j's experience. Primes mark the same agent one step later; the
    second mean runs over rows that have a next step. In turns, F is the compound ratio of the other agents' updates so
    far. Together, F is 1, and the objective is the mean over agents, weighted by their live rows.

    The composition is ours; none of the papers has it. It reduces to theirs: in turns without reflection to OAPPO, and
    with ``own_weight=1`` to HAPPO; together with ``own_weight=1`` to MARPO on rows, with the layout ``"rpo"`` for a
    fixed interval and ``"paper"`` for one that follows the divergence, and without reflection to MAPPO, MASPO or MARS,
    by the gain. In turns all agents share the KL target; each learner's minibatch moves it by the divergence on the
    learner's own experience.

    The loop, keys, shapes and errors: :class:`~torchrl_marl.objectives.sequential.SequentialLoss`. Together, there is
    one phase, and ``forward`` outside of turns returns the losses of all agents; :meth:`phases` measures the weights of
    sources. The reflective term, too, weighs agents by their live rows, where MARPO's weighs them by their pairs.

    Args:
        actor_network: decentralised policy with a network for each agent, which has no memory.
        critic_network: sees the joint observations or the state.
        interval: ``"fixed"``, ``clip_epsilon`` and ``next_clip_epsilon``; or ``"kl"``, the interval of MARPO's KL
            target for both ratios.
        order: ``"turns"`` or ``"together"``.
        **options: :class:`~torchrl_marl.objectives.reflection.ReflectiveOptions` and
            :class:`~torchrl_marl.objectives.reuse.ReuseOptions`; all sources are weighted, none is drawn.

    Raises:
        ValueError: if agents share parameters, the policy has a memory, or an option is out of its range.
    """

    @dataclass
    class _AcceptedKeys(SequentialLoss._AcceptedKeys, ReflectiveLoss._AcceptedKeys):
        pass

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        interval: Interval = "fixed",
        order: Order = "turns",
        **options: Unpack[ComposedOptions],
    ) -> None:
        reuse_options = take_options(options, ReuseOptions)
        super().__init__(actor_network, critic_network, **options)
        if self._state_keys:
            raise ValueError("ComposedLoss trains on rows: its policies must not be recurrent.")
        check_choice("interval", interval, ("fixed", "kl"))
        check_choice("order", order, ("turns", "together"))
        self.interval, self.order = interval, order
        self.reuse: ReuseMappingSampler = ReuseMappingSampler(self.num_agents, **reuse_options).to(self._device)
        self._mixes = order == "together" and not (self.reuse.fixed and self.reuse.matrix.trace() == self.num_agents)
        if order == "together":
            self.trains_in_parts, self.clipped_apart = False, None
        if self._mixes:
            if self.reduction != "mean":
                raise ValueError(f"reduction must be mean for agents that share experience; got {self.reduction!r}.")
            self._set_sources()

    @property
    def uses_kl(self) -> bool:
        """Whether the interval follows the divergence."""
        return self.interval == "kl"

    def _computed_keys(self) -> list[str]:
        computed = SequentialLoss._computed_keys(self)
        if self.turn == "critic":
            return computed
        kl = ["kl", "kl_target", "kl_interval_low", "kl_interval_high"] if self.uses_kl else []
        return [*computed, *kl, *self._reflective_keys()]

    def _own_keys(self) -> list[NestedKey]:
        update = self.tensor_keys.update_log_ratio
        later = [under_next(update)] if self.reflection_coeff else []
        return [*SequentialLoss._own_keys(self), *ReflectiveLoss._own_keys(self), *later]

    def turns(self, tensordict: TensorDictBase, *, order: Sequence[int] | None = None) -> Iterator[Turn]:
        """Yield a turn for every agent, then one for the critic; also write the next step's ``update_log_ratio``."""
        keys = self.tensor_keys
        following = tensordict.get("next") if self.reflection_coeff else None
        if following is not None:
            following.set(keys.update_log_ratio, torch.zeros_like(following.get(keys.sample_log_prob)))
        for turn in super().turns(tensordict, order=order):
            yield turn
            if following is not None and self._learner is not None:
                log_ratio = following.get(keys.update_log_ratio).clone()
                paired = following.get(keys.reflection_mask)
                log_ratio[..., turn] = self._update_log_ratio(following, self._learner, paired)
                following.set(keys.update_log_ratio, log_ratio)

    def phases(self, batch: TensorDictBase, *, chunk_length: int | None = None) -> Iterator[Phase]:
        """Yield a phase for every agent and one for the critic, or, together, one for all."""
        if self.order == "turns":
            yield from super().phases(batch, chunk_length=chunk_length)
            return
        phase = self._phase(batch, chunk_length)
        if self._mixes:
            stored = require(phase.rows, self.tensor_keys.sample_log_prob)
            self._measure_reuse(phase.rows, self._mask(phase.rows, stored.shape))
            self._set_sources()
        yield phase

    def _set_sources(self) -> None:
        """Let every agent learn from all, some with a weight of 0: numbers of sources would trigger recompilation."""
        for agent, learner in enumerate(self._learners):
            sources = self.reuse.sources(agent) if self.reuse.fixed else range(self.num_agents)
            learner.index, learner.sources = (self.reuse.matrix.new_tensor([*x]).long() for x in ((agent,), sources))

    def _rounding(self, batch: TensorDictBase) -> Tensor:
        in_one_pass = self.order == "together" and not self._mixes
        return ReflectiveLoss._rounding(self, batch) if in_one_pass else super()._rounding(batch)

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of the turn, or of all agents, and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``, not modified.

        Returns:
            As :meth:`SequentialLoss.forward`, with MARPO's diagnostics.
        """
        if self.turn is not None or not self._mixes:
            return super().forward(tensordict)
        tensordict = self._with_advantage(tensordict)
        kl = self._follow_joint(tensordict) if self.uses_kl else {}
        each = []
        for learner in self._learners:
            self._learning = [learner]
            experience, own = self._experience(tensordict, learner)
            each.append(self._actor_losses(experience, learner.policy, own)[0])
        self._learning = []
        mask = self._mask(tensordict, require(tensordict, self.tensor_keys.sample_log_prob).shape)
        rows = torch.ones(self.num_agents) if mask is None else mask.flatten(0, -2).sum(0)
        share = rows.to(each[0]["entropy"]) / rows.sum().clamp(min=1)
        found = {key: torch.stack([losses[key] for losses in each]) for key in each[0]}
        found = {key: _EXTREMES.get(key, partial(torch.dot, share))(values) for key, values in found.items()}
        return self._output({**found, **kl, **self._critic_losses(tensordict)})

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective``, of the learner over its sources ``[B, S]`` or of all agents, and diagnostics."""
        bounds, next_bounds, diagnostics = self._intervals(batch)
        gain = self.gain(batch.log_ratio, batch.advantage, low=bounds[0], high=bounds[1])
        diagnostics["clip_fraction"] = clip_fraction(batch.log_ratio, batch.mask, *bounds)
        compound = next_compound = 1.0
        if self.turn is not None:
            compound, more = self._compound_ratio(batch)
            diagnostics |= more
        loss_objective = self._sum(-compound * gain, batch.mask, batch.data)
        if self.reflection_coeff:
            following = self._next_step(batch, self._learner and self._learner.policy)
            gain, more = self._reflective_gain(batch, following, bounds, next_bounds)
            if self.turn is not None:
                next_compound = batch.data.get(under_next(self.tensor_keys.update_log_ratio)).exp()
            reflective = self._sum(-compound * next_compound * gain, following.has_next, batch.data)
            loss_objective, diagnostics = loss_objective + self.reflection_coeff * reflective, diagnostics | more
        return loss_objective, diagnostics

    def _sum(self, values: Tensor, mask: Tensor | None, data: TensorDictBase) -> Tensor:
        return self._reduce(values, mask) if self._learner is None else self._over_sources(values, mask, data)

    def _intervals(self, batch: ScoredBatch) -> tuple[Bounds, Bounds, dict[str, Tensor]]:
        """Bounds of both ratios, and the divergence's diagnostics."""
        if not self.uses_kl:
            return (self.ratio_low, self.ratio_high), self._next_bounds, {}
        learner = self._learner
        if learner is None:
            bounds, diagnostics = self.follow_kl(batch)
        elif self.turn is None:  # the divergence of all agents has moved the target
            bounds, diagnostics = kl_interval_unchecked(self.kl_target), {}
        else:
            bounds, diagnostics = self.follow_kl(batch._replace(mask=batch.data.get("own")))
        return bounds, bounds, diagnostics

    @torch.no_grad()
    def _follow_joint(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Move the KL target by the divergence of all agents' policies; return diagnostics."""
        policy, log_ratio = self._log_ratio(tensordict)
        batch = ScoredBatch(tensordict, policy, log_ratio, log_ratio, self._mask(tensordict, log_ratio.shape))
        return self.follow_kl(batch)[1]

    def _experience(self, tensordict: TensorDictBase, learner: Learner) -> tuple[TensorDict, Tensor | None]:
        """Also what the divergence and the reflective term read; sources of weight 0 count as dead."""
        experience, own = super()._experience(tensordict, learner)
        keys, shape = self.tensor_keys, experience.get(self.tensor_keys.sample_log_prob).shape
        take, mask = take_each(learner.sources, dim=len(shape) - 1), self._mask(experience, shape)
        if self.uses_kl:
            live = (learner.sources == learner.index).expand(shape)
            experience.set("own", live if mask is None else live & mask)
            for key in self.actor_network[-1].in_keys:
                experience.set(key, take(require(tensordict, key)))
        if len(learner.sources) > 1:
            weights = self.reuse.matrix.index_select(0, learner.index).index_select(1, learner.sources)
            used = weights.gt(0).expand(shape)
            experience.set(keys.mask, used if mask is None else used & mask)
        if self.reflection_coeff:
            following = cast("TensorDictBase", require(tensordict, "next"))
            paired = self._observed(following, take)
            for key in (keys.action, keys.sample_log_prob, self._next_advantage, keys.reflection_mask):
                paired.set(key, take(require(following, key)))
            paired.set(keys.update_log_ratio, take(self._updates_of_others(following)))
            experience.set("next", paired)
        return experience, own
