"""OpenCV's YAML: EasyMocap's pair ``intri.yml`` and ``extri.yml``, and JARVIS's file for each camera.

EasyMocap: ``names``, and for each name n ``K_n``, ``dist_n`` (or ``D_n``), ``R_n`` (Rodrigues vector) or ``Rot_n``
(matrix), ``T_n``, and sometimes ``H_n`` and ``W_n``.

JARVIS: ``<camera>.yaml`` with ``intrinsicMatrix``, ``distortionCoefficients``, ``R``, ``T``. It multiplies row vectors,
[u v w] = ([X Y Z] R + T) K, so that both matrices are the transposes of OpenCV's; T is in mm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bkind3d.cameras.lens import Calibration, Lens, read_lens
from bkind3d.documents import yaml_of
from bkind3d.errors import InputError

_JARVIS = {
    "matrix": "intrinsicMatrix",
    "distortion": "distortionCoefficients",
    "rotation": "R",
    "translation": "T",
}


class _Loader(yaml.SafeLoader):
    """YAML as OpenCV's FileStorage writes it."""


def _matrix(loader: yaml.SafeLoader, node: yaml.MappingNode) -> np.ndarray:
    content = loader.construct_mapping(node, deep=True)
    return np.array(content["data"], dtype=np.float64).reshape(int(content["rows"]), int(content["cols"]))


_Loader.add_constructor("tag:yaml.org,2002:opencv-matrix", _matrix)


def parse_yaml(text: str) -> dict[str, Any]:
    """A YAML file, of OpenCV or not, as a dictionary.

    Raises:
        ValueError: it is none.
    """
    try:
        content = yaml_of(text.removeprefix("%YAML:1.0"), _Loader)  # the directive is OpenCV's own
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(content, dict):
        raise ValueError("no mapping")
    return {str(key): value for key, value in content.items()}


def read_easymocap(path: Path, content: dict[str, Any]) -> Calibration | None:
    """The pair that one of its files, whose name has intri or extri in it, belongs to."""
    if not any(key.startswith(("K_", "Rot_", "R_")) for key in content):
        return None
    other = path.with_name(path.name.replace("intri", "extri"))
    if other == path:
        other = path.with_name(path.name.replace("extri", "intri"))
    if other == path or not other.is_file():
        raise InputError(f"{path}: is one of a pair intri.yml and extri.yml; the other one is not beside it")
    try:
        both = {**content, **parse_yaml(other.read_text(encoding="utf-8"))}
    except (OSError, ValueError) as error:
        raise InputError(f"{other}: not an OpenCV YAML file ({error})") from None
    names = [key.removeprefix("K_") for key in both if key.startswith("K_")]
    if not names:
        raise InputError(f"{path}: neither it nor {other.name} has a matrix K_<camera>")
    return Calibration((path, other), "OpenCV YAML (EasyMocap)", [_easymocap(path, name, both) for name in names])


def _easymocap(path: Path, name: str, content: dict[str, Any]) -> Lens:
    fields: dict[str, Any] = {key: content.get(key) for key in (f"K_{name}", f"T_{name}")}
    rotation = f"R_{name}" if f"R_{name}" in content else f"Rot_{name}"
    distortion = f"dist_{name}" if f"dist_{name}" in content else f"D_{name}"
    width, height = content.get(f"W_{name}"), content.get(f"H_{name}")
    fields |= {rotation: content.get(rotation), distortion: content.get(distortion)}
    fields["W, H"] = None if width is None or height is None else [width, height]
    keys = {"matrix": f"K_{name}", "distortion": distortion, "rotation": rotation, "translation": f"T_{name}"}
    return read_lens(f"{path}", name, fields, {**keys, "size": "W, H"})


def read_jarvis(path: Path, content: dict[str, Any]) -> Calibration | None:
    """The cameras of all files beside one of them."""
    if "intrinsicMatrix" not in content:
        return None
    files, lenses = [], []
    for file in sorted(path.parent.glob("*.y*ml")):
        try:
            fields = content if file == path else parse_yaml(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # another file of the folder
            continue
        if "intrinsicMatrix" in fields:
            files.append(file)
            lenses.append(read_lens(f"{file}", file.stem, fields, _JARVIS, transposed=True))
    return Calibration(tuple(files), "JARVIS YAML", lenses, "mm")
