"""Whole models: the equations, what may depend on what, streaming, sampling, sizes."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import grassmann as G

positions = pytest.mark.parametrize("positions", [True, False], ids=["positions", "anywhere"])

def random_text(shape, seed=1, vocab_size=11):
    return np.random.default_rng(seed).integers(0, vocab_size, shape)

def near(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)

# ---- the model, written out token by token -------------------------------------------------------

def written_out(params, config, text):
    """Logits (L, V) of one text, by the equations as plainly as they stand, and what lies between.

    Per layer: z, s, p (L, …) and the gate alpha, or with attention the table a (heads, L, L).
    """
    inside = []

    def layernorm(x, name):
        x_hat = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x_hat * params[name + "w"] + params[name + "b"]

    def ffn(x, name):
        a = x @ params[name + "W_1"] + params[name + "b_1"]
        gelu = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        return gelu @ params[name + "W_2"] + params[name + "b_2"]

    def area(u, v):
        """|u ∧ v|, infinite if that is no plane."""
        area = np.linalg.norm(G.plucker(u, v))
        return area if area > 1e-5 * np.linalg.norm(u) * np.linalg.norm(v) else math.inf

    def grassmann(h, name, offsets):
        z, s = h @ params[name + "W_red"] + params[name + "b_red"], []
        for t in range(len(h)):
            parts, total = {k: z[t - delta] for k, delta in enumerate(offsets) if t >= delta}, 0
            if config.taps:
                total = sum(params[name + "taps"][k] * v for k, v in parts.items())
                total = total / area(z[t], total) if config.normalize and parts else total
            elif parts:
                total = np.mean([v / area(z[t], v) if config.normalize else v
                                 for v in parts.values()], 0)
            s.append(total + np.zeros(config.rank))
        p = np.array([G.plucker(u, v) for u, v in zip(z, s, strict=True)])
        g = p @ params[name + "W_plu"] + params[name + "b_plu"]
        if config.memory:
            ab, M, c = h @ params[name + "W_ab"] + params[name + "b_ab"], 0, []
            for t, (write_a, write_b) in enumerate(zip(*np.split(ab, 2, 1), strict=True)):
                M = M + np.outer(write_a, write_b) - np.outer(write_b, write_a)
                c.append(z[t] @ M / math.sqrt(t + 1))
            g = g + c @ params[name + "W_mem"]
        a = np.concatenate([h, g], 1) @ params[name + "W_gate"] + params[name + "b_gate"]
        alpha = 1 / (1 + np.exp(-a))
        inside.append({"z": z, "s": np.array(s), "p": p, "alpha": alpha})
        return alpha * h + (1 - alpha) * g

    def attention(h, name):
        q, k, v = np.split(h @ params[name + "W_qkv"] + params[name + "b_qkv"], 3, axis=1)
        size = config.d_model // config.n_head
        a, heads = np.zeros((config.n_head, len(h), len(h))), np.zeros_like(h)
        for head, t in np.ndindex(config.n_head, len(h)):
            own = slice(head * size, (head + 1) * size)
            weights = np.exp([q[t, own] @ k[past, own] / math.sqrt(size) for past in range(t + 1)])
            a[head, t, : t + 1] = weights / weights.sum()
            heads[t, own] = a[head, t] @ v[:, own]
        inside.append({"a": a})
        return heads @ params[name + "W_out"] + params[name + "b_out"]

    def mix(h, i):
        if config.mixer == "attention":
            return attention(h, f"blocks.{i}.mix.")
        return grassmann(h, f"blocks.{i}.mix.", config.offsets[i])

    h = params["E"][text] + (params["P"][: len(text)] if config.positions else 0)
    for i in range(config.n_layer):
        ln1, ln2, inner = (f"blocks.{i}.{part}." for part in ("ln1", "ln2", "ffn"))
        if config.block == "prenorm":
            h = h + mix(layernorm(h, ln1), i)
            h = h + ffn(layernorm(h, ln2), inner)
        else:
            h = layernorm(mix(h, i) + (h if config.mixer == "attention" else 0), ln1)
            h = layernorm(h + ffn(h, inner), ln2)
    if config.block == "prenorm":
        h = layernorm(h, "ln_f.")
    return h @ params["E"].T, inside

@positions
def test_the_model_is_its_equations(tiny_model, batch, variant, positions):
    """Logits, loss, and what the caches show under its name: the numbers that the layer used."""
    params, config = tiny_model(**variant, positions=positions, offsets=((1, 2, 5), (3,)))
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

# ---- what may depend on what ---------------------------------------------------------------------

@positions
def test_causality(tiny_model, variant, positions):
    """Other tokens after t leave the logits up to t; another token at t changes them from t on."""
    model = tiny_model(**variant, positions=positions, context=12, offsets=((1, 2), (1, 3)))
    tokens = random_text((2, 12))
    logits = G.forward(*model, tokens)
    for t in range(11):
        others = tokens.copy()
        others[:, t + 1 :] = (others[:, t + 1 :] + 1 + random_text((2, 11 - t)) % 10) % 11
        changed = np.abs(G.forward(*model, others) - logits).max(-1)  # (B, L)
        assert changed[:, : t + 1].max() < 1e-12
        assert changed[:, t + 1].min() > 1e-3

@positions
@pytest.mark.parametrize("normalize", [True, False])
def test_translation_invariance(tiny_model, normalize, positions):
    """Without positions a token whose offsets all reach tokens may stand anywhere in a text."""
    variant = {"positions": positions, "normalize": normalize, "context": 16}
    model, text = tiny_model(**variant, offsets=((1, 2), (1, 2))), random_text((1, 12))
    later = np.concatenate([random_text((1, 4), seed=2), text], 1)
    difference = np.abs(G.forward(*model, later)[0, 8:] - G.forward(*model, text)[0, 4:]).max(-1)
    assert difference.min() > 1e-3 if positions else difference.max() < 1e-12

def test_positions_end_at_the_context(tiny_model):
    model = tiny_model(positions=True)
    G.forward(*model, np.zeros((1, 9), int))
    with pytest.raises(ValueError, match="10 tokens exceed the context of 9"):
        G.forward(*model, np.zeros((1, 10), int))

# ---- streaming -----------------------------------------------------------------------------------

def stream(params, config, tokens):
    """Logits of all tokens, one by one, and what the state holds after each: its tokens, and the
    bytes behind all its arrays (views keep all of theirs alive)."""
    state, logits, held = G.stream_init(params, config), [], []
    for token in tokens:
        step, state = G.stream_step(params, config, state, token)
        logits.append(step)
        arrays = [a for layer in state["past"] for a in map(np.asarray, layer.values())]
        sizes = [(a if a.base is None else a.base).nbytes for a in arrays]
        held.append(len(state["recent"]) + sum(sizes))
    return np.array(logits), held

@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-10), (np.float32, 1e-3)])
def test_streaming_equals_forward_far_beyond_the_context(tiny_model, variant, dtype, atol):
    """Equal letters make degenerate pairs, which one row and many rows must recognise alike."""
    model = tiny_model(dtype, **variant, vocab_size=3, context=16, offsets=((1, 2, 5), (1, 9)))
    text = random_text(300 if "mixer" in variant else 1000, vocab_size=3)
    text[50:80] = text[50]
    logits, _ = stream(*model, text)
    assert logits.dtype == dtype
    near(logits, G.forward(*model, text[None])[0], atol)

@pytest.mark.parametrize("sizes", [[1] * 200, [64, 64, 72], [63, 1, 1, 135], [130, 70]], ids=str)
def test_the_memory_of_a_text_read_in_parts(tiny_model, sizes):
    """However it is cut, and whatever lies in a chunk of the full pass: the same numbers."""
    params, config = tiny_model(memory=True)
    text, start, state = random_text(200), 0, G.stream_init(params, config)
    logits = G.forward(params, config, text[None])[0]
    for size in sizes:
        last, state = G.stream_read(params, config, state, text[start : start + size])
        start += size
        near(last, logits[start - 1])
    far = text.copy()
    far[0] = (far[0] + 1) % 11  # beyond the reach of the offsets, 4, and in another chunk
    assert np.abs(G.forward(params, config, far[None])[0, 100:] - logits[100:]).max() > 1e-4

def test_the_state_does_not_grow(tiny_model, variant):
    """Per layer the last max(Δ) reduced states and at most one more: 6 and 4 rows of 4 float64; and
    the memory, 4 rows and a count."""
    _, held = stream(*tiny_model(**variant, offsets=((1, 5), (3,))), random_text(100))
    most = (6 + 4) * 4 * 8 + 2 * (4 * 4 * 8 + 8) * ("memory" in variant)
    assert "mixer" in variant or (set(held[10:]) == {held[10]} and held[10] <= most)
    _, held = stream(*tiny_model(**variant, positions=True), random_text(100))
    assert max(held[20:]) <= max(held[:20])

@pytest.mark.parametrize("context", [8, 9])
def test_streaming_with_positions_re_reads_half_the_context(tiny_model, variant, context):
    """At the context's end it goes on from the last context // 2 tokens, at positions 0, 1, …"""
    model = tiny_model(**variant, positions=True, context=context, offsets=((1,), (1, 3)))
    text, window = random_text(60), []
    for token, logits in zip(text, stream(*model, text)[0], strict=True):
        if len(window) == context:
            window = window[-(context // 2) :]
        window.append(token)
        near(logits, G.forward(*model, np.array([window]))[0, -1])
    state = G.stream_init(*model)
    G.stream_read(*model, state, text[:5])
    near(G.stream_read(*model, state, text[5:])[0], logits)  # many tokens at once

# ---- sampling ------------------------------------------------------------------------------------

@pytest.fixture
def model(tiny_model):
    return tiny_model(vocab_size=7)

def last_logits(model, text):
    return G.forward(*model, np.array([text]))[0, -1]

def draws(model, n, *how):
    """The first token after (3, 1), with n seeds."""
    return [next(G.generate(*model, [3, 1], 1, *how, seed)) for seed in range(n)]

@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 1}, {"temperature": 1e-300}])
def test_greedy_sampling_takes_the_largest_logit(model, how):
    text = [3, 1, *G.generate(*model, [3, 1], 20, **how)]
    for k in range(2, len(text)):
        assert text[k] == last_logits(model, text[:k]).argmax()

def test_top_k(model):
    """All of the k likeliest and no other; k of the whole vocabulary or more restricts nothing."""
    for k in (2, 3, 6):
        likeliest = np.argsort(last_logits(model, [3, 1]))[::-1][:k]
        assert set(draws(model, 200, 3.0, k)) == set(likeliest.tolist())
    free, *all_of_7 = (list(G.generate(*model, [1], 50, top_k=k)) for k in (None, 7, 100))
    assert all_of_7 == [free, free]

@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 4)])
def test_frequencies_are_softmax_of_logits_over_temperature(model, temperature, top_k):
    n, logits = 2000, last_logits(model, [3, 1])
    p = np.exp((logits - logits.max()) / temperature)
    p[np.argsort(logits)[: -(top_k or 7)]] = 0
    p /= p.sum()
    deviation = np.bincount(draws(model, n, temperature, top_k), minlength=7) / n - p
    assert (np.abs(deviation) <= 4 * np.sqrt(p * (1 - p) / n)).all()  # four standard deviations

@positions
def test_prompts(tiny_model, positions):
    """None, any iterable, every token, longer than the context; nothing to write; seeds."""
    model = tiny_model(positions=positions)

    def write(prompt, n=30, **how):
        return list(G.generate(*model, prompt, n, **how))

    assert write([1, 2]) == write(iter([1, 2])) == write(np.array([1, 2])) != write([1, 2], seed=1)
    assert write([]) == write([0])
    assert len(write([*range(11), *[1] * 20], 50)) == 50 and write([1, 2], 0) == []

def test_logits_that_are_not_finite_are_not_sampled(model):
    model[0]["E"][3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        next(G.generate(*model, [3], 1))

# ---- sizes and configurations --------------------------------------------------------------------

def test_initial_weights(tiny_config, variant):
    """Ones, zeros, N(0, 0.02²), N(0, 0.5²) for taps, N(0, 1/d) for W_red, and 1 / sqrt(2N) of it
    for what writes into the residual stream."""
    config = tiny_config(**variant, vocab_size=50, d_model=64, rank=16, d_ff=256, positions=True)
    params = G.init_params(config, seed=3)
    assert [(k, v.shape) for k, v in params.items()] == [*G.param_shapes(config).items()]
    for name, value in params.items():
        kind = name.split(".")[-1]
        assert value.dtype == np.float32
        if value.ndim == 1:
            assert (value == (kind == "w")).all()
            continue
        scale = {"taps": 0.5, "W_red": 1 / 8, "W_2": 0.01, "W_out": 0.01}.get(kind, 0.02)
        assert value.std() == pytest.approx(scale, rel=5 / np.sqrt(value.size))
    for name, value in G.init_params(config, seed=3, dtype=np.float64).items():
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value.astype(np.float32), params[name])
    assert not np.array_equal(G.init_params(config, seed=4)["E"], params["E"])

def test_the_first_loss_is_that_of_guessing(variant):
    """At the default size about ln V nats. (The token just read is likelier than others: the head is E.)"""
    config, text = G.Config(65, **variant), random_text((4, 65), vocab_size=65)
    loss, _ = G.loss_and_grads(G.init_params(config), config, text[:, :-1], text[:, 1:])
    assert loss == pytest.approx(math.log(65), rel=0.05)

def test_defaults_that_follow_from_other_values():
    config, attention = G.Config(65), G.Config(65, mixer="attention")
    assert (config.d_ff, config.offsets) == (2 * config.d_model, G.WIDENING)
    assert (attention.d_ff, attention.offsets) == (4 * config.d_model, ())
    assert G.Config(65, taps=False, n_layer=5).offsets == ((1,), (2,), (4,), (8,), (1,))
    assert G.Config(65, n_layer=2, context=5).offsets == (G.WIDENING[1], (1, 2, 4))
    for n_layer, context, taps in itertools.product(range(1, 14), (2, 9, 64), (True, False)):
        offsets = G.Config(65, context, n_layer, taps=taps).offsets
        if n_layer >= 4 and context == 64 and taps:
            assert offsets[:: n_layer - 1] == G.WIDENING[::3]

def test_sizes_may_be_numpy_integers(tiny_config):
    config = tiny_config(vocab_size=np.int64(11), offsets=[[np.int32(1)], [1, 3]])
    assert config == tiny_config() and hash(config) == hash(tiny_config())
    assert type(config.vocab_size) is type(config.offsets[0][0]) is int
    assert dataclasses.replace(config, rank=3).rank == 3

SIZES = ["vocab_size", "context", "n_layer", "d_model", "rank", "d_ff", "n_head"]
WRONG = {
    "must be whole numbers": [
        *({"offsets": offsets} for offsets in [((1.0,), (1,)), (1, 2), 3, "12", ((1,), None)]),
        *({size: value} for size in SIZES for value in (2.5, "3", math.nan)),
        {"d_model": None, "d_ff": None}, {"dropout": None},
    ],
    "must be at least": [{size: 0} for size in SIZES] + [{"rank": 1}, {"d_model": -8}],
    "dropout must be at least 0 and below 1": [{"dropout": rate} for rate in (1, -0.1, math.nan)],
    "one tuple per layer": [{"offsets": offsets} for offsets in [((1,),), ((1,),) * 3, ()]],
    "must be distinct": [{"offsets": ((1, 1), (2,))}, {"offsets": ((), (1,))}],
    "1 to context - 1": [{"offsets": ((1,), (wrong,))} for wrong in (0, -1, 9)],
    "n_head must divide": [{"mixer": "attention", "n_head": n} for n in (3, 16)],
    "block must be one of": [{"block": block} for block in ("postnorm", None, ["paper"])],
    "mixer must be one of": [{"mixer": mixer} for mixer in ("lstm", ["grassmann"])],
}

@pytest.mark.parametrize(("rule", "changes"), [(r, c) for r in WRONG for c in WRONG[r]], ids=str)
def test_a_wrong_configuration_gets_a_sentence(tiny_config, rule, changes):
    with pytest.raises(ValueError, match=rule) as error:
        tiny_config(**changes)
    assert "; got Config(" in str(error.value) and "\n" not in str(error.value)
