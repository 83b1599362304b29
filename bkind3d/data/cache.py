"""The frame cache: undistorted uint8 frames of network size, read from the videos once.

A recording is one file ``<name>-<key>.npy``, (T, M, H, W, 3) uint8, and a ``.json`` beside it that is written last: as
long as that is not there, the recording is not cached. The key is a hash of all that the frames depend on (the bytes of
the videos, the calibration, offsets, size, crop), so a cache is never stale and never has to be cleared to be right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data.project import Project, Recording
from bkind3d.data.remap import Box, Remap, image_boxes, network_cameras, volume_boxes
from bkind3d.data.video import RecordingInfo, VideoInfo, probe_recording, read_frames
from bkind3d.data.volume import require_visible
from bkind3d.errors import InputError

CROPS = ("volume", "none")

_VERSION = 1  # raise it whenever the same input would give other frames
_DECODERS = 2
_BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class CachedRecording:
    """The frames of one recording on disk.

    Args:
        name: of the recording.
        split: "train", "test" or "both".
        fps: frames per second.
        path: the ``.npy`` file.
        shape: (T, M, H, W, 3).
    """

    name: str
    split: str
    fps: float
    path: Path
    shape: tuple[int, int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def frames(self) -> np.memmap:
        """The frames, (T, M, H, W, 3) uint8 RGB, mapped read-only on first use."""
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped frames out: a pickled memmap would carry all of them."""
        return {key: value for key, value in self.__dict__.items() if key != "frames"}


@dataclass(frozen=True)
class FrameCache:
    """Frames of network size, and the pinhole cameras that belong to them.

    Args:
        cameras: pinhole cameras with ``image_size`` the network size.
        recordings: by name, in the project's order.
        key: hash of everything that the frames depend on.
    """

    cameras: Cameras
    recordings: dict[str, CachedRecording]
    key: str

    def recording(self, name: str) -> CachedRecording:
        """The recording of that name.

        Raises:
            InputError: there is none.
        """
        if name not in self.recordings:
            raise InputError(f"there is no recording {name!r} in the cache; it has {', '.join(self.recordings)}")
        return self.recordings[name]

    def names(self, *splits: str) -> list[str]:
        """Names of the recordings whose split is one of those given."""
        return [name for name, recording in self.recordings.items() if recording.split in splits]


@dataclass(frozen=True)
class _Source:
    """What a recording's frames are made from: its videos and the cameras before and after."""

    recording: Recording
    info: RecordingInfo
    cameras: Cameras
    network: Cameras


def build_cache(
    project: Project,
    height: int,
    width: int,
    directory: Path | str,
    *,
    crop: str = "volume",
    progress: bool = True,
) -> FrameCache:
    """Read all recordings of a project into undistorted frames of (height, width), or reuse those already there.

    Args:
        project: the project.
        height: of the network's images, in pixels.
        width: of the network's images, in pixels.
        directory: folder of the cache, made when missing. Several projects and sizes may share it.
        crop: "volume" keeps the box around the working volume's projection, in the network's aspect; "none" keeps the
            whole image. What lies outside the image is black.
        progress: show progress bars.

    Raises:
        InputError: a video is unusable, videos do not match each other or the calibration, the volume is not seen, the
            folder cannot be written or its disk is full. Recordings finished before stay.
    """
    directory = Path(directory)
    if crop not in CROPS:
        raise InputError(f"crop: {crop!r} must be one of {', '.join(CROPS)}")
    if min(height, width) < 1:
        raise InputError(f"image size: {width}×{height} must be at least 1×1")
    cameras = project.cameras
    boxes = _boxes(project, crop, height, width)
    network = network_cameras(cameras, boxes, height, width)
    infos = {recording.name: probe_recording(recording, cameras) for recording in project.recordings}
    cached = {}
    with _locked(directory):
        digests = _hash_videos([video for info in infos.values() for video in info.videos.values()], progress)
        for recording in project.recordings:
            info = infos[recording.name]
            source = _Source(recording, info, cameras, network)
            key = _key(source, [digests[video.path] for video in info.videos.values()], boxes)
            shape = (info.frames, len(cameras), height, width, 3)
            path = directory / f"{recording.name}-{key}.npy"
            entry = CachedRecording(recording.name, recording.split, info.fps, path, shape)
            if not _is_complete(entry):
                _build(entry, source, progress)
            cached[recording.name] = entry
    together = hashlib.blake2b(" ".join(entry.path.stem for entry in cached.values()).encode(), digest_size=16)
    return FrameCache(cameras=network, recordings=cached, key=together.hexdigest())


def _boxes(project: Project, crop: str, height: int, width: int) -> list[Box]:
    volume = project.working_volume()
    require_visible(project.cameras, volume)
    if crop == "none":
        return image_boxes(project.cameras, height, width)
    return volume_boxes(project.cameras, volume, height, width)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the folder for one process: of several that want the same cache one builds it, the others find it built."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{directory}: the cache folder cannot be written ({error.strerror}); choose another"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in directory.glob("*.part"):  # of a process that was killed: who holds the lock is alone
            leftover.unlink()
        yield


def _hidden(progress: bool) -> bool | None:
    """tqdm's ``disable``: None shows a bar on a terminal only, so that logs stay readable."""
    return None if progress else True


def _hash_videos(videos: list[VideoInfo], progress: bool) -> dict[Path, str]:
    digests: dict[Path, str] = {}
    total = sum(video.path.stat().st_size for video in videos)
    with tqdm(
        total=total, desc="hashing videos", unit="B", unit_scale=True, disable=_hidden(progress), leave=False
    ) as bar:
        for video in videos:
            digest = hashlib.blake2b(digest_size=16)
            with video.path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            digests[video.path] = digest.hexdigest()
    return digests


def _key(source: _Source, digests: list[str], boxes: list[Box]) -> str:
    """Hash of all that one recording's frames depend on; extrinsics matter only through the boxes."""
    content = {
        "version": _VERSION,
        "videos": digests,
        "offsets": [source.recording.offset(camera) for camera in source.cameras.names],
        "frames": source.info.frames,
        "intrinsics": source.cameras.intrinsics.tolist(),
        "distortion": source.cameras.distortion.tolist(),
        "boxes": boxes,
        "size": source.network.image_size.tolist(),
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_complete(entry: CachedRecording) -> bool:
    if not (entry.path.with_suffix(".json").exists() and entry.path.exists()):
        return False
    return entry.path.stat().st_size > int(np.prod(entry.shape, dtype=np.int64))  # the header comes on top


def _build(entry: CachedRecording, source: _Source, progress: bool) -> None:
    """Write one recording under a temporary name, then give it its own, then write the json that makes it valid."""
    temporary = entry.path.with_suffix(".npy.part")
    try:
        _require_space(entry)
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": entry.shape})
            file.flush()
            _write_frames(file.fileno(), file.tell(), entry, source, progress)
            os.fsync(file.fileno())
        os.replace(temporary, entry.path)
        description = {"name": entry.name, "fps": entry.fps, "shape": entry.shape, "version": _VERSION}
        _write_durably(entry.path.with_suffix(".json"), json.dumps(description))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(_full(entry)) from None
        raise InputError(f"{entry.path}: the frame cache cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _require_space(entry: CachedRecording) -> None:
    if shutil.disk_usage(entry.path.parent).free < np.prod(entry.shape, dtype=np.int64):
        raise InputError(_full(entry))


def _full(entry: CachedRecording) -> str:
    gigabytes = np.prod(entry.shape, dtype=np.int64) / 1e9
    return (
        f"{entry.path.parent}: the disk is full: the frames of recording {entry.name!r} need {gigabytes:.3g} GB; "
        "free some space, choose another cache folder or a smaller image size"
    )


def _write_frames(descriptor: int, start: int, entry: CachedRecording, source: _Source, progress: bool) -> None:
    """Decode the videos, two at a time, and write each frame at its place (t, m) behind the header.

    Written with pwrite and not through a memory map: there a full disk ends the process with SIGBUS.
    """
    frames, count = entry.shape[:2]
    image_bytes = int(np.prod(entry.shape[2:]))
    stop = threading.Event()
    with tqdm(total=frames * count, desc=f"caching {entry.name}", unit="frame", disable=_hidden(progress)) as bar:

        def decode(index: int) -> None:
            camera = source.cameras.names[index]
            remap = Remap(source.cameras.select([camera]), source.network.select([camera]))
            first = source.recording.offset(camera)
            for number, frame in enumerate(read_frames(source.info.videos[camera])):
                if stop.is_set():
                    return
                if first <= number < first + frames:
                    place = start + ((number - first) * count + index) * image_bytes
                    _write_at(descriptor, remap(frame).tobytes(), place)
                    bar.update()

        with ThreadPoolExecutor(_DECODERS) as pool:
            jobs = [pool.submit(decode, index) for index in range(count)]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
                for job in jobs:
                    if job.done():
                        job.result()
            finally:  # an error or Ctrl-C ends the other decoders at their next frame
                stop.set()


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written


def _write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is either absent or whole, even after a power cut."""
    temporary = path.with_suffix(".json.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
