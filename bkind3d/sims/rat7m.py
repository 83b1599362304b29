"""Writing recordings in the layout of Rat7M, which :mod:`bkind3d.data.rat7m` describes and reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.io

from bkind3d.cameras import Cameras
from bkind3d.data.matching import probe_recording
from bkind3d.data.project import Project
from bkind3d.data.rat7m import TEST_SUBJECTS
from bkind3d.data.truth import load_truth
from bkind3d.errors import InputError
from bkind3d.sims.studio import h264_video

CHUNK = 3500  # frames
IN_MILLIMETRES = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "um": 0.001}


def write_rat7m(
    project: Project, recordings: Sequence[str], out: Path, *, chunk: int = CHUNK, crf: int = 12
) -> dict[str, str]:
    """Write recordings of a project in the layout of Rat7M.

    Test recordings become sessions of subject 5, all others of subject 1, a day each; cameras become Camera1, Camera2,
    ... in their order. Lengths are converted to mm. Bones are not part of the layout, nor is the clock: rows are taken
    as one after another.

    Args:
        project: the project.
        recordings: names of recordings, each with truth.
        out: folder, made when missing.
        chunk: frames per video file.
        crf: quality of the H.264 encoding, 0 (lossless) to 51.

    Returns:
        Recording name -> session.

    Raises:
        InputError: a recording is unknown, lacks truth or cannot be read, a joint's name is none that MATLAB takes, or
            the folder holds such a session or cannot be written.
    """
    sessions: dict[str, str] = {}
    for name in recordings:
        subject = TEST_SUBJECTS[0] if project.recording(name).split == "test" else "1"
        day = 1 + sum(session.startswith(f"s{subject}-") for session in sessions.values())
        sessions[name] = f"s{subject}-d{day}"
        if (out / sessions[name]).exists():
            raise InputError(f"{out / sessions[name]}: this session exists; remove it or choose another folder")
    for name, session in sessions.items():
        _write_session(project, name, out, session, chunk, crf)
    return sessions


def _write_session(project: Project, name: str, out: Path, session: str, chunk: int, crf: int) -> None:
    recording = project.recording(name)
    cameras = project.cameras_of(recording)
    truth = load_truth(recording, project)
    for joint in truth.names:
        if not re.fullmatch(r"[A-Za-z]\w{0,62}", joint, flags=re.ASCII):
            raise InputError(f"{recording.truth}: joint {joint!r} is no name of a MATLAB field")
    if (cameras.image_size % 2).any():
        raise InputError(f"recording {name!r}: H.264 needs images of even width and height")
    info = probe_recording(recording, cameras)
    scale = IN_MILLIMETRES[project.units]
    lenses = {}
    try:
        (out / session).mkdir(parents=True)
        for place, camera in enumerate(cameras.names):
            numbers, frames = np.unique(info.index.frames[:, place], return_inverse=True)
            stem = out / session / f"{session}-camera{place + 1}"
            _write_chunks(stem, (frame for _, frame in info.footage[camera].read(numbers)), info.fps, chunk, crf)
            lenses[f"Camera{place + 1}"] = _matlab_lens(cameras, place, scale) | {"frame": frames[None]}
        markers = {joint: scale * truth.points3d[:, place] for place, joint in enumerate(truth.names)}
        content = {"cameras": lenses, "mocap": markers}
        scipy.io.savemat(out / f"mocap-{session}.mat", content, long_field_names=True, do_compression=True)
    except OSError as error:
        raise InputError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from None


def _matlab_lens(cameras: Cameras, place: int, scale: float) -> dict[str, np.ndarray]:
    """One camera in MATLAB's form."""
    intrinsics = cameras.intrinsics[place].numpy().copy()
    intrinsics[:2, 2] += 1  # MATLAB's index of the first pixel
    k1, k2, p1, p2, k3 = cameras.distortion[place].tolist()
    return {
        "IntrinsicMatrix": intrinsics.T,
        "rotationMatrix": cameras.rotation[place].numpy().T,
        "translationVector": scale * cameras.translation[place].numpy()[None],
        "RadialDistortion": np.array([[k1, k2, k3] if k3 else [k1, k2]]),
        "TangentialDistortion": np.array([[p1, p2]]),
    }


def _write_chunks(stem: Path, frames: Iterator[np.ndarray], fps: float, chunk: int, crf: int) -> None:
    """H.264 files <stem>-0.mp4, <stem>-<chunk>.mp4, ... of the frames (H, W, 3) uint8 RGB."""
    for start in itertools.count(0, chunk):
        first = next(frames, None)
        if first is None:
            return
        height, width = first.shape[:2]
        with h264_video(Path(f"{stem}-{start}.mp4"), (width, height), fps, crf) as write:
            for frame in itertools.chain([first], itertools.islice(frames, chunk - 1)):
                write(frame)
