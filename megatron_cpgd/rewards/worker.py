"""What runs inside a reward worker process: calls under a deadline, each with an outcome."""

import math
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_cpgd.config.schema import Reward
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rewards.base import RewardFunction, RewardRequest
from megatron_cpgd.rewards.build import build_reward

CHUNK_BUDGET_S = 0.5
"""A chunk starts no further call after this time."""
_ERROR_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOutcome:
    """How one call ended."""

    value: float = 0.0
    """The reward; 0 if the call did not give one."""
    error: str | None = None
    """Traceback summary, if it failed."""
    timed_out: bool = False
    """It took longer than the limit."""


class CallTimeout(BaseException):
    """Raised by the timer inside a call. No `Exception`, so that user code does not swallow it."""


def prepare_worker() -> None:
    """Make this process the first to go, in both senses."""
    # The pool's own handler runs in Python, where a worker stuck in C never arrives.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # see stop_request.py
    # A hostile expression may eat all memory: the kernel shall kill the worker, not the trainer.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def check_reward(config: Reward) -> str | None:
    """Build the reward here; the message of what is wrong with its settings, if anything."""
    try:
        build_reward(config)
    except ConfigError as error:
        return str(error)
    return None


def score_chunk(
    config: Reward, requests: Sequence[RewardRequest], timeout_s: float
) -> list[CallOutcome]:
    """Outcomes of the first of `requests`, at least one: as many as fit in `CHUNK_BUDGET_S`.

    Takes at most CHUNK_BUDGET_S + timeout_s, unless a call is stuck in C code.
    """
    function = build_reward(config)
    started = time.monotonic()
    outcomes: list[CallOutcome] = []
    for request in requests:
        if outcomes and time.monotonic() - started > CHUNK_BUDGET_S:
            break
        outcomes.append(_call(function, request, timeout_s))
    return outcomes


def _call(function: RewardFunction, request: RewardRequest, timeout_s: float) -> CallOutcome:
    try:
        # Installed anew for each call: the one before may have replaced it.
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            value = float(function(request.response, request.answer, request.fields))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not math.isfinite(value):
            raise ValueError(f"expected a finite reward, got {value}")
        return CallOutcome(value=value)
    except CallTimeout:
        return CallOutcome(timed_out=True)
    except BaseException as error:  # whatever a reward function raises, SystemExit too
        return CallOutcome(error=_summarize(error))


def _on_alarm(signum: int, frame: FrameType | None) -> None:
    raise CallTimeout


def _summarize(error: BaseException) -> str:
    """The last frames and the message."""
    return "".join(traceback.format_exception(error, limit=-3)).strip()[-_ERROR_CHARS:]
