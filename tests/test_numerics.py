"""Extreme inputs: if the exact result fits into float32, the float32 result is finite and right.

The exact result is computed in float64 from the same float32 inputs. NumPy's warnings are errors (pyproject.toml).
"""

import itertools

import numpy as np
import pytest

import grassmann as G


@pytest.fixture
def draw(rng):
    def draw(size, *shape):
        """Random float32 numbers of this size; "mixed": of all sizes from 1e-15 to 1e15."""
        factor = 10 ** rng.uniform(-15, 15, shape) if size == "mixed" else size
        return (factor * rng.standard_normal(shape)).astype(np.float32)

    return draw


def both_ways(op, *inputs, other=()):
    """[out, *gradients] of an op. The last input is the gradient that the backward takes."""
    *inputs, dout = [x.copy() for x in inputs]
    out, cache = getattr(G, f"{op}_forward")(*inputs, *other)
    grads = getattr(G, f"{op}_backward")(dout, cache)
    return [out, *(grads if isinstance(grads, tuple) else [grads])]


def check(op, *inputs, other=(), scale=0):
    """float32 differs little from float64, compared with the largest number of a row, or with `scale`."""
    wide = both_ways(op, *(x.astype(np.float64) for x in inputs), other=other)
    for got, exact in zip(both_ways(op, *inputs, other=other), wide, strict=True):
        assert got.dtype == np.float32
        tolerance = 1e-5 * (np.abs(exact).max(-1, keepdims=True) + scale) + 1e-37
        fits = np.abs(exact) < 0.99 * np.finfo(np.float32).max
        assert (np.abs(np.where(fits, got - exact, 0)) <= tolerance).all(), f"{got} is not {exact}"


@pytest.mark.parametrize(("a", "b"), [*itertools.product([0, 1e-15, 1e15, "mixed"], [0, 1, 1e15])])
def test_products_and_unit_areas(draw, a, b):
    check("linear", draw(a, 4, 5), draw(b, 5, 3), draw(1, 3), draw(1e-15, 4, 3))
    u, v = draw(a, 20, 5), draw(b, 20, 5)
    check("plucker", u, v, draw(1e-15, 20, 10))
    check("unit_area", u, v, draw(1, 20, 5))
    check("unit_area", v, u, draw(1, 20, 5))


@pytest.mark.parametrize(("a", "b"), [*itertools.product([1e-20, 1e-40, 0], [1e15, 1e-25])])
def test_a_vector_whose_square_underflows_counts_as_zero(draw, a, b):
    """Below 1e-19 there is no plane and no gradient. float64 would still see a plane."""
    u, v = draw(a, 20, 5), draw(b, 20, 5)
    for pair in ((u, v), (v, u)):
        np.testing.assert_array_equal(both_ways("unit_area", *pair, draw(1, 20, 5)), 0)


@pytest.mark.parametrize("size", [0, 1e-40, 1, 30, 1e4, 1e30, "mixed"])
def test_layernorm_gelu_and_cross_entropy(rng, draw, size):
    x, targets = draw(size, 9, 6), rng.integers(0, 6, 9)
    x[0], x[1, 1:] = x[0, 0], 0
    check("layernorm", x, draw(1e5, 6), draw(1, 6), draw(1, 9, 6))
    check("gelu", x, draw(1, 9, 6), scale=np.abs(x).max())
    check("cross_entropy", x, np.float32(1), other=(targets,), scale=np.abs(x).max())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"E": 0},
        {"E": 1e4},
        {"W_gate": 1e4},
        {"W_red": 1e-15, "b_red": 1e-15},
        {"W_red": 1e6},
        {"W_qkv": 1e6},
        {"W_1": 1e6},
    ],
    ids=str,
)
def test_models_are_finite_and_right(tiny_model, variant, change):
    """With equal letters, and with some weights far too large, far too small or zero."""
    params, config = tiny_model(np.float32, **variant)
    for name in params:
        for end, factor in change.items():
            params[name] *= np.float32(factor if name.endswith(end) else 1)
    x = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 3, 1]])
    loss, grads = G.loss_and_grads(params, config, x, x[:, ::-1])
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    assert loss == pytest.approx(G.loss_and_grads(wide, config, x, x[:, ::-1])[0], rel=1e-3)
    assert all(np.isfinite(g).all() and g.dtype == np.float32 for g in grads.values())
