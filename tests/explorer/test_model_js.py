"""model.js against grassmann.py: the same logits, whatever the model and the edits to a text."""

import numpy as np
import pytest
from conftest import KINDS, random_model

import grassmann as G
from charlm.text import decode, encode

every_kind = pytest.mark.parametrize(
    "model", [random_model(**kind) for kind in KINDS.values()], ids=KINDS
)


def python_logits(params, config, tokens):
    """`forward`; with positions, beyond the context, what the streaming decoder sees."""
    if not config.positions or len(tokens) <= config.context:
        return G.forward(params, config, tokens[None])[0]
    state = G.stream_init(params, config)
    return np.stack([G.stream_step(params, config, state, int(token))[0] for token in tokens])


def same_logits(page, model, text):
    logits = python_logits(model.params, model.config, encode(text, model.vocab))
    return (
        np.abs(page.js("explorer.logits(arguments[0])", text) - logits).max()
        <= 1e-4 * np.abs(logits).max()
    )


def random_text(vocab, length):
    return decode(np.random.default_rng(0).integers(0, len(vocab), length), vocab)


@every_kind
def test_logits_of_every_kind_and_writing_at_temperature_0(explore, model):
    page = explore(model, "abc")
    for length in (1, 2, 50, 2000):
        assert same_logits(page, model, random_text(model.vocab, length))
    page.js("$('temperature').value = 0")
    tokens = G.generate(model.params, model.config, encode("abc", model.vocab), 100, temperature=0)
    assert page.js("write(shown().letters(), 100)") == decode(tokens, model.vocab)


@every_kind
def test_what_is_kept_while_typing_equals_reading_again(explore, model):
    page, text = explore(model), random_text(model.vocab, 120)
    edits = [
        text,
        text[:60] + "abc" + text[60:],
        "q" + text,
        text[:50] + text[53:],
        text[:40] + "a" + text[41:],
        text[20:],
        text + "aaa",
        text[:90],
        "",
        "ab",
        text,
    ]
    for edited in edits:
        page.type(edited)
        tokens = encode(edited, model.vocab)
        assert page.js("shown().tokens") == tokens.tolist()
        if len(tokens) > 1:
            logits = python_logits(model.params, model.config, tokens)
            losses = [
                G.cross_entropy_forward(a[None], b)[0]
                for a, b in zip(logits, tokens[1:, None], strict=False)
            ]
            np.testing.assert_allclose(
                page.bits(), np.array(losses) / np.log(2), rtol=1e-3, atol=1e-3
            )


def test_a_large_alphabet_from_right_to_left_and_pairs_without_a_plane(explore):
    letters = [
        *range(0x20, 0x7F),
        *range(0x5D0, 0x5EB),
        *range(0x621, 0x64B),
        *range(0x4E00, 0x5A00),
        0x1F600,
    ]
    model, text = random_model("".join(map(chr, letters)), n_layer=1), "שלום عربي 一丁七 \U0001f600"
    page = explore(model, text)
    assert same_logits(page, model, text) and page.text("#cells") == text
    assert page.js("getComputedStyle($('cells')).direction") == "rtl"
    model = random_model(n_layer=1, offsets=((1,),), taps=False, normalize=True)
    model.params = {
        name: a * np.float32(1e4) for name, a in G.init_params(model.config).items()
    }  # stay finite
    page = explore(model)
    assert same_logits(page, model, "aaaa") and same_logits(
        page, model, "abab"
    )  # without positions, z ∧ z = 0


@pytest.mark.parametrize("top_k, temperature", [(1, 1.0), (3, 0.5), (None, 2.0)])
def test_sample_draws_as_often_as_the_probabilities_say(explore, top_k, temperature):
    logits = np.array([0, 1, 2, 3, 1.5, -1.0])
    drawn = explore().js(
        """const [logits, temperature, top_k] = arguments, random = random_numbers(1);
        const x = Float32Array.from(logits);
        const draw = () => sample(x, temperature, top_k ?? 6, random, x.slice());
        return Array.from({ length: 20000 }, draw)""",
        logits.tolist(),
        temperature,
        top_k,
    )
    p = np.where(logits >= np.sort(logits)[-(top_k or 6)], np.exp(logits / temperature), 0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 20000, p / p.sum(), atol=0.015)
