"""The volume network ρ (V2V-PoseNet, Moon et al. 2018): aggregated features to what tells the keypoints apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from bkind3d.models.layers import PointwiseConv3d, norm_act3d, recomputed


class ConvNorm3d(nn.Sequential):
    """Convolution, normalisation, ReLU on a volume; the size stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: str) -> None:
        super().__init__(_convolution(inputs, outputs, kernel), norm_act3d(norm, outputs))


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Module:
    if kernel == 1:
        return PointwiseConv3d(inputs, outputs)
    return nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2)


class Residual3d(nn.Module):
    """Two 3³ convolutions beside a skip connection (1³ convolution where the number of channels changes)."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            ConvNorm3d(inputs, outputs, 3, norm), nn.Conv3d(outputs, outputs, 3, padding=1), norm_act3d(norm, outputs)
        )
        self.skip = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(PointwiseConv3d(inputs, outputs), norm_act3d(norm, outputs, "none"))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, X, Y, Z) -> (N, C_out, X, Y, Z)."""
        first, second, norm = self.branch
        branch = second(first(x))
        return norm(branch, self.skip(x).to(branch.dtype))  # under autocast x may not have it yet


class Upsample3d(nn.Module):
    """Transposed 2³ convolution with stride 2, cut to the size of the level above, normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(inputs, outputs, 2, stride=2)
        self.norm = norm_act3d(norm, outputs)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """(N, C_in, X', Y', Z') with X' = ⌈X / 2⌉ -> (N, C_out, X, Y, Z), the size of `like`."""
        nx, ny, nz = like.shape[-3:]
        return self.norm(self.conv(x)[..., :nx, :ny, :nz])


class VolumeNetwork(nn.Module):
    """V2V: a 7³ stem, residual blocks, a 3D hourglass with skip connections, and a 1³ head; a volume of any shape.

    The head is a linear map of a voxel's features to one logit per keypoint. It is applied inside the soft-argmax
    (:func:`bkind3d_kernels.linear_soft_argmax3d`), which never stores the logits: `forward` ends before it.

    Pooling rounds up and upsampling is cut to size, so no side need be a power of two. The paper's network is
    ``channels = (16, 32, 64, 128, 128, 128, 128)``: the stem, then six levels (148 GMAC for one 64³ volume).

    Args:
        inputs: Channels C of the aggregated volume.
        outputs: Number J of keypoints.
        channels: Channels of the stem, then of each level of the hourglass, fine to coarse.
        stem_kernel: Side of the stem's kernel, odd (V2V: 7).
        blocks: Residual blocks between the stem and the hourglass (V2V: 3).
        norm: "group" or "batch".

    Attributes:
        checkpointing: Whether the backward pass computes each stage again, of which only the inputs are kept.
    """

    checkpointing = False

    def __init__(
        self, inputs: int, outputs: int, channels: Sequence[int], stem_kernel: int, blocks: int, norm: str
    ) -> None:
        super().__init__()
        stem, levels = channels[0], list(channels[1:])
        fine = levels[0]
        self.front = nn.Sequential(
            ConvNorm3d(inputs, stem, stem_kernel, norm),
            *(Residual3d(stem if index == 0 else fine, fine, norm) for index in range(blocks)),
        )
        self.pool = nn.MaxPool3d(2, ceil_mode=True)
        pairs = list(pairwise(levels))
        self.skips = nn.ModuleList(Residual3d(above, above, norm) for above, _ in pairs)
        self.down = nn.ModuleList(Residual3d(above, below, norm) for above, below in pairs)
        self.middle = Residual3d(levels[-1], levels[-1], norm)
        self.up_blocks = nn.ModuleList(Residual3d(below, below, norm) for _, below in pairs)
        self.up = nn.ModuleList(Upsample3d(below, above, norm) for above, below in pairs)
        self.back = nn.Sequential(
            Residual3d(fine, fine, norm), ConvNorm3d(fine, fine, 1, norm), ConvNorm3d(fine, fine, 1, norm)
        )
        self.head = nn.Conv3d(fine, outputs, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Aggregated volume (N, C, X, Y, Z) -> features (N, channels[1], X, Y, Z), the inputs of the head."""
        run = partial(recomputed, enabled=self.checkpointing)
        x = volume
        for stage in self.front:
            x = run(stage, x)
        kept = []
        for skip, down in zip(self.skips, self.down, strict=True):
            kept.append(run(skip, x))
            # The indices of the largest voxels have 64 bits: less is kept if they are found again.
            x = run(down, recomputed(self.pool, x))
        x = run(self.middle, x)
        for block, up, above in zip(reversed(self.up_blocks), reversed(self.up), reversed(kept), strict=True):
            x = above + run(up, run(block, x), above)
        for stage in self.back:
            x = run(stage, x)
        return x
