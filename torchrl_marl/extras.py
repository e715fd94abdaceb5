"""Imports of optional packages and of user code."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torchrl_marl.signatures import nearest

__all__ = ["find_callable", "import_extra", "import_vmas"]


def find_callable(name: str | None, what: str) -> Callable[..., Any]:
    """Import a user's callable; like with ``python -m``, modules in the current folder can be imported.

    Args:
        name: module and callable, such as ``"my_module:make_env"``.
        what: name of the option, for error messages.

    Raises:
        ValueError: if the callable does not exist, with the nearest names.
    """
    match = re.fullmatch(r"([\w.]+):(\w+)", name or "")
    if match is None:
        raise ValueError(f"{what} must be 'module:callable', such as my_module:make_env; got {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(match[1])
    except ModuleNotFoundError as error:
        if not f"{match[1]}.".startswith(f"{error.name}."):
            raise  # the module's own import fails
        raise ValueError(f"there is no module {match[1]!r} in {Path.cwd()}, nor is one installed") from None
    found = getattr(module, match[2], None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        similar = ", ".join(nearest(match[2], known) or known) or "none"
        raise ValueError(f"{match[1]} has no callable {match[2]!r}; it has {similar}")
    return found


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, without the output that the import prints.

    Args:
        module: name of the module.
        extra: extra of this library that installs the package.

    Raises:
        ImportError: if the package is not installed, with the installation command.

    Example:
        >>> import_extra("no_such_game", "games")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ImportError: ... (No module named 'no_such_game'): pip install "torchrl_marl[games]"
    """
    try:
        # Log handlers created during the import keep a reference to the current standard error.
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
