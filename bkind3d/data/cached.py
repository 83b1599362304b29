"""What the frame cache holds: frames of each recording, the cameras that belong to them, and masks of the body."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bkind3d.cameras import Cameras
from bkind3d.data.arrays import map_npy, read_npz
from bkind3d.errors import InputError


@dataclass(frozen=True, eq=False)
class CachedRecording:
    """The frames of one recording on disk, and the pinhole cameras that belong to them.

    Args:
        name: of the recording.
        split: "train", "test" or "both".
        fps: frames per second of the recording's clock.
        path: the ``.npy`` file.
        shape: (T, M, H, W, 3).
        cameras: pinhole cameras with ``image_size`` the network size.
        clock: (T,) increasing numbers of the moments; 0, 1, ... where none was left out.
        masks_path: the ``.npy`` file of the body's masks; None where they were not asked for.
    """

    name: str
    split: str
    fps: float
    path: Path
    shape: tuple[int, int, int, int, int]
    cameras: Cameras
    clock: np.ndarray
    masks_path: Path | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def projections(self) -> Tensor:
        """World to pixels of the frames, (M, 3, 4) float32."""
        return self.cameras.projection_matrices().float()

    def rows(self, every: int) -> np.ndarray:
        """Rows of the moments whose numbers are 0, every, 2 every, ... after the first one's."""
        return np.flatnonzero((self.clock - self.clock[0]) % every == 0)

    @cached_property
    def frames(self) -> np.memmap:
        """The frames, (T, M, H, W, 3) uint8 RGB, mapped read-only on first use."""
        return map_npy(self.path, self.shape)

    @cached_property
    def masks(self) -> np.memmap:
        """Masks of the body, (T, M, H, W) uint8, mapped read-only on first use: 255 body, 0 not, between: coverage.

        Raises:
            InputError: they were not built.
        """
        return map_npy(self.masks_file(), self.shape[:-1])

    def backgrounds(self) -> np.ndarray | None:
        """The empty room as each camera sees it, (M, H, W, 3) uint8; None where the project brings its own masks.

        Raises:
            InputError: masks were not built.
        """
        path = self.masks_file().with_suffix(".npz")
        if not path.exists():
            return None
        return read_npz(path, ("pictures",))["pictures"]

    def masks_file(self) -> Path:
        """The ``.npy`` file of the masks.

        Raises:
            InputError: they were not built.
        """
        if self.masks_path is None:
            raise InputError(f"recording {self.name!r}: no masks of the body were built; set data.foreground to true")
        return self.masks_path

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped arrays out: a pickled memmap would carry all of them."""
        return {key: value for key, value in self.__dict__.items() if key not in ("frames", "masks")}


@dataclass(frozen=True)
class FrameCache:
    """Frames of network size.

    Args:
        recordings: by name, in the project's order.
        key: hash of everything that the frames, and the masks if there are any, depend on.
    """

    recordings: dict[str, CachedRecording]
    key: str

    def recording(self, name: str) -> CachedRecording:
        """The recording of that name.

        Raises:
            InputError: there is none.
        """
        if name not in self.recordings:
            raise InputError(f"there is no recording {name!r} in the cache; it has {', '.join(self.recordings)}")
        return self.recordings[name]
