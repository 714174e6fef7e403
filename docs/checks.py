"""The checks of the six tasks "Your turn" in tutorial.md. Each returns "right", or what is wrong.

    from docs import checks
    print(checks.contract(contract))

`op` is for every op of your own, forward and backward.
"""

from collections.abc import Callable

import numpy as np

import grassmann as G
from charlm.own_layer import check_op


def op(forward: Callable, backward: Callable, *inputs: G.Array) -> str:
    """Compare backward(dout, cache) with finite differences of forward(*inputs) -> (out, cache).

    backward returns the gradients of all inputs, float64, in their order.
    """
    try:
        error = check_op(forward, backward, *inputs)
    except G.UserError as mistake:
        return f"wrong: {mistake}"
    return "right" if error < 1e-6 else f"wrong: the largest error is {error:.0e}"


def equal(found: G.Array, expected: G.Array) -> str:
    if np.shape(found) != np.shape(expected):
        return f"wrong: the shape is {np.shape(found)}, not {np.shape(expected)}"
    difference = np.abs(found - expected).max()
    if difference < 1e-9:
        return "right"
    return f"wrong: the largest difference is {difference:.1e}"


def contract(answer: Callable) -> str:
    """Section 2: answer(x, p) -> (r,) for x (r,) and p = u ∧ v."""
    x, u, v = np.random.default_rng(0).standard_normal((3, 5))
    p = G.plucker(u, v)
    expected = (x @ u) * v - (x @ v) * u
    return equal(answer(x, p), expected)


def layer(answer: Callable) -> str:
    """Section 3: answer(h, w, delta) -> (L, d) for h (L, d)."""
    rng = np.random.default_rng(0)
    config = G.Config(
        vocab_size=2,
        context=8,
        n_layer=1,
        d_model=6,
        rank=4,
        offsets=((2,),),
        taps=False,
    )
    w = {}
    for name, shape in G.mix_shapes(config, 0).items():
        w[name] = rng.standard_normal(shape)
    h = rng.standard_normal((8, 6))
    expected, _ = G.mix_forward(h[None], w, config, 0)
    return equal(answer(h, w, 2), expected[0])


def look_back(answer: Callable) -> str:
    """Section 4: answer(z, taps, offsets) -> (L, r) for z (L, r), taps (m, r)."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((7, 3))
    taps = rng.standard_normal((3, 3))
    offsets = (1, 2, 4)
    expected, _ = G.partner_forward(z[None], taps, offsets, False)
    return equal(answer(z, taps, offsets), expected[0])


def gate(forward: Callable, backward: Callable) -> str:
    """Section 7: forward(h, g, c), backward(dout, cache) -> dh, dg, dc for c (d,)."""
    rng = np.random.default_rng(5)
    h, g = rng.standard_normal((2, 5, 4))
    c = rng.standard_normal(4)
    return op(forward, backward, h, g, c)


def unit(forward: Callable, backward: Callable) -> str:
    """Section 8: forward(x) and backward(dout, cache) -> dx for x (T, d)."""
    x = np.random.default_rng(5).standard_normal((5, 6))
    return op(forward, backward, x)


def bits(answer: Callable) -> str:
    """Section 11: answer(params, config, tokens) -> bits per token."""
    config = G.Config(7, 8, 2, 6, 4)
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in G.param_shapes(config).items():
        params[name] = rng.standard_normal(shape)
    tokens = rng.integers(0, 7, 12)
    logits = G.forward(params, config, tokens[None, :-1])
    loss, _ = G.cross_entropy_forward(logits[0], tokens[1:])
    return equal(answer(params, config, tokens), loss / np.log(2))
