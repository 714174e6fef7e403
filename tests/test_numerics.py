"""Extreme inputs: where the exact result fits into float32, the float32 result is finite and right.

The exact result is that of float64, on the same (float32) inputs. A difference of nearly
equal numbers has few correct digits, however it is computed; so the result in float64 is compared
with those of inputs changed at random in their last float32 digit: an error of the size of that
spread is fair, and so is one of the last digit of the largest number in a row of the result.
"""

import itertools

import numpy as np
import pytest

import grassmann as G

EPS, LARGEST = np.finfo(np.float32).eps, np.finfo(np.float32).max
UNDERFLOW = 1e-37  # a few of float32's smallest normal number
PRODUCT_SIZES = [0, 1e-40, 1e-15, 1, 1e15, "mixed"]
SIZES = [0, 1e-40, 1e-30, 1e-15, 1, 30, 1e4, 1e15, 1e30]

def sizes(names, *values):
    """Every combination of the values."""
    return pytest.mark.parametrize(names, [*itertools.product(*values)])

@pytest.fixture(autouse=True)
def strict():
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield

@pytest.fixture
def draw(rng):
    def draw(size, *shape):
        """Random float32 numbers of this size; "mixed": of all sizes from 1e-15 to 1e15."""
        x = rng.standard_normal(shape)
        if size == "mixed":
            x, size = np.sign(x) * 10 ** rng.uniform(-15, 15, shape), 1
        return (size * x).astype(np.float32)
    return draw

def both_ways(op, *inputs, other=()):
    """The op on all inputs but the last, its backward on that: [out, *gradients]."""
    *inputs, dout = [x.copy() for x in inputs]
    out, cache = getattr(G, f"{op}_forward")(*inputs, *other)
    grads = getattr(G, f"{op}_backward")(dout, cache)
    return [out, *(grads if isinstance(grads, tuple) else [grads])]

def check(op, *inputs, other=(), largest=None):
    """`both_ways` in float32 as in float64; `largest`: the largest terms of which they are sums."""
    rng, wide = np.random.default_rng(0), [x.astype(np.float64) for x in inputs]
    moved = [[x * (1 + EPS * rng.uniform(-1, 1, x.shape)) for x in wide] for _ in range(8)]
    exact, *around = (both_ways(op, *inputs, other=other) for inputs in (wide, *moved))
    for k, got in enumerate(both_ways(op, *inputs, other=other)):
        assert got.dtype == np.float32
        spread = np.max([np.abs(near[k] - exact[k]) for near in around], axis=0)
        row = largest[k] if largest else np.abs(exact[k]).max(-1, keepdims=True)
        tolerance = 16 * spread + 16 * EPS * row + UNDERFLOW
        fits = np.abs(exact[k]) + tolerance < LARGEST
        wrong = ~(np.abs(np.where(fits, got - exact[k], 0)) <= tolerance)
        assert not wrong.any(), f"output {k}: {got} is not {exact[k]}"

# ---- ops -----------------------------------------------------------------------------------------

@sizes("a, b, dout", PRODUCT_SIZES, PRODUCT_SIZES, [1e-15, 1, 1e15])
def test_linear_and_wedge(draw, a, b, dout):
    check("linear", draw(a, 4, 5), draw(b, 5, 3), draw(1, 3), draw(dout, 4, 3))
    check("plucker", draw(a, 6, 5), draw(b, 6, 5), draw(dout, 6, 10))

@sizes("a, b", [0, 1e-15, 1, 1e15, "mixed"], [0, 1e-15, 1, 1e15])
def test_unit_area(draw, a, b):
    u, v = draw(a, 20, 5), draw(b, 20, 5)
    check("unit_area", u, v, draw(1, 20, 5))
    check("unit_area", v, u, draw(1, 20, 5))

@sizes("size, angle, factor", [1e-12, 1, 1e15], [0, 1e-7, 1e-6, 1e-4, 1e-3, 1e-2], [1, -3, 0.01])
def test_unit_area_of_nearly_parallel_vectors(draw, size, angle, factor):
    """(At the size 1e-15 the gradient does not fit.)"""
    u = draw(size, 20, 5)
    v = (np.float32(factor) * (u + angle * draw(size, 20, 5))).astype(np.float32)
    check("unit_area", u, v, draw(1, 20, 5))

@sizes("a, b", [1e-20, 1e-25, 1e-40, 0], [1e15, 1, 1e-25, 0])
def test_a_vector_whose_square_underflows_counts_as_zero(draw, a, b):
    """Below 1e-19: no plane and no gradient. float64 would still see one."""
    u, v = draw(a, 20, 5), draw(b, 20, 5)
    for pair in ((u, v), (v, u)):
        np.testing.assert_array_equal(both_ways("unit_area", *pair, draw(1, 20, 5)), 0)

@sizes("size, w", [*SIZES, "mixed"], [1e-15, 1, 1e5])
def test_layernorm(draw, size, w):
    """Also of a constant, one peak, a zigzag, and far from zero."""
    x = draw(size, 9, 6)
    x[0], x[1, 1:], x[2] = x[0, 0], 0, np.where(np.arange(6) % 2, x[2, 0], -x[2, 0])
    x[3:6] = draw(1, 3, 6) + np.float32([[1], [1e3], [1e6]])
    check("layernorm", x, draw(w, 6), draw(1, 6), draw(1, 9, 6))

@pytest.mark.parametrize("size", SIZES)
def test_gelu_and_cross_entropy(rng, draw, size):
    """(The loss is a difference of logits; its gradient a probability, less 1 at the target.)"""
    check("gelu", draw(size, 4, 10), draw(1, 4, 10))
    logits, targets = draw(size, 6, 5), rng.integers(0, 5, 6)
    logits[0], logits[1], logits[2, targets[2]] = 0, size, size * 3
    largest = [1 + np.abs(logits).max(), 1 / 6]
    check("cross_entropy", logits, np.float32(1), other=(targets,), largest=largest)

# ---- whole models --------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {}, {"E": 0}, {"E": 1e4}, {"E": 1e-30}, {"b_gate": 1e4}, {"W_gate": 1e4}, {"W_red": 0},
    {"W_red": 1e-15, "b_red": 1e-15}, {"W_red": 1e6}, {"W_qkv": 1e6}, {"W_1": 1e6}, {"W_2": 1e10},
    {"ln1.w": 0},
], ids=str)
def test_models_stay_finite(tiny_model, variant, change):
    """Equal letters, and some of the weights far too large, far too small or zero."""
    params, config = tiny_model(np.float32, **variant)
    for name in params:
        for end, factor in change.items():
            params[name] *= np.float32(factor if name.endswith(end) else 1)
    x = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 3, 1]])
    loss, grads = G.loss_and_grads(params, config, x, x[:, ::-1])
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    assert loss == pytest.approx(G.loss_and_grads(wide, config, x, x[:, ::-1])[0], rel=1e-3)
    assert all(np.isfinite(g).all() for g in grads.values())

def test_float32_agrees_with_float64(tiny_model, batch, relative_error, variant):
    """In the median of nine models: now and then a pair is so nearly parallel that it shows."""
    worst = []
    for seed in range(9):
        single, config = tiny_model(np.float32, seed, **variant)
        wide = {name: value.astype(np.float64) for name, value in single.items()}
        loss, grads = G.loss_and_grads(single, config, *batch(4, seed=seed))
        exact, exact_grads = G.loss_and_grads(wide, config, *batch(4, seed=seed))
        assert loss == pytest.approx(exact, rel=1e-5)
        assert all(g.dtype == np.float32 for g in grads.values())
        worst.append(max(relative_error(g, exact_grads[name]) for name, g in grads.items()))
    assert np.median(worst) < 5e-6
