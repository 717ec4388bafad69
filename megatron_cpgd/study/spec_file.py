"""What study files have in common: YAML to a checked specification, settings to overrides."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpgd.config.base import Config
from megatron_cpgd.config.yaml_io import read_yaml
from megatron_cpgd.errors import ConfigError

type Settings = dict[str, Any]
"""Dotted name of a setting -> its value."""


def read_spec[S: Config](path: Path, kind: type[S]) -> S:
    """A study file as it is written.

    Raises:
        ConfigError: lists every mistake.
    """
    content = read_yaml(path)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [_explain(details["loc"], details["msg"]) for details in error.errors()]
        raise refusal(path, problems) from error


def refusal(path: Path, problems: Sequence[str]) -> ConfigError:
    """The error that lists these problems of a file."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError("\n  ".join([f"{path}: {count}", *problems]))


def as_overrides(settings: Settings) -> list[str]:
    """`a.b=value` for `load_config`; JSON is YAML, so the values arrive as they are."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def _explain(location: tuple[int | str, ...], message: str) -> str:
    return f"{'.'.join(map(str, location)) or 'the file'}: {message}"
