"""Calibration files in the layouts that other tools write, from one rig in OpenCV's conventions.

Each writer puts down what that tool's own code projects with, worked out here by hand: row vectors, centres, pixels
counted from 1. ``wrong`` names one mistake of convention, so that the file says what a mistaken reader would take the
right one for: "transpose" (of R), "sign" (of t), "centre" (in place of t), "pixel" (where the first one's centre is).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import scipy.io
from scipy.spatial.transform import Rotation
from small_rig import DISTORTION, ring

from bkind3d.cameras import Cameras

SIZE = (640, 480)


@dataclass
class Pose:
    """One camera for OpenCV: K, dist (k1 k2 p1 p2 k3), R, t of x_cam = R X + t."""

    name: str
    K: np.ndarray
    dist: np.ndarray
    R: np.ndarray
    t: np.ndarray
    size: tuple[int, int] = SIZE

    def mistaken(self, wrong: str) -> Pose:
        """The pose as a reader that mistakes R or t takes it."""
        center = -self.R.T @ self.t
        R = self.R.T if wrong == "transpose" else self.R
        t = {"sign": -self.t, "centre": center}.get(wrong, self.t)
        return Pose(self.name, self.K, self.dist, R, t, self.size)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixels (P, 2) of world points (P, 3), by OpenCV where K has no skew, and by its formula where it has."""
        straight = np.eye(3)
        rays, _ = cv2.projectPoints(points, cv2.Rodrigues(self.R)[0], self.t, straight, self.dist)
        return np.c_[rays[:, 0], np.ones(len(points))] @ self.K[:2].T


def rig(names: tuple[str, ...], skew: float = 0.0, units: str = "mm", distortion: tuple = DISTORTION) -> list[Pose]:
    """Cameras on a circle of 1.5 m, each its own lens."""
    cameras: Cameras = ring(len(names), SIZE, radius=1500.0, skew=skew, units=units)
    poses = []
    for place, name in enumerate(names):
        K = cameras.intrinsics[place].numpy().copy()
        K[:2, 2] += place
        dist = np.array(distortion) * (1 + 0.1 * place)
        poses.append(Pose(name, K, dist, cameras.rotation[place].numpy(), cameras.translation[place].numpy()))
    return poses


def anipose(folder: Path, poses: list[Pose], wrong: str = "", fields: int = 5) -> Path:
    """As aniposelib's CameraGroup.dump writes it; Pose2Sim writes four distortions."""
    text = ""
    for place, pose in enumerate(pose.mistaken(wrong) for pose in poses):
        text += f"[cam_{place}]\nname = {json.dumps(pose.name)}\nsize = {[float(side) for side in pose.size]}\n"
        text += f"matrix = {pose.K.tolist()}\ndistortions = {pose.dist[:fields].tolist()}\n"
        text += f"rotation = {cv2.Rodrigues(pose.R)[0].ravel().tolist()}\ntranslation = {pose.t.tolist()}\n\n"
    path = folder / "calibration.toml"
    path.write_text(text + "[metadata]\nadjusted = false\nerror = 0.0\n")
    return path


def pose2sim(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    path = anipose(folder, poses, wrong, fields=4)
    return path.rename(folder / "Calib_scene.toml")


def caliscope(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """camera_array.toml, with a camera that was told to be ignored."""
    text = "[cameras.9]\ncam_id = 9\nsize = [640, 480]\nignore = true\nrotation_count = 0\n\n"
    for pose in (pose.mistaken(wrong) for pose in poses):
        key = pose.name.removeprefix("cam_")
        text += f"[cameras.{key}]\ncam_id = {key}\nrotation_count = 0\nerror = 0.19\nexposure = -7.0\ngrid_count = 24\n"
        text += f"ignore = false\nsize = {list(pose.size)}\nmatrix = {pose.K.tolist()}\n"
        text += f"distortions = {pose.dist.tolist()}\n"
        text += f"translation = {pose.t.tolist()}\nrotation = {cv2.Rodrigues(pose.R)[0].ravel().tolist()}\n\n"
    path = folder / "camera_array.toml"
    path.write_text(text)
    return path


def easymocap(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """As OpenCV's own FileStorage writes it."""
    intri = cv2.FileStorage(str(folder / "intri.yml"), cv2.FILE_STORAGE_WRITE)
    extri = cv2.FileStorage(str(folder / "extri.yml"), cv2.FILE_STORAGE_WRITE)
    for file in (intri, extri):
        file.startWriteStruct("names", cv2.FileNode_SEQ)
        for pose in poses:
            file.write("", pose.name)
        file.endWriteStruct()
    for pose in (pose.mistaken(wrong) for pose in poses):
        intri.write(f"K_{pose.name}", pose.K)
        intri.write(f"dist_{pose.name}", pose.dist[None])
        extri.write(f"R_{pose.name}", cv2.Rodrigues(pose.R)[0])
        extri.write(f"Rot_{pose.name}", pose.R)
        extri.write(f"T_{pose.name}", pose.t[:, None])
    intri.release()
    extri.release()
    return folder / "intri.yml"


def jarvis(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """A file for each camera, matrices for row vectors."""
    for pose in (pose.mistaken(wrong) for pose in poses):
        file = cv2.FileStorage(str(folder / f"{pose.name}.yaml"), cv2.FILE_STORAGE_WRITE)
        file.write("intrinsicMatrix", np.ascontiguousarray(pose.K.T))
        file.write("distortionCoefficients", pose.dist[None])
        file.write("R", np.ascontiguousarray(pose.R.T))
        file.write("T", pose.t[:, None])
        file.release()
    return folder


def _dannce(poses: list[Pose], wrong: str) -> list[dict[str, np.ndarray]]:
    """Structs for row vectors, [u v w] = ([X Y Z] r + t) K."""
    return [
        {
            "K": pose.K.T,
            "RDistort": pose.dist[[0, 1, 4]][None],
            "TDistort": pose.dist[2:4][None],
            "r": pose.R.T,
            "t": pose.t[None],
        }
        for pose in (pose.mistaken(wrong) for pose in poses)
    ]


def _cell(items: list[Any]) -> np.ndarray:
    cell = np.empty((len(items), 1), dtype=object)
    cell[:, 0] = items
    return cell


def dannce(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    path = folder / "label3d_dannce.mat"
    content = {"params": _cell(_dannce(poses, wrong)), "camnames": _cell([pose.name for pose in poses])}
    scipy.io.savemat(path, {**content, "labelData": np.zeros((3, 3))})
    return path


def label3d(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """A saved session: no names, and heights before widths."""
    path = folder / "session.mat"
    sizes = np.array([pose.size[::-1] for pose in poses], dtype=float)
    scipy.io.savemat(path, {"camParams": _cell(_dannce(poses, wrong)), "imageSize": sizes, "status": np.zeros((2, 2))})
    return path


def hires(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """A file for each camera."""
    for place, params in enumerate(_dannce(poses, wrong), start=1):
        scipy.io.savemat(folder / f"hires_cam{place}_params.mat", params)
    return folder / "hires_cam2_params.mat"


def dannce73(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """HDF5 behind MATLAB's header: arrays with their axes reversed, cells as references, text as numbers."""
    path = folder / "label3d_dannce.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        kept = file.create_group("#refs#")
        structs, names = [], []
        for place, (pose, params) in enumerate(zip(poses, _dannce(poses, wrong))):
            group = kept.create_group(f"s{place}")
            for key, value in params.items():
                group.create_dataset(key, data=np.asarray(value).T)
            text = kept.create_dataset(f"n{place}", data=np.array([[ord(letter)] for letter in pose.name], np.uint16))
            structs.append(group.ref)
            names.append(text.ref)
        for key, references in (("params", structs), ("camnames", names)):
            file.create_dataset(key, data=np.array([references], dtype=object), dtype=h5py.ref_dtype)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


def rat7m(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    path = folder / "mocap-s1-d1.mat"
    lenses = {}
    for pose in (pose.mistaken(wrong) for pose in poses):
        K = pose.K.T.copy()
        K[2, :2] += 0 if wrong == "pixel" else 1  # the first pixel's centre is (1, 1)
        lenses[pose.name] = {
            "IntrinsicMatrix": K,
            "rotationMatrix": pose.R.T,
            "translationVector": pose.t[None],
            "RadialDistortion": pose.dist[[0, 1, 4]][None],
            "TangentialDistortion": pose.dist[2:4][None],
            "frame": np.arange(9),
        }
    scipy.io.savemat(path, {"cameras": lenses, "mocap": {"HeadF": np.zeros((9, 3))}}, long_field_names=True)
    return path


def qualisys(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """QTM's XML beside a marker camera; the video is a part of the sensor."""
    left, top = 16, 8
    cameras = '<camera serial="1" model="Miqus M3"><transform x="0" y="0" z="0" r11="1"/></camera>'
    for pose in (pose.mistaken(wrong) for pose in poses):
        x, y, z = -pose.R.T @ pose.t
        printed = np.diag([1.0, -1.0, -1.0]) @ pose.R
        turned = " ".join(f'r{i + 1}{j + 1}="{float(printed[i, j])!r}"' for i in range(3) for j in range(3))
        k1, k2, p1, p2, k3 = pose.dist
        cx, cy = pose.K[:2, 2] + (0 if wrong == "pixel" else np.array([left, top]))
        cameras += (
            f'<camera serial="{pose.name}" model="Miqus Video"><fov_video left="{left}" top="{top}" '
            f'right="{left + pose.size[0] - 1}" bottom="{top + pose.size[1] - 1}"/>'
            f'<transform x="{x}" y="{y}" z="{z}" {turned}/><intrinsic focalLengthU="{64 * pose.K[0, 0]}" '
            f'focalLengthV="{64 * pose.K[1, 1]}" centerPointU="{64 * cx}" centerPointV="{64 * cy}" '
            f'skew="{64 * pose.K[0, 1]}" radialDistortion1="{k1}" radialDistortion2="{k2}" radialDistortion3="{k3}" '
            f'tangentalDistortion1="{p1}" tangentalDistortion2="{p2}"/></camera>'
        )
    path = folder / "Calib.qca.txt"
    path.write_text(f'<calibration calibrated="true"><cameras>{cameras}</cameras></calibration>')
    return path


def colmap(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """One image of each camera, an image without points among them."""
    cameras = "# Camera list with one line of data per camera:\n#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"
    images = "# Image list with two lines of data per image:\n#   IMAGE_ID, QW, ...\n"
    half = 0.0 if wrong == "pixel" else 0.5  # the first pixel's centre is (0.5, 0.5)
    for place, pose in enumerate((pose.mistaken(wrong) for pose in poses), start=1):
        x, y, z, w = Rotation.from_matrix(pose.R).as_quat().tolist()
        lens = [pose.K[0, 0], pose.K[1, 1], pose.K[0, 2] + half, pose.K[1, 2] + half, *pose.dist[:4]]
        cameras += f"{place} OPENCV {pose.size[0]} {pose.size[1]} {' '.join(map(repr, map(float, lens)))}\n"
        numbers = " ".join(map(repr, [w, x, y, z, *pose.t.tolist()]))
        images += f"{place} {numbers} {place} images/{pose.name}.png\n" + ("12.5 3.5 -1\n" if place > 1 else "\n")
    (folder / "cameras.txt").write_text(cameras)
    (folder / "images.txt").write_text(images)
    return folder / "images.txt"


def h36m(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """camera-parameters.json, of two subjects."""
    lenses = {pose.name: {"calibration_matrix": pose.K.tolist(), "distortion": pose.dist.tolist()} for pose in poses}
    turned = [pose.mistaken(wrong) for pose in poses]
    right = {pose.name: {"R": pose.R.tolist(), "t": pose.t[:, None].tolist()} for pose in turned}
    other = {pose.name: {"R": np.eye(3).tolist(), "t": [[0], [0], [9]]} for pose in poses}
    path = folder / "camera-parameters.json"
    path.write_text(json.dumps({"intrinsics": lenses, "extrinsics": {"S1": other, "S5": right}}))
    return path


def h36m_hdf5(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    """cameras.h5: by columns, and C in place of t."""
    path = folder / "cameras.h5"
    with h5py.File(path, "w") as file:
        for place, pose in enumerate((pose.mistaken(wrong) for pose in poses), start=1):
            group = file.create_group(f"subject5/camera{place}")
            fields = {
                "R": pose.R.T,
                "T": (-pose.R.T @ pose.t)[None],
                "f": pose.K[[0, 1], [0, 1]][None],
                "c": pose.K[:2, 2][None],
                "k": pose.dist[[0, 1, 4]][None],
                "p": pose.dist[2:4][None],
                "Name": np.array([[ord(letter)] for letter in pose.name], np.uint16),
            }
            for key, value in fields.items():
                group[key] = value
    return path


def plain_json(folder: Path, poses: list[Pose], wrong: str = "") -> Path:
    rows = [
        {
            "name": pose.name,
            "size": list(pose.size),
            "K": pose.K.tolist(),
            "dist": pose.dist.tolist(),
            "R": pose.R.tolist(),
            "t": pose.t.tolist(),
        }
        for pose in (pose.mistaken(wrong) for pose in poses)
    ]
    path = folder / "calibration.json"
    path.write_text(json.dumps({"units": "mm", "cameras": rows}))
    return path


@dataclass(frozen=True)
class Layout:
    """How a tool writes its calibration, and what of a rig it can hold."""

    write: Callable[..., Path]
    format: str
    names: tuple[str, ...] = ("cam_0", "cam_1", "cam_10")
    skew: float = 0.0
    sized: bool = True
    units: str | None = None
    last: bool = True  # k3
    subject: str | None = None
    wrongs: tuple[str, ...] = ("transpose", "sign", "centre")


LAYOUTS = {
    "anipose": Layout(anipose, "Anipose TOML", ("side", "top", "zoom"), skew=2.0),
    "pose2sim": Layout(pose2sim, "Anipose TOML", last=False),
    "caliscope": Layout(caliscope, "Caliscope TOML"),
    "easymocap": Layout(easymocap, "OpenCV YAML (EasyMocap)", ("01", "2", "10"), sized=False),
    "jarvis": Layout(jarvis, "JARVIS YAML", ("Camera_B", "Camera_T", "Camera_U"), sized=False, units="mm"),
    "dannce": Layout(dannce, "DANNCE .mat", ("Camera1", "Camera2", "Camera3"), skew=3.0, sized=False),
    "dannce73": Layout(dannce73, "DANNCE .mat", ("Camera1", "Camera2", "Camera3"), skew=3.0, sized=False),
    "hires": Layout(hires, "DANNCE .mat", ("Camera1", "Camera2", "Camera3"), skew=3.0, sized=False),
    "label3d": Layout(label3d, "DANNCE .mat", ("Camera1", "Camera2", "Camera3"), skew=3.0),
    "rat7m": Layout(
        rat7m,
        "Rat7M .mat",
        ("Camera1", "Camera2", "Camera3"),
        skew=3.0,
        sized=False,
        units="mm",
        wrongs=("transpose", "sign", "centre", "pixel"),
    ),
    "qualisys": Layout(
        qualisys,
        "Qualisys .qca.txt",
        ("26578", "26579", "26580"),
        skew=2.0,
        units="mm",
        wrongs=("transpose", "sign", "centre", "pixel"),
    ),
    "colmap": Layout(colmap, "COLMAP text", last=False, wrongs=("transpose", "sign", "centre", "pixel")),
    "h36m": Layout(h36m, "Human3.6M", ("54138969", "55011271", "58860488"), sized=False, units="mm", subject="S5"),
    "h36m_hdf5": Layout(
        h36m_hdf5, "Human3.6M", ("54138969", "55011271", "58860488"), sized=False, units="mm", subject="S5"
    ),
    "json": Layout(plain_json, "JSON", skew=2.0, units="mm"),
}
