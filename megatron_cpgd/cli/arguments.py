"""Arguments that several commands share."""

import argparse
import math
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


def positive_int(text: str) -> int:
    """A number of things; argparse shows the message."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer > 0, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A size or a length; argparse shows the message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def add_model_config_argument(parser: argparse.ArgumentParser) -> None:
    """`--model-config DIR`."""
    parser.add_argument(
        "--model-config",
        metavar="DIR",
        type=Path,
        help="take the model's config.json from here, e.g. configs/models/Qwen3-8B, and look for "
        "no other file of the run",
    )
