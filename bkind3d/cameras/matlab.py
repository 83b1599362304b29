"""MATLAB's files, version 5 or 7.3 (HDF5): DANNCE, sDANNCE and Label3D, Rat7M; and Human3.6M's HDF5.

DANNCE: a cell ``params`` (of a Label3D session ``camParams``) of structs ``K``, ``r``, ``t``, ``RDistort`` (2 or 3),
``TDistort`` (2), and ``camnames``; or a file ``<camera>_params.mat`` for each camera with these variables. MATLAB
multiplies row vectors, [u v w] = ([X Y Z] r + t) K, so that both matrices are the transposes of OpenCV's; its skew is
K(2, 1). Pixels are not shifted, as in DANNCE itself. Label3D's ``imageSize`` holds height and width.

Rat7M: a struct ``cameras`` of structs ``IntrinsicMatrix``, ``rotationMatrix``, ``translationVector`` (mm),
``RadialDistortion``, ``TangentialDistortion``, for row vectors likewise, and pixels counted from 1.

Human3.6M (``cameras.h5``): ``subject#/camera#`` with ``R``, ``T``, ``f``, ``c``, ``k``, ``p``, ``Name``; MATLAB laid
the matrices out by columns, so that R arrives transposed; X_c = R (X - T), in mm.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d import foreign
from bkind3d.cameras.lens import Calibration, Lens, one_subject, read_lens
from bkind3d.errors import InputError

_RAT7M = {
    "matrix": "IntrinsicMatrix",
    "rotation": "rotationMatrix",
    "translation": "translationVector",
}
_DANNCE = {"matrix": "K", "rotation": "r", "translation": "t"}
# The variables of a file that are read: what else is in it may be large.
_VARIABLES = ("params", "camParams", "camnames", "imageSize", "cameras", "K", "r", "t", "RDistort", "TDistort")


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file that calibrations are made of: structs as dictionaries, cells as lists.

    Raises:
        InputError: the file cannot be read.
    """
    content = foreign.read_mat(path)
    return {name: value for name, value in content.items() if name in _VARIABLES or name.startswith("subject")}


def read_dannce(path: Path, content: dict[str, Any]) -> Calibration | None:
    """One file of all cameras, or the files of single cameras beside one of them."""
    files: tuple[Path, ...] = (path,)
    rows = _list(content.get("params", content.get("camParams")))
    names = [_text(name) for name in _list(content.get("camnames"))] or [f"Camera{i + 1}" for i in range(len(rows))]
    if not rows and {"K", "r", "t"} <= set(content):
        singles = {file: read_mat(file) for file in sorted(path.parent.glob("*_params.mat"))} or {path: content}
        files, rows = tuple(singles), list(singles.values())
        names = [_single_name(file) for file in files]
    if not rows or not all(isinstance(row, dict) for row in rows):
        return None
    if len(names) != len(rows):
        raise InputError(f"{path}: has {len(rows)} cameras, but camnames has {len(names)}")
    sizes = np.atleast_2d(content.get("imageSize", np.zeros((0, 2))))[:, ::-1]
    known: list[Any] = sizes.tolist() if len(sizes) == len(rows) else [None] * len(rows)
    lenses = [
        _matlab_lens(path, name, {**row, "size": size}, "RDistort", "TDistort", _DANNCE)
        for name, row, size in zip(names, rows, known)
    ]
    return Calibration(files, "DANNCE .mat", lenses)


def _single_name(file: Path) -> str:
    """DANNCE calls the camera of hires_cam1_params.mat Camera1."""
    match = re.fullmatch(r"hires_cam(\d+)_params", file.stem)
    return f"Camera{match[1]}" if match else file.stem.removesuffix("_params")


def read_rat7m(path: Path, content: dict[str, Any]) -> Calibration | None:
    """The cameras of a session's mocap file."""
    rows = content.get("cameras")
    rows = rows if isinstance(rows, dict) else {}
    if not any("IntrinsicMatrix" in row for row in rows.values() if isinstance(row, dict)):
        return None
    lenses = []
    for name, row in rows.items():
        lens = _matlab_lens(path, name, row, "RadialDistortion", "TangentialDistortion", _RAT7M)
        lens.matrix[:2, 2] -= 1  # MATLAB's index of the first pixel
        lenses.append(lens)
    return Calibration((path,), "Rat7M .mat", lenses, "mm")


def _matlab_lens(path: Path, name: str, row: Any, radial: str, tangential: str, keys: dict[str, str]) -> Lens:
    """A struct for row vectors, whose distortion stands in two arrays."""
    if not isinstance(row, dict) or not {radial, tangential} <= set(row):
        raise InputError(f"{path}: camera {name!r} lacks {radial!r} or {tangential!r}")
    k, p = (np.asarray(row[key]).reshape(-1) for key in (radial, tangential))
    if len(k) not in (2, 3) or len(p) != 2:
        raise InputError(f"{path}: camera {name!r}: {radial} must be 2 or 3 numbers, {tangential} 2")
    if np.shape(row.get(keys["rotation"], np.eye(3))) != (3, 3):
        raise InputError(f"{path}: camera {name!r}: {keys['rotation']!r} must be 3 × 3")
    content = {**row, "distortion": [*k[:2], *p, *k[2:]]}
    return read_lens(f"{path}", name, content, keys, transposed=True)


def read_h36m_hdf5(path: Path, content: dict[str, Any]) -> Calibration | None:
    """The only subject of a file."""
    subjects = {name.replace("subject", "S"): row for name, row in content.items() if name.startswith("subject")}
    if not subjects:
        return None
    lenses = []
    for row in one_subject(path, subjects).values():
        try:
            (fx, fy), (cx, cy), (k1, k2, k3), (p1, p2) = (np.ravel(row[key]) for key in "fckp")
            rotation = np.asarray(row["R"])
            fields = {
                "matrix": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]],
                "distortion": [k1, k2, p1, p2, k3],
                "rotation": rotation,
                "translation": -rotation @ np.ravel(row["T"]),
            }
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not the cameras of Human3.6M ({error})") from None
        lenses.append(read_lens(f"{path}", _text(row["Name"]), fields))
    return Calibration((path,), "Human3.6M", lenses, "mm")


def _text(value: Any) -> str:
    """A text; HDF5 that MATLAB has not marked as one holds its letters as numbers."""
    letters = isinstance(value, np.ndarray) and value.dtype == np.uint16
    return "".join(map(chr, value.ravel())) if letters else str(value)


def _list(value: Any) -> list[Any]:
    """A cell as a list; MATLAB's cell of one element arrives as the element."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | np.ndarray) else [value]
