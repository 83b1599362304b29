"""How well does the demo learn, seed by seed?  python -m benchmarks.demo_seeds --help

Runs `bkind3d demo` for several seeds (each simulates its own rig, motion and network) and writes one row per seed and
predictor: error on unseen motion, the ratio to the mean pose's and to the untrained network's, whether its keypoints
are parts of the body, what can be said without labels, steps, and the machine. A seed whose run folder holds an
evaluation already is not run again.
"""

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bkind3d.evaluation.parts import DISTANCES, SHARES

from .machine import cpu_name
from .tables import write_csv

PARTS = (*DISTANCES, *SHARES)
LABEL_FREE = ("on_body", "identity", "rigidity", "overlap")
COLUMNS = (
    "seed", "predictor", "mpjpe_absolute", "mpjpe", "pmpjpe", "mpjpe_to_mean_pose", "mpjpe_to_untrained", "units",
    *PARTS, "neighbours", "neighbours_chance", *LABEL_FREE, "dead", "off_body",
    "steps", "training_seconds", "threads", "cpu", "torch", "commit", "date",
)  # fmt: skip
OFF_BODY = 0.1  # body sizes from the nearest bone, on average, beyond which a keypoint is off the body


def run_seed(seed: int, out: Path, threads: int, subject: str) -> Path:
    """Run the demo with one seed, unless that was done."""
    run = out / f"seed{seed}"
    if not (run / "evaluation.json").exists():
        started = time.perf_counter()
        command = [Path(sys.executable).with_name("bkind3d"), "demo", "--subject", subject]
        command += ["--out", run, "--seed", str(seed), "--force"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        (out / f"seed{seed}.commit").write_text(git.stdout.strip())
        with (out / f"seed{seed}.log").open("w") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
        print(f"seed {seed}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    return run


def parts_of(evaluation: dict[str, Any], health: dict[str, Any], name: str) -> dict[str, object]:
    """What is known of a predictor's keypoints as parts of the body; empty where nothing is."""
    found = next((row for row in evaluation["parts"]["rows"] if row["name"] == name), None)
    if found is None:
        return {}
    columns: dict[str, object] = {key: f"{found[key]:.4f}" for key in PARTS}
    if name != evaluation["rows"][0]["name"]:
        return columns
    near = evaluation["parts"]["edges"]["agreement"][0]
    columns |= {"neighbours": f"{near['share']:.4f}", "neighbours_chance": f"{near['all_pairs']:.4f}"}
    columns |= {key: f"{evaluation['label_free'][key]:.4f}" for key in LABEL_FREE if "label_free" in evaluation}
    columns["dead"] = sum("dead" in flags for flags in health["flags"])
    columns["off_body"] = sum(value > OFF_BODY for value in found["per_keypoint"]["nearest_bone"])
    return columns


def rows(run: Path) -> list[dict[str, object]]:
    """One row for each predictor of a run's evaluation."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    health = json.loads((run / "health.jsonl").read_text().splitlines()[-1])
    errors = {row["name"]: row["mpjpe"] for row in evaluation["rows"]}
    return [
        {
            "seed": evaluation["seed"],
            "predictor": row["name"],
            **{name: f"{row[name]:.4f}" for name in ("mpjpe_absolute", "mpjpe", "pmpjpe")},
            "mpjpe_to_mean_pose": f"{row['mpjpe'] / errors['mean pose']:.3f}",
            "mpjpe_to_untrained": f"{row['mpjpe'] / errors['untrained network']:.3f}",
            "units": evaluation["units"],
            **parts_of(evaluation, health, row["name"]),
            "steps": evaluation["step"],
            "training_seconds": f"{float(last['seconds']):.0f}",
            "threads": environment["cpu_threads"],
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "commit": run.with_suffix(".commit").read_text(),
            "date": datetime.date.today().isoformat(),
        }
        for row in evaluation["rows"]
    ]


def main() -> None:
    """Run, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--subject", default="animal", help="as for `bkind3d demo`")
    parser.add_argument("--threads", type=int, help="of each run; the cores shared by the runs when left out")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "demo_seeds.csv")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.parallel)
    with ThreadPoolExecutor(arguments.parallel) as pool:
        runs = list(pool.map(lambda seed: run_seed(seed, arguments.out, threads, arguments.subject), arguments.seeds))
    table = [row for run in runs for row in rows(run)]
    write_csv(arguments.results, COLUMNS, table)
    for row in table:
        print(*(f"{row[name]!s:>18}" for name in COLUMNS[:7]))


if __name__ == "__main__":
    main()
