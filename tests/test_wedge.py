"""The geometry: the wedge product and unit areas. (One wedge for all offsets: test_model.py; contraction: test_mixers.py.)"""

import itertools

import numpy as np
import pytest

from grassmann import plucker, unit_area_backward, unit_area_forward


def wedge(u, v):
    """u ∧ v by its definition, coordinate by coordinate: (0,1), (0,2), …, (1,2), …"""
    return np.array(
        [u[i] * v[j] - u[j] * v[i] for i, j in itertools.combinations(range(len(u)), 2)]
    )


def length(x):
    return np.linalg.norm(x.astype(np.float64), axis=-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("leading", "r"), [((), 2), ((2, 3), 5), ((0, 3), 3)])
def test_plucker_is_the_definition_and_exactly_antisymmetric(rng, leading, r, dtype):
    u, v = rng.standard_normal((2, *leading, r)).astype(dtype)
    p = plucker(u, v)
    assert (p.shape, p.dtype) == ((*leading, r * (r - 1) // 2), dtype)
    for place in np.ndindex(leading):
        np.testing.assert_array_equal(p[place], wedge(u[place], v[place]))
    np.testing.assert_array_equal(p, -plucker(v, u))


def pair_at_angle(rng, angle, dtype, r=5):
    """u and v, of different lengths between 0.1 and 10, at this angle."""
    u, w = rng.standard_normal((2, 50, r))
    u /= length(u)[:, None]
    w -= (u * w).sum(-1, keepdims=True) * u
    w /= length(w)[:, None]
    a, b = 10 ** rng.uniform(-1, 1, (2, 50, 1))
    return (a * u).astype(dtype), (b * (np.cos(angle) * u + np.sin(angle) * w)).astype(dtype)


@pytest.mark.parametrize(("dtype", "near"), [(np.float32, 0.1), (np.float64, 1e-6)])
def test_unit_area(rng, dtype, near):
    """q is v, rescaled so that |u ∧ q| = 1, as exactly as possible: if u and v are nearly parallel, rounding them
    to eps changes their area by eps / angle. Up to an angle of 1e-5, as exactly as rounding allows, or if a
    vector is zero, there is no plane and no gradient."""
    eps = np.finfo(dtype).eps
    for angle in (1.5, 1e-2, 1e-5 * (1 + near)):
        pair = pair_at_angle(rng, angle, dtype)
        for u, v in (pair, pair[::-1]):
            q, cache = unit_area_forward(u, v)
            assert q.dtype == dtype
            assert (np.abs(length(plucker(u.astype(np.float64), q)) - 1) < 20 * eps / angle).all()
            np.testing.assert_allclose(q / length(q)[:, None], v / length(v)[:, None], atol=4 * eps)
            for grad in unit_area_backward(np.ones_like(q), cache):
                assert np.isfinite(grad).all() and grad.any(-1).all()
    none = [pair_at_angle(rng, angle, dtype) for angle in (1e-5 * (1 - near), 1e-7, np.pi - 1e-6)]
    none += (
        [(v, u) for u, v in none]
        + [(v, dtype(c) * v) for c in (1, 3.7, -1e-3, 0)]
        + [(0 * v, v), (0 * v, 0 * v)]
    )
    for u, v in none:
        with np.errstate(all="raise"):
            q, cache = unit_area_forward(u, v)
            assert not q.any() and not np.any(unit_area_backward(np.ones_like(q), cache))
