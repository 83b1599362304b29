"""The run folder: one place for everything that a training run writes, and the way back in.

``config.yaml`` (effective settings), ``env.json`` (versions, device, backends), ``metrics.csv``, ``health.jsonl``,
``checkpoints/``, ``samples/*.png``, ``skeleton.json``, ``poses/<recording>.nc``, ``evaluation.json`` and
``evaluation.csv``, ``actions.json``, ``report.html``, ``render.gif``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bkind3d.config import Config, Method, load_config
from bkind3d.data import CachedRecording, FrameCache, Project, Volume, build_cache, load_project
from bkind3d.data.foreground import body_size
from bkind3d.data.window import look
from bkind3d.errors import InputError
from bkind3d.models.depth import DepthModel
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.models.keypoint3d import Keypoint3dModel
from bkind3d.models.triangulation import TriangulationModel
from bkind3d.models.views import foreground_only
from bkind3d.models.volumetric import VolumetricModel
from bkind3d.poses import keypoint_names
from bkind3d_kernels import VoxelGrid
from bkind3d_kernels.backends import OPERATIONS, resolve

WEIGHTS = "model.safetensors"
# Everything that a run writes; nothing else in its folder is ever deleted.
CONTENT = (
    "config.yaml", "env.json", "metrics.csv", "health.jsonl", "checkpoints", "samples", "skeleton.json", "poses",
    "evaluation.json", "evaluation.csv", "actions.json", "report.html", "render.gif", "tensorboard",
)  # fmt: skip
PACKAGES = ("torch", "numpy", "accelerate", "av", "kornia", "triton")
MODELS: dict[Method, type[DiscoveryModel]] = {
    "volumetric": VolumetricModel,
    "triangulation": TriangulationModel,
    "depth": DepthModel,
    "keypoint3d": Keypoint3dModel,
}
CHECKPOINT = re.compile(r"step_(\d+)")
LATER_BUFFERS = ("skeleton.observed", "skeleton.tree")  # of a run that knows the foreground; zeros in any other


@dataclass
class Inputs:
    """What a run looks at.

    Attributes:
        project: The project file's content.
        volume: Box that the voxels fill, project units.
        cache: Undistorted frames and cameras at the network's size.
        grid: The voxels, of the volume, or of a box as large as the body needs, which the networks move to it.
        body_size: Size of the body, project units; None where it is not told from the room.
        window: Side of the windows that follow the body, pixels; 0 where the networks see whole frames.
    """

    project: Project
    volume: Volume
    cache: FrameCache
    grid: VoxelGrid
    body_size: float | None = None
    window: int = 0

    @property
    def unit(self) -> float:
        """What the objective measures lengths in: the size of the body where it is known, else the volume's side."""
        return self.side if self.body_size is None else self.body_size

    @property
    def side(self) -> float:
        """Longest side of the volume, project units."""
        return max(self.volume.size)

    def pictures(self, recording: CachedRecording, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the networks see of some moments, (B, M, 3, H, W) in [0, 1], and its projections (B or 1, M, 3, 4).

        Where the foreground is known it is the body without the room, in the windows that follow it.
        """
        if recording.masks_path is None:
            images = torch.from_numpy(recording.frames[rows]).permute(0, 1, 4, 2, 3).float() / 255.0
            return images, recording.projections[None]
        frames, masks, projections = look(recording, rows, self.window)
        images = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255.0
        return foreground_only(images, torch.from_numpy(masks).float() / 255.0), projections

    def recordings(self, *splits: str) -> list[str]:
        """Names of the recordings in any of the splits."""
        return [recording.name for recording in self.project.recordings if recording.split in splits]


def open_inputs(config: Config, *, progress: bool = True) -> Inputs:
    """Load the project and its frame cache, which is built first where it does not exist."""
    project = load_project(config.project)
    volume = project.working_volume()
    cache = build_cache(
        project,
        config.data.height,
        config.data.width,
        config.cache_directory,
        crop=config.data.crop,
        foreground=config.data.foreground,
        progress=progress,
    )
    seen = [cache.recordings[name] for name in cache.names("train", "both")]
    size = body_size(seen, volume.center) if config.data.foreground and seen else None
    box = volume if size is None or not follows_body(config) else Volume(volume.center, (config.data.box * size,) * 3)
    return Inputs(project, volume, cache, box.grid(config.model.voxels), size, config.data.window)


def follows_body(config: Config) -> bool:
    """Whether keypoints are looked for in a box that follows the body, in place of the volume."""
    return config.data.foreground and config.data.window > 0 and config.data.box > 0


def build_model(config: Config) -> DiscoveryModel:
    """Build the networks from the run's seed: the same settings always give the same untrained network."""
    torch.manual_seed(config.train.seed)
    return MODELS[config.method](
        config.model,
        outputs=1 if config.loss.target_channels == "grey" else 3,
        foreground=config.data.foreground,
        follows=follows_body(config),
    )


def available_device() -> torch.device:
    """Where a finished run's networks are put: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse a run folder that something else would be lost in.

    Raises:
        InputError: There is a run already and `force` is not set, or something that is not a run.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not ((path / "config.yaml").is_file() and (path / "checkpoints").is_dir()):
        raise InputError(f"{path}: exists and is not a run folder; choose another --out")
    if not force:
        raise InputError(f"{path}: this run exists; go on with --resume, choose another --out, or give --force")


def refuse_results(*paths: Path, force: bool) -> None:
    """Refuse to replace results that an earlier call wrote.

    Raises:
        InputError: One of the files exists and `force` is not set.
    """
    for path in paths:
        if path.exists() and not force:
            raise InputError(f"{path}: exists; give --force to replace it")


def create_run(path: Path, *, force: bool) -> None:
    """Make an empty run folder, in place of an earlier run if `force` is set.

    Raises:
        InputError: As `refuse_existing`, or the place is not writable.
    """
    refuse_existing(path, force=force)
    try:
        for name in CONTENT:
            if (path / name).is_dir():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
        (path / "checkpoints").mkdir(parents=True)
        (path / "samples").mkdir()
        if not os.access(path, os.W_OK):
            raise InputError(f"{path}: not writable; choose another --out")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def open_run(path: Path) -> Config:
    """Read the settings of an existing run.

    Raises:
        InputError: There is no such run.
    """
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: not a run folder (no config.yaml); make one with `bkind3d train`")
    return load_config(path / "config.yaml")


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """All finished checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in (path / "checkpoints").glob("step_*"):
        match = CHECKPOINT.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found)


def latest_checkpoint(path: Path) -> tuple[int, Path]:
    """Step and folder of the newest checkpoint.

    Raises:
        InputError: The run has none.
    """
    found = checkpoints(path)
    if not found:
        raise InputError(f"{path / 'checkpoints'}: no checkpoint; train first with `bkind3d train`")
    return found[-1]


def load_model(path: Path, config: Config) -> tuple[DiscoveryModel, int]:
    """Load the newest checkpoint's networks, in evaluation mode, with the step that they were saved at.

    Raises:
        InputError: No checkpoint, or one that cannot be read or does not fit the settings.
    """
    step, folder = latest_checkpoint(path)
    model = build_model(config)
    load_weights(model, folder / WEIGHTS)
    return model.eval(), step


def load_weights(model: DiscoveryModel, file: Path) -> None:
    """Load a checkpoint's networks, also one of an earlier version, from before the foreground was known.

    Raises:
        InputError: The file cannot be read, or holds another network.
    """
    own = model.state_dict()
    try:
        model.load_state_dict({name: torch.zeros_like(own[name]) for name in LATER_BUFFERS} | load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(corrupt(file, error)) from error


def corrupt(path: Path, error: Exception) -> str:
    """One line for a checkpoint that cannot be used."""
    folder = path if path.is_dir() else path.parent
    return f"{path}: corrupt or foreign checkpoint ({first_line(error)}); remove {folder} to use the one before it"


def first_line(error: Exception) -> str:
    """An error in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def write_environment(path: Path, config: Config, device: torch.device) -> dict[str, object]:
    """Write env.json: versions, machine, device, where weights came from, and the backend of each operation."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    environment = {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"bkind3d": importlib.metadata.version("bkind3d"), **versions},
        "encoder": f"{config.model.encoder}, weights: {config.model.encoder_weights}",
        "perceptual_network": (
            "none"
            if config.loss.network == "none"
            else f"{config.loss.network}, weights: {config.loss.network_weights}"
        ),
        "backends": {name: resolve(name, config.model.backend, device=device) for name in OPERATIONS},
    }
    write_json(path / "env.json", environment)
    return environment


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader never sees half a file."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, content: str) -> None:
    """Write a text file so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    partial.replace(path)


def write_skeleton(path: Path, model: DiscoveryModel) -> None:
    """Write skeleton.json: keypoint names, active edges, whether they are a tree of bones, and all weights."""
    skeleton = model.skeleton
    rows = [
        [*pair, round(weight, 6)]
        for pair, weight in zip(skeleton.pairs.tolist(), skeleton.weights.detach().tolist(), strict=True)
    ]
    content = {
        "keypoints": keypoint_names(model.config.keypoints),
        "edges": [row for row, active in zip(rows, skeleton.active.tolist(), strict=True) if active],
        "tree": bool(skeleton.tree.any()),
        "threshold": skeleton.threshold,
        "all_weights": rows,
    }
    write_json(path / "skeleton.json", content)
