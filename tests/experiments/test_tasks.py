"""The tasks of questions 8 and 9: what they ask, and how answers are counted."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import grassmann
from experiments import tasks
from experiments.compare import BASE, Trial, evaluate, learner


def test_recall_asks_for_what_lies_so_far_back(rng):
    """A token that asks says nothing else. No nearer one tells the answer. All distances occur."""
    x, y, distance = tasks.recall(rng, 512, 256)
    asks = distance > 0
    assert_array_equal(asks, x == tasks.ASK)
    assert_array_equal(y[~asks], x[~asks])
    row, t = np.nonzero(asks)
    back = distance[asks]
    assert_array_equal(x[row, t - back], y[asks])
    key = x < tasks.ANSWERS
    assert_array_equal(key.sum(1), 1)
    far = y[distance > 20]
    for answer in range(tasks.ANSWERS):
        share = (far == answer).mean()
        assert share == pytest.approx(1 / 8, abs=0.06)
    for low, high in tasks.DISTANCES:
        found = (low <= back) & (back <= high)
        assert found.sum() >= 80


def test_accuracy_is_sorted_by_distance(monkeypatch, rng):
    """For answers that are right from 3 to 16 tokens back, and wrong elsewhere."""
    x, y, distance = tasks.recall(rng, 600, 64)
    wrong = (y + 1) % tasks.ANSWERS
    right = (distance > 2) & (distance <= 16)
    says = np.where(right, y, wrong)
    logits = np.eye(tasks.VOCAB_SIZE)[says]
    chunks = iter(np.array_split(logits, 75))
    monkeypatch.setattr(grassmann, "forward", lambda *how: next(chunks))
    shares = tasks.accuracy({}, None, x, y, distance)
    assert shares[:6] == [0, 1, 1, 1, 0, 0]


def test_keys_are_announced_before_they_are_asked_for(rng):
    """As many keys as the group says, each slot once. An answer is the key of its slot."""
    x, y, many = tasks.keys(rng, 64, 256)
    assert x.max() < tasks.KEYS_VOCAB_SIZE
    for row in range(64):
        slots = {}
        before = 0
        for t in range(256):
            token = x[row, t]
            announced = t < 64 and before >= tasks.ASK
            assert announced == (token < tasks.ANSWERS)
            if announced:
                assert before not in slots
                slots[before] = token
            asks = t >= 64 and token >= tasks.ASK
            assert y[row, t] == (slots[token] if asks else token)
            assert many[row, t] == (len(slots) if asks else 0)
            before = token
        least, most = tasks.NUMBERS[row % 4]
        assert least == most == len(slots)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_step_on_a_task_has_texts_of_its_own_and_the_accuracy_others(task):
    small = {
        "context": 128,
        "n_layer": 1,
        "d_model": 8,
        "rank": 3,
        "batch_size": 4,
        "iters": 2,
        "vocab_size": 32,
        "data": task,
        "seed": 3,
    }
    trial = Trial(BASE | small)
    config = trial.config
    make = tasks.TASKS[task]
    *texts, _ = make(np.random.default_rng((3, 1)), 4, 128)
    assert_array_equal(learner(trial, None).text(1), texts)
    params = grassmann.init_params(config)  # no step
    for number, test in ((2, False), (3, True)):
        others = make(np.random.default_rng((3, number)), 512, 128)
        expected = tasks.accuracy(params, config, *others, tasks.GROUPS[task])
        assert_array_equal(evaluate(trial, None, params, test), expected)
