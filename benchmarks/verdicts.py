"""The results page and every verdict, from the stored episodes: `python benchmarks/verdicts.py --output runs/results`.

Writes PAGE/README.md and PAGE/page.html: for each table of results/ the learning curves, the score of every method,
aggregates over tasks, and the rows of results/plan.md that compare methods, with the verdict of its rule "better":
confirmed if the 95 % interval of the probability that a run of A beats one of B lies above 0.5 and the 95 % interval of
the mean difference, in spreads over seeds averaged over tasks, above 0; contradicted if both lie below; else undecided,
with both intervals. Comparisons of one row are corrected by Holm's method. A score is the absolute metric of a run.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import mean, variance
from typing import Any, NamedTuple, cast

import numpy as np
from episodes import FRAMES, RUN, absolute_returns, read_table
from pandas import DataFrame, read_csv
from power import RESULTS, t_quantile
from study import BASE

from torchrl_marl.evaluation.figures import Band, draw_aggregates, draw_curves, draw_intervals
from torchrl_marl.evaluation.page import Page
from torchrl_marl.evaluation.statistics import (
    iqm,
    min_max_normalize,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    stratified_bootstrap_interval,
)

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Scores of runs, by task and method."""


AXES = ("trust region", "reflection", "data", "order")
"""Axes of the composition, as the names of its cells have them."""


class Comparison(NamedTuple):
    """A row of results/plan.md that says that one method is better than others."""

    row: str
    suite: str  # results/SUITE.csv.gz
    method: str
    others: Sequence[str]
    tasks: Sequence[str] = ()  # all of the suite


COMPARISONS = [
    *(Comparison("M1", "tuned", "mars", ("mappo", "maspo"), (task,)) for task in ("balance", "navigation")),
    *(Comparison("M1", "tuned", "mars", ("mappo", "maspo"), (task,)) for task in ("PaxMen-4", "AeroCombat-2v2")),
    Comparison("M1, four tasks", "tuned", "mars", ("mappo", "maspo")),
    Comparison("M8", "mars_ablations", "mars", ("maspo_asymmetric", "mappo_asymmetric")),
    *(Comparison("P1", "marpo", "marpo", ("mappo",), (task,)) for task in ("balance", "navigation")),
    Comparison("P1", "reverse_transport", "marpo", ("mappo",)),
    Comparison("P1, three tasks, five seeds", "marpo", "marpo", ("mappo",)),
    Comparison("P3, one task", "reverse_transport", "marpo", ("mappo", "rpo")),
    Comparison("P3, two tasks, five seeds", "marpo", "marpo", ("mappo", "rpo"), ("reverse_transport", "balance")),
    Comparison("Q", "spread_discrete", "mappo", ("qmix", "vdn")),
    *(
        Comparison("G1, G2", "coordsum", "magpo", ("mappo", "ippo", "ctds", "mat_mappo", "sable_mappo"), (task,))
        for task in ("CoordSum-3x10", "CoordSum-5x20")
    ),
    Comparison("G3, one task", "coordsum", "magpo", ("ctds",), ("CoordSum-3x10",)),
    Comparison("G1, G2", "magpo_navigation", "magpo", ("mappo", "ippo", "ctds", "mat_mappo", "sable_mappo")),
]


class Estimate(NamedTuple):
    """An estimate with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def difference(scores: Scores, method: str, other: str, *, level: float = 0.05) -> Estimate:
    """Mean difference of two methods in standard deviations over seeds, averaged over tasks, with its t-interval.

    The standard deviation of a task is pooled over both methods; a task without any spread counts as no difference.
    """
    effects, squares, freedom = [], 0.0, 0
    for of_task in scores.values():
        one, two = of_task[method], of_task[other]
        own = len(one) + len(two) - 2
        spread = sqrt(((len(one) - 1) * variance(one) + (len(two) - 1) * variance(two)) / own)
        effects.append((mean(one) - mean(two)) / spread if spread else 0.0)
        squares, freedom = squares + 1 / len(one) + 1 / len(two), freedom + own
    half = t_quantile(1 - level / 2, freedom) * sqrt(squares) / len(effects)
    return Estimate(mean(effects), mean(effects) - half, mean(effects) + half)


def improvement(scores: Scores, method: str, other: str, *, level: float = 0.05) -> Estimate:
    """Probability that a run of a method beats one of another, averaged over tasks, with its bootstrap interval."""
    pair = tuple(np.stack([of_task[name] for of_task in scores.values()], -1) for name in (method, other))
    low, high = stratified_bootstrap_interval(pair, probability_of_improvement, confidence=1 - level)
    return Estimate(probability_of_improvement(*pair), low, high)


def verdict(probability: Estimate, effect: Estimate) -> str:
    """The plan's rule "better"."""
    if probability.low > 0.5 and effect.low > 0:
        return "confirmed"
    return "contradicted" if probability.high < 0.5 and effect.high < 0 else "undecided"


def verdicts(pairs: Sequence[tuple[Scores, str, str]]) -> list[tuple[Estimate, Estimate, str]]:
    """Compare pairs of methods by Holm's method: the clearest first, at a level that rises until one is undecided.

    Args:
        pairs: scores, the method that is to be better, and the other, of every comparison of a row.

    Returns:
        For each pair, in order, both estimates at the level of its turn, and the verdict.
    """

    def clarity(index: int) -> float:
        effect = difference(*pairs[index])
        return -abs(effect.value) / (effect.high - effect.value)

    rows: dict[int, tuple[Estimate, Estimate, str]] = {}
    hypotheses, decided = len(pairs), True
    for index in sorted(range(len(pairs)), key=clarity):
        probability, effect = (bound(*pairs[index], level=0.05 / hypotheses) for bound in (improvement, difference))
        found = verdict(probability, effect) if decided else "undecided"
        rows[index] = probability, effect, found
        decided = found != "undecided"
        hypotheses -= decided and hypotheses > 1
    return [rows[index] for index in range(len(pairs))]


def main_effects(scores: Scores, base: str, *, level: float = 0.05) -> Iterable[tuple[int, str, str, Estimate]]:
    """Effects of the axes of a balanced design whose methods are words joined by "+", one for each axis.

    The effect of a level is the mean of all cells with it less the mean of all cells with the base's level, in standard
    deviations over seeds, averaged over tasks.

    Yields:
        Axis, level, the base's level, and the effect with its t-interval.
    """
    freedom = sum(len(seeds) - 1 for of_task in scores.values() for seeds in of_task.values())
    for task, of_task in scores.items():
        for axis, words in enumerate(zip(*(method.split("+") for method in of_task), strict=True)):
            if len({words.count(word) for word in words}) > 1:
                raise ValueError(f"{task}: the levels of axis {axis} have unequal numbers of cells.")
    for axis, first in enumerate(base.split("+")):
        levels = dict.fromkeys(method.split("+")[axis] for of_task in scores.values() for method in of_task)
        for other in levels:
            if other == first:
                continue
            effects, squares = [], 0.0
            for of_task in scores.values():
                spread = sqrt(mean(variance(seeds) for seeds in of_task.values())) or 1.0
                sides = [
                    [seeds for method, seeds in of_task.items() if method.split("+")[axis] == word]
                    for word in (other, first)
                ]
                one, two = (mean(map(mean, cells)) for cells in sides)
                effects.append((one - two) / spread)
                squares += sum(sum(1 / len(seeds) for seeds in cells) / len(cells) ** 2 for cells in sides)
            half = t_quantile(1 - level / 2, freedom) * sqrt(squares) / len(effects)
            yield axis, other, first, Estimate(mean(effects), mean(effects) - half, mean(effects) + half)


def curves(table: DataFrame) -> dict[str, dict[str, tuple[Any, Any]]]:
    """By task and method, the frames of evaluations ``[evaluations]`` and mean returns ``[runs, evaluations]``."""
    evaluations = table[table[FRAMES].notna()].groupby([*RUN, FRAMES], sort=False)["return"].mean().reset_index()
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for key, runs in evaluations.groupby(["task", "method"], sort=False):
        wide = runs.pivot(index="seed", columns=FRAMES, values="return").dropna(axis="columns")
        task, method = cast("tuple[str, str]", key)
        found.setdefault(task, {})[method] = wide.columns.to_numpy(float), wide.to_numpy()
    return found


def estimate(values: Any, statistic: Any) -> tuple[Any, Any, Any]:
    return (statistic(values), *stratified_bootstrap_interval(values, statistic))


def draw_returns(over_frames: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Any:
    """Learning curves: IQM over runs with its bootstrap interval."""
    bands = {
        task: {
            method: Band(frames, *estimate(returns[:, None], sample_efficiency))
            for method, (frames, returns) in of_task.items()
        }
        for task, of_task in over_frames.items()
    }
    return draw_curves(bands, ylabel="evaluation return")


def add_composition(page: Page, table: DataFrame) -> None:
    """Add the main effects of the composition's cells, and the learning curves of its trust regions."""
    page.heading("Main effects of the composition")
    cells = table.loc[table["method"].str.count(r"\+") == BASE.count("+")]  # guiders take part, too
    scores = absolute_returns(cells)
    played_by = {"all tasks": scores, **{task: {task: each} for task, each in scores.items()}}
    panels = {
        title: {f"{AXES[axis]}: {level}": effect for axis, level, _, effect in main_effects(played, BASE)}
        for title, played in played_by.items()
    }
    levels = BASE.replace("+", ", ")
    figure = draw_intervals(panels, baseline=levels, xlabel="effect, in spreads over seeds,", at=0)
    text = "Effects of each axis on the absolute metric, over all tasks and on each, with 95 % intervals."
    page.figure(figure, "main_effects", text)
    rows = [(name, *(str(panel[name]) for panel in panels.values())) for name in panels["all tasks"]]
    page.table(["effect, in spreads over seeds", *panels], rows)
    regions, runs = cells["method"].str.partition("+")[0], cells["method"] + cells["seed"].astype(str)
    text = "Runs of all cells with a trust region: IQM with its 95 % bootstrap interval."
    page.figure(draw_returns(curves(cells.assign(method=regions, seed=runs))), "trust_regions", text)


def add_suite(page: Page, suite: str, table: DataFrame) -> None:
    """Add a suite's curves, scores, and aggregates over its tasks if all methods played all of them."""
    page.heading(suite)
    scores, over_frames = absolute_returns(table), curves(table)
    figure = draw_returns(over_frames)
    page.figure(figure, f"{suite}_curves", f"{suite}: IQM over seeds with its 95 % bootstrap interval.")
    rows = [
        (task, method, str(len(runs)), *(str(Estimate(*estimate(np.array(runs)[:, None], s))) for s in (iqm, np.mean)))
        for task, of_task in scores.items()
        for method, runs in of_task.items()
    ]
    page.table(["task", "method", "seeds", "IQM of the absolute metric", "mean"], rows, text_columns=2)
    methods = list(dict.fromkeys(method for of_task in scores.values() for method in of_task))
    counts = {len(of_task.get(method, ())) for of_task in scores.values() for method in methods}
    if len(scores) > 1 and len(counts) == 1:
        add_aggregates(page, suite, scores, over_frames, methods)


def add_aggregates(page: Page, suite: str, scores: Scores, over_frames: Any, methods: Sequence[str]) -> None:
    """Add sample efficiency and performance profiles, normalised by the lowest and highest value of a task."""
    tasks, percent, thresholds = list(scores), np.linspace(0, 100, 101), np.linspace(0, 1, 101)
    values = {
        task: np.concatenate(
            [*(returns.ravel() for _, returns in over_frames[task].values()), *map(np.array, scores[task].values())]
        )
        for task in tasks
    }
    low, high = (np.array([bound(values[task]) for task in tasks]) for bound in (np.min, np.max))
    efficiency, profiles = {}, {}
    for method in methods:
        along = np.stack(
            [
                [np.interp(percent, 100 * frames / frames[-1], run) for run in returns]
                for frames, returns in (over_frames[task][method] for task in tasks)
            ],
            -1,
        )
        normalized = np.moveaxis(min_max_normalize(along, low, high), -1, 1)
        ends = min_max_normalize(np.stack([scores[task][method] for task in tasks], -1), low, high)
        efficiency[method] = Band(percent, *estimate(normalized, sample_efficiency))
        profiles[method] = Band(thresholds, *estimate(ends, lambda runs: 100 * performance_profile(runs, thresholds)))
    text = f"{suite} over {len(tasks)} tasks, normalised by the lowest and highest value of each, with 95 % intervals."
    page.figure(draw_aggregates(efficiency, profiles), f"{suite}_aggregates", text)


def beside_published(published: DataFrame, over_frames: Any) -> Iterable[tuple[str, ...]]:
    """Rows of results/published.csv beside our mean at those frames, or at our last ones if our runs are shorter."""
    for _, task, method, frames, value, spread, source in published.itertuples(index=False):
        if method in over_frames.get(task, {}):
            ours, returns = over_frames[task][method]
            at = int(np.searchsorted(ours, frames).clip(max=len(ours) - 1))
            theirs = f"{value:g}" if np.isnan(spread) else f"{value:g} ± {spread:g}"
            own = f"{returns[:, at].mean():.4g} ± {returns[:, at].std(ddof=1):.2g}"
            yield task, method, source, f"{frames:,}", theirs, f"{ours[at]:,.0f}", own


def write_page(output: Path) -> Path:
    """Write the page; return its address."""
    read = cache(lambda suite: read_table(RESULTS / f"{suite}.csv.gz"))
    page = Page(output, title="Results, rebuilt from the stored episodes")
    page.heading("Verdicts")
    page.paragraph(" ".join(str(__doc__).split("\n\n")[1].split()))
    rows = []
    for row in dict.fromkeys(comparison.row for comparison in COMPARISONS):
        pairs, named = [], []
        for _, suite, method, others, tasks in (one for one in COMPARISONS if one.row == row):
            scores = {task: runs for task, runs in absolute_returns(read(suite)).items() if not tasks or task in tasks}
            pairs += [(scores, method, other) for other in others]
            named += [(row, ", ".join(tasks or scores), f"{method} over {other}") for other in others]
        rows += [(*names, *map(str, found)) for names, found in zip(named, verdicts(pairs), strict=True)]
    page.table(["row", "tasks", "better", "probability", "difference, in spreads", "verdict"], rows, text_columns=3)
    suites = sorted(path.name.removesuffix(".csv.gz") for path in RESULTS.glob("*.csv.gz"))
    if "composition" in suites:
        add_composition(page, read("composition"))
    page.heading("Beside published numbers")
    page.paragraph("Means and standard deviations over seeds, at the frames named, or at our last ones.")
    rows = []
    for suite, published in read_csv(RESULTS / "published.csv").groupby("suite", sort=False):
        if suite in suites:
            rows += beside_published(published, curves(read(suite)))
    columns = ["task", "method", "source", "frames", "published", "our frames", "ours"]
    page.table(columns, rows, text_columns=3)
    for suite in suites:
        add_suite(page, suite, read(suite))
    page.write()
    return output / "page.html"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    print(write_page(parser.parse_args().output))
