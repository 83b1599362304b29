"""The rounds: which competitor runs when, within the time given, and the rows that come of it."""

from __future__ import annotations

import csv
import gc
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .measure import Contestant, Probe, Skipped, Truth, repeats
from .problems import MODES, Case, Problem, competitors, needed_bytes, operation
from .workers import Worker

RESULT_COLUMNS = (
    "op", "workload", "shape", "sweep", "variant", "dtype", "device", "threads", "mode", "competitor", "status",
    "reason", "median_s", "q1_s", "q3_s", "rounds", "repeats", "peak_bytes", "needed_bytes", "compile_s",
    "do_bench_s", "error_output", "error_gradient", "error_gradients", "floor_s", "floor_fresh_s", "floor_bytes",
    "floor_operations", "ratio_to_floor", "ratio_to_reference",
)  # fmt: skip
RAW_COLUMNS = (
    "op", "workload", "variant", "dtype", "device", "threads", "competitor", "mode", "round", "repeats", "seconds",
)  # fmt: skip

MIN_ROUNDS = 3
WARM_UP_SECONDS = 2.0  # a longer call needs no warm-up round
DO_BENCH_SECONDS = 0.05  # a longer call is not measured by the second clock too
# Shares of the time that is left, for a competitor on one workload and for the float64 reference; and the share of all
# time that may go into compilation.
COMPETITOR_SHARE, TRUTH_SHARE, COMPILE_SHARE = 1 / 3, 1 / 10, 1 / 3


@dataclass
class Settings:
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    rounds: int = 15
    budget: float = 720.0
    memory_limit: int = 8 * 10**9
    ops: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    competitors: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    sweeps: bool = True
    quick: bool = False


def cases(settings: Settings) -> list[Case]:
    """What is to be measured, the most important first: when time runs short, the last are skipped.

    The first workload of each operation comes first, then the second of each, and so on; then that first workload in
    the other variants; then the sweeps.
    """
    found: list[tuple[tuple[int, int], Case]] = []
    for op in settings.ops:
        module = operation(op)
        for index, workload in enumerate(module.WORKLOADS):
            if settings.workloads and workload.name not in settings.workloads:
                continue
            if workload.sweep and not settings.sweeps and not settings.workloads:
                continue
            if workload.gpu and settings.device == "cpu" and not settings.workloads:
                continue
            for position, variant in enumerate(module.VARIANTS):
                # Further variants are measured on the first workload, or where they are asked for.
                if variant in settings.variants or (not settings.variants and (position == 0 or index == 0)):
                    case = Case(op, workload, variant, settings.dtype, settings.device)
                    found.append(((2 if workload.sweep else 1 if position else 0, index), case))
    found.sort(key=lambda entry: entry[0])
    listed = [case for _, case in found]
    if settings.quick:
        smallest = {}
        for case in listed:
            best = smallest.setdefault(case.op, case)
            if case.floor("both").operations < best.floor("both").operations:
                smallest[case.op] = case
        listed = list(smallest.values())
    return listed


class Table:
    """A CSV file that is on disk after every row."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
        self.writer.writeheader()

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.writer.writerows(rows)
        self.file.flush()


@dataclass
class Entry:
    """A competitor that takes part in a case, and what is known of it."""

    name: str
    contestant: Contestant | Worker
    probe: Probe
    repeats: int = 1
    rounds: int = MIN_ROUNDS
    times: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    errors: dict[str, Any] = field(default_factory=dict)
    do_bench: float | None = None

    @property
    def seconds(self) -> float:
        """One call of every mode; the training step serves two of them."""
        return self.probe.seconds["forward"] + self.probe.seconds["both"]


class Suite:
    """Measures cases one after the other and writes rows as they come.

    Args:
        settings: What to measure.
        rates: The machine's speeds, for the floors (`machine.rates`).
        out: Folder for results.csv and raw.csv.
        started: `time.monotonic()` when the budget began.
    """

    def __init__(self, settings: Settings, rates: dict[str, float], out: Path, started: float) -> None:
        self.settings, self.rates, self.started = settings, rates, started
        self.results, self.raw = Table(out / "results.csv", RESULT_COLUMNS), Table(out / "raw.csv", RAW_COLUMNS)
        self.compiling = 0.0
        self.pace: dict[tuple[str, str], float] = {}  # seconds in units of the floor, the last time
        self.failed = 0

    def left(self) -> float:
        return self.settings.budget - (time.monotonic() - self.started)

    def run(self, listed: list[Case]) -> None:
        for index, case in enumerate(listed):
            print(f"[{index + 1}/{len(listed)}] {case.label}: {case.workload.shape}", flush=True)
            self._run(case, self.left() / (len(listed) - index))

    def _run(self, case: Case, share: float) -> None:
        case_started = time.monotonic()
        found = competitors(case.op, case.device, case.dtype, case.variant)
        problem = case.make() if case.device == "cuda" else None  # shared; on the CPU each process makes its own
        entries: list[Entry] = []
        skipped: list[tuple[str, str, str, int | None]] = []
        try:
            for name, reason in found.items():
                # A backend that cannot run here is named once, in machine.json, unless it was asked for.
                if name not in (self.settings.competitors or [n for n, why in found.items() if why is None]):
                    continue
                needed = needed_bytes(case, name)
                try:
                    if case.dtype not in case.module.DTYPES:
                        raise Skipped(f"this operation does not take {case.dtype}")
                    if reason is not None:
                        raise Skipped(reason)
                    entries.append(self._enter(case, name, needed, problem))
                except Skipped as why:
                    skipped.append((name, "skipped", str(why), needed))
                except Exception as error:  # noqa: BLE001  one competitor's failure is a row, and the others go on
                    skipped.append((name, "failed", _line(error), needed))
            skipped += self._measure(case, entries, problem, share + case_started)
        finally:
            for entry in entries:
                entry.contestant.close()
            if case.device == "cuda":
                torch.cuda.empty_cache()
        rows = self._rows(case, entries)
        for name, status, reason, needed in skipped:
            print(f"    {name}: {status}, {reason}", flush=True)
            self.failed += status == "failed"
            rows += [
                self._row(case, mode, name) | {"status": status, "reason": reason, "needed_bytes": needed}
                for mode in MODES
            ]
        self.results.write(rows)

    def _enter(self, case: Case, name: str, needed: int | None, problem: Problem | None) -> Entry:
        """Start a competitor and probe it, unless memory or time do not allow it."""
        settings, limit = self.settings, self.settings.memory_limit
        if needed is not None and needed > limit:
            raise Skipped(f"needs at least {needed / 1e9:.1f} GB, the limit is {limit / 1e9:.1f} GB")
        if name == "compile":
            if (case.workload.sweep or case.variant != case.module.VARIANTS[0]) and not settings.competitors:
                raise Skipped("sweeps and further variants are compiled only where --competitor names compile")
            if self.compiling > COMPILE_SHARE * settings.budget:
                raise Skipped("budget: the share of time for compilation is used up")
        allowed = COMPETITOR_SHARE * self.left()
        expected = self.pace.get((case.op, name), 0.0) * case.floor("both").seconds(self.rates)
        if expected * (1 + MIN_ROUNDS) > allowed:
            raise Skipped(
                f"budget: it would take {expected * (1 + MIN_ROUNDS):.0f} s of {max(0, self.left()):.0f} s left"
            )
        started = time.monotonic()
        if case.device == "cuda":
            contestant: Contestant | Worker = Contestant(case, name, problem)
            try:
                probe = contestant.probe(limit)
            except torch.OutOfMemoryError:
                probe = None  # outside of the handler, where nothing holds the frames and their tensors any more
            if probe is None:
                contestant.close()
                gc.collect()
                torch.cuda.empty_cache()
                raise Skipped("out of GPU memory")
        else:
            contestant = Worker(case, name, settings.threads)
            try:
                probe = contestant.probe(limit, max(2 * allowed, 30.0))
            except BaseException:
                contestant.close()
                raise
        if name == "compile":
            self.compiling += time.monotonic() - started
        entry = Entry(name, contestant, probe)
        if entry.seconds < WARM_UP_SECONDS:
            entry.probe.seconds |= contestant.round()
        self.pace[case.op, name] = entry.seconds / case.floor("both").seconds(self.rates)
        if entry.seconds * MIN_ROUNDS > max(0.0, COMPETITOR_SHARE * self.left()):
            contestant.close()
            raise Skipped(f"budget: {MIN_ROUNDS} rounds would take {entry.seconds * MIN_ROUNDS:.0f} s")
        return entry

    def _measure(
        self, case: Case, entries: list[Entry], problem: Problem | None, until: float
    ) -> list[tuple[str, str, str, int | None]]:
        """Interleaved rounds; returns the competitors that failed in them, which leave ``entries``."""
        failures: list[tuple[str, str, str, int | None]] = []
        truth = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                truth = self._truth(case, entries, problem, Path(folder))
            except (MemoryError, torch.OutOfMemoryError):
                print("    errors are not measured: no memory for the float64 reference", flush=True)
            spare = max(0.0, until - time.monotonic()) / max(1, len(entries))
            for entry in entries:
                # A GPU's events are exact for short calls too; repeats only steady the median there.
                entry.repeats = repeats(max(entry.probe.seconds["forward"], 1e-3 if case.device == "cuda" else 0.0))
                affordable = int(spare / max(entry.seconds * entry.repeats, 1e-9))
                entry.rounds = max(MIN_ROUNDS, min(self.settings.rounds, affordable))
            rounds = max((entry.rounds for entry in entries), default=0)
            for number in range(rounds):
                start = number % len(entries) if entries else 0
                for entry in entries[start:] + entries[:start]:
                    # A slow competitor's few rounds are spread evenly over all of them.
                    if (number + 1) * entry.rounds // rounds == number * entry.rounds // rounds:
                        continue
                    try:
                        self._round(case, entry, number)
                        if truth is not None and not entry.errors:
                            entry.errors = entry.contestant.errors(truth)  # type: ignore[arg-type]
                    except Exception as error:  # noqa: BLE001
                        failures.append((entry.name, "failed", _line(error), None))
                        entry.contestant.close()
                        entries.remove(entry)
            for entry in entries:
                if isinstance(entry.contestant, Contestant) and entry.seconds < DO_BENCH_SECONDS:
                    try:
                        entry.do_bench = entry.contestant.do_bench()
                    except Exception as error:  # noqa: BLE001  the column stays empty
                        print(f"    {entry.name}: do_bench failed, {_line(error)}", flush=True)
        return failures

    def _truth(self, case: Case, entries: list[Entry], problem: Problem | None, folder: Path) -> Truth | Path | None:
        """The float64 reference, where time allows it."""
        known = [entry.seconds for entry in entries if entry.name == "reference"]
        known.append(self.pace.get((case.op, "reference"), 0.0) * case.floor("both").seconds(self.rates))
        expected = 3 * known[0]
        if not entries or (case.workload.sweep and not self.settings.quick and not self.settings.workloads):
            return None
        if expected > TRUTH_SHARE * self.left():
            print(f"    errors are not measured: the float64 reference would take about {expected:.0f} s", flush=True)
            return None
        truth = Truth.of(case, problem)
        return truth if case.device == "cuda" else truth.save(folder / "truth.pt")

    def _round(self, case: Case, entry: Entry, number: int) -> None:
        times = entry.contestant.round(entry.repeats)
        for mode, seconds in times.items():
            entry.times[mode].append(seconds)
        identity = {key: value for key, value in self._identity(case, entry.name).items() if key in RAW_COLUMNS}
        self.raw.write(
            identity | {"mode": mode, "round": number, "repeats": entry.repeats, "seconds": f"{seconds:.6g}"}
            for mode, seconds in times.items()
        )

    def _identity(self, case: Case, competitor: str) -> dict[str, Any]:
        return {
            "op": case.op,
            "workload": case.workload.name,
            "shape": case.workload.shape,
            "sweep": int(case.workload.sweep),
            "variant": case.variant,
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": case.device,
            "threads": self.settings.threads,
            "competitor": competitor,
        }

    def _row(self, case: Case, mode: str, competitor: str) -> dict[str, Any]:
        floor = case.floor(mode)
        return self._identity(case, competitor) | {
            "mode": mode,
            "floor_s": f"{floor.seconds(self.rates):.4g}",
            "floor_fresh_s": f"{floor.fresh_seconds(self.rates):.4g}",
            "floor_bytes": floor.read + floor.written,
            "floor_operations": floor.operations,
        }

    def _rows(self, case: Case, entries: list[Entry]) -> list[dict[str, Any]]:
        rows = []
        reference = next((entry for entry in entries if entry.name == "reference"), None)
        for entry in entries:
            for mode in MODES:
                q1, median, q3 = quartiles(entry.times[mode])
                row = self._row(case, mode, entry.name) | {
                    "status": "measured",
                    "median_s": f"{median:.5g}",
                    "q1_s": f"{q1:.5g}",
                    "q3_s": f"{q3:.5g}",
                    "rounds": len(entry.times[mode]),
                    "repeats": entry.repeats,
                    "peak_bytes": entry.probe.peak[mode],
                    "ratio_to_floor": f"{median / case.floor(mode).seconds(self.rates):.4g}",
                }
                if mode == "forward" and entry.do_bench is not None:
                    row["do_bench_s"] = f"{entry.do_bench:.5g}"
                if mode in entry.probe.compilation:
                    row["compile_s"] = f"{entry.probe.compilation[mode]:.3g}"
                if reference is not None:
                    row["ratio_to_reference"] = f"{median / quartiles(reference.times[mode])[1]:.4g}"
                for column, value in entry.errors.items():
                    if mode == "both" or (mode == "forward") == (column == "error_output"):
                        row[column] = value if isinstance(value, str) else f"{value:.3g}"
                rows.append(row)
            _, median, _ = quartiles(entry.times["both"])
            print(f"    {entry.name}: {1e3 * median:.3g} ms, {len(entry.times['both'])} rounds", flush=True)
        return rows


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third


def with_defaults(settings: Settings) -> Settings:
    """Quick runs: few rounds, no compiler unless it is named."""
    if not settings.quick:
        return settings
    found = [competitors(op, settings.device, settings.dtype) for op in settings.ops]
    usual = dict.fromkeys(name for each in found for name, why in each.items() if why is None and name != "compile")
    named = settings.competitors or tuple(usual)
    return replace(settings, rounds=min(settings.rounds, 5), budget=min(settings.budget, 50.0), competitors=named)
