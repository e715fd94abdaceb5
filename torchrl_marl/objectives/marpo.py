"""MARPO: reflection on the next step, and a clip whose interval follows the KL divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.keys import sibling
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.adaptive_clip import AdaptiveClipLoss, AdaptiveClipOptions
from torchrl_marl.objectives.masking import masked_mean, where_live
from torchrl_marl.objectives.ratio import ScoredBatch, clip_bounds, clip_fraction
from torchrl_marl.objectives.reflection import NextStepKeys, next_step, under_next
from torchrl_marl.objectives.surrogates import clip_gain, reflective_clip_gain
from torchrl_marl.signatures import check_at_least_0, check_choice

__all__ = ["ClipLayout", "MARPOLoss"]

ClipLayout = Literal["code", "paper", "paper_next_fixed", "rpo"]

Bounds = tuple[float | Tensor, float | Tensor]
_LAYOUTS = {  # intervals that clip r in the first term, r in the second term, and r'
    "code": ("fixed", "kl", "kl"),
    "paper": ("kl", "kl", "kl"),
    "paper_next_fixed": ("kl", "kl", "next"),
    "rpo": ("fixed", "fixed", "next"),
}


class MARPOLoss(AdaptiveClipLoss):
    """Multi-agent reflective policy optimisation: MAPPO plus a term that credits an action with the next advantage.

        objective = mean(min(r A, clip(r, e, f) A))
                    + reflection_coeff mean(min(r r' A', clip(r, x, y) clip(r', v, w) A'))

    ``r'`` and ``A'`` are the ratio and advantage of the same agent one step later, written by
    :class:`~torchrl_marl.collectors.NextStepKeys`. Both ratios carry gradients. The second mean runs over rows that
    have a next step. Each of the intervals ``(e, f)``, ``(x, y)`` and ``(v, w)`` is fixed or follows the KL divergence
    (see :class:`~torchrl_marl.objectives.adaptive_clip.AdaptiveClipLoss`).

    ``layout`` selects the intervals that clip ``r`` in the first term, ``r`` in the second term, and ``r'``:

    ====================  ==================  ==================  ==================  ==================================
    layout                r, first term       r, second term      r'                  from
    ====================  ==================  ==================  ==================  ==================================
    ``code``              ``clip_epsilon``    KL                  KL                  the authors' code, section 5.3
    ``paper``             KL                  KL                  KL                  the paper's Eqs. (6) to (8)
    ``paper_next_fixed``  KL                  KL                  next_clip_epsilon   Eq. (8) with separate bounds
    ``rpo``               ``clip_epsilon``    ``clip_epsilon``    next_clip_epsilon   RPO for each agent
    ====================  ==================  ==================  ==================  ==================================

    Any other ``gain`` becomes the trust region of both terms. The reflective term is then
    ``gain(log r + log r', A'; x x', y y')``: the gain of the product of the ratios, with the product of the intervals,
    in place of the two clips.

    Differences from the paper and from the code that matches it (github.com/wucuiling/MARPO, probably the authors'):
    ``A'`` appears in both arguments of the minimum (the paper's Eq. 7 prints ``A`` in one). ``ema_rate`` weights the
    new divergence, as in the code (Eq. 12, read literally, has ``1 - ema_rate``). The target is capped, where the
    code's root finder falls back to a narrower interval beyond 0.307. Next advantages come from the batch (the code
    reads an array of zeros). A row has no pair at a truncation or where the agent is dead at either step. Rows without
    a pair are left out of the mean; RPO's mean counts them as zero.

    With ``reflection_coeff=0`` and ``layout="code"`` the loss is bit-identical to :class:`MAPPOLoss`.

    Reference: MARPO: A Reflective Policy Optimization for Multi Agent Reinforcement Learning,
    https://arxiv.org/abs/2512.22832; RPO: Gan et al., Reflective Policy Optimization, 2024,
    https://arxiv.org/abs/2406.03678.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`. ``forward`` also returns these
    scalars: ``current_gain`` and ``next_gain`` (the two means of the objective); if an interval follows the divergence,
    ``kl``, ``kl_target``, ``kl_interval_low`` and ``kl_interval_high``; and for the second term ``reflection_share``
    (share of rows with a next step), ``next_ratio`` (mean of ``r'``), ``reflective_clip_fraction`` and
    ``next_clip_fraction`` (shares of ``r`` and ``r'`` outside their intervals; ``clip_fraction`` is the first term's).

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        reflection_coeff: weight of the reflective term (alpha in the paper, which gives no value; 0.3 in the code).
        next_clip_epsilon: half-width of the clip of ``r'``, or a pair ``(low, high)``, in layouts with a fixed ``r'``
            interval (the default is RPO's).
        layout: see the table.
        sequences: ``forward`` gets sequences of consecutive steps, ``[*B, T]``, such as ``split_into_chunks`` returns,
            instead of rows. The next log-ratio is then the policy's output one step later, so only the last step of
            each sequence needs a second pass through the policy; rows need one for every step. Recurrent policies
            require ``sequences=True``; the second pass of the last step starts from the collected state.
        **options: :class:`~torchrl_marl.objectives.adaptive_clip.AdaptiveClipOptions`; ``clip_epsilon`` belongs to the
            fixed clip.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> loss = MARPOLoss(actor, critic)  # doctest: +SKIP
        >>> for batch in collector:  # doctest: +SKIP
        ...     loss.value_estimator(batch)
        ...     rows = NextStepKeys()(batch).reshape(-1).select(*loss.in_keys)
    """

    @dataclass
    class _AcceptedKeys(AdaptiveClipLoss._AcceptedKeys):
        reflection_mask: NestedKey = "reflection_mask"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        reflection_coeff: float = 0.3,
        next_clip_epsilon: float | Sequence[float] = 0.1,
        layout: ClipLayout = "code",
        sequences: bool = False,
        **options: Unpack[AdaptiveClipOptions],
    ) -> None:
        super().__init__(actor_network, critic_network, **options)
        if self._memory_keys:
            raise ValueError("MARPOLoss pairs consecutive steps and does not support a policy with Sable's memory.")
        if not sequences and reflection_coeff and "is_init" in actor_network.in_keys:
            raise ValueError("A recurrent policy trains on sequences [*batch, time]: set sequences=True.")
        check_choice("layout", layout, tuple(_LAYOUTS))
        check_at_least_0(reflection_coeff=reflection_coeff)
        self.reflection_coeff, self.layout, self.sequences = reflection_coeff, layout, sequences
        self._next_bounds = clip_bounds(next_clip_epsilon)

    @property
    def uses_kl(self) -> bool:
        """Whether the interval of any active term follows the divergence."""
        return "kl" in _LAYOUTS[self.layout][: None if self.reflection_coeff else 1]

    def _computed_keys(self) -> list[str]:
        later = ["next_gain", "next_ratio", "reflection_share", "reflective_clip_fraction", "next_clip_fraction"]
        return [*super()._computed_keys(), "current_gain", *(later if self.reflection_coeff else [])]

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

    def _chunk_length(self, chunk_length: int | None, num_steps: int) -> int | None:
        return num_steps if chunk_length is None and self.sequences else chunk_length

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective`` and the diagnostics of the KL interval and of the reflective term."""
        intervals: dict[str, Bounds] = {"fixed": (self.ratio_low, self.ratio_high), "next": self._next_bounds}
        diagnostics = {}
        if self.uses_kl:
            intervals["kl"], diagnostics = self.follow_kl(batch)
        bounds, *later = (intervals[name] for name in _LAYOUTS[self.layout] if name in intervals)
        gain = self.gain(batch.log_ratio, batch.advantage, low=bounds[0], high=bounds[1])
        diagnostics["clip_fraction"] = clip_fraction(batch.log_ratio, batch.mask, *bounds)
        diagnostics["current_gain"] = masked_mean(gain.detach(), batch.mask)
        loss_objective = self._reduce(-gain, batch.mask)
        if self.reflection_coeff:
            reflective, more = self._reflective_loss(batch, *later)
            return loss_objective + self.reflection_coeff * reflective, diagnostics | more
        return loss_objective, diagnostics

    def _reflective_loss(
        self, batch: ScoredBatch, bounds: Bounds, next_bounds: Bounds
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio, (next_log_ratio, next_advantage, has_next) = batch.log_ratio, self._next_step(batch)
        (low, high), (next_low, next_high) = bounds, next_bounds
        if self.gain is clip_gain:
            sides = {"low": low, "high": high, "next_low": next_low, "next_high": next_high}
            gain = reflective_clip_gain(log_ratio, next_log_ratio, next_advantage, **sides)
        else:
            gain = self.gain(log_ratio + next_log_ratio, next_advantage, low=low * next_low, high=high * next_high)
        return self._reduce(-gain, has_next), {
            "next_gain": masked_mean(gain.detach(), has_next),
            "next_ratio": masked_mean(next_log_ratio.detach().exp(), has_next),
            "reflection_share": masked_mean(has_next.to(gain.dtype), batch.mask),
            "reflective_clip_fraction": clip_fraction(log_ratio, has_next, low, high),
            "next_clip_fraction": clip_fraction(next_log_ratio, has_next, next_low, next_high),
        }

    def _next_step(self, batch: ScoredBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-ratio and advantage one step later, and the mask of rows with a next step; other rows are zero."""
        if self.sequences and batch.data.ndim < 2:
            raise ValueError(f"sequences=True needs data [*batch, time], got {tuple(batch.data.batch_size)}.")
        keys, shape, mask = self.tensor_keys, batch.log_ratio.shape, batch.mask
        written = {"advantage": self._next_advantage, "reflection_mask": keys.reflection_mask}
        following = next_step(batch.data, read=self._acted_keys(), shape=shape, **written)
        has_next = following[keys.reflection_mask] if mask is None else following[keys.reflection_mask] & mask
        if not self.sequences:
            _, next_log_ratio = self._log_ratio(following)
        else:
            _, last_log_ratio = self._log_ratio(following[..., -1:])
            next_log_ratio = torch.cat([batch.log_ratio[..., 1:, :], last_log_ratio], -2)
            if mask is not None:  # at a masked step the log-ratio is no longer the policy's
                has_next = has_next & torch.cat([mask[..., 1:, :], torch.ones_like(mask[..., -1:, :])], -2)
        next_advantage = self._advantage(batch.data, following[self._next_advantage], shape)
        return where_live(next_log_ratio, has_next), where_live(next_advantage, has_next), has_next
