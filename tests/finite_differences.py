"""Central differences, and weights of ordinary size to take them at.

A derivative that is derived by hand is checked against (f(x + hD) - f(x - hD)) / 2h in float64: the rounding
of f enters as 1e-16 / h, the third derivative as h², and h = 1e-5 leaves both near 1e-10.
"""

import numpy as np

from grassmann import Config, param_shapes

errors = []  # (error, "what[variant], tensor") of every comparison in this run; conftest.py prints the worst


def tiny_config(**changes) -> Config:
    """A model that is as small as it can be while every size differs from every other."""
    sizes = {"vocab_size": 11, "context": 9, "n_layer": 2, "d_model": 8, "rank": 4, "d_ff": 10}
    return Config(**sizes | {"offsets": ((1,), (1, 3))} | changes)


def ordinary_params(config: Config, seed: int = 0, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Weights as after training: the initial ones are so small, and so often 0 or 1, that they hide mistakes."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        kind = name.split(".")[-1]
        scale = 0.3 if kind.startswith(("b", "w")) else 0.7 if len(shape) == 1 or kind in ("E", "P", "taps") else 0.4
        params[name] = ((kind == "w") + scale * rng.standard_normal(shape)).astype(dtype)
    return params


def slope(loss, x: np.ndarray, direction: np.ndarray, h: float = 1e-5) -> float:
    """The derivative of loss() as x, which it reads, moves in this direction."""
    start = x.copy()
    x[...] = start + h * direction
    up = loss()
    x[...] = start - h * direction
    down = loss()
    x[...] = start
    return (up - down) / (2 * h)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """‖a-b‖ / (‖a‖+‖b‖), and 0 where both are exactly zero."""
    size = np.linalg.norm(a) + np.linalg.norm(b)
    return np.linalg.norm(a - b) / size if size else 0.0


def check_gradients(label: str, loss, inputs: dict, grads: dict, entries: int = 30) -> None:
    """Compare grads with central differences of loss(), which reads the arrays `inputs`.

    Of every tensor some entries are tried one by one, and then all together in one random direction, which
    is scaled so that its slope is about as large as the whole gradient.
    """
    rng = np.random.default_rng(0)
    assert grads.keys() == inputs.keys()
    for name, x in inputs.items():
        assert grads[name].shape == x.shape, name
        assert grads[name].dtype == np.float64, name
        directions = []
        for place in rng.permutation(x.size)[:entries]:
            one = np.zeros(x.size)
            one[place] = 1
            directions.append(one.reshape(x.shape))
        everywhere = rng.standard_normal(x.shape)
        length = np.linalg.norm(everywhere)
        analytic = np.array([np.vdot(grads[name], D) for D in [*directions, everywhere]])
        numeric = np.array([*(slope(loss, x, D) for D in directions), length * slope(loss, x, everywhere / length)])
        if not grads[name].any():  # a gradient of zero has no relative error
            assert np.abs(numeric).max() < 1e-9, f"{label}, {name}: zero, but the differences say {numeric}"
            continue
        error = relative_error(analytic, numeric)
        errors.append((error, f"{label}, {name}"))
        assert error <= 1e-6, f"{label}, {name}: error {error:.1e}\n{analytic}\n{numeric}"
