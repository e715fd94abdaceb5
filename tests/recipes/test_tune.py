"""Studies choose by TPE, take the mean over seeds, prune between them and survive a kill."""

import json
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.recipes.runs import RECIPES, TINY, run_folders, sizes
from torchrl_marl.run import Run

optuna = pytest.importorskip("optuna")

from recipes.tune import num_finished, open_study, run_trial, study_record  # noqa: E402

SPACE = {
    "x": optuna.distributions.FloatDistribution(0, 1),
    "k": optuna.distributions.CategoricalDistribution([1, 2, 3]),
}
SEEDS = [7, 8]


def score(params: dict, seed: int) -> float:
    return -((params["x"] - 0.3) ** 2) + 0.1 * params["k"] + 0.001 * seed


def finish(path: Path, run=score, *, trials: int = 12) -> list[dict]:  # ten are random, then TPE proposes
    with open_study(path) as study:
        while num_finished(study) < trials:
            run_trial(study, run, SPACE, seeds=SEEDS)
        return study_record(study)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The trials of a study that nothing interrupted."""
    return finish(tmp_path_factory.mktemp("whole") / "study.db")


def test_the_objective_is_the_mean_over_seeds(whole: list[dict]) -> None:
    complete = [trial for trial in whole if trial["state"] == "complete"]
    assert complete
    for trial in complete:
        assert trial["returns"] == [score(trial["params"], seed) for seed in SEEDS]
        assert trial["objective"] == pytest.approx(sum(trial["returns"]) / 2)


def test_trials_below_the_median_of_earlier_ones_end_after_the_seed_that_shows_it(tmp_path: Path) -> None:
    def worse_and_worse(params: dict, seed: int) -> float:
        worse_and_worse.calls += 1
        return -float(worse_and_worse.calls)

    worse_and_worse.calls = 0
    trials = finish(tmp_path / "study.db", worse_and_worse, trials=7)
    assert [trial["state"] for trial in trials] == ["complete"] * 5 + ["pruned"] * 2  # it needs five to compare with
    assert [len(trial["returns"]) for trial in trials] == [2] * 5 + [1] * 2


def test_a_trial_that_diverges_counts_and_the_study_goes_on(tmp_path: Path) -> None:
    def diverge(params: dict, seed: int) -> float:
        if params["k"] == 3:
            raise FloatingPointError("loss is nan")
        return score(params, seed)

    trials = finish(tmp_path / "study.db", diverge)
    diverged = [trial for trial in trials if trial["params"]["k"] == 3]
    assert len(trials) == 12
    assert diverged
    assert {(trial["state"], trial["diverged"]) for trial in diverged} == {("pruned", "loss is nan")}


@pytest.mark.parametrize("calls_before", [1, 15])
def test_a_study_that_was_interrupted_equals_one_that_was_not(
    calls_before: int, tmp_path: Path, whole: list[dict]
) -> None:
    def interrupted(params: dict, seed: int) -> float:
        interrupted.calls += 1
        if interrupted.calls > calls_before:
            raise KeyboardInterrupt
        return score(params, seed)

    interrupted.calls = 0
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "study.db", interrupted)
    calls = []

    def count(params: dict, seed: int) -> float:
        calls.append(seed)
        return score(params, seed)

    assert finish(tmp_path / "study.db", count) == whole
    assert len(calls) == sum(len(trial["returns"]) for trial in whole) - calls_before  # no seed is trained twice


def test_a_killed_process_leaves_a_study_that_another_goes_on_with(tmp_path: Path, whole: list[dict]) -> None:
    script = f"""
import os, signal
from pathlib import Path
from tests.recipes.test_tune import finish, score
calls = []
def run(params, seed):
    calls.append(seed)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(params, seed)
finish(Path({str(tmp_path / "study.db")!r}), run)
"""
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert finish(tmp_path / "study.db") == whole


def test_a_study_is_open_for_one_process_alone(tmp_path: Path) -> None:
    with open_study(tmp_path / "study.db"):
        with pytest.raises(RuntimeError, match="Another process is tuning"), open_study(tmp_path / "study.db"):
            pass
    with open_study(tmp_path / "study.db") as study:
        assert num_finished(study) == 0


def test_more_trials_of_the_same_command_go_on_where_it_ended(tmp_path: Path, whole: list[dict]) -> None:
    assert finish(tmp_path / "study.db", trials=4) == whole[:4]
    assert finish(tmp_path / "study.db") == whole


def tune(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, seeds: str = "3", trials: int = 1) -> None:
    """Run recipes/tune.py within this process."""
    options = ["--seeds", *seeds.split(), "--trials", str(trials)]
    monkeypatch.setattr(sys, "argv", ["tune.py", *overrides, *TINY, "total_frames=80", f"folder={folder}", *options])
    monkeypatch.syspath_prepend(str(RECIPES))  # as Python does for a script
    runpy.run_path(str(RECIPES / "tune.py"), run_name="__main__")


def trials_of(folder: Path) -> list[dict]:
    (path,) = (folder / "tuning").glob("*.db")
    with open_study(path) as study:
        return study_record(study)


def test_the_recipe_tunes_and_prints_the_command_of_the_best_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.recipes.test_tune.TINY", [word for word in TINY if "minibatch_size" not in word])
    options = ["mars_vmas", "loss=mars", "minibatch_size=choice(20,40)", "env.scenario=balance"]
    tune(monkeypatch, tmp_path, *options, seeds="3 4", trials=2)
    printed = capsys.readouterr().out
    trials = trials_of(tmp_path)
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    configs = [OmegaConf.load(folder / "config.yaml") for folder in run_folders(tmp_path)]
    assert [config.seed for config in configs] == [3, 4, 3, 4]
    for index, config in enumerate(configs):
        params, returns = trials[index // 2]["params"], trials[index // 2]["returns"]
        assert set(params) == {
            "loss.target_ratios.0",
            "loss.target_ratios.1",
            "loss.entropy_coeff",
            "loss.clip_value",
            "optimizer.lr",
            "critic_lr",
            "max_grad_norm",
            "minibatch_size",
        }
        assert {key: OmegaConf.select(config, key) for key in params} == params
        assert (config.method, config.env.scenario, config.epochs) == (
            "mars",
            "balance",
            2,
        )  # epochs of the command line
        summary = json.loads((run_folders(tmp_path)[index] / "summary.json").read_text())
        assert returns[index % 2] == pytest.approx(summary["last_fifth"])
        (session,) = summary["sessions"]
        recorded = shlex.split(session["command"])
        assert recorded[:2] == ["python", "recipes/mars_vmas.py"]
        assert {f"{key}={value}" for key, value in params.items()} < set(recorded)
    best = max(trials, key=lambda trial: trial["objective"])["params"]
    (command,) = printed.split("Best of 2 trials: ")[1].splitlines()[1:]
    words = shlex.split(command)
    assert words[:4] == ["python", "recipes/mars_vmas.py", "-m", "loss=mars"]
    assert {f"{key}={value}" for key, value in best.items()} < set(words)
    assert words[-1].startswith("seed=0,1,2")
    assert "evaluation.video=false" in words  # asked for on the command line
    assert f"| {trials[0]['objective']:.4g} | 2 | complete |" in printed
    tune(monkeypatch, tmp_path, *options, seeds="3 4", trials=2)  # nothing is left to do
    assert len(run_folders(tmp_path)) == 4


def test_only_the_named_parameters_are_searched_and_others_keep_the_recipes_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(monkeypatch, tmp_path, "mars_vmas", seeds="3 --only optimizer.lr loss.target_ratios.1")
    (trial,) = trials_of(tmp_path)
    assert set(trial["params"]) == {"optimizer.lr", "loss.target_ratios.1"}
    (folder,) = run_folders(tmp_path)
    loss = OmegaConf.load(folder / "config.yaml").loss
    assert (loss.target_ratios[0], loss.get("clip_value")) == (0.5, None)
    with pytest.raises(SystemExit, match=r"^--only lr is not searched for loss=mars; optimizer\.lr, critic_lr, "):
        tune(monkeypatch, tmp_path, "mars_vmas", seeds="3 --only lr")


def test_the_search_space_is_that_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, tmp_path, "marpo_vmas", "loss=rpo")
    (folder,) = run_folders(tmp_path)
    config = OmegaConf.load(folder / "config.yaml")
    assert (config.method, config.loss.layout) == ("rpo", "rpo")
    (trial,) = trials_of(tmp_path)
    assert {"loss.reflection_coeff", "loss.clip_epsilon"} < set(trial["params"])


def test_value_based_methods_are_tuned_by_their_own_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.recipes.test_tune.TINY", sizes("qmix_vmas"))
    tune(monkeypatch, tmp_path, "qmix_vmas", "loss=qmix", "buffer.capacity=200")
    (folder,) = run_folders(tmp_path)
    assert OmegaConf.load(folder / "config.yaml").loss._target_ == "torchrl_marl.objectives.QMIXLoss"
    (trial,) = trials_of(tmp_path)
    searched = {"loss.mixing_embed_dim", "target_updater.tau", "exploration.annealing_num_steps"}
    assert set(trial["params"]) == searched | {"optimizer.lr", "max_grad_norm"}  # epochs and sizes are those asked for


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_a_signal_has_ended_goes_on_with_the_same_command(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(monkeypatch, tmp_path / "whole", "mars_vmas", trials=2)
    record = Run.record

    def stop_and_record(run: Run, metrics: dict) -> None:
        if "trial1" in run.folder.parts:
            signal.raise_signal(number)
            monkeypatch.setattr(Run, "record", record)
        record(run, metrics)

    monkeypatch.setattr(Run, "record", stop_and_record)
    with pytest.raises(SystemExit, match="ends here"):
        tune(monkeypatch, tmp_path / "stopped", "mars_vmas", trials=2)
    assert len(trials_of(tmp_path / "stopped")) == 1
    tune(monkeypatch, tmp_path / "stopped", "mars_vmas", trials=2)
    assert trials_of(tmp_path / "stopped") == trials_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epohcs=8"], r"^epohcs is not a key of the configuration; nearest: epochs"),
        (["loss=marz"], r"^loss=marz is not a choice; nearest: loss=mars"),
        (["loss.foo=interval(0, 1)"], r"^loss\.foo is not an argument of .*MARSLoss; nearest: "),
        (["seed=3"], r"^seed=3 has no effect: trials begin anew, each with all of --seeds\."),
        (["loss=magpo"], r"^mars_vmas does not train MAGPOLoss"),
    ],
)
def test_what_the_recipe_refuses_ends_the_search_with_the_same_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message) as refused:
        tune(monkeypatch, tmp_path, "mars_vmas", *words)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*.db"))  # nor is there a study that would go on with it


def test_a_method_that_has_neither_a_space_nor_a_clip_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = yaml.safe_load((RECIPES / "config" / "spaces.yaml").read_text())
    del spaces["methods"]["mars"]
    monkeypatch.setattr(yaml, "safe_load", lambda _: spaces)
    with pytest.raises(SystemExit, match=r"^config/spaces.yaml has no loss=mars; it has default, "):
        tune(monkeypatch, tmp_path, "mars_vmas", "loss=mars")


def test_what_only_a_constructor_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^loss: .*-1") as refused:
        tune(monkeypatch, tmp_path, "mars_vmas", "loss.target_ratios.0=-1")
    assert "\n" not in str(refused.value)
    assert not run_folders(tmp_path)


def test_a_study_is_continued_by_its_own_search_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = f"--study={tmp_path / 'mine.db'}"
    tune(monkeypatch, tmp_path, "mars_vmas", study)
    with pytest.raises(SystemExit, match=r"mine\.db belongs to another search, mars_navigation_"):
        tune(monkeypatch, tmp_path, "mars_vmas", study, "gamma=0.9", trials=2)
    with open_study(tmp_path / "mine.db"), pytest.raises(SystemExit, match=r"^Another process is tuning"):
        tune(monkeypatch, tmp_path, "mars_vmas", study)
    assert len(run_folders(tmp_path)) == 1
