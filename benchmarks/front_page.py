"""The table and the chart of the README, from committed results: python -m benchmarks.front_page

Writes the table between the two marks in README.md and draws docs/images/operations.svg. Nothing is measured: a number
that no file holds is a dash in the table and missing in the chart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import ROOT
from .problems import known_peers
from .summary import read

RESULTS = Path(__file__).parent / "results"
RUNS = ("2026-11-30-cpu-peers", "2026-11-27-h200/times")  # one for each device
# Operation: workload, its sizes in words, the variant, and one that a peer computes in its stead.
WORKLOADS = {
    "unproject": ("paper", "4 views, 32 channels, 64² → 64³", "channels-last", "mean"),
    "soft_argmax3d": ("paper", "2 samples, 15 keypoints, 64³", "plain", None),
    "linear_soft_argmax3d": ("paper", "2 samples, 32 channels to 15 keypoints, 64³", "channels-last", None),
    "rasterize_edges": ("paper-one", "105 edges in 5 maps, 8² to 128²", "plain", None),
}
OURS = ("cpp", "cuda", "triton")  # the first that was measured is what `auto` takes
BASELINES = {"reference": "plain PyTorch", "compile": "torch.compile"}
MARKS = ("<!-- made by python -m benchmarks.front_page -->", "<!-- end -->")
CHART = ROOT / "docs/images/operations.svg"

# Grey and colours that can be read on white and on a dark page.
TEXT, GRID = "#7D7D7D", "#7D7D7D55"
COLOURS = {"reference": "#3B82C4", "compile": "#D08A1D"}
PEER_COLOUR = "#8A7FB5"


@dataclass(frozen=True)
class Time:
    """Seconds of a training step of a competitor, and those of this library in the same variant."""

    title: str
    seconds: float
    ours: float
    other: bool  # a variant that differs from the row's

    @property
    def ratio(self) -> float:
        return self.seconds / self.ours


class Run:
    """The training steps of one results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, rows = folder, read(folder)
        self.machine: dict[str, Any] = json.loads((folder / "machine.json").read_text())
        self.steps = {
            (row["op"], row["workload"], row["variant"], row["competitor"]): float(row["median_s"])
            for row in rows
            if row["mode"] == "both" and row["status"] == "measured" and row["dtype"] == "float32"
        }

    @property
    def name(self) -> str:
        """Such as "NVIDIA H200" or "2 cores of an Intel Xeon"."""
        if self.machine["gpu"]:
            return str(self.machine["gpu"])
        processor = self.machine["cpu"].replace("(R)", "").replace(" Processor", "")
        article = "an" if processor[0] in "AEIOU" else "a"
        return f"{self.machine['threads']} cores of {article} {processor}"

    def ours(self, op: str, variant: str) -> float | None:
        found = (self.steps.get((op, WORKLOADS[op][0], variant, name)) for name in OURS)
        return next((seconds for seconds in found if seconds is not None), None)

    def time(self, op: str, competitor: str) -> Time | None:
        """That of a competitor in the usual variant, else in the one that is measured in its stead."""
        workload, _, *variants = WORKLOADS[op]
        for index, variant in enumerate(filter(None, variants)):
            seconds, ours = self.steps.get((op, workload, variant, competitor)), self.ours(op, variant)
            if seconds is not None and ours is not None and (index == 0 or competitor in known_peers()):
                return Time(title(competitor), seconds, ours, index > 0)
        return None


def title(competitor: str) -> str:
    peers = {"published": "BKinD-3D"} | {name: peer.title for name, peer in known_peers().items()}
    return (BASELINES | peers)[competitor]


def runs() -> list[Run]:
    """The one of each device."""
    return [Run(RESULTS / name) for name in RUNS]


def competitors(op: str, found: list[Run]) -> list[str]:
    """What was measured beside this library on any device, the peers last."""
    names = (*BASELINES, "published", *known_peers())
    return [name for name in names if any(run.time(op, name) for run in found)]


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cell(op: str, competitor: str, found: list[Run]) -> str:
    times = [run.time(op, competitor) for run in found]
    return " · ".join(milliseconds(time.seconds if time else None) for time in times)


def _peer(op: str, competitor: str, found: list[Run]) -> str:
    """Name and times of a peer, with this library's own where it computes another variant."""
    text = f"{title(competitor)} {_cell(op, competitor, found)}"
    times = [run.time(op, competitor) for run in found]
    if any(time and time.other for time in times):
        own = " · ".join(milliseconds(time.ours if time else None) for time in times)
        text += f" (variant *{WORKLOADS[op][3]}*, this library {own})"
    return text


def table(found: list[Run]) -> list[str]:
    """Four rows, the times of all devices in one cell."""
    lines = ["| | this library | plain PyTorch | `torch.compile` | peers |", "|---|---:|---:|---:|---|"]
    for op, (_, sizes, variant, _) in WORKLOADS.items():
        ours = " · ".join(milliseconds(run.ours(op, variant)) for run in found)
        peers = [_peer(op, name, found) for name in competitors(op, found) if name not in BASELINES]
        cells = [
            f"`{op}`<br>{sizes}",
            f"**{ours}**",
            *(_cell(op, name, found) for name in BASELINES),
            "<br>".join(peers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def block(found: list[Run]) -> str:
    """What stands between the marks: a sentence, the table and the chart."""
    links = [f"[{run.name}](benchmarks/results/{run.folder.relative_to(RESULTS)}/summary.md)" for run in found]
    dates = sorted({run.machine["date"][:10] for run in found})
    where = " ·\n".join(links)
    text = f"Forward and backward of the paper's sizes, float32, in milliseconds:\n{where}\n({', '.join(dates)})."
    picture = "![How many times as long PyTorch, torch.compile and the peers take](docs/images/operations.svg)"
    return "\n".join([text, "", *table(found), "", picture])


def replaced(page: str, text: str) -> str:
    """A page with this text between the marks."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"


def label(time: Time) -> str:
    return f"{time.ratio:.3g}×" if time.ratio < 1000 else f"{time.ratio:,.0f}×"


def draw(found: list[Run], path: Path) -> None:
    """One panel for each device: how many times as long as this library each competitor takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, headings, y = [], [], 0.0
    for op in WORKLOADS:
        headings.append((y, op))
        for name in competitors(op, found):
            y += 1
            rows.append((y, op, name))
        y += 1.6
    style: dict[Any, Any] = {"svg.hashsalt": "bkind3d", "font.size": 9, "text.color": TEXT, "axes.edgecolor": TEXT}
    with plt.rc_context(style | {"xtick.color": TEXT, "ytick.color": TEXT, "axes.labelcolor": TEXT}):
        figure, panels = plt.subplots(1, len(found), figsize=(9, 0.9 + 0.21 * y), sharey=True, layout="constrained")
        for axes, run in zip(panels, found):
            _panel(axes, run, rows)
        panels[0].set_yticks([y for y, *_ in rows], [title(name) for *_, name in rows])
        panels[0].set_ylim(y - 0.9, -0.7)
        for height, op in headings:
            panels[0].annotate(
                op, (0, height), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="center", family="monospace", weight="bold",
            )  # fmt: skip
        figure.supxlabel("time of forward and backward, in units of this library's", fontsize=9)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _panel(axes: Any, run: Run, rows: list[tuple[float, str, str]]) -> None:
    times = [(y, name, time) for y, op, name in rows if (time := run.time(op, name))]
    for y, op, name in rows:
        if run.time(op, name) is None:
            axes.annotate("not measured", (1, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    for y, name, time in times:
        axes.barh(y, time.ratio - 1, 0.78, left=1, color=COLOURS.get(name, PEER_COLOUR))
        axes.annotate(label(time), (max(time.ratio, 1), y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xscale("log")
    ratios = [time.ratio for *_, time in times]
    axes.set_xlim(min([0.8, *ratios]), max([10, *ratios]) ** 1.25)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}×")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(1, color=TEXT, linewidth=1)
    axes.grid(True, axis="x", which="major", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(run.name, fontsize=10)


def main() -> None:
    found, page = runs(), ROOT / "README.md"
    draw(found, CHART)
    page.write_text(replaced(page.read_text(), block(found)))
    print(block(found))


if __name__ == "__main__":
    main()
