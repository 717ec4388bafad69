"""`megatron-cpgd eval`: accuracy of an exported model, outside of training."""

import argparse
import json
import sys
from pathlib import Path

from megatron_cpgd.cli.arguments import Commands, add_config_arguments


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a Hugging Face folder on the sets of a configuration",
        description="Prints one JSON object with the accuracy on every set of eval.sets.",
    )
    parser.add_argument("--model", metavar="HF_DIR", type=Path, help="default: model.path")
    parser.add_argument(
        "--backend",
        choices=("vllm", "transformers"),
        default="vllm",
        help="transformers is slow and shares nothing with the engine of the training",
    )
    add_config_arguments(parser, required=True)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    from megatron_cpgd.config.load import load_config
    from megatron_cpgd.evaluate import evaluate_model
    from megatron_cpgd.tracking.logging import setup_logging

    setup_logging(rank=0)
    config = load_config(arguments.config, arguments.overrides)
    metrics = evaluate_model(config, arguments.model or config.model.path, arguments.backend)
    sys.stdout.write(json.dumps(metrics) + "\n")
    return 0
