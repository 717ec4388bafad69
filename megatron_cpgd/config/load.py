"""YAML layers and `a.b=value` overrides become one validated, frozen ExperimentConfig."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpgd.config.algorithm import AlgorithmConfig
from megatron_cpgd.config.checks import check_config
from megatron_cpgd.config.lookalikes import find_lookalikes
from megatron_cpgd.config.merge import merge
from megatron_cpgd.config.messages import Problem, dotted, explain
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.config.yaml_io import format_yaml, parse_yaml, read_yaml
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.files import write_text_atomic


def load_config(
    path: Path, overrides: Sequence[str] = (), model_config: Path | None = None
) -> ExperimentConfig:
    """The configuration of a run, checked as far as is possible without starting anything.

    A file is laid over the files that its `defaults: [other.yaml, ...]` names (relative to itself,
    left to right), the overrides over the file. Other paths stay as they are written, so they are
    relative to the working directory.

    Args:
        path: YAML file.
        overrides: `a.b=value`, the value in YAML: `optim.lr=1e-6`, `algorithm.clip={type: none}`.
        model_config: as for `check_config`.

    Raises:
        ConfigError: lists every mistake, of single settings and between settings.
    """
    data = _read_layers(path, overrides)
    lookalikes = list(find_lookalikes(ExperimentConfig, data))
    try:
        config = ExperimentConfig.model_validate(data)
    except ValidationError as error:
        invalid = [*explain(error), *lookalikes]
        _refuse(path, [*map(str, invalid), *_check_the_rest(data, invalid, model_config)], error)
    _refuse(path, [*map(str, lookalikes), *check_config(config, model_config)])
    return config


def read_config(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """As `load_config`, without the checks that look at other settings, files and the machine.

    Raises:
        ConfigError: lists every setting that is wrong by itself.
    """
    try:
        return ExperimentConfig.model_validate(_read_layers(path, overrides))
    except ValidationError as error:
        _refuse(path, list(map(str, explain(error))), error)
        raise


def save_config(config: ExperimentConfig, path: Path) -> None:
    """Write every setting, defaults included, as YAML that loads back equal."""
    write_text_atomic(path, format_config(config))


def format_config(config: ExperimentConfig, *, only_changed: bool = False) -> str:
    """The YAML that `save_config` writes, or only what differs from the defaults."""
    return format_yaml(config.model_dump(mode="json", exclude_defaults=only_changed))


def _refuse(path: Path, problems: list[str], cause: Exception | None = None) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{path}: {count}", *problems])) from cause


def _read_layers(path: Path, overrides: Sequence[str]) -> Any:
    file, given = _read_file(path, ()), _parse_overrides(overrides)
    algorithm = merge(file, given).get("algorithm")
    if not isinstance(algorithm, dict):
        return merge(file, given)
    # Below the file, not only in the schema: so the overrides meet the `type` of every union.
    return merge(merge({"algorithm": AlgorithmConfig.below(algorithm)}, file), given)


def _read_file(path: Path, inside: tuple[Path, ...]) -> dict[Any, Any]:
    if path.resolve() in [file.resolve() for file in inside]:
        chain = " -> ".join(map(str, [*inside, path]))
        raise ConfigError(f"{path}: `defaults` form a cycle: {chain}")
    content = read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {type(content).__name__}")
    parents = content.pop("defaults", [])
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise ConfigError(f"{path}: `defaults` must be a list of YAML files, got {parents!r}")
    data: dict[Any, Any] = {}
    for name in parents:
        data = merge(data, _read_file(path.parent / name, (*inside, path)))
    return merge(data, content)  # type: ignore[no-any-return]


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    # Folded before they meet the file, so that the order of `clip.type=` and `clip.start=` is free.
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"override {override!r}: must be `section.setting=value`")
        value = parse_yaml(text, f"override {override!r}")
        for name in reversed(names):
            value = {name: value}
        tree = merge(tree, value)
    return tree


def _check_the_rest(
    data: dict[str, Any], invalid: list[Problem], model_config: Path | None
) -> list[str]:
    """Problems between the settings that are valid, so that one run shows all mistakes.

    The invalid ones are left at their defaults; what is said about them then is dropped.
    """
    rest = copy.deepcopy(data)
    for problem in invalid:
        _remove(rest, problem.path)
    try:
        config = ExperimentConfig.model_validate(rest)
    except ValidationError:  # a required setting is missing: nothing to look at
        return []
    names = [dotted(problem.path) for problem in invalid]
    problems = check_config(config, model_config)
    return [text for text in problems if not any(name in text for name in names)]


def _remove(node: Any, path: tuple[int | str, ...]) -> None:
    for key in path[:-1]:
        node = node[key]
    if isinstance(node, dict):
        node.pop(path[-1], None)
