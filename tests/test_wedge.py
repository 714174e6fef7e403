"""The geometry: the wedge product, unit areas, and the identity that makes one wedge do for all offsets."""

import itertools

import numpy as np
import pytest

from grassmann import linear_forward, partner_forward, plucker, plucker_forward, unit_area_backward, unit_area_forward

RANKS = [2, 3, 4, 7]


def wedge(u, v):
    """u ∧ v by its definition, one coordinate after the other: (0,1), (0,2), …, (1,2), …"""
    return np.array([u[i] * v[j] - u[j] * v[i] for i in range(len(u)) for j in range(i + 1, len(u))])


# ---- the wedge product --------------------------------------------------------------------------------


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_plucker_is_the_definition_in_lexicographic_order(rng, r, leading):
    u, v = rng.standard_normal((2, *leading, r))
    p = plucker(u, v)
    assert p.shape == (*leading, r * (r - 1) // 2)
    for place in np.ndindex(leading):
        np.testing.assert_allclose(p[place], wedge(u[place], v[place]), rtol=1e-15, atol=1e-15)


def test_plucker_of_no_pairs_at_all():
    assert plucker(np.ones((0, 3, 4)), np.ones((0, 3, 4))).shape == (0, 3, 6)


def test_order_of_the_coordinates():
    """Basis vectors e_i ∧ e_j, i < j, are the unit vectors of the coordinates, in lexicographic order."""
    planes = [plucker(e_i, e_j) for e_i, e_j in itertools.combinations(np.eye(5), 2)]
    np.testing.assert_array_equal(planes, np.eye(10))


def test_plucker_does_not_change_its_arguments(rng):
    u, v = rng.standard_normal((2, 3, 5))
    before = u.copy(), v.copy()
    plucker(u, v)
    np.testing.assert_array_equal((u, v), before)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_antisymmetry_is_exact(rng, r, dtype):
    u, v = rng.standard_normal((2, 20, r)).astype(dtype)
    assert plucker(u, v).dtype == dtype
    np.testing.assert_array_equal(plucker(u, v), -plucker(v, u))
    np.testing.assert_array_equal(plucker(u, u), 0)


@pytest.mark.parametrize("r", RANKS)
def test_bilinearity(rng, r):
    u, v, w = rng.standard_normal((3, 20, r))
    a, b = rng.standard_normal((2, 20, 1))
    np.testing.assert_allclose(plucker(a * u + b * v, w), a * plucker(u, w) + b * plucker(v, w), atol=1e-13)
    np.testing.assert_allclose(plucker(w, a * u + b * v), a * plucker(w, u) + b * plucker(w, v), atol=1e-13)


@pytest.mark.parametrize("r", RANKS)
def test_another_basis_of_the_plane_scales_by_the_determinant(rng, r):
    u, v = rng.standard_normal((2, 20, r))
    a, b, c, d = rng.standard_normal((4, 20, 1))
    np.testing.assert_allclose(plucker(a * u + b * v, c * u + d * v), (a * d - b * c) * plucker(u, v), atol=1e-13)


@pytest.mark.parametrize("r", [4, 6])
def test_plucker_relations(rng, r):
    """What makes a bivector a plane: p_ij p_kl - p_ik p_jl + p_il p_jk = 0. Most bivectors are none."""
    number = {pair: k for k, pair in enumerate(itertools.combinations(range(r), 2))}

    def relations(p):
        for i, j, k, m in itertools.combinations(range(r), 4):
            ij, ik, im, jk, jm, km = (p[:, number[pair]] for pair in itertools.combinations((i, j, k, m), 2))
            yield ij * km - ik * jm + im * jk

    u, v, w, x = rng.standard_normal((4, 10, r))
    np.testing.assert_allclose(list(relations(plucker(u, v))), 0, atol=1e-13)
    np.testing.assert_allclose(list(relations(plucker(u, v) + plucker(u, w))), 0, atol=1e-13)  # they share the line u
    assert (np.abs(list(relations(plucker(u, v) + plucker(w, x)))).max(0) > 1e-3).all()


@pytest.mark.parametrize("r", RANKS)
def test_length_is_the_area_of_the_parallelogram(rng, r):
    u, v = rng.standard_normal((2, 20, r))
    area_2 = (u * u).sum(-1) * (v * v).sum(-1) - (u * v).sum(-1) ** 2
    np.testing.assert_allclose((plucker(u, v) ** 2).sum(-1), area_2, rtol=1e-10)


# ---- unit area ----------------------------------------------------------------------------------------


def area(u, q):
    return np.linalg.norm(plucker(u.astype(np.float64), q.astype(np.float64)), axis=-1)


def pair_at_angle(rng, angle, dtype, shape=(50, 5)):
    """u and v, of different lengths between 0.1 and 10, at this angle."""
    u, w = rng.standard_normal((2, *shape))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    w -= (u * w).sum(-1, keepdims=True) * u
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    a, b = 10 ** rng.uniform(-1, 1, (2, *shape[:-1], 1))
    return (a * u).astype(dtype), (b * (np.cos(angle) * u + np.sin(angle) * w)).astype(dtype)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unit_area(rng, r, dtype):
    u, v = (rng.standard_normal((2, 3, 20, r)) * 10 ** rng.uniform(-3, 3, (2, 3, 20, 1))).astype(dtype)
    q, _ = unit_area_forward(u, v)
    eps = np.finfo(dtype).eps
    sine = area(u, v) / (np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1))
    assert q.dtype == dtype
    assert (np.abs(area(u, q) - 1) < 20 * eps / sine).all()
    ratio = q / v  # q is v, shortened or stretched, in its direction
    assert (ratio > 0).all()
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), rtol=4 * eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4, 2e-5])
def test_unit_area_of_nearly_parallel_vectors(rng, angle, dtype):
    """The vectors themselves are rounded to eps, so their area is known to eps / angle, and no better."""
    u, v = pair_at_angle(rng, angle, dtype)
    q, cache = unit_area_forward(u, v)
    assert (np.abs(area(u, q) - 1) < 20 * np.finfo(dtype).eps / angle).all()
    du, dv = unit_area_backward(np.ones_like(q), cache)
    assert np.isfinite(du).all()
    assert np.isfinite(dv).all()
    assert du.any(-1).all()
    assert dv.any(-1).all()


def degenerate_pairs(rng, dtype):
    """Equal, parallel, opposite and zero vectors; nearly parallel ones, at angles below the threshold of 1e-5."""
    u = rng.standard_normal((20, 5)).astype(dtype)
    zero = np.zeros_like(u)
    pairs = [(u, factor * u) for factor in (1, 2, -1, dtype(3.7), dtype(-1e-3))]
    pairs += [(u, zero), (zero, u), (zero, zero)]
    pairs += [pair_at_angle(rng, angle, dtype) for angle in (8e-6, 1e-6, 1e-7, np.pi - 1e-6)]
    return pairs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_degenerate_pair_is_the_zero_bivector_without_gradient(rng, dtype):
    with np.errstate(all="raise"):
        for u, v in degenerate_pairs(rng, dtype):
            q, cache = unit_area_forward(u, v)
            np.testing.assert_array_equal(q, 0)
            np.testing.assert_array_equal(unit_area_backward(np.ones_like(q), cache), 0)


@pytest.mark.parametrize(("dtype", "near"), [(np.float32, 0.1), (np.float64, 1e-6)])
def test_the_threshold_is_an_angle_of_1e_5(rng, dtype, near):
    """As close to it as the rounding of the vectors allows; whatever their lengths and their order."""
    u, v = pair_at_angle(rng, 1e-5 * (1 - near), dtype)
    for pair in [(u, v), (v, u)]:
        np.testing.assert_array_equal(unit_area_forward(*pair)[0], 0)
    u, v = pair_at_angle(rng, 1e-5 * (1 + near), dtype)
    for pair in [(u, v), (v, u)]:
        assert unit_area_forward(*pair)[0].all()


def test_one_degenerate_pair_does_not_disturb_its_neighbours(rng):
    u, v = rng.standard_normal((2, 3, 5))
    alone, _ = unit_area_forward(u, v)
    v[1] = -2 * u[1]
    q, _ = unit_area_forward(u, v)
    np.testing.assert_array_equal(q[[0, 2]], alone[[0, 2]])
    np.testing.assert_array_equal(q[1], 0)


# ---- the identity: one wedge for all offsets ----------------------------------------------------------


def papers_layer(z, offsets, normalize, W_plu, b_plu):
    """The paper's formula as it stands: for every token and every valid offset a wedge, then the mean, then W_plu."""
    B, L, _ = z.shape
    g = np.empty((B, L, W_plu.shape[1]))
    for row, t in np.ndindex(B, L):
        bivectors = []
        for delta in offsets:
            if t - delta >= 0:
                u, v = z[row, t], z[row, t - delta]
                p = wedge(u, v)
                if normalize:
                    length = np.linalg.norm(p)
                    degenerate = length <= 1e-5 * np.linalg.norm(u) * np.linalg.norm(v)
                    p = np.zeros_like(p) if degenerate else p / length
                bivectors.append(p)
        mean = np.mean(bivectors, axis=0) if bivectors else np.zeros(len(W_plu))
        g[row, t] = mean @ W_plu + b_plu
    return g


def our_layer(z, taps, offsets, normalize, W_plu, b_plu):
    s, _ = partner_forward(z, taps, offsets, normalize)
    p, _ = plucker_forward(z, s)
    return linear_forward(p, W_plu, b_plu)[0]


def states(rng, B=2, L=12, r=5):
    """Reduced states with equal neighbours, an opposite pair and a zero vector among them."""
    z = rng.standard_normal((B, L, r))
    z[0, 3:6] = z[0, 2]
    z[1, 5] = -2 * z[1, 4]
    z[1, 8] = 0
    return z


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("offsets", [(1,), (3,), (1, 2), (1, 2, 4, 8), (2, 5, 11), (4, 1, 3), (12, 1), (20,)])
def test_one_wedge_equals_the_papers_sum_over_offsets(rng, offsets, normalize):
    """Also for tokens without a valid offset (the first min(Δ)), and for offsets longer than the text."""
    z = states(rng)
    W_plu, b_plu = rng.standard_normal((10, 8)), rng.standard_normal(8)
    expected = papers_layer(z, offsets, normalize, W_plu, b_plu)
    np.testing.assert_allclose(our_layer(z, None, offsets, normalize, W_plu, b_plu), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(expected[:, : min(offsets)], np.broadcast_to(b_plu, (2, min(*offsets, 12), 8)))


@pytest.mark.parametrize("delta", [1, 3, 11])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_offset_with_taps_of_one_is_the_papers_layer(rng, delta, normalize):
    z = states(rng)
    W_plu, b_plu = rng.standard_normal((10, 8)), rng.standard_normal(8)
    ours = our_layer(z, np.ones((1, 5)), (delta,), normalize, W_plu, b_plu)
    np.testing.assert_allclose(ours, papers_layer(z, (delta,), normalize, W_plu, b_plu), rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_taps_are_a_depthwise_causal_convolution(rng, normalize):
    """s_t = Σ_Δ w_Δ ⊙ z_{t-Δ}, missing tokens count as 0, no division by the number of valid offsets."""
    z, taps, offsets = states(rng), rng.standard_normal((3, 5)), (1, 2, 5)
    s = np.zeros_like(z)
    for row, t in np.ndindex(2, 12):
        for w, delta in zip(taps, offsets, strict=True):
            if t - delta >= 0:
                s[row, t] += w * z[row, t - delta]
        length = np.linalg.norm(wedge(z[row, t], s[row, t]))
        if normalize:
            s[row, t] = s[row, t] / length if length > 0 else 0
    np.testing.assert_allclose(partner_forward(z, taps, offsets, normalize)[0], s, rtol=0, atol=1e-12)
