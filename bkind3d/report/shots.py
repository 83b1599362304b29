"""Moments of a recording, sharper than the network sees them where its videos are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data import CachedRecording, Project, RecordingInfo, probe_recording
from bkind3d.data.ledger import Ledger
from bkind3d.data.remap import Remap
from bkind3d.data.video import Footage, VideoFootage
from bkind3d.report.inputs import Scene

# A video is decoded from its first frame on, and a picture is not worth hours: beyond so many pixels, about a minute on
# one core, the frames of the cache are shown.
DECODED_PIXELS = 1e10


@dataclass
class Shots:
    """Frames (F, M, H, W, 3) uint8, undistorted, and the pinhole cameras of their pixels."""

    frames: np.ndarray
    cameras: Cameras


def take_shots(scene: Scene, name: str, rows: np.ndarray, height: int, *, progress: bool = False) -> Shots:
    """Some moments of a recording, from its videos where they are sharper than the frames of the cache.

    The field of view is the network's; its image is enlarged by a whole number.

    Args:
        scene: with the recording.
        name: of the recording.
        rows: (F,) rows of its frames.
        height: of the images wanted, in pixels. They are lower where the videos are no sharper than that, or where too
            much would have to be decoded.
        progress: show a progress bar while videos are read.

    Raises:
        InputError: a video cannot be read.
    """
    cached = Shots(np.asarray(scene.frames[name][rows]), scene.cameras[name])
    if scene.inputs is None:
        return cached
    project, recording = scene.inputs.project, scene.inputs.cache.recording(name)
    raw = project.cameras_of(project.recording(name))
    enlargement = min(math.ceil(height / cached.frames.shape[2]), _sharpness(raw, cached.cameras))
    if enlargement <= 1:
        return cached
    info = _probe(project, recording)
    numbers = info.index.frames[rows]  # (F, M)
    cost = sum(_decoded(info.footage[camera], numbers[:, m]) for m, camera in enumerate(raw.names))
    if cost > DECODED_PIXELS:
        return cached
    width, height = (cached.cameras.image_size[0] * enlargement).tolist()
    cameras = cached.cameras.resize(width, height)
    return Shots(_read(info, raw, cameras, numbers, progress), cameras)


def _sharpness(raw: Cameras, network: Cameras) -> int:
    """Pixels of the sharpest video per network pixel, rounded up."""
    focal = raw.intrinsics.diagonal(dim1=1, dim2=2)[:, :2] / network.intrinsics.diagonal(dim1=1, dim2=2)[:, :2]
    return math.ceil(float(focal.max()) - 1e-6)


def _probe(project: Project, recording: CachedRecording) -> RecordingInfo:
    """What the recording's videos hold, as its cache has found it out."""
    source = project.recording(recording.name)
    return probe_recording(source, project.cameras_of(source), Ledger.of_cache(recording.path.parent))


def _decoded(footage: Footage, numbers: np.ndarray) -> int:
    """Pixels to decode until the frames of those numbers are read."""
    width, height = footage.size
    if not isinstance(footage, VideoFootage):
        return len(np.unique(numbers)) * width * height
    frames = 0
    for file in footage.files:
        wanted = numbers[(numbers >= file.first) & (numbers <= file.last)]
        frames += int(wanted.max()) - file.first + 1 if len(wanted) else 0
    return frames * width * height


def _read(info: RecordingInfo, raw: Cameras, cameras: Cameras, numbers: np.ndarray, progress: bool) -> np.ndarray:
    """Frames of those numbers (F, M) as the cameras see them, (F, M, H, W, 3) uint8."""
    width, height = cameras.image_size[0].tolist()
    frames = np.empty((*numbers.shape, height, width, 3), dtype=np.uint8)
    with tqdm(total=numbers.size, desc="reading", unit="frame", disable=None if progress else True) as bar:
        for m, camera in enumerate(raw.names):
            remap = Remap(raw.select([camera]), cameras.select([camera]))
            for number, frame in info.footage[camera].read(np.unique(numbers[:, m])):
                chosen = numbers[:, m] == number
                frames[chosen, m] = remap(frame)
                bar.update(int(chosen.sum()))
    return frames
