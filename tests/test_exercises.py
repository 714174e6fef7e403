"""Solutions of the exercises in docs/exercises.md, in their order."""

import numpy as np

import grassmann as G
from charlm import own_layer
from charlm.text import encode, load_text, vocabulary


def test_1_exchanging_the_vectors_changes_every_sign(rng):
    # p_ij(v, u) = v_i u_j - v_j u_i = -(u_i v_j - u_j v_i); for u = v it equals its negative: 0.
    u, v = rng.standard_normal((2, 6))
    assert np.array_equal(G.plucker(u, v), -G.plucker(v, u)) and not G.plucker(u, u).any()


def test_2_the_factor_is_the_determinant(rng):
    # (u+v) ∧ (u-v) = u∧u - u∧v + v∧u - v∧v = -2 u∧v, the determinant of (1 1; 1 -1).
    u, v = rng.standard_normal((2, 6))
    assert np.allclose(G.plucker(u + v, u - v), -2 * G.plucker(u, v))


def test_3_the_length_in_three_dimensions(rng):
    # Σ_{i<j} (u_i v_j - u_j v_i)² = Σ_{i≠j} u_i² v_j² - 2 Σ_{i<j} u_i v_j u_j v_i; add and subtract Σ_i u_i² v_i².
    u, v = rng.standard_normal((2, 3))
    assert np.isclose((G.plucker(u, v) ** 2).sum(), (u @ u) * (v @ v) - (u @ v) ** 2)


def test_4_every_bivector_is_a_plane_only_up_to_three_dimensions():
    excess = {r: r * (r - 1) // 2 - (2 * (r - 2) + 1) for r in range(2, 40)}
    assert [r for r in excess if excess[r] == 0] == [2, 3] and excess[32] == 435


def test_5_the_receptive_field_is_the_sum_of_the_largest_offsets(tiny_model):
    for offsets, reach in (((1, 2, 3, 4), 16), ((1, 2, 3, 16), 64)):  # as many taps
        tokens = np.zeros((2, 70), int)
        tokens[1, 0] = 1
        one, other = G.forward(*tiny_model(n_layer=4, offsets=(offsets,) * 4, context=80), tokens)
        assert np.flatnonzero(np.abs(one - other).max(-1))[-1] == reach


def test_6_the_backward_of_a_dot_product(rng, check_op):
    # out = Σ_i a_i b_i, so da_i = dout b_i and db_i = dout a_i; dout (..., 1) is stretched over i.
    forward, backward = lambda a, b: (G.dot(a, b), (a, b)), lambda d, c: (d * c[1], d * c[0])
    check_op("exercise 6", forward, backward, *rng.standard_normal((2, 3, 4)))


def rmsnorm_forward(x, w, eps=1e-5):
    sigma = np.sqrt(G.mean(x * x) + eps)
    return w * x / sigma, (x / sigma, w, sigma)


def rmsnorm_backward(dy, cache):
    """LayerNorm's backward without the path through the mean: dx = (dx̂ - x̂ mean(dx̂ ⊙ x̂)) / σ."""
    x_hat, w, sigma = cache
    return (dy * w - x_hat * G.mean(dy * w * x_hat)) / sigma, (dy * x_hat).sum(0)


def test_7_rmsnorm(rng, check_op):
    check_op(
        "exercise 7",
        rmsnorm_forward,
        rmsnorm_backward,
        rng.standard_normal((3, 5)),
        rng.standard_normal(5),
    )


def test_8_squared_relu(rng, check_op):
    # max(x, 0)² has the slope 2 max(x, 0), from both sides 0 at 0: only the second derivative
    # jumps there, and the central difference, h / 2, is small.
    forward, backward = lambda x: (np.maximum(x, 0) ** 2, x), lambda d, x: d * 2 * np.maximum(x, 0)
    check_op("exercise 8", forward, backward, rng.standard_normal((4, 5)))


def test_9_an_average_cannot_tell_its_offsets_apart(rng):
    z, taps = rng.standard_normal((1, 5, 3)), np.array([[1.0, 2, 3], [4, 5, 6]])
    swapped = z[:, [0, 1, 3, 2, 4]]  # exchange the tokens one and two back from the last
    for weights, normalize, same in ((None, False, True), (None, True, True), (taps, False, False)):
        s, s_swapped = (
            G.partner_forward(x, weights, (1, 2), normalize)[0][0, -1] for x in (z, swapped)
        )
        assert np.allclose(s, s_swapped) is same


def test_10_the_memory_of_a_stream():
    for steps, how, held in (
        (
            10,
            {"offsets": ((1, 2, 3, 4),) * 4},
            4 * 4 * 32 * 4,
        ),  # layers, places, coordinates, bytes
        (30, {"mixer": "attention"}, 30 * 4 * 2 * 128 * 4),
    ):  # keys and values: 41 MB after 10,000 characters
        config = G.Config(5, **how)
        params = G.init_params(config)
        _, state = G.stream_read(params, config, G.stream_init(params, config), [1] * steps)
        assert held == sum(a.nbytes for layer in state["past"] for a in layer.values())


def product_forward(u, v):
    i, j = G.pairs(u.shape[-1])
    return u[..., i] * v[..., j], (u, v)


def product_backward(dp, cache):
    """u_i occurs in p_ij for every j > i with the factor v_j, v_j for every i < j with u_i."""
    u, v = cache
    i, j = G.pairs(u.shape[-1])
    D = np.zeros((*u.shape, u.shape[-1]))
    D[..., i, j] = dp
    return np.einsum("...ij,...j->...i", D, v), np.einsum("...ij,...i->...j", D, u)


def test_11_a_product_without_antisymmetry(rng, check_op):
    u, v, w = rng.standard_normal((3, 2, 4))
    check_op("exercise 11", product_forward, product_backward, u, v)
    p, swapped = product_forward(u, v)[0], product_forward(v, u)[0]
    assert not np.allclose(p, -swapped)
    assert np.allclose(product_forward(u, v + 2 * w)[0], p + 2 * product_forward(u, w)[0])


def test_12_looking_ahead_is_noticed(monkeypatch, tiny_model):
    def ahead(h, w, config, layer, past=None):
        mix, cache = G.mix_forward(h[:, ::-1], w, config, layer)
        return mix[:, ::-1], cache

    assert own_layer.sees_the_future(*tiny_model(), np.arange(8)) == 0
    monkeypatch.setitem(G.MIXERS, "grassmann", (ahead, None, G.mix_shapes))
    assert own_layer.sees_the_future(*tiny_model(), np.arange(8)) > 1e-3


wedge_forward, wedge_backward = G.plucker_forward, G.plucker_backward


def cosine_forward(u, v):
    """p with the cosine as one more coordinate. It is 0 if a vector is 0, and so are its gradients."""
    p, cache = wedge_forward(u, v)
    lengths = np.sqrt([G.dot(u, u), G.dot(v, v)])
    per_u, per_v = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosine = G.dot(u * per_u, v * per_v)
    return np.concatenate([p, cosine], -1), (u * per_u, per_u, v * per_v, per_v, cosine, cache)


def cosine_backward(dout, cache):
    """∂cos/∂u = (v/|v| - cos u/|u|) / |u|: the part of the unit vector v at right angles to u, divided by |u|."""
    e, per_u, f, per_v, cosine, cache = cache
    (du, dv), d = wedge_backward(dout[..., :-1], cache), dout[..., -1:]
    return du + d * (f - cosine * e) * per_u, dv + d * (e - cosine * f) * per_v


def cosine_shapes(config, layer):
    return G.mix_shapes(config, layer) | {
        "W_plu": (config.rank * (config.rank - 1) // 2 + 1, config.d_model)
    }


def test_13_the_cosine_as_one_more_feature(rng, check_op, monkeypatch):
    check_op("exercise 13", cosine_forward, cosine_backward, *rng.standard_normal((2, 3, 5)))
    monkeypatch.setattr(G, "plucker_forward", cosine_forward)
    monkeypatch.setattr(G, "plucker_backward", cosine_backward)
    monkeypatch.setitem(G.MIXERS, "with the cosine", (G.mix_forward, G.mix_backward, cosine_shapes))
    own_layer.check_layer("with the cosine")


def test_14_momentum_needs_a_larger_learning_rate():
    text = load_text("docs/genesis.txt")[:20000]
    tokens, config = (
        encode(text, vocabulary(text)),
        G.Config(len(set(text)), 32, 2, 32, 8, ((1, 2), (1, 2, 3, 4))),
    )

    def momentum(params, grads, state, step, lr):
        for name, m in state["adam_m"].items():
            m += grads[name] - 0.1 * m  # m ← 0.9 m + g
            params[name] -= lr * m

    def train(lr, update):
        params = G.init_params(config)
        state = G.adamw_init(params)
        for step in range(200):
            _, grads = G.loss_and_grads(
                params, config, *G.get_batch(tokens[:18000], 16, 32, seed=0, step=step)
            )
            G.clip_grads(grads, 1.0)
            update(params, grads, state, step, lr)
        return G.validation_loss(params, config, tokens[18000:])

    with_adamw = train(1e-2, G.adamw_step)
    assert train(0.3, momentum) < with_adamw + 0.4  # 1.98 against 1.81 when this was written
    assert train(1e-2, momentum) > with_adamw + 0.6  # at AdamW's own rate: 2.54
