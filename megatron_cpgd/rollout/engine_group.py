"""Several engines that act as one: each answers its share of the prompts, all at the same time."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RefreshReport, RolloutEngine, Sampling, stream_seeds
from megatron_cpgd.types import Rollout
from megatron_cpgd.weights.fingerprint import describe_difference


class EngineGroup:
    """A RolloutEngine of engines that hold the same weights.

    Every response has a random stream of its own, so the number of engines changes what is sampled
    by rounding only.
    """

    def __init__(self, engines: Sequence[RolloutEngine]) -> None:
        """
        Args:
            engines: at least one, started for the same model; the group ends them.
        """
        self._engines = list(engines)
        self._threads = ThreadPoolExecutor(len(self._engines), thread_name_prefix="engine")

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[int] | None = None,
        version: int,
    ) -> list[list[Rollout]]:
        """See RolloutEngine.generate."""
        first = stream_seeds(sampling, len(prompts), seeds)
        count = len(self._engines)

        def ask(i: int) -> list[list[Rollout]]:
            share = prompts[i::count]  # neighbours, often of one kind, go to different engines
            if not share:
                return []
            return self._engines[i].generate(
                share, sampling, seeds=first[i::count] if first else None, version=version
            )

        groups: list[list[Rollout]] = [[] for _ in prompts]
        for i, answer in enumerate(self._on_all(ask)):
            groups[i::count] = answer
        return groups

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        """See RolloutEngine.refresh; all engines read the same arena."""
        reports = self._on_all(lambda i: self._engines[i].refresh(arena, version))
        first = reports[0]
        for i, report in enumerate(reports):
            if difference := describe_difference(first.fingerprints, report.fingerprints):
                raise WeightSyncError(
                    f"weight sync, version {version}: engine 0 and engine {i} have read different "
                    f"values from {arena}: {difference}"
                )
        return max(reports, key=lambda report: report.seconds)

    def sleep(self) -> None:
        """See RolloutEngine.sleep."""
        self._on_all(lambda i: self._engines[i].sleep())

    def close(self) -> None:
        """See RolloutEngine.close."""
        for engine in self._engines:
            engine.close()
        self._threads.shutdown()

    def _on_all[Answer](self, function: Callable[[int], Answer]) -> list[Answer]:
        """Of every engine, by its number; an error is raised while others may still be busy."""
        futures = [self._threads.submit(function, i) for i in range(len(self._engines))]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
