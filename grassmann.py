"""Grassmann-flow language models in NumPy: clean, minimal, every gradient derived by hand.
 A Transformer mixes tokens by attention, an L x L table of weights. "Attention Is Not What You
Need" (Zhang Chong, arXiv 2512.19428) mixes tokens by geometry. Each hidden state is reduced to r
numbers. A token and an earlier token span a plane in R^r. The plane's Plücker coordinates (the
wedge product of the two vectors) are projected back to the model's width and blended into the
hidden state by a learned gate. This file is that layer and a language model around it. Read it from
top to bottom. Sizes have letters:

    B batch   L length   V vocabulary   d model width   r rank   n = r(r-1)/2 Plücker coordinates
    m offsets in a layer   N layers   T = B·L tokens
 Vectors are rows: y = x @ W + b with W of shape (in, out). dx is the gradient of the loss with
respect to x. A differentiable op is two functions, side by side: name_forward(...) -> (out, cache)
and name_backward(dout, cache) -> gradients, in the order of the forward's arguments. A layer reads
its parameters from `w`, a part of one flat dict (`Scope`), and returns a dict of gradients. The
dtype of the parameters decides the precision.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__version__ = "4.0"

Array = np.ndarray
Params = dict[str, Array]
Rng = np.random.Generator
Offsets = tuple[tuple[int, ...], ...]
# Tokens in one forward pass of a validation or a stream: few enough for the processor's caches.
TOKENS_PER_PASS = 512

# ---- what all parts use --------------------------------------------------------------------------


class UserError(ValueError):
    """An error that the user can correct.

    The programs print only its message. Other errors keep their traceback.
    """


def require(fine: bool, rule: str) -> None:
    """Raises UserError with the message `rule`, unless `fine`."""
    if not fine:
        raise UserError(rule)


class Scope:
    """A part of the parameters: Scope(params, "ln_f.")["w"] is params["ln_f.w"]."""

    def __init__(self, params: Params, prefix: str = ""):
        self.params, self.prefix = params, prefix

    def __getitem__(self, name: str) -> Array:
        return self.params[self.prefix + name]

    def scope(self, prefix: str) -> Scope:
        return Scope(self.params, self.prefix + prefix)


def prefixed(prefix: str, named: dict) -> dict:
    """The inverse of `Scope`: every name gets `prefix` in front."""
    return {prefix + name: value for name, value in named.items()}


# ---- small ops -----------------------------------------------------------------------------------


def linear_forward(x: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """y = x W + b for x (..., in), W (in, out), b (out); y is (..., out)."""
    if x.shape[-1] != len(W):  # otherwise reshape would silently cut x into other rows
        raise ValueError(
            f"x {x.shape} has rows of {x.shape[-1]}, but W {W.shape} takes rows of {len(W)}"
        )
    y = x.reshape(-1, len(W)) @ W  # (T, in) @ (in, out) -> (T, out)
    y += b
    return y.reshape(*x.shape[:-1], -1), (x, W)


def linear_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """From y_tk = Σ_i x_ti W_ik + b_k:  dx = dy Wᵀ,  dW = xᵀ dy,  db = Σ_t dy_t."""
    x, W = cache
    dy, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, len(W))  # (T, out), (T, in)
    # dx gets x's memory layout: faster for p, which is transposed.
    dx = np.matmul(dy, W.T, out=np.empty_like(rows))
    return dx.reshape(x.shape), rows.T @ dy, dy.sum(0)


def mean(x: Array) -> Array:
    """Mean over the last axis, which stays as 1: (..., d) -> (..., 1)."""
    return x.sum(-1, keepdims=True) / x.shape[-1]


def dot(a: Array, b: Array) -> Array:
    """Dot product over the last axis, which stays as 1: (..., r), (..., r) -> (..., 1)."""
    return np.einsum("...i,...i->...", a, b)[..., None]


def layernorm_forward(x: Array, w: Array, b: Array, eps: float = 1e-5) -> tuple[Array, tuple]:
    """x̂ = (x - mean) / sqrt(var + eps) over the last axis, y = w ⊙ x̂ + b; x (..., d), w b (d)."""
    x = x - mean(x)
    var = mean(np.square(x, dtype=np.float64))  # in float64 the square of a float32 cannot overflow
    inv_std = (1 / np.sqrt(var + eps)).astype(x.dtype)  # (..., 1)
    x_hat = x * inv_std
    return x_hat * w + b, (x_hat, inv_std, w)


def layernorm_backward(dy: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """Let σ = sqrt(var + eps) and dx̂ = w ⊙ dy.

    Means are over the last axis, sums over all other axes.

    ∂x̂_j/∂x_i = (δ_ij - 1/d - x̂_i x̂_j / d) / σ      (x_i acts directly, through the mean, through σ)
    dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂)) / σ,   dw = Σ dy ⊙ x̂,   db = Σ dy.
    """
    x_hat, inv_std, w = cache
    dx_hat = dy * w
    dx = inv_std * (dx_hat - mean(dx_hat) - x_hat * (dot(dx_hat, x_hat) / len(w)))
    axes = tuple(range(dy.ndim - 1))
    return dx, (dy * x_hat).sum(axes), dy.sum(axes)


GELU_C = math.sqrt(2 / math.pi)
GELU_CA = GELU_C * 0.044715


def gelu_forward(x: Array) -> tuple[Array, tuple]:
    """GELU(x) = x/2 (1 + tanh q(x)),  q(x) = c (x + a x³),  c = sqrt(2/π), a = 0.044715."""
    z = x.clip(-10, 10)  # beyond ±10 tanh is exactly ±1 anyway; now x³ cannot overflow
    tanh = np.tanh(z * (GELU_C + GELU_CA * (z * z)))
    return 0.5 * x * (1 + tanh), (z, tanh)


def gelu_backward(dy: Array, cache: tuple) -> Array:
    """GELU' = (1 + tanh q)/2 + x/2 (1 - tanh² q) q'(x),  q'(x) = c (1 + 3 a x²)."""
    z, tanh = cache
    slope = z * (0.5 * GELU_C + (1.5 * GELU_CA) * (z * z)) * (1 - tanh * tanh)
    return dy * (slope + 0.5 * (1 + tanh))


def draw_rows(seed: int | Sequence[int], first: int = 0, n: int | None = None) -> Callable:
    """Returns draw(shape), which draws uniform float32 numbers in [0, 1).

    It draws for the rows `first`, first + 1, … of a batch of n.

    A row gets the same numbers however the batch is split. One generator draws for the whole batch
    and skips the numbers of other rows. Each step of the generator makes two float32 numbers.
    """
    bits = np.random.PCG64(seed)
    begin = 0  # where the next array starts
    done = 0  # the generator's steps so far

    def draw(shape: tuple[int, ...]) -> Array:
        nonlocal begin, done
        row = math.prod(shape[1:])
        size = math.prod(shape)
        start, odd = divmod(begin + first * row, 2)
        begin += (shape[0] if n is None else n) * row
        bits.advance(start - done)
        done = start + (odd + size + 1) // 2
        numbers = np.random.Generator(bits).random(odd + size, np.float32)[odd:]
        return numbers.reshape(shape)

    return draw


def dropout_forward(x: Array, rate: float, draw: Callable | None) -> tuple[Array, Array | None]:
    """Set a fraction `rate` of x to 0 and divide the rest by 1 - rate: the mean stays.

    draw=None: no dropout.
    """
    if draw is None or rate == 0:
        return x, None
    mask = (draw(x.shape) >= rate).astype(x.dtype) / (1 - rate)
    return x * mask, mask


def dropout_backward(dy: Array, mask: Array | None) -> Array:
    """y = mask ⊙ x, so dx = mask ⊙ dy."""
    return dy if mask is None else dy * mask


def embedding_forward(tokens: Array, E: Array) -> tuple[Array, tuple]:
    """Each token's row of E (V, d): tokens (...), integers -> (..., d)."""
    return E[tokens], (tokens, E.shape)


def embedding_backward(dx: Array, cache: tuple) -> Array:
    """dE_k = Σ dx_t over all t where token k stands.

    So sort the tokens, then sum each run of equal tokens.
    """
    tokens, shape = cache
    order = np.argsort(tokens, axis=None, kind="stable")  # (T)
    ids, starts = np.unique(tokens.ravel()[order], return_index=True)
    dE = np.zeros(shape, dx.dtype)
    dE[ids] = np.add.reduceat(dx.reshape(-1, shape[1])[order], starts)
    return dE


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple]:
    """Mean over tokens of -log softmax(logits)[target] in nats; logits (..., V), targets (...)."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)  # (T, V), (T)
    # The softmax of shifted logits is the same, and exp cannot overflow.
    shifted = logits - logits.max(-1, keepdims=True)
    exp = np.exp(shifted)
    total = exp.sum(-1, keepdims=True)  # (T, 1)
    losses = np.log(total[:, 0]) - shifted[np.arange(len(targets)), targets]  # (T)
    return losses.mean(), (exp / total, targets)


def cross_entropy_backward(dloss: float, cache: tuple) -> Array:
    """∂(log Σ exp(x) - x_target)/∂x = softmax(x) - onehot(target); the mean divides it by T.

    The result is (T, V).
    """
    probs, targets = cache
    dlogits = probs.copy()
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * (dloss / len(targets))


# ---- the wedge product ---------------------------------------------------------------------------


@lru_cache
def pairs(r: int) -> tuple[Array, Array]:
    """All i < j below r in lexicographic order: (0,1), (0,2), …, (r-2,r-1), as two arrays (n)."""
    i, j = np.triu_indices(r, 1)
    i.flags.writeable = False  # they are cached, so nobody may change them
    j.flags.writeable = False
    return i, j


def plucker_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """Plücker coordinates of the plane spanned by u and v, the bivector u ∧ v (paper, section 3):

        p_ij = u_i v_j - u_j v_i   for i < j,        u, v (..., r) -> p (..., n).

    |p| is the area of the parallelogram with sides u and v. Since v ∧ u = -(u ∧ v), u ∧ u is 0.
    Another basis of the same plane only rescales p: (au + bv) ∧ (cu + dv) = (ad - bc) u ∧ v.

    In memory the arrays are (r, T) and (n, T): each product runs over contiguous numbers. Callers
    see the transpose.
    """
    r, shape = u.shape[-1], u.shape[:-1]
    i, j = pairs(r)
    u, v = (np.ascontiguousarray(a.reshape(-1, r).T) for a in (u, v))  # (r, T)
    p = u.take(i, 0) * v.take(j, 0) - u.take(j, 0) * v.take(i, 0)  # (n, T): u[i] v[j] - u[j] v[i]
    return p.T.reshape(*shape, len(p)), (u, v, shape)  # (..., n)


def plucker_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """du_i = Σ_j A_ij v_j, dv_i = -Σ_j A_ij u_j; A is antisymmetric, with dp above its diagonal.

    u_i has the factor v_j in p_ij, if i < j, and -v_j in p_ji, if i > j. For v_i the signs are
    reversed.
    """
    u, v, shape = cache
    i, j = pairs(len(u))
    dp = dp.reshape(-1, len(i)).T  # (n, T)
    A = np.zeros((len(u), *u.shape), u.dtype)  # (r, r, T)
    A[i, j] = dp
    A[j, i] = -dp
    du = np.einsum("ijt,jt->it", A, v)  # (r, T)
    dv = -np.einsum("ijt,jt->it", A, u)
    return tuple(np.ascontiguousarray(a.T).reshape(*shape, len(u)) for a in (du, dv))


def plucker(u: Array, v: Array) -> Array:
    """u ∧ v: (..., r), (..., r) -> (..., n). See `plucker_forward`."""
    return plucker_forward(u, v)[0]


def unit_area_forward(u: Array, v: Array, parallel: float = 1e-5) -> tuple[Array, tuple]:
    """q = v / |u ∧ v|, so that u ∧ q is the unit bivector of the plane; u, v, q (..., r).

    The area is base times height, |u ∧ v| = |u| |v⊥| with v⊥ = v - (u·v / u·u) u. This takes O(r)
    work and no coordinates. (|u|²|v|² - (u·v)² is as cheap, but in float32 it cancels if u and v
    are nearly parallel.) If sin θ = |v⊥| / |v| is at most `parallel`, or a vector is zero, there is
    no plane, and q = 0. Equal letters without positions are such pairs. The paper divides by
    max(|p|, ε) instead, which makes their rounding noise as long as a plane.
    """
    tiny = np.finfo(u.dtype).tiny
    uu, vv, uv = dot(u, u), dot(v, v), dot(u, v)  # (..., 1)
    nonzero = (uu > tiny) & (vv > tiny)
    uu, vv = np.where(nonzero, uu, 1), np.where(nonzero, vv, 1)
    v_perp, u_perp = v - (uv / uu) * u, u - (uv / vv) * v  # (..., r)
    perp2 = dot(v_perp, v_perp)  # |v⊥|² = |v|² sin²θ, and |u⊥|² = |u|² sin²θ
    spans = nonzero & (perp2 > np.maximum(parallel**2 * vv, tiny))
    inv_perp2 = spans / np.where(spans, perp2, 1)
    inv_area = np.sqrt(inv_perp2) / np.sqrt(uu)  # two roots, since 1 / (|u|² |v⊥|²) could overflow
    q = inv_area * v
    return q, (q, inv_area, u_perp * (vv * inv_perp2 / uu), v_perp * inv_perp2)


def unit_area_backward(dq: Array, cache: tuple) -> tuple[Array, Array]:
    """The area ρ = |u||v⊥| grows fastest if v moves along v⊥: ∂ρ/∂v = |u| v⊥/|v⊥|. By symmetry
    ∂ρ/∂u = |v| u⊥/|u⊥|. With q = v/ρ:

        dρ = -dq·v / ρ² = -dq·q / ρ
        dv = dq/ρ + dρ |u| v⊥/|v⊥| = dq/ρ - (dq·q) v⊥/|v⊥|²     (|u|/ρ = 1/|v⊥|)
        du =        dρ |v| u⊥/|u⊥| =      - (dq·q) u⊥/|u⊥|²     (|v|/ρ = 1/|u⊥|).
    """
    q, inv_area, u_normal, v_normal = cache
    along = dot(dq, q)
    return -along * u_normal, dq * inv_area - along * v_normal


# ---- the mixing layer ----------------------------------------------------------------------------


def partner_forward(
    z: Array, taps: Array | None, offsets: tuple[int, ...], normalize: bool
) -> tuple[Array, tuple]:
    """The partner s_t, whose wedge with z_t is the layer's bivector; z, s (B, L, r), taps (m, r).

    The paper averages the bivectors of all pairs (z_t, z_{t-Δ}). The wedge is linear in its second
    argument, so the average of all these wedges is a single wedge, at the cost of a single wedge:

        1/|valid| Σ_Δ c_Δ (z_t ∧ z_{t-Δ}) = z_t ∧ s_t,   s_t = 1/|valid| Σ_Δ c_Δ z_{t-Δ},

    c_Δ = 1/|z_t ∧ z_{t-Δ}| if normalised, else 1. An offset is valid where t - Δ >= 0. (The paper
    pairs t with t+Δ. In a language model t+Δ contains the answer, so our partners lie in the past.)
    All these planes contain the line z_t, so their sum is again a plane, times a length.

    Taps are learned weights, one vector for each offset: s_t = Σ_Δ w_Δ ⊙ z_{t-Δ}, a depthwise
    causal convolution. Missing tokens count as 0. If normalised, s_t is then divided by |z_t ∧
    s_t|.
    """
    s, caches = np.zeros(z.shape, z.dtype), []
    for k, delta in enumerate(offsets):
        term = z[:, :-delta]  # (B, L-Δ, r), the partners of z[:, delta:]
        if taps is not None:
            term = taps[k] * term
        elif normalize:
            term, cache = unit_area_forward(z[:, delta:], term)
            caches.append(cache)
        s[:, delta:] += term
    share = None
    if taps is None:
        valid = (np.arange(z.shape[1])[:, None] >= np.array(offsets)).sum(1).clip(1, None)  # (L)
        share = (1 / valid).astype(z.dtype)[:, None]  # (L, 1)
        s = s * share
    elif normalize:
        s, cache = unit_area_forward(z, s)
        caches.append(cache)
    return s, (z, taps, offsets, caches, share)


def partner_backward(ds: Array, cache: tuple) -> tuple[Array, Array | None]:
    """Each term of s_t is z_{t-Δ} times a weight, so dz_{t-Δ} gets ds_t times this weight:

    taps:     dz_{t-Δ} += w_Δ ⊙ ds_t,   dw_Δ = Σ_t ds_t ⊙ z_{t-Δ}
    average:  dz_{t-Δ} += c_Δ ds_t / |valid|

    If normalised, c_Δ depends on z_t and z_{t-Δ}, too: `unit_area_backward`.
    """
    z, taps, offsets, caches, share = cache
    dz, dtaps = np.zeros_like(z), None if taps is None else np.empty_like(taps)
    if taps is None:
        ds = ds * share
    elif caches:  # normalised
        dz, ds = unit_area_backward(ds, caches[0])
    for k, delta in enumerate(offsets):
        dterm = ds[:, delta:]  # (B, L-Δ, r)
        if taps is not None:
            dtaps[k] = (dterm * z[:, :-delta]).sum((0, 1))
            dterm = taps[k] * dterm
        elif caches:  # normalised
            du, dterm = unit_area_backward(dterm, caches[k])
            dz[:, delta:] += du
        dz[:, :-delta] += dterm
    return dz, dtaps


def gate_forward(h: Array, g: Array, W: Array, b: Array) -> tuple[Array, tuple]:
    """α = sigmoid([h ; g] W + b), out = α ⊙ h + (1-α) ⊙ g; h, g (..., d), W (2d, d), b (d)."""
    a, c_linear = linear_forward(np.concatenate([h, g], -1), W, b)  # (..., 2d) -> (..., d)
    alpha = 0.5 + 0.5 * np.tanh(0.5 * a)  # the sigmoid 1 / (1 + exp(-a)), without overflow
    difference = h - g
    return g + alpha * difference, (difference, alpha, c_linear)


def gate_backward(dout: Array, cache: tuple) -> tuple[Array, Array, Array, Array]:
    """dα = dout ⊙ (h - g), sigmoid' = α(1-α).

    h and g act on the output directly and through the gate.
    """
    difference, alpha, c_linear = cache
    direct = alpha * dout
    dhg, dW, db = linear_backward(difference * direct * (1 - alpha), c_linear)  # dhg (..., 2d)
    d = dout.shape[-1]
    return direct + dhg[..., :d], (dout - direct) + dhg[..., d:], dW, db


def associate(
    q: Array, k: Array, v: Array, M: Array | None = None, chunk: int = 64
) -> tuple[Array, Array]:
    """q_t (M + Σ_{i<=t} k_iᵀ v_i) at every t, and the last sum; q k v (B, L, r), M (B, r, r).

    k_iᵀ v_i gives v_i to whoever asks with k_i. As matrices, out = (Q Kᵀ ⊙ causal) V + Q M:
    attention's products without a softmax, chunk by chunk. Of all chunks before, M = KᵀV is enough:
    time is linear in L.
    """
    (batch, L, r), out = q.shape, np.empty_like(q)
    M = np.zeros((batch, r, r), q.dtype) if M is None else M
    for i in range(0, L, chunk):
        Q, K, V = (x[:, i : i + chunk] for x in (q, k, v))  # (B, chunk, r)
        K_T, causal = K.swapaxes(1, 2), np.tri(Q.shape[1], dtype=q.dtype)
        out[:, i : i + chunk] = (Q @ K_T * causal) @ V + Q @ M
        M = M + K_T @ V
    return out, M


def memory_forward(
    h: Array, z: Array, s: Array, w: Scope, past: dict | None = None
) -> tuple[Array, tuple]:
    """A matrix that every token writes and reads.

    h (B, L, d), z and its partner s (B, L, r) -> m (B, L, d):

        [k v] = h W_kv + b_kv,  k += s   a key and a value          (B, L, r) each
        M_t = Σ_{i<=t} k_iᵀ v_i          the memory                 (B, r, r)
        c_t = z_t M_t / sqrt(r t)        what z_t reads             (B, L, r), t counted from 1
        m = c W_mem                      project back               (B, L, d)

    Values whose keys are like z_t come back, from any distance. Keys contain s_i, so z_t also reads
    what followed tokens like t. `past` (streaming) holds M and the number of tokens.
    """
    _, L, r = z.shape
    past = {} if past is None else past
    kv, c_kv = linear_forward(h, w["W_kv"], w["b_kv"])  # (B, L, 2r)
    k = kv[..., :r] + s
    v = kv[..., r:]
    seen = past.get("seen", 0)
    scale = (1 / np.sqrt(r * np.arange(seen + 1, seen + L + 1))).astype(z.dtype)[:, None]  # (L, 1)
    c, past["M"] = associate(z, k, v, past.get("M"))
    c = c * scale
    past["seen"] = seen + L
    return c @ w["W_mem"], (z, k, v, c, scale, w["W_mem"], c_kv)


def memory_backward(dm: Array, cache: tuple) -> tuple[Array, Array, Array, Params]:
    """Let dc_t include the factor 1 / sqrt(r t), and hold it fixed.

    Differentiate Σ_t Σ_{i<=t} (z_t·k_i)(v_i·dc_t):

        dz_t = Σ_{i<=t} (dc_t·v_i) k_i
        dk_i = Σ_{t>=i} (v_i·dc_t) z_t = ds_i
        dv_i = Σ_{t>=i} (k_i·z_t) dc_t

    Each sum is `associate` with other arguments; the last two run backwards in time.
    """
    z, k, v, c, scale, W_mem, c_kv = cache
    dc = dm @ W_mem.T * scale
    z_r, k_r, v_r, dc_r = (x[:, ::-1] for x in (z, k, v, dc))  # from the end
    dz, _ = associate(dc, v, k)
    dk_r, _ = associate(v_r, dc_r, z_r)
    dv_r, _ = associate(k_r, z_r, dc_r)
    dk = dk_r[:, ::-1]
    dv = dv_r[:, ::-1]
    dh, dW_kv, db_kv = linear_backward(np.concatenate([dk, dv], -1), c_kv)
    dW_mem = c.reshape(-1, len(W_mem)).T @ dm.reshape(-1, dm.shape[-1])  # (r, T) @ (T, d)
    return dh, dz, dk, {"W_kv": dW_kv, "b_kv": db_kv, "W_mem": dW_mem}


def mix_forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
    """The Grassmann mixing layer (paper, section 3): h (B, L, d) -> mix (B, L, d).

        z = h W_red + b_red        reduce          (B, L, r)
        s = partner(z)             look back       (B, L, r)
        p = z ∧ s                  span a plane    (B, L, n)
        g = p W_plu + b_plu        project back    (B, L, d)      + memory(h, z, s), if any
        mix = gate(h, g)           blend           (B, L, d)

    `w` holds the layer's parameters. While streaming, `past` holds the last max(Δ) reduced states
    and the memory's state, and is updated. The cache holds z, s and p under these names, and the
    gate's α as alpha.
    """
    offsets, taps = config.offsets[layer], w["taps"] if config.taps else None
    z, c_red = linear_forward(h, w["W_red"], w["b_red"])
    length, window = z.shape[1], z
    if past is not None:
        window = np.concatenate([past["z"], z], 1) if past else z  # (B, max Δ + L, r)
        past["z"] = window[:, -max(offsets) :]
    s, c_partner = partner_forward(window, taps, offsets, config.normalize)
    s = s[:, -length:]
    p, c_wedge = plucker_forward(z, s)
    g, c_plu = linear_forward(p, w["W_plu"], w["b_plu"])
    cache = {"red": c_red, "partner": c_partner, "wedge": c_wedge, "plu": c_plu}
    if config.memory:
        m, cache["memory"] = memory_forward(h, z, s, w, past)
        g += m
    mix, cache["gate"] = gate_forward(h, g, w["W_gate"], w["b_gate"])
    return mix, cache | {"z": z, "s": s, "p": p, "alpha": cache["gate"][1]}


def mix_backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
    """The steps of `mix_forward` in reverse.

    z and h are used several times, so their gradients add up.
    """
    grads = {}
    dh, dg, grads["W_gate"], grads["b_gate"] = gate_backward(dmix, cache["gate"])
    dp, grads["W_plu"], grads["b_plu"] = linear_backward(dg, cache["plu"])
    dz, ds = plucker_backward(dp, cache["wedge"])
    if "memory" in cache:
        dh_memory, dz_memory, ds_memory, memory = memory_backward(dg, cache["memory"])
        dh, dz, ds, grads = dh + dh_memory, dz + dz_memory, ds + ds_memory, grads | memory
    dz_partner, dtaps = partner_backward(ds, cache["partner"])
    if dtaps is not None:
        grads["taps"] = dtaps
    dz += dz_partner
    dh_red, grads["W_red"], grads["b_red"] = linear_backward(dz, cache["red"])
    return dh + dh_red, grads


def mix_shapes(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the layer's parameters."""
    d, r, n = config.d_model, config.rank, config.rank * (config.rank - 1) // 2
    taps = {"taps": (len(config.offsets[layer]), r)} if config.taps else {}
    memory = {"W_kv": (d, 2 * r), "b_kv": (2 * r,), "W_mem": (r, d)} if config.memory else {}
    project = {"W_plu": (n, d), "b_plu": (d,), "W_gate": (2 * d, d), "b_gate": (d,)}
    return {"W_red": (d, r), "b_red": (r,)} | taps | memory | project


# ---- attention, for comparison -------------------------------------------------------------------


def attention_core_forward(
    q: Array, k: Array, v: Array, past: dict | None = None
) -> tuple[Array, tuple]:
    """softmax(q kᵀ / sqrt(d_k)) v over the past, an L x L table per head.

    q k v are (B, n_head, L, d_k).

    While streaming, `past` holds all earlier keys and values, so it grows.
    """
    if past is not None:
        if past:
            k, v = np.concatenate([past["k"], k], 2), np.concatenate([past["v"], v], 2)
        past["k"], past["v"] = k, v
    L, keys = q.shape[2], k.shape[2]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])  # (B, n_head, L, keys)
    np.copyto(scores, -np.inf, where=~np.tri(L, keys, keys - L, dtype=bool))  # hide the future
    a = np.exp(scores - scores.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    return a @ v, (q, k, v, a)


def attention_core_backward(do: Array, cache: tuple) -> tuple[Array, Array, Array]:
    """From o = a v:  da = do vᵀ, dv = aᵀ do.

    The softmax of a row has the derivative diag(a) - aᵀ a.
    So dscores = a ⊙ (da - Σ a ⊙ da). With dqk = dscores / sqrt(d_k):  dq = dqk k, dk = dqkᵀ q.
    """
    q, k, v, a = cache
    da, dv = do @ v.swapaxes(-1, -2), a.swapaxes(-1, -2) @ do
    dqk = a * (da - dot(a, da)) / math.sqrt(q.shape[-1])  # (B, n_head, L, L)
    return dqk @ k, dqk.swapaxes(-1, -2) @ q, dv


def attention_forward(
    h: Array, w: Scope, config: Config, layer: int, past=None
) -> tuple[Array, dict]:
    """Causal multi-head softmax attention: h (B, L, d) -> (B, L, d).

    [q k v] = h W_qkv + b_qkv             heads of width d_k = d / n_head
    out = attention(q, k, v) W_out + b_out
    """
    (B, L, d), n_head = h.shape, config.n_head
    qkv, c_qkv = linear_forward(h, w["W_qkv"], w["b_qkv"])  # (B, L, 3d)
    heads, c_core = attention_core_forward(
        *qkv.reshape(B, L, 3, n_head, -1).transpose(2, 0, 3, 1, 4), past
    )
    out, c_out = linear_forward(heads.swapaxes(1, 2).reshape(B, L, d), w["W_out"], w["b_out"])
    return out, {"core": c_core, "a": c_core[-1], "qkv": c_qkv, "out": c_out}


def attention_backward(dout: Array, cache: dict) -> tuple[Array, Params]:
    """The steps of `attention_forward` in reverse."""
    B, n_head, L, d_k = cache["core"][0].shape
    dheads, dW_out, db_out = linear_backward(dout, cache["out"])
    dqkv = attention_core_backward(dheads.reshape(B, L, n_head, d_k).swapaxes(1, 2), cache["core"])
    # (3, B, n_head, L, d_k) -> (B, L, 3d)
    dqkv = np.stack(dqkv).transpose(1, 3, 0, 2, 4).reshape(B, L, -1)
    dh, dW_qkv, db_qkv = linear_backward(dqkv, cache["qkv"])
    return dh, {"W_qkv": dW_qkv, "b_qkv": db_qkv, "W_out": dW_out, "b_out": db_out}


def attention_shapes(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of attention's parameters."""
    d = config.d_model
    return {"W_qkv": (d, 3 * d), "b_qkv": (3 * d,), "W_out": (d, d), "b_out": (d,)}


MIXERS = {
    "grassmann": (mix_forward, mix_backward, mix_shapes),
    "attention": (attention_forward, attention_backward, attention_shapes),
}

# ---- the block -----------------------------------------------------------------------------------


def ffn_forward(x: Array, w: Scope) -> tuple[Array, tuple]:
    """GELU(x W_1 + b_1) W_2 + b_2, each token by itself; x (..., d)."""
    inner, c_1 = linear_forward(x, w["W_1"], w["b_1"])  # (..., d_ff)
    active, c_gelu = gelu_forward(inner)
    out, c_2 = linear_forward(active, w["W_2"], w["b_2"])  # (..., d)
    return out, (c_1, c_gelu, c_2)


def ffn_backward(dout: Array, cache: tuple) -> tuple[Array, Params]:
    """The steps of `ffn_forward` in reverse."""
    c_1, c_gelu, c_2 = cache
    grads = {}
    dactive, grads["W_2"], grads["b_2"] = linear_backward(dout, c_2)
    dx, grads["W_1"], grads["b_1"] = linear_backward(gelu_backward(dactive, c_gelu), c_1)
    return dx, grads


def prenorm_block_forward(
    h: Array, w: Scope, config: Config, layer: int, past=None, draw=None
) -> tuple[Array, dict]:
    """h ← h + D(mix(LN1(h))), h ← h + D(FFN(LN2(h))), D dropout; h (B, L, d).

    The gate can keep only LN1(h).
    """
    mixer_forward, *_ = MIXERS[config.mixer]
    normed, c_ln1 = layernorm_forward(h, w["ln1.w"], w["ln1.b"])
    mix, c_mix = mixer_forward(normed, w.scope("mix."), config, layer, past)
    mix, mask_mix = dropout_forward(mix, config.dropout, draw)
    h = h + mix
    normed, c_ln2 = layernorm_forward(h, w["ln2.w"], w["ln2.b"])
    ffn, c_ffn = ffn_forward(normed, w.scope("ffn."))
    ffn, mask_ffn = dropout_forward(ffn, config.dropout, draw)
    cache = {"ln1": c_ln1, "mix": c_mix, "mask_mix": mask_mix}
    return h + ffn, cache | {"ln2": c_ln2, "ffn": c_ffn, "mask_ffn": mask_ffn}


def prenorm_block_backward(dout: Array, cache: dict, config: Config) -> tuple[Array, Params]:
    """h + f(h) passes its gradient to h twice: unchanged, and through f."""
    _, mixer_backward, _ = MIXERS[config.mixer]
    grads = {}
    dnormed, ffn = ffn_backward(dropout_backward(dout, cache["mask_ffn"]), cache["ffn"])
    dh, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(dnormed, cache["ln2"])
    dh = dout + dh
    dnormed, mix = mixer_backward(dropout_backward(dh, cache["mask_mix"]), cache["mix"])
    dx, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(dnormed, cache["ln1"])
    return dh + dx, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)


def paper_block_forward(
    h: Array, w: Scope, config: Config, layer: int, past=None, draw=None
) -> tuple[Array, dict]:
    """h ← D(LN1(mix(h))),  h ← LN2(h + D(FFN(h))),  D dropout (paper, section 3); h (B, L, d).

    The gate inside mix can keep h. Attention has no gate and gets a residual path: mix(h) = h +
    attention(h).
    """
    mixer_forward, *_ = MIXERS[config.mixer]
    mix, c_mix = mixer_forward(h, w.scope("mix."), config, layer, past)
    if config.mixer == "attention":
        mix = h + mix
    normed, c_ln1 = layernorm_forward(mix, w["ln1.w"], w["ln1.b"])
    h, mask_mix = dropout_forward(normed, config.dropout, draw)
    ffn, c_ffn = ffn_forward(h, w.scope("ffn."))
    ffn, mask_ffn = dropout_forward(ffn, config.dropout, draw)
    out, c_ln2 = layernorm_forward(h + ffn, w["ln2.w"], w["ln2.b"])
    cache = {"mix": c_mix, "ln1": c_ln1, "mask_mix": mask_mix}
    return out, cache | {"ffn": c_ffn, "mask_ffn": mask_ffn, "ln2": c_ln2}


def paper_block_backward(dout: Array, cache: dict, config: Config) -> tuple[Array, Params]:
    """The steps of `paper_block_forward` in reverse."""
    _, mixer_backward, _ = MIXERS[config.mixer]
    grads = {}
    dsum, grads["ln2.w"], grads["ln2.b"] = layernorm_backward(dout, cache["ln2"])
    dh, ffn = ffn_backward(dropout_backward(dsum, cache["mask_ffn"]), cache["ffn"])
    dnormed = dropout_backward(dsum + dh, cache["mask_mix"])
    dmix, grads["ln1.w"], grads["ln1.b"] = layernorm_backward(dnormed, cache["ln1"])
    dh, mix = mixer_backward(dmix, cache["mix"])
    if config.mixer == "attention":
        dh += dmix
    return dh, grads | prefixed("mix.", mix) | prefixed("ffn.", ffn)


BLOCKS = {
    "prenorm": (prenorm_block_forward, prenorm_block_backward),
    "paper": (paper_block_forward, paper_block_backward),
}

# ---- configuration and parameters ----------------------------------------------------------------

WIDENING = (  # the offsets in each quarter of the layers
    (1, 2),
    (1, 2, 3, 4),
    (1, 2, 3, 4, 5, 6),
    (1, 2, 4, 8, 12, 16),
)


def default_offsets(n_layer: int, context: int, taps: bool) -> Offsets:
    """With taps, later layers have more and larger offsets.

    Without taps, each layer has one: 1, 2, 4, 8, 1, …
    """
    layers = []
    for i in range(n_layer):
        quarter = 3 - 4 * (n_layer - 1 - i) // n_layer  # 0 to 3; the last layer is in 3
        offsets = WIDENING[quarter] if taps else (2 ** (i % 4),)
        layers.append(tuple(delta for delta in offsets if delta < context) or (1,))
    return tuple(layers)


class DefaultOffsets(tuple):
    """Offsets that nobody gave: a changed copy of the config chooses its own."""


class DefaultWidth(int):
    """A width of the FFN that nobody gave: a changed copy of the config chooses its own."""


SMALLEST = {
    "vocab_size": 1,
    "context": 1,
    "n_layer": 1,
    "d_model": 1,
    "rank": 2,
    "n_head": 1,
}
MOST_LAYERS = 1000


@dataclass(frozen=True)
class Config:
    """The sizes and options of one model. The defaults are train_char.py's.

    It cannot be changed. `dataclasses.replace` makes a changed copy, which chooses `offsets` and
    `d_ff` anew unless somebody gave them. Raises UserError and TypeError.

    The paper's model: block="paper", taps=False, normalize=True, positions=True, d_ff=4*d_model,
    and for six layers offsets=((1,), (2,), (4,), (8,), (12,), (16,)).
    """

    vocab_size: int
    context: int = 64
    n_layer: int = 4
    d_model: int = 128
    rank: int = 32  # width of the reduced states
    offsets: Offsets | None = None  # how far back each layer looks; None: `default_offsets`
    d_ff: int | None = None  # inner width of the FFN; None: 2 d_model, with attention 4 d_model
    dropout: float = 0.1
    block: str = "prenorm"  # a residual path; "paper": LayerNorm after each half
    taps: bool = True  # learned weights for each offset; False: the offsets' average (paper)
    normalize: bool = False  # divide each bivector by its length (paper: optional)
    positions: bool = False  # a learned vector per position; False: takes texts of any length
    mixer: str = "grassmann"  # or "attention", for comparison
    n_head: int = 4  # attention heads
    memory: bool = False  # besides its short past a layer reads a matrix that all tokens write

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass has no other way

    def __post_init__(self) -> None:
        attention = self.mixer == "attention"
        for name, smallest in SMALLEST.items():
            self._keep(name, operator.index(getattr(self, name)))
            size = getattr(self, name)
            require(size >= smallest, f"{name} must be at least {smallest}, not {size}")
        if self.d_ff is None or isinstance(self.d_ff, DefaultWidth):
            self._keep("d_ff", DefaultWidth((4 if attention else 2) * self.d_model))
        else:
            self._keep("d_ff", operator.index(self.d_ff))
        require(self.d_ff >= 1, f"d_ff must be at least 1, not {self.d_ff}")
        require(
            self.n_layer <= MOST_LAYERS,
            f"n_layer must be at most {MOST_LAYERS}, not {self.n_layer}",
        )
        for name in ("taps", "normalize", "positions", "memory"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False, not {value!r}")
        self._keep("dropout", float(self.dropout))
        require(
            0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}"
        )
        require(self.block in [*BLOCKS], f"block must be one of {[*BLOCKS]}, not {self.block!r}")
        require(
            self.mixer in [*MIXERS],
            f"mixer must be one of {[*MIXERS]}, not {self.mixer!r}; for a "
            "layer of your own give --mixer and its file, unchanged (behind the # is its hash)",
        )
        self._choose_offsets(attention)
        if attention:
            require(
                not self.memory and not self.offsets, "attention has neither memory nor offsets"
            )
            require(
                self.d_model % self.n_head == 0,
                f"n_head, {self.n_head}, must divide d_model, {self.d_model}",
            )
            return
        require(
            not (self.memory and self.normalize),
            "memory needs partners that are not normalised",
        )
        require(
            len(self.offsets) == self.n_layer,
            f"{self.n_layer} layers need as many groups of offsets, not {len(self.offsets)}",
        )

    def _choose_offsets(self, attention: bool) -> None:
        """Sets offsets that nobody gave, and checks those that somebody gave."""
        if self.offsets is None or isinstance(self.offsets, DefaultOffsets):
            chosen = () if attention else default_offsets(self.n_layer, self.context, self.taps)
            self._keep("offsets", DefaultOffsets(chosen))
        else:
            given = tuple(tuple(map(operator.index, layer)) for layer in self.offsets)
            self._keep("offsets", given)
        for layer in self.offsets:
            require(
                len(set(layer)) == len(layer) > 0,
                f"a layer needs offsets, all distinct, not {layer}",
            )
            require(
                0 < min(layer) <= max(layer) < self.context,
                f"offsets must be from 1 to context - 1, here {self.context - 1}, not {layer}",
            )


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in order."""
    d, d_ff, (*_, mixer_shapes) = config.d_model, config.d_ff, MIXERS[config.mixer]
    shapes = {"E": (config.vocab_size, d)}
    if config.positions:
        shapes["P"] = (config.context, d)
    norms = {"ln1.w": (d,), "ln1.b": (d,), "ln2.w": (d,), "ln2.b": (d,)}
    ffn = {"W_1": (d, d_ff), "b_1": (d_ff,), "W_2": (d_ff, d), "b_2": (d,)}
    for i in range(config.n_layer):
        block = norms | prefixed("mix.", mixer_shapes(config, i)) | prefixed("ffn.", ffn)
        shapes |= prefixed(f"blocks.{i}.", block)
    if config.block == "prenorm":
        shapes |= {"ln_f.w": (d,), "ln_f.b": (d,)}
    return shapes


def init_params(config: Config, seed: int = 0, dtype: type = np.float32) -> Params:
    """Draw the initial parameters, a flat dict from name to array.

    Matrices and embeddings: N(0, 0.02²). W_2 and W_out are divided by sqrt(2N), since they write
    into the residual path. W_red, W_kv: N(0, 1/d), so that reduced states have unit size and planes
    have some area. Taps: N(0, 0.5²), so that offsets differ from the start. LayerNorm: w = 1, b =
    0. Biases: 0.
    """
    rng, params, residual = np.random.default_rng(seed), {}, 0.02 / math.sqrt(2 * config.n_layer)
    scales = dict.fromkeys(("W_red", "W_kv"), config.d_model**-0.5) | {
        "taps": 0.5,
        "W_2": residual,
        "W_out": residual,
    }
    for name, shape in param_shapes(config).items():
        kind = name.split(".")[-1]
        if kind == "w" or kind.startswith("b"):
            params[name] = np.full(shape, kind == "w", dtype)  # ones, or zeros
        else:
            params[name] = (scales.get(kind, 0.02) * rng.standard_normal(shape)).astype(dtype)
    return params


def check_model(params: Params, config: Config) -> None:
    """Raises UserError if the parameters do not fit the config."""
    shapes, given = param_shapes(config), {name: value.shape for name, value in params.items()}
    for name in shapes | given if given != shapes else ():
        require(
            given.get(name) == shapes.get(name),
            f"the parameters do not fit the config: {name} is "
            f"{given.get(name, 'missing')}, the config has {shapes.get(name, 'no such parameter')}",
        )


def check_tokens(tokens: Array, config: Config) -> None:
    """Raises UserError unless tokens are whole numbers of shape (B, L), below vocab_size."""
    require(
        tokens.ndim == 2 and tokens.size > 0 and tokens.dtype.kind in "iu",
        f"tokens must be whole numbers of shape (B, L), not {tokens.dtype} of shape {tokens.shape}",
    )
    low, high, last = tokens.min(), tokens.max(), config.vocab_size - 1
    require(low >= 0 and high <= last, f"tokens must be from 0 to {last}, not from {low} to {high}")


# ---- the model and its loss ----------------------------------------------------------------------


def head_forward(h: Array, E: Array) -> tuple[Array, tuple]:
    """logits = h Eᵀ, dot products of each state with all embeddings.

    h (B, L, d), E (V, d) -> (B, L, V).
    """
    return (h.reshape(-1, E.shape[1]) @ E.T).reshape(*h.shape[:-1], -1), (h, E)


def head_backward(dlogits: Array, cache: tuple) -> tuple[Array, Array]:
    """dh = dlogits E,  dE = dlogitsᵀ h."""
    h, E = cache
    dlogits, rows = dlogits.reshape(-1, len(E)), h.reshape(-1, E.shape[1])  # (T, V), (T, d)
    return (dlogits @ E).reshape(h.shape), dlogits.T @ rows


def model_forward(
    params: Params, config: Config, tokens: Array, past=None, start=0, draw=None
) -> tuple[Array, dict]:
    """Embed, N blocks, project onto the embedding: tokens (B, L) -> logits (B, L, V), cache.

    Streaming needs `past`, one dict per layer, and `start`, the position of the first token. `draw`
    draws the dropout masks. To look inside: cache["blocks"][i]["mix"]["alpha"], also "z", "s" and
    "p".
    """
    block_forward, _ = BLOCKS[config.block]
    h, c_embed = embedding_forward(tokens, params["E"])  # (B, L) -> (B, L, d)
    if config.positions:
        end = start + tokens.shape[1]
        require(
            end <= config.context,
            f"with positions, {end} tokens exceed the context of {config.context}",
        )
        h = h + params["P"][start:end]
    h, mask = dropout_forward(h, config.dropout, draw)
    cache = {"config": config, "embed": c_embed, "mask": mask, "blocks": []}
    for i, layer_past in enumerate(past or [None] * config.n_layer):
        h, c_block = block_forward(h, Scope(params, f"blocks.{i}."), config, i, layer_past, draw)
        cache["blocks"].append(c_block)
    if config.block == "prenorm":
        h, cache["ln_f"] = layernorm_forward(h, params["ln_f.w"], params["ln_f.b"])
    logits, cache["head"] = head_forward(h, params["E"])  # (B, L, V)
    return logits, cache


def model_backward(dlogits: Array, cache: dict) -> Params:
    """Gradients of all parameters.

    E is used twice, as embedding and as head, so its two gradients add up.
    """
    config, grads = cache["config"], {}
    _, block_backward = BLOCKS[config.block]
    dh, dE = head_backward(dlogits, cache["head"])
    if config.block == "prenorm":
        dh, grads["ln_f.w"], grads["ln_f.b"] = layernorm_backward(dh, cache["ln_f"])
    for i in reversed(range(config.n_layer)):
        dh, block = block_backward(dh, cache["blocks"][i], config)
        grads |= prefixed(f"blocks.{i}.", block)
    dh = dropout_backward(dh, cache["mask"])
    if config.positions:
        grads["P"] = np.zeros((config.context, dh.shape[-1]), dh.dtype)
        grads["P"][: dh.shape[1]] = dh.sum(0)
    grads["E"] = dE + embedding_backward(dh, cache["embed"])
    return grads


def forward(params: Params, config: Config, tokens: Array) -> Array:
    """Logits of the next token at every position: (B, L) integers -> (B, L, V).

    Raises UserError if parameters do not fit the config, if tokens are not in the vocabulary, or if
    a model with positions gets more than its context.
    """
    tokens = np.asarray(tokens)
    check_model(params, config)
    check_tokens(tokens, config)
    return model_forward(params, config, tokens)[0]


def loss_and_grads(
    params: Params, config: Config, x: Array, y: Array, seed=None, rows=None
) -> tuple[float, Params]:
    """Mean cross-entropy in nats of predicting y from x, both (B, L), and its gradients.

    The gradients are a new dict.

    `seed`, one whole number or several, decides the dropout masks; None: no dropout. With `rows` =
    (first, n), x and y are the rows first, first + 1, … of a batch of n rows. Then loss and
    gradients are multiplied by B/n, so that all parts add up to the batch's. Raises UserError like
    `forward`, and if x and y differ in shape.
    """
    x, y = np.asarray(x), np.asarray(y)
    require(x.shape == y.shape, f"x and y must have the same shape, not {x.shape} and {y.shape}")
    check_model(params, config)
    for tokens in (x, y):
        check_tokens(tokens, config)
    first, n = rows or (0, len(x))
    require(0 <= first <= n - len(x), f"rows {rows} do not hold {len(x)} rows of x")
    draw = None if seed is None else draw_rows(seed, first, n)
    logits, cache = model_forward(params, config, x, draw=draw)
    loss, c_loss = cross_entropy_forward(logits, y)
    share = len(x) / n
    return share * loss, model_backward(cross_entropy_backward(share, c_loss), cache)


# ---- optimiser -----------------------------------------------------------------------------------


def adamw_init(params: Params) -> dict[str, Params]:
    """The optimiser's state: running means of the gradient and of its square, zero at first."""
    return {
        key: {name: np.zeros_like(value) for name, value in params.items()}
        for key in ("adam_m", "adam_v")
    }


def adamw_step(
    params: Params,
    grads: Params,
    state: dict[str, Params],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.1,
    eps: float = 1e-8,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place; `step` counts from 0.

    m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²,   m̂ = m / (1 - β₁^(step+1)),   v̂ likewise
    θ ← θ - lr (m̂ / (sqrt(v̂) + eps) + λ θ),   with λ = weight_decay for matrices, 0 for vectors

    Raises UserError, before anything changes, if a gradient has not its parameter's shape.
    """
    for name, theta in params.items():
        shape = grads[name].shape
        require(shape == theta.shape, f"the gradient of {name} is {shape}, not {theta.shape}")
    (beta_1, beta_2), t = betas, step + 1
    fix_1, fix_2 = 1 - beta_1**t, 1 - beta_2**t
    for name, theta in params.items():
        g, m, v = grads[name], state["adam_m"][name], state["adam_v"][name]
        m += (1 - beta_1) * (g - m)
        v += (1 - beta_2) * (g * g - v)
        if theta.ndim > 1:
            theta *= 1 - lr * weight_decay
        theta -= (lr / fix_1) * m / (np.sqrt(v / fix_2) + eps)


def clip_grads(grads: Params, max_norm: float) -> float:
    """Scale all gradients by one factor, in place, to a joint norm of at most max_norm.

    Returns the norm before. Raises UserError unless max_norm is positive.
    """
    require(max_norm > 0, f"max_norm must be positive, not {max_norm}")
    norm = math.hypot(*(np.linalg.norm(g.astype(np.float64)) for g in grads.values()))
    if norm > max_norm:
        for g in grads.values():
            g *= max_norm / norm
    return norm


# ---- batches and validation ----------------------------------------------------------------------


def get_batch(tokens: Array, batch_size: int, context: int, seed: int, step: int) -> tuple:
    """x (B, L) and y, the same windows one token later. (seed, step) decides where they start.

    Raises UserError.
    """
    require(
        len(tokens) > context,
        f"{len(tokens)} tokens are too few: a context of {context} needs {context + 1}",
    )
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(tokens) - context, batch_size)
    starts = np.asarray(starts)  # gpu.py's np copies them to the GPU
    windows = starts[:, None] + np.arange(context)  # (B, L)
    return tokens[windows], tokens[windows + 1]


def validation_loss(params: Params, config: Config, tokens: Array, each: Callable = map) -> float:
    """Mean nats per token over `tokens`, in consecutive windows.

    Every token except the first is a target, once.

    `each` is map, or a map that uses threads or shows progress. Raises UserError if there are fewer
    than 2 tokens.
    """
    require(len(tokens) > 1, f"a validation needs at least 2 tokens, not {len(tokens)}")
    targets, context = len(tokens) - 1, config.context
    whole = targets // context * context
    x, y = tokens[:whole].reshape(-1, context), tokens[1 : whole + 1].reshape(-1, context)
    size = max(1, TOKENS_PER_PASS // context)  # windows at once
    chunks = [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]
    if whole < targets:
        chunks.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))

    def total(chunk: tuple[Array, Array]) -> float:
        x, y = chunk
        return float(cross_entropy_forward(forward(params, config, x), y)[0]) * y.size

    return math.fsum(each(total, chunks)) / targets


# ---- streaming and sampling ----------------------------------------------------------------------


def stream_init(params: Params, config: Config) -> dict:
    """The state of a decoder that has read nothing yet.

    For each layer it keeps the last max(Δ) reduced states and the memory, if any. So token 100,000
    costs as much as token 10. (Attention keeps all keys and values, so its state grows.)
    """
    check_model(params, config)
    return {"past": [{} for _ in range(config.n_layer)], "position": 0, "recent": []}


def stream_read(params: Params, config: Config, state: dict, tokens: list) -> tuple[Array, dict]:
    """Read one token or more.

    Returns the next token's logits (V) and the state, which is updated when all is read. A copy,
    dict(state), can be read on from without changing the state: so a stream branches.

    The logits equal `forward` on the whole text. Positions, if any, end with the context. There the
    decoder forgets all but the last half of the context, and reads this half again from position 0.
    """
    tokens, most = list(tokens), TOKENS_PER_PASS
    require(len(tokens) > 0, "there is nothing to read: give one token or more")
    require(
        0 <= min(tokens) <= max(tokens) < config.vocab_size,
        f"tokens must be from 0 to {config.vocab_size - 1}",
    )
    after = dict(state)
    after["past"] = [dict(past) for past in state["past"]]
    while tokens:
        if config.positions:
            if after["position"] == config.context:
                forgotten = len(after["recent"]) - config.context // 2
                tokens = after["recent"][forgotten:] + tokens
                after |= stream_init(params, config)
            most = min(TOKENS_PER_PASS, config.context - after["position"])
            after["recent"] = after["recent"] + tokens[:most]
        now, tokens = tokens[:most], tokens[most:]
        logits, _ = model_forward(params, config, np.array([now]), after["past"], after["position"])
        after["position"] += len(now)
    state |= after
    return logits[0, -1], state


def stream_step(params: Params, config: Config, state: dict, token: int) -> tuple[Array, dict]:
    """`stream_read` of one token."""
    return stream_read(params, config, state, [token])


def sample(logits: Array, temperature: float, top_k: int | None, rng: Rng) -> int:
    """Draw a token from softmax(logits / temperature).

    Only the top_k largest logits, and what equals one of them, can be drawn. Temperature 0 takes
    the largest logit. Raises UserError if the logits are not finite.
    """
    require(temperature >= 0, f"temperature must be 0 or more, not {temperature}")
    require(
        np.isfinite(logits).all(),
        "the model's logits are not finite: train it again with a lower learning rate",
    )
    logits = logits.astype(np.float64)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf, and exp(-inf) = 0 is right
        cumulative = np.exp((logits - logits.max()) / temperature).cumsum()
    return int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))


def generate(
    params: Params,
    config: Config,
    prompt: Iterable[int],
    n: int,
    temperature=1.0,
    top_k=None,
    seed=0,
) -> Iterator[int]:
    """Read the prompt (token 0 if it is empty), then yield n tokens. Each is drawn, yielded, and
    read. Raises UserError and TypeError at once, not at the first token, if an argument makes no
    sense.
    """
    prompt, rng = [operator.index(token) for token in prompt] or [0], np.random.default_rng(seed)
    state = stream_init(params, config)
    check_tokens(np.array([prompt]), config)
    require(
        0 <= temperature < math.inf, f"temperature must be 0 or more and finite, not {temperature}"
    )
    require(operator.index(n) >= 0, f"the number of tokens must be 0 or more, not {n}")
    require(top_k is None or operator.index(top_k) >= 1, f"top_k must be at least 1, not {top_k}")

    def tokens() -> Iterator[int]:
        logits, _ = stream_read(params, config, state, prompt)
        for k in range(n):
            token = sample(logits, temperature, top_k, rng)
            yield token
            if k < n - 1:
                logits, _ = stream_step(params, config, state, token)

    return tokens()
