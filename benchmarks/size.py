"""Count lines: `python benchmarks/size.py FOLDER ...` prints code (no blanks, comments, docstrings) and all lines."""

import ast
import io
import sys
import tokenize
from pathlib import Path


def code_lines(source: str) -> int:
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docstrings.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


if __name__ == "__main__":
    totals = [0, 0]
    for folder in sys.argv[1:]:
        for path in sorted(Path(folder).rglob("*.py")):
            source = path.read_text()
            counts = code_lines(source), len(source.splitlines())
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            print(f"{counts[0]:6d} {counts[1]:6d}  {path}")
    print(f"{totals[0]:6d} {totals[1]:6d}  total (code, all lines)")
