"""Logging of metrics: a CSV table always, Weights & Biases if installed, TensorBoard on request."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torchrl.record import TensorboardLogger

import torchrl_marl
from torchrl_marl.files import replacing
from torchrl_marl.run.records import FRAMES, MetricTable, read_metrics, without_seed

__all__ = ["ABSOLUTE", "LAST_FIFTH", "MetricLog", "git_commit", "run_group"]

ABSOLUTE = "eval/absolute"
"""Group of metrics that a finished run logs: episodes of its best parameters, such as ``/episode_reward_mean``."""
LAST_FIFTH = "eval/reward/last_fifth"
"""Metric that a finished run logs and a sweep maximises: mean evaluation return over the last fifth of evaluations."""


class MetricLog:
    """Write the metrics of one run.

    CSV: ``folder/metrics.csv``, see :class:`~torchrl_marl.run.records.MetricTable`. W&B: all metrics over
    ``counters/total_frames``; online if the user is logged in, else offline in ``folder/wandb`` (upload with
    ``wandb sync``). W&B never prompts; if the server cannot be reached, the run logs offline with a warning. A run
    resumed offline writes its whole curve again, so only the newest folder needs to be uploaded; older folders move to
    ``folder/abandoned``.

    Args:
        folder: the run's folder.
        config: the full resolved configuration.
        name: display name of the run.
        group: name shared by runs that differ only in the seed.
        tags: tags of the run.
        run_id: fixed id, so that a resumed run continues its W&B curve.
        resumed_at: frames at which a resumed run continues. Later rows and the metrics of a finished run are dropped;
            the summary moves to ``folder/abandoned``. ``None`` for a new run.
        wandb_project: W&B project; ``None`` turns W&B off.
        wandb_tags: further tags.
        wandb_mode: ``"online"``, ``"offline"`` or ``"disabled"``; ``None`` chooses as above.
        tensorboard: also write TensorBoard event files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        name: str,
        group: str,
        tags: tuple[str, ...],
        run_id: str,
        resumed_at: int | None = None,
        wandb_project: str | None = "torchrl_marl",
        wandb_tags: Sequence[str] = (),
        wandb_mode: Literal["online", "offline", "disabled"] | None = None,
        tensorboard: bool = False,
    ) -> None:
        earlier = [] if resumed_at is None else _rows_until(resumed_at, folder)
        self._folder = folder
        self._table = MetricTable(folder / "metrics.csv", earlier)
        if resumed_at is not None:
            _set_aside(folder, [*folder.glob("summary.json"), *folder.glob("scalars")])  # those: of before metrics.csv
        self._tensorboard = TensorboardLogger("tensorboard", log_dir=str(folder)) if tensorboard else None
        self._wandb = None
        if wandb_project is not None and importlib.util.find_spec("wandb") is not None:
            older = list((folder / "wandb").glob("offline-run-*"))
            tags = (*tags, *wandb_tags)
            identity = {"project": wandb_project, "name": name, "group": group, "tags": tags, "id": run_id}
            self._wandb = _start_wandb(wandb_mode, dir=str(folder), config=dict(config), **identity)
            self._wandb.define_metric("*", step_metric=FRAMES)
            if resumed_at is not None and self._wandb.offline:
                for row in earlier:  # the newest folder is all there is to send
                    self._wandb.log(row)
                _set_aside(folder, older)

    def log(self, metrics: Mapping[str, float], frames: int) -> None:
        """Write metrics measured after ``frames`` frames."""
        self._table.add(frames, metrics)
        if self._tensorboard is not None:
            self._tensorboard.log_metrics(dict(metrics), step=frames)
        if self._wandb is not None:
            self._wandb.log({**metrics, FRAMES: frames})

    def video(self, path: Path, frames: int) -> None:
        """Send a GIF from the run's folder to W&B, as a panel and as an artifact."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({"eval/video": wandb.Video(str(path), format="gif"), FRAMES: frames})
            self.artifact(path, "video", {"frames": frames})

    def artifact(self, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        """Send a file to W&B as the newest version of the artifact ``KIND-RUN_ID`` of type ``kind``."""
        if self._wandb is not None:
            import wandb

            artifact = wandb.Artifact(f"{kind}-{self._wandb.id}", type=kind, metadata=dict(metadata))
            artifact.add_file(str(path), policy="immutable")  # uploaded in place, without a copy in the cache
            self._wandb.log_artifact(artifact)

    def finish(self, summary: Mapping[str, Any] | None = None, *, failed: bool = False) -> None:
        """Write ``summary.json`` and the W&B summary, and close the logs; ``failed`` marks the W&B run as failed."""
        if summary is not None:
            with replacing(self._folder / "summary.json") as path:
                path.write_text(json.dumps(summary, indent=2) + "\n")
        if self._wandb is not None:
            self._wandb.summary.update(dict(summary or {}))
            self._wandb.finish(exit_code=int(failed))
        if self._tensorboard is not None:
            self._tensorboard.experiment.close()


def run_group(method: str, task: str, config: Mapping[str, Any]) -> str:
    """Name shared by runs that differ only in the seed: ``method_task_hash``.

    Example:
        >>> run_group("mars", "balance", {"lr": 1, "seed": 0}) == run_group("mars", "balance", {"lr": 1, "seed": 7})
        True
    """
    digest = hashlib.sha1(json.dumps(without_seed(config), sort_keys=True).encode()).hexdigest()
    return f"{method}_{task}_{digest[:8]}"


def git_commit() -> str:
    """Commit of this package's source tree, with ``-dirty`` if modified; the version without a source tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"v{torchrl_marl.__version__}"


def _start_wandb(mode: str | None, **run: Any) -> Any:
    """Start a W&B run without prompting: online with a login and a reachable server, else offline."""
    import wandb

    mode = mode or os.environ.get("WANDB_MODE") or "online"
    run |= {"job_type": "train", "resume": "allow"}
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, reinit="create_new")
    try:
        if mode == "online" and not wandb.login(prompt=False):
            mode = "offline"
        return wandb.init(mode=cast("Any", mode), settings=settings, **run)
    except wandb.errors.Error as error:
        warnings.warn(f"W&B is out of reach and logs offline: {error}", stacklevel=3)
        return wandb.init(mode="offline", settings=settings, **run)


def _rows_until(frames: int, folder: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics that it keeps: what it measured later, or at its end, it will measure again."""
    rows: dict[int, dict[str, float]] = {}
    for name, measured in read_metrics(folder).items():
        for step, value in zip(*measured, strict=True):
            if step <= frames and not name.startswith((ABSOLUTE, LAST_FIFTH)):
                rows.setdefault(int(step), {})[name] = float(value)
    return [{**row, FRAMES: step} for step, row in sorted(rows.items())]


def _set_aside(folder: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        (folder / "abandoned").mkdir(exist_ok=True)
        path.replace(folder / "abandoned" / path.name)
