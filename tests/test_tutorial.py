"""The tutorial's file and commands run as printed, for fewer frames."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.recipes.runs import RECIPES, TINY, run_recipe
from torchrl_marl.__main__ import main

TUTORIAL = (RECIPES.parent / "docs/tutorial.md").read_text()
GAME, DEPLOYED = re.findall(r"```python\n(.*?)```", TUTORIAL, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ python (.*)$", TUTORIAL, flags=re.MULTILINE)]
SHORTER = {
    override.split("=")[0] for override in TINY if override.startswith(("total", "frames", "mini", "epochs", "eval"))
}


def form(text: str) -> str:
    """Text without its numbers."""
    return re.sub(r"-?\d[\d,.]*(e-\d+)?", "N", text)


def test_the_game_has_at_most_20_lines() -> None:
    assert len([line for line in GAME.splitlines() if line.strip()]) <= 20


def test_the_commands_end_with_a_film_and_a_policy_that_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("gymnasium", "imageio_ffmpeg", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    (tmp_path / "cover.py").write_text(GAME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    check, _, (recipe, *overrides), evaluate, export = COMMANDS  # the second one is that of a game with a mistake
    monkeypatch.setattr(sys, "argv", check[1:])
    main()
    assert capsys.readouterr().out in TUTORIAL
    chosen = [override for override in overrides if override.split("=")[0] not in SHORTER]
    run_recipe(monkeypatch, Path("runs"), *chosen, "evaluation.interval=200", recipe=Path(recipe).stem)
    for _, *arguments in (evaluate, export):
        (run,) = Path().glob(arguments[2])
        monkeypatch.setattr(sys, "argv", [*arguments[:2], str(run), *arguments[3:]])
        capsys.readouterr()
        main()
        assert form(capsys.readouterr().out.splitlines()[-1]) in form(TUTORIAL).splitlines()  # before: the exporter's
    observation, results = np.zeros((1, 8), np.float32), {}
    exec(compile(DEPLOYED, "tutorial.md", "exec"), {"observation": observation}, results)
    assert results["action"].shape == (1, 2)
    assert (tmp_path / "cover.gif").stat().st_size > 0
