"""One type for the calibrated cameras of a rig.

World to camera, column vectors: ``x_cam = R X + t``, OpenCV axes. Pixel centres are at integers: an image of width W
spans [-0.5, W - 0.5]. Intrinsics never travel without the image size that they belong to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from kornia.geometry import calibration
from kornia.geometry.camera.distortion_kannala_brandt import (
    distort_points_kannala_brandt,
    undistort_points_kannala_brandt,
)
from torch import Tensor

from bkind3d.errors import InputError, shown

UNITS = ("m", "cm", "mm", "um")
LARGEST_IMAGE = 1 << 16  # pixels along a side
_LONGEST_NAME = 100
_ORTHONORMAL_TOLERANCE = 1e-4  # calibration files carry five digits or more
_UNDISTORT_ITERATIONS = 100
_UNDISTORT_TOLERANCE = 1e-3  # px, after distorting again
_SMALLEST_DEPTH = 1e-12


@dataclass(frozen=True, eq=False)
class Cameras:
    """The M calibrated cameras of a rig; every tensor is on the CPU, float64 unless said otherwise.

    Args:
        names: M different names.
        intrinsics: K with skew, (M, 3, 3), in pixels of an image of ``image_size``.
        distortion: OpenCV's k1, k2, p1, p2, k3, (M, 5); all zero for a pinhole. Of a fisheye its k1, k2, k3, k4, and 0.
        rotation: world to camera, (M, 3, 3), determinant +1.
        translation: t of ``x_cam = R X + t``, (M, 3), in ``units``.
        image_size: width and height in pixels, (M, 2) int64.
        units: length unit of the world, one of "m", "cm", "mm", "um".
        fisheye: which cameras have OpenCV's fisheye model in place of the polynomial, (M,) bool; none when left out.

    Raises:
        InputError: a value is not a number, K is not an upper triangle ending in 0 0 1, a rotation is not orthonormal
            or is mirrored, or shapes disagree. The message names the camera.
    """

    names: tuple[str, ...]
    intrinsics: Tensor
    distortion: Tensor
    rotation: Tensor
    translation: Tensor
    image_size: Tensor
    units: str
    fisheye: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for name in ("intrinsics", "distortion", "rotation", "translation"):
            value = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float64)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "image_size", torch.as_tensor(self.image_size).to("cpu", torch.int64))
        fisheye = torch.as_tensor(self.fisheye).to("cpu", torch.bool)
        object.__setattr__(self, "fisheye", fisheye if len(fisheye) else fisheye.new_zeros(len(self.names)))
        _validate(self)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def centers(self) -> Tensor:
        """Camera centres in the world, C = -Rᵀ t, (M, 3)."""
        return -(self.rotation.transpose(1, 2) @ self.translation[..., None])[..., 0]

    @property
    def axes(self) -> Tensor:
        """Viewing directions in the world (unit vectors along the camera's z), (M, 3)."""
        return self.rotation[:, 2]

    def projection_matrices(self) -> Tensor:
        """Pinhole projections P = K [R | t], (M, 3, 4): homogeneous world point to homogeneous pixel.

        Lens distortion is not part of P: use it with frames that were undistorted (see :meth:`pinhole`).
        """
        return self.intrinsics @ torch.cat([self.rotation, self.translation[..., None]], dim=-1)

    def pinhole(self) -> Cameras:
        """The same cameras without lens distortion: the cameras of undistorted frames."""
        straight, none = torch.zeros_like(self.distortion), torch.zeros_like(self.fisheye)
        return dataclasses.replace(self, distortion=straight, fisheye=none)

    def select(self, names: Sequence[str]) -> Cameras:
        """The named cameras, in that order.

        Raises:
            InputError: a name is not among the cameras.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise InputError(f"camera {unknown[0]!r} is not in the calibration, which has {', '.join(self.names)}")
        index = torch.tensor([self.names.index(name) for name in names], dtype=torch.long)
        picked = {key: getattr(self, key)[index] for key in _TENSORS}
        return dataclasses.replace(self, names=tuple(names), **picked)

    def resize(self, width: int, height: int) -> Cameras:
        """The cameras of images resized to (width, height): u' = (u + 0.5)·w/W - 0.5, likewise v."""
        new_size = torch.tensor([width, height]).expand(len(self), 2)
        scale = new_size / self.image_size.double()  # (M, 2)
        return self._map_pixels(scale, 0.5 * scale - 0.5, new_size)

    def crop(self, boxes: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Cameras:
        """The cameras of cropped images.

        Args:
            boxes: (M, 4) or (4,) integers x, y, width, height: pixel (x, y) becomes (0, 0). A box may reach over the
                edge of the image: the crop is then padded.
        """
        box = torch.as_tensor(boxes)
        if box.is_floating_point() or box.shape[-1:] != (4,) or box.ndim > 2:
            raise InputError("crop: boxes must be integers x, y, width, height of shape (M, 4) or (4,)")
        box = box.expand(len(self), 4)
        return self._map_pixels(torch.ones(len(self), 2), -box[:, :2], box[:, 2:])

    def project(self, points: Tensor, distort: bool = True) -> tuple[Tensor, Tensor]:
        """Project world points into every camera.

        Args:
            points: (..., 3) in ``units``.
            distort: apply the lens distortion (pixels of the raw image) or not (pixels of the undistorted image).

        Returns:
            pixels (M, ..., 2), (x, y), and depth along the optical axis (M, ...), in ``units``. The lens model is a
            polynomial that holds inside the image: :meth:`in_view` says for which points a pixel means anything.
        """
        rays, depth = self._normalized(points)
        if distort:
            rays = self._distort(rays)
        shape = (len(self), *points.shape[:-1])
        return self._to_pixels(rays).reshape(*shape, 2), depth.reshape(shape)

    def in_view(self, points: Tensor) -> Tensor:
        """Whether each camera's image shows each world point: (..., 3) -> (M, ...) bool.

        In front of the camera, inside the image, and inside the radius up to which the lens polynomial grows (beyond
        it, far points would fold back into the image).
        """
        rays, depth = self._normalized(points)
        pixels = self._to_pixels(self._distort(rays))
        inside = ((pixels >= -0.5) & (pixels <= self.image_size[:, None] - 0.5)).all(-1)
        seen = (depth > _SMALLEST_DEPTH) & inside & self._unfolded(rays)
        return seen.reshape(len(self), *points.shape[:-1])

    def undistort_points(self, pixels: Tensor) -> Tensor:
        """Pixels of the raw images (M, ..., 2) to pixels of the undistorted images with the same K (M, ..., 2).

        NaN where the lens model has no inverse.
        """
        flat = pixels.double().reshape(len(self), -1, 2)
        raw = self._to_rays(flat)
        identity = torch.eye(3, dtype=torch.float64).expand(len(self), 3, 3)
        rays = calibration.undistort_points(raw, identity, self.distortion, num_iters=_UNDISTORT_ITERATIONS)
        if self.fisheye.any():
            rays = torch.where(self.fisheye[:, None, None], undistort_points_kannala_brandt(raw, self._fisheye()), rays)
        error = (self._to_pixels(self._distort(rays)) - flat).abs().amax(-1)
        solved = (error < _UNDISTORT_TOLERANCE) & self._unfolded(rays)
        return torch.where(solved[..., None], self._to_pixels(rays), torch.nan).reshape(pixels.shape)

    def distort_points(self, pixels: Tensor) -> Tensor:
        """Inverse of :meth:`undistort_points`: pixels of the undistorted images to those of the raw images.

        NaN beyond the radius up to which the lens polynomial grows.
        """
        rays = self._to_rays(pixels.double().reshape(len(self), -1, 2))
        raw = self._to_pixels(self._distort(rays))
        return torch.where(self._unfolded(rays)[..., None], raw, torch.nan).reshape(pixels.shape)

    def _map_pixels(self, scale: Tensor, shift: Tensor, image_size: Tensor) -> Cameras:
        """Cameras whose pixels are u' = scale·u + shift; scale, shift (M, 2)."""
        affine = torch.eye(3, dtype=torch.float64).repeat(len(self), 1, 1)
        affine[:, 0, 0], affine[:, 1, 1] = scale.double().unbind(-1)
        affine[:, :2, 2] = shift.double()
        return dataclasses.replace(self, intrinsics=affine @ self.intrinsics, image_size=image_size)

    def _normalized(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points (..., 3) to rays x/z, y/z (M, P, 2) and depth (M, P)."""
        flat = points.double().reshape(-1, 3)
        camera = torch.einsum("mij,pj->mpi", self.rotation, flat) + self.translation[:, None]
        depth = camera[..., 2]
        # A point in the camera's own plane has no pixel; a tiny depth sends it far outside instead of to infinity.
        divisor = torch.where(depth.abs() < _SMALLEST_DEPTH, _SMALLEST_DEPTH, depth)
        return camera[..., :2] / divisor[..., None], depth

    # kornia's lens models ignore the skew, so they are asked for normalised rays (K = I) and K is applied here.
    def _distort(self, rays: Tensor) -> Tensor:
        identity = torch.eye(3, dtype=torch.float64).expand(len(self), 3, 3)
        bent = calibration.distort_points(rays, identity, self.distortion)
        if self.fisheye.any():
            bent = torch.where(self.fisheye[:, None, None], distort_points_kannala_brandt(rays, self._fisheye()), bent)
        return bent

    def _fisheye(self) -> Tensor:
        """kornia's parameters (M, 1, 8): focal lengths 1, principal point 0, k1 to k4."""
        lens = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(len(self), 4)
        return torch.cat([lens, self.distortion[:, :4]], dim=1)[:, None]

    def _to_pixels(self, rays: Tensor) -> Tensor:
        return rays @ self.intrinsics[:, :2, :2].transpose(1, 2) + self.intrinsics[:, None, :2, 2]

    def _to_rays(self, pixels: Tensor) -> Tensor:
        shifted = (pixels - self.intrinsics[:, None, :2, 2]).transpose(1, 2)
        return torch.linalg.solve(self.intrinsics[:, :2, :2], shifted).transpose(1, 2)

    def _unfolded(self, rays: Tensor) -> Tensor:
        """(M, P) bool: the lens polynomial still grows at these rays (M, P, 2)."""
        pairs = zip(self.distortion.numpy(), self.fisheye.tolist())
        limit = torch.tensor([_fisheye_limit(row) if fisheye else _growth_limit(row) for row, fisheye in pairs])
        return rays.square().sum(-1) < limit[:, None]


_TENSORS = ("intrinsics", "distortion", "rotation", "translation", "image_size", "fisheye")


def _growth_limit(distortion: np.ndarray) -> float:
    """Squared radius s at which r (1 + k1 s + k2 s² + k3 s³), s = r², stops growing; infinity if never."""
    k1, k2, _, _, k3 = distortion
    return _first_root([7 * k3, 5 * k2, 3 * k1, 1])


def _fisheye_limit(distortion: np.ndarray) -> float:
    """Squared radius tan²θ at which θ (1 + k1 θ² + k2 θ⁴ + k3 θ⁶ + k4 θ⁸) stops growing; infinity from 90° on."""
    k1, k2, k3, k4, _ = distortion
    angle = np.sqrt(_first_root([9 * k4, 7 * k3, 5 * k2, 3 * k1, 1]))
    return float(np.tan(angle) ** 2) if angle < np.pi / 2 else np.inf


def _first_root(coefficients: list[float]) -> float:
    """Least positive root of a polynomial; infinity if there is none."""
    roots = np.roots(coefficients)
    real = roots[np.abs(roots.imag) < 1e-9].real
    return float(min(real[real > 0], default=np.inf))


def _validate(cameras: Cameras) -> None:
    """Refuse what no rig can be, naming the camera."""
    count = len(cameras.names)
    if count == 0:
        raise InputError("calibration: there are no cameras")
    for name in cameras.names:
        if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
            raise InputError(f"calibration: {shown(name)} is not a name of a camera: 1 to {_LONGEST_NAME} letters")
    if len(set(cameras.names)) != count:
        twice = next(name for name in cameras.names if cameras.names.count(name) > 1)
        raise InputError(f"calibration: camera {twice!r} is defined twice; give every camera its own name")
    if cameras.units not in UNITS:
        raise InputError(f"units: {cameras.units!r} is not a unit of length; expected one of {', '.join(UNITS)}")
    shapes: dict[str, tuple[int, ...]] = {
        "intrinsics": (3, 3),
        "distortion": (5,),
        "rotation": (3, 3),
        "translation": (3,),
        "image_size": (2,),
        "fisheye": (),
    }
    for name, shape in shapes.items():
        if tuple(getattr(cameras, name).shape) != (count, *shape):
            expected, got = (count, *shape), tuple(getattr(cameras, name).shape)
            raise InputError(f"calibration: {name} must have shape {expected}, not {got}")
    for index in range(count):
        _validate_one(cameras, index)


def _validate_one(cameras: Cameras, index: int) -> None:
    where = f"camera {cameras.names[index]!r}"
    for name in _TENSORS:
        if not torch.isfinite(getattr(cameras, name)[index].double()).all():
            raise InputError(f"{where}: {name} holds a value that is not a finite number; calibrate it again")
    matrix, rotation = cameras.intrinsics[index], cameras.rotation[index]
    if matrix[2].tolist() != [0, 0, 1]:
        last = " ".join(f"{value:g}" for value in matrix[2].tolist())
        raise InputError(f"{where}: the last row of K is {last}, expected 0 0 1; a transposed K is a usual cause")
    if matrix[1, 0] != 0 or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise InputError(f"{where}: K must be upper triangular with positive focal lengths (fx s cx; 0 fy cy; 0 0 1)")
    if ((cameras.image_size[index] < 1) | (cameras.image_size[index] > LARGEST_IMAGE)).any():
        size = tuple(cameras.image_size[index].tolist())
        raise InputError(f"{where}: image size {size} must be positive, {LARGEST_IMAGE} at most")
    error = (rotation @ rotation.T - torch.eye(3)).abs().max().item()
    if error > _ORTHONORMAL_TOLERANCE:
        raise InputError(f"{where}: the rotation is not orthonormal (R Rᵀ is off by {error:.2g}); calibrate it again")
    if torch.linalg.det(rotation) < 0:
        raise InputError(f"{where}: the rotation is mirrored (determinant -1); one axis has the wrong sign")
