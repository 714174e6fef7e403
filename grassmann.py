"""Grassmann-flow language models in NumPy: clean, minimal, every gradient derived by hand.

A Transformer mixes tokens by attention, an L x L table of weights. "Attention Is Not What You Need"
(Zhang Chong, arXiv 2512.19428) mixes them by geometry instead: each hidden state is reduced to r
numbers, the pair (this token, an earlier one) spans a plane in R^r, that plane's Plücker coordinates
(the wedge product of the two vectors) are projected back to the model's width and blended into the
hidden state by a learned gate. This file is that layer and a character-level language model around it.

It is meant to be read from top to bottom (a first reader may skip the checks in `Config` and the checkpoints):

    configuration, small ops, wedge, mixing layer, attention (to compare with), block, model and loss,
    optimiser, batches and validation, streaming and sampling, checkpoints

Letters for sizes, the same everywhere:

    B batch   L length   V vocabulary   d model width   r rank   n = r(r-1)/2 Plücker coordinates
    m offsets in a layer   N layers   T = B·L tokens

Vectors are rows: y = x @ W + b with W of shape (in, out). dx is the gradient of the loss with respect
to x. Every differentiable op is a pair, side by side: name_forward(...) -> (out, cache) and
name_backward(dout, cache) -> gradients, in the order of the forward's arguments. The dtype of the
parameters decides the precision: float32 trains, float64 checks. NumPy's BLAS should run on one thread
(see cpu.py): the cores are used by `threads`, which splits the batch.
"""

import hashlib
import io
import json
import math
import operator
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

Array = np.ndarray
Params = dict[str, Array]


# ---- configuration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The sizes and variants of one model. Everything else follows from these and the parameters.

    offsets       one tuple per layer: how many tokens back the partners lie (unused by attention)
    block         "prenorm" (residual around a normalised input) or "paper" (LayerNorm after each half)
    taps          learned weights tell the offsets of a layer apart; without, they are averaged (paper)
    normalize     divide each bivector by its length (paper: optional)
    positions     add a learned vector per position; without, the model takes any length
    mixer         "grassmann", or "attention" to compare with
    n_head        attention heads (unused by grassmann)

    The paper's model: block="paper", taps=False, normalize=True, positions=True.
    Raises ValueError, with a sentence, on anything that cannot be built.
    """

    vocab_size: int
    context: int
    n_layer: int
    d_model: int
    rank: int
    offsets: tuple[tuple[int, ...], ...]
    d_ff: int | None = None  # inner width of the feed-forward network, 4 * d_model unless given
    dropout: float = 0.0
    block: str = "prenorm"
    taps: bool = True
    normalize: bool = False
    positions: bool = False
    mixer: str = "grassmann"
    n_head: int = 4

    def __post_init__(self):
        for name in ("vocab_size", "context", "n_layer", "d_model", "rank", "d_ff", "n_head"):
            if name == "d_ff" and self.d_ff is None:
                object.__setattr__(self, "d_ff", 4 * self.d_model)
            value, least = getattr(self, name), 2 if name == "rank" else 1
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
            object.__setattr__(self, name, int(value))
        for name in ("taps", "normalize", "positions"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name, choices in (("block", ("prenorm", "paper")), ("mixer", ("grassmann", "attention"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not isinstance(self.dropout, (int, float)) or isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.mixer == "attention" and self.d_model % self.n_head:
            raise ValueError(f"n_head ({self.n_head}) must divide d_model ({self.d_model})")
        object.__setattr__(self, "offsets", self._checked_offsets() if self.mixer == "grassmann" else ())

    def _checked_offsets(self) -> tuple[tuple[int, ...], ...]:
        try:
            layers = tuple(tuple(operator.index(delta) for delta in layer) for layer in self.offsets)
        except TypeError:
            raise ValueError(f"offsets must be one tuple of whole numbers per layer, not {self.offsets!r}") from None
        if len(layers) != self.n_layer:
            raise ValueError(f"offsets must be one tuple per layer: {self.n_layer} layers, {len(layers)} tuples given")
        for layer in layers:
            if not layer or min(layer) < 1 or len(set(layer)) < len(layer):
                raise ValueError(f"the offsets of a layer must be positive and distinct, not {layer}")
            if max(layer) >= self.context:
                raise ValueError(f"offset {max(layer)} must be smaller than the context ({self.context})")
        return layers


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in order."""
    d, r, n = config.d_model, config.rank, config.rank * (config.rank - 1) // 2
    shapes = {"E": (config.vocab_size, d)}
    if config.positions:
        shapes["P"] = (config.context, d)
    for i in range(config.n_layer):
        block = {"ln1.w": (d,), "ln1.b": (d,), "ln2.w": (d,), "ln2.b": (d,)}
        if config.mixer == "attention":
            block |= {"mix.W_qkv": (d, 3 * d), "mix.b_qkv": (3 * d,), "mix.W_out": (d, d), "mix.b_out": (d,)}
        else:
            block |= {"mix.W_red": (d, r), "mix.b_red": (r,)}
            if config.taps:
                block["mix.taps"] = (len(config.offsets[i]), r)
            block |= {"mix.W_plu": (n, d), "mix.b_plu": (d,), "mix.W_gate": (2 * d, d), "mix.b_gate": (d,)}
        block |= {"ffn.W_1": (d, config.d_ff), "ffn.b_1": (config.d_ff,), "ffn.W_2": (config.d_ff, d), "ffn.b_2": (d,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    if config.block == "prenorm":
        shapes |= {"ln_f.w": (d,), "ln_f.b": (d,)}
    return shapes


def init_params(config: Config, seed: int = 0, dtype: type = np.float32) -> Params:
    """Draw the parameters: a flat dict from name to array, in the order of `param_shapes`.

    N(0, 0.02²) for matrices and embeddings, W_2 and W_out divided by sqrt(2N) (they write into the residual
    stream, and 2N writes shall keep its size); N(0, 1/d) for W_red, so that reduced states of normalised
    ones have unit size and their planes some area; N(0, 0.5²) for taps, large enough to tell the offsets
    apart from the first step; ones and zeros for LayerNorm, zeros for biases.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        kind = name.split(".")[-1]
        if kind == "w":
            value = np.ones(shape)
        elif kind.startswith("b"):
            value = np.zeros(shape)
        else:
            scale = {"taps": 0.5, "W_red": config.d_model**-0.5}.get(kind, 0.02)
            if kind in ("W_2", "W_out"):
                scale /= math.sqrt(2 * config.n_layer)
            value = scale * rng.standard_normal(shape)
        params[name] = value.astype(dtype)
    return params


class sub:
    """The parameters whose names start with `prefix`, by the rest of their names: sub(params, "ln_f.")["w"]."""

    def __init__(self, params: Params, prefix: str):
        self.params, self.prefix = params, prefix

    def __getitem__(self, name: str) -> Array:
        return self.params[self.prefix + name]

    def get(self, name: str) -> Array | None:
        return self.params.get(self.prefix + name)


def prefixed(prefix: str, grads: Params) -> Params:
    """The inverse of `sub`: every name with `prefix` in front."""
    return {prefix + name: value for name, value in grads.items()}


SHARD_TOKENS = 4096  # at most so many at a time in a thread: bounds the memory for activations
pool = lru_cache(ThreadPoolExecutor)  # one per number of threads, kept


def in_threads(function: Callable, items: list, threads: int) -> Iterator:
    """map(function, items), on so many threads."""
    return (pool(threads).map if threads > 1 else map)(function, items)


# ---- small ops ----------------------------------------------------------------------------------------


def linear_forward(x: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """y = x W + b for x (..., in), W (in, out), b (out); y is (..., out)."""
    y = x.reshape(-1, len(W)) @ W
    y += b
    return y.reshape(*x.shape[:-1], -1), (x, W)


def linear_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """From y_tk = Σ_i x_ti W_ik + b_k:  dx = dy Wᵀ,  dW = xᵀ dy,  db = Σ_t dy_t."""
    x, W = cache
    dy, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, len(W))
    dx = np.matmul(dy, W.T, out=np.empty_like(rows))  # (empty_like: the memory order of x, for speed)
    return dx.reshape(x.shape), rows.T @ dy, dy.sum(0)


def mean(x: Array) -> Array:
    """Mean over the last axis, kept: (..., d) -> (..., 1)."""
    return x.sum(-1, keepdims=True) / x.shape[-1]


def dot(a: Array, b: Array) -> Array:
    """Inner product over the last axis, kept: (..., r), (..., r) -> (..., 1)."""
    return np.einsum("...i,...i->...", a, b)[..., None]


def layernorm_forward(x: Array, w: Array, b: Array, eps: float = 1e-5) -> tuple[Array, tuple]:
    """x̂ = (x - mean) / sqrt(var + eps) over the last axis, y = w ⊙ x̂ + b; x (..., d), w and b (d)."""
    x = x - mean(x)
    var = mean(np.square(x, dtype=np.float64))  # float64: no square of a float32 overflows
    inv_std = (1 / np.sqrt(var + eps)).astype(x.dtype)
    x_hat = x * inv_std
    return x_hat * w + b, (x_hat, inv_std, w)


def layernorm_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """With σ = sqrt(var + eps), means over the last axis and dx̂ = w ⊙ dy:

        ∂x̂_j/∂x_i = (δ_ij - 1/d - x̂_i x̂_j / d) / σ      (directly, through the mean, through σ)
        dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂)) / σ,   dw = Σ dy ⊙ x̂,   db = Σ dy.
    """
    x_hat, inv_std, w = cache
    dx_hat = dy * w
    dx = inv_std * (dx_hat - mean(dx_hat) - x_hat * (dot(dx_hat, x_hat) / len(w)))
    rows = tuple(range(dy.ndim - 1))
    return dx, (dy * x_hat).sum(rows), dy.sum(rows)


GELU_C = math.sqrt(2 / math.pi)
GELU_CA = GELU_C * 0.044715


def gelu_forward(x: Array) -> tuple[Array, tuple]:
    """GELU(x) = x/2 (1 + tanh q(x)),  q(x) = c (x + a x³),  c = sqrt(2/π), a = 0.044715; any shape."""
    z = x.clip(-10, 10)  # beyond ±10 tanh is ±1 to the last bit, and x³ cannot overflow
    tanh = np.tanh(z * (GELU_C + GELU_CA * (z * z)))
    return 0.5 * x * (1 + tanh), (z, tanh)


def gelu_backward(dy: Array, cache: tuple) -> Array:
    """GELU' = (1 + tanh q)/2 + x/2 (1 - tanh² q) q'(x),  q'(x) = c (1 + 3 a x²)."""
    z, tanh = cache
    slope = z * (0.5 * GELU_C + (1.5 * GELU_CA) * (z * z)) * (1 - tanh * tanh)
    return dy * (slope + 0.5 * (1 + tanh))


def dropout_forward(x: Array, rate: float, rng: np.random.Generator | None) -> tuple[Array, Array | None]:
    """Zero a fraction `rate` of x and divide the rest by 1 - rate, so the mean stays; rng None: x itself."""
    if rng is None or rate == 0:
        return x, None
    keep = (rng.random(x.shape, np.float32) >= rate).astype(x.dtype) / (1 - rate)
    return x * keep, keep


def dropout_backward(dy: Array, keep: Array | None) -> Array:
    """y = keep ⊙ x, so dx = keep ⊙ dy."""
    return dy if keep is None else dy * keep


def embedding_forward(tokens: Array, E: Array) -> tuple[Array, tuple]:
    """Row tokens[...] of E (V, d): (...) integers -> (..., d)."""
    return E[tokens], (tokens, E.shape)


def embedding_backward(dx: Array, cache: tuple) -> Array:
    """dE_k = Σ dx_t over the tokens t that are k: sort the tokens, then sum each run of equal ones."""
    tokens, shape = cache
    order = np.argsort(tokens, axis=None, kind="stable")
    ids, starts = np.unique(tokens.ravel()[order], return_index=True)
    dE = np.zeros(shape, dx.dtype)
    dE[ids] = np.add.reduceat(dx.reshape(-1, shape[1])[order], starts)
    return dE


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """Mean over all tokens of -log softmax(logits)[target], in nats; logits (..., V), targets (...)."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    shifted = logits - logits.max(-1, keepdims=True)  # softmax does not change, exp cannot overflow
    exp = np.exp(shifted)
    total = exp.sum(-1, keepdims=True)
    losses = np.log(total[:, 0]) - shifted[np.arange(len(targets)), targets]
    return losses.mean(), (exp / total, targets)


def cross_entropy_backward(dloss: float, cache: tuple) -> Array:
    """∂(log Σ exp(x) - x_target)/∂x = softmax(x) - onehot(target), over T for the mean; (T, V)."""
    probs, targets = cache
    dlogits = probs.copy()
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * (dloss / len(targets))


# ---- the wedge product --------------------------------------------------------------------------------


@lru_cache
def pairs(r: int) -> tuple[Array, Array]:
    """All i < j below r in lexicographic order: (0,1), (0,2), …, (r-2,r-1), as two index arrays (n)."""
    return np.triu_indices(r, 1)


def plucker_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """Plücker coordinates of the plane spanned by u and v, the bivector u ∧ v (paper, section 3):

        p_ij = u_i v_j - u_j v_i   for i < j,        u, v (..., r) -> p (..., n).

    |p| is the area of the parallelogram with sides u and v; u ∧ v = -(v ∧ u), so u ∧ u = 0; and
    (au + bv) ∧ (cu + dv) = (ad - bc) u ∧ v: another basis of the same plane only rescales p.

    The arrays are laid out coordinate by coordinate, (r, T) and (n, T), so that each product runs over
    contiguous memory; callers see the transpose.
    """
    r, shape = u.shape[-1], u.shape[:-1]
    i, j = pairs(r)
    u, v = (np.ascontiguousarray(a.reshape(-1, r).T) for a in (u, v))
    p = u.take(i, 0) * v.take(j, 0) - u.take(j, 0) * v.take(i, 0)  # u[i] * v[j] - u[j] * v[i]
    return p.T.reshape(*shape, len(p)), (u, v, shape)


def plucker_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """Let A be the antisymmetric r x r matrix with A_ij = dp_ij above the diagonal, -dp_ij below.

    u_i meets v_j in p_ij with a plus where i < j, and in p_ji with a minus where i > j; so do v_i and u_j
    with the signs reversed:   du_i = Σ_j A_ij v_j,   dv_i = -Σ_j A_ij u_j.
    """
    u, v, shape = cache
    i, j = pairs(len(u))
    A = np.zeros((len(u), *u.shape), u.dtype)
    A[i, j] = dp.reshape(-1, len(i)).T
    A[j, i] = -A[i, j]
    du, dv = np.einsum("ijt,jt->it", A, v), -np.einsum("ijt,jt->it", A, u)
    return tuple(np.ascontiguousarray(a.T).reshape(*shape, len(u)) for a in (du, dv))


def plucker(u: Array, v: Array) -> Array:
    """u ∧ v: (..., r), (..., r) -> (..., n). See `plucker_forward`."""
    return plucker_forward(u, v)[0]


def unit_area_forward(u: Array, v: Array, parallel: float = 1e-5) -> tuple[Array, tuple]:
    """q = v / |u ∧ v|, so that u ∧ q is the unit bivector of the plane; u, v, q (..., r).

    The area is base times height, |u ∧ v| = |u| |v⊥| with v⊥ = v - (u·v / u·u) u: O(r) work, the n
    coordinates are not needed. (So is |u|²|v|² - (u·v)², but for nearly parallel vectors float32 loses
    that difference to cancellation.) Where |v⊥| <= parallel |v|, or the square of a vector is zero, there is
    no plane: q = 0. (The paper divides by max(|p|, ε) instead, which makes rounding noise of such a pair as
    long as a plane; equal letters without positions are such pairs.)
    """
    tiny = np.finfo(u.dtype).tiny
    uu, vv, uv = dot(u, u), dot(v, v), dot(u, v)
    nonzero = (uu > tiny) & (vv > tiny)
    uu, vv = np.where(nonzero, uu, 1), np.where(nonzero, vv, 1)
    v_perp, u_perp = v - (uv / uu) * u, u - (uv / vv) * v
    height_v, height_u = np.sqrt(dot(v_perp, v_perp)), np.sqrt(dot(u_perp, u_perp))
    area = np.sqrt(uu) * height_v
    plane = nonzero & (area > tiny) & (height_v > parallel * np.sqrt(vv)) & (height_u > parallel * np.sqrt(uu))
    inv_area, inv_hu, inv_hv = (plane / np.where(plane, a, 1) for a in (area, height_u, height_v))
    q = inv_area * v
    return q, (q, inv_area, u_perp * inv_hu * inv_hu, v_perp * inv_hv * inv_hv)


def unit_area_backward(dq: Array, cache: tuple) -> tuple[Array, Array]:
    """The area ρ = |u||v⊥| grows fastest when v moves along its height: ∂ρ/∂v = |u| v⊥/|v⊥|, and the
    same with u and v exchanged, ∂ρ/∂u = |v| u⊥/|u⊥|. With q = v/ρ,

        dρ = -dq·v / ρ² = -dq·q / ρ
        dv = dq/ρ + dρ |u| v⊥/|v⊥| = dq/ρ - (dq·q) v⊥/|v⊥|²     (|u|/ρ = 1/|v⊥|)
        du =        dρ |v| u⊥/|u⊥| =      - (dq·q) u⊥/|u⊥|²     (|v|/ρ = 1/|u⊥|).
    """
    q, inv_area, u_normal, v_normal = cache
    along = dot(dq, q)
    return -along * u_normal, dq * inv_area - along * v_normal


# ---- the mixing layer ---------------------------------------------------------------------------------


def partner_forward(z: Array, taps: Array | None, offsets: tuple[int, ...], normalize: bool) -> tuple[Array, tuple]:
    """The one vector s_t whose wedge with z_t is the layer's bivector; z, s (B, L, r), taps (m, r).

    The paper averages the bivectors of all pairs (z_t, z_{t-Δ}). The wedge is linear in its second
    argument, so the average of wedges is one wedge, at the price of one whatever the number of offsets:

        1/|valid| Σ_Δ c_Δ (z_t ∧ z_{t-Δ}) = z_t ∧ s_t,   s_t = 1/|valid| Σ_Δ c_Δ z_{t-Δ},

    c_Δ = 1/|z_t ∧ z_{t-Δ}| if normalised, else 1; an offset is valid where t - Δ >= 0. (The paper pairs
    t with t+Δ. In a language model that is the answer, so the partner lies behind.) A sum of planes
    through one line z_t is again a plane, so nothing leaves the cone over the Grassmannian.

    With taps, learned weights tell the offsets apart: s_t = Σ_Δ w_Δ ⊙ z_{t-Δ}, a depthwise causal
    convolution, where missing tokens count as 0; if normalised, s_t is then divided by |z_t ∧ s_t|.
    """
    s, caches = np.zeros(z.shape, z.dtype), []
    if taps is not None:
        for weight, delta in zip(taps, offsets, strict=True):
            later, earlier = s[:, delta:], z[:, :-delta]
            later += weight * earlier
        if normalize:
            s, cache = unit_area_forward(z, s)
            caches.append(cache)
        return s, (z, taps, offsets, caches, None)
    for delta in offsets:
        q = z[:, :-delta]
        if normalize:
            q, cache = unit_area_forward(z[:, delta:], q)
            caches.append(cache)
        s[:, delta:] += q
    valid = (np.arange(z.shape[1])[:, None] >= np.array(offsets)).sum(1).clip(1, None)  # (L)
    share = (1 / valid).astype(z.dtype)[:, None]
    return s * share, (z, taps, offsets, caches, share)


def partner_backward(ds: Array, cache: tuple) -> tuple[Array, Array | None]:
    """Each term of s_t is a copy of z_{t-Δ} times a weight, so ds_t flows back to t-Δ times that weight:

        taps:     dz_{t-Δ} += w_Δ ⊙ ds_t,   dw_Δ = Σ_t ds_t ⊙ z_{t-Δ}
        average:  dz_{t-Δ} += c_Δ ds_t / |valid|, and c_Δ depends on both vectors: `unit_area_backward`.
    """
    z, taps, offsets, caches, share = cache
    dz = np.zeros_like(z)
    if taps is not None:
        if caches:
            dz, ds = unit_area_backward(ds, caches[0])
        dtaps = np.empty_like(taps)
        for k, delta in enumerate(offsets):
            dtaps[k] = (ds[:, delta:] * z[:, :-delta]).sum((0, 1))
            dz[:, :-delta] += taps[k] * ds[:, delta:]
        return dz, dtaps
    ds = ds * share
    for k, delta in enumerate(offsets):
        dq = ds[:, delta:]
        if caches:
            du, dq = unit_area_backward(dq, caches[k])
            dz[:, delta:] += du
        dz[:, :-delta] += dq
    return dz, None


def gate_forward(h: Array, g: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """α = sigmoid([h ; g] W + b), out = α ⊙ h + (1-α) ⊙ g = g + α ⊙ (h-g); h, g (..., d), W (2d, d), b (d)."""
    a, cache = linear_forward(np.concatenate([h, g], -1), W, b)
    alpha = 0.5 + 0.5 * np.tanh(0.5 * a)  # the sigmoid 1 / (1 + exp(-a)), in a form that cannot overflow
    difference = h - g
    return g + alpha * difference, (difference, alpha, cache)


def gate_backward(dout: Array, cache: tuple) -> tuple[Array, Array, Array, Array]:
    """dα = dout ⊙ (h - g), and sigmoid' = α(1-α); h and g are reached directly and through the gate."""
    difference, alpha, cache = cache
    direct = alpha * dout
    dhg, dW, db = linear_backward(difference * direct * (1 - alpha), cache)
    d = dout.shape[-1]
    return direct + dhg[..., :d], (dout - direct) + dhg[..., d:], dW, db


def mix_forward(h: Array, w: Params, offsets: tuple[int, ...], normalize: bool, past: dict | None = None):
    """The Grassmann mixing layer (paper, section 3): h (B, L, d) -> mix (B, L, d).

        z = h W_red + b_red        reduce          (B, L, r)
        s = partner(z)             look back       (B, L, r)
        p = z ∧ s                  span a plane    (B, L, n)
        g = p W_plu + b_plu        project back    (B, L, d)
        mix = gate(h, g)           blend           (B, L, d)

    `past` (streaming) holds the last max(Δ) reduced states before h and is brought up to date.
    """
    z, c_red = linear_forward(h, w["W_red"], w["b_red"])
    length, window = z.shape[1], z
    if past is not None:
        window = np.concatenate([past["z"], z], 1) if past else z
        past["z"] = window[:, -max(offsets) :]
    s, c_partner = partner_forward(window, w.get("taps"), offsets, normalize)
    p, c_wedge = plucker_forward(z, s[:, -length:])
    g, c_plu = linear_forward(p, w["W_plu"], w["b_plu"])
    mix, c_gate = gate_forward(h, g, w["W_gate"], w["b_gate"])
    return mix, (c_red, c_partner, c_wedge, c_plu, c_gate)


def mix_backward(dmix: Array, cache: tuple) -> tuple[Array, Params]:
    """The steps of `mix_forward` in reverse; z and h are each used twice, so two gradients add up."""
    c_red, c_partner, c_wedge, c_plu, c_gate = cache
    grads = {}
    dh, dg, grads["W_gate"], grads["b_gate"] = gate_backward(dmix, c_gate)
    dp, grads["W_plu"], grads["b_plu"] = linear_backward(dg, c_plu)
    dz, ds = plucker_backward(dp, c_wedge)
    dz_partner, dtaps = partner_backward(ds, c_partner)
    if dtaps is not None:
        grads["taps"] = dtaps
    dh_red, grads["W_red"], grads["b_red"] = linear_backward(dz + dz_partner, c_red)
    return dh + dh_red, grads


# ---- attention, to compare with -----------------------------------------------------------------------


def attention_forward(h: Array, w: Params, n_head: int, past: dict | None = None) -> tuple[Array, tuple]:
    """Causal multi-head softmax attention: h (B, L, d) -> (B, L, d), through an L x L table per head.

        [q k v] = h W_qkv + b_qkv,   a = softmax(q kᵀ / sqrt(d_h)) over the past,   out = (a v) W_out + b_out

    with d_h = d / n_head. `past` (streaming) holds all earlier k and v and grows with the text.
    """
    B, L, d = h.shape
    qkv, c_qkv = linear_forward(h, w["W_qkv"], w["b_qkv"])
    q, k, v = qkv.reshape(B, L, 3, n_head, d // n_head).transpose(2, 0, 3, 1, 4)  # each (B, n_head, L, d_h)
    if past is not None:
        if past:
            k, v = np.concatenate([past["k"], k], 2), np.concatenate([past["v"], v], 2)
        past["k"], past["v"] = k, v
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(d // n_head)  # (B, n_head, L, keys)
    future = ~np.tri(L, k.shape[2], k.shape[2] - L, dtype=bool)
    np.copyto(scores, -np.inf, where=future)
    scores -= scores.max(-1, keepdims=True)
    a = np.exp(scores)
    a /= a.sum(-1, keepdims=True)
    heads = (a @ v).swapaxes(1, 2).reshape(B, L, d)
    out, c_out = linear_forward(heads, w["W_out"], w["b_out"])
    return out, (q, k, v, a, c_qkv, c_out)


def attention_backward(dout: Array, cache: tuple) -> tuple[Array, Params]:
    """softmax' for one row a of the table is diag(a) - a aᵀ: dscores = a ⊙ (da - Σ a ⊙ da). Then

    o = a v:  da = do vᵀ, dv = aᵀ do,     scores = q kᵀ / sqrt(d_h):  dq = dscores k / sqrt(d_h), dk likewise.
    """
    q, k, v, a, c_qkv, c_out = cache
    B, n_head, L, d_h = q.shape
    dheads, dW_out, db_out = linear_backward(dout, c_out)
    do = dheads.reshape(B, L, n_head, d_h).swapaxes(1, 2)
    da, dv = do @ v.swapaxes(-1, -2), a.swapaxes(-1, -2) @ do
    dscores = a * (da - dot(a, da)) / math.sqrt(d_h)
    dqkv = np.stack([dscores @ k, dscores.swapaxes(-1, -2) @ q, dv])  # (3, B, n_head, L, d_h)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B, L, -1)
    dh, dW_qkv, db_qkv = linear_backward(dqkv, c_qkv)
    return dh, {"W_qkv": dW_qkv, "b_qkv": db_qkv, "W_out": dW_out, "b_out": db_out}


# ---- the block ----------------------------------------------------------------------------------------


def ffn_forward(x: Array, w: Params) -> tuple[Array, tuple]:
    """GELU(x W_1 + b_1) W_2 + b_2, each token by itself; x (..., d)."""
    a, c_1 = linear_forward(x, w["W_1"], w["b_1"])
    a, c_gelu = gelu_forward(a)
    out, c_2 = linear_forward(a, w["W_2"], w["b_2"])
    return out, (c_1, c_gelu, c_2)


def ffn_backward(dout: Array, cache: tuple) -> tuple[Array, Params]:
    """The steps of `ffn_forward` in reverse."""
    c_1, c_gelu, c_2 = cache
    grads = {}
    da, grads["W_2"], grads["b_2"] = linear_backward(dout, c_2)
    dx, grads["W_1"], grads["b_1"] = linear_backward(gelu_backward(da, c_gelu), c_1)
    return dx, grads


def mixer_forward(h: Array, w: Params, config: Config, layer: int, past: dict | None) -> tuple[Array, tuple]:
    """The mixer that the configuration names, with its parameters w; h (B, L, d) -> (B, L, d)."""
    if config.mixer == "attention":
        return attention_forward(h, w, config.n_head, past)
    return mix_forward(h, w, config.offsets[layer], config.normalize, past)


def mixer_backward(dmix: Array, cache: tuple, config: Config) -> tuple[Array, Params]:
    """The backward of the mixer that the configuration names."""
    return (attention_backward if config.mixer == "attention" else mix_backward)(dmix, cache)


def prenorm_block_forward(h: Array, w: Params, config: Config, layer: int, past=None, rng=None) -> tuple[Array, tuple]:
    """h ← h + D(mix(LN1(h))),  h ← h + D(FFN(LN2(h))),  D dropout; h (B, L, d)."""
    a, c_ln1 = layernorm_forward(h, w["ln1.w"], w["ln1.b"])
    a, c_mix = mixer_forward(a, sub(w, "mix."), config, layer, past)
    a, keep_mix = dropout_forward(a, config.dropout, rng)
    h = h + a
    f, c_ln2 = layernorm_forward(h, w["ln2.w"], w["ln2.b"])
    f, c_ffn = ffn_forward(f, sub(w, "ffn."))
    f, keep_ffn = dropout_forward(f, config.dropout, rng)
    return h + f, (c_ln1, c_mix, keep_mix, c_ln2, c_ffn, keep_ffn)


def prenorm_block_backward(dout: Array, cache: tuple, config: Config) -> tuple[Array, Params]:
    """A sum h + f(h) passes its gradient on unchanged, and once more through f."""
    c_ln1, c_mix, keep_mix, c_ln2, c_ffn, keep_ffn = cache
    grads = {}
    df, ffn = ffn_backward(dropout_backward(dout, keep_ffn), c_ffn)
    df, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(df, c_ln2)
    dh = dout + df
    da, mix = mixer_backward(dropout_backward(dh, keep_mix), c_mix, config)
    da, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(da, c_ln1)
    return dh + da, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)


def paper_block_forward(h: Array, w: Params, config: Config, layer: int, past=None, rng=None) -> tuple[Array, tuple]:
    """h ← D(LN1(mix(h))),  h ← LN2(h + D(FFN(h))),  D dropout (paper, section 3); h (B, L, d).

    The gate inside mix keeps h; attention has none and gets a residual, mix(h) = h + attention(h).
    """
    a, c_mix = mixer_forward(h, sub(w, "mix."), config, layer, past)
    if config.mixer == "attention":
        a = h + a
    a, c_ln1 = layernorm_forward(a, w["ln1.w"], w["ln1.b"])
    h, keep_mix = dropout_forward(a, config.dropout, rng)
    f, c_ffn = ffn_forward(h, sub(w, "ffn."))
    f, keep_ffn = dropout_forward(f, config.dropout, rng)
    out, c_ln2 = layernorm_forward(h + f, w["ln2.w"], w["ln2.b"])
    return out, (c_mix, c_ln1, keep_mix, c_ffn, keep_ffn, c_ln2)


def paper_block_backward(dout: Array, cache: tuple, config: Config) -> tuple[Array, Params]:
    """The steps of `paper_block_forward` in reverse."""
    c_mix, c_ln1, keep_mix, c_ffn, keep_ffn, c_ln2 = cache
    grads = {}
    dsum, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(dout, c_ln2)
    df, ffn = ffn_backward(dropout_backward(dsum, keep_ffn), c_ffn)
    da = dropout_backward(dsum + df, keep_mix)
    da, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(da, c_ln1)
    dh, mix = mixer_backward(da, c_mix, config)
    if config.mixer == "attention":
        dh += da
    return dh, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)


# ---- the model and its loss ---------------------------------------------------------------------------


def head_forward(h: Array, E: Array) -> tuple[Array, tuple]:
    """logits = h Eᵀ: a state is compared with every token's embedding; h (B, L, d), E (V, d) -> (B, L, V)."""
    return (h.reshape(-1, E.shape[1]) @ E.T).reshape(*h.shape[:-1], -1), (h, E)


def head_backward(dlogits: Array, cache: tuple) -> tuple[Array, Array]:
    """dh = dlogits E,  dE = dlogitsᵀ h."""
    h, E = cache
    dlogits, rows = dlogits.reshape(-1, len(E)), h.reshape(-1, E.shape[1])
    return (dlogits @ E).reshape(h.shape), dlogits.T @ rows


def model_forward(params: Params, config: Config, tokens: Array, past=None, start: int = 0, rng=None):
    """Embed, N blocks, project onto the embedding: tokens (B, L) -> logits (B, L, V), cache.

    `past`, one dict per layer, and `start`, the position of the first token, are for streaming; `rng`
    draws dropout and is None outside training.
    """
    h, c_embed = embedding_forward(tokens, params["E"])
    if config.positions:
        end = start + tokens.shape[1]
        if end > config.context:
            raise ValueError(f"with positions, {end} tokens exceed the context of {config.context}")
        h = h + params["P"][start:end]
    h, keep = dropout_forward(h, config.dropout, rng)
    block_forward = prenorm_block_forward if config.block == "prenorm" else paper_block_forward
    c_blocks, c_ln = [], None
    for i in range(config.n_layer):
        h, cache = block_forward(h, sub(params, f"blocks.{i}."), config, i, past and past[i], rng)
        c_blocks.append(cache)
    if config.block == "prenorm":
        h, c_ln = layernorm_forward(h, params["ln_f.w"], params["ln_f.b"])
    logits, c_head = head_forward(h, params["E"])
    return logits, (config, c_embed, keep, c_blocks, c_ln, c_head)


def model_backward(dlogits: Array, cache: tuple) -> Params:
    """Gradients of all parameters. E is used twice, as embedding and as head: its two gradients add up."""
    config, c_embed, keep, c_blocks, c_ln, c_head = cache
    dh, dE = head_backward(dlogits, c_head)
    grads = {}
    if c_ln is not None:
        dh, grads["ln_f.w"], grads["ln_f.b"] = layernorm_backward(dh, c_ln)
    block_backward = prenorm_block_backward if config.block == "prenorm" else paper_block_backward
    for i in reversed(range(config.n_layer)):
        dh, block = block_backward(dh, c_blocks[i], config)
        grads |= prefixed(f"blocks.{i}.", block)
    dh = dropout_backward(dh, keep)
    if config.positions:
        grads["P"] = np.zeros((config.context, dh.shape[-1]), dh.dtype)
        grads["P"][: dh.shape[1]] = dh.sum(0)
    grads["E"] = dE + embedding_backward(dh, c_embed)
    return grads


def forward(params: Params, config: Config, tokens: Array) -> Array:
    """Logits of the next token at every position: (B, L) integers -> (B, L, V).

    Raises ValueError if the model has positions and L exceeds its context.
    """
    return model_forward(params, config, np.asarray(tokens))[0]


def loss_and_grads(params: Params, config: Config, x: Array, y: Array, seed=None, threads: int = 1):
    """Mean cross-entropy in nats of predicting y from x, both (B, L), and its gradients (a new dict).

    `seed` (a whole number or a tuple of them) drives dropout; None switches it off. The rows of the batch
    are dealt out to `threads` threads (NumPy releases the interpreter lock) in shards of bounded size, whose
    gradients are added in a fixed order: a run repeats bit for bit with the same number of threads.
    """

    def shard(rows: Array) -> tuple[float, Params]:
        rng = None if seed is None else np.random.default_rng([*np.atleast_1d(seed), rows[0]])
        logits, cache = model_forward(params, config, x[rows], rng=rng)
        loss, c_loss = cross_entropy_forward(logits, y[rows])
        share = len(rows) / len(x)
        return loss * share, model_backward(cross_entropy_backward(share, c_loss), cache)

    x, y = np.asarray(x), np.asarray(y)
    n_shards = threads * math.ceil(x.size / (threads * SHARD_TOKENS))
    results = in_threads(shard, np.array_split(np.arange(len(x)), min(n_shards, len(x))), threads)
    loss, grads = next(results)
    for shard_loss, shard_grads in results:
        loss += shard_loss
        for name, g in shard_grads.items():
            grads[name] += g
    return loss, grads


# ---- optimiser ----------------------------------------------------------------------------------------


def adamw_init(params: Params) -> dict[str, Params]:
    """The optimiser's state: running means of the gradient and of its square, zero at first."""
    return {key: {name: np.zeros_like(value) for name, value in params.items()} for key in ("adam_m", "adam_v")}


def adamw_step(
    params: Params, grads: Params, state: dict[str, Params], step: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1, eps: float = 1e-8,
) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place; `step` counts from 0.

        m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²
        θ ← θ - lr (m̂ / (sqrt(v̂) + eps) + λ θ),   m̂ = m / (1 - β₁^(step+1)),   v̂ = v / (1 - β₂^(step+1))

    The decay λ is applied to matrices only, not to biases and LayerNorm.
    """
    beta_1, beta_2 = betas
    fix_1, fix_2 = 1 - beta_1 ** (step + 1), 1 - beta_2 ** (step + 1)
    for name, theta in params.items():
        g, m, v = grads[name], state["adam_m"][name], state["adam_v"][name]
        m += (1 - beta_1) * (g - m)
        v += (1 - beta_2) * (g * g - v)
        if theta.ndim > 1:
            theta *= 1 - lr * weight_decay
        theta -= (lr / fix_1) * m / (np.sqrt(v / fix_2) + eps)


def clip_grads(grads: Params, max_norm: float) -> float:
    """Scale all gradients together, in place, so that their global norm is at most max_norm; returns the norm."""
    norm = math.hypot(*(np.linalg.norm(g.astype(np.float64)) for g in grads.values()))
    if norm > max_norm:
        for g in grads.values():
            g *= max_norm / norm
    return norm


def learning_rate(step: int, iters: int, lr: float, min_lr: float, warmup_iters: int) -> float:
    """Linear warm-up from lr / (warmup_iters + 1) to lr, then half a cosine down to min_lr at the end."""
    if step < warmup_iters:
        return lr * (step + 1) / (warmup_iters + 1)
    progress = (step - warmup_iters) / max(1, iters - warmup_iters)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


# ---- batches and validation ---------------------------------------------------------------------------


def get_batch(tokens: Array, batch_size: int, context: int, seed: int, step: int) -> tuple[Array, Array]:
    """x (B, L) and the same windows one later, y: places drawn from (seed, step) alone, so nothing is stored."""
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, batch_size)
    windows = np.asarray(starts)[:, None] + np.arange(context)
    return tokens[windows], tokens[windows + 1]


def validation_loss(params: Params, config: Config, tokens: Array, threads: int = 1) -> float:
    """Mean nats per token over `tokens` (at least 2) in consecutive windows of the context, every target once."""
    targets, context = len(tokens) - 1, config.context
    whole = targets // context * context
    x, y = tokens[:whole].reshape(-1, context), tokens[1 : whole + 1].reshape(-1, context)
    per_chunk = max(1, 512 // context)  # few, so that they stay in the caches
    chunks = [(x[k : k + per_chunk], y[k : k + per_chunk]) for k in range(0, len(x), per_chunk)]
    if whole < targets:
        chunks.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))

    def total(chunk: tuple[Array, Array]) -> float:
        return float(cross_entropy_forward(forward(params, config, chunk[0]), chunk[1])[0]) * chunk[1].size

    return math.fsum(in_threads(total, chunks, threads)) / targets


# ---- streaming and sampling ---------------------------------------------------------------------------


def stream_init(params: Params, config: Config) -> dict:
    """The state of a decoder that has read nothing.

    It keeps, per layer, the last max(Δ) reduced states and nothing else: a token costs the same at
    position 10 and at position 100,000. (With attention it keeps all keys and values.)
    """
    return {"past": [{} for _ in range(config.n_layer)], "position": 0, "recent": []}


def stream_step(params: Params, config: Config, state: dict, token: int) -> tuple[Array, dict]:
    """Read one token: logits (V) of the next one, and the state, which is updated in place.

    Equals `forward` on the whole text. With positions, the table ends at the context: then the decoder
    forgets all but the last half of the context, reads it again from position 0 and goes on.
    """
    tokens = [int(token)]
    if config.positions:
        if state["position"] == config.context:
            tokens = state["recent"][len(state["recent"]) - config.context // 2 :] + tokens
            state |= stream_init(params, config)
        state["recent"] += tokens
    logits, _ = model_forward(params, config, np.array([tokens]), state["past"], state["position"])
    state["position"] += len(tokens)
    return logits[0, -1], state


def sample(logits: Array, temperature: float, top_k: int | None, rng: np.random.Generator) -> int:
    """Draw from softmax(logits / temperature), among the top_k largest if given; temperature 0 takes the largest.

    Raises ValueError if the logits are not finite, as those of a run that diverged.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the model's logits are not finite")
    logits = logits.astype(np.float64)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
    with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) = 0 is right
        cumulative = np.exp((logits - logits.max()) / temperature).cumsum()
    return int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))


def generate(
    params: Params, config: Config, prompt: Iterable[int], n: int,
    temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Read the prompt, then yield n tokens, each drawn and read in turn; an empty prompt starts from token 0.

    Raises ValueError on a token outside the vocabulary, a negative temperature, top_k below 1.
    """
    prompt = [int(token) for token in prompt] or [0]
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise ValueError(f"the prompt has tokens outside 0 … {config.vocab_size - 1}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")

    def tokens():
        rng, state = np.random.default_rng(seed), stream_init(params, config)
        for token in prompt:
            logits, state = stream_step(params, config, state, token)
        for k in range(n):
            token = sample(logits, temperature, top_k, rng)
            yield token
            if k < n - 1:
                logits, state = stream_step(params, config, state, token)

    return tokens()


# ---- checkpoints --------------------------------------------------------------------------------------

FORMAT = 1  # version of the file; a loader refuses any other
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n", re.DOTALL
)


def save_checkpoint(path, params: Params, config: Config, **extra) -> None:
    """Write one .npz: arrays `param/NAME`, and `meta`, a JSON document as bytes.

    In `extra`, a dict of arrays named like the parameters (adam_m, adam_v) becomes arrays `KEY/NAME`; the
    rest must be JSON (vocab, step, seed, …). The file is written beside its place, flushed to the disk and
    renamed: whatever happens, `path` is the old file or the new one, whole. Raises OSError, and ValueError
    if an array has values that are not finite: no good checkpoint is ever replaced by a bad one.
    """
    groups = {"param": params} | {key: value for key, value in extra.items() if _is_arrays(value)}
    arrays = {f"{key}/{name}": np.ascontiguousarray(a) for key, group in groups.items() for name, a in group.items()}
    for name, a in arrays.items():
        if not np.isfinite(a).all():
            raise ValueError(f"{name} has values that are not finite; nothing was saved")
    rest = {key: value for key, value in extra.items() if key not in groups}
    meta = {"format": FORMAT, "config": asdict(config), "extra": rest}
    meta["sha256"] = _digest(arrays, meta)
    document = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    unfinished = f"{os.fspath(path)}.tmp"
    try:
        with open(unfinished, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:  # as np.savez, which leaves it open if the disk is full
                for name, a in (arrays | {"meta": document}).items():
                    content = io.BytesIO()
                    np.lib.format.write_array(content, a, allow_pickle=False)
                    archive.writestr(f"{name}.npy", content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def load_checkpoint(path) -> tuple[Params, Config, dict]:
    """Read what `save_checkpoint` wrote: (params, config, extra).

    Nothing in the file is executed, and nothing is used or allocated before it has been checked against
    the configuration: names, shapes, dtypes, finite values, a checksum over everything (which finds damage;
    it is no defence against an author who means harm). Raises OSError if the file cannot be read and
    ValueError, with one line, if it is not a whole checkpoint of this version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_checkpoint(archive)
    except (zipfile.BadZipFile, zlib.error, ValueError, TypeError, KeyError, EOFError, OverflowError,
            RuntimeError, MemoryError, SyntaxError) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a usable checkpoint: {reason[:200]}") from error


def _read_checkpoint(archive: zipfile.ZipFile) -> tuple[Params, Config, dict]:
    names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
    meta = json.loads(_read_array(archive, "meta", [np.uint8], None, 1 << 26).tobytes())
    if meta["format"] != FORMAT:
        raise ValueError(f"format version {meta['format']!r}, this program reads {FORMAT}")
    checksum, config, extra = meta.pop("sha256"), Config(**meta["config"]), meta["extra"]
    if not isinstance(extra, dict):
        raise ValueError("its extra values are not named")
    if config.n_layer > len(names):
        raise ValueError("layers are missing")
    shapes, groups = param_shapes(config), {name.split("/")[0] for name in names if name != "meta"} | {"param"}
    if sorted(names) != sorted(["meta", *(f"{key}/{name}" for key in groups for name in shapes)]):
        raise ValueError("its arrays are not those of its configuration")
    arrays, dtypes = {}, [np.float32, np.float64]
    for key in groups:
        for name, shape in shapes.items():
            array = arrays[f"{key}/{name}"] = _read_array(archive, f"{key}/{name}", dtypes, shape)
            dtypes = [array.dtype]  # all the same
            if not np.isfinite(array).all():
                raise ValueError(f"{key}/{name} has values that are not finite")
    if checksum != _digest(arrays, meta):
        raise ValueError("its checksum does not match, the file is damaged")
    vocab = extra.get("vocab")
    if vocab is not None:
        known = np.array([operator.index(point) for point in vocab], np.int64)
        if known.shape != (config.vocab_size,) or known[0] < 0 or known[-1] > 0x10FFFF or (np.diff(known) < 1).any():
            raise ValueError("its vocabulary is not one of vocab_size code points in ascending order")
    for key in groups:
        extra[key] = {name: arrays[f"{key}/{name}"] for name in shapes}
    return extra.pop("param"), config, extra


def _read_array(archive: zipfile.ZipFile, name: str, dtypes: list, shape: tuple | None, most: int = 0) -> Array:
    """One array of the archive, refused unless its size, dtype and shape are the expected ones."""
    info = archive.getinfo(name + ".npy")
    most = (most or math.prod(shape) * 8) + 4096  # with the header
    if max(info.file_size, info.compress_size) > most:
        raise ValueError(f"{name} is too large for its shape")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that this program does not read")
    with archive.open(info) as member:
        content = member.read(info.file_size)  # inflates no more than that, and compares the CRC
    header = NPY_HEADER.match(content)
    if not header:
        raise ValueError(f"{name} is not a plain array")
    dtype, found = np.dtype(header[1].decode()), tuple(int(size) for size in header[2].split(b",") if size.strip())
    if dtype not in dtypes or (shape is not None and found != shape):
        raise ValueError(f"{name} has shape {found} and dtype {dtype}, expected {shape} and {np.dtype(dtypes[0])}")
    if len(content) - header.end() != math.prod(found) * dtype.itemsize:
        raise ValueError(f"{name} is not as long as its header says")
    return np.frombuffer(content, dtype, offset=header.end()).reshape(found).copy()


def _is_arrays(value) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(hasattr(a, "dtype") for a in value.values())


def _digest(arrays: Params, meta: dict) -> str:
    """SHA-256 of a checkpoint's contents, whatever the order in the file."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(arrays[name])
    return digest.hexdigest()
