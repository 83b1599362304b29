"""Scripted motion on the floor: bouts of walking, turning, resting and of poses on the spot, as a smooth path.

As for the simulated animal, a short clip should hold all there is: headings and behaviours seldom seen are preferred,
and of several drafts of a path the most even one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bkind3d.sims.simulate.motion import wrap

_HEADING_BINS = 8
_DRAFTS = 12
_SUBSTEP = 1 / 60  # seconds, at most
_WARM_UP = 1.0  # seconds left out at the start, while the feet find their places


@dataclass(frozen=True)
class Temper:
    """What a subject does, in metres and seconds.

    Args:
        moving: name of walking and turning.
        resting: name of standing still.
        poses: what it does on the spot, and how long, from least to longest.
        rests: how long it rests, likewise.
        reach: goals lie within ± this.
        least_walk: no goal is nearer.
        cruise: walking speed, least and greatest.
        turning: fastest turn, radians per second.
        ease: rate at which a pose is taken and left, rad/s of a critically damped oscillator.
    """

    moving: str
    resting: str
    poses: dict[str, tuple[float, float]]
    rests: tuple[float, float]
    reach: float
    least_walk: float
    cruise: tuple[float, float]
    turning: float
    ease: float

    @property
    def behaviours(self) -> list[str]:
        """All names, the moving and the resting first."""
        return [self.moving, self.resting, *self.poses]


@dataclass(frozen=True)
class Path:
    """A way over the floor, at times (S,) in seconds.

    Args:
        times: from 0.
        position: (S, 2), metres.
        heading: (S,), radians.
        speed: (S,), metres per second along the heading.
        turn_rate: (S,), radians per second.
        poses: (S, P), how far each pose is taken, 0 to 1 with a soft start and end, in the order of the temper.
        behaviour: (S,) places in the temper's behaviours.
    """

    times: np.ndarray
    position: np.ndarray
    heading: np.ndarray
    speed: np.ndarray
    turn_rate: np.ndarray
    poses: np.ndarray
    behaviour: np.ndarray


def wander(frames: int, fps: float, temper: Temper, rng: np.random.Generator) -> tuple[Path, slice]:
    """A path in steps of at most 1/60 s, and which of its steps are the frames."""
    substeps = int(np.ceil(1 / fps / _SUBSTEP - 1e-9))
    warm_up = int(np.ceil(_WARM_UP * fps)) * substeps
    steps = warm_up + frames * substeps
    keep = slice(warm_up, None, substeps)
    drafts = [_walk(steps, 1 / (fps * substeps), temper, rng) for _ in range(_DRAFTS)]
    return min(drafts, key=lambda draft: _oddity(draft, keep, temper)), keep


def _oddity(path: Path, keep: slice, temper: Temper) -> float:
    """How far a path is from even headings and an even share of every behaviour."""
    headings = np.bincount(_heading_bin(path.heading[keep]), minlength=_HEADING_BINS)
    acts = np.bincount(path.behaviour[keep], minlength=len(temper.behaviours))
    return float(2.0 - headings.min() / headings.mean() - acts.min() / acts.mean())


def _heading_bin(heading: np.ndarray) -> np.ndarray:
    return np.floor(heading / (2 * np.pi) * _HEADING_BINS).astype(np.int64) % _HEADING_BINS


class _Bouts:
    """Chooses what comes next; it prefers headings and poses seldom taken."""

    def __init__(self, temper: Temper, rng: np.random.Generator) -> None:
        self.temper, self.rng = temper, rng
        self.headings = np.zeros(_HEADING_BINS)
        self.acts = dict.fromkeys((temper.resting, *temper.poses), 0.0)
        self.kind = temper.resting
        self.left = 0.3  # seconds
        self.goal = np.zeros(2)
        self.target_heading = 0.0
        self.cruise = 0.0

    def record(self, heading: float, seconds: float) -> None:
        self.headings[self._bin(heading)] += seconds
        if self.kind in self.acts:
            self.acts[self.kind] += seconds

    def next(self, position: np.ndarray, heading: float) -> None:
        still = self.kind in self.acts
        draw = self.rng.uniform()
        if draw < (0.7 if still else 0.12):
            self.kind, self.left = "walk", 3.5
            self.goal = self._choose_goal(position)
            self.cruise = self.rng.uniform(*self.temper.cruise)
        elif still or draw < 0.2:
            self.kind, self.left = "turn", 2.0
            angles = heading + self.rng.uniform(0.3, 0.95, 6) * np.pi * self.rng.choice([-1, 1], 6)
            self.target_heading = angles[np.argmin([self.headings[self._bin(angle)] for angle in angles])]
        else:
            self.kind = min(self.acts, key=lambda kind: self.acts[kind] + self.rng.uniform(0, 0.5))
            durations = self.temper.poses.get(self.kind, self.temper.rests)
            self.left = self.rng.uniform(*durations)

    def _choose_goal(self, position: np.ndarray) -> np.ndarray:
        goals = self.rng.uniform(-self.temper.reach, self.temper.reach, (16, 2))
        offsets = goals - position
        costs = np.array([self.headings[self._bin(np.arctan2(y, x))] for x, y in offsets])
        costs[np.linalg.norm(offsets, axis=1) < self.temper.least_walk] += 1e6
        return goals[np.argmin(costs)]

    @staticmethod
    def _bin(heading: float) -> int:
        return int(_heading_bin(np.asarray(heading)))


def _walk(steps: int, dt: float, temper: Temper, rng: np.random.Generator) -> Path:
    position = rng.uniform(-temper.reach, temper.reach, 2)
    heading, speed, turn_rate = rng.uniform(-np.pi, np.pi), 0.0, 0.0
    poses, pose_rates = np.zeros(len(temper.poses)), np.zeros(len(temper.poses))
    names = np.array(list(temper.poses))
    bouts = _Bouts(temper, rng)
    out, taken = np.empty((steps, 5)), np.empty((steps, len(names)))
    for i in range(steps):
        wanted_speed, wanted_turn, done = 0.0, 0.0, False
        if bouts.kind == "walk":
            offset = bouts.goal - position
            error = wrap(np.arctan2(offset[1], offset[0]) - heading)
            wanted_turn = np.clip(3.0 * error, -temper.turning, temper.turning)
            wanted_speed = bouts.cruise * max(0.0, np.cos(error)) ** 2
            done = bool(np.hypot(*offset) < 0.25 * temper.least_walk)
        elif bouts.kind == "turn":
            error = bouts.target_heading - heading
            wanted_turn = np.clip(3.0 * error, -temper.turning, temper.turning)
            done = abs(error) < 0.15
        speed += (wanted_speed - speed) * -np.expm1(-dt / 0.18)
        turn_rate += (wanted_turn - turn_rate) * -np.expm1(-dt / 0.15)
        wanted = (names == bouts.kind) * float(bouts.left > 2.5 / temper.ease)
        pose_rates += (temper.ease**2 * (wanted - poses) - 2 * temper.ease * pose_rates) * dt
        poses = poses + pose_rates * dt
        heading += turn_rate * dt
        position = position + speed * dt * np.array([np.cos(heading), np.sin(heading)])
        out[i], taken[i] = (*position, heading, speed, turn_rate), poses
        bouts.record(heading, dt)
        bouts.left -= dt
        if done or bouts.left <= 0:
            bouts.next(position, heading)
    moves = (out[:, 3] > 0.2 * temper.cruise[0]) | (np.abs(out[:, 4]) > 0.2 * temper.turning)
    behaviour = np.where(taken.max(axis=1) > 0.3, 2 + taken.argmax(axis=1), np.where(moves, 0, 1))
    taken = taken.clip(0, 1)
    taken = taken * taken * (3 - 2 * taken)
    return Path(dt * np.arange(steps), out[:, :2], out[:, 2], out[:, 3], out[:, 4], taken, behaviour)
