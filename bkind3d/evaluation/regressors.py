"""Regression of annotated joints from discovered keypoints: a linear map (paper), or a small network.

``linear``: joints = flattened keypoints · W, without bias (paper, Section 4.1.3), by least squares, optionally ridge.

``mlp``: two layers, joints = W₂ relu(W₁ x + b₁) + b₂, the kind of regressor that the paper's supplement adds for
keypoints that a linear map underfits. x are the keypoints' coordinates, each standardised over the training frames;
joints are centred on the mean pose and divided by one length, so that the loss stays isotropic. AdamW on the mean
squared distance of the annotated joints, in batches; a fifth of the blocks of consecutive training frames is held out,
and the weights with the smallest mean joint distance there are kept. It runs on the CPU in float32 and gives the same
numbers for the same seed and number of threads.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bkind3d.errors import InputError
from bkind3d.evaluation.alignment import MIN_JOINTS
from bkind3d.evaluation.blocks import inner_blocks

REGRESSOR_TITLES = {"linear": "linear probe", "mlp": "two-layer MLP"}
CHOSEN = {"linear": "ridge", "mlp": "epochs"}  # what a fit decides, or is told
# Candidates of ridge="auto", relative to the mean squared norm of a feature column.
RIDGES = tuple(float(10.0**k) for k in range(-7, 3))

MLP_SETTINGS = {"learning_rate": 3e-3, "weight_decay": 0.1, "batch": 64, "most_epochs": 500, "patience": 50}
HOLD_OUT_EVERY = 5  # blocks
_LEAST_SPREAD = 1e-3  # of the coordinates' RMS: a keypoint that stands still must not count like one that moves
# Options that mean nothing to a regressor; giving one is an error.
_FOREIGN = {"linear": ("hidden", "seed"), "mlp": ("bias", "ridge")}


@dataclass(frozen=True)
class ProbeOptions:
    """Options of the regression and of the alignment; all that apply are written into the result.

    Args:
        regressor: "linear" (paper) or "mlp" (its supplement).
        bias: give the linear map a constant term (the paper: no). Without it, a constant offset is expressed only as
            far as the keypoints span one.
        scale: let the alignment of ``pmpjpe`` scale the prediction as well (the paper: no).
        ridge: penalty λ·m·‖W‖² of the linear map, with m the mean squared norm of a feature column, hence without
            units; ``"auto"`` chooses λ among :data:`RIDGES` by blocked cross-validation inside the training frames.
            0 is the paper's least squares (of minimum norm where the keypoints are linearly dependent).
        hidden: hidden units of the MLP.
        seed: of the MLP's first weights and of its order of frames.

    Raises:
        InputError: a value out of range, or an option of the other regressor.
    """

    regressor: Literal["linear", "mlp"] = "linear"
    bias: bool = False
    scale: bool = False
    ridge: float | str = 0.0
    hidden: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.regressor not in REGRESSOR_TITLES:
            raise InputError(f"regressor: expected one of {', '.join(REGRESSOR_TITLES)}, got {self.regressor!r}")
        numeric = isinstance(self.ridge, (int, float)) and np.isfinite(self.ridge) and self.ridge >= 0
        if not numeric and self.ridge != "auto":
            raise InputError(f'ridge: expected a number of at least 0 or "auto", got {self.ridge!r}')
        if self.hidden < 1:
            raise InputError(f"hidden: expected at least 1 unit, got {self.hidden}")
        for option in fields(self):
            if option.name in _FOREIGN[self.regressor] and getattr(self, option.name) != option.default:
                raise InputError(f"{option.name}: means nothing to the regressor {self.regressor!r}; leave it out")

    def named(self) -> dict[str, Any]:
        """The options that apply, and the MLP's fixed settings, by name."""
        own = {name: value for name, value in asdict(self).items() if name not in _FOREIGN[self.regressor]}
        return own | (MLP_SETTINGS if self.regressor == "mlp" else {})


class Regressor(Protocol):
    """A fitted regressor."""

    @property
    def chosen(self) -> dict[str, float]:
        """``ridge`` of the linear map, or the number of ``epochs`` that the MLP was trained for."""

    def predict(self, keypoints: np.ndarray) -> np.ndarray:
        """(F, J, 3) keypoints -> (F, K, 3) joints."""


def fit_regressor(
    keypoints: np.ndarray, joints: np.ndarray, options: ProbeOptions | None = None, blocks: np.ndarray | None = None
) -> Regressor:
    """Fit the regressor that the options name.

    Args:
        keypoints: (F, J, 3) discovered keypoints, finite.
        joints: (F, K, 3) annotated joints; NaN where a joint is not annotated.
        options: see :class:`ProbeOptions`.
        blocks: (F,) block number of each frame: what is held out inside the training frames, to choose the ridge or
            to stop the MLP; default: ten equal runs of consecutive frames. Unused with a fixed ridge.

    Raises:
        InputError: shapes that do not fit, NaN keypoints, a joint that is never annotated, or too few frames.
    """
    options = options or ProbeOptions()
    keypoints, joints = checked(keypoints, joints, "training")
    features = _flatten(keypoints)
    if options.regressor == "mlp":
        return _fit_mlp(features, joints, inner_blocks(len(features), blocks), options)
    ridge = options.ridge
    if isinstance(ridge, str):
        ridge = _choose_ridge(features, joints, inner_blocks(len(features), blocks), options.bias)
    weights, offsets = _solve(features, joints, [ridge], options.bias)
    return LinearMap(weights[0], offsets[0], {"ridge": float(ridge)})


def mean_pose(joints: np.ndarray) -> np.ndarray:
    """(F, K, 3) -> (K, 3), over the annotated frames of each joint.

    Raises:
        InputError: a joint that is never annotated.
    """
    _annotated_everywhere(joints)
    valid = np.isfinite(joints).all(axis=2, keepdims=True)
    return np.where(valid, joints, 0.0).sum(axis=0) / valid.sum(axis=0)


def checked_joints(joints: np.ndarray, which: str) -> np.ndarray:
    """Joints (F, K, 3) as float64.

    Raises:
        InputError: another shape, no frame, or fewer than three joints.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[2] != 3 or joints.shape[0] == 0 or joints.shape[1] < MIN_JOINTS:
        raise InputError(f"{which} joints: expected (F, K, 3) with K of at least {MIN_JOINTS}, got {joints.shape}")
    return joints


def checked(keypoints: np.ndarray, joints: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (F, J, 3) and joints (F, K, 3) as float64.

    Raises:
        InputError: as :func:`checked_joints`, another number of frames, or keypoints that are not finite.
    """
    keypoints, joints = np.asarray(keypoints, dtype=np.float64), checked_joints(joints, which)
    if keypoints.ndim != 3 or keypoints.shape[2] != 3 or keypoints.shape[1] == 0:
        raise InputError(f"{which} keypoints: expected shape (F, J, 3), got {keypoints.shape}")
    if len(keypoints) != len(joints):
        raise InputError(f"{which} frames: {len(keypoints)} of the keypoints, {len(joints)} of the joints")
    if not np.isfinite(keypoints).all():
        raise InputError(f"{which} keypoints: some are not finite, so the probe cannot be fitted or applied")
    return keypoints, joints


def _annotated_everywhere(joints: np.ndarray) -> None:
    never = np.flatnonzero(~np.isfinite(joints).all(axis=2).any(axis=0))
    if len(never):
        raise InputError(f"training joints: joint {never[0]} is never annotated, so no probe can be fitted; remove it")


def _flatten(keypoints: np.ndarray) -> np.ndarray:
    """(F, J, 3) -> (F, 3J) float64."""
    return np.asarray(keypoints, dtype=np.float64).reshape(len(keypoints), -1)


# --- the linear map -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMap:
    """joints = flattened keypoints · ``weight`` (3J, 3K) + ``offset`` (3K,)."""

    weight: np.ndarray
    offset: np.ndarray
    chosen: dict[str, float]

    def predict(self, keypoints: np.ndarray) -> np.ndarray:
        """(F, J, 3) keypoints -> (F, K, 3) joints."""
        return (_flatten(keypoints) @ self.weight + self.offset).reshape(len(keypoints), -1, 3)


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


# --- the MLP ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mlp:
    """joints = ``length`` · network((flattened keypoints − ``mean``) / ``spread``) + ``pose`` (K, 3)."""

    network: nn.Sequential
    mean: np.ndarray
    spread: np.ndarray
    pose: np.ndarray
    length: float
    chosen: dict[str, float]

    def predict(self, keypoints: np.ndarray) -> np.ndarray:
        """(F, J, 3) keypoints -> (F, K, 3) joints."""
        features = torch.from_numpy((_flatten(keypoints) - self.mean) / self.spread).float()
        with torch.no_grad():
            joints = self.network(features).numpy().astype(np.float64)
        return self.length * joints.reshape(len(keypoints), -1, 3) + self.pose


def _fit_mlp(features: np.ndarray, joints: np.ndarray, blocks: np.ndarray, options: ProbeOptions) -> Mlp:
    pose = mean_pose(joints)
    valid = np.isfinite(joints).all(axis=2)  # (F, K)
    centred = np.where(valid[..., None], joints - pose, 0.0)
    length = float(np.sqrt(np.square(centred).sum() / (3 * valid.sum()))) or 1.0
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.maximum(spread, _LEAST_SPREAD * np.sqrt(np.mean(spread**2))) + (spread.max() == 0)
    held_out = _held_out(blocks, valid)
    arrays = ((features - mean) / spread, centred / length, valid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = nn.Sequential(
            nn.Linear(features.shape[1], options.hidden), nn.ReLU(), nn.Linear(options.hidden, joints[0].size)
        )
        epochs = _train(
            network,
            [torch.from_numpy(array[~held_out]).float() for array in arrays],
            [torch.from_numpy(array[held_out]).float() for array in arrays],
        )
    return Mlp(network, mean, spread, pose, length, {"epochs": epochs})


def _held_out(blocks: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(F,) bool: every fifth block, from the third on, of those where a joint (F, K) is annotated."""
    annotated = np.unique(blocks[valid.any(axis=1)])
    if len(annotated) < 2:
        raise InputError("training frames: fewer than 2 blocks of them have annotated joints, so none can be held out")
    return np.isin(blocks, annotated[min(2, len(annotated) - 1) :: HOLD_OUT_EVERY])


def _train(network: nn.Sequential, train: Sequence[Tensor], held_out: Sequence[Tensor]) -> int:
    """Train until the held-out distance has not fallen for `patience` epochs; keep the best weights, return its epoch.

    Both are keypoints (F, 3J), joints (F, K, 3) and which of these count (F, K).
    """
    rate, decay = MLP_SETTINGS["learning_rate"], MLP_SETTINGS["weight_decay"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay, fused=True)
    best, best_epoch, best_state = np.inf, 0, network.state_dict()
    for epoch in range(1, int(MLP_SETTINGS["most_epochs"]) + 1):
        for features, joints, valid in _batches(train):
            optimizer.zero_grad()
            error = network(features).view_as(joints) - joints
            loss = (error.square().sum(-1) * valid).sum() / valid.sum().clamp_min(1)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            features, joints, valid = held_out
            distance = (network(features).view_as(joints) - joints).norm(dim=-1)
            error_held_out = float((distance * valid).sum() / valid.sum())
        if error_held_out < best:
            best, best_epoch, best_state = error_held_out, epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= MLP_SETTINGS["patience"]:
            break
    network.load_state_dict(best_state)
    return best_epoch


def _batches(arrays: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Random batches of one epoch."""
    for chosen in torch.randperm(len(arrays[0])).split(int(MLP_SETTINGS["batch"])):
        yield [array[chosen] for array in arrays]
