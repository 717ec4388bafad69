"""The schema as data: which settings exist, where, and what they mean."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from megatron_cpgd.config.base import Config
from megatron_cpgd.config.schema import ExperimentConfig

_NAMES: dict[Any, str] = {
    Path: "path",
    int: "integer",
    float: "number",
    str: "string",
    bool: "true or false",
    type(None): "null",
    dict: "mapping",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One line of the reference."""

    path: str
    """Dotted path, `algorithm.drift.coef`; `[]` is a list item and `<name>` a key of your own."""
    type: str
    """What it accepts, with its bounds."""
    default: str
    """YAML of the default, or `required`."""
    meaning: str


def bare(annotation: Any) -> Any:
    """The annotation without `Annotated[...]` around it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union; a list of one for any other annotation."""
    annotation = bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [bare(member) for member in get_args(annotation)]
    return [annotation]


def sections(annotation: Any) -> list[type[Config]]:
    """The `Config` classes that an annotation allows: several for a union tagged by `type`."""
    return [m for m in members(annotation) if isinstance(m, type) and issubclass(m, Config)]


def tag(section: type[Config]) -> str:
    """The `type` of one alternative of a tagged union."""
    return str(get_args(section.model_fields["type"].annotation)[0])


def resolve(location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """What a pydantic error location points at.

    Returns:
        The path as a user writes it, without the union tags that pydantic inserts, and the
        annotation found there; None for a setting that does not exist.
    """
    path: list[int | str] = []
    annotation: Any = ExperimentConfig
    for key in location:
        options = sections(annotation)
        if len(options) > 1:
            annotation = next((option for option in options if tag(option) == key), None)
            continue
        path.append(key)
        if options:
            field = options[0].model_fields.get(str(key))
            annotation = field.annotation if field else None
        else:
            containers = [m for m in members(annotation) if get_origin(m) in (list, dict)]
            annotation = get_args(containers[0])[-1] if containers else None
    return tuple(path), annotation


def iter_settings(
    section: type[Config] = ExperimentConfig, prefix: str = "", default: Config | None = None
) -> Iterator[Setting]:
    """Every setting below a section, in the order of the schema.

    Args:
        default: the section as it is when a YAML says nothing about it.
    """
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        value = getattr(default, name) if default is not None else _default(field)
        if sections(field.annotation):
            yield from _iter_sections(field.annotation, path, value)
            continue
        yield Setting(
            path=path,
            type=_type_text(field),
            default="required" if default is None and field.is_required() else _text(value),
            meaning=" ".join((field.description or "").split()),
        )
        items = [item for m in members(field.annotation) for item in get_args(m)[-1:]]
        if items and sections(items[0]):
            suffix = "[]" if get_origin(field.annotation) is list else ".<name>"
            yield from _iter_sections(items[0], f"{path}{suffix}", None)


def _iter_sections(annotation: Any, path: str, default: Any) -> Iterator[Setting]:
    options = sections(annotation)
    if len(options) == 1:
        yield from iter_settings(options[0], f"{path}.", default)
        return
    for option in options:
        chosen = default if isinstance(default, option) else None
        yield Setting(
            path=f"{path}.type",
            type=f"`{tag(option)}`",
            default=_text(tag(option)) if chosen else "",
            meaning=" ".join((option.__doc__ or "").split()),
        )
        for setting in iter_settings(option, f"{path}.", chosen):
            if setting.path != f"{path}.type":
                yield Setting(
                    path=setting.path,
                    type=setting.type,
                    default=setting.default,
                    meaning=f"({tag(option)}) {setting.meaning}",
                )


def format_reference() -> str:
    """Markdown tables of all settings, one for each section."""
    lines: list[str] = []
    for name, field in ExperimentConfig.model_fields.items():
        section = sections(field.annotation)[0]
        lines += [f"### `{name}`", "", " ".join((section.__doc__ or "").split()), ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for setting in iter_settings(section, f"{name}.", _default(field)):
            cells = (f"`{setting.path}`", setting.type, setting.default, setting.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _type_text(field: FieldInfo) -> str:
    names = [_type_name(member) for member in members(field.annotation)]
    bounds = [text for item in field.metadata if (text := _bound(item))]
    if bounds:
        names[0] += f" {', '.join(bounds)}"
    return " or ".join(names)


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is list:
        return "list"
    return _NAMES[origin or annotation]


def _bound(item: Any) -> str:
    match item:
        case Gt():
            return f"> {item.gt}"
        case Ge():
            return f">= {item.ge}"
        case Lt():
            return f"< {item.lt}"
        case Le():
            return f"<= {item.le}"
        case MinLen():
            return f"with at least {item.min_length} item"
    return ""


def _text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Path() | str():
            return f"`{value}`"
        case dict():
            return "{}"
    return f"{value:g}" if isinstance(value, float) else str(value)
