"""What callers give grassmann.py and training.py: long prompts, numbers of all kinds, nonsense."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

import grassmann as G
import training
from training import Training


@pytest.fixture
def model(tiny_config, ordinary_params):
    return ordinary_params(tiny_config()), tiny_config()

@pytest.mark.parametrize("positions, context, fewest", [
    (False, 9, 1 + 2), (True, 9, 1 + 1 + 149), (True, 8, 1 + 1 + 186), (True, 700, 1 + 2 + 1)])
def test_many_tokens_are_read_as_one_by_one(
        variant, positions, context, fewest, tiny_config, ordinary_params, rng, monkeypatch):
    """The same state to rounding, in few passes: 512 tokens in each, or up to the context's end,
    from where half of it is read again."""
    config = tiny_config(**variant, positions=positions, context=context)
    params, text = ordinary_params(config), rng.integers(0, 11, 750).tolist()
    one, many = G.stream_init(params, config), G.stream_init(params, config)
    passes, forward = [], G.model_forward
    for start, end in ((0, 5), (5, 750)):
        for token in text[start:end]:
            logits, one = G.stream_step(params, config, one, token)
        monkeypatch.setattr(G, "model_forward", lambda *args: passes.append(1) or forward(*args))
        read, many = G.stream_read(params, config, many, iter(text[start:end]))
        monkeypatch.setattr(G, "model_forward", forward)
        np.testing.assert_allclose(read, logits, atol=1e-9)
        assert (many["position"], many["recent"]) == (one["position"], one["recent"])
        for ours, theirs in zip(many["past"], one["past"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-9)
    assert len(passes) == fewest
    assert next(G.generate(params, config, text, 1, temperature=0)) == logits.argmax()

@pytest.mark.parametrize("arguments, kind", [
    (([0], -5), ValueError), (([0], 1.5), TypeError), (([0.0], 1), TypeError),
    (("0", 1), TypeError), (([0], 1, 1.0, 2.0), TypeError), (([0], 1, 1.0, 0), ValueError),
    (([-1], 1), ValueError), (([11], 1), ValueError), (([0], 1, -0.1), ValueError),
    (([0], 1, math.nan), ValueError)])
def test_generate_refuses_at_once(model, arguments, kind):
    with pytest.raises(kind, match=r"\w"):
        G.generate(*model, *arguments)

def test_batches_that_make_no_sense(model):
    good = np.zeros((2, 5), int)
    for x, y in ((good - 1, good), (good, good - 1), (good + 11, good), (good, good + 11),
                 (good, good[:, :4]), (good[:1], good), (good[:, :4], good), (good, good.ravel())):
        for loss in (G.loss_and_grads, lambda *args: training.loss_and_grads(G, *args, None, 2)):
            with pytest.raises(ValueError, match="x and y must have one shape"):
                loss(*model, x, y)
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        training.loss_and_grads(G, *model, good, good, None, -1)

def test_numbers_of_other_kinds(model, tiny_config):
    """Seeds beyond int64; NumPy's numbers in a configuration, which JSON must take."""
    config, good = tiny_config(dropout=np.float32(0.25), rank=np.int8(4)), np.zeros((2, 5), int)
    assert config == tiny_config(dropout=0.25) and json.dumps(asdict(config))
    losses = {float(training.loss_and_grads(G, model[0], config, good, good, (seed, 1), 2)[0])
              for seed in (2**63 - 1, 2**63, 2**63, 2**80)}
    assert len(losses) == 3 and G.get_batch(np.arange(9), 2, 3, 2**63, 5)[0].shape == (2, 3)
    for changes in ({"iters": 1.5}, {"seed": -1}, {"lr": math.nan}, {"lr": "1"}, {"min_lr": -1.0},
                    {"batch_size": None}, {"grad_clip": math.inf}):
        with pytest.raises(ValueError, match="numbers of training"):
            Training(**changes)
