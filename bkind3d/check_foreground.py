"""A look at the masks of the body before they are relied on: how large they are, whether they hold, where they fail.

Some moments of one recording are read, two that follow each other at each place, so that nothing has to be cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from bkind3d.cameras import Cameras
from bkind3d.data import Project, Recording, RecordingInfo, Volume
from bkind3d.data.foreground import estimate_background, foreground_masks
from bkind3d.data.matching import Footage, probe_masks
from bkind3d.data.remap import Remap, network_cameras, volume_boxes
from bkind3d.data.window import HALF
from bkind3d.errors import InputError
from bkind3d.files import replacing

_PLACES = 40  # in the recording, two moments each
_LONGEST = 6000  # moments from the start that they are taken from: every frame up to the last has to be decoded
_SIDE = 128  # pixels of the pictures' longer side at most
_VOXELS = 40  # along the volume's longest side, to carve the hull from
_EMPTY = 0.1  # of the moments may show no body in a camera
_COVERED = 0.5  # of the picture is more than a body
_STEADY = 0.5  # overlap of the masks of two moments that follow each other, at least
_AGREEING = 0.75  # of a mask's pixels must see a place that all cameras hold for the body
_PICTURE = 384  # pixels of the longer side of each half of a drawn picture


@dataclass(frozen=True)
class ForegroundCheck:
    """The masks of one camera.

    Args:
        camera: its name.
        share: median share of the picture that is foreground.
        empty: share of the moments without any.
        steady: median overlap (intersection over union) of two moments that follow each other.
        agreeing: median share of a mask's pixels whose ray meets the hull of all views' masks.
    """

    camera: str
    share: float
    empty: float
    steady: float
    agreeing: float

    def failures(self) -> list[str]:
        """What is wrong with these masks, one line each, with its mend."""
        found = []
        if self.empty > _EMPTY:
            found.append(f"is empty in {self.empty:.0%} of the moments")
        if self.share > _COVERED:
            found.append(f"covers {self.share:.0%} of the picture")
        if self.steady < _STEADY:
            found.append(f"flickers: masks of moments that follow each other overlap by {self.steady:.0%}")
        if self.agreeing < _AGREEING:
            found.append(f"does not agree with the other cameras: {self.agreeing:.0%} of it meets their hull")
        mend = "give the recording 'masks' in the project file, or set data.foreground to false"
        return [f"camera {self.camera!r}: foreground {what}; {mend}" for what in found]


def check_foreground(
    project: Project, info: RecordingInfo, recording: Recording, height: int, width: int, out: Path | None = None
) -> tuple[list[ForegroundCheck], list[Path]]:
    """Look at the masks of some moments of a recording; draw ``foreground_<camera>.png`` into a folder.

    Each picture shows a frame with the outline of its mask, and beside it the background that the mask was found from,
    or the mask itself where the project brings its own.

    Args:
        project: the project.
        info: the recording's footage.
        recording: the recording.
        height: of the network's images; smaller ones are looked at.
        width: of the network's images.
        out: folder for the pictures, made when missing; None draws none.

    Raises:
        InputError: a frame cannot be read, the project's masks do not match the videos, or a picture cannot be written.
    """
    shrink = min(1.0, _SIDE / max(height, width))
    height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    cameras, volume = project.cameras_of(recording), project.working_volume()
    network = network_cameras(cameras, volume_boxes(cameras, volume, height, width), height, width)
    rows = _moments(info.frames)
    frames = _read(info.footage, info, rows, cameras, network)
    if recording.masks:
        masks = _read(probe_masks(recording, info), info, rows, cameras, network).mean(-1) > HALF
        beside = None
    else:
        background = estimate_background(frames)
        masks, beside = foreground_masks(frames, background) > HALF, background.pictures
    found = _measure(masks, network, volume, np.diff(rows) == 1)
    pictures = [] if out is None else _draw(frames, masks, beside, network.names, Path(out))
    return found, pictures


def _moments(count: int) -> np.ndarray:
    """Rows that are looked at: pairs that follow each other, or all of a short recording."""
    last = min(count, _LONGEST) - 1
    first = np.linspace(0, max(last - 1, 0), _PLACES).astype(int)
    return np.unique(np.minimum(np.concatenate([first, first + 1]), last))


def _read(
    footage: dict[str, Footage], info: RecordingInfo, rows: np.ndarray, cameras: Cameras, network: Cameras
) -> np.ndarray:
    """Undistorted pictures (S, M, H, W, 3) uint8 of those rows."""
    views = []
    for place, name in enumerate(cameras.names):
        remap = Remap(cameras.select([name]), network.select([name]))
        numbers, back = np.unique(info.index.frames[rows, place], return_inverse=True)
        views.append(np.stack([remap(frame) for _, frame in footage[name].read(numbers)])[back])
    return np.stack(views, axis=1)


def _measure(masks: np.ndarray, cameras: Cameras, volume: Volume, follows: np.ndarray) -> list[ForegroundCheck]:
    """Masks (S, M, H, W) bool; ``follows`` (S-1,) where a moment is the next one's neighbour."""
    both = (masks[:-1] & masks[1:]).sum((-2, -1))[follows]
    either = (masks[:-1] | masks[1:]).sum((-2, -1))[follows]
    agreeing = _agreement(masks, cameras, volume)
    return [
        ForegroundCheck(
            camera=name,
            share=float(np.median(masks[:, view].mean((-2, -1)))),
            empty=float((~masks[:, view].any((-2, -1))).mean()),
            steady=_median(both[:, view][either[:, view] > 0] / either[:, view][either[:, view] > 0]),
            agreeing=_median(agreeing[:, view]),
        )
        for view, name in enumerate(cameras.names)
    ]


def _median(values: np.ndarray) -> float:
    """Median of those that are numbers; 1 where there are none, because an empty mask has its own failure."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else 1.0


def _agreement(masks: np.ndarray, cameras: Cameras, volume: Volume) -> np.ndarray:
    """Share (S, M) of each mask's pixels whose ray meets the visual hull; NaN where a mask is empty.

    The hull is made of the voxels that lie in the mask of every view that sees them, two at least. Masks are widened by
    half a voxel before carving, and the hull's picture by as much.
    """
    points = volume.points(_VOXELS).reshape(-1, 3)
    pixels, depth = cameras.project(points)  # (M, P, 2), (M, P)
    sees = cameras.in_view(points).numpy()
    height, width = masks.shape[-2:]
    place = np.rint(np.nan_to_num(pixels.numpy())).astype(int)
    column, row = np.clip(place[..., 0], 0, width - 1), np.clip(place[..., 1], 0, height - 1)
    spacing = max(volume.size) / (_VOXELS - 1)
    focal = cameras.intrinsics[:, [0, 1], [0, 1]].amax(-1)
    reach = [
        int(np.ceil((spacing / 2 * focal[view] / depth[view][torch.from_numpy(sees[view])].median()).item()))
        if sees[view].any()
        else 1
        for view in range(len(cameras))
    ]
    shares = np.full(masks.shape[:2], np.nan)
    for moment, views in enumerate(masks):
        wide = [ndimage.binary_dilation(mask, iterations=steps) for mask, steps in zip(views, reach)]
        inside = np.stack([mask[r, c] for mask, r, c in zip(wide, row, column)])
        hull = (inside | ~sees).all(0) & (sees.sum(0) >= 2)
        for view in np.flatnonzero(views.any((-2, -1))):
            seen = np.zeros((height, width), dtype=bool)
            shown = hull & sees[view]
            seen[row[view][shown], column[view][shown]] = True
            seen = ndimage.binary_dilation(seen, np.ones((3, 3)), iterations=reach[view])
            shares[moment, view] = (views[view] & seen).sum() / views[view].sum()
    return shares


def _draw(
    frames: np.ndarray, masks: np.ndarray, beside: np.ndarray | None, names: tuple[str, ...], out: Path
) -> list[Path]:
    """Draw a moment whose masks are of middling size, one picture per camera; ``beside`` (M, H, W, 3) or the mask."""
    sizes = masks.sum((1, 2, 3))
    moment = int(np.argsort(sizes)[len(sizes) // 2])
    paths = []
    for view, name in enumerate(names):
        path = out / f"foreground_{name}.png"
        mask, frame = masks[moment, view], frames[moment, view].copy()
        frame[ndimage.binary_dilation(mask) & ~mask] = 255, 0, 255
        other = np.repeat(255 * mask[..., None], 3, -1) if beside is None else np.clip(beside[view], 0, 255)
        both = np.concatenate([frame, other.astype(np.uint8)], axis=1)
        scale = max(1, _PICTURE // max(mask.shape))
        try:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(path) as scratch:
                Image.fromarray(both.repeat(scale, 0).repeat(scale, 1)).save(scratch, format="PNG")
        except OSError as error:
            raise InputError(f"{path}: the picture cannot be written ({error.strerror})") from None
        paths.append(path)
    return paths
