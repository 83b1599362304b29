"""Pictures of views with keypoints drawn over them, quick enough for the training loop."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bkind3d.errors import InputError
from bkind3d.files import replacing

REFERENCE = 340  # px: lines and dots grow with views beyond this size
GAP = 4  # white pixels between views
WHITE, INK, SHADOW = (255, 255, 255), (40, 40, 40), (0, 0, 0)


def palette(count: int) -> np.ndarray:
    """(count, 3) uint8 colours; keypoint j has the same colour everywhere, whatever the count.

    Hues step by the golden ratio, so that neighbours in the list are far apart, in five alternating shades.
    """
    shades = ((0.85, 1.0), (0.5, 1.0), (0.95, 0.7), (0.6, 0.8), (1.0, 0.5))  # saturation, value
    rows = [colorsys.hsv_to_rgb((j * 0.6180339887) % 1.0, *shades[j % len(shades)]) for j in range(count)]
    return (np.asarray(rows).reshape(count, 3) * 255).round().astype(np.uint8)


def as_floats(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 as Matplotlib takes them, in [0, 1]."""
    return colours / 255


def overlay(
    images: np.ndarray,
    keypoints: np.ndarray,
    edges: np.ndarray,
    *,
    scale: int = 2,
    confidence: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    columns: int | None = None,
    colours: np.ndarray | None = None,
) -> np.ndarray:
    """Views side by side, enlarged, with keypoints as dots and edges as lines.

    Args:
        images: (M, H, W, 3) uint8.
        keypoints: (M, J, 2), (x, y) pixels of ``images``, centres at integers; a keypoint that is not finite (behind
            the camera) is not drawn, nor are its edges.
        edges: (E, 2) keypoint pairs.
        scale: enlargement, a whole number.
        confidence: (J,) optional; dots shrink with it, down to half size at 0, relative to the largest.
        weights: (E,) optional, not negative; lines are thinner and fainter the less an edge weighs, relative to the
            largest.
        names: M view names, optional, written into the corner.
        columns: views in a row; default all M.
        colours: (J, 3) uint8 of the keypoints; default :func:`palette`.

    Returns:
        (rows · H · scale + gaps, columns · W · scale + gaps, 3) uint8.

    Raises:
        InputError: shapes that do not fit.
    """
    images, keypoints = np.asarray(images), np.asarray(keypoints, dtype=np.float64)
    edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise InputError(f"images: expected (M, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if keypoints.ndim != 3 or keypoints.shape[0] != len(images) or keypoints.shape[2] != 2:
        raise InputError(f"keypoints: expected ({len(images)}, J, 2), got {keypoints.shape}")
    if edges.size and not (edges.min() >= 0 and edges.max() < keypoints.shape[1]):
        raise InputError(f"edges: expected keypoint numbers below {keypoints.shape[1]}, got up to {edges.max()}")
    sizes = np.ones(keypoints.shape[1])
    if confidence is not None and len(sizes):
        sizes = 0.5 + 0.5 * np.clip(np.asarray(confidence) / max(float(np.max(confidence)), 1e-12), 0, 1)
    if weights is not None and np.shape(weights) != (len(edges),):
        raise InputError(f"weights: expected ({len(edges)},), got {np.shape(weights)}")
    shares = np.ones(len(edges)) if weights is None else relative(weights)
    colours = palette(keypoints.shape[1]) if colours is None else colours
    views = [_draw_view(images[m], keypoints[m], edges, scale, sizes, shares, colours) for m in range(len(images))]
    if names is not None:
        for view, name in zip(views, names):
            _label(view, name)
    return np.asarray(_tiles(views, columns or len(views)))


def sample_sheet(
    path: str | Path,
    images: np.ndarray,
    keypoints: np.ndarray,
    edges: np.ndarray,
    target: np.ndarray,
    reconstruction: np.ndarray,
    *,
    names: Sequence[str] | None = None,
    confidence: np.ndarray | None = None,
    title: str = "",
) -> None:
    """Write a PNG with one column per view: input, keypoints and edges, target, reconstruction.

    Args:
        path: PNG file, replaced only once the new one is complete.
        images: (M, H, W, 3) uint8.
        keypoints: (M, J, 2) pixels of ``images``.
        edges: (E, 2) keypoint pairs to draw.
        target: (M, h, w) or (M, 3, h, w) floats; both maps are shown on the target's own range, black to white.
        reconstruction: same shape as ``target``.
        names: M view names.
        confidence: (J,), see :func:`overlay`.
        title: one line above the sheet.

    Raises:
        InputError: shapes that do not fit, or the file cannot be written.
    """
    if np.shape(target) != np.shape(reconstruction) or np.ndim(target) not in (3, 4) or len(target) != len(images):
        raise InputError(
            f"target and reconstruction: expected both ({len(images)}, h, w) or ({len(images)}, 3, h, w), "
            f"got {np.shape(target)} and {np.shape(reconstruction)}"
        )
    scale = max(1, round(256 / np.shape(images)[1]))
    height, width = np.shape(images)[1] * scale, np.shape(images)[2] * scale
    low, high = float(np.min(target)), float(np.max(target))
    bands = {
        "input": _tiles([_resized(image, width, height) for image in images], len(images)),
        "keypoints": Image.fromarray(
            overlay(images, keypoints, edges, scale=scale, confidence=confidence, names=names)
        ),
        "target": _tiles([_resized(view, width, height) for view in _grey(target, low, high)], len(images)),
        "reconstruction": _tiles(
            [_resized(view, width, height) for view in _grey(reconstruction, low, high)], len(images)
        ),
    }
    _save_png(_stack(bands, title), Path(path))


def relative(weights: np.ndarray) -> np.ndarray:
    """Weights (E,) as shares of the largest, 0 to 1."""
    weights = np.asarray(weights, dtype=np.float64)
    return np.clip(weights / max(float(weights.max(initial=0.0)), 1e-12), 0, 1)


def _draw_view(
    image: np.ndarray,
    points: np.ndarray,
    edges: np.ndarray,
    scale: int,
    sizes: np.ndarray,
    shares: np.ndarray,
    colours: np.ndarray,
) -> Image.Image:
    """One view, (H, W, 3) -> (H · scale, W · scale) with dots and lines."""
    height, width = image.shape[0] * scale, image.shape[1] * scale
    fineness = 2 if min(height, width) >= REFERENCE else 4  # Pillow draws without smoothing: draw larger, then reduce
    enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    canvas = enlarged.resize((width * fineness, height * fineness), Image.Resampling.NEAREST)
    unit = max(1.0, min(height, width) / REFERENCE) * fineness
    at = (points + 0.5) * scale * fineness - 0.5  # Pillow cuts decimals off, so everything below is rounded first
    _draw_edges(canvas, at, edges, shares, unit)
    _draw_dots(canvas, at, sizes, unit, colours)
    return canvas.reduce(fineness)


def _near(at: np.ndarray) -> np.ndarray:
    """Which of the pixels (J, 2) Pillow can draw at (J,); False for NaN."""
    return np.asarray((np.abs(at) < 1e5).all(axis=1))


def _draw_edges(canvas: Image.Image, at: np.ndarray, edges: np.ndarray, shares: np.ndarray, unit: float) -> None:
    """White lines with a shadow, the heaviest last; thickness and opacity by their share of the largest weight."""
    draw, shown = ImageDraw.Draw(canvas, "RGBA"), _near(at)
    for e in np.argsort(shares, kind="stable"):
        i, j = edges[e]
        if not (shown[i] and shown[j]):
            continue
        line, opacity = [*at[i].round(), *at[j].round()], round(90 + 165 * shares[e])
        for colour, thickness in ((SHADOW, 3.2), (WHITE, 1.6)):
            half = int(thickness * (0.5 + 0.5 * shares[e]) * unit / 2)
            draw.line(line, fill=(*colour, opacity), width=2 * half + 1)  # Pillow puts even widths beside the line


def _draw_dots(canvas: Image.Image, at: np.ndarray, sizes: np.ndarray, unit: float, colours: np.ndarray) -> None:
    """Dots in their keypoints' colours, with a dark rim."""
    draw = ImageDraw.Draw(canvas)
    for j in np.flatnonzero(_near(at)):
        (x, y), radius = at[j], 4.2 * unit * sizes[j]
        for colour, r in ((SHADOW, radius), (tuple(colours[j].tolist()), radius - unit)):
            draw.ellipse([round(value) for value in (x - r, y - r, x + r, y + r)], fill=colour)


def _label(view: Image.Image, text: str) -> None:
    draw, font = ImageDraw.Draw(view), ImageFont.load_default(size=max(10, view.height // 18))
    draw.text((5, 3), text, fill=WHITE, font=font, stroke_width=2, stroke_fill=SHADOW)


def _tiles(views: list[Image.Image], columns: int) -> Image.Image:
    """Views of one size, row by row."""
    width, height, rows = views[0].width + GAP, views[0].height + GAP, -(-len(views) // columns)
    sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), WHITE)
    for index, view in enumerate(views):
        sheet.paste(view, (index % columns * width, index // columns * height))
    return sheet


def _stack(bands: dict[str, Image.Image], title: str) -> Image.Image:
    """Bands one above the other, each under its name."""
    font = ImageFont.load_default(size=15)
    strip, top = 22, 26 if title else 0
    height = top + sum(band.height + strip for band in bands.values())
    sheet = Image.new("RGB", (max(band.width for band in bands.values()), height), WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 3), title, fill=INK, font=font)
    for name, band in bands.items():
        draw.text((2, top + 2), name, fill=INK, font=font)
        sheet.paste(band, (0, top + strip))
        top += band.height + strip
    return sheet


def _grey(maps: np.ndarray, low: float, high: float) -> np.ndarray:
    """(M, h, w) or (M, 3, h, w) floats -> (M, h, w, 3) uint8; black at ``low``, white at ``high``."""
    level = np.asarray(maps, dtype=np.float64)
    level = level.mean(axis=1) if level.ndim == 4 else level
    level = np.clip((level - low) / max(high - low, 1e-12), 0, 1)
    return np.repeat((level * 255).astype(np.uint8)[..., None], 3, axis=3)


def _resized(image: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)


def _save_png(image: Image.Image, path: Path) -> None:
    try:
        with replacing(path) as scratch:
            image.save(scratch, format="PNG", compress_level=4)
    except OSError as error:
        raise InputError(f"{path}: cannot write the picture ({error.strerror or error})") from error
