"""Keypoint health: are the discovered keypoints alive, distinct and inside the volume?

The failures that self-supervised keypoints are known for are visible in the tracks alone, without labels: a flat
probability volume puts the soft-argmax at the volume's centre, two keypoints follow one part, a keypoint hides at the
border, or never moves. All lengths are in *sides*: divided by the longest side of the volume. Where foreground and
identity were measured as well, a keypoint that lies beside the animal or swaps places with others is found too.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np

from bkind3d.errors import InputError, shown

# A keypoint is `dead` when its RMS distance from its own mean position is below this (in sides): it does not follow
# anything; or when a position is not finite.
DEAD_SPREAD = 0.01
# `twin`: the median distance to the nearest other keypoint is below this (in sides).
TWIN_DISTANCE = 0.02
# `centre`: within this distance (in sides) of the volume's centre ...
CENTRE_RADIUS = 0.03
# `border`: nearer than this (in sides) to a side face or the top of the volume, or outside; soft-argmax cannot reach
# the face itself. Feet stand on the floor, so the bottom face counts only from as far below it.
BORDER_MARGIN = 0.03
# ... in at least this share of the frames (both flags).
FRAME_SHARE = 0.8

# `off` the body: of the views that show the keypoint, on average less than this share see foreground there. A part may
# be hidden by another part of the same body, which is foreground too; what misses it in more than one view of five is
# beside it.
OFF_SHARE = 0.8
# `unsure`: the mean peak probability is below this share of the keypoints' median. How high a peak can be depends on
# the size of the heatmaps, so keypoints of one run are compared.
UNSURE_SHARE = 0.25
# `swaps`: told apart from the other keypoints, across views and moments, in less than this share of the trials.
IDENTITY_SHARE = 0.5

FLAGS = ("dead", "twin", "centre", "border", "unsure", "off", "swaps")


@dataclass
class Health:
    """Health of J keypoints over F frames; every list has J entries.

    ``spread``: RMS distance from the mean position, in sides. ``peak``: mean peak probability mass.
    ``at_centre``, ``at_border``: share of the frames. ``twin``: index of the nearest other keypoint (-1 when J = 1),
    ``twin_distance``: median distance to it, in sides (infinite when J = 1). ``flags``: of :data:`FLAGS`, none when it
    is healthy. Where they were measured, ``on_body``: mean share of the views that see foreground there, and
    ``identity``: share of the trials in which it was told apart from the others; else None.
    """

    frames: int
    spread: list[float]
    peak: list[float]
    at_centre: list[float]
    at_border: list[float]
    twin: list[int]
    twin_distance: list[float]
    flags: list[list[str]]
    on_body: list[float] | None = None
    identity: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; a distance that does not exist is None."""
        data = asdict(self)
        data["twin_distance"] = [value if np.isfinite(value) else None for value in self.twin_distance]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Health":
        """Inverse of :meth:`to_dict`; other keys, such as the training step, are ignored.

        Raises:
            InputError: a key is missing.
        """
        if not isinstance(data, dict):
            raise InputError(f"health record: expected names and values, not {shown(data)}")
        missing = [item.name for item in fields(cls) if item.name not in data and item.default is MISSING]
        if missing:
            raise InputError(f"health record: key {missing[0]!r} is missing")
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        known["twin_distance"] = [float("inf") if value is None else value for value in known["twin_distance"]]
        return cls(**known)

    def require(self, joints: int) -> None:
        """Refuse a record that is not of so many keypoints.

        Raises:
            InputError: names the list.
        """
        for item in fields(self):
            values = getattr(self, item.name)
            if item.name == "frames" or (values is None and item.default is None):
                continue
            kind = list if item.name == "flags" else int if item.name == "twin" else (int, float)
            if not isinstance(values, list) or len(values) != joints or not all(isinstance(v, kind) for v in values):
                raise InputError(f"health record: {item.name} must be a list of {joints}, one for each keypoint")
        if any(flag not in FLAGS for flags in self.flags for flag in flags) or not isinstance(self.frames, int):
            raise InputError(f"health record: flags must be of {', '.join(FLAGS)}, frames a whole number")
        if not all(-1 <= twin < joints for twin in self.twin):
            raise InputError("health record: a twin is a keypoint's place, or -1")

    @property
    def looked_for(self) -> list[str]:
        """Those of :data:`FLAGS` that a keypoint could have got here."""
        unknown = {"off": self.on_body is None, "swaps": self.identity is None}
        return [flag for flag in FLAGS if not unknown.get(flag)]

    def count(self, flag: str) -> int:
        """Number of keypoints that carry ``flag``."""
        return sum(flag in flags for flags in self.flags)

    def summary(self) -> str:
        """One line for the training log."""
        total = len(self.flags)
        well = sum(not flags for flags in self.flags)
        counts = ", ".join(f"{self.count(flag)} {flag}" for flag in FLAGS if self.count(flag))
        return (
            f"keypoints {well}/{total} healthy{f' ({counts})' if counts else ''}; "
            f"median spread {np.median(self.spread):.3f} sides, median peak {np.median(self.peak):.3f}"
        )


def keypoint_health(
    positions: np.ndarray,
    confidence: np.ndarray,
    grid_center: np.ndarray,
    grid_sides: np.ndarray,
    up: Sequence[float] | np.ndarray = (0.0, 0.0, 1.0),
    *,
    on_body: np.ndarray | None = None,
    identity: np.ndarray | None = None,
) -> Health:
    """Measure keypoint tracks against the volume that they were found in.

    Args:
        positions: (F, J, 3), world units, in axes parallel to the volume's.
        confidence: (F, J) peak of each probability volume.
        grid_center: (3,) centre of the volume, world units.
        grid_sides: (3,) its sides, world units.
        up: (3,) the world's vertical, not 0; the volume's axis nearest to it tells the bottom face from the top.
        on_body: (F, J) share of the views in which the keypoint is seen on the foreground, from 0 to 1.
        identity: (J,) share of the trials in which each keypoint was told apart from the others, from 0 to 1.

    Raises:
        InputError: shapes that do not fit, no frame, a side that is not positive, or a share that is none.
    """
    positions = np.asarray(positions, dtype=np.float64)
    confidence = np.asarray(confidence, dtype=np.float64)
    center, sides = np.asarray(grid_center, dtype=np.float64), np.asarray(grid_sides, dtype=np.float64)
    if positions.ndim != 3 or positions.shape[2] != 3 or 0 in positions.shape:
        raise InputError(f"positions: expected shape (F, J, 3) with at least one frame, got {positions.shape}")
    if confidence.shape != positions.shape[:2]:
        raise InputError(f"confidence: expected shape {positions.shape[:2]}, got {confidence.shape}")
    if center.shape != (3,) or sides.shape != (3,) or not (sides > 0).all():
        raise InputError(f"volume: expected a centre (3,) and three positive sides, got {center} and {sides}")
    seen = None if on_body is None else _shares("on_body", on_body, positions.shape[:2]).mean(axis=0)
    known = None if identity is None else _shares("identity", identity, positions.shape[1:2])

    # Not-finite positions become NaN: they fail every comparison below, and their spread of 0 marks them dead.
    positions = np.where(np.isfinite(positions), positions, np.nan)
    local = (positions - center) / sides.max()  # (F, J, 3), sides
    spread = np.nan_to_num(np.sqrt(np.square(local - local.mean(axis=0)).sum(axis=2).mean(axis=0)))
    at_centre = (np.linalg.norm(local, axis=2) < CENTRE_RADIUS).mean(axis=0)
    at_border = (_to_border(local, sides / sides.max() / 2, up) < BORDER_MARGIN).mean(axis=0)
    twin, twin_distance = _nearest_twin(local)
    peak = np.nan_to_num(confidence.mean(axis=0))
    marks = {
        "dead": spread < DEAD_SPREAD,
        "twin": twin_distance < TWIN_DISTANCE,
        "centre": at_centre >= FRAME_SHARE,
        "border": at_border >= FRAME_SHARE,
        "unsure": peak < UNSURE_SHARE * np.median(peak),
        "off": np.zeros(len(spread), bool) if seen is None else seen < OFF_SHARE,
        "swaps": np.zeros(len(spread), bool) if known is None else known < IDENTITY_SHARE,
    }
    return Health(
        frames=len(positions),
        spread=spread.tolist(),
        peak=peak.tolist(),
        at_centre=at_centre.tolist(),
        at_border=at_border.tolist(),
        twin=twin.tolist(),
        twin_distance=twin_distance.tolist(),
        flags=[[flag for flag in FLAGS if marks[flag][j]] for j in range(len(spread))],
        on_body=None if seen is None else seen.tolist(),
        identity=None if known is None else known.tolist(),
    )


def _shares(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    shares = np.asarray(values, dtype=np.float64)
    if shares.shape != shape or not ((shares >= 0) & (shares <= 1)).all():
        raise InputError(f"{name}: expected shares from 0 to 1 of shape {shape}, got shape {shares.shape}")
    return shares


def _to_border(local: np.ndarray, half: np.ndarray, up: Sequence[float] | np.ndarray) -> np.ndarray:
    """(F, J, 3) -> distance (F, J) to the nearest face; the bottom is moved down by twice the margin."""
    vertical = np.asarray(up, dtype=np.float64)
    if vertical.shape != (3,) or not np.isfinite(vertical).all() or not vertical.any():
        raise InputError(f"up: expected a direction (3,), got {up}")
    axis = int(np.abs(vertical).argmax())
    above, below = half - local, half + local  # distances to the two faces across each axis
    bottom = below if vertical[axis] > 0 else above
    bottom[..., axis] += 2 * BORDER_MARGIN
    return np.minimum(above, below).min(axis=2)


def _nearest_twin(local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F, J, 3) -> the keypoint with the smallest median distance to each one (J,), and that distance (J,)."""
    joints = local.shape[1]
    distance = np.full((joints, joints), np.inf)
    for i in range(joints - 1):  # a row at a time: (F, J) in memory, not (F, J, J)
        to_later = np.median(np.linalg.norm(local[:, i + 1 :] - local[:, i : i + 1], axis=2), axis=0)
        distance[i, i + 1 :] = distance[i + 1 :, i] = np.nan_to_num(to_later, nan=np.inf)
    nearest = distance.argmin(axis=1)
    return np.where(joints > 1, nearest, -1), distance[np.arange(joints), nearest]
