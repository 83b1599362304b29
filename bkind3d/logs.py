"""What training writes beside its checkpoints: metrics.csv, health.jsonl, skeleton.json and env.json."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from bkind3d.config import Config
from bkind3d.documents import broken_file, read_text
from bkind3d.errors import InputError
from bkind3d.files import write_json, write_text
from bkind3d.health import Health
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.models.methods import PENALTIES
from bkind3d.poses import keypoint_names
from bkind3d_kernels.backends import OPERATIONS, resolve

METRICS, HEALTH = "metrics.csv", "health.jsonl"
COLUMNS = (
    "step", "epoch", "loss", "reconstruction", "length", "separation", *PENALTIES, "active_edges", "lr", "grad_norm",
    "seconds",
)  # fmt: skip
PACKAGES = ("torch", "numpy", "accelerate", "av", "kornia", "triton")


def append_metrics(run: Path, values: Mapping[str, float]) -> None:
    """Append a row to metrics.csv, below its head where it is new.

    Args:
        run: Run folder.
        values: A number for each of :data:`COLUMNS`; others are left out.
    """
    path = run / METRICS
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow({name: f"{values[name]:.6g}" for name in COLUMNS})


def append_health(run: Path, step: int, health: Health) -> None:
    """Append a line to health.jsonl."""
    with (run / HEALTH).open("a") as file:
        file.write(json.dumps({"step": step, **health.to_dict()}) + "\n")


def _step_of(line: str) -> float:
    """Step of a line of health.jsonl; infinite for half a line, from a crash."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, RecursionError):
        return math.inf


def cut_logs(run: Path, step: int) -> None:
    """Drop the rows of metrics.csv and health.jsonl that come after `step`, which a resumed run writes again.

    The metrics come out with today's columns, 0 in those that an older version did not write.

    Raises:
        InputError: One of them is not what a run writes; neither has then been changed.
    """
    health, metrics = run / HEALTH, run / METRICS
    with _logs_of_a_run(health):
        lines = read_text(health).splitlines(keepends=True) if health.exists() else []
        before = [line for line in lines if _step_of(line) <= step]
    with _logs_of_a_run(metrics):
        rows = list(csv.DictReader(read_text(metrics).splitlines())) if metrics.exists() else []
        kept = [row for row in rows if None not in row.values() and float(row["step"]) <= step]
    write_text(health, "".join(before))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="0", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(kept)
    write_text(metrics, text.getvalue())


@contextmanager
def _logs_of_a_run(path: Path) -> Iterator[None]:
    try:
        with broken_file(f"{path}: not the log of a run"):
            yield
    except InputError as error:
        raise InputError(f"{error}; move it away, and the run goes on without it") from error


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
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "backends": {name: resolve(name, config.model.backend_of(name), device=device) for name in OPERATIONS},
    }
    write_json(path / "env.json", environment)
    return environment


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
