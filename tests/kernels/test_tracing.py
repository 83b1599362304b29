"""torch.compile, torch.export, autocast and checkpointing, each through the whole chain from features to edge maps."""

from typing import Any

import pytest
import scenes
import torch
from measure import gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bkind3d_kernels import (
    EdgeRasterizer,
    GroupNormAct,
    LinearSoftArgmax3d,
    SoftArgmax3d,
    Unproject,
    VoxelGrid,
    group_norm_act,
    linear_soft_argmax3d,
    rasterize_edges,
    soft_argmax3d,
    unproject,
)
from bkind3d_kernels.geometry import project_points, rescale_projections

SIZE, SHAPE = (6, 7), (4, 5, 3)


class Chain(nn.Module):
    """Features to volume, keypoints, their projections into the first view, and its edge maps."""

    def __init__(self, backend: str, aggregation: str = "softmax", unseen: str = "zero") -> None:
        super().__init__()
        self.unproject = Unproject(aggregation=aggregation, unseen=unseen, return_counts=True, backend=backend)
        self.soft_argmax = SoftArgmax3d(temperature=0.2, return_peak=True, return_covariance=True, backend=backend)
        self.normalise = GroupNormAct(2, 4, backend=backend).requires_grad_(False)
        linear = "auto" if backend == "cuda" else backend  # it has no CUDA kernels
        self.linear_soft_argmax = LinearSoftArgmax3d(4, 2, backend=linear).requires_grad_(False)
        self.linear_soft_argmax.weight.copy_(torch.linspace(-3, 3, 8).view(2, 4))
        self.rasterize = EdgeRasterizer([(4, 5), (8, 10)], [1.0, 1.5], backend=backend)

    def forward(self, features: Tensor, projections: Tensor, grid: VoxelGrid, weights: Tensor) -> tuple[Tensor, ...]:
        volume, counts = self.unproject(features, projections, grid)
        volume = self.normalise(volume, volume)
        coordinates, peak, covariance = self.soft_argmax(volume, grid)
        located = self.linear_soft_argmax(volume, grid)
        pixels, depth = project_points(rescale_projections(projections[:, 0], SIZE, (4, 5)), coordinates)
        maps = self.rasterize(pixels, weights)
        return volume, counts, coordinates, peak, covariance, located, pixels, depth, *maps


def inputs(n: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, VoxelGrid, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 3, 4, *SIZE, generator=generator).to(dtype)
    projections = scenes.projections(n, 3, SIZE, generator).float()
    grid = scenes.grid(SHAPE, generator).to(dtype=torch.float32)
    return features, projections, grid, torch.rand(6, generator=generator)


def differentiated(model, features: Tensor, projections: Tensor, grid: VoxelGrid, weights: Tensor):
    return gradients(
        lambda f, p, a, w: model(f, p, VoxelGrid(a, SHAPE), w), features, projections, grid.affine, weights
    )


def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    model = Chain(backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs()), model(*inputs())):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()
    for a, b in zip(differentiated(compiled, *inputs()), differentiated(model, *inputs())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["softmax", "mean", "sum", "max", "weighted"])
def test_every_aggregation_compiles(aggregation: str, backend: str) -> None:
    torch._dynamo.reset()
    module = Unproject(aggregation=aggregation, unseen="exclude", backend=backend)
    options = {"view_mask": torch.tensor([[True, True, False]] * 2)}
    if aggregation == "weighted":
        options["view_weights"] = torch.rand(2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs()[:3], **options), module(*inputs()[:3], **options))


def test_compiles_with_inductor(backend: str) -> None:
    """Generated code, for the forward pass alone: its compilation takes seconds."""
    torch._dynamo.reset()
    module = Unproject(aggregation="sum", backend=backend)
    compiled = torch.compile(module, fullgraph=True)
    volume, expected = compiled(*inputs()[:3]), module(*inputs()[:3])
    torch.testing.assert_close(volume, expected, rtol=1e-4, atol=1e-5)
    assert volume.stride() == expected.stride()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_function_takes_other_temperatures_and_widths(dynamic: bool | None, backend: str) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    logits, keypoints = torch.randn(1, 2, *SHAPE, generator=generator), torch.rand(1, 3, 2, generator=generator) * 5
    grid = scenes.grid(SHAPE, generator).to(dtype=torch.float32)

    def function(logits: Tensor, keypoints: Tensor, number: float) -> tuple[Tensor, Tensor]:
        return (
            soft_argmax3d(logits, grid, temperature=number, backend=backend),
            rasterize_edges(keypoints, torch.ones(3), (5, 6), number, backend=backend),
        )

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)
    for number in (1.0, 0.9, 0.5):
        for a, b in zip(compiled(logits, keypoints, number), function(logits, keypoints, number)):
            torch.testing.assert_close(a, b)


def test_compiled_model_takes_other_batch_sizes(backend: str) -> None:
    torch._dynamo.reset()
    model = Chain(backend)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for n in (2, 5):
        for a, b in zip(compiled(*inputs(n)), model(*inputs(n))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_the_grid_as_an_input(strict: bool, backend: str) -> None:
    model = Chain(backend)
    program = torch.export.export(model, inputs(), strict=strict)
    features, projections, grid, weights = inputs()
    moved = VoxelGrid(grid.affine + 0.05, grid.shape)
    for a, b in zip(
        program.module()(features, projections, moved, weights), model(features, projections, moved, weights)
    ):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_everything_exact(backend: str) -> None:
    model = Chain(backend)
    expected = (*model(*inputs()), *differentiated(model, *inputs()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16  # autocast is on
        got = (*model(*inputs()), *differentiated(model, *inputs()))
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_leaves_geometry_exact() -> None:
    _, projections, grid, _ = inputs()

    def geometry() -> list[Tensor]:
        points = grid.coordinates().view(1, 1, -1, 3)
        box = VoxelGrid.box(torch.ones(3), (1, 2, 3), (4, 5, 6), torch.linalg.qr(torch.arange(9.0).view(3, 3).sin())[0])
        return [
            points,
            box.affine,
            grid.voxel_to_pixel(projections),
            rescale_projections(projections, (6, 7), (12, 9)),
            *project_points(projections, points),
        ]

    expected = geometry()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(geometry(), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_keep_geometry_in_float32(dtype: torch.dtype, backend: str) -> None:
    volume, _, *rest = Chain(backend)(*inputs(dtype=dtype))
    assert volume.dtype == dtype
    assert all(t.dtype == torch.float32 for t in rest)


def test_non_reentrant_checkpointing(backend: str) -> None:
    model = Chain(backend)

    def recomputed(*arguments):
        return checkpoint(model, *arguments, use_reentrant=False)

    for a, b in zip(differentiated(recomputed, *inputs()), differentiated(model, *inputs())):
        assert torch.equal(a, b)


# ---- sizes that change ----

AFFINE = VoxelGrid.cube((0.0, 0.0, 2.0), 1.0, 3).affine
# Of each operation: sizes that differ from each other, tensors of such sizes, and a call.
RESIZED: dict[str, tuple[dict[str, int], Any, Any]] = {
    "unproject": (
        {"N": 11, "M": 10, "C": 5, "H": 7, "W": 8},
        lambda N, M, C, H, W: (torch.randn(N, M, C, H, W), torch.randn(N, M, 3, 4), AFFINE),
        lambda features, projections, affine: unproject(features, projections, VoxelGrid(affine, (4, 6, 9))),
    ),
    "soft_argmax3d": (
        {"N": 11, "J": 10, "X": 5, "Y": 7, "Z": 8},
        lambda N, J, X, Y, Z: (torch.randn(N, J, X, Y, Z), AFFINE),
        lambda logits, affine: soft_argmax3d(logits, VoxelGrid(affine, tuple(logits.shape[2:]))),
    ),
    "linear_soft_argmax3d": (
        {"N": 11, "C": 6, "J": 10, "X": 5, "Y": 7, "Z": 8},
        lambda N, C, J, X, Y, Z: (torch.randn(N, C, X, Y, Z), torch.randn(J, C), AFFINE),
        lambda h, weight, affine: linear_soft_argmax3d(h, weight, None, VoxelGrid(affine, tuple(h.shape[2:]))),
    ),
    "rasterize_edges": (
        {"N": 11, "J": 5},
        lambda N, J: (torch.randn(N, J, 2), torch.rand(J * (J - 1) // 2)),
        lambda keypoints, weights: rasterize_edges(keypoints, weights, (8, 9), 1.5),
    ),
    "group_norm_act": (
        {"N": 11, "C": 6, "H": 7, "W": 8},
        lambda N, C, H, W: (torch.randn(N, C, H, W), torch.randn(C), torch.randn(C)),
        lambda x, weight, bias: group_norm_act(x, 1, weight, bias),
    ),
}


@pytest.mark.parametrize(("op", "size"), [(op, size) for op, (sizes, *_) in RESIZED.items() for size in sizes])
def test_a_size_that_changes_is_compiled_once_more_at_most(op: str, size: str) -> None:
    sizes, make, call = RESIZED[op]
    for dynamic, graphs in ((None, 2), (True, 1)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic)
        for more in (0, 13, 14, 15):
            compiled(*make(**(sizes | {size: sizes[size] + more})))
        assert counter.frame_count == graphs
