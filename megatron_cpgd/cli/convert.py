"""`megatron-cpgd convert`: Hugging Face folders to Megatron checkpoints and back."""

import argparse
from pathlib import Path

from megatron_cpgd.cli.arguments import Commands, positive_float


def add_parser(commands: Commands) -> None:
    """Register the command and its two directions."""
    parser = commands.add_parser("convert", help="convert a checkpoint between the two formats")
    directions = parser.add_subparsers(dest="direction", required=True, metavar="direction")

    to_megatron = directions.add_parser(
        "hf-to-megatron", help="Hugging Face folder -> Megatron distributed checkpoint"
    )
    to_megatron.add_argument(
        "hf_dir", metavar="HF_DIR", type=Path, help="weights in bf16, fp16, fp32 or gpt-oss's MXFP4"
    )
    to_megatron.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    to_megatron.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    to_megatron.set_defaults(run=run_hf_to_megatron)

    to_hf = directions.add_parser(
        "megatron-to-hf", help="Megatron distributed checkpoint -> Hugging Face folder"
    )
    to_hf.add_argument("checkpoint_dir", metavar="CHECKPOINT_DIR", type=Path)
    to_hf.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    to_hf.add_argument(
        "--max-shard-gb",
        type=positive_float,
        default=5.0,
        help="size of one safetensors file, 10^9 bytes",
    )
    to_hf.set_defaults(run=run_megatron_to_hf)


def run_hf_to_megatron(arguments: argparse.Namespace) -> int:
    """Convert a Hugging Face folder."""
    from megatron_cpgd.policy.convert import hf_to_megatron
    from megatron_cpgd.tracking.logging import setup_logging

    setup_logging(rank=0)
    hf_to_megatron(arguments.hf_dir, arguments.out_dir, dtype=arguments.dtype)
    return 0


def run_megatron_to_hf(arguments: argparse.Namespace) -> int:
    """Convert a Megatron checkpoint."""
    from megatron_cpgd.policy.convert import megatron_to_hf
    from megatron_cpgd.tracking.logging import setup_logging

    setup_logging(rank=0)
    megatron_to_hf(
        arguments.checkpoint_dir,
        arguments.out_dir,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
    )
    return 0
