"""Rat7M (Marshall et al., figshare 2021; Dunn et al., Nature Methods 2021).

``mocap-s#-d#.mat`` of subject # and day # holds two MATLAB structs, as version 5 or 7.3 (HDF5):

- ``cameras.Camera#``: ``IntrinsicMatrix`` and ``rotationMatrix`` (3 × 3), ``translationVector`` (mm),
  ``RadialDistortion``, ``TangentialDistortion`` (2), and ``frame`` (F), the index of that camera's frame for each row
  of ``mocap``: the cameras are not in step. MATLAB multiplies row vectors, [x y z] = [X Y Z] R + t and
  [u v w] = [x y z] K, so that both matrices are the transposes of OpenCV's; it puts the centre of the first pixel at
  (1, 1), so that 1 is taken from the principal point, as its own ``cameraIntrinsicsToOpenCV`` does. The distortion is
  OpenCV's k1 k2, p1 p2.
- ``mocap.<marker>`` (F, 3), mm, NaN where a marker was not tracked.

The videos ``s#-d#-camera#-<start>.mp4`` are chunks of 3500 frames; ``start`` is the index of the first, counted from 0.
They may lie anywhere below the root. Rows of ``mocap`` follow one another at the rate of the videos, 30 per second: the
paper says 120, but its gap of 0.66 s is 20 frames in the published code, and 7 million frames of 6 cameras are the 10.8
hours that were recorded at 30.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bkind3d.cameras import Cameras
from bkind3d.data.importing import Take, choose, write_takes
from bkind3d.data.index import Index
from bkind3d.data.truth import Truth
from bkind3d.data.video import video_size
from bkind3d.data.volume import Triple
from bkind3d.documents import broken_file
from bkind3d.errors import InputError
from bkind3d.foreign import read_mat

TEST_SUBJECTS = ("5",)  # of 1 to 5
FPS = 30.0
SIDE = 1000.0  # mm, of the paper's volume

MARKERS = (
    "HeadF HeadB HeadL SpineF SpineM SpineL Offset1 Offset2 HipL HipR "
    "ElbowL ArmL ShoulderL ShoulderR ElbowR ArmR KneeR KneeL ShinL ShinR"
)
BONES = (
    "HeadF-HeadB HeadF-HeadL HeadB-HeadL HeadB-SpineF SpineF-SpineM SpineM-SpineL "
    "SpineF-ShoulderL ShoulderL-ElbowL ElbowL-ArmL SpineF-ShoulderR ShoulderR-ElbowR ElbowR-ArmR "
    "SpineL-HipL HipL-KneeL KneeL-ShinL SpineL-HipR HipR-KneeR KneeR-ShinR"
)

_MOCAP = re.compile(r"mocap-(s\d+-d\d+)\.mat")
_VIDEO = re.compile(r"(s\d+-d\d+)-camera(\d+)-(\d+)\.mp4")
# Fields of a camera, and how many numbers each holds.
_LENS = {
    "IntrinsicMatrix": (9,),
    "rotationMatrix": (9,),
    "translationVector": (3,),
    "RadialDistortion": (2, 3),
    "TangentialDistortion": (2,),
}
PIXEL_ORIGIN = 1.0  # MATLAB's index of the first pixel
_STEP = 1.4  # factor by which frames may advance faster or slower than rows, on average: dropped frames, no other rate

Lens = dict[str, np.ndarray]


def rat7m_project(
    root: Path,
    out: Path,
    *,
    sessions: list[str] | None = None,
    every: int = 1,
    gap: str | int = "0.66 s",
    moments: int | None = None,
    fps: float | None = None,
    center: Triple | None = None,
    side: float = SIDE,
) -> Path:
    """Write a project of Rat7M, whose videos stay where they are.

    Subjects 1 to 4 train, subject 5 tests. The cache of all moments would need a terabyte: the paper trains on every
    240th, which is ``every=240``.

    Args:
        root: folder below which the mocap files and the videos lie.
        out: folder for the project, made when missing.
        sessions: such as s1-d1; all that are there when left out.
        every: distance in frames of the moments to keep, with their partners in training pairs.
        gap: distance of the two frames of a training pair, for the partners.
        moments: number of moments to take from the start of each session, where not all chunks are there.
        fps: rows of the mocap arrays per second; 30, and one row per video frame, when left out.
        center: of the volume, mm; the point where the cameras' optical axes meet when left out.
        side: of the volume, mm.

    Returns:
        The path of ``project.yaml``.

    Raises:
        InputError: a file, a video or an array is missing or misshapen, rows and video frames advance at different
            rates, or the project exists.
    """
    there = sorted(Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names)
    mocaps = {match[1]: path for path in there if (match := _MOCAP.fullmatch(path.name))}
    if not mocaps:
        raise InputError(f"{root}: no mocap-s#-d#.mat is below this folder")
    videos = _by_camera(there)
    takes, rigs = [], {}
    for session in choose("sessions", sessions, mocaps):
        with broken_file(f"{mocaps[session]}: not a session of Rat7M"):
            take, rigs[session] = _take(session, mocaps[session], videos, fps)
        takes.append(take.first(moments).thinned(every, gap))
    return write_takes(out, "Rat7M", takes, rigs, center, side)


def _by_camera(files: list[Path]) -> dict[tuple[str, str], tuple[Path, ...]]:
    """(session, number of the camera) -> its chunks in order."""
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for path in files:
        if match := _VIDEO.fullmatch(path.name):
            chunks = found.setdefault((match[1], match[2]), {})
            start = int(match[3])
            if start in chunks:
                raise InputError(f"{path}: is there twice, also as {chunks[start]}; remove one of them")
            chunks[start] = path.absolute()
    return {key: tuple(path for _, path in sorted(chunks.items())) for key, chunks in found.items()}


def _take(
    session: str, path: Path, videos: Mapping[tuple[str, str], tuple[Path, ...]], fps: float | None
) -> tuple[Take, Cameras]:
    lenses, markers = _read_session(path)
    footage = {}
    for name in lenses:
        number = re.sub(r"\D", "", name)
        if (session, number) not in videos:
            raise InputError(f"{path}: of its {name} there is no video {session}-camera{number}-<start>.mp4")
        footage[name] = videos[session, number]
    names, points = list(markers), np.stack(list(markers.values()), axis=1)
    bones = [bone.split("-") for bone in BONES.split() if set(bone.split("-")) <= set(names)]
    if fps is None:
        _require_one_frame_a_row(path, lenses)
    truth = Truth(
        points3d=points,
        names=names,
        edges=np.array([[names.index(start), names.index(end)] for start, end in bones], dtype=np.int64).reshape(-1, 2),
        fps=fps or FPS,
    )
    sizes = [video_size(chunks[0]) for chunks in footage.values()]
    split = "test" if session[1:].split("-")[0] in TEST_SUBJECTS else "train"
    try:
        frames = np.stack([lens["frame"] for lens in lenses.values()], axis=1)
        index = Index(tuple(lenses), frames, np.arange(len(points)), fps or FPS)
        return Take(session, split, session, footage, index, truth), _cameras(lenses, sizes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_session(path: Path) -> tuple[dict[str, Lens], dict[str, np.ndarray]]:
    """Lenses by camera, and positions (F, 3) by marker, in the published order: HDF5 does not keep it."""
    content = read_mat(path)
    for key in ("cameras", "mocap"):
        if not isinstance(content.get(key), dict) or not content[key]:
            raise InputError(f"{path}: has no struct {key!r}; expected cameras.Camera1, ... and mocap.HeadF, ...")
    order = [*(name for name in MARKERS.split() if name in content["mocap"]), *content["mocap"]]
    markers = {name: np.atleast_2d(_numbers(path, f"mocap.{name}", content["mocap"][name])) for name in order}
    moments = len(next(iter(markers.values())))
    for name, values in markers.items():
        if values.shape != (moments, 3):
            raise InputError(f"{path}: mocap.{name} is {values.shape}, expected ({moments}, 3)")
    return {name: _read_lens(path, name, lens, moments) for name, lens in content["cameras"].items()}, markers


def _read_lens(path: Path, name: str, content: Any, moments: int) -> Lens:
    lens = {}
    for key, sizes in (*_LENS.items(), ("frame", (moments,))):
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"{path}: cameras.{name} lacks {key!r}")
        lens[key] = np.atleast_1d(_numbers(path, f"cameras.{name}.{key}", content[key]))
        if lens[key].size not in sizes:
            raise InputError(f"{path}: cameras.{name}.{key} has {lens[key].size} numbers, expected {sizes[0]}")
    for key, shape in (("IntrinsicMatrix", (3, 3)), ("rotationMatrix", (3, 3))):
        if lens[key].shape != shape:
            raise InputError(f"{path}: cameras.{name}.{key} is {lens[key].shape}, expected {shape}")
    lens["frame"] = lens["frame"].ravel()
    if not ((lens["frame"] == np.round(lens["frame"])) & (np.abs(lens["frame"]) < 2**53)).all():
        raise InputError(f"{path}: cameras.{name}.frame must hold whole numbers")
    lens["frame"] = lens["frame"].astype(np.int64)
    return lens


def _numbers(path: Path, name: str, value: Any) -> np.ndarray:
    """float64 of real numbers."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or not value.size:
        raise InputError(f"{path}: {name} must be numbers")
    return value.astype(np.float64)


def _require_one_frame_a_row(path: Path, lenses: Mapping[str, Lens]) -> None:
    for name, lens in lenses.items():
        step = np.diff(lens["frame"]).mean() if len(lens["frame"]) > 1 else 1.0
        if not 1 / _STEP < step < _STEP:
            raise InputError(
                f"{path}: cameras.{name}.frame advances by {step:.3g} per row of mocap, not by one; give the rows per "
                "second with --fps"
            )


def _cameras(lenses: Mapping[str, Lens], sizes: list[tuple[int, int]]) -> Cameras:
    """Cameras in OpenCV's form from those of MATLAB."""

    def stacked(key: str) -> np.ndarray:
        return np.stack([lens[key] for lens in lenses.values()])

    intrinsics = stacked("IntrinsicMatrix").transpose(0, 2, 1).copy()
    intrinsics[:, :2, 2] -= PIXEL_ORIGIN
    radial, tangential = (
        [lens[key].ravel() for lens in lenses.values()] for key in ("RadialDistortion", "TangentialDistortion")
    )
    lens_models = [np.concatenate([k[:2], p, k[2:], np.zeros(3 - len(k))]) for k, p in zip(radial, tangential)]
    return Cameras(
        names=tuple(lenses),
        intrinsics=torch.from_numpy(intrinsics),
        distortion=torch.from_numpy(np.stack(lens_models)),
        rotation=torch.from_numpy(stacked("rotationMatrix").transpose(0, 2, 1).copy()),
        translation=torch.from_numpy(stacked("translationVector").reshape(-1, 3)),
        image_size=torch.tensor(sizes),
        units="mm",
    )
