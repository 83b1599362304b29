"""What the networks get to see: pictures without the room, and turned about their centres in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GREY = 0.5  # where the room was


def foreground_only(images: Tensor, masks: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) in [0, 1] with the room, where masks (..., H, W) in [0, 1] are 0, in middle grey."""
    share = masks[..., None, :, :]
    return images * share + GREY * (1 - share)


def turned_views(images: Tensor, masks: Tensor, projections: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures without the room turned about their centres, with their masks and projections.

    A network then cannot tell a camera by where the floor is, nor take a place in the picture for a part.

    Args:
        images: (N, 2, M, 3, H, W), of :func:`foreground_only`.
        masks: (N, 2, M, H, W).
        projections: (N, M, 3, 4), world to pixels.
        angles: (N, M) radians, from x towards y; both times of a view are turned alike.

    Returns:
        Turned images, masks and projections; what comes in from outside a picture is grey, and no foreground.
    """
    n, _, m, _, height, width = images.shape
    center = projections.new_tensor((width - 1, height - 1)) / 2
    cos, sin = angles.to(projections).cos(), angles.to(projections).sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (N, M, 2, 2)
    moved = torch.eye(3).to(projections).repeat(n, m, 1, 1)
    moved[..., :2, :2] = turn
    moved[..., :2, 2] = center - (turn @ center)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([x, y], dim=-1).to(projections) - center  # (H, W, 2)
    source = at @ turn[:, :, None] + center  # rows times the turn are the inverse turn
    grid = (source + 0.5) / source.new_tensor((width, height)) * 2 - 1
    grid = grid[:, None].expand(-1, 2, -1, -1, -1, -1).flatten(0, 2)
    joined = torch.cat([images - GREY, masks[:, :, :, None]], dim=3).flatten(0, 2)
    joined = nn.functional.grid_sample(joined, grid, align_corners=False).unflatten(0, (n, 2, m))
    return joined[:, :, :, :3] + GREY, joined[:, :, :, 3], (moved[..., None] * projections[..., None, :, :]).sum(-2)
