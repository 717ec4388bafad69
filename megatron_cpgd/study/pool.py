"""Worker processes for the runs of a study: a dead one is replaced, its run is tried again."""

import itertools
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from megatron_cpgd.study.runs import StudyRun
from megatron_cpgd.study.worker import Broken, Ended, work
from megatron_cpgd.weight_sync.shared_memory import remove_stale_arenas

ATTEMPTS = 2
"""How often a run is started before it counts as failed."""
_END_GRACE_S = 10.0
_SPAWN = multiprocessing.get_context("spawn")  # fork would share the parent's threads and locks


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    run: StudyRun | None = None

    def assign(self, run: StudyRun) -> None:
        self.run = run
        with suppress(BrokenPipeError):  # it has died; `answer` says so
            self.connection.send(run)

    def answer(self) -> Ended | Broken:
        """Of the run it was given; called when the worker has answered or died."""
        try:
            answer: Ended | Broken = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Broken(reason=f"its worker ended with exit code {self.process.exitcode}")
        return answer

    def end(self, *, at_once: bool) -> None:
        if not at_once:
            with suppress(BrokenPipeError):
                self.connection.send(None)
            self.process.join(_END_GRACE_S)
        self.process.terminate()  # its engine and reward workers end with it
        self.process.join(_END_GRACE_S)
        self.process.kill()
        self.process.join()
        self.connection.close()


def make_runs(
    runs: Sequence[StudyRun],
    *,
    workers: int,
    logs: Path,
    show: Callable[[str], None],
    target: Callable[[Connection, int, Path], None] = work,
) -> dict[str, str]:
    """Make all runs, in this order, several at a time.

    Args:
        workers: processes, each with an engine.
        logs: folder for the logs of the workers.
        show: gets a line for each event.
        target: what a worker process runs.

    Returns:
        Names of the runs that failed ATTEMPTS times, with the reasons; they left no record.
    """
    # Spawned processes take the environment of this one when they start.
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    progress = _Progress(len(runs), min(workers, len(runs)))
    pending, tries, failed = deque(runs), Counter[str](), dict[str, str]()
    numbers = itertools.count()
    with ExitStack() as stack:
        pool: list[_Worker] = []
        stack.callback(remove_stale_arenas)  # of workers that were killed
        stack.callback(_kill, pool)
        while pending or any(each.run for each in pool):
            while pending and len(pool) < workers and sum(not w.run for w in pool) < len(pending):
                pool.append(_start_worker(target, logs / f"worker_{next(numbers)}"))
            for worker in pool:
                if worker.run is None and pending:
                    worker.assign(pending.popleft())
            ready = wait([each.connection for each in pool if each.run])
            for worker in [each for each in pool if each.connection in ready]:
                run, answer = worker.run, worker.answer()
                assert run
                worker.run = None
                if isinstance(answer, Ended):
                    show(progress.ended(run, answer))
                    continue
                pool.remove(worker)
                worker.end(at_once=True)
                tries[run.name] += 1
                if tries[run.name] < ATTEMPTS:
                    pending.appendleft(run)
                    show(f"{run.name}: {answer.reason}; trying again")
                else:
                    failed[run.name] = answer.reason
                    show(progress.failed(run, answer.reason))
        for worker in pool:
            worker.end(at_once=False)
        pool.clear()
    return failed


def _kill(pool: Sequence[_Worker]) -> None:
    for worker in pool:
        worker.end(at_once=True)


def _start_worker(target: Callable[[Connection, int, Path], None], folder: Path) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=target, args=(theirs, os.getpid(), folder))
    process.start()
    theirs.close()  # so that the end of the worker is the end of the stream
    return _Worker(process, ours)


class _Progress:
    """How far the runs are, and how long the rest will take."""

    def __init__(self, total: int, workers: int) -> None:
        self._total = total
        self._workers = workers
        self._ended = 0
        self._failed = 0
        self._start = time.monotonic()

    def ended(self, run: StudyRun, answer: Ended) -> str:
        self._ended += 1
        note = "" if answer.outcome == "finished" else f" ({answer.outcome})"
        return self._line(f"{run.name}: {answer.seconds:.0f} s{note}")

    def failed(self, run: StudyRun, reason: str) -> str:
        self._failed += 1
        return self._line(f"{run.name}: FAILED, {reason}")

    def _line(self, text: str) -> str:
        made = self._ended + self._failed
        left = self._total - made
        seconds = (time.monotonic() - self._start) / made * left
        width = len(str(self._total))
        counts = f"[{made:>{width}}/{self._total}]"
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{counts} {text}; {_minutes(seconds)} left{failed}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
