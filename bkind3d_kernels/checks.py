"""Input checks that the operations share: one line that names the argument, its shape and what was expected."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .geometry import INTEGERS, VoxelGrid, as_int, checks_values

NUMBERS: tuple[Any, ...] = (int, float, Real)  # NumPy's are the third
FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """Shape of a tensor, or the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def exact(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the dtype of the arithmetic on ``like``: float64 for float64, else float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call that changes nothing takes its time too


def check_tensor(name: str, tensor: Any, dims: str) -> None:
    """Raise unless ``tensor`` is a tensor with as many dimensions as ``dims``, such as "(N, M, C, H, W)"."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {dims}, got {type(tensor).__name__}")
    if tensor.ndim != dims.count(",") + 1:
        raise ValueError(f"{name} {describe(tensor)}: expected {dims}")


def check_shape(name: str, tensor: Any, *expected: tuple[int, ...], why: str = "") -> None:
    """Raise unless ``tensor`` is a tensor of one of these shapes, of which ``why`` says more."""
    if isinstance(tensor, Tensor):
        # Size by size: traced sizes are compared one with another, not in tuples.
        for shape in expected:
            if tensor.ndim == len(shape) and all(a == b for a, b in zip(tensor.shape, shape)):
                return
    # Only here are sizes put into words: a traced one becomes a constant by that.
    text = " or ".join(str(tuple(shape)) for shape in expected)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {text}, got {type(tensor).__name__}")
    raise ValueError(f"{name} {describe(tensor)}: expected {text}{why}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is of one of :data:`FEATURE_DTYPES`."""
    if tensor.dtype not in FEATURE_DTYPES:
        raise ValueError(
            f"{name} {describe(tensor)}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )


def check_features(name: str, tensor: Any, dims: str) -> None:
    """Raise unless ``tensor`` is a floating tensor of that rank with no empty dimension after the first."""
    check_tensor(name, tensor, dims)
    check_floating(name, tensor)
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} {describe(tensor)}: expected {dims} with no empty dimension but N")


def check_device(name: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name} {describe(tensor)}: expected device {reference.device} as {other} has, got {tensor.device}"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(choices)}")


def check_scalar(name: str, value: Tensor) -> None:
    """Raise unless a tensor is a floating number; its value is checked on the CPU alone."""
    if value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"{name} {describe(value)}, {value.dtype}: expected a number above 0 or a floating tensor ()")
    if checks_values(value):
        check_positive(name, value.item())


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS) or not 0 < value < math.inf:
        raise ValueError(f"{name} {value!r}: expected a finite number above 0")


def check_count(name: str, value: Any) -> int:
    """The integer that ``value`` is; raise unless it is one of at least 1."""
    if isinstance(value, bool) or not isinstance(value, INTEGERS) or value < 1:
        raise ValueError(f"{name} {value!r}: expected an integer of at least 1")
    return as_int(value)


def check_grid(grid: Any, n: int, other: str, reference: Tensor) -> None:
    """Raise unless ``grid`` is a VoxelGrid for 1 or ``n`` samples on the device of ``reference``."""
    if not isinstance(grid, VoxelGrid):
        raise TypeError(f"grid: expected a VoxelGrid, got {type(grid).__name__}")
    if grid.affine.shape[0] not in (1, n):
        raise ValueError(f"grid.affine {describe(grid.affine)}: expected (1, 3, 4) or ({n}, 3, 4)")
    check_device("grid.affine", grid.affine, other, reference)
