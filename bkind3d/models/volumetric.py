"""BKinD-3D with a volume bottleneck (paper, Section 3.1; the method's main form)."""

from __future__ import annotations

from torch import Tensor

from bkind3d.models.discovery import DiscoveryModel, Lifted
from bkind3d.models.volume import VolumeNetwork
from bkind3d_kernels import SoftArgmax3d, Unproject, VoxelGrid
from bkind3d_kernels.geometry import rescale_projections


class VolumetricModel(DiscoveryModel):
    """Maps of all views, unprojected into one volume, and a 3D soft-argmax in it; arguments as `DiscoveryModel`."""

    @property
    def map_channels(self) -> int:
        """Channels C of the 2D maps of each view."""
        return self.config.channels

    def build(self) -> None:
        """Make the volume network and the operations around it."""
        config = self.config
        self.volume = VolumeNetwork(
            config.channels,
            config.keypoints,
            config.volume_channels,
            config.volume_stem,
            config.volume_blocks,
            config.norm,
        )
        self.unproject = Unproject(aggregation=config.aggregation, unseen=config.unseen, backend=config.backend)
        self.soft_argmax = SoftArgmax3d(temperature=1.0 / config.logit_gain, return_peak=True, backend=config.backend)

    def lift(self, maps: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> Lifted:
        """Aggregate the maps in the volume and find each keypoint there; arguments as `DiscoveryModel.lift`."""
        to_maps = rescale_projections(projections, size, (maps.shape[-2], maps.shape[-1]))
        volume = self.unproject(maps, to_maps, grid)
        return Lifted(*self.soft_argmax(self.volume(volume), grid))
