"""Unprojection by ``csrc/cpu/unproject.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import refuse_tangents

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
    refuse_tangents("unproject", features, q, view_weights)
    return torch.ops.bkind3d.unproject(features, q, view_mask, view_weights, shape, aggregation, unseen)
