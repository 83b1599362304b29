"""CSV whose cells stay what they are in a spreadsheet."""

import csv
import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bkind3d.tables import csv_text

CELLS = st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.text("=+-@\t'\",\n1.ex"))


def read(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=4))
def test_no_cell_is_a_formula_and_none_is_lost(rows) -> None:
    for row, written in zip(rows, read(csv_text(rows)), strict=True):
        for cell, text in zip(row, written, strict=True):
            assert text in (("" if cell is None else str(cell)), f"'{cell}")
            if text.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(text)


def test_formulas_and_numbers() -> None:
    cells = ["=1+1", "@SUM(A1)", "+A1", "-A1", "-1.5", "+2e-3", -3, np.float32(-0.5), "a=b", ""]
    assert read(csv_text([cells]))[0] == [
        "'=1+1", "'@SUM(A1)", "'+A1", "'-A1", "-1.5", "+2e-3", "-3", "-0.5", "a=b", "",
    ]  # fmt: skip
