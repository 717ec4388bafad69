"""Tidy tables of a study: one row per run in runs.csv, one per run and step in steps.csv."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_cpgd.errors import DataError
from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.study.rows import format_csv
from megatron_cpgd.study.runs import StudyRun
from megatron_cpgd.study.spec import CollapseSpec, Study, format_settings
from megatron_cpgd.tracking.metrics import Row, read_metrics

STEP_METRICS = {
    "accuracy": "reward/accuracy",
    "response_tokens": "rollout/response_tokens_mean",
    "entropy": "policy/entropy",
    "grad_norm": "policy/grad_norm",
    "kl": "policy/kl_k3",
    "ratio_max": "policy/ratio_max",
    "masked_frac": "policy/masked_frac",
    "logprob_diff": "rollout/logprob_abs_diff_mean",
}
"""Column of steps.csv -> metric. `heldout`, the accuracy on the held-out set, comes on top."""
_VERSIONS = ("python", "torch", "megatron_core", "vllm", "git_commit")

type Curves = dict[tuple[str, int], dict[str, list[float]]]
"""(arm, seed) -> column of steps.csv, or `step` -> values over the steps; NaN where there is none.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """What became of one run; a row of runs.csv."""

    arm: str
    preset: str
    seed: int
    outcome: str
    """`finished` or `diverged`."""
    steps: int
    """Training steps that were made."""
    collapsed: bool
    collapse_step: int | None
    """First step of the stretch of collapsed windows that lasts until the end."""
    accuracy_start: float
    """Training accuracy of the untrained policy: of step 1."""
    accuracy_final: float
    """Mean of the last window."""
    accuracy_best: float
    """Of the best window, or of step 1 if that is higher."""
    largest_drop: float
    """Largest share of the best window so far that a later window has lost, 0 to 1."""
    heldout_start: float
    heldout_final: float
    heldout_best: float
    tokens_start: float
    """Mean length of a response at step 1."""
    tokens_final: float
    """In the last window."""
    entropy_final: float
    grad_norm_max: float
    """Largest step mean of the gradient norm before clipping."""
    kl_max: float
    ratio_max: float
    seconds: float
    settings: str
    """What the arm changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """All that the report is made of, besides the study file."""

    runs: list[RunRow]
    curves: Curves
    versions: dict[str, str]

    def of(self, arm: str) -> dict[int, RunRow]:
        """Seed -> run of an arm."""
        return {row.seed: row for row in self.runs if row.arm == arm}


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How the training accuracy of a run went, in moving means over the last `window` steps."""

    means: list[float]
    """[T] shorter windows at the beginning."""
    best: list[float]
    """[T] highest complete window so far; at least the accuracy of step 1."""
    collapsed: bool
    collapse_step: int | None
    largest_drop: float


def assess(accuracy: Sequence[float], spec: CollapseSpec, *, diverged: bool) -> Course:
    """Decide whether a run collapsed.

    It did if it diverged, or if its last window is below `spec.share` of its best one. Step 1 is
    sampled by the untrained policy and counts as a window of its own: losing what was there at the
    start is a collapse too.

    Args:
        accuracy: [T] of the training steps.
    """
    window = min(spec.window, len(accuracy)) or 1
    means = moving_means(accuracy, window)
    complete = [mean if t >= window else 0.0 for t, mean in enumerate(means, start=1)]
    best = list(accumulate([*accuracy[:1], *complete], max))[1:]
    low = [
        t >= window and mean < spec.share * peak
        for t, (mean, peak) in enumerate(zip(means, best, strict=True), start=1)
    ]
    drops = [
        1 - mean / peak for mean, peak in list(zip(means, best, strict=True))[window - 1 :] if peak
    ]
    step = None
    if low and low[-1]:
        step = 1 + max((t for t, is_low in enumerate(low, start=1) if not is_low), default=0)
    elif diverged:
        step = len(accuracy)
    return Course(
        means=means,
        best=best,
        collapsed=step is not None,
        collapse_step=step,
        largest_drop=max(drops, default=0.0),
    )


def moving_means(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the beginning; NaN left out."""
    windows = [values[max(0, t - window) : t] for t in range(1, len(values) + 1)]
    known = [[value for value in each if not math.isnan(value)] for each in windows]
    return [fmean(each) if each else math.nan for each in known]


def collect_tables(study: Study, runs: Iterable[StudyRun], folder: Path) -> None:
    """Write runs.csv, steps.csv and versions.json of all runs that are done.

    Raises:
        DataError: there is none.
    """
    rows: list[RunRow] = []
    curves: Curves = {}
    versions: dict[str, set[str]] = {}
    for run in runs:
        record = run.done()
        if record is None:
            continue
        metrics = read_metrics(run.folder.metrics)
        rows.append(_run_row(study, run, record, metrics))
        curves[run.arm.name, run.seed] = _curve(metrics, study.eval_set)
        for name, version in json.loads(run.folder.versions.read_text()).items():
            versions.setdefault(name, set()).add(version)
    if not rows:
        raise DataError(f"no run of {study.path} is done; `run` makes them")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "runs.csv", format_csv([asdict(row) for row in rows]))
    write_text_atomic(folder / "steps.csv", format_csv(_step_rows(curves)))
    known = {name: " and ".join(sorted(versions[name])) for name in _VERSIONS if name in versions}
    write_text_atomic(folder / "versions.json", json.dumps(known, indent=2) + "\n")


def read_tables(folder: Path) -> Tables:
    """What `collect_tables` has written.

    Raises:
        DataError: a table is missing.
    """
    try:
        runs, steps = (_read_csv(folder / name) for name in ("runs.csv", "steps.csv"))
        versions = json.loads((folder / "versions.json").read_text())
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file; give the runs with --out") from error
    curves: Curves = {}
    for row in steps:
        curve = curves.setdefault((row["arm"], int(row["seed"])), {})
        for name in ("step", "heldout", *STEP_METRICS):
            curve.setdefault(name, []).append(_number(row[name]))
    return Tables(runs=[_parse_run(row) for row in runs], curves=curves, versions=versions)


def _run_row(study: Study, run: StudyRun, record: Mapping[str, Any], rows: list[Row]) -> RunRow:
    diverged = record["outcome"] == "diverged"
    trained = rows[1:]
    accuracy = _column(trained, "reward/accuracy")
    course = assess(accuracy, study.spec.collapse, diverged=diverged)
    heldout = _column(rows, f"eval/{study.eval_set}/accuracy")
    tokens = _column(trained, "rollout/response_tokens_mean")
    window = study.spec.collapse.window
    return RunRow(
        arm=run.arm.name,
        preset=run.config.algorithm.preset,
        seed=run.seed,
        outcome=record["outcome"],
        steps=len(trained),
        collapsed=course.collapsed,
        collapse_step=course.collapse_step,
        accuracy_start=_first(accuracy),
        accuracy_final=_first(course.means[::-1]),
        accuracy_best=_first(course.best[::-1]),
        largest_drop=course.largest_drop,
        heldout_start=_first(heldout),
        heldout_final=_first(heldout[::-1]),
        heldout_best=max(heldout, default=math.nan),
        tokens_start=_first(tokens),
        tokens_final=fmean(tokens[-window:]) if tokens else math.nan,
        entropy_final=_first(_column(trained, "policy/entropy")[::-1]),
        grad_norm_max=max(_column(trained, "policy/grad_norm"), default=math.nan),
        kl_max=max(_column(trained, "policy/kl_k3"), default=math.nan),
        ratio_max=max(_column(trained, "policy/ratio_max"), default=math.nan),
        seconds=record["seconds"],
        settings=format_settings(run.arm.settings),
    )


def _curve(rows: list[Row], eval_set: str) -> dict[str, list[float]]:
    names = {"step": "step", "heldout": f"eval/{eval_set}/accuracy"} | STEP_METRICS
    return {
        column: [float(row.get(name, math.nan)) for row in rows] for column, name in names.items()
    }


def _step_rows(curves: Curves) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "step": int(step)}
        | {name: values[i] for name, values in curve.items() if name != "step"}
        for (arm, seed), curve in curves.items()
        for i, step in enumerate(curve["step"])
    ]


def _column(rows: list[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row]


def _first(values: Sequence[float]) -> float:
    return values[0] if values else math.nan


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


def _parse_run(row: Mapping[str, str]) -> RunRow:
    values: dict[str, Any] = {}
    for field in fields(RunRow):
        cell = row[field.name]
        if field.type is str:
            values[field.name] = cell
        elif field.type is int:
            values[field.name] = int(cell)
        elif field.type is bool:
            values[field.name] = cell == "1"
        elif field.name == "collapse_step":
            values[field.name] = int(cell) if cell else None
        else:
            values[field.name] = _number(cell)
    return RunRow(**values)
