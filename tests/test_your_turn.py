"""The tasks "Your turn" in tutorial.md: each answer passes its check, usual mistakes do not.

test_documents.py runs the answers as they stand on the page.
"""

import re
from pathlib import Path

import numpy as np
import pytest

import grassmann as G
from docs import checks

LESSON = Path(checks.__file__).parents[1] / "tutorial.md"
ANSWER = re.compile(
    r"^<details><summary>Answer</summary>\n\n```python\n(.*?)^print\((checks\.(\w+).*?)\)$",
    re.DOTALL | re.MULTILINE,
)
ANSWERS = {}
for code, call, name in ANSWER.findall(LESSON.read_text(encoding="utf-8")):
    ANSWERS[name] = (code, call)

MISTAKES = [  # task, what stands in the answer, what a reader may write
    ("contract", "= -p", "= p"),  # the sign
    ("contract", "    A[j, i] = -p  # u_j v_i - u_i v_j\n", ""),  # half of the sum
    ("contract", "x @ A", "A @ x"),  # the transpose
    ("layer", "s[delta:] = z[:-delta]", "s[:-delta] = z[delta:]"),  # it looks ahead
    ("layer", "G.plucker(z, s)", "G.plucker(s, z)"),  # the sign
    ("layer", "[h, g]", "[g, h]"),
    ("layer", "alpha * h + (1 - alpha) * g", "alpha * g + (1 - alpha) * h"),
    ("look_back", "s[delta:] += w * z[:-delta]", "s[:-delta] += w * z[delta:]"),  # it looks ahead
    ("look_back", "+=", "="),  # no sum
    ("look_back", "w * z", "z"),
    ("gate", "h - g", "g - h"),  # the sign
    ("gate", ".sum(0)", ""),  # no sum over the tokens
    ("gate", "dalpha * alpha * (1 - alpha)", "dalpha"),
    ("gate", "dh = alpha * dout", "dh = (1 - alpha) * dout"),
    ("unit", "dout - along", "dout + along"),  # the sign
    ("unit", "(dout - along * y)", "dout"),  # the path through the length
    ("unit", "* y) / length", "* y)"),
    ("bits", "p[following]", "p[token]"),  # the token that was read, not the next
    ("bits", "np.log2", "np.log"),  # nats
    ("bits", "        p = p / p.sum()\n", ""),
]


def check(name: str, old: str = "", new: str = "") -> str:
    code, call = ANSWERS[name]
    assert old in code
    names = {"np": np, "G": G, "checks": checks}
    exec(code.replace(old, new, 1) if old else code, names)
    return eval(call, names)


def test_the_page_has_six_tasks():
    assert [*ANSWERS] == ["contract", "layer", "look_back", "gate", "unit", "bits"]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_passes_its_check(name):
    assert check(name) == "right"


@pytest.mark.parametrize("name, old, new", MISTAKES)
def test_a_usual_mistake_does_not(name, old, new):
    assert check(name, old, new).startswith("wrong: ")


def test_a_missing_gradient_is_wrong():
    x, y = np.ones((2, 3))
    found = checks.op(lambda x, y: (x * y, y), lambda dout, y: dout * y, x, y)
    assert found.startswith("wrong: ")


def test_the_direction_of_a_check_is_not_its_input():
    """y = x/|x| does not change along x, so this direction would show nothing."""
    x = np.random.default_rng(0).standard_normal((5, 6))
    names = {"np": np}
    exec(ANSWERS["unit"][0], names)
    backward = names["unit_backward"]
    found = checks.op(names["unit"], lambda dout, cache: 7 * backward(dout, cache), x)
    assert found.startswith("wrong: ")
