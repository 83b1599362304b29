"""The C++ edge maps beyond what every family holds: instruction sets, culling, threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from cases import rasterize_edges as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients
from switches import INSTRUCTION_SETS

from bkind3d_kernels import library, rasterize_edges

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
OPERATORS = torch.ops.bkind3d


@contextmanager
def no_culling() -> Iterator[None]:
    OPERATORS.set_rasterize_edges_culling(False)
    try:
        yield
    finally:
        OPERATORS.set_rasterize_edges_culling(True)


def assert_same_without_culling(problem: tuple, sizes: list[tuple[int, int]], sigma: float) -> None:
    maps, winners = cases.forward(OPERATORS, *problem, sizes, [sigma] * len(sizes))
    with no_culling():
        expected_maps, expected_winners = cases.forward(OPERATORS, *problem, sizes, [sigma] * len(sizes))
    for got, expected in zip(maps + winners, expected_maps + expected_winners):
        assert torch.equal(got, expected)


SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 13, 16, 17, 31, 33, 40])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 9),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.3, 1.0, 3.0, 20.0]),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(INSTRUCTION_SETS or ["none"]),
)
def test_float32_against_exact_scores(n, k, sizes, sigma, seed, name) -> None:
    with library.use_instruction_set(name):
        cases.check_float32(OPERATORS, cases.scene(n, k, sizes[0], seed, dtype=torch.float32), sizes, sigma)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 2),
    k=st.integers(2, 12),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=2),
    sigma=st.floats(0.05, 40.0),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(cases.DTYPES),
    hostile=st.booleans(),
    name=st.sampled_from(INSTRUCTION_SETS or ["none"]),
)
def test_culling_changes_no_bit(n, k, sizes, sigma, seed, dtype, hostile, name) -> None:
    problem = (
        cases.adversarial(seed, n, k, sizes[0], dtype) if hostile else cases.scene(n, k, sizes[0], seed, dtype=dtype)
    )
    with library.use_instruction_set(name):
        assert_same_without_culling(problem, sizes, sigma)


@pytest.mark.parametrize("sigma", [0.5, 4.0, 60.0])
def test_culling_changes_no_bit_among_nearly_equal_edges(sigma: float, isa: str) -> None:
    """In a wide map."""
    problem = cases.nearly_equal(8, [[3.0, 90.0], [120.0, 31.0]])
    assert_same_without_culling(problem, [(128, 128)], sigma)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    keypoints, weights, _ = cases.scene(3, 8, (33, 41), dtype=dtype)
    run = partial(rasterize_edges, size=[(33, 41), (70, 19)], sigma=[1.5, 3.0], backend="cpp")
    results = []
    for name in INSTRUCTION_SETS:
        with library.use_instruction_set(name):
            results.append([*run(keypoints, weights), *gradients(run, keypoints, weights)])
    rtol = 1e-4 if dtype == torch.float32 else 1e-12
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert float((a - b).norm()) <= rtol * float(b.norm())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 7),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.7, 2.0, 8.0]),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(INSTRUCTION_SETS or ["none"]),
)
def test_float64_is_the_reference(n, k, sizes, sigma, seed, name) -> None:
    with library.use_instruction_set(name):
        cases.check_float64(OPERATORS, cases.scene(n, k, sizes[0], seed, spread=3.0), sizes, [sigma] * len(sizes))


def test_hostile_gradients_are_finite_and_those_of_the_reference(isa: str) -> None:
    """Without ties, whose gradient may go to either edge once rounding differs: each edge alone."""
    keypoints, _, edges = cases.adversarial(3, 2, 8, (21, 34), torch.float64)
    for edge in edges.unique(dim=0):
        run = partial(rasterize_edges, size=[(21, 34), (9, 9)], sigma=[1.5, 3.0], edges=edge[None])
        weights = torch.full((2, 1), 0.7, dtype=torch.float64)
        got = gradients(partial(run, backend="cpp"), keypoints, weights)
        for a, b in zip(got, gradients(partial(run, backend="reference"), keypoints, weights)):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_more_than_int16_edges(isa: str) -> None:
    keypoints, weights, edges = cases.check_more_than_int16(OPERATORS)
    run, exact = cases.maps_of(OPERATORS, edges, [(20, 24)], [2.0]), cases.reference_maps(edges, [(20, 24)], [2.0])
    got, expected = (gradients(f, keypoints.double(), weights.double()) for f in (run, exact))
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_number_of_threads_changes_no_bit(dtype: torch.dtype, isa: str) -> None:
    keypoints, weights, _ = cases.scene(3, 12, (70, 50), dtype=dtype)
    run = partial(rasterize_edges, size=[(70, 50), (8, 8), (131, 67)], sigma=[2.0, 1.0, 3.0], backend="cpp")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for _ in range(3):
                results.append([*run(keypoints, weights), *gradients(run, keypoints, weights)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b)


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    keypoints, weights, _ = cases.scene(2, 4, (16, 20), dtype=torch.float32)
    run = partial(rasterize_edges, size=[(16, 20), (5, 33)], sigma=[1.0, 2.0], backend="cpp")
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(keypoints, weights), run(keypoints, weights)):
        assert torch.equal(a, b)
    for a, b in zip(gradients(compiled, keypoints, weights), gradients(run, keypoints, weights)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_winners_out_of_range_are_left_out(dtype: torch.dtype) -> None:
    """Those that the operator is given need not be its own: nothing beyond the edges is read or written."""
    inputs = cases.scene(1, 3, (5, 60), dtype=dtype)
    winner = torch.tensor([-7, 3, 30000, -32768, 32767] * 60, dtype=torch.int16)
    for name in INSTRUCTION_SETS:
        with library.use_instruction_set(name):
            grads = cases.backward(OPERATORS, [torch.ones(1, 5, 60, dtype=dtype)], inputs, [winner], [(5, 60)], [1.0])
        assert all((grad == 0).all() for grad in grads)
