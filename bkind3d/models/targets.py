"""What a model reconstructs, made from the frames of a pair (paper, Section 3.2.1)."""

from __future__ import annotations

from typing import Protocol

import torch
from kornia.filters import gaussian_blur2d
from kornia.metrics import ssim
from torch import Tensor

SSIM_SIGMA = 1.5
LUMINANCE_CONSTANT = 0.01**2


class TargetSettings(Protocol):
    """What of the settings of the losses decides a target."""

    @property
    def target(self) -> str:
        """Either "ssim" or "contrast-structure"."""

    @property
    def target_channels(self) -> str:
        """Either "rgb" or "grey"."""

    @property
    def ssim_window(self) -> int:
        """Side of SSIM's Gaussian window in pixels, odd."""


@torch.no_grad()
def difference_target(images: Tensor, config: TargetSettings) -> Tensor:
    """Local dissimilarity of two frames, the target S of the reconstruction (paper, Section 3.2.1).

    "ssim": 1 − SSIM with a Gaussian window of deviation 1.5 pixels; "contrast-structure": without the luminance term.

    Args:
        images: Frames t and t + gap, (N, 2, M, 3, H, W) in [0, 1].
        config: target, target_channels, ssim_window.

    Returns:
        (N, M, C, H, W) in [0, 2], C = 3 or 1.
    """
    if config.target_channels == "grey":
        images = images.mean(3, keepdim=True)
    n, _, m = images.shape[:3]
    first, second = images.transpose(0, 1).flatten(1, 2).float()
    similarity = ssim(first, second, config.ssim_window)
    if config.target == "contrast-structure":
        window, sigma = (config.ssim_window, config.ssim_window), (SSIM_SIGMA, SSIM_SIGMA)
        a, b = gaussian_blur2d(first, window, sigma), gaussian_blur2d(second, window, sigma)
        similarity = similarity * (a.square() + b.square() + LUMINANCE_CONSTANT) / (2 * a * b + LUMINANCE_CONSTANT)
    return (1 - similarity).unflatten(0, (n, m))


@torch.no_grad()
def frame_target(images: Tensor, config: TargetSettings) -> Tensor:
    """The later frame itself, the target of Keypoint3D's image reconstruction (Chen et al. 2021).

    Args:
        images: Frames t and t + gap, (N, 2, M, 3, H, W) in [0, 1].
        config: target_channels.

    Returns:
        (N, M, C, H, W) in [0, 1], C = 3 or 1.
    """
    later = images[:, 1].float()
    return later.mean(2, keepdim=True) if config.target_channels == "grey" else later
