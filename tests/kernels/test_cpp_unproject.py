"""Unprojection in C++: every instruction set, dtype and layout against the float64 reference."""

import itertools
from functools import partial

import pytest
import scenes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients, saved_elements
from torch import Tensor

from bkind3d_kernels import VoxelGrid, library, unproject

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))

OPTIONS = list(itertools.product(["softmax", "mean", "sum", "max", "weighted"], ["zero", "exclude"]))
SETS = library.INSTRUCTION_SETS[: library.INSTRUCTION_SETS.index(library.instruction_set() or "baseline") + 1]
HALVES = (torch.bfloat16, torch.float16)
# (N, M, C, map, volume): channels below, at and above a vector's width, of every remainder; M unrolled and not.
SHAPES = [
    (2, 4, 3, (9, 8), (6, 5, 7)),
    (1, 1, 1, (1, 1), (3, 2, 3)),
    (1, 4, 32, (12, 16), (8, 6, 40)),
    (2, 9, 70, (7, 9), (3, 5, 37)),
    (1, 3, 15, (12, 10), (4, 5, 20)),
    (1, 7, 16, (5, 11), (4, 5, 21)),
    (1, 2, 129, (4, 3), (2, 2, 65)),
]


def inputs(n, m, c, size, shape, dtype=torch.float64, seed=0):
    """Features rounded to ``dtype`` but in float64, projections, grid, mask and weights, all float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, m, c, *size, generator=generator).to(dtype).double()
    projections = scenes.projections(n, m, size, generator, radius=1.2)
    weights = torch.rand(n, m, c, generator=generator).double() + 0.1
    mask = torch.rand(n, m, generator=generator) > 0.15
    return features, projections, scenes.grid(shape, generator, n), mask, weights


def run(features, projections, weights, *, grid, mask, aggregation, unseen, backend):
    """Volume; weights are used with "weighted" alone."""
    volume = unproject(
        features,
        projections,
        grid,
        aggregation=aggregation,
        unseen=unseen,
        view_mask=mask,
        view_weights=weights if aggregation == "weighted" else None,
        backend=backend,
    )
    return volume if aggregation == "weighted" else volume + 0 * weights.sum().to(volume.dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_agrees_with_the_reference(aggregation: str, unseen: str, dtype: torch.dtype, name: str) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        features, projections, grid, mask, weights = inputs(*shape, dtype=dtype)
        exact = partial(run, grid=grid, mask=mask, aggregation=aggregation, unseen=unseen, backend="reference")
        given_grid = grid.to(dtype=geometry)
        fast = partial(run, grid=given_grid, mask=mask, aggregation=aggregation, unseen=unseen, backend="cpp")
        typed = features.to(dtype), projections.to(geometry), weights.to(geometry)
        with library.use_instruction_set(name):
            volume = fast(*typed)
            got = gradients(fast, *typed)
        expected = gradients(exact, features, projections, weights)
        assert relative(volume, exact(features, projections, weights)) < tolerance
        for a, b in zip(got, expected):
            assert a.dtype == typed[0].dtype or a.dtype == geometry
            # The gradient of a maximum jumps where two views come within rounding of each other.
            jumps = aggregation == "max" and dtype != torch.float64
            assert relative(a, b) < (0.02 if jumps else tolerance)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2),
    m=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13]),
    c=st.integers(1, 40),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 19)),
    options=st.sampled_from(OPTIONS),
    name=st.sampled_from(SETS),
    seed=st.integers(0, 2**16),
)
def test_every_shape(n, m, c, size, shape, options, name, seed) -> None:
    """float32 to rtol 1e-4, atol 1e-5; voxels at the very border of a view may fall on the other side, few of them."""
    features, projections, grid, mask, weights = inputs(n, m, c, size, shape, torch.float32, seed)
    aggregation, unseen = options
    options = dict(aggregation=aggregation, unseen=unseen, view_mask=mask, return_counts=True)
    given_weights = weights if aggregation == "weighted" else None
    exact, counts = unproject(features, projections, grid, **options, view_weights=given_weights, backend="reference")
    with library.use_instruction_set(name):
        volume, got = unproject(
            features.float(),
            projections.float(),
            grid.to(dtype=torch.float32),
            **options,
            view_weights=given_weights,
            backend="cpp",
        )
    flipped = got != counts
    assert int(flipped.sum()) <= 1 + 0.01 * flipped.numel()
    keep = (~flipped).unsqueeze(1).expand_as(volume)
    torch.testing.assert_close(volume.double()[keep], exact[keep], rtol=1e-4, atol=1e-5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_threads_change_nothing(aggregation: str, unseen: str, threads) -> None:
    """Forward always, backward with use_deterministic_algorithms; else backward up to the order of sums."""
    features, projections, grid, mask, weights = inputs(1, 4, 20, (12, 16), (8, 8, 24))
    function = partial(run, grid=grid, mask=mask, aggregation=aggregation, unseen=unseen, backend="cpp")
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        torch.use_deterministic_algorithms(True)
        try:
            exact = gradients(function, features, projections, weights)
        finally:
            torch.use_deterministic_algorithms(False)
        loose = gradients(function, features, projections, weights)
        assert all(torch.equal(a, b) for a, b in zip(loose, gradients(function, features, projections, weights)))
        results.append((function(features, projections, weights), exact, loose))
    for volume, exact, loose in results[1:]:
        assert torch.equal(volume, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(exact, results[0][1]))
        for a, b in zip(loose, exact):
            torch.testing.assert_close(a, b)


def layouts(features: Tensor) -> dict[str, Tensor]:
    """The same values in several memory layouts."""
    n, m, _, h, w = features.shape
    last = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (n, m))
    wide = torch.zeros(n, m, h + 3, w + 2, features.shape[2] + 5, dtype=features.dtype)
    cut = wide.permute(0, 1, 4, 2, 3)[:, :, 2:-3, 1 : h + 1, 2:]
    cut.copy_(features)
    return {
        "contiguous": features.contiguous(),
        "channels last": last,
        "cut out of channels last": cut,
        "transposed": features.transpose(3, 4).contiguous().transpose(3, 4),
        "strided": torch.stack([features, features], dim=-1)[..., 0],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_features_and_gradient(dtype: torch.dtype) -> None:
    features, projections, grid, mask, _ = inputs(2, 3, 19, (6, 7), (3, 4, 18), dtype)
    function = partial(unproject, projections=projections, grid=grid, view_mask=mask, backend="cpp")
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
            (got,) = torch.autograd.grad(volume, leaf, layout, retain_graph=True)
            result = volume.detach(), got
            expected = expected or result
            assert all(torch.equal(a, b) for a, b in zip(result, expected)), name
        (got,) = torch.autograd.grad(volume.sum(), leaf)  # an expanded gradient of stride 0
        (same,) = torch.autograd.grad(function(leaf), leaf, torch.ones_like(volume))
        assert torch.equal(got, same)


def samples():
    """Arguments of the operator: layouts, options, dtypes and an empty batch."""
    for name, aggregation, unseen, dtype in [
        ("contiguous", "softmax", "zero", torch.float64),
        ("cut out of channels last", "softmax", "exclude", torch.float32),
        ("transposed", "weighted", "exclude", torch.float64),
        ("strided", "max", "zero", torch.bfloat16),
        ("channels last", "mean", "exclude", torch.float32),
    ]:
        features, projections, grid, mask, weights = inputs(2, 3, 5, (4, 6), (2, 3, 5), dtype)
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        q = grid.voxel_to_pixel(projections).to(geometry)
        q = torch.stack([q, q], dim=-1)[..., 0]
        weights = weights[..., :1].to(geometry).expand(2, 3, 5) if aggregation == "weighted" else None
        yield layouts(features.to(dtype))[name], q, mask, weights, [2, 3, 5], aggregation, unseen
    yield torch.zeros(0, 2, 3, 4, 4), torch.zeros(0, 2, 3, 4), None, None, [2, 2, 2], "softmax", "zero"


@pytest.mark.parametrize("case", range(6))
def test_opcheck(case: int) -> None:
    features, q, mask, weights, *options = list(samples())[case]
    for tensor in (features, q, weights):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.bkind3d.unproject.default, (features, q, mask, weights, *options))
    volume = torch.ops.bkind3d.unproject(features, q, mask, weights, *options)[0]
    assert volume.requires_grad
    for gradient in (torch.randn(volume.shape).to(volume.dtype), torch.ones_like(volume)):
        for wanted in ((True, True, weights is not None), (True, False, False), (False, True, False)):
            torch.library.opcheck(
                torch.ops.bkind3d.unproject_backward.default,
                (gradient, features, q, mask, weights, *options, *wanted, False),
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )


def test_keeps_nothing_but_its_inputs() -> None:
    features = torch.randn(1, 4, 16, 16, 16, requires_grad=True)
    projections = scenes.projections(1, 4, (16, 16), torch.Generator().manual_seed(0)).float()
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 32)
    with saved_elements() as kept:
        volume = unproject(features, projections, grid, backend="cpp")
    assert volume.requires_grad
    assert sum(kept) <= features.numel() + 4 * 12


def test_only_what_is_needed_is_computed() -> None:
    """Gradients reach what requires one, whatever else does not."""
    features, projections, grid, mask, weights = inputs(1, 3, 4, (5, 6), (3, 3, 3))
    tensors = [features, projections, weights]
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, wanted)]
        unproject(
            leaves[0],
            leaves[1],
            grid,
            aggregation="weighted",
            view_mask=mask,
            view_weights=leaves[2],
            backend="cpp",
        ).square().sum().backward()
        for leaf, need in zip(leaves, wanted):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or leaf.grad.abs().sum() > 0
