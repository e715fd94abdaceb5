"""Evaluations episode by episode, in the JSON layout of marl-eval."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_marl.files import replacing
from torchrl_marl.trust import reason

__all__ = ["EvaluationRecord", "merge_records"]

_ABSOLUTE = "absolute_metrics"


class EvaluationRecord:
    """Every evaluation episode of one run, in a file that is complete after each evaluation.

    Layout (https://github.com/instadeepai/marl-eval): ``{environment: {task: {method: {"seed_0": steps}}}}``, where
    ``steps`` holds ``"step_0"``, ``"step_1"``, ... with the frames seen as ``"step_count"`` and one value an episode
    for each metric, and in the end ``"absolute_metrics"`` with ten times as many.

    Args:
        path: JSON file to write.
        environment: name of the environment or suite.
        task: name of the task.
        method: name of the method.
        seed: of the run.
        resumed_at: frames at which a resumed run goes on; evaluations beyond are dropped. ``None`` for a new run.

    Raises:
        ValueError: if the file of a resumed run is another run's, or damaged.

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
        """Append the evaluation after ``frames`` frames: one value an episode for each metric."""
        self._steps[f"step_{len(self._steps)}"] = {"step_count": frames, **metrics}
        self._write()

    def add_absolute(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Add the episodes of the absolute metric, those of the best parameters."""
        self._steps[_ABSOLUTE] = dict(metrics)
        self._write()

    def _write(self) -> None:
        nested: dict[str, Any] = self._steps
        for key in reversed(self._keys):
            nested = {key: nested}
        with replacing(self._path) as path:
            path.write_text(json.dumps(nested) + "\n")


def merge_records(paths: Iterable[tuple[Path, str]]) -> dict[str, Any]:
    """Merge the files of many runs into one tree, as marl-eval reads it.

    Args:
        paths: of each run its file and the name that its method goes by, which may tell variants apart.

    Raises:
        ValueError: if two files hold the same run, or one is of another layout.
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
