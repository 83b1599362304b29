import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rig import DISTORTION, ring

from bkind3d.data import Volume, propose_volume, require_visible, visible_views
from bkind3d.errors import InputError

side = st.floats(0.01, 1000)


@settings(deadline=None, max_examples=50)
@given(size=st.tuples(side, side, side), voxels=st.integers(2, 40))
def test_grid_spans_the_box_exactly(size: tuple[float, float, float], voxels: int) -> None:
    volume = Volume((1.0, -2.0, 3.0), size)
    grid = volume.grid(voxels)
    assert max(grid.shape) == voxels
    assert min(grid.shape) >= 2
    coordinates = grid.coordinates()[0].double()
    extent = coordinates.amax((0, 1, 2)) - coordinates.amin((0, 1, 2))
    np.testing.assert_allclose(extent, size, rtol=1e-3)
    np.testing.assert_allclose(coordinates, volume.points(voxels), rtol=1e-4, atol=1e-4 * max(size))
    spacing = np.array(size) / (np.array(grid.shape) - 1)
    longest = max(size) / (voxels - 1)
    assert ((spacing <= 2 * longest) | (np.array(grid.shape) == 2)).all()


def test_shape_in_proportion() -> None:
    assert Volume((0, 0, 0), (1.2, 1.2, 0.6)).shape(25) == (25, 25, 13)
    assert Volume((0, 0, 0), (1, 1e-6, 2)).shape(3) == (2, 2, 3)
    with pytest.raises(InputError, match="at least 2 are needed"):
        Volume((0, 0, 0), (1, 1, 1)).grid(1)


def test_corners() -> None:
    corners = Volume((1, 2, 3), (2, 4, 6)).corners()
    assert corners[0].tolist() == [0, 0, 0]
    assert corners[0b101].tolist() == [2, 0, 6]


def test_visible_views_counts() -> None:
    cameras = ring(3)
    small = Volume((0, 0, 0), (0.2, 0.2, 0.2))
    assert visible_views(cameras, small, 4).tolist() == torch.full((4, 4, 4), 3).tolist()
    towards_first = 1.5 * cameras.centers[0] / cameras.centers[0].norm()
    behind_first = Volume(tuple((2 * cameras.centers[0]).tolist()), (0.1, 0.1, 0.1))
    between = Volume(tuple(towards_first.tolist()), (0.1, 0.1, 0.1))
    assert visible_views(cameras, behind_first, 2).max() <= 2
    assert visible_views(cameras, between, 2).min() >= 1


def test_volume_behind_all_cameras_is_refused() -> None:
    parallel = dataclasses.replace(ring(3), rotation=torch.eye(3).repeat(3, 1, 1), translation=torch.eye(3))
    with pytest.raises(InputError, match=r"volume \(center \[0.0, 0.0, -9.0\].* lies behind all 3 cameras; check"):
        require_visible(parallel, Volume((0, 0, -9), (1, 1, 1)))


def test_volume_seen_by_fewer_than_two_is_refused() -> None:
    require_visible(ring(3), Volume((0, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match=r"0.0% of its voxels are seen by two or more cameras"):
        require_visible(ring(1), Volume((0, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match=r"of its voxels are seen by two or more cameras; check its center, the units"):
        require_visible(ring(3), Volume((0, 0, 0), (1000, 1000, 1000)))


@pytest.mark.parametrize("distortion", [(0.0,) * 5, DISTORTION])
@pytest.mark.parametrize("count", [2, 4, 7])
def test_proposed_volume_is_the_common_view(count: int, distortion: tuple[float, ...]) -> None:
    cameras = ring(count, (640, 480), distortion)
    volume = propose_volume(cameras)
    assert np.abs(volume.center).max() < 0.3, "the cameras look at the origin"
    share = (visible_views(cameras, volume, 24) == count).double().mean().item()
    assert 0.85 < share < 0.95
    assert volume.size[0] == volume.size[1]
    larger = Volume(volume.center, tuple(1.2 * length for length in volume.size))
    assert (visible_views(cameras, larger, 24) == count).double().mean().item() < share


def test_proposed_volume_scales_with_the_units_and_moves_with_the_world() -> None:
    cameras = ring(4, (640, 480))
    shift = torch.tensor([5000.0, -7000.0, 200.0], dtype=torch.float64)
    moved = dataclasses.replace(cameras, translation=1000 * cameras.translation - cameras.rotation @ shift, units="mm")
    small, large = propose_volume(cameras), propose_volume(moved)
    np.testing.assert_allclose(large.size, 1000 * np.array(small.size), rtol=0.01)
    np.testing.assert_allclose(large.center, 1000 * np.array(small.center) + shift.numpy(), atol=15)


def test_proposed_volume_stretches_along_up() -> None:
    """Portrait images leave room above: turn the world so that the vertical is x."""
    cameras = ring(4, (300, 900))
    assert propose_volume(cameras).size[2] == pytest.approx(1.5 * propose_volume(cameras).size[0], rel=0.02)
    turn = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)  # z becomes x
    turned = dataclasses.replace(cameras, rotation=cameras.rotation @ turn.T)
    volume = propose_volume(turned, up=(1.0, 0.0, 0.0))
    np.testing.assert_allclose(volume.size, np.roll(propose_volume(cameras).size, 1), rtol=1e-6)


def test_where_no_volume_can_be_proposed() -> None:
    cameras = ring(3)
    parallel = dataclasses.replace(cameras, rotation=cameras.rotation[:1].repeat(3, 1, 1))
    with pytest.raises(InputError, match=r"look in parallel.*; give the volume's center and size"):
        propose_volume(parallel)
    with pytest.raises(InputError, match="look in parallel"):
        propose_volume(ring(1))
    about = torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64))
    outwards = dataclasses.replace(cameras, rotation=about @ cameras.rotation, translation=cameras.translation @ about)
    torch.testing.assert_close(outwards.centers, cameras.centers)
    with pytest.raises(InputError, match="fewer than two cameras see the point where the optical axes meet"):
        propose_volume(outwards)
