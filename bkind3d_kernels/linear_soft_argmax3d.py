"""A 1×1×1 convolution and the 3D soft-argmax of its result, whose logits are never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .checks import (
    check_count,
    check_device,
    check_features,
    check_floating,
    check_grid,
    check_positive,
    check_scalar,
    check_shape,
    check_tensor,
    describe,
    exact,
)
from .geometry import VoxelGrid
from .soft_argmax3d import as_temperature, in_world, shown


def linear_soft_argmax3d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: VoxelGrid,
    *,
    temperature: float | Tensor = 1.0,
    return_peak: bool = False,
    return_covariance: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Expected position of each keypoint under the softmax of a linear map of the features (BKinD-3D, Section 3.1).

    .. math:: \mathrm{logits}_j(x) = \sum_c W_{jc} \, h_c(x) + b_j, \quad
              p = \mathrm{softmax}_x(\mathrm{logits} / \tau), \quad u = \sum_x p(x) \, A x

    The same as :func:`soft_argmax3d` of a ``Conv3d(C, J, 1)`` of the features, without the (N, J, X, Y, Z) logits and
    their gradient: the compiled backends make them a tile at a time, in the backward pass again.

    Args:
        features: h (N, C, X, Y, Z), float32, bfloat16, float16 or float64; fastest in ``channels_last_3d``, as
            :func:`unproject` gives them.
        weight: W (J, C), floating. Logits are computed in float32 (float64 for float64 features) whatever the dtypes,
            and under autocast too.
        bias: b (J,), floating, or None. A softmax does not change when a number is added to all of its logits: no
            output depends on the bias, and its gradient is zero.
        grid: its shape is (X, Y, Z), its affine A has 1 or N entries.
        temperature: τ > 0, a number or a floating tensor (), which may require a gradient: the weight is then divided
            by it. A small one sharpens; flat logits put every keypoint at the centre of the volume.
        return_peak: also return the largest probability, a confidence in (0, 1]; its gradient goes through the lowest
            index of a tie.
        return_covariance: also return Σ = Σ_x p(x) (A x − u)(A x − u)ᵀ, in world units squared.
        backend: "auto", or a name in :data:`bkind3d_kernels.backends.BACKENDS`.

    Returns:
        Coordinates u (N, J, 3) in world units, or a tuple (coordinates, peak (N, J), covariance (N, J, 3, 3)) of what
        was asked for, in that order. All in float32 (float64 for float64 features), all differentiable with respect to
        the features, the weight and ``grid.affine``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        TypeError: an argument is not a tensor or not a VoxelGrid.
        BackendUnavailable: the backend that was named cannot run here.

    Example:
        >>> import torch
        >>> from bkind3d_kernels import VoxelGrid, linear_soft_argmax3d
        >>> grid = VoxelGrid.cube(center=(0.0, 0.0, 0.0), side=2.0, size=5)
        >>> features = torch.zeros(1, 2, 5, 5, 5)
        >>> features[0, 1, 4, 2, 1] = 10.0
        >>> weight = torch.tensor([[0.0, 10.0]])  # of one keypoint
        >>> coordinates, peak = linear_soft_argmax3d(features, weight, None, grid, return_peak=True)
        >>> coordinates.tolist(), peak.tolist()
        ([[[1.0, 0.0, -0.5]]], [[1.0]])
    """
    check_features("features", features, "(N, C, X, Y, Z)")
    _check_parameters(features, weight, bias)
    check_grid(grid, features.shape[0], "features", features)
    if tuple(features.shape[2:]) != grid.shape:
        raise ValueError(f"features {describe(features)}: expected (N, C, X, Y, Z) with the grid's shape {grid.shape}")
    weight, bias = exact(weight, features), None if bias is None else exact(bias, features)
    if isinstance(temperature, Tensor):
        check_scalar("temperature", temperature)
        # No output depends on the bias, so it may stay.
        weight, temperature = weight / exact(temperature, features), 1.0
    check_positive("temperature", temperature)
    run = backends.implementation("linear_soft_argmax3d", backend, features.device, features.dtype)
    mean, peak, covariance = run(features, weight, bias, float(temperature), return_covariance)
    return in_world(grid, mean, peak if return_peak else None, covariance)


def _check_parameters(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight, "(J, C)")
    joints, channels = weight.shape
    if joints == 0:
        raise ValueError(f"weight {describe(weight)}: expected (J, C) with a J of at least 1")
    if channels != features.shape[1]:
        raise ValueError(f"weight {describe(weight)}: expected (J, {features.shape[1]}) as features has channels")
    check_floating("weight", weight)
    check_device("weight", weight, "features", features)
    if bias is None:
        return
    check_shape("bias", bias, (joints,))
    check_floating("bias", bias)
    check_device("bias", bias, "features", features)


class LinearSoftArgmax3d(nn.Module):
    """:func:`linear_soft_argmax3d` with parameters: in place of ``Conv3d(channels, joints, 1)`` and ``SoftArgmax3d``.

    Args:
        channels: C.
        joints: J.
        bias: whether there is one. No output depends on it; it is there to take over the one of a convolution.
        temperature: τ > 0; an ``nn.Parameter`` () is trained.
        return_peak: whether the peak probability is returned too.
        return_covariance: whether the covariance is returned too.
        backend: "auto" or a backend's name.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: (J, C), drawn as ``nn.Conv3d`` and ``nn.Linear`` draw theirs.
        bias: (J,), drawn likewise, or None.

    Example:
        >>> from bkind3d_kernels import LinearSoftArgmax3d
        >>> LinearSoftArgmax3d(32, 15, temperature=0.5)
        LinearSoftArgmax3d(32, 15, bias=True, temperature=0.5, return_peak=False, return_covariance=False, backend=auto)
    """

    def __init__(
        self,
        channels: int,
        joints: int,
        *,
        bias: bool = True,
        temperature: float | Tensor = 1.0,
        return_peak: bool = False,
        return_covariance: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.joints = check_count("channels", channels), check_count("joints", joints)
        backends.check_name(backend)
        self.weight = nn.Parameter(torch.empty(self.joints, self.channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.joints, device=device, dtype=dtype)) if bias else None
        self.temperature = as_temperature(temperature)
        self.return_peak = return_peak
        self.return_covariance = return_covariance
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias between −1/√C and 1/√C."""
        bound = self.channels**-0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Conv3d, **options: Any) -> LinearSoftArgmax3d:
        """With a copy of the parameters of a 1×1×1 convolution; ``options`` are the keyword arguments of the class.

        Raises:
            ValueError: the convolution has another kernel, a stride, padding or groups.
        """
        plain = (conv.kernel_size, conv.stride, conv.groups) == ((1, 1, 1), (1, 1, 1), 1)
        if not plain or conv.padding not in ((0, 0, 0), "valid", "same"):
            raise ValueError(f"conv {conv}: expected kernel size and stride 1, no padding, one group")
        made = cls(conv.in_channels, conv.out_channels, bias=conv.bias is not None, **options)
        made.to(conv.weight.device, conv.weight.dtype)
        with torch.no_grad():
            made.weight.copy_(conv.weight.flatten(1))
            if made.bias is not None and conv.bias is not None:
                made.bias.copy_(conv.bias)
        return made

    def forward(self, features: Tensor, grid: VoxelGrid) -> Any:
        """Coordinates (N, J, 3), or a tuple; arguments as in :func:`linear_soft_argmax3d`."""
        return linear_soft_argmax3d(
            features,
            self.weight,
            self.bias,
            grid,
            temperature=self.temperature,
            return_peak=self.return_peak,
            return_covariance=self.return_covariance,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The sizes and options."""
        return (
            f"{self.channels}, {self.joints}, bias={self.bias is not None}, temperature={shown(self.temperature)}, "
            f"return_peak={self.return_peak}, return_covariance={self.return_covariance}, backend={self.backend}"
        )
