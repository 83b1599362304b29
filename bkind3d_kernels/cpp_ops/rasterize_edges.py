"""Edge maps by ``csrc/cpu/rasterize_edges.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import refuse_tangents

__all__ = ["run", "unavailable"]


def run(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]
) -> list[Tensor]:
    """One map for each size; arguments as in ``reference/rasterize_edges.py``."""
    refuse_tangents("rasterize_edges", keypoints, weights)
    flat = [length for size in sizes for length in size]
    return torch.ops.bkind3d.rasterize_edges(keypoints, weights, edges, flat, sigmas)[0]
