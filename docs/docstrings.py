"""Extension of griffe: docstrings are written for `help()` and Sphinx's roles; the site reads Markdown."""

import re
from typing import Any

import griffe


def to_markdown(docstring: str) -> str:
    """Turn roles into links, tables of ``=`` signs into blocks, and name the section of examples."""
    text = re.sub(r":(?:class|func|meth|mod|attr|obj):`~?([\w.]+)`", _link, docstring)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"(?:^ *=+(?: +=+)+\n(?:.+\n)+?)+(?=\n|\Z)", _block, text + "\n", flags=re.MULTILINE)


def _link(role: re.Match[str]) -> str:
    path = role[1]
    name = path.rpartition(".")[2]
    return f"[`{name}`][{path}]" if path.startswith("torchrl_marl.") else f"`{path}`"


def _block(table: re.Match[str]) -> str:
    return "```text\n" + table[0] + "```\n"


class Markdown(griffe.Extension):
    """Rewrite every docstring as it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = to_markdown(obj.docstring.value)
