"""A command's parts in processes of their own, several at once: a crash, a hang or a lost GPU costs one part's rows."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Part:
    """Arguments with which the command does this part alone, and the row that stands for it if it comes to nothing."""

    arguments: tuple[str, ...]
    identity: dict[str, str]


def default_jobs(device: str) -> int:
    """On a GPU most of the cores, since compilation takes most of the time; on the CPU no further process at all."""
    return min(12, max(1, 3 * (os.cpu_count() or 2) // 4)) if device == "cuda" else 1


def rows(module: str, parts: Sequence[Part], jobs: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the CSV files that ``python -m module`` writes to ``--out``, part by part as they end.

    A part that ends otherwise than with status 0, or 1 and a failed row, or that is not done when ``seconds`` have
    passed since the call, gives the rows that it wrote and a failed one with its last words.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        files = [Path(folder) / f"{number}.csv" for number in range(len(parts))]
        running = [pool.submit(_run, module, part, file, jobs, deadline) for part, file in zip(parts, files)]
        for future in as_completed(running):
            yield from future.result()


def collect(source: Iterable[dict[str, Any]], out: Path | None, columns: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, each written to the CSV file ``out`` as it comes."""
    found = []
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with Path(out or os.devnull).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in source:
            writer.writerow(row)
            file.flush()
            found.append(row)
    return found


def leave(status: int) -> NoReturn:
    """End this process at once: now and then torch's threads abort an interpreter that takes its leave in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(module: str, part: Part, file: Path, jobs: int, deadline: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", module, *part.arguments, "--out", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    left = max(0.0, deadline - time.monotonic())
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left, check=False)
        status, words = ended.returncode, (ended.stderr or ended.stdout).strip().splitlines()
    except subprocess.TimeoutExpired:
        status, words = -1, ["no time was left"]
    found: list[dict[str, Any]] = []
    if file.exists():
        with file.open() as lines:
            found = list(csv.DictReader(lines))
    failed = any(row["status"] == "failed" for row in found)
    if status not in (0, 1) or failed != (status == 1):
        reason = f"its process ended with status {status}: {words[-1] if words else 'no word'}"
        found.append(part.identity | {"status": "failed", "reason": reason[:300]})
    return found
