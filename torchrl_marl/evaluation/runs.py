"""Finished runs as read from their folders, and whether they can be compared."""

from __future__ import annotations

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from torchrl_marl.loggers import without_seed
from torchrl_marl.trust import reason

__all__ = ["FinishedRun", "RunGroups", "check_comparable", "group_runs", "read_runs"]


@dataclass(frozen=True)
class FinishedRun:
    """What a comparison needs of a run's folder."""

    folder: Path
    task: str
    environment: str
    method: str
    """Name of the method, with the values of the keys that methods are split by."""
    config: Mapping[str, Any]
    """Flat, by dotted keys."""
    summary: Mapping[str, Any]
    frames: NDArray[np.float64]
    """Frames at each evaluation, ``[evaluations]``."""
    returns: NDArray[np.float64]
    """Mean return of each evaluation, ``[evaluations]``."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config["seed"]


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Frames and values, ``[steps]`` each."""

RunGroups = dict[str, dict[str, list[FinishedRun]]]
"""Runs by task and method, in the order of their seeds."""


def read_runs(roots: Iterable[Path], *, split: Sequence[str] = ()) -> tuple[list[FinishedRun], list[Path]]:
    """Read every run at or below some folders; the trials of tuning, in folders named ``tuning``, are no results.

    Args:
        roots: folders.
        split: dotted configuration keys whose values tell variants of one method apart, such as ``optimizer.lr``.

    Returns:
        Finished runs, and the folders of unfinished ones.

    Raises:
        ValueError: if there is no finished run, one of them is damaged, or none says anything of a key to split by.
    """
    paths = [path for root in roots for path in Path(root).rglob("config.yaml") if "tuning" not in path.parts]
    folders = sorted({path.parent.resolve() for path in paths if path.is_file()})
    finished = [folder for folder in folders if (folder / "summary.json").is_file()]
    if not finished:
        raise ValueError(f"No finished run below {', '.join(map(str, roots))}: a finished run holds a summary.json.")
    runs = [_read(folder, split) for folder in finished]
    known = {key for run in runs for key in run.config}
    for key in split:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            raise ValueError(f"No run has a setting {key!r} to split by; nearest: {', '.join(nearest) or 'none'}.")
    return runs, [folder for folder in folders if folder not in finished]


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs that cannot stand in one table.

    On one task, all runs must share the environment with its options and its time limit, the budget and the
    evaluation; the runs of one method must differ in nothing but distinct seeds.

    Raises:
        ValueError: with every key that differs, its values and a run of each.
    """
    for task, methods in group_runs(runs).items():
        everyone = [run for members in methods.values() for run in members]
        differing = _differences(everyone, _shared_settings)
        if differing:
            raise ValueError(f"Runs on {task} cannot be compared, they differ in\n{differing}")
        for method, members in methods.items():
            _check_seeds(task, method, members)


def group_runs(runs: Iterable[FinishedRun]) -> RunGroups:
    """Sort runs by environment, task, method and seed."""
    groups: RunGroups = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: (run.environment, run.task, run.method, run.seed)):
        groups[run.task][run.method].append(run)
    return {task: dict(methods) for task, methods in groups.items()}


def read_metric(run: FinishedRun, metric: str) -> Curve:
    """Return frames and values of a metric that a run logged, ``[steps]`` each.

    Raises:
        ValueError: if it did not; the message says what it logged.
    """
    scalars = run.folder / "scalars"
    if not (scalars / f"{metric}.csv").exists():
        there = sorted(str(file.relative_to(scalars).with_suffix("")) for file in scalars.rglob("*.csv"))
        raise ValueError(f"{run.folder} has no metric {metric!r}; it has {', '.join(there)}.")
    return _curve(run.folder, metric)


def _curve(folder: Path, metric: str) -> Curve:
    steps = np.loadtxt(folder / "scalars" / f"{metric}.csv", delimiter=",", ndmin=2)
    return steps[:, 0], steps[:, 1]


def _read(folder: Path, split: Sequence[str]) -> FinishedRun:
    try:
        run = _read_files(folder, split)
        _check_form(run)
    except Exception as error:  # anyone's files raise anything, from YAML's errors to RecursionError
        raise ValueError(f"{folder} cannot be read as a finished run: {reason(error)}.") from error
    return run


def _check_form(run: FinishedRun) -> None:
    numbers = [run.summary[key] for key in ("absolute", "final", "last_fifth", "frames", "frames_per_second")]
    sessions = [session[key] for session in run.summary.get("sessions", []) for key in ("command", "git_commit")]
    if not all(isinstance(text, str) for text in (run.task, run.environment, run.method, *sessions)):
        raise ValueError("a name, command or commit is no text")
    if not all(type(number) in (int, float) for number in (*numbers, run.config["evaluation.episodes"])):
        raise ValueError("summary.json or config.yaml holds something else than numbers")
    if type(run.seed) is not int or not len(run.frames):
        raise ValueError("the seed is no integer, or nothing was evaluated")


def _read_files(folder: Path, split: Sequence[str]) -> FinishedRun:
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # nothing in it is resolved
    flat = _flat(config)
    frames, returns = _curve(folder, "eval/reward/episode_reward_mean")
    return FinishedRun(
        folder=folder,
        task=flat["env.scenario"],
        environment=flat.get("environment", flat["recipe"]),  # the former is new
        method=" ".join([flat["method"], *(_setting(key, flat.get(key)) for key in split)]),
        config=flat,
        summary=json.loads((folder / "summary.json").read_text()),
        frames=frames,
        returns=returns,
    )


def _setting(key: str, value: object) -> str:
    """A setting in the name of a variant, without the parts that all share: ``guider=make_sable``."""
    if key.endswith("._target_"):
        key, value = key.removesuffix("._target_"), str(value).rpartition(".")[2]
    return f"{key.rpartition('.')[2]}={value}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shared_settings(run: FinishedRun) -> dict[str, Any]:
    """Return what must be equal on a task; how many copies of it are stepped at once belongs to the method."""
    keys = ("total_frames", "evaluation.interval", "evaluation.episodes")
    environment = {key for key in run.config if key.startswith("env.")} - {"env.num_envs", "env.compile"}
    return {key: run.config[key] for key in (*keys, *environment)}


def _differences(runs: Sequence[FinishedRun], settings: Callable[[FinishedRun], Mapping[str, Any]]) -> str:
    """Return a line for each key that is not the same in all runs: the values, and a run that has each."""
    found = [settings(run) for run in runs]
    lines = []
    for key in sorted({key for setting in found for key in setting}):
        examples: dict[str, FinishedRun] = {}
        for run, setting in zip(runs, found, strict=True):
            examples.setdefault(str(setting.get(key, "(default)")), run)
        if len(examples) > 1:
            values = ", ".join(f"{value} in {run.folder.name} of {run.method}" for value, run in examples.items())
            lines.append(f"  {key}: {values}")
    return "\n".join(lines)


def _check_seeds(task: str, method: str, runs: Sequence[FinishedRun]) -> None:
    differing = _differences(runs, lambda run: without_seed(run.config))
    if differing:
        raise ValueError(
            f"Runs of {method} on {task} are not seeds of one configuration, they differ in\n{differing}\n"
            "Name such keys with --split to compare them as variants."
        )
    seed, count = Counter(run.seed for run in runs).most_common(1)[0]
    if count > 1:
        twice = [str(run.folder) for run in runs if run.seed == seed]
        raise ValueError(f"Seed {seed} of {method} on {task} is there {count} times: {', '.join(twice)}.")
    for index, run in enumerate(runs):
        for other in runs[:index]:
            # a game without chance may well give two seeds the same evaluations, but not the same losses
            if len(run.returns) > 1 and np.array_equal(run.returns, other.returns) and _losses(run) == _losses(other):
                raise ValueError(f"Seeds {other.seed} and {run.seed} of {method} on {task} have the same curve.")


def _losses(run: FinishedRun) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run.folder / "scalars").rglob("loss_*.csv")}
