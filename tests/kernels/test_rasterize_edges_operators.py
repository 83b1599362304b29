"""What the operators of every family hold, by themselves: precision, layouts, memory, winners, what is refused.

The C++ operators hold it in every instruction set.
"""

from functools import partial

import pytest
import torch
from cases import rasterize_edges as cases
from measure import gradients, saved_elements
from switches import each_instruction_set
from torch import Tensor

from bkind3d_kernels import registration
from bkind3d_kernels.geometry import all_pairs

CHEAP = ("test_schema", "test_faketensor", "test_autograd_registration")  # of opcheck; the rest traces and compiles

# ---- precision ----


def test_gradcheck(operators) -> None:
    scene, *options = cases.GRADCHECK[operators.name]
    keypoints, weights, edges = cases.with_a_point(*scene)
    inputs = keypoints.requires_grad_(), weights.requires_grad_()
    for instructions in each_instruction_set(operators):
        with instructions:
            assert torch.autograd.gradcheck(cases.maps_of(operators, edges, *options), inputs)


def test_float32_gradients(operators) -> None:
    scene, *options = cases.GRADIENTS[operators.name]
    keypoints, weights, edges = cases.scene(*scene, dtype=torch.float32)
    exact = gradients(cases.reference_maps(edges, *options), keypoints.double(), weights.double())
    for a, b in zip(gradients(cases.maps_of(operators, edges, *options), keypoints, weights), exact):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("far", [1e4, 1e7, 1e10])
def test_both_ends_far_outside(far: float, operators) -> None:
    """A line across the map between ends far away: values and gradients of float32 inputs as those in float64."""
    direction = torch.tensor([0.8, 0.6], dtype=torch.float64)
    ends = torch.stack([-far * direction, 0.7 * far * direction]) + torch.tensor([30.0, 20.0], dtype=torch.float64)
    keypoints, weights = ends[None].float(), torch.ones(1, 1)
    run = cases.maps_of(operators, all_pairs(2), [(40, 60)], [2.0])
    for instructions in each_instruction_set(operators):
        with instructions:
            (image,), (exact,) = run(keypoints, weights), run(keypoints.double(), weights.double())
            got, expected = gradients(run, keypoints, weights), gradients(run, keypoints.double(), weights.double())
        assert image.max() > 0.99 or far > 1e7
        torch.testing.assert_close(image.double(), exact, rtol=1e-4, atol=1e-5)
        assert float((got[0] - expected[0]).norm()) <= 1e-4 * float(expected[0].norm()) + 1e-30


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_below_the_smallest_normal_number_nothing_is_drawn(dtype: torch.dtype, operators) -> None:
    """Nor is there a gradient."""
    inputs = torch.zeros(1, 2, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype), all_pairs(2)
    score = -(torch.arange(64).double() ** 2)
    drawn = score >= cases.LOWEST[dtype]
    far = torch.ones(1, 1, 64, dtype=dtype)
    far[..., :10] = 0
    for instructions in each_instruction_set(operators):
        with instructions:
            (image,), (winner,) = cases.forward(operators, *inputs, [(1, 64)], [1.0])
            gradient, _ = cases.backward(operators, [far], inputs, [winner], [(1, 64)], [1.0])
        assert (winner[0, 0] == torch.where(drawn, 0, -1)).all()
        assert (image[0, 0, ~drawn] == 0).all()
        torch.testing.assert_close(image[0, 0, drawn].double(), score[drawn].exp(), rtol=1e-5, atol=0)
        assert bool((gradient == 0).all()) == (dtype == torch.float32)


def test_weights_of_any_magnitude(operators) -> None:
    keypoints, _, edges = cases.scene(1, 3, (12, 12), dtype=torch.float32)
    keypoints = keypoints.expand(5, -1, -1)
    weights = torch.tensor([1e-37, 1e-20, 1.0, 1e20, 1e37])[:, None].expand(-1, 3)
    for instructions in each_instruction_set(operators):
        with instructions:
            (maps,), _ = cases.forward(operators, keypoints, weights, edges, [(12, 12)], [9.0])
        unit = maps[2].double()
        for image, weight in zip(maps, weights[:, 0]):
            near = image > 0
            torch.testing.assert_close(image[near].double() / float(weight), unit[near], rtol=2e-5, atol=0)


@pytest.mark.parametrize("weight", [1e37, 1e-30])
def test_gradient_of_extreme_weights(weight: float, operators) -> None:
    """dL/dw = exp(−d²/σ²) whatever w is: on the segment, 1."""
    inputs = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]), torch.tensor([[weight]]), all_pairs(2)
    _, winners = cases.forward(operators, *inputs, [(1, 4)], [1.0])
    _, own = cases.backward(operators, [torch.full((1, 1, 4), 100.0)], inputs, winners, [(1, 4)], [1.0])
    torch.testing.assert_close(own, torch.tensor([[400.0]]))


# ---- winners ----


def test_ties_and_zero_length(operators) -> None:
    """A point, twice; the same segment both ways: the first of them wins everywhere."""
    keypoints = torch.tensor([[[4.0, 5.0], [4.0, 5.0], [20.5, 17.0], [30.0, 3.0]]])
    for pairs, points in (([[0, 1], [1, 0], [0, 0]], True), ([[2, 3], [2, 3], [2, 3]], False)):
        arguments = keypoints, torch.ones(1, 3), torch.tensor(pairs), [(33, 40)], [6.0]
        (image,), (winner,) = cases.forward(operators, *arguments)
        assert ((winner == 0) | ((winner == -1) & (image == 0))).all()
        assert image.max() == 1 or not points


def test_winners_are_int16_up_to_their_limit(operators) -> None:
    edges = torch.zeros(2**15, 2, dtype=torch.int64)
    edges[-1] = 1
    keypoints = torch.tensor([[[1e6, 1e6], [1.0, 1.0]]])
    _, (winner,) = cases.forward(operators, keypoints, torch.ones(1, 2**15), edges, [(2, 2)], [1.0])
    assert winner.dtype == torch.int16
    assert (winner == 2**15 - 1).all()


# ---- special values ----


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("what", ["keypoint", "weight", "undrawn"])
def test_nan_is_seen_in_map_and_gradient(what: str, deterministic: bool, operators) -> None:
    """Of the first edge that has it, also if that is not drawn."""
    keypoints, weights, edges = cases.scene(2, 4, (16, 20), dtype=torch.float32)
    weights = weights.abs() + 0.1
    (keypoints[0, 2] if what != "weight" else weights[0, 4:5])[:1] = torch.nan
    if what == "undrawn":
        weights[0, 1] = -1.0
    inputs = keypoints, weights, edges
    for instructions in each_instruction_set(operators):
        with instructions:
            (image,), (winner,) = cases.forward(operators, *inputs, [(16, 20)], [1.0])
            options = [(16, 20)], [1.0], deterministic
            points, _ = cases.backward(operators, [torch.ones_like(image)], inputs, [winner], *options)
        assert image[0].isnan().all()
        assert image[1].isfinite().all()
        assert (winner[0] == (4 if what == "weight" else 1)).all()
        assert points[0].isnan().any()
        assert points[1].isfinite().all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_nan_and_infinite_keypoints_and_weights(dtype: torch.dtype, operators) -> None:
    cases.check_not_finite(operators, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_infinite_weight(dtype: torch.dtype, operators) -> None:
    keypoints = torch.tensor([[[1.0, 1.0], [7.0, 1.0], [3.0, 6.0]]], dtype=dtype)
    weights = torch.tensor([[1.0, torch.inf, 0.5]], dtype=dtype)
    (image,), (winner,) = cases.forward(operators, keypoints, weights, all_pairs(3), [(9, 9)], [1.0])
    assert (image == torch.inf).all()
    assert (winner == 1).all()


# ---- memory ----


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("n", "k", "edges"), [(0, 3, 3), (2, 0, 0), (2, 2, 0), (2, 2, 1), (1, 9, 36)])
def test_every_element_is_written_as_the_fakes_declare(
    n: int, k: int, edges: int, deterministic: bool, dtype: torch.dtype, poisoned: None, operators
) -> None:
    generator = torch.Generator().manual_seed(0)
    keypoints = 5 * torch.rand(n, k, 2, generator=generator).to(dtype)
    inputs = keypoints, torch.rand(n, edges, generator=generator).to(dtype), all_pairs(max(k, 2))[:edges]
    sizes, sigmas = cases.WRITTEN[operators.name]
    fake, fake_backward = registration._OPERATORS["rasterize_edges"][:2]
    expected_maps, expected_winners = fake(*inputs, cases.flat(sizes), sigmas)
    for instructions in each_instruction_set(operators):
        with instructions:
            maps, winners = operators.rasterize_edges(*inputs, cases.flat(sizes), sigmas)
            arguments = [torch.ones_like(m) for m in maps], *inputs, winners, cases.flat(sizes), sigmas, deterministic
            grads = operators.rasterize_edges_backward(*arguments)
        assert ((winners >= -1) & (winners < edges)).all()
        expected = *expected_maps, expected_winners, *fake_backward(*arguments)
        for a, b in zip((*maps, winners, *grads), expected, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert a.isfinite().all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_strides(deterministic: bool, operators) -> None:
    """Of keypoints, weights, edges and the gradients of the maps."""
    n, k, (h, w) = cases.STRIDES[operators.name]
    inputs = keypoints, weights, edges = cases.scene(n, k, (h, w), dtype=torch.float32)
    strided = (
        torch.stack([keypoints, keypoints], dim=-1)[..., 0],
        weights.T.contiguous().T,
        torch.stack([edges.flip(1), edges], dim=-1).flip(1)[..., 0],
    )
    dense = torch.randn(n, h, w, generator=torch.Generator().manual_seed(1))
    # Without determinism Triton adds in an order that strides may change.
    exact = deterministic or operators.name != "bkind3d_triton"
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for instructions in each_instruction_set(operators):
        with instructions:
            maps, winners = cases.forward(operators, *inputs, [(h, w)], [2.0])
            backward = partial(
                cases.backward, operators, winners=winners, sizes=[(h, w)], sigmas=[2.0], deterministic=deterministic
            )
            for got, expected in zip(cases.forward(operators, *strided, [(h, w)], [2.0]), (maps, winners)):
                assert torch.equal(got[0], expected[0])
            for grad in (
                dense.transpose(1, 2).contiguous().transpose(1, 2),
                torch.stack([dense, dense], dim=-1)[..., 0],
                torch.tensor(0.7).expand(n, h, w),
                dense[:, :1].expand(-1, h, -1),
                dense[:, :, :1].expand(-1, -1, w),
            ):
                assert not grad.is_contiguous()
                for a, b in zip(backward([grad], strided), backward([grad.contiguous()], inputs)):
                    torch.testing.assert_close(a, b, **tolerance)


def test_one_map_of_several_differentiated(operators) -> None:
    """The others get no gradient at all; and maps may be changed in place, since backward does not read them."""
    keypoints, weights, edges = cases.scene(2, 5, (16, 20), dtype=torch.float32)
    inputs = keypoints.requires_grad_(), weights.requires_grad_()
    sizes, sigmas = [(16, 20), (32, 40), (8, 9)], [1.0, 2.0, 1.5]
    for instructions in each_instruction_set(operators):
        with instructions:
            maps = cases.maps_of(operators, edges, sizes, sigmas)(*inputs)
            alone = cases.maps_of(operators, edges, sizes[:2], sigmas[:2])(*inputs)[1]
            maps[1].mul_(2)
            got, expected = (torch.autograd.grad(m.sum(), inputs) for m in (maps[1], 2 * alone))
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


def test_saved_for_backward_are_inputs_and_winners(operators) -> None:
    keypoints, weights, edges = cases.scene(2, 5, (16, 20), dtype=torch.float32)
    with saved_elements() as kept:
        operators.rasterize_edges(keypoints.requires_grad_(), weights.requires_grad_(), edges, [16, 20], [1.0])
    assert sorted(kept) == sorted([keypoints.numel(), weights.numel(), 2 * 10, 2 * 16 * 20])


# ---- registration ----


def test_second_derivative_is_refused(operators) -> None:
    keypoints, weights, edges = cases.scene(1, 3)
    run = cases.maps_of(operators, edges, [(6, 6)], [2.0])
    keypoints.requires_grad_()
    (gradient,) = torch.autograd.grad(run(keypoints, weights)[0].sum(), keypoints, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_opcheck(layout: str, dtype: torch.dtype, operators) -> None:
    keypoints, weights, edges = cases.sample(layout, dtype)
    inputs = keypoints.detach().requires_grad_(), weights.detach().requires_grad_(), edges
    options = cases.flat(cases.OPCHECK[operators.name]), [1.0, 2.0]
    # Traced and differentiated by torch.compile in float32 alone.
    utils = {} if dtype == torch.float32 else {"test_utils": CHEAP}
    torch.library.opcheck(operators.rasterize_edges.default, (*inputs, *options), **utils)
    maps, winners = operators.rasterize_edges(keypoints, weights, edges, *options)
    grads = [torch.randn_like(m) for m in maps]
    if layout == "strided":
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    if layout == "expanded":
        grads = [torch.ones((), dtype=dtype).expand(m.shape) for m in maps]
    arguments = grads, keypoints, weights, edges, winners, *options, False
    torch.library.opcheck(operators.rasterize_edges_backward.default, arguments, **utils)


# ---- what is refused ----


@pytest.mark.parametrize(("changes", "message"), cases.BAD)
def test_bad_arguments_are_refused(changes: dict, message: str, operators) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.rasterize_edges(*(cases.GOOD | changes).values())


@pytest.mark.parametrize(("grads", "winners", "message"), cases.BAD_GRADIENTS)
def test_bad_gradients_are_refused(grads: list[Tensor], winners: Tensor, message: str, operators) -> None:
    keypoints, weights, edges, sizes, sigmas = cases.GOOD.values()
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.rasterize_edges_backward(grads, keypoints, weights, edges, winners, sizes, sigmas, False)
