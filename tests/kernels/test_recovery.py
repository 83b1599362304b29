"""Known 3D points, placed in the images by OpenCV, come back out of unprojection and soft-argmax."""

import cv2
import numpy as np
import pytest
import scenes
import torch
from torch import Tensor

from bkind3d_kernels import VoxelGrid, soft_argmax3d, unproject
from bkind3d_kernels.geometry import rescale_projections

WIDTH, HEIGHT = 320, 240  # the camera's image
POINTS = np.array([[0.11, -0.23, 0.31], [-0.37, 0.05, -0.12], [0.24, 0.33, 0.02]])


def cameras(m: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """K, and (rvec, tvec) of cameras on a ring of radius 3 that look at the origin."""
    k = np.array([[310.0, 0, 158.2], [0, 305.0, 121.7], [0, 0, 1]])
    rvecs, tvecs = [], []
    for i in range(m):
        angle = 2 * np.pi * i / m + 0.3
        center = torch.tensor([3 * np.cos(angle), 3 * np.sin(angle), 1.0 + 0.3 * i], dtype=torch.float64)
        extrinsics = scenes.look_at(center, torch.zeros(3, dtype=torch.float64)).numpy()
        rvecs.append(cv2.Rodrigues(extrinsics[:, :3])[0])
        tvecs.append(extrinsics[:, 3])
    return k, rvecs, tvecs


def heatmaps(size: tuple[int, int], m: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Features (1, M, J, h, w), a blob where OpenCV projects each point, and projections for the maps' size."""
    k, rvecs, tvecs = cameras(m)
    h, w = size
    y, x = np.mgrid[:h, :w]
    maps, projections = np.zeros((1, m, len(POINTS), h, w)), np.zeros((1, m, 3, 4))
    for i, (rvec, tvec) in enumerate(zip(rvecs, tvecs)):
        pixels = cv2.projectPoints(POINTS, rvec, tvec, k, None)[0][:, 0]
        assert (pixels > 0).all()
        assert (pixels < [WIDTH, HEIGHT]).all()
        projections[0, i] = k @ np.hstack([cv2.Rodrigues(rvec)[0], tvec[:, None]])
        for j, (u, v) in enumerate(pixels):
            u, v = (u + 0.5) * w / WIDTH - 0.5, (v + 0.5) * h / HEIGHT - 0.5
            maps[0, i, j] = np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * sharpness**2))
    return torch.from_numpy(maps), rescale_projections(torch.from_numpy(projections), (HEIGHT, WIDTH), size)


@pytest.mark.parametrize("size", [(60, 80), (48, 96)])
@pytest.mark.parametrize("aggregation", ["softmax", "mean", "sum"])
def test_points_are_recovered(size: tuple[int, int], aggregation: str, backend: str) -> None:
    features, projections = heatmaps(size, m=5, sharpness=2.0)
    grid = VoxelGrid.box(torch.zeros(3, dtype=torch.float64), (1.2, 1.2, 1.0), (49, 49, 41))  # voxels of 0.025
    volume = unproject(features, projections, grid, aggregation=aggregation, backend=backend)
    temperature = 0.02 if aggregation != "sum" else 0.1
    coordinates, peak = soft_argmax3d(volume, grid, temperature=temperature, return_peak=True, backend=backend)
    np.testing.assert_allclose(coordinates[0], POINTS, atol=0.025 / 4)
    assert peak.min() > 1e-3


def test_one_bright_pixel_is_unprojected_onto_its_point(backend: str) -> None:
    """The pixel under a point, alone in each view: the voxel at the point is the brightest and gets all of it."""
    k, rvecs, tvecs = cameras(6)
    point = np.array([[0.2, -0.1, 0.15]])
    features, projections = torch.zeros(1, 6, 1, HEIGHT, WIDTH), torch.zeros(1, 6, 3, 4)
    for i, (rvec, tvec) in enumerate(zip(rvecs, tvecs)):
        # The principal point is shifted so that the point falls on a pixel's centre.
        u, v = cv2.projectPoints(point, rvec, tvec, k, None)[0].ravel()
        shifted = k + np.array([[0, 0, round(u) - u], [0, 0, round(v) - v], [0, 0, 0]])
        column, row = cv2.projectPoints(point, rvec, tvec, shifted, None)[0].ravel().round().astype(int)
        features[0, i, 0, row, column] = 1.0
        projections[0, i] = torch.from_numpy(shifted @ np.hstack([cv2.Rodrigues(rvec)[0], tvec[:, None]]))
    grid = VoxelGrid.box(torch.tensor(point[0]).float(), (0.8, 0.8, 0.8), (21, 21, 21))
    volume = unproject(features, projections, grid, aggregation="sum", backend=backend)
    assert volume.argmax().item() == 10 * 21 * 21 + 10 * 21 + 10
    assert volume.max().item() == pytest.approx(6.0, abs=1e-2)
    assert volume.flatten().topk(2).values[1] < 5.0


def test_gradient_descent_on_a_camera_recovers_it(backend: str) -> None:
    """Gradients reach the cameras: a shifted principal point is pulled back by comparing volumes."""
    features, projections = heatmaps((30, 40), m=4, sharpness=3.0)
    grid = VoxelGrid.box(torch.zeros(3, dtype=torch.float64), (1.2, 1.2, 1.0), (13, 13, 11))
    target = unproject(features, projections, grid, aggregation="mean", backend=backend)
    shift = torch.tensor([1.5, -1.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([shift], lr=0.2)
    for _ in range(60):
        offset = torch.cat([shift, shift.new_zeros(1)]).view(3, 1) * projections[..., 2:, :]
        volume = unproject(features, projections + offset, grid, aggregation="mean", backend=backend)
        optimiser.zero_grad()
        (volume - target).square().sum().backward()
        optimiser.step()
    assert shift.detach().abs().max() < 0.05
