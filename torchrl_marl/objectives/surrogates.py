"""Gains: the surrogate objectives that ratio methods maximise, one pure function per equation.

All gains share the signature ``gain(log_ratio, advantage, *, low, high)``, so any loss takes any gain. Gains are
elementwise: arguments of one shape, a result of the same shape; the loss takes the mean.

Notation: ``r = exp(log_ratio) = pi(a|o) / pi_old(a|o)`` is the probability ratio of one agent and ``A`` its advantage.
At ``r = 1`` all gains equal ``A`` and their gradient is the policy gradient; they differ in how they penalise leaving
``r = 1``.
"""

from __future__ import annotations

import math
from typing import Protocol, overload

import torch
from torch import Tensor

__all__ = [
    "Gain",
    "barrier_gain",
    "clip_gain",
    "double_clip_gain",
    "kl_interval",
    "quadratic_gain",
    "ratio_gain",
    "reflective_clip_gain",
]


class Gain(Protocol):
    """A trust region: ``(log_ratio, advantage, *, low, high) -> gain``, elementwise."""

    def __call__(self, log_ratio: Tensor, advantage: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
        """Return the gain to maximise, of the shape of ``log_ratio``."""
        ...


def clip_gain(log_ratio: Tensor, advantage: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """PPO's clipped gain, applied to each agent as in MAPPO.

        gain = min(r A, clip(r, low, high) A)

    The gradient is exactly zero where the ratio has left ``[low, high]`` in the direction that the advantage favours.

    Reference: Yu et al., The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games, 2022,
    https://arxiv.org/abs/2103.01955; Eq. (2) of the MARS paper. Independent ``low`` and ``high`` give the MARS paper's
    asymmetric MAPPO.

    Args:
        log_ratio: ``log pi(a|o) - log pi_old(a|o)`` of each agent, any shape.
        advantage: same shape.
        low: lower bound of the ratio, below 1 (``1 - clip_epsilon``); float or 0-dim tensor.
        high: upper bound of the ratio, above 1 (``1 + clip_epsilon``); float or 0-dim tensor.

    Returns:
        The gain to maximise, elementwise, same shape.

    Raises:
        ValueError: if the shapes differ (they would broadcast silently).

    Example:
        >>> clip_gain(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 1.0]), low=0.8, high=1.2)
        tensor([1.2000, 0.6065])
    """
    _check_same_shape(log_ratio, advantage)
    ratio = _ratio(log_ratio)
    return torch.minimum(ratio * advantage, ratio.clamp(min=low).clamp(max=high) * advantage)


def quadratic_gain(log_ratio: Tensor, advantage: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """MASPO's gain: a quadratic penalty on the ratio with its maximum at a target ratio.

        gain = r A - c (r - 1)^2,   c = A / (2 (target - 1)),   target = high where A >= 0, low where A < 0

    ``low = 1 - epsilon``, ``high = 1 + epsilon`` gives MASPO's ``|A| / (2 epsilon) (r - 1)^2``; any other pair gives
    the asymmetric variant. The penalty stays finite as ``r -> 0``, so it does not keep probabilities away from zero.

    Reference: Selmonaj et al., 2025 (MASPO) after Xie et al., Simple Policy Optimization, 2025; Eq. (3) of the MARS
    paper and, with independent ``low`` and ``high``, its asymmetric MASPO.

    Args:
        log_ratio: ``log pi(a|o) - log pi_old(a|o)`` of each agent, any shape.
        advantage: same shape.
        low: target ratio where the advantage is negative, in (0, 1); float or 0-dim tensor.
        high: target ratio where the advantage is positive, above 1; float or 0-dim tensor.

    Returns:
        The gain to maximise, elementwise, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> log_ratio = torch.tensor([0.0, 0.2]).log1p()  # ratios 1 and 1.2: 1.2 - 0.2^2 / (2 * 0.2) = 1.1
        >>> quadratic_gain(log_ratio, torch.tensor([1.0, 1.0]), low=0.8, high=1.2)
        tensor([1.0000, 1.1000])
    """
    _check_same_shape(log_ratio, advantage)
    change = log_ratio.expm1()  # r - 1 without cancellation near r = 1
    penalty = advantage / (2 * (_target_ratio(advantage, low, high) - 1))
    return (
        log_ratio.exp() * advantage - (penalty * change) * change
    )  # in this order 0 stays 0 where the square overflows


def barrier_gain(log_ratio: Tensor, advantage: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """MARS's gain: a multiplicatively symmetric barrier on the ratio with its maximum at a target ratio.

        gain  = r A - alpha phi(r),   phi(r) = r + 1/r - 2 = (r - 1)^2 / r
        alpha = A / (1 - target^-2),  target = high where A >= 0, low where A < 0

    ``phi(r) = phi(1/r)`` is zero at ``r = 1`` and infinite as ``r -> 0`` or ``r -> inf``: the gain penalises a ratio
    and its reciprocal equally. ``r = target`` is the only stationary point on ``(0, inf)``. The gain has no plateau, so
    do not clamp the log-ratio beforehand. At ``A = 0``, gain and gradient are exactly zero. Beyond ``|ln r| = 40`` the
    gain is extended linearly in ``ln r``: from about ``|ln r| = 44``, squared gradients would overflow in float32 and
    their norm could not be clipped.

    Reference: Rethinking Ratio-Based Trust Regions for Policy Optimization in Multi-Agent Reinforcement Learning
    (MARS), Eq. (7) for the barrier, (9) for the gain, (11) for ``alpha``.

    Args:
        log_ratio: ``log pi(a|o) - log pi_old(a|o)`` of each agent, any shape.
        advantage: same shape.
        low: target ratio where the advantage is negative, in (0, 1); float or 0-dim tensor.
        high: target ratio where the advantage is positive, above 1; float or 0-dim tensor.

    Returns:
        The gain to maximise, elementwise, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> log_ratio = torch.tensor([0.0, 1.25]).log1p()  # ratios 1 and 2.25
        >>> barrier_gain(log_ratio, torch.tensor([1.0, 1.0]), low=0.5, high=1.5)
        tensor([1.0000, 1.0000])
    """
    _check_same_shape(log_ratio, advantage)
    alpha = advantage / (1 - _target_ratio(advantage, low, high) ** -2)
    near = log_ratio.clamp(-40.0, 40.0)
    beyond = log_ratio - near
    ratio = near.exp() * (1 + beyond)
    barrier = 4 * (near / 2).sinh().square()  # phi without a division and without cancellation near r = 1
    return ratio * advantage - alpha * (barrier + 2 * near.sinh() * beyond)


def ratio_gain(log_ratio: Tensor, advantage: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The importance-weighted advantage itself, for methods whose trust region is elsewhere (HATRPO, OATRPO).

        gain = r A

    Reference: Kuba et al., Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning, 2022,
    https://arxiv.org/abs/2109.11251.

    Args:
        log_ratio: ``log pi(a|o) - log pi_old(a|o)`` of each agent, any shape.
        advantage: same shape.
        low: unused; the ratio is unbounded.
        high: unused.

    Returns:
        The gain to maximise, elementwise, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> ratio_gain(torch.tensor([0.0, 3.0]).log1p(), torch.tensor([1.0, 0.5]), low=0.8, high=1.2)
        tensor([1., 2.])
    """
    _check_same_shape(log_ratio, advantage)
    return _ratio(log_ratio) * advantage


def reflective_clip_gain(
    log_ratio: Tensor,
    next_log_ratio: Tensor,
    next_advantage: Tensor,
    *,
    low: float | Tensor,
    high: float | Tensor,
    next_low: float | Tensor,
    next_high: float | Tensor,
) -> Tensor:
    """Reflective gain of RPO and MARPO: the next step's advantage, weighted by the ratios of both steps.

        gain = min(r r' A', clip(r, low, high) clip(r', next_low, next_high) A')

    ``r'`` and ``A'`` are the ratio and advantage of the same agent one step later. Each ratio is clipped separately.
    The MARPO paper prints ``A`` in the first argument of the minimum, which would compare different advantages; its
    source, RPO, has ``A'`` in both arguments.

    Reference: MARPO, https://arxiv.org/abs/2512.22832, Eqs. (7) and (8), corrected as above.

    Args:
        log_ratio: ``log pi(a|o) - log pi_old(a|o)`` of each agent, any shape.
        next_log_ratio: the same at the next step, same shape.
        next_advantage: advantage of the next step, same shape.
        low: lower bound of ``r``; float or 0-dim tensor, like the other bounds.
        high: upper bound of ``r``.
        next_low: lower bound of ``r'``.
        next_high: upper bound of ``r'``.

    Returns:
        The gain to maximise, elementwise, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> now, later = torch.tensor([1.5, 0.5]).log(), torch.tensor([1.0, 1.0]).log()
        >>> bounds = {"low": 0.8, "high": 1.2, "next_low": 0.9, "next_high": 1.1}
        >>> reflective_clip_gain(now, later, torch.tensor([1.0, 1.0]), **bounds)
        tensor([1.2000, 0.5000])
    """
    _check_same_shape(log_ratio, next_advantage)
    _check_same_shape(next_log_ratio, next_advantage)
    clipped = _ratio(log_ratio).clamp(min=low).clamp(max=high)
    next_clipped = _ratio(next_log_ratio).clamp(min=next_low).clamp(max=next_high)
    product = _ratio(log_ratio + next_log_ratio)
    return torch.minimum(product * next_advantage, clipped * next_clipped * next_advantage)


def double_clip_gain(
    log_ratio: Tensor,
    guider_learner_log_ratio: Tensor,
    advantage: Tensor,
    *,
    low: float | Tensor,
    high: float | Tensor,
    guider_learner_ratio: float | Tensor,
    gain: Gain = clip_gain,
) -> Tensor:
    """MAGPO's gain for a guider: PPO's clip with a second clip around the learner that imitates the guider.

        gain = min(r A, clip(clip(mu / pi, 1 / delta, delta) pi / mu_old, low, high) A)

    ``mu`` is the guider, ``r = mu / mu_old`` its ratio, ``pi`` the learner. The inner clip removes the gradient where
    ``mu / pi`` has left ``(1 / delta, delta)`` in the direction that the advantage favours, the outer clip where ``r``
    has left ``[low, high]`` in this direction. If ``r`` has left ``[low, high]`` in the opposite direction, the
    gradient pulls ``r`` back. ``delta = inf`` gives :func:`clip_gain`.

    Any other gain ``G`` is applied as ``min(G(r), G(clip(...)))``, which for :func:`clip_gain` equals the formula
    above: the second term is the gain of the ratio confined to both intervals.

    Reference: MAGPO, https://arxiv.org/abs/2507.18059, Eqs. (8) and (9).

    Args:
        log_ratio: ``log mu(a|o) - log mu_old(a|o)`` of each agent, any shape.
        guider_learner_log_ratio: ``log mu(a|o) - log pi(a|o)``, with gradient to the guider only; same shape.
        advantage: same shape.
        low: lower bound of ``r``, or the gain's target; float or 0-dim tensor, like the other bounds.
        high: upper bound of ``r``, or the gain's target.
        guider_learner_ratio: ``delta``, above 1.
        gain: the trust region of the guider.

    Returns:
        The gain to maximise, elementwise, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> guider, learner, old = torch.tensor([0.6, 0.3, 0.5]).log()
        >>> bounds = {"low": 0.8, "high": 1.2, "guider_learner_ratio": 1.5}
        >>> double_clip_gain(guider - old, guider - learner, torch.tensor(1.0), **bounds)  # 1.5 * 0.3 / 0.5
        tensor(0.9000)
    """
    _check_same_shape(log_ratio, advantage)
    _check_same_shape(guider_learner_log_ratio, advantage)
    low, high, delta = (torch.as_tensor(x, dtype=log_ratio.dtype) for x in (low, high, guider_learner_ratio))
    excess = guider_learner_log_ratio - guider_learner_log_ratio.clamp(-delta.log(), delta.log())
    bounded = (log_ratio - excess).clamp(
        low.log(), high.log()
    )  # excess is 0 inside the interval and cancels the gradient outside
    bounds = {"low": low, "high": high}
    return torch.minimum(gain(log_ratio, advantage, **bounds), gain(bounded, advantage, **bounds))


@overload
def kl_interval(kl: float) -> tuple[float, float]: ...
@overload
def kl_interval(kl: Tensor) -> tuple[Tensor, Tensor]: ...
def kl_interval(kl: float | Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Ratio bounds that correspond to a KL divergence: the two roots of ``x - 1 - ln x = kl``.

    The mean of ``x - 1 - ln x`` at ``x = pi_new / pi_old`` under the old policy is ``KL(old || new)``, so a KL target
    gives an interval for the ratio of a single action. The interval is asymmetric: ``1 - low < high - 1`` and
    ``low * high < 1``.

    The roots are found by Newton's method on ``u = ln x`` in float64. From starting points outside the roots it
    converges monotonically: eight steps reach machine precision for any ``kl`` from 1e-12 to above 30.

    Reference: MARPO, https://arxiv.org/abs/2512.22832, Eqs. (9) to (11).

    Args:
        kl: divergence in nats, at least 0, finite; a float, or a tensor of any shape.

    Returns:
        ``(low, high)`` with ``0 <= low <= 1 <= high``: floats for a float; tensors of the shape, dtype and device of
        ``kl`` for a tensor. ``(1, 1)`` at ``kl = 0``. ``low`` is 0 only if the root underflows.

    Raises:
        ValueError: if ``kl`` is negative, NaN or infinite. (Under ``torch.compile`` a tensor's values are not checked;
            such entries give NaN instead.)

    Example:
        >>> low, high = kl_interval(0.1)
        >>> round(low, 6), round(high, 6)
        (0.616817, 1.516221)
    """
    if isinstance(kl, Tensor):
        if not kl.is_floating_point():
            raise ValueError(f"kl must be a float or a floating-point tensor, got {kl.dtype}.")
        if not torch.compiler.is_compiling():
            valid = (kl >= 0) & kl.isfinite()
            if not valid.all():
                raise ValueError(f"kl must be finite and at least 0, got {kl[~valid].flatten()[:8].tolist()}.")
        return kl_interval_unchecked(kl)
    if not 0 <= kl < math.inf:
        raise ValueError(f"kl must be a finite number of at least 0, got {kl!r}.")
    low, high = kl_interval_unchecked(torch.tensor(kl, dtype=torch.float64))
    return low.item(), high.item()


def kl_interval_unchecked(kl: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`kl_interval` of a tensor without checks or synchronisation; negative and non-finite entries give NaN."""
    target = kl.double()
    solvable = torch.where(target == 0, 1.0, target)  # avoids 0 / 0 in values and gradient
    width = math.sqrt(2) * solvable.sqrt()
    roots = torch.stack([-(solvable + width.clamp(max=1.0)), (width + solvable).log1p()])
    # Four steps suffice up to kl = 30; for eight, a compiler that inlines pointwise operations takes minutes.
    for _ in range(4 if torch.compiler.is_compiling() else 8):
        slope = roots.expm1()
        roots = roots - (slope - roots - solvable) / slope
    low, high = torch.where(target == 0, 1.0, roots.exp()).to(kl.dtype).unbind()
    return low, high


def _ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, extended linearly beyond 60 (a slope of 1e26, far from overflow).

    An overflow would make gradients NaN even where a clip removes them: 0 times infinity.
    """
    near = log_ratio.clamp(max=60.0)
    return near.exp() * (1 + (log_ratio - near))


def _target_ratio(advantage: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The ratio that a gain aims at: above 1 for a good action, below 1 for a bad one."""
    low, high = (torch.as_tensor(bound, dtype=advantage.dtype, device=advantage.device) for bound in (low, high))
    return torch.where(advantage >= 0, high, low)


def _check_same_shape(log_ratio: Tensor, advantage: Tensor) -> None:
    if log_ratio.shape != advantage.shape:
        raise ValueError(
            "log_ratio and advantage must have the same shape, "
            f"got {tuple(log_ratio.shape)} and {tuple(advantage.shape)}."
        )
