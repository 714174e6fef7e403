"""The notebook equals the page, and a Markdown renderer leaves every formula as it is written."""

import re
from html import unescape

import pytest

jupytext = pytest.importorskip("jupytext", reason="no jupytext")
notebook = pytest.importorskip("experiments.notebook")
markdown_it = pytest.importorskip("markdown_it")  # which jupytext needs
SAVED = notebook.ROOT / "docs" / "tutorial.ipynb"
PAGES = [notebook.ROOT / "tutorial.md", *sorted((notebook.ROOT / "docs").glob("*.md"))]


def words(text: str) -> str:
    return " ".join(unescape(text).split())


def test_it_is_in_step_with_the_page_and_has_outputs():
    saved, made = jupytext.read(SAVED), notebook.notebook()
    assert [(cell.cell_type, cell.source) for cell in saved.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], "run python -m experiments.notebook"
    printing = [
        cell for cell in saved.cells if cell.cell_type == "code" and "print(" in cell.source
    ]
    assert len(printing) > 10 and all(cell.outputs for cell in printing)


def test_it_runs_cell_by_cell():
    """It prints the saved kinds of output (test_documents.py compares the numbers)."""
    ran = notebook.run(notebook.notebook())
    for cell, saved in zip(ran.cells, jupytext.read(SAVED).cells, strict=True):
        if cell.cell_type == "code":
            assert [out.output_type for out in cell.outputs] == [
                out.output_type for out in saved.outputs
            ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_formula_is_taken_for_markdown(page):
    r"""GitHub's renderer comes before MathJax: to it, \, is a comma and pairs of _ are emphasis."""
    source = re.sub(
        r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, re.DOTALL)
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(page.read_text("utf-8"))
    shown = words(re.sub(r"<(code|pre)\b.*?</\1>", "", html, flags=re.DOTALL))
    assert formulas and [formula for formula in formulas if words(formula) not in shown] == []
