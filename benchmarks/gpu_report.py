"""The short table at the end of gpu_check.sh: python -m benchmarks.gpu_report FOLDER

Says for each stage whether it passed, and for each operation, workload and competitor the median times of forward and
of a training step, their ratios, and how near the forward pass comes to a copy of the bytes that it has to move.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def stages(folder: Path) -> list[str]:
    return [f"{row['stage']:<22}{row['outcome']:<34}{row['seconds']:>5} s" for row in read(folder / "stages.csv")]


def counts(title: str, path: Path) -> list[str]:
    """How many rows passed, and those that did not."""
    rows = read(path)
    if not rows:
        return []
    text = ", ".join(
        f"{sum(row['status'] == status for row in rows)} {status}" for status in ("passed", "failed", "skipped")
    )
    identity = ("op", "backend", "options", "dtype", "quantity", "check")
    failed = [
        "  failed: "
        + ", ".join(row[key] for key in identity if row.get(key))
        + f": {row.get('reason') or row['error']}"
        for row in rows
        if row["status"] == "failed"
    ]
    return [f"{title}: {text}", *failed]


def volumes(path: Path) -> list[str]:
    rows = read(path)
    found = [
        f"{row['competitor']} {'≥ ' if row['status'] == 'lower bound' else ''}{row['side']}³"
        if row["status"] != "failed"
        else f"{row['competitor']} failed: {row['reason']}"
        for row in rows
    ]
    return [f"largest volume that trains ({rows[0]['dtype']}): {', '.join(found)}"] if rows else []


def training(path: Path) -> list[str]:
    """A line for each kind of step."""
    lines = []
    for row in read(path):
        peak = f", {int(row['peak_bytes']) / 1e9:.1f} GB" if row["peak_bytes"] else ""
        took = f"{1e3 * float(row['seconds']):.0f} ms, {1e3 * float(row['host_seconds']):.0f} of the host{peak}"
        lines.append(f"training step, {row['row']}: {took if row['status'] == 'measured' else row['status']}")
    return lines


def times(folder: Path) -> list[str]:
    """A line for each workload and competitor; sweeps are left out where an operation has anything else."""
    everything = read(folder / "results.csv")
    main = {row["op"] for row in everything if row["sweep"] == "0"}
    rows = [row for row in everything if row["sweep"] == "0" or row["op"] not in main]
    if not rows:
        return []
    copy = json.loads((folder / "machine.json").read_text())["rates"]["copy"]
    lines = [
        f"copy: {copy / 1e9:.0f} GB/s; ratios are of the times of both; floor: % of the forward time that a copy takes",
        f"{'operation':<22}{'workload':<28}{'competitor':<24}{'forward':>10}{'both':>10}"
        f"{'× reference':>12}{'× compile':>10}{'floor':>8}",
    ]
    found = {(row["op"], row["workload"], row["variant"], row["competitor"], row["mode"]): row for row in rows}
    for (op, workload, variant, competitor, mode), both in found.items():
        if mode != "both":
            continue
        start = f"{op:<22}{workload + ', ' + variant:<28.27}{competitor:<24}"
        if both["status"] != "measured":
            lines.append(f"{start}  {both['status']}: {both['reason'][:60]}")
            continue
        forward = found[op, workload, variant, competitor, "forward"]
        seconds = float(both["median_s"])
        compiled = found.get((op, workload, variant, "compile", "both"), {}).get("median_s")
        reached = 100 * int(forward["floor_bytes"]) / copy / float(forward["median_s"])
        lines.append(
            f"{start}{1e3 * float(forward['median_s']):>7.3g} ms{1e3 * seconds:>7.3g} ms"
            f"{both['ratio_to_reference']:>12}{f'{seconds / float(compiled):.3g}' if compiled else '':>10}"
            f"{reached:>7.2g}%"
        )
    return lines


def report(folder: Path) -> str:
    """All of it, a part where there is one."""
    found = [
        stages(folder),
        counts("numerics", folder / "numerics.csv"),
        counts("device checks", folder / "checks.csv"),
        training(folder / "training.csv"),
        volumes(folder / "largest_volume.csv"),
        times(folder / "times"),
    ]
    return "\n".join(line for part in found for line in part)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
