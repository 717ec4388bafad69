"""Compare algorithms and settings over seeds: which ones learn, and which ones collapse.

    python tools/stability_study.py run configs/stability_study.yaml --out runs/stability_study
    python tools/stability_study.py status configs/stability_study.yaml --out runs/stability_study
    python tools/stability_study.py report configs/stability_study.yaml --out runs/stability_study

Every run is a complete training (Megatron-Core trainer, vLLM sampler) of its own; a worker process
makes one after the other on one engine. The same `run` again makes only what is missing or was
changed in the study file. Ctrl-C or SIGTERM stops; at most one run per worker is lost.

`report` collects the runs into docs/stability_study/*.csv and writes docs/stability_study.md with
its plots; another study file gives a page of its own name. Without --out it writes the report from
the tables that are there.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_cpgd.errors import RUN_ERROR
from megatron_cpgd.study.command import run_command
from megatron_cpgd.study.pool import make_runs
from megatron_cpgd.study.runs import claim_folder, plan_runs
from megatron_cpgd.study.spec import Study, load_study
from megatron_cpgd.tracking.folder_lock import lock_folder


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 the study file or a folder is wrong; 3 some runs failed; 130 Ctrl-C."""
    arguments = _build_parser().parse_args(argv)

    def command() -> int:
        study = load_study(arguments.study, to_run=arguments.command is _run)
        code: int = arguments.command(arguments, study)
        return code

    return run_command("stability_study", command)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="make the runs that are missing")
    status = commands.add_parser("status", help="say which runs are there")
    report = commands.add_parser("report", help="write tables, plots and report")
    for command, function in ((run, _run), (status, _status), (report, _report)):
        command.add_argument("study", metavar="STUDY", type=Path, help="YAML file of the study")
        command.set_defaults(command=function)
    for command in (run, status):
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
    run.add_argument(
        "--workers", type=_positive, default=2, help="runs at a time, one core each (default: 2)"
    )
    report.add_argument("--out", type=Path, help="folder of the runs; default: use the tables")
    report.add_argument(
        "--docs",
        type=Path,
        default=Path("docs"),
        help="gets STUDY.md and STUDY/, named like the study file (default: docs)",
    )
    return parser


def _run(arguments: argparse.Namespace, study: Study) -> int:
    out: Path = arguments.out
    claim_folder(out, study.spec.name, study.path)
    with lock_folder(out):
        runs = plan_runs(study, out)
        missing = [run for run in runs if run.done() is None]
        _say(f"{len(runs)} runs, {len(runs) - len(missing)} of them done")
        if not missing:
            return 0
        failed = make_runs(missing, workers=arguments.workers, logs=out / "workers", show=_say)
    for name, reason in failed.items():
        sys.stderr.write(f"stability_study: {name} failed: {reason}; see {out / 'workers'}\n")
    return RUN_ERROR if failed else 0


def _status(arguments: argparse.Namespace, study: Study) -> int:
    runs = plan_runs(study, arguments.out)
    done = Counter(run.arm.name for run in runs if run.done())
    width = max(map(len, study.arms))
    for arm in study.arms:
        _say(f"{arm:{width}s}  {done[arm]}/{len(study.spec.seeds)}")
    _say(f"{done.total()} of {len(runs)} runs done")
    return 0


def _report(arguments: argparse.Namespace, study: Study) -> int:
    from megatron_cpgd.study.report import write_report
    from megatron_cpgd.study.tables import collect_tables

    tables = arguments.docs / study.page
    if arguments.out is not None:
        collect_tables(study, plan_runs(study, arguments.out), tables)
    _say(f"wrote {write_report(study, arguments.docs)}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
