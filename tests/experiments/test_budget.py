"""Plans for so many seconds: a table, resumed; what makes Muon's steps."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import budget


def test_a_table_and_not_twice(tmp_path, monkeypatch, capsys):
    """On a small model, and by a clock on which every look takes a hundredth of a second."""
    text_file, clock = tmp_path / "text.txt", itertools.count()
    text_file.write_text("abcdefg, hijklmn. " * 400, encoding="utf-8")
    monkeypatch.setattr(budget, "time", SimpleNamespace(process_time=lambda: next(clock) / 100))
    monkeypatch.setattr(budget, "MODEL", {"n_layer": 1, "d_model": 8, "rank": 3, "context": 256, "offsets": ((1, 2),)})
    monkeypatch.setattr(budget, "PLANS", {"plain": {"batch_size": 4}, "Muon": {"muon": True}})
    monkeypatch.setattr(sys, "argv", ["budget", "--data", str(text_file), "--seconds", "1", "--out", str(tmp_path)])
    budget.main()
    table = capsys.readouterr().out
    lines = (tmp_path / "budget.jsonl").read_text("utf-8").splitlines()
    for line, name in zip(lines, ("plain", "Muon"), strict=True):
        run = json.loads(line)
        steps, losses = [row[0] for row in run["found"]], [row[1:] for row in run["found"]]
        assert run["plan"] == name and steps == sorted(steps) and len(steps) == 4 and np.shape(losses) == (4, 3)
        assert losses[-1][0] < losses[0][0] and f"| {name} | 1 | {steps[-1]:,} | " in table
    monkeypatch.setattr(budget, "train", None)  # would be an error
    budget.main()
    assert capsys.readouterr().out == table

def test_the_table_on_the_page_is_that_of_the_results():
    folder = Path(budget.__file__).parent
    runs = [json.loads(line) for line in (folder / "results" / "budget.jsonl").read_text("utf-8").splitlines()]
    rows = "\n".join(budget.row(run["plan"], run["seconds"], run["found"]) for run in runs)
    assert [run["plan"] for run in runs] == [*budget.PLANS] and rows in (folder / "README.md").read_text("utf-8")

@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonal_keeps_the_directions_and_evens_the_lengths(rng, shape):
    M = rng.standard_normal(shape)
    X = budget.orthogonal(M)
    (U, _, V), lengths = np.linalg.svd(M, full_matrices=False), np.linalg.svd(X, compute_uv=False)
    assert 0.5 < lengths.min() <= lengths.max() < 1.3
    core = U.T @ X @ V.T  # diagonal, where X has the singular vectors of M
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-9)
