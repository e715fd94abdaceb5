"""MARS's ablations: how far ratios go, when a return of 0 is reached, and what the end of training brings.

    python benchmarks/ratios.py collect runs/plan/aerocombat_ablations  # stores their ratios
    python benchmarks/ratios.py  # rows M3, M4 and M6 of results/plan.md, from stored runs

Intervals are t-intervals over seeds, 95 %. A slope is that of the logarithm of an iteration's smallest or largest
ratio, by least squares.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import cast

import numpy as np
import pandas
from episodes import FRAMES, read_table, write_table
from omegaconf import OmegaConf
from pandas import DataFrame
from power import RESULTS, t_quantile

RATIOS = ("min_ratio", "max_ratio")
STORED = RESULTS / "aerocombat_ablations_ratios.csv.gz"


def collect(folder: Path) -> DataFrame:
    """A row for each iteration of each run below a folder: method, seed, frames, smallest and largest ratio."""
    parts = []
    for path in sorted(folder.rglob("metrics.csv")):
        config = OmegaConf.load(path.parent / "config.yaml")
        metrics = pandas.read_csv(path)
        columns = {f"train/agents/{name}": name for name in RATIOS} | {"counters/current_frames": FRAMES}
        part = metrics.rename(columns=columns)[[FRAMES, *RATIOS]].dropna()
        parts.append(part.assign(method=config.method, seed=config.seed).astype({FRAMES: int}))
    table = pandas.concat(parts).reindex(columns=["method", "seed", FRAMES, *RATIOS])
    return table.sort_values(by=["method", "seed", FRAMES]).round(dict.fromkeys(RATIOS, 9))


def interval(values: Sequence[float]) -> str:
    half = t_quantile(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return f"{mean(values):.3g} [{mean(values) - half:.3g}, {mean(values) + half:.3g}]"


def by_method(runs: DataFrame, number: Callable[[DataFrame], float]) -> dict[str, list[float]]:
    """A number of each run, by method."""
    found: dict[str, list[float]] = {}
    for key, run in runs.groupby(["method", "seed"]):
        found.setdefault(cast("tuple[str, int]", key)[0], []).append(number(run))
    return found


def slope(run: DataFrame, name: str) -> float:
    """Slope of the logarithm of a ratio, per million frames."""
    return float(np.polyfit(run[FRAMES].to_numpy() / 1e6, np.log(run[name].to_numpy()), 1)[0])


def frames_to(run: DataFrame, threshold: float) -> float:
    """Frames of the first evaluation at or above a return, or of the last one."""
    frames = run[FRAMES].to_numpy(float)
    return float(min([*frames[run["return"].to_numpy() >= threshold], frames.max()]))


def end(run: DataFrame) -> float:
    """Mean of the last fifth of evaluations less that of the fifth before."""
    returns, fifth = run["return"].to_numpy(), len(run) // 5
    return float(returns[-fifth:].mean() - returns[-2 * fifth : -fifth].mean())


def table() -> str:
    """A row for each method, in Markdown."""
    ratios = pandas.read_csv(STORED)
    slopes = {name: by_method(ratios, partial(slope, name=name)) for name in RATIOS}
    episodes = read_table(RESULTS / "aerocombat_ablations.csv.gz").dropna(subset=[FRAMES])
    evaluations = episodes.groupby(["method", "seed", FRAMES])["return"].mean().reset_index()
    reached, ends = by_method(evaluations, partial(frames_to, threshold=0)), by_method(evaluations, end)
    lines = [
        "| | slope of ln smallest, per M | smallest ever | slope of ln largest, per M | largest ever "
        "| M frames to a return of 0 | last fifth less the fifth before |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in ratios.groupby("method"):
        key = str(method)
        cells = [
            interval(slopes["min_ratio"][key]),
            f"{runs['min_ratio'].min():.2g}",
            interval(slopes["max_ratio"][key]),
            f"{runs['max_ratio'].max():.3g}",
            interval([frames / 1e6 for frames in reached[key]]),
            interval(ends[key]),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["collect"])
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.action:
        write_table(collect(arguments.folder), STORED)
    else:
        print(table())
