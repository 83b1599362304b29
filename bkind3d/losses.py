"""The losses and the training objective (paper, Section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bkind3d.config import LossConfig
from bkind3d.errors import InputError
from bkind3d.models.discovery import Reconstruction
from bkind3d.models.skeleton import Skeleton
from bkind3d.models.vgg import VggFeatures


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
                finite = energy.isfinite().all()  # a step that is not leaves no trace
                moved = torch.where(self.known, 0.99 * self.scales + 0.01 * energy, energy)
                self.scales.copy_(torch.where(finite, moved, self.scales))
                self.known.logical_or_(finite)
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
