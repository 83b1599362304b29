"""A 1×1×1 convolution with a 3D soft-argmax by ``csrc/cpu/linear_soft_argmax3d.cpp``."""

from __future__ import annotations

from torch import Tensor

from ..library import cpp_unavailable as unavailable
from ..registration import call

__all__ = ["run", "unavailable"]


def run(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, covariance: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, peak and covariance of the index; arguments as in ``reference/linear_soft_argmax3d.py``."""
    outputs = call("bkind3d", "linear_soft_argmax3d", features, weight, bias, temperature, covariance)
    return outputs[0], outputs[1], outputs[2] if covariance else None
