"""Postures of a real rat: joint angles of the rodent, fitted to motion capture, at any time and without the path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation, Slerp

from bkind3d.errors import InputError

_QPOS = 74  # of the rodent: place, quaternion, and 67 joints
_SMOOTHING = 0.06  # seconds, standard deviation: the fit of single frames is noisy


class Posture:
    """A clip of postures, played forwards and backwards without a jump.

    Args:
        qpos: (T, Q), the root's place and quaternion (w first), then joint angles.
        fps: of the clip.
    """

    def __init__(self, qpos: np.ndarray, fps: float) -> None:
        self.qpos, self.fps = gaussian_filter1d(qpos, _SMOOTHING * fps, axis=0), fps
        rotation = Rotation.from_quat(qpos[:, [4, 5, 6, 3]])
        tilt = Rotation.from_euler("z", -np.median(np.unwrap(rotation.as_euler("ZYX")[:, 0]))) * rotation
        self.tilt = Rotation.from_rotvec(gaussian_filter1d(tilt.as_rotvec(), _SMOOTHING * fps, axis=0))

    def at(self, times: np.ndarray) -> tuple[np.ndarray, Rotation]:
        """qpos (S, Q) with the joint angles at `times` (S,), seconds, and the root's rotation (S,)."""
        last = len(self.qpos) - 1
        place = np.abs((times * self.fps + last) % (2 * last) - last)
        low = np.minimum(place.astype(np.int64), last - 1)
        share = (place - low)[:, None]
        return (1 - share) * self.qpos[low] + share * self.qpos[low + 1], Slerp(np.arange(last + 1), self.tilt)(place)


def load_postures(path: Path, share: float) -> tuple[Posture, Posture]:
    """Read a motion file; its first `share` is for training, the rest for testing.

    The file is an npz with qpos (T, 74) of the rodent, and fps.

    Raises:
        InputError: the file cannot be read, lacks an array, or holds no motion of the rodent.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            qpos, fps = file["qpos"].astype(np.float64), float(file["fps"])
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not an npz file of arrays ({error})") from None
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}; expected qpos and fps") from None
    if qpos.ndim != 2 or qpos.shape[1] != _QPOS or len(qpos) < 10:
        raise InputError(f"{path}: qpos {qpos.shape} must be (frames, {_QPOS}), of at least 10 frames")
    if not np.isfinite(qpos).all() or not 0 < fps < np.inf:
        raise InputError(f"{path}: qpos and fps must be finite numbers, and fps above 0")
    if np.abs(np.linalg.norm(qpos[:, 3:7], axis=1) - 1).max() > 0.01:
        raise InputError(f"{path}: qpos[:, 3:7] must be a unit quaternion, w first, in every frame")
    cut = round(share * len(qpos))
    cut = min(max(cut, 2), len(qpos) - 2)
    return Posture(qpos[:cut], fps), Posture(qpos[cut:], fps)
