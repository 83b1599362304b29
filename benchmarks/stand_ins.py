"""Do the numbers without labels follow those with them?  python -m benchmarks.stand_ins RUN ... --out FILE

Collects the parts and the numbers without labels of finished runs (`evaluation.json`), a row for each, and prints
Spearman's rank correlation of every pair over the runs that have both.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr

from bkind3d.evaluation.parts import DISTANCES, SHARES

PARTS = (*DISTANCES, *SHARES)
STAND_INS = ("on_body", "identity", "rigidity", "overlap")


def row(run: Path) -> dict[str, Any]:
    """What a run's evaluation says with labels and without."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    if "label_free" not in evaluation:
        raise SystemExit(f"{run}: expected a run that knows the foreground; this one has no numbers without labels")
    config = yaml.safe_load((run / "config.yaml").read_text())  # of any version
    first, mean_pose = evaluation["rows"][0], next(row for row in evaluation["rows"] if row["name"] == "mean pose")
    parts = evaluation["parts"]["rows"][0]
    return {
        "run": f"{run.parent.name}/{run.name}",
        "project": Path(config["project"]).parent.name,
        "method": config["method"],
        "steps": evaluation["step"],
        "seed": evaluation["seed"],
        **{name: parts[name] for name in PARTS},
        "mpjpe_to_mean_pose": first["mpjpe"] / mean_pose["mpjpe"],
        **{name: evaluation["label_free"][name] for name in STAND_INS},
    }


def main() -> None:
    """Collect, write, correlate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with an evaluation that knew the foreground")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    arguments = parser.parse_args()
    rows = [row(run) for run in arguments.runs]
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in one.items()} for one in rows)
    print(f"{'':>20}", *(f"{name:>12}" for name in STAND_INS), f"   Spearman over {len(rows)} runs")
    for part in (*PARTS, "mpjpe_to_mean_pose"):
        values = [
            spearmanr([one[part] for one in rows], np.array([one[name] for one in rows], float), nan_policy="omit")[0]
            for name in STAND_INS
        ]
        print(f"{part:>20}", *(f"{value:12.2f}" for value in values))


if __name__ == "__main__":
    main()
