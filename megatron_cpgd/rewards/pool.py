"""Scores batches of responses in worker processes that may hang, raise or die.

Three limits guard a call. A timer inside the worker ends it after `timeout_s` without losing the
worker. Code that the timer cannot interrupt (C code that does not return to Python) is killed with
its worker by the pool soon after; the calls that shared its chunk run again, one by one, so that
the guilty one alone scores 0. And no wait on the pool outlives the time its jobs may take.
"""

import logging
import math
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from itertools import batched

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_cpgd.config.schema import Reward
from megatron_cpgd.errors import ConfigError, RewardError
from megatron_cpgd.rewards.base import RewardRequest, RewardResult
from megatron_cpgd.rewards.build import reward_names
from megatron_cpgd.rewards.worker import (
    CHUNK_BUDGET_S,
    CallOutcome,
    check_reward,
    prepare_worker,
    score_chunk,
)

logger = logging.getLogger(__name__)

_KILL_GRACE_S = 1.0
"""From the timer inside a worker to its end by force."""
_START_TIMEOUT_S = 120.0
"""Longest start of a worker with the imports of its reward functions."""
_POLL_S = 1.0
"""How often a wait looks whether the pool is still alive."""
_MAX_CHUNK = 64
_CHUNKS_PER_WORKER = 4
"""Chunks for each worker, so that slow ones even out."""


class RewardPool:
    """Worker processes for the reward functions of a run.

    Workers are forked from a clean server process that has the libraries loaded: they hold no
    CUDA state, and a killed one is replaced in milliseconds. As with every `multiprocessing`
    start method but fork, a worker imports the main module of this process.
    """

    def __init__(self, functions: Sequence[Reward], *, workers: int, timeout_s: float) -> None:
        """Start the workers and build every reward function in one of them.

        Args:
            functions: settings of the rewards; their weighted sum is the total.
            workers: processes.
            timeout_s: longest time of one call.

        Raises:
            ConfigError: a function cannot be built: module or attribute missing, bad pattern.
        """
        self._configs = list(functions)
        self._names = reward_names(functions)
        self._workers = workers
        self._timeout_s = timeout_s
        self._reported: set[str] = set()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([score_chunk.__module__])
        self._pool = self._start()
        try:
            self._check_functions()
        except ConfigError:
            self.close()
            raise

    def score(self, requests: Sequence[RewardRequest]) -> RewardResult:
        """Score a batch; failed calls score 0 and are counted.

        Raises:
            RewardError: all calls of one function failed. Timeouts alone do not raise.
        """
        columns: dict[str, list[float]] = {}
        total = [0.0] * len(requests)
        timeouts = errors = 0
        for config, name in zip(self._configs, self._names, strict=True):
            outcomes = self._score_function(config, requests)
            timeouts += sum(outcome.timed_out for outcome in outcomes)
            errors += self._report_errors(name, outcomes)
            columns[name] = [outcome.value for outcome in outcomes]
            total = [
                t + config.weight * value for t, value in zip(total, columns[name], strict=True)
            ]
        return RewardResult(total=total, columns=columns, timeouts=timeouts, errors=errors)

    def close(self) -> None:
        """End the workers, also in the middle of a call."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _start(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers, initializer=prepare_worker, context=self._context
        )

    def _restart(self) -> None:
        logger.warning("the reward workers died outside of a call; starting new ones")
        self.close()
        self._pool = self._start()

    def _check_functions(self) -> None:
        messages = []
        for config, name in zip(self._configs, self._names, strict=True):
            future = self._pool.schedule(check_reward, args=(config,), timeout=_START_TIMEOUT_S)
            try:
                messages.append(self._await(future, _START_TIMEOUT_S + _KILL_GRACE_S))
            except TimeoutError:
                messages.append(f"rewards.functions: {name}: no worker in {_START_TIMEOUT_S:g} s")
            except (ProcessExpired, BrokenProcessPool) as error:
                messages.append(f"rewards.functions: {name}: its import ends the worker: {error}")
        if any(messages):
            raise ConfigError("\n".join(message for message in messages if message))

    def _score_function(
        self, config: Reward, requests: Sequence[RewardRequest]
    ) -> list[CallOutcome]:
        outcomes: dict[int, CallOutcome] = {}
        indices = range(len(requests))
        chunk = math.ceil(len(requests) / (_CHUNKS_PER_WORKER * self._workers))
        self._run(config, requests, batched(indices, max(1, min(chunk, _MAX_CHUNK))), outcomes)
        self._run(config, requests, [(i,) for i in indices if i not in outcomes], outcomes)
        # Only calls that were in flight when the whole pool broke are left. One at a time, a call
        # that breaks it again is the guilty one.
        for i in indices:
            if i not in outcomes:
                self._run(config, requests, [(i,)], outcomes)
                outcomes.setdefault(i, CallOutcome(error="the call ended the worker pool"))
        return [outcomes[i] for i in indices]

    def _run(
        self,
        config: Reward,
        requests: Sequence[RewardRequest],
        jobs: Iterable[tuple[int, ...]],
        outcomes: dict[int, CallOutcome],
    ) -> None:
        """Run `jobs` side by side, each a chunk of request indices; fill in what they gave."""
        if not self._pool.active:
            self._restart()
        job_s = CHUNK_BUDGET_S + self._timeout_s + _KILL_GRACE_S
        futures = [(job, self._submit(config, [requests[i] for i in job], job_s)) for job in jobs]
        wait_s = _START_TIMEOUT_S + job_s * math.ceil(len(futures) / self._workers)
        deadline = time.monotonic() + wait_s
        for job, future in futures:
            try:
                ended = self._await(future, deadline - time.monotonic())
                outcomes.update(zip(job, ended, strict=False))  # a slow chunk stops early
            except BrokenProcessPool:
                continue
            except (TimeoutError, ProcessExpired) as error:
                if len(job) == 1:
                    outcomes[job[0]] = _killed(error)

    def _submit(
        self, config: Reward, requests: list[RewardRequest], job_s: float
    ) -> ProcessFuture[list[CallOutcome]]:
        try:
            return self._pool.schedule(
                score_chunk, args=(config, requests, self._timeout_s), timeout=job_s
            )
        except RuntimeError as error:  # the pool broke since the last look
            future: ProcessFuture[list[CallOutcome]] = ProcessFuture()
            future.set_exception(BrokenProcessPool(str(error)))
            return future

    def _await[T](self, future: ProcessFuture[T], wait_s: float) -> T:
        deadline = time.monotonic() + wait_s
        while not future.done() and self._pool.active and time.monotonic() < deadline:
            wait([future], timeout=_POLL_S)
        if not future.done():
            raise BrokenProcessPool(f"no answer from the reward workers in {wait_s:.1f} s")
        return future.result()

    def _report_errors(self, name: str, outcomes: list[CallOutcome]) -> int:
        """Count the errors; log the first one ever of this function."""
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors and len(errors) == len(outcomes):
            raise RewardError(
                f"the reward function {name!r} failed on all {len(outcomes)} responses of a "
                f"batch; the first error:\n{errors[0]}"
            )
        if errors and name not in self._reported:
            self._reported.add(name)
            logger.warning(
                "the reward function %r failed on %d of %d responses, which score 0; further "
                "failures are only counted. The first:\n%s",
                name, len(errors), len(outcomes), errors[0],
            )  # fmt: skip
        return len(errors)


def _killed(error: TimeoutError | ProcessExpired) -> CallOutcome:
    if isinstance(error, ProcessExpired):
        return CallOutcome(error=f"the call ended its worker with exit code {error.exitcode}")
    return CallOutcome(timed_out=True)
