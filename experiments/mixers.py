"""Mixers for the comparison: what a sceptic would put beside the Grassmann layer, and its relatives.

Each is a triple (forward, backward, shapes) as in grassmann.MIXERS, every backward by hand. `install`
puts them there, so that Config(mixer="rotary attention with taps") is a model like any other. All but
"rotary attention" read texts whole and cannot write one token at a time.

    attention     with rotary positions; and with learned taps on its input (a short convolution)
    convolution   gated, at full width: (a ⊙ (b + taps(b))) W
    gate          our gate around either of the two
    features      of z and its partner s in place of the wedge and W_plu: the sum z·x_k + s·y_k,
                  an MLP on [z ; s], all products z_i s_j, the one-sided product (z·x_k)(s·y_k), and
                  learned planes, (z ∧ s)·(x_k ∧ y_k), of grade 2 and 3 and their sums, the rotation
                  in the plane of z and s; without a gate
    memories      the Grassmann layer with a second memory that forgets, and with linear attention
    hybrid        attention in one layer, the Grassmann layer in the others
"""

from __future__ import annotations

import math

import numpy as np

import grassmann as G
from grassmann import Array, Config, Params, Scope

Shapes = dict[str, tuple[int, ...]]

# ---- attention, with what a reader of today expects -----------------------------------------------

def rotate(x: Array, sign: int = 1, start: int = 0) -> Array:
    """Rotary positions: pairs of coordinates of x (B, heads, L, d_h) turned by t times their frequency.

    A rotary position is a rotor: the rotation of R^{d_h} that moves token t. Its backward is the
    rotation by the opposite angle, sign=-1. The score of two tokens then depends on their distance.
    `start` is the position of the first.
    """
    half = x.shape[-1] // 2
    angles = np.arange(start, start + x.shape[2])[:, None] * 10000.0 ** (-np.arange(half) / half)  # (L, d_h / 2)
    cos, sin = np.cos(angles).astype(x.dtype), (sign * np.sin(angles)).astype(x.dtype)
    u, v, odd_one = np.split(x, [half, 2 * half], -1)  # (an odd d_h has one without a partner)
    return np.concatenate([u * cos - v * sin, u * sin + v * cos, odd_one], -1)

def rotary_attention(taps: bool) -> tuple:
    """Causal attention with rotary positions, on h or (taps) on h + Σ_Δ w_Δ ⊙ h_{t-Δ}."""

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        cache = {}
        if taps:
            s, cache["taps"] = G.partner_forward(h, w["taps"], config.offsets[layer], False)
            h = h + s
        (B, L, d), n_head = h.shape, config.n_head
        qkv, cache["qkv"] = G.linear_forward(h, w["W_qkv"], w["b_qkv"])
        q, k, v = qkv.reshape(B, L, 3, n_head, -1).transpose(2, 0, 3, 1, 4)  # (B, n_head, L, d_h)
        start = past["k"].shape[2] if past else 0
        q, k = rotate(q, start=start), rotate(k, start=start)
        if past is not None:
            if past:
                k, v = np.concatenate([past["k"], k], 2), np.concatenate([past["v"], v], 2)
            past["k"], past["v"] = k, v
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(d // n_head)
        np.copyto(scores, -np.inf, where=~np.tri(L, k.shape[2], start, dtype=bool))
        a = np.exp(scores - scores.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        heads = (a @ v).swapaxes(1, 2).reshape(B, L, d)
        out, cache["out"] = G.linear_forward(heads, w["W_out"], w["b_out"])
        return out, cache | {"q": q, "k": k, "v": v, "a": a}

    def backward(dout: Array, cache: dict) -> tuple[Array, Params]:
        q, k, v, a = (cache[name] for name in "qkva")
        B, n_head, L, d_h = q.shape
        grads = {}
        dheads, grads["W_out"], grads["b_out"] = G.linear_backward(dout, cache["out"])
        do = dheads.reshape(B, L, n_head, d_h).swapaxes(1, 2)
        da, dv = do @ v.swapaxes(-1, -2), a.swapaxes(-1, -2) @ do
        dscores = a * (da - G.dot(a, da)) / math.sqrt(d_h)
        dq, dk = dscores @ k, dscores.swapaxes(-1, -2) @ q
        dq, dk = rotate(dq, -1), rotate(dk, -1)
        dqkv = np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B, L, -1)
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
    """A product passes each factor the gradient times the other; b is met directly and in the taps."""
    grads = {}
    dproduct, grads["W_out"], grads["b_out"] = G.linear_backward(dout, cache["out"])
    da, ds = dproduct * cache["s"], dproduct * cache["a"]
    db, grads["taps"] = G.partner_backward(ds, cache["taps"])
    dh, grads["W_in"], grads["b_in"] = G.linear_backward(np.concatenate([da, ds + db], -1), cache["in"])
    return dh, grads

def convolution_shapes(config: Config, layer: int) -> Shapes:
    d = config.d_model
    return {"W_in": (d, 2 * d), "b_in": (2 * d,), "taps": (len(config.offsets[layer]), d),
            "W_out": (d, d), "b_out": (d,)}

# ---- our gate around another mixer -------------------------------------------------------------------

def gated(mixer: tuple) -> tuple:
    """mix = gate(h, mixer(h)): what is ours but for the reduction and the wedge."""
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

# ---- features of z and its partner -----------------------------------------------------------------

def with_features(
    features: tuple, n_partners: int = 1, gate: bool = True, memories: tuple = (), planes: bool = True
) -> tuple:
    """The Grassmann layer with other features: reduce, look back, features, gate (or none: mix = g).

    `features` is a triple: forward(z, partners, w) -> (g, cache), backward(dg, cache) -> (dz,
    dpartners, grads), shapes(d, r). A second partner has taps of its own, second.taps. `memories`: with as
    many of `recall_forward`, each with its decay, of planes or not.
    """
    features_forward, features_backward, features_shapes = features
    names = ["taps", "second.taps"][:n_partners]

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        z, c_red = G.linear_forward(h, w["W_red"], w["b_red"])
        found = [G.partner_forward(z, w[name], config.offsets[layer], False) for name in names]
        g, c_features = features_forward(z, [s for s, _ in found], w)
        cache = {"red": c_red, "partners": [c for _, c in found], "features": c_features, "memories": []}
        for k, decay in enumerate(memories):
            m, c_memory = recall_forward(h, z, w.scope(f"memory {k}."), decay, planes)
            g = g + m
            cache["memories"].append(c_memory)
        if gate:
            g, cache["gate"] = G.gate_forward(h, g, w["W_gate"], w["b_gate"])
        return g, cache

    def backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
        dh, dg, gate_grads = 0, dmix, {}
        if gate:
            dh, dg, gate_grads["W_gate"], gate_grads["b_gate"] = G.gate_backward(dmix, cache["gate"])
        dz, dpartners, grads = features_backward(dg, cache["features"])
        for k, c_memory in enumerate(cache["memories"]):
            dh_memory, dz_memory, own = recall_backward(dg, c_memory)
            dh, dz, grads = dh + dh_memory, dz + dz_memory, grads | G.prefixed(f"memory {k}.", own)
        for name, ds, c_partner in zip(names, dpartners, cache["partners"], strict=True):
            dz_partner, grads[name] = G.partner_backward(ds, c_partner)
            dz = dz + dz_partner
        dh_red, grads["W_red"], grads["b_red"] = G.linear_backward(dz, cache["red"])
        return dh + dh_red, grads | gate_grads

    def shapes(config: Config, layer: int) -> Shapes:
        d, r, m = config.d_model, config.rank, len(config.offsets[layer])
        own = {"W_red": (d, r), "b_red": (r,)} | dict.fromkeys(names, (m, r))
        own |= {"W_gate": (2 * d, d), "b_gate": (d,)} if gate else {}
        memory = {"W_ab": (d, 2 * r), "b_ab": (2 * r,), "W_mem": (r, d)}
        for k in range(len(memories)):
            own |= G.prefixed(f"memory {k}.", memory)
        return own | features_shapes(d, r)

    return forward, backward, shapes

def wedge_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g = (z ∧ s) W_plu + b_plu, the layer's own."""
    p, c_wedge = G.plucker_forward(z, *partners)
    g, c_plu = G.linear_forward(p, w["W_plu"], w["b_plu"])
    return g, (c_wedge, c_plu)

def wedge_backward(dg: Array, cache: tuple) -> tuple:
    c_wedge, c_plu = cache
    dp, dW, db = G.linear_backward(dg, c_plu)
    dz, ds = G.plucker_backward(dp, c_wedge)
    return dz, [ds], {"W_plu": dW, "b_plu": db}

def wedge_shapes(d: int, r: int) -> Shapes:
    return {"W_plu": (r * (r - 1) // 2, d), "b_plu": (d,)}

def mlp_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g = GELU([z ; s] W_1 + b_1) W_2 + b_2: no product of the two at all."""
    return G.ffn_forward(np.concatenate([z, *partners], -1), w.scope("mlp."))

def mlp_backward(dg: Array, cache: tuple) -> tuple:
    dzs, grads = G.ffn_backward(dg, cache)
    dz, ds = np.split(dzs, 2, -1)
    return dz, [ds], G.prefixed("mlp.", grads)

def mlp_shapes(d: int, r: int) -> Shapes:
    inner = r * (r - 1) // 2 * d // (2 * r + d)  # as many weights as W_plu has
    return {"mlp.W_1": (2 * r, inner), "mlp.b_1": (inner,), "mlp.W_2": (inner, d), "mlp.b_2": (d,)}

def outer_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g = vec(z sᵀ) W_plu + b_plu: all r² products, the symmetric ones and the wedge's."""
    (s,) = partners
    p = (z[..., :, None] * s[..., None, :]).reshape(*z.shape[:-1], -1)
    g, c_plu = G.linear_forward(p, w["W_plu"], w["b_plu"])
    return g, (z, s, c_plu)

def outer_backward(dg: Array, cache: tuple) -> tuple:
    """p_ij = z_i s_j: dz_i = Σ_j dp_ij s_j, ds_j = Σ_i dp_ij z_i."""
    z, s, c_plu = cache
    dp, dW, db = G.linear_backward(dg, c_plu)
    dp = dp.reshape(*z.shape, z.shape[-1])
    dz, ds = (dp @ s[..., None])[..., 0], (z[..., None, :] @ dp)[..., 0, :]
    return dz, [ds], {"W_plu": dW, "b_plu": db}

def outer_shapes(d: int, r: int) -> Shapes:
    return {"W_plu": (r * r, d), "b_plu": (d,)}

def dots_forward(vectors: list[Array], learned: list[Array]) -> list[list[Array]]:
    """M[a][c] = vectors[a] X_c, each (B, L, d): the dot products of one with learned vectors."""
    return [[(v.reshape(-1, v.shape[-1]) @ X).reshape(*v.shape[:-1], -1) for X in learned] for v in vectors]

def dots_backward(dM: list[list[Array]], vectors: list[Array], learned: list[Array]) -> tuple:
    """dvectors[a] = Σ_c dM[a][c] X_cᵀ, dX_c = Σ_a vectors[a]ᵀ dM[a][c]."""
    rows = [v.reshape(-1, v.shape[-1]) for v in vectors]
    dM = [[m.reshape(-1, m.shape[-1]) for m in line] for line in dM]
    dvectors = [sum(m @ X.T for m, X in zip(line, learned, strict=True)).reshape(v.shape)
                for line, v in zip(dM, vectors, strict=True)]
    return dvectors, [sum(v.T @ line[c] for v, line in zip(rows, dM, strict=True)) for c in range(len(learned))]

def determinant(M: list[list[Array]]) -> Array:
    """Of a k x k table of arrays, by its first row."""
    if len(M) == 1:
        return M[0][0]
    minors = [[row[:c] + row[c + 1 :] for row in M[1:]] for c in range(len(M))]
    return sum((-1) ** c * M[0][c] * determinant(minors[c]) for c in range(len(M)))

LEARNED = ["X", "Y", "Z"]  # (r, d) each, a vector for every feature

def blades(grade: int) -> tuple:
    """Learned planes, or blades of higher grade: g_k = det of the dot products of (z, s, …) with (x_k, y_k, …).

    By Cauchy and Binet (z ∧ s)·(x ∧ y) = (z·x)(s·y) - (z·y)(s·x): the paper's projection with every
    column of W_plu itself a plane. The bivector is never built.
    """
    names = LEARNED[:grade]

    def forward(z: Array, partners: list[Array], w: Scope) -> tuple:
        vectors, learned = [z, *partners], [w[name] for name in names]
        M = dots_forward(vectors, learned)
        return determinant(M) + w["b_plu"], (M, vectors, learned)

    def backward(dg: Array, cache: tuple) -> tuple:
        """∂det/∂M_ac is the cofactor: the determinant without row a and column c, with its sign."""
        M, vectors, learned = cache

        def cofactor(a: int, c: int) -> Array:
            rest = [row[:c] + row[c + 1 :] for row in M[:a] + M[a + 1 :]]
            return (-1) ** (a + c) * determinant(rest)

        dM = [[dg * cofactor(a, c) for c in range(grade)] for a in range(grade)]
        (dz, *dpartners), dlearned = dots_backward(dM, vectors, learned)
        return dz, dpartners, dict(zip(names, dlearned, strict=True)) | {"b_plu": dg.sum((0, 1))}

    def shapes(d: int, r: int) -> Shapes:
        return dict.fromkeys(names, (r, d)) | {"b_plu": (d,)}

    return forward, backward, shapes

def scalar_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g = (z·s) c + b: grade 0, all that the geometric product z s = z·s + z ∧ s has beside the plane."""
    product = G.dot(z, partners[0])  # (B, L, 1)
    return product * w["c"] + w["b_plu"], (z, partners[0], product, w["c"])

def scalar_backward(dg: Array, cache: tuple) -> tuple:
    z, s, product, c = cache
    dproduct = G.dot(dg, np.broadcast_to(c, dg.shape))
    return dproduct * s, [dproduct * z], {"c": (dg * product).sum((0, 1))[None], "b_plu": dg.sum((0, 1))}

SCALAR = (scalar_forward, scalar_backward, lambda d, r: {"c": (1, d), "b_plu": (d,)})

def both(first: tuple, second: tuple) -> tuple:
    """The sum of two kinds of features of z and its partners, of which the first kind sees only one."""

    def forward(z: Array, partners: list[Array], w: Scope) -> tuple:
        g_1, c_1 = first[0](z, partners[:1], w.scope("1."))
        g_2, c_2 = second[0](z, partners, w.scope("2."))
        return g_1 + g_2, (c_1, c_2)

    def backward(dg: Array, cache: tuple) -> tuple:
        dz_1, (ds_1,), grads_1 = first[1](dg, cache[0])
        dz_2, (ds_2, *others), grads_2 = second[1](dg, cache[1])
        return dz_1 + dz_2, [ds_1 + ds_2, *others], G.prefixed("1.", grads_1) | G.prefixed("2.", grads_2)

    def shapes(d: int, r: int) -> Shapes:
        return G.prefixed("1.", first[2](d, r)) | G.prefixed("2.", second[2](d, r))

    return forward, backward, shapes

def one_sided_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g_k = (z·x_k)(s·y_k) + b_k: one product of the determinant's two."""
    (zx, c_z), (sy, c_s) = G.linear_forward(z, w["X"], 0), G.linear_forward(partners[0], w["Y"], 0)
    return zx * sy + w["b_plu"], (zx, sy, c_z, c_s)

def one_sided_backward(dg: Array, cache: tuple) -> tuple:
    zx, sy, c_z, c_s = cache
    (dz, dX, _), (ds, dY, _) = G.linear_backward(dg * sy, c_z), G.linear_backward(dg * zx, c_s)
    return dz, [ds], {"X": dX, "Y": dY, "b_plu": dg.sum((0, 1))}

def sum_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g_k = z·x_k + s·y_k + b_k: no product, one matrix for [z ; s]."""
    return G.linear_forward(np.concatenate([z, *partners], -1), np.concatenate([w["X"], w["Y"]]), w["b_plu"])

def sum_backward(dg: Array, cache: tuple) -> tuple:
    dzs, dXY, db = G.linear_backward(dg, cache)
    (dz, ds), (dX, dY) = np.split(dzs, 2, -1), np.split(dXY, 2)
    return dz, [ds], {"X": dX, "Y": dY, "b_plu": db}

def unit_forward(u: Array) -> tuple[Array, tuple]:
    """û = u / sqrt(|u|² + ε), of length 1 but for u near 0."""
    inverse = (1 / np.sqrt(G.dot(u, u) + 1e-6)).astype(u.dtype)
    return u * inverse, (u * inverse, inverse)

def unit_backward(du: Array, cache: tuple) -> Array:
    """du = (dû - û (û·dû)) / sqrt(|u|² + ε)."""
    unit, inverse = cache
    return (du - unit * G.dot(unit, du)) * inverse

def rotor_forward(z: Array, partners: list[Array], w: Scope) -> tuple:
    """g_k = r x_k · R(y_k), R the rotation in the plane of z and s by twice the angle from z to s.

    Its rotor is the geometric product ŝ ẑ: R is the reflection along ẑ and then that along ŝ,

        x · R(y) = x·y - 2 (ẑ·x)(ẑ·y) - 2 (ŝ·x)(ŝ·y) + 4 (ẑ·ŝ)(ŝ·x)(ẑ·y),

    of which x·y is constant, a part of b. The factor r makes features as large as the others' are.
    """
    (z, c_z), (s, c_s) = unit_forward(z), unit_forward(partners[0])
    vectors, learned, r = [z, s], [w["X"], w["Y"]], z.shape[-1]
    M, c = dots_forward(vectors, learned), G.dot(z, s)
    (zx, zy), (sx, sy) = M
    return r * (4 * c * sx * zy - 2 * zx * zy - 2 * sx * sy) + w["b_plu"], (M, c, vectors, learned, c_z, c_s)

def rotor_backward(dg: Array, cache: tuple) -> tuple:
    """The product rule, for each of the four dot products with learned vectors and for ẑ·ŝ."""
    ((zx, zy), (sx, sy)), c, (z, s), learned, c_z, c_s = cache
    db, dg = dg.sum((0, 1)), dg * z.shape[-1]
    dM = [[-2 * zy * dg, (4 * c * sx - 2 * zx) * dg], [(4 * c * zy - 2 * sy) * dg, -2 * sx * dg]]
    (dz, ds), (dX, dY) = dots_backward(dM, [z, s], learned)
    dc = 4 * G.dot(dg, sx * zy)
    return unit_backward(dz + dc * s, c_z), [unit_backward(ds + dc * z, c_s)], {"X": dX, "Y": dY, "b_plu": db}

# ---- memories that forget --------------------------------------------------------------------------

def recall_forward(h: Array, z: Array, w: Scope, decay: float, planes: bool = True) -> tuple[Array, tuple]:
    """grassmann.py's memory with M_t = γ M_{t-1} + a_t ∧ b_t, all at once, as a table (L, L):

        c_t = Σ_{i<=t} D_ti ((z_t·a_i) b_i - (z_t·b_i) a_i),   D_ti = γ^(t-i) / sqrt(Σ_j γ^(2(t-j))).

    With γ = 1 the root is sqrt(t): what the layer of the reference does. Without `planes` the first
    product stands alone, a_t ⊗ b_t in place of a_t ∧ b_t: linear attention, not antisymmetrised.
    """
    r, t = z.shape[-1], np.arange(z.shape[1])
    D = np.tril(decay ** np.maximum(t[:, None] - t, 0.0))  # (L, L)
    D = (D / np.linalg.norm(D, axis=1, keepdims=True)).astype(z.dtype)
    ab, c_ab = G.linear_forward(h, w["W_ab"], w["b_ab"])
    a, b = ab[..., :r], ab[..., r:]
    P, Q = z @ a.swapaxes(1, 2) * D, z @ b.swapaxes(1, 2) * (D * planes)  # (B, L, L)
    c = P @ b - Q @ a
    return c @ w["W_mem"], (z, a, b, c, P, Q, D, planes, w["W_mem"], c_ab)

def recall_backward(dm: Array, cache: tuple) -> tuple[Array, Array, Params]:
    """A product X Y passes dX = dout Yᵀ and dY = Xᵀ dout; D is a constant."""
    z, a, b, c, P, Q, D, planes, W_mem, c_ab = cache
    dc = dm @ W_mem.T
    dP, dQ = dc @ b.swapaxes(1, 2) * D, dc @ a.swapaxes(1, 2) * (-D * planes)
    dz = dP @ a + dQ @ b
    da = dP.swapaxes(1, 2) @ z - Q.swapaxes(1, 2) @ dc
    db = dQ.swapaxes(1, 2) @ z + P.swapaxes(1, 2) @ dc
    dh, dW_ab, db_ab = G.linear_backward(np.concatenate([da, db], -1), c_ab)
    dW_mem = c.reshape(-1, len(W_mem)).T @ dm.reshape(-1, dm.shape[-1])
    return dh, dz, {"W_ab": dW_ab, "b_ab": db_ab, "W_mem": dW_mem}

# ---- all of them -----------------------------------------------------------------------------------

def hybrid(attention_layer: int, other: str) -> tuple:
    """One layer of that attention, Grassmann layers otherwise."""

    def name(layer: int) -> str:
        return other if layer == attention_layer else "grassmann"

    def forward(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        mix, cache = G.MIXERS[name(layer)][0](h, w, config, layer, past)
        return mix, cache | {"mixer": name(layer)}

    def backward(dmix: Array, cache: dict) -> tuple[Array, Params]:
        return G.MIXERS[cache["mixer"]][1](dmix, cache)

    def shapes(config: Config, layer: int) -> Shapes:
        return G.MIXERS[name(layer)][2](config, layer)

    return forward, backward, shapes

def reads_whole(mixer: tuple) -> tuple:
    """A mixer that keeps no `past`: it refuses to write one token at a time. Raises ValueError."""
    forward, backward, shapes = mixer

    def whole(h: Array, w: Scope, config: Config, layer: int, past=None) -> tuple[Array, dict]:
        G.check(past is None, "this mixer is for comparison only: it reads texts whole", config.mixer)
        return forward(h, w, config, layer)

    return whole, backward, shapes

WEDGE = wedge_forward, wedge_backward, wedge_shapes
ONE_SIDED = one_sided_forward, one_sided_backward, lambda d, r: {"X": (r, d), "Y": (r, d), "b_plu": (d,)}
SUM = sum_forward, sum_backward, ONE_SIDED[2]
ROTOR = rotor_forward, rotor_backward, ONE_SIDED[2]
CONVOLUTION = convolution_forward, convolution_backward, convolution_shapes
MIXERS = {
    "rotary attention": rotary_attention(taps=False),
    "rotary attention with taps": rotary_attention(taps=True),
    "rotary attention with taps and our gate": gated(rotary_attention(taps=True)),
    "gated convolution": CONVOLUTION,
    "gated convolution with our gate": gated(CONVOLUTION),
    "MLP on [z ; s]": with_features((mlp_forward, mlp_backward, mlp_shapes)),
    "outer product": with_features((outer_forward, outer_backward, outer_shapes)),
    "sum": with_features(SUM),
    "one-sided product": with_features(ONE_SIDED),
    "wedge without a gate": with_features(WEDGE, gate=False),
    "learned planes": with_features(blades(2)),
    "learned planes and z·s": with_features(both(SCALAR, blades(2))),
    "learned trivectors": with_features(blades(3), n_partners=2),
    "learned planes and trivectors": with_features(both(blades(2), blades(3)), n_partners=2),
    "rotors": with_features(ROTOR),
    "two memories, one forgets": with_features(WEDGE, memories=(1.0, 0.97)),
    "a memory that is no plane": with_features(WEDGE, memories=(1.0,), planes=False),
    "hybrid": hybrid(1, "rotary attention with taps"),
}

def install() -> None:
    """Let Config know them."""
    G.MIXERS.update({name: mixer if name == "rotary attention" else reads_whole(mixer)
                     for name, mixer in MIXERS.items()})

def scale_features(params: Params) -> None:
    """X, Y, Z from N(0, 0.2/r), the MLP's matrices from N(0, 1/in), in place.

    Sums, rotations and the MLP are then as large as the wedge's features, products of two dot products
    half as large or less.
    """
    for name, value in params.items():
        if name.split(".")[-1] in LEARNED:
            value *= math.sqrt(0.2 / len(value)) / 0.02
        elif ".mlp.W" in name:
            value /= math.sqrt(len(value)) * value.std()
