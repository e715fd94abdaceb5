"""Files that are complete or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, which takes its place in the end; after an error nothing has changed.

    A link in that place is replaced, and what it leads to stays as it is.

    Args:
        path: file to write; the path given for it has the same suffix.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "summary.json"
        >>> with replacing(path) as new:
        ...     _ = new.write_text("{}")
        >>> [file.name for file in path.parent.iterdir()]
        ['summary.json']
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
