"""What the foreground asks of keypoints: every term against a loop, a formula by hand, or finite differences."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
import torch
from scipy.spatial.distance import cdist
from small_rig import ring
from torch import Tensor
from torch.func import functional_call

from bkind3d.data.foreground import body_size
from bkind3d.data.window import distances_to
from bkind3d.errors import InputError
from bkind3d.models.body import (
    MOST_LOG_WEIGHT,
    TEMPERATURE,
    Body,
    BodyTerms,
    Capsules,
    Descriptors,
    distance_of,
    identity_loss,
    pixels_per_unit,
    rigidity_loss,
    sample,
    silhouette_loss,
    soft_silhouettes,
)
from bkind3d.models.skeleton import Skeleton
from bkind3d_kernels.geometry import all_pairs, project_points

SIZE = (36, 48)
CHAIN = torch.tensor([[0, 1], [1, 2]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- scale -------------------------------------------------------------------------------------------------------------


def test_pixels_per_unit_against_finite_differences() -> None:
    """The geometric mean of how fast u and v grow at most, when a point moves by a small step in any direction."""
    projections = ring(4, (SIZE[1], SIZE[0]), skew=1.5).projection_matrices()[None]
    points = torch.rand(1, 5, 3, generator=generator(1)).double() - 0.5
    pixels, depth = project_points(projections, points[:, None])
    step = 1e-5
    slopes = []
    for move in step * torch.eye(3).double():
        ahead, behind = (project_points(projections, (points + way * move)[:, None])[0] for way in (1, -1))
        slopes.append((ahead - behind) / (2 * step))
    expected = torch.stack(slopes, -1).norm(dim=-1).prod(-1).sqrt()
    torch.testing.assert_close(pixels_per_unit(projections, pixels, depth), expected, rtol=1e-6, atol=0)
    # Focal lengths 48 and 50.4, about 3.16 away.
    assert (expected / (48 * 1.05**0.5 / 10**0.5) - 1).abs().max() < 0.4


# -- distance ----------------------------------------------------------------------------------------------------------


def half_plane() -> Tensor:
    """Distances (1, H, W) to a body that fills the columns 0 to 9."""
    masks = np.zeros((1, *SIZE), bool)
    masks[..., :10] = True
    return torch.from_numpy(distances_to(masks))


def test_distance_of_points_in_and_around_the_picture() -> None:
    pixels = torch.tensor([[[4.0, 7], [9, 7], [12, 7], [30.25, 20.5], [50, 20], [50, 39], [-3, 20], [5, 40]]])
    # The last column is 47, which is 38 from column 9; the last row is 35.
    expected = [0, 0, 3, 21.25, 38 + 3, 38 + math.hypot(3, 4), 3, 5]
    torch.testing.assert_close(distance_of(pixels, half_plane(), SIZE)[0], torch.tensor(expected))


def test_distance_falls_towards_the_body() -> None:
    pixels = torch.tensor([[[30.25, 20.5], [60, 20], [5.0, 50.0], [4.0, 20.0]]], requires_grad=True)
    distance_of(pixels, half_plane(), SIZE).sum().backward()
    assert pixels.grad is not None
    # In the picture, to its right, below it, and on the body.
    expected = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 0]]])
    torch.testing.assert_close(pixels.grad, expected, rtol=0, atol=1e-4)


def test_a_keypoint_of_a_diverging_run_is_no_place_to_write_to() -> None:
    for bad in (math.nan, math.inf, -1e30):
        maps = torch.rand(2, 3, 9, 12, requires_grad=True)
        pixels = torch.tensor([[[4.0, 7], [bad, 7]], [[9.0, bad], [bad, bad]]], requires_grad=True)
        sample(maps, pixels, SIZE).sum().backward()
        assert maps.grad is not None
        assert pixels.grad is not None
        assert maps.grad.isfinite().all()
        assert pixels.grad.isfinite().all()
    distances = half_plane().expand(2, -1, -1)
    assert distance_of(torch.full((2, 2, 2), math.nan), distances, SIZE).isnan().all()


def test_distances_to_against_all_pairs_of_pixels() -> None:
    masks = torch.rand(2, 3, 9, 12, generator=generator()).square().numpy() >= 0.5
    masks[0, 1] = False  # no foreground: it says nothing
    masks[1, 2] = True
    found = distances_to(masks)
    assert (found.shape, found.dtype) == (masks.shape, np.float32)
    places = np.stack(np.mgrid[:9, :12], -1).reshape(-1, 2)
    for index in np.ndindex(2, 3):
        body = places[masks[index].ravel()]
        expected = cdist(places, body).min(1).reshape(9, 12) if len(body) else 0
        np.testing.assert_allclose(found[index], expected, atol=1e-5)
    assert not found[0, 1].any()
    assert not found[1, 2].any()
    assert found.max() > 1


# -- silhouette --------------------------------------------------------------------------------------------------------


def to_segment(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance (...) of points (..., 2) to the segment between two others."""
    share = np.clip((points - a) @ (b - a) / np.dot(b - a, b - a), 0, 1)
    return np.linalg.norm(points - a - share[..., None] * (b - a), axis=-1)


def chain(*places: tuple[float, float]) -> Tensor:
    """One picture's keypoints (1, J, 2)."""
    return torch.tensor([places])


KNOWN = torch.tensor(True)  # that there is a tree


def draw(capsules: Capsules, pixels: Tensor, strides: tuple[int, ...] = (1,), sigma: float = 1.5) -> list[Tensor]:
    """The capsules of a chain of three keypoints, of a body 40 pixels large."""
    return capsules(
        pixels, torch.arange(2), KNOWN, CHAIN, torch.full((len(pixels),), 40.0), SIZE, strides, sigma, "auto"
    )


def test_capsules_against_a_loop() -> None:
    pairs, strides, sigma = all_pairs(5), (4, 2, 1), 1.3
    capsules = Capsules(10, 0.05)
    capsules.parameter.data += 0.5 * torch.randn(10, generator=generator())
    pixels = torch.rand(2, 5, 2, generator=generator(1)) * torch.tensor([48.0, 36]) - 4
    drawn, scale = torch.rand(10, generator=generator(2)) < 0.5, torch.tensor([40.0, 25])
    maps = capsules(pixels, drawn.nonzero()[:, 0], KNOWN, pairs, scale, SIZE, strides, sigma, "auto")
    assert [level.shape for level in maps] == [(2, 9, 12), (2, 18, 24), (2, 36, 48)]
    assert 2 <= int(drawn.sum()) <= 8
    for level, stride in zip(maps, strides, strict=True):
        at = np.moveaxis(np.mgrid[: level.shape[1], : level.shape[2]][::-1], 0, -1)  # (h, w, 2), x and y
        for picture in range(2):
            places = (pixels[picture].numpy() + 0.5) / stride - 0.5
            heights = [
                (float(radius * scale[picture]) / stride) ** 2 - to_segment(at, places[i], places[j]) ** 2
                for radius, (i, j) in zip(capsules.radii[drawn].detach(), pairs[drawn].tolist(), strict=True)
            ]
            expected = np.minimum(1, np.exp(np.max(heights, axis=0) / sigma**2))
            np.testing.assert_allclose(level[picture].detach(), expected, rtol=1e-3, atol=1e-6)


def test_a_capsule_is_whole_up_to_its_radius() -> None:
    """A horizontal one on row 15 with a radius of 4: 0.1 of a body 40 large."""
    column = draw(Capsules(2, 0.1), chain((8.0, 15.0), (20.0, 15.0), (38.0, 15.0)))[0][0, :, 24]
    away = (torch.arange(36) - 15).abs()
    torch.testing.assert_close(column[away <= 4], torch.ones(9))
    expected = torch.exp((16 - away.square()) / 1.5**2)
    torch.testing.assert_close(column[away > 4], expected[away > 4], rtol=1e-4, atol=1e-12)


def test_a_capsule_wider_than_float32_can_say_stays_finite() -> None:
    """Its border then is where the largest weight ends."""
    capsules = Capsules(2, 0.4)
    (level,) = draw(capsules, chain((8.0, 15.0), (20.0, 15.0), (38.0, 15.0)), sigma=1.0)
    level.sum().backward()
    away = (torch.arange(36) - 15).abs()
    assert (level[0, :, 24] == 1).tolist() == (away.square() <= MOST_LOG_WEIGHT).tolist()
    assert capsules.parameter.grad is not None
    assert capsules.parameter.grad.isfinite().all()


def silhouette_gradients(target: Tensor, drawn: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Gradient of the silhouette loss to pixels (J, 2) and radii (E,), for a seen chain of radius 4 pixels."""
    capsules, pixels = Capsules(2, radius), drawn.clone().requires_grad_()
    seen = [level.detach() for level in draw(Capsules(2, 0.1), target, (2, 1))]
    silhouette_loss(draw(capsules, pixels, (2, 1)), seen).backward()
    assert pixels.grad is not None
    assert capsules.parameter.grad is not None
    return pixels.grad[0], capsules.parameter.grad


def test_an_uncovered_limb_pulls_the_keypoint() -> None:
    body = chain((8.0, 15.0), (20.0, 15.0), (38.0, 15.0))
    toes, radii = silhouette_gradients(body, chain((8.0, 15.0), (20.0, 15.0), (30.0, 15.0)), 0.1)
    assert toes.isfinite().all()
    assert toes[2, 0] < -1e-3  # downhill is to the right
    assert toes[2, 1].abs() < 0.1 * toes[2, 0].abs()
    beyond, _ = silhouette_gradients(body, chain((8.0, 15.0), (20.0, 15.0), (44.0, 15.0)), 0.1)
    assert beyond[2, 0] > 1e-3
    beside, _ = silhouette_gradients(body, chain((8.0, 15.0), (20.0, 15.0), (38.0, 18.0)), 0.1)
    assert beside[2, 1] > 1e-3
    assert radii.isfinite().all()


def test_a_radius_grows_or_shrinks_to_the_body() -> None:
    body = chain((8.0, 15.0), (20.0, 15.0), (38.0, 15.0))
    for radius, sign in ((0.05, -1), (0.18, 1)):
        _, radii = silhouette_gradients(body, body, radius)
        assert (sign * radii > 1e-3).all(), radius


def test_without_edges_nothing_is_drawn() -> None:
    capsules, pixels = Capsules(2, 0.1), torch.rand(3, 3, 2, requires_grad=True)
    maps = capsules(pixels, torch.arange(2), ~KNOWN, CHAIN, torch.ones(3), SIZE, (4, 2), 1.2, "auto")
    assert [level.shape for level in maps] == [(3, 9, 12), (3, 18, 24)]
    assert not any(level.any() for level in maps)
    # Several processes wait for the gradient of every parameter.
    sum(level.sum() for level in maps).backward()  # type: ignore[union-attr]
    assert capsules.parameter.grad is not None
    assert not capsules.parameter.grad.any()


def test_gradients_of_capsules() -> None:
    capsules = Capsules(2, 0.1).double()
    scale, target = torch.tensor([13.0]).double(), torch.rand(1, 6, 8, generator=generator()).double()

    def loss(pixels: Tensor, parameter: Tensor) -> Tensor:
        arguments = (pixels, torch.arange(2), KNOWN, CHAIN, scale, (12, 16), (2,), 1.4, "auto")
        return silhouette_loss(functional_call(capsules, {"parameter": parameter}, arguments), [target])

    pixels = torch.tensor([[[2.3, 3.1], [8.7, 7.9], [13.2, 4.4]]]).double()
    parameter = torch.tensor([-2.1, -2.6]).double()
    assert torch.autograd.gradcheck(loss, (pixels.requires_grad_(), parameter.requires_grad_()))


def test_silhouette_loss_by_hand() -> None:
    left, right = torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6)
    left[..., :2], right[..., 3:] = 1, 1
    assert float(silhouette_loss(left, left)) == pytest.approx(0, abs=1e-6)
    assert float(silhouette_loss(left, right)) == pytest.approx(1, abs=1e-3)
    assert float(silhouette_loss(0 * left, 0 * left)) == 0
    # 8 pixels and 12 pixels of 0.5 that share 4: 1 - 2 * 4 * 0.5 / (8 + 12 / 4).
    half = torch.zeros(1, 1, 4, 6)
    half[..., 1:4] = 0.5
    assert float(silhouette_loss(left[:1], half)) == pytest.approx(1 - 4 / 11, abs=1e-3)
    # Pictures and resolutions count alike, whatever their size.
    both = silhouette_loss([left[0], torch.ones(1, 2, 2)], [right[0], torch.ones(1, 2, 2)])
    assert float(both) == pytest.approx(0.5, abs=1e-3)


def test_soft_silhouettes_by_hand() -> None:
    coarse, fine = soft_silhouettes(half_plane(), SIZE, (4, 1), 1.2)
    assert (coarse.shape, fine.shape) == ((1, 9, 12), (1, 36, 48))
    away = (torch.arange(48) - 9).clamp_min(0)
    torch.testing.assert_close(fine, torch.exp(-(away / 1.2).square()).expand(1, 36, 48))
    # The centre of column c is between 4c + 1 and 4c + 2, so 4c - 7.5 from column 9.
    away = (4 * torch.arange(12) - 7.5).clamp_min(0)
    torch.testing.assert_close(coarse, torch.exp(-(away / 4.8).square()).expand(1, 9, 12))


def test_a_body_that_is_seen_is_drawn_without_loss() -> None:
    """The drawn capsule and the distances to a mask of the same capsule agree to a few percent."""
    pixels = chain((10.0, 14.0), (22.0, 20.0), (37.0, 16.0))
    (sharp,) = draw(Capsules(2, 0.1), pixels)
    distances = torch.from_numpy(distances_to((sharp >= 1).numpy()))
    drawn, seen = draw(Capsules(2, 0.1), pixels, (2, 1)), soft_silhouettes(distances, SIZE, (2, 1), 1.5)
    assert float(silhouette_loss(drawn, seen).detach()) < 0.06
    away = draw(Capsules(2, 0.1), pixels + torch.tensor([0.0, 6.0]), (2, 1))
    assert float(silhouette_loss(away, seen).detach()) > 0.3


# -- identity ----------------------------------------------------------------------------------------------------------


def test_perfect_descriptors() -> None:
    loss, found = identity_loss(torch.eye(4, 6).expand(5, 4, 6))
    # The similarity of a keypoint with itself is 1, with the three others 0.
    assert float(loss) == pytest.approx(math.log(1 + 3 * math.exp(-1 / TEMPERATURE)), rel=1e-2)
    assert found.tolist() == [1, 1, 1, 1]


def test_swapped_descriptors_are_seen() -> None:
    """Keypoints 0 and 1 change places in two of four pictures: 4 of the 12 ordered pairs of pictures agree."""
    descriptors = torch.eye(4).repeat(4, 1, 1)
    descriptors[2:, [0, 1]] = descriptors[2:, [1, 0]]
    loss, found = identity_loss(descriptors)
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1 / 3, 1, 1]))
    assert float(loss) == pytest.approx(8 / 12 * 2 / 4 / TEMPERATURE, rel=1e-3)


def test_identity_against_a_loop() -> None:
    vectors = torch.randn(3, 4, 5, generator=generator())
    descriptors = (vectors / vectors.norm(dim=-1, keepdim=True)).requires_grad_()
    loss, found = identity_loss(descriptors)
    losses, hits = [], np.zeros(4)
    values = descriptors.detach().double().numpy()
    for a, b in np.ndindex(3, 3):
        for j in range(4):
            if a != b:
                likeness = values[b] @ values[a, j] / TEMPERATURE
                losses.append(np.log(np.exp(likeness).sum()) - likeness[j])
                hits[j] += likeness.argmax() == j
    assert float(loss.detach()) == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_allclose(found, hits / 6, rtol=1e-6)
    loss.backward()
    assert descriptors.grad is not None
    assert descriptors.grad.isfinite().all()
    assert descriptors.grad.any()


def test_a_descriptor_is_the_look_of_its_place() -> None:
    """A picture of ramps, at half and a quarter of its size: the head gets the coordinates themselves."""
    descriptors = Descriptors((2, 1), 3)
    y, x = torch.meshgrid(torch.arange(18.0), torch.arange(24.0), indexing="ij")
    ramps = torch.stack([2 * x + 0.5, 2 * y + 0.5])[None]  # image pixels of the half-size ones
    constant = torch.full((1, 1, 9, 12), 7.0)
    pixels = torch.tensor([[[10.0, 6.5], [30.25, 20.0]]])
    raw = descriptors.head(torch.tensor([[[10.0, 6.5, 7], [30.25, 20.0, 7]]]))
    expected = raw / raw.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(descriptors([ramps, constant], pixels, SIZE), expected)


# -- rigidity ----------------------------------------------------------------------------------------------------------


def test_rigidity_by_hand() -> None:
    lengths = torch.tensor([[1.0, 2.0], [3.0, 2.0]], requires_grad=True)
    loss = rigidity_loss(lengths)
    assert float(loss.detach()) == pytest.approx(0.5 * (1 / 2**2 + 0))
    loss.backward()
    # The variance moves, the mean that it is measured in does not: (l - 2) / 2² / 2 edges.
    torch.testing.assert_close(lengths.grad, torch.tensor([[-0.125, 0], [0.125, 0]]))
    torch.testing.assert_close(rigidity_loss(1000 * lengths.detach()), loss.detach())


def test_rigidity_without_edges_and_of_no_length() -> None:
    none = torch.rand(4, 0, requires_grad=True)
    loss = rigidity_loss(none)
    loss.backward()
    assert float(loss.detach()) == 0
    collapsed = torch.zeros(4, 3, requires_grad=True)
    loss = rigidity_loss(collapsed)
    loss.backward()
    assert float(loss.detach()) == 0
    assert collapsed.grad is not None
    assert collapsed.grad.isfinite().all()


# -- all of them -------------------------------------------------------------------------------------------------------


def terms_of(points: Tensor, edges: int) -> tuple[BodyTerms, Skeleton, SimpleNamespace]:
    """Terms of keypoints (2N, J, 3), whose body is a ball of radius 0.3 around the origin seen by three cameras."""
    torch.manual_seed(0)
    skeleton = Skeleton(4 if edges else 0, "softplus", 0.0, 1.0, 0.3)
    terms = BodyTerms(tiny_model.TINY, edges, (3, 5, 7))
    moments = len(points)
    projections = ring(3, (SIZE[1], SIZE[0])).projection_matrices().float().expand(moments, 3, 3, 4)
    centers, depth = project_points(projections, torch.zeros(moments, 1, 1, 3))
    radius = 0.3 * pixels_per_unit(projections, centers, depth)
    y, x = torch.meshgrid(torch.arange(36.0), torch.arange(48.0), indexing="ij")
    disc = (torch.stack([x, y], -1) - centers[:, :, :, None]).norm(dim=-1) <= radius[..., None]  # (2N, M, H, W)
    distances = torch.from_numpy(distances_to(disc.numpy()))
    body = Body(distances.unflatten(0, (2, moments // 2)).transpose(0, 1), 0.6)
    features = [torch.rand(3 * moments, 3, 36, 48), torch.rand(3 * moments, 5, 18, 24)]
    inputs = SimpleNamespace(features=features, projections=projections, body=body)
    return terms, skeleton, inputs


def test_terms_of_keypoints_on_and_beside_the_body() -> None:
    points = 0.3 * (torch.rand(4, 4, 3, generator=generator(3)) - 0.5)
    points[1, 2] += torch.tensor([0.0, 0.0, 0.5])
    points.requires_grad_()
    terms, skeleton, inputs = terms_of(points, 6)
    skeleton.tree[[0, 3, 5]] = True
    found = terms(points, inputs.features, inputs.projections, inputs.body, skeleton, SIZE)
    assert set(found.terms) == {"containment", "silhouette", "identity", "rigidity"}
    assert found.share.shape == (4, 4)
    expected = torch.ones(4, 4)
    expected[1, 2] = 0
    torch.testing.assert_close(found.share, expected)
    assert found.identity.shape == (4,)
    # One of 16 keypoints is off the body: by half a unit less the ball's radius, in bodies of 0.6, foreshortened.
    assert 0 < float(found.terms["containment"].detach()) < 0.5 / 0.6 / 16
    lengths = skeleton.lengths(points.detach())[:, [0, 3, 5]]
    torch.testing.assert_close(found.terms["rigidity"].detach(), rigidity_loss(lengths))
    sum(found.terms.values()).backward()  # type: ignore[union-attr]
    assert points.grad is not None
    assert points.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in terms.parameters())


def test_containment_is_in_sizes_of_the_body() -> None:
    """The same scene ten times as large, cameras and all, costs the same."""
    points = 1.5 * (torch.rand(2, 4, 3, generator=generator(3)) - 0.5)
    terms, skeleton, inputs = terms_of(points, 6)
    small = terms(points, inputs.features, inputs.projections, inputs.body, skeleton, SIZE).terms
    grown = inputs.projections * torch.tensor([1.0, 1, 1, 10])
    body = Body(inputs.body.distances, 6.0)
    large = terms(10 * points, inputs.features, grown, body, skeleton, SIZE).terms
    assert float(small["containment"].detach()) > 0.01
    for name, value in small.items():
        torch.testing.assert_close(large[name], value, rtol=1e-4, atol=1e-5)


def test_keypoints_behind_a_camera_have_finite_terms() -> None:
    points = torch.rand(2, 4, 3, generator=generator(3)) - 0.5
    points[0, 1] = 1.5 * ring(3).centers[0].float()
    points[1, 2] = ring(3).centers[1].float()
    points.requires_grad_()
    terms, skeleton, inputs = terms_of(points, 6)
    skeleton.tree[:3] = True
    found = terms(points, inputs.features, inputs.projections, inputs.body, skeleton, SIZE)
    assert all(term.isfinite() for term in found.terms.values())
    sum(found.terms.values()).backward()  # type: ignore[union-attr]
    assert points.grad is not None
    assert points.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in terms.parameters())


def test_points_without_a_skeleton_have_no_silhouette() -> None:
    points = 0.3 * (torch.rand(2, 4, 3, generator=generator(3)) - 0.5)
    terms, skeleton, inputs = terms_of(points, 0)
    found = terms(points, inputs.features, inputs.projections, inputs.body, skeleton, SIZE)
    assert set(found.terms) == {"containment", "identity"}
    assert not any(parameter.requires_grad for parameter in terms.capsules.parameters())


# -- size --------------------------------------------------------------------------------------------------------------


def seen_ball(radius: float, center: tuple[float, float, float], count: int = 3) -> SimpleNamespace:
    """A recording of a ball at rest, by three cameras of 240 × 180 pixels, with its exact masks."""
    cameras = ring(3, (240, 180))
    y, x = torch.meshgrid(torch.arange(180.0), torch.arange(240.0), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).double()
    masks = []
    for view in range(3):
        rays = pixels @ torch.linalg.inv(cameras.intrinsics[view]).T @ cameras.rotation[view]
        rays = rays / rays.norm(dim=-1, keepdim=True)
        to_ball = torch.tensor(center).double() - cameras.centers[view]
        along = rays @ to_ball
        masks.append((to_ball.square().sum() - along.square() <= radius**2) & (along > 0))
    stack = 255 * torch.stack(masks).expand(count, -1, -1, -1).to(torch.uint8).numpy()

    class Recording(SimpleNamespace):
        def __len__(self) -> int:
            return count

    return Recording(cameras=cameras, masks=stack)


def test_size_of_a_ball() -> None:
    """The box around its picture is a square, whose diagonal is √2 times the diameter."""
    for radius, center in ((0.25, (0.0, 0.0, 0.0)), (0.4, (0.1, -0.1, 0.1))):
        size = body_size([seen_ball(radius, center)], (0.0, 0.0, 0.0))  # type: ignore[list-item]
        assert size == pytest.approx(2 * radius * 2**0.5, rel=0.1)


def test_the_size_is_a_median_and_a_body_is_needed() -> None:
    balls = [seen_ball(radius, (0.0, 0.0, 0.0)) for radius in (0.25, 0.25, 0.5)]
    assert body_size(balls, (0.0, 0.0, 0.0)) == pytest.approx(0.5 * 2**0.5, rel=0.1)  # type: ignore[arg-type]
    for ball in balls[:2]:
        ball.masks = np.zeros_like(ball.masks)
    with pytest.raises(InputError, match=r"data\.foreground"):
        body_size(balls, (0.0, 0.0, 0.0))  # type: ignore[arg-type]
