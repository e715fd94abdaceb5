"""The studies of benchmarks/study.py: the recipes take their commands, compare their runs, and nothing is run twice."""

import itertools
import json
import runpy
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tests.recipes.runs import RECIPES
from torchrl_marl.modules import GroupSpec, make_actor, make_critic
from torchrl_marl.run.checks import check_keys
from torchrl_marl.run.config import recipe
from torchrl_marl.run.names import config_groups, load_config

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPES.parent / "benchmarks"))  # as a script has it
    STUDY = runpy.run_path(str(RECIPES.parent / "benchmarks/study.py"))
PARTS = {f"{name}-{part.name}": part for name, parts in STUDY["STUDIES"].items() for part in parts}
CONFIG = RECIPES / "config"


def composed(command: str) -> DictConfig:
    """The configuration of a command, checked as the recipe does it."""
    script, *words = shlex.split(command)
    assert (RECIPES / script).exists()
    flags = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
    name = flags.get("config-name", Path(script).stem)
    guided = {"networks": ("guider_network", "critic_network", "learner_network")} if name == "magpo_vmas" else {}
    main = recipe(CONFIG, name, **guided)(lambda _: 0.0)
    overrides = [main._checked_override(word) for word in words if not word.startswith("--")]
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose(name, overrides=[*overrides, "method=its", "environment=its"])  # Hydra's, once it runs
    resolved = DictConfig(OmegaConf.to_container(config, resolve=True))
    check_keys(resolved, DictConfig(OmegaConf.merge(dict.fromkeys(config_groups(CONFIG)), load_config(CONFIG, name))))
    return resolved


def commands_of(part: object) -> list[str]:
    """All commands, with and without those to choose from as they are run in tuning."""
    lists = [[command] if isinstance(command, str) else command for command in part.commands]
    tuning = [f"{command} {part.tuning}" for commands in lists if len(commands) > 1 for command in commands]
    return [command for commands in lists for command in commands] + tuning


def with_new_words(commands: Iterable[str]) -> list[str]:
    """Commands that say something which none before them has said: of a grid those on its edges."""
    said: set[str] = set()
    new = []
    for command in commands:
        if not said.issuperset(command.split()):
            said.update(command.split())
            new.append(command)
    return new


def settings(config: DictConfig) -> Iterator[tuple[str, object]]:
    """What recipes/compare.py wants equal on a task."""
    yield from (("frames", config.total_frames), ("interval", config.evaluation.interval))
    yield from (("episodes", config.evaluation.episodes),)
    yield from ((key, value) for key, value in config.env.items() if key != "num_envs")


@pytest.mark.parametrize("name", PARTS)
def test_the_recipes_take_every_command_of_a_study_and_its_runs_can_be_compared(name: str) -> None:
    tasks: dict[tuple, dict] = {}
    for command in with_new_words(commands_of(PARTS[name])):
        config = composed(command)
        if config.evaluation.interval is not None:  # null follows the environments
            assert config.evaluation.interval >= config.env.num_envs * config.env.max_steps
        if "cfg.chunk_length" in (RECIPES / command.split()[0]).read_text():
            assert config.frames_per_batch // config.env.num_envs % (config.chunk_length or 1) == 0
        task = (config.env.scenario, bool(PARTS[name].tuning) and command.endswith(PARTS[name].tuning))
        assert tasks.setdefault(task, dict(settings(config))) == dict(settings(config))


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.tuning])
def test_the_losses_take_every_value_that_a_study_chooses_from(name: str) -> None:
    """A setting that always fails would leave its method with fewer choices than the others have."""
    shape = GroupSpec("agents", num_agents=2, observation_size=3, num_actions=2)
    actor, critic = make_actor(shape), make_critic(shape)
    lists = [command for command in PARTS[name].commands if not isinstance(command, str)]
    assert len({len(commands) for commands in lists}) == 1
    for command in with_new_words(itertools.chain.from_iterable(lists)):
        instantiate(composed(command).loss, actor, critic)


@pytest.mark.parametrize(
    "mistake", ["epohcs=8", "evaluation.intervall=9", "loss=marz", "loss.clip_epsilonn=1", "optimizer.fuse=true"]
)
def test_a_misspelt_override_of_a_study_is_noticed(mistake: str) -> None:
    with pytest.raises(SystemExit, match="nearest"):
        composed(f"mars_vmas.py experiment=mappo_maze {mistake}")


def test_commands_of_a_study_are_distinct() -> None:
    for part in PARTS.values():
        assert len(set(commands_of(part))) == len(commands_of(part))


def test_nothing_is_tuned_on_the_seeds_that_are_reported() -> None:
    for part in PARTS.values():
        assert not set(part.tuning_seeds) & set(part.seeds)


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
    left = STUDY["missing"]("oappo_vmas.py loss=happo", range(4), tmp_path)
    new = ["oappo_vmas.py", "loss=happo", f"folder={tmp_path}"]
    assert left == [["oappo_vmas.py", f"resume={begun}"], [*new, "seed=2"], [*new, "seed=3"]]


def run_with_scores(part: object, scores: dict[str, float], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a part with a recipe that scores what is said, and fails where nothing is; return its command lines."""
    lines = []

    def execute(line: Sequence[str]) -> int:
        recipe, *words = line
        lines.append(shlex.join(word for word in line if not word.startswith("folder=")))
        if recipe == "compare.py":
            return 0
        if words[0] not in scores:
            return 1
        values = dict(word.split("=") for word in words)
        run = make_run(Path(values["folder"]), int(values["seed"]), checkpoint=True, finished=True)
        # a constant for each seed: who looks at one seed alone still orders them right, who mixes them up does not
        last_fifth = scores[words[0]] + 10 * int(values["seed"])
        (run / "summary.json").write_text(json.dumps({"last_fifth": last_fifth}))
        (run / "setting").write_text(words[0])
        return 0

    monkeypatch.setitem(STUDY["run_part"].__globals__, "execute", execute)
    STUDY["run_part"](part, folder, jobs=1, options=["device=cpu"])
    return lines


def test_of_several_commands_the_best_on_the_tuning_seeds_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = ["r.py w=1", "r.py w=2", "r.py w=3"]
    part = STUDY["Part"]("its", [choices, "r.py w=4"], 2, "mappo", tuning_seeds=(-3, -2), tuning="n=1")
    scores = {"w=1": -5.0, "w=2": -1.0, "w=4": 9.0}  # the third diverges
    lines = run_with_scores(part, scores, tmp_path, monkeypatch)
    assert lines[:6] == [f"r.py w={w} n=1 seed={seed} device=cpu" for seed in (-3, -2) for w in (1, 2, 3)]
    assert lines[6:10] == [f"r.py w={w} seed={seed} device=cpu" for seed in (0, 1) for w in (2, 4)]
    record = json.loads((tmp_path / "tuning.json").read_text())
    last_fifth = {"r.py w=1": -30.0, "r.py w=2": -26.0, "r.py w=3": None}
    assert record == {"seeds": [-3, -2], "overrides": "n=1", "last_fifth": last_fifth}

    *again, page = run_with_scores(part, scores, tmp_path, monkeypatch)
    assert [line.split()[1] for line in again] == ["w=3", "w=3"]  # what failed is tried again
    assert settings_on(page) == {"w=2", "w=4"}

    wider = STUDY["Part"]("its", [[*choices, "r.py w=5"], "r.py w=4"], 2, "mappo", tuning_seeds=(-3, -2), tuning="n=1")
    *_, page = run_with_scores(wider, {**scores, "w=5": -0.5}, tmp_path, monkeypatch)
    assert settings_on(page) == {"w=5", "w=4"}  # not what was chosen before, though its runs are still there


def settings_on(page: str) -> set[str]:
    """Which settings a page of run_with_scores compares."""
    paths = shlex.split(page.partition(" --output")[0])[1:]
    return {(path / "setting").read_text() for folder in paths for path in Path(folder).rglob("seed0")}


def test_a_choice_of_nothing_but_failures_ends_the_study_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = STUDY["Part"]("its", [["r.py w=1", "r.py w=2"]], 2, "mappo")
    with pytest.raises(SystemExit, match=r"its .*has failed: r.py w=1; r.py w=2"):
        run_with_scores(part, {}, tmp_path, monkeypatch)
