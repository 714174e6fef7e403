"""A layer of your own: the file to start from is right, and mistakes in it are found and named."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import grassmann as G
from charlm.own_layer import check_layer, check_op, load_layer

START = Path(__file__).parent.parent / "docs" / "my_layer.py"


@pytest.fixture(autouse=True)
def no_layer_stays(monkeypatch):
    monkeypatch.setattr(G, "MIXERS", G.MIXERS.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


def test_the_models_own_layers_and_the_file_to_start_from_pass():
    mixer = load_layer(START)
    assert mixer == f"my_layer.py#{hashlib.sha256(START.read_bytes()).hexdigest()[:8]}"
    for name in ("grassmann", "attention", mixer):
        check_layer(name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "dz = dz + dz_partner",
            "dz = dz_partner",
            r"the gradient of b_red in layer 1 is wrong: along a random direction -?[\d.]+, by "
            r"central differences -?[\d.]+; later .* reason: W_red, h$",
        ),
        (
            "return dh, grads",
            "return 0 * dh, grads",
            r"the gradient of h in layer 1 is wrong: .* differences -?[\d.]+$",
        ),
        (
            "return dh, grads",
            'return dh, grads | {"W_mix": grads["W_mix"].T}',
            r"the gradient of W_mix has shape \(8, 4\), not \(4, 8\)",
        ),
        ('grads["taps"] =', "_ =", r"gradients and parameters differ: \['taps'\]"),
        (
            "return dh, grads",
            'return dh, grads | {"W_mix": np.nan * grads["W_mix"]}',
            "the gradient of W_mix in layer 1 is wrong: along a random direction nan, by",
        ),
        (
            "s = s[:, -length:]",
            "pass",
            "mine.py reads a text at once, but not in parts: ValueError: operands",
        ),
        ("-max(offsets) :]", "-1:]", r"mine.py: token by token it returns other logits .*[\d.]+$"),
        (
            "s = s[:, -length:]",
            "s = s[:, -length:] + s.mean(1, keepdims=True)",
            r"mine.py sees the future: later tokens change earlier logits, by \d",
        ),
        (
            "return out, cache |",
            "return out.mean(1, keepdims=True), cache |",
            r"must return the shape of h, \(2, 24, 8\), not \(2, 1, 8\)",
        ),
        ("return out, cache |", "return np.inf * out, cache |", "numbers that are not finite"),
        (
            "linear_forward(z * s,",
            "linear_forward(z * s * np.ones(4),",
            "mine.py makes float64 of float32: give new arrays h.dtype",
        ),
        (
            "def shapes",
            "def shape",
            "mine.py defines no function shapes; docs/my_layer.py has all three",
        ),
        (
            "import numpy",
            "import nonsense",
            "mine.py, line 8: ModuleNotFoundError: No module named 'nonsense'",
        ),
        ("z * s,", "z * s *,", r"mine.py: SyntaxError: invalid syntax \(mine.py, line \d+\)"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, old, new, said):
    """Each mistake is one change of the file."""
    source, layer = START.read_text(encoding="utf-8"), tmp_path / "mine.py"
    assert source.count(old) == 1
    layer.write_text(source.replace(old, new), encoding="utf-8")
    with pytest.raises(G.UserError, match=said) as error:
        check_layer(load_layer(layer))
    assert "Error" not in said or error.value.__cause__ is not None


def test_what_is_no_python_file_is_refused():
    for path in ("missing.py", "docs", "README.md"):
        with pytest.raises(
            G.UserError, match=f"a layer is a Python file, and there is no such file: {path}"
        ):
            load_layer(path)


def test_a_layer_is_a_real_module(tmp_path):
    """A dataclass, a file beside it, and its own place."""
    (tmp_path / "helper_of_mine.py").write_text("SCALE = 2.0\n")
    head = """
from __future__ import annotations
import inspect
from dataclasses import dataclass
from pathlib import Path
import helper_of_mine

@dataclass
class Sizes:
    width: int = 1

assert Path(__file__).name == "mine.py"
assert helper_of_mine.SCALE == 2.0
assert "width" in inspect.getsource(Sizes)
"""
    layer = tmp_path / "mine.py"
    layer.write_text(head + START.read_text(encoding="utf-8"), encoding="utf-8")
    check_layer(load_layer(layer))


def test_a_file_beside_a_layer_hides_no_other_module(tmp_path):
    (tmp_path / "colorsys.py").write_text("")
    layer = tmp_path / "mine.py"
    layer.write_text("import colorsys\ncolorsys.rgb_to_hsv\n" + START.read_text(encoding="utf-8"))
    load_layer(layer)


def test_a_layer_that_fails_leaves_no_module(tmp_path):
    layer = tmp_path / "mine.py"
    layer.write_text("nonsense")
    with pytest.raises(G.UserError):
        load_layer(layer)
    assert [name for name in sys.modules if name.startswith("mine_")] == []


def test_the_check_uses_the_sizes_of_the_run(tmp_path):
    """This layer works only at its own width, and has an offset that only a longer text shows."""
    layer = tmp_path / "mine.py"
    source = START.read_text(encoding="utf-8")
    layer.write_text(source.replace("length =", "assert z.shape[-1] == 5\n    length ="))
    mixer = load_layer(layer)
    offsets = ((1,), (2,), (40,))
    config = G.Config(3, context=99, n_layer=3, d_model=6, rank=5, offsets=offsets, mixer=mixer)
    check_layer(mixer, config)
    with pytest.raises(AssertionError):
        check_layer(mixer)
    layer.write_text(source.replace("-max(offsets) :]", "-39:]"))
    mixer = load_layer(layer)
    with pytest.raises(G.UserError, match="token by token"):
        check_layer(mixer, replace(config, mixer=mixer))


def test_an_op_is_checked():
    x = np.random.default_rng(0).standard_normal((3, 4))

    def forward(x):
        return np.sin(x), x

    assert check_op(forward, lambda dout, x: dout * np.cos(x), x) < 1e-8
    assert check_op(forward, lambda dout, x: (-dout * np.cos(x),), x) > 0.1
    with pytest.raises(G.UserError, match="gradients and parameters differ"):
        check_op(forward, lambda dout, x: (), x)
