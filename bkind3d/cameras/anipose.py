"""Anipose's calibration.toml (also written by sleap-anipose, Lightning Pose and Caliscope), in and out.

One table per camera: ``name``, ``size`` (width, height), ``matrix`` (K), ``distortions`` (k1 k2 p1 p2 [k3]),
``rotation`` (Rodrigues vector, or a 3 × 3 matrix), ``translation``. The format does not record units: the caller names
them, and ``save_toml`` writes them into ``[metadata]``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from bkind3d.cameras.cameras import LARGEST_IMAGE, Cameras
from bkind3d.documents import broken_file, read_toml
from bkind3d.errors import InputError, shown
from bkind3d.files import write_text

_REQUIRED = ("name", "size", "matrix", "distortions", "rotation", "translation")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key that counts: cam_2 before cam_10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def load_toml(path: Path | str, units: str) -> Cameras:
    """Read an Anipose calibration; the cameras come in the natural order of their names.

    Args:
        path: the TOML file.
        units: length unit of its translations, "m", "cm", "mm" or "um" (the format does not say).

    Raises:
        InputError: the file cannot be read, a table lacks a key, a camera is a fisheye, or a value is impossible.
    """
    path = Path(path)
    tables = _read_tables(path)
    written = tables.get("metadata", {}).get("units", units)
    if written != units:
        raise InputError(
            f"{path}: its [metadata] says units {shown(written)}, but {units!r} was asked for; make them agree"
        )
    rows = [_camera_row(path, key, table) for key, table in tables.items() if _is_camera(table)]
    if not rows:
        raise InputError(f"{path}: no camera tables ([cam_0] with name, size, matrix, ...) found")
    rows.sort(key=lambda row: natural_key(row["names"]))
    stacked = {key: [row[key] for row in rows] for key in rows[0]}
    names = tuple(stacked.pop("names"))
    try:
        with broken_file("impossible cameras"):
            return Cameras(names=names, units=units, **{key: torch.tensor(np.stack(v)) for key, v in stacked.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save_toml(cameras: Cameras, path: Path | str) -> None:
    """Write an Anipose calibration that :func:`load_toml` reads back to the same cameras.

    Raises:
        InputError: the file cannot be written.
    """
    lines = []
    for index, name in enumerate(cameras.names):
        rotation = Rotation.from_matrix(cameras.rotation[index].numpy()).as_rotvec()
        lines += [
            f"[cam_{index}]",
            f"name = {json.dumps(name, ensure_ascii=False)}",
            f"size = {cameras.image_size[index].tolist()}",
            f"matrix = {cameras.intrinsics[index].tolist()}",
            f"distortions = {cameras.distortion[index].tolist()}",
            f"rotation = {rotation.tolist()}",
            f"translation = {cameras.translation[index].tolist()}",
            "fisheye = false",
            "",
        ]
    lines += ["[metadata]", f'units = "{cameras.units}"', ""]
    try:
        write_text(Path(path), "\n".join(lines))
    except OSError as error:
        raise InputError(f"{path}: the calibration cannot be written ({error.strerror})") from None


def _read_tables(path: Path) -> dict[str, Any]:
    return {key: table for key, table in read_toml(path).items() if isinstance(table, dict)}


def _is_camera(table: dict[str, Any]) -> bool:
    return any(key in table for key in ("matrix", "rotation", "translation"))


def _camera_row(path: Path, key: str, table: dict[str, Any]) -> dict[str, Any]:
    where = f"{path}: [{key}]"
    missing = [field for field in _REQUIRED if field not in table]
    if missing:
        raise InputError(f"{where} lacks {missing[0]!r}; expected {', '.join(_REQUIRED)}")
    if table.get("fisheye", False):
        raise InputError(f"{where} is a fisheye camera, whose lens model is not supported; calibrate it as a pinhole")
    distortion = _numbers(where, table, "distortions", (4,), (5,))
    rotation = _numbers(where, table, "rotation", (3,), (3, 3))
    if not np.isfinite(rotation).all():
        raise InputError(f"{where} (camera {shown(table['name'])}): rotation holds a value that is not a finite number")
    return {
        "names": _name(where, table["name"]),
        "image_size": _image_size(where, table),
        "intrinsics": _numbers(where, table, "matrix", (3, 3)),
        "distortion": np.pad(distortion, (0, 5 - len(distortion))),
        "rotation": Rotation.from_rotvec(rotation).as_matrix() if rotation.ndim == 1 else rotation,
        "translation": _numbers(where, table, "translation", (3,)),
    }


def _name(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise InputError(f"{where}: 'name' must be a text, not {shown(value)}")
    return str(value)


def _holds_truth(value: Any) -> bool:
    """Whether true or false stands where numbers belong: numpy takes them for 1 and 0."""
    return any(_holds_truth(item) for item in value) if isinstance(value, list) else isinstance(value, bool)


def _image_size(where: str, table: dict[str, Any]) -> np.ndarray:
    size = _numbers(where, table, "size", (2,))
    if not (np.abs(size) <= LARGEST_IMAGE).all() or (size != np.round(size)).any():
        raise InputError(
            f"{where}: 'size' must be two whole numbers up to {LARGEST_IMAGE}, width and height, not "
            f"{shown(table['size'])}"
        )
    return size.astype(np.int64)


def _numbers(where: str, table: dict[str, Any], field: str, *shapes: tuple[int, ...]) -> np.ndarray:
    expected = " or ".join("×".join(map(str, shape)) for shape in shapes)
    try:
        value = np.array(table[field], dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{where}: {field!r} must be {expected} numbers") from None
    if value.shape not in shapes or _holds_truth(table[field]):
        got = "×".join(map(str, value.shape)) or "one"
        raise InputError(f"{where}: {field!r} must be {expected} numbers, not {got}")
    return value
