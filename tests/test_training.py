"""Training: AdamW, clipping, the learning rate, batches, dropout, validation, threads, the step."""

import math

import numpy as np
import pytest

import grassmann as G
import training
from training import Training

dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])

# ---- optimiser -----------------------------------------------------------------------------------

def adamw_by_the_formula(theta, gradients, lr, beta_1, beta_2, decay, eps):
    """One number, several steps (Loshchilov and Hutter, algorithm 2)."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
        theta = theta - lr * (m_hat / (math.sqrt(v_hat) + eps) + decay * theta)
    return theta, m, v

@pytest.mark.parametrize("given", [(), ((0.8, 0.95), 0.0, 1e-2)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_adamw_is_the_formula(rng, given, steps):
    """Weights, biases and both means; matrices decay, vectors do not."""
    betas, decay, eps = given or ((0.9, 0.99), 0.1, 1e-8)  # the defaults
    before = {"W": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
    gradients = [{k: rng.standard_normal(p.shape) for k, p in before.items()} for _ in range(steps)]
    params = {name: p.copy() for name, p in before.items()}
    state, same = G.adamw_init(params), dict(params)
    for step, grads in enumerate(gradients):
        G.adamw_step(params, grads, state, step, 0.03, *given)
    for name in params:
        assert params[name] is same[name]
        for place in np.ndindex(params[name].shape):
            history = [g[name][place] for g in gradients]
            expected = adamw_by_the_formula(
                before[name][place], history, 0.03, *betas, decay * (name == "W"), eps)
            got = [a[name][place] for a in (params, state["adam_m"], state["adam_v"])]
            assert got == pytest.approx(expected, rel=1e-12)

@dtypes
@pytest.mark.parametrize("size", [1, 1e-30, 1e30])
@pytest.mark.parametrize(("max_norm", "clipped"), [(5, 5), (13, 13), (20, 13), (1e-3, 1e-3)])
def test_clip_grads(dtype, size, max_norm, clipped):
    """(3, 4) and 12 have together the norm 13; all are scaled alike, in place, or not at all."""
    same = [(size * np.array(g)).astype(dtype) for g in ([[3, 4]], [12, 0])]
    grads = dict(enumerate(same))
    assert G.clip_grads(grads, size * max_norm) == pytest.approx(size * 13, rel=1e-6)
    assert all(g is kept and g.dtype == dtype for g, kept in zip(grads.values(), same, strict=True))
    found = np.concatenate([g.ravel() for g in grads.values()])
    np.testing.assert_allclose(found, size * np.array([3, 4, 12, 0]) * (clipped / 13), rtol=1e-6)

def test_learning_rate():
    """Up in equal steps, the peak right after the warm-up, half a cosine down to min_lr."""
    t = Training(iters=100, lr=1.0, min_lr=0.1, warmup_iters=10)
    up, down = range(1, 11), [0.1 + 0.45 * (1 + math.cos(math.pi * k / 90)) for k in range(91)]
    expected = [*(k / 11 for k in up), *down, 0.1, 0.1]
    np.testing.assert_allclose([t.rate(step) for step in range(103)], expected, rtol=1e-12)
    assert Training(iters=100, lr=2.0, warmup_iters=0).rate(0) == 2.0
    assert Training(iters=200, lr=2.0).rate(200) == pytest.approx(0.2)  # a tenth, unless given
    assert Training(iters=5, lr=1.0, warmup_iters=10).rate(4) == pytest.approx(5 / 11)

# ---- batches, dropout, validation ----------------------------------------------------------------

def test_a_batch_is_windows_of_the_text_drawn_from_seed_and_step():
    text = np.arange(1000) * 3
    x, y = G.get_batch(text, 8, 10, seed=5, step=2)
    assert x.shape == (8, 10) and (np.diff(x) == 3).all() and (y == x + 3).all()
    np.random.seed(0)  # no other state counts
    np.testing.assert_array_equal(x, G.get_batch(text, 8, 10, seed=5, step=2)[0])
    for seed, step in [(5, 3), (6, 2), (2, 5), (4, 3)]:
        assert (x != G.get_batch(text, 8, 10, seed, step)[0]).any()

def test_batches_cover_the_first_and_the_last_window():
    """20 tokens have windows of 6 (with targets) at 0 … 14, drawn equally often; 6 have one."""
    x, _ = G.get_batch(np.arange(20), 3000, 5, seed=1, step=0)
    counts = np.bincount(x[:, 0])
    assert len(counts) == 15 and np.abs(counts - 200).max() < 60  # four standard deviations
    assert (G.get_batch(np.arange(6), 3, 5, 0, 0)[0] == range(5)).all()

def test_dropout_keeps_the_mean(rng):
    """A fraction `rate` becomes 0, the rest is divided by 1 - rate."""
    x = rng.standard_normal((100, 100))
    out, _ = G.dropout_forward(x, 0.3, rng)
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.02)
    np.testing.assert_allclose(out[out != 0], x[out != 0] / 0.7, rtol=1e-6)
    assert G.dropout_forward(x, 0.3, None)[0] is G.dropout_forward(x, 0.0, rng)[0] is x

@pytest.mark.parametrize("length", [2, 5, 10, 19, 20, 28, 29, 400, 8000])
def test_validation_takes_every_target_once(tiny_model, length):
    """Consecutive windows of the context (9), the last as short as it is; their weighted mean."""
    model, text = tiny_model(positions=True), np.random.default_rng(1).integers(0, 11, length)
    total = 0.0
    for start in range(0, length - 1, 9):
        x, y = text[start : min(start + 9, length - 1)], text[start + 1 : start + 10]
        p = np.exp(G.forward(*model, x[None])[0])
        total -= np.log(p[np.arange(len(y)), y] / p.sum(-1)).sum()
    for each in (map, lambda f, items: training.in_threads(f, items, 2)):
        found = G.validation_loss(*model, text, each)
        assert found == pytest.approx(total / (length - 1), rel=1e-12)

# ---- threads -------------------------------------------------------------------------------------

@pytest.mark.parametrize("threads", [0, 1, 2, 3])
@pytest.mark.parametrize("shard_tokens", [1, 20, 4096])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_shards_change_nothing_but_rounding(
        tiny_model, batch, relative_error, monkeypatch, threads, shard_tokens, B):
    """However many threads, and however few texts in each at a time."""
    monkeypatch.setattr(training, "SHARD_TOKENS", shard_tokens)
    model = tiny_model()
    loss, grads = G.loss_and_grads(*model, *batch(B))
    loss_2, grads_2 = training.loss_and_grads(G, *model, *batch(B), None, threads)
    assert loss_2 == pytest.approx(loss, rel=1e-12) and grads_2.keys() == grads.keys()
    for name in grads:
        assert relative_error(grads[name], grads_2[name]) < 1e-12, name

@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_repeat_bit_for_bit(tiny_model, batch, monkeypatch, threads, dtype):
    monkeypatch.setattr(training, "SHARD_TOKENS", 9)
    model = tiny_model(dtype, dropout=0.2)
    results = [training.loss_and_grads(G, *model, *batch(5), (3, 0), threads) for _ in range(5)]
    for loss, grads in results:
        assert loss == results[0][0]
        for name in grads:
            np.testing.assert_array_equal(grads[name], results[0][1][name])

@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1)])  # rows of an even or an odd length
@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_of_a_batch_get_what_the_whole_batch_gets(shape, n):
    """From a usual generator, several arrays one after the other."""
    rng = np.random.default_rng([3, 4, 1])
    arrays = [rng.random((n, *shape), np.float32) for _ in range(4)]
    for parts in range(1, n + 1):
        for rows in np.array_split(np.arange(n), parts):
            own = np.random.default_rng(training.RowsOfBatch([3, 4, 1], int(rows[0]), n))
            for whole in arrays:
                part = own.random((len(rows), *shape), np.float32)
                np.testing.assert_array_equal(part, whole[rows])

@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shard_tokens", [1, 20, 4096])
def test_dropout_does_not_depend_on_threads(
        tiny_model, batch, relative_error, monkeypatch, threads, shard_tokens):
    model = tiny_model(dropout=0.3, d_model=7)
    seed, whole = np.random.default_rng([1, 2, 1]), batch(5)
    loss, grads = G.loss_and_grads(*model, *whole, seed)
    assert loss != G.loss_and_grads(*model, *whole, (1, 2))[0]  # the numbers that draw the batch are others
    monkeypatch.setattr(training, "SHARD_TOKENS", shard_tokens)
    loss_2, grads_2 = training.loss_and_grads(G, *model, *whole, (1, 2), threads)
    assert loss_2 == pytest.approx(loss, rel=1e-12)
    assert max(relative_error(grads[name], grads_2[name]) for name in grads) < 1e-12

def test_threads_draw_different_dropout(tiny_model, batch):
    """The same text twice, on two threads: with equal masks the loss would be that of one text."""
    model = tiny_model(dropout=0.3)
    once, twice = (
        training.loss_and_grads(G, *model, *(np.repeat(a, n, 0) for a in batch(1)), (1, 0), 2)[0]
        for n in (1, 2))
    assert abs(once - twice) > 1e-3

# ---- the step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, {"grad_clip": 0.0}, {"grad_clip": 1e-3, "min_lr": 0.2, "seed": 7}, {"weight_decay": 0.5},
], ids=str)
@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_step_is_rate_gradients_clipping_adamw(tiny_model, batch, changes, step):
    t = Training(**{"iters": 10, "lr": 0.5, "warmup_iters": 2} | changes)
    params, config = tiny_model(dropout=0.2)
    expected, _ = tiny_model()
    optimizer, other_optimizer = G.adamw_init(params), G.adamw_init(expected)
    loss = training.train_step(G, params, config, t, optimizer, step, *batch(4), threads=2)
    other_loss, grads = training.loss_and_grads(G, expected, config, *batch(4), (t.seed, step), 2)
    if t.grad_clip:
        G.clip_grads(grads, t.grad_clip)
    G.adamw_step(expected, grads, other_optimizer, step, t.rate(step), weight_decay=t.weight_decay)
    assert loss == other_loss
    for name in params:
        np.testing.assert_array_equal(params[name], expected[name])
        assert (optimizer["adam_v"][name] == other_optimizer["adam_v"][name]).all()

def test_one_batch_can_be_learned_by_heart(tiny_config, batch, variant):
    config = tiny_config(**variant, positions=True, d_model=16)
    t = Training(iters=200, lr=2e-2, min_lr=2e-2, warmup_iters=0, weight_decay=0.0)
    params = G.init_params(config)
    optimizer = G.adamw_init(params)
    for step in range(t.iters):
        loss = training.train_step(G, params, config, t, optimizer, step, *batch(2))
    assert loss < 0.02
