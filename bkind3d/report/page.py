"""The report of a run as one HTML page; what the run does not hold yet is said in the page."""

import base64
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from bkind3d.agreement import seen_on_body
from bkind3d.documents import broken_file
from bkind3d.errors import InputError
from bkind3d.evaluation.action_classifier import MEASURES, spread_percent
from bkind3d.evaluation.alignment import METRIC_TITLES, METRICS
from bkind3d.evaluation.parts import DISTANCES, SHARES
from bkind3d.evaluation.probe import MEAN_POSE, describe_options
from bkind3d.evaluation.skeleton_summary import describe_edges
from bkind3d.files import write_text
from bkind3d.health import FLAGS, Health
from bkind3d.pictures import palette
from bkind3d.report import clip, figures
from bkind3d.report.crops import crop_grid
from bkind3d.report.inputs import RunFiles, Scene, Shown, choose_recording, health_of, read_run, run_inputs
from bkind3d.report.render import upright
from bkind3d.report.scene import SCENE_FRAMES, scene_html
from bkind3d.report.templates import template_of
from bkind3d.tables import percent

Section = TypeVar("Section")

NAME = "report.html"
HISTORY_ROWS = 12
QUALITY_ROWS = 500  # moments whose masks are looked at
EVALUATION_KEYS = ("protocol", "options", "units", "joints", "rows", "masked", "paper", "paper_source", "note")
PARTS_KEYS = ("size", "units", "rows", "edges")
ACTIONS_KEYS = ("protocol", "options", "behaviours", "windows", "rows", "paper")


def write_report(run: Path, *, force: bool, progress: bool) -> Path:
    """See :func:`bkind3d.report.build_report`."""
    path = run / NAME
    if path.exists() and not force:
        raise InputError(f"{path}: exists; give --force to replace it")
    files = read_run(run)
    try:
        scene, obstacle = run_inputs(run), ""
    except InputError as error:  # the page says so, and shows everything else
        scene, obstacle = None, str(error)
    text = render(files, scene, obstacle, progress=progress)
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written ({error.strerror})") from error
    return path


def render(files: RunFiles, scene: Scene | None, obstacle: str = "", *, progress: bool = False) -> str:
    """The page as text.

    Args:
        files: content of the run folder.
        scene: frames and cameras, or None where they cannot be had.
        obstacle: why they cannot be had, said in the page.
        progress: show a progress bar while the clip is drawn.
    """
    shown = choose_recording(files, scene)
    missing = list(files.missing)

    def part(name: str, make: Callable[..., Section], *arguments: Any) -> Section | None:
        """A section from a file of the run; none, and a line that says so, where the file is not as a run writes it."""
        try:
            with broken_file(f"{name}: not what a run writes"):
                return make(*arguments)
        except InputError as error:
            missing.append(str(error))
            return None

    evaluation = files.evaluation
    sections = {
        "parts": part("evaluation.json", _parts, evaluation),
        "results": part("evaluation.json", _results, evaluation),
        "actions": part("actions.json", _actions, files.actions),
        "samples": [sample for path in _three(files.samples) if (sample := part(str(path), _sample, path))],
        "edges": part("skeleton.json", _edge_section, files.skeleton, evaluation or {}),
    }
    edges, weights = files.active_edges()
    template = template_of("report.html.j2")
    with broken_file(f"{files.path}: its files are not what a run writes"):
        return template.render(
            **sections,
            title=scene.project if scene else files.path.resolve().name,
            run=files.path.resolve().name,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            facts=_facts(files, scene),
            obstacle=obstacle,
            missing=list(dict.fromkeys(missing)),
            crops=_crops(shown, scene, progress) if shown and scene else None,
            quality=_quality(shown, scene) if shown and scene else None,
            motion=_motion(shown, scene) if shown and scene else None,
            evaluated=evaluation is not None,
            clip=_clip(shown, edges, weights, progress) if shown else None,
            scene=_scene(shown, scene, edges) if shown and scene else None,
            losses=_panels(figures.loss_curves(files.metrics)) if files.metrics else None,
            health=_health_section(files, shown, scene),
            config=files.config,
            versions=_flattened(files.environment or {}),
        )


# --- sections -----------------------------------------------------------------------------------------------------


def _facts(files: RunFiles, scene: Scene | None) -> list[tuple[str, str]]:
    facts = []
    if scene:
        cameras = next(iter(scene.cameras.values()))
        width, height = cameras.image_size[0].tolist()
        facts.append(("views", f"{len(cameras)}, {width} × {height} px each"))
        facts.append(("volume", f"{' × '.join(f'{side:.4g}' for side in scene.sides)} {scene.units}"))
    if files.skeleton:
        facts.append(("keypoints", str(len(files.skeleton["keypoints"]))))
        total = len(files.skeleton["all_weights"])
        facts.append(("active edges", f"{len(files.skeleton['edges'])} of {total}" if total else "no edges, points"))
    if files.metrics:
        facts.append(("steps", f"{int(files.metrics['step'][-1])}"))
        facts.append(("training time", _duration(float(files.metrics["seconds"][-1]))))
    return facts


def _crops(shown: Shown, scene: Scene, progress: bool) -> dict[str, Any]:
    grid = crop_grid(shown, scene, progress=progress)
    return {
        "picture": _data_uri("image/jpeg", grid.jpeg),
        "recording": shown.poses.recording,
        "split": shown.split,
        "keypoints": len(shown.poses.names),
        "moments": len(grid.times),
        "views": grid.views,
        "side": f"{grid.side:.3g} {scene.units}",
    }


def _quality(shown: Shown, scene: Scene) -> dict[str, Any]:
    """What is known of each keypoint and each view without a label."""
    poses, health = shown.poses, health_of(shown, scene)
    confidence, error = np.nan_to_num(poses.confidence), poses.reprojection_error
    low = (confidence < np.median(confidence) / 2).mean(axis=0)
    views, on_body = _views(shown, scene)
    return {
        "frames": len(poses.frames),
        "recording": poses.recording,
        "split": shown.split,
        "well": sum(not flags for flags in health.flags),
        "error": error is not None,
        "views": views,
        "rows": [
            {
                "swatch": _swatch(shown.colours[j]),
                "name": name,
                "confidence": f"{health.peak[j]:.3f}",
                "low": percent(float(low[j])),
                "on_body": percent(on_body[j]),
                "error": "–" if error is None else f"{np.nanmedian(error[:, j]):.1f} px",
                "flags": ", ".join(health.flags[j]) or "none",
                "well": not health.flags[j],
            }
            for j, name in enumerate(poses.names)
        ],
    }


def _views(shown: Shown, scene: Scene) -> tuple[list[dict[str, str]], list[float | None]]:
    """What each view shows of the keypoints, and the share of each keypoint's views that see the body there.

    Nothing and None where the body is not told from the room.
    """
    poses = shown.poses
    if scene.inputs is None or scene.inputs.body_size is None:
        return [], [None] * len(poses.names)
    recording = scene.inputs.cache.recording(poses.recording)
    rows = np.unique(np.linspace(0, len(shown.rows) - 1, min(len(shown.rows), QUALITY_ROWS)).round().astype(int))
    masks = recording.masks[shown.rows[rows]]
    hit, inside = seen_on_body(poses.positions[rows], recording.projections.numpy(), masks)
    by_view, by_keypoint = (hit.sum(axis=axes) / np.maximum(inside.sum(axis=axes), 1) for axes in ((0, 2), (0, 1)))
    views = [
        {"name": name, "shown": percent(float(inside[:, m].mean())), "on_body": percent(float(by_view[m]))}
        for m, name in enumerate(shown.cameras.names)
    ]
    return views, by_keypoint.tolist()


def _motion(shown: Shown, scene: Scene) -> dict[str, Any] | None:
    """Speed, confidence and the way over the ground; None where there are no two moments."""
    poses = shown.poses
    if len(poses.frames) < 2:
        return None
    middle = np.median(poses.positions.astype(np.float64), axis=1)  # (F, 3), NaN where a keypoint is missing
    speed = np.linalg.norm(np.diff(middle, axis=0), axis=1) / np.diff(poses.time)
    tracks = {
        f"Speed of the body ({scene.units} per second)": np.append(speed, np.nan),
        "Confidence": np.median(poses.confidence, axis=1),
    }
    if poses.reprojection_error is not None:
        tracks["Disagreement of the views (px)"] = np.median(poses.reprojection_error, axis=1)
    ground = (middle @ upright(scene.up).T)[:, :2]
    return {
        "recording": poses.recording,
        "seconds": f"{poses.time[-1] - poses.time[0]:.1f}",
        "fps": f"{poses.fps:.4g}",
        "panels": _panels(figures.time_curves(poses.time, tracks)),
        "path": _svg_uri(figures.path_from_above(ground, scene.units)),
        "units": scene.units,
    }


def _parts(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Whether keypoints are parts of the body; None where that was not measured."""
    parts = (evaluation or {}).get("parts")
    if parts is None:
        return None
    _require("evaluation.json", parts, PARTS_KEYS, "evaluate --force")
    return {
        "size": f"{parts['size']:.4g} {parts['units']}",
        "columns": [*DISTANCES.values(), *SHARES.values()],
        "rows": [
            {
                "name": row["name"],
                "values": [f"{row[key]:.3f}" for key in DISTANCES] + [percent(row[key]) for key in SHARES],
            }
            for row in parts["rows"]
        ],
        "edges": _neighbours(parts["edges"] or {}),
    }


def _neighbours(edges: dict[str, Any]) -> str:
    """One sentence on the active edges between parts, beside what chance gives; empty where none counts."""
    if not (edges.get("counted") and edges.get("agreement")):
        return ""
    near = edges["agreement"][0]
    low, high = (percent(share) for share in near["interval"])
    return (
        f"Of {edges['counted']} active edges between keypoints of different joints, {percent(near['share'])} join "
        f"neighbours on the body; of as many edges drawn by chance {percent(near['all_pairs'])} ({low} to {high})."
    )


def _results(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    _require("evaluation.json", evaluation, EVALUATION_KEYS, "evaluate")
    _require("evaluation.json", evaluation["options"], ("regressor",), "evaluate")
    rows, units = evaluation["rows"], evaluation["units"]
    largest = max(row["mpjpe"] for row in rows)
    short = _rounder(min(row[name] for row in rows for name in METRICS))
    return {
        "headline": _headline(rows, units, short),
        "units": units,
        "protocol": evaluation["protocol"],
        "options": describe_options(evaluation),
        "metrics": [(name, METRIC_TITLES[name]) for name in METRICS],
        "rows": [
            {
                "name": row["name"],
                "values": [(short(row[name]), short(row["median"][name])) for name in METRICS],
                "bar": round(100 * row["mpjpe"] / largest, 1) if largest > 0 else 0,
                "frames": row["frames"],
            }
            for row in rows
        ],
        "skipped": rows[0]["frames_skipped"],
        "masked": {"joints": evaluation["masked"].get("joints"), "of": evaluation["masked"].get("of")},
        "joints": [
            {"name": joint, "values": [short(row["per_joint"]["mpjpe"][k]) for row in rows]}
            for k, joint in enumerate(evaluation["joints"])
        ],
        "note": evaluation["note"],
        "truth": evaluation.get("truth", ""),
        "paper": evaluation["paper"],
        "paper_source": evaluation["paper_source"],
    }


def _actions(actions: dict[str, Any] | None) -> dict[str, Any] | None:
    if actions is None:
        return None
    _require("actions.json", actions, ACTIONS_KEYS, "actions")
    return {
        "protocol": actions["protocol"],
        "options": ", ".join(f"{name} {_plain(value)}" for name, value in actions["options"].items()),
        "measures": ["top-1", f"top-{actions['options']['top']}", "balanced"],
        "behaviours": list(zip(actions["behaviours"], actions["windows"]["tested"], strict=True)),
        "rows": [
            {
                "name": row["name"],
                "values": [spread_percent(row, measure) for measure in MEASURES],
                "recall": [percent(value) for value in row["recall"]],
            }
            for row in actions["rows"]
        ],
        "seeds": actions["options"]["seeds"],
        "paper": actions["paper"],
    }


def _require(file: str, content: dict[str, Any], keys: Sequence[str], verb: str) -> None:
    for key in keys:
        if key not in content:
            raise InputError(f"{file}: key {key!r} is missing; run `bkind3d {verb}` again")


def _headline(rows: Sequence[dict[str, Any]], units: str, short: Callable[[float | None], str]) -> str:
    """One sentence: the first row's error, and what share it is of the others'."""
    first, *others = rows
    called = {MEAN_POSE: "mean-pose predictor"}
    shares = [
        f"{first['mpjpe'] / row['mpjpe']:.2f} of the {called.get(row['name'], row['name'])}'s"
        for row in others
        if row["mpjpe"] > 0
    ]
    error = f"{first['name']}: an error of {short(first['mpjpe'])} {units} per joint, the mean shift removed"
    return f"{error}; {' and '.join(shares)}." if shares else f"{error}."


def _clip(shown: Shown, edges: np.ndarray, weights: np.ndarray, progress: bool) -> dict[str, Any]:
    poses, names = shown.poses, shown.cameras.names
    rows, rate = clip.clip_rows(poses.frames, poses.fps)
    pixels = clip.project_keypoints(shown.cameras, poses.positions[rows])  # (F, M, J, 2)

    def picture(f: int) -> np.ndarray:
        return clip.draw(np.asarray(shown.frames[shown.rows[rows[f]]]), pixels[f], edges, names, weights, shown.colours)

    bar = tqdm(range(len(rows)), desc="report: clip", unit="frame", disable=None if progress else True)
    stills = [int(f) for f in np.linspace(0, len(rows) - 1, min(clip.STILLS, len(rows))).round()]
    return {
        "recording": poses.recording,
        "split": shown.split,
        "seconds": f"{len(rows) / rate:.1f}",
        "filmed": f"{poses.fps:.4g}",
        "rate": f"{rate:.4g}",
        "video": _data_uri("video/mp4", clip.encode(map(picture, bar), rate)),
        "stills": [(f"{poses.time[rows[f]]:.2f} s", _jpeg(picture(f))) for f in stills],
        "keypoints": _swatches(shown),
    }


def _scene(shown: Shown, scene: Scene, edges: np.ndarray) -> dict[str, Any]:
    poses = shown.poses
    rows, rate = clip.clip_rows(poses.frames, poses.fps)
    rows = rows[:SCENE_FRAMES]
    images = np.asarray(shown.frames[shown.rows[rows[0]]])
    side = float(scene.sides.max())
    return {
        "html": scene_html(scene, shown.cameras, poses.positions[rows], edges, images, rate, shown.colours),
        "recording": poses.recording,
        "side": f"{side:.4g} {scene.units}",
    }


def _three(paths: Sequence[Path]) -> list[Path]:
    """First, middle and last, newest first."""
    return list(dict.fromkeys(paths[k] for k in (len(paths) - 1, len(paths) // 2, 0))) if paths else []


def _sample(path: Path) -> tuple[str, str]:
    """A sample picture: caption, data URI."""
    with Image.open(path) as image:
        return _caption(path.stem), _jpeg(np.asarray(image.convert("RGB")))


def _caption(stem: str) -> str:
    """step_000300 -> step 300."""
    return re.sub(r"^step_0*(?=\d)", "step ", stem)


def _edge_section(skeleton: dict[str, Any] | None, evaluation: dict[str, Any]) -> dict[str, Any] | None:
    if skeleton is None:
        return None
    if not skeleton["all_weights"]:
        return {"total": 0}
    names = skeleton["keypoints"]
    active = sorted(skeleton["edges"], key=lambda edge: -edge[2])
    return {
        "figure": _svg_uri(figures.edge_matrix(names, skeleton["all_weights"], active)),
        "threshold": None if skeleton.get("tree") else f"{skeleton['threshold']:g}",
        "total": len(skeleton["all_weights"]),
        "active": [(names[int(i)], names[int(j)], f"{weight:.3f}") for i, j, weight in active],
        "summary": describe_edges(evaluation["skeleton"]) if "skeleton" in evaluation else [],
    }


def _health_section(files: RunFiles, shown: Shown | None, scene: Scene | None) -> dict[str, Any] | None:
    final: Health | None = None
    if shown and scene:
        final = health_of(shown, scene)
        names, source = shown.poses.names, f"{final.frames} frames of recording {shown.poses.recording}"
    elif files.health:
        step, final = files.health[-1]
        names, source = _names(files, final), f"training step {step}"
    if final is None:
        return None
    named = len(files.labels.colours) == len(final.spread)
    colours = files.labels.colours if named else palette(len(final.spread))
    looked_for = {flag for health in (final, *(health for _, health in files.health)) for flag in health.looked_for}
    flags = [flag for flag in FLAGS if flag in looked_for]
    return {
        "summary": final.summary().capitalize(),
        "source": source,
        "flags": flags,
        "rows": [
            {
                "swatch": _swatch(colours[j]),
                "name": names[j],
                "spread": f"{final.spread[j]:.3f}",
                "peak": f"{final.peak[j]:.3f}",
                "centre": f"{100 * final.at_centre[j]:.0f} %",
                "border": f"{100 * final.at_border[j]:.0f} %",
                "twin": f"{names[final.twin[j]]}, {final.twin_distance[j]:.3f}" if final.twin[j] >= 0 else "–",
                "flags": ", ".join(final.flags[j]) or "healthy",
                "well": not final.flags[j],
            }
            for j in range(len(final.spread))
        ],
        "history": [_history_row(step, health, flags) for step, health in _thinned(files.health)],
        "panels": _panels(figures.health_curves(files.health, colours)) if len(files.health) > 1 else [],
    }


def _history_row(step: int, health: Health, flags: list[str]) -> dict[str, Any]:
    return {
        "step": step,
        "healthy": f"{sum(not flags for flags in health.flags)} of {len(health.flags)}",
        "counts": [health.count(flag) if flag in health.looked_for else "–" for flag in flags],
        "spread": f"{np.median(health.spread):.3f}",
        "peak": f"{np.median(health.peak):.3f}",
    }


# --- small things -------------------------------------------------------------------------------------------------


def _names(files: RunFiles, health: Health) -> list[str]:
    named, joints = files.skeleton["keypoints"] if files.skeleton else [], len(health.spread)
    return list(named) if len(named) == joints else [f"keypoint {j}" for j in range(joints)]


def _thinned(records: Sequence[tuple[int, Health]]) -> list[tuple[int, Health]]:
    """At most HISTORY_ROWS records, first and last among them."""
    picked = np.unique(np.linspace(0, len(records) - 1, min(HISTORY_ROWS, len(records))).round().astype(int))
    return [records[k] for k in picked]


def _swatches(shown: Shown) -> list[tuple[str, str]]:
    return [(name, _swatch(colour)) for name, colour in zip(shown.poses.names, shown.colours)]


def _swatch(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in colour)


def _flattened(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        nested = isinstance(value, dict)
        rows += _flattened(value, f"{prefix}{key} · ") if nested else [(f"{prefix}{key}", _plain(value))]
    return rows


def _panels(svgs: dict[str, str]) -> list[tuple[str, str]]:
    return [(title, _svg_uri(svg)) for title, svg in svgs.items()]


def _svg_uri(svg: str) -> str:
    return _data_uri("image/svg+xml", svg.encode("utf-8"))


def _jpeg(picture: np.ndarray) -> str:
    memory = io.BytesIO()
    Image.fromarray(picture).save(memory, format="JPEG", quality=85)
    return _data_uri("image/jpeg", memory.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _rounder(smallest: float) -> Callable[[float | None], str]:
    """Numbers to the decimals (at most six) that give the smallest of them two digits; a dash for None."""
    decimals = min(6, max(0, 1 - math.floor(math.log10(max(smallest, 1e-9)))))
    return lambda value: "–" if value is None else f"{value:.{decimals}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
