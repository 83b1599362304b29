"""What :func:`bkind3d.check.check_project` found, as one offline HTML page."""

import base64
from datetime import UTC, datetime
from pathlib import Path

from bkind3d.check import CheckReport
from bkind3d.check_rig import LEVELS
from bkind3d.errors import InputError
from bkind3d.files import write_text
from bkind3d.report.templates import template_of

NAME = "check.html"
# The verdict, by the worst finding.
VERDICTS = {
    "red": "Something is wrong with this rig. Mend what is red before you train.",
    "amber": "Nothing forbids training. Look at what is amber first.",
    "green": "Nothing suspicious was found.",
}


def write_check_page(report: CheckReport, out: Path) -> Path:
    """Write ``check.html`` with the findings, the tables and the pictures, which stand in the page itself.

    Args:
        report: what was found.
        out: folder, made when missing.

    Returns:
        The path of the page.

    Raises:
        InputError: a picture of the report cannot be read, or the page not be written.
    """
    path = out / NAME
    findings = sorted(report.all_findings, key=lambda finding: -LEVELS.index(finding.level))
    levels = {finding.level for finding in findings}
    page = template_of("check.html.j2").render(
        title=report.project.name,
        head=report.head(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdict=next(text for level, text in VERDICTS.items() if level in levels or level == "green"),
        findings=[{"level": finding.level, "text": finding.text} for finding in findings],
        recordings=report.recording_rows(),
        cameras=report.camera_rows(),
        foreground=report.foreground_rows(),
        volume=report.volume_lines(),
        groups=_pictures(report.pictures),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written ({error.strerror})") from None
    return path


def _pictures(paths: list[Path]) -> dict[str, list[dict[str, str]]]:
    """Name and data of each picture, by its kind: ``volume_<camera>.png`` and ``foreground_<camera>.png``."""
    groups: dict[str, list[dict[str, str]]] = {"volume": [], "foreground": []}
    for path in paths:
        kind, camera = path.stem.split("_", 1)
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise InputError(f"{path}: the picture cannot be read ({error.strerror})") from None
        groups[kind].append({"camera": camera, "data": f"data:image/png;base64,{data}"})
    return groups
