"""Rows of a data file: JSON lines, Parquet, or a folder written by `Dataset.save_to_disk`."""

import json
from pathlib import Path
from typing import Any

from megatron_cpgd.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
_SHOWN_ERRORS = 5


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of the data at `path`, in file order.

    Args:
        path: a .jsonl file (UTF-8, one object per line, blank lines skipped), a .parquet file, or a
            folder written by `datasets.Dataset.save_to_disk`.

    Raises:
        DataError: missing, empty, unreadable, or of another kind.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check data.path")
    if path.is_dir():
        rows = _read_saved_dataset(path)
    elif path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise DataError(
            f"{path}: cannot read suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)} "
            "or a folder written by datasets.Dataset.save_to_disk"
        )
    if not rows:
        raise DataError(f"{path}: expected at least one row, found none")
    return rows


def summarize_errors(errors: list[str]) -> str:
    """The first errors, one per line, and how many there are in all."""
    shown = "".join(f"\n  {error}" for error in errors[:_SHOWN_ERRORS])
    hidden = len(errors) - _SHOWN_ERRORS
    return f"{shown}\n  and {hidden} more" if hidden > 0 else shown


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows, errors = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse_line(line))
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
    if errors:
        raise DataError(
            f"{path}: {len(errors)} of {len(errors) + len(rows)} lines are not JSON objects:"
            f"{summarize_errors(errors)}"
        )
    return rows


def _parse_line(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    return row


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    return rows


def _read_saved_dataset(path: Path) -> list[dict[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (FileNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a folder written by datasets.Dataset.save_to_disk: {error}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(
            f"{path}: holds the splits {sorted(dataset)}; set data.path to one of their folders"
        )
    rows: list[dict[str, Any]] = dataset.to_list()
    return rows
