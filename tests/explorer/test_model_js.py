"""model.js against grassmann.py: the same logits, whatever the model; and what is kept while one types."""

import numpy as np
import pytest

import grassmann as G
from text import encode


def python_logits(params, config, tokens):
    """`forward`; with positions, beyond the context, what the streaming decoder sees."""
    if not config.positions or len(tokens) <= config.context:
        return G.forward(params, config, tokens[None])[0]
    state = G.stream_init(params, config)
    return np.stack([G.stream_step(params, config, state, int(token))[0] for token in tokens])


def same(a, b):
    return np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def random_text(vocab, length, seed=0):
    return "".join(chr(vocab[k]) for k in np.random.default_rng(seed).integers(0, len(vocab), length))


def test_logits_of_every_variant(explore, variant):
    page = explore(variant.params, variant.config, variant.vocab)
    for length in (1, 2, 50, 2000):
        text = random_text(variant.vocab, length)
        tokens = encode(text, variant.vocab)
        assert same(page.logits(text), python_logits(variant.params, variant.config, tokens))


def test_what_is_kept_while_typing_equals_reading_anew(explore, variant):
    page, text = explore(variant.params, variant.config, variant.vocab), random_text(variant.vocab, 120)
    edits = [text, text[:60] + "abc" + text[60:], "q" + text, text[:50] + text[53:], text[:40] + "a" + text[41:],
             text[20:], text + "aaa", text[:90], "", "ab", text]
    for edited in edits:
        page.type(edited)
        tokens = encode(edited, variant.vocab)
        assert page.js("return explorer.shown().tokens") == tokens.tolist()
        if len(tokens) > 1:
            logits = python_logits(variant.params, variant.config, tokens)
            losses = [G.cross_entropy_forward(a[None], b[None])[0] for a, b in zip(logits, tokens[1:], strict=False)]
            np.testing.assert_allclose(page.bits(), np.array(losses) / np.log(2), rtol=1e-3, atol=1e-3)


def test_a_large_alphabet_and_text_from_right_to_left(explore):
    vocab = [*range(0x20, 0x7f), *range(0x5d0, 0x5eb), *range(0x621, 0x64b), *range(0x4e00, 0x5a00), 0x1f600]
    config = G.Config(len(vocab), n_layer=1, d_model=16, rank=4, context=8)
    params = G.init_params(config)
    text = "שלום عربي 一丁七 \U0001f600"
    page = explore(params, config, vocab, text)
    assert same(page.logits(text), python_logits(params, config, encode(text, vocab)))
    assert page.text("#cells") == text
    assert page.js("return getComputedStyle(document.getElementById('cells')).direction") == "rtl"


def test_large_values_stay_finite_and_a_pair_without_a_plane_counts_as_zero(explore):
    config = G.Config(2, n_layer=1, d_model=8, rank=4, context=8, offsets=((1,),), taps=False, normalize=True)
    params = {name: a * np.float32(1e4) for name, a in G.init_params(config).items()}
    page = explore(params, config, [97, 98])
    for text in ("aaaa", "abab"):  # equal letters without positions: z ∧ z = 0
        assert same(page.logits(text), python_logits(params, config, encode(text, [97, 98])))


def test_writing_at_temperature_0_is_what_python_writes(explore, variant):
    page = explore(variant.params, variant.config, variant.vocab)
    page.type("abc")
    page.js("document.getElementById('temperature').value = 0")
    written = page.js("return write(explorer.shown().letters(), 100)")
    tokens = G.generate(variant.params, variant.config, encode("abc", variant.vocab), 100, temperature=0)
    assert written == "".join(chr(variant.vocab[k]) for k in tokens)


@pytest.mark.parametrize("top_k, temperature", [(1, 1.0), (3, 0.5), (None, 2.0)])
def test_sample_draws_as_often_as_the_probabilities_say(explore, top_k, temperature):
    config = G.Config(6, n_layer=1, d_model=4, rank=2, context=4)
    page, logits = explore(G.init_params(config), config, list(range(97, 103))), np.array([0, 1, 2, 3, 1.5, -1.0])
    counts = page.js("""const [logits, temperature, top_k] = arguments, random = random_numbers(1), counts = Array(6).fill(0);
        const scratch = new Float32Array(6), list = Float32Array.from(logits);
        for (let n = 0; n < 20000; n++) counts[sample(list, temperature, top_k ?? Infinity, random, scratch)]++;
        return counts""", logits.tolist(), temperature, top_k)
    kept = logits >= np.sort(logits)[-(top_k or 6)]
    p = np.where(kept, np.exp(logits / temperature), 0)
    np.testing.assert_allclose(np.array(counts) / 20000, p / p.sum(), atol=0.015)
