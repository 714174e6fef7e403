"""Extreme inputs: if the exact result fits into float32, the float32 result is finite and right.

The exact result is computed in float64 from the same float32 inputs. NumPy's warnings are errors
(pyproject.toml).
"""

import numpy as np
import pytest

import grassmann as G

LARGEST = np.finfo(np.float32).max


@pytest.fixture
def draw(rng):
    def draw(size, *shape):
        """Random float32 numbers of this size; "mixed": of all sizes from 1e-15 to 1e15."""
        factor = size
        if size == "mixed":
            factor = 10 ** rng.uniform(-15, 15, shape)
        numbers = factor * rng.standard_normal(shape)
        return numbers.astype(np.float32)

    return draw


def both_ways(op, *inputs, other=()):
    """[out, *gradients] of an op. The last input is the gradient that the backward takes."""
    *inputs, dout = [x.copy() for x in inputs]
    forward = getattr(G, f"{op}_forward")
    backward = getattr(G, f"{op}_backward")
    out, cache = forward(*inputs, *other)
    grads = backward(dout, cache)
    if not isinstance(grads, tuple):
        grads = (grads,)
    return [out, *grads]


def check(op, *inputs, other=(), scale=0):
    """float32 differs little from float64, compared with a row's largest number, or with scale."""
    wide_inputs = [x.astype(np.float64) for x in inputs]
    narrow = both_ways(op, *inputs, other=other)
    wide = both_ways(op, *wide_inputs, other=other)
    for got, exact in zip(narrow, wide, strict=True):
        assert got.dtype == np.float32
        size = np.abs(exact).max(-1, keepdims=True) + scale
        fits = np.abs(exact) < 0.99 * LARGEST
        error = np.abs(np.where(fits, got - exact, 0))
        assert (error <= 1e-5 * size + 1e-37).all(), f"{op}: {got} is not {exact}"


@pytest.mark.parametrize("size", [0, 1e-40, 1, 30, 1e4, 1e30, "mixed"])
def test_layernorm_gelu_and_cross_entropy(rng, draw, size):
    x = draw(size, 9, 6)
    x[0] = x[0, 0]  # no variance
    x[1, 1:] = 0
    targets = rng.integers(0, 6, 9)
    scale = np.abs(x).max()
    check("layernorm", x, draw(1e5, 6), draw(1, 6), draw(1, 9, 6))
    check("gelu", x, draw(1, 9, 6), scale=scale)
    check("cross_entropy", x, np.float32(1), other=(targets,), scale=scale)


CHANGES = [
    {},
    {"E": 0},
    {"E": 1e4},
    {"W_gate": 1e4},
    {"W_red": 1e-15, "b_red": 1e-15},
    {"W_red": 1e6},
    {"W_qkv": 1e6},
    {"W_1": 1e6},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_models_are_finite_and_right(tiny_model, variant, change):
    """With equal letters, and with some weights far too large, far too small or zero."""
    params, config = tiny_model(np.float32, **variant)
    for name in params:
        for end, factor in change.items():
            if name.endswith(end):
                params[name] *= np.float32(factor)
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    x = np.ones((2, 9), int)
    x[1] = [1, 1, 1, 2, 2, 2, 2, 3, 1]
    y = x[:, ::-1]
    loss, grads = G.loss_and_grads(params, config, x, y)
    expected, _ = G.loss_and_grads(wide, config, x, y)
    assert loss == pytest.approx(expected, rel=1e-3)
    for name, g in grads.items():
        assert np.isfinite(g).all(), name
        assert g.dtype == np.float32, name
