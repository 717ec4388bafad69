"""Rows of a study as CSV: four digits of each number."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a table; None and NaN are empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, ".4g") if isinstance(value, float) else value
