"""metrics.jsonl: one row for each step, complete on disk before the next step begins."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cpgd.errors import DataError

type Row = dict[str, Any]
"""`step` (int) and metric name -> number; a few are strings or, as the findings, lists of them."""

# JSON has no word for these, so they are written as strings.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Appends rows to metrics.jsonl. One writer: rank 0."""

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        """Open the log behind the row of `resumed_step`.

        Rows of later steps, which the resumed run will compute anew, and a torn last line are
        removed.

        Args:
            resumed_step: the last step of the checkpoint that was loaded; None starts empty.

        Raises:
            DataError: a line before the last one is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = b""
        if resumed_step is not None and path.exists():
            kept = b"".join(raw for raw, row in _iter_rows(path) if row["step"] <= resumed_step)
        _replace(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the row of a step to disk.

        Args:
            metrics: name -> number (anything that `float` accepts), string or list of strings.
        """
        row = {"step": step} | {name: _to_json(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without a last line that is still being written.

    Raises:
        DataError: a line before the last one is damaged.
    """
    return [row for _, row in _iter_rows(path)]


def _iter_rows(path: Path) -> Iterator[tuple[bytes, Row]]:
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _parse_row(line)
        if row is None:
            raise DataError(f"{path}:{number}: not a row of metrics: {line[:80]!r}")
        yield line + b"\n", row
    row = _parse_row(last)  # empty, or a row that a crash has cut
    if row is not None:
        yield last + b"\n", row


def _parse_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError):
        return None
    return {name: _from_json(value) for name, value in row.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, str | int | list):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _from_json(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
