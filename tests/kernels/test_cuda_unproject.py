"""The CUDA kernels of unproject, emulated on the CPU: what the tests of every backend do not reach.

Built for the emulation, a few warps count as enough to fill the GPU, so that small volumes are walked in long runs.
"""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients
from native import emulation
from test_cpp_unproject import inputs, layouts, relative, run
from torch import Tensor

from bkind3d_kernels import backends, registration, unproject

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))

OPTIONS = list(itertools.product(["softmax", "mean", "sum", "max", "weighted"], ["zero", "exclude"]))
HALVES = (torch.bfloat16, torch.float16)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 8e-4}
# (N, M, C, map, volume). Channels: one, no pack, packs of 4 and of 8, a voxel for a whole warp, more than a warp.
# Views: a chunk, several, more than are projected at once. Maps: pixel, row, column. Volumes flat in z or x, long.
SHAPES = [
    (2, 4, 3, (9, 8), (6, 5, 7)),
    (1, 1, 1, (1, 1), (3, 2, 3)),
    (2, 4, 32, (12, 16), (5, 9, 9)),
    (1, 9, 20, (7, 1), (3, 5, 6)),
    (1, 6, 8, (5, 11), (2, 19, 1)),
    (1, 2, 132, (1, 3), (2, 2, 5)),
    (1, 33, 1, (6, 6), (1, 3, 34)),
    (1, 3, 68, (8, 9), (9, 7, 2)),
]


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._MODULES, ("unproject", "cuda"), emulation.backend("unproject"))
        yield


def geometry_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(shape: tuple, dtype: torch.dtype, aggregation: str, unseen: str, seed: int = 0) -> None:
    """Volume and all gradients against the reference in float64, whose features are rounded likewise."""
    features, projections, grid, mask, weights = inputs(*shape, dtype=dtype, seed=seed)
    geometry, tolerance = geometry_of(dtype), TOLERANCES[dtype]
    options = dict(mask=mask, aggregation=aggregation, unseen=unseen)
    exact = partial(run, grid=grid, **options, backend="reference")
    fast = partial(run, grid=grid.to(dtype=geometry), **options, backend="cuda")
    typed = features.to(dtype), projections.to(geometry), weights.to(geometry)
    assert relative(fast(*typed), exact(features, projections, weights)) < tolerance
    for got, expected in zip(gradients(fast, *typed), gradients(exact, features, projections, weights)):
        # The gradient of a maximum jumps where two views come within rounding of each other.
        jumps = aggregation == "max" and dtype != torch.float64
        assert relative(got, expected) < (0.02 if jumps else tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_agrees_with_the_reference(aggregation: str, unseen: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        compare(shape, dtype, aggregation, unseen)


@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 2, 4, 5, 8, 13]),
    c=st.sampled_from([1, 2, 4, 5, 8, 12, 16, 24, 31, 40]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 13), st.integers(1, 11)),
    options=st.sampled_from(OPTIONS),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_shape(m, c, size, shape, options, deterministic, seed) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        compare((1, m, c, size, shape), torch.float64, *options, seed=seed)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", HALVES)
def test_error_of_half_formats(dtype: torch.dtype) -> None:
    """At most twice that of the reference in the same dtype."""
    features, projections, grid, mask, _ = inputs(1, 4, 16, (9, 12), (6, 7, 8), dtype)
    options = dict(view_mask=mask)
    exact = partial(unproject, grid=grid, **options, backend="reference")
    given = features.to(dtype), projections.float()
    ours, theirs = (
        partial(unproject, grid=grid.to(dtype=torch.float32), **options, backend=name) for name in ("cuda", "reference")
    )
    expected = exact(features, projections), *gradients(exact, features, projections)
    for e, a, b in zip(
        expected, (ours(*given), *gradients(ours, *given)), (theirs(*given), *gradients(theirs, *given))
    ):
        assert relative(a, e) <= 2 * relative(b, e) + 1e-6


def test_most_views() -> None:
    features, projections, grid, _, _ = inputs(1, 255, 4, (5, 6), (2, 3, 4))
    volume, counts = unproject(features, projections, grid, return_counts=True, backend="cuda")
    expected, expected_counts = unproject(features, projections, grid, return_counts=True, backend="reference")
    torch.testing.assert_close(volume, expected)
    assert torch.equal(counts, expected_counts)
    assert counts.max() > 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 7])
def test_layouts_of_features_and_gradient(dtype: torch.dtype, channels: int) -> None:
    features, projections, grid, mask, _ = inputs(2, 3, channels, (6, 7), (3, 4, 9), dtype)
    function = partial(unproject, projections=projections, grid=grid, view_mask=mask, backend="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        expected = None
        for name, given_features in layouts(features.to(dtype)).items():
            leaf = given_features.detach().requires_grad_()
            volume = function(leaf)
            gradient = torch.randn(volume.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            for layout in (
                gradient,
                gradient.contiguous(memory_format=torch.channels_last_3d),
                torch.stack([gradient, gradient], dim=2)[:, :, 0],
            ):
                result = volume.detach(), *torch.autograd.grad(volume, leaf, layout, retain_graph=True)
                expected = expected or result
                assert all(torch.equal(a, b) for a, b in zip(result, expected)), name
            (got,) = torch.autograd.grad(volume.sum(), leaf)  # an expanded gradient of stride 0
            (same,) = torch.autograd.grad(function(leaf), leaf, torch.ones_like(volume))
            assert torch.equal(got, same)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the order of blocks and threads ----


def backward(
    features: Tensor,
    q: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    shape: list[int],
    options: tuple[str, str],
    **flags,
) -> tuple[Tensor, ...]:
    """With a fixed gradient of the volume."""
    n, _, c = features.shape[:3]
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(n, c, *shape, generator=generator).to(features.dtype)
    gradient = flags.pop("gradient", gradient)
    wanted = True, True, weights is not None
    return torch.ops.bkind3d_emulated.unproject_backward(
        gradient, features, q, mask, weights, shape, *options, *wanted, flags["deterministic"]
    )


def both_orders(*arguments, **flags) -> list[tuple[Tensor, ...]]:
    results = []
    for descending in (False, True):
        with emulation.order(descending=descending):
            results.append(backward(*arguments, **flags))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("options", [("softmax", "zero"), ("weighted", "exclude"), ("max", "zero")])
def test_deterministic_backward_does_not_depend_on_the_order(options: tuple[str, str], dtype: torch.dtype) -> None:
    for shape in ((2, 4, 8, (7, 9), (6, 9, 10)), (1, 6, 5, (7, 9), (6, 5, 9))):
        features, projections, grid, mask, weights = inputs(*shape, dtype=dtype)
        q = grid.voxel_to_pixel(projections).to(geometry_of(dtype))
        weights = weights.to(q.dtype) if options[0] == "weighted" else None
        arguments = features.to(dtype), q, mask, weights, list(shape[4]), options
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
    features, projections, grid, mask, _ = inputs(1, 3, 4, (6, 7), (5, 6, 4), torch.float32)
    q = grid.voxel_to_pixel(projections).float()
    gradient = torch.randn(1, 4, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    arguments = features.float(), q, mask, None, [5, 6, 4], ("mean", "zero")
    expected = backward(*arguments, gradient=gradient, deterministic=False)[0]
    for exponent in (-120, -40, 0, 40, 120):
        got = backward(*arguments, gradient=gradient * 2.0**exponent, deterministic=True)[0]
        torch.testing.assert_close(got / 2.0**exponent, expected, rtol=1e-5, atol=1e-6)
    assert not backward(*arguments, gradient=torch.zeros_like(gradient), deterministic=True)[0].any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_deterministic_backward_of_what_is_not_finite_is_nan_in_its_sample(value: float) -> None:
    features, projections, grid, mask, _ = inputs(2, 3, 4, (6, 7), (5, 6, 4), torch.float32)
    q = grid.voxel_to_pixel(projections).float()
    gradient = torch.ones(2, 4, 5, 6, 4)
    gradient[1] = value
    mask[1] = True
    got = backward(features.float(), q, mask, None, [5, 6, 4], ("sum", "zero"), gradient=gradient, deterministic=True)[
        0
    ]
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


# ---- memory, derivatives, registration ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_element_is_written_as_the_fakes_declare(poisoned: None, deterministic: bool, dtype: torch.dtype) -> None:
    fake, fake_backward = registration._OPERATORS["unproject"][:2]
    for shape in ((2, 3, 8, (4, 6), (2, 3, 5)), (2, 5, 3, (4, 6), (2, 3, 5)), (0, 3, 8, (4, 6), (2, 3, 5))):
        features, projections, grid, mask, weights = inputs(*shape, dtype=dtype)
        q = grid.voxel_to_pixel(projections).to(geometry_of(dtype))
        common = features.to(dtype), q, mask, weights.to(q.dtype), list(shape[4]), "weighted", "exclude"
        results = torch.ops.bkind3d_emulated.unproject(*common)
        gradient = torch.ones_like(results[0])
        for wanted in itertools.product([False, True], repeat=3):
            flags = *wanted, deterministic
            got = (*results, *torch.ops.bkind3d_emulated.unproject_backward(gradient, *common, *flags))
            expected = (*fake(*common), *fake_backward(gradient, *common, *flags))
            for a, b in zip(got, expected):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                assert a.isfinite().all()


def test_a_volume_without_voxels() -> None:
    features, projections, grid, mask, weights = inputs(1, 3, 8, (4, 6), (2, 3, 5), torch.float32)
    q = grid.voxel_to_pixel(projections).float()
    common = features.float(), q, mask, weights.float(), [2, 0, 5], "weighted", "zero"
    volume, counts = torch.ops.bkind3d_emulated.unproject(*common)
    assert (volume.shape, counts.shape) == ((1, 8, 2, 0, 5), (1, 2, 0, 5))
    for deterministic in (False, True):
        for g in torch.ops.bkind3d_emulated.unproject_backward(volume, *common, True, True, True, deterministic):
            assert g.numel() > 0
            assert not g.any()


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
@pytest.mark.parametrize("channels", [2, 3])
def test_gradcheck(aggregation: str, unseen: str, channels: int) -> None:
    features, projections, grid, mask, weights = inputs(1, 3, channels, (4, 5), (3, 4, 2), seed=2)
    function = partial(run, grid=grid, mask=mask, aggregation=aggregation, unseen=unseen, backend="cuda")
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (features, projections, weights)])


@pytest.mark.parametrize("layout", ["contiguous", "cut out of channels last", "strided"])
@pytest.mark.parametrize("options", [("softmax", "zero"), ("weighted", "exclude")])
def test_opcheck(layout: str, options: tuple[str, str]) -> None:
    features, projections, grid, mask, weights = inputs(2, 3, 4, (4, 6), (2, 3, 5), torch.float32)
    q = grid.voxel_to_pixel(projections).float()
    q = torch.stack([q, q], dim=-1)[..., 0].requires_grad_()
    features = layouts(features.float())[layout].requires_grad_()
    weights = weights.float().requires_grad_() if options[0] == "weighted" else None
    common = features, q, mask, weights, [2, 3, 5], *options
    operators = torch.ops.bkind3d_emulated
    torch.library.opcheck(operators.unproject.default, common)
    gradient = torch.ones_like(operators.unproject(*common)[0])
    torch.library.opcheck(
        operators.unproject_backward.default,
        (gradient, *common, True, True, weights is not None, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unseen", ["zero", "exclude"])
def test_views_that_see_after_a_chunk_that_does_not(dtype: torch.dtype, unseen: str) -> None:
    features, projections, grid, _, _ = inputs(1, 6, 4, (9, 8), (4, 3, 5), dtype=dtype, seed=7)
    features[:, :4] = torch.inf  # of no view that sees
    mask = torch.tensor([[False] * 4 + [True] * 2])
    typed, grid = (features.to(dtype), projections.to(dtype)), grid.to(dtype=dtype)
    got, expected = (
        unproject(*typed, grid, view_mask=mask, unseen=unseen, backend=backend) for backend in ("cuda", "reference")
    )
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


def test_bad_arguments_of_the_operator_are_refused() -> None:
    features, q = torch.zeros(1, 2, 4, 3, 3), torch.zeros(1, 2, 3, 4)
    good = dict(features=features, q=q, mask=None, weights=None, shape=[2, 2, 2], aggregation="sum", unseen="zero")
    for changes, message in [
        ({"features": features[0]}, r"features: expected \(N, M, C, H, W\)"),
        ({"features": features.int()}, "features: expected float32"),
        ({"features": features[:, :0]}, "features: expected 1 to 255 views"),
        ({"q": q[:, :1]}, r"q: expected \(N, M, 3, 4\)"),
        ({"mask": torch.ones(1, 2)}, r"view_mask: expected \(N, M\) bool"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, "view_mask: expected 2 elements"),
        ({"weights": torch.ones(1, 2, 4)}, "view_weights: expected with aggregation 'weighted'"),
        ({"aggregation": "weighted", "weights": torch.ones(1, 2)}, "view_weights: expected 8 elements"),
        ({"shape": [2, 2]}, "shape: expected three integers"),
        ({"shape": [2, -2, 2]}, "shape: expected lengths below"),
        ({"shape": [2**11, 2**11, 2**9]}, "shape: too many voxels"),
        ({"aggregation": "median"}, "aggregation 'median': expected"),
        ({"unseen": "nan"}, "unseen 'nan': expected"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.bkind3d_emulated.unproject(*(good | changes).values())
    backward = torch.ops.bkind3d_emulated.unproject_backward
    with pytest.raises(RuntimeError, match=r"grad_volume: expected \(N, C, X, Y, Z\)"):
        backward(torch.zeros(1, 4, 2, 2, 3), *good.values(), True, False, False, False)
    with pytest.raises(RuntimeError, match="needs_weights: there are no view_weights"):
        backward(torch.zeros(1, 4, 2, 2, 2), *good.values(), True, False, True, False)
