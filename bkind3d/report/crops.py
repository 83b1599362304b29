"""Crops round each keypoint over moments and views: whether it stays on one part of the body is seen at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bkind3d.cameras import Cameras
from bkind3d.pictures import INK, SHADOW, WHITE
from bkind3d.report.inputs import Scene, Shown, health_of
from bkind3d.report.shots import sharpness, take_shots

MOMENTS, VIEWS = 4, 3
SHARE = 0.25  # side of a crop, of the diagonal of the keypoints' box
SHARP = 640  # px, largest height of the frames that crops are cut from
CELL = 71  # px; odd, so that a pixel is in the middle
GAP, WIDE_GAP, HEADER, LABEL = 2, 9, 24, 105  # px
LARGEST = 600_000  # bytes of the picture
ASTRAY = {"dead", "centre", "border"}  # keypoints with these flags say nothing about how large the animal is
SOFT, WARN, BLANK = (91, 100, 112), (163, 60, 18), (238, 240, 243)


@dataclass
class Grid:
    """The picture (JPEG), the moments shown in seconds, views at each, and the side of the crops in world units."""

    jpeg: bytes
    times: list[float]
    views: int
    side: float


def crop_grid(shown: Shown, scene: Scene, *, progress: bool = False) -> Grid:
    """One row per keypoint, of crops at moments spread over a recording, each in several views.

    Args:
        shown: the recording.
        scene: with the volume, and with the videos where they can be read.
        progress: show a progress bar while videos are read.

    Raises:
        InputError: a video cannot be read.
    """
    poses = shown.poses
    flags = health_of(shown, scene).flags
    chosen = spread_moments(len(poses.frames))
    width, height = shown.cameras.image_size[0].tolist()
    enlargement = max(1, min(SHARP // height, sharpness(scene, poses.recording)))
    cameras = shown.cameras.resize(enlargement * width, enlargement * height)
    frames = take_shots(scene, poses.recording, shown.rows[chosen], cameras, progress=progress)
    positions = poses.positions[chosen].astype(np.float64)
    steady = np.array([not ASTRAY & set(one) for one in flags])
    side = SHARE * body_extent(positions, steady) or SHARE * float(scene.sides.max())
    times = poses.time[chosen].tolist()
    cells = [
        [cell for f in range(len(chosen)) for cell in _cells(frames[f], cameras, f, positions[f, j], side, colour)]
        for j, colour in enumerate(shown.colours)
    ]
    picture = draw_grid(cells, poses.names, flags, times, shown.colours)
    return Grid(small_jpeg(picture, LARGEST), times, min(VIEWS, len(cameras)), side)


def spread_moments(count: int) -> np.ndarray:
    """Rows (MOMENTS,) of so many moments: the middles of equal parts; all of them where there are no more."""
    if count <= MOMENTS:
        return np.arange(count)
    return ((np.arange(MOMENTS) + 0.5) * count / MOMENTS).astype(int)


def body_extent(positions: np.ndarray, steady: np.ndarray) -> float:
    """Median over the moments of the diagonal of the keypoints' box; 0 where there is none.

    Args:
        positions: (F, J, 3), world units, NaN where a keypoint is missing.
        steady: (J,) bool, the keypoints to go by; all, where fewer than two.
    """
    used = positions[:, steady] if steady.sum() > 1 else positions
    used = used[np.isfinite(used).all(axis=(1, 2))]
    return float(np.median(np.linalg.norm(np.ptp(used, axis=1), axis=1))) if len(used) else 0.0


def views_of(cameras: Cameras, point: np.ndarray, first: int) -> list[int]:
    """Views whose pictures show a world point (3,), at most VIEWS; counted from view `first` on, and round."""
    if not np.isfinite(point).all():
        return []
    inside = cameras.in_view(torch.as_tensor(point, dtype=torch.float64))
    order = [(first + m) % len(cameras) for m in range(len(cameras))]
    return [m for m in order if inside[m]][:VIEWS]


def crop(frame: np.ndarray, cameras: Cameras, m: int, point: np.ndarray, side: float) -> Image.Image:
    """A square of the world, seen by view m of pinhole cameras, as CELL × CELL pixels; black beyond the frame.

    Args:
        frame: (H, W, 3) uint8 of that view.
        cameras: of the frames.
        m: number of the view.
        point: (3,) world point in the middle, in front of the camera.
        side: of the square, which faces the camera at the depth of the point, world units.
    """
    pixels, depth = cameras.project(torch.as_tensor(point, dtype=torch.float64), distort=False)
    middle = pixels[m].numpy() + 0.5  # Pillow's pixel centres are at halves
    half = side / 2 * cameras.intrinsics[m].diagonal()[:2].numpy() / float(depth[m])
    low, high = np.floor(middle - half).astype(int), np.ceil(middle + half).astype(int)
    part = Image.fromarray(frame).crop((*low.tolist(), *high.tolist()))
    box = (*(middle - half - low).tolist(), *(middle + half - low).tolist())
    return part.resize((CELL, CELL), Image.Resampling.BICUBIC, box=box)


def ring(picture: Image.Image, colour: np.ndarray) -> None:
    """Draw a ring in a keypoint's colour round the middle, which it leaves free."""
    fineness = 4  # Pillow draws without smoothing: draw larger, then reduce
    size, middle = CELL * fineness, CELL * fineness / 2
    paint, mask = (Image.new(mode, (size, size)) for mode in ("RGB", "L"))
    for radius, width, fill in ((9.2, 4.0, SHADOW), (8.3, 2.2, tuple(colour.tolist()))):
        outer, thickness = radius * fineness, round(width * fineness)
        box = [middle - outer, middle - outer, middle + outer, middle + outer]
        ImageDraw.Draw(paint).ellipse(box, outline=fill, width=thickness)
        ImageDraw.Draw(mask).ellipse(box, outline=255, width=thickness)
    picture.paste(paint.reduce(fineness), (0, 0), mask.reduce(fineness))


def draw_grid(
    cells: Sequence[Sequence[Image.Image | None]],
    names: Sequence[str],
    flags: Sequence[Sequence[str]],
    times: Sequence[float],
    colours: np.ndarray,
) -> Image.Image:
    """The rows under each other: colour, name and flags of a keypoint, then its crops, moment by moment.

    Args:
        cells: J rows of moments · views pictures, None where a keypoint is not seen.
        names: J keypoint names.
        flags: J lists of health flags.
        times: of the moments, seconds.
        colours: (J, 3) uint8 of the keypoints.
    """
    per_moment = len(cells[0]) // len(times)
    lefts = [
        LABEL + f * (per_moment * (CELL + GAP) - GAP + WIDE_GAP) + v * (CELL + GAP)
        for f in range(len(times))
        for v in range(per_moment)
    ]
    sheet = Image.new("RGB", (lefts[-1] + CELL, HEADER + len(cells) * (CELL + GAP) - GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for f, time in enumerate(times):
        draw.text((lefts[f * per_moment], 5), f"{time:.2f} s", fill=SOFT, font=ImageFont.load_default(size=13))
    for j, (row, colour) in enumerate(zip(cells, colours)):
        top = HEADER + j * (CELL + GAP)
        _draw_label(sheet, top, colour, names[j], flags[j])
        for left, cell in zip(lefts, row):
            sheet.paste(BLANK if cell is None else cell, (left, top, left + CELL, top + CELL))
    return sheet


def small_jpeg(picture: Image.Image, largest: int) -> bytes:
    """JPEG of at most so many bytes, of the best quality that allows it (no less than 40)."""
    for quality in (90, 80, 70, 60, 50, 40):
        memory = io.BytesIO()
        picture.save(memory, format="JPEG", quality=quality, subsampling=0)  # rings are thin
        if memory.tell() <= largest:
            break
    return memory.getvalue()


def _cells(
    views: np.ndarray, cameras: Cameras, first: int, point: np.ndarray, side: float, colour: np.ndarray
) -> list[Image.Image | None]:
    """Crops of one keypoint in the views (M, H, W, 3) of one moment, None for each that is wanting."""
    cells: list[Image.Image | None] = [None] * min(VIEWS, len(cameras))
    for place, m in enumerate(views_of(cameras, point, first)):
        cell = crop(views[m], cameras, m, point, side)
        ring(cell, colour)
        cells[place] = cell
    return cells


def _draw_label(sheet: Image.Image, top: int, colour: np.ndarray, name: str, flags: Sequence[str]) -> None:
    """A dot in the keypoint's colour, its name, and under it a line for each flag."""
    draw, middle = ImageDraw.Draw(sheet), top + CELL // 2
    draw.ellipse((2, middle - 8, 18, middle + 8), fill=tuple(colour.tolist()), outline=INK)
    line = middle - (20 + 14 * max(1, len(flags))) // 2
    draw.text((26, line), name, fill=INK, font=ImageFont.load_default(size=15))
    for k, state in enumerate(flags or ["healthy"]):
        draw.text((26, line + 20 + 14 * k), state, fill=WARN if flags else SOFT, font=ImageFont.load_default(size=12))
