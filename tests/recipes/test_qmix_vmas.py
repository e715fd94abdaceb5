"""The off-policy recipe of VDN, QMIX, QPLEX and LDSA, end to end on a tiny task."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from tests.recipes.runs import VALUE_BASED, curves, run_folders, run_recipe
from tests.recipes.test_mars_vmas import assert_same_traces, last_value, send_after
from tests.recipes.test_options import rates
from torchrl_marl.envs import make_env
from torchrl_marl.evaluation import evaluate
from torchrl_marl.export import export_policy
from torchrl_marl.run.checkpoints import find_checkpoint, load_policy, read_metadata

SMALL = ["buffer.capacity=200", "exploration.annealing_num_steps=160"]
GRU = ["actor=gru", "chunk_length=5", "actor.recurrent_size=8", "actor.head_sizes=[]"]
LDSA = ["loss=ldsa", "chunk_length=5", "actor.recurrent_size=8"]


def train(patch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> None:
    run_recipe(patch, folder, *SMALL, *overrides, recipe="qmix_vmas")


@pytest.mark.parametrize("method", sorted(VALUE_BASED))
def test_every_method_trains_and_leaves_a_complete_folder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(monkeypatch, tmp_path, *(LDSA if method == "ldsa" else [f"loss={method}"]), "evaluation.video=true")
    (folder,) = run_folders(tmp_path)
    printed = capsys.readouterr().out
    assert f"{method} on navigation, seed 0" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["frames"] == 240
    assert {"absolute", "frames_per_second", "git_commit"} < set(summary)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "episode.gif").read_bytes().startswith(b"GIF")
    epsilons = [row.split(",") for row in curves(folder)["train/agents/epsilon"].split()]
    assert [(frame, round(float(value), 3)) for frame, value in epsilons] == [
        ("80", 0.525),  # from 1 to 0.05 in 160 frames
        ("160", 0.05),
        ("240", 0.05),
    ]
    assert last_value(folder, "train/agents/loss_value") > 0
    assert last_value(folder, "train/agents/grad_norm") > 0
    evaluations = curves(folder)["eval/reward/episode_reward_mean"].split()
    assert [int(row.split(",")[0]) for row in evaluations] == [0, 80, 160, 240]


@pytest.mark.parametrize(
    "overrides", [["loss=qplex", "scheduler=linear"], [*GRU, "env=coordsum"], LDSA], ids=["qplex", "gru", "ldsa"]
)
def test_an_interrupted_run_resumes_bit_for_bit_with_its_buffer(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*overrides, "total_frames=480", "evaluation.interval=240"]
    train(monkeypatch, tmp_path / "whole", *long)
    with monkeypatch.context() as patch:
        send_after(patch, 320, signal.SIGINT)
        train(patch, tmp_path / "stopped", *long)
    (folder,) = run_folders(tmp_path / "stopped")
    assert read_metadata(find_checkpoint(folder))["frames"] == 240
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}", recipe="qmix_vmas")
    assert_same_traces(folder, *run_folders(tmp_path / "whole"))


@pytest.mark.parametrize("overrides", [["loss=vdn"], LDSA], ids=["vdn", "ldsa"])
def test_a_policy_is_loaded_evaluated_and_exported(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, tmp_path, *overrides, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    policy = load_policy(find_checkpoint(folder))
    env = make_env("navigation", num_envs=4, max_steps=10, seed=0, continuous_actions=False)
    episodes = evaluate(env, policy, seed=1_000_003, max_steps=10)
    assert episodes.returns.mean().item() == pytest.approx(last_value(folder, "eval/reward/episode_reward_mean"))
    assert export_policy(folder, format="torch_export").exists()


def test_evaluated_actions_are_greedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(monkeypatch, tmp_path, "total_frames=80")
    policy = load_policy(run_folders(tmp_path)[0])
    data = TensorDict({"agents": {"observation": torch.randn(50, 4, 18)}}, batch_size=50)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        data = policy(data)
    assert torch.equal(data["agents", "action"], data["agents", "logits"].argmax(-1))


def test_a_compiled_update_and_compiled_acting_train_as_uncompiled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, given = torch.compile, []

    def traced(function: Callable, *, fullgraph: bool = False, dynamic: bool | None = None, **_: Any) -> Callable:
        given.append(function)
        return compiler(function, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    for name, compile in (("plain", lambda function, **_: function), ("traced", traced)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compile)
            train(patch, tmp_path / name, "env=coordsum", "total_frames=80", "compile=true")
    assert len(given) == 3  # the loss, a step of policy and game, and new episodes
    plain, compiled = (curves(run_folders(tmp_path / name)[0]) for name in ("plain", "traced"))
    assert plain.keys() == compiled.keys()
    values = [[float(row.split(",")[1]) for row in text.split()] for run in (plain, compiled) for text in run.values()]
    half = len(values) // 2
    for one, other in zip(values[:half], values[half:], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_the_learning_rate_falls_to_zero_over_the_iterations_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["optimizer.lr=3e-3", "scheduler=linear", *SMALL]
    found = torch.tensor(rates(monkeypatch, tmp_path, *words, recipe="qmix_vmas"))
    thirds = found.view(3, -1)  # 240 frames of 80 an iteration, with 4 updates each
    assert thirds == pytest.approx(torch.tensor([[3e-3], [2e-3], [1e-3]]).expand(3, 4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.continuous_actions=true"], "loss: QMIXLoss needs discrete actions, but 'agents' has continuous ones"),
        ([*LDSA, "env.continuous_actions=true"], "actor: LDSA needs discrete actions"),
        (["loss=mars"], "qmix_vmas does not train MARSLoss, .*it takes loss=ldsa, qmix, qplex, vdn"),
        (["loss=qmix", "actor=gru", "chunk_length=null"], "chunk_length must be an integer: a recurrent"),
        (["buffer.capacity=39"], "capacity must be at least the 40 steps of a sample; got 39"),
        (["loss.mixing_embed_dimm=3"], r"loss.mixing_embed_dimm is not an argument .* nearest: loss.mixing_embed_dim"),
        (["loss=vdn", "loss.loss_function=l3"], "loss.loss_function must be l2 or l1 or smooth_l1; got l3"),
        (["loss=ldsa", "actor=mlp"], "actor=mlp has no effect: other choices set actor to .*make_ldsa_actor"),
        (["lmbda=0.9"], "lmbda is not a key of the configuration"),
        (["actor=mat"], "loss: QMIXLoss needs agents that act by themselves: actor=mlp or actor=gru"),
        (["processes=2"], "The configuration says processes=2, but the world size is 1: start with torchrun"),
        (["compile=maybe"], "compile must be auto, true or false; got maybe"),
        (["critic=mlp"], "critic=mlp has no effect: qmix_vmas has no use for critic"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"^{message}") as refused:
        train(monkeypatch, tmp_path, *overrides)
    assert "\n" not in str(refused.value)
    assert not run_folders(tmp_path)
