"""The rules of results/plan.md, on scores whose answers follow by hand."""

from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import verdicts

    return verdicts


CLOSE = {
    "task": {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.5, 2.5, 3.5, 4.5, 0.5], "far": [-9.0, -8.0, -7.0, -6.0, -5.0]}
}


def test_a_difference_is_in_pooled_spreads_with_students_interval(rules):
    found = rules.difference(CLOSE, "a", "far")
    spread = sqrt(2.5)  # the variance of five neighbours, in both methods
    assert found.value == pytest.approx(10 / spread)
    assert found.high - found.value == pytest.approx(2.306 * sqrt(2 / 5), rel=2e-3)  # t of 8 degrees of freedom


def test_two_tasks_are_averaged_and_halve_the_variance(rules):
    twice = {"one": CLOSE["task"], "two": {name: [-x for x in runs] for name, runs in CLOSE["task"].items()}}
    found = rules.difference(twice, "a", "far")
    assert found.value == pytest.approx(0)
    assert found.high == pytest.approx(2.120 * sqrt(4 / 5) / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("method", "other", "expected"), [("a", "far", "confirmed"), ("far", "a", "contradicted"), ("a", "b", "undecided")]
)
def test_a_verdict_needs_both_intervals(rules, method, other, expected):
    assert rules.verdicts([(CLOSE, method, other)])[0][-1] == expected


def test_holm_corrects_by_the_number_of_hypotheses_that_are_left(rules):
    (_, two, open_), (_, one, sure) = rules.verdicts([(CLOSE, "a", "b"), (CLOSE, "a", "far")])
    assert (sure, open_) == ("confirmed", "undecided")
    assert one == rules.difference(CLOSE, "a", "far", level=0.025)
    assert two == rules.difference(CLOSE, "a", "b", level=0.05)


def test_holm_decides_nothing_after_the_first_that_is_open(rules, monkeypatch):
    pairs = [(CLOSE, "b", "far"), (CLOSE, "a", "far")]
    assert [found for *_, found in rules.verdicts(pairs)] == ["confirmed", "confirmed"]
    runs = rules.improvement
    open_ = rules.Estimate(0.6, 0.4, 0.8)  # of the pair with the clearer difference
    monkeypatch.setattr(rules, "improvement", lambda *pair, level: open_ if "a" in pair else runs(*pair, level=level))
    assert [found for *_, found in rules.verdicts(pairs)] == ["undecided", "undecided"]


def test_main_effects_of_half_a_design_are_those_of_an_additive_truth(rules):
    def runs(value: float) -> list[float]:
        return [value - 1, value, value + 1]  # a standard deviation of 1

    half: Mapping[str, list[float]] = {  # barrier adds 3, reuse 1, together 4; no two cells differ in one axis alone
        "clip+own+turns": runs(0),
        "clip+reuse+together": runs(1 + 4),
        "barrier+own+together": runs(3 + 4),
        "barrier+reuse+turns": runs(3 + 1),
    }
    effects = list(rules.main_effects({"task": half}, "clip+own+turns"))
    assert [(axis, level, first) for axis, level, first, _ in effects] == [
        (0, "barrier", "clip"),
        (1, "reuse", "own"),
        (2, "together", "turns"),
    ]
    assert [effect.value for *_, effect in effects] == pytest.approx([3, 1, 4])
    widths = [effect.high - effect.value for *_, effect in effects]
    assert widths == pytest.approx([2.306 / sqrt(3)] * 3, rel=2e-3)  # 8 degrees of freedom, two means of six runs
    with pytest.raises(ValueError, match="task: the levels of axis 0 have unequal numbers of cells"):
        list(rules.main_effects({"task": {name: half[name] for name in list(half)[:3]}}, "clip+own+turns"))


def test_published_numbers_stand_beside_ours_at_the_same_frames_or_at_our_last(rules):
    import numpy as np
    from pandas import DataFrame

    rows = [("s", "t", "m", frames, 4.0, spread, "them") for frames, spread in ((20, 0.5), (90, np.nan))]
    rows += [("s", "t", "unknown", 20, 1.0, 1.0, "them")]
    published = DataFrame(rows, columns=["suite", "task", "method", "frames", "value", "spread", "source"])
    ours = {"t": {"m": (np.array([10.0, 20.0, 30.0]), np.array([[0.0, 1.0, 5.0], [0.0, 3.0, 7.0]]))}}
    assert list(rules.beside_published(published, ours)) == [
        ("t", "m", "them", "20", "4 ± 0.5", "20", "2 ± 1.4"),
        ("t", "m", "them", "90", "4", "30", "6 ± 1.4"),
    ]
