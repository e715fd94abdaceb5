"""What every recipe needs around its loop: progress, metrics, evaluation, checkpoints, interruption, pictures."""

from __future__ import annotations

import copy
import math
import secrets
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm

from torchrl_marl.checkpoints import CheckpointFolder, actor_record, load_policy
from torchrl_marl.collectors import SequenceCollector
from torchrl_marl.envs import RandomState, preserve_random_state, render_episode
from torchrl_marl.evaluation import evaluate, plot_learning_curve
from torchrl_marl.evaluation.episodes import ended_episode_returns
from torchrl_marl.evaluation.records import EvaluationRecord
from torchrl_marl.loggers import MetricLog, git_commit, run_group
from torchrl_marl.modules import GroupShape

__all__ = ["LAST_FIFTH", "Run"]

LAST_FIFTH = "eval/reward/last_fifth"
"""Metric that a finished run logs and a sweep maximises: mean evaluation return over the last fifth of evaluations."""


class Run:
    """One training run: a folder with its configuration, metrics, evaluation episodes, checkpoints and pictures.

    The loop stays in the recipe::

        run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
        for batch in run.batches(collector):
            ...  # advantages, then epochs of minibatches
            run.record(losses)
        return run.finish()

    A checkpoint is written after every evaluation and is a reset point: the training environments start new episodes
    there, in a run that goes on as in one that is resumed, which makes the two equal bit for bit. Ctrl-C or SIGTERM
    ends the run after the iteration under way, with a checkpoint.

    Args:
        cfg: resolved configuration with ``seed``, ``total_frames``, ``evaluation``, ``logger``, ``env``, ``actor``,
            ``folder``, ``method``, ``recipe``, ``environment`` (its name) and ``resume`` (``None`` or a checkpoint file
            to go on from).
        env: what the data come from; its own random streams, if it has some, become part of checkpoints.
        make_env: ``make_env(num_envs=..., seed=...)``, for evaluation.
        actor: the policy.
        shape: what the actor was built for.
        **components: what else a checkpoint must hold: the loss, the optimiser, ...

    Raises:
        ValueError: if the checkpoint to resume from is damaged or out of place, or evaluations are so frequent that no
            training episode could reach its time limit between two of them.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        env: EnvBase,
        make_env: Callable[..., EnvBase],
        actor: ProbabilisticActor,
        shape: GroupShape,
        **components: Any,
    ) -> None:
        shortest = cfg.env.num_envs * cfg.env.max_steps
        if cfg.evaluation.interval < shortest:
            raise ValueError(
                f"evaluation.interval is {cfg.evaluation.interval}, but training starts new episodes at evaluations, "
                f"which would never reach their limit: it must be at least num_envs * max_steps = {shortest}."
            )
        self.cfg = cfg
        if cfg.env.get("compile"):
            make_env = partial(make_env, compile=False)  # a few episodes end before a compiler does
        self._actor, self._shape, self._make_env = actor, shape, make_env
        self._progress: dict[str, Any] = {"frames": 0, "iteration": 0, "seconds": 0.0, "evaluations": []}
        resumed = None if cfg.resume is None else Path(cfg.resume)
        if resumed is None:
            self.folder = _new_folder(cfg)
            self._progress["run_id"] = secrets.token_hex(4)
        elif resumed.resolve().parent.name == "checkpoints":
            self.folder = resumed.resolve().parents[1]
        else:
            raise ValueError(f"{resumed} does not lie in the folder of a run (RUN/checkpoints/...), which would go on.")
        self._checkpoints = CheckpointFolder(
            self.folder / "checkpoints",
            actor=actor,
            random_state=RandomState(env),
            progress=self._progress,
            **components,
        )
        if resumed is not None:
            self._checkpoints.load(resumed)
            self._checkpoints.set_aside_beyond(self._progress["frames"])
        session = {"command": _command(cfg), "git_commit": git_commit()}
        self._progress.setdefault("sessions", []).append(session)
        config: dict[str, Any] = _plain(cfg)
        OmegaConf.save(cfg, self.folder / "config.yaml")
        task = cfg.env.scenario
        resumed_at = None if resumed is None else self._progress["frames"]
        self._log = MetricLog(
            self.folder,
            config={**config, **session},
            name=f"{cfg.method}-{task}-seed{cfg.seed}",
            group=run_group(cfg.method, task, config),
            tags=(cfg.recipe, cfg.method, task),
            run_id=self._progress["run_id"],
            resumed_at=resumed_at,
            **cfg.logger,
        )
        self._evaluations = EvaluationRecord(
            self.folder / "evaluations.json",
            environment=cfg.environment,
            task=task,
            method=cfg.method,
            seed=cfg.seed,
            resumed_at=resumed_at,
        )
        self._records: list[Mapping[str, Tensor]] = []
        self._interrupted = False
        with preserve_random_state():
            self._evaluation_env = make_env(num_envs=cfg.evaluation.episodes, seed=self._seed(1))

    def batches(self, collector: Collector | SequenceCollector) -> Iterator[TensorDictBase]:
        """Yield batches until ``total_frames``; what the loop's body does with one ends its iteration.

        Raises:
            FloatingPointError: if a loss or a gradient is NaN or infinite.
        """
        progress, total = self._progress, self.cfg.total_frames
        if not progress["evaluations"]:
            self._evaluate_and_save()
        data = iter(collector)
        collector.reset()
        bar = tqdm(total=total, initial=progress["frames"], unit=" frames", unit_scale=True, desc=self.cfg.method)
        with bar, _signals(self._interrupt):
            while progress["frames"] < total and not self._interrupted:
                start = time.perf_counter()
                batch = next(data)
                collected = time.perf_counter()
                yield batch
                self._finish_iteration(batch, collected - start, time.perf_counter() - collected, bar)
                if self._evaluation_is_due(batch.numel()):
                    self._evaluate_and_save()
                    collector.reset()
        collector.shutdown()

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep what a minibatch measured, 0-dim tensors by name; each iteration logs their mean.

        ``min_*`` and ``max_*`` give the extremes instead. Values stay on their device until the iteration ends.
        """
        self._records.append({name: value.detach() for name, value in metrics.items()})

    def finish(self, *plots: Callable[[Path], object]) -> float:
        """Measure the best parameters, draw, print the summary line, and close the logs.

        Args:
            *plots: further pictures, functions of the run's folder, such as
                :func:`~torchrl_marl.evaluation.plot_kl_interval`.

        Returns:
            Mean evaluation return over the last fifth of the evaluations (what a sweep should maximise).
        """
        evaluations = self._progress["evaluations"]
        last_fifth = [score for _, score in evaluations[-max(1, len(evaluations) // 5) :]]
        objective = sum(last_fifth) / len(last_fifth)
        if self._interrupted:
            self._log.finish()
            print(f"Stopped after {self._progress['frames']:,} frames. Go on with 'resume=\"{self.folder}\"'")
            if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise KeyboardInterrupt  # the rest of the grid, too
            return objective
        summary = {
            "final": evaluations[-1][1],
            "best": max(score for _, score in evaluations),
            "absolute": self._absolute_metric(),
            "last_fifth": objective,
            "frames": self._progress["frames"],
            "frames_per_second": self._progress["frames"] / max(self._progress["seconds"], 1e-9),
            "seconds": self._progress["seconds"],
            "git_commit": git_commit(),
            "sessions": self._progress["sessions"],
        }
        self._log.log({LAST_FIFTH: objective}, self._progress["frames"])
        self._draw(plots)
        self._log.finish(summary)
        print(
            f"{self.cfg.method} on {self.cfg.env.scenario}, seed {self.cfg.seed}: final return {summary['final']:.3f}, "
            f"best {summary['best']:.3f}, absolute {summary['absolute']:.3f}, {summary['frames']:,} frames, "
            f"{summary['frames_per_second']:,.0f} frames/s\n{self.folder}"
        )
        return objective

    def _finish_iteration(self, batch: TensorDictBase, collecting: float, training: float, bar: tqdm) -> None:
        progress = self._progress
        progress["frames"] += batch.numel()
        progress["iteration"] += 1
        progress["seconds"] += collecting + training
        metrics = {f"train/{self._shape.name}/{name}": value for name, value in _reduced(self._records).items()}
        self._records.clear()
        returns = ended_episode_returns(batch)
        if returns.numel():
            metrics |= _statistics("collection/reward/episode_reward", returns)
            bar.set_postfix_str(f"iteration {progress['iteration']}, return {returns.mean().item():.2f}", refresh=False)
        metrics |= {
            "counters/iter": progress["iteration"],
            "counters/current_frames": batch.numel(),
            "counters/total_frames": progress["frames"],
            "timers/collection_time": collecting,
            "timers/training_time": training,
            "timers/iteration_time": collecting + training,
            "timers/frames_per_second": batch.numel() / (collecting + training),
        }
        self._log.log(metrics, progress["frames"])
        self._check_finite(metrics)
        bar.update(batch.numel())

    def _evaluation_is_due(self, frames_per_batch: int) -> bool:
        frames, interval = self._progress["frames"], self.cfg.evaluation.interval
        passed = frames // interval > (frames - frames_per_batch) // interval
        return passed or self._interrupted or frames >= self.cfg.total_frames

    def _evaluate_and_save(self) -> None:
        for name, parameter in self._actor.named_parameters():
            if not parameter.isfinite().all():
                self._stop(f"the policy's {name}", "NaN or infinite")
        frames = self._progress["frames"]
        start = time.perf_counter()
        with preserve_random_state():
            seed, horizon = self._seed(1), self.cfg.env.max_steps
            episodes = evaluate(self._evaluation_env, self._actor, seed=seed, max_steps=horizon)
        metrics = _statistics("eval/reward/episode_reward", episodes.returns)
        metrics["eval/reward/episode_len_mean"] = episodes.lengths.float().mean().item()
        metrics["timers/evaluation_time"] = time.perf_counter() - start
        score = metrics["eval/reward/episode_reward_mean"]
        self._log.log(metrics, frames)
        if not math.isfinite(score):
            self._stop("the evaluation return", score)
        self._evaluations.add(frames, episodes.metrics())
        self._progress["evaluations"].append([frames, score])
        record = actor_record(self._shape, _plain(self.cfg.actor))
        metadata = {"config": _plain(self.cfg), "actor": record, "frames": frames}
        self._checkpoints.save(frames=frames, score=score, metadata=metadata)

    def _absolute_metric(self) -> float:
        """Return of the best parameters over ten times as many episodes, on starts that no evaluation has used."""
        with preserve_random_state():
            env = self._make_env(num_envs=10 * self.cfg.evaluation.episodes, seed=self._seed(2))
            episodes = evaluate(env, self._best_policy(), seed=self._seed(2), max_steps=self.cfg.env.max_steps)
        self._evaluations.add_absolute(episodes.metrics())
        self._log.log(_statistics("eval/absolute/episode_reward", episodes.returns), self._progress["frames"])
        return episodes.returns.mean().item()

    def _best_policy(self) -> ProbabilisticActor:
        return load_policy(self.folder, actor=copy.deepcopy(self._actor))

    def _draw(self, plots: Iterable[Callable[[Path], object]]) -> None:
        """Write the learning curve and a video of the best policy; a missing renderer must not fail a finished run."""
        for plot in plots:
            with _as_warning(getattr(plot, "__name__", "plot")):
                plot(self.folder)
        title = f"{self.cfg.method} on {self.cfg.env.scenario}, seed {self.cfg.seed}"
        with _as_warning("learning curve"):
            plot_learning_curve(self._progress["evaluations"], self.folder / "learning_curve.png", title=title)
        with _as_warning("video"), preserve_random_state():
            if self.cfg.evaluation.video:
                env, path = self._make_env(num_envs=1, seed=self._seed(3)), self.folder / "episode.gif"
                render_episode(env, self._best_policy(), path, max_steps=self.cfg.env.max_steps)
                self._log.video(path, self._progress["frames"])

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if ("loss_" in name or "grad_norm" in name) and not math.isfinite(value):
                self._stop(name, value)

    def _stop(self, name: str, value: object) -> NoReturn:
        self._log.finish(failed=True)
        raise FloatingPointError(
            f"Iteration {self._progress['iteration']} ({self._progress['frames']:,} frames): {name} is {value}. "
            f"Last good checkpoint: {self._checkpoints.latest}"
        )

    def _interrupt(self) -> None:
        self._interrupted = True

    def _seed(self, purpose: int) -> int:
        """Seed for evaluation (1), the absolute metric (2) and the video (3), away from that of training."""
        return 1_000_003 * purpose + self.cfg.seed


def _new_folder(cfg: DictConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (
        Path(cfg.folder) / cfg.recipe / cfg.env.scenario / cfg.method / f"seed{cfg.seed}-{stamp}-{secrets.token_hex(2)}"
    )
    folder.mkdir(parents=True)
    return folder


def _command(cfg: DictConfig) -> str:
    """Return the command that repeats this run, without the names of folders: they are no part of the experiment."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    pairs = [override.removeprefix("++").partition("=") for override in overrides]
    words = [
        key + "=RUN" if key == "resume" else key + equals + value for key, equals, value in pairs if key != "folder"
    ]
    return shlex.join(["python", f"recipes/{cfg.recipe}.py", *words])


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dictionaries and lists."""
    return {str(key): value for key, value in cast("dict", OmegaConf.to_container(cfg)).items()}


def _reduced(records: list[Mapping[str, Tensor]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record)  # not every record has every name
    stacked = {name: torch.stack([record[name] for record in records if name in record]) for name in names}
    reduce = {"min": torch.amin, "max": torch.amax}
    return {name: reduce.get(name[:3], torch.mean)(values).item() for name, values in stacked.items()}


def _statistics(name: str, values: Tensor) -> dict[str, float]:
    spread = values.std(correction=0)
    return {
        f"{name}_mean": values.mean().item(),
        f"{name}_std": spread.item(),
        f"{name}_min": values.min().item(),
        f"{name}_max": values.max().item(),
    }


@contextmanager
def _as_warning(picture: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        warnings.warn(f"The run is complete, but it has no {picture}: {error!r}", stacklevel=3)


@contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one ends the program at once."""

    def handle(number: int, frame: object) -> None:
        print("\nStopping after this iteration, with a checkpoint (again to stop at once).")
        interrupt()
        for which, handler in previous.items():
            signal.signal(which, handler)

    previous: dict[signal.Signals, Any] = {}
    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            previous[which] = signal.signal(which, handle)
    except ValueError:  # not the main thread: leave signals alone
        previous.clear()
    try:
        yield
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
