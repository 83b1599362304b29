"""csrc/common/group_norm_act.h, the formulas of compiled backends, against exact rational arithmetic and mpmath."""

from fractions import Fraction
from types import ModuleType

import mpmath
import numpy as np
import pytest
from native import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")
TYPES = [np.float32, np.float64]


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return build.load("group_norm_act")


def deviations(values: np.ndarray) -> tuple[Fraction, Fraction]:
    """Mean and sum of squared distances from it."""
    exact = [Fraction(float(v)) for v in values]
    mean = sum(exact) / len(exact)
    return mean, sum((v - mean) ** 2 for v in exact)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("centre", [0.0, 1e4])
def test_deviations_from_sums_and_of_two_parts(native: ModuleType, dtype: type, centre: float) -> None:
    rng, eps = np.random.default_rng(0), float(np.finfo(dtype).eps)
    for size in (1, 2, 50):
        left, right = ((centre + rng.normal(size=s)).astype(dtype) for s in (size, 30))
        parts = []
        for values in (left, right):
            mean, squares = deviations(values)
            shift = values[0]
            distances = [Fraction(float(v)) - Fraction(float(shift)) for v in values]
            sums = [float(sum(distances)), float(sum(d * d for d in distances))]
            got = native.deviations_about(np.array([[shift, *sums, len(values)]], dtype))[0]
            assert abs(got[0] - float(mean)) <= 2 * eps * (abs(float(mean)) + 1)
            assert abs(got[1] - float(squares)) <= 8 * eps * sums[1]
            parts += [*got, len(values)]
        mean, squares = deviations(np.concatenate([left, right]))
        got = native.merged(np.array([parts], dtype))[0]
        assert abs(got[0] - float(mean)) <= 4 * eps * (abs(float(mean)) + 1)
        # The two means are rounded; so is their difference.
        assert abs(got[1] - float(squares)) <= 40 * eps * (float(squares) + abs(centre) * len(left) * 5)


@pytest.mark.parametrize("dtype", TYPES)
def test_merging_with_nothing_changes_nothing(native: ModuleType, dtype: type) -> None:
    assert native.merged(np.array([[0, 0, 0, 3.5, 2, 7]], dtype))[0].tolist() == [3.5, 2.0]


@pytest.mark.parametrize("dtype", TYPES)
def test_rounded_squares_are_never_negative(native: ModuleType, dtype: type) -> None:
    count = dtype(3)
    third = dtype(1) / count
    assert native.deviations_about(np.array([[0, 1, np.nextafter(third, dtype(0)), 3]], dtype))[0, 1] == 0
    assert np.isnan(native.deviations_about(np.array([[0, 1, np.nan, 3]], dtype))[0, 1])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_relu_and_what_it_lets_through(native: ModuleType, dtype: type) -> None:
    y = np.array([-np.inf, -1, -0.0, 0, 1e-30, 2, np.inf, np.nan], dtype)[:, None]
    np.testing.assert_array_equal(native.rectified(y), np.where(y < 0, 0, y))
    gradient = np.full_like(y, 3)
    np.testing.assert_array_equal(native.passed(np.hstack([gradient, y])), np.where(y <= 0, 0, gradient))
    np.testing.assert_array_equal(native.passed(np.hstack([y * np.nan, y])), np.where(y <= 0, 0, np.nan))


@pytest.mark.parametrize("dtype", TYPES)
def test_normalisation_to_rounding(native: ModuleType, dtype: type) -> None:
    rng, eps = np.random.default_rng(1), Fraction(float(np.finfo(dtype).eps))
    rows = rng.normal(size=(200, 4)).astype(dtype)
    for row, got in zip(rows, native.normalised(rows)[:, 0]):
        x, mean, scale, bias = (Fraction(float(v)) for v in row)
        product = (x - mean) * scale
        assert abs(Fraction(float(got)) - product - bias) <= 2 * eps * (abs(product) + abs(bias))


@pytest.mark.parametrize("dtype", TYPES)
def test_gradient_is_the_derivative(native: ModuleType, dtype: type) -> None:
    """Of the sum of h y over a group of one channel and five elements, by mpmath's derivative."""
    rng = np.random.default_rng(2)
    x, h = (rng.normal(size=5).astype(dtype) for _ in range(2))
    weight, epsilon = 1.3, 0.1

    def total(*values: mpmath.mpf) -> mpmath.mpf:
        mean = mpmath.fsum(values) / 5
        variance = mpmath.fsum((v - mean) ** 2 for v in values) / 5
        return mpmath.fsum(float(g) * weight * (v - mean) / mpmath.sqrt(variance + epsilon) for g, v in zip(h, values))

    exact = x.astype(np.float64)
    mean, rstd = exact.mean(), 1 / np.sqrt(exact.var() + epsilon)
    weighted, moment = weight * h.astype(np.float64).sum(), weight * (h * (exact - mean)).sum()
    for i in range(5):
        row = np.array([[weighted, moment, rstd, 5, h[i], x[i], mean, weight * rstd]], dtype)
        order = tuple(int(j == i) for j in range(5))
        with mpmath.workdps(40):
            expected = float(mpmath.diff(total, tuple(map(float, x)), order))
        assert abs(float(native.input_gradient(row)[0, 0]) - expected) <= 50 * float(np.finfo(dtype).eps)
