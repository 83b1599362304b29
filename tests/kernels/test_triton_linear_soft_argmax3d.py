"""The Triton kernels of linear_soft_argmax3d: what the tests of every backend do not reach."""

import pytest
import torch
from torch import Tensor

from bkind3d_kernels import registration, triton_ops
from bkind3d_kernels.reference import linear_soft_argmax3d as reference

if triton_ops.MISSING is not None:
    pytest.skip(triton_ops.MISSING, allow_module_level=True)

from bkind3d_kernels.triton_ops import linear_soft_argmax3d as kernels

DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPERATOR = getattr(torch.ops, triton_ops.NAMESPACE)
Inputs = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of few voxels, channels and joints, so that slabs, tiles and blocks have borders everywhere."""
    monkeypatch.setattr(kernels, "configuration", lambda *_: kernels.Config(16, 16, 16, 4, 1))
    monkeypatch.setattr(kernels, "LEAST_TILES", 3)
    monkeypatch.setattr(kernels, "SLABS_AT_ONCE", 2)
    monkeypatch.setattr(kernels, "ROWS_AT_ONCE", 4)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(n: int, c: int, j: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Inputs:
    """Features with the channels last, weight and bias; the logits have a deviation of about ``scale``."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, c, *shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = scale * c**-0.5 * torch.randn(j, c, generator=generator, dtype=torch.float64)
    bias = torch.randn(j, generator=generator, dtype=torch.float64)
    features = features.contiguous(memory_format=torch.channels_last_3d)
    return features.to(DEVICE), weight.to(DEVICE, arithmetic(dtype)), bias.to(DEVICE, arithmetic(dtype))


def forward(given: Inputs, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return OPERATOR.linear_soft_argmax3d(*given, temperature, covariance)


def backward(
    grads: tuple[Tensor | None, ...],
    given: Inputs,
    temperature: float,
    outputs: tuple[Tensor, ...],
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    mean, _, *rest = outputs
    return OPERATOR.linear_soft_argmax3d_backward(*grads, *given, temperature, mean, *rest, *needs)


def random_grads(n: int, j: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of mean, peak and covariance; the last not symmetric."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3,), (), (3, 3)
    return tuple(torch.randn(n, j, *s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)


def double(given: Inputs) -> Inputs:
    return tuple(None if t is None else t.double() for t in given)


def exact_gradients(given: Inputs, temperature: float, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    features, weight = (t.detach().clone().requires_grad_() for t in given[:2])
    outputs = reference.run(features, weight, given[2], temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), (features, weight))


def compare(given: Inputs, temperature: float, rtol: float, atol: float) -> None:
    """Forward and backward against the reference in float64."""
    outputs = forward(given, temperature)
    for got, expected in zip(outputs, reference.run(*double(given), temperature, True)):
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * size)
    grads = random_grads(*outputs[1].shape, outputs[0].dtype)
    exact = exact_gradients(double(given), temperature, grads)
    for got, expected in zip(backward(grads, given, temperature, outputs), exact):
        assert float((got.double() - expected).norm()) <= 10 * atol * max(1.0, float(expected.norm()))


# ---- borders of tiles, slabs and blocks ----


@pytest.mark.parametrize(
    ("n", "channels", "joints", "shape"),
    [
        (1, 1, 1, (1, 1, 1)),
        (2, 3, 5, (3, 5, 7)),
        (1, 16, 16, (4, 4, 13)),
        (2, 17, 2, (2, 3, 17)),  # a second part of the channels
        (1, 40, 3, (1, 1, 131)),
        (1, 5, 17, (5, 11, 1)),  # a second block of joints
        (1, 18, 33, (3, 4, 5)),
    ],
)
def test_several_programs(small: None, n: int, channels: int, joints: int, shape: tuple[int, int, int]) -> None:
    compare(inputs(n, channels, joints, *shape), 0.7, 1e-4, 1e-5)
    compare(inputs(n, channels, joints, *shape, dtype=torch.float64), 0.7, 1e-9, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_two_blocks_of_joints_are_rounded_once(small: None, dtype: torch.dtype) -> None:
    given = inputs(1, 4, 40, 3, 4, 5, dtype=dtype)
    grads = random_grads(1, 40, torch.float32)
    exact = exact_gradients(double(given), 1.0, grads)[0]
    got = backward(grads, given, 1.0, forward(given))[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_slabs_follow_from_the_sizes() -> None:
    for n, voxels, tile in ((1, 1, 16), (2, 64**3, 64), (2, 128**3, 32), (5000, 4096, 64), (1, 63, 64), (1, 513, 64)):
        slabs, each = kernels._slabs(n, voxels, tile)
        assert each % tile == 0
        assert (slabs - 1) * each < voxels <= slabs * each
        assert n * slabs <= max(n, 2 * kernels.MOST_PROGRAMS)


# ---- precision ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_each_dtype(dtype: torch.dtype) -> None:
    given = inputs(2, 12, 3, 9, 10, 11, dtype=dtype)
    grads = random_grads(2, 3, arithmetic(dtype))
    exact = (*reference.run(*double(given), 0.8, True), *exact_gradients(double(given), 0.8, grads))
    theirs = (*reference.run(*given, 0.8, True), *exact_gradients(given, 0.8, grads))
    outputs = forward(given, 0.8)
    ours = (*outputs[:3], *backward(grads, given, 0.8, outputs))
    for e, a, b in zip(exact, ours, theirs):
        assert a.dtype == b.dtype
        # The reference takes its products in float64: what float32 rounds in logits of 10 is allowed on top.
        unit = 100 * torch.finfo(arithmetic(dtype)).eps * float(e.norm())
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


def test_sharp_peak_far_from_the_centre(small: None) -> None:
    x = torch.arange(24, dtype=torch.float64)
    d2 = [(x - c) ** 2 for c in (21.3, 3.7, 20.1)]
    distance = d2[0][:3].view(-1, 1, 1) + d2[1][:12].view(-1, 1) + d2[2]
    features = torch.stack([-distance, torch.full_like(distance, 100.0)]).float()[None].to(DEVICE)
    weight = torch.tensor([[1 / (2 * width**2), 1.0] for width in (0.3, 1.0)], device=DEVICE)
    mean, peak, covariance, *_ = forward((features, weight, None))
    exact = reference.run(features.double(), weight.double(), None, 1.0, True)
    torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(peak.double(), exact[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(covariance.double(), exact[2], rtol=1e-3, atol=1e-4)


# ---- special values: as the reference has them ----


def test_infinite_and_nan_logits(small: None) -> None:
    dtype, shape = torch.float32, (3, 5, 7)
    rows = [inputs(1, 8, 8, *shape, dtype=dtype)[0][0, i].flatten() for i in range(8)]
    infinity = float("inf")
    rows[0][::3] = -infinity
    rows[1][:-1] = -infinity  # one voxel is left
    rows[2][:] = -infinity
    rows[3][-1] = infinity
    rows[4][0] = float("nan")
    rows[5][-1] = float("nan")
    rows[6][:] = float("nan")
    rows[7][:] = -infinity
    rows[7][-1] = float("nan")
    given = torch.stack(rows).view(8, 1, *shape), torch.ones(1, 1, device=DEVICE), None
    outputs = forward(given)
    for got, expected in zip(outputs, reference.run(*given, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ((outputs[5] >= 0) & (outputs[5] < 105)).all()
    grads = random_grads(8, 1, outputs[0].dtype)
    got, expected = backward(grads, given, 1.0, outputs)[0], exact_gradients(given, 1.0, grads)[0]
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_argmax_is_the_lowest_index(small: None) -> None:
    features = torch.zeros(1, 2, 5, 6, 7)
    features[0, 1, 2, 3, 4] = features[0, 1, 2, 3, 6] = features[0, 1, 4, 5, 6] = 1.5
    argmax = forward((features.to(DEVICE), torch.eye(2, device=DEVICE), None))[5]
    assert argmax.tolist() == [[0, (2 * 6 + 3) * 7 + 4]]


# ---- memory ----


def test_any_strides(small: None) -> None:
    dtype = torch.float16
    given = inputs(1, 5, 2, 3, 4, 6, dtype=dtype)
    expected = forward(given)
    grads = random_grads(1, 2, torch.float32)
    gradients = backward(grads, given, 1.0, expected)
    features = given[0]
    padded = torch.full((1, 5, 3, 4, 9), torch.nan, dtype=dtype, device=DEVICE)
    padded[..., 1:-2] = features
    wide = torch.full((1, 3, 4, 6, 8), torch.nan, dtype=dtype, device=DEVICE)
    wide[..., 2:7] = features.permute(0, 2, 3, 4, 1)
    views = features.contiguous(), padded[..., 1:-2], wide[..., 2:7].permute(0, 4, 1, 2, 3)
    for view in (*views, features.transpose(2, 4).contiguous().transpose(2, 4)):
        other = view, given[1].t().contiguous().t(), torch.stack([given[2], given[2]], 1)[:, 0]
        outputs = forward(other)
        for a, b in zip(outputs, expected):
            torch.testing.assert_close(a, b)
        swapped = grads[0].transpose(0, 1).contiguous().transpose(0, 1).double(), grads[1], grads[2].mT.clone().mT
        for a, b in zip(backward(swapped, other, 1.0, outputs), gradients):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 17, 3, 4, 6), (0, 3, 4, 5, 6), (1, 1, 1, 3, 1)])
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    small: None, poisoned: None, shape: tuple[int, ...], dtype: torch.dtype, covariance: bool
) -> None:
    given = inputs(*shape[:2], 3, *shape[2:], dtype=dtype)
    outputs = forward(given, 1.0, covariance)
    fake, fake_backward = registration._OPERATORS["linear_soft_argmax3d"][:2]
    grads = list(random_grads(shape[0], 3, outputs[0].dtype))
    if not covariance:
        grads[2] = None
    for needs in ((True, True), (False, False), (True, False)):
        gradients = backward(grads, given, 1.0, outputs, needs)
        declared = (*fake(*given, 1.0, covariance), *fake_backward(*[None] * 3, *given, 1.0, *[None] * 5, *needs))
        for a, b in zip((*outputs, *gradients), declared):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert a.isfinite().all()
    assert (outputs[5] >= 0).all()


def test_repeated_calls_give_the_same_bits(small: None) -> None:
    given = inputs(1, 17, 18, 3, 4, 7)
    grads = random_grads(1, 18, torch.float32)
    first, second = ((*o, *backward(grads, given, 1.0, o)) for o in (forward(given), forward(given)))
    assert all(map(torch.equal, first, second))


# ---- autograd and the operator's registration ----


def test_gradcheck_of_all_outputs() -> None:
    leaves = [t.requires_grad_() for t in inputs(1, 2, 2, 2, 1, 3, scale=1.0, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: forward(x, 0.7)[:3], leaves)


@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(covariance: bool) -> None:
    features, weight, bias = inputs(2, 3, 2, 2, 3, 4)
    given = features.transpose(2, 4), weight.t().contiguous().t(), bias if covariance else None
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    torch.library.opcheck(OPERATOR.linear_soft_argmax3d.default, (*leaves, 0.7, covariance))
    outputs = forward(given, 0.7, covariance)
    mean, peak, second = random_grads(2, 2, outputs[0].dtype)
    grads = mean.transpose(0, 1).contiguous().transpose(0, 1), peak, second if covariance else None
    torch.library.opcheck(
        OPERATOR.linear_soft_argmax3d_backward.default,
        (*grads, *given, 0.7, outputs[0], *outputs[2:], covariance, True),
    )


GOOD = torch.zeros(1, 3, 2, 2, 2), torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(3, 2, 2, 2)}, r"features \(3, 2, 2, 2\): expected \(N, C, X, Y, Z\)"),
        ({0: torch.zeros(1, 3, 2, 0, 2)}, r"features \(1, 3, 2, 0, 2\): expected \(N, C, X, Y, Z\)"),
        ({0: torch.zeros(1, 1, 1, 1, 1).expand(1, 3, 2**11, 2**10, 2**10)}, "no more than 2\\^30 voxels"),
        ({1: torch.zeros(2, 4)}, r"weight \(2, 4\): expected \(J, 3\)"),
        ({1: torch.zeros(0, 3)}, r"weight \(0, 3\): expected \(J, 3\)"),
        ({1: torch.zeros(2, 3).double()}, "weight: expected torch.float32 on .*, got torch.float64"),
        ({2: torch.zeros(3)}, r"bias \(3,\): expected \(2,\)"),
        ({2: torch.zeros(2).half()}, "bias: expected torch.float32 on .*, got torch.float16"),
    ],
)
def test_the_operator_checks_what_its_kernels_rely_on(changes: dict[int, Tensor], message: str) -> None:
    good = tuple(t.to(DEVICE) for t in GOOD)
    given = tuple(changes.get(i, t).to(DEVICE) for i, t in enumerate(good))
    with pytest.raises(ValueError, match=message):
        forward(given)
    outputs = forward(good)
    grads = random_grads(1, 2, torch.float32)
    with pytest.raises(ValueError, match=message):
        backward(grads, given, 1.0, outputs)


@pytest.mark.parametrize("position", range(7))
def test_gradients_and_outputs_of_another_size_are_refused(position: int) -> None:
    good = tuple(t.to(DEVICE) for t in GOOD)
    outputs = list(forward(good))
    grads = list(random_grads(1, 2, torch.float32))
    names = "grad_mean", "grad_peak", "grad_covariance", "mean", "covariance", "maximum", "total"
    if position < 3:
        grads[position] = grads[position][:, :1]
    else:
        place = (0, 2, 3, 4)[position - 3]
        outputs[place] = outputs[place][:, :1]
    with pytest.raises(ValueError, match=rf"{names[position]} \(1, 1.*\): expected \d+ elements"):
        backward(tuple(grads), good, 1.0, tuple(outputs))
