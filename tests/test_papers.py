"""docs/papers.md: every item of the four papers has a row, every row an answer, and what a row names exists."""

import re

import pytest

from tests.recipes.runs import RECIPES

ROOT = RECIPES.parent
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in (ROOT / "docs/papers.md").read_text().splitlines()
    if re.match(r"\| (MARS|MARPO|MAGPO|OAPPO) \|", line)
]
KINDS = {"method", "baseline", "theorem", "setting", "task", "metric", "figure"}


def test_no_row_is_empty_and_each_paper_has_every_kind_of_item() -> None:
    assert all(len(row) == 4 and all(row) for row in ROWS)
    assert len({(paper, item) for paper, item, *_ in ROWS}) == len(ROWS)
    assert {(row[0], row[2]) for row in ROWS} == {(p, k) for p in ("MARS", "MARPO", "MAGPO", "OAPPO") for k in KINDS}


@pytest.mark.parametrize("answer", sorted({row[3] for row in ROWS if "`" in row[3]}))
def test_what_a_row_names_exists(answer: str) -> None:
    for test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", answer):
        assert f"def {test[1]}" in (ROOT / test[0]).read_text()
    for script in re.findall(r"`(?:benchmarks/)?(\w+\.py)\b", answer):
        folder = ROOT / "benchmarks" if script in ("study.py", "iteration.py") else RECIPES
        assert (folder / script).exists()
    for group, choice in re.findall(r"\b(loss|env|actor|critic|guider|experiment|setting)=([\w/]+)", answer):
        file = RECIPES / "config" / group / f"{choice.partition('/')[0]}.yaml"
        assert file.exists(), file
