"""Training: AdamW, clipping, the learning rate, batches, dropout, validation, threads, the step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

import grassmann as G
from charlm import training
from charlm.training import Training


@pytest.mark.parametrize("given", [(), ((0.8, 0.95), 0.0, 1e-2)])
def test_adamw_is_the_formula(rng, given):
    """Loshchilov and Hutter, algorithm 2, written out for five steps; matrices decay, vectors do not."""
    (beta_1, beta_2), decay, eps = given or ((0.9, 0.99), 0.1, 1e-8)  # the defaults
    params = {"W": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
    state, same = G.adamw_init(params), list(params.values())
    expected = {name: (theta.copy(), 0.0, 0.0) for name, theta in params.items()}
    for t in range(1, 6):
        grads = {name: rng.standard_normal(theta.shape) for name, theta in params.items()}
        G.adamw_step(params, grads, state, t - 1, 0.03, *given)
        for name, (theta, m, v) in expected.items():
            m, v = (
                beta_1 * m + (1 - beta_1) * grads[name],
                beta_2 * v + (1 - beta_2) * grads[name] ** 2,
            )
            m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
            theta = theta - 0.03 * (m_hat / (np.sqrt(v_hat) + eps) + decay * (name == "W") * theta)
            expected[name] = theta, m, v
            for found, value in zip(
                (params, state["adam_m"], state["adam_v"]), expected[name], strict=True
            ):
                np.testing.assert_allclose(found[name], value, rtol=1e-12)
    assert params["W"] is same[0] and params["b"] is same[1]


@pytest.mark.parametrize(
    ("size", "max_norm", "clipped"), [(1, 5, 5), (1, 20, 13), (1e-30, 5, 5), (1e30, 20, 13)]
)
def test_clip_grads(size, max_norm, clipped):
    """(3, 4) and (12, 0) together have the norm 13. All are scaled by one factor, in place, or not at all."""
    same = [np.float32([[3, 4]]) * size, np.float32([12, 0]) * size]
    grads = dict(enumerate(same))
    assert G.clip_grads(grads, size * max_norm) == pytest.approx(size * 13, rel=1e-6)
    assert all(
        g is kept and g.dtype == np.float32 for g, kept in zip(grads.values(), same, strict=True)
    )
    found = np.concatenate([g.ravel() for g in same])
    np.testing.assert_allclose(found, size * np.array([3, 4, 12, 0]) * (clipped / 13), rtol=1e-6)


def test_learning_rate():
    """Equal steps up, the peak right after the warm-up, then half a cosine down to min_lr."""
    t = Training(iters=100, lr=1.0, min_lr=0.1, warmup_iters=10)
    up, down = range(1, 11), [0.1 + 0.45 * (1 + math.cos(math.pi * k / 90)) for k in range(91)]
    expected = [*(k / 11 for k in up), *down, 0.1, 0.1]
    np.testing.assert_allclose([t.rate(step) for step in range(103)], expected, rtol=1e-12)
    assert Training(iters=100, lr=2.0, warmup_iters=0).rate(0) == 2.0
    assert Training(iters=200, lr=2.0).rate(200) == pytest.approx(0.2)  # a tenth, unless given


def test_a_batch_is_windows_of_the_text_drawn_from_seed_and_step():
    """In 20 tokens, windows of 6 (with targets) start at 0 … 14, equally often. 6 tokens have one window, 5 none."""
    x, y = G.get_batch(np.arange(20) * 3, 3000, 5, seed=5, step=2)
    assert x.shape == (3000, 5) and (np.diff(x) == 3).all() and (y == x + 3).all()
    counts = np.bincount(x[:, 0] // 3)
    assert len(counts) == 15 and np.abs(counts - 200).max() < 60  # four standard deviations
    for seed, step in [(5, 3), (6, 2), (2, 5), (4, 3)]:
        assert (x != G.get_batch(np.arange(20) * 3, 3000, 5, seed, step)[0]).any()
    assert (G.get_batch(np.arange(6), 3, 5, 0, 0)[0] == range(5)).all()
    with pytest.raises(G.UserError, match="5 tokens are too few: a context of 5 needs 6"):
        G.get_batch(np.arange(5), 3, 5, 0, 0)


def test_dropout_keeps_the_mean(rng):
    """A fraction `rate` becomes 0, the rest is divided by 1 - rate."""
    x = rng.standard_normal((100, 100))
    out, _ = G.dropout_forward(x, 0.3, G.draw_rows(0))
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.02)
    np.testing.assert_allclose(out[out != 0], x[out != 0] / 0.7, rtol=1e-6)
    assert G.dropout_forward(x, 0.3, None)[0] is G.dropout_forward(x, 0.0, G.draw_rows(0))[0] is x


@pytest.mark.parametrize("length", [2, 10, 20, 29, 2000])
def test_validation_takes_every_target_once(tiny_model, length):
    """Consecutive windows of the context (9), the last one shorter, and their weighted mean."""
    model, text = tiny_model(positions=True), np.random.default_rng(1).integers(0, 11, length)
    total = 0.0
    for start in range(0, length - 1, 9):
        x, y = text[None, start : min(start + 9, length - 1)], text[None, start + 1 : start + 10]
        total += y.size * G.loss_and_grads(*model, x, y)[0]
    found = G.validation_loss(*model, text, lambda f, items: training.in_threads(f, items, 2))
    assert found == pytest.approx(total / (length - 1), rel=1e-12)
    with pytest.raises(G.UserError, match="at least 2 tokens, not 1"):
        G.validation_loss(*model, text[:1])


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize(("B", "shard_tokens"), [(1, 1), (1, 4096), (5, 1), (5, 20), (5, 4096)])
def test_shards_and_threads_change_nothing_but_rounding(
    tiny_model, batch, relative_error, monkeypatch, threads, B, shard_tokens
):
    """The masks are those of the whole batch. With the same number of threads, results repeat bit for bit."""
    monkeypatch.setattr(training, "SHARD_TOKENS", shard_tokens)
    model = tiny_model(dropout=0.3, d_model=7)
    loss, grads = G.loss_and_grads(*model, *batch(B), (1, 2, 1))
    assert (
        loss != G.loss_and_grads(*model, *batch(B), (1, 2))[0]
    )  # the batch is drawn with other numbers
    loss_2, grads_2 = training.loss_and_grads(G, *model, *batch(B), (1, 2), threads)
    assert loss_2 == pytest.approx(loss, rel=1e-12)
    assert max(relative_error(grads[name], grads_2[name]) for name in grads) < 1e-12
    loss_3, grads_3 = training.loss_and_grads(G, *model, *batch(B), (1, 2), threads)
    assert loss_2 == loss_3 and all(map(np.array_equal, grads_2.values(), grads_3.values()))


@pytest.mark.parametrize(
    "changes", [{}, {"grad_clip": 0.0}, {"grad_clip": 1e-3, "min_lr": 0.2, "seed": 7}], ids=str
)
@pytest.mark.parametrize("step", [0, 9])
def test_a_step_is_batch_rate_gradients_clipping_adamw(tiny_model, changes, step):
    t = Training(
        **{"iters": 10, "lr": 0.5, "warmup_iters": 2, "batch_size": 4, "weight_decay": 0.5}
        | changes
    )
    params, config = tiny_model(dropout=0.2)
    expected, _ = tiny_model()
    optimizer, other_optimizer = G.adamw_init(params), G.adamw_init(expected)
    text = np.random.default_rng(1).integers(0, 11, 200)
    loss = training.train_step(G, params, config, t, optimizer, step, text, threads=2)
    batch = G.get_batch(text, 4, 9, t.seed, step)
    other_loss, grads = training.loss_and_grads(G, expected, config, *batch, (t.seed, step), 2)
    if t.grad_clip:
        G.clip_grads(grads, t.grad_clip)
    G.adamw_step(expected, grads, other_optimizer, step, t.rate(step), weight_decay=t.weight_decay)
    assert loss == other_loss
    for name in params:
        np.testing.assert_array_equal(params[name], expected[name])
        np.testing.assert_array_equal(optimizer["adam_v"][name], other_optimizer["adam_v"][name])
    own = SimpleNamespace(train_step=lambda *args: args)  # a module's own train_step is used
    assert training.train_step(own, params, config, t, optimizer, 3, text) == (
        params,
        config,
        t,
        optimizer,
        3,
        text,
    )


def test_wrong_settings_get_a_sentence(tiny_model, batch):
    for rule, changes in (
        ("lr must be 0 or more and finite, not -1", {"lr": -1}),
        ("lr must be", {"lr": math.nan}),
        ("lr must be 0 or more and finite, not None", {"lr": None}),
        ("seed must be", {"seed": 2.5}),
        ("iters must be 1 or more and whole", {"iters": 0}),
    ):
        with pytest.raises(G.UserError, match=rule):
            Training(**changes)
    with pytest.raises(G.UserError, match="threads must be 1 or more"):
        training.loss_and_grads(G, *tiny_model(), *batch(2), None, -1)
