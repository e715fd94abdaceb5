"""What differences a number of seeds can show, from the spread of the stored runs: `python benchmarks/power.py`.

Prints two tables of results/plan.md. The spread of a task is the standard deviation of the absolute metric over seeds,
pooled over methods. A difference can be shown if a two-sided t-test of two methods at 5 % finds it in 80 % of studies.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from statistics import NormalDist, mean, median, variance

from episodes import absolute_returns, read_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
SEEDS = (5, 10, 20)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t by Cornish and Fisher's expansion, to 0.01 from four degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def smallest_effect(num_seeds: int, num_tasks: int = 1) -> float:
    """Smallest mean difference of two methods that can be shown, in standard deviations over seeds."""
    freedom = 2 * num_tasks * (num_seeds - 1)
    return (t_quantile(0.975, freedom) + t_quantile(0.8, freedom)) * sqrt(2 / (num_seeds * num_tasks))


def spreads() -> Iterable[tuple[str, str, float, float, float]]:
    """Suite, task, lowest and highest mean of its methods, and pooled standard deviation."""
    for path in sorted(RESULTS.glob("*.csv.gz")):
        for task, scores in absolute_returns(read_table(path)).items():
            methods = scores.values()
            means = [mean(seeds) for seeds in methods]
            weighted = sum((len(seeds) - 1) * variance(seeds) for seeds in methods)
            pooled = sqrt(weighted / sum(len(seeds) - 1 for seeds in methods))
            yield path.name.removesuffix(".csv.gz"), task, min(means), max(means), pooled


if __name__ == "__main__":
    seconds = defaultdict(list)
    for run in json.loads((RESULTS / "runs.json").read_text()):
        seconds[run["part"], run["task"]].append(run["seconds"])
    seeds = " | ".join(f"{number} seeds" for number in SEEDS)
    print(f"| suite | task | means of methods | spread over seeds | {seeds} |\n|---|---|---|---|" + "---|" * len(SEEDS))
    for suite, task, low, high, spread in spreads():
        cells = " | ".join(f"{spread * smallest_effect(number):.3g}" for number in SEEDS)
        print(f"| {suite} | {task} | {low:.3g} to {high:.3g} | {spread:.3g} | {cells} |")
    print(f"\n| tasks | {seeds} |\n|---|" + "---|" * len(SEEDS))
    for tasks in (1, 2, 3, 5, 8, 13):
        effects = [smallest_effect(number, tasks) for number in SEEDS]
        cells = [f"{effect:.2f} sd, {NormalDist().cdf(effect / sqrt(2)):.2f}" for effect in effects]
        print(f"| {tasks} | {' | '.join(cells)} |")
    print("\n| part | task | runs | median seconds of a run |\n|---|---|---|---|")
    for (part, task), each in seconds.items():
        print(f"| {part} | {task} | {len(each)} | {median(each):.0f} |")
