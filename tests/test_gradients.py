"""Every backward pass, op by op and for whole models, against central differences in float64."""

import numpy as np
import pytest

import grassmann as G

TOKENS = np.array([[3, 0, 3, 1], [4, 3, 3, 0]])  # of 6: some repeated, two missing
MEMORY = {"W_kv": (8, 8), "b_kv": (8,), "W_mem": (4, 8)}

# Forward, and the shapes of its inputs. A dict has shapes of parameters. The first word names the op.
OPS = {
    "linear": (G.linear_forward, [(2, 3, 5), (5, 4), (4,)]),
    "layernorm": (G.layernorm_forward, [(2, 3, 5), (5,), (5,)]),
    "gelu": (G.gelu_forward, [(4, 5)]),
    "dropout": (lambda x: G.dropout_forward(x, 0.4, G.draw_rows(7)), [(5, 6)]),
    "embedding": (lambda E: G.embedding_forward(TOKENS, E), [(6, 5)]),
    "cross_entropy": (lambda x: G.cross_entropy_forward(x, TOKENS.ravel()), [(8, 5)]),
    "plucker": (G.plucker_forward, [(2, 3, 5), (2, 3, 5)]),
    "plucker rank 2, one pair": (G.plucker_forward, [(2,), (2,)]),
    "unit_area": (G.unit_area_forward, [(2, 3, 5), (2, 3, 5)]),
    "partner": (lambda z, taps: G.partner_forward(z, taps, (1, 2, 9), True), [(2, 6, 4), (3, 4)]),
    "gate": (G.gate_forward, [(2, 3, 8), (2, 3, 8), (16, 8), (8,)]),
    "memory of three chunks": (G.memory_forward, [(1, 150, 8), (1, 150, 4), (1, 150, 4), MEMORY]),
    "attention_core": (G.attention_core_forward, [(2, 2, 5, 3)] * 3),
    "ffn": (
        G.ffn_forward,
        [(2, 3, 8), {"W_1": (8, 10), "b_1": (10,), "W_2": (10, 8), "b_2": (8,)}],
    ),
    "head": (G.head_forward, [(2, 3, 8), (5, 8)]),
}


def test_no_backward_is_forgotten():
    names = {name.removesuffix("_backward") for name in dir(G) if name.endswith("_backward")}
    in_models = {"mix", "attention", "prenorm_block", "paper_block", "model"}  # test_model
    assert names - {op.split()[0] for op in OPS} == in_models


@pytest.mark.parametrize("op", OPS)
def test_op(rng, check_op, op):
    forward, shapes = OPS[op]
    draw = rng.standard_normal
    inputs = [
        {name: draw(shape) for name, shape in one.items()} if isinstance(one, dict) else draw(one)
        for one in shapes
    ]
    check_op(op, forward, getattr(G, f"{op.split()[0]}_backward"), *inputs)


@pytest.mark.parametrize(
    "L", [9, 4]
)  # 4 tokens are fewer than the largest offset, and than P has rows
def test_model(tiny_model, batch, check_gradients, variant, L, request):
    """With dropout: its masks are a function of the seed, a whole number or several."""
    params, config = tiny_model(**variant, offsets=((1, 2, 8), (1, 3)), positions=True, dropout=0.3)

    def loss(seed=(5, 1)):
        return G.loss_and_grads(params, config, *batch(2, L), seed)

    value, grads = loss()
    assert value not in [loss(seed)[0] for seed in (None, 5, (5, 2))]
    check_gradients(request.node.name, lambda: loss()[0], params, grads)


def test_gradients_belong_to_the_caller(tiny_model, batch, variant):
    """A later call on other data does not overwrite earlier gradients or the parameters."""
    params, config = tiny_model(**variant, positions=True)
    arrays = [*params.values(), *G.loss_and_grads(params, config, *batch(4))[1].values()]
    before = [a.copy() for a in arrays]
    others = [*G.loss_and_grads(params, config, *batch(4, seed=3))[1].values()]
    assert all(map(np.array_equal, arrays, before))
    assert not any(np.shares_memory(a, b) for a in others for b in arrays)
