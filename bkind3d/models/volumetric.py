"""BKinD-3D with a volume bottleneck (paper, Section 3.1; the method's main form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bkind3d.config import ModelConfig
from bkind3d.models.encoder import build_encoder
from bkind3d.models.geometry import GeometryDecoder
from bkind3d.models.layers import channels_last
from bkind3d.models.reconstruction import ReconstructionDecoder
from bkind3d.models.skeleton import Skeleton
from bkind3d.models.volume import VolumeNetwork
from bkind3d_kernels import SoftArgmax3d, Unproject, VoxelGrid, rasterize_edges
from bkind3d_kernels.geometry import project_points, rescale_points, rescale_projections


@dataclass
class Keypoints:
    """What one moment shows.

    Attributes:
        positions: (N, J, 3), world units.
        confidence: Largest probability of each heatmap, (N, J).
        features: Appearance features of every view, fine to coarse, (N·M, C_l, h_l, w_l).
    """

    positions: Tensor
    confidence: Tensor
    features: list[Tensor]


@dataclass
class Reconstruction:
    """What a training step needs.

    Attributes:
        positions: Keypoints at t and t + gap, (N, 2, J, 3), world units.
        confidence: (N, 2, J).
        difference: Reconstructed difference of the two frames, (N, M, C, H, W).
    """

    positions: Tensor
    confidence: Tensor
    difference: Tensor


class VolumetricModel(nn.Module):
    """Images of calibrated views to 3D keypoints, and keypoints to the difference of two frames.

    Views and times go through the encoder as one batch. Projections are 3 × 4 matrices to pixels of the images given.

    Args:
        config: The networks' settings.
        outputs: Channels of the reconstructed difference: 3 (RGB) or 1 (grey).
    """

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder, config.encoder_weights, config.norm)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.geometry = GeometryDecoder(
            channels, strides, config.channels, config.map_stride, config.pyramid_channels, config.norm
        )
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
        self.skeleton = Skeleton(
            config.keypoints,
            config.edge_activation,
            config.edge_start_mean,
            config.edge_start_std,
            config.edge_threshold,
        )
        self.reconstruction = ReconstructionDecoder(
            channels, strides, config.edge_strides, config.decoder_channels, outputs, config.norm
        )
        # Channels-last is what `unproject` reads and writes; convolutions are up to twice as fast in it as well.
        channels_last(self)

    def detect(self, images: Tensor, projections: Tensor, grid: VoxelGrid) -> Keypoints:
        """Find the keypoints of each moment.

        Args:
            images: (N, M, 3, H, W) in [0, 1].
            projections: (N or 1, M, 3, 4), world to image pixels.
            grid: Where to look.
        """
        n, m, _, height, width = images.shape
        features = self.encoder(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        maps = self.geometry(features)
        to_maps = rescale_projections(projections, (height, width), maps.shape[-2:])
        volume = self.unproject(maps.unflatten(0, (n, m)), to_maps.expand(n, -1, -1, -1), grid)
        positions, confidence = self.soft_argmax(self.volume(volume), grid)
        return Keypoints(positions, confidence, features)

    def edge_maps(self, pixels: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Draw the skeleton for every level of the decoder.

        Args:
            pixels: Keypoints (N, J, 2) in pixels of an image of `size`.
            size: (H, W).

        Returns:
            Edge maps (N, h, w), coarse to fine.
        """
        sizes = [(size[0] // stride, size[1] // stride) for stride in self.config.edge_strides]
        scaled = rescale_points(pixels, size, sizes[0])
        sigmas = list(self.config.edge_sigmas)
        return rasterize_edges(
            scaled, self.skeleton.weights, sizes, sigmas, edges=self.skeleton.pairs, backend=self.config.backend
        )

    def forward(self, images: Tensor, projections: Tensor, grid: VoxelGrid) -> Reconstruction:
        """Find the keypoints at both times and reconstruct the difference of the frames from them.

        Args:
            images: (N, 2, M, 3, H, W) in [0, 1]: frames t and t + gap of every view.
            projections: (N or 1, M, 3, 4), world to image pixels.
            grid: Where to look.
        """
        n, _, m, _, height, width = images.shape
        size = (height, width)
        # Times go first so that the features of frame t are the first half of the batch: no copy to pick them.
        projections = projections.expand(n, -1, -1, -1).repeat(2, 1, 1, 1)
        found = self.detect(images.transpose(0, 1).flatten(0, 1), projections, grid)
        with torch.autocast(images.device.type, enabled=False):
            pixels, _ = project_points(projections, found.positions[:, None])
        edges = [
            torch.stack(level.unflatten(0, (2, n * m)).unbind(0), dim=1)
            for level in self.edge_maps(pixels.flatten(0, 1), size)
        ]
        appearance = [level[: n * m] for level in found.features]
        difference = self.reconstruction(appearance, edges, size)
        return Reconstruction(
            positions=found.positions.unflatten(0, (2, n)).transpose(0, 1),
            confidence=found.confidence.unflatten(0, (2, n)).transpose(0, 1),
            difference=difference.unflatten(0, (n, m)),
        )
