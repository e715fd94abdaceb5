"""What papers tune besides their own parameters, from the command line of every on-policy recipe."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.recipes.runs import METHODS, RECIPE_OF, curves, run_folders, run_recipe
from tests.recipes.test_mars_vmas import assert_same_traces, send_after
from tests.recipes.test_spaces import composed
from torchrl_marl.run import load_policy
from torchrl_marl.run.checkpoints import best_checkpoint, find_checkpoint
from torchrl_marl.run.checks import arguments_of

RECIPES = ["mars_vmas", "magpo_vmas", "oappo_vmas", "groups_vmas"]


def rates(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, recipe: str = "mars_vmas") -> list[list]:
    """Learning rates of each step of the optimisers, a list for each of an optimiser's groups of parameters."""
    found = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: found.append([group["lr"] for group in optimizer.param_groups])
    )
    try:
        run_recipe(monkeypatch, folder, *overrides, recipe=recipe)
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_critics_learning_rate_is_its_own_and_equal_ones_change_nothing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rates(monkeypatch, tmp_path / "plain", "optimizer.lr=1e-3", recipe=recipe)
    equal = rates(monkeypatch, tmp_path / "equal", "optimizer.lr=1e-3", "critic_lr=1e-3", recipe=recipe)
    other = rates(monkeypatch, tmp_path / "other", "optimizer.lr=1e-3", "critic_lr=5e-3", recipe=recipe)
    assert plain == [[1e-3]] * len(plain)
    assert equal == [[1e-3, 1e-3]] * len(plain)
    assert other == [[1e-3, 5e-3]] * len(plain)
    folders = [run_folders(tmp_path / name)[0] for name in ("plain", "equal", "other")]
    assert curves(folders[0]) == curves(folders[1]) != curves(folders[2])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_learning_rate_falls_to_zero_over_the_iterations_of_the_run(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rates(monkeypatch, tmp_path, "optimizer.lr=3e-3", "critic_lr=6e-3", "scheduler=linear", recipe=recipe)
    thirds = torch.tensor(found).view(3, -1, 2)  # 240 frames of 80 an iteration
    assert thirds == pytest.approx(torch.tensor([[3e-3, 6e-3], [2e-3, 4e-3], [1e-3, 2e-3]])[:, None].expand_as(thirds))


def test_the_schedule_counts_whole_steps_of_all_environments(tmp_path: Path) -> None:
    sizes = ["frames_per_batch=85", "env.num_envs=8", "total_frames=200"]  # batches of 88
    assert composed("mars", *sizes, "scheduler=linear").scheduler.total_iters == 3
    assert composed("mars", *sizes, "scheduler=cosine", "processes=2").scheduler.T_max == 2


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_annealed_run_resumes_bit_for_bit(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [f"scheduler={schedule}", "critic_lr=2e-3", "total_frames=480"]
    run_recipe(monkeypatch, tmp_path / "whole", *long)
    with monkeypatch.context() as patch:
        send_after(patch, 160, signal.SIGINT)
        run_recipe(monkeypatch, tmp_path / "part", *long)
    (part,) = run_folders(tmp_path / "part")
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={part}")
    (whole,) = run_folders(tmp_path / "whole")
    assert find_checkpoint(part).name == find_checkpoint(whole).name
    assert_same_traces(part, whole)


def test_evaluations_can_sample_actions_without_a_trace_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("false", "true"):
        run_recipe(monkeypatch, tmp_path / name, f"evaluation.sampled={name}")
    likely, sampled = (curves(run_folders(tmp_path / name)[0]) for name in ("false", "true"))
    assert likely.keys() == sampled.keys()
    assert all(likely[name] == sampled[name] for name in likely if not name.startswith("eval/"))
    returns = "eval/reward/episode_reward_mean"
    assert all(a != b for a, b in zip(likely[returns].split(), sampled[returns].split(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_loss_clips_values_and_standardises_agents_apart_if_asked(method: str) -> None:
    target = composed(method, f"loss={method}").loss._target_
    loss = getattr(__import__("torchrl_marl.objectives", fromlist=["objectives"]), target.rpartition(".")[2])
    assert {"clip_value", "standardize_per_agent"} <= set(arguments_of(loss))


@pytest.mark.parametrize("recipe", sorted({RECIPE_OF[method] for method in METHODS} - {"mars_vmas"}))
def test_values_are_clipped_and_agents_standardised_apart_from_the_command_line(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [[], ["loss.clip_value=0.001"], ["loss.standardize_per_agent=true"]]
    for number, options in enumerate(words):
        run_recipe(monkeypatch, tmp_path / str(number), *options, recipe=recipe)
    plain, clipped, apart = (curves(run_folders(tmp_path / str(number))[0]) for number in range(3))
    assert plain
    assert clipped != plain != apart


def parameters(folder: Path, frames: int) -> dict[str, torch.Tensor]:
    return load_policy(folder / f"checkpoints/checkpoint-{frames:012}.torchrl").state_dict()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_starts_with_the_best_policy_of_another_one(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path / "first", recipe=recipe)
    (first,) = run_folders(tmp_path / "first")
    words = ["seed=1", "total_frames=80", f"init_from={first}"]
    run_recipe(monkeypatch, tmp_path / "second", *words, recipe=recipe)
    (second,) = run_folders(tmp_path / "second")
    best = best_checkpoint(first)
    kept, begun = load_policy(best).state_dict(), parameters(second, 0)
    assert kept
    assert all(torch.equal(kept[name], begun[name]) for name in kept)
    assert any(not torch.equal(begun[name], value) for name, value in parameters(second, 80).items())
    assert OmegaConf.load(second / "config.yaml").init_from == str(best)
    assert json.loads((second / "summary.json").read_text())["init_from"] == str(best)


def test_a_policy_of_another_shape_ends_in_one_line_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path / "first", "total_frames=80")
    (first,) = run_folders(tmp_path / "first")
    for words, why in (
        ([f"init_from={first}", "actor.hidden_sizes=[24]"], r"size mismatch for .*\[16, \d+\].*\[24, \d+\]"),
        ([f"init_from={first}", "actor.share_parameters=false"], "Missing key"),
        (["init_from=/nowhere"], "No checkpoint at /nowhere"),
    ):
        with pytest.raises(SystemExit, match=rf"^{words[0]}: no policy for this run: [^\n]*{why}[^\n]*$"):
            run_recipe(monkeypatch, tmp_path / "second", *words)
    assert not (tmp_path / "second").exists()


def test_a_run_that_was_started_from_another_one_resumes_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path / "first", "total_frames=80")
    (first,) = run_folders(tmp_path / "first")
    words = ["seed=1", f"init_from={first}"]
    run_recipe(monkeypatch, tmp_path / "whole", *words)
    run_recipe(monkeypatch, tmp_path / "part", *words, "total_frames=160")
    shutil.rmtree(first)
    (part,), (whole,) = run_folders(tmp_path / "part"), run_folders(tmp_path / "whole")
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={part}", "total_frames=240")
    assert torch.equal(*(torch.cat([v.flatten() for v in parameters(run, 240).values()]) for run in (part, whole)))
