"""A run folder made by hand: all that training, prediction and evaluation write, of a caterpillar in four views."""

import json

import numpy as np
import torch
import yaml

from bkind3d import pictures
from bkind3d.cameras import Cameras, save_toml
from bkind3d.config import Config, DataConfig, save_config
from bkind3d.evaluation.probe import compare_blocked
from bkind3d.evaluation.regressors import ProbeOptions
from bkind3d.evaluation.skeleton_summary import summarise_skeleton
from bkind3d.health import keypoint_health
from bkind3d.poses import Poses
from bkind3d.report import clip
from bkind3d.report.inputs import Scene

VIEWS, JOINTS, FRAMES, HEIGHT, WIDTH = 4, 10, 45, 72, 96
CENTER, SIDES = np.array([1.0, 2.0, 0.3]), np.array([1.2, 1.2, 0.6])


def ring_of_cameras():
    """Four pinholes around the volume, looking at its centre."""
    rotations, translations = [], []
    for angle in np.arange(VIEWS) * 2 * np.pi / VIEWS + 0.4:
        position = CENTER + np.array([2.2 * np.cos(angle), 2.2 * np.sin(angle), 1.2])
        z = (CENTER - position) / np.linalg.norm(CENTER - position)
        x = np.cross(z, [0, 0, 1])
        x /= np.linalg.norm(x)
        rotation = np.stack([x, np.cross(z, x), z])
        rotations.append(rotation)
        translations.append(-rotation @ position)
    intrinsics = np.array([[130.0, 0, (WIDTH - 1) / 2], [0, 130.0, (HEIGHT - 1) / 2], [0, 0, 1]])
    return Cameras(
        names=tuple(f"cam{m}" for m in range(VIEWS)),
        intrinsics=torch.tensor(np.repeat(intrinsics[None], VIEWS, axis=0)),
        distortion=torch.zeros(VIEWS, 5),
        rotation=torch.tensor(np.stack(rotations)),
        translation=torch.tensor(np.stack(translations)),
        image_size=torch.tensor([[WIDTH, HEIGHT]]).expand(VIEWS, 2),
        units="m",
    )


def caterpillar():
    """(F, J, 3): a chain that walks in a circle and wriggles."""
    phase = np.linspace(0, 2 * np.pi, FRAMES)[:, None] + 0.18 * np.arange(JOINTS)
    wave = 0.06 * np.sin(5 * phase)
    return CENTER + np.stack([0.35 * np.cos(phase), 0.35 * np.sin(phase), wave - 0.1], axis=2)


def filmed(cameras, points):
    """(F, M, H, W, 3) uint8: grey ground, a dark blob on every point."""
    pixels = clip.project_keypoints(cameras, points)  # (F, M, J, 2)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    near = np.zeros((*pixels.shape[:2], HEIGHT, WIDTH))
    for j in range(points.shape[1]):
        squared = (x - pixels[:, :, j, 0, None, None]) ** 2 + (y - pixels[:, :, j, 1, None, None]) ** 2
        near = np.maximum(near, np.exp(-squared / 18))
    ground = 150 + 40 * ((x // 12 + y // 12) % 2)
    return np.repeat((ground * (1 - 0.8 * near)).astype(np.uint8)[..., None], 3, axis=4)


def make_scene():
    """Both recordings show the caterpillar."""
    cameras = ring_of_cameras()
    frames = filmed(cameras, caterpillar())
    names = ("train", "test")
    return Scene(
        "demo", "m", np.array([0.0, 0, 1]), CENTER, SIDES,
        cameras=dict.fromkeys(names, cameras),
        frames=dict.fromkeys(names, frames),
        clocks=dict.fromkeys(names, np.arange(FRAMES)),
        splits={name: name for name in names},
    )  # fmt: skip


def write_run(run, scene, parts=None):
    """Everything that training, prediction and evaluation write, or only the named parts."""
    rng = np.random.default_rng(0)
    parts = (
        ["metrics", "health", "skeleton", "poses", "samples", "evaluation", "actions", "env"]
        if parts is None
        else parts
    )
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "project: demo/project.yaml\nmodel:\n  keypoints: 10\n# <script>alert(1)</script>\n"
    )
    points = caterpillar() + rng.normal(0, 0.004, (FRAMES, JOINTS, 3))
    points[:, 8], points[:, 9] = CENTER, points[:, 1] + 0.003  # a dead one, and a twin
    confidence = rng.uniform(0.1, 0.4, (FRAMES, JOINTS))
    edges = [[j, j + 1, 1.5 - 0.1 * j] for j in range(7)]
    if "env" in parts:
        env = {
            "python": "3.11.2",
            "device": "cpu",
            "versions": {"torch": "2.13.0"},
            "backends": {"unproject": "reference"},
        }
        (run / "env.json").write_text(json.dumps(env))
    if "metrics" in parts:
        write_metrics(run / "metrics.csv", rng)
    if "health" in parts:
        records = []
        for step in range(100, 2001, 100):
            moved = CENTER + (points - CENTER) * min(1, step / 800)
            health = keypoint_health(moved, confidence * min(1, step / 1000), CENTER, SIDES)
            records.append(json.dumps({"step": step, **health.to_dict()}))
        (run / "health.jsonl").write_text("\n".join(records) + "\n")
    if "skeleton" in parts:
        pairs = [[i, j] for i in range(JOINTS) for j in range(i + 1, JOINTS)]
        drawn = {(i, j): w for i, j, w in edges}
        rows = [[i, j, drawn.get((i, j), float(rng.uniform(0, 0.2)))] for i, j in pairs]
        names = [f"kp{j:02d}" for j in range(JOINTS)]
        skeleton = {"keypoints": names, "edges": edges, "threshold": 0.3, "all_weights": rows}
        (run / "skeleton.json").write_text(json.dumps(skeleton))
    if "poses" in parts:
        (run / "poses").mkdir()
        for name in ("train", "test"):
            Poses(points, confidence, 30.0, "m", name).save(run / "poses" / f"{name}.nc")
    if "samples" in parts:
        (run / "samples").mkdir()
        for step in (100, 200, 300):
            write_sample(run / "samples" / f"step_{step:06d}.png", scene, points)
    if "evaluation" in parts:
        joints = np.concatenate([caterpillar(), caterpillar()[:, ::2] + 0.02], axis=1)
        untrained = CENTER + rng.normal(0, 0.1, (FRAMES, JOINTS, 3))
        options = ProbeOptions(ridge="auto")
        document = compare_blocked({"BKinD-3D": points, "untrained network": untrained}, joints, 5, options, units="m")
        document["parts"] = parts_of_a_body()
        document["skeleton"] = summarise_skeleton(points, np.array([[j, j + 1] for j in range(7)]))
        (run / "evaluation.json").write_text(json.dumps(document))
    if "actions" in parts:
        tracked = {name: {"top1": 0.9, "topk": 1.0, "balanced": 0.857} for name in ("BKinD-3D", "true joints")}
        spread = {"sd": {"top1": 0.012, "topk": 0.0, "balanced": 0.02}, "recall": [0.951, 0.763]}
        document = {
            "protocol": "1D convolutional network over 31 frames",
            "options": {"window": 31, "top": 2, "seeds": 3},
            "behaviours": ["walk", "groom"],
            "windows": {"tested": [120, 17]},
            "rows": [{"name": name} | values | spread for name, values in tracked.items()],
            "paper": "Another table.",
        }
        (run / "actions.json").write_text(json.dumps(document))
    return run


def write_metrics(path, rng):
    steps = np.arange(10, 2001, 10)
    columns = {
        "step": steps,
        "epoch": steps / 200,
        "loss": 0.1 + np.exp(-steps / 400) * rng.uniform(0.9, 1.1, len(steps)),
        "reconstruction": 0.08 + np.exp(-steps / 400) * rng.uniform(0.9, 1.1, len(steps)),
        "length": 0.05 * (1 - np.exp(-steps / 300)),
        "separation": 0.04 * np.exp(-steps / 900),
        "active_edges": 7 + 38 * np.exp(-steps / 500),
        "lr": np.full(len(steps), 1e-3),
        "grad_norm": rng.uniform(0.2, 2, len(steps)),
        "seconds": steps * 0.17,
    }
    rows = [",".join(columns)] + [
        ",".join(f"{column[k]:.6g}" for column in columns.values()) for k in range(len(steps))
    ]
    path.write_text("\n".join(rows) + "\n")


def write_sample(path, scene, points):
    images = scene.frames["train"][12]
    target = np.abs(scene.frames["train"][18].astype(float) - images).mean(axis=3)  # (M, H, W)
    pixels = clip.project_keypoints(scene.cameras["test"], points[12:13])[0]
    edges = np.array([[j, j + 1] for j in range(7)])
    pictures.sample_sheet(path, images, pixels, edges, target, 0.7 * target + 5, names=scene.cameras["test"].names)


def parts_of_a_body():
    """What the evaluation tells of parts of the body."""
    row = {"nearest_bone": 0.0412, "best_joint": 0.1, "one_to_one": 0.15, "same": 0.83, "same_unsided": 0.9}
    near = {"bones": 1, "share": 0.714, "all_pairs": 0.31, "interval": [0.11, 0.52]}
    return {
        "size": 0.734,
        "units": "m",
        "rows": [{"name": name, **row, "covered": 0.66} for name in ("BKinD-3D", "outline points")],
        "edges": {"edges": 9, "counted": 7, "agreement": [near, near]},
    }


def write_filmed_run(folder, scene, size=64):
    """A run on real videos and a real calibration, with poses of 20 moments; ``size`` of the network's images."""
    save_toml(scene.cameras["test"], folder / "calibration.toml")
    videos = {}
    for m, name in enumerate(scene.cameras["test"].names):
        videos[name] = f"{name}.mp4"
        (folder / videos[name]).write_bytes(clip.encode(scene.frames["test"][:20, m], 30.0))
    project = {
        "name": "filmed",
        "units": "m",
        "calibration": "calibration.toml",
        "volume": {"center": CENTER.tolist(), "size": SIDES.tolist()},
        "recordings": [{"name": "walk", "split": "both", "videos": videos}],
    }
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    run = folder / "run"
    (run / "poses").mkdir(parents=True)
    save_config(
        Config(folder / "project.yaml", data=DataConfig(height=size, width=size, foreground=False)), run / "config.yaml"
    )
    points = caterpillar()[:20]
    Poses(points, np.full(points.shape[:2], 0.5), 30.0, "m", "walk").save(run / "poses" / "walk.nc")
    return run
