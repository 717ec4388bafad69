"""A RolloutEngine that is asked by messages, wherever it runs."""

import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

from megatron_cpgd.rollout.engine import RefreshReport, Sampling
from megatron_cpgd.rollout.messages import (
    Asleep,
    Failed,
    Generate,
    Generated,
    Ready,
    Refresh,
    Refreshed,
    Request,
    Response,
    Sleep,
    as_error,
)
from megatron_cpgd.types import Rollout


class MessageEngine(ABC):
    """What an engine does, as requests and answers. Calls of threads wait for each other."""

    def __init__(self, *, start_timeout_s: float, step_timeout_s: float) -> None:
        """
        Args:
            start_timeout_s: longest wait for the engine to load.
            step_timeout_s: longest wait for one answer.
        """
        self._calling = threading.Lock()
        self._start_timeout_s = start_timeout_s
        self._step_timeout_s = step_timeout_s
        self._ready = False

    @abstractmethod
    def _send(self, request: Request) -> None:
        """Hand a request over; never waits."""

    @abstractmethod
    def _answer(self, limit_s: float, what: str) -> Response:
        """The next answer.

        Args:
            what: the engine does, for messages.

        Raises:
            RolloutError: the engine is gone, or there was no answer in time.
        """

    def wait_ready(self) -> None:
        """Return once the model is loaded; the other methods do this first if need be.

        Raises:
            ConfigError: an engine argument is wrong, or the engine cannot return routes.
            RolloutError: the engine died or did not load in time.
        """
        with self._calling:
            self._wait_ready()

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[int] | None = None,
        version: int,
    ) -> list[list[Rollout]]:
        """See RolloutEngine.generate."""
        request = Generate(prompts=prompts, sampling=sampling, seeds=seeds, version=version)
        return self._call(request, Generated, "generating").groups

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        """See RolloutEngine.refresh."""
        start = time.perf_counter()
        receipt = self._call(Refresh(arena=str(arena), version=version), Refreshed, "refreshing")
        return RefreshReport(
            seconds=time.perf_counter() - start,
            tensors=receipt.tensors,
            nbytes=receipt.nbytes,
            fingerprints=receipt.fingerprints,
        )

    def sleep(self) -> None:
        """See RolloutEngine.sleep."""
        self._call(Sleep(), Asleep, "falling asleep")

    def _wait_ready(self) -> None:
        if not self._ready:
            self._receive(Ready, self._start_timeout_s, "loading the model")
            self._ready = True

    def _call[Kind: Response](self, request: Request, kind: type[Kind], what: str) -> Kind:
        with self._calling:
            self._wait_ready()
            self._send(request)
            return self._receive(kind, self._step_timeout_s, what)

    def _receive[Kind: Response](self, kind: type[Kind], limit_s: float, what: str) -> Kind:
        answer = self._answer(limit_s, what)
        if isinstance(answer, Failed):
            raise as_error(answer)
        assert isinstance(answer, kind), f"{what}: {type(answer).__name__} is not {kind.__name__}"
        return answer
