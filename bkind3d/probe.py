"""How much posture do the discovered keypoints carry? The linear probe of the paper (Section 4.1.3), on arrays.

The network is frozen. A linear map *without bias* from the flattened 3D keypoints (3J) to the annotated joints (3K) is
fitted on training frames and applied to test frames; three errors are taken there:

- ``mpjpe_absolute``: mean joint distance, nothing removed;
- ``mpjpe``: after removing the mean shift over the joints, frame by frame (the paper's MPJPE);
- ``pmpjpe``: after the optimal rigid alignment, frame by frame: rotation and shift, no reflection, no scale.

A probe over many keypoints lowers the error by itself, so no number stands alone: the mean pose of the training frames
is always a row of the table, and the caller adds an untrained network under the same regression.

Lengths are in the unit of the joints. Frames where fewer than three joints are annotated are not scored; a joint that
is NaN in the truth is left out of the fit and of the errors; both are counted in the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bkind3d.errors import InputError

METRICS = ("mpjpe_absolute", "mpjpe", "pmpjpe")
METRIC_TITLES = {
    "mpjpe_absolute": "MPJPE, absolute",
    "mpjpe": "MPJPE, mean shift removed",
    "pmpjpe": "PMPJPE, rigidly aligned",
}
MEAN_POSE = "mean pose"
MIN_JOINTS = 3  # below this a rigid alignment is free
INNER_BLOCKS = 10
# Candidates of ridge="auto", relative to the mean squared norm of a feature column.
RIDGES = tuple(float(10.0**k) for k in range(-7, 3))

PAPER_SOURCE = "Sun et al., BKinD-3D, CVPR 2023, Tables 2 to 4"
PAPER_ROWS: tuple[dict[str, Any], ...] = tuple(
    {"dataset": dataset, "name": name, "pmpjpe": pmpjpe, "mpjpe": mpjpe, "units": "mm", "table": table}
    for dataset, name, pmpjpe, mpjpe, table in (
        ("Human3.6M", "BKinD-3D, 15 keypoints", 105, 125, 2),
        ("Human3.6M", "depth map", 122, 161, 2),
        ("Human3.6M", "triangulation + reprojection", 134, 241, 2),
        ("Human3.6M", "Keypoint3D", 168, 368, 2),
        ("Rat7M", "BKinD-3D", 24, 76, 3),
        ("Rat7M", "depth map", 27, 56, 3),
        ("Rat7M", "triangulation + reprojection", 21, 108, 3),
        ("Human3.6M", "BKinD-3D, 8 keypoints", 120, 149, 4),
        ("Human3.6M", "BKinD-3D, 30 keypoints", 109, 130, 4),
        ("Human3.6M", "BKinD-3D, points without edges", 110, 137, 4),
        ("Human3.6M", "BKinD-3D, edges without length loss", 108, 129, 4),
    )
)
NOTE = (
    "A linear map from many keypoints lowers the error by itself: read each row beside the mean pose and the untrained "
    "network. The paper's rows come from other subjects, cameras and joints and are for context, not for comparison."
)


@dataclass(frozen=True)
class ProbeOptions:
    """Options of the probe and of the alignment; all are written into the result.

    Args:
        bias: give the linear map a constant term (the paper: no). Without it, a constant offset is expressed only as
            far as the keypoints span one.
        scale: let the alignment of ``pmpjpe`` scale the prediction as well (the paper: no).
        ridge: penalty λ·m·‖W‖² with m the mean squared norm of a feature column, hence without units; ``"auto"``
            chooses λ among :data:`RIDGES` by blocked cross-validation inside the training frames. 0 is the paper's
            least squares (of minimum norm where the keypoints are linearly dependent).

    Raises:
        InputError: a ridge that is neither "auto" nor a finite number ≥ 0.
    """

    bias: bool = False
    scale: bool = False
    ridge: float | str = 0.0

    def __post_init__(self) -> None:
        numeric = isinstance(self.ridge, (int, float)) and np.isfinite(self.ridge) and self.ridge >= 0
        if not numeric and self.ridge != "auto":
            raise InputError(f'ridge: expected a number of at least 0 or "auto", got {self.ridge!r}')


@dataclass(frozen=True)
class Probe:
    """A fitted linear map: joints = flattened keypoints · ``weight`` (3J, 3K) + ``offset`` (3K,)."""

    weight: np.ndarray
    offset: np.ndarray
    ridge: float

    def predict(self, keypoints: np.ndarray) -> np.ndarray:
        """(F, J, 3) keypoints -> (F, K, 3) joints."""
        return (_flatten(keypoints) @ self.weight + self.offset).reshape(len(keypoints), -1, 3)


def fit_probe(
    keypoints: np.ndarray, joints: np.ndarray, options: ProbeOptions | None = None, blocks: np.ndarray | None = None
) -> Probe:
    """Fit the linear probe.

    Args:
        keypoints: (F, J, 3) discovered keypoints, finite.
        joints: (F, K, 3) annotated joints; NaN where a joint is not annotated.
        options: see :class:`ProbeOptions`.
        blocks: (F,) block number of each frame, held out in turn when the ridge is chosen; default: ten equal runs of
            consecutive frames. Unused with a fixed ridge.

    Raises:
        InputError: shapes that do not fit, NaN keypoints, or a joint that is never annotated.
    """
    options = options or ProbeOptions()
    keypoints, joints = _checked(keypoints, joints, "training")
    features = _flatten(keypoints)
    if options.ridge != "auto":
        ridge = float(options.ridge)
    else:
        blocks = block_numbers(len(features), min(INNER_BLOCKS, len(features))) if blocks is None else blocks
        ridge = _choose_ridge(features, joints, blocks, options.bias)
    weights, offsets = _solve(features, joints, [ridge], options.bias)
    return Probe(weights[0], offsets[0], ridge)


def block_numbers(frames: int, blocks: int) -> np.ndarray:
    """(F,) the block of each frame: ``blocks`` runs of consecutive frames whose lengths differ by at most one."""
    if not 2 <= blocks <= frames:
        raise InputError(f"blocks: expected between 2 and the number of frames ({frames}), got {blocks}")
    return np.arange(frames) * blocks // frames


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


def score(prediction: np.ndarray, truth: np.ndarray, options: ProbeOptions) -> dict[str, Any]:
    """Errors of one prediction: each of :data:`METRICS` as its mean over frames, with ``median`` and ``per_joint``."""
    errors = joint_errors(prediction, truth, scale=options.scale)
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


def evaluate_probe(
    train_keypoints: np.ndarray,
    train_joints: np.ndarray,
    test_keypoints: np.ndarray,
    test_joints: np.ndarray,
    options: ProbeOptions | None = None,
) -> dict[str, Any]:
    """Fit on the training frames, score on the test frames; keypoints (F, J, 3), joints (F, K, 3).

    Returns:
        The row of :func:`score`, with ``ridge``, a list of the one penalty used.

    Raises:
        InputError: as :func:`fit_probe`, or training and test arrays that differ in J or K.
    """
    options = options or ProbeOptions()
    train_keypoints, train_joints = _checked(train_keypoints, train_joints, "training")
    test_keypoints, test_joints = _checked(test_keypoints, test_joints, "test")
    for name, train, test in (("keypoints", train_keypoints, test_keypoints), ("joints", train_joints, test_joints)):
        if train.shape[1:] != test.shape[1:]:
            raise InputError(f"{name}: training has {train.shape[1]} of them and test has {test.shape[1]}")
    probe = fit_probe(train_keypoints, train_joints, options)
    return score(probe.predict(test_keypoints), test_joints, options) | {"ridge": [probe.ridge]}


def predict_blocked(
    keypoints: np.ndarray, joints: np.ndarray, blocks: int = 10, options: ProbeOptions | None = None
) -> tuple[np.ndarray, list[float]]:
    """Cross-validated joints: every block of consecutive frames is predicted by a probe that has not seen its joints.

    Returns:
        (F, K, 3) joints, and the ridge of each block (chosen by holding out the *other* blocks in turn).
    """
    options = options or ProbeOptions()
    keypoints, joints = _checked(keypoints, joints, "evaluated")
    number = block_numbers(len(keypoints), blocks)
    prediction, ridges = np.empty_like(joints), []
    for block in range(blocks):
        train, test = number != block, number == block
        probe = fit_probe(keypoints[train], joints[train], options, blocks=number[train])
        prediction[test] = probe.predict(keypoints[test])
        ridges.append(probe.ridge)
    return prediction, ridges


def evaluate_blocked(
    keypoints: np.ndarray, joints: np.ndarray, blocks: int = 10, options: ProbeOptions | None = None
) -> dict[str, Any]:
    """Blocked cross-validation over time on one recording: the row of :func:`score` with ``ridge``, one per block."""
    options = options or ProbeOptions()
    prediction, ridges = predict_blocked(keypoints, joints, blocks, options)
    return score(prediction, np.asarray(joints, dtype=np.float64), options) | {"ridge": ridges}


def compare(
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]],
    train_joints: np.ndarray,
    test_joints: np.ndarray,
    options: ProbeOptions | None = None,
    *,
    units: str,
    joint_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The table for separate training and test frames, the mean-pose predictor added.

    Args:
        predictions: name -> (training keypoints (F, J, 3), test keypoints (G, J, 3)); J may differ between names.
        train_joints: (F, K, 3).
        test_joints: (G, K, 3).
        options: see :class:`ProbeOptions`.
        units: unit of length of the joints.
        joint_names: K names, written beside the errors per joint.

    Returns:
        The content of ``evaluation.json``: protocol, options, units, joints, rows, masked, paper, note.
    """
    options = options or ProbeOptions()
    train, test = _joints(train_joints, "training"), _joints(test_joints, "test")
    rows = [
        {"name": name} | evaluate_probe(train_keypoints, train, test_keypoints, test, options)
        for name, (train_keypoints, test_keypoints) in _unreserved(predictions).items()
    ]
    mean_pose = np.broadcast_to(_mean_pose(train), test.shape)
    rows.append({"name": MEAN_POSE} | score(mean_pose, test, options))
    protocol = f"linear probe fitted on {len(train)} training frames, scored on {len(test)} test frames"
    return _document(protocol, options, units, joint_names, rows, [train, test])


def compare_blocked(
    predictions: Mapping[str, np.ndarray],
    joints: np.ndarray,
    blocks: int = 10,
    options: ProbeOptions | None = None,
    *,
    units: str,
    joint_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The table by blocked cross-validation over one recording: name -> keypoints (F, J, 3); see :func:`compare`."""
    options = options or ProbeOptions()
    truth = _joints(joints, "evaluated")
    rows = [
        {"name": name} | evaluate_blocked(keypoints, truth, blocks, options)
        for name, keypoints in _unreserved(predictions).items()
    ]
    number = block_numbers(len(truth), blocks)
    mean_pose = np.stack([_mean_pose(truth[number != block]) for block in range(blocks)])[number]
    rows.append({"name": MEAN_POSE} | score(mean_pose, truth, options))
    protocol = f"linear probe, cross-validated over {blocks} blocks of consecutive frames of {len(truth)} frames"
    return _document(protocol, options, units, joint_names, rows, [truth])


def format_table(document: Mapping[str, Any]) -> str:
    """Protocol, options and rows of :func:`compare` as text for the terminal."""
    units, options = document["units"], document["options"]
    chosen = sorted({ridge for row in document["rows"] for ridge in row.get("ridge", ())})
    ridge = f"auto, chosen {', '.join(f'{x:g}' for x in chosen)}" if options["ridge"] == "auto" else options["ridge"]
    about = [
        document["protocol"],
        f"bias {_yes(options['bias'])}, scale {_yes(options['scale'])}, ridge {ridge}",
        *([document["truth"]] if document.get("truth") else []),
    ]
    head = ["", *(f"{METRIC_TITLES[name]} ({units})" for name in METRICS)]
    body = [[row["name"], *(f"{row[name]:.4g}" for name in METRICS)] for row in document["rows"]]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(f"{x:<{w}}" if i == 0 else f"{x:>{w}}" for i, (x, w) in enumerate(zip(line, widths)))
        for line in [head, *body]
    ]
    return "\n".join([*about, *lines])


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _document(
    protocol: str,
    options: ProbeOptions,
    units: str,
    joint_names: Sequence[str] | None,
    rows: list[dict[str, Any]],
    truths: list[np.ndarray],
) -> dict[str, Any]:
    count = truths[0].shape[1]
    if joint_names is not None and len(joint_names) != count:
        raise InputError(f"joint_names: expected {count} names, got {len(joint_names)}")
    missing = int(sum((~np.isfinite(truth).all(axis=2)).sum() for truth in truths))
    return {
        "protocol": protocol,
        "options": asdict(options),
        "units": units,
        "joints": list(joint_names) if joint_names is not None else [f"joint {k}" for k in range(count)],
        "rows": rows,
        "masked": {"joints": missing, "of": int(sum(truth.shape[0] * truth.shape[1] for truth in truths))},
        "paper": [dict(row) for row in PAPER_ROWS],
        "paper_source": PAPER_SOURCE,
        "note": NOTE,
    }


def _unreserved(predictions: Mapping[str, Any]) -> Mapping[str, Any]:
    if MEAN_POSE in predictions:
        raise InputError(f"predictions: the name {MEAN_POSE!r} is reserved for the predictor that is always added")
    return predictions


def _mean_pose(joints: np.ndarray) -> np.ndarray:
    """(F, K, 3) -> (K, 3), over the annotated frames of each joint."""
    _annotated_everywhere(joints)
    valid = np.isfinite(joints).all(axis=2, keepdims=True)
    return np.where(valid, joints, 0.0).sum(axis=0) / valid.sum(axis=0)


def _annotated_everywhere(joints: np.ndarray) -> None:
    never = np.flatnonzero(~np.isfinite(joints).all(axis=2).any(axis=0))
    if len(never):
        raise InputError(f"training joints: joint {never[0]} is never annotated, so no probe can be fitted; remove it")


def _solve(
    features: np.ndarray, joints: np.ndarray, ridges: Sequence[float], bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression for several penalties at once: weights (R, 3J, 3K), offsets (R, 3K).

    One singular value decomposition X = U S Vᵀ serves all: W = V · s/(s² + λm) · UᵀY, where singular values below
    NumPy's rank tolerance are dropped; λ = 0 then is the least-squares solution of minimum norm.
    """
    _annotated_everywhere(joints)
    valid = np.isfinite(joints).all(axis=2)  # (F, K)
    dims, count = features.shape[1], joints.shape[1]
    weights, offsets = np.zeros((len(ridges), dims, count, 3)), np.zeros((len(ridges), count, 3))
    patterns, pattern_of = np.unique(valid, axis=1, return_inverse=True)
    for pattern, rows in enumerate(patterns.T):  # joints annotated in the same frames share one decomposition
        members = np.flatnonzero(pattern_of.ravel() == pattern)
        x, y = features[rows], joints[rows][:, members].reshape(rows.sum(), -1)
        x_mean, y_mean = (x.mean(axis=0), y.mean(axis=0)) if bias else (np.zeros(dims), np.zeros(y.shape[1]))
        left, singular, right = np.linalg.svd(x - x_mean, full_matrices=False)
        kept = singular > singular.max(initial=0.0) * max(x.shape) * np.finfo(np.float64).eps
        left, singular, right = left[:, kept], singular[kept], right[kept]
        projected = left.T @ (y - y_mean)
        penalty = np.sum(singular**2) / dims
        for r, ridge in enumerate(ridges):
            weight = right.T @ ((singular / (singular**2 + ridge * penalty))[:, None] * projected)
            weights[r][:, members] = weight.reshape(dims, len(members), 3)
            offsets[r][members] = (y_mean - x_mean @ weight).reshape(-1, 3)
    return weights.reshape(len(ridges), dims, -1), offsets.reshape(len(ridges), -1)


def _choose_ridge(features: np.ndarray, joints: np.ndarray, blocks: np.ndarray, bias: bool) -> float:
    """The candidate with the smallest mean joint distance over held-out blocks."""
    total, count = np.zeros(len(RIDGES)), 0
    for block in np.unique(blocks):
        train, test = blocks != block, blocks == block
        weights, offsets = _solve(features[train], joints[train], RIDGES, bias)
        prediction = (features[test] @ weights + offsets[:, None]).reshape(len(RIDGES), int(test.sum()), -1, 3)
        valid = np.isfinite(joints[test]).all(axis=2)
        distance = np.linalg.norm(prediction - np.where(valid[..., None], joints[test], 0.0), axis=3)  # (R, f, K)
        total += (distance * valid).sum(axis=(1, 2))
        count += int(valid.sum())
    return RIDGES[int(np.argmin(total / max(count, 1)))]


def _flatten(keypoints: np.ndarray) -> np.ndarray:
    """(F, J, 3) -> (F, 3J) float64."""
    return np.asarray(keypoints, dtype=np.float64).reshape(len(keypoints), -1)


def _joints(joints: np.ndarray, which: str) -> np.ndarray:
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[2] != 3 or joints.shape[0] == 0 or joints.shape[1] < MIN_JOINTS:
        raise InputError(f"{which} joints: expected (F, K, 3) with K of at least {MIN_JOINTS}, got {joints.shape}")
    return joints


def _checked(keypoints: np.ndarray, joints: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    keypoints, joints = np.asarray(keypoints, dtype=np.float64), _joints(joints, which)
    if keypoints.ndim != 3 or keypoints.shape[2] != 3 or keypoints.shape[1] == 0:
        raise InputError(f"{which} keypoints: expected shape (F, J, 3), got {keypoints.shape}")
    if len(keypoints) != len(joints):
        raise InputError(f"{which} frames: {len(keypoints)} of the keypoints, {len(joints)} of the joints")
    if not np.isfinite(keypoints).all():
        raise InputError(f"{which} keypoints: some are not finite, so the probe cannot be fitted or applied")
    return keypoints, joints
