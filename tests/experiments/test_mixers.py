"""What the layer is compared with: mixers and their gradients, n-grams as written out."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

import grassmann
from charlm.checkpoint import save_checkpoint
from charlm.own_layer import check_layer
from charlm.text import corpus_of
from experiments import mixers, ngram, texts
from experiments.ngram import best_ngram, ngram_loss

mixers.install()


@pytest.fixture(
    params=[name for name in mixers.MIXERS if name != "rescaled by 76"]
)  # 31 tests its gradient
def mixer(request):
    return request.param


def test_gradients_are_right_and_nothing_sees_the_future(mixer):
    """check_layer asks this before it asks for streaming, which all except one refuse."""
    refused = pytest.raises(
        grassmann.UserError, match=r"not in parts: UserError: .* reads texts whole"
    )
    with nullcontext() if mixer == "rotary attention" else refused:
        check_layer(mixer)


def test_offsets_differ_from_the_first_step(mixer):
    """Taps start from N(0, 0.5²). The 0.02 of matrices would hide what they multiply."""
    config = grassmann.Config(65, mixer=mixer)
    assert all(
        value.std() > 0.25
        for name, value in grassmann.init_params(config).items()
        if "taps" in name
    )


def test_how_large_features_are_at_first(monkeypatch, rng):
    """Compared with the wedge, in the last layer. experiments/README.md names this."""
    gate, tokens, sizes = grassmann.gate_forward, rng.integers(0, 65, (12, 64)), {}
    ranks = {
        "grassmann": 32,
        "outer product": 32,
        "sum": 64,
        "learned planes": 64,
        "symmetric product": 32,
    }
    for name, rank in ranks.items():
        config = grassmann.Config(65, mixer=name, rank=rank, dropout=0.0)
        mixers.scale_features(params := grassmann.init_params(config))
        monkeypatch.setattr(
            grassmann,
            "gate_forward",
            lambda h, g, W, b, name=name: (sizes.update({name: float(g.std())}), gate(h, g, W, b))[
                1
            ],
        )
        grassmann.forward(params, config, tokens)
    large = {name for name, size in sizes.items() if size > 0.6 * sizes["grassmann"]}
    assert (
        large == {"grassmann", "symmetric product", "outer product", "sum"}
        and max(sizes.values()) < 1.5 * sizes["grassmann"]
    )


def test_features_are_what_they_are_called(rng):
    """Learned planes are dot products with planes. The wedge is a difference of two products."""
    z, s, x, y = rng.standard_normal((4, 1, 1, 5))
    w = grassmann.Scope({"X": x[0].T, "Y": y[0].T, "b_plu": np.array([0.5])})
    planes = mixers.learned_forward(z, s, w)[0].item() - 0.5
    assert planes == pytest.approx(
        (grassmann.plucker(z, s) * grassmann.plucker(x, y)).sum(), rel=1e-12
    )
    (i, j), products = grassmann.pairs(5), mixers.outer_forward(z, s)[0].reshape(5, 5)
    np.testing.assert_allclose(products, np.outer(z, s))
    np.testing.assert_allclose(grassmann.plucker(z, s).ravel(), products[i, j] - products[j, i])
    np.testing.assert_allclose(
        mixers.symmetric_forward(z, s)[0].ravel(), products[i, j] + products[j, i]
    )
    q, k, v = rng.standard_normal(
        (3, 1, 6, 5)
    )  # what a vector reads in planes is at right angles to it
    np.testing.assert_allclose((q * mixers.contract(q, k, v)).sum(-1), 0, atol=1e-13)


def test_rescaled_is_the_layer_with_larger_projections(tiny_model, batch):
    params, config = tiny_model(taps=False, normalize=True, block="paper")
    larger = {name: value * (31 if "W_plu" in name else 1) for name, value in params.items()}
    same, loss, other = (
        grassmann.loss_and_grads(p, replace(config, mixer=mixer), *batch(2))[0]
        for p, mixer in ((larger, "grassmann"), (params, "rescaled by 31"), (params, "grassmann"))
    )
    assert loss == pytest.approx(same, rel=1e-12) and abs(loss - other) > 1e-3


@pytest.mark.parametrize("offsets, factor", [(None, 31), (((1, 2, 4, 8, 12, 16),) * 4, 76)])
def test_messages_that_are_rescaled_are_as_long_as_without_normalising(rng, offsets, factor):
    """At the start, in the second layer of the default model, within a quarter."""
    sizes, x = {}, rng.integers(0, 65, (12, 64))
    for normalize, where in ((False, None), (True, offsets)):
        config = grassmann.Config(65, offsets=where, taps=False, normalize=normalize)
        cache = grassmann.model_forward(grassmann.init_params(config), config, x)[1]
        sizes[normalize] = np.square(cache["blocks"][1]["mix"]["p"][:, 16:]).mean() ** 0.5
    assert factor * sizes[True] == pytest.approx(sizes[False], rel=0.25)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngrams_are_the_formula(rng, order, window):
    """Witten and Bell, counted one by one, from the past that a network in windows sees."""
    train, test, V = rng.integers(0, 3, 60), rng.integers(0, 4, 30), 4
    text, losses = train.tolist(), []

    def probability(context: list, token: int, n: int) -> float:
        if n == 0:
            return 1 / V
        known = context[len(context) - n + 1 :]
        after = [text[k + n - 1] for k in range(len(text) - n + 1) if text[k : k + n - 1] == known]
        shorter, different = probability(context, token, n - 1), len(set(after))
        return (
            (after.count(token) + different * shorter) / (len(after) + different)
            if after
            else shorter
        )

    for t in range(order - 1, len(test)):
        seen = test[(t - 1) // window * window : t] if window and t else test[:t]
        losses.append(-np.log(probability(seen.tolist(), test[t], min(order, len(seen) + 1))))
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
    x, n = rng.standard_normal((2, 3, 7, width)), width // 2
    turned = (x[..., :n] + 1j * x[..., n : 2 * n]) * np.exp(
        1j * np.outer(range(7), 10000.0 ** (-np.arange(n) / n))
    )
    np.testing.assert_allclose(
        mixers.rotate(x), np.concatenate([turned.real, turned.imag, x[..., 2 * n :]], -1)
    )


def test_orders_end_where_contexts_have_no_numbers():
    """On a text of one letter each order is better than the one before."""
    for vocab_size, last in ((2, 7), (512, 7), (513, 6), (5000, 5)):
        assert (
            best_ngram(texts.Text("", "", vocab_size, [], *[np.zeros(9, int)] * 3, 1), 8)[0] == last
        )
