"""Extreme inputs: where the exact result fits into float32, the float32 result is finite and right.

The exact result is that of float64, on the same (float32) inputs. How right float32 can be depends on the
inputs: a difference of nearly equal numbers has few correct digits, however it is computed. So the result in
float64 is compared with those of inputs changed at random in their last float32 digit: an error of the size of
that spread is fair, and so is one of the last digit of the result, or of the largest term of the sum that
gives it (`terms`).
"""

import numpy as np
import pytest
from finite_differences import ordinary_params, tiny_config

import grassmann
from grassmann import adamw_init, adamw_step, clip_grads, cross_entropy_forward, forward, generate, loss_and_grads

EPS = np.finfo(np.float32).eps
LARGEST = np.finfo(np.float32).max
UNDERFLOW = 1e-37  # a few of float32's smallest normal number


@pytest.fixture(autouse=True)
def strict():
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield


def draw(rng, size, *shape):
    """Random float32 numbers of this size; "mixed": of all sizes from 1e-15 to 1e15."""
    x = rng.standard_normal(shape)
    if size == "mixed":
        x = np.sign(x) * 10 ** rng.uniform(-15, 15, shape)
        size = 1
    return (size * x).astype(np.float32)


def check(function, inputs, terms=None):
    """function(*inputs) -> arrays, in float32 as in float64."""
    rng, wide = np.random.default_rng(0), [x.astype(np.float64) for x in inputs]
    exact = function(*wide)
    around = [function(*(x * (1 + EPS * rng.uniform(-1, 1, x.shape)) for x in wide)) for _ in range(8)]
    terms = terms(*wide) if terms else [0] * len(exact)
    for k, got in enumerate(function(*inputs)):
        assert got.dtype == np.float32
        spread = np.max([np.abs(other[k] - exact[k]) for other in around], axis=0)
        tolerance = 16 * spread + 16 * EPS * np.maximum(np.abs(exact[k]), terms[k]) + UNDERFLOW
        fits = np.abs(exact[k]) + tolerance < LARGEST
        error = np.abs(np.where(fits, got - exact[k], 0))
        assert (error <= tolerance).all(), f"output {k}: {got[error > tolerance]} is not {exact[k][error > tolerance]}"


def both_ways(name, *other):
    """The op and its backward as one function: (*inputs, dout) -> [out, *gradients]."""
    op_forward, op_backward = getattr(grassmann, f"{name}_forward"), getattr(grassmann, f"{name}_backward")

    def function(*inputs):
        *inputs, dout = [x.copy() for x in inputs]
        out, cache = op_forward(*inputs, *other)
        grads = op_backward(dout, cache)
        return [out, *(grads if isinstance(grads, tuple) else [grads])]

    return function


def test_the_comparison_itself_notices_wrong_results(rng):
    """An error of 1e-4, a NaN, an infinity, in float32 alone."""
    inputs = [draw(rng, 1, 4, 5), draw(rng, 1, 5, 3), draw(rng, 1, 3), draw(rng, 1, 4, 3)]
    right = both_ways("linear")
    check(right, inputs)
    for factor in np.float32([1 + 1e-4, np.nan, np.inf]):

        def wrong(x, *others, factor=factor):
            return [out * factor if x.dtype == np.float32 else out for out in right(x, *others)]

        with pytest.raises(AssertionError):
            check(wrong, inputs)


PRODUCT_SIZES = [0, 1e-40, 1e-15, 1, 1e15, "mixed"]
SIZES = [0, 1e-40, 1e-30, 1e-15, 1, 30, 1e4, 1e15, 1e30]


# ---- products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", PRODUCT_SIZES)
@pytest.mark.parametrize("b", PRODUCT_SIZES)
@pytest.mark.parametrize("dout", [1e-15, 1, 1e15])
def test_linear(rng, a, b, dout):
    check(both_ways("linear"), [draw(rng, a, 4, 5), draw(rng, b, 5, 3), draw(rng, 1, 3), draw(rng, dout, 4, 3)])


@pytest.mark.parametrize("a", PRODUCT_SIZES)
@pytest.mark.parametrize("b", PRODUCT_SIZES)
@pytest.mark.parametrize("dout", [1e-15, 1, 1e15])
def test_wedge(rng, a, b, dout):
    check(both_ways("plucker"), [draw(rng, a, 6, 5), draw(rng, b, 6, 5), draw(rng, dout, 6, 10)])


@pytest.mark.parametrize("size", PRODUCT_SIZES)
@pytest.mark.parametrize("factor", [1, -1, 0.75, 1 / 3])
def test_wedge_of_parallel_vectors(rng, size, factor):
    u = draw(rng, size, 6, 5)
    check(both_ways("plucker"), [u, np.float32(factor) * u, draw(rng, 1, 6, 10)])


def unit_area_terms(u, v, dq):
    """The heights are differences, v⊥ = v - (u·v / u·u) u, and so are the gradients along them."""
    q, _ = grassmann.unit_area_forward(u, v)
    plane = q.any(-1, keepdims=True)
    uu, vv, uv = (np.where(plane, (a * b).sum(-1, keepdims=True), 1) for a, b in [(u, u), (v, v), (u, v)])
    v_perp, u_perp = v - uv / uu * u, u - uv / vv * v
    hv_2, hu_2 = (np.where(plane, (a * a).sum(-1, keepdims=True), 1) for a in (v_perp, u_perp))
    u, v, uv, dq, along = *map(np.abs, (u, v, uv, dq)), np.abs(dq * q).sum(-1, keepdims=True)
    du, dv = along / hu_2 * (u + uv / vv * v), along / hv_2 * (v + uv / uu * u)
    return [np.abs(q), plane * du, plane * (dv + dq / np.sqrt(uu * hv_2))]


@pytest.mark.parametrize("a", [0, 1e-15, 1, 1e15, "mixed"])
@pytest.mark.parametrize("b", [0, 1e-15, 1, 1e15, "mixed"])
def test_unit_area(rng, a, b):
    check(both_ways("unit_area"), [draw(rng, a, 20, 5), draw(rng, b, 20, 5), draw(rng, 1, 20, 5)], unit_area_terms)


@pytest.mark.parametrize("size", [1e-12, 1, 1e15])  # at 1e-15 the gradient does not fit
@pytest.mark.parametrize("angle", [0, 1e-7, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("factor", [1, -3, 0.01])
def test_unit_area_of_nearly_parallel_vectors(rng, size, angle, factor):
    u = draw(rng, size, 20, 5)
    v = (np.float32(factor) * (u + angle * draw(rng, size, 20, 5))).astype(np.float32)
    check(both_ways("unit_area"), [u, v, draw(rng, 1, 20, 5)], unit_area_terms)


@pytest.mark.parametrize(("a", "b"), [(1, 1e-20), (1e-20, 1), (1, 1e-40), (1e-40, 1e15), (1e-25, 1e-25), (1e-40, 0)])
def test_a_vector_whose_square_underflows_counts_as_zero(rng, a, b):
    """Below 1e-19, beyond all use: no plane and no gradient, as for a zero vector. float64 would still see one."""
    results = both_ways("unit_area")(draw(rng, a, 20, 5), draw(rng, b, 20, 5), draw(rng, 1, 20, 5))
    np.testing.assert_array_equal(results, 0)


@pytest.mark.parametrize("taps", [True, False])
@pytest.mark.parametrize(("normalize", "size"), [
    *((False, size) for size in [0, 1e-40, 1e-15, 1, 1e15]), *((True, size) for size in [0, 1e-15, 1, 1e15]),
])  # fmt: skip
def test_partner(rng, taps, normalize, size):
    """Among the states an equal pair, an opposite pair and a zero vector."""
    z = draw(rng, size, 2, 8, 4)
    z[0, 2:4], z[1, 3], z[1, 5] = z[0, 1], -z[1, 2], 0

    def function(z, *rest):
        *w, dout = rest
        out, cache = grassmann.partner_forward(z, w[0] if w else None, (1, 3), normalize)
        return [out, *(grad for grad in grassmann.partner_backward(dout.copy(), cache) if grad is not None)]

    check(function, [z, *([draw(rng, 1, 2, 4)] if taps else []), draw(rng, 1, 2, 8, 4)])


def gate_terms(h, g, W, b, dout):
    """h and g enter the sum αh + (1-α)g, and 1-α the gradient of α, known to one last digit of 1 at best."""
    (h, g, W, dout), d = map(np.abs, (h, g, W, dout)), h.shape[-1]
    da = (h + g) * dout
    dhg = da @ W.T
    return [h + g, dout + dhg[..., :d], dout + dhg[..., d:], np.concatenate([h, g], -1).T @ da, da.sum(0)]


@pytest.mark.parametrize("h", [0, 1e-40, 1e-15, 1, 1e15])
@pytest.mark.parametrize("g", [0, 1e-40, 1e-15, 1, 1e15])
@pytest.mark.parametrize("W", [0, 1e-15, 1, 1e15])
def test_gate(rng, h, g, W):
    inputs = [draw(rng, h, 6, 4), draw(rng, g, 6, 4), draw(rng, W, 8, 4), draw(rng, 1, 4), draw(rng, 1, 6, 4)]
    check(both_ways("gate"), inputs, gate_terms)


@pytest.mark.parametrize("a", [0, 1, 20, 80, 90, 110, 750, 1e4, 1e30])
def test_saturated_gate(rng, a):
    """The pre-activation is ±a: exp(-a) fits into float32 up to 88, into float64 up to 709."""
    h, g, W, b = draw(rng, 1, 6, 4), draw(rng, 1, 6, 4), draw(rng, 0, 8, 4), np.float32([a, -a, a / 2, -a / 2])
    check(both_ways("gate"), [h, g, W, b, draw(rng, 1, 6, 4)], gate_terms)
    out = grassmann.gate_forward(h, g, W, b)[0]
    if a >= 80:
        np.testing.assert_allclose(out[:, :2], np.stack([h[:, 0], g[:, 1]], 1), rtol=1e-6)


# ---- the other ops ------------------------------------------------------------------------------------


def layernorm_terms(x, w, b, dy):
    """The deviations from the mean, and the three terms of the gradient, are sums that may cancel."""
    d, sigma = x - x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x_hat, dx_hat = np.abs(x).max(-1, keepdims=True) / sigma, np.abs(dy * w)
    along = dx_hat.mean(-1, keepdims=True) + np.abs(d / sigma) * (dx_hat * np.abs(d / sigma)).mean(-1, keepdims=True)
    return [np.abs(w) * x_hat + np.abs(b), (dx_hat + along) / sigma, (np.abs(dy) * x_hat).sum(0), np.abs(dy).sum(0)]


@pytest.mark.parametrize("size", [*SIZES, "mixed"])
@pytest.mark.parametrize("w", [1e-15, 1, 1e5])
def test_layernorm(rng, size, w):
    x = draw(rng, size, 8, 6)
    x[0], x[1, 1:], x[2] = x[0, 0], 0, np.where(np.arange(6) % 2, x[2, 0], -x[2, 0])  # constant, one peak, zigzag
    check(both_ways("layernorm"), [x, draw(rng, w, 6), draw(rng, 1, 6), draw(rng, 1, 8, 6)], layernorm_terms)


@pytest.mark.parametrize("offset", [1, 1e3, 1e6, 1e30])
def test_layernorm_far_from_zero(rng, offset):
    x = np.float32(offset) + draw(rng, 1, 8, 6)
    check(both_ways("layernorm"), [x, draw(rng, 1, 6), draw(rng, 1, 6), draw(rng, 1, 8, 6)], layernorm_terms)


@pytest.mark.parametrize("size", SIZES)
def test_gelu(rng, size):
    """GELU is x/2 plus x/2 tanh(…), which cancel where x is negative; so do the terms of its slope, up to 10³."""
    x = np.concatenate([draw(rng, size, 20), np.float32(size) * np.linspace(-1, 1, 20, dtype=np.float32)])

    def terms(x, dout):
        return [np.abs(x), np.abs(dout) * (1 + np.minimum(np.abs(x), 10) ** 3 / 10)]

    check(both_ways("gelu"), [x, draw(rng, 1, 40)], terms)


@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy(rng, size):
    """The loss is a difference of logits plus log Σ exp ≥ 0; the gradient a probability, less 1 at the target."""
    logits, targets = draw(rng, size, 6, 5), rng.integers(0, 5, 6)
    logits[0], logits[1], logits[2, targets[2]] = 0, size, size * 3

    def function(logits):
        loss, cache = cross_entropy_forward(logits, targets)
        return [loss, grassmann.cross_entropy_backward(1.0, cache)]

    def terms(logits):
        return [1 + 2 * np.abs(logits).max(), 1 / 6]

    check(function, [logits], terms)


@pytest.mark.parametrize("size", [*SIZES, "mixed"])
def test_embedding_and_dropout(rng, size):
    """A letter that occurs three times gathers three gradients."""

    def function(E, dout):
        out, cache = grassmann.embedding_forward(np.array([2, 0, 2, 2]), E)
        dropped, keep = grassmann.dropout_forward(out, 0.5, np.random.default_rng(0))
        return [dropped, grassmann.embedding_backward(grassmann.dropout_backward(dout, keep), cache)]

    def terms(E, dout):
        return [0, 3 * np.abs(dout).max()]

    check(function, [draw(rng, size, 3, 5), draw(rng, size, 4, 5)], terms)


@pytest.mark.parametrize("size", [0, 1e-15, 1, 100, 1e10, 1e15])
def test_attention(rng, size):
    """Scores up to 1e30: softmax is one-hot then, and passes no gradient."""
    W_qkv, b_qkv, W_out, b_out = (draw(rng, 1, *shape) for shape in [(4, 12), (12,), (4, 4), (4,)])
    b_qkv *= size > 0

    def function(h, W_qkv, b_qkv, W_out, b_out, dout):
        w = {"W_qkv": W_qkv, "b_qkv": b_qkv, "W_out": W_out, "b_out": b_out}
        out, cache = grassmann.attention_forward(h, w, 2)
        dh, grads = grassmann.attention_backward(dout.copy(), cache)
        return [out, dh, *(grads[name] for name in w)]

    def terms(*inputs):  # some entries are sums that cancel (the keys' biases have no gradient): take the largest
        return [np.abs(out).max() for out in function(*inputs)]

    check(function, [draw(rng, size, 2, 5, 4), W_qkv, b_qkv, W_out, b_out, draw(rng, 1, 2, 5, 4)], terms)


# ---- optimiser and sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1e-40, 1e-30, 1e-15, 1, 1e15, 1e30])
def test_clip_grads(rng, size):
    def function(a, b):
        grads = {"a": a.copy(), "b": b.copy()}
        norm = clip_grads(grads, 1.0)
        assert norm == pytest.approx(np.sqrt((a.astype(float) ** 2).sum() + (b.astype(float) ** 2).sum()), rel=1e-5)
        return list(grads.values())

    check(function, [draw(rng, size, 3, 4), draw(rng, size, 5)])


@pytest.mark.parametrize("size", [0, 1e-40, 1e-30, 1e-15, 1, 1e15])
def test_adamw(rng, size):
    def function(theta, *gradients):
        params = {"W": theta.copy()}
        state = adamw_init(params)
        for step, g in enumerate(gradients):
            adamw_step(params, {"W": g}, state, step, 0.1)
        return [params["W"]]

    check(function, [draw(rng, 1, 3, 4), *(draw(rng, size, 3, 4) for _ in range(3))])


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("size", [0, 1, 1e4, 1e30])
def test_sampling(temperature, size):
    config = tiny_config()
    params = ordinary_params(config, dtype=np.float32)
    params["ln_f.w"] *= np.float32(size)
    tokens = list(generate(params, config, [1], 20, temperature, top_k=5))
    assert all(0 <= token < 11 for token in tokens)


# ---- whole models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["prenorm", "paper"])
@pytest.mark.parametrize("taps", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("change", [
    {}, {"E": 0}, {"E": 1e4}, {"E": 1e-30}, {"mix.b_gate": 1e4}, {"mix.W_gate": 1e4}, {"mix.W_red": 0},
    {"mix.W_red": 1e-15, "mix.b_red": 1e-15}, {"mix.W_red": 1e6}, {"ffn.W_1": 1e6}, {"ffn.W_2": 1e10}, {"ln1.w": 0},
], ids=str)  # fmt: skip
def test_models_stay_finite(block, taps, normalize, change):
    """Equal letters, and some of the weights far too large, far too small or zero."""
    config = tiny_config(block=block, taps=taps, normalize=normalize)
    params = ordinary_params(config, dtype=np.float32)
    for name in params:
        for end, factor in change.items():
            if name.endswith(end):
                params[name] *= np.float32(factor)
    x = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 3, 1]])
    loss, grads = loss_and_grads(params, config, x, x[:, ::-1])
    exact = cross_entropy_forward(forward({k: v.astype(float) for k, v in params.items()}, config, x), x[:, ::-1])[0]
    assert loss == pytest.approx(exact, rel=1e-3)
    assert all(np.isfinite(g).all() for g in grads.values())
