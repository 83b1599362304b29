"""Distance of predicted joints from the truth, under three alignments (paper, Section 4.1.3).

- ``mpjpe_absolute``: mean joint distance, nothing removed;
- ``mpjpe``: after removing the mean shift over the joints, frame by frame (the paper's MPJPE);
- ``pmpjpe``: after the optimal rigid alignment, frame by frame: rotation and shift, no reflection, no scale.

Lengths are in the unit of the joints. Frames where fewer than three joints are annotated are not scored; a joint that
is NaN in the truth is left out of the errors.
"""

from typing import Any

import numpy as np

from bkind3d.errors import InputError

METRICS = ("mpjpe_absolute", "mpjpe", "pmpjpe")
METRIC_TITLES = {
    "mpjpe_absolute": "MPJPE, absolute",
    "mpjpe": "MPJPE, mean shift removed",
    "pmpjpe": "PMPJPE, rigidly aligned",
}
MIN_JOINTS = 3  # below this a rigid alignment is free


def joint_errors(prediction: np.ndarray, truth: np.ndarray, *, scale: bool = False) -> dict[str, np.ndarray]:
    """Distance of each predicted joint from the truth under the three alignments.

    Args:
        prediction: (F, K, 3).
        truth: (F, K, 3), NaN where not annotated.
        scale: let the alignment of ``pmpjpe`` scale the prediction.

    Returns:
        For each of :data:`METRICS` (F, K), NaN where the truth is NaN and in frames with fewer than three joints.

    Raises:
        InputError: shapes that differ, or a prediction that is not finite.
    """
    if prediction.shape != truth.shape or not np.isfinite(prediction).all():
        raise InputError(f"prediction: expected finite joints of shape {truth.shape}, got {prediction.shape}")
    valid = np.isfinite(truth).all(axis=2)
    valid &= valid.sum(axis=1, keepdims=True) >= MIN_JOINTS
    weight = valid[..., None] / np.maximum(valid.sum(axis=1), 1)[:, None, None]  # (F, K, 1), sums to 1 over joints
    target = np.where(valid[..., None], truth, 0.0)
    source_mean, target_mean = (np.sum(weight * x, axis=1, keepdims=True) for x in (prediction, target))
    source, centred = prediction - source_mean, target - target_mean
    differences = {
        "mpjpe_absolute": prediction - target,
        "mpjpe": source - centred,
        "pmpjpe": _rotate_onto(source, centred, weight, scale) - centred,
    }
    return {name: np.where(valid, np.linalg.norm(value, axis=2), np.nan) for name, value in differences.items()}


def _rotate_onto(source: np.ndarray, target: np.ndarray, weight: np.ndarray, scale: bool) -> np.ndarray:
    """Rotate (and scale) centred joints (F, K, 3) onto centred targets: min Σ w‖s R x − y‖² (Kabsch; Umeyama 1991)."""
    covariance = np.einsum("fki,fkj->fij", weight * target, source)  # Σ w y xᵀ
    left, singular, right = np.linalg.svd(covariance)
    signs = np.ones_like(singular)
    signs[:, 2] = np.sign(np.linalg.det(left) * np.linalg.det(right))  # a proper rotation, never a mirror image
    rotation = (left * signs[:, None, :]) @ right
    aligned = np.einsum("fij,fkj->fki", rotation, source)
    if scale:
        power = np.sum(weight * source**2, axis=(1, 2))
        aligned *= ((singular * signs).sum(axis=1) / np.maximum(power, np.finfo(float).tiny))[:, None, None]
    return aligned


def score(prediction: np.ndarray, truth: np.ndarray, *, scale: bool = False) -> dict[str, Any]:
    """Errors of one prediction: each of :data:`METRICS` as its mean over frames, with ``median`` and ``per_joint``.

    Raises:
        InputError: as :func:`joint_errors`, or no frame has three annotated joints.
    """
    errors = joint_errors(prediction, truth, scale=scale)
    scored = np.isfinite(errors["mpjpe"]).any(axis=1)
    if not scored.any():
        raise InputError(f"test joints: no frame has {MIN_JOINTS} annotated joints, so nothing can be scored")
    per_frame = {name: np.nanmean(error[scored], axis=1) for name, error in errors.items()}
    annotated = np.isfinite(errors["mpjpe"]).any(axis=0)
    return {
        **{name: float(value.mean()) for name, value in per_frame.items()},
        "median": {name: float(np.median(value)) for name, value in per_frame.items()},
        "per_joint": {
            name: [float(np.nanmean(error[:, k])) if annotated[k] else None for k in range(error.shape[1])]
            for name, error in errors.items()
        },
        "frames": int(scored.sum()),
        "frames_skipped": int((~scored).sum()),
    }
