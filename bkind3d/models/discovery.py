"""What all discovery methods share: encoder, geometry decoder, bottleneck, reconstruction (paper, Section 3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bkind3d.models.body import Body, BodyTerms, OnBody
from bkind3d.models.config import ModelConfig
from bkind3d.models.encoder import build_encoder
from bkind3d.models.geometry import GeometryDecoder
from bkind3d.models.layers import channels_last, leading, use_backend
from bkind3d.models.points import draw_points
from bkind3d.models.reconstruction import ReconstructionDecoder
from bkind3d.models.skeleton import Skeleton
from bkind3d.models.targets import difference_target
from bkind3d.models.views import body_middle, centred
from bkind3d.models.volume import VolumeNetwork
from bkind3d_kernels import VoxelGrid, rasterize_edges
from bkind3d_kernels.geometry import project_points, rescale_points


@dataclass
class Lifted:
    """What the maps of all views say together.

    Attributes:
        positions: (N, J, 3), world units.
        confidence: Largest probability of each heatmap, (N, J); of heatmaps of single views, their mean over views.
        penalties: Further terms of the training objective, unweighted scalars by their name in `LossConfig`.
        detected: Keypoints of the single views (N, M, J, 2), image pixels; None where a method has none.
    """

    positions: Tensor
    confidence: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    detected: Tensor | None = None


@dataclass
class Keypoints(Lifted):
    """What one moment shows.

    Attributes:
        features: Appearance features of every view, fine to coarse, (N·M, C_l, h_l, w_l).
    """

    features: list[Tensor] = field(default_factory=list)


@dataclass
class Reconstruction:
    """What a training step needs.

    Attributes:
        positions: Keypoints at t and t + gap, (N, 2, J, 3), world units.
        confidence: (N, 2, J).
        difference: Reconstruction of the model's target, (N, M, C, H, W): the difference of the two frames
            (Keypoint3D: the later frame itself).
        penalties: Further terms of the training objective, unweighted scalars by their name in `LossConfig`.
        on_body: What the foreground says, where it is known.
    """

    positions: Tensor
    confidence: Tensor
    difference: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    on_body: OnBody | None = None


class DiscoveryModel(nn.Module, ABC):
    """Images of calibrated views to 3D keypoints, and keypoints to the difference of two frames.

    A method says how many maps it needs of each view (`map_channels`), which networks of its own it has (`build`), and
    how the maps of all views become 3D keypoints (`lift`). Views and times go through the encoder as one batch.
    Projections are 3 × 4 matrices to pixels of the images given.

    Args:
        config: The networks' settings.
        outputs: Channels of the reconstruction: 3 (RGB) or 1 (grey).
        foreground: Whether the foreground is known in training, so that the terms of :mod:`bkind3d.models.body` can be
            taken.
        follows: Whether the pictures are windows that follow the body. The grid is then moved to it, moment by moment.
    """

    # What is reconstructed: (images (N, 2, M, 3, H, W), LossConfig) -> (N, M, C, H, W).
    target = staticmethod(difference_target)

    def __init__(self, config: ModelConfig, outputs: int, *, foreground: bool = False, follows: bool = False) -> None:
        super().__init__()
        self.config, self.follows = config, follows
        self.encoder = build_encoder(config.encoder, config.encoder_weights, config.norm)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.geometry = GeometryDecoder(
            channels, strides, self.map_channels, config.map_stride, config.pyramid_channels, config.norm
        )
        self.build()
        self.skeleton = Skeleton(
            config.keypoints if config.bottleneck == "edges" else 0,
            config.edge_activation,
            config.edge_start_mean,
            config.edge_start_std,
            config.edge_threshold,
        )
        drawn = 1 if config.bottleneck == "edges" else config.keypoints
        self.reconstruction = ReconstructionDecoder(
            channels, strides, config.edge_strides, config.decoder_channels, 2 * drawn, outputs, config.norm
        )
        self.body = BodyTerms(config, len(self.skeleton.pairs), channels) if foreground else None
        # Channels-last is what `unproject` reads and writes; convolutions are up to twice as fast in it as well.
        channels_last(self)
        use_backend(self, config.backend_of("group_norm_act"))

    def use_checkpointing(self, parts: str) -> None:
        """Let the backward pass compute stages again: of "none", of the "volume" network, or the decoder's too, "all".

        A method without a volume network has nothing there to compute again.
        """
        self.reconstruction.checkpointing = parts == "all"
        for part in self.children():
            if isinstance(part, VolumeNetwork):
                part.checkpointing = parts != "none"

    @property
    @abstractmethod
    def map_channels(self) -> int:
        """Channels C of the 2D maps of each view."""

    def build(self) -> None:
        """Make the networks that are the method's own; most have none."""

    @abstractmethod
    def lift(self, maps: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> Lifted:
        """Find the 3D keypoints from the maps of all views.

        Args:
            maps: Raw maps (N, M, C, h, w).
            projections: (N, M, 3, 4), world to pixels of an image of `size`.
            size: (H, W) of the images.
            grid: Where to look.
        """

    def training_grid(
        self, grid: VoxelGrid, up: Sequence[float], moments: int, generator: torch.Generator
    ) -> VoxelGrid:
        """Where to look in a training step.

        Args:
            grid: Where to look in general.
            up: The world's vertical.
            moments: Number of moments, 2N, frames t and t + gap.
            generator: Of what is random in this step.
        """
        return grid

    def detect(self, images: Tensor, projections: Tensor, grid: VoxelGrid) -> Keypoints:
        """Find the keypoints of each moment.

        Args:
            images: (N, M, 3, H, W) in [0, 1].
            projections: (N or 1, M, 3, 4), world to image pixels.
            grid: Where to look.
        """
        projections, shift = self._around_body(projections.expand(len(images), -1, -1, -1), images, grid)
        found = self._detect(images, projections, grid)
        found.positions = found.positions + shift
        return found

    def _detect(self, images: Tensor, projections: Tensor, grid: VoxelGrid) -> Keypoints:
        """As `detect`, in the world that the grid stands still in."""
        n, m, _, height, width = images.shape
        features = self.encoder(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        maps = self.geometry(features).unflatten(0, (n, m))
        found = self.lift(maps, projections, (height, width), grid)
        return Keypoints(found.positions, found.confidence, found.penalties, found.detected, features)

    def _around_body(self, projections: Tensor, images: Tensor, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
        """The world with the body in the middle of the grid: its projections, and what leads back from it (N, 1, 3).

        Moving the world in place of the grid leaves one grid for all moments.
        """
        if not self.follows:
            return projections, projections.new_zeros(1, 1, 3)
        center, size = box_center(grid).mean(0), (images.shape[-2], images.shape[-1])  # of grids shifted at random
        with torch.autocast(images.device.type, enabled=False):
            shift = body_middle(projections, size, center, grid.side) - center
            return centred(projections, shift), shift[:, None]

    def edge_maps(self, pixels: Tensor, front: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Draw the skeleton for every level of the decoder (paper, Section 3.1.3).

        Args:
            pixels: Keypoints (N, J, 2) in pixels of an image of `size`.
            front: Which keypoints are in front of the camera (N, J); the others' edges have no image.
            size: (H, W).

        Returns:
            Edge maps (N, h, w), coarse to fine.
        """
        sizes = self._sizes(size)
        scaled = rescale_points(pixels, size, sizes[0])
        sigmas = list(self.config.edge_sigmas)
        pairs = self.skeleton.pairs
        weights = self.skeleton.weights * (front[:, pairs[:, 0]] & front[:, pairs[:, 1]])
        return rasterize_edges(scaled, weights, sizes, sigmas, edges=pairs, backend=self.config.backend)

    def point_scale(self, depth: Tensor, projections: Tensor, grid: VoxelGrid) -> Tensor:
        """Factor on the width of each point's Gaussian (N, M, J), for depths (N, M, J)."""
        return torch.ones_like(depth)

    def draw(self, positions: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> list[Tensor]:
        """Draw the bottleneck of every view for every level of the decoder.

        Args:
            positions: (N, J, 3).
            projections: (N, M, 3, 4).
            size: (H, W) of the images.
            grid: Where to look.

        Returns:
            Maps (N·M, C, h, w), coarse to fine: C = 1 for edges, J for points.
        """
        with torch.autocast(positions.device.type, enabled=False):
            pixels, depth = project_points(projections, positions[:, None])
            front = depth > 0
            if self.config.bottleneck == "edges":
                edges = self.edge_maps(pixels.flatten(0, 1), front.flatten(0, 1), size)
                return [level[:, None] for level in edges]
            scale = self.point_scale(depth, projections, grid)
            pixels, scale, front = pixels.flatten(0, 1), scale.flatten(0, 1), front.flatten(0, 1)
            return draw_points(pixels, scale, front, size, self._sizes(size), self.config.edge_sigmas)

    def _sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        return [(size[0] // stride, size[1] // stride) for stride in self.config.edge_strides]

    def forward(self, images: Tensor, projections: Tensor, grid: VoxelGrid, body: Body | None = None) -> Reconstruction:
        """Find the keypoints at both times and reconstruct the target from them and from the looks of frame t.

        Args:
            images: (N, 2, M, 3, H, W) in [0, 1]: frames t and t + gap of every view.
            projections: (N or 1, M, 3, 4), world to image pixels, or (N, 2, M, 3, 4) where they differ between times.
            grid: Where to look.
            body: The foreground, where it is known in training.
        """
        n, _, m, _, height, width = images.shape
        size = (height, width)
        # Times go first so that the features of frame t are the first half of the batch: no copy to pick them.
        if projections.ndim == 4:
            projections = projections[:, None].expand(n, 2, -1, -1, -1)
        images = images.transpose(0, 1).flatten(0, 1)
        projections, shift = self._around_body(projections.transpose(0, 1).flatten(0, 1), images, grid)
        found = self._detect(images, projections, grid)
        drawn = [
            level.unflatten(0, (2, n * m)).transpose(0, 1).flatten(1, 2)
            for level in self.draw(found.positions, projections, size, grid)
        ]
        appearance = [leading(level, n * m) for level in found.features]
        difference = self.reconstruction(appearance, drawn, size)
        on_body = None
        if self.body is not None and body is not None:
            with torch.autocast(images.device.type, enabled=False):
                on_body = self.body(found.positions, found.features, projections, body, self.skeleton, size)
        return Reconstruction(
            positions=(found.positions + shift).unflatten(0, (2, n)).transpose(0, 1),
            confidence=found.confidence.unflatten(0, (2, n)).transpose(0, 1),
            difference=difference.unflatten(0, (n, m)),
            penalties=found.penalties | (on_body.terms if on_body else {}),
            on_body=on_body,
        )


def box_center(grid: VoxelGrid) -> Tensor:
    """Centre of the box that a grid fills, (N or 1, 3), world units."""
    middle = (grid.affine.new_tensor(grid.shape) - 1) / 2
    return grid.index_to_world(middle.view(1, 1, 3))[:, 0]


def box_radius(grid: VoxelGrid) -> Tensor:
    """Distance of the corners of that (rectangular) box from its centre, (N or 1,), world units."""
    sides = grid.affine[..., :3] * (grid.affine.new_tensor(grid.shape) - 1)
    return sides.square().sum((-2, -1)).sqrt() / 2
