"""The virtual human: dm_control's humanoid with the proportions of the CMU motion capture database, in motion."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from bkind3d.data.volume import Volume
from bkind3d.sims.simulate.motion import Gait, band_noise, step_feet
from bkind3d.sims.studio import Ring, rim
from bkind3d.sims.virtual.clip import Posture
from bkind3d.sims.virtual.motion import Path, Temper, wander
from bkind3d.sims.virtual.puppet import Point, Puppet
from bkind3d.sims.virtual.subject import SUBJECT_GROUP, Animation, Subject, edges

TEMPER = Temper(
    moving="walk",
    resting="stand",
    poses={"raise": (1.8, 2.8), "bend": (1.8, 2.8), "squat": (1.8, 2.8)},
    rests=(1.0, 2.0),
    reach=0.4,
    least_walk=0.4,
    cruise=(0.4, 0.8),
    turning=1.8,
    ease=4.5,
)
GAIT = Gait(partners=(-1, -1), swing=0.34, trigger=0.09, lift=0.09, foresight=0.25, farthest=0.25)

POINTS = (
    Point("Head", "head", (0.0, 0.10, 0.0)),
    Point("Neck", "lowerneck"),
    Point("Chest", "thorax"),
    Point("Spine", "upperback"),
    Point("Pelvis", "root"),
    *(
        Point(f"{name}{side}", f"{side.lower()}{body}")
        for side in "LR"
        for name, body in (("Shoulder", "humerus"), ("Elbow", "radius"), ("Hand", "hand"))
    ),
    *(
        Point(f"{name}{side}", f"{side.lower()}{body}")
        for side in "LR"
        for name, body in (("Hip", "femur"), ("Knee", "tibia"), ("Ankle", "foot"), ("Toe", "toes"))
    ),
)
NAMES = [point.name for point in POINTS]
_BONES = (
    "Head-Neck Neck-Chest Chest-Spine Spine-Pelvis Neck-ShoulderL ShoulderL-ElbowL ElbowL-HandL Neck-ShoulderR "
    "ShoulderR-ElbowR ElbowR-HandR Pelvis-HipL HipL-KneeL KneeL-AnkleL AnkleL-ToeL Pelvis-HipR HipR-KneeR KneeR-AnkleR "
    "AnkleR-ToeR"
)
_LEG = ("femurrz", "femurry", "femurrx", "tibiarx", "footrz", "footrx")
# A leg's joints serve two ends, so that the foot points where it should.
LIMBS = {
    f"{end}{side}": tuple(f"{side.lower()}{joint}" for joint in joints)
    for end, joints in (("Ankle", _LEG), ("Toe", ()))
    for side in "LR"
}

_UPRIGHT = Rotation.from_quat([0.5, 0.5, 0.5, 0.5])  # the model's left, up, forward to the world's y, z, x
_LEG_LENGTH = 0.80  # hip to ankle, not quite stretched
_ANKLE_HEIGHT, _TOE_HEIGHT = 0.065, 0.042
_FOOT, _HEEL = 0.105, 0.06  # ankle to toes, and to the middle of the foot, along the floor
_STANCE = 0.10  # of each ankle to its side
_SIDES = np.array([1.0, -1.0])  # left, right
_PIVOT = 0.06  # seconds in which a lifted foot turns to the heading
# Angles of the left arm's joints, hanging and in each pose; the right arm is its mirror image, with these signs.
_ARM = ("humerusrz", "humerusry", "humerusrx", "radiusrx")
_HANGING = np.array([1.5, -0.19, -0.53, 0.25])
_POSES = np.array([[-0.02, 0.95, 1.22, 0.34], [1.31, -0.12, 0.71, 0.24], [1.09, -0.26, 0.83, 0.28]])
_MIRROR = np.array([-1.0, -1.0, 1.0, 1.0])
_COLORS = {
    "head|neck|hand|fingers|thumb|wrist": (0.85, 0.62, 0.50),
    "thorax|back|clavicle|humerus|radius": (0.80, 0.24, 0.18),
    "root|hip|femur|tibia": (0.16, 0.20, 0.36),
    "foot|toes": (0.90, 0.90, 0.86),
}


def _walker(rng: np.random.Generator) -> Any:
    from dm_control.locomotion.walkers import cmu_humanoid

    model = cmu_humanoid.CMUHumanoid().mjcf_model
    for geom in model.find_all("geom"):
        geom.group, geom.material = SUBJECT_GROUP, None
        geom.rgba = next((*color, 1) for parts, color in _COLORS.items() if re.search(parts, geom.parent.name))
    return model


def animate(puppet: Puppet, frames: int, fps: float, rng: np.random.Generator, posture: Posture | None) -> Animation:
    """A new motion of `frames` frames: a path, feet stepped along it, arms that swing, and poses of the whole body."""
    path, keep = wander(frames, fps, TEMPER, rng)
    angles, lean = _posture(puppet, path, rng)
    dt = path.times[1]
    forward = np.stack([np.cos(path.heading), np.sin(path.heading)], axis=-1)
    left = np.stack([-forward[:, 1], forward[:, 0]], axis=-1)
    middles = (path.position + _HEEL * forward)[:, None] + _STANCE * _SIDES[:, None] * left[:, None]
    feet = _feet(step_feet(middles, dt, GAIT), path.heading, dt)
    ankles = feet[:, :2]
    _swing_arms(puppet, angles, np.einsum("sld,sd->sl", ankles[..., :2] - path.position[:, None], forward))
    angles = puppet.within_ranges(angles)
    _, bend, squat = path.poses.T
    hips = np.column_stack([path.position - 0.10 * (bend + squat)[:, None] * forward, _hip_heights(path, ankles, dt)])
    hips[:, 2] -= 0.36 * squat
    qpos: list[np.ndarray] = []
    points: list[np.ndarray] = []
    for i in range(len(path.times))[keep]:
        q = puppet.hang(angles[i], Rotation.from_euler("z", path.heading[i]) * lean[i], ("HipL", "HipR"), hips[i])
        q = puppet.stand(puppet.reach(q, feet[i], qpos[-1] if qpos else q))
        qpos.append(q)
        points.append(puppet.place(q))
    return Animation(np.stack(qpos), np.stack(points), path.behaviour[keep])


def _hip_heights(path: Path, ankles: np.ndarray, dt: float) -> np.ndarray:
    """(S,) as high as the legs reach to the farther foot, smoothed."""
    away = np.linalg.norm(ankles[..., :2] - path.position[:, None], axis=-1).max(axis=1)
    return _ANKLE_HEIGHT + gaussian_filter1d(np.sqrt(_LEG_LENGTH**2 - np.minimum(away, 0.5) ** 2), 0.06 / dt)


def _feet(middles: np.ndarray, heading: np.ndarray, dt: float) -> np.ndarray:
    """Ankles, then toes (S, 4, 3), of feet stepped to (S, 2, 3), which turn to the heading (S,) only in the air."""
    turned = np.empty(middles.shape[:2])
    turned[0] = heading[0]
    for i in range(1, len(turned)):
        lifted = middles[i, :, 2] > 0
        turned[i] = turned[i - 1] + (heading[i] - turned[i - 1]) * -np.expm1(-dt / _PIVOT) * lifted
    forward = np.stack([np.cos(turned), np.sin(turned), np.zeros_like(turned)], axis=-1)
    ankles = middles - _HEEL * forward + [0, 0, _ANKLE_HEIGHT]
    toes = middles * [1.0, 1.0, 0.6] + (_FOOT - _HEEL) * forward + [0, 0, _TOE_HEIGHT]  # a lifted foot hangs down
    return np.concatenate([ankles, toes], axis=1)


def _posture(puppet: Puppet, path: Path, rng: np.random.Generator) -> tuple[np.ndarray, Rotation]:
    """Joint angles qpos (S, Q) with the wanted ones of the legs, and the root's rotation (S,) against the heading."""
    _, bend, squat = path.poses.T
    angles = np.zeros((len(path.times), puppet.model.nq))

    def noise(low: float, high: float) -> np.ndarray:
        return band_noise(path.times, low, high, rng)

    def turn(by: np.ndarray, *joints: str) -> None:
        angles[:, puppet.addresses(joints)] += by[:, None]

    trunk = ("lowerback", "upperback", "thorax")
    turn(0.05 * noise(0.2, 0.8) + 0.07 * path.turn_rate, *(f"{part}ry" for part in trunk))
    turn(0.03 * noise(0.2, 0.8), *(f"{part}rz" for part in trunk))
    turn(0.03 * noise(0.2, 0.8) + 0.26 * bend + 0.08 * squat, *(f"{part}rx" for part in trunk))
    neck = ("lowerneck", "upperneck", "head")
    turn(0.16 * noise(0.2, 0.9) + 0.10 * path.turn_rate, *(f"{part}ry" for part in neck))
    turn(0.08 * noise(0.2, 0.9) - 0.10 * squat, *(f"{part}rx" for part in neck))
    arm = _HANGING + np.einsum("sp,pj->sj", path.poses, _POSES - _HANGING)
    for side, sign, mirror in (("l", 1.0, np.ones(4)), ("r", -1.0, _MIRROR)):
        for place, joint in enumerate(_ARM):
            turn(mirror[place] * (arm[:, place] + 0.08 * noise(0.2, 1.0)), f"{side}{joint}")
        turn(np.full(len(path.times), -0.35 * sign), f"{side}femurrz")  # the model stands with its legs apart
        turn(-0.1 - 1.2 * squat, f"{side}femurrx")
        turn(0.2 + 1.8 * squat, f"{side}tibiarx")
    pitch = 0.03 + 0.02 * noise(0.3, 1.0) + 0.60 * bend + 0.35 * squat
    return angles, Rotation.from_euler("zy", np.column_stack([0.08 * noise(0.2, 0.8), pitch])) * _UPRIGHT


def _swing_arms(puppet: Puppet, angles: np.ndarray, stride: np.ndarray) -> None:
    """Swing each arm with the other leg, whose ankle is `stride` (S, 2) metres before the hips; in place."""
    for side, ahead in zip("lr", stride.T[::-1]):
        turns = np.stack([1.8 * ahead, 1.5 * np.clip(ahead, 0, None)], axis=1)
        angles[:, puppet.addresses((f"{side}humerusrx", f"{side}radiusrx"))] += turns


HUMAN = Subject(
    name="human",
    views=4,
    volume=Volume(center=(0.0, 0.0, 1.05), size=(2.4, 2.4, 2.2)),
    ring=Ring(
        radius=(4.2, 4.8),
        heights=(1.4, 2.6),
        wobble=0.2,
        target=(0.0, 0.0, 0.92),
        miss=0.05,
        framed=rim((0.75, 0.0), (0.65, 2.0)),
    ),
    tile=2.0,
    temper=TEMPER,
    points=POINTS,
    edges=edges(NAMES, _BONES),
    limbs=LIMBS,
    soles=("lfoot", "ltoes", "rfoot", "rtoes"),
    scale=1.7,
    walker=_walker,
    animate=animate,
)
