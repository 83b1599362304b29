"""What a virtual subject is: a body, the points that are true, and how it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bkind3d.data.volume import Volume
from bkind3d.sims.studio import Ring
from bkind3d.sims.virtual.clip import Posture
from bkind3d.sims.virtual.motion import Temper
from bkind3d.sims.virtual.puppet import Point, Puppet

ROOM_GROUP, SUBJECT_GROUP = 0, 1  # groups of geoms; what is in others is not drawn


@dataclass(frozen=True)
class Animation:
    """A moving subject: qpos (T, Q), its points (T, P, 3) in metres, and behaviour (T,), places in a temper's list."""

    qpos: np.ndarray
    points: np.ndarray
    behaviour: np.ndarray


@dataclass(frozen=True)
class Subject:
    """A virtual subject.

    Args:
        name: of it.
        views: cameras that film it, unless told otherwise.
        volume: where it moves, metres.
        ring: where the cameras stand.
        tile: metres after which the floor's texture repeats.
        temper: what it does.
        points: that are true.
        edges: bones, (E, 2) places in `points`.
        limbs: name of the point at each limb's end, and the joints that move it.
        soles: bodies that stand on the floor.
        scale: its height or length, metres.
        walker: makes dm_control's model of it.
        animate: makes a new motion from puppet, frames, fps, rng, and postures to follow, if any.
    """

    name: str
    views: int
    volume: Volume
    ring: Ring
    tile: float
    temper: Temper
    points: tuple[Point, ...]
    edges: np.ndarray
    limbs: dict[str, tuple[str, ...]]
    soles: tuple[str, ...]
    scale: float
    walker: Callable[[np.random.Generator], Any]
    animate: Callable[[Puppet, int, float, np.random.Generator, Posture | None], Animation]


def edges(names: list[str], bones: str) -> np.ndarray:
    """Places (E, 2) in `names` of bones written as "A-B B-C"."""
    return np.array([[names.index(end) for end in bone.split("-")] for bone in bones.split()])
