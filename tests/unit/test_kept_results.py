"""Every figure of README and benchmarks.md comes from a result in docs/results, and every result there is cited."""

import json
import re
from pathlib import Path

import pytest

from scripts.kept import RESULTS, ROOT
from scripts.results_table import MARK, PAGES, TABLES, freshened, made, with_tables

CITING = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NO_PROSE = re.compile(r"^```.*?^```|^\|.*?$|`[^`\n]*`|\]\([^)]*\)", re.M | re.S)
FIGURE = re.compile(r"(?<![\w./:-])(?<!Python )\d+(?:\.\d+| %)(?!\.?[\w/-])")
NO_RESULT = {"95 %"}  # of the intervals
OF_RESULTS_ONLY = PAGES[:2]  # README.md and benchmarks.md: what a controller does has numbers of its own


def loose_figures(text: str) -> list[str]:
    """Figures that stand in no table made of results: in a table of another kind, or in a sentence and in none."""
    tables = "\n".join(mark[0] for mark in MARK.finditer(text))
    other = MARK.sub("", text)
    rows = [row for row in re.findall(r"^\|.*$", re.sub(r"`[^`\n]*`", "", other), re.M) if FIGURE.search(row)]
    figures = [figure for figure in FIGURE.findall(NO_PROSE.sub("", other)) if figure not in NO_RESULT]
    return rows + [figure for figure in figures if figure not in FIGURE.findall(tables)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    assert len(MARK.findall(page.read_text())) >= 1
    assert freshened(page) == page.read_text(), "python -m scripts.results_table"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_is_without_a_row(page):
    for name in MARK.findall(page.read_text()):
        assert made(name, Path("results")), f"{page.name}: no result of table {name} is kept"


def test_the_readme_has_one_short_table():
    assert MARK.findall(PAGES[0].read_text()) == ["readme"]
    assert sum(len(rows.loads) for rows in TABLES["readme"].rows) <= 6


def test_benchmarks_are_short():
    assert len((ROOT / "docs" / "benchmarks.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", OF_RESULTS_ONLY, ids=lambda page: page.name)
def test_no_figure_comes_from_elsewhere(page):
    assert loose_figures(page.read_text()) == []


def test_a_planted_figure_is_seen():
    page = PAGES[0].read_text()
    assert loose_figures(page + "\nIt takes 0.0123 of the time, or 7 % of it.\n") == ["0.0123", "7 %"]
    assert loose_figures(page + "\n| a | b |\n|---|---|\n| c | 0.0123 |\n") == ["| c | 0.0123 |"]
    figure = FIGURE.findall(MARK.search(page)[0])[0]
    assert loose_figures(page + f"\nPython 3.11, {figure} of the time, `0.0123`, 95 %.\n") == []


def test_a_table_that_was_changed_by_hand_is_made_anew():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    forged = re.sub(r"\d\.\d\d \(", "0.01 (", text)
    assert forged != text and with_tables(forged, Path("results")) == text


def test_every_kept_result_is_cited_by_a_page():
    cited = "\n".join(page.read_text() for page in CITING)
    assert [path.name for path in sorted(RESULTS.iterdir()) if path.name not in cited] == []


def test_every_result_that_a_page_cites_is_kept():
    for page in CITING:
        for name in re.findall(r"\]\(([^)#]*results/[^)]+)\)", page.read_text()):
            assert (page.parent / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_result_can_be_read_and_says_how_it_was_made(path):
    assert json.loads(path.read_text())["command"].startswith(("apparate-llm ", "python -m scripts."))


def test_every_decision_is_listed_and_has_all_parts():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(
        r"^\| \[(\d+)\]\((\S+)\) \| (.+?) \| (yes|no|in part) \|$", (folder / "README.md").read_text(), re.M
    )
    assert [name for _, name, _, _ in listed] == sorted(path.name for path in folder.glob("0*.md"))
    for number, name, title, kept in listed:
        text = (folder / name).read_text()
        outcome = {"yes": "Kept", "no": "Not kept", "in part": "Kept in part"}[kept]
        assert text.startswith(f"# {number} {title}\n\n*{outcome}.*\n\n") and 100 <= len(text.split()) <= 150
        assert re.findall(r"^- \*\*(\w+)\*\*:", text, re.M) == ["Question", "Change", "Command", "Result", "Kept"]
