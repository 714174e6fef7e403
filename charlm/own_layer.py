"""Three questions to ask of a mixing layer of your own, and the loader for its file.

Are its gradients right? Does it return the same token by token as all at once? Does it see the
future? docs/my_layer.py is such a file.
"""

import hashlib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

import grassmann as G


def load_layer(path: str | Path) -> str:
    """Run the file and add its layer to G.MIXERS. Returns the layer's name.

    The name is file and hash, "my_layer.py#1a2b3c4d". A Config of this mixer, and so a checkpoint,
    fits only this file, unchanged. Raises UserError.
    """
    path = Path(path)
    G.require(
        path.suffix == ".py" and path.is_file(),
        f"a layer is a Python file, and there is no such file: {path}",
    )
    content, module = path.read_bytes(), ModuleType(path.stem)
    try:
        exec(
            compile(content, path, "exec"), vars(module)
        )  # not imported, so that the hashed bytes are what runs
    except Exception as error:
        lines = [
            f", line {at.lineno}"
            for at in traceback.extract_tb(error.__traceback__)
            if at.filename == str(path)
        ]
        raise G.UserError(
            f"{path}{''.join(lines[-1:])}: {type(error).__name__}: {error}"
        ) from error
    for part in (
        parts := ("forward", "backward", "shapes")
    ):  # section 12 of the tutorial says what they are
        G.require(
            callable(vars(module).get(part)),
            f"{path} defines no function {part}; docs/my_layer.py has all three",
        )
    mixer = f"{path.name}#{hashlib.sha256(content).hexdigest()[:8]}"
    G.MIXERS[mixer] = tuple(vars(module)[part] for part in parts)
    return mixer


def slope(loss: Callable[[], float], x: G.Array, D: G.Array, h: float = 1e-5) -> float:
    """The derivative of loss(), which reads x, along D: (f(x + hD) - f(x - hD)) / 2h."""
    start, values = x.copy(), []
    for side in (h, -h):
        x[...] = start + side * D
        values.append(float(loss()))
    x[...] = start
    return (values[0] - values[1]) / (2 * h)


def gradient_errors(loss: Callable[[], float], params: G.Params, grads: G.Params) -> list[tuple]:
    """(error, name, derived, measured) of each gradient, measured by central differences of loss().

    loss() reads the arrays `params`, float64. Errors are relative to the gradient's length, but at
    least to 1e-3.
    """
    G.require(
        grads.keys() == params.keys(),
        f"gradients and parameters differ: {sorted(grads.keys() ^ params.keys())}",
    )
    draw, found = np.random.default_rng(0).standard_normal, []
    for name, x in params.items():
        G.require(
            grads[name].shape == x.shape,
            f"the gradient of {name} has shape {grads[name].shape}, not {x.shape}",
        )
        D = draw(x.shape)  # a random direction: a mistake at any entry shows
        derived, measured = (
            np.vdot(grads[name], D),
            np.linalg.norm(D) * slope(loss, x, D / np.linalg.norm(D)),
        )
        error = abs(derived - measured) / max(np.linalg.norm(grads[name]), 1e-3)
        found.append((error if np.isfinite(error) else np.inf, name, derived, measured))
    return found


def stream_error(params: G.Params, config: G.Config, tokens: G.Array) -> float:
    """The largest difference between the logits of a stream and `forward`.

    The stream reads half of the tokens as a prompt, and the other half one by one.
    """
    half, state, rows = len(tokens) // 2, G.stream_init(params, config), []
    for part in (tokens[:half], *tokens[half:, None]):
        logits, state = G.stream_read(params, config, state, part.tolist())
        rows.append(logits)
    return float(np.abs(rows - G.forward(params, config, tokens[None])[0, half - 1 :]).max())


def sees_the_future(params: G.Params, config: G.Config, tokens: G.Array) -> float:
    """How much the logits of the first half change if the second half changes. Causal: 0."""
    half, changed = len(tokens) // 2, tokens.copy()
    changed[half:] = (changed[half:] + 1) % config.vocab_size
    return float(
        np.ptp(G.forward(params, config, np.stack([tokens, changed]))[:, :half], axis=0).max()
    )


def check_layer(mixer: str) -> None:
    """Ask a small model all three questions. Raises UserError, which says what is wrong.

    It has two such layers. Only a second one notices rows that the first returns for old tokens.
    """
    file = mixer.partition("#")[0]
    config = G.Config(
        11, context=24, n_layer=2, d_model=8, rank=4, d_ff=10, dropout=0.0, mixer=mixer
    )
    rng, params = np.random.default_rng(1), G.init_params(config, dtype=np.float64)
    for value in params.values():  # the initial weights are so small that they hide mistakes
        value += 0.3 * rng.standard_normal(value.shape)
    tokens = rng.integers(0, 11, 24)

    def run(params=params):
        return G.loss_and_grads(params, config, tokens[None, :-1], tokens[None, 1:])

    change, (_, grads) = sees_the_future(params, config, tokens), run()
    G.require(np.isfinite(change), f"{file} returns numbers that are not finite")
    G.require(
        change < 1e-9,
        f"{file} sees the future: later tokens change earlier logits, by {change:.2g}",
    )
    own = ({k: v for k, v in group.items() if ".mix." in k} or group for group in (params, grads))
    wrong = [row for row in gradient_errors(lambda: run()[0], *own) if row[0] > 1e-6]
    _, name, derived, measured = max(wrong, default=(0, "", 0, 0))
    G.require(
        not wrong,
        f"{file}: wrong gradients, in the order of the forward: "
        f"{', '.join(row[1] for row in wrong)}; along a random direction {name} is {derived:.6g}, "
        f"central differences of the loss are {measured:.6g}",
    )
    try:
        change = stream_error(params, config, tokens)
    except Exception as error:
        raise G.UserError(
            f"{file} reads a text at once, but not in parts: {type(error).__name__}: {error}"
        ) from error
    G.require(
        change < 1e-8,
        f"{file}: token by token it returns other logits than all at once, by {change:.2g}",
    )
    narrow = run({name: value.astype(np.float32) for name, value in params.items()})[1].values()
    G.require(
        {grad.dtype.itemsize for grad in narrow} == {4},
        f"{file} makes float64 of float32: give new arrays h.dtype",
    )
