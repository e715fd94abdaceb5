"""Tune a recipe's method with Optuna's TPE on the mean over five sequential seeds, with pruning after each seed.

    python recipes/tune.py mars_vmas loss=maspo env.scenario=balance --trials 20
    python recipes/tune.py marpo_vmas epochs=4 "optimizer.lr=tag(log, interval(1e-4, 1e-2))"
    python recipes/tune.py mars_vmas loss=mappo --wandb > sweep.yaml

The overrides are those of the recipe. They fix, widen or extend the search space of config/spaces.yaml for the
method of loss=, in the same syntax. After Ctrl-C or a kill, the same command continues the study, bit for bit.
"""

import argparse
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.utils import get_object
from omegaconf import OmegaConf

from torchrl_marl.run.checks import arguments_of
from torchrl_marl.run.config import Recipe, end_if_refused
from torchrl_marl.run.logger import LAST_FIFTH, run_group
from torchrl_marl.shelf import recipe_command

try:
    from filelock import FileLock, Timeout
    from optuna import Study, create_study
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.pruners import MedianPruner
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise SystemExit(f'recipes/tune.py needs more packages ({error}): pip install "torchrl_marl[tune]"') from error

FOLDER = Path(__file__).parent
SPACES = yaml.safe_load((FOLDER / "config" / "spaces.yaml").read_text())
_RETURNS = "returns"


def main() -> None:
    """Read the command line; tune, or print a W&B sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(path.stem for path in (FOLDER / "config").glob("*_vmas.yaml")))
    parser.add_argument(
        "overrides", nargs="*", help="overrides of the recipe; search spaces are written as in spaces.yaml"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="KEY",
        default=[],
        help="search these and the spaces among the overrides alone; the recipe's values for the others",
    )
    parser.add_argument("--trials", type=int, help="total number of trials; default: that of spaces.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=SPACES["seeds"], help="seeds of every trial")
    parser.add_argument("--study", type=Path, help="SQLite file; default FOLDER/tuning/NAME.db, a NAME for each search")
    parser.add_argument("--wandb", action="store_true", help="print a W&B sweep over the same space instead")
    arguments = parser.parse_intermixed_args()
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # notices would break the progress bars
    recipe = import_module(arguments.recipe).main
    try:
        tune(recipe, arguments)
    except StudyInUseError as error:
        raise SystemExit(str(error)) from error
    except Exception as error:
        end_if_refused(error, recipe.train.__module__)
        raise


def tune(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Run the remaining trials; print all trials and the command that runs the best on other seeds."""
    name, seeds, asked = arguments.recipe, arguments.seeds, _parsed(arguments.overrides)
    for key in asked.keys() & {"seed", "resume"}:
        raise SystemExit(f"{asked[key].input_line} has no effect: trials begin anew, each with all of --seeds.")
    chosen = recipe.compose(_lines(asked[key] for key in ("experiment", "loss", *SPACES["networks"]) if key in asked))
    choices = HydraConfig.get().runtime.choices
    method = choices["loss"]
    if method not in SPACES["methods"] and "clip_epsilon" not in arguments_of(get_object(chosen.loss._target_)):
        raise SystemExit(f"config/spaces.yaml has no loss={method}; it has {', '.join(SPACES['methods'])}.")
    own = SPACES["methods"].get(method, SPACES["methods"]["default"])
    networks = {
        key.format(group): text
        for group, spaces in SPACES["networks"].items()
        for key, text in spaces.get(choices.get(group), {}).items()
    }
    shared = SPACES["shared_of"].get(name, SPACES["shared"])
    searched = _parsed(_assignments({**shared, **networks, **own}))
    for key in arguments.only:
        if key not in searched:
            raise SystemExit(f"--only {key} is not searched for loss={method}; {', '.join(searched)} are.")
    left = {key for key, each in searched.items() if arguments.only and each.is_sweep_override()} - {*arguments.only}
    overrides = {key: each for key, each in searched.items() if key not in left} | asked
    space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
    fixed = _lines(override for key, override in overrides.items() if key not in space)
    cfg = recipe.compose([*fixed, *_assignments({key: _first(each) for key, each in space.items()})])
    num_trials = arguments.trials or SPACES["trials_per_parameter"] * max(1, sum(key in space for key in own))
    if arguments.wandb:
        print(yaml.safe_dump(wandb_sweep(name, [*fixed, f"seed={seeds[0]}"], space, num_trials), sort_keys=False))
        return

    identity = {"config": OmegaConf.to_container(cfg), "space": {k: str(v) for k, v in space.items()}, "seeds": seeds}
    search = run_group(cfg.method, cfg.env.scenario, identity)
    path = arguments.study or Path(cfg.folder) / "tuning" / f"{search}.db"
    with open_study(path) as study:
        if study.user_attrs.setdefault("search", search) != search:
            raise SystemExit(f"--study {path} belongs to another search, {study.user_attrs['search']}.")
        study.set_user_attr("search", search)
        print(f"{path}: {num_finished(study)} of {num_trials} trials. Stop when you like: the same command goes on.")

        def run(params: Mapping[str, Any], seed: int) -> float:
            words = [
                *fixed,
                *_assignments(params),
                f"seed={seed}",
                "hydra.mode=MULTIRUN",
            ]  # Ctrl-C ends the whole study
            trial_cfg = recipe.compose(words)
            trial_cfg.folder = str(Path(cfg.folder) / "tuning" / path.stem / f"trial{num_finished(study)}")
            return recipe.train(trial_cfg)

        while num_finished(study) < num_trials:
            trial = run_trial(study, run, space, seeds=seeds)
            done = f"Trial {num_finished(study)} of {num_trials} {trial.state.name.lower()}"
            print(f"{done}, {trial.params}: {trial.user_attrs.get(_RETURNS, 'diverged')}")
        print(table(study))
        complete = study.get_trials(states=(TrialState.COMPLETE,))
        if not complete:
            raise SystemExit("No trial has come to its end: each diverged.")
        wanted = _lines(override for key, override in asked.items() if key not in space)
        best = shlex.join([*recipe_command(name), "-m", *wanted, *_assignments(study.best_params)])
        print(f"Best of {num_finished(study)} trials: {study.best_value:.4g}\n{best} seed=0,1,2,3,4,5,6,7,8,9")


def _parsed(lines: Sequence[str]) -> dict[str, Override]:
    return {override.key_or_group: override for override in OverridesParser.create().parse_overrides(list(lines))}


def _lines(overrides: Iterable[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _first(distribution: BaseDistribution) -> Any:
    return getattr(distribution, "choices", [getattr(distribution, "low", None)])[0]


def distribution(override: Override) -> BaseDistribution:
    """Return the Optuna distribution of an override that defines a search space."""
    if override.is_discrete_sweep():
        choices: Any = [*override.sweep_iterator(Transformer.encode)]
        return CategoricalDistribution(choices)
    sweep: Any = override.value()
    whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    return (IntDistribution if whole else FloatDistribution)(sweep.start, sweep.end, log="log" in sweep.tags)


def wandb_sweep(
    recipe: str, fixed: Sequence[str], space: Mapping[str, BaseDistribution], num_trials: int
) -> dict[str, Any]:
    """Return the configuration of a W&B sweep with one seed per trial: `wandb sweep FILE`."""
    parameters: dict[str, Any] = {}
    for key, each in space.items():
        if isinstance(each, CategoricalDistribution):
            parameters[key] = {"values": list(each.choices)}
        elif isinstance(each, FloatDistribution | IntDistribution):
            scale = {"distribution": "log_uniform_values"} if each.log else {}
            parameters[key] = {**scale, "min": each.low, "max": each.high}
    return {
        "program": f"recipes/{recipe}.py",
        "command": ["${env}", "python", "${program}", *fixed, "${args_no_hyphens}"],
        "method": "bayes",
        "run_cap": num_trials,
        "metric": {"name": LAST_FIFTH, "goal": "maximize"},
        "parameters": parameters,
    }


class StudyInUseError(RuntimeError):
    """Another process has the study open."""


@contextmanager
def open_study(path: Path) -> Iterator[Study]:
    """Open or create a maximising study for exclusive use by this process.

    A trial interrupted by a kill is queued again, with the returns of its finished seeds.

    Args:
        path: SQLite file of the study, created if missing.

    Yields:
        The study, which stores every result immediately and prunes by the median of earlier trials.

    Raises:
        StudyInUseError: if another process has opened the study.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))  # the system releases the lock when the process ends
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout as error:
        raise StudyInUseError(f"Another process is tuning {path}.") from error
    with acquired:
        study = create_study(
            storage=f"sqlite:///{path}",
            study_name="torchrl_marl",
            pruner=MedianPruner(),
            direction="maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={_RETURNS: trial.user_attrs.get(_RETURNS, [])})
        yield study


def run_trial(
    study: Study,
    run: Callable[[Mapping[str, Any], int], float],
    space: Mapping[str, BaseDistribution],
    *,
    seeds: Sequence[int],
    sampler_seed: int = 0,
) -> FrozenTrial:
    """Propose parameters by TPE and run them with one seed after another, until the trial is finished or pruned.

    The objective is the mean over seeds. After each seed except the last, the current mean decides on pruning.
    Proposals depend only on earlier trials and ``sampler_seed``, so a killed and continued study equals an
    uninterrupted one.

    Args:
        study: study of :func:`open_study`.
        run: ``run(parameters, seed)`` trains and returns the objective; ``FloatingPointError`` means that training
            diverged, and ends the trial like a pruned one.
        space: distribution of each parameter.
        seeds: seeds of every trial, distinct from those of reported results.
        sampler_seed: seed of the proposals.

    Returns:
        The finished trial.
    """
    state = np.random.SeedSequence([sampler_seed, num_finished(study)]).generate_state(1)
    study.sampler = TPESampler(seed=int(state[0]))
    trial = study.ask(dict(space))
    returns = list(trial.user_attrs.get(_RETURNS, []))
    mean = float("nan")
    for step, seed in enumerate(seeds):
        if step == len(returns):
            try:
                returns.append(run(trial.params, seed))
            except FloatingPointError as error:
                trial.set_user_attr("diverged", str(error))
                return study.tell(trial, state=TrialState.PRUNED)
            trial.set_user_attr(_RETURNS, returns)
        mean = sum(returns[: step + 1]) / (step + 1)
        trial.report(mean, step)
        if step + 1 < len(seeds) and trial.should_prune():
            return study.tell(trial, state=TrialState.PRUNED)
    return study.tell(trial, mean)


def num_finished(study: Study) -> int:
    """Return the number of completed and pruned trials, without killed ones."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def study_record(study: Study) -> list[dict[str, Any]]:
    """Return the parameters, the return of each seed, the state and the objective of every finished trial."""
    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [
        {"params": trial.params, "state": trial.state.name.lower(), "objective": trial.value, **trial.user_attrs}
        for trial in trials
    ]


def table(study: Study) -> str:
    """Return the finished trials as a Markdown table, with the best trial first."""
    trials = study_record(study)
    names = dict.fromkeys(name for trial in trials for name in trial["params"])
    rows = [["return", "seeds", "state", *names], ["---"] * (3 + len(names))]
    for trial in sorted(trials, key=lambda trial: (trial["state"], -(trial["objective"] or 0))):
        score = "" if trial["objective"] is None else f"{trial['objective']:.4g}"
        params = [
            f"{value:.4g}" if isinstance(value, float) else str(value) for value in map(trial["params"].get, names)
        ]
        rows.append([score, str(len(trial.get(_RETURNS, []))), trial["state"], *params])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
