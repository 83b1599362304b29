"""The C++ kernel of soft_argmax3d: slabs, caches and threads, with each instruction set."""

import pytest
import torch
from cases import soft_argmax3d as cases
from cases.soft_argmax3d import backward, compare, forward, last, logits_of, random_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from switches import INSTRUCTION_SETS

from bkind3d_kernels import library
from bkind3d_kernels.reference import soft_argmax3d as reference

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
OPERATORS = torch.ops.bkind3d


@settings(max_examples=60, deadline=None)
@given(**cases.volumes([1, 2, 17], most_voxels=20000), name=st.sampled_from(INSTRUCTION_SETS or ["baseline"]))
def test_any_shape(n, joints, shape, temperature, dtype, channels_last, name) -> None:
    logits = logits_of(n, joints, *shape, dtype=dtype)
    atol = 1e-10 if dtype == torch.float64 else 2e-5
    with library.use_instruction_set(name):
        compare(OPERATORS, last(logits) if channels_last else logits, temperature, atol=atol)


@pytest.mark.parametrize("shape", [(1, 1, 2500), (2, 3, 1025), (3, 2, 1024), (1, 4100, 1), (65, 40, 33)])
def test_long_lines_and_several_slabs(isa: str, shape: tuple[int, int, int]) -> None:
    compare(OPERATORS, logits_of(1, 2, *shape))
    compare(OPERATORS, logits_of(1, 2, *shape, dtype=torch.float64), 0.7)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_larger_than_the_caches(isa: str, channels_last: bool) -> None:
    """More than 8 MB, written past the caches: blocks that begin anywhere in a cache line."""
    logits = logits_of(1, 3, 83, 101, 99)
    compare(OPERATORS, last(logits) if channels_last else logits, rtol=1e-3)
    half = logits_of(1, 6, 83, 101, 99, dtype=torch.bfloat16)
    outputs = forward(OPERATORS, half)
    grads = random_grads(outputs[0])
    expected = cases.exact_gradient(half.double(), 1.0, grads)
    got = backward(OPERATORS, grads, half, 1.0, outputs)
    assert float((got.double() - expected).norm() / expected.norm()) < torch.finfo(torch.bfloat16).eps


def test_noisy_large_volume(isa: str) -> None:
    logits = logits_of(1, 1, 192, 192, 192, scale=1.0)
    mean, _, covariance = reference.run(logits.double(), 1.0, True)
    outputs = forward(OPERATORS, logits)
    torch.testing.assert_close(outputs[0].double(), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs[2].double(), covariance, rtol=1e-5, atol=0.03)


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for logits in (logits_of(1, 2, 67, 40, 50), logits_of(2, 3, 33, 40, 50, dtype=torch.bfloat16)):
                for view in (logits, last(logits)):
                    outputs = forward(OPERATORS, view)
                    results.append((*outputs, backward(OPERATORS, random_grads(outputs[0]), view, 1.0, outputs)))
    finally:
        torch.set_num_threads(before)
    for group in (results[i::4] for i in range(4)):
        for other in group[1:]:
            assert all(torch.equal(a, b) for a, b in zip(group[0], other))
