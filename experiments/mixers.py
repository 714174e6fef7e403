"""Mixers for the comparison: the rivals that a sceptic would ask for, and relatives of the Grassmann layer.

Each mixer is a triple (forward, backward, shapes) as in grassmann.MIXERS, with its backward by hand. `install`
adds them to grassmann.MIXERS, so that Config(mixer="rotary attention with taps") is a model like any other.
Only "rotary attention" can write one token at a time. The other mixers read whole texts.

    attention     with rotary positions; and with learned taps on its input (a short convolution)
    convolution   gated, at full width: (a ⊙ (b + taps(b))) W; our gate, or half of h, around either
    features      of z and its partner s in place of the wedge and W_plu: the sum z·x_k + s·y_k, the wedge with a plus,
                  all z_i s_j, and learned planes, (z ∧ s)·(x_k ∧ y_k); without a gate
    bivectors     multiplied by a constant; in the memory, where every token writes a plane
    hybrid        attention in one layer, the Grassmann layer in the others
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import grassmann as G
from grassmann import Array, Config, Params, Scope

Shapes = dict[str, tuple[int, ...]]

# ---- attention, with the additions that are usual today --------------------------------------------


def rotate(x: Array, sign: int = 1, start: int = 0) -> Array:
    """Rotary positions: pairs of coordinates of x (B, heads, L, d_k) turned by t times their frequency.

    A rotary position is a rotor: the rotation of R^{d_k} that moves token t. Its backward is the rotation by the opposite
    angle, sign=-1. The score of two tokens then depends on their distance. `start` is the position of the first.
    """
    half = x.shape[-1] // 2
    angles = np.arange(start, start + x.shape[2])[:, None] * 10000.0 ** (
        -np.arange(half) / half
    )  # (L, d_k / 2)
    cos, sin = np.cos(angles).astype(x.dtype), (sign * np.sin(angles)).astype(x.dtype)
    u, v, odd_one = np.split(
        x, [half, 2 * half], -1
    )  # (with odd d_k one coordinate has no partner)
    return np.concatenate([u * cos - v * sin, u * sin + v * cos, odd_one], -1)


def rotary_attention(taps: bool) -> tuple:
    """Causal attention with rotary positions, on h or, with taps, on h + Σ_Δ w_Δ ⊙ h_{t-Δ}."""

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        cache = {}
        if taps:
            s, cache["taps"] = G.partner_forward(h, w["taps"], config.offsets[layer], False)
            h = h + s
        (B, L, d), start = h.shape, past["k"].shape[2] if past else 0
        qkv, cache["qkv"] = G.linear_forward(h, w["W_qkv"], w["b_qkv"])
        q, k, v = qkv.reshape(B, L, 3, config.n_head, -1).transpose(
            2, 0, 3, 1, 4
        )  # (B, n_head, L, d_k)
        heads, cache["core"] = G.attention_core_forward(
            rotate(q, start=start), rotate(k, start=start), v, past
        )
        out, cache["out"] = G.linear_forward(
            heads.swapaxes(1, 2).reshape(B, L, d), w["W_out"], w["b_out"]
        )
        return out, cache

    def backward(dout: Array, cache: dict) -> tuple[Array, Params]:
        grads, (B, n_head, L, d_k) = {}, cache["core"][0].shape
        dheads, grads["W_out"], grads["b_out"] = G.linear_backward(dout, cache["out"])
        dheads = dheads.reshape(B, L, n_head, d_k).swapaxes(1, 2)
        dq, dk, dv = G.attention_core_backward(dheads, cache["core"])
        dqkv = (
            np.stack([rotate(dq, -1), rotate(dk, -1), dv])
            .transpose(1, 3, 0, 2, 4)
            .reshape(B, L, -1)
        )
        dh, grads["W_qkv"], grads["b_qkv"] = G.linear_backward(dqkv, cache["qkv"])
        if taps:
            dh_taps, grads["taps"] = G.partner_backward(dh, cache["taps"])
            dh = dh + dh_taps
        return dh, grads

    def shapes(config: Config, layer: int) -> Shapes:
        own = {"taps": (len(config.offsets[layer]), config.d_model)} if taps else {}
        return own | G.attention_shapes(config, layer)

    return forward, backward, shapes


# ---- a gated convolution ---------------------------------------------------------------------------


def convolution_forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple:
    """[a b] = h W_in + b_in,  out = (a ⊙ (b + Σ_Δ w_Δ ⊙ b_{t-Δ})) W_out + b_out; no softmax, no wedge."""
    ab, c_in = G.linear_forward(h, w["W_in"], w["b_in"])
    a, b = np.split(ab, 2, -1)
    s, c_taps = G.partner_forward(b, w["taps"], config.offsets[layer], False)
    s = b + s
    out, c_out = G.linear_forward(a * s, w["W_out"], w["b_out"])
    return out, {"in": c_in, "taps": c_taps, "out": c_out, "a": a, "s": s}


def convolution_backward(dout: Array, cache: dict) -> tuple[Array, Params]:
    """A factor's gradient is the product's gradient times the other factor. b acts directly and through the taps."""
    grads = {}
    dproduct, grads["W_out"], grads["b_out"] = G.linear_backward(dout, cache["out"])
    da, ds = dproduct * cache["s"], dproduct * cache["a"]
    db, grads["taps"] = G.partner_backward(ds, cache["taps"])
    dh, grads["W_in"], grads["b_in"] = G.linear_backward(
        np.concatenate([da, ds + db], -1), cache["in"]
    )
    return dh, grads


def convolution_shapes(config: Config, layer: int) -> Shapes:
    d, m = config.d_model, len(config.offsets[layer])
    return {"W_in": (d, 2 * d), "b_in": (2 * d,), "taps": (m, d), "W_out": (d, d), "b_out": (d,)}


# ---- our gate around another mixer -------------------------------------------------------------------


def gated(mixer: tuple) -> tuple:
    """mix = gate(h, mixer(h)): our layer without its reduction and its wedge."""
    inner_forward, inner_backward, inner_shapes = mixer

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        g, c_inner = inner_forward(h, w, config, layer)
        mix, c_gate = G.gate_forward(h, g, w["W_gate"], w["b_gate"])
        return mix, {"inner": c_inner, "gate": c_gate}

    def backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
        dh, dg, dW, db = G.gate_backward(dmix, cache["gate"])
        dh_inner, grads = inner_backward(dg, cache["inner"])
        return dh + dh_inner, grads | {"W_gate": dW, "b_gate": db}

    def shapes(config: Config, layer: int) -> Shapes:
        d = config.d_model
        return inner_shapes(config, layer) | {"W_gate": (2 * d, d), "b_gate": (d,)}

    return forward, backward, shapes


def half(mixer: tuple) -> tuple:
    """mix = (h + mixer(h)) / 2: the shortcut of a gate that always stays half open."""
    inner_forward, inner_backward, shapes = mixer

    def forward(h: Array, *where) -> tuple[Array, dict]:
        out, cache = inner_forward(h, *where)
        return (h + out) / 2, cache

    def backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
        dh, grads = inner_backward(dmix / 2, cache)
        return dmix / 2 + dh, grads

    return forward, backward, shapes


# ---- features of z and its partner -----------------------------------------------------------------


def with_features(features: tuple, gate: bool = True) -> tuple:
    """The Grassmann layer with other features: reduce, look back, features, gate. Without a gate, mix = g.

    `features` is a triple: forward(z, s, w) -> (g, cache), backward(dg, cache) -> (dz, ds, grads), shapes(d, r).
    """
    features_forward, features_backward, features_shapes = features

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, tuple]:
        z, c_red = G.linear_forward(h, w["W_red"], w["b_red"])
        s, c_partner = G.partner_forward(z, w["taps"], config.offsets[layer], False)
        g, c_features = features_forward(z, s, w)
        return g, (c_red, c_partner, c_features)

    def backward(dg: Array, cache: tuple) -> tuple[Array, Params]:
        c_red, c_partner, c_features = cache
        dz, ds, grads = features_backward(dg, c_features)
        dz_partner, grads["taps"] = G.partner_backward(ds, c_partner)
        dh, grads["W_red"], grads["b_red"] = G.linear_backward(dz + dz_partner, c_red)
        return dh, grads

    def shapes(config: Config, layer: int) -> Shapes:
        d, r = config.d_model, config.rank
        own = {"W_red": (d, r), "b_red": (r,), "taps": (len(config.offsets[layer]), r)}
        own |= {"W_gate": (2 * d, d), "b_gate": (d,)} if gate else {}
        return own | features_shapes(d, r)

    return (*(gated((forward, backward, shapes)) if gate else (forward, backward))[:2], shapes)


def projected(
    product_forward: Callable, product_backward: Callable, coordinates: Callable[[int], int]
) -> tuple:
    """Features g = p W_plu + b_plu of a product p of z and s with coordinates(r) numbers. The wedge gives our layer."""

    def forward(z: Array, s: Array, w: Scope) -> tuple:
        p, c_product = product_forward(z, s)
        g, c_plu = G.linear_forward(p, w["W_plu"], w["b_plu"])
        return g, (c_product, c_plu)

    def backward(dg: Array, cache: tuple) -> tuple:
        c_product, c_plu = cache
        dp, dW, db = G.linear_backward(dg, c_plu)
        return *product_backward(dp, c_product), {"W_plu": dW, "b_plu": db}

    return forward, backward, lambda d, r: {"W_plu": (coordinates(r), d), "b_plu": (d,)}


def outer_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """p = vec(u vᵀ), (..., r²): all products u_i v_j."""
    return (u[..., :, None] * v[..., None, :]).reshape(*u.shape[:-1], -1), (u, v)


def outer_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """p_ij = u_i v_j: du_i = Σ_j dp_ij v_j, dv_j = Σ_i dp_ij u_i."""
    u, v = cache
    dp = dp.reshape(*u.shape, u.shape[-1])
    return (dp @ v[..., None])[..., 0], (u[..., None, :] @ dp)[..., 0, :]


def symmetric_forward(u: Array, v: Array) -> tuple[Array, tuple]:
    """p_ij = u_i v_j + u_j v_i for i < j, (..., n): the wedge with a plus."""
    i, j = G.pairs(u.shape[-1])
    return u[..., i] * v[..., j] + u[..., j] * v[..., i], (u, v)


def symmetric_backward(dp: Array, cache: tuple) -> tuple[Array, Array]:
    """With S_ij = S_ji = dp_ij and S_ii = 0, Σ dp_ij p_ij = Σ S_ij u_i v_j, a sum of outer products."""
    (i, j), S = G.pairs(r := cache[0].shape[-1]), np.zeros((*cache[0].shape, r), dp.dtype)
    S[..., i, j] = S[..., j, i] = dp
    return outer_backward(S, cache)


def learned_shapes(
    d: int, r: int
) -> Shapes:  # two vectors x_k, y_k for every feature, columns of X and Y
    return {"X": (r, d), "Y": (r, d), "b_plu": (d,)}


def sum_forward(z: Array, s: Array, w: Scope) -> tuple:
    """g_k = z·x_k + s·y_k + b_k: no product, but one matrix for [z ; s]."""
    return G.linear_forward(
        np.concatenate([z, s], -1), np.concatenate([w["X"], w["Y"]]), w["b_plu"]
    )


def sum_backward(dg: Array, cache: tuple) -> tuple:
    dzs, dXY, db = G.linear_backward(dg, cache)
    dX, dY = np.split(dXY, 2)
    return *np.split(dzs, 2, -1), {"X": dX, "Y": dY, "b_plu": db}


def dots(u: Array, v: Array, w: Scope) -> tuple:  # (u·x_k)(v·y_k) for every k
    (ux, c_u), (vy, c_v) = G.linear_forward(u, w["X"], 0), G.linear_forward(v, w["Y"], 0)
    return ux * vy, (ux, vy, c_u, c_v)


def dots_backward(dg: Array, cache: tuple) -> tuple:
    ux, vy, c_u, c_v = cache
    (du, dX, _), (dv, dY, _) = G.linear_backward(dg * vy, c_u), G.linear_backward(dg * ux, c_v)
    return du, dv, dX, dY


def learned_forward(z: Array, s: Array, w: Scope) -> tuple:
    """g_k = (z·x_k)(s·y_k) - (s·x_k)(z·y_k) + b_k. By Cauchy and Binet this is (z ∧ s)·(x_k ∧ y_k) + b_k, the paper's
    projection if every column of W_plu is itself a plane. The bivector is never built."""
    (g, cache), (exchanged, c_exchanged) = dots(z, s, w), dots(s, z, w)
    return g - exchanged + w["b_plu"], (cache, c_exchanged)


def learned_backward(dg: Array, caches: tuple) -> tuple:
    (dz, ds, dX, dY), (ds_x, dz_y, dX_s, dY_z) = (
        dots_backward(dg, caches[0]),
        dots_backward(-dg, caches[1]),
    )
    return dz + dz_y, ds + ds_x, {"X": dX + dX_s, "Y": dY + dY_z, "b_plu": dg.sum((0, 1))}


# ---- bivectors of another size, and a memory of bivectors ------------------------------------------


def rescaled(factor: float) -> tuple:
    """The Grassmann layer with its bivectors multiplied by a factor: (k p) W_plu is p (k W_plu)."""

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        own = {name: w[name] for name in G.mix_shapes(config, layer)}
        return G.mix_forward(h, Scope(own | {"W_plu": factor * own["W_plu"]}), config, layer, past)

    def backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
        dh, grads = G.mix_backward(dmix, cache)
        return dh, grads | {"W_plu": factor * grads["W_plu"]}

    return forward, backward, G.mix_shapes


def contract(q: Array, k: Array, v: Array, M: None = None) -> tuple[Array, None]:
    """q_t ⌟ Σ_{i<=t} k_i ∧ v_i = Σ_{i<=t} [(q_t·k_i) v_i - (q_t·v_i) k_i]: the memory, antisymmetrised."""
    return G.associate(q, k, v)[0] - G.associate(q, v, k)[0], None


# ---- all of them -----------------------------------------------------------------------------------


def of_hybrid(layer: int) -> tuple:  # in layer 1 attention, else ours
    return G.MIXERS["rotary attention with taps" if layer == 1 else "grassmann"]


def hybrid_forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
    mix, cache = of_hybrid(layer)[0](h, w, config, layer, past)
    return mix, cache | {"layer": layer}


def hybrid_backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
    return of_hybrid(cache["layer"])[1](dmix, cache)


def reads_whole(mixer: tuple) -> tuple:
    """The mixer, which keeps no `past`, with a check: one token at a time raises UserError."""
    forward, *others = mixer

    def whole(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        G.require(past is None, f"{config.mixer} is for comparison only: it reads texts whole")
        return forward(h, w, config, layer)

    return whole, *others


WEDGE, SYMMETRIC = (
    projected(*product, lambda r: r * (r - 1) // 2)
    for product in (
        (G.plucker_forward, G.plucker_backward),
        (symmetric_forward, symmetric_backward),
    )
)
CONVOLUTION = convolution_forward, convolution_backward, convolution_shapes
MIXERS = {
    "rotary attention": rotary_attention(taps=False),
    "rotary attention with taps": rotary_attention(taps=True),
    "rotary attention with taps and a shortcut": half(rotary_attention(taps=True)),
    "rotary attention with taps and our gate": gated(rotary_attention(taps=True)),
    "gated convolution": CONVOLUTION,
    "gated convolution with our gate": gated(CONVOLUTION),
    "symmetric product": (
        *with_features(SYMMETRIC)[:2],
        G.mix_shapes,
    ),  # in the layer's order: the same first weights
    "outer product": with_features(projected(outer_forward, outer_backward, lambda r: r * r)),
    "sum": with_features((sum_forward, sum_backward, learned_shapes)),
    "learned planes": with_features((learned_forward, learned_backward, learned_shapes)),
    "wedge without a gate": with_features(WEDGE, gate=False),
    "wedge with a shortcut": half(with_features(WEDGE, gate=False)),
    "rescaled by 31": rescaled(31),
    "rescaled by 76": rescaled(76),
    "bivector memory": (
        lambda h, w, c, *rest: G.mix_forward(h, w, replace(c, memory=True), *rest, read=contract),
        G.mix_backward,
        lambda c, layer: G.mix_shapes(replace(c, memory=True), layer),
    ),
    "hybrid": (
        hybrid_forward,
        hybrid_backward,
        lambda config, layer: of_hybrid(layer)[2](config, layer),
    ),
}


def install() -> None:
    """Add the mixers to grassmann.MIXERS, where Config looks."""
    G.MIXERS.update(
        {
            name: mixer if name == "rotary attention" else reads_whole(mixer)
            for name, mixer in MIXERS.items()
        }
    )


def scale_features(params: Params) -> None:
    """Rescale X and Y to N(0, 0.2/r), in place. Sums are then as large as the features of the wedge; products of two
    dot products are at most half as large."""
    for name, value in params.items():
        if name.split(".")[-1] in ("X", "Y"):
            value *= math.sqrt(0.2 / len(value)) / 0.02
