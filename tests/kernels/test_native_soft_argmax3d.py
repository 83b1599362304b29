"""csrc/common/soft_argmax3d.h, the formulas of every compiled backend, against mpmath."""

import itertools
from types import ModuleType

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")
TYPES = [np.float32, np.float64]
PAIRS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]  # of a symmetric matrix, as it is stored


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return build.load("soft_argmax3d")


def row(dtype: type, *parts: object) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(p, dtype)) for p in parts])[None]


# ---- reference and exponent ----


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_subtracted_is_finite_or_tells(native: ModuleType, dtype: type) -> None:
    values = np.array([[1.5], [-3e38], [-np.inf], [np.inf], [np.nan]], dtype)
    expected = np.array([[1.5], [-3e38], [0.0], [np.inf], [np.nan]], dtype)
    np.testing.assert_array_equal(native.softmax_reference(values), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_exponent(native: ModuleType, dtype: type) -> None:
    assert native.softmax_exponent(row(dtype, 3, 3, 7))[0, 0] == 0
    assert native.softmax_exponent(row(dtype, -np.inf, 0, 7))[0, 0] == -np.inf
    assert native.softmax_exponent(row(dtype, 1, 5, 0.5))[0, 0] == -2


# ---- sums of a line ----


@pytest.mark.parametrize("dtype", TYPES)
@given(seed=st.integers(0, 2**32 - 1), offset=st.sampled_from([0, 40, 1023]))
def test_line_of_voxels(native: ModuleType, dtype: type, seed: int, offset: int) -> None:
    """Adds e, e d and e d d^T of the voxels of one (x, y), d from the origin."""
    rng = np.random.default_rng(seed)
    sums = rng.uniform(0, 3, 10).astype(dtype)
    e = rng.uniform(0, 1, 5).astype(dtype)
    dx, dy = (dtype(d) for d in rng.integers(-7, 8, 2))
    dz = np.arange(5, dtype=np.float64) - offset
    line = [e.sum(dtype=np.float64), (e * dz).sum(), (e * dz * dz).sum()]
    arguments = row(dtype, sums, line, dx, dy)
    total, first, second = (float(x) for x in arguments[0, 10:13])
    d = [float(dx), float(dy)]
    # With z known by its sums alone.
    added = [total, total * d[0], total * d[1], first]
    added += [total * d[0] ** 2, total * d[0] * d[1], first * d[0], total * d[1] ** 2, first * d[1], second]
    result = native.add_line(arguments)[0].astype(np.float64)
    bound = 4 * np.finfo(dtype).eps * (np.abs(sums) + np.abs(added))
    assert (np.abs(result - (sums.astype(np.float64) + added)) <= bound).all()
    short = native.add_line_without_covariance(arguments)[0]
    np.testing.assert_array_equal(short[:4], result[:4].astype(dtype))
    np.testing.assert_array_equal(short[4:], sums[4:])


# ---- moments ----


def block_moments(native: ModuleType, logits: np.ndarray, index: np.ndarray, beta: float, first: int) -> np.ndarray:
    """Of a few voxels, as the kernels take them: about the voxel with the largest logit."""
    maximum = logits.max()
    origin = index[logits.argmax()]
    reference = native.softmax_reference(np.array([[maximum]]))[0, 0]
    e = np.exp((logits - reference) * beta)
    d = (index - origin).astype(np.float64)
    second = [(e * d[:, i] * d[:, j]).sum() for i, j in PAIRS]
    sums = [e.sum(), *(e @ d), *second]
    return native.moments_of(row(np.float64, sums, maximum, origin, first + logits.argmax()))[0]


def exact_moments(logits: np.ndarray, index: np.ndarray, beta: float) -> tuple[list, list]:
    """Mean and covariance of the index, to 50 digits."""
    with mpmath.workdps(50):
        top = mpmath.mpf(float(logits.max()))
        e = [mpmath.exp((mpmath.mpf(float(x)) - top) * mpmath.mpf(beta)) if np.isfinite(x) else 0 for x in logits]
        total = mpmath.fsum(e)
        mean = [mpmath.fsum(w * int(p[i]) for w, p in zip(e, index)) / total for i in range(3)]
        covariance = [
            mpmath.fsum(w * (int(p[i]) - mean[i]) * (int(p[j]) - mean[j]) for w, p in zip(e, index)) / total
            for i, j in PAIRS
        ]
        return mean, covariance


KINDS = {
    "flat": lambda rng, n: rng.normal(size=n) * 0.01,
    "normal": lambda rng, n: rng.normal(size=n) * 3,
    "huge": lambda rng, n: rng.normal(size=n) * 1e4,
    "equal": lambda rng, n: np.full(n, 7.25),
    "peak": lambda rng, n: np.where(np.arange(n) == n - 3, 40.0, rng.normal(size=n)),
    "rising": lambda rng, n: np.arange(n) * 0.5,
    "falling": lambda rng, n: -np.arange(n) * 0.5,
    "masked": lambda rng, n: np.where(rng.random(n) < 0.7, -np.inf, rng.normal(size=n)),
    "masked blocks": lambda rng, n: np.where(np.arange(n) // 16 % 2 == 0, -np.inf, rng.normal(size=n)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 1_000_000])
@pytest.mark.parametrize("beta", [1.0, 0.01, 30.0])
def test_merged_blocks_have_the_moments_of_the_whole(native: ModuleType, kind: str, shift: int, beta: float) -> None:
    """Wherever the largest logit is, with masked voxels and blocks, and far from the origin: nothing cancels."""
    rng = np.random.default_rng(3)
    shape = (4, 5, 7)
    index = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), -1) + shift
    logits = KINDS[kind](rng, len(index))
    mean, covariance = exact_moments(logits, index, beta)
    merged = native.merge  # starts from nothing
    state = np.array([-np.inf, *[0.0] * 11])
    short = state.copy()
    for first in range(0, len(index), 16):
        part = block_moments(native, logits[first : first + 16], index[first : first + 16], beta, first)
        state = merged(row(np.float64, state, part, beta))[0]
        short = native.merge_without_covariance(row(np.float64, short, part, beta))[0]
    assert state[0] == logits.max()
    assert state[11] == logits.argmax()
    total = np.exp((logits - logits.max()) * beta).sum()
    np.testing.assert_allclose(state[1], total, rtol=1e-13)
    spread = [max(float(covariance[k]), 1e-300) ** 0.5 for k in (0, 3, 5)]
    for i in range(3):
        # The mean is one double: it cannot be nearer than its own rounding, as often as it was moved.
        assert abs(float(mpmath.mpf(state[2 + i]) - mean[i])) <= 1e-13 * (spread[i] + 1) + 8 * np.spacing(state[2 + i])
    for k, (i, j) in enumerate(PAIRS):
        step = 16 * np.spacing(float(shift + 8))
        bound = 1e-12 * spread[i] * spread[j] + step * (spread[i] + spread[j] + step) + 1e-300
        assert abs(float(mpmath.mpf(state[5 + k] / state[1]) - covariance[k])) <= bound, (i, j)
    np.testing.assert_array_equal(short[:5], state[:5])
    assert short[11] == state[11]


def test_nothing_and_ties(native: ModuleType) -> None:
    nothing = np.array([-np.inf, *[0.0] * 11])
    state = native.merge(row(np.float64, nothing, nothing, 1.0))[0]
    np.testing.assert_array_equal(state, nothing)
    a = np.array([2.0, 1.5, 1, 1, 1, *[0.25] * 6, 4])
    np.testing.assert_array_equal(native.merge(row(np.float64, nothing, a, 1.0))[0], a)
    np.testing.assert_array_equal(native.merge(row(np.float64, a, nothing, 1.0))[0], a)
    b = np.array([2.0, 1.5, 3, 1, 1, *[0.25] * 6, 9])
    assert native.merge(row(np.float64, a, b, 1.0))[0][11] == 4  # the earlier voxel
    empty = native.moments_of(row(np.float64, np.zeros(10), -np.inf, 3, 4, 5, 77))[0]
    assert empty[1] == 0
    np.testing.assert_array_equal(empty[2:11], 0)


def test_a_nan_stays(native: ModuleType) -> None:
    a = np.array([2.0, 1.5, 1, 1, 1, *[0.25] * 6, 4])
    bad = a.copy()
    bad[1] = np.nan
    for first, second in ((a, bad), (bad, a)):
        state = native.merge(row(np.float64, first, second, 1.0))[0]
        assert np.isnan(state[1])
        assert np.isnan(state[2])


# ---- gradients ----


def loss(logits: list, index: list, beta: object, g_mean: list, g_peak: object, g_cov: list, argmax: int) -> object:
    """g_mean . mean + g_peak peak + sum of g_cov * covariance."""
    top = max(logits)
    e = [mpmath.exp((x - top) * beta) for x in logits]
    total = mpmath.fsum(e)
    mean = [mpmath.fsum(w * p[i] for w, p in zip(e, index)) / total for i in range(3)]
    value = mpmath.fsum(g * m for g, m in zip(g_mean, mean)) + g_peak * e[argmax] / total
    for i, j in itertools.product(range(3), range(3)):
        second = mpmath.fsum(w * (p[i] - mean[i]) * (p[j] - mean[j]) for w, p in zip(e, index)) / total
        value += g_cov[3 * i + j] * second
    return value


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("with_covariance", [True, False])
@pytest.mark.parametrize(("scale", "beta"), [(1.0, 1.0), (0.01, 3.0), (20.0, 1.5), (1.0, 0.1)])
def test_gradient_of_the_logits(
    native: ModuleType, dtype: type, with_covariance: bool, scale: float, beta: float
) -> None:
    """Of mean, peak and a covariance gradient that is not symmetric, for every voxel, against differences in mpmath."""
    rng = np.random.default_rng(5)
    shape = (2, 3, 4)
    index = [tuple(int(x) for x in p) for p in np.ndindex(shape)]
    logits = (rng.normal(size=len(index)) * scale).astype(dtype)
    argmax = int(logits.argmax())
    g_mean, g_peak = rng.normal(size=3).astype(dtype), dtype(rng.normal())
    g_cov = rng.normal(size=9).astype(dtype) * with_covariance
    mean, covariance = exact_moments(logits, np.array(index), beta)
    matrix = np.zeros((3, 3))
    for (i, j), value in zip(PAIRS, covariance):
        matrix[i, j] = matrix[j, i] = float(value)
    e = np.exp((logits.astype(np.float64) - float(logits.max())) * beta)
    gradients = [g_mean, g_peak, g_cov, with_covariance]
    saved = [[float(m) for m in mean], matrix, logits.max(), e.sum(), argmax]
    volume = native.volume_gradient(row(dtype, *gradients, *saved, beta))[0]
    assert volume[15] == argmax
    result = []
    for voxel, (x, y, z) in enumerate(index):
        line = native.line_gradient(row(dtype, volume, x, y))[0]
        dz = dtype(z) - volume[3]
        g = native.logit_gradient(row(dtype, e[voxel], dz, line))[0, 0]
        result.append(float(g) + (float(volume[14]) if voxel == argmax else 0.0))
    with mpmath.workdps(60):
        at = [mpmath.mpf(float(x)) for x in logits]
        exact_beta = mpmath.mpf(float(dtype(beta)))
        parts = ([mpmath.mpf(float(g)) for g in gs] for gs in (g_mean, g_cov))
        gm, gc = parts
        h = mpmath.mpf(10) ** -20
        for voxel, value in enumerate(result):
            up, down = list(at), list(at)
            up[voxel] += h
            down[voxel] -= h
            arguments = (index, exact_beta, gm, mpmath.mpf(float(g_peak)), gc, argmax)
            exact = (loss(up, *arguments) - loss(down, *arguments)) / (2 * h)
            size = max(e[voxel] / e.sum() * beta * 40, 1e-12)
            assert abs(float(exact) - value) <= 16 * np.finfo(dtype).eps * size
