"""What compare.py puts in place of the wedge, partners at words and lines, and its three tasks."""

from dataclasses import asdict
from unittest.mock import patch

import numpy as np
import pytest

import grassmann
import training
from experiments import tasks
from experiments.compare import BASE, UP_TO_212, Run, batch, count_params, evaluate
from experiments.variants import PRODUCTS, variant
from grassmann import Config

VOCAB, NAMES = sorted(map(ord, "\n abcdefgh")), ("word", "second word", "line")


# ---- layers in place of others -------------------------------------------------------------------

@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 6)])
def test_gradients_of_the_products(rng, check_gradients, name, shape):
    u, v = rng.standard_normal((2, *shape))
    forward, backward, _ = PRODUCTS[name]
    weights = rng.standard_normal((*shape[:-1], shape[-1] * (shape[-1] - 1) // 2))
    du, dv = backward(weights, forward(u, v)[1])
    inputs, grads = {"u": u, "v": v}, {"u": du, "v": dv}
    check_gradients(name, lambda: float((forward(u, v)[0] * weights).sum()), inputs, grads)

def test_the_products_are_what_they_are_called():
    u, v = np.array([1.0, 2, 3, 4, 5]), np.array([10.0, 20, 30, 40, 60])
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = {"symmetric": [u[i] * v[j] + u[j] * v[i] for i, j in pairs],
                "elementwise": [10, 40, 90, 160, 300, 0, 0, 0, 0, 0],
                "concatenation": [1, 2, 3, 4, 5, 10, 20, 30, 40, 60]}
    for name, p in expected.items():
        np.testing.assert_array_equal(PRODUCTS[name][0](u, v)[0], p)

@pytest.fixture
def landmarked(tiny_config, ordinary_params):
    """config, parameters with taps for all landmarks, and texts (6, 16) in which each occurs."""
    config, rng = tiny_config(vocab_size=10, context=16, rank=6), np.random.default_rng(1)
    tokens, params = rng.integers(0, 10, (6, 16)), ordinary_params(config)
    tokens[:, 4::5], tokens[:, 9] = 1, 0
    with variant("wedge", NAMES, VOCAB):
        shapes = grassmann.param_shapes(config)
    taps = {name: rng.normal(size=shapes[name]) for name in params if name.endswith("taps")}
    return config, params | taps, tokens

@pytest.mark.parametrize("product, landmarks", [
    ("symmetric", ()), ("elementwise", ()), ("concatenation", ()), ("wedge", NAMES)])
def test_gradients_of_a_variant(landmarked, ordinary_params, check_gradients, product, landmarks):
    """On two threads; as many are not zero as count_params says. Then all is as before."""
    (config, params, tokens), before = landmarked, dict(vars(grassmann))
    plain, x, y = ordinary_params(config), tokens[:, :-1], tokens[:, 1:]
    params = params if landmarks else plain
    with variant(product, landmarks, VOCAB):
        loss, grads = training.loss_and_grads(grassmann, params, config, x, y, None, 2)
        some = [name for name in params if name.endswith(("E", "W_red", "taps"))]
        check_gradients(f"model, {product} {landmarks}",
                        lambda: grassmann.loss_and_grads(params, config, x, y)[0],
                        {name: params[name] for name in some}, {name: grads[name] for name in some})
    assert vars(grassmann) == before
    assert abs(loss - grassmann.loss_and_grads(plain, config, x, y)[0]) > 1e-3
    run = Run(BASE | asdict(config) | {"product": product, "landmarks": landmarks})
    assert count_params(run) == sum(np.count_nonzero(g) for g in grads.values())

def test_landmarks_are_partners_with_taps_of_their_own(landmarked):
    """s_t as the formula says, with the landmarks that a reader of the text up to t would point at;
    and nothing is read that comes later.
    """
    config, params, tokens = landmarked
    with variant("wedge", NAMES, VOCAB):
        logits, cache = grassmann.model_forward(params, config, tokens)
        for t, other in np.ndindex(16, 3):  # a new line, a space, a letter
            changed = tokens.copy()
            changed[:, t] = other
            after = grassmann.forward(params, config, changed)
            np.testing.assert_array_equal(after[:, :t], logits[:, :t])
    mix, taps = cache["blocks"][1]["mix"], params["blocks.1.mix.taps"]
    for b, t in np.ndindex(tokens.shape):
        text = tokens[b, : t + 1]
        words = [k for k in range(t) if text[k] > 1 >= text[k + 1]]
        lines = [k for k in range(t) if text[k] > 0 == text[k + 1]]
        words, lines = [-1, -1, *words], [-1, *lines]  # -1: none
        places = [*(t - delta for delta in config.offsets[1]), words[-1], words[-2], lines[-1]]
        partners = [w * mix["z"][b, e] for w, e in zip(taps, places, strict=True) if e >= 0]
        np.testing.assert_allclose(mix["s"][b, t], sum(partners, np.zeros(6)), atol=1e-12)


# ---- questions 8, 9 and 13 -----------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["recall", "brackets"])
def test_a_task_asks_for_what_lies_so_far_back(rng, task):
    """Whoever asks says nothing else; nothing nearer tells the answer; every distance occurs."""
    x, y, distance = tasks.TASKS[task](rng, 512, 256)
    asks, far = distance > 0, distance > 20
    np.testing.assert_array_equal(asks, x == tasks.ASK)
    np.testing.assert_array_equal(y[~asks], x[~asks])
    row, t = np.nonzero(asks)
    np.testing.assert_array_equal(x[row, t - distance[row, t]], y[row, t])
    assert task != "recall" or ((x < tasks.ANSWERS).sum(1) == 1).all()  # there is only one key
    for row, t in zip(*np.nonzero(asks[:20]), strict=True) if task == "brackets" else ():
        within = np.where(x[row, t - distance[row, t] + 1 : t] == tasks.ASK, -1, 1)
        assert within.sum() == 0 <= min(within.cumsum(), default=0)  # opened and closed within
    shares = np.bincount(y[far], minlength=tasks.ANSWERS) / far.sum()
    assert np.abs(shares - 1 / tasks.ANSWERS).max() < 0.06
    near = np.roll(x, 1, 1)[far]
    assert abs((near == y[far]).mean() - (near < tasks.ANSWERS).mean() / tasks.ANSWERS) < 0.05
    for low, high in tasks.DISTANCES:
        assert ((low <= distance) & (distance <= high)).sum() >= 80

@pytest.mark.parametrize("task", ["recall", "brackets"])
def test_accuracy_is_sorted_by_distance(monkeypatch, tiny_config, rng, task):
    """An untrained model guesses; one that is right from 2 to 16 tokens back is, and no other."""
    config, sample = tiny_config(vocab_size=17, context=64), tasks.TASKS[task](rng, 600, 64)
    values = tasks.accuracy(grassmann.init_params(config), config, *sample)
    assert abs(np.mean(values[:5]) - 1 / tasks.ANSWERS) < 0.05
    _, y, distance = sample
    says = np.where((distance > 1) & (distance <= 16), y, (y + 1) % tasks.ANSWERS)
    rows = iter(np.array_split(says, 75))
    monkeypatch.setattr(grassmann, "forward", lambda *how: np.eye(tasks.VOCAB_SIZE)[next(rows)])
    first, *others = tasks.accuracy({}, None, *sample)
    assert (0 < first < 1) == (task == "recall")  # brackets ask at odd distances only
    assert others[:5] == [1, 1, 1, 0, 0]

def test_keys_are_announced_before_they_are_asked_for(rng):
    """As many as the group says, each slot once; an answer is the key that its slot was given."""
    x, y, many = tasks.keys(rng, 64, 256)
    for row in range(64):
        slots = {}
        for t in range(256):
            announced = 0 < t < 64 and x[row, t - 1] >= tasks.ASK
            assert announced == (x[row, t] < tasks.ANSWERS)
            if announced:
                assert x[row, t - 1] - 16 not in slots
                slots[x[row, t - 1] - 16] = x[row, t]
            asks = t >= 64 and x[row, t] >= tasks.ASK
            assert y[row, t] == (slots[x[row, t] - 16] if asks else x[row, t])
            assert many[row, t] == (len(slots) if asks else 0)
        assert len(slots) == tasks.NUMBERS[row % 4][0] and x[row].max() < tasks.KEYS_VOCAB_SIZE
    says = np.where(many > 4, (y + 1) % tasks.ANSWERS, y)
    with patch.object(grassmann, "forward", lambda params, config, x: np.eye(32)[next(rows)]):
        rows = iter(np.array_split(says, 8))
        assert tasks.accuracy({}, None, x, y, many, tasks.NUMBERS) == [1, 1, 0, 0]

@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_step_on_a_task_has_texts_of_its_own_and_the_accuracy_others(task):
    sizes = {"context": 128, "n_layer": 1, "d_model": 8, "rank": 3, "batch_size": 4, "iters": 2}
    run = Run(BASE | sizes | {"vocab_size": 32, "data": task, "seed": 3})
    texts = tasks.TASKS[task](np.random.default_rng((3, 1)), 4, 128)[:2]
    np.testing.assert_array_equal(batch(run, None, 1), texts)
    params, others = grassmann.init_params(run.config), np.random.default_rng((3, 2))  # no step
    expected = tasks.accuracy(params, run.config, *tasks.TASKS[task](others, 512, 128),
                              tasks.GROUPS[task])
    np.testing.assert_array_equal(evaluate(run, None, params, False), expected)
    again = tasks.TASKS[task](np.random.default_rng((3, 3)), 512, 128)  # other texts for the test
    expected = tasks.accuracy(params, run.config, *again, tasks.GROUPS[task])
    np.testing.assert_array_equal(evaluate(run, None, params, True), expected)

@pytest.mark.parametrize("offsets", [None, UP_TO_212])
def test_how_far_a_grassmann_model_sees(ordinary_params, offsets):
    """The line in compare_8.png: a token that far back changes the output, one more does not."""
    config, x = Config(17, 256, d_model=8, rank=3, offsets=offsets), np.arange(256)[None] % 16
    params, reach = ordinary_params(config), tasks.reach(config.offsets)
    before = grassmann.forward(params, config, x)[0, -1]
    for distance, seen in ((reach, True), (reach + 1, False)):
        changed = x.copy()
        changed[0, -1 - distance] += 1
        assert (grassmann.forward(params, config, changed)[0, -1] != before).any() == seen
