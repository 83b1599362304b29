"""Group normalisation, the addition of a residual and a ReLU in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .checks import (
    check_choice,
    check_count,
    check_device,
    check_features,
    check_floating,
    check_positive,
    check_shape,
    describe,
    exact,
)

ACTIVATIONS = ("relu", "none")
DIMS = {4: "(N, C, H, W)", 5: "(N, C, X, Y, Z)"}


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    r"""Group normalisation (Wu and He, 2018), a residual added to it, and an activation: the end of a residual block.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mu_{ng}}{\sqrt{\sigma^2_{ng} + \epsilon}} \, w_c + b_c + r\Bigr)

    with the mean μ and the biased variance σ² of each sample n over the channels of group g and all voxels. The same as
    ``relu(group_norm(x) + residual)``, without what lies between in memory: the compiled backends keep x, μ and
    1/√(σ² + ε) for the backward pass, and y where there are both a residual and a ReLU.

    Args:
        x: (N, C, H, W) or (N, C, X, Y, Z), float32, bfloat16, float16 or float64; fastest in ``channels_last`` or
            ``channels_last_3d``, other layouts are copied.
        num_groups: G, a divisor of C; a group is C / G consecutive channels.
        weight: w (C,), floating.
        bias: b (C,), floating.
        eps: ε > 0.
        residual: r, in the shape and dtype of x, or None.
        activation: "relu" or "none".
        backend: "auto", or a name in :data:`bkind3d_kernels.backends.BACKENDS`.

    Returns:
        y in the shape and dtype of x, channels-last in memory; computed in float32 (float64 for float64 inputs), under
        autocast too, and differentiable with respect to x, the residual, weight and bias. A NaN in x makes its group
        NaN.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        TypeError: an argument is not a tensor.
        BackendUnavailable: the backend that was named cannot run here.

    Example:
        >>> import torch
        >>> from bkind3d_kernels import group_norm_act
        >>> x = torch.tensor([1.0, 3.0, 3.0, 1.0]).view(1, 1, 2, 2)
        >>> y = group_norm_act(x, 1, torch.ones(1), torch.ones(1), eps=1e-12)
        >>> y.flatten().tolist()
        [0.0, 2.0, 2.0, 0.0]
    """
    _check(x, weight, bias, residual)
    groups = check_groups(num_groups, x.shape[1])
    check_positive("eps", eps)
    check_choice("activation", activation, ACTIVATIONS)
    run = backends.implementation("group_norm_act", backend, x.device, x.dtype)
    return run(x, exact(weight, x), exact(bias, x), residual, groups, float(eps), activation)


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    either = " or ".join(DIMS.values())
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor {either}, got {type(x).__name__}")
    if x.ndim not in DIMS:
        raise ValueError(f"x {describe(x)}: expected {either}")
    check_features("x", x, DIMS[x.ndim])
    channels = x.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (channels,))
        check_floating(name, tensor)
        check_device(name, tensor, "x", x)
    if residual is None:
        return
    check_shape("residual", residual, tuple(x.shape))
    if residual.dtype != x.dtype:
        raise ValueError(f"residual {describe(residual)}: expected {x.dtype} as x has, got {residual.dtype}")
    check_device("residual", residual, "x", x)


def check_groups(num_groups: Any, channels: int) -> int:
    """The number of groups; raise unless it is a positive integer that divides ``channels``."""
    groups = check_count("num_groups", num_groups)
    if channels % groups:
        raise ValueError(f"num_groups {groups}: expected a divisor of the {channels} channels")
    return groups


class GroupNormAct(nn.Module):
    """:func:`group_norm_act` with parameters: in place of ``GroupNorm``, an addition and ``ReLU``.

    Args:
        num_groups: G.
        num_channels: C, a multiple of G.
        eps: ε > 0.
        activation: "relu" or "none".
        backend: "auto" or a backend's name.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: (C,), ones at first. Names and shapes are those of ``nn.GroupNorm``, whose state dicts load.
        bias: (C,), zeros at first.

    Example:
        >>> from bkind3d_kernels import GroupNormAct
        >>> GroupNormAct(8, 32)
        GroupNormAct(8, 32, eps=1e-05, activation=relu, backend=auto)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        activation: str = "relu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = check_count("num_channels", num_channels)
        self.num_groups = check_groups(num_groups, self.num_channels)
        check_positive("eps", eps)
        check_choice("activation", activation, ACTIVATIONS)
        backends.check_name(backend)
        self.eps = float(eps)
        self.activation = activation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(self.num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The normalised map, in the shape and dtype of x; arguments as in :func:`group_norm_act`."""
        return group_norm_act(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The sizes and options."""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, activation={self.activation}, "
            f"backend={self.backend}"
        )
