"""3D soft-argmax in plain PyTorch: a softmax over the volume, then moments of the voxel index from its marginals."""

from __future__ import annotations

import torch
from torch import Tensor

from . import unavailable

__all__ = ["run", "unavailable"]


def run(logits: Tensor, temperature: float, covariance: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean index (N, J, 3), peak probability (N, J) and, if asked for, covariance of the index (N, J, 3, 3).

    All in float32, or float64 for float64 logits. The caller maps indices to the world.

    Args:
        logits: (N, J, X, Y, Z).
        temperature: the softmax is taken of logits / temperature.
        covariance: whether the second moments are wanted.
    """
    n, j, *shape = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(dtype).flatten(2)
    # Relative to the largest, or a quotient of large logits would be infinite.
    scaled = (scaled - scaled.detach().amax(-1, keepdim=True)) / temperature
    probability = scaled.softmax(-1)
    # Of the logits, not of the probability, where rounding makes ties; those go to the lowest index.
    peak = probability.gather(-1, scaled.argmax(-1, keepdim=True)).squeeze(-1)
    probability = probability.view(n, j, *shape)
    # Marginals over pairs of axes: xy, xz, yz.
    xy, xz, yz = probability.sum(4), probability.sum(3), probability.sum(2)
    marginals = (xy.sum(3), xy.sum(2), yz.sum(2))  # (N, J, X), (N, J, Y), (N, J, Z)
    index = [torch.arange(s, dtype=dtype, device=logits.device) for s in shape]
    mean = torch.stack([(p * i).sum(-1) for p, i in zip(marginals, index)], dim=-1)  # (N, J, 3)
    if not covariance:
        return mean, peak, None
    # Centred before squaring: E[i²] − E[i]² would cancel for a sharp peak.
    dx, dy, dz = (i - mean[..., a : a + 1] for a, i in enumerate(index))
    vx, vy, vz = ((p * d * d).sum(-1) for p, d in zip(marginals, (dx, dy, dz)))
    vxy, vxz, vyz = (
        (p * a.unsqueeze(-1) * b.unsqueeze(-2)).sum((-2, -1)) for p, a, b in ((xy, dx, dy), (xz, dx, dz), (yz, dy, dz))
    )
    entries = torch.stack([vx, vxy, vxz, vxy, vy, vyz, vxz, vyz, vz], dim=-1)
    return mean, peak, entries.view(n, j, 3, 3)
