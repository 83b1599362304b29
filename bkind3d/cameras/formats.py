"""Any calibration in: the format is recognised by the file's content, never by its name."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bkind3d.cameras.anipose import read_anipose, read_caliscope
from bkind3d.cameras.cameras import Cameras
from bkind3d.cameras.colmap import read_colmap
from bkind3d.cameras.jsons import read_h36m_json, read_json, refuse_nerfstudio
from bkind3d.cameras.lens import Calibration, Sizes
from bkind3d.cameras.matlab import read_dannce, read_h36m_hdf5, read_mat, read_rat7m
from bkind3d.cameras.opencv import parse_yaml, read_easymocap, read_jarvis
from bkind3d.cameras.qualisys import read_qualisys
from bkind3d.documents import json_of, toml_of
from bkind3d.errors import InputError, brief, reason
from bkind3d.foreign import is_hdf5

# How a file is laid out, and the readers of the formats that are laid out so. A reader gives None where a file is not
# of its format, and complains where it is and something is wrong in it.
READERS: dict[str, tuple[Callable[[Path, Any], Calibration | None], ...]] = {
    "TOML": (read_caliscope, read_anipose),
    "YAML": (read_jarvis, read_easymocap),
    "JSON": (read_h36m_json, read_json),
    "XML": (read_qualisys,),
    "MATLAB": (read_rat7m, read_h36m_hdf5, read_dannce),
    "text": (read_colmap,),
}
FORMATS = (
    "Anipose TOML (also of sleap-anipose, Pose2Sim, Caliscope)",
    "Caliscope's camera_array.toml",
    "OpenCV YAML (EasyMocap's intri.yml and extri.yml)",
    "JARVIS YAML",
    "DANNCE or Label3D .mat",
    "Rat7M .mat",
    "Qualisys .qca.txt",
    "COLMAP text",
    "Human3.6M's json or h5",
    "JSON",
)
_SUFFIXES = (".toml", ".yml", ".yaml", ".json", ".txt", ".xml", ".mat", ".h5")  # that are looked at in a folder
_LARGEST = 64 << 20  # bytes of a text that may be a calibration
_LONGEST_MESSAGE = 600
_PICKLE = b"\x80"


def load_calibration(path: Path | str, units: str | None = None, sizes: Sizes = None) -> Cameras:
    """Read a calibration of any known format; the cameras come in the natural order of their names.

    Args:
        path: the file, one of its files, or a folder that holds one calibration.
        units: length unit of its translations, "m", "cm", "mm" or "um", where the format does not say.
        sizes: (width, height) of the images, or a function that tells them of a camera's name, where it does not say.

    Raises:
        InputError: the file cannot be read, is of no known format, lacks a field, or a value is impossible.
    """
    return read_calibration(Path(path)).cameras(units, sizes)


def read_calibration(path: Path, subject: str | None = None) -> Calibration:
    """Read a calibration of any known format as it is, without units or sizes where the format has none.

    Args:
        path: the file, one of its files, or a folder that holds one calibration.
        subject: of a calibration of Human3.6M that has several, such as S1.

    Raises:
        InputError: as :func:`load_calibration`.
    """
    if path.is_dir():
        return _in_folder(path, subject)
    layout, content = _parse(path)
    found = _read(path, layout, content, subject)
    if found is None:
        broken = layout == "none" and content
        what = f"not a readable {path.suffix[1:].upper()} file ({content})" if broken else "not a calibration"
        raise InputError(f"{path}: {what}; those that are read are {', '.join(FORMATS)}")
    return found


def _in_folder(folder: Path, subject: str | None) -> Calibration:
    """The only calibration in a folder."""
    found: list[Calibration] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and path.is_file() and not any(path in one.files for one in found):
            calibration = _read(path, *_parse(path), subject)
            if calibration is not None:
                found.append(calibration)
    if len(found) > 1:
        names = ", ".join(one.files[0].name for one in found)
        raise InputError(f"{folder}: holds {len(found)} calibrations, {names}; name the one that is meant")
    if not found:
        raise InputError(f"{folder}: holds no calibration; those that are read are {', '.join(FORMATS)}")
    return found[0]


def _read(path: Path, layout: str, content: Any, subject: str | None) -> Calibration | None:
    if layout == "JSON":
        refuse_nerfstudio(path, content)
    if subject is not None and layout in ("JSON", "MATLAB"):
        content = _of_subject(path, content, subject)
    for read in READERS.get(layout, ()):
        try:
            found = read(path, content)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the calibration cannot be read ({reason(error)})") from None
        except ValueError as error:
            told = str(error) if isinstance(error, InputError) else f"{path}: the calibration cannot be read ({error})"
            raise InputError(brief(" ".join(told.split()), _LONGEST_MESSAGE)) from None  # it may quote the file
        if found is not None:
            return found
    return None


def _of_subject(path: Path, content: dict[str, Any], subject: str) -> dict[str, Any]:
    """A calibration of Human3.6M without its other subjects."""
    names = [*content.get("extrinsics", ()), *(name for name in content if name.startswith("subject"))]
    wanted = [name for name in names if name.replace("subject", "S") == subject]
    if not wanted:
        known = ", ".join(name.replace("subject", "S") for name in names)
        raise InputError(f"{path}: subject: has no cameras of {subject}, only of {known or 'no subject'}")
    if "extrinsics" in content:
        return {**content, "extrinsics": {subject: content["extrinsics"][subject]}}
    return {wanted[0]: content[wanted[0]]}


def _parse(path: Path) -> tuple[str, Any]:
    """How a file is laid out, and its content; ("none", what is wrong with it for its suffix) where it is no such file.

    Raises:
        InputError: the file cannot be read, or is a pickle.
    """
    try:
        with path.open("rb") as file:
            head = file.read(128)
        if head.startswith(b"MATLAB 5.0") or is_hdf5(path):
            return _parse_mat(path)
        if head.startswith(_PICKLE):
            raise InputError(
                f"{path}: a pickle (DeepLabCut, OpenCap) is not read, because reading one runs what is in it; "
                "write its matrices into a JSON file"
            )
        if b"\0" in head or path.stat().st_size > _LARGEST:
            return "none", ""
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the calibration cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        return "none", ""
    return _parse_text(path, text)


def _parse_mat(path: Path) -> tuple[str, Any]:
    try:
        return "MATLAB", read_mat(path)
    except ValueError as error:
        return "none", str(error)


def _parse_text(path: Path, text: str) -> tuple[str, Any]:
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    try:
        if start == "<":
            return "XML", ElementTree.fromstring(text)
        if start == "{":
            return "JSON", json_of(text)
        if text.startswith("%YAML") or suffix in (".yml", ".yaml"):
            return "YAML", parse_yaml(text)
        if suffix == ".toml":
            return "TOML", toml_of(text)
    except (ValueError, SyntaxError, RecursionError) as error:
        return "none", brief(" ".join(str(error).split()))
    try:
        return "TOML", toml_of(text)
    except (ValueError, RecursionError):
        return "text", text
