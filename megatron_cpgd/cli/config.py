"""`megatron-cpgd config`: the resolved configuration, or everything that is wrong with it."""

import argparse
import sys

from megatron_cpgd.cli.arguments import (
    Commands,
    add_config_arguments,
    add_model_config_argument,
)
from megatron_cpgd.errors import UserError


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "config",
        help="check a configuration and print it in full",
        description="Checks a configuration and prints it with every default filled in.",
    )
    add_config_arguments(parser, required=False)
    add_model_config_argument(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--schema", action="store_true", help="print every setting that exists")
    what.add_argument(
        "--changed", action="store_true", help="print only what differs from the defaults"
    )
    what.add_argument(
        "--counts", action="store_true", help="print trainer processes and engine nodes, no more"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print YAML or a part of it, or with --schema the reference of all settings in Markdown."""
    if arguments.schema:
        from megatron_cpgd.config.reference import format_reference

        sys.stdout.write(format_reference())
        return 0
    if arguments.config is None:
        raise UserError("give a YAML file, or --schema for the list of all settings")
    from megatron_cpgd.config.load import format_config, load_config

    config = load_config(arguments.config, arguments.overrides, arguments.model_config)
    if arguments.counts:
        sys.stdout.write(f"{config.parallel.world_size} {config.rollout.nodes}\n")
    else:
        sys.stdout.write(format_config(config, only_changed=arguments.changed))
    return 0
