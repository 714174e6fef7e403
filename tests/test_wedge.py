"""The geometry: the wedge product, unit areas, and the identity: one wedge for all offsets."""

import itertools

import numpy as np
import pytest

import grassmann as G
from grassmann import contract, plucker, unit_area_backward, unit_area_forward

ranks = pytest.mark.parametrize("r", [2, 3, 4, 7])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])

def wedge(u, v):
    """u ∧ v by its definition, one coordinate after the other: (0,1), (0,2), …, (1,2), …"""
    pairs = itertools.combinations(range(len(u)), 2)
    return np.array([u[i] * v[j] - u[j] * v[i] for i, j in pairs])

def length(x):
    return np.linalg.norm(x.astype(np.float64), axis=-1)

def area(u, v):
    return length(plucker(u.astype(np.float64), v.astype(np.float64)))

# ---- the wedge product ---------------------------------------------------------------------------

@ranks
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0, 3)])
def test_plucker_is_the_definition(rng, r, leading):
    u, v = rng.standard_normal((2, *leading, r))
    before = u.copy(), v.copy()
    p = plucker(u, v)
    assert p.shape == (*leading, r * (r - 1) // 2)
    for place in np.ndindex(leading):
        np.testing.assert_allclose(p[place], wedge(u[place], v[place]), rtol=1e-15, atol=1e-15)
    np.testing.assert_array_equal((u, v), before)

@ranks
@dtypes
def test_antisymmetry_is_exact(rng, r, dtype):
    u, v = rng.standard_normal((2, 20, r)).astype(dtype)
    assert plucker(u, v).dtype == dtype
    np.testing.assert_array_equal(plucker(u, v), -plucker(v, u))
    np.testing.assert_array_equal(plucker(u, u), 0)

@ranks
def test_another_basis_scales_by_the_determinant_and_the_length_is_the_area(rng, r):
    u, v = rng.standard_normal((2, 20, r))
    a, b, c, d = rng.standard_normal((4, 20, 1))
    p = plucker(a * u + b * v, c * u + d * v)
    np.testing.assert_allclose(p, (a * d - b * c) * plucker(u, v), atol=1e-13)
    area_2 = (u * u).sum(-1) * (v * v).sum(-1) - (u * v).sum(-1) ** 2
    np.testing.assert_allclose(length(plucker(u, v)) ** 2, area_2, rtol=1e-10)

@pytest.mark.parametrize("r", [4, 6])
def test_plucker_relations(rng, r):
    """What makes a bivector a plane: p_ij p_km - p_ik p_jm + p_im p_jk = 0. Most are none."""
    number = {pair: k for k, pair in enumerate(itertools.combinations(range(r), 2))}

    def relations(p):
        for four in itertools.combinations(range(r), 4):
            ij, ik, im, jk, jm, km = (p[:, number[q]] for q in itertools.combinations(four, 2))
            yield ij * km - ik * jm + im * jk

    u, v, w, x = rng.standard_normal((4, 10, r))
    one_line = plucker(u, v) + plucker(u, w)  # planes that share the line u
    np.testing.assert_allclose([*relations(plucker(u, v)), *relations(one_line)], 0, atol=1e-13)
    assert (np.abs(list(relations(plucker(u, v) + plucker(w, x)))).max(0) > 1e-3).all()

@ranks
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_contraction_with_the_planes_so_far(rng, r, chunk):
    """Token by token, by the definition x ⌟ (a ∧ b) = (x·a) b - (x·b) a, and by the coordinates of
    the sum of the planes, as a matrix; which is antisymmetric."""
    x, a, b = rng.standard_normal((3, 2, 13, r))
    start = rng.standard_normal((2, r, r))
    start -= start.swapaxes(1, 2)
    out, last = contract(x, a, b, start, chunk)
    by_definition, by_coordinates, (i, j) = np.empty_like(x), np.empty_like(x), G.pairs(r)
    for row, t in np.ndindex(2, 13):
        before, A, B, X = slice(t + 1), a[row, : t + 1], b[row, : t + 1], x[row, t]
        terms = [(X @ A[k]) * B[k] - (X @ B[k]) * A[k] for k in range(t + 1)]
        by_definition[row, t] = X @ start[row] + np.sum(terms, 0)
        M = np.zeros((r, r))
        M[i, j] = plucker(a[row, before], b[row, before]).sum(0)
        by_coordinates[row, t] = X @ (start[row] + M - M.T)
    np.testing.assert_allclose(out, by_definition, rtol=0, atol=1e-12)
    np.testing.assert_allclose(out, by_coordinates, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last[1], start[1] + M - M.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last, -last.swapaxes(1, 2), rtol=0, atol=1e-13)
    assert np.abs(np.einsum("bti,bti->bt", contract(x, a, b)[0], x)).max() < 1e-12  # at right angles

# ---- unit area -----------------------------------------------------------------------------------

def pair_at_angle(rng, angle, dtype, r=5):
    """u and v, of different lengths between 0.1 and 10, at this angle."""
    u, w = rng.standard_normal((2, 50, r))
    u /= length(u)[:, None]
    w -= (u * w).sum(-1, keepdims=True) * u
    w /= length(w)[:, None]
    a, b = 10 ** rng.uniform(-1, 1, (2, 50, 1))
    return (a * u).astype(dtype), (b * (np.cos(angle) * u + np.sin(angle) * w)).astype(dtype)

@ranks
@dtypes
@pytest.mark.parametrize("angle", [1.5, 1e-1, 1e-2, 1e-3, 1e-4, 2e-5])
def test_unit_area(rng, r, dtype, angle):
    """q is v, shortened or stretched, so that |u ∧ q| = 1, as exactly as it can be: where u and v
    are nearly parallel they are rounded to eps, and their area is known to eps / angle."""
    u, v = pair_at_angle(rng, angle, dtype, r)
    q, cache = unit_area_forward(u, v)
    eps = np.finfo(dtype).eps
    assert q.dtype == dtype
    assert (np.abs(area(u, q) - 1) < 20 * eps / angle).all()
    np.testing.assert_allclose(q / length(q)[:, None], v / length(v)[:, None], atol=4 * eps)
    for grad in unit_area_backward(np.ones_like(q), cache):
        assert np.isfinite(grad).all() and grad.any(-1).all()

@dtypes
def test_a_degenerate_pair_is_the_zero_bivector_without_gradient(rng, dtype):
    """Equal, parallel, opposite and zero vectors; angles below the threshold of 1e-5."""
    u = rng.standard_normal((20, 5)).astype(dtype)
    pairs = [(u, dtype(factor) * u) for factor in (1, 2, -1, 3.7, -1e-3, 0)]
    pairs += [(0 * u, u), (0 * u, 0 * u)]
    pairs += [pair_at_angle(rng, angle, dtype) for angle in (8e-6, 1e-6, 1e-7, np.pi - 1e-6)]
    for u, v in pairs:
        with np.errstate(all="raise"):
            q, cache = unit_area_forward(u, v)
            assert not q.any() and not np.any(unit_area_backward(np.ones_like(q), cache))

@pytest.mark.parametrize(("dtype", "near"), [(np.float32, 0.1), (np.float64, 1e-6)])
def test_the_threshold_is_an_angle_of_1e_5(rng, dtype, near):
    """As close to it as rounding allows; whatever the lengths of the vectors and their order."""
    for angle, is_plane in ((1e-5 * (1 - near), False), (1e-5 * (1 + near), True)):
        u, v = pair_at_angle(rng, angle, dtype)
        for q in (unit_area_forward(u, v)[0], unit_area_forward(v, u)[0]):
            assert (q.any(-1) == is_plane).all()

# ---- the identity: one wedge for all offsets -----------------------------------------------------

def papers_layer(z, offsets, normalize, W_plu, b_plu):
    """The paper as it stands: for every token and valid offset a wedge, their mean, W_plu."""
    B, L, _ = z.shape
    g = np.empty((B, L, W_plu.shape[1]))
    for row, t in np.ndindex(B, L):
        bivectors = [np.zeros(len(W_plu))]
        for delta in offsets:
            if t - delta >= 0:
                u, v = z[row, t], z[row, t - delta]
                p = wedge(u, v)
                if normalize:
                    plane = length(p) > 1e-5 * length(u) * length(v)
                    p = p / length(p) if plane else 0 * p
                bivectors.append(p)
        g[row, t] = sum(bivectors) / max(1, len(bivectors) - 1) @ W_plu + b_plu
    return g

def our_layer(z, taps, offsets, normalize, W_plu, b_plu):
    return plucker(z, G.partner_forward(z, taps, offsets, normalize)[0]) @ W_plu + b_plu

@pytest.fixture
def z(rng):
    """Reduced states with equal neighbours, an opposite pair and a zero vector among them."""
    z = rng.standard_normal((2, 12, 5))
    z[0, 3:6], z[1, 5], z[1, 8] = z[0, 2], -2 * z[1, 4], 0
    return z

@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "offsets", [(1,), (3,), (1, 2), (1, 2, 4, 8), (2, 5, 11), (4, 1, 3), (12, 1), (20,)])
def test_one_wedge_equals_the_papers_sum_over_offsets(rng, z, offsets, normalize):
    """Also for tokens without a valid offset, the first min(Δ), and offsets beyond the text."""
    W_plu, b_plu = rng.standard_normal((10, 8)), rng.standard_normal(8)
    expected = papers_layer(z, offsets, normalize, W_plu, b_plu)
    ours = our_layer(z, None, offsets, normalize, W_plu, b_plu)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    assert (ours[:, : min(offsets)] == b_plu).all()
    if len(offsets) == 1:  # the same layer with taps of one
        ours = our_layer(z, np.ones((1, 5)), offsets, normalize, W_plu, b_plu)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)

@pytest.mark.parametrize("normalize", [False, True])
def test_taps_are_a_depthwise_causal_convolution(rng, z, normalize):
    """s_t = Σ_Δ w_Δ ⊙ z_{t-Δ}: missing tokens count as 0, and nothing is divided by a number."""
    taps, offsets, s = rng.standard_normal((3, 5)), (1, 2, 5), np.zeros_like(z)
    for row, t in np.ndindex(2, 12):
        for w, delta in zip(taps, offsets, strict=True):
            s[row, t] += w * z[row, t - delta] if t >= delta else 0
        if normalize and s[row, t].any():
            s[row, t] /= area(z[row, t], s[row, t]) or np.inf
    ours, _ = G.partner_forward(z, taps, offsets, normalize)
    np.testing.assert_allclose(ours, s, rtol=0, atol=1e-12)
