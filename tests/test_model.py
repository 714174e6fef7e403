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


def layernorm(x, w):
    centred = x - x.mean(1, keepdims=True)
    x_hat = centred / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return x_hat * w["w"] + w["b"]


def ffn(x, w):
    a = x @ w["W_1"] + w["b_1"]
    q = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    gelu = 0.5 * a * (1 + np.tanh(q))
    return gelu @ w["W_2"] + w["b_2"]


def wedge(u, v, normalize):
    p = G.plucker(u, v)
    if not normalize:
        return p
    area = np.linalg.norm(p)
    sizes = np.linalg.norm(u) * np.linalg.norm(v)
    return p / area if area > 1e-5 * sizes else 0 * p


def average_of_wedges(z, t, offsets, normalize):
    """One wedge per valid offset. The model computes only one wedge for all."""
    wedges = [wedge(z[t], z[t - delta], normalize) for delta in offsets if t >= delta]
    return np.mean(wedges, axis=0) if wedges else 0 * G.plucker(z[t], z[t])


def weighted_partner(z, t, offsets, taps):
    s = np.zeros_like(z[t])
    for k, delta in enumerate(offsets):
        if t >= delta:
            s += taps[k] * z[t - delta]
    return s


def memory(h, z, s, w):
    r = z.shape[1]
    kv = h @ w["W_kv"] + w["b_kv"]
    M = np.zeros((r, r))
    c = np.zeros_like(z)
    for t in range(len(z)):
        key = kv[t, :r] + s[t]
        value = kv[t, r:]
        M = M + np.outer(key, value)
        c[t] = z[t] @ M / math.sqrt(r * (t + 1))
    return c @ w["W_mem"]


def grassmann(h, w, config, offsets):
    z = h @ w["W_red"] + w["b_red"]
    everywhere = range(len(z))
    if config.taps:
        s = [weighted_partner(z, t, offsets, w["taps"]) for t in everywhere]
        p = [wedge(z[t], s[t], config.normalize) for t in everywhere]
    else:
        p = [average_of_wedges(z, t, offsets, config.normalize) for t in everywhere]
    g = p @ w["W_plu"] + w["b_plu"]
    if config.memory:
        g = g + memory(h, z, s, w)
    hg = np.concatenate([h, g], 1)
    alpha = 1 / (1 + np.exp(-hg @ w["W_gate"] - w["b_gate"]))
    return alpha * h + (1 - alpha) * g, {"z": z, "p": p, "alpha": alpha}


def attention(h, w, config):
    q, k, v = np.split(h @ w["W_qkv"] + w["b_qkv"], 3, axis=1)
    heads = np.zeros_like(h)
    tables = []
    for own in np.split(np.arange(config.d_model), config.n_head):  # a head's coordinates
        scores = q[:, own] @ k[:, own].T / math.sqrt(len(own))
        weights = np.tril(np.exp(scores))
        a = weights / weights.sum(1, keepdims=True)
        heads[:, own] = a @ v[:, own]
        tables.append(a)
    return heads @ w["W_out"] + w["b_out"], {"a": tables}


def block(h, w, config, layer):
    def mix(x):
        own = w.scope("mix.")
        if config.mixer == "attention":
            return attention(x, own, config)
        return grassmann(x, own, config, config.offsets[layer])

    ln1 = w.scope("ln1.")
    ln2 = w.scope("ln2.")
    if config.block == "prenorm":
        mixed, inside = mix(layernorm(h, ln1))
        h = h + mixed
        return h + ffn(layernorm(h, ln2), w.scope("ffn.")), inside
    mixed, inside = mix(h)
    if config.mixer == "attention":  # it has no gate that could keep h
        mixed = h + mixed
    h = layernorm(mixed, ln1)
    return layernorm(h + ffn(h, w.scope("ffn.")), ln2), inside


def written_out(params, config, text):
    """Logits (L, V) of one text, and for each layer z, p (L, …) and the gate alpha (L, d).

    With attention, for each layer the table a (heads, L, L).
    """
    h = params["E"][text]
    if config.positions:
        h = h + params["P"][: len(text)]
    layers = []
    for i in range(config.n_layer):
        h, inside = block(h, G.Scope(params, f"blocks.{i}."), config, i)
        layers.append(inside)
    if config.block == "prenorm":
        h = layernorm(h, G.Scope(params, "ln_f."))
    return h @ params["E"].T, layers


@positions
def test_the_model_is_its_equations(tiny_model, batch, variant, positions):
    """Equal tokens make degenerate pairs, and one offset is longer than the text."""
    offsets = ((1, 2, 5), (3, 10))
    params, config = tiny_model(**variant, positions=positions, context=12, offsets=offsets)
    texts, y = batch(2)
    found, cache = G.model_forward(params, config, texts)
    loss, _ = G.loss_and_grads(params, config, texts, y)
    losses = []
    for row, text in enumerate(texts):
        logits, layers = written_out(params, config, text)
        near(found[row], logits, 1e-11)
        for i, inside in enumerate(layers):
            for name, value in inside.items():
                near(cache["blocks"][i]["mix"][name][row], value, 1e-11)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses += [-math.log(p[t, token]) for t, token in enumerate(y[row])]
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)


# ---- streaming -----------------------------------------------------------------------------------


@pytest.fixture
def text():
    """Two hundred letters of three, thirty of them equal, so that pairs are degenerate."""
    text = np.random.default_rng(1).integers(0, 3, 200)
    text[50:80] = text[50]
    return text


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-10), (np.float32, 1e-3)])
def test_streaming_equals_forward_far_beyond_the_context(tiny_model, variant, dtype, atol, text):
    """Prompts shorter and longer than the memory's chunks, then token by token."""
    offsets = ((1, 2, 5), (1, 9))
    model = tiny_model(dtype, **variant, vocab_size=3, context=16, offsets=offsets)
    logits = G.forward(*model, text[None])[0]
    state = G.stream_init(*model)
    end = 0
    for size in (63, 1, 1, 65, *[1] * 70):
        start, end = end, end + size
        last, state = G.stream_read(*model, state, text[start:end])
        near(last, logits[end - 1], atol)
    assert last.dtype == dtype


@pytest.mark.parametrize("context", [8, 9])
def test_streaming_with_positions_re_reads_half_the_context(tiny_model, variant, context):
    """At the end of the context it goes on from the last context // 2 tokens, from position 0."""
    model = tiny_model(**variant, positions=True, context=context)
    text = np.random.default_rng(1).integers(0, 11, 30)
    state = G.stream_init(*model)
    window = []
    for token in text:
        if len(window) == context:
            window = window[-(context // 2) :]
        window.append(token)
        logits, state = G.stream_step(*model, state, token)
        near(logits, G.forward(*model, np.array([window]))[0, -1])
    at_once = G.stream_init(*model)
    G.stream_read(*model, at_once, text[:5])
    last, _ = G.stream_read(*model, at_once, text[5:])
    near(last, logits)


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    return tiny_model(vocab_size=7)


GREEDY = [
    {"temperature": 0},
    {"top_k": 1},
    {"temperature": 1e-300},
]


@pytest.mark.parametrize("how", GREEDY)
def test_greedy_sampling_takes_the_largest_logit(model, how):
    text = [3, 1, *G.generate(*model, [3, 1], 20, **how)]
    logits = G.forward(*model, np.array([text]))[0]
    np.testing.assert_array_equal(logits.argmax(-1)[1:-1], text[2:])


HOW = [
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 4},
    {"temperature": 3.0, "top_k": 100},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_frequencies_are_softmax_of_logits_over_temperature(model, how):
    """For the first token after (3, 1), with a thousand seeds, within four standard deviations."""
    logits = G.forward(*model, np.array([[3, 1]]))[0, -1]
    p = np.exp(logits / how["temperature"])
    p /= p.sum()
    likeliest = np.argsort(-p)
    if "top_k" in how:
        p[likeliest[how["top_k"] :]] = 0
    if "top_p" in how:
        enough = np.flatnonzero(np.cumsum(p[likeliest]) >= how["top_p"])[0]
        p[likeliest[enough + 1 :]] = 0
    p /= p.sum()
    draws = [next(G.generate(*model, [3, 1], 1, seed=seed, **how)) for seed in range(1000)]
    frequencies = np.bincount(draws, minlength=7) / 1000
    deviations = np.sqrt(p * (1 - p) / 1000)
    assert (np.abs(frequencies - p) <= 4 * deviations).all()


@pytest.fixture
def write(tiny_model):
    def write(prompt, n=30, positions=False):
        model = tiny_model(positions=positions)
        return list(G.generate(*model, prompt, n))

    return write


def test_a_prompt_is_any_iterable(write):
    expected = write([1, 2])
    assert write(iter([1, 2])) == expected
    assert write(np.array([1, 2])) == expected


def test_an_empty_prompt_is_token_0(write):
    assert write([]) == write([0])


# ---- sizes and configurations --------------------------------------------------------------------

SCALES = {
    "taps": 0.5,
    "W_red": 1 / 8,
    "W_kv": 1 / 8,
    "W_2": 0.01,
    "W_out": 0.01,
}


def test_initial_weights(tiny_config, variant):
    config = tiny_config(**variant, vocab_size=50, d_model=64, rank=16, d_ff=256, positions=True)
    params = G.init_params(config, seed=3)
    G.check_model(params, config)
    for name, value in params.items():
        kind = name.split(".")[-1]
        assert value.dtype == np.float32
        if value.ndim == 1:
            assert (value == (kind == "w")).all()
        else:
            scale = SCALES.get(kind, 0.02)
            assert value.std() == pytest.approx(scale, rel=5 / np.sqrt(value.size))


def test_another_seed_draws_other_weights(tiny_config):
    one = G.init_params(tiny_config(), seed=3)
    other = G.init_params(tiny_config(), seed=4)
    assert not np.array_equal(one["E"], other["E"])


def test_defaults_that_follow_from_other_values():
    config = G.Config(65)
    attention = G.Config(65, mixer="attention")
    assert config.d_ff == 2 * config.d_model
    assert config.offsets == G.WIDENING
    assert attention.d_ff == 4 * attention.d_model
    assert attention.offsets == ()


def test_default_offsets_widen_with_the_quarters_of_the_layers():
    layers = G.Config(65, n_layer=6).offsets
    assert [G.WIDENING.index(layer) for layer in layers] == [0, 1, 1, 2, 3, 3]


def test_default_offsets_without_taps_are_one_a_layer():
    config = G.Config(65, taps=False, n_layer=5)
    assert config.offsets == ((1,), (2,), (4,), (8,), (1,))


def test_default_offsets_are_shorter_than_the_context():
    assert G.Config(65, n_layer=2, context=5).offsets == (G.WIDENING[1], (1, 2, 4))
    assert G.Config(65, n_layer=1, context=2).offsets == ((1,),)


def test_a_changed_copy_keeps_what_was_given(tiny_config):
    config = dataclasses.replace(tiny_config(), taps=False, d_model=16)
    assert config.offsets == ((1,), (1, 3))
    assert config.d_ff == 10


def test_a_config_cannot_be_changed(tiny_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().rank = 6


CHANGED = [{"taps": False}, {"n_layer": 5}, {"mixer": "attention"}, {"d_model": 64}, {"context": 5}]


@pytest.mark.parametrize("changes", CHANGED, ids=str)
def test_a_changed_copy_derives_anew_what_was_not_given(changes):
    assert dataclasses.replace(G.Config(65), **changes) == G.Config(65, **changes)


def test_a_copied_state_branches_a_stream(model):
    _, state = G.stream_read(*model, G.stream_init(*model), [3, 1])
    G.stream_step(*model, dict(state), 4)
    logits, _ = G.stream_step(*model, state, 5)
    np.testing.assert_allclose(logits, G.forward(*model, np.array([[3, 1, 5]]))[0, -1], atol=1e-5)


def test_the_pairs_cannot_be_changed():
    i, _ = G.pairs(4)
    with pytest.raises(ValueError, match="read-only"):
        i[0] = 3


def test_sizes_from_numpy_make_the_same_config(tiny_config):
    config = tiny_config(vocab_size=np.int64(11), offsets=[[np.int32(1)], [1, 3]])
    assert config == tiny_config()
    assert hash(config) == hash(tiny_config())
    assert type(config.vocab_size) is int
    assert type(config.offsets[0][0]) is int


WRONG = [  # what is said, and the changes of tiny_config
    ("rank must be at least 2, not 1", {"rank": 1}),
    ("n_layer must be at least 1, not 0", {"n_layer": 0}),
    ("n_layer must be at most 1000", {"n_layer": 10**10}),
    ("memory must be True or False", {"memory": "False"}),
    ("d_ff must be at least 1, not 0", {"d_ff": 0}),
    ("dropout must be at least 0 and below 1", {"dropout": 1}),
    ("dropout must be at least 0 and below 1", {"dropout": -0.1}),
    ("dropout must be at least 0 and below 1", {"dropout": math.nan}),
    ("2 layers need as many groups of offsets, not 3", {"offsets": ((1,),) * 3}),
    ("offsets, all distinct", {"offsets": ((1, 1), (2,))}),
    ("offsets, all distinct", {"offsets": ((), (1,))}),
    ("1 to context - 1, here 8", {"offsets": ((1,), (0,))}),
    ("1 to context - 1, here 8", {"offsets": ((1,), (9,))}),
    ("partners that are not normalised", {"memory": True, "normalize": True}),
    ("n_head, 3, must divide d_model, 8", {"mixer": "attention", "n_head": 3}),
    ("neither memory nor offsets", {"mixer": "attention", "memory": True}),
    ("neither memory nor offsets", {"mixer": "attention", "offsets": ((1,),) * 2}),
    ("block must be one of", {"block": "postnorm"}),
    ("block must be one of", {"block": ["paper"]}),
    ("mixer must be one of", {"mixer": "lstm"}),
    ("mixer must be one of", {"mixer": {}}),
]


@pytest.mark.parametrize(("rule", "changes"), WRONG, ids=str)
def test_a_wrong_configuration_gets_a_sentence(rule, changes):
    """The sentence does not show the whole configuration."""
    sizes = {"context": 9, "n_layer": 2, "d_model": 8, "offsets": ((1,), (1, 3))}
    if "mixer" in changes:
        del sizes["offsets"]
    with pytest.raises(G.UserError, match=rule) as error:
        G.Config(11, **sizes | changes)
    assert "\n" not in str(error.value)
    assert "Config(" not in str(error.value)


@pytest.mark.parametrize("changes", [{"offsets": ((1.0,),)}, {"context": 2.5}], ids=str)
def test_a_size_that_is_no_whole_number_is_a_type_error(changes):
    with pytest.raises(TypeError):
        G.Config(11, n_layer=1, **changes)


# ---- what makes no sense -------------------------------------------------------------------------

TEXT = np.array([[1, 2, 3]])
refused = partial(pytest.raises, G.UserError)

WRONG_TOKENS = [
    (r"\(B, L\), not int64 of shape \(3,\)", TEXT[0]),
    (r"\(B, L\), not int64 of shape \(1, 0\)", TEXT[:, :0]),
    ("whole numbers.* not float64", TEXT / 1),
    ("from 0 to 6, not from -1 to 1", TEXT - 2),
    ("from 0 to 6, not from 5 to 7", TEXT + 4),
]


@pytest.mark.parametrize(("rule", "tokens"), WRONG_TOKENS)
def test_tokens_that_make_no_sense(model, rule, tokens):
    with refused(match=rule):
        G.forward(*model, tokens)


def test_drawing_refuses_a_negative_temperature(rng):
    with refused(match="temperature must"):
        G.sample(np.zeros(3), -1, None, rng)


@pytest.mark.parametrize("rows", [(5, 3), (-1, 4)], ids=str)
def test_rows_outside_the_batch(model, rows):
    with refused(match="rows"):
        G.loss_and_grads(*model, TEXT, TEXT, None, rows)


def test_both_sides_of_the_loss_are_checked(model):
    with refused(match="not from 6 to 8"):
        G.loss_and_grads(*model, TEXT + 5, TEXT)
    with refused(match="not from 6 to 8"):
        G.loss_and_grads(*model, TEXT, TEXT + 5)
    with refused(match="same shape"):
        G.loss_and_grads(*model, TEXT, TEXT[:, 1:])


WRONG_PARAMS = [
    ("P is .* no such parameter", {"P": TEXT}),
    ("E is", {"E": TEXT}),
]


@pytest.mark.parametrize(("rule", "wrong"), WRONG_PARAMS)
def test_parameters_that_do_not_fit_the_config(model, rule, wrong):
    params, config = model
    params |= wrong
    with refused(match=rule):
        G.forward(params, config, TEXT)
    with refused(match=rule):
        G.loss_and_grads(params, config, TEXT, TEXT)
    with refused(match=rule):
        G.stream_init(params, config)


def test_a_missing_parameter(model):
    params, config = model
    del params["E"]
    with refused(match="E is missing"):
        G.check_model(params, config)


def test_positions_end_with_the_context(tiny_model):
    model = tiny_model(positions=True)
    with refused(match="10 tokens exceed the context of 9"):
        G.forward(*model, np.ones((1, 10), int))


WRONG_READ = [
    ("nothing to read", []),
    ("tokens must be from 0 to 6$", [-1]),
    ("tokens must be from 0 to 6$", [7]),
]


@pytest.mark.parametrize(("rule", "tokens"), WRONG_READ)
def test_reading_what_makes_no_sense(model, rule, tokens):
    with refused(match=rule):
        G.stream_read(*model, G.stream_init(*model), tokens)


WRONG_SAMPLING = [
    ("not from 7 to 7", {"prompt": [7]}),
    ("number of tokens must be", {"n": -1}),
    ("temperature must", {"temperature": -1}),
    ("temperature must", {"temperature": math.inf}),
    ("top_k must", {"top_k": 0}),
]


@pytest.mark.parametrize(("rule", "how"), WRONG_SAMPLING)
def test_sampling_that_makes_no_sense(model, rule, how):
    """The error comes at once, not with the first token."""
    with refused(match=rule):
        G.generate(*model, **{"prompt": [1], "n": 1} | how)


def test_logits_that_are_not_finite(rng):
    with refused(match="not finite"):
        G.sample(np.array([0, np.nan]), 1, None, rng)


def test_a_matrix_of_other_rows_is_no_error_of_the_user():
    """x (4, 6) has as many numbers as 8 rows for W (3, 5). The traceback stays."""
    rule = r"x \(4, 6\) has rows of 6, but W \(3, 5\) takes rows of 3"
    with pytest.raises(ValueError, match=rule) as error:
        G.linear_forward(np.ones((4, 6)), np.ones((3, 5)), np.ones(5))
    assert error.type is ValueError
