"""Results as text: for the terminal, and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def align(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return [
        "  ".join(f"{x:<{w}}" if i == 0 else f"{x:>{w}}" for i, (x, w) in enumerate(zip(line, widths)))
        for line in [head, *body]
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, indented, every column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def number(value: float | None) -> str:
    """A number with four digits; a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.0f} %"


def plain(value: Any) -> str:
    """An option's value."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def times(size: Sequence[int]) -> str:
    """Width and height in pixels."""
    return f"{size[0]}×{size[1]}"


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV, in which no cell is a formula to a spreadsheet: text that could be one begins with an apostrophe."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_harmless(cell) for cell in row] for row in rows)
    return text.getvalue()


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return "'" + cell
    return cell
