"""The frame cache: undistorted uint8 frames of network size, read from the videos once.

A recording is one file ``<name>-<key>.npy``, (T, M, H, W, 3) uint8, and a ``.json`` beside it that is written last: as
long as that is not there, the recording is not cached. The key is a hash of all that the frames depend on (the bytes of
the footage, which of its frames are used, the calibration, size, crop), so a cache is never stale and never has to be
cleared to be right. Bytes are read again only of files that have changed (:mod:`bkind3d.data.ledger`).

Masks of the body, where they are asked for, lie beside the frames in ``<name>-<key>.masks-<key of the masks>.npy``,
(T, M, H, W) uint8, with a ``.json`` of their own, and the backgrounds that they come from in the ``.npz`` beside them.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data import foreground as masking
from bkind3d.data.cached import CachedRecording, FrameCache
from bkind3d.data.ledger import Ledger
from bkind3d.data.matching import Footage, RecordingInfo, probe_masks, probe_recording
from bkind3d.data.project import Project
from bkind3d.data.remap import Box, Remap, image_boxes, network_cameras, volume_boxes
from bkind3d.data.volume import require_visible
from bkind3d.errors import InputError
from bkind3d.files import replacing, write_text

CROPS = ("volume", "none")

_VERSION = 1  # raise it whenever the same input would give other frames
_DECODERS = max(2, min(8, os.cpu_count() or 2))  # cameras that are read at a time
_BLOCK = 1 << 22  # bytes hashed at a time
_MOMENTS = 64  # of which masks are found at a time
_WHITE = 128  # that some pixel of a project's own masks must reach


@dataclass(frozen=True)
class _Source:
    """What a recording's frames are made from: its footage and the cameras before and after."""

    info: RecordingInfo
    cameras: Cameras
    boxes: list[Box]
    network: Cameras
    rig: Path
    masks: dict[str, Footage] | None

    @property
    def paths(self) -> list[Path]:
        """All files that are read."""
        both = [*self.info.footage.values(), *(self.masks or {}).values()]
        return [path for footage in both for _, path in footage.parts]


def build_cache(
    project: Project,
    height: int,
    width: int,
    directory: Path | str,
    *,
    crop: str = "volume",
    foreground: bool = False,
    recordings: Sequence[str] | None = None,
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
        foreground: also build the masks of the body: the project's own where a recording has them, or else from the
            static background (:mod:`bkind3d.data.foreground`).
        recordings: names of those that are wanted, in the order in which they are built; all of the project when left
            out. Of others only the frames are built, where the background comes from them too.
        progress: show progress bars.

    Several processes may build in one folder, the same recordings or others: each file is built by one of them, and the
    others find it built.

    Raises:
        InputError: a video is unusable, videos do not match each other or the calibration, the volume is not seen, the
            folder cannot be written or its disk is full; a recording's own masks do not match its videos. Recordings
            finished before stay.
    """
    directory = Path(directory)
    if crop not in CROPS:
        raise InputError(f"crop: {crop!r} must be one of {', '.join(CROPS)}")
    if min(height, width) < 1:
        raise InputError(f"image size: {width}×{height} must be at least 1×1")
    wanted = list(dict.fromkeys(project.names() if recordings is None else recordings))
    with _looking(directory) as ledger:
        sources = _sources(project, crop, height, width, foreground, ledger)
        digests = _hash_files([path for source in sources.values() for path in source.paths], ledger, progress)
    entries = {}
    for recording in project.recordings:
        source = sources[recording.name]
        index = source.info.index
        entries[recording.name] = CachedRecording(
            name=recording.name,
            split=recording.split,
            fps=index.fps,
            path=directory / f"{recording.name}-{_key(source, digests)}.npy",
            shape=(len(index.clock), len(source.cameras), height, width, 3),
            cameras=source.network,
            clock=index.clock,
        )
    for name in wanted:
        _require(entries[name], sources[name], progress)
    cached = {name: entry for name, entry in entries.items() if name in wanted}
    if foreground:
        cached = _with_masks(cached, entries, sources, digests, progress)
    names = " ".join((entry.masks_path or entry.path).stem for entry in cached.values())
    return FrameCache(recordings=cached, key=hashlib.blake2b(names.encode(), digest_size=16).hexdigest())


def _sources(
    project: Project, crop: str, height: int, width: int, foreground: bool, ledger: Ledger
) -> dict[str, _Source]:
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
        rig = recording.calibration or project.calibration
        info = probe_recording(recording, cameras, ledger)
        masks = probe_masks(recording, info, ledger) if foreground and recording.masks else None
        sources[recording.name] = _Source(info, cameras, *crops[rig], rig, masks)
    return sources


@contextlib.contextmanager
def _looking(directory: Path) -> Iterator[Ledger]:
    """Hold the folder for one process while it looks at the videos: others then find in the ledger what they are.

    What a killed process has left is removed. The ledger is saved however the block ends.
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
        _remove_leftovers(directory)
        ledger = Ledger.of_cache(directory)
        try:
            yield ledger
        finally:
            with contextlib.suppress(OSError):  # a full disk costs another look at the files, nothing else
                ledger.save()


def _remove_leftovers(directory: Path) -> None:
    """Remove scratch files that no process writes any more: those of a file that is locked are being written."""
    leftovers = list(directory.glob("*.part"))  # before the locks: a file that is begun later is not among them
    busy = []
    for name in directory.glob(".*.lock"):
        with name.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy.append(name.stem)
                continue
            name.unlink(missing_ok=True)
    for leftover in leftovers:
        if not leftover.name.startswith(tuple(busy)):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold one file of the cache for the process that writes it; the lock lies beside the file while it is held."""
    name = path.with_name(f".{path.stem}.lock")
    while True:
        with name.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock.fileno(), name):  # its last holder has removed it while this process waited
                continue
            try:
                yield
            finally:
                name.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
    if source.cameras.fisheye.any():
        content["fisheye"] = source.cameras.fisheye.tolist()
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    if not (path.with_suffix(".json").exists() and path.exists()):
        return False
    return path.stat().st_size > int(np.prod(shape, dtype=np.int64))  # the header comes on top


def _require(entry: CachedRecording, source: _Source, progress: bool) -> None:
    """Write the frames of one recording, where they are not there yet."""
    if not _is_complete(entry.path, entry.shape):
        with _alone(entry.path):
            if not _is_complete(entry.path, entry.shape):  # another process may have written them meanwhile
                _build(entry, source, progress)


def _build(entry: CachedRecording, source: _Source, progress: bool) -> None:
    """Write the frames of one recording."""

    def fill(descriptor: int, start: int) -> None:
        footage = source.info.footage
        with _bar(entry, "caching", progress) as bar:
            _write_pictures(descriptor, start, entry.shape, footage, source, lambda frame: frame, bar)

    _write_array(entry.path, entry.shape, entry, "frames", fill)


def _write_array(
    path: Path, shape: tuple[int, ...], entry: CachedRecording, what: str, fill: Callable[[int, int], None]
) -> None:
    """Write an array of uint8, then the json that makes it valid.

    ``fill`` gets the file's descriptor and where in it the array begins.
    """
    size = int(np.prod(shape, dtype=np.int64))
    full = (
        f"{path.parent}: the disk is full: the {what} of recording {entry.name!r} need {size / 1e9:.3g} GB; "
        "free some space, choose another cache folder or a smaller image size"
    )
    try:
        if shutil.disk_usage(path.parent).free < size:
            raise InputError(full)
        with replacing(path, durable=True) as scratch, scratch.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.flush()
            fill(file.fileno(), file.tell())
        description = {"name": entry.name, "fps": entry.fps, "shape": shape, "version": _VERSION}
        write_text(path.with_suffix(".json"), json.dumps(description), durable=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(full) from None
        raise InputError(f"{path}: the {what} cannot be written to the cache ({error.strerror})") from None


def _bar(entry: CachedRecording, what: str, progress: bool) -> tqdm:
    total = entry.shape[0] * entry.shape[1]
    return tqdm(total=total, desc=f"{what} {entry.name}", unit="frame", disable=_hidden(progress))


def _write_pictures(
    descriptor: int,
    start: int,
    shape: tuple[int, ...],
    footage: dict[str, Footage],
    source: _Source,
    finish: Callable[[np.ndarray], np.ndarray],
    bar: tqdm,
) -> None:
    """Read footage, several cameras at a time, and write each picture at its places (t, m) of the array (T, M, ...).

    ``finish`` makes of an undistorted picture (H, W, 3) what the array holds. Written with pwrite and not through a
    memory map: there a full disk ends the process with SIGBUS.
    """
    count = shape[1]
    image_bytes = int(np.prod(shape[2:]))
    stop = threading.Event()

    def read(place: int) -> None:
        camera = source.cameras.names[place]
        remap = Remap(source.cameras.select([camera]), source.network.select([camera]))
        rows = _rows_by_number(source.info.index.frames[:, place])
        for number, frame in footage[camera].read(np.array(list(rows))):
            if stop.is_set():
                return
            pixels = finish(remap(frame)).tobytes()
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


def _with_masks(
    cached: dict[str, CachedRecording],
    entries: dict[str, CachedRecording],
    sources: dict[str, _Source],
    digests: dict[Path, str],
    progress: bool,
) -> dict[str, CachedRecording]:
    """Some of the recordings with masks, which are built where they are not there yet."""
    found = {}
    for name, entry in cached.items():
        source = sources[name]
        pool = _pool(entry, entries, sources)
        if source.masks is not None:
            made_from: list[Any] = [
                [(first, digests[path]) for first, path in one.parts] for one in source.masks.values()
            ]
        else:
            made_from = [masking.VERSION, *(other.path.stem for other in pool)]
        key = hashlib.blake2b(json.dumps(made_from).encode(), digest_size=8).hexdigest()
        entry = replace(entry, masks_path=entry.path.with_name(f"{entry.path.stem}.masks-{key}.npy"))
        if not _has_masks(entry, source):
            for other in [] if source.masks is not None else pool:
                _require(other, sources[other.name], progress)
            with _alone(entry.masks_file()):
                if not _has_masks(entry, source):
                    _build_masks(entry, source, pool, progress)
        found[name] = entry
    return found


def _has_masks(entry: CachedRecording, source: _Source) -> bool:
    """Whether the masks are there, and the background that they come from unless the project brings them."""
    path = entry.masks_file()
    return _is_complete(path, entry.shape[:-1]) and (source.masks is not None or path.with_suffix(".npz").exists())


def _pool(
    entry: CachedRecording, cached: dict[str, CachedRecording], sources: dict[str, _Source]
) -> list[CachedRecording]:
    """The recordings of the same cameras, which show the same background.

    What is trained on must not depend on what is only tested on.
    """
    same = [other for name, other in cached.items() if sources[name].rig == sources[entry.name].rig]
    return [other for other in same if other.split != "test" or entry.split == "test"]


def _build_masks(entry: CachedRecording, source: _Source, pool: list[CachedRecording], progress: bool) -> None:
    """Write the masks of one recording, and the backgrounds that they are found from."""
    path, shape = entry.masks_file(), entry.shape[:-1]

    def copy(descriptor: int, start: int) -> None:
        assert source.masks is not None
        brightest = 0

        def grey(picture: np.ndarray) -> np.ndarray:
            nonlocal brightest
            mask = np.rint(picture.mean(-1)).astype(np.uint8)
            brightest = max(brightest, int(mask.max()))
            return mask

        with _bar(entry, "masks of", progress) as bar:
            _write_pictures(descriptor, start, shape, source.masks, source, grey, bar)
        if brightest < _WHITE:
            file = next(iter(source.masks.values())).parts[0][1]
            raise InputError(f"{file}: the masks are nowhere brighter than {brightest}; the body must be white, 255")

    def find(descriptor: int, start: int) -> None:
        background = masking.pooled_background([other.frames for other in pool])
        with replacing(path.with_suffix(".npz")) as scratch, scratch.open("wb") as file:
            np.savez(file, pictures=np.rint(background.pictures).astype(np.uint8), noise=background.noise)
        with _bar(entry, "masks of", progress) as bar:
            for first in range(0, shape[0], _MOMENTS):
                masks = masking.foreground_masks(entry.frames[first : first + _MOMENTS], background)
                _write_at(descriptor, masks.tobytes(), start + first * int(np.prod(shape[1:])))
                bar.update(masks.shape[0] * masks.shape[1])

    _write_array(path, shape, entry, "masks", copy if source.masks is not None else find)


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
