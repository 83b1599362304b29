"""Moments of a recording at a size of one's own: from its videos, where those are sharper than the network's frames."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data import RecordingInfo, probe_recording
from bkind3d.data.chunks import VideoFootage
from bkind3d.data.ledger import Ledger
from bkind3d.data.matching import Footage
from bkind3d.data.remap import Remap
from bkind3d.report.inputs import Scene
from bkind3d.run import Inputs

# A video is decoded from its first frame on, and a picture is not worth hours: beyond so many pixels, about a minute on
# one core, the frames of the cache are shown.
DECODED_PIXELS = 1e10


def take_shots(scene: Scene, name: str, rows: np.ndarray, cameras: Cameras, *, progress: bool = False) -> np.ndarray:
    """Some moments of a recording as cameras of one's own size and crop see them.

    Args:
        scene: with the recording.
        name: of the recording.
        rows: (F,) rows of its frames.
        cameras: pinhole cameras of M of its views, by name, of one image size: its own, cropped and resized.
        progress: show a progress bar while videos are read.

    Returns:
        (F, M, H, W, 3) uint8, black where nothing was filmed.

    Raises:
        InputError: a video cannot be read.
    """
    width, height = cameras.image_size[0].tolist()
    shots = np.empty((len(rows), len(cameras), height, width, 3), dtype=np.uint8)
    info = _sharper(scene, name, rows, cameras)
    filmed = scene.cameras[name] if info is None or scene.inputs is None else _raw_cameras(scene.inputs, name)
    total = shots.shape[0] * shots.shape[1]
    with tqdm(total=total, desc="reading frames", unit="frame", disable=None if progress else True) as bar:
        for place, camera in enumerate(cameras.names):
            remap = Remap(filmed.select([camera]), cameras.select([camera]))
            m = filmed.names.index(camera)
            for where, frame in _cached(scene, name, m, rows) if info is None else _decoded(info, m, rows):
                shots[where, place] = remap(frame)
                bar.update(len(where))
    return shots


def sharpness(scene: Scene, name: str) -> int:
    """Pixels of a recording's sharpest video per pixel of its frames, rounded up; 1 where there is no video."""
    if scene.inputs is None:
        return 1
    return max(1, math.ceil((_focal(_raw_cameras(scene.inputs, name)) / _focal(scene.cameras[name])).max() - 1e-6))


def _sharper(scene: Scene, name: str, rows: np.ndarray, cameras: Cameras) -> RecordingInfo | None:
    """What the recording's videos hold, where they show more of the rows than the cache and do not take too long."""
    if scene.inputs is None:
        return None
    raw, cached = _raw_cameras(scene.inputs, name), scene.cameras[name].select(cameras.names)
    enlarged = np.minimum(_focal(raw.select(cameras.names)), _focal(cameras)) / _focal(cached)
    if enlarged.max() <= 1:
        return None
    # The ledger of the cache's folder spares another look at files that have not changed.
    ledger = Ledger.of_cache(scene.inputs.cache.recording(name).path.parent)
    info = probe_recording(scene.inputs.project.recording(name), raw, ledger)
    places = {camera: raw.names.index(camera) for camera in cameras.names}
    cost = sum(_to_decode(info.footage[camera], info.index.frames[rows, m]) for camera, m in places.items())
    return info if cost <= DECODED_PIXELS else None


def _focal(cameras: Cameras) -> np.ndarray:
    """Focal lengths in pixels, along x and y (M, 2)."""
    return cameras.intrinsics.diagonal(dim1=1, dim2=2)[:, :2].numpy()


def _raw_cameras(inputs: Inputs, name: str) -> Cameras:
    """The cameras of a recording's videos."""
    return inputs.project.cameras_of(inputs.project.recording(name))


def _to_decode(footage: Footage, numbers: np.ndarray) -> int:
    """Pixels to decode until the frames of those numbers are read."""
    width, height = footage.size
    if not isinstance(footage, VideoFootage):
        return len(np.unique(numbers)) * width * height
    frames = 0
    for file in footage.files:
        wanted = numbers[(numbers >= file.first) & (numbers <= file.last)]
        frames += int(wanted.max()) - file.first + 1 if len(wanted) else 0
    return frames * width * height


def _decoded(info: RecordingInfo, m: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames of camera m from its footage, each with the places (K,) among the rows that it is wanted at."""
    numbers = info.index.frames[rows, m]
    for number, frame in info.footage[info.index.cameras[m]].read(np.unique(numbers)):
        yield np.flatnonzero(numbers == number), frame


def _cached(scene: Scene, name: str, m: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `_decoded`, from the frames at the network's size."""
    for place, row in enumerate(rows.tolist()):
        yield np.array([place]), np.asarray(scene.frames[name][row, m])
