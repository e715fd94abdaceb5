"""The MARS recipe and its relatives, end to end on a tiny task."""

import json
import os
import re
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from tests.recipes.runs import (
    GAMES,
    METHODS,
    RECIPE_OF,
    curves,
    run_folders,
    run_recipe,
    start_recipe,
)
from tests.run.test_checkpoints import rewrite
from torchrl_marl.__main__ import main as evaluate_command
from torchrl_marl.collectors import CompiledCollector
from torchrl_marl.envs import make_coordsum, make_env
from torchrl_marl.evaluation import Episodes, evaluate
from torchrl_marl.objectives import IPPOLoss
from torchrl_marl.run.checkpoints import best_checkpoint, find_checkpoint, load_policy, read_metadata
from torchrl_marl.run.config import _stored_config
from torchrl_marl.run.records import FRAMES, EvaluationRecord, read_metrics
from torchrl_marl.run.run import Run

GRU = [
    "actor=gru",
    "critic=gru",
    "chunk_length=5",
    *(f"{network}.{size}" for network in ("actor", "critic") for size in ("recurrent_size=8", "head_sizes=[]")),
]


def wait_for_frames(folder: Path, frames: int) -> Path:
    """Wait until the one run below ``folder`` has logged ``frames`` frames; return the run's folder."""
    for _ in range(6000):
        for run in folder.glob("*/*/*/*"):
            if (run / "metrics.csv").exists() and read_metrics(run)[FRAMES][0].max(initial=0) >= frames:
                return run
        time.sleep(0.02)
    raise TimeoutError(f"no run below {folder} reached {frames} frames")


def last_value(folder: Path, metric: str) -> float:
    return float(curves(folder)[metric].split()[-1].split(",")[1])


def assert_same_traces(one: Path, other: Path) -> None:
    """All that two runs have measured, what was played in evaluations and the parameters are the same, to the bit."""
    assert curves(one) == curves(other)
    assert (one / "evaluations.json").read_text() == (other / "evaluations.json").read_text()
    parameters = [load_policy(find_checkpoint(folder)).state_dict() for folder in (one, other)]
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_complete_folder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(monkeypatch, tmp_path, f"loss={method}", recipe=RECIPE_OF[method])
    (folder,) = run_folders(tmp_path)
    printed = capsys.readouterr().out
    assert re.search(rf"{method} on \w+, seed 0", printed)
    assert str(folder) in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["frames"] == 240
    assert summary["best"] >= summary["final"]
    assert {"absolute", "frames_per_second", "git_commit"} < set(summary)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    # every method logs the ratio diagnostics of the MARS paper, and a real update moves ratios to both sides of 1
    assert last_value(folder, "train/agents/min_ratio") < 1 < last_value(folder, "train/agents/max_ratio")
    assert last_value(folder, "counters/total_frames") == 240
    evaluations = curves(folder)["eval/reward/episode_reward_mean"].split()
    assert [int(row.split(",")[0]) for row in evaluations] == [0, 80, 160, 240]


@pytest.mark.parametrize("env", GAMES)
def test_every_game_trains_and_is_filmed(env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, f"env={env}", "total_frames=80", "evaluation.video=true")
    (folder,) = run_folders(tmp_path)
    assert folder.parents[1].name == GAMES[env].scenario
    assert json.loads((folder / "summary.json").read_text())["frames"] == 80
    assert (folder / "episode.gif").read_bytes().startswith(b"GIF")


def test_ippo_gets_a_critic_of_local_observations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "loss=ippo", "total_frames=80")
    (folder,) = run_folders(tmp_path)
    config = OmegaConf.load(folder / "config.yaml")
    assert config.critic.observes == "observation"
    assert config.loss._target_ == f"torchrl_marl.objectives.{IPPOLoss.__name__}"


def test_a_grid_gives_one_run_for_each_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "-m", "loss=mars,mappo", "seed=0,1", "total_frames=80")
    configs = [OmegaConf.load(folder / "config.yaml") for folder in run_folders(tmp_path)]
    assert {(config.method, config.seed) for config in configs} == {(m, s) for m in ("mars", "mappo") for s in (0, 1)}


@pytest.mark.parametrize("game", [["env=coordsum"], ["env=vmas"]], ids=["coordsum", "vmas"])
def test_compiled_collection_is_torchrls_and_compile_decides_it(
    game: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    start = CompiledCollector.__init__

    def start_uncompiled(collector: CompiledCollector, *networks: Any, **options: Any) -> None:
        made.append(collector)
        start(collector, *networks, **options, compile=False)

    monkeypatch.setattr(CompiledCollector, "__init__", start_uncompiled)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the update's gradients, not its code
    for compiled in ("false", "true"):
        run_recipe(monkeypatch, tmp_path / compiled, *game, *GRU, f"compile={compiled}", "total_frames=80")
    assert len(made) == 1
    eager, compiled = (curves(run_folders(tmp_path / name)[0]) for name in ("false", "true"))
    collected = [name for name in eager if "collection/" in name or "eval/reward" in name]
    assert len(collected) > 4
    for name in collected:
        first, other = (curve[name].split()[0].split(",") for curve in (eager, compiled))
        assert first[0] == other[0]
        assert float(first[1]) == pytest.approx(float(other[1]), rel=1e-5), name


def test_the_same_seed_gives_the_same_curves_and_another_seed_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_recipe(monkeypatch, tmp_path / name, f"seed={seed}")
    a, b, c = (curves(run_folders(tmp_path / name)[0]) for name in "abc")
    assert a == b
    loss = "train/agents/loss_objective"
    assert a[loss] != c[loss]


def test_arguments_that_the_yaml_does_not_list_can_be_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, "loss.entropy_coeff=0.5", "env.scenario_kwargs.n_agents=2", "total_frames=80")
    (folder,) = run_folders(tmp_path)
    entropy, weighted = (last_value(folder, f"train/agents/{name}") for name in ("entropy", "loss_entropy"))
    assert weighted == pytest.approx(-0.5 * entropy, rel=1e-4)
    assert read_metadata(find_checkpoint(folder))["actor"]["shape"]["num_agents"] == 2


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("sed=3", "seed"),
        ("+sed=3", "seed"),
        ("optimize.lr=1", "optimizer"),
        ("los=mars", "loss"),
        ("loss=marz", "loss=mars"),
        ("actor=gruu", "actor=gru"),
        ("loss.target_ratio=[0.5,2]", "loss.target_ratios"),
        ("env.scenrio=balance", "env.scenario"),
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("evaluation.intervall=3", "evaluation.interval"),
        ("logger.wandb_projekt=x", "logger.wandb_project"),
        ("critic.value_norm.betta=0.9", "critic.value_norm.beta"),
    ],
)
def test_a_key_that_nothing_reads_fails_with_the_nearest_names(
    override: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_recipe(monkeypatch, tmp_path, override)
    message = str(stopped.value.code)
    assert message.startswith(override.lstrip("+").split("=")[0])
    assert nearest in message.split("nearest:")[1]
    assert not run_folders(tmp_path)


def test_another_optimiser_names_the_overrides_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for optimizer, left_out in (("LBFGS", "~optimizer.eps ~optimizer.fused"), ("RMSprop", "~optimizer.fused")):
        switch = f"optimizer._target_=torch.optim.{optimizer}"
        with pytest.raises(SystemExit, match=rf"^torch\.optim\.{optimizer} does not take .* out with {left_out}$"):
            run_recipe(monkeypatch, tmp_path, switch)
    run_recipe(monkeypatch, tmp_path, switch, left_out, "total_frames=80")
    assert (run_folders(tmp_path)[0] / "summary.json").exists()


@pytest.mark.parametrize(
    "overrides",
    [["env.scenario=balance"], ["env=coordsum", "env.scenario=CoordSum-2x5", *GRU]],
    ids=["vmas", "coordsum, gru"],
)
def test_a_run_killed_in_the_middle_resumes_bit_for_bit(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*overrides, "total_frames=1600", "evaluation.interval=240", "seed=5"]
    run_recipe(monkeypatch, tmp_path / "whole", *long)
    process = start_recipe(tmp_path / "killed", *long)
    killed = wait_for_frames(tmp_path / "killed", 800)  # past a checkpoint, and beyond what that one holds
    process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate()
    (whole,) = run_folders(tmp_path / "whole")
    assert process.returncode == -signal.SIGKILL
    assert "resource_tracker" not in printed  # Python's warning of semaphores that it has to take away
    assert not (killed / "summary.json").exists()
    resumed_from = read_metadata(find_checkpoint(killed))["frames"]
    assert 0 < resumed_from < 1600
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path / "elsewhere", f"resume={killed}")
    assert not (tmp_path / "elsewhere").exists()
    assert_same_traces(killed, whole)
    sessions = json.loads((killed / "summary.json").read_text())["sessions"]
    assert ["resume=RUN" in session["command"] for session in sessions] == [False, True]


def send_after(patch: pytest.MonkeyPatch, frames: int, number: signal.Signals) -> None:
    """Let the next run get a signal in the iteration that follows ``frames`` frames."""
    record = Run.record

    def send_and_record(run: Run, metrics: dict) -> None:
        if run._progress["frames"] == frames and not run._asked_to_stop:
            os.kill(os.getpid(), number)
        record(run, metrics)

    patch.setattr(Run, "record", send_and_record)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_bit_for_bit(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on from its last checkpoint: one of its own would be a reset point that the whole run does not have."""
    long = ["env=coordsum", "total_frames=480", "evaluation.interval=240"]
    run_recipe(monkeypatch, tmp_path / "whole", *long)
    with monkeypatch.context() as patch:
        send_after(patch, 320, number)
        run_recipe(patch, tmp_path / "stopped", *long)
    (folder,) = run_folders(tmp_path / "stopped")
    assert read_metadata(find_checkpoint(folder))["frames"] == 240
    printed = capsys.readouterr().out
    assert "Stopped after 400 of 480 frames" in printed
    assert f"Go on with 'resume=\"{folder}\"', which repeats the 160 frames since the last checkpoint\n" in printed
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}")
    assert_same_traces(folder, *run_folders(tmp_path / "whole"))


def test_an_interruption_soon_after_the_start_leaves_something_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_after(patch, 0, signal.SIGINT)
        run_recipe(patch, tmp_path, "total_frames=160", "evaluation.interval=1000000")
    (folder,) = run_folders(tmp_path)
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}")
    assert curves(folder)["counters/iter"] == "80,1.0\n160,2.0\n"
    assert (folder / "summary.json").exists()


def test_interruption_in_the_last_iteration_says_what_resuming_still_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", lambda run, _: run.interrupt())
        run_recipe(patch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    rest = "without absolute metric, film and summary"
    printed = capsys.readouterr()
    assert f"Stopped after 80 of 80 frames, {rest}. Go on with 'resume=\"{folder}\"'" in printed.out
    assert not (folder / "summary.json").exists()
    assert (folder / "learning_curve.png").exists()
    evaluated, _ = curves(folder)["eval/reward/episode_reward_mean"].split()  # the second after the iteration's line
    assert f"evaluation {float(evaluated.split(',')[1]):.2f}]" in printed.err
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["frames"] == 80
    assert summary["absolute"] == last_value(folder, "eval/absolute/episode_reward_mean")
    assert (folder / "learning_curve.png").exists()


@pytest.mark.parametrize("step", ["_absolute_episodes", "_draw"])
def test_an_interruption_after_the_last_iteration_ends_as_cleanly(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press_ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt  # not a signal, which a shell's background jobs ignore

    run_recipe(monkeypatch, tmp_path / "whole", "total_frames=80")
    with monkeypatch.context() as patch:
        patch.setattr(Run, step, press_ctrl_c)
        run_recipe(patch, tmp_path / "stopped", "total_frames=80")
    (folder,) = run_folders(tmp_path / "stopped")
    assert f"Go on with 'resume=\"{folder}\"'" in capsys.readouterr().out
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}")
    assert curves(folder) == curves(*run_folders(tmp_path / "whole"))
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("override", ["loss=mappo", "optimizer.lr=1", "loss.entropy_coeff=0.5", "seed=7"])
def test_a_resumed_run_refuses_what_would_be_recorded_but_not_take_effect(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    with pytest.raises(SystemExit, match=f"keeps its {override.split('=')[0]}"):
        run_recipe(monkeypatch, tmp_path, f"resume={folder}", override)


def test_a_checkpoint_of_before_a_key_of_the_configuration_says_what_still_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    checkpoint = find_checkpoint(run_folders(tmp_path)[0])
    config = read_metadata(checkpoint)["config"]
    older = {key: value for key, value in config.items() if key not in ("collector", "processes")}
    monkeypatch.setattr("torchrl_marl.run.config.read_metadata", lambda _: {"config": older})
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    with pytest.raises(SystemExit, match=rf"^{checkpoint} says nothing of processes, collector: .* load_policy,"):
        run_recipe(monkeypatch, tmp_path, f"resume={checkpoint}")


def test_a_run_of_before_compile_was_one_door_is_evaluated_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    checkpoint = find_checkpoint(folder)
    with zipfile.ZipFile(checkpoint) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("manifest.json"))
        manifest = json.loads(archive.read(name))
    config = manifest["metadata"]["config"]
    config["env"]["compile"] = True
    config["collector"] = {"_target_": "torchrl_marl.collectors.CompiledCollector", "compile": False}
    rewrite(checkpoint, {name: json.dumps(manifest).encode()})
    monkeypatch.setattr(sys, "argv", ["torchrl_marl", "evaluate", str(checkpoint), "--episodes", "2"])
    evaluate_command()
    assert "mars on navigation after 80 frames" in capsys.readouterr().out
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}", "total_frames=160")
    assert curves(folder)["counters/iter"] == "80,1.0\n160,2.0\n"
    assert _stored_config(str(folder), ["compile=true"]).compile


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=240")
    (folder,) = run_folders(tmp_path)
    older = folder / "checkpoints/checkpoint-000000000160.torchrl"
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={older}", "total_frames=200")
    assert read_metadata(find_checkpoint(folder))["frames"] == 240  # written again by the run that went on
    assert (folder / "abandoned/checkpoint-000000000240.torchrl").exists()
    frames = [int(row.split(",")[0]) for row in curves(folder)["counters/iter"].split()]
    assert frames == [80, 160, 240]


def test_a_run_resumed_after_its_end_repeats_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    before, episodes = curves(folder), (folder / "evaluations.json").read_text()
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}")
    assert curves(folder) == before
    assert (folder / "evaluations.json").read_text() == episodes


def test_the_best_score_is_that_of_the_parameters_which_the_absolute_metric_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of before 160 frames gave way to that of 240 and is gone when the run goes on from 160."""
    scores = iter([1.0, 5.0, 3.0, 7.0])

    def scripted(*arguments: Any, **options: Any) -> Episodes:
        episodes = evaluate(*arguments, **options)
        score = next(scores, None)
        return episodes if score is None else episodes._replace(returns=torch.full_like(episodes.returns, score))

    monkeypatch.setattr("torchrl_marl.run.run.evaluate", scripted)
    run_recipe(monkeypatch, tmp_path, "total_frames=240")
    (folder,) = run_folders(tmp_path)
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    older = folder / "checkpoints/checkpoint-000000000160.torchrl"
    run_recipe(monkeypatch, tmp_path, f"resume={older}", "total_frames=160")
    best = read_metadata(best_checkpoint(folder))
    assert (best["frames"], best["score"]) == (160, 3.0)
    assert json.loads((folder / "summary.json").read_text())["best"] == 3.0


def test_a_signal_during_the_last_evaluation_ends_the_run_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = EvaluationRecord.add

    def stop_and_add(record: EvaluationRecord, frames: int, metrics: dict) -> None:
        if frames == 80:
            os.kill(os.getpid(), signal.SIGTERM)
        add(record, frames, metrics)

    monkeypatch.setattr(EvaluationRecord, "add", stop_and_add)
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    assert "Stopped after 80 of 80 frames, without absolute metric" in capsys.readouterr().out
    assert read_metadata(find_checkpoint(folder))["frames"] == 80


def test_a_checkpoint_away_from_its_run_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path / "runs", "total_frames=80")
    (folder,) = run_folders(tmp_path / "runs")
    moved = find_checkpoint(folder).rename(tmp_path / "moved.torchrl")
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="does not lie in the folder of a run"):
        run_recipe(monkeypatch, tmp_path, f"resume={moved}")


def test_evaluations_too_frequent_for_an_episode_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="at least num_envs \\* max_steps = 160"):
        run_recipe(monkeypatch, tmp_path, "env.max_steps=20")


def test_nan_stops_the_run_and_names_iteration_metric_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FloatingPointError) as stopped:
        run_recipe(monkeypatch, tmp_path, "optimizer.lr=1e30")
    (folder,) = run_folders(tmp_path)
    message = str(stopped.value)
    assert "Iteration 1 (80 frames)" in message
    assert "loss_" in message or "grad_norm" in message
    last_good = find_checkpoint(folder)
    assert str(last_good) in message
    assert all(value.isfinite().all() for value in load_policy(last_good).state_dict().values())


def test_the_policy_acts_from_local_observations_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path)
    (folder,) = run_folders(tmp_path)
    policy = load_policy(folder)
    assert policy.in_keys == [("agents", "observation")]
    observation = torch.randn(6, 4, 18)
    others_moved = observation.clone()
    others_moved[:, 1:] += 1
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        actions = [
            policy(TensorDict({"agents": {"observation": seen}}, batch_size=6))["agents", "action"]
            for seen in (observation, others_moved)
        ]
    torch.testing.assert_close(actions[0][:, 0], actions[1][:, 0])
    assert not torch.allclose(actions[0][:, 1:], actions[1][:, 1:])


@pytest.mark.parametrize("method", ["mars", "ippo", "marpo"])
def test_a_recurrent_policy_acts_from_its_own_history_and_scores_what_was_logged(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE_OF[method]
    run_recipe(monkeypatch, tmp_path, *GRU, f"loss={method}", "evaluation.video=true", recipe=recipe)
    (folder,) = run_folders(tmp_path)
    assert (folder / "episode.gif").exists()
    policy = load_policy(find_checkpoint(folder))
    state, observation = torch.zeros(6, 4, 8), torch.randn(6, 4, 18)
    actions = []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(2):  # the same observation again, with another state
            agents = {"observation": observation, "recurrent_state": state}
            data = policy(TensorDict({"agents": agents}, batch_size=6))
            state = data["next", "agents", "recurrent_state"]
            actions.append(data["agents", "action"])
    assert not torch.allclose(*actions)
    episodes = evaluate(make_env("navigation", num_envs=4, max_steps=10, seed=0), policy, seed=1_000_003, max_steps=10)
    assert episodes.returns.mean().item() == pytest.approx(last_value(folder, "eval/reward/episode_reward_mean"))


def test_a_memory_for_one_of_the_two_networks_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for network in ("actor", "critic"):
        run_recipe(monkeypatch, tmp_path, f"{network}=gru", "chunk_length=5", "total_frames=80")
    assert all((folder / "summary.json").exists() for folder in run_folders(tmp_path))


@pytest.mark.parametrize(
    ("length", "message"),
    [("3", "divide the 10 steps.*got 3"), ("null", "be an integer: .*consecutive steps; got null")],
)
def test_chunks_that_do_not_fit_are_refused(
    length: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=message):
        run_recipe(monkeypatch, tmp_path, *GRU, f"chunk_length={length}")
    assert not run_folders(tmp_path)


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose learning rate ruins the policy after a few iterations, so that the best is not among the newest."""
    folder = tmp_path_factory.mktemp("ruined")
    with pytest.MonkeyPatch.context() as patch:
        run_recipe(patch, folder, "total_frames=800", "optimizer.lr=0.05", "env.max_steps=10")
    return run_folders(folder)[0]


def scores_of(folder: Path) -> dict[int, float]:
    """Mean return of each evaluation of a run, by frames."""
    rows = curves(folder)["eval/reward/episode_reward_mean"].split()
    return {int(row.split(",")[0]): float(row.split(",")[1]) for row in rows}


def test_the_best_checkpoint_is_kept_and_scores_what_was_logged(ruined: Path) -> None:
    scores = scores_of(ruined)
    kept = {read_metadata(path)["frames"]: path for path in (ruined / "checkpoints").iterdir()}
    best = max(scores, key=lambda frames: (scores[frames], frames))
    assert set(kept) == {720, 800, best}
    env = make_env("navigation", num_envs=4, max_steps=10, seed=0)
    episodes = evaluate(env, load_policy(ruined), seed=1_000_003, max_steps=10)
    assert episodes.returns.mean().item() == pytest.approx(scores[best], abs=1e-6)


def test_the_absolute_metric_is_of_the_best_parameters_on_ten_times_as_many_other_starts(ruined: Path) -> None:
    kept = {read_metadata(path)["frames"]: path for path in (ruined / "checkpoints").iterdir()}
    best = min(kept)
    assert len(kept) == 3  # the best is neither of the two newest
    env = make_env("navigation", num_envs=40, max_steps=10, seed=0)

    def returns(frames: int, seed: int) -> list[float]:
        return evaluate(env, load_policy(kept[frames]), seed=seed, max_steps=10).returns.tolist()

    evaluations, others = 1_000_003, 2_000_006  # seeds of the starts
    stored = json.loads((ruined / "evaluations.json").read_text())["vmas"]["navigation"]["mars"]["seed_0"]
    absolute = stored["absolute_metrics"]["return"]
    assert absolute == pytest.approx(returns(best, others), abs=1e-6)
    for other in (returns(best, evaluations), returns(800, others)):
        assert absolute != pytest.approx(other, abs=1e-2)
    summary = json.loads((ruined / "summary.json").read_text())
    assert summary["absolute"] == pytest.approx(sum(absolute) / 40, abs=1e-6)
    assert last_value(ruined, "eval/absolute/episode_reward_mean") == summary["absolute"]


def test_more_copies_than_can_play_at_once_play_the_absolute_metric_in_the_batches_of_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrl_marl.run.run._MAX_COPIES", 39)
    run_recipe(monkeypatch, tmp_path, "env=coordsum", "total_frames=80")
    (folder,) = run_folders(tmp_path)
    stored = json.loads((folder / "evaluations.json").read_text())["coordsum"]["CoordSum-3x10"]["mars"]["seed_0"]
    env, policy = make_coordsum(num_envs=4, max_steps=10), load_policy(folder)
    batches = [evaluate(env, policy, seed=seed, max_steps=10).returns for seed in range(2_000_006, 2_000_046, 4)]
    assert stored["absolute_metrics"]["return"] == torch.cat(batches).tolist()
    assert len({tuple(batch.tolist()) for batch in batches}) > 1  # not the same starts again


def test_the_last_fifth_is_the_mean_over_the_last_fifth_of_evaluations(ruined: Path) -> None:
    scores = scores_of(ruined)
    assert len(scores) == 11  # a fifth, rounded down, are two
    mean = (scores[720] + scores[800]) / 2
    assert mean != pytest.approx(scores[800], abs=1e-3)
    assert last_value(ruined, "eval/reward/last_fifth") == pytest.approx(mean)
    assert json.loads((ruined / "summary.json").read_text())["last_fifth"] == pytest.approx(mean)


def test_evaluations_leave_no_trace_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for episodes in (4, 9):
        run_recipe(monkeypatch, tmp_path / str(episodes), f"evaluation.episodes={episodes}", "total_frames=160")
    few, many = (run_folders(tmp_path / episodes)[0] for episodes in "49")
    trained = [{name: text for name, text in curves(folder).items() if "eval/" not in name} for folder in (few, many)]
    assert any("collection" in name for name in trained[0])
    assert trained[0] == trained[1]
    assert scores_of(few) != scores_of(many)
    assert last_value(few, "eval/reward/last_fifth") == scores_of(few)[160]  # of fewer than five: the last one


def test_the_logged_length_of_episodes_is_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def played(*arguments: object, **options: object) -> Episodes:
        episodes = evaluate(*arguments, **options)
        return episodes._replace(lengths=torch.arange(len(episodes.lengths)) + 3)

    monkeypatch.setattr("torchrl_marl.run.run.evaluate", played)
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    stored = json.loads((folder / "evaluations.json").read_text())["vmas"]["navigation"]["mars"]["seed_0"]
    assert stored["step_1"]["episode_length"] == [3, 4, 5, 6]
    assert last_value(folder, "eval/reward/episode_len_mean") == 4.5


def test_wandb_runs_offline_without_a_prompt_and_holds_configuration_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login there
    process = start_recipe(
        tmp_path / "runs", "logger.wandb_project=proof", "logger.wandb_tags=[mine]", "total_frames=80"
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    (folder,) = run_folders(tmp_path / "runs")
    (offline,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    stored = offline.read_bytes()
    names = (b"counters/total_frames", b"frames_per_second", b"git_commit", b"mars_navigation_", b"absolute", b"mine")
    checkpoint = str(find_checkpoint(folder)).encode()  # as an artifact, sent from where it lies
    for expected in (*names, b"checkpoint-", checkpoint):
        assert expected in stored, expected


def test_a_missing_renderer_does_not_fail_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no renderer")

    monkeypatch.setattr("torchrl_marl.run.run.render_episode", fail)
    with pytest.warns(UserWarning, match="no video.*no renderer"):
        run_recipe(monkeypatch, tmp_path, "evaluation.video=true", "total_frames=80")
    assert (run_folders(tmp_path)[0] / "summary.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_the_gpu_is_complete(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "device=cuda", f"compile={compiled}")
    (folder,) = run_folders(tmp_path)
    assert json.loads((folder / "summary.json").read_text())["frames"] == 240
    assert load_policy(folder, device="cuda")(
        TensorDict({"agents": {"observation": torch.zeros(1, 4, 18, device="cuda")}}, batch_size=1)
    )["agents", "action"].is_cuda


def test_mars_learns_navigation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["env.num_envs=60", "env.max_steps=100", "frames_per_batch=6000", "minibatch_size=1000", "epochs=10"]
    networks = ["actor.hidden_sizes=[64,64]", "critic.hidden_sizes=[64,64]", "optimizer.lr=1e-3"]
    run_recipe(monkeypatch, tmp_path, *sizes, *networks, "total_frames=36000", "evaluation.interval=36000")
    rows = curves(run_folders(tmp_path)[0])["eval/reward/episode_reward_mean"].split()
    before, after = (float(row.split(",")[1]) for row in (rows[0], rows[-1]))
    assert after > before + 0.8  # of at most 4.3; a policy that learns nothing stays within 0.2


def test_a_compiled_run_is_evaluated_by_its_collector_as_an_uncompiled_one(tmp_path, monkeypatch):
    for module in ("collectors.compiled", "run.update"):  # what is compiled is the matter of other tests
        monkeypatch.setattr(f"torchrl_marl.{module}.compile_whole", lambda function, **_: function)
    played, plain = [], CompiledCollector.evaluate
    count = lambda *arguments, **options: played.append(1) or plain(*arguments, **options)  # noqa: E731
    monkeypatch.setattr(CompiledCollector, "evaluate", count)
    evaluated = []
    for compile in ("true", "false"):
        run_recipe(monkeypatch, tmp_path / compile, "env=coordsum", f"compile={compile}")
        (folder,) = run_folders(tmp_path / compile)
        evaluated.append(json.loads((folder / "evaluations.json").read_text()))
    assert len(played) == 4  # before training and every 80 of 240 frames
    assert evaluated[0] == evaluated[1]
