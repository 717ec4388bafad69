"""Plain text for people: one line for each step, one table for a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Metric, its label in the step line, its format.
_STEP_COLUMNS = (
    ("reward/mean", "reward", "+.3f"),
    ("reward/accuracy", "acc", ".3f"),
    ("rollout/response_tokens_mean", "len", ".0f"),
    ("policy/entropy", "entropy", ".3f"),
    ("policy/clip_frac", "clip", ".4f"),
    ("policy/drift", "drift", ".2e"),
    ("policy/grad_norm", "grad", ".3f"),
    ("rollout/logprob_abs_diff_mean", "|dlogp|", ".1e"),
    ("time/total_s", "s", ".1f"),
)
_LAST_ROWS = 10


def step_line(step: int, steps: int, metrics: Mapping[str, Any]) -> str:
    """One aligned line on a finished step, evaluations and what is wrong last.

    `-` stands for a metric that is missing; before training there are only evaluations.
    """
    values = _with_clip_frac(metrics)
    cells = [f"{label} {_format(values.get(name), form):>7}" for name, label, form in _STEP_COLUMNS]
    evals = [
        f"{name.removesuffix('/accuracy')} {_format(values[name], '.3f')}"
        for name in sorted(values)
        if _is_eval_accuracy(name)
    ]
    wrong = (
        [f"! {', '.join(values['stability/findings'])}"] if "stability/findings" in values else []
    )
    trained = any(name in values for name, _, _ in _STEP_COLUMNS)
    return f"step {step:>{len(str(steps))}}/{steps}  " + "  ".join(
        (cells if trained else []) + evals + wrong
    )


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """First, last, lowest, highest value of the main metrics, and the mean of the last 10 rows.

    Args:
        rows: of metrics.jsonl, at least one.
    """
    rows = [_with_clip_frac(row) for row in rows]
    evals = sorted({name for row in rows for name in row if _is_eval_accuracy(name)})
    names = [*evals, *(name for name, _, _ in _STEP_COLUMNS)]
    table = [["metric", "first", "last", "min", "max", f"mean of last {_LAST_ROWS}"]]
    for name in names:
        values = [float(row[name]) for row in rows if name in row]
        if values:
            recent = [float(row[name]) for row in rows[-_LAST_ROWS:] if name in row]
            mean = sum(recent) / len(recent) if recent else None
            numbers = (values[0], values[-1], min(values), max(values), mean)
            table.append([name, *(_format(number, ".4g") for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(_align(row, widths)).rstrip() for row in table]
    seconds = sum(float(row.get("time/total_s", 0.0)) for row in rows)
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([f"{len(rows)} steps, {seconds / 60:.1f} min", *lines])


def _with_clip_frac(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics and `policy/clip_frac`, the sum of its two sides."""
    sides = [metrics.get(f"policy/clip_frac_{side}") for side in ("low", "high")]
    known = [float(side) for side in sides if side is not None]
    return dict(metrics) | ({"policy/clip_frac": sum(known)} if known else {})


def _is_eval_accuracy(name: str) -> bool:
    return name.startswith("eval/") and name.endswith("/accuracy")


def _format(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return format(float(value), form) if math.isfinite(float(value)) else str(float(value))


def _align(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
