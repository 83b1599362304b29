"""Evaluation of a run against a project's annotated joints, which training never sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bkind3d.data import Recording, load_truth
from bkind3d.errors import InputError
from bkind3d.models.volumetric import VolumetricModel
from bkind3d.predict import predict_recording
from bkind3d.probe import ProbeOptions, compare, compare_blocked
from bkind3d.run import Inputs, build_model, load_model, open_inputs, open_run, write_json

TRAINED, UNTRAINED = "BKinD-3D", "untrained network"


def evaluate(
    run: Path,
    *,
    every: int = 1,
    bias: bool = False,
    scale: bool = False,
    ridge: float | Literal["auto"] = 0.0,
    blocks: int = 10,
    batch: int = 16,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Regress the annotated joints linearly from the keypoints and write `evaluation.json` (paper, Section 4.1.3).

    With test recordings the probe is fitted on the training recordings and scored on them; a project that has only
    recordings of split "both" is cross-validated over blocks of consecutive frames. Beside the trained network stand
    the same network untrained and the mean pose.

    Args:
        run: Run folder of `bkind3d train`.
        every: Distance between the frames used, on the recording's clock (paper: 240 for Rat7M).
        bias: Give the regression a constant term (paper: none).
        scale: Allow scale in the aligned error (paper: none).
        ridge: Ridge penalty, relative to the mean squared norm of the features, or "auto": chosen inside the training
            frames (paper: none).
        blocks: Number of blocks where recordings are cross-validated.
        batch: Moments per forward pass.
        force: Replace an earlier evaluation.
        progress: Whether to show progress bars.

    Returns:
        The content of `evaluation.json`.

    Raises:
        InputError: No such run or checkpoint, no annotated joints, or an evaluation that exists already.
    """
    path = run / "evaluation.json"
    config = open_run(run)
    if path.exists() and not force:
        raise InputError(f"{path}: exists; give --force to replace it")
    if every < 1:
        raise InputError(f"every: expected 1 or more, got {every}")
    options = ProbeOptions(bias=bias, scale=scale, ridge=ridge)
    inputs = open_inputs(config, progress=progress)
    model, step = load_model(run, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    untrained = build_model(config).to(device)
    settle_statistics(untrained, inputs, batch)
    networks = {TRAINED: model.to(device), UNTRAINED: untrained}
    annotated = [recording for recording in inputs.project.recordings if recording.truth is not None]
    train = [recording for recording in annotated if recording.split == "train"]
    test = [recording for recording in annotated if recording.split == "test"]
    both = [recording for recording in annotated if recording.split == "both"]

    def keypoints(recordings: list[Recording]) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([_positions(network, inputs, r.name, every, batch, progress) for r in recordings])
            for name, network in networks.items()
        }

    if train and test:
        (joints, names, notes), (test_joints, *_) = _joints(inputs, train, every), _joints(inputs, test, every)
        on_train, on_test = keypoints(train), keypoints(test)
        predictions = {name: (on_train[name], on_test[name]) for name in networks}
        result = compare(predictions, joints, test_joints, options, units=inputs.project.units, joint_names=names)
    elif both:
        joints, names, notes = _joints(inputs, both, every)
        result = compare_blocked(
            keypoints(both), joints, blocks, options, units=inputs.project.units, joint_names=names
        )
    else:
        raise InputError(
            f"{config.project}: nothing to evaluate; `truth` is needed in recordings of split train and test, or both"
        )
    result |= {"truth": notes, "step": step, "every": every, "seed": config.train.seed}
    write_json(path, result)
    return result


@torch.no_grad()
def settle_statistics(network: VolumetricModel, inputs: Inputs, batch: int) -> None:
    """Give the batch normalisation of an untrained network the statistics of some training frames.

    With the initial ones, mean 0 and variance 1, it would be a weaker baseline than an untrained network is.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return
    device = next(network.parameters()).device
    recording = inputs.cache.recordings[inputs.recordings("train", "both")[0]]
    frames, projections = recording.frames, recording.projections[None].to(device)
    network.train()
    for chosen in np.array_split(np.linspace(0, len(frames) - 1, min(len(frames), 8 * batch)).astype(int), 8):
        if len(chosen):
            images = torch.from_numpy(frames[chosen]).permute(0, 1, 4, 2, 3).to(device).float() / 255.0
            network.detect(images, projections, inputs.grid.to(device))
    network.eval()


def _positions(
    network: VolumetricModel, inputs: Inputs, name: str, every: int, batch: int, progress: bool
) -> np.ndarray:
    return predict_recording(network, inputs, name, every=every, batch=batch, progress=progress).positions


def _joints(inputs: Inputs, recordings: list[Recording], every: int) -> tuple[np.ndarray, list[str], str]:
    """Annotated joints (F, K, 3) of the recordings, one after another, their names, and how far to trust them."""
    truths = [load_truth(recording, inputs.project) for recording in recordings]
    cached = [inputs.cache.recordings[recording.name] for recording in recordings]
    for recording, truth, entry in zip(recordings, truths, cached, strict=True):
        if len(truth.points3d) != len(entry):
            raise InputError(f"{recording.truth}: {len(truth.points3d)} frames, but the videos have {len(entry)}")
        if list(truth.names) != list(truths[0].names):
            raise InputError(f"{recording.truth}: joints differ from those of {recordings[0].truth}")
    notes = " ".join(dict.fromkeys(truth.note for truth in truths if truth.note))
    points = [truth.points3d[entry.rows(every)] for truth, entry in zip(truths, cached, strict=True)]
    return np.concatenate(points), list(truths[0].names), notes
