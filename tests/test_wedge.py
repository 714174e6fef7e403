"""The geometry: the wedge product and unit areas.

One wedge for all offsets is tested in test_model.py, the contraction in test_mixers.py.
"""

import itertools

import numpy as np
import pytest

from grassmann import plucker, unit_area_backward, unit_area_forward

precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SHAPES = [
    ((), 2),
    ((2, 3), 5),
    ((0, 3), 3),
]
LIMITS = [  # how near to the angle 1e-5 rounding lets us go
    (np.float32, 0.1),
    (np.float64, 1e-6),
]


def length(x):
    return np.linalg.norm(x.astype(np.float64), axis=-1)


def unit(x):
    return x / length(x)[..., None]


@precisions
@pytest.mark.parametrize(("leading", "r"), SHAPES)
def test_plucker_is_the_definition(rng, leading, r, dtype):
    """u ∧ v has the coordinates (0,1), (0,2), …, (1,2), …"""
    u, v = rng.standard_normal((2, *leading, r)).astype(dtype)
    i, j = np.array([*itertools.combinations(range(r), 2)]).T
    p = plucker(u, v)
    expected = u[..., i] * v[..., j] - u[..., j] * v[..., i]
    np.testing.assert_array_equal(p, expected, strict=True)


def pair_at_angle(rng, angle, dtype, r=5):
    """u and v, of different lengths between 0.1 and 10, at this angle."""
    u, w = rng.standard_normal((2, 50, r))
    u = unit(u)
    along_u = (u * w).sum(-1, keepdims=True)
    w = unit(w - along_u * u)
    v = np.cos(angle) * u + np.sin(angle) * w
    exponents = rng.uniform(-1, 1, (2, 50, 1))
    a, b = 10**exponents
    u = (a * u).astype(dtype)
    v = (b * v).astype(dtype)
    return u, v


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("angle", [1.5, 1e-2, 1e-5])
@pytest.mark.parametrize(("dtype", "near"), LIMITS)
def test_unit_area(rng, dtype, near, angle, exchange):
    """q is v, rescaled so that |u ∧ q| = 1, as exactly as possible.

    If u and v are nearly parallel, rounding them to eps changes their area by eps / angle.
    """
    eps = np.finfo(dtype).eps
    pair = pair_at_angle(rng, angle * (1 + near), dtype)
    u, v = reversed(pair) if exchange else pair
    q, cache = unit_area_forward(u, v)
    area = length(plucker(u.astype(np.float64), q))
    assert q.dtype == dtype
    error = np.abs(area - 1)
    assert error.max() < 20 * eps / angle
    np.testing.assert_allclose(unit(q), unit(v), atol=4 * eps)
    for grad in unit_area_backward(np.ones_like(q), cache):
        nonzero = grad.any(-1)
        assert np.isfinite(grad).all()
        assert nonzero.all()


@pytest.mark.parametrize(("dtype", "near"), LIMITS)
def test_without_a_plane_there_is_no_gradient(rng, dtype, near):
    """Up to an angle of 1e-5, as exactly as rounding allows, or if a vector is zero."""
    angles = [1e-5 * (1 - near), 1e-7, np.pi - 1e-6]
    pairs = [pair_at_angle(rng, angle, dtype) for angle in angles]
    u, _ = pairs[0]
    zero = 0 * u
    for factor in (1, 3.7, -1e-3):
        pairs.append((u, dtype(factor) * u))
    pairs.append((u, zero))
    pairs.append((zero, zero))
    pairs += [(v, u) for u, v in pairs]
    for u, v in pairs:
        with np.errstate(all="raise"):
            q, cache = unit_area_forward(u, v)
            grads = unit_area_backward(np.ones_like(q), cache)
        assert not q.any()
        assert not np.any(grads)
