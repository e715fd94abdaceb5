"""Atomic file writes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` on success; after an error nothing has changed.

    If ``path`` is a link, the link is replaced and its target stays unchanged.

    Args:
        path: file to write; the temporary path has the same suffix.

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
