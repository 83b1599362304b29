"""The learned skeleton: a weight and a running average of the length for every pair of keypoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bkind3d_kernels.geometry import all_pairs


class Skeleton(nn.Module):
    """Edge weights w (paper, Section 3.1.3) and average lengths (Section 3.2.2), shared by all views and times.

    The state dict holds the edges' parameters, the averages and which of them have been set.

    Args:
        keypoints: Number J of keypoints that edges join; there are E = J (J − 1) / 2 edges, i < j in lexicographic
            order. With 0 there are none, and nothing to train: keypoints drawn as points.
        activation: "softplus" or "relu", from parameter to weight.
        start_mean: Mean of the parameters at the start.
        start_std: Their standard deviation.
        threshold: An edge is active when its weight is above this.
    """

    pairs: Tensor
    average: Tensor
    known: Tensor

    def __init__(self, keypoints: int, activation: str, start_mean: float, start_std: float, threshold: float) -> None:
        super().__init__()
        self.register_buffer("pairs", all_pairs(keypoints), persistent=False)
        count = len(self.pairs)
        self.activation = activation
        self.threshold = threshold
        self.parameter = nn.Parameter(start_mean + start_std * torch.randn(count), requires_grad=count > 0)
        self.register_buffer("average", torch.zeros(count))
        self.register_buffer("known", torch.zeros(count, dtype=torch.bool))

    @property
    def weights(self) -> Tensor:
        """Edge weights (E,), not negative."""
        apply = nn.functional.softplus if self.activation == "softplus" else nn.functional.relu
        return apply(self.parameter)

    @property
    def active(self) -> Tensor:
        """Which edges connect their keypoints (E,), bool."""
        return self.weights.detach() > self.threshold

    def lengths(self, keypoints: Tensor) -> Tensor:
        """Lengths of all edges: keypoints (N, J, 3) -> (N, E), in the keypoints' unit."""
        difference = keypoints[:, self.pairs[:, 0]] - keypoints[:, self.pairs[:, 1]]
        return difference.square().sum(-1).clamp_min(1e-12).sqrt()

    @torch.no_grad()
    def update_averages(self, lengths: Tensor, momentum: float) -> None:
        """Move the average length of each active edge towards this batch; its first batch sets it.

        Args:
            lengths: (N, E).
            momentum: Share of the old value that is kept.
        """
        batch, active = lengths.mean(0).float(), self.active
        moved = torch.where(self.known, momentum * self.average + (1 - momentum) * batch, batch)
        self.average.copy_(torch.where(active, moved, self.average))
        self.known.logical_or_(active)
