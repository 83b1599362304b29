"""What is wrong with a rig's pictures: cameras that show nothing, that are out of step, that show another one's view.

Some seconds of a recording are read small and in grey. What moves is told by the difference from the median picture:
no label, no network. Clocks are compared by how much moves from frame to frame; views by the visual hull of what moves,
as it is and as it would be with two videos exchanged or one turned upside down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from bkind3d.cameras import Cameras
from bkind3d.check_rig import Finding
from bkind3d.data.matching import RecordingInfo
from bkind3d.data.volume import Volume

SIDE = 96  # pixels of the longer side of the small pictures
_DECODED = 1500  # frames after the first, in which the moments must lie
_DARK, _EVEN = 16.0, 2.0  # grey levels: the brightest pixels of a black camera; the spread of an even picture
_STILL = 0.01  # grey levels that a small picture changes by on average where nothing is new, as after re-encoding
_STANDING = 0.5  # share of the frames that may be still while the others change
_CHANGE = 12.0  # grey levels that a moving pixel changes by at least
_LONGEST_LAG = 2.0  # seconds
_SHORTEST = 4.0  # seconds of pictures that clocks are compared by
_AGREED, _BETTER = 0.45, 0.1  # correlation of two clocks at their lag, and how much more that is than without it
_WITHIN = 2  # frames that the lags of one camera against the others differ by
_LEAST_LAG = 4  # frames: what is less is not told from how differently the same movement shows
_PLACES = 12  # moments that views are compared in
_VOXELS = 32  # along the volume's longest side
_FEWEST = 3  # moments in which something moves in every camera
_GAIN = 0.1  # of what moves, that must meet the other views beyond what does as it is given
_ENOUGH = 0.3  # of what moves, that must meet them then


@dataclass(frozen=True)
class Pictures:
    """Small grey pictures of successive moments: for each camera (T, h, w) float32."""

    frames: dict[str, np.ndarray]
    fps: float

    @property
    def seconds(self) -> float:
        """Length."""
        return len(next(iter(self.frames.values()))) / self.fps


def read_pictures(info: RecordingInfo, moments: int) -> Pictures:
    """The first moments of a recording, fewer where many frames lie between them, which must all be decoded.

    Raises:
        InputError: a frame cannot be read.
    """
    frames = {}
    wanted = info.index.frames[:moments]
    wanted = wanted[(wanted - wanted[0]).max(1) < _DECODED]
    for place, (camera, footage) in enumerate(info.footage.items()):
        numbers, back = np.unique(wanted[:, place], return_inverse=True)
        frames[camera] = np.stack([_small(frame) for _, frame in footage.read(numbers)])[back]
    return Pictures(frames, info.fps)


def _small(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = Image.fromarray(frame).convert("L").resize(size, Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32)


# --- single cameras -------------------------------------------------------------------------------------------------


def check_pictures(pictures: Pictures) -> list[Finding]:
    """Cameras that are black, show an even picture, or stand still while others change."""
    return list(_picture_findings(pictures))


def _picture_findings(pictures: Pictures) -> Iterator[Finding]:
    changes = {camera: _change(frames) for camera, frames in pictures.frames.items()}
    still = {camera: float((change < _STILL).mean()) for camera, change in changes.items() if len(change)}
    for camera, frames in pictures.frames.items():
        others = [share for other, share in still.items() if other != camera]
        if np.percentile(frames, 99.5) < _DARK:
            yield Finding("red", f"camera {camera!r} is black: was its lens covered, or its exposure lost?")
        elif np.median(frames.std((1, 2))) < _EVEN:
            yield Finding("red", f"camera {camera!r} shows an even picture, without anything in it: look at its video")
        elif others and still[camera] > _STANDING and np.median(others) < _STANDING / 2:
            text = (
                f"camera {camera!r} shows the same picture in {still[camera]:.0%} of the moments, while others change"
            )
            yield Finding("red", f"{text}: it froze; record it again")
    if still and min(still.values()) == 1:
        yield Finding(
            "amber", f"nothing moves in the first {pictures.seconds:.3g} s: clocks and views cannot be compared"
        )


def _change(frames: np.ndarray) -> np.ndarray:
    """How much each picture differs from the one before, (T - 1,) grey levels."""
    return np.abs(np.diff(frames, axis=0)).mean((1, 2))


# --- clocks ---------------------------------------------------------------------------------------------------------


def check_clocks(pictures: Pictures) -> list[Finding] | None:
    """Cameras that are out of step with the others; None where clocks cannot be compared."""
    out_of_step = lags(pictures)
    if out_of_step is None:
        return None
    found = []
    for camera, lag in out_of_step.items():
        late = "after" if lag > 0 else "before"
        mend = f"raise its offset by {lag}" if lag > 0 else f"raise the offsets of all others by {-lag}"
        found.append(
            Finding(
                "red",
                f"camera {camera!r} shows movements about {abs(lag)} frames ({abs(lag) / pictures.fps:.2g} s) {late} "
                f"the others: look at both, and {mend} or so",
            )
        )
    return found


def lags(pictures: Pictures) -> dict[str, int] | None:
    """Frames by which a camera shows movements later than the others, of those that are out of step.

    A camera is, where most of the others say so by about the same number of frames. Of two cameras, it is the first.
    None where no two cameras see the same movements, or the pictures are too few.
    """
    if pictures.seconds < _SHORTEST:
        return None
    names = list(pictures.frames)
    signals = {camera: _signal(frames, pictures.fps) for camera, frames in pictures.frames.items()}
    most = int(min(_LONGEST_LAG * pictures.fps, len(signals[names[0]]) // 4))
    votes: dict[str, list[int]] = {camera: [] for camera in names}
    for one, other in combinations(names, 2):
        lag = _lag(signals[one], signals[other], most)
        if lag is not None:
            votes[one].append(lag)
            votes[other].append(-lag)
    if not any(votes.values()):
        return None
    if len(names) == 2:
        del votes[names[1]]
    found = {}
    for camera, said in votes.items():
        lag = round(float(np.median(said))) if said else 0
        agreeing = sum(abs(vote - lag) <= _WITHIN for vote in said)
        if abs(lag) >= _LEAST_LAG and agreeing > (len(names) - 1) / 2:
            found[camera] = lag
    return found


def _signal(frames: np.ndarray, fps: float) -> np.ndarray:
    """How much changes at each moment, beside its mean over a second and without what comes once (a codec's pulses).

    As a logarithm, because the same movement is larger in a camera that is nearer.
    """
    change = ndimage.median_filter(np.log(_change(frames) + 1e-3), 3)
    return change - ndimage.uniform_filter1d(change, max(3, round(fps)))


def _lag(one: np.ndarray, other: np.ndarray, most: int) -> int | None:
    """Frames by which one comes after other; None where that cannot be told."""
    scores = {lag: _correlation(one, other, lag) for lag in range(-most, most + 1)}
    best = max(scores, key=lambda lag: scores[lag])
    if scores[best] < _AGREED:
        return None
    return best if scores[best] - scores[0] > _BETTER else 0


def _correlation(one: np.ndarray, other: np.ndarray, lag: int) -> float:
    a, b = (one[lag:], other[: len(other) - lag]) if lag >= 0 else (one[:lag], other[-lag:])
    if a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


# --- views ----------------------------------------------------------------------------------------------------------


def check_views(pictures: Pictures, cameras: Cameras, volume: Volume) -> list[Finding] | None:
    """Cameras that show another one's view, or theirs upside down: what moves then has a larger hull without that.

    None where too little moves.
    """
    views = _Views(pictures, cameras, volume)
    if not views.enough:
        return None
    same = list(range(len(cameras)))
    given = views.agreement(same)
    scores: dict[str, float] = {}
    for one, other in combinations(same, 2):
        if (cameras.image_size[one] == cameras.image_size[other]).all():
            order = list(same)
            order[one], order[other] = other, one
            scores[f"{cameras.names[one]!r} and {cameras.names[other]!r} exchanged"] = views.agreement(order)
    for place, name in enumerate(cameras.names):
        scores[f"{name!r} turned by 180°"] = views.agreement(same, turned=place)
    best = max(scores.values())
    if best > max(_ENOUGH, given + _GAIN):
        guesses = " or ".join(text for text, score in scores.items() if score > best - _GAIN / 2)
        text = f"of what moves, {given:.0%} meets what moves in the other cameras, but {best:.0%} with {guesses}"
        return [Finding("red", f"{text}: do videos, names and calibration belong together?")]
    return []


class _Views:
    """What moves in each view at some moments, and the pixel that each voxel has there."""

    def __init__(self, pictures: Pictures, cameras: Cameras, volume: Volume) -> None:
        moving = [_moving(pictures.frames[name]) for name in cameras.names]
        moments = np.flatnonzero(np.min([mask.any((1, 2)) for mask in moving], axis=0))
        self.enough = len(moments) >= _FEWEST and len(cameras) > 1
        if not self.enough:
            return
        chosen = moments[np.linspace(0, len(moments) - 1, _PLACES).astype(int)]
        self.masks = [mask[chosen] for mask in moving]
        points = volume.points(_VOXELS).reshape(-1, 3)
        self.sees = cameras.in_view(points).numpy()
        self.rows, self.columns, self.reach = [], [], []
        spacing = max(volume.size) / (_VOXELS - 1)
        for place, mask in enumerate(self.masks):
            height, width = mask.shape[1:]
            small = cameras.select([cameras.names[place]]).resize(width, height)
            pixels, depth = small.project(points)
            nearest = np.rint(pixels[0].nan_to_num().clamp(0, 2 * SIDE).numpy()).astype(int)
            self.columns.append(np.minimum(nearest[:, 0], width - 1))
            self.rows.append(np.minimum(nearest[:, 1], height - 1))
            usual = depth[0][torch.from_numpy(self.sees[place])].median() if self.sees[place].any() else depth.max()
            self.reach.append(1 + max(0, int(np.ceil((spacing / 2 * small.intrinsics[0, 0, 0] / usual).item()))))

    def agreement(self, order: list[int], turned: int | None = None) -> float:
        """Median share of what moves in a view that meets the hull of what moves in all; the least of the views.

        ``order`` says whose pictures each view has; those of the view ``turned`` are turned by 180°.
        """
        views = [self.masks[place] for place in order]
        if turned is not None:
            views[turned] = views[turned][:, ::-1, ::-1]
        shares = np.zeros((len(views), _PLACES))
        for moment in range(_PLACES):
            inside = ~self.sees
            for place, view in enumerate(views):
                wide = ndimage.binary_dilation(view[moment], iterations=self.reach[place])
                inside[place] |= wide[self.rows[place], self.columns[place]]
            hull = inside.all(0) & (self.sees.sum(0) >= 2)
            for place, view in enumerate(views):
                shown, drawn = hull & self.sees[place], np.zeros_like(view[moment])
                drawn[self.rows[place][shown], self.columns[place][shown]] = True
                drawn = ndimage.binary_dilation(drawn, np.ones((3, 3)), iterations=self.reach[place])
                shares[place, moment] = (view[moment] & drawn).sum() / view[moment].sum()
        return float(np.median(shares, axis=1).min())


def _moving(frames: np.ndarray) -> np.ndarray:
    """Where each picture differs from the median one, (T, h, w) bool, without single pixels."""
    away = np.abs(frames - np.median(frames[:: max(1, len(frames) // 60)], axis=0))
    noise = np.median(away, axis=0)
    moving = away > np.maximum(_CHANGE, 4 * noise)
    return ndimage.binary_opening(moving, np.ones((1, 2, 2)))
