"""The C++ kernel of linear_soft_argmax3d: slabs, blocks, caches and threads, with each instruction set."""

import pytest
import torch
from cases.linear_soft_argmax3d import backward, compare, double, exact_gradients, forward, inputs
from cases.soft_argmax3d import random_grads, volumes
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from switches import INSTRUCTION_SETS

from bkind3d_kernels import library

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
OPERATORS = torch.ops.bkind3d


@settings(max_examples=60, deadline=None)
@drawn(
    **volumes([1, 2, 8, 15, 17, 33], most_voxels=8000),
    channels=st.sampled_from([1, 3, 8, 16, 17, 32, 45]),
    name=st.sampled_from(INSTRUCTION_SETS or ["baseline"]),
)
def test_any_shape(n, channels, joints, shape, temperature, dtype, channels_last, name) -> None:
    features, *parameters = inputs(n, channels, joints, *shape, dtype=dtype)
    given = (features if channels_last else features.contiguous(), *parameters)
    atol = 1e-10 if dtype == torch.float64 else 2e-5
    with library.use_instruction_set(name):
        compare(OPERATORS, given, temperature, atol=atol)


@pytest.mark.parametrize(
    ("channels", "joints", "shape"),
    [(16, 4, (1, 1, 2500)), (16, 3, (3, 2, 1025)), (8, 2, (1, 4100, 1)), (4, 2, (65, 40, 33))],
)
def test_long_lines_and_several_slabs(isa: str, channels: int, joints: int, shape: tuple[int, int, int]) -> None:
    compare(OPERATORS, inputs(1, channels, joints, *shape))
    compare(OPERATORS, inputs(1, channels, joints, *shape, dtype=torch.float64), 0.7)


@pytest.mark.parametrize(("channels", "joints"), [(300, 3), (5, 130), (128, 70)])
def test_many_channels_and_joints(isa: str, channels: int, joints: int) -> None:
    compare(OPERATORS, inputs(1, channels, joints, 5, 6, 7))


@pytest.mark.parametrize("channels", [16, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_larger_than_the_caches(isa: str, channels: int, dtype: torch.dtype) -> None:
    """More than 8 MB, written past the caches: rows that begin anywhere in a cache line."""
    given = inputs(1, channels, 2, 71, 67, 59, dtype=dtype)
    assert given[0].numel() * dtype.itemsize > 8 << 20
    outputs = forward(OPERATORS, given)
    grads = random_grads(outputs[0])
    exact = exact_gradients(double(given), 1.0, grads)
    for got, expected in zip(backward(OPERATORS, grads, given, 1.0, outputs), exact):
        assert float((got.double() - expected).norm() / expected.norm()) < max(torch.finfo(got.dtype).eps, 1e-4)


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    calls = [inputs(1, 16, 2, 67, 40, 25), inputs(2, 7, 17, 33, 40, 15, dtype=torch.bfloat16)]
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for given in calls:
                outputs = forward(OPERATORS, given)
                results.append((*outputs, *backward(OPERATORS, random_grads(outputs[0]), given, 1.0, outputs)))
    finally:
        torch.set_num_threads(before)
    for group in (results[i :: len(calls)] for i in range(len(calls))):
        for other in group[1:]:
            assert all(torch.equal(a, b) for a, b in zip(group[0], other))


def test_features_of_integers_are_refused() -> None:
    features, *parameters = inputs(1, 3, 2, 2, 2, 2)
    outputs = forward(OPERATORS, (features, *parameters))
    given = (features.int(), *parameters)
    message = "features: expected float32, float64, bfloat16 or float16"
    with pytest.raises(RuntimeError, match=message):
        forward(OPERATORS, given)
    with pytest.raises(RuntimeError, match=message):
        backward(OPERATORS, random_grads(outputs[0]), given, 1.0, outputs)
