"""What the operators of every family hold, by themselves: precision, layouts, memory, registration, what is refused."""

import itertools
from functools import partial

import pytest
import torch
from cases import unproject as cases
from measure import saved_elements

from bkind3d_kernels import registration

CHEAP = ("test_schema", "test_faketensor", "test_autograd_registration")  # of opcheck; the rest traces and compiles


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("aggregation", "unseen"), cases.OPTIONS)
def test_agrees_with_the_reference(aggregation: str, unseen: str, dtype: torch.dtype, operators) -> None:
    for shape in cases.shapes(operators.name, dtype, aggregation):
        cases.check(operators, (*cases.operands(*shape, dtype), shape[-1], aggregation, unseen))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)])
def test_maps_of_one_pixel(size: tuple[int, int], operators) -> None:
    problem = *cases.operands(1, 3, 2, size, (4, 3, 5)), (4, 3, 5), "softmax", "exclude"
    cases.check(operators, problem)
    _, counts, grad_features, _ = cases.evaluate(operators.unproject, *problem)
    assert counts.any()
    assert grad_features.permute(0, 1, 3, 4, 2).is_contiguous()


def test_layouts(operators) -> None:
    """Not a bit depends on the strides of features, q, mask or the gradient."""
    interpreted = operators.name == "bkind3d_triton"
    flags = dict(needs_features=True, needs_q=True, needs_weights=False, deterministic=True)
    for shape, dtype in cases.LAYOUTS[operators.name]:
        features, q, mask, _ = cases.operands(*shape, dtype)
        options = None, list(shape[-1]), "softmax", "zero"
        dense = cases.random_gradient(features, shape[-1])
        backward = partial(operators.unproject_backward, **flags)
        expected = *operators.unproject(features, q, mask, *options), *backward(dense, features, q, mask, *options)
        given_q, given_mask = torch.stack([q, q], dim=-1)[..., 0], mask.mT.contiguous().mT
        for index, (name, given) in enumerate(cases.layouts(features).items()):
            forward = operators.unproject(given, given_q, given_mask, *options)
            # Interpreted, one layout of the gradient with each of the features.
            gradients = cases.gradient_layouts(dense)
            for gradient in [gradients[index % 3]] if interpreted else gradients:
                got = *forward, *backward(gradient, given, given_q, given_mask, *options)
                assert all(torch.equal(a, b) for a, b in zip(got, expected)), name
        for expanded in (dense[..., :1].expand_as(dense), torch.ones_like(dense[:1, :1, :1, :1, :1]).expand_as(dense)):
            got, same = (backward(g, features, q, mask, *options) for g in (expanded, expanded.contiguous()))
            assert all(torch.equal(a, b) for a, b in zip(got, same))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    poisoned: None, deterministic: bool, dtype: torch.dtype, operators
) -> None:
    fake, fake_backward = registration._OPERATORS["unproject"][:2]
    for shape in cases.SMALL[operators.name]:
        common = *cases.operands(*shape, dtype), list(shape[-1]), "weighted", "exclude"
        results = operators.unproject(*common)
        gradient = torch.ones_like(results[0])
        # Interpreted, the gradients one by one are in test_only_what_is_asked_for_is_computed alone.
        several = (
            [(True, True, True)] if operators.name == "bkind3d_triton" else itertools.product([False, True], repeat=3)
        )
        for wanted in several:
            flags = *wanted, deterministic
            got = *results, *operators.unproject_backward(gradient, *common, *flags)
            expected = *fake(*common), *fake_backward(gradient, *common, *flags)
            for a, b in zip(got, expected):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                assert a.isfinite().all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 3, 2), (3, 2, 0)])
def test_a_volume_without_voxels(shape: tuple[int, int, int], deterministic: bool, operators) -> None:
    features, *others = cases.operands(1, 3, 8, (4, 6), (2, 3, 5))
    common = features, *others, list(shape), "weighted", "zero"
    volume, counts = operators.unproject(*common)
    assert (volume.shape, counts.shape) == ((1, 8, *shape), (1, *shape))
    gradients = operators.unproject_backward(volume, *common, True, True, True, deterministic)
    assert [g.shape for g in gradients] == [features.shape, others[0].shape, others[2].shape]
    assert not any(g.any() for g in gradients)


def test_voxels_that_have_no_pixel(operators) -> None:
    """NaN, infinite and huge pixels are seen by none, and read nowhere outside the maps."""
    features, q, mask, weights = cases.operands(1, 4, 3, (4, 5), (3, 4, 2), torch.float32)
    q[0, 0], q[0, 1, 0], q[0, 2, :2, 3], q[0, 3, 2] = torch.nan, torch.inf, 1e30, 0.0
    for output in cases.evaluate(operators.unproject, features, q, mask, weights, (3, 4, 2), "weighted", "zero"):
        assert not output.any()


def test_keeps_nothing_but_its_inputs(operators) -> None:
    features, q, mask, _ = cases.operands(1, 2, 3, (4, 5), (4, 8, 8))
    with saved_elements() as kept:
        volume, _ = operators.unproject(features.requires_grad_(), q, mask, None, [4, 8, 8], "softmax", "zero")
    assert volume.requires_grad
    assert sum(kept) <= features.numel() + q.numel() + mask.numel() < volume.numel()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for_is_computed(wanted: tuple[bool, bool, bool], operators) -> None:
    features, *others = cases.operands(1, 2, 3, (4, 5), (3, 4, 2))
    gradient = torch.ones(1, 3, 3, 4, 2, dtype=torch.float64)
    run = partial(operators.unproject_backward, gradient, features, *others, [3, 4, 2], "weighted", "exclude")
    for got, full, need in zip(run(*wanted, True), run(True, True, True, True), wanted):
        assert torch.equal(got, full) if need else got.numel() == 0


@pytest.mark.parametrize("case", range(6))
def test_opcheck(case: int, operators) -> None:
    features, q, mask, weights, *options = [*cases.samples(operators.name)][case]
    for tensor in (features, q, weights):
        if tensor is not None:
            tensor.requires_grad_()
    common = features, q, mask, weights, *options
    # Traced and differentiated by torch.compile: without weights, and with them and in another layout.
    traced = case == 2 or (case == 0 and operators.name != "bkind3d_triton")
    torch.library.opcheck(operators.unproject.default, common, **({} if traced else {"test_utils": CHEAP}))
    volume, _ = operators.unproject(*common)
    assert volume.requires_grad
    dense = torch.randn(volume.shape).to(volume.dtype)
    for gradient, wanted, deterministic in (
        (dense, (True, True, weights is not None), False),
        (dense.transpose(3, 4).contiguous().transpose(3, 4), (True, False, False), True),
        (torch.ones_like(volume), (False, True, False), False),
        (dense, (False, False, False), True),
    ):
        arguments = gradient, *common, *wanted, deterministic
        torch.library.opcheck(operators.unproject_backward.default, arguments, test_utils=CHEAP)


def test_weights_that_are_nearly_nothing(operators) -> None:
    """Weights of a softmax, small for all views that see a voxel: their reciprocals are infinite, their shares are not.

    Equal weights are the mean, and so are their gradients, up to the digits that a subnormal number has.
    """
    features, q, mask, weights = cases.operands(1, 2, 3, (4, 5), (3, 4, 2), torch.float32)
    tiny = torch.full_like(weights, 1e-40)
    results = []
    for given, aggregation in ((tiny, "weighted"), (None, "mean")):
        common = features, q, mask, given, [3, 4, 2], aggregation, "exclude"
        volume, _ = operators.unproject(*common)
        flags = True, True, False, False
        results.append((volume, *operators.unproject_backward(torch.ones_like(volume), *common, *flags)[:2]))
    for got, expected in zip(*results):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("changes", "message"), cases.BAD)
def test_bad_arguments_are_refused(changes: dict, message: str, operators) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.unproject(*(cases.GOOD | changes).values())


def test_bad_arguments_of_one_family_are_refused(operators) -> None:
    for changes, message in cases.BAD_FOR[operators.name]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            operators.unproject(*(cases.GOOD | changes).values())


def test_bad_gradients_are_refused(operators) -> None:
    refused = [
        ((2, 3, 2, 2, 2), False, r"grad_volume: expected \(N, C, X, Y, Z\)"),
        ((2, 4, 2, 2, 1), False, r"grad_volume: expected \(N, C, X, Y, Z\)"),
        ((2, 4, 2, 2, 2), True, "needs_weights: there are no view_weights"),
    ]
    for shape, needs_weights, message in refused:
        with pytest.raises((RuntimeError, ValueError), match=message):
            operators.unproject_backward(torch.zeros(shape), *cases.GOOD.values(), True, False, needs_weights, False)
