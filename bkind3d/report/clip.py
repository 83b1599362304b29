"""The moving picture of a report: all views with projected keypoints and active edges, as H.264."""

import io
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
import torch

from bkind3d.cameras import Cameras
from bkind3d.pictures import overlay

CLIP_SECONDS = 8.0
CLIP_FPS = 30.0
CLIP_WIDTH = 960  # px, about; views are enlarged by a whole number
STILLS = 4


def project_keypoints(cameras: Cameras, positions: np.ndarray) -> np.ndarray:
    """(F, J, 3) world -> (F, M, J, 2) pixels; NaN where a keypoint is behind a camera or not finite."""
    pixels, depth = cameras.project(torch.as_tensor(positions, dtype=torch.float64), distort=False)
    visible = (depth > 0) & torch.isfinite(pixels).all(dim=-1)  # (M, F, J)
    return torch.where(visible[..., None], pixels, torch.nan).transpose(0, 1).numpy()


def clip_rows(frames: np.ndarray, fps: float) -> tuple[np.ndarray, float]:
    """Which of the frame numbers (F,) to show, and at what rate: real time, at most CLIP_FPS and CLIP_SECONDS.

    The rate is the recording's, divided by a whole number where it exceeds CLIP_FPS.
    """
    spacing = int(np.median(np.diff(frames))) if len(frames) > 1 else 1
    step = max(1, math.ceil(fps / spacing / CLIP_FPS - 1e-6))
    rate = fps / spacing / step
    return np.arange(0, len(frames), step)[: max(1, int(CLIP_SECONDS * rate))], rate


def layout(views: int, width: int) -> tuple[int, int]:
    """Columns and enlargement for so many views of that width in pixels."""
    columns = views if views <= 3 else math.ceil(views / 2)
    return columns, max(1, round(CLIP_WIDTH / (columns * width)))


def draw(
    images: np.ndarray,
    pixels: np.ndarray,
    edges: np.ndarray,
    names: Sequence[str],
    weights: np.ndarray | None = None,
    colours: np.ndarray | None = None,
) -> np.ndarray:
    """One moment: (M, H, W, 3) uint8 and (M, J, 2) -> (h, w, 3) uint8 with h and w even, as H.264 needs."""
    columns, scale = layout(len(images), images.shape[2])
    return even(
        overlay(images, pixels, edges, scale=scale, weights=weights, names=names, columns=columns, colours=colours)
    )


def even(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) with its last row or column repeated where a side is odd."""
    return np.pad(picture, [(0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)], mode="edge")


def encode(pictures: Iterable[np.ndarray], fps: float) -> bytes:
    """H.264 in MP4 of (h, w, 3) uint8 pictures, h and w even."""
    memory = io.BytesIO()
    write_video(memory, pictures, fps, quality=24)
    return memory.getvalue()


def write_video(target: str | BinaryIO, pictures: Iterable[np.ndarray], fps: float, quality: int) -> None:
    """Write H.264 in MP4 that browsers play, one picture at a time.

    Args:
        target: path, whose file then begins with its index, so that it plays while it is loaded; or a file.
        pictures: (h, w, 3) uint8 each, h and w even.
        fps: pictures per second.
        quality: x264's constant rate factor, the smaller the better; 18 can hardly be told from the original.
    """
    options = {"movflags": "faststart"} if isinstance(target, str) else {}
    with av.open(target, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.options = {"crf": str(quality), "preset": "veryfast"}
        stream.pix_fmt = "yuv420p"
        for index, picture in enumerate(pictures):
            if index == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
