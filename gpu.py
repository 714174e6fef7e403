"""The same model on a CUDA GPU, with CuPy: nearly all names of grassmann.py, in the same order.

Here is only what differs on a GPU. What is plain array code there is the same code here:
`_borrowed` gives a function of grassmann.py this module's names, so that its `np` is CuPy and the
ops that it calls are the ones below. Those are CUDA kernels (kernels.cu) where array code would
pass over memory a dozen times; matrix products are cuBLAS's (card.py). Two things are done later
than in grassmann.py, by a kernel that reads the numbers anyway: what joins the residual stream, the
gate too, is a sum that the next LayerNorm adds up (`_Sum`); and a gradient that is a sum over
tokens may come in parts, shape (blocks, …), which are added at the end (`gathered`).

All arrays are CuPy arrays, except tokens, which may lie on either side. Batches and initial weights
are drawn on the host, the same numbers as in grassmann.py; dropout is drawn on the device, from
keys that the host draws. The loss stays on the device until somebody looks at it. A checkpoint of
either module loads in the other. A token outside the vocabulary goes unnoticed. One thread only.

To start a kernel costs the host more than a small one costs the card. The pass forward and back,
a hundred of them, is therefore recorded as a CUDA graph, in its second run.
"""

from __future__ import annotations

import functools
import math
import operator  # noqa: F401  (for what is borrowed)
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType, SimpleNamespace

import numpy

import card
import grassmann
from card import cp, over_tokens, parts_of, per_element, per_token, product

Flat, set_precision = card.Flat, card.set_precision

np = SimpleNamespace(**vars(cp) | {"random": numpy.random})  # what borrowed functions find as np
np.array = lambda a: _constant(a) if isinstance(a, tuple) else cp.array(a)  # (offsets)
_constant, _arange = functools.cache(cp.array), functools.cache(cp.arange)
Array = cp.ndarray
Params = dict[str, Array]
Rng = numpy.random.Generator
SHARD_TOKENS = 4096  # at a time in a validation
ON_HOST = 5_000_000  # parameters, up to which NumPy writes a character sooner than kernels start

def _borrowed(function: Callable) -> Callable:
    """A function of grassmann.py that finds this module's names: CuPy as np, and the ops below."""
    own = FunctionType(function.__code__, globals(), function.__name__, function.__defaults__)
    return functools.update_wrapper(own, function)

def _half(a: Array) -> bool:
    """Is it one of the halves of [h ; g]?"""
    whole = a.base
    return (whole is not None and whole.shape == (*a.shape[:-1], 2 * a.shape[-1])
            and whole.strides == a.strides)

def _rows(a: Array) -> tuple:
    """What is passed to a kernel for a, contiguous or a half, and how far apart its rows are."""
    return ([a], 2 * a.shape[-1]) if _half(a) else (a, a.shape[-1])

# ---- small ops -----------------------------------------------------------------------------------

def linear_forward(x: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """y = x W + b for x (..., in), W (in, out), b (out); y is (..., out)."""
    y = product(x, W)
    y += b
    return y, (x, W)

def linear_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """dx = dy Wᵀ,  dW = xᵀ dy,  db = Σ_t dy_t."""
    x, W = cache
    return product(dy, W.T), over_tokens(x, dy), dy.reshape(-1, dy.shape[-1]).sum(0)

def dot(a: Array, b: Array) -> Array:
    """Inner product over the last axis, kept: (..., r), (..., r) -> (..., 1)."""
    return (a * b).sum(-1, keepdims=True)

@dataclass
class _Sum:
    """h + D(x + b), D dropout, which the next LayerNorm adds up, into `total`; or h + D(gate).

    x (..., d) is a product without its bias b (d). If there is `hg` = [h' ; g] (..., 2d), x + b are
    the logits of a gate between those. All but x may be missing.
    """

    x: Array
    b: Array
    hg: Array | None = None
    h: Array | None = None
    keep: tuple | None = None  # dropout's key and rate
    total: Array | None = None
    __array_ufunc__ = None  # so that array + this comes here

    def __radd__(self, h: Array) -> _Sum:
        return replace(self, h=h)

    def __add__(self, other: Array | _Sum) -> Array | _Sum:
        return self.total + other

@dataclass
class _SumGrad:
    """The gradients of a `_Sum`: of h, of x, of b (in parts), and directly of hg."""

    h: Array
    x: Array
    b: Array
    hg: Array | None

    def __add__(self, dh: Array) -> Array:
        return self.h + dh

def layernorm_forward(x: Array | _Sum, w: Array, b: Array, eps: float = 1e-5) -> tuple:
    """x̂ = (x - mean) / sqrt(var + eps) over the last axis, y = w ⊙ x̂ + b; x (..., d), w b (d).

    y is the left half of an array that has room for g beside it.
    """
    s = x if isinstance(x, _Sum) else _Sum(cp.ascontiguousarray(x), None)
    d, T, (key, rate) = len(w), s.x.size // len(w), s.keep or (None, 0.0)
    s.total = cp.empty(s.x.shape, w.dtype) if s is x else s.x
    y = cp.empty((*s.x.shape[:-1], 2 * d), w.dtype)[..., :d]
    mean, inv_std = cp.empty(T, w.dtype), cp.empty(T, w.dtype)
    per_token("layernorm_forward", T, d, 2 * d, eps, key, rate, s.b, s.hg, s.h, w, b, s.x, s.total,
              [y], mean, inv_std)
    return y, (s, w, mean, inv_std)

def layernorm_backward(
    dy: Array, cache: tuple, dmore: Array | _SumGrad | None = None
) -> tuple[Array | _SumGrad, Array, Array]:
    """dx, dw, db, as in grassmann.py; `dmore` is added to dx, where x also went on elsewhere.

    dw and db come in parts; of a `_Sum` the gradients of its terms take the place of dx.
    """
    s, w, mean, inv_std = cache
    x, d, T, (dy, row), (key, rate) = s.total, len(w), len(mean), _rows(dy), s.keep or (None, 0.0)
    parts, dsum = parts_of(T, 3, d, dtype=x.dtype), cp.empty(x.shape, x.dtype)
    dhg = None if s.hg is None else cp.empty(s.hg.shape, x.dtype)
    dx = dsum if key is None and dhg is None else cp.empty(x.shape, x.dtype)
    dmore = dmore.h if isinstance(dmore, _SumGrad) else dmore
    per_token("layernorm_backward", T, d, row, key, rate, dy, dmore, x, w, mean, inv_std, s.x, s.hg,
              dsum, dx, dhg, parts)
    grad = dsum if s.total is s.x else _SumGrad(dsum, dx, parts[:, 2], dhg)
    return grad, parts[:, 0], parts[:, 1]

def gelu_forward(x: Array, b: Array | None = None) -> tuple[Array, tuple]:
    """GELU(x + b) for x (..., d), b (d); GELU(x) = x/2 (1 + tanh q(x)), q as in grassmann.py."""
    y, d = cp.empty(x.shape, x.dtype), x.shape[-1]
    per_token("gelu_forward", x.size // d, d, x, b, y)
    return y, (x, b)

def gelu_backward(dy: Array, cache: tuple) -> Array | tuple[Array, Array]:
    """GELU' = (1 + tanh q)/2 + x/2 (1 - tanh² q) q'(x),  q'(x) = c (1 + 3 a x²). With b: dx, db."""
    x, b = cache
    d, T = x.shape[-1], x.size // x.shape[-1]
    dx, db = cp.empty(x.shape, x.dtype), parts_of(T, d, dtype=x.dtype)
    per_token("gelu_backward", T, d, dy, x, b, dx, db)
    return dx if b is None else (dx, db)

def dropout_forward(x: Array | _Sum, rate: float, rng: Rng | None) -> tuple:
    """Zero a fraction `rate` of x, divide the rest by 1 - rate: the mean stays. rng None: x.

    `rng` draws one key, which the device hashes with the place of each element.
    """
    if rng is None or rate == 0:
        return x, None
    keep = cp.asarray(rng.integers(2**63)), float(rate)
    return replace(x, keep=keep) if isinstance(x, _Sum) else dropout_backward(x, keep), keep

def dropout_backward(dy: Array | _SumGrad, keep: tuple | None) -> Array | _SumGrad:
    """y = keep ⊙ x, so dx = keep ⊙ dy. (In the gradients of a `_Sum` it is done.)"""
    if keep is None or isinstance(dy, _SumGrad):
        return dy
    dx = cp.empty(dy.shape, dy.dtype)
    per_element("dropout", dy.size, *keep, dy, dx)
    return dx

embedding_forward = _borrowed(grassmann.embedding_forward)

def embedding_backward(dx: Array, cache: tuple) -> Array:
    """dE_k = Σ dx_t over the tokens t that are k: dE = Oᵀ dx, row t of O (T, V) is 1 at k alone."""
    tokens, (V, _) = cache
    one_hot = cp.empty((tokens.size, V), dx.dtype)
    per_element("one_hot", one_hot.size, V, tokens.astype(numpy.int32, copy=False), one_hot)
    return over_tokens(one_hot, dx)

def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """Mean over tokens of -log softmax(logits)[target] in nats; logits (..., V), targets (...).

    The cache holds the gradient."""
    V, targets = logits.shape[-1], targets.astype(numpy.int32, copy=False)
    losses, dlogits = (cp.empty(shape, logits.dtype) for shape in (targets.size, (targets.size, V)))
    per_token("cross_entropy", targets.size, V, logits, targets, losses, dlogits)
    return losses.mean(), (dlogits,)

def cross_entropy_backward(dloss: float, cache: tuple) -> Array:
    """∂(log Σ exp(x) - x_target)/∂x = softmax(x) - onehot(target), over T for the mean; (T, V)."""
    dlogits, = cache
    return dlogits if dloss == 1 else dloss * dlogits

# ---- the mixing layer ----------------------------------------------------------------------------

unit_area_forward, unit_area_backward, partner_forward, partner_backward = map(_borrowed, (
    grassmann.unit_area_forward, grassmann.unit_area_backward,
    grassmann.partner_forward, grassmann.partner_backward))

@functools.cache
def _indices(offsets: tuple[int, ...], r: int) -> tuple[Array, Array, Array]:
    """The offsets (m) and the index pairs i < j below r (n), (n), on the device."""
    return tuple(cp.asarray(a, numpy.int32) for a in (offsets, *grassmann.pairs(r)))

contract = _borrowed(grassmann.contract)
memory_forward, memory_backward = map(
    _borrowed, (grassmann.memory_forward, grassmann.memory_backward))

def mix_forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[_Sum, dict]:
    """The Grassmann mixing layer (paper, section 3): h (B, L, d) -> mix (B, L, d).

        z = h W_red + b_red        reduce                       (B, L, r)
        s = partner(z)             look back                    (B, L, r)
        p = z ∧ s                  span a plane                 (B, L, n)
        g = p W_plu + b_plu        project back                 (B, L, d)   + memory(h, z), if any
        mix = gate(h, g)           blend, in the next LayerNorm (B, L, d)

    One kernel does the biases, p, and with taps s. `past` and the cache are as in grassmann.py; its
    alpha is the gate from that LayerNorm on.
    """
    (B, L, d), r, offsets, b_red = h.shape, config.rank, config.offsets[layer], w["b_red"]
    x, taps = product(h, w["W_red"]), w["taps"] if config.taps and not config.normalize else None
    if past is not None or taps is None:
        x, b_red = x + b_red, None
    if past is not None:
        x = cp.concatenate([past["z"], x], 1) if past else x  # (B, max Δ + L, r)
        past["z"] = x[:, -max(offsets) :]
    z, s = cp.empty((B, L, r), h.dtype), cp.empty((B, L, r), h.dtype)
    cache, before = {"w": w, "offsets": offsets, "taps": taps}, x.shape[1] - L
    if taps is None:
        every_s, cache["partner"] = partner_forward(
            x, w["taps"] if config.taps else None, offsets, config.normalize)
        s = cp.ascontiguousarray(every_s[:, before:])
    left = _half(h) and h.data.ptr == h.base.data.ptr
    hg = h.base if left else cp.concatenate([h, h], -1)
    deltas, i, j = _indices(offsets, r)
    p, g = cp.empty((B, L, len(i)), h.dtype), hg[..., d:]
    per_token("wedge_forward", B * L, L + before, before, r, len(offsets), len(i), d, deltas, i, j,
              x, b_red, taps, w["b_plu"], z, s, p, [g])
    product(p, w["W_plu"], out=g, add=True)
    if config.memory:
        m, cache["memory"] = memory_forward(h, z, w, past)
        g += m
    alpha = product(hg, w["W_gate"])
    return _Sum(alpha, w["b_gate"], hg), cache | {"hg": hg, "z": z, "s": s, "p": p, "alpha": alpha}

def mix_backward(dmix: _SumGrad, cache: dict) -> tuple[Array, Params]:
    """The steps of `mix_forward` in reverse; h is used three times, so three gradients add up."""
    hg, w, offsets, z, p = (cache[name] for name in ("hg", "w", "offsets", "z", "p"))
    (B, L, r), n, d, dhg = z.shape, p.shape[-1], hg.shape[-1] // 2, dmix.hg
    grads = {"W_gate": over_tokens(hg, dmix.x), "b_gate": dmix.b}
    product(dmix.x, w["W_gate"].T, out=dhg, add=True)
    dh, dg = dhg[..., :d], dhg[..., d:]
    grads["W_plu"], dp = over_tokens(p, dg), product(dg, w["W_plu"].T)
    dz, ds = cp.empty(z.shape, z.dtype), cp.empty(z.shape, z.dtype)
    per_token("wedge_backward", B * L, r, n, dp, z, cache["s"], dz, ds)
    m = 0 if cache["taps"] is None else len(offsets)
    if m == 0:
        dz_partner, dtaps = partner_backward(ds, cache["partner"])
        dz += dz_partner
        grads |= {} if dtaps is None else {"taps": dtaps}
    if "memory" in cache:
        dh_memory, dz_memory, memory = memory_backward(dg, cache["memory"])
        dh += dh_memory
        dz += dz_memory
        grads |= memory
    parts, (deltas, *_) = parts_of(B * L, r + m * r + d, dtype=z.dtype), _indices(offsets, r)
    per_token("partner_backward", B * L, L, r, m, d, deltas, z, cache["taps"], ds, [dg], dz, parts)
    grads |= {"b_red": parts[:, :r], "b_plu": parts[:, r + m * r :]}
    if m > 0:
        grads["taps"] = parts[:, r : r + m * r].reshape(-1, m, r)
    grads["W_red"] = over_tokens(hg[..., :d], dz)
    return product(dz, w["W_red"].T, out=dh, add=True), grads

mix_shapes = grassmann.mix_shapes

# ---- attention, to compare with ------------------------------------------------------------------

attention_core_forward = _borrowed(grassmann.attention_core_forward)
attention_core_backward = _borrowed(grassmann.attention_core_backward)
attention_forward = _borrowed(grassmann.attention_forward)
attention_backward = _borrowed(grassmann.attention_backward)
attention_shapes = grassmann.attention_shapes

MIXERS = {"grassmann": (mix_forward, mix_backward, mix_shapes),
          "attention": (attention_forward, attention_backward, attention_shapes)}

# ---- the block -----------------------------------------------------------------------------------

def ffn_forward(x: Array, w: Scope) -> tuple[_Sum, tuple]:
    """GELU(x W_1 + b_1) W_2 + b_2, each token by itself; x (..., d)."""
    inner = product(x, w["W_1"])  # (..., d_ff)
    active, c_gelu = gelu_forward(inner, w["b_1"])
    return _Sum(product(active, w["W_2"]), w["b_2"]), (x, w, active, c_gelu)

def ffn_backward(dout: _SumGrad, cache: tuple) -> tuple[Array, Params]:
    """The steps of `ffn_forward` in reverse."""
    x, w, active, c_gelu = cache
    grads = {"W_2": over_tokens(active, dout.x), "b_2": dout.b}
    dinner, grads["b_1"] = gelu_backward(product(dout.x, w["W_2"].T), c_gelu)
    grads["W_1"] = over_tokens(x, dinner)
    return product(dinner, w["W_1"].T), grads

prenorm_block_forward = _borrowed(grassmann.prenorm_block_forward)

def prenorm_block_backward(dout: _SumGrad, cache: dict, config: Config) -> tuple:
    """A sum h + f(h) passes its gradient on unchanged, and once more through f."""
    _, mixer_backward, _ = MIXERS[config.mixer]
    grads = {}
    dnormed, ffn = ffn_backward(dout, cache["ffn"])
    dh, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(dnormed, cache["ln2"], dout)
    dnormed, mix = mixer_backward(dropout_backward(dh, cache["keep_mix"]), cache["mix"])
    dh, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(dnormed, cache["ln1"], dh)
    return dh, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)

paper_block_forward, paper_block_backward = map(
    _borrowed, (grassmann.paper_block_forward, grassmann.paper_block_backward))

BLOCKS = {"prenorm": (prenorm_block_forward, prenorm_block_backward),
          "paper": (paper_block_forward, paper_block_backward)}

# ---- configuration and parameters ----------------------------------------------------------------

default_offsets, Config, check = grassmann.default_offsets, grassmann.Config, grassmann.check
param_shapes = grassmann.param_shapes

def init_params(config: Config, seed: int = 0, dtype: type = numpy.float32) -> Params:
    """The numbers that grassmann.py draws."""
    return Flat(grassmann.init_params(config, seed, dtype))

Scope, prefixed = grassmann.Scope, grassmann.prefixed

# ---- the model and its loss ----------------------------------------------------------------------

def head_forward(h: Array, E: Array) -> tuple[Array, tuple]:
    """logits = h Eᵀ: a state meets every token's embedding; h (B, L, d), E (V, d) -> (B, L, V)."""
    return product(h, E.T), (h, E)

def head_backward(dlogits: Array, cache: tuple) -> tuple[Array, Array]:
    """dh = dlogits E,  dE = dlogitsᵀ h."""
    h, E = cache
    return product(dlogits, E).reshape(h.shape), over_tokens(dlogits, h)

model_forward, model_backward = map(_borrowed, (grassmann.model_forward, grassmann.model_backward))
forward = _borrowed(grassmann.forward)

class _Keys(list):
    """Keys that are drawn already, handed out as a generator would draw them."""
    integers = lambda self, high: self.pop(0)  # noqa: E731

def _forward_and_backward(params: Params, config: Config, share: float, x, y, keys=None) -> tuple:
    """`loss_and_grads` kernel by kernel; the dropouts take `keys` one after the other."""
    logits, cache = model_forward(params, config, x, rng=None if keys is None else _Keys(keys))
    loss, c_loss = cross_entropy_forward(logits, y)
    return share * loss, model_backward(cross_entropy_backward(share, c_loss), cache)

def loss_and_grads(
    params: Params, config: Config, x: Array, y: Array, seed=None, share: float = 1.0
) -> tuple[Array, Params]:
    """grassmann.py's; the next call with these parameters overwrites the gradients.

    float(loss) waits for the card. A CUDA graph does it, from the second call on with the same
    configuration, precision, share and shapes. Attention and a memory cannot be recorded: CuPy's
    products of stacks of matrices refuse.
    """
    inputs = [cp.asarray(a).astype(numpy.int32, copy=False) for a in (x, y)]
    check(inputs[0].shape == inputs[1].shape, "x and y must have one shape", "this batch")
    if seed is not None and config.dropout:
        keys = numpy.random.default_rng(seed).integers(2**63, size=2 * config.n_layer + 1)
        before = getattr(seed, "first", 0) * x.shape[1] * config.d_model * 0x9E3779B97F4A7C15 % 2**64
        inputs.append(cp.asarray((keys.view("u8") + numpy.uint64(before)).view("i8")))  # see `dropped`
    function = functools.partial(_forward_and_backward, params, config, share)
    layer = MIXERS[config.mixer], BLOCKS[config.block]  # somebody may have put in their own
    stacks = config.mixer == "attention" or config.memory
    key = None if stacks else (config, layer, share, [a.shape for a in inputs])
    loss, grads = params.run(key, function, inputs)
    return loss.copy(), params.gathered(grads)

# ---- optimiser -----------------------------------------------------------------------------------

def adamw_init(params: Params) -> dict[str, Params]:
    """The optimiser's state: running means of the gradient and of its square, zero at first."""
    return {mean: Flat({name: cp.zeros_like(value) for name, value in params.items()})
            for mean in ("adam_m", "adam_v")}

def adamw_step(
    params: Params, grads: Params, state: dict[str, Params], step: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1, eps: float = 1e-8,
) -> None:
    """One step of AdamW, as in grassmann.py, in place. `step` counts from 0; dicts are `Flat`."""
    (beta_1, beta_2), matrices = betas, numpy.int64(params.matrices)
    fix_1, fix_2 = 1 - beta_1 ** (step + 1), 1 - beta_2 ** (step + 1)
    rates = map(float, (1 - beta_1, 1 - beta_2, 1 / fix_2, lr / fix_1, lr * weight_decay, eps))
    buffers = (flat.buffer for flat in (grads, params, state["adam_m"], state["adam_v"]))
    per_element("adamw", params.buffer.size, matrices, *rates, *buffers)

def clip_grads(grads: Params, max_norm: float) -> Array:
    """Scale all gradients together, in place, to a norm of at most max_norm; returns the norm."""
    g, parts, norm = grads.buffer, cp.empty(256, numpy.float64), cp.empty((), numpy.float64)
    card.launch("sum_of_squares", 256, numpy.int64(g.size), g, parts)
    card.launch("clip", 256, numpy.int64(g.size), float(max_norm), g, parts, norm)
    return norm

# ---- batches and validation ----------------------------------------------------------------------

def get_batch(tokens: Array, batch_size: int, context: int, seed: int, step: int) -> tuple:
    """grassmann.py's: x (B, L) and y, the same windows one later, of which the places travel."""
    rng = numpy.random.default_rng((seed, step))
    starts = rng.integers(0, len(tokens) - context, batch_size)
    windows = tokens[cp.asarray(starts)[:, None] + _arange(context + 1)].astype(numpy.int32)
    return windows[:, :-1], windows[:, 1:]

def validation_loss(params: Params, config: Config, tokens: Array, each: Callable = map) -> float:
    """Mean nats per token over `tokens` (at least 2), every target once; larger chunks than in
    grassmann.py. The host waits for the card when all are started: `each` runs ahead of it."""
    tokens, targets, context = cp.asarray(tokens), len(tokens) - 1, config.context
    whole = targets // context * context
    x, y = tokens[:whole].reshape(-1, context), tokens[1 : whole + 1].reshape(-1, context)
    size = max(1, SHARD_TOKENS // context)
    chunks = [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]
    if whole < targets:
        chunks.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))

    def total(chunk: tuple[Array, Array]) -> Array:
        x, y = chunk
        return cross_entropy_forward(forward(params, config, x), y)[0] * y.size

    return math.fsum(map(float, [*each(total, chunks)])) / targets

# ---- streaming and sampling ----------------------------------------------------------------------

stream_init = _borrowed(grassmann.stream_init)
stream_read, stream_step = map(_borrowed, (grassmann.stream_read, grassmann.stream_step))

def sample(logits: Array, temperature: float, top_k: int | None, rng: Rng) -> int:
    """grassmann.py's, of logits that are fetched. Raises ValueError if they are not finite."""
    return grassmann.sample(logits.get(), temperature, top_k, rng)

_generate = _borrowed(grassmann.generate)

def generate(
    params: Params, config: Config, prompt: Iterable[int], n: int,
    temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
) -> Iterator[int]:
    """grassmann.py's. NumPy computes it, unless the model is large: a character is dozens of small
    kernels, and to start them takes longer. Raises ValueError or TypeError."""
    how = config, prompt, n, temperature, top_k, seed
    if params.buffer.size > ON_HOST:
        return _generate(params, *how)
    return grassmann.generate({name: a.get() for name, a in params.items()}, *how)
