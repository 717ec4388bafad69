"""Arguments that several commands share."""

import argparse
from pathlib import Path
from typing import Any

type Commands = argparse._SubParsersAction[Any]
"""What `add_subparsers` returns; argparse has no public name for it."""


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """`CONFIG [a.b=value ...]`."""
    nargs: Any = {} if required else {"nargs": "?"}
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run", **nargs)
    parser.add_argument(
        "overrides",
        metavar="a.b=value",
        nargs="*",
        help="settings laid over the file, values in YAML: optim.lr=1e-6",
    )


def add_model_config_argument(parser: argparse.ArgumentParser) -> None:
    """`--model-config DIR`."""
    parser.add_argument(
        "--model-config",
        metavar="DIR",
        type=Path,
        help="take the model's config.json from here, e.g. configs/models/Qwen3-8B, and look for "
        "no other file of the run",
    )
