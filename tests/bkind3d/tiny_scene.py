"""Points in a box that three cameras see, and the heatmaps that show them."""

import torch
from small_rig import ring
from torch import Tensor

from bkind3d.models.discovery import box_center
from bkind3d_kernels import VoxelGrid
from bkind3d_kernels.geometry import project_points, rescale_points

GRID = VoxelGrid.box((0.1, -0.1, 0.0), (1.0, 1.2, 0.6), (7, 8, 5))
SIZE = (48, 64)


def cameras(views: int = 3) -> Tensor:
    """(1, M, 3, 4) float32: cameras that see the whole box."""
    return ring(views, (SIZE[1], SIZE[0])).projection_matrices().float()[None]


def truth(samples: int = 2) -> Tensor:
    """Points (N, J, 3) inside the box."""
    random = torch.rand(samples, 4, 3, generator=torch.Generator().manual_seed(1))
    return box_center(GRID)[:, None] + 0.8 * (random - 0.5) * torch.tensor([1.0, 1.2, 0.6])


def heatmaps(points: Tensor, shape: tuple[int, int], gain: float) -> Tensor:
    """Logits (N, M, J, h, w) whose softmax at `gain` shares 1 among the four pixels around each projected point."""
    pixels, _ = project_points(cameras(), points[:, None])
    at = rescale_points(pixels, SIZE, shape)
    x, y = torch.arange(shape[1]), torch.arange(shape[0])
    along_x = (1 - (x - at[..., :1]).abs()).clamp_min(0)
    along_y = (1 - (y - at[..., 1:]).abs()).clamp_min(0)
    return (along_y[..., :, None] * along_x[..., None, :]).clamp_min(1e-30).log() / gain
