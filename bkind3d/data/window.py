"""Windows that follow the body, and how far each pixel is from it.

The network looks at a part of a larger frame, so that thin limbs have pixels.

A window has a whole number of pixels and starts at one, so that nothing is resampled, and its projections are those of
the frame, shifted.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bkind3d.data.cached import CachedRecording

HALF = 127  # of 255: a pixel shows the body where more of it than this is the body's


def body_corners(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Upper left corners (..., 2), order (x, y), of windows of `size` around the bodies in masks (..., H, W) uint8.

    The middle of the body's box becomes the middle of the window; where no body is seen, the middle of the frame does.
    A window may reach over the frame.
    """
    seen = masks > HALF
    middles = [_middle(np.any(seen, axis=axis)) for axis in (-2, -1)]  # of x from the columns, of y from the rows
    corners = [middle - (length - 1) / 2 for middle, length in zip(middles, (size[1], size[0]))]
    return np.floor(np.stack(corners, axis=-1) + 0.5).astype(np.int64)


def _middle(seen: np.ndarray) -> np.ndarray:
    """Middle of the first and the last True of (..., L); of the whole where there is none."""
    length = seen.shape[-1]
    first, last = seen.argmax(-1), length - 1 - seen[..., ::-1].argmax(-1)
    return np.where(seen.any(-1), (first + last) / 2, (length - 1) / 2)


def cut(frames: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Windows (B, h, w, ...) of frames (B, H, W, ...), their corners (B, 2); 0 outside the frame."""
    height, width = frames.shape[1:3]
    windows = np.zeros((len(frames), *size, *frames.shape[3:]), dtype=frames.dtype)
    for window, frame, (x, y) in zip(windows, frames, corners.tolist()):
        rows = slice(max(y, 0), min(y + size[0], height))
        columns = slice(max(x, 0), min(x + size[1], width))
        if rows.start < rows.stop and columns.start < columns.stop:
            window[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = frame[rows, columns]
    return windows


def shifted(projections: Tensor, corners: np.ndarray) -> Tensor:
    """Projections (..., 3, 4) of windows with corners (..., 2), from those of the frames (..., 3, 4)."""
    corner = torch.from_numpy(corners).to(projections)[..., None]  # (..., 2, 1)
    moved = projections[..., :2, :] - corner * projections[..., 2:, :]
    return torch.cat([moved, projections[..., 2:, :].expand_as(moved[..., :1, :])], dim=-2)


def look(recording: CachedRecording, rows: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Moments of a recording with their masks, in windows around the body.

    Args:
        recording: with masks.
        rows: (B,) of the moments.
        window: side of the windows in pixels; 0 gives whole frames.

    Returns:
        Frames (B, M, h, w, 3) uint8, masks (B, M, h, w) uint8 and projections (B, M, 3, 4).
    """
    frames, masks = recording.frames[rows], recording.masks[rows]
    projections = recording.projections.expand(len(rows), -1, -1, -1)
    if window == 0:
        return frames, masks, projections
    size = (window, window)
    corners = body_corners(masks, size)
    flat = corners.reshape(-1, 2)
    frames, masks = (
        cut(whole.reshape(-1, *whole.shape[2:]), flat, size).reshape(*whole.shape[:2], *size, *whole.shape[4:])
        for whole in (frames, masks)
    )
    return frames, masks, shifted(projections, corners)


def distances_to(body: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel to the body.

    Args:
        body: which pixels show it, (..., H, W) bool.

    Returns:
        (..., H, W) float32, pixels; 0 everywhere in a picture without a body, which says nothing.
    """
    flat = body.reshape(-1, *body.shape[-2:])
    found = np.zeros(flat.shape, np.float32)
    for distances, picture in zip(found, flat):
        if picture.any():
            distances[:] = ndimage.distance_transform_edt(~picture)
    return found.reshape(body.shape)
