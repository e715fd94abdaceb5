"""A misspelt name is answered before Torch is imported, in the words of the full check."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

from tests.recipes.runs import RECIPES
from torchrl_marl.run.checks import arguments_of
from torchrl_marl.run.names import check_names
from torchrl_marl.signatures import signature, source_arguments

TARGETS = {
    target
    for path in (RECIPES / "config").rglob("*.yaml")
    for target in re.findall(r"_target_: (\S+)", path.read_text())
}
TOLD_BY_IMPORT_ALONE = {  # their signatures are made as they are imported, or by packages that import as they are used
    "hydra.utils.instantiate",
    "torchrl.modules.EGreedyModule",
    "torchrl.modules.PopArtValueNorm",
    *(f"torchrl_marl.envs.make_{game}" for game in ("aerocombat", "coordsum", "maze", "paxmen")),
    "torchrl_marl.modules.encode_agents",
}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_source_tells_the_arguments_that_the_signature_has(target: str) -> None:
    expected = None if target in TOLD_BY_IMPORT_ALONE else set(arguments_of(get_object(target)))
    assert source_arguments(target) == expected


def test_a_class_has_the_arguments_of_the_init_before_the_new_of_a_more_distant_base() -> None:
    class Base:
        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)

    class Middle(Base):
        def __init__(self, actor, *, width=1) -> None: ...

    class Loss(Middle): ...  # as read by inspect.signature before Python 3.11.4: *args, **kwargs

    assert list(signature(Loss).parameters) == ["actor", "width"]
    assert list(signature(Base).parameters) == ["args", "kwargs"]
    assert not signature(type("Empty", (), {})).parameters


def test_a_package_that_imports_from_itself_does_not_tell_the_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "circular_names.py").write_text("from circular_names import build")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_arguments("circular_names.build") is None


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("recipes/mars_vmas.py los=mars", "los is not a key of the configuration; nearest: loss"),
        ("recipes/mars_vmas.py loss=mras", "loss=mras is not a choice; nearest: loss=mars"),
        ("recipes/marpo_vmas.py loss.entropy_coef=0.1", "loss.entropy_coef is not an argument of torchrl_marl.*_coeff"),
        ("recipes/mars_vmas.py evaluation.intervl=1", "evaluation.intervl is not a key .*: evaluation.interval"),
        ("recipes/mars_vmas.py -m seed=0,1 loss.target_ratio=1,2", "loss.target_ratio is .*_ratios"),
        ("recipes/mars_vmas.py setting=tuned/balance loss.target_ratio=1", "loss.target_ratio is .*_ratios"),
        ("-m torchrl_marl run oappo_vmas loss=hapo", "loss=hapo is not a choice; nearest: loss=happo"),
    ],
)
def test_a_misspelt_name_is_answered_without_torch(words: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('Torch is imported')")
    path = os.pathsep.join([str(tmp_path), str(RECIPES.parent)])
    command = [sys.executable, *words.split()]
    told = subprocess.run(command, cwd=RECIPES.parent, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    lines = told.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert re.match(answer, lines[0])
    assert told.returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        "mars_vmas -m loss=mars,mappo seed=0,1 actor.hidden_sizes=[8],[4,4]",
        "mars_vmas -m setting=tuned/balance,tuned/navigation seed=range(3)",
        "mars_vmas setting=mappo/CoordSum-3x10 loss.clip_value=0.1",  # no argument of the recipe's default, MARS
        "oappo_vmas setting=mat/CoordSum-3x10",  # of another recipe, which the full check says
    ],
)
def test_known_names_pass(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, *overrides = words.split()
    monkeypatch.setattr(sys, "argv", [recipe, *overrides])
    check_names(str(RECIPES / f"{recipe}.py"))


def test_every_recipe_checks_names_before_its_imports() -> None:
    for script in RECIPES.glob("*.py"):
        if "@recipe(" in (text := script.read_text()) or " recipe(" in text:
            guard = next(node for node in ast.parse(text).body if isinstance(node, ast.If))
            assert ast.unparse(guard) == "if __name__ == '__main__':\n    check_names(__file__)"
            assert guard.lineno < text[: text.index("torchrl_marl.run import")].count("\n")
