"""What the tests share: small models, weights of ordinary size, and gradients by differences.

A derivative that is derived by hand is checked against (f(x + hD) - f(x - hD)) / 2h in float64: the
rounding of f enters as 1e-16 / h, the third derivative as h², and h = 1e-5 leaves both near 1e-10.
"""

import cli  # noqa: F401, I001  (before NumPy)

import signal
from collections.abc import Callable

import numpy as np
import pytest

from grassmann import Array, Config, Params, param_shapes

# In the background, or under nohup, these are ignored, also by the programs that the tests start.
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), usual)

errors: list[tuple[float, str]] = []  # (error, "what, tensor") of every gradient of this run

def pytest_terminal_summary(terminalreporter) -> None:
    for error, where in sorted(errors)[-1:]:
        terminalreporter.write_line(f"worst gradient error {error:.1e} ({where})")

def helper(function: Callable):
    """Tests ask for the function as for a fixture, by its name."""
    return pytest.fixture(scope="session", name=function.__name__)(lambda: function)

@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

VARIANTS = {
    "-".join([block, "taps" if taps else "average", *["normalized"] * normalize]):
    {"block": block, "taps": taps, "normalize": normalize}
    for block in ("prenorm", "paper") for taps in (True, False) for normalize in (True, False)
} | {f"{block}-attention": {"block": block, "mixer": "attention"} for block in ("prenorm", "paper")}
VARIANTS |= {f"{block}-memory": {"block": block, "memory": True} for block in ("prenorm", "paper")}

@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> dict:
    """What makes each of the twelve models, as arguments of Config."""
    return request.param

@helper
def tiny_config(**changes) -> Config:
    """As small as a model can be while every size differs from every other."""
    sizes = {"vocab_size": 11, "context": 9, "n_layer": 2, "d_model": 8, "rank": 4, "d_ff": 10}
    return Config(**sizes | {"offsets": ((1,), (1, 3)), "dropout": 0.0} | changes)

@helper
def ordinary_params(config: Config, seed: int = 0, dtype: type = np.float64) -> Params:
    """Weights as after training: the initial ones, small or 0 or 1, hide mistakes."""
    rng, params = np.random.default_rng(seed), {}
    for name, shape in param_shapes(config).items():
        kind = name.split(".")[-1]
        vector = kind.startswith(("b", "w"))
        scale = 0.3 if vector else 0.7 if kind in ("E", "P", "taps") else 0.4
        value = (kind == "w") + scale * rng.standard_normal(shape)
        params[name] = value.astype(dtype)
    return params

@pytest.fixture(scope="session")
def tiny_model(tiny_config, ordinary_params) -> Callable[..., tuple[Params, Config]]:
    """tiny_model(dtype, seed, ...): a model of ordinary weights; the rest as of Config."""

    def tiny_model(dtype: type = np.float64, seed: int = 0, **changes) -> tuple[Params, Config]:
        config = tiny_config(**changes)
        return ordinary_params(config, seed, dtype), config
    return tiny_model

@helper
def batch(B: int, L: int = 9, seed: int = 2) -> tuple[Array, Array]:
    """Random tokens, with a run of equal ones: without taps their planes are degenerate."""
    text = np.random.default_rng(seed).integers(0, 11, (B, L + 1))
    text[-1, 1:3] = text[-1, 0]
    return text[:, :-1], text[:, 1:]

@helper
def slope(loss: Callable[[], float], x: Array, direction: Array, h: float = 1e-5) -> float:
    """The derivative of loss() as x, which it reads, moves in this direction."""
    start = x.copy()
    x[...] = start + h * direction
    up = loss()
    x[...] = start - h * direction
    down = loss()
    x[...] = start
    return (up - down) / (2 * h)

@helper
def relative_error(a: Array, b: Array) -> float:
    """‖a-b‖ / (‖a‖+‖b‖), and 0 where both are exactly zero."""
    size = np.linalg.norm(a) + np.linalg.norm(b)
    return np.linalg.norm(a - b) / size if size else 0.0

@pytest.fixture(scope="session")
def check_gradients(slope, relative_error) -> Callable:
    def check(label: str, loss: Callable, inputs: Params, grads: Params, entries: int = 30) -> None:
        """Compare grads with central differences of loss(), which reads the arrays `inputs`.

        Of every array some entries are tried one by one, and then all together in one random
        direction, scaled so that its slope is about as large as the whole gradient.
        """
        rng = np.random.default_rng(0)
        assert grads.keys() == inputs.keys()
        for name, x in inputs.items():
            assert (grads[name].shape, grads[name].dtype) == (x.shape, np.float64), name
            directions = []
            for place in rng.permutation(x.size)[:entries]:
                one = np.zeros(x.shape)
                one.flat[place] = 1
                directions.append(one)
            everywhere = rng.standard_normal(x.shape)
            length = np.linalg.norm(everywhere)
            analytic = [np.vdot(grads[name], D) for D in [*directions, everywhere]]
            numeric = [slope(loss, x, D) for D in directions]
            numeric.append(length * slope(loss, x, everywhere / length))
            if not grads[name].any():  # a gradient of zero has no relative error
                assert np.abs(numeric).max() < 1e-9, f"{label}, {name}: zero, not {numeric}"
                continue
            error = relative_error(np.array(analytic), np.array(numeric))
            errors.append((error, f"{label}, {name}"))
            assert error <= 1e-6, f"{label}, {name}: error {error:.1e}\n{analytic}\n{numeric}"
    return check

@pytest.fixture(scope="session")
def check_op(check_gradients) -> Callable:
    def named(values) -> Params:
        """Arrays and dicts of arrays, in one dict: "0", "1", "2.W_red", …"""
        pairs = [(f"{k}", value) for k, value in enumerate(values) if value is not None]
        return {f"{k}.{name}" if name else k: a for k, value in pairs
                for name, a in (value if isinstance(value, dict) else {"": value}).items()}

    def check(label: str, forward: Callable, backward: Callable, *inputs: Array | Params) -> None:
        """forward(*inputs) -> (out, cache) and backward(dout, cache) -> gradients are a pair."""
        out, cache = forward(*inputs)
        dout = np.random.default_rng(1).standard_normal(out.shape)
        grads = backward(dout * 1, cache)
        grads = grads if isinstance(grads, tuple) else (grads,)
        loss = lambda: float((forward(*inputs)[0] * dout).sum())  # noqa: E731
        check_gradients(label, loss, named(inputs), named(grads))
    return check
