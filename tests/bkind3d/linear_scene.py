"""Joints that are a linear map of keypoints."""

import numpy as np


def linear_scene(frames=120, keypoints=4, joints=5, seed=0, constant=0.0):
    """Keypoints at random and joints that are an exact linear map of them (plus a constant)."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(frames, keypoints, 3))
    matrix = rng.normal(size=(3 * keypoints, 3 * joints))
    return u, (u.reshape(frames, -1) @ matrix).reshape(frames, joints, 3) + constant
