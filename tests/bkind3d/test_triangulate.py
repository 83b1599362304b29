"""Triangulation: exact points, an SVD oracle, OpenCV, and the views in which others return NaN."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rig import ring

from bkind3d.errors import InputError
from bkind3d.models.triangulate import triangulate
from bkind3d_kernels.geometry import project_points

CENTER, SIDE = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64), 1.4


def cameras(views: int) -> torch.Tensor:
    """(1, M, 3, 4) float64, on a circle of radius 3 m around the box."""
    return ring(views, (64, 48)).projection_matrices()[None]


def scene(views: int, samples: int = 2, points: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Points (N, J, 3) in the box, their pixels (N, M, J, 2) and random weights (N, M, J)."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(samples, points, 3, generator=generator, dtype=torch.float64)
    truth = CENTER + SIDE * (random - 0.5)
    pixels, depth = project_points(cameras(views), truth[:, None])
    assert (depth > 0).all()
    return truth, pixels, 0.1 + torch.rand(pixels.shape[:3], generator=generator, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(views=st.integers(2, 8), samples=st.integers(1, 3), points=st.integers(1, 6), seed=st.integers(0, 1000))
def test_exact_projections_give_the_points_back(views: int, samples: int, points: int, seed: int) -> None:
    truth, pixels, weights = scene(views, samples, points, seed)
    found = triangulate(pixels, weights, cameras(views), CENTER, SIDE)
    assert (found - truth).norm(dim=-1).max() < 1e-6 * SIDE
    single = triangulate(pixels.float(), weights.float(), cameras(views).float(), CENTER.float(), SIDE)
    assert single.dtype == torch.float32
    assert (single - truth).norm(dim=-1).max() < 1e-4 * SIDE


def test_noisy_pixels_agree_with_an_svd() -> None:
    """The inhomogeneous DLT of each point by numpy's SVD, from rows in pixels at the centre's depth."""
    _, pixels, weights = scene(4)
    pixels = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = triangulate(pixels, weights, cameras(4), CENTER, SIDE).numpy()
    matrices = cameras(4)[0].numpy()
    for n in range(2):
        for j in range(5):
            rows = []
            for matrix, (u, v), weight in zip(matrices, pixels[n, :, j].numpy(), weights[n, :, j].numpy()):
                depth = matrix[2] @ np.append(CENTER.numpy(), 1)
                rows += [weight * (matrix[0] - u * matrix[2]) / depth, weight * (matrix[1] - v * matrix[2]) / depth]
            system = np.array(rows)
            expected = np.linalg.lstsq(system[:, :3], -system[:, 3], rcond=None)[0]
            np.testing.assert_allclose(found[n, j], expected, atol=1e-6)


def test_two_views_agree_with_opencv() -> None:
    """OpenCV's homogeneous DLT: the same for exact pixels, near it for noisy ones."""
    truth, pixels, _ = scene(3, samples=1)
    projections, pixels = cameras(3)[:, :2], pixels[:, :2]
    for noise, tolerance in ((0.0, 1e-6), (0.2, 2e-3)):
        noisy = pixels + noise * torch.randn(
            pixels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        homogeneous = cv2.triangulatePoints(*projections[0].numpy(), *noisy[0].mT.numpy())
        found = triangulate(noisy, torch.ones(noisy.shape[:3]), projections, CENTER, SIDE)[0].numpy()
        np.testing.assert_allclose(found, (homogeneous[:3] / homogeneous[3]).T, atol=tolerance)
        assert np.abs(found - truth[0].numpy()).max() < (1e-6 if noise == 0 else 0.05)


def test_a_box_for_each_sample() -> None:
    """Where the views disagree, the box matters a little: each sample is that of its own."""
    _, pixels, weights = scene(3, samples=3)
    pixels = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    centers = CENTER + torch.tensor([[0.0], [0.4], [-0.7]])
    found = triangulate(pixels, weights, cameras(3), centers, SIDE)
    for n, center in enumerate(centers):
        alone = triangulate(pixels[n : n + 1], weights[n : n + 1], cameras(3), center, SIDE)
        torch.testing.assert_close(found[n], alone[0])
        other = triangulate(pixels[n : n + 1], weights[n : n + 1], cameras(3), centers[n - 1], SIDE)
        assert not torch.allclose(found[n], other[0], atol=1e-6)


def test_units_and_resolution_do_not_matter() -> None:
    """Millimetres for metres, and pixels of images three times as large, give the same points."""
    _, pixels, weights = scene(3)
    pixels = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = triangulate(pixels, weights, cameras(3), CENTER, SIDE)
    millimetres = cameras(3) * torch.tensor([1e-3, 1e-3, 1e-3, 1.0], dtype=torch.float64)
    found = triangulate(pixels, weights, millimetres, 1000 * CENTER, 1000 * SIDE)
    torch.testing.assert_close(found / 1000, expected, rtol=1e-9, atol=1e-9)
    larger = torch.diag(torch.tensor([3.0, 3, 1], dtype=torch.float64)) @ cameras(3)
    torch.testing.assert_close(triangulate(3 * pixels, weights, larger, CENTER, SIDE), expected, rtol=1e-9, atol=1e-9)


def test_gradients() -> None:
    _, pixels, weights = scene(3, samples=1, points=2)
    pixels = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = (pixels.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, w: triangulate(p, w, cameras(3), CENTER, SIDE), inputs)


def test_a_view_without_weight_has_no_say() -> None:
    truth, pixels, weights = scene(4)
    pixels[:, 1] += 20.0
    errors = []
    for weight in (1.0, 0.1, 0.0):
        weights[:, 1] = weight
        errors.append((triangulate(pixels, weights, cameras(4), CENTER, SIDE) - truth).norm(dim=-1))
    assert errors[0].min() > 0.01
    assert (errors[1] < errors[0]).all()
    assert errors[2].max() < 1e-6


def degenerate(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, weights and projections of two views that do not fix a point, float32 as in training."""
    _, pixels, weights = scene(2, samples=1, points=3)
    projections = cameras(2).clone()
    if name in ("identical", "nearly parallel", "contradicting"):
        projections[:, 1] = projections[:, 0]
        pixels[:, 1] = pixels[:, 0]
    if name == "nearly parallel":
        projections[:, 1, :, 3] *= 1 + 1e-7
    if name == "contradicting":
        pixels[:, 1] += 15.0
    if name == "no confidence":
        weights[:] = 0.0
    if name == "behind":  # the views' rays meet behind the first camera
        pixels, depth = project_points(projections, (1.5 * ring(2).centers[:1] + 0.1)[None, None].expand(1, 1, 3, 3))
        assert (depth[0, 0] < 0).all()
    if name == "camera's plane":
        center = ring(2).centers[0]
        direction = torch.linalg.cross(ring(2).axes[0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        pixels, depth = project_points(projections, (center + direction).expand(1, 1, 3, 3))
        assert depth[0, 0].abs().max() < 1e-6
    return pixels.float(), weights.float(), projections.float()


@pytest.mark.parametrize(
    "name", ["identical", "nearly parallel", "contradicting", "no confidence", "behind", "camera's plane"]
)
def test_degenerate_views_stay_finite(name: str) -> None:
    pixels, weights, projections = degenerate(name)
    inputs = [pixels.requires_grad_(), weights.requires_grad_(), projections.requires_grad_()]
    found = triangulate(*inputs, CENTER.float(), SIDE)
    assert found.isfinite().all()
    found.square().sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    if name == "behind":
        assert (found - ring(2).centers[0]).norm(dim=-1).max() < 3


def test_box_at_a_cameras_plane_stays_finite() -> None:
    """A camera inside the room looks past the centre of the box."""
    _, pixels, weights = scene(3, samples=1)
    center = ring(3).centers[0]
    assert triangulate(pixels, weights, cameras(3), center, SIDE).isfinite().all()


def test_undetermined_points_fall_back_to_the_prior() -> None:
    """Without confidence the box's centre, reached smoothly; from one direction alone the ray's point nearest to it."""
    _, pixels, weights = scene(3)
    at_zero = triangulate(pixels, 0 * weights, cameras(3), CENTER, SIDE)
    torch.testing.assert_close(at_zero, CENTER.expand_as(at_zero))
    steps = [triangulate(pixels, scale * weights, cameras(3), CENTER, SIDE) for scale in np.logspace(-13, -3, 41)]
    distance = torch.stack([(step - CENTER).norm(dim=-1) for step in steps])
    assert (distance.diff(dim=0) > -1e-12).all()
    assert (distance.diff(dim=0) < 0.5 * distance[-1]).all()

    pixels, weights, projections = (tensor.double() for tensor in degenerate("identical"))
    found = triangulate(pixels, weights, projections, CENTER, SIDE)[0]
    camera = ring(2).centers[0]
    torch.testing.assert_close(project_points(projections[0, 0], found)[0], pixels[0, 0], rtol=0, atol=1e-3)
    across = ((found - camera) * (found - CENTER)).sum(-1)  # the way from the centre stands on the ray
    assert across.abs().max() < 1e-3


def test_shapes_are_checked() -> None:
    _, pixels, weights = scene(3)
    for arguments, name in (
        ((pixels[..., :1], weights, cameras(3)), "pixels"),
        ((pixels, weights[:, :2], cameras(3)), "weights"),
        ((pixels, weights, cameras(2)), "projections"),
    ):
        with pytest.raises(InputError, match=name):
            triangulate(*arguments, CENTER, SIDE)
