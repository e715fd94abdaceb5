"""The recipes of MAT, Sable, MAGPO and CTDS, end to end on a tiny task."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from tests.recipes.runs import TINY, curves, run_folders, run_recipe
from torchrl_marl.envs import make_env
from torchrl_marl.evaluation import evaluate
from torchrl_marl.modules import AutoregressiveActor, make_sable
from torchrl_marl.run.checkpoints import find_checkpoint, load_policy

SMALL = [override for override in TINY if "hidden_sizes" not in override]


def last_value(folder: Path, metric: str) -> float:
    return float(curves(folder)[metric].split()[-1].split(",")[1])


@pytest.mark.parametrize("network", ["mat", "sable"])
@pytest.mark.parametrize("method", ["mars", "mappo"])
def test_a_centralised_actor_trains_with_any_ratio_loss(
    network: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, "actor.embed_dim=16"])
    run_recipe(monkeypatch, tmp_path, f"actor={network}", f"loss={method}", "total_frames=160")
    (folder,) = run_folders(tmp_path)
    assert f"{network}_{method} on navigation, seed 0" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["frames"] == 160
    assert last_value(folder, "train/agents/min_ratio") < 1 < last_value(folder, "train/agents/max_ratio")


@pytest.mark.parametrize("guider", ["mat", "sable"])
def test_the_learner_alone_is_evaluated_and_stored_and_acts_on_local_observations(
    guider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL, "guider.embed_dim=16", "actor.hidden_sizes=[16]", "loss.shuffle_agents=true"]
    monkeypatch.setattr("tests.recipes.runs.TINY", options)
    run_recipe(monkeypatch, tmp_path, f"guider={guider}", "total_frames=160", recipe="magpo_vmas")
    (folder,) = run_folders(tmp_path)
    policy = load_policy(folder)  # no guider is needed
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
    rows = curves(folder)["eval/reward/episode_reward_mean"].split()
    best = max(float(row.split(",")[1]) for row in rows)
    env = make_env("navigation", num_envs=4, max_steps=10, seed=0)
    episodes = evaluate(env, policy, seed=1_000_003, max_steps=10)
    assert episodes.returns.mean().item() == pytest.approx(best, abs=1e-6)
    assert last_value(folder, "train/agents/learner_grad_norm") > 0


def test_a_learner_with_a_memory_follows_the_guider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["guider.embed_dim=8", "actor=gru", "actor.recurrent_size=8", "actor.hidden_sizes=[8]"]
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, *sizes, "actor.head_sizes=[8]"])
    run_recipe(monkeypatch, tmp_path, "total_frames=160", recipe="magpo_vmas")
    (folder,) = run_folders(tmp_path)
    assert set(load_policy(folder).in_keys) == {("agents", "observation"), ("agents", "recurrent_state"), "is_init"}
    assert last_value(folder, "train/agents/loss_learner_kl") > 0


def test_sable_goes_on_bit_for_bit_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, "actor.embed_dim=8"])
    run_recipe(monkeypatch, tmp_path / "whole", "actor=sable", "total_frames=160")
    run_recipe(monkeypatch, tmp_path / "half", "actor=sable", "total_frames=80")
    (whole,), (half,) = (run_folders(tmp_path / name) for name in ("whole", "half"))
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={half}", "total_frames=160")
    # both parts have measured their best parameters at the end; all else is one course
    at_the_end = ("absolute", "last_fifth")
    resumed, straight = (
        {k: v for k, v in curves(f).items() if not any(name in k for name in at_the_end)} for f in (half, whole)
    )
    assert "train/agents/loss_objective" in resumed
    assert resumed == straight


def test_a_centralised_policy_is_rebuilt_or_loaded_into_its_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, "actor.embed_dim=8"])
    run_recipe(monkeypatch, tmp_path, "actor=sable", "total_frames=80")
    (folder,) = run_folders(tmp_path)
    env = make_env("navigation", num_envs=2, max_steps=5, seed=0)
    actor, _ = make_sable(env, embed_dim=8)
    before = [parameter.clone() for parameter in actor.parameters()]
    load_policy(folder, actor=actor)
    assert any((new != old).any() for new, old in zip(actor.parameters(), before, strict=True))
    rebuilt = load_policy(folder)
    assert isinstance(rebuilt, AutoregressiveActor)
    assert all(torch.equal(new, old) for new, old in zip(rebuilt.parameters(), actor.parameters(), strict=True))


def test_learners_can_follow_the_guider_of_after_its_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["guider.embed_dim=8", "actor.hidden_sizes=[8]", "total_frames=80", "loss=ctds"]
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, *sizes])
    parts = []
    for first in ("false", "true"):
        run_recipe(monkeypatch, tmp_path / first, f"loss.guider_first={first}", recipe="magpo_vmas")
        (folder,) = run_folders(tmp_path / first)
        with zipfile.ZipFile(find_checkpoint(folder)) as checkpoint:
            loss = torch.load(io.BytesIO(checkpoint.read("components/0001-loss/state.pt")))
        parts.append([{k: v for k, v in loss.items() if k.startswith(part)} for part in ("actor", "critic", "learner")])
    # the guider of CTDS never sees the learner: it goes the same way, the learner another one
    (guider, critic, learner), (same_guider, same_critic, other) = parts
    assert guider
    torch.testing.assert_close((guider, critic), (same_guider, same_critic), rtol=0, atol=0)
    assert any((learner[name] != other[name]).any() for name in learner)


def test_what_the_guider_alone_sees_is_not_asked_of_the_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["actor.recurrent_size=8", "actor.hidden_sizes=[8]", "guider.embed_dim=8", "epochs=1", "total_frames=80"]
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, *sizes])
    options = ["guider.observes=observation_and_state", "loss=magpo_adaptive", "loss.adapt_ratio.target=0.5"]
    run_recipe(monkeypatch, tmp_path, "experiment=magpo_coordsum", *options, recipe="magpo_vmas")
    (folder,) = run_folders(tmp_path)
    assert set(load_policy(folder).in_keys) == {("agents", "observation"), ("agents", "recurrent_state"), "is_init"}
    # a fresh learner is closer than that: the bound widens
    assert last_value(folder, "train/agents/guider_learner_ratio") > 1.5


@pytest.mark.parametrize("task", [None, "CoordSum-3x10", "CoordSum-5x20"])
@pytest.mark.parametrize("method", ["magpo", "ctds"])
def test_coordsum_trains_in_every_setting(
    task: str | None, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.recipes.runs.TINY", [*SMALL, "actor.recurrent_size=8", "actor.hidden_sizes=[8]"])
    setting = ["experiment=magpo_coordsum", f"loss={method}"] if task is None else [f"setting={method}/{task}"]
    options = ["epochs=1", "total_frames=80", "guider.embed_dim=8"]
    run_recipe(monkeypatch, tmp_path, *setting, *options, recipe="magpo_vmas")
    (folder,) = run_folders(tmp_path)
    assert json.loads((folder / "summary.json").read_text())["frames"] == 80
    assert last_value(folder, "train/agents/loss_learner_kl") > 0
