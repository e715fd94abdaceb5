"""What recipes refuse before they build anything: losses of another loop, values out of range."""

import sys
from pathlib import Path

import pytest

from tests.recipes.runs import run_folders, run_recipe


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
