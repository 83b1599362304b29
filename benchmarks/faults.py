"""Broken files of every kind that is read: what becomes of them?  python -m benchmarks.faults --out FOLDER

Of each kind a good file is made, and then mutants of it: bytes turned, cut, doubled and inserted; of texts also words,
values and lines replaced by what is hostile (numbers like 10^400, aliases, depth, other types). Each mutant is read as
the package reads it. It must be taken, or refused in one line (`InputError`), within 2 s of the processor and 1 GB;
whatever else happens is counted as wrong and its bytes are kept in FOLDER/wrong. Each kind has a process of its own, so
that a crash is counted too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import scipy.io
import torch

from bkind3d.cameras import read_calibration
from bkind3d.checkpoints import load_weights, pairs_per_step
from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig, load_config
from bkind3d.data import h36m, load_project, load_truth, rat7m
from bkind3d.data.arrays import map_npy
from bkind3d.data.index import Index, load_index, save_index
from bkind3d.data.video import probe_video, read_frames
from bkind3d.errors import InputError
from bkind3d.evaluation.evaluate import evaluate
from bkind3d.logs import cut_logs
from bkind3d.poses import Poses
from bkind3d.predict import predict
from bkind3d.report import page
from bkind3d.report.inputs import read_run
from bkind3d.run import build_model
from bkind3d.sims.simulate import simulate_rig
from bkind3d.train import train

from .tables import write_csv

SECONDS, ROOM = 2.0, 1 << 30  # of the processor, and bytes, that one file may take
COLUMNS = ("kind", "tried", "taken", "refused", "wrong", "slowest_s", "peak_mb")
HOSTILE = (
    "", "~", "null", "true", "no", "0", "-1", "1", "2.5", "2e-3", "1e999", ".nan", "NaN", "Infinity", "1" + "0" * 400,
    "9" * 5000, "1000000000", "[]", "{}", "[1, 2]", "{a: 1}", "[" * 3000, "{a: " * 3000, "*a", "&a [*a]", "!!int x",
    "~nosuchuser/x", "../../etc/passwd", "/dev/zero", "a.b.c", ".".join("a" * 3000) + " = 1",
    '"', "'", "\\0", "\x00", "\ufeff",
    "x" * 100_000, "2026-13-45", "!!python/object/apply:os.system [true]", "<<", "%s", "é",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file: where a good one lies below the folder, how it is read, and whether it is a text."""

    path: str
    read: Callable[[Path], object]
    text: bool = False


def settings(project: Path) -> Config:
    """Of the smallest run."""
    return Config(
        project=project,
        method="volumetric",
        data=DataConfig(height=32, width=32, gap=2, window=24),
        model=ModelConfig(
            keypoints=4, encoder="small", pyramid_channels=8, channels=4, voxels=8, volume_channels=(4, 4, 8),
            volume_stem=3, volume_blocks=1, edge_strides=(8, 4), edge_sigmas=(1.0, 1.5), decoder_channels=(8, 8),
            silhouette_strides=(4, 2),
        ),
        loss=LossConfig(target_channels="grey", network="none"),
        train=TrainConfig(steps=3, batch=2, log_every=1, sample_every=1, save_every=3, warmup=1),
    )  # fmt: skip


def make(folder: Path) -> None:
    """Good files of all kinds."""
    project = simulate_rig(
        folder / "rig", views=4, frames=12, test_frames=6, image_size=(48, 48), workers=1, progress=False
    )
    run = folder / "run"
    train(settings(project), run, progress=False)
    predict(run, progress=False)
    evaluate(run, progress=False)
    frames = next(path for path in (folder / "rig/cache").glob("train-*.npy") if ".masks" not in path.name)
    shutil.copy(frames, folder / "cache.npy")
    save_index(folder / "index.npz", Index(("a", "b"), np.zeros((5, 2), np.int64), np.arange(5), 30.0))
    random = np.random.default_rng(0)
    lens = {
        "IntrinsicMatrix": np.eye(3) * [100, 100, 1],
        "rotationMatrix": np.eye(3),
        "translationVector": np.zeros((1, 3)),
        "RadialDistortion": np.zeros((1, 2)),
        "TangentialDistortion": np.zeros((1, 2)),
        "frame": np.arange(20.0)[:, None],
    }
    content = {
        "cameras": {f"Camera{number}": lens for number in (1, 2)},
        "mocap": {name: random.normal(size=(20, 3)) for name in rat7m.MARKERS.split()[:4]},
    }
    scipy.io.savemat(folder / "mocap.mat", content, do_compression=True)
    with h5py.File(folder / "mocap-7.3.mat", "w") as file:
        for part, groups in content.items():
            for name, values in groups.items():
                for key, value in values.items() if isinstance(values, dict) else [("", values)]:
                    file[f"{part}/{name}/{key}".rstrip("/")] = np.asarray(value).T
    with h5py.File(folder / "annot.h5", "w") as file:
        file["camera"], file["frame"] = np.repeat([1, 2], 5), np.tile(np.arange(1, 6), 2)
        file["pose/2d"], file["pose/3d"] = random.normal(size=(10, 32, 2)), random.normal(size=(10, 32, 3))
    with h5py.File(folder / "cameras.h5", "w") as file:
        for key, value in {"R": np.eye(3), "T": np.zeros((3, 1)), "f": [[1.0], [1]], "c": [[0.0], [0]]}.items():
            file[f"subject1/camera1/{key}"] = value
        file["subject1/camera1/k"], file["subject1/camera1/p"] = np.zeros((3, 1)), np.zeros((2, 1))
        file["subject1/camera1/Name"] = np.array([[ord(letter)] for letter in "54138969"], np.uint16)
    lens_json = {"calibration_matrix": np.eye(3).tolist(), "distortion": [0.0] * 5}
    pose = {"R": np.eye(3).tolist(), "t": [[0.0], [0], [1]]}
    cameras = {"intrinsics": {"1": lens_json}, "extrinsics": {"S1": {"1": pose}}}
    (folder / "camera-parameters.json").write_text(json.dumps(cameras))
    make_calibrations(folder)


def make_calibrations(folder: Path) -> None:
    """A calibration of two cameras as several tools write it."""
    for name in ("lenses", "easymocap", "colmap", "dannce", "dannce-7.3"):
        (folder / name).mkdir()
    matrix, turn, place = [[90.0, 0, 32], [0, 90, 24], [0, 0, 1]], np.eye(3).tolist(), [0.1, 0.2, 3.0]
    row = {"size": [64, 48], "K": matrix, "dist": [0.0] * 5, "R": turn, "t": place}
    rows = [{"name": name, **row} for name in ("a", "b")]
    (folder / "lenses/calibration.json").write_text(json.dumps({"units": "m", "cameras": rows}))

    def written(key: str, value: Any) -> str:
        array = np.atleast_2d(np.asarray(value, float))
        size = f"  rows: {array.shape[0]}\n  cols: {array.shape[1]}\n  dt: d\n"
        return f"{key}: !!opencv-matrix\n{size}  data: {array.ravel().tolist()}\n"

    head = '%YAML:1.0\n---\nnames:\n  - "a"\n  - "b"\n'
    inner = "".join(written(f"K_{name}", matrix) + written(f"dist_{name}", [0.0] * 5) for name in "ab")
    column = [[value] for value in place]
    outer = "".join(written(f"R_{name}", [[0.1], [0.2], [0.3]]) + written(f"T_{name}", column) for name in "ab")
    (folder / "easymocap/intri.yml").write_text(head + inner)
    (folder / "easymocap/extri.yml").write_text(head + outer)
    lines = [f"{number} OPENCV 64 48 90 90 32.5 24.5 0 0 0 0" for number in (1, 2)]
    (folder / "colmap/cameras.txt").write_text("\n".join(["# Camera list with one line of data per camera:", *lines]))
    images = [f"{number} 1 0 0 0 0.1 0.2 3 {number} images/{number}.png\n12.5 3.5 -1" for number in (1, 2)]
    images.insert(0, "# Image list with two lines of data per image:")
    (folder / "colmap/images.txt").write_text("\n".join(images))
    lens = {"K": np.array(matrix).T, "r": np.eye(3), "t": np.array([place]), "RDistort": np.zeros((1, 2))}
    lens["TDistort"] = np.zeros((1, 2))
    cell = np.empty((2, 1), object)
    cell[:, 0] = [lens, lens]
    scipy.io.savemat(folder / "dannce/dannce.mat", {"params": cell, "camnames": np.array([["a"], ["b"]], object)})
    with h5py.File(folder / "dannce-7.3/dannce.mat", "w") as file:
        groups = [file.create_group(f"#refs#/{number}") for number in (1, 2)]
        for group in groups:
            for key, value in lens.items():
                group[key] = value.T
        references = np.array([[group.ref for group in groups]], object)
        file.create_dataset("params", data=references, dtype=h5py.ref_dtype)


def calibration(path: Path) -> object:
    """A calibration of any format; sizes and units where it has none."""
    found = read_calibration(path)
    sized = all(lens.size is not None for lens in found.lenses)
    return found.cameras(found.units or "m", None if sized else (64, 48))


def of_run(path: Path) -> object:
    """A report of the run that a file belongs to, without pictures and curves, which take most of the time."""
    files = read_run(path.parent)
    files.metrics, files.health, files.samples = {}, [], []
    with mock.patch.object(page.figures, "edge_matrix", return_value=""):
        page.render(files, None)
    if files.missing:
        raise InputError(files.missing[0])
    return files


def of_log(path: Path) -> object:
    """What resuming a run, and a report, make of a log."""
    cut_logs(path.parent, 2)
    return read_run(path.parent)


def human36m(path: Path) -> object:
    """The cameras of a subject of Human3.6M."""
    return read_calibration(path, "S1").cameras(sizes=(100, 100))


def session(path: Path) -> object:
    """A session of Rat7M."""
    return rat7m._read_session(path)[0].cameras(sizes=(100, 100))


def project_of(path: Path) -> object:
    """A project and its volume."""
    project = load_project(path)
    return project.working_volume()


def truth_of(path: Path) -> object:
    """The true joints of the project's first recording."""
    project = load_project(path.parents[1] / "project.yaml")
    return load_truth(project.recordings[0], project)


def cached(path: Path) -> object:
    """Frames from the cache, which a run looks at."""
    return np.asarray(map_npy(path, (12, 4, 32, 32, 3))).sum()


def frames(path: Path) -> object:
    """A video from its first frame to its last."""
    return sum(frame.sum() for frame in read_frames(probe_video(path)))


def weights(path: Path) -> object:
    """The networks of a checkpoint."""
    load_weights(build_model(load_config(path.parents[2] / "config.yaml")), path)
    return None


KINDS = {
    "project.yaml": Kind("rig/project.yaml", project_of, text=True),
    "calibration.toml": Kind("rig/calibration.toml", calibration, text=True),
    "calibration .json": Kind("lenses/calibration.json", calibration, text=True),
    "EasyMocap intri.yml": Kind("easymocap/intri.yml", calibration, text=True),
    "COLMAP images.txt": Kind("colmap/images.txt", calibration, text=True),
    "DANNCE .mat, version 5": Kind("dannce/dannce.mat", calibration),
    "DANNCE .mat, version 7.3": Kind("dannce-7.3/dannce.mat", calibration),
    "truth.npz": Kind("rig/train/truth.npz", truth_of),
    "index.npz": Kind("index.npz", lambda path: load_index(path, ("a", "b"))),
    "video .mp4": Kind("rig/train/cam0.mp4", frames),
    "cache .npy": Kind("cache.npy", cached),
    "config.yaml": Kind("run/config.yaml", load_config, text=True),
    "metrics.csv": Kind("run/metrics.csv", of_log, text=True),
    "health.jsonl": Kind("run/health.jsonl", of_log, text=True),
    "skeleton.json": Kind("run/skeleton.json", of_run, text=True),
    "evaluation.json": Kind("run/evaluation.json", of_run, text=True),
    "env.json": Kind("run/env.json", of_run, text=True),
    "trainer.json": Kind("run/checkpoints/step_000003/trainer.json", lambda p: pairs_per_step(p.parent), text=True),
    "model.safetensors": Kind("run/checkpoints/step_000003/model.safetensors", weights),
    "poses .nc": Kind("run/poses/train.nc", Poses.load),
    "Rat7M .mat, version 5": Kind("mocap.mat", session),
    "Rat7M .mat, version 7.3": Kind("mocap-7.3.mat", session),
    "Human3.6M annot.h5": Kind("annot.h5", h36m._read_annotation),
    "Human3.6M cameras.h5": Kind("cameras.h5", human36m),
    "Human3.6M cameras .json": Kind("camera-parameters.json", human36m, text=True),
}


# --- mutants ------------------------------------------------------------------------------------------------------


def mutant(data: bytes, random: np.random.Generator, text: bool) -> bytes:
    """The bytes of a file with a few changes."""
    for _ in range(int(random.choice([1, 1, 1, 2, 4]))):
        data = _of_text(data, random) if text and random.random() < 0.7 else _of_bytes(data, random)
    return data


def _of_bytes(data: bytes, random: np.random.Generator) -> bytes:
    place, other = sorted(random.integers(0, len(data) + 1, 2).tolist())
    near = min(len(data), place + int(random.integers(1, 9)))
    match int(random.integers(6)):
        case 0:
            return data[:place] + bytes(random.integers(0, 256, near - place, np.uint8)) + data[near:]
        case 1:
            return data[:place]
        case 2:
            return data[:place] + data[near:]
        case 3:
            return data[:near] + data[place:]
        case 4:
            return data[:place] + [b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff"][int(random.integers(3))] + data[near:]
        case _:
            return data[:place] + data[other:] + data[place:other]


def _of_text(data: bytes, random: np.random.Generator) -> bytes:
    lines = data.decode("utf-8", "replace").split("\n")
    row = int(random.integers(len(lines)))
    word = HOSTILE[int(random.integers(len(HOSTILE)))]
    match int(random.integers(5)):
        case 0:
            lines[row] = word
        case 1:
            lines.insert(row, lines[int(random.integers(len(lines)))])
        case 2:
            del lines[row]
        case 3:  # a value
            head, mark, _ = lines[row].partition(
                next((mark for mark in (": ", " = ", ",") if mark in lines[row]), ": ")
            )
            lines[row] = head + mark + word
        case _:  # a word of the line
            words = lines[row].split(" ")
            words[int(random.integers(len(words)))] = word
            lines[row] = " ".join(words)
    return "\n".join(lines).encode("utf-8", "replace")[: 4 << 20]


# --- trials -------------------------------------------------------------------------------------------------------


def trial(kind: Kind, path: Path) -> tuple[str, str]:
    """Read a file: "taken", "refused" or "wrong", and the words."""
    started = time.process_time()
    try:
        kind.read(path)
        outcome, words = "taken", ""
    except InputError as error:
        words = str(error)
        outcome = "wrong" if "\n" in words or len(words) > 2000 else "refused"
    except Exception as error:  # noqa: BLE001, which is what is looked for
        outcome, words = "wrong", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    return ("wrong", f"{seconds:.1f} s; {words}") if seconds > SECONDS else (outcome, words)


@contextmanager
def memory_limit() -> Iterator[None]:
    """A gigabyte more than the process has."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def try_kind(name: str, folder: Path, seconds: float, most: int, seed: int, report: Any) -> None:
    """Mutants of one kind, until the time or the number is over; `report` gets the counts, last of all."""
    torch.set_num_threads(1)
    kind = KINDS[name]
    good = folder / kind.path
    data = good.read_bytes()
    trial(kind, good)  # which imports what is needed
    assert trial(kind, good)[0] == "taken", trial(kind, good)
    random = np.random.default_rng(seed)
    counts: dict[str, Any] = dict.fromkeys(COLUMNS, 0) | {"kind": name, "slowest_s": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    siblings = {path: path.read_bytes() for path in good.parent.iterdir() if path.is_file() and kind.text}
    with memory_limit():
        while counts["tried"] < most and time.process_time() - started < seconds:
            for path, content in siblings.items():
                path.write_bytes(content)
            changed = mutant(data, random, kind.text)
            good.write_bytes(changed)
            (folder / "last").write_bytes(changed)
            began = time.process_time()
            outcome, words = trial(kind, good)
            counts["tried"] += 1
            counts[outcome] += 1
            counts["slowest_s"] = round(max(counts["slowest_s"], time.process_time() - began), 2)
            if outcome == "wrong":
                report.send((changed, words))
    counts["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    report.send(counts)


def measure(name: str, folder: Path, seconds: float, most: int, seed: int = 0) -> tuple[dict[str, Any], list[Any]]:
    """The counts of a kind, and what went wrong: (bytes, words). The good files in `folder` stay as they are."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "files", symlinks=True))
        process = context.Process(target=try_kind, args=(name, copy, seconds, most, seed, sender))
        process.start()
        sender.close()
        wrong: list[Any] = []
        try:
            while isinstance(message := receiver.recv(), tuple):
                wrong.append(message)
            counts = message
        except EOFError:  # it crashed
            if not (copy / "last").exists():
                raise
            counts = dict.fromkeys(COLUMNS, 0) | {"kind": name, "wrong": len(wrong) + 1}
            wrong.append(((copy / "last").read_bytes(), "the process crashed"))
        process.join()
    return counts, wrong


def main() -> None:
    """Measure all kinds, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the processor for each kind")
    parser.add_argument("--most", type=int, default=100_000, help="mutants of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        for name in arguments.kinds:
            counts, wrong = measure(name, Path(scratch), arguments.seconds, arguments.most, arguments.seed)
            rows.append(counts)
            write_csv(arguments.out / "faults.csv", COLUMNS, rows)
            print(*(f"{column} {counts[column]}" for column in COLUMNS), sep="  ", flush=True)
            for number, (data, words) in enumerate(wrong[:5]):
                print("   ", words[:300].replace("\n", " | "), flush=True)
                (arguments.out / "wrong").mkdir(exist_ok=True)
                (arguments.out / "wrong" / f"{name.replace(' ', '-')}-{number}").write_bytes(data)


if __name__ == "__main__":
    main()
