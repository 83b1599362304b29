r"""What the foreground asks of keypoints: to lie on the body, to fill it, and to be the same part in every picture.

A keypoint that follows the outline of the body draws the difference of two frames as well as one that is a part of it.
With static cameras the body can be told from the room (:mod:`bkind3d.data.foreground`), and then more can be asked:

- *containment*: a projected keypoint lies on the foreground;
- *silhouette*: the skeleton, drawn with a radius for each edge, fills the foreground and nothing else;
- *identity*: a keypoint is found again among all keypoints by its looks, in any other picture;
- *rigidity*: the edges of the skeleton keep their lengths.

All lengths are in sizes of the body, so that one weight serves every animal and every distance of the cameras.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bkind3d.models.config import ModelConfig
from bkind3d.models.skeleton import Skeleton
from bkind3d_kernels import rasterize_edges
from bkind3d_kernels.geometry import project_points, rescale_points

BODY_TERMS = ("containment", "silhouette", "identity", "rigidity")  # as `LossConfig` names their weights
TEMPERATURE = 0.1  # of the softmax over the similarities of descriptors
LEVELS = 2  # of the encoder, the finest, that a descriptor is read from
MOST_LOG_WEIGHT = 40.0  # of a capsule: beyond it float32 overflows, and the inside is 1 anyway
ON_BODY = 1.0  # image pixels from the foreground at most
NEAR = 1e-6  # world units: no division by a smaller depth


@dataclass
class Body:
    """The foreground of a batch.

    Attributes:
        distances: Distance of each pixel to the foreground, (N, 2, M, H, W), image pixels.
        size: Size of the body, world units.
    """

    distances: Tensor
    size: float


@dataclass
class OnBody:
    """What the foreground says of keypoints.

    Attributes:
        terms: Of the objective, unweighted scalars by their names in `LossConfig`.
        share: Share of the views in which a keypoint lies on the foreground, (2N, J).
        identity: Share of the pictures in which each keypoint is found again by its looks, (J,).
    """

    terms: dict[str, Tensor]
    share: Tensor
    identity: Tensor


class BodyTerms(nn.Module):
    """The terms of the objective that need the foreground, with what they learn: radii and descriptors.

    Args:
        config: The networks' settings.
        edges: Number of edges of the skeleton; with 0, of keypoints drawn as points, silhouette and rigidity are not
            taken.
        channels: Channels of the encoder's levels, fine to coarse.
    """

    def __init__(self, config: ModelConfig, edges: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.capsules = Capsules(edges, config.capsule_radius)
        self.descriptors = Descriptors(channels[:LEVELS], config.descriptor_channels)

    def forward(
        self,
        positions: Tensor,
        features: Sequence[Tensor],
        projections: Tensor,
        body: Body,
        skeleton: Skeleton,
        size: tuple[int, int],
    ) -> OnBody:
        """Look at keypoints in the pictures that they were found in.

        Args:
            positions: Keypoints (2N, J, 3), world units, those of frames t first.
            features: Of the encoder, fine to coarse, (2N·M, C_l, h_l, w_l).
            projections: (2N, M, 3, 4), world to pixels of an image of `size`.
            body: The foreground.
            skeleton: Its tree is drawn.
            size: (H, W).
        """
        config = self.config
        pixels, depth = project_points(projections, positions[:, None])
        scale = body.size * pixels_per_unit(projections, pixels.detach(), depth.detach()).mean(2).flatten()
        pixels = pixels.flatten(0, 1)
        distances = body.distances.transpose(0, 1).flatten(0, 2)
        strides, sigma = config.silhouette_strides, config.silhouette_sigma
        identity, recognised = identity_loss(self.describe(features, pixels, size))
        away = distance_of(pixels, distances, size)
        terms = {"containment": (away / scale[:, None]).mean(), "identity": identity}
        if len(skeleton.pairs):
            bones, known = skeleton.bones, skeleton.tree.any()
            drawn = self.capsules(pixels, bones, known, skeleton.pairs, scale, size, strides, sigma, config.backend)
            terms["silhouette"] = silhouette_loss(drawn, soft_silhouettes(distances, size, strides, sigma))
            terms["rigidity"] = rigidity_loss(skeleton.lengths(positions)[:, bones]) * known
        share = (away.detach() < ON_BODY).float().unflatten(0, projections.shape[:2]).mean(1)
        return OnBody(terms, share, recognised)

    def describe(self, features: Sequence[Tensor], pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Descriptors (B, J, D) at pixels (B, J, 2), from the encoder's features of those pictures, fine to coarse."""
        return self.descriptors([level.float() for level in features[:LEVELS]], pixels, size)


def pixels_per_unit(projections: Tensor, pixels: Tensor, depth: Tensor) -> Tensor:
    r"""Image pixels that a world unit across the line of sight spans.

    With the rows p of the projection, :math:`\sqrt{|p_1 - u \, p_3| \, |p_2 - v \, p_3|} / z`.

    Args:
        projections: (N, M, 3, 4).
        pixels: (u, v), (N, M, J, 2).
        depth: z (N, M, J).

    Returns:
        (N, M, J).
    """
    rows = projections[:, :, None, :2, :3] - pixels[..., None] * projections[:, :, None, 2:, :3]
    return rows.norm(dim=-1).prod(-1).sqrt() / depth.clamp_min(NEAR)


def sample(maps: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear samples of maps (B, C, h, w) at pixels (B, J, 2) of an image of `size` -> (B, J, C); borders repeat."""
    height, width = size
    # At a place that is not a number, torch writes outside its memory in the backward pass.
    grid = (pixels.nan_to_num() + 0.5) / pixels.new_tensor((width, height)) * 2 - 1
    found = nn.functional.grid_sample(maps, grid[:, None].to(maps.dtype), padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2)


def distance_of(pixels: Tensor, distances: Tensor, size: tuple[int, int]) -> Tensor:
    """Distance of points to the foreground, (B, J), image pixels.

    Args:
        pixels: (B, J, 2) in an image of `size`; for one outside the image its distance to that is added.
        distances: Of each pixel, (B, H, W).
        size: (H, W).
    """
    height, width = size
    outside = (pixels - pixels.clamp(pixels.new_zeros(2), pixels.new_tensor((width - 1, height - 1)))).norm(dim=-1)
    return sample(distances[:, None], pixels, size)[..., 0] + outside


class Capsules(nn.Module):
    r"""A radius for each edge, so that a drawn skeleton can fill the silhouette of a body.

    The union of capsules with soft borders is a maximum over edges, which `rasterize_edges` draws:

    .. math:: s(p) = \min\left(1, \max_e \exp\left((r_e^2 - d_e(p)^2) / \sigma^2\right)\right)

    Args:
        edges: Number of edges.
        start: Radius at the start, in sizes of the body.
    """

    def __init__(self, edges: int, start: float) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.full((edges,), math.log(start)), requires_grad=edges > 0)

    @property
    def radii(self) -> Tensor:
        """(E,), in sizes of the body."""
        return self.parameter.exp()

    def forward(
        self,
        pixels: Tensor,
        bones: Tensor,
        known: Tensor,
        pairs: Tensor,
        scale: Tensor,
        size: tuple[int, int],
        strides: Sequence[int],
        sigma: float,
        backend: str,
    ) -> list[Tensor]:
        """Silhouettes (B, h, w) in [0, 1], one for each stride.

        Args:
            pixels: Keypoints (B, J, 2) in an image of `size`.
            bones: Places of the edges that are drawn, (K,).
            known: Whether they are drawn at all, bool scalar; without, silhouettes are empty.
            pairs: (E, 2).
            scale: Size of the body in pixels of each image, (B,).
            size: (H, W).
            strides: Image pixels per pixel of each map.
            sigma: Softness σ of the border, in pixels of each map.
            backend: Of the operation.
        """
        maps = []
        for stride in strides:
            shape = (size[0] // stride, size[1] // stride)
            radius = self.radii[bones] * scale[:, None] / stride
            weights = (radius / sigma).square().clamp_max(MOST_LOG_WEIGHT).exp() * known
            scaled = rescale_points(pixels, size, shape)
            level = rasterize_edges(scaled, weights, shape, sigma, edges=pairs[bones], backend=backend)
            maps.append(level.clamp_max(1.0))
        return maps


def soft_silhouettes(distances: Tensor, size: tuple[int, int], strides: Sequence[int], sigma: float) -> list[Tensor]:
    r"""The foreground with a soft border, :math:`\exp(-D^2 / \sigma^2)`, one map (B, h, w) for each stride.

    Args:
        distances: D (B, H, W) to the foreground, image pixels.
        size: (H, W).
        strides: Image pixels per pixel of each map.
        sigma: In pixels of each map.
    """
    maps = []
    for stride in strides:
        shape = (size[0] // stride, size[1] // stride)
        coarse = nn.functional.interpolate(distances[:, None], shape, mode="bilinear", align_corners=False)[:, 0]
        maps.append((coarse / (stride * sigma)).square().neg().exp())
    return maps


def silhouette_loss(drawn: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    r"""1 - Dice, :math:`1 - 2 \sum s t / \sum (s^2 + t^2)`, of drawn and seen silhouettes; 0 for two empty ones.

    Args:
        drawn: s (B, h, w), for each resolution.
        targets: t likewise.

    Returns:
        Scalar, the mean over pictures and resolutions.
    """
    losses = []
    for level, target in zip(drawn, targets, strict=True):
        both = (level * target).sum((1, 2))
        each = level.square().sum((1, 2)) + target.square().sum((1, 2))
        losses.append(1 - ((2 * both + 1e-3) / (each + 1e-3)).mean())
    return torch.stack(losses).mean()


class Descriptors(nn.Module):
    """What a keypoint looks like: features of a picture at its place, as a vector of length 1.

    Args:
        channels: Channels of the features' levels.
        width: Length D of a descriptor.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.head = nn.Linear(sum(channels), width)

    def forward(self, features: Sequence[Tensor], pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (B, C_l, h_l, w_l) of several levels, pixels (B, J, 2) in an image of `size` -> (B, J, D)."""
        found = torch.cat([sample(level, pixels, size) for level in features], dim=-1)
        return nn.functional.normalize(self.head(found), dim=-1)


def identity_loss(descriptors: Tensor) -> tuple[Tensor, Tensor]:
    """How well each keypoint is told from the others by its looks in another picture.

    Args:
        descriptors: (B, J, D), of length 1.

    Returns:
        Cross-entropy of finding keypoint j of one picture among all keypoints of another, from the softmax over their
        similarities, the mean over all ordered pairs of pictures; and the share of them in which each is found, (J,).
    """
    pictures, keypoints, _ = descriptors.shape
    similarity = torch.einsum("ajd,bkd->abjk", descriptors, descriptors) / TEMPERATURE
    # (B (B - 1), J, J): without the diagonal, by its place, since a mask would have to be read by the host.
    others = similarity.flatten(0, 1)[1:].unflatten(0, (pictures - 1, pictures + 1))[:, :-1].flatten(0, 1)
    target = torch.arange(keypoints, device=similarity.device).expand(len(others), keypoints)
    loss = nn.functional.cross_entropy(others.flatten(0, 1), target.flatten())
    return loss, (others.detach().argmax(-1) == target).float().mean(0)


def rigidity_loss(lengths: Tensor) -> Tensor:
    r"""Mean of :math:`\mathrm{Var}(l) / \bar l^2` over the edges, for lengths (B, E) of B moments; 0 without edges."""
    if lengths.shape[1] == 0:
        return lengths.sum()
    mean = lengths.detach().mean(0).square()
    return (lengths.var(0, correction=0) / torch.maximum(mean, 1e-4 * mean.mean() + 1e-12)).mean()
