"""Masks of the body from a static background, on frames of network size.

The cameras stand still, so what a pixel shows most of the time is the room behind the body.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

VERSION = 1  # raise it whenever the same frames would give other masks

_SAMPLES = 200  # moments that a background is estimated from


@dataclass(frozen=True, eq=False)
class Background:
    """The empty room as the cameras see it.

    Args:
        pictures: (M, H, W, 3) float32, 0 to 255.
        noise: (M,) float32, standard deviation of a channel of a still pixel, grey levels.
    """

    pictures: np.ndarray
    noise: np.ndarray


def estimate_background(samples: np.ndarray) -> Background:
    """The background of frames (S, M, H, W, 3) uint8 of well separated moments."""
    pictures = np.median(samples, axis=0).astype(np.float32)
    noise = np.maximum(1.4826 * np.median(np.abs(samples - pictures), axis=(0, 2, 3, 4)), 1.0)
    return Background(pictures, noise.astype(np.float32))


def pooled_background(recordings: list[np.ndarray]) -> Background:
    """The background that recordings of one rig share, each of frames (T, M, H, W, 3) uint8."""
    ends = np.cumsum([len(frames) for frames in recordings])
    rows = np.unique(np.linspace(0, ends[-1] - 1, min(_SAMPLES, ends[-1])).astype(int))
    places = np.searchsorted(ends, rows, side="right")
    samples = [frames[rows[places == i] - ends[i] + len(frames)] for i, frames in enumerate(recordings)]
    return estimate_background(np.concatenate(samples))


def foreground_masks(frames: np.ndarray, background: Background) -> np.ndarray:
    """Masks (T, M, H, W) uint8, 255 where frames (T, M, H, W, 3) uint8 show the body and 0 elsewhere."""
    difference = np.abs(frames - background.pictures).max(-1)
    masks = difference > 5 * background.noise[:, None, None] + 8
    structure = np.zeros((1, 1, 3, 3), dtype=bool)
    structure[0, 0] = ndimage.generate_binary_structure(2, 1)
    masks = ndimage.binary_closing(ndimage.binary_opening(masks, structure), structure)
    return masks.astype(np.uint8) * 255
