"""What compiled kernels refuse: derivatives that they do not have, and arguments that would harm memory."""

import pytest
import scenes
import torch
from torch.autograd import forward_ad

from bkind3d_kernels import (
    VoxelGrid,
    group_norm_act,
    library,
    linear_soft_argmax3d,
    rasterize_edges,
    registration,
    soft_argmax3d,
    unproject,
)

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))

GRID = VoxelGrid.cube((0.0, 0.0, 3.0), 1.0, 3)
PROJECTIONS = scenes.projections(1, 2, (4, 5), torch.Generator().manual_seed(0)).float()
CALLS = {
    "unproject": (torch.randn(1, 2, 3, 4, 5), lambda x: unproject(x, PROJECTIONS, GRID, backend="cpp")),
    "soft_argmax3d": (torch.randn(1, 2, 3, 3, 3), lambda x: soft_argmax3d(x, GRID, backend="cpp")),
    "linear_soft_argmax3d": (
        torch.randn(1, 2, 3, 3, 3),
        lambda x: linear_soft_argmax3d(x, torch.ones(1, 2), None, GRID, backend="cpp"),
    ),
    "rasterize_edges": (torch.rand(1, 3, 2), lambda x: rasterize_edges(x, torch.ones(3), (4, 4), 1.0, backend="cpp")),
    "group_norm_act": (
        torch.randn(1, 4, 3, 3),
        lambda x: group_norm_act(x, 2, torch.ones(4), torch.zeros(4), backend="cpp"),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused(op: str) -> None:
    x, function = CALLS[op]
    message = f"{op}: the compiled kernels have no forward-mode derivative; use backend='reference'"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=message):
            function(forward_ad.make_dual(x, torch.ones_like(x)))
        assert function(x).shape == function(x.clone()).shape  # a tensor without a tangent passes


@pytest.mark.parametrize("op", CALLS)
def test_second_derivative_is_refused(op: str) -> None:
    x, function = CALLS[op]
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: the compiled kernels have no second derivative"):
        gradient.sum().backward()


def test_missing_operators_are_named_before_anything_is_registered() -> None:
    with pytest.raises(RuntimeError, match=r"operators unproject, unproject_backward, .* are missing"):
        registration.attach("bkind3d_absent")
