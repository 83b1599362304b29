"""Reconstruction target and losses (paper, Section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from kornia.filters import gaussian_blur2d
from kornia.metrics import ssim
from torch import Tensor, nn

from bkind3d.config import LossConfig
from bkind3d.errors import InputError
from bkind3d.models.skeleton import Skeleton
from bkind3d.models.vgg import VggFeatures

if TYPE_CHECKING:  # a model knows its target, which is made here
    from bkind3d.models.discovery import Reconstruction

# Terms that some methods, and the foreground, add to the objective, each with its weight in `LossConfig`.
PENALTIES = (
    "reprojection", "consistency", "equivariance", "containment", "silhouette", "identity", "rigidity",
)  # fmt: skip
SSIM_SIGMA = 1.5
LUMINANCE_CONSTANT = 0.01**2


@torch.no_grad()
def difference_target(images: Tensor, config: LossConfig) -> Tensor:
    """Local dissimilarity of two frames, the target S of the reconstruction (paper, Section 3.2.1).

    "ssim": 1 − SSIM with a Gaussian window of deviation 1.5 pixels; "contrast-structure": without the luminance term.

    Args:
        images: Frames t and t + gap, (N, 2, M, 3, H, W) in [0, 1].
        config: target, target_channels, ssim_window.

    Returns:
        (N, M, C, H, W) in [0, 2], C = 3 or 1.
    """
    if config.target_channels == "grey":
        images = images.mean(3, keepdim=True)
    n, _, m = images.shape[:3]
    first, second = images.transpose(0, 1).flatten(1, 2).float()
    similarity = ssim(first, second, config.ssim_window)
    if config.target == "contrast-structure":
        window, sigma = (config.ssim_window, config.ssim_window), (SSIM_SIGMA, SSIM_SIGMA)
        a, b = gaussian_blur2d(first, window, sigma), gaussian_blur2d(second, window, sigma)
        similarity = similarity * (a.square() + b.square() + LUMINANCE_CONSTANT) / (2 * a * b + LUMINANCE_CONSTANT)
    return (1 - similarity).unflatten(0, (n, m))


@torch.no_grad()
def frame_target(images: Tensor, config: LossConfig) -> Tensor:
    """The later frame itself, the target of Keypoint3D's image reconstruction (Chen et al. 2021).

    Args:
        images: Frames t and t + gap, (N, 2, M, 3, H, W) in [0, 1].
        config: target_channels.

    Returns:
        (N, M, C, H, W) in [0, 1], C = 3 or 1.
    """
    later = images[:, 1].float()
    return later.mean(2, keepdim=True) if config.target_channels == "grey" else later


class ReconstructionLoss(nn.Module):
    """Perceptual loss: squared error of the maps, and of frozen VGG features of the maps (paper, equation 1).

    Every term is divided by the running mean square of its target, so 1 is what an all-zero reconstruction scores and
    no layer outweighs the others. The terms are averaged over pixels, views and samples, and summed over layers.
    The running scales are in the state dict; the network's frozen weights are not.
    """

    scales: Tensor
    known: Tensor

    def __init__(self, config: LossConfig, mean: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        super().__init__()
        self.mean = mean
        self.pixel_scales = config.pixel_scales
        # Outside the registered modules, so that checkpoints do not carry weights that never change.
        self._network = (
            [] if config.network == "none" else [VggFeatures(config.network, config.network_weights, config.blocks)]
        )
        terms = config.pixel_scales + (config.blocks if self._network else 0)
        if terms == 0:
            raise InputError("loss: nothing to compare; set loss.pixel_scales to 1 or more, or loss.network to a VGG")
        self.register_buffer("scales", torch.ones(terms))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ReconstructionLoss:
        for network in self._network:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _views(self, maps: Tensor) -> list[Tensor]:
        """Everything that is compared: (N, C, H, W) -> the maps at each scale, then each layer's features."""
        views, scaled = [], maps
        for index in range(self.pixel_scales):
            scaled = maps if index == 0 else nn.functional.avg_pool2d(scaled, 2)
            views.append(scaled)
        for network in self._network:
            views += network(maps.expand(-1, 3, -1, -1))
        return views

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Compare (N, M, C, H, W) with (N, M, C, H, W); returns a scalar."""
        with torch.no_grad():
            targets = self._views(target.flatten(0, 1).float())
            if self.training:
                energy = self.mean(torch.stack([view.square().mean() for view in targets])).clamp_min(1e-12)
                self.scales.copy_(torch.where(self.known, 0.99 * self.scales + 0.01 * energy, energy))
                self.known.fill_(True)
        views = self._views(reconstruction.flatten(0, 1).float())
        errors = [(a - b).square().mean() for a, b in zip(views, targets, strict=True)]
        return (torch.stack(errors) / self.scales).sum()


def length_loss(skeleton: Skeleton, positions: Tensor, unit: float) -> Tensor:
    """Deviation of active edges from their average length (paper, equation 2), in `unit`.

    Args:
        skeleton: Edge weights and running averages.
        positions: Keypoints (N, J, 3), world units.
        unit: What lengths are measured in, world units.

    Returns:
        Scalar: summed over active edges that have an average, averaged over samples; 0 where there is none.
    """
    deviation = (skeleton.lengths(positions) / unit - skeleton.average).abs()
    return (deviation * (skeleton.active & skeleton.known)).sum(-1).mean()


def separation_loss(positions: Tensor, unit: float, sigma: float) -> Tensor:
    """Penalty on keypoints that sit together (paper, equation 3): Σ_{i≠j} exp(−‖u_i − u_j‖² / 2σ²).

    Args:
        positions: Keypoints (N, J, 3), world units.
        unit: What lengths are measured in, world units.
        sigma: σ_s in `unit`.

    Returns:
        Scalar, averaged over samples.
    """
    scaled = positions / unit
    squared = (scaled[:, :, None] - scaled[:, None]).square().sum(-1)
    off_diagonal = ~torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
    return (torch.exp(-squared / (2 * sigma**2)) * off_diagonal).sum((1, 2)).mean()


class Objective(nn.Module):
    """The whole training objective (paper, equation 4); its state dict holds the running scales.

    The terms that a method adds (`Reconstruction.penalties`) count from the start, with their weights.

    Args:
        config: Target, networks and weights.
        unit: What lengths are measured in, world units: the size of the body where that is known, else the longest
            side of the volume.
        mean: Averages a tensor over processes, so that running averages are the same in all.
    """

    def __init__(self, config: LossConfig, unit: float, mean: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        super().__init__()
        self.config = config
        self.unit = unit
        self.mean = mean
        self.reconstruction = ReconstructionLoss(config, mean)

    def forward(self, found: Reconstruction, target: Tensor, skeleton: Skeleton, epoch: float) -> dict[str, Tensor]:
        """Return the scalars "loss", "reconstruction", "length", "separation" and those of the method's own terms.

        All but "loss" are unweighted.

        Args:
            found: Output of the model.
            target: `target` of the model for the same images.
            skeleton: Edge weights; its average lengths move when this module is in training mode.
            epoch: Epochs since the start, with fraction.
        """
        positions = found.positions.flatten(0, 1)
        if self.training:
            lengths = skeleton.lengths(positions.detach()) / self.unit
            skeleton.update_averages(self.mean(lengths.mean(0, keepdim=True)), self.config.length_momentum)
            if found.on_body is not None:
                skeleton.observe(self.mean(torch.stack([lengths.mean(0), lengths.square().mean(0)])))
        terms = {
            "reconstruction": self.reconstruction(found.difference, target),
            "length": length_loss(skeleton, positions, self.unit),
            "separation": separation_loss(positions, self.unit, self.config.separation_sigma),
        }
        loss = terms["reconstruction"]
        for name, penalty in found.penalties.items():
            loss = loss + getattr(self.config, name) * penalty
        if epoch >= self.config.regularise_after:
            loss = loss + self.config.length * terms["length"] + self.config.separation * terms["separation"]
        return {"loss": loss, **terms, **found.penalties}
