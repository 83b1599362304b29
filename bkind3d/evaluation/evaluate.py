"""Evaluation of a run against a project's annotated joints, which training never sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bkind3d.config import Config
from bkind3d.data import CachedRecording, Recording, Truth, load_truth
from bkind3d.errors import InputError
from bkind3d.evaluation.parts import compare_parts, format_parts
from bkind3d.evaluation.probe import compare, compare_blocked, format_joints, format_table, joints_csv
from bkind3d.evaluation.regressors import ProbeOptions
from bkind3d.evaluation.skeleton_summary import format_skeleton, summarise_skeleton
from bkind3d.evaluation.stand_ins import format_label_free, label_free
from bkind3d.files import write_json, write_text
from bkind3d.models.body import identity_loss
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.models.methods import METHODS
from bkind3d.predict import predict_recording
from bkind3d.run import (
    Inputs,
    available_device,
    build_model,
    load_model,
    open_inputs,
    open_run,
    refuse_results,
)
from bkind3d_kernels.geometry import project_points

UNTRAINED = "untrained network"
RECOGNISED = 24  # moments in which keypoints are looked for by their looks


@dataclass(frozen=True)
class Annotated:
    """A recording with its frames and its truth, which covers every frame."""

    recording: Recording
    cached: CachedRecording
    truth: Truth

    def rows(self, every: int) -> np.ndarray:
        """Rows of the frames used, (F,): the first and every `every`-th after it on the recording's clock.

        Raises:
            InputError: `every` is less than 1.
        """
        if every < 1:
            raise InputError(f"every: expected 1 or more, got {every}")
        return self.cached.rows(every)


@dataclass(frozen=True)
class Networks:
    """A run's networks, trained and untrained, ready to find keypoints.

    Attributes:
        config: The run's settings.
        inputs: Its project, frames and cameras.
        step: Training step of the checkpoint.
        trained: The networks of that checkpoint.
        untrained: The same networks before training.
    """

    config: Config
    inputs: Inputs
    step: int
    trained: DiscoveryModel
    untrained: DiscoveryModel

    def named(self) -> dict[str, DiscoveryModel]:
        """Both, by the name of their row in a table."""
        return {method_title(self.config): self.trained, UNTRAINED: self.untrained}


def method_title(config: Config) -> str:
    """What tables call a run's method."""
    return METHODS[config.method].title


def evaluate(
    run: Path,
    *,
    every: int = 1,
    regressor: Literal["linear", "mlp"] = "linear",
    bias: bool = False,
    scale: bool = False,
    ridge: float | Literal["auto"] = 0.0,
    hidden: int = 128,
    seed: int = 0,
    blocks: int = 10,
    per_joint: bool = False,
    batch: int = 16,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Regress annotated joints from the keypoints, beside an untrained network and the mean pose.

    Paper, Section 4.1.3. With test recordings the regression is fitted on the training recordings and scored on them; a
    project that has only recordings of split "both" is cross-validated over blocks of consecutive frames. The skeleton
    is summarised over the scored frames, and there too it is measured whether the keypoints are parts of the body,
    beside random fixed points of the true skeleton and its outline. Writes `evaluation.json` and the errors of each
    joint as `evaluation.csv`.

    Args:
        run: Run folder.
        every: Distance between the frames used, on the recording's clock (paper: 240 for Rat7M).
        regressor: "linear" (paper), or "mlp": two layers (paper's supplement).
        bias: Give the linear map a constant term (paper: none).
        scale: Allow scale in the aligned error (paper: none).
        ridge: Ridge penalty of the linear map, relative to the mean squared norm of the features, or "auto": chosen
            inside the training frames (paper: none).
        hidden: Hidden units of the MLP.
        seed: Seed of the MLP.
        blocks: Number of blocks where recordings are cross-validated.
        per_joint: Print the error of each joint as well.
        batch: Moments per forward pass; lower it when memory is short.
        force: Replace an earlier evaluation.
        progress: Whether to show progress bars and print the result.

    Returns:
        The content of `evaluation.json`.

    Raises:
        InputError: No such run or checkpoint, no annotated joints, or an evaluation that exists already.
    """
    path, table = run / "evaluation.json", run / "evaluation.csv"
    config = open_run(run)
    refuse_results(path, table, force=force)
    options = ProbeOptions(regressor, bias, scale, ridge, hidden, seed)
    inputs = open_inputs(config, progress=progress)
    train, test = fit_and_test(load_annotated(inputs))
    if not train:
        raise InputError(
            f"{config.project}: nothing to evaluate; `truth` is needed in recordings of split train and test, or both"
        )
    joints, test_joints = joints_of(train, every), joints_of(test, every) if test else None
    networks = load_networks(run, config, inputs, batch)
    on_train = keypoints_of(networks, train, every=every, batch=batch, progress=progress)
    named: dict[str, Any] = {"units": inputs.project.units, "joint_names": train[0].truth.names}
    if test_joints is None:
        scored, scored_joints = on_train, joints
        result = compare_blocked(on_train, joints, blocks, options, **named)
    else:
        scored, scored_joints = keypoints_of(networks, test, every=every, batch=batch, progress=progress), test_joints
        pairs = {name: (on_train[name], scored[name]) for name in scored}
        result = compare(pairs, joints, test_joints, options, **named)
    truth, edges = train[0].truth, active_edges(networks.trained)
    skeleton = summarise_skeleton(scored[method_title(config)], edges, scored_joints, truth.edges)
    parts = compare_parts(scored, scored_joints, truth.edges, truth.names, units=inputs.project.units, edges=edges)
    notes = " ".join(dict.fromkeys(one.truth.note for one in train + test if one.truth.note))
    result |= {"parts": parts, "skeleton": skeleton, "truth": notes}
    if inputs.body_size is not None:
        positions = scored[method_title(config)]
        result["label_free"] = without_labels(networks, test or train, positions, every=every, batch=batch)
    result |= {"step": networks.step, "every": every, "seed": config.train.seed}
    write_json(path, result)
    write_text(table, joints_csv(result))
    if progress:
        print(format_table(result), format_parts(parts), format_skeleton(skeleton), sep="\n")
        if "label_free" in result:
            print(format_label_free(result["label_free"]))
        if per_joint:
            print(format_joints(result))
        print(path)
    return result


def load_networks(run: Path, config: Config, inputs: Inputs, batch: int) -> Networks:
    """A run's trained and untrained networks, on the device.

    Raises:
        InputError: No checkpoint.
    """
    trained, step = load_model(run, config)
    untrained = build_model(config).to(available_device())
    settle_statistics(untrained, inputs, batch)
    return Networks(config, inputs, step, trained.to(available_device()), untrained)


@torch.no_grad()
def settle_statistics(network: DiscoveryModel, inputs: Inputs, batch: int) -> None:
    """Give the batch normalisation of an untrained network the statistics of some training frames.

    With the initial ones, mean 0 and variance 1, it would be a weaker baseline than an untrained network is.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return
    device = next(network.parameters()).device
    recording = inputs.cache.recordings[inputs.project.names("train", "both")[0]]
    network.train()
    for chosen in np.array_split(np.linspace(0, len(recording) - 1, min(len(recording), 8 * batch)).astype(int), 8):
        if len(chosen):
            images, projections = inputs.pictures(recording, chosen)
            network.detect(images.to(device), projections.to(device), inputs.grid.to(device))
    network.eval()


def load_annotated(inputs: Inputs) -> list[Annotated]:
    """All recordings that have a truth, with it.

    Raises:
        InputError: A truth cannot be read, has another number of frames than the videos, or other joints or bones than
            the first.
    """
    found: list[Annotated] = []
    for recording in inputs.project.recordings:
        if recording.truth is None:
            continue
        truth, cached = load_truth(recording, inputs.project), inputs.cache.recordings[recording.name]
        if len(truth.points3d) != len(cached):
            raise InputError(f"{recording.truth}: {len(truth.points3d)} frames, but the videos have {len(cached)}")
        first = found[0].truth if found else truth
        if truth.names != first.names or not np.array_equal(truth.edges, first.edges):
            raise InputError(f"{recording.truth}: joints or bones differ from those of {found[0].recording.truth}")
        found.append(Annotated(recording, cached, truth))
    return found


def fit_and_test(annotated: Iterable[Annotated]) -> tuple[list[Annotated], list[Annotated]]:
    """Recordings to fit on and to score on.

    Returns:
        Those of split train and test where there are both; else those of split both and none, for cross-validation.
    """
    splits: dict[str, list[Annotated]] = {"train": [], "test": [], "both": []}
    for one in annotated:
        splits[one.recording.split].append(one)
    if splits["train"] and splits["test"]:
        return splits["train"], splits["test"]
    return splits["both"], []


def joints_of(annotated: Sequence[Annotated], every: int) -> np.ndarray:
    """True joints (F, K, 3) of the recordings, one after another."""
    return np.concatenate([one.truth.points3d[one.rows(every)] for one in annotated])


def keypoints_of(
    networks: Networks, annotated: Sequence[Annotated], *, every: int, batch: int, progress: bool
) -> dict[str, np.ndarray]:
    """Keypoints (F, J, 3) of the recordings, one after another, by the name of the network that found them."""
    return {
        name: found_by(network, networks.inputs, annotated, every=every, batch=batch, progress=progress)
        for name, network in networks.named().items()
    }


def found_by(
    network: DiscoveryModel, inputs: Inputs, annotated: Sequence[Annotated], *, every: int, batch: int, progress: bool
) -> np.ndarray:
    """Keypoints (F, J, 3) that one network finds in the recordings, one after another."""
    names = [one.recording.name for one in annotated]
    poses = [predict_recording(network, inputs, name, every=every, batch=batch, progress=progress) for name in names]
    return np.concatenate([one.positions for one in poses])


def without_labels(
    networks: Networks, annotated: Sequence[Annotated], positions: np.ndarray, *, every: int, batch: int
) -> dict[str, Any]:
    """What can be said of the trained network's keypoints from the foreground alone: the mean over the recordings.

    Args:
        networks: The run's.
        annotated: The recordings.
        positions: Keypoints (F, J, 3) that the trained network found in them, one after another.
        every: Distance between the frames used.
        batch: Moments per forward pass.
    """
    model, inputs = networks.trained, networks.inputs
    moments = [one.rows(every) for one in annotated]
    found = []
    for one, rows, of_one in zip(
        annotated, moments, np.split(positions, np.cumsum([len(rows) for rows in moments])[:-1]), strict=True
    ):
        seen = label_free(of_one, one.cached.projections.numpy(), one.cached.masks[rows], active_edges(model))
        found.append(seen | {"identity": recognised(model, inputs, one.cached, rows, batch)})
    return {
        name: None if any(one[name] is None for one in found) else float(np.mean([one[name] for one in found]))
        for name in ("on_body", "identity", "rigidity", "overlap")
    }


@torch.no_grad()
def recognised(
    model: DiscoveryModel, inputs: Inputs, recording: CachedRecording, rows: np.ndarray, batch: int
) -> float | None:
    """Share of the pictures in which a keypoint is found again by its looks; None for a network without descriptors.

    Args:
        model: In evaluation mode.
        inputs: The run's.
        recording: Where to look.
        rows: Moments to choose from; at most RECOGNISED of them are taken, evenly.
        batch: Moments per forward pass.
    """
    if model.body is None:
        return None
    device = next(model.parameters()).device
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), RECOGNISED)).astype(int)]
    described = []
    for some in np.array_split(chosen, max(1, -(-len(chosen) // batch))):
        images, projections = (part.to(device) for part in inputs.pictures(recording, some))
        found = model.detect(images, projections, inputs.grid.to(device))
        pixels, _ = project_points(projections, found.positions[:, None])
        size = (images.shape[-2], images.shape[-1])
        described.append(model.body.describe(found.features, pixels.flatten(0, 1), size))
    _, share = identity_loss(torch.cat(described))
    return float(share.mean())


def active_edges(model: DiscoveryModel) -> np.ndarray:
    """(E, 2) pairs of keypoints that the model's active edges join."""
    return model.skeleton.pairs[model.skeleton.active].cpu().numpy()
