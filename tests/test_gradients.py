"""Every backward pass, op by op and for whole models, against central differences in float64."""

import numpy as np
import pytest

import grassmann as G

# ---- ops -----------------------------------------------------------------------------------------

D, R, N = 8, 4, 6  # width, rank, Plücker coordinates
TOKENS = np.array([[3, 0, 3, 1], [4, 3, 3, 0]])  # of 6: some repeated, two missing

MIX = {"W_red": (D, R), "b_red": (R,), "W_plu": (N, D), "b_plu": (D,)}
MIX |= {"W_gate": (2 * D, D), "b_gate": (D,)}
ATTENTION = {"W_qkv": (D, 3 * D), "b_qkv": (3 * D,), "W_out": (D, D), "b_out": (D,)}
FFN = {"W_1": (D, 10), "b_1": (10,), "W_2": (10, D), "b_2": (D,)}

def partner(offsets, normalize):
    return lambda z, taps=None: G.partner_forward(z, taps, offsets, normalize)

def mixer(forward, **changes):
    changes = {"vocab_size": 5, "n_layer": 1, "d_model": D, "rank": R} | changes
    return lambda h, w: forward(h, w, G.Config(**changes), 0)

# Forward and the shapes of its inputs, in a dict those of parameters. The first word names the op.
OPS = {
    "linear": (G.linear_forward, [(2, 3, 5), (5, 4), (4,)]),
    "layernorm": (G.layernorm_forward, [(2, 3, 5), (5,), (5,)]),
    "gelu": (G.gelu_forward, [(4, 5)]),
    "dropout": (lambda x: G.dropout_forward(x, 0.4, np.random.default_rng(7)), [(5, 6)]),
    "dropout rate 0": (lambda x: G.dropout_forward(x, 0.0, np.random.default_rng(7)), [(5, 6)]),
    "embedding": (lambda E: G.embedding_forward(TOKENS, E), [(6, 5)]),
    "cross_entropy": (lambda x: G.cross_entropy_forward(x, TOKENS.ravel()), [(8, 5)]),
    "plucker": (G.plucker_forward, [(2, 3, 5), (2, 3, 5)]),
    "plucker rank 2": (G.plucker_forward, [(3, 2), (3, 2)]),
    "plucker one pair": (G.plucker_forward, [(5,), (5,)]),
    "unit_area": (G.unit_area_forward, [(2, 3, 5), (2, 3, 5)]),
    "unit_area rank 2": (G.unit_area_forward, [(3, 2), (3, 2)]),
    "partner average": (partner((1, 2, 4), False), [(2, 6, R)]),
    "partner average normalized": (partner((1, 2, 4), True), [(2, 6, R)]),
    "partner average far": (partner((5, 6, 9), True), [(2, 6, R)]),
    "partner taps": (partner((1, 2, 4), False), [(2, 6, R), (3, R)]),
    "partner taps normalized": (partner((1, 2, 4), True), [(2, 6, R), (3, R)]),
    "partner taps far": (partner((5, 6, 9), False), [(2, 6, R), (3, R)]),
    "gate": (G.gate_forward, [(2, 3, D), (2, 3, D), (2 * D, D), (D,)]),
    "mix average": (
        mixer(G.mix_forward, offsets=((1, 3),), taps=False, normalize=True), [(2, 6, D), MIX]),
    "mix taps": (
        mixer(G.mix_forward, offsets=((1, 3),)), [(2, 6, D), MIX | {"taps": (2, R)}]),
    "mix rank 2": (mixer(G.mix_forward, rank=2, offsets=((1, 3),), taps=False), [
        (2, 6, D), MIX | {"W_red": (D, 2), "b_red": (2,), "W_plu": (1, D)}]),
    "attention 1 head": (
        mixer(G.attention_forward, mixer="attention", n_head=1), [(2, 5, D), ATTENTION]),
    "attention 4 heads": (
        mixer(G.attention_forward, mixer="attention", n_head=4), [(2, 5, D), ATTENTION]),
    "ffn": (G.ffn_forward, [(2, 3, D), FFN]),
    "head": (G.head_forward, [(2, 3, D), (5, D)]),
}

def test_no_backward_is_forgotten():
    names = {name.removesuffix("_backward") for name in dir(G) if name.endswith("_backward")}
    models = {"prenorm_block", "paper_block", "model"}  # below
    assert names == {op.split()[0] for op in OPS} | models

def flat(values) -> dict[str, np.ndarray]:
    """Arrays and dicts of arrays, in one dict: "0", "1", "2.W_red", …"""
    named = {}
    for k, value in enumerate(values):
        if isinstance(value, dict):
            named |= {f"{k}.{name}": a for name, a in value.items()}
        elif value is not None:
            named[f"{k}"] = value
    return named

@pytest.mark.parametrize(("op", "size"), [
    *((op, 1) for op in OPS),
    ("gelu", 6),  # where it saturates
    ("layernorm", 1e5), ("layernorm", 1e-3),  # where eps is not small beside the variance
])
def test_op(check_gradients, op, size):
    """The first input has this size, and the differences are taken in units of it."""
    forward, shapes = OPS[op]
    draw = np.random.default_rng(1).standard_normal
    inputs = [{name: draw(s) for name, s in a.items()} if isinstance(a, dict) else draw(a)
              for a in shapes]

    def run():
        return forward(size * inputs[0], *inputs[1:])

    out, cache = run()
    dout = draw(out.shape)
    grads = getattr(G, f"{op.split()[0]}_backward")(dout * 1, cache)
    first, *others = grads if isinstance(grads, tuple) else (grads,)
    grads = flat([size * first, *others])
    check_gradients(f"{op}, {size:g}", lambda: (run()[0] * dout).sum(), flat(inputs), grads)


# ---- whole models --------------------------------------------------------------------------------

def batch(B, L):
    """Random tokens, with a run of equal ones: without taps their planes are degenerate."""
    text = np.random.default_rng(2).integers(0, 11, (B, L + 1))
    text[-1, 1:3] = text[-1, 0]
    return text[:, :-1], text[:, 1:]

SEVERAL = {"offsets": ((1, 2, 8), (1, 3))}

@pytest.mark.parametrize(("changes", "B", "L"), [
    ({"offsets": ((2,), (1,))}, 2, 9),
    (SEVERAL, 2, 9),
    (SEVERAL | {"positions": True}, 2, 9),
    (SEVERAL | {"positions": True}, 2, 4),  # fewer tokens than the largest offset or than P has
    (SEVERAL | {"positions": True}, 2, 1),
    (SEVERAL, 1, 5),
    ({"n_layer": 1, "rank": 3, "offsets": ((1, 2),), "n_head": 1}, 2, 9),
], ids=str)
def test_model(tiny_config, ordinary_params, check_gradients, variant, changes, B, L, request):
    config = tiny_config(**variant, **changes)
    params, (x, y) = ordinary_params(config), batch(B, L)

    def loss():
        return G.cross_entropy_forward(G.forward(params, config, x), y)[0]

    value, grads = G.loss_and_grads(params, config, x, y)
    assert value == pytest.approx(loss(), rel=1e-14)
    check_gradients(f"model[{request.node.callspec.id}]", loss, params, grads, entries=8)

def test_model_with_dropout(tiny_config, ordinary_params, check_gradients, variant, request):
    """The masks are a function of the seed, a whole number or several."""
    config = tiny_config(**variant, positions=True, dropout=0.3)
    params, (x, y) = ordinary_params(config), batch(3, 7)
    loss, grads = G.loss_and_grads(params, config, x, y, seed=(5, 1))
    others = [G.loss_and_grads(params, config, x, y, seed)[0] for seed in (None, 5, (5, 2))]
    assert loss not in others

    def dropped():
        return G.loss_and_grads(params, config, x, y, (5, 1))[0]

    label = f"model[{request.node.callspec.id}-dropout]"
    check_gradients(label, dropped, params, grads, entries=3)

def test_gradients_belong_to_the_caller(tiny_config, ordinary_params, variant):
    """A later call, on other data, overwrites neither earlier gradients nor the parameters."""
    config = tiny_config(**variant, positions=True)
    params, (x, y) = ordinary_params(config), batch(4, 9)
    before = {name: value.copy() for name, value in params.items()}
    _, grads = G.loss_and_grads(params, config, x, y)
    kept = {name: g.copy() for name, g in grads.items()}
    _, others = G.loss_and_grads(params, config, y, x)
    arrays = [*grads.values(), *others.values(), *params.values()]
    for k, a in enumerate(arrays):
        assert not any(np.shares_memory(a, b) for b in arrays[:k])
    for name in params:
        np.testing.assert_array_equal(grads[name], kept[name])
        np.testing.assert_array_equal(params[name], before[name])
