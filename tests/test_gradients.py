"""Every backward pass, op by op and for whole models, against central differences in float64."""

import itertools

import numpy as np
import pytest
from finite_differences import check_gradients, ordinary_params, relative_error, tiny_config

import grassmann
from grassmann import cross_entropy_forward, forward, loss_and_grads

# ---- ops ----------------------------------------------------------------------------------------------

D, R, N = 8, 4, 6  # width, rank, Plücker coordinates
TOKENS = np.array([[3, 0, 3, 1], [4, 3, 3, 0]])  # of 6: some repeated, one missing

MIX = {"W_red": (D, R), "b_red": (R,), "W_plu": (N, D), "b_plu": (D,), "W_gate": (2 * D, D), "b_gate": (D,)}
ATTENTION = {"W_qkv": (D, 3 * D), "b_qkv": (3 * D,), "W_out": (D, D), "b_out": (D,)}
FFN = {"W_1": (D, 10), "b_1": (10,), "W_2": (10, D), "b_2": (D,)}

# (op, variant): the shapes of its inputs (a dict is a dict of parameters) and its other arguments
OPS = {
    ("linear", ""): ([(2, 3, 5), (5, 4), (4,)], []),
    ("layernorm", ""): ([(2, 3, 5), (5,), (5,)], []),
    ("gelu", ""): ([(4, 5)], []),
    ("plucker", ""): ([(2, 3, 5), (2, 3, 5)], []),
    ("plucker", "rank 2"): ([(3, 2), (3, 2)], []),
    ("plucker", "one pair"): ([(5,), (5,)], []),
    ("unit_area", ""): ([(2, 3, 5), (2, 3, 5)], []),
    ("unit_area", "rank 2"): ([(3, 2), (3, 2)], []),
    ("partner", "average"): ([(2, 6, R)], [None, (1, 2, 4), False]),
    ("partner", "average, normalized"): ([(2, 6, R)], [None, (1, 2, 4), True]),
    ("partner", "average, far"): ([(2, 6, R)], [None, (5, 6, 9), True]),
    ("partner", "taps"): ([(2, 6, R), (3, R)], [(1, 2, 4), False]),
    ("partner", "taps, normalized"): ([(2, 6, R), (3, R)], [(1, 2, 4), True]),
    ("partner", "taps, far"): ([(2, 6, R), (3, R)], [(5, 6, 9), False]),
    ("head", ""): ([(2, 3, D), (5, D)], []),
    ("gate", ""): ([(2, 3, D), (2, 3, D), (2 * D, D), (D,)], []),
    ("mix", "average"): ([(2, 6, D), MIX], [(1, 3), True]),
    ("mix", "taps"): ([(2, 6, D), MIX | {"taps": (2, R)}], [(1, 3), False]),
    ("attention", "1 head"): ([(2, 5, D), ATTENTION], [1]),
    ("attention", "4 heads"): ([(2, 5, D), ATTENTION], [4]),
    ("ffn", ""): ([(2, 3, D), FFN], []),
}
# Choices between ops above, so covered by the whole models; embedding, dropout and cross-entropy have tests below.
ELSEWHERE = {"mixer", "prenorm_block", "paper_block", "model", "embedding", "dropout", "cross_entropy"}


def test_no_backward_is_forgotten():
    names = {name.removesuffix("_backward") for name in dir(grassmann) if name.endswith("_backward")}
    assert names == {op for op, _ in OPS} | ELSEWHERE


def flat(values) -> dict[str, np.ndarray]:
    """Arrays and dicts of arrays, in one dict: "0", "1", "2.W_red", …"""
    named = {}
    for k, value in enumerate(values):
        named |= {f"{k}.{name}": a for name, a in value.items()} if isinstance(value, dict) else {f"{k}": value}
    return {name: a for name, a in named.items() if a is not None}


@pytest.mark.parametrize(("op", "variant"), OPS)
def test_op(op, variant):
    shapes, other = OPS[op, variant]
    rng = np.random.default_rng(1)
    draw = rng.standard_normal
    inputs = [{name: draw(s) for name, s in a.items()} if isinstance(a, dict) else draw(a) for a in shapes]
    op_forward, op_backward = getattr(grassmann, f"{op}_forward"), getattr(grassmann, f"{op}_backward")
    out, cache = op_forward(*inputs, *other)
    dout = draw(out.shape)
    grads = op_backward(dout.copy(), cache)
    grads = grads if isinstance(grads, tuple) else (grads,)
    check_gradients(
        f"{op}[{variant}]", lambda: (op_forward(*inputs, *other)[0] * dout).sum(), flat(inputs), flat(grads)
    )


def test_gelu_in_its_saturated_range(rng):
    x, dy = 6 * rng.standard_normal(40), rng.standard_normal(40)
    dx = grassmann.gelu_backward(dy.copy(), grassmann.gelu_forward(x)[1])
    check_gradients("gelu[wide]", lambda: grassmann.gelu_forward(x)[0] @ dy, {"x": x}, {"x": dx})


@pytest.mark.parametrize("size", [1e5, 1, 1e-3])
def test_layernorm_of_inputs_of_any_size(rng, size):
    """At 1e-3, eps is not small beside the variance. The differences are taken in units of the size."""
    unit, w, b, dy = (rng.standard_normal(shape) for shape in [(3, 6), (6,), (6,), (3, 6)])

    def run():
        return grassmann.layernorm_forward(size * unit, w, b)

    dx, dw, db = grassmann.layernorm_backward(dy.copy(), run()[1])
    check_gradients(
        f"layernorm[{size:g}]", lambda: (run()[0] * dy).sum(),
        {"x": unit, "w": w, "b": b}, {"x": size * dx, "w": dw, "b": db},
    )  # fmt: skip


def test_embedding(rng):
    tokens = np.array([[3, 0, 3, 1], [4, 3, 3, 0]])  # of 6: some repeated, two missing
    E, dx = rng.standard_normal((6, 5)), rng.standard_normal((2, 4, 5))
    dE = grassmann.embedding_backward(dx.copy(), grassmann.embedding_forward(tokens, E)[1])
    assert not dE[[2, 5]].any()
    check_gradients(
        "embedding", lambda: (grassmann.embedding_forward(tokens, E)[0] * dx).sum(), {"E": E}, {"E": dE}, entries=100
    )


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout(rng, rate):
    x, dy = rng.standard_normal((5, 6)), rng.standard_normal((5, 6))

    def run():
        return grassmann.dropout_forward(x, rate, np.random.default_rng(7))

    dx = grassmann.dropout_backward(dy.copy(), run()[1])
    check_gradients(f"dropout[{rate}]", lambda: (run()[0] * dy).sum(), {"x": x}, {"x": dx})


def test_cross_entropy(rng):
    logits, targets = 3 * rng.standard_normal((2, 4, 5)), rng.integers(0, 5, (2, 4))
    dlogits = grassmann.cross_entropy_backward(0.7, cross_entropy_forward(logits, targets)[1])
    check_gradients(
        "cross_entropy", lambda: 0.7 * cross_entropy_forward(logits, targets)[0],
        {"logits": logits}, {"logits": dlogits.reshape(logits.shape)},
    )  # fmt: skip


# ---- whole models -------------------------------------------------------------------------------------


def batch(config, B, L, seed=2):
    """Random tokens, with a run of equal ones: their planes are degenerate where nothing tells them apart."""
    x = np.random.default_rng(seed).integers(0, config.vocab_size, (B, L + 1))
    x[-1, 1:3] = x[-1, 0]
    return x[:, :-1], x[:, 1:]


def check_model(label, config, B=2, L=9, entries=10):
    params = ordinary_params(config)
    x, y = batch(config, B, L)
    loss, grads = loss_and_grads(params, config, x, y)
    assert loss == pytest.approx(cross_entropy_forward(forward(params, config, x), y)[0], rel=1e-14)
    check_gradients(
        f"model[{label}]", lambda: cross_entropy_forward(forward(params, config, x), y)[0], params, grads, entries
    )


ONE, SEVERAL = ((2,), (1,)), ((1, 2, 8), (1, 3))
VARIANTS = list(itertools.product(["prenorm", "paper"], [True, False], [True, False]))  # block, taps, normalize
NAMES = ["-".join([block, "taps" * taps or "average", *["normalized"] * norm]) for block, taps, norm in VARIANTS]
variants = pytest.mark.parametrize(("block", "taps", "normalize"), VARIANTS, ids=NAMES)


@variants
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "anywhere"])
@pytest.mark.parametrize("offsets", [ONE, SEVERAL], ids=["one", "several"])
def test_model(block, taps, normalize, positions, offsets, request):
    config = tiny_config(block=block, taps=taps, normalize=normalize, positions=positions, offsets=offsets)
    check_model(request.node.callspec.id, config)


@variants
@pytest.mark.parametrize(("B", "L"), [(2, 4), (2, 1), (1, 5)])
def test_model_on_short_and_single_texts(block, taps, normalize, B, L, request):
    """Fewer tokens than the largest offset, one token, one text; with positions, so that P has unused rows."""
    config = tiny_config(block=block, taps=taps, normalize=normalize, positions=True, offsets=SEVERAL)
    check_model(request.node.callspec.id, config, B, L, entries=2)


@pytest.mark.parametrize("block", ["prenorm", "paper"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "anywhere"])
@pytest.mark.parametrize(("B", "L"), [(2, 9), (1, 1)])
def test_model_with_attention(block, positions, B, L, request):
    config = tiny_config(block=block, positions=positions, mixer="attention", n_head=2)
    check_model(f"attention-{request.node.callspec.id}", config, B, L)


@pytest.mark.parametrize("block", ["prenorm", "paper"])
@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_model_with_dropout(block, mixer):
    config = tiny_config(block=block, mixer=mixer, n_head=2, positions=True, dropout=0.3)
    params = ordinary_params(config)
    x, y = batch(config, 3, 7)

    def run():
        return loss_and_grads(params, config, x, y, seed=(5, 1))

    loss, grads = run()
    assert loss != loss_and_grads(params, config, x, y)[0]
    assert loss != loss_and_grads(params, config, x, y, seed=(5, 2))[0]
    check_gradients(f"model[{block}-{mixer}-dropout]", lambda: run()[0], params, grads, entries=3)


def test_model_of_one_layer_with_rank_2_and_one_head():
    check_model("rank 2", tiny_config(n_layer=1, rank=2, offsets=((1, 2),)))
    check_model("one head", tiny_config(n_layer=1, mixer="attention", n_head=1))


# ---- threads, ownership, precision --------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_threads_change_nothing_but_rounding(B, mixer):
    config = tiny_config(mixer=mixer)
    params, (x, y) = ordinary_params(config), batch(config, B, 9)
    loss_1, grads_1 = loss_and_grads(params, config, x, y, threads=1)
    loss_2, grads_2 = loss_and_grads(params, config, x, y, threads=2)
    assert loss_2 == pytest.approx(loss_1, rel=1e-12)
    for name in params:
        assert relative_error(grads_1[name], grads_2[name]) < 1e-12, name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 9, 20, 1000])
def test_shards_change_nothing_but_rounding(tokens, threads, monkeypatch):
    """However few texts are computed at a time."""
    config = tiny_config()
    params, (x, y) = ordinary_params(config), batch(config, 5, 9)
    loss, grads = loss_and_grads(params, config, x, y)
    monkeypatch.setattr(grassmann, "SHARD_TOKENS", tokens)
    loss_2, grads_2 = loss_and_grads(params, config, x, y, threads=threads)
    assert loss_2 == pytest.approx(loss, rel=1e-12)
    for name in params:
        assert relative_error(grads[name], grads_2[name]) < 1e-12, name


def test_threads_draw_different_dropout():
    """The same text twice, on two threads: with the same masks the loss would be that of one text."""
    config = tiny_config(dropout=0.3)
    params, (x, y) = ordinary_params(config), batch(config, 1, 9)
    twice = np.repeat(x, 2, axis=0), np.repeat(y, 2, axis=0)
    losses = {float(loss_and_grads(params, config, *texts, seed=1, threads=2)[0]) for texts in [(x, y), twice]}
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_calls_repeat_bit_for_bit(threads, dtype):
    config = tiny_config(dropout=0.2)
    params, (x, y) = ordinary_params(config, dtype=dtype), batch(config, 5, 9)
    loss, grads = loss_and_grads(params, config, x, y, 3, threads)
    for _ in range(5):
        again, grads_again = loss_and_grads(params, config, x, y, 3, threads)
        assert again == loss
        for name in params:
            np.testing.assert_array_equal(grads_again[name], grads[name])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_gradients_belong_to_the_caller(threads, mixer):
    """A later call, on other data, overwrites neither the gradients of an earlier one nor the parameters."""
    config = tiny_config(mixer=mixer, positions=True)
    params = ordinary_params(config)
    before = {name: value.copy() for name, value in params.items()}
    (x, y), (x_2, y_2) = batch(config, 4, 9), batch(config, 4, 9, seed=3)
    _, grads = loss_and_grads(params, config, x, y, threads=threads)
    kept = {name: g.copy() for name, g in grads.items()}
    _, others = loss_and_grads(params, config, x_2, y_2, threads=threads)
    for name in params:
        np.testing.assert_array_equal(grads[name], kept[name])
        np.testing.assert_array_equal(params[name], before[name])
        assert not any(np.shares_memory(grads[name], a) for a in [*others.values(), *params.values()])
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(grads.values(), 2))


@variants
def test_float32_agrees_with_float64(block, taps, normalize):
    """In the median of nine models: now and then one has a pair so nearly parallel that rounding shows."""
    config = tiny_config(block=block, taps=taps, normalize=normalize)
    worst = []
    for seed in range(9):
        single = ordinary_params(config, seed, np.float32)
        x, y = batch(config, 4, 9, seed=seed)
        loss, grads = loss_and_grads(single, config, x, y)
        exact, exact_grads = loss_and_grads({k: v.astype(np.float64) for k, v in single.items()}, config, x, y)
        assert loss == pytest.approx(exact, rel=1e-5)
        assert all(g.dtype == np.float32 for g in grads.values())
        worst.append(max(relative_error(g, exact_grads[name]) for name, g in grads.items()))
    assert np.median(worst) < 5e-6
