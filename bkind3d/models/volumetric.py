"""BKinD-3D with a volume bottleneck (paper, Section 3.1; the method's main form)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from kornia.geometry.conversions import axis_angle_to_rotation_matrix
from torch import Tensor

from bkind3d.models.discovery import DiscoveryModel, Lifted, box_center
from bkind3d.models.layers import leading
from bkind3d.models.volume import VolumeNetwork
from bkind3d_kernels import Unproject, VoxelGrid, linear_soft_argmax3d
from bkind3d_kernels.geometry import rescale_projections

SHIFT = 0.08  # of the box's sides: how far a turned volume is shifted at most
STILL = 0.01  # of the box's longest side: a keypoint that moves less than this does not move
COARSE = 0.5  # of the pairs of a step learn from the keypoints of a cascade's coarse volume


class VolumetricModel(DiscoveryModel):
    """Maps of all views, unprojected into one volume, and a 3D soft-argmax in it; arguments as `DiscoveryModel`.

    Attributes:
        equivariance_share: Share of the frames t that are looked at a second time, in another grid.
    """

    equivariance_share = 1.0

    @property
    def map_channels(self) -> int:
        """Channels C of the 2D maps of each view."""
        return self.config.channels

    def build(self) -> None:
        """Make the volume network and the operations around it."""
        config = self.config
        self.volume = self._network()
        self.fine = self._network() if config.cascade else None
        self.unproject = Unproject(aggregation=config.aggregation, unseen=config.unseen, backend=config.backend)

    def _network(self) -> VolumeNetwork:
        config = self.config
        return VolumeNetwork(
            config.channels,
            config.keypoints,
            config.volume_channels,
            config.volume_stem,
            config.volume_blocks,
            config.norm,
        )

    def lift(self, maps: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> Lifted:
        """Aggregate the maps in the volume and find each keypoint there; arguments as `DiscoveryModel.lift`."""
        to_maps = rescale_projections(projections, size, (maps.shape[-2], maps.shape[-1]))
        found = Lifted(*self._locate(maps, to_maps, grid, len(maps) // 2))
        if self.training and len(grid.affine) > 1:
            found.penalties["equivariance"] = self._turn_error(found.positions, maps, to_maps, grid)
        return found

    def _locate(self, maps: Tensor, to_maps: Tensor, grid: VoxelGrid, pairs: int) -> tuple[Tensor, Tensor]:
        """Positions (N, J, 3) and confidence (N, J) of the keypoints in one grid, or in the cascade that begins there.

        The cascade's coarse volume learns nothing from the fine one, which only looks where the coarse one has found
        the body. So a part of the pairs of a training step, the first, keeps the coarse keypoints; the others, and all
        outside of training, the fine ones. Skeleton and descriptors are the same for both, which makes keypoint j one
        part in both.

        Args:
            maps: (N, M, C, h, w).
            to_maps: (N, M, 3, 4), world to pixels of the maps.
            grid: Where to look.
            pairs: Number of pairs of the step: moment n is of pair n modulo this.
        """
        first = self._look(self.volume, maps, to_maps, grid)
        if self.fine is None:
            return first
        second = self._look(self.fine, maps, to_maps, self.fine_grid(first[0].detach(), grid))
        if not self.training:
            return second
        coarse = torch.arange(len(maps), device=maps.device) % max(1, pairs) < math.ceil(COARSE * max(1, pairs))
        positions, confidence = zip(first, second, strict=True)
        return torch.where(coarse[:, None, None], *positions), torch.where(coarse[:, None], *confidence)

    def fine_grid(self, positions: Tensor, grid: VoxelGrid) -> VoxelGrid:
        """The cascade's second volume: a cube around the median keypoint of each moment, along the first one's axes.

        In training it is shifted at random by up to `cascade_margin` of its side: by as much the coarse estimate may be
        wrong.

        Args:
            positions: Coarse keypoints (N, J, 3), world units.
            grid: The volume that they were found in.

        Returns:
            A grid for each moment, affine (N, 3, 4).
        """
        config = self.config
        center, side = positions.quantile(0.5, dim=1), config.cascade * grid.side
        if self.training:
            center = center + (2 * torch.rand_like(center) - 1) * config.cascade_margin * side
        axes = torch.nn.functional.normalize(grid.affine[..., :3], dim=-2)
        return VoxelGrid.box(center, side.expand(3), (config.cascade_voxels,) * 3, rotation=axes)

    def _look(self, network: VolumeNetwork, maps: Tensor, to_maps: Tensor, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
        """Positions (N, J, 3) and confidence (N, J) of the keypoints that one network finds in one grid."""
        features, head = network(self.unproject(maps, to_maps, grid)), network.head
        return linear_soft_argmax3d(
            features,
            head.weight.flatten(1),
            head.bias,
            grid,
            temperature=1.0 / self.config.logit_gain,
            return_peak=True,
            backend=self.config.backend_of("linear_soft_argmax3d"),
        )

    def training_grid(
        self, grid: VoxelGrid, up: Sequence[float], moments: int, generator: torch.Generator
    ) -> VoxelGrid:
        """The grid, turned and shifted at random for each moment; arguments as `DiscoveryModel`.

        Without the shift, the places on the axis of the turn would be the same in all turns, and keypoints that stand
        still there in mid-air would agree.
        """
        if not self.config.turn_volume:
            return grid
        angles = 2 * math.pi * torch.rand(moments, generator=generator)
        return turned(grid, up, angles, SHIFT * (2 * torch.rand(moments, 3, generator=generator) - 1))

    def _turn_error(self, positions: Tensor, maps: Tensor, to_maps: Tensor, grid: VoxelGrid) -> Tensor:
        r"""How far keypoints depend on the turn of the volume that they are found in.

        .. math:: \frac{1}{J} \sum_j
            \frac{\langle \| u_j(n, \theta_n) - u_j(n, \theta_{n + 1}) \|^2 \rangle_{n \leq N}}
            {2 \langle \| u_j(n, \theta_n) - \bar u_j \|^2 \rangle_{n \leq 2N} + (s / 100)^2}

        Relative to how far each keypoint moves, since a bare distance is smallest for keypoints that stand still.
        Frames t, the first half of the moments, or a share of them, are looked at again in the grids of other moments:
        the box is the same, the turn is not.

        Args:
            positions: (2N, J, 3), found in `grid`.
            maps: (2N, M, C, h, w).
            to_maps: (2N, M, 3, 4), world to pixels of the maps.
            grid: One for each moment.

        Returns:
            Scalar: 0 where all looks agree, about 1 where they have nothing in common.
        """
        looks = math.ceil(self.equivariance_share * (len(maps) // 2))
        other = VoxelGrid(grid.affine.roll(1, 0)[:looks], grid.shape)
        again, _ = self._locate(leading(maps, looks), to_maps[:looks], other, len(maps) // 2)
        error = (again - positions[:looks]).square().sum(-1).mean(0)
        spread = (positions - positions.mean(0)).square().sum(-1).mean(0)
        return (error / (2 * spread + (STILL * grid.side) ** 2)).mean()


def turned(grid: VoxelGrid, up: Sequence[float], angles: Tensor, shift: Tensor) -> VoxelGrid:
    """A grid turned about the vertical through its centre, and shifted.

    Args:
        grid: One grid for all samples, affine (1, 3, 4).
        up: The world's vertical.
        angles: (N,) radians.
        shift: (N, 3), along the sides of the turned box in parts of them.

    Returns:
        A grid for each angle, affine (N, 3, 4).
    """
    axis = torch.nn.functional.normalize(torch.tensor(up, dtype=torch.float64), dim=0)
    turn = axis_angle_to_rotation_matrix(angles[:, None].double() * axis).to(grid.affine)
    center = box_center(grid)[..., None]
    linear, origin = grid.affine.split((3, 1), dim=-1)
    linear, origin = turn @ linear, turn @ (origin - center) + center
    voxels = shift.to(grid.affine) * (grid.affine.new_tensor(grid.shape) - 1)
    return VoxelGrid(torch.cat([linear, origin + linear @ voxels[..., None]], dim=-1), grid.shape)
