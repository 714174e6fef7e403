"""Solutions of the exercises in docs/exercises.md, in their order."""

import numpy as np
import pytest

import grassmann as G
from charlm import own_layer
from charlm.text import encode, load_text, vocabulary


def test_1_exchanging_the_vectors_changes_every_sign(rng):
    # p_ij(v, u) = v_i u_j - v_j u_i = -(u_i v_j - u_j v_i); for u = v it equals its negative: 0.
    u, v = rng.standard_normal((2, 6))
    assert np.array_equal(G.plucker(u, v), -G.plucker(v, u))
    assert not G.plucker(u, u).any()


def test_2_the_factor_is_the_determinant(rng):
    # (u+v) ∧ (u-v) = u∧u - u∧v + v∧u - v∧v = -2 u∧v, the determinant of (1 1; 1 -1).
    u, v = rng.standard_normal((2, 6))
    assert np.allclose(G.plucker(u + v, u - v), -2 * G.plucker(u, v))


def test_3_the_length_in_three_dimensions(rng):
    # Σ_{i<j} (u_i v_j - u_j v_i)² = Σ_{i≠j} u_i² v_j² - 2 Σ_{i<j} u_i v_j u_j v_i;
    # add and subtract Σ_i u_i² v_i².
    u, v = rng.standard_normal((2, 3))
    p = G.plucker(u, v)
    assert np.isclose(p @ p, (u @ u) * (v @ v) - (u @ v) ** 2)


def test_4_every_bivector_is_a_plane_only_up_to_three_dimensions():
    excess = {}
    for r in range(2, 40):
        coordinates = r * (r - 1) // 2
        excess[r] = coordinates - (2 * (r - 2) + 1)
    assert [r for r in excess if excess[r] == 0] == [2, 3]
    assert excess[32] == 435


@pytest.mark.parametrize("largest", [4, 16])
def test_5_the_receptive_field_is_the_sum_of_the_largest_offsets(tiny_model, largest):
    offsets = (1, 2, 3, largest)
    model = tiny_model(n_layer=4, offsets=(offsets,) * 4, context=80)
    tokens = np.zeros((2, 70), int)
    tokens[1, 0] = 1
    one, other = G.forward(*model, tokens)
    changed = np.abs(one - other).max(-1)
    assert np.flatnonzero(changed)[-1] == 4 * largest


def dot_forward(a, b):
    return G.dot(a, b), (a, b)


def dot_backward(dout, cache):
    """out = Σ_i a_i b_i, so da_i = dout b_i and db_i = dout a_i; dout (..., 1) is stretched."""
    a, b = cache
    return dout * b, dout * a


def test_6_the_backward_of_a_dot_product(rng, check_op):
    a, b = rng.standard_normal((2, 3, 4))
    check_op("exercise 6", dot_forward, dot_backward, a, b)


def rmsnorm_forward(x, w, eps=1e-5):
    sigma = np.sqrt(G.mean(x * x) + eps)
    x_hat = x / sigma
    return w * x_hat, (x_hat, w, sigma)


def rmsnorm_backward(dy, cache):
    """LayerNorm's backward without the path through the mean: (dx̂ - x̂ mean(dx̂ ⊙ x̂)) / σ."""
    x_hat, w, sigma = cache
    dx_hat = dy * w
    dx = (dx_hat - x_hat * G.mean(dx_hat * x_hat)) / sigma
    dw = (dy * x_hat).sum(0)
    return dx, dw


def test_7_rmsnorm(rng, check_op):
    x = rng.standard_normal((3, 5))
    w = rng.standard_normal(5)
    check_op("exercise 7", rmsnorm_forward, rmsnorm_backward, x, w)


def squared_relu_forward(x):
    return np.maximum(x, 0) ** 2, x


def squared_relu_backward(dy, x):
    """max(x, 0)² has the slope 2 max(x, 0), from both sides 0 at 0.

    Only the second derivative jumps there, and the central difference, h / 2, is small.
    """
    return dy * 2 * np.maximum(x, 0)


def test_8_squared_relu(rng, check_op):
    x = rng.standard_normal((4, 5))
    check_op("exercise 8", squared_relu_forward, squared_relu_backward, x)


def test_9_an_average_cannot_tell_its_offsets_apart(rng):
    z = rng.standard_normal((1, 5, 3))
    swapped = z[:, [0, 1, 3, 2, 4]]  # exchange the tokens one and two back from the last
    taps = np.arange(1.0, 7).reshape(2, 3)

    def differs(taps, normalize):
        s, _ = G.partner_forward(z, taps, (1, 2), normalize)
        s_swapped, _ = G.partner_forward(swapped, taps, (1, 2), normalize)
        return not np.allclose(s[0, -1], s_swapped[0, -1])

    assert not differs(None, normalize=False)
    assert not differs(None, normalize=True)
    assert differs(taps, normalize=False)


def streaming_bytes(steps, **how):
    config = G.Config(5, **how)
    params = G.init_params(config)
    _, state = G.stream_read(params, config, G.stream_init(params, config), [1] * steps)
    return sum(a.nbytes for layer in state["past"] for a in layer.values())


def test_10_the_memory_of_a_stream():
    # layers, places, coordinates, bytes
    assert streaming_bytes(10, offsets=((1, 2, 3, 4),) * 4) == 4 * 4 * 32 * 4
    # layers, keys and values, coordinates, bytes: 41 MB after 10,000 characters
    per_token = 4 * 2 * 128 * 4
    assert streaming_bytes(30, mixer="attention") == 30 * per_token


def product_forward(u, v):
    i, j = G.pairs(u.shape[-1])
    return u[..., i] * v[..., j], (u, v)


def product_backward(dp, cache):
    """u_i occurs in p_ij for every j > i with the factor v_j, v_j for every i < j with u_i."""
    u, v = cache
    r = u.shape[-1]
    D = np.zeros((*u.shape, r))
    i, j = G.pairs(r)
    D[..., i, j] = dp
    du = np.einsum("...ij,...j->...i", D, v)
    dv = np.einsum("...ij,...i->...j", D, u)
    return du, dv


def test_11_a_product_without_antisymmetry(rng, check_op):
    u, v, w = rng.standard_normal((3, 2, 4))
    check_op("exercise 11", product_forward, product_backward, u, v)
    p, _ = product_forward(u, v)
    swapped, _ = product_forward(v, u)
    assert not np.allclose(p, -swapped)
    q, _ = product_forward(u, w)
    mixed, _ = product_forward(u, v + 2 * w)
    assert np.allclose(mixed, p + 2 * q)


def test_12_looking_ahead_is_noticed(monkeypatch, tiny_model):
    def ahead(h, w, config, layer, past=None):
        mix, cache = G.mix_forward(h[:, ::-1], w, config, layer)
        return mix[:, ::-1], cache

    tokens = np.arange(8)
    assert own_layer.sees_the_future(*tiny_model(), tokens) == 0
    monkeypatch.setitem(G.MIXERS, "grassmann", (ahead, None, G.mix_shapes))
    assert own_layer.sees_the_future(*tiny_model(), tokens) > 1e-3


wedge_forward = G.plucker_forward
wedge_backward = G.plucker_backward


def unit_vector(u):
    """u/|u| and 1/|u|, both 0 if u is 0."""
    length = np.sqrt(G.dot(u, u))
    inverse = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
    return u * inverse, inverse


def cosine_forward(u, v):
    """p with the cosine as one more coordinate. If a vector is 0, it and its gradients are 0."""
    p, c_wedge = wedge_forward(u, v)
    e, per_u = unit_vector(u)
    f, per_v = unit_vector(v)
    cosine = G.dot(e, f)
    out = np.concatenate([p, cosine], -1)
    return out, (e, per_u, f, per_v, cosine, c_wedge)


def cosine_backward(dout, cache):
    """∂cos/∂u = (v/|v| - cos u/|u|) / |u|.

    This is the part of the unit vector v at right angles to u, divided by |u|.
    """
    e, per_u, f, per_v, cosine, c_wedge = cache
    dp = dout[..., :-1]
    dcosine = dout[..., -1:]
    du, dv = wedge_backward(dp, c_wedge)
    du = du + dcosine * (f - cosine * e) * per_u
    dv = dv + dcosine * (e - cosine * f) * per_v
    return du, dv


def cosine_shapes(config, layer):
    features = config.rank * (config.rank - 1) // 2 + 1
    return G.mix_shapes(config, layer) | {"W_plu": (features, config.d_model)}


def test_13_the_cosine_as_one_more_feature(rng, check_op, monkeypatch):
    u, v = rng.standard_normal((2, 3, 5))
    check_op("exercise 13", cosine_forward, cosine_backward, u, v)
    monkeypatch.setattr(G, "plucker_forward", cosine_forward)
    monkeypatch.setattr(G, "plucker_backward", cosine_backward)
    monkeypatch.setitem(G.MIXERS, "with the cosine", (G.mix_forward, G.mix_backward, cosine_shapes))
    own_layer.check_layer("with the cosine")


def momentum(params, grads, state, step, lr):
    for name, m in state["adam_m"].items():
        m += grads[name] - 0.1 * m  # m ← 0.9 m + g
        params[name] -= lr * m


def loss_after_training(update, lr):
    """Two layers on the first 18,000 characters of Genesis; the loss on the next 2,000."""
    text = load_text("docs/genesis.txt")[:20000]
    vocab = vocabulary(text)
    tokens = encode(text, vocab)
    offsets = ((1, 2), (1, 2, 3, 4))
    config = G.Config(len(vocab), 32, n_layer=2, d_model=32, rank=8, offsets=offsets)
    params = G.init_params(config)
    state = G.adamw_init(params)
    for step in range(200):
        x, y = G.get_batch(tokens[:18000], 16, 32, seed=0, step=step)
        _, grads = G.loss_and_grads(params, config, x, y)
        G.clip_grads(grads, 1.0)
        update(params, grads, state, step, lr)
    return G.validation_loss(params, config, tokens[18000:])


def test_14_momentum_needs_a_larger_learning_rate():
    adamw = loss_after_training(G.adamw_step, 1e-2)  # 1.81 when this was written
    assert loss_after_training(momentum, 0.3) < adamw + 0.4  # 1.98
    assert loss_after_training(momentum, 1e-2) > adamw + 0.6  # 2.54
