"""`megatron-cpgd doctor`: is this host fit for a run?"""

import argparse
import json
import os
import sys
from dataclasses import asdict

from megatron_cpgd.cli.arguments import Commands, add_config_arguments


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="check this host, and with a configuration whether a run fits on it",
        description=(
            "Prints PASS, WARN or FAIL for each check, and what to do. Exit code: 1 if one of them "
            "is FAIL, else 0. With `srun --ntasks-per-node=1` the nodes also look for each other."
        ),
    )
    add_config_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings."""
    from megatron_cpgd.doctor.examine import examine, format_findings
    from megatron_cpgd.slurm import host_name

    findings = examine(arguments.config, arguments.overrides, os.environ)
    if arguments.json:
        content = {"host": host_name(), "findings": [asdict(each) for each in findings]}
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        sys.stdout.write(format_findings(findings, host_name()))
    return int(any(finding.status == "FAIL" for finding in findings))
