"""MARPO: reflection on the next step, and a clip whose interval follows the KL divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import Unpack

from torchrl_marl.distributed import average
from torchrl_marl.keys import sibling
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.ratio import OUT_KEYS, RatioLoss, RatioOptions, clip_bounds, clip_fraction
from torchrl_marl.objectives.reflection import NextStepKeys
from torchrl_marl.objectives.surrogates import Gain, clip_gain, kl_interval_unchecked, reflective_clip_gain

__all__ = ["ClipLayout", "MARPOLoss"]

ClipLayout = Literal["code", "paper", "paper_next_fixed", "rpo"]

_Bounds = tuple[float | Tensor, float | Tensor]
_LAYOUTS = {  # which interval clips r in the first term, r in the second, and r'
    "code": ("fixed", "kl", "kl"),
    "paper": ("kl", "kl", "kl"),
    "paper_next_fixed": ("kl", "kl", "next"),
    "rpo": ("fixed", "fixed", "next"),
}


class MARPOLoss(RatioLoss):
    """Multi-agent reflective policy optimisation: MAPPO plus a term in which this action is held to the next advantage.

        objective = mean(min(r A, clip(r, e, f) A))
                    + reflection_coeff mean(min(r r' A', clip(r, x, y) clip(r', v, w) A'))

    ``r'`` and ``A'`` are ratio and advantage of the same agent one step later, written by
    :class:`~torchrl_marl.collectors.NextStepKeys`; both ratios carry gradients; the second mean runs over rows that
    have a next step. Each of the intervals ``(e, f)``, ``(x, y)`` and ``(v, w)`` is fixed or made of the two roots of
    ``x - 1 - ln x = d``. The KL target ``d`` follows the measured divergence, moved once by every ``forward`` in
    training mode, with or without gradients:

        d <- min((1 - ema_rate) d + ema_rate (max(KL(old || new), kl_floor) + kl_bias), kl_target_max)

    ``d`` is the buffer ``kl_target``, which a checkpoint saves and restores. The divergence is exact; ``forward`` finds
    the old policy's distribution in the batch, where collectors leave its parameters (``loc`` and ``scale``,
    ``logits``). A divergence that is not finite leaves the target as it is. Where no interval depends on it, nothing is
    measured.

    ``layout`` says which interval clips ``r`` in the first term, ``r`` in the second, and ``r'``:

    ====================  ==================  ==================  ==================  ==================================
    layout                r, first term       r, second term      r'                  from
    ====================  ==================  ==================  ==================  ==================================
    ``code``              ``clip_epsilon``    KL                  KL                  the authors' code, section 5.3
    ``paper``             KL                  KL                  KL                  the paper's Eqs. (6) to (8)
    ``paper_next_fixed``  KL                  KL                  next_clip_epsilon   Eq. (8) with bounds of its own
    ``rpo``               ``clip_epsilon``    ``clip_epsilon``    next_clip_epsilon   RPO for each agent
    ====================  ==================  ==================  ==================  ==================================

    Any other ``gain`` becomes the trust region of both terms: the reflective one is then
    ``gain(log r + log r', A'; x x', y y')``, that trust region on the product of the ratios, with the product of the
    intervals, in place of the two clips.

    Where this departs from the paper and from the code that matches it (github.com/wucuiling/MARPO, probably the
    authors'): ``A'`` stands in both arguments of the minimum (the paper's
    Eq. 7 prints ``A`` in one). ``ema_rate`` weights the new divergence, as in the code (Eq. 12 is printed the other way
    round; literally it is ``1 - ema_rate``). The target is capped, where the code's root finder falls back to a
    narrower interval beyond 0.307. Next advantages are the batch's own (the code reads an array that is all zeros).
    Pairs end where an episode is truncated too, and where an agent is dead at either step; RPO's mean counts rows
    without a pair as zero, here they do not count.

    With ``reflection_coeff=0`` and ``layout="code"`` this is :class:`MAPPOLoss`, bit for bit.

    Reference: MARPO: A Reflective Policy Optimization for Multi Agent Reinforcement Learning,
    https://arxiv.org/abs/2512.22832; RPO: Gan et al., Reflective Policy Optimization, 2024,
    https://arxiv.org/abs/2406.03678.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.ratio.RatioLoss`. ``forward`` returns these
    scalars, too: the two means of the objective, ``current_gain`` and ``next_gain``; where an interval follows the
    divergence ``kl``, ``kl_target``, ``kl_interval_low`` and ``kl_interval_high``; and of the second term
    ``reflection_share`` (rows with a next step), ``next_ratio`` (mean of ``r'``), ``reflective_clip_fraction`` and
    ``next_clip_fraction`` (shares of ``r`` and ``r'`` outside their intervals; ``clip_fraction`` is the first term's).

    Args:
        actor_network: decentralised policy.
        critic_network: sees the joint observations or the state.
        reflection_coeff: weight of the reflective term (alpha in the paper, which does not state it; 0.3 in the code).
        clip_epsilon: half-width of the fixed clip, or a pair ``(low, high)``.
        next_clip_epsilon: the same for ``r'`` in the layouts that fix it (RPO's value).
        layout: see the table.
        ema_rate: weight of the new divergence in the KL target, in [0, 1]; at 0 the target, and so the interval, stays.
        kl_bias: added to the divergence; it sets the width in practice: where the divergence stays small, ``d`` tends
            to ``kl_floor + kl_bias``. A buffer, as is ``kl_target``: assign to it to anneal it.
        kl_floor: smallest divergence that counts.
        kl_target_init: first KL target.
        kl_target_max: largest KL target.
        sequences: ``forward`` gets sequences of consecutive steps, ``[*B, T]``, such as ``split_into_chunks`` makes,
            instead of rows. The next log-ratio is then the same output one step on: only the last step of each sequence
            takes a second pass through the policy, where rows take one for all. A recurrent policy needs it; the last
            step's second pass starts from the state that was collected.
        gain: another trust region in place of the clip (anything but the function ``clip_gain`` itself).
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> loss = MARPOLoss(actor, critic)  # doctest: +SKIP
        >>> for batch in collector:  # doctest: +SKIP
        ...     loss.value_estimator(batch)
        ...     rows = NextStepKeys()(batch).reshape(-1).select(*loss.in_keys)
    """

    @dataclass
    class _AcceptedKeys(RatioLoss._AcceptedKeys):
        reflection_mask: NestedKey = "reflection_mask"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _schedulable_buffers = RatioLoss._schedulable_buffers | {"kl_target", "kl_bias"}

    moves_buffers = True
    kl_target: Tensor
    kl_bias: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        reflection_coeff: float = 0.3,
        clip_epsilon: float | Sequence[float] = 0.2,
        next_clip_epsilon: float | Sequence[float] = 0.1,
        layout: ClipLayout = "code",
        ema_rate: float = 0.08,
        kl_bias: float = 0.08,
        kl_floor: float = 0.008,
        kl_target_init: float = 0.01,
        kl_target_max: float = 0.3,
        sequences: bool = False,
        gain: Gain = clip_gain,
        **options: Unpack[RatioOptions],
    ) -> None:
        low, high = clip_bounds(clip_epsilon)
        super().__init__(
            actor_network,
            critic_network,
            gain=gain,
            low=low,
            high=high,
            **options,
        )
        if self._memory_keys:
            raise ValueError("MARPOLoss pairs steps of one another: it takes no policy with a memory of Sable's kind.")
        if not sequences and reflection_coeff and "is_init" in actor_network.in_keys:
            raise ValueError("A recurrent policy is trained on sequences [*batch, time]: it needs sequences=True.")
        if layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}; got {layout!r}.")
        if not reflection_coeff >= 0:
            raise ValueError(f"reflection_coeff must be at least 0, got {reflection_coeff}.")
        if not 0 <= ema_rate <= 1:
            raise ValueError(f"ema_rate, the weight of the new divergence, must be in [0, 1], got {ema_rate}.")
        if not (kl_bias >= 0 and kl_floor >= 0 and kl_bias + kl_floor > 0):
            raise ValueError(f"kl_bias and kl_floor must be at least 0, one of them above; got {kl_bias}, {kl_floor}.")
        if not 0 < kl_target_init <= kl_target_max:
            raise ValueError(f"kl_target_init must be in (0, kl_target_max = {kl_target_max}], got {kl_target_init}.")
        self.reflection_coeff, self.layout, self.sequences = reflection_coeff, layout, sequences
        self.ema_rate, self.kl_floor, self.kl_target_max = ema_rate, kl_floor, kl_target_max
        self._next_bounds = clip_bounds(next_clip_epsilon)
        device = self.ratio_low.device
        self.register_buffer("kl_target", torch.tensor(kl_target_init, dtype=torch.float64, device=device))
        self.register_buffer("kl_bias", torch.tensor(kl_bias, dtype=torch.float64, device=device))

    @property
    def uses_kl(self) -> bool:
        """Whether any interval of an active term follows the divergence."""
        terms = _LAYOUTS[self.layout] if self.reflection_coeff else _LAYOUTS[self.layout][:1]
        return "kl" in terms

    def _computed_keys(self) -> list[str]:
        """Entries that ``forward`` computes: of the divergence and of the next step only where they play a part."""
        keys = [*OUT_KEYS, "current_gain"]
        if self.uses_kl:
            keys += ["kl", "kl_target", "kl_interval_low", "kl_interval_high"]
        if self.reflection_coeff:
            keys += ["next_gain", "next_ratio", "reflection_share", "reflective_clip_fraction", "next_clip_fraction"]
        return keys

    def _own_keys(self) -> list[NestedKey]:
        """Entries that only this method reads: the old distribution's parameters and the next step's entries."""
        parameters = self._parameter_keys() if self.uses_kl else []
        return [*parameters, *map(_next, self._following_keys() if self.reflection_coeff else [])]

    def _complete(self, batch: TensorDictBase) -> None:
        if not self.reflection_coeff:
            return
        keys = self.tensor_keys
        NextStepKeys(
            time_dim=batch.ndim - 1,
            action=keys.action,
            log_prob=keys.sample_log_prob,
            advantage=keys.advantage,
            mask=keys.mask,
            done=keys.done,
            reflection_mask=keys.reflection_mask,
        )(batch)

    def _chunk_length(self, chunk_length: int | None, num_steps: int) -> int | None:
        return num_steps if chunk_length is None and self.sequences else chunk_length

    def _following_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        next_step = [keys.action, keys.sample_log_prob, sibling(keys.action, "advantage"), keys.reflection_mask]
        return [*self.actor_network.in_keys, *next_step]

    def objective(
        self,
        tensordict: TensorDictBase,
        distribution: Distribution,
        log_ratio: Tensor,
        advantage: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``loss_objective`` and the diagnostics of the KL interval and of the reflective term."""
        intervals: dict[str, _Bounds] = {"fixed": (self.ratio_low, self.ratio_high), "next": self._next_bounds}
        diagnostics = {}
        if self.uses_kl:
            kl = self._move_target(tensordict, distribution, mask)
            intervals["kl"] = low, high = kl_interval_unchecked(self.kl_target)
            target = self.kl_target.clone()
            diagnostics |= {"kl": kl, "kl_target": target, "kl_interval_low": low, "kl_interval_high": high}
        first, *later = _LAYOUTS[self.layout]
        bounds = intervals[first]
        gain = self.gain(log_ratio, advantage, low=bounds[0], high=bounds[1])
        diagnostics |= {
            "clip_fraction": clip_fraction(log_ratio, mask, *bounds),
            "current_gain": masked_mean(gain.detach(), mask),
        }
        loss_objective = self._reduce(-gain, mask)
        if not self.reflection_coeff:
            return loss_objective, diagnostics

        reflective_bounds, next_bounds = (intervals[name] for name in later)
        next_log_ratio, next_advantage, has_next = self._next_step(tensordict, log_ratio, mask)
        next_gain = self._reflective_gain(log_ratio, next_log_ratio, next_advantage, reflective_bounds, next_bounds)
        diagnostics |= {
            "next_gain": masked_mean(next_gain.detach(), has_next),
            "next_ratio": masked_mean(next_log_ratio.detach().exp(), has_next),
            "reflection_share": masked_mean(has_next.to(gain.dtype), mask),
            "reflective_clip_fraction": clip_fraction(log_ratio, has_next, *reflective_bounds),
            "next_clip_fraction": clip_fraction(next_log_ratio, has_next, *next_bounds),
        }
        return loss_objective + self.reflection_coeff * self._reduce(-next_gain, has_next), diagnostics

    def _reflective_gain(
        self, log_ratio: Tensor, next_log_ratio: Tensor, next_advantage: Tensor, bounds: _Bounds, next_bounds: _Bounds
    ) -> Tensor:
        (low, high), (next_low, next_high) = bounds, next_bounds
        if self.gain is clip_gain:
            sides = {"low": low, "high": high, "next_low": next_low, "next_high": next_high}
            return reflective_clip_gain(log_ratio, next_log_ratio, next_advantage, **sides)
        return self.gain(log_ratio + next_log_ratio, next_advantage, low=low * next_low, high=high * next_high)

    def _next_step(
        self, tensordict: TensorDictBase, log_ratio: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-ratio and advantage one step later, and the mask of rows that have them; the others are zero."""
        following = self._following(tensordict, log_ratio.shape)
        has_next = following[self.tensor_keys.reflection_mask]
        if mask is not None:
            has_next = has_next & mask
        if not self.sequences:
            _, next_log_ratio = self._log_ratio(following)
        else:
            _, last_log_ratio = self._log_ratio(following[..., -1:])
            next_log_ratio = torch.cat([log_ratio[..., 1:, :], last_log_ratio], -2)
            if mask is not None:  # at a masked step the log-ratio is no longer the policy's
                has_next = has_next & torch.cat([mask[..., 1:, :], torch.ones_like(mask[..., -1:, :])], -2)
        next_advantage = following[sibling(self.tensor_keys.action, "advantage")]
        next_advantage = self._advantage(tensordict, next_advantage, log_ratio.shape)
        return torch.where(has_next, next_log_ratio, 0.0), torch.where(has_next, next_advantage, 0.0), has_next

    def _following(self, tensordict: TensorDictBase, shape: torch.Size) -> TensorDictBase:
        """Return the next step's entries once they are complete and of the right shape."""
        needed = self._following_keys()
        missing = [key for key in needed if tensordict.get(_next(key), None) is None]
        if missing:
            raise KeyError(
                f"The data has no {', '.join(repr(_next(key)) for key in missing)}: apply "
                "torchrl_marl.collectors.NextStepKeys to the batch once it has advantages."
            )
        following: TensorDictBase = tensordict.get("next")
        if self.sequences and tensordict.ndim < 2:
            raise ValueError(f"sequences=True needs data [*batch, time], got {tuple(tensordict.batch_size)}.")
        for key, expected in ((needed[-1], tuple(shape)), (needed[-2], (*shape, 1))):
            if following[key].shape != expected:
                raise ValueError(f"{_next(key)!r} has shape {tuple(following[key].shape)}, expected {expected}.")
        if following[needed[-1]].dtype != torch.bool:
            raise ValueError(f"{_next(needed[-1])!r} must be boolean, got {following[needed[-1]].dtype}.")
        return following

    @torch.no_grad()
    def _move_target(self, tensordict: TensorDictBase, distribution: Distribution, mask: Tensor | None) -> Tensor:
        """Measure the divergence from the old policy over live agents; in training mode, move the target towards it."""
        missing = [key for key in self._parameter_keys() if tensordict.get(key, None) is None]
        if missing:
            raise KeyError(
                f"The data has no {', '.join(map(repr, missing))}: MARPO measures the divergence from the policy that "
                "collected it, so keep the parameters of its distribution, which the actor writes, in the batch."
            )
        old = self.actor_network.build_dist_from_params(tensordict)
        kl = average(masked_mean(policy_kl(old, distribution), mask).to(self.kl_target.dtype))
        if self.training:
            goal = torch.where(kl.isfinite(), kl.clamp(min=self.kl_floor) + self.kl_bias, self.kl_target)
            self.kl_target.lerp_(goal, self.ema_rate).clamp_(0, self.kl_target_max)
        return kl

    def _parameter_keys(self) -> list[NestedKey]:
        return list(self.actor_network[-1].in_keys)


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
