"""TOML: Anipose's calibration (also sleap-anipose, Lightning Pose, Pose2Sim, Caliscope's export), in and out.

One table per camera: ``name``, ``size`` (width, height), ``matrix`` (K), ``distortions`` (k1 k2 p1 p2 [k3]),
``rotation`` (Rodrigues vector, or a 3 × 3 matrix), ``translation``, ``fisheye``. The format does not record units: the
caller names them, and ``save_toml`` writes them into ``[metadata]``. Caliscope's own ``camera_array.toml`` has the same
keys in ``[cameras.N]``, without names: its exports call them ``cam_N``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy.spatial.transform import Rotation

from bkind3d.cameras.cameras import Cameras
from bkind3d.cameras.lens import Calibration, Lens, read_lens
from bkind3d.errors import InputError
from bkind3d.files import write_text


def read_anipose(path: Path, content: dict[str, Any]) -> Calibration | None:
    """Anipose's tables; None where there are none."""
    tables = {key: table for key, table in content.items() if _is_camera(table)}
    if not tables:
        return None
    lenses = []
    for key, table in tables.items():
        where = f"{path}: [{key}]"
        if "name" not in table:
            raise InputError(f"{where} lacks 'name', by which cameras and videos are matched")
        lenses.append(_lens(where, str(table["name"]), table))
    metadata = content.get("metadata")
    units = metadata.get("units") if isinstance(metadata, dict) else None
    return Calibration((path,), "Anipose TOML", lenses, units)


def read_caliscope(path: Path, content: dict[str, Any]) -> Calibration | None:
    """Caliscope's own tables, but for cameras that it was told to ignore."""
    tables = content.get("cameras")
    if not isinstance(tables, dict) or not any(map(_is_camera, tables.values())):
        return None
    used = {key: table for key, table in tables.items() if isinstance(table, dict) and not table.get("ignore", False)}
    lenses = [_lens(f"{path}: [cameras.{key}]", f"cam_{key}", table) for key, table in used.items()]
    return Calibration((path,), "Caliscope TOML", lenses)


def save_toml(cameras: Cameras, path: Path | str) -> None:
    """Write an Anipose calibration that :func:`bkind3d.cameras.load_calibration` reads back to the same cameras.

    Raises:
        InputError: the file cannot be written.
    """
    lines = []
    for index, name in enumerate(cameras.names):
        rotation = Rotation.from_matrix(cameras.rotation[index].numpy()).as_rotvec()
        fisheye = bool(cameras.fisheye[index])
        lines += [
            f"[cam_{index}]",
            f"name = {json.dumps(name, ensure_ascii=False)}",
            f"size = {cameras.image_size[index].tolist()}",
            f"matrix = {cameras.intrinsics[index].tolist()}",
            f"distortions = {cameras.distortion[index, : 4 if fisheye else 5].tolist()}",
            f"rotation = {rotation.tolist()}",
            f"translation = {cameras.translation[index].tolist()}",
            f"fisheye = {json.dumps(fisheye)}",
            "",
        ]
    lines += ["[metadata]", f'units = "{cameras.units}"', ""]
    try:
        write_text(Path(path), "\n".join(lines))
    except OSError as error:
        raise InputError(f"{path}: the calibration cannot be written ({error.strerror})") from None


def _lens(where: str, name: str, table: dict[str, Any]) -> Lens:
    return read_lens(where, name, table, {"distortion": "distortions"}, fisheye=bool(table.get("fisheye", False)))


def _is_camera(table: Any) -> bool:
    return isinstance(table, dict) and any(key in table for key in ("matrix", "rotation", "translation"))
