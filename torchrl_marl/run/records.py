"""The public files of a run's folder: metrics, evaluation episodes, configuration and summary.

::

    config.yaml             the resolved configuration
    metrics.csv             a row for each number of frames, a column for each metric
    evaluations.json        every evaluation episode, in the layout of marl-eval
    summary.json            results of the run; written only by a finished run
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from torchrl_marl.files import replacing
from torchrl_marl.signatures import nearest
from torchrl_marl.trust import reason

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "FRAMES",
    "RETURN",
    "EvaluationRecord",
    "MetricTable",
    "merge_records",
    "read_metric",
    "read_metrics",
    "read_runs",
    "without_seed",
]

FRAMES = "counters/total_frames"
"""Metric over which all others are drawn, the first column of their table: frames that the policy has learned from."""
RETURN = "eval/reward/episode_reward_mean"
"""Metric of every evaluation: mean return of its episodes."""
_ABSOLUTE = "absolute_metrics"


class EvaluationRecord:
    """Every evaluation episode of one run, in a file that is complete after each evaluation.

    Layout (https://github.com/instadeepai/marl-eval): ``{environment: {task: {method: {"seed_0": steps}}}}``, where
    ``steps`` holds ``"step_0"``, ``"step_1"``, ... with the frames as ``"step_count"`` and one value per episode for
    each metric, and finally ``"absolute_metrics"`` with ten times as many episodes.

    Args:
        path: JSON file to write.
        environment: name of the environment or suite.
        task: name of the task.
        method: name of the method.
        seed: seed of the run.
        resumed_at: frames at which a resumed run continues; later evaluations are dropped. ``None`` for a new run.

    Raises:
        ValueError: if the file of a resumed run is damaged or belongs to another run.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "evaluations.json"
        >>> record = EvaluationRecord(path, environment="vmas", task="balance", method="mars", seed=0)
        >>> record.add(6000, {"return": [1.0, 2.0]})
        >>> json.loads(path.read_text())["vmas"]["balance"]["mars"]["seed_0"]
        {'step_0': {'step_count': 6000, 'return': [1.0, 2.0]}}
    """

    def __init__(
        self, path: Path, *, environment: str, task: str, method: str, seed: int, resumed_at: int | None = None
    ) -> None:
        self._path = path
        self._keys = (environment, task, method, f"seed_{seed}")
        self._steps: dict[str, dict[str, Any]] = {}
        if resumed_at is not None and path.exists():
            try:
                stored = json.loads(path.read_text())
                for key in self._keys:
                    stored = stored[key]
                steps = {name: step for name, step in stored.items() if name != _ABSOLUTE}
                self._steps = {name: step for name, step in steps.items() if step["step_count"] <= resumed_at}
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                raise ValueError(f"{path} does not hold the evaluations of this run: {reason(error)}.") from error

    def add(self, frames: int, metrics: Mapping[str, Sequence[float]]) -> None:
        """Append the evaluation after ``frames`` frames: one value per episode for each metric."""
        self._steps[f"step_{len(self._steps)}"] = {"step_count": frames, **metrics}
        self._write()

    def add_absolute(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Add the episodes of the absolute metric, played with the best parameters."""
        self._steps[_ABSOLUTE] = dict(metrics)
        self._write()

    def _write(self) -> None:
        nested: dict[str, Any] = self._steps
        for key in reversed(self._keys):
            nested = {key: nested}
        with replacing(self._path) as path:
            path.write_text(json.dumps(nested) + "\n")


class MetricTable:
    """The table of a run's metrics, ``pandas.read_csv("metrics.csv")``: a row for each number of frames.

    A column begins with the first value of its metric; cells are empty where nothing was measured. A row is in the file
    as soon as it is added, and what is added for the same frames later goes into it, too.

    Args:
        path: CSV file to write, or to replace.
        rows: what it holds to begin with, each with its ``"counters/total_frames"``, in their order.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> table = MetricTable(path)
        >>> table.add(10, {"loss": 0.5})
        >>> table.add(20, {"loss": 0.25})
        >>> table.add(20, {"eval/return": 3.0})
        >>> print(path.read_text())
        counters/total_frames,loss,eval/return
        10,0.5,
        20,0.25,3.0
        <BLANKLINE>
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._path = path
        self._rewrite([*rows])

    def add(self, frames: int, metrics: Mapping[str, float]) -> None:
        """Write metrics measured after ``frames`` frames."""
        same = self._last.get(FRAMES) == frames
        row = {
            **(self._last if same else {}),
            **{name: float(value) for name, value in metrics.items()},
            FRAMES: frames,
        }
        if row.keys() <= set(self._columns):
            with self._path.open("r+", newline="") as file:
                self._start = file.seek(*((self._start, 0) if same else (0, 2)))
                self._writer(file).writerow(row)
                file.truncate()
            self._last = row
        else:
            with self._path.open(newline="") as file:
                earlier = list(csv.DictReader(file))
            self._rewrite([*(earlier[:-1] if same else earlier), row])

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._columns = list(dict.fromkeys([FRAMES, *(name for row in rows for name in row)]))
        self._last = dict(rows[-1]) if rows else {}
        with replacing(self._path) as path, path.open("w", newline="") as file:
            self._writer(file).writeheader()
            self._writer(file).writerows(rows[:-1])
            self._start = file.tell()
            self._writer(file).writerows(rows[-1:])

    def _writer(self, file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, self._columns, lineterminator="\n")


def merge_records(runs: Iterable[tuple[Path, str, str]]) -> dict[str, Any]:
    """Merge the evaluation episodes of many runs into one tree, as marl-eval reads it.

    Args:
        runs: of each run its file and the names that its task and its method go by, which may tell variants apart.

    Raises:
        ValueError: if two files hold the same run, or a file has another layout.
    """
    merged: dict[str, Any] = {}
    for path, task, method in runs:
        for environment, _, seed, steps in _runs_in(path):
            seeds = merged.setdefault(environment, {}).setdefault(task, {}).setdefault(method, {})
            if seed in seeds:
                raise ValueError(f"{path} holds {seed} of {method} on {task}, which another file also has.")
            seeds[seed] = steps
    return merged


def _runs_in(path: Path) -> list[tuple[str, str, str, Any]]:
    try:
        return [
            (environment, task, seed, steps)
            for environment, tasks in json.loads(path.read_text()).items()
            for task, methods in tasks.items()
            for seeds in methods.values()
            for seed, steps in seeds.items()
        ]
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not in marl-eval's layout: {reason(error)}.") from error


def read_metrics(folder: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return frames and values of every metric that a run has logged, ``[steps]`` each.

    Runs of before ``metrics.csv`` have a file for each metric, ``scalars/METRIC.csv`` with rows ``frames,value``. A
    last row without its end, which a kill has left, is passed over.

    Raises:
        ValueError: if a file holds anything else.
    """
    table, found = folder / "metrics.csv", {}
    for path in [table] if table.exists() else sorted((folder / "scalars").rglob("*.csv")):
        try:
            rows = list(csv.reader(path.read_text().rpartition("\n")[0].splitlines()))
            if path == table:
                names, *rows = rows
                if names[:1] != [FRAMES]:
                    raise ValueError(f"its first column must be {FRAMES}, got {names[:1]}")
            else:
                names = ["", path.relative_to(folder / "scalars").with_suffix("").as_posix()]
            cells = np.array(rows, str).reshape(len(rows), len(names))
            frames = np.array([int(cell) for cell in cells[:, 0]], float)
            for name, column in zip(names, cells.T, strict=True):
                found[name] = frames[column != ""], column[column != ""].astype(float)
        except ValueError as error:
            raise ValueError(f"{path} does not hold rows of frames and value: {reason(error)}") from error
    found.pop("", None)
    return found


def read_metric(folder: Path, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return frames and values of one metric that a run has logged, ``[steps]`` each.

    Raises:
        ValueError: if the run has not logged it, with what it has; or if a file holds anything else.
    """
    metrics = read_metrics(folder)
    if metric not in metrics:
        raise ValueError(f"{folder} has no metric {metric!r}; it has {', '.join(metrics)}.")
    return metrics[metric]


def read_runs(
    roots: Sequence[Path], *, split: Sequence[str] = (), metric: str = "return"
) -> tuple[DataFrame, list[Path]]:
    """Read every run at or below some folders, except the trials of tuning, in folders named ``tuning``.

    Args:
        roots: folders.
        split: dotted configuration keys whose values distinguish variants of a method, such as ``optimizer.lr``.
        metric: metric of the evaluation episodes to use as return: ``win_rate``, ``episode_length``, ...

    Returns:
        Finished runs, and the folders of unfinished runs. The runs are a table with one row per run, sorted by
        environment, task, method and seed. Columns are these four, the ``folder``, the ``config`` by dotted keys
        without seed-specific entries, the entries of summary.json, the frames and mean ``returns`` of the evaluations,
        and a digest of the ``losses``.

    Raises:
        ValueError: if there is no finished run, or no run at all below one of the folders, a run is damaged, no run has
            a key of ``split``, or the episodes of a run do not have the metric.
        ImportError: without pandas (``pip install "torchrl_marl[plot]"``).
    """
    from pandas import DataFrame

    paths = [path for root in roots for path in Path(root).rglob("config.yaml") if "tuning" not in path.parts]
    folders = sorted({path.parent.resolve() for path in paths if path.is_file()})
    finished = [folder for folder in folders if (folder / "summary.json").is_file()]
    empty = [root for root in roots if not any(Path(root).rglob("config.yaml"))]
    if empty or not finished:
        below = ", ".join(map(str, empty or roots))
        raise ValueError(f"No finished run below {below}: a finished run holds a summary.json.")
    runs = [_read_run(folder) for folder in finished]
    if metric != "return":
        runs = [run | _read_evaluations(run["folder"], metric) for run in runs]
    known = {key for run in runs for key in run["config"]}
    for key in split:
        if key not in known:
            similar = ", ".join(nearest(key, known)) or "none"
            raise ValueError(f"No run has a setting {key!r} to split by; nearest: {similar}.")
    for run in runs:
        run["method"] = " ".join([run["method"], *(_setting(key, run["config"].get(key)) for key in split)])
    _tell_action_types_apart(runs)
    for run in runs:
        run["config"] = without_seed(run["config"])
    table = DataFrame(runs).sort_values(["environment", "task", "method", "seed"], ignore_index=True)
    return table, [folder for folder in folders if folder not in finished]


def _tell_action_types_apart(runs: Iterable[dict[str, Any]]) -> None:
    """Make two tasks of one whose runs act continuously and discretely, with the setting in their names."""
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        for key in sorted({key for run in of_task for key in run["config"] if key.endswith("continuous_actions")}):
            values = [run["config"].get(key, "(default)") for run in of_task]
            for run, value in zip(of_task, values, strict=True):
                run["task"] += f" {_setting(key, value)}" if len(set(values)) > 1 else ""


def _read_run(folder: Path) -> dict[str, Any]:
    """Return the row of a run for comparisons."""
    try:
        nested: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # nothing in it is resolved
        config = _flat(nested)
        environment = config.get("environment") or config["recipe"]  # older runs have only recipe
        names = {"environment": environment, "task": config["env.scenario"], "method": config["method"]}
        summary = json.loads((folder / "summary.json").read_text())
        numbers = {key: summary[key] for key in ("final", "last_fifth", "absolute", "frames", "frames_per_second")}
        sessions = summary.get("sessions", [{"command": "not recorded", "git_commit": summary["git_commit"]}])
        said = [session[key] for session in sessions for key in ("command", "git_commit")]
        if not all(isinstance(text, str) for text in (*names.values(), *said)):
            raise ValueError("a name, command or commit is no text")
        if not all(type(number) in (int, float) for number in (*numbers.values(), config["evaluation.episodes"])):
            raise ValueError("summary.json or config.yaml holds something else than numbers")
        if type(config["seed"]) is not int:
            raise ValueError("the seed is no integer")
        metrics = read_metrics(folder)
        losses = [values.tobytes() for name, (_, values) in sorted(metrics.items()) if "/loss_" in name]
        curves = {"returns": metrics[RETURN], "losses": hashlib.sha1(b"\n".join(losses)).hexdigest()}
    except Exception as error:  # untrusted files raise any exception, from YAML's errors to RecursionError
        raise ValueError(f"{folder} cannot be read as a finished run: {reason(error)}.") from error
    return {
        "folder": folder,
        "seed": config["seed"],
        "config": config,
        "sessions": sessions,
        **names,
        **numbers,
        **curves,
    }


def _read_evaluations(folder: Path, metric: str) -> dict[str, Any]:
    """Return a run's returns, or another metric, from its evaluation episodes."""
    path = folder / "evaluations.json"
    try:
        ((_, _, _, steps),) = _runs_in(path)
        last = steps.pop(_ABSOLUTE)
        if metric not in last:
            raise ValueError(f"there is no metric {metric!r}, but {', '.join(last)}")
        frames = np.array([step["step_count"] for step in steps.values()], float)
        values = np.array([np.mean(step[metric]) for step in steps.values()])
        absolute = float(np.mean(last[metric]))
    except Exception as error:  # an untrusted file, as above
        raise ValueError(f"{path}: {reason(error)}.") from error
    last_fifth = values[-max(1, len(values) // 5) :].mean()
    return {"final": values[-1], "last_fifth": last_fifth, "absolute": absolute, "returns": (frames, values)}


def without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, nested or flat, without entries specific to a seed or to the machine."""
    own = ("seed", "resume", "folder", "device", "logger")
    return {key: value for key, value in config.items() if key.partition(".")[0] not in own}


def _setting(key: str, value: object) -> str:
    """A setting in the name of a variant, in short form: ``guider=make_sable``."""
    if key.endswith("._target_"):
        key, value = key.removesuffix("._target_"), str(value).rpartition(".")[2]
    return f"{key.rpartition('.')[2]}={value}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
