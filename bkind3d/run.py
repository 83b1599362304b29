"""The run folder: one place for everything that a training run writes, and the way back in.

``config.yaml`` (effective settings), ``env.json`` (versions, device, backends), ``metrics.csv``, ``health.jsonl``,
``checkpoints/``, ``samples/*.png``, ``skeleton.json``, ``poses/<recording>.nc``, ``evaluation.json`` and
``evaluation.csv``, ``actions.json``, ``exports/``, ``report.html``, ``render.gif``,
``overlay.mp4``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bkind3d.checkpoints import WEIGHTS, checkpoints, latest_checkpoint, load_weights
from bkind3d.config import Config, load_config, save_config
from bkind3d.data import CachedRecording, FrameCache, Project, Volume, build_cache, load_project
from bkind3d.data.foreground import body_size
from bkind3d.data.window import look
from bkind3d.errors import InputError, brief
from bkind3d.files import remove_leftovers
from bkind3d.labels import NAME as LABELS
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.models.methods import METHODS
from bkind3d.models.views import as_floats, foreground_only
from bkind3d.models.volumetric import VolumetricModel
from bkind3d_kernels import VoxelGrid

# Everything that a run writes; nothing else in its folder is ever deleted.
CONTENT = (
    "config.yaml", "env.json", "metrics.csv", "health.jsonl", "checkpoints", "samples", "skeleton.json", "poses",
    "evaluation.json", "evaluation.csv", "actions.json", "exports", "report.html", "render.gif", "overlay.mp4",
    "tensorboard",
)  # fmt: skip
EARLIER, LOCK, OLD_LABELS = ".earlier", ".lock", "keypoints.old.yaml"


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
            images = as_floats(torch.from_numpy(recording.frames[rows]).permute(0, 1, 4, 2, 3))
            return images, recording.projections[None]
        frames, masks, projections = look(recording, rows, self.window)
        images = as_floats(torch.from_numpy(frames).permute(0, 1, 4, 2, 3))
        return foreground_only(images, as_floats(torch.from_numpy(masks))), projections


def open_inputs(config: Config, *, recordings: list[str] | None = None, progress: bool = True) -> Inputs:
    """Load the project and its frame cache, which is built first where it does not exist.

    Args:
        config: The run's settings.
        recordings: Names of those that will be looked at; all of the project when left out. Others are cached only
            where these need them: for the background, and for the size of the body.
        progress: Whether to show progress bars.

    Raises:
        InputError: As `load_project`, `build_cache` and `body_size`.
    """
    project = load_project(config.project)
    volume = project.working_volume()
    # Networks that are applied to other videos find the body there, where there is nothing to train on.
    names = project.names("train", "both") or project.names()
    cache = build_cache(
        project,
        config.data.height,
        config.data.width,
        config.cache_directory,
        crop=config.data.crop,
        foreground=config.data.foreground,
        recordings=None if recordings is None else [*recordings, *(names if config.data.foreground else [])],
        progress=progress,
    )
    size = None
    if config.data.foreground:
        size = body_size([cache.recordings[name] for name in names], volume.center)
    box = volume if size is None or not follows_body(config) else Volume(volume.center, (config.data.box * size,) * 3)
    return Inputs(project, volume, cache, box.grid(config.model.voxels), size, config.data.window)


def follows_body(config: Config) -> bool:
    """Whether keypoints are looked for in a box that follows the body, in place of the volume."""
    return config.data.foreground and config.data.window > 0 and config.data.box > 0


def build_model(config: Config) -> DiscoveryModel:
    """Build the networks from the run's seed: the same settings always give the same untrained network."""
    torch.manual_seed(config.train.seed)
    model = METHODS[config.method].model(
        config.model,
        outputs=1 if config.loss.target_channels == "grey" else 3,
        foreground=config.data.foreground,
        follows=follows_body(config),
    )
    model.use_checkpointing(config.train.checkpointing)
    if isinstance(model, VolumetricModel):
        model.equivariance_share = config.loss.equivariance_share
    return model


def available_device() -> torch.device:
    """Where a finished run's networks are put: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse a run folder that something else would be lost in.

    Raises:
        InputError: There is a run already and `force` is not set, or something that is not a run.
    """
    if not path.exists() or (path.is_dir() and all(_is_begun(entry) for entry in path.iterdir())):
        return
    if not is_run(path):
        raise InputError(f"{path}: exists and is not a run folder; choose another --out")
    if not force and not checkpoints(path):
        kept = f"; the run before it is in {path / EARLIER}" if (path / EARLIER).is_dir() else ""
        raise InputError(
            f"{path}: this run exists and has no checkpoint; start it again with --force, or choose another --out{kept}"
        )
    if not force:
        raise InputError(f"{path}: this run exists; go on with --resume, choose another --out, or give --force")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, in any state that a kill can leave."""
    for folder in (path, path / EARLIER):
        if (folder / "config.yaml").is_file():
            if (folder / "checkpoints").is_dir():
                return True
            with contextlib.suppress(InputError):
                load_config(folder / "config.yaml")
                return True
    return False


def _is_begun(entry: Path) -> bool:
    """Whether an entry of a folder is what a run that was killed at once leaves: no work of anybody."""
    if entry.name in ("checkpoints", "samples") and entry.is_dir():  # versions before made these first
        return not any(entry.iterdir())
    return entry.name == LOCK or any(fnmatch(entry.name, f".{name}.*.part") for name in CONTENT)


def refuse_results(*paths: Path, force: bool) -> None:
    """Refuse to replace results that an earlier call wrote.

    Raises:
        InputError: One of the files exists and `force` is not set.
    """
    for path in paths:
        if path.exists() and not force:
            raise InputError(f"{path}: exists; give --force to replace it")


def create_run(path: Path, config: Config, *, force: bool) -> None:
    """Make a run folder with its settings, in place of an earlier run if `force` is set.

    An earlier run that has checkpoints is moved to `.earlier` in the folder, where it stays until :func:`let_go` is
    called. Its settings go first and come back last: as long as a folder has none of its own, it is as it was.

    Raises:
        InputError: As `refuse_existing`, or the place is not writable.
    """
    refuse_existing(path, force=force)
    try:
        path.mkdir(parents=True, exist_ok=True)
        bring_back(path)
        if (path / LABELS).exists():  # a user's own work, but its names are those of other keypoints
            (path / LABELS).replace(path / OLD_LABELS)
        if checkpoints(path):
            let_go(path)
            _move(path, path / EARLIER)
        for name in CONTENT:
            remove_leftovers(path / name)
            _remove(path / name)
        save_config(config, path / "config.yaml")
        (path / "checkpoints").mkdir()
        (path / "samples").mkdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def _move(source: Path, target: Path) -> None:
    """Move a run's files, settings first."""
    target.mkdir(exist_ok=True)
    for name in CONTENT:
        if (source / name).exists():
            (source / name).rename(target / name)


def bring_back(path: Path) -> None:
    """Put an earlier run back in its place, where what was to replace it was killed before it had settings."""
    earlier = path / EARLIER
    if (path / "config.yaml").exists() or not earlier.is_dir():
        return
    for name in reversed(CONTENT):
        if (earlier / name).exists():
            _remove(path / name)
            (earlier / name).rename(path / name)
    if (path / OLD_LABELS).exists() and not (path / LABELS).exists():
        (path / OLD_LABELS).rename(path / LABELS)
    shutil.rmtree(earlier)


def let_go(path: Path) -> None:
    """Remove the earlier run of a folder that has a checkpoint of the new one, and what killed processes have left."""
    _remove(path / EARLIER)
    for name in CONTENT:
        remove_leftovers(path / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a run folder for this process while it trains; made where it is missing, and removed again if left empty.

    The system lets go of the lock when the process ends, however that happens: a lock of a dead process is none. In a
    training of several processes the first one alone calls this.

    Raises:
        InputError: Another process trains in it, or it cannot be written.
    """
    lock = path / LOCK
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = brief(file.read(200).strip() or "unknown", 120)
            raise InputError(f"{path}: another process trains this run ({holder}); wait for it, or end it") from None
        except OSError:  # a file system without locks
            yield
            return
        if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):  # its holder has just ended
            with alone(path):
                yield
            return
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def open_run(path: Path) -> Config:
    """Read the settings of an existing run.

    Raises:
        InputError: There is no such run.
    """
    if not (path / "config.yaml").is_file():
        if (path / EARLIER / "config.yaml").is_file():
            with alone(path):
                bring_back(path)
            return load_config(path / "config.yaml")
        raise InputError(f"{path}: not a run folder (no config.yaml); make one with `bkind3d train`")
    return load_config(path / "config.yaml")


def load_model(path: Path, config: Config) -> tuple[DiscoveryModel, int]:
    """Load the newest checkpoint's networks, in evaluation mode, with the step that they were saved at.

    Raises:
        InputError: No checkpoint, or one that cannot be read or does not fit the settings.
    """
    step, folder = latest_checkpoint(path)
    model = build_model(config)
    load_weights(model, folder / WEIGHTS)
    return model.eval(), step
