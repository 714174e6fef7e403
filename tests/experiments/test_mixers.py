"""What the layer is compared with: mixers and their gradients, n-grams as written out."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

import grassmann
from charlm.checkpoint import save_checkpoint
from charlm.own_layer import check_layer
from charlm.text import corpus_of
from experiments import mixers, ngram, texts
from experiments.ngram import best_ngram, ngram_loss

mixers.install()


every_mixer = pytest.mark.parametrize("mixer", mixers.MIXERS)


@every_mixer
def test_gradients_are_right_and_nothing_sees_the_future(mixer):
    """check_layer asks this before it asks for streaming, which all except one refuse."""
    if mixer == "rotary attention":
        check_layer(mixer)
        return
    with pytest.raises(grassmann.UserError, match=r"not in parts: .* reads texts whole"):
        check_layer(mixer)


@every_mixer
def test_offsets_differ_from_the_first_step(mixer):
    """Taps start from N(0, 0.5²). The 0.02 of matrices would hide what they multiply."""
    config = grassmann.Config(65, mixer=mixer)
    for name, value in grassmann.init_params(config).items():
        if "taps" in name:
            assert value.std() > 0.25


def test_how_large_features_are_at_first(monkeypatch, rng):
    """Compared with the wedge, in the last layer. experiments/README.md names this."""
    gate = grassmann.gate_forward
    features = []

    def listen(h, g, W, b):
        features.append(g)
        return gate(h, g, W, b)

    monkeypatch.setattr(grassmann, "gate_forward", listen)
    tokens = rng.integers(0, 65, (12, 64))
    sizes = {}
    for name in ("grassmann", "outer product", "sum", "learned planes", "symmetric product"):
        rank = 64 if name in ("sum", "learned planes") else 32
        config = grassmann.Config(65, mixer=name, rank=rank, dropout=0.0)
        params = grassmann.init_params(config)
        mixers.scale_features(params)
        grassmann.forward(params, config, tokens)
        sizes[name] = features[-1].std() / features[3].std()
    small = sizes.pop("learned planes")
    assert small < 0.6
    assert min(sizes.values()) > 0.6
    assert max(sizes.values()) < 1.5


def test_features_are_what_they_are_called(rng):
    """Learned planes are dot products with planes. The symmetric product is a sum of two."""
    z, s, x, y = rng.standard_normal((4, 5))
    own = {"X": x[:, None], "Y": y[:, None], "b_plu": np.array([0.5])}
    w = grassmann.Scope(own)
    g, _ = mixers.learned_forward(z[None, None], s[None, None], w)
    dot = grassmann.plucker(z, s) @ grassmann.plucker(x, y)
    assert g.item() == pytest.approx(dot + 0.5)
    outer, _ = mixers.outer_forward(z, s)
    products = np.outer(z, s)
    assert_allclose(outer.reshape(5, 5), products)
    symmetric, _ = mixers.symmetric_forward(z, s)
    sums = products + products.T
    assert_allclose(symmetric, sums[grassmann.pairs(5)])


def test_what_a_vector_reads_in_planes_is_at_right_angles_to_it(rng):
    q, k, v = rng.standard_normal((3, 1, 6, 5))
    read = mixers.contract(q, k, v)
    assert_allclose((q * read).sum(-1), 0, atol=1e-13)


def test_rescaled_is_the_layer_with_larger_projections(tiny_model, batch):
    params, config = tiny_model(taps=False, normalize=True, block="paper")
    rescaled = replace(config, mixer="rescaled by 31")
    loss, _ = grassmann.loss_and_grads(params, rescaled, *batch(2))
    for name in params:
        if "W_plu" in name:
            params[name] = 31 * params[name]
    same, _ = grassmann.loss_and_grads(params, config, *batch(2))
    assert loss == pytest.approx(same, rel=1e-12)


@pytest.mark.parametrize("offsets, factor", [(None, 31), (((1, 2, 4, 8, 12, 16),) * 4, 76)])
def test_messages_that_are_rescaled_are_as_long_as_without_normalising(rng, offsets, factor):
    """At the start, in the second layer of the default model, within a quarter."""
    tokens = rng.integers(0, 65, (12, 64))

    def size(**variant):
        config = grassmann.Config(65, taps=False, **variant)
        params = grassmann.init_params(config)
        _, cache = grassmann.model_forward(params, config, tokens)
        mix = cache["blocks"][1]["mix"]
        squares = np.square(mix["p"][:, 16:])
        return np.sqrt(squares.mean())

    long = factor * size(normalize=True, offsets=offsets)
    assert long == pytest.approx(size(), rel=0.25)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngrams_are_the_formula(rng, order, window):
    """Witten and Bell, counted one by one, from the past that a network in windows sees."""
    train = rng.integers(0, 3, 60)
    test = rng.integers(0, 4, 30)
    text = train.tolist()
    V = 4

    def probability(context: list, token: int, n: int) -> float:
        if n == 0:
            return 1 / V
        shorter = probability(context, token, n - 1)
        known = context[len(context) - n + 1 :]
        after = []
        for k in range(n - 1, len(text)):
            if text[k - n + 1 : k] == known:
                after.append(text[k])
        if not after:
            return shorter
        different = len(set(after))
        return (after.count(token) + different * shorter) / (len(after) + different)

    losses = []
    for t in range(order - 1, len(test)):
        start = (t - 1) // window * window if window and t else 0
        seen = test[start:t].tolist()
        p = probability(seen, test[t], min(order, len(seen) + 1))
        losses.append(-np.log(p))
    assert ngram_loss(train, test, order, V, window) == pytest.approx(np.mean(losses), rel=1e-12)


def test_yardsticks_are_bits_of_the_held_out_text(tmp_path):
    """A text that repeats itself costs a compressor hardly anything, random bits one bit each."""
    bits = "".join(map(str, np.random.default_rng(0).integers(0, 2, 20_000)))
    corpus = corpus_of(bits, 8)
    for name, cost in (("gzip", 1.2), ("xz", 1.2), ("5-gram, counted", 1.0)):
        found = {row["what"]: row["bits per character"] for row in ngram.yardsticks(corpus, None)}
        assert found[name] == pytest.approx(cost, abs=0.1)
    repeated = corpus_of(bits[:1000] * 20, 8)
    for row in ngram.yardsticks(repeated, None)[:2]:
        assert row["bits per character"] < 0.3
    config = grassmann.Config(2, 8, 1, 8)
    params = grassmann.init_params(config)
    save_checkpoint(tmp_path / "best.npz", params, config, vocab=corpus.vocab, most_common=0)
    *_, row = ngram.yardsticks(corpus, tmp_path / "best.npz")
    loss = grassmann.validation_loss(params, config, corpus.val)
    assert row["nats per character"] == loss
    assert row["bits per character"] == pytest.approx(loss / np.log(2))
    with pytest.raises(grassmann.UserError, match="trained on another text"):
        ngram.yardsticks(corpus_of("abc" * 50, 8), tmp_path / "best.npz")


@pytest.mark.parametrize("width", [1, 4, 5])
def test_a_rotation_multiplies_complex_numbers(rng, width):
    """By e^(it f), f = 10000^(-k / n) for the k-th of n. An odd last coordinate stays."""
    n = width // 2
    x = rng.standard_normal((2, 3, 7, width))
    a, b, last = np.split(x, [n, 2 * n], -1)
    t = np.arange(7)[:, None]
    turned = (a + 1j * b) * np.exp(1j * t * 10000.0 ** (-np.arange(n) / n))
    expected = np.concatenate([turned.real, turned.imag, last], -1)
    assert_allclose(mixers.rotate(x), expected)


def test_orders_end_where_contexts_have_no_numbers():
    """On a text of one letter each order is better than the one before."""
    letter = np.zeros(9, int)
    for vocab_size, last in ((512, 7), (513, 6), (5000, 5)):
        text = texts.Text("", "", vocab_size, [], letter, letter, letter, 1)
        assert best_ngram(text, 8)[0] == last
