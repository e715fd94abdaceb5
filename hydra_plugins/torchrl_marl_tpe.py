"""Hydra sweeper ``tpe``: `python recipes/RECIPE.py sweep=METHOD` tunes a method with Optuna.

Hydra's own Optuna sweeper (1.3.0 of 2026 as 1.2.0 of 2022) needs Optuna 2.10, whose SQLite storage fails with
SQLAlchemy 2; it does not prune, does not average over seeds and starts to count anew after a kill. This one uses
Optuna's public interface only. Hydra finds sweepers by the name of this package.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

__all__ = ["TPESweeper"]


class TPESweeper(Sweeper):
    """Tune what ``params`` and the command line leave open.

    Values are those of Hydra's sweeps: ``choice(1, 2)`` and ``range(1, 5)`` choose, ``interval(0.1, 0.5)`` is a
    number between (a whole one if both ends are), ``tag(log, interval(...))`` one on a logarithmic scale. A plain
    value is passed on. The command line goes before ``params``.

    The study lies in ``FOLDER/tuning/NAME.db``, where the name depends on all that is fixed and on the space: the same
    command goes on with it, with a larger ``num_trials`` if wanted; another one begins another.

    Args:
        method: the choice of ``loss`` that the space is for.
        params: values or sweeps by dotted configuration key.
        seeds: seeds of every trial.
        num_trials: number of trials.
        sampler_seed: of the proposals.
    """

    def __init__(
        self, *, method: str, params: Mapping[str, Any], seeds: Sequence[int], num_trials: int, sampler_seed: int = 0
    ) -> None:
        self._method = method
        self._params, self._seeds, self._sampler_seed = dict(params), list(seeds), sampler_seed
        self._num_trials = num_trials
        self._launched = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are enough; print the best and the command that runs it on other seeds."""
        from torchrl_marl.run.logger import run_group
        from torchrl_marl.tuning import num_finished, open_study, run_trial, study_record

        assert self.config is not None
        settings = _plain(self.config)
        choices = {
            group: name for group, name in self.config.hydra.runtime.choices.items() if name and "/" not in group
        }
        choices["loss"] = self._method  # a recipe's own default would win over that of a file which it loads
        groups = self._parsed([f"{group}={name}" for group, name in sorted(choices.items()) if group != "sweep"])
        params = self._parsed([f"{key}={value}" for key, value in self._params.items()])
        asked = self._parsed(
            [line for line in arguments if line.partition("=")[0].lstrip("+") not in ("sweep", "folder")]
        )
        if "loss" in asked and asked["loss"].value() != self._method:
            raise ValueError(f"loss={asked['loss'].value()} is not the method of this search space, {self._method}.")
        overrides = {**groups, **params, **asked}
        space = {key: _distribution(value) for key, value in overrides.items() if value.is_sweep_override()}
        fixed = {
            key: f"{key}={value.get_value_element_as_str()}" for key, value in overrides.items() if key not in space
        }
        identity = {**settings, "fixed": fixed, "space": {k: str(v) for k, v in space.items()}, "seeds": self._seeds}
        name = run_group(self._method, settings["env"]["scenario"], identity)
        folder = Path(settings["folder"]).absolute() / "tuning" / name
        with open_study(folder.with_suffix(".db")) as study:

            def run(chosen: Mapping[str, Any], seed: int) -> float:
                lines = [f"{key}={value}" for key, value in chosen.items()]
                place = f"folder={folder / f'trial{num_finished(study)}'}"
                return self._launch([*fixed.values(), *lines, f"seed={seed}", place])

            while num_finished(study) < self._num_trials:
                trial = run_trial(study, run, space, seeds=self._seeds, sampler_seed=self._sampler_seed)
                done = f"Trial {num_finished(study)} of {self._num_trials} {trial.state.name.lower()}"
                print(f"{done}, {trial.params}: {trial.user_attrs.get('returns', 'diverged')}")
                folder.with_suffix(".json").write_text(json.dumps(study_record(study), indent=1) + "\n")
            best = [f"{key}={value}" for key, value in study.best_params.items()]
            kept = [line for key, line in fixed.items() if key in asked or key not in params]
            command = shlex.join(["python", f"recipes/{settings['recipe']}.py", "-m", *kept, *best])
            print(f"Best of {num_finished(study)} trials: {study.best_value:.4g}\n{command} seed=0,1,2,3,4,5,6,7,8,9")

    def _parsed(self, lines: list[str]) -> dict[str, Override]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return {override.key_or_group: override for override in parser.parse_overrides(lines)}

    def _launch(self, overrides: Sequence[str]) -> float:
        """Run one job; it is told the sweeper for its settings on the command line, and that Ctrl-C ends all jobs."""
        assert self.launcher is not None
        groups = {override for override in overrides if override.partition("=")[0] in self.config.hydra.runtime.choices}
        forced = [override if override in groups else f"++{override}" for override in overrides]
        jobs = [["hydra/sweeper=tpe", "hydra.mode=MULTIRUN", *forced]]
        (job,) = self.launcher.launch(jobs, initial_job_idx=self._launched)
        self._launched += 1
        return float(job.return_value)


def _distribution(override: Override) -> Any:
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ModuleNotFoundError as error:
        raise SystemExit(f'sweep= needs more packages ({error}): pip install "torchrl_marl[sweep]"') from error

    if override.is_discrete_sweep():
        choices: Any = list(override.sweep_iterator(Transformer.encode))
        return CategoricalDistribution(choices)
    sweep: Any = override.value()
    whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    return (IntDistribution if whole else FloatDistribution)(sweep.start, sweep.end, log="log" in sweep.tags)


def _plain(config: DictConfig) -> dict[str, Any]:
    settings: Any = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in settings.items() if key != "hydra"}
