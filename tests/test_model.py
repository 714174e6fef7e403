"""Whole models: what may depend on what, streaming, sampling, training, sizes, errors, checkpoints."""

import itertools
import json
import math

import numpy as np
import pytest
from finite_differences import ordinary_params, tiny_config

from grassmann import (
    Config,
    adamw_init,
    adamw_step,
    clip_grads,
    dropout_forward,
    forward,
    generate,
    get_batch,
    init_params,
    load_checkpoint,
    loss_and_grads,
    param_shapes,
    save_checkpoint,
    stream_init,
    stream_step,
    validation_loss,
)

VARIANTS = {
    "-".join([block, "taps" if taps else "average", *["normalized"] * norm]): {
        "block": block, "taps": taps, "normalize": norm,
    }
    for block, taps, norm in itertools.product(["prenorm", "paper"], [True, False], [True, False])
}  # fmt: skip
ATTENTION = {f"{block}-attention": {"block": block, "mixer": "attention"} for block in ["prenorm", "paper"]}


def variants(choices):
    return pytest.mark.parametrize("variant", choices.values(), ids=choices)


every_variant = variants(VARIANTS | ATTENTION)


def random_text(config, length, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, length)


# ---- the model, written out token by token ------------------------------------------------------------


def written_out(params, config, text):
    """Logits (L, V) for one text, from the equations of the paper and of our variants, as plainly as they stand."""

    def layernorm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * params[name + ".w"] + params[name + ".b"]

    def ffn(x, name):
        a = x @ params[name + "W_1"] + params[name + "b_1"]
        gelu = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        return gelu @ params[name + "W_2"] + params[name + "b_2"]

    def bivector(u, v):
        p = np.array([u[i] * v[j] - u[j] * v[i] for i, j in itertools.combinations(range(config.rank), 2)])
        area, base = np.linalg.norm(p), np.linalg.norm(u) * np.linalg.norm(v)
        if not config.normalize:
            return p
        return p / area if area > 1e-5 * base else 0 * p

    def grassmann_mix(hs, name, offsets):
        W = {key: params[name + key] for key in ["W_red", "b_red", "W_plu", "b_plu", "W_gate", "b_gate"]}
        z, mixed = [h @ W["W_red"] + W["b_red"] for h in hs], []
        for t, h in enumerate(hs):
            valid = [delta for delta in offsets if t >= delta]
            if config.taps:
                taps = dict(zip(offsets, params[name + "taps"], strict=True))
                p = bivector(z[t], sum((taps[delta] * z[t - delta] for delta in valid), np.zeros(config.rank)))
            else:
                p = sum(bivector(z[t], z[t - delta]) for delta in valid) / max(1, len(valid))
            g = p @ W["W_plu"] + W["b_plu"] if valid else W["b_plu"]
            alpha = 1 / (1 + np.exp(-(np.concatenate([h, g]) @ W["W_gate"] + W["b_gate"])))
            mixed.append(alpha * h + (1 - alpha) * g)
        return mixed

    def attention(hs, name):
        size, mixed = config.d_model // config.n_head, []
        q, k, v = np.split(np.array(hs) @ params[name + "W_qkv"] + params[name + "b_qkv"], 3, axis=1)
        for t in range(len(hs)):
            heads = []
            for one in (slice(start, start + size) for start in range(0, config.d_model, size)):
                weights = np.exp([q[t, one] @ k[past, one] / math.sqrt(size) for past in range(t + 1)])
                heads.append(weights / weights.sum() @ v[: t + 1, one])
            mixed.append(np.concatenate(heads) @ params[name + "W_out"] + params[name + "b_out"])
        return mixed

    def mix(hs, i):
        name = f"blocks.{i}.mix."
        return attention(hs, name) if config.mixer == "attention" else grassmann_mix(hs, name, config.offsets[i])

    hs = [params["E"][token] + (params["P"][t] if config.positions else 0) for t, token in enumerate(text)]
    for i in range(config.n_layer):
        ln1, ln2, inner = f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"blocks.{i}.ffn."
        if config.block == "prenorm":
            hs = [h + m for h, m in zip(hs, mix([layernorm(h, ln1) for h in hs], i), strict=True)]
            hs = [h + ffn(layernorm(h, ln2), inner) for h in hs]
        else:
            residual = config.mixer == "attention"
            hs = [layernorm(m + h * residual, ln1) for h, m in zip(hs, mix(hs, i), strict=True)]
            hs = [layernorm(h + ffn(h, inner), ln2) for h in hs]
    if config.block == "prenorm":
        hs = [layernorm(h, "ln_f") for h in hs]
    return np.array(hs) @ params["E"].T


@every_variant
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "anywhere"])
def test_forward_and_loss_are_the_equations(variant, positions):
    config = tiny_config(**variant, positions=positions, offsets=((1, 2, 5), (3,)), n_head=2)
    params, texts = ordinary_params(config), random_text(config, (2, 9))
    texts[1, 2:5] = texts[1, 1]  # equal letters
    logits = np.array([written_out(params, config, text) for text in texts])
    np.testing.assert_allclose(forward(params, config, texts), logits, rtol=0, atol=1e-11)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = random_text(config, (2, 9), seed=2)
    expected = -np.mean([math.log(p[row, t, y[row, t]]) for row, t in np.ndindex(2, 9)])
    assert loss_and_grads(params, config, texts, y)[0] == pytest.approx(expected, rel=1e-12)


def test_dropout_keeps_the_mean(rng):
    """A fraction `rate` becomes 0, the rest is divided by 1 - rate."""
    x = rng.standard_normal((100, 100))
    out, _ = dropout_forward(x, 0.3, rng)
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.02)
    np.testing.assert_allclose(out[out != 0], x[out != 0] / 0.7, rtol=1e-6)
    for rate, generator in [(0.3, None), (0.0, rng)]:
        np.testing.assert_array_equal(dropout_forward(x, rate, generator)[0], x)


# ---- what may depend on what --------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "anywhere"])
def test_causality(variant, positions):
    """Other tokens after t leave the logits up to t as they are; another token at t changes them from t on."""
    config = tiny_config(**variant, positions=positions, context=12, offsets=((1, 2), (1, 3)))
    params = ordinary_params(config)
    tokens = random_text(config, (2, 12))
    logits = forward(params, config, tokens)
    for t in range(11):
        others = tokens.copy()
        others[:, t + 1 :] = (others[:, t + 1 :] + 1 + random_text(config, (2, 11 - t)) % 10) % 11
        changed = np.abs(forward(params, config, others) - logits).max(-1)  # (B, L)
        assert changed[:, : t + 1].max() < 1e-12
        assert changed[:, t + 1].min() > 1e-3


@every_variant
def test_texts_of_a_batch_do_not_mix(variant):
    config = tiny_config(**variant)
    params, tokens = ordinary_params(config), random_text(config, (3, 9))
    together = forward(params, config, tokens)
    for row in range(3):
        np.testing.assert_allclose(forward(params, config, tokens[row : row + 1])[0], together[row], atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_translation_invariance_without_positions(normalize):
    """A token that every offset can reach sees the same past wherever it stands; with positions it does not."""
    config = tiny_config(normalize=normalize, offsets=((1, 2), (1, 2)), context=16)
    params, text = ordinary_params(config), random_text(config, (1, 12))
    later = np.concatenate([random_text(config, (1, 4), seed=2), text], 1)
    reach = 4
    same = forward(params, config, later)[0, 4 + reach :]
    np.testing.assert_allclose(same, forward(params, config, text)[0, reach:], atol=1e-12)
    config = tiny_config(normalize=normalize, offsets=((1, 2), (1, 2)), context=16, positions=True)
    params = ordinary_params(config)
    shift = forward(params, config, later)[0, 4 + reach :] - forward(params, config, text)[0, reach:]
    assert np.abs(shift).max(-1).min() > 1e-3


def test_positions_end_at_the_context():
    config = tiny_config(positions=True)
    assert forward(ordinary_params(config), config, np.zeros((1, 9), int)).shape == (1, 9, 11)
    with pytest.raises(ValueError, match="10 tokens exceed the context of 9"):
        forward(ordinary_params(config), config, np.zeros((1, 10), int))


# ---- streaming ----------------------------------------------------------------------------------------


def stream(params, config, tokens):
    state, logits = stream_init(params, config), []
    for token in tokens:
        step, state = stream_step(params, config, state, token)
        logits.append(step)
    return np.array(logits)


def sizes(value) -> list[int]:
    """The bytes behind all arrays, and the lengths of all lists, inside a state."""
    if isinstance(value, dict):
        return [size for item in value.values() for size in sizes(item)]
    if isinstance(value, (list, tuple)):
        return [len(value), *(size for item in value for size in sizes(item))]
    if isinstance(value, np.ndarray):
        return [value.nbytes if value.base is None else value.base.nbytes]
    return []


@variants(VARIANTS)
def test_streaming_equals_forward_far_beyond_the_context(variant):
    config = tiny_config(**variant, context=16, offsets=((1, 2, 5), (1, 9)))
    params, text = ordinary_params(config), random_text(config, 3000)
    np.testing.assert_allclose(stream(params, config, text), forward(params, config, text[None])[0], atol=1e-10)


@variants(VARIANTS)
def test_streaming_in_float32(variant):
    """Equal letters make degenerate pairs, which one row and many rows must recognise alike."""
    config = tiny_config(**variant, vocab_size=3)
    params, text = ordinary_params(config, dtype=np.float32), random_text(config, 300)
    text[50:80] = text[50]
    logits = stream(params, config, text)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, forward(params, config, text[None])[0], atol=1e-3)


@variants(ATTENTION)
def test_streaming_attention_equals_forward(variant):
    config = tiny_config(**variant)
    params, text = ordinary_params(config), random_text(config, 300)
    np.testing.assert_allclose(stream(params, config, text), forward(params, config, text[None])[0], atol=1e-10)


def test_the_state_does_not_grow():
    """Per layer it holds the last max(Δ) reduced states and at most one more: 6 and 4 rows of 4 float64."""
    config = tiny_config(offsets=((1, 5), (3,)))
    params = ordinary_params(config)
    state, seen = stream_init(params, config), []
    for token in random_text(config, 200):
        _, state = stream_step(params, config, state, token)
        seen.append(sizes(state))
    assert seen[10:] == [seen[10]] * 190
    assert sum(seen[10]) < (6 + 4) * 4 * 8 + 20


@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_with_positions_the_state_grows_up_to_the_context_only(mixer):
    config = tiny_config(mixer=mixer, positions=True)
    params = ordinary_params(config)
    state, seen = stream_init(params, config), []
    for token in random_text(config, 200):
        _, state = stream_step(params, config, state, token)
        seen.append(sum(sizes(state)))
    assert max(seen[20:]) <= max(seen[:20])


def test_streams_do_not_share_their_state():
    config = tiny_config()
    params, (a, b) = ordinary_params(config), random_text(config, (2, 20))
    states, logits = [stream_init(params, config) for _ in range(2)], []
    for tokens in zip(a, b, strict=True):
        for k in range(2):
            step, states[k] = stream_step(params, config, states[k], tokens[k])
            logits.append(step)
    np.testing.assert_allclose(logits[::2], stream(params, config, a), atol=1e-14)
    np.testing.assert_allclose(logits[1::2], stream(params, config, b), atol=1e-14)


@every_variant
@pytest.mark.parametrize("context", [8, 9])
def test_streaming_with_positions_re_reads_half_the_context(variant, context):
    """At the context's end the decoder goes on from the last context // 2 tokens, at positions 0, 1, …"""
    config = tiny_config(**variant, positions=True, context=context, offsets=((1,), (1, 3)))
    params, text, window = ordinary_params(config), random_text(config, 60), []
    logits = stream(params, config, text)
    np.testing.assert_allclose(logits[:context], forward(params, config, text[None, :context])[0], atol=1e-12)
    for token, streamed in zip(text, logits, strict=True):
        if len(window) == context:
            window = window[-(context // 2) :]
        window.append(token)
        np.testing.assert_allclose(streamed, forward(params, config, np.array([window]))[0, -1], atol=1e-12)


# ---- sampling -----------------------------------------------------------------------------------------


@pytest.fixture
def model():
    config = tiny_config(vocab_size=7)
    return ordinary_params(config), config


def last_logits(model, text):
    params, config = model
    return forward(params, config, np.array([text]))[0, -1]


def test_generate_is_a_function_of_its_seed(model):
    texts = [list(generate(*model, [1, 2], 30, seed=seed)) for seed in [0, 0, 1]]
    assert texts[0] == texts[1] != texts[2]
    assert all(0 <= token < 7 for token in texts[0])


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-300}])
def test_greedy_sampling_takes_the_largest_logit(model, how):
    prompt = [3, 1]
    text = prompt + list(generate(*model, prompt, 20, **how))
    for k in range(2, len(text)):
        assert text[k] == last_logits(model, text[:k]).argmax()


@pytest.mark.parametrize("positions", [True, False])
def test_generate_goes_on_beyond_the_context(positions):
    config = tiny_config(positions=positions)
    tokens = list(generate(ordinary_params(config), config, [1] * 20, 50))
    assert len(tokens) == 50


@pytest.mark.parametrize("k", [2, 3, 6])
def test_top_k_draws_all_of_the_k_likeliest_and_no_other(model, k):
    likeliest = np.argsort(last_logits(model, [3, 1]))[::-1][:k]
    drawn = {next(generate(*model, [3, 1], 1, temperature=3.0, top_k=k, seed=seed)) for seed in range(200)}
    assert drawn == set(likeliest.tolist())


def test_top_k_of_the_whole_vocabulary_or_more_restricts_nothing(model):
    free = list(generate(*model, [1], 50))
    assert free == list(generate(*model, [1], 50, top_k=7)) == list(generate(*model, [1], 50, top_k=100))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 4)])
def test_frequencies_are_softmax_of_logits_over_temperature(model, temperature, top_k):
    n = 2000
    drawn = [next(generate(*model, [3, 1], 1, temperature, top_k, seed)) for seed in range(n)]
    logits = last_logits(model, [3, 1])
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p[np.argsort(logits)[:-top_k]] = 0
    p /= p.sum()
    deviation = np.bincount(drawn, minlength=7) / n - p
    assert (np.abs(deviation) <= 4 * np.sqrt(p * (1 - p) / n)).all()  # four standard deviations


def test_an_empty_prompt_starts_from_token_0(model):
    assert list(generate(*model, [], 10)) == list(generate(*model, [0], 10))
    assert list(generate(*model, iter([2, 5]), 10)) == list(generate(*model, np.array([2, 5]), 10))


def test_every_token_of_the_vocabulary_may_be_in_the_prompt(model):
    assert len(list(generate(*model, range(7), 5))) == 5


def test_generate_nothing(model):
    assert list(generate(*model, [1, 2], 0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([7], 1), "outside"), (([-1], 1), "outside"), (([0, 99], 0), "outside"),
        (([0], 1, -0.1), "temperature"), (([0], 1, math.nan), "temperature"), (([0], 1, math.inf), "temperature"),
        (([0], 1, 1.0, 0), "top_k"), (([0], 1, 1.0, -3), "top_k"),
    ],
)  # fmt: skip
def test_generate_refuses_what_it_cannot_do_at_once(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(*model, *arguments)  # before anything is drawn


# ---- training -----------------------------------------------------------------------------------------


@every_variant
def test_one_batch_can_be_learned_by_heart(variant):
    config = tiny_config(**variant, positions=True, d_model=16)
    params, text = init_params(config), random_text(config, (2, 10))
    state = adamw_init(params)
    for step in range(200):
        loss, grads = loss_and_grads(params, config, text[:, :-1], text[:, 1:])
        clip_grads(grads, 1.0)
        adamw_step(params, grads, state, step, lr=2e-2, weight_decay=0.0)
    assert loss < 0.02


@variants({"prenorm": {}, "paper": {"block": "paper", "taps": False, "normalize": True, "positions": True},
           "attention": {"mixer": "attention"}})  # fmt: skip
def test_the_first_loss_is_that_of_guessing(variant):
    """At the default size of train_char.py: every token equally likely, ln V nats."""
    offsets = ((1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8, 12, 16))
    config = Config(65, context=64, n_layer=4, d_model=128, rank=32, offsets=offsets, d_ff=256, **variant)
    text = random_text(config, (4, 65))
    loss, _ = loss_and_grads(init_params(config), config, text[:, :-1], text[:, 1:])
    assert loss == pytest.approx(math.log(65), rel=0.05)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_is_a_function_of_its_seed(threads):
    def run(seed):
        config = tiny_config(dropout=0.1)
        text = random_text(config, 500)
        params = init_params(config, seed)
        state, losses = adamw_init(params), []
        for step in range(20):
            x, y = get_batch(text, 4, config.context, seed, step)
            loss, grads = loss_and_grads(params, config, x, y, (seed, step), threads)
            clip_grads(grads, 1.0)
            adamw_step(params, grads, state, step, lr=1e-2)
            losses.append(float(loss))
        return losses, params

    (losses, params), (losses_again, params_again), (other_losses, _) = run(1), run(1), run(2)
    assert losses == losses_again
    assert losses != other_losses
    for name in params:
        np.testing.assert_array_equal(params[name], params_again[name])


@pytest.mark.parametrize("length", [2, 5, 10, 19, 20, 28, 29, 400, 8000])
@pytest.mark.parametrize("positions", [True, False])
def test_validation_loss_takes_every_target_once(length, positions):
    """Consecutive windows of the context (9), the last one as short as it is; the sum over the number of targets."""
    config = tiny_config(positions=positions)
    params, text = ordinary_params(config), random_text(config, length)
    total = 0.0
    for start in range(0, length - 1, 9):
        x, y = text[start : min(start + 9, length - 1)], text[start + 1 : start + 10]
        logits = forward(params, config, x[None])[0]
        logits -= logits.max(-1, keepdims=True)
        total += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]).sum()
    for threads in [1, 2]:
        assert validation_loss(params, config, text, threads) == pytest.approx(total / (length - 1), rel=1e-12)


# ---- sizes and configurations -------------------------------------------------------------------------


def test_names_and_shapes():
    """Those of SPEC's model, in full: V 11, context 9, d 8, r 4, n 6, d_ff 10, m 2."""
    block = {
        "ln1.w": (8,), "ln1.b": (8,), "ln2.w": (8,), "ln2.b": (8,),
        "mix.W_red": (8, 4), "mix.b_red": (4,), "mix.taps": (2, 4), "mix.W_plu": (6, 8), "mix.b_plu": (8,),
        "mix.W_gate": (16, 8), "mix.b_gate": (8,),
        "ffn.W_1": (8, 10), "ffn.b_1": (10,), "ffn.W_2": (10, 8), "ffn.b_2": (8,),
    }  # fmt: skip
    around = {"E": (11, 8), "P": (9, 8), "ln_f.w": (8,), "ln_f.b": (8,)}
    one = {"n_layer": 1, "offsets": ((1, 3),)}
    expected = around | {f"blocks.0.{name}": shape for name, shape in block.items()}
    assert param_shapes(tiny_config(**one, positions=True)) == expected
    for name in ["P", "ln_f.w", "ln_f.b", "blocks.0.mix.taps"]:
        del expected[name]
    assert param_shapes(tiny_config(**one, block="paper", taps=False)) == expected
    expected = {name: shape for name, shape in expected.items() if ".mix." not in name}
    attention = {"W_qkv": (8, 24), "b_qkv": (24,), "W_out": (8, 8), "b_out": (8,)}
    expected |= {f"blocks.0.mix.{name}": shape for name, shape in attention.items()}
    assert param_shapes(tiny_config(**one, block="paper", mixer="attention")) == expected
    assert {name.split(".")[1] for name in param_shapes(tiny_config(n_layer=2)) if name[0] == "b"} == {"0", "1"}


@pytest.mark.parametrize(
    ("context", "offsets", "millions"),
    [(128, (1, 2, 4, 8, 12, 16), 12.61), (256, (1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16), 17.40)],
)
def test_the_papers_sizes(context, offsets, millions):
    layers = tuple((delta,) for delta in offsets)
    config = Config(
        30522, context, len(layers), 256, 32, layers, block="paper", taps=False, normalize=True, positions=True
    )
    assert sum(map(math.prod, param_shapes(config).values())) / 1e6 == pytest.approx(millions, abs=0.005)


@every_variant
def test_initial_weights(variant):
    """Ones, zeros, N(0, 0.02²), N(0, 0.5²) for taps, N(0, 1/d) for W_red; over sqrt(2N) what writes into the stream."""
    config = tiny_config(**variant, vocab_size=50, d_model=64, rank=16, d_ff=256, positions=True, context=50)
    params = init_params(config, seed=3)
    assert {name: value.shape for name, value in params.items()} == param_shapes(config)
    assert list(params) == list(param_shapes(config))
    for name, value in params.items():
        kind = name.split(".")[-1]
        assert value.dtype == np.float32
        if value.ndim == 1:
            assert (value == (1 if kind == "w" else 0)).all()
            continue
        scale = {"taps": 0.5, "W_red": 1 / 8, "W_2": 0.01, "W_out": 0.01}.get(kind, 0.02)  # 2N = 4, d = 64
        assert value.std() == pytest.approx(scale, rel=5 / np.sqrt(value.size))
    for name, value in init_params(config, seed=3, dtype=np.float64).items():
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value.astype(np.float32), params[name])
    assert not np.array_equal(init_params(config, seed=4)["E"], params["E"])


def test_defaults_and_numpy_sizes():
    config = tiny_config(d_ff=None)
    assert config.d_ff == 32
    assert (config.block, config.mixer, config.dropout) == ("prenorm", "grassmann", 0.0)
    assert tiny_config(vocab_size=np.int64(11), offsets=[[np.int32(1)], [1, 3]]) == tiny_config()
    assert tiny_config(mixer="attention", offsets=None).offsets == ()


WRONG = [
    *({"offsets": offsets} for offsets in [
        ((0,), (1,)), ((1,), (-1,)), ((1, 1), (2,)), ((1,), (9,)), ((1,),), ((1,), (1,), (1,)), (), ((), (1,)),
        ((1.0,), (1,)), (("1",), (1,)), (1, 2), None, 3, "12", ((1,), None),
    ]),
    *({name: value} for name in ["vocab_size", "context", "n_layer", "d_model", "d_ff", "n_head"]
      for value in [0, -1, 2.0, "3", True, None if name != "d_ff" else 2.5, math.nan]),
    {"d_model": None, "d_ff": None},
    *({"rank": rank} for rank in [1, 0, 4.0, None, True]),
    *({"dropout": rate} for rate in [1.0, -0.1, 2, math.nan, math.inf, "0.1", None, True, False]),
    *({name: value} for name in ["taps", "normalize", "positions"] for value in [0, 1, None, "yes"]),
    {"block": "postnorm"}, {"block": None}, {"mixer": "lstm"}, {"mixer": ["grassmann"]},
    {"mixer": "attention", "n_head": 3}, {"mixer": "attention", "n_head": 16}, {"mixer": "attention", "n_head": 0},
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG, ids=map(str, WRONG))
def test_a_wrong_configuration_gets_a_sentence(changes):
    with pytest.raises(ValueError, match="must") as error:
        tiny_config(**changes)
    sentence = str(error.value)
    assert sentence.split()[0] in {*changes, "offset", "the"}
    assert "\n" not in sentence


# ---- checkpoints --------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_checkpoint_round_trip(tmp_path, variant, dtype):
    config = tiny_config(**variant, vocab_size=4, positions=True, dropout=0.1)
    params = ordinary_params(config, dtype=dtype)
    adam = {"adam_m": ordinary_params(config, 1, dtype), "adam_v": ordinary_params(config, 2, dtype)}
    facts = {"vocab": [0, 65, 0xD800, 0x10FFFF], "step": 3, "seed": 2**63, "losses": [0.1, 1e-300], "best": None,
             "settings": {"data": "é\ud800\x00", "deep": [[1], {"a": True}]}}  # fmt: skip
    save_checkpoint(tmp_path / "a.npz", params, config, **adam, **facts)
    params_2, config_2, extra = load_checkpoint(tmp_path / "a.npz")
    assert config_2 == config
    assert {key: value for key, value in extra.items() if key not in adam} == facts
    for group, loaded in [(params, params_2), *((adam[key], extra[key]) for key in adam)]:
        assert list(group) == list(loaded)
        for name in group:
            assert loaded[name].dtype == dtype
            assert loaded[name].flags.writeable  # training goes on in place
            np.testing.assert_array_equal(loaded[name], group[name])


def test_a_checkpoint_is_an_ordinary_npz(tmp_path):
    config = tiny_config()
    params = ordinary_params(config)
    save_checkpoint(tmp_path / "a.npz", params, config, **adamw_init(params), step=7)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        groups = ["param", "adam_m", "adam_v"]
        documents = set(file) - {f"{group}/{name}" for group in groups for name in params}
        assert len(documents) == 1
        text = file[documents.pop()].tobytes().decode()
        np.testing.assert_array_equal(file["param/E"], params["E"])
    assert json.loads(text)["config"]["offsets"] == [[1], [1, 3]]
    assert "7" in text


def test_a_configuration_of_numpy_integers_can_be_saved(tmp_path):
    config = tiny_config(vocab_size=np.int64(11), rank=np.int32(4))
    save_checkpoint(tmp_path / "a.npz", ordinary_params(config), config)
    assert load_checkpoint(tmp_path / "a.npz")[1] == config


def test_a_second_save_replaces_the_first(tmp_path):
    config = tiny_config()
    for seed in [1, 2]:
        save_checkpoint(str(tmp_path / "a.npz"), ordinary_params(config, seed), config, step=seed)
    params, _, extra = load_checkpoint(str(tmp_path / "a.npz"))
    assert extra == {"step": 2}
    np.testing.assert_array_equal(params["E"], ordinary_params(config, 2)["E"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_one_changed_number_is_noticed(tmp_path):
    """The smallest damage that still leaves a readable file; more kinds of it are in the tests of the programs."""
    config = tiny_config()
    save_checkpoint(tmp_path / "a.npz", ordinary_params(config), config)
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    arrays["param/E"][0, 0] += 1e-3
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="checksum"):
        load_checkpoint(tmp_path / "a.npz")


def test_parameters_in_any_memory_order_are_saved_as_they_are(tmp_path):
    config = tiny_config()
    params = ordinary_params(config)
    save_checkpoint(tmp_path / "a.npz", {name: np.asfortranarray(value) for name, value in params.items()}, config)
    loaded, _, _ = load_checkpoint(tmp_path / "a.npz")
    for name in params:
        np.testing.assert_array_equal(loaded[name], params[name])
