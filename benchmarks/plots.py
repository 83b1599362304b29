"""Plots of a results folder, from its CSV alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .problems import known_competitors, operation
from .summary import Row, name, read

# Colours that stay apart for colour-blind readers (Okabe and Ito), one for each competitor for ever.
COLOURS = {
    "reference": "#0072B2", "compile": "#E69F00", "published": "#999999", "cpp": "#009E73", "triton": "#CC79A7",
    "cuda": "#D55E00", "learnable-triangulation": "#56B4E9", "voxelpose": "#F0E442", "autolink": "#882255",
    "kornia": "#999933",
}  # fmt: skip
AXES = {
    "N": "samples", "M": "views", "C": "channels", "J": "keypoints", "groups": "groups", "map": "map, pixels a side",
    "volume": "volume, voxels a side", "sizes": "map, pixels a side",
}  # fmt: skip
TITLES = {"forward": "forward, no gradient", "both": "training step: forward and backward"}


def draw(folder: Path) -> list[Path]:
    """Draw everything that the rows allow, as PNG; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "savefig.dpi": 130})
    rows, files = read(folder), []
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        figures = {f"scaling_{op}_{parameter}": _scaling(plt, own, parameter) for parameter in operation(op).BASE}
        main = [row for row in own if row["sweep"] == "0"]
        figures |= {f"speedup_{op}": _speedup(plt, main), f"memory_{op}": _memory(plt, main)}
        for stem, figure in figures.items():
            if figure is not None:
                files.append(folder / f"{stem}.png")
                figure.savefig(files[-1])
                plt.close(figure)
    return files


def _subtitle(rows: list[Row]) -> str:
    row = rows[0]
    where = f"{row['threads']} CPU thread{'s' * (row['threads'] != '1')}" if row["device"] == "cpu" else row["device"]
    return f"{row['op']}, {row['dtype']}, {where}"


def _present(rows: list[Row]) -> list[str]:
    return [competitor for competitor in known_competitors() if any(row["competitor"] == competitor for row in rows)]


def _parameters(row: Row) -> dict[str, str]:
    return dict(part.split("=") for part in row["shape"].split())


def _scaling(plt: Any, rows: list[Row], parameter: str) -> Any:
    """Time against one parameter, the others as in the operation's BASE, with the floor."""
    base = {
        key: "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for key, value in operation(rows[0]["op"]).BASE.items()
    }
    points: dict[str, dict[str, dict[int, Row]]] = {}
    for row in rows:
        own = _parameters(row)
        value = own.pop(parameter)
        if own != {key: text for key, text in base.items() if key != parameter} or row["variant"] != rows[0]["variant"]:
            continue
        sides = value.split("x")
        if len(set(sides)) == 1:  # a cube or a square
            points.setdefault(row["mode"], {}).setdefault(row["competitor"], {})[int(sides[0])] = row
    values = sorted({x for found in points.get("both", {}).values() for x in found})
    if len(values) < 3:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, mode in zip(panels, TITLES):
        floor: dict[int, float] = {}
        for competitor in _present(rows):
            found = points[mode].get(competitor, {})
            floor |= {x: 1e3 * float(row["floor_s"]) for x, row in found.items()}
            measured = sorted((x, 1e3 * float(row["median_s"])) for x, row in found.items() if row["median_s"])
            if measured:
                axes.plot(*zip(*measured), "o-", color=COLOURS[competitor], label=competitor, markersize=4)
        axes.plot(values, [floor[x] for x in values], "--", color="black", label="floor", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=AXES[parameter], title=TITLES[mode])
        axes.set_xticks(values, [str(x) for x in values])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
        axes.minorticks_off()
        axes.grid(True, which="major", alpha=0.25)
    panels[0].set_ylabel("median time, ms")
    panels[1].legend(frameon=False)
    fixed = ", ".join(f"{key} {value}" for key, value in base.items() if key != parameter)
    figure.suptitle(f"{_subtitle(rows)}; {fixed}", fontsize=10)
    return figure


def _bars(plt: Any, rows: list[Row], columns: int) -> tuple[Any, Any, list[str], list[str], float]:
    """A figure with a group of horizontal bars for each workload; the groups, the competitors and a bar's height."""
    groups, present = list(dict.fromkeys(name(row, rows) for row in rows)), _present(rows)
    height = 0.8 / len(present)
    size = (4.6 * columns + 1, 0.9 + len(groups) * (0.2 + 0.17 * len(present)))
    figure, panels = plt.subplots(1, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes in panels[0]:
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
        axes.xaxis.set_minor_formatter("")  # the bars have their numbers; within one decade these would overlap
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x", which="major", alpha=0.25)
        axes.set_axisbelow(True)
    return figure, panels[0], groups, present, height


def _place(groups: list[str], present: list[str], height: float, group: str, competitor: str) -> float:
    return groups.index(group) + (present.index(competitor) - (len(present) - 1) / 2) * height


def _finish(figure: Any, axes: Any, rows: list[Row], present: list[str], title: str) -> Any:
    import matplotlib.patches

    handles = [matplotlib.patches.Patch(color=COLOURS[competitor], label=competitor) for competitor in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{title}: {_subtitle(rows)}", fontsize=10)
    return figure


def _speedup(plt: Any, rows: list[Row]) -> Any:
    """How many times as fast as the reference."""
    measured = [row for row in rows if row["ratio_to_reference"]]
    if not any(row["competitor"] != "reference" for row in measured):
        return None
    rows = [row for row in rows if row["competitor"] != "reference"]
    figure, panels, groups, present, height = _bars(plt, rows, 2)
    for axes, mode in zip(panels, TITLES):
        for row in (row for row in rows if row["mode"] == mode):
            y = _place(groups, present, height, name(row, rows), row["competitor"])
            if not row["ratio_to_reference"]:
                axes.annotate(
                    _why(row), (1, y), (3, 0), textcoords="offset points", va="center", fontsize=7, color="grey"
                )
                continue
            ratio = 1 / float(row["ratio_to_reference"])
            axes.barh(y, ratio - 1, height * 0.9, left=1, color=COLOURS[row["competitor"]])
            side = {"ha": "left", "xytext": (3, 0)} if ratio >= 1 else {"ha": "right", "xytext": (-3, 0)}
            axes.annotate(f"{ratio:.3g}", (ratio, y), textcoords="offset points", va="center", fontsize=7, **side)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_title(TITLES[mode])
        axes.set_xlabel("times as fast as the reference")
    return _finish(figure, panels[0], rows, present, "Speed")


def _memory(plt: Any, rows: list[Row]) -> Any:
    """Peak memory of a training step; outlines are what a competitor that was skipped would need."""
    rows = [row for row in rows if row["mode"] == "both"]
    if not any(int(row["peak_bytes"] or 0) for row in rows):
        return None
    figure, (axes,), groups, present, height = _bars(plt, rows, 1)
    figure.set_figwidth(7)
    known = [int(row["peak_bytes"] or row["needed_bytes"] or 0) / 1e6 for row in rows]
    left = min(value for value in known if value > 0) / 2
    for row, value in zip(rows, known):
        y = _place(groups, present, height, name(row, rows), row["competitor"])
        if value <= 0:
            text = "less than a page" if row["peak_bytes"] else _why(row)
            axes.annotate(text, (left, y), (3, 0), textcoords="offset points", va="center", fontsize=7, color="grey")
            continue
        outline = {"facecolor": "none", "edgecolor": COLOURS[row["competitor"]], "linestyle": ":"}
        style = {"color": COLOURS[row["competitor"]]} if row["peak_bytes"] else outline
        axes.barh(y, value - left, height * 0.85, left=left, **style)
        text = f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        text += "" if row["peak_bytes"] else ", skipped"
        axes.annotate(text, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(left, max(known) * (max(known) / left) ** 0.25)  # room for the labels
    axes.set_xlabel("peak memory above the inputs in a training step, MB (dotted: would be needed)")
    return _finish(figure, axes, rows, present, "Memory")


def _why(row: Row) -> str:
    """The reason of a skipped row in a few words; all of it is in the CSV."""
    if row["needed_bytes"] and row["reason"].startswith("needs"):
        return f"skipped: {int(row['needed_bytes']) / 1e9:.3g} GB"
    if row["status"] == "measured":
        return "no reference to compare with"
    reason = row["reason"].split(":")[0]
    return f"{row['status']}: {reason}" if len(reason) < 20 else row["status"]
