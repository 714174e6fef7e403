"""Every backward pass, op by op and for whole models, against central differences in float64."""

import numpy as np
import pytest

import grassmann as G

TOKENS = np.array([3, 0, 3, 1, 4, 3, 3, 0]).reshape(2, 4)  # of 6: some repeated, two missing
MEMORY = {
    "W_kv": (8, 8),
    "b_kv": (8,),
    "W_mem": (4, 8),
}
FFN = {
    "W_1": (8, 10),
    "b_1": (10,),
    "W_2": (10, 8),
    "b_2": (8,),
}


def dropout(x):
    return G.dropout_forward(x, 0.4, G.draw_rows(7))


def embedding(E):
    return G.embedding_forward(TOKENS, E)


def cross_entropy(x):
    return G.cross_entropy_forward(x, TOKENS.ravel())


def partner(z, taps):
    return G.partner_forward(z, taps, (1, 2, 9), True)


# Forward, and the shapes of its inputs. A dict has shapes of parameters. The first word is the op.
d = (5,)
rows = (2, 3, 5)
wide = (2, 3, 8)
heads = (2, 2, 5, 3)
long = (1, 150, 4)
OPS = {
    "linear": (G.linear_forward, rows, (5, 4), (4,)),
    "layernorm": (G.layernorm_forward, rows, d, d),
    "gelu": (G.gelu_forward, rows),
    "dropout": (dropout, rows),
    "embedding": (embedding, (6, 5)),
    "cross_entropy": (cross_entropy, (8, 5)),
    "plucker": (G.plucker_forward, rows, rows),
    "plucker rank 2, one pair": (G.plucker_forward, (2,), (2,)),
    "unit_area": (G.unit_area_forward, rows, rows),
    "partner": (partner, (2, 6, 4), (3, 4)),
    "gate": (G.gate_forward, wide, wide, (16, 8), (8,)),
    "memory of three chunks": (G.memory_forward, (1, 150, 8), long, long, MEMORY),
    "attention_core": (G.attention_core_forward, heads, heads, heads),
    "ffn": (G.ffn_forward, wide, FFN),
    "head": (G.head_forward, wide, (5, 8)),
}


def test_no_backward_is_forgotten():
    missing = {name for name in dir(G) if name.endswith("_backward")}
    missing -= {f"{op.split()[0]}_backward" for op in OPS}
    in_models = ("mix", "attention", "prenorm_block", "paper_block", "model")  # test_model
    assert missing == {f"{op}_backward" for op in in_models}


@pytest.mark.parametrize("op", OPS)
def test_op(rng, check_op, op):
    forward, *shapes = OPS[op]
    name = op.split()[0]
    backward = getattr(G, f"{name}_backward")
    inputs = []
    for shape in shapes:
        if isinstance(shape, dict):
            params = {}
            for name, size in shape.items():
                params[name] = rng.standard_normal(size)
            inputs.append(params)
        else:
            inputs.append(rng.standard_normal(shape))
    check_op(op, forward, backward, *inputs)


@pytest.mark.parametrize("L", [9, 4])  # 4 are fewer than the largest offset, and than P has rows
def test_model(tiny_model, batch, check_gradients, variant, L, request):
    """With dropout: its masks are a function of the seed, a whole number or several."""
    offsets = ((1, 2, 8), (1, 3))
    params, config = tiny_model(**variant, offsets=offsets, positions=True, dropout=0.3)
    x, y = batch(2, L)

    def loss(seed=(5, 1)):
        value, _ = G.loss_and_grads(params, config, x, y, seed)
        return value

    value, grads = G.loss_and_grads(params, config, x, y, (5, 1))
    for other in (None, 5, (5, 2)):
        assert value != loss(other)
    check_gradients(request.node.name, loss, params, grads)
