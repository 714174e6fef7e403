"""What the tests share: small models, weights of ordinary size, and gradients by differences.

A gradient that is derived by hand is compared with (f(x + hD) - f(x - hD)) / 2h in float64
(experiments/own_layer.py). Rounding of f adds an error of 1e-16 / h, the third derivative an
error of h². With h = 1e-5 both stay near 1e-10.
"""

from charlm import command_line

command_line.prepare()  # before NumPy

import signal
from collections.abc import Callable

import numpy as np
import pytest

from charlm import own_layer
from grassmann import Array, Config, Params, param_shapes

# In the background or under nohup, these signals are ignored. The tests' programs would inherit it.
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

errors: list[tuple[float, str]] = []  # (error, "what, tensor") of every gradient of this run


def pytest_terminal_summary(terminalreporter) -> None:
    if errors:
        terminalreporter.write_line("worst gradient error {:.1e} ({})".format(*max(errors)))


def helper(function: Callable):
    """Makes the function a fixture with its own name."""
    return pytest.fixture(scope="session", name=function.__name__)(lambda: function)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


KINDS = {
    "taps": {},
    "taps-normalized": {"normalize": True},
    "average": {"taps": False},
    "memory": {"memory": True},
    "average-normalized": {"taps": False, "normalize": True},
    "attention": {"mixer": "attention"},
}
VARIANTS = {
    f"{block}-{kind}": {"block": block, **options}
    for block in ("prenorm", "paper")
    for kind, options in KINDS.items()
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> dict:
    """The arguments of Config for each of the twelve kinds of model."""
    return request.param


@helper
def tiny_config(**changes) -> Config:
    """The smallest model in which all sizes differ."""
    sizes = {
        "vocab_size": 11,
        "context": 9,
        "n_layer": 2,
        "d_model": 8,
        "rank": 4,
        "offsets": ((1,), (1, 3)),
        "d_ff": 10,
        "dropout": 0.0,
    }
    sizes |= changes
    if sizes.get("mixer") == "attention":
        del sizes["offsets"]  # attention has none
    return Config(**sizes)


@helper
def ordinary_params(config: Config, seed: int = 0, dtype: type = np.float64) -> Params:
    """Weights as after training. Initial weights are small, 0 or 1, and hide mistakes."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        kind = name.split(".")[-1]
        scale = 0.4
        if kind in ("E", "P", "taps"):
            scale = 0.7
        elif kind[0] in "bw":
            scale = 0.3
        mean = 1 if kind == "w" else 0
        params[name] = (mean + scale * rng.standard_normal(shape)).astype(dtype)
    return params


@pytest.fixture(scope="session")
def tiny_model(tiny_config, ordinary_params) -> Callable[..., tuple[Params, Config]]:
    """tiny_model(dtype, seed, …): a small model with ordinary weights; … are Config's arguments."""

    def tiny_model(dtype: type = np.float64, seed: int = 0, **changes) -> tuple[Params, Config]:
        config = tiny_config(**changes)
        return ordinary_params(config, seed, dtype), config

    return tiny_model


@helper
def batch(B: int, L: int = 9, seed: int = 2) -> tuple[Array, Array]:
    """Random tokens with a run of equal tokens, whose planes are degenerate without taps."""
    text = np.random.default_rng(seed).integers(0, 11, (B, L + 1))
    text[-1, 1:3] = text[-1, 0]
    return text[:, :-1], text[:, 1:]


slope = helper(own_layer.slope)


@helper
def relative_error(a: Array, b: Array) -> float:
    """‖a-b‖ / (‖a‖+‖b‖), and 0 where both are exactly zero."""
    size = np.linalg.norm(a) + np.linalg.norm(b)
    return np.linalg.norm(a - b) / size if size else 0.0


@helper
def check_gradients(label: str, loss: Callable, inputs: Params, grads: Params) -> None:
    """Compare grads with central differences of loss(), which reads the arrays `inputs`."""
    for g in grads.values():
        assert g.dtype == np.float64
    error, name, derived, measured = max(own_layer.gradient_errors(loss, inputs, grads))
    errors.append((error, f"{label}, {name}"))
    assert error <= 1e-6, f"{label}, {name}: derived {derived}, measured {measured}"


def named(values) -> Params:
    """Arrays and dicts of arrays, in one dict: "0", "1", "2.W_red", …"""
    named = {}
    for k, value in enumerate(values):
        if isinstance(value, dict):
            named |= {f"{k}.{name}": a for name, a in value.items()}
        elif value is not None:
            named[f"{k}"] = value
    return named


@pytest.fixture(scope="session")
def check_op(check_gradients) -> Callable:
    def check_op(label: str, forward: Callable, backward: Callable, *inputs) -> None:
        """forward(*inputs) -> (out, cache) and backward(dout, cache) -> gradients are a pair."""
        out, cache = forward(*inputs)
        dout = np.random.default_rng(1).standard_normal(out.shape)
        grads = backward(dout.copy(), cache)
        if not isinstance(grads, tuple):
            grads = (grads,)

        def loss() -> float:
            out, _ = forward(*inputs)
            return (out * dout).sum()

        check_gradients(label, loss, named(inputs), named(grads))

    return check_op
