"""What every made-up rig shares: cameras on a ring, sensors, encoding, and files that appear only when complete."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from bkind3d.cameras import Cameras, save_toml
from bkind3d.data.project import Project, Recording, save_project
from bkind3d.data.truth import Truth, save_truth
from bkind3d.data.volume import Volume
from bkind3d.errors import InputError

_NOISE_SIGMA = 1.6  # sensor noise, grey levels


@dataclass(frozen=True)
class Ring:
    """Where cameras may stand around a subject, in metres, and what they frame.

    Args:
        radius: least and greatest distance from the vertical axis.
        heights: of every second camera, and of the others.
        wobble: of the heights, to either side.
        target: the point that they look at.
        miss: how far they look beside it, along each axis, to either side.
        framed: points (P, 3) that the focal length just gets into the picture.
    """

    radius: tuple[float, float]
    heights: tuple[float, float]
    wobble: float
    target: tuple[float, float, float]
    miss: float
    framed: np.ndarray


def rim(*circles: tuple[float, float]) -> np.ndarray:
    """Points (24 n, 3) on level circles around the vertical axis, given as (radius, height)."""
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.concatenate(
        [np.stack([r * np.cos(turn), r * np.sin(turn), np.full(24, height)], axis=1) for r, height in circles]
    )


def place_cameras(
    ring: Ring, views: int, image_size: tuple[int, int], distortion: bool, rng: np.random.Generator
) -> Cameras:
    """Cameras on a ring around and above the arena, looking in, no two alike in height, distance or lens."""
    turn = 2 * np.pi * (np.arange(views) + rng.uniform(-0.12, 0.12, views)) / views + rng.uniform(0, 2 * np.pi)
    height = np.where(np.arange(views) % 2 == 0, *ring.heights) + rng.uniform(-ring.wobble, ring.wobble, views)
    radius = rng.uniform(*ring.radius, views)
    centers = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
    targets = np.array(ring.target) + rng.uniform(-ring.miss, ring.miss, (views, 3))
    rotation = np.stack([_look_at(*pair, rng.uniform(-0.05, 0.05)) for pair in zip(centers, targets)])
    translation = -np.einsum("mij,mj->mi", rotation, centers)
    lens = np.zeros((views, 5))
    if distortion:
        lens[:, 0] = rng.uniform(-0.36, -0.26, views)
        lens[:, 1] = rng.uniform(0.08, 0.16, views)
        lens[:, 2:4] = rng.uniform(-0.002, 0.002, (views, 2))
    return Cameras(
        names=tuple(f"cam{i}" for i in range(views)),
        intrinsics=torch.from_numpy(_intrinsics(ring.framed, rotation, translation, image_size, rng)),
        distortion=torch.from_numpy(lens),
        rotation=torch.from_numpy(rotation),
        translation=torch.from_numpy(translation),
        image_size=torch.tensor([image_size] * views),
        units="m",
    )


def _look_at(center: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    """World-to-camera rotation with OpenCV axes (x right, y down, z forward)."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward])


def _intrinsics(
    framed: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    image_size: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """K (M, 3, 3) whose focal length just frames the points (P, 3) where the subject moves."""
    seen = np.einsum("mij,pj->mpi", rotation, framed) + translation[:, None]
    width, height = image_size
    extent = np.abs(seen[..., :2] / seen[..., 2:]).max(axis=1)  # (M, 2)
    focal = (np.array([width, height]) / 2 / extent).min(axis=1) * rng.uniform(0.96, 1.04, len(rotation))
    matrix = np.tile(np.eye(3), (len(rotation), 1, 1))
    matrix[:, 0, 0] = focal
    matrix[:, 1, 1] = focal * rng.uniform(0.994, 1.006, len(rotation))  # pixels are never quite square
    matrix[:, 0, 2] = (width - 1) / 2 + width * rng.uniform(-0.02, 0.02, len(rotation))
    matrix[:, 1, 2] = (height - 1) / 2 + height * rng.uniform(-0.02, 0.02, len(rotation))
    return matrix


class Sensor:
    """The noise of one camera's sensor; picture i draws from (seed, i) alone.

    Args:
        shape: (H, W, 3) of its pictures.
        seed: of this sensor.
    """

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.seed = seed
        # Noise is drawn once; each picture takes a stretch of it, at a place of its own.
        pool = np.random.default_rng(seed).standard_normal(4 * int(np.prod(shape)), dtype=np.float32)
        self.noise = _NOISE_SIGMA * pool + np.float32(0.5)  # so that cutting off the fraction rounds

    def expose(self, image: np.ndarray, i: int) -> np.ndarray:
        """Picture i (H, W, 3) float32 in 0..255, which is overwritten, as the sensor gives it: uint8."""
        start = int(np.random.default_rng((self.seed, i)).integers(self.noise.size - image.size))
        image += self.noise[start : start + image.size].reshape(image.shape)
        return np.clip(image, 0, 255, out=image).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], width: int) -> np.ndarray:
    """Periodic noise, evenly spread over [0, 1], smoothed over about `width` cells."""
    noise = rng.standard_normal(shape).astype(np.float32)
    for axis in range(len(shape)):
        noise = np.sum([np.roll(noise, shift, axis) for shift in range(width)], axis=0)
    rank = noise.ravel().argsort().argsort().reshape(shape)
    return (rank / rank.max()).astype(np.float32)


@contextmanager
def h264_video(path: Path, size: tuple[int, int], fps: float, crf: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Open a video to write; the function it gives takes one RGB picture (H, W, 3) uint8 after the other."""
    with av.open(str(path), "w") as container:
        # The encoder's decisions must depend on the pictures alone, not on the machine, nor on what memory happens to
        # hold: with AVX-512, x264's macroblock tree reads past rows whose width is no multiple of 128 pixels.
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.thread_count = 1
        yield lambda picture: container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_project(folder: Path, name: str, cameras: Cameras, truths: dict[str, Truth], volume: Volume) -> None:
    """All files of a rig but its videos: one recording for each truth, which is named after its split."""
    recordings = []
    for split, truth in truths.items():
        videos = {camera: folder / split / f"{camera}.mp4" for camera in cameras.names}
        recordings.append(Recording(name=split, split=split, videos=videos, truth=folder / split / "truth.npz"))
        (folder / split).mkdir(parents=True)
        save_truth(folder / split / "truth.npz", truth, cameras.units)
    save_toml(cameras, folder / "calibration.toml")
    project = Project(
        path=folder / "project.yaml",
        name=name,
        units=cameras.units,
        calibration=folder / "calibration.toml",
        cameras=cameras,
        recordings=recordings,
        volume=volume,
    )
    save_project(project, project.path)


@contextmanager
def new_rig(directory: Path, kind: str, force: bool) -> Iterator[Path]:
    """A folder to fill beside `directory`, which takes its place once all has gone well; `kind` is for messages.

    Raises:
        InputError: the directory holds files already and may not be replaced, or a file cannot be written.
    """
    _check_target(directory, kind, force)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
            target = Path(scratch) / "rig"
            yield target
            if directory.exists():
                directory.rename(Path(scratch) / "replaced")
            target.rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: the {kind} rig cannot be written ({error.strerror or error})") from error


def _check_target(directory: Path, kind: str, force: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file; name a folder for the {kind} rig")
    if not any(directory.iterdir()):
        return
    if not force:
        raise InputError(f"{directory}: holds files already; name another folder, or use --force to replace it")
    if not (directory / "project.yaml").is_file():
        raise InputError(f"{directory}: holds no project.yaml, so it is no rig that --force may replace")


def check_settings(
    views: int,
    frames: int,
    test_frames: int,
    image_size: tuple[int, int],
    fps: int,
    seed: int,
    crf: int,
    *,
    kind: str,
    least_views: int,
) -> None:
    """Refuse what no rig can be made of.

    Raises:
        InputError: an argument is out of range; the message begins with its name.
    """
    if not least_views <= views <= 8:
        raise InputError(f"views: the {kind} rig has {least_views} to 8 cameras, not {views}")
    for name, value in (("frames", frames), ("test_frames", test_frames)):
        if value < 2:
            raise InputError(f"{name}: a recording needs at least 2 frames, not {value}")
    if len(image_size) != 2 or any(side < 32 or side % 2 for side in image_size):
        raise InputError(f"image_size: width and height must be even and at least 32, not {tuple(image_size)}")
    if fps < 1:
        raise InputError(f"fps: expected a whole number of frames per second, at least 1, not {fps}")
    if seed < 0:
        raise InputError(f"seed: expected a whole number from 0, not {seed}")
    if not 0 <= crf <= 51:
        raise InputError(f"crf: expected 0 (lossless) to 51, not {crf}")
