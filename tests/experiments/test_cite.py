"""The result to cite: equal sizes, rates from the validation half, differences by seed."""

from types import SimpleNamespace

import pytest

from experiments import cite
from experiments.compare import count_params

TEXT = SimpleNamespace(name="a text", sha256="0" * 64, vocab_size=65)
CELL = TEXT, 250, "attention"


def run(validation, test, iters=250):
    return {
        "curve": [[iters, validation]],
        "validation": validation,
        "test": test,
        "spec": {"iters": iters},
    }


@pytest.fixture
def study():
    """A study of one text without runs."""
    new = object.__new__(cite.Study)
    new.texts = [TEXT]
    return new


@pytest.mark.parametrize("name", cite.MODELS)
def test_models_have_equal_size(study, name):
    sizes = [count_params(study.trial(TEXT, 250, n, 3e-3, 0)) for n in (name, "taps, normalised")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_the_validation_half_chooses_the_rate(study):
    tests = dict(zip(cite.RATES, (1.0, 2, 3, 4), strict=True))
    validations = dict(zip(cite.RATES, (4.0, 3, 1, 2), strict=True))
    study.run = lambda *what: run(validations[what[3]], tests[what[3]])
    assert study.best_rate(CELL) == cite.RATES[2]


def test_no_rate_is_chosen_while_one_is_missing(study):
    study.run = lambda *what: run(1, 1) if what[3] < max(cite.RATES) else None
    assert study.best_rate(CELL) is None


def test_differences_are_of_runs_with_equal_seeds(study):
    """Seeds differ much, and all models by 0.5: the interval is 0."""
    order = [*cite.MODELS]
    study.run = lambda text, iters, name, lr, seed: run(1, seed + order.index(name) / 2, iters)
    table = cite.difference_table(study)
    assert table[0]["a text, 250 steps"] == "+1.000 ± 0.000"
