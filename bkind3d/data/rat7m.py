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

from bkind3d.cameras import Calibration, Cameras
from bkind3d.cameras.matlab import read_rat7m
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
_STEP = 1.4  # factor by which frames may advance faster or slower than rows, on average: dropped frames, no other rate


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
    calibration, frames, markers = _read_session(path)
    footage = {}
    for name in frames:
        number = re.sub(r"\D", "", name)
        if (session, number) not in videos:
            raise InputError(f"{path}: of its {name} there is no video {session}-camera{number}-<start>.mp4")
        footage[name] = videos[session, number]
    names, points = list(markers), np.stack(list(markers.values()), axis=1)
    bones = [bone.split("-") for bone in BONES.split() if set(bone.split("-")) <= set(names)]
    if fps is None:
        _require_one_frame_a_row(path, frames)
    truth = Truth(
        points3d=points,
        names=names,
        edges=np.array([[names.index(start), names.index(end)] for start, end in bones], dtype=np.int64).reshape(-1, 2),
        fps=fps or FPS,
    )
    split = "test" if session[1:].split("-")[0] in TEST_SUBJECTS else "train"
    try:
        index = Index(tuple(frames), np.stack(list(frames.values()), axis=1), np.arange(len(points)), fps or FPS)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    cameras = calibration.cameras(sizes=lambda name: video_size(footage[name][0]))
    return Take(session, split, session, footage, index, truth), cameras


def _read_session(path: Path) -> tuple[Calibration, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Cameras, frames (F,) by camera, and positions (F, 3) by marker, in the published order: HDF5 does not keep it."""
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
    calibration = read_rat7m(path, content)
    if calibration is None:
        raise InputError(f"{path}: no camera of it has an IntrinsicMatrix")
    frames = {
        lens.name: _read_frames(path, lens.name, content["cameras"][lens.name], moments) for lens in calibration.lenses
    }
    return calibration, frames, markers


def _read_frames(path: Path, name: str, content: Any, moments: int) -> np.ndarray:
    """(F,) int64: a camera's frame of each row."""
    where = f"{path}: cameras.{name}"
    if not isinstance(content, dict) or "frame" not in content:
        raise InputError(f"{where} lacks 'frame'")
    frames = _numbers(path, f"cameras.{name}.frame", content["frame"]).ravel()
    if frames.size != moments:
        raise InputError(f"{where}.frame has {frames.size} numbers, expected {moments}")
    if not ((frames == np.round(frames)) & (np.abs(frames) < 2**53)).all():
        raise InputError(f"{where}.frame must hold whole numbers")
    return frames.astype(np.int64)


def _numbers(path: Path, name: str, value: Any) -> np.ndarray:
    """float64 of real numbers."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or not value.size:
        raise InputError(f"{path}: {name} must be numbers")
    return value.astype(np.float64)


def _require_one_frame_a_row(path: Path, frames: Mapping[str, np.ndarray]) -> None:
    for name, numbers in frames.items():
        step = np.diff(numbers).mean() if len(numbers) > 1 else 1.0
        if not 1 / _STEP < step < _STEP:
            raise InputError(
                f"{path}: cameras.{name}.frame advances by {step:.3g} per row of mocap, not by one; give the rows per "
                "second with --fps"
            )
