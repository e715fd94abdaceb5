"""Numbers of MARS's ablations, on runs whose answers follow by hand."""

from math import exp
from pathlib import Path

import pytest

pandas = pytest.importorskip("pandas")
FRAMES = [1_000_000 * step for step in range(1, 11)]


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import ratios

    return ratios


def test_a_slope_is_that_of_the_logarithm_over_a_million_frames(ratios) -> None:
    run = pandas.DataFrame({"frames": FRAMES, "min_ratio": [0.5 * exp(-0.3 * frames / 1e6) for frames in FRAMES]})
    assert ratios.slope(run, "min_ratio") == pytest.approx(-0.3)


@pytest.mark.parametrize(("threshold", "expected"), [(0, 4_000_000), (1, 10_000_000)], ids=["reached", "never"])
def test_a_return_is_reached_at_the_first_evaluation_above_it(ratios, threshold: float, expected: int) -> None:
    returns = [-1, -1, -0.5, 0, 0.5, -1, 0.9, 0.9, 0.9, 0.9]
    assert ratios.frames_to(pandas.DataFrame({"frames": FRAMES, "return": returns}), threshold) == expected


def test_the_end_compares_the_last_two_fifths_of_each_run(ratios) -> None:
    run = pandas.DataFrame({"frames": FRAMES, "return": [9, 9, 9, 9, 9, 9, 1.0, 2.0, 4.0, 6.0]})
    runs = pandas.concat([run.assign(method="a", seed=0), (-run).assign(method="a", seed=1)])
    assert ratios.by_method(runs, ratios.end) == {"a": [3.5, -3.5]}


def test_an_interval_is_students(ratios) -> None:
    assert ratios.interval([1, 2, 3, 4, 5]) == "3 [1.04, 4.96]"  # 2.776 sqrt(2.5 / 5)
