"""AdamW, gradient clipping, the learning rate and the batches."""

import math

import numpy as np
import pytest

from grassmann import adamw_init, adamw_step, clip_grads, get_batch, learning_rate

# ---- AdamW --------------------------------------------------------------------------------------------


def adamw_by_the_formula(theta, gradients, lr, beta_1, beta_2, decay, eps):
    """One number, several steps (Loshchilov and Hutter, algorithm 2)."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
        theta = theta - lr * (m_hat / (math.sqrt(v_hat) + eps) + decay * theta)
    return theta, m, v


@pytest.mark.parametrize(("betas", "decay", "eps"), [((0.9, 0.99), 0.1, 1e-8), ((0.8, 0.95), 0.0, 1e-2)])
def test_adamw_is_the_formula(rng, betas, decay, eps):
    """Weights, biases and both means after 1, 2, 5 steps; matrices decay, vectors do not."""
    for steps in [1, 2, 5]:
        params = {"W": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
        gradients = [{name: rng.standard_normal(p.shape) for name, p in params.items()} for _ in range(steps)]
        state, before = adamw_init(params), {name: p.copy() for name, p in params.items()}
        for step, grads in enumerate(gradients):
            adamw_step(params, grads, state, step, 0.03, betas, decay, eps)
        for name, theta in params.items():
            for place in np.ndindex(theta.shape):
                expected = adamw_by_the_formula(
                    before[name][place], [g[name][place] for g in gradients], 0.03, *betas, decay * (name == "W"), eps
                )
                got = theta[place], state["adam_m"][name][place], state["adam_v"][name][place]
                assert got == pytest.approx(expected, rel=1e-12)


def test_the_default_constants(rng):
    """betas 0.9 and 0.99, decay 0.1, eps 1e-8."""
    theta, g = rng.standard_normal((2, 2)), rng.standard_normal((3, 2, 2))
    params = {"W": theta.copy()}
    state = adamw_init(params)
    for step in range(3):
        adamw_step(params, {"W": g[step]}, state, step, 0.01)
    for place in np.ndindex(2, 2):
        expected = adamw_by_the_formula(theta[place], g[(slice(None), *place)], 0.01, 0.9, 0.99, 0.1, 1e-8)
        assert params["W"][place] == pytest.approx(expected[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adamw_works_in_place_and_keeps_the_dtype(dtype):
    params = {"W": np.ones((2, 2), dtype), "b": np.ones(2, dtype)}
    state, grads = adamw_init(params), {"W": np.full((2, 2), 0.5, dtype), "b": np.full(2, 0.5, dtype)}
    same = dict(params)
    adamw_step(params, grads, state, 0, 0.1)
    for name in params:
        assert params[name] is same[name]
        assert params[name].dtype == state["adam_m"][name].dtype == state["adam_v"][name].dtype == dtype
        np.testing.assert_array_equal(grads[name], 0.5)


def test_a_gradient_of_zero_only_decays():
    params = {"W": np.ones((2, 2)), "b": np.ones(2)}
    adamw_step(params, {"W": np.zeros((2, 2)), "b": np.zeros(2)}, adamw_init(params), 0, 0.5, weight_decay=0.1)
    np.testing.assert_allclose(params["W"], 0.95, rtol=1e-15)
    np.testing.assert_array_equal(params["b"], 1)


# ---- clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("max_norm", "clipped"), [(5.0, 5.0), (13.0, 13.0), (20.0, 13.0), (1e-3, 1e-3)])
def test_clip_grads(dtype, max_norm, clipped):
    """(3, 4) and 12 have together the norm 13; all are scaled by the same factor, or not at all."""
    grads = {"a": np.array([[3.0, 4.0]], dtype), "b": np.array([12.0], dtype)}
    same = dict(grads)
    assert clip_grads(grads, max_norm) == pytest.approx(13.0, rel=1e-6)
    for name, before in [("a", [[3.0, 4.0]]), ("b", [12.0])]:
        assert grads[name] is same[name]
        assert grads[name].dtype == dtype
        np.testing.assert_allclose(grads[name], np.array(before) * (clipped / 13), rtol=1e-6)


def test_clip_grads_leaves_zero_alone():
    grads = {"a": np.zeros((2, 3), np.float32)}
    assert clip_grads(grads, 1.0) == 0.0
    np.testing.assert_array_equal(grads["a"], 0)


# ---- learning rate ------------------------------------------------------------------------------------


def test_learning_rate():
    """Up in equal steps, the peak right after the warm-up, half a cosine down, min_lr at the end and beyond."""
    rates = [learning_rate(step, 100, 1.0, 0.1, 10) for step in range(101)]
    np.testing.assert_allclose(rates[:11], np.arange(1, 12) / 11, rtol=1e-12)
    assert rates[10] == max(rates) == 1.0
    assert rates[55] == pytest.approx(0.55)  # half-way down
    assert rates[32] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))
    assert rates[100] == pytest.approx(0.1, rel=1e-12)
    assert (np.diff(rates[10:]) < 0).all()
    for step in [101, 145, 1000]:
        assert learning_rate(step, 100, 1.0, 0.1, 10) == pytest.approx(0.1, rel=1e-12)


def test_learning_rate_without_warm_up_and_with_nothing_else():
    assert learning_rate(0, 100, 1.0, 0.1, 0) == 1.0
    rates = [learning_rate(step, 5, 1.0, 0.1, 10) for step in range(5)]
    np.testing.assert_allclose(rates, np.arange(1, 6) / 11, rtol=1e-12)
    assert 0.1 <= learning_rate(10, 10, 1.0, 0.1, 10) <= 1.0
    assert learning_rate(0, 1, 0.5, 0.5, 0) == 0.5


# ---- batches ------------------------------------------------------------------------------------------


def test_a_batch_is_windows_of_the_text_and_the_same_one_later():
    text = np.arange(100) * 3
    x, y = get_batch(text, 8, 10, seed=5, step=2)
    assert x.shape == y.shape == (8, 10)
    np.testing.assert_array_equal(y, x + 3)
    np.testing.assert_array_equal(np.diff(x), 3)
    assert len(set(x[:, 0].tolist())) > 4


def test_a_batch_depends_on_seed_and_step_alone():
    text = np.arange(1000)
    x, _ = get_batch(text, 8, 10, seed=5, step=2)
    np.random.seed(0)
    np.random.rand()
    np.testing.assert_array_equal(x, get_batch(text, 8, 10, seed=5, step=2)[0])
    for seed, step in [(5, 3), (6, 2), (2, 5)]:
        assert not np.array_equal(x, get_batch(text, 8, 10, seed, step)[0])


def test_batches_cover_the_first_and_the_last_window():
    """20 tokens have windows of 6 (with their targets) at 0 … 14, and all are drawn equally often."""
    starts = np.concatenate([get_batch(np.arange(20), 30, 5, 1, step)[0][:, 0] for step in range(100)])
    counts = np.bincount(starts)
    assert len(counts) == 15
    assert np.abs(counts - 200).max() < 60  # four standard deviations


def test_the_shortest_text_has_one_window():
    x, y = get_batch(np.arange(6), 3, 5, 0, 0)
    np.testing.assert_array_equal(x, [range(5)] * 3)
    np.testing.assert_array_equal(y, [range(1, 6)] * 3)
