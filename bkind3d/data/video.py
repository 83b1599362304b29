"""Video files: what they hold, and their frames in one sequential pass.

Frames are counted by their time stamps, never by the container's own count, and a video is never sought: both lie in
practice. A frame's index is its place in display order, starting at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from bkind3d.cameras import Cameras
from bkind3d.data.project import Recording
from bkind3d.errors import InputError

_IRREGULAR = 0.1  # of the frame interval, beyond one tick of the container's clock
_TRUNCATED = 1.5  # frames missing at the end of the declared duration
_DRIFT = 0.5  # frames that two cameras may drift apart over a recording


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, from its time stamps: number of frames, frames per second, size in pixels."""

    path: Path
    frames: int
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class RecordingInfo:
    """The videos of one recording, matched: every camera has the recording's ``frames`` at ``fps``."""

    videos: dict[str, VideoInfo]
    frames: int
    fps: float


def probe_video(path: Path) -> VideoInfo:
    """Read every time stamp of a video without decoding it.

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
    if len(stamps) < 2:
        raise InputError(f"{path}: holds {len(stamps)} frame(s); a video of at least 2 is needed")
    interval = _frame_interval(path, stamps, tick)
    earliest = min(0, *(packet.pts or 0 for packet in packets)) * tick
    missing = (declared - (stamps[-1] - earliest + interval)) / interval
    if missing > _TRUNCATED:
        raise InputError(
            f"{path}: ends after frame {len(stamps) - 1}, about {missing:.0f} frames before the duration it declares; "
            "it is truncated: copy it again or re-encode it"
        )
    return VideoInfo(path=path, frames=len(stamps), fps=1 / interval, width=width, height=height)


def read_frames(info: VideoInfo) -> Iterator[np.ndarray]:
    """Decode a video from its first frame to its last: (H, W, 3) uint8 RGB, one at a time.

    Raises:
        InputError: a frame cannot be decoded, is damaged or has another size, or fewer frames come out than the time
            stamps promised. The message names the frame reached.
    """
    index = 0
    try:
        with av.open(str(info.path)) as container:
            stream = _video_stream(info.path, container)
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                _check_frame(info, frame, index)
                yield frame.to_ndarray(format="rgb24")
                index += 1
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


def probe_recording(recording: Recording, cameras: Cameras) -> RecordingInfo:
    """Probe all videos of a recording and match them with each other and with the calibration.

    Raises:
        InputError: a video is unusable (:func:`probe_video`), has another image size than its camera's calibration,
            another frame rate than the others, or another number of frames after the offsets.
    """
    videos = {camera: probe_video(recording.videos[camera]) for camera in cameras.names}
    for camera, size in zip(cameras.names, cameras.image_size.tolist()):
        video = videos[camera]
        if [video.width, video.height] != size:
            raise InputError(
                f"camera {camera!r}: {video.path} is {video.width}×{video.height}, but its calibration is for "
                f"{size[0]}×{size[1]}; calibrate at the video's size, or correct 'size' if only that is wrong"
            )
    frames = _common_frames(recording, videos)
    first = videos[cameras.names[0]]
    for camera, video in videos.items():
        if abs(video.fps / first.fps - 1) * frames > _DRIFT:
            raise InputError(
                f"recording {recording.name!r}: camera {camera!r} runs at {video.fps:.6g} frames per second, "
                f"{cameras.names[0]!r} at {first.fps:.6g}; all cameras of a recording must run at one rate"
            )
    return RecordingInfo(videos=videos, frames=frames, fps=first.fps)


def _common_frames(recording: Recording, videos: dict[str, VideoInfo]) -> int:
    """Frames of the recording: all that remain after the offsets, or the number that the project asks for."""
    where = f"recording {recording.name!r}"
    left = {camera: video.frames - recording.offset(camera) for camera, video in videos.items()}
    counts = ", ".join(f"{camera} {count}" for camera, count in left.items())
    shortest = min(left, key=lambda camera: left[camera])
    if left[shortest] < 1:
        raise InputError(
            f"{where}: the offset {recording.offset(shortest)} of camera {shortest!r} is beyond the "
            f"{videos[shortest].frames} frames of {videos[shortest].path}"
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


def _frame_interval(path: Path, stamps: np.ndarray, tick: float) -> float:
    """Seconds from frame to frame, of time stamps (T,) that must be even."""
    interval = float(stamps[-1] - stamps[0]) / (len(stamps) - 1)
    steps = np.diff(stamps)
    worst = int(np.abs(steps - interval).argmax())
    if abs(steps[worst] - interval) > _IRREGULAR * interval + tick:
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
