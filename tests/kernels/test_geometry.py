import copy
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import scenes
import torch

from bkind3d_kernels import VoxelGrid, VoxelGridModule, unproject
from bkind3d_kernels.geometry import all_pairs, project_points, rescale_points, rescale_projections

K = np.array([[90.0, 0.5, 61.0], [0, 95.0, 45.0], [0, 0, 1]])


def opencv_camera(seed: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """rvec, tvec and the projection matrix of a camera about 3 in front of the origin."""
    generator = np.random.default_rng(seed)
    rvec, tvec = generator.normal(size=3), np.array([0.1, -0.2, 3.0]) + 0.1 * generator.normal(size=3)
    rotation, _ = cv2.Rodrigues(rvec)
    return rvec, tvec, torch.from_numpy(K @ np.hstack([rotation, tvec[:, None]]))


def test_box_spans_its_sides_inclusive() -> None:
    grid = VoxelGrid.box((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), (3, 5, 4))
    points = grid.coordinates()
    assert points.shape == (1, 3, 5, 4, 3)
    torch.testing.assert_close(points[0, 0, 0, 0], torch.tensor([0.0, 0.0, 0.0]))
    torch.testing.assert_close(points[0, -1, -1, -1], torch.tensor([2.0, 4.0, 6.0]))
    torch.testing.assert_close(points[0, 1, 2, 0], torch.tensor([1.0, 2.0, 0.0]))
    assert float(grid.side) == pytest.approx(6.0)


def test_single_sample_axis_is_at_the_center() -> None:
    points = VoxelGrid.box((1.0, 2.0, 3.0), (2.0, 2.0, 2.0), (1, 2, 1)).coordinates()
    assert points[0, 0, :, 0].tolist() == [[1.0, 1.0, 3.0], [1.0, 3.0, 3.0]]


def test_rotated_box_per_sample() -> None:
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # x to y, y to -x
    rotation = torch.stack([torch.eye(3), quarter])
    grid = VoxelGrid.box(torch.zeros(3), (2.0, 4.0, 6.0), (2, 2, 2), rotation)
    points = grid.coordinates()
    assert points[0, 1, 1, 1].tolist() == [1.0, 2.0, 3.0]
    assert points[1, 1, 1, 1].tolist() == [-2.0, 1.0, 3.0]
    centers = torch.tensor([[0.0, 0, 0], [5.0, 0, 0]], dtype=torch.float64)
    assert VoxelGrid.cube(centers, 2.0, 3).coordinates()[1, 1, 1, 1].tolist() == [5.0, 0.0, 0.0]


def test_grid_moves_and_copies() -> None:
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 2)
    assert grid.to(dtype=torch.float64).affine.dtype == torch.float64
    assert grid.to("meta").affine.device.type == "meta"
    for other in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert other.shape == grid.shape
        assert torch.equal(other.affine, grid.affine)
    with pytest.raises(AttributeError):
        grid.shape = (1, 1, 1)  # type: ignore[misc]


def test_voxel_to_pixel_is_projection_of_coordinates(rng: torch.Generator) -> None:
    grid = scenes.grid((3, 4, 5), rng, n=2)
    projections = scenes.projections(2, 3, (20, 30), rng)
    index = torch.cartesian_prod(*(torch.arange(float(s)) for s in grid.shape)).double()
    homogeneous = torch.cat([index, torch.ones(60, 1).double()], dim=1) @ grid.voxel_to_pixel(projections).mT
    pixels, depth = project_points(projections, grid.coordinates().view(2, 1, 60, 3))
    torch.testing.assert_close(homogeneous[..., :2] / homogeneous[..., 2:], pixels)
    torch.testing.assert_close(homogeneous[..., 2], depth)


@pytest.mark.parametrize("seed", range(3))
def test_project_points_agrees_with_opencv(seed: int) -> None:
    rvec, tvec, projection = opencv_camera(seed)
    points = np.random.default_rng(seed).normal(size=(20, 3)) * 0.5
    expected, _ = cv2.projectPoints(points, rvec, tvec, K, None)
    skewed = expected[:, 0].copy()
    rotation, _ = cv2.Rodrigues(rvec)
    camera = points @ rotation.T + tvec
    skewed[:, 0] += K[0, 1] * camera[:, 1] / camera[:, 2]  # OpenCV has no skew
    pixels, depth = project_points(projection, torch.from_numpy(points))
    np.testing.assert_allclose(pixels, skewed, atol=1e-9)
    np.testing.assert_allclose(depth, camera[:, 2], atol=1e-12)


@pytest.mark.parametrize("z", [0.0, 1e-12, -1e-12, 1e-7])
def test_projection_near_depth_zero_has_finite_gradients(z: float) -> None:
    points = torch.tensor([[0.3, -0.2, z]], requires_grad=True)
    projection = torch.eye(3, 4, requires_grad=True)
    pixels, depth = project_points(projection, points)
    (pixels.sum() + depth.sum()).backward()
    assert points.grad is not None
    assert projection.grad is not None
    assert pixels.isfinite().all()
    assert points.grad.isfinite().all()
    assert projection.grad.isfinite().all()


def test_rescaling_follows_an_area_resize() -> None:
    """OpenCV's area resize moves the centre of mass of a blob as the pixel-centre rule says."""
    (height, width), (h, w) = (96, 128), (24, 16)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    blob = np.exp(-((x - 50.3) ** 2 + (y - 61.8) ** 2) / (2 * 6.0**2))
    small = cv2.resize(blob, (w, h), interpolation=cv2.INTER_AREA)
    mass = small / small.sum()
    center = [(mass * np.arange(w)).sum(), (mass * np.arange(h)[:, None]).sum()]
    moved = rescale_points(torch.tensor([50.3, 61.8]).double(), (height, width), (h, w))
    np.testing.assert_allclose(moved, center, atol=1e-4)


def test_rescaled_projection_projects_to_the_rescaled_point(rng: torch.Generator) -> None:
    projections = scenes.projections(2, 3, (20, 30), rng)
    points = 0.3 * torch.randn(2, 1, 7, 3, generator=rng).double()
    small, _ = project_points(rescale_projections(projections, (20, 30), (7, 45)), points)
    full, _ = project_points(projections, points)
    torch.testing.assert_close(small, rescale_points(full, (20, 30), (7, 45)))


def test_image_corners_stay_corners() -> None:
    corners = torch.tensor([[-0.5, -0.5], [63.5, 31.5]])
    assert rescale_points(corners, (32, 64), (8, 128)).tolist() == [[-0.5, -0.5], [127.5, 7.5]]


def test_all_pairs_are_lexicographic() -> None:
    assert all_pairs(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert all_pairs(0).shape == all_pairs(1).shape == (0, 2)
    assert all_pairs(30).dtype == torch.int64


AFFINE = torch.eye(3, 4).unsqueeze(0)
SINGULAR = torch.tensor([[[1.0, 2, 0, 0], [2, 4, 0, 0], [0, 0, 1, 0]]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VoxelGrid(AFFINE[0], (2, 2, 2)), r"grid\.affine \(3, 4\): expected \(N or 1, 3, 4\)"),
        (lambda: VoxelGrid(AFFINE.half(), (2, 2, 2)), r"grid\.affine \(1, 3, 4\): expected float32 or float64"),
        (lambda: VoxelGrid(AFFINE * torch.nan, (2, 2, 2)), r"grid\.affine \(1, 3, 4\): expected finite"),
        (lambda: VoxelGrid(SINGULAR, (2, 2, 2)), r"grid\.affine \(1, 3, 4\): expected an invertible"),
        (lambda: VoxelGrid(AFFINE, (2, 2)), r"grid\.shape \(2, 2\): expected three integers"),
        (lambda: VoxelGrid(AFFINE, (2, 0, 2)), r"grid\.shape \(2, 0, 2\): expected three integers"),
        (lambda: VoxelGrid(AFFINE, (2, 2.0, 2)), r"grid\.shape \(2, 2\.0, 2\): expected three integers"),
        (lambda: VoxelGrid.cube((0.0, 0.0), 1.0, 2), r"center \(2,\): expected \(3,\) or \(N, 3\)"),
        (lambda: VoxelGrid.cube((0.0, 0.0, 0.0), -1.0, 2), r"sides \(3,\): expected three finite lengths above 0"),
        (lambda: VoxelGrid.cube((0.0, 0.0, torch.nan), 1.0, 2), r"center \(3,\): expected finite values"),
        (lambda: VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 0), r"shape \(0, 0, 0\): expected three integers"),
        (
            lambda: VoxelGrid.box(torch.zeros(2, 3), (1, 1, 1), (2, 2, 2), torch.eye(3).expand(3, 3, 3)),
            r"rotation \(3, 3, 3\): expected \(3, 3\) or \(N, 3, 3\), for 2 centers",
        ),
        (
            lambda: VoxelGrid.box(torch.zeros(2, 3), torch.ones(3, 3), (2, 2, 2)),
            r"sides \(3, 3\): expected \(3,\) or \(N, 3\), for 2 centers",
        ),
        (lambda: VoxelGrid.cube((0.0, 0.0, 0.0), torch.ones(2, 3), 2), r"side \(2, 3\): expected a length or \(N,\)"),
        (lambda: VoxelGrid.from_coordinates(torch.zeros(2, 2, 3)), r"volume \(2, 2, 3\): expected \(X, Y, Z, 3\) or"),
        (
            lambda: VoxelGrid.from_coordinates(torch.zeros(2, 1, 2, 3)),
            r"volume .*: expected at least two samples",
        ),
        (lambda: VoxelGrid.from_coordinates(torch.zeros(2, 2, 2, 3) / 0), r"volume \(2, 2, 2, 3\): expected finite"),
        (lambda: project_points(torch.eye(3), torch.zeros(1, 3)), r"projections \(3, 3\): expected \(\.\.\., 3, 4\)"),
        (lambda: project_points(torch.eye(3, 4), torch.zeros(1, 2)), r"points \(1, 2\): expected \(\.\.\., J, 3\)"),
        (lambda: project_points(torch.eye(3, 4) / 0, torch.zeros(1, 3)), r"projections \(3, 4\): expected finite"),
        (lambda: rescale_points(torch.zeros(3), (1, 1), (1, 1)), r"points \(3,\): expected \(\.\.\., 2\)"),
        (lambda: rescale_projections(torch.zeros(3), (1, 1), (1, 1)), r"projections \(3,\): expected"),
        (lambda: all_pairs(-1), "count -1: expected at least 0"),
    ],
)
def test_bad_geometry_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"grid\.affine: expected a tensor"):
        VoxelGrid([[1.0]], (2, 2, 2))  # type: ignore[arg-type]


def test_a_grid_is_loaded_without_code(tmp_path: Path) -> None:
    grid = VoxelGrid.cube((0.1, 0.2, 0.3), 2.0, 4)
    torch.save({"grid": grid}, tmp_path / "grid.pt")
    loaded = torch.load(tmp_path / "grid.pt", weights_only=True)["grid"]
    assert torch.equal(loaded.affine, grid.affine)
    assert loaded.shape == (4, 4, 4)


# ---- grids of other libraries ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_is_found_from_its_coordinates(dtype: torch.dtype, rng: torch.Generator) -> None:
    for n in (1, 3):
        grid = scenes.grid((3, 4, 2), rng, n).to(dtype=dtype)
        found = VoxelGrid.from_coordinates(grid.coordinates())
        assert (found.shape, found.affine.dtype) == (grid.shape, dtype)
        torch.testing.assert_close(found.affine, grid.affine)
    assert VoxelGrid.from_coordinates(grid.coordinates()[0]).affine.shape == (1, 3, 4)


def test_the_volume_of_learnable_triangulation_is_found() -> None:
    """Its cuboid: side / (size - 1) steps from position to position + side, turned about an axis through the centre."""
    size, side, angle = 5, 2500.0, 0.7
    position = torch.tensor([100.0, -300.0, 50.0])
    center = position + side / 2
    index = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    coordinates = position + (side / (size - 1)) * index.float()
    c, s = np.cos(angle), np.sin(angle)
    rotation = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]]).float()
    coordinates = (coordinates - center) @ rotation.T + center
    found = VoxelGrid.from_coordinates(coordinates.view(size, size, size, 3))
    expected = VoxelGrid.box(center, (side, side, side), (size, size, size), rotation)
    torch.testing.assert_close(found.affine, expected.affine, rtol=1e-5, atol=1e-2)


def test_a_volume_that_is_bent_is_refused_with_its_error() -> None:
    points = VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 3).coordinates()
    points[0, 1, 1, 1, 2] += 0.27  # of which the mean takes a 27th
    with pytest.raises(ValueError, match=r"coordinates are up to 0\.26 from the nearest one, whose .* of 1 at least"):
        VoxelGrid.from_coordinates(points)
    assert VoxelGrid.from_coordinates(points, tolerance=0.3).shape == (3, 3, 3)
    with pytest.raises(ValueError, match="it is singular"):  # all points are one
        VoxelGrid.from_coordinates(torch.zeros(2, 2, 2, 3))


def test_sides_may_differ_between_samples() -> None:
    sides = torch.tensor([[2.0, 4.0, 6.0], [1.0, 1.0, 3.0]], requires_grad=True)
    points = VoxelGrid.box(torch.zeros(3), sides, (3, 2, 2)).coordinates()
    assert torch.equal(points[:, -1, -1, -1] - points[:, 0, 0, 0], sides)
    cubes = VoxelGrid.cube(torch.zeros(2, 3), torch.tensor([2.0, 4.0]), 3).coordinates()
    assert cubes[:, -1, -1, -1].tolist() == [[1.0] * 3, [2.0] * 3]
    points.square().sum().backward()
    assert sides.grad is not None
    assert sides.grad.abs().min() > 0


# ---- grids that modules hold ----


class Net(torch.nn.Module):
    def __init__(self, grid: VoxelGrid) -> None:
        super().__init__()
        self.grid = VoxelGridModule(grid)

    def forward(self, features: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
        return unproject(features, projections, self.grid(), backend="reference")


def test_a_held_grid_follows_its_module(rng: torch.Generator) -> None:
    grid = scenes.grid((2, 3, 4), rng).to(dtype=torch.float32)
    net = Net(grid)
    assert net.state_dict() == {}
    assert (net.grid().affine is grid.affine, net.grid().shape) == (True, grid.shape)
    features, projections = torch.randn(1, 2, 3, 5, 6), scenes.projections(1, 2, (5, 6), rng).float()
    expected = unproject(features, projections, grid, backend="reference")
    assert torch.equal(net(features, projections), expected)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(features, projections), expected)
    assert net.to(torch.float64).grid().affine.dtype == torch.float64
    assert net.half().grid().affine.dtype == torch.float64
    assert net.to("meta").grid().affine.device.type == "meta"
    assert net.grid().affine.dtype == torch.float64
    with pytest.raises(TypeError, match="grid: expected a VoxelGrid, got Tensor"):
        VoxelGridModule(grid.affine)  # type: ignore[arg-type]


def test_a_held_grid_may_be_trained() -> None:
    affine = torch.nn.Parameter(torch.eye(3, 4)[None])
    held = VoxelGridModule(VoxelGrid(affine, (2, 2, 2)))
    assert [*held.state_dict()] == ["affine"]
    held().coordinates().sum().backward()
    assert affine.grad is not None
    assert affine.grad.abs().sum() > 0
