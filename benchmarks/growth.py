"""How does a training step grow?  python -m benchmarks.growth --help

One factor at a time is varied about the subject's own settings: pairs of a step, keypoints, views, voxels along a side,
and processes that share the machine. All variants take their steps in turn (`benchmarks.step`). The exponent of a
factor is the slope of log seconds over log factor, by least squares: 1 is in proportion, 0 is no growth. A fixed cost
beside a growing one lowers it, so it holds between the sizes that were measured, whose rows are in the file.

    python -m benchmarks.growth --project rig/project.yaml --method volumetric --out FILE.csv
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.step import Variant
from benchmarks.tables import write_csv
from bkind3d.cameras import save_toml
from bkind3d.data import load_project

COLUMNS = ("method", "factor", "value", "seconds", "steps", "threads", "device", "commit", "settings")
SETTINGS = {"pairs": "train.batch", "keypoints": "model.keypoints", "voxels": "model.voxels"}


@dataclass
class Measured:
    """Steps of one value of one factor, which several processes may take at once."""

    factor: str
    value: int
    variants: list[Variant]


def with_views(project: Path, views: int, folder: Path) -> Path:
    """A copy of a project file, in another folder, whose recordings have their first cameras alone."""
    content = yaml.safe_load(project.read_text())
    cameras = load_project(project).cameras
    if views > len(cameras):
        raise SystemExit(f"--views {views}: {project} has {len(cameras)} cameras")
    names = cameras.names[:views]
    save_toml(cameras.select(names), folder / f"{views}-views.toml")
    content["calibration"] = f"{views}-views.toml"
    for recording in content["recordings"]:
        recording["videos"] = {name: str(project.parent / recording["videos"][name]) for name in names}
        for key in ("truth", "masks"):
            recording.pop(key, None)
    target = folder / f"{views}-views.yaml"
    target.write_text(yaml.safe_dump(content))
    return target


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log values."""
    x, y = [math.log(value) for value in values], [math.log(second) for second in seconds]
    middle = statistics.fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def variants(arguments: Namespace, folder: Path) -> list[Measured]:
    """All values of all factors, started."""

    def start(factor: str, value: int, settings: dict[str, object], processes: int = 1) -> Measured:
        project = with_views(arguments.project, value, folder) if factor == "views" else arguments.project
        text = f"{factor} {value}:{json.dumps({'method': arguments.method, **settings})}"
        options = Namespace(**vars(arguments) | {"project": project})
        return Measured(factor, value, [Variant(text, options) for _ in range(processes)])

    found = [
        start(factor, value, {SETTINGS[factor]: value}) for factor in SETTINGS for value in getattr(arguments, factor)
    ]
    found += [start("views", value, {}) for value in arguments.views]
    return found + [start("processes", value, {}, value) for value in arguments.processes]


def main() -> None:
    """Time, fit, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True, help="project file")
    parser.add_argument("--subject", default="animal", help="whose settings, as for `bkind3d demo`")
    parser.add_argument("--method", default="triangulation", help="as for `bkind3d train`")
    parser.add_argument("--pairs", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--keypoints", type=int, nargs="*", default=[8, 15, 30])
    parser.add_argument("--voxels", type=int, nargs="*", default=[12, 20, 32], help="of the volumetric method")
    parser.add_argument("--views", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="that take their own steps at once")
    parser.add_argument("--steps", type=int, default=8, help="of each variant that are timed")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, help="CSV file; printed only when left out")
    arguments = parser.parse_args()
    if arguments.method != "volumetric":
        arguments.voxels = []
    import torch

    arguments.device = torch.cuda.get_device_name() if torch.cuda.is_available() else os.uname().machine
    with tempfile.TemporaryDirectory() as folder:
        measured = variants(arguments, Path(folder))
        seconds: dict[int, list[float]] = {index: [] for index in range(len(measured))}
        for turn in range(2 + arguments.steps):
            for index, one in enumerate(measured):
                for variant in one.variants:
                    variant.send("step")
                slowest = max(variant.answer()["seconds"] for variant in one.variants)
                if turn >= 2:  # the first steps allocate
                    seconds[index].append(slowest)
    rows = [
        {
            "method": arguments.method, "factor": one.factor, "value": one.value,
            "seconds": f"{statistics.median(seconds[index]):.5f}", "steps": arguments.steps,
            "threads": arguments.threads, "device": arguments.device, "commit": one.variants[0].commit,
            "settings": one.variants[0].settings,
        }
        for index, one in enumerate(measured)
    ]  # fmt: skip
    if arguments.out:
        write_csv(arguments.out, COLUMNS, rows)
    for factor in dict.fromkeys(row["factor"] for row in rows):
        chosen = [row for row in rows if row["factor"] == factor]
        times = [float(row["seconds"]) for row in chosen]
        listed = ", ".join(f"{row['value']}: {1e3 * second:.0f}" for row, second in zip(chosen, times, strict=True))
        grows = f"  exponent {exponent([row['value'] for row in chosen], times):.2f}" if len(chosen) > 1 else ""
        print(f"{factor:>10}  ms  {listed}{grows}")


if __name__ == "__main__":
    main()
