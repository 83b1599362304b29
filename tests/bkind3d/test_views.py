"""What the networks get to see: the body alone, and pictures turned about their centres with their cameras."""

import math

import pytest
import torch
from small_rig import ring
from torch import Tensor

from bkind3d.models.triangulate import triangulate
from bkind3d.models.views import GREY, foreground_only, turned_views
from bkind3d_kernels.geometry import project_points

SIZE = (44, 60)
VIEWS = 4


def projections(samples: int) -> Tensor:
    """(N, M, 3, 4) float64."""
    return ring(VIEWS, (SIZE[1], SIZE[0])).projection_matrices().expand(samples, -1, -1, -1)


def random_angles(samples: int) -> Tensor:
    return math.pi * (2 * torch.rand(samples, VIEWS, generator=torch.Generator().manual_seed(4)).double() - 1)


def dots(pixels: Tensor) -> Tensor:
    """Pictures (..., H, W) of a bright dot, a Gaussian 1.5 pixels wide, at pixels (..., 2)."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    away = torch.stack([x, y], -1) - pixels[..., None, None, :]
    return torch.exp(-away.square().sum(-1) / (2 * 1.5**2))


def centers_of(pictures: Tensor) -> Tensor:
    """Mean pixel (..., 2), weighted by brightness, of pictures (..., H, W)."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]).double(), torch.arange(SIZE[1]).double(), indexing="ij")
    mass = pictures.sum((-2, -1))
    return torch.stack([(pictures * x).sum((-2, -1)), (pictures * y).sum((-2, -1))], -1) / mass[..., None]


def filmed(points: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, 2, M, 3, H, W) of a dot on grey, and masks (N, 2, M, H, W), of points (N, 2, 3) at two times."""
    pixels, depth = project_points(
        projections(len(points)).repeat(2, 1, 1, 1), points.transpose(0, 1).reshape(-1, 1, 1, 3)
    )
    assert (depth > 0).all()
    masks = dots(pixels[:, :, 0].unflatten(0, (2, len(points))).transpose(0, 1))
    return (GREY + 0.5 * masks)[:, :, :, None].expand(-1, -1, -1, 3, -1, -1), masks


@pytest.fixture
def points() -> Tensor:
    """(N, 2, 3): near enough to the centre to stay in every picture, whatever its turn."""
    return 0.4 * (torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(1)).double() - 0.5)


def test_a_dot_lands_where_its_turned_camera_says(points: Tensor) -> None:
    images, masks = filmed(points)
    turned, turned_masks, cameras = turned_views(images, masks, projections(3), random_angles(3))
    assert (turned.shape, turned_masks.shape, cameras.shape) == (images.shape, masks.shape, (3, VIEWS, 3, 4))
    for time in range(2):
        expected, _ = project_points(cameras, points[:, time, None, None])
        original, _ = project_points(projections(3), points[:, time, None, None])
        assert (expected - original).norm(dim=-1).max() > 3  # pixels: it did move
        torch.testing.assert_close(centers_of(turned_masks[:, time]), expected[:, :, 0], rtol=0, atol=0.05)
        torch.testing.assert_close(centers_of(turned[:, time, :, 1] - GREY), expected[:, :, 0], rtol=0, atol=0.05)


def test_a_quarter_turn_by_hand() -> None:
    """From x towards y, about the centre (29.5, 21.5) of the picture: (35.5, 19.5) goes to (31.5, 27.5)."""
    masks = dots(torch.tensor([35.5, 19.5]).expand(1, 2, VIEWS, 2)).double()
    images = GREY + torch.zeros(1, 2, VIEWS, 3, *SIZE).double()
    _, turned, _ = turned_views(images, masks, projections(1), torch.full((1, VIEWS), math.pi / 2))
    torch.testing.assert_close(
        turned, dots(torch.tensor([31.5, 27.5]).expand(1, 2, VIEWS, 2)).double(), rtol=0, atol=1e-5
    )


def test_masks_and_images_turn_alike(points: Tensor) -> None:
    images, masks = filmed(points)
    turned, turned_masks, _ = turned_views(images, masks, projections(3), random_angles(3))
    torch.testing.assert_close(turned, (GREY + 0.5 * turned_masks)[:, :, :, None].expand_as(turned))


def test_both_times_turn_alike_and_views_apart(points: Tensor) -> None:
    images, masks = filmed(points[:, :1].expand(-1, 2, -1))
    turned, turned_masks, _ = turned_views(images, masks, projections(3), random_angles(3))
    torch.testing.assert_close(turned[:, 0], turned[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(turned_masks[:, 0], turned_masks[:, 1], rtol=0, atol=0)
    angles = torch.zeros(3, VIEWS)
    angles[1, 2] = 1.0
    turned, _, cameras = turned_views(images, masks, projections(3), angles)
    moved = (turned - images).abs().amax((1, 3, 4, 5)) > 0.01
    assert moved.nonzero().tolist() == [[1, 2]]
    assert ((cameras - projections(3)).abs().amax((2, 3)) > 1e-6).nonzero().tolist() == [[1, 2]]


def test_no_turn_changes_nothing(points: Tensor) -> None:
    images, masks = filmed(points)
    turned, turned_masks, cameras = turned_views(images, masks, projections(3), torch.zeros(3, VIEWS))
    torch.testing.assert_close(turned, images, rtol=0, atol=1e-9)
    torch.testing.assert_close(turned_masks, masks, rtol=0, atol=1e-9)
    torch.testing.assert_close(cameras, projections(3), rtol=0, atol=0)


def test_what_comes_in_from_outside_is_the_room() -> None:
    images, masks = torch.ones(1, 2, VIEWS, 3, *SIZE), torch.ones(1, 2, VIEWS, *SIZE)
    turned, turned_masks, _ = turned_views(images, masks, projections(1).float(), torch.full((1, VIEWS), 0.7))
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert (turned[..., y, x] == GREY).all()
        assert not turned_masks[..., y, x].any()
    assert (turned[..., 22, 30] == 1).all()


def test_points_found_in_turned_pictures_are_the_same_in_the_world() -> None:
    """Exact detections, turned by hand about the centre of the picture."""
    world = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(2)).double() - 0.5
    pixels, _ = project_points(projections(2), world[:, None])
    angles = random_angles(2)
    picture = torch.zeros(2, 2, VIEWS, 3, *SIZE).double()
    _, _, cameras = turned_views(picture, picture[:, :, :, 0], projections(2), angles)
    x, y = (pixels - torch.tensor([29.5, 21.5])).unbind(-1)
    cos, sin = angles.cos()[..., None], angles.sin()[..., None]
    detected = torch.stack([29.5 + cos * x - sin * y, 21.5 + sin * x + cos * y], -1)
    found = triangulate(detected, torch.ones(2, VIEWS, 5).double(), cameras, torch.zeros(3).double(), 1.0)
    torch.testing.assert_close(found, world, rtol=0, atol=1e-6)


def test_the_room_is_grey_and_the_body_is_untouched() -> None:
    images = torch.rand(2, 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    masks = (torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    masks[0, 0, 0, 0] = 0.25
    seen = foreground_only(images, masks)
    body = (masks == 1)[:, :, None].expand_as(images)
    room = (masks == 0)[:, :, None].expand_as(images)
    assert torch.equal(seen[body], images[body])
    assert (seen[room] == GREY).all()
    torch.testing.assert_close(seen[0, 0, :, 0, 0], 0.25 * images[0, 0, :, 0, 0] + 0.75 * GREY)
