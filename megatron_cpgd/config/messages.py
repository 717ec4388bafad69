"""Says in one line what is wrong with a setting."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_cpgd.config.reference import resolve, sections, tag

# Types of pydantic errors, and what was expected instead.
_EXPECTED = {
    "greater_than": "> {gt:g}",
    "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "<= {le:g}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "too_short": "a list with at least {min_length} item",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string (quote it)",
    "path_type": "a path",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "union_tag_invalid": "one of {expected_tags}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One setting that is wrong by itself."""

    path: tuple[int | str, ...]
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.text}"


def dotted(path: Iterable[int | str]) -> str:
    """`("rewards", "functions", 0)` as the user writes it: `rewards.functions.0`."""
    return ".".join(map(str, path))


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`did you mean 'lr'?` for a near miss, else the names that exist here (at most 20)."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if not names:
        return "there are no settings here"
    return f"known here: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def explain(error: ValidationError) -> list[Problem]:
    """Every mistake that pydantic has found."""
    return [_explain_one(details) for details in error.errors(include_url=False)]


def _explain_one(details: ErrorDetails) -> Problem:
    path, annotation = resolve(details["loc"])
    kind = details["type"]
    if kind == "extra_forbidden":
        return Problem(path=path, text=_unknown(details["loc"]))
    if kind == "missing":
        return Problem(path=path, text=_missing(path, annotation))
    if kind == "union_tag_not_found":
        tags = ", ".join(repr(tag(option)) for option in sections(annotation))
        return Problem(path=(*path, "type"), text=f"required, but missing; use one of {tags}")
    context = details.get("ctx", {})
    value = details["input"]
    if kind == "union_tag_invalid":
        path, value = (*path, "type"), context["tag"]
    expected = _EXPECTED.get(kind)
    if expected is None:
        return Problem(path=path, text=f"{details['msg']}, got {show(value)}")
    text = f"must be {expected.format(**context)}, got {show(value)}"
    if kind in ("literal_error", "union_tag_invalid") and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", text.rpartition(", got ")[0])
        near = difflib.get_close_matches(value, choices, n=1)
        text += f"; did you mean {near[0]!r}?" if near else ""
    return Problem(path=path, text=text)


def _unknown(location: tuple[int | str, ...]) -> str:
    *parents, name = location
    _, section = resolve(tuple(parents))
    options = sections(section)
    known = options[0].model_fields if options else {}
    return f"unknown setting; {did_you_mean(str(name), known)}"


def _missing(path: tuple[int | str, ...], annotation: Any) -> str:
    options = sections(annotation)
    if len(options) == 1:
        required = [name for name, f in options[0].model_fields.items() if f.is_required()]
        return f"required, but missing; set {', '.join(dotted((*path, n)) for n in required)}"
    return "required, but missing"


def show(value: Any) -> str:
    """A value as YAML would have it, shortened to one readable piece."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
