"""The CUDA kernels of unproject, emulated on the CPU, beyond what every family holds: order, fixed point, chunks.

Built for the emulation, a few warps count as enough to fill the GPU, so that small volumes are walked in long runs.
"""

import pytest
import torch
from cases import unproject as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from native import emulation
from switches import deterministic
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    emulation.load()


@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 2, 4, 5, 8, 13]),
    c=st.sampled_from([1, 2, 4, 5, 8, 12, 16, 24, 31, 40]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 13), st.integers(1, 11)),
    options=st.sampled_from(cases.OPTIONS),
    fixed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_shape(m, c, size, shape, options, fixed, seed) -> None:
    with deterministic(fixed):
        cases.check(torch.ops.bkind3d_emulated, (*cases.operands(1, m, c, size, shape, seed=seed), shape, *options))


# ---- the order of blocks and threads ----


def backward(features, q, mask, weights, shape, options, *, deterministic: bool, gradient: Tensor | None = None):
    """With a fixed gradient of the volume unless one is given."""
    gradient = cases.random_gradient(features, shape) if gradient is None else gradient
    common = features, q, mask, weights, shape, *options
    wanted = True, True, weights is not None
    return torch.ops.bkind3d_emulated.unproject_backward(gradient, *common, *wanted, deterministic)


def both_orders(*arguments, **flags) -> list[tuple[Tensor, ...]]:
    results = []
    for descending in (False, True):
        with emulation.order(descending=descending):
            results.append(backward(*arguments, **flags))
    return results


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("options", [("softmax", "zero"), ("weighted", "exclude"), ("max", "zero")])
def test_deterministic_backward_does_not_depend_on_the_order(options: tuple[str, str], dtype: torch.dtype) -> None:
    for shape in ((2, 4, 8, (7, 9), (6, 9, 10)), (1, 6, 5, (7, 9), (6, 5, 9))):
        features, q, mask, weights = cases.operands(*shape, dtype)
        arguments = features, q, mask, cases.only(weights, options[0]), list(shape[-1]), options
        first, second = both_orders(*arguments, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        loose, other = both_orders(*arguments, deterministic=False)
        for a, b in zip(first[1:], loose[1:]):
            assert torch.equal(a, b)  # of the matrices and weights there is one way
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
        torch.testing.assert_close(loose[0], first[0], rtol=tolerance, atol=tolerance)
        if dtype == torch.float32 and options[0] == "softmax":
            assert not torch.equal(loose[0], other[0])  # or the test would show nothing


def test_deterministic_backward_of_any_magnitude() -> None:
    features, q, mask, _ = cases.operands(1, 3, 4, (6, 7), (5, 6, 4), torch.float32)
    gradient = torch.randn(1, 4, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    arguments = features, q, mask, None, [5, 6, 4], ("mean", "zero")
    expected = backward(*arguments, gradient=gradient, deterministic=False)[0]
    for exponent in (-120, -40, 0, 40, 120):
        got = backward(*arguments, gradient=gradient * 2.0**exponent, deterministic=True)[0]
        torch.testing.assert_close(got / 2.0**exponent, expected, rtol=1e-5, atol=1e-6)
    assert not backward(*arguments, gradient=torch.zeros_like(gradient), deterministic=True)[0].any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_deterministic_backward_of_what_is_not_finite_is_nan_in_its_sample(value: float) -> None:
    features, q, mask, _ = cases.operands(2, 3, 4, (6, 7), (5, 6, 4), torch.float32)
    gradient = torch.ones(2, 4, 5, 6, 4)
    gradient[1] = value
    mask[1] = True
    got = backward(features, q, mask, None, [5, 6, 4], ("sum", "zero"), gradient=gradient, deterministic=True)[0]
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


# ---- chunks of views, addresses ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unseen", ["zero", "exclude"])
def test_views_that_see_after_a_chunk_that_does_not(dtype: torch.dtype, unseen: str) -> None:
    features, q, _, _ = cases.operands(1, 6, 4, (9, 8), (4, 3, 5), dtype, seed=7)
    features[:, :4] = torch.inf  # of no view that sees
    mask = torch.tensor([[False] * 4 + [True] * 2])
    problem = features, q, mask, None, [4, 3, 5], "softmax", unseen
    (got, _), (expected, _) = torch.ops.bkind3d_emulated.unproject(*problem), cases.reference_operator(*problem)
    assert expected.isfinite().all()
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(got, expected)


def test_projections_may_begin_at_any_address() -> None:
    features, q = torch.randn(1, 2, 4, 5, 6), torch.randn(25)
    rest = None, None, [3, 4, 5], "softmax", "zero"
    anywhere, aligned = q[1:].view(1, 2, 3, 4), q[1:].clone().view(1, 2, 3, 4)
    assert anywhere.data_ptr() % 16 == 4
    operator = torch.ops.bkind3d_emulated.unproject
    assert operator(features, anywhere, *rest)[0].equal(operator(features, aligned, *rest)[0])
