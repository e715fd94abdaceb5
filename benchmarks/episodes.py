"""Every evaluation episode of a study in one compressed table, `pandas.read_csv("results/marpo.csv.gz")`.

    python benchmarks/episodes.py PAGE/evaluations.json [MORE] results/marpo.csv.gz

A row is an episode: environment, task, method, seed, frames (empty in the absolute metric, played with the best
parameters), and a column for each metric. `to_records` gives marl-eval's layout back, which recipes/compare.py writes.
"""

import argparse
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pandas
from pandas import DataFrame

from torchrl_marl.files import replacing

RUN = ["environment", "task", "method", "seed"]
FRAMES, ABSOLUTE = "frames", "absolute_metrics"


def to_table(records: Mapping[str, Any]) -> DataFrame:
    """A row for each episode of records in marl-eval's layout."""
    parts = [
        DataFrame(
            {name: values for name, values in step.items() if name != "step_count"}
            | dict(zip(RUN, (environment, task, method, int(seed.removeprefix("seed_"))), strict=True))
            | {FRAMES: step.get("step_count")}
        )
        for environment, tasks in records.items()
        for task, methods in tasks.items()
        for method, seeds in methods.items()
        for seed, steps in seeds.items()
        for step in steps.values()
    ]
    table = pandas.concat([part.astype({FRAMES: "Int64"}) for part in parts], ignore_index=True)
    return table.reindex(columns=list(dict.fromkeys([*RUN, FRAMES, *table])))


def to_records(table: DataFrame) -> dict[str, Any]:
    """The inverse of `to_table`."""
    records: dict[str, Any] = {}
    for key, run in table.groupby(RUN, sort=False):
        environment, task, method, seed = cast("tuple[str, str, str, int]", key)
        seeds = records.setdefault(environment, {}).setdefault(task, {}).setdefault(method, {})
        steps = seeds[f"seed_{seed}"] = {}
        for frames, episodes in run.groupby(FRAMES, sort=False, dropna=False):
            metrics = episodes.drop(columns=[*RUN, FRAMES]).dropna(axis="columns").to_dict("list")
            if frames is pandas.NA:
                steps[ABSOLUTE] = metrics
            else:
                steps[f"step_{len(steps)}"] = {"step_count": int(cast("int", frames)), **metrics}
    return records


def write_table(table: DataFrame, path: Path) -> None:
    """Write a table; the same table gives the same bytes."""
    text = table.to_csv(index=False, lineterminator="\n")
    with replacing(path) as new:
        new.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_table(path: Path) -> DataFrame:
    """Read a table; to the last bit from pandas 3.1 on, whose own way of reading numbers is exact."""
    return pandas.read_csv(path, dtype={FRAMES: "Int64", **dict.fromkeys(RUN[:3], str)})


def absolute_returns(table: DataFrame) -> dict[str, dict[str, list[float]]]:
    """By task and method, the absolute metric of each run: its mean return over episodes of the best parameters."""
    means = table[table[FRAMES].isna()].groupby(RUN, sort=False)["return"].mean().reset_index()
    scores: dict[str, dict[str, list[float]]] = {}
    for task, method, score in zip(means["task"], means["method"], means["return"], strict=True):
        scores.setdefault(task, {}).setdefault(method, []).append(score)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("table", type=Path)
    arguments = parser.parse_args()
    tables = [to_table(json.loads(path.read_text())) for path in arguments.records]
    write_table(pandas.concat(tables, ignore_index=True), arguments.table)
