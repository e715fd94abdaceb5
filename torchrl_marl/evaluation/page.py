"""A page of text, tables and figures, written as Markdown and as self-contained HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from torchrl_marl.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page"]


class Page:
    """A page written as ``README.md`` with PNG files and as ``page.html`` with embedded figures.

    Args:
        folder: output folder, created if missing.
        title: title of the page.

    Example:
        >>> import tempfile
        >>> page = Page(Path(tempfile.mkdtemp()) / "page", title="Two rows")
        >>> page.table(["task", "return"], [("a", "1"), ("b", "2")])
        >>> page.write()
        >>> print((page.folder / "README.md").read_text())
        # Two rows
        <BLANKLINE>
        | task | return |
        |:--|--:|
        | a | 1 |
        | b | 2 |
        <BLANKLINE>
    """

    def __init__(self, folder: Path, *, title: str) -> None:
        self.folder = folder
        self._title = title
        self._markdown = [f"# {_one_line(title)}"]
        self._html = [f"<h1>{escape(title)}</h1>"]
        self._figures: dict[str, Figure] = {}

    def heading(self, text: str) -> None:
        """Add a section heading."""
        self._add(f"## {_one_line(text)}", f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self._add(_one_line(text), f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add a code block."""
        self._add(f"```\n{text}\n```", f"<pre>{escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> None:
        """Add a table of text; columns after the first ``text_columns`` are aligned as numbers."""
        classes = [""] * text_columns + [" class=number"] * (len(header) - text_columns)
        rule = "".join("--:|" if number else ":--|" for number in classes)
        markdown, html = [], []
        for tag, row in [("th", header), *(("td", row) for row in rows)]:
            markdown.append("| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in row) + " |")
            cells = (f"<{tag}{name}>{escape(cell)}</{tag}>" for cell, name in zip(row, classes, strict=True))
            html.append(f"<tr>{''.join(cells)}</tr>")
        markdown.insert(1, f"|{rule}")
        table = f"<table><thead>{html[0]}</thead><tbody>{''.join(html[1:])}</tbody></table>"
        self._add("\n".join(markdown), f'<div class="wide">{table}</div>')

    def figure(self, figure: Figure, name: str, text: str) -> None:
        """Add a figure with the name of its PNG file beside the Markdown, and a description."""
        self._figures[name] = figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(text)}">'
        self._add(f"![{_one_line(text)}]({name}.png)", f"<figure>{image}</figure>")

    def write(self) -> None:
        """Write the files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, figure in self._figures.items():
            with replacing(self.folder / f"{name}.png") as path:
                figure.savefig(path, dpi=200)
        template = Template(Path(__file__).with_name("page.html").read_text())
        html = template.substitute(title=escape(self._title), body="\n".join(self._html))
        for name, text in (("README.md", "\n\n".join(self._markdown) + "\n"), ("page.html", html)):
            with replacing(self.folder / name) as path:
                path.write_text(text)

    def _add(self, markdown: str, html: str) -> None:
        self._markdown.append(markdown)
        self._html.append(html)


def _one_line(text: str) -> str:
    """Text as one line of Markdown, with untrusted names of runs escaped against HTML and links."""
    return " ".join(escape(text, quote=False).replace("](", "]\\(").splitlines())
