"""One engine for several runs of a process, each of which counts its weight versions from 0."""

from dataclasses import replace
from pathlib import Path

from megatron_cpgd.rollout.engine import RefreshReport, RolloutEngine, Sampling
from megatron_cpgd.types import Rollout


class ReusedEngine:
    """A running engine on which `begin_run` starts a new count of versions.

    The engine itself refuses older versions, so that no run can go back to stale weights unseen.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._first = 0
        """The engine's number of this run's version 0."""
        self._latest = -1

    def begin_run(self) -> None:
        """The next refresh may have version 0 again."""
        self._first = self._latest + 1

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[int] | None = None,
        version: int,
    ) -> list[list[Rollout]]:
        """See RolloutEngine.generate."""
        groups = self._engine.generate(
            prompts, sampling, seeds=seeds, version=self._first + version
        )
        return [[replace(each, weight_version=version) for each in group] for group in groups]

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        """See RolloutEngine.refresh."""
        self._latest = self._first + version
        return self._engine.refresh(arena, self._latest)

    def sleep(self) -> None:
        """See RolloutEngine.sleep."""
        self._engine.sleep()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()
