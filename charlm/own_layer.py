"""A mixing layer of your own: its file is loaded, and three questions are asked of it.

Are its gradients right? Does it return the same token by token as all at once? Does it see the
future? docs/my_layer.py is such a file.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import grassmann as G

PARTS = ("forward", "backward", "shapes")  # section 12 of the tutorial says what they are

# ---- loading -------------------------------------------------------------------------------------


def load_layer(path: str | Path) -> str:
    """Run the file and add its layer to G.MIXERS. Returns the layer's name.

    The name is file and hash, "my_layer.py#1a2b3c4d". A Config of this mixer, and so a checkpoint,
    fits only this file, unchanged. The layer may import files beside it. Raises UserError.
    """
    path = Path(path).absolute()
    is_file = path.suffix == ".py" and path.is_file()
    G.require(is_file, f"a layer is a Python file, and there is no such file: {path.name}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end, where it hides no other module
    try:
        exec(compile(content, path, "exec"), vars(module))  # the bytes with this hash
    except Exception as error:
        del sys.modules[spec.name]
        calls = traceback.extract_tb(error.__traceback__)
        lines = [f", line {at.lineno}" for at in calls if at.filename == str(path)]
        where = f"{path.name}{''.join(lines[-1:])}"
        raise G.UserError(f"{where}: {type(error).__name__}: {error}") from error
    for part in PARTS:
        missing = f"{path.name} defines no function {part}; docs/my_layer.py has all three"
        G.require(callable(vars(module).get(part)), missing)
    mixer = f"{path.name}#{digest}"
    G.MIXERS[mixer] = (module.forward, module.backward, module.shapes)
    return mixer


# ---- gradients -----------------------------------------------------------------------------------


def slope(loss: Callable[[], float], x: G.Array, D: G.Array, h: float = 1e-5) -> float:
    """The derivative of loss(), which reads x, along D: (f(x + hD) - f(x - hD)) / 2h."""
    start = x.copy()
    values = []
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
    differ = sorted(grads.keys() ^ params.keys())
    G.require(not differ, f"gradients and parameters differ: {differ}")
    # Not a seed that a reader types: with x itself as direction, stretching x would pass unseen.
    rng = np.random.default_rng([2026, 7])
    found = []
    for name, x in params.items():
        g = grads[name]
        G.require(g.shape == x.shape, f"the gradient of {name} has shape {g.shape}, not {x.shape}")
        D = rng.standard_normal(x.shape)  # a random direction: a mistake at any entry shows
        length = np.linalg.norm(D)
        derived = np.vdot(g, D)
        measured = length * slope(loss, x, D / length)
        error = abs(derived - measured) / max(np.linalg.norm(g), 1e-3)
        found.append((error if np.isfinite(error) else np.inf, name, derived, measured))
    return found


def check_op(forward: Callable, backward: Callable, *inputs: G.Array) -> float:
    """The largest error of an op's gradients: about 1e-9 if they are right, about 1 if not.

    forward(*inputs) -> (out, cache) and backward(dout, cache) -> one gradient for each input, an
    array or a tuple. Inputs are float64. Raises UserError if a gradient is missing or misshapen.
    """
    out, cache = forward(*inputs)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    grads = backward(dout.copy(), cache)
    if not isinstance(grads, tuple):
        grads = (grads,)

    def loss() -> float:  # a random sum of what the op returns
        out, _ = forward(*inputs)
        return (out * dout).sum()

    by_place = dict(enumerate(inputs)), dict(enumerate(grads))
    return max(gradient_errors(loss, *by_place))[0]


# ---- streaming and the future --------------------------------------------------------------------


def stream_error(params: G.Params, config: G.Config, tokens: G.Array) -> float:
    """The largest difference between the logits of a stream and `forward`.

    The stream reads half of the tokens as a prompt, and the other half one by one.
    """
    half = len(tokens) // 2
    state = G.stream_init(params, config)
    rows = []
    for part in (tokens[:half], *tokens[half:, None]):
        logits, state = G.stream_read(params, config, state, part.tolist())
        rows.append(logits)
    expected = G.forward(params, config, tokens[None])[0, half - 1 :]
    return float(np.abs(rows - expected).max())


def sees_the_future(params: G.Params, config: G.Config, tokens: G.Array) -> float:
    """How much the logits of the first half change if the second half changes. Causal: 0."""
    half = len(tokens) // 2
    changed = tokens.copy()
    changed[half:] = (changed[half:] + 1) % config.vocab_size
    logits = G.forward(params, config, np.stack([tokens, changed]))
    return float(np.ptp(logits[:, :half], axis=0).max())


# ---- all three questions -------------------------------------------------------------------------


def check_layer(mixer: str, config: G.Config | None = None) -> None:
    """Ask a model of two such layers all three questions. Raises UserError: what is wrong.

    `config` gives the sizes; without it the model is small. Only a second layer notices rows that
    the first returns for old tokens. Its layers have the offsets of config's first and last layer.
    """
    file = mixer.partition("#")[0]
    if config is None:
        config = G.Config(11, context=24, n_layer=2, d_model=8, rank=4, d_ff=10, mixer=mixer)
    offsets = (config.offsets[0], config.offsets[-1]) if config.offsets else ()
    config = replace(config, vocab_size=11, n_layer=2, offsets=offsets, dropout=0.0, mixer=mixer)
    params = G.init_params(config, dtype=np.float64)
    rng = np.random.default_rng(1)
    for value in params.values():  # the initial weights are so small that they hide mistakes
        value += 0.8 / np.sqrt(config.d_model) * rng.standard_normal(value.shape)
    longest = max(map(max, offsets), default=0)
    tokens = rng.integers(0, 11, min(config.context, max(24, 2 * longest)))

    h = rng.standard_normal((2, len(tokens), config.d_model))
    out, _ = G.MIXERS[mixer][0](h, G.Scope(params, "blocks.0.mix."), config, 0)
    rule = f"{file}: forward must return the shape of h, {h.shape}, not {np.shape(out)}"
    G.require(np.shape(out) == h.shape, rule)
    G.require(np.isfinite(out).all(), f"{file} returns numbers that are not finite")
    change = sees_the_future(params, config, tokens)
    future = f"{file} sees the future: later tokens change earlier logits, by {change:.2g}"
    G.require(change < 1e-9, future)
    check_gradients(file, params, config, h)
    try:
        change = stream_error(params, config, tokens)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise G.UserError(f"{file} reads a text at once, but not in parts: {reason}") from error
    parts = f"{file}: token by token it returns other logits than all at once, by {change:.2g}"
    G.require(change < 1e-8, parts)
    narrow = {name: value.astype(np.float32) for name, value in params.items()}
    _, grads = G.loss_and_grads(narrow, config, tokens[None, :-1], tokens[None, 1:])
    sizes = {grad.dtype.itemsize for grad in grads.values()}
    G.require(sizes == {4}, f"{file} makes float64 of float32: give new arrays h.dtype")


def check_gradients(file: str, params: G.Params, config: G.Config, h: G.Array) -> None:
    """Both layers alone, in the order of the backward pass. Names the first wrong gradient."""
    forward, backward, shapes = G.MIXERS[config.mixer]
    dout = np.random.default_rng(2).standard_normal(h.shape)

    def run(layer: int) -> tuple:
        return forward(h, G.Scope(params, f"blocks.{layer}.mix."), config, layer)

    caches = []
    for layer in range(config.n_layer):
        _, cache = run(layer)
        caches.append(cache)
    for layer in reversed(range(config.n_layer)):
        dh, grads = backward(dout.copy(), caches[layer])
        own = {name: params[f"blocks.{layer}.mix.{name}"] for name in shapes(config, layer)}
        inputs = dict(reversed(own.items())) | {"h": h}  # the last used comes first

        def loss(layer: int = layer) -> float:
            out, _ = run(layer)
            return (out * dout).sum()

        errors = gradient_errors(loss, inputs, grads | {"h": dh})
        wrong = [row for row in errors if row[0] > 1e-6]
        if wrong:
            (_, name, derived, measured), *rest = wrong
            line = f"{file}: the gradient of {name} in layer {layer} is wrong: along a random "
            line += f"direction {derived:.6g}, by central differences {measured:.6g}"
            if rest:
                line += "; later in the backward, so perhaps only for this reason: "
                line += ", ".join(row[1] for row in rest)
            raise G.UserError(line)
