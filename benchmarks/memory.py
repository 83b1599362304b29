"""Is the memory that `bkind3d check` foretells what a training step takes?  python -m benchmarks.memory --out FILE.csv

Twelve runs of different methods, networks, sizes and settings, small enough for two CPU cores, take two steps each on
simulated videos. On the CPU the allocations that torch's profiler records are added up, on top of the weights; on a
GPU it is the peak of the memory that torch has allocated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bkind3d.config import Config, validate
from bkind3d.experiments.paper import change
from bkind3d.experiments.subjects import SUBJECTS
from bkind3d.memory import training_memory
from bkind3d.sims.simulate import simulate_rig
from bkind3d.train import Trainer

from .tables import write_csv

COLUMNS = ("run", "views", "settings", "model_bytes", "measured_bytes", "ratio", "model_seconds", "device", "torch")
RESNET: dict[str, Any] = {
    "model.edge_strides": [16, 8, 4],
    "model.map_stride": 4,
    "data.height": 128,
    "data.width": 128,
    "data.window": 0,
}
PAPER: dict[str, Any] = {"data.foreground": False, "data.window": 0, "model.turn_volume": False}
# Name, views, and what differs from the settings of the demo.
RUNS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("demo", 4, {}),
    ("demo-batch", 4, {"train.batch": 12}),
    ("triangulation-resnet18", 5, {**RESNET, "model.encoder": "resnet18"}),
    ("triangulation-vgg19", 4, {"loss.network": "vgg19", "data.window": 64}),
    ("triangulation-points", 4, {"model.bottleneck": "points", "data.foreground": False, "data.window": 0}),
    ("depth", 6, {"method": "depth", "data.height": 96, "data.width": 128, "data.window": 0}),
    ("keypoint3d-resnet50", 4, {**RESNET, "method": "keypoint3d", "model.encoder": "resnet50", "train.batch": 2}),
    ("triangulation-checkpointing", 4, {"train.checkpointing": "all", "data.window": 0}),
    ("volumetric", 4, {"method": "volumetric"}),
    ("volumetric-checkpointing", 4, {"method": "volumetric", "train.checkpointing": "volume", "model.voxels": 32}),
    (
        "volumetric-paper-network",
        4,
        {
            **RESNET,
            **PAPER,
            "method": "volumetric",
            "model.encoder": "resnet50",
            "model.volume_channels": [16, 32, 64, 128],
            "model.volume_stem": 7,
            "model.volume_blocks": 3,
            "model.channels": 32,
            "model.voxels": 32,
            "loss.network": "vgg19",
            "train.batch": 1,
        },
    ),
    (
        "volumetric-checkpointing-all",
        6,
        {
            "method": "volumetric",
            "train.checkpointing": "all",
            "model.voxels": 28,
            "loss.network": "vgg19",
            "loss.equivariance_share": 0.5,
            "train.optimizer": "sgd",
        },
    ),
)


def settings(project: Path, changes: dict[str, Any]) -> Config:
    """The demo's settings with some changed."""
    config = SUBJECTS["animal"].config(project, seed=0)
    for name, value in changes.items():
        change(config, name, tuple(value) if isinstance(value, list) else value)
    validate(config)
    return config


def measured(trainer: Trainer) -> int:
    """Peak of the bytes allocated in two training steps; the first has no gradients and optimiser state yet."""
    trainer.wrapped.train()
    trainer.objective.train()
    batches = trainer._batches()
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            trainer._train_step(*next(batches))
        return torch.cuda.max_memory_allocated()
    before = _bytes(_held(trainer))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(2):
            trainer._train_step(*next(batches))
    results = recorded.profiler
    assert results is not None
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = peak = before
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _held(trainer: Trainer) -> list[Tensor]:
    """What is there before the first step: weights and buffers, and the frozen network of the loss."""
    frozen = [value for network in trainer.objective.reconstruction._network for value in network.parameters()]
    return [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.objective.buffers(), *frozen]


def _bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def compare(name: str, views: int, changes: dict[str, Any], project: Path, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    config = settings(project, changes)
    trainer = Trainer(config, folder, progress=False)
    started = time.perf_counter()
    model = training_memory(config, views, trainer.grid.shape)
    seconds = time.perf_counter() - started
    found = measured(trainer)
    return {
        "run": name,
        "views": views,
        "settings": json.dumps(changes),
        "model_bytes": model,
        "measured_bytes": found,
        "ratio": f"{model / found:.3f}",
        "model_seconds": f"{seconds:.2f}",
        "device": trainer.accelerator.device.type,
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file; printed only when left out")
    parser.add_argument("--runs", nargs="*", help=f"some of {', '.join(name for name, _, _ in RUNS)}")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, views, changes in RUNS:
            if arguments.runs and name not in arguments.runs:
                continue
            project = folder / f"rig{views}" / "project.yaml"
            if not project.is_file():
                simulate_rig(
                    project.parent, views=views, frames=60, test_frames=2, image_size=(144, 144), workers=1,
                    progress=False,
                )  # fmt: skip
            row = compare(name, views, changes, project, folder / "run")
            print(
                f"{name:>28} {views} views: foretold {row['model_bytes'] / 1e6:7.1f} MB in {row['model_seconds']} s, "
                f"measured {row['measured_bytes'] / 1e6:7.1f} MB, ratio {row['ratio']}",
                flush=True,
            )
            rows.append(row)
    if arguments.out:
        write_csv(arguments.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
