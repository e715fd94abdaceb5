"""Passing options through functions, and checks of names and values."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

__all__ = ["check_at_least_0", "check_choice", "hands_on_to", "nearest", "take_options"]

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
        signature = inspect.signature(function)
        *own, options = signature.parameters.values()
        theirs = inspect.signature(target).parameters
        kind = get_type_hints(function)[options.name]
        keyword_only = [name for name, value in theirs.items() if value.kind is value.KEYWORD_ONLY]
        names = keyword_only if kind is Any else get_type_hints(kind.__args__[0])
        handed_on = [theirs[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        setattr(function, "__signature__", signature.replace(parameters=[*own, *handed_on]))  # noqa: B010
        return function

    return decorate


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
