"""Small calibrated rigs and video files for the tests of cameras and data."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
import yaml

from bkind3d.cameras import Cameras, save_toml

DISTORTION = (-0.25, 0.08, 0.002, -0.0015, 0.01)


def ring(
    count: int = 3,
    size: tuple[int, int] = (64, 48),
    distortion: tuple[float, ...] = (0.0,) * 5,
    radius: float = 3.0,
    skew: float = 0.0,
    units: str = "m",
) -> Cameras:
    """Cameras named cam0, cam1, ... on a circle, 1 above the ground, looking at the origin; focal length = width."""
    width, height = size
    rotations, translations = [], []
    for index in range(count):
        angle = 2 * np.pi * index / count + 0.3
        center = np.array([radius * np.cos(angle), radius * np.sin(angle), radius / 3])
        forward = -center / np.linalg.norm(center)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        rotations.append(rotation)
        translations.append(-rotation @ center)
    matrix = np.array([[width, skew, (width - 1) / 2 + 1.5], [0, 1.05 * width, (height - 1) / 2 - 2], [0, 0, 1]])
    return Cameras(
        names=tuple(f"cam{index}" for index in range(count)),
        intrinsics=torch.tensor(matrix).repeat(count, 1, 1),
        distortion=torch.tensor(distortion, dtype=torch.float64).repeat(count, 1),
        rotation=torch.tensor(np.stack(rotations)),
        translation=torch.tensor(np.stack(translations)),
        image_size=torch.tensor(size).repeat(count, 1),
        units=units,
    )


def write_video(path: Path, frames: np.ndarray, fps: int = 30, stamps: list[int] | None = None) -> Path:
    """Write frames (T, H, W, 3): H.264 for .mp4, lossless RGB for .mkv. ``stamps``: time of each frame in 1/fps s."""
    lossless = path.suffix == ".mkv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(
        str(path), "w", options={"fflags": "+bitexact"} | ({} if lossless else {"movflags": "faststart"})
    ) as container:
        stream = container.add_stream("ffv1" if lossless else "libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = index if stamps is None else stamps[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def counted_frames(count: int, size: tuple[int, int] = (64, 48), seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) whose mean is their number times 5, on top of a fixed texture that keeps them apart."""
    width, height = size
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    frames += (5 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    frames[:, 0, :, :] = np.random.default_rng(seed).integers(0, 255, (width, 3), dtype=np.uint8)
    return frames


def write_project(
    folder: Path,
    cameras: Cameras | None = None,
    frames: int = 12,
    counts: dict[str, int] | None = None,
    suffix: str = ".mkv",
    **changes: object,
) -> Path:
    """Write calibration, one video per camera and a project of one recording; returns the project file.

    ``counts`` gives single cameras another number of frames; ``changes`` replace keys of the project file, those of the
    recording as ``recording={...}``.
    """
    cameras = cameras or ring()
    folder.mkdir(parents=True, exist_ok=True)
    save_toml(cameras, folder / "calibration.toml")
    videos = {}
    for index, name in enumerate(cameras.names):
        size = tuple(cameras.image_size[index].tolist())
        write_video(folder / f"{name}{suffix}", counted_frames((counts or {}).get(name, frames), size, seed=index))
        videos[name] = f"{name}{suffix}"
    recording = {"name": "take", "split": "train", "videos": videos, **changes.pop("recording", {})}  # type: ignore[dict-item]
    content = {
        "name": "rig",
        "units": cameras.units,
        "calibration": "calibration.toml",
        "volume": {"center": [0, 0, 0], "size": [1, 1, 0.5]},
        "recordings": [recording],
        **changes,
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path
