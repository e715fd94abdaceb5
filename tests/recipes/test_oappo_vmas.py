"""The recipes of sequential methods: what they log, and that they are one another where the methods are."""

import runpy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.recipes.runs import RECIPES, curves, run_folders, run_recipe

GRU = ["actor=gru", "actor.recurrent_size=8", "actor.head_sizes=[]", "chunk_length=5"]


def series(folder: Path, metric: str) -> list[float]:
    rows = curves(folder)[f"train/agents/{metric}"].split()
    return [float(row.split(",")[1]) for row in rows]


def test_the_reuse_matrix_is_logged_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path, "loss=oatrpo", recipe="oappo_vmas")
    (folder,) = run_folders(tmp_path)
    for agent in (0, 1):
        shares = [series(folder, f"reuse_{agent}_{source}") for source in (0, 1)]
        assert [sum(row) for row in zip(*shares, strict=True)] == pytest.approx([1.0] * 3)
        assert shares[agent][0] == pytest.approx(0.7)  # fresh policies are close
    assert (folder / "reuse_matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("memory", [[], GRU], ids=["mlp", "gru"])
def test_without_reuse_a_whole_run_is_happos_bit_for_bit(
    memory: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path / "off", "loss.own_weight=1", "total_frames=160", *memory, recipe="oappo_vmas")
    run_recipe(monkeypatch, tmp_path / "own", "loss=happo", "total_frames=160", *memory, recipe="oappo_vmas")
    off, own = (curves(run_folders(tmp_path / name)[0]) for name in ("off", "own"))
    assert off == own
    assert len(off["train/agents/loss_objective"].split()) == 2


@pytest.mark.parametrize("method", ["hatrpo", "oatrpo"])
def test_one_loop_serves_clips_and_natural_gradients(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, f"loss={method}", "total_frames=80", recipe="oappo_vmas")
    assert "train/agents/step_fraction" in curves(run_folders(tmp_path)[0])


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(monkeypatch, tmp_path / "whole", "total_frames=160", recipe="oappo_vmas")
    run_recipe(monkeypatch, tmp_path / "cut", "total_frames=80", recipe="oappo_vmas")
    (cut,) = run_folders(tmp_path / "cut")
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={cut}", "total_frames=160", recipe="oappo_vmas")
    one, other = (
        {name: curve for name, curve in curves(folder).items() if "train/" in name}
        for folder in (cut, run_folders(tmp_path / "whole")[0])
    )
    assert one == other
    assert len(one) > 10


def test_a_mapping_can_be_fixed_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "loss.reuse_matrix=[[1.0,0.0],[0.5,0.5]]"
    run_recipe(monkeypatch, tmp_path, rows, "total_frames=80", recipe="oappo_vmas")
    (folder,) = run_folders(tmp_path)
    assert [series(folder, f"reuse_{i}_{j}") for i in (0, 1) for j in (0, 1)] == [[1.0], [0.0], [0.5], [0.5]]


def test_actors_and_critic_may_have_memories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["critic=gru", "critic.recurrent_size=8", "critic.head_sizes=[]", "loss.reuse=sampled", "total_frames=80"]
    run_recipe(monkeypatch, tmp_path, "loss=oatrpo", *sizes, *GRU, recipe="oappo_vmas")
    (folder,) = run_folders(tmp_path)
    assert series(folder, "loss_critic")[0] > 0
    assert 0 < series(folder, "kl")[0] < 0.01


def test_agents_that_share_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="network of its own"):
        run_recipe(monkeypatch, tmp_path, "actor.share_parameters=true", recipe="oappo_vmas")


def test_who_is_alike_is_printed_as_an_override_that_recipes_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    run_recipe(monkeypatch, tmp_path, "encode.num_epochs=1", recipe="seps")
    override = capsys.readouterr().out.strip()
    assert override in [f"actor.share_parameters=[0,{one},{two}]" for one, two in ((0, 1), (1, 0), (1, 1))]
    env = ["env=maze", "env.scenario=black_blue_red"]
    run_recipe(monkeypatch, tmp_path, *env, override, "loss=mappo", "total_frames=80")
    (folder,) = run_folders(tmp_path)
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("recipe", "choices", "method"),
    [
        ("mars_vmas", ["+experiment=mappo_maze"], "mappo"),
        ("oappo_vmas", ["experiment=oappo_maze"], "oappo"),
        ("oappo_vmas", ["+experiment=oappo_maze", "loss=oatrpo"], "oatrpo"),
    ],
)
def test_experiments_play_in_the_mazes_and_resume_without_being_named_again(
    recipe: str, choices: list[str], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, tmp_path, *choices, "total_frames=80", recipe=recipe)
    (folder,) = run_folders(tmp_path)
    assert folder.parts[-4:-1] == (recipe, "black_red", method)
    assert (folder / "reuse_matrix.png").exists() == (method != "mappo")
    config = OmegaConf.load(folder / "config.yaml")
    assert config.optimizer.lr == 3e-3
    assert config.actor.get("share_parameters", True) == (method == "mappo")
    monkeypatch.setattr("tests.recipes.runs.TINY", [])
    run_recipe(monkeypatch, tmp_path, f"resume={folder}", "total_frames=160", recipe=recipe)
    assert len(curves(folder)["train/agents/loss_objective"].split()) == 2


def test_the_command_line_decides_over_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["loss=happo", "env.scenario=black_blue_red", "optimizer.lr=0.002"]
    for words in (["experiment=oappo_maze", *own], [*own, "+experiment=oappo_maze"]):
        run_recipe(monkeypatch, tmp_path, *words, "total_frames=80", recipe="oappo_vmas")
    for folder in run_folders(tmp_path):
        assert folder.parts[-4:-1] == ("oappo_vmas", "black_blue_red", "happo")
        assert OmegaConf.load(folder / "config.yaml").optimizer.lr == 0.002


@pytest.mark.parametrize("path", sorted(path for path in RECIPES.glob("*.py") if '"""Moved to' in path.read_text()))
def test_a_script_of_before_names_the_command_of_now(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match=rf"^{path.name} has moved: python recipes/\w+\.py [+=\w]+( loss=oatrpo)?$"
    ) as end:
        runpy.run_path(str(path))
    script, *words = str(end.value).partition("python recipes/")[2].split()
    monkeypatch.syspath_prepend(str(RECIPES))
    assert runpy.run_path(str(RECIPES / script))["main"].compose(words).recipe == Path(script).stem
