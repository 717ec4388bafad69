"""Reward 1 for a response of the required form."""

import re
from typing import Any


def response_format(
    response: str, answer: str | None, fields: dict[str, Any], *, pattern: re.Pattern[str]
) -> float:
    """1 if `pattern` matches the whole response, else 0."""
    return float(pattern.fullmatch(response) is not None)
