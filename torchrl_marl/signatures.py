"""Signatures of functions that hand options on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

__all__ = ["hands_on_to"]

Function = TypeVar("Function", bound=Callable[..., Any])


def hands_on_to(target: Callable[..., Any]) -> Callable[[Function], Function]:
    """Show a function's ``**options: Unpack[Options]`` in ``inspect.signature`` as those arguments of ``target``.

    So an option and its default are stated in ``target`` alone, and configurations can be checked against signatures.
    ``**options: Any`` stands for all keyword-only arguments of ``target``.

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
