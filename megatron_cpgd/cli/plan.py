"""`megatron-cpgd plan`: whether and how a job fits, and how long a step takes, before it starts."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpgd.cli.arguments import (
    Commands,
    add_config_arguments,
    add_model_config_argument,
    positive_float,
    positive_int,
)
from megatron_cpgd.errors import UserError

if TYPE_CHECKING:
    from megatron_cpgd.planning.machine import Machine
    from megatron_cpgd.planning.search import Planner

DOES_NOT_FIT = 4
"""Exit code of a valid configuration that does not fit the machine."""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        help="predict memory and step time before a run starts",
        description=(
            "Predicts the memory of every rank and the seconds of a step, and says what to change "
            "if it does not fit. Starts nothing. Exit code 0: fits, 4: does not."
        ),
    )
    parser.add_argument(
        "--machine", help="a100, h100, h200, b200, cpu or a file; default: tracking.machine or h100"
    )
    parser.add_argument(
        "--nodes", type=positive_int, help="nodes of the job; default: as many as needed"
    )
    add_model_config_argument(parser)
    parser.add_argument(
        "--response-tokens",
        type=positive_float,
        help="assumed mean; default: half of the longest allowed",
    )
    parser.add_argument(
        "--search",
        metavar="GPUS",
        type=positive_int,
        help="the fastest layouts of a job with so many GPUs, those of engine nodes included",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--calibrate",
        metavar="RUN_DIR",
        type=Path,
        help="write a machine file with the rates of a finished run, and plan CONFIG with it",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="of --calibrate; default: machine.yaml"
    )
    add_config_arguments(parser, required=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a plan or a table of layouts, and write a machine file if asked to."""
    from megatron_cpgd.config.load import load_config
    from megatron_cpgd.planning.model import read_model
    from megatron_cpgd.planning.search import Planner
    from megatron_cpgd.planning.workload import assumed_lengths
    from megatron_cpgd.weights.hf_checkpoint import read_config

    _check_options(arguments)
    machine = _calibrate(arguments) if arguments.calibrate else None
    if arguments.config is None:
        return 0
    config = load_config(arguments.config, arguments.overrides, arguments.model_config)
    hf = read_config(arguments.model_config or config.model.path)
    planner = Planner(
        model=read_model(hf),
        hf=hf,
        config=config,
        machine=machine or _machine(arguments.machine, config.tracking.machine),
        lengths=assumed_lengths(config, arguments.response_tokens),
        nodes=arguments.nodes,
    )
    if arguments.search:
        return _search(planner, arguments)
    return _plan(planner, as_json=arguments.json)


def _machine(given: str | None, configured: str | None) -> "Machine":
    from megatron_cpgd.planning.machine import find_machine

    if given is None and configured is not None:
        return find_machine(configured, "tracking.machine:")
    return find_machine("h100" if given is None else given)


def _check_options(arguments: argparse.Namespace) -> None:
    """Options that would do nothing are refused, before a file is written."""
    if arguments.search and arguments.nodes:
        raise UserError(
            f"--nodes={arguments.nodes} does nothing: --search {arguments.search} takes the nodes "
            "that so many GPUs are; remove one of them"
        )
    if arguments.out and not arguments.calibrate:
        raise UserError(f"--out {arguments.out} does nothing without --calibrate RUN_DIR")
    if arguments.config is not None:
        return
    if not arguments.calibrate:
        raise UserError("give the YAML file of a run")
    for name in ("model_config", "nodes", "response_tokens", "search", "json"):
        if getattr(arguments, name):
            raise UserError(
                f"--{name.replace('_', '-')} does nothing without the YAML file of a run; give one"
            )


def _plan(planner: "Planner", *, as_json: bool) -> int:
    from megatron_cpgd.planning import report
    from megatron_cpgd.planning.search import find_fixes

    plan = planner.plan({})
    assert plan is not None, "the configuration was checked"
    fixes = [] if plan.fits else find_fixes(planner)
    if as_json:
        _print_json(report.as_json(plan, fixes))
    else:
        sys.stdout.write(report.format_plan(plan, fixes))
    return 0 if plan.fits else DOES_NOT_FIT


def _search(planner: "Planner", arguments: argparse.Namespace) -> int:
    from megatron_cpgd.planning import report
    from megatron_cpgd.planning.jobs import search_jobs
    from megatron_cpgd.planning.search import find_nearest

    found = search_jobs(planner, arguments.search)
    if arguments.json:
        _print_json(report.search_as_json(found))
    else:
        nearest = None if found else find_nearest(planner, arguments.search)
        sys.stdout.write(report.format_search(found, nearest, arguments.search))
    return 0 if found else DOES_NOT_FIT


def _calibrate(arguments: argparse.Namespace) -> "Machine":
    from megatron_cpgd.planning.machine import find_machine, save_machine
    from megatron_cpgd.planning.outcome import calibrate, format_outcome, read_outcome
    from megatron_cpgd.tracking.run_folder import RunFolder

    given = find_machine(arguments.machine) if arguments.machine else None
    outcome = read_outcome(RunFolder(arguments.calibrate), given)
    machine = calibrate(outcome)
    out = arguments.out or Path("machine.yaml")
    save_machine(machine, out)
    lines = [*format_outcome(outcome), f"written: {out}"]
    sys.stderr.write("\n".join(lines) + "\n")
    return machine


def _print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")
