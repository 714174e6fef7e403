"""Mixers for the comparison: the rivals that a sceptic would ask for, and relatives of our layer.

`install` adds them to grassmann.MIXERS. Then Config(mixer="rotary attention with taps") is a model
like any other. Only "rotary attention" can write one token at a time. The others read whole texts.

    attention     with rotary positions; and with taps on its input (a short convolution)
    convolution   gated, at full width: (a ⊙ (b + taps(b))) W
    around them   our gate, or the average of the mixer and its input
    features      in place of the wedge and W_plu: z·x_k + s·y_k, the wedge with a plus,
                  all z_i s_j, and learned planes, (z ∧ s)·(x_k ∧ y_k)
    bivectors     multiplied by a constant; in the memory, where every token writes a plane
    hybrid        attention in one layer, our layer in the others
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import grassmann as G
from grassmann import Scope


class Op(NamedTuple):
    """Three functions with these arguments and results. An array u or v is (..., r).

    mixer      forward(h, w, config, layer) -> (out, cache),  backward(dout, cache) -> (dh, grads),
               shapes(config, layer)
    features   forward(z, s, w) -> (g, cache),  backward(dg, cache) -> (dz, ds, grads),
               shapes(d, r)
    product    forward(u, v) -> (p, cache),  backward(dp, cache) -> (du, dv),  size(r) of p
    """

    forward: Callable
    backward: Callable
    shapes: Callable


def linear_forward(x, w, name):
    """x W_name + b_name. The cache holds the name, too."""
    y, cache = G.linear_forward(x, w["W_" + name], w["b_" + name])
    return y, (name, cache)


def linear_backward(dy, cache, grads):
    """Returns dx, and adds the gradients of W_name and b_name to `grads`."""
    name, c_linear = cache
    dx, grads["W_" + name], grads["b_" + name] = G.linear_backward(dy, c_linear)
    return dx


def linear_shapes(name, n, m):
    return {"W_" + name: (n, m), "b_" + name: (m,)}


def look_back(z, w, config, layer):
    """s_t = Σ_Δ w_Δ ⊙ z_{t-Δ}, with the layer's taps."""
    return G.partner_forward(z, w["taps"], config.offsets[layer], False)


# ---- attention, with the additions that are usual today ------------------------------------------


def rotate(x, sign=1, start=0):
    """Rotary positions: pairs of coordinates of x (B, heads, L, d_k) turned by t times a frequency.

    So the score of two tokens depends on their distance. Each rotation is a rotor of R^{d_k}.
    Its backward is the rotation by the opposite angle, sign=-1. With odd d_k one coordinate has
    no partner. `start` is the position of the first token.
    """
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    t = np.arange(start, start + x.shape[2])[:, None]
    angles = t * frequencies  # (L, d_k / 2)
    cos = np.cos(angles).astype(x.dtype)
    sin = (sign * np.sin(angles)).astype(x.dtype)
    u, v, rest = np.split(x, [half, 2 * half], -1)
    turned_u = u * cos - v * sin
    turned_v = u * sin + v * cos
    return np.concatenate([turned_u, turned_v, rest], -1)


def rotary_forward(h, w, config, layer, past=None):
    """Causal attention with rotary positions."""
    B, L, d = h.shape
    start = past["k"].shape[2] if past else 0
    qkv, c_qkv = linear_forward(h, w, "qkv")
    qkv = qkv.reshape(B, L, 3, config.n_head, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, n_head, L, d_k) each
    q = rotate(q, start=start)
    k = rotate(k, start=start)
    heads, c_core = G.attention_core_forward(q, k, v, past)
    heads = heads.swapaxes(1, 2).reshape(B, L, d)
    out, c_out = linear_forward(heads, w, "out")
    return out, (c_qkv, c_core, c_out)


def rotary_backward(dout, cache):
    c_qkv, c_core, c_out = cache
    B, n_head, L, d_k = c_core[0].shape
    grads = {}
    dheads = linear_backward(dout, c_out, grads)
    dheads = dheads.reshape(B, L, n_head, d_k).swapaxes(1, 2)
    dq, dk, dv = G.attention_core_backward(dheads, c_core)
    dq = rotate(dq, -1)
    dk = rotate(dk, -1)
    dqkv = np.stack([dq, dk, dv])  # (3, B, n_head, L, d_k)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4)
    dqkv = dqkv.reshape(B, L, -1)
    return linear_backward(dqkv, c_qkv, grads), grads


def rotary_shapes(config, layer):
    d = config.d_model
    qkv = linear_shapes("qkv", d, 3 * d)
    return qkv | linear_shapes("out", d, d)


def with_taps(mixer):
    """The mixer, with a short convolution before it: it sees h + Σ_Δ w_Δ ⊙ h_{t-Δ}."""

    def forward(h, w, config, layer):
        s, c_taps = look_back(h, w, config, layer)
        out, c_mixer = mixer.forward(h + s, w, config, layer)
        return out, (c_taps, c_mixer)

    def backward(dout, cache):
        c_taps, c_mixer = cache
        dh, grads = mixer.backward(dout, c_mixer)
        dh_taps, grads["taps"] = G.partner_backward(dh, c_taps)
        return dh + dh_taps, grads

    def shapes(config, layer):
        own = {"taps": (len(config.offsets[layer]), config.d_model)}
        return own | mixer.shapes(config, layer)

    return Op(forward, backward, shapes)


# ---- a gated convolution -------------------------------------------------------------------------


def convolution_forward(h, w, config, layer):
    """[a b] = h W_in + b_in,  out = (a ⊙ (b + Σ_Δ w_Δ ⊙ b_{t-Δ})) W_out + b_out."""
    ab, c_in = linear_forward(h, w, "in")
    a, b = np.split(ab, 2, -1)
    s, c_taps = look_back(b, w, config, layer)
    s = b + s
    out, c_out = linear_forward(a * s, w, "out")
    return out, (a, s, c_in, c_taps, c_out)


def convolution_backward(dout, cache):
    """A factor's gradient is the product's gradient times the other factor. b is used twice."""
    a, s, c_in, c_taps, c_out = cache
    grads = {}
    dproduct = linear_backward(dout, c_out, grads)
    da = dproduct * s
    ds = dproduct * a
    db, grads["taps"] = G.partner_backward(ds, c_taps)
    dab = np.concatenate([da, ds + db], -1)
    return linear_backward(dab, c_in, grads), grads


def convolution_shapes(config, layer):
    d = config.d_model
    own = linear_shapes("in", d, 2 * d)
    own["taps"] = (len(config.offsets[layer]), d)
    return own | linear_shapes("out", d, d)


# ---- around another mixer ------------------------------------------------------------------------


def gate_shapes(d):
    return linear_shapes("gate", 2 * d, d)


def gated(mixer):
    """gate(h, mixer(h)), with our layer's gate."""

    def forward(h, w, config, layer):
        g, c_mixer = mixer.forward(h, w, config, layer)
        mix, c_gate = G.gate_forward(h, g, w["W_gate"], w["b_gate"])
        return mix, (c_mixer, c_gate)

    def backward(dmix, cache):
        c_mixer, c_gate = cache
        dh, dg, dW, db = G.gate_backward(dmix, c_gate)
        dh_mixer, grads = mixer.backward(dg, c_mixer)
        return dh + dh_mixer, grads | {"W_gate": dW, "b_gate": db}

    def shapes(config, layer):
        return mixer.shapes(config, layer) | gate_shapes(config.d_model)

    return Op(forward, backward, shapes)


def half(mixer):
    """(h + mixer(h)) / 2: a gate that always stays half open."""

    def forward(h, w, config, layer):
        out, cache = mixer.forward(h, w, config, layer)
        return (h + out) / 2, cache

    def backward(dmix, cache):
        dh, grads = mixer.backward(dmix / 2, cache)
        return dmix / 2 + dh, grads

    return Op(forward, backward, mixer.shapes)


# ---- features of z and its partner ---------------------------------------------------------------


def reduce_shapes(config, layer):
    r = config.rank
    own = linear_shapes("red", config.d_model, r)
    own["taps"] = (len(config.offsets[layer]), r)
    return own


def with_features(features, gate=True):
    """Our layer with other features: reduce, look back, features, gate. Without a gate, mix = g."""

    def forward(h, w, config, layer):
        z, c_red = linear_forward(h, w, "red")
        s, c_partner = look_back(z, w, config, layer)
        g, c_features = features.forward(z, s, w)
        return g, (c_red, c_partner, c_features)

    def backward(dg, cache):
        c_red, c_partner, c_features = cache
        dz, ds, grads = features.backward(dg, c_features)
        dz_partner, grads["taps"] = G.partner_backward(ds, c_partner)
        return linear_backward(dz + dz_partner, c_red, grads), grads

    def shapes(config, layer):
        d = config.d_model
        own = reduce_shapes(config, layer)
        if gate:
            own |= gate_shapes(d)
        return own | features.shapes(d, config.rank)

    mixer = Op(forward, backward, shapes)
    return gated(mixer)._replace(shapes=shapes) if gate else mixer


def projected(product):
    """g = p W_plu + b_plu, where p is a product of z and s. The wedge gives our layer."""

    def forward(z, s, w):
        p, c_product = product.forward(z, s)
        g, c_plu = linear_forward(p, w, "plu")
        return g, (c_product, c_plu)

    def backward(dg, cache):
        c_product, c_plu = cache
        grads = {}
        dp = linear_backward(dg, c_plu, grads)
        dz, ds = product.backward(dp, c_product)
        return dz, ds, grads

    def shapes(d, r):
        return linear_shapes("plu", product.shapes(r), d)

    return Op(forward, backward, shapes)


def outer_size(r):
    return r * r


def outer_forward(u, v):
    """p = vec(u vᵀ), (..., r²): all products u_i v_j."""
    p = u[..., :, None] * v[..., None, :]
    return p.reshape(*u.shape[:-1], -1), (u, v)


def outer_backward(dp, cache):
    """p_ij = u_i v_j: du_i = Σ_j dp_ij v_j, dv_j = Σ_i dp_ij u_i."""
    u, v = cache
    dp = dp.reshape(*u.shape, u.shape[-1])
    du = dp @ v[..., None]
    dv = u[..., None, :] @ dp
    return du[..., 0], dv[..., 0, :]


def wedge_size(r):
    return r * (r - 1) // 2


def symmetric_forward(u, v):
    """p_ij = u_i v_j + u_j v_i for i < j, (..., n): the wedge with a plus."""
    i, j = G.pairs(u.shape[-1])
    p = u[..., i] * v[..., j]
    p = p + u[..., j] * v[..., i]
    return p, (u, v)


def symmetric_backward(dp, cache):
    """With S_ij = S_ji = dp_ij and S_ii = 0, Σ dp_ij p_ij = Σ S_ij u_i v_j: outer products."""
    u, _ = cache
    r = u.shape[-1]
    i, j = G.pairs(r)
    S = np.zeros((*u.shape, r), dp.dtype)
    S[..., i, j] = dp
    S[..., j, i] = dp
    return outer_backward(S, cache)


def learned_shapes(d, r):
    """Two vectors x_k, y_k for every feature, which are columns of X and Y."""
    return {"X": (r, d), "Y": (r, d), "b_plu": (d,)}


def sum_forward(z, s, w):
    """g_k = z·x_k + s·y_k + b_k: no product, but one matrix for [z ; s]."""
    zs = np.concatenate([z, s], -1)
    XY = np.concatenate([w["X"], w["Y"]])
    return G.linear_forward(zs, XY, w["b_plu"])


def sum_backward(dg, cache):
    dzs, dXY, db = G.linear_backward(dg, cache)
    dz, ds = np.split(dzs, 2, -1)
    dX, dY = np.split(dXY, 2)
    return dz, ds, {"X": dX, "Y": dY, "b_plu": db}


def dots_forward(u, v, w):
    """(u·x_k)(v·y_k) for every k."""
    ux, c_u = G.linear_forward(u, w["X"], 0)
    vy, c_v = G.linear_forward(v, w["Y"], 0)
    return ux * vy, (ux, vy, c_u, c_v)


def dots_backward(dg, cache):
    ux, vy, c_u, c_v = cache
    du, dX, _ = G.linear_backward(dg * vy, c_u)
    dv, dY, _ = G.linear_backward(dg * ux, c_v)
    return du, dv, dX, dY


def learned_forward(z, s, w):
    """g_k = (z·x_k)(s·y_k) - (s·x_k)(z·y_k) + b_k.

    By Cauchy and Binet this is (z ∧ s)·(x_k ∧ y_k) + b_k. It is the paper's projection if every
    column of W_plu is itself a plane. The bivector is never built.
    """
    straight, c_straight = dots_forward(z, s, w)
    crossed, c_crossed = dots_forward(s, z, w)
    return straight - crossed + w["b_plu"], (c_straight, c_crossed)


def learned_backward(dg, cache):
    c_straight, c_crossed = cache
    dz_1, ds_1, dX_1, dY_1 = dots_backward(dg, c_straight)
    ds_2, dz_2, dX_2, dY_2 = dots_backward(-dg, c_crossed)
    dz = dz_1 + dz_2
    ds = ds_1 + ds_2
    dX = dX_1 + dX_2
    dY = dY_1 + dY_2
    db = dg.sum((0, 1))
    return dz, ds, {"X": dX, "Y": dY, "b_plu": db}


# ---- bivectors of another size, and a memory of bivectors ----------------------------------------


def rescaled(factor):
    """Our layer with its bivectors multiplied by a factor: (k p) W_plu is p (k W_plu)."""

    def forward(h, w, config, layer):
        own = {name: w[name] for name in G.mix_shapes(config, layer)}
        own["W_plu"] = factor * own["W_plu"]
        return G.mix_forward(h, Scope(own), config, layer)

    def backward(dmix, cache):
        dh, grads = G.mix_backward(dmix, cache)
        grads["W_plu"] = factor * grads["W_plu"]
        return dh, grads

    return Op(forward, backward, G.mix_shapes)


def contract(q, k, v):
    """q_t ⌟ Σ_{i<=t} k_i ∧ v_i, or Σ_{i<=t} [(q_t·k_i) v_i - (q_t·v_i) k_i]."""
    values, _ = G.associate(q, k, v)
    keys, _ = G.associate(q, v, k)
    return values - keys


def contract_later(*qkv):
    """`contract` with a sum over i >= t."""
    backwards = [x[:, ::-1] for x in qkv]
    return contract(*backwards)[:, ::-1]


def bivector_memory_forward(h, w, config, layer):
    """Our layer, with a memory in which every token writes the plane k ∧ v; z reads it.

    [k v] = h W_kv + b_kv,  k += s,   c_t = z_t ⌟ Σ_{i<=t} k_i ∧ v_i / sqrt(r t)
    mix = gate(h, g),   g = (z ∧ s) W_plu + b_plu + c W_mem
    """
    r = config.rank
    z, c_red = linear_forward(h, w, "red")
    s, c_partner = look_back(z, w, config, layer)
    g, c_wedge = WEDGE.forward(z, s, w)
    kv, c_kv = linear_forward(h, w, "kv")
    k = kv[..., :r] + s
    v = kv[..., r:]
    t = 1 + np.arange(h.shape[1])[:, None]
    scale = (1 / np.sqrt(r * t)).astype(z.dtype)
    c = contract(z, k, v) * scale
    g += c @ w["W_mem"]
    mix, c_gate = G.gate_forward(h, g, w["W_gate"], w["b_gate"])
    c_memory = z, k, v, c, scale, w["W_mem"]
    cache = c_red, c_partner, c_wedge, c_kv, c_gate, c_memory
    return mix, cache


def bivector_memory_backward(dmix, cache):
    """As in grassmann.memory_backward, each gradient is a `contract` with other arguments."""
    c_red, c_partner, c_wedge, c_kv, c_gate, c_memory = cache
    z, k, v, c, scale, W_mem = c_memory
    dh, dg, dW_gate, db_gate = G.gate_backward(dmix, c_gate)
    dz, ds, grads = WEDGE.backward(dg, c_wedge)
    grads |= {"W_gate": dW_gate, "b_gate": db_gate}
    rows = c.reshape(-1, len(W_mem))  # (B L, r)
    grads["W_mem"] = rows.T @ dg.reshape(-1, dg.shape[-1])
    dc = dg @ W_mem.T * scale
    dk = contract_later(v, dc, z)
    dv = contract_later(k, z, dc)
    dkv = np.concatenate([dk, dv], -1)
    dh = dh + linear_backward(dkv, c_kv, grads)
    dz_partner, grads["taps"] = G.partner_backward(ds + dk, c_partner)
    dz = dz + contract(dc, v, k) + dz_partner
    return dh + linear_backward(dz, c_red, grads), grads


def bivector_memory_shapes(config, layer):
    d = config.d_model
    r = config.rank
    own = reduce_shapes(config, layer)
    own |= linear_shapes("kv", d, 2 * r)
    own["W_mem"] = (r, d)
    own |= WEDGE.shapes(d, r)
    return own | gate_shapes(d)


# ---- all of them ---------------------------------------------------------------------------------


def in_layer(layer):
    """The hybrid's mixer: attention in the second layer, else ours."""
    return Op(*G.MIXERS[TAPPED if layer == 1 else "grassmann"])


def hybrid_forward(h, w, config, layer):
    mix, cache = in_layer(layer).forward(h, w, config, layer)
    return mix, (layer, cache)


def hybrid_backward(dmix, cache):
    layer, c_mixer = cache
    return in_layer(layer).backward(dmix, c_mixer)


def hybrid_shapes(config, layer):
    return in_layer(layer).shapes(config, layer)


TAPPED = "rotary attention with taps"
ROTARY = Op(rotary_forward, rotary_backward, rotary_shapes)
CONVOLUTION = Op(convolution_forward, convolution_backward, convolution_shapes)
WEDGE = projected(Op(G.plucker_forward, G.plucker_backward, wedge_size))
SYMMETRIC = projected(Op(symmetric_forward, symmetric_backward, wedge_size))
OUTER = projected(Op(outer_forward, outer_backward, outer_size))
SUM = Op(sum_forward, sum_backward, learned_shapes)
LEARNED = Op(learned_forward, learned_backward, learned_shapes)
BIVECTOR_MEMORY = Op(bivector_memory_forward, bivector_memory_backward, bivector_memory_shapes)
MIXERS = {
    "rotary attention": ROTARY,
    TAPPED: with_taps(ROTARY),
    f"{TAPPED} and a shortcut": half(with_taps(ROTARY)),
    f"{TAPPED} and our gate": gated(with_taps(ROTARY)),
    "gated convolution": CONVOLUTION,
    "gated convolution with our gate": gated(CONVOLUTION),
    # its parameters in our layer's order get our layer's first weights
    "symmetric product": with_features(SYMMETRIC)._replace(shapes=G.mix_shapes),
    "outer product": with_features(OUTER),
    "sum": with_features(SUM),
    "learned planes": with_features(LEARNED),
    "wedge without a gate": with_features(WEDGE, gate=False),
    "wedge with a shortcut": half(with_features(WEDGE, gate=False)),
    "rescaled by 15": rescaled(15),
    "rescaled by 31": rescaled(31),
    "rescaled by 38": rescaled(38),
    "rescaled by 76": rescaled(76),
    "bivector memory": BIVECTOR_MEMORY,
    "hybrid": Op(hybrid_forward, hybrid_backward, hybrid_shapes),
}


def reads_whole(mixer):
    """The mixer, which keeps no `past`. One token at a time raises UserError."""

    def forward(h, w, config, layer, past=None):
        G.require(past is None, f"{config.mixer} is for comparison only: it reads texts whole")
        return mixer.forward(h, w, config, layer)

    return mixer._replace(forward=forward)


def install():
    """Add the mixers to grassmann.MIXERS, where Config looks."""
    for name, mixer in MIXERS.items():
        if mixer is not ROTARY:
            mixer = reads_whole(mixer)
        G.MIXERS[name] = mixer


def scale_features(params):
    """Rescale X and Y to N(0, 0.2/r), in place.

    Sums are then as large as the wedge's features. Products of two dot products are at most half
    as large.
    """
    for name, value in params.items():
        if name.split(".")[-1] in ("X", "Y"):
            value *= math.sqrt(0.2 / len(value)) / 0.02
