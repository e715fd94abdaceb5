"""Compiled functions: in one piece, kept between runs, and uncompiled where a compiler is missing or fails."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.compiler import skip_all_guards_unsafe

__all__ = ["GUARDLESS_OPTIONS", "INDUCTOR_OPTIONS", "compile_whole", "keep_compiled_code", "or_uncompiled"]

INDUCTOR_OPTIONS: dict[str, Any] = {
    "fallback_random": True,  # Torch's generators, as uncompiled, rather than numbers of its own
    "cpp.use_decompose_tanh": True,  # by exp, to 1e-7: a third of the time of a rollout on a CPU went into tanh
}
GUARDLESS_OPTIONS: dict[str, Any] = {  # for small functions whose caller checks what guards would
    **INDUCTOR_OPTIONS,
    "guard_filter_fn": skip_all_guards_unsafe,
    "cpp_wrapper": not torch.cuda.is_available(),  # a Python wrapper takes a tenth of a small step
}


def keep_compiled_code() -> None:
    """Keep compiled code in the user's cache folder, where later runs find it, unless the environment names a folder.

    Inductor's own default is a temporary folder, which a restart of the machine may empty.
    """
    folder = Path(torch.hub.get_dir()).parent / "inductor"  # below TORCH_HOME, XDG_CACHE_HOME or ~/.cache
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_whole(function: FunctionType, *, backend: bool | str = True, **options: Any) -> Callable[..., Any]:
    """Compile a function in one piece, without Python between its operations, for arguments of constant shapes.

    The code is a copy of the function's, since Dynamo keeps graphs by code: no other one, such as that of a later run
    in the same process, must find them, nor count towards Dynamo's limit of graphs.

    Args:
        function: what to compile.
        backend: of ``torch.compile``; ``True`` for Inductor, without which the function runs uncompiled.
        **options: of the backend.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    if backend is not True:
        return torch.compile(own, fullgraph=True, dynamic=False, backend=str(backend), options=options)
    return or_uncompiled(torch.compile(own, fullgraph=True, dynamic=False, options=options), function)


def or_uncompiled(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``compiled`` until it cannot be compiled, and from then on ``plain``, with one warning in a process."""
    chosen = compiled

    def run(*arguments: Any) -> Any:
        nonlocal chosen
        if chosen is plain:
            return plain(*arguments)
        try:
            return compiled(*arguments)
        except TorchDynamoException as error:  # before anything has run
            result = plain(*arguments)  # which raises what is the function's own mistake
            chosen = plain
            _warn(str(error))
            return result

    return run


def _warn(reason: str) -> None:
    hint = f"what failed: {' '.join(reason.split())[:300]}"
    if any(sign in reason for sign in ("InvalidCxxCompiler", "Python.h")):
        hint = "it needs a C++ compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev)"
    text = f"Compiling failed, so this goes on uncompiled, slower but right: {hint}. compile=false leaves it out."
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)


_warned: set[str] = set()
