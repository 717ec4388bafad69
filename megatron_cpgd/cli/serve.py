"""`megatron-cpgd serve`: one engine node of a run."""

import argparse
import os
import signal

from megatron_cpgd.cli.arguments import Commands, add_config_arguments
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.slurm import read_number
from megatron_cpgd.stop_request import STOP_SIGNALS


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "serve",
        help="be a node with engines only, beside a run; slurm/train_cpgd.sh starts it",
        description=(
            "Starts the engines of one of the `rollout.nodes` nodes and does what rank 0 of the "
            "run asks for. Ends when the run does."
        ),
    )
    add_config_arguments(parser, required=True)
    parser.add_argument(
        "--node",
        type=int,
        metavar="N",
        help="which one, from 0; default: the number of this task of srun",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until rank 0 is done."""
    # Slurm sends them to every process of a job. The ranks obey; this node ends when they do.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return _serve(arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(arguments: argparse.Namespace) -> int:
    from megatron_cpgd.config.load import load_config
    from megatron_cpgd.tracking.run_folder import RunFolder

    config = load_config(arguments.config, arguments.overrides)
    node = arguments.node
    if node is None:
        node = read_number(os.environ, "SLURM_PROCID", "0")
    if not 0 <= node < config.rollout.nodes:
        raise ConfigError(
            f"this is engine node {node}, and rollout.nodes={config.rollout.nodes}: expected a "
            "number below it, from --node or SLURM_PROCID"
        )
    if RunFolder(config.run.dir).is_complete(config.run.steps):
        return 0  # rank 0 will need no engine
    from megatron_cpgd.serve import serve

    serve(config, node)
    return 0
