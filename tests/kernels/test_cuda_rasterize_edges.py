"""The CUDA kernels of rasterize_edges, emulated on the CPU, beyond what every family holds: culling, rounds, order."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import rasterize_edges as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from native import emulation

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))
OPERATORS = torch.ops.bkind3d_emulated


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    emulation.load()


@contextmanager
def no_culling() -> Iterator[None]:
    library = emulation.load()
    library.rasterize_edges_culling(0)
    try:
        yield
    finally:
        library.rasterize_edges_culling(1)


def assert_same_without_culling(problem: tuple, sizes: list[tuple[int, int]], sigma: float) -> None:
    maps, winners = cases.forward(OPERATORS, *problem, sizes, [sigma] * len(sizes))
    with no_culling():
        expected_maps, expected_winners = cases.forward(OPERATORS, *problem, sizes, [sigma] * len(sizes))
    for got, expected in zip(maps + winners, expected_maps + expected_winners):
        assert torch.equal(got, expected)


# ---- against the reference in float64 ----

SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 9),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.3, 1.0, 3.0, 20.0]),
    seed=st.integers(0, 2**16),
)
def test_float32_against_exact_scores(n, k, sizes, sigma, seed) -> None:
    problem = cases.scene(n, k, sizes[0], seed, dtype=torch.float32)
    cases.check_float32(OPERATORS, problem, sizes, sigma)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 7),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.7, 2.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_float64_is_the_reference(n, k, sizes, sigma, seed) -> None:
    problem = cases.scene(n, k, sizes[0], seed, spread=3.0)
    cases.check_float64(OPERATORS, problem, sizes, [sigma] * len(sizes))


@pytest.mark.parametrize("count", [16, 17, 35])
def test_more_maps_than_one_launch_takes(count: int) -> None:
    sizes = [(9, 11), *((1 + 5 * i % 37, 1 + 7 * i % 41) for i in range(count - 1))]
    cases.check_float64(OPERATORS, cases.scene(2, 5, (9, 11)), sizes, [1.0 + 0.1 * i for i in range(count)])


# ---- culling, rounds, order: not a bit ----


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 2),
    k=st.integers(2, 12),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=2),
    sigma=st.floats(0.05, 40.0),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(cases.DTYPES),
    hostile=st.booleans(),
)
def test_culling_changes_no_bit(n, k, sizes, sigma, seed, dtype, hostile) -> None:
    problem = (
        cases.adversarial(seed, n, k, sizes[0], dtype) if hostile else cases.scene(n, k, sizes[0], seed, dtype=dtype)
    )
    assert_same_without_culling(problem, sizes, sigma)


@pytest.mark.parametrize("sigma", [0.5, 4.0, 60.0])
def test_culling_changes_no_bit_among_nearly_equal_edges(sigma: float) -> None:
    """In a wide map."""
    assert_same_without_culling(cases.nearly_equal(2, [[3.0, 60.0], [90.0, 21.0]]), [(96, 96)], sigma)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("count", [1, 127, 128, 129, 255, 256, 257, 700])
def test_rounds(count: int, dtype: torch.dtype) -> None:
    """Without culling a block lists every edge: as many rounds as it takes, and ties across them."""
    keypoints, _, _ = cases.scene(1, 30, (19, 21), dtype=dtype)
    generator = torch.Generator().manual_seed(count)
    edges = torch.randint(0, 30, (count, 2), generator=generator)
    edges[count // 2 :] = edges[: count - count // 2].clone()  # twice the same: a tie goes to the first
    weights = torch.ones(1, count, dtype=dtype)
    with no_culling():
        (image,), (winner,) = cases.forward(OPERATORS, keypoints, weights, edges, [(19, 21)], [1.7])
    scores = cases.exact_scores(keypoints, weights, edges, [(19, 21)], 1.7, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(image.double(), scores.amax(1).exp(), rtol=tolerance, atol=tolerance)
    same = (edges[None] == edges[:, None]).all(-1)
    first = same.int().argmax(1)
    drawn = winner[winner >= 0].long()
    assert torch.equal(first[drawn], drawn)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_order_of_blocks_and_threads_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = cases.scene(3, 12, (70, 50), dtype=dtype)
    sizes, sigmas = [(70, 50), (8, 8), (33, 67)], [2.0, 1.0, 3.0]
    results = []
    for descending in (False, True, False):
        with emulation.order(descending=descending):
            maps, winners = cases.forward(OPERATORS, *inputs, sizes, sigmas)
            grads = cases.backward(OPERATORS, cases.random_grads(maps), inputs, winners, sizes, sigmas)
            results.append([*maps, *winners, *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("count", [2, 300])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_ties_between_edges_that_end_in_a_tile_and_edges_that_do_not(count: int, dtype: torch.dtype) -> None:
    """On one line: where both are, the first of them wins, be it the long or the short one. No number is rounded."""
    keypoints = torch.tensor([[[3.0, 5.0], [19.0, 5.0], [-40.0, 5.0], [88.0, 5.0]]], dtype=dtype)
    for long in (0, 1):
        edges = torch.tensor([[0, 1], [2, 3]]).roll(long, 0).repeat(count // 2, 1)
        with no_culling():
            _, (winner,) = cases.forward(
                OPERATORS, keypoints, torch.ones(1, count, dtype=dtype), edges, [(11, 35)], [4.0]
            )
        assert (winner[..., 3:20] == 0).all()
        assert (winner[..., :3] == 1 - long).all()
        assert (winner[..., 20:] == 1 - long).all()


# ---- special values ----


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_nan_and_infinite_keypoints_and_weights_without_culling(dtype: torch.dtype) -> None:
    with no_culling():
        cases.check_not_finite(OPERATORS, dtype)


def test_an_edge_of_no_keypoint_is_nan() -> None:
    """Indices are not checked on a GPU: nothing outside of the keypoints is read or written."""
    inputs = torch.rand(2, 3, 2), torch.ones(2, 4), torch.tensor([[0, 1], [1, 3], [-1, 2], [0, 2]])
    (image,), (winner,) = cases.forward(OPERATORS, *inputs, [(5, 6)], [1.0])
    assert image.isnan().all()
    assert (winner == 1).all()
    points, weights = cases.backward(OPERATORS, [torch.ones_like(image)], inputs, [winner], [(5, 6)], [1.0])
    assert points[:, 1].isnan().all()
    assert (points[:, [0, 2]] == 0).all()
    assert weights.isnan().sum() == 2


def test_winners_out_of_range_are_left_out() -> None:
    inputs = cases.scene(1, 3, (5, 6), dtype=torch.float32)
    winner = torch.tensor([-7, 3, 30000] * 10, dtype=torch.int16)
    grads = cases.backward(OPERATORS, [torch.ones(1, 5, 6)], inputs, [winner], [(5, 6)], [1.0])
    assert all((g == 0).all() for g in grads)


def test_more_than_int16_edges() -> None:
    cases.check_more_than_int16(OPERATORS)
