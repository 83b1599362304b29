"""Edge maps by ``csrc/cpu/rasterize_edges.cpp``."""

from __future__ import annotations

from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import call

__all__ = ["run", "unavailable"]


def run(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]
) -> list[Tensor]:
    """One map for each size; arguments as in ``reference/rasterize_edges.py``."""
    flat = [length for size in sizes for length in size]
    return call("bkind3d", "rasterize_edges", keypoints, weights, edges, flat, sigmas)[0]
