"""Exported policies compute what the originals do, agent by agent, and say what they hold."""

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.envs import ExplorationType, set_exploration_type

import torchrl_marl.export as export
from torchrl_marl.export import export_policy
from torchrl_marl.modules import GroupSpec, make_actor, make_mat, make_recurrent_actor
from torchrl_marl.run.checkpoints import CheckpointFolder, actor_record, load_policy

CONTINUOUS = GroupSpec("agents", 3, 4, action_low=(-1.0, -2.0), action_high=(1.0, 3.0))
MASKED = GroupSpec("walkers", 3, 4, num_actions=5, masked=True)
MLP = {"_target_": "torchrl_marl.modules.make_actor", "hidden_sizes": [8]}
GRU = {"_target_": "torchrl_marl.modules.make_recurrent_actor", "hidden_sizes": [8], "recurrent_size": 6}
OWN = {"share_parameters": False}


def make_run(folder: Path, shape: GroupSpec, config: dict, *, scale: float = 30.0) -> Path:
    """A run whose policy is far from its initial near-indifference."""
    build = {"make_actor": make_actor, "make_recurrent_actor": make_recurrent_actor}[config["_target_"].split(".")[-1]]
    actor = build(shape, **{key: value for key, value in config.items() if key != "_target_"})
    for parameter in list(actor.parameters())[-2:]:
        parameter.data *= scale
    metadata = {
        "config": {"environment": "vmas", "env": {"scenario": "navigation"}},
        "actor": actor_record(shape, config),
        "frames": 7,
    }
    CheckpointFolder(folder / "checkpoints", actor=actor).save(frames=7, score=0.0, metadata=metadata)
    return folder


def episode(run: Path, shape: GroupSpec, steps: int) -> tuple[list[dict], list[torch.Tensor]]:
    """Inputs and actions of an episode that begins anew in its middle, by the policy itself."""
    policy, state, inputs, actions = load_policy(run), torch.zeros(2, 3, 6), [], []
    for step in range(steps):
        seen = {"observation": torch.randn(2, 3, 4), "action_mask": torch.rand(2, 3, 5) < 0.5}
        seen["action_mask"][..., 2] = True
        seen = seen if shape.masked else {"observation": seen["observation"]}
        if step == steps // 2:
            state = torch.zeros_like(state)
        agents = {**seen, "recurrent_state": state}
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            data = policy(TensorDict({shape.name: agents}, batch_size=2))
        state = data.get(("next", shape.name, "recurrent_state"), state)
        inputs.append({**seen, "is_init": torch.full((2, 1), step in (0, steps // 2))})
        actions.append(data[shape.name, "action"])
    return inputs, actions


def replay(call, inputs: list[dict], agent: int | None) -> list[torch.Tensor]:
    """Actions of an exported policy that is handed its own memory from step to step."""
    state, actions = torch.full((2, 3, 6) if agent is None else (2, 6), 9.0), []  # 9: to be ignored at the start
    for seen in inputs:
        own = {name: value if agent is None or name == "is_init" else value[:, agent] for name, value in seen.items()}
        outputs = call({**own, "recurrent_state": state})
        state = outputs.get("next_recurrent_state", state)
        actions.append(outputs["action"])
    return actions


def program(path: Path):
    loaded = torch.export.load(path)
    module, known = loaded.module(), loaded.graph_signature.user_inputs
    return lambda inputs: module(**{name: inputs[name] for name in known})


def onnx_session(path: Path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    known, outputs = ([entry.name for entry in entries] for entries in (session.get_inputs(), session.get_outputs()))

    def call(inputs: dict) -> dict:
        arrays = session.run(None, {name: inputs[name].numpy() for name in known})
        return dict(zip(outputs, map(torch.from_numpy, arrays), strict=True))

    return call


@pytest.mark.parametrize(
    ("shape", "config", "agent"),
    [
        (CONTINUOUS, GRU, None),
        (CONTINUOUS, MLP, 1),
        (MASKED, {**MLP, **OWN}, None),
        (MASKED, {**GRU, **OWN}, 2),
    ],
    ids=["gru", "mlp of one agent", "masked mlps", "masked gru of one agent"],
)
def test_a_program_plays_an_episode_as_the_policy_does(shape, config, agent, tmp_path: Path) -> None:
    run = make_run(tmp_path, shape, config)
    inputs, expected = episode(run, shape, 6)
    path = export_policy(run, format="torch_export", agent=agent, num_observations=10)
    for actual, wanted in zip(replay(program(path), inputs, agent), expected, strict=True):
        torch.testing.assert_close(actual, wanted if agent is None else wanted[:, agent])


@pytest.mark.parametrize(("shape", "config", "agent"), [(CONTINUOUS, GRU, 1), (MASKED, {**GRU, **OWN}, None)])
def test_onnx_plays_an_episode_as_the_policy_does(shape, config, agent, tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxscript")
    run = make_run(tmp_path, shape, config)
    inputs, expected = episode(run, shape, 6)
    path = export_policy(run, agent=agent)
    for actual, wanted in zip(replay(onnx_session(path), inputs, agent), expected, strict=True):
        torch.testing.assert_close(actual, wanted if agent is None else wanted[:, agent])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: largest difference from the original over 1,000 observations ")
    assert float(printed.split()[-1]) < 1e-5
    held = json.loads(
        pytest.importorskip("onnxruntime").InferenceSession(path).get_modelmeta().custom_metadata_map["torchrl_marl"]
    )
    assert (held["agent"], held["num_agents"], held["group"], held["frames"]) == (agent, 3, shape.name, 7)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_policy(make_run(tmp_path_factory.mktemp("run"), CONTINUOUS, GRU), format="torch_export")


def test_the_file_says_what_it_holds(exported: Path) -> None:
    extra = {"torchrl_marl": ""}
    torch.export.load(exported, extra_files=extra)
    assert json.loads(extra["torchrl_marl"]) == {
        "environment": "vmas",
        "env": {"scenario": "navigation"},
        "frames": 7,
        "group": "agents",
        "num_agents": 3,
        "agent": None,
        "inputs": {"observation": ["B", 3, 4], "recurrent_state": ["B", 3, 6], "is_init": ["B", 1]},
        "num_actions": None,
        "action_low": [-1.0, -2.0],
        "action_high": [1.0, 3.0],
    }


def test_agents_act_on_their_own_inputs_alone(exported: Path) -> None:
    act, init = program(exported), torch.zeros(9, 1, dtype=torch.bool)
    inputs = {"observation": torch.randn(9, 3, 4), "recurrent_state": torch.rand(9, 3, 6), "is_init": init}
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["observation"][:, 1:] += 1
    changed["recurrent_state"][:, 1:] -= 1
    before, after, alone = act(inputs), act(changed), act({name: value[:1] for name, value in inputs.items()})
    for name in ("action", "loc", "scale", "next_recurrent_state"):
        torch.testing.assert_close(after[name][:, 0], before[name][:, 0])
        assert not torch.allclose(after[name][:, 1:], before[name][:, 1:])
        torch.testing.assert_close(alone[name], before[name][:1])


def test_a_file_that_computes_something_else_is_not_kept_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, CONTINUOUS, MLP)
    (run / "policy.pt2").write_text("an earlier one")
    original = export._original

    def shifted(*args):
        results = original(*args)
        return {**results, "action": results["action"] + 1e-3}

    monkeypatch.setattr(export, "_original", shifted)
    with pytest.raises(RuntimeError, match=r"off by 1\.0e-03.*nothing was written"):
        export_policy(run, format="torch_export")
    assert (run / "policy.pt2").read_text() == "an earlier one"
    assert {path.name for path in run.iterdir()} == {"checkpoints", "policy.pt2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "onxx"}, "format must be one of onnx, torch_export; got 'onxx'"),
        ({"agent": 3}, "there is no agent 3: 'agents' has agents 0 to 2"),
        ({"num_observations": 0}, "num_observations must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_policy(make_run(tmp_path, CONTINUOUS, MLP), **{"format": "torch_export", **change})


def test_of_several_groups_one_is_exported(tmp_path: Path) -> None:
    shapes = [CONTINUOUS, MASKED]
    actor = TensorDictSequential([make_actor(shape, hidden_sizes=[8]) for shape in shapes])
    metadata = {"config": {}, "actor": actor_record(shapes, MLP), "frames": 1}
    CheckpointFolder(tmp_path / "checkpoints", actor=actor).save(frames=1, score=0.0, metadata=metadata)
    path = export_policy(tmp_path, format="torch_export", group="walkers", num_observations=5)
    assert path == tmp_path / "policy_walkers.pt2"
    inputs = {"observation": torch.randn(9, 3, 4), "action_mask": torch.ones(9, 3, 5, dtype=torch.bool)}
    data = actor[1](TensorDict({"walkers": inputs}, batch_size=9))
    torch.testing.assert_close(program(path)(inputs)["logits"], data["walkers", "logits"])
    for group in (None, "swimmers"):
        with pytest.raises(ValueError, match=f"group must be one of agents, walkers; got {group!r}"):
            export_policy(tmp_path, format="torch_export", group=group)


def test_a_policy_that_acts_centrally_is_refused_by_name(tmp_path: Path) -> None:
    actor, _ = make_mat(CONTINUOUS)
    metadata = {"config": {}, "actor": actor_record(CONTINUOUS, {"_target_": "torchrl_marl.modules.make_mat"})}
    CheckpointFolder(tmp_path / "checkpoints", actor=actor).save(
        frames=1, score=0.0, metadata={**metadata, "frames": 1}
    )
    with pytest.raises(ValueError, match=r"built by torchrl_marl\.modules\.make_mat; what can be exported are decentr"):
        export_policy(tmp_path)


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[export\]"'):
        export_policy(make_run(tmp_path, CONTINUOUS, MLP))
