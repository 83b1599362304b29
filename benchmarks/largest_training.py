"""Which volumes train in how much memory?  python -m benchmarks.largest_training --out FILE.csv --steps FILE.csv

The paper's networks (ResNet-50, 256 × 256 pixels, four views, VGG-19 in the loss), the volumetric method with a turned
cube of B voxels a side, bf16: the largest B, a multiple of 16, of which one training step is foretold to stay within
each budget (`bkind3d.memory`); and what a step of several pairs takes with the paper's 64 × 64 × 33 voxels. Nothing is
computed, and no GPU is needed; what the driver and cuDNN take for themselves comes on top.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import Any

from bkind3d.config import Config
from bkind3d.memory import training_memory

from .tables import write_csv

BUDGETS = (8, 12, 24, 80, 141)  # GB
BATCHES = (1, 4)
STAGES = ("none", "volume", "all")
SIDES = range(16, 513, 16)
VIEWS = 4
COLUMNS = ("batch", "checkpointing", "budget_gb", "voxels", "bytes")
PAIRS = (4, 16, 64)
PAPER = (64, 64, 33)
STEP_COLUMNS = ("batch", "checkpointing", "bytes")


def settings(batch: int, checkpointing: str, voxels: int) -> Config:
    """Of one training."""
    config = Config(method="volumetric")
    config.data.foreground, config.model.turn_volume = False, True
    config.train.precision, config.train.batch, config.model.voxels = "bf16", batch, voxels
    config.train.checkpointing = checkpointing  # type: ignore[assignment]
    return config


@cache
def foretold(batch: int, checkpointing: str, voxels: int) -> int:
    """Bytes of one step."""
    return training_memory(settings(batch, checkpointing, voxels), VIEWS, (voxels,) * 3)


def largest(batch: int, checkpointing: str, budget: float) -> int:
    """Side of the largest cube that stays within a budget, bytes; 0 if none does."""
    fits = bisect_right(SIDES, budget, key=lambda side: foretold(batch, checkpointing, side))
    return SIDES[fits - 1] if fits else 0


def main() -> None:
    """Foretell, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file; printed only when left out")
    parser.add_argument("--steps", type=Path, help="CSV file for steps of several pairs")
    arguments = parser.parse_args()
    steps = [
        (batch, stage, training_memory(settings(batch, stage, max(PAPER)), VIEWS, PAPER))
        for batch in PAIRS
        for stage in STAGES
    ]
    for batch, stage, count in steps:
        print(f"{batch:2d} pairs, checkpointing {stage:>6}: {count / 1e9:.1f} GB", flush=True)
    if arguments.steps:
        write_csv(arguments.steps, STEP_COLUMNS, [dict(zip(STEP_COLUMNS, step, strict=True)) for step in steps])
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        for stage in STAGES:
            for budget in BUDGETS:
                side = largest(batch, stage, 1e9 * budget)
                count = foretold(batch, stage, side) if side else 0
                rows.append(dict(zip(COLUMNS, (batch, stage, budget, side, count), strict=True)))
                print(
                    f"batch {batch}, checkpointing {stage:>6}, {budget:3d} GB: {side:3d}³ ({count / 1e9:.1f} GB)",
                    flush=True,
                )
    if arguments.out:
        write_csv(arguments.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
