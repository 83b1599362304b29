"""3D soft-argmax: the expected world position under the softmax of a volume of logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import backends
from .checks import check_features, check_grid, check_positive, check_scalar, describe, exact
from .geometry import VoxelGrid, exact_matmul


def soft_argmax3d(
    logits: Tensor,
    grid: VoxelGrid,
    *,
    temperature: float | Tensor = 1.0,
    return_peak: bool = False,
    return_covariance: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Expected position of each keypoint under the softmax of its logits (BKinD-3D, Section 3.1).

    .. math:: p = \mathrm{softmax}_x(\mathrm{logits} / \tau), \quad u = \sum_x p(x) \, A x, \quad
              \Sigma = \sum_x p(x) \, (A x - u)(A x - u)^T

    Args:
        logits: (N, J, X, Y, Z), float32, bfloat16, float16 or float64.
        grid: its shape is (X, Y, Z), its affine A has 1 or N entries.
        temperature: τ > 0, a number or a floating tensor (), which may require a gradient: the logits are then divided
            beforehand, into a copy. A small one sharpens; flat logits put every keypoint at the centre of the volume.
        return_peak: also return the largest probability, a confidence in (0, 1]; its gradient goes through the lowest
            index of a tie.
        return_covariance: also return Σ, in world units squared.
        backend: "auto", or a name in :data:`bkind3d_kernels.backends.BACKENDS`.

    Returns:
        Coordinates u (N, J, 3) in world units, or a tuple (coordinates, peak (N, J), covariance (N, J, 3, 3)) of what
        was asked for, in that order. All in float32 (float64 for float64 logits), all differentiable with respect to
        the logits and ``grid.affine``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        TypeError: an argument is not a tensor or not a VoxelGrid.
        BackendUnavailable: the backend that was named cannot run here.

    Example:
        >>> import torch
        >>> from bkind3d_kernels import VoxelGrid, soft_argmax3d
        >>> grid = VoxelGrid.cube(center=(0.0, 0.0, 0.0), side=2.0, size=5)
        >>> logits = torch.zeros(1, 1, 5, 5, 5)
        >>> logits[0, 0, 4, 2, 1] = 100.0
        >>> coordinates, peak = soft_argmax3d(logits, grid, return_peak=True)
        >>> coordinates.tolist(), peak.tolist()
        ([[[1.0, 0.0, -0.5]]], [[1.0]])
    """
    check_features("logits", logits, "(N, J, X, Y, Z)")
    check_grid(grid, logits.shape[0], "logits", logits)
    if tuple(logits.shape[2:]) != grid.shape:
        raise ValueError(f"logits {describe(logits)}: expected (N, J, X, Y, Z) with the grid's shape {grid.shape}")
    mean, peak, covariance = _moments(logits, temperature, return_covariance, backend)
    return in_world(grid, mean, peak if return_peak else None, covariance)


def soft_argmax2d(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_peak: bool = False,
    return_covariance: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Expected pixel of each keypoint under the softmax of its heatmap: :func:`soft_argmax3d` in two dimensions.

    .. math:: p = \mathrm{softmax}_{xy}(\mathrm{logits} / \tau), \quad u = \sum_{xy} p(x, y) \, (x, y)^T, \quad
              \Sigma = \sum_{xy} p(x, y) \, ((x, y)^T - u)((x, y)^T - u)^T

    Args:
        logits: (N, J, H, W), float32, bfloat16, float16 or float64.
        temperature: as in :func:`soft_argmax3d`; so are ``return_peak``, ``backend`` and the errors.
        return_peak: also return the largest probability.
        return_covariance: also return Σ, in pixels squared.
        backend: "auto", or a name in :data:`bkind3d_kernels.backends.BACKENDS`.

    Returns:
        Pixels u (N, J, 2), order (x, y), of the heatmap, centres at integers, or a tuple (pixels, peak (N, J),
        covariance (N, J, 2, 2)) of what was asked for, in that order. All in float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> from bkind3d_kernels import soft_argmax2d
        >>> logits = torch.zeros(1, 1, 4, 5)
        >>> logits[0, 0, 1, 3] = 100.0
        >>> soft_argmax2d(logits).tolist()
        [[[3.0, 1.0]]]
    """
    check_features("logits", logits, "(N, J, H, W)")
    mean, peak, covariance = _moments(logits.unsqueeze(2), temperature, return_covariance, backend)
    outputs = [mean[..., 1:].flip(-1)]  # an index of the volume (1, H, W) is (0, y, x)
    if return_peak:
        outputs.append(peak)
    if covariance is not None:
        outputs.append(covariance[..., 1:, 1:].flip(-2, -1))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _moments(logits: Tensor, temperature: Any, covariance: bool, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, peak and covariance of the voxel index."""
    if isinstance(temperature, Tensor):
        check_scalar("temperature", temperature)
        # Its gradient needs no kernel of its own then, and no GPU is waited for. Relative to the largest, or a quotient
        # of large logits would be infinite.
        logits = exact(logits, logits)
        largest = logits.detach().amax((2, 3, 4), keepdim=True)
        logits, temperature = (logits - largest) / exact(temperature, logits), 1.0
    check_positive("temperature", temperature)
    run = backends.implementation("soft_argmax3d", backend, logits.device, logits.dtype)
    return run(logits, float(temperature), covariance)


def in_world(grid: VoxelGrid, mean: Tensor, peak: Tensor | None, covariance: Tensor | None) -> Any:
    """Moments of the voxel index as the function returns them: of world coordinates, a tuple if there are several."""
    affine = grid.affine if grid.affine.dtype == mean.dtype else grid.affine.to(mean.dtype)
    affine = affine.unsqueeze(1)  # (N or 1, 1, 3, 4)
    linear = affine.narrow(-1, 0, 3)  # (N or 1, 1, 3, 3)
    outputs = [(linear * mean.unsqueeze(-2)).sum(-1) + affine.select(-1, 3)]  # exact_matmul in the fewest operations
    if peak is not None:
        outputs.append(peak)
    if covariance is not None:
        outputs.append(exact_matmul(exact_matmul(linear, covariance), linear.mT))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def as_temperature(temperature: Any) -> Any:
    """What a module keeps: a parameter as it is, anything else as a number."""
    if isinstance(temperature, nn.Parameter):
        check_scalar("temperature", temperature)
        return temperature
    if isinstance(temperature, Tensor):
        check_scalar("temperature", temperature)
        temperature = temperature.item()
    check_positive("temperature", temperature)
    return float(temperature)


def shown(temperature: Any) -> str:
    """How a module's representation names its temperature."""
    return "learned" if isinstance(temperature, Tensor) else str(temperature)


class SoftArgmax3d(nn.Module):
    """:func:`soft_argmax3d` with its options fixed; no parameters.

    Args:
        temperature: τ > 0; an ``nn.Parameter`` () is trained.
        return_peak: whether the peak probability is returned too.
        return_covariance: whether the covariance is returned too.
        backend: "auto" or a backend's name.

    Example:
        >>> from bkind3d_kernels import SoftArgmax3d
        >>> SoftArgmax3d(temperature=0.5)
        SoftArgmax3d(temperature=0.5, return_peak=False, return_covariance=False, backend=auto)
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        return_peak: bool = False,
        return_covariance: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        backends.check_name(backend)
        self.temperature = as_temperature(temperature)
        self.return_peak = return_peak
        self.return_covariance = return_covariance
        self.backend = backend

    def forward(self, logits: Tensor, grid: VoxelGrid) -> Any:
        """Coordinates (N, J, 3), or a tuple; arguments as in :func:`soft_argmax3d`."""
        return soft_argmax3d(
            logits,
            grid,
            temperature=self.temperature,
            return_peak=self.return_peak,
            return_covariance=self.return_covariance,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"temperature={shown(self.temperature)}, return_peak={self.return_peak}, "
            f"return_covariance={self.return_covariance}, backend={self.backend}"
        )
