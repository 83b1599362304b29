"""The frame cache: undistorted uint8 frames of network size, read from the videos once.

A recording is one file ``<name>-<key>.npy``, (T, M, H, W, 3) uint8, and a ``.json`` beside it that is written last: as
long as that is not there, the recording is not cached. The key is a hash of all that the frames depend on (the bytes of
the footage, which of its frames are used, the calibration, size, crop), so a cache is never stale and never has to be
cleared to be right. Bytes are read again only of files that have changed (:mod:`bkind3d.data.ledger`).
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
from torch import Tensor
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data.ledger import Ledger
from bkind3d.data.project import Project
from bkind3d.data.remap import Box, Remap, image_boxes, network_cameras, volume_boxes
from bkind3d.data.video import RecordingInfo, probe_recording
from bkind3d.data.volume import require_visible
from bkind3d.errors import InputError

CROPS = ("volume", "none")

_VERSION = 1  # raise it whenever the same input would give other frames
_DECODERS = max(2, min(8, os.cpu_count() or 2))  # cameras that are read at a time
_BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True, eq=False)
class CachedRecording:
    """The frames of one recording on disk, and the pinhole cameras that belong to them.

    Args:
        name: of the recording.
        split: "train", "test" or "both".
        fps: frames per second of the recording's clock.
        path: the ``.npy`` file.
        shape: (T, M, H, W, 3).
        cameras: pinhole cameras with ``image_size`` the network size.
        clock: (T,) increasing numbers of the moments; 0, 1, ... where none was left out.
    """

    name: str
    split: str
    fps: float
    path: Path
    shape: tuple[int, int, int, int, int]
    cameras: Cameras
    clock: np.ndarray

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def projections(self) -> Tensor:
        """World to pixels of the frames, (M, 3, 4) float32."""
        return self.cameras.projection_matrices().float()

    def rows(self, every: int) -> np.ndarray:
        """Rows of the moments whose numbers are 0, every, 2 every, ... after the first one's."""
        return np.flatnonzero((self.clock - self.clock[0]) % every == 0)

    @cached_property
    def frames(self) -> np.memmap:
        """The frames, (T, M, H, W, 3) uint8 RGB, mapped read-only on first use."""
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped frames out: a pickled memmap would carry all of them."""
        return {key: value for key, value in self.__dict__.items() if key != "frames"}


@dataclass(frozen=True)
class FrameCache:
    """Frames of network size.

    Args:
        recordings: by name, in the project's order.
        key: hash of everything that the frames depend on.
    """

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
    """What a recording's frames are made from: its footage and the cameras before and after."""

    info: RecordingInfo
    cameras: Cameras
    boxes: list[Box]
    network: Cameras

    @property
    def paths(self) -> list[Path]:
        """All files that are read."""
        return [path for footage in self.info.footage.values() for _, path in footage.parts]


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
    cached = {}
    with _locked(directory) as ledger:
        sources = _sources(project, crop, height, width, ledger)
        digests = _hash_files([path for source in sources.values() for path in source.paths], ledger, progress)
        for recording in project.recordings:
            source = sources[recording.name]
            index = source.info.index
            entry = CachedRecording(
                name=recording.name,
                split=recording.split,
                fps=index.fps,
                path=directory / f"{recording.name}-{_key(source, digests)}.npy",
                shape=(len(index.clock), len(source.cameras), height, width, 3),
                cameras=source.network,
                clock=index.clock,
            )
            if not _is_complete(entry):
                _build(entry, source, progress)
            cached[recording.name] = entry
    together = hashlib.blake2b(" ".join(entry.path.stem for entry in cached.values()).encode(), digest_size=16)
    return FrameCache(recordings=cached, key=together.hexdigest())


def _sources(project: Project, crop: str, height: int, width: int, ledger: Ledger) -> dict[str, _Source]:
    """What each recording's frames are made from, by its name; the boxes of each calibration are found once."""
    volume = project.working_volume()
    crops = {}
    for path, cameras in project.rigs().items():
        require_visible(cameras, volume)
        whole = crop == "none"
        boxes = image_boxes(cameras, height, width) if whole else volume_boxes(cameras, volume, height, width)
        crops[path] = boxes, network_cameras(cameras, boxes, height, width)
    sources = {}
    for recording in project.recordings:
        cameras = project.cameras_of(recording)
        boxes, network = crops[recording.calibration or project.calibration]
        sources[recording.name] = _Source(probe_recording(recording, cameras, ledger), cameras, boxes, network)
    return sources


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Ledger]:
    """Hold the folder for one process: of several that want the same cache one builds it, the others find it built.

    Gives the folder's ledger, which is saved however the block ends.
    """
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
        ledger = Ledger.of_cache(directory)
        try:
            yield ledger
        finally:
            with contextlib.suppress(OSError):  # a full disk costs another look at the files, nothing else
                ledger.save()


def _hidden(progress: bool) -> bool | None:
    """tqdm's ``disable``: None shows a bar on a terminal only, so that logs stay readable."""
    return None if progress else True


def _hash_files(paths: list[Path], ledger: Ledger, progress: bool) -> dict[Path, str]:
    total = sum(path.stat().st_size for path in paths if not ledger.knows("digest", path))
    with tqdm(
        total=total, desc="hashing videos", unit="B", unit_scale=True, disable=_hidden(progress), leave=False
    ) as bar:

        def find(path: Path) -> str:
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            return digest.hexdigest()

        return {path: ledger.recall("digest", path, find) for path in paths}


def _key(source: _Source, digests: dict[Path, str]) -> str:
    """Hash of all that one recording's frames depend on; extrinsics matter only through the boxes."""
    content = {
        "version": _VERSION,
        "files": [[(first, digests[path]) for first, path in one.parts] for one in source.info.footage.values()],
        "frames": hashlib.blake2b(source.info.index.frames.tobytes(), digest_size=16).hexdigest(),
        "intrinsics": source.cameras.intrinsics.tolist(),
        "distortion": source.cameras.distortion.tolist(),
        "boxes": source.boxes,
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
    """Read the footage, several cameras at a time, and write each frame at its places (t, m) behind the header.

    Written with pwrite and not through a memory map: there a full disk ends the process with SIGBUS.
    """
    moments, count = entry.shape[:2]
    image_bytes = int(np.prod(entry.shape[2:]))
    stop = threading.Event()
    with tqdm(total=moments * count, desc=f"caching {entry.name}", unit="frame", disable=_hidden(progress)) as bar:

        def read(place: int) -> None:
            camera = source.cameras.names[place]
            remap = Remap(source.cameras.select([camera]), source.network.select([camera]))
            rows = _rows_by_number(source.info.index.frames[:, place])
            for number, frame in source.info.footage[camera].read(np.array(list(rows))):
                if stop.is_set():
                    return
                pixels = remap(frame).tobytes()
                for row in rows[number]:
                    _write_at(descriptor, pixels, start + (row * count + place) * image_bytes)
                    bar.update()

        with ThreadPoolExecutor(_DECODERS) as pool:
            jobs = [pool.submit(read, place) for place in range(count)]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
                for job in jobs:
                    if job.done():
                        job.result()
            finally:  # an error or Ctrl-C ends the other readers at their next frame
                stop.set()


def _rows_by_number(numbers: np.ndarray) -> dict[int, list[int]]:
    """Each frame number in increasing order, with the rows that it is needed for: a dropped frame's neighbour twice."""
    order = np.argsort(numbers, kind="stable")
    found, first = np.unique(numbers[order], return_index=True)
    return dict(zip(found.tolist(), (rows.tolist() for rows in np.split(order, first[1:]))))


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
