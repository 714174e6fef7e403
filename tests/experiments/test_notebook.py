"""The notebook equals the page, and a Markdown renderer leaves every formula as it is written."""

import re
from html import unescape

import pytest

jupytext = pytest.importorskip("jupytext", reason="no jupytext")
notebook = pytest.importorskip("experiments.notebook")
TransformerManager = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager
markdown_it = pytest.importorskip("markdown_it")  # which jupytext needs
SAVED = notebook.ROOT / "docs" / "tutorial.ipynb"
PAGES = [notebook.ROOT / "tutorial.md", *sorted((notebook.ROOT / "docs").glob("*.md"))]


def words(text: str) -> str:
    return " ".join(unescape(text).split())


def test_it_is_in_step_with_the_page_and_has_outputs():
    saved = jupytext.read(SAVED)
    sources = [cell.source for cell in notebook.notebook().cells]
    assert [cell.source for cell in saved.cells] == sources, "run python -m experiments.notebook"
    for cell in saved.cells:
        if cell.cell_type == "code" and "print(" in cell.source:
            assert cell.outputs


class Shell:
    """Takes the shell commands of a cell, and leaves out what they do."""

    def __init__(self):
        self.commands = []

    def system(self, command):
        self.commands.append(command.split()[0])

    def run_line_magic(self, name, line):
        self.commands.append(name)


@pytest.mark.parametrize(
    "files, spec, expected",
    [
        ([], None, ["git", "cd", "pip"]),
        (["grassmann.py"], None, ["pip"]),
        (["../grassmann.py"], "there", []),
        (["grassmann/grassmann.py"], "there", []),
    ],
    ids=["hosted", "no packages", "in docs", "hosted, once more"],
)
def test_the_first_cell_fetches_what_is_missing(tmp_path, monkeypatch, files, spec, expected):
    here = tmp_path / "here"
    (here / "grassmann").mkdir(parents=True)
    monkeypatch.chdir(here)
    for file in files:
        (here / file).touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    shell = Shell()
    cell = TransformerManager().transform_cell(notebook.FIRST)
    exec(cell, {"get_ipython": lambda: shell})
    assert shell.commands == expected


def test_it_runs_cell_by_cell():
    """It prints the saved kinds of output (test_documents.py compares the numbers)."""
    ran = notebook.run(notebook.notebook())
    for cell, saved in zip(ran.cells, jupytext.read(SAVED).cells, strict=True):
        if cell.cell_type == "code":
            kinds = [output.output_type for output in saved.outputs]
            assert [output.output_type for output in cell.outputs] == kinds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_formula_is_taken_for_markdown(page):
    r"""GitHub's renderer comes before MathJax: to it, \, is a comma and pairs of _ are emphasis."""
    text = page.read_text("utf-8")
    source = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
    shown = words(re.sub(r"<(code|pre)\b.*?</\1>", "", html, flags=re.DOTALL))
    for formula in re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, re.DOTALL):
        assert words(formula) in shown
