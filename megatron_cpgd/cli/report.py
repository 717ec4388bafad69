"""`megatron-cpgd report`: what a run has achieved so far."""

import argparse
from pathlib import Path

from megatron_cpgd.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "report",
        help="summarise a run",
        description="Prints a summary of RUN_DIR/metrics.jsonl and draws its learning curves.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the summary table and write learning_curve.png."""
    from megatron_cpgd.planning.outcome import predicted_and_measured
    from megatron_cpgd.tracking.report import print_report
    from megatron_cpgd.tracking.run_folder import RunFolder

    folder = RunFolder(arguments.run_dir)
    print_report(folder, predicted_and_measured(folder))
    return 0
