"""Footage: video files, chunks of them, or folders of images; what they hold, and their frames in one sequential pass.

Frames are counted by their time stamps, never by the container's own count, and a video is never sought: both lie in
practice. A frame's index is its place in display order, starting at 0. Of a camera whose footage is cut into chunks,
the number that ends each file's name is the number of its first frame; an image's number is in its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from bkind3d.cameras import Cameras
from bkind3d.data.index import Index, load_index
from bkind3d.data.ledger import Ledger
from bkind3d.data.project import Recording, Source, is_images
from bkind3d.errors import InputError

_IRREGULAR = 0.1  # of the frame interval, beyond one tick of the container's clock
_TRUNCATED = 1.5  # frames missing at the end of the declared duration
_DRIFT = 0.5  # frames that two cameras may drift apart over a recording


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, from its time stamps: number of frames, frames per second, size in pixels.

    ``first`` is the number of its first frame in its camera's footage.
    """

    path: Path
    frames: int
    fps: float
    width: int
    height: int
    first: int = 0

    @property
    def last(self) -> int:
        """Number of its last frame."""
        return self.first + self.frames - 1


@dataclass(frozen=True)
class VideoFootage:
    """A camera's video files, increasing in the numbers of their frames; all of one image size."""

    files: tuple[VideoInfo, ...]

    @property
    def parts(self) -> list[tuple[int, Path]]:
        """Each file, with the number of its first frame."""
        return [(file.first, file.path) for file in self.files]

    @property
    def frames(self) -> int:
        """Number of frames in all files."""
        return sum(file.frames for file in self.files)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.files[0].width, self.files[0].height

    def read(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The frames of those increasing numbers, each with its number; files without any are not opened.

        Raises:
            InputError: as :func:`read_frames`.
        """
        for file in self.files:
            wanted = numbers[(numbers >= file.first) & (numbers <= file.last)]
            if len(wanted):
                for frame, number in zip(read_frames(file, wanted - file.first), wanted.tolist()):
                    yield number, frame


@dataclass(frozen=True)
class ImageFootage:
    """A camera's images, whose numbers ``pattern`` puts into their names; all of one size."""

    pattern: Path
    numbers: np.ndarray
    size: tuple[int, int]

    @property
    def parts(self) -> list[tuple[int, Path]]:
        """Each file, with its number."""
        return [(number, _image_path(self.pattern, number)) for number in self.numbers.tolist()]

    def read(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The images of those numbers, (H, W, 3) uint8 RGB, each with its number.

        Raises:
            InputError: an image cannot be read or has another size than the first; the message names it.
        """
        for number in numbers.tolist():
            path = _image_path(self.pattern, number)
            frame = read_image(path)
            if frame.shape[1::-1] != self.size:
                raise InputError(f"{path}: is {_times(frame.shape[1::-1])}, the first image is {_times(self.size)}")
            yield number, frame


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


def probe_video(path: Path, *, even: bool = True) -> VideoInfo:
    """Read every time stamp of a video without decoding it.

    Args:
        path: the file.
        even: ask for at least two frames, at even times. Where an index says what each frame shows, that is not needed.

    Raises:
        InputError: the file is not a readable video, ends early, is irregular in time (variable frame rate or dropped
            frames), or asks to be rotated for display.
    """
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(path, container)
            packets = [packet for packet in container.demux(stream) if packet.size]
            declared = _declared_duration(container, stream)
            tick = float(stream.time_base or 0)
            width, height = stream.codec_context.width, stream.codec_context.height
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: not a readable video ({_reason(error)}); copy it again or re-encode it") from None
    broken = next((index for index, packet in enumerate(packets) if packet.is_corrupt), None)
    if broken is not None:
        raise InputError(f"{path}: the file ends within frame {broken}; it is truncated: copy it again or re-encode it")
    if any(packet.pts is None for packet in packets):
        raise InputError(f"{path}: its frames carry no time stamps; put it into an MP4 container")
    stamps = np.sort([packet.pts or 0 for packet in packets if not packet.is_discard]) * tick
    least = 2 if even else 1
    if len(stamps) < least:
        raise InputError(f"{path}: holds {len(stamps)} frame(s); a video of at least {least} is needed")
    interval = _frame_interval(path, stamps, tick, even) if len(stamps) > 1 else max(declared, tick)
    earliest = min(0, *(packet.pts or 0 for packet in packets)) * tick
    missing = (declared - (stamps[-1] - earliest + interval)) / interval
    if missing > _TRUNCATED:
        raise InputError(
            f"{path}: ends after frame {len(stamps) - 1}, about {missing:.0f} frames before the duration it declares; "
            "it is truncated: copy it again or re-encode it"
        )
    return VideoInfo(path=path, frames=len(stamps), fps=1 / interval, width=width, height=height)


def video_size(path: Path) -> tuple[int, int]:
    """Width and height of a video in pixels, from its header alone.

    Raises:
        InputError: the file is not a readable video.
    """
    try:
        with av.open(str(path)) as container:
            context = _video_stream(path, container).codec_context
            return context.width, context.height
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: not a readable video ({_reason(error)}); copy it again or re-encode it") from None


def read_frames(info: VideoInfo, wanted: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Decode a video from its first frame to its last: (H, W, 3) uint8 RGB, one at a time.

    Args:
        info: the video.
        wanted: increasing indices of the frames to give; decoding ends after the last of them. None gives all.

    Raises:
        InputError: a frame cannot be decoded, is damaged or has another size, or fewer frames come out than the time
            stamps promised. The message names the frame reached.
    """
    index = 0
    chosen = range(info.frames) if wanted is None else set(wanted.tolist())
    last = max(chosen)
    try:
        with av.open(str(info.path)) as container:
            stream = _video_stream(info.path, container)
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                _check_frame(info, frame, index)
                if index in chosen:
                    yield frame.to_ndarray(format="rgb24")
                index += 1
                if last < index < info.frames:
                    return
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(
            f"{info.path}: decoding failed after {index} of {info.frames} frames ({_reason(error)}); "
            "copy it again or re-encode it"
        ) from None
    if index != info.frames:
        raise InputError(
            f"{info.path}: {index} frames could be decoded, but it has time stamps of {info.frames}; "
            "copy it again or re-encode it"
        )


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
                f"camera {camera!r}: {file} is {_times(footage[camera].size)}, but its calibration is for "
                f"{_times(size)}; calibrate at the video's size, or correct 'size' if only that is wrong"
            )
    return RecordingInfo(footage, index or _index_in_step(recording, footage))


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
                f"camera {camera!r}: the masks {file} are {_times(masks.size)}, its video is {_times(footage.size)}; "
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
        return _probe_chunks(camera, source, numbers, ledger)
    if is_images(source):
        if numbers is None:
            raise InputError(f"camera {camera!r}: images {source} need an 'index', which says when each was taken")
        return _probe_images(camera, source, numbers)
    video = _recalled(source, ledger, even=numbers is None)
    if numbers is not None and numbers[-1] > video.last:
        raise InputError(
            f"camera {camera!r}: the index asks for frame {numbers[-1]}, but {source} has {video.frames} frames, "
            f"0 to {video.last}"
        )
    return VideoFootage((video,))


def _recalled(path: Path, ledger: Ledger | None, *, even: bool) -> VideoInfo:
    """As :func:`probe_video`, from the ledger where there is one."""

    def find(path: Path) -> list[Any]:
        info = probe_video(path, even=even)
        return [info.frames, info.fps, info.width, info.height]

    frames, fps, width, height = ledger.recall(f"video {even=}", path, find) if ledger else find(path)
    return VideoInfo(path, frames, fps, width, height)


def _probe_chunks(
    camera: str, paths: tuple[Path, ...], numbers: np.ndarray | None, ledger: Ledger | None
) -> VideoFootage:
    """The chunks that hold the frames of those numbers, or all of them, which must then be without a gap."""
    chunks = sorted((_first_number(path), path) for path in paths)
    firsts = np.array([first for first, _ in chunks])
    if numbers is None:
        numbers, even = np.append(firsts[1:] - 1, firsts[-1]), True  # each file up to the next
    else:
        even = False
    places = np.searchsorted(firsts, numbers, side="right") - 1
    if places[0] < 0:
        raise InputError(
            f"camera {camera!r}: frame {numbers[0]} is in no file: {chunks[0][1]}, the first, starts at {firsts[0]}; "
            "a chunk before it is missing"
        )
    files: list[VideoInfo] = []
    for place in np.unique(places).tolist():
        first, path = chunks[place]
        file = replace(_recalled(path, ledger, even=even), first=first)
        needed = numbers[places == place][-1]
        after = chunks[place + 1][1].name if place + 1 < len(chunks) else "no other file"
        if needed > file.last:
            raise InputError(
                f"camera {camera!r}: frame {needed} is in no file: {path} ends with frame {file.last}, {after} "
                f"follows; {_chunk_from(path, file.last + 1)} is missing"
            )
        if place + 1 < len(chunks) and file.last >= firsts[place + 1]:
            raise InputError(f"{path}: reaches to frame {file.last}, but {after} starts before that")
        if files and (file.width, file.height) != (files[0].width, files[0].height):
            size, other = _times((file.width, file.height)), _times((files[0].width, files[0].height))
            raise InputError(f"{path}: is {size}, {files[0].path.name} is {other}")
        files.append(file)
    return VideoFootage(tuple(files))


def _first_number(path: Path) -> int:
    """Number of a chunk's first frame, from the end of its name."""
    match = re.search(r"\d+$", path.stem)
    if match is None:
        raise InputError(f"{path}: a chunk's name must end with the number of its first frame, as in film-3500.mp4")
    return int(match[0])


def _chunk_from(path: Path, first: int) -> str:
    """Name of the chunk that starts with that frame."""
    return re.sub(r"\d+$", str(first), path.stem) + path.suffix


def _probe_images(camera: str, pattern: Path, numbers: np.ndarray) -> ImageFootage:
    for number in numbers.tolist():
        path = _image_path(pattern, number)
        if not path.is_file():
            raise InputError(f"{path}: the image of frame {number} of camera {camera!r} is missing")
    height, width = read_image(_image_path(pattern, int(numbers[0]))).shape[:2]
    return ImageFootage(pattern, numbers, (width, height))


def _image_path(pattern: Path, number: int) -> Path:
    return pattern.with_name(pattern.name % number)


def read_image(path: Path) -> np.ndarray:
    """An image, (H, W, 3) uint8 RGB.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable image ({_reason(error)}); copy it again") from None


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


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise InputError(f"{path}: holds no video stream; if it should, it is truncated: copy it again")
    return container.streams.video[0]


def _declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds that the file says the video lasts; 0 where it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def _frame_interval(path: Path, stamps: np.ndarray, tick: float, even: bool) -> float:
    """Seconds from frame to frame, of time stamps (T,) that must be even if so asked."""
    interval = float(stamps[-1] - stamps[0]) / (len(stamps) - 1)
    steps = np.diff(stamps)
    worst = int(np.abs(steps - interval).argmax())
    if even and abs(steps[worst] - interval) > _IRREGULAR * interval + tick:
        raise InputError(
            f"{path}: frame {worst + 1} comes {steps[worst]:.4g} s after the one before, the mean is {interval:.4g} s: "
            "the frame rate varies or frames were dropped; record or re-encode at a constant rate"
        )
    return interval


def _check_frame(info: VideoInfo, frame: av.VideoFrame, index: int) -> None:
    if frame.is_corrupt:
        raise InputError(
            f"{info.path}: frame {index} of {info.frames} is damaged; the file is truncated or corrupt: copy it again"
        )
    if frame.rotation:
        raise InputError(
            f"{info.path}: asks to be shown rotated by {frame.rotation} degrees; re-encode it upright, "
            "as the calibration sees it"
        )
    if (frame.width, frame.height) != (info.width, info.height):
        raise InputError(
            f"{info.path}: frame {index} is {frame.width}×{frame.height}, the first is {info.width}×{info.height}"
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _times(size: tuple[int, ...] | list[int]) -> str:
    return f"{size[0]}×{size[1]}"
