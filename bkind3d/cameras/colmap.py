"""COLMAP's text model: ``cameras.txt`` and ``images.txt``, with one image of each camera.

World to camera, x_cam = R(qw, qx, qy, qz) X + t. COLMAP puts the centre of the first pixel at (0.5, 0.5), so that 0.5
is taken from the principal point. Its world has a scale of its own unless it was scaled to known distances.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from scipy.spatial.transform import Rotation

from bkind3d.cameras.lens import Calibration, Lens, read_lens
from bkind3d.errors import InputError

# Of each model, the names of its parameters in their order.
_MODELS = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fx fy cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fx fy cx cy k1 k2 p1 p2",
    "FULL_OPENCV": "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6",
    "OPENCV_FISHEYE": "fx fy cx cy k1 k2 k3 k4",
    "SIMPLE_RADIAL_FISHEYE": "f cx cy k1",
    "RADIAL_FISHEYE": "f cx cy k1 k2",
}
_PIXEL_CENTRE = 0.5

Camera = tuple[str, list[int], dict[str, float]]  # model, width and height, parameters


def is_colmap(text: str) -> bool:
    """Whether a text is one of the two files."""
    rows = _rows(text)
    fields = rows[0].split() if rows else []
    return text.startswith(("# Camera list with", "# Image list with")) or (len(fields) > 4 and fields[1] in _MODELS)


def read_colmap(path: Path, text: str) -> Calibration | None:
    """The pair that one of its files belongs to."""
    if not is_colmap(text):
        return None
    cameras_file, images_file = path.with_name("cameras.txt"), path.with_name("images.txt")
    for file in (cameras_file, images_file):
        if not file.is_file():
            raise InputError(f"{path}: is one of a pair cameras.txt and images.txt; {file.name} is not beside it")
    cameras = _cameras(cameras_file)
    # A pose and the image's points, which may be none, take turns.
    poses = [line.split(maxsplit=9) for line in _rows(images_file.read_text(encoding="utf-8"))[::2]]
    if any(len(pose) < 10 for pose in poses):
        raise InputError(f"{images_file}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME in every other line")
    names = _names(images_file, [pose[9] for pose in poses])
    lenses = [_lens(images_file, name, pose, cameras) for name, pose in zip(names, poses)]
    return Calibration((cameras_file, images_file), "COLMAP text", lenses)


def _rows(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def _cameras(path: Path) -> dict[str, Camera]:
    found: dict[str, Camera] = {}
    for line in filter(None, _rows(path.read_text(encoding="utf-8"))):
        number, model, *fields = line.split()
        if model not in _MODELS:
            raise InputError(f"{path}: camera {number} has the model {model}; read are {', '.join(_MODELS)}")
        keys = _MODELS[model].split()
        try:
            values = [float(field) for field in fields]
            found[number] = model, [int(values[0]), int(values[1])], dict(zip(keys, values[2:], strict=True))
        except (ValueError, IndexError):
            raise InputError(f"{path}: camera {number}: expected width, height, {', '.join(keys)}") from None
    return found


def _lens(path: Path, name: str, pose: list[str], cameras: dict[str, Camera]) -> Lens:
    if pose[8] not in cameras:
        raise InputError(f"{path}: image {pose[9]} is of camera {pose[8]}, which cameras.txt does not have")
    model, size, values = cameras[pose[8]]
    try:
        w, x, y, z, *translation = (float(field) for field in pose[1:8])
        rotation = Rotation.from_quat([x, y, z, w]).as_matrix()
    except ValueError as error:
        raise InputError(f"{path}: image {pose[9]}: not a pose ({error})") from None
    fx, fy = (values.get(key, values.get("f")) for key in ("fx", "fy"))
    fisheye = "FISHEYE" in model
    keys = ("k1", "k2", "k3", "k4") if fisheye else ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")
    content = {
        "matrix": [[fx, 0, values["cx"] - _PIXEL_CENTRE], [0, fy, values["cy"] - _PIXEL_CENTRE], [0, 0, 1]],
        "distortion": [values.get(key, 0.0) for key in keys],
        "rotation": rotation,
        "translation": translation,
        "size": size,
    }
    return read_lens(f"{path}", name, content, fisheye=fisheye)


def _names(path: Path, images: list[str]) -> list[str]:
    """Names of the cameras: those of the images, or of their folders where each has an image of the same name."""
    files = [PurePosixPath(image.replace("\\", "/")) for image in images]
    for names in ([file.stem for file in files], [file.parent.name for file in files]):
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{path}: one image of each camera is needed, cam0.png, ... or cam0/x.png, ...; remove the others")
