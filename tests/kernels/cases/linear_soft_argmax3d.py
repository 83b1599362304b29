"""linear_soft_argmax3d in tests: inputs, layouts, sizes, exact results, and what more than one file asserts.

The inputs of a call are features, weight and bias. A function that checks takes the operators of a family,
``torch.ops.<namespace>``, and what they are given.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bkind3d_kernels import registration
from bkind3d_kernels.reference import linear_soft_argmax3d as reference

from .soft_argmax3d import CPP, TRITON, last, make_special, random_grads, squared_distance

Inputs = tuple[Tensor, Tensor, Tensor | None]

# By family, since a call that is interpreted takes a tenth of a second or more.
ERROR_SHAPES = {CPP: (20, 17, 23), TRITON: (9, 10, 11)}
SHARP_SHAPES = {CPP: (96, 96, 96), TRITON: (24, 24, 24)}
SIDES = {CPP: 80, TRITON: 24}
FLAT_SIDES = {CPP: 160, TRITON: 32}
SPECIAL_SHAPES = {CPP: [(3, 5, 7), (20, 33, 50)], TRITON: [(3, 5, 7)]}
# N, C, J and the volume.
STRIDED_SIZES = {
    CPP: [(2, 16, 3, 9, 7, 21), (1, 19, 17, 6, 5, 4), (2, 32, 2, 15, 33, 50)],
    TRITON: [(1, 5, 2, 3, 4, 6)],
}
WRITTEN_SIZES = {
    CPP: [(2, 3, 3, 4, 5, 6), (0, 3, 3, 4, 5, 6), (2, 17, 3, 31, 37, 21), (2, 1, 3, 1, 3, 1)],
    TRITON: [(2, 17, 3, 3, 4, 6), (0, 3, 3, 4, 5, 6), (1, 1, 3, 1, 3, 1)],
}
GRADCHECK_SIZES = {CPP: (2, 3, 2, 2, 3, 5), TRITON: (1, 2, 2, 2, 1, 3)}

# Volumes, and the places of equal maxima in them.
TIES = [((5, 6, 7), [(2, 3, 4), (2, 3, 6), (4, 5, 6)])]
LARGE_TIES = {
    CPP: [
        ((40, 33, 50), [(0, 0, 3), (0, 0, 9)]),
        ((40, 33, 50), [(1, 2, 3), (30, 2, 1)]),
        ((40, 33, 50), [(39, 32, 49)]),
    ],
    TRITON: [],
}


# ---- inputs ----


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(n: int, c: int, j: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Inputs:
    """Features with the channels last, weight and bias; the logits have a deviation of about ``scale``."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, c, *shape, generator=generator, dtype=torch.float64)
    weight = scale * c**-0.5 * torch.randn(j, c, generator=generator, dtype=torch.float64)
    bias = torch.randn(j, generator=generator, dtype=torch.float64)
    return last(features.to(dtype)), weight.to(arithmetic(dtype)), bias.to(arithmetic(dtype))


def double(given: Inputs) -> Inputs:
    return tuple(None if t is None else t.double() for t in given)


def on(device: str, given: Inputs) -> Inputs:
    return tuple(None if t is None else t.to(device) for t in given)


def strided(features: Tensor) -> dict[str, Tensor]:
    """The same values with other strides than those of channels-last features."""
    n, c, x, y, z = features.shape
    wider = features.new_full((n, x, y, z, c + 5), torch.nan)
    wider[..., 2:-3] = features.permute(0, 2, 3, 4, 1)
    spread = features.new_full((n, c, x, y, 2 * z), torch.nan)
    spread[..., ::2] = features
    padded = features.new_full((n, c, x, y, z + 3), torch.nan)
    padded[..., 1:-2] = features
    return {
        "contiguous": features.contiguous(),
        "a slice of the channels": wider[..., 2:-3].permute(0, 4, 1, 2, 3),
        "every second": spread[..., ::2],
        "a slice along z": padded[..., 1:-2],
        "a slice along z, channels last": last(padded)[..., 1:-2],
        "z first": features.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "x and z exchanged": features.transpose(2, 4).contiguous().transpose(2, 4),
        "x and y exchanged, channels last": features.permute(0, 3, 2, 4, 1).contiguous().permute(0, 4, 2, 1, 3),
        "batch last": features.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }


def strided_parameters(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]


def sharp_inputs(shape: tuple[int, int, int], level: float) -> Inputs:
    """Gaussians of widths 0.3 and 1 near a corner of the cube of the longest side; every logit is large."""
    x, y, z = shape
    distance = squared_distance(max(shape))[:x, :y, :z]
    features = last(torch.stack([-distance, torch.full_like(distance, level)]).float()[None])
    return features, torch.tensor([[1 / (2 * width**2), 1.0] for width in (0.3, 1.0)]), None


def special_inputs(*shape: int, dtype: torch.dtype) -> Inputs:
    """One channel, so that a logit is what it holds, and a sample for each of :func:`make_special`."""
    features = inputs(1, 8, 8, *shape, dtype=dtype)[0].contiguous().view(8, 1, *shape)
    make_special(features.view(8, -1))
    return features, torch.ones(1, 1, dtype=arithmetic(dtype)), None


def tied_inputs(shape: tuple[int, int, int], places: list[tuple[int, int, int]]) -> Inputs:
    """Logits of 0, but in one volume the maximum 1.5 at those places."""
    features = torch.zeros(2, 3, *shape)
    for place in places:
        features[(1, 2, *place)] = 1.5
    return last(features), torch.eye(3), None


# ---- the operators, and exact results ----


def forward(operators: Any, given: Inputs, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return operators.linear_soft_argmax3d(*given, temperature, covariance)


def backward(
    operators: Any,
    grads: Iterable[Tensor | None],
    given: Inputs,
    temperature: float,
    outputs: Iterable[Tensor],
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    mean, _, *rest = outputs
    return operators.linear_soft_argmax3d_backward(*grads, *given, temperature, mean, *rest, *needs)


def exact_gradients(given: Inputs, temperature: float, grads: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Those of the reference in the arithmetic of the dtypes given, as autograd gives them."""
    features, weight = (t.detach().clone().requires_grad_() for t in given[:2])
    outputs = reference.run(features, weight, given[2], temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), (features, weight))


# ---- what is checked ----


def compare(
    operators: Any, given: Inputs, temperature: float = 1.0, rtol: float | None = None, atol: float | None = None
) -> None:
    """Forward and backward against the reference in float64."""
    wide = given[0].dtype == torch.float64
    rtol = rtol or (1e-9 if wide else 1e-4)
    atol = atol or (1e-10 if wide else 1e-5)
    outputs = forward(operators, given, temperature)
    for got, expected in zip(outputs, reference.run(*double(given), temperature, True)):
        size = max(1.0, float(expected.abs().max()))  # of a covariance, whose entries off the diagonal may be near 0
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * size)
    grads = random_grads(outputs[0])
    # Where one voxel has nearly all the weight its gradient is a difference of equal terms.
    cancelled = 32 * torch.finfo(outputs[0].dtype).eps / temperature * float(outputs[1].max())
    features, weight = backward(operators, grads, given, temperature, outputs)
    exact = exact_gradients(double(given), temperature, grads)
    size = float(exact[0].abs().max())
    largest = max(1.0, float(given[1].double().abs().sum(0).max()))  # weight by which those differences are multiplied
    torch.testing.assert_close(features.double(), exact[0], rtol=rtol, atol=atol * size + cancelled * largest)
    # One of the weight is a sum over the voxels of terms of either sign.
    terms = float(exact[0].norm()) * float(given[0].double().abs().amax())
    torch.testing.assert_close(weight.double(), exact[1], rtol=rtol, atol=atol * terms + cancelled)
    if operators.name == TRITON:
        for got, expected in zip((features, weight), exact):
            assert float((got.double() - expected).norm()) <= 10 * atol * max(1.0, float(expected.norm()))


def check_error(operators: Any, given: Inputs, ulps: float) -> None:
    """No more than twice that of the reference in the same dtypes, and what float32 rounds in the logits.

    The reference takes its products in float64.
    """
    outputs = forward(operators, given, 0.8)
    grads = random_grads(outputs[0])
    ours = (*outputs[:3], *backward(operators, grads, given, 0.8, outputs))
    theirs = (*reference.run(*given, 0.8, True), *exact_gradients(given, 0.8, grads))
    exact = (*reference.run(*double(given), 0.8, True), *exact_gradients(double(given), 0.8, grads))
    for e, a, b in zip(exact, ours, theirs):
        assert a.dtype == b.dtype
        unit = ulps * torch.finfo(outputs[0].dtype).eps * float(e.norm())
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


def check_sharp_peak(operators: Any, given: Inputs, mean: float, peak: float, covariance: tuple[float, float]) -> None:
    """Of :func:`sharp_inputs`, within tolerances: absolute, relative, and relative and absolute."""
    outputs = forward(operators, given)
    exact = reference.run(*double(given), 1.0, True)
    torch.testing.assert_close(outputs[0].double(), exact[0], rtol=0, atol=mean)
    torch.testing.assert_close(outputs[1].double(), exact[1], rtol=peak, atol=0)
    torch.testing.assert_close(outputs[2].double(), exact[2], rtol=covariance[0], atol=covariance[1])


def check_special(operators: Any, given: Inputs) -> None:
    """As the reference has them; of :func:`special_inputs`."""
    outputs = forward(operators, given)
    for got, expected in zip(outputs, reference.run(*given, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ((outputs[5] >= 0) & (outputs[5] < given[0][0, 0].numel())).all()
    grads = random_grads(outputs[0])
    got, expected = backward(operators, grads, given, 1.0, outputs)[0], exact_gradients(given, 1.0, grads)[0]
    tolerance = max(1e-4, 2 * torch.finfo(given[0].dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got[0].flatten()[::3].any()


def check_ties(operators: Any, given: Inputs, places: list[tuple[int, int, int]]) -> None:
    """The lowest index is the argmax of :func:`tied_inputs`."""
    shape = given[0].shape[2:]
    *_, maximum, total, argmax = forward(operators, given)
    lowest = min(int(np.ravel_multi_index(place, shape)) for place in places)
    assert argmax.tolist() == [[0, 0, 0], [0, 0, lowest]]
    assert maximum[1, 2] == 1.5
    weight = float(torch.tensor(-1.5).exp())
    expected = len(places) + (shape.numel() - len(places)) * weight
    assert total[1, 2].item() == pytest.approx(expected, rel=1e-6 if operators.name == CPP else 2e-6)


def check_strides(operators: Any, given: Inputs, exact: bool) -> None:
    """Any strides of the inputs give the same, to the bit if ``exact``."""
    outputs = forward(operators, given)
    grads = random_grads(outputs[0])
    expected = (*outputs, *backward(operators, grads, given, 1.0, outputs))
    for name, view in strided(given[0]).items():
        other = view, *strided_parameters(*given[1:])
        outputs = forward(operators, other)
        for a, b in zip((*outputs, *backward(operators, grads, other, 1.0, outputs)), expected):
            assert not exact or torch.equal(a, b), name
            torch.testing.assert_close(a, b, msg=name)


def check_written(operators: Any, given: Inputs, covariance: bool) -> None:
    """Every element is finite and as the fakes declare, for tests in which new memory is NaN."""
    outputs = forward(operators, given, 1.0, covariance)
    fake, fake_backward = registration._OPERATORS["linear_soft_argmax3d"][:2]
    mean, peak, second = random_grads(outputs[0])
    for needs in ((True, True), (True, False), (False, False)):
        gradients = backward(operators, (mean, peak, second if covariance else None), given, 1.0, outputs, needs)
        declared = (*fake(*given, 1.0, covariance), *fake_backward(*[None] * 3, *given, 1.0, *[None] * 5, *needs))
        for a, b in zip((*outputs, *gradients), declared):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert a.isfinite().all()
    assert ((outputs[5] >= 0) & (outputs[5] < given[0].shape[2:].numel())).all()
