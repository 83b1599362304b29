"""Random inputs: cameras on a ring that look at a box, some voxels behind them or outside their images."""

import math

import torch
from torch import Tensor

from bkind3d_kernels import VoxelGrid


def look_at(center: Tensor, target: Tensor) -> Tensor:
    """(3, 4) world to camera, OpenCV axes, z up in the world."""
    z = torch.nn.functional.normalize(target - center, dim=0)
    x = torch.nn.functional.normalize(torch.linalg.cross(z, center.new_tensor([0.0, 0.0, 1.0])), dim=0)
    rotation = torch.stack([x, torch.linalg.cross(z, x), z])
    return torch.cat([rotation, -(rotation @ center).unsqueeze(-1)], dim=-1)


def projections(n: int, m: int, size: tuple[int, int], generator: torch.Generator, radius: float = 2.0) -> Tensor:
    """(N, M, 3, 4) float64: focal length near the map's size, cameras at ``radius`` from the origin."""
    out = []
    for _ in range(n * m):
        angle, height = 2 * math.pi * torch.rand((), generator=generator), torch.rand((), generator=generator)
        center = torch.stack([radius * angle.cos(), radius * angle.sin(), height]).double()
        target = 0.2 * torch.randn(3, generator=generator).double()
        h, w = size
        focal = 0.8 * max(h, w) + 0.5
        k = torch.tensor([[focal, 0.1, w / 2 - 0.4], [0, 1.1 * focal, h / 2 - 0.6], [0, 0, 1]]).double()
        out.append(k @ look_at(center, target))
    return torch.stack(out).view(n, m, 3, 4) if out else torch.zeros(n, m, 3, 4, dtype=torch.float64)


def grid(shape: tuple[int, int, int], generator: torch.Generator, n: int = 1) -> VoxelGrid:
    """A skewed and shifted grid about 1.5 wide around the origin, float64."""
    linear = torch.eye(3).double() + 0.2 * torch.randn(n, 3, 3, generator=generator).double()
    step = 1.5 / torch.tensor(shape, dtype=torch.float64).clamp(min=2)
    linear = linear * step
    center = 0.1 * torch.randn(n, 3, 1, generator=generator).double()
    origin = center - linear @ ((torch.tensor(shape, dtype=torch.float64) - 1) / 2).view(3, 1)
    return VoxelGrid(torch.cat([linear, origin], dim=-1), shape)
