"""Reward 1 for a final answer that is mathematically equal to the ground truth (math-verify)."""

import logging
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_cpgd.rewards.base import require_answer

# Its timeouts are off below: they would share the worker's SIGALRM timer, and turn "too slow" into
# "wrong", uncounted. It warns about that in every process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
"""A box first, then other LaTeX and plain expressions, the last one in the text."""


def math_answer(response: str, answer: str | None, fields: dict[str, Any]) -> float:
    r"""1 if the final answer of the response equals `answer`, else 0.

    The final answer is the last `\boxed{}`, or without one the last expression or number.

    Raises:
        ValueError: `answer` is missing or empty.
    """
    expected = require_answer(answer, "math")
    if r"\boxed" not in expected:
        expected = rf"\boxed{{{expected}}}"
    gold = _parse(expected)
    if not gold:
        raise ValueError(f"the answer {answer!r} is not an expression that math-verify can read")
    # math-verify joins several boxes into one set; a response that corrects itself means the last.
    final = response[max(response.rfind(r"\boxed"), 0) :]
    return float(verify(gold, _parse(final), timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    expressions: list[Any] = parse(text, _EXTRACTION, parsing_timeout=None)
    return expressions
