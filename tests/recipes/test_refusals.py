"""What recipes refuse before they build anything: losses of another loop, values out of range."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from tests.recipes import runs
from tests.recipes.runs import RECIPES, run_folders, run_recipe


@pytest.mark.parametrize(
    ("recipe", "loss", "taken"),
    [
        ("mars_vmas", "magpo_adaptive", "seac"),
        ("oappo_vmas", "magpo", "seac"),
        ("groups_vmas", "ctds", "seac"),
        ("magpo_vmas", "mappo", "ctds, magpo, magpo_adaptive"),
    ],
)
def test_a_loss_that_needs_another_loop_is_refused_with_those_that_do_not(
    recipe: str, loss: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"^{recipe} does not train [A-Z]+Loss, .*(=|, ){taken}\\. The README's table"):
        run_recipe(monkeypatch, tmp_path, f"loss={loss}", recipe=recipe)
    assert not run_folders(tmp_path)


@pytest.mark.parametrize("loss", ["happo", "oatrpo"])
def test_a_loss_refuses_networks_that_agents_share(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^loss: .*network of its own.*share_parameters=False"):
        run_recipe(monkeypatch, tmp_path, f"loss={loss}")
    assert not run_folders(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gamma=1.5", r"gamma must be between 0 and 1; got 1\.5"),
        ("gamma=nan", "gamma must be between 0 and 1; got nan"),
        ("lmbda=-0.1", r"lmbda must be between 0 and 1; got -0\.1"),
        ("epochs=0", "epochs must be an integer of at least 1; got 0"),
        ("total_frames=0", "total_frames must be an integer of at least 1; got 0"),
        ("total_frames=1e6", r"total_frames must be an integer of at least 1; got 1000000\.0\. Write 1000000\."),
        ("evaluation.episodes=0", r"evaluation\.episodes must be an integer of at least 1; got 0"),
        ("env.num_envs=many", r"env\.num_envs must be an integer of at least 1; got many"),
        ("minibatch_size=81", "minibatch_size must be an integer from 1 to frames_per_batch, 80; got 81"),
        ("minibatch_size=0", "minibatch_size must be an integer from 1 to frames_per_batch, 80; got 0"),
        ("chunk_length=0", "chunk_length must be null or an integer of at least 1; got 0"),
        ("compile=maybe", "compile must be auto, true or false; got maybe"),
        ("seed=abc", "seed must be an integer of at least 0, .*; got abc"),
        ("device=gpu", "device=gpu is not a valid torch device: "),
        ("resume=nowhere", "resume=nowhere: No checkpoint at nowhere"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if override.startswith("resume"):
        monkeypatch.setattr("tests.recipes.runs.TINY", [])
    with pytest.raises(SystemExit, match=f"^{message}"):
        run_recipe(monkeypatch, tmp_path, override)
    assert not run_folders(tmp_path)


def test_cuda_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^device=cuda:1 needs CUDA"):
        run_recipe(monkeypatch, tmp_path, "device=cuda:1")


@pytest.mark.parametrize(
    ("recipe", "words", "extra"),
    [("mars_vmas", ["-m", "hydra/launcher=submitit_slurm"], "scale"), ("tune", ["mars_vmas"], "tune")],
)
def test_a_missing_extra_is_named(
    recipe: str, words: list[str], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("torchrl_marl.run.config.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=rf'needs .*: pip install "torchrl_marl\[{extra}\]"'):
        run_recipe(monkeypatch, tmp_path, *words, recipe=recipe)


def test_a_recipe_with_a_scenario_of_its_own_takes_other_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, "env=coordsum", "total_frames=80", recipe="oappo_vmas")
    (folder,) = run_folders(tmp_path)
    assert (folder / "summary.json").exists()
    assert folder.parts[-3:-1] == ("CoordSum-3x10", "oappo")


def composed(monkeypatch: pytest.MonkeyPatch, *overrides: str, recipe: str = "mars_vmas") -> DictConfig:
    """What a recipe would train."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"].compose(overrides)


def test_more_environments_move_the_default_evaluations_apart_and_explicit_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert composed(monkeypatch).evaluation.interval == 30_000
    assert composed(monkeypatch, "env.num_envs=600").evaluation.interval == 60_000  # an episode of 100 steps of each
    assert composed(monkeypatch, "evaluation.interval=7").evaluation.interval == 7
    with pytest.raises(SystemExit, match=r"^evaluation\.interval is 80, but .* = 160"):
        run_recipe(monkeypatch, tmp_path, "env.num_envs=16", "evaluation.interval=80")


def test_a_run_of_another_recipe_is_resumed_by_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    (folder,) = run_folders(tmp_path)
    monkeypatch.setattr(runs, "TINY", [])
    with pytest.raises(SystemExit, match=rf"is of a run of mars_vmas: python recipes/mars_vmas\.py resume={folder}$"):
        run_recipe(monkeypatch, tmp_path, f"resume={folder}", recipe="marpo_vmas")


@pytest.mark.parametrize(
    ("recipe", "fitting", "others"),
    [
        ("mars_vmas", "actor=mat actor=gru experiment=oappo_maze setting=happo/TASK", "loss=magpo setting=ctds"),
        ("magpo_vmas", "actor=gru loss=ctds setting=magpo/TASK guider=mat", "actor=mat critic=mlp loss=mars"),
        ("oappo_vmas", "actor=gru critic=gru loss=oatrpo", "actor=sable setting=mat experiment=magpo_coordsum"),
        ("qmix_vmas", "actor=gru loss=vdn", "critic=mlp loss=mappo setting=mappo experiment=mappo_maze"),
    ],
)
def test_help_lists_the_choices_that_a_recipe_trains(recipe, fitting, others, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [recipe, "--help"])
    monkeypatch.syspath_prepend(str(RECIPES))
    runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    lines = re.findall(r"^  (\w+): (.*)$", capsys.readouterr().out.partition("Values")[0], flags=re.MULTILINE)
    listed = {f"{group}={choice}" for group, choices in lines for choice in choices.split(", ")}
    assert set(fitting.split()) <= listed
    assert not set(others.split()) & listed


def test_help_shows_what_the_chosen_classes_take_beyond_the_file(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mars_vmas", "loss=maspo", "--help"])
    runpy.run_path(str(RECIPES / "mars_vmas.py"), run_name="__main__")
    values = yaml.safe_load(capsys.readouterr().out.partition("among them:\n")[2])
    assert values["loss"]["_target_"] == "torchrl_marl.objectives.MASPOLoss"
    assert values["loss"]["entropy_coeff"] == 0.01  # of RatioLoss
    assert values["actor"]["hidden_sizes"] == [256, 256]  # of make_actor
    assert values["optimizer"]["lr"] == 0.001  # of the file
    assert values["optimizer"]["betas"] == [0.9, 0.999]  # of torch.optim.Adam


def test_folders_of_runs_tell_configurations_apart_and_seeds_together(tmp_path, monkeypatch) -> None:
    for words in (["seed=0"], ["seed=1"], ["seed=1", "optimizer.lr=0.1"]):
        run_recipe(monkeypatch, tmp_path, "total_frames=80", *words)
    (one, first), (same, second), (other, third) = (
        (folder.name.split("-")[1], folder.name.split("-")[0]) for folder in run_folders(tmp_path)
    )
    assert (first, second, third) == ("seed0", "seed1", "seed1")
    assert one == same != other


def test_an_actor_of_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_networks_here.py").write_text("from torchrl_marl.modules import make_actor as make_mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    cfg = composed(monkeypatch, "actor._target_=my_networks_here.make_mine")
    assert cfg.actor._target_ == "my_networks_here.make_mine"


def test_what_hydra_refuses_is_one_line_of_what_was_typed(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(runs, "TINY", [])
    with pytest.raises(SystemExit, match=r"^Ambiguous value for argument 'actor\.hidden_sizes=64,64' [^\n]*$"):
        run_recipe(monkeypatch, tmp_path, "actor.hidden_sizes=64,64")
    with pytest.raises(SystemExit, match=r"^optimizer\._target_ must name a function or a class[^\n]*$"):
        run_recipe(monkeypatch, tmp_path, "optimizer._target_=torch.optim.Adamm")
    assert capfd.readouterr() == ("", "")


def test_a_run_that_fails_before_its_first_checkpoint_offers_none(tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no episode")

    monkeypatch.setattr("torchrl_marl.run.run.evaluate", fail)
    with pytest.raises(RuntimeError, match=r"no episode\. There is no checkpoint yet that could be resumed\.$"):
        run_recipe(monkeypatch, tmp_path)
