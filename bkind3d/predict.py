"""3D keypoints of every frame, from a trained run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bkind3d.agreement import on_body, reprojection_error
from bkind3d.checkpoints import latest_checkpoint
from bkind3d.data import CachedRecording, load_project
from bkind3d.errors import InputError
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.poses import Poses
from bkind3d.run import Inputs, available_device, load_model, open_inputs, open_run
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
    """Find the keypoints in every `every`-th frame of a recording, counted on its clock, and how the views agree.

    Frames are read batch by batch: memory does not grow with the recording, but for the keypoints themselves.

    Args:
        model: Trained or untrained networks, on any device; put into evaluation mode.
        inputs: The run's project, frames and cameras.
        name: Name of the recording.
        every: Distance between frames.
        batch: Moments per forward pass.
        progress: Whether to show a progress bar, with frames per second and the time left.

    Returns:
        Keypoints in project units; `frames` tells each row's number on the recording's clock.
    """
    device = next(model.parameters()).device
    recording = inputs.cache.recordings[name]
    rows = recording.rows(every)
    grid, scale = inputs.grid.to(device), _to_video(inputs, recording)
    found: dict[str, list[np.ndarray]] = {}
    model.eval()
    with tqdm(total=len(rows), desc=f"predict {name}", unit="frame", disable=None if progress else True) as bar:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            images, projections = inputs.pictures(recording, part)
            seen = model.detect(images.to(device), projections.to(device), grid)
            measured = {
                "positions": seen.positions.float().cpu().numpy(),
                "confidence": seen.confidence.float().cpu().numpy(),
            }
            if seen.detected is not None:
                pairs = projections.to(device)
                measured["reprojection_error"] = reprojection_error(seen.positions, seen.detected, pairs, scale)
            if recording.masks_path is not None:
                pinholes, masks = recording.projections.numpy(), recording.masks[part]
                measured["on_body"] = on_body(measured["positions"], pinholes, masks)
            for key, values in measured.items():
                found.setdefault(key, []).append(values)
            bar.update(len(part))
    return Poses(
        **{key: np.concatenate(values) for key, values in found.items()},
        fps=recording.fps,
        units=inputs.project.units,
        recording=name,
        frames=recording.clock[rows],
        cameras=list(recording.cameras.names),
    )


def _to_video(inputs: Inputs, recording: CachedRecording) -> np.ndarray:
    """Pixels of each camera's video per pixel of its cached frames, along x and y (M, 2)."""
    filmed = inputs.project.cameras_of(inputs.project.recording(recording.name))
    focal = [cameras.intrinsics.diagonal(dim1=1, dim2=2)[:, :2] for cameras in (filmed, recording.cameras)]
    return (focal[0] / focal[1]).numpy()


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

    Recordings that these networks have done before are kept, so that a call that was cut short goes on where it was.

    Args:
        run: Run folder of `bkind3d train`.
        recordings: Names of recordings; all of the project when left out.
        shard: "i/n", counted from 1: every n-th of them from the i-th on, for processes side by side; none may be left.
        batch: Moments per forward pass; lower it when memory is short.
        force: Do all of them again.
        progress: Whether to show progress bars, and to tell the frames per second of each recording.

    Returns:
        The files, those that were kept among them.

    Raises:
        InputError: No such run, recording or checkpoint, a bad shard, or poses of other networks.
    """
    config = open_run(run)
    known = load_project(config.project).names()
    for name in recordings or []:
        if name not in known:
            raise InputError(f'recordings: "{name}" is not in {config.project}; it has {", ".join(known)}')
    names = share(recordings or known, shard)
    if not names:
        return []
    step, _ = latest_checkpoint(run)
    paths = {name: run / "poses" / f"{name}.nc" for name in names}
    left = [name for name, path in paths.items() if force or not _is_done(path, step)]
    if left:
        inputs = open_inputs(config, recordings=left, progress=progress)
        model, step = load_model(run, config)
        model.to(available_device())
    for number, name in enumerate(left, start=1):
        began = time.perf_counter()
        poses = predict_recording(model, inputs, name, batch=batch, progress=progress)
        poses.step = step
        try:
            paths[name].parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{paths[name].parent}: cannot be written ({error.strerror})") from error
        poses.save(paths[name])
        if progress:
            count, rate = len(poses.frames), len(poses.frames) / (time.perf_counter() - began)
            print(f"{name} ({number} of {len(left)}): {count} frames, {rate:.3g} a second", file=sys.stderr)
    return list(paths.values())


def _is_done(path: Path, step: int) -> bool:
    """Whether the networks of that step have written the file; another's is not replaced unasked."""
    if not path.exists():
        return False
    found = Poses.load(path).step
    if found != step:
        said = "does not say of which networks it is" if found is None else f"is of training step {found}"
        raise InputError(f"{path}: exists and {said}, the newest are of step {step}; give --force to do it again")
    return True
