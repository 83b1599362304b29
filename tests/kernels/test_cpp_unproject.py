"""Unprojection in C++ beyond what every family holds: instruction sets and threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import unproject as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from switches import INSTRUCTION_SETS, deterministic

from bkind3d_kernels import library, unproject

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))


@pytest.mark.parametrize("name", INSTRUCTION_SETS[:-1])  # the best is that of test_unproject_operators.py
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("aggregation", "unseen"), cases.OPTIONS)
def test_agrees_with_the_reference(aggregation: str, unseen: str, dtype: torch.dtype, name: str) -> None:
    with library.use_instruction_set(name):
        for shape in cases.shapes("bkind3d", dtype, aggregation):
            problem = *cases.operands(*shape, dtype), shape[-1], aggregation, unseen
            cases.check(torch.ops.bkind3d, problem)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2),
    m=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13]),
    c=st.integers(1, 40),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 19)),
    options=st.sampled_from(cases.OPTIONS),
    name=st.sampled_from(INSTRUCTION_SETS or ["none"]),
    seed=st.integers(0, 2**16),
)
def test_every_shape(n, m, c, size, shape, options, name, seed) -> None:
    """float32 to rtol 1e-4, atol 1e-5; voxels at the very border of a view may fall on the other side, few of them."""
    features, projections, grid, mask, weights = cases.scene(n, m, c, size, shape, torch.float32, seed)
    aggregation, unseen = options
    options = dict(aggregation=aggregation, unseen=unseen, view_mask=mask, return_counts=True)
    options["view_weights"] = cases.only(weights, aggregation)
    exact, counts = unproject(features, projections, grid, **options, backend="reference")
    given = features.float(), projections.float(), grid.to(dtype=torch.float32)
    with library.use_instruction_set(name):
        volume, got = unproject(*given, **options, backend="cpp")
    flipped = got != counts
    assert int(flipped.sum()) <= 1 + 0.01 * flipped.numel()
    keep = (~flipped).unsqueeze(1).expand_as(volume)
    torch.testing.assert_close(volume.double()[keep], exact[keep], rtol=1e-4, atol=1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("aggregation", "unseen"), cases.OPTIONS)
def test_threads_change_nothing(aggregation: str, unseen: str, threads: Callable[[int], None]) -> None:
    """Forward always, backward with use_deterministic_algorithms; else backward up to the order of sums."""
    shape = (8, 8, 24)
    problem = *cases.operands(1, 4, 20, (12, 16), shape), shape, aggregation, unseen
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        with deterministic():
            fixed = cases.evaluate(torch.ops.bkind3d.unproject, *problem)
        loose, again = (cases.evaluate(torch.ops.bkind3d.unproject, *problem) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(loose, again))
        results.append((fixed, loose))
    for fixed, loose in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(fixed, results[0][0]))
        assert all(torch.equal(a, b) for a, b in zip(loose[:2], fixed[:2]))  # volume and counts
        for a, b in zip(loose[2:], fixed[2:]):
            torch.testing.assert_close(a, b)
