"""A page that compares finished runs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrl_marl.evaluation.figures import Band, draw_aggregates, draw_curves, draw_improvements
from torchrl_marl.evaluation.page import Block, Code, Heading, Paragraph, Picture, Table, write_page
from torchrl_marl.evaluation.records import merge_records
from torchrl_marl.evaluation.runs import (
    Curve,
    FinishedRun,
    RunGroups,
    check_comparable,
    group_runs,
    read_metric,
    read_runs,
)
from torchrl_marl.evaluation.statistics import (
    iqm,
    min_max_normalize,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    stratified_bootstrap_interval,
)
from torchrl_marl.files import replacing
from torchrl_marl.loggers import without_seed

__all__ = ["compare"]

_PERCENT = np.linspace(0, 100, 101)


def compare(
    roots: Sequence[Path],
    output: Path,
    *,
    baseline: str | None = None,
    split: Sequence[str] = (),
    metrics: Sequence[str] = (),
    command: str = "",
) -> None:
    """Write a page that compares runs: ``README.md`` with pictures, ``page.html``, ``evaluations.json``.

    Args:
        roots: folders at or below which the runs lie.
        output: folder for the page.
        baseline: method over which the probability of improvement is given; ``None`` leaves that part out.
        split: configuration keys whose values tell variants of one method apart.
        metrics: what else runs log and the page draws, such as ``train/agents/min_ratio``.
        command: what was called, for the page to state.

    Raises:
        ValueError: if runs cannot be compared, there are none, none is of the baseline, or one did not log a metric.
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    runs, left_out = read_runs(roots, split=split)
    unfinished = ["/".join(folder.parts[-3:]) for folder in left_out]
    check_comparable(runs)
    groups = group_runs(runs)
    methods = sorted({run.method for run in runs})
    if baseline is not None and baseline not in methods:
        raise ValueError(f"No run is of the baseline {baseline!r}; there are {', '.join(methods)}.")
    blocks: list[Block] = [
        Paragraph(_overview(runs)),
        *([Paragraph(_warning(groups))] if _fewest_seeds(groups) < 10 else []),
        Heading("Learning curves"),
        Picture(_curves(groups), "curves", "Evaluation return over frames: IQM over seeds with its 95 % interval."),
        *_logged(groups, metrics),
        Heading("Returns"),
        _returns(groups),
        *_aggregates(groups),
        *([] if baseline is None else _improvements(groups, baseline)),
        Heading("Settings in which the methods differ"),
        _settings(groups),
        Heading("Runs"),
        _runs(runs),
        *([Paragraph(f"Left out, for they are not finished: {_listed(unfinished)}.")] if unfinished else []),
        Heading("How to read this page"),
        Paragraph(_LEGEND),
        *([Code(command)] if command else []),
    ]
    write_page(output, title=f"{_counted(methods, 'methods')} on {_counted(list(groups), 'tasks')}", blocks=blocks)
    records = [(run.folder / "evaluations.json", run.method) for run in runs]
    if all(record.exists() for record, _ in records):
        with replacing(output / "evaluations.json") as path:
            path.write_text(json.dumps(merge_records(records)) + "\n")


def _scores(runs: Sequence[FinishedRun]) -> NDArray[np.float64]:
    """Absolute metrics, ``[runs]``."""
    return np.array([run.summary["absolute"] for run in runs])


def _returns_of(run: FinishedRun) -> Curve:
    return run.frames, run.returns


def _common_curves(runs: Sequence[FinishedRun], curve: Callable[[FinishedRun], Curve] = _returns_of) -> Curve:
    """Return the frames that all runs were evaluated at (an interrupted one has more) and ``[runs, evaluations]``."""
    curves = [curve(run) for run in runs]
    frames = reduce(np.intersect1d, [frames for frames, _ in curves])
    return frames, np.stack([values[np.isin(own, frames)] for own, values in curves])


def _curves(
    groups: RunGroups, curve: Callable[[FinishedRun], Curve] = _returns_of, ylabel: str = "evaluation return"
) -> Any:
    bands: dict[str, dict[str, Band]] = defaultdict(dict)
    for task, methods in groups.items():
        for method, runs in methods.items():
            frames, values = _common_curves(runs, curve)
            bands[task][method] = Band(frames, *_estimate(values[:, None], sample_efficiency))
    return draw_curves(bands, ylabel=ylabel)


def _logged(groups: RunGroups, metrics: Sequence[str]) -> list[Block]:
    """Draw what runs log while they train, a figure for each metric; what spans a decade gets a logarithmic axis."""
    blocks: list[Block] = [Heading("While they train")] if metrics else []
    for metric in metrics:
        figure = _curves(groups, partial(read_metric, metric=metric), metric)
        for axes in figure.axes:
            values = np.concatenate([line.get_ydata() for line in axes.lines])
            axes.set_yscale("log" if 0 < 10 * values.min() < values.max() else "linear")
        text = f"{metric} over frames: IQM over seeds with its 95 % interval."
        blocks.append(Picture(figure, metric.replace("/", "_"), text))
    return blocks


def _estimate(scores: Any, statistic: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Return a statistic with its 95 % interval, NaN for single runs; ``scores`` as the bootstrap takes them."""
    samples = scores if isinstance(scores, tuple) else (scores,)
    center = statistic(*samples)
    if all(len(sample) == 1 for sample in samples):  # nothing to resample: a width of zero would claim certainty
        return center, np.nan * center, np.nan * center
    return (center, *stratified_bootstrap_interval(scores, statistic))


def _returns(groups: RunGroups) -> Table:
    header = ["task", "method", "seeds", "final return", "last fifth", "absolute metric", "frames", "frames/s"]
    rows = []
    for task, methods in groups.items():
        low, high = _bounds(methods.values())
        decimals = max(2, 2 - math.floor(math.log10(high - low))) if high > low else 2
        for method, runs in methods.items():
            values = [np.array([run.summary[name] for run in runs]) for name in ("final", "last_fifth", "absolute")]
            frames = f"{runs[0].summary['frames']:,}"
            speed = f"{np.mean([run.summary['frames_per_second'] for run in runs]):,.0f}"
            written = [_written(_estimate(value, iqm), decimals) for value in values]
            rows.append([task, method, _seeds(runs), *written, frames, speed])
    return Table(header, rows, text_columns=3)


def _seeds(runs: Sequence[FinishedRun]) -> str:
    seeds = [run.seed for run in runs]
    consecutive = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))


def _written(estimate: tuple[float, float, float], decimals: int = 2) -> str:
    center, low, high = (f"{value:.{decimals}f}" for value in estimate)
    return center if low == "nan" else f"{center} [{low}, {high}]"


def _aggregates(groups: RunGroups) -> list[Block]:
    """Tables and figures over the tasks that every method has played with as many runs on each."""
    methods = sorted({method for of_task in groups.values() for method in of_task})
    bounds = {task: _bounds(of_task.values()) for task, of_task in groups.items()}
    tasks = [task for task in groups if set(groups[task]) == set(methods) and bounds[task][0] < bounds[task][1]]
    uneven = [method for method in methods if len({len(groups[task][method]) for task in tasks}) > 1]
    if not tasks or uneven:
        why = "no task was played by all methods, or nothing was learnt"
        why = f"{_listed(uneven)} with a different number of runs on each task" if uneven else why
        return [Heading("Over tasks"), Paragraph(f"No scores over tasks: {why}.")]
    low, high = np.array([bounds[task] for task in tasks]).T
    scores = {method: min_max_normalize(_score_matrix(groups, method, tasks), low, high) for method in methods}
    curves = {method: min_max_normalize(_curve_matrix(groups, method, tasks), low, high) for method in methods}
    curves = {method: np.moveaxis(curve, -1, 1) for method, curve in curves.items()}  # tasks are strata: second
    thresholds = np.linspace(0, 1, 101)

    def profile(scores: NDArray[np.float64]) -> Any:
        return 100 * performance_profile(scores, thresholds)

    figure = draw_aggregates(
        {method: Band(_PERCENT, *_estimate(curves[method], sample_efficiency)) for method in methods},
        {method: Band(thresholds, *_estimate(scores[method], profile)) for method in methods},
    )
    scale = "; ".join(f"{task}: 0 is {bounds[task][0]:.2f}, 1 is {bounds[task][1]:.2f}" for task in tasks)
    return [
        Heading("Over tasks"),
        _aggregate_table(scores, [groups[task][methods[0]][0].environment for task in tasks]),
        Picture(figure, "aggregates", "Sample efficiency and performance profiles over tasks, with 95 % intervals."),
        Paragraph(
            f"Scores on {_listed(tasks)}, normalised by the lowest and highest mean return of any run ({scale}). Table "
            "and profiles: absolute metric; a smaller optimality gap is better."
        ),
    ]


def _aggregate_table(scores: Mapping[str, NDArray[np.float64]], environments: Sequence[str]) -> Table:
    """Aggregate normalised scores ``[runs, tasks]`` of each method over the tasks of each environment, and over all."""
    columns = {
        name: [task for task, of in enumerate(environments) if of == name] for name in dict.fromkeys(environments)
    }
    if len(columns) > 1:
        columns["all"] = list(range(len(environments)))
    rows = []
    for name, tasks in columns.items():
        for method, of_method in scores.items():
            estimates = [_estimate(of_method[:, tasks], statistic) for statistic in (iqm, np.mean, optimality_gap)]
            rows.append([name, str(len(tasks)), method, str(len(of_method)), *map(_written, estimates)])
    return Table(["environment", "tasks", "method", "runs", "IQM", "mean", "optimality gap"], rows, text_columns=3)


def _score_matrix(groups: RunGroups, method: str, tasks: Sequence[str]) -> NDArray[np.float64]:
    """Return absolute metrics, ``[runs, tasks]``."""
    return np.stack([_scores(groups[task][method]) for task in tasks], -1)


def _curve_matrix(groups: RunGroups, method: str, tasks: Sequence[str]) -> NDArray[np.float64]:
    """Return curves at every percent of the budget, ``[runs, percent, tasks]``."""
    of_tasks = []
    for task in tasks:
        frames, returns = _common_curves(groups[task][method])
        of_tasks.append([np.interp(_PERCENT, 100 * frames / frames[-1], curve) for curve in returns])
    return np.moveaxis(np.array(of_tasks), 0, -1)


def _bounds(methods: Iterable[Sequence[FinishedRun]]) -> tuple[float, float]:
    """Lowest and highest mean return of any evaluation of any run on a task."""
    runs = [run for members in methods for run in members]
    values = np.concatenate([*(run.returns for run in runs), _scores(runs)])
    return values.min(), values.max()


def _improvements(groups: RunGroups, baseline: str) -> list[Block]:
    played = {task: methods for task, methods in groups.items() if baseline in methods and len(methods) > 1}
    rows: dict[str, dict[str, tuple[float, float, float]]] = defaultdict(dict)
    for task, methods in played.items():
        for method in sorted(set(methods) - {baseline}):
            pair = _scores(methods[method]), _scores(methods[baseline])
            rows[task][method] = _estimate(pair, probability_of_improvement)
    for method in sorted({method for row in rows.values() for method in row} if len(rows) > 1 else ()):
        tasks = [task for task in played if method in played[task]]
        even = all(len({len(played[task][name]) for task in tasks}) == 1 for name in (method, baseline))
        if len(tasks) > 1 and even:
            pair = _score_matrix(played, method, tasks), _score_matrix(played, baseline, tasks)
            rows[f"{len(tasks)} tasks together"][method] = _estimate(pair, probability_of_improvement)
    if not rows:
        return []
    text = f"Probability that a run scores higher than one of {baseline} (absolute metric), with 95 % intervals."
    cells = [[title, method, _written(values)] for title, row in rows.items() for method, values in row.items()]
    return [
        Heading(f"Probability of improvement over {baseline}"),
        Picture(draw_improvements(rows, baseline=baseline), "improvements", text),
        Table(["task", "method", "probability"], cells, text_columns=2),
    ]


def _settings(groups: RunGroups) -> Table:
    methods = sorted({method for of_task in groups.values() for method in of_task})
    tasks: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for task, of_task in groups.items():
        configs = {method: without_seed(runs[0].config) for method, runs in of_task.items()}
        for key in sorted({key for config in configs.values() for key in config} - {"method"}):
            values = [str(config.get(key, "-")) for config in configs.values()]
            if len(set(values)) > 1:
                tasks[(key, *(str(configs.get(method, {}).get(key, "-")) for method in methods))].append(task)
    rows = [[*row, "all" if len(where) == len(groups) else ", ".join(where)] for row, where in sorted(tasks.items())]
    return Table(["setting", *methods, "tasks"], rows, text_columns=2 + len(methods))


def _runs(runs: Sequence[FinishedRun]) -> Table:
    rows = []
    for run in sorted(runs, key=lambda run: (run.task, run.method, run.seed)):
        unrecorded = [{"command": "not recorded", "git_commit": run.summary["git_commit"]}]
        for session in run.summary.get("sessions", unrecorded):
            commit, _, dirty = session["git_commit"].partition("-")
            rows.append(
                [run.task, run.method, str(run.seed), commit[:12] + ("-dirty" if dirty else ""), session["command"]]
            )
    return Table(["task", "method", "seed", "commit", "command"], rows, text_columns=5)


def _overview(runs: Sequence[FinishedRun]) -> str:
    groups = group_runs(runs)
    seeds = sorted({len(members) for methods in groups.values() for members in methods.values()})
    episodes = sorted({run.config["evaluation.episodes"] for run in runs})
    count = " to ".join(str(number) for number in sorted({seeds[0], seeds[-1]}))
    played = " or ".join(map(str, episodes))
    return (
        f"{len(runs)} runs: {count} seeds for each method and task. Every evaluation is the mean return of {played} "
        f"episodes with deterministic actions on environments of their own; the absolute metric is that of the best "
        f"parameters on {' or '.join(str(10 * number) for number in episodes)} other episodes."
    )


def _fewest_seeds(groups: RunGroups) -> int:
    return min(len(runs) for methods in groups.values() for runs in methods.values())


def _warning(groups: RunGroups) -> str:
    return (
        f"With {_fewest_seeds(groups)} seeds this page shows what was learnt; it does not rank methods. Bootstrap "
        "intervals of fewer than ten runs are too narrow: those of 95 % from three runs of one task hold the true "
        "value in about 75 % of studies."
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _counted(names: Sequence[str], what: str) -> str:
    return _listed(names) if len(names) < 5 else f"{len(names)} {what}"


_LEGEND = (
    "Curves and tables show the interquartile mean (IQM) over runs with 95 % intervals by stratified bootstrap (2000 "
    "resamples of runs, each task for itself). Last fifth: mean over the last fifth of the evaluations, the objective "
    "of tuning. Probability of improvement: share of pairs of runs in which the method scores higher, ties count half, "
    "mean over tasks. Performance profile: share of runs and tasks that score above a threshold. Protocol: Gorsane et "
    "al. 2022, arXiv 2209.10485; statistics: Agarwal et al. 2021, arXiv 2108.13264."
)
