"""A page of text, tables and figures, written as Markdown and as HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchrl_marl.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Block", "Code", "Heading", "Paragraph", "Picture", "Table", "write_page"]


@dataclass(frozen=True)
class Heading:
    """A heading of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of plain text; all columns after the first ``text_columns`` are set as numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Picture:
    """A figure; ``name`` is that of its PNG file beside the Markdown, ``text`` says what it shows."""

    figure: Figure
    name: str
    text: str


Block = Heading | Paragraph | Code | Table | Picture


def write_page(folder: Path, *, title: str, blocks: Sequence[Block]) -> None:
    """Write ``README.md`` with its PNG files, and ``page.html`` with its figures inside.

    Args:
        folder: where to; made if need be.
        title: of the page.
        blocks: the page from top to bottom.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_page(folder, title="Two rows", blocks=[Table(["task", "return"], [["a", "1"], ["b", "2"]])])
        >>> print((folder / "README.md").read_text())
        # Two rows
        <BLANKLINE>
        | task | return |
        |:--|--:|
        | a | 1 |
        | b | 2 |
        <BLANKLINE>
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {_escaped(title)}", *(_markdown(block, folder) for block in blocks)]
    with replacing(folder / "README.md") as path:
        path.write_text("\n\n".join(parts) + "\n")
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *map(_html, blocks)])
    with replacing(folder / "page.html") as path:
        path.write_text(_PAGE.format(title=html.escape(title), style=_STYLE, body=body))


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"## {_escaped(text)}"
        case Paragraph(text):
            return _escaped(text)
        case Code(text):
            return f"```\n{text}\n```"
        case Table(header, rows, text_columns):
            rule = ":--|" * text_columns + "--:|" * (len(header) - text_columns)
            cells = [[_escaped(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
            first, *rest = ["| " + " | ".join(row) + " |" for row in cells]
            return "\n".join([first, f"|{rule}", *rest])
        case Picture(figure, name, text):
            with replacing(folder / f"{name}.png") as path:
                figure.savefig(path, dpi=200)
            return f"![{_escaped(text)}]({name}.png)"


def _escaped(text: str) -> str:
    """Text as one line of Markdown in which names of runs, which may be anyone's, are no HTML and no link."""
    return " ".join(html.escape(text, quote=False).replace("](", "]\\(").splitlines())


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(header, rows, text_columns):
            head, *body = [
                _row(row, tag, text_columns) for tag, row in (("th", header), *(("td", row) for row in rows))
            ]
            return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
        case Picture(figure, _, text):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            data = base64.b64encode(buffer.getvalue()).decode()
            return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{html.escape(text)}"></figure>'


def _row(row: Sequence[str], tag: str, text_columns: int) -> str:
    cells = [
        f"<{tag}{'' if column < text_columns else ' class=number'}>{html.escape(cell)}</{tag}>"
        for column, cell in enumerate(row)
    ]
    return f"<tr>{''.join(cells)}</tr>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 56rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; line-height: 1.2 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4 }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600; border-bottom: 1.5px solid #1a1a1a }
td { border-bottom: 1px solid #ddd }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.wide { overflow-x: auto }
figure { margin: 1rem 0 }
img { max-width: 100%; height: auto }
pre { font-size: .8rem; white-space: pre-wrap; background: #f6f6f6; padding: .6rem .8rem }
@page { margin: 15mm }
@media print { body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0 } table { font-size: 7.5pt }
  th, td { padding-right: .6rem; overflow-wrap: anywhere } .number { overflow-wrap: normal }
  figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""
