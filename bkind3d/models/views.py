"""What the networks get to see: pictures without the room."""

from __future__ import annotations

from torch import Tensor

GREY = 0.5  # where the room was


def foreground_only(images: Tensor, masks: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) in [0, 1] with the room, where masks (..., H, W) in [0, 1] are 0, in middle grey."""
    share = masks[..., None, :, :]
    return images * share + GREY * (1 - share)
