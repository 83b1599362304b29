"""csrc/common/unproject.h, the formulas of every compiled backend, against exact rational arithmetic and mpmath."""

import itertools
import math
from fractions import Fraction
from types import ModuleType

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")
TYPES = [np.float32, np.float64]
TINY = {np.float32: 1e-38, np.float64: 1e-308}


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return build.load("unproject")


def rows(dtype: type, *columns: object) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*(np.asarray(c, dtype) for c in columns)), -1).reshape(-1, len(columns))


def ulps_around(dtype: type, values: list[float]) -> list[np.floating]:
    """The values and their neighbours."""
    around = [(np.nextafter(dtype(v), -np.inf), dtype(v), np.nextafter(dtype(v), np.inf)) for v in map(dtype, values)]
    return [v for three in around for v in three]


def pixels(dtype: type, size: int) -> list[np.floating]:
    """Coordinates on, beside and between pixel centres, at the borders, and far outside."""
    inside = [*range(-2, min(size, 4) + 2), size - 2, size - 1, size, 0.5, 0.25, size - 1.5, size / 3]
    return [*ulps_around(dtype, inside), *map(dtype, (-1e-20, 1e-20, -0.0, 1e30, -1e30))]


# ---- projection ----


@pytest.mark.parametrize("dtype", TYPES)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_projection_to_rounding(native: ModuleType, dtype: type, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    q = (rng.normal(size=12) * scale ** rng.uniform(0, 1, 12)).astype(dtype)
    index = rng.integers(0, 512, 3).astype(dtype)
    result = native.project(np.concatenate([q, index])[None])[0]
    for row in range(3):
        terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(q[4 * row :], [*index, 1])]
        bound = 4 * Fraction(float(np.finfo(dtype).eps)) * sum(map(abs, terms))
        assert abs(Fraction(float(result[row])) - sum(terms)) <= bound


# ---- visibility ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (64, 1), (4096, 2)])
def test_a_view_sees_what_is_in_front_and_has_a_tap_inside(
    native: ModuleType, dtype: type, width: int, height: int
) -> None:
    depths = [1.0, TINY[dtype], 0.0, -0.0, -TINY[dtype], -2.0, 1e30, np.inf, np.nan]
    special = [np.inf, -np.inf, np.nan]
    grid = list(itertools.product([*pixels(dtype, width), *special], [*pixels(dtype, height), *special], depths))
    u, v, depth = (np.array(c, dtype) for c in zip(*grid))
    result = native.sees(rows(dtype, u, v, depth, width, height))[:, 0]

    def has_tap(x: float, size: int) -> bool:
        return math.isfinite(x) and -1 <= math.floor(x) < size

    expected = [float(d) > 0 and has_tap(float(x), width) and has_tap(float(y), height) for x, y, d in zip(u, v, depth)]
    np.testing.assert_array_equal(result, np.array(expected, dtype))
    assert 0 < result.sum() < result.size


# ---- taps ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 17, 4096])
def test_taps_are_the_hat_function(native: ModuleType, dtype: type, size: int) -> None:
    """Where a view sees: indices within the map, the weight 1 - |u - index| of those inside, 0 for one outside."""
    u = np.array([x for x in pixels(dtype, size) if -1 <= x < size], dtype)
    rng = np.random.default_rng(size)
    u = np.concatenate([u, rng.uniform(-1, size, 500).astype(dtype)])
    u = u[u < size]
    result = native.axis_taps(rows(dtype, u, size))
    for x, (i0, i1, w0, w1, in0, in1) in zip(u, result):
        assert 0 <= i0 <= size - 1
        assert 0 <= i1 <= size - 1
        first = math.floor(float(x))
        for tap, index, weight, inside in ((first, i0, w0, in0), (first + 1, i1, w1, in1)):
            assert inside == (0 <= tap < size)
            hat = 1 - abs(Fraction(float(x)) - tap) if inside else Fraction(0)
            assert abs(Fraction(float(weight)) - hat) <= Fraction(float(np.finfo(dtype).eps))
            if inside:
                assert index == tap
    weights = result[:, 2] + result[:, 3]
    middle = (u >= 0) & (u < size - 1)
    np.testing.assert_allclose(weights[middle], 1, rtol=np.finfo(dtype).eps)


# ---- derivatives ----


def bilinear(u: Fraction, width: int, v: Fraction, height: int, s: list[Fraction], cell: tuple[int, int]) -> Fraction:
    """Sum of the taps of a cell (its first pixel), those outside the map left out."""
    total = Fraction(0)
    for row, column in itertools.product(range(2), range(2)):
        x, y = cell[0] + column, cell[1] + row
        if 0 <= x < width and 0 <= y < height:
            total += s[2 * row + column] * (1 - abs(u - x)) * (1 - abs(v - y))
    return total


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 4), (300, 2)])
def test_gradient_by_the_pixel_is_that_of_its_cell(native: ModuleType, dtype: type, width: int, height: int) -> None:
    """The sample is linear in u and in v within a cell, so differences are exact. On an edge: the cell to the right."""
    rng = np.random.default_rng(0)
    u = [x for x in pixels(dtype, width) if -1 <= x < width]
    v = [y for y in pixels(dtype, height) if -1 <= y < height]
    eps = Fraction(float(np.finfo(dtype).eps))
    for x, y in itertools.product(u[::2], v[::2]):
        s = (rng.normal(size=4) * 10 ** rng.uniform(-3, 3)).astype(dtype)
        result = native.pixel_gradient(rows(dtype, x, width, y, height, *s))[0]
        exact = [Fraction(float(value)) for value in s]
        at_u, at_v = Fraction(float(x)), Fraction(float(y))
        cell = math.floor(at_u), math.floor(at_v)
        value = bilinear(at_u, width, at_v, height, exact, cell)
        h = Fraction(1, 2**80)
        bound = 8 * eps * sum(map(abs, exact))
        by_u = (bilinear(_into(at_u, h, cell[0]), width, at_v, height, exact, cell) - value) / _step(at_u, h, cell[0])
        by_v = (bilinear(at_u, width, _into(at_v, h, cell[1]), height, exact, cell) - value) / _step(at_v, h, cell[1])
        assert abs(Fraction(float(result[0])) - by_u) <= bound
        assert abs(Fraction(float(result[1])) - by_v) <= bound


def _step(x: Fraction, h: Fraction, first: int) -> Fraction:
    """A step that stays within the cell."""
    return h if x + h < first + 1 else -h


def _into(x: Fraction, h: Fraction, first: int) -> Fraction:
    return x + _step(x, h, first)


@pytest.mark.parametrize("dtype", TYPES)
@given(
    g=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
    u=st.floats(-1, 4096),
    v=st.floats(-1, 4096),
    depth=st.sampled_from([1.0, 1e-6, 1e-30, 1e6, 3.3]),
)
def test_gradient_by_homogeneous_coordinates(
    native: ModuleType, dtype: type, g: tuple[float, float], u: float, v: float, depth: float
) -> None:
    row = rows(dtype, *g, u, v, depth)
    result = native.homogeneous_gradient(row)[0]
    gu, gv, pu, pv, d = (mpmath.mpf(float(x)) for x in row[0])
    with mpmath.workdps(80):
        x, y = pu * d, pv * d
        exact = [gu / d, gv / d, mpmath.diff(lambda z: gu * x / z + gv * y / z, d, h=d * mpmath.mpf(10) ** -30)]
        scale = [abs(gu / d), abs(gv / d), abs(gu * pu / d) + abs(gv * pv / d)]
        for value, truth, size in zip(result, exact, scale):
            if size < float(np.finfo(dtype).max):
                least = float(np.finfo(dtype).tiny) * (1 + abs(pu) + abs(pv))
                assert abs(mpmath.mpf(float(value)) - truth) <= 4 * float(np.finfo(dtype).eps) * size + least


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("values", [(0.3, -1.2, 2.0), (0.0, 0.0), (50.0, -50.0, 49.0), (5.0,), (-3e3, 3e3)])
def test_gradient_of_the_softmax_aggregate(native: ModuleType, dtype: type, values: tuple[float, ...]) -> None:
    """V = sum of softmax(v) v, by mpmath: dV/dv_m = w_m (1 + v_m - V)."""
    with mpmath.workdps(60):

        def aggregate(*v: mpmath.mpf) -> mpmath.mpf:
            e = [mpmath.exp(x - max(v)) for x in v]
            return sum(w * x for w, x in zip(e, v)) / sum(e)

        v = [mpmath.mpf(x) for x in values]
        total = aggregate(*v)
        weights = [mpmath.exp(x - max(v)) / sum(mpmath.exp(y - max(v)) for y in v) for x in v]
        for m, x in enumerate(v):
            order = tuple(int(i == m) for i in range(len(v)))
            exact = 0.7 * mpmath.diff(aggregate, tuple(v), order)
            result = native.softmax_gradient(rows(dtype, 0.7, float(weights[m]), float(x), float(total)))[0, 0]
            scale = abs(0.7 * weights[m]) * (1 + abs(x) + abs(total))
            assert (
                abs(mpmath.mpf(float(result)) - exact) <= 8 * float(np.finfo(dtype).eps) * scale + mpmath.mpf(10) ** -12
            )


@pytest.mark.parametrize("dtype", TYPES)
def test_gradient_of_the_matrix(native: ModuleType, dtype: type) -> None:
    """The whole chain, from a sample at the projection of a voxel to the twelve numbers of Q, against mpmath."""
    rng = np.random.default_rng(1)
    width, height = 6, 5
    for _ in range(20):
        q = rng.normal(size=12)
        q[8:] = 0.05 * rng.normal(size=4)
        index = rng.integers(0, 9, 3)
        q[11] = 2.0
        target = np.array([rng.uniform(-1, width), rng.uniform(-1, height)])
        depth = q[8:11] @ index + q[11]
        q[3] += target[0] * depth - (q[0:3] @ index + q[3])
        q[7] += target[1] * depth - (q[4:7] @ index + q[7])
        q = q.astype(dtype)
        s = rng.normal(size=4).astype(dtype)

        x, y, d = native.project(rows(dtype, *q, *index))[0]
        u, v = x / d, y / d
        by_pixel = native.pixel_gradient(rows(dtype, u, width, v, height, *s))[0]
        by_point = native.homogeneous_gradient(rows(dtype, *by_pixel, u, v, d))[0]
        result = np.outer(by_point, [*index, 1]).ravel()

        cell = math.floor(u), math.floor(v)
        taps = [mpmath.mpf(float(t)) for t in s]

        def sample(*matrix: mpmath.mpf, cell=cell, taps=taps, index=index) -> mpmath.mpf:
            h = [sum(matrix[4 * r + c] * int(index[c]) for c in range(3)) + matrix[4 * r + 3] for r in range(3)]
            return bilinear(h[0] / h[2], width, h[1] / h[2], height, taps, cell)  # type: ignore[arg-type]

        with mpmath.workdps(60):
            at = tuple(mpmath.mpf(float(e)) for e in q)
            for e in range(12):
                exact = mpmath.diff(sample, at, tuple(int(i == e) for i in range(12)), h=mpmath.mpf(10) ** -25)
                scale = max(1.0, np.abs(result).max())
                assert abs(float(exact) - float(result[e])) <= 1e3 * np.finfo(dtype).eps * scale
