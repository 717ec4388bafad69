"""An engine on an engine node, as rank 0 sees it."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.engine import RefreshReport, Sampling
from megatron_cpgd.rollout.engine_group import EngineGroup
from megatron_cpgd.rollout.engine_nodes import EngineNodes
from megatron_cpgd.rollout.messages import (
    Failed,
    Generate,
    Generated,
    Ready,
    Refresh,
    Refreshed,
    Response,
    as_error,
)
from megatron_cpgd.rollout.node_messages import Ask
from megatron_cpgd.types import Rollout

ANSWER_GRACE_S = 30.0
"""The node has the same time limits, and a better message: it comes first."""


class RemoteEngine:
    """A RolloutEngine that asks engine number `engine` of a node. Any thread may call it."""

    def __init__(
        self,
        nodes: EngineNodes,
        node: int,
        engine: int,
        *,
        start_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        self._nodes, self._node, self._engine = nodes, node, engine
        self._start_timeout_s = start_timeout_s
        self._step_timeout_s = step_timeout_s
        self._calling = threading.Lock()
        self._ready = False

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
        """See RolloutEngine.refresh.

        Args:
            arena: for messages; the engine reads the one of its node.
        """
        start = time.perf_counter()
        receipt = self._call(Refresh(arena=str(arena), version=version), Refreshed, "refreshing")
        return RefreshReport(
            seconds=time.perf_counter() - start,
            tensors=receipt.tensors,
            nbytes=receipt.nbytes,
            digest=receipt.digest,
        )

    def sleep(self) -> None:
        """Raises RolloutError: there is no trainer on its GPUs that needs them."""
        raise RolloutError("an engine of an engine node does not sleep")

    def close(self) -> None:
        """Lets all engines of all nodes go."""
        self._nodes.close()

    def _call[Kind: Response](
        self, request: Generate | Refresh, kind: type[Kind], what: str
    ) -> Kind:
        with self._calling:
            if not self._ready:
                self._receive(Ready, self._start_timeout_s, "loading the model")
                self._ready = True
            self._nodes.send(self._node, Ask(engine=self._engine, request=request))
            return self._receive(kind, self._step_timeout_s, what)

    def _receive[Kind: Response](self, kind: type[Kind], limit_s: float, what: str) -> Kind:
        answer = self._nodes.answer(self._node, self._engine, limit_s + ANSWER_GRACE_S, what)
        if isinstance(answer, Failed):
            raise as_error(answer)
        assert isinstance(answer, kind), f"{what}: {type(answer).__name__} is not {kind.__name__}"
        return answer


class RemoteEngineGroup(EngineGroup):
    """All engines of all engine nodes."""

    def __init__(self, engines: Sequence[RemoteEngine], nodes: EngineNodes) -> None:
        super().__init__(engines)
        self.nodes = nodes
