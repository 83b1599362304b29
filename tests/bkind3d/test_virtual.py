"""The virtual rig: pictures that agree with the cameras, truth that agrees with the body, motion that holds all."""

import dataclasses
import importlib
import importlib.util
import os
import sys

import av
import numpy as np
import pytest
import torch

from bkind3d.data import load_project
from bkind3d.data.truth import load_truth
from bkind3d.errors import InputError
from bkind3d.experiments.demo import demo
from bkind3d.sims.studio import place_cameras
from bkind3d.sims.virtual import engine, virtual_rig
from bkind3d.sims.virtual.clip import Posture, load_postures
from bkind3d.sims.virtual.motion import wander
from bkind3d.sims.virtual.puppet import Puppet
from bkind3d.sims.virtual.rat import RAT
from bkind3d.sims.virtual.rig import SUBJECTS
from bkind3d.sims.virtual.stage import Lens, Stage, build_model

if importlib.util.find_spec("dm_control") is None and not os.environ.get("CI"):
    pytest.skip("the extra sim is not installed", allow_module_level=True)

SMALL = {"views": 2, "frames": 8, "test_frames": 4, "image_size": (64, 64), "progress": False}
RIGID = {
    "rat": "Snout-EarL Snout-EarR EarL-EarR ShoulderL-ElbowL ElbowL-WristL WristL-HandL ShoulderR-ElbowR ElbowR-WristR "
    "WristR-HandR HipL-KneeL KneeL-AnkleL AnkleL-FootL HipR-KneeR KneeR-AnkleR AnkleR-FootR HipL-HipR",
    "human": "ShoulderL-ElbowL ElbowL-HandL HipL-KneeL KneeL-AnkleL AnkleL-ToeL ShoulderR-ElbowR ElbowR-HandR "
    "HipR-KneeR KneeR-AnkleR AnkleR-ToeR HipL-HipR Pelvis-HipL",
}
FEET = {"rat": ("FootL", "FootR"), "human": ("AnkleL", "AnkleR")}


def staged(subject, size=(96, 96), views=2, distortion=False):
    """Cameras, lenses and the compiled model."""
    cameras = place_cameras(subject.ring, views, size, distortion, np.random.default_rng(3))
    lenses = {name: Lens(cameras.select([name])) for name in cameras.names}
    return cameras, lenses, build_model(subject, cameras, lenses, np.random.default_rng(4))


def animated(name, seed=1, frames=400, posture=None):
    subject = SUBJECTS[name]
    puppet = Puppet(staged(subject, (32, 32))[2], subject.points, subject.limbs, subject.soles, subject.scale)
    return puppet, subject.animate(puppet, frames, 30.0, np.random.default_rng(seed), posture)


@pytest.fixture(scope="module", params=["rat", "human"])
def acted(request):
    """A subject's name, its puppet, and a motion of it."""
    return request.param, *animated(request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A motion file like that of the fitted motion capture: the head turned left, then right."""
    qpos = np.zeros((200, 74), np.float32)
    qpos[:, 3] = 1.0
    puppet, _ = animated("rat", frames=2)
    turn = np.sin(2 * np.pi * np.arange(200) / 100)
    qpos[:, puppet.addresses(("vertebra_cervical_4_bend", "vertebra_cervical_1_bend"))] = 0.5 * turn[:, None]
    path = tmp_path_factory.mktemp("clip") / "clip.npz"
    np.savez(path, qpos=qpos, fps=50)
    return path


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    return virtual_rig(tmp_path_factory.mktemp("virtual") / "new" / "rig", seed=5, **SMALL)


@pytest.mark.parametrize("distortion", [False, True])
def test_a_bead_is_seen_where_the_cameras_project_it(distortion):
    engine.load_mujoco()
    from dm_control import mjcf

    def bead(_):
        model = mjcf.RootElement()
        model.asset.add("material", name="glow", emission=1, rgba=[1, 1, 1, 1])
        model.worldbody.add("geom", type="sphere", size=[0.008], material="glow", group=1)
        return model

    cameras, lenses, model = staged(dataclasses.replace(RAT, walker=bead), (96, 80), 3, distortion)
    mujoco = engine.load_mujoco()
    data, errors = mujoco.MjData(model), []
    stage = Stage(model, data, lenses)
    points = np.random.default_rng(0).uniform([-0.12, -0.12, 0.02], [0.12, 0.12, 0.14], (12, 3))
    for point in points:
        data.qpos[:3] = point
        mujoco.mj_kinematics(model, data)
        for name in cameras.names:
            shown = np.abs(stage.picture(name) - lenses[name](stage.rooms[name][0][::-1])).sum(axis=-1)
            y, x = np.indices(shown.shape)
            seen = np.array([(shown * x).sum(), (shown * y).sum()]) / shown.sum()
            expected = cameras.select([name]).project(torch.from_numpy(point[None]))[0][0, 0].numpy()
            errors.append(seen - expected)
    stage.close()
    assert np.abs(np.mean(errors, axis=0)).max() < 0.03  # px
    assert np.abs(errors).max() < 0.15  # rasterised


def test_the_truth_lies_on_the_animal(rig):
    project = load_project(rig)
    for name in project.cameras.names:
        camera = project.cameras.select([name])
        for recording in project.recordings:
            points = load_truth(recording, project).points3d
            with av.open(str(recording.videos[name])) as container:
                frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            # The floor is grey-green and between the coat's dark and light, by more than noise and encoding move it.
            grey = frames.astype(float).mean(axis=-1)
            floor = np.median(grey)
            coat = np.abs(grey - floor) > 22
            pixels = np.rint(camera.project(torch.from_numpy(points))[0][0].numpy()).astype(int)  # (T, P, 2)
            for mask, places in zip(coat, pixels):
                inside = ((places >= 0) & (places < 64)).all(axis=-1)
                assert inside.mean() > 0.9
                assert 60 < mask.sum() < 1600
                y, x = np.nonzero(mask)
                gap = np.hypot(places[inside, None, 0] - x, places[inside, None, 1] - y).min(axis=1)
                assert gap.max() < 3.0
                assert np.mean(gap <= 1.5) > 0.9
                # Points shifted by an eighth of the picture leave it.
                assert np.mean(np.hypot(places[:, None, 0] + 8 - x, places[:, None, 1] - y).min(axis=1) <= 1.5) < 0.9


def test_points_are_those_of_the_model(acted):
    name, puppet, animation = acted
    mujoco, data = puppet.mujoco, puppet.mujoco.MjData(puppet.model)
    data.qpos[:] = animation.qpos[17]
    mujoco.mj_forward(puppet.model, data)
    sites = {
        "rat": {"ElbowL": "elbow_L", "KneeR": "knee_R", "HandR": "finger_R", "AnkleL": "ankle_L"},
        "human": {},
    }[name]
    for point, site in sites.items():
        expected = data.site(f"walker/{site}").xpos
        np.testing.assert_allclose(animation.points[17, puppet.names.index(point)], expected, atol=1e-9)
    bodies = {"rat": {"TailBase": "vertebra_C1"}, "human": {"KneeL": "ltibia", "HandR": "rhand"}}[name]
    for point, body in bodies.items():
        expected = data.body(f"walker/{body}").xpos
        np.testing.assert_allclose(animation.points[17, puppet.names.index(point)], expected, atol=1e-9)


def test_bones_keep_their_length(acted):
    name, puppet, animation = acted
    for bone in RIGID[name].split():
        a, b = (animation.points[:, puppet.names.index(end)] for end in bone.split("-"))
        length = np.linalg.norm(a - b, axis=-1)
        assert np.ptp(length) < 1e-6, bone
        assert 0.004 < length.mean() < 0.5


def test_left_is_left(acted):
    name, puppet, animation = acted
    at = {point: animation.points[:, i] for i, point in enumerate(puppet.names)}
    hips = at["HipL"] - at["HipR"]
    tail, nose = {"rat": ("TailBase", "Snout"), "human": ("AnkleL", "ToeL")}[name]
    front = at[nose] - at[tail]
    turn = front[:, 0] * hips[:, 1] - front[:, 1] * hips[:, 0]  # positive: left is to the left of where it looks
    assert np.mean(turn > 0) > 0.98
    assert SUBJECTS[name].edges.shape == {"rat": (23, 2), "human": (18, 2)}[name]


def test_it_stands_on_the_floor(acted):
    name, puppet, animation = acted
    mujoco, model, data = puppet.mujoco, puppet.model, puppet.mujoco.MjData(puppet.model)
    for qpos in animation.qpos[::20]:
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        up = data.geom_xmat.reshape(-1, 3, 3)[:, 2]  # the vertical in each geom's frame
        extent = np.linalg.norm(up * model.geom_size, axis=1)  # of an ellipsoid; then of capsules and spheres
        round_ends = model.geom_type != mujoco.mjtGeom.mjGEOM_ELLIPSOID
        extent[round_ends] = (model.geom_size[:, 0] + np.abs(up[:, 2]) * model.geom_size[:, 1])[round_ends]
        assert abs((data.geom_xpos[:, 2] - extent)[puppet.soles].min()) < 1e-6
    assert animation.points[..., 2].min() > 0.0
    # Planted feet are still: in walking each is for a good part of the time.
    walks = animation.behaviour[1:] == 0
    for foot in FEET[name]:
        place = animation.points[:, puppet.names.index(foot), :2]
        speed = 30 * np.linalg.norm(np.diff(place, axis=0), axis=-1) / SUBJECTS[name].scale
        assert 0.2 < np.mean(speed[walks] < 0.15) < 0.95
        assert speed.max() > 0.8


@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_clip_holds_all_there_is(acted, seed):
    name, puppet, animation = acted
    subject = SUBJECTS[name]
    if seed > 1:
        animation = subject.animate(puppet, 400, 30.0, np.random.default_rng(seed), None)
    share = np.bincount(animation.behaviour, minlength=len(subject.temper.behaviours)) / len(animation.behaviour)
    assert share.min() > 0.04
    hips = animation.points[:, puppet.names.index("HipL")] - animation.points[:, puppet.names.index("HipR")]
    quarter = np.floor(np.arctan2(hips[:, 1], hips[:, 0]) / (np.pi / 2)).astype(int)
    assert np.bincount(quarter + 2, minlength=4).min() > 0.05 * len(hips)
    low = np.array(subject.volume.center) - np.array(subject.volume.size) / 2
    high = np.array(subject.volume.center) + np.array(subject.volume.size) / 2
    assert ((animation.points > low) & (animation.points < high)).all()


def test_what_a_behaviour_looks_like(acted):
    name, puppet, animation = acted
    at = {point: animation.points[:, i] for i, point in enumerate(puppet.names)}
    kinds = SUBJECTS[name].temper.behaviours
    of = {kind: animation.behaviour == place for place, kind in enumerate(kinds)}
    assert {"rat": {"walk", "pause", "rear", "groom"}, "human": {"walk", "stand", "raise", "bend", "squat"}}[
        name
    ] == set(of)
    if name == "rat":
        snout = at["Snout"][:, 2]
        assert np.median(snout[of["rear"]]) > 1.5 * np.median(snout[of["walk"]])
        touch = np.linalg.norm(at["HandL"] - at["Snout"], axis=-1)
        assert np.median(touch[of["groom"]]) < 0.03 < np.median(touch[of["walk"]])
        hands = at["HandL"][of["groom"]] - at["Snout"][of["groom"]]
        assert hands.std(axis=0).max() > 0.003  # they do not rest there
    else:
        assert np.median(at["HandL"][of["raise"], 2]) > np.median(at["Head"][of["raise"], 2]) + 0.1
        assert np.median(at["Head"][of["bend"], 2]) < 0.8 * np.median(at["Head"][of["stand"], 2])
        assert np.median(at["Pelvis"][of["squat"], 2]) < 0.75 * np.median(at["Pelvis"][of["stand"], 2])
    speed = 30 * np.linalg.norm(np.diff((at["HipL"] + at["HipR"])[:, :2] / 2, axis=0), axis=-1)
    assert np.quantile(speed[of["walk"][1:]], 0.75) > 3 * np.median(speed[of[kinds[1]][1:]])


def test_the_rat_in_a_field_runs_far_and_stays_in_view():
    field = SUBJECTS["rat-field"]
    path, keep = wander(600, 30.0, field.temper, np.random.default_rng(1))
    places = path.position[keep]
    assert np.linalg.norm(np.ptp(places, axis=0)) > 0.4  # the other rat moves 0.2 m
    assert np.abs(places).max() < 0.55
    cameras = staged(field, (512, 512), views=6)[0]
    corners = torch.tensor([[x, y, 0.05] for x in (-0.52, 0.52) for y in (-0.52, 0.52)]).double()
    assert (cameras.in_view(corners).sum(0) >= 3).all()
    for x in (-0.4, 0.4):
        for y in (-0.4, 0.4):
            body = torch.tensor([[x - 0.05, y, 0.03], [x + 0.05, y, 0.03], [x, y - 0.05, 0.03], [x, y + 0.05, 0.12]])
            assert cameras.in_view(body.double()).all()
            pixels = cameras.project(body.double())[0]
            across = (pixels.amax(1) - pixels.amin(1)).norm(dim=-1)
            assert ((across > 15) & (across < 100)).all()  # 0.1 m in a picture of 512


def test_files_of_a_rig(rig):
    project = load_project(rig)
    assert project.units == "m"
    assert project.cameras.names == ("cam0", "cam1")
    assert [(recording.name, recording.split) for recording in project.recordings] == [
        ("train", "train"),
        ("test", "test"),
    ]
    assert project.volume == RAT.volume
    for recording, count in zip(project.recordings, (8, 4)):
        truth = load_truth(recording, project)
        assert truth.points3d.shape == (count, 23, 3)
        assert truth.behaviour is not None
        assert truth.behaviours == ["walk", "pause", "rear", "groom"]
        assert truth.names[:3] == ["Snout", "EarL", "EarR"]
        for video in recording.videos.values():
            with av.open(str(video)) as container:
                assert sum(1 for _ in container.decode(video=0)) == count
                assert container.streams.video[0].average_rate == 30
    train, test = (load_truth(recording, project).points3d for recording in project.recordings)
    assert np.abs(train[:4] - test).max() > 0.01


def test_one_seed_one_rig(rig, tmp_path):
    again = virtual_rig(tmp_path / "again", seed=5, **SMALL).parent
    for file in sorted(rig.parent.rglob("*")):
        if file.suffix == ".npz":
            with np.load(file) as old, np.load(again / file.relative_to(rig.parent)) as new:
                assert all(np.array_equal(old[key], new[key]) for key in old)
        elif file.is_file():
            assert file.read_bytes() == (again / file.relative_to(rig.parent)).read_bytes(), file.name
    other = virtual_rig(tmp_path / "other", seed=6, **SMALL).parent
    assert (other / "calibration.toml").read_text() != (again / "calibration.toml").read_text()


def test_a_motion_file_drives_the_rat(clip, tmp_path):
    posture, rest = load_postures(clip, 0.5)
    # A slow motion comes back nearly as it was, and is played back and forth without a jump.
    turns = posture.at(np.arange(0, 8, 1 / 30))[0][:, 7:]
    assert np.abs(np.diff(turns, axis=0)).max() < 0.08
    assert np.abs(turns).max() == pytest.approx(0.5, abs=0.06)
    assert len(posture.qpos) == len(rest.qpos) == 100
    puppet, plain = animated("rat", frames=60)
    driven = SUBJECTS["rat"].animate(puppet, 60, 30.0, np.random.default_rng(1), posture)
    assert np.array_equal(plain.behaviour, driven.behaviour)  # the path is scripted all the same
    quiet = np.isin(driven.behaviour, [0, 1])
    head = driven.qpos[quiet][:, puppet.addresses(("vertebra_cervical_4_bend",))]
    assert np.ptp(head) > 0.3
    project = load_project(virtual_rig(tmp_path / "rig", motion=clip, **SMALL))
    assert load_truth(project.recordings[0], project).points3d.shape == (8, 23, 3)


def test_a_posture_follows_its_clip():
    times = np.arange(100) / 50
    qpos = np.zeros((100, 9))
    qpos[:, 3] = 1.0
    qpos[:, 7] = np.sin(np.pi * times)
    played, tilt = Posture(qpos, 50.0).at(times)
    assert np.abs(played[5:-5, 7] - qpos[5:-5, 7]).max() < 0.03  # smoothing takes a little of the amplitude
    assert np.abs(tilt.as_rotvec()).max() < 1e-12


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("subject", "cat"),
        ("views", 1),
        ("views", 9),
        ("frames", 1),
        ("test_frames", 0),
        ("image_size", (63, 64)),
        ("fps", 0),
        ("seed", -1),
        ("crf", 52),
    ],
)
def test_bad_arguments(tmp_path, argument, value):
    with pytest.raises(InputError, match=f"^{argument}: ") as caught:
        virtual_rig(tmp_path / "rig", **{**SMALL, argument: value})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rig").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"qpos": np.zeros((20, 73)), "fps": 50}, "must be"),
        ({"qpos": np.zeros((5, 74)), "fps": 50}, "at least 10"),
        ({"qpos": np.full((20, 74), np.nan), "fps": 50}, "finite"),
        ({"qpos": np.ones((20, 74)), "fps": 0}, "finite"),
        ({"qpos": np.zeros((20, 74)), "fps": 50}, "quaternion"),
        ({"angles": np.zeros((20, 74)), "fps": 50}, "expected qpos and fps"),
    ],
)
def test_bad_motion_files(tmp_path, arrays, message):
    np.savez(tmp_path / "clip.npz", **arrays)
    with pytest.raises(InputError, match=message):
        virtual_rig(tmp_path / "rig", motion=tmp_path / "clip.npz", **SMALL)
    with pytest.raises(InputError, match="not an npz"):
        virtual_rig(tmp_path / "rig", motion=tmp_path / "none.npz", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.npz"]


def test_only_the_rat_follows_a_motion_file(clip, tmp_path):
    with pytest.raises(InputError, match=r"^motion: only the rat"):
        virtual_rig(tmp_path / "rig", subject="human", motion=clip, **SMALL)


def test_folders_with_other_things_are_spared(rig, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files already"):
        virtual_rig(tmp_path, **SMALL)
    with pytest.raises(InputError, match=r"project\.yaml"):
        virtual_rig(tmp_path, force=True, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("package", ["dm_control", "mujoco"])
def test_without_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*pip install 'bkind3d\[sim\]'") as caught:
        virtual_rig(tmp_path / "rig", **SMALL)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_demo_that_cannot_run_leaves_nothing(clip, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^source: a virtual human comes from no file"):
        demo("human-sim", out=tmp_path / "run", source=clip)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for subject in ("rat", "human-sim"):
        with pytest.raises(InputError, match=r"bkind3d\[sim\]"):
            demo(subject, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo draws with what the system has")
def test_without_a_library_to_draw(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(engine, "_loads", lambda library: "OSMesa" in library)
    engine.load_mujoco()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    engine.load_mujoco()  # what is set stays
    monkeypatch.setattr(engine, "_loads", lambda library: False)
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(InputError, match="libegl1 libgl1 libgl1-mesa-dri, or apt-get install libosmesa6") as caught:
        virtual_rig(tmp_path / "rig", **SMALL)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_context_that_does_not_open(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no display\nmore lines")

    engine.load_mujoco()
    monkeypatch.setattr(importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}"), "GLContext", fail)
    with pytest.raises(InputError, match=r"MUJOCO_GL=.*: cannot draw here \(no display\).*libegl1") as caught:
        virtual_rig(tmp_path / "rig", **SMALL)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
