"""The C++ kernel of group_norm_act: rows, slabs and threads, with each instruction set."""

from math import prod

import pytest
import torch
from cases import group_norm_act as cases
from cases.group_norm_act import ACTIVATIONS, DTYPES, inputs, random_grad, results
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from switches import INSTRUCTION_SETS

from bkind3d_kernels import library

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
OPERATORS = torch.ops.bkind3d


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 3),
    members=st.sampled_from([1, 2, 3, 4, 7, 8]),
    groups=st.sampled_from([1, 2, 3, 8, 13]),
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 16, 33]), min_size=2, max_size=3),
    residual=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(INSTRUCTION_SETS or ["baseline"]),
)
def test_any_shape(n, members, groups, shape, residual, activation, dtype, name) -> None:
    assume(members * prod(shape) > 8 and n * groups * members * prod(shape) < 20000)
    values = inputs(n, members * groups, *shape, residual=residual, dtype=dtype)
    assume(activation == "none" or not cases.at_the_kink(values, groups))
    with library.use_instruction_set(name):
        cases.check_error(OPERATORS, values, groups, activation)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (257, 1), (96, 32), (1000, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_and_many_channels(isa: str, channels: int, groups: int, dtype: torch.dtype) -> None:
    for residual in (False, True):
        cases.check_error(OPERATORS, inputs(2, channels, 11, 13, residual=residual, dtype=dtype), groups, "none")


@pytest.mark.parametrize("shape", [(2, 16, 71, 60, 32), (1, 8, 601, 603), (3, 5, 701, 401)])
@pytest.mark.parametrize("residual", [False, True])
def test_maps_larger_than_the_caches(isa: str, shape: tuple[int, ...], residual: bool) -> None:
    """More than 8 MB, written past the caches where samples begin at whole cache lines."""
    values = inputs(*shape, residual=residual)
    assert values[0].numel() * 4 > 8 << 20
    cases.check_error(OPERATORS, values, 1, "none")


def test_statistics_of_many_slabs(isa: str) -> None:
    """A mean that drifts along the sample: what the slabs give differs."""
    x, weight, bias, _ = inputs(1, 16, 40, 41, 42, residual=False)
    x += torch.linspace(-1e3, 2e3, 42)
    cases.check_statistics(OPERATORS, (x, weight, bias, None), 4, units=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(isa: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    sizes = [((1, 32, 67, 80), 8, True), ((2, 12, 30, 33, 10), 3, False), ((3, 7, 50, 61), 1, True)]
    calls = [(inputs(*shape, dtype=dtype, residual=residual), groups) for shape, groups, residual in sizes]
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append([results(OPERATORS, x, groups, "relu", random_grad(x[0])) for x, groups in calls])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert all(map(torch.equal, a, b))
