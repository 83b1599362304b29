"""group_norm_act in tests: inputs, layouts, exact results, and what more than one file asserts.

The inputs of a call are x, weight, bias and the residual. A function that checks takes the operators of a family,
``torch.ops.<namespace>``, and what they are given.
"""

from typing import Any

import torch
from torch import Tensor

from bkind3d_kernels import registration
from bkind3d_kernels.reference import group_norm_act as reference

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
Needs = tuple[bool, bool, bool]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = ["relu", "none"]
EPS = 1e-5
EVERYTHING = (True, True, True)

# N, C and the map, then the groups: channels that fill vectors and others, one voxel, one channel a group, several
# slabs, no sample.
SIZES = [
    ((2, 32, 5, 7), 8),
    ((3, 12, 3, 4, 5), 3),
    ((1, 5, 6, 7, 2), 1),
    ((2, 3, 17, 11), 3),
    ((2, 45, 9, 4), 9),
    ((1, 48, 40, 37), 4),
    ((2, 6, 1, 1), 2),
    ((0, 8, 3, 3), 2),
]
FEW_SIZES = [SIZES[1], SIZES[3], *SIZES[-2:]]


def sizes(operators: Any) -> list[tuple[tuple[int, ...], int]]:
    """All of them, or for kernels that are interpreted a few; test_triton_group_norm_act.py divides others."""
    return FEW_SIZES if operators.name == "bkind3d_triton" else SIZES


# ---- inputs ----


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def inputs(
    *shape: int, residual: bool = True, dtype: torch.dtype = torch.float32, mean: float = 0.5, seed: int = 0
) -> Inputs:
    """Channels-last maps and parameters about 1 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, other = normal(*shape) + mean, normal(*shape)
    weight, bias = (t.to(arithmetic(dtype)) for t in (1 + 0.3 * normal(shape[1]), 0.3 * normal(shape[1])))
    return last(x.to(dtype)), weight, bias, last(other.to(dtype)) if residual else None


def random_grad(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return last(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype))


def double(given: Inputs) -> Inputs:
    return tuple(None if t is None else t.double() for t in given)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values with other strides than those of channels-last maps; NaN lies between them."""
    wider = x.new_full((x.shape[0], *x.shape[2:], x.shape[1] + 5), torch.nan)
    wider[..., 2:-3] = x.movedim(1, -1)
    spread = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    spread[..., ::2] = x
    padded = last(x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan))
    padded[..., 1:-2] = x
    return {
        "contiguous": x.contiguous(),
        "a slice of the channels": wider[..., 2:-3].movedim(-1, 1),
        "every second": spread[..., ::2],
        "a slice of each line, channels last": padded[..., 1:-2],
        "lines and columns exchanged": last(x.transpose(2, 3)).transpose(2, 3),
        "batch last": x.movedim(0, -1).contiguous().movedim(-1, 0),
    }


# ---- the operators, and exact results ----


def forward(operators: Any, given: Inputs, groups: int, activation: str = "relu") -> tuple[Tensor, Tensor, Tensor]:
    return operators.group_norm_act(*given, groups, EPS, activation)


def backward(
    operators: Any,
    grad: Tensor,
    given: Inputs,
    outputs: tuple[Tensor, Tensor, Tensor],
    activation: str = "relu",
    needs: Needs = EVERYTHING,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output is handed over where a residual was added to it before a ReLU, as autograd does it."""
    x, weight, bias, residual = given
    y, mean, rstd = outputs
    kept = y if residual is not None and activation == "relu" else None
    needs = (*needs[:2], needs[2] and residual is not None)
    return operators.group_norm_act_backward(grad, x, weight, bias, kept, mean, rstd, activation, *needs)


def reference_results(given: Inputs, groups: int, activation: str, grad: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight, bias and of a residual, in the arithmetic of the dtypes given."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    y = reference.run(*leaves, groups, EPS, activation)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))]


def results(operators: Any, given: Inputs, groups: int, activation: str, grad: Tensor) -> list[Tensor]:
    """The same of the operators."""
    outputs = forward(operators, given, groups, activation)
    gradients = backward(operators, grad, given, outputs, activation)
    return [outputs[0], *(gradients if given[3] is not None else gradients[:3])]


def at_the_kink(given: Inputs, groups: int) -> bool:
    """Whether rounding may decide what a ReLU lets through somewhere."""
    return bool((reference.run(*double(given), groups, EPS, "none").abs() < 2e-6).any())


# ---- what is checked ----


def check_error(operators: Any, given: Inputs, groups: int, activation: str) -> None:
    """No more than twice that of the reference in the same dtypes, and some roundings."""
    grad = random_grad(given[0])
    ours = results(operators, given, groups, activation, grad)
    theirs = reference_results(given, groups, activation, grad)
    exact = reference_results(double(given), groups, activation, grad.double())
    for e, a, b in zip(exact, ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        unit = 50 * torch.finfo(arithmetic(a.dtype)).eps * max(float(e.norm()), e.numel() ** 0.5)
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


def check_statistics(operators: Any, given: Inputs, groups: int, units: float) -> None:
    """Mean, beside itself or the standard deviation, and 1 / sqrt(var + eps), in units of the dtype's rounding."""
    _, mean, rstd = forward(operators, given, groups)
    exact = given[0].double().unflatten(1, (groups, -1)).flatten(2)
    variance, expected = torch.var_mean(exact, -1, correction=0)
    eps = torch.finfo(mean.dtype).eps
    scale = torch.maximum(expected.abs(), variance.sqrt())
    assert float(((mean.double() - expected).abs() / scale).max()) <= units * eps
    assert float((rstd.double() * (variance + EPS).sqrt() - 1).abs().max()) <= units * eps


def check_strides(operators: Any, given: Inputs, groups: int, activation: str) -> None:
    """Any strides of maps, gradients and parameters give the same bits."""
    grad = random_grad(given[0])
    expected = results(operators, given, groups, activation, grad)
    x, weight, bias, residual = given
    other_grads = strided(grad)
    other_residuals = {} if residual is None else strided(residual)
    weight, bias = torch.stack([weight, bias], 1).unbind(1)
    for name, view in strided(x).items():
        other = view, weight, bias, other_residuals.get(name)
        got = results(operators, other, groups, activation, other_grads[name])
        assert all(map(torch.equal, got, expected)), name


def check_written(operators: Any, given: Inputs, groups: int, activation: str) -> None:
    """Every element is finite and as the fakes declare, for tests in which new memory is NaN."""
    outputs = forward(operators, given, groups, activation)
    grad = random_grad(given[0])
    fake, fake_backward = registration._OPERATORS["group_norm_act"][:2]
    for needs in (EVERYTHING, (True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        gradients = backward(operators, grad, given, outputs, activation, needs)
        wanted = (*needs[:2], needs[2] and given[3] is not None)
        declared = (
            *fake(*given, groups, EPS, activation),
            *fake_backward(grad, *given[:3], None, *outputs[1:], activation, *wanted),
        )
        for a, b in zip((*outputs, *gradients), declared, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert a.isfinite().all()
