"""The operators of group_norm_act: what every family of kernels must do."""

from typing import Any

import pytest
import torch
from cases import group_norm_act as cases
from cases.group_norm_act import ACTIVATIONS, DTYPES, EPS, EVERYTHING, backward, forward, inputs, random_grad
from cases.soft_argmax3d import in_each_instruction_set

# ---- against the reference in float64 ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_each_instruction_set
def test_error_of_each_dtype(operators: Any, dtype: torch.dtype, residual: bool, activation: str) -> None:
    for shape, groups in cases.sizes(operators):
        if shape[2:].count(1) < len(shape) - 2 and shape[0]:  # the gradient of a group of few is one of roundings
            cases.check_error(operators, inputs(*shape, residual=residual, dtype=dtype), groups, activation)


@pytest.mark.parametrize("mean", [0.0, 1e4, -1e4])
@in_each_instruction_set
def test_mean_far_from_zero(operators: Any, mean: float) -> None:
    given = inputs(2, 16, 40, 50, residual=False, mean=mean)
    cases.check_statistics(operators, given, 4, units=10)
    cases.check_error(operators, given, 4, "none")


@in_each_instruction_set
def test_a_group_of_one_value_is_its_bias(operators: Any) -> None:
    x, weight, bias, _ = inputs(2, 8, 5, 6, residual=False)
    y, mean, rstd = forward(operators, (torch.full_like(x, 3.7e3), weight, bias, None), 2, "none")
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))
    assert (mean == 3.7e3).all()
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))


@in_each_instruction_set
def test_one_value_far_from_all_others(operators: Any) -> None:
    x, *rest = inputs(1, 4, 30, 40, residual=False)
    for place in ((0, 0, 0, 0), (0, 3, 29, 39), (0, 1, 17, 20)):
        given = x.clone(), *rest
        given[0][place] = 1e5
        cases.check_statistics(operators, given, 1, units=10)


# ---- special values ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_each_instruction_set
def test_what_is_no_number_makes_its_group_nan_and_no_other(operators: Any, value: float, activation: str) -> None:
    x, *rest = inputs(2, 6, 5, 7)
    expected = forward(operators, (x, *rest), 3, activation)
    x = x.clone()
    x[1, 2, 3, 4] = value
    y, mean, rstd = forward(operators, (x, *rest), 3, activation)
    assert y[1, 2:4].isnan().all()
    assert not mean[1, 1].isfinite()
    assert rstd[1, 1].isnan()
    y[1, 2:4], mean[1, 1], rstd[1, 1] = expected[0][1, 2:4], expected[1][1, 1], expected[2][1, 1]
    assert all(map(torch.equal, (y, mean, rstd), expected))


@in_each_instruction_set
def test_a_residual_that_is_no_number_is_seen_where_it_is(operators: Any) -> None:
    x, weight, bias, residual = inputs(1, 4, 3, 3)
    residual = residual.clone()
    residual[0, 1, 1, 1], residual[0, 2, 0, 0] = torch.nan, -torch.inf
    y, *_ = forward(operators, (x, weight, bias, residual), 2)
    assert y.isnan().sum() == 1
    assert y[0, 1, 1, 1].isnan()
    assert y[0, 2, 0, 0] == 0


@in_each_instruction_set
def test_a_relu_lets_nothing_through_at_zero(operators: Any) -> None:
    x, weight, _, _ = inputs(1, 4, 3, 5)
    given = torch.zeros_like(x), weight, torch.zeros_like(weight), None
    outputs = forward(operators, given, 2)
    assert not outputs[0].any()
    assert not any(g.any() for g in backward(operators, random_grad(x), given, outputs))
    given = (*given[:3], torch.zeros_like(x))
    assert not any(g.any() for g in backward(operators, random_grad(x), given, outputs))


# ---- memory ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@in_each_instruction_set
def test_any_strides(operators: Any, dtype: torch.dtype, residual: bool) -> None:
    for shape, groups in cases.sizes(operators)[-5:]:
        cases.check_strides(operators, inputs(*shape, residual=residual, dtype=dtype), groups, "relu")


@in_each_instruction_set
def test_expanded_maps_and_gradients(operators: Any) -> None:
    x, weight, bias, residual = inputs(1, 1, 4, 1)
    expanded = x.expand(3, 6, 4, 5), weight.expand(6), bias.expand(6), residual.expand(3, 6, 4, 5)
    dense = tuple(t.contiguous() for t in expanded)
    grads = torch.ones(1, 1, 1, 1).expand(3, 6, 4, 5), torch.ones(3, 6, 4, 5)
    got, expected = (cases.results(operators, g, 2, "relu", h) for g, h in zip((expanded, dense), grads))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@in_each_instruction_set
def test_gradients_that_are_asked_for(operators: Any, dtype: torch.dtype, residual: bool) -> None:
    given = inputs(2, 6, 5, 7, residual=residual, dtype=dtype)
    grad = random_grad(given[0])
    for activation in ACTIVATIONS:
        outputs = forward(operators, given, 3, activation)
        expected = backward(operators, grad, given, outputs, activation)
        for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
            got = backward(operators, grad, given, outputs, activation, needs)
            wanted = needs[0], needs[1], needs[1], needs[2] and residual
            for a, b, want in zip(got, expected, wanted):
                assert torch.equal(a, b) if want else a.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_each_instruction_set
def test_every_element_is_written_as_the_fakes_declare(
    operators: Any, poisoned: None, dtype: torch.dtype, residual: bool, activation: str
) -> None:
    for shape, groups in cases.sizes(operators):
        cases.check_written(operators, inputs(*shape, residual=residual, dtype=dtype), groups, activation)


def test_no_output_is_an_input(operators: Any) -> None:
    given = inputs(1, 4, 3, 3)
    grad = random_grad(given[0])
    outputs = forward(operators, given, 2, "none")
    gradients = backward(operators, grad, given, outputs, "none")
    assert torch.equal(gradients[3], grad)
    places = [t.untyped_storage().data_ptr() for t in (*given, grad, *outputs, *gradients)]
    assert len(set(places)) == len(places)


# ---- autograd and the operator's registration ----


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@in_each_instruction_set
def test_gradcheck(operators: Any, activation: str, residual: bool) -> None:
    interpreted = operators.name == "bkind3d_triton"  # every element is tried once
    given = inputs(*((1, 6, 1, 3) if interpreted else (2, 6, 2, 3)), residual=residual, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in given if t is not None]
    fast = interpreted and not (residual and activation == "relu")
    assert torch.autograd.gradcheck(
        lambda *x: forward(operators, (*x, None)[:4], 3, activation)[0], leaves, fast_mode=fast
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(operators: Any, activation: str, residual: bool) -> None:
    x, weight, bias, added = inputs(2, 6, 3, 4, residual=residual)
    for view in (x, cases.strided(x)["lines and columns exchanged"]):
        given = tuple(None if t is None else t.detach().requires_grad_() for t in (view, weight, bias, added))
        torch.library.opcheck(operators.group_norm_act.default, (*given, 3, EPS, activation))
        y, mean, rstd = forward(operators, (view, weight, bias, added), 3, activation)
        kept = y if residual else None
        arguments = random_grad(x), view, weight, bias, kept, mean, rstd, activation, True, True, residual
        torch.library.opcheck(operators.group_norm_act_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_schemas_and_fakes_hold_for_any_strides_and_dtype(operators: Any, dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(2, 6, 3, 4, 5, dtype=dtype)
    for view in cases.strided(x).values():
        options = {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(
            operators.group_norm_act.default, (view, weight, bias, residual, 3, EPS, "relu"), **options
        )
        y, mean, rstd = forward(operators, (view, weight, bias, residual), 3)
        arguments = random_grad(x), view, weight, bias, y, mean, rstd, "relu", *EVERYTHING
        torch.library.opcheck(operators.group_norm_act_backward.default, arguments, **options)


def test_no_second_derivative(operators: Any) -> None:
    given = inputs(1, 4, 2, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in given]
    (gradient,) = torch.autograd.grad(forward(operators, leaves, 2)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# ---- what is refused ----


X, PARAMETER = torch.zeros(1, 6, 2, 2), torch.zeros(6)
GOOD = {"x": X, "weight": PARAMETER, "bias": PARAMETER, "residual": None, "groups": 3, "activation": "relu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[0]}, r"x.*: expected \(N, C, H, W\) or \(N, C, X, Y, Z\)"),
        ({"x": X[..., :0]}, r"x.*: expected no empty dimension but N"),
        ({"x": X[:, :0]}, r"x.*: expected no empty dimension but N"),
        ({"x": X.int()}, r"x: expected float32, float64, bfloat16 or float16"),
        ({"weight": PARAMETER[:5]}, r"weight: expected \(C,\), float32"),
        ({"weight": PARAMETER.double()}, r"weight: expected \(C,\), float32"),
        ({"bias": PARAMETER[None]}, r"bias: expected \(C,\), float32"),
        ({"bias": PARAMETER.half()}, r"bias: expected \(C,\), float32"),
        ({"residual": X[..., :1]}, r"residual: expected the shape and dtype of x"),
        ({"residual": X.double()}, r"residual: expected the shape and dtype of x"),
        ({"groups": 4}, r"groups: expected a divisor of the channels"),
        ({"groups": 0}, r"groups: expected a divisor of the channels"),
        ({"activation": "gelu"}, r"activation 'gelu': expected relu or none"),
    ],
)
def test_bad_inputs_are_refused(operators: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.group_norm_act(**(GOOD | changes), eps=EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": X[..., :1]}, r"grad: expected the shape and dtype of x"),
        ({"grad": X.double()}, r"grad: expected the shape and dtype of x"),
        ({"output": X[:, :3]}, r"output: expected the shape and dtype of x"),
        ({"output": None}, r"output: expected where a residual was added before a ReLU"),
        ({"mean": torch.zeros(1, 4)}, r"groups: expected a divisor of the channels"),
        ({"mean": torch.zeros(3)}, r"mean: expected \(N, G\) in the dtype of the weight"),
        ({"mean": torch.zeros(2, 3)}, r"mean: expected \(N, G\) in the dtype of the weight"),
        ({"rstd": torch.zeros(1, 2)}, r"rstd: expected \(N, G\) in the dtype of the weight"),
        ({"rstd": torch.zeros(1, 3).double()}, r"rstd: expected \(N, G\) in the dtype of the weight"),
        ({"weight": PARAMETER[:5]}, r"weight: expected \(C,\), float32"),
        ({"activation": "gelu"}, r"activation 'gelu': expected relu or none"),
    ],
)
def test_bad_inputs_of_backward_are_refused(operators: Any, changes: dict[str, Any], message: str) -> None:
    saved = {"x": X, "weight": PARAMETER, "bias": PARAMETER, "mean": torch.zeros(1, 3), "rstd": torch.ones(1, 3)}
    given = {"grad": X, **saved, "output": X, "activation": "relu", "needs_x": True, "needs_weight": True}
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.group_norm_act_backward(**(given | changes), needs_residual=True)
