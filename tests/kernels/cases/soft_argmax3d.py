"""soft_argmax3d in tests: logits, layouts, sizes, exact results, and what more than one file asserts.

A function that checks takes the operators of a family, ``torch.ops.<namespace>``, and what they are given.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from native import emulation
from switches import each_instruction_set
from torch import Tensor

from bkind3d_kernels import library, registration, triton_ops
from bkind3d_kernels.reference import soft_argmax3d as reference

CPP, TRITON, EMULATED = "bkind3d", triton_ops.NAMESPACE, emulation.NAMESPACE  # families, by their namespaces

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SINGLE = [torch.float32, torch.bfloat16, torch.float16]  # with arithmetic in float32
LENGTHS = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 48, 67])

# By family: borders of what a thread, a slab or a tile takes, and no more than it does in a moment.
SIDES = {CPP: 96, TRITON: 64, EMULATED: 48}
FLAT_SHAPES = {CPP: (192, 192, 192), TRITON: (128, 128, 128), EMULATED: (96, 64, 64)}
SPECIAL_SHAPES = {
    CPP: [(3, 5, 7), (2, 9, 35), (40, 33, 50)],
    TRITON: [(3, 5, 4)],
    EMULATED: [(3, 5, 7), (9, 32, 40)],
}
STRIDED_SHAPES = {
    CPP: [(2, 3, 9, 7, 21), (1, 19, 6, 5, 4), (2, 2, 35, 33, 50)],
    TRITON: [(2, 3, 4, 5, 6)],
    EMULATED: [(2, 3, 4, 5, 8), (1, 19, 6, 5, 4)],
}
WRITTEN_SHAPES = {
    CPP: [(2, 3, 4, 5, 6), (0, 3, 4, 5, 6), (2, 3, 31, 37, 41)],
    TRITON: [(2, 3, 4, 5, 6), (0, 3, 4, 5, 6)],
    EMULATED: [(2, 3, 4, 5, 8), (0, 3, 4, 5, 6), (2, 3, 21, 7, 41)],
}
GRADCHECK_SHAPES = {CPP: [(2, 2, 2, 3, 5)], TRITON: [(1, 2, 2, 1, 3)], EMULATED: [(2, 2, 2, 3, 4), (2, 2, 2, 3, 5)]}

# Places of equal maxima: in a volume (5, 5, 10), which test_triton_soft_argmax3d.py cuts into tiles ...
TIES = [
    [(0, 0, 3), (0, 0, 9)],
    [(0, 4, 9), (1, 0, 0)],  # the higher place in the first tile, the lower in the fourth
    [(0, 3, 5), (1, 0, 0)],  # the higher place in the first tile, the lower in the third, merged later
    [(0, 4, 9), (3, 0, 0)],
    [(4, 4, 9)],
    [],
]
# ... and in volumes of several slabs.
LARGE_TIES = {
    CPP: [
        ((40, 33, 50), [(0, 0, 3), (0, 0, 9)]),
        ((40, 33, 50), [(1, 2, 3), (30, 2, 1)]),
        ((40, 33, 50), [(39, 32, 49)]),
        ((40, 33, 50), [(5, 5, 48), (5, 5, 49)]),
    ],
    TRITON: [],
    EMULATED: [
        ((13, 33, 48), [(0, 0, 3), (0, 0, 9)]),
        ((13, 33, 48), [(1, 2, 3), (8, 2, 1)]),
        ((13, 33, 48), [(12, 32, 47)]),
        ((13, 33, 48), [(5, 5, 46), (5, 5, 47)]),
    ],
}


# ---- inputs ----


def logits_of(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def last(volumes: Tensor) -> Tensor:
    return volumes.contiguous(memory_format=torch.channels_last_3d)


def strided(logits: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    n, j, x, y, z = logits.shape
    wider = logits.new_full((n, j, x, y, z + 5), torch.nan)
    wider[..., 2:-3] = logits
    spread = logits.new_full((n, j, x, y, 2 * z), torch.nan)
    spread[..., ::2] = logits
    samples = logits.new_full((2 * n, j + 1, x, y, z), torch.nan)
    samples[::2, 1:] = logits
    keypoints = last(logits.new_full((n, j + 2, x, y, z), torch.nan))
    keypoints[:, 1:-1] = logits
    return {
        "channels last": last(logits),
        "slice": wider[..., 2:-3],
        "every second": spread[..., ::2],
        "not aligned": logits.new_full((logits.numel() + 1,), torch.nan)[1:].view(logits.shape).copy_(logits),
        "slice of samples and keypoints": samples[::2, 1:],
        "slice of channels last": keypoints[:, 1:-1],
        "z first": logits.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "x and y exchanged": logits.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": logits.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }


def layouts(operators: Any, logits: Tensor) -> list[Tensor]:
    """The logits as they are and with other strides; interpreted, only those two that are read without a copy."""
    views = [logits, *strided(logits).values()]
    return views[:2] if operators.name == TRITON else views


def volumes(joints: list[int], most_voxels: int) -> dict[str, st.SearchStrategy]:
    """What Hypothesis gives the tests of any shape."""
    return {
        "n": st.integers(1, 2),
        "joints": st.sampled_from(joints),
        "shape": st.tuples(LENGTHS, LENGTHS, LENGTHS).filter(lambda s: s[0] * s[1] * s[2] < most_voxels),
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "channels_last": st.booleans(),
    }


def squared_distance(side: int) -> Tensor:
    """In a cube, from a place near a corner."""
    x = torch.arange(side, dtype=torch.float64)
    d2 = [(x - c) ** 2 for c in (side - 3.7, 3.7, side - 1.9)]
    return d2[0].view(-1, 1, 1) + d2[1].view(-1, 1) + d2[2]


def sharp_logits(side: int, width: float) -> Tensor:
    """Two equal keypoints, a Gaussian of that width in voxels near a corner; every logit is large."""
    return (-squared_distance(side) / (2 * width**2)).float().expand(1, 2, -1, -1, -1).contiguous() + 1000.0


def broad_logits(side: int) -> Tensor:
    """The mass is in a corner, the single largest voxel in the opposite one."""
    logits = torch.full((1, 1, side, side, side), -30.0)
    logits[..., 2:8, 3:9, side - 10 : side - 4] = logits_of(6, 6, 6, scale=0.1)
    logits[..., side - 1, side - 1, 0] = 0.5
    return logits


def make_special(rows: Tensor) -> None:
    """Masked, infinite and NaN logits in eight volumes (8, voxels); every third of the first is masked."""
    infinity, nan = float("inf"), float("nan")
    rows[0, ::3] = -infinity
    rows[1, :-1] = -infinity  # one voxel is left
    rows[2] = -infinity
    rows[3, -1] = infinity
    rows[4, 0] = nan
    rows[5, -1] = nan
    rows[6] = nan
    rows[7] = -infinity
    rows[7, -1] = nan


def special_logits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Eight keypoints of one sample, each with something else of :func:`make_special`."""
    logits = logits_of(1, 8, *shape, dtype=dtype)
    make_special(logits.view(8, -1))
    return logits


def random_grads(mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of mean, peak and covariance, for such a mean; the last not symmetric."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3,), (), (3, 3)
    grads = (torch.randn(*mean.shape[:2], *s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(g.to(mean.device, mean.dtype) for g in grads)


def turned(mean: Tensor, peak: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients with other strides, one of them in float64."""
    return (
        mean.double().transpose(0, 1).contiguous().transpose(0, 1),
        peak.t().contiguous().t(),
        covariance.mT.clone().mT,
    )


# ---- the operators, and exact results ----


def forward(operators: Any, logits: Tensor, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return operators.soft_argmax3d(logits, temperature, covariance)


def backward(
    operators: Any, grads: Iterable[Tensor | None], logits: Tensor, temperature: float, outputs: Iterable[Tensor]
) -> Tensor:
    mean, _, *rest = outputs
    return operators.soft_argmax3d_backward(*grads, logits, temperature, mean, *rest)


def exact_gradient(logits: Tensor, temperature: float, grads: Iterable[Tensor]) -> Tensor:
    """That of the reference in the arithmetic of the logits' own dtype, as autograd gives it."""
    logits = logits.detach().clone().requires_grad_()
    outputs = reference.run(logits, temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), logits)[0]


# ---- what is checked ----


def in_each_instruction_set(test: Callable[..., None]) -> Callable[..., None]:
    """Such a test runs once, but for the operators in C++ once with each instruction set."""

    @functools.wraps(test)
    def run(operators: Any, **arguments: Any) -> None:
        for switch in each_instruction_set(operators):
            with switch:
                try:
                    test(operators, **arguments)
                except Exception as error:
                    if operators.name == CPP:
                        error.add_note(f"with the instruction set {library.instruction_set()}")
                    raise

    return run


def compare(
    operators: Any, logits: Tensor, temperature: float = 1.0, rtol: float | None = None, atol: float | None = None
) -> None:
    """Forward and backward against the reference in float64."""
    double = logits.dtype == torch.float64
    rtol = rtol or (1e-9 if double else 1e-4)
    atol = atol or (1e-10 if double else 1e-5)
    outputs = forward(operators, logits, temperature)
    for got, expected in zip(outputs, reference.run(logits.double(), temperature, True)):
        size = max(1.0, float(expected.abs().max()))  # of a covariance, whose entries off the diagonal may be near 0
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * size)
    grads = random_grads(outputs[0])
    got = backward(operators, grads, logits, temperature, outputs)
    expected = exact_gradient(logits.double(), temperature, grads)
    # Where one voxel has nearly all the weight its gradient is a difference of equal terms.
    cancelled = 16 * torch.finfo(outputs[0].dtype).eps / temperature * float(outputs[1].max())
    atol = atol * float(expected.abs().max()) + cancelled
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


def check_error(operators: Any, logits: Tensor) -> None:
    """No more than twice that of the reference in the same dtype, and an ulp."""
    outputs = forward(operators, logits, 0.8)
    grads = random_grads(outputs[0])
    ours = (*outputs[:3], backward(operators, grads, logits, 0.8, outputs))
    theirs = (*reference.run(logits, 0.8, True), exact_gradient(logits, 0.8, grads))
    exact = (*reference.run(logits.double(), 0.8, True), exact_gradient(logits.double(), 0.8, grads))
    for e, a, b in zip(exact, ours, theirs):
        assert a.dtype == b.dtype
        unit = torch.finfo(torch.float32).eps * float(e.norm())
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


def check_sharp_peak(operators: Any, logits: Tensor, width: float) -> None:
    """Of :func:`sharp_logits`."""
    mean, peak, covariance, *_ = forward(operators, logits)
    exact = reference.run(logits.double(), 1.0, True)
    torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(peak.double(), exact[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(covariance.double(), exact[2], rtol=1e-5, atol=1e-6 * width**2)


def check_flat(outputs: Iterable[Tensor], shape: Sequence[int]) -> None:
    """Those of one volume of equal logits."""
    sides, voxels = torch.tensor(shape).float(), math.prod(shape)
    mean, peak, covariance, _, total, argmax = (o.cpu() for o in outputs)
    torch.testing.assert_close(mean[0, 0], (sides - 1) / 2, rtol=0, atol=2e-5)
    torch.testing.assert_close(covariance[0, 0], torch.diag(sides**2 - 1) / 12, rtol=1e-6, atol=1e-3)
    assert peak.item() == pytest.approx(1 / voxels)
    assert (total.item(), argmax.item()) == (pytest.approx(voxels), 0)


def check_special(operators: Any, logits: Tensor) -> None:
    """As the reference has them; of :func:`special_logits`."""
    outputs = forward(operators, logits)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    for got, expected in zip(outputs, reference.run(wide, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ((outputs[5] >= 0) & (outputs[5] < logits[0, 0].numel())).all()
    grads = random_grads(outputs[0])
    got, expected = backward(operators, grads, logits, 1.0, outputs), exact_gradient(logits, 1.0, grads)
    tolerance = max(1e-4, 2 * torch.finfo(logits.dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got.flatten(2)[0, 0, ::3].any()


def tied_logits(shape: tuple[int, int, int], places: list[tuple[int, int, int]]) -> Tensor:
    """Zero, but in one volume the maximum 1.5 at those places."""
    logits = torch.zeros(2, 3, *shape)
    for place in places:
        logits[(1, 2, *place)] = 1.5
    return logits


def check_ties(operators: Any, logits: Tensor, places: list[tuple[int, int, int]]) -> None:
    """The lowest index is the argmax of :func:`tied_logits`, and what the peak's gradient raises."""
    shape = logits.shape[2:]
    lowest = min((int(np.ravel_multi_index(place, shape)) for place in places), default=0)
    *_, maximum, total, argmax = outputs = forward(operators, logits)
    assert argmax.tolist() == [[0, 0, 0], [0, 0, lowest]]
    assert maximum[1, 2] == 1.5 * bool(places)
    weight = float(torch.tensor(-1.5).exp()) if places else 1.0
    assert total[1, 2].item() == pytest.approx(len(places) + (shape.numel() - len(places)) * weight)
    of_peak = torch.zeros_like(outputs[0]), torch.ones_like(outputs[1]), None
    gradient = backward(operators, of_peak, logits, 1.0, outputs)[1, 2].flatten()
    assert (gradient > 0).nonzero().tolist() == [[lowest]]


def check_strides(operators: Any, logits: Tensor, exact: bool) -> None:
    """Any strides of the logits give the same, to the bit if ``exact``."""
    expected = forward(operators, logits)
    grads = random_grads(expected[0])
    expected = (*expected, backward(operators, grads, logits, 1.0, expected))
    for name, view in strided(logits).items():
        outputs = forward(operators, view)
        for a, b in zip((*outputs, backward(operators, grads, view, 1.0, outputs)), expected):
            assert a.is_contiguous(), name
            assert not exact or torch.equal(a, b), name
            torch.testing.assert_close(a, b, msg=name)


def check_strides_of_gradients(operators: Any, logits: Tensor) -> None:
    """Any strides and dtype of the gradients, and none of the covariance."""
    outputs = forward(operators, logits)
    grads = tuple(g.float() for g in random_grads(outputs[0]))
    expected = backward(operators, grads, logits, 1.0, outputs)
    assert torch.equal(backward(operators, turned(*grads), logits, 1.0, outputs), expected)
    ones = torch.ones(()), torch.ones((), dtype=torch.bfloat16), torch.ones((), dtype=torch.float64)
    expanded = [one.expand(g.shape) for one, g in zip(ones, grads)]
    dense = [torch.ones_like(g) for g in grads]
    assert torch.equal(*(backward(operators, g, logits, 1.0, outputs) for g in (expanded, dense)))
    without = backward(operators, (*grads[:2], None), logits, 1.0, forward(operators, logits, covariance=False))
    zeros = torch.zeros_like(grads[2])
    torch.testing.assert_close(without, backward(operators, (*grads[:2], zeros), logits, 1.0, outputs))


def check_written(operators: Any, logits: Tensor, covariance: bool) -> None:
    """Every element is finite and as the fakes declare, for tests in which new memory is NaN."""
    outputs = forward(operators, logits, 1.0, covariance)
    fake, fake_backward = registration._OPERATORS["soft_argmax3d"][:2]
    mean, peak, second = random_grads(outputs[0])
    gradient = backward(operators, (mean, peak, second if covariance else None), logits, 1.0, outputs)
    expected = (*fake(logits, 1.0, covariance), fake_backward(None, None, None, logits, 1.0, *[None] * 5))
    for got, declared in zip((*outputs, gradient), expected):
        assert (got.shape, got.dtype, got.stride()) == (declared.shape, declared.dtype, declared.stride())
        assert got.isfinite().all()
    assert ((outputs[5] >= 0) & (outputs[5] < logits.shape[2:].numel())).all()


# ---- bad arguments of the backward operators ----

BACKWARD_NAMES = ["grad_mean", "grad_peak", "grad_covariance", "mean", "covariance", "maximum", "total", "argmax"]


def of_another_size(outputs: tuple[Tensor, ...], name: str) -> tuple[dict[str, Tensor], int]:
    """What a backward operator takes of a forward one, by name; ``name`` without all but the first keypoint.

    With the number of elements that it should have.
    """
    given = dict(zip(BACKWARD_NAMES, (*outputs[:3], outputs[0], *outputs[2:]), strict=True))
    size = given[name].numel()
    return given | {name: given[name][:, :1]}, size
