"""MARPO: reflection on the next step, and a clip whose interval follows the KL divergence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.ratio import Bounds, ScoredBatch, clip_fraction
from torchrl_marl.objectives.reflection import NextStep, ReflectiveLoss, ReflectiveOptions
from torchrl_marl.signatures import check_choice

__all__ = ["ClipLayout", "MARPOLoss"]

ClipLayout = Literal["code", "paper", "paper_next_fixed", "rpo"]

_LAYOUTS = {  # intervals that clip r in the first term, r in the second term, and r'
    "code": ("fixed", "kl", "kl"),
    "paper": ("kl", "kl", "kl"),
    "paper_next_fixed": ("kl", "kl", "next"),
    "rpo": ("fixed", "fixed", "next"),
}


class MARPOLoss(ReflectiveLoss):
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
        **options: :class:`~torchrl_marl.objectives.reflection.ReflectiveOptions`; ``clip_epsilon`` belongs to the
            fixed clip.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> loss = MARPOLoss(actor, critic)  # doctest: +SKIP
        >>> for batch in collector:  # doctest: +SKIP
        ...     loss.value_estimator(batch)
        ...     rows = NextStepKeys()(batch).reshape(-1).select(*loss.in_keys)
    """

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        layout: ClipLayout = "code",
        sequences: bool = False,
        **options: Unpack[ReflectiveOptions],
    ) -> None:
        super().__init__(actor_network, critic_network, **options)
        if not sequences and self.reflection_coeff and "is_init" in actor_network.in_keys:
            raise ValueError("A recurrent policy trains on sequences [*batch, time]: set sequences=True.")
        check_choice("layout", layout, tuple(_LAYOUTS))
        self.layout, self.sequences = layout, sequences

    @property
    def uses_kl(self) -> bool:
        """Whether the interval of any active term follows the divergence."""
        return "kl" in _LAYOUTS[self.layout][: None if self.reflection_coeff else 1]

    def _computed_keys(self) -> list[str]:
        return [*super()._computed_keys(), "current_gain", *self._reflective_keys()]

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
            following = self._next_step(batch)
            gain, more = self._reflective_gain(batch, following, *later)
            loss_objective = loss_objective + self.reflection_coeff * self._reduce(-gain, following.has_next)
            diagnostics |= more
        return loss_objective, diagnostics

    def _next_step(self, batch: ScoredBatch, policy: Actor | None = None) -> NextStep:
        if not self.sequences:
            return super()._next_step(batch, policy)
        if batch.data.ndim < 2:
            raise ValueError(f"sequences=True needs data [*batch, time], got {tuple(batch.data.batch_size)}.")
        mask, following = batch.mask, self._following(batch)
        has_next = following[self.tensor_keys.reflection_mask]
        _, last_log_ratio = self._log_ratio(following[..., -1:], policy)
        next_log_ratio = torch.cat([batch.log_ratio[..., 1:, :], last_log_ratio], -2)
        if mask is not None:  # at a masked step the log-ratio is no longer the policy's
            has_next = has_next & mask & torch.cat([mask[..., 1:, :], torch.ones_like(mask[..., -1:, :])], -2)
        return self._paired(batch, next_log_ratio, has_next)
