"""The settings of the networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bkind3d_kernels.backends import operations_of


@dataclass
class ModelConfig:
    """The networks (paper, Section 3.1).

    Args:
        keypoints: Number J of keypoints to discover.
        encoder: Appearance encoder Φ: "resnet50" (paper), "resnet18", or "small" (three levels, for CPUs).
        encoder_weights: "none", or the path of a torchvision ResNet state dict (.pth or .safetensors).
        pyramid_channels: Channels inside the geometry decoder Ψ (paper: 256).
        channels: Channels C of the 2D maps that the volumetric method lifts into the volume.
        map_stride: Image pixels per pixel of the 2D maps of every method (paper: 256 / 64 = 4).
        voxels: Voxels B along the longest side of the volume.
        cascade: Side of a second, fine volume around the body that was found in the first, for the volumetric method,
            in parts of the volume's longest side: about 1.5 sizes of the body. It has a volume network of its own. 0 is
            one volume alone (paper). Where `data.window` follows the body, `data.box` has made the volume fine already.
        cascade_voxels: Voxels along each side of that second volume.
        cascade_margin: How far it is shifted at random in training, in parts of its side.
        volume_channels: Channels of the volume network ρ: its stem, then each level from fine to coarse.
        volume_stem: Side of the volume network's first kernel, odd (paper: 7).
        volume_blocks: Residual blocks at full resolution before the hourglass of the volume network (paper: 3).
        norm: Normalisation in all networks but a ResNet: "group", or "batch" as published.
        aggregation: How views are combined in a voxel (paper: "softmax").
        unseen: Whether a view that does not see a voxel takes part with the value 0 ("zero", paper) or not at all.
        logit_gain: Factor before the softmax over the volume. At 1 the logits start flat, every keypoint starts in the
            centre of the volume, and nothing is learned.
        turn_volume: Whether the volume is turned about the vertical by a random angle in training (as Iskakov et al.
            2019 do), and shifted by up to 8 % of its sides, anew for each moment, so that `loss.equivariance` can ask
            for keypoints that do not depend on it. Otherwise a keypoint may become "the point farthest to the east",
            which draws the animal's outline but belongs to no part of it (docs/paper.md). The second look costs a half
            more in the volume network.
        heatmap_gain: Factor before the softmax over the pixels of a heatmap, for the methods that find keypoints in
            single views (published Keypoint3D: 5), for the same reason. At 15 they start sharp, and views that
            disagree then stay apart: triangulation learned less.
        bottleneck: "edges" draws the weighted edges of all pairs of keypoints into one map, "points" each keypoint as
            a Gaussian in its own map, without edges or their length loss (paper, Table 4).
        edge_activation: "softplus" draws every edge and lets it die; "relu" is the paper's reading, w > 0 or nothing.
        edge_start_mean: Mean of the edges' parameters at the start, before the activation.
        edge_start_std: Standard deviation of the edges' parameters at the start.
        edge_threshold: An edge with a weight above this is active: it counts in the length loss and is drawn at
            inference. Where the foreground is known, the edges of the skeleton's tree are the active ones instead.
        edge_strides: Image pixels per pixel of the maps of edges or points, one for each level of the reconstruction
            decoder, from coarse to fine.
        edge_sigmas: Width σ of an edge, or of a point, in pixels of its own map, one for each stride.
        decoder_channels: Channels of the reconstruction decoder ψ, one for each stride.
        capsule_radius: Radius of the skeleton's edges at the start, in sizes of the body, where they are drawn against
            the silhouette; each edge learns its own.
        silhouette_strides: Image pixels per pixel of the silhouettes that are compared.
        silhouette_sigma: Softness of their border, in pixels of each.
        descriptor_channels: Length of the descriptor by which a keypoint is found again.
        backend: Backend of the operations: "auto" or one of those that `bkind3d_kernels.info` lists. An operation that
            has no kernels there, as the volume network's soft-argmax with "cuda", takes "auto".
    """

    keypoints: int = 15
    encoder: Literal["resnet50", "resnet18", "small"] = "resnet50"
    encoder_weights: str = "none"
    pyramid_channels: int = 256
    channels: int = 32
    map_stride: int = 4
    voxels: int = 64
    cascade: float = 0.0
    cascade_voxels: int = 32
    cascade_margin: float = 0.1
    volume_channels: tuple[int, ...] = (16, 32, 64, 128, 128, 128, 128)
    volume_stem: int = 7
    volume_blocks: int = 3
    norm: Literal["group", "batch"] = "group"
    aggregation: Literal["softmax", "mean", "sum", "max"] = "softmax"
    unseen: Literal["zero", "exclude"] = "zero"
    logit_gain: float = 15.0
    turn_volume: bool = False
    heatmap_gain: float = 5.0
    bottleneck: Literal["edges", "points"] = "edges"
    edge_activation: Literal["softplus", "relu"] = "softplus"
    edge_start_mean: float = 0.8
    edge_start_std: float = 1.2
    edge_threshold: float = 0.3
    edge_strides: tuple[int, ...] = (32, 16, 8, 4, 2)
    edge_sigmas: tuple[float, ...] = (1.8, 3.6, 2.3, 4.5, 2.9)
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)
    capsule_radius: float = 0.05
    silhouette_strides: tuple[int, ...] = (8, 4, 2)
    silhouette_sigma: float = 1.2
    descriptor_channels: int = 16
    backend: str = "auto"

    def backend_of(self, op: str) -> str:
        """The backend to ask for: "auto" for an operation that has no kernels in the one that was named."""
        return self.backend if self.backend == "auto" or op in operations_of(self.backend) else "auto"
