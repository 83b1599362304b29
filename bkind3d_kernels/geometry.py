"""The voxel grid as an affine map, pinhole projection, and the pixel-centre rule.

Conventions (docs/conventions.md): column vectors, ``x_cam = R X + t``, OpenCV axes (x right, y down, z forward);
pixel centres at integers, so an image of width W spans [-0.5, W - 0.5]; geometry is float32 or float64, never less.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

GEOMETRY_DTYPES = (torch.float32, torch.float64)
INTEGERS: tuple[Any, ...] = (int, Integral)  # NumPy's are the second
MIN_DEPTH = 1e-6  # world units: no division by a smaller depth, so that values and gradients stay finite


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` may be read to check them: only on the CPU, and where there is one value each.

    Reading a CUDA tensor would wait for the device at each call. A traced or fake tensor has no values, and one inside
    a transform of ``torch.func`` stands for many.
    """
    if torch.compiler.is_compiling():
        return False
    unread = isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not unread


def check_geometry(name: str, tensor: Any, expected: str) -> None:
    """Raise unless ``tensor`` is a float32 or float64 tensor of finite values (read on the CPU only)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(tensor).__name__}")
    if tensor.dtype not in GEOMETRY_DTYPES:
        raise ValueError(f"{name} {tuple(tensor.shape)}: expected float32 or float64, got {tensor.dtype}")
    if checks_values(tensor) and not bool(torch.isfinite(tensor.detach()).all()):
        raise ValueError(f"{name} {tuple(tensor.shape)}: expected finite values, found NaN or infinity")


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for an inner dimension of 3 or 4, as products and a sum.

    No reduced precision applies to these: neither TF32 nor autocast, which in a backward pass run under it would cast
    the gradient's matrix products even if the forward's were protected.
    """
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _checked_shape(name: str, shape: Any) -> tuple[int, int, int]:
    shape = tuple(shape)
    if len(shape) != 3 or any(isinstance(s, bool) or not isinstance(s, INTEGERS) or s < 1 for s in shape):
        raise ValueError(f"{name} {shape!r}: expected three integers (X, Y, Z) of at least 1")
    return as_int(shape[0]), as_int(shape[1]), as_int(shape[2])


def as_int(value: Any) -> int:
    """NumPy's integers as Python's; a traced one stays what it is."""
    return value if isinstance(value, int) else int(value)


@dataclass(frozen=True, eq=False)
class VoxelGrid:
    """A grid of voxels placed in the world by an affine map; no coordinate volume is ever stored.

    .. math:: x_{world} = A \\, (i, j, k, 1)^T, \\quad 0 \\le i < X, \\; 0 \\le j < Y, \\; 0 \\le k < Z

    Args:
        affine: A, (N, 3, 4) or (1, 3, 4) for one grid shared by all samples, float32 or float64, world units per voxel
            in its columns 0 to 2 and the centre of voxel (0, 0, 0) in column 3. May require a gradient.
        shape: (X, Y, Z), each at least 1.

    Raises:
        ValueError: ``affine`` has another shape or dtype, is not finite or is singular (values are checked on the CPU
            only and not while tracing); ``shape`` is not three integers of at least 1.

    Example:
        >>> from bkind3d_kernels import VoxelGrid
        >>> grid = VoxelGrid.cube(center=(0.0, 0.0, 1.0), side=2.0, size=3)
        >>> grid.coordinates()[0, 0, 0, 0].tolist(), grid.coordinates()[0, 2, 2, 2].tolist()
        ([-1.0, -1.0, 0.0], [1.0, 1.0, 2.0])
    """

    affine: Tensor
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        check_geometry("grid.affine", self.affine, "(N or 1, 3, 4)")
        if self.affine.ndim != 3 or self.affine.shape[1:] != (3, 4):
            raise ValueError(f"grid.affine {tuple(self.affine.shape)}: expected (N or 1, 3, 4)")
        object.__setattr__(self, "shape", _checked_shape("grid.shape", self.shape))
        if checks_values(self.affine) and bool((torch.linalg.det(self.affine.detach()[..., :3].double()) == 0).any()):
            raise ValueError(
                f"grid.affine {tuple(self.affine.shape)}: expected an invertible 3 x 3 part, it is singular"
            )

    @classmethod
    def cube(cls, center: Any, side: float, size: int) -> VoxelGrid:
        """Cube of ``size`` samples an axis from -side/2 to +side/2 inclusive around ``center`` (3,) or (N, 3)."""
        return cls.box(center, (side, side, side), (size, size, size))

    @classmethod
    def box(cls, center: Any, sides: Any, shape: tuple[int, int, int], rotation: Any = None) -> VoxelGrid:
        """Box whose samples span -side/2 to +side/2 inclusive along each axis.

        Args:
            center: (3,) or (N, 3), world units. A tensor keeps its dtype and device; anything else becomes float32.
            sides: three lengths > 0, world units. An axis with one sample has it at the centre; its side then gives
                the voxel's extent.
            shape: (X, Y, Z).
            rotation: (3, 3) or (N, 3, 3), box axes in its columns (grid to world); identity by default.

        Returns:
            A grid with affine (1, 3, 4) or (N, 3, 4).
        """
        center = center if isinstance(center, Tensor) else torch.as_tensor(center, dtype=torch.float32)
        check_geometry("center", center, "(3,) or (N, 3)")
        if center.ndim not in (1, 2) or center.shape[-1] != 3:
            raise ValueError(f"center {tuple(center.shape)}: expected (3,) or (N, 3)")
        center = center.reshape(-1, 3)
        sides = torch.as_tensor(sides, dtype=center.dtype, device=center.device)
        if sides.shape != (3,) or (checks_values(sides) and not bool(((sides > 0) & sides.isfinite()).all())):
            raise ValueError(f"sides {tuple(sides.shape)}: expected three finite lengths above 0")
        if rotation is None:
            rotation = torch.eye(3, dtype=center.dtype, device=center.device)
        rotation = torch.as_tensor(rotation, dtype=center.dtype, device=center.device)
        n = center.shape[0]
        if rotation.ndim not in (2, 3) or rotation.shape[-2:] != (3, 3) or len({1, n, *rotation.shape[:-2]}) > 2:
            raise ValueError(f"rotation {tuple(rotation.shape)}: expected (3, 3) or (N, 3, 3), for {n} centers")
        shape = _checked_shape("shape", shape)
        samples = torch.tensor(shape, dtype=center.dtype, device=center.device)
        step = sides / (samples - 1).clamp(min=1)
        linear = rotation * step  # (3, 3) or (N, 3, 3): column c is axis c times its step
        origin = center - (linear * ((samples - 1) / 2)).sum(-1)  # (N, 3)
        linear = linear.expand(origin.shape[0], 3, 3)
        return cls(torch.cat([linear, origin.unsqueeze(-1)], dim=-1), shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VoxelGrid:
        """The same grid on another device or in another geometry dtype (float32, float64)."""
        return VoxelGrid(self.affine.to(device=device, dtype=dtype), self.shape)

    @property
    def side(self) -> Tensor:
        """Longest side from the first sample to the last, in world units: (), the largest over samples."""
        steps = self.affine[..., :3].norm(dim=-2)  # (N, 3)
        return (steps * (steps.new_tensor(self.shape) - 1)).amax()

    def coordinates(self) -> Tensor:
        """World coordinates of every voxel, (N or 1, X, Y, Z, 3), made on demand."""
        axes = [torch.arange(s, dtype=self.affine.dtype, device=self.affine.device) for s in self.shape]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (X, Y, Z, 3)
        return self.index_to_world(index.reshape(1, -1, 3)).reshape(-1, *self.shape, 3)

    def index_to_world(self, index: Tensor) -> Tensor:
        """Map (N or 1, P, 3) possibly fractional voxel indices to world points (N, P, 3)."""
        return exact_matmul(index, self.affine[..., :3].mT) + self.affine[..., 3].unsqueeze(-2)

    def voxel_to_pixel(self, projections: Tensor) -> Tensor:
        """Q = P · [A; 0 0 0 1]: homogeneous pixel = Q · (i, j, k, 1), for projections (N, M, 3, 4) -> (N, M, 3, 4)."""
        dtype = torch.promote_types(projections.dtype, self.affine.dtype)
        projections, affine = projections.to(dtype), self.affine.to(dtype).unsqueeze(1)  # (N or 1, 1, 3, 4)
        q = exact_matmul(projections[..., :3], affine)
        return torch.cat([q[..., :3], q[..., 3:] + projections[..., 3:]], dim=-1)


def _flatten(grid: VoxelGrid) -> tuple[list[Tensor], tuple[int, int, int]]:
    return [grid.affine], grid.shape


def _unflatten(leaves: Any, shape: tuple[int, int, int]) -> VoxelGrid:
    # No __post_init__: tracing passes placeholders through here.
    grid = object.__new__(VoxelGrid)
    object.__setattr__(grid, "affine", next(iter(leaves)))
    object.__setattr__(grid, "shape", shape)
    return grid


def _flatten_with_keys(grid: VoxelGrid) -> tuple[list[tuple[Any, Tensor]], tuple[int, int, int]]:
    return [(pytree.GetAttrKey("affine"), grid.affine)], grid.shape


# A grid may then be an argument of an exported or compiled model; its shape is static.
pytree.register_pytree_node(
    VoxelGrid,
    _flatten,
    _unflatten,
    serialized_type_name="bkind3d_kernels.VoxelGrid",
    flatten_with_keys_fn=_flatten_with_keys,
)
# torch.load then reads a saved one under weights_only=True, its default.
torch.serialization.add_safe_globals([VoxelGrid])


def project_points(projections: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points by pinhole matrices.

    .. math:: (x, y, z)^T = P (X, 1)^T, \\quad u = x / z, \\; v = y / z

    Args:
        projections: (..., 3, 4), world to homogeneous pixels.
        points: (..., J, 3), world units; the leading dimensions broadcast with those of ``projections``.

    Returns:
        Pixels (..., J, 2) in order (x, y), and depth z (..., J) in world units if P's last row has the unit direction
        of the optical axis (as K[R|t] has). A point behind the camera (z ≤ 0) has no image: its pixels are finite but
        mean nothing, so mask by depth. Near z = 0 the division is by ±1e-6, so that values and gradients stay finite.

    Example:
        >>> import torch
        >>> from bkind3d_kernels.geometry import project_points
        >>> P = torch.tensor([[100.0, 0, 32, 0], [0, 100, 24, 0], [0, 0, 1, 0]])
        >>> project_points(P, torch.tensor([[0.1, -0.1, 2.0]]))
        (tensor([[37., 19.]]), tensor([2.]))
    """
    check_geometry("projections", projections, "(..., 3, 4)")
    if projections.shape[-2:] != (3, 4):
        raise ValueError(f"projections {tuple(projections.shape)}: expected (..., 3, 4)")
    if points.shape[-1:] != (3,) or points.ndim < 2:
        raise ValueError(f"points {tuple(points.shape)}: expected (..., J, 3)")
    dtype = torch.promote_types(projections.dtype, points.dtype)
    projections, points = projections.to(dtype), points.to(dtype)
    homogeneous = exact_matmul(points, projections[..., :3].mT) + projections[..., 3].unsqueeze(-2)  # (..., J, 3)
    depth = homogeneous[..., 2]
    limit = torch.where(depth < 0, -MIN_DEPTH, MIN_DEPTH).to(dtype)
    divisor = torch.where(depth.abs() > MIN_DEPTH, depth, limit)
    return homogeneous[..., :2] / divisor.unsqueeze(-1), depth


def rescale_points(points: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Move pixels (..., 2), order (x, y), from an image (H, W) to its resized copy (h, w): u' = (u + 0.5)·w/W − 0.5.

    Example:
        >>> import torch
        >>> from bkind3d_kernels.geometry import rescale_points
        >>> rescale_points(torch.tensor([-0.5, 1.5]), (64, 64), (16, 32))
        tensor([-0.5000,  0.0000])
    """
    if points.shape[-1:] != (2,):
        raise ValueError(f"points {tuple(points.shape)}: expected (..., 2)")
    scale = points.new_tensor([to_size[1] / from_size[1], to_size[0] / from_size[0]])
    return (points + 0.5) * scale - 0.5


def rescale_projections(projections: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Projections (..., 3, 4) for an image (H, W) -> those for its resized copy (h, w), by the pixel-centre rule.

    The result maps a world point to the pixel that :func:`rescale_points` gives.
    """
    if projections.shape[-2:] != (3, 4):
        raise ValueError(f"projections {tuple(projections.shape)}: expected (..., 3, 4)")
    sx, sy = to_size[1] / from_size[1], to_size[0] / from_size[0]
    resize = projections.new_tensor([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
    return exact_matmul(resize, projections)


def all_pairs(count: int, device: torch.device | str = "cpu") -> Tensor:
    """All pairs i < j of ``count`` keypoints in lexicographic order: (count·(count-1)/2, 2) int64.

    Example:
        >>> from bkind3d_kernels.geometry import all_pairs
        >>> all_pairs(3).tolist()
        [[0, 1], [0, 2], [1, 2]]
    """
    if count < 0:
        raise ValueError(f"count {count}: expected at least 0")
    if not torch.compiler.is_compiling():
        return torch.triu_indices(count, count, offset=1, device=device).T.contiguous()
    # A traced count may stand for any number, which triu_indices does not take.
    number = torch.arange(count, device=device)
    first = number * (2 * count - number - 1) // 2  # the first pair of each keypoint
    pair = torch.arange(count * (count - 1) // 2, device=device)
    i = torch.searchsorted(first[: count - 1], pair, right=True) - 1
    return torch.stack([i, pair - first[i] + i + 1], dim=1)
