"""Agreement of the views, on keypoints whose projections are known."""

import numpy as np
import pytest
import torch
from small_rig import ring

from bkind3d.agreement import reprojection_error


def test_views_that_agree_have_no_error() -> None:
    cameras = ring(3)
    points = torch.tensor(np.random.default_rng(0).uniform(-0.3, 0.3, (5, 4, 3)))
    pixels = cameras.project(points)[0].transpose(0, 1)  # (F, M, J, 2)
    projections = cameras.projection_matrices()[None]
    error = reprojection_error(points.float(), pixels.float(), projections.float(), np.ones((3, 2)))
    assert error.shape == (5, 4)
    assert error.max() < 1e-3


def test_error_is_the_root_mean_square_in_the_pixels_of_the_video() -> None:
    cameras = ring(3)
    points = torch.zeros(1, 1, 3, dtype=torch.float64)
    pixels = cameras.project(points)[0].transpose(0, 1)
    pixels[0, 0, 0] += torch.tensor([3.0, 4.0])
    pixels[0, 1, 0, 1] -= 1.0
    scale = np.array([[1.0, 1.0], [2.0, 5.0], [1.0, 1.0]])
    error = reprojection_error(points, pixels, cameras.projection_matrices()[None], scale)
    assert error[0, 0] == pytest.approx(np.sqrt((25 + 25 + 0) / 3), rel=1e-5)


def test_a_view_behind_whose_camera_it_lies_does_not_count() -> None:
    cameras = ring(2)
    behind_one, behind_all = 2 * cameras.centers[0], torch.tensor([0.0, 0.0, 1e6])
    points = torch.stack([behind_one, behind_all])[None]
    pixels = cameras.project(points)[0].transpose(0, 1)
    pixels[0, 0] += 100.0
    error = reprojection_error(points, pixels, cameras.projection_matrices()[None], np.ones((2, 2)))
    assert error[0, 0] < 1e-6
    assert (cameras.project(behind_all)[1] < 0).all()
    assert np.isnan(error[0, 1])
