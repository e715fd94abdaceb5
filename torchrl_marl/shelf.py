"""What is part of the package, listed and used from anywhere: recipes and trained policies."""

from __future__ import annotations

import ast
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrl_marl.signatures import nearest

__all__ = [
    "copy_recipe",
    "print_recipes",
    "recipe_command",
    "recipes_folder",
    "run_recipe",
    "zoo_policies",
    "zoo_policy",
]

_ZOO = Path(__file__).parent / "zoo"


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside an installed package, beside it in a clone."""
    package = Path(__file__).parent
    return next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())


def recipe_command(name: str) -> list[str]:
    """Return the words that run a recipe: its script in a clone, the console command of an installed package."""
    in_clone = recipes_folder().parent != Path(__file__).parent
    return ["python", f"recipes/{name}.py"] if in_clone else ["torchrl-marl", "run", name]


def print_recipes() -> None:
    """Print every recipe with the first line of its docstring, and the choices of each configuration group."""
    for path in _scripts():
        print(f"{path.stem:14}{(ast.get_docstring(ast.parse(path.read_text())) or '').splitlines()[0]}")
    for group in sorted(path for path in (recipes_folder() / "config").iterdir() if path.is_dir()):
        choices = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        if choices:
            print(f"\n{group.name}=  {choices}")


def copy_recipe(name: str, destination: Path) -> list[Path]:
    """Copy a recipe with its local imports and the configuration for editing.

    Args:
        name: name of a recipe, see :func:`print_recipes`.
        destination: folder, created if missing.

    Returns:
        The copied scripts.

    Raises:
        FileExistsError: if a file already exists; nothing is written then.
        ValueError: if the recipe is unknown.
    """
    scripts, waiting = [], [_script(name)]
    while waiting:
        scripts.append(script := waiting.pop())
        imported = {node.module for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)}
        waiting += [path for path in _scripts() if path.stem in imported and path not in scripts]
    targets = [destination / script.name for script in scripts]
    for target in (*targets, destination / "config"):
        if target.exists():
            raise FileExistsError(f"{target} exists already: name another folder, or move it away.")
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copytree(recipes_folder() / "config", destination / "config")
    for script, target in zip(scripts, targets, strict=True):
        shutil.copyfile(script, target)
    return targets


def run_recipe(name: str, arguments: Sequence[str]) -> None:
    """Run a recipe in this process like ``python NAME.py ARGUMENTS``, with imports from the current folder.

    Raises:
        SystemExit: if the recipe is unknown, with the nearest names.
    """
    try:
        script = _script(name)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    sys.path[:0] = [str(script.parent), str(Path.cwd())]
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def zoo_policies() -> dict[str, Path]:
    """Return the checkpoints of trained policies that come with the package, by name: ``TASK/METHOD``."""
    return {path.relative_to(_ZOO).with_suffix("").as_posix(): path for path in sorted(_ZOO.rglob("*.torchrl"))}


def zoo_policy(name: str) -> Path:
    """Return the checkpoint of one of them.

    Raises:
        ValueError: if there is none of that name, with the nearest.
    """
    return _find(name, zoo_policies(), f"The zoo has no {name}", " torchrl-marl zoo lists them.")


def _scripts() -> list[Path]:
    """Recipes, without scripts that only point to their replacement."""
    scripts = sorted(recipes_folder().glob("*.py"))
    return [script for script in scripts if not script.read_text().startswith('"""Moved')]


def _script(name: str) -> Path:
    return _find(name.removesuffix(".py"), {path.stem: path for path in _scripts()}, f"There is no recipe {name}")


def _find(name: str, known: Mapping[str, Path], missing: str, hint: str = "") -> Path:
    """Return what goes by a name, or raise a ``ValueError`` with the nearest names."""
    if name not in known:
        similar = ", ".join(nearest(name, known) or sorted(known))
        raise ValueError(f"{missing}; nearest: {similar}.{hint}")
    return known[name]
