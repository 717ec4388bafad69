"""What a reward function is, and what is asked of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

RewardFunction = Callable[[str, str | None, dict[str, Any]], float]
"""`(response, answer, fields) -> reward`; may run twice on one response if its worker dies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRequest:
    """One response to score."""

    response: str
    """Decoded, without special tokens."""
    answer: str | None
    """Ground truth of the prompt."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's data row; must pickle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """Scores of one batch of responses, in the order of the requests."""

    total: list[float]
    """Weighted sum over the functions."""
    columns: dict[str, list[float]]
    """Unweighted reward of each function, by its name; in the order of the config."""
    timeouts: int
    """Calls that took longer than the limit; they score 0."""
    errors: int
    """Calls that raised, gave no finite number, or killed their worker; they score 0."""


def join_results(results: Sequence[RewardResult]) -> RewardResult:
    """The scores of several batches, at least one, as those of a single batch."""
    return RewardResult(
        total=[value for result in results for value in result.total],
        columns={
            name: [value for result in results for value in result.columns[name]]
            for name in results[0].columns
        },
        timeouts=sum(result.timeouts for result in results),
        errors=sum(result.errors for result in results),
    )


def require_answer(answer: str | None, name: str) -> str:
    """`answer`, or an error that names the reward `name`."""
    if answer is None:
        raise ValueError(f"the {name} reward needs an answer, the prompt has none; set "
                         "data.answer_key")  # fmt: skip
    return answer
