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
    text_file, clock, rates, adamw_step = tmp_path / "text.txt", itertools.count(), [], budget.G.adamw_step
    decays = []
    text_file.write_text("abcdefg, hijklmn. " * 400, encoding="utf-8")
    monkeypatch.setattr(budget, "time", SimpleNamespace(process_time=lambda: next(clock) / 100))
    monkeypatch.setattr(budget.G, "adamw_step", lambda *args, weight_decay: (
        rates.append(args[-1]), decays.append(weight_decay), adamw_step(*args, weight_decay=weight_decay)))
    monkeypatch.setattr(budget, "MODEL", {"n_layer": 1, "d_model": 8, "rank": 3, "context": 256, "offsets": ((1, 2),)})
    seeds, loss_and_grads, lr = [], budget.G.loss_and_grads, budget.HOW["lr"]
    monkeypatch.setattr(budget.G, "loss_and_grads", lambda *args: seeds.append(args[-1]) or loss_and_grads(*args))
    monkeypatch.setattr(budget, "PLANS", {"plain": {"batch_size": 4, "undropped": 0.5}, "Muon": {"muon": True, "decay": 0.3}})
    monkeypatch.setattr(sys, "argv", ["budget", "--data", str(text_file), "--seconds", "1", "--out", str(tmp_path)])
    budget.main()
    table = capsys.readouterr().out
    lines = (tmp_path / "budget.jsonl").read_text("utf-8").splitlines()
    for line, name in zip(lines, ("plain", "Muon"), strict=True):
        run = json.loads(line)
        steps, losses = [row[0] for row in run["found"]], [row[1:] for row in run["found"]]
        assert run["settings"]["muon"] == (name == "Muon") and np.shape(losses) == (4, 3)
        np.testing.assert_allclose(steps, [25, 50, 75, 100], rtol=0.08)  # quarters of the time (it looks between them, too)
        rate, rates = rates[: steps[-1]], rates[steps[-1] :]
        assert {*decays[: steps[-1]]} == {0.1 if name == "plain" else 0.3}
        decays = decays[steps[-1] :]
        assert 0.9 < max(rate) / lr <= 1 and rate.index(max(rate)) < 5 and rate[-1] < 0.003 * max(rate)
        assert rate[steps[1]] == pytest.approx(lr / 2, rel=0.1)  # half a cosine
        dropped, seeds = [seed is not None for seed in seeds[: steps[-1]]], seeds[steps[-1] :]
        assert sum(dropped) == steps[-1] - (steps[1] if name == "plain" else 0) and dropped == sorted(dropped)
        assert losses[-1][0] < losses[0][0] and f"| {name} | 0.00 | 1 | {steps[-1]:,} | " in table
    monkeypatch.setattr(budget, "train", None)  # would be an error
    budget.main()
    assert capsys.readouterr().out == table
    budget.PLANS["plain"]["lr"] = 1e-3
    with pytest.raises(TypeError):  # another plan under the same name is run
        budget.main()

def test_a_plan_starts_as_the_comparison_does(monkeypatch):
    """Features of learned planes are products of two vectors: with weights of 0.02 they would be next to nothing."""
    first = {}
    monkeypatch.setattr(budget.G, "adamw_init", lambda params: first.update(params) or {})
    clock = itertools.count(step=10**6)
    monkeypatch.setattr(budget, "time", SimpleNamespace(process_time=lambda: next(clock)))
    monkeypatch.setattr(budget.G, "validation_loss", lambda *_: 0.0)
    plan = budget.settings("learned planes")
    config = budget.Config(65, **{k: v for k, v in plan.items() if k not in budget.HOW})
    budget.train(plan, config, np.arange(100))
    assert first["blocks.0.mix.X"].std() == pytest.approx((0.2 / 64) ** 0.5, rel=0.02)

@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_noise_exchanges_characters_of_what_is_read_alone(monkeypatch, noise):
    seen, text, clock = [], np.arange(2000) % 7, itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(process_time=lambda: next(clock) / 10))
    monkeypatch.setattr(budget.G, "loss_and_grads", lambda params, config, x, y, seed: (
        seen.append((x, y)), (0.0, {name: np.zeros_like(p) for name, p in params.items()}))[1])
    plan = budget.settings("short", 1) | {"noise": noise}
    budget.train(plan, budget.Config(7, context=256, n_layer=1, d_model=4, rank=2, offsets=((1,),)), text)
    for step, (x, y) in enumerate(seen):
        clean, targets = budget.G.get_batch(text[:1900], 4, 256, 0, step)
        assert (y == targets).all() and np.mean(x != clean) == pytest.approx(noise * 6 / 7, abs=0.06)

def test_the_table_on_the_page_is_that_of_the_results():
    folder = Path(budget.__file__).parent
    runs = [json.loads(line) for line in (folder / "results" / "budget.jsonl").read_text("utf-8").splitlines()]
    assert [run["settings"] for run in runs] == [json.loads(json.dumps(budget.settings(name))) for name in budget.PLANS]
    rows = "\n".join(map(budget.row, budget.PLANS, runs))
    assert rows in (folder / "README.md").read_text("utf-8")

@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonal_keeps_the_directions_and_evens_the_lengths(rng, shape):
    U, _, V = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    core = U.T @ budget.orthogonal(U * np.geomspace(1, 0.02, min(shape)) @ V) @ V.T
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-9)  # the singular vectors are the same
    assert 0.6 < np.diag(core).min() <= np.diag(core).max() < 1.3

def test_muon_on_the_matrices_of_blocks_and_adamw_on_all_else(rng):
    params = {name: rng.standard_normal((3, 5)) for name in ("E", "blocks.0.W", "blocks.0.taps")}
    grads, lr = {name: rng.standard_normal((3, 5)) for name in params}, 0.1
    before, others = ({name: p.copy() for name, p in params.items()} for _ in range(2))
    state = budget.G.adamw_init(params)
    m = state["adam_m"]["blocks.0.W"] = rng.standard_normal((3, 5))
    mean = 0.95 * m + 0.05 * grads["blocks.0.W"]  # of the gradients, which looks ahead once more in a step
    budget.muon_step(params, grads, state, 0, lr)
    budget.G.adamw_step(others, grads, budget.G.adamw_init(others), 0, lr)
    step = 0.2 * 5**0.5 * budget.orthogonal(0.95 * mean + 0.05 * grads["blocks.0.W"])
    others["blocks.0.W"] = before["blocks.0.W"] * (1 - lr * 0.1) - lr * step
    for name in params:
        np.testing.assert_allclose(params[name], others[name], rtol=1e-5)
