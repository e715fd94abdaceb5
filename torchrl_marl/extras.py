"""Packages that only some users need."""

from __future__ import annotations

import contextlib
import importlib
import io
from types import ModuleType

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, without what some packages print and leave redirected.

    Args:
        module: its name.
        extra: the extra of this library that installs it.

    Raises:
        ImportError: if it is not installed, with the command that does.

    Example:
        >>> import_extra("no_such_game", "games")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ImportError: ... (No module named 'no_such_game'): pip install "torchrl_marl[games]"
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        command = f'pip install "torchrl_marl[{extra}]"'
        raise ImportError(f"more packages are needed ({error}): {command}") from error
