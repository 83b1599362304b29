"""The simulated animal: its joints, the bones between them, and the tapered capsules that cover them.

Lengths are in metres. A trunk frame is a rotation whose columns are the forward, left and up directions of that part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAMES = ("pelvis", "spine", "chest", "neck", "head", "tail0", "tail1")

# name, parent, trunk frame, offset from the parent in that frame; a parent always precedes its children.
TRUNK: tuple[tuple[str, str, str, tuple[float, float, float]], ...] = (
    ("pelvis", "", "pelvis", (0.0, 0.0, 0.0)),
    ("spine", "pelvis", "pelvis", (0.09, 0.0, 0.005)),
    ("chest", "spine", "spine", (0.09, 0.0, -0.005)),
    ("neck", "chest", "chest", (0.06, 0.0, 0.03)),
    ("head", "neck", "neck", (0.055, 0.0, 0.03)),
    ("nose", "head", "head", (0.065, 0.0, -0.015)),
    ("tail_base", "pelvis", "pelvis", (-0.06, 0.0, 0.012)),
    ("tail_mid", "tail_base", "tail0", (-0.09, 0.0, 0.0)),
    ("tail_tip", "tail_mid", "tail1", (-0.09, 0.0, 0.0)),
    ("shoulder_left", "chest", "chest", (0.005, 0.05, -0.025)),
    ("shoulder_right", "chest", "chest", (0.005, -0.05, -0.025)),
    ("hip_left", "pelvis", "pelvis", (-0.005, 0.048, -0.015)),
    ("hip_right", "pelvis", "pelvis", (-0.005, -0.048, -0.015)),
)


@dataclass(frozen=True)
class Leg:
    """Two bones below a shoulder or hip; the middle joint bends along `bend` times the trunk's forward direction."""

    root: str
    middle: str
    paw: str
    frame: str
    upper: float
    lower: float
    bend: float
    side: float  # +1 left, -1 right


LEGS = (
    Leg("shoulder_left", "elbow_left", "paw_front_left", "chest", 0.085, 0.085, -1.0, 1.0),
    Leg("shoulder_right", "elbow_right", "paw_front_right", "chest", 0.085, 0.085, -1.0, -1.0),
    Leg("hip_left", "knee_left", "paw_hind_left", "pelvis", 0.09, 0.09, 1.0, 1.0),
    Leg("hip_right", "knee_right", "paw_hind_right", "pelvis", 0.09, 0.09, 1.0, -1.0),
)
PAW_RADIUS = 0.017

# Points that are drawn but are no joints: name, joint that carries them, trunk frame, offset.
EXTRAS: tuple[tuple[str, str, str, tuple[float, float, float]], ...] = (
    ("ear_root_left", "head", "head", (-0.012, 0.026, 0.03)),
    ("ear_root_right", "head", "head", (-0.012, -0.026, 0.03)),
    ("ear_tip_left", "head", "head", (-0.022, 0.048, 0.07)),
    ("ear_tip_right", "head", "head", (-0.022, -0.048, 0.07)),
    ("toe_front_left", "paw_front_left", "chest", (0.022, 0.0, 0.0)),
    ("toe_front_right", "paw_front_right", "chest", (0.022, 0.0, 0.0)),
    ("toe_hind_left", "paw_hind_left", "pelvis", (0.026, 0.0, 0.0)),
    ("toe_hind_right", "paw_hind_right", "pelvis", (0.026, 0.0, 0.0)),
)

JOINTS = (
    *("nose", "head", "neck", "chest", "spine", "pelvis", "tail_base", "tail_mid", "tail_tip"),
    *(name for leg in LEGS for name in (leg.root, leg.middle, leg.paw)),
)
POINTS = (*JOINTS, *(name for name, *_ in EXTRAS))
INDEX = {name: i for i, name in enumerate(POINTS)}

EDGES = np.array(
    [(INDEX[parent], INDEX[name]) for name, parent, *_ in TRUNK if parent]
    + [(INDEX[a], INDEX[b]) for leg in LEGS for a, b in ((leg.root, leg.middle), (leg.middle, leg.paw))],
    dtype=np.int64,
)  # (20, 2)

_DARK, _BROWN, _RUST, _CREAM = (0.13, 0.11, 0.11), (0.30, 0.19, 0.12), (0.50, 0.24, 0.12), (0.90, 0.84, 0.70)
_PINK, _GREY, _BLACK, _WHITE = (0.80, 0.50, 0.46), (0.32, 0.33, 0.38), (0.05, 0.05, 0.06), (0.93, 0.92, 0.90)

# from, to, radius there, radius here, colour there, colour here, trunk frame that says where the back is.
_CAPSULES = (
    ("pelvis", "spine", 0.056, 0.060, _DARK, _BROWN, "pelvis"),
    ("spine", "chest", 0.060, 0.062, _BROWN, _RUST, "spine"),
    ("chest", "neck", 0.056, 0.042, _RUST, _RUST, "chest"),
    ("neck", "head", 0.040, 0.041, _RUST, _CREAM, "neck"),
    ("head", "nose", 0.041, 0.018, _CREAM, _PINK, "head"),
    ("pelvis", "tail_base", 0.050, 0.022, _DARK, _DARK, "pelvis"),
    ("tail_base", "tail_mid", 0.021, 0.016, _PINK, _PINK, "tail0"),
    ("tail_mid", "tail_tip", 0.016, 0.011, _PINK, _WHITE, "tail1"),
    ("shoulder_left", "elbow_left", 0.031, 0.023, _RUST, _BROWN, "chest"),
    ("shoulder_right", "elbow_right", 0.031, 0.023, _RUST, _BROWN, "chest"),
    ("elbow_left", "paw_front_left", 0.021, PAW_RADIUS, _BROWN, _WHITE, "chest"),
    ("elbow_right", "paw_front_right", 0.021, PAW_RADIUS, _BROWN, _BLACK, "chest"),
    ("hip_left", "knee_left", 0.037, 0.025, _DARK, _GREY, "pelvis"),
    ("hip_right", "knee_right", 0.037, 0.025, _DARK, _GREY, "pelvis"),
    ("knee_left", "paw_hind_left", 0.023, PAW_RADIUS, _GREY, _BLACK, "pelvis"),
    ("knee_right", "paw_hind_right", 0.023, PAW_RADIUS, _GREY, _WHITE, "pelvis"),
    ("paw_front_left", "toe_front_left", PAW_RADIUS, 0.013, _WHITE, _WHITE, "chest"),
    ("paw_front_right", "toe_front_right", PAW_RADIUS, 0.013, _BLACK, _BLACK, "chest"),
    ("paw_hind_left", "toe_hind_left", PAW_RADIUS, 0.013, _BLACK, _BLACK, "pelvis"),
    ("paw_hind_right", "toe_hind_right", PAW_RADIUS, 0.013, _WHITE, _WHITE, "pelvis"),
    ("ear_root_left", "ear_tip_left", 0.015, 0.010, _DARK, _PINK, "head"),
    ("ear_root_right", "ear_tip_right", 0.015, 0.010, _DARK, _PINK, "head"),
)


@dataclass(frozen=True)
class Capsules:
    """Tapered capsules (two spheres and the cone that touches both) as columns, one row per capsule (K rows)."""

    ends: np.ndarray  # (K, 2) indices into POINTS
    radii: np.ndarray  # (K, 2) metres
    colors: np.ndarray  # (K, 2, 3) linear in [0, 1]
    frames: np.ndarray  # (K,) indices into FRAMES


CAPSULES = Capsules(
    ends=np.array([(INDEX[c[0]], INDEX[c[1]]) for c in _CAPSULES]),
    radii=np.array([(c[2], c[3]) for c in _CAPSULES], dtype=np.float32),
    colors=np.array([(c[4], c[5]) for c in _CAPSULES], dtype=np.float32),
    frames=np.array([FRAMES.index(c[6]) for c in _CAPSULES]),
)
