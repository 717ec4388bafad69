"""How a run scales over GPUs: measured here, on a cluster, or simulated; one grid, one report.

    python tools/scaling_study.py simulate configs/scaling_study_cluster.yaml --out DIR
    python tools/scaling_study.py run configs/scaling_study.yaml --out DIR
    python tools/scaling_study.py submit configs/scaling_study_cluster.yaml --out DIR [--dry-run]
    python tools/scaling_study.py report configs/scaling_study.yaml --out DIR

`run` makes one run after the other on this machine, with as many ranks as the nodes of the cell
have GPUs. `submit` makes each of them a Slurm job: one array for each number of nodes, and a last
job that writes the report. Both leave out what is done, and try again what has failed. `simulate`
takes the seconds that `megatron-cpgd plan` predicts. All write table.csv, plots and report.md into
DIR; docs/scaling_study.md says what is in them.
"""

import argparse
import sys
from pathlib import Path

from megatron_cpgd.errors import RUN_ERROR, UserError
from megatron_cpgd.study.command import run_command
from megatron_cpgd.study.runs import claim_folder
from megatron_cpgd.study.scaling.cells import ScalingStudy, load_study
from megatron_cpgd.study.scaling.collect import collect, is_done, simulate, why_not
from megatron_cpgd.study.scaling.report import write_report
from megatron_cpgd.study.scaling.runs import run_cells
from megatron_cpgd.study.scaling.slurm import submit
from megatron_cpgd.study.scaling.table import Table
from megatron_cpgd.tracking.folder_lock import lock_folder


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 the study file or a folder is wrong; 3 some runs failed; 130 Ctrl-C."""
    arguments = _build_parser().parse_args(argv)

    def command() -> int:
        to_run = arguments.command is not _simulate
        study = load_study(arguments.study, arguments.out, to_run=to_run)
        code: int = arguments.command(arguments, study)
        return code

    return run_command("scaling_study", command)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="make the missing runs on this machine, then the report")
    submitted = commands.add_parser("submit", help="make the missing runs as Slurm jobs")
    simulated = commands.add_parser("simulate", help="predict all runs and write the report")
    report = commands.add_parser("report", help="write the report from the runs that are there")
    for command, function in (
        (run, _run), (submitted, _submit), (simulated, _simulate), (report, _report)
    ):  # fmt: skip
        command.add_argument("study", metavar="SPEC", type=Path, help="YAML file of the study")
        command.add_argument("--out", type=Path, required=True, help="folder of runs and report")
        command.set_defaults(command=function)
    submitted.add_argument("--dry-run", action="store_true", help="show the jobs, submit nothing")
    submitted.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="option of every job, such as --sbatch=--partition=gpu; may be repeated",
    )
    report.add_argument("--to", type=Path, help="folder of the report (default: --out)")
    return parser


def _run(arguments: argparse.Namespace, study: ScalingStudy) -> int:
    out: Path = arguments.out
    claim_folder(out, study.spec.name, study.path)
    with lock_folder(out):
        undone = [cell for cell in study.cells.values() if not is_done(cell)]
        missing = [cell for cell in undone if why_not(cell) is None]
        done = len(study.cells) - len(undone)
        _say(
            f"{len(study.cells)} cells: {done} done, {len(undone) - len(missing)} that cannot run, "
            f"{len(missing)} to run"
        )
        failed = run_cells(missing, hours=study.spec.hours, show=_say)
    _write(study, collect(study), out)
    return RUN_ERROR if failed else 0


def _submit(arguments: argparse.Namespace, study: ScalingStudy) -> int:
    out: Path = arguments.out
    if not arguments.dry_run:
        claim_folder(out, study.spec.name, study.path)
    cells = [cell for cell in study.cells.values() if not is_done(cell) and not why_not(cell)]
    submit(study, cells, out, options=arguments.sbatch, dry_run=arguments.dry_run, show=_say)
    return 0


def _simulate(arguments: argparse.Namespace, study: ScalingStudy) -> int:
    if (arguments.out / "cells").exists():
        raise UserError(
            f"{arguments.out} holds runs, whose report would be lost; use another --out"
        )
    _write(study, simulate(study), arguments.out)
    return 0


def _report(arguments: argparse.Namespace, study: ScalingStudy) -> int:
    _write(study, collect(study), arguments.to or arguments.out)
    return 0


def _write(study: ScalingStudy, table: Table, folder: Path) -> None:
    _say(f"wrote {write_report(study, table, folder)}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
