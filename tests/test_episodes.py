"""Stored evaluation episodes: their table loses nothing, and the numbers of the results page follow from them."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.episodes import absolute_returns, read_table, to_records, to_table, write_table

RESULTS = Path(__file__).parents[1] / "results"
DIGITS = {  # as the page prints the mean and, in brackets, the lowest and highest seed of a task
    "coordsum": {"CoordSum-3x10": 1, "CoordSum-5x20": 1},
    "magpo_ablations": {"CoordSum-3x10": 1},
    "magpo_navigation": {"navigation": 2},
    "marpo": {"navigation": 2, "reverse_transport": 2, "balance": 1},
    "marpo_sensitivity": {"balance": 2, "navigation": 2},
    "mars_ablations": {"AeroCombat-2v2": 2},
    "tuned": {"balance": 1, "navigation": 2, "PaxMen-4": 1, "AeroCombat-2v2": 2},
}
CELLS = {"balance": 1, "reverse_transport": 2, "black_blue_red": 3, "CoordSum-3x10": 0, "simple_spread_3ag": 1}
RECORDS = {
    "vmas": {
        "balance": {
            "mars": {
                "seed_0": {
                    "step_0": {"step_count": 0, "return": [0.1 + 0.2, -1e-17], "episode_length": [3, 4]},
                    "step_1": {"step_count": 100, "return": [1 / 3, 2.0], "episode_length": [5, 6]},
                    "absolute_metrics": {"return": [2.5, 3.0, 1.0], "episode_length": [7, 8, 9]},
                },
                "seed_12": {"absolute_metrics": {"return": [4.0], "episode_length": [1]}},
            }
        }
    },
    "smax": {"2s3z": {"qmix": {"seed_0": {"absolute_metrics": {"return": [1.5], "won": [1.0]}}}}},
}


def test_a_table_holds_every_number_of_the_records_and_is_the_same_file_each_time(tmp_path: Path) -> None:
    first, again = tmp_path / "first.csv.gz", tmp_path / "again.csv.gz"
    write_table(to_table(RECORDS), first)
    write_table(read_table(first), again)
    assert first.read_bytes() == again.read_bytes()
    assert json.loads(json.dumps(to_records(read_table(first)))) == RECORDS
    assert absolute_returns(read_table(first)) == {"balance": {"mars": [6.5 / 3, 4.0]}, "2s3z": {"qmix": [1.5]}}


@pytest.mark.parametrize("name", DIGITS)
def test_the_numbers_of_the_results_page_follow_from_the_stored_episodes(name: str) -> None:
    page = (RESULTS / "README.md").read_text().replace("**", "")
    for task, methods in absolute_returns(read_table(RESULTS / f"{name}.csv.gz")).items():
        for method, seeds in methods.items():
            mean, low, high = (f"{value:.{DIGITS[name][task]}f}" for value in (fmean(seeds), min(seeds), max(seeds)))
            assert f"{mean} ({low}, {high})" in page, f"{method} on {task}"


def test_the_cells_of_the_composition_are_the_means_of_the_stored_episodes() -> None:
    page = (RESULTS / "README.md").read_text().replace("**", "")
    scores = absolute_returns(read_table(RESULTS / "composition.csv.gz"))
    assert [*scores] == [*CELLS]
    for method in scores["balance"]:
        cells = [f"{fmean(scores[task][method]):.{digits}f}" for task, digits in CELLS.items()]
        assert f"| {' | '.join([*method.split('+'), *cells])} |" in page
