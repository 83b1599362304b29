"""A training step of the paper's size: seconds and memory.  python -m benchmarks.training --out FILE.csv

ResNet-50, four views of 256², 64 × 64 × 33 voxels that are turned, VGG-19 in the loss, bfloat16 on a GPU: 16 pairs a
step with the norms of torch and with `group_norm_act`, with checkpointing, 64 pairs, and 128³ voxels with one pair.
Pictures are noise, which costs what pictures cost. `host_seconds` is what the host needs to queue a step; where it is
below `seconds`, the device never waits for it.

A row that does not fit into memory says so, and the next is tried; with no time left, the rest is not run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.tables import write_csv
from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from bkind3d.losses import Objective
from bkind3d.models.methods import METHODS
from bkind3d.models.volumetric import VolumetricModel
from bkind3d_kernels import GroupNormAct, VoxelGrid

COLUMNS = ("row", "status", "seconds", "host_seconds", "peak_bytes", "steps", "pairs", "voxels", "device", "torch")
VIEWS = 4


@dataclass(frozen=True)
class Row:
    """What is trained.

    Args:
        name: In the table.
        pairs: Of a step.
        voxels: Shape of the grid.
        checkpointing: As `train.checkpointing`.
        torchs_norms: Whether torch's group normalisation, addition and ReLU stand in for `group_norm_act`.
    """

    name: str
    pairs: int
    voxels: tuple[int, int, int]
    checkpointing: str = "none"
    torchs_norms: bool = False


ROOM = (64, 64, 33)
ROWS = (
    Row("16 pairs, torch's norms", 16, ROOM, torchs_norms=True),
    Row("16 pairs", 16, ROOM),
    Row("16 pairs, volume again", 16, ROOM, "volume"),
    Row("128 cubed, all again", 1, (128, 128, 128), "all"),
    Row("64 pairs, all again", 64, ROOM, "all"),
)
PAPER = Config(
    method="volumetric",
    data=DataConfig(foreground=False),
    model=ModelConfig(turn_volume=True),
    train=TrainConfig(precision="bf16"),
)
# To try this file itself on a CPU.
TINY = Config(
    method="volumetric",
    data=DataConfig(height=32, width=32, foreground=False),
    model=ModelConfig(
        encoder="small", pyramid_channels=8, channels=4, voxels=8, volume_channels=(4, 4, 8), volume_stem=3,
        volume_blocks=1, edge_strides=(8, 4), edge_sigmas=(1.0, 1.5), decoder_channels=(8, 8), turn_volume=True,
    ),
    loss=LossConfig(network="none"),
)  # fmt: skip
TINY_ROWS = tuple(replace(row, pairs=min(2, row.pairs), voxels=(8, 8, 4)) for row in ROWS)


def torchs(norm: GroupNormAct, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What torch has for `GroupNormAct`."""
    y = torch.nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    y = y if residual is None else y + residual
    return y.relu() if norm.activation == "relu" else y


@contextmanager
def norms(row: Row) -> Iterator[None]:
    """Inside the block the networks' norms are those of the row."""
    with mock.patch.object(GroupNormAct, "forward", torchs if row.torchs_norms else GroupNormAct.forward):
        yield


def cameras(height: int, width: int) -> Tensor:
    """Projections (1, M, 3, 4) of cameras around a unit cube at the origin, which look at it."""
    rows = []
    for turn in torch.arange(VIEWS) * 2 * torch.pi / VIEWS:
        center = torch.stack([3 * turn.cos(), 3 * turn.sin(), torch.tensor(1.0)])
        forward = -center / center.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]))
        right = right / right.norm()
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        lens = torch.tensor([[2.0 * width, 0, width / 2], [0, 2.0 * height, height / 2], [0, 0, 1]])
        rows.append(lens @ torch.cat([rotation, (-rotation @ center)[:, None]], dim=1))
    return torch.stack(rows)[None]


def measure(row: Row, settings: Config, device: torch.device, deadline: float) -> dict[str, Any]:
    """Steps of one row until the deadline, 3 to warm up and at most 10 that count."""
    cuda = device.type == "cuda"
    data, half = settings.data, settings.train.precision == "bf16" and cuda
    torch.manual_seed(0)
    model = METHODS[settings.method].model(settings.model, outputs=3)
    assert isinstance(model, VolumetricModel)
    model.use_checkpointing(row.checkpointing)
    model.to(device).train()
    objective = Objective(settings.loss, 1.0).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.rand(row.pairs, 2, VIEWS, 3, data.height, data.width, device=device)
    projections = cameras(data.height, data.width).to(device)
    still, generator = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, row.voxels[0]), torch.Generator().manual_seed(0)
    still = VoxelGrid(still.affine, row.voxels)

    def step() -> None:
        grid = model.training_grid(still, (0, 0, 1), 2 * row.pairs, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = model(images, projections, grid)
        target = model.target(images, settings.loss)
        optimizer.zero_grad()
        objective(found, target, model.skeleton, 0.0)["loss"].backward()
        optimizer.step()

    seconds, host = [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for index in range(13):
        started = time.perf_counter()
        step()
        queued = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        if index >= 3:
            seconds.append(time.perf_counter() - started)
            host.append(queued - started)
        if len(seconds) >= 2 and time.monotonic() > deadline:
            break
    return {
        "status": "measured",
        "seconds": f"{statistics.median(seconds):.5f}",
        "host_seconds": f"{statistics.median(host):.5f}",
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else "",
        "steps": len(seconds),
    }


def table(rows: tuple[Row, ...], settings: Config, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Every row, as it is done."""
    ends = time.monotonic() + seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    torch.backends.cudnn.benchmark = True
    for index, row in enumerate(rows):
        now = time.monotonic()
        found: dict[str, Any] = {"status": "not run: no time left"}
        if now < ends:
            try:
                with norms(row):
                    found = measure(row, settings, device, now + (ends - now) / (len(rows) - index))
            except torch.OutOfMemoryError:
                found = {"status": "out of memory"}
            if device.type == "cuda":
                torch.cuda.empty_cache()
        shape = "x".join(map(str, row.voxels))
        yield {"row": row.name, "pairs": row.pairs, "voxels": shape, "device": name, "torch": torch.__version__} | found


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks and volumes that try this file itself")
    parser.add_argument("--seconds", type=float, default=140, help="for all rows")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    arguments = parser.parse_args()
    settings, rows = (TINY, TINY_ROWS) if arguments.tiny else (PAPER, ROWS)
    found = []
    for row in table(rows, settings, torch.device(arguments.device), arguments.seconds):
        found.append(row)
        write_csv(arguments.out, COLUMNS, found)
        peak = f"{row['peak_bytes'] / 1e9:7.2f} GB" if row.get("peak_bytes") else ""
        print(f"{row['row']:>26}  {row['status']:<12} {row.get('seconds', ''):>9} s {peak}", flush=True)


if __name__ == "__main__":
    main()
