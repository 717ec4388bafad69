"""Reward 1 for a response that equals the ground truth."""

from typing import Any

from megatron_cpgd.rewards.base import require_answer


def exact_match(
    response: str, answer: str | None, fields: dict[str, Any], *, after: str | None = None
) -> float:
    """1 if the response equals the answer, both stripped of white space, else 0.

    Args:
        after: compare only what follows its last occurrence; 0 if it does not occur.
    """
    expected = require_answer(answer, "exact_match")
    if after is not None:
        _, found, response = response.rpartition(after)
        if not found:
            return 0.0
    return float(response.strip() == expected.strip())
