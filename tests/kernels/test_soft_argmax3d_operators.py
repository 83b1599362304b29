"""The operators of soft_argmax3d: what every family of kernels must do."""

from typing import Any

import pytest
import torch
from cases import soft_argmax3d as cases
from cases.soft_argmax3d import DTYPES, backward, forward, in_each_instruction_set, last, logits_of, random_grads
from torch import Tensor

# ---- against the reference in float64 ----


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size_z", [23, 24])
@pytest.mark.parametrize("dtype", cases.SINGLE)
@in_each_instruction_set
def test_error_of_each_dtype(operators: Any, dtype: torch.dtype, size_z: int, channels_last: bool) -> None:
    logits = logits_of(2, 3, 20, 17, size_z, dtype=dtype)
    cases.check_error(operators, last(logits) if channels_last else logits)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [0.15, 0.3, 1.0])
@in_each_instruction_set
def test_sharp_peak_far_from_the_centre(operators: Any, width: float, channels_last: bool) -> None:
    logits = cases.sharp_logits(cases.SIDES[operators.name], width)
    cases.check_sharp_peak(operators, last(logits) if channels_last else logits, width)


@in_each_instruction_set
def test_a_broad_maximum_far_from_the_largest_logit(operators: Any) -> None:
    cases.compare(operators, cases.broad_logits(cases.SIDES[operators.name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fill", [0.0, -123.0])
@in_each_instruction_set
def test_flat_volume(operators: Any, fill: float) -> None:
    shape = cases.FLAT_SHAPES[operators.name]
    cases.check_flat(forward(operators, torch.full((1, 1, *shape), fill)), shape)


# ---- special values ----


@pytest.mark.filterwarnings("ignore:All-NaN")  # by the maximum of Triton's interpreter
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_masked_infinite_and_nan_logits(operators: Any, dtype: torch.dtype, channels_last: bool) -> None:
    for shape in cases.SPECIAL_SHAPES[operators.name]:
        logits = cases.special_logits(*shape, dtype=dtype)
        cases.check_special(operators, last(logits) if channels_last else logits)


@pytest.mark.parametrize("place", [-1, 10**9, 2**62, -(2**63)])
@in_each_instruction_set
def test_an_argmax_out_of_range_reads_and_writes_nothing_beyond(operators: Any, place: int) -> None:
    """What the operator is given need not be its own; at most the gradient of one voxel of each volume is another."""
    logits = logits_of(1, 2, 3, 4, 5)
    *outputs, argmax = forward(operators, logits)
    grads = random_grads(outputs[0])
    good = backward(operators, grads, logits, 1.0, [*outputs, argmax])
    got = backward(operators, grads, logits, 1.0, [*outputs, torch.full_like(argmax, place)])
    assert (got != good).sum() <= 4
    assert got.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@in_each_instruction_set
def test_argmax_is_the_lowest_index(operators: Any, channels_last: bool) -> None:
    for shape, places in [*(((5, 5, 10), places) for places in cases.TIES), *cases.LARGE_TIES[operators.name]]:
        logits = cases.tied_logits(shape, places)
        cases.check_ties(operators, last(logits) if channels_last else logits, places)


# ---- memory ----


@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_any_strides(operators: Any, dtype: torch.dtype) -> None:
    for shape in cases.STRIDED_SHAPES[operators.name]:
        cases.check_strides(operators, logits_of(*shape, dtype=dtype), exact=operators.name == cases.CPP)


@in_each_instruction_set
def test_expanded_logits(operators: Any) -> None:
    logits = logits_of(1, 1, 5, 1, 37).expand(3, 2, 5, 4, 37)
    for a, b in zip(forward(operators, logits), forward(operators, logits.contiguous())):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_gradients_of_any_strides_and_dtype(operators: Any, dtype: torch.dtype) -> None:
    cases.check_strides_of_gradients(operators, logits_of(2, 3, 5, 6, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
@in_each_instruction_set
def test_every_element_is_written_as_the_fakes_declare(
    operators: Any, poisoned: None, dtype: torch.dtype, covariance: bool
) -> None:
    for shape in cases.WRITTEN_SHAPES[operators.name]:
        for logits in cases.layouts(operators, logits_of(*shape, dtype=dtype)):
            cases.check_written(operators, logits, covariance)


# ---- autograd and the operator's registration ----


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@in_each_instruction_set
def test_gradcheck_of_all_outputs(operators: Any, temperature: float, channels_last: bool) -> None:
    fast = operators.name != cases.CPP and temperature == 1.0  # emulated and interpreted, every element is tried once
    for shape in cases.GRADCHECK_SHAPES[operators.name]:
        logits = logits_of(*shape, scale=1.0, dtype=torch.float64)
        logits = (last(logits) if channels_last else logits).requires_grad_()
        for covariance in (False, True):
            assert torch.autograd.gradcheck(
                lambda x, c=covariance: forward(operators, x, temperature, c)[: 2 + c], logits, fast_mode=fast
            )


@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(operators: Any, covariance: bool) -> None:
    logits = logits_of(2, 3, 4, 5, 6)
    views = cases.strided(logits)
    for view in (logits, *(views[name] for name in ("channels last", "slice", "x and y exchanged"))):
        check_operators(operators, view, covariance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
def test_schemas_and_fakes_hold_for_any_strides_and_dtype(operators: Any, dtype: torch.dtype, covariance: bool) -> None:
    for view in cases.layouts(operators, logits_of(2, 3, 4, 5, 6, dtype=dtype)):
        check_operators(operators, view, covariance, test_utils=("test_schema", "test_faketensor"))


def check_operators(operators: Any, logits: Tensor, covariance: bool, **options: Any) -> None:
    leaf = logits.detach().requires_grad_()
    torch.library.opcheck(operators.soft_argmax3d.default, (leaf, 0.7, covariance), **options)
    outputs = forward(operators, logits, 0.7, covariance)
    mean, peak, second = cases.turned(*random_grads(outputs[0]))
    arguments = mean, peak, second if covariance else None, logits, 0.7, outputs[0], *outputs[2:]
    torch.library.opcheck(operators.soft_argmax3d_backward.default, arguments, **options)


def test_no_second_derivative(operators: Any) -> None:
    logits = logits_of(1, 1, 2, 2, 2, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(forward(operators, logits)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# ---- what is refused ----


LOGITS = logits_of(1, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (LOGITS[0], r"expected \(N, J, X, Y, Z\)"),
        (LOGITS[:, :0], "expected .*no empty dimension but N"),
        (LOGITS[..., :0], "expected .*no empty dimension but N"),
        (LOGITS.int(), "expected float32, "),
    ],
)
def test_bad_logits_are_refused(operators: Any, bad: Tensor, message: str) -> None:
    outputs = forward(operators, LOGITS)
    with pytest.raises((RuntimeError, ValueError), match=f"logits.*: {message}"):
        forward(operators, bad)
    with pytest.raises((RuntimeError, ValueError), match=f"logits.*: {message}"):
        backward(operators, outputs[:3], bad, 1.0, outputs)


@pytest.mark.parametrize("name", cases.BACKWARD_NAMES)
def test_gradients_and_outputs_of_another_size_are_refused(operators: Any, name: str) -> None:
    given, size = cases.of_another_size(forward(operators, LOGITS), name)
    # The compiled families count the elements, Triton compares the shape.
    message = rf"\b{name}(: expected ({size} elements|\(N, J\) int64)| \(1, 1.*: expected \(1, 2)"
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.soft_argmax3d_backward(logits=LOGITS, temperature=1.0, **given)


def test_places_are_never_read_as_another_dtype(operators: Any) -> None:
    outputs = forward(operators, LOGITS)
    narrow = *outputs[:5], outputs[5].int()
    if operators.name == cases.TRITON:  # converts them
        expected = backward(operators, outputs[:3], LOGITS, 1.0, outputs)
        assert torch.equal(backward(operators, outputs[:3], LOGITS, 1.0, narrow), expected)
    else:
        with pytest.raises(RuntimeError, match=r"argmax: expected \(N, J\) int64"):
            backward(operators, outputs[:3], LOGITS, 1.0, narrow)
