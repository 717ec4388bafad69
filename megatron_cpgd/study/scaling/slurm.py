"""A scaling study as Slurm jobs: an array for each number of nodes, and one job for the report."""

import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_cpgd.errors import UserError
from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.study.scaling.cells import Cell, ScalingStudy
from megatron_cpgd.study.scaling.runs import CellRun

NOTICE_MINUTES = 11
"""Jobs are asked to stop 600 s before their time limit, which Slurm may do a minute early."""
REPORT_MINUTES = 10
SCRIPT = Path(__file__).parents[3] / "slurm" / "scaling_study.sh"


def submit(
    study: ScalingStudy, cells: Sequence[Cell], out: Path,
    *, options: Sequence[str], dry_run: bool, show: Callable[[str], None],
) -> None:  # fmt: skip
    """Submit these cells, or only show how.

    Args:
        options: of sbatch, for every job.

    Raises:
        UserError: there is no sbatch, or it has refused a job.
    """
    arrays: dict[int, list[Cell]] = {}
    for cell in cells:
        arrays.setdefault(cell.nodes, []).append(cell)
    show(f"{len(study.cells)} cells, {len(cells)} to run; one array for each number of nodes")
    jobs: list[str] = []
    for nodes, members in arrays.items():
        tasks = out / "slurm" / f"nodes_{nodes}.txt"
        for task, cell in enumerate(members, start=1):
            show(f"  {tasks}:{task} {cell.name}: {cell.folder}")
        if not dry_run:
            for cell in members:
                CellRun(cell).prepare()
            tasks.parent.mkdir(exist_ok=True)
            write_text_atomic(tasks, "".join(f"{cell.folder}\n" for cell in members))
        command = [
            "sbatch", "--parsable", f"--nodes={nodes}", f"--array=1-{len(members)}",
            f"--time={math.ceil(60 * study.spec.hours) + NOTICE_MINUTES}",
            f"--output={out}/slurm/nodes_{nodes}-%A_%a.log", *_gpus(study), *options,
            str(SCRIPT), "cell", str(tasks),
        ]  # fmt: skip
        jobs.append(_sbatch(command, dry_run=dry_run, show=show, stand_in=f"JOB{len(jobs) + 1}"))
    last = [
        "sbatch", "--parsable", "--nodes=1",
        f"--time={REPORT_MINUTES + NOTICE_MINUTES}", f"--output={out}/slurm/report-%j.log",
        *([f"--dependency=afterany:{':'.join(jobs)}"] if jobs else []), *options,
        str(SCRIPT), "report", str(study.path), "--out", str(out),
    ]  # fmt: skip
    _sbatch(last, dry_run=dry_run, show=show, stand_in="JOB")
    show(f"the last job writes {out / 'report.md'}")


def _gpus(study: ScalingStudy) -> list[str]:
    if not study.machine.accelerator:
        return []
    return [f"--gpus-per-node={study.machine.gpus_per_node}"]


def _sbatch(
    command: list[str], *, dry_run: bool, show: Callable[[str], None], stand_in: str
) -> str:
    """Number of the job; in a dry run a name."""
    show(shlex.join(command))
    if dry_run:
        return stand_in
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("there is no sbatch here; use `run`, or give --dry-run") from error
    if done.returncode:
        raise UserError(f"sbatch has refused the job: {done.stderr.strip()}")
    number = done.stdout.strip().partition(";")[0]  # of several clusters: JOB;CLUSTER
    show(f"job {number}")
    return number
