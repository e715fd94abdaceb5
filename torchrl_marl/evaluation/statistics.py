"""Statistics over runs, tasks and episodes, for the tables and figures of a comparison.

Scores are arrays with runs (one seed each) as the first dimension and, optionally, tasks as the second: ``[runs]``,
``[runs, tasks]`` or, for curves, ``[runs, tasks, evaluations]``.

Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021,
https://arxiv.org/abs/2108.13264, which Gorsane et al., Towards a Standardised Performance Evaluation Protocol for
Cooperative MARL, 2022, https://arxiv.org/abs/2209.10485, follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "iqm",
    "min_max_normalize",
    "optimality_gap",
    "performance_profile",
    "probability_of_improvement",
    "sample_efficiency",
    "stratified_bootstrap_interval",
]

Floats = NDArray[np.float64]


def iqm(scores: ArrayLike, axis: int | tuple[int, ...] | None = None) -> Any:
    """Interquartile mean: the mean of the middle half of the scores, over runs and tasks together.

    It is the 25 % trimmed mean: a quarter of the number of scores, rounded down, is dropped at either end.

    Args:
        scores: scores, of any shape.
        axis: axis or axes to reduce; ``None`` reduces all.

    Returns:
        Interquartile mean, of the shape of ``scores`` without ``axis``.

    Raises:
        ValueError: if there are no scores, or one is NaN.

    Example:
        >>> float(iqm([0.0, 1.0, 2.0, 100.0]))
        1.5
    """
    scores = _array(scores)
    axes = tuple(range(scores.ndim)) if axis is None else tuple(np.atleast_1d(axis))
    last = np.moveaxis(scores, axes, range(-len(axes), 0))
    ordered = np.sort(last.reshape(*last.shape[: last.ndim - len(axes)], -1), axis=-1)
    dropped = ordered.shape[-1] // 4
    return ordered[..., dropped : ordered.shape[-1] - dropped].mean(-1)


def optimality_gap(scores: ArrayLike, *, target: float = 1.0) -> float:
    """Mean amount by which scores fall short of a target; scores above the target do not compensate.

    Args:
        scores: normalised scores, of any shape.
        target: score of a solved task.

    Returns:
        Gap, 0 if every score reaches the target.

    Raises:
        ValueError: if there are no scores, or one is NaN.

    Example:
        >>> optimality_gap([0.5, 0.75, 3.0])
        0.25
    """
    return float(target - np.minimum(_array(scores), target).mean())


def probability_of_improvement(scores: ArrayLike, baseline: ArrayLike) -> float:
    """Probability that a run of one method beats a run of another on a random task; a tie counts half.

    For each task, this is the Mann-Whitney U statistic divided by the number of pairs of runs.

    Args:
        scores: ``[runs]`` or ``[runs, tasks]``.
        baseline: scores of the other method, ``[other runs]`` or ``[other runs, tasks]``.

    Returns:
        Probability, mean over tasks.

    Raises:
        ValueError: if the two have different tasks, there are no scores, or one is NaN.

    Example:
        >>> probability_of_improvement([1.0, 2.0, 3.0], [0.0, 2.0])  # wins 1 + 1.5 + 2 of 6 pairs
        0.75
    """
    ours, theirs = _array(scores), _array(baseline)
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"scores must be [runs, ...] over the same tasks, got {ours.shape} and {theirs.shape}.")
    difference = ours[:, None] - theirs[None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Fraction of scores of all runs and tasks above each threshold, which shows the whole distribution.

    Args:
        scores: normalised scores, of any shape.
        thresholds: ``[thresholds]``.

    Returns:
        Fractions, ``[thresholds]``.

    Raises:
        ValueError: if there are no scores, or one is NaN.

    Example:
        >>> performance_profile([[0.2, 0.9], [0.4, 1.0]], [0.0, 0.5, 0.95])
        array([1.  , 0.5 , 0.25])
    """
    return (_array(scores).reshape(-1, 1) > _array(thresholds)).mean(0)


def sample_efficiency(curves: ArrayLike) -> Floats:
    """Interquartile mean over runs and tasks at every evaluation.

    Args:
        curves: normalised scores, ``[runs, tasks, evaluations]``.

    Returns:
        Curve, ``[evaluations]``.

    Raises:
        ValueError: if there are no scores, one is NaN, or they have another number of dimensions.

    Example:
        >>> sample_efficiency([[[0.0, 1.0]], [[0.5, 2.0]]])  # two runs, one task, two evaluations
        array([0.25, 1.5 ])
    """
    curves = _array(curves)
    if curves.ndim != 3:
        raise ValueError(f"curves must be [runs, tasks, evaluations], got shape {curves.shape}.")
    return iqm(curves, axis=(0, 1))


def min_max_normalize(scores: ArrayLike, low: ArrayLike, high: ArrayLike) -> Floats:
    """Scale scores so that ``low`` becomes 0 and ``high`` becomes 1, with separate bounds per task and no clipping.

    Args:
        scores: ``[..., tasks]``, or scores of one task.
        low: return that becomes 0, ``[tasks]`` or a number.
        high: return that becomes 1, ``[tasks]`` or a number.

    Returns:
        Normalised scores, same shape as ``scores``.

    Raises:
        ValueError: if a bound ``high`` is not above ``low``, or the bounds do not match the tasks.

    Example:
        >>> min_max_normalize([[0.0, -5.0], [4.0, 0.0]], low=[0.0, -10.0], high=[4.0, 0.0])
        array([[0. , 0.5],
               [1. , 1. ]])
    """
    scores, low, high = _array(scores), _array(low), _array(high)
    for bound in (low, high):
        if bound.ndim and bound.shape != scores.shape[-1:]:
            raise ValueError(f"bounds of shape {bound.shape} do not match scores of shape {scores.shape}.")
    if not (high > low).all():
        raise ValueError(f"high must be above low for every task, got low {low} and high {high}.")
    return (scores - low) / (high - low)


def stratified_bootstrap_interval(
    scores: ArrayLike | tuple[ArrayLike, ...],
    statistic: Callable[..., Any] = iqm,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    rng: int | np.random.Generator = 0,
) -> tuple[Any, Any]:
    """Percentile interval of a statistic under resampling of the runs, independently for each task.

    A resample draws as many runs as there are, with replacement, independently for each task (the strata); a run's
    curve is kept whole. Intervals from few runs are too narrow: for the IQM of normal scores on five tasks, 95 %
    intervals held the true value in 95 % of simulated studies with 20 runs, 93 % with 10, 91 % with 5, and 87 % with 3
    (75 % with 3 runs of one task).

    Args:
        scores: ``[runs]``, ``[runs, tasks]`` or ``[runs, tasks, ...]``; or a tuple of such arrays, which are resampled
            independently of each other and passed to ``statistic`` in order.
        statistic: function of such an array, or of as many arrays as the tuple holds, to a number or an array.
        confidence: nominal coverage of the interval.
        num_resamples: number of resamples.
        rng: seed or generator of the resamples; each resample draws, array by array, one
            ``integers(runs, size=(runs, tasks))``.

    Returns:
        Lower and upper bound, with the shape of the result of ``statistic``.

    Raises:
        ValueError: if there are no scores, one is NaN, or ``confidence`` is not between 0 and 1.

    Example:
        >>> scores = np.random.default_rng(0).normal(size=(10, 5))  # ten runs, five tasks, true value 0
        >>> low, high = stratified_bootstrap_interval(scores)
        >>> bool(low < 0 < high)
        True
        >>> low, high = stratified_bootstrap_interval((scores + 1, scores), probability_of_improvement)
        >>> bool(low > 0.5)
        True
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    samples = [_array(sample) for sample in (scores if isinstance(scores, tuple) else (scores,))]
    rng = np.random.default_rng(rng)
    values = [statistic(*(_resample(sample, rng) for sample in samples)) for _ in range(num_resamples)]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _resample(scores: Floats, rng: np.random.Generator) -> Floats:
    strata = np.arange(scores.shape[1]) if scores.ndim > 1 else ()
    chosen = rng.integers(len(scores), size=scores.shape[:2])
    return scores[chosen, strata] if scores.ndim > 1 else scores[chosen]


def _array(scores: ArrayLike) -> Floats:
    array = np.asarray(scores, dtype=np.float64)
    if array.size == 0 or np.isnan(array).any():
        raise ValueError(f"scores must be numbers, at least one and none of them NaN, got shape {array.shape}.")
    return array
