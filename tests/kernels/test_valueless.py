"""Tensors whose values cannot be read one by one: fake ones, and those inside torch.func.vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bkind3d_kernels import (
    VoxelGrid,
    group_norm_act,
    library,
    linear_soft_argmax3d,
    rasterize_edges,
    soft_argmax3d,
    unproject,
)
from bkind3d_kernels.geometry import checks_values, project_points

SHAPE = (4, 3, 2)
# Arguments of one sample, and the operation on a batch of them.
OPERATIONS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Any]]] = {
    "unproject": (
        ((2, 3, 8, 8), (2, 3, 4)),
        lambda backend, x, p: unproject(x, p, VoxelGrid.box((0.0, 0.0, 2.0), (1, 1, 1), SHAPE), backend=backend),
    ),
    "soft_argmax3d": (
        ((5, *SHAPE), (3, 4)),
        lambda backend, x, affine: soft_argmax3d(x, VoxelGrid(affine, SHAPE), backend=backend),
    ),
    "linear_soft_argmax3d": (
        ((3, *SHAPE), (3, 4)),
        lambda backend, x, affine: linear_soft_argmax3d(
            x, torch.ones(5, 3), torch.zeros(5), VoxelGrid(affine, SHAPE), backend=backend
        ),
    ),
    "rasterize_edges": (
        ((5, 2), (10,)),
        lambda backend, x, weights: rasterize_edges(x, weights, [(8, 6)], [1.5], backend=backend)[0],
    ),
    "group_norm_act": (
        ((4, *SHAPE), (4, *SHAPE)),
        lambda backend, x, y: group_norm_act(x, 2, torch.ones(4), torch.zeros(4), residual=y, backend=backend),
    ),
}


@pytest.mark.parametrize("chosen", ["auto", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_fake_tensors_go_through_forward_and_backward(name: str, chosen: str) -> None:
    shapes, run = OPERATIONS[name]
    torch.manual_seed(0)
    real = [torch.rand(2, *shape) for shape in shapes]
    expected = run(chosen, *real)
    with FakeTensorMode():
        fake = [torch.empty(2, *shape).requires_grad_() for shape in shapes]
        output = run(chosen, *fake)
        output.sum().backward()
    assert (output.shape, output.stride(), output.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert fake[0].grad is not None
    assert fake[0].grad.shape == fake[0].shape


# Inside vmap torch cannot be asked for the memory layout that the reference of group_norm_act returns, and it does not
# take the lists of the compiled rasterize_edges.
MAPPED = [(name, "reference") for name in OPERATIONS if name != "group_norm_act"]
MAPPED += [(name, "auto") for name in OPERATIONS if name != "rasterize_edges"]
if library.reason("_cpu") is not None:
    MAPPED = MAPPED[:4]  # "auto" is the reference


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "chosen"), MAPPED)
def test_operations_can_be_mapped(name: str, chosen: str) -> None:
    shapes, run = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = [torch.rand(3, 1, *shape) for shape in shapes]

    def mapped(*sample: Tensor) -> Tensor:
        return run(chosen, *sample)

    expected = torch.stack([mapped(*sample) for sample in zip(*inputs, strict=True)])
    torch.testing.assert_close(torch.func.vmap(mapped)(*inputs), expected)


def test_values_are_read_where_there_are_some() -> None:
    assert checks_values(torch.zeros(3))
    assert not checks_values(torch.zeros(0))
    with FakeTensorMode():
        assert not checks_values(torch.zeros(3))
    seen = []
    torch.func.vmap(lambda x: seen.append(checks_values(x)) or x)(torch.zeros(3, 2))
    assert seen == [False]
    with pytest.raises(ValueError, match="found NaN"):
        project_points(torch.full((3, 4), torch.nan), torch.zeros(1, 3))


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_compiled_kernels_name_the_reference_under_transforms(op: str, transform: Callable[..., Any]) -> None:
    shapes, run = OPERATIONS[op]
    first, *rest = (torch.rand(1, *shape) for shape in shapes)
    rest = [torch.eye(3, 4).expand(t.shape) if t.shape[-2:] == (3, 4) else t for t in rest]
    for backend in ("auto", "reference"):
        derivative = transform(lambda x, b=backend: run(b, x, *rest).sum())
        if backend == "reference":
            assert derivative(first).shape == first.shape
        else:
            with pytest.raises(RuntimeError, match=rf"^{op}: .* use backend='reference' for that, or loss.backward"):
                derivative(first)


def test_drawing_names_the_reference_under_vmap() -> None:
    with pytest.raises(RuntimeError, match=r"^rasterize_edges: .*vmap.* use backend='reference'"):
        torch.func.vmap(lambda x: rasterize_edges(x, torch.ones(1), (4, 5), 1.0))(torch.rand(3, 1, 2, 2))
