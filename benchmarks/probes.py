"""What limits the error of a run, its keypoints or the regression?  python -m benchmarks.probes RUN ... --out FILE

For each run folder the joints are regressed from the keypoints by several regressors: the paper's linear map, the same
with a penalty chosen inside the training frames, and two layers; and the linear map is scored on the very frames that
it was fitted on. MPJPE with the mean shift removed, in the units of the project. With --project the frames are those of
other videos, such as longer ones of the same animal, which say what more frames to regress from would change.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bkind3d.evaluation.evaluate import fit_and_test, found_by, joints_of, load_annotated
from bkind3d.evaluation.probe import MEAN_POSE, compare
from bkind3d.evaluation.regressors import ProbeOptions
from bkind3d.run import available_device, load_model, open_inputs, open_run

REGRESSORS = {"linear": ProbeOptions(), "ridge": ProbeOptions(ridge="auto"), "mlp": ProbeOptions("mlp")}


def row(run: Path, every: int, project: Path | None = None) -> dict[str, Any]:
    """The errors of one run, on the videos that it was trained on or on those of another project."""
    config = open_run(run)
    if project is not None:
        config = replace(config, project=project, cache=None)
    inputs = open_inputs(config, progress=False)
    model, step = load_model(run, config)
    annotated = fit_and_test(load_annotated(inputs))
    model.to(available_device())
    keypoints = [found_by(model, inputs, part, every=every, batch=16, progress=False) for part in annotated]
    joints = [joints_of(part, every) for part in annotated]

    def errors(scored: int, options: ProbeOptions) -> dict[str, float]:
        predictions = {"run": (keypoints[0], keypoints[scored])}
        found = compare(predictions, joints[0], joints[scored], options, units=inputs.project.units)
        return {each["name"]: each["mpjpe"] for each in found["rows"]}

    found = {name: errors(1, options) for name, options in REGRESSORS.items()}
    return {
        "run": run.name,
        "method": config.method,
        "voxels": config.model.voxels,
        "separation": config.loss.separation,
        "bottleneck": config.model.bottleneck,
        "length": config.loss.length,
        "step": step,
        "seed": config.train.seed,
        "fit_frames": len(joints[0]),
        "test_frames": len(joints[1]),
        "linear_on_fit_frames": f"{errors(0, REGRESSORS['linear'])['run']:.5f}",
        **{name: f"{each['run']:.5f}" for name, each in found.items()},
        "mean_pose": f"{found['linear'][MEAN_POSE]:.5f}",
        "units": inputs.project.units,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of `bkind3d train` or `bkind3d paper`")
    parser.add_argument("--every", type=int, default=6, help="distance of the frames used; default 6")
    parser.add_argument("--project", type=Path, help="project file of other videos; default: the runs' own")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with options.out.open("w", newline="") as file:
        writer = None
        for run in options.runs:
            found = row(run, options.every, options.project)
            if writer is None:
                writer = csv.DictWriter(file, list(found), lineterminator="\n")
                writer.writeheader()
            writer.writerow(found)
            file.flush()
            print(*found.values(), flush=True)


if __name__ == "__main__":
    main()
