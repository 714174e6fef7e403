"""Layers that compare.py tries in place of grassmann.py's own: other products, other partners.

None of them earned a place in the reference, so none is an option there.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

import numpy as np

import grassmann
from grassmann import Array, Config, pairs

def variant(product: str, landmarks: tuple[str, ...], vocab: list[int]) -> AbstractContextManager:
    """Within the `with` block, in all threads, grassmann.py's layers have this product in place of
    the wedge, and these landmarks as partners too.
    """
    forward, backward, _ = PRODUCTS[product]
    functions = {"plucker_forward": forward, "plucker_backward": backward}
    if landmarks:
        functions |= look_back_to(landmarks, vocab)
    return patch.multiple(grassmann, **functions)

# ---- products in place of the wedge --------------------------------------------------------------

def symmetric_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """p_ij = u_i v_j + u_j v_i for i < j, (..., n): the wedge, but u and v may be exchanged."""
    i, j = pairs(u.shape[-1])
    return u[..., i] * v[..., j] + u[..., j] * v[..., i], (u, v)

def symmetric_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """With the symmetric S, S_ij = S_ji = dp_ij and zeros on the diagonal, Σ dp_ij p_ij = uᵀ S v:

        du = S v,   dv = S u.
    """
    u, v = cache
    i, j = pairs(u.shape[-1])
    S = np.zeros((*u.shape, u.shape[-1]), dp.dtype)  # (..., r, r)
    S[..., i, j] = S[..., j, i] = dp
    return (S @ v[..., None])[..., 0], (S @ u[..., None])[..., 0]


def padded(p: Array, r: int) -> Array:
    """p (..., k) with zeros after it, to the n = r(r-1)/2 coordinates that W_plu expects.

    Rows of W_plu that meet only zeros do nothing: `count_params` leaves them out.
    """
    n = r * (r - 1) // 2
    return np.concatenate([p, np.zeros((*p.shape[:-1], n - p.shape[-1]), p.dtype)], -1)


def elementwise_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """p_i = u_i v_i, then zeros."""
    return padded(u * v, u.shape[-1]), (u, v)

def elementwise_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """du_i = dp_i v_i,  dv_i = dp_i u_i; what arrives at the zeros ends there."""
    u, v = cache
    dp = dp[..., : u.shape[-1]]
    return dp * v, dp * u


def concatenation_forward(u: Array, v: Array) -> tuple[Array, int]:
    """p = [u ; v], then zeros: no product, each vector by itself."""
    r = u.shape[-1]
    return padded(np.concatenate([u, v], -1), r), r

def concatenation_backward(dp: Array, r: int) -> tuple[Array, Array]:
    """du and dv are the first and the second r numbers of dp."""
    return dp[..., :r], dp[..., r : 2 * r]


PRODUCTS = {  # forward, backward, how many coordinates a rank of r gives
    "wedge": (grassmann.plucker_forward, grassmann.plucker_backward, lambda r: r * (r - 1) // 2),
    "symmetric": (symmetric_forward, symmetric_backward, lambda r: r * (r - 1) // 2),
    "elementwise": (elementwise_forward, elementwise_backward, lambda r: r),
    "concatenation": (concatenation_forward, concatenation_backward, lambda r: 2 * r),
}

# ---- partners where words and lines end ----------------------------------------------------------

def ends(tokens: Array, gaps: Array) -> Array:
    """Where the last word (line) ended: for every t the latest e < t such that token e is no gap,
    token e+1 is one, and e+1 <= t, so that its end has been read; -1 where there is none; (B, L).
    """
    gap, e = gaps[tokens], np.full(tokens.shape, -1)
    e[:, 1:] = np.where(~gap[:, :-1] & gap[:, 1:], np.arange(tokens.shape[1] - 1), -1)
    return np.maximum.accumulate(e, 1)


def landmark_rows(tokens: Array, names: tuple[str, ...], vocab: list[int]) -> list[Array]:
    """For every landmark where it lies: rows (B, L) of z (B·L, r) below a row of zeros, for none.

    "word": the last character of the previous word (words are what whitespace separates), "second
    word": of the one before it, "line": of the previous line.
    """
    word = ends(tokens, np.array([chr(point).isspace() for point in vocab]))
    second = np.where(word < 0, -1, np.take_along_axis(word, word.clip(0), 1))
    e = {"word": word, "second word": second, "line": ends(tokens, np.array(vocab) == ord("\n"))}
    first = np.arange(len(tokens))[:, None] * tokens.shape[1]  # where in z each text's token 0 is
    return [np.where(e[name] < 0, 0, 1 + first + e[name]) for name in names]


def look_back_to(names: tuple[str, ...], vocab: list[int]) -> dict[str, Callable]:
    """The functions of a model whose layers have these landmarks e_k(t) as partners too:

        s_t = Σ_Δ w_Δ ⊙ z_{t-Δ} + Σ_k w_k ⊙ z_{e_k(t)},     dw_k = Σ_t ds_t ⊙ z_{e_k(t)},

    and w_k ⊙ ds_t goes back to z_{e_k(t)}. To gather those is to look up rows in a table, as an
    embedding does, and one place is the partner of many t, as one letter is many tokens. (For
    training and validation with taps and without normalisation; not for streaming.)
    """
    now = threading.local()
    shapes, model_forward = grassmann.param_shapes, grassmann.model_forward
    partner_forward, partner_backward = grassmann.partner_forward, grassmann.partner_backward

    def more_shapes(config: Config) -> dict[str, tuple[int, ...]]:
        return shapes(config) | {f"blocks.{i}.mix.taps": (len(layer) + len(names), config.rank)
                                 for i, layer in enumerate(config.offsets)}

    def with_landmarks(params, config, tokens, **how) -> tuple[Array, dict]:
        now.rows = landmark_rows(tokens, names, vocab)  # of the text that this thread works on
        return model_forward(params, config, tokens, **how)

    def forward(z, taps, offsets, normalize) -> tuple[Array, tuple]:
        m = len(offsets)
        s, c_offsets = partner_forward(z, taps[:m], offsets, normalize)
        table = np.concatenate([np.zeros_like(z[0, :1]), z.reshape(-1, z.shape[-1])])  # (1+B·L, r)
        found = [grassmann.embedding_forward(rows, table) for rows in now.rows]
        for weight, (q, _) in zip(taps[m:], found, strict=True):
            s += weight * q
        return s, (c_offsets, taps[m:], found)

    def backward(ds, cache) -> tuple[Array, Array]:
        c_offsets, weights, found = cache
        dz, dtaps = partner_backward(ds, c_offsets)
        for weight, (_, lookup) in zip(weights, found, strict=True):
            dz += grassmann.embedding_backward(weight * ds, lookup)[1:].reshape(dz.shape)
        return dz, np.concatenate([dtaps, [(ds * q).sum((0, 1)) for q, _ in found]])

    return {"param_shapes": more_shapes, "model_forward": with_landmarks,
            "partner_forward": forward, "partner_backward": backward}
