"""3D keypoints of every frame, from a trained run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bkind3d.data import load_project
from bkind3d.errors import InputError
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.poses import Poses
from bkind3d.run import Inputs, available_device, load_model, open_inputs, open_run, refuse_results
from bkind3d.shards import share


@torch.inference_mode()
def predict_recording(
    model: DiscoveryModel,
    inputs: Inputs,
    name: str,
    *,
    every: int = 1,
    batch: int = 16,
    progress: bool = True,
) -> Poses:
    """Find the keypoints in every `every`-th frame of a recording, counted on its clock.

    Args:
        model: Trained or untrained networks, on any device; put into evaluation mode.
        inputs: The run's project, frames and cameras.
        name: Name of the recording.
        every: Distance between frames.
        batch: Moments per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        Keypoints in project units; `frames` tells each row's number on the recording's clock.
    """
    device = next(model.parameters()).device
    recording = inputs.cache.recordings[name]
    rows = recording.rows(every)
    grid = inputs.grid.to(device)
    positions, confidence = [], []
    model.eval()
    for start in tqdm(
        range(0, len(rows), batch), desc=f"predict {name}", unit="batch", disable=None if progress else True
    ):
        images, projections = inputs.pictures(recording, rows[start : start + batch])
        found = model.detect(images.to(device), projections.to(device), grid)
        positions.append(found.positions.float().cpu().numpy())
        confidence.append(found.confidence.float().cpu().numpy())
    return Poses(
        positions=np.concatenate(positions),
        confidence=np.concatenate(confidence),
        fps=recording.fps,
        units=inputs.project.units,
        recording=name,
        frames=recording.clock[rows],
    )


def predict(
    run: Path,
    *,
    recordings: list[str] | None = None,
    shard: str | None = None,
    batch: int = 16,
    force: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write the keypoints of recordings to `poses/<recording>.nc` in the run folder.

    Args:
        run: Run folder of `bkind3d train`.
        recordings: Names of recordings; all of the project when left out.
        shard: "i/n", counted from 1: every n-th of them from the i-th on, for processes side by side; none may be left.
        batch: Moments per forward pass; lower it when memory is short.
        force: Replace poses that exist.
        progress: Whether to show a progress bar.

    Returns:
        The files written.

    Raises:
        InputError: No such run, recording or checkpoint, a bad shard, or poses that exist already.
    """
    config = open_run(run)
    known = load_project(config.project).names()
    for name in recordings or []:
        if name not in known:
            raise InputError(f'recordings: "{name}" is not in {config.project}; it has {", ".join(known)}')
    names = share(recordings or known, shard)
    if not names:
        return []
    paths = [run / "poses" / f"{name}.nc" for name in names]
    refuse_results(*paths, force=force)
    inputs = open_inputs(config, recordings=names, progress=progress)
    model, _ = load_model(run, config)
    model.to(available_device())
    for name, path in zip(names, paths, strict=True):
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from error
        predict_recording(model, inputs, name, batch=batch, progress=progress).save(path)
    return paths
