"""Keypoints of single views: a softmax over the pixels of each heatmap, and the expected pixel under it."""

from __future__ import annotations

from kornia.geometry.subpix import spatial_expectation2d, spatial_softmax2d
from torch import Tensor

from bkind3d_kernels.geometry import rescale_points


def locate(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    r"""2D soft-argmax in every view (BKinD, Sun et al. 2022).

    .. math:: p = \mathrm{softmax}_q(\mathrm{logits}), \quad u = \sum_q p(q) \, q

    Args:
        logits: (N, M, J, h, w), float32 or float64.
        size: (H, W) of the images that the heatmaps are a resized copy of.

    Returns:
        Pixels u (N, M, J, 2) of the image, order (x, y), centres at integers; probabilities p (N, M, J, h, w).
    """
    shape = (logits.shape[-2], logits.shape[-1])
    probability = spatial_softmax2d(logits.flatten(0, 1))
    pixels = spatial_expectation2d(probability, normalized_coordinates=False)
    views = logits.shape[:2]
    return rescale_points(pixels.unflatten(0, views), shape, size), probability.unflatten(0, views)


def peak(probability: Tensor) -> Tensor:
    """Largest probability of each heatmap, (..., h, w) -> (...): the confidence of a keypoint in a view."""
    return probability.amax((-2, -1))
