"""A 1×1×1 convolution and a 3D soft-argmax of its result in plain PyTorch.

The product is taken in float64 and rounded: neither autocast nor TF32 applies to that, forward or backward. Where
autograd would keep much, everything is checkpointed: the logits are then made again in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import soft_argmax3d, unavailable

__all__ = ["run", "unavailable"]

CHECKPOINT_ELEMENTS = 2**26  # of features and logits that may be kept for backward: 512 MiB in float64


def run(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, covariance: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean index (N, J, 3), peak probability (N, J) and, if asked for, covariance of the index (N, J, 3, 3).

    All in float32, or float64 for float64 features. The caller maps indices to the world.

    Args:
        features: (N, C, X, Y, Z).
        weight: (J, C) in float32, or float64 for float64 features.
        bias: (J,) in the dtype of the weight, or None.
        temperature: the softmax is taken of logits / temperature.
        covariance: whether the second moments are wanted.
    """
    n, c, x, y, z = features.shape
    kept = n * (c + weight.shape[0]) * x * y * z
    if torch.is_grad_enabled() and kept > CHECKPOINT_ELEMENTS and not torch.compiler.is_compiling():
        arguments = features, weight, bias, temperature, covariance
        return checkpoint(_run, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _run(features, weight, bias, temperature, covariance)


def _run(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, covariance: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    exact = torch.float32 if features.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    logits = torch.einsum("jc,ncxyz->njxyz", weight.to(exact), features.to(exact)).to(weight.dtype)
    if bias is not None:
        logits = logits + bias.view(-1, 1, 1, 1)
    return soft_argmax3d.run(logits, temperature, covariance)
