"""From cells to the table: by prediction alone, or from the folders of their runs."""

import datetime
import json
import os
import platform

from megatron_cpgd.errors import UserError
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.outcome import Outcome, calibrate, read_outcome
from megatron_cpgd.study.scaling.cells import Cell, ImpossibleError, ScalingStudy
from megatron_cpgd.study.scaling.runs import CellRun
from megatron_cpgd.study.scaling.table import (
    CellRow,
    Table,
    by_key,
    measured,
    simulated,
    without_result,
)
from megatron_cpgd.tracking.run_folder import find_versions

_VERSIONS = ("python", "torch", "megatron_core", "vllm", "git_commit")


def simulate(study: ScalingStudy) -> Table:
    """Every cell as the plan predicts it."""
    rows = by_key(why_not(cell) or simulated(cell) for cell in study.cells.values())
    versions = {"git_commit": find_versions()["git_commit"]}
    return Table(kind="simulated", unit=study.unit, rows=rows, facts=_facts() | versions)


def collect(study: ScalingStudy) -> Table:
    """Every cell as it was measured.

    Raises:
        UserError: no cell has run.
    """
    warmup = study.spec.warmup_steps
    first = next(filter(is_done, study.cells.values()), None)
    machine = calibrate(_outcome(first, warmup)) if first else study.machine
    rows = by_key(_collected(cell, machine, warmup) for cell in study.cells.values())
    ended = [key for key, row in rows.items() if row.state in ("done", "failed")]
    if not ended:
        raise UserError(f"no cell of {study.path} has run; `run` or `submit` does it")
    file = CellRun(study.cells[ended[-1]]).run.versions
    last = json.loads(file.read_text()) if file.exists() else find_versions()
    versions = {name: last[name] for name in _VERSIONS}
    return Table(kind="measured", unit=study.unit, rows=rows, facts=_facts() | versions)


def why_not(cell: Cell) -> CellRow | None:
    """The row of a cell that cannot run or, by plan, does not fit; None: it may run."""
    try:
        plan = cell.plan
    except ImpossibleError as error:
        return without_result(cell, error.state, str(error))
    if not plan.fits:
        return without_result(cell, "does not fit", "; ".join(plan.problems))
    return None


def is_done(cell: Cell) -> bool:
    """Whether the run of a cell is complete."""
    try:
        return CellRun(cell).is_done()
    except ImpossibleError:
        return False


def _collected(cell: Cell, calibrated: Machine, warmup_steps: int) -> CellRow:
    run = CellRun(cell)
    if is_done(cell):
        plan = _outcome(cell, warmup_steps, calibrated).plan
        return measured(cell, _outcome(cell, warmup_steps), plan)
    if row := why_not(cell):
        return row
    if run.log.exists():
        return without_result(cell, "failed", run.failure())
    return without_result(cell, "missing", "not run yet")


def _outcome(cell: Cell, warmup_steps: int, machine: Machine | None = None) -> Outcome:
    """Of its run, beside the prediction for this machine, by default that of the study."""
    return read_outcome(
        CellRun(cell).run, machine or cell.planner.machine, warmup_steps=warmup_steps
    )


def _facts() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "host": f"{platform.machine()}, {os.cpu_count()} processors",
    }
