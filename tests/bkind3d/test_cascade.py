"""The volumetric method's second, fine volume around the body that was found in the first."""

from dataclasses import replace

import pytest
import torch
from tiny_model import TINY
from tiny_scene import SIZE, cameras, heatmaps, truth
from torch import Tensor, nn

from bkind3d.config import Config, validate
from bkind3d.errors import InputError
from bkind3d.models.volumetric import VolumetricModel, turned
from bkind3d_kernels import VoxelGrid

CASCADE = replace(TINY, cascade=0.25, cascade_voxels=6, cascade_margin=0.1)


def make(**settings: object) -> VolumetricModel:
    torch.manual_seed(0)
    return VolumetricModel(replace(CASCADE, **settings), outputs=1)  # type: ignore[arg-type]


def test_the_fine_grid_is_a_cube_around_the_median_keypoint_along_the_turned_axes() -> None:
    grid = VoxelGrid.box((0.5, -1.0, 2.0), (4.0, 2.0, 1.0), (9, 5, 3)).to(dtype=torch.float64)
    grid = turned(grid, (0, 0, 1), torch.tensor([0.0, 0.7]), torch.zeros(2, 3))
    positions = torch.randn(2, 5, 3, dtype=torch.float64)
    positions[:, 0] = 100.0  # one that is lost moves nothing far
    fine = make().eval().fine_grid(positions, grid)
    corners = fine.coordinates()
    torch.testing.assert_close(corners.mean((1, 2, 3)), positions.sort(dim=1).values[:, 2], rtol=0, atol=1e-9)
    for axis in range(3):
        step = corners.movedim(axis + 1, 1)
        side = (step[:, -1] - step[:, 0])[:, 0, 0]
        torch.testing.assert_close(side.norm(dim=-1), torch.ones(2).double(), rtol=0, atol=1e-9)
        along = torch.nn.functional.cosine_similarity(side, grid.affine[..., axis])
        torch.testing.assert_close(along, torch.ones(2).double(), rtol=0, atol=1e-9)


def test_the_fine_grid_is_shifted_by_the_margin_in_training_alone() -> None:
    grid, positions = VoxelGrid.cube((0.0, 0.0, 0.0), 4.0, 9), torch.zeros(200, 4, 3)
    centers = make().fine_grid(positions, grid).coordinates().mean((1, 2, 3)).abs()
    assert 0.09 < centers.max() <= 0.1 + 1e-5
    assert make(cascade_margin=0.0).fine_grid(positions, grid).coordinates().mean((1, 2, 3)).abs().max() < 1e-6
    assert make().eval().fine_grid(positions, grid).coordinates().mean((1, 2, 3)).abs().max() < 1e-6


class Heatmaps(nn.Module):
    """In place of a volume network: the volume is the heatmaps' own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Conv3d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.head.weight)

    def forward(self, volume: Tensor) -> Tensor:
        """(N, J, X, Y, Z), as it is."""
        return volume


def test_it_finds_points_finer_than_one_volume_with_as_many_voxels() -> None:
    maps = torch.nn.functional.avg_pool2d(heatmaps(truth(), (48, 64), 1.0).exp().flatten(0, 1), 5, stride=1, padding=2)
    maps = (maps / maps.amax((-2, -1), keepdim=True)).unflatten(0, (2, 3))
    arena = VoxelGrid.box((0.3, -0.2, 0.1), (5.0, 5.0, 1.5), (26, 26, 8))
    errors = []
    for settings in ({"cascade": 0.0}, {"cascade": 0.25, "cascade_voxels": 26}):
        model = make(aggregation="mean", logit_gain=60.0, **settings).eval()
        model.volume = Heatmaps(maps.shape[2])  # type: ignore[assignment]
        if model.fine is not None:
            model.fine = Heatmaps(maps.shape[2])  # type: ignore[assignment]
        found = model.lift(maps, cameras().expand(2, -1, -1, -1), SIZE, arena)
        errors.append((found.positions - truth()).norm(dim=-1).mean())
    one, cascade = errors
    assert cascade < 0.05
    assert cascade < 0.5 * one


def test_both_volumes_learn_and_predictions_come_from_the_fine_one() -> None:
    model, grid = make(), VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8)
    maps = torch.rand(4, 3, TINY.channels, 12, 16, requires_grad=True)
    projections = cameras().expand(4, -1, -1, -1)
    assert model.fine is not None
    for moments, learns, rests in (([0, 2], model.volume, model.fine), ([1, 3], model.fine, model.volume)):
        model.zero_grad()
        model.lift(maps, projections, SIZE, grid).positions[moments].square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learns.parameters())
        assert sum(p.grad.abs().sum() for p in learns.parameters() if p.grad is not None) > 0
        assert all(p.grad is None or not p.grad.any() for p in rests.parameters())
    assert maps.grad is not None
    assert maps.grad.any()
    model.eval()
    found = model.lift(maps, projections, SIZE, grid).positions
    for parameter in model.fine.head.parameters():
        nn.init.zeros_(parameter)  # all voxels alike: each keypoint in the middle of its cube
    middles = model.lift(maps, projections, SIZE, grid).positions
    torch.testing.assert_close(middles, middles[:, :1].expand_as(middles))
    assert (found - middles).abs().max() <= 0.25 + 1e-5
    assert not torch.allclose(found, middles)


def test_a_turned_volume_has_a_cascade_too() -> None:
    model, still = make(turn_volume=True), VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8)
    grid = model.training_grid(still, (0, 0, 1), 4, torch.Generator())
    images = torch.rand(2, 2, 3, 3, 32, 32)
    found = model(images, cameras(), grid)
    assert found.penalties["equivariance"] > 0
    found.penalties["equivariance"].backward()
    assert model.fine is not None
    assert model.fine.head.weight.grad is not None
    assert model.fine.head.weight.grad.any()


@pytest.mark.parametrize(("name", "value"), [("cascade", 1.0), ("cascade_voxels", 1), ("cascade_margin", 0.6)])
def test_settings_that_cannot_be_are_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^model.{name}: expected .* got {value}$"):
        validate(Config(model=replace(Config().model, **{name: value})))  # type: ignore[arg-type]
