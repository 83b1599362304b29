"""A virtual laboratory: cameras around an arena, a rat or a human in it, and the files that a real rig would leave."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data.truth import Truth
from bkind3d.errors import InputError
from bkind3d.sims.studio import Sensor, check_settings, h264_video, new_rig, place_cameras, write_project
from bkind3d.sims.virtual.clip import Posture, load_postures
from bkind3d.sims.virtual.engine import load_mujoco
from bkind3d.sims.virtual.human import HUMAN
from bkind3d.sims.virtual.puppet import Puppet
from bkind3d.sims.virtual.rat import RAT, RAT_IN_A_FIELD
from bkind3d.sims.virtual.stage import Lens, Stage, build_model
from bkind3d.sims.virtual.subject import Animation

SUBJECTS = {subject.name: subject for subject in (RAT, RAT_IN_A_FIELD, HUMAN)}


def virtual_rig(
    directory: Path | str,
    *,
    subject: Literal["rat", "rat-field", "human"] = "rat",
    views: int | None = None,
    frames: int = 900,
    test_frames: int = 300,
    image_size: tuple[int, int] = (192, 192),
    fps: int = 30,
    seed: int = 0,
    motion: Path | str | None = None,
    distortion: bool = False,
    crf: int = 18,
    progress: bool = True,
    force: bool = False,
) -> Path:
    """Film a virtual subject of dm_control with a calibrated rig: H.264 videos, calibration, project file, exact truth.

    Two recordings are made, `train` and `test`, of one subject in one room but with different motions. The same
    arguments give the same motion and truth, and on one machine the same pictures; they depend on its OpenGL.

    Args:
        directory: made anew; it appears only when complete.
        subject: "rat" (23 points), "rat-field", the same in an open field of 1.5 m, or "human" (19 points).
        views: number of cameras, 2 to 8, on a ring around the arena; 6 for the rats and 4 for the human when left out.
        frames: length of the recording `train`, at least 2.
        test_frames: length of the recording `test`, at least 2.
        image_size: width and height in pixels, even and at least 32.
        fps: frames per second.
        seed: of everything random: cameras, motions, room, sensor noise.
        motion: npz with qpos (T, 74) and fps of the rodent, whose joint angles drive the rat's posture; only for it.
        distortion: give each camera a lens with radial and tangential distortion.
        crf: quality of the H.264 encoding, 0 (lossless) to 51.
        progress: show a progress bar.
        force: replace an existing rig.

    Returns:
        The path of `project.yaml`. Units are metres; each recording's `truth.npz` holds points3d (T, P, 3) float32,
        names (P,), edges (E, 2), fps, units, behaviour (T,) and behaviours.

    Raises:
        InputError: an argument is out of range, the extra `sim` or a system library is missing, the motion file does
            not fit, or the directory holds files already or cannot be written.
    """
    if subject not in SUBJECTS:
        raise InputError(f"subject: expected one of {', '.join(SUBJECTS)}, not {subject!r}")
    actor = SUBJECTS[subject]
    views = actor.views if views is None else views
    check_settings(views, frames, test_frames, image_size, fps, seed, crf, kind="virtual", least_views=2)
    if motion is not None and subject == "human":
        raise InputError(f"motion: only the rat follows a motion file, not the {subject}")
    load_mujoco()
    postures: tuple[Posture | None, Posture | None] = (None, None)
    if motion is not None:
        postures = load_postures(Path(motion), frames / (frames + test_frames))
    directory = Path(directory).absolute()
    with new_rig(directory, "virtual", force) as target:
        camera_seed, train_seed, test_seed, room_seed, sensor_seed = np.random.SeedSequence(seed).spawn(5)
        cameras = place_cameras(actor.ring, views, image_size, distortion, np.random.default_rng(camera_seed))
        lenses = {name: Lens(cameras.select([name])) for name in cameras.names}
        model = build_model(actor, cameras, lenses, np.random.default_rng(room_seed))
        puppet = Puppet(model, actor.points, actor.limbs, actor.soles, actor.scale)
        animations = {
            split: actor.animate(puppet, length, fps, np.random.default_rng(split_seed), posture)
            for split, length, split_seed, posture in zip(
                ("train", "test"), (frames, test_frames), (train_seed, test_seed), postures
            )
        }
        truths = {
            split: Truth(
                points3d=animation.points.astype(np.float32),
                names=puppet.names,
                edges=actor.edges,
                fps=float(fps),
                behaviour=animation.behaviour,
                behaviours=actor.temper.behaviours,
            )
            for split, animation in animations.items()
        }
        write_project(target, f"virtual {actor.name}", cameras, truths, actor.volume)
        sensor_seeds = sensor_seed.generate_state(2 * views).reshape(2, views)
        total = views * (frames + test_frames)
        with (
            closing(Stage(model, puppet.data, lenses)) as stage,
            tqdm(total=total, desc="rendering", unit="picture", disable=None if progress else True) as bar,
        ):
            for (split, animation), seeds in zip(animations.items(), sensor_seeds.tolist()):
                _film(target / split, cameras, stage, puppet, animation, fps, crf, seeds, bar)
    return directory / "project.yaml"


def _film(
    folder: Path,
    cameras: Cameras,
    stage: Stage,
    puppet: Puppet,
    animation: Animation,
    fps: int,
    crf: int,
    sensor_seeds: list[int],
    bar: tqdm,
) -> None:
    """Render and encode one recording, all cameras at once."""
    width, height = cameras.image_size[0].tolist()
    sensors = [Sensor((height, width, 3), seed) for seed in sensor_seeds]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(h264_video(folder / f"{name}.mp4", (width, height), fps, crf)) for name in cameras.names
        ]
        for i, qpos in enumerate(animation.qpos):
            puppet.place(qpos)
            for name, sensor, write in zip(cameras.names, sensors, writers):
                write(sensor.expose(stage.picture(name), i))
            bar.update(len(writers))
