"""The appearance encoder Φ (paper, Section 3.1.1): an image to features at several resolutions."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from bkind3d.errors import InputError
from bkind3d.models.layers import ConvNorm2d
from bkind3d.models.weights import read_state_dict


class SmallEncoder(nn.Module):
    """Three levels for CPUs and small images, strides 2, 4 and 8.

    Input (N, 3, H, W) in [0, 1]; output a list, fine to coarse, of (N, C_l, H / s_l, W / s_l).
    """

    strides = (2, 4, 8)
    channels = (16, 32, 64)

    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        levels, previous = [], 3
        for width in self.channels:
            levels.append(nn.Sequential(ConvNorm2d(previous, width, norm, stride=2), ConvNorm2d(width, width, norm)))
            previous = width
        self.levels = nn.ModuleList(levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of every level, fine to coarse."""
        features, x = [], images - 0.5
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class BasicBlock(nn.Module):
    """Residual block of ResNet-18 (He et al. 2016), with torchvision's names of parameters."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, width, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(nn.Module):
    """Residual block of ResNet-50 (stride on the 3 × 3 convolution), with torchvision's names of parameters."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, 4 · width, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class ResNetEncoder(nn.Module):
    """ResNet-18 or -50 with features at strides 2, 4, 8, 16 and 32; its state dict has torchvision's keys.

    Input (N, 3, H, W) in [0, 1], normalised here with ImageNet's mean and deviation; output a list, fine to coarse,
    of (N, C_l, H / s_l, W / s_l) with C = 64, 64, 128, 256, 512 (ResNet-18) or 64, 256, 512, 1024, 2048 (ResNet-50).
    """

    strides = (2, 4, 8, 16, 32)

    def __init__(self, depth: int = 50) -> None:
        super().__init__()
        block: type[BasicBlock] | type[Bottleneck]
        block, counts = (BasicBlock, (2, 2, 2, 2)) if depth == 18 else (Bottleneck, (3, 4, 6, 3))
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self._inputs = 64
        self.layer1 = self._stage(block, 64, counts[0], 1)
        self.layer2 = self._stage(block, 128, counts[1], 2)
        self.layer3 = self._stage(block, 256, counts[2], 2)
        self.layer4 = self._stage(block, 512, counts[3], 2)
        self.channels = (64, *(width * block.expansion for width in (64, 128, 256, 512)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, block: type[BasicBlock] | type[Bottleneck], width: int, count: int, stride: int) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self._inputs != outputs:
            downsample = nn.Sequential(nn.Conv2d(self._inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        blocks = [block(self._inputs, width, stride, downsample)]
        blocks += [block(outputs, width, 1, None) for _ in range(count - 1)]
        self._inputs = outputs
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of every level, fine to coarse."""
        mean = images.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
        std = images.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
        stem = self.relu(self.bn1(self.conv1((images - mean) / std)))
        features, x = [stem], self.maxpool(stem)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


def build_encoder(name: str, weights: str = "none", norm: str = "group") -> SmallEncoder | ResNetEncoder:
    """Build the appearance encoder.

    Args:
        name: "resnet50", "resnet18" or "small".
        weights: "none", or the path of a torchvision ResNet state dict.
        norm: Normalisation of the small encoder, "group" or "batch"; a ResNet has batch normalisation.

    Raises:
        InputError: Weights given for the small encoder, or a file that does not hold this network's weights.
    """
    if name == "small":
        if weights != "none":
            raise InputError(f'model.encoder_weights: the small encoder has no published weights, got "{weights}"')
        return SmallEncoder(norm)
    encoder = ResNetEncoder(18 if name == "resnet18" else 50)
    if weights != "none":
        state = {key: value for key, value in read_state_dict(Path(weights)).items() if not key.startswith("fc.")}
        missing, unexpected = encoder.load_state_dict(state, strict=False)
        if missing or unexpected:
            key = (missing + unexpected)[0]
            raise InputError(f'{weights}: not the weights of torchvision\'s {name} (first key that differs: "{key}")')
    return encoder
