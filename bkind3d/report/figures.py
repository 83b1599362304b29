"""Figures of a report as SVG text, drawn without a display."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkind3d.health import Health
from bkind3d.models.methods import PENALTIES
from bkind3d.pictures import as_floats

BLUE, ORANGE, GREY = "#3465a4", "#c4621b", "#8a9099"
TEXT = "#2b2f36"
STRETCHES, PATH_POINTS = 300, 2000  # of a long recording


def loss_curves(metrics: dict[str, np.ndarray]) -> dict[str, str]:
    """Panels over the training steps: title -> SVG; a loss of one method alone only where that method has it."""
    groups: dict[str, tuple[list[str], bool]] = {
        "Loss": (["loss", "reconstruction"], True),
        "Regularisers": (["length", "separation"], False),
        "Active edges": (["active_edges"], False),
        "Gradient norm": (["grad_norm"], True),
    }
    for name in PENALTIES:
        if name in metrics and metrics[name].any():
            groups[name.capitalize()] = ([name], True)
    return {title: _curves(metrics, names, logarithmic) for title, (names, logarithmic) in groups.items()}


def _curves(metrics: dict[str, np.ndarray], names: list[str], logarithmic: bool) -> str:
    figure, axis = _panel()
    values = np.concatenate([metrics[name] for name in names])
    for name, colour in zip(names, (BLUE, ORANGE)):
        axis.plot(metrics["step"], metrics[name], color=colour, linewidth=1.2, label=name)
    if logarithmic and (values > 0).all():
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def edge_matrix(names: Sequence[str], weights: Sequence[Sequence[float]], active: Sequence[Sequence[float]]) -> str:
    """Edge weights as a symmetric matrix, a dot on each active edge."""
    count = len(names)
    matrix = np.full((count, count), np.nan)
    for i, j, weight in weights:
        matrix[int(i), int(j)] = matrix[int(j), int(i)] = weight
    size = max(3.6, 0.26 * count + 1.6)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(matrix, cmap="Blues", vmin=0.0)
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label("edge weight", fontsize=8, color=TEXT)
    bar.ax.tick_params(labelsize=7, colors=TEXT)
    bar.outline.set_visible(False)
    for i, j, _ in active:
        axis.plot([i, j], [j, i], ".", color=ORANGE, markersize=5, linestyle="none")
    axis.set_xticks(range(count), names, rotation=90, fontsize=7)
    axis.set_yticks(range(count), names, fontsize=7)
    _quiet(axis)
    return _svg(figure)


def health_curves(records: Sequence[tuple[int, Health]], colours: np.ndarray) -> dict[str, str]:
    """Panels over the training steps, one line per keypoint in its colour: title -> SVG."""
    groups = {
        "Spread (sides of the volume)": "spread",
        "Peak probability": "peak",
        "Distance to nearest twin (sides)": "twin_distance",
    }
    panels = {}
    for title, field in groups.items():
        figure, axis = _panel()
        values = np.array([getattr(health, field) for _, health in records], dtype=np.float64)  # (records, J)
        steps = [step for step, _ in records]
        for track, colour in zip(values.T, as_floats(colours)):
            axis.plot(steps, track, color=colour, linewidth=1.2, marker=".", markersize=3)
        axis.set_ylim(bottom=0)
        panels[title] = _svg(figure)
    return panels


def time_curves(time: np.ndarray, tracks: dict[str, np.ndarray]) -> dict[str, str]:
    """Panels over the seconds of a recording: title -> SVG, median and the range of nine tenths of each short stretch.

    Args:
        time: (F,) seconds.
        tracks: title -> (F,) values, NaN where there is none.
    """
    panels = {}
    stretches = np.array_split(np.arange(len(time)), min(STRETCHES, len(time)))
    for title, values in tracks.items():
        figure, axis = _panel("seconds", width=5.8)
        kept = [part[np.isfinite(values[part])] for part in stretches]
        kept = [part for part in kept if len(part)]
        middle = [float(time[part].mean()) for part in kept]
        low, median, high = ([float(np.percentile(values[part], share)) for part in kept] for share in (5, 50, 95))
        axis.fill_between(middle, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axis.plot(middle, median, color=BLUE, linewidth=1.2)
        axis.set_ylim(bottom=0)
        panels[title] = _svg(figure)
    return panels


def path_from_above(points: np.ndarray, unit: str) -> str:
    """The way of the body over the ground, (F, 2) in length units, from its start (a dot): SVG."""
    figure, axis = _panel(unit, height=3.4)
    kept = points[np.isfinite(points).all(axis=1)]
    kept = kept[:: max(1, len(kept) // PATH_POINTS)]
    axis.plot(*kept.T, color=BLUE, linewidth=0.9)
    axis.plot(*kept[:1].T, "o", color=ORANGE, markersize=5)
    axis.set_aspect("equal", adjustable="datalim")
    return _svg(figure)


def _panel(label: str = "step", width: float = 3.8, height: float = 2.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(label, fontsize=8, color=TEXT)
    _quiet(axis)
    return figure, axis


def _quiet(axis: Axes) -> None:
    axis.tick_params(labelsize=7, colors=TEXT, length=2)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
