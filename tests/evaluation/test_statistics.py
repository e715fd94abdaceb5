"""Statistics against closed forms and against rliable (its outputs are stored in rliable_vectors.json)."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from torchrl_marl.evaluation import (
    iqm,
    min_max_normalize,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    stratified_bootstrap_interval,
)

VECTORS = json.loads((Path(__file__).parent / "rliable_vectors.json").read_text())["cases"]
SCORES = np.random.default_rng(0).normal(size=(10, 4))


class Replay(np.random.Generator):
    """Generator that hands out stored indices."""

    def __init__(self, indices: list) -> None:
        super().__init__(np.random.PCG64())
        self.indices = iter(indices)

    def integers(self, *_: object, size: tuple[int, ...], **__: object) -> np.ndarray:
        chosen = np.array(next(self.indices))
        assert chosen.shape == size
        return chosen


@pytest.mark.parametrize("count", range(1, 13))
def test_iqm_of_one_to_n_drops_a_quarter_rounded_down_at_either_end(count: int) -> None:
    kept = list(range(1 + count // 4, count + 1 - count // 4))
    assert iqm(np.random.default_rng(0).permutation(np.arange(1, count + 1))) == sum(kept) / len(kept)


def test_iqm_moves_and_scales_with_the_scores_and_ignores_outliers() -> None:
    assert iqm(3 * SCORES - 2) == pytest.approx(3 * iqm(SCORES) - 2, abs=1e-12)
    spoilt = SCORES.copy()
    spoilt[SCORES == SCORES.max()] = 1e9
    assert iqm(spoilt) == iqm(SCORES)


def test_iqm_over_axes_is_the_iqm_of_each_slice() -> None:
    curves = np.random.default_rng(1).normal(size=(7, 3, 5))
    expected = [iqm(curves[:, :, evaluation]) for evaluation in range(5)]
    np.testing.assert_allclose(iqm(curves, axis=(0, 1)), expected, rtol=1e-14)
    np.testing.assert_allclose(sample_efficiency(curves), expected, rtol=1e-14)


def test_a_copy_improves_with_probability_one_half_and_a_shifted_copy_always() -> None:
    assert probability_of_improvement(SCORES, SCORES) == 0.5
    assert probability_of_improvement(SCORES + 100, SCORES) == 1
    assert probability_of_improvement(SCORES - 100, SCORES) == 0


def test_probabilities_of_improvement_in_both_directions_sum_to_one() -> None:
    ours, theirs = SCORES.round(1), np.random.default_rng(3).normal(size=(6, 4)).round(1)
    pairs = [x > y or 0.5 * (x == y) for task in range(4) for x, y in product(ours[:, task], theirs[:, task])]
    assert probability_of_improvement(ours, theirs) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert probability_of_improvement(ours, theirs) + probability_of_improvement(theirs, ours) == pytest.approx(1)


def test_the_gap_is_zero_where_the_target_is_reached_and_the_mean_shortfall_elsewhere() -> None:
    assert optimality_gap([1.0, 5.0]) == 0
    assert optimality_gap([[0.25, 0.75], [9.0, 0.5]], target=1.0) == pytest.approx((0.75 + 0.25 + 0 + 0.5) / 4)
    assert optimality_gap(SCORES, target=50.0) == pytest.approx(50 - SCORES.mean())


def test_a_profile_falls_from_one_to_zero_and_its_area_is_the_mean() -> None:
    scores = np.random.default_rng(2).uniform(size=(20, 3))
    thresholds = np.linspace(0, 1, 100_001)
    profile = performance_profile(scores, thresholds)
    assert profile[0] == 1
    assert profile[-1] == 0
    assert (np.diff(profile) <= 0).all()
    assert profile.mean() == pytest.approx(scores.mean(), abs=1e-4)  # E[X] is the integral of P(X > t)


def test_normalisation_maps_the_bounds_of_each_task_to_zero_and_one() -> None:
    low, high = np.array([-3.0, 10.0]), np.array([5.0, 20.0])
    np.testing.assert_array_equal(
        min_max_normalize([low, high, (low + high) / 2], low, high), [[0, 0], [1, 1], [0.5] * 2]
    )


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{np.shape(case['scores'])}")
def test_equal_to_rliable(case: dict) -> None:
    scores, baseline = np.array(case["scores"]), np.array(case["baseline"])
    tight = {"rel": 0, "abs": 1e-12}
    assert iqm(scores) == pytest.approx(case["iqm"], **tight)
    assert optimality_gap(scores) == pytest.approx(case["optimality_gap"], **tight)
    expected = case["probability_of_improvement"]
    assert probability_of_improvement(scores, baseline) == pytest.approx(expected, **tight)
    assert performance_profile(scores, case["thresholds"]) == pytest.approx(np.array(case["profile"]), **tight)
    interval = stratified_bootstrap_interval(scores, num_resamples=100, rng=Replay(case["indices"]))
    assert interval == pytest.approx(tuple(case["iqm_interval"]), **tight)
    interval = stratified_bootstrap_interval(
        (scores, baseline), probability_of_improvement, num_resamples=100, rng=Replay(case["pair_indices"])
    )
    assert interval == pytest.approx(tuple(case["improvement_interval"]), **tight)


def test_resampling_never_mixes_tasks_and_keeps_curves_whole() -> None:
    runs, tasks, evaluations = np.ogrid[:6, :3, :4]
    curves = runs + 100.0 * tasks + 10_000.0 * evaluations
    seen = []

    def keep(resample: np.ndarray) -> float:
        seen.append(resample)
        return 0.0

    stratified_bootstrap_interval(curves, keep, num_resamples=50)
    chosen = np.stack(seen) - 100.0 * tasks - 10_000.0 * evaluations
    assert set(np.unique(chosen)) == set(range(6))  # nothing but runs differs
    assert (chosen == chosen[..., :1]).all()
    assert (chosen[:, :, 0] != chosen[:, :, 1]).any()  # each task draws for itself


def test_the_interval_is_that_of_the_exact_bootstrap_distribution() -> None:
    scores = np.array([0.0, 1.0, 3.0])
    exact = np.quantile([np.mean(draw) for draw in product(scores, repeat=3)], [0.05, 0.95])
    assert stratified_bootstrap_interval(scores, np.mean, confidence=0.9, num_resamples=20_000) == tuple(exact)


def test_one_value_gives_an_interval_of_no_width_and_the_same_seed_the_same_interval() -> None:
    assert stratified_bootstrap_interval(np.full((5, 2), 3.0)) == (3, 3)
    assert stratified_bootstrap_interval(SCORES, rng=4) == stratified_bootstrap_interval(SCORES, rng=4)
    assert stratified_bootstrap_interval(SCORES, rng=4) != stratified_bootstrap_interval(SCORES, rng=5)


def test_the_interval_of_a_curve_is_one_for_each_evaluation() -> None:
    curves = np.random.default_rng(0).normal(size=(8, 3, 5))
    low, high = stratified_bootstrap_interval(curves, sample_efficiency, num_resamples=100)
    alone = stratified_bootstrap_interval(curves[..., 2], num_resamples=100)
    assert low.shape == high.shape == (5,)
    assert (low[2], high[2]) == pytest.approx(alone, rel=1e-14)


@pytest.mark.slow
def test_95_percent_intervals_hold_the_true_value_in_92_to_98_percent_of_studies() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(500):  # studies of 20 runs on five tasks; the IQM of a symmetric distribution is its centre
        low, high = stratified_bootstrap_interval(rng.normal(size=(20, 5)), rng=rng)
        held.append(low <= 0 <= high)
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")]])
def test_no_score_and_nan_are_refused(bad: list) -> None:
    for function in (iqm, optimality_gap, stratified_bootstrap_interval):
        with pytest.raises(ValueError, match="scores must be numbers"):
            function(bad)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement(SCORES, SCORES[:, :2])
    with pytest.raises(ValueError, match="runs, tasks, evaluations"):
        sample_efficiency(SCORES)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        stratified_bootstrap_interval(SCORES, confidence=95)
    with pytest.raises(ValueError, match="high must be above low"):
        min_max_normalize(SCORES, 1.0, 1.0)
    with pytest.raises(ValueError, match="do not match"):
        min_max_normalize(SCORES, [0.0, 0.0], [1.0, 1.0])
