"""Qualisys's calibration, ``.qca.txt`` (XML), in mm.

With M the printed matrix and C = (x, y, z): R = diag(1, -1, -1) M and t = -R C. Intrinsics are in 1/64 px of the whole
sensor, from which the field of view of the video is cut out; the distortion is OpenCV's. Cameras are named by their
serial numbers.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from bkind3d.cameras.lens import Calibration, Lens, read_lens
from bkind3d.errors import InputError

_SUBPIXELS = 64
_FLIP = np.diag([1.0, -1.0, -1.0])


def read_qualisys(path: Path, root: ElementTree.Element) -> Calibration | None:
    """The video cameras, or all where no camera says that it is one."""
    cameras = [camera for camera in root.iter("camera") if camera.find("transform") is not None]
    if not cameras:
        return None
    video = [camera for camera in cameras if "video" in camera.get("model", "").lower()]
    return Calibration((path,), "Qualisys .qca.txt", [_lens(path, camera) for camera in video or cameras], "mm")


def _lens(path: Path, camera: ElementTree.Element) -> Lens:
    name = camera.get("serial", "")

    def values(element: str, *keys: str) -> list[float]:
        found = camera.find(element)
        if found is None:
            raise InputError(f"{path}: camera {name!r} lacks <{element}>")
        try:
            return [float(found.attrib[key]) for key in keys]
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: camera {name!r}: <{element}> lacks a number ({error})") from None

    matrix = np.array(values("transform", *(f"r{i}{j}" for i in (1, 2, 3) for j in (1, 2, 3)))).reshape(3, 3)
    rotation = _FLIP @ matrix
    fx, fy, cx, cy, skew = values("intrinsic", "focalLengthU", "focalLengthV", "centerPointU", "centerPointV", "skew")
    left, top, size = 0.0, 0.0, None
    if camera.find("fov_video") is not None:
        left, top, right, bottom = values("fov_video", "left", "top", "right", "bottom")
        size = [right - left + 1, bottom - top + 1]
    k1, k2, k3 = values("intrinsic", *(f"radialDistortion{i}" for i in (1, 2, 3)))
    p1, p2 = values("intrinsic", "tangentalDistortion1", "tangentalDistortion2")
    scaled = np.array([[fx, skew, cx], [0, fy, cy], [0, 0, _SUBPIXELS]]) / _SUBPIXELS
    content = {
        "matrix": scaled - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]]),
        "distortion": [k1, k2, p1, p2, k3],
        "rotation": rotation,
        "translation": -rotation @ np.array(values("transform", "x", "y", "z")),
        "size": size,
    }
    return read_lens(f"{path}", name, content)
