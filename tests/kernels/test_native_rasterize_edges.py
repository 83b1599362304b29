"""csrc/common/rasterize_edges.h, the formulas of every compiled backend, against mpmath and exact bounds."""

from types import ModuleType

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler")
TYPES = [np.float32, np.float64]
EPS = {dtype: float(np.finfo(dtype).eps) for dtype in TYPES}
EPS64 = EPS[np.float64]

# Ends of a segment: on pixels, at the same place, a hair apart, just below and above the shortest length (1e-6), at
# right angles, across the map from far outside, with both ends far outside, and further than a float resolves.
SEGMENTS = {
    "ordinary": (-3.3, 2.1, 4.7, -1.9),
    "horizontal": (-3.0, 2.0, 5.0, 2.0),
    "vertical": (1.0, -7.0, 1.0, 7.0),
    "point": (2.0, -1.0, 2.0, -1.0),
    "point at the centre": (0.0, 0.0, 0.0, 0.0),
    "hair": (2.0, -1.0, np.nextafter(2.0, 3), -1.0),
    "too short": (1.0, 1.0, 1.0 + 0.7e-6, 1.0 - 0.7e-6),
    "short": (1.0, 1.0, 1.0 + 0.8e-6, 1.0 - 0.8e-6),
    "one end far": (0.5, 0.5, 1e4, 3e3),
    "through the map": (-1e4, -9.9e3, 1e4, 1.01e4),
    "both far on one side": (1e4, 1e4, 1.1e4, -2e4),
    "both far, line through the map": (1e4, 1e4, 2e4, 2e4),
    "a million pixels": (-1e6, 3.0, 1e6, -2.0),
    "a billion pixels": (-1e9, 3.0, 2.0, 5.0),
}
SIGMAS = [0.3, 2.0, 40.0]


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return build.load("rasterize_edges")


def pixels_of(ends: tuple[float, ...], half: float = 16.0) -> np.ndarray:
    """Pixel centres about the middle of a map: a grid, and the pixels at the ends where they are on the map."""
    grid = np.stack(np.meshgrid(np.arange(-half, half + 1, 4), np.arange(-half, half + 1, 5)), -1).reshape(-1, 2)
    at_ends = np.array(ends).reshape(2, 2).round()
    return np.concatenate([grid, at_ends[(np.abs(at_ends) <= half).all(-1)], [[0.5, -0.5], [half, half]]])


def nearest(ends: tuple, p: tuple) -> tuple:
    """The squared distance of a pixel to a segment, and how far along it the nearest point is, 0 to 1."""
    ax, ay, bx, by = ends
    dx, dy = bx - ax, by - ay
    squared = dx * dx + dy * dy
    t = ((p[0] - ax) * dx + (p[1] - ay) * dy) / squared if squared > 1e-12 else mpmath.mpf(0)
    t = min(max(t, mpmath.mpf(0)), mpmath.mpf(1))
    x, y = ax + t * dx - p[0], ay + t * dy - p[1]
    return x * x + y * y, t


def exact(values: object) -> tuple:
    return tuple(mpmath.mpf(float(x)) for x in np.ravel(values))


def uncertainty(dtype: type, ends: tuple[float, ...], s: np.ndarray, p: np.ndarray, sigma: float) -> float:
    """A bound of the errors of `across` and `beyond`: rounding in T of what they are the differences of, and of the
    segment itself in double, from the end that is nearer to the centre of the map."""
    size = np.abs(p).sum() / sigma
    a, b = np.hypot(*ends[:2]), np.hypot(*ends[2:])
    clamped = min(max(p[0] * s[0] + p[1] * s[1], s[3]), s[4])
    in_t = 4 * EPS[dtype] * (abs(s[2]) + size + abs(clamped))
    return in_t + 8 * EPS64 * ((min(a, b) + np.abs(p).sum()) / sigma + abs(clamped))


# ---- the segment and the score ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_score_is_that_of_the_exact_distance(native: ModuleType, dtype: type, sigma: float, name: str) -> None:
    ends = SEGMENTS[name]
    for log_weight, (first, second) in ((0.0, (ends[:2], ends[2:])), (-3.5, (ends[2:], ends[:2]))):
        ordered = (*first, *second)
        s = native.segment(np.array([[*ordered, sigma]]))
        assert np.isfinite(s).all()
        for p in pixels_of(ordered):
            result = native.score(np.concatenate([s[0], p, [log_weight]]).astype(dtype)[None])[0, 0]
            with mpmath.workdps(60):
                squared, _ = nearest(exact(ordered), exact(p))
                scaled = squared / mpmath.mpf(sigma) ** 2
                error = abs(mpmath.mpf(float(result)) - (mpmath.mpf(log_weight) - scaled))
            distance = float(mpmath.sqrt(scaled))
            slack = uncertainty(dtype, ordered, s[0], p, sigma)
            if name == "too short":  # its other end is left out
                slack += 2e-6 / sigma
            rounding = 4 * EPS[dtype] * (abs(log_weight) + distance**2)
            assert error <= 2 * distance * 3 * slack + 9 * slack**2 + rounding, (p, result, scaled)


@given(
    ends=st.tuples(*[st.one_of(st.floats(-40, 40), st.integers(-20, 20).map(float), st.floats(-1e4, 1e4))] * 4),
    p=st.tuples(st.integers(-64, 64), st.integers(-64, 64)),
    sigma=st.floats(0.2, 60),
)
@settings(max_examples=400)
def test_score_of_any_segment(native: ModuleType, ends: tuple[float, ...], p: tuple[int, int], sigma: float) -> None:
    s = native.segment(np.array([[*ends, sigma]]))
    at = np.array(p, np.float64)
    with mpmath.workdps(60):
        squared, _ = nearest(exact(ends), exact(at))
        scaled = squared / mpmath.mpf(sigma) ** 2
    short = 2e-6 / sigma if np.hypot(ends[2] - ends[0], ends[3] - ends[1]) <= 1.001e-6 else 0.0
    for dtype in TYPES:
        result = native.score(np.concatenate([s[0], at, [0.25]]).astype(dtype)[None])[0, 0]
        distance = float(mpmath.sqrt(scaled))
        slack = 3 * uncertainty(dtype, ends, s[0], at, sigma) + short
        bound = 2 * distance * slack + slack**2 + 4 * EPS[dtype] * (0.25 + distance**2)
        assert abs(mpmath.mpf(float(result)) - (mpmath.mpf("0.25") - scaled)) <= bound


@pytest.mark.parametrize("dtype", TYPES)
def test_a_pixel_on_an_end_has_the_weight_itself(native: ModuleType, dtype: type) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(-16, 17, 2), rng.integers(-16, 17, 2)
        s = native.segment(np.array([[*a, *b, 2.0]], np.float64))[0]
        for p in (a, b, (a + b) / 2):
            result = native.score(np.concatenate([s, p, [-1.25]]).astype(dtype)[None])[0, 0]
            assert abs(result + 1.25) <= 4 * EPS[dtype] * 1.25


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_end_is_seen(native: ModuleType, bad: float) -> None:
    for place in range(4):
        ends = [1.0, 2.0, 3.0, 4.0]
        ends[place] = bad
        s = native.segment(np.array([[*ends, 2.0]]))[0]
        result = native.score(np.concatenate([s, [0.0, 0.0, 0.0]])[None])[0, 0]
        assert np.isnan(result) or np.isnan(s[:3]).any()
    # Both at the same place: an infinite point is no point.
    s = native.segment(np.array([[bad, 1.0, bad, 1.0, 2.0]]))[0]
    assert np.isnan(s[:3]).any()


# ---- derivatives ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [n for n in SEGMENTS if n not in ("hair", "too short")])
def test_shares_give_the_gradient_of_both_ends(native: ModuleType, dtype: type, name: str) -> None:
    """d(d^2)/da = -2 near (pixel - nearest point), far alike for b; a point has all of it at its first end."""
    ends, sigma = SEGMENTS[name], 2.0
    s = native.segment(np.array([[*ends, sigma]]))[0]
    point = s[5] == 0
    assert point == name.startswith("point")
    for p in pixels_of(ends):
        rounded = np.concatenate([s, p]).astype(dtype)
        across, beyond, clamped = native.offset(rounded[None])[0]
        share = native.shares(np.array([[clamped, *rounded[3:6]]], dtype))[0]
        assert ((share >= 0) & (share <= 1)).all()
        assert share.sum() == pytest.approx(1, rel=2 * EPS[dtype])
        # (pixel - nearest point) / sigma in the axes of the map.
        offset = np.array([beyond * s[0] - across * s[1], beyond * s[1] + across * s[0]]) * sigma
        with mpmath.workdps(70):
            at = exact(p)
            step = mpmath.mpf(10) ** -25
            squared, t = nearest(exact(ends), at)
            length = np.hypot(ends[2] - ends[0], ends[3] - ends[1])
            slack = uncertainty(dtype, ends, s, p, sigma)
            along = slack * sigma / length if length > 0 else 0.0
            for end, (weight, truth) in enumerate(zip(share, (1 - t, t))):
                few = 8 * EPS[dtype] * float(truth)
                assert abs(float(truth) - float(weight)) <= 4 * along + few
                for axis in range(2):

                    def moved(delta: mpmath.mpf, end=end, axis=axis, at=at) -> mpmath.mpf:
                        place = list(exact(ends))
                        place[2 * end + axis] += delta
                        if point:  # both ends are one: they move together
                            place[2 * (1 - end) + axis] += delta
                        return nearest(tuple(place), at)[0]

                    numeric = float((moved(step) - moved(-step)) / (2 * step)) / sigma**2
                    if point:
                        numeric *= float(truth)
                    result = -2 * float(weight) * float(offset[axis]) / sigma
                    distance = float(mpmath.sqrt(squared)) / sigma
                    bound = 2 * (3 * slack * float(truth) + (4 * along + few) * (distance + slack)) / sigma
                    assert abs(result - numeric) <= bound + 16 * EPS[dtype] * abs(numeric), (p, end, axis)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_smaller_share_keeps_its_relative_error(native: ModuleType, dtype: type) -> None:
    """Where one end is far outside, its share is tiny, and so is its gradient: neither is noise."""
    for ends in ((0.5, 0.25, 1e4, 2e3), (1e4, 2e3, 0.5, 0.25)):
        s = native.segment(np.array([[*ends, 2.0]]))[0]
        # Pixels beside the segment, a few pixels from the end that is on the map.
        for p in ((3.0, 0.0), (7.0, 2.0), (12.0, -3.0)):
            rounded = np.concatenate([s, p]).astype(dtype)
            clamped = native.offset(rounded[None])[0, 2]
            share = native.shares(np.array([[clamped, *rounded[3:6]]], dtype))[0]
            with mpmath.workdps(60):
                _, t = nearest(exact(ends), exact(p))
            for value, truth in zip(share, (1 - t, t)):
                assert float(value) == pytest.approx(float(truth), rel=32 * EPS[dtype])


# ---- bounds of a tile ----


@pytest.mark.parametrize("dtype", TYPES)
@given(seed=st.integers(0, 2**32 - 1), sigma=st.sampled_from([0.3, 1.0, 8.0, 60.0]))
@settings(max_examples=150)
def test_no_pixel_is_outside_the_bounds(native: ModuleType, dtype: type, seed: int, sigma: float) -> None:
    """As computed: what culling rests on. Segments on the map, through tiles, touching them, and far away."""
    rng = np.random.default_rng(seed)
    slack = (native.float32 if dtype is np.float32 else native.float64)["score_slack"]
    for _ in range(8):
        width, height = (int(n) for n in rng.choice([1, 2, 8, 16, 32], 2))
        map_size = int(rng.choice([8, 33, 256, 4096]))
        x0, y0 = (rng.integers(0, map_size, 2) - (map_size - 1) / 2).astype(np.float64)
        xs, ys = x0 + np.arange(width), y0 + np.arange(height)
        reach = rng.choice([1.0, 1e2, 1e4, 1e6])
        ends = rng.normal(size=4) * reach
        if rng.random() < 0.5:  # through a pixel of the tile, along the axes, or as a point
            ends[:2] = rng.choice(xs), rng.choice(ys)
            ends[rng.integers(0, 4)] = ends[rng.integers(0, 2)]
        if rng.random() < 0.2:
            ends[2:] = ends[:2]
        log_weight = rng.normal()
        s = native.segment(np.array([[*ends, sigma]]))[0].astype(dtype)
        tile = np.array([x0, y0, xs[-1], ys[-1], sigma], dtype)
        upper, lower = native.bounds(np.concatenate([tile, s, [dtype(log_weight)]])[None])[0]
        p = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2).astype(dtype)
        full = np.concatenate([np.broadcast_to(s, (len(p), 6)), p, np.full((len(p), 1), log_weight, dtype)], -1)
        scores = native.score(full.astype(dtype))[:, 0].astype(np.float64)
        # Scores so low that they lose against lowest_score have relative rounding errors larger than the slack.
        relevant = scores >= (-90 if dtype is np.float32 else -710)
        assert (scores[relevant] <= float(upper) + slack / 2).all()
        if float(lower) >= (-90 if dtype is np.float32 else -710):
            assert (scores >= float(lower) - slack / 2).all()
        if width == height == 1:
            assert float(upper) - float(lower) <= 64 * slack * (1 + abs(scores[0]) * (1 + abs(x0) + abs(y0)) / sigma)


@pytest.mark.parametrize("dtype", TYPES)
def test_bounds_are_close(native: ModuleType, dtype: type) -> None:
    """A bound that holds but says nothing would cull nothing: a square of 8 pixels, segments of any direction."""
    rng = np.random.default_rng(0)
    sigma = 2.0
    loose = []
    for _ in range(300):
        ends = rng.uniform(-60, 60, 4)
        s = native.segment(np.array([[*ends, sigma]]))[0].astype(dtype)
        xs = np.arange(8.0) - 4
        tile = np.array([xs[0], xs[0], xs[-1], xs[-1], sigma], dtype)
        upper, lower = native.bounds(np.concatenate([tile, s, [0]]).astype(dtype)[None])[0].astype(np.float64)
        p = np.stack(np.meshgrid(xs, xs), -1).reshape(-1, 2)
        full = np.concatenate([np.broadcast_to(s, (64, 6)), p, np.zeros((64, 1))], -1).astype(dtype)
        distances = np.sqrt(np.maximum(-native.score(full)[:, 0], 0)) * sigma
        loose.append(distances.min() - np.sqrt(max(-upper, 0)) * sigma)
        loose.append(np.sqrt(max(-lower, 0)) * sigma - distances.max())
    # In pixels: the frame's rectangle about the tile adds at most its corners.
    assert np.median(loose) < 3
    assert max(loose) < 8


def test_constants(native: ModuleType) -> None:
    single, double = native.float32, native.float64
    assert single["unit_roundoff"] == np.finfo(np.float32).eps / 2
    assert double["unit_roundoff"] == np.finfo(np.float64).eps / 2
    # e^lowest_score is the smallest normal number, to within a little more.
    assert 1 <= np.exp(single["lowest_score"]) / np.finfo(np.float32).tiny < 1.1
    assert 1 <= np.exp(double["lowest_score"]) / np.finfo(np.float64).tiny < 2
    assert single["min_length_squared"] == 1e-12
