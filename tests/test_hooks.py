"""The files and commands of docs/hooks.md run as printed, for fewer frames."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pandas
import pytest
import torch

from tests.recipes import runs
from tests.recipes.runs import run_folders
from torchrl_marl.__main__ import main
from torchrl_marl.envs import make_custom

HOOKS = (Path(__file__).parents[1] / "docs/hooks.md").read_text()
FILES = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', HOOKS, flags=re.DOTALL))
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ (.*)$", HOOKS, flags=re.MULTILINE)]
SMALL = [size for size in runs.TINY if not size.startswith(("actor.", "critic."))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in FILES.items():
        if "/" not in name:
            (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, with_word: str, *sizes: str, run: Path | None = None) -> None:
    """The one printed command that has a word."""
    (words,) = [words for words in COMMANDS if with_word in words]
    words = [str(run) if word == "RUN" else word for word in words if not word.startswith("total_frames=")]
    monkeypatch.setattr(sys, "argv", [*words[words[0] == "python" :], *sizes])
    if words[0] == "python":
        monkeypatch.syspath_prepend(str(Path(words[1]).parent.resolve()))
        monkeypatch.delitem(sys.modules, "mars_vmas", raising=False)
        runpy.run_path(str(Path(words[1]).resolve()), run_name="__main__")
    else:
        main()


def test_a_network_of_ones_own_trains_and_is_evaluated(monkeypatch, capsys) -> None:
    command(monkeypatch, "actor._target_=attention.make_actor", *SMALL)
    (run,) = run_folders(Path("runs"))
    command(monkeypatch, "attention:make_actor", "--episodes", "2", run=run)
    assert "mean return" in capsys.readouterr().out


def test_a_critic_of_ones_own_trains(monkeypatch) -> None:
    command(monkeypatch, "critic._target_=mean_field.make_critic", *SMALL)
    (run,) = run_folders(Path("runs"))
    assert pandas.read_csv(run / "metrics.csv")["train/agents/loss_critic"].notna().any()


def test_a_callback_and_a_logger_see_every_iteration(monkeypatch) -> None:
    command(monkeypatch, "cp")
    (Path("mine") / "after_iteration.py").write_text(FILES["mine/after_iteration.py"])
    recipe = Path("mine/mars_vmas.py")
    step = "        scheduler.step()\n"
    assert step in recipe.read_text()
    edited = recipe.read_text().replace(step, step + FILES["the added line"])
    imported = "from after_iteration import after_iteration\n"
    recipe.write_text(edited.replace("import torch\n", f"import torch\n{imported}", 1))
    command(monkeypatch, "mine/mars_vmas.py", *SMALL)
    (run,) = run_folders(Path("runs"))
    metrics = pandas.read_csv(run / "metrics.csv")
    assert (metrics["train/agents/speed_of_actions"].dropna() > 0).sum() == 3  # iterations
    (own,) = (run / "mine").rglob("reward.csv")
    assert len(own.read_text().splitlines()) == 3


def test_effort_costs_reward_and_not_the_return_of_the_task(monkeypatch) -> None:
    steps = []
    for cost in (0.5, 0.0):
        options: dict = {"num_envs": 2, "max_steps": 5, "seed": 0, "factory_kwargs": {"cost": cost}}
        env = make_custom("effort:navigation", **options)
        steps.append(env.step(env.reset().set(("agents", "action"), torch.full((2, 4, 2), 0.5)))["next", "agents"])
    shaped, plain = steps
    torch.testing.assert_close(plain["reward"] - shaped["reward"], torch.full((2, 4, 1), 0.5 * 2 * 0.25))
    torch.testing.assert_close(shaped["episode_reward"], plain["reward"])
    command(monkeypatch, "env.factory=effort:navigation", *SMALL)
    assert len(run_folders(Path("runs"))) == 1


def test_each_stage_of_a_curriculum_starts_with_the_policy_of_the_one_before(monkeypatch) -> None:
    command(monkeypatch, "cp")
    (Path("mine") / "curriculum.py").write_text(FILES["mine/curriculum.py"])
    command(monkeypatch, "mine/curriculum.py", *runs.TINY)
    stages = run_folders(Path("runs"))
    starts = [json.loads((run / "summary.json").read_text())["init_from"] for run in stages]
    assert [start and Path(start).parents[1] for start in starts] == [None, *(run.resolve() for run in stages[:2])]
    sizes = [re.findall(r"world_spawning_x: (\S+)", (run / "config.yaml").read_text()) for run in stages]
    assert sizes == [["0.6"], ["0.8"], ["1.0"]]
