"""Reflection: each agent's entries one step later, stored with the current step, and the term that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.keys import sibling
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.adaptive_clip import AdaptiveClipLoss, AdaptiveClipOptions
from torchrl_marl.objectives.masking import expand_mask, masked_mean, per_agent, where_live
from torchrl_marl.objectives.ratio import Bounds, ScoredBatch, clip_bounds, clip_fraction
from torchrl_marl.objectives.surrogates import clip_gain, reflective_clip_gain
from torchrl_marl.signatures import check_at_least_0

__all__ = ["NextStep", "NextStepKeys", "ReflectiveLoss", "ReflectiveOptions", "next_step", "under_next"]


class NextStepKeys(TensorDictModuleBase):
    """Write each agent's next action, log-probability, advantage and action mask under ``"next"`` of the current step.

    Rows are then self-contained and may be shuffled. A row's pair is the same environment and agent one step later. A
    row has no pair at the end of an episode (terminated or truncated), at the end of a trajectory or of the batch, or
    if the agent is dead or the step is padding in either row. ``("next", "reflection_mask")`` marks rows with a pair.
    Rows without a pair get an advantage of zero and otherwise their own values, which are finite and legal.

    Apply it to a batch with advantages (standardised, if the loop standardises them), or give it to a collector as part
    of ``postproc``, after a value estimator.

    =========================================  =============  ======================================================
    key                                        shape          read or written
    =========================================  =============  ======================================================
    ``(group, "action")``                      ``[B, N, A]``  read (``[B, N]`` for a categorical)
    ``(group, "action_log_prob")``             ``[B, N]``     read
    ``(group, "action_mask")``, ``"mask"``     ``[B, N, ]``   read if present
    ``"advantage"``                            ``[B, N, 1]``  read if present; ``[B, 1]`` for a team
    ``("next", "done")``                       ``[B, 1]``     read; ``[B, N, 1]`` if agents end individually
    ``("collector", "traj_ids" | "mask")``     ``[B]``        read if a collector wrote them
    ``("next", group, "action")``              as above       written, as are log-probability, action mask and
                                                              ``("next", group, "advantage")``, ``[B, N, 1]``
    ``("next", "reflection_mask")``            ``[B, N]``     written: whether the agent's row has a pair
    =========================================  =============  ======================================================

    Args:
        action: key of the action; the other entries are read and written in its group.
        log_prob: key of the action's log-probability.
        advantage: key of the advantage.
        mask: key of the mask of live agents; by default ``"mask"`` in the action's group.
        done: key of the end of episodes, under ``"next"``.
        reflection_mask: key to write under ``"next"``; each group needs its own.
        time_dim: batch dimension of time; by default the dimension named ``"time"``, as in batches of collectors.

    Raises:
        ValueError: if the time dimension is unknown (shuffled rows have none) or a shape does not fit.
        KeyError: if an entry is missing.

    Example:
        >>> from tensordict import TensorDict
        >>> advantage = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
        >>> batch = TensorDict({"advantage": advantage}, batch_size=[1, 3], names=[None, "time"])
        >>> batch["agents"] = {"action": torch.tensor([[[4], [5], [6]]]), "action_log_prob": torch.zeros(1, 3, 1)}
        >>> batch["next"] = {"agents": {}, "done": torch.tensor([[[False], [True], [False]]])}
        >>> batch = NextStepKeys()(batch)
        >>> batch["next", "reflection_mask"].flatten(), batch["next", "agents", "advantage"].flatten()
        (tensor([ True, False, False]), tensor([2., 0., 0.]))

        >>> from tensordict.nn import TensorDictSequential
        >>> postproc = TensorDictSequential(loss.value_estimator, NextStepKeys())  # doctest: +SKIP
        >>> collector = Collector(env, actor, postproc=postproc, frames_per_batch=6000)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        action: NestedKey = ("agents", "action"),
        log_prob: NestedKey = ("agents", "action_log_prob"),
        advantage: NestedKey = "advantage",
        mask: NestedKey | None = None,
        done: NestedKey = "done",
        reflection_mask: NestedKey = "reflection_mask",
        time_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.action, self.log_prob, self.advantage, self.done = action, log_prob, advantage, done
        self.action_mask = sibling(action, "action_mask")
        self.mask = sibling(action, "mask") if mask is None else mask
        self.reflection_mask = reflection_mask
        self.time_dim = time_dim
        self.in_keys = [action, log_prob, advantage, ("next", done)]
        self.out_keys = [
            ("next", action),
            ("next", log_prob),
            ("next", sibling(action, "advantage")),
            ("next", reflection_mask),
        ]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the keys onto ``tensordict``, a batch with a time dimension, and return it."""
        time = self._time(tensordict)
        log_prob = tensordict[self.log_prob]
        shape, batch = log_prob.shape, tensordict.batch_size
        live = torch.ones_like(log_prob, dtype=torch.bool)
        for key in (self.mask, ("collector", "mask")):
            mask = tensordict.get(key, None)
            live = live if mask is None else live & expand_mask(mask, shape, batch, key)
        done = expand_mask(tensordict["next", self.done], shape, batch, self.done)
        has_pair = live & live.roll(-1, time) & ~done
        trajectory = tensordict.get(("collector", "traj_ids"), None)
        if trajectory is not None:
            has_pair &= expand_mask(trajectory == trajectory.roll(-1, time), shape, batch, ("collector", "traj_ids"))
        has_pair.select(time, -1).fill_(False)

        following = tensordict.get("next")
        for key in (self.action, self.log_prob, self.action_mask):
            own = tensordict.get(key, None)
            if own is not None:
                following.set(key, torch.where(_like(has_pair, own), own.roll(-1, time), own))
        advantage = tensordict.get(self.advantage, None)
        if advantage is not None:
            advantage = per_agent(advantage, shape, self.advantage).roll(-1, time)
            following.set(sibling(self.action, "advantage"), torch.where(has_pair, advantage, 0.0).unsqueeze(-1))
        following.set(self.reflection_mask, has_pair)
        return tensordict

    def _time(self, tensordict: TensorDictBase) -> int:
        if self.time_dim is not None:
            if not -tensordict.ndim <= self.time_dim < tensordict.ndim:
                raise ValueError(f"The batch {tuple(tensordict.batch_size)} has no dimension time_dim={self.time_dim}.")
            return self.time_dim % tensordict.ndim
        if "time" not in tensordict.names:
            raise ValueError(
                f"No dimension of the batch {tuple(tensordict.batch_size)} is named 'time' (its names: "
                f"{tensordict.names}): call NextStepKeys before rows are shuffled, or pass time_dim=."
            )
        return tensordict.names.index("time")


def next_step(
    tensordict: TensorDictBase,
    *,
    read: Sequence[NestedKey],
    advantage: NestedKey,
    reflection_mask: NestedKey,
    shape: torch.Size,
) -> TensorDictBase:
    """Return the next-step entries written by :class:`NextStepKeys`, after checking presence, shapes and types.

    Args:
        tensordict: the batch.
        read: required entries besides advantage and mask.
        advantage: key of the advantage, in the action's group.
        reflection_mask: key of the reflection mask.
        shape: shape of log-probabilities, ``[B, N]``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if a shape or type does not fit.
    """
    keys = [*read, advantage, reflection_mask]
    missing = [key for key in map(under_next, keys) if tensordict.get(key, None) is None]
    if missing:
        raise KeyError(
            f"The data has no {', '.join(map(repr, missing))}: apply torchrl_marl.collectors.NextStepKeys to the batch "
            "after computing advantages."
        )
    following: TensorDictBase = tensordict.get("next")
    for key, expected in ((reflection_mask, tuple(shape)), (advantage, (*shape, 1))):
        if following[key].shape != expected:
            raise ValueError(f"{under_next(key)!r} has shape {tuple(following[key].shape)}, expected {expected}.")
    if following[reflection_mask].dtype != torch.bool:
        raise ValueError(f"{under_next(reflection_mask)!r} must be boolean, got {following[reflection_mask].dtype}.")
    return following


def under_next(key: NestedKey) -> NestedKey:
    """Return the key of the next step's entry."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def _like(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (values.ndim - mask.ndim))


class NextStep(NamedTuple):
    """An agent's ratio and advantage one step later; zero without a next step."""

    log_ratio: Tensor
    advantage: Tensor
    has_next: Tensor


class ReflectiveOptions(AdaptiveClipOptions, total=False):
    """Options of losses with a reflective term; defaults are those of :class:`ReflectiveLoss`."""

    reflection_coeff: float
    next_clip_epsilon: float | Sequence[float]


class ReflectiveLoss(AdaptiveClipLoss):
    """Abstract ratio loss that can add a term with the ratio and the advantage of the same agent one step later.

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        reflection_coeff: weight of the reflective term.
        next_clip_epsilon: half-width of the clip of the next ratio, or a pair ``(low, high)``.
        **options: :class:`~torchrl_marl.objectives.adaptive_clip.AdaptiveClipOptions`.

    Raises:
        ValueError: if an option is out of its range.
    """

    @dataclass
    class _AcceptedKeys(AdaptiveClipLoss._AcceptedKeys):
        reflection_mask: NestedKey = "reflection_mask"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    abstract = True

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        reflection_coeff: float = 0.3,
        next_clip_epsilon: float | Sequence[float] = 0.1,
        **options: Unpack[AdaptiveClipOptions],
    ) -> None:
        super().__init__(actor_network, critic_network, **options)
        if self._memory_keys:
            raise ValueError(
                f"{type(self).__name__} pairs consecutive steps and does not support a policy with Sable's memory."
            )
        check_at_least_0(reflection_coeff=reflection_coeff)
        self.reflection_coeff = reflection_coeff
        self._next_bounds = clip_bounds(next_clip_epsilon)

    def _reflective_keys(self) -> list[str]:
        """Entries that ``forward`` computes for the reflective term."""
        later = ["next_gain", "next_ratio", "reflection_share", "reflective_clip_fraction", "next_clip_fraction"]
        return later if self.reflection_coeff else []

    def _own_keys(self) -> list[NestedKey]:
        """Entries that only this method reads: the old distribution's parameters and the next step's entries."""
        following = [*self._acted_keys(), self._next_advantage, self.tensor_keys.reflection_mask]
        return [*super()._own_keys(), *map(under_next, following if self.reflection_coeff else [])]

    def _acted_keys(self) -> list[NestedKey]:
        return [*self.actor_network.in_keys, self.tensor_keys.action, self.tensor_keys.sample_log_prob]

    @property
    def _next_advantage(self) -> NestedKey:
        return sibling(self.tensor_keys.action, "advantage")

    def _complete(self, batch: TensorDictBase) -> None:
        if self.reflection_coeff:
            names = ("action", "advantage", "mask", "done", "reflection_mask")
            keys = {name: getattr(self.tensor_keys, name) for name in names}
            NextStepKeys(time_dim=batch.ndim - 1, log_prob=self.tensor_keys.sample_log_prob, **keys)(batch)

    def _following(self, batch: ScoredBatch) -> TensorDictBase:
        """The next step's entries, checked."""
        written = {"advantage": self._next_advantage, "reflection_mask": self.tensor_keys.reflection_mask}
        return next_step(batch.data, read=self._acted_keys(), shape=batch.log_ratio.shape, **written)

    def _next_step(self, batch: ScoredBatch, policy: Actor | None = None) -> NextStep:
        """The next step by a second pass of a policy, the actor network unless told otherwise."""
        following = self._following(batch)
        has_next = following[self.tensor_keys.reflection_mask]
        has_next = has_next if batch.mask is None else has_next & batch.mask
        return self._paired(batch, self._log_ratio(following, policy)[1], has_next)

    def _paired(self, batch: ScoredBatch, next_log_ratio: Tensor, has_next: Tensor) -> NextStep:
        next_advantage = batch.data.get(under_next(self._next_advantage))
        next_advantage = self._advantage(batch.data, next_advantage, batch.log_ratio.shape)
        return NextStep(where_live(next_log_ratio, has_next), where_live(next_advantage, has_next), has_next)

    def _reflective_gain(
        self, batch: ScoredBatch, following: NextStep, bounds: Bounds, next_bounds: Bounds
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gain of both ratios with the next advantage, ``[B, N]``, and diagnostics.

        The clip clips each ratio by its bounds; of any other gain it is that of the product of the ratios, with the
        product of the bounds.
        """
        log_ratio, (next_log_ratio, next_advantage, has_next) = batch.log_ratio, following
        (low, high), (next_low, next_high) = bounds, next_bounds
        if self.gain is clip_gain:
            sides = {"low": low, "high": high, "next_low": next_low, "next_high": next_high}
            gain = reflective_clip_gain(log_ratio, next_log_ratio, next_advantage, **sides)
        else:
            gain = self.gain(log_ratio + next_log_ratio, next_advantage, low=low * next_low, high=high * next_high)
        return gain, {
            "next_gain": masked_mean(gain.detach(), has_next),
            "next_ratio": masked_mean(next_log_ratio.detach().exp(), has_next),
            "reflection_share": masked_mean(has_next.to(gain.dtype), batch.mask),
            "reflective_clip_fraction": clip_fraction(log_ratio, has_next, low, high),
            "next_clip_fraction": clip_fraction(next_log_ratio, has_next, next_low, next_high),
        }
