"""An engine on an engine node, as rank 0 sees it."""

from collections.abc import Sequence

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.engine_group import EngineGroup
from megatron_cpgd.rollout.engine_nodes import EngineNodes
from megatron_cpgd.rollout.message_engine import MessageEngine
from megatron_cpgd.rollout.messages import Generate, Refresh, Request, Response
from megatron_cpgd.rollout.node_messages import Ask

ANSWER_GRACE_S = 30.0
"""The node has the same time limits, and a better message: it comes first."""


class RemoteEngine(MessageEngine):
    """Asks engine number `engine` of a node, which refreshes from the arena there, whatever path it
    is given. Any thread may call it."""

    def __init__(
        self,
        nodes: EngineNodes,
        node: int,
        engine: int,
        *,
        start_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        super().__init__(start_timeout_s=start_timeout_s, step_timeout_s=step_timeout_s)
        self._nodes, self._node, self._engine = nodes, node, engine

    def sleep(self) -> None:
        """Raises RolloutError: there is no trainer on its GPUs that needs them."""
        raise RolloutError("an engine of an engine node does not sleep")

    def close(self) -> None:
        """Lets all engines of all nodes go."""
        self._nodes.close()

    def _send(self, request: Request) -> None:
        assert isinstance(request, Generate | Refresh)
        self._nodes.send(self._node, Ask(engine=self._engine, request=request))

    def _answer(self, limit_s: float, what: str) -> Response:
        return self._nodes.answer(self._node, self._engine, limit_s + ANSWER_GRACE_S, what)


class RemoteEngineGroup(EngineGroup):
    """All engines of all engine nodes."""

    def __init__(self, engines: Sequence[RemoteEngine], nodes: EngineNodes) -> None:
        super().__init__(engines)
        self.nodes = nodes
