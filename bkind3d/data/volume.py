"""The working volume: a box in the world, what the cameras see of it, and a proposal from their common view."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bkind3d.cameras import Cameras
from bkind3d.errors import InputError, shown
from bkind3d_kernels import VoxelGrid

Triple = tuple[float, float, float]

_PARALLEL = 1e-3  # smallest eigenvalue below which the optical axes leave their meeting point open
_COMMON_SHARE = 0.9  # of the proposed box is seen by every camera: its corners may stick out
_SLENDERNESS = (0.5, 0.75, 1.0, 1.5)  # height of a proposed box over its base
_LEAST_SHARE = 0.05  # of the volume must be seen by two cameras, or nothing can be triangulated
_SAMPLES = 16  # along the longest side, for proposals and checks


@dataclass(frozen=True)
class Volume:
    """An axis-aligned box in the world, in the project's units.

    Args:
        center: x, y, z of its centre.
        size: its three sides, each > 0.

    Raises:
        InputError: not three finite numbers each, or a side that is not positive.
    """

    center: Triple
    size: Triple

    def __post_init__(self) -> None:
        for field in ("center", "size"):
            value = getattr(self, field)
            try:
                triple = tuple(float(number) for number in value if not isinstance(number, bool))
            except (TypeError, ValueError, OverflowError):
                triple = ()
            if isinstance(value, str) or len(triple) != 3 or not all(map(math.isfinite, triple)):
                raise InputError(f"volume: {field} must be three finite numbers x, y, z, not {shown(value)}")
            object.__setattr__(self, field, triple)
        if min(self.size) <= 0:
            raise InputError(f"volume: every side of size {list(self.size)} must be greater than 0")

    def shape(self, voxels: int) -> tuple[int, int, int]:
        """Samples per axis for ``voxels`` along the longest side: as even as whole numbers allow, at least 2."""
        if voxels < 2:
            raise InputError(f"voxels: {voxels} along the longest side is too few; at least 2 are needed")
        spacing = max(self.size) / (voxels - 1)
        x, y, z = (max(2, round(side / spacing) + 1) for side in self.size)
        return x, y, z

    def grid(self, voxels: int) -> VoxelGrid:
        """The voxel grid of ``voxels`` samples along the longest side; samples span the box exactly."""
        return VoxelGrid.box(self.center, self.size, self.shape(voxels))

    def points(self, voxels: int) -> Tensor:
        """World positions of the grid's samples, (X, Y, Z, 3) float64."""
        axes = [
            torch.linspace(center - side / 2, center + side / 2, count, dtype=torch.float64)
            for center, side, count in zip(self.center, self.size, self.shape(voxels))
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)

    def corners(self) -> Tensor:
        """The eight corners, (8, 3) float64; corner i has bit k of i set where it lies on the upper side of axis k."""
        signs = torch.tensor([[(i >> axis & 1) - 0.5 for axis in range(3)] for i in range(8)], dtype=torch.float64)
        return torch.tensor(self.center) + signs * torch.tensor(self.size)


BOX_EDGES = tuple((i, i | 1 << axis) for i in range(8) for axis in range(3) if not i >> axis & 1)


def visible_views(cameras: Cameras, volume: Volume, voxels: int = _SAMPLES) -> Tensor:
    """Number of cameras whose image shows each voxel of the volume, (X, Y, Z) int64."""
    return cameras.in_view(volume.points(voxels)).sum(0)


def require_visible(cameras: Cameras, volume: Volume) -> None:
    """Refuse a volume in which nothing could be triangulated.

    Raises:
        InputError: the volume is behind all cameras, or hardly any of it is seen by two of them.
    """
    points = volume.points(_SAMPLES)
    _, depth = cameras.project(points)
    box = f"volume (center {list(volume.center)}, size {list(volume.size)} {cameras.units})"
    mend = "check its center, the units and the calibration's world origin, or leave 'volume' out to have it proposed"
    if (depth <= 0).all():
        raise InputError(f"{box} lies behind all {len(cameras)} cameras; {mend}")
    share = (cameras.in_view(points).sum(0) >= 2).double().mean().item()
    if share < _LEAST_SHARE:
        raise InputError(f"{box}: {share:.1%} of its voxels are seen by two or more cameras; {mend}")


def propose_volume(cameras: Cameras, up: Triple = (0.0, 0.0, 1.0)) -> Volume:
    """The largest box around the point nearest to all optical axes of which every camera sees 90 %.

    Its base is square, its height (along the world axis nearest to ``up``) 0.5 to 1.5 times the base. Where the axes'
    meeting point itself is not seen by every camera, two seeing cameras count instead of all.

    Args:
        cameras: at least two, their optical axes not parallel.
        up: the world's vertical.

    Raises:
        InputError: the optical axes do not meet in front of two cameras, so that a box has to be given.
    """
    center = meeting_point(cameras)
    needed = len(cameras) if cameras.in_view(center).all() else 2
    reach = (cameras.centers - center).norm(dim=-1).max().item()
    unit = torch.linspace(-0.5, 0.5, _SAMPLES, dtype=torch.float64)
    cube = torch.stack(torch.meshgrid(unit, unit, unit, indexing="ij"), dim=-1)

    def is_seen(size: Tensor) -> bool:
        seen = cameras.in_view(center + size * cube).sum(0) >= needed
        return seen.double().mean().item() >= _COMMON_SHARE

    sizes = []
    for slenderness in _SLENDERNESS:
        proportions = torch.ones(3, dtype=torch.float64)
        proportions[int(torch.tensor(up).abs().argmax())] = slenderness
        sizes.append(_largest(proportions, is_seen, 2 * reach))
    size = max(sizes, key=lambda size: size.prod().item())
    if size.min() <= 1e-3 * reach:
        raise InputError("volume: the cameras have no common view to propose a box from; give center and size")
    digits = 2 - math.floor(math.log10(size.max().item()))  # a hundredth of the box or finer
    return Volume(_rounded(center, digits), _rounded(size, digits))


def meeting_point(cameras: Cameras) -> Tensor:
    """The point (3,) with the least sum of squared distances to the optical axes."""
    mend = "give the volume's center and size in the project file"
    across = torch.eye(3, dtype=torch.float64) - cameras.axes[:, :, None] * cameras.axes[:, None, :]  # (M, 3, 3)
    normal = across.sum(0)
    if torch.linalg.eigvalsh(normal)[0] < _PARALLEL:
        raise InputError(f"volume: the cameras look in parallel, so their common view cannot be proposed; {mend}")
    point = torch.linalg.solve(normal, (across @ cameras.centers[..., None]).sum(0)[:, 0])
    if cameras.in_view(point).sum() < 2:
        raise InputError(f"volume: fewer than two cameras see the point where the optical axes meet; {mend}")
    return point


def _largest(proportions: Tensor, accepts: Callable[[Tensor], bool], limit: float, steps: int = 12) -> Tensor:
    """The largest accepted multiple of the proportions (3,), its factor below the limit, by bisection."""
    low, high = 0.0, limit
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if accepts(middle * proportions) else (low, middle)
    return low * proportions


def _rounded(values: Tensor, digits: int) -> Triple:
    x, y, z = (round(value, digits) + 0.0 for value in values.tolist())  # + 0.0 turns -0.0 into 0.0
    return x, y, z
