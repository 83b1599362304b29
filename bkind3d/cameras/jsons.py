"""JSON: plain cameras, Human3.6M's ``camera-parameters.json``; and what no cameras of a rig can be read from.

Plain: ``cameras`` is a list of objects ``name``, ``size`` (width, height), ``K``, ``dist`` (k1 k2 p1 p2 [k3]), ``R``,
``t`` of x_cam = R X + t and ``fisheye``, or an object of them by their names; ``units`` stands beside it. ``size_wh``
and ``resolution`` are read as ``size``, ``distCoef`` as ``dist``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkind3d.cameras.lens import Calibration, one_subject, read_lens
from bkind3d.errors import InputError

_ALIASES = {"size_wh": "size", "resolution": "size", "distCoef": "dist"}


def read_json(path: Path, content: dict[str, Any]) -> Calibration | None:
    """Plain cameras."""
    rows = content.get("cameras")
    if isinstance(rows, dict):
        rows = [{"name": name, **row} for name, row in rows.items() if isinstance(row, dict)]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "K" in row for row in rows):
        return None
    lenses = []
    for place, row in enumerate(rows):
        if "name" not in row:
            raise InputError(f"{path}: cameras[{place}] lacks 'name', by which cameras and videos are matched")
        fields = {_ALIASES.get(key, key): value for key, value in row.items()}
        keys = {"matrix": "K", "distortion": "dist", "rotation": "R", "translation": "t"}
        fisheye = bool(row.get("fisheye", False))
        lenses.append(read_lens(f"{path}", str(row["name"]), fields, keys, fisheye=fisheye))
    return Calibration((path,), "JSON", lenses, content.get("units"))


def read_h36m_json(path: Path, content: dict[str, Any]) -> Calibration | None:
    """The only subject of a file."""
    intrinsics, extrinsics = content.get("intrinsics"), content.get("extrinsics")
    if not isinstance(intrinsics, dict) or not isinstance(extrinsics, dict):
        return None
    poses = one_subject(path, extrinsics)
    keys = {"matrix": "calibration_matrix", "rotation": "R", "translation": "t"}
    try:
        lenses = [read_lens(f"{path}", name, {**intrinsics[name], **pose}, keys) for name, pose in poses.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the cameras of Human3.6M ({error})") from None
    return Calibration((path,), "Human3.6M", lenses, "mm")


def refuse_nerfstudio(path: Path, content: dict[str, Any]) -> None:
    """nerfstudio's transforms.json holds the path of one camera, in a world without a length."""
    if isinstance(content.get("frames"), list) and "transform_matrix" in str(content["frames"][:1]):
        raise InputError(
            f"{path}: nerfstudio's transforms.json is not read: its world is centred and scaled to no unit; "
            "convert the COLMAP model that it was made from"
        )
