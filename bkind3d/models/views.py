"""What the networks get to see: pictures without the room, and a box that follows the body."""

from __future__ import annotations

import torch
from torch import Tensor

from bkind3d.models.triangulate import triangulate
from bkind3d_kernels.geometry import exact_matmul, project_points

GREY = 0.5  # where the room was
ROUNDS = 4  # in which views that disagree about the body's middle lose their say
FAR = 0.2  # of the window's side: the error at which a view's weight is a half


def as_floats(levels: Tensor) -> Tensor:
    """Bytes, from 0 to 255, as float32 in [0, 1]."""
    return levels.float() / 255.0


def foreground_only(images: Tensor, masks: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) in [0, 1] with the room, where masks (..., H, W) in [0, 1] are 0, in middle grey."""
    share = masks[..., None, :, :]
    return images * share + GREY * (1 - share)


@torch.no_grad()
def body_middle(projections: Tensor, size: tuple[int, int], center: Tensor, side: float | Tensor) -> Tensor:
    """The point that is in the middle of all windows that follow a body.

    It is triangulated again and again with weights 1 / (1 + (e / (s / 5))²) for a view's error e, pixels, and the
    window's side s: a window that lost the body, or shows half of it, is left aside by those that agree.

    Args:
        projections: (N, M, 3, 4), world to pixels of windows of `size`.
        size: (H, W) of the windows.
        center: Where to start, (3,) or (N or 1, 3), world units.
        side: A length of the scene, world units.

    Returns:
        (N, 3), world units.
    """
    height, width = size
    middle = projections.new_tensor([(width - 1) / 2, (height - 1) / 2]).expand(*projections.shape[:2], 1, 2)
    weights = torch.ones_like(middle[..., 0])
    for _ in range(ROUNDS):
        found = triangulate(middle, weights, projections, center, side)  # (N, 1, 3)
        pixels, depth = project_points(projections, found[:, None])
        error = torch.where(depth > 0, (pixels - middle).norm(dim=-1), torch.inf)
        weights = 1 / (1 + (error / (FAR * max(size))).square())
        center = found[:, 0]
    return center


def centred(projections: Tensor, shift: Tensor) -> Tensor:
    """Projections (N, M, 3, 4) of a world whose points X are where X + shift, (N, 3), is in their own."""
    last = projections[..., 3] + exact_matmul(projections[..., :3], shift[:, None, :, None])[..., 0]
    return torch.cat([projections[..., :3], last[..., None]], dim=-1)
