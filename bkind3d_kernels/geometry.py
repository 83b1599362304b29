"""The voxel grid as an affine map, pinhole projection, and the pixel-centre rule.

Conventions (docs/conventions.md): column vectors, ``x_cam = R X + t``, OpenCV axes (x right, y down, z forward);
pixel centres at integers, so an image of width W spans [-0.5, W - 0.5]; geometry is float32 or float64, never less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

GEOMETRY_DTYPES = (torch.float32, torch.float64)
INTEGERS: tuple[Any, ...] = (int, Integral)  # NumPy's are the second
MIN_DEPTH = 1e-6  # world units: no division by a smaller depth, so that values and gradients stay finite


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` may be read to check them: only on the CPU, and where there is one value each.

    Reading a CUDA tensor would wait for the device at each call.
    """
    return tensor.is_cpu and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether values can be read: a traced or fake tensor has none, and one inside ``torch.func`` stands for many."""
    if torch.compiler.is_compiling():
        return False
    unread = isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not unread and tensor.numel() > 0 and not tensor.is_meta


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; reads them."""
    # A sum costs a third of the full test. It is finite only if all terms are, and finite terms may overflow.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def check_geometry(name: str, tensor: Any, expected: str) -> None:
    """Raise unless ``tensor`` is a float32 or float64 tensor of finite values (read on the CPU only)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(tensor).__name__}")
    if tensor.dtype not in GEOMETRY_DTYPES:
        raise ValueError(f"{name} {tuple(tensor.shape)}: expected float32 or float64, got {tensor.dtype}")
    if checks_values(tensor) and not is_finite(tensor):
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
        if checks_values(self.affine) and not _invertible(self.affine.detach()):
            raise ValueError(
                f"grid.affine {tuple(self.affine.shape)}: expected an invertible 3 x 3 part, it is singular"
            )

    @classmethod
    def cube(cls, center: Any, side: Any, size: int) -> VoxelGrid:
        """Cube of ``size`` samples an axis from -side/2 to +side/2 inclusive.

        Args:
            center: (3,) or (N, 3), world units.
            side: length > 0 in world units, or a tensor (N,) of them.
            size: samples an axis.
        """
        if not isinstance(side, Tensor):
            return cls.box(center, (side, side, side), (size, size, size))
        if side.ndim > 1:
            raise ValueError(f"side {tuple(side.shape)}: expected a length or (N,) lengths")
        return cls.box(center, side.unsqueeze(-1).expand(*side.shape, 3), (size, size, size))

    @classmethod
    def box(cls, center: Any, sides: Any, shape: tuple[int, int, int], rotation: Any = None) -> VoxelGrid:
        """Box whose samples span -side/2 to +side/2 inclusive along each axis.

        Args:
            center: (3,) or (N, 3), world units. A tensor keeps its dtype and device; anything else becomes float32.
            sides: three lengths > 0, world units, or (N, 3) lengths. An axis with one sample has it at the centre; its
                side then gives the voxel's extent.
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
        n = center.shape[0]
        if sides.ndim not in (1, 2) or sides.shape[-1] != 3 or len({1, n, *sides.shape[:-1]}) > 2:
            raise ValueError(f"sides {tuple(sides.shape)}: expected (3,) or (N, 3), for {n} centers")
        if checks_values(sides) and not bool(((sides > 0) & sides.isfinite()).all()):
            raise ValueError(f"sides {tuple(sides.shape)}: expected three finite lengths above 0")
        if rotation is None:
            rotation = torch.eye(3, dtype=center.dtype, device=center.device)
        rotation = torch.as_tensor(rotation, dtype=center.dtype, device=center.device)
        n = max(n, *sides.shape[:-1]) if sides.ndim > 1 else n
        if rotation.ndim not in (2, 3) or rotation.shape[-2:] != (3, 3) or len({1, n, *rotation.shape[:-2]}) > 2:
            raise ValueError(f"rotation {tuple(rotation.shape)}: expected (3, 3) or (N, 3, 3), for {n} centers")
        shape = _checked_shape("shape", shape)
        samples = torch.tensor(shape, dtype=center.dtype, device=center.device)
        step = sides / (samples - 1).clamp(min=1)
        linear = rotation * step.unsqueeze(-2)  # (3, 3) or (N, 3, 3): column c is axis c times its step
        origin = center - (linear * ((samples - 1) / 2)).sum(-1)  # (N, 3)
        linear = linear.expand(origin.shape[0], 3, 3)
        return cls(torch.cat([linear, origin.unsqueeze(-1)], dim=-1), shape)

    @classmethod
    def from_coordinates(cls, volume: Tensor, *, tolerance: float = 1e-3) -> VoxelGrid:
        """The grid whose :meth:`coordinates` are a given volume of them, by least squares.

        Args:
            volume: world coordinates (X, Y, Z, 3) or (N, X, Y, Z, 3), float32 or float64, at least two samples an axis;
                such as other libraries keep, sampled on a lattice that may be turned, sheared and uneven by axis.
            tolerance: how far a coordinate may be from the grid's, in parts of the shortest edge of its voxels.

        Returns:
            A grid in the dtype and on the device of the volume, affine (1, 3, 4) or (N, 3, 4); differentiable.

        Raises:
            ValueError: the volume has another shape or dtype, is not finite, or is no affine map of the index; the
                message says how far from one it is. Values are read on every device, which waits for it, but not while
                tracing.

        Example:
            >>> from bkind3d_kernels import VoxelGrid
            >>> grid = VoxelGrid.cube(center=(0.0, 0.0, 1.0), side=2.0, size=3)
            >>> VoxelGrid.from_coordinates(grid.coordinates()).affine[0, 0].tolist()
            [1.0, 0.0, 0.0, -1.0]
        """
        expected = "(X, Y, Z, 3) or (N, X, Y, Z, 3)"
        check_geometry("volume", volume, expected)
        if volume.ndim not in (4, 5) or volume.shape[-1] != 3:
            raise ValueError(f"volume {tuple(volume.shape)}: expected {expected}")
        points = volume.reshape(-1, *volume.shape[-4:])
        shape = _checked_shape("shape of the volume", points.shape[1:4])
        if min(shape) < 2:
            raise ValueError(f"volume {tuple(volume.shape)}: expected at least two samples an axis, or it has no step")
        exact = points if points.device.type == "mps" else points.double()  # Apple's GPUs have no float64
        mean = exact.mean((1, 2, 3))  # (N, 3)
        columns, middle = [], mean
        for axis, count in enumerate(shape):
            line = exact.mean([a for a in (1, 2, 3) if a != axis + 1])  # (N, count, 3)
            index = torch.arange(count, dtype=exact.dtype, device=exact.device) - (count - 1) / 2
            step = (line * index.unsqueeze(-1)).sum(1) / index.square().sum()  # (N, 3)
            columns.append(step)
            middle = middle - step * ((count - 1) / 2)
        affine = torch.stack([*columns, middle], dim=-1)  # (N, 3, 4)
        if has_values(points):
            _check_fit(affine.detach(), exact.detach(), shape, tolerance, tuple(volume.shape))
        return cls(affine.to(volume.dtype), shape)

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
        affine = self.affine
        if projections.dtype != affine.dtype:
            dtype = torch.promote_types(projections.dtype, affine.dtype)
            projections, affine = projections.to(dtype), affine.to(dtype)
        # As in exact_matmul, with the fewest operations: what a small problem takes is their number.
        q = (projections.narrow(-1, 0, 3).unsqueeze(-1) * affine.view(-1, 1, 1, 3, 4)).sum(-2)
        q.select(-1, 3).add_(projections.select(-1, 3))
        return q


def _check_fit(affine: Tensor, points: Tensor, shape: tuple[int, int, int], tolerance: float, given: Any) -> None:
    """Raise unless ``points`` (N, X, Y, Z, 3) are the coordinates of the grid of ``affine`` up to ``tolerance``."""
    if not is_finite(points):
        raise ValueError(f"volume {given}: expected finite values, found NaN or infinity")
    edge = affine[..., :3].norm(dim=-2).amin()
    error = (_unflatten([affine], shape).coordinates() - points).norm(dim=-1).amax()
    if not error <= tolerance * edge:
        raise ValueError(
            f"volume {given}: expected an affine map of the voxel index; coordinates are up to {float(error):.3g} from "
            f"the nearest one, whose voxels have edges of {float(edge):.3g} at least"
        )


def _invertible(affine: Tensor) -> bool:
    """Whether no 3 x 3 part (N, 3, 4) has a determinant of 0, in float64."""
    a, b, c = affine.double()[..., :3].unbind(-2)
    return bool(((torch.linalg.cross(a, b) * c).sum(-1) != 0).all())


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


class VoxelGridModule(nn.Module):
    """A grid that a module holds, and that follows the module's ``.to()``: ``self.grid = VoxelGridModule(grid)``.

    Calling it gives the :class:`VoxelGrid`. Its affine is a buffer that is not in the state dict: where the voxels are
    is a setting, and the checkpoints of a model do not change when it gets a grid. An affine that is an
    ``nn.Parameter`` is a parameter here too: trained, and in the state dict as ``affine``. Half precision does not
    apply to it: geometry stays in float32 or float64.

    Args:
        grid: the grid.

    Example:
        >>> from bkind3d_kernels import VoxelGrid, VoxelGridModule
        >>> held = VoxelGridModule(VoxelGrid.cube(center=(0.0, 0.0, 1.0), side=2.0, size=3)).double()
        >>> held, held().affine.dtype
        (VoxelGridModule(shape=(3, 3, 3)), torch.float64)
    """

    affine: Tensor

    def __init__(self, grid: VoxelGrid) -> None:
        super().__init__()
        if not isinstance(grid, VoxelGrid):
            raise TypeError(f"grid: expected a VoxelGrid, got {type(grid).__name__}")
        self.shape = grid.shape
        if isinstance(grid.affine, nn.Parameter):
            self.affine = grid.affine
        else:
            self.register_buffer("affine", grid.affine, persistent=False)

    def forward(self) -> VoxelGrid:
        """The grid where the module is now."""
        return _unflatten([self.affine], self.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> VoxelGridModule:
        def geometric(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in GEOMETRY_DTYPES else tensor.to(moved.device)

        return super()._apply(geometric, recurse)

    def extra_repr(self) -> str:
        """The shape."""
        return f"shape={self.shape}"


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
