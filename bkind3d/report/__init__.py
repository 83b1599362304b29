"""Pictures, and the report of a run: one HTML file that opens without a network."""

from pathlib import Path


def build_report(run: str | Path, force: bool = False, *, progress: bool = True) -> Path:
    """Write ``report.html`` into a run folder: one file, offline, with whatever the run holds so far.

    Args:
        run: run folder.
        force: replace an earlier report.
        progress: show a progress bar while the clip is drawn.

    Returns:
        Path of the report.

    Raises:
        InputError: not a run folder, a report is there and ``force`` is not set, or the report cannot be written. A
            corrupt file of the run is left out, and the page says so.
    """
    # The command line imports this package for every verb; viser and jinja2, which take long, are for the report alone.
    from bkind3d.report.page import write_report

    return write_report(Path(run), force=force, progress=progress)
