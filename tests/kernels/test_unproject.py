import itertools
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import scenes
import torch
import torch.nn.functional as F
from cases import unproject as cases
from cases.unproject import OPTIONS, only
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients, saved_elements
from torch import Tensor

from bkind3d_kernels import Unproject, VoxelGrid, explain, unproject
from bkind3d_kernels.reference import unproject as reference

RUNNABLE = [line.backend for line in explain("unproject") if line.available]
# Cameras so near that some voxels are behind them; one grid for all samples where a test does not say otherwise.
scene = partial(cases.scene, radius=0.9, grids=1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2),
    m=st.integers(1, 4),
    c=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)),
    options=st.sampled_from(OPTIONS),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from(RUNNABLE),
)
def test_agrees_with_the_oracle(n, m, c, size, shape, options, per_sample, seed, backend) -> None:
    features, projections, grid, mask, weights = scene(n, m, c, size, shape, seed=seed, grids=n if per_sample else 1)
    aggregation, unseen = options
    expected, expected_counts = oracle.unproject(
        *(t.numpy() for t in (features, projections, grid.affine)), shape, aggregation, unseen, mask, weights.numpy()
    )
    volume, counts = unproject(
        features,
        projections,
        grid,
        aggregation=aggregation,
        unseen=unseen,
        view_mask=mask,
        view_weights=only(weights, aggregation),
        return_counts=True,
        backend=backend,
    )
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(volume, expected, rtol=1e-9, atol=1e-9)


def test_scenes_cover_what_they_should() -> None:
    """The random scenes have voxels that no view, one view and several views see, and voxels behind cameras."""
    features, projections, grid, mask, _ = scene(2, 4, 1, (8, 8), (8, 8, 8))
    _, counts = unproject(features, projections, grid, view_mask=mask, return_counts=True)
    assert counts.unique().tolist()[:3] == [0, 1, 2]
    homogeneous = grid.coordinates().view(1, 1, -1, 3) @ projections[..., :3].mT + projections[..., 3].unsqueeze(-2)
    assert 0.01 < float((homogeneous[..., 2] <= 0).float().mean()) < 0.5
    assert not mask.all()


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_gradcheck(aggregation: str, unseen: str, backend: str) -> None:
    fast = backend == "triton"  # interpreted, it takes seconds, and the slow mode minutes
    for channels in (2, 3) if backend == "cuda" else (2,):  # a pack of float64, and none
        features, projections, grid, mask, weights = scene(n=1, m=3, c=channels, size=(3, 4), shape=(2, 3, 2), seed=4)

        run = partial(unproject, aggregation=aggregation, unseen=unseen, view_mask=mask, backend=backend)

        def function(run: Any, features: Tensor, projections: Tensor, affine: Tensor, *weights: Tensor) -> Tensor:
            grid = VoxelGrid(affine, (2, 3, 2))
            return run(features, projections, grid, view_weights=weights[0] if weights else None)

        inputs = [features, projections, grid.affine, *([weights] if aggregation == "weighted" else [])]
        leaves = [t.clone().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(partial(function, run), leaves, fast_mode=fast)


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradcheck_batch_and_weights(per_channel: bool, backend: str) -> None:
    features, projections, grid, _, weights = scene(n=2, m=2, c=2, size=(3, 3), shape=(2, 2, 2), grids=2, seed=1)
    weights = weights if per_channel else weights[..., 0]

    def function(features: Tensor, projections: Tensor, affine: Tensor, weights: Tensor) -> Tensor:
        grid = VoxelGrid(affine, (2, 2, 2))
        return unproject(
            features, projections, grid, aggregation="weighted", unseen="exclude", view_weights=weights, backend=backend
        )

    inputs = [features, projections, grid.affine, weights]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in inputs], fast_mode=True)


def test_weights_per_view_are_weights_of_every_channel(backend: str) -> None:
    features, projections, grid, _, weights = scene()
    run = partial(unproject, features, projections, grid, aggregation="weighted", backend=backend)
    per_view = weights[..., 0]
    assert torch.equal(run(view_weights=per_view), run(view_weights=per_view.unsqueeze(-1).expand_as(weights)))


@pytest.mark.parametrize("unseen", ["zero", "exclude"])
def test_equal_weights_are_the_mean(unseen: str, backend: str) -> None:
    features, projections, grid, mask, _ = scene(m=4)
    run = partial(unproject, features, projections, grid, unseen=unseen, view_mask=mask, backend=backend)
    weights = torch.full((1, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(run(aggregation="weighted", view_weights=weights), run(aggregation="mean"))


def test_sample_is_grid_sample_with_aligned_corners(backend: str) -> None:
    """One view, summed: the plain grid_sample of the usual implementation, after its normalisation to [-1, 1]."""
    features, projections, grid, _, _ = scene(n=2, m=1, c=3, size=(7, 9), shape=(5, 6, 7))
    world = F.pad(grid.coordinates().view(1, -1, 3), (0, 1), value=1.0)
    homogeneous = world @ projections[:, 0].mT  # (N, V, 3)
    uv = homogeneous[..., :2] / homogeneous[..., 2:]
    normalised = 2 * uv / torch.tensor([8.0, 6.0]).double() - 1
    expected = F.grid_sample(features[:, 0], normalised.unsqueeze(2), align_corners=True)[..., 0]  # (N, C, V)
    expected = expected * (homogeneous[..., 2] > 0).unsqueeze(1)
    volume = unproject(features, projections, grid, aggregation="sum", backend=backend)
    torch.testing.assert_close(volume.flatten(2), expected)
    assert float((expected != 0).double().mean()) > 0.1


def test_softmax_gradient_formula(backend: str) -> None:
    """dV/dv_m = w_m (1 + v_m − V), the identity on which every backward pass rests."""
    values = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    features = values.view(1, 3, 1, 1, 1).clone().requires_grad_()
    projections = torch.eye(3, 4, dtype=torch.float64).expand(1, 3, 3, 4)
    grid = VoxelGrid(torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]]).double(), (1, 1, 1))
    volume = unproject(features, projections, grid, backend=backend)
    volume.sum().backward()
    w = values.softmax(0)
    expected = (w * values).sum()
    torch.testing.assert_close(volume.flatten()[0], expected)
    assert features.grad is not None
    torch.testing.assert_close(features.grad.flatten(), w * (1 + values - expected))


def test_visibility_border(backend: str) -> None:
    """One tap inside is enough: u in [-1, W), depth above 0."""
    u = [-1.01, -0.99, 0.0, 3.99, 4.01]
    projections = torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]]])  # u = x, v = 1, depth 1
    for x, expected in zip(u, [0, 1, 1, 1, 0]):
        grid = VoxelGrid(torch.tensor([[[1.0, 0, 0, x], [0, 1, 0, 0], [0, 0, 1, 0]]]), (1, 1, 1))
        volume, counts = unproject(
            torch.ones(1, 1, 1, 3, 4), projections, grid, aggregation="sum", return_counts=True, backend=backend
        )
        assert counts.item() == expected
        assert volume.item() == pytest.approx(max(0.0, min(1.0, 1 + x, 4 - x)), abs=1e-6)
    behind = -projections
    _, counts = unproject(torch.ones(1, 1, 1, 3, 4), behind, grid, return_counts=True, backend=backend)
    assert counts.item() == 0


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_voxels_seen_by_none_are_zero_with_finite_gradients(aggregation: str, unseen: str, backend: str) -> None:
    features, projections, grid, _, weights = scene(m=2)
    for hidden in (projections * torch.tensor([1.0, 1.0, -1.0]).view(3, 1), projections * 0.0):
        inputs = [t.clone().requires_grad_() for t in (features, hidden, weights)]
        volume, counts = unproject(
            inputs[0],
            inputs[1],
            grid,
            aggregation=aggregation,
            unseen=unseen,
            view_mask=torch.zeros(1, 2, dtype=torch.bool),
            view_weights=only(inputs[2], aggregation),
            return_counts=True,
            backend=backend,
        )
        assert not volume.any()
        assert not counts.any()
        volume.sum().backward()
        assert all(not t.grad.any() for t in inputs if t.grad is not None)


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_a_masked_view_leaks_nothing(aggregation: str, unseen: str, backend: str) -> None:
    """NaN in a masked view reaches neither the volume nor any gradient."""
    features, projections, grid, _, weights = scene(m=3)
    mask = torch.tensor([[True, False, True]])
    poisoned = features.clone()
    poisoned[:, 1] = torch.nan
    results = []
    for given_features in (features, poisoned):
        run = partial(
            unproject,
            grid=grid,
            aggregation=aggregation,
            unseen=unseen,
            view_mask=mask,
            view_weights=only(weights, aggregation),
            backend=backend,
        )
        results.append((run(given_features, projections), *gradients(run, given_features, projections)))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_large_logits_do_not_overflow(backend: str) -> None:
    features, projections, grid, _, _ = scene(m=3)
    volume = unproject((features * 1e4).float(), projections, grid, backend=backend)
    assert volume.isfinite().all()
    assert volume.abs().max() > 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_dtypes(aggregation: str, unseen: str, dtype: torch.dtype, backend: str) -> None:
    """Half inputs are sampled and aggregated in float32: the one rounding that counts is that of the output."""
    features, projections, grid, mask, weights = scene(n=2, m=4, c=3, size=(9, 8), shape=(6, 5, 7))
    features = features.to(dtype)
    run = partial(
        unproject,
        aggregation=aggregation,
        unseen=unseen,
        view_mask=mask,
        view_weights=only(weights, aggregation),
        return_counts=True,
        backend=backend,
    )
    exact, exact_counts = run(features.double(), projections, grid)
    volume, counts = run(features, projections.float(), grid.to(dtype=torch.float32))
    assert volume.dtype == dtype
    assert counts.dtype == torch.uint8
    flipped = counts != exact_counts  # a voxel at the very border of an image may fall on the other side
    assert float(flipped.float().mean()) < 0.005
    keep = ~flipped.unsqueeze(1).expand_as(volume)
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    torch.testing.assert_close(volume.double()[keep], exact[keep], rtol=1e-4 + rounding, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_dtypes(dtype: torch.dtype, backend: str) -> None:
    features, projections, grid, _, _ = scene(n=2, m=3, c=3, size=(9, 8), shape=(4, 5, 4))
    features = features.to(dtype)
    run = partial(unproject, grid=grid, backend=backend)
    exact = gradients(run, features.double(), projections)
    got = gradients(run, features, projections.float())
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for a, b in zip(got, exact):
        assert float((a.double() - b).norm() / b.norm()) < 2 * eps


def test_memory_format_and_strides(backend: str) -> None:
    features, projections, grid, _, _ = scene(n=2, m=3, c=4, size=(6, 7), shape=(3, 4, 5))
    volume = unproject(features, projections, grid, backend=backend)
    assert volume.shape == (2, 4, 3, 4, 5)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    last = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    strided = torch.stack([features, features], dim=-1)[..., 0]
    for other in (last, strided):
        assert other.stride() != features.stride()
        assert torch.equal(unproject(other, projections, grid, backend=backend), volume)


def test_empty_batch(backend: str) -> None:
    features = torch.zeros(0, 3, 4, 5, 6, requires_grad=True)
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 2)
    volume, counts = unproject(features, torch.zeros(0, 3, 3, 4), grid, return_counts=True, backend=backend)
    assert volume.shape == (0, 4, 2, 2, 2)
    assert counts.shape == (0, 2, 2, 2)
    volume.sum().backward()
    assert features.grad is not None
    for weights in (torch.ones(0, 3), torch.ones(0, 3, 4)):
        kept = {"aggregation": "weighted", "view_weights": weights, "backend": backend}
        assert unproject(features, torch.zeros(0, 3, 3, 4), grid, **kept).shape == (0, 4, 2, 2, 2)


def test_many_views(backend: str) -> None:
    """As many as there may be; interpreted, that takes long."""
    views = 32 if backend == "triton" else 255
    features, projections, grid, _, _ = scene(m=views, c=4)
    volume, counts = unproject(features, projections, grid, return_counts=True, backend=backend)
    expected, expected_counts = unproject(features, projections, grid, return_counts=True, backend="reference")
    torch.testing.assert_close(volume, expected)
    assert torch.equal(counts, expected_counts)
    assert counts.max() > views / 2


def test_gradients_reach_what_requires_one(backend: str) -> None:
    """Whatever else does not."""
    features, projections, grid, mask, weights = scene(m=3, c=4, size=(5, 6), shape=(3, 3, 3))
    run = partial(unproject, grid=grid, aggregation="weighted", view_mask=mask, backend=backend)
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        leaves = [t.clone().requires_grad_(need) for t, need in zip((features, projections, weights), wanted)]
        run(leaves[0], leaves[1], view_weights=leaves[2]).square().sum().backward()
        for leaf, need in zip(leaves, wanted):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or leaf.grad.abs().sum() > 0


def test_every_element_is_written(backend: str, poisoned: None) -> None:
    features, projections, grid, _, _ = scene(m=3)
    run = partial(unproject, grid=grid, backend=backend)
    assert run(features, projections).isfinite().all()
    assert all(g.isfinite().all() for g in gradients(run, features, projections))


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_slabs_and_checkpoints_change_nothing(aggregation: str, unseen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, projections, grid, mask, weights = scene(n=2, m=3, c=2, size=(2, 3), shape=(11, 13, 3), grids=2)
    monkeypatch.setattr(reference, "SLAB_MAPS", 1)

    def function(features: Tensor, projections: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
        return unproject(
            features,
            projections,
            VoxelGrid(affine, grid.shape),
            aggregation=aggregation,
            unseen=unseen,
            view_mask=mask,
            view_weights=only(weights, aggregation),
            return_counts=True,
            backend="reference",
        )

    inputs = features, projections, grid.affine
    results = []
    for limit, slab in ((10**9, 10**9), (10**9, 100), (0, 100)):  # of 429 voxels
        monkeypatch.setattr(reference, "SLAB_MIN", slab)
        monkeypatch.setattr(reference, "CHECKPOINT_ELEMENTS", limit)
        results.append((*function(*inputs), *gradients(function, *inputs)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


def test_a_large_volume_keeps_no_per_view_samples() -> None:
    features = torch.randn(1, 4, 16, 16, 16, requires_grad=True)
    projections = scenes.projections(1, 4, (16, 16), torch.Generator().manual_seed(0)).float()
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 102)  # 68 M samples
    with saved_elements() as kept:
        volume = unproject(features, projections, grid, backend="reference")
    assert volume.requires_grad
    assert sum(kept) < 2 * features.numel()


def test_module_is_the_function(backend: str) -> None:
    features, projections, grid, mask, weights = scene()
    module = Unproject(aggregation="weighted", unseen="exclude", return_counts=True, backend=backend)
    options = dict(view_mask=mask, view_weights=weights)
    expected = unproject(
        features,
        projections,
        grid,
        aggregation="weighted",
        unseen="exclude",
        return_counts=True,
        backend=backend,
        **options,
    )
    for a, b in zip(module(features, projections, grid, **options), expected):
        assert torch.equal(a, b)
    assert "aggregation=weighted, unseen=exclude, return_counts=True" in repr(module)
    assert not list(module.parameters())


@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_second_derivative(aggregation: str, unseen: str) -> None:
    """Plain PyTorch gives the second derivative too; every other backend must refuse it."""
    features, projections, grid, mask, weights = scene(n=1, m=2, c=1, size=(3, 4), shape=(2, 2, 2), seed=4)

    def function(features: Tensor, projections: Tensor) -> Tensor:
        return unproject(
            features,
            projections,
            grid,
            aggregation=aggregation,
            unseen=unseen,
            view_mask=mask,
            view_weights=only(weights, aggregation),
            backend="reference",
        )

    inputs = features.requires_grad_(), projections.requires_grad_()
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


FEATURES, PROJECTIONS = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 3, 4)
GRID = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 2)
NAN = torch.full_like(PROJECTIONS, torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": FEATURES[0]}, r"features \(3, 4, 5, 6\): expected \(N, M, C, H, W\)"),
        ({"features": FEATURES.int()}, r"features \(2, 3, 4, 5, 6\): expected float32, .*, got torch.int32"),
        ({"features": FEATURES[:, :, :0]}, r"features \(2, 3, 0, 5, 6\): expected .* no empty dimension but N"),
        ({"features": FEATURES[:, :1].expand(2, 256, 4, 5, 6)}, "expected at most 255 views"),
        ({"projections": PROJECTIONS[0]}, r"projections \(3, 3, 4\): expected \(2, 3, 3, 4\)"),
        ({"projections": PROJECTIONS[:, :2]}, r"projections \(2, 2, 3, 4\): expected \(2, 3, 3, 4\)"),
        ({"projections": PROJECTIONS.bfloat16()}, r"projections \(2, 3, 3, 4\): expected float32 or float64, got"),
        ({"projections": NAN}, r"projections \(2, 3, 3, 4\): expected finite values"),
        ({"projections": PROJECTIONS.to("meta")}, r"projections .*: expected device cpu as features has, got meta"),
        ({"grid": VoxelGrid(GRID.affine.expand(3, 3, 4), (2, 2, 2))}, r"grid.affine \(3, 3, 4\): expected \(1, 3, 4\)"),
        ({"grid": GRID.to("meta")}, r"grid.affine \(1, 3, 4\): expected device cpu as features has, got meta"),
        ({"aggregation": "median"}, "aggregation 'median': expected one of softmax, mean, sum, max, weighted"),
        ({"unseen": "nan"}, "unseen 'nan': expected one of zero, exclude"),
        ({"view_mask": torch.ones(2, 3)}, r"view_mask \(2, 3\): expected bool, got torch.float32"),
        ({"view_mask": torch.ones(2, 2, dtype=torch.bool)}, r"view_mask \(2, 2\): expected \(2, 3\)$"),
        ({"view_mask": torch.ones(2, dtype=torch.bool)}, r"view_mask \(2,\): expected \(2, 3\)$"),
        ({"view_weights": torch.ones(2, 3)}, "view_weights .*: expected with aggregation='weighted' and with no other"),
        ({"aggregation": "weighted"}, "view_weights NoneType: expected with aggregation='weighted'"),
        (
            {"aggregation": "weighted", "view_weights": torch.ones(2, 3, 5)},
            r"view_weights \(2, 3, 5\): expected \(2, 3\) or \(2, 3, 4\)$",
        ),
        (
            {"aggregation": "weighted", "view_weights": torch.ones(2, 3, dtype=torch.int64)},
            r"view_weights \(2, 3\): expected float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ({"backend": "cupy"}, "backend 'cupy': expected one of auto, cuda, cpp, triton, reference"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {"features": FEATURES, "projections": PROJECTIONS, "grid": GRID} | changes
    with pytest.raises(ValueError, match=message) as caught:
        unproject(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["features", "projections", "grid", "view_mask", "view_weights"])
def test_wrong_types_are_named(name: str) -> None:
    arguments = {"features": FEATURES, "projections": PROJECTIONS, "grid": GRID, "aggregation": "weighted"}
    arguments |= {"view_weights": torch.ones(2, 3), name: "text"}
    with pytest.raises(TypeError, match=f"{name}: expected a "):
        unproject(**arguments)
