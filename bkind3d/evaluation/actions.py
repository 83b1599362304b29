"""Behaviour from the keypoints of a run, beside true joints and an untrained network (paper, Section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bkind3d.errors import InputError
from bkind3d.evaluation.action_classifier import (
    ActionOptions,
    Fold,
    blocked_folds,
    check_folds,
    compare_actions,
    find_windows,
    format_actions,
    split_fold,
)
from bkind3d.evaluation.evaluate import Annotated, fit_and_test, joints_of, keypoints_of, load_annotated, load_networks
from bkind3d.files import write_json
from bkind3d.run import open_inputs, open_run, refuse_results
from bkind3d.tables import plain

NAME = "actions.json"
TRUE_JOINTS = "true joints"
PAPER = (
    "Paper, Section 4.2, on Human3.6M: the right action was among the best five in 64.8 % with true joints, in 61.0 % "
    "with 15 keypoints and in 64.9 % with 30. Other recordings, behaviours and windows: for context alone."
)


def actions(
    run: Path,
    *,
    window: float = 1.0,
    every: int = 1,
    top: int = 2,
    seeds: int = 3,
    class_weights: Literal["balanced", "none"] = "balanced",
    steps: int = 300,
    blocks: int = 5,
    batch: int = 16,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Classify behaviour from tracks of keypoints, beside true joints, an untrained network and the majority.

    Paper, Section 4.2. A 1D convolutional network over a window of time is trained on the training recordings and
    tested on the test recordings; a project that has only recordings of split "both" is cross-validated over blocks of
    consecutive frames, without the windows that overlap a tested one. Writes `actions.json`.

    Args:
        run: Run folder.
        window: Seconds around each frame that the classifier sees.
        every: Distance between the frames used.
        top: k of the top-k accuracy.
        seeds: Classifiers trained for each kind of track; mean and standard deviation are reported.
        class_weights: "balanced" weighs rare behaviours up in the classifier's loss, "none" does not.
        steps: Training steps of a classifier.
        blocks: Number of blocks where recordings are cross-validated.
        batch: Moments per forward pass; lower it when memory is short.
        force: Replace earlier results.
        progress: Whether to show progress bars and print the result.

    Returns:
        The content of `actions.json`.

    Raises:
        InputError: No such run or checkpoint, no known behaviour, or results that exist already.
    """
    path, config = run / NAME, open_run(run)
    refuse_results(path, force=force)
    inputs = open_inputs(config, progress=progress)
    train, test = fit_and_test(one for one in load_annotated(inputs) if one.truth.behaviour is not None)
    if not train:
        raise InputError(
            f"{config.project}: no behaviour to classify; a truth with `behaviour` is needed in recordings of split "
            "train and test, or both"
        )
    recordings = train + test
    behaviours, labels = behaviour_of(recordings, every)
    options = ActionOptions(window_in_frames(window, recordings, every), top, seeds, class_weights, steps)
    windows = find_windows(labels, [one.cached.clock[one.rows(every)] for one in recordings], options.window, every)
    if test:
        folds = split_fold(windows, range(len(train), len(recordings)))
    else:
        folds = blocked_folds(windows, blocks, options.window)
    check_folds(windows, folds, behaviours, options)
    true = true_tracks(recordings, every)
    networks = load_networks(run, config, inputs, batch)
    found = keypoints_of(networks, recordings, every=every, batch=batch, progress=progress)
    method, untrained = found
    tracks = {method: found[method], TRUE_JOINTS: true, untrained: found[untrained]}
    result = compare_actions(tracks, windows, folds, behaviours, options, up=inputs.project.up)
    result |= {
        "protocol": f"1D convolutional network over {options.window} frames ({window:g} s), {_protocol(folds)}",
        "paper": PAPER,
        "seconds": window,
        "step": networks.step,
        "every": every,
        "seed": config.train.seed,
    }
    write_json(path, result)
    if progress:
        print(describe_actions(result), path, sep="\n")
    return result


def behaviour_of(recordings: Sequence[Annotated], every: int) -> tuple[list[str], list[np.ndarray]]:
    """Names of all behaviours, and for each recording the behaviour (T,) of each used frame, -1 where not known.

    Recordings may list different behaviours: they are matched by name.
    """
    names = list(dict.fromkeys(name for one in recordings for name in one.truth.behaviours))
    labels = []
    for one in recordings:
        place = np.array([*(names.index(name) for name in one.truth.behaviours), -1])
        labels.append(place[np.asarray(one.truth.behaviour)[one.rows(every)]])
    return names, labels


def window_in_frames(seconds: float, recordings: Sequence[Annotated], every: int) -> int:
    """The odd number of used frames nearest to a length of time.

    Raises:
        InputError: recordings of different frame rates.
    """
    rates = [one.cached.fps for one in recordings]
    if max(rates) > 1.01 * min(rates):
        raise InputError(
            f"recordings: a window would be two lengths of time at {min(rates):g} and {max(rates):g} frames per second"
        )
    return 2 * round(seconds * rates[0] / every / 2) + 1


def true_tracks(recordings: Sequence[Annotated], every: int) -> np.ndarray:
    """True joints (F, K, 3) without gaps: interpolated in time; a joint unknown to one recording is left out of all.

    Raises:
        InputError: no joint is annotated in every recording.
    """
    joints = [joints_of([one], every) for one in recordings]
    kept = np.all([np.isfinite(one).all(axis=2).any(axis=0) for one in joints], axis=0)
    if not kept.any():
        raise InputError("truth: no joint is annotated in every recording, so there are no true tracks")
    return np.concatenate([_interpolated(one[:, kept]) for one in joints])


def describe_actions(document: dict[str, Any]) -> str:
    """Protocol, options and rows of :func:`actions` as text for the terminal."""
    options = ", ".join(f"{name} {plain(value)}" for name, value in document["options"].items())
    return f"{document['protocol']}\n{options}\n{format_actions(document)}"


def _protocol(folds: Sequence[Fold]) -> str:
    if len(folds) > 1:
        return (
            f"cross-validated over {len(folds)} blocks of frames; training windows that overlap a tested one left out"
        )
    train, test = len(folds[0].train), len(folds[0].test)
    return f"trained on {train} windows of the training recordings, tested on {test} of the test recordings"


def _interpolated(joints: np.ndarray) -> np.ndarray:
    """(T, K, 3) with each joint's gaps filled along straight lines, and its ends held."""
    filled, time = joints.copy(), np.arange(len(joints))
    for k in range(joints.shape[1]):
        known = np.isfinite(joints[:, k]).all(axis=1)
        for axis in range(3):
            filled[:, k, axis] = np.interp(time, time[known], joints[known, k, axis])
    return filled
