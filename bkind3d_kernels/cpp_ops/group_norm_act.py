"""Group normalisation with a residual and a ReLU by ``csrc/cpu/group_norm_act.cpp``."""

from __future__ import annotations

from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import call

__all__ = ["run", "unavailable"]


def run(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    """The normalised map; arguments as in ``reference/group_norm_act.py``."""
    return call("bkind3d", "group_norm_act", x, weight, bias, residual, groups, eps, activation)[0]
