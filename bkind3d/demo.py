"""The whole way in one command: videos in, keypoints, their evaluation and a report out."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bkind3d.check import check_project
from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from bkind3d.data import load_project
from bkind3d.data.human import human_project
from bkind3d.data.simulate import simulate_rig
from bkind3d.errors import InputError
from bkind3d.evaluate import evaluate
from bkind3d.predict import predict
from bkind3d.report import build_report
from bkind3d.run import refuse_existing
from bkind3d.train import train

MARKER = "demo.txt"

# Sizes that two CPU cores train in minutes. The paper's own are the defaults of `bkind3d train`.
SMALL_MODEL = ModelConfig(
    encoder="small",
    pyramid_channels=32,
    channels=8,
    map_stride=2,
    voxels=24,
    volume_channels=(16, 16, 32),
    volume_stem=3,
    volume_blocks=1,
    edge_strides=(8, 4, 2),
    edge_sigmas=(1.2, 1.5, 2.5),
    decoder_channels=(64, 32, 16),
    edge_threshold=1.5,
)
# The maps themselves are compared, at three resolutions: a VGG would take longer than all the rest.
SMALL_LOSS = LossConfig(
    target_channels="grey", network="none", pixel_scales=3, length=0.02, separation=0.01, regularise_after=0.0
)
SMALL_TRAIN = TrainConfig(batch=4, lr=2e-3, edge_lr=1e-2, warmup=20, sample_every=100, save_every=100)


def animal_config(project: Path, seed: int, steps: int) -> Config:
    """Settings of the demo on the simulated animal."""
    return Config(
        project=project,
        data=DataConfig(height=96, width=96, gap="0.67 s"),
        model=replace(SMALL_MODEL, keypoints=12),
        loss=SMALL_LOSS,
        train=replace(SMALL_TRAIN, steps=steps, seed=seed),
    )


def human_config(project: Path, seed: int, steps: int) -> Config:
    """Settings of the demo on the filmed man."""
    return Config(
        project=project,
        data=DataConfig(height=128, width=96, gap=["0.17 s", "0.33 s", "0.5 s", "0.67 s"], reverse=True),
        model=replace(SMALL_MODEL, keypoints=15),
        loss=SMALL_LOSS,
        train=replace(SMALL_TRAIN, edge_lr=5e-3, steps=steps, seed=seed),
    )


def demo(
    subject: Literal["animal", "human"] = "animal",
    *,
    out: Path | None = None,
    seed: int = 0,
    frames: int = 800,
    test_frames: int = 300,
    views: int = 4,
    steps: int | None = None,
    source: Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Discover 3D keypoints from multi-view video, from the files to the report, on two CPU cores in minutes.

    "animal" films a simulated animal with a calibrated rig, and tests on motion that training never saw; "human" uses
    four real synchronous videos of a man and cross-validates over time. No label reaches training.

    Args:
        subject: What to look at.
        out: Run folder; `runs/demo` or `runs/human` when left out.
        seed: Seed of the simulation and of training.
        frames: Training frames to simulate.
        test_frames: Test frames to simulate.
        views: Cameras to simulate.
        steps: Training steps; what fits into the promised time when left out.
        source: Folder of the human clip, if it is on disk; it is downloaded when left out.
        force: Replace an earlier run in the folder.
        progress: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        InputError: A folder that holds something else, or the clip cannot be had.
    """
    started = time.perf_counter()
    out = out or Path("runs") / ("demo" if subject == "animal" else "human")
    refuse_existing(out, force=force)
    data = out.parent / f"{out.name}-data"
    claim(data, force=force)
    if subject == "animal":
        say("simulate", f"a rig of {views} cameras, {frames} + {test_frames} frames -> {data}")
        project = simulate_rig(
            data / "rig", views=views, frames=frames, test_frames=test_frames, seed=seed, progress=progress
        )
        config = animal_config(project, seed, 360 if steps is None else steps)
        probe: dict[str, Any] = {"every": 2}
    else:
        say("prepare", f"four videos of a man balancing -> {data}")
        project = human_project(data / "rig", source)
        config = human_config(project, seed, 500 if steps is None else steps)
        probe = {"ridge": "auto", "blocks": 10}
    say("check", f"{project}")
    check_project(
        load_project(project), gap=config.data.gaps[-1], voxels=config.model.voxels, out=data / "check",
        height=config.data.height, width=config.data.width, batch=config.train.batch,
    ).print()  # fmt: skip
    say("train", f"{config.train.steps} steps, no labels -> {out}")
    if not train(config, out, force=force, progress=progress):
        say("stopped", f"go on with: bkind3d train --resume --out {out}")
        raise KeyboardInterrupt
    say("predict", f"{out / 'poses'}")
    predict(out, progress=progress)
    say("evaluate", "a linear probe against annotated joints, which training has not seen")
    evaluate(out, progress=progress, **probe)
    report = build_report(out)
    say("report", f"{report}  ({(time.perf_counter() - started) / 60:.1f} minutes in all)")
    return report


def claim(data: Path, *, force: bool) -> None:
    """Make the demo's own data folder anew; a folder that no demo made is never touched.

    Raises:
        InputError: The folder exists, and `force` is not set or no demo made it.
    """
    if data.exists():
        if not (data / MARKER).is_file():
            raise InputError(f"{data}: exists and was not made by a demo; choose another --out")
        if not force:
            raise InputError(f"{data}: the data of an earlier demo; choose another --out, or give --force")
        shutil.rmtree(data)
    data.mkdir(parents=True)
    (data / MARKER).write_text("Made by `bkind3d demo`, which may replace this folder.\n")


def say(stage: str, text: str) -> None:
    """Print one line that names the stage."""
    print(f"[{stage}] {text}", flush=True)
