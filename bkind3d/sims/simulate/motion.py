"""Scripted motion: where the animal goes, how it holds its trunk, and where it sets its feet.

The path is a sequence of bouts (walk to a goal, turn on the spot, pause, rear up) followed by smooth steering. The
trunk follows by forward kinematics, the paws are planted on the floor and stepped, and each leg is solved in closed
form from its two fixed bone lengths, so that no bone ever changes its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bkind3d.sims.simulate.body import EXTRAS, FRAMES, INDEX, JOINTS, LEGS, PAW_RADIUS, POINTS, TRUNK

GOAL_RANGE = 0.25  # goals lie within ± this, so that nose and tail stay inside a volume of ± 0.6
STAND_HEIGHT = 0.172  # of the pelvis
_HEADING_BINS = 8
_DRAFTS = 12  # paths drawn for a motion; the most ordinary one is taken
_REAR_SHARE = 0.1  # of the time, in an ordinary motion
_MINIMUM_RATE = 60.0  # integration steps per second
_WARM_UP = 1.5  # seconds left out at the start, while the feet find their places


@dataclass(frozen=True)
class Gait:
    """How feet are set: lengths in metres, times in seconds.

    Args:
        partners: for each foot the one that may be in the air with it; -1 for none.
        swing: time a foot is in the air.
        trigger: distance between a foot and its resting place that starts a step.
        lift: height of a step.
        foresight: a foot is set down where its resting place will be after this time, ...
        farthest: ... but no farther ahead than this along each axis.
    """

    partners: tuple[int, ...]
    swing: float
    trigger: float
    lift: float
    foresight: float
    farthest: float


GAIT = Gait(partners=(3, 2, 1, 0), swing=0.16, trigger=0.04, lift=0.03, foresight=0.11, farthest=0.045)


@dataclass(frozen=True)
class Animation:
    """A moving body: points (T, P, 3) in metres, in the order of POINTS, and trunk frames (T, F, 3, 3)."""

    points: np.ndarray
    frames: np.ndarray

    @property
    def joints(self) -> np.ndarray:
        """The ground truth: (T, 21, 3) float32, metres."""
        return self.points[:, : len(JOINTS)].astype(np.float32)


@dataclass(frozen=True)
class _Path:
    position: np.ndarray  # (S, 2) of the middle of the trunk
    heading: np.ndarray  # (S,) radians
    turn_rate: np.ndarray  # (S,) radians per second
    rear: np.ndarray  # (S,) 0 on all fours .. 1 upright


def animate(frames: int, fps: float, rng: np.random.Generator) -> Animation:
    """A new motion of `frames` frames; all randomness comes from `rng`."""
    substeps = int(np.ceil(_MINIMUM_RATE / fps))
    rate = fps * substeps
    warm_up = int(_WARM_UP * fps) * substeps
    steps = warm_up + frames * substeps
    drafts = [_walk(steps, 1.0 / rate, rng) for _ in range(_DRAFTS)]
    path = min(drafts, key=lambda draft: _oddity(draft, warm_up))
    points, rotations = _pose_trunk(path, rate, rng)
    paws = _step_paws(points, rotations, path.rear, 1.0 / rate)
    keep = slice(warm_up, None, substeps)
    points, rotations = points[keep], rotations[keep]
    _solve_legs(points, rotations, path.heading[keep], paws[keep])
    _attach_extras(points, rotations, path.heading[keep], path.rear[keep])
    return Animation(points, rotations)


def _oddity(path: _Path, first: int) -> float:
    """How far a path is from even headings and the usual share of rearing: a short clip should hold all there is."""
    bins = np.floor(path.heading[first:] / (2 * np.pi) * _HEADING_BINS).astype(np.int64) % _HEADING_BINS
    counts = np.bincount(bins, minlength=_HEADING_BINS)
    return float(1.0 - counts.min() / counts.mean() + 4.0 * abs(path.rear[first:].mean() - _REAR_SHARE))


def wrap(angle: float) -> float:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


class _Bouts:
    """Chooses what the animal does next; it prefers headings seldom taken, so that a short clip covers all of them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.visits = np.zeros(_HEADING_BINS)
        self.kind = "pause"
        self.left = 0.3  # seconds
        self.goal = np.zeros(2)
        self.target_heading = 0.0
        self.cruise = 0.25  # metres per second

    def record(self, heading: float, seconds: float) -> None:
        self.visits[self._bin(heading)] += seconds

    def next(self, position: np.ndarray, heading: float) -> None:
        rng = self.rng
        choices = {"walk": 0.55, "turn": 0.2, "pause": 0.13, "rear": 0.12}
        if self.kind in ("pause", "rear"):
            choices = {"walk": 0.7, "turn": 0.3}
        self.kind = str(rng.choice(list(choices), p=list(choices.values())))
        if self.kind == "walk":
            self.goal = self._choose_goal(position)
            self.cruise = rng.uniform(0.2, 0.38)
            self.left = 3.5
        elif self.kind == "turn":
            angles = heading + rng.uniform(0.3, 0.95, 6) * np.pi * rng.choice([-1, 1], 6)
            self.target_heading = angles[np.argmin([self.visits[self._bin(a)] for a in angles])]
            self.left = 2.0
        elif self.kind == "rear":
            self.left = rng.uniform(1.0, 1.8)
        else:
            self.left = rng.uniform(0.4, 1.0)

    def _choose_goal(self, position: np.ndarray) -> np.ndarray:
        goals = self.rng.uniform(-GOAL_RANGE, GOAL_RANGE, (16, 2))
        offsets = goals - position
        costs = np.array([self.visits[self._bin(np.arctan2(y, x))] for x, y in offsets])
        costs[np.linalg.norm(offsets, axis=1) < 0.18] += 1e6
        return goals[np.argmin(costs)]

    def _bin(self, heading: float) -> int:
        return int(np.floor(heading / (2 * np.pi) * _HEADING_BINS)) % _HEADING_BINS


def _walk(steps: int, dt: float, rng: np.random.Generator) -> _Path:
    position = rng.uniform(-0.2, 0.2, 2)
    heading, speed, turn_rate, rear, rear_rate = rng.uniform(-np.pi, np.pi), 0.0, 0.0, 0.0, 0.0
    bouts = _Bouts(rng)
    out = np.empty((steps, 5))
    for i in range(steps):
        wanted_speed, wanted_turn, wanted_rear, done = 0.0, 0.0, 0.0, False
        if bouts.kind == "walk":
            offset = bouts.goal - position
            error = wrap(np.arctan2(offset[1], offset[0]) - heading)
            wanted_turn = np.clip(3.0 * error, -2.2, 2.2)
            wanted_speed = bouts.cruise * max(0.0, np.cos(error)) ** 2
            done = bool(np.hypot(*offset) < 0.06)
        elif bouts.kind == "turn":
            error = bouts.target_heading - heading
            wanted_turn = np.clip(3.0 * error, -2.2, 2.2)
            wanted_speed = 0.05
            done = abs(error) < 0.15
        elif bouts.kind == "rear":
            wanted_rear = float(bouts.left > 0.35)
        speed += (wanted_speed - speed) * -np.expm1(-dt / 0.18)
        turn_rate += (wanted_turn - turn_rate) * -np.expm1(-dt / 0.15)
        rear_rate += (49.0 * (wanted_rear - rear) - 14.0 * rear_rate) * dt  # critically damped, 7 rad/s
        rear += rear_rate * dt
        heading += turn_rate * dt
        position = position + speed * dt * np.array([np.cos(heading), np.sin(heading)])
        out[i] = *position, heading, turn_rate, rear
        bouts.record(heading, dt)
        bouts.left -= dt
        if done or bouts.left <= 0:
            bouts.next(position, heading)
    return _Path(out[:, :2], out[:, 2], out[:, 3], out[:, 4])


def band_noise(times: np.ndarray, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise (S,) of unit variance with all its power between `low` and `high` hertz."""
    frequencies = rng.uniform(low, high, 7)
    phases = rng.uniform(0, 2 * np.pi, 7)
    waves = np.sin(2 * np.pi * np.multiply.outer(times, frequencies) + phases)
    return waves.sum(axis=1) * np.sqrt(2.0 / 7.0)


def _yaw(angle: np.ndarray) -> np.ndarray:
    c, s, z, o = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([c, -s, z, s, c, z, z, z, o], axis=-1).reshape(*angle.shape, 3, 3)


def _pitch(angle: np.ndarray) -> np.ndarray:
    """Positive lifts the front."""
    c, s, z, o = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([c, z, -s, z, o, z, s, z, c], axis=-1).reshape(*angle.shape, 3, 3)


def _roll(angle: np.ndarray) -> np.ndarray:
    c, s, z, o = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([o, z, z, z, c, -s, z, s, c], axis=-1).reshape(*angle.shape, 3, 3)


def _pose_trunk(path: _Path, rate: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points (S, P, 3), the trunk's filled in, and trunk frames (S, F, 3, 3), by forward kinematics."""
    steps = len(path.heading)
    times = np.arange(steps) / rate

    def noise(low: float, high: float) -> np.ndarray:
        return band_noise(times, low, high, rng)

    bend = 0.22 * path.turn_rate + 0.08 * noise(0.2, 0.8)  # the trunk curves into a turn
    rear = path.rear
    scan = 0.35 * noise(0.2, 0.9)
    swing = 0.35 * noise(0.3, 1.2) - 0.15 * path.turn_rate
    rotations = dict.fromkeys(FRAMES, np.empty(0))
    pelvis = _yaw(path.heading - 0.5 * bend) @ _pitch(0.55 * rear + 0.04 * noise(0.3, 1.0))
    rotations["pelvis"] = pelvis @ _roll(0.06 * noise(0.4, 1.5))
    rotations["spine"] = rotations["pelvis"] @ _yaw(0.5 * bend) @ _pitch(0.3 * rear + 0.05 * noise(0.3, 1.0))
    rotations["chest"] = rotations["spine"] @ _yaw(0.5 * bend) @ _pitch(0.15 * rear + 0.05 * noise(0.3, 1.0))
    nod = -0.1 - 0.3 * rear + 0.22 * noise(0.2, 1.0)
    rotations["neck"] = rotations["chest"] @ _yaw(0.12 * path.turn_rate + scan) @ _pitch(nod)
    rotations["head"] = rotations["neck"] @ _yaw(0.6 * scan) @ _pitch(-0.1 - 0.3 * rear + 0.15 * noise(0.3, 1.5))
    # Pitch turns the tail's backward offset downwards when positive: it hangs while standing and lifts when rearing.
    rotations["tail0"] = rotations["pelvis"] @ _yaw(swing) @ _pitch(0.15 - 0.45 * rear + 0.12 * noise(0.2, 0.8))
    rotations["tail1"] = rotations["tail0"] @ _yaw(0.8 * swing + 0.2 * noise(0.5, 1.5)) @ _pitch(np.full(steps, -0.3))
    points = np.zeros((steps, len(POINTS), 3))
    forward = rotations["pelvis"][:, :2, 0] / np.linalg.norm(rotations["pelvis"][:, :2, 0], axis=1, keepdims=True)
    root = points[:, INDEX["pelvis"]]
    root[:, :2] = path.position - 0.10 * forward
    root[:, 2] = STAND_HEIGHT - 0.012 * np.clip(rear, 0, None) + 0.004 * noise(0.5, 1.5)
    for name, parent, frame, offset in TRUNK:
        if parent:
            points[:, INDEX[name]] = points[:, INDEX[parent]] + rotations[frame] @ np.array(offset)
    return points, np.stack([rotations[name] for name in FRAMES], axis=1)


def _step_paws(points: np.ndarray, frames: np.ndarray, rear: np.ndarray, dt: float) -> np.ndarray:
    """Wanted paw positions (S, 4, 3): stepped under shoulder and hip; in rearing, the chest carries the front paws.

    Only diagonal pairs swing together, which gives a walk or trot.
    """
    roots = np.stack([points[:, INDEX[leg.root]] for leg in LEGS], axis=1)  # (S, 4, 3)
    left = np.stack([frames[:, FRAMES.index(leg.frame), :2, 1] * leg.side for leg in LEGS], axis=1)
    rests = roots[..., :2] + 0.008 * left  # (S, 4, 2)
    paws = step_feet(rests, dt, GAIT)
    paws[..., 2] += PAW_RADIUS
    chest = frames[:, FRAMES.index("chest")]
    carried = np.clip(rear, 0, 1)[:, None]
    carried = carried * carried * (3 - 2 * carried)
    for leg in range(2):
        tucked = roots[:, leg] + chest @ np.array([0.055, 0.0, -0.085])
        paws[:, leg] = (1 - carried) * paws[:, leg] + carried * tucked
    return paws


def step_feet(rests: np.ndarray, dt: float, gait: Gait) -> np.ndarray:
    """Foot positions (S, L, 3), metres: planted on the floor until the body has moved on, then stepped after it.

    `rests` (S, L, 2) are the places under the body where the feet would be at rest, `dt` seconds apart.
    """
    steps, legs = rests.shape[:2]
    velocities = np.gradient(rests, dt, axis=0)
    feet = np.empty((steps, legs, 3))
    planted = rests[0].copy()
    lifted_from = rests[0].copy()
    swing = np.full(legs, -1.0)  # share of the swing done; -1 while planted
    for i in range(steps):
        for leg in range(legs):
            if swing[leg] < 0:
                others = [k for k in range(legs) if swing[k] >= 0]
                distance = np.hypot(*(planted[leg] - rests[i, leg]))
                if distance > 2.5 * gait.trigger or (
                    distance > gait.trigger and all(k == gait.partners[leg] for k in others)
                ):
                    swing[leg] = 0.0
                    lifted_from[leg] = planted[leg]
            height = 0.0
            if swing[leg] >= 0:
                swing[leg] = min(1.0, swing[leg] + dt / gait.swing)
                u = swing[leg]
                lead = np.clip(gait.foresight * velocities[i, leg], -gait.farthest, gait.farthest)
                blend = u * u * (3 - 2 * u)
                planted[leg] = (1 - blend) * lifted_from[leg] + blend * (rests[i, leg] + lead)
                height = gait.lift * 4 * u * (1 - u)
                if u >= 1.0:
                    swing[leg] = -1.0
            feet[i, leg] = *planted[leg], height
    return feet


def _solve_legs(points: np.ndarray, frames: np.ndarray, heading: np.ndarray, paws: np.ndarray) -> None:
    """Fill in middle joints and paws: two bones of fixed length from the root towards the wanted paw."""
    level = np.stack([np.cos(heading), np.sin(heading), np.zeros_like(heading)], axis=-1)
    for i, leg in enumerate(LEGS):
        root = points[:, INDEX[leg.root]]
        reach = paws[:, i] - root
        distance = np.linalg.norm(reach, axis=1, keepdims=True)
        axis = reach / distance
        distance = np.clip(distance, abs(leg.upper - leg.lower) + 0.02, leg.upper + leg.lower - 0.002)
        outward = frames[:, FRAMES.index(leg.frame), :, 1] * leg.side
        pole = leg.bend * level + 0.25 * outward
        pole = pole - (pole * axis).sum(axis=1, keepdims=True) * axis
        pole /= np.linalg.norm(pole, axis=1, keepdims=True)
        along = (leg.upper**2 - leg.lower**2 + distance**2) / (2 * distance)
        points[:, INDEX[leg.middle]] = root + along * axis + np.sqrt(leg.upper**2 - along**2) * pole
        points[:, INDEX[leg.paw]] = root + distance * axis


def _attach_extras(points: np.ndarray, frames: np.ndarray, heading: np.ndarray, rear: np.ndarray) -> None:
    """Ears move with the head; toes point along the heading, and downwards while the front paws are carried."""
    for name, joint, frame, offset in EXTRAS:
        if frame == "head":
            turn = frames[:, FRAMES.index(frame)]
        else:
            droop = -1.2 * np.clip(rear, 0, 1) if frame == "chest" else np.zeros_like(rear)
            turn = _yaw(heading) @ _pitch(droop)
        points[:, INDEX[name]] = points[:, INDEX[joint]] + turn @ np.array(offset)
