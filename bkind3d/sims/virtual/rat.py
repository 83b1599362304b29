"""The virtual rat: dm_control's rodent (Merel et al. 2020, "Deep neuroethology of a virtual rodent"), in motion."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from bkind3d.data.volume import Volume
from bkind3d.sims.simulate.motion import Gait, band_noise, step_feet
from bkind3d.sims.studio import Ring, rim
from bkind3d.sims.virtual.clip import Posture
from bkind3d.sims.virtual.coat import dress
from bkind3d.sims.virtual.motion import Path, Temper, wander
from bkind3d.sims.virtual.puppet import Point, Puppet
from bkind3d.sims.virtual.subject import Animation, Subject, edges

TEMPER = Temper(
    moving="walk",
    resting="pause",
    poses={"rear": (1.2, 2.0), "groom": (1.4, 2.4)},
    rests=(0.8, 1.6),
    reach=0.08,
    least_walk=0.08,
    cruise=(0.12, 0.24),
    turning=2.4,
    ease=7.0,
)
GAIT = Gait(partners=(3, 2, 1, 0), swing=0.14, trigger=0.018, lift=0.014, foresight=0.10, farthest=0.022)

# The names and their order are those of the motion capture that the rodent was fitted to.
POINTS = (
    Point("Snout", "skull", (0.038, 0.0, -0.005)),
    Point("EarL", "skull", (-0.016, 0.019, 0.020)),
    Point("EarR", "skull", (-0.016, -0.019, 0.020)),
    Point("SpineF", "vertebra_cervical_5", (0.0, 0.0, 0.010)),
    Point("SpineM", "vertebra_1", (0.0, 0.0, 0.005)),
    Point("SpineL", "pelvis", (0.0, 0.0, 0.010)),
    Point("TailBase", "vertebra_C1"),
    *(
        Point(f"{name}{side}", f"{body}_{side}")
        for side in "LR"
        for name, body in (("Shoulder", "upper_arm"), ("Elbow", "lower_arm"), ("Wrist", "hand"), ("Hand", "finger"))
    ),
    *(
        Point(f"{name}{side}", f"{body}_{side}")
        for side in "LR"
        for name, body in (("Hip", "upper_leg"), ("Knee", "lower_leg"), ("Ankle", "foot"), ("Foot", "toe"))
    ),
)
NAMES = [point.name for point in POINTS]
_BONES = (
    "Snout-EarL Snout-EarR EarL-EarR Snout-SpineF SpineF-SpineM SpineM-SpineL SpineL-TailBase "
    "SpineF-ShoulderL ShoulderL-ElbowL ElbowL-WristL WristL-HandL SpineF-ShoulderR ShoulderR-ElbowR ElbowR-WristR "
    "WristR-HandR SpineL-HipL HipL-KneeL KneeL-AnkleL AnkleL-FootL SpineL-HipR HipR-KneeR KneeR-AnkleR AnkleR-FootR"
)
_ARM = (
    "scapula_{}_supinate",
    "scapula_{}_abduct",
    "scapula_{}_extend",
    "shoulder_{}",
    "shoulder_sup_{}",
    "elbow_{}",
    "wrist_{}",
)
_LEG = ("hip_{}_supinate", "hip_{}_abduct", "hip_{}_extend", "knee_{}", "ankle_{}")
LIMBS = {
    f"{end}{side}": tuple(joint.format(side) for joint in joints)
    for end, joints in (("Hand", _ARM), ("Foot", _LEG))
    for side in "LR"
}

# Resting places of HandL, HandR, FootL, FootR about the middle of the trunk: forward, left, and height; metres.
_RESTS = np.array([[0.060, 0.026, 0.004], [0.060, -0.026, 0.004], [-0.048, 0.032, 0.006], [-0.048, -0.032, 0.006]])
_HIPS_BEHIND = 0.052  # the middle of the trunk
_HIP_HEIGHT = 0.052
_SHOULDER_HEIGHT = 0.052
_SIDES = np.array([1.0, -1.0])  # left, right

_BEND = ("vertebra_2_bend", "vertebra_5_bend")
_TWIST = ("vertebra_3_twist", "vertebra_6_twist")
_ARCH = ("vertebra_1_extend", "vertebra_4_extend")
_SCAN = ("vertebra_cervical_4_bend", "vertebra_cervical_1_bend")
_NOD = ("vertebra_cervical_5_extend", "vertebra_cervical_2_extend", "vertebra_atlant_extend")
# Joints that lift the tail, and the end that they bring to a height above the floor, metres: root, then tip.
_TAIL = (
    (tuple(f"vertebra_C{i}_extend" for i in (1, 2, 3, 4, 5, 6)), "vertebra_C12", 0.012),
    (tuple(f"vertebra_C{i}_extend" for i in (7, 11, 15, 19, 23, 27)), "vertebra_C30", 0.006),
)
_TAIL_LEVER = 0.22  # metres by which such an end rises, about, for a radian in each of its joints
_TAIL_SIDEWAYS = tuple(f"vertebra_C{i}_bend" for i in (1, 2, 3, 4, 5, 6, 9, 13, 17, 21, 25, 29))


def _walker(rng: np.random.Generator) -> Any:
    from dm_control.locomotion.walkers import rodent

    model = rodent.Rat().mjcf_model
    dress(model, rng)
    return model


def animate(
    puppet: Puppet,
    frames: int,
    fps: float,
    rng: np.random.Generator,
    posture: Posture | None,
    temper: Temper = TEMPER,
) -> Animation:
    """A new motion of `frames` frames: a path, the trunk's posture along it, feet stepped, paws brought to the face."""
    path, keep = wander(frames, fps, temper, rng)
    angles, tilt = _trunk(puppet, path, rng, posture)
    ground = step_feet(_resting_places(path), path.times[1], GAIT)
    rear, groom = path.poses.T
    calm = 1 - np.maximum(rear, groom)
    licks = 2 * np.pi * np.cumsum(3.6 + 0.6 * band_noise(path.times, 0.2, 0.8, rng)) * path.times[1]
    qpos: list[np.ndarray] = []
    points: list[np.ndarray] = []
    for i in range(len(path.times))[keep]:
        heading = Rotation.from_euler("z", path.heading[i])
        behind = path.position[i] - _HIPS_BEHIND * heading.apply([1, 0, 0])[:2]
        hips = np.array([*behind, _HIP_HEIGHT + 0.004 * rear[i] - 0.012 * groom[i]])
        q = puppet.hang(angles[i], heading * tilt[i], ("HipL", "HipR"), hips)
        level = _levelling(puppet.place(q), calm[i])
        q = puppet.hang(angles[i], heading * level * tilt[i], ("HipL", "HipR"), hips)
        targets = ground[i] + [[0, 0, z] for z in _RESTS[:, 2]]
        targets[:2] = _hands(puppet, puppet.place(q), targets[:2], rear[i], groom[i], licks[i])
        q = puppet.stand(puppet.reach(q, targets, qpos[-1] if qpos else q))
        _lay_tail(puppet, q)
        qpos.append(q)
        points.append(puppet.place(q))
    return Animation(np.stack(qpos), np.stack(points), path.behaviour[keep])


def _lay_tail(puppet: Puppet, qpos: np.ndarray) -> None:
    """Bend the tail until it lies along the floor; in place."""
    for _ in range(4):
        for joints, end, height in _TAIL:
            puppet.place(qpos)
            qpos[puppet.addresses(joints)] += (height - puppet.height(end)) / _TAIL_LEVER
            qpos[:] = puppet.within_ranges(qpos)


def _levelling(points: np.ndarray, share: float) -> Rotation:
    """Pitch that brings the shoulders to where the hands reach the floor; `share` of it, none while rearing."""
    hips, shoulders = (
        points[[NAMES.index(f"{joint}{side}") for side in "LR"]].mean(axis=0) for joint in ("Hip", "Shoulder")
    )
    x, y, z = shoulders - hips
    length = np.hypot(np.hypot(x, y), z)
    wanted = np.clip((_SHOULDER_HEIGHT - _HIP_HEIGHT) / length, -1, 1)
    return Rotation.from_euler("y", share * (np.arcsin(z / length) - np.arcsin(wanted)))


def _resting_places(path: Path) -> np.ndarray:
    """(S, 4, 2) under the trunk, which curves into a turn."""
    bend = 0.12 * path.turn_rate[:, None] * np.sign(_RESTS[:, 0])
    angle = path.heading[:, None] + bend
    c, s = np.cos(angle), np.sin(angle)
    x, y = _RESTS[:, 0], _RESTS[:, 1]
    return path.position[:, None] + np.stack([c * x - s * y, s * x + c * y], axis=-1)


def _trunk(
    puppet: Puppet, path: Path, rng: np.random.Generator, posture: Posture | None
) -> tuple[np.ndarray, Rotation]:
    """Joint angles qpos (S, Q) with the wanted ones of the limbs, and the root's rotation (S,) against the heading."""
    rear, groom = path.poses.T
    calm = 1 - 0.8 * np.maximum(rear, groom)  # poses leave the posture little freedom
    angles, tilt = _improvise(puppet, path.times, rng) if posture is None else posture.at(path.times)
    angles *= calm[:, None]
    curve = 0.10 * path.turn_rate  # the trunk curves into a turn
    pitch = -1.0 * rear - 0.45 * groom
    tilt = Rotation.from_euler("zy", np.column_stack([curve, pitch])) * Rotation.from_rotvec(
        calm[:, None] * tilt.as_rotvec()
    )
    angles[:, puppet.addresses(_BEND)] -= curve[:, None]
    angles[:, puppet.addresses(_SCAN)] += 0.5 * curve[:, None]
    angles[:, puppet.addresses(_ARCH)] += (0.18 * rear - 0.25 * groom)[:, None]
    nod = 0.18 * rear + (0.42 + 0.06 * band_noise(path.times, 1.5, 3.0, rng)) * groom
    angles[:, puppet.addresses(_NOD)] += nod[:, None]
    angles[:, puppet.addresses(("mandible",))] = -0.2  # closed
    angles[:, puppet.addresses(_TAIL_SIDEWAYS)] -= 0.03 * path.turn_rate[:, None]
    return puppet.within_ranges(angles), tilt


def _improvise(puppet: Puppet, times: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Rotation]:
    """A trunk, head and tail that move at random: qpos (S, Q), and the root's rotation (S,)."""
    angles = np.zeros((len(times), puppet.model.nq))
    for joints, size, high in ((_BEND, 0.14, 0.9), (_TWIST, 0.10, 1.0), (_ARCH, 0.10, 1.0), (_SCAN, 0.32, 0.9)):
        angles[:, puppet.addresses(joints)] = size * band_noise(times, 0.2, high, rng)[:, None]
    angles[:, puppet.addresses(_NOD)] = 0.13 * band_noise(times, 0.2, 1.0, rng)[:, None]
    angles[:, puppet.addresses(("vertebra_axis_twist",))] = 0.2 * band_noise(times, 0.3, 1.2, rng)[:, None]
    swing = 0.05 * band_noise(times, 0.3, 1.0, rng)
    for joint in _TAIL_SIDEWAYS:
        angles[:, puppet.addresses((joint,))] = (swing + 0.05 * band_noise(times, 0.3, 1.2, rng))[:, None]
    return angles, Rotation.from_euler("y", 0.06 * band_noise(times, 0.3, 1.0, rng)[:, None])


def _hands(
    puppet: Puppet, points: np.ndarray, ground: np.ndarray, rear: float, groom: float, lick: float
) -> np.ndarray:
    """Where the hands (2, 3) go: the ground, tucked under the chest in rearing, to the face and over it in grooming."""
    stroke = np.sin(lick + 0.35 * _SIDES)
    washing = np.stack([-0.012 - 0.010 * stroke, _SIDES * (0.009 + 0.003 * stroke), -0.012 + 0.008 * stroke], axis=1)
    face = points[NAMES.index("Snout")] + washing @ puppet.frame("skull").T
    under = np.stack([np.full(2, 0.024), -0.002 * _SIDES, np.full(2, -0.042)], axis=1)
    tucked = points[[NAMES.index("ShoulderL"), NAMES.index("ShoulderR")]] + under @ puppet.frame("torso").T
    hands = ground + rear * (tucked - ground)
    return hands + groom * (face - hands)


RAT = Subject(
    name="rat",
    views=6,
    volume=Volume(center=(0.0, 0.0, 0.115), size=(0.5, 0.5, 0.25)),
    ring=Ring(
        radius=(0.95, 1.10),
        heights=(0.36, 0.72),
        wobble=0.05,
        target=(0.0, 0.0, 0.06),
        miss=0.012,
        framed=rim((0.18, 0.02), (0.13, 0.15)),
    ),
    tile=0.5,
    temper=TEMPER,
    points=POINTS,
    edges=edges(NAMES, _BONES),
    limbs=LIMBS,
    soles=("hand_L", "finger_L", "hand_R", "finger_R", "foot_L", "toe_L", "foot_R", "toe_R"),
    scale=0.2,
    walker=_walker,
    animate=animate,
)

# The same animal in an open field of 1.5 m: it runs far, and in any camera it is a tenth of the picture.
_FIELD_TEMPER = replace(TEMPER, reach=0.5, least_walk=0.25)
RAT_IN_A_FIELD = replace(
    RAT,
    name="rat-field",
    volume=Volume(center=(0.0, 0.0, 0.115), size=(1.5, 1.5, 0.3)),
    ring=Ring(
        radius=(1.5, 1.7),
        heights=(0.7, 1.3),
        wobble=0.08,
        target=(0.0, 0.0, 0.06),
        miss=0.03,
        framed=rim((0.66, 0.02), (0.6, 0.15)),
    ),
    temper=_FIELD_TEMPER,
    animate=partial(animate, temper=_FIELD_TEMPER),
)
