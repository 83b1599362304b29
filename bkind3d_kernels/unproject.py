"""Unprojection: feature maps of several calibrated views aggregated into one volume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .checks import check_choice, check_device, check_features, check_floating, check_grid, check_shape, describe, exact
from .geometry import VoxelGrid, check_geometry

AGGREGATIONS = ("softmax", "mean", "sum", "max", "weighted")
UNSEEN = ("zero", "exclude")
MAX_VIEWS = 255  # counts are uint8


def unproject(
    features: Tensor,
    projections: Tensor,
    grid: VoxelGrid,
    *,
    aggregation: str = "softmax",
    unseen: str = "zero",
    view_mask: Tensor | None = None,
    view_weights: Tensor | None = None,
    return_counts: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Sample the features of every view at the projection of every voxel, and aggregate over the views.

    With :math:`v_m(x)` the bilinear sample of ``features[n, m]`` at the projection of voxel x into view m (zero
    padding outside the map), and S the views that take part (BKinD-3D, Section 3.1.2, for softmax),

    ============  =====================================================================
    aggregation   volume at x
    ============  =====================================================================
    "softmax"     :math:`\sum_{m \in S} w_m v_m, \; w = \mathrm{softmax}_{m \in S}(v)`, per channel
    "mean"        :math:`\frac{1}{|S|} \sum_{m \in S} v_m`
    "sum"         :math:`\sum_{m \in S} v_m`
    "max"         :math:`\max_{m \in S} v_m` (the gradient goes to the lowest index of a tie)
    "weighted"    :math:`\sum_m w_m v_m`; with ``unseen="exclude"`` over :math:`\sum_{m \in S} w_m` (0 if that is 0)
    ============  =====================================================================

    A view sees a voxel when its depth is above 0, at least one of the four bilinear taps is inside the map
    (-1 ≤ u < W and -1 ≤ v < H) and ``view_mask`` is true. With ``unseen="zero"`` (the paper) S is all views, and a view
    that does not see the voxel has v = 0. With ``"exclude"`` S is the seeing views. A voxel seen by none is 0.

    Args:
        features: (N, M, C, H, W), float32, bfloat16, float16 or float64; fastest when the channels are last in memory.
        projections: (N, M, 3, 4) float32 or float64, homogeneous world points to homogeneous *feature-map* pixels,
            pixel centres at integers (see :func:`~bkind3d_kernels.geometry.rescale_projections`).
        grid: where the voxels are; its affine has 1 or N entries.
        aggregation: see the table.
        unseen: "zero" or "exclude".
        view_mask: (N, M) bool, false for a view that is missing; all true by default.
        view_weights: (N, M) or (N, M, C) floating, for "weighted" alone.
        return_counts: also return how many views see each voxel.
        backend: "auto", or a name in :data:`bkind3d_kernels.backends.BACKENDS`.

    Returns:
        Volume (N, C, X, Y, Z) in the dtype of the features, ``channels_last_3d`` in memory; with ``return_counts`` the
        pair (volume, counts), counts (N, X, Y, Z) uint8. Sampling and aggregation are in float32 (float64 for float64
        features). Gradients: features, projections, ``grid.affine``, ``view_weights``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it. NaN projections are
            found on the CPU only, and not while tracing: reading values would stop the device.
        TypeError: an argument is not a tensor or not a VoxelGrid.
        BackendUnavailable: the backend that was named cannot run here.

    Example:
        A camera at the origin looking along z, and 3³ voxels around (0, 0, 2):

        >>> import torch
        >>> from bkind3d_kernels import VoxelGrid, unproject
        >>> features = torch.ones(1, 1, 4, 8, 8)
        >>> projections = torch.tensor([[[[4.0, 0, 3.5, 0], [0, 4, 3.5, 0], [0, 0, 1, 0]]]])
        >>> grid = VoxelGrid.cube(center=(0.0, 0.0, 2.0), side=1.0, size=3)
        >>> volume, counts = unproject(features, projections, grid, return_counts=True)
        >>> volume.shape, counts.unique().tolist()
        (torch.Size([1, 4, 3, 3, 3]), [1])
    """
    _check(features, projections, grid, aggregation, unseen, view_mask, view_weights)
    q = exact(grid.voxel_to_pixel(projections), features)
    if view_weights is not None:
        of_channels = exact(view_weights, features)
        of_channels = of_channels if of_channels.ndim == 3 else of_channels[..., None]
        view_weights = of_channels.expand(features.shape[:3])
    run = backends.implementation("unproject", backend, features.device, features.dtype)
    volume, counts = run(features, q, grid.shape, aggregation, unseen, view_mask, view_weights)
    return (volume, counts) if return_counts else volume


def _check(
    features: Tensor,
    projections: Tensor,
    grid: VoxelGrid,
    aggregation: str,
    unseen: str,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
) -> None:
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("unseen", unseen, UNSEEN)
    check_features("features", features, "(N, M, C, H, W)")
    n, m, c = features.shape[:3]
    if m > MAX_VIEWS:
        raise ValueError(f"features {describe(features)}: expected at most {MAX_VIEWS} views")
    check_geometry("projections", projections, "(N, M, 3, 4)")
    if projections.shape != (n, m, 3, 4):
        raise ValueError(f"projections {describe(projections)}: expected ({n}, {m}, 3, 4)")
    check_device("projections", projections, "features", features)
    check_grid(grid, n, "features", features)
    if view_mask is not None:
        check_shape("view_mask", view_mask, (n, m))
        if view_mask.dtype != torch.bool:
            raise ValueError(f"view_mask {describe(view_mask)}: expected bool, got {view_mask.dtype}")
        check_device("view_mask", view_mask, "features", features)
    if (view_weights is None) == (aggregation == "weighted"):
        raise ValueError(
            f"view_weights {describe(view_weights)}: expected with aggregation='weighted' and with no other, "
            f"got aggregation={aggregation!r}"
        )
    if view_weights is not None:
        check_shape("view_weights", view_weights, (n, m), (n, m, c))
        check_floating("view_weights", view_weights)
        check_device("view_weights", view_weights, "features", features)


class Unproject(nn.Module):
    """:func:`unproject` with its options fixed; no parameters.

    Args:
        aggregation: "softmax", "mean", "sum", "max" or "weighted".
        unseen: "zero" or "exclude".
        return_counts: whether the module returns (volume, counts).
        backend: "auto" or a backend's name.

    Example:
        >>> from bkind3d_kernels import Unproject
        >>> Unproject(unseen="exclude")
        Unproject(aggregation=softmax, unseen=exclude, return_counts=False, backend=auto)
    """

    def __init__(
        self,
        *,
        aggregation: str = "softmax",
        unseen: str = "zero",
        return_counts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("aggregation", aggregation, AGGREGATIONS)
        check_choice("unseen", unseen, UNSEEN)
        backends.check_name(backend)
        self.aggregation = aggregation
        self.unseen = unseen
        self.return_counts = return_counts
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        projections: Tensor,
        grid: VoxelGrid,
        *,
        view_mask: Tensor | None = None,
        view_weights: Tensor | None = None,
    ) -> Any:
        """Volume (N, C, X, Y, Z), or (volume, counts); arguments as in :func:`unproject`."""
        return unproject(
            features,
            projections,
            grid,
            aggregation=self.aggregation,
            unseen=self.unseen,
            view_mask=view_mask,
            view_weights=view_weights,
            return_counts=self.return_counts,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"aggregation={self.aggregation}, unseen={self.unseen}, "
            f"return_counts={self.return_counts}, backend={self.backend}"
        )
