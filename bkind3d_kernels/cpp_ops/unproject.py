"""Unprojection by ``csrc/cpu/unproject.cpp``."""

from __future__ import annotations

from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import call

__all__ = ["run", "unavailable"]


def run(
    features: Tensor,
    q: Tensor,
    shape: tuple[int, int, int],
    aggregation: str,
    unseen: str,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Volume and counts; arguments as in ``reference/unproject.py``."""
    return call("bkind3d", "unproject", features, q, view_mask, view_weights, shape, aggregation, unseen)
