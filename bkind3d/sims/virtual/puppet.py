"""A walker of dm_control as a puppet: joints are set, feet and hands reach for targets, nothing is simulated.

Limbs follow by damped least squares on MuJoCo's Jacobians: with e from the ends to their targets,
dq = Jᵀ (J Jᵀ + λ² I)⁻¹ e (Wampler 1986, IEEE Trans. SMC 16(1)), and what is left of the joints' freedom pulls them
towards the wanted posture. Joints stay within their ranges, so every bone keeps its length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from bkind3d.sims.virtual.engine import load_mujoco

_ITERATIONS = 12
_LONGEST_STEP = 0.3  # radians in one iteration
_TOLERANCE = 2e-4  # of a body length
_PULL = 0.1  # share of the way to the wanted posture, in one iteration


@dataclass(frozen=True)
class Point:
    """A point of the subject: its name, and its place in the frame of one of the model's bodies, metres."""

    name: str
    body: str
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Puppet:
    """The moving body of a compiled model, whose root is its first joint.

    Args:
        model: `mujoco.MjModel`.
        points: that are tracked.
        limbs: name of the point at each limb's end, and the joints that move it.
        soles: bodies that stand on the model's `floor`.
        scale: metres; damping and tolerance of reaching go with it.
    """

    def __init__(
        self,
        model: Any,
        points: tuple[Point, ...],
        limbs: dict[str, tuple[str, ...]],
        soles: tuple[str, ...],
        scale: float,
    ) -> None:
        self.mujoco = load_mujoco()
        self.model, self.data = model, self.mujoco.MjData(model)
        self.joint = {model.joint(i).name.removeprefix("walker/"): i for i in range(1, model.njnt)}
        self.names = [point.name for point in points]
        self.bodies = np.array([model.body(f"walker/{point.body}").id for point in points])
        self.offsets = np.array([point.offset for point in points])
        self.ends = np.array([self.names.index(name) for name in limbs])
        joints = [self.joint[name] for joints in limbs.values() for name in joints]
        self.limb_qpos, self.limb_dofs = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self.ranges = model.jnt_range[joints].T
        soles_bodies = [model.body(f"walker/{name}").id for name in soles]
        self.soles = np.flatnonzero(np.isin(model.geom_bodyid, soles_bodies))
        self.floor = model.geom("floor").id
        self.scale = scale

    def addresses(self, joints: Iterable[str]) -> np.ndarray:
        """Where the joints' angles are in qpos."""
        return self.model.jnt_qposadr[[self.joint[joint] for joint in joints]]

    def within_ranges(self, qpos: np.ndarray) -> np.ndarray:
        """A copy of qpos (..., Q) whose joint angles are within their joints' ranges."""
        return np.concatenate([qpos[..., :7], np.clip(qpos[..., 7:], *self.model.jnt_range[1:].T)], axis=-1)

    def place(self, qpos: np.ndarray) -> np.ndarray:
        """Set all joints; returns the points (P, 3), metres."""
        self.data.qpos[:] = qpos
        self.mujoco.mj_kinematics(self.model, self.data)
        return self.points()

    def hang(self, qpos: np.ndarray, rotation: Rotation, names: tuple[str, ...], place: np.ndarray) -> np.ndarray:
        """Turn the root, and shift it until the mean of the named points is at `place` (3,); returns a new qpos."""
        x, y, z, w = rotation.as_quat()
        qpos = np.concatenate([np.zeros(3), [w, x, y, z], qpos[7:]])
        qpos[:3] = place - self.place(qpos)[[self.names.index(name) for name in names]].mean(axis=0)
        return qpos

    def points(self) -> np.ndarray:
        """The points (P, 3) as the body stands."""
        rotation = self.data.xmat.reshape(-1, 3, 3)[self.bodies]
        return self.data.xpos[self.bodies] + np.einsum("pij,pj->pi", rotation, self.offsets)

    def reach(self, qpos: np.ndarray, targets: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Bring the limbs' ends to `targets` (L, 3), near the wanted `qpos`, from the limbs of `start`: a new qpos."""
        wanted = qpos[self.limb_qpos]
        qpos = qpos.copy()
        qpos[self.limb_qpos] = start[self.limb_qpos]
        jacobian = np.empty((3 * len(self.ends), len(self.limb_dofs)))
        full = np.empty((3, self.model.nv))
        damping = (0.02 * self.scale) ** 2 * np.eye(len(jacobian))
        for _ in range(_ITERATIONS):
            points = self.place(qpos)
            error = (targets - points[self.ends]).ravel()
            self.mujoco.mj_comPos(self.model, self.data)
            for row, end in enumerate(self.ends):
                self.mujoco.mj_jac(self.model, self.data, full, None, points[end], self.bodies[end])
                jacobian[3 * row : 3 * row + 3] = full[:, self.limb_dofs]
            inverse = np.linalg.solve(jacobian @ jacobian.T + damping, jacobian).T
            pull = _PULL * (wanted - qpos[self.limb_qpos])
            step = inverse @ error + pull - inverse @ (jacobian @ pull)
            step *= min(1.0, _LONGEST_STEP / max(np.abs(step).max(), 1e-12))
            qpos[self.limb_qpos] = np.clip(qpos[self.limb_qpos] + step, *self.ranges)
        return qpos

    def stand(self, qpos: np.ndarray) -> np.ndarray:
        """Lift or drop the root until the lowest sole touches the floor; returns a new qpos."""
        self.place(qpos)
        gaps = [
            self.mujoco.mj_geomDistance(self.model, self.data, self.floor, sole, self.scale, None)
            for sole in self.soles
        ]
        return np.concatenate([qpos[:2], [qpos[2] - min(gaps)], qpos[3:]])

    def height(self, body: str) -> float:
        """Height of a body's origin as it stands."""
        return float(self.data.xpos[self.model.body(f"walker/{body}").id, 2])

    def frame(self, body: str) -> np.ndarray:
        """Axes of a body as it stands, (3, 3), body to world."""
        return self.data.xmat[self.model.body(f"walker/{body}").id].reshape(3, 3)
