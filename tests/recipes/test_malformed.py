"""Malformed command lines end in one line, before a run has a folder: a part of benchmarks/malformed.py."""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Literal

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.envs import make_env
from torchrl_marl.objectives.surrogates import Gain
from torchrl_marl.run.checks import check_types
from torchrl_marl.run.run import Run


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("mars_vmas", "~loss", "~loss: mars_vmas needs loss; it can be changed"),
        ("mars_vmas", "~evaluation", "~evaluation: mars_vmas needs evaluation"),
        ("mars_vmas", "~evaluation.video", "evaluation.video must be true or false; got null"),
        ("mars_vmas", "seed=4294967296", "seed must be an integer of at least 0, at most 4291967286"),
        ("mars_vmas", "seed=[1,2]", "seed must be an integer"),
        ("mars_vmas", "gamma=true", "gamma must be between 0 and 1; got True"),
        ("mars_vmas", "max_grad_norm=0", "max_grad_norm must be a number above 0 \\(inf: no limit\\); got 0"),
        ("mars_vmas", "evaluation.video=maybe", "evaluation.video must be true or false; got maybe"),
        ("mars_vmas", "evaluation=5", "evaluation must be a node of keys: interval, episodes, video, sampled; got 5"),
        ("mars_vmas", "recipe=foo", "recipe must be what the script is called, mars_vmas; got foo"),
        ("mars_vmas", "method=a/b", "method must be a name that a folder can have; got a/b"),
        ("mars_vmas", "method=null", "method must be a name .* got null"),
        ("mars_vmas", "num_threads=100000", "num_threads must be an integer from 1 to this machine's processors"),
        ("mars_vmas", "env.num_envs=1000000000000", "env.num_envs must be an integer from 1 to frames_per_batch, 80"),
        ("mars_vmas", "env.max_steps=2.5", "env.max_steps must be an integer of at least 1; got 2.5"),
        ("mars_vmas", "folder=null", "folder must be the path of a folder; got null"),
        ("mars_vmas", "folder=/dev/null", "folder=/dev/null: a run cannot have its folder there: .*Not a directory"),
        ("mars_vmas", "resume=[a]", "resume must be null, a checkpoint or the folder of a run; got \\['a'\\]"),
        ("mars_vmas", "evaluation.interval=79", "evaluation.interval is 79, .* at least num_envs \\* max_steps = 80"),
        ("mars_vmas", "processes=2", "The configuration says processes=2, but the world size is 1"),
        ("mars_vmas", "chunk_length=7", "chunk_length must divide the 10 steps that each environment takes, got 7"),
        ("magpo_vmas", "chunk_length=5", "chunk_length=5 has no effect: magpo_vmas has no use for chunk_length"),
        (
            "mars_vmas",
            "actor=sable chunk_length=5",
            "chunk_length must be null, as the loss trains on whole sequences; got 5",
        ),
        ("mars_vmas", "actor=mat critic=mlp", "critic=mlp has no effect: other choices set critic to null"),
        ("mars_vmas", "actor=mat critic.observes=state", "critic.observes has no effect: .* no critic is built"),
        ("magpo_vmas", "actor=mat", "loss: learner_network must be a network; got tuple"),
        ("mars_vmas", "+experiment=mappo_mase", "experiment=mappo_mase is not a choice; nearest: .*=mappo_maze"),
        ("mars_vmas", "experiment=magpo_coordsum", "guider.embed_dim has no effect: .* no guider is built"),
        ("magpo_vmas", "critic=mlp", "critic=mlp has no effect: magpo_vmas has no use for critic"),
        ("magpo_vmas", "collector=compiled", "collector=compiled is no choice any more: compile=true compiles"),
        ("mars_vmas", "collector=sequences", "collector=sequences is no choice any more: leave it out"),
        ("mars_vmas", "collector.foo=1", "collector.foo has no effect: with these choices no collector is built"),
        ("mars_vmas", "env.compile=true", "env.compile is not an argument of torchrl_marl.envs.make_env"),
        ("magpo_vmas", "minibatch_size=9", "minibatch_size must be at least the 10 steps of a sequence; got 9"),
        (
            "mars_vmas",
            "loss.gain._target_=torchrl_marl.objectives.surrogates.clip_gain",
            r"loss.gain: clip_gain\(\) missing .*: loss.gain._partial_=true",
        ),
        ("mars_vmas", "loss.gain=5", "loss.gain must be a _target_ that makes a Gain; got 5"),
        ("mars_vmas", "loss.entropy_coeff=nan", "loss.entropy_coeff must be a number; got nan"),
        ("mars_vmas", "loss.entropy_coeff=-1", "loss: entropy_coeff must be a number of at least 0; got -1"),
        ("mars_vmas", "loss.target_ratios=[0.5,inf]", "loss: target_ratios must be a finite pair"),
        ("mars_vmas", "optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("mars_vmas", "optimizer._target_=torch.optim.None", "optimizer._target_ must name a function or a class"),
        (
            "mars_vmas",
            "env.scenario_kwargs.n_agents=2.5",
            "env: scenario_kwargs.n_agents must be an integer",
        ),
        (
            "oappo_vmas",
            "loss=oatrpo loss.reduction=sum",
            "loss.reduction must be mean, as a natural-gradient step requires; got sum",
        ),
        ("groups_vmas", "env.scenario_kwargs.num_good_agents=-1", "env: scenario_kwargs.num_good_agents must be"),
        ("mars_vmas", "env.scenario=nowhere", "env: VMAS has no scenario 'nowhere'"),
        ("mars_vmas", "actor.hidden_sizes=[-4]", "actor: hidden_sizes must be at least 1 each, got \\[-4\\]"),
        ("mars_vmas", "loss=[", "no viable alternative at input '\\['"),
        ("mars_vmas", "seed=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_a_malformed_command_line_ends_in_one_line(
    recipe: str, override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"^{message}") as refused:
        run_recipe(monkeypatch, tmp_path, *override.split(), recipe=recipe)
    assert "\n" not in str(refused.value)
    assert not run_folders(tmp_path)


def test_agents_for_whom_vmas_finds_no_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 agents do not fit into navigation's world: VMAS looks for places without end, and warns after 50 000 tries."""
    from vmas.simulator.utils import ScenarioUtils

    said = "It is taking many iterations to spawn the entity"
    assert said in inspect.getsource(ScenarioUtils.find_random_pos_for_entity)

    def finds_none(*_: object, **__: object) -> None:
        warnings.warn(f"{said}, make sure ...", stacklevel=2)
        pytest.fail("VMAS goes on looking")

    monkeypatch.setattr(ScenarioUtils, "find_random_pos_for_entity", finds_none)
    with pytest.raises(ValueError, match="'navigation' with scenario_kwargs n_agents=33: there is no room"):
        make_env("navigation", num_envs=1, scenario_kwargs={"n_agents": 33})


def test_checks_keep_their_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InstantiationException, match="full_key: loss"):
        run_recipe(monkeypatch, tmp_path, "loss.target_ratios=[2,3]")


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError"])
def test_errors_that_no_check_raises_keep_their_traceback(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causes: dict[str, Callable[..., object]] = {
        "ValueError": lambda *_, **__: int("bug"),
        "RuntimeError": lambda *_, **__: torch.zeros(2) + torch.zeros(3),
    }
    fail = FunctionType(causes[error].__code__, {"__name__": "torchrl_marl.objectives.mars", "torch": torch})
    monkeypatch.setattr("torchrl_marl.objectives.MARSLoss.make_value_estimator", fail)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        run_recipe(monkeypatch, tmp_path)
    assert type(raised.value).__name__ == error
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_what_hydra_makes_of_a_bad_call_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that needs more than the recipe gives it fails in Hydra's call, not in a check."""
    with pytest.raises(SystemExit, match=r"^optimizer: .*missing 1 required positional argument: 'other'"):
        run_recipe(monkeypatch, tmp_path, "optimizer._target_=tests.recipes.test_malformed.needs_more")


def needs_more(params: object, other: object, lr: float, eps: float, fused: bool) -> None:
    """An optimiser that no recipe can make."""


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, float, True),
        (True, float, False),
        (math.nan, float, False),
        (2**63, int, False),
        (2.0, int, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (1, Literal[True], False),
        (None, int | None, True),
        ([1, 2], Sequence[int], True),
        ([1, 2.5], Sequence[int], False),
        ("ab", Sequence[str], False),
        ([0.5, 2], tuple[float, float], True),
        ([0.5], tuple[float, float], False),
        ([0.5, 2, 3], tuple[float, ...], True),
        ({"a": 1}, Mapping[str, int], True),
        (5, Mapping[str, int], False),
        (5, Callable[[], int], False),
        (5, Gain, False),
        (5, object, True),
        (5, torch.Tensor, False),
    ],
)
def test_a_yaml_value_is_held_against_the_annotation(value: object, kind: object, fits: bool) -> None:
    config = OmegaConf.create({"value": value})

    def target(value: object) -> None: ...

    target.__annotations__["value"] = kind
    if fits:
        check_types(config, target, "loss.")
    else:
        with pytest.raises(SystemExit, match=r"^loss\.value must be .*; got"):
            check_types(config, target, "loss.")


def test_what_learning_loses_is_said_once_with_the_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Run.record

    def record_trouble(self: Run, metrics: Mapping[str, torch.Tensor]) -> None:
        record(self, {**metrics, "entropy": torch.tensor(0.009), "min_ratio": torch.tensor(9e-7)})

    monkeypatch.setattr(Run, "record", record_trouble)
    with pytest.warns(UserWarning, match="^Iteration 1: train/agents/") as caught:
        run_recipe(monkeypatch, tmp_path, "env=coordsum", "evaluation.interval=80")
    said = [str(warning.message) for warning in caught]
    assert [text.split(": ")[1].partition(" is")[0] for text in said] == [
        "train/agents/min_ratio",
        "train/agents/entropy",
    ]
    assert all(text.startswith("Iteration 1: ") for text in said)
    assert "9e-07, below 1e-06" in said[0]
