"""Tries an installed bkind3d where there is no compiler: ``python tests/try_wheel.py VERSION``.

Torch and the wheel are all it needs. Every operation runs forward and backward with the C++ kernels that the wheel
carries and with the reference.
"""

import shutil
import sys
from pathlib import Path

import torch

import bkind3d_kernels as k
from bkind3d_kernels import library


def results(name: str) -> dict[str, list[torch.Tensor]]:
    """Outputs and gradients of one backend, by operation."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    grid = k.VoxelGrid.cube((0.0, 0.0, 3.0), 2.0, 9)
    camera = torch.tensor([[20.0, 0, 7.5, 0], [0, 20.0, 7.5, 0], [0, 0, 1, 0]])
    features, volume, logits = some(1, 3, 5, 16, 16), some(1, 5, 9, 9, 9), some(1, 2, 9, 9, 9)
    weight, bias, keypoints, edges = some(2, 5), some(2), some(1, 3, 2), some(3)
    scale, shift, other = some(5), some(5), some(1, 5, 9, 9, 9)
    calls = {
        "unproject": (k.unproject(features, camera.expand(1, 3, 3, 4), grid, backend=name), [features]),
        "soft_argmax3d": (k.soft_argmax3d(logits, grid, backend=name), [logits]),
        "linear_soft_argmax3d": (
            k.linear_soft_argmax3d(volume, weight, bias, grid, backend=name),
            [volume, weight, bias],
        ),
        "rasterize_edges": (
            k.rasterize_edges(8 + 4 * keypoints, edges.exp(), (16, 16), 1.5, backend=name),
            [keypoints, edges],
        ),
        "group_norm_act": (
            k.group_norm_act(volume, 5, scale, shift, residual=other, backend=name),
            [volume, scale, shift, other],
        ),
    }
    return {
        op: [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]
        for op, (output, inputs) in calls.items()
    }


def main(version: str) -> None:
    found = [name for name in ("c++", "g++", "clang++", "nvcc", "ninja") if shutil.which(name)]
    assert not found, f"there is a compiler: {found}"
    assert Path(k.__file__).parents[1] != Path(__file__).resolve().parents[1], f"not the wheel's: {k.__file__}"
    assert k.__version__ == version, k.__version__
    assert library.reason("_cpu") is None, library.reason("_cpu")
    ours, reference = results("cpp"), results("reference")
    assert set(ours) == set(k.backends.OPERATIONS)
    for op, tensors in ours.items():
        for got, expected in zip(tensors, reference[op], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=lambda text, op=op: f"{op}: {text}")
        print(f"{op}: {k.resolve(op)} agrees with the reference")


if __name__ == "__main__":
    main(sys.argv[1])
