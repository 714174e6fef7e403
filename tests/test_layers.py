"""A layer of your own: the file to start from is right, and mistakes in it are found and named."""

import hashlib
from pathlib import Path

import pytest

import grassmann as G
from charlm.own_layer import check_layer, load_layer

START = Path(__file__).parent.parent / "docs" / "my_layer.py"


@pytest.fixture(autouse=True)
def no_layer_stays(monkeypatch):
    monkeypatch.setattr(G, "MIXERS", G.MIXERS.copy())


def test_the_models_own_layers_and_the_file_to_start_from_pass():
    mixer = load_layer(START)
    assert mixer == f"my_layer.py#{hashlib.sha256(START.read_bytes()).hexdigest()[:8]}"
    for name in ("grassmann", "attention", mixer):
        check_layer(name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'dz = dz + dp * cache["s"]',
            "pass",
            r"mine.py: wrong gradients, .* blocks.1.mix.W_red, blocks.1.mix.b_red; "
            r"along .* is [\d.]+, .* are [\d.]+$",
        ),
        (
            '"W_mix": dW_mix,',
            '"W_mix": dW_mix.T,',
            r"the gradient of blocks.0.mix.W_mix has shape \(8, 4\), not \(4, 8\)",
        ),
        ('"W_mix": dW_mix,', "", r"gradients and parameters differ: \['blocks.0.mix.W_mix'"),
        (
            '"W_mix": dW_mix,',
            '"W_mix": dW_mix * np.nan,',
            "wrong gradients, .*: blocks.0.mix.W_mix, blocks.1.mix.W_mix; .* is nan",
        ),
        (
            "s = s[:, -length:]",
            "pass",
            "mine.py reads a text at once, but not in parts: ValueError: operands",
        ),
        (
            "-max(config.offsets[layer]) :]",
            "-1:]",
            r"mine.py: token by token it returns other logits .* by [\d.]+$",
        ),
        ("z * s,", "z * s + z.mean(1, keepdims=True),", r"mine.py sees the future: .* by \d"),
        (
            "z * s,",
            "z * s * np.ones(4),",
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
