"""A configuration and its model, as far as a plan needs them: no weights, no data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpgd.config.checks import check_config, check_settings
from megatron_cpgd.config.load import read_config
from megatron_cpgd.config.model_folder import check_sizes
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError


def read_job(
    path: Path, overrides: Sequence[str], model_config: Path | None
) -> tuple[ExperimentConfig, dict[str, Any]]:
    """The configuration and the model's config.json.

    Args:
        model_config: config.json of a model whose folder is elsewhere. Model and data are then
            not looked for; else everything is checked as `train` does.

    Raises:
        ConfigError: lists every mistake.
    """
    config = read_config(path, overrides)
    if model_config is None:
        _refuse(path, check_config(config))
        return config, _read_json(config.model.path / "config.json")
    hf = _read_json(model_config)
    _refuse(path, [*check_settings(config), *check_sizes(hf, model_config.parent, config)])
    return config, hf


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return content


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems]))
