"""The tables of a results folder as Markdown, from its CSV and machine.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]

HEADER = (
    "workload", "competitor", "forward, ms", "backward, ms", "both, ms", "× reference", "× floor", "peak, MB",
    "compile, s", "error of output", "error of gradient",
)  # fmt: skip


def read(folder: Path) -> list[Row]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def name(row: Row, rows: Iterable[Row]) -> str:
    """The workload, with its variant where that is not the first one of the operation."""
    first = next(other["variant"] for other in rows if other["op"] == row["op"])
    return row["workload"] if row["variant"] == first else f"{row['workload']}, {row['variant']}"


def milliseconds(row: Row) -> str:
    low, middle, high = (1e3 * float(row[column]) for column in ("q1_s", "median_s", "q3_s"))
    return f"{middle:.4g} ({low:.3g} to {high:.3g})"


def lines(rows: list[Row]) -> list[str]:
    """One line for each workload and competitor of one operation."""
    modes: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        modes.setdefault((name(row, rows), row["competitor"]), {})[row["mode"]] = row
    table = []
    for (workload, competitor), found in modes.items():
        both = found["both"]
        if both["status"] != "measured":
            table.append((workload, competitor, f"{both['status']}: {both['reason']}", *[""] * (len(HEADER) - 3)))
            continue
        compilation = sum(float(row["compile_s"] or 0) for row in found.values())
        cells = [milliseconds(found[mode]) for mode in ("forward", "backward", "both")]
        cells += [both["ratio_to_reference"], both["ratio_to_floor"], f"{int(both['peak_bytes']) / 1e6:.4g}"]
        cells += [f"{compilation:.0f}" if compilation else "", both["error_output"], both["error_gradient"]]
        table.append((workload, competitor, *cells))
    return ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *table)]


def machine_lines(folder: Path) -> list[str]:
    if not (folder / "machine.json").exists():
        return []
    machine = json.loads((folder / "machine.json").read_text())
    rates, packages = machine["rates"], machine["packages"]
    commit = (machine["commit"] or "unknown")[:10] + (" with uncommitted changes" if machine["dirty"] else "")
    text = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory'] / 2**30:.0f} GiB; torch {packages['torch']}, Python {machine['python']}; "
        f"commit {commit}; {machine['date'][:10]}.",
        "",
        f"Measured speeds: copy {rates['copy'] / 1e9:.1f} GB/s (bytes read and written), "
        f"read {rates['read'] / 1e9:.1f}, fill {rates['fill'] / 1e9:.1f}, "
        f"fill of newly allocated memory {rates['fill_fresh'] / 1e9:.1f} GB/s; "
        f"float32 matrix product in cache {rates['flops'] / 1e9:.0f} GFLOP/s.",
        "",
    ]
    absent = sorted({f"{name} ({why})" for found in machine["unavailable"].values() for name, why in found.items()})
    return text + ([f"Not available here: {'; '.join(absent)}.", ""] if absent else [])


def write(folder: Path) -> None:
    """Write summary.md."""
    rows = read(folder)
    text = ["# Benchmark", "", *machine_lines(folder)]
    text += [
        'Times are medians over interleaved rounds (quartiles in brackets); "both" is the forward and backward of a '
        "training step. × reference and × floor are the ratios of that time to the reference's and to the floor. Peak "
        "is the memory above the inputs in such a step. Errors are the largest, against the float64 reference, in "
        "units of its largest magnitude.",
        "",
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        shapes = {row["workload"]: row["shape"] for row in own if row["sweep"] == "0"}
        sweep = [row for row in own if row["sweep"] == "1"]
        text += [f"## {op}", ""]
        text += [f"- {workload}: {shape}" for workload, shape in shapes.items()]
        main = [row for row in own if row["sweep"] == "0"]
        text += ["", *lines(main), ""] if main else []
        text += ["### Scaling sweeps", "", *lines(sweep), ""] if sweep else []
    (folder / "summary.md").write_text("\n".join(text))
