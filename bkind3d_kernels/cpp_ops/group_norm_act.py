"""Group normalisation with a residual and a ReLU by ``csrc/cpu/group_norm_act.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import refuse_tangents

__all__ = ["run", "unavailable"]


def run(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    """The normalised map; arguments as in ``reference/group_norm_act.py``."""
    refuse_tangents("group_norm_act", x, weight, bias, residual)
    return torch.ops.bkind3d.group_norm_act(x, weight, bias, residual, groups, eps, activation)[0]
