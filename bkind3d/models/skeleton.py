"""The learned skeleton: a weight and an average length for every pair of keypoints, and the tree of bones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bkind3d_kernels.geometry import all_pairs

TREE_MOMENTUM = 0.95  # share of the old lengths kept when a batch is observed
STIFFNESS = 10.0  # how much dearer an edge is whose length varies


def keypoints_of(pairs: Tensor) -> int:
    """Number J of keypoints that have J (J − 1) / 2 pairs (E, 2)."""
    return (1 + math.isqrt(1 + 8 * len(pairs))) // 2


def spanning_tree(costs: Tensor, pairs: Tensor) -> Tensor:
    """Which edges make the tree that joins all ends at the least cost, (E,) bool (Prim 1957).

    It stays on the device: the host never waits for the costs.

    Args:
        costs: (E,), finite.
        pairs: (E, 2), all pairs of keypoints.
    """
    count = keypoints_of(pairs)
    cost = costs.new_full((count, count), math.inf)
    edge = pairs.new_zeros((count, count))
    for a, b in (pairs.unbind(1), pairs.flip(1).unbind(1)):
        cost[a, b] = costs
        edge[a, b] = torch.arange(len(pairs), device=pairs.device)
    # Of each keypoint, its cheapest edge to the tree; infinite once it is in the tree, which begins with the first.
    nearest, best = edge[0], cost[0]
    joined = best.isinf()
    tree = torch.zeros_like(costs, dtype=torch.bool)
    for _ in range(count - 1):
        new = torch.where(joined, math.inf, best).argmin(0, keepdim=True)
        tree.scatter_(0, nearest.gather(0, new), True)
        joined = joined.scatter(0, new, True)
        to_new = cost.index_select(0, new)[0]
        nearest = torch.where(to_new < best, edge.index_select(0, new)[0], nearest)
        best = torch.minimum(to_new, best)
    return tree


class Skeleton(nn.Module):
    r"""Edge weights w (paper, Section 3.1.3) and average lengths (Section 3.2.2), shared by all views and times.

    Where lengths are observed, the skeleton is a tree: of all that join the keypoints the one with the least sum of

    .. math:: \bar l_e \, (1 + 10 \, \mathrm{Var}(l_e) / \bar l_e^2)

    over its edges, short and of constant length, as bones are. Its edges then are the active ones, whatever their
    weights.

    The state dict holds the edges' parameters, the averages and which of them have been set, the observed lengths and
    the tree.

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
    observed: Tensor
    tree: Tensor

    def __init__(self, keypoints: int, activation: str, start_mean: float, start_std: float, threshold: float) -> None:
        super().__init__()
        self.register_buffer("pairs", all_pairs(keypoints), persistent=False)
        count = len(self.pairs)
        self.activation = activation
        self.threshold = threshold
        self.parameter = nn.Parameter(start_mean + start_std * torch.randn(count), requires_grad=count > 0)
        self.register_buffer("average", torch.zeros(count))
        self.register_buffer("known", torch.zeros(count, dtype=torch.bool))
        self.register_buffer("observed", torch.zeros(2, count))  # running means of lengths and of their squares
        self.register_buffer("tree", torch.zeros(count, dtype=torch.bool))

    @torch.no_grad()
    def observe(self, lengths: Tensor) -> None:
        """Take in the lengths (2, E) of a batch, mean and mean square over its moments, and find the tree again."""
        if not len(self.pairs):
            return
        moved = TREE_MOMENTUM * self.observed + (1 - TREE_MOMENTUM) * lengths
        moved = torch.where(self.observed.any(), moved, lengths)
        self.observed.copy_(torch.where(lengths.isfinite().all(), moved, self.observed))
        mean, square = self.observed
        mean = torch.maximum(mean, 1e-6 * mean.max() + 1e-12)
        variation = (square / mean.square() - 1).clamp_min(0)
        self.tree.copy_(spanning_tree(mean * (1 + STIFFNESS * variation), self.pairs))

    @property
    def weights(self) -> Tensor:
        """Edge weights (E,), not negative."""
        apply = nn.functional.softplus if self.activation == "softplus" else nn.functional.relu
        return apply(self.parameter)

    @property
    def bones(self) -> Tensor:
        """Places of the tree's J − 1 edges among all, ascending; those of the first where there is no tree yet."""
        return self.tree.int().argsort(descending=True, stable=True)[: keypoints_of(self.pairs) - 1]

    @property
    def active(self) -> Tensor:
        """Which edges connect their keypoints (E,), bool: the tree's, or without one those above the threshold."""
        return torch.where(self.tree.any(), self.tree, self.weights.detach() > self.threshold)

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
        batch = lengths.mean(0).float()
        active = self.active & batch.isfinite()
        moved = torch.where(self.known, momentum * self.average + (1 - momentum) * batch, batch)
        self.average.copy_(torch.where(active, moved, self.average))
        self.known.logical_or_(active)
