"""Services around a recipe's loop: progress, metrics, evaluation, checkpoints, interruption, figures."""

from __future__ import annotations

import copy
import math
import secrets
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from threading import RLock, current_thread, main_thread
from typing import Any, NoReturn, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from tqdm import tqdm

from torchrl_marl.collectors import CompiledCollector, SequenceCollector, WorkerCollector
from torchrl_marl.distributed import any_process, broadcast_from_main, gather, rank, world_size
from torchrl_marl.envs import RandomState, preserve_random_state, render_episode, reseed
from torchrl_marl.evaluation import Episodes, evaluate, plot_learning_curve, plot_method
from torchrl_marl.evaluation.episodes import ended_episode_returns
from torchrl_marl.files import replacing
from torchrl_marl.modules import GroupSpec, ObservationNorm
from torchrl_marl.run.checkpoints import CheckpointFolder, actor_record, best_checkpoint, load_policy
from torchrl_marl.run.logger import ABSOLUTE, LAST_FIFTH, MetricLog, git_commit, run_group
from torchrl_marl.run.records import EvaluationRecord, read_metrics

__all__ = ["Run", "progress_bar", "reduce_records", "stop_signals"]

_MAX_COPIES = 1_024  # of an environment for the absolute metric
_MAX_SPARE = 8  # times as many frames as evaluations need, which compiled cost as much as those uncompiled
_SECONDS_BETWEEN_CURVES = 60  # drawing takes a quarter of one

_Collector = Collector | CompiledCollector | SequenceCollector | WorkerCollector


class Run:
    """One training run: a folder with its configuration, metrics, evaluation episodes, checkpoints and figures.

    The loop stays in the recipe::

        run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
        for batch in run.batches(collector):
            ...  # advantages, then epochs of minibatches
            run.record(losses)
        return run.finish()

    A checkpoint is written after every evaluation and is a reset point: the training environments start new episodes,
    whether the run continues or is resumed, so both are bit-identical. Ctrl-C or SIGTERM ends the run after the current
    iteration, without another checkpoint, which would be an additional reset point. A resumed run repeats the training
    since the last evaluation.

    A checkpoint holds the random state of this process only. At each reset point, it determines the random states of
    workers (:class:`~torchrl_marl.collectors.WorkerCollector`) and of the processes of torchrun
    (:mod:`torchrl_marl.distributed`). The first process evaluates, logs and saves; its training metrics cover its own
    share of the data.

    Args:
        cfg: resolved configuration with ``seed``, ``total_frames``, ``evaluation``, ``logger``, ``env``, ``actor``,
            ``folder``, ``method``, ``recipe``, ``environment`` (its name), ``processes``, ``resume`` (``None`` or a
            checkpoint file to go on from) and ``init_from`` (``None`` or a run; ``actor`` starts with the parameters of
            its policy, and nothing of that run is executed).
        env: the training environment; checkpoints include its random streams, if any.
        make_env: ``make_env(num_envs=..., seed=...)``, for evaluation.
        actor: the policy.
        shape: shape of the actor's group; for several groups a list of shapes, and the names of recorded metrics start
            with the group: ``run.record({"GROUP/loss_critic": ...})``.
        **components: further components of checkpoints: the loss, the optimiser, ...

    Raises:
        ValueError: if the checkpoint to resume from is damaged or outside a run's folder, the policy to start from does
            not fit, evaluations are so frequent that no training episode can reach its time limit, or the number of
            processes differs from ``processes``.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        env: EnvBase,
        make_env: Callable[..., EnvBase],
        actor: TensorDictModuleBase,
        shape: GroupSpec | Sequence[GroupSpec],
        **components: Any,
    ) -> None:
        if cfg.processes != world_size():
            raise ValueError(
                f"The configuration says processes={cfg.processes}, but the world size is {world_size()}: start with "
                f"torchrun --nproc-per-node {cfg.processes}, if the recipe supports it."
            )
        shortest = cfg.processes * cfg.env.num_envs * cfg.env.max_steps
        if cfg.evaluation.interval < shortest:
            raise ValueError(
                f"evaluation.interval is {cfg.evaluation.interval}, but training starts new episodes at evaluations, "
                f"which would never reach their limit: it must be at least num_envs * max_steps = {shortest}, over all "
                "processes."
            )
        self.cfg = cfg
        self._actor, self._shape, self._make_env = actor, shape, make_env
        self._env = env
        self._prefix = f"train/{shape.name}" if isinstance(shape, GroupSpec) else "train"
        self._progress: dict[str, Any] = {"frames": 0, "iteration": 0, "seconds": 0.0, "evaluations": []}
        resumed = None if cfg.resume is None else Path(cfg.resume)
        if resumed is None:
            if cfg.init_from is not None:
                _start_from(cfg, actor)
            self.folder = broadcast_from_main(lambda: _new_folder(cfg))
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
        networks = [part for part in (actor, *components.values()) if isinstance(part, nn.Module)]
        modules = dict.fromkeys(module for network in networks for module in network.modules())
        self._observation_norms = [module for module in modules if isinstance(module, ObservationNorm)]
        self._records: list[Mapping[str, Tensor]] = []
        self._warned: set[str] = set()
        self._asked_to_stop = self._interrupted = False
        self._collector: _Collector | None = None
        self._trained = ""  # what the progress line says of episodes in training
        self._drawn = time.monotonic()
        self.trained_with: list[str] = []
        """Folder names of runs trained as one group, including this run; empty for a single run."""
        self._is_main = rank() == 0
        if self._is_main:
            self._open_logs(resumed_at=None if resumed is None else self._progress["frames"])
            with preserve_random_state():
                self._evaluation_env = make_env(num_envs=cfg.evaluation.episodes, seed=self.seed(1))

    def _open_logs(self, *, resumed_at: int | None) -> None:
        cfg, task = self.cfg, self.cfg.env.scenario
        if resumed_at is not None:
            self._checkpoints.set_aside_beyond(resumed_at)
        session = {"command": _command(cfg), "git_commit": git_commit()}
        self._progress.setdefault("sessions", []).append(session)
        config: dict[str, Any] = _plain(cfg)
        with replacing(self.folder / "config.yaml") as path:
            OmegaConf.save(cfg, path)
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

    def batches(self, collector: _Collector) -> Iterator[TensorDictBase]:
        """Yield batches until ``total_frames``; an iteration ends with the body of the loop.

        Raises:
            FloatingPointError: if a loss or a gradient is NaN or infinite.
            RuntimeError: if collecting, evaluating or saving fails, for example because a worker has died or the disk
                is full; the message names the last good checkpoint.
        """
        bar = progress_bar(self.cfg.method, self.cfg.total_frames, initial=self.frames, disable=not self._is_main)
        with ExitStack() as stack, self._failures_named(), bar, stop_signals(self.interrupt):
            stack.callback(collector.shutdown)
            self._collector = collector
            if self.cfg.compile:
                bar.set_postfix_str("compiling once, which takes a quarter of a minute to some minutes")
            if not self._progress["evaluations"]:
                self.evaluate_and_save()
            data = iter(collector)
            self._begin_episodes(collector)
            while not self.is_over:
                start = time.perf_counter()
                batch = next(data)
                collected = time.perf_counter()
                yield batch
                for norm in self._observation_norms:  # after learning: the policy that learns is the one that acted
                    norm.update(batch, gather=gather)
                self.finish_iteration(batch, collected - start, time.perf_counter() - collected, bar)
                if self.evaluation_is_due(batch.numel()):
                    self.evaluate_and_save()
                    self._begin_episodes(collector)

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Record the metrics of a minibatch, 0-dim tensors by name; each iteration logs their mean.

        For ``min_*`` and ``max_*`` the extreme is logged. Values stay on their device until the iteration ends.
        """
        self._records.append({name: value.detach() for name, value in metrics.items()})

    def finish(self) -> float:
        """:meth:`conclude` the run; an interrupted run of a grid ends the grid.

        Raises:
            SystemExit: if the grid ends.
        """
        objective = self.conclude()
        if self._interrupted and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise SystemExit("The grid ends here, too: its later runs have not begun.")
        return objective

    def conclude(self) -> float:
        """Evaluate the best parameters, write figures, print the summary line, and close the logs.

        An interrupted run only closes the logs and prints how to resume. Ctrl-C during the final evaluation or the
        figures is also an interruption.

        Returns:
            Mean evaluation return over the last fifth of the evaluations (the objective of a sweep); NaN in all
            processes of torchrun except the first.

        Raises:
            RuntimeError: if a step fails, for example on a full disk; the message names the last good checkpoint.
        """
        if not self._is_main:
            return math.nan
        with self._failures_named():
            return self._conclude()

    def _conclude(self) -> float:
        evaluations = self._progress["evaluations"]
        last_fifth = [score for _, score in evaluations[-max(1, len(evaluations) // 5) :]]
        objective = sum(last_fifth) / len(last_fifth)
        best, score = self._checkpoints.best
        self._log.artifact(best, "checkpoint", {"score": score, "seed": self.cfg.seed})
        absolute = None
        self._interrupted |= self._asked_to_stop  # the signal may arrive after the last iteration
        if not self._interrupted:
            try:
                absolute = self._absolute_episodes()
                self._draw()
            except KeyboardInterrupt:
                self._interrupted = True
        if self._interrupted or absolute is None:
            self._draw_learning_curve()
            self._log.finish()
            frames = self._progress["frames"]
            again = frames - evaluations[-1][0]
            repeating = f", which repeats the {again:,} frames since the last checkpoint" if again else ""
            print(
                f"Stopped after {frames:,} of {self.cfg.total_frames:,} frames, without absolute metric, film and "
                f"summary. Go on with 'resume=\"{self.folder}\"'{repeating}"
            )
            return objective
        summary = {
            "final": evaluations[-1][1],
            "best": score,
            "absolute": absolute.returns.mean().item(),
            "last_fifth": objective,
            "frames": self._progress["frames"],
            "frames_per_second": self._progress["frames"] / max(self._progress["seconds"], 1e-9),
            "seconds": self._progress["seconds"],
            "git_commit": git_commit(),
            "init_from": self.cfg.init_from,
            "sessions": self._progress["sessions"],
        }
        metrics = {LAST_FIFTH: objective, **_statistics(f"{ABSOLUTE}/episode_reward", absolute.returns)}
        metrics |= {f"{ABSOLUTE}/{name}": values.mean().item() for name, values in absolute.info.items()}
        self._log.log(metrics, self._progress["frames"])
        self._log.finish(summary)
        print(
            f"{self.cfg.method} on {self.cfg.env.scenario}, seed {self.cfg.seed}: final return {summary['final']:.3f}, "
            f"best {summary['best']:.3f}, absolute {summary['absolute']:.3f}, {summary['frames']:,} frames, "
            f"{summary['frames_per_second']:,.0f} frames/s, evaluated every {self.cfg.evaluation.interval:,} frames\n"
            f"{self.folder}"
        )
        return objective

    @property
    def frames(self) -> int:
        """Number of frames that the policy has been trained on."""
        return self._progress["frames"]

    @property
    def is_over(self) -> bool:
        """Whether ``total_frames`` is reached or the run is interrupted."""
        return self._interrupted or self._progress["frames"] >= self.cfg.total_frames

    def finish_iteration(self, batch: TensorDictBase, collecting: float, training: float, bar: tqdm) -> None:
        """Log an iteration: its batch, recorded metrics, and the durations of collection and training in seconds."""
        progress = self._progress
        frames = batch.numel() * world_size()
        progress["frames"] += frames
        progress["iteration"] += 1
        progress["seconds"] += collecting + training
        self._interrupted = any_process(self._asked_to_stop)
        recorded = reduce_records(self._records)
        metrics = {f"{self._prefix}/{name}": value.item() for name, value in recorded.items()}
        self._records.clear()
        if not self._is_main:
            return
        returns = ended_episode_returns(batch)
        if returns.numel():
            metrics |= _statistics("collection/reward/episode_reward", returns)
            self._trained = f", return {returns.mean().item():.2f}"
        evaluated = f", evaluation {progress['evaluations'][-1][1]:.2f}" if progress["evaluations"] else ""
        bar.set_postfix_str(f"iteration {progress['iteration']}{self._trained}{evaluated}", refresh=False)
        metrics |= {
            "counters/iter": progress["iteration"],
            "counters/current_frames": frames,
            "counters/total_frames": progress["frames"],
            "timers/collection_time": collecting,
            "timers/training_time": training,
            "timers/iteration_time": collecting + training,
            "timers/frames_per_second": frames / (collecting + training),
        }
        self._log.log(metrics, progress["frames"])
        self._check_finite(metrics)
        self._warn_once(metrics)
        bar.update(frames)

    def evaluation_is_due(self, frames_of_a_process: int) -> bool:
        """Whether the last iteration, with this number of frames per process, ends with an evaluation."""
        frames, interval = self._progress["frames"], self.cfg.evaluation.interval
        passed = frames // interval > (frames - frames_of_a_process * world_size()) // interval
        return passed or frames >= self.cfg.total_frames

    def _begin_episodes(self, collector: _Collector) -> None:
        """Start new episodes; several processes also reset their random states from a seed of the first process."""
        if world_size() > 1:
            seed = broadcast_from_main(lambda: int(torch.randint(2**31 - 1, ())))
            reseed(self._env, seed, rank=rank(), world_size=world_size())
        collector.reset()

    def evaluate_and_save(self, episodes: Episodes | None = None) -> None:
        """Evaluate the policy, unless ``episodes`` are given, and write a checkpoint."""
        if not self._is_main:
            return
        for name, parameter in self._actor.named_parameters():
            if not parameter.isfinite().all():
                self._stop(f"the policy's {name}", "NaN or infinite")
        frames = self._progress["frames"]
        start = time.perf_counter()
        if episodes is None:
            with preserve_random_state():
                episodes = self._evaluate()
        metrics = _statistics("eval/reward/episode_reward", episodes.returns)
        if len(episodes.groups) > 1:
            for group, returns in episodes.groups.items():
                metrics |= _statistics(f"eval/{group}/reward/episode_reward", returns)
        metrics["eval/reward/episode_len_mean"] = episodes.lengths.float().mean().item()
        metrics |= {f"eval/info/{name}": values.mean().item() for name, values in episodes.info.items()}
        metrics["timers/evaluation_time"] = time.perf_counter() - start
        score = metrics["eval/reward/episode_reward_mean"]
        self._log.log(metrics, frames)
        if not math.isfinite(score):
            self._stop("the evaluation return", score)
        self._evaluations.add(frames, episodes.metrics())
        self._progress["evaluations"].append([frames, score])
        record = actor_record(self._shape, _plain(self.cfg.actor))
        metadata = {"config": _plain(self.cfg), "actor": record, "frames": frames, "trained_with": self.trained_with}
        self._checkpoints.save(frames=frames, score=score, metadata=metadata)
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES and find_spec("matplotlib") is not None:
            self._draw_learning_curve()

    def _evaluate(self) -> Episodes:
        """Play evaluation episodes, by the compiled functions of collection where these can."""
        env, collector, evaluation = self._evaluation_env, self._collector, self.cfg.evaluation
        if isinstance(collector, CompiledCollector) and collector.acts_as(self._actor) and not evaluation.sampled:
            copies, max_steps = self.cfg.env.num_envs, self.cfg.env.max_steps
            steps = -(-max_steps // collector.num_steps) * collector.num_steps
            played = -(-evaluation.episodes // copies) * copies * steps
            if played <= _MAX_SPARE * evaluation.episodes * max_steps:
                return collector.evaluate(env, seed=self.seed(1), max_steps=max_steps)
        return self._play(env, self._actor, self.seed(1))

    def _absolute_episodes(self) -> Episodes:
        """Play the best parameters in ten times as many episodes, on unused initial states.

        Environments in Torch play them at once, in up to 1,024 copies; others, of which each copy may be a process, in
        the copies of evaluations, batch by batch, on the seeds that follow each other.
        """
        copies, seed = self.cfg.evaluation.episodes, self.seed(2)
        seeds = range(seed, seed + 10 * copies, copies)
        with preserve_random_state():
            env = self._evaluation_env
            if CompiledCollector.takes(env) and 10 * copies <= _MAX_COPIES:
                env, seeds = self._make_env(num_envs=10 * copies, seed=seed), [seed]
            policy = self._best_policy()
            total = len(seeds) * self.cfg.env.max_steps
            with progress_bar("absolute metric", total, unit=" steps", leave=False) as steps:
                episodes = Episodes.joined([self._play(env, policy, own, after_step=steps.update) for own in seeds])
        self._evaluations.add_absolute(episodes.metrics())
        return episodes

    def _play(self, env: EnvBase, policy: TensorDictModuleBase, seed: int, **options: Any) -> Episodes:
        options |= {"max_steps": self.cfg.env.max_steps, "sampled": self.cfg.evaluation.sampled}
        return evaluate(env, policy, seed=seed, **options)

    def _best_policy(self) -> TensorDictModuleBase:
        return load_policy(self.folder, actor=copy.deepcopy(self._actor))

    def _draw(self) -> None:
        """Write the learning curve and a video of the best policy; a missing renderer must not fail a finished run."""
        with _as_warning("picture of its method"):
            plot_method(read_metrics(self.folder), self.folder)
        self._draw_learning_curve()
        with _as_warning("video"), preserve_random_state():
            if self.cfg.evaluation.video:
                env, path = self._make_env(num_envs=1, seed=self.seed(3)), self.folder / "episode.gif"
                render_episode(env, self._best_policy(), path, max_steps=self.cfg.env.max_steps)
                self._log.video(path, self._progress["frames"])

    def _draw_learning_curve(self) -> None:
        title = f"{self.cfg.method} on {self.cfg.env.scenario}, seed {self.cfg.seed}"
        with _as_warning("learning curve"):
            plot_learning_curve(self._progress["evaluations"], self.folder / "learning_curve.png", title=title)
        self._drawn = time.monotonic()

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if ("loss_" in name or "grad_norm" in name) and not math.isfinite(value):
                self._stop(name, value)

    def _warn_once(self, metrics: Mapping[str, float]) -> None:
        """Warn once per run about each metric that indicates degenerate learning; the run continues."""
        limits = {
            name: (1e-6, "an action has become all but impossible") for name in metrics if name.endswith("min_ratio")
        }
        for shape in [self._shape] if isinstance(self._shape, GroupSpec) else self._shape:
            limits[f"train/{shape.name}/entropy"] = shape.settled_entropy, "agents have all but stopped exploring"
        for name, (lowest, meaning) in limits.items():
            if name not in self._warned and metrics.get(name, lowest) < lowest:
                self._warned.add(name)
                warnings.warn(
                    f"Iteration {self._progress['iteration']}: {name} is {metrics[name]:.3g}, below {lowest:.3g}: "
                    f"{meaning}. {self.folder}",
                    stacklevel=2,
                )

    def fail(self) -> None:
        """Close the logs of a failed run; W&B marks the run as failed."""
        if self._is_main:
            with suppress(Exception):  # a full disk stops the logs, too
                self._log.finish(failed=True)

    def _stop(self, name: str, value: object) -> NoReturn:
        self.fail()
        raise FloatingPointError(
            f"Iteration {self._progress['iteration']} ({self._progress['frames']:,} frames): {name} is {value}. "
            f"Last good checkpoint: {self._checkpoints.latest}"
        )

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Add the way to resume to the error of a failed run."""
        try:
            yield
        except FloatingPointError:
            raise
        except Exception as error:
            self.fail()
            stored = self._checkpoints.latest
            onward = f"Last good checkpoint: {stored}. Go on with 'resume=\"{self.folder}\"'"
            raise RuntimeError(
                f"Stopped after {self._progress['frames']:,} frames. {type(error).__name__}: {error}. "
                f"{onward if stored else 'There is no checkpoint yet that could be resumed.'}"
            ) from error

    def interrupt(self) -> None:
        """End the run after the current iteration."""
        self._asked_to_stop = True

    def seed(self, purpose: int) -> int:
        """Seed for evaluation (1), the absolute metric (2) or the video (3), distinct from the training seed."""
        return 1_000_003 * purpose + self.cfg.seed


def progress_bar(description: str, total: int, **options: Any) -> tqdm:
    """Return a progress bar, of frames by default, without tqdm's lock, a semaphore that outlives a killed process."""
    tqdm.set_lock(RLock())
    return tqdm(total=total, desc=description, **{"unit": " frames", "unit_scale": True, **options})


def reduce_records(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the elementwise mean of each metric, or the extreme for ``min_*`` and ``max_*``."""
    names = dict.fromkeys(name for record in records for name in record)  # records may have different names
    stacked = {name: torch.stack([record[name] for record in records if name in record]) for name in names}
    reduce = {"min": torch.amin, "max": torch.amax}
    return {name: reduce.get(name.rpartition("/")[2][:3], torch.mean)(values, 0) for name, values in stacked.items()}


def _start_from(cfg: DictConfig, actor: TensorDictModuleBase) -> None:
    """Give the actor the policy of another run, and have the configuration name its checkpoint."""
    asked = cfg.init_from
    try:
        cfg.init_from = str(best_checkpoint(asked).resolve())
        load_policy(cfg.init_from, actor=actor)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={asked}: no policy for this run: {error}") from error


def _new_folder(cfg: DictConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    task = cfg.env.scenario.replace(":", ".")  # a colon is not valid in folder names everywhere
    shared = run_group(cfg.method, task, _plain(cfg)).rpartition("_")[2]  # another one where more than the seed differs
    name = f"seed{cfg.seed}-{shared}-{stamp}-{secrets.token_hex(2)}"
    folder = Path(cfg.folder) / cfg.recipe / task / cfg.method / name
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"folder={cfg.folder}: a run cannot have its folder there: {error}") from error
    return folder


def _command(cfg: DictConfig) -> str:
    """Return the command that repeats this run, without folder names, which are not part of the experiment."""
    script, overrides, flags = cfg.recipe, [], []
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        script, overrides = hydra.job.name, hydra.overrides.task
        flags = [] if hydra.job.config_name == script else [f"--config-name={hydra.job.config_name}"]
    pairs = [override.removeprefix("++").partition("=") for override in overrides]
    words = [
        key + "=RUN" if key == "resume" else key + equals + value for key, equals, value in pairs if key != "folder"
    ]
    return shlex.join(["python", f"recipes/{script}.py", *flags, *words])


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dictionaries and lists."""
    return {str(key): value for key, value in cast("dict", OmegaConf.to_container(cfg)).items()}


def _statistics(name: str, values: Tensor) -> dict[str, float]:
    found = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
    return {f"{name}_{statistic}": value.item() for statistic, value in found.items()}


@contextmanager
def _as_warning(picture: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = f'{error}: pip install "torchrl_marl[plot]"' if isinstance(error, ImportError) else repr(error)
        warnings.warn(f"The run is not affected, but it has no {picture}: {reason}", stacklevel=3)


@contextmanager
def stop_signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one ends the program at once."""

    def handle(number: int, frame: object) -> None:
        print("\nStopping after this iteration (again to stop at once).")
        interrupt()
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    numbers = (
        (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    )  # only the main thread may set handlers
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        restore()
