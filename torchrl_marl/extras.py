"""Packages that only some users need."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from types import ModuleType

__all__ = ["import_extra", "import_vmas"]


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package; what it prints is dropped, and output goes where it went before.

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
        # Handlers of loggers, which packages make as they are imported, keep the standard error that they find.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stderr):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        command = f'pip install "torchrl_marl[{extra}]"'
        raise ImportError(f"more packages are needed ({error}): {command}") from error


def import_vmas() -> ModuleType:
    """Import VMAS without the end-of-life notice that gym, which VMAS still depends on, prints.

    Returns:
        The module ``vmas``.

    Raises:
        ImportError: if VMAS is not installed.

    Example:
        >>> import_vmas().__name__
        'vmas'
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return import_extra("vmas", "vmas")
