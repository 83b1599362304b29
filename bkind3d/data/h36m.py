"""Human3.6M (Ionescu et al., PAMI 2014), as ``h36m-fetch`` extracts it.

``<root>/S#/<Action>-#/annot.h5`` holds one row per camera and frame: ``camera``, ``frame`` (counted from 1, at 50 per
second), ``pose/3d`` (N, 32, 3), mm in that camera's frame, and ``pose/2d`` (N, 32, 2), pixels. The images are
``imageSequence/<camera>/img_%06d.jpg``, numbered by ``frame``; the extraction keeps only some of them. Cameras stand
elsewhere for each subject; their calibration comes in a file of its own, which is looked for in the root and above it:

- ``camera-parameters.json`` (github.com/karfly/human36m-camera-parameters): X_c = R X + t;
- ``cameras.h5`` (of "A simple yet effective baseline", Martinez et al. 2017): X_c = R (X - T), R laid out by columns.

The world is in mm, its z axis points up, the floor is at z = 0. The lens model of the data set's own code differs from
OpenCV's in the tangential terms of xy and x², by less than a pixel of 1000 at the corners; OpenCV's is used.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bkind3d.cameras import Calibration, Cameras, read_calibration
from bkind3d.data.images import read_image
from bkind3d.data.importing import Take, choose, write_takes
from bkind3d.data.index import Index
from bkind3d.data.project import Source
from bkind3d.data.truth import Truth
from bkind3d.data.volume import Triple
from bkind3d.documents import broken_file
from bkind3d.errors import InputError
from bkind3d.foreign import read_hdf5

TRAIN = ("S1", "S5", "S6", "S7", "S8")
TEST = ("S9", "S11")
FPS = 50.0
SIDE = 7500.0  # mm, of the paper's volume

# The 17 joints that the published code evaluates, by their place among the 32.
JOINTS = {
    "Hip": 0,
    "RHip": 1,
    "RKnee": 2,
    "RFoot": 3,
    "LHip": 6,
    "LKnee": 7,
    "LFoot": 8,
    "Spine": 12,
    "Thorax": 13,
    "Neck": 14,
    "Head": 15,
    "LShoulder": 17,
    "LElbow": 18,
    "LWrist": 19,
    "RShoulder": 25,
    "RElbow": 26,
    "RWrist": 27,
}
BONES = (
    "Hip-RHip RHip-RKnee RKnee-RFoot Hip-LHip LHip-LKnee LKnee-LFoot Hip-Spine Spine-Thorax Thorax-Neck Neck-Head "
    "Thorax-LShoulder LShoulder-LElbow LElbow-LWrist Thorax-RShoulder RShoulder-RElbow RElbow-RWrist"
)

_CALIBRATIONS = ("camera-parameters.json", "cameras.h5")
_KEYS = ("camera", "frame", "pose/2d", "pose/3d")
_AGREEMENT = 5.0  # mm that the cameras' joints may differ in the world
_REPROJECTION = 10.0  # px that joints may lie beside the annotated pixels, in the median


def h36m_project(
    root: Path,
    out: Path,
    *,
    subjects: list[str] | None = None,
    actions: list[str] | None = None,
    every: int = 1,
    gap: str | int = "0.4 s",
    calibration: Path | None = None,
    center: Triple | None = None,
    side: float = SIDE,
) -> Path:
    """Write a project of Human3.6M, whose images stay where they are.

    Subjects 1, 5, 6, 7 and 8 train, 9 and 11 test. A take that lacks a whole camera is left out, and said so: of the
    published files that is S11's Directions-2, whose video of camera 54138969 is corrupt.

    Args:
        root: folder with S1, S5, ...
        out: folder for the project, made when missing.
        subjects: such as S1 and S9; all that are there when left out.
        actions: such as Walking, or Walking-1 for one of its two takes; all when left out.
        every: distance in frames of the moments to keep, with their partners in training pairs.
        gap: distance of the two frames of a training pair, for the partners.
        calibration: camera-parameters.json or cameras.h5; looked for in the root and above it when left out.
        center: of the volume, mm; the point where the cameras' optical axes meet when left out.
        side: of the volume, mm.

    Returns:
        The path of ``project.yaml``.

    Raises:
        InputError: a folder, file or array is missing, the joints that cameras give of one moment disagree in the world
            or do not project to their pixels, nothing is left, or the project exists.
    """
    subjects = choose("subjects", subjects, (name for name in (*TRAIN, *TEST) if (root / name).is_dir()))
    if not subjects:
        raise InputError(f"{root}: holds none of the folders {', '.join((*TRAIN, *TEST))}")
    folders = [path.parent for subject in subjects for path in sorted((root / subject).glob("*/annot.h5"))]
    behaviours = sorted({_action(folder) for folder in folders})
    wanted = choose("actions", actions, [*behaviours, *sorted({folder.name for folder in folders})])
    calibration = _calibration(root, calibration)
    lenses: dict[str, Calibration] = {}
    takes, rigs = [], {}
    for folder in folders:
        subject = folder.parent.name
        if not {folder.name, _action(folder)} & set(wanted):
            continue
        if subject not in lenses:
            lenses[subject] = read_calibration(calibration, subject)
        annotation = _read_annotation(folder / "annot.h5")
        missing = [lens.name for lens in lenses[subject].lenses if lens.name not in annotation]
        if missing:
            print(f"left out: {folder}, which has nothing of camera {missing[0]}")
            continue
        with broken_file(f"{folder}: not a take of Human3.6M"):
            frames = _common_frames(folder, annotation)
            if subject not in rigs:
                rigs[subject] = _cameras(lenses[subject], folder, int(frames[0]))
            takes.append(_take(folder, rigs[subject], annotation, frames, behaviours).thinned(every, gap))
    if not takes:
        raise InputError(f"{root}: no take S#/<Action>-#/annot.h5 with all cameras is there")
    return write_takes(out, "Human3.6M", takes, rigs, center, side)


Annotation = dict[str, dict[str, np.ndarray]]  # camera -> frame (n,), 2d (n, 17, 2), 3d (n, 17, 3), by increasing frame


def _action(folder: Path) -> str:
    """Walking, of the folder Walking-1."""
    return re.sub(r"-\d+$", "", folder.name)


def _read_annotation(path: Path) -> Annotation:
    content = read_hdf5(path)
    camera, frame, pixels, points = (_numbers(path, key, content) for key in _KEYS)
    count = len(camera)
    if (camera.shape, frame.shape, pixels.shape, points.shape) != ((count,), (count,), (count, 32, 2), (count, 32, 3)):
        shapes = ", ".join(f"{key} {array.shape}" for key, array in zip(_KEYS, (camera, frame, pixels, points)))
        raise InputError(f"{path}: expected one row per camera and frame, with 32 joints, not {shapes}")
    joints = list(JOINTS.values())
    found = {}
    for number in np.unique(camera):
        rows = np.flatnonzero(camera == number)
        rows = rows[np.argsort(frame[rows], kind="stable")]
        found[str(number)] = {"frame": frame[rows], "2d": pixels[rows][:, joints], "3d": points[rows][:, joints]}
    return found


def _numbers(path: Path, key: str, content: Any) -> np.ndarray:
    """The array of numbers under a key such as pose/2d, with at least one axis."""
    for name in key.split("/"):
        content = content.get(name) if isinstance(content, dict) else None
    if content is None:
        raise InputError(f"{path}: lacks {key!r}; extract it with a current h36m-fetch")
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "iuf" or not content.ndim:
        raise InputError(f"{path}: {key} must be an array of numbers")
    return content


def _common_frames(folder: Path, annotation: Annotation) -> np.ndarray:
    """Numbers of the frames that all cameras have, increasing."""
    frames = reduce(np.intersect1d, (rows["frame"] for rows in annotation.values()))
    if not len(frames):
        raise InputError(f"{folder / 'annot.h5'}: the cameras have no frame in common")
    return frames


def _take(folder: Path, cameras: Cameras, annotation: Annotation, frames: np.ndarray, behaviours: list[str]) -> Take:
    rows = {camera: np.searchsorted(annotation[camera]["frame"], frames) for camera in cameras.names}
    points = np.stack([annotation[camera]["3d"][rows[camera]] for camera in cameras.names])
    pixels = np.stack([annotation[camera]["2d"][rows[camera]] for camera in cameras.names])
    names, bones = list(JOINTS), [bone.split("-") for bone in BONES.split()]
    subject = folder.parent.name
    images: dict[str, Source] = {
        camera: (folder / "imageSequence" / camera / "img_%06d.jpg").absolute() for camera in cameras.names
    }
    return Take(
        name=f"{subject}-{folder.name}",
        split="train" if subject in TRAIN else "test",
        rig=subject,
        videos=images,
        index=Index(cameras.names, np.repeat(frames[:, None], len(cameras), axis=1), frames, FPS),
        truth=Truth(
            points3d=_to_world(folder / "annot.h5", cameras, points, pixels),
            names=names,
            edges=np.array([[names.index(start), names.index(end)] for start, end in bones]),
            fps=FPS,
            behaviour=np.full(len(frames), behaviours.index(_action(folder))),
            behaviours=behaviours,
        ),
    )


def _to_world(path: Path, cameras: Cameras, points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Joints in the world (T, K, 3), X = Rᵀ (X_c - t), the mean of those that each camera gives (M, T, K, 3)."""
    rotation, translation = cameras.rotation.numpy(), cameras.translation.numpy()
    world = np.einsum("mji,mtkj->mtki", rotation, points - translation[:, None, None])
    mean = world.mean(0)
    apart = np.linalg.norm(world - mean, axis=-1).max(axis=(1, 2))
    worst = int(apart.argmax())
    if apart[worst] > _AGREEMENT:
        raise InputError(
            f"{path}: the joints of camera {cameras.names[worst]} lie up to {apart[worst]:.4g} mm beside those of the "
            "other cameras in the world; the calibration is of other cameras, or of another subject"
        )
    projected = cameras.project(torch.from_numpy(mean))[0].numpy()
    beside = np.median(np.linalg.norm(projected - pixels, axis=-1), axis=(1, 2))
    worst = int(beside.argmax())
    if beside[worst] > _REPROJECTION:
        raise InputError(
            f"{path}: in camera {cameras.names[worst]} the joints project {beside[worst]:.4g} px beside their "
            "annotated pixels; the calibration's intrinsics are of other images"
        )
    return mean


# --- calibration --------------------------------------------------------------------------------------------------


def _calibration(root: Path, path: Path | None) -> Path:
    """The file of the cameras."""
    if path is not None:
        return path
    places = [folder / name for folder in (root, root.absolute().parent) for name in _CALIBRATIONS]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"{root}: no {' or '.join(_CALIBRATIONS)} there or above; give it with --calibration")
    return found


def _cameras(calibration: Calibration, folder: Path, frame: int) -> Cameras:
    """The cameras, for images of the size that those of one frame have."""

    def size(camera: str) -> tuple[int, int]:
        image = read_image(folder / "imageSequence" / camera / f"img_{frame:06d}.jpg")
        return image.shape[1], image.shape[0]

    return calibration.cameras(sizes=size)
