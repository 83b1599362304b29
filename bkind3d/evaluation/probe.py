"""How much posture do the discovered keypoints carry? The probe of the paper (Section 4.1.3), on arrays.

The network is frozen. A regressor from the flattened 3D keypoints (3J) to the annotated joints (3K), linear *without
bias* unless told otherwise, is fitted on training frames and applied to test frames, where the errors of
:mod:`bkind3d.evaluation.alignment` are taken.

A probe over many keypoints lowers the error by itself, so no number stands alone: the mean pose of the training frames
is always a row of the table, and the caller adds an untrained network under the same regression.

A joint that is NaN in the truth is left out of the fit and of the errors, and counted in the result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bkind3d.errors import InputError
from bkind3d.evaluation.alignment import METRIC_TITLES, METRICS, score
from bkind3d.evaluation.blocks import block_numbers
from bkind3d.evaluation.regressors import (
    CHOSEN,
    REGRESSOR_TITLES,
    ProbeOptions,
    checked,
    checked_joints,
    fit_regressor,
    mean_pose,
)
from bkind3d.tables import align, csv_text, number, plain

MEAN_POSE = "mean pose"

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
    "A regression from many keypoints lowers the error by itself: read each row beside the mean pose and the untrained "
    "network. The paper's rows come from other subjects, cameras and joints and are for context, not for comparison."
)


def evaluate_probe(
    train_keypoints: np.ndarray,
    train_joints: np.ndarray,
    test_keypoints: np.ndarray,
    test_joints: np.ndarray,
    options: ProbeOptions | None = None,
) -> dict[str, Any]:
    """Fit on the training frames, score on the test frames; keypoints (F, J, 3), joints (F, K, 3).

    Returns:
        The row of :func:`score`, with a list of what the fit chose: ``ridge`` or ``epochs``.

    Raises:
        InputError: as :func:`fit_regressor`, or training and test arrays that differ in J or K.
    """
    options = options or ProbeOptions()
    train_keypoints, train_joints = checked(train_keypoints, train_joints, "training")
    test_keypoints, test_joints = checked(test_keypoints, test_joints, "test")
    for name, train, test in (("keypoints", train_keypoints, test_keypoints), ("joints", train_joints, test_joints)):
        if train.shape[1:] != test.shape[1:]:
            raise InputError(f"{name}: training has {train.shape[1]} of them and test has {test.shape[1]}")
    probe = fit_regressor(train_keypoints, train_joints, options)
    return score(probe.predict(test_keypoints), test_joints, scale=options.scale) | _listed([probe.chosen])


def predict_blocked(
    keypoints: np.ndarray, joints: np.ndarray, blocks: int = 10, options: ProbeOptions | None = None
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Cross-validated joints: every block of consecutive frames is predicted by a probe that has not seen its joints.

    Returns:
        (F, K, 3) joints, and what the fit chose for each block by holding out some of the *other* blocks: ``ridge`` or
        ``epochs``.
    """
    options = options or ProbeOptions()
    keypoints, joints = checked(keypoints, joints, "evaluated")
    block = block_numbers(len(keypoints), blocks)
    prediction, chosen = np.empty_like(joints), []
    for held_out in range(blocks):
        train, test = block != held_out, block == held_out
        probe = fit_regressor(keypoints[train], joints[train], options, blocks=block[train])
        prediction[test] = probe.predict(keypoints[test])
        chosen.append(probe.chosen)
    return prediction, _listed(chosen)


def evaluate_blocked(
    keypoints: np.ndarray, joints: np.ndarray, blocks: int = 10, options: ProbeOptions | None = None
) -> dict[str, Any]:
    """Blocked cross-validation over time on one recording: the row of :func:`score` with ``ridge`` or ``epochs``."""
    options = options or ProbeOptions()
    prediction, chosen = predict_blocked(keypoints, joints, blocks, options)
    return score(prediction, np.asarray(joints, dtype=np.float64), scale=options.scale) | chosen


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
    train, test = checked_joints(train_joints, "training"), checked_joints(test_joints, "test")
    rows = [
        {"name": name} | evaluate_probe(train_keypoints, train, test_keypoints, test, options)
        for name, (train_keypoints, test_keypoints) in _unreserved(predictions).items()
    ]
    constant = np.broadcast_to(mean_pose(train), test.shape)
    rows.append({"name": MEAN_POSE} | score(constant, test, scale=options.scale))
    title = REGRESSOR_TITLES[options.regressor]
    protocol = f"{title} fitted on {len(train)} training frames, scored on {len(test)} test frames"
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
    truth = checked_joints(joints, "evaluated")
    rows = [
        {"name": name} | evaluate_blocked(keypoints, truth, blocks, options)
        for name, keypoints in _unreserved(predictions).items()
    ]
    block = block_numbers(len(truth), blocks)
    constant = np.stack([mean_pose(truth[block != held_out]) for held_out in range(blocks)])[block]
    rows.append({"name": MEAN_POSE} | score(constant, truth, scale=options.scale))
    title = REGRESSOR_TITLES[options.regressor]
    protocol = f"{title}, cross-validated over {blocks} blocks of consecutive frames of {len(truth)} frames"
    return _document(protocol, options, units, joint_names, rows, [truth])


def format_table(document: Mapping[str, Any]) -> str:
    """Protocol, options and rows of :func:`compare` as text for the terminal."""
    head = ["", *(f"{METRIC_TITLES[name]} ({document['units']})" for name in METRICS)]
    body = [[row["name"], *(number(row[name]) for name in METRICS)] for row in document["rows"]]
    return "\n".join([document["protocol"], describe_options(document), *_truth_note(document), *align(head, body)])


def format_joints(document: Mapping[str, Any]) -> str:
    """Mean-shifted error of each joint, a column for each row of :func:`compare`, as text for the terminal."""
    head = [f"{METRIC_TITLES['mpjpe']} ({document['units']})", *(row["name"] for row in document["rows"])]
    errors = [row["per_joint"]["mpjpe"] for row in document["rows"]]
    body = [[joint, *map(number, values)] for joint, *values in zip(document["joints"], *errors, strict=True)]
    return "\n".join(align(head, body))


def joints_csv(document: Mapping[str, Any]) -> str:
    """The errors of each joint as CSV, one line for each predictor and joint; empty where a joint is not annotated."""
    rows = [
        [row["name"], joint, *(row["per_joint"][name][k] for name in METRICS), document["units"]]
        for row in document["rows"]
        for k, joint in enumerate(document["joints"])
    ]
    return csv_text([["predictor", "joint", *METRICS, "units"], *rows])


def describe_options(document: Mapping[str, Any]) -> str:
    """The options of an evaluation in one line, with what the fits chose by themselves."""
    options = document["options"]
    named = ", ".join(f"{name} {plain(value)}" for name, value in options.items())
    key = CHOSEN[options["regressor"]]
    if options.get(key) not in (None, "auto"):  # a fixed ridge
        return named
    rows = [(row["name"], sorted(set(row[key]))) for row in document["rows"] if key in row]
    return f"{named}; {key} chosen: " + "; ".join(
        f"{name} {', '.join(f'{value:g}' for value in values)}" for name, values in rows
    )


def _truth_note(document: Mapping[str, Any]) -> list[str]:
    return [document["truth"]] if document.get("truth") else []


def _listed(chosen: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """[{name: value}, ...] -> {name: [value, ...]}."""
    return {name: [one[name] for one in chosen] for name in chosen[0]}


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
        "options": options.named(),
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
