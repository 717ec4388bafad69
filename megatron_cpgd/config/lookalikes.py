"""Values that pydantic would take for something else: true for 1, a folder that is called ~."""

from collections.abc import Iterator
from inspect import isclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from megatron_cpgd.config.base import Config
from megatron_cpgd.config.messages import Problem, show


def find_lookalikes(
    section: type[Config], given: Any, path: tuple[int | str, ...] = ()
) -> Iterator[Problem]:
    """Those in the settings given for a section, and in the sections inside it."""
    if not isinstance(given, dict):
        return
    for name, value in given.items():
        if name in section.model_fields:
            annotation = _without_none(section.model_fields[name].annotation)
            yield from _find(annotation, value, (*path, name))


def _find(annotation: Any, value: Any, path: tuple[int | str, ...]) -> Iterator[Problem]:
    if isclass(annotation) and issubclass(annotation, Config):
        yield from find_lookalikes(annotation, value, path)
    elif get_origin(annotation) is dict and isinstance(value, dict):
        for name, each in value.items():
            yield from _find(get_args(annotation)[1], each, (*path, name))
    elif isinstance(value, bool) and annotation in (int, float):
        expected = "an integer" if annotation is int else "a number"
        yield Problem(path=path, text=f"must be {expected}, got {show(value)}")
    elif annotation is Path and value == "":
        yield Problem(path=path, text="must be a path, got ''")
    elif annotation is Path and isinstance(value, str) and ("$" in value or value[0] == "~"):
        text = f"~ and $NAME are not replaced here, got {show(value)}; write the path itself"
        yield Problem(path=path, text=text)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) is not UnionType:
        return annotation
    return next(arm for arm in get_args(annotation) if arm is not NoneType)
