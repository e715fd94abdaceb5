"""The public files of a run's folder: metrics, evaluation episodes, configuration and summary.

::

    config.yaml             the resolved configuration
    scalars/METRIC.csv      rows ``frames,value`` of each metric
    evaluations.json        every evaluation episode, in the layout of marl-eval
    summary.json            results of the run; written only by a finished run
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from torchrl_marl.files import replacing
from torchrl_marl.trust import reason

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["RETURN", "EvaluationRecord", "merge_records", "metric_files", "read_metric", "read_runs", "without_seed"]

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


def merge_records(paths: Iterable[tuple[Path, str]]) -> dict[str, Any]:
    """Merge the evaluation episodes of many runs into one tree in marl-eval's layout.

    Args:
        paths: file of each run with the name of its method, which may distinguish variants.

    Raises:
        ValueError: if two files hold the same run, or a file has another layout.
    """
    merged: dict[str, Any] = {}
    for path, method in paths:
        for environment, task, seed, steps in _runs_in(path):
            runs = merged.setdefault(environment, {}).setdefault(task, {}).setdefault(method, {})
            if seed in runs:
                raise ValueError(f"{path} holds {seed} of {method} on {task}, which another file also has.")
            runs[seed] = steps
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


def metric_files(folder: Path) -> dict[str, Path]:
    """Return the CSV file of each metric that a run has logged, by metric."""
    scalars = folder / "scalars"
    return {path.relative_to(scalars).with_suffix("").as_posix(): path for path in sorted(scalars.rglob("*.csv"))}


def read_metric(folder: Path, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return frames and values of a metric that a run has logged, ``[steps]`` each.

    Raises:
        ValueError: if the run has not logged the metric, with the logged metrics; or if the file is malformed.
    """
    files = metric_files(folder)
    if metric not in files:
        raise ValueError(f"{folder} has no metric {metric!r}; it has {', '.join(files)}.")
    frames, values = np.loadtxt(files[metric], delimiter=",", ndmin=2).T
    return frames, values


def read_runs(
    roots: Iterable[Path], *, split: Sequence[str] = (), metric: str = "return"
) -> tuple[DataFrame, list[Path]]:
    """Read every run at or below some folders, except the trials of tuning, in folders named ``tuning``.

    Args:
        roots: folders.
        split: dotted configuration keys whose values distinguish variants of a method, such as ``optimizer.lr``.
        metric: metric of the evaluation episodes to use as return: ``won``, ``episode_length``, ...

    Returns:
        Finished runs, and the folders of unfinished runs. The runs are a table with one row per run, sorted by
        environment, task, method and seed. Columns are these four, the ``folder``, the ``config`` by dotted keys
        without seed-specific entries, the entries of summary.json, the frames and mean ``returns`` of the evaluations,
        and a digest of the ``losses``.

    Raises:
        ValueError: if there is no finished run, a run is damaged, no run has a key of ``split``, or the episodes of a
            run do not have the metric.
        ImportError: without pandas (``pip install "torchrl_marl[plot]"``).
    """
    from pandas import DataFrame

    paths = [path for root in roots for path in Path(root).rglob("config.yaml") if "tuning" not in path.parts]
    folders = sorted({path.parent.resolve() for path in paths if path.is_file()})
    finished = [folder for folder in folders if (folder / "summary.json").is_file()]
    if not finished:
        raise ValueError(f"No finished run below {', '.join(map(str, roots))}: a finished run holds a summary.json.")
    runs = [_read_run(folder) for folder in finished]
    if metric != "return":
        runs = [run | _read_evaluations(run["folder"], metric) for run in runs]
    known = {key for run in runs for key in run["config"]}
    for key in split:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            raise ValueError(f"No run has a setting {key!r} to split by; nearest: {', '.join(nearest) or 'none'}.")
    for run in runs:
        run["method"] = " ".join([run["method"], *(_setting(key, run["config"].get(key)) for key in split)])
        run["config"] = without_seed(run["config"])
    table = DataFrame(runs).sort_values(["environment", "task", "method", "seed"], ignore_index=True)
    return table, [folder for folder in folders if folder not in finished]


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
        losses = [path.read_bytes() for path in metric_files(folder).values() if path.name.startswith("loss_")]
        curves = {"returns": read_metric(folder, RETURN), "losses": hashlib.sha1(b"\n".join(losses)).hexdigest()}
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
