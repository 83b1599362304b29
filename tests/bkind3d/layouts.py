"""Small files in exactly the layouts of Human3.6M and Rat7M, made from a known scene by formulas of their own.

Nothing here uses the package: cameras are built in the convention of each data set, points are projected as that data
set's own code does it, and each of three joints is a bright Gaussian blob in one colour channel, at its projection.
A ``wrong`` variant writes a file as a reader with that mistake would take the right one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import scipy.io
from PIL import Image

WIDTH, HEIGHT = 160, 128
SIGMA = 3.0  # px, of a blob

MARKERS = (
    "HeadF", "HeadB", "HeadL", "SpineF", "SpineM", "SpineL", "Offset1", "Offset2", "HipL", "HipR", "ElbowL", "ArmL",
    "ShoulderL", "ShoulderR", "ElbowR", "ArmR", "KneeR", "KneeL", "ShinL", "ShinR",
)  # fmt: skip
DRAWN = ("HeadF", "SpineM", "KneeR")  # in the red, green and blue channel
H36M_DRAWN = {"Hip": 0, "LWrist": 19, "Head": 15}  # of the 32 joints
H36M_CAMERAS = ("54138969", "55011271", "58860488", "60457274")


def joints(count: int, moments: np.ndarray, reach: float, height: float) -> np.ndarray:
    """Positions (T, count, 3) at any moment: each joint runs on its own ellipse, far in a frame."""
    phase = 2 * np.pi * np.arange(count) / count
    turn = 0.35 * np.asarray(moments, dtype=float)[:, None] + phase
    wave = np.cos(0.23 * np.asarray(moments, dtype=float)[:, None] + 2 * phase)
    return np.stack([reach * np.cos(turn), 0.8 * reach * np.sin(turn), height + 0.3 * reach * wave], axis=-1)


def picture(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 with a blob in each channel at pixels (3, 2), the first pixel's centre being (0, 0)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    distance = (columns[..., None] - pixels[:, 0]) ** 2 + (rows[..., None] - pixels[:, 1]) ** 2
    return np.rint(250 * np.exp(-distance / (2 * SIGMA**2))).astype(np.uint8)


def axes_of(center: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The camera's right, down and forward directions in the world, as rows."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


# --- Rat7M --------------------------------------------------------------------------------------------------------


@dataclass
class MatlabCamera:
    """A camera as MATLAB's calibration gives it, for row vectors and pixels from (1, 1)."""

    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    radial: np.ndarray
    tangential: np.ndarray

    def worldToImage(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) to pixels (..., 2) counted from 1: [x y 1] K of the distorted [x y], from [X Y Z] R + t."""
        seen = points @ self.R + self.t
        x, y = seen[..., 0] / seen[..., 2], seen[..., 1] / seen[..., 2]
        r2 = x**2 + y**2
        alpha = self.radial[0] * r2 + self.radial[1] * r2**2
        p1, p2 = self.tangential
        distorted = np.stack(
            [
                x + x * alpha + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
                y + y * alpha + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
                np.ones_like(x),
            ],
            axis=-1,
        )
        return (distorted @ self.K)[..., :2]


def matlab_camera(number: int, session: str) -> MatlabCamera:
    """Six numbers, no two cameras alike; each session has its own."""
    rng = np.random.default_rng([number, *session.encode()])
    angle = 1.1 * number + rng.uniform(-0.2, 0.2)
    center = np.array([1100 * np.cos(angle), 1100 * np.sin(angle), 500 + 90 * number])
    axes = axes_of(center, np.array([20.0, -10.0, 60.0]))
    focal = 150 + 5 * number
    return MatlabCamera(
        K=np.array([[focal, 0, 0], [1.5, 1.04 * focal, 0], [WIDTH / 2 + 3 + rng.uniform(-2, 2), HEIGHT / 2 - 4, 1.0]]),
        R=axes.T,
        t=-center @ axes.T,
        radial=np.array([-0.12, 0.03]) + rng.uniform(-0.01, 0.01, 2),
        tangential=rng.uniform(-0.004, 0.004, 2),
    )


@dataclass
class Rat7M:
    """A written data set: positions (F, 20, 3), frames (F, M) and the content of the .mat file by session."""

    root: Path
    content: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: dict[str, np.ndarray] = field(default_factory=dict)
    frames: dict[str, np.ndarray] = field(default_factory=dict)


def write_rat7m_layout(
    root: Path,
    sessions: tuple[str, ...] = ("s1-d1", "s5-d1"),
    moments: int = 14,
    cameras: int = 3,
    chunk: int = 5,
    wrong: str = "",
) -> Rat7M:
    """Sessions of ``moments`` rows; camera m starts late and drops a frame of its own.

    ``wrong``: "K", "R", "t", "pixel", "late", "frame" or "" for how a mistaken reader would take the file.
    """
    written = Rat7M(root)
    for session in sessions:
        rows = np.arange(moments)
        points = joints(len(MARKERS), rows, 260.0, 120.0)
        lenses: dict[str, Any] = {}
        columns = []
        # The struct's order is not that of the numbers, as in the published files.
        for number in [*range(1, cameras + 1, 2), *range(2, cameras + 1, 2)]:
            camera = matlab_camera(number, session)
            frame = rows + 2 * number + (rows > 3 * number)  # starts late; after row 3 m a frame without a row
            film = _film(camera, points[:, [MARKERS.index(name) for name in DRAWN]], frame)
            write_chunks(root / session / f"{session}-camera{number}", film, chunk)
            lenses[f"Camera{number}"] = _lens(camera, frame, wrong, first=rows + 2 + (rows > 3))
            columns.append(frame)
        unknown = points.copy()
        unknown[1, 2] = np.nan  # HeadL, which is not drawn
        written.points[session], written.frames[session] = unknown, np.stack(columns, axis=1)
        written.content[session] = {
            "cameras": lenses,
            "mocap": {name: unknown[:, k] for k, name in enumerate(MARKERS)},
        }
        write_mat5(root / f"mocap-{session}.mat", written.content[session])
    return written


def _film(camera: MatlabCamera, points: np.ndarray, frame: np.ndarray) -> list[np.ndarray]:
    """Frames 0 ... of a camera: what no row asks for is a picture with its blobs elsewhere."""
    film = [picture(np.array([[20.0, 20.0], [90.0, 30.0], [50.0, 100.0]]))] * (frame[-1] + 2)
    for number, moment in zip(frame.tolist(), points):
        film[number] = picture(camera.worldToImage(moment) - 1)
    return film


def _lens(camera: MatlabCamera, frame: np.ndarray, wrong: str, first: np.ndarray) -> dict[str, np.ndarray]:
    K = camera.K.copy()
    if wrong == "pixel":
        K[2, :2] += 1  # a reader that takes nothing from the principal point
    return {
        "IntrinsicMatrix": K.T if wrong == "K" else K,
        "rotationMatrix": camera.R.T if wrong == "R" else camera.R,
        "translationVector": (-camera.t if wrong == "t" else camera.t)[None],
        "TangentialDistortion": camera.tangential[None],
        "RadialDistortion": camera.radial[None],
        "frame": (first if wrong == "frame" else frame + (wrong == "late"))[None].astype(np.int32),
    }


def write_mat5(path: Path, content: dict[str, Any]) -> None:
    scipy.io.savemat(path, content, long_field_names=True)


def write_mat73(path: Path, content: dict[str, Any]) -> None:
    """HDF5 behind MATLAB's 512 bytes of header, arrays with their axes reversed."""

    def put(group: h5py.Group, items: dict[str, Any]) -> None:
        for name, item in items.items():
            if isinstance(item, dict):
                group.create_group(name).attrs["MATLAB_class"] = np.bytes_("struct")
                put(group[name], item)
            else:
                group.create_dataset(name, data=item.T).attrs["MATLAB_class"] = np.bytes_("double")

    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_group("#refs#")
        put(file, content)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def write_chunks(stem: Path, film: list[np.ndarray], chunk: int) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(film), chunk):
        with av.open(f"{stem}-{start}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(30), options={"crf": "3", "preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv444p"
            for frame in film[start : start + chunk]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


# --- Human3.6M ----------------------------------------------------------------------------------------------------


@dataclass
class H36MCamera:
    """A camera of Human3.6M: X_c = R (X - T)."""

    R: np.ndarray
    T: np.ndarray
    f: np.ndarray
    c: np.ndarray
    k: np.ndarray
    p: np.ndarray

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        return np.einsum("ij,...j->...i", self.R, points - self.T)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World (..., 3) to pixels (..., 2), with OpenCV's lens model as human36m-camera-parameters names it."""
        x, y, z = np.moveaxis(self.to_camera(points), -1, 0)
        x, y = x / z, y / z
        r2 = x**2 + y**2
        radial = 1 + self.k[0] * r2 + self.k[1] * r2**2 + self.k[2] * r2**3
        u = x * radial + 2 * self.p[0] * x * y + self.p[1] * (r2 + 2 * x**2)
        v = y * radial + self.p[0] * (r2 + 2 * y**2) + 2 * self.p[1] * x * y
        return np.stack([self.f[0] * u + self.c[0], self.f[1] * v + self.c[1]], axis=-1)


def h36m_camera(number: int, subject: str) -> H36MCamera:
    """Intrinsics of the camera, extrinsics of camera and subject."""
    lens, pose = np.random.default_rng(number), np.random.default_rng([number, *subject.encode()])
    angle = 0.6 + np.pi / 2 * number + pose.uniform(-0.1, 0.1)
    center = np.array([5200 * np.cos(angle), 5200 * np.sin(angle), 1550 + pose.uniform(-60, 60)])
    return H36MCamera(
        R=axes_of(center, np.array([60.0, 340.0, 420.0])),
        T=center,
        f=np.array([185.0, 184.0]) + lens.uniform(-1, 1, 2),
        c=np.array([WIDTH / 2 + 2, HEIGHT / 2 - 3]) + lens.uniform(-2, 2, 2),
        k=np.array([-0.2, 0.24, -0.002]),
        p=lens.uniform(-0.001, 0.001, 2),
    )


@dataclass
class H36M:
    """A written data set: frame numbers and positions of all 32 joints (T, 32, 3) by "S#/<Action>-#"."""

    root: Path
    frames: dict[str, np.ndarray] = field(default_factory=dict)
    points: dict[str, np.ndarray] = field(default_factory=dict)


# As h36m-fetch keeps them: where much moved in training takes, every 64th of a test take; counted from 1.
TRAIN_FRAMES = np.array([1, 3, 4, 8, 11, 13, 14, 15, 21, 23, 24, 31, 34])
TEST_FRAMES = np.array([1, 65, 129])


def write_h36m_layout(
    root: Path,
    takes: tuple[str, ...] = ("S1/Walking-1", "S9/Walking-1"),
    wrong: str = "",
    calibration: str = "json",
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> H36M:
    """Takes with their images, annotations and the calibration of all their subjects.

    ``wrong``: "K", "R", "t", "subject", "late" or "" for how a mistaken reader would take the files. ``change`` may
    alter the annotation of each take before it is written.
    """
    written = H36M(root)
    for take in takes:
        subject = take.split("/")[0]
        frames = TEST_FRAMES if subject in ("S9", "S11") else TRAIN_FRAMES
        points = joints(32, frames, 1100.0, 900.0)
        annotation: dict[str, list[np.ndarray]] = {"camera": [], "frame": [], "pose/2d": [], "pose/3d": []}
        for number, name in enumerate(H36M_CAMERAS):
            camera = h36m_camera(number, subject)
            _write_images(root / take / "imageSequence" / name, camera, frames)
            annotation["camera"].append(np.full(len(frames), int(name)))
            annotation["frame"].append(frames + (wrong == "late"))
            annotation["pose/2d"].append(camera.project(points))
            annotation["pose/3d"].append(camera.to_camera(points))
        arrays = {key: np.concatenate(parts) for key, parts in annotation.items()}
        if change is not None:
            change(arrays)
        with h5py.File(root / take / "annot.h5", "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array)
        written.frames[take], written.points[take] = frames, points
    subjects = sorted({take.split("/")[0] for take in takes})
    other = dict(zip(subjects, reversed(subjects))) if wrong == "subject" else {name: name for name in subjects}
    rigs = {name: {m: h36m_camera(k, other[name]) for k, m in enumerate(H36M_CAMERAS)} for name in subjects}
    (_write_json if calibration == "json" else _write_hdf5)(root, rigs, wrong)
    return written


def _write_images(folder: Path, camera: H36MCamera, frames: np.ndarray) -> None:
    """The annotated frames, and the one after each, as a reader that is one off would find it."""
    folder.mkdir(parents=True)
    for number in sorted({*frames.tolist(), *(frames + 1).tolist()}):
        pixels = camera.project(joints(32, np.array([number]), 1100.0, 900.0)[0, list(H36M_DRAWN.values())])
        Image.fromarray(picture(pixels)).save(folder / f"img_{number:06d}.jpg", quality=97, subsampling=0)


def _write_json(root: Path, rigs: dict[str, dict[str, H36MCamera]], wrong: str) -> None:
    def pose(camera: H36MCamera) -> dict[str, Any]:
        translation = -camera.R @ camera.T
        return {
            "R": (camera.R.T if wrong == "R" else camera.R).tolist(),
            "t": (-translation if wrong == "t" else translation)[:, None].tolist(),
        }

    def lens(camera: H36MCamera) -> dict[str, Any]:
        K = np.array([[camera.f[0], 0, camera.c[0]], [0, camera.f[1], camera.c[1]], [0, 0, 1.0]])
        k1, k2, k3 = camera.k.tolist()
        return {
            "calibration_matrix": (K.T if wrong == "K" else K).tolist(),
            "distortion": [k1, k2, *camera.p.tolist(), k3],
        }

    first = next(iter(rigs.values()))
    content = {
        "intrinsics": {name: lens(camera) for name, camera in first.items()},
        "extrinsics": {subject: {name: pose(camera) for name, camera in rig.items()} for subject, rig in rigs.items()},
    }
    (root / "camera-parameters.json").write_text(json.dumps(content))


def _write_hdf5(root: Path, rigs: dict[str, dict[str, H36MCamera]], wrong: str) -> None:
    """As MATLAB writes it: by columns, so that h5py sees every matrix transposed."""
    with h5py.File(root / "cameras.h5", "w") as file:
        for subject, rig in rigs.items():
            for number, (name, camera) in enumerate(rig.items(), start=1):
                group = file.create_group(f"subject{subject[1:]}/camera{number}")
                group["R"] = camera.R if wrong == "R" else camera.R.T
                group["T"] = (-camera.T if wrong == "t" else camera.T)[:, None]
                for key in ("f", "c", "k", "p"):
                    group[key] = getattr(camera, key)[:, None]
                group["Name"] = np.array([[ord(letter)] for letter in name], dtype=np.uint16)
