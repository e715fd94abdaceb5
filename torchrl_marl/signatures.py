"""Passing options through functions, reading arguments without an import, and checks of names and values."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

__all__ = [
    "check_at_least_0",
    "check_choice",
    "hands_on_to",
    "nearest",
    "signature",
    "source_arguments",
    "take_options",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def hands_on_to(target: Callable[..., Any]) -> Callable[[Function], Function]:
    """Show a function's ``**options: Unpack[Options]`` in ``inspect.signature`` as arguments of ``target``.

    An option and its default are then defined in ``target`` alone, and configurations can be checked against
    signatures. ``**options: Any`` stands for all keyword-only arguments of ``target``.

    Example:
        >>> from typing_extensions import TypedDict, Unpack
        >>> class Options(TypedDict, total=False):
        ...     width: int
        >>> def build(depth: int, width: int = 64) -> None: ...
        >>> @hands_on_to(build)
        ... def build_flat(**options: Unpack[Options]) -> None:
        ...     build(1, **options)
        >>> inspect.signature(build_flat).parameters["width"].default
        64
    """

    def decorate(function: Function) -> Function:
        declared = inspect.signature(function)
        *own, options = declared.parameters.values()
        theirs = signature(target).parameters
        kind = get_type_hints(function)[options.name]
        keyword_only = [name for name, value in theirs.items() if value.kind is value.KEYWORD_ONLY]
        names = keyword_only if kind is Any else get_type_hints(kind.__args__[0])
        handed_on = [theirs[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        setattr(function, "__signature__", declared.replace(parameters=[*own, *handed_on]))  # noqa: B010
        return function

    return decorate


def signature(target: Callable[..., Any]) -> inspect.Signature:
    """Return ``inspect.signature(target)`` as of Python 3.11.4.

    Older versions read a class that inherits ``__init__`` by an inherited ``__new__``, even one of a more distant base.
    """
    if isinstance(target, type) and not hasattr(target, "__signature__"):
        target = next(base for base in target.__mro__ if {"__init__", "__new__"} & vars(base).keys())
    return inspect.signature(target)


def take_options(options: Any, kind: type) -> dict[str, Any]:
    """Remove and return the options named by a ``TypedDict``.

    Example:
        >>> from typing_extensions import TypedDict
        >>> class Options(TypedDict, total=False):
        ...     width: int
        >>> options = {"width": 64, "depth": 2}
        >>> take_options(options, Options), options
        ({'width': 64}, {'depth': 2})
    """
    return {name: options.pop(name) for name in kind.__annotations__ if name in options}


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that resemble a misspelt one, the most similar first.

    Example:
        >>> nearest("epohcs", ["seed", "epochs"])
        ['epochs']
    """
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Reject a value that is not one of the choices.

    Raises:
        ValueError: with the name, the choices and the value.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}.")


def check_at_least_0(**values: float) -> None:
    """Reject numbers below 0, NaN and infinity.

    Raises:
        ValueError: with the name and the value.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0; got {value}.")


def source_arguments(target: str) -> set[str] | None:
    """Names of the arguments of a function or class, read from its source: nothing is imported.

    Args:
        target: dotted name.

    Returns:
        The names, those of ``**options: Unpack[Options]`` among them; ``None`` if the source alone does not tell them.

    Example:
        >>> sorted(source_arguments("torchrl_marl.signatures.take_options"))
        ['kind', 'options']
    """
    try:
        return _arguments(*_definition(*target.rpartition(".")[::2]))
    except (AttributeError, LookupError, OSError, RecursionError, SyntaxError, ValueError):
        return None


@functools.cache
def _parsed(module: str) -> ast.Module:
    package, *parts = module.split(".")
    file = Path(getattr(importlib.util.find_spec(package), "origin", None) or "")
    for part in parts:
        inner = file.parent / part
        file = inner / "__init__.py" if inner.is_dir() else inner.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition(module: str, name: str) -> tuple[str, ast.stmt]:
    """The statement that defines a name, and its module, through ``from MODULE import NAME``."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _definition(str(node.module), alias.name)
    raise LookupError(name)


def _arguments(module: str, node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                return _arguments(module, part) - {part.args.args[0].arg}
        return _arguments(*_definition(module, ast.unparse(node.bases[0])))
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list")]  # noqa: B009
    if not isinstance(node, ast.FunctionDef) or not all(text.startswith("hands_on_to(") for text in decorators):
        raise LookupError(node)
    names = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    if (options := node.args.kwarg) is None:
        return names
    kind, _, typed = ast.unparse(options.annotation or ast.Constant("")).rstrip("]").partition("[")
    if kind != "Unpack":
        raise LookupError(kind)
    return names | _fields(*_definition(module, typed))


def _fields(module: str, node: ast.stmt) -> set[str]:
    """Names of a ``TypedDict``, inherited ones among them."""
    if not isinstance(node, ast.ClassDef):
        raise LookupError(node)
    names = {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "TypedDict"]
    return names.union(*(_fields(*_definition(module, base)) for base in bases))
