"""3D soft-argmax by ``csrc/cpu/soft_argmax3d.cpp``."""

from __future__ import annotations

from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import call

__all__ = ["run", "unavailable"]


def run(logits: Tensor, temperature: float, covariance: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, peak and covariance of the index; arguments as in ``reference/soft_argmax3d.py``."""
    mean, peak, second, *_ = call("bkind3d", "soft_argmax3d", logits, temperature, covariance)
    return mean, peak, second if covariance else None
