"""The studies of benchmarks/study.py: the recipes take their commands, compare their runs, and nothing is run twice."""

import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from tests.recipes.runs import RECIPES
from torchrl_marl.config import _checked_override, _groups, _load, check_keys

STUDY = runpy.run_path(str(RECIPES.parent / "benchmarks/study.py"))
PARTS = {f"{name}-{part.name}": part for name, parts in STUDY["STUDIES"].items() for part in parts}
CONFIG = RECIPES / "config"


def composed(command: str) -> DictConfig:
    """The configuration of a command, checked as the recipe does it."""
    recipe, *words = shlex.split(command)
    assert (RECIPES / recipe).exists()
    flags = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
    name = flags.get("config-name", Path(recipe).stem)
    overrides = [_checked_override(word, CONFIG, name) for word in words if not word.startswith("--")]
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose(name, overrides=[*overrides, "method=its", "environment=its"])  # Hydra's, once it runs
    resolved = DictConfig(OmegaConf.to_container(config, resolve=True))
    check_keys(resolved, DictConfig(OmegaConf.merge(dict.fromkeys(_groups(CONFIG)), _load(CONFIG, name))))
    return resolved


def settings(config: DictConfig) -> Iterator[tuple[str, object]]:
    """What recipes/compare.py wants equal on a task."""
    yield from (("frames", config.total_frames), ("interval", config.evaluation.interval))
    yield from (("episodes", config.evaluation.episodes),)
    yield from ((key, value) for key, value in config.env.items() if key not in ("num_envs", "compile"))


@pytest.mark.parametrize("name", PARTS)
def test_the_recipes_take_every_command_of_a_study_and_its_runs_can_be_compared(name: str) -> None:
    tasks: dict[str, dict] = {}
    for command in PARTS[name].commands:
        config = composed(command)
        assert config.evaluation.interval >= config.env.num_envs * config.env.max_steps
        assert tasks.setdefault(config.env.scenario, dict(settings(config))) == dict(settings(config))


@pytest.mark.parametrize(
    "mistake", ["epohcs=8", "evaluation.intervall=9", "loss=marz", "loss.clip_epsilonn=1", "optimizer.fuse=true"]
)
def test_a_misspelt_override_of_a_study_is_noticed(mistake: str) -> None:
    with pytest.raises(SystemExit, match="nearest"):
        composed(f"seeds.py --config-name=mappo_maze {mistake}")


def test_commands_of_a_study_are_distinct() -> None:
    for part in PARTS.values():
        assert len(set(part.commands)) == len(part.commands)


def make_run(folder: Path, seed: int, *, checkpoint: bool, finished: bool) -> Path:
    run = folder / f"recipe/task/method/seed{seed}"
    (run / "checkpoints").mkdir(parents=True)
    OmegaConf.save({"seed": seed}, run / "config.yaml")
    if checkpoint:
        (run / "checkpoints/checkpoint-000000000080.torchrl").touch()
    if finished:
        (run / "summary.json").touch()
    return run


def test_finished_runs_are_skipped_and_begun_ones_go_on(tmp_path: Path) -> None:
    make_run(tmp_path, 0, checkpoint=True, finished=True)
    begun = make_run(tmp_path, 1, checkpoint=True, finished=False)
    make_run(tmp_path, 2, checkpoint=False, finished=False)  # killed before it had anything to go on from
    for attempt in ("before", "later"):
        make_run(tmp_path / attempt, 0, checkpoint=False, finished=False)  # hides no finished run of its seed
    left = STUDY["missing"]("oappo_vmas.py loss=happo", 4, tmp_path)
    new = ["oappo_vmas.py", "loss=happo", f"folder={tmp_path}"]
    assert left == [["oappo_vmas.py", f"resume={begun}"], [*new, "seed=2"], [*new, "seed=3"]]


def test_the_seeds_that_a_group_lacks_train_together_and_begun_ones_alone(tmp_path: Path) -> None:
    begun = make_run(tmp_path, 1, checkpoint=True, finished=False)
    left = STUDY["missing"]("seeds.py loss=mars", 3, tmp_path)
    assert left == [["mars_vmas.py", f"resume={begun}"], ["seeds.py", "loss=mars", f"folder={tmp_path}", "seed=[0,2]"]]
    make_run(tmp_path, 0, checkpoint=True, finished=True)
    make_run(tmp_path, 2, checkpoint=True, finished=True)
    (begun / "summary.json").touch()
    assert STUDY["missing"]("seeds.py loss=mars", 3, tmp_path) == []
