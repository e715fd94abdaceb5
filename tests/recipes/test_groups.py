"""Groups with different spaces, against each other and together."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from tests.recipes.runs import RECIPES, curves, run_folders, run_recipe
from torchrl_marl.__main__ import main
from torchrl_marl.envs import make_env
from torchrl_marl.evaluation import evaluate
from torchrl_marl.modules import GroupSpec
from torchrl_marl.run.checkpoints import load_policy

GRU = ["actor=gru", "critic=gru", "chunk_length=5", "actor.recurrent_size=8", "critic.recurrent_size=8"]


def last_value(folder: Path, metric: str) -> float:
    return float(curves(folder)[metric].split()[-1].split(",")[1])


def test_with_one_group_it_is_the_mars_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in ("groups_vmas", "mars_vmas"):
        run_recipe(monkeypatch, tmp_path / recipe, "env.scenario=navigation", "total_frames=160", recipe=recipe)
    several, one = (curves(run_folders(tmp_path / recipe)[0]) for recipe in ("groups_vmas", "mars_vmas"))
    assert several == one


@pytest.mark.parametrize(
    ("scenario", "spaces", "networks"),
    [
        ("simple_tag", {"adversary": (3, 16, 2), "agent": (1, 14, 2)}, ["loss=mappo"]),
        ("simple_speaker_listener", {"speaker": (1, 3, 5), "listener": (1, 11, 2)}, GRU),
    ],
)
def test_groups_with_different_spaces_train_and_are_evaluated_apart(
    scenario: str, spaces: dict, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    own = [f"env.scenario={scenario}", "total_frames=160", *networks]
    run_recipe(monkeypatch, tmp_path, *own, recipe="groups_vmas")
    (folder,) = run_folders(tmp_path)
    policy = load_policy(folder / "checkpoints/checkpoint-000000000160.torchrl")
    last = evaluate(make_env(scenario, num_envs=4, max_steps=10, seed=0), policy, seed=1_000_003, max_steps=10)
    for group, (agents, observation_size, action_size) in spaces.items():
        assert last_value(folder, f"train/{group}/min_ratio") < 1 < last_value(folder, f"train/{group}/max_ratio")
        logged = last_value(folder, f"eval/{group}/reward/episode_reward_mean")
        assert logged == pytest.approx(last.groups[group].mean().item(), rel=1e-5)
        seen = {"observation": torch.randn(5, agents, observation_size), "recurrent_state": torch.zeros(5, agents, 8)}
        data = TensorDict({group: seen}, batch_size=5)
        assert policy[list(spaces).index(group)](data)[group, "action"].shape == (5, agents, action_size)
    weights = torch.tensor([agents for agents, *_ in spaces.values()], dtype=torch.float32)
    mean = torch.stack(list(last.groups.values())).T @ weights / weights.sum()
    torch.testing.assert_close(mean, last.returns)
    stored = json.loads((folder / "evaluations.json").read_text())["vmas"][scenario][folder.parent.name]["seed_0"]
    assert stored["step_2"][f"return_{group}"] == pytest.approx(last.groups[group].tolist(), rel=1e-5)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["torchrl_marl", "evaluate", str(folder), "--episodes", "3"])
    main()
    assert [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()[1:]] == list(spaces)


def test_a_group_learns_from_the_batch_and_leaves_it_and_the_other_group_as_they_are() -> None:
    learner_class = runpy.run_path(str(RECIPES / "groups_vmas.py"))["Learner"]
    network = {"_target_": "torchrl_marl.modules.make_actor", "hidden_sizes": [8]}
    sizes = {"frames_per_batch": 40, "minibatch_size": 20, "epochs": 2, "max_grad_norm": 0.5, "chunk_length": None}
    loss = {"_target_": "torchrl_marl.objectives.MAPPOLoss", "functional": False, "normalize_advantage": False}
    cfg = {
        "actor": network,
        "critic": {**network, "_target_": "torchrl_marl.modules.make_critic"},
        "loss": loss,
        "optimizer": {"_target_": "torch.optim.Adam"},
        "env": {"num_envs": 4},
        "scheduler": {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0},
        **{"gamma": 0.9, "lmbda": 0.9, "compile": False, "critic_lr": None, **sizes},
    }
    env = make_env("simple_tag", num_envs=4, max_steps=5, seed=0)
    shapes = [GroupSpec.from_env(env, group) for group in ("adversary", "agent")]
    hunters, prey = (learner_class(OmegaConf.create(cfg), shape, "cpu") for shape in shapes)
    with torch.no_grad():
        batch = env.rollout(10, TensorDictSequential([hunters.actor, prey.actor]), break_when_any_done=False)
    unchanged, before = batch.clone(), [copy.deepcopy(part.loss.state_dict()) for part in (hunters, prey)]
    assert len(list(hunters.learn(batch))) == 4  # two epochs of two minibatches
    changed = [
        any(not torch.equal(value, part.loss.state_dict()[name]) for name, value in old.items())
        for part, old in zip((hunters, prey), before, strict=True)
    ]
    assert changed == [True, False]
    assert set(batch.keys(True, True)) == set(unchanged.keys(True, True))
    assert (batch == unchanged).all()
