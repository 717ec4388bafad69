"""`megatron-cpgd verify-layout`: does every rank get what the weight table says? Without a GPU."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from megatron_cpgd.cli.arguments import (
    Commands,
    add_config_arguments,
    add_model_config_argument,
)
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import UserError


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify-layout",
        help="build the ranks of a layout on the CPU, without weights, and check their shapes",
        description="Builds Megatron-Core's modules of single ranks, without memory for weights "
        "and without the other ranks, and compares the names and shapes of their tensors with the "
        "weight table. Proves that each element of the model is on one rank, replicas aside.",
    )
    add_config_arguments(parser, required=True)
    add_model_config_argument(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--ranks",
        metavar="N,N,...",
        type=rank_list,
        help="build these only; default: every rank that holds what no earlier one does",
    )
    choice.add_argument(
        "--engine",
        action="store_true",
        help="build vLLM's ranks instead, and check what its loaders take",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the layout and print what each rank holds."""
    from megatron_cpgd.config.load import load_config

    config = load_config(arguments.config, arguments.overrides, arguments.model_config)
    folder = arguments.model_config or config.model.path
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if arguments.engine:
        _verify_engine(config, folder, hf)
    else:
        _verify_trainer(config, folder, hf, arguments.ranks)
    return 0


def _verify_trainer(
    config: ExperimentConfig, folder: Path, hf: dict[str, Any], ranks: list[int] | None
) -> None:
    world_size = config.parallel.world_size
    if outside := [rank for rank in ranks or [] if not 0 <= rank < world_size]:
        raise UserError(f"--ranks: {outside} are not among the {world_size} ranks of the layout")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no device holds these models
    from megatron_cpgd.policy.dry_run import check_rank, placement

    expected = placement(config, hf)
    expected.check()
    _print_model(folder, expected.table.hf_shapes, f"on one of {world_size} ranks, replicas aside")
    for rank in ranks or expected.distinct_ranks():
        elements = check_rank(config, hf, expected, rank)
        sys.stdout.write(f"rank {rank}: {elements:,} parameters, as expected\n")
        sys.stdout.flush()


def _verify_engine(config: ExperimentConfig, folder: Path, hf: dict[str, Any]) -> None:
    from megatron_cpgd.rollout.vllm_engine import engine_environment, has_cpu_build

    os.environ |= engine_environment(dict(os.environ), cpu=has_cpu_build())
    if has_cpu_build():  # which has no attention for latent projections
        os.environ["VLLM_MLA_DISABLE"] = "1"
    from megatron_cpgd.rollout.dry_run import check_engine
    from megatron_cpgd.weights.registry import weight_table

    table = weight_table(hf)
    sizes = check_engine(folder, table, config.rollout)
    _print_model(folder, table.hf_shapes, f"taken by the {len(sizes)} ranks of the engine")
    for rank, elements in enumerate(sizes):
        sys.stdout.write(f"engine rank {rank}: {elements:,} parameters, all of them filled\n")


def _print_model(folder: Path, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    sys.stdout.write(
        f"{folder}: {sum(map(math.prod, shapes.values())):,} parameters in {len(shapes):,} "
        f"tensors; each element is {where}\n"
    )


def rank_list(text: str) -> list[int]:
    """Numbers between commas; argparse shows this name if they are none."""
    return [int(number) for number in text.split(",")]
