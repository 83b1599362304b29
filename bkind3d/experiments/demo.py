"""The whole way in one command: videos in, keypoints, their evaluation and a report out."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Literal

from bkind3d.check import check_run
from bkind3d.data import Project, load_project
from bkind3d.data.rat7m import rat7m_project
from bkind3d.errors import InputError
from bkind3d.evaluation.evaluate import evaluate
from bkind3d.experiments.subjects import SUBJECTS, Film
from bkind3d.predict import predict
from bkind3d.report import build_report
from bkind3d.run import refuse_existing
from bkind3d.sims.rat7m import IN_MILLIMETRES, write_rat7m
from bkind3d.train import train

MARKER = "demo.txt"


def demo(
    subject: Literal["animal", "rat", "rat-field", "human-sim", "human"] = "animal",
    *,
    out: Path | None = None,
    seed: int = 0,
    frames: int | None = None,
    test_frames: int | None = None,
    views: int | None = None,
    steps: int | None = None,
    source: Path | None = None,
    layout: Literal["project", "rat7m"] = "project",
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Discover 3D keypoints from multi-view video, from the files to the report, on two CPU cores in minutes.

    "animal" films a simulated animal with a calibrated rig, "rat" and "human-sim" do so with dm_control's rodent and
    humanoid (extra `sim`), and all test on motion that training never saw; "human" uses four real synchronous videos of
    a man and cross-validates over time. No label reaches training.

    Args:
        subject: What to look at.
        out: Run folder; `runs/demo` for the animal, `runs/<subject>` for others when left out.
        seed: Seed of the simulation and of training.
        frames: Training frames to simulate; like the next two, the subject's own number when left out.
        test_frames: Test frames to simulate.
        views: Cameras to simulate.
        steps: Training steps; what fits into the promised time when left out.
        source: "human": folder of the clip, if it is on disk; it is downloaded when left out. "rat": file of joint
            angles that its posture follows (npz: qpos, fps); scripted when left out.
        layout: "rat7m" writes a simulated subject in the layout of Rat7M first, and reads it back from there (mm).
        force: Replace an earlier run in the folder.
        progress: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        InputError: A folder that holds something else, or the clip cannot be had.
    """
    started = time.perf_counter()
    out = out or Path("runs") / ("demo" if subject == "animal" else subject)
    chosen, film = SUBJECTS[subject], Film(seed, frames, test_frames, views, source=source)
    chosen.refuse(film)
    if layout == "rat7m" and not chosen.simulated:
        raise InputError(f"layout: only what is simulated is written in the layout of Rat7M; here it is {chosen.title}")
    refuse_existing(out, force=force)
    data = out.parent / f"{out.name}-data"
    claim(data, force=force)
    say("film", f"{chosen.title} -> {data}")
    project = chosen.film(data / "rig", film, progress)
    if layout == "rat7m":
        say("import", f"the same in the layout of Rat7M -> {data / 'rat7m'}")
        project = through_rat7m(load_project(project), data)
    config = chosen.config(project, seed, steps)
    say("check", f"{project}")
    check_run(load_project(project), config, data / "check").print()
    say("train", f"{config.train.steps} steps, no labels -> {out}")
    if not train(config, out, force=force, progress=progress):
        say("stopped", f"go on with: bkind3d train --resume --out {out}")
        raise KeyboardInterrupt
    say("predict", f"{out / 'poses'}")
    predict(out, progress=progress)
    say("evaluate", "a linear probe against annotated joints, which training has not seen")
    evaluate(out, progress=progress, **chosen.probe)
    report = build_report(out)
    say("report", f"{report}  ({(time.perf_counter() - started) / 60:.1f} minutes in all)")
    return report


def through_rat7m(project: Project, data: Path) -> Path:
    """Write all recordings in the layout of Rat7M and import them from there; returns the new project file."""
    write_rat7m(project, project.names(), data / "rat7m")
    volume, scale = project.working_volume(), IN_MILLIMETRES[project.units]
    x, y, z = volume.center
    center = (x * scale, y * scale, z * scale)
    return rat7m_project(data / "rat7m", data / "imported", center=center, side=max(volume.size) * scale)


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
