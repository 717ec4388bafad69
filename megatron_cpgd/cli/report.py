"""`megatron-cpgd report`: what a run has achieved so far."""

import argparse
import sys
from pathlib import Path

from megatron_cpgd.cli.arguments import Commands
from megatron_cpgd.errors import UserError


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
    from megatron_cpgd.tracking.console import summary_table
    from megatron_cpgd.tracking.metrics import read_metrics
    from megatron_cpgd.tracking.plot import plot_learning_curve
    from megatron_cpgd.tracking.run_folder import RunFolder

    folder = RunFolder(arguments.run_dir)
    if not folder.metrics.exists():
        raise UserError(f"{folder.metrics}: no such file; RUN_DIR is the run.dir of a training run")
    rows = read_metrics(folder.metrics)
    if not rows:
        raise UserError(f"{folder.metrics}: no finished step yet")
    plot_learning_curve(rows, folder.learning_curve)
    sys.stdout.write(f"{summary_table(rows)}\n\n{folder.learning_curve}\n")
    return 0
