"""The footage of a recording: that of its cameras, matched with each other, with its index and with the calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bkind3d.cameras import Cameras
from bkind3d.data.chunks import VideoFootage, first_number, probe_chunks
from bkind3d.data.images import ImageFootage, is_images, probe_images
from bkind3d.data.index import Index, load_index
from bkind3d.data.ledger import Ledger
from bkind3d.data.project import Recording, Source
from bkind3d.data.video import recall_video
from bkind3d.errors import InputError
from bkind3d.tables import times

_DRIFT = 0.5  # frames that two cameras may drift apart over a recording

Footage = VideoFootage | ImageFootage


@dataclass(frozen=True)
class RecordingInfo:
    """The footage of one recording, matched: ``index`` names each camera's frame of every moment."""

    footage: dict[str, Footage]
    index: Index

    @property
    def frames(self) -> int:
        """Number of moments."""
        return len(self.index.clock)

    @property
    def fps(self) -> float:
        """Rate of the recording's clock."""
        return self.index.fps


def probe_recording(recording: Recording, cameras: Cameras, ledger: Ledger | None = None) -> RecordingInfo:
    """Probe all footage of a recording and match it with each other, with its index and with the calibration.

    Args:
        recording: the recording.
        cameras: that filmed it.
        ledger: of what is known of its videos, so that those that have not changed are not read.

    Raises:
        InputError: a video is unusable (:func:`probe_video`), a chunk or an image is missing, footage has another image
            size than its camera's calibration, another frame rate than the others, or another number of frames after
            the offsets.
    """
    index = None if recording.index is None else load_index(recording.index, cameras.names)
    footage: dict[str, Footage] = {}
    for place, camera in enumerate(cameras.names):
        numbers = None if index is None else np.unique(index.frames[:, place])
        footage[camera] = _probe_footage(camera, recording.videos[camera], numbers, ledger)
    for camera, size in zip(cameras.names, cameras.image_size.tolist()):
        if list(footage[camera].size) != size:
            file = footage[camera].parts[0][1]
            raise InputError(
                f"camera {camera!r}: {file} is {times(footage[camera].size)}, but its calibration is for "
                f"{times(size)}; calibrate at the video's size, or correct 'size' if only that is wrong"
            )
    return RecordingInfo(footage, index or _index_in_step(recording, footage))


def frame_numbers(recording: Recording, cameras: Cameras, clock: np.ndarray) -> np.ndarray:
    """Which frame of each camera's footage shows each moment, without a look at the footage.

    Args:
        recording: the recording.
        cameras: that filmed it.
        clock: (F,) numbers of moments on the recording's clock.

    Returns:
        (F, M) int64.

    Raises:
        InputError: the index cannot be read, or does not have all of these moments.
    """
    if recording.index is None:
        sources = {camera: recording.videos[camera] for camera in cameras.names}
        starts = [
            (min(map(first_number, source)) if isinstance(source, tuple) else 0) + recording.offset(camera)
            for camera, source in sources.items()
        ]
        return clock[:, None] + np.array(starts, dtype=np.int64)
    index = load_index(recording.index, cameras.names)
    rows = np.searchsorted(index.clock, clock).clip(max=len(index.clock) - 1)
    absent = np.flatnonzero(index.clock[rows] != clock)
    if len(absent):
        raise InputError(f"{recording.index}: has no moment {clock[absent[0]]}, which there are poses of")
    return index.frames[rows]


def probe_masks(recording: Recording, info: RecordingInfo, ledger: Ledger | None = None) -> dict[str, Footage]:
    """Probe a recording's own masks and match them with its footage, of which they have the size and the numbers.

    Raises:
        InputError: a file is unusable (:func:`probe_video`), a chunk or an image is missing, or masks have another
            image size or another number of frames than their camera's video.
    """
    found: dict[str, Footage] = {}
    for place, (camera, footage) in enumerate(info.footage.items()):
        numbers = np.unique(info.index.frames[:, place])
        masks = _probe_footage(camera, recording.masks[camera], numbers, ledger)
        file = masks.parts[0][1]
        if masks.size != footage.size:
            raise InputError(
                f"camera {camera!r}: the masks {file} are {times(masks.size)}, its video is {times(footage.size)}; "
                "masks must be of the video's size"
            )
        if isinstance(masks, VideoFootage) and isinstance(footage, VideoFootage) and masks.frames != footage.frames:
            raise InputError(
                f"camera {camera!r}: the masks {file} have {masks.frames} frames, its video has {footage.frames}; "
                "each frame needs its own mask"
            )
        found[camera] = masks
    return found


def _probe_footage(camera: str, source: Source, numbers: np.ndarray | None, ledger: Ledger | None) -> Footage:
    """Footage that holds the frames of those numbers, or all that there is."""
    if isinstance(source, tuple):
        return probe_chunks(camera, source, numbers, ledger)
    if is_images(source):
        if numbers is None:
            raise InputError(f"camera {camera!r}: images {source} need an 'index', which says when each was taken")
        return probe_images(camera, source, numbers)
    video = recall_video(source, ledger, even=numbers is None)
    if numbers is not None and numbers[-1] > video.last:
        raise InputError(
            f"camera {camera!r}: the index asks for frame {numbers[-1]}, but {source} has {video.frames} frames, "
            f"0 to {video.last}"
        )
    return VideoFootage((video,))


def _index_in_step(recording: Recording, footage: dict[str, Footage]) -> Index:
    """The index of cameras that run at one rate from their offsets on."""
    videos = {camera: one for camera, one in footage.items() if isinstance(one, VideoFootage)}
    frames = _common_frames(recording, videos)
    rates = {camera: video.files[0].fps for camera, video in videos.items()}
    first, rate = next(iter(rates.items()))
    for camera, fps in rates.items():
        if abs(fps / rate - 1) * frames > _DRIFT:
            raise InputError(
                f"recording {recording.name!r}: camera {camera!r} runs at {fps:.6g} frames per second, "
                f"{first!r} at {rate:.6g}; all cameras of a recording must run at one rate"
            )
    starts = [video.files[0].first + recording.offset(camera) for camera, video in videos.items()]
    return Index.in_step(tuple(videos), starts, frames, rate)


def _common_frames(recording: Recording, videos: dict[str, VideoFootage]) -> int:
    """Frames of the recording: all that remain after the offsets, or the number that the project asks for."""
    where = f"recording {recording.name!r}"
    left = {camera: video.frames - recording.offset(camera) for camera, video in videos.items()}
    counts = ", ".join(f"{camera} {count}" for camera, count in left.items())
    shortest = min(left, key=lambda camera: left[camera])
    if left[shortest] < 1:
        raise InputError(
            f"{where}: the offset {recording.offset(shortest)} of camera {shortest!r} is beyond the "
            f"{videos[shortest].frames} frames of {videos[shortest].files[0].path}"
        )
    if recording.frames is not None:
        if left[shortest] < recording.frames:
            raise InputError(
                f"{where}: frames: {recording.frames} were asked for, but after the offsets there are {counts}"
            )
        return recording.frames
    if len(set(left.values())) > 1:
        raise InputError(
            f"{where}: the cameras differ in their number of frames after the offsets: {counts}; trim the videos, "
            f"correct 'offsets', or set 'frames: {left[shortest]}' if they start together and only end apart"
        )
    return left[shortest]
