"""Whole models: the equations, streaming, sampling, sizes, what is refused."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest

import grassmann as G

positions = pytest.mark.parametrize("positions", [True, False], ids=["positions", "anywhere"])


def near(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# ---- the model, written out token by token -------------------------------------------------------


def written_out(params, config, text):
    """Logits (L, V) of one text, directly from the equations, and for each layer z, p (L, …) and the gate alpha, or with
    attention the table a (heads, L, L). Without taps p is the mean of one wedge per offset; the model computes only one.
    """
    inside = []

    def layernorm(x, name):
        x_hat = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x_hat * params[name + "w"] + params[name + "b"]

    def ffn(x, name):
        a = x @ params[name + "W_1"] + params[name + "b_1"]
        gelu = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        return gelu @ params[name + "W_2"] + params[name + "b_2"]

    def wedge(u, v):
        p, sizes = G.plucker(u, v), np.linalg.norm(u) * np.linalg.norm(v)
        area = np.linalg.norm(p) if config.normalize else 1
        return p / area if area > 1e-5 * sizes or not config.normalize else 0 * p

    def grassmann(h, name, offsets):
        z, s, p = h @ params[name + "W_red"] + params[name + "b_red"], [], []
        for t in range(len(h)):
            past = [(k, z[t - delta]) for k, delta in enumerate(offsets) if t >= delta]
            if config.taps:
                s.append(
                    sum((params[name + "taps"][k] * v for k, v in past), np.zeros(config.rank))
                )
                p.append(wedge(z[t], s[t]))
            else:
                p.append(
                    sum(wedge(z[t], v) for _, v in past) / len(past)
                    if past
                    else 0 * G.plucker(z[t], z[t])
                )
        g = p @ params[name + "W_plu"] + params[name + "b_plu"]
        if config.memory:
            kv, M, c = h @ params[name + "W_kv"] + params[name + "b_kv"], 0, []
            for t, (key, value) in enumerate(zip(*np.split(kv, 2, 1), strict=True)):
                M = M + np.outer(key + s[t], value)
                c.append(z[t] @ M / math.sqrt(config.rank * (t + 1)))
            g = g + c @ params[name + "W_mem"]
        alpha = 1 / (
            1
            + np.exp(
                -(np.concatenate([h, g], 1) @ params[name + "W_gate"] + params[name + "b_gate"])
            )
        )
        inside.append({"z": z, "p": p, "alpha": alpha})
        return alpha * h + (1 - alpha) * g

    def attention(h, name):
        q, k, v = np.split(h @ params[name + "W_qkv"] + params[name + "b_qkv"], 3, axis=1)
        a, heads = [], np.zeros_like(h)
        for own in np.split(np.arange(config.d_model), config.n_head):  # a head's coordinates
            weights = np.tril(np.exp(q[:, own] @ k[:, own].T / math.sqrt(len(own))))
            a.append(weights / weights.sum(1, keepdims=True))
            heads[:, own] = a[-1] @ v[:, own]
        inside.append({"a": a})
        return heads @ params[name + "W_out"] + params[name + "b_out"]

    h = params["E"][text] + (params["P"][: len(text)] if config.positions else 0)
    for i in range(config.n_layer):
        ln1, ln2, inner, mixer = (f"blocks.{i}.{part}." for part in ("ln1", "ln2", "ffn", "mix"))
        attends = config.mixer == "attention"
        mix = (
            partial(attention, name=mixer)
            if attends
            else partial(grassmann, name=mixer, offsets=config.offsets[i])
        )
        if config.block == "prenorm":
            h = h + mix(layernorm(h, ln1))
            h = h + ffn(layernorm(h, ln2), inner)
        else:
            h = layernorm(mix(h) + (h if attends else 0), ln1)
            h = layernorm(h + ffn(h, inner), ln2)
    if config.block == "prenorm":
        h = layernorm(h, "ln_f.")
    return h @ params["E"].T, inside


@positions
def test_the_model_is_its_equations(tiny_model, batch, variant, positions):
    """Logits, loss, and the values that the caches name. Equal tokens make degenerate pairs, and one offset is longer
    than the text."""
    params, config = tiny_model(
        **variant, positions=positions, context=12, offsets=((1, 2, 5), (3, 10))
    )
    texts, y = batch(2)
    found, cache = G.model_forward(params, config, texts)
    logits, inside = zip(*(written_out(params, config, text) for text in texts), strict=True)
    near(found, logits, 1e-11)
    for i in range(config.n_layer):
        for name in inside[0][i]:
            near(cache["blocks"][i]["mix"][name], [text[i][name] for text in inside], 1e-11)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.mean([math.log(p[row, t, y[row, t]]) for row, t in np.ndindex(2, 9)])
    assert G.loss_and_grads(params, config, texts, y)[0] == pytest.approx(expected, rel=1e-12)


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-10), (np.float32, 1e-3)])
def test_streaming_equals_forward_far_beyond_the_context(tiny_model, variant, dtype, atol):
    """Prompts shorter and longer than the memory's chunks, then token by token; degenerate pairs. The state does not
    grow: a layer keeps the last max(Δ) reduced states, at most one more (views keep theirs alive), and the memory."""
    model = tiny_model(dtype, **variant, vocab_size=3, context=16, offsets=((1, 2, 5), (1, 9)))
    text = np.random.default_rng(1).integers(0, 3, 200)
    text[50:80] = text[50]
    logits, state, start, held = G.forward(*model, text[None])[0], G.stream_init(*model), 0, []
    for size in (63, 1, 1, 65, *[1] * 70):
        last, state = G.stream_read(*model, state, text[start : start + size])
        start += size
        near(last, logits[start - 1], atol)
        arrays = [a for layer in state["past"] for a in map(np.asarray, layer.values())]
        held.append(sum((a if a.base is None else a.base).size for a in arrays))
    assert last.dtype == dtype
    assert "mixer" in variant or max(held[20:]) <= (6 + 10) * 4 + 2 * (4 * 4 + 1) * (
        "memory" in variant
    )


@pytest.mark.parametrize("context", [8, 9])
def test_streaming_with_positions_re_reads_half_the_context(tiny_model, variant, context):
    """At the end of the context it continues from the last context // 2 tokens, at positions 0, 1, …"""
    model = tiny_model(**variant, positions=True, context=context)
    text, window, state = np.random.default_rng(1).integers(0, 11, 30), [], G.stream_init(*model)
    for token in text:
        window = [*(window[-(context // 2) :] if len(window) == context else window), token]
        logits, state = G.stream_step(*model, state, token)
        near(logits, G.forward(*model, np.array([window]))[0, -1])
        assert len(state["recent"]) <= context
    state = G.stream_init(*model)
    G.stream_read(*model, state, text[:5])
    near(G.stream_read(*model, state, text[5:])[0], logits)  # many tokens at once


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    return tiny_model(vocab_size=7)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 1}, {"temperature": 1e-300}])
def test_greedy_sampling_takes_the_largest_logit(model, how):
    text = [3, 1, *G.generate(*model, [3, 1], 20, **how)]
    assert (G.forward(*model, np.array([text]))[0].argmax(-1)[1:-1] == text[2:]).all()


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, None), (2.0, 4), (3.0, 100)])
def test_frequencies_are_softmax_of_logits_over_temperature(model, temperature, top_k):
    """For the first token after (3, 1), with a thousand seeds, within four standard deviations."""
    n, logits = 1000, G.forward(*model, np.array([[3, 1]]))[0, -1]
    p = np.exp((logits - logits.max()) / temperature)
    p[np.argsort(logits)[: -(top_k or 7)]] = 0
    p /= p.sum()
    draws = [next(G.generate(*model, [3, 1], 1, temperature, top_k, seed)) for seed in range(n)]
    assert (np.abs(np.bincount(draws, minlength=7) / n - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()


@positions
def test_prompts(tiny_model, positions):
    """An empty prompt, any iterable, every token, longer than the context; nothing to write; seeds."""
    model = tiny_model(positions=positions)
    write = lambda prompt, n=30, **how: list(G.generate(*model, prompt, n, **how))  # noqa: E731
    assert write([1, 2]) == write(iter([1, 2])) == write(np.array([1, 2])) != write([1, 2], seed=1)
    assert write([]) == write([0])
    assert len(write([*range(11), *[1] * 20], 50)) == 50 and write([1, 2], 0) == []


# ---- sizes and configurations --------------------------------------------------------------------


def test_initial_weights(tiny_config, variant):
    config = tiny_config(**variant, vocab_size=50, d_model=64, rank=16, d_ff=256, positions=True)
    params = G.init_params(config, seed=3)
    G.check_model(params, config)
    for name, value in params.items():
        kind = name.split(".")[-1]
        assert value.dtype == np.float32
        scale = {"taps": 0.5, "W_red": 1 / 8, "W_kv": 1 / 8, "W_2": 0.01, "W_out": 0.01}.get(
            kind, 0.02
        )
        if value.ndim == 1:
            assert (value == (kind == "w")).all()
        else:
            assert value.std() == pytest.approx(scale, rel=5 / np.sqrt(value.size))
    assert not np.array_equal(G.init_params(config, seed=4)["E"], params["E"])


def test_defaults_that_follow_from_other_values(tiny_config):
    config, attention = G.Config(65), G.Config(65, mixer="attention")
    assert (config.d_ff, config.offsets) == (2 * config.d_model, G.WIDENING)
    assert (attention.d_ff, attention.offsets) == (4 * config.d_model, ())
    assert G.Config(65, taps=False, n_layer=5).offsets == ((1,), (2,), (4,), (8,), (1,))
    assert G.Config(65, n_layer=2, context=5).offsets == (G.WIDENING[1], (1, 2, 4))
    assert [G.WIDENING.index(layer) for layer in G.Config(65, n_layer=6).offsets] == [
        0,
        1,
        1,
        2,
        3,
        3,
    ]
    assert G.Config(65, n_layer=1, context=2).offsets == ((1,),)
    config = tiny_config(vocab_size=np.int64(11), offsets=[[np.int32(1)], [1, 3]])
    assert config == tiny_config() and hash(config) == hash(tiny_config())
    assert type(config.vocab_size) is type(config.offsets[0][0]) is int


WRONG = {  # of tiny_config
    "rank must be at least 2, not 1": [{"rank": 1}],
    "n_layer must be at least 1, not 0": [{"n_layer": 0}],
    "dropout must be at least 0 and below 1": [{"dropout": rate} for rate in (1, -0.1, math.nan)],
    "2 layers need as many groups of offsets, not 3": [{"offsets": ((1,),) * 3}],
    "offsets, all distinct": [{"offsets": ((1, 1), (2,))}, {"offsets": ((), (1,))}],
    "1 to context - 1, here 8": [{"offsets": ((1,), (wrong,))} for wrong in (0, 9)],
    "n_head, 3, must divide d_model, 8": [{"mixer": "attention", "n_head": 3}],
    "neither memory nor offsets": [
        {"mixer": "attention"} | x for x in ({"memory": True}, {"offsets": ((1,),) * 2})
    ],
    "partners that are not normalised": [{"memory": True, "normalize": True}],
    "block must be one of": [{"block": "postnorm"}, {"block": ["paper"]}],
    "mixer must be one of": [{"mixer": "lstm"}, {"mixer": {}}],
}


@pytest.mark.parametrize(("rule", "changes"), [(r, c) for r in WRONG for c in WRONG[r]], ids=str)
def test_a_wrong_configuration_gets_a_sentence(rule, changes):
    """The sentence does not show the whole configuration."""
    sizes = {
        "context": 9,
        "n_layer": 2,
        "d_model": 8,
        "offsets": None if "mixer" in changes else ((1,), (1, 3)),
    }
    with pytest.raises(G.UserError, match=rule) as error:
        G.Config(11, **sizes | changes)
    assert "\n" not in str(error.value) and "Config(" not in str(error.value)


TEXT, TABLE = np.array([[1, 2, 3]]), {"P": np.zeros((9, 8))}
DOORS = {  # the message, and the call that raises it
    r"\(B, L\), not int64 of shape \(3,\)": lambda p, c: G.forward(p, c, TEXT[0]),
    r"\(B, L\), not int64 of shape \(1, 0\)": lambda p, c: G.forward(p, c, TEXT[:, :0]),
    "whole numbers.* not float64": lambda p, c: G.forward(p, c, TEXT / 1),
    "from 0 to 6, not from -1 to 1": lambda p, c: G.forward(p, c, TEXT - 2),
    "from 0 to 6, not from 5 to 7": lambda p, c: G.loss_and_grads(p, c, TEXT, TEXT + 4),
    "from 0 to 6, not from 6 to 8": lambda p, c: G.loss_and_grads(p, c, TEXT + 5, TEXT),
    "same shape": lambda p, c: G.loss_and_grads(p, c, TEXT, TEXT[:, 1:]),
    "P is missing": lambda p, c: G.stream_init(p, dataclasses.replace(c, positions=True)),
    "P is .* no such parameter": lambda p, c: G.forward(p | TABLE, c, TEXT),
    "E is": lambda p, c: G.loss_and_grads(p | {"E": TEXT}, c, TEXT, TEXT),
    "10 tokens exceed the context of 9": lambda p, c: G.forward(
        p | TABLE, dataclasses.replace(c, positions=True), np.zeros((1, 10), int)
    ),
    "nothing to read": lambda p, c: G.stream_read(p, c, G.stream_init(p, c), []),
    "tokens must be from 0 to 6$": lambda p, c: G.stream_step(p, c, G.stream_init(p, c), -1),
    "from 0 to 6$": lambda p, c: G.stream_step(p, c, G.stream_init(p, c), 7),
    "not from 7 to 7": lambda p, c: G.generate(p, c, [7], 1),
    "temperature must": lambda p, c: G.generate(p, c, [1], 1, temperature=-1),
    "number of tokens must be": lambda p, c: G.generate(p, c, [1], -1),
    "top_k must": lambda p, c: G.generate(p, c, [1], 1, top_k=0),
    "not finite": lambda p, c: next(G.generate(p | {"E": p["E"] * np.nan}, c, [3], 1)),
}


@pytest.mark.parametrize("rule", DOORS)
def test_what_makes_no_sense_gets_a_sentence(model, rule):
    with pytest.raises(G.UserError, match=rule):
        DOORS[rule](*model)


def test_mistakes_of_the_program_keep_their_traceback():
    """x (4, 6) has as many numbers as 8 rows for W (3, 5). Sizes of a wrong type are a TypeError."""
    with pytest.raises(
        ValueError, match=r"x \(4, 6\) has rows of 6, but W \(3, 5\) takes rows of 3"
    ) as error:
        G.linear_forward(np.ones((4, 6)), np.ones((3, 5)), np.ones(5))
    assert error.type is ValueError  # not a UserError
    for changes in ({"offsets": ((1.0,),)}, {"offsets": "1"}, {"context": 2.5}, {"dropout": None}):
        with pytest.raises(TypeError):
            G.Config(11, n_layer=1, **changes)
