"""A video file: what it holds, and its frames in one sequential pass.

Frames are counted by their time stamps, never by the container's own count, and a video is never sought: both lie in
practice. A frame's index is its place in display order, starting at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from bkind3d.data.ledger import Ledger
from bkind3d.errors import InputError, reason

_IRREGULAR = 0.1  # of the frame interval, beyond one tick of the container's clock
_TRUNCATED = 1.5  # frames missing at the end of the declared duration


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
    except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable video ({reason(error)}); copy it again or re-encode it") from None
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


def recall_video(path: Path, ledger: Ledger | None, *, even: bool) -> VideoInfo:
    """As :func:`probe_video`, from the ledger where there is one."""

    def find(path: Path) -> list[Any]:
        info = probe_video(path, even=even)
        return [info.frames, info.fps, info.width, info.height]

    frames, fps, width, height = ledger.recall(f"video {even=}", path, find) if ledger else find(path)
    return VideoInfo(path, frames, fps, width, height)


def video_size(path: Path) -> tuple[int, int]:
    """Width and height of a video in pixels, from its header alone.

    Raises:
        InputError: the file is not a readable video.
    """
    try:
        with av.open(str(path)) as container:
            context = _video_stream(path, container).codec_context
            return context.width, context.height
    except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable video ({reason(error)}); copy it again or re-encode it") from None


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
    except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{info.path}: decoding failed after {index} of {info.frames} frames ({reason(error)}); "
            "copy it again or re-encode it"
        ) from None
    if index != info.frames:
        raise InputError(
            f"{info.path}: {index} frames could be decoded, but it has time stamps of {info.frames}; "
            "copy it again or re-encode it"
        )


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise InputError(f"{path}: holds no video stream; if it should, it is truncated: copy it again")
    stream = container.streams.video[0]
    if stream.codec_context is None or not (stream.codec_context.width and stream.codec_context.height):
        raise InputError(f"{path}: not a readable video (of an unknown coding or size); copy it again or re-encode it")
    return stream


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
