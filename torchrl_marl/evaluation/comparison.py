"""A page that compares finished runs.

Runs are a table with one row per run, by task and method, as returned by :func:`torchrl_marl.run.records.read_runs`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchrl_marl.evaluation.figures import Band, draw_aggregates, draw_curves, draw_intervals
from torchrl_marl.evaluation.page import Page
from torchrl_marl.evaluation.statistics import (
    iqm,
    min_max_normalize,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    stratified_bootstrap_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["check_comparable", "write_comparison"]

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Frames and values, ``[steps]`` each."""

Groups = Mapping[Any, "DataFrame"]
"""Runs by task and method, in the order of their seeds."""

_SCORES = {"absolute": "absolute metric", "last": "last", "last_fifth": "last fifth", "best": "best evaluation"}
_SPREADS = {"interval": "IQM over seeds with its 95 % interval", "std": "mean over seeds with its standard deviation"}
_PERCENT = np.linspace(0, 100, 101)


def check_comparable(runs: DataFrame) -> None:
    """Reject runs that are not comparable.

    On a task, all runs must share the environment with its options and time limit, the budget and the evaluation. The
    runs of a method must differ only in their seeds, which must be distinct.

    Args:
        runs: table with one row per run.

    Raises:
        ValueError: with every key that differs, its values and an example run for each value.
    """
    for task, of_task in runs.groupby("task", sort=False):
        differing = _differences(of_task, _is_shared)
        if differing:
            raise ValueError(f"Runs on {task} cannot be compared: they differ in\n{differing}")
        for method, members in of_task.groupby("method", sort=False):
            _check_seeds(f"{method} on {task}", members)


def _check_seeds(which: str, runs: DataFrame) -> None:
    differing = _differences(runs, lambda _: True)
    if differing:
        raise ValueError(
            f"Runs of {which} are not seeds of one configuration: they differ in\n{differing}\n"
            "Name these keys with --split to compare the runs as variants."
        )
    for seed, same in runs.groupby("seed"):
        if len(same) > 1:
            folders = ", ".join(map(str, same.folder))
            raise ValueError(f"Seed {seed} of {which} appears {len(same)} times: {folders}.")
    seeds: dict[tuple, int] = {}
    for run in runs.itertuples():
        # in a deterministic game, two seeds may have the same evaluations, but not the same losses
        _, returns = run.returns
        other = seeds.setdefault((*returns, run.losses), run.seed)
        if other != run.seed and len(returns) > 1:
            raise ValueError(f"Seeds {other} and {run.seed} of {which} have the same curve.")


def _is_shared(key: str) -> bool:
    """Whether a setting must be equal on a task; the number of parallel environments belongs to the method."""
    shared = ("total_frames", "evaluation.interval", "evaluation.episodes", "evaluation.sampled")
    return key in shared or (key.startswith("env.") and key not in ("env.num_envs", "env.compile"))


def _settings(runs: DataFrame) -> DataFrame:
    """Settings as text, one row per run and one column per key; NaN where a run does not record the key."""
    from pandas import DataFrame

    return DataFrame([{key: str(value) for key, value in config.items()} for config in runs.config], runs.index)


def _differences(runs: DataFrame, which: Callable[[str], bool]) -> str:
    """Return a line for each setting that differs between runs: its values, with an example run for each."""
    settings = _settings(runs).fillna("(default)")
    lines = []
    for key in sorted(filter(which, settings)):
        examples = settings[key].drop_duplicates()
        if len(examples) > 1:
            found = [f"{value} in {runs.folder[run].name} of {runs.method[run]}" for run, value in examples.items()]
            lines.append(f"  {key}: {', '.join(found)}")
    return "\n".join(lines)


def write_comparison(
    runs: DataFrame,
    output: Path,
    *,
    baseline: str | None = None,
    metric: str = "return",
    score: str = "absolute",
    spread: str = "interval",
    metrics: Mapping[str, Sequence[Curve]] | None = None,
    unfinished: Sequence[Path] = (),
    command: str = "",
) -> None:
    """Write a page that compares runs: ``README.md`` with figures, and ``page.html``.

    Args:
        runs: table with one row per run; see :func:`check_comparable`.
        output: folder for the page.
        baseline: baseline of the probability of improvement; ``None`` omits this section.
        metric: name of the metric in ``returns``.
        score: score of a run: ``"absolute"`` (the absolute metric), ``"last"``, ``"last_fifth"`` or ``"best"`` of its
            evaluations, or ``"window:FRAMES"``, the mean of evaluations over the last frames.
        spread: center and spread over seeds: ``"interval"``, the IQM with a 95 % interval, or ``"std"``, the mean with
            the sample standard deviation.
        metrics: further metrics to draw: for each, the curves of all runs, in the order of the rows.
        unfinished: folders of unfinished runs, which the page lists as left out.
        command: command line that the page records.

    Raises:
        ValueError: if no run uses the baseline, or the score is unknown.
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    scores, scored = _score(runs, score)
    runs = runs.assign(score=scores)
    groups: Groups = dict(iter(runs.groupby(["task", "method"], sort=False)))
    tasks, methods = list(dict.fromkeys(runs.task)), sorted(set(runs.method))
    if baseline is not None and baseline not in methods:
        raise ValueError(f"No run uses the baseline {baseline!r}; the methods are {', '.join(methods)}.")
    page = Page(output, title=f"{_counted(methods, 'methods')} on {_counted(tasks, 'tasks')}")
    seeds = sorted(len(members) for members in groups.values())
    episodes = sorted({config["evaluation.episodes"] for config in runs.config})
    page.paragraph(
        f"{len(runs)} runs: {' to '.join(map(str, sorted({seeds[0], seeds[-1]})))} seeds for each method and task. "
        f"Every evaluation is the mean {metric} of {' or '.join(map(str, episodes))} episodes with deterministic "
        "actions on environments of their own; the absolute metric is that of the best parameters on "
        f"{' or '.join(str(10 * number) for number in episodes)} other episodes."
    )
    if seeds[0] < 10:
        page.paragraph(
            f"With {seeds[0]} seeds this page shows what was learnt; it does not rank methods. Bootstrap intervals of "
            "fewer than ten runs are too narrow: those of 95 % from three runs of one task hold the true value in "
            "about 75 % of studies."
        )
    page.heading("Learning curves")
    shown = f"over frames: {_SPREADS[spread]}."
    page.figure(_draw(groups, runs.returns, f"evaluation {metric}", spread), "curves", f"Evaluation {metric} {shown}")
    if metrics:
        page.heading("While they train")
    for name, curves in (metrics or {}).items():
        page.figure(_draw_logged(groups, curves, name, spread), name.replace("/", "_"), f"{name} {shown}")
    page.heading("Returns" if metric == "return" else f"Evaluations: {metric}")
    _returns(page, groups, metric, scored, spread)
    page.heading("Over tasks")
    _aggregate(page, groups, tasks, methods, scored)
    if baseline is not None:
        _improvements(page, groups, tasks, methods, baseline, scored)
    page.heading("Settings in which the methods differ")
    _differing_settings(page, runs, methods)
    page.heading("Runs")
    _sessions(page, runs)
    if unfinished:
        left_out = _listed(["/".join(folder.parts[-3:]) for folder in unfinished])
        page.paragraph(f"Left out because they are not finished: {left_out}.")
    page.heading("How to read this page")
    if spread != "interval":
        page.paragraph(f"Curves and the table of evaluations show the {_SPREADS[spread]}; all else as follows.")
    page.paragraph(_LEGEND)
    if command:
        page.code(command)
    page.write()


def _common_curves(curves: Iterable[Curve]) -> Curve:
    """Return the frames at which all runs were evaluated (interrupted runs have more) and ``[runs, evaluations]``."""
    curves = list(curves)
    frames = reduce(np.intersect1d, [frames for frames, _ in curves])
    return frames, np.stack([values[np.isin(own, frames)] for own, values in curves])


def _draw(groups: Groups, curves: Sequence[Curve], ylabel: str, spread: str) -> Figure:
    """Draw a metric of every run, with ``curves`` in the order of the rows."""
    bands: dict[str, dict[str, Band]] = defaultdict(dict)
    for (task, method), runs in groups.items():
        frames, values = _common_curves(curves[run] for run in runs.index)
        bands[task][method] = Band(frames, *_over_seeds(values, spread))
    return draw_curves(bands, ylabel=ylabel)


def _draw_logged(groups: Groups, curves: Sequence[Curve], metric: str, spread: str) -> Figure:
    """Draw a metric logged during training, on a logarithmic axis if it spans a decade."""
    figure = _draw(groups, curves, metric, spread)
    for axes in figure.axes:
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        axes.set_yscale("log" if 0 < 10 * values.min() < values.max() else "linear")
    return figure


def _estimate(scores: Any, statistic: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Return a statistic with its 95 % interval, NaN for single runs; ``scores`` as for the bootstrap."""
    samples = scores if isinstance(scores, tuple) else (scores,)
    center = statistic(*samples)
    if all(
        len(sample) == 1 for sample in samples
    ):  # resampling one run would give a width of zero, which claims certainty
        return center, np.nan * center, np.nan * center
    return (center, *stratified_bootstrap_interval(scores, statistic))


def _over_seeds(values: NDArray[np.float64], spread: str) -> tuple[Any, Any, Any]:
    """Return center and bounds of ``[runs, ...]`` over seeds."""
    if spread == "interval":
        return _estimate(values[:, None], iqm if values.ndim == 1 else sample_efficiency)
    mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.nan * values[0]
    return mean, mean - deviation, mean + deviation


def _returns(page: Page, groups: Groups, metric: str, scored: str, spread: str) -> None:
    names = {"final": f"final {metric}", "last_fifth": "last fifth", "absolute": "absolute metric", "score": scored}
    if scored in _SCORES.values() and scored != _SCORES["best"]:
        del names["score"]  # it has a column of its own
    rows = []
    for (task, method), runs in groups.items():
        low, high = _bounds(groups, task)
        decimals = max(2, 2 - math.floor(math.log10(high - low))) if high > low else 2
        scores = [_written(_over_seeds(runs[name].to_numpy(), spread), decimals, spread) for name in names]
        frames, speed = f"{runs.frames.iloc[0]:,}", f"{runs.frames_per_second.mean():,.0f}"
        rows.append((task, method, _seeds(runs.seed.tolist()), *scores, frames, speed))
    page.table(["task", "method", "seeds", *names.values(), "frames", "frames/s"], rows, text_columns=3)


def _score(runs: DataFrame, score: str) -> tuple[Any, str]:
    """Return the score of each run, and its name on the page."""
    kind, _, frames = score.partition(":")
    if kind == "window" and frames.isdecimal() and int(frames) > 0:
        means = runs.returns.map(lambda curve: curve[1][curve[0] > curve[0][-1] - int(frames)].mean())
        return means, f"mean of the last {int(frames):,} frames"
    if score not in _SCORES:
        raise ValueError(f"A score is {', '.join(_SCORES)} or window:FRAMES, such as window:2000000; got {score!r}.")
    column = {"last": "final"}.get(score, score)
    return runs.returns.map(lambda curve: curve[1].max()) if score == "best" else runs[column], _SCORES[score]


def _bounds(groups: Groups, task: str) -> tuple[float, float]:
    """Lowest and highest evaluation of any run on a task."""
    members = [runs for (own, _), runs in groups.items() if own == task]
    values = np.concatenate(
        [part for runs in members for part in (runs.absolute, runs.score, *(y for _, y in runs.returns))]
    )
    return values.min(), values.max()


def _aggregate(page: Page, groups: Groups, tasks: Sequence[str], methods: Sequence[str], scored: str) -> None:
    """Add tables and figures over the tasks on which every method has the same number of runs."""
    bounds = {task: _bounds(groups, task) for task in tasks}
    tasks = [
        task
        for task, (low, high) in bounds.items()
        if low < high and all((task, method) in groups for method in methods)
    ]
    uneven = [method for method in methods if len({len(groups[task, method]) for task in tasks}) > 1]
    if not tasks or uneven:
        why = "no task was played by all methods, or nothing was learnt"
        why = f"{_listed(uneven)} with a different number of runs on each task" if uneven else why
        page.paragraph(f"No scores over tasks: {why}.")
        return
    low, high = np.array([bounds[task] for task in tasks]).T
    scores = {method: min_max_normalize(_scores(groups, method, tasks), low, high) for method in methods}
    curves = {method: min_max_normalize(_curves(groups, method, tasks), low, high) for method in methods}
    curves = {method: np.moveaxis(curve, -1, 1) for method, curve in curves.items()}  # tasks are strata: second
    thresholds = np.linspace(0, 1, 101)

    def profile(scores: NDArray[np.float64]) -> Any:
        return 100 * performance_profile(scores, thresholds)

    figure = draw_aggregates(
        {method: Band(_PERCENT, *_estimate(curves[method], sample_efficiency)) for method in methods},
        {method: Band(thresholds, *_estimate(scores[method], profile)) for method in methods},
    )
    scale = "; ".join(f"{task}: 0 is {bounds[task][0]:.2f}, 1 is {bounds[task][1]:.2f}" for task in tasks)
    _aggregate_table(page, scores, [groups[task, methods[0]].environment.iloc[0] for task in tasks])
    text = "Sample efficiency and performance profiles over tasks, with 95 % intervals."
    page.figure(figure, "aggregates", text)
    page.paragraph(
        f"Scores on {_listed(tasks)}, normalised by the lowest and highest evaluation of any run ({scale}). Table "
        f"and profiles: {scored}; a smaller optimality gap is better."
    )


def _aggregate_table(page: Page, scores: Mapping[str, NDArray[np.float64]], environments: Sequence[str]) -> None:
    """Aggregate normalised scores ``[runs, tasks]`` of each method over the tasks of each environment, and over all."""
    parts = {name: [task for task, of in enumerate(environments) if of == name] for name in dict.fromkeys(environments)}
    if len(parts) > 1:
        parts["all"] = list(range(len(environments)))
    rows = []
    for name, tasks in parts.items():
        for method, of_method in scores.items():
            estimates = [_estimate(of_method[:, tasks], statistic) for statistic in (iqm, np.mean, optimality_gap)]
            rows.append((name, str(len(tasks)), method, str(len(of_method)), *map(_written, estimates)))
    page.table(["environment", "tasks", "method", "runs", "IQM", "mean", "optimality gap"], rows, text_columns=3)


def _scores(groups: Groups, method: str, tasks: Sequence[str]) -> NDArray[np.float64]:
    """Return the scores of runs, ``[runs, tasks]``."""
    return np.stack([groups[task, method].score for task in tasks], -1)


def _curves(groups: Groups, method: str, tasks: Sequence[str]) -> NDArray[np.float64]:
    """Return curves at every percent of the budget, ``[runs, percent, tasks]``."""
    of_tasks = []
    for task in tasks:
        frames, returns = _common_curves(groups[task, method].returns)
        of_tasks.append([np.interp(_PERCENT, 100 * frames / frames[-1], curve) for curve in returns])
    return np.stack(of_tasks, -1)


def _improvements(
    page: Page, groups: Groups, tasks: Sequence[str], methods: Sequence[str], baseline: str, scored: str
) -> None:
    """Add the probability that a method's run beats a run of the baseline, per task and over all shared tasks."""
    rows: dict[str, dict[str, tuple[float, float, float]]] = defaultdict(dict)
    for among in [*([task] for task in tasks), tasks]:
        for method in (method for method in methods if method != baseline):
            played = [task for task in among if {(task, method), (task, baseline)} <= groups.keys()]
            if len({(len(groups[task, method]), len(groups[task, baseline])) for task in played}) == 1:
                title = played[0] if len(played) == 1 else f"{len(played)} tasks together"
                pair = _scores(groups, method, played), _scores(groups, baseline, played)
                rows[title][method] = _estimate(pair, probability_of_improvement)
    if not rows:
        return
    page.heading(f"Probability of improvement over {baseline}")
    text = f"Probability that a run scores higher than one of {baseline} ({scored}), with 95 % intervals."
    ticks = {0: "0", 0.25: "¼", 0.5: "½", 0.75: "¾", 1: "1"}
    figure = draw_intervals(rows, baseline=baseline, xlabel="probability of improvement", at=0.5, ticks=ticks)
    page.figure(figure, "improvements", text)
    cells = [(title, method, _written(values)) for title, row in rows.items() for method, values in row.items()]
    page.table(["task", "method", "probability"], cells, text_columns=2)


def _differing_settings(page: Page, runs: DataFrame, methods: Sequence[str]) -> None:
    """Add the settings in which the methods on a task differ, with these tasks."""
    tasks: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for task, of_task in runs.groupby("task", sort=False):
        first = of_task.drop_duplicates("method").set_index("method")
        settings = _settings(first).drop(columns="method").fillna("-")
        for key in settings.columns[settings.nunique() > 1]:
            tasks[(key, *settings[key].reindex(methods, fill_value="-"))].append(str(task))
    num_tasks = runs.task.nunique()
    rows = [(*row, "all" if len(where) == num_tasks else ", ".join(where)) for row, where in sorted(tasks.items())]
    page.table(["setting", *methods, "tasks"], rows, text_columns=2 + len(methods))


def _sessions(page: Page, runs: DataFrame) -> None:
    """Add the command and the commit of every session of a run."""
    rows = []
    for run in runs.sort_values(["task", "method", "seed"]).itertuples():
        for session in run.sessions:
            commit, _, dirty = session["git_commit"].partition("-")
            commit = commit[:12] + ("-dirty" if dirty else "")
            rows.append((run.task, run.method, str(run.seed), commit, session["command"]))
    page.table(["task", "method", "seed", "commit", "command"], rows, text_columns=5)


def _seeds(seeds: Sequence[int]) -> str:
    consecutive = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))


def _written(estimate: tuple[float, float, float], decimals: int = 2, spread: str = "interval") -> str:
    center, low, high = (f"{value:.{decimals}f}" for value in estimate)
    if low == "nan":
        return center
    return (
        f"{center} [{low}, {high}]" if spread == "interval" else f"{center} ± {estimate[2] - estimate[0]:.{decimals}f}"
    )


def _listed(names: Sequence[str]) -> str:
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
