"""The notebook is the page."""

import pytest

pytest.importorskip("jupytext", reason="no jupytext")
jupytext, notebook = pytest.importorskip("jupytext"), pytest.importorskip("experiments.notebook")
SAVED = notebook.ROOT / "tutorial.ipynb"

def test_it_is_in_step_with_the_page_and_has_outputs():
    saved, made = jupytext.read(SAVED), notebook.notebook()
    assert [(cell.cell_type, cell.source) for cell in saved.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells], "run python -m experiments.notebook"
    printing = [cell for cell in saved.cells if cell.cell_type == "code" and "print(" in cell.source]
    assert len(printing) > 10 and all(cell.outputs for cell in printing)

def test_it_runs_cell_by_cell():
    """And prints what is saved (numbers once more: test_documents.py)."""
    ran = notebook.run(notebook.notebook())
    for cell, saved in zip(ran.cells, jupytext.read(SAVED).cells, strict=True):
        if cell.cell_type == "code":
            assert [out.output_type for out in cell.outputs] == [out.output_type for out in saved.outputs]
