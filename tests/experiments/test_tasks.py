"""The tasks of questions 8 and 9: what they ask, and how answers are counted."""

import numpy as np
import pytest

import grassmann
from experiments import tasks
from experiments.compare import BASE, Trial, evaluate, learner


def test_recall_asks_for_what_lies_so_far_back(rng):
    """A token that asks says nothing else. No nearer one tells the answer. All distances occur."""
    x, y, distance = tasks.recall(rng, 512, 256)
    asks, far = distance > 0, distance > 20
    np.testing.assert_array_equal(asks, x == tasks.ASK)
    np.testing.assert_array_equal(y[~asks], x[~asks])
    row, t = np.nonzero(asks)
    np.testing.assert_array_equal(x[row, t - distance[row, t]], y[row, t])
    assert ((x < tasks.ANSWERS).sum(1) == 1).all()  # there is only one key
    shares = np.bincount(y[far], minlength=tasks.ANSWERS) / far.sum()
    assert np.abs(shares - 1 / tasks.ANSWERS).max() < 0.06
    for low, high in tasks.DISTANCES:
        assert ((low <= distance) & (distance <= high)).sum() >= 80


def test_accuracy_is_sorted_by_distance(monkeypatch, rng):
    """For answers that are right from 2 to 16 tokens back, and wrong elsewhere."""
    _, y, distance = sample = tasks.recall(rng, 600, 64)
    says = np.where((distance > 1) & (distance <= 16), y, (y + 1) % tasks.ANSWERS)
    rows = iter(np.array_split(says, 75))
    monkeypatch.setattr(grassmann, "forward", lambda *how: np.eye(tasks.VOCAB_SIZE)[next(rows)])
    first, *others = tasks.accuracy({}, None, *sample)
    assert 0 < first < 1 and others[:5] == [1, 1, 1, 0, 0]


def test_keys_are_announced_before_they_are_asked_for(rng):
    """As many keys as the group says, each slot once. An answer is the key of its slot."""
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


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_step_on_a_task_has_texts_of_its_own_and_the_accuracy_others(task):
    sizes = {"context": 128, "n_layer": 1, "d_model": 8, "rank": 3, "batch_size": 4, "iters": 2}
    trial = Trial(BASE | sizes | {"vocab_size": 32, "data": task, "seed": 3})
    texts = tasks.TASKS[task](np.random.default_rng((3, 1)), 4, 128)[:2]
    np.testing.assert_array_equal(learner(trial, None).text(1), texts)
    params = grassmann.init_params(trial.config)  # no step
    for number, test in ((2, False), (3, True)):  # other texts for the test
        others = tasks.TASKS[task](np.random.default_rng((3, number)), 512, 128)
        expected = tasks.accuracy(params, trial.config, *others, tasks.GROUPS[task])
        np.testing.assert_array_equal(evaluate(trial, None, params, test), expected)
