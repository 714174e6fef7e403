"""Training: AdamW, clipping, the learning rate, batches, dropout, validation, threads, the step."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import grassmann as G
from charlm import training
from charlm.training import Training

ROOT = Path(__file__).resolve().parent.parent


def adamw_written_out(theta, m, v, g, t, betas, decay, eps):
    """Loshchilov and Hutter, algorithm 2, at the learning rate 0.03; t counts from 1."""
    beta_1, beta_2 = betas
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    m_hat = m / (1 - beta_1**t)
    v_hat = v / (1 - beta_2**t)
    direction = m_hat / (np.sqrt(v_hat) + eps) + decay * theta
    return theta - 0.03 * direction, m, v


@pytest.mark.parametrize("given", [(), ((0.8, 0.95), 0.0, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 3), (3,)], ids=["matrix", "vector"])
def test_adamw_is_the_formula(rng, given, shape):
    """Matrices decay, vectors do not. Everything changes in place."""
    betas, decay, eps = given or ((0.9, 0.99), 0.1, 1e-8)  # the defaults
    if len(shape) == 1:
        decay = 0
    theta = rng.standard_normal(shape)
    params = {"W": theta}
    state = G.adamw_init(params)
    expected = (theta.copy(), 0, 0)
    for t in range(1, 6):
        g = rng.standard_normal(shape)
        expected = adamw_written_out(*expected, g, t, betas, decay, eps)
        G.adamw_step(params, {"W": g}, state, t - 1, 0.03, *given)
        found = (theta, state["adam_m"]["W"], state["adam_v"]["W"])
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


CLIPPED = [  # size of the gradients, largest norm, norm after
    (1, 5, 5),
    (1, 20, 13),
    (1e-30, 5, 5),
    (1e30, 20, 13),
]


@pytest.mark.parametrize(("size", "most", "after"), CLIPPED)
def test_clip_grads(size, most, after):
    """(3, 4) and (12, 0) together have the norm 13. One factor scales all, in place."""
    W = np.float32([[3, 4]]) * size
    b = np.float32([12, 0]) * size
    grads = {"W": W, "b": b}
    norm = G.clip_grads(grads, size * most)
    assert norm == pytest.approx(size * 13, rel=1e-6)
    assert grads["W"] is W
    assert W.dtype == np.float32
    factor = size * after / 13
    expected = factor * np.array([3, 4, 12, 0])
    np.testing.assert_allclose([*W[0], *b], expected, rtol=1e-6)


def test_learning_rate_rises_and_falls():
    """Equal steps up, the peak right after the warm-up, then half a cosine down to min_lr."""
    t = Training(iters=100, lr=1.0, min_lr=0.1, warmup_iters=10)
    rates = [t.rate(step) for step in range(103)]
    up = np.arange(1, 11) / 11
    half_turn = np.linspace(0, math.pi, 91)
    down = 0.1 + 0.45 * (1 + np.cos(half_turn))
    np.testing.assert_allclose(rates[:10], up, rtol=1e-12)
    np.testing.assert_allclose(rates[10:101], down, rtol=1e-12)
    np.testing.assert_allclose(rates[101:], 0.1, rtol=1e-12)


def test_learning_rate_ends_at_a_tenth_unless_given():
    assert Training(iters=200, lr=2.0).rate(200) == pytest.approx(0.2)


MULTIPLES = np.arange(20) * 3


def test_a_batch_is_windows_of_the_text():
    x, y = G.get_batch(MULTIPLES, 3000, 5, seed=5, step=2)
    assert x.shape == (3000, 5)
    assert (np.diff(x) == 3).all()
    assert (y == x + 3).all()


OTHERS = [
    (5, 3),
    (6, 2),
    (2, 5),
    (4, 3),  # the same sum
]


@pytest.mark.parametrize(("seed", "step"), OTHERS)
def test_another_seed_or_step_draws_another_batch(seed, step):
    x, _ = G.get_batch(MULTIPLES, 3000, 5, seed=5, step=2)
    other, _ = G.get_batch(MULTIPLES, 3000, 5, seed, step)
    assert not np.array_equal(x, other)


def test_a_text_of_one_window_is_enough():
    x, _ = G.get_batch(np.arange(6), 3, 5, 0, 0)
    assert (x == range(5)).all()
    with pytest.raises(G.UserError, match="5 tokens are too few: a context of 5 needs 6"):
        G.get_batch(np.arange(5), 3, 5, 0, 0)


def test_dropout_keeps_the_mean(rng):
    """A fraction `rate` becomes 0, the rest is divided by 1 - rate."""
    x = rng.standard_normal((100, 100))
    out, _ = G.dropout_forward(x, 0.3, G.draw_rows(0))
    dropped = out == 0
    assert dropped.mean() == pytest.approx(0.3, abs=0.02)
    np.testing.assert_allclose(out[~dropped], x[~dropped] / 0.7, rtol=1e-6)


@pytest.mark.parametrize("length", [2, 10, 20, 29, 2000])
def test_validation_takes_every_target_once(tiny_model, length):
    """Consecutive windows of the context (9), the last one shorter, and their weighted mean."""
    model = tiny_model(positions=True)
    text = np.random.default_rng(1).integers(0, 11, length)
    total = 0.0
    for start in range(0, length - 1, 9):
        window = text[None, start : start + 10]
        y = window[:, 1:]
        loss, _ = G.loss_and_grads(*model, window[:, :-1], y)
        total += y.size * loss
    two_threads = partial(training.in_threads, threads=2)
    found = G.validation_loss(*model, text, two_threads)
    assert found == pytest.approx(total / (length - 1), rel=1e-12)


def test_validation_of_a_text_without_a_target_is_refused(tiny_model):
    with pytest.raises(G.UserError, match="at least 2 tokens, not 1"):
        G.validation_loss(*tiny_model(), np.array([1]))


SHARDS = [  # rows, tokens in a shard
    (1, 1),
    (5, 1),
    (5, 20),
    (5, 4096),
]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize(("B", "shard_tokens"), SHARDS)
def test_shards_and_threads_change_nothing_but_rounding(
    tiny_model, batch, relative_error, monkeypatch, threads, B, shard_tokens
):
    """The masks are those of the whole batch. The same number of threads gives the same bits."""
    monkeypatch.setattr(training, "SHARD_TOKENS", shard_tokens)
    model = tiny_model(dropout=0.3, d_model=7)
    x, y = batch(B)
    loss, grads = G.loss_and_grads(*model, x, y, (1, 2, 1))
    loss_2, grads_2 = training.loss_and_grads(G, *model, x, y, (1, 2), threads)
    loss_3, grads_3 = training.loss_and_grads(G, *model, x, y, (1, 2), threads)
    assert loss_2 == pytest.approx(loss, rel=1e-12)
    assert loss_2 == loss_3
    for name, g in grads.items():
        assert relative_error(g, grads_2[name]) < 1e-12
        np.testing.assert_array_equal(grads_2[name], grads_3[name])


@pytest.fixture
def text(rng):
    return rng.integers(0, 11, 200)


USUAL = {
    "iters": 10,
    "lr": 0.5,
    "warmup_iters": 2,
    "batch_size": 4,
    "weight_decay": 0.5,
}
CHANGES = [
    {},
    {"grad_clip": 0.0},
    {"grad_clip": 1e-3, "min_lr": 0.2, "seed": 7},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("step", [0, 9])
def test_a_step_is_batch_gradients_clipping_rate_adamw(tiny_model, text, changes, step):
    t = Training(**USUAL | changes)
    params, config = tiny_model(dropout=0.2)
    optimizer = G.adamw_init(params)
    loss, norm = training.train_step(G, params, config, t, optimizer, step, text, threads=2)

    expected, _ = tiny_model()
    other = G.adamw_init(expected)
    x, y = G.get_batch(text, t.batch_size, config.context, t.seed, step)
    seed = (t.seed, step)
    other_loss, grads = training.loss_and_grads(G, expected, config, x, y, seed, threads=2)
    other_norm = G.clip_grads(grads, t.grad_clip or math.inf)
    G.adamw_step(expected, grads, other, step, t.rate(step), weight_decay=t.weight_decay)
    assert loss == other_loss
    assert norm == other_norm
    for name in params:
        np.testing.assert_array_equal(params[name], expected[name])
        np.testing.assert_array_equal(optimizer["adam_v"][name], other["adam_v"][name])


def test_a_module_may_have_a_step_of_its_own(tiny_model, text):
    own = SimpleNamespace(train_step=lambda *args: args)
    params, config = tiny_model()
    given = (params, config, Training(), {}, 3, text)
    assert training.train_step(own, *given) == (given, None)


WRONG = [
    ("lr must be 0 or more and finite, not -1", {"lr": -1}),
    ("lr must be", {"lr": math.nan}),
    ("min_lr, 0.2, is higher than lr, 0.1", {"lr": 0.1, "min_lr": 0.2}),
    ("lr must be 0 or more and finite, not None", {"lr": None}),
    ("seed must be", {"seed": 2.5}),
    ("iters must be 1 or more and whole", {"iters": 0}),
]


@pytest.mark.parametrize(("rule", "changes"), WRONG, ids=str)
def test_wrong_settings_get_a_sentence(rule, changes):
    with pytest.raises(G.UserError, match=rule):
        Training(**changes)


def test_a_negative_number_of_threads_gets_a_sentence(tiny_model, batch):
    with pytest.raises(G.UserError, match="threads must be 1 or more"):
        training.loss_and_grads(G, *tiny_model(), *batch(2), None, -1)


FORKED = """
for item in in_threads(abs, range(4), 2): pass
if os.fork() == 0:
    signal.alarm(20)
    for item in in_threads(abs, range(4), 2): pass
    os._exit(0)
sys.exit(os.wait()[1] != 0)
"""
NESTED = """
def some(n): return sum(in_threads(abs, range(n), 2))
assert [*in_threads(some, range(5), 2)] == [0, 0, 1, 3, 6]
"""


@pytest.mark.parametrize("code", [FORKED, NESTED], ids=["in a fork", "in a thread"])
def test_threads_start_wherever_they_are_asked_for(code):
    """In a process of their own, which an alarm ends if they wait forever."""
    begin = "import os, signal, sys\nfrom charlm.training import in_threads\nsignal.alarm(20)"
    run = subprocess.run([sys.executable, "-c", begin + code], cwd=ROOT)
    assert run.returncode == 0


def test_gradients_of_another_shape_are_refused(tiny_model):
    """They are broadcast otherwise, as from a layer that returns db.sum()."""
    params, _ = tiny_model()
    grads = {name: np.ones_like(a) for name, a in params.items()} | {"ln_f.b": np.ones(1)}
    with pytest.raises(G.UserError, match=r"ln_f\.b"):
        G.adamw_step(params, grads, G.adamw_init(params), 0, 0.1)


@pytest.mark.parametrize("most", [0, -1])
def test_a_norm_that_is_not_positive_is_refused(most):
    with pytest.raises(G.UserError, match="max_norm"):
        G.clip_grads({"W": np.ones(3)}, most)
