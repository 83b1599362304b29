"""The subjects that come with the package: where their videos come from, and settings that two CPU cores can train.

`bkind3d demo` shows one of them, `bkind3d paper` compares methods on one of them. The paper's sizes are the defaults of
`bkind3d train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from bkind3d.errors import InputError
from bkind3d.experiments.human import human_project
from bkind3d.sims.simulate import simulate_rig
from bkind3d.sims.virtual import virtual_rig
from bkind3d.sims.virtual.engine import load_mujoco


@dataclass(frozen=True)
class Film:
    """What may be chosen of a subject's videos; what is left out is the subject's own.

    Args:
        seed: Seed of the simulation.
        frames: Training frames to simulate.
        test_frames: Test frames to simulate.
        views: Cameras to simulate.
        pixels: Height and width of the pictures to simulate.
        source: Files that the videos come from, or that move the animal, where they are on disk.
    """

    seed: int = 0
    frames: int | None = None
    test_frames: int | None = None
    views: int | None = None
    pixels: int | None = None
    source: Path | None = None

    def sizes(self) -> dict[str, Any]:
        """Those of frames, test_frames, views and pixels that were chosen."""
        names = ("frames", "test_frames", "views", "pixels")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of the simulators."""
        chosen = self.sizes()
        pixels = chosen.pop("pixels", None)
        return chosen | ({} if pixels is None else {"image_size": (pixels, pixels)})


@dataclass(frozen=True)
class Subject:
    """Something to look at.

    Args:
        title: In words, after "on".
        make: Makes the videos: (folder, what was chosen, progress) -> project file.
        data: How frames reach the network.
        keypoints: Number of keypoints to discover.
        steps: Training steps of the demo.
        edge_lr: Learning rate of the edges.
        separation: Weight of the separation loss.
        identity: Weight of the identity loss: less for a body whose left and right look the same.
        probe: Options of the evaluation.
        takes_source: Whether files can be named that it comes from, or that move it.
        simulated: Whether frames and views can be chosen.
        needs: Fails where something that it needs is not installed.
    """

    title: str
    make: Callable[[Path, Film, bool], Path]
    data: DataConfig
    keypoints: int
    steps: int
    edge_lr: float = 1e-2
    separation: float = 0.01
    identity: float = 0.15
    probe: dict[str, Any] = field(default_factory=dict)
    takes_source: bool = False
    simulated: bool = True
    needs: Callable[[], object] | None = None

    def refuse(self, film: Film) -> None:
        """Refuse what this subject cannot do, before anything is written.

        Raises:
            InputError: Names what was chosen, or what is not installed.
        """
        if film.source is not None and not self.takes_source:
            raise InputError(f"source: {self.title} comes from no file, got {film.source}")
        if film.sizes() and not self.simulated:
            raise InputError(f"{next(iter(film.sizes()))}: only of what is simulated; here it is {self.title}")
        if self.needs is not None:
            self.needs()

    def film(self, folder: Path, film: Film, progress: bool = True) -> Path:
        """Make the videos; returns the project file.

        Raises:
            InputError: As `refuse`, or the videos cannot be made there.
        """
        self.refuse(film)
        return self.make(folder, film, progress)

    def config(self, project: Path, seed: int, steps: int | None = None) -> Config:
        """Settings of a run on this subject."""
        return Config(
            project=project,
            data=replace(self.data),
            model=replace(SMALL_MODEL, keypoints=self.keypoints),
            loss=replace(SMALL_LOSS, separation=self.separation, identity=self.identity),
            train=replace(SMALL_TRAIN, edge_lr=self.edge_lr, steps=self.steps if steps is None else steps, seed=seed),
        )


SMALL_MODEL = ModelConfig(
    encoder="small",
    pyramid_channels=32,
    channels=8,
    map_stride=2,
    voxels=20,
    volume_channels=(16, 16, 32),
    volume_stem=3,
    volume_blocks=1,
    logit_gain=30.0,
    edge_strides=(8, 4, 2),
    edge_sigmas=(1.2, 1.5, 2.5),
    decoder_channels=(64, 32, 16),
    turn_volume=True,
)
# The maps themselves are compared, at three resolutions: a VGG would take longer than all the rest.
SMALL_LOSS = LossConfig(target_channels="grey", network="none", pixel_scales=3, regularise_after=0.0, length=0.0)
SMALL_TRAIN = TrainConfig(batch=4, lr=2e-3, edge_lr=1e-2, warmup=20, sample_every=100, save_every=100)


def _film_animal(folder: Path, film: Film, progress: bool) -> Path:
    return simulate_rig(folder, seed=film.seed, progress=progress, **film.arguments())


def _film_rat(folder: Path, film: Film, progress: bool) -> Path:
    return virtual_rig(
        folder, subject="rat", seed=film.seed, motion=film.source, progress=progress, **{"views": 4} | film.arguments()
    )


def _film_rat_field(folder: Path, film: Film, progress: bool) -> Path:
    chosen: dict[str, Any] = {"image_size": (512, 512), "frames": 600, "test_frames": 150} | film.arguments()
    return virtual_rig(folder, subject="rat-field", seed=film.seed, motion=film.source, progress=progress, **chosen)


def _film_human_sim(folder: Path, film: Film, progress: bool) -> Path:
    return virtual_rig(folder, subject="human", seed=film.seed, progress=progress, **film.arguments())


def _film_human(folder: Path, film: Film, progress: bool) -> Path:
    return human_project(folder, film.source)


# Where the distance is shorter than the animal needs to leave its silhouette, the difference can be predicted from the
# looks of frame t, past the keypoints: on the rat, nearly all of them died at 0.4 s and at 0.67 s (docs/paper.md).
_LONG_GAPS: list[str | int] = ["1 s", "2 s", "4 s"]
_RENDERED: dict[str, Any] = {"keypoints": 15, "steps": 1000, "separation": 0.005, "probe": {"every": 2}}

SUBJECTS = {
    "animal": Subject(
        title="a simulated animal of capsules", make=_film_animal,
        data=DataConfig(height=144, width=144, window=80, gap="0.67 s"),
        keypoints=12, steps=800, probe={"every": 2},
    ),
    "rat": Subject(
        title="a virtual rat", make=_film_rat, takes_source=True, needs=load_mujoco,
        data=DataConfig(height=128, width=128, window=96, gap=_LONG_GAPS, reverse=True), **_RENDERED,
    ),
    "rat-field": Subject(
        title="a virtual rat in an open field", make=_film_rat_field, takes_source=True, needs=load_mujoco,
        data=DataConfig(height=512, width=512, window=96, gap=_LONG_GAPS, reverse=True), **_RENDERED,
    ),
    "human-sim": Subject(
        title="a virtual human", make=_film_human_sim, needs=load_mujoco,
        data=DataConfig(height=112, width=112, window=96, gap=_LONG_GAPS, reverse=True), identity=0.1, **_RENDERED,
    ),
    "human": Subject(
        title="four real videos of a man balancing", make=_film_human, takes_source=True, simulated=False,
        data=DataConfig(height=128, width=96, gap=["0.17 s", "0.33 s", "0.5 s", "0.67 s"], reverse=True),
        keypoints=15, steps=500, edge_lr=5e-3, identity=0.3, probe={"ridge": "auto", "blocks": 10},
    ),
}  # fmt: skip
