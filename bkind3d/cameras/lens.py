"""What the readers of calibration formats share: one camera as a file gives it, and the cameras made of them.

A reader brings its format to OpenCV's conventions (transposes what was written for row vectors, turns a camera's centre
into a translation, moves the first pixel's centre to (0, 0)) and leaves the numbers to :func:`read_lens`, which names
the file, the camera and the key where they cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from bkind3d.cameras.cameras import LARGEST_IMAGE, UNITS, Cameras
from bkind3d.errors import InputError

Size = tuple[int, int]  # width, height
# The size of a camera's images where the format has none: one for all, or asked for by the camera's name.
Sizes = Size | Callable[[str], Size] | None

_LARGEST_ANGLE = 4 * np.pi  # radians: what is larger was meant in degrees
_REQUIRED = ("matrix", "distortion", "rotation", "translation")


@dataclass(frozen=True)
class Lens:
    """One camera in OpenCV's conventions, as in :class:`Cameras`; ``size`` is None where the format has none."""

    name: str
    matrix: np.ndarray
    distortion: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    size: Size | None
    fisheye: bool


@dataclass(frozen=True)
class Calibration:
    """What a calibration holds: its cameras in the natural order of their names, and units where it names them.

    Args:
        files: that it was read from.
        format: its title.
        lenses: at least one.
        units: "m", "cm", "mm" or "um"; None where the format has none.

    Raises:
        InputError: there is no camera.
    """

    files: tuple[Path, ...]
    format: str
    lenses: list[Lens]
    units: str | None = None

    def __post_init__(self) -> None:
        if not self.lenses:
            raise InputError(f"{self.files[0]}: {self.format} without a camera")
        object.__setattr__(self, "lenses", sorted(self.lenses, key=lambda lens: natural_key(lens.name)))

    def cameras(self, units: str | None = None, sizes: Sizes = None) -> Cameras:
        """The cameras, with units and image sizes from elsewhere where the format has none.

        Raises:
            InputError: units or sizes are needed and not given, or are others than the format's own; a value is
                impossible.
        """
        path = self.files[0]
        if units is None and self.units is None:
            raise InputError(f"{path}: {self.format} does not say its units; give them: --units {'|'.join(UNITS)}")
        if units is not None and self.units not in (None, units):
            raise InputError(f"{path}: says units {self.units!r}, but {units!r} was asked for; make them agree")
        if isinstance(sizes, tuple) and all(lens.size is not None for lens in self.lenses):
            raise InputError(f"{path}: has the sizes of its images; leave --sizes out")
        rows = self.lenses
        image_size = torch.tensor([self._size(lens, sizes) for lens in rows])
        try:
            return Cameras(
                names=tuple(lens.name for lens in rows),
                intrinsics=torch.tensor(np.stack([lens.matrix for lens in rows])),
                distortion=torch.tensor(np.stack([lens.distortion for lens in rows])),
                rotation=torch.tensor(np.stack([lens.rotation for lens in rows])),
                translation=torch.tensor(np.stack([lens.translation for lens in rows])),
                image_size=image_size,
                units=units or self.units or "",
                fisheye=torch.tensor([lens.fisheye for lens in rows]),
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def _size(self, lens: Lens, sizes: Sizes) -> Size:
        if lens.size is not None:
            return lens.size
        if sizes is None:
            raise InputError(
                f"{self.files[0]}: {self.format} has no size for the images of {lens.name!r}; give it: --sizes W,H"
            )
        return sizes if isinstance(sizes, tuple) else sizes(lens.name)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key that counts: cam_2 before cam_10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def read_lens(
    where: str,
    name: str,
    content: Mapping[str, Any],
    keys: Mapping[str, str] | None = None,
    *,
    fisheye: bool = False,
    transposed: bool = False,
) -> Lens:
    """One camera of a file.

    Args:
        where: the file and the place in it, for messages.
        name: of the camera.
        content: matrix (3, 3), distortion (k1 k2 [p1 p2 [k3]], of a fisheye k1 k2 k3 k4), rotation (a Rodrigues vector,
            or a matrix (3, 3)), translation (3,), and size (width, height) where there is one.
        keys: names of ``content``'s keys, where they are others.
        fisheye: OpenCV's fisheye model.
        transposed: matrix and rotation are those of row vectors.

    Raises:
        InputError: a key is missing, or holds something else than such numbers.
    """
    where = f"{where} (camera {name!r})"
    names = {field: (keys or {}).get(field, field) for field in (*_REQUIRED, "size")}
    for field in _REQUIRED:
        if content.get(names[field]) is None:
            raise InputError(f"{where} lacks {names[field]!r}; expected {', '.join(names[key] for key in _REQUIRED)}")

    def numbers(field: str, *shapes: tuple[int, ...], flat: bool = False) -> np.ndarray:
        return _numbers(where, names[field], content[names[field]], shapes, flat)

    counts = ((4,), (5,)) if fisheye else ((2,), (4,), (5,), (8,), (12,), (14,))
    distortion = numbers("distortion", *counts, flat=True)
    if (distortion[4 if fisheye else 5 :] != 0).any():
        model = "fisheye model of k1 k2 k3 k4" if fisheye else "lens model of k1 k2 p1 p2 k3"
        raise InputError(f"{where}: {names['distortion']!r} has more than the {model}; calibrate it with that one")
    rotation = numbers("rotation", (3,), (3, 3))
    if not np.isfinite(rotation).all():
        raise InputError(f"{where}: rotation holds a value that is not a finite number")
    if rotation.ndim == 1:
        angle = float(np.linalg.norm(rotation))
        if angle > _LARGEST_ANGLE:
            raise InputError(
                f"{where}: {names['rotation']!r} is a Rodrigues vector whose length is an angle in radians, not "
                f"{angle:.4g}: is it in degrees?"
            )
        rotation = Rotation.from_rotvec(rotation).as_matrix()
    matrix, size = numbers("matrix", (3, 3)), None
    if content.get(names["size"]) is not None:
        given = numbers("size", (2,), flat=True)
        if not (np.abs(given) <= LARGEST_IMAGE).all() or (given != np.round(given)).any():
            raise InputError(
                f"{where}: {names['size']!r} must be two whole numbers up to {LARGEST_IMAGE}, width and height, not "
                f"{given}"
            )
        size = int(given[0]), int(given[1])
    return Lens(
        name=name,
        matrix=matrix.T.copy() if transposed else matrix,
        distortion=np.pad(distortion[:5], (0, max(0, 5 - len(distortion)))),
        rotation=rotation.T.copy() if transposed else rotation,
        translation=numbers("translation", (3,), flat=True),
        size=size,
        fisheye=fisheye,
    )


def one_subject(path: Path, subjects: dict[str, Any]) -> Any:
    """The only subject of a calibration of Human3.6M.

    Raises:
        InputError: there are several.
    """
    if len(subjects) != 1:
        raise InputError(
            f"{path}: the cameras stood elsewhere for each of {', '.join(subjects)}: write those of one with "
            "bkind3d calib convert --subject NAME"
        )
    return next(iter(subjects.values()))


def _holds_truth(value: Any) -> bool:
    """Whether true or false stands where numbers belong: numpy takes them for 1 and 0."""
    return any(map(_holds_truth, value)) if isinstance(value, list) else isinstance(value, bool)


def _numbers(where: str, key: str, value: Any, shapes: tuple[tuple[int, ...], ...], flat: bool) -> np.ndarray:
    """Numbers of one of the shapes; a row or a column of a matrix counts as a vector."""
    expected = " or ".join("×".join(map(str, shape)) for shape in shapes)
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{where}: {key!r} must be {expected} numbers") from None
    if flat or 1 in array.shape:
        array = array.reshape(-1)
    if array.shape not in shapes or _holds_truth(value):
        got = "×".join(map(str, array.shape)) or "one"
        raise InputError(f"{where}: {key!r} must be {expected} numbers, not {got}")
    return array
