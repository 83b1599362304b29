"""The operators of linear_soft_argmax3d: what every family of kernels must do."""

from typing import Any

import pytest
import torch
from cases import linear_soft_argmax3d as cases
from cases.linear_soft_argmax3d import CPP, TRITON, Inputs, backward, compare, forward, inputs
from cases.soft_argmax3d import (
    BACKWARD_NAMES,
    DTYPES,
    broad_logits,
    check_flat,
    in_each_instruction_set,
    last,
    of_another_size,
    random_grads,
    turned,
)
from torch import Tensor

# ---- against the reference in float64 ----


@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_error_of_each_dtype(operators: Any, dtype: torch.dtype) -> None:
    given = inputs(2, 12, 3, *cases.ERROR_SHAPES[operators.name], dtype=dtype)
    cases.check_error(operators, given, ulps=20 if operators.name == CPP and dtype != torch.float64 else 100)


@in_each_instruction_set
def test_sharp_peak_far_from_the_centre(operators: Any) -> None:
    # Logits near 1000 are rounded to 6e-5: in the peak and in weights of 0.1 voxels² of variance.
    given = cases.sharp_inputs(cases.SHARP_SHAPES[operators.name], 1000.0)
    cases.check_sharp_peak(operators, given, mean=1e-4, peak=1e-4, covariance=(2e-4, 2e-5))


@in_each_instruction_set
def test_a_broad_maximum_far_from_the_largest_logit(operators: Any) -> None:
    given = last(broad_logits(cases.SIDES[operators.name])), torch.ones(1, 1), None
    compare(operators, given, rtol=1e-5, atol=1e-5)


@in_each_instruction_set
def test_flat_volume(operators: Any) -> None:
    shape = [cases.FLAT_SIDES[operators.name]] * 3
    check_flat(forward(operators, (torch.ones(1, 1, *shape), torch.full((1, 1), 7.0), None)), shape)


# ---- special values ----


@pytest.mark.filterwarnings("ignore:All-NaN")  # by the maximum of Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_infinite_and_nan_logits(operators: Any, dtype: torch.dtype) -> None:
    for shape in cases.SPECIAL_SHAPES[operators.name]:
        cases.check_special(operators, cases.special_inputs(*shape, dtype=dtype))


@in_each_instruction_set
def test_argmax_is_the_lowest_index(operators: Any) -> None:
    for shape, places in [*cases.TIES, *cases.LARGE_TIES[operators.name]]:
        cases.check_ties(operators, cases.tied_inputs(shape, places), places)


# ---- memory ----


@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_any_strides(operators: Any, dtype: torch.dtype) -> None:
    for sizes in cases.STRIDED_SIZES[operators.name]:
        cases.check_strides(operators, inputs(*sizes, dtype=dtype), exact=operators.name == CPP)


@in_each_instruction_set
def test_expanded_features_and_weight(operators: Any) -> None:
    features, weight, bias = inputs(1, 1, 2, 5, 1, 37)
    expanded = features.expand(3, 6, 5, 4, 37), weight.expand(2, 6), bias
    dense = expanded[0].contiguous(), expanded[1].contiguous(), bias
    outputs = forward(operators, dense)
    assert all(map(torch.equal, forward(operators, expanded), outputs))
    grads = random_grads(outputs[0])
    gradients = (backward(operators, grads, given, 1.0, outputs) for given in (expanded, dense))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@in_each_instruction_set
def test_gradients_of_any_strides_and_dtype(operators: Any, dtype: torch.dtype) -> None:
    given = inputs(2, 5, 3, 5, 6, 20, dtype=dtype)
    outputs = forward(operators, given)
    grads = tuple(g.float() for g in random_grads(outputs[0]))
    expected = backward(operators, grads, given, 1.0, outputs)
    assert all(map(torch.equal, backward(operators, turned(*grads), given, 1.0, outputs), expected))
    without = backward(operators, (*grads[:2], None), given, 1.0, forward(operators, given, covariance=False))
    zeros = torch.zeros_like(grads[2])
    torch.testing.assert_close(without, backward(operators, (*grads[:2], zeros), given, 1.0, outputs))
    for needs in ((True, False), (False, True), (False, False)):
        for got, whole, need in zip(backward(operators, grads, given, 1.0, outputs, needs), expected, needs):
            assert torch.equal(got, whole) if need else got.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
@in_each_instruction_set
def test_every_element_is_written_as_the_fakes_declare(
    operators: Any, poisoned: None, dtype: torch.dtype, covariance: bool
) -> None:
    for sizes in cases.WRITTEN_SIZES[operators.name]:
        cases.check_written(operators, inputs(*sizes, dtype=dtype), covariance)


# ---- autograd and the operator's registration ----


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@in_each_instruction_set
def test_gradcheck_of_all_outputs(operators: Any, temperature: float, contiguous: bool) -> None:
    sizes = cases.GRADCHECK_SIZES[operators.name]
    features, *parameters = inputs(*sizes, scale=1.0, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (features.contiguous() if contiguous else features, *parameters)]
    # Interpreted, every element is tried once.
    fast = operators.name == TRITON and (contiguous or temperature == 1.0)
    assert torch.autograd.gradcheck(lambda *x: forward(operators, x, temperature)[:3], leaves, fast_mode=fast)
    assert torch.autograd.gradcheck(
        lambda *x: forward(operators, (*x, None), temperature, False)[:2],
        leaves[:2],
        fast_mode=operators.name == TRITON,
    )


def check_operators(operators: Any, given: Inputs, covariance: bool, **options: Any) -> None:
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    torch.library.opcheck(operators.linear_soft_argmax3d.default, (*leaves, 0.7, covariance), **options)
    outputs = forward(operators, given, 0.7, covariance)
    mean, peak, second = turned(*random_grads(outputs[0]))
    grads = mean, peak, second if covariance else None
    arguments = *grads, *given, 0.7, outputs[0], *outputs[2:], covariance, True
    torch.library.opcheck(operators.linear_soft_argmax3d_backward.default, arguments, **options)


@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(operators: Any, covariance: bool) -> None:
    features, weight, bias = inputs(2, 3, 2, 4, 5, 6)
    weight, bias = cases.strided_parameters(weight, bias)
    for view in (features, cases.strided(features)["x and z exchanged"]):
        check_operators(operators, (view, weight, bias if covariance else None), covariance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
def test_schemas_and_fakes_hold_for_any_strides_and_dtype(operators: Any, dtype: torch.dtype, covariance: bool) -> None:
    features, weight, bias = inputs(2, 3, 2, 4, 5, 6, dtype=dtype)
    views = [features, *cases.strided(features).values()]
    for view in views[:1] if operators.name == TRITON else views:
        given = view, weight.t().contiguous().t(), bias if covariance else None
        check_operators(operators, given, covariance, test_utils=("test_schema", "test_faketensor"))


def test_no_second_derivative(operators: Any) -> None:
    leaves = [t.requires_grad_() for t in inputs(1, 2, 2, 2, 2, 2, dtype=torch.float64)]
    (gradient,) = torch.autograd.grad(forward(operators, leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# ---- what is refused ----


GOOD = torch.zeros(1, 3, 2, 2, 2), torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(3, 2, 2, 2)}, r"features.*: expected \(N, C, X, Y, Z\)"),
        ({0: torch.zeros(1, 3, 2, 0, 2)}, r"features.*: expected (no empty dimension but N|\(N, C, X, Y, Z\))"),
        ({0: torch.zeros(1, 0, 2, 2, 2)}, r"features.*: expected (no empty dimension but N|\(N, C, X, Y, Z\))"),
        ({1: torch.zeros(2, 4)}, r"weight( \(2, 4\): expected \(J, 3\)|: expected \(J, C\), float32)"),
        ({1: torch.zeros(0, 3)}, r"weight( \(0, 3\): expected \(J, 3\)|: expected \(J, C\), float32)"),
        (
            {1: torch.zeros(2, 3).double()},
            r"weight: expected (torch.float32 on .*, got torch.float64|\(J, C\), float32)",
        ),
        ({2: torch.zeros(3)}, r"bias( \(3,\): expected \(2,\)|: expected \(J,\) in the dtype of the weight)"),
        (
            {2: torch.zeros(2).half()},
            r"bias: expected (torch.float32 on .*, got torch.float16|\(J,\) in the dtype of the weight)",
        ),
    ],
)
def test_bad_inputs_are_refused(operators: Any, changes: dict[int, Tensor], message: str) -> None:
    given = tuple(changes.get(i, t) for i, t in enumerate(GOOD))
    outputs = forward(operators, GOOD)
    with pytest.raises((RuntimeError, ValueError), match=message):
        forward(operators, given)
    with pytest.raises((RuntimeError, ValueError), match=message):
        backward(operators, random_grads(outputs[0]), given, 1.0, outputs)


@pytest.mark.parametrize("name", BACKWARD_NAMES)
def test_gradients_and_outputs_of_another_size_are_refused(operators: Any, name: str) -> None:
    given, size = of_another_size(forward(operators, GOOD), name)
    message = rf"\b{name}( \(1, 1.*\))?: expected ({size} elements|\(N, J\) int64)"
    given |= {"features": GOOD[0], "weight": GOOD[1], "bias": GOOD[2], "temperature": 1.0}
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.linear_soft_argmax3d_backward(needs_features=True, needs_weight=True, **given)


def test_places_are_never_read_as_another_dtype(operators: Any) -> None:
    outputs = forward(operators, GOOD)
    grads = random_grads(outputs[0])
    narrow = *outputs[:5], outputs[5].int()
    if operators.name == TRITON:  # converts them
        gradients = (backward(operators, grads, GOOD, 1.0, given) for given in (narrow, outputs))
        assert all(map(torch.equal, *gradients))
    else:
        with pytest.raises(RuntimeError, match=r"argmax: expected \(N, J\) int64"):
            backward(operators, grads, GOOD, 1.0, narrow)
