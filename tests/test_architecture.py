"""Imports point down: keys <- modules, envs <- objectives, evaluation <- collectors <- what surrounds them."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks.size import code_lines

PACKAGE = Path(__file__).parents[1] / "torchrl_marl"
LEVELS = [
    {"compilation", "keys", "files", "extras", "signatures", "distributed", "trust"},
    {"modules", "envs"},
    {"objectives", "evaluation"},
    {"collectors"},
    {"run", "checkpoints", "commands", "export", "shelf", "__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
# Code lines of each room. A commit that raises one says why.
BUDGETS = {
    **{"objectives": 2_200, "objectives/value": 302, "modules": 1_892, "collectors": 539, "run": 1_844},
    **{"envs": 1_140, "envs/games": 1_141, "envs/wrappers": 1_222, "evaluation": 742},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports from, wherever in the file it does."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("torchrl_marl.")}
    return rooms - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = LEVEL[room_of(path)]
    upward = {room for room in imported_rooms(path) if LEVEL[room] > own}
    beside = {room for room in imported_rooms(path) if LEVEL[room] == own and 0 < own < len(LEVELS) - 1}
    assert not upward | beside


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in names.items():
        body = ast.parse(path.read_text()).body  # what is imported when the module is, not within functions
        graph[name] = {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module in names}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for following in graph[name]:
                visit(following, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_longer_than_sixty_lines_without_its_docstring(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_names_no_recipe(path: Path) -> None:
    """Scripts build on the package; words such as ``seeds`` and ``compare`` are its own, too.

    The command line is a script itself: ``torchrl-marl train`` is short for one of the recipes.
    """
    if path.stem == "__main__":
        pytest.skip("a script")
    stems = [script.stem for script in (PACKAGE.parent / "recipes").glob("*.py")]
    names = {f"{stem}.py" for stem in stems} | {stem for stem in stems if "_" in stem}
    assert not names & set(re.findall(r"\w+\.py\b|\w+", path.read_text()))


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_keeps_to_its_budget(room: str) -> None:
    inner = [PACKAGE / other for other in BUDGETS if other.startswith(f"{room}/")]
    files = [path for path in (PACKAGE / room).rglob("*.py") if not any(path.is_relative_to(part) for part in inner)]
    assert files
    assert sum(code_lines(path.read_text()) for path in files) <= BUDGETS[room]


def test_the_budgets_cover_every_room() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in FILES if len(path.relative_to(PACKAGE).parts) > 1}
    assert rooms - {room.partition("/")[0] for room in BUDGETS} == set()
