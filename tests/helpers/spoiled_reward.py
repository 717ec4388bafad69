"""A reward that is lost on some rows of the data, as if their answers were broken."""

from typing import Any


def spoiled_reward(response: str, answer: str | None, fields: dict[str, Any]) -> float:
    """0 where the column `spoiled` says so, else 1 or 2 by the length of the response."""
    return 0.0 if fields["spoiled"] else 1.0 + len(response) % 2
