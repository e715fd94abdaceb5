"""Tuning with Optuna: seeds one after another, pruning between them, a study that goes on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["num_finished", "open_study", "run_trial", "study_record"]

_RETURNS = "returns"


@contextmanager
def open_study(path: Path) -> Iterator[Study]:
    """Open a study that maximises, new or begun, for this process alone.

    A trial that a killed process left behind is queued again with the returns of the seeds that it had finished.

    Args:
        path: SQLite file of the study; made if need be.

    Yields:
        The study, which stores every result at once. It prunes by the median of earlier trials.

    Raises:
        ImportError: without Optuna (``pip install "torchrl_marl[sweep]"``).
        RuntimeError: if another process has it open.
    """
    try:
        import optuna
        from filelock import FileLock, Timeout
    except ModuleNotFoundError as error:
        raise ImportError(f'Tuning needs more packages ({error}): pip install "torchrl_marl[sweep]"') from error
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))  # the system frees it when the process dies
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"Another process is tuning {path}.") from error
    with lock:
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=path.stem,
            pruner=optuna.pruners.MedianPruner(),
            direction="maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
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
    """Propose parameters by TPE and run them with one seed after another, as long as they are promising.

    The objective is the mean over seeds. After each seed but the last, the mean so far decides whether the trial is
    pruned. Proposals depend on nothing but the trials before and ``sampler_seed``, so that a study which was killed
    and goes on equals one that was not.

    Args:
        study: as :func:`open_study` gives it.
        run: ``run(parameters, seed)`` trains and returns what to maximise; ``FloatingPointError`` says that training
            diverged and ends the trial like a pruned one.
        space: distribution of each parameter.
        seeds: the same for every trial, and none of those that results are reported on.
        sampler_seed: of the proposals.

    Returns:
        The finished trial.
    """
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

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
    """Return the number of trials that ran to their end or were pruned; one that was killed does not count."""
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def study_record(study: Study) -> list[dict[str, Any]]:
    """Return every finished trial as JSON can hold it: parameters, return of each seed, state, objective."""
    from optuna.trial import TrialState

    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [
        {"params": trial.params, "state": trial.state.name.lower(), "objective": trial.value, **trial.user_attrs}
        for trial in trials
    ]
